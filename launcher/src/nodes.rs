//! The other launchers of a run on several nodes: how they come together, and what the supervisor needs of them.
//!
//! The head listens on the master port until all have come, then the store takes that port: one port for a firewall.

use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::time::{Duration, Instant};

use fsdp_control::host_name;
use rustix::event::{PollFd, PollFlags};

use crate::differences::differences;
use crate::failure::Failure;
use crate::link::{Farewell, Hello, Link, Message};
use crate::place::Place;
use crate::processes::timespec;
use crate::signals::{Arrived, Signals};

/// How long the head waits for the other nodes once the run cannot start, so that they hear why.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(5);

/// How long one attempt to reach the head may take, and the pause after one that failed.
const ATTEMPT: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(100);

/// How long the other launchers have to take the last message.
const FAREWELL_PATIENCE: Duration = Duration::from_secs(2);

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
    pub fn start_all(&mut self) {
        if self.is_head {
            let world_size = self.peers.last().and_then(|peer| peer.ranks.as_ref()).map_or(0, |ranks| ranks.end);
            for peer in &mut self.peers {
                let first_rank = peer.ranks.as_ref().map_or(0, |ranks| ranks.start);
                peer.link.send(&Message::Start { host: host_name(), first_rank, world_size });
            }
        }
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
    Failure::stopped("stopped before the ranks started; run the same command again")
}

/// The head's part: waits for all other nodes, and refuses all of them if one does not fit. `Nodes` are in order of rank;
/// none has been told to start yet.
///
/// # Errors
/// A node did not come, or differs; the job is wrong on one; a signal. All that came, or come soon, are told.
pub fn gather(
    listener: TcpListener,
    own: &Hello,
    patience: Duration,
    signals: &mut Signals,
) -> Result<(Nodes, Vec<Hello>), Failure> {
    listener.set_nonblocking(true).map_err(|e| Failure::failed(format!("cannot wait for other nodes: {e}")))?;
    let mut meeting = Meeting {
        own,
        listener,
        strangers: Vec::new(),
        guests: (1..own.num_nodes).map(|_| None).collect(),
        deadline: Instant::now() + patience,
        refusal: None,
    };
    if let Err(farewell) = &own.job {
        meeting.refuse(farewell.clone());
    }
    while meeting.guests.iter().any(Option::is_none) && Instant::now() < meeting.deadline {
        meeting.wait(signals).map_err(|e| Failure::failed(format!("cannot wait for other nodes: {e}")))?;
        if signals.take() != Arrived::Nothing {
            meeting.refuse(stopped_early().into());
            // Whoever asked does not want to wait for nodes that may never come.
            meeting.deadline = Instant::now();
        }
        meeting.accept();
        meeting.listen();
    }
    if meeting.refusal.is_none() && meeting.guests.iter().any(Option::is_none) {
        meeting.refuse(meeting.missing(patience));
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
    match meeting.refusal {
        None => Ok((nodes, hellos)),
        Some(farewell) => {
            nodes.dismiss(&Message::Verdict(farewell.clone()));
            Err(farewell.into())
        }
    }
}

/// The head while the others come.
#[derive(Debug)]
struct Meeting<'a> {
    own: &'a Hello,
    listener: TcpListener,
    /// Connections that have not said who they are.
    strangers: Vec<Link>,
    /// By node rank, from 1.
    guests: Vec<Option<(Link, Hello)>>,
    deadline: Instant,
    /// Why the run does not start.
    refusal: Option<Farewell>,
}

