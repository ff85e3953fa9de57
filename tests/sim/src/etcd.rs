//! A model of etcd, as far as the store uses it: one state that several clients share, each over a link that can be cut, lose
//! replies, and deliver late. Held against the real one by the stores' conformance suite (`coordinator/tests/store/`).
//!
//! Time is given by whoever makes it, so that leases end by the same clock for all clients.

use async_trait::async_trait;
use futures::StreamExt;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thaw_coordinator::store::{
    At, Compare, Entry, Error, LeaseId, OPERATION_DEADLINE, Op, Revision, Store, Target, TxnOutcome, WatchEvent,
    WatchStream,
};
use tokio::sync::mpsc;

/// etcd gives no lease less.
const LEAST_TTL: Duration = Duration::from_secs(2);

/// Sees every change, as it happens.
pub trait Witness: Send {
    /// `by` changed the keys at a revision: what each was, and what it is now.
    fn changed(&mut self, by: &str, revision: Revision, changes: &[(Option<Entry>, Change)]);
}

/// One key after a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Put(Entry),
    Deleted(String),
}

/// The store itself.
pub struct Model {
    clock: Box<dyn Fn() -> Duration + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    revision: u64,
    entries: BTreeMap<String, (Entry, Option<LeaseId>)>,
    leases: BTreeMap<LeaseId, Lease>,
    granted: i64,
    /// Since the last compaction, oldest first.
    history: Vec<WatchEvent>,
    compacted: u64,
    watches: Vec<(String, mpsc::UnboundedSender<WatchEvent>)>,
    late: Vec<Late>,
    witness: Option<Box<dyn Witness>>,
}

struct Lease {
    ttl: Duration,
    deadline: Duration,
}

/// A transaction that is still under way though its sender has given up.
struct Late {
    due: Duration,
    by: String,
    compares: Vec<Compare>,
    ops: Vec<Op>,
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("revision", &self.state().revision).finish_non_exhaustive()
    }
}

impl Model {
    /// An empty store. `clock`: time since any beginning.
    #[must_use]
    pub fn new(clock: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        Self { clock: Box::new(clock), state: Mutex::new(State { revision: 1, ..State::default() }) }
    }

    /// Tells of every change from now on.
    pub fn set_witness(&self, witness: impl Witness + 'static) {
        self.state().witness = Some(Box::new(witness));
    }

    /// Lets what is due happen: leases end, late transactions arrive.
    pub fn advance(&self) {
        drop(self.now());
    }

    /// Forgets the history so far.
    pub fn compact(&self) {
        let mut state = self.now();
        state.compacted = state.revision;
        state.history.clear();
    }

    /// Ends every lease at once, as a store does whose leader changed after a long stall.
    pub fn end_leases(&self) {
        let mut state = self.now();
        let ended: Vec<LeaseId> = state.leases.keys().copied().collect();
        ended.into_iter().for_each(|lease| state.end(lease));
    }

    /// Every key below a prefix.
    #[must_use]
    pub fn entries(&self, prefix: &str) -> Vec<Entry> {
        self.now().below(prefix)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, up to date.
    fn now(&self) -> MutexGuard<'_, State> {
        let now = (self.clock)();
        let mut state = self.state();
        let ended: Vec<LeaseId> =
            state.leases.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect();
        ended.into_iter().for_each(|lease| state.end(lease));
        while let Some(at) = state.late.iter().position(|late| late.due <= now) {
            let late = state.late.remove(at);
            // Nobody hears how it ended.
            let _unheard = state.txn(&late.by, &late.compares, late.ops);
        }
        state
    }
}

impl State {
    fn below(&self, prefix: &str) -> Vec<Entry> {
        let from = self.entries.range(prefix.to_owned()..);
        from.take_while(|(key, _)| key.starts_with(prefix)).map(|(_, (entry, _))| entry.clone()).collect()
    }

