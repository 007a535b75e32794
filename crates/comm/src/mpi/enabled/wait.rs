//! Waiting for MPI: look, spin a little, then sleep for growing times, because ranks may share cores.
//!
//! MPI does not say whom it waits for. A rank that has waited for the timeout, or that MPI gives an error, tells the others
//! where it is; all that wait too answer with their own report, and give up with it. Who does not answer is missing, and
//! who has called something else under the same number is told.

use std::time::{Duration, Instant};

use fsdp_control::progress::Op;

use super::MpiGroup;
use super::communicator::Request;
use super::process::Failed;
use crate::sum::{kind_code, kind_from_code};
use crate::{Call, CommError, Phase};

/// How often the clock, and other ranks' reports, are looked at.
const SLICE: Duration = Duration::from_millis(100);
/// How long there is no sleep after something has moved.
const SPIN: Duration = Duration::from_micros(30);
/// A look that takes this long has moved data.
const BUSY: Duration = Duration::from_micros(10);
/// A sleep is this part of the time in which nothing has moved, so it delays little by comparison,
const SLEEP_PART: u32 = 8;
/// and at most this.
const LONGEST_SLEEP: Duration = Duration::from_micros(500);
/// How long the others' reports are waited for: some slices.
const GRACE: Duration = Duration::from_secs(1);

/// What a rank tells when it gives up.
#[derive(Debug)]
struct Report {
    /// What it has called last on the group, at most [`NUM_CALLS`], oldest first.
    calls: Vec<Call>,
    /// How long it has waited, if that is why; else 0.
    timeout_us: u64,
}

const NUM_CALLS: usize = 16;
/// Longest unit name in a report, in bytes.
const UNIT_BYTES: usize = 48;
const CALL_WORDS: usize = 3 + UNIT_BYTES / 8;
const REPORT_WORDS: usize = 2 + NUM_CALLS * CALL_WORDS;

impl MpiGroup {
    /// Lets everything go on that was started.
    pub(super) fn go_on(&mut self) -> Result<(), CommError> {
        // A message that has come is looked at where this rank waits.
        self.communicator.probe().map_err(|failed| self.error(failed, None))?;
        self.advance()
    }

    /// Waits until all requests are done.
    pub(super) fn wait_requests(&mut self, requests: &mut [Request], call: &Call) -> Result<(), CommError> {
        let mut num_done = 0;
        self.wait(call, |group| {
            while let Some(request) = requests.get_mut(num_done) {
                if !request.is_done().map_err(|failed| group.failed(failed, call))? {
                    return Ok(false);
                }
                num_done += 1;
            }
            Ok(true)
        })
    }

    /// Waits, within `call`, until `is_done` says so.
    pub(super) fn wait(
        &mut self,
        call: &Call,
        mut is_done: impl FnMut(&mut Self) -> Result<bool, CommError>,
    ) -> Result<(), CommError> {
        if let Some(progress) = self.calls.progress() {
            progress.enter(call.op, call.seq, &call.unit, call.num_bytes);
        }
        let mut waited = Duration::ZERO;
        let mut last_look_around = Instant::now();
        let mut moved = Instant::now();
        loop {
            let start = Instant::now();
            self.advance()?;
            if is_done(self)? {
                break;
            }
            let now = Instant::now();
            if now - start > BUSY {
                moved = now;
            }
            if now - moved > SPIN {
                std::thread::sleep(((now - moved) / SLEEP_PART).min(LONGEST_SLEEP));
            }
            let since = last_look_around.elapsed();
            if since >= SLICE.min(self.timeout) {
                last_look_around = Instant::now();
                // Time in which this process was itself stopped does not count.
                waited += since.min(2 * SLICE);
                let is_told = self.communicator.probe().map_err(|failed| self.error(failed, Some(call)))?.is_some();
                if is_told || waited >= self.timeout {
                    return Err(self.give_up(call, waited, None));
                }
            }
        }
        // Left only on success: the counters then show where a failed rank was.
        if let Some(progress) = self.calls.progress() {
            progress.leave();
        }
        Ok(())
    }

    /// What MPI's error in a call means.
    pub(super) fn failed(&self, failed: Failed, call: &Call) -> CommError {
        self.give_up(call, Duration::ZERO, Some(self.error(failed, Some(call))))
    }

    /// Why the wait is in vain: MPI's `error`, the time, or another rank's report.
    fn give_up(&self, call: &Call, waited: Duration, error: Option<CommError>) -> CommError {
        let waited = if waited >= self.timeout { waited } else { Duration::ZERO };
        let reports = match self.exchange_reports(call, waited) {
            Ok(reports) => reports,
            Err(second) => return error.unwrap_or(second),
        };
        let run_rank = |rank: usize| self.run_ranks[rank];
        let others = || (0..self.world_size()).filter(|&rank| rank != self.rank());
        let rank = run_rank(self.rank());
        let own_calls = self.calls.calls();
        for (other, report) in reports.iter().enumerate() {
            for other_call in report.iter().flat_map(|report| &report.calls) {
                if let Some(own) = own_calls.iter().find(|own| own.seq == other_call.seq)
                    && !is_same(own, other_call)
                {
                    let (call, other_rank, other_call) = (own.clone(), run_rank(other), other_call.clone());
                    return CommError::Mismatch { rank, call, other_rank, other_call };
                }
            }
        }
        if let Some(error) = error {
            return error;
        }
        let timeout_us = reports.iter().flatten().map(|report| report.timeout_us).max().unwrap_or(0);
        let longest_wait = waited.max(Duration::from_micros(timeout_us));
        let has_come =
            |rank: usize| reports[rank].iter().flat_map(|report| &report.calls).any(|theirs| theirs.seq >= call.seq);
        let mut missing: Vec<usize> = others().filter(|&rank| !has_come(rank)).map(run_rank).collect();
        if longest_wait.is_zero() || (waited.is_zero() && missing.is_empty()) {
            // Others gave up, for a reason of theirs or before this rank came.
            let lost = others().filter(|&rank| reports[rank].is_some()).map(run_rank).collect();
            return CommError::PeerLost { rank, lost, call: call.clone() };
        }
        if missing.is_empty() {
            // All have come, but data has not: any of them may be the one that is cut off.
            missing = others().map(run_rank).collect();
        }
        CommError::Timeout { rank, missing, phase: Phase::Written, waited: longest_wait, call: call.clone() }
    }

