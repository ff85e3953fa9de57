//! From a replica to bytes and back: checkpoints, and the trained model.
//!
//! SAVE-1: a group that has never trained is not written: its weights are those the run began with, which the fingerprints name.
//! SAVE-2: a state is copied, hashed and written once, whether the run stands at it, has its best weights there, or both; later manifests
//!         name its blobs.
//! SAVE-3: every rank takes the same decisions about a save from what all ranks know alike (stamps, sizes, votes), so that each writes its
//!         share, and rank 0 the manifest once it knows of every share.
//! SAVE-4: training waits for no storage: for the copy of what it is about to change at most.
//! SAVE-5: into the memory of a host copies one trainer, the lowest rank of those that share it, and one copy at a time; where the last is still
//!         being written, or memory is short, the next is left out and counted.
//! SAVE-6: that trainer keeps its last copy until the next is told: until then its agent may not have opened it.

mod blob;
mod cadence;
mod contents;
mod host;
mod load;
mod model;
mod peer;
mod share;

pub(crate) use host::Hosted;
pub(crate) use load::load;
pub(crate) use model::{StoredAs, weights_blake3, write_archive, write_model, write_weights};
pub(crate) use peer::{Begun, agree};

use super::hold::{Hold, HoldPoint};
use super::job::Job;
use super::outbox::{Event, Outbox};
use super::replica::{Extent, Replica, StepReport};
use super::snapshot::{GroupSnapshot, Stamp};
use super::state::State;
use blob::Piece;
use cadence::Cadence;
use contents::Copies;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use thaw_core::manifest::{self, GroupState, Manifest};
use thaw_core::writers;
use thaw_node::checkpoint::{self, CheckpointStore, Keep, Writer};
use thaw_node::collective::Pulse;
use thaw_proto::ids::{Generation, StageIndex, Step};
use thaw_proto::run::CheckpointRef;
use thaw_torch::model as torch_model;

