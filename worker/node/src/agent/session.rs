//! One session after another with the coordinator.

use super::Config;
use super::trainer::TrainerId;
use super::trainers::Trainers;
use futures::future::BoxFuture;
use std::fmt;
use std::time::Duration;
use thaw_proto::ids::{Incarnation, LeaderEpoch};
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::pb::worker_message::Message as Up;
use thaw_proto::pb::worker_service_client::WorkerServiceClient;
use thaw_proto::pb::{CoordinatorMessage, Heartbeat, Hello, WorkerMessage};
use thaw_proto::status;
use thaw_runtime::backoff::Backoff;
use thaw_runtime::dial::Dial;
use thaw_runtime::telemetry;
use thaw_runtime::tls::{self, Tls};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Uri;

/// To reach the coordinator, and for its first word.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// For the coordinator to take one message.
const SEND_LIMIT: Duration = Duration::from_secs(10);
/// A connection that answers no ping for this long, twice, is dead.
const PING: Duration = Duration::from_secs(5);
/// Messages that wait in one session.
const MAX_WAITING: usize = 64;
/// A message with a spec and a plan may be large; nothing else is.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Bounds of what the coordinator may ask for.
const HEARTBEAT_BOUNDS: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(60));

/// A heartbeat that is late by this is worth a line in the log.
const WORTH_SAYING: Duration = Duration::from_secs(1);

/// How a session ended.
#[derive(Debug)]
pub(super) enum End {
    /// Its address and the TLS options contradict each other.
    Address(tls::Error),
    /// The coordinator cannot be reached.
    Unreachable(tonic::transport::Error),
    /// It said so.
    Status(tonic::Status),
    /// The stream ended without a word.
    Closed,
    /// It did not take a message, or did not answer, in time.
    Stalled(&'static str),
    /// It is an earlier leader (AGENT-1).
    StaleLeader { seen: LeaderEpoch, offered: LeaderEpoch },
}

impl End {
    /// Where the coordinator that refused says the leader is.
    pub(super) fn leader(&self, tls: Option<&Tls>) -> Option<Uri> {
        match self {
            Self::Status(status) if status::reason(status).as_deref() == Some("NOT_LEADING") => {
                format!("{}://{}", tls::scheme(tls), status::metadata(status, "leader")?).parse().ok()
            }
            Self::Address(_)
            | Self::Status(_)
            | Self::Unreachable(_)
            | Self::Closed
            | Self::Stalled(_)
            | Self::StaleLeader { .. } => None,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(error) => f.write_str(&thaw_runtime::chain(error)),
            Self::Unreachable(error) => write!(f, "not reachable: {}", thaw_runtime::chain(error)),
            Self::Status(status) => write!(f, "{:?}: {}", status.code(), status.message()),
            Self::Closed => f.write_str("it closed the session"),
            Self::Stalled(what) => write!(f, "it did not {what} in time"),
            Self::StaleLeader { seen, offered } => {
                write!(f, "its epoch {offered} is below {seen}, which was seen")
            }
        }
    }
}

/// What outlives a single session.
pub(super) struct Session<'a> {
    config: &'a Config,
    dial: &'a Dial,
    incarnation: Incarnation,
    trainers: &'a Trainers,
    /// Highest leader epoch seen.
    epoch: LeaderEpoch,
    was_welcomed: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(config: &'a Config, dial: &'a Dial, incarnation: Incarnation, trainers: &'a Trainers) -> Self {
        Self { config, dial, incarnation, trainers, epoch: LeaderEpoch(0), was_welcomed: false }
    }

    pub(super) fn was_welcomed(&self) -> bool {
        self.was_welcomed
    }

