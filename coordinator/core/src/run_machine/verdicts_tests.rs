//! Whose doing an end is, and what follows: RUN-7, RUN-9, RUN-10, RUN-13 and RUN-14 by hand.

use super::script::{Script, kinds, place, ready, seen};
use super::turn::Turn;
use super::verdicts::{Fault, fault_of};
use super::*;

const ERROR: Ending = Ending::Code(1);
const KILLED: Ending = Ending::Signal(9);

fn ended(trainer: Trainer, ending: Ending) -> Input {
    Input::TrainerExited { trainer, ending }
}

fn says(trainer: Trainer, generation: Generation, class: FailureClass, reason: RunReason) -> Input {
    Input::TrainerFailed { trainer, generation, class, reason, message: "it cannot".to_owned() }
}

fn progressed(script: &mut Script, step: u64) {
    let generation = script.record.generation;
    script.effects(Input::Progressed { generation, step: Step(step) });
}

/// Another trainer is started beside the survivor, and joins it.
fn refill(script: &mut Script) {
    let (generation, survivor) = (script.record.generation, script.trainer(0));
    script.effects(Input::GangBuilt { trainer: survivor, generation });
    script.now_ms += Policy::default().backoff_cap_ms;
    let fresh = vec![Incarnation(format!("j{generation}"))];
    let slots = script.granted(&["b"]);
    script.effects(Input::Tick { slots, fresh, resting: None });
    let joiner = script.record.joining[0].clone();
    script.effects(ready(&joiner, "h:7"));
    script.all_built();
}

/// A gang of two whose second trainer ends so, one after another, until the run ends.
fn endings(script: &mut Script, endings: &[Ending]) {
    for ending in endings {
        let lost = script.trainer(1);
        script.effects(ended(lost, *ending));
        if script.record.state.has_ended() {
            return;
        }
        refill(script);
    }
}

#[test]
fn whose_doing_an_end_is() {
    let own = [ERROR, Ending::Code(101), Ending::Signal(6), Ending::Signal(11), Ending::Code(139)];
    assert!(own.iter().all(|ending| ending.fault() == Fault::Own));
    let others = [Ending::Code(0), KILLED, Ending::Signal(15), Ending::Code(137), Ending::Unknown];
    assert!(others.iter().all(|ending| ending.fault() == Fault::Other));
    assert_eq!(
        [ERROR, KILLED, Ending::Unknown].map(|ending| ending.to_string()).join(", "),
        "exit code 1, signal 9, for an unknown reason"
    );
    let said = [
        (FailureClass::Retry, RunReason::TrainerError, Fault::Own),
        (FailureClass::Retry, RunReason::TrainerHung, Fault::Place),
        (FailureClass::Retry, RunReason::TrainerLost, Fault::Other),
        (FailureClass::Fenced, RunReason::TrainerLost, Fault::Other),
        (FailureClass::Fatal, RunReason::TrainerError, Fault::Own),
    ];
    assert!(said.iter().all(|(class, reason, fault)| fault_of(*class, *reason) == *fault));
}

/// RUN-7: three ends of trainers' own doing with no step between, whatever else ends in between.
#[test]
fn run_7_a_step_that_fails_three_times_ends_the_run() {
    let mut script = Script::keeping();
    progressed(&mut script, 40);
    endings(&mut script, &[ERROR, KILLED, Ending::Signal(11)]);
    let record = &script.record;
    assert_eq!((record.state, record.own_failures, record.failures_without_progress), (RunState::Running, 2, 3));
    assert_eq!(record.blames.len(), 2, "RUN-14");
    endings(&mut script, &[ERROR]);
    assert_eq!((script.record.state, script.record.reason), (RunState::Failed, RunReason::StepFailed));
    let said = "trainers failed by their own doing 3 times in a row with no step after 40; the last: rank 1 on b slot 0 ended: exit code 1";
    assert_eq!(script.record.message, said);
    assert_eq!(script.record.blames, [], "RUN-14: it was the step");
}

