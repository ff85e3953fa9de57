//! Workers with a session: what they hold and when they last spoke. In memory only; rebuilt from the workers
//! themselves.
//!
//! WORKER-1: a name has one session at a time, and a live one is not taken over.
//! WORKER-2: a session whose outbox is full, or that was silent for [`HEARTBEAT_DEADLINE`], is over.
//! WORKER-3: silence is the worker's, not ours: there is none while a message of it waits for the loop, nor for [`CROWD_LIMIT`] after so many
//!           workers came at once that what others say may lie unread, as they do when a term begins. A few that come are no crowd: of those
//!           one that is lost in a term's first seconds is missed as soon as any.
//! WORKER-4: nor is there silence while this process does not run ([`Attention`]).

use super::attention::Attention;
use crate::clock::timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use thaw_core::gang::FreeSlot;
use thaw_core::quarantine::Quarantine;
use thaw_proto::ids::{Slot, WorkerName};
use thaw_proto::pb;
use thaw_proto::worker::{Hello, TrainerStatus};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Status;

/// How often workers are asked to say they live.
pub(super) const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(400);
/// Silence after which a worker is lost.
pub(super) const HEARTBEAT_DEADLINE: Duration = Duration::from_secs(2);

/// Workers that come within a [`HEARTBEAT_INTERVAL`], above which they are a crowd.
const CROWD: u32 = 64;
/// From the last of a crowd until silence counts.
const CROWD_LIMIT: Duration = Duration::from_secs(4);

/// Where commands to one worker go. Dropping it ends the worker's stream.
#[derive(Debug)]
pub struct Outbox {
    commands: mpsc::Sender<Result<pb::CoordinatorMessage, Status>>,
}

impl Outbox {
    /// Over the queue that a stream empties.
    #[must_use]
    pub fn new(commands: mpsc::Sender<Result<pb::CoordinatorMessage, Status>>) -> Self {
        Self { commands }
    }
}

/// One session of a worker. A cheap clone.
#[derive(Debug, Clone)]
pub struct SessionId {
    pub worker: WorkerName,
    number: u64,
    /// When it last spoke, by `clock`; `None` while what it said waits for the loop.
    seen: Arc<Mutex<Option<Duration>>>,
    clock: Attention,
}

impl SessionId {
    /// The worker has spoken, and what it said waits until [`SessionId::stamp`].
    pub(super) fn hold(&self) {
        *self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
    }

    /// What the worker said is taken now.
    pub(super) fn stamp(&self) {
        *self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(self.clock.now());
    }

    fn silence(&self) -> Duration {
        let seen = *self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        seen.map_or(Duration::ZERO, |seen| self.clock.now().saturating_sub(seen))
    }
}

/// All sessions, by worker.
#[derive(Debug)]
pub(super) struct Workers {
    sessions: BTreeMap<WorkerName, Session>,
    next: u64,
    arrivals: Arrivals,
    clock: Attention,
}

/// Workers that come, and since when silence counts (WORKER-3).
#[derive(Debug)]
struct Arrivals {
    since: Instant,
    count: u32,
    attentive_from: Instant,
}

impl Arrivals {
    fn new(now: Instant) -> Self {
        Self { since: now, count: 0, attentive_from: now }
    }

    fn note(&mut self, now: Instant) {
        if now - self.since >= HEARTBEAT_INTERVAL {
            (self.since, self.count) = (now, 0);
        }
        self.count += 1;
        if self.count > CROWD {
            self.attentive_from = now + CROWD_LIMIT;
        }
    }
}

#[derive(Debug)]
struct Session {
    id: SessionId,
    hello: Hello,
    outbox: Outbox,
    /// Alive by the last message that told.
    trainers: Vec<TrainerStatus>,
    /// Whether it did not take its commands.
    is_given_up: bool,
}

/// Why a worker was not taken in.
#[derive(Debug)]
pub(super) struct NameTaken;

impl Workers {
    /// Of a term that starts now.
    pub(super) fn new() -> Self {
        let arrivals = Arrivals::new(Instant::now());
        Self { sessions: BTreeMap::new(), next: 0, arrivals, clock: Attention::new() }
    }

    /// Has no silence count in which this process does not run, until what is returned is dropped.
    #[must_use]
    pub(super) fn watch_our_time(&self) -> JoinSet<()> {
        self.clock.watch()
    }