    /// Tells all what this rank waits for, and gives what they tell, by rank; this rank's own is not among them.
    fn exchange_reports(&self, call: &Call, timeout: Duration) -> Result<Vec<Option<Report>>, CommError> {
        let failed = |failed| self.error(failed, Some(call));
        let mut calls = self.calls.calls();
        calls.drain(..calls.len().saturating_sub(NUM_CALLS));
        let report = Report { calls, timeout_us: timeout.as_micros() as u64 };
        // It stays: the process ends soon, and a rank that hangs does not receive it before.
        let message: &'static [u64] = Box::leak(Box::new(report.to_words()));
        let mut sends = Vec::new();
        for rank in (0..self.world_size()).filter(|&rank| rank != self.rank()) {
            sends.push(self.communicator.start_send(message, rank).map_err(failed)?);
        }
        let mut reports: Vec<Option<Report>> = (0..self.world_size()).map(|_| None).collect();
        let start = Instant::now();
        while start.elapsed() < GRACE {
            while let Some(rank) = self.communicator.probe().map_err(failed)? {
                let words = self.communicator.receive::<REPORT_WORDS>(rank).map_err(failed)?;
                reports[rank] = Some(Report::from_words(&words));
            }
            let mut num_sent = 0;
            for send in &mut sends {
                num_sent += usize::from(send.is_done().map_err(failed)?);
            }
            if num_sent == sends.len() && reports.iter().flatten().count() == sends.len() {
                break;
            }
            std::thread::sleep(LONGEST_SLEEP);
        }
        Ok(reports)
    }
}

fn is_same(a: &Call, b: &Call) -> bool {
    let what = |call: &Call| (call.op, call.kind, call.num_bytes, call.detail);
    what(a) == what(b) && a.unit.bytes().take(UNIT_BYTES).eq(b.unit.bytes().take(UNIT_BYTES))
}

impl Report {
    fn to_words(&self) -> [u64; REPORT_WORDS] {
        let mut words = [0; REPORT_WORDS];
        words[0] = self.timeout_us;
        words[1] = self.calls.len() as u64;
        for (Call { op, seq, kind, num_bytes, detail, unit }, words) in
            self.calls.iter().zip(words[2..].chunks_mut(CALL_WORDS))
        {
            words[0] = u64::from_le_bytes([*op as u8, kind.map_or(0, kind_code), *detail, 0, 0, 0, 0, 0]);
            words[1] = *seq;
            words[2] = *num_bytes;
            let mut bytes = [0; UNIT_BYTES];
            let len = unit.len().min(UNIT_BYTES);
            bytes[..len].copy_from_slice(&unit.as_bytes()[..len]);
            for (word, chunk) in words[3..].iter_mut().zip(bytes.as_chunks::<8>().0) {
                *word = u64::from_le_bytes(*chunk);
            }
        }
        words
    }

    fn from_words(words: &[u64; REPORT_WORDS]) -> Self {
        let calls = words[2..].chunks(CALL_WORDS).take(words[1] as usize).map(|words| {
            let [op, kind, detail, ..] = words[0].to_le_bytes();
            let bytes: Vec<u8> = words[3..].iter().flat_map(|word| word.to_le_bytes()).filter(|&b| b != 0).collect();
            Call {
                op: Op::from_code(op.into()).unwrap_or_default(),
                seq: words[1],
                kind: kind_from_code(kind),
                num_bytes: words[2],
                detail,
                unit: String::from_utf8_lossy(&bytes).into_owned(),
            }
        });
        Report { calls: calls.collect(), timeout_us: words[0] }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn reports_come_back_as_they_went() {
        let call = |seq: u64| {
            let (kind, unit) = ([None, Some(Kind::BFloat16)][seq as usize % 2], "u".repeat(5 * seq as usize));
            Call { op: Op::ReduceScatter, seq, kind, num_bytes: 1 << 40, detail: 3, unit }
        };
        for num_calls in [0, 1, NUM_CALLS] {
            let calls: Vec<Call> = (0..num_calls as u64).map(call).collect();
            let back = Report::from_words(&Report { calls: calls.clone(), timeout_us: 7 }.to_words());
            assert_eq!((back.calls.len(), back.timeout_us), (num_calls, 7));
            for (back, call) in back.calls.iter().zip(&calls) {
                assert!(back.seq == call.seq && is_same(back, call), "{back:?}");
            }
        }
        assert!(!is_same(&call(1), &call(2)));
    }
}
