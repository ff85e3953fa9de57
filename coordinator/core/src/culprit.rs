//! Whom a gang waited for: from what its trainers' records of their last operations say.
//!
//! - CULPRIT-1: who is furthest behind is named, by the lowest operation that it has not finished; where others of those have entered it, who
//!   has not is named before who has not left it.
//! - CULPRIT-2: ranks are compared operation by operation: the host's operations and the sums over GPUs count by themselves.
//! - CULPRIT-3: a generation is judged once, when all its ranks are heard from, or [`PATIENCE_MS`] after it was lost.
//! - CULPRIT-4: a trainer is stuck where all ranks are heard from, all others had come to an operation that it alone never came to, and its agent
//!   says that its training had stood still for [`STUCK_MS`], waiting for nobody. One that is only slow moves.
//!
//! It knows nothing of a generation that is over for a known reason, and never decides what follows from a name.

use crate::run_machine::Trainer;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;
use thaw_proto::ids::{Generation, Rank};
use thaw_proto::worker::{CollectiveOperation, OperationEnd, RecentOperations};

/// How long the other ranks' records are waited for, in milliseconds.
pub const PATIENCE_MS: u64 = 2_000;
/// How long a trainer's training must have stood still to be stuck, in milliseconds: less than an operation waits for it, and more than a layer
/// takes that is not.
pub const STUCK_MS: u64 = 20_000;
/// Ranks named in a sentence; more are counted.
const MOST_NAMED: usize = 4;
/// Ranks whose last operations are told one by one.
const MOST_TOLD: usize = 16;
/// Of those, how many operations each.
const OPERATIONS_TOLD: usize = 4;

/// What the records of a generation say, by rank.
pub type Records<'a> = BTreeMap<Rank, &'a [CollectiveOperation]>;

/// Whom a gang waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Ranks are in different operations where all should be in the same.
    Mismatch { operations: Vec<(CollectiveOperation, Vec<Rank>)> },
    /// `ranks` have not entered an operation that others wait in, or are past.
    NeverCame { operation: CollectiveOperation, ranks: Vec<Rank>, waiting: usize },
    /// `ranks` have not left an operation that others have finished.
    NeverLeft { operation: CollectiveOperation, ranks: Vec<Rank>, gone_on: usize },
    /// All ranks that are heard from are in it; these are not heard from.
    Unheard { operation: Option<CollectiveOperation>, ranks: Vec<Rank> },
    /// All ranks are in it, so that what is between them is at fault.
    AllCame { operation: CollectiveOperation },
    /// No rank is in any operation that others are not, or past it.
    NobodyWaited,
}

impl Finding {
    /// The ranks to look at; none where no rank is to blame by itself.
    #[must_use]
    pub fn suspects(&self) -> &[Rank] {
        match self {
            Self::NeverCame { ranks, .. } | Self::NeverLeft { ranks, .. } | Self::Unheard { ranks, .. } => ranks,
            Self::Mismatch { .. } | Self::AllCame { .. } | Self::NobodyWaited => &[],
        }
    }

    /// Lower is surer.
    fn certainty(&self) -> u8 {
        match self {
            Self::Mismatch { .. } => 0,
            Self::NeverCame { .. } => 1,
            Self::NeverLeft { .. } => 2,
            Self::Unheard { .. } => 3,
            Self::AllCame { .. } => 4,
            Self::NobodyWaited => 5,
        }
    }
}

/// Whom the gang waited for (CULPRIT-1, CULPRIT-2).
#[must_use]
pub fn find(records: &Records<'_>, world_size: u32) -> Finding {
    let of_counter = |on_gpu: bool| {
        let counted = |operations: &&[CollectiveOperation]| -> Vec<CollectiveOperation> {
            operations.iter().filter(|operation| operation.kind.is_on_gpu() == on_gpu).copied().collect()
        };
        let records = records.iter().map(|(rank, operations)| (*rank, counted(operations))).collect();
        find_one(&records, world_size)
    };
    let (host, gpus) = (of_counter(false), of_counter(true));
    if gpus.certainty() < host.certainty() { gpus } else { host }
}

