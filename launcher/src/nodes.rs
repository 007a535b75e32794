//! The other launchers of a run on several nodes: what the supervisor needs of them, and how a node comes to the head.

use std::fmt::Display;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::time::{Duration, Instant};

use fsdp_control::host_name;
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;

use crate::failure::Failure;
use crate::link::{Assignment, Farewell, Hello, Link, Message};
use crate::place::Place;
use crate::processes::timespec;
use crate::signals::{Arrived, Signals};

/// How long launchers that were stopped before the start try to tell the others.
pub const STOPPED_PATIENCE: Duration = Duration::from_secs(5);

/// When a launcher that waits for others says so.
pub const NOTICE_AFTER: Duration = Duration::from_secs(5);

/// How long one attempt to reach the head may take, and the pause after one that failed.
const ATTEMPT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);

/// How long the other launchers have to take the last message.
pub const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);

pub const STOPPED_EARLY: &str = "stopped before the ranks started; run the same command again";

/// The launchers that this one talks to: all others for the head, the head for the others.
#[derive(Debug)]
pub struct Nodes {
    pub is_head: bool,
    pub peers: Vec<Peer>,
}

#[derive(Debug)]
pub struct Peer {
    pub link: Link,
    pub node_rank: usize,
    pub host: String,
    /// Its ranks; unknown of the head.
    pub ranks: Option<Range<usize>>,
    /// Nothing more is expected of it: it has said its last, or is lost.
    pub is_done: bool,
}

impl Peer {
    /// "node 1 (host b, ranks 2-3)".
    pub fn name(&self) -> String {
        let ranks = match &self.ranks {
            None => String::new(),
            Some(ranks) if ranks.len() == 1 => format!(", rank {}", ranks.start),
            Some(ranks) => format!(", ranks {}-{}", ranks.start, ranks.end - 1),
        };
        format!("node {} (host {}{ranks})", self.node_rank, self.host)
    }
}

impl Nodes {
    /// No others.
    pub fn alone() -> Self {
        Self { is_head: true, peers: Vec::new() }
    }

    pub fn tell_all(&mut self, message: &Message) {
        self.peers.iter_mut().for_each(|peer| peer.link.send(message));
    }

    /// Tells the other nodes which ranks are theirs.
    pub fn start_all(&mut self, world_size: usize, run_id: &str, max_restarts: u32) {
        if self.is_head {
            for peer in &mut self.peers {
                let first_rank = peer.ranks.as_ref().map_or(0, |ranks| ranks.start);
                let (host, run_id) = (host_name(), run_id.to_owned());
                let assignment = Assignment { host, first_rank, world_size, run_id, max_restarts };
                peer.link.send(&Message::Start(assignment));
            }
        }
    }

    /// All are expected to say how their ranks ended once more.
    pub fn begin_again(&mut self) {
        self.peers.iter_mut().for_each(|peer| peer.is_done = false);
    }

    /// Says the last words and waits a little until they are heard.
    pub fn dismiss(&mut self, last: &Message) {
        self.tell_all(last);
        let deadline = Instant::now() + FAREWELL_PATIENCE;
        self.peers.iter_mut().for_each(|peer| peer.link.finish(deadline));
    }

    /// Tells the others that this launcher gives up.
    pub fn give_up(&mut self, own_name: &str, failure: &Failure) {
        let farewell = Farewell::new(failure.status, vec![format!("{own_name}: {}", failure.message)]);
        self.dismiss(&if self.is_head { Message::Verdict(farewell) } else { Message::GaveUp(farewell) });
    }
}

/// What this launcher says where it is stopped before the start.
pub fn stopped_early() -> Failure {
    Failure::stopped(STOPPED_EARLY)
}

/// The part of a node other than the head: comes to the head and waits for the start.
///
/// # Errors
/// Nobody answers at the master address, the head refuses, or a signal.
pub fn join(
    place: &Place,
    own: Hello,
    patience: Duration,
    signals: &mut Signals,
) -> Result<(Nodes, Assignment), Failure> {
    let mut notice_at = Some(Instant::now() + NOTICE_AFTER);
    let mut link = reach(place, patience, &mut notice_at, signals)?;
    let at = format!("{}:{}", place.master_addr, place.master_port);
    link.send(&Message::Hello(own));
    loop {
        link.read_some();
        if let Some(message) = link.take() {
            return match message {
                Message::Start(assignment) => {
                    let host = assignment.host.clone();
                    let head = Peer { link, node_rank: 0, host, ranks: None, is_done: false };
                    Ok((Nodes { is_head: false, peers: vec![head] }, assignment))
                }
                Message::Verdict(farewell) => Err(farewell.into()),
                other => Err(Failure::failed(format!("{at}: expected a launcher's answer, got {other:?}"))),
            };
        }
        if let Some(reason) = link.closed() {
            return Err(Failure::failed(format!(
                "node 0 at {at} is lost before the start: {reason}; see what it printed, or whether another run uses \
                 that port"
            )));
        }
        let mut fds = vec![PollFd::from_borrowed_fd(link.fd(), link.flags())];
        fds.extend(signals.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = notice_at.map(|at| timespec(at.saturating_duration_since(Instant::now())));
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Failure::failed(format!("cannot wait for node 0 at {at}: {error}"))),
        }
        link.write_some();
        give_notice(&mut notice_at, &at, "it waits for other nodes");
        if signals.take() != Arrived::Nothing {
            link.send(&Message::Stop { has_deadline: true });
            link.finish(Instant::now() + FAREWELL_PATIENCE);
            return Err(stopped_early());
        }
    }
}

/// Says once, when it is time, that this node waits for the head, and why.
fn give_notice(notice_at: &mut Option<Instant>, head: &str, reason: impl Display) {
    if notice_at.is_some_and(|at| Instant::now() >= at) {
        *notice_at = None;
        crate::say(&format!("fsdp-launch: waiting for node 0 at {head} ({reason})"));
    }
}

/// Connects to the head, which may start later.
fn reach(
    place: &Place,
    patience: Duration,
    notice_at: &mut Option<Instant>,
    signals: &mut Signals,
) -> Result<Link, Failure> {
    let at = format!("{}:{}", place.master_addr, place.master_port);
    let deadline = Instant::now() + patience;
    loop {
        let reason = match connect((&place.master_addr, place.master_port)).and_then(Link::new) {
            Ok(link) => return Ok(link),
            Err(reason) => reason,
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(Failure::failed(format!(
                "node 0 cannot be reached at {at} within {} s: {reason}; start fsdp-launch --node-rank 0 there, and \
                 check --master-addr and --master-port",
                patience.as_secs()
            )));
        }
        give_notice(notice_at, &at, &reason);
        let mut fds = signals.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let _ = rustix::event::poll(&mut fds, Some(&timespec(PAUSE)));
        if signals.take() != Arrived::Nothing {
            return Err(stopped_early());
        }
    }
}

fn connect(addr: (&str, u16)) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for addr in addr.to_socket_addrs()? {
        match TcpStream::connect_timeout(&addr, ATTEMPT) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
