//! The end of a rank: whether it was asked for, what is known of it, and who hears of it.

use fsdp_control::error_file::{self, ErrorKind, ErrorRecord};
use fsdp_control::{ExitStatus, host_name};
use signal_hook::consts::{SIGKILL, SIGTERM, SIGUSR1};

use crate::failure::Failure;
use crate::history::{AbsentRank, RankFailure};
use crate::link::{Farewell, Message};
use crate::mpirun::{self, MpirunRanks};
use crate::processes;
use crate::rank::{End, RankProcess};
use crate::supervise::{GRACE, Phase, Supervisor};

impl Supervisor<'_> {
    /// Takes and judges the end of a process.
    pub fn take_end(&mut self, index: usize) -> Result<(), Failure> {
        let process = &mut self.ranks[index];
        let end = process
            .reap(&mut self.stdout, &mut self.stderr)
            .map_err(|e| Failure::failed(format!("cannot wait for {process}: {e}")))?;
        match process.mpirun {
            None => self.take_rank_end(index, end),
            Some(ranks) => self.take_mpirun_end(index, ranks, end),
        }
        Ok(())
    }

    /// The process ended by that signal because the launcher sent it.
    fn was_asked(&self, signal: i32) -> bool {
        match self.phase {
            Phase::Running | Phase::Suspecting(_) => false,
            Phase::Stopping(_) => signal == SIGTERM,
            Phase::Ending(_) | Phase::Killed(_) | Phase::Waiting(_) => signal == SIGTERM || signal == SIGKILL,
        }
    }

    fn take_rank_end(&mut self, index: usize, end: End) {
        let (rank, pid) = (self.ranks[index].first_rank, self.ranks[index].pid.as_raw_pid());
        // A record of an earlier run under the same rank is not this process's.
        let is_own = |record: &ErrorRecord| record.pid == pid.cast_unsigned() && record.host == host_name();
        let record = error_file::read(self.log_dir, rank).ok().flatten().filter(is_own);
        match end {
            End::Exited(0) => return,
            End::Exited(code) if code == ExitStatus::Stopped.code() && record.is_none() => {
                self.history.num_stopped += 1;
                return;
            }
            End::Killed(signal) if self.was_asked(signal) => {
                self.history.num_stopped += 1;
                return;
            }
            End::Exited(_) | End::Killed(_) => {}
        }
        let at = self.progress.snapshot(index);
        let is_timeout = record.as_ref().is_some_and(|record| record.kind == ErrorKind::CollectiveTimeout);
        let failure = RankFailure {
            rank,
            host: host_name(),
            pid: Some(pid),
            end,
            step: Some(record.as_ref().map_or(at.step, |record| record.step)),
            seq: at.seq,
            absent: if is_timeout { self.absent_from(at.seq) } else { Vec::new() },
            record,
            last_lines: self.ranks[index].last_lines(),
        };
        if failure.record.is_none() && matches!(end, End::Killed(_)) {
            self.write_record(&failure, pid, index);
        }
        self.take_failure(failure);
    }

    /// The end of all ranks at once: what they say themselves, then what mpirun says of them.
    fn take_mpirun_end(&mut self, index: usize, ranks: MpirunRanks, end: End) {
        if end == End::Exited(0) {
            // Hydra may lose the ranks' own status when it has handed a signal on. A run that was done all the same is
            // found to be so when it is started again.
            if let Phase::Stopping(_) = self.phase {
                self.history.num_stopped += ranks.num_ranks;
            }
            return;
        }
        let said = self.ranks[index].last_lines();
        let failures = mpirun::failures(ranks, self.log_dir, &said, end);
        // The first rank that stops makes mpirun kill those that are not quite as far, and one that was still starting,
        // or an mpirun, had no handler for the wish to stop yet.
        let of_usr1 = [End::Exited(128 + SIGUSR1), End::Exited(SIGUSR1), End::Killed(SIGUSR1)];
        let is_stop = end == End::Exited(ExitStatus::Stopped.code()) || of_usr1.contains(&end);
        let says_nothing = |failure: &RankFailure| failure.record.as_ref().is_none_or(|r| r.kind == ErrorKind::Signal);
        if failures.iter().all(says_nothing) && (is_stop || self.was_asked(SIGKILL)) {
            self.history.num_stopped += ranks.num_ranks;
            return;
        }
        if failures.is_empty() {
            let mut lines = vec![format!("mpirun {end}; its last lines, also in logs/{}:", mpirun::OUTPUT)];
            lines.extend(said.iter().map(|line| format!("  | {line}")));
            self.history.add_fault(Farewell::new(ExitStatus::Failed, lines));
            self.end_all(GRACE);
        }
        failures.into_iter().for_each(|failure| self.take_failure(failure));
    }

    /// Notes a failure of a rank, here or on another node, and does what it calls for.
    pub fn take_failure(&mut self, mut failure: RankFailure) {
        if !self.nodes.is_head {
            self.nodes.tell_all(&Message::RankFailed(failure.clone()));
        } else if failure.record.as_ref().is_some_and(|record| record.kind == ErrorKind::CollectiveTimeout) {
            self.find_absent(&mut failure);
        }
        let is_primary = failure.is_primary();
        self.history.failures.push(failure);
        match is_primary {
            true => self.end_all(GRACE),
            false => self.suspect(),
        }
    }

    /// Finds out which ranks on nodes other than the failed rank's had not come: looks here, asks there.
    fn find_absent(&mut self, failure: &mut RankFailure) {
        let question = Message::WhoIsAbsent { waiting: failure.rank, seq: failure.seq };
        let mut is_here = true;
        for peer in &mut self.nodes.peers {
            match peer.ranks.as_ref().is_some_and(|ranks| ranks.contains(&failure.rank)) {
                true => is_here = false,
                false => peer.link.send(&question),
            }
        }
        if !is_here {
            failure.absent.extend(self.absent_from(failure.seq));
        }
    }

    /// Ranks of this node that live and had not come to collective `seq`, in which another one gave up; or are suspended.
    pub fn absent_from(&self, seq: u64) -> Vec<AbsentRank> {
        let of = |(index, rank): (usize, &RankProcess)| {
            if rank.has_ended() || rank.mpirun.is_some() {
                return None;
            }
            let (at, state) = (self.progress.snapshot(index), processes::state(rank.pid));
            (at.seq < seq || state == Some('T')).then(|| AbsentRank {
                rank: rank.first_rank,
                host: host_name(),
                pid: rank.pid.as_raw_pid(),
                step: at.step,
                seq: at.seq,
                op: at.op.to_string(),
                unit: at.unit,
                waits: at.inside,
                state,
            })
        };
        self.ranks.iter().enumerate().filter_map(of).collect()
    }

    /// The record that a rank ended by a signal could not write.
    fn write_record(&self, failure: &RankFailure, pid: i32, local_rank: usize) {
        let message = failure.end.to_string();
        let mut record = ErrorRecord::new(failure.rank, local_rank, ErrorKind::Signal, message, ExitStatus::Failed);
        record.pid = pid.cast_unsigned();
        record.step = failure.step.unwrap_or(0);
        // The report says the same; a full disk must not hide it.
        let _ = error_file::write(self.log_dir, &record);
    }
}