fn find_one(records: &BTreeMap<Rank, Vec<CollectiveOperation>>, world_size: u32) -> Finding {
    if let Some(mismatch) = mismatch(records) {
        return mismatch;
    }
    let entered = |operations: &[CollectiveOperation]| operations.iter().map(|operation| operation.sequence).max();
    let next = |operations: &[CollectiveOperation]| {
        let finished = operations.iter().filter(|operation| matches!(operation.end, OperationEnd::Finished { .. }));
        finished.map(|operation| operation.sequence + 1).max().unwrap_or(0)
    };
    // The operation that who is furthest behind has not finished.
    let first = records.values().map(|operations| next(operations)).min().unwrap_or(0);
    let of_all = || records.values().flatten();
    let sought = of_all().find(|operation| operation.sequence == first);
    // A rank that has come to none has no record of that one's neighbours.
    let operation = sought.or_else(|| of_all().min_by_key(|operation| operation.sequence)).copied();
    let ranks_where = |holds: &dyn Fn(&[CollectiveOperation]) -> bool| -> Vec<Rank> {
        records.iter().filter(|(_, operations)| holds(operations)).map(|(rank, _)| *rank).collect()
    };
    let came = ranks_where(&|operations| entered(operations).is_some_and(|last| last >= first));
    let behind = ranks_where(&|operations| entered(operations).is_none_or(|last| last < first));
    let inside = ranks_where(&|operations| next(operations) == first && entered(operations) >= Some(first));
    let unheard: Vec<Rank> = (0..world_size).map(Rank).filter(|rank| !records.contains_key(rank)).collect();
    match operation.filter(|_| !came.is_empty()) {
        Some(operation) if !behind.is_empty() => Finding::NeverCame { operation, ranks: behind, waiting: came.len() },
        Some(operation) if inside.len() < came.len() => {
            let gone_on = came.len() - inside.len();
            Finding::NeverLeft { operation, ranks: inside, gone_on }
        }
        operation if !unheard.is_empty() => Finding::Unheard { operation, ranks: unheard },
        Some(operation) => Finding::AllCame { operation },
        None => Finding::NobodyWaited,
    }
}

/// The first operation that is not the same on all ranks that have a record of it.
fn mismatch(records: &BTreeMap<Rank, Vec<CollectiveOperation>>) -> Option<Finding> {
    let mut by_sequence: BTreeMap<u64, Vec<(CollectiveOperation, Vec<Rank>)>> = BTreeMap::new();
    for (rank, operations) in records {
        for operation in operations {
            let found = by_sequence.entry(operation.sequence).or_default();
            match found.iter_mut().find(|(other, _)| other.kind == operation.kind) {
                Some((_, ranks)) => ranks.push(*rank),
                None => found.push((*operation, vec![*rank])),
            }
        }
    }
    let operations = by_sequence.into_values().find(|operations| operations.len() > 1)?;
    Some(Finding::Mismatch { operations })
}

/// What is heard of a generation until it is judged.
#[derive(Debug, Default)]
pub struct Inquest {
    generation: Generation,
    heard: BTreeMap<Rank, Heard>,
    world_size: u32,
    /// When the generation was found to be lost. Unix milliseconds.
    since_ms: Option<u64>,
    /// The last generation that was judged.
    judged: Generation,
}

/// A rank's record, and whose it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Heard {
    pub trainer: Trainer,
    /// Oldest first.
    pub operations: Vec<CollectiveOperation>,
    /// For how long its training had stood still.
    pub still: Duration,
}

impl Inquest {
    /// Takes a trainer's record of a generation. One of an earlier generation than one that is known is left out.
    pub fn hear(&mut self, generation: Generation, trainer: Trainer, recent: RecentOperations) {
        if generation < self.generation || generation <= self.judged {
            return;
        }
        if generation > self.generation {
            self.begin(generation);
        }
        self.world_size = self.world_size.max(recent.world_size);
        self.heard.insert(recent.rank, Heard { trainer, operations: recent.operations, still: recent.still });
    }