/// RUN-7: what is nobody's own doing does not use that up, and a new step gives it back.
#[test]
fn run_7_faults_from_outside_and_new_steps_leave_it() {
    let mut script = Script::keeping();
    endings(&mut script, &[KILLED; 6]);
    assert_eq!((script.record.reason, script.record.own_failures), (RunReason::NoProgress, 0));
    assert_eq!(script.record.blames, [], "RUN-14");
    let mut script = Script::keeping();
    for step in 1..9 {
        progressed(&mut script, step);
        endings(&mut script, &[ERROR]);
    }
    assert_eq!((script.record.state, script.record.own_failures), (RunState::Running, 1));
    // The next leader knows the step too: what is done again is no progress.
    script.observed = Observed::default();
    script.effects(Input::CoordinatorStarted);
    progressed(&mut script, 8);
    assert_eq!(script.record.own_failures, 1);
    progressed(&mut script, 9);
    assert_eq!(script.record.own_failures, 0);
}

/// RUN-14: where a peer says first that it lost somebody, and ends for that, whose end it was is found out later.
#[test]
fn run_14_a_bystander_is_not_blamed() {
    let mut script = Script::running();
    let (culprit, peer, generation) = (script.trainer(0), script.trainer(1), script.record.generation);
    script.effects(says(peer.clone(), generation, FailureClass::Retry, RunReason::TrainerLost));
    assert_eq!((script.record.state, script.record.own_failures), (RunState::Resizing, 0));
    script.effects(ended(peer, ERROR));
    assert_eq!((script.record.own_failures, script.record.blames.len()), (0, 0));
    script.effects(ended(culprit.clone(), Ending::Signal(11)));
    let record = &script.record;
    assert_eq!((record.own_failures, record.failures_without_progress, record.blames.len()), (1, 1, 1));
    assert_eq!(record.blames[0].place, culprit.place());
}

/// RUN-7, RUN-14: two that fail at one step are two blames, and one failure of that step.
#[test]
fn run_7_one_step_fails_once_for_all_trainers() {
    let mut script = Script::keeping();
    let (first, second, generation) = (script.trainer(0), script.trainer(1), script.record.generation);
    script.effects(says(first, generation, FailureClass::Retry, RunReason::TrainerError));
    assert_eq!((script.record.state, script.record.own_failures), (RunState::Forming, 1));
    // By now it is asked for the next generation, so its own word comes too late.
    let late = says(second.clone(), generation, FailureClass::Retry, RunReason::TrainerError);
    assert!(matches!(script.send(late), Err(Rejection::StaleGeneration { .. })));
    script.now_ms += 2 * Policy::default().broken_timeout_ms;
    script.effects(ended(second, ERROR));
    assert_eq!((script.record.own_failures, script.record.blames.len()), (1, 2));
}

/// RUN-14: a trainer that hangs, and one that ends before it has joined, are held against their slots, and the first against nothing else.
#[test]
fn run_14_hangs_and_joiners_are_held_against_their_slots() {
    let mut script = Script::keeping();
    let (hung, generation) = (script.trainer(1), script.record.generation);
    script.effects(says(hung.clone(), generation, FailureClass::Retry, RunReason::TrainerHung));
    assert_eq!((script.record.own_failures, script.record.failures_without_progress), (0, 1));
    let (generation, survivor) = (script.record.generation, script.trainer(0));
    script.effects(Input::GangBuilt { trainer: survivor, generation });
    let slots = script.granted(&["b"]);
    script.effects(Input::Tick { slots, fresh: vec!["j".into()], resting: None });
    let joiner = script.record.joining[0].clone();
    script.effects(ended(joiner, ERROR));
    let blamed: Vec<_> = script.record.blames.iter().map(|blame| blame.place.clone()).collect();
    assert_eq!(blamed, [place("b"), place("b")]);
    assert_eq!((script.record.own_failures, script.record.failures_without_progress), (0, 1));
}

