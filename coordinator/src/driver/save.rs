//! One write, until it is known what became of it (DRIVE-2).

use super::Error;
use crate::leader::{self, Fenced, Written};
use crate::store::{self, Compare, Op, Revision};
use std::time::Duration;
use thaw_mutants::planted;
use thaw_proto::status::ErrorClass;
use thaw_runtime::backoff::Backoff;

/// A value to put under a key, if the key is as it was read.
#[derive(Debug, Clone)]
pub(super) struct Save {
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    /// `None`: the key must not exist.
    pub(super) expected: Option<Revision>,
    /// Held and applied with it.
    pub(super) also: Option<(Compare, Op)>,
}

/// Writes, and answers with the revision once the store has it. Tries for as long as this term lasts.
pub(super) async fn save(fenced: &Fenced, save: Save) -> Result<Revision, Error> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    loop {
        let compare = match save.expected {
            None => Compare::absent(&save.key),
            Some(revision) => Compare::modified_at(&save.key, revision),
        };
        let compare = if planted("save-without-compare") { None } else { Some(compare) };
        let (mut compares, mut ops) = (Vec::from_iter(compare), vec![Op::put(&save.key, save.value.clone())]);
        if let Some((compare, op)) = &save.also {
            compares.push(compare.clone());
            ops.push(op.clone());
        }
        match fenced.txn(compares, ops).await {
            Ok(Written::Applied { revision }) => return Ok(revision),
            // Perhaps by our own earlier try, whose answer was lost and which came through after the read.
            Ok(Written::Conflict) => {
                return found(fenced, &save).await?.ok_or_else(|| {
                    let what = format!("key {} was changed by somebody else", save.key);
                    Error::Leader(leader::Error::Store(store::Error::Invalid { operation: "save", what }))
                });
            }
            Err(leader::Error::Store(error @ (store::Error::Unknown { .. } | store::Error::Unavailable { .. }))) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    key = save.key,
                    "the store did not take a change; tries again"
                );
                if planted("unknown-is-applied")
                    && let Some(revision) = save.expected
                {
                    return Ok(revision);
                }
                if let (store::Error::Unknown { .. }, Some(revision)) = (&error, found(fenced, &save).await?) {
                    return Ok(revision);
                }
            }
            Err(leader::Error::Fenced(_)) => return Err(Error::Stopped),
            Err(error @ (leader::Error::Store(_) | leader::Error::Campaign(_))) => return Err(Error::Leader(error)),
        }
        wait(fenced, &mut backoff).await?;
    }
}

/// Asks the store until it answers, for as long as this term lasts (DRIVE-5).
pub(super) async fn read<T, Asking>(fenced: &Fenced, mut ask: impl FnMut() -> Asking) -> Result<T, Error>
where
    Asking: Future<Output = Result<T, store::Error>>,
{
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    loop {
        fenced.check().map_err(|_| Error::Stopped)?;
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) if error.class() == ErrorClass::Retry && !planted("silence-ends-leader") => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the store does not answer; tries again")
            }
            Err(error) => return Err(Error::Leader(leader::Error::Store(error))),
        }
        wait(fenced, &mut backoff).await?;
    }
}

/// The revision at which our very value is stored, if it is.
async fn found(fenced: &Fenced, save: &Save) -> Result<Option<Revision>, Error> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    loop {
        fenced.check().map_err(|_| Error::Stopped)?;
        match fenced.reader().get(&save.key).await {
            Ok(read) => {
                let ours =
                    read.value.filter(|entry| entry.value == save.value && Some(entry.mod_revision) != save.expected);
                return Ok(ours.map(|entry| entry.mod_revision));
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the store does not answer; tries again")
            }
        }
        wait(fenced, &mut backoff).await?;
    }
}

