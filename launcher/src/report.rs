//! A failure in words, and the error record that is complete: what the rank itself says, with what the launcher knows.

use std::cell::OnceCell;
use std::path::Path;

use fsdp_control::ExitStatus;
use fsdp_control::error_file::{self, Collective, Committed, ErrorKind, ErrorRecord, who};
use fsdp_plan::plan::format_bytes;
use signal_hook::consts::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGKILL, SIGSEGV};

use crate::folder::newest_checkpoint;
use crate::history::{RankFailure, RankPlace};
use crate::rank::End;

/// What made the ranks end.
#[derive(Debug, Clone)]
pub struct Cause {
    /// Who, what and when, in one line: "rank 1 (host a, pid 7) was killed by SIGKILL at step 3".
    pub headline: String,
    /// What else belongs in that line.
    pub remarks: Vec<String>,
    /// Lines below it.
    pub details: Vec<String>,
    /// Of the rank that is named; `None` where it was no rank.
    pub record: Option<ErrorRecord>,
}

impl Cause {
    /// The one line: the headline with its remarks.
    pub fn line(&self) -> String {
        [std::slice::from_ref(&self.headline), &self.remarks].concat().join("; ")
    }
}

/// What completes the records of one start of the ranks.
#[derive(Debug)]
pub struct Records<'a> {
    pub log_dir: &'a Path,
    output_dir: &'a Path,
    run_id: &'a str,
    /// The start's number, from 0.
    attempt: u32,
    /// Newest checkpoint when the first failure was noted. Who wants to go on from it hears what is wrong with the folder.
    committed: OnceCell<Option<Committed>>,
}

impl<'a> Records<'a> {
    pub fn new(log_dir: &'a Path, output_dir: &'a Path, run_id: &'a str, attempt: u32) -> Self {
        Self { log_dir, output_dir, run_id, attempt, committed: OnceCell::new() }
    }

    /// Writes the complete record of a failed rank.
    pub fn write(&self, failure: &RankFailure) {
        // The report says the same; a full disk must not hide it.
        let _ = error_file::write(self.log_dir, &self.complete(failure));
    }

    /// Writes the record of the rank that is to blame where it is not its own failure: it was killed later, or hangs.
    pub fn write_cause(&self, cause: &Cause) {
        if let Some(record) = &cause.record
            && matches!(record.kind, ErrorKind::Hang | ErrorKind::Exit)
        {
            let _ = error_file::write(self.log_dir, record);
        }
    }

    pub fn complete(&self, failure: &RankFailure) -> ErrorRecord {
        let mut record = failure.record.clone().unwrap_or_else(|| on_behalf(failure));
        self.sign(&mut record);
        record.peak_rss_bytes = record.peak_rss_bytes.or(failure.peak_rss_bytes);
        if let End::Killed(signal) = failure.end {
            record.signal = Some(signal);
        }
        if let Some(at) = &failure.at {
            record.phase = record.phase.or(Some(at.phase));
            // What the rank itself knows is less than what the counters of all say.
            if at.waits && (record.collective.is_none() || !failure.others.is_empty()) {
                let missing = failure.others.iter().filter(|place| place.is_absent_from(at.seq));
                record.collective = Some(at.to_record(failure.waiting(), missing.map(|place| place.rank).collect()));
            }
        }
        if record.hint.is_none() {
            record.hint = hint(failure);
        }
        record
    }

    /// Says to which start of which run it belongs.
    fn sign(&self, record: &mut ErrorRecord) {
        record.schema = error_file::SCHEMA;
        record.run_id = Some(self.run_id.to_owned());
        record.attempt = self.attempt;
        if record.checkpoint.is_none() {
            record.checkpoint =
                self.committed.get_or_init(|| newest_checkpoint(self.output_dir).ok().flatten()).clone();
        }
    }

