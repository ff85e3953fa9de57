//! Effects as messages to workers, each with the leader epoch and the generation it belongs to.

use thaw_core::run_machine::{Effect, Proposal, RunRecord, Trainer};
use thaw_proto::ids::{Generation, LeaderEpoch, WorkerName};
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::{pb, worker};

/// The worker an effect is for, and what to tell it.
pub(super) fn message(
    effect: &Effect,
    record: &RunRecord,
    traceparent: Option<&str>,
    epoch: LeaderEpoch,
) -> (WorkerName, pb::CoordinatorMessage) {
    let run = record.id.to_string();
    let (trainer, message) = match effect {
        Effect::StartTrainer { trainer, generation: _ } => {
            (trainer, Message::Start(start(trainer, record, traceparent)))
        }
        Effect::Propose(proposal) => (&proposal.trainer, Message::Propose(propose(proposal, run))),
        Effect::Commit { trainer, generation } => {
            let (slot, incarnation, generation) = address(trainer, *generation);
            (trainer, Message::Commit(pb::Commit { run, slot, incarnation, generation }))
        }
        Effect::StopTrainer { trainer, generation } => (trainer, stop(run, trainer, *generation)),
        Effect::SuspendTrainer { trainer, generation } => {
            let (slot, incarnation, generation) = address(trainer, *generation);
            (trainer, Message::Suspend(pb::SuspendTrainer { run, slot, incarnation, generation }))
        }
        Effect::AckCheckpoint { trainer, generation, checkpoint } => {
            let (slot, incarnation, generation) = address(trainer, *generation);
            let checkpoint = Some(checkpoint.into());
            (trainer, Message::Committed(pb::CheckpointCommitted { run, slot, incarnation, generation, checkpoint }))
        }
    };
    (trainer.worker.clone(), under(epoch, message))
}

/// Says under which leader it was said.
pub(super) fn under(epoch: LeaderEpoch, message: Message) -> pb::CoordinatorMessage {
    pb::CoordinatorMessage { leader_epoch: epoch.0, message: Some(message) }
}

/// Tells a trainer to stop, also one of a run that is not known.
pub(super) fn stop(run: String, trainer: &Trainer, generation: Generation) -> Message {
    let (slot, incarnation, generation) = address(trainer, generation);
    Message::Stop(pb::StopTrainer { run, slot, incarnation, generation })
}

fn start(trainer: &Trainer, record: &RunRecord, traceparent: Option<&str>) -> pb::StartTrainer {
    pb::StartTrainer {
        run: record.id.to_string(),
        slot: trainer.slot.0,
        incarnation: trainer.incarnation.to_string(),
        spec: Some((&*record.spec).into()),
        plan: Some((&*record.plan).into()),
        run_url: record.run_url.clone(),
        traceparent: traceparent.unwrap_or_default().to_owned(),
        // The trainer's default.
        collective_timeout_ms: 0,
        // The agent's.
        host_snapshot: None,
    }
}

fn propose(proposal: &Proposal, run: String) -> pb::Propose {
    let trainer = &proposal.trainer;
    pb::Propose {
        run,
        slot: trainer.slot.0,
        incarnation: trainer.incarnation.to_string(),
        generation: proposal.generation.0,
        rank: proposal.rank.0,
        key: proposal.key.to_vec(),
        resume: proposal.resume.as_ref().map(Into::into),
        peers: Some(proposal.addresses.clone()),
    }
}

fn address(trainer: &Trainer, generation: Generation) -> (u32, String, u64) {
    (trainer.slot.0, trainer.incarnation.to_string(), generation.0)
}

/// The trainer that a worker means.
pub(super) fn trainer_on(worker: &WorkerName, key: &worker::TrainerKey) -> Trainer {
    Trainer { worker: worker.clone(), slot: key.slot, incarnation: key.incarnation.clone() }
}
