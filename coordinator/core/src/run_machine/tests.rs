//! One run taken through its life by hand.

use super::*;
use crate::gang::FreeSlot;
use crate::scheduler;
use crate::test_support::{evaluation, plan_of, spec};
use serde_json::json;
use thaw_proto::ids::{Attempt, Slot};

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

    fn send(&mut self, input: Input) -> Result<(Vec<Effect>, Vec<Event>), Rejection> {
        let outcome = step(&Policy::default(), &self.record, &self.observed, self.now_ms, &input)?;
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
        let waiting: Vec<Waiting> = wants_slots(&self.record, &self.observed, self.now_ms).into_iter().collect();
        let none = BTreeMap::new();
        let verdicts =
            scheduler::schedule(&scheduler::Policy::default(), self.now_ms, &none, &BTreeMap::new(), &waiting, &free);
        verdicts.into_values().next()
    }

    fn tick(&mut self) -> Input {
        self.minted += 2;
        Input::Tick {
            slots: self.granted(&["a", "b"]),
            fresh: vec![Incarnation(format!("i{}", self.minted - 1)), Incarnation(format!("i{}", self.minted))],
        }
    }

    fn trainer(&self, rank: usize) -> Trainer {
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

    fn all_ready(&mut self) -> Vec<Effect> {
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

    fn all_built(&mut self) -> Vec<Effect> {
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
        Input::TrainerExited { trainer: self.trainer(rank), ending: "signal 9".to_owned() }
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

#[test]
fn a_run_from_submission_to_success() {
    let mut script = Script::new();
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["start", "start"]);
    assert_eq!(
        (script.record.state, script.record.generation, script.record.attempt),
        (RunState::Admitted, Generation(1), Attempt(1))
    );
    let proposals = script.all_ready();
    assert_eq!(kinds(&proposals), ["propose", "propose"]);
    let Effect::Propose(second) = &proposals[1] else { panic!("{proposals:?}") };
    assert_eq!((second.rank, second.addresses.len(), &second.resume), (Rank(1), 2, &None));
    assert_eq!(kinds(&script.all_built()), ["commit", "commit"]);
    assert_eq!(
        (script.record.state, script.record.start_ms, &script.record.world_sizes[..]),
        (RunState::Running, Some(1000), &[2][..])
    );
    let written = script.checkpoint(10);
    assert_eq!(kinds(&script.effects(written)), ["ack"]);
    let ended =
        Input::StageEnded { trainer: script.trainer(0), generation: Generation(1), result: Box::new(stage_result(0)) };
    let (_, events) = script.send(ended).unwrap();
    assert_eq!(events[0].message, "stage head ended after 10 steps: MaxEpochs, loss 0.5000");
    let finished = script.finished(10);
    assert_eq!(kinds(&script.effects(finished)), ["stop", "stop"]);
    assert_eq!(
        (script.record.state, script.record.reason, script.record.end_ms),
        (RunState::Succeeded, RunReason::NoGain, Some(1000))
    );
    assert!(script.record.result.is_some() && script.record.members.is_empty());
}

/// A stored record is the same record.
#[test]
fn a_record_survives_json() {
    let script = Script::running();
    let text = serde_json::to_string(&script.record).unwrap();
    assert_eq!(serde_json::from_str::<RunRecord>(&text).unwrap(), script.record);
}

/// RUN-1, RUN-6: after a loss the others stop first; then the next generation starts from the head.
#[test]
fn run_1_run_6_a_lost_trainer_gives_the_next_generation() {
    let mut script = Script::running();
    let written = script.checkpoint(20);
    script.effects(written);
    let (lost, survivor) = (script.exited(1), script.trainer(0));
    assert_eq!(script.effects(lost), [Effect::StopTrainer { trainer: survivor.clone(), generation: Generation(1) }]);
    assert_eq!((script.record.state, script.record.reason), (RunState::Resizing, RunReason::TrainerLost));
    let tick = script.tick();
    assert!(script.effects(tick).is_empty());
    script.effects(Input::TrainerExited { trainer: survivor.clone(), ending: "signal 9".into() });
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["start", "start"]);
    assert_eq!(script.record.generation, Generation(2));
    let proposals = script.all_ready();
    let Effect::Propose(first) = &proposals[0] else { panic!("{proposals:?}") };
    assert_eq!(first.resume, Some(checkpoint(Generation(1), 20)));
    // RUN-2: the old generation is refused by number.
    let late = Input::CheckpointWritten {
        trainer: survivor,
        generation: Generation(1),
        checkpoint: checkpoint(Generation(1), 30),
    };
    let refused = script.send(late).unwrap_err();
    assert_eq!(refused.to_string(), "generation 1 is over: the run is at generation 2");
    assert_eq!(refused.class(), ErrorClass::Fenced);
}

/// RUN-6: a member that nobody reports holds the run up only until the deadline.
#[test]
fn run_6_a_silent_member_is_given_up() {
    let mut script = Script::running();
    let lost = script.exited(1);
    script.effects(lost);
    script.now_ms += Policy::default().stop_timeout_ms - 1;
    let tick = script.tick();
    assert!(script.effects(tick).is_empty());
    script.now_ms += 1;
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["start", "start"]);
}

