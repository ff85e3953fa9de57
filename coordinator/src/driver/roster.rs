//! Which runs have trainers on a worker, by their records: what a heartbeat is compared with, so that it costs the same in a fleet of thousands.

use std::collections::{BTreeMap, BTreeSet};
use thaw_core::run_machine::{RunRecord, Trainer};
use thaw_proto::ids::{RunId, WorkerName};

/// Follows every record that the driver has.
#[derive(Debug, Default)]
pub(super) struct Roster {
    by_worker: BTreeMap<WorkerName, BTreeMap<RunId, Vec<Trainer>>>,
}

impl Roster {
    /// A run's record is `now`; it was `before`.
    pub(super) fn follow(&mut self, before: Option<&RunRecord>, now: &RunRecord) {
        if before.is_some_and(|before| before.has_trainers_of(now)) {
            return;
        }
        let had: BTreeSet<&WorkerName> =
            before.iter().flat_map(|record| record.trainers()).map(|trainer| &trainer.worker).collect();
        for worker in had {
            if let Some(runs) = self.by_worker.get_mut(worker) {
                runs.remove(&now.id);
                if runs.is_empty() {
                    self.by_worker.remove(worker);
                }
            }
        }
        for trainer in now.trainers() {
            let runs = self.by_worker.entry(trainer.worker.clone()).or_default();
            runs.entry(now.id.clone()).or_default().push(trainer.clone());
        }
    }

    /// Runs with trainers on this worker.
    pub(super) fn runs_on(&self, worker: &WorkerName) -> impl Iterator<Item = &RunId> {
        self.by_worker.get(worker).into_iter().flat_map(BTreeMap::keys)
    }

    /// Whether these are the trainers that the run has on the worker, each once.
    pub(super) fn has_just(&self, worker: &WorkerName, run: &RunId, trainers: &[Trainer]) -> bool {
        let known = self.by_worker.get(worker).and_then(|runs| runs.get(run)).map_or(&[][..], Vec::as_slice);
        known.len() == trainers.len() && known.iter().all(|trainer| trainers.contains(trainer))
    }
}

#[cfg(test)]
mod tests {
    use super::super::stored::tests::gang_of;
    use super::*;
    use thaw_core::run_machine::RunRecord;

    fn on(record: &RunRecord, at: usize) -> Vec<Trainer> {
        vec![record.members[at].trainer.clone()]
    }

    #[test]
    fn drive_6_a_worker_is_compared_with_what_the_record_has_on_it() {
        let mut roster = Roster::default();
        let before = gang_of(3).record;
        roster.follow(None, &before);
        let (run, first) = (&before.id, on(&before, 0));
        let worker = &first[0].worker;
        assert!(roster.runs_on(worker).eq([run]));
        assert!(roster.has_just(worker, run, &first));
        assert!(!roster.has_just(worker, run, &[]), "it is missing");
        assert!(!roster.has_just(worker, run, &on(&before, 1)), "another one");
        // The last one leaves, and is about to be stopped; then it is gone.
        let mut leaving = before.clone();
        let last = leaving.members.pop().unwrap().trainer;
        leaving.leaving.push(last.clone());
        roster.follow(Some(&before), &leaving);
        assert!(roster.has_just(&last.worker, run, std::slice::from_ref(&last)));
        let mut gone = leaving.clone();
        gone.leaving.clear();
        roster.follow(Some(&leaving), &gone);
        assert_eq!(roster.runs_on(&last.worker).count(), 0);
        assert!(roster.has_just(&last.worker, run, &[]) && roster.has_just(worker, run, &first));
    }
}
