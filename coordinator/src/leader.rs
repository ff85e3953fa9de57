//! Leadership: which coordinator may act, and the fence that stops every other one.
//!
//! A coordinator campaigns by putting the key `leader` under a lease where the key is absent. The revision at which the
//! key was made is its leader epoch.
//!
//! LEAD-1: every write of a leader goes through [`Fenced`], which compares the epoch; so the lease only elects, and the
//!         compare protects.
//! LEAD-2: a leader stops by its own monotonic clock before its lease can have ended, whatever the store answers or
//!         does not.
//! LEAD-3: leadership once lost is never found again by the same value; a new campaign makes a new one with a higher
//!         epoch.
//! LEAD-4: after an unknown outcome the key is read, and our incarnation in it decides.

use crate::store::{self, Compare, LeaseId, Op, Revision, Store, TxnOutcome};
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use thaw_mutants::planted;
use thaw_proto::ids::{Incarnation, LeaderEpoch};
use thaw_proto::status::ErrorClass;
use thaw_runtime::backoff::Backoff;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The key the leader holds.
pub const LEADER_KEY: &str = "leader";

/// How long leadership lasts without the store's word.
///
/// Where others could lead, a killed leader is missed for what is left of its lease. etcd counts whole seconds, two at
/// least, and looks for ended leases every half second; so another leads 1.6 s to 2.5 s after the kill, and then takes one
/// transaction and one listing: below 4 s with more than a second to spare. To step down costs no trainer anything, so it
/// may come early: after three renewals without an answer, half a second before the lease can have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Time to live of the lease.
    pub ttl: Duration,
    /// Between renewals.
    pub renew_every: Duration,
    /// After the last renewal's start; below `ttl` by more than a renewal can take.
    pub step_down_after: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            ttl: Duration::from_secs(2),
            renew_every: Duration::from_millis(400),
            step_down_after: Duration::from_millis(1500),
        }
    }
}

impl Timing {
    /// Where nobody else can lead, as over the embedded store: a disk that is busy for a while is no reason to step down.
    #[must_use]
    pub fn alone() -> Self {
        Self {
            ttl: Duration::from_secs(60),
            renew_every: Duration::from_secs(5),
            step_down_after: Duration::from_secs(45),
        }
    }
}

/// Who leads, as the key says it to everybody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub name: String,
    /// `host:port` it serves on.
    pub address: String,
    pub incarnation: Incarnation,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("leader epoch {0} has ended; another coordinator may lead now")]
    Fenced(LeaderEpoch),
    #[error("campaign for leadership")]
    Campaign(#[source] store::Error),
    #[error("write as leader")]
    Store(#[source] store::Error),
}

/// How a leader's transaction that was answered ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    Applied {
        revision: Revision,
    },
    /// A compare of the caller's did not hold; we still lead.
    Conflict,
}

/// The one who may write. A cheap clone.
#[derive(Debug, Clone)]
pub struct Fenced {
    store: Arc<dyn Store>,
    epoch: LeaderEpoch,
    term: Arc<Term>,
}

#[derive(Debug)]
struct Term {
    /// We lead until then, by our own clock.
    deadline: Mutex<Instant>,
    over: CancellationToken,
}

/// A won campaign. [`Leadership::keep`] renews it; [`Leadership::fenced`] writes under it.
#[derive(Debug)]
pub struct Leadership {
    fenced: Fenced,
    lease: LeaseId,
    timing: Timing,
}

/// Between looks at the key while another leads, should the watch on it be silent without reason.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Between tries while the store does not answer.
const RETRY_BASE: Duration = Duration::from_millis(50);
const RETRY_CAP: Duration = Duration::from_secs(1);

/// Campaigns until won. Waits while another leads, and while the store does not answer; says who leads through `waiting`.
///
/// # Errors
/// The store refuses what trying again cannot mend.
pub async fn campaign(
    store: Arc<dyn Store>,
    identity: &Identity,
    timing: Timing,
    mut waiting: impl FnMut(Option<Identity>) + Send,
) -> Result<Leadership, Error> {
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
    loop {
        match wait_until_vacant(store.as_ref(), &mut waiting).await {
            Ok(()) => match stand(&store, identity, timing).await {
                Ok(Some(won)) => return Ok(won),
                Ok(None) => backoff.reset(),
                Err(error) => try_again(error, &mut backoff).await?,
            },
            Err(error) => try_again(error, &mut backoff).await?,
        }
    }
}

async fn try_again(error: Error, backoff: &mut Backoff) -> Result<(), Error> {
    match &error {
        Error::Campaign(cause) if cause.class() == ErrorClass::Retry || cause.class() == ErrorClass::Fenced => {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot campaign now; tries again");
            tokio::time::sleep(backoff.next_wait().unwrap_or(RETRY_CAP)).await;
            Ok(())
        }
        Error::Campaign(_) | Error::Fenced(_) | Error::Store(_) => Err(error),
    }
}

