//! What happened when: spans of computations, collectives and waits of the steps that are traced.
//!
//! Marks are events on the stream that does the work, so on GPUs the times are the device's own; on CPUs work is done
//! when a call returns, and a mark is the time of the call.

use std::rc::Rc;

use fsdp_model::Segment;
use fsdp_torch_ext::{Event, Stream, TorchError};
use tch::Device;

/// What does a span's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Units, and the segments inside of them.
    Compute,
    /// From the moment that an all-gather can start until its data is there.
    Gather,
    /// The same of a reduce-scatter, and of the all-reduce between replicas.
    Reduce,
    /// Time in which the computation waits for a collective: communication that nothing hides.
    Wait,
}

/// A piece of work; times in microseconds since the timeline's origin.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    pub lane: Lane,
    pub name: String,
    pub start_us: f64,
    pub end_us: f64,
}

/// Collects the spans of a step.
#[derive(Debug)]
pub struct Timeline {
    device: Device,
    origin: Rc<Event>,
    spans: Vec<(Lane, String, Rc<Event>, Rc<Event>)>,
    /// Collectives under way.
    open: Vec<(Lane, String, Rc<Event>)>,
    /// The segment under way, or why it could not be marked.
    segment: Option<Result<(Segment, Rc<Event>), TorchError>>,
}

impl Timeline {
    /// Its origin is this moment of the current stream.
    pub fn start(device: Device) -> Result<Self, TorchError> {
        Ok(Timeline { device, origin: now(device)?, spans: vec![], open: vec![], segment: None })
    }

    /// This moment of the current stream.
    pub fn mark(&self) -> Result<Rc<Event>, TorchError> {
        now(self.device)
    }

    /// A span from `start` to now, in which the segment under way ends too.
    pub fn span(&mut self, lane: Lane, name: String, start: Rc<Event>) -> Result<(), TorchError> {
        let end = self.mark()?;
        if lane == Lane::Compute {
            self.end_segment(Rc::clone(&end))?;
        }
        self.spans.push((lane, name, start, end));
        Ok(())
    }

    /// A segment starts, and the one before it ends.
    pub fn segment(&mut self, segment: Segment) {
        let start = self.mark().and_then(|now| self.end_segment(Rc::clone(&now)).map(|()| (segment, now)));
        self.segment = Some(start);
    }

    fn end_segment(&mut self, end: Rc<Event>) -> Result<(), TorchError> {
        if let Some((segment, start)) = self.segment.take().transpose()? {
            self.spans.push((Lane::Compute, segment.name().to_string(), start, end));
        }
        Ok(())
    }

    /// A collective starts; [`Timeline::close`] ends its span.
    pub fn open(&mut self, lane: Lane, name: &str) -> Result<(), TorchError> {
        let start = self.mark()?;
        self.open.push((lane, name.to_string(), start));
        Ok(())
    }

    /// Ends the span of the collective that was opened first under that name; nothing if there is none.
    pub fn close(&mut self, lane: Lane, name: &str) -> Result<(), TorchError> {
        match self.open.iter().position(|(l, n, _)| *l == lane && n == name) {
            None => Ok(()),
            Some(i) => {
                let (lane, name, start) = self.open.remove(i);
                self.span(lane, name, start)
            }
        }
    }

    /// The spans, in the order in which the host came to their ends. Waits for the device.
    pub fn finish(self) -> Result<Vec<Span>, TorchError> {
        self.mark()?.synchronize()?;
        let time = |event: &Event| -> Result<f64, TorchError> {
            event.synchronize()?;
            Ok(self.origin.elapsed_ms(event)? * 1e3)
        };
        let mut spans = Vec::new();
        for (lane, name, start, end) in &self.spans {
            spans.push(Span { lane: *lane, name: name.clone(), start_us: time(start)?, end_us: time(end)? });
        }
        Ok(spans)
    }
}

fn now(device: Device) -> Result<Rc<Event>, TorchError> {
    let mut event = Event::with_timing(device)?;
    event.record(&Stream::current(device)?)?;
    Ok(Rc::new(event))
}
