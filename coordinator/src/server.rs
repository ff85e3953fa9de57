//! The server: build, bind, run.
//!
//! [`Server::bind`] opens the store and the socket, so that what is wrong with either is an error before anything runs.
//! [`Bound::run`] serves: it follows the store and answers reads, campaigns, leads its term, and follows again.
//!
//! SERVER-1: without TLS it binds loopback addresses only. With TLS every client shows a certificate.
//! SERVER-2: losing leadership ends the term, not the process; nothing of a term outlives it.
//! SERVER-3: a stop gives leadership back as soon as the driver has saved what it was at; streams and calls end after.

use crate::driver::Tenants;
use crate::grpc::{self, Leading, Services};
use crate::intake::{FilesPlanner, Intake, SpecPlanner};
use crate::journal::{Journal, Writer};
use crate::leader::{self, Fenced, Identity, Leadership, Timing};
use crate::store::{self, EtcdAccess, Store, StoreUrl};
use crate::views::Views;
use crate::{driver, journal, origin};
use futures::future::BoxFuture;
use futures::{FutureExt, Stream};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use thaw_proto::ids::Incarnation;
use thaw_runtime::tasks::{OnError, Tasks};
use thaw_runtime::tls::Tls;
use thaw_runtime::{BoxError, surroundings};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

/// How long a stop may take before what still runs is aborted.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How long the end of a term waits for a slow disk before it lets another lead.
const FLUSH_DEADLINE: Duration = Duration::from_millis(50);

