use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

use super::wire::{self, Kind, MAX_VALUE_BYTES, Reply, Request};
use crate::{ControlError, ports};

/// Bounds on what clients can make the server hold. A rank has up to four connections, so there is room for 4096 ranks; each
/// connection takes a thread and a descriptor.
const MAX_CONNECTIONS: usize = 16384;
const MAX_TOTAL_BYTES: usize = 256 << 20;

/// Serves a store until it is dropped; then clients that wait get an error.
#[derive(Debug)]
pub struct StoreServer {
    local_addr: SocketAddr,
    shared: Arc<Shared>,
    accept_thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when a key is set, a will is made or done, and when the server stops.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    values: HashMap<String, Vec<u8>>,
    /// Bytes of all keys and values, those of wills included.
    total_bytes: usize,
    /// Open connections by number, so that stopping can end their threads.
    connections: HashMap<u64, Arc<TcpStream>>,
    /// By connection: what to append to which key when it ends.
    wills: HashMap<u64, (String, Vec<u8>)>,
    stopping: bool,
}

impl StoreServer {
    /// Listens on `(host, port)`; port 0 picks a free one, see [`StoreServer::local_addr`].
    ///
    /// # Errors
    /// The port is in use, or the host is not an address of this machine.
    pub fn bind((host, port): (&str, u16)) -> Result<Self, ControlError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => {
                ControlError::PortInUse { host: host.into(), port, holder: ports::holder(port) }
            }
            _ => ControlError::StoreBind { host: host.into(), port, source },
        };
        allow_descriptors();
        let listener = TcpListener::bind((host, port)).map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        let shared = Arc::new(Shared::default());
        let accept_thread = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("store".into())
                .spawn(move || accept(&listener, &shared))
                .map_err(failed)?
        };
        Ok(StoreServer { local_addr, shared, accept_thread: Some(accept_thread) })
    }

    /// Where it listens, with the port that was picked.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Waits until no will is left, because those who made one have taken it back or are gone; `false` if some are left
    /// after `timeout`.
    pub fn wait_for_wills(&self, timeout: Duration) -> bool {
        let are_left = |state: &mut State| !state.wills.is_empty();
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), timeout, are_left);
        !waited.expect("no thread panics while it holds the state").1.timed_out()
    }
}

/// Lets this process have as many descriptors as the system grants it: often it starts with 1024.
fn allow_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Then connections are refused when those that there are run out.
    let _ = setrlimit(Resource::Nofile, limit);
}

