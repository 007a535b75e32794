//! Bytes on the wire, all integers little-endian.
//!
//! ```text
//! request:  kind u8 | key length u16 | value length u32 | key | value
//! reply:    status u8 | length u32 | value, or the reason when refused
//! ```
//! `Get`'s value is the time to wait in milliseconds (u64), `Add`'s is the number to add (i64), as is its reply. `Will`'s
//! is to be appended to the key when the connection ends; an empty one takes an earlier will back.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rustix::net::sockopt;

/// Longest key, in bytes.
pub const MAX_KEY_BYTES: usize = 256;
/// Longest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Set = 1,
    Get = 2,
    Add = 3,
    Append = 4,
    Will = 5,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::Set => "set",
            Kind::Get => "get",
            Kind::Add => "add",
            Kind::Append => "append",
            Kind::Will => "will",
        }
    }
}

pub(super) struct Request {
    pub kind: Kind,
    pub key: String,
    pub value: Vec<u8>,
}

#[derive(Debug)]
pub(super) enum Reply {
    Value(Vec<u8>),
    TimedOut,
    Refused(String),
}

/// A peer that is gone, with no packet to say so, is noticed within about 4 seconds.
pub(super) fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_tcp_nodelay(stream, true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 4000)?;
    Ok(())
}

pub(super) fn write_request(stream: &mut TcpStream, kind: Kind, key: &str, value: &[u8]) -> io::Result<()> {
    assert!(key.len() <= MAX_KEY_BYTES && value.len() <= MAX_VALUE_BYTES, "the caller checks lengths");
    let mut bytes = Vec::with_capacity(7 + key.len() + value.len());
    bytes.push(kind as u8);
    bytes.extend((key.len() as u16).to_le_bytes());
    bytes.extend((value.len() as u32).to_le_bytes());
    bytes.extend(key.as_bytes());
    bytes.extend(value);
    stream.write_all(&bytes)
}

/// The next request. Lengths are checked before anything is allocated.
pub(super) fn read_request(stream: &mut impl Read) -> io::Result<Request> {
    let bad = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
    let mut head = [0; 7];
    stream.read_exact(&mut head)?;
    let kind = match head[0] {
        1 => Kind::Set,
        2 => Kind::Get,
        3 => Kind::Add,
        4 => Kind::Append,
        5 => Kind::Will,
        _ => return Err(bad("unknown request")),
    };
    let key_len = u16::from_le_bytes([head[1], head[2]]) as usize;
    let value_len = u32::from_le_bytes([head[3], head[4], head[5], head[6]]) as usize;
    if key_len > MAX_KEY_BYTES
        || value_len > MAX_VALUE_BYTES
        || (matches!(kind, Kind::Get | Kind::Add) && value_len != 8)
    {
        return Err(bad("a length is out of range"));
    }
    let mut key = vec![0; key_len];
    stream.read_exact(&mut key)?;
    let mut value = vec![0; value_len];
    stream.read_exact(&mut value)?;
    let key = String::from_utf8(key).map_err(|_| bad("the key is not UTF-8"))?;
    Ok(Request { kind, key, value })
}

pub(super) fn write_reply(stream: &mut impl Write, reply: &Reply) -> io::Result<()> {
    let (status, value) = match reply {
        Reply::Value(value) => (0, value.as_slice()),
        Reply::TimedOut => (1, &[][..]),
        Reply::Refused(reason) => (2, reason.as_bytes()),
    };
    let mut bytes = Vec::with_capacity(5 + value.len());
    bytes.push(status);
    bytes.extend((value.len() as u32).to_le_bytes());
    bytes.extend(value);
    stream.write_all(&bytes)
}

pub(super) fn read_reply(stream: &mut TcpStream) -> io::Result<Reply> {
    let bad = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
    let mut head = [0; 5];
    stream.read_exact(&mut head)?;
    let len = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if len > MAX_VALUE_BYTES {
        return Err(bad("a length is out of range; is this another program's port?"));
    }
    let mut value = vec![0; len];
    stream.read_exact(&mut value)?;
    match head[0] {
        0 => Ok(Reply::Value(value)),
        1 => Ok(Reply::TimedOut),
        2 => Ok(Reply::Refused(String::from_utf8_lossy(&value).into_owned())),
        _ => Err(bad("unknown reply; is this another program's port?")),
    }
}
