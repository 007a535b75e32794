//! Which failure came first, what to say about it, and the exit status.

use std::path::Path;

use fsdp_control::ExitStatus;
use fsdp_control::error_file::ErrorKind;
use signal_hook::consts::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGSEGV};

use crate::history::{History, RankFailure};
use crate::rank::End;
use crate::supervise::STOP_DEADLINE;

/// The run's exit status, and the lines that say why.
///
/// `checkpoint` is the newest committed one; `resumes` says whether the same command would continue from it.
pub fn verdict(history: &History, checkpoint: Option<&Path>, resumes: bool) -> (ExitStatus, Vec<String>) {
    let mut lines = Vec::new();
    // A fault is noted only where it came before any rank's failure that can be a cause.
    let culprit = if history.fault.is_some() { None } else { culprit(&history.failures) };
    let status = match culprit {
        _ if let Some(fault) = &history.fault => {
            lines.extend(fault.lines.iter().cloned());
            match fault.status() {
                ExitStatus::Failed => failed(checkpoint),
                status => status,
            }
        }
        // A rank that ends early in a stop takes the others' peer away: that is no failure of theirs.
        Some(failure) if failure.is_primary() || !history.stop_requested => {
            lines = report(failure);
            match failure.end {
                End::Exited(code) if code == ExitStatus::BadInput.code() => ExitStatus::BadInput,
                End::Exited(code) if code == ExitStatus::DoNotRerun.code() => ExitStatus::DoNotRerun,
                _ => failed(checkpoint),
            }
        }
        _ if history.forced => failed(checkpoint),
        // A signal that came too late for a step to stop at changes nothing: the run is done.
        _ if history.num_stopped > 0 || culprit.is_some() => ExitStatus::Stopped,
        _ => ExitStatus::Done,
    };
    if history.forced {
        let secs = STOP_DEADLINE.as_secs();
        lines.push(format!("ranks were killed before they had saved (a second Ctrl-C, or longer than {secs} s)"));
    }
    if !history.unkillable.is_empty() {
        lines.push(format!("ranks {:?} cannot be ended: the kernel holds them (see dmesg)", history.unkillable));
    }
    if status == ExitStatus::Stopped || status == ExitStatus::Failed {
        lines.push(match checkpoint {
            Some(path) if resumes => {
                let stopped = if culprit.is_none() && history.fault.is_none() { "stopped; " } else { "" };
                format!("{stopped}{} is committed; run the same command again to continue", path.display())
            }
            Some(path) => {
                format!("{} is committed; continue from it with --set checkpoint.resume=auto", path.display())
            }
            None if status == ExitStatus::Stopped => {
                "stopped before the first checkpoint; the same command starts from the beginning".to_owned()
            }
            None => "no checkpoint is committed".to_owned(),
        });
    }
    for line in lines.iter_mut().filter(|line| !line.starts_with(' ')) {
        line.insert_str(0, "fsdp-launch: ");
    }
    (status, lines)
}

/// The first failure that can be the cause of the others. Where there is none, ranks gave up on one that lives: then the
/// first that knows which, rather than one that lost a rank which had given up.
fn culprit(failures: &[RankFailure]) -> Option<&RankFailure> {
    let knows_who = |failure: &&RankFailure| !failure.absent.is_empty();
    failures.iter().find(|failure| failure.is_primary()).or(failures.iter().find(knows_who)).or(failures.first())
}

/// The status of a failure that a new start may overcome.
fn failed(checkpoint: Option<&Path>) -> ExitStatus {
    if checkpoint.is_some() { ExitStatus::Stopped } else { ExitStatus::Failed }
}

