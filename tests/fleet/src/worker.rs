//! One simulated worker: an agent's side of the protocol with a trainer of no process, in a connection of its own.
//!
//! It looks for the leader, waits and comes back as the agent does, with the same limits.

use crate::lean::{Command, Order, Propose, Start};
use std::sync::Arc;
use std::time::Duration;
use thaw_proto::pb;
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::pb::worker_message::Message as Up;
use thaw_proto::status;
use thaw_runtime::backoff::Backoff;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Endpoint, Uri};
use tonic::{Request, Status, Streaming};

/// As the agent has them.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const PING: Duration = Duration::from_secs(5);
const RECONNECT_BASE: Duration = Duration::from_millis(100);
const RECONNECT_CAP: Duration = Duration::from_secs(2);
const REDIRECTIONS: u32 = 2;

/// The same for all of a fleet.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) coordinators: Vec<Uri>,
    /// Between heartbeats. `None`: as the coordinator says.
    pub(crate) beat: Option<Duration>,
    pub(crate) words: mpsc::UnboundedSender<Word>,
}

/// What a worker tells of itself.
#[derive(Debug)]
pub(crate) struct Word {
    pub(crate) worker: u32,
    pub(crate) at: Instant,
    pub(crate) what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum What {
    /// A leader has taken it in.
    Welcomed { epoch: u64 },
    /// A session that had been opened has ended.
    Broken { why: String },
    /// Its trainer is to start.
    Started { run: String },
    /// Its trainer may train.
    Committed { run: String, generation: u64 },
    /// Its trainer is to stop.
    Stopped { run: String },
}

impl What {
    pub(crate) fn is_of_a_trainer(&self) -> bool {
        match self {
            Self::Started { .. } | Self::Committed { .. } | Self::Stopped { .. } => true,
            Self::Welcomed { .. } | Self::Broken { .. } => false,
        }
    }
}

struct Trainer {
    run: String,
    slot: u32,
    incarnation: String,
    generation: u64,
    rank: u32,
    trains: bool,
    step: u64,
}

/// Why a session ended.
enum End {
    /// Somebody else leads, at this address.
    Elsewhere(Uri),
    Other(String),
}

impl From<Status> for End {
    fn from(status: Status) -> Self {
        let leader = || format!("http://{}", status::metadata(&status, "leader")?).parse().ok();
        match status::reason(&status).as_deref() {
            Some("NOT_LEADING") => leader().map_or_else(|| Self::Other(status.to_string()), Self::Elsewhere),
            Some(_) | None => Self::Other(status.to_string()),
        }
    }
}

pub(crate) struct Worker {
    index: u32,
    settings: Arc<Settings>,
    name: String,
    /// Where its trainer would listen.
    address: String,
    incarnation: String,
    trainer: Option<Trainer>,
    epoch: u64,
}

impl Worker {
    pub(crate) fn new(index: u32, settings: Arc<Settings>) -> Self {
        let (high, low) = (index / 250, index % 250);
        Self {
            index,
            settings,
            name: format!("worker-{index:05}"),
            address: format!("10.0.{high}.{low}:41000"),
            incarnation: uuid::Uuid::new_v4().to_string(),
            trainer: None,
            epoch: 0,
        }
    }