    /// The failure in words, and its rank's complete record. `failure` is the first of `all` that can be the cause of the
    /// others, or of a rank that waited in vain.
    pub fn cause(&self, failure: &RankFailure, all: &[RankFailure]) -> Cause {
        let mut record = self.complete(failure);
        if record.kind == ErrorKind::CollectiveTimeout
            && let Some(collective) = record.collective.take_if(|collective| !collective.missing.is_empty())
        {
            return self.hang(failure, collective, all);
        }
        let mut step = failure.step;
        if record.kind == ErrorKind::CollectiveMismatch
            && let Some(odd) = odd_one_out(failure)
        {
            (record.rank, record.host, record.pid) = (odd.rank, odd.host.clone(), odd.pid.cast_unsigned());
            (record.step, record.phase, step) = (odd.at.step, Some(odd.at.phase), Some(odd.at.step));
        }
        let mut details: Vec<String> = record.unit.iter().map(|unit| format!("  in unit {unit}")).collect();
        details.extend(record.causes.iter().map(|cause| format!("  caused by: {cause}")));
        details.extend(last_lines(failure));
        let remarks = if failure.record.is_none() { record.hint.iter().cloned().collect() } else { Vec::new() };
        Cause { headline: record.at(step), remarks, details, record: Some(record) }
    }

    /// `failure` is that of a rank that waited in vain in `collective`, for ranks that are missing there.
    fn hang(&self, failure: &RankFailure, mut collective: Collective, all: &[RankFailure]) -> Cause {
        if collective.entered.is_empty() {
            collective.entered.push(failure.rank);
        }
        let name = collective_text(&collective);
        let message = format!("did not come to {name}");
        let absent = failure.absent();
        let culprit = absent.map_or(collective.missing[0], |place| place.rank);
        let mut record = ErrorRecord::new(culprit, culprit, ErrorKind::Hang, message, ExitStatus::Failed);
        record.hint = Some(format!("{}; where it is only slow, raise [fsdp] timeout_secs", see_log(culprit)));
        match absent {
            Some(place) => describe_place(&mut record, place),
            // It was killed meanwhile, and so there may be word of who it was.
            None => {
                let its_own = all.iter().find(|other| other.rank == culprit);
                record.host = its_own.map_or("unknown", |own| &own.host).to_owned();
                record.pid = its_own.and_then(|own| own.pid).unwrap_or(0).cast_unsigned();
            }
        }
        let verb = if collective.entered.len() == 1 { "waits" } else { "wait" };
        let mut details = vec![format!("  {} {verb} in {name}", ranks_text(&collective.entered))];
        if let Some(theirs) = &failure.record {
            let victim = who(failure.rank, &failure.host, failure.pid.map(i32::cast_unsigned));
            let when = failure.step.map_or(String::new(), error_file::when);
            details.push(format!("  {victim} gave up{when}: {}", theirs.message));
        }
        details.extend(last_lines(failure));
        record.collective = Some(collective);
        self.sign(&mut record);
        let headline = record.at(absent.map(|place| place.at.step));
        Cause { headline, remarks: record.causes.clone(), details, record: Some(record) }
    }
}

/// Adds where the rank is that did not come, and what it does there.
fn describe_place(record: &mut ErrorRecord, place: &RankPlace) {
    (record.host, record.pid) = (place.host.clone(), place.pid.cast_unsigned());
    (record.step, record.phase) = (place.at.step, Some(place.at.phase));
    record.causes = vec![
        match place.state {
            _ if place.is_suspended() => "it is suspended".to_owned(),
            Some('D') => "the kernel holds it, as where a disk or a file system does not answer".to_owned(),
            _ if place.at.waits => "it waits for others itself".to_owned(),
            _ => format!("it is busy (phase {})", place.at.phase),
        },
        match place.at.seq {
            0 => "it has entered no collective yet".to_owned(),
            _ => format!("its last collective was {}", collective_text(&place.at.to_record(vec![], vec![]))),
        },
    ];
    if place.is_suspended() {
        record.hint = Some("find out who suspended it".to_owned());
    }
}

/// "all_gather number 412 for layers.3 (1.5 MiB)"; where ranks meet at the store, "barrier \"start\"".
fn collective_text(collective: &Collective) -> String {
    if collective.seq == 0 && !collective.unit.is_empty() {
        return format!("{} {:?}", collective.op, collective.unit);
    }
    let mut text = format!("{} number {}", collective.op, collective.seq);
    if !collective.unit.is_empty() {
        text += &format!(" for {}", collective.unit);
    }
    if collective.num_bytes > 0 {
        text += &format!(" ({})", format_bytes(collective.num_bytes));
    }
    text
}

