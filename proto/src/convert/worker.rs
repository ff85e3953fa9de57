//! What agents and the coordinator say about trainers: identities are whole, slots exist, ranks have an address.

use super::checker::Checker;
use super::{WireEnum as _, each, optional, required_enum};
use crate::ids::{Generation, Incarnation, Rank, RunId, Slot, StageIndex, Step, WorkerName};
use crate::pb;
use crate::violation::Violations;
use crate::worker::{CollectiveOperation, Hello, OperationEnd, Proposal, RecentOperations, TrainerKey, TrainerStatus};
use std::collections::BTreeSet;
use std::time::Duration;

/// Slots a worker can offer.
const MOST_SLOTS: u32 = 64;

impl TryFrom<&pb::Hello> for Hello {
    type Error = Violations;

    fn try_from(raw: &pb::Hello) -> Result<Self, Violations> {
        let mut at = Checker::default();
        at.text("worker", &raw.worker, "the worker's unique name");
        uuid(&mut at, &raw.incarnation);
        at.text("host", &raw.host, "the host that other trainers reach this one under");
        if !(1..=MOST_SLOTS).contains(&raw.slots) {
            at.refuse("slots", format!("must be in 1-{MOST_SLOTS}, not {}", raw.slots));
        }
        let mut taken = BTreeSet::new();
        for (index, trainer) in raw.trainers.iter().enumerate() {
            if trainer.slot >= raw.slots {
                at.refuse(
                    &format!("trainers[{index}].slot"),
                    format!("must be below slots ({}), not {}", raw.slots, trainer.slot),
                );
            } else if !taken.insert(trainer.slot) {
                at.refuse(
                    &format!("trainers[{index}].slot"),
                    format!("{} is the slot of an earlier trainer", trainer.slot),
                );
            }
        }
        let trainers = at.collect(each("trainers", &raw.trainers));
        at.finish(Self {
            worker: WorkerName(raw.worker.clone()),
            incarnation: Incarnation(raw.incarnation.clone()),
            slots: raw.slots,
            host: raw.host.clone(),
            trainers,
        })
    }
}

impl From<&Hello> for pb::Hello {
    fn from(hello: &Hello) -> Self {
        Self {
            worker: hello.worker.0.clone(),
            incarnation: hello.incarnation.0.clone(),
            slots: hello.slots,
            host: hello.host.clone(),
            trainers: hello.trainers.iter().map(Into::into).collect(),
        }
    }
}

impl TryFrom<&pb::TrainerStatus> for TrainerStatus {
    type Error = Violations;

    fn try_from(raw: &pb::TrainerStatus) -> Result<Self, Violations> {
        let mut at = Checker::default();
        let trainer = trainer_key(&mut at, &raw.run, raw.slot, &raw.incarnation);
        let position = at.collect(optional("position", raw.position.as_ref()));
        at.finish(Self { trainer, generation: Generation(raw.generation), position, pid: raw.pid })
    }
}

impl From<&TrainerStatus> for pb::TrainerStatus {
    fn from(status: &TrainerStatus) -> Self {
        Self {
            run: status.trainer.run.0.clone(),
            slot: status.trainer.slot.0,
            incarnation: status.trainer.incarnation.0.clone(),
            generation: status.generation.0,
            position: status.position.as_ref().map(Into::into),
            pid: status.pid,
        }
    }
}

impl TryFrom<&pb::Propose> for Proposal {
    type Error = Violations;

    fn try_from(raw: &pb::Propose) -> Result<Self, Violations> {
        let mut at = Checker::default();
        let trainer = trainer_key(&mut at, &raw.run, raw.slot, &raw.incarnation);
        if raw.generation == 0 {
            at.refuse("generation", "must be at least 1, not 0");
        }
        let peers = raw.peers.clone().unwrap_or_default();
        if peers.is_empty() {
            at.refuse("peers.addresses", "is required: one per rank");
        } else if raw.rank as usize >= peers.len() {
            at.refuse("rank", format!("must be below the number of addresses ({}), not {}", peers.len(), raw.rank));
        }
        let resume = at.collect(optional("resume", raw.resume.as_ref()));
        at.finish(Self {
            trainer,
            generation: Generation(raw.generation),
            rank: Rank(raw.rank),
            peers,
            key: raw.key.to_vec(),
            resume,
        })
    }
}

impl From<&Proposal> for pb::Propose {
    fn from(proposal: &Proposal) -> Self {
        Self {
            run: proposal.trainer.run.0.clone(),
            slot: proposal.trainer.slot.0,
            incarnation: proposal.trainer.incarnation.0.clone(),
            generation: proposal.generation.0,
            rank: proposal.rank.0,
            key: proposal.key.clone(),
            resume: proposal.resume.as_ref().map(Into::into),
            peers: Some(proposal.peers.clone()),
        }
    }
}

impl TryFrom<&pb::RecentOperations> for RecentOperations {
    type Error = Violations;

    fn try_from(raw: &pb::RecentOperations) -> Result<Self, Violations> {
        let mut at = Checker::default();
        if raw.rank >= raw.world_size {
            at.refuse("rank", format!("must be below world_size ({}), not {}", raw.world_size, raw.rank));
        }
        let operations = at.collect(each("operations", &raw.operations));
        let still = Duration::from_millis(raw.still_ms);
        at.finish(Self { rank: Rank(raw.rank), world_size: raw.world_size, operations, still })
    }
}

