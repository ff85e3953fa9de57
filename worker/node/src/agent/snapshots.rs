//! The states of runs that this host holds in memory, each told by a trainer and there for the next (AGENT-9).

use crate::host_snapshot::{HostSnapshot, snapshot_of};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use thaw_proto::pb;
use tokio::time::Instant;

/// How long one is held with no trainer of its run alive here. Longer than it takes to agree on a new leader, wait before a restart and load a
/// large model, together; short enough that a run that never comes back does not keep memory from the others.
const KEPT_FOR: Duration = Duration::from_secs(600);

/// At most one of each run.
#[derive(Debug, Default)]
pub(super) struct Snapshots(BTreeMap<String, Kept>);

#[derive(Debug)]
struct Kept {
    snapshot: HostSnapshot,
    /// When a trainer of the run was last seen alive.
    used: Instant,
}

impl Snapshots {
    /// Opens what a trainer of the run tells, or lets go of what it says that nobody needs. Returns what is held no more: dropping it may take
    /// long.
    pub(super) fn hear(&mut self, run: &str, told: &pb::HostSnapshot, now: Instant) -> Option<HostSnapshot> {
        if told.address.is_empty() {
            return self.0.remove(run).map(|kept| kept.snapshot);
        }
        let told_snapshot = snapshot_of(told);
        let key = |snapshot: thaw_core::survivors::Snapshot| (snapshot.generation, snapshot.step, snapshot.moves);
        if self.0.get(run).is_some_and(|kept| key(kept.snapshot.snapshot()) > key(told_snapshot)) {
            // Of a trainer that was still writing when a later generation had told its own.
            return None;
        }
        match HostSnapshot::open(run, told) {
            Ok(snapshot) => {
                tracing::debug!(run, snapshot = %told_snapshot, bytes = told.bytes, "holds a run's state");
                self.0.insert(run.to_owned(), Kept { snapshot, used: now }).map(|before| before.snapshot)
            }
            Err(error) => {
                let error = thaw_runtime::chain(&error);
                tracing::warn!(run, error, "a trainer's copy of its state is gone already; what was held stays");
                None
            }
        }
    }

    /// What a new trainer of the run is told.
    pub(super) fn of(&self, run: &str) -> Option<pb::HostSnapshot> {
        self.0.get(run).map(|kept| kept.snapshot.told())
    }

    /// Gives those of runs that have had no trainer here for long.
    pub(super) fn take_old(&mut self, alive: &BTreeSet<String>, now: Instant) -> Vec<HostSnapshot> {
        for (run, kept) in &mut self.0 {
            if alive.contains(run) {
                kept.used = now;
            }
        }
        let is_old = |_: &String, kept: &mut Kept| now.saturating_duration_since(kept.used) >= KEPT_FOR;
        let old = self.0.extract_if(.., is_old);
        old.map(|(run, kept)| {
            tracing::info!(run, snapshot = %kept.snapshot.snapshot(), "nobody came for a run's state; it is let go");
            kept.snapshot
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use thaw_core::survivors::Snapshot;
    use thaw_proto::ids::{Generation, Step};
    use thaw_proto::run::Position;

    fn written(run: &str, generation: u64, step: u64) -> HostSnapshot {
        let snapshot = Snapshot { step: Step(step), moves: 2 * step, generation: Generation(generation) };
        let position = Position { step: Step(step), ..Position::default() };
        HostSnapshot::create(run, snapshot, position, b"{}", vec![Bytes::from_static(b"weights")]).unwrap()
    }

    fn held(snapshots: &Snapshots, run: &str) -> Option<(u64, u64)> {
        snapshots.of(run).map(|told| (told.generation, told.position.unwrap().step))
    }

    #[test]
    fn agent_9_the_last_of_each_run_is_held_and_outlives_its_writer() {
        let (mut snapshots, now) = (Snapshots::default(), Instant::now());
        let first = written("a", 1, 5);
        assert!(snapshots.hear("a", &first.told(), now).is_none());
        let second = written("a", 1, 8);
        let before = snapshots.hear("a", &second.told(), now).expect("the first is held no more");
        assert_eq!(before.snapshot().step, Step(5));
        let gone = written("b", 1, 3).told();
        snapshots.hear("b", &gone, now);
        assert_eq!(held(&snapshots, "b"), None, "its writer is gone, and with it the memory");
        let told = second.told();
        drop(second);
        assert!(HostSnapshot::open("a", &told).is_err());
        let own = snapshots.of("a").unwrap();
        let (_, body) = HostSnapshot::open("a", &own).unwrap().read().unwrap();
        assert_eq!(&body[..], b"weights");
        assert_eq!(held(&snapshots, "a"), Some((1, 8)));
    }

    #[test]
    fn agent_9_a_later_generations_stays_and_what_cannot_be_opened_changes_nothing() {
        let (mut snapshots, now) = (Snapshots::default(), Instant::now());
        let later = written("a", 3, 5);
        snapshots.hear("a", &later.told(), now);
        let late = written("a", 2, 9);
        assert!(snapshots.hear("a", &late.told(), now).is_none());
        assert_eq!(held(&snapshots, "a"), Some((3, 5)));
        let gone = written("a", 4, 9).told();
        assert!(snapshots.hear("a", &gone, now).is_none());
        let nonsense = pb::HostSnapshot { address: "nowhere".to_owned(), ..written("a", 4, 9).told() };
        assert!(snapshots.hear("a", &nonsense, now).is_none());
        assert_eq!(held(&snapshots, "a"), Some((3, 5)));
        // Nobody needs it any more.
        assert!(snapshots.hear("a", &pb::HostSnapshot::default(), now).is_some());
        assert_eq!(held(&snapshots, "a"), None);
    }

    #[test]
    fn agent_9_one_that_nobody_comes_for_is_let_go() {
        let (mut snapshots, began) = (Snapshots::default(), Instant::now());
        let (a, b) = (written("a", 1, 5), written("b", 1, 5));
        snapshots.hear("a", &a.told(), began);
        snapshots.hear("b", &b.told(), began);
        let alive = BTreeSet::from(["a".to_owned()]);
        let almost = began + KEPT_FOR - Duration::from_secs(1);
        assert!(snapshots.take_old(&alive, almost).is_empty());
        let old = snapshots.take_old(&BTreeSet::new(), began + KEPT_FOR);
        assert_eq!(old.len(), 1);
        assert_eq!((held(&snapshots, "a"), held(&snapshots, "b")), (Some((1, 5)), None));
        // The other's time began again when its trainer was last seen.
        assert!(snapshots.take_old(&BTreeSet::new(), almost + KEPT_FOR - Duration::from_secs(1)).is_empty());
        assert_eq!(snapshots.take_old(&BTreeSet::new(), almost + KEPT_FOR).len(), 1);
        assert!(snapshots.0.is_empty());
    }
}