#[test]
fn run_2_only_rank_0_commits() {
    let mut script = Script::running();
    let input = Input::CheckpointWritten {
        trainer: script.trainer(1),
        generation: Generation(1),
        checkpoint: checkpoint(Generation(1), 5),
    };
    assert_eq!(script.send(input).unwrap_err(), Rejection::NotCommitter { rank: Rank(1) });
    let stranger = Trainer { incarnation: "other".into(), ..script.trainer(0) };
    let input = Input::CheckpointWritten {
        trainer: stranger,
        generation: Generation(1),
        checkpoint: checkpoint(Generation(1), 5),
    };
    assert!(matches!(script.send(input).unwrap_err(), Rejection::UnknownTrainer { .. }));
}

#[test]
fn run_3_the_head_never_goes_back() {
    let mut script = Script::running();
    let (ten, nine) = (script.checkpoint(10), script.checkpoint(9));
    script.effects(ten.clone());
    assert!(matches!(script.send(nine).unwrap_err(), Rejection::HeadWouldGoBack { .. }));
    // Said twice, answered twice.
    assert_eq!(kinds(&script.effects(ten)), ["ack"]);
    assert_eq!(script.record.position.step, Step(10));
}

#[test]
fn run_5_success_needs_a_committed_last_step() {
    let mut script = Script::running();
    let early = script.finished(10);
    assert_eq!(script.send(early.clone()).unwrap_err(), Rejection::NotCommitted { step: Step(10) });
    let written = script.checkpoint(10);
    script.effects(written);
    script.effects(early);
    assert_eq!(script.record.state, RunState::Succeeded);
}

/// RUN-7: five generations in a row without a step end the run; a committed one starts the count again.
#[test]
fn run_7_no_progress_ends_the_run() {
    let mut script = Script::new();
    let lose = |script: &mut Script, with_progress: bool| {
        script.now_ms += Policy::default().stop_timeout_ms;
        let tick = script.tick();
        script.effects(tick);
        script.all_ready();
        script.all_built();
        if with_progress {
            let written = script.checkpoint(10);
            script.effects(written);
        }
        let lost = script.exited(0);
        script.effects(lost);
    };
    for with_progress in [false, false, false, false, true, false, false, false] {
        lose(&mut script, with_progress);
        assert_eq!(script.record.state, RunState::Resizing);
    }
    lose(&mut script, false);
    assert_eq!((script.record.state, script.record.reason), (RunState::Failed, RunReason::NoProgress));
    assert!(script.record.message.starts_with("5 generations in a row"), "{}", script.record.message);
}

