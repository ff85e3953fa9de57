//! What is stored of a run, and what is only observed.

use super::Addresses;
use super::verdicts::Fault;
use crate::gang::FreeSlot;
use crate::quarantine::Blame;
use crate::shared::Shared;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use thaw_proto::ids::{Attempt, Generation, Incarnation, Rank, RunId, Slot, Step, WorkerName};
use thaw_proto::plan::Plan;
use thaw_proto::run::{CheckpointRef, Position, RunReason, RunResult, RunState, StageResult};
use thaw_proto::spec::RunSpec;

/// A run as the store holds it. Times are Unix milliseconds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRecord {
    pub id: RunId,
    pub spec: Shared<RunSpec>,
    pub plan: Shared<Plan>,
    /// URL of `runs/<run>`.
    pub run_url: String,
    pub state: RunState,
    pub reason: RunReason,
    /// A sentence for people about `reason`; may be empty.
    pub message: String,
    /// 0 before the first start.
    pub attempt: Attempt,
    /// 0 before the first gang.
    pub generation: Generation,
    /// Trainers of `generation` that may be alive, in rank order, which is that of their places. While RESIZING: those that have yet to stop, or are kept for the next one.
    pub members: Shared<Vec<Member>>,
    pub head: Option<CheckpointRef>,
    /// Of `head`.
    pub position: Position,
    /// Of each committed generation, in order.
    pub world_sizes: Vec<u32>,
    pub stage_results: Vec<StageResult>,
    /// Present exactly in SUCCEEDED.
    pub result: Option<RunResult>,
    pub create_ms: u64,
    /// First commit of a gang.
    pub start_ms: Option<u64>,
    pub end_ms: Option<u64>,
    /// Generations since the last newly committed step.
    pub failures_without_progress: u32,
    /// Those of them that a trainer ended by its own doing.
    #[serde(default)]
    pub own_failures: u32,
    /// The last step that was known to be applied when a gang was lost.
    #[serde(default)]
    pub lost_at: Step,
    /// Crashes and hangs of its trainers, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blames: Vec<Blame>,
    /// Submitted, asked to resume, or having yielded. 0 in records of the first version.
    #[serde(default)]
    pub queued_ms: u64,
    /// Trainers that are starting and will be in the next generation, beside `members`.
    #[serde(default, skip_serializing_if = "nobody")]
    pub joining: Shared<Vec<Trainer>>,
    /// Whether members of the present gang were in one before, and hold what that has trained.
    #[serde(default)]
    pub carries: bool,
    /// Whether it is to be suspended once its gang trains again.
    #[serde(default)]
    pub suspends_next: bool,
    /// Members of the generation before that the one being formed does without. They stop when it is committed.
    #[serde(default, skip_serializing_if = "nobody")]
    pub leaving: Shared<Vec<Trainer>>,
    /// Trainers that a user has asked for. `None`: as many as the spec allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<u32>,
    /// As many as it may keep once it has given up slots to a run of higher priority, until a gang is that small.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ceded: Option<u32>,
    /// When it last left the queue. 0: never, or in an earlier version.
    #[serde(default)]
    pub placed_ms: u64,
    /// Trainers the gang had before any was lost: what a loss is made up to before other runs start.
    #[serde(default)]
    pub whole: u32,
}

impl RunRecord {
    /// A run that was just submitted.
    #[must_use]
    pub fn new(id: RunId, spec: RunSpec, plan: Plan, run_url: String, now_ms: u64) -> Self {
        Self {
            id,
            spec: spec.into(),
            plan: plan.into(),
            run_url,
            state: RunState::Pending,
            reason: RunReason::WaitingForWorkers,
            message: String::new(),
            attempt: Attempt(0),
            generation: Generation(0),
            members: Shared::default(),
            head: None,
            position: Position::default(),
            world_sizes: Vec::new(),
            stage_results: Vec::new(),
            result: None,
            create_ms: now_ms,
            start_ms: None,
            end_ms: None,
            failures_without_progress: 0,
            own_failures: 0,
            lost_at: Step(0),
            blames: Vec::new(),
            queued_ms: now_ms,
            joining: Shared::default(),
            carries: false,
            suspends_next: false,
            leaving: Shared::default(),
            scale: None,
            ceded: None,
            placed_ms: 0,
            whole: 0,
        }
    }

    /// Trainers of the present gang; 0 with none.
    #[must_use]
    pub fn world_size(&self) -> u32 {
        match self.state {
            RunState::Forming | RunState::Running | RunState::Suspending | RunState::Preempting => {
                u32::try_from(self.members.len()).expect("a gang has at most 4096 members")
            }
            RunState::Pending
            | RunState::Admitted
            | RunState::Resizing
            | RunState::Suspended
            | RunState::Succeeded
            | RunState::Failed
            | RunState::Cancelled => 0,
        }
    }

    /// Slots this run holds, so that no other run may be given them.
    pub fn held_slots(&self) -> impl Iterator<Item = FreeSlot> {
        self.trainers().map(Trainer::place)
    }

    /// Members, those that are to join them, and those that are about to leave.
    pub fn trainers(&self) -> impl Iterator<Item = &Trainer> {
        self.members.iter().map(|member| &member.trainer).chain(&self.joining).chain(&self.leaving)
    }

