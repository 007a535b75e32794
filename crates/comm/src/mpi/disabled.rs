//! The types of a build without MPI: there are no values of them.

use std::convert::Infallible;
use std::path::Path;
use std::time::Duration;

use fsdp_control::progress::ProgressHandle;
use fsdp_control::store::Store;
use tch::{Kind, Tensor};

use crate::{CommError, ReduceOp, Segment, Work};

/// There is none: `connect` fails.
#[derive(Debug)]
pub struct MpiGroup(Infallible);

/// There is none, as there is no group.
#[derive(Debug)]
pub struct MpiGatherBuffer(Infallible);

/// There is none, as there is no group.
#[derive(Debug)]
pub struct MpiReduceBuffer(Infallible);

/// Does nothing: there is no MPI job.
pub fn abort_job(_: u8) {}

impl MpiGatherBuffer {
    pub(crate) fn view(&self, _: Kind, _: usize, _: usize) -> Tensor {
        match self.0 {}
    }

    pub(crate) fn len_bytes(&self) -> usize {
        match self.0 {}
    }
}

impl MpiReduceBuffer {
    pub(crate) fn view(&self, _: Kind, _: usize, _: usize) -> Tensor {
        match self.0 {}
    }

    pub(crate) fn len_bytes(&self) -> usize {
        match self.0 {}
    }
}

impl MpiGroup {
    pub(crate) fn connect(
        _: &mut Store,
        _: usize,
        _: usize,
        _: Duration,
        _: Option<ProgressHandle>,
    ) -> Result<Self, CommError> {
        let missing = "this binary was built without it; build it again with `--features mpi` (needs an MPI library)";
        Err(CommError::Unavailable { backend: "mpi", missing: missing.into() })
    }

    pub(crate) fn split(&mut self, _: &mut Store, _: usize, _: &str) -> Result<Self, CommError> {
        match self.0 {}
    }

    pub(crate) fn close(self) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn rank(&self) -> usize {
        match self.0 {}
    }

    pub(crate) fn world_size(&self) -> usize {
        match self.0 {}
    }

    pub(crate) fn write_flight_record(&self, _: &Path) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn barrier(&mut self) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn new_gather_buffer(&mut self, _: &str, _: usize) -> Result<MpiGatherBuffer, CommError> {
        match self.0 {}
    }

    pub(crate) fn new_reduce_buffer(&mut self, _: &str, _: usize) -> Result<MpiReduceBuffer, CommError> {
        match self.0 {}
    }

    pub(crate) fn try_begin_write(&mut self, _: &mut MpiGatherBuffer) -> Result<bool, CommError> {
        match self.0 {}
    }

    pub(crate) fn begin_write(&mut self, _: &mut MpiGatherBuffer, _: &str) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn start_all_gather(
        &mut self,
        _: &mut MpiGatherBuffer,
        _: &[Segment],
        _: &str,
    ) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn wait_all_gather(&mut self, _: &mut MpiGatherBuffer) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn release(&mut self, _: &mut MpiGatherBuffer) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn begin_reduce(&mut self, _: &mut MpiReduceBuffer, _: &str) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn start_reduce_scatter(
        &mut self,
        _: &mut MpiReduceBuffer,
        _: &[Segment],
        _: &str,
    ) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn wait_reduce_scatter(
        &mut self,
        _: &mut MpiReduceBuffer,
        _: &[&Tensor],
        _: bool,
    ) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn start_all_reduce(&mut self, _: &Tensor, _: ReduceOp) -> Result<Work, CommError> {
        match self.0 {}
    }

    pub(crate) fn wait_work(&mut self, _: Work) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn broadcast(&mut self, _: &Tensor, _: usize) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn all_gather_into_tensor(&mut self, _: &Tensor, _: &Tensor) -> Result<(), CommError> {
        match self.0 {}
    }

    pub(crate) fn reduce_scatter_tensor(&mut self, _: &Tensor, _: &Tensor) -> Result<(), CommError> {
        match self.0 {}
    }
}
