//! RUN-11 and RUN-12 by hand: gangs that grow and shrink while they train, and give way to others.

use super::script::{checkpoint, kinds, place, stage_result};
use super::*;
use crate::gang::FreeSlot;
use crate::scheduler::{self, Claim, Waiting};
use crate::test_support::{plan_of, spec};
use serde_json::json;
use thaw_proto::status::ErrorClass;

/// A run over one to four workers, each with a slot, whose trainers survive the loss of a peer.
struct Gang {
    record: RunRecord,
    observed: Observed,
    now_ms: u64,
    minted: u32,
}

impl Gang {
    fn new() -> Self {
        let spec = spec(json!({"workers": {"min": 1, "max": 4, "threads_per_trainer": 1}}));
        let plan = plan_of(&spec);
        let record = RunRecord::new("demo-00000001".into(), spec, plan, "file:///d/runs/demo-00000001".into(), 1000);
        Self { record, observed: Observed::default(), now_ms: 1000, minted: 0 }
    }

    /// A gang that trains on these workers.
    fn training(workers: &[&str]) -> Self {
        let mut gang = Self::new();
        gang.start(workers);
        gang
    }

    fn start(&mut self, workers: &[&str]) {
        if self.grant(workers).is_empty() {
            self.now_ms += Policy::default().gather_ms;
            self.grant(workers);
        }
        self.all_ready();
        self.all_built();
        assert_eq!(self.sizes().last(), Some(&u32::try_from(workers.len()).unwrap()));
    }

    fn send(&mut self, input: Input) -> Result<Vec<Effect>, Rejection> {
        let outcome = step(&Policy::default(), &self.record, &self.observed, Now::at(self.now_ms), &input)?;
        assert_eq!(outcome.changed, outcome.record != self.record, "changed is wrong after {input:?}");
        self.record = outcome.record;
        self.observed = outcome.observed;
        Ok(outcome.effects)
    }

    fn effects(&mut self, input: Input) -> Vec<Effect> {
        self.send(input).unwrap()
    }

    /// A tick with these workers' slots free.
    fn grant(&mut self, workers: &[&str]) -> Vec<Effect> {
        let free: Vec<FreeSlot> = workers.iter().map(|worker| place(worker)).collect();
        let waiting: Vec<Waiting> = self.wants().into_iter().collect();
        let none = BTreeMap::new();
        let policy = scheduler::Policy::default();
        let verdicts = scheduler::schedule(&policy, self.now_ms, &none, &BTreeMap::new(), &waiting, &free);
        self.minted += 4;
        let fresh = (0..4).map(|extra| Incarnation(format!("i{}", self.minted + extra))).collect();
        self.effects(Input::Tick { resting: None, slots: verdicts.into_values().next(), fresh })
    }

    /// [`Gang::grant`], and again once more are no longer waited for.
    fn grant_few(&mut self, workers: &[&str]) -> Vec<Effect> {
        assert!(self.grant(workers).is_empty(), "others may come");
        self.now_ms += Policy::default().gather_ms;
        self.grant(workers)
    }

    fn wants(&self) -> Option<Waiting> {
        wants_slots(&self.record, &self.observed, Now::at(self.now_ms))
    }

    fn scale(&mut self, workers: u32) -> Vec<Effect> {
        self.effects(Input::Scale { workers })
    }

    fn all_ready(&mut self) -> Vec<Effect> {
        let trainers: Vec<Trainer> = self.record.trainers().cloned().collect();
        let ready = |trainer: Trainer| Input::TrainerReady {
            address: format!("h:{}", trainer.incarnation),
            trainer,
            keeps: true,
        };
        trainers.into_iter().flat_map(|trainer| self.effects(ready(trainer))).collect()
    }

    fn all_built(&mut self) -> Vec<Effect> {
        let generation = self.record.generation;
        let built = |trainer: Trainer| Input::GangBuilt { trainer, generation };
        self.members().into_iter().flat_map(|trainer| self.effects(built(trainer))).collect()
    }

