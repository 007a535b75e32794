use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use super::wire::{self, Kind, MAX_KEY_BYTES, MAX_VALUE_BYTES, Reply};
use crate::ControlError;

/// How long a reply may take beyond the time that the server was asked to wait, unless [`Store::with_reply_slack`] says
/// otherwise: longer than a launcher is suspended by Ctrl-Z for a moment. A server that is gone is noticed at once, a host
/// within seconds; see `wire::keep_alive`.
const REPLY_SLACK: Duration = Duration::from_secs(600);
/// The same until the first reply of a connection: who has the port may be another program, which never answers.
const FIRST_REPLY_SLACK: Duration = Duration::from_secs(20);
const RETRY_EVERY: Duration = Duration::from_millis(50);

/// A connection to a [`super::StoreServer`].
#[derive(Debug)]
pub struct Store {
    stream: TcpStream,
    addr: String,
    reply_slack: Duration,
    has_replied: bool,
    /// A request had no reply in time, or half of one: what comes next would be taken for another request's.
    is_lost: bool,
}

impl Store {
    /// Connects to the server at `(host, port)`, trying again until `timeout`, since it may start later.
    ///
    /// # Errors
    /// No connection within `timeout`; the last reason is given.
    pub fn connect((host, port): (&str, u16), timeout: Duration) -> Result<Self, ControlError> {
        let start = Instant::now();
        loop {
            let left = timeout.saturating_sub(start.elapsed()).max(Duration::from_millis(1));
            match connect_once((host, port), left) {
                Ok(stream) => {
                    let addr = format!("{host}:{port}");
                    return Ok(Store { stream, addr, reply_slack: REPLY_SLACK, has_replied: false, is_lost: false });
                }
                Err(source) if start.elapsed() + RETRY_EVERY >= timeout => {
                    return Err(ControlError::StoreUnreachable { addr: format!("{host}:{port}"), timeout, source });
                }
                Err(_) => std::thread::sleep(RETRY_EVERY),
            }
        }
    }

    /// For those who must not wait for a server that does not answer, because its process is suspended: a request fails
    /// with [`ControlError::StoreLost`] when its reply takes `reply_slack` longer than it asked the server to wait. The
    /// connection is over then, and later requests fail at once.
    pub fn with_reply_slack(self, reply_slack: Duration) -> Self {
        Store { reply_slack, ..self }
    }

    /// Sets `key`, over an older value.
    ///
    /// # Errors
    /// The key or value is too long ([`super::MAX_KEY_BYTES`], [`super::MAX_VALUE_BYTES`]), the store is full or gone.
    pub fn set(&mut self, key: &str, value: &[u8]) -> Result<(), ControlError> {
        match self.ask(Kind::Set, key, value, Duration::ZERO)? {
            Some(_) => Ok(()),
            None => Err(self.refused(Kind::Set, key, "it timed out".into())),
        }
    }

    /// The value of `key`; waits until somebody has set it. A zero `timeout` asks once.
    ///
    /// # Errors
    /// [`ControlError::KeyTimeout`] names the key; or the store is gone.
    pub fn get(&mut self, key: &str, timeout: Duration) -> Result<Vec<u8>, ControlError> {
        let millis = timeout.as_millis().min(u64::MAX as u128) as u64;
        let value = self.ask(Kind::Get, key, &millis.to_le_bytes(), timeout)?;
        value.ok_or_else(|| ControlError::KeyTimeout { addr: self.addr.clone(), key: key.to_owned(), timeout })
    }

    /// Adds `delta` to the number under `key` (0 if unset), and gives the sum.
    ///
    /// # Errors
    /// The key holds something else than a number, or as [`Store::set`].
    pub fn add(&mut self, key: &str, delta: i64) -> Result<i64, ControlError> {
        let reply = self.ask(Kind::Add, key, &delta.to_le_bytes(), Duration::ZERO)?;
        match reply.map(<[u8; 8]>::try_from) {
            Some(Ok(bytes)) => Ok(i64::from_le_bytes(bytes)),
            _ => Err(self.refused(Kind::Add, key, "the reply is not a number".into())),
        }
    }

    /// Appends `value` to what `key` holds (nothing if unset).
    ///
    /// # Errors
    /// The whole would be longer than [`super::MAX_VALUE_BYTES`], or as [`Store::set`].
    pub fn append(&mut self, key: &str, value: &[u8]) -> Result<(), ControlError> {
        self.ask(Kind::Append, key, value, Duration::ZERO).map(|_| ())
    }

