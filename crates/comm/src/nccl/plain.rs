//! Collectives on plain tensors, with edges both ways: the lane follows the caller's stream, which then follows the lane.

use std::ffi::c_void;

use fsdp_control::progress::Op;
use tch::{Kind, Tensor};

use super::NcclGroup;
use super::lane::{Lane, Mark};
use super::library::{ncclDataType_t, ncclRedOp_t};
use crate::check::{check_tensor, num_bytes};
use crate::{Call, CommError, ReduceOp, Work};

/// A collective that was started and not waited for.
#[derive(Debug)]
pub(super) struct Started {
    number: u64,
    /// After it.
    done: Mark,
    /// Held until then.
    _tensors: [Tensor; 2],
}

impl NcclGroup {
    pub(crate) fn start_all_reduce(&mut self, tensor: &Tensor, op: ReduceOp) -> Result<Work, CommError> {
        check_tensor(Op::AllReduce, tensor, tensor.numel(), tensor.kind(), self.device)?;
        let call = self.calls.start(Op::AllReduce, Some(tensor.kind()), num_bytes(tensor), op as u8, "");
        match op {
            ReduceOp::Max if tensor.kind() != Kind::Int64 => self.start_max(tensor, &call),
            _ => {
                let (data, numel, kind) = (tensor.data_ptr(), tensor.numel(), nccl_kind(tensor.kind()));
                let op = if op == ReduceOp::Sum { ncclRedOp_t::ncclSum } else { ncclRedOp_t::ncclMax };
                self.lane.follow_current(&mut self.passing)?;
                self.issue("ncclAllReduce", &call, |nccl, raw, stream| {
                    // SAFETY: a contiguous tensor of so many elements, which is held until the lane is done with it; the
                    // communicator is alive and the stream is the lane's.
                    unsafe { (nccl.ncclAllReduce)(data, data, numel, kind, op, raw, stream) }
                })?;
                self.start([tensor, tensor])
            }
        }
    }

    /// NCCL's maximum forgets NaN, as the device's does. So all values are gathered, and libtorch, whose maximum keeps it,
    /// combines them. Maxima are of few elements.
    fn start_max(&mut self, tensor: &Tensor, call: &Call) -> Result<Work, CommError> {
        let world_size = self.world_size() as i64;
        self.lane.follow_current(&mut self.passing)?;
        let _in_lane = self.lane.enter()?;
        let all = Tensor::f_empty([world_size, tensor.numel() as i64], (tensor.kind(), self.device))?; // [W, n]
        self.issue_all_gather(&all, tensor, call)?;
        let mut flat = tensor.f_view([-1])?; // [n]
        flat.f_copy_(&all.f_amax([0i64].as_slice(), false)?)?;
        self.start([tensor, &all])
    }

    pub(crate) fn wait_work(&mut self, work: Work) -> Result<(), CommError> {
        self.communicator.check()?;
        let current = Lane::current(self.device)?;
        // The lane is in order, so what was started before is done too.
        while let Some(started) = self.started.pop_front_if(|started| started.number <= work.number) {
            if started.number == work.number {
                current.wait(&started.done)?;
            }
            self.spare.push(started.done);
        }
        Ok(())
    }

    pub(crate) fn broadcast(&mut self, tensor: &Tensor, root: usize) -> Result<(), CommError> {
        assert!(root < self.world_size(), "root {root} of {}", self.world_size());
        check_tensor(Op::Broadcast, tensor, tensor.numel(), tensor.kind(), self.device)?;
        let call = self.calls.start(Op::Broadcast, Some(tensor.kind()), num_bytes(tensor), root as u8, "");
        let (data, numel, kind) = (tensor.data_ptr(), tensor.numel(), nccl_kind(tensor.kind()));
        self.lane.follow_current(&mut self.passing)?;
        self.issue("ncclBroadcast", &call, |nccl, raw, stream| {
            // SAFETY: as in `start_all_reduce`.
            unsafe { (nccl.ncclBroadcast)(data, data, numel, kind, root as i32, raw, stream) }
        })?;
        let work = self.start([tensor, tensor])?;
        self.wait_work(work)
    }

