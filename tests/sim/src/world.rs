//! What is known of everything at once: the invariants' memory. Coordinators, agents and trainers never read it.
//!
//! - LEDGER-1: the state at every committed step is that of a trainer that saw each sample of each step once, in order.
//! - ONCE-1: of a generation, each rank is one trainer, and its key is no other generation's.
//! - SLOT-1: no slot is held by two runs.
//!
//! The others are stated where they are kept (RUN-n, DRIVE-n, LEAD-n, GRPC-n, AGENT-n, CKPT-n).

use crate::etcd::{Change, Witness};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use thaw_coordinator::driver;
use thaw_coordinator::store::{Entry, Revision};
use thaw_core::run_machine::{Member, Policy, RunRecord};
use thaw_proto::ids::{Generation, Rank};
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::peers::Peers;
use thaw_proto::run::{CheckpointRef, RunReason, RunState};

/// Samples of a step.
pub(crate) const GLOBAL_BATCH: u32 = 8;
/// Logical shards of a step.
pub(crate) const SHARDS: u32 = 8;

/// What one run is to do.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) workers: (u32, u32),
    pub(crate) last_step: u64,
    pub(crate) step: Duration,
    pub(crate) save_every: u64,
    /// Every gang loses rank 0 there.
    pub(crate) dies_at: Option<u64>,
}

/// Shared by all parts of one simulation. A cheap clone.
#[derive(Debug, Clone)]
pub(crate) struct World {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    now_ms: AtomicU64,
    wall_offset_ms: AtomicU64,
    memory: Mutex<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    log: Vec<String>,
    violations: Vec<String>,
    workloads: BTreeMap<String, Workload>,
    runs: BTreeMap<String, Seen>,
    /// Who holds the leader's key, and since when.
    holder: Option<(String, u64)>,
    members: BTreeSet<String>,
    alive: BTreeMap<String, Alive>,
    ranks: BTreeMap<(String, u64, u32), String>,
    keys: BTreeMap<Vec<u8>, (String, u64)>,
    worlds: BTreeMap<(String, u64), usize>,
    built: BTreeMap<(String, u64), BTreeSet<String>>,
    /// Ranks that reported a manifest, by its path and hash.
    reported: BTreeMap<(String, String, String), u32>,
    epochs: BTreeMap<String, u64>,
    last_jump_ms: u64,
    died_ms: BTreeMap<String, u64>,
}

#[derive(Debug)]
struct Seen {
    record: RunRecord,
    revision: u64,
    heads: BTreeSet<String>,
    generations_without_progress: u32,
    entered_ms: u64,
    /// Who wrote it last.
    by: String,
}

#[derive(Debug)]
struct Alive {
    run: String,
    #[expect(dead_code, reason = "shown where a run does not end")]
    agent: String,
}

/// A trainer that counts as alive until dropped.
#[derive(Debug)]
pub(crate) struct Living {
    world: World,
    incarnation: String,
}

impl Drop for Living {
    fn drop(&mut self) {
        let mut memory = self.world.memory();
        if let Some(alive) = memory.alive.remove(&self.incarnation) {
            let now = self.world.now_ms();
            memory.died_ms.insert(alive.run, now);
        }
    }
}

