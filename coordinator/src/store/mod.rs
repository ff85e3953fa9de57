//! The store: the one place where run state is durable.
//!
//! A flat map of keys to bytes with etcd's revision rules, behind one trait with two implementations (`embedded`,
//! `etcd`) and one conformance suite over both (`tests/store/`).
//!
//! STORE-1: the store has one revision; every transaction that changes something raises it by one, and all changes of a
//!          transaction carry that revision.
//! STORE-2: a key's `create_revision` is that of the transaction that made it, and changes only when it is deleted and
//!          made again; its `mod_revision` is that of its last put.
//! STORE-3: a transaction applies all of its operations or none, and answers applied, not applied, or *unknown*
//!          ([`Error::Unknown`]). After unknown the caller reads again before it acts.
//! STORE-4: a watch delivers every change after its revision, in order, or says [`WatchEvent::Resync`] and ends. It
//!          never skips in silence.
//! STORE-5: keys put with a lease are gone once the lease has ended, and never before its time to live since the last
//!          renewal.
//!
//! Never in here: what a run is. Values are bytes.

mod access;
mod embedded;
mod etcd;
mod follow;
mod rebased;
mod url;

pub use self::access::{EtcdAccess, Password};
pub use self::embedded::Embedded;
pub use self::etcd::Etcd;
pub use self::follow::{Followed, follow};
pub use self::rebased::Rebased;
pub use self::url::{ParseError, StoreUrl};

use async_trait::async_trait;
use futures::stream::BoxStream;
use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thaw_proto::status::ErrorClass;

/// The longest any one operation takes before it fails with [`Error::Unavailable`] or [`Error::Unknown`].
pub const OPERATION_DEADLINE: Duration = Duration::from_secs(5);

/// A point in the store's history. 0 is before the first change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub u64);

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease, by the store's number for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

/// One key and what is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    pub create_revision: Revision,
    pub mod_revision: Revision,
}

/// What was read, and the store's revision at which it was so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At<T> {
    pub revision: Revision,
    pub value: T,
}

/// A condition of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    pub key: String,
    pub target: Target,
}

/// What a [`Compare`] demands of its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    Absent,
    CreateRevision(Revision),
    ModRevision(Revision),
    /// The key exists and has this value.
    Value(Vec<u8>),
}

impl Compare {
    /// The key does not exist.
    #[must_use]
    pub fn absent(key: impl Into<String>) -> Self {
        Self { key: key.into(), target: Target::Absent }
    }

    /// The key was made at this revision.
    #[must_use]
    pub fn created_at(key: impl Into<String>, revision: Revision) -> Self {
        Self { key: key.into(), target: Target::CreateRevision(revision) }
    }

    /// The key was last put at this revision.
    #[must_use]
    pub fn modified_at(key: impl Into<String>, revision: Revision) -> Self {
        Self { key: key.into(), target: Target::ModRevision(revision) }
    }

    /// The key holds these bytes.
    #[must_use]
    pub fn value_is(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), target: Target::Value(value.into()) }
    }
}

/// A change a transaction makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put { key: String, value: Vec<u8>, lease: Option<LeaseId> },
    Delete { key: String },
}

impl Op {
    /// Puts without a lease.
    #[must_use]
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    /// Deletes one key; no change where it does not exist.
    #[must_use]
    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    /// The key it changes.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// How a transaction that was answered ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxnOutcome {
    /// All operations are durable, at this revision.
    Applied { revision: Revision },
    /// A compare did not hold; nothing changed.
    NotApplied,
}

/// One change seen by a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    Put(Entry),
    Delete {
        key: String,
        revision: Revision,
    },
    /// Changes were missed (history compacted, reader too slow, connection lost). The stream ends here: list and watch
    /// anew.
    Resync,
}

