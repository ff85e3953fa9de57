//! The server: build, bind, run.
//!
//! [`Server::bind`] opens the store and the socket, so that what is wrong with either is an error before anything runs.
//! [`Bound::run`] campaigns, loads the runs, serves, and stops in order: no new calls, streams ended, driver done,
//! leadership given back.
//!
//! SERVER-1: without TLS it binds loopback addresses only.

use crate::grpc::{self, Leading, Services};
use crate::intake::{FilesPlanner, Intake, SpecPlanner};
use crate::leader::{self, Identity, Timing};
use crate::store::{self, Store, StoreUrl};
use crate::views::Views;
use crate::{driver, journal};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thaw_proto::ids::Incarnation;
use thaw_runtime::BoxError;
use thaw_runtime::tasks::{OnError, Tasks};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

/// How long a stop may take before what still runs is aborted.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// What one coordinator process is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeConfig {
    /// Loopback only. Port 0: one that is free.
    pub listen: SocketAddr,
    pub store: StoreUrl,
    /// Holds the folders of runs that name no other place. Made where it is missing.
    pub data_dir: PathBuf,
    /// Name of this coordinator, as users see it.
    pub name: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("listen on {address}: without TLS only loopback addresses are served; use 127.0.0.1:{}", address.port())]
    NotLoopback { address: SocketAddr },
    #[error("listen on {address}: port {} is in use; stop what uses it, or choose another with --listen 127.0.0.1:PORT", address.port())]
    PortInUse { address: SocketAddr },
    #[error("listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("make the data folder {}; choose another with --data-dir", path.display())]
    DataDir {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("serve")]
    Serve(#[source] tonic::transport::Error),
    #[error("lead")]
    Leader(#[source] leader::Error),
    #[error("start the driver")]
    Driver(#[source] driver::Error),
    /// Another coordinator leads; this process starts anew to follow it.
    #[error("leadership was lost; start the coordinator again to follow the new leader")]
    LeadershipLost,
    #[error(transparent)]
    Tasks(#[from] thaw_runtime::tasks::Error),
}

/// The coordinator's server.
#[derive(Debug)]
pub struct Server;

/// A server whose socket and store are open.
#[derive(Debug)]
pub struct Bound {
    config: ServeConfig,
    listener: TcpListener,
    address: SocketAddr,
    store: Arc<dyn Store>,
    planner: Arc<dyn SpecPlanner>,
    timing: Timing,
}

impl Server {
    /// Binds the socket and opens the store.
    pub async fn bind(config: ServeConfig) -> Result<Bound, Error> {
        let address = config.listen;
        // SERVER-1.
        if !address.ip().is_loopback() {
            return Err(Error::NotLoopback { address });
        }
        let listener = listen(address).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => Error::PortInUse { address },
            _ => Error::Listen { address, source },
        })?;
        let address = listener.local_addr().map_err(|source| Error::Listen { address, source })?;
        let refuse = |source| Error::DataDir { path: config.data_dir.clone(), source };
        std::fs::create_dir_all(&config.data_dir).map_err(refuse)?;
        // Run folders are URLs for the workers, which need absolute paths.
        let data_dir = config.data_dir.canonicalize().map_err(refuse)?;
        let store = store::open(&config.store).await?;
        let config = ServeConfig { data_dir, ..config };
        Ok(Bound { config, listener, address, store, planner: Arc::new(FilesPlanner), timing: Timing::default() })
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A coordinator that starts again at once gets its port back.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

impl Bound {
    /// Where it listens, with the port the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Plans with something else than files, for tests.
    #[must_use]
    pub fn with_planner(mut self, planner: Arc<dyn SpecPlanner>) -> Self {
        self.planner = planner;
        self
    }

    /// Leads with other times, for tests.
    #[must_use]
    pub fn with_timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    /// Serves until `shutdown`, then stops in order.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let stop = shutdown.child_token();
        let tasks = Tasks::new(stop.clone());
        let (lead, leading) = watch::channel(None);
        let services =
            Services { leading, store: Arc::clone(&self.store), tasks: tasks.clone(), shutdown: stop.clone() };
        let (router, health) = grpc::router(services).await;
        let serving = tasks.clone();
        let (listener, until) = (self.listener, stop.clone());
        serving.spawn("grpc", OnError::StopProcess, move |_| async move {
            router
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), until.cancelled_owned())
                .await
                .map_err(Error::Serve)
        });
        let head = Head {
            config: self.config,
            address: self.address,
            store: self.store,
            planner: self.planner,
            timing: self.timing,
        };
        let led = head.lead(&tasks, &lead, &health, stop.clone()).await;
        grpc::set_serving(&health, false).await;
        stop.cancel();
        lead.send_replace(None);
        let joined = tasks.join(STOP_DEADLINE).await;
        led?;
        Ok(joined?)
    }
}

/// What is needed to lead.
struct Head {
    config: ServeConfig,
    address: SocketAddr,
    store: Arc<dyn Store>,
    planner: Arc<dyn SpecPlanner>,
    timing: Timing,
}

impl Head {
    /// Campaigns, drives and serves until told to stop or leadership is lost.
    async fn lead(
        self,
        tasks: &Tasks,
        lead: &watch::Sender<Option<Leading>>,
        health: &tonic_health::server::HealthReporter,
        stop: CancellationToken,
    ) -> Result<(), Error> {
        let identity = Identity {
            name: self.config.name.clone(),
            address: self.address.to_string(),
            incarnation: Incarnation(uuid::Uuid::new_v4().to_string()),
        };
        let waiting = |held: Option<Identity>| {
            let (name, address) = held.map_or_else(Default::default, |held| (held.name, held.address));
            tracing::info!(leader = name, address, "another coordinator leads; waiting");
        };
        let leadership = tokio::select! {
            won = leader::campaign(Arc::clone(&self.store), &identity, self.timing, waiting) => won.map_err(Error::Leader)?,
            () = stop.cancelled() => return Ok(()),
        };
        let fenced = leadership.fenced();
        let (journal, writer) = journal::journal();
        let views = Views::default();
        let (driver, main_loop) =
            driver::load(fenced.clone(), views.clone(), journal.clone(), self.config.data_dir.clone())
                .await
                .map_err(Error::Driver)?;
        // The journal and the lease outlast the driver: what it did last is written, under a lease that still holds.
        let background = Tasks::new(CancellationToken::new());
        background.spawn("leader", OnError::LogAndCount, |_| async move {
            leadership.keep().await;
            Ok::<_, BoxError>(())
        });
        background.spawn("journal", OnError::LogAndCount, |_| async move {
            writer.run().await;
            Ok::<_, BoxError>(())
        });
        let intake = Intake::new(self.planner, driver.clone(), self.config.data_dir);
        lead.send_replace(Some(Leading { driver, intake, views, journal }));
        grpc::set_serving(health, true).await;
        tracing::info!(address = %self.address, name = self.config.name, epoch = %fenced.epoch(), "serving");
        let driven = main_loop.run(stop.clone()).await;
        lead.send_replace(None);
        stop.cancel();
        // Streams and calls hold handles of the journal; they end with the token.
        let joined = tasks.join(STOP_DEADLINE).await;
        fenced.resign();
        background.join(STOP_DEADLINE).await?;
        joined?;
        match driven {
            driver::Ended::Stopped => Ok(()),
            driver::Ended::LeadershipLost => Err(Error::LeadershipLost),
            driver::Ended::Failed(error) => Err(Error::Driver(error)),
        }
    }
}
