//! The store between real sockets: waiting, naming who is missing, and staying within bounds.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use fsdp_control::ControlError;
use fsdp_control::store::{MAX_KEY_BYTES, MAX_VALUE_BYTES, Store, StoreServer};

const LONG: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(100);

fn server() -> StoreServer {
    StoreServer::bind(("127.0.0.1", 0)).unwrap()
}

fn client(server: &StoreServer) -> Store {
    Store::connect(("127.0.0.1", server.local_addr().port()), LONG).unwrap()
}

#[test]
fn get_waits_until_somebody_sets_the_key() {
    let server = server();
    let (mut setter, mut getter) = (client(&server), client(&server));
    let waiting = std::thread::spawn(move || getter.get("a key", LONG).unwrap());
    std::thread::sleep(SHORT);
    setter.set("a key", b"value").unwrap();
    assert_eq!(waiting.join().unwrap(), b"value");
    setter.set("a key", b"").unwrap();
    assert_eq!(setter.get("a key", LONG).unwrap(), b"");
}

#[test]
fn a_key_that_nobody_sets_is_named() {
    let server = server();
    let error = client(&server).get("rank-3/address", SHORT).unwrap_err();
    assert!(matches!(&error, ControlError::KeyTimeout { key, .. } if key == "rank-3/address"), "{error}");
}

#[test]
fn add_counts_over_all_clients() {
    let server = server();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let mut store = client(&server);
            std::thread::spawn(move || (0..100).for_each(|_| assert!(store.add("count", 2).unwrap() > 0)))
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    let mut store = client(&server);
    assert_eq!(store.add("count", -1).unwrap(), 799);
    store.set("text", b"not a number").unwrap();
    let error = store.add("text", 1).unwrap_err();
    assert!(error.to_string().contains("\"text\": its value is not a number"), "{error}");
    store.set("large", &i64::MAX.to_le_bytes()).unwrap();
    assert!(store.add("large", 1).unwrap_err().to_string().contains("overflows"));
}