/// What one coordinator process is told.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Loopback only, unless there is `tls`. Port 0: one that is free.
    pub listen: SocketAddr,
    pub tls: Option<Tls>,
    pub store: StoreUrl,
    pub etcd: EtcdAccess,
    /// Holds the folders of runs that name no other place. Made where it is missing.
    pub data_dir: PathBuf,
    /// Name of this coordinator, as users see it.
    pub name: String,
    /// `host:port` under which users and workers reach this coordinator. `None`: where it listens.
    pub advertise: Option<String>,
    pub tenants: Tenants,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("listen on {address}: without TLS only loopback addresses are served; use 127.0.0.1:{}, or give --tls-ca, --tls-cert and --tls-key", address.port())]
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
    #[error(transparent)]
    Origin(origin::Error),
    #[error("serve")]
    Serve(#[source] tonic::transport::Error),
    #[error("lead")]
    Leader(#[source] leader::Error),
    #[error("start the driver")]
    Driver(#[source] driver::Error),
    #[error(transparent)]
    Tasks(#[from] thaw_runtime::tasks::Error),
}

/// The coordinator's server.
#[derive(Debug)]
pub struct Server;

/// A server whose socket and store are open.
#[derive(Debug)]
pub struct Bound {
    listener: TcpListener,
    open: Open,
}

/// A server whose store is open, to be reached by whatever connections it is given.
#[derive(Debug)]
pub struct Open {
    config: ServeConfig,
    address: SocketAddr,
    store: Arc<dyn Store>,
    /// Added to the store's revisions.
    base: u64,
    planner: Arc<dyn SpecPlanner>,
    timing: Timing,
    /// Whether other coordinators are reached over the system's network.
    networked: bool,
}

impl Server {
    /// Binds the socket and opens the store.
    // Boxed, as `Bound::run`, so that a coordinator is compiled once, with its library, and not with every program that runs one.
    pub fn bind(config: ServeConfig) -> BoxFuture<'static, Result<Bound, Error>> {
        Self::open(config).boxed()
    }

    async fn open(config: ServeConfig) -> Result<Bound, Error> {
        let address = config.listen;
        // SERVER-1.
        if config.tls.is_none() && !address.ip().is_loopback() {
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
        let (store, base) = origin::open(&config.store, &config.etcd).await.map_err(|error| match error {
            origin::Error::Store(error) => Error::Store(error),
            error => Error::Origin(error),
        })?;
        let config = ServeConfig { data_dir, ..config };
        let timing = match config.store {
            StoreUrl::Embedded(_) => Timing::alone(),
            StoreUrl::Etcd { .. } => Timing::default(),
        };
        Ok(Bound {
            listener,
            open: Open { config, address, store, base, planner: Arc::new(FilesPlanner), timing, networked: true },
        })
    }

    /// Over a store that is open, with times for several coordinators. `config.store` and `config.etcd` are not read; the data
    /// folder has to be there.
    #[must_use]
    pub fn over(config: ServeConfig, store: Arc<dyn Store>) -> Open {
        let (address, planner, timing) = (config.listen, Arc::new(FilesPlanner), Timing::default());
        Open { config, address, store, base: 0, planner, timing, networked: false }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // A coordinator that starts again at once gets its port back.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    // All workers come at once after a leader's end; the system may allow fewer.
    socket.listen(4096)
}

impl Bound {
    /// Where it listens, with the port the system chose.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.open.address
    }

    /// Plans with something else than files, for tests.
    #[must_use]
    pub fn with_planner(mut self, planner: Arc<dyn SpecPlanner>) -> Self {
        self.open.planner = planner;
        self
    }

    /// Serves until `shutdown`, then stops in order.
    pub fn run(self, shutdown: CancellationToken) -> BoxFuture<'static, Result<(), Error>> {
        self.open.serve(TcpListenerStream::new(self.listener), shutdown).boxed()
    }
}

impl Open {
    /// Plans with something else than files.
    #[must_use]
    pub fn with_planner(mut self, planner: Arc<dyn SpecPlanner>) -> Self {
        self.planner = planner;
        self
    }

    /// Serves these connections until `shutdown`, then stops in order.
    pub async fn serve<Connection>(
        self,
        connections: impl Stream<Item = io::Result<Connection>> + Send + 'static,
        shutdown: CancellationToken,
    ) -> Result<(), Error>
    where
        Connection: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let stop = shutdown.child_token();
        let tasks = Tasks::new(stop.clone());
        let (state, services) = State::new(&self.store, &tasks, &stop, self.networked);
        let tls = self.config.tls.as_ref().map(Tls::server);
        let (router, health) = grpc::router(services, tls).await.map_err(Error::Serve)?;
        let until = stop.clone();
        tasks.spawn("grpc", OnError::StopProcess, move |_| async move {
            router.serve_with_incoming_shutdown(connections, until.cancelled_owned()).await.map_err(Error::Serve)
        });
        let mirrored = state.clone();
        let store = Arc::clone(&self.store);
        tasks.spawn("mirror", OnError::StopProcess, move |token| async move {
            mirrored.mirror(store, token).await;
            Ok::<_, BoxError>(())
        });
        let shown = state.clone();
        tasks.spawn("health", OnError::LogAndCount, move |token| async move {
            shown.report_health(&health, token).await;
            Ok::<_, BoxError>(())
        });
        let address = self.config.advertise.clone().unwrap_or_else(|| self.address.to_string());
        let name = self.config.name.clone();
        let identity = Identity { name, address, incarnation: Incarnation(surroundings::uuid().to_string()) };
        let head = Head {
            data_dir: self.config.data_dir,
            tenants: self.config.tenants,
            identity,
            store: self.store,
            base: self.base,
            planner: self.planner,
            timing: self.timing,
            state,
            stop: stop.clone(),
        };
        let led = head.lead_and_follow().await;
        stop.cancel();
        let joined = tasks.join(STOP_DEADLINE).await;
        led?;
        Ok(joined?)
    }
}

/// What the parts of one coordinator tell each other. A cheap clone.
#[derive(Debug, Clone)]
struct State {
    views: Views,
    leading: watch::Sender<Option<Leading>>,
    other_leader: watch::Sender<Option<Identity>>,
    /// Whether the views have been read from the store once.
    synced: watch::Sender<bool>,
}

impl State {
    fn new(store: &Arc<dyn Store>, tasks: &Tasks, stop: &CancellationToken, tries_others: bool) -> (Self, Services) {
        let (leading, leading_seen) = watch::channel(None);
        let (other_leader, other_leader_seen) = watch::channel(None);
        let (synced, synced_seen) = watch::channel(false);
        let views = Views::default();
        let services = Services {
            leading: leading_seen,
            other_leader: other_leader_seen,
            tries_others,
            synced: synced_seen,
            views: views.clone(),
            store: Arc::clone(store),
            tasks: tasks.clone(),
            shutdown: stop.clone(),
        };
        (Self { views, leading, other_leader, synced }, services)
    }

    /// Shows what the store has while this coordinator follows; a leader's driver shows it itself.
    async fn mirror(&self, store: Arc<dyn Store>, stop: CancellationToken) {
        let mut leading = self.leading.subscribe();
        loop {
            tokio::select! {
                biased;
                () = driver::mirror(Arc::clone(&store), self.views.clone(), &self.synced) => {}
                _ = leading.wait_for(Option::is_some) => {}
                () = stop.cancelled() => return,
            }
            tokio::select! {
                biased;
                _ = leading.wait_for(Option::is_none) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn report_health(&self, health: &tonic_health::server::HealthReporter, stop: CancellationToken) {
        let (mut leading, mut synced) = (self.leading.subscribe(), self.synced.subscribe());
        loop {
            let (reads, leads) = (*synced.borrow_and_update(), leading.borrow_and_update().is_some());
            grpc::set_serving(health, reads, leads).await;
            tokio::select! {
                biased;
                _ = leading.changed() => {}
                _ = synced.changed() => {}
                () = stop.cancelled() => break,
            }
        }
        grpc::set_serving(health, false, false).await;
    }
}

/// What is needed to lead.
struct Head {
    data_dir: PathBuf,
    tenants: Tenants,
    identity: Identity,
    store: Arc<dyn Store>,
    base: u64,
    planner: Arc<dyn SpecPlanner>,
    timing: Timing,
    state: State,
    stop: CancellationToken,
}

impl Head {
    /// One term after another, until told to stop or something is wrong that a new term would not mend (SERVER-2).
    fn lead_and_follow(&self) -> BoxFuture<'_, Result<(), Error>> {
        self.terms().boxed()
    }

    async fn terms(&self) -> Result<(), Error> {
        loop {
            let seen = self.state.other_leader.clone();
            let waiting = move |held: Option<Identity>| {
                if held.is_some() && *seen.borrow() != held {
                    let (name, address) = held.clone().map_or_else(Default::default, |held| (held.name, held.address));
                    tracing::info!(leader = name, address, "another coordinator leads; follows it");
                }
                seen.send_if_modified(|known| std::mem::replace(known, held.clone()) != held);
            };
            let campaign = leader::campaign(Arc::clone(&self.store), &self.identity, self.timing, waiting);
            let leadership = tokio::select! {
                biased;
                won = campaign => won.map_err(Error::Leader)?,
                () = self.stop.cancelled() => return Ok(()),
            };
            match self.lead(leadership).await? {
                driver::Ended::Stopped => return Ok(()),
                driver::Ended::LeadershipLost => {
                    tracing::warn!(name = self.identity.name, "leadership was lost; follows");
                }
                driver::Ended::Failed(error) => return Err(Error::Driver(error)),
            }
        }
    }

    /// One term, to its end.
    async fn lead(&self, leadership: Leadership) -> Result<driver::Ended, Error> {
        let fenced = leadership.fenced();
        let (journal, writer) = journal::journal();
        // The lease outlasts the driver: what it did last is written under it.
        let background = Tasks::new(CancellationToken::new());
        background.spawn("leader", OnError::LogAndCount, |_| async move {
            leadership.keep().await;
            Ok::<_, BoxError>(())
        });
        // Not the stop's: sessions that end while the driver still listens would be workers lost.
        let term = CancellationToken::new();
        let driven = self.drive(&fenced, &journal, writer, &background, &term).await;
        self.state.leading.send_replace(None);
        // SERVER-3.
        let flushed = tokio::time::timeout(FLUSH_DEADLINE, journal.flush()).await;
        if flushed.is_err() {
            tracing::warn!("the disk is slow; the last lines about runs are written after the end of the term");
        }
        fenced.resign();
        term.cancel();
        drop(journal);
        // A call that still holds something of the term must not keep this coordinator from the next.
        if let Err(error) = background.join(STOP_DEADLINE).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "the end of a term was not clean");
        }
        driven
    }

    async fn drive(
        &self,
        fenced: &Fenced,
        journal: &Journal,
        writer: Writer,
        background: &Tasks,
        term: &CancellationToken,
    ) -> Result<driver::Ended, Error> {
        background.spawn("journal", OnError::LogAndCount, |_| async move {
            writer.run().await;
            Ok::<_, BoxError>(())
        });
        match origin::settle(fenced, self.base, &self.data_dir).await {
            Ok(()) => {}
            // The store does not answer, or somebody else leads already: another term, or another coordinator.
            Err(origin::Error::Store(_) | origin::Error::Leader(_)) => return Ok(driver::Ended::LeadershipLost),
            Err(error) => return Err(Error::Origin(error)),
        }
        let views = self.state.views.clone();
        let loading = driver::load(fenced.clone(), views, journal.clone(), self.data_dir.clone(), self.tenants.clone());
        let (driver, main_loop) = tokio::select! {
            biased;
            loaded = loading => match loaded {
                Ok(loaded) => loaded,
                Err(driver::Error::Stopped) => return Ok(driver::Ended::LeadershipLost),
                Err(error) => return Err(Error::Driver(error)),
            },
            () = fenced.over() => return Ok(driver::Ended::LeadershipLost),
        };
        let intake = Intake::new(Arc::clone(&self.planner), driver.clone(), self.data_dir.clone());
        let leading = Leading { driver, intake, journal: journal.clone(), term: term.clone() };
        self.state.leading.send_replace(Some(leading));
        let Identity { name, address, .. } = &self.identity;
        tracing::info!(address, name, epoch = %fenced.epoch(), "serving");
        let ended = tokio::select! {
            biased;
            ended = main_loop.run(self.stop.clone()) => ended,
            // Also in the middle of a write that the store does not answer: whoever leads next reads what became of it.
            () = fenced.over() => driver::Ended::LeadershipLost,
        };
        Ok(ended)
    }
}
