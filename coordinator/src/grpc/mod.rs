//! The gRPC edge: messages in, checked values to the driver, messages out. Nothing is decided here.
//!
//! Every error has `ErrorInfo`; all mappings are in [`errors`].

mod cluster;
mod errors;
mod runs;
pub(crate) mod tail;
mod workers;

use crate::driver::Driver;
use crate::intake::Intake;
use crate::journal::Journal;
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
use tonic::transport::server::Router;
use tonic_health::server::HealthReporter;

/// Most bytes of one message, both ways.
const MAX_MESSAGE: usize = 4 << 20;
const MAX_PAGE: usize = 1000;
/// Until a call must have its first answer. Planning reads the whole data set, so it is long.
const CALL_DEADLINE: Duration = Duration::from_secs(300);

/// What the services need while this coordinator leads.
#[derive(Debug, Clone)]
pub(crate) struct Leading {
    pub(crate) driver: Driver,
    pub(crate) intake: Intake,
    pub(crate) views: Views,
    pub(crate) journal: Journal,
}

/// All services of one server. A cheap clone.
#[derive(Debug, Clone)]
pub(crate) struct Services {
    /// `None` until this coordinator leads.
    pub(crate) leading: watch::Receiver<Option<Leading>>,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) tasks: Tasks,
    /// Ends every stream.
    pub(crate) shutdown: CancellationToken,
}

impl Services {
    fn leading(&self) -> Result<Leading, Status> {
        self.leading.borrow().clone().ok_or_else(errors::not_leading)
    }
}

/// The services with reflection and health, ready to serve.
pub(crate) async fn router(services: Services) -> (Router, HealthReporter) {
    let runs = pb::run_service_server::RunServiceServer::new(services.clone());
    let cluster = pb::cluster_service_server::ClusterServiceServer::new(services.clone());
    let workers = pb::worker_service_server::WorkerServiceServer::new(services);
    let (health, health_service) = tonic_health::server::health_reporter();
    set_serving(&health, false).await;
    let reflect = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(thaw_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // So that clients can print the details of an error.
            .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
    };
    let built = "the descriptors were made by the same build";
    let router = tonic::transport::Server::builder()
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
    (router, health)
}

/// Says of every service whether it serves.
pub(crate) async fn set_serving(health: &HealthReporter, serving: bool) {
    use tonic_health::ServingStatus::{NotServing, Serving};
    let status = if serving { Serving } else { NotServing };
    for service in ["", "thaw.v1.RunService", "thaw.v1.ClusterService", "thaw.v1.WorkerService"] {
        health.set_service_status(service, status).await;
    }
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
