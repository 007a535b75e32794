//! Which failure came first, what to say about it, and the exit status.

use std::path::Path;

use fsdp_control::ExitStatus;
use fsdp_control::error_file::ErrorKind;
use signal_hook::consts::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGSEGV};

use crate::rank::End;
use crate::supervise::{History, RankFailure, STOP_DEADLINE};

/// The run's exit status, and the lines that say why.
///
/// `checkpoint` is the newest committed one; `resumes` says whether the same command would continue from it.
pub fn verdict(history: &History, checkpoint: Option<&Path>, resumes: bool) -> (ExitStatus, Vec<String>) {
    let mut lines = Vec::new();
    let culprit = culprit(&history.failures);
    let status = match culprit {
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
                let stopped = if culprit.is_none() { "stopped; " } else { "" };
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
        let after = match absent.at.seq {
            0 => "it has entered none yet".to_owned(),
            seq => format!("its last one was number {seq}, {} for {:?}", absent.at.op, absent.at.unit),
        };
        lines.push(format!(
            "rank {} (host {}, pid {}) {did} to a collective {}; {after}",
            absent.rank,
            failure.host,
            absent.pid,
            when(absent.at.step)
        ));
    }
    let when = when(failure.step);
    let who = format!("rank {} (host {}, pid {})", failure.rank, failure.host, failure.pid);
    match &failure.record {
        Some(record) => {
            let what = if record.kind == ErrorKind::Panic { "panicked" } else { "failed" };
            lines.push(format!("{who} {what} {when}: {}", record.message));
            lines.extend(record.unit.iter().map(|unit| format!("  in unit {unit}")));
            lines.extend(record.causes.iter().map(|cause| format!("  caused by: {cause}")));
        }
        None => lines.push(format!("{who} {} {when}; {}", failure.end, hint(failure))),
    }
    if !failure.last_lines.is_empty() {
        lines.push(format!("  the last lines of rank {}:", failure.rank));
        lines.extend(failure.last_lines.iter().map(|line| format!("  | {line}")));
    }
    lines
}

fn when(step: u64) -> String {
    match step {
        0 => "before the first step".to_owned(),
        step => format!("at step {step}"),
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
    use fsdp_control::progress::{Op, Snapshot};

    use super::*;
    use crate::supervise::AbsentRank;

    fn failure(rank: usize, end: End, kind: Option<ErrorKind>) -> RankFailure {
        let record = kind.map(|kind| ErrorRecord::new(rank, rank, kind, "message".to_owned(), ExitStatus::Failed));
        let (host, pid) = ("h".to_owned(), 100 + rank as i32);
        RankFailure { rank, host, pid, end, step: 7, record, last_lines: vec![], absent: vec![] }
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
        let at = Snapshot { step: 6, seq: 41, op: Op::AllGather, inside: false, unit: "layers.2".to_owned() };
        // Rank 2 was behind too, but because it waits itself.
        let waits = Snapshot { seq: 42, inside: true, ..at.clone() };
        victim.absent = vec![
            AbsentRank { rank: 2, pid: 102, at: waits, state: Some('S') },
            AbsentRank { rank: 3, pid: 103, at, state: Some('T') },
        ];
        let of_the_victim = failure(1, End::Exited(1), Some(ErrorKind::PeerLost));
        let (_, lines) = verdict(&after(vec![of_the_victim, victim]), None, true);
        assert_eq!(
            lines[0],
            "fsdp-launch: rank 3 (host h, pid 103) is suspended and did not come to a collective at step 6; its last one \
             was number 41, all_gather for \"layers.2\""
        );
    }

    #[test]
    fn a_run_that_never_resumes_is_told_how_to() {
        let history = after(vec![failure(1, End::Killed(SIGKILL), None)]);
        let (_, lines) = verdict(&history, Some(Path::new(CHECKPOINT)), false);
        assert!(lines.last().unwrap().contains("--set checkpoint.resume=auto"), "{lines:?}");
    }
}
