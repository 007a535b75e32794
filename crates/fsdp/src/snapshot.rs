//! The training state of one moment, apart from the engine: what a checkpoint is written from, on any thread.

use fsdp_torch_ext::{self as ext, pinned};
use tch::{Device, Kind, Tensor};

use crate::state::{Piece, StateKind, on_host};
use crate::{Engine, EngineError};

/// This rank's flat fp32 state tensors, and where its pieces of parameters are in them.
#[derive(Debug)]
pub struct Snapshot {
    pieces: Vec<Piece>,
    /// In the order of [`StateKind::ALL`].
    tensors: [Tensor; 3],
}

impl Snapshot {
    /// This rank's pieces of parameters, in the order in which [`Snapshot::read`] gives them.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Gives each piece with its elements in the state `kind` to `f`.
    pub fn read<E: From<EngineError>>(
        &self,
        kind: StateKind,
        mut f: impl FnMut(&Piece, &[f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        for piece in &self.pieces {
            let here = on_host(&piece.view(&self.tensors[kind as usize])?)?;
            ext::with_f32_slice(&here, |elements| f(piece, elements)).map_err(EngineError::from)??;
        }
        Ok(())
    }
}

impl Engine {
    /// The state itself, not a copy: it is one moment's only until the next step starts. Waits for the device.
    pub fn live_state(&self) -> Result<Snapshot, EngineError> {
        self.synchronize()?;
        let tensors = StateKind::ALL.map(|kind| self.state(kind).shallow_clone());
        Ok(Snapshot { pieces: self.pieces.clone(), tensors })
    }

    /// A copy of the state in the host's memory, in that of `reuse` where there is one. Waits for the device, and for the
    /// copy.
    pub fn snapshot(&self, reuse: Option<Snapshot>) -> Result<Snapshot, EngineError> {
        self.synchronize()?;
        let mut copy = match reuse {
            Some(copy) => copy,
            None => {
                // All three have the same number of elements.
                let size = self.state(StateKind::Param).size();
                let empty = || match self.device {
                    Device::Cpu => Ok::<_, EngineError>(Tensor::f_empty(&size, (Kind::Float, Device::Cpu))?),
                    _ => Ok(pinned::empty(&size, Kind::Float)?),
                };
                Snapshot { pieces: self.pieces.clone(), tensors: [empty()?, empty()?, empty()?] }
            }
        };
        for (kind, to) in StateKind::ALL.into_iter().zip(&mut copy.tensors) {
            to.f_copy_(self.state(kind))?;
        }
        Ok(copy)
    }
}