    pub(super) fn open(&mut self, hello: Hello, outbox: Outbox) -> Result<SessionId, NameTaken> {
        // WORKER-1: its own older stream may not have ended here yet.
        let held = self.sessions.get(&hello.worker);
        if held.is_some_and(|held| held.hello.incarnation != hello.incarnation && !self.is_over(held)) {
            return Err(NameTaken);
        }
        self.next += 1;
        self.arrivals.note(Instant::now());
        let seen = Arc::new(Mutex::new(Some(self.clock.now())));
        let id = SessionId { worker: hello.worker.clone(), number: self.next, seen, clock: self.clock.clone() };
        let trainers = hello.trainers.clone();
        let session = Session { id: id.clone(), trainers, hello, outbox, is_given_up: false };
        self.sessions.insert(id.worker.clone(), session);
        Ok(id)
    }

    /// Whether a session of this name is known, alive or not.
    pub(super) fn has(&self, worker: &WorkerName) -> bool {
        self.sessions.contains_key(worker)
    }

    /// Whether this is the worker's present session.
    pub(super) fn is_current(&self, id: &SessionId) -> bool {
        self.sessions.get(&id.worker).is_some_and(|session| session.id.number == id.number)
    }

    /// Forgets the worker; its stream ends.
    pub(super) fn remove(&mut self, worker: &WorkerName) {
        self.sessions.remove(worker);
    }

    fn is_over(&self, session: &Session) -> bool {
        let is_silent = || session.id.silence() > HEARTBEAT_DEADLINE && Instant::now() >= self.arrivals.attentive_from;
        session.is_given_up || session.outbox.commands.is_closed() || is_silent()
    }

    /// Workers to be given up (WORKER-2).
    pub(super) fn over(&self) -> Vec<WorkerName> {
        self.sessions
            .values()
            .filter(|session| self.is_over(session))
            .map(|session| session.id.worker.clone())
            .collect()
    }

    pub(super) fn heard(&mut self, worker: &WorkerName, trainers: Vec<TrainerStatus>) {
        if let Some(session) = self.sessions.get_mut(worker) {
            session.trainers = trainers;
        }
    }

    /// A trainer's process has ended.
    pub(super) fn exited(&mut self, worker: &WorkerName, incarnation: &str) {
        if let Some(session) = self.sessions.get_mut(worker) {
            session.trainers.retain(|status| status.trainer.incarnation.as_str() != incarnation);
        }
    }

