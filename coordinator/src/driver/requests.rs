//! Ids of submissions, so that one that is sent again gives the same run. They are forgotten by age.

use super::Error;
use super::save;
use super::stored::{REQUESTS, StoredRequest, request_key};
use crate::leader::{Fenced, Written};
use crate::store::{Compare, Op, Revision};
use std::collections::BTreeMap;
use thaw_proto::ids::RunId;

/// Forgotten at once: etcd takes at most 128 compares and as many operations in a transaction, and the fence is one.
const AT_ONCE: usize = 100;

/// What this leader has to forget, oldest first.
#[derive(Debug, Default)]
pub(super) struct Requests {
    /// By age and key.
    kept: BTreeMap<(i64, String), Revision>,
}

impl Requests {
    /// All that the store has; none where it does not answer, which only leaves them until the next leader.
    pub(super) async fn load(fenced: &Fenced) -> Self {
        let listed = fenced.reader().list(REQUESTS).await.map(|listed| listed.value).unwrap_or_default();
        let read = |value: &[u8]| serde_json::from_slice::<StoredRequest>(value).ok();
        let kept =
            listed.into_iter().filter_map(|entry| Some(((read(&entry.value)?.at_ms, entry.key), entry.mod_revision)));
        Self { kept: kept.collect() }
    }

    /// What the store knows of an id.
    pub(super) async fn find(fenced: &Fenced, request_id: &str) -> Result<Option<(StoredRequest, Revision)>, Error> {
        let key = request_key(request_id);
        let entry = save::read(fenced, || fenced.reader().get(&key)).await?.value;
        Ok(entry.and_then(|entry| Some((serde_json::from_slice(&entry.value).ok()?, entry.mod_revision))))
    }

    /// The write that makes an id mean `run`, in place of what it meant before.
    pub(super) fn write(request_id: &str, run: &RunId, now_ms: i64, before: Option<Revision>) -> (Compare, Op) {
        let key = request_key(request_id);
        let compare = before.map_or_else(|| Compare::absent(&key), |revision| Compare::modified_at(&key, revision));
        let value = serde_json::to_vec(&StoredRequest { run: run.clone(), at_ms: now_ms }).expect("plain fields");
        (compare, Op::put(key, value))
    }

    /// An id was written at `revision`, in place of one that had come at `before_ms`.
    pub(super) fn written(&mut self, request_id: &str, now_ms: i64, revision: Revision, before_ms: Option<i64>) {
        let key = request_key(request_id);
        if let Some(before_ms) = before_ms {
            self.kept.remove(&(before_ms, key.clone()));
        }
        self.kept.insert((now_ms, key), revision);
    }

    /// Deletes some of those that answer no submission any more. Best effort: one that is left, or has another meaning
    /// by now, is the next leader's.
    pub(super) async fn forget_old(&mut self, fenced: &Fenced, now_ms: i64) {
        let is_old = |at_ms: i64| !StoredRequest::is_fresh_at(at_ms, now_ms);
        let mut old = Vec::new();
        while old.len() < AT_ONCE
            && let Some(first) = self.kept.first_entry().filter(|first| is_old(first.key().0))
        {
            old.push(first.remove_entry());
        }
        if old.is_empty() {
            return;
        }
        let compares = old.iter().map(|((_, key), revision)| Compare::modified_at(key, *revision)).collect();
        let deletes = old.into_iter().map(|((_, key), _)| Op::delete(key)).collect();
        match fenced.txn(compares, deletes).await {
            Ok(Written::Applied { .. }) => {}
            Ok(Written::Conflict) => tracing::debug!("old request ids are kept until the next start"),
            Err(error) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "old request ids are kept until the next start"
                );
            }
        }
    }
}
