//! Tensors on a device over a host back end: every collective goes through copies on the host. It is for what NCCL cannot
//! do (two ranks on one GPU, a GPU without NCCL), and for checking NCCL; it hides nothing behind compute.
//!
//! A buffer is memory on the device beside one of the host. Contents are copied in the current stream, and the host waits
//! for each copy: what the stream was given before is in it, and what it is given afterwards sees it.

use std::collections::VecDeque;
use std::path::Path;

use fsdp_control::progress::Op;
use fsdp_control::store::Store;
use tch::{Device, Kind, Tensor};

use crate::check::{check_out, check_segments, check_tensor};
use crate::memory::Memory;
use crate::sum::element_bytes;
use crate::{CommError, GatherBuffer, ProcessGroup, ReduceBuffer, ReduceOp, Segment, Work};

/// A host group with its tensors on a device.
#[derive(Debug)]
pub struct StagedGroup {
    host: Box<ProcessGroup>,
    device: Device,
    /// The all-reduces that were started and not waited for, in order.
    pending: VecDeque<Pending>,
}

/// The staged side of a [`GatherBuffer`].
#[derive(Debug)]
pub struct StagedGatherBuffer {
    host: Box<GatherBuffer>,
    memory: Memory,
    /// Of the present use, once it is started.
    segments: Vec<Segment>,
}

/// The staged side of a [`ReduceBuffer`].
#[derive(Debug)]
pub struct StagedReduceBuffer {
    host: Box<ReduceBuffer>,
    memory: Memory,
    /// Of the present use, once it is started.
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Pending {
    number: u64,
    tensor: Tensor,
    on_host: Tensor,
}

impl StagedGatherBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        self.memory.view(kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }
}

impl StagedReduceBuffer {
    pub(crate) fn view(&self, kind: Kind, offset_bytes: usize, numel: usize) -> Tensor {
        self.memory.view(kind, offset_bytes, numel)
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.memory.len_bytes()
    }
}

impl StagedGroup {
    pub(crate) fn new(host: ProcessGroup, device: Device) -> Self {
        StagedGroup { host: Box::new(host), device, pending: VecDeque::new() }
    }

    pub(crate) fn split(&mut self, store: &mut Store, color: usize, name: &str) -> Result<Self, CommError> {
        Ok(Self::new(self.host.split(store, color, name)?, self.device))
    }

    pub(crate) fn close(self) -> Result<(), CommError> {
        self.host.close()
    }

    pub(crate) fn rank(&self) -> usize {
        self.host.rank()
    }

    pub(crate) fn world_size(&self) -> usize {
        self.host.world_size()
    }

    pub(crate) fn device(&self) -> Device {
        self.device
    }

    pub(crate) fn check(&self) -> Result<(), CommError> {
        self.host.check()
    }

    pub(crate) fn write_flight_record(&self, path: &Path) -> Result<(), CommError> {
        self.host.write_flight_record(path)
    }

    pub(crate) fn barrier(&mut self) -> Result<(), CommError> {
        self.host.barrier()
    }

    pub(crate) fn new_gather_buffer(&mut self, name: &str, len_bytes: usize) -> Result<StagedGatherBuffer, CommError> {
        let host = Box::new(self.host.new_gather_buffer(name, len_bytes)?);
        Ok(StagedGatherBuffer { host, memory: Memory::zeros(len_bytes, self.device)?, segments: Vec::new() })
    }

    pub(crate) fn new_reduce_buffer(&mut self, name: &str, len_bytes: usize) -> Result<StagedReduceBuffer, CommError> {
        let host = Box::new(self.host.new_reduce_buffer(name, len_bytes)?);
        Ok(StagedReduceBuffer { host, memory: Memory::zeros(len_bytes, self.device)?, segments: Vec::new() })
    }

    pub(crate) fn try_begin_write(&mut self, buffer: &mut StagedGatherBuffer) -> Result<bool, CommError> {
        self.host.try_begin_write(&mut buffer.host)
    }

    pub(crate) fn begin_write(&mut self, buffer: &mut StagedGatherBuffer, unit: &str) -> Result<(), CommError> {
        self.host.begin_write(&mut buffer.host, unit)
    }

    pub(crate) fn start_all_gather(
        &mut self,
        buffer: &mut StagedGatherBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        check_segments(buffer.len_bytes(), segments, self.world_size());
        for segment in segments {
            let numel = segment.numel / self.world_size();
            let offset_bytes = segment.offset_bytes + self.rank() * numel * element_bytes(segment.kind);
            buffer.host.view(segment.kind, offset_bytes, numel).f_copy_(&buffer.memory.view(
                segment.kind,
                offset_bytes,
                numel,
            ))?;
        }
        buffer.segments = segments.to_vec();
        self.host.start_all_gather(&mut buffer.host, segments, unit)
    }

