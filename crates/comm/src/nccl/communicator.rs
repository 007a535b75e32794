//! One NCCL communicator, and what is under way on it: shared by the rank's thread, which calls, and the watchdog, which
//! looks on and aborts.
//!
//! No call of NCCL is to block: a communicator is made non-blocking, so a call that takes longer says that it is in
//! progress, and is asked for again and again, each time under the lock. So the watchdog can come in between and abort.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use fsdp_torch_ext::{Event, TorchError};
use tch::Device;

use super::failure::Failure;
use super::lane::Lane;
use super::library::{self, Functions, IN_PROGRESS, Library, REMOTE_ERROR, SUCCESS, Status, ncclComm_t, ncclUniqueId};
use super::watchdog::{TICK, Vitals};
use crate::flight::FlightRecord;
use crate::{Call, CommError};

/// How often something in progress is asked for before the thread sleeps in between.
const NUM_YIELDS: u32 = 2000;
const PAUSE: Duration = Duration::from_micros(50);
/// How long the end in good order may take: all is done by then but the goodbyes.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Communicator {
    pub library: &'static Library,
    /// This rank, of the run.
    pub rank: usize,
    /// By rank of the communicator, the rank of the run.
    pub members: Vec<usize>,
    pub calls: FlightRecord,
    vitals: Arc<Vitals>,
    state: Mutex<State>,
    in_flight: Mutex<InFlight>,
}

#[derive(Debug)]
struct State {
    /// `None` once it is aborted or destroyed.
    raw: Option<RawComm>,
    /// What the rank's thread has found, for the watchdog to act on.
    found: Option<Failure>,
}

/// NCCL's handle.
#[derive(Debug)]
pub(super) struct RawComm(ncclComm_t);

// SAFETY: NCCL lets any thread use a communicator, one at a time; the lock around it sees to that.
unsafe impl Send for RawComm {}

/// Collectives that were issued and not seen to be done, in order: one lane carries them all.
#[derive(Debug, Default)]
struct InFlight {
    queue: VecDeque<Issued>,
    /// Events to use again.
    spare: Vec<Event>,
}

#[derive(Debug)]
struct Issued {
    call: Call,
    /// By the watchdog's clock.
    since: Duration,
    /// Recorded after it; `None` while NCCL has not put it into the lane.
    done: Option<Event>,
}

impl Communicator {
    pub fn new(
        library: &'static Library,
        raw: RawComm,
        rank: usize,
        members: Vec<usize>,
        calls: FlightRecord,
        vitals: Arc<Vitals>,
    ) -> Arc<Self> {
        Arc::new(Communicator {
            library,
            rank,
            members,
            calls,
            vitals,
            state: Mutex::new(State { raw: Some(raw), found: None }),
            in_flight: Mutex::default(),
        })
    }

    /// The failure, once there is one, of whichever group: all are aborted together. Waits while the watchdog finds out more.
    pub fn check(&self) -> Result<(), CommError> {
        if self.state().found.is_none() && !self.vitals.is_ending() {
            return Ok(());
        }
        let failure = self.vitals.failure();
        // The counters show where this rank was.
        if let (Some(progress), Some(call)) = (self.calls.progress(), failure.call()) {
            progress.enter(call.op, call.seq, &call.unit, call.num_bytes);
        }
        Err(failure.to_error(self.rank))
    }

    /// A collective begins, and is watched from now on; see [`Self::is_issued`].
    pub fn begin(&self, call: &Call) -> Result<(), CommError> {
        self.check()?;
        self.in_flight().queue.push_back(Issued { call: call.clone(), since: self.vitals.now(), done: None });
        Ok(())
    }

    /// Makes a collective (or another call of NCCL, `name`), and returns when NCCL has put all of it into its lane, so that
    /// marks come after it. `make` gives the status of its last call.
    pub fn make(
        &self,
        name: &'static str,
        call: &Call,
        make: impl FnOnce(&Functions, ncclComm_t) -> Status,
    ) -> Result<(), CommError> {
        self.begin(call)?;
        let mut num_polls = 0;
        let mut make = Some(make);
        loop {
            let mut state = self.state();
            let (None, Some(RawComm(raw))) = (&state.found, &state.raw) else {
                drop(state);
                return Err(self.check().expect_err("it is closed or failed, and nobody calls a closed one"));
            };
            let raw = *raw;
            let status = match make.take() {
                Some(make) => make(&self.library.functions, raw),
                None => status_of(self.library, raw),
            };
            match status {
                // Asked at least once: a call may be taken, and the communicator still be at it.
                SUCCESS if num_polls > 0 => break,
                SUCCESS | IN_PROGRESS => {}
                _ => {
                    let message = format!("{name}: {}", self.library.text(status, Some(raw)));
                    let is_remote = status == REMOTE_ERROR;
                    state.found = Some(Failure::Nccl { message, is_remote, call: Some(call.clone()) });
                    continue;
                }
            }
            drop(state);
            self.pause(num_polls, call);
            num_polls += 1;
        }
        if num_polls > NUM_YIELDS
            && let Some(progress) = self.calls.progress()
        {
            progress.leave();
        }
        Ok(())
    }

