//! What is checked of the store: who leads, and every change of a run's record.

use super::ledger::Weights;
use super::slots::check_slots;
use super::{Broken, Memory, Seen, ToyManifest, World};
use crate::etcd::{Change, Witness};
use std::collections::BTreeSet;
use std::path::PathBuf;
use thaw_coordinator::driver;
use thaw_coordinator::store::{Entry, Revision};
use thaw_core::run_machine::{Policy, RunRecord, Trainer};
use thaw_proto::ids::{Generation, Rank};
use thaw_proto::run::{CheckpointRef, RunReason, RunState};

impl Witness for World {
    fn changed(&mut self, by: &str, revision: Revision, changes: &[(Option<Entry>, Change)]) {
        for (before, change) in changes {
            match change {
                Change::Put(entry) if entry.key == "leader" => {
                    self.say(format!("{by} leads at {revision}"));
                    if before.is_some() {
                        self.violated("LEAD-1", format!("{by} takes the leader's key while it is held"));
                    }
                    let now = self.now_ms();
                    self.memory().holder = Some((by.to_owned(), now));
                }
                Change::Deleted(key) if key == "leader" => {
                    self.say(format!("nobody leads at {revision}: {by}"));
                    self.memory().holder = None;
                }
                Change::Put(entry) if entry.key.starts_with("runs/") => self.run_changed(by, revision, entry),
                Change::Put(entry) => {
                    self.say(format!("{by} puts {} at {revision}", entry.key.split('/').next().unwrap_or("")))
                }
                Change::Deleted(key) => self.say(format!("{by} deletes {key} at {revision}")),
            }
        }
    }
}

impl World {
    fn run_changed(&self, by: &str, revision: Revision, entry: &Entry) {
        let now = self.now_ms();
        let record: RunRecord = match driver::stored_run(&entry.value) {
            Ok(record) => record,
            Err(error) => return self.violated("DRIVE-3", format!("{} cannot be read: {error}", entry.key)),
        };
        let head = record.head.as_ref().map_or(0, |head| head.position.step.0);
        self.say(format!(
            "{by} stores {} {:?} {:?} g{} head {head} members {}",
            record.id,
            record.state,
            record.reason,
            record.generation,
            record.members.len()
        ));
        let mut broken = Vec::new();
        {
            let mut memory = self.memory();
            let leads = memory.holder.clone();
            if leads.as_ref().is_none_or(|(holder, _)| holder != by) {
                broken.push(("LEAD-1", format!("{by} writes while {leads:?} leads")));
            }
            if let Some(seen) = memory.runs.get(record.id.as_str()) {
                check_step(seen, &record, &memory, now, &mut broken);
                if let (Some((_, led_since)), RunReason::CoordinatorRestarted) = (&leads, record.reason)
                    && seen.record.state == RunState::Running
                    && record.state == RunState::Resizing
                    && now - led_since < Policy::default().reattach_timeout_ms - 500
                    && seen.record.world_sizes.last().is_some_and(|size| *size == seen.record.world_size())
                    && seen
                        .record
                        .members
                        .iter()
                        .all(|member| memory.alive.contains_key(member.trainer.incarnation.as_str()))
                {
                    broken.push(("RUN-9", format!("{} is stopped by a new leader though all of it lives", record.id)));
                }
            }
            let held =
                memory.runs.values().filter(|seen| seen.record.id != record.id && !seen.record.state.has_ended());
            let others: BTreeSet<_> = held.flat_map(|seen| seen.record.held_slots()).collect();
            if let Some(slot) = record.held_slots().find(|slot| others.contains(slot)) {
                broken.push(("SLOT-1", format!("{slot:?} is held twice")));
            }
            check_slots(&record, &memory, &mut broken);
            memory.remember(by, revision, record.clone(), now);
        }
        if let Some(head) = &record.head {
            self.check_head(&record, head, &mut broken);
        }
        broken.into_iter().for_each(|(id, what)| self.violated(id, what));
    }

    /// CKPT-1, CKPT-3 and LEDGER-1 over the head as it lies in storage.
    fn check_head(&self, record: &RunRecord, head: &CheckpointRef, broken: &mut Broken) {
        let folder = PathBuf::from(record.run_url.trim_start_matches("file://"));
        let Ok(bytes) = std::fs::read(folder.join(&head.manifest)) else {
            return broken.push(("CKPT-1", format!("the head {} is not in storage", head.manifest)));
        };
        if blake3::hash(&bytes).to_hex().as_str() != head.manifest_blake3 {
            return broken.push(("CKPT-1", format!("the head {} has been changed", head.manifest)));
        }
        let Ok(manifest) = serde_json::from_slice::<ToyManifest>(&bytes) else {
            return broken.push(("CKPT-1", format!("the head {} cannot be read", head.manifest)));
        };
        let named = (manifest.generation, manifest.step, manifest.run.as_str());
        if named != (head.generation.0, head.position.step.0, record.id.as_str()) {
            broken.push(("CKPT-1", format!("the head {head:?} names {named:?}")));
        }
        let blob =
            std::fs::read(folder.join(thaw_core::manifest::blob_name(&manifest.blob.blake3))).unwrap_or_default();
        if blake3::hash(&blob).to_hex().as_str() != manifest.blob.blake3 {
            return broken.push(("CKPT-3", format!("the blob of {} is not whole", head.manifest)));
        }
        let weights = Weights::try_from(&blob[..]).unwrap_or_default();
        if let Some(what) = self.memory().differs(record.id.as_str(), manifest.step, weights) {
            broken.push(("LEDGER-1", format!("{}: {what}", record.id)));
        }
    }
}

