//! The keys below a prefix, followed without end: list, watch from there, and list again where the watch cannot go on.
//!
//! FOLLOW-1: of each key, every state that is handed out is newer than the one before, and the last one always comes.
//!           States between may be left out where the store's history is gone.
//! FOLLOW-2: a key that is gone is said to be gone once, also where nobody saw it go.

use super::{Entry, Error, Revision, Store, WatchEvent, WatchStream};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use thaw_runtime::backoff::Backoff;

/// Between tries where the store does not answer.
const RETRY_BASE: Duration = Duration::from_millis(50);
const RETRY_CAP: Duration = Duration::from_secs(1);

/// What is new below the prefix.
#[derive(Debug)]
pub enum Followed {
    Put(Entry),
    Deleted {
        key: String,
    },
    /// All that was there at this revision has been handed out.
    Synced(Revision),
    /// The store does not answer; it is asked again.
    Trouble(Error),
}

/// Follows the keys that start with `prefix`, from what is there now. The stream never ends.
#[must_use]
pub fn follow(store: Arc<dyn Store>, prefix: &str) -> BoxStream<'static, Followed> {
    let following = Following {
        store,
        prefix: prefix.to_owned(),
        known: BTreeMap::new(),
        watching: None,
        ready: VecDeque::new(),
        backoff: Backoff::new(RETRY_BASE, RETRY_CAP),
    };
    futures::stream::unfold(following, |mut following| async move { Some((following.next().await, following)) }).boxed()
}

struct Following {
    store: Arc<dyn Store>,
    prefix: String,
    /// Revision of the last state that was handed out.
    known: BTreeMap<String, Revision>,
    /// `None`: to be listed first.
    watching: Option<WatchStream>,
    ready: VecDeque<Followed>,
    backoff: Backoff,
}

impl Following {
    async fn next(&mut self) -> Followed {
        loop {
            if let Some(ready) = self.ready.pop_front() {
                return ready;
            }
            let Some(watching) = &mut self.watching else {
                match self.list().await {
                    Ok(()) => self.backoff.reset(),
                    Err(error) => {
                        tokio::time::sleep(self.backoff.next_wait().unwrap_or(RETRY_CAP)).await;
                        return Followed::Trouble(error);
                    }
                }
                continue;
            };
            match watching.next().await {
                Some(WatchEvent::Put(entry)) => self.put(entry),
                Some(WatchEvent::Delete { key, revision }) => {
                    if self.known.get(&key).is_some_and(|known| *known < revision) {
                        self.known.remove(&key);
                        self.ready.push_back(Followed::Deleted { key });
                    }
                }
                Some(WatchEvent::Resync) | None => self.watching = None,
            }
        }
    }

    /// Lists, and watches from there.
    async fn list(&mut self) -> Result<(), Error> {
        let listed = self.store.list(&self.prefix).await?;
        self.watching = Some(self.store.watch(&self.prefix, listed.revision).await?);
        let gone: Vec<String> = self
            .known
            .keys()
            .filter(|key| listed.value.binary_search_by(|entry| entry.key.as_str().cmp(key)).is_err())
            .cloned()
            .collect();
        for key in gone {
            self.known.remove(&key);
            self.ready.push_back(Followed::Deleted { key });
        }
        for entry in listed.value {
            self.put(entry);
        }
        self.ready.push_back(Followed::Synced(listed.revision));
        Ok(())
    }

    fn put(&mut self, entry: Entry) {
        let known = self.known.get(&entry.key).copied();
        if known.is_none_or(|known| known < entry.mod_revision) {
            self.known.insert(entry.key.clone(), entry.mod_revision);
            self.ready.push_back(Followed::Put(entry));
        }
    }
}