    /// Judges a generation that was lost for no known reason, once that is due (CULPRIT-3). `None` also where nobody has a record.
    pub fn judge(&mut self, lost: Generation, now_ms: u64) -> Option<Judgement> {
        if lost < self.generation || lost <= self.judged {
            return None;
        }
        if lost > self.generation {
            self.begin(lost);
        }
        let since_ms = *self.since_ms.get_or_insert(now_ms);
        let all = !self.heard.is_empty() && self.heard.len() == self.world_size as usize;
        if !all && now_ms < since_ms + PATIENCE_MS {
            return None;
        }
        self.judged = lost;
        let heard = std::mem::take(&mut self.heard);
        if heard.is_empty() {
            return None;
        }
        let records: Records<'_> = heard.iter().map(|(rank, heard)| (*rank, heard.operations.as_slice())).collect();
        let finding = find(&records, self.world_size);
        Some(Judgement { generation: lost, finding, heard, world_size: self.world_size })
    }

    fn begin(&mut self, generation: Generation) {
        self.generation = generation;
        self.heard.clear();
        (self.world_size, self.since_ms) = (0, None);
    }
}

/// Whom a generation waited for, with what that rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    pub generation: Generation,
    pub finding: Finding,
    pub heard: BTreeMap<Rank, Heard>,
    /// Ranks that could be heard from.
    pub world_size: u32,
}

impl Judgement {
    /// The trainers to look at.
    pub fn suspects(&self) -> impl Iterator<Item = &Trainer> {
        self.finding.suspects().iter().filter_map(|rank| self.heard.get(rank)).map(|heard| &heard.trainer)
    }

    /// The trainer that is to blame for certain, where there is one (CULPRIT-4).
    #[must_use]
    pub fn stuck(&self) -> Option<&Heard> {
        let Finding::NeverCame { ranks, waiting, .. } = &self.finding else { return None };
        let [rank] = ranks[..] else { return None };
        let others_came = self.heard.len() == self.world_size as usize && waiting + 1 == self.heard.len();
        self.heard.get(&rank).filter(|heard| others_came && heard.still >= Duration::from_millis(STUCK_MS))
    }

    /// The last operations of the ranks, suspects first, a line each with its rank; of a large gang not of all.
    #[must_use]
    pub fn lines(&self) -> Vec<(Rank, String)> {
        let suspects = self.finding.suspects();
        let others = self.heard.keys().filter(|rank| !suspects.contains(rank));
        let told = suspects.iter().chain(others).take(MOST_TOLD);
        told.filter_map(|rank| Some((*rank, line(&self.heard.get(rank)?.operations)))).collect()
    }

    /// `rank 1 on a slot 0`.
    fn who(&self, rank: Rank) -> String {
        match self.heard.get(&rank) {
            Some(Heard { trainer, .. }) => format!("rank {rank} on {} slot {}", trainer.worker, trainer.slot),
            None => format!("rank {rank}"),
        }
    }

    fn whom(&self, ranks: &[Rank]) -> String {
        let named: Vec<String> = ranks.iter().take(MOST_NAMED).map(|rank| self.who(*rank)).collect();
        match ranks.len().saturating_sub(MOST_NAMED) {
            0 => named.join(", "),
            more => format!("{} and {more} more", named.join(", ")),
        }
    }

