//! The end of a rank: whether it was asked for, what is known of it, and who hears of it.

use fsdp_control::error_file::{self, ErrorKind, ErrorRecord};
use fsdp_control::{ExitStatus, host_name};
use signal_hook::consts::{SIGKILL, SIGTERM, SIGUSR1};

use crate::failure::Failure;
use crate::history::{At, RankFailure, RankPlace};
use crate::link::{Farewell, Message};
use crate::mpirun::{self, MpirunRanks};
use crate::processes;
use crate::rank::{End, RankProcess};
use crate::supervise::{Ending, Phase, Supervisor};

impl Supervisor<'_> {
    /// Takes and judges the end of a process.
    pub fn take_end(&mut self, index: usize) -> Result<(), Failure> {
        let process = &mut self.ranks[index];
        let (end, peak_rss_bytes) =
            process.reap(self.outlets).map_err(|e| Failure::failed(format!("cannot wait for {process}: {e}")))?;
        match process.mpirun.clone() {
            None => self.take_rank_end(index, end, peak_rss_bytes),
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

    fn take_rank_end(&mut self, index: usize, end: End, peak_rss_bytes: u64) {
        let (rank, pid) = (self.ranks[index].first_rank, self.ranks[index].pid.as_raw_pid());
        // A record of an earlier run under the same rank is not this process's.
        let is_own = |record: &ErrorRecord| record.pid == pid.cast_unsigned() && record.host == host_name();
        let record = error_file::read(self.records.log_dir, rank).ok().flatten().filter(is_own);
        let stops = end == End::Exited(ExitStatus::Stopped.code()) && record.is_none();
        let was_asked = matches!(end, End::Killed(signal) if self.was_asked(signal));
        self.history.num_stopped += usize::from(stops || was_asked);
        if was_asked {
            return;
        }
        let at = At::from(self.progress.snapshot(index));
        let mut failure = RankFailure {
            rank,
            local_rank: index,
            host: host_name(),
            pid: Some(pid),
            end,
            step: Some(record.as_ref().map_or(at.step, |record| record.step)),
            at: Some(at),
            record,
            last_lines: self.ranks[index].last_lines(),
            peak_rss_bytes: Some(peak_rss_bytes),
            oom: if end == End::Killed(SIGKILL) { self.oom_watch.take_kill() } else { None },
            counts_oom: self.oom_watch.counts(),
            others: Vec::new(),
        };
        if stops || end == End::Exited(0) {
            self.history.early.push(failure);
            return;
        }
        if failure.involves_others() && self.is_first_to_tell_of_others() {
            failure.others = self.places_but(rank);
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
        let failures = mpirun::failures(&ranks, self.records.log_dir, &said, end);
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
            self.end_all(Ending::Failure);
        }
        for mut failure in failures {
            if failure.end == End::Killed(SIGKILL) && failure.record.is_none() {
                failure.oom = self.oom_watch.take_kill();
            }
            self.take_failure(failure);
        }
    }

    /// Notes a failure of one of this node's ranks, and does what it calls for.
    fn take_failure(&mut self, failure: RankFailure) {
        self.note_failure(failure);
        // Last: a file system that hangs holds it up.
        if let Some(noted) = self.history.failures.last() {
            self.records.write(noted);
        }
    }

    /// Notes a failure of a rank, here or on another node, and does what it calls for.
    pub fn note_failure(&mut self, failure: RankFailure) {
        if !self.nodes.is_head {
            self.nodes.tell_all(&Message::RankFailed(Box::new(failure.clone())));
        }
        let (rank, is_primary) = (failure.rank, failure.is_primary());
        let asks = self.nodes.is_head && failure.at.is_some() && failure.involves_others();
        let asks = asks && (!failure.others.is_empty() || self.is_first_to_tell_of_others());
        self.history.failures.push(failure);
        if asks {
            self.find_others(rank);
        }
        match is_primary {
            true => self.end_all(Ending::Failure),
            false => self.suspect(),
        }
    }

    /// No failure so far has told where the other ranks are: one is enough, and there may be many.
    fn is_first_to_tell_of_others(&self) -> bool {
        !self.history.failures.iter().any(RankFailure::involves_others)
    }

    /// Finds out where the ranks on nodes other than the failed rank's are: looks here, asks there.
    fn find_others(&mut self, failed: usize) {
        let mut is_here = true;
        for peer in &mut self.nodes.peers {
            match peer.ranks.as_ref().is_some_and(|ranks| ranks.contains(&failed)) {
                true => is_here = false,
                false => peer.link.send(&Message::WhereAre { failed }),
            }
        }
        if !is_here {
            let places = self.places_but(failed);
            if let Some(failure) = self.history.failures.iter_mut().find(|failure| failure.rank == failed) {
                failure.others.extend(places);
            }
        }
    }

    /// Where this node's ranks are, without rank `failed`. The counters of those that have ended still stand.
    pub fn places_but(&self, failed: usize) -> Vec<RankPlace> {
        let of = |(index, rank): (usize, &RankProcess)| {
            (rank.mpirun.is_none() && rank.first_rank != failed).then(|| RankPlace {
                rank: rank.first_rank,
                host: host_name(),
                pid: rank.pid.as_raw_pid(),
                at: At::from(self.progress.snapshot(index)),
                state: if rank.has_ended() { None } else { processes::state(rank.pid) },
            })
        };
        self.ranks.iter().enumerate().filter_map(of).collect()
    }
}