#[test]
fn a_trainers_verdict_decides_between_failing_and_trying_again() {
    for class in [FailureClass::Invalid, FailureClass::Fatal] {
        let mut script = Script::running();
        let failed = script.failed(class);
        assert_eq!(kinds(&script.effects(failed)), ["stop", "stop"]);
        assert_eq!((script.record.state, script.record.reason), (RunState::Failed, RunReason::TrainerError));
        assert_eq!(script.record.message, "rank 1 on b slot 0: the label `x` is unknown");
    }
    for class in [FailureClass::Retry, FailureClass::Fenced] {
        let mut script = Script::running();
        let failed = script.failed(class);
        assert_eq!(kinds(&script.effects(failed)), ["stop", "stop"]);
        assert_eq!((script.record.state, script.record.members.len()), (RunState::Resizing, 2));
    }
    let mut script = Script::admitted();
    let Input::TrainerFailed { trainer, class, reason, message, .. } = script.failed(FailureClass::Invalid) else {
        panic!()
    };
    script.effects(Input::TrainerFailed { trainer, generation: Generation(0), class, reason, message });
    assert_eq!(script.record.state, RunState::Failed);
}

/// A gang that does not form in time is formed again, without those that were late where there are others.
#[test]
fn a_late_trainer_is_left_out() {
    let mut script = Script::forming();
    let prompt = script.trainer(0);
    script.effects(Input::GangBuilt { trainer: prompt, generation: Generation(1) });
    script.now_ms += Policy::default().forming_timeout_ms;
    let tick = script.tick();
    script.effects(tick);
    assert_eq!((script.record.state, script.record.reason), (RunState::Resizing, RunReason::GangTimeout));
    assert_eq!(script.record.message, "trainer(s) on b slot 0 did not join the gang in time");
    script.now_ms += Policy::default().stop_timeout_ms;
    let tick = script.tick();
    assert!(script.effects(tick).is_empty(), "it waits a moment for more of its maximum");
    script.now_ms += Policy::default().gather_ms;
    let tick = script.tick();
    let effects = script.effects(tick);
    assert!(
        matches!(&effects[..], [Effect::StartTrainer { trainer, .. }] if trainer.worker.as_str() == "a"),
        "{effects:?}"
    );
}

#[test]
fn a_run_waits_for_workers_and_says_so_once() {
    let mut script = Script::new();
    let nothing = Input::Tick { slots: script.granted(&[]), fresh: Vec::new() };
    let (_, events) = script.send(nothing.clone()).unwrap();
    assert_eq!((events.len(), script.record.message.as_str()), (1, "needs 1 free slot(s)"));
    assert!(script.send(nothing).unwrap().1.is_empty());
    script.now_ms += 10_000;
    let refused = script.send(Input::Tick { slots: script.granted(&["a", "b"]), fresh: Vec::new() }).unwrap_err();
    assert_eq!(refused, Rejection::TooFewIncarnations { needed: 2, given: 0 });
}

#[test]
fn suspend_and_resume() {
    let mut script = Script::running();
    assert_eq!(kinds(&script.effects(Input::Suspend)), ["suspend", "suspend"]);
    let written = script.checkpoint(12);
    script.effects(written);
    let stopped = Input::Suspended { trainer: script.trainer(0), generation: Generation(1) };
    assert_eq!(kinds(&script.effects(stopped)), ["stop", "stop"]);
    assert_eq!((script.record.state, script.record.message.as_str()), (RunState::Suspended, "suspended at step 12"));
    script.effects(Input::Resume);
    assert_eq!((script.record.state, script.record.attempt), (RunState::Pending, Attempt(2)));
    let tick = script.tick();
    script.effects(tick);
    assert_eq!((script.record.attempt, script.record.generation), (Attempt(2), Generation(2)));
}

#[test]
fn a_suspension_that_never_saves_ends_by_its_deadline() {
    let mut script = Script::running().after(Input::Suspend);
    script.now_ms += Policy::default().suspend_timeout_ms;
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["stop", "stop"]);
    assert_eq!(script.record.state, RunState::Suspended);
}

fn taken_over(script: Script) -> Script {
    let mut script = script;
    script.observed = Observed::default();
    assert!(script.effects(Input::CoordinatorStarted).is_empty());
    script
}

fn seen(worker: &str, trainers: &[Trainer]) -> Input {
    Input::TrainersSeen { worker: worker.into(), trainers: trainers.to_vec() }
}

