//! The gRPC edge: messages in, checked values to the driver, messages out. Nothing is decided here.
//!
//! Every error has `ErrorInfo`; all mappings are in [`errors`].
//!
//! GRPC-1: what only the leader can do, another coordinator refuses with the leader's address; where nobody is known to
//!         lead, the call waits for that, at most [`LEADER_WAIT`]. So it does where the one who is known takes no connection:
//!         a leader that died is known until its lease ends, and a caller sent to it would only come back.
//! GRPC-2: an answer about one run is at least as new as every change acknowledged or shown before the call, by whomever:
//!         the store is asked how far the run is, and the view is waited for. By the leader too: a change whose outcome it
//!         has not heard may be shown by a follower already.

mod cluster;
mod errors;
mod runs;
pub(crate) mod tail;
mod workers;

use crate::driver::{self, Driver};
use crate::intake::Intake;
use crate::journal::Journal;
use crate::leader::Identity;
use crate::store::Store;
use crate::views::Views;
use futures::StreamExt;
use futures::stream::BoxStream;
use std::sync::Arc;
use std::time::Duration;
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use thaw_runtime::tasks::Tasks;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::ServerTlsConfig;
use tonic::transport::server::Router;
use tonic_health::server::HealthReporter;

/// Most bytes of one message, both ways.
const MAX_MESSAGE: usize = 4 << 20;
const MAX_PAGE: usize = 1000;
/// Until a call must have its first answer. Planning reads the whole data set, so it is long.
const CALL_DEADLINE: Duration = Duration::from_secs(300);

/// How long a call waits for somebody to lead. Below what agents wait for a session.
const LEADER_WAIT: Duration = Duration::from_secs(3);
/// How long a read waits until this coordinator has seen what the store has.
const CATCH_UP: Duration = Duration::from_secs(5);
/// How long another coordinator may take to take a connection.
const REACH: Duration = Duration::from_millis(500);

/// What the services need while this coordinator leads.
#[derive(Debug, Clone)]
pub(crate) struct Leading {
    pub(crate) driver: Driver,
    pub(crate) intake: Intake,
    pub(crate) journal: Journal,
    /// Ends with the term, and with it every stream that needs the leader.
    pub(crate) term: CancellationToken,
}

/// All services of one server. A cheap clone.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    /// `None` unless this coordinator leads.
    pub(crate) leading: watch::Receiver<Option<Leading>>,
    /// Another that leads, as far as is known.
    pub(crate) other_leader: watch::Receiver<Option<Identity>>,
    /// Whether others are reached over the system's network, so that one can be tried.
    pub(crate) tries_others: bool,
    /// Whether the views have been read from the store once.
    pub(crate) synced: watch::Receiver<bool>,
    pub(crate) views: Views,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) tasks: Tasks,
    /// Ends every stream.
    pub(crate) shutdown: CancellationToken,
}

impl Services {
    /// What the leader has, or who leads (GRPC-1).
    async fn leading(&self) -> Result<Leading, Status> {
        let (mut leading, mut other) = (self.leading.clone(), self.other_leader.clone());
        let wait = tokio::time::sleep(LEADER_WAIT);
        tokio::pin!(wait);
        loop {
            if let Some(leading) = leading.borrow_and_update().clone() {
                return Ok(leading);
            }
            let known = other.borrow_and_update().clone();
            if let Some(leader) = &known
                && self.reaches(leader).await
            {
                return Err(errors::not_leading(known.as_ref()));
            }
            tokio::select! {
                biased;
                Ok(()) = leading.changed() => {}
                Ok(()) = other.changed() => {}
                () = &mut wait => return Err(known.map_or_else(errors::no_leader, |known| errors::not_leading(Some(&known)))),
                () = self.shutdown.cancelled() => return Err(errors::not_leading(None)),
            }
        }
    }

    /// Whether another coordinator takes connections. Where it cannot be tried, it is believed to.
    async fn reaches(&self, other: &Identity) -> bool {
        let connected = tokio::time::timeout(REACH, tokio::net::TcpStream::connect(&other.address));
        !self.tries_others || connected.await.is_ok_and(|connected| connected.is_ok())
    }