#[test]
fn a_run_says_that_slots_are_quarantined() {
    let mut script = Script::new();
    let resting = Some(Resting { slots: 2, until_ms: 3_600_000 });
    let slots = script.granted(&[]);
    script.effects(Input::Tick { slots, fresh: Vec::new(), resting });
    let said = "needs 1 free slot(s); 2 slot(s) are quarantined after crashes or hangs, the first until 01:00:00 UTC";
    assert_eq!((script.record.reason, script.record.message.as_str()), (RunReason::WaitingForWorkers, said));
}

/// RUN-13: evenly over a bound that doubles up to a most; the same for the same run and generation.
#[test]
fn run_13_waits_are_drawn_from_a_growing_range() {
    let script = Script::running();
    let wait = |run: u64, times: u32| {
        let mut record = script.record.clone();
        record.id = RunId(format!("demo-{run:08x}"));
        Turn::new(Policy::default(), &record, script.observed.clone(), Now::at(0)).backoff_ms(1000, times)
    };
    assert_eq!(wait(1, 0), 0);
    assert_eq!((wait(1, 3), wait(7, 40)), (wait(1, 3), wait(7, 40)));
    for (times, most) in [(1, 1000), (2, 2000), (5, 16_000), (40, Policy::default().backoff_cap_ms)] {
        let waits: Vec<u64> = (0..2000).map(|run| wait(run, times)).collect();
        assert!(waits.iter().all(|wait| (1..=most).contains(wait)), "{times}");
        let mean = waits.iter().sum::<u64>() / 2000;
        // A standard deviation of the mean is 0.65 % of the range.
        assert!((mean * 100 / most).abs_diff(50) < 4, "{times}: {mean} of {most}");
    }
}

/// RUN-13: the first restart is at once, the second waits; a gang of survivors never does.
#[test]
fn run_13_the_second_restart_waits() {
    let lose = |script: &mut Script| {
        let (lost, other) = (script.trainer(0), script.trainer(1));
        script.effects(ended(lost, KILLED));
        script.effects(ended(other, KILLED));
    };
    let mut script = Script::running();
    lose(&mut script);
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["start", "start"]);
    script.all_ready();
    script.all_built();
    lose(&mut script);
    assert!(script.record.message.contains("; it starts again after "), "{}", script.record.message);
    assert_eq!(script.granted(&["a", "b"]), None);
    script.now_ms += Policy::default().backoff_ms;
    assert!(script.granted(&["a", "b"]).is_some());

    let mut script = Script::keeping();
    endings(&mut script, &[KILLED, KILLED]);
    let lost = script.trainer(1);
    assert_eq!(kinds(&script.effects(ended(lost, KILLED))), ["propose"]);
}

/// A survivor that waits for others, since it alone is too few.
fn waiting() -> (Script, Trainer) {
    let mut script = Script::keeping();
    script.record.spec.workers.min = 2;
    let (survivor, lost) = (script.trainer(0), script.trainer(1));
    assert!(script.effects(ended(lost, KILLED)).is_empty());
    script.observed = Observed::default();
    assert!(script.effects(Input::CoordinatorStarted).is_empty(), "nobody is stopped");
    assert_eq!((script.record.state, script.record.members.len()), (RunState::Resizing, 1));
    (script, survivor)
}

/// RUN-9, RUN-10: survivors that wait for others go on waiting for a new leader, and are the next gang with who comes.
#[test]
fn run_9_survivors_that_wait_outlive_their_leader() {
    let (mut script, survivor) = waiting();
    assert_eq!(script.granted(&["b"]), None, "nobody is started before it is known who is left");
    assert!(script.effects(seen("a", std::slice::from_ref(&survivor))).is_empty());
    script.effects(ready(&survivor, "h:0"));
    let slots = script.granted(&["b"]);
    let effects = script.effects(Input::Tick { slots, fresh: vec!["j".into()], resting: None });
    assert_eq!(kinds(&effects), ["start"]);
    let joiner = script.trainer(1);
    assert_eq!(kinds(&script.effects(ready(&joiner, "h:7"))), ["propose", "propose"]);
    script.all_built();
    assert!(script.record.message.ends_with("train on from where they were"), "{}", script.record.message);
}