#[test]
fn run_9_a_gang_that_trains_goes_on_under_a_new_coordinator() {
    let mut script = taken_over(Script::running());
    let (first, second) = (script.trainer(0), script.trainer(1));
    assert!(script.effects(seen("a", std::slice::from_ref(&first))).is_empty());
    script.now_ms += Policy::default().reattach_timeout_ms - 1;
    let tick = script.tick();
    assert!(script.effects(tick).is_empty(), "nobody is lost before the limit");
    assert!(script.effects(seen("b", std::slice::from_ref(&second))).is_empty());
    script.now_ms += 1;
    let tick = script.tick();
    assert!(script.effects(tick).is_empty());
    assert_eq!((script.record.state, script.record.generation), (RunState::Running, Generation(1)));
    // What was said while nobody listened is said again, and answered.
    let written = script.checkpoint(10);
    assert_eq!(kinds(&script.effects(written)), ["ack"]);
    // From now on it is missed as ever.
    script.effects(seen("b", &[]));
    assert_eq!((script.record.state, script.record.reason), (RunState::Resizing, RunReason::TrainerLost));
}

#[test]
fn run_9_who_does_not_come_back_is_lost_and_no_failure_of_the_run() {
    let mut script = taken_over(Script::running());
    let first = script.trainer(0);
    script.effects(seen("a", std::slice::from_ref(&first)));
    script.now_ms += Policy::default().reattach_timeout_ms;
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["stop"]);
    assert_eq!((script.record.state, script.record.reason), (RunState::Resizing, RunReason::CoordinatorRestarted));
    assert!(script.record.message.contains("b slot 0"), "{}", script.record.message);
    assert_eq!(script.record.failures_without_progress, 0, "RUN-7");
    // A worker that came back without its trainer says so at once; what becomes of the others follows from what they say.
    let mut script = taken_over(Script::running());
    let second = script.trainer(1);
    assert!(script.effects(seen("a", &[])).is_empty());
    script.effects(seen("b", std::slice::from_ref(&second)));
    assert_eq!(script.record.state, RunState::Running);
    let listens = Input::TrainerReady { trainer: second, address: "h:1".to_owned(), keeps: false };
    assert_eq!(kinds(&script.effects(listens)), ["stop"]);
    assert_eq!((script.record.state, script.record.reason), (RunState::Resizing, RunReason::CoordinatorRestarted));
    assert_eq!(script.record.failures_without_progress, 0, "RUN-7");
}

#[test]
fn a_suspension_goes_on_under_a_new_coordinator() {
    let mut script = taken_over(Script::running().after(Input::Suspend));
    let (first, second) = (script.trainer(0), script.trainer(1));
    for (worker, trainer) in [("a", &first), ("b", &second)] {
        let generation = Generation(1);
        let again = Effect::SuspendTrainer { trainer: trainer.clone(), generation };
        assert_eq!(script.effects(seen(worker, std::slice::from_ref(trainer))), [again]);
        assert!(script.effects(seen(worker, std::slice::from_ref(trainer))).is_empty(), "said once");
    }
    script.effects(Input::Suspended { trainer: first, generation: Generation(1) });
    assert_eq!(script.record.state, RunState::Suspended);
}

#[test]
fn a_started_coordinator_forms_a_gang_again_that_did_not_train() {
    let mut script = Script::forming();
    let old = script.trainer(0);
    script.observed = Observed::default();
    assert_eq!(kinds(&script.effects(Input::CoordinatorStarted)), ["stop", "stop"]);
    assert_eq!((script.record.state, script.record.reason), (RunState::Resizing, RunReason::CoordinatorRestarted));
    assert_eq!(script.record.failures_without_progress, 0);
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["start", "start"]);
    // RUN-8: a straggler of the old gang is stopped when it is seen.
    let stop = Effect::StopTrainer { trainer: old.clone(), generation: Generation(2) };
    assert_eq!(script.effects(seen("a", &[old])), [stop]);
}

#[test]
fn run_8_a_trainer_that_its_worker_no_longer_has_is_lost() {
    let mut script = Script::admitted();
    let nothing = Input::TrainersSeen { worker: "a".into(), trainers: Vec::new() };
    assert!(script.effects(nothing.clone()).is_empty(), "it may be starting still");
    script.all_ready();
    script.effects(nothing);
    assert_eq!(script.record.state, RunState::Resizing);
}