    /// Returns once the views show something.
    async fn readable(&self) -> Result<(), Status> {
        let (mut leading, mut synced) = (self.leading.clone(), self.synced.clone());
        let ready = async {
            tokio::select! {
                biased;
                _ = leading.wait_for(Option::is_some) => {}
                _ = synced.wait_for(|synced| *synced) => {}
            }
        };
        tokio::time::timeout(CATCH_UP, ready).await.map_err(|_| errors::behind())
    }

    /// Returns once the run's view is as new as the store (GRPC-2), and at `at_least`.
    async fn catch_up(&self, run: &RunId, at_least: u64) -> Result<(), Status> {
        if thaw_mutants::planted("reads-do-not-wait") && self.views.get(run).is_some() {
            return Ok(());
        }
        let stored = driver::stored_revision(self.store.as_ref(), run).await.map_err(|error| errors::store(&error))?;
        let revision = stored.ok_or_else(|| errors::run_not_found(run))?.max(at_least);
        tokio::time::timeout(CATCH_UP, self.views.wait_for(run, revision)).await.map_err(|_| errors::behind())
    }
}

/// The services with reflection and health, ready to serve; with `tls` to clients that show a certificate.
pub(crate) async fn router(
    services: Services,
    tls: Option<ServerTlsConfig>,
) -> Result<(Router, HealthReporter), tonic::transport::Error> {
    let runs = pb::run_service_server::RunServiceServer::new(services.clone());
    let cluster = pb::cluster_service_server::ClusterServiceServer::new(services.clone());
    let workers = pb::worker_service_server::WorkerServiceServer::new(services);
    let (health, health_service) = tonic_health::server::health_reporter();
    set_serving(&health, false, false).await;
    let reflect = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(thaw_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that clients can print the details of an error.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let built = "the descriptors were made by the same build";
    let mut server = tonic::transport::Server::builder();
    if let Some(tls) = tls {
        server = server.tls_config(tls)?;
    }
    let router = server
        .timeout(CALL_DEADLINE)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .max_concurrent_streams(1024)
        .concurrency_limit_per_connection(256)
        .http2_max_header_list_size(16 << 10)
        .tcp_nodelay(true)
        .add_service(reflect().build_v1().expect(built))
        .add_service(reflect().build_v1alpha().expect(built))
        .add_service(health_service)
        .add_service(runs.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
        .add_service(cluster.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
        .add_service(workers.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE));
    Ok((router, health))
}

/// Says of every service whether it serves: reads need `reads` alone, the sessions of workers need the leader.
pub(crate) async fn set_serving(health: &HealthReporter, reads: bool, leads: bool) {
    use tonic_health::ServingStatus::{NotServing, Serving};
    let status = |serving| if serving { Serving } else { NotServing };
    for service in ["", "thaw.v1.RunService", "thaw.v1.ClusterService"] {
        health.set_service_status(service, status(reads || leads)).await;
    }
    health.set_service_status("thaw.v1.WorkerService", status(leads)).await;
}

/// A run's id, from `runs/<id>` or the id alone.
fn run_id(name: &str) -> Result<RunId, Status> {
    let id = name.strip_prefix("runs/").unwrap_or(name);
    let plain = id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if id.is_empty() || !plain {
        return Err(errors::bad_field("name", format!("{name:?} is no run: use runs/<id>, as in the list of runs")));
    }
    Ok(RunId(id.to_owned()))
}

/// The stream, ended when the server shuts down, so that no open stream holds it up.
fn stream_until<T: Send + 'static>(
    shutdown: CancellationToken,
    stream: BoxStream<'static, T>,
) -> BoxStream<'static, T> {
    stream.take_until(shutdown.cancelled_owned()).boxed()
}

/// The stream, ended with an error once the term is over: its end alone would say that nothing more comes.
fn stream_while_leading<T: Send + 'static>(
    term: &CancellationToken,
    stream: BoxStream<'static, Result<T, Status>>,
) -> BoxStream<'static, Result<T, Status>> {
    let ended = term.clone();
    let last = futures::stream::once(async move {
        match ended.is_cancelled() {
            true => Some(Err(errors::not_leading(None))),
            false => None,
        }
    });
    let last = last.filter_map(std::future::ready);
    stream.take_until(term.clone().cancelled_owned()).chain(last).boxed()
}
