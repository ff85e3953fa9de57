//! The store in one local file (redb), for one coordinator on one machine.
//!
//! One thread owns the file and applies every change: check the compares, commit with fsync, and only then change the
//! copy in memory that reads and watches see. So what a reader sees is durable. Leases live in memory: the file's lock
//! says that whoever held one is gone, so opening the file ends them all.

use super::{
    At, Compare, Entry, Error, LeaseId, OPERATION_DEADLINE, Op, Revision, Store, Target, TxnOutcome, WatchEvent,
    WatchStream,
};
use async_trait::async_trait;
use futures::StreamExt;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, oneshot};

/// Key → (create revision, mod revision, lease or 0, value).
const ENTRIES: TableDefinition<'_, &str, (u64, u64, i64, &[u8])> = TableDefinition::new("entries");
/// `revision` → the store's revision.
const COUNTERS: TableDefinition<'_, &str, u64> = TableDefinition::new("counters");

/// Changes kept for watches that start in the past, and the lag after which a slow watch must resync.
const HISTORY: usize = 4096;

/// The store in one local file.
#[derive(Debug)]
pub struct Embedded {
    shared: Arc<Shared>,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
}

/// What is durable, in memory. Changed by the writer's thread alone.
#[derive(Debug)]
struct State {
    revision: Revision,
    entries: BTreeMap<String, Stored>,
    history: VecDeque<WatchEvent>,
    /// Watches may start after this revision.
    compacted: Revision,
    changes: broadcast::Sender<WatchEvent>,
}

#[derive(Debug, Clone)]
struct Stored {
    entry: Entry,
    lease: Option<LeaseId>,
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

enum Job {
    Txn { compares: Vec<Compare>, ops: Vec<Op>, reply: Reply<TxnOutcome> },
    Grant { ttl: Duration, reply: Reply<LeaseId> },
    KeepAlive { lease: LeaseId, reply: Reply<()> },
    Revoke { lease: LeaseId, reply: Reply<()> },
}

impl Embedded {
    /// Opens or makes the file, with the folders above it.
    pub async fn open(path: PathBuf) -> Result<Self, Error> {
        let opened = tokio::task::spawn_blocking(move || open_blocking(&path)).await;
        opened.map_err(|join| Error::Unavailable { operation: "open store", source: Some(join.into()) })?
    }