    fn members(&self) -> Vec<Trainer> {
        self.record.members.iter().map(|member| member.trainer.clone()).collect()
    }

    fn workers(&self) -> Vec<&str> {
        self.record.members.iter().map(|member| member.trainer.worker.as_str()).collect()
    }

    fn sizes(&self) -> &[u32] {
        &self.record.world_sizes
    }

    fn state(&self) -> RunState {
        self.record.state
    }

    fn take_over(&mut self) -> Vec<Effect> {
        self.observed = Observed::default();
        self.effects(Input::CoordinatorStarted)
    }

    fn stage_ends(&mut self, stage: u32) -> Vec<Effect> {
        let (trainer, generation) = (self.members()[0].clone(), self.record.generation);
        self.effects(Input::StageEnded { trainer, generation, result: Box::new(stage_result(stage)) })
    }

    fn exits(&mut self, trainer: Trainer) -> Vec<Effect> {
        self.effects(Input::TrainerExited { trainer, ending: Ending::Signal(9) })
    }
}

fn stopped(effects: &[Effect]) -> Vec<&str> {
    effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::StopTrainer { trainer, .. } => Some(trainer.worker.as_str()),
            Effect::StartTrainer { .. }
            | Effect::Propose(_)
            | Effect::Commit { .. }
            | Effect::SuspendTrainer { .. }
            | Effect::AckCheckpoint { .. } => None,
        })
        .collect()
}

#[test]
fn run_11_who_leaves_keeps_its_slot_until_the_smaller_gang_is_committed() {
    let mut gang = Gang::training(&["a", "b", "c", "d"]);
    let kept = gang.members()[..2].to_vec();
    let proposed = gang.scale(2);
    assert_eq!(kinds(&proposed), ["propose", "propose"], "nobody is stopped yet");
    assert_eq!((gang.state(), gang.record.reason), (RunState::Forming, RunReason::Scaled));
    assert_eq!(gang.record.held_slots().count(), 4);
    // Who leaves is no stranger, and its end breaks nothing.
    let leaving = gang.record.leaving.clone();
    let seen = Input::TrainersSeen { worker: "c".into(), trainers: vec![leaving[0].clone()] };
    assert!(gang.effects(seen).is_empty());
    assert!(gang.exits(leaving[1].clone()).is_empty());
    let committed = gang.all_built();
    assert_eq!((kinds(&committed), stopped(&committed)), (vec!["commit", "commit", "stop"], vec!["c"]));
    assert_eq!((gang.members(), gang.record.held_slots().count()), (kept, 2));
    assert_eq!((gang.state(), gang.sizes()), (RunState::Running, &[4, 2][..]));
    assert_eq!((gang.record.failures_without_progress, gang.wants()), (0, None), "what left is no loss");
}

#[test]
fn run_11_a_gang_grows_by_what_is_free_in_one_generation() {
    let mut gang = Gang::training(&["a", "b"]);
    assert_eq!((gang.record.wanted_size(), gang.wants().map(|wants| wants.claim)), (4, Some(Claim::Growth)));
    assert!(gang.grant(&[]).is_empty(), "it trains on until slots are free");
    assert_eq!(kinds(&gang.grant(&["c", "d"])), ["start", "start"]);
    assert_eq!((gang.state(), gang.wants(), gang.record.held_slots().count()), (RunState::Running, None, 4));
    let kept = gang.members();
    assert_eq!(kinds(&gang.all_ready()), ["propose"; 4]);
    assert_eq!(gang.record.reason, RunReason::Scaled);
    gang.all_built();
    assert_eq!((gang.sizes(), &gang.members()[..2]), (&[2, 4][..], &kept[..]));
    // By one slot only after it has been waited for others.
    let mut gang = Gang::training(&["a", "b"]);
    assert_eq!(kinds(&gang.grant_few(&["c"])), ["start"]);
}

