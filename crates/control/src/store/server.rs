use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::wire::{self, Kind, MAX_VALUE_BYTES, Reply, Request};
use crate::ControlError;

/// Bounds on what clients can make the server hold.
const MAX_CONNECTIONS: usize = 4096;
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
    /// Signalled when a key is set and when the server stops.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    values: HashMap<String, Vec<u8>>,
    /// Bytes of all keys and values.
    total_bytes: usize,
    /// Open connections by number, so that stopping can end their threads.
    connections: HashMap<u64, TcpStream>,
    stopping: bool,
}

impl StoreServer {
    /// Listens on `(host, port)`; port 0 picks a free one, see [`StoreServer::local_addr`].
    ///
    /// # Errors
    /// The port is in use, or the host is not an address of this machine.
    pub fn bind((host, port): (&str, u16)) -> Result<Self, ControlError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => ControlError::PortInUse { host: host.into(), port },
            _ => ControlError::StoreBind { host: host.into(), port, source },
        };
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
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut number = 0;
    for stream in listener.incoming() {
        let kept = stream.and_then(|stream| {
            wire::keep_alive(&stream)?;
            Ok((stream.try_clone()?, stream))
        });
        let mut state = shared.lock();
        if state.stopping {
            return;
        }
        // A failed accept is the client's loss (it tries again), or a lack of descriptors, which can pass.
        let Ok((second, stream)) = kept else {
            drop(state);
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        if state.connections.len() >= MAX_CONNECTIONS {
            continue;
        }
        number += 1;
        state.connections.insert(number, second);
        drop(state);
        let served = {
            let shared = Arc::clone(shared);
            let serve = move || {
                serve(stream, &shared);
                shared.lock().connections.remove(&number);
            };
            std::thread::Builder::new().name("store-client".into()).stack_size(128 * 1024).spawn(serve)
        };
        if served.is_err() {
            shared.lock().connections.remove(&number);
        }
    }
}

/// Answers one client until it goes, or sends what is no request.
fn serve(mut stream: TcpStream, shared: &Shared) {
    while let Ok(request) = wire::read_request(&mut stream) {
        let reply = answer(request, shared);
        if wire::write_reply(&mut stream, &reply).is_err() {
            return;
        }
    }
}

fn answer(request: Request, shared: &Shared) -> Reply {
    let Request { kind, key, value } = request;
    match kind {
        Kind::Set => match shared.lock().set(key, value) {
            Ok(()) => {
                shared.changed.notify_all();
                Reply::Value(Vec::new())
            }
            Err(reason) => Reply::Refused(reason),
        },
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
            match state.set(key, new.clone()) {
                Ok(()) => {
                    shared.changed.notify_all();
                    Reply::Value(new)
                }
                Err(reason) => Reply::Refused(reason),
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
        let total_bytes = self.total_bytes - old_bytes + key.len() + value.len();
        if total_bytes > MAX_TOTAL_BYTES {
            return Err(format!("the store is full ({MAX_TOTAL_BYTES} bytes)"));
        }
        self.total_bytes = total_bytes;
        self.values.insert(key, value);
        Ok(())
    }
}
