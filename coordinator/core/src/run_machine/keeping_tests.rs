//! Gangs that break and are kept (RUN-10), and what else survivors live through.

use super::script::{Script, kinds, place, ready, seen};
use super::*;
use crate::gang::FreeSlot;
use thaw_proto::ids::Slot;

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
    let tick = Input::Tick { resting: None, slots: script.granted(&["b"]), fresh: vec!["j".into()] };
    let effects = script.effects(tick);
    let [Effect::StartTrainer { trainer: joiner, .. }] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((script.record.state, script.record.held_slots().count()), (RunState::Running, 2));
    // Its heartbeat is no stranger's, and nobody else is started for it.
    assert!(script.effects(seen("b", std::slice::from_ref(joiner))).is_empty());
    assert_eq!(script.granted(&["c"]), None);
    let effects = script.effects(ready(joiner, "h:7"));
    let [Effect::Propose(first), Effect::Propose(second)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((&first.trainer, &second.trainer, second.generation), (&survivor, joiner, Generation(3)));
    assert!(first.addresses.iter().eq(["h:0", "h:7"]));
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
    let tick = Input::Tick { resting: None, slots: script.granted(&["b"]), fresh: vec!["j".into()] };
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
    let tick = Input::Tick { resting: None, slots: None, fresh: Vec::new() };
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
        script.now_ms += Policy::default().backoff_cap_ms;
        let fresh = vec![Incarnation(format!("j{generation}"))];
        let tick = Input::Tick { resting: None, slots: script.granted(&["b"]), fresh };
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
        script.effects(Input::TrainerExited { trainer, ending: Ending::Signal(9) });
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
    let exited = Input::TrainerExited { trainer: lost, ending: Ending::Signal(9) };
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
    let tick = Input::Tick { resting: None, slots: script.granted(&["b"]), fresh: vec!["j".into()] };
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
    let tick = Input::Tick { resting: None, slots: script.granted(&["b"]), fresh: vec!["k".into()] };
    script.effects(tick);
    assert_eq!(kinds(&script.effects(Input::Cancel)), ["stop", "stop"]);
    assert_eq!(script.record.held_slots().count(), 0);
}

/// RUN-1: a worker has the only member and one of two joiners, of which the other listens: its loss takes one generation at most.
#[test]
fn a_worker_is_lost_with_a_member_and_a_joiner_at_once() {
    let mut script = Script::keeping();
    script.record.spec.workers.max = 3;
    let lost = script.exited(1);
    script.effects(lost);
    script.effects(Input::GangBuilt { trainer: script.trainer(0), generation: Generation(2) });
    let places = ["a", "c"].map(|worker| FreeSlot { slot: Slot(1), ..place(worker) });
    let slots = Some(Verdict::Granted(places.to_vec()));
    script.effects(Input::Tick { resting: None, slots, fresh: vec!["j".into(), "k".into()] });
    let [_, listens] = &script.record.joining.clone()[..] else { panic!("{:?}", script.record.joining) };
    script.effects(ready(listens, "h:7"));
    let generation = script.record.generation;
    script.effects(Input::WorkersLost { workers: vec!["a".into()] });
    assert_eq!((script.record.state, script.record.generation), (RunState::Resizing, generation));
}

/// RUN-11: what is left of a gang that a leader before had started is too small, and its loss is put off until it is heard of.
#[test]
fn too_few_that_a_leader_before_has_started_are_no_gang() {
    let mut script = Script::keeping();
    script.record.spec.workers.min = 2;
    let (lost, survivor) = (script.exited(1), script.trainer(0));
    script.effects(lost);
    let tick = Input::Tick { resting: None, slots: script.granted(&["b"]), fresh: vec!["j".into()] };
    script.effects(tick);
    assert_eq!((script.record.state, script.record.members.len()), (RunState::Admitted, 2));
    script.observed = Observed::default();
    script.effects(Input::CoordinatorStarted);
    script.effects(seen("b", &[]));
    assert!(script.effects(seen("a", std::slice::from_ref(&survivor))).is_empty());
    assert!(script.effects(ready(&survivor, "h:0")).is_empty(), "it is proposed no gang");
    assert_eq!((script.record.state, script.record.members.len()), (RunState::Resizing, 1));
}
