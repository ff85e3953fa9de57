//! The store in etcd. Every key is put below a prefix, so that several clusters can share one etcd.
//!
//! Which answers mean "not applied" and which mean "unknown" is decided in one place, [`classify`]: only what etcd
//! refuses before it proposes the request counts as not applied.

use super::{
    At, Compare, Entry, Error, EtcdAccess, LeaseId, OPERATION_DEADLINE, Op, Revision, Store, StoreUrl, Target,
    TxnOutcome, WatchEvent, WatchStream,
};
use async_trait::async_trait;
use etcd_client::{
    Client, CompareOp, ConnectOptions, EventType, GetOptions, KeyValue, PutOptions, ResponseHeader, Txn, TxnOp,
    WatchOptions,
};
use futures::StreamExt;
use std::time::Duration;
use thaw_runtime::backoff::Backoff;
use tonic::Code;

/// Keys per page of a listing: pages stay below gRPC's message limit, and all pages read one revision.
const PAGE: i64 = 16;
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Between tries of a read.
const RETRY_BASE: Duration = Duration::from_millis(20);
const RETRY_CAP: Duration = Duration::from_millis(500);

/// The store in etcd.
pub struct Etcd {
    client: Client,
    endpoints: String,
    prefix: String,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish_non_exhaustive()
    }
}

impl Etcd {
    /// Connects and asks once, so that a wrong address, certificate or password is an error now.
    pub(super) async fn connect(
        url: &StoreUrl,
        endpoints: &[String],
        prefix: &str,
        access: &EtcdAccess,
    ) -> Result<Self, Error> {
        // No request timeout in the options: tonic would apply it to watches too. Each call has its deadline here.
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(2))
            .with_keep_alive(Duration::from_secs(5), Duration::from_secs(5))
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        let options = access.apply(url, options)?;
        let refuse = |error: Error| Error::Open {
            url: url.to_string(),
            what: access.advice(url, &error),
            source: Some(error.into()),
        };
        // With a user this asks for a token.
        let client = read("connect", || Client::connect(endpoints, Some(options.clone()))).await.map_err(refuse)?;
        let store = Self { client, endpoints: endpoints.join(","), prefix: prefix.to_owned() };
        store.get("leader").await.map_err(refuse)?;
        Ok(store)
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn entry(&self, pair: &KeyValue) -> Entry {
        entry(&self.prefix, pair)
    }

    fn compare(&self, compare: &Compare) -> etcd_client::Compare {
        let key = self.full(&compare.key);
        match &compare.target {
            Target::Absent => etcd_client::Compare::create_revision(key, CompareOp::Equal, 0),
            Target::CreateRevision(revision) => {
                etcd_client::Compare::create_revision(key, CompareOp::Equal, signed(*revision))
            }
            Target::ModRevision(revision) => {
                etcd_client::Compare::mod_revision(key, CompareOp::Equal, signed(*revision))
            }
            // etcd does not apply it to a key that is not there.
            Target::Value(value) => etcd_client::Compare::value(key, CompareOp::Equal, value.clone()),
        }
    }

    /// One page after another at one revision; `None` where that was compacted away meanwhile.
    async fn list_once(&self, prefix: &str) -> Result<Option<At<Vec<Entry>>>, etcd_client::Error> {
        let mut client = self.client.kv_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
        let mut start = self.full(prefix).into_bytes();
        let end = after_prefix(&start);
        let mut found = Vec::new();
        let mut pinned = None;
        loop {
            let mut options = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
            if let Some(at) = pinned {
                options = options.with_revision(signed(at));
            }
            let response = match client.get(start.clone(), Some(options)).await {
                Err(etcd_client::Error::GRpcStatus(status)) if status.code() == Code::OutOfRange => return Ok(None),
                answer => answer?,
            };
            let at = *pinned.get_or_insert_with(|| revision(response.header()));
            found.extend(response.kvs().iter().map(|pair| self.entry(pair)));
            match response.kvs().last() {
                Some(last) if response.more() => {
                    start = last.key().to_vec();
                    start.push(0);
                }
                Some(_) | None => return Ok(Some(At { revision: at, value: found })),
            }
        }
    }

    fn op(&self, op: Op) -> TxnOp {
        match op {
            Op::Put { key, value, lease } => {
                let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
                TxnOp::put(self.full(&key), value, options)
            }
            Op::Delete { key } => TxnOp::delete(self.full(&key), None),
        }
    }
}