    /// Between two looks at something in progress. A longer wait shows in the progress counters.
    fn pause(&self, num_polls: u32, call: &Call) {
        if num_polls == NUM_YIELDS
            && let Some(progress) = self.calls.progress()
        {
            progress.enter(call.op, call.seq, &call.unit, call.num_bytes);
        }
        if num_polls < NUM_YIELDS { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
    }

    /// The last collective is in the lane: from now on its end is looked for there.
    pub fn is_issued(&self, lane: &Lane, device: Device) -> Result<(), TorchError> {
        let spare = self.in_flight().spare.pop();
        let mut event = match spare {
            Some(event) => event,
            None => Event::new(device)?,
        };
        event.record(lane.stream())?; // not under the lock: it waits where the lane is full
        self.in_flight().queue.back_mut().expect("it was just issued").done = Some(event);
        Ok(())
    }

    /// The last call has put nothing into the lane.
    pub fn forget_last(&self) {
        self.in_flight().queue.pop_back();
    }

    /// Divides the communicator; the part that this rank comes into. All members call it.
    pub fn split(
        &self,
        call: &Call,
        color: i32,
        rank: usize,
        name: &str,
        limit: Duration,
    ) -> Result<RawComm, CommError> {
        let mut config = library::config(name);
        // Kept: NCCL fills it from a thread of its own, even after a failure here.
        let part: &'static mut ncclComm_t = Box::leak(Box::new(std::ptr::null_mut()));
        let place: *mut ncclComm_t = part;
        self.make("ncclCommSplit", call, |nccl, raw| {
            // SAFETY: the communicator is alive, `place` stays, and the configuration is copied by the call.
            unsafe { (nccl.ncclCommSplit)(raw, color, rank as i32, place, &mut config) }
        })?;
        self.forget_last();
        // SAFETY: NCCL has written it: the parent is no more in progress.
        let raw = RawComm(unsafe { place.read() });
        wait_until_ready(self.library, raw, limit).map_err(|why| CommError::Nccl {
            rank: self.rank,
            message: format!("ncclCommSplit: {why}"),
            is_remote: false,
            call: Some(call.clone()),
        })
    }

    /// Notes what is done. The failure that shows, with the oldest collective that is not done.
    pub fn look(&self, timeout: Duration) -> Option<Failure> {
        let oldest = match self.reap() {
            Ok(oldest) => oldest,
            Err(error) => {
                let call = self.oldest();
                return Some(Failure::Nccl { message: error.to_string(), is_remote: false, call });
            }
        };
        // Whoever holds it is in a call of NCCL and will see the error itself; if it stays there, time runs out below.
        if let Ok(state) = self.state.try_lock() {
            if state.found.is_some() {
                return state.found.clone();
            }
            let raw = state.raw.as_ref()?.0;
            let status = status_of(self.library, raw);
            if status != SUCCESS && status != IN_PROGRESS {
                let message = self.library.text(status, Some(raw));
                let is_remote = status == REMOTE_ERROR;
                return Some(Failure::Nccl { message, is_remote, call: oldest.map(|(call, _)| call) });
            }
        }
        let (call, since) = oldest?;
        // The clock goes by ticks: it was up to one later when the collective was issued.
        let waited = (self.vitals.now() - since).saturating_sub(TICK);
        (waited >= timeout).then_some(Failure::Timeout { missing: Vec::new(), waited, call })
    }

    /// The oldest collective that is not done, and since when.
    fn reap(&self) -> Result<Option<(Call, Duration)>, TorchError> {
        let mut in_flight = self.in_flight();
        while let Some(Issued { call, since, done }) = in_flight.queue.front() {
            match done {
                Some(event) if event.query()? => self.calls.done(call),
                _ => return Ok(Some((call.clone(), *since))),
            }
            let event = in_flight.queue.pop_front().and_then(|issued| issued.done);
            in_flight.spare.extend(event);
        }
        Ok(None)
    }

    pub fn oldest(&self) -> Option<Call> {
        self.in_flight().queue.front().map(|issued| issued.call.clone())
    }

    /// Takes the handle, to abort it; [`Vitals::is_ending`] by then. `None`: a call of NCCL does not come back.
    pub fn seize(&self) -> Option<Option<RawComm>> {
        Some(self.state.try_lock().ok()?.raw.take())
    }

    /// Ends it: in good order if all that `lane` holds is done, else by an abort. What was computed is there already, so
    /// goodbyes that take too long are only a warning.
    pub fn close(&self, lane: &Lane) -> Result<(), CommError> {
        let Some(raw) = self.state().raw.take() else { return Ok(()) };
        let nccl = &self.library.functions;
        let is_idle = lane.is_done();
        // SAFETY: the handle is alive, and taken: nobody else uses it. After destroy or abort it is not used again.
        unsafe {
            if is_idle {
                let status = (nccl.ncclCommFinalize)(raw.0);
                let finalized = match status {
                    SUCCESS | IN_PROGRESS => wait_until_ready(self.library, raw, CLOSE_LIMIT),
                    _ => {
                        let message = self.library.text(status, Some(raw.0));
                        abort(self.library, raw);
                        Err(NotReady::Failed(message))
                    }
                };
                match finalized {
                    Ok(raw) => _ = (nccl.ncclCommDestroy)(raw.0),
                    Err(why @ NotReady::Late(_)) => {
                        tracing::warn!(
                            "rank {}: NCCL: ncclCommFinalize: {why}; its communicator is aborted",
                            self.rank
                        );
                    }
                    Err(NotReady::Failed(message)) => {
                        let message = format!("ncclCommFinalize: {message}");
                        return Err(CommError::Nccl { rank: self.rank, message, is_remote: false, call: None });
                    }
                }
            } else {
                abort(self.library, raw);
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NO_PANIC)
    }

    fn in_flight(&self) -> MutexGuard<'_, InFlight> {
        self.in_flight.lock().expect(NO_PANIC)
    }
}

const NO_PANIC: &str = "no thread panics while it holds the lock";

/// Makes a communicator of all ranks, on the device that is current.
///
/// # Errors
/// NCCL's own text, or that it was not ready within `limit`.
pub(super) fn init(
    library: &'static Library,
    id: ncclUniqueId,
    rank: usize,
    world_size: usize,
    name: &str,
    limit: Duration,
) -> Result<RawComm, String> {
    let mut config = library::config(name);
    // Kept, as in `split`.
    let place: *mut ncclComm_t = Box::leak(Box::new(std::ptr::null_mut()));
    let status = {
        let init = library.functions.ncclCommInitRankConfig;
        // SAFETY: `place` stays, and the configuration is copied by the call.
        unsafe { init(place, world_size as i32, id, rank as i32, &mut config) }
    };
    // SAFETY: NCCL has written it, also when it goes on with the rest.
    let raw = RawComm(unsafe { place.read() });
    match status {
        SUCCESS | IN_PROGRESS if !raw.0.is_null() => wait_until_ready(library, raw, limit),
        _ => Err(NotReady::Failed(library.text(status, None))),
    }
    .map_err(|why| format!("ncclCommInitRankConfig: {why}"))
}

/// Why a communicator is not ready, and is aborted.
#[derive(Debug, thiserror::Error)]
enum NotReady {
    #[error("not done within {:.1} s", .0.as_secs_f64())]
    Late(Duration),
    /// NCCL's own text.
    #[error("{0}")]
    Failed(String),
}

/// Waits until a communicator has nothing in progress. It is aborted when it has failed, or is not ready in time.
fn wait_until_ready(library: &'static Library, raw: RawComm, limit: Duration) -> Result<RawComm, NotReady> {
    let start = Instant::now();
    loop {
        let why = match status_of(library, raw.0) {
            SUCCESS => return Ok(raw),
            IN_PROGRESS if start.elapsed() < limit => {
                std::thread::sleep(PAUSE);
                continue;
            }
            IN_PROGRESS => NotReady::Late(limit),
            status => NotReady::Failed(library.text(status, Some(raw.0))),
        };
        abort(library, raw);
        return Err(why);
    }
}

fn status_of(library: &Library, raw: ncclComm_t) -> Status {
    let mut status = SUCCESS;
    // SAFETY: the communicator is alive, and `status` is a place for an `ncclResult_t`, which is an int.
    let asked = unsafe { (library.functions.ncclCommGetAsyncError)(raw, (&raw mut status).cast()) };
    if asked == SUCCESS { status } else { asked }
}

/// Aborts a communicator in a thread of its own, since an abort may hang.
pub(super) fn abort(library: &'static Library, raw: RawComm) {
    let abort = move || {
        let RawComm(raw) = { raw };
        // SAFETY: the handle is alive and nobody else has it; NCCL frees it.
        unsafe { (library.functions.ncclCommAbort)(raw) };
    };
    // Without a thread the communicator stays as it is, and ends with the process.
    let _ = std::thread::Builder::new().name("nccl-abort".into()).spawn(abort);
}