    fn holds(&self, compare: &Compare) -> bool {
        let held = self.entries.get(&compare.key).map(|(entry, _)| entry);
        match &compare.target {
            Target::Absent => held.is_none(),
            Target::CreateRevision(revision) => held.is_some_and(|entry| entry.create_revision == *revision),
            Target::ModRevision(revision) => held.is_some_and(|entry| entry.mod_revision == *revision),
            Target::Value(value) => held.is_some_and(|entry| entry.value == *value),
        }
    }

    fn txn(&mut self, by: &str, compares: &[Compare], ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        let operation = "transaction";
        let mut keys: Vec<&str> = ops.iter().map(Op::key).collect();
        keys.sort_unstable();
        if keys.windows(2).any(|pair| pair[0] == pair[1]) || keys.first().is_some_and(|key| key.is_empty()) {
            return Err(Error::Invalid { operation, what: "a key is empty, or occurs twice".to_owned() });
        }
        if !compares.iter().all(|compare| self.holds(compare)) {
            return Ok(TxnOutcome::NotApplied);
        }
        for op in &ops {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(Error::LeaseNotFound(*lease));
            }
        }
        self.apply(by, ops);
        Ok(TxnOutcome::Applied { revision: Revision(self.revision) })
    }

    fn apply(&mut self, by: &str, ops: Vec<Op>) {
        let revision = Revision(self.revision + 1);
        let mut changes = Vec::new();
        for op in ops {
            let before = self.entries.get(op.key()).map(|(entry, _)| entry.clone());
            match op {
                Op::Put { key, value, lease } => {
                    let create_revision = before.as_ref().map_or(revision, |entry| entry.create_revision);
                    let entry = Entry { key: key.clone(), value, create_revision, mod_revision: revision };
                    self.entries.insert(key, (entry.clone(), lease));
                    changes.push((before, Change::Put(entry)));
                }
                Op::Delete { key } => {
                    if self.entries.remove(&key).is_some() {
                        changes.push((before, Change::Deleted(key)));
                    }
                }
            }
        }
        if changes.is_empty() {
            return;
        }
        self.revision = revision.0;
        if let Some(witness) = &mut self.witness {
            witness.changed(by, revision, &changes);
        }
        for (_, change) in changes {
            let event = match change {
                Change::Put(entry) => WatchEvent::Put(entry),
                Change::Deleted(key) => WatchEvent::Delete { key, revision },
            };
            self.watches
                .retain(|(prefix, watch)| !key_of(&event).starts_with(prefix) || watch.send(event.clone()).is_ok());
            self.history.push(event);
        }
    }

    fn end(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        let keys = self.entries.iter().filter(|(_, (_, held))| *held == Some(lease));
        let ops = keys.map(|(key, _)| Op::delete(key.clone())).collect();
        self.apply("a lease's end", ops);
    }
}

fn key_of(event: &WatchEvent) -> &str {
    match event {
        WatchEvent::Put(entry) => &entry.key,
        WatchEvent::Delete { key, .. } => key,
        WatchEvent::Resync => "",
    }
}

fn revision_of(event: &WatchEvent) -> u64 {
    match event {
        WatchEvent::Put(entry) => entry.mod_revision.0,
        WatchEvent::Delete { revision, .. } => revision.0,
        WatchEvent::Resync => 0,
    }
}

/// What becomes of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Answered,
    /// Refused before it did anything.
    Refused,
    /// It never arrives.
    RequestLost,
    /// It is done, and nobody hears of it.
    ReplyLost,
    /// It is done this long after its sender has given up.
    Late(Duration),
}

/// One call over a link.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Each way.
    pub travel: Duration,
    pub fate: Fate,
    /// Until it is known that no answer comes: a connection that breaks tells at once.
    pub told_after: Duration,
}

/// How a client reaches the store: what becomes of its calls. Asked once a call.
pub type Link = dyn Fn() -> Call + Send + Sync;

