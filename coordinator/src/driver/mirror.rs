//! The runs as the store has them, shown to readers of a coordinator that does not lead.

use super::stored::{RUNS, StoredRun, Unreadable, run_key};
use crate::store::{self, Entry, Followed, Store};
use crate::views::Views;
use futures::StreamExt;
use std::sync::Arc;
use thaw_core::run_machine::RunRecord;
use thaw_proto::ids::RunId;
use tokio::sync::watch;

/// Shows every run and its changes until dropped; `synced` becomes true once all that there was is shown.
pub async fn mirror(store: Arc<dyn Store>, views: Views, synced: &watch::Sender<bool>) {
    let mut following = store::follow(store, RUNS);
    while let Some(followed) = following.next().await {
        match followed {
            Followed::Put(entry) => show(&views, &entry),
            Followed::Deleted { key } => {
                if let Some(id) = key.strip_prefix(RUNS) {
                    views.forget(&RunId(id.to_owned()));
                }
            }
            Followed::Synced(_) => {
                synced.send_replace(true);
            }
            Followed::Trouble(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "runs are shown as they were last seen");
            }
        }
    }
}

/// The revision of a run in the store now. `None`: there is no such run.
pub async fn stored_revision(store: &dyn Store, run: &RunId) -> Result<Option<u64>, store::Error> {
    Ok(store.get(&run_key(run)).await?.value.map(|entry| entry.mod_revision.0))
}

/// The run that a value of the store holds.
///
/// # Errors
/// The value is damaged, or another version's.
pub fn stored_run(value: &[u8]) -> Result<RunRecord, Unreadable> {
    StoredRun::from_bytes(value).map(|stored| stored.record)
}

fn show(views: &Views, entry: &Entry) {
    match StoredRun::from_bytes(&entry.value) {
        Ok(stored) => views.publish(&stored.record.id.clone(), stored.shown(entry.mod_revision)),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::error!(key = entry.key, error, "a run of another version, or a damaged one, is not shown")
        }
    }
}