impl From<&RecentOperations> for pb::RecentOperations {
    fn from(recent: &RecentOperations) -> Self {
        Self {
            rank: recent.rank.0,
            world_size: recent.world_size,
            operations: recent.operations.iter().map(Into::into).collect(),
            still_ms: u64::try_from(recent.still.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

impl TryFrom<&pb::CollectiveOperation> for CollectiveOperation {
    type Error = Violations;

    fn try_from(raw: &pb::CollectiveOperation) -> Result<Self, Violations> {
        let end = match (raw.ended_us, raw.failed) {
            (None, false) => OperationEnd::None,
            (None, true) => return Err(Violations::one("ended_us", "is required of an operation that failed")),
            (Some(at_us), false) => OperationEnd::Finished { at_us },
            (Some(at_us), true) => OperationEnd::Failed { at_us },
        };
        Ok(Self {
            kind: required_enum("kind", raw.kind)?,
            sequence: raw.sequence,
            bytes: raw.bytes,
            stage: StageIndex(raw.stage),
            step: Step(raw.step),
            began_us: raw.began_us,
            end,
        })
    }
}

impl From<&CollectiveOperation> for pb::CollectiveOperation {
    fn from(operation: &CollectiveOperation) -> Self {
        let (ended_us, failed) = match operation.end {
            OperationEnd::None => (None, false),
            OperationEnd::Finished { at_us } => (Some(at_us), false),
            OperationEnd::Failed { at_us } => (Some(at_us), true),
        };
        Self {
            kind: operation.kind.number(),
            sequence: operation.sequence,
            bytes: operation.bytes,
            stage: operation.stage.0,
            step: operation.step.0,
            began_us: operation.began_us,
            ended_us,
            failed,
        }
    }
}

/// The trainer that a message names by its fields run, slot and incarnation.
///
/// # Errors
/// Where the run is missing or the incarnation is no UUID.
pub fn trainer(run: &str, slot: u32, incarnation: &str) -> Result<TrainerKey, Violations> {
    let mut at = Checker::default();
    let key = trainer_key(&mut at, run, slot, incarnation);
    at.finish(key)
}

fn trainer_key(at: &mut Checker, run: &str, slot: u32, incarnation: &str) -> TrainerKey {
    at.text("run", run, "the run's id");
    uuid(at, incarnation);
    TrainerKey { run: RunId(run.to_owned()), slot: Slot(slot), incarnation: Incarnation(incarnation.to_owned()) }
}

fn uuid(at: &mut Checker, incarnation: &str) {
    if uuid::Uuid::try_parse(incarnation).is_err() {
        at.refuse("incarnation", "is required: a UUID");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6f9d2a52-3b1e-4c11-9f2c-2f1c9b7d7a10";

    fn status(slot: u32) -> pb::TrainerStatus {
        let position = Some(pb::Position { stage: 1, stage_step: 2, step: 3 });
        pb::TrainerStatus { run: "a-00000001".into(), slot, incarnation: UUID.into(), generation: 4, position, pid: 5 }
    }

    #[test]
    fn messages_round_trip() {
        let hello = pb::Hello {
            worker: "w".into(),
            incarnation: UUID.into(),
            slots: 2,
            host: "h".into(),
            trainers: vec![status(0), status(1)],
        };
        assert_eq!(pb::Hello::from(&Hello::try_from(&hello).unwrap()), hello);
        let propose = pb::Propose {
            run: "a-00000001".into(),
            slot: 1,
            incarnation: UUID.into(),
            generation: 2,
            rank: 1,
            peers: Some(["h:1", "h:2"].iter().collect()),
            key: vec![7, 8],
            resume: None,
        };
        assert_eq!(pb::Propose::from(&Proposal::try_from(&propose).unwrap()), propose);
    }

    #[test]
    fn operations_round_trip_and_a_failed_one_has_ended() {
        let operation = pb::CollectiveOperation {
            kind: pb::CollectiveKind::AllGather.into(),
            sequence: 7,
            bytes: 8,
            stage: 1,
            step: 9,
            began_us: 10,
            ended_us: None,
            failed: false,
        };
        let ended = pb::CollectiveOperation { ended_us: Some(11), ..operation };
        let failed = pb::CollectiveOperation { failed: true, ..ended };
        let operations = vec![ended, failed, operation];
        let recent = pb::RecentOperations { rank: 1, world_size: 2, operations, still_ms: 30_250 };
        assert_eq!(pb::RecentOperations::from(&RecentOperations::try_from(&recent).unwrap()), recent);
        let wrong = pb::CollectiveOperation { failed: true, ..operation };
        let nothing = pb::CollectiveOperation { kind: 0, ..operation };
        let recent = pb::RecentOperations { rank: 2, world_size: 2, operations: vec![wrong, nothing], still_ms: 0 };
        assert_eq!(
            RecentOperations::try_from(&recent).unwrap_err().to_string(),
            "rank: must be below world_size (2), not 2\n\
             operations[0].ended_us: is required of an operation that failed\n\
             operations[1].kind: is required: one of reduce_f32, reduce_f64, all_gather, copy, gpu_sum"
        );
    }

    #[test]
    fn every_mistake_of_a_hello_is_reported() {
        let hello = pb::Hello {
            incarnation: "x".into(),
            slots: 1,
            host: "h".into(),
            trainers: vec![status(0), status(0), status(1)],
            ..Default::default()
        };
        assert_eq!(
            Hello::try_from(&hello).unwrap_err().to_string(),
            "worker: is required: the worker's unique name\n\
             incarnation: is required: a UUID\n\
             trainers[1].slot: 0 is the slot of an earlier trainer\n\
             trainers[2].slot: must be below slots (1), not 1"
        );
    }
}
