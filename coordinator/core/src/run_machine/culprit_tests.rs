//! A gang that is lost for no known reason asks whom it waited for, and is told once.

use super::script::{Script, kinds};
use super::*;
use crate::culprit::{Finding, Heard, STUCK_MS};
use std::time::Duration;
use thaw_proto::ids::StageIndex;
use thaw_proto::worker::{CollectiveKind, CollectiveOperation, OperationEnd};

fn judgement(generation: Generation) -> Input {
    let judgement = Judgement { generation, finding: Finding::NobodyWaited, heard: BTreeMap::new(), world_size: 2 };
    Input::CulpritFound { judgement: Box::new(judgement) }
}

/// A gang of two breaks, since rank 0 has waited in vain for the other: what is found about that one, by how long it stood still.
fn waited_in_vain(script: &mut Script, still_ms: u64) -> Input {
    let (generation, trainer) = (script.record.generation, script.trainer(0));
    let message = "reduce_shards_f32 7 did not end within 30s".to_owned();
    script.effects(Input::TrainerInterrupted { trainer, generation, message });
    script.now_ms += Policy::default().broken_timeout_ms;
    let effects = script.effects(Input::Tick { slots: None, fresh: Vec::new(), resting: None });
    assert_eq!(kinds(&effects), ["propose", "propose"]);
    in_vain(script, generation, still_ms)
}

/// What is found about rank 1, for which rank 0 has waited in `generation`.
fn in_vain(script: &Script, generation: Generation, still_ms: u64) -> Input {
    let trainers = [script.trainer(0), script.trainer(1)];
    let (stage, step) = (StageIndex(0), Step(3));
    let (kind, end) = (CollectiveKind::ReduceF32, OperationEnd::Failed { at_us: 30_000_000 });
    let operation = CollectiveOperation { kind, sequence: 7, bytes: 8, stage, step, began_us: 1, end };
    let still = [0, still_ms].map(Duration::from_millis);
    let heard = (0..).map(Rank).zip(trainers.into_iter().zip(still));
    let heard =
        heard.map(|(rank, (trainer, still))| (rank, Heard { trainer, operations: Vec::new(), still })).collect();
    let finding = Finding::NeverCame { operation, ranks: vec![Rank(1)], waiting: 1 };
    let judgement = Judgement { generation, finding, heard, world_size: 2 };
    Input::CulpritFound { judgement: Box::new(judgement) }
}

/// RUN-14, CULPRIT-4
#[test]
fn who_is_stuck_is_held_against_its_slot_and_left_out_at_once() {
    let mut script = Script::keeping();
    let (other, stuck) = (script.trainer(0), script.trainer(1));
    let found = waited_in_vain(&mut script, STUCK_MS);
    let formed = script.record.generation;
    let effects = script.effects(found);
    let [Effect::StopTrainer { trainer: stopped, .. }, Effect::Propose(proposal)] = &effects[..] else {
        panic!("{effects:?}")
    };
    assert_eq!((stopped, &proposal.trainer, proposal.generation), (&stuck, &other, formed.next()));
    let record = &script.record;
    assert_eq!((record.reason, record.members.len()), (RunReason::TrainerHung, 1));
    assert!(record.message.starts_with("the trainer on b slot 0 is stuck: it had not moved for 20 s"), "{record:?}");
    assert_eq!(record.blames.iter().map(|blame| blame.place.clone()).collect::<Vec<_>>(), [stuck.place()]);
    assert_eq!((record.own_failures, record.failures_without_progress), (0, 1), "it is one failure");
    // Its end is no news any more, and another comes in its place.
    let ended = Input::TrainerExited { trainer: stuck.clone(), ending: Ending::Signal(9) };
    assert!(matches!(script.send(ended), Err(Rejection::UnknownTrainer { .. })));
    let generation = script.record.generation;
    script.effects(Input::GangBuilt { trainer: other, generation });
    let slots = script.granted(&["b"]);
    let effects = script.effects(Input::Tick { slots, fresh: vec!["j".into()], resting: None });
    assert_eq!(kinds(&effects), ["start"]);
    assert_eq!(script.record.blames.len(), 1);
}