async fn wait(fenced: &Fenced, backoff: &mut Backoff) -> Result<(), Error> {
    let pause = backoff.next_wait().unwrap_or(Duration::from_secs(2));
    tokio::select! {
        biased;
        () = tokio::time::sleep(pause) => Ok(()),
        () = fenced.over() => Err(Error::Stopped),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::leader::{Identity, Timing, campaign};
    use crate::store::{At, Embedded, Entry, LeaseId, Store, TxnOutcome, WatchStream};
    use async_trait::async_trait;
    use std::collections::VecDeque;
    use std::sync::{Arc, Mutex};
    use thaw_proto::ids::Incarnation;

    /// What happens to the next transaction.
    #[derive(Debug, Clone, Copy)]
    enum Fate {
        Pass,
        /// Applied; the answer is lost.
        AnswerLost,
        /// Not applied; nobody knows.
        RequestLost,
        Refused,
    }

    #[derive(Debug)]
    struct Flaky {
        inner: Embedded,
        fates: Mutex<VecDeque<Fate>>,
    }

    #[async_trait]
    impl Store for Flaky {
        async fn get(&self, key: &str) -> Result<At<Option<Entry>>, store::Error> {
            self.inner.get(key).await
        }

        async fn list(&self, prefix: &str) -> Result<At<Vec<Entry>>, store::Error> {
            self.inner.list(prefix).await
        }

        async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome, store::Error> {
            let operation = "transaction";
            let fate = self.fates.lock().unwrap().pop_front().unwrap_or(Fate::Pass);
            match fate {
                Fate::Pass => self.inner.txn(compares, ops).await,
                Fate::AnswerLost => {
                    self.inner.txn(compares, ops).await?;
                    Err(store::Error::Unknown { operation, source: None })
                }
                Fate::RequestLost => Err(store::Error::Unknown { operation, source: None }),
                Fate::Refused => Err(store::Error::Unavailable { operation, source: None }),
            }
        }

        async fn watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, store::Error> {
            self.inner.watch(prefix, after).await
        }

        async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, store::Error> {
            self.inner.grant_lease(ttl).await
        }

        async fn keep_alive(&self, lease: LeaseId) -> Result<(), store::Error> {
            self.inner.keep_alive(lease).await
        }

        async fn revoke(&self, lease: LeaseId) -> Result<(), store::Error> {
            self.inner.revoke(lease).await
        }
    }

    async fn flaky(folder: &tempfile::TempDir) -> (Arc<Flaky>, Fenced) {
        let inner = Embedded::open(folder.path().join("store.redb")).await.unwrap();
        let store = Arc::new(Flaky { inner, fates: Mutex::default() });
        let identity = Identity {
            name: "one".to_owned(),
            address: "127.0.0.1:1".to_owned(),
            incarnation: Incarnation("one".to_owned()),
        };
        let leadership = campaign(store.clone(), &identity, Timing::default(), |_| ()).await.unwrap();
        (store, leadership.fenced())
    }

    #[tokio::test]
    async fn drive_5_a_silent_store_is_asked_again() {
        let folder = tempfile::tempdir().unwrap();
        let (_store, fenced) = flaky(&folder).await;
        let mut silent = 2;
        let answer = read(&fenced, || {
            let answers = silent == 0;
            silent -= u32::from(!answers);
            async move { if answers { Ok(7) } else { Err(store::Error::Unavailable { operation: "get", source: None }) } }
        });
        assert_eq!(answer.await.unwrap(), 7);
        assert_eq!(silent, 0);
    }

    fn write(value: &str, expected: Option<Revision>) -> Save {
        Save { key: "runs/a".to_owned(), value: value.as_bytes().to_vec(), expected, also: None }
    }

    #[tokio::test]
    async fn drive_2_an_unknown_outcome_is_resolved_by_reading() {
        let folder = tempfile::tempdir().unwrap();
        let (store, fenced) = flaky(&folder).await;
        let mut expected = None;
        let cases: [&[Fate]; 5] = [
            &[Fate::Pass],
            &[Fate::AnswerLost],
            &[Fate::RequestLost],
            &[Fate::Refused, Fate::AnswerLost],
            &[Fate::RequestLost, Fate::Refused, Fate::RequestLost, Fate::AnswerLost],
        ];
        for (index, fates) in cases.into_iter().enumerate() {
            store.fates.lock().unwrap().extend(fates);
            let revision = save(&fenced, write(&index.to_string(), expected)).await.unwrap();
            let entry = store.get("runs/a").await.unwrap().value.unwrap();
            assert_eq!((entry.value, entry.mod_revision), (index.to_string().into_bytes(), revision), "{fates:?}");
            assert!(expected < Some(revision));
            expected = Some(revision);
        }
    }

    #[tokio::test]
    async fn drive_5_a_read_without_an_answer_is_tried_again_until_the_term_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let (_, fenced) = flaky(&folder).await;
        let tries = std::cell::Cell::new(0);
        let ask = || {
            tries.set(tries.get() + 1);
            let answer = match tries.get() {
                1 | 2 => Err(store::Error::Unavailable { operation: "read", source: None }),
                _ => Ok(7),
            };
            std::future::ready(answer)
        };
        assert_eq!((read(&fenced, ask).await.unwrap(), tries.get()), (7, 3));
        let denied = || std::future::ready(Err::<(), _>(store::Error::Denied { operation: "read", source: None }));
        assert!(matches!(read(&fenced, denied).await, Err(Error::Leader(_))));
        let silent = || {
            fenced.resign();
            std::future::ready(Err::<(), _>(store::Error::Unavailable { operation: "read", source: None }))
        };
        assert!(matches!(read(&fenced, silent).await, Err(Error::Stopped)));
    }

    #[tokio::test]
    async fn drive_3_somebody_elses_change_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let (store, fenced) = flaky(&folder).await;
        let revision = save(&fenced, write("1", None)).await.unwrap();
        store.txn(vec![], vec![Op::put("runs/a", "other")]).await.unwrap();
        assert!(matches!(save(&fenced, write("2", Some(revision))).await, Err(Error::Leader(_))));
        fenced.resign();
        assert!(matches!(save(&fenced, write("3", None)).await, Err(Error::Stopped)));
    }
}
