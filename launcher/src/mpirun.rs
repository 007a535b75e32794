//! Back end `mpi`: an mpirun starts the ranks, and stands for all of them.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use fsdp_control::error_file::{self, ErrorKind, ErrorRecord};
use fsdp_control::store::Store;
use fsdp_control::{ControlError, failures, lifeline};

use crate::failure::Failure;
use crate::history::RankFailure;
use crate::output::Tail;
use crate::rank::End;

/// What mpirun itself prints goes to this file of the log folder.
pub const OUTPUT: &str = "mpirun.out";

/// Variables that ranks get on other machines too, by the beginning of their names.
const HANDED_ON: [&str; 10] =
    ["FSDP_", "LD_LIBRARY_PATH", "MASTER_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "RUST_", "TORCH_", "UCX_"];

/// Rank 0 prints to mpirun's stdout, which goes to the terminal, so that stderr has only what mpirun itself says; the
/// others print to files of the log folder. `$0` is the worker, `$1` its config, `$2` the log folder.
const SHELL: &str = "rank=${OMPI_COMM_WORLD_RANK:-$PMI_RANK}; \
                     if [ \"$rank\" = 0 ]; then exec \"$0\" \"$1\" 2>&1; \
                     else exec \"$0\" \"$1\" >>\"$2/rank-$rank.out\" 2>&1; fi";

/// How long this launcher's own store may take to answer.
const STORE_PATIENCE: Duration = Duration::from_secs(2);

/// How much of the end of a rank's output is looked at.
const LAST_BYTES: u64 = 64 << 10;

/// An installed MPI's starter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mpirun {
    program: PathBuf,
    flavour: Flavour,
}

impl fmt::Display for Mpirun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let flavour = match self.flavour {
            Flavour::OpenMpi => "Open MPI",
            Flavour::Hydra => "MPICH",
        };
        write!(f, "{} ({flavour})", self.program.display())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flavour {
    OpenMpi,
    /// MPICH and its kin, whose starter is called Hydra.
    Hydra,
}

impl Mpirun {
    /// The first `mpirun`, or else `mpiexec`, of `PATH`.
    ///
    /// # Errors
    /// There is none, or it is none that this program knows how to use.
    pub fn find() -> Result<Self, Failure> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
        let is_program =
            |path: &PathBuf| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
        let mut candidates = ["mpirun", "mpiexec"].iter().flat_map(|name| folders.iter().map(move |f| f.join(name)));
        let program = candidates.find(is_program).ok_or_else(|| {
            Failure::bad_input(
                "backend \"mpi\": expected mpirun or mpiexec in PATH, got neither; install Open MPI (Debian: \
                 openmpi-bin) or MPICH, or load the cluster's module",
            )
        })?;
        let output = Command::new(&program).arg("--version").output();
        let text = match &output {
            Ok(output) => String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr),
            Err(error) => error.to_string().into(),
        };
        match flavour(&text) {
            Some(flavour) => Ok(Self { program, flavour }),
            None => Err(Failure::bad_input(format!(
                "{} --version: expected Open MPI or MPICH (Hydra, Intel MPI), got {:?}; put one of them first in PATH",
                program.display(),
                text.lines().next().unwrap_or_default()
            ))),
        }
    }
}

fn flavour(version: &str) -> Option<Flavour> {
    let has = |names: &[&str]| names.iter().any(|name| version.contains(name));
    if has(&["Open MPI", "OpenRTE", "PRRTE"]) {
        Some(Flavour::OpenMpi)
    } else if has(&["HYDRA", "Hydra", "Intel(R) MPI"]) {
        Some(Flavour::Hydra)
    } else {
        None
    }
}

/// How mpirun is started.
#[derive(Debug)]
pub struct MpirunStart<'a> {
    pub mpirun: &'a Mpirun,
    /// The worker's binary.
    pub worker: &'a Path,
    /// The resolved config, its one argument.
    pub config: &'a Path,
    pub log_dir: &'a Path,
    /// See [`fsdp_control::env::prepared_vars`].
    pub vars: &'a [(String, String)],
    pub num_ranks: usize,
    /// Ranks on each machine.
    pub num_local_ranks: usize,
    /// Where this launcher serves the store.
    pub store: SocketAddr,
}

