//! The state that a new generation goes on from, and whose it is: decided by every trainer for itself, from what all of them hold.
//!
//! ```text
//! all ranks: what each holds (step, moves, digest) ─▶ the furthest, if their digests agree ─▶ lowest of them ── sealed chunks ─▶ all others
//!       ▲ nobody anything of use: who has the furthest snapshot of its host loads it │
//!       └────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! - KEEP-1: a generation goes on from the furthest state that any of its ranks holds, if that is no older than the head; else from the head.
//! - KEEP-2: ranks that have come equally far must hold the same, to the last bit; where they do not, nothing is guessed and the run ends.
//! - KEEP-3: a rank takes over a peer's state whole, after every chunk's hash and its weights' own have been checked, or not at all.
//! - KEEP-4: a snapshot that a host has kept counts where no rank holds a state of use, and then the furthest; one that is older than the head,
//!   by its step or by its generation, is of no use: a later generation that has moved the head has left that line of training.
//! - KEEP-5: only ranks that have exactly the snapshot that was chosen load it, each whole or not at all. From then on it is what they hold, and
//!   all rules above hold of it; where none of them could load it, the next one is chosen, and at last the head.

use serde::{Deserialize, Serialize};
use std::fmt;
use thaw_mutants::planted;
use thaw_proto::ids::{Generation, Rank, Step};

/// What a trainer holds of its run's training. Ordered by how far it has come.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Held {
    /// The last step it has applied.
    pub step: Step,
    /// Decisions taken since the run's beginning, or the checkpoint it resumed from: more of them are further at the same step.
    pub moves: u64,
    /// Of everything that the ranks have in common.
    pub digest: String,
}

impl Held {
    fn reached(&self) -> (Step, u64) {
        (self.step, self.moves)
    }

    /// KEEP-3: whether what was taken over is this, by its own digest.
    #[must_use]
    pub fn is(&self, digest: &str) -> bool {
        self.digest == digest || planted("copy-unchecked")
    }
}

/// A state that lies in the memory of a host. Ordered by how far it has come; of those alike, the later generation's comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Snapshot {
    /// The last step that is applied in it.
    pub step: Step,
    /// As of [`Held::moves`].
    pub moves: u64,
    /// Whose state it is.
    pub generation: Generation,
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} of generation {}", self.step, self.generation)
    }
}

/// The checkpoint that the head pointer names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    pub step: Step,
    /// That has written it.
    pub generation: Generation,
}

/// What the ranks of a generation go on from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agreed {
    /// Nobody holds anything that is of use.
    Head,
    /// What `source` holds, which is `held`; those in need take it over, ascending.
    Kept { source: Rank, held: Held, in_need: Vec<Rank> },
}

/// Why a rank cannot go on with the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disagreement {
    /// It holds a state that is older than the head, and nobody holds a newer one: it has to start again.
    Behind,
    /// `ranks` hold something else than `rank`, after the same step (KEEP-2).
    Differ { step: Step, rank: Rank, ranks: Vec<Rank> },
}

/// What rank `rank` makes of what all ranks hold, in rank order. `head`: the step of the head pointer.
///
/// # Errors
/// See [`Disagreement`].
pub fn agree(rank: Rank, all: &[Option<Held>], head: Option<Step>) -> Result<Agreed, Disagreement> {
    let holders = || (0..).map(Rank).zip(all).filter_map(|(rank, held)| Some((rank, held.as_ref()?)));
    let reached = holders().map(|(_, held)| held.reached());
    let furthest = if planted("applied-step-undone") { reached.min() } else { reached.max() };
    let is_of_use = |(step, _): &(Step, u64)| head.is_none_or(|head| *step >= head) || planted("head-forgotten");
    let Some(furthest) = furthest.filter(is_of_use) else {
        let holds = all.get(rank.0 as usize).is_some_and(Option::is_some);
        return if holds { Err(Disagreement::Behind) } else { Ok(Agreed::Head) };
    };
    let mut leading = holders().filter(|(_, held)| held.reached() == furthest);
    let (source, first) = leading.next().expect("one of them has come furthest");
    let (same, differing): (Vec<_>, Vec<_>) =
        leading.partition(|(_, held)| held.digest == first.digest || planted("digests-not-compared"));
    if !differing.is_empty() {
        let ranks = differing.into_iter().map(|(rank, _)| rank).collect();
        return Err(Disagreement::Differ { step: furthest.0, rank: source, ranks });
    }
    let has_it = |rank: &Rank| *rank == source || same.iter().any(|(other, _)| other == rank);
    let is_left = |rank: &Rank| planted("laggard-goes-on") && holders().any(|(other, _)| other == *rank);
    let in_need = (0..).map(Rank).take(all.len()).filter(|rank| !has_it(rank) && !is_left(rank)).collect();
    Ok(Agreed::Kept { source, held: first.clone(), in_need })
}