#[async_trait]
impl Store for Etcd {
    async fn get(&self, key: &str) -> Result<At<Option<Entry>>, Error> {
        let response = read("get", || {
            let mut client = self.client.kv_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
            let key = self.full(key);
            async move { client.get(key, None).await }
        })
        .await?;
        Ok(At { revision: revision(response.header()), value: response.kvs().first().map(|pair| self.entry(pair)) })
    }

    async fn list(&self, prefix: &str) -> Result<At<Vec<Entry>>, Error> {
        let listing = async {
            loop {
                // From the start again: pages of different revisions would show what never was.
                if let Some(listed) = read("list", || self.list_once(prefix)).await? {
                    return Ok(listed);
                }
            }
        };
        let unanswered = |elapsed: tokio::time::error::Elapsed| Error::Unavailable {
            operation: "list",
            source: Some(elapsed.into()),
        };
        tokio::time::timeout(OPERATION_DEADLINE, listing).await.map_err(unanswered)?
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        super::check_ops(&ops)?;
        let lease = ops.iter().find_map(|op| match op {
            Op::Put { lease, .. } => *lease,
            Op::Delete { .. } => None,
        });
        let compares: Vec<_> = compares.iter().map(|compare| self.compare(compare)).collect();
        let ops: Vec<_> = ops.into_iter().map(|op| self.op(op)).collect();
        let mut client = self.client.kv_client();
        let answer =
            tokio::time::timeout(OPERATION_DEADLINE, client.txn(Txn::new().when(compares).and_then(ops))).await;
        match answer {
            Ok(Ok(response)) if response.succeeded() => {
                Ok(TxnOutcome::Applied { revision: revision(response.header()) })
            }
            Ok(Ok(_)) => Ok(TxnOutcome::NotApplied),
            Ok(Err(error)) => Err(classify("transaction", lease, error)),
            Err(elapsed) => Err(Error::Unknown { operation: "transaction", source: Some(elapsed.into()) }),
        }
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, Error> {
        let (watching, client) = read("watch", || {
            let mut client = self.client.watch_client().max_decoding_message_size(MAX_MESSAGE_BYTES);
            let options =
                WatchOptions::new().with_prefix().with_start_revision(signed(after) + 1).with_progress_notify();
            let key = self.full(prefix);
            async move { client.watch(key, Some(options)).await.map(|watching| (watching, client)) }
        })
        .await?;
        let state =
            Watching { watching: Some(watching), ready: Vec::new(), prefix: self.prefix.clone(), _client: client };
        Ok(futures::stream::unfold(state, |mut state| async move { state.next().await.map(|event| (event, state)) })
            .boxed())
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        let seconds = i64::try_from(ttl.as_millis().div_ceil(1000)).unwrap_or(i64::MAX);
        // A grant whose answer was lost leaves a lease that nobody renews.
        let response = read("grant lease", || {
            let mut client = self.client.lease_client();
            async move { client.grant(seconds, None).await }
        })
        .await?;
        Ok(LeaseId(response.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        let mut client = self.client.lease_client();
        // One short stream per renewal: at one renewal every few seconds that is cheaper than minding a long one.
        let answer = tokio::time::timeout(OPERATION_DEADLINE, client.keep_alive(lease.0)).await;
        match answer {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(etcd_client::Error::LeaseKeepAliveError(_))) => Err(Error::LeaseNotFound(lease)),
            Ok(Err(error)) => Err(classify("renew lease", Some(lease), error)),
            Err(elapsed) => Err(Error::Unknown { operation: "renew lease", source: Some(elapsed.into()) }),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        let mut client = self.client.lease_client();
        let answer = tokio::time::timeout(OPERATION_DEADLINE, client.revoke(lease.0)).await;
        match answer {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => match classify("revoke lease", Some(lease), error) {
                Error::LeaseNotFound(_) => Ok(()),
                other => Err(other),
            },
            Err(elapsed) => Err(Error::Unknown { operation: "revoke lease", source: Some(elapsed.into()) }),
        }
    }
}

struct Watching {
    watching: Option<etcd_client::WatchStream>,
    /// Events received and not handed on, last first.
    ready: Vec<WatchEvent>,
    prefix: String,
    /// Keeps the channel open while the stream lives.
    _client: etcd_client::WatchClient,
}

impl Watching {
    async fn next(&mut self) -> Option<WatchEvent> {
        loop {
            if let Some(event) = self.ready.pop() {
                return Some(event);
            }
            let message = self.watching.as_mut()?.message().await;
            match message {
                Ok(Some(response)) if !response.canceled() && response.compact_revision() == 0 => {
                    self.ready = response.events().iter().filter_map(|event| changed(&self.prefix, event)).collect();
                    self.ready.reverse();
                }
                // Cancelled (compaction, lost leader), broken or closed: the reader starts anew.
                Ok(Some(_) | None) | Err(_) => {
                    self.watching = None;
                    return Some(WatchEvent::Resync);
                }
            }
        }
    }
}

fn changed(prefix: &str, event: &etcd_client::Event) -> Option<WatchEvent> {
    let pair = event.kv()?;
    Some(match event.event_type() {
        EventType::Put => WatchEvent::Put(entry(prefix, pair)),
        EventType::Delete => {
            let entry = entry(prefix, pair);
            WatchEvent::Delete { key: entry.key, revision: entry.mod_revision }
        }
    })
}

fn entry(prefix: &str, pair: &KeyValue) -> Entry {
    let key = String::from_utf8_lossy(pair.key());
    Entry {
        key: key.strip_prefix(prefix).unwrap_or(&key).to_owned(),
        value: pair.value().to_vec(),
        create_revision: Revision(pair.create_revision().unsigned_abs()),
        mod_revision: Revision(pair.mod_revision().unsigned_abs()),
    }
}

/// Runs a request that changes nothing a caller could lose track of, again and again until [`OPERATION_DEADLINE`]: every
/// error but a refusal is worth another try.
async fn read<T, Call, Make>(operation: &'static str, mut make: Make) -> Result<T, Error>
where
    Call: Future<Output = Result<T, etcd_client::Error>>,
    Make: FnMut() -> Call,
{
    let end = tokio::time::Instant::now() + OPERATION_DEADLINE;
    let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP).with_deadline(OPERATION_DEADLINE);
    let mut last: Option<super::Cause> = None;
    loop {
        match tokio::time::timeout_at(end, make()).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => match refusal(operation, error) {
                Ok(refused) => return Err(refused),
                Err(error) => last = Some(error.into()),
            },
            Err(elapsed) => {
                let source = Some(last.unwrap_or_else(|| elapsed.into()));
                return Err(Error::Unavailable { operation, source });
            }
        }
        let wait = backoff.next_wait();
        match wait {
            Some(wait) => tokio::time::sleep(wait).await,
            None => return Err(Error::Unavailable { operation, source: last }),
        }
    }
}

/// What trying again cannot mend; else the error itself.
fn refusal(operation: &'static str, error: etcd_client::Error) -> Result<Error, etcd_client::Error> {
    let etcd_client::Error::GRpcStatus(status) = &error else { return Err(error) };
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => Ok(Error::Denied { operation, source: Some(error.into()) }),
        Code::InvalidArgument if is_about_a_user(status) => Ok(Error::Denied { operation, source: Some(error.into()) }),
        Code::InvalidArgument | Code::FailedPrecondition => Ok(Error::Invalid { operation, what: error.to_string() }),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Err(error),
    }
}

/// etcd says "invalid argument" where no user was named, or its password is wrong.
fn is_about_a_user(status: &tonic::Status) -> bool {
    let message = status.message();
    message.contains("user name is empty") || message.contains("authentication failed")
}

fn classify(operation: &'static str, lease: Option<LeaseId>, error: etcd_client::Error) -> Error {
    let code = match &error {
        etcd_client::Error::GRpcStatus(status) => status.code(),
        _ => Code::Unknown,
    };
    match (code, lease) {
        (Code::NotFound, Some(lease)) => Error::LeaseNotFound(lease),
        (Code::PermissionDenied | Code::Unauthenticated, _) => Error::Denied { operation, source: Some(error.into()) },
        (Code::InvalidArgument, _) if matches!(&error, etcd_client::Error::GRpcStatus(status) if is_about_a_user(status)) => {
            Error::Denied { operation, source: Some(error.into()) }
        }
        (Code::InvalidArgument | Code::NotFound | Code::FailedPrecondition | Code::OutOfRange, _) => {
            Error::Invalid { operation, what: error.to_string() }
        }
        (Code::ResourceExhausted, _) => Error::Unavailable { operation, source: Some(error.into()) },
        (
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::AlreadyExists
            | Code::Aborted
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss,
            _,
        ) => Error::Unknown { operation, source: Some(error.into()) },
    }
}

/// The first key after all that start with `prefix`; etcd reads one zero byte as "no end".
fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

fn revision(header: Option<&ResponseHeader>) -> Revision {
    Revision(header.map_or(0, |header| header.revision().unsigned_abs()))
}

fn signed(revision: Revision) -> i64 {
    i64::try_from(revision.0).unwrap_or(i64::MAX)
}