#[test]
fn who_is_slow_or_moves_again_is_not_blamed() {
    let mut script = Script::keeping();
    let slow = waited_in_vain(&mut script, STUCK_MS - 1);
    assert!(script.effects(slow).is_empty());
    assert_eq!((script.record.members.len(), script.record.blames.len()), (2, 0));
    let mut script = Script::keeping();
    let found = waited_in_vain(&mut script, STUCK_MS);
    let (back, generation) = (script.trainer(1), script.record.generation);
    script.effects(Input::GangBuilt { trainer: back, generation });
    assert!(script.effects(found).is_empty(), "it has built the next gang");
    assert_eq!((script.record.state, script.record.blames.len()), (RunState::Forming, 0));
}

#[test]
fn who_is_stuck_is_left_out_also_where_the_others_are_too_few_without_it() {
    let mut script = Script::keeping();
    script.record.spec.workers.min = 2;
    let stuck = script.trainer(1);
    let found = waited_in_vain(&mut script, STUCK_MS);
    assert_eq!(kinds(&script.effects(found)), ["stop"]);
    assert_eq!((script.record.state, script.record.members.len()), (RunState::Resizing, 1));
    assert_eq!(script.record.blames.iter().map(|blame| blame.place.clone()).collect::<Vec<_>>(), [stuck.place()]);
    let slots = script.granted(&["b"]);
    let effects = script.effects(Input::Tick { slots, fresh: vec!["j".into()], resting: None });
    assert_eq!(kinds(&effects), ["start"]);
}

fn messages(script: &mut Script, input: &Input) -> Vec<String> {
    let outcome = step(&Policy::default(), &script.record, &script.observed, Now::at(script.now_ms), input).unwrap();
    assert!(!outcome.changed && outcome.effects.is_empty(), "it is told and nothing else");
    script.observed = outcome.observed;
    outcome.events.into_iter().map(|event| event.message).collect()
}

#[test]
fn a_gang_that_is_lost_while_all_its_trainers_live_asks_for_a_name() {
    let mut script = Script::keeping();
    let lost = script.record.generation;
    let failed = script.failed(FailureClass::Retry);
    script = script.after(failed);
    assert_eq!(script.record.generation, lost.next(), "the other one is the next gang");
    assert_eq!(script.observed.unexplained(), Some(lost));
    assert!(messages(&mut script, &judgement(lost.next())).is_empty(), "that one was not lost");
    let told = messages(&mut script, &judgement(lost));
    assert_eq!(told, ["no trainer of generation 1 waited for another; all computed, or had yet to begin"]);
    assert!(messages(&mut script, &judgement(lost)).is_empty(), "once");
    assert_eq!(script.observed.unexplained(), None);
}

#[test]
fn a_gang_that_says_it_is_broken_asks_once_no_loss_explains_it() {
    let mut script = Script::keeping();
    let (lost, trainer) = (script.record.generation, script.record.members[0].trainer.clone());
    let message = "reduce_shards_f32 7 did not end within 30s".to_owned();
    script = script.after(Input::TrainerInterrupted { trainer, generation: lost, message });
    assert_eq!(script.observed.unexplained(), None);
    script.now_ms += Policy::default().broken_timeout_ms;
    script = script.after(Input::Tick { slots: None, fresh: Vec::new(), resting: None });
    assert_eq!(script.observed.unexplained(), Some(lost));
}

#[test]
fn the_end_of_a_trainer_is_reason_enough() {
    let script = Script::keeping();
    let exited = script.exited(1);
    assert_eq!(script.after(exited).observed.unexplained(), None);
}

#[test]
fn a_run_that_has_ended_is_told_nothing() {
    let mut script = Script::keeping();
    let lost = script.record.generation;
    let failed = script.failed(FailureClass::Retry);
    script = script.after(failed).after(Input::Cancel);
    assert!(messages(&mut script, &judgement(lost)).is_empty());
}

/// Of a gang that is stopped whole.
#[test]
fn who_is_stuck_is_blamed_where_nobody_survives() {
    let mut script = Script::running();
    let (generation, stuck) = (script.record.generation, script.trainer(1));
    let message = "GPU sum 7 did not end within 30s".to_owned();
    let (class, reason) = (FailureClass::Retry, RunReason::TrainerLost);
    let lost = Input::TrainerFailed { trainer: script.trainer(0), generation, class, reason, message };
    assert_eq!(kinds(&script.effects(lost)), ["stop", "stop"]);
    let found = in_vain(&script, generation, STUCK_MS);
    assert!(script.effects(found).is_empty(), "it is told to stop already");
    assert_eq!(script.record.blames.iter().map(|blame| blame.place.clone()).collect::<Vec<_>>(), [stuck.place()]);
    assert_eq!((script.record.own_failures, script.record.failures_without_progress), (0, 1));
}