#[test]
fn run_11_a_loss_is_made_up_for_before_the_gang_grows() {
    let mut gang = Gang::training(&["a", "b", "c"]);
    assert_eq!(gang.wants().map(|wants| (wants.claim, wants.max)), Some((Claim::Growth, 1)));
    let lost = gang.members()[2].clone();
    gang.exits(lost);
    gang.all_built();
    assert_eq!(gang.wants().map(|wants| (wants.claim, wants.max)), Some((Claim::Repair, 1)));
    assert_eq!(kinds(&gang.grant(&["c", "d"])), ["start"], "at once");
    gang.all_ready();
    gang.all_built();
    assert_eq!(gang.wants().map(|wants| (wants.claim, wants.max)), Some((Claim::Growth, 1)));
    // What was scaled away is no loss either, once the gang is as large as is wanted.
    gang.scale(2);
    gang.all_built();
    gang.scale(4);
    assert_eq!(gang.wants().map(|wants| (wants.claim, wants.max)), Some((Claim::Growth, 2)));
}

#[test]
fn run_11_the_newer_wish_wins() {
    let mut gang = Gang::training(&["a", "b"]);
    gang.grant(&["c", "d"]);
    // Trainers that were to join are not wanted any more.
    let effects = gang.scale(3);
    assert_eq!((stopped(&effects), gang.state()), (vec!["d"], RunState::Running));
    let effects = gang.scale(1);
    assert_eq!((stopped(&effects), gang.state(), gang.workers()), (vec!["c"], RunState::Forming, vec!["a"]));
    // While the smaller one forms it is asked to be larger again: it is, after it.
    assert!(gang.scale(4).is_empty());
    assert_eq!(stopped(&gang.all_built()), ["b"]);
    assert_eq!(kinds(&gang.grant(&["b", "c", "d"])), ["start"; 3]);
    gang.all_ready();
    gang.all_built();
    assert_eq!(gang.sizes(), [2, 1, 4]);
}

#[test]
fn scaling_is_refused_outside_the_range_and_after_the_end() {
    let mut gang = Gang::training(&["a", "b"]);
    for workers in [0, 5] {
        let refused = gang.send(Input::Scale { workers }).unwrap_err();
        let told = format!("must be in 1-4 (workers.min to workers.max of the run's spec), not {workers}");
        assert_eq!((refused.to_string(), refused.class()), (told, ErrorClass::Invalid));
    }
    gang.scale(2);
    let before = gang.record.clone();
    assert!(gang.scale(2).is_empty() && gang.record == before, "twice is once");
    gang.effects(Input::Cancel);
    let refused = gang.send(Input::Scale { workers: 1 }).unwrap_err();
    assert_eq!(refused.class(), gang.send(Input::Suspend).unwrap_err().class());
}

#[test]
fn run_11_stages_have_sizes_of_their_own() {
    let mut gang = Gang::new();
    (gang.record.plan.stages[0].workers, gang.record.plan.stages[1].workers) = (Some(2), Some(3));
    assert_eq!(gang.wants().map(|wants| wants.max), Some(2));
    gang.start(&["a", "b"]);
    assert_eq!(gang.wants(), None, "the first stage needs no more");
    gang.stage_ends(0);
    assert_eq!((gang.state(), gang.wants().map(|wants| wants.max)), (RunState::Running, Some(1)));
    assert_eq!(kinds(&gang.grant(&["c", "d"])), ["start"]);
    gang.all_ready();
    gang.all_built();
    // What a user wants holds within that.
    gang.scale(4);
    assert_eq!(gang.wants(), None);
    gang.record.plan.stages[2].workers = Some(1);
    assert_eq!(kinds(&gang.stage_ends(1)), ["propose"]);
    assert_eq!(stopped(&gang.all_built()), ["b", "c"]);
    let last = gang.record.plan.stages.len() - 1;
    gang.record.plan.stages[last].workers = Some(1);
    for stage in 2..=last {
        gang.record.plan.stages[stage].workers = Some(1);
        gang.stage_ends(u32::try_from(stage).unwrap());
    }
    assert_eq!((gang.wants(), gang.sizes()), (None, &[2, 3, 1][..]), "the last stage's size holds to the end");
}

