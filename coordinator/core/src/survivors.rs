//! The state that a new generation goes on from, and whose it is: decided by every trainer for itself, from what all of them hold.
//!
//! ```text
//! all ranks: what each holds (step, moves, digest) ─▶ the furthest, if their digests agree ─▶ lowest of them ── sealed chunks ─▶ all others
//! ```
//!
//! - KEEP-1: a generation goes on from the furthest state that any of its ranks holds, if that is no older than the head; else from the head.
//! - KEEP-2: ranks that have come equally far must hold the same, to the last bit; where they do not, nothing is guessed and the run ends.
//! - KEEP-3: a rank takes over a peer's state whole, after every chunk's hash and its weights' own have been checked, or not at all.

use serde::{Deserialize, Serialize};
use thaw_mutants::planted;
use thaw_proto::ids::{Rank, Step};

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