    async fn ask<T>(&self, operation: &'static str, make: impl FnOnce(Reply<T>) -> Job + Send) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().expect("the channel lives until drop");
        if jobs.send(make(reply)).is_err() {
            return Err(Error::Unavailable { operation, source: None });
        }
        match tokio::time::timeout(OPERATION_DEADLINE, answer).await {
            Ok(Ok(result)) => result,
            // The thread took the job and gave no answer, or not yet.
            Ok(Err(_)) => Err(Error::Unknown { operation, source: None }),
            Err(elapsed) => Err(Error::Unknown { operation, source: Some(elapsed.into()) }),
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // The file's lock must be free when the store is gone; the thread ends with its channel.
            if thread.join().is_err() {
                tracing::error!("the store's thread panicked");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<At<Option<Entry>>, Error> {
        let state = self.shared.lock();
        Ok(At { revision: state.revision, value: state.entries.get(key).map(|stored| stored.entry.clone()) })
    }

    async fn list(&self, prefix: &str) -> Result<At<Vec<Entry>>, Error> {
        let state = self.shared.lock();
        let found = state.entries.range(prefix.to_owned()..).take_while(|(key, _)| key.starts_with(prefix));
        Ok(At { revision: state.revision, value: found.map(|(_, stored)| stored.entry.clone()).collect() })
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        super::check_ops(&ops)?;
        self.ask("transaction", |reply| Job::Txn { compares, ops, reply }).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, Error> {
        let (past, changes) = {
            let state = self.shared.lock();
            if after < state.compacted {
                return Ok(futures::stream::iter([WatchEvent::Resync]).boxed());
            }
            let past: Vec<_> = state.history.iter().filter(|event| revision_of(event) > after).cloned().collect();
            (past, state.changes.subscribe())
        };
        let prefix = prefix.to_owned();
        let live = futures::stream::unfold(Some(changes), |changes| async move {
            let mut changes = changes?;
            match changes.recv().await {
                Ok(event) => Some((event, Some(changes))),
                Err(broadcast::error::RecvError::Lagged(_)) => Some((WatchEvent::Resync, None)),
                Err(broadcast::error::RecvError::Closed) => None,
            }
        });
        // A watch may start at a revision that is yet to come.
        let wanted = move |event: &WatchEvent| match event {
            WatchEvent::Put(entry) => entry.key.starts_with(&prefix) && entry.mod_revision > after,
            WatchEvent::Delete { key, revision } => key.starts_with(&prefix) && *revision > after,
            WatchEvent::Resync => true,
        };
        Ok(futures::stream::iter(past).chain(live).filter(move |event| std::future::ready(wanted(event))).boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        self.ask("grant lease", |reply| Job::Grant { ttl, reply }).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        self.ask("renew lease", |reply| Job::KeepAlive { lease, reply }).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.ask("revoke lease", |reply| Job::Revoke { lease, reply }).await
    }
}

fn revision_of(event: &WatchEvent) -> Revision {
    match event {
        WatchEvent::Put(entry) => entry.mod_revision,
        WatchEvent::Delete { revision, .. } => *revision,
        WatchEvent::Resync => Revision(u64::MAX),
    }
}

fn open_blocking(path: &Path) -> Result<Embedded, Error> {
    let refuse = |what: &str, source: super::Cause| Error::Open {
        url: format!("embedded:{}", path.display()),
        what: what.to_owned(),
        source: Some(source),
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(|error| refuse("cannot make the folder above it", error.into()))?;
    }
    let database = match Database::create(path) {
        Ok(database) => database,
        Err(redb::DatabaseError::DatabaseAlreadyOpen) => return Err(Error::InUse { path: path.to_owned() }),
        Err(error) => {
            return Err(refuse("the file is no store of Thaw, is damaged, or cannot be written", error.into()));
        }
    };
    let (revision, entries) = load(&database).map_err(|error| refuse("cannot read it", error.into()))?;
    let (changes, _) = broadcast::channel(HISTORY);
    let state = State { revision, entries, history: VecDeque::new(), compacted: revision, changes };
    let shared = Arc::new(Shared { state: Mutex::new(state) });
    let mut writer =
        Writer { database, shared: Arc::clone(&shared), leases: BTreeMap::new(), next_lease: 1, broken: false };
    let orphans = writer.keys_where(|lease| lease.is_some());
    writer.delete_all(orphans)?;
    let (jobs, queue) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .name("store".to_owned())
        .spawn(move || writer.run(&queue))
        .map_err(|error| refuse("cannot start its thread", error.into()))?;
    Ok(Embedded { shared, jobs: Some(jobs), thread: Some(thread) })
}

fn load(database: &Database) -> Result<(Revision, BTreeMap<String, Stored>), redb::Error> {
    let write = database.begin_write()?;
    // Makes the tables of a new file.
    write.open_table(ENTRIES)?;
    write.open_table(COUNTERS)?;
    write.commit()?;
    let read = database.begin_read()?;
    let revision = read.open_table(COUNTERS)?.get("revision")?.map_or(0, |value| value.value());
    let mut entries = BTreeMap::new();
    for item in read.open_table(ENTRIES)?.iter()? {
        let (key, value) = item?;
        let (create, modified, lease, bytes) = value.value();
        let entry = Entry {
            key: key.value().to_owned(),
            value: bytes.to_vec(),
            create_revision: Revision(create),
            mod_revision: Revision(modified),
        };
        entries.insert(key.value().to_owned(), Stored { entry, lease: (lease != 0).then_some(LeaseId(lease)) });
    }
    Ok((Revision(revision), entries))
}

/// Owns the file, on its own thread.
struct Writer {
    database: Database,
    shared: Arc<Shared>,
    leases: BTreeMap<LeaseId, Lease>,
    next_lease: i64,
    /// A commit failed half-way: memory and file may differ, so nothing more is written.
    broken: bool,
}

#[derive(Clone, Copy)]
struct Lease {
    ttl: Duration,
    deadline: Instant,
}

enum Change {
    Put { entry: Entry, lease: Option<LeaseId> },
    Delete { key: String },
}

impl Writer {
    fn run(mut self, queue: &mpsc::Receiver<Job>) {
        loop {
            let next = self.leases.values().map(|lease| lease.deadline).min();
            let job = match next {
                None => queue.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
                Some(deadline) => queue.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            };
            // Leases first: a job that waited behind an expiry must not see the key.
            self.expire();
            match job {
                Ok(job) => self.handle(job),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn handle(&mut self, job: Job) {
        // A reply nobody waits for is no error: the caller's deadline passed, and it knows "unknown".
        match job {
            Job::Txn { compares, ops, reply } => drop(reply.send(self.txn(&compares, ops))),
            Job::Grant { ttl, reply } => {
                let id = LeaseId(self.next_lease);
                self.next_lease += 1;
                self.leases.insert(id, Lease { ttl, deadline: Instant::now() + ttl });
                drop(reply.send(Ok(id)));
            }
            Job::KeepAlive { lease, reply } => {
                let renewed = match self.leases.get_mut(&lease) {
                    None => Err(Error::LeaseNotFound(lease)),
                    Some(held) => {
                        held.deadline = Instant::now() + held.ttl;
                        Ok(())
                    }
                };
                drop(reply.send(renewed));
            }
            Job::Revoke { lease, reply } => {
                self.leases.remove(&lease);
                let keys = self.keys_where(|held| held == Some(lease));
                drop(reply.send(self.delete_all(keys).map(|_| ())));
            }
        }
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let ended: Vec<LeaseId> =
            self.leases.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect();
        for id in ended {
            self.leases.remove(&id);
            let keys = self.keys_where(|held| held == Some(id));
            if let Err(error) = self.delete_all(keys) {
                tracing::error!(error = &error as &dyn std::error::Error, "an ended lease's keys could not be deleted");
            }
        }
    }

    fn keys_where(&self, wanted: impl Fn(Option<LeaseId>) -> bool) -> Vec<String> {
        let state = self.shared.lock();
        state.entries.iter().filter(|(_, stored)| wanted(stored.lease)).map(|(key, _)| key.clone()).collect()
    }

    fn delete_all(&mut self, keys: Vec<String>) -> Result<TxnOutcome, Error> {
        self.txn(&[], keys.into_iter().map(|key| Op::Delete { key }).collect())
    }

    fn txn(&mut self, compares: &[Compare], ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        let operation = "transaction";
        if self.broken {
            return Err(Error::Unavailable {
                operation,
                source: Some("an earlier commit failed; restart the coordinator".into()),
            });
        }
        let (revision, changes) = {
            let state = self.shared.lock();
            if !compares.iter().all(|compare| holds(&state, compare)) {
                return Ok(TxnOutcome::NotApplied);
            }
            let revision = Revision(state.revision.0 + 1);
            (revision, self.changes(&state, revision, ops)?)
        };
        if changes.is_empty() {
            return Ok(TxnOutcome::Applied { revision: Revision(revision.0 - 1) });
        }
        let staged = self
            .stage(revision, &changes)
            .map_err(|error| Error::Unavailable { operation, source: Some(error.into()) })?;
        if let Err(error) = staged.commit() {
            self.broken = true;
            return Err(Error::Unknown { operation, source: Some(error.into()) });
        }
        self.publish(revision, changes);
        Ok(TxnOutcome::Applied { revision })
    }

    fn changes(&self, state: &State, revision: Revision, ops: Vec<Op>) -> Result<Vec<Change>, Error> {
        let mut changes = Vec::with_capacity(ops.len());
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    if let Some(lease) = lease.filter(|lease| !self.leases.contains_key(lease)) {
                        return Err(Error::LeaseNotFound(lease));
                    }
                    let create_revision = state.entries.get(&key).map_or(revision, |old| old.entry.create_revision);
                    changes.push(Change::Put {
                        entry: Entry { key, value, create_revision, mod_revision: revision },
                        lease,
                    });
                }
                Op::Delete { key } => {
                    if state.entries.contains_key(&key) {
                        changes.push(Change::Delete { key });
                    }
                }
            }
        }
        Ok(changes)
    }

    fn stage(&self, revision: Revision, changes: &[Change]) -> Result<redb::WriteTransaction, redb::Error> {
        let write = self.database.begin_write()?;
        {
            let mut entries = write.open_table(ENTRIES)?;
            for change in changes {
                match change {
                    Change::Put { entry, lease } => {
                        let lease = lease.map_or(0, |lease| lease.0);
                        let row = (entry.create_revision.0, entry.mod_revision.0, lease, entry.value.as_slice());
                        entries.insert(entry.key.as_str(), row)?;
                    }
                    Change::Delete { key } => {
                        entries.remove(key.as_str())?;
                    }
                }
            }
            write.open_table(COUNTERS)?.insert("revision", revision.0)?;
        }
        Ok(write)
    }

    fn publish(&self, revision: Revision, changes: Vec<Change>) {
        let mut state = self.shared.lock();
        state.revision = revision;
        for change in changes {
            let event = match change {
                Change::Put { entry, lease } => {
                    state.entries.insert(entry.key.clone(), Stored { entry: entry.clone(), lease });
                    WatchEvent::Put(entry)
                }
                Change::Delete { key } => {
                    state.entries.remove(&key);
                    WatchEvent::Delete { key, revision }
                }
            };
            state.history.push_back(event.clone());
            // Nobody watching is no error.
            drop(state.changes.send(event));
        }
        while state.history.len() > HISTORY {
            if let Some(oldest) = state.history.pop_front() {
                state.compacted = revision_of(&oldest);
            }
        }
    }
}

fn holds(state: &State, compare: &Compare) -> bool {
    let entry = state.entries.get(&compare.key).map(|stored| &stored.entry);
    match &compare.target {
        Target::Absent => entry.is_none(),
        Target::CreateRevision(revision) => entry.is_some_and(|entry| entry.create_revision == *revision),
        Target::ModRevision(revision) => entry.is_some_and(|entry| entry.mod_revision == *revision),
        Target::Value(value) => entry.is_some_and(|entry| entry.value == *value),
    }
}
