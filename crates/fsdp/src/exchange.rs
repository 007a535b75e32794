//! The process groups for the trainer: small values between all ranks, for which the host waits; their end.

use std::path::Path;

use fsdp_comm::ReduceOp;
use fsdp_torch_ext::accelerator;
use tch::{Device, Kind, Tensor};

use crate::pass::to_device;
use crate::{Engine, EngineError};

impl Engine {
    /// Whether `value` holds on any rank. Collective.
    pub fn any_rank(&mut self, value: bool) -> Result<bool, EngineError> {
        let flag = to_device(&[i64::from(value)], self.device)?;
        self.groups.world().all_reduce(&flag, ReduceOp::Max)?;
        Ok(flag.f_int64_value(&[0])? != 0)
    }

    /// The values of all ranks, as many from each, in order of rank. Collective.
    pub fn all_gather(&mut self, values: &[i64]) -> Result<Vec<i64>, EngineError> {
        let input = to_device(values, self.device)?;
        let pg = self.groups.world();
        let out = Tensor::f_zeros([(values.len() * pg.world_size()) as i64], (Kind::Int64, self.device))?;
        pg.all_gather_into_tensor(&out, &input)?;
        Ok(Vec::try_from(out)?)
    }

    /// Returns when all ranks have called it.
    pub fn barrier(&mut self) -> Result<(), EngineError> {
        Ok(self.groups.world().barrier()?)
    }

    /// Ends the process groups in good order. All ranks call it when the run has succeeded.
    pub fn close(self) -> Result<(), EngineError> {
        Ok(self.groups.close()?)
    }

    /// For a run that fails: what this rank's process groups did last.
    pub fn write_flight_records(&self, dir: &Path, stem: &str) -> Result<(), EngineError> {
        Ok(self.groups.write_flight_records(dir, stem)?)
    }

    /// The most memory that this rank has had so far: of the process on CPUs, on a GPU what libtorch's allocator gave out
    /// and what the process groups have beside it.
    pub(crate) fn peak_memory_bytes(&mut self) -> Result<u64, EngineError> {
        match self.device {
            Device::Cpu => Ok(peak_resident_bytes()),
            device => Ok(accelerator::memory_stats(device)?.peak_allocated_bytes + self.groups.num_registered_bytes()),
        }
    }
}

/// Largest resident set of this process so far, in bytes (`VmHWM`); 0 if the system does not tell.
fn peak_resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}
