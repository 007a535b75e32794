//! Which failure came first, what to say about it, and the exit status.

use std::path::Path;

use fsdp_control::ExitStatus;

use crate::history::{History, RankFailure};
use crate::rank::End;
use crate::report::{Cause, Records};
use crate::supervise::STOP_DEADLINE;

/// What became of one start of the ranks.
#[derive(Debug, Clone)]
pub struct Verdict {
    pub status: ExitStatus,
    /// Why it failed; `None` where it did not.
    pub cause: Option<Cause>,
    /// What else there is to say.
    pub closing: Vec<String>,
}

impl Verdict {
    /// All that is said, as it is printed.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if let Some(cause) = &self.cause {
            lines.push(cause.line());
            lines.extend(cause.details.iter().cloned());
        }
        lines.extend(self.closing.iter().cloned());
        for line in lines.iter_mut().filter(|line| !line.starts_with(' ')) {
            line.insert_str(0, "fsdp-launch: ");
        }
        lines
    }

    /// What to do now, where something is to be done.
    pub fn hint(&self) -> Option<String> {
        match (self.status, self.closing.last()) {
            (_, Some(last)) => Some(last.clone()),
            (ExitStatus::Done, None) => None,
            (status, None) => Some(status.meaning().to_owned()),
        }
    }
}