    /// What the first of the ranks did last.
    fn before(&self, ranks: &[Rank]) -> String {
        let heard = ranks.first().and_then(|rank| self.heard.get(rank));
        match heard.and_then(|heard| heard.operations.last()) {
            Some(last) => format!("its last was {last}"),
            None => "it has come to none".to_owned(),
        }
    }
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let generation = self.generation;
        match &self.finding {
            Finding::NeverCame { operation, ranks, waiting } => write!(
                f,
                "generation {generation} waited for {}: {waiting} other(s) came to {operation}; {}",
                self.whom(ranks),
                self.before(ranks)
            ),
            Finding::NeverLeft { operation, ranks, gone_on } => write!(
                f,
                "generation {generation} waited for {}, still in {operation}, which {gone_on} other(s) had left",
                self.whom(ranks)
            ),
            Finding::Mismatch { operations } => {
                write!(f, "the trainers of generation {generation} were in different operations: ")?;
                for (at, (operation, ranks)) in operations.iter().enumerate() {
                    let separator = if at == 0 { "" } else { "; " };
                    write!(f, "{separator}{} in {operation}", self.whom(ranks))?;
                }
                Ok(())
            }
            Finding::Unheard { operation, ranks } => {
                write!(f, "generation {generation} waited for {}, not heard from", self.whom(ranks))?;
                match operation {
                    Some(operation) => write!(f, ", while all others were in {operation}"),
                    None => Ok(()),
                }
            }
            Finding::AllCame { operation } => write!(
                f,
                "all trainers of generation {generation} had come to {operation}; what is between them is at fault"
            ),
            Finding::NobodyWaited => {
                write!(f, "no trainer of generation {generation} waited for another; all computed, or had yet to begin")
            }
        }
    }
}

