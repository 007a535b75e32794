//! Where the ranks of one run tell each other of its end: in the store.
//!
//! The first rank whose watchdog aborts is the *judge* of the run's end. Each rank reports what it has called last and what
//! it waits for; the judge collects the reports of all ranks that still answer and publishes them together, and each rank
//! reads from them who is behind.
//!
//! A thread of its own talks to the store, so that the watchdog never waits for one that does not answer, as when the
//! process that serves it is suspended. Then nothing is known, and the thread tries again over a new connection: on the old
//! one a reply could come late, and be taken for another question's.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use fsdp_control::ControlError;
use fsdp_control::store::Store;
use serde_json::{Value, json};

use super::failure::{Report, Reports};

/// How long the judge collects, and how long the others wait for it.
const COLLECT_LIMIT: Duration = Duration::from_secs(2);
const WAIT_LIMIT: Duration = Duration::from_millis(2500);
const COLLECT_EVERY: Duration = Duration::from_millis(50);
/// How often it looks whether another rank has given up.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long a new connection, and a reply beyond the wait that was asked for, may take.
const REPLY_SLACK: Duration = Duration::from_secs(1);

/// The watchdog's side.
#[derive(Debug)]
pub(super) struct Board {
    requests: Sender<Request>,
    judge: Arc<OnceLock<usize>>,
}

/// What is to be done with a report.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Say {
    /// Leave it for the judge.
    Report,
    /// And tell the others that this rank has given up.
    GiveUp,
    /// And get what all have reported.
    Exchange,
}

#[derive(Debug)]
struct Request {
    say: Say,
    report: Report,
    reply: Sender<Option<Reports>>,
}

impl Board {
    /// Over a connection of its own to `store`. `prefix`: of all its keys.
    ///
    /// # Errors
    /// The store is gone, or no thread can be started.
    pub fn start(store: &Store, prefix: String, rank: usize, world_size: usize) -> Result<Self, ControlError> {
        let (host, port) = store.addr().rsplit_once(':').expect("an address has a port");
        let addr = (host.to_owned(), port.parse().expect("a port is a number"));
        let store = Some(Store::connect((host, addr.1), WAIT_LIMIT)?.with_reply_slack(REPLY_SLACK));
        let talk = Talk { addr, store, prefix, rank, world_size };
        let (requests, receive) = mpsc::channel();
        let judge = Arc::new(OnceLock::new());
        let of_thread = Arc::clone(&judge);
        let failed = |source| ControlError::System { what: "cannot start the board's thread".into(), source };
        std::thread::Builder::new()
            .name("nccl-board".into())
            .spawn(move || serve(talk, &receive, &of_thread))
            .map_err(failed)?;
        Ok(Board { requests, judge })
    }

    /// The rank that has given up first, if one is known to have. Never waits.
    pub fn who_gave_up(&self) -> Option<usize> {
        self.judge.get().copied()
    }

    /// Says it, and returns when that is done, or after `limit`. What all have reported, where that was asked for and is
    /// known.
    pub fn say(&self, say: Say, report: Report, limit: Duration) -> Option<Reports> {
        let (reply, answer) = mpsc::channel();
        self.requests.send(Request { say, report, reply }).ok()?;
        answer.recv_timeout(limit).ok()?
    }
}

/// The thread, which ends with the board.
fn serve(mut talk: Talk, requests: &Receiver<Request>, judge: &OnceLock<usize>) {
    loop {
        match requests.recv_timeout(ASK_EVERY) {
            Ok(Request { say, report, reply }) => {
                // A store that does not answer has nothing to tell.
                let reports = talk.say(say, &report).unwrap_or(None);
                let _ = reply.send(reports); // whoever asked may have gone on without
            }
            Err(RecvTimeoutError::Timeout) => {
                if judge.get().is_none()
                    && let Ok(Some(rank)) = talk.get("judge", Duration::ZERO)
                    && let Some(rank) = rank.as_u64()
                {
                    let _ = judge.set(rank as usize); // only this thread sets it
                }
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// The thread's side.
#[derive(Debug)]
struct Talk {
    addr: (String, u16),
    /// `None` after a request without a reply.
    store: Option<Store>,
    prefix: String,
    rank: usize,
    world_size: usize,
}

/// Errors of all: there was no answer.
impl Talk {
    fn say(&mut self, say: Say, report: &Report) -> Result<Option<Reports>, ControlError> {
        self.set(&format!("rank-{}", self.rank), &report.to_json())?;
        if say == Say::Report {
            return Ok(None);
        }
        let is_first = self.request("gave-up", |store, key| store.add(key, 1))? == 1;
        if is_first {
            self.set("judge", &json!(self.rank))?;
        }
        if say == Say::GiveUp {
            return Ok(None);
        }
        if is_first {
            let reports = self.collect()?;
            let all = reports.iter().map(|report| report.as_ref().map(Report::to_json).into()).collect();
            self.set("reports", &Value::Array(all))?;
            return Ok(Some(Reports(reports)));
        }
        let all = self.get("reports", WAIT_LIMIT)?;
        let all = all.as_ref().and_then(Value::as_array);
        Ok(all.map(|all| Reports(all.iter().map(Report::from_json).collect())))
    }

    /// The reports of all ranks; of those that come in time.
    fn collect(&mut self) -> Result<Vec<Option<Report>>, ControlError> {
        let start = Instant::now();
        let mut reports = vec![None; self.world_size];
        loop {
            for (rank, report) in reports.iter_mut().enumerate().filter(|(_, report)| report.is_none()) {
                *report = self.get(&format!("rank-{rank}"), Duration::ZERO)?.as_ref().and_then(Report::from_json);
            }
            if reports.iter().all(Option::is_some) || start.elapsed() >= COLLECT_LIMIT {
                return Ok(reports);
            }
            std::thread::sleep(COLLECT_EVERY);
        }
    }

    fn set(&mut self, key: &str, value: &Value) -> Result<(), ControlError> {
        self.request(key, |store, key| store.set(key, value.to_string().as_bytes()))
    }

    /// `None`: nobody has set it within `timeout`.
    fn get(&mut self, key: &str, timeout: Duration) -> Result<Option<Value>, ControlError> {
        match self.request(key, |store, key| store.get(key, timeout)) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(ControlError::KeyTimeout { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a request for the key of that name; over a new connection if the old one is lost.
    fn request<T>(
        &mut self,
        key: &str,
        make: impl FnOnce(&mut Store, &str) -> Result<T, ControlError>,
    ) -> Result<T, ControlError> {
        let mut store = match self.store.take() {
            Some(store) => store,
            None => Store::connect((&self.addr.0, self.addr.1), REPLY_SLACK)?.with_reply_slack(REPLY_SLACK),
        };
        let result = make(&mut store, &format!("{}/{key}", self.prefix));
        if !matches!(result, Err(ControlError::StoreLost { .. })) {
            self.store = Some(store);
        }
        result
    }
}
