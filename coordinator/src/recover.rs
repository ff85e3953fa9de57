//! A lost store, rebuilt from the folders of its runs. Only when somebody says so.
//!
//! RECOVER-1: nothing is written while a coordinator leads, or into a store that has something, unless told to replace it.
//! RECOVER-2: a store that is half rebuilt is marked so, and no coordinator leads over it.
//! RECOVER-3: generations, leader epochs and revisions go on above all that were ever seen.

use crate::clock;
use crate::driver::{self, Rebuilt};
use crate::leader::{self, LEADER_KEY};
use crate::origin::{self, ORIGIN, Origin, RECOVERING};
use crate::store::{self, Compare, EtcdAccess, Op, Store, StoreUrl, TxnOutcome};
use std::path::{Path, PathBuf};

/// Deletions in one transaction; etcd takes at most 128 operations.
const AT_ONCE: usize = 100;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("coordinator {name} at {address} leads over this store; stop all coordinators first")]
    Led { name: String, address: String },
    #[error("the store has {runs} run(s) and is not lost; to throw them away and rebuild it say --replace")]
    NotEmpty { runs: usize },
    #[error("somebody else changes the store; stop all coordinators, and run `thaw recover --replace` again")]
    Raced,
    #[error("read the folder {}", path.display())]
    Folder {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Origin(#[from] origin::Error),
    #[error("reading the runs' folders ended early")]
    Ended,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Recovered {
    pub runs: Vec<Rebuilt>,
    /// Folders that are no run's, and why, in words.
    pub left_out: Vec<(PathBuf, String)>,
}

/// Rebuilds the store from the runs below each of `folders`, which hold folders `runs/<run>`.
pub async fn recover(
    url: &StoreUrl,
    access: &EtcdAccess,
    folders: &[PathBuf],
    replace: bool,
) -> Result<Recovered, Error> {
    let store = store::open_with(url, access).await?;
    let store = store.as_ref();
    if let Some((_, held)) = leader::current(store).await? {
        return Err(Error::Led { name: held.name, address: held.address });
    }
    let held = store.list("").await?.value;
    if !held.is_empty() && !replace {
        return Err(Error::NotEmpty { runs: held.iter().filter(|entry| entry.key.starts_with("runs/")).count() });
    }
    // Above all revisions of a store that was never rebuilt, and of one that was: revisions rise slower than milliseconds.
    let base = clock::now_ms().unsigned_abs();
    let folders = folders.to_vec();
    let read = tokio::task::spawn_blocking(move || read_all(&folders, base));
    let recovered = read.await.map_err(|_| Error::Ended)??;
    let origin = Origin::new(base);
    // RECOVER-2.
    write(store, vec![], vec![Op::put(RECOVERING, origin.id.clone())]).await?;
    let ours = || Compare::value_is(RECOVERING, origin.id.clone());
    let keys: Vec<String> = held.into_iter().map(|entry| entry.key).filter(|key| key != RECOVERING).collect();
    for some in keys.chunks(AT_ONCE) {
        write(store, vec![ours()], some.iter().map(Op::delete).collect()).await?;
    }
    for run in &recovered.runs {
        let (key, value) = run.entry();
        write(store, vec![ours()], vec![Op::put(key, value)]).await?;
    }
    let finish = vec![Op::delete(RECOVERING), Op::put(ORIGIN, origin.to_bytes())];
    write(store, vec![ours()], finish).await?;
    Ok(recovered)
}

/// One transaction, while nobody leads (RECOVER-1). An unknown outcome ends it: it is run again from the start.
async fn write(store: &dyn Store, mut compares: Vec<Compare>, ops: Vec<Op>) -> Result<(), Error> {
    compares.push(Compare::absent(LEADER_KEY));
    match store.txn(compares, ops).await? {
        TxnOutcome::Applied { .. } => Ok(()),
        TxnOutcome::NotApplied => Err(Error::Raced),
    }
}

fn read_all(folders: &[PathBuf], base: u64) -> Result<Recovered, Error> {
    let mut recovered = Recovered::default();
    for folder in folders {
        for path in run_folders(&folder.join("runs"))? {
            match driver::rebuild(&path, base) {
                Ok(run) => recovered.runs.push(run),
                Err(error) => recovered.left_out.push((path, thaw_runtime::chain(&error))),
            }
        }
    }
    Ok(recovered)
}

fn run_folders(runs: &Path) -> Result<Vec<PathBuf>, Error> {
    let refuse = |source| Error::Folder { path: runs.to_owned(), source };
    let entries = std::fs::read_dir(runs).map_err(refuse)?;
    let mut paths =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>().map_err(refuse)?;
    paths.retain(|path| path.is_dir());
    paths.sort();
    Ok(paths)
}