/// The first failure: who, what, when, what to do; then what the rank itself has to say.
fn report(failure: &RankFailure) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(absent) = failure.absent.iter().min_by_key(|rank| rank.order_of_suspicion()) {
        let did = match absent.state {
            Some('T') => "is suspended and did not come",
            _ => "did not come",
        };
        let after = match absent.seq {
            0 => "it has entered none yet".to_owned(),
            seq => format!("its last one was number {seq}, {} for {:?}", absent.op, absent.unit),
        };
        lines.push(format!(
            "{} {did} to a collective{}; {after}",
            who(absent.rank, &absent.host, Some(absent.pid)),
            when(Some(absent.step))
        ));
    }
    let when = when(failure.step);
    let who = who(failure.rank, &failure.host, failure.pid);
    match &failure.record {
        Some(record) => {
            let what = if record.kind == ErrorKind::Panic { "panicked" } else { "failed" };
            lines.push(format!("{who} {what}{when}: {}", record.message));
            lines.extend(record.unit.iter().map(|unit| format!("  in unit {unit}")));
            lines.extend(record.causes.iter().map(|cause| format!("  caused by: {cause}")));
        }
        None => lines.push(format!("{who} {}{when}; {}", failure.end, hint(failure))),
    }
    if !failure.last_lines.is_empty() {
        lines.push(format!("  the last lines of rank {}:", failure.rank));
        lines.extend(failure.last_lines.iter().map(|line| format!("  | {line}")));
    }
    lines
}

fn who(rank: usize, host: &str, pid: Option<i32>) -> String {
    match pid {
        Some(pid) => format!("rank {rank} (host {host}, pid {pid})"),
        None => format!("rank {rank} (host {host})"),
    }
}

fn when(step: Option<u64>) -> String {
    match step {
        None => String::new(),
        Some(0) => " before the first step".to_owned(),
        Some(step) => format!(" at step {step}"),
    }
}

/// What to do about an end of which only the status is known.
fn hint(failure: &RankFailure) -> String {
    let log = format!("see logs/rank-{}.log in the output folder", failure.rank);
    match failure.end {
        End::Killed(SIGKILL) => {
            "if nobody killed it, the machine ran out of memory (see dmesg): lower micro_batch_size or seq_len"
                .to_owned()
        }
        End::Killed(SIGSEGV | SIGABRT | SIGBUS | SIGILL | SIGFPE) => {
            format!("it crashed in native code: {log}")
        }
        End::Killed(_) => format!("something outside of this run sent the signal: {log}"),
        End::Exited(_) => log,
    }
}

#[cfg(test)]
mod tests {
    use fsdp_control::error_file::ErrorRecord;

    use super::*;
    use crate::history::AbsentRank;
    use crate::link::Farewell;

    fn failure(rank: usize, end: End, kind: Option<ErrorKind>) -> RankFailure {
        let record = kind.map(|kind| ErrorRecord::new(rank, rank, kind, "message".to_owned(), ExitStatus::Failed));
        let (host, pid) = ("h".to_owned(), Some(100 + rank as i32));
        RankFailure { rank, host, pid, end, step: Some(7), seq: 42, record, last_lines: vec![], absent: vec![] }
    }

    fn after(failures: Vec<RankFailure>) -> History {
        History { failures, ..History::default() }
    }

    const CHECKPOINT: &str = "out/checkpoints/step-00000005";

    #[test]
    fn statuses_follow_the_first_primary_failure() {
        let kill = End::Killed(SIGKILL);
        let lost = Some(ErrorKind::PeerLost);
        for (name, failures, with, without) in [
            ("killed", vec![failure(1, kill, None)], 75, 1),
            ("bad input", vec![failure(1, End::Exited(2), Some(ErrorKind::BadInput))], 2, 2),
            ("diverged", vec![failure(1, End::Exited(93), Some(ErrorKind::NonFinite))], 93, 93),
            ("odd status", vec![failure(1, End::Exited(77), None)], 75, 1),
            ("failed with 75", vec![failure(1, End::Exited(75), Some(ErrorKind::Io))], 75, 1),
            ("victim first", vec![failure(0, End::Exited(1), lost), failure(1, End::Exited(93), None)], 93, 93),
            ("victims only", vec![failure(0, End::Exited(1), lost)], 75, 1),
            ("later failures", vec![failure(1, kill, None), failure(0, End::Exited(2), None)], 75, 1),
        ] {
            let history = after(failures);
            assert_eq!(verdict(&history, Some(Path::new(CHECKPOINT)), true).0.code(), with, "{name}");
            assert_eq!(verdict(&history, None, true).0.code(), without, "{name}");
        }
    }

