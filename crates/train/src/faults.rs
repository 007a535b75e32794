//! Faults that tests ask for, in a worker that is built for them: `FSDP_FAULT="rank=1,step=5,do=panic"`; rank `*` is every
//! one, and a semicolon separates several.
//!
//! | do | what that rank does at the start of that step |
//! |---|---|
//! | `panic`, `abort`, `exit=STATUS` | ends so |
//! | `spin` | computes without end |
//! | `skip` | leaves out a barrier that all others enter |
//! | `desync=op`, `desync=size`, `desync=dtype` | enters another all-reduce than all others |
//! | `slow=MILLISECONDS` | sleeps so long, and at each later step too |
//! | `nan` | has NaN in its own shard of the weights |
//! | `eat` | takes memory without end |
//! | `child`, `daemon` | leaves a process that sleeps, in its own group or in a session of its own |

use std::hint::spin_loop;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use fsdp::{Engine, EngineError, StateKind};
use fsdp_comm::ReduceOp;
use tch::{Device, Kind, Tensor};

use crate::error::TrainError;

const VARIABLE: &str = "FSDP_FAULT";

#[derive(Debug, Clone, PartialEq)]
struct Fault {
    /// `None` for all.
    rank: Option<usize>,
    step: u64,
    what: What,
}

#[derive(Debug, Clone, PartialEq)]
enum What {
    Panic,
    Abort,
    Exit(i32),
    Spin,
    Skip,
    Desync(Difference),
    Slow(Duration),
    Nan,
    Eat,
    Child,
    Daemon,
}

/// In what a collective differs from the other ranks'.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Difference {
    Op,
    Size,
    Dtype,
}

/// Does what the variable asks for, if it is of this step. All ranks call it at the start of each step.
///
/// # Errors
/// The variable has no faults, or the fault shows at once.
pub fn strike(rank: usize, step: u64, engine: &mut Engine) -> Result<(), TrainError> {
    static FAULTS: OnceLock<Result<Vec<Fault>, String>> = OnceLock::new();
    let faults = FAULTS.get_or_init(|| std::env::var(VARIABLE).map_or(Ok(vec![]), |text| parse(&text)));
    for fault in faults.as_ref().map_err(|problem| TrainError::BadInput(format!("{VARIABLE}: {problem}")))? {
        let is_due = step == fault.step || (step > fault.step && matches!(fault.what, What::Slow(_)));
        if is_due {
            fault.what.strike(fault.rank.is_none_or(|culprit| culprit == rank), engine)?;
        }
    }
    Ok(())
}

impl What {
    fn strike(&self, is_culprit: bool, engine: &mut Engine) -> Result<(), TrainError> {
        match *self {
            What::Skip if is_culprit => {}
            What::Skip => engine.process_group().barrier()?,
            What::Desync(difference) => {
                let (numel, kind) = match difference {
                    Difference::Size if is_culprit => (16, Kind::Float),
                    Difference::Dtype if is_culprit => (16, Kind::BFloat16),
                    _ => (8, Kind::Float),
                };
                let tensor = Tensor::ones([numel], (kind, Device::Cpu));
                match difference {
                    Difference::Op if is_culprit => engine.process_group().broadcast(&tensor, 0)?,
                    _ => engine.process_group().all_reduce(&tensor, ReduceOp::Sum)?,
                }
            }
            _ if !is_culprit => {}
            What::Panic => panic!("a fault that was asked for"),
            What::Abort => std::process::abort(),
            What::Exit(status) => std::process::exit(status),
            What::Spin => loop {
                spin_loop();
            },
            What::Slow(time) => std::thread::sleep(time),
            What::Nan => {
                let mut is_first = true;
                engine.write_state(StateKind::Param, |_, values| {
                    if std::mem::take(&mut is_first) {
                        values[0] = f32::NAN;
                    }
                    Ok::<(), EngineError>(())
                })?;
            }
            What::Eat => {
                let mut eaten = Vec::new();
                loop {
                    eaten.push(vec![1u8; 1 << 20]);
                }
            }
            What::Child => spawn(&["sleep", "600"])?,
            What::Daemon => spawn(&["setsid", "sleep", "600"])?,
        }
        Ok(())
    }
}

fn spawn(words: &[&str]) -> Result<(), TrainError> {
    let spawned = Command::new(words[0]).args(&words[1..]).spawn();
    spawned.map(drop).map_err(|source| TrainError::Io { path: words[0].into(), source })
}

/// # Errors
/// What was expected, and what is there instead.
fn parse(text: &str) -> Result<Vec<Fault>, String> {
    let problem = |part| format!("expected rank=RANK,step=STEP,do=FAULT as faults.rs has them, got {part:?}");
    text.split(';').map(|part| parse_one(part).ok_or_else(|| problem(part))).collect()
}

fn parse_one(text: &str) -> Option<Fault> {
    let (rank, rest) = text.strip_prefix("rank=")?.split_once(",step=")?;
    let (step, what) = rest.split_once(",do=")?;
    let what = match what.split_once('=').unwrap_or((what, "")) {
        ("panic", "") => What::Panic,
        ("abort", "") => What::Abort,
        ("exit", status) => What::Exit(status.parse().ok()?),
        ("spin", "") => What::Spin,
        ("skip", "") => What::Skip,
        ("desync", "op") => What::Desync(Difference::Op),
        ("desync", "size") => What::Desync(Difference::Size),
        ("desync", "dtype") => What::Desync(Difference::Dtype),
        ("slow", millis) => What::Slow(Duration::from_millis(millis.parse().ok()?)),
        ("nan", "") => What::Nan,
        ("eat", "") => What::Eat,
        ("child", "") => What::Child,
        ("daemon", "") => What::Daemon,
        _ => return None,
    };
    let rank = if rank == "*" { None } else { Some(rank.parse().ok()?) };
    Some(Fault { rank, step: step.parse().ok()?, what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_faults_or_an_error() {
        for (what, expected) in [
            ("panic", What::Panic),
            ("exit=7", What::Exit(7)),
            ("desync=dtype", What::Desync(Difference::Dtype)),
            ("slow=40", What::Slow(Duration::from_millis(40))),
        ] {
            let of_one = Fault { rank: Some(1), step: 5, what: expected };
            let of_all = Fault { rank: None, step: 7, what: What::Nan };
            assert_eq!(parse(&format!("rank=1,step=5,do={what};rank=*,step=7,do=nan")), Ok(vec![of_one, of_all]));
        }
        for text in ["", "rank=1,step=5", "rank=x,step=5,do=panic", "rank=1,step=5,do=slow", "step=5,rank=1,do=panic"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