    /// Queues a command. A worker that is away, or too slow, gets nothing: it will be lost, and that is what the
    /// machine hears.
    pub(super) fn send(&mut self, worker: &WorkerName, message: pb::CoordinatorMessage) {
        let Some(session) = self.sessions.get_mut(worker) else {
            tracing::debug!(%worker, "a command for a worker without a session is left out");
            return;
        };
        match session.outbox.commands.try_send(Ok(message)) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::warn!(%worker, "the worker does not read its commands; it is given up");
                session.is_given_up = true;
            }
            Err(mpsc::error::TrySendError::Closed(_)) => tracing::debug!(%worker, "the worker's stream has ended"),
        }
    }

    /// Slots that nobody holds: neither a run by its record nor a trainer that was seen alive.
    pub(super) fn free(&self, held: &BTreeSet<FreeSlot>) -> Vec<FreeSlot> {
        let mut free = Vec::new();
        for (worker, session) in &self.sessions {
            if self.is_over(session) {
                continue;
            }
            for slot in (0..session.hello.slots).map(Slot) {
                let place = FreeSlot { worker: worker.clone(), slot };
                let lived_in = session.trainers.iter().any(|status| status.trainer.slot == slot);
                if thaw_mutants::planted("held-slots-are-free") || (!lived_in && !held.contains(&place)) {
                    free.push(place);
                }
            }
        }
        free
    }

    /// Slots of nobody's whose trainers have yet to end.
    pub(super) fn ending(&self, held: &BTreeSet<FreeSlot>) -> u32 {
        let is_ending = |worker: &WorkerName, status: &&TrainerStatus| {
            !held.contains(&FreeSlot { worker: worker.clone(), slot: status.trainer.slot })
        };
        let sessions = self.sessions.iter().filter(|(_, session)| !self.is_over(session));
        let ending =
            sessions.map(|(worker, session)| session.trainers.iter().filter(|one| is_ending(worker, one)).count());
        u32::try_from(ending.sum::<usize>()).unwrap_or(u32::MAX)
    }

    /// As users see them, with the slots that runs hold.
    pub(super) fn list(
        &self,
        held: &BTreeSet<FreeSlot>,
        quarantined: &BTreeMap<FreeSlot, Quarantine>,
        runs_on: impl Fn(&WorkerName) -> Vec<String>,
    ) -> Vec<pb::Worker> {
        let mut free: BTreeMap<WorkerName, u32> = BTreeMap::new();
        for place in self.free(held).into_iter().filter(|place| !quarantined.contains_key(place)) {
            *free.entry(place.worker).or_default() += 1;
        }
        let resting = |(place, quarantine): (&FreeSlot, &Quarantine)| pb::QuarantinedSlot {
            slot: place.slot.0,
            until: Some(timestamp(i64::try_from(quarantine.until_ms).unwrap_or(i64::MAX))),
            faults: quarantine.blames,
        };
        let describe = |(worker, session): (&WorkerName, &Session)| pb::Worker {
            name: worker.to_string(),
            incarnation: session.hello.incarnation.to_string(),
            slots: session.hello.slots,
            free_slots: free.get(worker).copied().unwrap_or(0),
            host: session.hello.host.clone(),
            heartbeat_age_ms: u64::try_from(session.id.silence().as_millis()).unwrap_or(u64::MAX),
            runs: runs_on(worker),
            quarantined: quarantined.iter().filter(|(place, _)| place.worker == *worker).map(resting).collect(),
        };
        self.sessions.iter().map(describe).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{advance, sleep};

    fn hello(worker: &str, incarnation: char) -> Hello {
        let raw = pb::Hello {
            worker: worker.to_owned(),
            incarnation: format!("{incarnation}f9d2a52-3b1e-4c11-9f2c-2f1c9b7d7a10"),
            slots: 2,
            host: "127.0.0.1".to_owned(),
            trainers: Vec::new(),
        };
        Hello::try_from(&raw).unwrap()
    }

    #[test]
    fn a_live_name_is_not_taken_over() {
        let mut workers = Workers::new();
        let (sender, commands) = mpsc::channel(1);
        let first = workers.open(hello("a", '1'), Outbox::new(sender)).unwrap();
        let (other, _kept) = mpsc::channel(1);
        assert!(workers.open(hello("a", '2'), Outbox::new(other.clone())).is_err(), "WORKER-1");
        // The same process may come again; and anyone once the stream has ended.
        let again = workers.open(hello("a", '1'), Outbox::new(other.clone())).unwrap();
        assert!(workers.is_current(&again) && !workers.is_current(&first));
        drop(commands);
        assert_eq!(workers.over(), vec![]);
        let held = BTreeSet::from([FreeSlot { worker: "a".into(), slot: Slot(0) }]);
        assert_eq!(workers.free(&held), vec![FreeSlot { worker: "a".into(), slot: Slot(1) }]);
    }

    /// WORKER-3
    #[tokio::test(start_paused = true)]
    async fn silence_is_the_workers_own_and_counts_from_the_first_second_unless_a_crowd_comes() {
        let later = HEARTBEAT_DEADLINE + Duration::from_millis(1);
        let (sender, _commands) = mpsc::channel(1);
        let name = |index: u32| format!("worker-{index}");
        for (arrive, is_over) in [(1, true), (CROWD, true), (CROWD + 1, false)] {
            let mut workers = Workers::new();
            let open = |index| workers.open(hello(&name(index), '1'), Outbox::new(sender.clone())).unwrap();
            let sessions: Vec<SessionId> = (0..arrive).map(open).collect();
            assert_eq!(workers.over(), vec![]);
            for is_over in [is_over, true, true] {
                advance(later).await;
                sessions[1..].iter().for_each(SessionId::stamp);
                let over = if is_over { vec![WorkerName::from(name(0).as_str())] } else { vec![] };
                assert_eq!(workers.over(), over, "{arrive} have come");
            }
            sessions[0].hold();
            assert_eq!(workers.over(), vec![], "it has spoken");
            sessions[0].stamp();
            assert_eq!(workers.over(), vec![]);
        }
    }

    /// WORKER-4
    #[tokio::test(start_paused = true)]
    async fn who_was_not_listened_to_was_not_silent() {
        let mut workers = Workers::new();
        let _watched = workers.watch_our_time();
        let (sender, _commands) = mpsc::channel(1);
        workers.open(hello("a", '1'), Outbox::new(sender)).unwrap();
        sleep(HEARTBEAT_INTERVAL).await;
        // Nobody else runs while the clock is moved.
        advance(10 * HEARTBEAT_DEADLINE).await;
        assert_eq!(workers.over(), vec![], "this process did not run");
        sleep(HEARTBEAT_DEADLINE).await;
        assert_eq!(workers.over(), vec![WorkerName::from("a")], "and then it did");
    }

    #[test]
    fn a_worker_that_does_not_read_is_over() {
        let mut workers = Workers::new();
        let (sender, _commands) = mpsc::channel(1);
        workers.open(hello("a", '1'), Outbox::new(sender)).unwrap();
        workers.send(&"a".into(), pb::CoordinatorMessage::default());
        assert_eq!(workers.over(), vec![]);
        workers.send(&"a".into(), pb::CoordinatorMessage::default());
        assert_eq!(workers.over(), vec![WorkerName::from("a")], "WORKER-2");
    }
}