#[test]
fn a_lost_worker_is_the_loss_of_its_trainers() {
    let mut script = Script::running();
    assert_eq!(kinds(&script.effects(Input::WorkerLost { worker: "b".into() })), ["stop"]);
    assert_eq!(script.record.message, "worker b is lost");
    assert!(script.effects(Input::WorkerLost { worker: "c".into() }).is_empty());
    script.effects(Input::WorkerLost { worker: "a".into() });
    assert_eq!((script.record.failures_without_progress, script.record.members.len()), (1, 0));
}

#[test]
fn stages_end_in_order_and_once() {
    let mut script = Script::running();
    let ended = |script: &Script, stage| Input::StageEnded {
        trainer: script.trainer(0),
        generation: Generation(1),
        result: Box::new(stage_result(stage)),
    };
    let (first, second) = (ended(&script, 0), ended(&script, 1));
    assert_eq!(
        script.send(second).unwrap_err(),
        Rejection::StageOutOfOrder { given: StageIndex(1), expected: StageIndex(0) }
    );
    script.effects(first.clone());
    script.effects(first);
    assert_eq!(script.record.stage_results.len(), 1);
}

fn ready(trainer: &Trainer, address: &str) -> Input {
    Input::TrainerReady { trainer: trainer.clone(), address: address.to_owned(), keeps: true }
}