/// Changes in order. Its end means the same as [`WatchEvent::Resync`].
pub type WatchStream = BoxStream<'static, WatchEvent>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operation may or may not have been applied (STORE-3).
    #[error("{operation}: the store's answer was lost, so the outcome is unknown; read again before acting")]
    Unknown {
        operation: &'static str,
        #[source]
        source: Option<Cause>,
    },
    /// The operation was not applied, and may work later.
    #[error("{operation}: the store cannot be reached or cannot write; check that it runs and has space")]
    Unavailable {
        operation: &'static str,
        #[source]
        source: Option<Cause>,
    },
    /// The store knows who asks, or does not, and refuses.
    #[error(
        "{operation}: the store refuses this user; check --etcd-user, its password, and that its role may read and write the prefix"
    )]
    Denied {
        operation: &'static str,
        #[source]
        source: Option<Cause>,
    },
    #[error("lease {0:?} has ended or never existed")]
    LeaseNotFound(LeaseId),
    #[error("{operation}: {what}")]
    Invalid { operation: &'static str, what: String },
    #[error("another coordinator uses the store {}; stop it, or give this one a store of its own with --store", path.display())]
    InUse { path: PathBuf },
    #[error("open store {url}: {what}")]
    Open {
        url: String,
        what: String,
        #[source]
        source: Option<Cause>,
    },
}

impl Error {
    /// What the caller can do about it.
    #[must_use]
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Unknown { .. } | Self::Unavailable { .. } => ErrorClass::Retry,
            Self::LeaseNotFound(_) => ErrorClass::Fenced,
            Self::Invalid { .. } => ErrorClass::Invalid,
            Self::Denied { .. } | Self::InUse { .. } | Self::Open { .. } => ErrorClass::Precondition,
        }
    }
}

/// The cause below a store error.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A durable map with revisions. Cheap to share as `Arc<dyn Store>`.
///
/// Every call ends within [`OPERATION_DEADLINE`]: reads are tried again until then, a transaction is sent once. Dropping a
/// call's future does not undo it: the outcome is then unknown.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug + 'static {
    /// One key.
    async fn get(&self, key: &str) -> Result<At<Option<Entry>>, Error>;

    /// All keys that start with `prefix`, ascending, as of one revision.
    async fn list(&self, prefix: &str) -> Result<At<Vec<Entry>>, Error>;

    /// Applies `ops` in order if every compare holds. No key may occur twice in `ops`.
    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome, Error>;

    /// Every change after `after` to keys that start with `prefix`.
    async fn watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, Error>;

    /// A lease that lives at least `ttl` from now (etcd counts whole seconds, and two at least).
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error>;

    /// Renews the lease for its full time to live.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error>;

    /// Ends the lease; its keys are gone when this returns. No error where it has ended already.
    async fn revoke(&self, lease: LeaseId) -> Result<(), Error>;
}

/// Opens the store a URL names, where it asks for nothing.
pub async fn open(url: &StoreUrl) -> Result<Arc<dyn Store>, Error> {
    open_with(url, &EtcdAccess::default()).await
}

/// Opens the store a URL names.
pub async fn open_with(url: &StoreUrl, access: &EtcdAccess) -> Result<Arc<dyn Store>, Error> {
    Ok(match url {
        StoreUrl::Embedded(path) => Arc::new(Embedded::open(path.clone()).await?),
        StoreUrl::Etcd { endpoints, prefix, tls } => {
            let scheme = if *tls { "https" } else { "http" };
            let endpoints: Vec<String> = endpoints.iter().map(|endpoint| format!("{scheme}://{endpoint}")).collect();
            Arc::new(Etcd::connect(url, &endpoints, prefix, access).await?)
        }
    })
}

/// What both implementations refuse: etcd rejects these itself, with less to say.
fn check_ops(ops: &[Op]) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    for op in ops {
        if op.key().is_empty() {
            return Err(Error::Invalid { operation: "transaction", what: "empty key".to_owned() });
        }
        if !seen.insert(op.key()) {
            let what = format!("key {:?} occurs twice in one transaction", op.key());
            return Err(Error::Invalid { operation: "transaction", what });
        }
    }
    Ok(())
}
