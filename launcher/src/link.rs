//! The control link between two launchers: one TCP connection, one JSON message a line, nothing that blocks.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use fsdp_control::ExitStatus;
use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::history::{RankFailure, RankPlace};
use crate::processes::timespec;

/// A machine that does not answer for so long is lost. Longer than a switch takes to find another way; and what is sent into
/// the void has as long again, which is to come to less than 10 s.
pub const LOST_AFTER: Duration = Duration::from_secs(4);

/// More without a line's end is no message: a launcher's longest one has a config, or the last lines of a rank.
const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// The most that is read in one go.
const MAX_READ_BYTES: usize = 64 << 10;

/// What launchers tell each other. The head is the launcher of node 0; all others talk to it alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// To the head, first: who comes.
    Hello(Hello),
    /// From the head: all are here.
    Start(Assignment),
    /// Ranks are to finish the step and save: somebody asked for it, and may want them killed where that takes long.
    Stop { has_deadline: bool },
    /// Ranks are to end: one has failed, or all wait for one and will not go on.
    End { is_hang: bool },
    /// Ranks are to be killed: somebody insists.
    Kill,
    /// To the head: a rank has failed.
    RankFailed(Box<RankFailure>),
    /// From the head: rank `failed` waited in vain in a collective, or met a different one; where are the node's ranks?
    WhereAre { failed: usize },
    /// The answer.
    Places { failed: usize, ranks: Vec<RankPlace> },
    /// To the head: all ranks of the node have ended.
    Ended(Ended),
    /// From the head: all ranks of all nodes have ended, and are started anew.
    Restart(Restart),
    /// To the head, last: the launcher itself gives up.
    GaveUp(Farewell),
    /// From the head, last: what became of the run.
    Verdict(Farewell),
}

/// A launcher and its job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    pub version: String,
    pub num_nodes: usize,
    pub node_rank: usize,
    pub host: String,
    /// See [`fsdp_control::machine_identity`].
    pub machine: String,
    /// Ranks on this node.
    pub num_ranks: usize,
    /// Digest of the worker's binary; empty where there is none.
    #[serde(default)]
    pub worker: String,
    /// The resolved config, or what is wrong with the job on this node.
    pub job: Result<String, Farewell>,
}

/// What a node gets to know once all are here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The head's.
    pub host: String,
    /// Of the node.
    pub first_rank: usize,
    pub world_size: usize,
    /// Of all nodes.
    pub run_id: String,
    pub max_restarts: u32,
}

/// How the ranks start anew.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Restart {
    /// The config's `resume` gives way to "auto": there is a checkpoint of this run now.
    pub resumes: bool,
    /// What to say about it.
    pub lines: Vec<String>,
}

/// How the ranks of a node ended, failures aside.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    pub num_stopped: usize,
    pub forced: bool,
    pub unkillable: Vec<usize>,
    /// The first that ended as if nothing were wrong.
    #[serde(default)]
    pub early: Vec<RankFailure>,
}

/// An exit status and what to say with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Farewell {
    status: i32,
    pub lines: Vec<String>,
}

impl Farewell {
    pub fn new(status: ExitStatus, lines: Vec<String>) -> Self {
        Self { status: status.code(), lines }
    }

    pub fn status(&self) -> ExitStatus {
        ExitStatus::from_code(self.status).unwrap_or(ExitStatus::Failed)
    }

    /// The status of one that says why a run does not start or cannot go on: never that of a run that is done.
    pub fn failure_status(&self) -> ExitStatus {
        match self.status() {
            ExitStatus::Done => ExitStatus::Failed,
            status => status,
        }
    }
}

impl From<&Failure> for Farewell {
    fn from(failure: &Failure) -> Self {
        Self::new(failure.status, vec![failure.message.clone()])
    }
}

impl From<Farewell> for Failure {
    fn from(farewell: Farewell) -> Self {
        Self { status: farewell.failure_status(), message: farewell.lines.join("\n"), is_said: false }
    }
}

/// One end of a connection. Dropping it closes it.
#[derive(Debug)]
pub struct Link {
    stream: TcpStream,
    /// Bytes of a message whose rest has not come yet.
    unread: Vec<u8>,
    /// Messages that nobody has taken yet.
    messages: VecDeque<Message>,
    unsent: Vec<u8>,
    /// Why nothing comes or goes any more.
    closed: Option<String>,
}

