//! The head while the other nodes' launchers come: who is one of them, whether all fit, and why the run does not start.
//!
//! It listens on the master port until all have come, then the store takes that port: one port for a firewall.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use fsdp_control::ExitStatus;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_128;

use crate::cli::MAX_RANKS;
use crate::differences::differences;
use crate::failure::Failure;
use crate::link::{Farewell, Hello, Link, Message};
use crate::nodes::{FAREWELL_PATIENCE, NOTICE_AFTER, Nodes, Peer, STOPPED_EARLY, STOPPED_PATIENCE, stopped_early};
use crate::processes::timespec;
use crate::signals::{Arrived, Signals};

/// How long a connection has to say who it is: a launcher does so at once.
const STRANGER_PATIENCE: Duration = Duration::from_secs(10);

/// How many connections may be about to say who they are, beyond the nodes that are missing.
const MAX_STRANGERS: usize = 64;

/// The head's part: waits for all other nodes, and refuses all of them if one does not fit. `Nodes` are in order of rank;
/// none has been told to start yet.
///
/// # Errors
/// A node did not come, or differs; the job is wrong on one; a signal. All that came in time have been told.
pub fn gather(
    listener: TcpListener,
    own: &Hello,
    patience: Duration,
    signals: &mut Signals,
) -> Result<(Nodes, Vec<Hello>), Failure> {
    let failed = |e: io::Error| Failure::failed(format!("cannot wait for other nodes: {e}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let now = Instant::now();
    let mut meeting = Meeting {
        own,
        listener,
        strangers: VecDeque::new(),
        guests: (1..own.num_nodes).map(|_| None).collect(),
        told: Vec::new(),
        deadline: now + patience,
        notice_at: Some(now + NOTICE_AFTER),
        refusal: None,
    };
    if let Err(farewell) = &own.job {
        // It has been said.
        meeting.refuse(Failure { is_said: true, ..farewell.clone().into() });
    }
    while !meeting.is_complete() && Instant::now() < meeting.deadline {
        meeting.wait(signals).map_err(|e| failed(e.into()))?;
        if signals.take() != Arrived::Nothing {
            meeting.refuse(stopped_early());
            // Whoever asked does not want to wait for nodes that may never come.
            meeting.deadline = Instant::now();
        }
        meeting.accept();
        meeting.listen();
        meeting.give_notice();
    }
    if meeting.refusal.is_none() && !meeting.is_complete() {
        meeting.refuse(meeting.missing(patience));
    }
    if let Some(failure) = meeting.refusal {
        let deadline = Instant::now() + FAREWELL_PATIENCE;
        meeting.told.iter_mut().for_each(|link| link.finish(deadline));
        return Err(failure);
    }
    let mut nodes = Nodes::alone();
    let mut hellos = Vec::new();
    let mut next_rank = own.num_ranks;
    for (link, hello) in meeting.guests.into_iter().flatten() {
        let ranks = next_rank..next_rank + hello.num_ranks;
        next_rank = ranks.end;
        let host = hello.host.clone();
        nodes.peers.push(Peer { link, node_rank: hello.node_rank, host, ranks: Some(ranks), is_done: false });
        hellos.push(hello);
    }
    Ok((nodes, hellos))
}

/// The head while the others come.
#[derive(Debug)]
struct Meeting<'a> {
    own: &'a Hello,
    listener: TcpListener,
    /// Connections that have not said who they are, the oldest first, and until when they may.
    strangers: VecDeque<(Link, Instant)>,
    /// By node rank, from 1; none once the run is refused.
    guests: Vec<Option<(Link, Hello)>>,
    /// Launchers that have been told why the run does not start.
    told: Vec<Link>,
    deadline: Instant,
    /// When to say who is missing; `None` once that has been said.
    notice_at: Option<Instant>,
    /// Why the run does not start.
    refusal: Option<Failure>,
}

impl Meeting<'_> {
    /// All are here, or have been told.
    fn is_complete(&self) -> bool {
        match self.refusal {
            None => self.guests.iter().all(Option::is_some),
            Some(_) => self.told.len() >= self.guests.len(),
        }
    }

    fn wait(&self, signals: &Signals) -> rustix::io::Result<()> {
        let strangers = self.strangers.iter().map(|(link, _)| link);
        let links = strangers.chain(self.guests.iter().flatten().map(|(link, _)| link));
        let mut fds: Vec<PollFd> = links.map(|link| PollFd::from_borrowed_fd(link.fd(), link.flags())).collect();
        fds.push(PollFd::new(&self.listener, PollFlags::IN));
        fds.extend(signals.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let oldest = self.strangers.front().map(|(_, until)| *until);
        let wake_at = oldest.into_iter().chain(self.notice_at).fold(self.deadline, Instant::min);
        match rustix::event::poll(&mut fds, Some(&timespec(wake_at.saturating_duration_since(Instant::now())))) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn accept(&mut self) {
        let max_strangers = self.guests.len() + MAX_STRANGERS;
        // As many in one go as there may be: who comes faster does not take all attention.
        for _ in 0..max_strangers {
            match self.listener.accept() {
                // A connection that fails at once is its maker's loss: who belongs to the run tries again.
                Ok((stream, _)) => {
                    let until = Instant::now() + STRANGER_PATIENCE;
                    self.strangers.extend(Link::new(stream).map(|link| (link, until)));
                    if self.strangers.len() > max_strangers {
                        self.strangers.pop_front();
                    }
                }
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::MFILE | Errno::NFILE)) => {
                    if self.strangers.pop_front().is_none() {
                        self.refuse(Failure::failed(format!(
                            "cannot accept all nodes: {error}; raise the limit of open files (ulimit -n) on host {}",
                            self.own.host
                        )));
                        self.deadline = Instant::now();
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {}
            }
        }
    }

    fn listen(&mut self) {
        let mut stopped = None;
        for guest in &mut self.guests {
            let Some((link, hello)) = guest else { continue };
            link.read_some();
            while let Some(message) = link.take() {
                if let Message::Stop { .. } = message {
                    stopped = Some(format!("node {} (host {}) was {}", hello.node_rank, hello.host, STOPPED_EARLY));
                }
            }
            // The next to come from that node may be the same one, started again.
            if link.closed().is_some() {
                *guest = None;
            }
        }
        if let Some(message) = stopped {
            self.refuse(Failure::stopped(message));
        }
        let now = Instant::now();
        for (mut link, until) in std::mem::take(&mut self.strangers) {
            link.read_some();
            match link.take() {
                Some(Message::Hello(hello)) => self.welcome(link, hello),
                None if link.closed().is_none() && now < until => self.strangers.push_back((link, until)),
                // Something else came to this port by mistake.
                _ => {}
            }
        }
    }

    fn welcome(&mut self, mut link: Link, hello: Hello) {
        if let Err(failure) = self.check(&hello) {
            self.refuse(failure);
        }
        match &self.refusal {
            Some(failure) => {
                link.send(&Message::Verdict(failure.into()));
                self.told.push(link);
            }
            None => {
                let index = hello.node_rank - 1;
                self.guests[index] = Some((link, hello));
            }
        }
    }

    /// # Errors
    /// Why the run cannot start with this node.
    fn check(&self, hello: &Hello) -> Result<(), Failure> {
        if let Err(farewell) = &hello.job {
            return Err(farewell.clone().into());
        }
        if let Some(difference) = difference(self.own, hello) {
            return Err(Failure::bad_input(difference));
        }
        let (rank, host) = (hello.node_rank, &hello.host);
        if !(1..=MAX_RANKS).contains(&hello.num_ranks) {
            return Err(Failure::bad_input(format!(
                "--nproc: expected 1 to {MAX_RANKS} ranks on node {rank} (host {host}), got {}",
                hello.num_ranks
            )));
        }
        let guest = rank.checked_sub(1).and_then(|index| self.guests.get(index));
        match guest {
            Some(None) => Ok(()),
            Some(Some((_, first))) => Err(Failure::bad_input(format!(
                "--node-rank: expected another one on each machine, got {rank} on host {} and on host {host}; number \
                 the machines from 0",
                first.host
            ))),
            None => Err(Failure::bad_input(format!(
                "--node-rank: expected 1 to {} on the machines other than node 0 (host {}), got {rank} on host {host}; \
                 number the machines from 0",
                self.own.num_nodes - 1,
                self.own.host,
            ))),
        }
    }

    /// Says why the run does not start, to all that are here. The first reason counts. The others hear it when they come.
    fn refuse(&mut self, mut failure: Failure) {
        if self.refusal.is_some() {
            return;
        }
        failure.say();
        for (mut link, _) in self.guests.iter_mut().filter_map(Option::take) {
            link.send(&Message::Verdict(Farewell::from(&failure)));
            self.told.push(link);
        }
        if failure.status == ExitStatus::Stopped {
            self.deadline = self.deadline.min(Instant::now() + STOPPED_PATIENCE);
        }
        self.refusal = Some(failure);
    }

    fn give_notice(&mut self) {
        if self.notice_at.is_some_and(|at| Instant::now() >= at) {
            self.notice_at = None;
            let line = match self.refusal {
                None => format!("waiting for {}", self.names_of_missing()),
                Some(_) => {
                    let num_left = self.guests.len().saturating_sub(self.told.len());
                    format!("waiting for {num_left} more of the {} other nodes, to tell them", self.guests.len())
                }
            };
            crate::say(&format!("fsdp-launch: {line}"));
        }
    }

    /// "node 1" or "nodes 1, 3".
    fn names_of_missing(&self) -> String {
        let missing = self.guests.iter().enumerate().filter(|(_, guest)| guest.is_none());
        let missing: Vec<String> = missing.map(|(index, _)| (index + 1).to_string()).collect();
        format!("node{} {}", if missing.len() == 1 { "" } else { "s" }, missing.join(", "))
    }

    fn missing(&self, patience: Duration) -> Failure {
        let port = self.listener.local_addr().map_or(0, |addr| addr.port());
        Failure::failed(format!(
            "{} did not come within {} s to port {port} of node 0 (host {}); start fsdp-launch there with the same \
             --master-addr and --master-port, and see whether it can reach them",
            self.names_of_missing(),
            patience.as_secs(),
            self.own.host
        ))
    }
}

/// In what a node's command or config differs from the head's, with both values.
fn difference(head: &Hello, node: &Hello) -> Option<String> {
    let (here, there) = (&head.host, format!("node {} (host {})", node.node_rank, node.host));
    if head.version != node.version {
        return Some(format!(
            "fsdp-launch: expected version {} on {there} as on node 0 (host {here}), got {}; install the same on all",
            head.version, node.version
        ));
    }
    // A node without a worker says so itself.
    if head.worker != node.worker && !head.worker.is_empty() && !node.worker.is_empty() {
        return Some(format!(
            "fsdp-train: expected the binary with digest {} on {there} as on node 0 (host {here}), got {}; install the \
             same on all",
            head.worker, node.worker
        ));
    }
    if head.num_nodes != node.num_nodes {
        return Some(format!(
            "--nnodes: expected {} on {there} as on node 0 (host {here}), got {}; give the same on all machines",
            head.num_nodes, node.num_nodes
        ));
    }
    let (Ok(ours), Ok(theirs)) = (&head.job, &node.job) else { return None };
    let lines: Vec<String> = differences(ours, theirs)
        .into_iter()
        .map(|(key, ours, theirs)| {
            format!("{key}: expected {ours} on {there} as on node 0 (host {here}), got {theirs}")
        })
        .collect();
    let digest = |config: &str| format!("{:032x}", xxh3_128(config.as_bytes()));
    (!lines.is_empty()).then(|| {
        format!(
            "{} (digests of the configs: {} and {}); give all machines the same config and flags",
            lines.join("\n  "),
            digest(ours),
            digest(theirs)
        )
    })
}
