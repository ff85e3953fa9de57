//! Who is in the next gang.
//!
//! - GANG-1: all or nothing: between `min` and `max` trainers, or none.
//! - GANG-2: the choice depends on the set of free slots only, not on their order.
//! - GANG-3: trainers are spread over workers, and ranks of one worker are neighbours, so that the lower levels of the
//!   reduction stay on one machine.
//! - GANG-4: of a gang that shrinks rank 0 stays, with as many as can be of its worker, then of those that hold most: whole workers become
//!   free.

use serde::{Deserialize, Serialize};
use std::cmp::Reverse;
use thaw_proto::ids::{Slot, WorkerName};

/// A device that no trainer holds and no run has been promised.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FreeSlot {
    pub worker: WorkerName,
    pub slot: Slot,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// In rank order.
    Form(Vec<FreeSlot>),
    Wait(WaitReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WaitReason {
    TooFewSlots { free: usize, needed: usize },
}

/// Chooses up to `max` of the free slots, one per worker in turn by name, or waits for `min`.
#[must_use]
pub fn choose(free: &[FreeSlot], min: u32, max: u32) -> Decision {
    // Slots are given in turns, so by how many of their worker come before them. Sorted, those of one worker are neighbours.
    let mut sorted: Vec<&FreeSlot> = free.iter().collect();
    sorted.sort_unstable();
    sorted.dedup();
    let needed = min.max(1) as usize;
    if sorted.len() < needed {
        return Decision::Wait(WaitReason::TooFewSlots { free: sorted.len(), needed });
    }
    let mut turns: Vec<Vec<&FreeSlot>> = Vec::new();
    for of_worker in sorted.chunk_by(|one, next| one.worker == next.worker) {
        for (turn, slot) in of_worker.iter().enumerate() {
            match turns.get_mut(turn) {
                Some(slots) => slots.push(slot),
                None => turns.push(vec![slot]),
            }
        }
    }
    let mut chosen: Vec<FreeSlot> = turns.into_iter().flatten().take(max.max(1) as usize).cloned().collect();
    chosen.sort_unstable();
    Decision::Form(chosen)
}

/// Which `count` places of a gang stay where it is to be smaller, sorted; all where it is not larger.
#[must_use]
pub fn keep(places: &[FreeSlot], count: usize) -> Vec<FreeSlot> {
    let mut sorted = places.to_vec();
    sorted.sort_unstable();
    let mut workers: Vec<&[FreeSlot]> = sorted.chunk_by(|one, next| one.worker == next.worker).collect();
    // The first is rank 0's. The sort is stable, so equal ones stay in the order of their names.
    if let Some((_, others)) = workers.split_first_mut() {
        others.sort_by_key(|slots| Reverse(slots.len()));
    }
    let mut kept: Vec<FreeSlot> = workers.into_iter().flatten().take(count).cloned().collect();
    kept.sort_unstable();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slots(given: &[(&str, u32)]) -> Vec<FreeSlot> {
        given.iter().map(|(worker, slot)| FreeSlot { worker: (*worker).into(), slot: Slot(*slot) }).collect()
    }

    #[test]
    fn gang_3_workers_take_turns_and_ranks_are_neighbours() {
        let free = slots(&[("b", 0), ("a", 1), ("a", 0), ("a", 2), ("b", 1)]);
        assert_eq!(choose(&free, 1, 3), Decision::Form(slots(&[("a", 0), ("a", 1), ("b", 0)])));
        assert_eq!(choose(&free, 1, 2), Decision::Form(slots(&[("a", 0), ("b", 0)])));
    }

    #[test]
    fn gang_1_waits_for_the_minimum() {
        let reason = WaitReason::TooFewSlots { free: 1, needed: 2 };
        assert_eq!(choose(&slots(&[("a", 0)]), 2, 4), Decision::Wait(reason));
    }

    #[test]
    fn gang_4_rank_0_stays_and_whole_workers_become_free() {
        let gang = slots(&[("a", 0), ("b", 0), ("c", 0), ("c", 1), ("d", 0), ("d", 1)]);
        assert_eq!(keep(&gang, 1), slots(&[("a", 0)]));
        assert_eq!(keep(&gang, 3), slots(&[("a", 0), ("c", 0), ("c", 1)]));
        assert_eq!(keep(&gang, 4), slots(&[("a", 0), ("c", 0), ("c", 1), ("d", 0)]));
        assert_eq!(keep(&gang, 9), gang);
        assert_eq!(keep(&[], 2), []);
    }

    proptest! {
        #[test]
        fn gang_1_gang_2_hold(given in prop::collection::btree_set((0_u32..5, 0_u32..4), 0..20), min in 1_u32..8, extra in 0_u32..8) {
            let free: Vec<FreeSlot> = given.iter().map(|(worker, slot)| FreeSlot { worker: WorkerName(format!("w{worker}")), slot: Slot(*slot) }).collect();
            let mut reversed = free.clone();
            reversed.reverse();
            let decision = choose(&free, min, min + extra);
            prop_assert_eq!(&decision, &choose(&reversed, min, min + extra));
            match decision {
                Decision::Form(chosen) => {
                    prop_assert_eq!(chosen.len(), free.len().min((min + extra) as usize));
                    prop_assert!(chosen.len() >= min as usize && chosen.is_sorted());
                }
                Decision::Wait(_) => prop_assert!(free.len() < min as usize),
            }
        }
    }
}
