//! What tests of the machine share: a run that takes one step after the other.

use super::*;
use crate::gang::FreeSlot;
use crate::scheduler::{self, Waiting};
use crate::test_support::{evaluation, plan_of, spec};
use serde_json::json;
use thaw_proto::ids::{Slot, StageIndex};
use thaw_proto::run::Position;

/// A run, and a clock.
pub(super) struct Script {
    pub(super) record: RunRecord,
    pub(super) observed: Observed,
    pub(super) now_ms: u64,
    /// Incarnations handed out so far.
    minted: u32,
    /// Whether its trainers survive the loss of a peer.
    keeps: bool,
}

impl Script {
    pub(super) fn new() -> Self {
        let spec = spec(json!({"workers": {"min": 1, "max": 2, "threads_per_trainer": 1}}));
        let plan = plan_of(&spec);
        let record = RunRecord::new("demo-00000001".into(), spec, plan, "file:///d/runs/demo-00000001".into(), 1000);
        Self { record, observed: Observed::default(), now_ms: 1000, minted: 0, keeps: false }
    }

    pub(super) fn send(&mut self, input: Input) -> Result<(Vec<Effect>, Vec<Event>), Rejection> {
        let outcome = step(&Policy::default(), &self.record, &self.observed, Now::at(self.now_ms), &input)?;
        assert_eq!(outcome.changed, outcome.record != self.record, "changed is wrong after {input:?}");
        self.record = outcome.record;
        self.observed = outcome.observed;
        Ok((outcome.effects, outcome.events))
    }

    pub(super) fn effects(&mut self, input: Input) -> Vec<Effect> {
        self.send(input).unwrap().0
    }

    /// What the scheduler says where these workers have a slot each.
    pub(super) fn granted(&self, workers: &[&str]) -> Option<Verdict> {
        let free: Vec<FreeSlot> = workers.iter().map(|worker| place(worker)).collect();
        let waiting: Vec<Waiting> =
            wants_slots(&self.record, &self.observed, Now::at(self.now_ms)).into_iter().collect();
        let none = BTreeMap::new();
        let verdicts =
            scheduler::schedule(&scheduler::Policy::default(), self.now_ms, &none, &BTreeMap::new(), &waiting, &free);
        verdicts.into_values().next()
    }

    pub(super) fn tick(&mut self) -> Input {
        self.minted += 2;
        Input::Tick {
            resting: None,
            slots: self.granted(&["a", "b"]),
            fresh: vec![Incarnation(format!("i{}", self.minted - 1)), Incarnation(format!("i{}", self.minted))],
        }
    }

    pub(super) fn trainer(&self, rank: usize) -> Trainer {
        self.record.members[rank].trainer.clone()
    }

    pub(super) fn admitted() -> Self {
        let mut script = Self::new();
        let tick = script.tick();
        script.effects(tick);
        script
    }

    pub(super) fn forming() -> Self {
        let mut script = Self::admitted();
        script.all_ready();
        script
    }

    pub(super) fn all_ready(&mut self) -> Vec<Effect> {
        let ready = |script: &Self, rank: usize| Input::TrainerReady {
            trainer: script.trainer(rank),
            address: format!("h:{rank}"),
            keeps: script.keeps,
        };
        let (first, second) = (ready(self, 0), ready(self, 1));
        assert!(self.effects(first).is_empty());
        self.effects(second)
    }

    pub(super) fn running() -> Self {
        let mut script = Self::forming();
        script.all_built();
        script
    }

    pub(super) fn all_built(&mut self) -> Vec<Effect> {
        let generation = self.record.generation;
        let (first, second) = (self.trainer(0), self.trainer(1));
        assert!(self.effects(Input::GangBuilt { trainer: first, generation }).is_empty());
        self.effects(Input::GangBuilt { trainer: second, generation })
    }

    /// [`Script::running`] with trainers that survive the loss of a peer.
    pub(super) fn keeping() -> Self {
        let mut script = Self { keeps: true, ..Self::new() };
        let tick = script.tick();
        script.effects(tick);
        script.all_ready();
        script.all_built();
        script
    }

    pub(super) fn after(mut self, input: Input) -> Self {
        self.send(input).unwrap();
        self
    }

    pub(super) fn exited(&self, rank: usize) -> Input {
        Input::TrainerExited { trainer: self.trainer(rank), ending: Ending::Signal(9) }
    }

    pub(super) fn checkpoint(&self, step: u64) -> Input {
        let generation = self.record.generation;
        Input::CheckpointWritten { trainer: self.trainer(0), generation, checkpoint: checkpoint(generation, step) }
    }

    pub(super) fn finished(&self, steps: u64) -> Input {
        Input::Finished {
            trainer: self.trainer(0),
            generation: self.record.generation,
            result: Box::new(result(steps)),
            reason: RunReason::NoGain,
        }
    }

    pub(super) fn failed(&self, class: FailureClass) -> Input {
        Input::TrainerFailed {
            trainer: self.trainer(1),
            generation: self.record.generation,
            class,
            reason: RunReason::TrainerError,
            message: "the label `x` is unknown".to_owned(),
        }
    }
}

pub(super) fn place(worker: &str) -> FreeSlot {
    FreeSlot { worker: worker.into(), slot: Slot(0) }
}

pub(super) fn checkpoint(generation: Generation, step: u64) -> CheckpointRef {
    let position = Position { stage: StageIndex(0), stage_step: u32::try_from(step).unwrap(), step: Step(step) };
    CheckpointRef {
        position,
        generation,
        manifest: crate::manifest::file_name(generation, Step(step)),
        manifest_blake3: "d".repeat(64),
    }
}

pub(super) fn result(steps: u64) -> RunResult {
    RunResult {
        test: None,
        best: evaluation(0.5),
        weights_blake3: "e".repeat(64),
        model: "file:///d/model".into(),
        steps: Step(steps),
        seconds: 1.0,
    }
}

pub(super) fn stage_result(stage: u32) -> StageResult {
    StageResult {
        stage: StageIndex(stage),
        steps: 10,
        epochs: 1.0,
        seconds: 1.0,
        end: thaw_proto::run::StageEnd::MaxEpochs,
        eval: evaluation(0.5),
        deciding_eval: evaluation(0.5),
        replica_digest: "f".repeat(64),
        peak_memory_bytes: 1,
        saves: 0,
        test: None,
    }
}

pub(super) fn kinds(effects: &[Effect]) -> Vec<&'static str> {
    effects
        .iter()
        .map(|effect| match effect {
            Effect::StartTrainer { .. } => "start",
            Effect::Propose(_) => "propose",
            Effect::Commit { .. } => "commit",
            Effect::StopTrainer { .. } => "stop",
            Effect::SuspendTrainer { .. } => "suspend",
            Effect::AckCheckpoint { .. } => "ack",
        })
        .collect()
}

pub(super) fn seen(worker: &str, trainers: &[Trainer]) -> Input {
    Input::TrainersSeen { worker: worker.into(), trainers: trainers.to_vec() }
}

pub(super) fn ready(trainer: &Trainer, address: &str) -> Input {
    Input::TrainerReady { trainer: trainer.clone(), address: address.to_owned(), keeps: true }
}