/// How long a save may take another rank, and the last checkpoint the coordinator.
const COMMIT_DEADLINE: Duration = Duration::from_secs(600);
/// Files younger than this may belong to a save in progress.
const SWEEP_GRACE: Duration = Duration::from_secs(600);

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error("cannot read the checkpoint {manifest}")]
    Manifest { manifest: String, source: manifest::Error },
    #[error("the checkpoint {manifest} does not fit the model: {problem}")]
    Unfit { manifest: String, problem: String },
    #[error("cannot read or write the model's tensors")]
    Model(#[from] torch_model::Error),
    #[error("cannot make optimizer state")]
    Optimizer(#[from] thaw_torch::optim::Error),
    #[error("layer group {group} was not copied; the copying thread ended")]
    Snapshot { group: String },
    #[error("rank {rank} left word of its share of a checkpoint that does not parse")]
    Part { rank: u32, source: serde_json::Error },
    #[error("the last checkpoint was not committed within {} s; is the coordinator alive?", COMMIT_DEADLINE.as_secs())]
    NotCommitted,
    #[error("a newer gang is proposed, so this one's checkpoint is not wanted any more")]
    Superseded,
    #[error("rank {rank} sent a state that cannot be used: {problem}")]
    Peer { rank: u32, problem: String },
    #[error("a copy of rank {rank}'s state arrived damaged: {problem}")]
    Damaged { rank: u32, problem: &'static str },
    #[error(
        "this trainer's state is older than the run's head, and no other trainer has a newer one; it has to start again"
    )]
    Behind,
    #[error(
        "replicas differ after step {step}: ranks {ranks:?} hold other weights or optimizer state than rank {rank}, or have decided otherwise"
    )]
    Differ { step: Step, rank: u32, ranks: Vec<u32> },
    #[error("cannot write the trained model")]
    Archive(#[from] thaw_graph::writer::Error),
    #[error("cannot read the backbone's weights")]
    Weights(#[from] thaw_graph::archive::Error),
    #[error("cannot write {path}")]
    File { path: PathBuf, source: io::Error },
}

/// What of the states with a stamp is stored, as far as this rank knows.
#[derive(Debug, Default)]
pub(crate) struct Ledger(BTreeMap<Stamp, GroupState>);

impl Ledger {
    fn stamp_of(&self, state: &GroupState) -> Option<Stamp> {
        self.0.iter().find(|(_, known)| *known == state).map(|(stamp, _)| *stamp)
    }

    fn note(&mut self, stamp: Stamp, state: GroupState) {
        self.0.insert(stamp, state);
    }

    /// Holds on to `wanted` alone; weights whose whole state is here are part of that.
    fn keep(&mut self, wanted: &BTreeSet<Stamp>) {
        for &stamp in wanted {
            let whole = stamp.with_optimizer().and_then(|whole| self.0.get(&whole)).cloned();
            if let Some(whole) = whole {
                self.0.entry(stamp).or_insert(GroupState { optimizer: None, optimizer_steps: 0, ..whole });
            }
        }
        self.0.retain(|stamp, _| wanted.contains(stamp));
    }

    /// As a manifest names it (SAVE-1).
    fn state(&self, name: &str, stamp: Stamp) -> GroupState {
        if stamp == Stamp::INITIAL {
            return unsaved(name);
        }
        self.0.get(&stamp).cloned().expect("every rank's share is in the ledger before a manifest is made")
    }
}

/// One rank's part in saving, on a thread of its own.
pub(crate) struct Saver {
    writer: Writer<Result<(), Error>>,
    generation: Generation,
    /// Rank 0: writes the manifests.
    lead: Option<Arc<Lead>>,
    cadence: Cadence,
    last: Option<Step>,
    skipped: u64,
    /// Begun within the present stage.
    of_stage: u32,
    /// Stamps that some rank has written, or is about to.
    written: BTreeSet<Stamp>,
    ledger: Arc<Mutex<Ledger>>,
    pulse: Pulse,
}

/// What rank 0 needs to make a checkpoint of what all ranks wrote.
struct Lead {
    outbox: Arc<Outbox>,
    hold: Option<Hold>,
    keep_last: usize,
    /// The manifest this generation began with, and those written since, while they are to be kept.
    recent: Mutex<Vec<(Step, String)>>,
}

impl Saver {
    /// `resumed` is the manifest this generation began with, `ledger` what it names.
    pub(crate) fn start(
        job: &Job,
        generation: Generation,
        rank: u32,
        outbox: &Arc<Outbox>,
        hold: Option<Hold>,
        resumed: Option<&CheckpointRef>,
        ledger: Ledger,
    ) -> Result<Self, Error> {
        let writer = Writer::start(Arc::new(CheckpointStore::open(&job.run_url)?))?;
        let settings = &job.spec.checkpoint;
        let recent = resumed.iter().map(|head| (head.position.step, head.manifest.clone())).collect();
        let keep_last = settings.save_total_limit as usize;
        let lead = Lead { outbox: Arc::clone(outbox), hold, keep_last, recent: Mutex::new(recent) };
        Ok(Self {
            writer,
            generation,
            lead: (rank == 0).then(|| Arc::new(lead)),
            cadence: Cadence::new(settings.save_steps, settings.max_overhead),
            last: None,
            skipped: 0,
            of_stage: 0,
            written: ledger.0.keys().copied().collect(),
            ledger: Arc::new(Mutex::new(ledger)),
            pulse: job.pulse.clone(),
        })
    }

    /// Whether this rank wants a save after `step` updates. Rank 0 decides for all, by its own clock.
    pub(crate) fn is_due(&self, step: Step) -> bool {
        self.lead.is_some() && self.cadence.is_due(step.0)
    }

    /// Whether the last save is still being written.
    pub(crate) fn is_busy(&self) -> bool {
        !self.writer.is_idle()
    }

    pub(crate) fn enter_stage(&mut self) {
        self.cadence.enter_stage();
        self.of_stage = 0;
    }

    /// Saves begun since the present stage was entered.
    pub(crate) fn saves_of_stage(&self) -> u32 {
        self.of_stage
    }

    /// Takes note of a step, and of saves that have ended meanwhile. `else_idle`: whether all that was copied with them is written too.
    pub(crate) fn after_step(&mut self, report: &StepReport, else_idle: bool) -> Result<(), Error> {
        self.cadence.step(report.seconds.whole, self.writer.is_idle() && else_idle);
        if report.votes.save && report.votes.busy {
            self.skipped += 1;
            if self.lead.is_some() {
                tracing::warn!(
                    skipped = self.skipped,
                    "skipped a checkpoint, since the last one is still being written"
                );
            }
        }
        self.reap()
    }

    fn reap(&mut self) -> Result<(), Error> {
        while let Some(result) = self.writer.poll()? {
            result?;
        }
        Ok(())
    }

    /// Hands the present state to the writers; all ranks call it at the same step. `copied` is what of it was copied already, `then` is
    /// reported after the checkpoint. Returns how long it held up training since `began`.
    pub(crate) fn save(
        &mut self,
        job: &Job,
        (replica, state): (&mut Replica, &State),
        copied: Option<&Copies>,
        then: Vec<Event>,
        began: Instant,
    ) -> Result<Duration, Error> {
        self.reap()?;
        let step = state.position.step;
        if self.last == Some(step) {
            return Ok(Duration::ZERO);
        }
        let wanted = Wanted::of(replica, state);
        let stamps: BTreeMap<Stamp, usize> = wanted.stamps().collect();
        let comes_whole = |stamp: &Stamp| stamp.with_optimizer().is_some_and(|whole| stamps.contains_key(&whole));
        let is_new = |stamp: &Stamp| !self.written.contains(stamp) && !comes_whole(stamp);
        let new: Vec<(Stamp, usize)> =
            stamps.iter().filter(|(stamp, _)| is_new(stamp)).map(|(stamp, group)| (*stamp, *group)).collect();
        let sizes: Vec<u64> = new.iter().map(|(_, group)| replica.state_bytes(*group)).collect();
        let writers = writers::assign(&sizes, replica.world_size());
        let best = state.best.as_ref().map(|best| &best.groups);
        let mut pieces = Vec::new();
        let rank = replica.rank();
        for ((stamp, group), _) in new.iter().zip(&writers).filter(|(_, writer)| **writer == rank) {
            let known = copied.and_then(|copied| copied.find(*group, *stamp));
            let snapshot = known.unwrap_or_else(|| copy(replica, best, *group, *stamp));
            pieces.push(Piece::new(&replica.model().groups()[*group], snapshot));
        }
        self.written = stamps.into_keys().collect();
        let work = Work {
            generation: self.generation,
            step,
            rank,
            pieces,
            ledger: Arc::clone(&self.ledger),
            manifest: self.lead.as_ref().map(|lead| ManifestWork {
                lead: Arc::clone(lead),
                draft: draft(job, self.generation, replica, state),
                wanted,
                others: writers.iter().copied().filter(|&writer| writer != 0).collect(),
                then,
            }),
        };
        let waits = self.pulse.wait();
        self.writer.submit(move |store| work.run(store))?;
        drop(waits);
        self.last = Some(step);
        self.of_stage += 1;
        let stall = began.elapsed();
        self.cadence.began(stall);
        Ok(stall)
    }

    /// Waits until the last save is durable and, on rank 0, the head pointer names it.
    pub(crate) fn finish(&mut self) -> Result<(), Error> {
        let _waits = self.pulse.wait();
        while let Some(result) = self.writer.wait()? {
            result?;
        }
        match (&self.lead, self.last) {
            (Some(lead), Some(step)) if !lead.outbox.wait_for_commit(step, COMMIT_DEADLINE) => {
                let superseded = lead.outbox.is_superseded(self.generation);
                Err(if superseded { Error::Superseded } else { Error::NotCommitted })
            }
            _ => Ok(()),
        }
    }

    /// Leaves the save in progress to end by itself: its generation is over, so nothing it writes will be the head.
    pub(crate) fn abandon(self) {
        self.writer.abandon();
    }
}

/// The state of a group with a stamp: as it is now, or as the best weights have it.
fn copy(
    replica: &mut Replica,
    best: Option<&BTreeMap<usize, GroupSnapshot>>,
    group: usize,
    stamp: Stamp,
) -> GroupSnapshot {
    match best.and_then(|best| best.get(&group)).filter(|known| known.stamp == stamp) {
        Some(known) => known.share(),
        None => replica.snapshot(&[group], Extent::Whole, None).remove(&group).expect("a group that was asked for"),
    }
}

/// The steps at which stages have ended, whose manifests are kept for good.
fn stage_ends(manifest: &Manifest) -> BTreeSet<Step> {
    let ends = manifest.ended_stage_steps.iter().scan(0, |step, steps| {
        *step += u64::from(*steps);
        Some(Step(*step))
    });
    ends.collect()
}

/// The stage whose groups the replica may have changed.
fn last_stage(job: &Job, stage: StageIndex) -> StageIndex {
    let last = u32::try_from(job.plan.stages.len().saturating_sub(1)).expect("a plan has few stages");
    StageIndex(stage.0.min(last))
}

/// Which states a manifest names, by group.
struct Wanted {
    current: Vec<Stamp>,
    best: Option<Vec<Stamp>>,
}

impl Wanted {
    fn of(replica: &Replica, state: &State) -> Self {
        let groups = 0..replica.model().groups().len();
        let best = state.best.as_ref().map(|best| {
            let stamp = |group| best.groups.get(&group).map_or(Stamp::INITIAL, |snapshot| snapshot.stamp);
            groups.clone().map(stamp).collect()
        });
        Self { current: groups.map(|group| replica.stamp(group)).collect(), best }
    }

    /// Those that need blobs, with their group.
    fn stamps(&self) -> impl Iterator<Item = (Stamp, usize)> {
        let all = [Some(&self.current), self.best.as_ref()].into_iter().flatten();
        let all = all.flat_map(|stamps| stamps.iter().copied().zip(0..));
        all.filter(|(stamp, _)| *stamp != Stamp::INITIAL)
    }
}

/// The manifest without its groups.
fn draft(job: &Job, generation: Generation, replica: &Replica, state: &State) -> Manifest {
    Manifest {
        format_version: manifest::FORMAT_VERSION,
        run: job.run.clone(),
        generation,
        leader_epoch: None,
        position: state.position,
        ended_stage_steps: state.ended.clone(),
        stage_first_epoch: state.first_epoch,
        tracker: state.tracker.clone(),
        stage_results: state.results.clone(),
        seconds: state.seconds,
        stage_seconds: state.stage_seconds,
        world_size: replica.world_size(),
        fingerprints: job.fingerprints.clone(),
        groups: job.plan.groups.iter().map(|group| unsaved(&group.name)).collect(),
        best_groups: None,
    }
}

fn unsaved(name: &str) -> GroupState {
    GroupState { name: name.to_owned(), weights: None, optimizer: None, optimizer_steps: 0 }
}

/// One rank's part of a save, on its writer's thread.
struct Work {
    generation: Generation,
    step: Step,
    rank: u32,
    pieces: Vec<Piece>,
    ledger: Arc<Mutex<Ledger>>,
    /// On rank 0.
    manifest: Option<ManifestWork>,
}

struct ManifestWork {
    lead: Arc<Lead>,
    draft: Manifest,
    wanted: Wanted,
    /// Ranks that write a share, without rank 0.
    others: BTreeSet<u32>,
    then: Vec<Event>,
}

impl Work {
    fn run(self, store: &CheckpointStore) -> Result<(), Error> {
        let span = tracing::info_span!("checkpoint", step = self.step.0, generation = self.generation.0);
        let _entered = span.entered();
        let mut mine = blob::write_all(self.pieces, store)?;
        let Some(manifest) = self.manifest else {
            // Rank 0 waits for no rank that had nothing to write.
            if !mine.is_empty() {
                store.put_part(self.generation, self.step, self.rank, share::to_json(&mine))?;
            }
            return Ok(());
        };
        let mut ledger = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        for &rank in &manifest.others {
            let superseded = || manifest.lead.outbox.is_superseded(self.generation);
            let part = store.wait_for_part(self.generation, self.step, rank, COMMIT_DEADLINE, superseded)?;
            mine.extend(share::from_json(&part).map_err(|source| Error::Part { rank, source })?);
        }
        mine.into_iter().for_each(|(stamp, state)| ledger.note(stamp, state));
        ledger.keep(&manifest.wanted.stamps().map(|(stamp, _)| stamp).collect());
        manifest.write(store, &ledger)
    }
}

impl ManifestWork {
    fn write(self, store: &CheckpointStore, ledger: &Ledger) -> Result<(), Error> {
        let (mut manifest, lead) = (self.draft, self.lead);
        let named = |stamps: &[Stamp]| -> Vec<GroupState> {
            manifest.groups.iter().zip(stamps).map(|(group, stamp)| ledger.state(&group.name, *stamp)).collect()
        };
        let (current, best) = (named(&self.wanted.current), self.wanted.best.as_deref().map(named));
        (manifest.groups, manifest.best_groups) = (current, best);
        Hold::at(lead.hold.as_ref(), HoldPoint::CheckpointWrite, manifest.position.step.0);
        let (generation, step) = (manifest.generation, manifest.position.step);
        if lead.outbox.is_superseded(generation) {
            return Err(Error::Superseded);
        }
        let written = store.put_manifest(generation, step, manifest.to_json())?;
        lead.outbox.send(Outbox::checkpoint(&CheckpointRef {
            position: manifest.position,
            generation,
            manifest: written.path.clone(),
            manifest_blake3: written.blake3,
        }));
        self.then.into_iter().for_each(|event| lead.outbox.send(event));
        for &rank in &self.others {
            store.delete_part(generation, step, rank)?;
        }
        let keep = Keep { manifests: lead.keep(step, written.path), steps: stage_ends(&manifest) };
        match store.retain(generation, &keep, SWEEP_GRACE) {
            Ok(_) => {}
            Err(error @ checkpoint::Error::Fenced { .. }) => return Err(error.into()),
            // The checkpoint is made; what cannot be swept today stays until it can.
            Err(error) => tracing::warn!(error = thaw_runtime::chain(&error), "did not delete old checkpoints"),
        }
        Ok(())
    }
}

impl Lead {
    /// Takes note of a new manifest, and says which to keep.
    fn keep(&self, step: Step, path: String) -> Vec<String> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.push((step, path));
        forget_old(&mut recent, self.keep_last, self.outbox.committed());
        recent.iter().map(|(_, path)| path.clone()).collect()
    }
}

/// Leaves the last ones, oldest first, and the head, which is older where nobody commits for long. `committed`: where this generation has heard
/// of a commit; before, the head is what it began with.
fn forget_old(recent: &mut Vec<(Step, String)>, keep_last: usize, committed: Option<Step>) {
    // One more than asked for: the newest may not be the head yet.
    let surplus = recent.len().saturating_sub(keep_last + 1);
    let head = recent.iter().rposition(|(step, _)| committed.is_some_and(|committed| *step <= committed)).unwrap_or(0);
    let mut place = 0..;
    recent.retain(|_| place.next().is_some_and(|place| place >= surplus || place == head));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_head_is_kept_however_many_follow_it() {
        let left = |committed: Option<u64>| {
            let mut recent: Vec<(Step, String)> = (1..=6).map(|step| (Step(step), step.to_string())).collect();
            forget_old(&mut recent, 2, committed.map(Step));
            recent.into_iter().map(|(step, _)| step.0).collect::<Vec<_>>()
        };
        assert_eq!(left(Some(6)), [4, 5, 6]);
        assert_eq!(left(Some(2)), [2, 4, 5, 6]);
        assert_eq!(left(None), [1, 4, 5, 6], "what the generation began with");
    }
}
