//! Which store this is: a mark that its first leader puts, or `thaw recover`.
//!
//! ORIGIN-1: a store without its mark and without runs, beside a data folder with runs, has lost them: nobody leads over
//!           it until somebody has said `thaw recover`.
//! ORIGIN-2: a rebuilt store counts revisions on from a base above all that were ever seen, so leader epochs and
//!           revisions of runs go on rising.

use crate::leader::{self, Fenced};
use crate::store::{self, Compare, EtcdAccess, Op, Rebased, Store, StoreUrl};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The mark's key.
pub(crate) const ORIGIN: &str = "origin";
/// There while a store is being rebuilt.
pub(crate) const RECOVERING: &str = "recovering";

/// The mark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// UUID of the store's beginning.
    pub(crate) id: String,
    /// Added to the store's revisions.
    pub(crate) base: u64,
}

impl Origin {
    pub(crate) fn new(base: u64) -> Self {
        Self { id: thaw_runtime::surroundings::uuid().to_string(), base }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain fields")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "the store is empty, but {} holds runs: the store was lost, or is another cluster's; run `thaw recover` with the same \
         --store and --data-dir, or give this cluster a data folder of its own", folder.display()
    )]
    Lost { folder: PathBuf },
    #[error("the store is half rebuilt; run `thaw recover --replace` again to its end")]
    Recovering,
    #[error("the store was rebuilt while this coordinator ran; start it again")]
    Rebuilt,
    #[error("the store's key {ORIGIN} cannot be read; it was written by another version, or is damaged")]
    Unreadable(#[source] serde_json::Error),
    #[error("read which store this is")]
    Store(#[source] store::Error),
    #[error("mark the store")]
    Leader(#[source] leader::Error),
}

/// Opens a store, with the base it was given.
pub(crate) async fn open(url: &StoreUrl, access: &EtcdAccess) -> Result<(Arc<dyn Store>, u64), Error> {
    let store = store::open_with(url, access).await.map_err(Error::Store)?;
    let base = read(store.as_ref()).await?.map_or(0, |origin| origin.base);
    if base == 0 {
        return Ok((store, 0));
    }
    Ok((Arc::new(Rebased::new(store, base)), base))
}

pub(crate) async fn read(store: &dyn Store) -> Result<Option<Origin>, Error> {
    let entry = store.get(ORIGIN).await.map_err(Error::Store)?.value;
    entry.map(|entry| serde_json::from_slice(&entry.value)).transpose().map_err(Error::Unreadable)
}

/// Makes sure, as the leader, that this is the store it should be; marks a new one.
pub(crate) async fn settle(fenced: &Fenced, base: u64, data_dir: &Path) -> Result<(), Error> {
    let store = fenced.reader();
    if store.get(RECOVERING).await.map_err(Error::Store)?.value.is_some() {
        return Err(Error::Recovering);
    }
    if let Some(origin) = read(store).await? {
        return if origin.base == base { Ok(()) } else { Err(Error::Rebuilt) };
    }
    // Stores of versions without a mark have runs, or nothing to lose.
    let runs = store.list("runs/").await.map_err(Error::Store)?.value;
    let folder = data_dir.join("runs");
    if runs.is_empty() && holds_runs(&folder) {
        return Err(Error::Lost { folder });
    }
    let put = Op::put(ORIGIN, Origin::new(base).to_bytes());
    fenced.txn(vec![Compare::absent(ORIGIN)], vec![put]).await.map_err(Error::Leader)?;
    Ok(())
}

fn holds_runs(folder: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(folder) else { return false };
    entries.filter_map(Result::ok).any(|entry| entry.path().join("events.jsonl").is_file())
}
