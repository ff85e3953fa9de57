//! What is known of everything at once: the invariants' memory. Coordinators, agents and trainers never read it.
//!
//! - LEDGER-1: what is committed, and what any trainer holds between two steps, is what a trainer holds that saw each sample of each step once,
//!   in order, and added their gradients along the tree (TREE-1).
//! - LEDGER-2: all ranks of a generation begin after the same step, with the same weights.
//! - ONCE-1: of a generation, each rank is one trainer, and its key is no other generation's.
//! - SLOT-1: no slot is held by two runs.
//!
//! The others are stated where they are kept (RUN-n, SCHED-n, KEEP-n, REP-n, DRIVE-n, LEAD-n, GRPC-n, AGENT-n, CKPT-n).

mod gangs;
mod ledger;
mod records;
mod slots;

pub(crate) use ledger::{Gradient, Weights, gradient_of, next_weights, samples_of};

use gangs::{Beginning, Gang};
use ledger::Ledger;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use thaw_core::run_machine::RunRecord;
use thaw_proto::run::RunState;
use thaw_proto::spec::Priority;

/// Samples of a step.
pub(crate) const GLOBAL_BATCH: u32 = 8;
/// Logical shards of a step.
pub(crate) const SHARDS: u32 = 8;

/// What one run is to do.
#[derive(Debug, Clone)]
pub(crate) struct Workload {
    pub(crate) workers: (u32, u32),
    pub(crate) priority: Priority,
    pub(crate) tenant: &'static str,
    /// Whether its trainers survive their gang.
    pub(crate) keeps: bool,
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
    /// Slots at most, by tenant.
    quotas: BTreeMap<&'static str, u32>,
    runs: BTreeMap<String, Seen>,
    /// Who holds the leader's key, and since when.
    holder: Option<(String, u64)>,
    members: BTreeSet<String>,
    alive: BTreeMap<String, Alive>,
    ranks: BTreeMap<(String, u64, u32), String>,
    keys: BTreeMap<Vec<u8>, Gang>,
    worlds: BTreeMap<Gang, usize>,
    built: BTreeMap<Gang, BTreeSet<String>>,
    beginnings: BTreeMap<Gang, Beginning>,
    /// The last step of each trainer, by its incarnation.
    applied: BTreeMap<String, u64>,
    ledger: Ledger,
    /// Runs of which a survivor's memory has changed by itself.
    rotten: BTreeSet<String>,
    /// Ranks that reported a manifest, by its path and hash.
    reported: BTreeMap<(String, String, String), u32>,
    epochs: BTreeMap<String, u64>,
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

    pub(crate) fn set_quotas(&self, quotas: BTreeMap<&'static str, u32>) {
        self.memory().quotas = quotas;
    }

    pub(crate) fn workload(&self, run: &str) -> Option<Workload> {
        self.memory().workload(run).cloned()
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
}

impl Memory {
    fn workload(&self, run: &str) -> Option<&Workload> {
        self.workloads.get(run.rsplit_once('-').map_or(run, |(name, _)| name))
    }
}

/// Invariants that do not hold, and how.
type Broken = Vec<(&'static str, String)>;

/// The toy's manifest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ToyManifest {
    pub(crate) run: String,
    pub(crate) generation: u64,
    pub(crate) step: u64,
    pub(crate) rank: u32,
    pub(crate) blob: thaw_core::manifest::BlobRef,
}