    /// The member that a trainer is.
    #[must_use]
    pub fn member(&self, trainer: &Trainer) -> Option<&Member> {
        let by_place = self.members.binary_search_by(|member| member.trainer.cmp(trainer));
        // Survivors that have taken others back are out of order until they are ranked.
        let at = by_place.ok().or_else(|| self.members.iter().position(|member| member.trainer == *trainer));
        at.map(|at| &self.members[at])
    }

    /// Whether both have the same trainers, as members, joining and leaving.
    #[must_use]
    pub fn has_trainers_of(&self, other: &Self) -> bool {
        (self.members.is_same(&other.members) || self.members == other.members)
            && (self.joining.is_same(&other.joining) || self.joining == other.joining)
            && (self.leaving.is_same(&other.leaving) || self.leaving == other.leaving)
    }

    /// How many trainers the run is to have now (RUN-11).
    #[must_use]
    pub fn wanted_size(&self) -> u32 {
        let workers = &self.spec.workers;
        // Where a gang goes on from before the end of a stage that was reported, it has that of the next one already.
        let stage = self.stage_results.len().min(self.plan.stages.len().saturating_sub(1));
        let of_stage = self.plan.stages.get(stage).and_then(|stage| stage.workers).unwrap_or(workers.max);
        let most = self.ceded.unwrap_or(workers.max).min(of_stage);
        self.scale.unwrap_or(workers.max).min(most).clamp(workers.min, workers.max)
    }
}

fn nobody(trainers: &Shared<Vec<Trainer>>) -> bool {
    trainers.is_empty()
}

/// One trainer process, in one of its lives.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trainer {
    pub worker: WorkerName,
    pub slot: Slot,
    pub incarnation: Incarnation,
}

impl Trainer {
    /// The device it holds.
    #[must_use]
    pub fn place(&self) -> FreeSlot {
        FreeSlot { worker: self.worker.clone(), slot: self.slot }
    }
}

/// A trainer and its position in the gang.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    pub rank: Rank,
    pub trainer: Trainer,
}

/// What the leader knows of a run and can learn again. Times are Unix milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Trainers that have said they listen, joining ones too.
    pub(super) addresses: Addresses,
    /// Those of them that survive their gang.
    pub(super) keepers: BTreeSet<Incarnation>,
    /// Those that were in a committed gang, so that they hold a state.
    pub(super) holders: BTreeSet<Incarnation>,
    /// While RESIZING: whether members are kept for the next gang, instead of being stopped.
    pub(super) kept: bool,
    /// When a gang that says it is broken is formed again, if no loss explains it before; and one that a new leader has taken over and that has
    /// lost somebody, if not all others say before that they listen.
    pub(super) broken: Option<Broken>,
    /// Until when joining trainers may take to be ready; where none are joining, before when none are started.
    pub(super) join_ms: u64,
    /// The last step that the present gang is known to have applied.
    pub(super) step: Step,
    /// When a failure was last counted.
    pub(super) failed_ms: Option<u64>,
    /// Whether that was counted as a trainer's own.
    pub(super) own_counted: bool,
    /// Trainers whose end has been held against somebody, or nobody.
    pub(super) judged: BTreeSet<Incarnation>,
    /// Before when no trainer is started in place of a lost one (RUN-13).
    pub(super) restart_ms: u64,
    /// Trainers in a row that were to join and did not.
    pub(super) joiners_lost: u32,
    /// Members that copy a state from the others: those that were new when the gang was committed, until it is known to have made a step.
    pub(super) copying: BTreeSet<Incarnation>,
    /// Members that have built the communicator.
    pub(super) built: BTreeSet<Incarnation>,
    /// When the present wait is over. `None`: there is none, or it has yet to be armed.
    pub(super) deadline_ms: Option<u64>,
    /// Since when there have been slots to start or to grow with, but fewer than the run can use.
    pub(super) gathering_since_ms: Option<u64>,
    /// Members of a gang that a new leader has taken over and not heard of yet.
    pub(super) awaited: BTreeSet<Incarnation>,
    /// Until when they may come back.
    pub(super) reattach_deadline_ms: Option<u64>,
    /// The last generation that was lost without any of its trainers having ended: whom it waited for is to be found out.
    pub(super) unexplained: Option<Generation>,
    /// Places whose trainers did not come up in time; used again only where there is no other.
    pub(super) avoid: BTreeSet<FreeSlot>,
}

/// A gang that cannot go on as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Broken {
    /// When it is formed again.
    pub(super) at_ms: u64,
    pub(super) fault: Fault,
    pub(super) reason: RunReason,
    pub(super) message: String,
}

impl Observed {
    /// When [`super::Input::Tick`] is next of use, if it is before the driver's own period.
    #[must_use]
    pub fn deadline_ms(&self) -> Option<u64> {
        self.deadline_ms
    }

    /// The generation whose loss asks for a name ([`super::Input::CulpritFound`]).
    #[must_use]
    pub fn unexplained(&self) -> Option<Generation> {
        self.unexplained
    }
}
