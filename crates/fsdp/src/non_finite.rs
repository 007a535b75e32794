//! Where a NaN or infinity first appears, for the person who has to find its cause.

use std::fmt;

/// The first place of the model, in forward order, that is not finite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NonFinite {
    /// Weights are not finite already.
    Weight { rank: usize, unit: String, param: String },
    /// Weights are finite, the output of a unit's forward pass is not.
    Output { rank: usize, unit: String },
    /// Only gradients are not finite; the one of the unit nearest to the loss is named.
    Gradient { rank: usize, unit: String, param: String },
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NonFinite::Weight { rank, unit, param } => write!(
                f,
                "loss is not finite: rank {rank} holds NaN or infinity in the weight {param} of unit {unit}: \
                 the last updates overflowed (lower [optimizer] lr?), or the model's file holds them"
            ),
            NonFinite::Output { rank, unit } => {
                write!(
                    f,
                    "loss is not finite: on rank {rank} the output of unit {unit} is the first that is NaN or infinite"
                )
            }
            NonFinite::Gradient { rank, unit, param } => {
                write!(f, "gradient is not finite: rank {rank}, unit {unit}, parameter {param}")
            }
        }
    }
}
