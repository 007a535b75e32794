//! Streams and events of any device type.
//!
//! On CPU there is one stream, which the pool gives too. Work on CPU is done when its call returns, so that stream is
//! always done, events on it are done once recorded, and waiting for them is nothing.

use std::ffi::c_void;
use std::time::Instant;

use tch::Device;

use crate::error::{TorchError, check};
use crate::ffi::{self, CEvent, CStreamGuard, device_code, device_of};

/// A queue of work on a device. A name, not an owner: copies mean the same queue, and queues are never freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream(RawStream);

/// Mirrors `RawStream` in cpp/stream.cpp.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawStream {
    id: i64,
    device_index: i32,
    device_type: i32,
}

const NO_STREAM: RawStream = RawStream { id: 0, device_index: -1, device_type: 0 };

impl Stream {
    /// The stream that operations of this thread on `device` go to.
    pub fn current(device: Device) -> Result<Self, TorchError> {
        let (device_type, index) = device_code("Stream::current", device)?;
        let mut raw = NO_STREAM;
        // SAFETY: `raw` is a place for one stream.
        let message = unsafe { ffi::fte_stream_current(device_type, index, &mut raw) };
        check("Stream::current", message).map(|()| Self(raw))
    }

    /// A stream of libtorch's pool (32 of each priority on CUDA, handed out in turn); on CPU, its one stream.
    pub fn new_from_pool(device: Device, high_priority: bool) -> Result<Self, TorchError> {
        if device == Device::Cpu {
            return Self::current(device);
        }
        let (device_type, index) = device_code("Stream::new_from_pool", device)?;
        let mut raw = NO_STREAM;
        // SAFETY: `raw` is a place for one stream.
        let message = unsafe { ffi::fte_stream_from_pool(device_type, index, high_priority, &mut raw) };
        check("Stream::new_from_pool", message).map(|()| Self(raw))
    }

    pub fn device(&self) -> Device {
        device_of("Stream::device", self.0.device_type, self.0.device_index)
            .expect("streams are made for known devices")
    }

    /// Makes this stream, and its device, current for this thread until the guard is dropped. Guards nest: the last
    /// one made is the first one dropped.
    pub fn enter(&self) -> Result<StreamGuard, TorchError> {
        let mut guard = std::ptr::null_mut();
        // SAFETY: `guard` is a place for one handle.
        check("Stream::enter", unsafe { ffi::fte_stream_enter(self.0, &mut guard) })?;
        Ok(StreamGuard { guard })
    }

    /// Work given to this stream from now on starts after what `event` has recorded; the host does not wait. Nothing
    /// happens when the event was never recorded. The event must be of the stream's device type.
    pub fn wait(&self, event: &Event) -> Result<(), TorchError> {
        match event.0 {
            Inner::Cpu { .. } => self.expect_cpu("Stream::wait"),
            // SAFETY: the event is alive while borrowed.
            Inner::Device(event) => check("Stream::wait", unsafe { ffi::fte_event_block(event, self.0) }),
        }
    }

    /// Whether all work given so far is done.
    pub fn query(&self) -> Result<bool, TorchError> {
        let mut done = false;
        // SAFETY: `done` is a place for one bool.
        check("Stream::query", unsafe { ffi::fte_stream_query(self.0, &mut done) })?;
        Ok(done)
    }

    /// Blocks the host until all work given so far is done.
    pub fn synchronize(&self) -> Result<(), TorchError> {
        // SAFETY: a stream is plain data.
        check("Stream::synchronize", unsafe { ffi::fte_stream_synchronize(self.0) })
    }

    /// The device library's own handle, a `cudaStream_t` on CUDA, where null means the default stream; null on CPU.
    pub fn native_handle(&self) -> Result<*mut c_void, TorchError> {
        let mut handle = std::ptr::null_mut();
        if self.device() == Device::Cpu {
            return Ok(handle);
        }
        // SAFETY: `handle` is a place for one pointer.
        check("Stream::native_handle", unsafe { ffi::fte_stream_native_handle(self.0, &mut handle) })?;
        Ok(handle)
    }

    fn expect_cpu(&self, op: &'static str) -> Result<(), TorchError> {
        match self.device() {
            Device::Cpu => Ok(()),
            other => Err(TorchError::new(op, format!("an event of the CPU, a stream of {other:?}"))),
        }
    }
}

