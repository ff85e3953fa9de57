//! Whole lives of a run, and that each ends.

use super::*;

const SEEDS: u64 = 400;
const ACTIONS: u32 = 400;
/// Of a run that is scaled again and again.
const LONG_STEP: u64 = 1000;

#[test]
fn random_lives_keep_the_invariants_and_end() {
    let (mut ends, mut carried) = ([0_u32; 3], 0);
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        for _ in 0..ACTIONS {
            world.random_action();
        }
        world.end(seed);
        carried += world.carried;
        match world.record.state {
            RunState::Succeeded => ends[0] += 1,
            RunState::Failed => {
                assert!(matches!(world.record.reason, RunReason::NoProgress | RunReason::StepFailed));
                ends[1] += 1;
            }
            RunState::Cancelled => ends[2] += 1,
            other => panic!("{other:?} has not ended"),
        }
    }
    assert!(carried > 100, "survivors went on {carried} times only");
    assert!(ends.iter().all(|count| *count > 0) && ends[0] > ends[1], "succeeded, failed, cancelled: {ends:?}");
}

#[test]
fn nothing_that_a_run_waits_for_follows_the_wall_clock() {
    let life = |seed, setter| {
        let mut world = World { setter, ..World::new(seed) };
        for _ in 0..ACTIONS {
            world.random_action();
        }
        world.end(seed);
        world.log
    };
    for seed in 0..SEEDS / 4 {
        let (quiet, set) = (life(seed, None), life(seed, Some(Dice(seed))));
        let differs = quiet.iter().zip(&set).find(|(one, other)| one != other);
        assert!(quiet.len() == set.len() && differs.is_none(), "RUN-15: seed {seed}: {differs:?}");
    }
}

/// RUN-11, RUN-12: a gang that is asked for another size again and again, loses trainers and leaders in the middle, and yields now and then.
#[test]
fn gangs_of_changing_sizes_keep_the_invariants_and_end() {
    let (mut shrunk, mut grown, mut carried, mut yielded) = (0, 0, 0, 0);
    for seed in 0..60 {
        let mut world = World { keeps: true, last_step: LONG_STEP, ..World::new(seed) };
        for _ in 0..200 {
            world.calm_round();
            let worker = world.dice.below(3) as usize;
            match world.dice.below(100) {
                0..=14 => {
                    let workers = 1 + world.dice.below(3) as u32;
                    world.send(&Input::Scale { workers });
                }
                15..=18 => world.kill(worker),
                19 => world.restart(),
                20 => world.disconnect(worker),
                21..=22 => world.send(&Input::Cede { workers: 1, to: "other-00000002".into() }),
                23..=25 => {
                    world.send(&Input::Yield { to: "other-00000002".into() });
                    yielded += u32::from(world.record.state == RunState::Preempting);
                }
                _ => {}
            }
        }
        world.end(seed);
        assert_ne!(world.record.state, RunState::Cancelled);
        (shrunk, grown, carried) = (shrunk + world.shrunk, grown + world.grown, carried + world.carried);
    }
    let counts = [shrunk, grown, carried, yielded];
    assert!(counts.iter().all(|count| *count > 50), "shrunk, grown, carried, yielded: {counts:?}");
}