#[test]
fn run_11_a_death_while_it_shrinks_brings_back_who_was_leaving() {
    let mut gang = Gang::training(&["a", "b", "c", "d"]);
    gang.scale(2);
    let dies = gang.members()[1].clone();
    let effects = gang.exits(dies);
    assert_eq!((kinds(&effects), gang.workers()), (vec!["propose", "propose"], vec!["a", "c"]));
    assert_eq!(stopped(&gang.all_built()), ["d"]);
    assert_eq!(gang.sizes(), [4, 2]);
    // Even where all that were to stay die.
    let mut gang = Gang::training(&["a", "b", "c", "d"]);
    gang.scale(1);
    let dies = gang.members()[0].clone();
    gang.exits(dies);
    assert_eq!((gang.state(), gang.workers()), (RunState::Forming, vec!["b"]));
}

/// Who holds a state stays before who has just been started, whatever their names.
#[test]
fn run_11_who_holds_a_state_stays() {
    let mut gang = Gang::training(&["c", "d"]);
    gang.grant(&["a", "b"]);
    gang.all_ready();
    assert_eq!((gang.state(), gang.workers()), (RunState::Forming, vec!["a", "b", "c", "d"]));
    gang.scale(2);
    let dies = gang.members()[3].clone();
    gang.exits(dies);
    assert_eq!(gang.workers(), ["a", "c"]);
}

#[test]
fn run_11_a_new_leader_neither_loses_nor_doubles_a_change() {
    // It knows what is wanted, and starts anew who was to join.
    let mut gang = Gang::training(&["a", "b"]);
    gang.scale(3);
    gang.grant(&["c"]);
    assert_eq!(stopped(&gang.take_over()), ["c"]);
    assert_eq!((gang.state(), gang.wants()), (RunState::Running, None), "not before it knows who keeps what");
    for trainer in gang.members() {
        let worker = trainer.worker.clone();
        gang.effects(Input::TrainersSeen { worker, trainers: vec![trainer] });
    }
    gang.all_ready();
    assert_eq!(kinds(&gang.grant(&["c", "d"])), ["start"]);
    gang.all_ready();
    gang.all_built();
    assert_eq!(gang.sizes(), [2, 3]);
    // A wish that was stored and not acted on is acted on.
    gang.record.scale = Some(1);
    gang.take_over();
    for trainer in gang.members() {
        let worker = trainer.worker.clone();
        gang.effects(Input::TrainersSeen { worker, trainers: vec![trainer] });
    }
    gang.all_ready();
    assert_eq!(kinds(&gang.grant(&[])), ["propose"]);
    // Who stays is kept by the next leader too; who was about to leave is stopped.
    assert_eq!(stopped(&gang.take_over()), ["b", "c"]);
    assert_eq!((gang.state(), gang.record.held_slots().count()), (RunState::Forming, 1));
    let first = gang.members()[0].clone();
    gang.effects(Input::TrainersSeen { worker: "a".into(), trainers: vec![first] });
    assert_eq!(kinds(&gang.all_ready()), ["propose"]);
    gang.all_built();
    assert_eq!((gang.state(), gang.sizes()), (RunState::Running, &[2, 3, 1][..]));
}