/// Keeps a stream current; see [`Stream::enter`].
#[derive(Debug)]
#[must_use = "the stream is current only while the guard lives"]
pub struct StreamGuard {
    /// Freed by Drop, on the thread that made it: the pointer keeps the type from being sent.
    guard: *mut CStreamGuard,
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        // SAFETY: the guard is owned and deleted once, on its own thread.
        let restored = check("StreamGuard::drop", unsafe { ffi::fte_stream_leave(self.guard) });
        debug_assert_eq!(restored, Ok(()));
    }
}

/// A point in a stream's work.
#[derive(Debug)]
pub struct Event(Inner);

#[derive(Debug)]
enum Inner {
    /// When it was recorded last.
    Cpu { timing: bool, recorded: Option<Instant> },
    /// Freed by Drop.
    Device(*mut CEvent),
}

// SAFETY: c10 events may move between threads; methods that change one take `&mut self`, and it is not Sync.
unsafe impl Send for Event {}

impl Event {
    /// An event of `device`'s type, not recorded yet. On CUDA it is the cheapest kind, which has no time.
    pub fn new(device: Device) -> Result<Self, TorchError> {
        Self::with(device, false)
    }

    /// An event whose time can be compared, by [`Event::elapsed_ms`].
    pub fn with_timing(device: Device) -> Result<Self, TorchError> {
        Self::with(device, true)
    }

    fn with(device: Device, timing: bool) -> Result<Self, TorchError> {
        let (device_type, _) = device_code("Event::new", device)?;
        if device == Device::Cpu {
            return Ok(Self(Inner::Cpu { timing, recorded: None }));
        }
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` is a place for one handle.
        check("Event::new", unsafe { ffi::fte_event_new(device_type, timing, &mut event) })?;
        Ok(Self(Inner::Device(event)))
    }

    /// Marks the work given to `stream` so far; an earlier mark is forgotten. The stream must be of the event's device
    /// type.
    pub fn record(&mut self, stream: &Stream) -> Result<(), TorchError> {
        match &mut self.0 {
            Inner::Cpu { timing, recorded } => {
                stream.expect_cpu("Event::record")?;
                *recorded = timing.then(Instant::now);
                Ok(())
            }
            // SAFETY: the event is alive and borrowed for us alone.
            Inner::Device(event) => check("Event::record", unsafe { ffi::fte_event_record(*event, stream.0) }),
        }
    }

    /// Whether the marked work is done; true when nothing was recorded.
    pub fn query(&self) -> Result<bool, TorchError> {
        let Inner::Device(event) = self.0 else { return Ok(true) };
        let mut done = false;
        // SAFETY: the event is alive while borrowed, `done` is a place for one bool.
        check("Event::query", unsafe { ffi::fte_event_query(event, &mut done) })?;
        Ok(done)
    }

    /// Blocks the host until the marked work is done.
    pub fn synchronize(&self) -> Result<(), TorchError> {
        let Inner::Device(event) = self.0 else { return Ok(()) };
        // SAFETY: the event is alive while borrowed.
        check("Event::synchronize", unsafe { ffi::fte_event_synchronize(event) })
    }

    /// Milliseconds from this event to `end`, negative where that came first: of the device's own clock, or on CPU
    /// between the calls of [`Event::record`]. Both were made [`Event::with_timing`], are recorded, and done.
    pub fn elapsed_ms(&self, end: &Event) -> Result<f64, TorchError> {
        const OP: &str = "Event::elapsed_ms";
        match (&self.0, &end.0) {
            (Inner::Device(start), Inner::Device(end)) => {
                let mut ms = 0.0;
                // SAFETY: both events are alive while borrowed, `ms` is a place for one f64.
                check(OP, unsafe { ffi::fte_event_elapsed_ms(*start, *end, &mut ms) })?;
                Ok(ms)
            }
            (Inner::Cpu { recorded: Some(start), .. }, Inner::Cpu { recorded: Some(end), .. }) => {
                let forward = end.saturating_duration_since(*start).as_secs_f64();
                Ok((forward - start.saturating_duration_since(*end).as_secs_f64()) * 1e3)
            }
            _ => Err(TorchError::new(OP, "expected two events of one device type, made with timing and recorded")),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Inner::Device(event) = self.0 {
            // SAFETY: the event is owned and deleted once.
            unsafe { ffi::fte_event_delete(event) }
        }
    }
}