/// One try to take the vacant key.
async fn stand(store: &Arc<dyn Store>, identity: &Identity, timing: Timing) -> Result<Option<Leadership>, Error> {
    let asked = Instant::now();
    let lease = store.grant_lease(timing.ttl).await.map_err(Error::Campaign)?;
    let claimed = claim(store.as_ref(), identity, lease).await;
    if let Ok(Some(epoch)) = claimed {
        tracing::info!(%epoch, name = identity.name, "leads");
        let term = Term { deadline: Mutex::new(asked + timing.step_down_after), over: CancellationToken::new() };
        let fenced = Fenced { store: Arc::clone(store), epoch, term: Arc::new(term) };
        return Ok(Some(Leadership { fenced, lease, timing }));
    }
    if let Err(error) = store.revoke(lease).await {
        tracing::debug!(error = &error as &dyn std::error::Error, "an unused lease ends by itself");
    }
    claimed.map(|_| None)
}

async fn claim(store: &dyn Store, identity: &Identity, lease: LeaseId) -> Result<Option<LeaderEpoch>, Error> {
    let value = serde_json::to_vec(identity).expect("an identity is plain strings");
    let lease = if planted("leader-without-lease") { None } else { Some(lease) };
    let op = Op::Put { key: LEADER_KEY.to_owned(), value, lease };
    let vacant = if planted("leader-takes-over") { vec![] } else { vec![Compare::absent(LEADER_KEY)] };
    match store.txn(vacant, vec![op]).await {
        Ok(TxnOutcome::Applied { revision }) => Ok(Some(LeaderEpoch(revision.0))),
        Ok(TxnOutcome::NotApplied) => Ok(None),
        Err(store::Error::Unknown { .. }) => {
            // LEAD-4.
            let held = store.get(LEADER_KEY).await.map_err(Error::Campaign)?.value;
            let ours = held.filter(|entry| {
                read_identity(&entry.value).is_some_and(|held| held.incarnation == identity.incarnation)
            });
            Ok(ours.map(|entry| LeaderEpoch(entry.create_revision.0)))
        }
        Err(error) => Err(Error::Campaign(error)),
    }
}

/// Returns where nobody holds the key.
async fn wait_until_vacant(
    store: &dyn Store,
    waiting: &mut (impl FnMut(Option<Identity>) + Send),
) -> Result<(), Error> {
    loop {
        let read = store.get(LEADER_KEY).await.map_err(Error::Campaign)?;
        let Some(entry) = read.value else {
            waiting(None);
            return Ok(());
        };
        waiting(read_identity(&entry.value));
        let mut changes = store.watch(LEADER_KEY, read.revision).await.map_err(Error::Campaign)?;
        // Any change, the end of the watch included, is a reason to look again.
        let _ = tokio::time::timeout(LOOK_EVERY, changes.next()).await;
    }
}

fn read_identity(value: &[u8]) -> Option<Identity> {
    serde_json::from_slice(value).ok()
}

/// Who leads now; `None` where nobody does.
pub async fn current(store: &dyn Store) -> Result<Option<(LeaderEpoch, Identity)>, store::Error> {
    let read = store.get(LEADER_KEY).await?;
    Ok(read.value.and_then(|entry| Some((LeaderEpoch(entry.create_revision.0), read_identity(&entry.value)?))))
}

impl Leadership {
    /// The writer of this term.
    #[must_use]
    pub fn fenced(&self) -> Fenced {
        self.fenced.clone()
    }

    /// Renews until the term is over: lost, or [`Fenced::resign`]ed. Then every write is refused.
    pub async fn keep(self) {
        let term = Arc::clone(&self.fenced.term);
        loop {
            let deadline = *term.deadline.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let now = Instant::now();
            if now >= deadline {
                tracing::error!(epoch = %self.fenced.epoch, "no renewal in time; steps down");
                term.over.cancel();
            }
            let renewal =
                tokio::time::timeout(deadline.saturating_duration_since(now), self.fenced.store.keep_alive(self.lease));
            let renewed = tokio::select! {
                biased;
                () = term.over.cancelled() => return self.leave().await,
                renewed = renewal => renewed,
            };
            match renewed {
                Ok(Ok(())) => {
                    *term.deadline.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                        now + self.timing.step_down_after
                }
                Ok(Err(store::Error::LeaseNotFound(_))) => {
                    tracing::error!(epoch = %self.fenced.epoch, "the lease has ended; steps down");
                    term.over.cancel();
                }
                // Anything else is tried again until our own deadline.
                Ok(Err(error)) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "could not renew leadership")
                }
                Err(_) => {}
            }
            tokio::select! {
                biased;
                () = term.over.cancelled() => return self.leave().await,
                () = tokio::time::sleep(self.timing.renew_every) => {}
            }
        }
    }

    async fn leave(self) {
        // So that another can lead at once; else the lease ends by itself.
        if let Err(error) = self.fenced.store.revoke(self.lease).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "the lease ends by itself");
        }
    }
}