    /// Keeps a session until told to stop.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep_session() => {}
        }
    }

    async fn keep_session(&mut self) {
        let mut backoff = Backoff::new(RECONNECT_BASE, RECONNECT_CAP);
        let (mut at, mut redirections) = (0, 0);
        let mut coordinator = self.settings.coordinators[at].clone();
        loop {
            match self.serve(&coordinator, &mut backoff).await {
                End::Elsewhere(leader) if redirections < REDIRECTIONS => {
                    redirections += 1;
                    coordinator = leader;
                    continue;
                }
                End::Elsewhere(_) | End::Other(_) => redirections = 0,
            }
            tokio::time::sleep(backoff.next_wait().unwrap_or(RECONNECT_CAP)).await;
            at = (at + 1) % self.settings.coordinators.len();
            coordinator = self.settings.coordinators[at].clone();
        }
    }

    /// One session to its end.
    async fn serve(&mut self, coordinator: &Uri, backoff: &mut Backoff) -> End {
        match self.open(coordinator).await {
            Err(end) => end,
            Ok((up, down, beat)) => {
                backoff.reset();
                self.tell(What::Welcomed { epoch: self.epoch });
                let end = self.attend(up, down, beat).await.err();
                let why = match &end {
                    Some(End::Other(why)) => why.clone(),
                    Some(End::Elsewhere(leader)) => format!("{leader} leads"),
                    None => "the stream ended".to_owned(),
                };
                self.tell(What::Broken { why: why.clone() });
                end.unwrap_or(End::Other(why))
            }
        }
    }

    /// Connects, says hello and is welcomed.
    async fn open(
        &mut self,
        coordinator: &Uri,
    ) -> Result<(mpsc::Sender<pb::WorkerMessage>, Streaming<Command>, Duration), End> {
        let other = |error: &dyn std::error::Error| End::Other(thaw_runtime::chain(error));
        let endpoint = Endpoint::from(coordinator.clone())
            .connect_timeout(CONNECT_LIMIT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING)
            .keep_alive_timeout(PING)
            .keep_alive_while_idle(true);
        let late = |what: &str| End::Other(format!("{what} took too long"));
        let connected = timeout(CONNECT_LIMIT, endpoint.connect()).await.map_err(|_| late("a connection"))?;
        let mut client = tonic::client::Grpc::new(connected.map_err(|error| other(&error))?);
        client.ready().await.map_err(|error| other(&error))?;
        let (up, waiting) = mpsc::channel(64);
        let hello = pb::Hello {
            worker: self.name.clone(),
            incarnation: self.incarnation.clone(),
            slots: 1,
            host: "10.0.0.1".to_owned(),
            trainers: self.statuses(),
        };
        say(&up, Up::Hello(hello)).await?;
        let path = PathAndQuery::from_static("/thaw.v1.WorkerService/Session");
        let codec = tonic_prost::ProstCodec::<pb::WorkerMessage, Command>::default();
        let opening = client.streaming(Request::new(ReceiverStream::new(waiting)), path, codec);
        let mut down = timeout(CONNECT_LIMIT, opening).await.map_err(|_| late("a session"))??.into_inner();
        let first = timeout(CONNECT_LIMIT, down.message()).await.map_err(|_| late("a welcome"))??;
        let Some(Command { leader_epoch, order: Some(Order::Welcome(welcome)) }) = first else {
            return Err(End::Other("the first word was no welcome".to_owned()));
        };
        if leader_epoch < self.epoch {
            return Err(End::Other(format!("epoch {leader_epoch} is below {}", self.epoch)));
        }
        self.epoch = leader_epoch;
        let told = Duration::from_millis(u64::from(welcome.heartbeat_interval_ms.max(10)));
        Ok((up, down, self.settings.beat.unwrap_or(told)))
    }

    async fn attend(
        &mut self,
        up: mpsc::Sender<pb::WorkerMessage>,
        mut down: Streaming<Command>,
        beat: Duration,
    ) -> Result<(), End> {
        // What was said before the session broke may not have arrived.
        if let Some(trainer) = &self.trainer {
            let ready = pb::TrainerReady { address: self.address.clone(), keeps_state: true };
            say(&up, report(trainer, Event::Ready(ready))).await?;
            if trainer.generation > 0 {
                say(&up, report(trainer, Event::Built(pb::GangBuilt {}))).await?;
            }
        }
        let mut beats = interval_at(Instant::now() + beat, beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = beats.tick() => {
                    say(&up, Up::Heartbeat(pb::Heartbeat { trainers: self.statuses() })).await?;
                    self.progress(&up).await?;
                }
                command = down.message() => match command? {
                    Some(command) => self.obey(command, &up).await?,
                    None => return Ok(()),
                },
            }
        }
    }

    async fn obey(&mut self, command: Command, up: &mpsc::Sender<pb::WorkerMessage>) -> Result<(), End> {
        if command.leader_epoch < self.epoch {
            return Ok(());
        }
        self.epoch = command.leader_epoch;
        match command.order {
            Some(Order::Start(Start { run, slot, incarnation })) => {
                self.tell(What::Started { run: run.clone() });
                let trainer = Trainer { run, slot, incarnation, generation: 0, rank: 0, trains: false, step: 0 };
                let ready = pb::TrainerReady { address: self.address.clone(), keeps_state: true };
                say(up, report(&trainer, Event::Ready(ready))).await?;
                self.trainer = Some(trainer);
            }
            Some(Order::Propose(Propose { incarnation, generation, rank })) => {
                let Some(trainer) = self.trainer.as_mut().filter(|one| one.incarnation == incarnation) else {
                    return Ok(());
                };
                (trainer.generation, trainer.rank, trainer.trains) = (generation, rank, false);
                let built = report(trainer, Event::Built(pb::GangBuilt {}));
                say(up, built).await?;
            }
            Some(Order::Commit(commit)) => {
                let is_its = |one: &&mut Trainer| {
                    one.incarnation == commit.incarnation && one.generation == commit.generation && !one.trains
                };
                if let Some(trainer) = self.trainer.as_mut().filter(is_its) {
                    trainer.trains = true;
                    self.tell(What::Committed { run: commit.run, generation: commit.generation });
                }
            }
            Some(Order::Stop(stop)) => {
                if let Some(trainer) = self.trainer.take_if(|one| one.incarnation == stop.incarnation) {
                    let exited = pb::TrainerExited { code: None, signal: Some(9) };
                    say(up, report(&trainer, Event::Exited(exited))).await?;
                    self.tell(What::Stopped { run: stop.run });
                }
            }
            Some(Order::Welcome(_) | Order::Committed(_) | Order::Suspend(_)) | None => {}
        }
        Ok(())
    }

    /// Rank 0 says how far the gang is.
    async fn progress(&mut self, up: &mpsc::Sender<pb::WorkerMessage>) -> Result<(), End> {
        let Some(trainer) = self.trainer.as_mut().filter(|one| one.trains && one.rank == 0) else { return Ok(()) };
        trainer.step += 1;
        let position = Some(pb::Position { step: trainer.step, ..Default::default() });
        let progress = pb::Progress { position, generation: trainer.generation, loss: 0.5, ..Default::default() };
        let progress = report(trainer, Event::Progress(progress));
        say(up, progress).await
    }

    fn statuses(&self) -> Vec<pb::TrainerStatus> {
        let status = |trainer: &Trainer| pb::TrainerStatus {
            run: trainer.run.clone(),
            slot: trainer.slot,
            incarnation: trainer.incarnation.clone(),
            generation: trainer.generation,
            position: Some(pb::Position { step: trainer.step, ..Default::default() }),
            pid: 1,
        };
        self.trainer.iter().map(status).collect()
    }

    fn tell(&self, what: What) {
        // Nobody listens once the measurement is over.
        let _ = self.settings.words.send(Word { worker: self.index, at: Instant::now(), what });
    }
}

fn report(trainer: &Trainer, event: Event) -> Up {
    Up::Report(pb::TrainerReport {
        run: trainer.run.clone(),
        slot: trainer.slot,
        incarnation: trainer.incarnation.clone(),
        generation: trainer.generation,
        event: Some(event),
    })
}

async fn say(up: &mpsc::Sender<pb::WorkerMessage>, message: Up) -> Result<(), End> {
    let sent = up.send(pb::WorkerMessage { message: Some(message) }).await;
    sent.map_err(|_| End::Other("the session is closed".to_owned()))
}