impl Drop for StoreServer {
    fn drop(&mut self) {
        {
            let mut state = self.shared.lock();
            state.stopping = true;
            for stream in state.connections.values() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.shared.changed.notify_all();
        // `accept` has no time limit: a last connection wakes it.
        let mut addr = self.local_addr;
        if addr.ip().is_unspecified() {
            addr.set_ip(if addr.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() });
        }
        if TcpStream::connect_timeout(&addr, Duration::from_secs(1)).is_ok()
            && let Some(thread) = self.accept_thread.take()
        {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics while it holds the state")
    }

    fn end_connection(&self, number: u64) {
        let mut state = self.lock();
        state.connections.remove(&number);
        if let Some((key, value)) = state.take_will(number)
            && !state.stopping
        {
            // Refused where the key or the store is full: then others have had their say.
            let _ = state.append(key, &value);
        }
        drop(state);
        self.changed.notify_all();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut number = 0;
    for stream in listener.incoming() {
        let kept = stream.and_then(|stream| {
            wire::keep_alive(&stream)?;
            Ok(Arc::new(stream))
        });
        let mut state = shared.lock();
        if state.stopping {
            return;
        }
        // A failed accept is the client's loss (it tries again), or a lack of descriptors, which can pass.
        let Ok(stream) = kept else {
            drop(state);
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if state.connections.len() >= MAX_CONNECTIONS {
            continue;
        }
        number += 1;
        state.connections.insert(number, Arc::clone(&stream));
        drop(state);
        let served = {
            let shared = Arc::clone(shared);
            let serve = move || {
                serve(&stream, number, &shared);
                shared.end_connection(number);
            };
            std::thread::Builder::new().name("store-client".into()).stack_size(128 * 1024).spawn(serve)
        };
        if served.is_err() {
            shared.end_connection(number);
        }
    }
}

/// Answers one client until it goes, or sends what is no request.
fn serve(mut stream: &TcpStream, number: u64, shared: &Shared) {
    while let Ok(request) = wire::read_request(&mut stream) {
        let reply = answer(request, number, shared);
        if wire::write_reply(&mut stream, &reply).is_err() {
            return;
        }
    }
}

fn answer(request: Request, number: u64, shared: &Shared) -> Reply {
    let Request { kind, key, value } = request;
    let changed = |result: Result<(), String>| match result {
        Ok(()) => {
            shared.changed.notify_all();
            Reply::Value(Vec::new())
        }
        Err(reason) => Reply::Refused(reason),
    };
    match kind {
        Kind::Set => changed(shared.lock().set(key, value)),
        Kind::Append => changed(shared.lock().append(key, &value)),
        Kind::Will => changed(shared.lock().set_will(number, key, value)),
        Kind::Add => {
            let mut state = shared.lock();
            let old = match state.values.get(&key).map(|v| <[u8; 8]>::try_from(v.as_slice())) {
                None => 0,
                Some(Ok(bytes)) => i64::from_le_bytes(bytes),
                Some(Err(_)) => return Reply::Refused("its value is not a number".into()),
            };
            let delta = i64::from_le_bytes(value.try_into().expect("the wire checks the length"));
            let Some(new) = old.checked_add(delta) else { return Reply::Refused("the sum overflows".into()) };
            let new = new.to_le_bytes().to_vec();
            match changed(state.set(key, new.clone())) {
                Reply::Value(_) => Reply::Value(new),
                refused => refused,
            }
        }
        Kind::Get => {
            let millis = u64::from_le_bytes(value.try_into().expect("the wire checks the length"));
            let start = Instant::now();
            let mut state = shared.lock();
            loop {
                if let Some(value) = state.values.get(&key) {
                    return Reply::Value(value.clone());
                }
                if state.stopping {
                    return Reply::Refused("the store is stopping".into());
                }
                let Some(left) = Duration::from_millis(millis).checked_sub(start.elapsed()) else {
                    return Reply::TimedOut;
                };
                let waited = shared.changed.wait_timeout(state, left);
                state = waited.expect("no thread panics while it holds the state").0;
            }
        }
    }
}

impl State {
    fn set(&mut self, key: String, value: Vec<u8>) -> Result<(), String> {
        debug_assert!(value.len() <= MAX_VALUE_BYTES);
        let old_bytes = self.values.get(&key).map_or(0, |old| key.len() + old.len());
        self.account(old_bytes, key.len() + value.len())?;
        self.values.insert(key, value);
        Ok(())
    }

    /// An empty value takes an earlier will back.
    fn set_will(&mut self, number: u64, key: String, value: Vec<u8>) -> Result<(), String> {
        if value.is_empty() {
            self.take_will(number);
            return Ok(());
        }
        let old_bytes = self.wills.get(&number).map_or(0, |(key, old)| key.len() + old.len());
        self.account(old_bytes, key.len() + value.len())?;
        self.wills.insert(number, (key, value));
        Ok(())
    }

    fn take_will(&mut self, number: u64) -> Option<(String, Vec<u8>)> {
        let (key, value) = self.wills.remove(&number)?;
        self.total_bytes -= key.len() + value.len();
        Some((key, value))
    }

    /// Counts `new_bytes` in the place of `old_bytes`.
    fn account(&mut self, old_bytes: usize, new_bytes: usize) -> Result<(), String> {
        let total_bytes = self.total_bytes - old_bytes + new_bytes;
        if total_bytes > MAX_TOTAL_BYTES {
            return Err(format!("the store is full ({MAX_TOTAL_BYTES} bytes)"));
        }
        self.total_bytes = total_bytes;
        Ok(())
    }

    fn append(&mut self, key: String, value: &[u8]) -> Result<(), String> {
        let old = self.values.get(&key).map_or(&[][..], Vec::as_slice);
        if old.len() + value.len() > MAX_VALUE_BYTES {
            return Err(format!("the value would have more than {MAX_VALUE_BYTES} bytes"));
        }
        let whole = [old, value].concat();
        self.set(key, whole)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wills_count_for_as_long_as_they_are_held() {
        let mut state = State::default();
        state.set("key".into(), vec![0; 10]).unwrap();
        state.set_will(1, "will".into(), vec![0; 100]).unwrap();
        state.set_will(2, "will".into(), vec![0; 200]).unwrap();
        assert_eq!(state.total_bytes, 13 + 104 + 204);
        state.set_will(2, "will".into(), vec![0; 20]).unwrap();
        state.set_will(3, "will".into(), Vec::new()).unwrap();
        assert_eq!(state.total_bytes, 13 + 104 + 24);
        state.total_bytes += MAX_TOTAL_BYTES;
        assert!(state.set_will(4, "will".into(), vec![0; 100]).unwrap_err().contains("full"));
        state.total_bytes -= MAX_TOTAL_BYTES;
        assert!(state.take_will(1).is_some());
        state.set_will(2, "will".into(), Vec::new()).unwrap();
        assert_eq!((state.total_bytes, state.wills.len()), (13, 0));
    }
}