/// A rank's last operations, newest first.
fn line(operations: &[CollectiveOperation]) -> String {
    let told = operations.iter().rev().take(OPERATIONS_TOLD).map(|operation| {
        let took = |at_us: u64| format!("{} us", at_us.saturating_sub(operation.began_us));
        match operation.end {
            OperationEnd::None => format!("{operation}, not left"),
            OperationEnd::Finished { at_us } => format!("{operation}, finished in {}", took(at_us)),
            OperationEnd::Failed { at_us } => format!("{operation}, failed after {}", took(at_us)),
        }
    });
    let told: Vec<String> = told.collect();
    if told.is_empty() {
        "no operation over all ranks".to_owned()
    } else {
        format!("last operations: {}", told.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_proto::ids::{Slot, StageIndex, Step};
    use thaw_proto::worker::CollectiveKind;

    fn operation(sequence: u64, kind: CollectiveKind, end: OperationEnd) -> CollectiveOperation {
        let step = Step(sequence / 2);
        CollectiveOperation { kind, sequence, bytes: 8, stage: StageIndex(1), step, began_us: 1000, end }
    }

    fn finished(sequence: u64) -> CollectiveOperation {
        operation(sequence, CollectiveKind::ReduceF32, OperationEnd::Finished { at_us: 1500 })
    }

    fn inside(sequence: u64) -> CollectiveOperation {
        operation(sequence, CollectiveKind::ReduceF32, OperationEnd::None)
    }

    fn failed(sequence: u64) -> CollectiveOperation {
        operation(sequence, CollectiveKind::ReduceF32, OperationEnd::Failed { at_us: 9000 })
    }

    fn found(records: &[&[CollectiveOperation]], world_size: u32) -> Finding {
        find(&(0..).map(Rank).zip(records.iter().copied()).collect(), world_size)
    }

    fn ranks<const N: usize>(ranks: [u32; N]) -> Vec<Rank> {
        ranks.map(Rank).to_vec()
    }

    #[test]
    fn who_never_came_is_named() {
        let waits = [finished(6), failed(7)];
        let found = found(&[&waits, &waits, &[finished(6)], &[finished(6), inside(7)]], 4);
        assert_eq!(found, Finding::NeverCame { operation: failed(7), ranks: ranks([2]), waiting: 3 });
        assert_eq!(found.suspects(), ranks([2]));
    }

    #[test]
    fn who_never_came_is_named_before_who_has_not_left() {
        // Rank 1 is past it, rank 0 is in it.
        let found = found(&[&[finished(6), inside(7)], &[finished(7), inside(8)], &[finished(6)]], 3);
        assert_eq!(found, Finding::NeverCame { operation: inside(7), ranks: ranks([2]), waiting: 2 });
    }

    #[test]
    fn who_has_not_left_what_others_have_is_named() {
        let found = found(&[&[finished(6), finished(7), inside(8)], &[finished(6), inside(7)], &[finished(7)]], 3);
        assert_eq!(found, Finding::NeverLeft { operation: finished(7), ranks: ranks([1]), gone_on: 2 });
    }

    #[test]
    fn two_that_are_behind_are_named_by_how_far() {
        let waits = [finished(6), finished(7), inside(8)];
        let both = found(&[&waits, &[finished(7)], &[finished(7)], &waits], 4);
        assert_eq!(both, Finding::NeverCame { operation: inside(8), ranks: ranks([1, 2]), waiting: 2 });
        let one = found(&[&waits, &[finished(6)], &[finished(7)], &waits], 4);
        assert_eq!(one, Finding::NeverCame { operation: finished(7), ranks: ranks([1]), waiting: 3 });
    }

    #[test]
    fn nobody_is_blamed_where_all_came_or_none_waits() {
        let waits = [finished(6), inside(7)];
        let all = found(&[&waits, &waits], 2);
        assert_eq!(all, Finding::AllCame { operation: inside(7) });
        assert!(all.suspects().is_empty());
        assert_eq!(found(&[&[finished(6)], &[finished(6)]], 2), Finding::NobodyWaited);
        assert_eq!(found(&[&[], &[]], 2), Finding::NobodyWaited);
    }

    #[test]
    fn who_is_not_heard_from_is_named_where_all_others_came() {
        let waits = [finished(6), inside(7)];
        let silent = found(&[&waits, &waits], 3);
        assert_eq!(silent, Finding::Unheard { operation: Some(inside(7)), ranks: ranks([2]) });
        let late = found(&[&waits, &[finished(6)]], 3);
        assert_eq!(late, Finding::NeverCame { operation: inside(7), ranks: ranks([1]), waiting: 1 }, "it is surer");
        assert_eq!(found(&[&[finished(6)]], 2), Finding::Unheard { operation: None, ranks: ranks([1]) });
    }

    #[test]
    fn different_operations_at_one_place_are_told() {
        let gathers = operation(7, CollectiveKind::AllGather, OperationEnd::None);
        let found = found(&[&[finished(6), inside(7)], &[finished(6), gathers], &[finished(6), inside(7)]], 3);
        let operations = vec![(inside(7), ranks([0, 2])), (gathers, ranks([1]))];
        assert_eq!(found, Finding::Mismatch { operations });
    }

    /// CULPRIT-2
    #[test]
    fn sums_over_gpus_are_counted_by_themselves() {
        let sum = |sequence, end| operation(sequence, CollectiveKind::GpuSum, end);
        let done = OperationEnd::Finished { at_us: 2000 };
        let waits = [finished(9), sum(40, done), sum(41, OperationEnd::None)];
        let found = found(&[&waits, &[finished(9), sum(40, done)]], 2);
        let operation = sum(41, OperationEnd::None);
        assert_eq!(found, Finding::NeverCame { operation, ranks: ranks([1]), waiting: 1 });
    }

    #[test]
    fn a_rank_without_any_operation_is_behind_all() {
        let found = found(&[&[finished(6), inside(7)], &[]], 2);
        assert_eq!(found, Finding::NeverCame { operation: finished(6), ranks: ranks([1]), waiting: 1 });
    }

    fn trainer(slot: u32) -> Trainer {
        Trainer { worker: "a".into(), slot: Slot(slot), incarnation: format!("i{slot}").as_str().into() }
    }

    fn recent(rank: u32, operations: &[CollectiveOperation]) -> RecentOperations {
        RecentOperations { rank: Rank(rank), world_size: 3, operations: operations.to_vec(), still: Duration::ZERO }
    }

    /// CULPRIT-4
    #[test]
    fn only_who_stood_still_while_all_others_waited_is_stuck() {
        let (waits, behind) = ([finished(6), failed(7)], [finished(6)]);
        let long = Duration::from_millis(STUCK_MS);
        let stuck = |records: &[(&[CollectiveOperation], Duration)]| {
            let mut inquest = Inquest::default();
            for (rank, (operations, still)) in (0..).zip(records) {
                let recent = RecentOperations { still: *still, ..recent(rank, operations) };
                inquest.hear(Generation(3), trainer(rank), recent);
            }
            let judgement = inquest.judge(Generation(3), 0).or_else(|| inquest.judge(Generation(3), PATIENCE_MS));
            judgement.unwrap().stuck().map(|heard| heard.trainer.slot)
        };
        let (moves, almost) = (Duration::ZERO, long - Duration::from_millis(1));
        assert_eq!(stuck(&[(&waits, moves), (&behind, long), (&waits, moves)]), Some(Slot(1)));
        assert_eq!(stuck(&[(&waits, moves), (&behind, almost), (&waits, moves)]), None, "it is slow");
        assert_eq!(stuck(&[(&waits, long), (&behind, moves), (&waits, moves)]), None, "it is another that stands");
        assert_eq!(stuck(&[(&waits, moves), (&behind, long), (&behind, long)]), None, "two are behind");
        assert_eq!(stuck(&[(&waits, moves), (&behind, long)]), None, "one is not heard from");
        let left = [finished(6), finished(7)];
        assert_eq!(stuck(&[(&left, moves), (&waits, long), (&left, moves)]), None, "it came");
    }

    /// CULPRIT-3
    #[test]
    fn a_generation_is_judged_once_when_all_are_heard_or_time_is_over() {
        let (third, waits) = (Generation(3), [finished(6), failed(7)]);
        let mut inquest = Inquest::default();
        inquest.hear(third, trainer(0), recent(0, &waits));
        inquest.hear(Generation(2), trainer(2), recent(2, &waits));
        assert_eq!(inquest.judge(third, 100), None);
        inquest.hear(third, trainer(1), recent(1, &[finished(6)]));
        assert_eq!(inquest.judge(third, 200), None, "the older record is not of this generation");
        inquest.hear(third, trainer(2), recent(2, &waits));
        let judgement = inquest.judge(third, 300).unwrap();
        assert_eq!(judgement.suspects().collect::<Vec<_>>(), [&trainer(1)]);
        assert_eq!(
            judgement.to_string(),
            "generation 3 waited for rank 1 on a slot 1: 2 other(s) came to reduce_shards_f32 7 (8 bytes) of step 3 in \
             stage 1; its last was reduce_shards_f32 6 (8 bytes) of step 3 in stage 1"
        );
        let lines = judgement.lines();
        assert_eq!(lines.len(), 3);
        let text = "last operations: reduce_shards_f32 6 (8 bytes) of step 3 in stage 1, finished in 500 us";
        assert_eq!(lines[0], (Rank(1), text.to_owned()));
        assert!(lines[1].1.contains("step 3 in stage 1, failed after 8000 us; "), "{lines:?}");
        assert_eq!(inquest.judge(third, 9999), None, "once");

        inquest.hear(third, trainer(0), recent(0, &waits));
        let fourth = Generation(4);
        assert_eq!(inquest.judge(fourth, 1000), None);
        inquest.hear(fourth, trainer(0), recent(0, &waits));
        assert_eq!(inquest.judge(fourth, 1000 + PATIENCE_MS - 1), None);
        let judgement = inquest.judge(fourth, 1000 + PATIENCE_MS).unwrap();
        assert_eq!(judgement.finding.suspects(), ranks([1, 2]));
        let text = judgement.to_string();
        assert!(text.starts_with("generation 4 waited for rank 1, rank 2, not heard from, while all others"), "{text}");
        assert_eq!(inquest.judge(Generation(5), 9000), None);
        assert_eq!(inquest.judge(Generation(5), 9000 + PATIENCE_MS), None, "nobody has a record");
    }
}