    pub(crate) fn wait_all_gather(&mut self, buffer: &mut StagedGatherBuffer) -> Result<(), CommError> {
        self.host.wait_all_gather(&mut buffer.host)?;
        for &Segment { kind, offset_bytes, numel } in &buffer.segments {
            let whole = buffer.host.view(kind, offset_bytes, numel);
            buffer.memory.view(kind, offset_bytes, numel).f_copy_(&whole)?;
        }
        Ok(())
    }

    pub(crate) fn release(&mut self, buffer: &mut StagedGatherBuffer) -> Result<(), CommError> {
        self.host.release(&mut buffer.host)
    }

    pub(crate) fn begin_reduce(&mut self, buffer: &mut StagedReduceBuffer, unit: &str) -> Result<(), CommError> {
        self.host.begin_reduce(&mut buffer.host, unit)
    }

    pub(crate) fn start_reduce_scatter(
        &mut self,
        buffer: &mut StagedReduceBuffer,
        segments: &[Segment],
        unit: &str,
    ) -> Result<(), CommError> {
        check_segments(buffer.len_bytes(), segments, self.world_size());
        for &Segment { kind, offset_bytes, numel } in segments {
            let contents = buffer.memory.view(kind, offset_bytes, numel);
            buffer.host.view(kind, offset_bytes, numel).f_copy_(&contents)?;
        }
        buffer.segments = segments.to_vec();
        self.host.start_reduce_scatter(&mut buffer.host, segments, unit)
    }

    pub(crate) fn wait_reduce_scatter(
        &mut self,
        buffer: &mut StagedReduceBuffer,
        out: &[&Tensor],
        accumulate: bool,
    ) -> Result<(), CommError> {
        assert_eq!(out.len(), buffer.segments.len(), "one output for each segment");
        let mut sums = Vec::new();
        for (out, segment) in out.iter().zip(&buffer.segments) {
            let numel = segment.numel / self.world_size();
            check_out(out, numel, self.device);
            sums.push(Tensor::f_empty([numel as i64], (Kind::Float, Device::Cpu))?);
        }
        self.host.wait_reduce_scatter(&mut buffer.host, &sums.iter().collect::<Vec<_>>(), false)?;
        for (out, sum) in out.iter().zip(&sums) {
            let mut out = out.shallow_clone();
            if accumulate {
                let _ = out.f_add_(&sum.f_to_device(self.device)?)?;
            } else {
                out.f_copy_(sum)?;
            }
        }
        Ok(())
    }

    pub(crate) fn start_all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        check_tensor(Op::AllReduce, tensor, tensor.numel(), tensor.kind(), self.device)?;
        let on_host = self.to_host(tensor)?;
        let work = self.host.start_all_reduce(&on_host, op)?;
        self.pending.push_back(Pending { number: work.number, tensor: tensor.shallow_clone(), on_host });
        Ok(work)
    }

    pub(crate) fn wait_work(&mut self, work: Work) -> Result<(), CommError> {
        let number = work.number;
        self.host.wait(work)?;
        while let Some(mut done) = self.pending.pop_front_if(|pending| pending.number <= number) {
            done.tensor.f_copy_(&done.on_host)?;
        }
        Ok(())
    }

    pub(crate) fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        check_tensor(Op::Broadcast, tensor, tensor.numel(), tensor.kind(), self.device)?;
        let on_host = self.to_host(tensor)?;
        self.host.broadcast(&on_host, root)?;
        Ok(tensor.shallow_clone().f_copy_(&on_host)?)
    }

    pub(crate) fn all_gather_into_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::AllGather, input, input.numel(), input.kind(), self.device)?;
        check_tensor(Op::AllGather, out, input.numel() * self.world_size(), input.kind(), self.device)?;
        let out_on_host = Tensor::f_empty(out.size(), (out.kind(), Device::Cpu))?;
        self.host.all_gather_into_tensor(&out_on_host, &self.to_host(input)?)?;
        Ok(out.shallow_clone().f_copy_(&out_on_host)?)
    }

    pub(crate) fn reduce_scatter_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::ReduceScatter, out, out.numel(), out.kind(), self.device)?;
        check_tensor(Op::ReduceScatter, input, out.numel() * self.world_size(), out.kind(), self.device)?;
        let out_on_host = Tensor::f_empty(out.size(), (out.kind(), Device::Cpu))?;
        self.host.reduce_scatter_tensor(&out_on_host, &self.to_host(input)?)?;
        Ok(out.shallow_clone().f_copy_(&out_on_host)?)
    }

    /// A copy, also where the tensor is on the host already.
    fn to_host(&self, tensor: &Tensor) -> Result<Tensor, CommError> {
        let mut copy = Tensor::f_empty(tensor.size(), (tensor.kind(), Device::Cpu))?;
        copy.f_copy_(tensor)?;
        Ok(copy)
    }
}
