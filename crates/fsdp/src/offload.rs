//! Optimizer state in the host's memory. It passes through two sets of buffers on the device, chunk by chunk: while one
//! chunk is updated, the next one comes and the last one goes, each way on a stream of its own.
//!
//! ```text
//! to device   | in 0 | in 1 |      | in 2 |      | in 3 |
//! compute            | up 0 | up 1 |      | up 2 |
//! to host                   | out 0| out 1|      | out 2|
//! ```
//!
//! Chunk i uses set i % 2; its way in waits for the way out of the set's last chunk. That orders steps too: a set's last
//! way out in one step comes behind those of all earlier chunks, and before the way in of the next step's first ones.

use std::ops::Range;

use fsdp_plan::replay::OFFLOAD_CHUNK_NUMEL;
use fsdp_torch_ext::{Event, Stream, pinned};
use tch::{Device, Kind, Tensor};

use crate::EngineError;

/// A run of elements of one class that is on the device at a time.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    pub flat: Range<usize>,
    pub decays: bool,
}

/// Two sets of buffers, and the streams to and from them.
#[derive(Debug)]
pub struct Offload {
    pub chunks: Vec<Chunk>,
    sets: [BufferSet; 2],
    to_device: Stream,
    to_host: Stream,
}

/// Buffers for one chunk of each tensor that is offloaded, and where its work is.
#[derive(Debug)]
struct BufferSet {
    buffers: Vec<Tensor>, // f32 [chunk], on the device
    arrived: Event,
    updated: Event,
    left: Event,
}

impl Offload {
    /// For `num_tensors` tensors of `numel` elements, of which `ranges` are (start, length, decays).
    pub fn new(
        ranges: &[(usize, usize, bool)],
        numel: usize,
        num_tensors: usize,
        device: Device,
    ) -> Result<Self, EngineError> {
        let mut chunks = Vec::new();
        for &(start, len, decays) in ranges {
            for at in (start..start + len).step_by(OFFLOAD_CHUNK_NUMEL) {
                chunks.push(Chunk { flat: at..(at + OFFLOAD_CHUNK_NUMEL).min(start + len), decays });
            }
        }
        let chunk_numel = numel.min(OFFLOAD_CHUNK_NUMEL) as i64;
        let set = || -> Result<BufferSet, EngineError> {
            let buffer = |_| Tensor::f_zeros([chunk_numel], (Kind::Float, device));
            Ok(BufferSet {
                buffers: (0..num_tensors).map(buffer).collect::<Result<_, _>>()?,
                arrived: Event::new(device)?,
                updated: Event::new(device)?,
                left: Event::new(device)?,
            })
        };
        Ok(Offload {
            chunks,
            sets: [set()?, set()?],
            to_device: Stream::new_from_pool(device, false)?,
            to_host: Stream::new_from_pool(device, false)?,
        })
    }

    /// Brings the first `num_tensors` of `hosts` (f32 `[n]`, pinned) through the device: `update` changes each chunk's
    /// buffers, in that order, on the current stream. The host waits for nothing.
    pub fn pass(
        &mut self,
        hosts: &[&Tensor],
        mut update: impl FnMut(&Chunk, &[Tensor]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let compute = Stream::current(self.to_device.device())?;
        for next in 0..=self.chunks.len() {
            if next < self.chunks.len() {
                self.bring(next, hosts)?;
            }
            let Some(i) = next.checked_sub(1) else { continue };
            let buffers = self.buffers(i)?;
            compute.wait(&self.sets[i % 2].arrived)?;
            update(&self.chunks[i], &buffers)?;
            self.sets[i % 2].updated.record(&compute)?;
            self.take_back(i, &buffers, hosts)?;
        }
        Ok(())
    }

    fn bring(&mut self, i: usize, hosts: &[&Tensor]) -> Result<(), EngineError> {
        let _on = self.to_device.enter()?;
        self.to_device.wait(&self.sets[i % 2].left)?;
        for (mut buffer, host) in self.buffers(i)?.into_iter().zip(hosts) {
            pinned::copy_non_blocking(&mut buffer, &self.of_host(i, host)?)?;
        }
        Ok(self.sets[i % 2].arrived.record(&self.to_device)?)
    }

    fn take_back(&mut self, i: usize, buffers: &[Tensor], hosts: &[&Tensor]) -> Result<(), EngineError> {
        let _on = self.to_host.enter()?;
        self.to_host.wait(&self.sets[i % 2].updated)?;
        for (buffer, host) in buffers.iter().zip(hosts) {
            pinned::copy_non_blocking(&mut self.of_host(i, host)?, buffer)?;
        }
        Ok(self.sets[i % 2].left.record(&self.to_host)?)
    }

    fn buffers(&self, i: usize) -> Result<Vec<Tensor>, EngineError> {
        let len = self.chunks[i].flat.len() as i64;
        self.sets[i % 2].buffers.iter().map(|buffer| Ok(buffer.f_narrow(0, 0, len)?)).collect()
    }

    fn of_host(&self, i: usize, host: &Tensor) -> Result<Tensor, EngineError> {
        let flat = &self.chunks[i].flat;
        Ok(host.f_narrow(0, flat.start as i64, flat.len() as i64)?)
    }

    /// Bytes of the buffers on the device.
    pub fn allocated_bytes(&self) -> u64 {
        self.sets.iter().flat_map(|set| &set.buffers).map(|buffer| (buffer.numel() * 4) as u64).sum()
    }
}