/// The ranks of a started mpirun.
#[derive(Debug, Clone)]
pub struct MpirunRanks {
    pub num_ranks: usize,
    store: SocketAddr,
    /// Wall-clock time of the start, nanoseconds since 1970: older records are those of earlier runs.
    started_ns: u64,
    /// How long the ranks' output files were then: what is in them is of earlier starts.
    old_output_bytes: Vec<u64>,
}

impl MpirunStart<'_> {
    /// Call it right before the start.
    pub fn ranks(&self) -> MpirunRanks {
        let old_bytes = |rank| std::fs::metadata(rank_output(self.log_dir, rank)).map_or(0, |metadata| metadata.len());
        MpirunRanks {
            num_ranks: self.num_ranks,
            store: self.store,
            started_ns: error_file::wall_ns(),
            old_output_bytes: (0..self.num_ranks).map(old_bytes).collect(),
        }
    }

    /// The command without its variables. mpirun leads a process group of its own, as a rank does.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.mpirun.program);
        command.arg("-n").arg(self.num_ranks.to_string());
        match self.mpirun.flavour {
            Flavour::OpenMpi => {
                // The worker binds itself where that helps; an MPI may think that a machine has one slot.
                command.args(["--oversubscribe", "--bind-to", "none"]);
                command.arg("--map-by").arg(format!("ppr:{}:node", self.num_local_ranks));
                if rustix::process::geteuid().is_root() {
                    command.arg("--allow-run-as-root");
                }
                let inherited = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
                let own = self.vars.iter().map(|(name, _)| name.clone());
                let mut names: Vec<String> = inherited.filter(|name| is_handed_on(name)).chain(own).collect();
                names.push("OMP_NUM_THREADS".to_owned());
                names.sort();
                names.dedup();
                for name in names {
                    command.arg("-x").arg(name);
                }
            }
            // Hydra hands all variables on.
            Flavour::Hydra => {
                command.arg("-ppn").arg(self.num_local_ranks.to_string());
            }
        }
        command.args(["sh", "-c", SHELL]).arg(self.worker).arg(self.config).arg(self.log_dir);
        lifeline::prepare_mpirun(&mut command);
        command
    }
}

fn is_handed_on(name: &str) -> bool {
    HANDED_ON.iter().any(|start| name.starts_with(start))
}

/// The failures of an mpirun's ranks, the first one first. They publish them in the store, which also notices a rank that
/// is gone without a word; their files say more; and `said` by mpirun may be how such a rank ended. mpirun's own `end` has
/// the status of the first one.
pub fn failures(ranks: &MpirunRanks, log_dir: &Path, said: &[String], end: End) -> Vec<RankFailure> {
    let mut records = published(ranks.store).unwrap_or_default();
    let mut unpublished = Vec::new();
    for rank in 0..ranks.num_ranks {
        // It may be on another machine.
        let Some(file) = error_file::read(log_dir, rank).ok().flatten() else { continue };
        match records.iter_mut().find(|record| record.rank == rank) {
            Some(record) if (record.pid, &record.host) == (file.pid, &file.host) => *record = file,
            // A rank of an earlier run may have written it after this one's start had removed the files.
            Some(_) => {}
            None if file.t_wall_ns >= ranks.started_ns => unpublished.push(file),
            None => {}
        }
    }
    unpublished.sort_by_key(|record| record.t_wall_ns);
    records.append(&mut unpublished);
    // Where the first one to speak has waited in vain, ranks that are gone without a word were killed for it, and others
    // have lost it: that happens at once, so that the store may notice their ends before the first one's.
    let says_much = |record: &&ErrorRecord| !matches!(record.kind, ErrorKind::Signal | ErrorKind::PeerLost);
    let first_words = records.iter().find(says_much);
    let is_hang = first_words.is_some_and(|record| record.kind == ErrorKind::CollectiveTimeout);
    if is_hang {
        records.iter_mut().filter(|record| record.kind == ErrorKind::Signal).for_each(|record| record.primary = false);
        records.sort_by_key(|record| record.kind == ErrorKind::Signal);
    }

    let mut reported = reported_failure(said);
    let failure = |record: ErrorRecord| {
        let (rank, host, pid) = (record.rank, record.host.clone(), Some(record.pid.cast_signed()));
        // The rank itself did not come to say anything.
        let is_silent = record.kind == ErrorKind::Signal;
        if is_silent && let Some(reported) = reported.take_if(|reported| reported.rank == rank) {
            return RankFailure { host, pid, ..reported };
        }
        RankFailure {
            rank,
            local_rank: record.local_rank,
            host,
            pid,
            end: if is_silent { end } else { End::Exited(record.exit_status) },
            step: (!is_silent).then_some(record.step),
            at: None,
            last_lines: last_lines(&rank_output(log_dir, rank), ranks.old_output_bytes[rank]),
            peak_rss_bytes: None,
            oom: None,
            counts_oom: false,
            others: Vec::new(),
            record: Some(record),
        }
    };
    let mut failures: Vec<RankFailure> = records.into_iter().map(failure).collect();
    if !is_hang && !failures.iter().any(RankFailure::is_primary) {
        failures.extend(reported);
    }
    failures
}

