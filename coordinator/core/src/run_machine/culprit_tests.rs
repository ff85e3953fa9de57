//! A gang that is lost for no known reason asks whom it waited for, and is told once.

use super::script::Script;
use super::*;
use crate::culprit::Finding;

fn judgement(generation: Generation) -> Input {
    let judgement = Judgement { generation, finding: Finding::NobodyWaited, heard: BTreeMap::new() };
    Input::CulpritFound { judgement: Box::new(judgement) }
}

fn messages(script: &mut Script, input: &Input) -> Vec<String> {
    let outcome = step(&Policy::default(), &script.record, &script.observed, script.now_ms, input).unwrap();
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