    /// Connects and serves one session to its end. A Welcome resets `backoff`.
    pub(super) async fn run(&mut self, coordinator: &Uri, backoff: &mut Backoff) -> End {
        match self.serve(coordinator, backoff).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    async fn serve(&mut self, coordinator: &Uri, backoff: &mut Backoff) -> Result<std::convert::Infallible, End> {
        let (up, mut down) = self.open(coordinator).await?;
        let first = timeout(CONNECT_LIMIT, down.message()).await.map_err(|_| End::Stalled("welcome this worker"))?;
        let first = first.map_err(End::Status)?.ok_or(End::Closed)?;
        let offered = LeaderEpoch(first.leader_epoch);
        if offered < self.epoch {
            return Err(End::StaleLeader { seen: self.epoch, offered });
        }
        let Some(Message::Welcome(welcome)) = first.message else {
            return Err(End::Stalled("welcome this worker"));
        };
        self.epoch = offered;
        self.was_welcomed = true;
        backoff.reset();
        let beat = Duration::from_millis(welcome.heartbeat_interval_ms.into());
        let beat = beat.clamp(HEARTBEAT_BOUNDS.0, HEARTBEAT_BOUNDS.1);
        tracing::info!(%coordinator, leader_epoch = offered.0, ?beat, "session open");
        self.trainers.outbox().restart(self.trainers.ledgers());
        let mut beats = interval_at(Instant::now() + beat, beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let outbox = self.trainers.outbox().clone();
        // What the last message asked for, where that takes time (a trainer's start). The next message waits for it, since
        // it may be about the same trainer; heartbeats and reports do not.
        let mut work: Option<BoxFuture<'a, ()>> = None;
        loop {
            tokio::select! {
                // Beats first: neither reports nor commands without end may keep the worker from being heard.
                biased;
                due = beats.tick() => {
                    let missed = due.elapsed();
                    if missed > WORTH_SAYING {
                        tracing::warn!(?missed, "this agent did not run; the coordinator may hold it for lost");
                    }
                    send(&up, Up::Heartbeat(Heartbeat { trainers: self.trainers.statuses() })).await?;
                }
                message = down.message(), if work.is_none() => {
                    let message = message.map_err(End::Status)?.ok_or(End::Closed)?;
                    work = self.obey(message);
                }
                () = async { if let Some(work) = &mut work { work.await } }, if work.is_some() => work = None,
                report = outbox.next() => send(&up, Up::Report(report)).await?,
            }
        }
    }

    /// Connects and says Hello.
    async fn open(
        &self,
        coordinator: &Uri,
    ) -> Result<(mpsc::Sender<WorkerMessage>, Streaming<CoordinatorMessage>), End> {
        let endpoint = tls::endpoint(coordinator.clone().into(), self.config.tls.as_ref())
            .map_err(End::Address)?
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .keep_alive_while_idle(true);
        let connecting = timeout(CONNECT_LIMIT, self.dial.connect(&endpoint));
        let channel = connecting.await.map_err(|_| End::Stalled("accept a connection"))?.map_err(End::Unreachable)?;
        let mut client = WorkerServiceClient::with_interceptor(channel, telemetry::trace_interceptor)
            .max_decoding_message_size(MAX_MESSAGE_BYTES);
        let (up, waiting) = mpsc::channel(MAX_WAITING);
        let hello = Hello {
            worker: self.config.name.to_string(),
            incarnation: self.incarnation.to_string(),
            slots: self.config.slots,
            host: self.config.host.clone(),
            trainers: self.trainers.statuses(),
        };
        send(&up, Up::Hello(hello)).await?;
        let opening = timeout(CONNECT_LIMIT, client.session(ReceiverStream::new(waiting)));
        let down = opening.await.map_err(|_| End::Stalled("open a session"))?.map_err(End::Status)?;
        Ok((up, down.into_inner()))
    }

    /// Does what a message asks for, or returns the work where that takes time.
    fn obey(&mut self, message: CoordinatorMessage) -> Option<BoxFuture<'a, ()>> {
        let offered = LeaderEpoch(message.leader_epoch);
        if offered < self.epoch {
            tracing::warn!(offered = offered.0, seen = self.epoch.0, "refused a message of an earlier leader");
            return None;
        }
        self.epoch = offered;
        let trainers = self.trainers;
        // Every message for a trainer says whose it is in the same three fields.
        macro_rules! id {
            ($message:expr) => {
                TrainerId { run: $message.run.clone(), slot: $message.slot, incarnation: $message.incarnation.clone() }
            };
        }
        let (id, generation) = match &message.message {
            Some(Message::Start(start)) => {
                let id = id!(start);
                return Some(Box::pin(async move { trainers.start(id, message).await }));
            }
            Some(Message::Stop(stop)) => {
                trainers.stop(&id!(stop), stop.generation);
                return None;
            }
            Some(Message::Propose(propose)) => (id!(propose), propose.generation),
            Some(Message::Commit(commit)) => (id!(commit), commit.generation),
            Some(Message::Committed(committed)) => (id!(committed), committed.generation),
            Some(Message::Suspend(suspend)) => (id!(suspend), suspend.generation),
            // A second Welcome changes nothing; a message of a later version cannot be for this one.
            Some(Message::Welcome(_) | Message::Ping(_)) | None => return None,
        };
        trainers.forward(&id, generation, message);
        None
    }
}

async fn send(up: &mpsc::Sender<WorkerMessage>, message: Up) -> Result<(), End> {
    match timeout(SEND_LIMIT, up.send(WorkerMessage { message: Some(message) })).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_closed)) => Err(End::Closed),
        Err(_elapsed) => Err(End::Stalled("take a message")),
    }
}