impl Fenced {
    /// The fencing token of this term.
    #[must_use]
    pub fn epoch(&self) -> LeaderEpoch {
        self.epoch
    }

    /// Ends when this term has.
    pub async fn over(&self) {
        self.term.over.cancelled().await;
    }

    /// Ends the term; [`Leadership::keep`] gives the key back.
    pub fn resign(&self) {
        self.term.over.cancel();
    }

    /// Reads need no fence.
    #[must_use]
    pub fn reader(&self) -> &dyn Store {
        self.store.as_ref()
    }

    /// A transaction that applies only while this term lasts (LEAD-1, LEAD-2).
    pub async fn txn(&self, mut compares: Vec<Compare>, ops: Vec<Op>) -> Result<Written, Error> {
        self.check()?;
        if !planted("leader-compare-dropped") {
            compares.push(Compare::created_at(LEADER_KEY, Revision(self.epoch.0)));
        }
        match self.store.txn(compares, ops).await.map_err(Error::Store)? {
            TxnOutcome::Applied { revision } => Ok(Written::Applied { revision }),
            TxnOutcome::NotApplied => {
                let held = self.store.get(LEADER_KEY).await.map_err(Error::Store)?.value;
                if held.is_some_and(|entry| entry.create_revision.0 == self.epoch.0) {
                    return Ok(Written::Conflict);
                }
                self.term.over.cancel();
                Err(Error::Fenced(self.epoch))
            }
        }
    }

    /// Refused once the term is over, by its end or by our own clock.
    pub fn check(&self) -> Result<(), Error> {
        let deadline = *self.term.deadline.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if self.term.over.is_cancelled() || Instant::now() >= deadline {
            self.term.over.cancel();
            return Err(Error::Fenced(self.epoch));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Embedded;

    fn identity(name: &str) -> Identity {
        Identity {
            name: name.to_owned(),
            address: "127.0.0.1:1".to_owned(),
            incarnation: Incarnation(format!("{name}-1")),
        }
    }

    async fn store(folder: &tempfile::TempDir) -> Arc<dyn Store> {
        Arc::new(Embedded::open(folder.path().join("store.redb")).await.unwrap())
    }

    #[tokio::test]
    async fn a_second_candidate_waits_and_follows_with_a_higher_epoch() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder).await;
        let first = campaign(Arc::clone(&store), &identity("one"), Timing::default(), |_| ()).await.unwrap();
        let old = first.fenced();
        let (saw, seen) = tokio::sync::oneshot::channel();
        let mut saw = Some(saw);
        let second = tokio::spawn({
            let store = Arc::clone(&store);
            async move {
                let waiting = move |held: Option<Identity>| {
                    if held.is_some()
                        && let Some(saw) = saw.take()
                    {
                        let _ = saw.send(held);
                    }
                };
                campaign(store, &identity("two"), Timing::default(), waiting).await.unwrap()
            }
        });
        assert_eq!(seen.await.unwrap(), Some(identity("one")));
        let kept = tokio::spawn(first.keep());
        old.resign();
        kept.await.unwrap();
        let new = second.await.unwrap().fenced();
        assert!(new.epoch() > old.epoch());
        assert!(matches!(old.txn(vec![], vec![Op::put("x", "old")]).await, Err(Error::Fenced(_))), "LEAD-3");
        assert!(matches!(new.txn(vec![], vec![Op::put("x", "new")]).await, Ok(Written::Applied { .. })));
        assert_eq!(current(store.as_ref()).await.unwrap(), Some((new.epoch(), identity("two"))));
    }

    #[tokio::test]
    async fn the_compare_stops_a_leader_that_does_not_know() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder).await;
        let leader = campaign(Arc::clone(&store), &identity("one"), Timing::default(), |_| ()).await.unwrap().fenced();
        assert_eq!(leader.txn(vec![Compare::absent(LEADER_KEY)], vec![]).await.unwrap(), Written::Conflict);
        store.txn(vec![], vec![Op::delete(LEADER_KEY)]).await.unwrap();
        assert!(matches!(leader.txn(vec![], vec![Op::put("x", "1")]).await, Err(Error::Fenced(_))), "LEAD-1");
        assert_eq!(store.get("x").await.unwrap().value, None);
        leader.over().await;
    }

    #[tokio::test]
    async fn steps_down_by_its_own_clock() {
        let folder = tempfile::tempdir().unwrap();
        let store = store(&folder).await;
        let timing = Timing { step_down_after: Duration::ZERO, ..Timing::default() };
        let leader = campaign(store, &identity("one"), timing, |_| ()).await.unwrap();
        let fenced = leader.fenced();
        assert!(matches!(fenced.check(), Err(Error::Fenced(_))), "LEAD-2");
        fenced.over().await;
    }
}