#[test]
fn run_11_without_a_gang_the_next_one_has_the_wanted_size() {
    let mut gang = Gang::new();
    gang.scale(2);
    assert_eq!(gang.wants().map(|wants| (wants.claim, wants.min, wants.max)), Some((Claim::Start, 1, 2)));
    gang.start(&["a", "b"]);
    gang.effects(Input::Suspend);
    gang.scale(3);
    let (trainer, generation) = (gang.members()[0].clone(), gang.record.generation);
    let written =
        Input::CheckpointWritten { trainer: trainer.clone(), generation, checkpoint: checkpoint(generation, 5) };
    gang.effects(written);
    gang.effects(Input::Suspended { trainer, generation });
    assert_eq!(gang.state(), RunState::Suspended);
    gang.effects(Input::Resume);
    gang.start(&["a", "b", "c"]);
    // While it forms: once it trains.
    let mut gang = Gang::new();
    gang.grant(&["a", "b", "c", "d"]);
    assert!(gang.scale(1).is_empty());
    gang.all_ready();
    gang.all_built();
    assert_eq!((gang.state(), gang.sizes()), (RunState::Running, &[4][..]));
    assert_eq!(kinds(&gang.grant(&[])), ["propose"]);
}

/// Where a change would stop everybody it waits for the next gang.
#[test]
fn trainers_that_do_not_keep_their_state_are_left_alone() {
    let mut gang = Gang::training(&["a", "b", "c"]);
    gang.observed.keepers.clear();
    assert!(gang.scale(1).is_empty() && gang.grant(&["d"]).is_empty());
    assert_eq!((gang.state(), gang.record.members.len(), gang.wants()), (RunState::Running, 3, None));
    let lost = gang.members()[0].clone();
    gang.exits(lost);
    for trainer in gang.members() {
        gang.exits(trainer);
    }
    assert_eq!(gang.wants().map(|wants| wants.max), Some(1));
}

/// RUN-4: an end stops who leaves and who is to join.
#[test]
fn run_11_an_end_in_the_middle_leaves_nobody() {
    for input in [Input::Cancel, Input::Suspend] {
        let mut gang = Gang::training(&["a", "b", "c", "d"]);
        gang.scale(2);
        if input == Input::Suspend {
            // What the gang holds is saved first, by those that stay.
            assert!(gang.effects(input.clone()).is_empty());
            assert_eq!(kinds(&gang.all_built()), ["commit", "commit", "stop", "stop", "suspend", "suspend"]);
            let (trainer, generation) = (gang.members()[0].clone(), gang.record.generation);
            assert_eq!(stopped(&gang.effects(Input::Suspended { trainer, generation })), ["a", "b"]);
        } else {
            assert_eq!(stopped(&gang.effects(input.clone())), ["a", "b", "c", "d"]);
        }
        assert_eq!(gang.record.held_slots().count(), 0);
        let mut gang = Gang::training(&["a", "b"]);
        gang.grant(&["c", "d"]);
        gang.effects(input.clone());
        if input == Input::Suspend {
            let (trainer, generation) = (gang.members()[0].clone(), gang.record.generation);
            gang.effects(Input::Suspended { trainer, generation });
        }
        assert_eq!(gang.record.held_slots().count(), 0);
    }
}

fn other() -> RunId {
    "other-00000002".into()
}

/// RUN-12: it saves, waits in the queue again, and goes on from what it saved.
#[test]
fn run_12_a_run_that_yields_saves_and_comes_back_by_itself() {
    let mut gang = Gang::training(&["a", "b"]);
    gang.grant(&["c", "d"]);
    gang.now_ms += 1000;
    let effects = gang.effects(Input::Yield { to: other() });
    assert_eq!(kinds(&effects), ["stop", "stop", "suspend", "suspend"], "who was to join is stopped");
    assert_eq!((gang.state(), gang.record.reason), (RunState::Preempting, RunReason::Preempted));
    assert_eq!((gives_up(&gang.record), holds_slots(&gang.record, &gang.observed)), (2, None));
    let (trainer, generation) = (gang.members()[0].clone(), gang.record.generation);
    let checkpoint = checkpoint(generation, 17);
    gang.effects(Input::CheckpointWritten { trainer: trainer.clone(), generation, checkpoint: checkpoint.clone() });
    let effects = gang.effects(Input::Suspended { trainer, generation });
    assert_eq!(stopped(&effects), ["a", "b"]);
    assert_eq!((gang.state(), gang.record.message.as_str()), (RunState::Pending, "yielded at step 17: saved"));
    let wants = gang.wants().unwrap();
    assert_eq!((wants.claim, wants.min, wants.since_ms), (Claim::Start, 1, gang.now_ms));
    gang.now_ms += 60_000;
    gang.start(&["c", "d"]);
    assert_eq!((gang.record.attempt.0, gang.record.placed_ms), (2, gang.now_ms));
    assert_eq!((gang.record.head.clone(), gang.record.failures_without_progress), (Some(checkpoint), 0));
}