    /// Has the server append `value` to `key` when this connection ends, in whatever way: the process is killed, or its
    /// host is gone. A later will replaces an earlier one; an empty one takes it back.
    ///
    /// # Errors
    /// As [`Store::set`].
    pub fn will(&mut self, key: &str, value: &[u8]) -> Result<(), ControlError> {
        self.ask(Kind::Will, key, value, Duration::ZERO).map(|_| ())
    }

    /// The connection, by which another thread can end a wait in [`Store::get`].
    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Waits until all `world_size` ranks have called this with the same `name`. A name can be used again.
    ///
    /// # Errors
    /// [`ControlError::BarrierTimeout`] names the ranks that did not arrive; or the store is gone.
    pub fn barrier(
        &mut self,
        name: &str,
        rank: usize,
        world_size: usize,
        timeout: Duration,
    ) -> Result<(), ControlError> {
        assert!(rank < world_size, "rank {rank} of {world_size}");
        // Each rank arrives once a round, so the count gives the round.
        let count = self.add(&format!("barrier/{name}/count"), 1)?;
        let round = (count - 1) / world_size as i64;
        let arrived = |rank: usize| format!("barrier/{name}/{round}/rank-{rank}");
        let done = format!("barrier/{name}/{round}/done");
        self.set(&arrived(rank), b"")?;
        if count == (round + 1) * world_size as i64 {
            return self.set(&done, b"");
        }
        match self.get(&done, timeout) {
            Ok(_) => Ok(()),
            Err(ControlError::KeyTimeout { .. }) => {
                let mut missing = Vec::new();
                for other in 0..world_size {
                    match self.get(&arrived(other), Duration::ZERO) {
                        Ok(_) => {}
                        Err(ControlError::KeyTimeout { .. }) => missing.push(other),
                        Err(error) => return Err(error),
                    }
                }
                Err(ControlError::BarrierTimeout { name: name.to_owned(), world_size, missing, timeout })
            }
            Err(error) => Err(error),
        }
    }

    /// `host:port` of the server.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// One request; `None` when the server's wait timed out.
    fn ask(
        &mut self,
        kind: Kind,
        key: &str,
        value: &[u8],
        server_waits: Duration,
    ) -> Result<Option<Vec<u8>>, ControlError> {
        if key.len() > MAX_KEY_BYTES {
            return Err(self.refused(kind, key, format!("a key has at most {MAX_KEY_BYTES} bytes")));
        }
        if value.len() > MAX_VALUE_BYTES {
            let reason = format!("a value has at most {MAX_VALUE_BYTES} bytes, got {}", value.len());
            return Err(self.refused(kind, key, reason));
        }
        let lost = |source| ControlError::StoreLost { addr: self.addr.clone(), source };
        if self.is_lost {
            return Err(lost(io::Error::new(io::ErrorKind::NotConnected, "an earlier request had no reply")));
        }
        let slack = if self.has_replied { self.reply_slack } else { self.reply_slack.min(FIRST_REPLY_SLACK) };
        let limit = server_waits.saturating_add(slack);
        let reply = self
            .stream
            .set_read_timeout(Some(limit))
            .and_then(|()| self.stream.set_write_timeout(Some(limit)))
            .and_then(|()| wire::write_request(&mut self.stream, kind, key, value))
            .and_then(|()| wire::read_reply(&mut self.stream));
        self.has_replied |= reply.is_ok();
        match reply {
            Ok(Reply::Value(value)) => Ok(Some(value)),
            Ok(Reply::TimedOut) => Ok(None),
            Ok(Reply::Refused(reason)) => Err(self.refused(kind, key, reason)),
            Err(error) => {
                self.is_lost = true;
                Err(lost(match error.kind() {
                    io::ErrorKind::WouldBlock => {
                        io::Error::new(io::ErrorKind::TimedOut, format!("no reply within {limit:?}"))
                    }
                    _ => error,
                }))
            }
        }
    }

    fn refused(&self, kind: Kind, key: &str, reason: String) -> ControlError {
        ControlError::StoreRefused { addr: self.addr.clone(), request: kind.name(), key: key.to_owned(), reason }
    }
}

fn connect_once(addr: (&str, u16), timeout: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for addr in addr.to_socket_addrs()? {
        match TcpStream::connect_timeout(&addr, timeout) {
            Ok(stream) => {
                wire::keep_alive(&stream)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}