fn published(store: SocketAddr) -> Result<Vec<ErrorRecord>, ControlError> {
    let host = if store.ip().is_unspecified() { "localhost".to_owned() } else { store.ip().to_string() };
    failures::list(&mut Store::connect((&host, store.port()), STORE_PATIENCE)?)
}

/// The last lines that a rank printed to its own file after the first `old_bytes`.
fn last_lines(path: &Path, old_bytes: u64) -> Vec<String> {
    let mut tail = Tail::default();
    let end = File::open(path).and_then(|mut file| {
        let len_bytes = file.metadata()?.len();
        file.seek(SeekFrom::Start(len_bytes.saturating_sub(LAST_BYTES).max(old_bytes)))?;
        let mut bytes = Vec::new();
        file.take(LAST_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    // It may be on another machine.
    tail.push(&end.unwrap_or_default());
    tail.lines()
}

fn rank_output(log_dir: &Path, rank: usize) -> PathBuf {
    log_dir.join(format!("rank-{rank}.out"))
}

/// Removes the files of ranks that printed nothing.
pub fn remove_empty_outputs(log_dir: &Path, num_ranks: usize) {
    for path in (0..num_ranks).map(|rank| rank_output(log_dir, rank)) {
        if std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() == 0) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The failed rank of which Open MPI tells in its last lines, which it may break anywhere.
pub fn reported_failure(lines: &[String]) -> Option<RankFailure> {
    let text = lines.iter().flat_map(|line| line.split_whitespace()).collect::<Vec<_>>().join(" ");
    let number = |text: &str| text.trim().split(|c: char| !c.is_ascii_digit()).next()?.parse::<usize>().ok();
    let after = |start: &str| text.split_once(start).map(|(_, rest)| rest);
    let (rank, host, end) = match after("noticed that process rank ") {
        Some(rest) => {
            let (process, signal) = rest.split_once(" exited on signal ")?;
            let host =
                process.split_once(" on node ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or("unknown");
            (number(process)?, host.to_owned(), End::Killed(number(signal)? as i32))
        }
        None => {
            // "[[20476,1],3]", or since Open MPI 5 "[prterun-n1-4711@1,3]".
            let (name, code) = after("Process name: [")?.split_once("Exit code:")?;
            let (_, rank) = name.rsplit_once(',')?;
            (number(rank)?, "unknown".to_owned(), End::Exited(number(code)? as i32))
        }
    };
    Some(RankFailure {
        rank,
        local_rank: rank,
        host,
        pid: None,
        end,
        step: None,
        at: None,
        record: None,
        last_lines: Vec::new(),
        peak_rss_bytes: None,
        oom: None,
        counts_oom: false,
        others: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use fsdp_control::ExitStatus;
    use fsdp_control::store::StoreServer;

    use super::*;

    #[test]
    fn flavours_are_told_by_their_versions() {
        for (version, expected) in [
            ("mpirun (Open MPI) 4.1.4\n\nReport bugs to ...", Some(Flavour::OpenMpi)),
            ("mpirun.real (OpenRTE) 2.1.1", Some(Flavour::OpenMpi)),
            ("HYDRA build details:\n    Version: 4.0.2", Some(Flavour::Hydra)),
            ("Intel(R) MPI Library for Linux* OS, Version 2021.11", Some(Flavour::Hydra)),
            ("mpirun 1.0", None),
        ] {
            assert_eq!(flavour(version), expected, "{version}");
        }
    }

    #[test]
    fn a_hang_is_told_in_whatever_order_the_store_hears_of_it() {
        let record = |rank, kind| ErrorRecord::new(rank, rank, kind, "m".to_owned(), ExitStatus::Failed);
        let (timeout, lost, gone) =
            (record(0, ErrorKind::CollectiveTimeout), record(1, ErrorKind::PeerLost), record(2, ErrorKind::Signal));
        let failures_of = |records: &[&ErrorRecord]| {
            let dir = tempfile::tempdir().unwrap();
            let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
            let store = server.local_addr();
            let mut own = Store::connect(("127.0.0.1", store.port()), STORE_PATIENCE).unwrap();
            records.iter().for_each(|record| fsdp_control::failures::publish(&mut own, record).unwrap());
            let ranks = MpirunRanks { num_ranks: 3, store, started_ns: 0, old_output_bytes: vec![0; 3] };
            failures(&ranks, dir.path(), &[], End::Exited(1))
        };
        for order in [
            [&timeout, &lost, &gone],
            [&lost, &timeout, &gone],
            [&gone, &timeout, &lost],
            [&gone, &lost, &timeout],
            [&lost, &gone, &timeout],
            [&timeout, &gone, &lost],
        ] {
            let failures = failures_of(&order);
            assert!(!failures.iter().any(RankFailure::is_primary), "{order:?}");
            assert_eq!(failures.last().unwrap().rank, 2, "who was killed for it comes last: {order:?}");
        }
        // Nobody has waited in vain: who is gone is the cause.
        let failures = failures_of(&[&lost, &gone]);
        assert_eq!(failures.iter().find(|failure| failure.is_primary()).unwrap().rank, 2);
    }

    #[test]
    fn last_lines_are_of_this_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = rank_output(dir.path(), 1);
        assert!(last_lines(&path, 0).is_empty());
        std::fs::write(&path, "old\nnew\n").unwrap();
        for (old_bytes, expected) in [(0, &["old", "new"][..]), (4, &["new"]), (8, &[]), (9, &[])] {
            assert_eq!(last_lines(&path, old_bytes), expected);
        }
    }

    #[test]
    fn the_rank_is_found_in_what_mpirun_says() {
        let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let told = |text: &str| {
            let failure = reported_failure(&lines(text)).unwrap();
            (failure.rank, failure.host, failure.end)
        };
        for killed in [
            "-----\nmpirun noticed that process rank 12 with PID 0 on node n1 exited on signal 9 (Killed).\n-----",
            "-----\nprterun noticed that process rank 12 with PID 4711 on node n1 exited on\nsignal 9 (Killed).\n-----",
        ] {
            assert_eq!(told(killed), (12, "n1".to_owned(), End::Killed(9)));
        }
        for exited in [
            "The first process to do so was:\n\n  Process name: [[20476,1],3]\n  Exit code:    75\n-----",
            "detected that one or more processes exited\n   Process name: [prterun-n1-4711@1,3]\n   Exit code:    75\n-----",
        ] {
            assert_eq!(told(exited), (3, "unknown".to_owned(), End::Exited(75)));
        }
        for text in ["", "mpirun noticed that process rank", "Process name: [[1,1],x]\nExit code: 3", "no such file"] {
            assert_eq!(reported_failure(&lines(text)), None, "{text}");
        }
    }
}