    pub(crate) fn all_gather_into_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::AllGather, input, input.numel(), input.kind(), self.device)?;
        check_tensor(Op::AllGather, out, input.numel() * self.world_size(), input.kind(), self.device)?;
        let call = self.calls.start(Op::AllGather, Some(input.kind()), num_bytes(out), 0, "");
        self.lane.follow_current(&mut self.passing)?;
        self.issue_all_gather(out, input, &call)?;
        let work = self.start([out, input])?;
        self.wait_work(work)
    }

    /// The tensors are known to fit.
    fn issue_all_gather(&mut self, out: &Tensor, input: &Tensor, call: &Call) -> Result<(), CommError> {
        let (from, to): (*const c_void, _) = (input.data_ptr(), out.data_ptr());
        let (numel, kind) = (input.numel(), nccl_kind(input.kind()));
        self.copy_alone(out, input)?;
        self.issue("ncclAllGather", call, |nccl, raw, stream| {
            // SAFETY: as in `start_all_reduce`, for both tensors.
            unsafe { (nccl.ncclAllGather)(from, to, numel, kind, raw, stream) }
        })
    }

    pub(crate) fn reduce_scatter_tensor(&mut self, out: &Tensor, input: &Tensor) -> Result<(), CommError> {
        check_tensor(Op::ReduceScatter, out, out.numel(), out.kind(), self.device)?;
        check_tensor(Op::ReduceScatter, input, out.numel() * self.world_size(), out.kind(), self.device)?;
        let call = self.calls.start(Op::ReduceScatter, Some(input.kind()), num_bytes(input), 0, "");
        let (from, to): (*const c_void, _) = (input.data_ptr(), out.data_ptr());
        let (numel, kind) = (out.numel(), nccl_kind(out.kind()));
        self.lane.follow_current(&mut self.passing)?;
        self.copy_alone(out, input)?;
        self.issue("ncclReduceScatter", &call, |nccl, raw, stream| {
            // SAFETY: as in `start_all_reduce`, for both tensors.
            unsafe { (nccl.ncclReduceScatter)(from, to, numel, kind, ncclRedOp_t::ncclSum, raw, stream) }
        })?;
        let work = self.start([out, input])?;
        self.wait_work(work)
    }

    /// The only call in which the host waits for the device.
    pub(crate) fn barrier(&mut self) -> Result<(), CommError> {
        let call = self.calls.start(Op::Barrier, None, 0, 0, "");
        let data = self.barrier.data_ptr();
        self.lane.follow_current(&mut self.passing)?;
        self.issue("ncclAllReduce", &call, |nccl, raw, stream| {
            let (kind, sum) = (ncclDataType_t::ncclFloat32, ncclRedOp_t::ncclSum);
            // SAFETY: the tensor has one f32 and lives as long as the group.
            unsafe { (nccl.ncclAllReduce)(data, data, 1, kind, sum, raw, stream) }
        })?;
        self.passing.record(&self.lane)?;
        if let Some(progress) = self.calls.progress() {
            progress.enter(call.op, call.seq, &call.unit, call.num_bytes);
        }
        self.passing.synchronize()?;
        // An abort lets the device go on as if all were done.
        self.communicator.check()?;
        if let Some(progress) = self.calls.progress() {
            progress.leave();
        }
        Ok(())
    }

    /// Marks the end of what was just issued. `tensors` are held until it is waited for.
    fn start(&mut self, tensors: [&Tensor; 2]) -> Result<Work, CommError> {
        let mut done = match self.spare.pop() {
            Some(mark) => mark,
            None => Mark::new(self.device)?,
        };
        done.record(&self.lane)?;
        self.last_number += 1;
        let number = self.last_number;
        self.started.push_back(Started { number, done, _tensors: tensors.map(Tensor::shallow_clone) });
        Ok(Work { number })
    }
}

/// What NCCL calls a kind that collectives know.
pub(super) fn nccl_kind(kind: Kind) -> ncclDataType_t {
    match kind {
        Kind::Float => ncclDataType_t::ncclFloat32,
        Kind::Double => ncclDataType_t::ncclFloat64,
        Kind::BFloat16 => ncclDataType_t::ncclBfloat16,
        Kind::Half => ncclDataType_t::ncclFloat16,
        Kind::Int64 => ncclDataType_t::ncclInt64,
        other => panic!("a segment of {other:?}"),
    }
}