/// The record of a rank that said nothing itself.
fn on_behalf(failure: &RankFailure) -> ErrorRecord {
    let (kind, message) = match (failure.end, failure.oom) {
        (End::Killed(_), Some(oom)) => {
            let rss = failure.peak_rss_bytes.map_or(String::new(), |bytes| format!("RSS {} of ", format_bytes(bytes)));
            let of = oom.limit_bytes.map_or("all memory".to_owned(), |bytes| format!("limit {}", format_bytes(bytes)));
            (ErrorKind::OutOfMemory, format!("was killed by the OOM killer ({rss}{of})"))
        }
        (End::Killed(_), None) => (ErrorKind::Signal, failure.end.to_string()),
        (End::Exited(_), _) => (ErrorKind::Exit, failure.end.to_string()),
    };
    let mut record = ErrorRecord::new(failure.rank, failure.local_rank, kind, message, ExitStatus::Failed);
    record.host = failure.host.clone();
    record.pid = failure.pid.unwrap_or(0).cast_unsigned();
    record.step = failure.step.unwrap_or(0);
    if let End::Exited(code) = failure.end {
        record.exit_status = code;
    }
    record
}

/// What to do about an end of which only the status is known.
fn hint(failure: &RankFailure) -> Option<String> {
    match failure.end {
        _ if failure.record.is_some() => None,
        End::Killed(_) if failure.oom.is_some() => {
            Some("lower [training] micro_batch_size or seq_len, use more ranks, or give the job more memory".to_owned())
        }
        End::Killed(SIGKILL) if !failure.counts_oom => Some(
            "if nobody killed it, the machine ran out of memory (see dmesg): lower micro_batch_size or seq_len"
                .to_owned(),
        ),
        End::Killed(SIGSEGV | SIGABRT | SIGBUS | SIGILL | SIGFPE) => {
            Some(format!("it crashed in native code: {}", see_log(failure.rank)))
        }
        End::Killed(_) => Some(format!("something outside of this run sent the signal: {}", see_log(failure.rank))),
        End::Exited(_) => Some(see_log(failure.rank)),
    }
}

fn see_log(rank: usize) -> String {
    format!("see logs/rank-{rank}.log in the output folder")
}

fn last_lines(failure: &RankFailure) -> Vec<String> {
    let mut lines = Vec::new();
    if !failure.last_lines.is_empty() {
        lines.push(format!("  the last lines of rank {}:", failure.rank));
        lines.extend(failure.last_lines.iter().map(|line| format!("  | {line}")));
    }
    lines
}

/// The one rank that is in another collective than all others that are at the same number, where there are at least two of
/// those: it has left the common path, not they.
fn odd_one_out(failure: &RankFailure) -> Option<&RankPlace> {
    let at = failure.at.as_ref()?;
    let peers: Vec<&RankPlace> = failure.others.iter().filter(|place| place.at.seq == at.seq).collect();
    let is_same =
        |place: &&RankPlace| (&place.at.op, &place.at.unit, place.at.num_bytes) == (&at.op, &at.unit, at.num_bytes);
    let (same, different): (Vec<&RankPlace>, Vec<&RankPlace>) = peers.into_iter().partition(is_same);
    match different[..] {
        [odd] if !same.is_empty() => Some(odd),
        _ => None,
    }
}

/// "rank 1", "ranks 0, 2", "ranks 0, 2-7": `ranks` are in order.
fn ranks_text(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let texts = runs.into_iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        1 => format!("{first}, {last}"),
        _ => format!("{first}-{last}"),
    });
    let list = texts.collect::<Vec<_>>().join(", ");
    format!("rank{} {list}", if ranks.len() == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_in_a_row_are_written_as_a_range() {
        for (ranks, expected) in [
            (&[3][..], "rank 3"),
            (&[0, 2, 3], "ranks 0, 2, 3"),
            (&[0, 1, 2, 4], "ranks 0-2, 4"),
            (&[1, 5, 6, 7, 8], "ranks 1, 5-8"),
        ] {
            assert_eq!(ranks_text(ranks), expected);
        }
    }
}
