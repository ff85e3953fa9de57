//! Which slots get no trainer for a while, since trainers have crashed or hung there again and again.
//!
//! - QUAR-1: a slot that is blamed twice within [`Policy::forget_ms`] rests from the second blame on; once it is blamed alone says nothing.
//! - QUAR-2: each further blame doubles the rest, up to [`Policy::most_ms`]. Every rest ends: no slot is given up for ever.
//! - QUAR-3: blames are kept in the records of the runs whose trainers they are about, so what follows from them is the same for every leader.
//!
//! A slot is a worker's name and a number, so a blame holds for whoever comes under that name.

use crate::gang::FreeSlot;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use thaw_proto::ids::Step;

/// Limits of quarantines. Times are milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// How long a slot rests after its second blame.
    pub first_ms: u64,
    /// How long it rests at most.
    pub most_ms: u64,
    /// After which a blame is forgotten.
    pub forget_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { first_ms: 60_000, most_ms: 3_600_000, forget_ms: 6 * 3_600_000 }
    }
}

/// A trainer's crash or hang, held against the slot that it was in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blame {
    pub place: FreeSlot,
    /// Unix milliseconds.
    pub at_ms: u64,
    /// The last step that the run was known to have applied.
    pub step: Step,
}

/// A slot that rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quarantine {
    /// Unix milliseconds.
    pub until_ms: u64,
    /// Blames that are not forgotten.
    pub blames: u32,
}

/// Slots that would be free but for their quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resting {
    pub slots: u32,
    /// When the first of them may be used again, in Unix milliseconds.
    pub until_ms: u64,
}

impl fmt::Display for Resting {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let until = time_of_day(self.until_ms);
        write!(formatter, "{} slot(s) are quarantined after crashes or hangs, the first until {until}", self.slots)
    }
}

/// The time of day, in UTC and words.
#[must_use]
pub fn time_of_day(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    format!("{:02}:{:02}:{:02} UTC", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60)
}

/// The slots that rest at `now_ms`, by all blames there are, in any order.
#[must_use]
pub fn quarantined<'a>(
    policy: &Policy,
    now_ms: u64,
    blames: impl IntoIterator<Item = &'a Blame>,
) -> BTreeMap<FreeSlot, Quarantine> {
    let mut by_place: BTreeMap<&FreeSlot, (u32, u64)> = BTreeMap::new();
    for blame in blames {
        if now_ms.saturating_sub(blame.at_ms) < policy.forget_ms {
            let (blames, last_ms) = by_place.entry(&blame.place).or_default();
            *blames += 1;
            *last_ms = blame.at_ms.max(*last_ms);
        }
    }
    let rests = |(place, (blames, last_ms)): (&FreeSlot, (u32, u64))| {
        let until_ms = last_ms + rest_ms(policy, blames);
        (now_ms < until_ms).then(|| (place.clone(), Quarantine { until_ms, blames }))
    };
    by_place.into_iter().filter_map(rests).collect()
}

fn rest_ms(policy: &Policy, blames: u32) -> u64 {
    let Some(doublings) = blames.checked_sub(2) else { return 0 };
    let factor = 1_u64.checked_shl(doublings).unwrap_or(u64::MAX);
    policy.first_ms.saturating_mul(factor).min(policy.most_ms)
}

/// Those of `free` that rest, in sum.
#[must_use]
pub fn resting(free: &[FreeSlot], quarantined: &BTreeMap<FreeSlot, Quarantine>) -> Option<Resting> {
    let ends = free.iter().filter_map(|slot| quarantined.get(slot)).map(|quarantine| quarantine.until_ms);
    let until_ms = ends.clone().min()?;
    Some(Resting { slots: u32::try_from(ends.count()).unwrap_or(u32::MAX), until_ms })
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_proto::ids::Slot;

    const POLICY: Policy = Policy { first_ms: 60, most_ms: 300, forget_ms: 10_000 };

    fn place(slot: u32) -> FreeSlot {
        FreeSlot { worker: "a".into(), slot: Slot(slot) }
    }

    fn blames(given: &[(u32, u64)]) -> Vec<Blame> {
        given.iter().map(|(slot, at_ms)| Blame { place: place(*slot), at_ms: *at_ms, step: Step(0) }).collect()
    }

    #[test]
    fn quar_1_the_second_blame_lets_a_slot_rest() {
        let given = blames(&[(0, 100), (1, 100), (1, 150)]);
        let rests = BTreeMap::from([(place(1), Quarantine { until_ms: 210, blames: 2 })]);
        assert_eq!(quarantined(&POLICY, 150, &given), rests);
        assert_eq!(quarantined(&POLICY, 209, &given), rests);
        assert_eq!(quarantined(&POLICY, 210, &given), BTreeMap::new(), "QUAR-2: it ends");
        // The first is forgotten by then.
        assert_eq!(quarantined(&POLICY, 10_120, &blames(&[(1, 100), (1, 10_110)])), BTreeMap::new());
    }

    #[test]
    fn quar_2_each_further_blame_doubles_the_rest_up_to_a_most() {
        let until = |count: usize| {
            let given: Vec<(u32, u64)> = (0..count).map(|_| (0, 1000)).collect();
            quarantined(&POLICY, 1000, &blames(&given))
                .get(&place(0))
                .map_or(0, |quarantine| quarantine.until_ms - 1000)
        };
        let lengths: Vec<u64> = [1, 2, 3, 4, 5, 6, 100].into_iter().map(until).collect();
        assert_eq!(lengths, [0, 60, 120, 240, 300, 300, 300]);
    }

    #[test]
    fn slots_in_use_do_not_count_as_resting() {
        let all = quarantined(&POLICY, 1000, &blames(&[(0, 990), (0, 1000), (1, 970), (1, 980)]));
        assert_eq!(resting(&[place(0), place(1), place(2)], &all), Some(Resting { slots: 2, until_ms: 1040 }));
        assert_eq!(resting(&[place(0), place(2)], &all), Some(Resting { slots: 1, until_ms: 1060 }));
        assert_eq!(resting(&[place(2)], &all), None);
        let said = Resting { slots: 2, until_ms: 1_700_000_000_000 }.to_string();
        assert_eq!(said, "2 slot(s) are quarantined after crashes or hangs, the first until 22:13:20 UTC");
    }

    /// Every invariant of the module that is cited is stated where it opens.
    #[test]
    fn cited_invariants_exist() {
        let (law, rest) = include_str!("quarantine.rs").split_once("use crate").unwrap();
        for (at, _) in rest.match_indices("QUAR-") {
            let id: String = rest[at..].chars().take(6).collect();
            assert!(!id.ends_with(|last: char| last.is_ascii_digit()) || law.contains(&format!("//! - {id}:")), "{id}");
        }
    }
}
