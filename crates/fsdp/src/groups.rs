//! The process groups of a job: all ranks, and where there are replicas, the ranks that share a unit's shards and those
//! that hold the same shard.

use std::path::Path;

use fsdp_comm::{CommError, ProcessGroup};
use fsdp_control::store::Store;

/// The groups that a rank belongs to. Rank r has shard `r % num_shards` of replica `r / num_shards`: neighbouring ranks,
/// which are on one node, share the traffic of parameters; gradients alone cross to the others.
#[derive(Debug)]
pub struct Groups {
    world: ProcessGroup,
    mesh: Option<Mesh>,
}

#[derive(Debug)]
struct Mesh {
    /// The ranks that a unit is sharded over.
    shards: ProcessGroup,
    /// The ranks with the same shard, one of each replica.
    replicas: ProcessGroup,
}

impl Groups {
    /// Splits the world into replicas of `num_shards` ranks each. Collective.
    ///
    /// # Panics
    /// `num_shards` does not divide the number of ranks.
    pub fn new(mut world: ProcessGroup, store: &mut Store, num_shards: usize) -> Result<Self, CommError> {
        let (rank, world_size) = (world.rank(), world.world_size());
        assert!(world_size.is_multiple_of(num_shards), "{world_size} ranks in groups of {num_shards}");
        if num_shards == world_size {
            return Ok(Groups { world, mesh: None });
        }
        let shards = world.split(store, rank / num_shards, "shards")?;
        let replicas = world.split(store, rank % num_shards, "replicas")?;
        Ok(Groups { world, mesh: Some(Mesh { shards, replicas }) })
    }

    /// Lets each group carry something, so that what a back end allocates at its first use is there before training.
    pub fn warm_up(&mut self) -> Result<(), CommError> {
        self.world.barrier()?;
        match &mut self.mesh {
            Some(mesh) => mesh.shards.barrier().and_then(|()| mesh.replicas.barrier()),
            None => Ok(()),
        }
    }

    pub fn world(&mut self) -> &mut ProcessGroup {
        &mut self.world
    }

    /// The ranks that a unit is sharded over.
    pub fn shards(&mut self) -> &mut ProcessGroup {
        match &mut self.mesh {
            Some(mesh) => &mut mesh.shards,
            None => &mut self.world,
        }
    }

    /// Whether the device's results can be trusted: a back end that gave up lets the device go on as if all were done.
    pub fn check(&self) -> Result<(), CommError> {
        self.world.check()
    }

    /// Ends all groups in good order. All ranks call it when the run has succeeded.
    pub fn close(self) -> Result<(), CommError> {
        if let Some(Mesh { shards, replicas }) = self.mesh {
            replicas.close()?;
            shards.close()?;
        }
        self.world.close()
    }

    /// Writes what is known of each group's last collectives to `<stem>.jsonl`, `<stem>-shards.jsonl` and so on.
    pub fn write_flight_records(&self, dir: &Path, stem: &str) -> Result<(), CommError> {
        self.world.write_flight_record(&dir.join(format!("{stem}.jsonl")))?;
        if let Some(Mesh { shards, replicas }) = &self.mesh {
            shards.write_flight_record(&dir.join(format!("{stem}-shards.jsonl")))?;
            replicas.write_flight_record(&dir.join(format!("{stem}-replicas.jsonl")))?;
        }
        Ok(())
    }

    /// Bytes on the device that the groups have beside libtorch's allocator.
    pub fn num_registered_bytes(&self) -> u64 {
        let of_mesh = |mesh: &Mesh| mesh.shards.num_registered_bytes() + mesh.replicas.num_registered_bytes();
        self.world.num_registered_bytes() + self.mesh.as_ref().map_or(0, of_mesh)
    }

    /// The ranks with the same shard; `None` without replicas.
    pub fn replicas(&mut self) -> Option<&mut ProcessGroup> {
        self.mesh.as_mut().map(|mesh| &mut mesh.replicas)
    }
}