/// One client of the model.
pub struct Client {
    model: Arc<Model>,
    name: String,
    link: Arc<Link>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Client {
    /// A client, with the name that witnesses hear.
    #[must_use]
    pub fn new(model: Arc<Model>, name: &str, link: Arc<Link>) -> Self {
        Self { model, name: name.to_owned(), link }
    }

    /// A client whose calls are answered at once.
    #[must_use]
    pub fn near(model: Arc<Model>) -> Self {
        Self::new(
            model,
            "near",
            Arc::new(|| Call { travel: Duration::ZERO, fate: Fate::Answered, told_after: OPERATION_DEADLINE }),
        )
    }

    /// A read, or what changes nothing that is not changed again by trying again.
    async fn ask<T>(&self, operation: &'static str, work: impl FnOnce(&mut State) -> T) -> Result<T, Error> {
        let Call { travel, fate, told_after } = (self.link)();
        tokio::time::sleep(travel).await;
        match fate {
            Fate::Answered => {}
            Fate::Refused => return Err(Error::Unavailable { operation, source: None }),
            Fate::ReplyLost | Fate::RequestLost | Fate::Late(_) => {
                if fate == Fate::ReplyLost {
                    work(&mut self.model.now());
                }
                tokio::time::sleep(told_after).await;
                return Err(Error::Unavailable { operation, source: None });
            }
        }
        let answer = work(&mut self.model.now());
        tokio::time::sleep(travel).await;
        Ok(answer)
    }
}

#[async_trait]
impl Store for Client {
    async fn get(&self, key: &str) -> Result<At<Option<Entry>>, Error> {
        let read = |state: &mut State| At {
            revision: Revision(state.revision),
            value: state.entries.get(key).map(|(entry, _)| entry.clone()),
        };
        self.ask("read", read).await
    }

    async fn list(&self, prefix: &str) -> Result<At<Vec<Entry>>, Error> {
        self.ask("list", |state| At { revision: Revision(state.revision), value: state.below(prefix) }).await
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        let operation = "transaction";
        let Call { travel, fate, told_after } = (self.link)();
        tokio::time::sleep(travel).await;
        match fate {
            Fate::Answered => {
                let outcome = self.model.now().txn(&self.name, &compares, ops);
                tokio::time::sleep(travel).await;
                return outcome;
            }
            Fate::Refused => return Err(Error::Unavailable { operation, source: None }),
            Fate::RequestLost => {}
            Fate::ReplyLost => {
                let _unheard = self.model.now().txn(&self.name, &compares, ops);
            }
            Fate::Late(after) => {
                let due = (self.model.clock)() + told_after + after;
                self.model.state().late.push(Late { due, by: self.name.clone(), compares, ops });
            }
        }
        tokio::time::sleep(told_after).await;
        Err(Error::Unknown { operation, source: None })
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, Error> {
        let (sender, events) = mpsc::unbounded_channel();
        let start = |state: &mut State| {
            if after.0 < state.compacted {
                drop(sender.send(WatchEvent::Resync));
                return;
            }
            for event in state.history.iter().filter(|event| revision_of(event) > after.0) {
                if key_of(event).starts_with(prefix) {
                    drop(sender.send(event.clone()));
                }
            }
            state.watches.push((prefix.to_owned(), sender));
        };
        self.ask("watch", start).await?;
        let link = Arc::clone(&self.link);
        let watching = (events, link, false);
        Ok(futures::stream::unfold(watching, |(mut events, link, over)| async move {
            let event = if over { None } else { events.recv().await }?;
            // A connection that breaks tells so late, and only that.
            let event = if matches!(link().fate, Fate::Answered | Fate::Late(_)) { event } else { WatchEvent::Resync };
            let over = event == WatchEvent::Resync;
            Some((event, (events, link, over)))
        })
        .boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        let now = || (self.model.clock)();
        self.ask("grant a lease", |state| {
            state.granted += 1;
            let (lease, ttl) = (LeaseId(state.granted), ttl.max(LEAST_TTL));
            state.leases.insert(lease, Lease { ttl, deadline: now() + ttl });
            lease
        })
        .await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        let now = || (self.model.clock)();
        self.ask("renew a lease", |state| match state.leases.get_mut(&lease) {
            Some(held) => {
                held.deadline = now() + held.ttl;
                Ok(())
            }
            None => Err(Error::LeaseNotFound(lease)),
        })
        .await?
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.ask("end a lease", |state| state.end(lease)).await
    }
}