/// `checkpoint` is the newest committed one; `resumes` says whether the same command would continue from it.
pub fn verdict(history: &History, records: &Records<'_>, checkpoint: Option<&Path>, resumes: bool) -> Verdict {
    let (mut status, cause) = judge(history, records);
    if status == ExitStatus::Failed && checkpoint.is_some() {
        status = ExitStatus::Stopped;
    }
    let mut closing = Vec::new();
    // A launcher that was stopped before its ranks started.
    if cause.is_none()
        && let Some(fault) = &history.fault
    {
        closing.extend(fault.lines.iter().cloned());
    }
    if history.forced && history.has_begun {
        let secs = STOP_DEADLINE.as_secs();
        closing.push(format!("ranks were killed before they had saved (a second Ctrl-C, or longer than {secs} s)"));
    }
    if !history.unkillable.is_empty() {
        closing.push(format!("ranks {:?} cannot be ended: the kernel holds them (see dmesg)", history.unkillable));
    }
    if status == ExitStatus::Stopped || status == ExitStatus::Failed {
        closing.push(match checkpoint {
            Some(path) if resumes => {
                let stopped = if cause.is_none() { "stopped; " } else { "" };
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
    Verdict { status, cause, closing }
}

/// The status without regard to checkpoints, and why.
fn judge(history: &History, records: &Records<'_>) -> (ExitStatus, Option<Cause>) {
    // A fault is noted only where it came before any rank's failure that can be a cause.
    if let Some(fault) = &history.fault {
        if fault.status() == ExitStatus::Stopped {
            return (ExitStatus::Stopped, None);
        }
        let (headline, details) =
            fault.lines.split_first().map_or_else(Default::default, |(first, rest)| (first.clone(), rest.to_vec()));
        return (fault.status(), Some(Cause { headline, remarks: Vec::new(), details, record: None }));
    }
    match culprit(history) {
        // A rank that ends early in a stop takes the others' peer away: that is no failure of theirs. One that hangs is.
        Some(failure) if failure.is_primary() || failure.knows_who() || !history.stop_requested => {
            let status = match failure.end {
                End::Exited(code) if code == ExitStatus::BadInput.code() => ExitStatus::BadInput,
                End::Exited(code) if code == ExitStatus::DoNotRerun.code() => ExitStatus::DoNotRerun,
                _ => ExitStatus::Failed,
            };
            (status, Some(records.cause(failure, &history.failures)))
        }
        // Where no step had begun, nothing is lost.
        _ if history.forced && history.stop_requested && !history.has_begun => (ExitStatus::Stopped, None),
        _ if history.forced => (ExitStatus::Failed, None),
        // A signal that came too late for a step to stop at changes nothing: the run is done.
        culprit if history.num_stopped > 0 || culprit.is_some() => (ExitStatus::Stopped, None),
        _ => (ExitStatus::Done, None),
    }
}

/// The first failure that can be the cause of the others. Where there is none, it is who ended as if nothing were wrong and
/// was missed then; or ranks gave up on one that lives: then the first that knows which, rather than one that lost a rank
/// which had given up.
fn culprit(history: &History) -> Option<&RankFailure> {
    let failures = &history.failures;
    let primary = failures.iter().find(|failure| failure.is_primary());
    let missed = if history.stop_requested { None } else { history.missed() };
    let knows_who = failures.iter().find(|failure| failure.knows_who());
    primary.or(missed).or(knows_who).or(failures.first())
}

#[cfg(test)]
mod tests {
    use fsdp_control::error_file::{Collective, ErrorKind, ErrorRecord};
    use fsdp_control::progress::Phase;
    use signal_hook::consts::SIGKILL;

    use super::*;
    use crate::history::{At, RankPlace};
    use crate::link::Farewell;
    use crate::oom::OomKill;

    fn at(step: u64, seq: u64, unit: &str, waits: bool) -> At {
        let (op, unit) = ("all_gather".to_owned(), unit.to_owned());
        At { step, phase: Phase::ForwardBackward, seq, op, unit, num_bytes: 3 << 19, waits }
    }

    fn failure(rank: usize, end: End, kind: Option<ErrorKind>) -> RankFailure {
        let record = kind.map(|kind| {
            let mut record = ErrorRecord::new(rank, rank, kind, "message".to_owned(), ExitStatus::Failed);
            (record.host, record.pid, record.step) = ("h".to_owned(), 100 + rank as u32, 7);
            record
        });
        RankFailure {
            rank,
            local_rank: rank,
            host: "h".to_owned(),
            pid: Some(100 + rank as i32),
            end,
            step: Some(7),
            at: Some(at(7, 42, "layers.3", true)),
            record,
            last_lines: vec![],
            peak_rss_bytes: Some(5 << 28),
            oom: None,
            counts_oom: false,
            others: vec![],
        }
    }

    fn place(rank: usize, at: At, state: Option<char>) -> RankPlace {
        RankPlace { rank, host: "h".to_owned(), pid: 100 + rank as i32, at, state }
    }

    fn after(failures: Vec<RankFailure>) -> History {
        History { failures, ..History::default() }
    }

    const CHECKPOINT: &str = "out/checkpoints/step-00000005";

    fn judged(history: &History, has_checkpoint: bool) -> Verdict {
        let (log_dir, dir) = (Path::new("/nonexistent/logs"), Path::new("/nonexistent"));
        verdict(history, &Records::new(log_dir, dir, "run", 2), has_checkpoint.then_some(Path::new(CHECKPOINT)), true)
    }

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
            assert_eq!(judged(&history, true).status.code(), with, "{name}");
            assert_eq!(judged(&history, false).status.code(), without, "{name}");
        }
    }

    #[test]
    fn statuses_without_failures() {
        let stopped = History { num_stopped: 2, ..History::default() };
        let asked = History { stop_requested: true, num_stopped: 2, ..History::default() };
        let too_late = History { stop_requested: true, ..History::default() };
        let forced =
            History { stop_requested: true, forced: true, has_begun: true, num_stopped: 2, ..History::default() };
        let forced_early = History { stop_requested: true, forced: true, num_stopped: 1, ..History::default() };
        let other_stopped = History {
            fault: Some(Farewell::new(ExitStatus::Stopped, vec!["node 1: stopped".to_owned()])),
            lost_node: true,
            ..History::default()
        };
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
            (forced_early, 75, 75),
            (other_stopped, 75, 75),
            (victims, 75, 75),
        ] {
            for (has_checkpoint, status) in [(true, with), (false, without)] {
                let verdict = judged(&history, has_checkpoint);
                assert_eq!((verdict.status.code(), verdict.cause.is_none()), (status, true), "{history:?}");
            }
        }
    }

    #[test]
    fn the_report_says_who_what_when_and_what_to_do() {
        let mut first = failure(1, End::Exited(1), Some(ErrorKind::Io));
        first.record.as_mut().unwrap().causes = vec!["disk full".to_owned()];
        first.last_lines = vec!["one".to_owned(), "two".to_owned()];
        let history = after(vec![failure(0, End::Exited(1), Some(ErrorKind::PeerLost)), first]);
        assert_eq!(
            judged(&history, true).lines(),
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
    fn ends_without_a_word_are_described_by_the_launcher() {
        let mut killed = failure(1, End::Killed(SIGKILL), None);
        for (oom, limit, says) in [
            (false, None, "was killed by SIGKILL at step 7; if nobody killed it, the machine ran out of memory"),
            (
                true,
                Some(1 << 30),
                "was killed by the OOM killer (RSS 1.2 GiB of limit 1.0 GiB) at step 7; lower [training]",
            ),
            (true, None, "was killed by the OOM killer (RSS 1.2 GiB of all memory) at step 7; lower [training]"),
        ] {
            killed.oom = oom.then_some(OomKill { limit_bytes: limit });
            let verdict = judged(&after(vec![killed.clone()]), false);
            let start = format!("fsdp-launch: rank 1 (host h, pid 101) {says}");
            assert!(verdict.lines()[0].starts_with(&start), "{:?}", verdict.lines());
            let record = verdict.cause.unwrap().record.unwrap();
            let kind = if oom { ErrorKind::OutOfMemory } else { ErrorKind::Signal };
            assert_eq!((record.kind, record.signal, record.peak_rss_bytes), (kind, Some(9), Some(5 << 28)));
            assert_eq!((record.run_id.as_deref(), record.attempt, record.retryable), (Some("run"), 2, true));
            assert_eq!((record.phase, record.hint.is_some()), (Some(Phase::ForwardBackward), true));
        }
        (killed.oom, killed.counts_oom) = (None, true);
        let line = judged(&after(vec![killed]), false).lines().swap_remove(0);
        assert!(
            line.ends_with(
                "SIGKILL at step 7; something outside of this run sent the signal: see logs/rank-1.log in the \
                                output folder"
            ),
            "{line}"
        );
        let exited = judged(&after(vec![failure(2, End::Exited(3), None)]), false);
        assert_eq!(
            exited.lines()[0],
            "fsdp-launch: rank 2 (host h, pid 102) exited with status 3 at step 7; see logs/rank-2.log in the output folder"
        );
        assert_eq!(exited.cause.unwrap().record.unwrap().exit_status, 3);
    }

    #[test]
    fn a_timeout_names_the_rank_that_did_not_come_and_who_waits() {
        for (state, says) in [
            ('T', "it is suspended"),
            ('D', "the kernel holds it, as where a disk or a file system does not answer"),
            ('R', "it is busy (phase forward_backward)"),
        ] {
            let mut victim = failure(0, End::Exited(1), Some(ErrorKind::CollectiveTimeout));
            // Rank 2 is behind too, but because it waits itself. Ranks 4 and 5 wait where rank 0 does; 5 has given up.
            victim.others = vec![
                place(2, at(7, 41, "layers.2", true), Some('S')),
                place(3, at(6, 41, "layers.2", false), Some(state)),
                place(4, at(7, 42, "layers.3", true), Some('S')),
                place(5, at(7, 42, "layers.3", true), None),
            ];
            let of_the_victim = failure(1, End::Exited(1), Some(ErrorKind::PeerLost));
            let history = after(vec![of_the_victim, victim]);
            assert!(history.is_hang());
            let verdict = judged(&history, false);
            assert_eq!(
                verdict.lines()[..3],
                [
                    format!(
                        "fsdp-launch: rank 3 (host h, pid 103) did not come to all_gather number 42 for layers.3 (1.5 MiB) at \
                         step 6; {says}; its last collective was all_gather number 41 for layers.2 (1.5 MiB)"
                    ),
                    "  ranks 0, 4, 5 wait in all_gather number 42 for layers.3 (1.5 MiB)".to_owned(),
                    "  rank 0 (host h, pid 100) gave up at step 7: message".to_owned(),
                ]
            );
            let record = verdict.cause.unwrap().record.unwrap();
            assert_eq!((record.rank, record.kind, record.step), (3, ErrorKind::Hang, 6));
            let collective = record.collective.unwrap();
            assert_eq!((collective.seq, collective.num_bytes, &*collective.unit), (42, 3 << 19, "layers.3"));
            assert_eq!((collective.entered, collective.missing), (vec![0, 4, 5], vec![2, 3]));
        }
    }

    /// Where others miss it, even a status that says "done" or "stopped" is a failure.
    #[test]
    fn a_rank_that_ends_too_early_is_the_one_that_others_missed() {
        for code in [0, 75] {
            let lost = failure(0, End::Exited(1), Some(ErrorKind::PeerLost));
            let early = failure(2, End::Exited(code), None);
            let mut history =
                History { failures: vec![lost], early: vec![early], num_stopped: 1, ..History::default() };
            let verdict = judged(&history, true);
            let line = format!("fsdp-launch: rank 2 (host h, pid 102) exited with status {code} at step 7; see logs");
            assert!(verdict.lines()[0].starts_with(&line), "{:?}", verdict.lines());
            assert_eq!(verdict.status, ExitStatus::Stopped);
            // In a stop it is none.
            history.stop_requested = true;
            assert!(judged(&history, true).cause.is_none());
            // Nor where the cause is another's.
            history.failures.push(failure(1, End::Killed(SIGKILL), None));
            assert!(judged(&history, true).lines()[0].contains("rank 1 ("));
        }
    }

    /// A signal without a deadline leaves ranks the time that they want; one that hangs would take it for ever.
    #[test]
    fn a_rank_that_hangs_while_the_run_stops_is_named() {
        let mut victim = failure(0, End::Exited(1), Some(ErrorKind::CollectiveTimeout));
        victim.others = vec![place(1, at(7, 41, "layers.2", false), Some('t'))];
        let lost = failure(2, End::Exited(1), Some(ErrorKind::PeerLost));
        let history = History { stop_requested: true, was_signalled: true, ..after(vec![lost, victim]) };
        let lines = judged(&history, true).lines();
        assert!(lines[0].starts_with("fsdp-launch: rank 1 (host h, pid 101) did not come to all_gather number 42"));
        assert!(lines[0].contains("it is suspended"), "{lines:?}");
        assert_eq!(judged(&history, false).status, ExitStatus::Failed);
    }

    /// Where ranks meet at the store, the counters of collectives do not tell who is missing; the record does.
    #[test]
    fn a_rank_that_does_not_come_to_a_barrier_of_the_store_is_named() {
        let mut victim = failure(0, End::Exited(1), Some(ErrorKind::CollectiveTimeout));
        victim.at = Some(at(7, 42, "layers.3", false));
        let (op, unit) = ("barrier".to_owned(), "save of step 10".to_owned());
        let barrier = Collective { op, unit, entered: vec![0], missing: vec![2], ..Collective::default() };
        victim.record.as_mut().unwrap().collective = Some(barrier);
        victim.others =
            vec![place(1, at(7, 42, "layers.3", false), Some('S')), place(2, at(7, 42, "layers.3", false), Some('D'))];
        let knows_nobody = failure(1, End::Exited(1), Some(ErrorKind::CollectiveTimeout));
        let lines = judged(&after(vec![knows_nobody, victim]), false).lines();
        assert_eq!(
            lines[..2],
            [
                "fsdp-launch: rank 2 (host h, pid 102) did not come to barrier \"save of step 10\" at step 7; the kernel holds \
                 it, as where a disk or a file system does not answer; its last collective was all_gather number 42 for \
                 layers.3 (1.5 MiB)",
                "  rank 0 waits in barrier \"save of step 10\"",
            ]
        );
    }

    /// An MPI's ranks have no counters, but say for whom they wait; that one was then killed.
    #[test]
    fn a_rank_of_an_mpi_that_did_not_come_is_named_too() {
        let mut victim = failure(0, End::Exited(1), Some(ErrorKind::CollectiveTimeout));
        victim.at = None;
        victim.record.as_mut().unwrap().collective = Some(at(7, 42, "layers.3", true).to_record(vec![0, 1], vec![2]));
        let mut killed = failure(2, End::Exited(1), Some(ErrorKind::Signal));
        killed.record.as_mut().unwrap().primary = false;
        (killed.at, killed.step) = (None, None);
        let history = after(vec![victim, killed]);
        let verdict = judged(&history, false);
        assert_eq!(
            verdict.lines()[..3],
            [
                "fsdp-launch: rank 2 (host h, pid 102) did not come to all_gather number 42 for layers.3 (1.5 MiB)",
                "  ranks 0, 1 wait in all_gather number 42 for layers.3 (1.5 MiB)",
                "  rank 0 (host h, pid 100) gave up at step 7: message",
            ]
        );
        assert_eq!(verdict.cause.unwrap().record.unwrap().kind, ErrorKind::Hang);
    }

    /// Where all but one are in the same collective, that one has left the path.
    #[test]
    fn of_different_collectives_the_odd_one_is_named() {
        let others = |odd: usize| {
            let unit = |rank| if rank == odd { "layers.4" } else { "layers.3" };
            (0..4).filter(|&rank| rank != 1).map(|rank| place(rank, at(7, 42, unit(rank), true), Some('S'))).collect()
        };
        for (places, expected) in [(others(2), 2), (others(1), 1), (vec![], 1)] {
            let mut failure = failure(1, End::Exited(1), Some(ErrorKind::CollectiveMismatch));
            failure.others = places;
            let lines = judged(&after(vec![failure]), false).lines();
            let start = format!("fsdp-launch: rank {expected} (host h, pid 10{expected}) failed at step 7: message");
            assert_eq!(lines[0], start);
        }
        // Of two, neither is.
        let mut failure = failure(1, End::Exited(1), Some(ErrorKind::CollectiveMismatch));
        failure.others = vec![place(0, at(7, 42, "layers.4", true), Some('S'))];
        assert!(judged(&after(vec![failure]), false).lines()[0].contains("rank 1 ("));
    }

    /// Whether the node was lost first is known when it is noted; what came after it is its consequence.
    #[test]
    fn a_fault_of_a_launcher_is_the_cause_unless_a_rank_failed_before() {
        let lost =
            || Farewell::new(ExitStatus::Failed, vec!["node 1 (host b, ranks 2-3) is lost: it is gone".to_owned()]);
        let mut history = after(vec![failure(0, End::Exited(1), Some(ErrorKind::PeerLost))]);
        history.add_fault(lost());
        history.failures.push(failure(1, End::Exited(2), None));
        for (has_checkpoint, status) in [(true, 75), (false, 1)] {
            let verdict = judged(&history, has_checkpoint);
            assert_eq!(verdict.status.code(), status);
            let lines = verdict.lines();
            assert_eq!(lines[0], "fsdp-launch: node 1 (host b, ranks 2-3) is lost: it is gone");
            assert_eq!(lines.len(), 2, "{lines:?}");
        }
        let mut history = after(vec![failure(1, End::Killed(SIGKILL), None)]);
        history.add_fault(lost());
        let lines = judged(&history, false).lines();
        assert!(
            lines[0].starts_with("fsdp-launch: rank 1 (host h, pid 101) was killed by SIGKILL at step 7"),
            "{lines:?}"
        );
    }

    #[test]
    fn a_run_that_never_resumes_is_told_how_to() {
        let history = after(vec![failure(1, End::Killed(SIGKILL), None)]);
        let records = Records::new(Path::new("/nonexistent/logs"), Path::new("/nonexistent"), "run", 0);
        let lines = verdict(&history, &records, Some(Path::new(CHECKPOINT)), false).lines();
        assert!(lines.last().unwrap().contains("--set checkpoint.resume=auto"), "{lines:?}");
    }
}