impl Meeting<'_> {
    fn wait(&self, signals: &Signals) -> rustix::io::Result<()> {
        let links = self.strangers.iter().chain(self.guests.iter().flatten().map(|(link, _)| link));
        let mut fds: Vec<PollFd> = links.map(|link| PollFd::from_borrowed_fd(link.fd(), link.flags())).collect();
        fds.push(PollFd::new(&self.listener, PollFlags::IN));
        fds.extend(signals.fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let left = timespec(self.deadline.saturating_duration_since(Instant::now()));
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn accept(&mut self) {
        // A connection that fails at once is its maker's loss: who belongs to the run tries again.
        while let Ok((stream, _)) = self.listener.accept() {
            self.strangers.extend(Link::new(stream));
        }
    }

    fn listen(&mut self) {
        for guest in &mut self.guests {
            let Some((link, hello)) = guest else { continue };
            // The next to come from that node may be the same one, started again.
            let stops = link.receive() == Some(Message::Stop);
            let name = format!("node {} (host {})", hello.node_rank, hello.host);
            if link.closed().is_some() {
                *guest = None;
            }
            if stops {
                self.refuse(Failure::stopped(format!("{name} was {}", stopped_early().message)).into());
                return;
            }
        }
        for mut link in std::mem::take(&mut self.strangers) {
            match link.receive() {
                Some(Message::Hello(hello)) => self.welcome(link, hello),
                None if link.closed().is_none() => self.strangers.push(link),
                // Something else came to this port by mistake.
                _ => {}
            }
        }
    }

    fn welcome(&mut self, link: Link, hello: Hello) {
        if let Err(farewell) = &hello.job {
            let at = format!("node {} (host {}): ", hello.node_rank, hello.host);
            let lines = farewell.lines.iter().map(|line| format!("{at}{line}")).collect();
            self.refuse(Farewell::new(farewell.status(), lines));
        } else if let Some(difference) = difference(self.own, &hello) {
            self.refuse(Failure::bad_input(difference).into());
        }
        let guest = hello.node_rank.checked_sub(1).and_then(|index| self.guests.get_mut(index));
        match guest {
            Some(guest @ None) => *guest = Some((link, hello)),
            Some(Some((_, first))) => {
                let (rank, first, second) = (hello.node_rank, first.host.clone(), hello.host);
                self.refuse_with(
                    link,
                    format!(
                        "--node-rank: expected another one on each machine, got {rank} on host {first} and on host \
                         {second}; number the machines from 0"
                    ),
                );
            }
            None => self.refuse_with(
                link,
                format!(
                    "--node-rank: expected 1 to {} on the machines other than node 0 (host {}), got {} on host {}; \
                     number the machines from 0",
                    self.own.num_nodes - 1,
                    self.own.host,
                    hello.node_rank,
                    hello.host
                ),
            ),
        }
    }

    /// Refuses all, and tells one that has no place among them.
    fn refuse_with(&mut self, mut link: Link, message: String) {
        self.refuse(Failure::bad_input(message).into());
        link.send(&Message::Verdict(self.refusal.clone().expect("refused above")));
        link.finish(Instant::now() + FAREWELL_PATIENCE);
    }

    /// The first reason counts.
    fn refuse(&mut self, farewell: Farewell) {
        if self.refusal.is_none() {
            self.refusal = Some(farewell);
            self.deadline = self.deadline.min(Instant::now() + REFUSAL_PATIENCE);
        }
    }

    fn missing(&self, patience: Duration) -> Farewell {
        let missing = self.guests.iter().enumerate().filter(|(_, guest)| guest.is_none());
        let missing: Vec<String> = missing.map(|(index, _)| format!("node {}", index + 1)).collect();
        let port = self.listener.local_addr().map_or(0, |addr| addr.port());
        Farewell::from(Failure::failed(format!(
            "{} did not come within {} s to port {port} of node 0 (host {}); start fsdp-launch there with the same \
             --master-addr and --master-port, and see whether it can reach them",
            missing.join(", "),
            patience.as_secs(),
            self.own.host
        )))
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
    (!lines.is_empty()).then(|| lines.join("\n  ") + "; give all machines the same config and flags")
}

/// The part of a node other than the head: comes to the head and waits for the start. Returns its first rank and the
/// number of all ranks.
///
/// # Errors
/// Nobody answers at the master address, the head refuses, or a signal.
pub fn join(
    place: &Place,
    own: Hello,
    patience: Duration,
    signals: &mut Signals,
) -> Result<(Nodes, usize, usize), Failure> {
    let mut link = reach(place, patience, signals)?;
    let at = format!("{}:{}", place.master_addr, place.master_port);
    link.send(&Message::Hello(own));
    loop {
        if let Some(message) = link.receive() {
            return match message {
                Message::Start { host, first_rank, world_size } => {
                    let head = Peer { link, node_rank: 0, host, ranks: None, is_done: false };
                    Ok((Nodes { is_head: false, peers: vec![head] }, first_rank, world_size))
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
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Failure::failed(format!("cannot wait for node 0 at {at}: {error}"))),
        }
        link.write_some();
        if signals.take() != Arrived::Nothing {
            link.send(&Message::Stop);
            link.finish(Instant::now() + FAREWELL_PATIENCE);
            return Err(stopped_early());
        }
    }
}

/// Connects to the head, which may start later.
fn reach(place: &Place, patience: Duration, signals: &mut Signals) -> Result<Link, Failure> {
    let deadline = Instant::now() + patience;
    loop {
        let reason = match connect((&place.master_addr, place.master_port)).and_then(Link::new) {
            Ok(link) => return Ok(link),
            Err(reason) => reason,
        };
        if Instant::now() + PAUSE >= deadline {
            return Err(Failure::failed(format!(
                "node 0 cannot be reached at {}:{} within {} s: {reason}; start fsdp-launch --node-rank 0 there, and \
                 check --master-addr and --master-port",
                place.master_addr,
                place.master_port,
                patience.as_secs()
            )));
        }
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