impl Link {
    /// Takes over a connection. From then on a machine that is gone without a word is noticed within [`LOST_AFTER`]
    /// and a second; a launcher that is suspended is not gone.
    ///
    /// # Errors
    /// The connection is gone already.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        sockopt::set_tcp_nodelay(&stream, true)?;
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, Duration::from_secs(1))?;
        sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(1))?;
        sockopt::set_tcp_user_timeout(&stream, LOST_AFTER.as_millis() as u32)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, unread: Vec::new(), messages: VecDeque::new(), unsent: Vec::new(), closed: None })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// What to wait for.
    pub fn flags(&self) -> PollFlags {
        if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT }
    }

    /// Why the link is closed, once it is.
    pub fn closed(&self) -> Option<&str> {
        self.closed.as_deref()
    }

    pub fn send(&mut self, message: &Message) {
        serde_json::to_writer(&mut self.unsent, message).expect("plain fields are always representable as JSON");
        self.unsent.push(b'\n');
        self.write_some();
    }

    /// Writes what the connection takes now; the rest waits.
    pub fn write_some(&mut self) {
        while self.closed.is_none() && !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(num) => drop(self.unsent.drain(..num)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    // The last word of the other end may be here.
                    self.read_some();
                    self.close(&error);
                }
            }
        }
    }

    /// Reads what is here, but no more than [`MAX_READ_BYTES`]: who sends without end does not take all attention. After it
    /// take all messages there are with [`Link::take`]; then the link may be closed.
    pub fn read_some(&mut self) {
        let mut bytes = [0; MAX_READ_BYTES];
        while self.closed.is_none() {
            match self.stream.read(&mut bytes) {
                Ok(0) => self.closed = Some("its launcher is gone".to_owned()),
                Ok(num) => {
                    self.unread.extend_from_slice(&bytes[..num]);
                    if let Err(reason) = self.split_messages() {
                        self.closed = Some(reason);
                    }
                    return;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => self.close(&error),
            }
        }
    }

    /// Takes the next message that has been read.
    pub fn take(&mut self) -> Option<Message> {
        self.messages.pop_front()
    }

    fn split_messages(&mut self) -> Result<(), String> {
        if let Some(len) = self.unread.iter().rposition(|&byte| byte == b'\n') {
            let rest = self.unread.split_off(len + 1);
            let lines = std::mem::replace(&mut self.unread, rest);
            for line in lines[..len].split(|&byte| byte == b'\n') {
                let message = serde_json::from_slice(line);
                self.messages.push_back(message.map_err(|error| format!("it sent what is no message: {error}"))?);
            }
        }
        match self.unread.len() {
            0..MAX_MESSAGE_BYTES => Ok(()),
            _ => Err(format!("it sent what is no message: {MAX_MESSAGE_BYTES} bytes without an end")),
        }
    }

    fn close(&mut self, error: &io::Error) {
        self.closed = Some(match error.kind() {
            ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => "its launcher is gone".to_owned(),
            ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => {
                format!("its machine did not answer for {} s ({error})", LOST_AFTER.as_secs())
            }
            _ => error.to_string(),
        });
    }

    /// Sends the rest and waits until the other end has read it and closed, but not beyond `deadline`.
    pub fn finish(&mut self, deadline: Instant) {
        loop {
            self.write_some();
            if self.unsent.is_empty() {
                let _ = self.stream.shutdown(std::net::Shutdown::Write);
            }
            self.read_some();
            self.messages.clear();
            let left = deadline.saturating_duration_since(Instant::now());
            if self.closed.is_some() || left.is_zero() {
                return;
            }
            let mut fds = [PollFd::from_borrowed_fd(self.fd(), self.flags())];
            let _ = rustix::event::poll(&mut fds, Some(&timespec(left)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use fsdp_control::error_file::{ErrorKind as Kind, ErrorRecord};
    use fsdp_control::progress::Phase;

    use super::*;
    use crate::history::At;
    use crate::oom::OomKill;
    use crate::rank::End;

    fn pair() -> (Link, Link) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Link::new(near).unwrap(), Link::new(listener.accept().unwrap().0).unwrap())
    }

    /// Receives until `num` messages are here or the link is closed.
    fn receive(link: &mut Link, num: usize) -> Vec<Message> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut messages = Vec::new();
        while messages.len() < num && Instant::now() < deadline {
            link.read_some();
            messages.extend(std::iter::from_fn(|| link.take()));
            if link.closed().is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        messages
    }

    fn samples() -> Vec<Message> {
        let hello = Hello {
            version: "1".to_owned(),
            num_nodes: 2,
            node_rank: 1,
            host: "h".to_owned(),
            machine: "m".to_owned(),
            num_ranks: 3,
            worker: "0a".to_owned(),
            job: Ok("[model]\npath = \"a\"\n".to_owned()),
        };
        let refused = Hello { job: Err(Farewell::from(&Failure::bad_input("no\ndata"))), ..hello.clone() };
        let at = At {
            step: 4,
            phase: Phase::Data,
            seq: 9,
            op: "all_gather".to_owned(),
            unit: "layers.0".to_owned(),
            num_bytes: 64,
            waits: true,
        };
        let place = RankPlace { rank: 3, host: "h".to_owned(), pid: 7, at: at.clone(), state: Some('S') };
        let failure = RankFailure {
            rank: 2,
            local_rank: 0,
            host: "h".to_owned(),
            pid: Some(8),
            end: End::Killed(9),
            step: Some(5),
            at: Some(at),
            record: Some(ErrorRecord::new(2, 0, Kind::CollectiveTimeout, "m".to_owned(), ExitStatus::Failed)),
            last_lines: vec!["ü".repeat(1000); 20],
            peak_rss_bytes: Some(1 << 30),
            oom: Some(OomKill { limit_bytes: None }),
            counts_oom: true,
            others: vec![place.clone()],
        };
        let (host, run_id) = ("h".to_owned(), "r".to_owned());
        let assignment = Assignment { host, first_rank: 4, world_size: 8, run_id, max_restarts: 3 };
        vec![
            Message::Hello(hello),
            Message::Hello(refused),
            Message::Start(assignment),
            Message::Stop { has_deadline: true },
            Message::End { is_hang: true },
            Message::Kill,
            Message::RankFailed(Box::new(failure.clone())),
            Message::WhereAre { failed: 2 },
            Message::Places { failed: 2, ranks: vec![place] },
            Message::Ended(Ended { num_stopped: 1, forced: true, unkillable: vec![3], early: vec![failure] }),
            Message::Restart(Restart { resumes: true, lines: vec!["a".to_owned()] }),
            Message::GaveUp(Farewell::new(ExitStatus::Failed, vec!["a".to_owned(), "b".to_owned()])),
            Message::Verdict(Farewell::new(ExitStatus::Stopped, vec!["a".to_owned()])),
        ]
    }

    #[test]
    fn messages_arrive_whole_and_in_order() {
        let (mut near, mut far) = pair();
        let samples = samples();
        for _ in 0..100 {
            samples.iter().for_each(|message| near.send(message));
            assert!(receive(&mut far, samples.len()) == samples);
        }
    }

    #[test]
    fn a_reader_that_sleeps_does_not_hold_the_sender_up() {
        let (mut near, mut far) = pair();
        let failure = &samples()[6];
        (0..500).for_each(|_| near.send(failure));
        assert!(near.flags().contains(PollFlags::OUT), "20 MB are more than the system buffers");
        let sender = std::thread::spawn(move || near.finish(Instant::now() + Duration::from_secs(20)));
        assert_eq!(receive(&mut far, 500).len(), 500);
        far.read_some();
        drop(far);
        sender.join().unwrap();
    }

    /// Each go is bounded, so that deadlines and signals are seen between two of them.
    #[test]
    fn a_sender_without_end_does_not_take_all_attention() {
        let (mut near, mut far) = pair();
        (0..100_000).for_each(|_| near.send(&Message::Kill));
        far.read_some();
        let num = std::iter::from_fn(|| far.take()).count();
        assert!((1..=MAX_READ_BYTES / 7).contains(&num), "{num}");
        assert_eq!(far.closed(), None);
    }

    #[test]
    fn what_ends_a_run_early_never_says_that_it_is_done() {
        for (status, expected) in [(0, 1), (2, 2), (75, 75), (7, 1)] {
            let farewell = Farewell { status, lines: vec![] };
            assert_eq!(farewell.failure_status().code(), expected);
            assert_eq!(Failure::from(farewell).status.code(), expected);
        }
    }

    #[test]
    fn what_is_no_message_closes_the_link() {
        for (bytes, says) in [
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "it sent what is no message"),
            (b"{\"launch\": \"missiles\"}\n".to_vec(), "it sent what is no message"),
            (vec![0; MAX_MESSAGE_BYTES + 1], "bytes without an end"),
            (vec![], "its launcher is gone"),
        ] {
            let (near, mut far) = pair();
            let writer = std::thread::spawn(move || {
                let mut stream = near.stream;
                stream.set_nonblocking(false).unwrap();
                let _ = stream.write_all(&bytes);
            });
            assert_eq!(receive(&mut far, 1), []);
            assert!(far.closed().unwrap().contains(says), "{:?}", far.closed());
            writer.join().unwrap();
        }
    }
}