    #[test]
    fn statuses_without_failures() {
        let stopped = History { num_stopped: 2, ..History::default() };
        let asked = History { stop_requested: true, num_stopped: 2, ..History::default() };
        let too_late = History { stop_requested: true, ..History::default() };
        let forced = History { stop_requested: true, forced: true, num_stopped: 2, ..History::default() };
        let victims = History {
            stop_requested: true,
            num_stopped: 1,
            failures: vec![failure(0, End::Exited(1), Some(ErrorKind::PeerLost))],
            ..History::default()
        };
        for (history, with, without) in [
            (History::default(), 0, 0),
            (stopped, 75, 75),
            (asked, 75, 75),
            (too_late, 0, 0),
            (forced, 75, 1),
            (victims, 75, 75),
        ] {
            assert_eq!(verdict(&history, Some(Path::new(CHECKPOINT)), true).0.code(), with, "{history:?}");
            assert_eq!(verdict(&history, None, true).0.code(), without, "{history:?}");
        }
    }

    #[test]
    fn the_report_says_who_what_when_and_what_to_do() {
        let mut first = failure(1, End::Exited(1), Some(ErrorKind::Io));
        first.record.as_mut().unwrap().causes = vec!["disk full".to_owned()];
        first.last_lines = vec!["one".to_owned(), "two".to_owned()];
        let history = after(vec![failure(0, End::Exited(1), Some(ErrorKind::PeerLost)), first]);
        assert_eq!(
            verdict(&history, Some(Path::new(CHECKPOINT)), true).1,
            [
                "fsdp-launch: rank 1 (host h, pid 101) failed at step 7: message",
                "  caused by: disk full",
                "  the last lines of rank 1:",
                "  | one",
                "  | two",
                "fsdp-launch: out/checkpoints/step-00000005 is committed; run the same command again to continue",
            ]
        );
    }

    #[test]
    fn a_timeout_names_the_rank_that_did_not_come() {
        let mut victim = failure(0, End::Exited(1), Some(ErrorKind::CollectiveTimeout));
        let suspended = AbsentRank {
            rank: 3,
            host: "h".to_owned(),
            pid: 103,
            step: 6,
            seq: 41,
            op: "all_gather".to_owned(),
            unit: "layers.2".to_owned(),
            waits: false,
            state: Some('T'),
        };
        // Rank 2 was behind too, but because it waits itself.
        let waits = AbsentRank { rank: 2, seq: 42, waits: true, state: Some('S'), ..suspended.clone() };
        victim.absent = vec![waits, suspended];
        let of_the_victim = failure(1, End::Exited(1), Some(ErrorKind::PeerLost));
        let (_, lines) = verdict(&after(vec![of_the_victim, victim]), None, true);
        assert_eq!(
            lines[0],
            "fsdp-launch: rank 3 (host h, pid 103) is suspended and did not come to a collective at step 6; its last one \
             was number 41, all_gather for \"layers.2\""
        );
    }

    /// Whether the node was lost first is known when it is noted; what came after it is its consequence.
    #[test]
    fn a_fault_of_a_launcher_is_the_cause_unless_a_rank_failed_before() {
        let lost =
            || Farewell::new(ExitStatus::Failed, vec!["node 1 (host b, ranks 2-3) is lost: it is gone".to_owned()]);
        let mut history = after(vec![failure(0, End::Exited(1), Some(ErrorKind::PeerLost))]);
        history.add_fault(lost());
        history.failures.push(failure(1, End::Exited(2), None));
        for (checkpoint, status) in [(Some(Path::new(CHECKPOINT)), 75), (None, 1)] {
            let (ended, lines) = verdict(&history, checkpoint, true);
            assert_eq!(ended.code(), status);
            assert_eq!(lines[0], "fsdp-launch: node 1 (host b, ranks 2-3) is lost: it is gone");
            assert_eq!(lines.len(), 2, "{lines:?}");
        }
        let mut history = after(vec![failure(1, End::Killed(SIGKILL), None)]);
        history.add_fault(lost());
        let (_, lines) = verdict(&history, None, true);
        assert!(
            lines[0].starts_with("fsdp-launch: rank 1 (host h, pid 101) was killed by SIGKILL at step 7"),
            "{lines:?}"
        );
    }

    #[test]
    fn a_run_that_never_resumes_is_told_how_to() {
        let history = after(vec![failure(1, End::Killed(SIGKILL), None)]);
        let (_, lines) = verdict(&history, Some(Path::new(CHECKPOINT)), false);
        assert!(lines.last().unwrap().contains("--set checkpoint.resume=auto"), "{lines:?}");
    }
}