impl Memory {
    fn remember(&mut self, by: &str, revision: Revision, record: RunRecord, now: u64) {
        self.members.extend(record.trainers().map(|trainer| trainer.incarnation.to_string()));
        let id = record.id.to_string();
        let (mut heads, mut without, mut entered_ms) = (BTreeSet::new(), 0, now);
        if let Some(seen) = self.runs.remove(&id) {
            (heads, without) = (seen.heads, seen.generations_without_progress);
            let stays = (seen.record.state, seen.record.generation) == (record.state, record.generation);
            if stays && seen.by == by {
                entered_ms = seen.entered_ms;
            }
            without += u32::from(record.generation > seen.record.generation);
            let step = |record: &RunRecord| record.head.as_ref().map(|head| head.position);
            if step(&record) > step(&seen.record) {
                without = 0;
            }
        }
        heads.extend(record.head.as_ref().map(|head| head.manifest.clone()));
        let by = by.to_owned();
        let seen = Seen { record, revision: revision.0, heads, generations_without_progress: without, entered_ms, by };
        self.runs.insert(id, seen);
    }
}

/// RUN-1 to RUN-7, RUN-10 and RUN-15 over one stored change.
fn check_step(seen: &Seen, after: &RunRecord, memory: &Memory, now: u64, broken: &mut Broken) {
    let before = &seen.record;
    let run = &after.id;
    if after.generation != before.generation && after.generation != before.generation.next() {
        broken.push(("RUN-1", format!("{run}: generation {} follows {}", after.generation, before.generation)));
    }
    if before.state.has_ended() && before != after {
        broken.push(("RUN-4", format!("{run} has ended and changes")));
    }
    if after.state == RunState::Succeeded {
        let last = memory.workload(run.as_str()).map(|workload| workload.last_step);
        if after.head.as_ref().map(|head| head.position.step.0) != last {
            broken.push(("RUN-5", format!("{run} has succeeded at {:?} of {last:?}", after.head)));
        }
    }
    let waited = now - seen.entered_ms;
    let has_until = match before.state {
        RunState::Admitted => Policy::default().start_timeout_ms,
        RunState::Forming => Policy::default().forming_timeout_ms,
        _ => 0,
    };
    if after.reason == RunReason::GangTimeout && before.reason != RunReason::GangTimeout && waited + 1000 < has_until {
        broken.push(("RUN-15", format!("{run}: {:?} is given up after {waited} of {has_until} ms", before.state)));
    }
    if after.generation > before.generation {
        let limit = Policy::default().stop_timeout_ms;
        // Where some are kept, the others are those that were lost.
        let kept = |trainer: &Trainer| after.members.iter().any(|other| other.trainer == *trainer);
        let had = || before.members.iter().map(|member| &member.trainer).chain(&before.leaving);
        if had().next().is_some() && !had().any(kept) && waited + 1000 < limit {
            broken.push(("RUN-6", format!("{run}: {} is chosen while members live", after.generation)));
        }
    }
    let leads_for = memory.holder.as_ref().map_or(0, |(_, since)| now - since);
    // Later it knows of each member whether it survives.
    let knows_all = leads_for > Policy::default().reattach_timeout_ms + 2000;
    if before.state == RunState::Running
        && (after.state, after.reason) == (RunState::Resizing, RunReason::TrainerLost)
        && knows_all
        && memory.workload(run.as_str()).is_some_and(|workload| workload.keeps)
        && after.members.len() > 1
        && !after.carries
    {
        broken.push(("RUN-10", format!("{run}: {} trainers could go on and are stopped", after.members.len())));
    }
    if after.reason == RunReason::NoProgress && after.state == RunState::Failed && before.state != RunState::Failed {
        let (had, most) = (seen.generations_without_progress, Policy::default().most_failures);
        // The first of them may have been lost after it had made progress.
        if had + 1 < most {
            broken.push(("RUN-7", format!("{run} fails after {had} generations without progress, not {most}")));
        }
    }
    if after.head != before.head {
        check_moved(before, after, memory, broken);
    }
}

/// RUN-2 and RUN-3.
fn check_moved(before: &RunRecord, after: &RunRecord, memory: &Memory, broken: &mut Broken) {
    let run = &after.id;
    let Some(head) = &after.head else { return broken.push(("RUN-3", format!("{run} loses its head"))) };
    if before.head.as_ref().is_some_and(|old| old.position > head.position) {
        broken.push(("RUN-3", format!("{run}: the head goes back to step {}", head.position.step)));
    }
    if head.generation != before.generation {
        broken
            .push(("RUN-2", format!("{run}: generation {} moves the head of {}", head.generation, before.generation)));
    }
    let key = (run.to_string(), head.manifest.clone(), head.manifest_blake3.clone());
    let rank = memory.reported.get(&key).copied().map(Rank);
    if rank != Some(Rank(0)) {
        broken.push(("RUN-2", format!("{run}: rank {rank:?} moves the head")));
    }
    debug_assert!(head.generation >= Generation(1));
}
