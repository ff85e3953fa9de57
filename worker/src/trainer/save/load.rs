//! From a checkpoint back to a replica and the state of its training.

use super::blob::{self, Tensors};
use super::{Error, Ledger};
use crate::trainer::job::Job;
use crate::trainer::replica::{self, Extent, Replica};
use crate::trainer::snapshot::{GroupSnapshot, Stamp};
use crate::trainer::state::{Best, Point, State};
use crate::trainer::trace::Traced;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use thaw_core::manifest::{BlobRef, GroupState, Manifest};
use thaw_proto::run::CheckpointRef;

/// Blobs that are read at a time: enough to keep a network file system busy, and no more than that many decoded twice in memory.
const READERS: usize = 4;

/// Reads the state that a checkpoint names into `replica`, and which of it is stored already into `ledger`.
pub(crate) fn load(
    job: &Job,
    checkpoint: &CheckpointRef,
    replica: &mut Replica,
    ledger: &mut Ledger,
) -> Result<State, Error> {
    let name = &checkpoint.manifest;
    let of_manifest = |source| Error::Manifest { manifest: name.clone(), source };
    let manifest = Manifest::from_json(&job.store.get_manifest(checkpoint)?).map_err(of_manifest)?;
    manifest.check_belongs(&job.run, &job.plan, &job.fingerprints).map_err(of_manifest)?;
    let blobs = read_all(job, &manifest.blobs())?;
    let current = groups(&manifest.groups, &blobs, replica, ledger, name)?;
    let best = match &manifest.best_groups {
        None => None,
        Some(states) => {
            let mut best = groups(states, &blobs, replica, ledger, name)?;
            // A group that thawed after the best weights is there as the run began (TRAIN-4), which the replica still holds.
            let mut thawed = job.ever_trained(super::last_stage(job, manifest.position.stage));
            thawed.retain(|group| !best.contains_key(group));
            best.extend(replica.snapshot(&thawed, Extent::Whole, None));
            Some(Best { groups: best })
        }
    };
    replica.restore(&current).map_err(|error| unfit(name, &error))?;
    Ok(State {
        position: manifest.position,
        ended: manifest.ended_stage_steps,
        first_epoch: manifest.stage_first_epoch,
        tracker: manifest.tracker,
        best,
        results: manifest.stage_results,
        deciding: None,
        point: if manifest.position.stage_step == 0 { Point::Entering } else { Point::Training },
        moves: 0,
        traced: Traced::default(),
        seconds: manifest.seconds,
        stage_seconds: manifest.stage_seconds,
    })
}

fn unfit(manifest: &str, problem: &replica::Error) -> Error {
    Error::Unfit { manifest: manifest.to_owned(), problem: problem.to_string() }
}

/// Reads and decodes blobs, a few at a time, and checks each against its name.
fn read_all(job: &Job, blobs: &[&BlobRef]) -> Result<BTreeMap<BlobRef, Tensors>, Error> {
    let _waits = job.pulse.wait();
    let (next, read) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let reader = || -> Result<(), Error> {
        while let Some(&blob) = blobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            let tensors = blob::read(&job.store, blob)?;
            read.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(blob.clone(), tensors);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS.min(blobs.len())).map(|_| scope.spawn(reader)).collect();
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader returns its errors"))
    })?;
    Ok(read.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner))
}

/// The groups that have blobs. Equal blobs get one stamp, so that they are known to be the same state.
fn groups(
    states: &[GroupState],
    blobs: &BTreeMap<BlobRef, Tensors>,
    replica: &mut Replica,
    ledger: &mut Ledger,
    manifest: &str,
) -> Result<BTreeMap<usize, GroupSnapshot>, Error> {
    let mut snapshots = BTreeMap::new();
    for (index, state) in states.iter().enumerate() {
        let Some(weights) = &state.weights else { continue };
        let stamp = ledger.stamp_of(state).unwrap_or_else(|| replica.draw_stamp());
        let optimizer = state.optimizer.as_ref().map(|blob| (&blobs[blob], state.optimizer_steps));
        let group = &replica.model().groups()[index];
        let snapshot = blob::snapshot(stamp, group, replica.optimizer(), &blobs[weights], optimizer)?;
        let snapshot = snapshot.map_err(|problem| Error::Unfit { manifest: manifest.to_owned(), problem })?;
        debug_assert_ne!(stamp, Stamp::INITIAL);
        ledger.note(stamp, state.clone());
        snapshots.insert(index, snapshot);
    }
    Ok(snapshots)
}