/// The snapshot that whoever has it is to load before [`agree`] (KEEP-4), from what all ranks hold and have; `None` where none is to be.
#[must_use]
pub fn to_load(held: &[Option<Held>], snapshots: &[Option<Snapshot>], head: Option<Head>) -> Option<Snapshot> {
    let is_old = |step: Step| head.is_some_and(|head| step < head.step);
    if held.iter().flatten().any(|held| !is_old(held.step)) {
        return None;
    }
    let is_left = |generation: Generation| head.is_some_and(|head| generation < head.generation);
    let of_use = |one: &Snapshot| !is_old(one.step) && !is_left(one.generation);
    snapshots.iter().flatten().copied().filter(of_use).max()
}

/// The bytes of a chunk, and their hash behind them.
#[must_use]
pub fn seal(mut bytes: Vec<u8>) -> Vec<u8> {
    let hash = blake3::hash(&bytes);
    bytes.extend(hash.as_bytes());
    bytes
}

/// The bytes of a sealed chunk (KEEP-3); what is wrong with it otherwise.
///
/// # Errors
/// Where it does not have its hash.
pub fn open(mut bytes: Vec<u8>) -> Result<Vec<u8>, &'static str> {
    let end = bytes.len().checked_sub(blake3::OUT_LEN).ok_or("a chunk is shorter than its hash")?;
    if blake3::hash(&bytes[..end]).as_bytes()[..] != bytes[end..] && !planted("copy-unchecked") {
        return Err("a chunk does not have its hash");
    }
    bytes.truncate(end);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(step: u64, moves: u64, digest: &str) -> Option<Held> {
        Some(Held { step: Step(step), moves, digest: digest.to_owned() })
    }

    fn kept(source: u32, held: Option<Held>, in_need: &[u32]) -> Result<Agreed, Disagreement> {
        let in_need = in_need.iter().copied().map(Rank).collect();
        Ok(Agreed::Kept { source: Rank(source), held: held.unwrap(), in_need })
    }

    #[test]
    fn keep_1_the_furthest_is_gone_on_from_and_all_others_are_in_need() {
        let all = [None, held(4, 1, "a"), held(4, 2, "b"), held(3, 9, "c"), held(4, 2, "b")];
        for rank in 0..5 {
            assert_eq!(agree(Rank(rank), &all, Some(Step(4))), kept(2, held(4, 2, "b"), &[0, 1, 3]));
        }
        assert_eq!(agree(Rank(0), &all, None), kept(2, held(4, 2, "b"), &[0, 1, 3]));
        let alike = [held(4, 2, "b"), held(4, 2, "b")];
        assert_eq!(agree(Rank(1), &alike, None), kept(0, held(4, 2, "b"), &[]));
    }

    #[test]
    fn keep_1_what_is_older_than_the_head_is_of_no_use() {
        let all = [held(3, 1, "a"), None, held(3, 1, "a")];
        assert_eq!(agree(Rank(0), &all, Some(Step(4))), Err(Disagreement::Behind));
        assert_eq!(agree(Rank(1), &all, Some(Step(4))), Ok(Agreed::Head));
        assert_eq!(agree(Rank(0), &[None, None], None), Ok(Agreed::Head));
    }

    #[test]
    fn keep_2_what_differs_is_named() {
        let all = [held(2, 1, "old"), held(3, 1, "a"), held(3, 1, "b"), held(3, 1, "a"), held(3, 1, "c")];
        let differ = Disagreement::Differ { step: Step(3), rank: Rank(1), ranks: vec![Rank(2), Rank(4)] };
        assert!((0..5).all(|rank| agree(Rank(rank), &all, None) == Err(differ.clone())));
    }

    fn snapshot(step: u64, moves: u64, generation: u64) -> Option<Snapshot> {
        Some(Snapshot { step: Step(step), moves, generation: Generation(generation) })
    }

    fn head(step: u64, generation: u64) -> Option<Head> {
        Some(Head { step: Step(step), generation: Generation(generation) })
    }

    #[test]
    fn keep_4_a_snapshot_counts_where_nobody_holds_a_state_of_use() {
        let snapshots = [snapshot(9, 1, 2), None, snapshot(8, 9, 2)];
        let nobody = [None, None, None];
        assert_eq!(to_load(&nobody, &snapshots, head(4, 2)), snapshots[0]);
        assert_eq!(to_load(&nobody, &snapshots, None), snapshots[0]);
        assert_eq!(to_load(&nobody, &[None, None, None], None), None);
        // Also one that has not come as far as the snapshot: nobody goes back behind what lives.
        let alive = [None, held(5, 1, "a"), None];
        assert_eq!(to_load(&alive, &snapshots, head(5, 2)), None);
        assert_eq!(to_load(&alive, &snapshots, None), None);
        assert_eq!(to_load(&alive, &snapshots, head(6, 2)), snapshots[0], "it is older than the head");
    }

    #[test]
    fn keep_4_what_is_older_than_the_head_is_of_no_use() {
        let nobody = [None, None];
        let snapshots = [snapshot(9, 1, 2), snapshot(7, 1, 3)];
        assert_eq!(to_load(&nobody, &snapshots, head(9, 2)), snapshots[0], "as old as the head is old enough");
        assert_eq!(to_load(&nobody, &snapshots, head(10, 2)), None);
        // The third generation has begun before step 9, and its head is on another line.
        assert_eq!(to_load(&nobody, &snapshots, head(6, 3)), snapshots[1]);
        assert_eq!(to_load(&nobody, &snapshots, head(6, 4)), None);
    }

    #[test]
    fn keep_4_the_furthest_is_chosen_and_of_those_alike_the_later_generations() {
        let nobody = [None, None, None, None];
        let chosen = |all: [Option<Snapshot>; 4]| to_load(&nobody, &all, None);
        assert_eq!(chosen([snapshot(9, 1, 1), snapshot(9, 2, 1), snapshot(8, 7, 9), None]), snapshot(9, 2, 1));
        assert_eq!(chosen([snapshot(9, 2, 3), snapshot(9, 2, 5), snapshot(9, 2, 4), None]), snapshot(9, 2, 5));
    }

    /// KEEP-5: once one is loaded it is a state like any other, and one that could not be is not claimed again.
    #[test]
    fn keep_5_what_was_loaded_is_held_and_copied_by_the_others() {
        let snapshots = [None, snapshot(9, 1, 2), snapshot(9, 1, 2), snapshot(7, 1, 2)];
        let nobody = [None, None, None, None];
        let chosen = to_load(&nobody, &snapshots, head(4, 2));
        assert_eq!(chosen, snapshots[1]);
        // The second has loaded it, the third could not.
        let loaded = [None, held(9, 1, "a"), None, None];
        assert_eq!(to_load(&loaded, &[None, None, None, snapshots[3]], head(4, 2)), None);
        assert_eq!(agree(Rank(3), &loaded, Some(Step(4))), kept(1, held(9, 1, "a"), &[0, 2, 3]));
        // Neither could.
        assert_eq!(to_load(&nobody, &[None, None, None, snapshots[3]], head(4, 2)), snapshots[3]);
        let differ = [None, held(9, 1, "a"), held(9, 1, "b"), None];
        let found = agree(Rank(0), &differ, Some(Step(4)));
        assert_eq!(found, Err(Disagreement::Differ { step: Step(9), rank: Rank(1), ranks: vec![Rank(2)] }));
    }

    #[test]
    fn keep_3_a_chunk_that_was_changed_is_refused() {
        let whole = seal(b"weights".to_vec());
        assert_eq!(open(whole.clone()).unwrap(), b"weights");
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            assert_eq!(open(changed).unwrap_err(), "a chunk does not have its hash");
        }
        assert_eq!(open(whole[..10].to_vec()).unwrap_err(), "a chunk is shorter than its hash");
        let held = held(1, 1, "digest").unwrap();
        assert!(held.is("digest") && !held.is("another"));
    }
}
