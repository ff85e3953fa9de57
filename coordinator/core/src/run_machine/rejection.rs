//! Inputs that are turned away.

use super::Observed;
use thaw_proto::ids::{Generation, Incarnation, Rank, StageIndex, Step};
use thaw_proto::run::{Position, RunState};
use thaw_proto::status::ErrorClass;

/// Why an input changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    #[error("generation {theirs} is over: the run is at generation {ours}")]
    StaleGeneration { theirs: Generation, ours: Generation },
    #[error("trainer {incarnation} is no member of generation {generation}")]
    UnknownTrainer { incarnation: Incarnation, generation: Generation },
    #[error("rank {rank} may not speak for the gang: only rank 0 commits")]
    NotCommitter { rank: Rank },
    #[error("a run in state {state:?} cannot {operation}")]
    NotLegal { operation: &'static str, state: RunState },
    #[error("the run has ended: it is {state:?}")]
    AlreadyEnded { state: RunState },
    #[error("the head is at step {}, so step {} cannot become it", ours.step, theirs.step)]
    HeadWouldGoBack { theirs: Position, ours: Position },
    #[error("step {step} is not committed, so the run cannot have finished with it")]
    NotCommitted { step: Step },
    #[error("stage {given} cannot end now: stage {expected} is next")]
    StageOutOfOrder { given: StageIndex, expected: StageIndex },
    #[error("must be in {min}-{max} (workers.min to workers.max of the run's spec), not {given}")]
    SizeOutOfRange { given: u32, min: u32, max: u32 },
    #[error("the gang needs {needed} new incarnations, {given} were given")]
    TooFewIncarnations { needed: usize, given: usize },
}

impl Rejection {
    /// What the sender can do about it.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::StaleGeneration { .. } | Self::UnknownTrainer { .. } | Self::HeadWouldGoBack { .. } => {
                ErrorClass::Fenced
            }
            Self::NotLegal { .. } | Self::AlreadyEnded { .. } => ErrorClass::Precondition,
            Self::NotCommitter { .. }
            | Self::NotCommitted { .. }
            | Self::StageOutOfOrder { .. }
            | Self::SizeOutOfRange { .. }
            | Self::TooFewIncarnations { .. } => ErrorClass::Invalid,
        }
    }
}

/// An input that was turned away, and what was observed before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    pub rejection: Rejection,
    pub observed: Observed,
}
