//! [`Trainer`]: one trainer as its agent sees it: what it is asked, what it has said, whether it gets on.

use super::child;
use super::still::Still;
use crate::collective::{Movement, Ring};
use std::collections::VecDeque;
use std::time::Duration;
use thaw_proto::ids::{Generation, Rank};
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::pb::{self, CoordinatorMessage, RunReason, TrainerReport};
use thaw_proto::peers::Peers;
use thaw_proto::spec::DEFAULT_STALL_TIMEOUT_SECONDS;
use thaw_proto::worker::RecentOperations;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Between two pings of a trainer.
pub(super) const PING: Duration = Duration::from_millis(250);
/// Pings without an answer after which it is given up.
const MOST_UNANSWERED: u32 = 6;

/// Which process is meant: a slot is used again, an incarnation never.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TrainerId {
    pub(super) run: String,
    pub(super) slot: u32,
    pub(super) incarnation: String,
}

impl TrainerId {
    pub(super) fn report(&self, generation: u64, event: Event) -> TrainerReport {
        let Self { run, slot, incarnation } = self.clone();
        TrainerReport { run, slot, incarnation, generation, event: Some(event) }
    }
}

#[derive(Debug)]
pub(super) struct Trainer {
    pub(super) id: TrainerId,
    pub(super) pid: u32,
    /// In the gang last proposed to it.
    pub(super) place: Option<Place>,
    pub(super) ring: Option<Ring>,
    pub(super) generation: u64,
    pub(super) position: Option<pb::Position>,
    /// Pings since its last answer (AGENT-6).
    pub(super) unanswered: u32,
    /// How its training gets on (AGENT-8).
    pub(super) still: Still,
    /// What the coordinator must have heard (AGENT-2), in order.
    pub(super) ledger: Vec<TrainerReport>,
    pub(super) last_lines: VecDeque<String>,
    pub(super) messages: mpsc::Sender<CoordinatorMessage>,
    pub(super) kill: CancellationToken,
    /// Cancelled once its end is reported.
    pub(super) ended: CancellationToken,
}

/// A trainer's place in a gang.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) generation: u64,
    pub(super) rank: u32,
    pub(super) world_size: u32,
    /// Whether it is reported what the trainer did in it (AGENT-7).
    pub(super) told: bool,
}

impl Trainer {
    pub(super) fn is_alive(&self) -> bool {
        !self.ended.is_cancelled()
    }

    pub(super) fn source(&self) -> String {
        match self.place {
            Some(Place { rank, .. }) => format!("rank {rank}"),
            None => format!("slot {}", self.id.slot),
        }
    }

    /// Keeps a report to send again; a new one of these kinds takes the place of the last.
    pub(super) fn keep(&mut self, report: &TrainerReport) {
        let replaces = |kept: &TrainerReport| {
            matches!(
                (&kept.event, &report.event),
                (Some(Event::Built(_)), Some(Event::Built(_)))
                    | (Some(Event::Checkpoint(_)), Some(Event::Checkpoint(_)))
                    | (Some(Event::Suspended(_)), Some(Event::Suspended(_)))
                    | (Some(Event::Interrupted(_)), Some(Event::Interrupted(_)))
            )
        };
        self.ledger.retain(|kept| !replaces(kept));
        self.ledger.push(report.clone());
    }

    /// What it did last in its gang, which is over, and the generation; unless that is told (AGENT-7).
    pub(super) fn recent(&mut self) -> Option<(u64, RecentOperations)> {
        let place = self.place.as_mut().filter(|place| !place.told)?;
        let operations = self.ring.as_ref()?.read(Generation(place.generation));
        place.told = true;
        let (rank, world_size) = (Rank(place.rank), place.world_size);
        let still = PING * self.still.looks();
        Some((place.generation, RecentOperations { rank, world_size, operations, still }))
    }

    /// Takes its place in a gang; returns what it did in the one before.
    pub(super) fn propose(&mut self, propose: &pb::Propose) -> Option<(u64, RecentOperations)> {
        if self.place.is_some_and(|place| place.generation >= propose.generation) {
            return None;
        }
        let before = self.recent();
        let world_size = propose.peers.as_ref().map_or(0, Peers::len);
        let world_size = u32::try_from(world_size).unwrap_or(u32::MAX);
        self.place = Some(Place { generation: propose.generation, rank: propose.rank, world_size, told: false });
        before
    }

    /// Takes another look at it, and pings it; why it has to go, where it has.
    pub(super) fn check(&mut self) -> Option<(RunReason, String)> {
        let is_ready = |report: &TrainerReport| matches!(report.event, Some(Event::Ready(_)));
        if !self.ledger.iter().any(is_ready) {
            return None;
        }
        let movement = self.ring.as_ref().map(Ring::movement);
        if let Some(movement) = movement {
            self.still.look(movement, self.unanswered == 0);
        }
        if self.unanswered >= MOST_UNANSWERED {
            // Somebody has stopped it, or it hangs by itself: the second is held against its slot.
            let (reason, how) = match child::is_stopped(self.pid) {
                true => (RunReason::TrainerLost, "is stopped"),
                false => (RunReason::TrainerHung, "hangs"),
            };
            let limit = PING * MOST_UNANSWERED;
            return Some((reason, format!("the process has not answered its agent for {limit:?}; it {how}")));
        }
        if let Some(Movement { stage, step, .. }) = movement.filter(|_| self.still.is_too_long()) {
            let seconds = (PING * self.still.looks()).as_secs();
            let message = format!(
                "training has not moved for {seconds} s, and waits for nobody, at step {step} of stage {stage}; its process answers"
            );
            return Some((RunReason::TrainerHung, message));
        }
        self.unanswered += 1;
        let ping = Some(pb::coordinator_message::Message::Ping(pb::Ping {}));
        // Where it is full it does not read, so it will not answer either.
        let _ = self.messages.try_send(CoordinatorMessage { leader_epoch: 0, message: ping });
        None
    }

    pub(super) fn observe(&mut self, report: &TrainerReport) {
        self.generation = self.generation.max(report.generation);
        let position = match &report.event {
            Some(Event::Progress(progress)) => progress.position,
            Some(Event::Evaluation(evaluation)) => evaluation.position,
            Some(Event::Checkpoint(written)) => written.checkpoint.as_ref().and_then(|checkpoint| checkpoint.position),
            Some(
                Event::Ready(_)
                | Event::Built(_)
                | Event::StageEnded(_)
                | Event::Finished(_)
                | Event::Suspended(_)
                | Event::Failed(_)
                | Event::Interrupted(_)
                | Event::Operations(_)
                | Event::Pong(_)
                | Event::HostSnapshot(_)
                | Event::Exited(_)
                | Event::Log(_),
            )
            | None => None,
        };
        let step = |position: Option<pb::Position>| position.map(|position| position.step);
        if step(position) > step(self.position) {
            self.position = position;
        }
    }
}

/// At how many looks a trainer that is told to train by `message` has stood still for too long.
pub(super) fn most_looks(message: &CoordinatorMessage) -> Option<u32> {
    let spec = match &message.message {
        Some(pb::coordinator_message::Message::Start(start)) => start.spec.as_ref(),
        _ => None,
    };
    let seconds = spec.and_then(|spec| spec.workers.as_ref()?.stall_timeout_seconds);
    let limit = Duration::from_secs(seconds.unwrap_or(DEFAULT_STALL_TIMEOUT_SECONDS).into());
    u32::try_from(limit.as_millis() / PING.as_millis()).ok().filter(|looks| *looks > 0)
}