impl World {
    pub(crate) fn new() -> Self {
        let shared = Shared { now_ms: AtomicU64::new(0), wall_offset_ms: AtomicU64::new(0), memory: Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    pub(crate) fn set_now(&self, now: Duration) {
        self.shared.now_ms.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.shared.now_ms.load(Ordering::Relaxed)
    }

    pub(crate) fn now(&self) -> Duration {
        Duration::from_millis(self.now_ms())
    }

    /// The wall clock of every host.
    pub(crate) fn wall(&self) -> SystemTime {
        // An hour is what the clock may be set back.
        let ms = 1_790_000_000_000 + self.now_ms() + self.shared.wall_offset_ms.load(Ordering::Relaxed);
        SystemTime::UNIX_EPOCH + Duration::from_millis(ms)
    }

    /// Sets the wall clock to another time.
    pub(crate) fn jump(&self, offset_ms: u64) {
        self.shared.wall_offset_ms.store(offset_ms, Ordering::Relaxed);
        self.memory().last_jump_ms = self.now_ms();
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.shared.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn say(&self, line: impl AsRef<str>) {
        let line = format!("{} ms {}", self.now_ms(), line.as_ref());
        self.memory().log.push(line);
    }

    pub(crate) fn violated(&self, id: &str, what: impl AsRef<str>) {
        let line = format!("{} ms VIOLATION {id}: {}", self.now_ms(), what.as_ref());
        let mut memory = self.memory();
        memory.log.push(line.clone());
        memory.violations.push(line);
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.memory().violations.clone()
    }

    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.memory().log)
    }

    pub(crate) fn set_workload(&self, name: &str, workload: Workload) {
        self.memory().workloads.insert(name.to_owned(), workload);
    }

    pub(crate) fn workload(&self, run: &str) -> Option<Workload> {
        let name = run.rsplit_once('-').map_or(run, |(name, _)| name);
        self.memory().workloads.get(name).cloned()
    }

    /// State and revision of a run in the store.
    pub(crate) fn stored(&self, run: &str) -> Option<(RunState, u64)> {
        self.memory().runs.get(run).map(|seen| (seen.record.state, seen.revision))
    }

    /// Whether every run that is to be submitted has been, and has ended.
    pub(crate) fn all_ended(&self) -> bool {
        let memory = self.memory();
        let ended = memory.runs.values().filter(|seen| seen.record.state.has_ended()).count();
        ended == memory.workloads.len()
    }

    pub(crate) fn nobody_lives(&self) -> bool {
        self.memory().alive.is_empty()
    }

    /// What the runs have come to, for the log.
    pub(crate) fn summary(&self) -> String {
        let memory = self.memory();
        let of = |seen: &Seen| {
            let record = &seen.record;
            let (state, reason) = (record.state, record.reason);
            format!(
                "{} {state:?} {reason:?} g{} s{} {}",
                record.id, record.generation, record.position.step, record.message
            )
        };
        let runs: Vec<String> = memory.runs.values().map(of).collect();
        format!("{}; alive: {:?}", runs.join(" | "), memory.alive)
    }

    /// A trainer has been started.
    pub(crate) fn born(&self, agent: &str, incarnation: &str, run: &str) -> Living {
        let alive = Alive { run: run.to_owned(), agent: agent.to_owned() };
        self.memory().alive.insert(incarnation.to_owned(), alive);
        Living { world: self.clone(), incarnation: incarnation.to_owned() }
    }

    pub(crate) fn has_built(&self, run: &str, generation: u64, incarnation: &str) {
        self.memory().built.entry((run.to_owned(), generation)).or_default().insert(incarnation.to_owned());
    }

    pub(crate) fn reports(&self, run: &str, rank: u32, checkpoint: &pb::CheckpointRef) {
        let key = (run.to_owned(), checkpoint.manifest.clone(), checkpoint.manifest_blake3.clone());
        self.memory().reported.entry(key).or_insert(rank);
    }

    /// A trainer is told something.
    pub(crate) fn told(&self, agent: &str, told: &pb::CoordinatorMessage) {
        let mut broken = Vec::new();
        {
            let mut memory = self.memory();
            let seen = memory.epochs.entry(agent.to_owned()).or_default();
            if told.leader_epoch < *seen {
                broken.push(("AGENT-1", format!("epoch {} after {seen}", told.leader_epoch)));
            }
            *seen = told.leader_epoch.max(*seen);
            match &told.message {
                Some(Message::Start(start)) => {
                    if !memory.members.contains(&start.incarnation) {
                        broken.push(("DRIVE-1", format!("{} starts before it is stored", start.incarnation)));
                    }
                }
                Some(Message::Propose(propose)) => memory.proposed(propose, &mut broken),
                Some(Message::Commit(commit)) => memory.committed_gang(commit, &mut broken),
                Some(Message::Committed(committed)) => {
                    let head = committed.checkpoint.clone().unwrap_or_default();
                    if !memory.runs.get(&committed.run).is_some_and(|seen| seen.heads.contains(&head.manifest)) {
                        broken.push(("DRIVE-1", format!("{} is acknowledged and was never the head", head.manifest)));
                    }
                }
                Some(Message::Stop(_) | Message::Suspend(_) | Message::Welcome(_) | Message::Ping(_)) | None => {}
            }
        }
        broken.into_iter().for_each(|(id, what)| self.violated(id, what));
    }
}

type Broken = Vec<(&'static str, String)>;

impl Memory {
    fn proposed(&mut self, propose: &pb::Propose, broken: &mut Broken) {
        let generation = propose.generation;
        let gang = (propose.run.clone(), generation);
        self.worlds.insert(gang.clone(), propose.peers.as_ref().map_or(0, Peers::len));
        let holder = self.keys.entry(propose.key.clone()).or_insert_with(|| gang.clone());
        if *holder != gang {
            broken.push(("ONCE-1", format!("{holder:?} and {gang:?} have one key")));
        }
        let rank = (gang.0.clone(), gang.1, propose.rank);
        let first = self.ranks.entry(rank).or_insert_with(|| propose.incarnation.clone());
        if *first != propose.incarnation {
            broken
                .push(("ONCE-1", format!("rank {} of {gang:?} is {first} and {}", propose.rank, propose.incarnation)));
        }
        let Some(seen) = self.runs.get(&propose.run) else {
            return broken.push(("DRIVE-1", format!("{} is not stored", propose.run)));
        };
        let record = &seen.record;
        if record.generation.0 < generation {
            broken.push(("RUN-1", format!("generation {generation} is proposed, {} is stored", record.generation)));
        }
        let head = record.head.as_ref().map(pb::CheckpointRef::from);
        if record.generation.0 == generation && record.state == RunState::Forming && propose.resume != head {
            broken.push(("RUN-3", format!("{gang:?} starts at {:?}, the head is {head:?}", propose.resume)));
        }
    }

    fn committed_gang(&mut self, commit: &pb::Commit, broken: &mut Broken) {
        let gang = (commit.run.clone(), commit.generation);
        let (built, world) = (self.built.get(&gang).map_or(0, BTreeSet::len), self.worlds.get(&gang).copied());
        if Some(built) != world {
            broken.push(("RUN-1", format!("{gang:?} trains with {built} of {world:?} built")));
        }
        let state =
            self.runs.get(&gang.0).filter(|seen| seen.record.generation.0 == gang.1).map(|seen| seen.record.state);
        if state == Some(RunState::Forming) || state == Some(RunState::Admitted) {
            broken.push(("DRIVE-1", format!("{gang:?} trains, the store has {state:?}")));
        }
    }
}

/// State after a step, given the one before it and the samples in it.
pub(crate) fn next_state(before: [u8; 32], step: u64, samples: &mut Vec<u64>) -> [u8; 32] {
    samples.sort_unstable();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before).update(&step.to_le_bytes());
    for sample in samples {
        hasher.update(&sample.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Samples of a shard in a step.
pub(crate) fn samples_of(step: u64, shard: u32) -> impl Iterator<Item = u64> {
    let each = u64::from(GLOBAL_BATCH / SHARDS);
    let first = step * u64::from(GLOBAL_BATCH) + u64::from(shard) * each;
    first..first + each
}

/// State after so many steps without a fault (LEDGER-1).
fn expected_state(steps: u64) -> [u8; 32] {
    (1..=steps).fold([0; 32], |state, step| {
        let mut samples = (0..SHARDS).flat_map(|shard| samples_of(step, shard)).collect();
        next_state(state, step, &mut samples)
    })
}

/// The toy's manifest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ToyManifest {
    pub(crate) run: String,
    pub(crate) generation: u64,
    pub(crate) step: u64,
    pub(crate) rank: u32,
    pub(crate) blob: thaw_core::manifest::BlobRef,
}

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
            let since_jump = now - memory.last_jump_ms;
            if let Some(seen) = memory.runs.get(record.id.as_str()) {
                check_step(seen, &record, &memory, now, since_jump, &mut broken);
                if let (Some((_, led_since)), RunReason::CoordinatorRestarted) = (&leads, record.reason)
                    && seen.record.state == RunState::Running
                    && record.state == RunState::Resizing
                    && now - led_since < Policy::default().reattach_timeout_ms - 500
                    && since_jump > now - led_since
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
        if blob[..] != expected_state(manifest.step) {
            broken.push((
                "LEDGER-1",
                format!("samples are missing or double at step {} of {}", manifest.step, record.id),
            ));
        }
    }
}

impl Memory {
    fn remember(&mut self, by: &str, revision: Revision, record: RunRecord, now: u64) {
        self.members.extend(record.members.iter().map(|member| member.trainer.incarnation.to_string()));
        let id = record.id.to_string();
        let (mut heads, mut without, mut entered_ms) = (BTreeSet::new(), 0, now);
        if let Some(seen) = self.runs.remove(&id) {
            (heads, without) = (seen.heads, seen.generations_without_progress);
            if seen.record.state == record.state && seen.by == by {
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

/// RUN-1 to RUN-7 over one stored change.
fn check_step(seen: &Seen, after: &RunRecord, memory: &Memory, now: u64, since_jump: u64, broken: &mut Broken) {
    let before = &seen.record;
    let run = &after.id;
    if after.generation != before.generation && after.generation != before.generation.next() {
        broken.push(("RUN-1", format!("{run}: generation {} follows {}", after.generation, before.generation)));
    }
    if before.state.has_ended() && before != after {
        broken.push(("RUN-4", format!("{run} has ended and changes")));
    }
    if after.state == RunState::Succeeded {
        let last = memory.workloads.get(run.as_str().rsplit_once('-').map_or("", |(name, _)| name));
        let last = last.map(|workload| workload.last_step);
        if after.head.as_ref().map(|head| head.position.step.0) != last {
            broken.push(("RUN-5", format!("{run} has succeeded at {:?} of {last:?}", after.head)));
        }
    }
    if after.generation > before.generation {
        let waited = now - seen.entered_ms;
        let limit = Policy::default().stop_timeout_ms;
        // Where some are kept, the others are those that were lost.
        let kept = |member: &Member| after.members.iter().any(|other| other.trainer == member.trainer);
        if !before.members.is_empty()
            && !before.members.iter().any(kept)
            && waited + 1000 < limit
            && since_jump > waited
        {
            broken.push(("RUN-6", format!("{run}: {} is chosen while members live", after.generation)));
        }
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
