//! How a trainer fails: what that ends, and what the coordinator is told.

use super::outbox::Outbox;
use super::{job, prefix, replica, save, session};
use thaw_node::{checkpoint, collective};
use thaw_proto::pb::FailureClass;
use thaw_proto::run::RunReason;
use thaw_proto::status::ErrorClass;

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the agent sent {found} where StartTrainer was due")]
    Protocol { found: &'static str },
    #[error("cannot read the proposal of generation {generation}: {problem}")]
    Proposal { generation: u64, problem: String },
    #[error(transparent)]
    Job(#[from] job::Error),
    #[error("cannot train on --device cuda")]
    Device(#[from] thaw_torch::cuda::Error),
    #[error("cannot load the model")]
    Model(#[from] thaw_torch::model::Error),
    #[error("cannot set up libtorch")]
    Runtime(#[from] thaw_torch::runtime::Error),
    #[error("cannot join the gang")]
    Collective(#[from] collective::Error),
    #[error(transparent)]
    Replica(#[from] replica::Error),
    #[error(transparent)]
    Save(#[from] save::Error),
    #[error(transparent)]
    Session(#[from] session::Error),
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
    #[error("the agent is gone")]
    AgentGone,
}

impl Error {
    /// Whether an error ends the generation alone (TRN-4). The state is as it was before what failed (TRAIN-5).
    pub(super) fn is_interruption(&self, outbox: &Outbox) -> bool {
        let of_collective = |error: &collective::Error| matches!(error.class(), ErrorClass::Retry | ErrorClass::Fenced);
        match self {
            Self::Collective(error)
            | Self::Replica(replica::Error::Collective(error))
            | Self::Session(session::Error::Replica(replica::Error::Collective(error))) => of_collective(error),
            Self::Session(session::Error::Superseded | session::Error::Prefix(prefix::Error::Superseded)) => true,
            // Of a checkpoint that nobody waits for any more.
            Self::Save(error) | Self::Session(session::Error::Save(error)) => match error {
                save::Error::Superseded => true,
                save::Error::Checkpoint(checkpoint::Error::Late { .. }) => outbox.is_behind(),
                _ => false,
            },
            Self::Protocol { .. }
            | Self::Proposal { .. }
            | Self::Job(_)
            | Self::Device(_)
            | Self::Model(_)
            | Self::Runtime(_)
            | Self::Replica(_)
            | Self::Session(_)
            | Self::Thread(_)
            | Self::AgentGone => false,
        }
    }

    /// What the coordinator should do about a failure, and what to call it.
    pub(super) fn classify(&self) -> (FailureClass, RunReason) {
        let of_collective = |error: &collective::Error| match error.class() {
            ErrorClass::Retry => (FailureClass::Retry, RunReason::TrainerLost),
            ErrorClass::Fenced => (FailureClass::Fenced, RunReason::TrainerLost),
            ErrorClass::Invalid | ErrorClass::NotFound | ErrorClass::AlreadyExists | ErrorClass::Precondition => {
                (FailureClass::Invalid, RunReason::TrainerError)
            }
            ErrorClass::Fatal => (FailureClass::Fatal, RunReason::TrainerError),
        };
        let of_replica = |error: &replica::Error| match error {
            replica::Error::Collective(error) => of_collective(error),
            replica::Error::Diverged { .. } => (FailureClass::Fatal, RunReason::ReplicasDiverged),
            replica::Error::Model(_)
            | replica::Error::Update(_)
            | replica::Error::Runtime(_)
            | replica::Error::Device(_)
            | replica::Error::Restore { .. }
            | replica::Error::Snapshot { .. }
            | replica::Error::Thread(_)
            | replica::Error::Weights { .. }
            | replica::Error::Tally { .. }
            | replica::Error::Miscounted { .. } => (FailureClass::Fatal, RunReason::TrainerError),
        };
        let of_save = |error: &save::Error| match error {
            save::Error::Checkpoint(error) if error.is_storage() => (FailureClass::Invalid, RunReason::StorageError),
            save::Error::File { .. } => (FailureClass::Invalid, RunReason::StorageError),
            save::Error::NotCommitted | save::Error::Superseded | save::Error::Behind => {
                (FailureClass::Retry, RunReason::TrainerLost)
            }
            save::Error::Differ { .. } => (FailureClass::Fatal, RunReason::ReplicasDiverged),
            // A process of its own asks for another copy.
            save::Error::Damaged { .. } => (FailureClass::Retry, RunReason::TrainerLost),
            save::Error::Peer { .. } => (FailureClass::Fatal, RunReason::TrainerError),
            save::Error::Checkpoint(_)
            | save::Error::Manifest { .. }
            | save::Error::Unfit { .. }
            | save::Error::Model(_)
            | save::Error::Optimizer(_)
            | save::Error::Snapshot { .. }
            | save::Error::Part { .. }
            | save::Error::Archive(_)
            | save::Error::Weights(_) => (FailureClass::Invalid, RunReason::TrainerError),
        };
        match self {
            Self::Collective(error) => of_collective(error),
            Self::Replica(error) | Self::Session(session::Error::Replica(error)) => of_replica(error),
            Self::Save(error) | Self::Session(session::Error::Save(error)) => of_save(error),
            Self::AgentGone
            | Self::Thread(_)
            | Self::Session(
                session::Error::Superseded
                | session::Error::Prefix(prefix::Error::Superseded | prefix::Error::Thread(_)),
            ) => (FailureClass::Retry, RunReason::TrainerLost),
            // Storage may answer the next time; where it does not, the step fails again, and the coordinator ends that.
            Self::Session(session::Error::Prefix(prefix::Error::Data(thaw_data::batch::Error::Read { .. }))) => {
                (FailureClass::Retry, RunReason::TrainerError)
            }
            Self::Job(_)
            | Self::Device(_)
            | Self::Model(_)
            | Self::Session(
                session::Error::Prefix(prefix::Error::Data(_) | prefix::Error::Required { .. })
                | session::Error::NeverFinite
                | session::Error::Trace(_),
            ) => (FailureClass::Invalid, RunReason::TrainerError),
            Self::Protocol { .. }
            | Self::Proposal { .. }
            | Self::Runtime(_)
            | Self::Session(
                session::Error::DataEnded | session::Error::Prefix(prefix::Error::Model(_) | prefix::Error::Tensor(_)),
            ) => (FailureClass::Fatal, RunReason::TrainerError),
        }
    }
}
