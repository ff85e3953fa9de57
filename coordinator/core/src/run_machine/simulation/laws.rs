//! What holds after every step of the machine, whatever it was told.

use super::*;

/// RUN-1 to RUN-6, RUN-11 and RUN-12 over one accepted step.
pub(super) fn check(before: &RunRecord, after: &RunRecord, input: &Input, effects: &[Effect], last_step: u64) {
    assert!(after.generation == before.generation || after.generation == before.generation.next(), "RUN-1");
    assert!(after.attempt >= before.attempt && after.world_sizes.len() >= before.world_sizes.len());
    if before.head != after.head {
        let Input::CheckpointWritten { trainer, generation, .. } = input else {
            panic!("RUN-2: {input:?} moved the head")
        };
        assert_eq!(
            (*generation, &before.members[0].trainer, before.members[0].rank),
            (before.generation, trainer, Rank(0)),
            "RUN-2"
        );
        assert!(after.position >= before.position, "RUN-3");
    }
    if after.own_failures > before.own_failures {
        let own = matches!(
            input,
            Input::TrainerExited { ending: Ending::Code(101), .. } | Input::Tick { .. } | Input::TrainerReady { .. }
        );
        assert!(own && after.own_failures == before.own_failures + 1, "RUN-7: {input:?} is counted");
    }
    assert_eq!(after.reason == RunReason::StepFailed, after.own_failures >= 3, "RUN-7");
    assert!(after.blames.len() <= before.blames.len() + 1, "RUN-14");
    assert!(!before.state.has_ended() || before == after, "RUN-4");
    assert!(*input != Input::Cancel || after.state.has_ended(), "RUN-4");
    assert_eq!(after.result.is_some(), after.state == RunState::Succeeded, "RUN-5");
    assert!(after.state != RunState::Succeeded || after.position.step == Step(last_step), "RUN-5");
    if after.generation > before.generation {
        let kept = |member: &Member| {
            let still = after.trainers().any(|other| *other == member.trainer);
            still
                || effects
                    .iter()
                    .any(|effect| matches!(effect, Effect::StopTrainer { trainer, .. } if *trainer == member.trainer))
        };
        let gone = |member: &Member| match input {
            Input::TrainerExited { trainer, .. } => *trainer == member.trainer,
            Input::WorkersLost { workers } => workers.contains(&member.trainer.worker),
            Input::TrainersSeen { worker, trainers } => {
                *worker == member.trainer.worker && !trainers.contains(&member.trainer)
            }
            // Who did not come back to a new leader.
            Input::Tick { .. } => before.carries || matches!(before.state, RunState::Resizing | RunState::Running),
            _ => false,
        };
        assert!(before.members.iter().all(|member| kept(member) || gone(member)), "RUN-6: {input:?}");
        let (least, most) = (after.spec.workers.min as usize, after.wanted_size() as usize);
        assert!((least..=most).contains(&after.members.len()), "RUN-11: {} members", after.members.len());
    }
    if let Some(size) = after.world_sizes.get(before.world_sizes.len()) {
        assert!((after.spec.workers.min..=after.spec.workers.max).contains(size), "RUN-11: {size} are committed");
        assert!(after.leaving.is_empty(), "RUN-11: who leaves is let go");
    }
    if before.state == RunState::Preempting && after.state == RunState::Pending {
        assert!(after.trainers().count() == 0 && after.head == before.head, "RUN-12");
    }
    let forms = matches!(after.state, RunState::Admitted | RunState::Forming);
    assert!(forms || after.leaving.is_empty(), "RUN-11: {:?} is about to leave", after.leaving);
    assert!(!after.state.has_ended() || after.trainers().count() == 0, "an ended run holds slots");
    let mut places: Vec<FreeSlot> = after.held_slots().collect();
    places.sort();
    places.dedup();
    assert_eq!(places.len(), after.trainers().count(), "a slot is held twice");
    assert_eq!(after.end_ms.is_some(), after.state.has_ended());
}
