//! One run taken through its life by hand.

use super::script::{Script, checkpoint, kinds, seen, stage_result};
use super::*;
use crate::scheduler;
use thaw_proto::ids::{Attempt, StageIndex};
use thaw_proto::status::ErrorClass;

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
    script.effects(Input::TrainerExited { trainer: survivor.clone(), ending: Ending::Signal(9) });
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
    let nothing = Input::Tick { resting: None, slots: script.granted(&[]), fresh: Vec::new() };
    let (_, events) = script.send(nothing.clone()).unwrap();
    assert_eq!((events.len(), script.record.message.as_str()), (1, "needs 1 free slot(s)"));
    assert!(script.send(nothing).unwrap().1.is_empty());
    script.now_ms += 10_000;
    let nobody = Input::Tick { resting: None, slots: script.granted(&["a", "b"]), fresh: Vec::new() };
    let refused = script.send(nobody).unwrap_err();
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
    assert_eq!(kinds(&script.effects(Input::WorkersLost { workers: vec!["b".into()] })), ["stop"]);
    assert_eq!(script.record.message, "worker b is lost");
    assert!(script.effects(Input::WorkersLost { workers: vec!["c".into()] }).is_empty());
    script.effects(Input::WorkersLost { workers: vec!["a".into()] });
    assert_eq!((script.record.failures_without_progress, script.record.members.len()), (1, 0));
}

/// However many hosts a rack had: the others begin anew once, and one failure is counted.
#[test]
fn workers_that_are_lost_together_cost_one_generation() {
    let mut script = Script::running();
    let workers: Vec<WorkerName> = script.record.members.iter().map(|member| member.trainer.worker.clone()).collect();
    assert_eq!(workers.len(), 2);
    let generation = script.record.generation;
    assert!(script.effects(Input::WorkersLost { workers }).is_empty(), "nobody is left to be stopped");
    assert_eq!(script.record.message, "worker a and 1 others are lost");
    assert_eq!((script.record.failures_without_progress, script.record.members.len()), (1, 0));
    assert_eq!(script.record.generation, generation, "until there are slots");
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

/// A run that waits on is not written again: a queue costs the store what changes in it.
#[test]
fn a_run_that_waits_as_before_need_not_be_ticked() {
    use scheduler::Reason;
    let reasons = [
        Reason::TooFewSlots { free: 0, needed: 1 },
        Reason::Preempts { free: 0, needed: 1 },
        Reason::QuotaExhausted { quota: 2, held: 2, needed: 1 },
        Reason::Reserved { run: "other-00000002".into() },
    ];
    let mut script = Script::new();
    for reason in reasons {
        let verdict = Verdict::Waits { reason, place: 1 };
        let tick = || Input::Tick { slots: Some(verdict.clone()), fresh: Vec::new(), resting: None };
        assert!(!waits_as_before(&script.record, &script.observed, &verdict, None), "{verdict:?}");
        assert_eq!(script.send(tick()).unwrap().1.len(), 1, "{verdict:?}");
        assert!(waits_as_before(&script.record, &script.observed, &verdict, None), "{verdict:?}");
        let before = (script.record.clone(), script.observed.clone());
        assert_eq!(script.send(tick()).unwrap(), (vec![], vec![]), "{verdict:?}");
        assert_eq!((script.record.clone(), script.observed.clone()), before, "{verdict:?}");
    }
    // For whom slots are kept changes from tick to tick.
    let other = Verdict::Waits { reason: Reason::Reserved { run: "third-00000003".into() }, place: 2 };
    assert!(waits_as_before(&script.record, &script.observed, &other, None));
    let granted = script.granted(&["a", "b"]).unwrap();
    assert!(!waits_as_before(&script.record, &script.observed, &granted, None));
    // A gang that trains has its turn whatever the scheduler says.
    let running = Script::running();
    assert!(!waits_as_before(&running.record, &running.observed, &other, None));
}
