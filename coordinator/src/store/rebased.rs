//! A store whose revisions count on from an earlier one's: after a store was lost and rebuilt, epochs and revisions that
//! workers and readers have seen must not come again.
//!
//! REBASE-1: outside, every revision is the inner one plus `base`; what lies below `base` was in a store that is gone, so
//!           no compare on it holds and no watch can start there.

use super::{At, Compare, Entry, Error, LeaseId, Op, Revision, Store, Target, TxnOutcome, WatchEvent, WatchStream};
use async_trait::async_trait;
use futures::StreamExt;
use std::sync::Arc;
use std::time::Duration;

/// A store with `base` added to its revisions.
#[derive(Debug)]
pub struct Rebased {
    inner: Arc<dyn Store>,
    base: u64,
}

impl Rebased {
    #[must_use]
    pub fn new(inner: Arc<dyn Store>, base: u64) -> Self {
        Self { inner, base }
    }

    fn compare(&self, compare: Compare) -> Compare {
        let target = match compare.target {
            Target::CreateRevision(revision) => Target::CreateRevision(self.inner_revision(revision)),
            Target::ModRevision(revision) => Target::ModRevision(self.inner_revision(revision)),
            target @ (Target::Absent | Target::Value(_)) => target,
        };
        Compare { key: compare.key, target }
    }

    /// One that no key can have, where it was in the store that is gone.
    fn inner_revision(&self, revision: Revision) -> Revision {
        Revision(revision.0.checked_sub(self.base).filter(|inner| *inner > 0).unwrap_or(i64::MAX.unsigned_abs()))
    }
}

fn add(revision: Revision, base: u64) -> Revision {
    Revision(revision.0 + base)
}

fn entry(entry: Entry, base: u64) -> Entry {
    Entry { create_revision: add(entry.create_revision, base), mod_revision: add(entry.mod_revision, base), ..entry }
}

#[async_trait]
impl Store for Rebased {
    async fn get(&self, key: &str) -> Result<At<Option<Entry>>, Error> {
        let At { revision, value } = self.inner.get(key).await?;
        Ok(At { revision: add(revision, self.base), value: value.map(|found| entry(found, self.base)) })
    }

    async fn list(&self, prefix: &str) -> Result<At<Vec<Entry>>, Error> {
        let At { revision, value } = self.inner.list(prefix).await?;
        let value = value.into_iter().map(|found| entry(found, self.base)).collect();
        Ok(At { revision: add(revision, self.base), value })
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        let compares = compares.into_iter().map(|compare| self.compare(compare)).collect();
        Ok(match self.inner.txn(compares, ops).await? {
            TxnOutcome::Applied { revision } => TxnOutcome::Applied { revision: add(revision, self.base) },
            TxnOutcome::NotApplied => TxnOutcome::NotApplied,
        })
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, Error> {
        let Some(after) = after.0.checked_sub(self.base) else {
            return Ok(futures::stream::iter([WatchEvent::Resync]).boxed());
        };
        let base = self.base;
        let inner = self.inner.watch(prefix, Revision(after)).await?;
        let outside = move |event| match event {
            WatchEvent::Put(put) => WatchEvent::Put(entry(put, base)),
            WatchEvent::Delete { key, revision } => WatchEvent::Delete { key, revision: add(revision, base) },
            WatchEvent::Resync => WatchEvent::Resync,
        };
        Ok(inner.map(outside).boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.inner.revoke(lease).await
    }
}