/// RUN-12: what is committed is kept, however the saving ends.
#[test]
fn run_12_a_run_that_cannot_save_yields_from_its_head() {
    let preempting = || {
        let mut gang = Gang::training(&["a", "b"]);
        let (trainer, generation) = (gang.members()[0].clone(), gang.record.generation);
        gang.effects(Input::CheckpointWritten { trainer, generation, checkpoint: checkpoint(generation, 10) });
        gang.effects(Input::Yield { to: other() });
        gang
    };
    let yielded = |gang: &Gang| {
        assert_eq!(
            (gang.state(), gang.record.position.step, gang.record.held_slots().count()),
            (RunState::Pending, Step(10), 0)
        );
    };
    let mut gang = preempting();
    let lost = gang.members()[1].clone();
    assert_eq!(stopped(&gang.exits(lost)), ["a"]);
    yielded(&gang);
    let mut gang = preempting();
    gang.now_ms += Policy::default().suspend_timeout_ms;
    assert_eq!(stopped(&gang.grant(&[])), ["a", "b"]);
    yielded(&gang);
    // A new leader asks again, and gives up who does not come back.
    let mut gang = preempting();
    assert!(gang.take_over().is_empty());
    let first = gang.members()[0].clone();
    let again = gang.effects(Input::TrainersSeen { worker: "a".into(), trainers: vec![first] });
    assert_eq!(kinds(&again), ["suspend"]);
    gang.now_ms += Policy::default().reattach_timeout_ms;
    gang.grant(&[]);
    yielded(&gang);
    // A user's wish to suspend it wins over coming back.
    let mut gang = preempting();
    assert!(gang.effects(Input::Suspend).is_empty());
    let (trainer, generation) = (gang.members()[0].clone(), gang.record.generation);
    gang.effects(Input::Suspended { trainer, generation });
    assert_eq!(gang.state(), RunState::Suspended);
}

/// RUN-11: once it is that small it may grow again, after whoever waits for slots.
#[test]
fn a_gang_that_cedes_is_smaller_until_slots_are_free_again() {
    let mut gang = Gang::training(&["a", "b", "c", "d"]);
    let effects = gang.effects(Input::Cede { workers: 2, to: other() });
    assert_eq!((kinds(&effects), gives_up(&gang.record)), (vec!["propose", "propose"], 2));
    assert_eq!(holds_slots(&gang.record, &gang.observed), None, "not asked twice");
    gang.all_built();
    assert_eq!((gang.sizes(), gives_up(&gang.record), gang.record.ceded), (&[4, 2][..], 0, None));
    assert_eq!(gang.wants().map(|wants| (wants.claim, wants.max)), Some((Claim::Growth, 2)));
    let held = holds_slots(&gang.record, &gang.observed).unwrap();
    assert_eq!((held.size, held.min, held.shrinks), (2, 1, true));
    // It is never asked for less than it needs, and not twice for the same.
    assert_eq!(kinds(&gang.effects(Input::Cede { workers: 0, to: other() })), ["propose"]);
    gang.all_built();
    assert!(gang.effects(Input::Cede { workers: 1, to: other() }).is_empty());
    assert_eq!(gang.sizes(), [4, 2, 1]);
}