/// RUN-9: a survivor that is not there any more, or does not come back, holds nothing up.
#[test]
fn run_9_survivors_that_are_gone_are_not_waited_for() {
    for told in [true, false] {
        let (mut script, _) = waiting();
        if told {
            script.effects(seen("a", &[]));
        } else {
            script.now_ms += Policy::default().reattach_timeout_ms;
            let tick = script.tick();
            assert!(script.effects(tick).is_empty());
        }
        assert_eq!((script.record.members.len(), script.record.carries), (0, false));
        let tick = script.tick();
        assert_eq!(kinds(&script.effects(tick)), ["start", "start"]);
        assert_eq!(script.record.failures_without_progress, 1, "RUN-7");
    }
    // Nor for longer than before, where nobody else comes.
    let (mut script, survivor) = waiting();
    script.effects(seen("a", std::slice::from_ref(&survivor)));
    script.now_ms += Policy::default().keep_timeout_ms;
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["stop"]);
}

/// A gang of a survivor and a trainer that copies from it.
fn copying() -> (Script, Trainer, Trainer) {
    let mut script = Script::keeping();
    endings(&mut script, &[KILLED]);
    let (survivor, joiner) = (script.trainer(0), script.trainer(1));
    (script, survivor, joiner)
}

fn interrupted(script: &Script) -> Input {
    let generation = script.record.generation;
    Input::TrainerInterrupted { trainer: script.trainer(0), generation, message: "no answer".to_owned() }
}

/// RUN-10: where a gang breaks by no loss while somebody copies, it goes on without; another comes later.
#[test]
fn run_10_a_gang_that_breaks_while_a_trainer_copies_goes_on_without_it() {
    let (mut script, survivor, joiner) = copying();
    let broken = interrupted(&script);
    script.effects(broken);
    script.now_ms += Policy::default().broken_timeout_ms;
    let tick = script.tick();
    let effects = script.effects(tick);
    let [Effect::StopTrainer { trainer: stopped, .. }, Effect::Propose(proposal)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!((stopped, &proposal.trainer, proposal.addresses.len()), (&joiner, &survivor, 1));
    let generation = script.record.generation;
    script.effects(Input::GangBuilt { trainer: survivor, generation });
    assert_eq!(script.granted(&["b"]), None, "RUN-13");
    script.now_ms += Policy::default().rejoin_wait_ms;
    assert!(script.granted(&["b"]).is_some());
    // One that has come as far as the others is one of them.
    let (mut script, ..) = copying();
    progressed(&mut script, 7);
    let broken = interrupted(&script);
    script.effects(broken);
    script.now_ms += Policy::default().broken_timeout_ms;
    let tick = script.tick();
    assert_eq!(kinds(&script.effects(tick)), ["propose", "propose"]);
}

/// RUN-10: a copy that fails for good says something about its place, and nothing about the run that trains without it.
#[test]
fn run_10_a_copy_that_fails_does_not_end_the_run() {
    let (mut script, _, joiner) = copying();
    let generation = script.record.generation;
    script.effects(says(joiner.clone(), generation, FailureClass::Fatal, RunReason::TrainerError));
    assert_eq!((script.record.state, script.record.own_failures), (RunState::Forming, 0));
    assert_eq!(script.record.blames.last().map(|blame| &blame.place), Some(&joiner.place()), "RUN-14");
    let (mut script, _, joiner) = copying();
    progressed(&mut script, 7);
    script.effects(says(joiner, generation, FailureClass::Fatal, RunReason::TrainerError));
    assert_eq!(script.record.state, RunState::Failed);
}