/// RUN-10: the survivor is proposed the next generation at once; what was lost is started meanwhile and joins at one of its own.
#[test]
fn run_10_survivors_are_the_next_gang_and_others_join_later() {
    let mut script = Script::keeping();
    let (lost, survivor) = (script.exited(1), script.trainer(0));
    let effects = script.effects(lost);
    let [Effect::Propose(proposal)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((&proposal.trainer, proposal.generation, proposal.rank), (&survivor, Generation(2), Rank(0)));
    assert_eq!((script.record.state, script.record.reason), (RunState::Forming, RunReason::TrainerLost));
    script.effects(Input::GangBuilt { trainer: survivor.clone(), generation: Generation(2) });
    assert_eq!(
        (script.record.state, script.record.message.as_str()),
        (RunState::Running, "1 trainer(s) train on from where they were")
    );
    let tick = Input::Tick { slots: script.granted(&["b"]), fresh: vec!["j".into()] };
    let effects = script.effects(tick);
    let [Effect::StartTrainer { trainer: joiner, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((script.record.state, script.record.held_slots().count()), (RunState::Running, 2));
    // Its heartbeat is no stranger's, and nobody else is started for it.
    assert!(script.effects(seen("b", std::slice::from_ref(joiner))).is_empty());
    assert_eq!(script.granted(&["c"]), None);
    let effects = script.effects(ready(joiner, "h:7"));
    let [Effect::Propose(first), Effect::Propose(second)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((&first.trainer, &second.trainer, second.generation), (&survivor, joiner, Generation(3)));
    assert_eq!(first.addresses, ["h:0", "h:7"]);
    assert!(script.record.joining.is_empty());
    script.all_built();
    assert_eq!((script.record.state, &script.record.world_sizes[..]), (RunState::Running, &[2, 1, 2][..]));
}

/// RUN-10: too few are left to train: they wait with what they hold, and are the gang with whoever comes.
#[test]
fn run_10_too_few_survivors_wait_for_others_and_not_for_ever() {
    let too_few = || {
        let mut script = Script::keeping();
        script.record.spec.workers.min = 2;
        let lost = script.exited(1);
        assert!(script.effects(lost).is_empty(), "the survivor is neither stopped nor proposed a gang");
        assert_eq!((script.record.state, script.record.members.len()), (RunState::Resizing, 1));
        script
    };
    let mut script = too_few();
    let survivor = script.trainer(0);
    assert!(script.effects(seen("a", std::slice::from_ref(&survivor))).is_empty(), "it is not stopped later either");
    let tick = Input::Tick { slots: script.granted(&["b"]), fresh: vec!["j".into()] };
    assert_eq!(kinds(&script.effects(tick)), ["start"]);
    assert_eq!((script.record.state, script.record.generation), (RunState::Admitted, Generation(2)));
    let joiner = script.trainer(1);
    assert_eq!(kinds(&script.effects(ready(&joiner, "h:7"))), ["propose", "propose"]);

    let mut script = too_few();
    script.now_ms += Policy::default().keep_timeout_ms;
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["stop"]);
    assert_eq!((script.record.state, script.record.reason), (RunState::Resizing, RunReason::WaitingForWorkers));
}

/// RUN-2: a survivor that waits for a gang may be first among those left, and is no rank 0 of the gang that it was in.
#[test]
fn run_2_a_survivor_that_waits_commits_nothing() {
    let mut script = Script::keeping();
    script.record.spec.workers.min = 2;
    let lost = script.exited(0);
    script.effects(lost);
    assert_eq!((script.record.state, script.record.members[0].rank), (RunState::Resizing, Rank(0)));
    let late = script.checkpoint(5);
    let refused = script.send(late).unwrap_err();
    assert_eq!(refused, Rejection::NotLegal { operation: "commit a checkpoint", state: RunState::Resizing });
    assert_eq!(script.record.head, None);
}

/// A gang that says it is broken is formed again with all its members, unless a loss explains it in time.
#[test]
fn a_broken_gang_without_a_loss_is_mended() {
    let interrupted = |script: &Script| Input::TrainerInterrupted {
        trainer: script.trainer(1),
        generation: script.record.generation,
        message: "reduce_shards_f32 7 lost rank 0".to_owned(),
    };
    let mut script = Script::keeping();
    let input = interrupted(&script);
    assert!(script.effects(input).is_empty());
    script.now_ms += Policy::default().broken_timeout_ms - 1;
    let tick = script.tick();
    assert!(script.effects(tick).is_empty());
    script.now_ms += 1;
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["propose", "propose"]);
    assert!(script.record.message.contains("lost rank 0"), "{}", script.record.message);
    // A loss in time is the reason, and the word of it is forgotten.
    let mut script = Script::keeping();
    let input = interrupted(&script);
    script.effects(input);
    let lost = script.exited(0);
    assert_eq!(kinds(&script.effects(lost)), ["propose"]);
    script.now_ms += Policy::default().broken_timeout_ms;
    let tick = Input::Tick { slots: None, fresh: Vec::new() };
    assert!(script.effects(tick).is_empty());
    assert_eq!(script.record.generation, Generation(2));
}

/// RUN-7: without a new step survivors do not go on for ever; with one they do.
#[test]
fn run_7_a_gang_that_keeps_breaking_at_one_step_ends_the_run() {
    let lose = |script: &mut Script, step: u64| {
        let generation = script.record.generation;
        script.effects(Input::Progressed { generation, step: Step(step) });
        let lost = script.exited(1);
        script.effects(lost);
        if script.record.state.has_ended() {
            return;
        }
        let (generation, survivor) = (script.record.generation, script.trainer(0));
        script.effects(Input::GangBuilt { trainer: survivor, generation });
        let tick = Input::Tick { slots: script.granted(&["b"]), fresh: vec![Incarnation(format!("j{generation}"))] };
        script.effects(tick);
        let joiner = script.record.joining[0].clone();
        script.effects(ready(&joiner, "h:7"));
        script.all_built();
    };
    let mut script = Script::keeping();
    for step in 1..20 {
        lose(&mut script, step);
    }
    assert_eq!((script.record.state, script.record.failures_without_progress), (RunState::Running, 1));
    for _ in 0..4 {
        lose(&mut script, 19);
    }
    assert_eq!((script.record.state, script.record.reason), (RunState::Failed, RunReason::NoProgress));
}

/// RUN-7: one fault ends several trainers at once, and each end is heard of by itself.
#[test]
fn run_7_trainers_that_end_together_are_one_failure() {
    let mut script = Script::keeping();
    for slot in 10..16 {
        let incarnation = Incarnation(format!("n{slot}"));
        let trainer = Trainer { worker: "b".into(), slot: Slot(slot), incarnation: incarnation.clone() };
        script.record.members.push(Member { rank: Rank(slot), trainer });
        script.observed.addresses.insert(incarnation.clone(), format!("h:{slot}"));
        script.observed.keepers.insert(incarnation);
    }
    let lose_last = |script: &mut Script| {
        let trainer = script.record.members.last().unwrap().trainer.clone();
        script.effects(Input::TrainerExited { trainer, ending: "signal 9".into() });
    };
    (0..6).for_each(|_| lose_last(&mut script));
    assert_eq!((script.record.state, script.record.members.len()), (RunState::Forming, 2));
    assert_eq!(script.record.failures_without_progress, 1);
    script.now_ms += Policy::default().broken_timeout_ms;
    lose_last(&mut script);
    assert_eq!(script.record.failures_without_progress, 2, "later it is another");
}

/// What survivors hold is not given up for a suspension that is asked for while their gang forms again.
#[test]
fn survivors_save_before_they_are_suspended() {
    let mut script = Script::keeping();
    let lost = script.exited(1);
    script.effects(lost);
    assert!(script.effects(Input::Suspend).is_empty());
    assert_eq!(script.record.state, RunState::Forming);
    let (generation, survivor) = (script.record.generation, script.trainer(0));
    let effects = script.effects(Input::GangBuilt { trainer: survivor.clone(), generation });
    assert_eq!(kinds(&effects), ["commit", "suspend"]);
    assert_eq!(script.record.state, RunState::Suspending);
    script.effects(Input::Suspended { trainer: survivor, generation });
    assert_eq!((script.record.state, script.record.suspends_next), (RunState::Suspended, false));
}

/// RUN-9: a loss of which a new leader hears first is acted on once it knows who survives; survivors that were forming are proposed anew.
#[test]
fn run_9_survivors_outlive_their_leader() {
    let new_leader = |script: &mut Script| {
        script.observed = Observed::default();
        assert!(script.effects(Input::CoordinatorStarted).is_empty());
    };
    let mut script = Script::keeping();
    new_leader(&mut script);
    let (lost, survivor) = (script.trainer(1), script.trainer(0));
    assert!(script.effects(seen("a", std::slice::from_ref(&survivor))).is_empty(), "nobody is stopped");
    let exited = Input::TrainerExited { trainer: lost, ending: "signal 9".into() };
    assert!(script.effects(exited).is_empty(), "the other has yet to say that it listens");
    let effects = script.effects(ready(&survivor, "h:0"));
    assert_eq!(kinds(&effects), ["propose"]);
    // The leader ends before it hears that the gang is built.
    new_leader(&mut script);
    assert_eq!((script.record.state, script.record.generation), (RunState::Forming, Generation(2)));
    assert!(script.effects(seen("a", std::slice::from_ref(&survivor))).is_empty());
    let effects = script.effects(ready(&survivor, "h:0"));
    let [Effect::Propose(proposal)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((&proposal.trainer, proposal.generation), (&survivor, Generation(3)));
}

/// A trainer that cannot join is no failure of the run that trains without it.
#[test]
fn a_joiner_that_fails_leaves_the_gang_alone() {
    let mut script = Script::keeping();
    let lost = script.exited(1);
    script.effects(lost);
    let survivor = script.trainer(0);
    script.effects(Input::GangBuilt { trainer: survivor, generation: Generation(2) });
    let tick = Input::Tick { slots: script.granted(&["b"]), fresh: vec!["j".into()] };
    script.effects(tick);
    let failed = Input::TrainerFailed {
        trainer: script.record.joining[0].clone(),
        generation: Generation(0),
        class: FailureClass::Invalid,
        reason: RunReason::TrainerError,
        message: "cannot open the data".to_owned(),
    };
    assert_eq!(kinds(&script.effects(failed)), ["stop"]);
    assert_eq!((script.record.state, script.record.generation), (RunState::Running, Generation(2)));
    assert_eq!(script.granted(&["b"]), None, "not at once again");
    script.now_ms += Policy::default().rejoin_wait_ms;
    assert!(script.granted(&["b"]).is_some());
    // RUN-4: an end stops who is joining too.
    let tick = Input::Tick { slots: script.granted(&["b"]), fresh: vec!["k".into()] };
    script.effects(tick);
    assert_eq!(kinds(&script.effects(Input::Cancel)), ["stop", "stop"]);
    assert_eq!(script.record.held_slots().count(), 0);
}