#[test]
fn a_barrier_can_be_used_again_and_lets_nobody_through_early() {
    let server = server();
    let threads: Vec<_> = (0..3)
        .map(|rank| {
            let mut store = client(&server);
            std::thread::spawn(move || {
                for round in 1..=20 {
                    store.add("arrivals", 1).unwrap();
                    store.barrier("step", rank, 3, LONG).unwrap();
                    let arrivals = store.add("arrivals", 0).unwrap();
                    assert!(arrivals >= round * 3, "rank {rank} left round {round} after {arrivals} arrivals");
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn a_barrier_names_the_ranks_that_did_not_arrive() {
    let server = server();
    let other = {
        let mut store = client(&server);
        std::thread::spawn(move || store.barrier("start", 2, 4, SHORT * 5).unwrap_err())
    };
    let error = client(&server).barrier("start", 0, 4, SHORT * 5).unwrap_err();
    for error in [error, other.join().unwrap()] {
        assert!(matches!(&error, ControlError::BarrierTimeout { missing, .. } if missing == &[1, 3]), "{error}");
    }
}

#[test]
fn appended_values_follow_each_other() {
    let server = server();
    let mut store = client(&server);
    store.append("log", b"a").unwrap();
    store.append("log", b"bc").unwrap();
    assert_eq!(store.get("log", LONG).unwrap(), b"abc");
    store.set("full", &vec![0; MAX_VALUE_BYTES]).unwrap();
    let error = store.append("full", b"x").unwrap_err();
    assert!(error.to_string().contains("append of key \"full\": the value would have more than"), "{error}");
}

#[test]
fn a_will_is_done_when_its_connection_ends_unless_it_was_taken_back() {
    let server = server();
    let (mut heir, mut first, mut second, mut third) =
        (client(&server), client(&server), client(&server), client(&server));
    first.will("log", b"not this").unwrap();
    first.will("log", b"first").unwrap();
    second.will("log", b"second").unwrap();
    third.will("log", b"third").unwrap();
    assert!(heir.get("log", SHORT).is_err(), "nobody has ended");
    assert!(!server.wait_for_wills(SHORT));
    second.will("log", b"").unwrap();
    drop((first, second));
    assert_eq!(heir.get("log", LONG).unwrap(), b"first");
    drop(third);
    let start = Instant::now();
    while heir.get("log", LONG).unwrap() != b"firstthird" {
        assert!(start.elapsed() < LONG);
    }
    assert!(server.wait_for_wills(LONG));
}

#[test]
fn a_port_in_use_is_named_at_once() {
    let server = server();
    let port = server.local_addr().port();
    let start = Instant::now();
    let error = StoreServer::bind(("127.0.0.1", port)).unwrap_err();
    assert!(matches!(error, ControlError::PortInUse { port: p, .. } if p == port), "{error}");
    assert!(start.elapsed() < Duration::from_secs(1));
    drop(server);
    StoreServer::bind(("127.0.0.1", port)).unwrap();
}

#[test]
fn clients_wait_for_a_server_that_starts_later() {
    let port = server().local_addr().port(); // free again
    let late = std::thread::spawn(move || Store::connect(("127.0.0.1", port), LONG).unwrap().get("k", LONG).unwrap());
    std::thread::sleep(SHORT * 3);
    let server = StoreServer::bind(("127.0.0.1", port)).unwrap();
    client(&server).set("k", b"v").unwrap();
    assert_eq!(late.join().unwrap(), b"v");
    drop(server);
    let error = Store::connect(("127.0.0.1", port), SHORT).unwrap_err();
    assert!(matches!(error, ControlError::StoreUnreachable { .. }), "{error}");
}

#[test]
fn dropping_the_server_ends_clients_that_wait() {
    let server = server();
    let mut store = client(&server);
    let waiting = std::thread::spawn(move || store.get("never", LONG).unwrap_err());
    std::thread::sleep(SHORT);
    let start = Instant::now();
    drop(server);
    let error = waiting.join().unwrap();
    assert!(matches!(error, ControlError::StoreLost { .. } | ControlError::StoreRefused { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(2));
}

/// The server here is a bare socket, which answers the first request after the client has given up on it.
#[test]
fn a_late_reply_is_not_taken_for_that_of_a_later_request() {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let answering = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 7 + 3 + 8]; // head, key, time to wait
        stream.read_exact(&mut request).unwrap();
        std::thread::sleep(3 * SHORT);
        stream.write_all(&[0, 4, 0, 0, 0, b'l', b'a', b't', b'e']).unwrap();
        stream.read(&mut request).unwrap_or(0) // until the client goes
    });
    let mut store = Store::connect(("127.0.0.1", port), LONG).unwrap().with_reply_slack(SHORT);
    let start = Instant::now();
    let error = store.get("one", SHORT).unwrap_err();
    assert!(error.to_string().ends_with("no reply within 200ms"), "{error}");
    assert!((2 * SHORT..10 * SHORT).contains(&start.elapsed()), "took {:?}", start.elapsed());
    std::thread::sleep(5 * SHORT);
    let error = store.get("two", SHORT).unwrap_err();
    assert!(matches!(error, ControlError::StoreLost { .. }), "{error}");
    drop(store);
    assert_eq!(answering.join().unwrap(), 0, "no second request was sent");
}

#[test]
fn lengths_are_bounded_on_both_sides() {
    let server = server();
    let mut store = client(&server);
    let error = store.set(&"k".repeat(MAX_KEY_BYTES + 1), b"").unwrap_err();
    assert!(error.to_string().contains("at most 256 bytes"), "{error}");
    let error = store.set("k", &vec![0; MAX_VALUE_BYTES + 1]).unwrap_err();
    assert!(error.to_string().contains("at most 1048576 bytes"), "{error}");
    store.set("k", &vec![7; MAX_VALUE_BYTES]).unwrap();
    assert_eq!(store.get("k", LONG).unwrap().len(), MAX_VALUE_BYTES);

    // What is no request ends that connection only: kind, key length u16, value length u32, key.
    for bytes in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[1, 1, 0, 0xff, 0xff, 0xff, 0xff, b'k'],
        &[1, 0xff, 0xff, 0, 0, 0, 0],
        &[2, 1, 0, 0, 0, 0, 0, b'k'],
        &[1, 1, 0, 0, 0, 0, 0, 0xff],
    ] {
        let mut raw = TcpStream::connect(server.local_addr()).unwrap();
        raw.set_read_timeout(Some(LONG)).unwrap();
        raw.write_all(bytes).unwrap();
        let end = raw.read(&mut [0; 16]);
        assert!(matches!(&end, Ok(0) | Err(_)) && !is_timeout(&end), "{bytes:?}: {end:?}");
    }
    store.set("still", b"serving").unwrap();
}

fn is_timeout(result: &std::io::Result<usize>) -> bool {
    matches!(result, Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
}
