//! An agent without trainers: it answers the coordinator as trainers would, over real gRPC.

use super::one_stage::{evaluation, position};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message as Down;
use thaw_proto::pb::trainer_report::Event as Report;
use thaw_proto::pb::worker_message::Message as Up;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

/// What the trainers of an agent do once their gang trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    /// Checkpoint, stage end, success.
    Finish,
    /// Checkpoint of step 1, then nothing until told.
    HoldAtStepOne,
    /// Die by SIGKILL after the checkpoint of step 1.
    DieAfterStepOne,
    /// End with an exit code after the checkpoint of step 1.
    CrashAfterStepOne,
    /// Report an error that trying again cannot mend.
    FailForGood,
}

/// A running agent. Dropping it breaks its session, as a death would.
pub(crate) struct Agent {
    acts: watch::Sender<Act>,
    started: Arc<AtomicU32>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct Trainer {
    start: pb::StartTrainer,
    generation: u64,
    rank: u32,
    resume: Option<pb::CheckpointRef>,
}

impl Agent {
    /// Connects and keeps its session until dropped.
    pub(crate) async fn start(address: SocketAddr, name: &str, slots: u32, act: Act) -> Self {
        Self::start_among(vec![address], name, slots, act).await
    }

    /// Finds the leader among several coordinators, and finds it again when its session ends.
    pub(crate) async fn start_among(addresses: Vec<SocketAddr>, name: &str, slots: u32, act: Act) -> Self {
        let (acts, doing) = watch::channel(act);
        let started = Arc::new(AtomicU32::new(0));
        let session = Session::open(addresses, name, slots, doing, Arc::clone(&started)).await;
        Self { acts, started, task: tokio::spawn(session.run()) }
    }

    /// [`Agent::start_among`] with trainers that survive the loss of a peer.
    #[allow(dead_code, reason = "not every test needs it")]
    pub(crate) async fn start_keeping(addresses: Vec<SocketAddr>, name: &str, slots: u32, act: Act) -> Self {
        let (acts, doing) = watch::channel(act);
        let started = Arc::new(AtomicU32::new(0));
        let mut session = Session::open(addresses, name, slots, doing, Arc::clone(&started)).await;
        session.keeps = true;
        Self { acts, started, task: tokio::spawn(session.run()) }
    }

    /// What its trainers do from the next gang on.
    pub(crate) fn act(&self, act: Act) {
        self.acts.send_replace(act);
    }

    /// Trainers it was told to start so far.
    pub(crate) fn started(&self) -> u32 {
        self.started.load(Ordering::Relaxed)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Session {
    addresses: Vec<SocketAddr>,
    name: String,
    incarnation: String,
    slots: u32,
    up: mpsc::Sender<pb::WorkerMessage>,
    down: tonic::Streaming<pb::CoordinatorMessage>,
    doing: watch::Receiver<Act>,
    trainers: BTreeMap<u32, Trainer>,
    /// Whether its trainers survive the loss of a peer.
    keeps: bool,
    /// What a new session hears again.
    ledger: Vec<pb::TrainerReport>,
    started: Arc<AtomicU32>,
}

type Streams = (mpsc::Sender<pb::WorkerMessage>, tonic::Streaming<pb::CoordinatorMessage>);

impl Session {
    async fn open(
        addresses: Vec<SocketAddr>,
        name: &str,
        slots: u32,
        doing: watch::Receiver<Act>,
        started: Arc<AtomicU32>,
    ) -> Self {
        let incarnation = uuid::Uuid::new_v4().to_string();
        let hello = pb::Hello {
            worker: name.to_owned(),
            incarnation: incarnation.clone(),
            slots,
            host: "127.0.0.1".to_owned(),
            trainers: Vec::new(),
        };
        let (up, down) = connect(&addresses, hello).await;
        Self {
            addresses,
            name: name.to_owned(),
            incarnation,
            slots,
            up,
            down,
            doing,
            trainers: BTreeMap::new(),
            keeps: false,
            ledger: Vec::new(),
            started,
        }
    }

    async fn run(mut self) {
        let mut beats = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                _ = beats.tick() => self.beat().await,
                message = self.down.message() => match message {
                    Ok(Some(message)) => self.handle(message).await,
                    Ok(None) | Err(_) if self.addresses.len() > 1 => self.come_back().await,
                    Ok(None) | Err(_) => return,
                },
            }
        }
    }

    async fn come_back(&mut self) {
        let hello = pb::Hello {
            worker: self.name.clone(),
            incarnation: self.incarnation.clone(),
            slots: self.slots,
            host: "127.0.0.1".to_owned(),
            trainers: self.statuses(),
        };
        (self.up, self.down) = connect(&self.addresses, hello).await;
        for report in self.ledger.clone() {
            self.say(Up::Report(report)).await;
        }
    }

    fn statuses(&self) -> Vec<pb::TrainerStatus> {
        let status = |(slot, trainer): (&u32, &Trainer)| pb::TrainerStatus {
            run: trainer.start.run.clone(),
            slot: *slot,
            incarnation: trainer.start.incarnation.clone(),
            generation: trainer.generation,
            position: None,
            pid: 1,
        };
        self.trainers.iter().map(status).collect()
    }

    async fn say(&self, message: Up) {
        // An error is the end of the session, which the stream down tells too.
        let _ = self.up.send(pb::WorkerMessage { message: Some(message) }).await;
    }

    async fn beat(&self) {
        self.say(Up::Heartbeat(pb::Heartbeat { trainers: self.statuses() })).await;
    }

    async fn report(&mut self, trainer: &Trainer, event: Report) {
        let once = matches!(event, Report::Progress(_) | Report::Evaluation(_) | Report::Log(_));
        let report = pb::TrainerReport {
            run: trainer.start.run.clone(),
            slot: trainer.start.slot,
            incarnation: trainer.start.incarnation.clone(),
            generation: trainer.generation,
            event: Some(event),
        };
        if !once {
            self.ledger.push(report.clone());
        }
        self.say(Up::Report(report)).await;
    }

    /// The trainer a command is for: of this slot and this life.
    fn find(&mut self, slot: u32, incarnation: &str) -> Option<&mut Trainer> {
        self.trainers.get_mut(&slot).filter(|trainer| trainer.start.incarnation == incarnation)
    }

    async fn handle(&mut self, message: pb::CoordinatorMessage) {
        assert!(message.leader_epoch > 0, "every command carries the leader epoch");
        match message.message.unwrap() {
            Down::Ping(_) => panic!("agents ping their trainers; nobody pings agents"),
            Down::Welcome(welcome) => assert!(welcome.heartbeat_interval_ms > 0),
            Down::Start(start) => {
                let slot = start.slot;
                self.started.fetch_add(1, Ordering::Relaxed);
                let trainer = Trainer { start, generation: 0, rank: 0, resume: None };
                self.report(
                    &trainer,
                    Report::Ready(pb::TrainerReady {
                        address: format!("127.0.0.1:{}", 9000 + slot),
                        keeps_state: self.keeps,
                    }),
                )
                .await;
                self.trainers.insert(slot, trainer);
            }
            Down::Propose(propose) => {
                let Some(trainer) = self.find(propose.slot, &propose.incarnation) else { return };
                trainer.generation = propose.generation;
                trainer.rank = propose.rank;
                trainer.resume = propose.resume;
                let trainer = trainer.clone();
                self.report(&trainer, Report::Built(pb::GangBuilt {})).await;
            }
            Down::Commit(commit) => {
                let Some(trainer) = self.find(commit.slot, &commit.incarnation).cloned() else { return };
                self.train(&trainer).await;
            }
            Down::Committed(committed) => {
                let Some(trainer) = self.find(committed.slot, &committed.incarnation).cloned() else { return };
                self.committed(&trainer, &committed.checkpoint.unwrap()).await;
            }
            Down::Stop(stop) => {
                if self.find(stop.slot, &stop.incarnation).is_some() {
                    let trainer = self.trainers.remove(&stop.slot).unwrap();
                    self.report(&trainer, Report::Exited(pb::TrainerExited { code: None, signal: Some(9) })).await;
                }
            }
            Down::Suspend(suspend) => {
                let Some(trainer) = self.find(suspend.slot, &suspend.incarnation).cloned() else { return };
                if trainer.rank == 0 {
                    self.report(&trainer, Report::Suspended(pb::Suspended {})).await;
                }
            }
        }
    }

    async fn train(&mut self, trainer: &Trainer) {
        let line = pb::LogLine {
            time: None,
            source: format!("rank {}", trainer.rank),
            text: format!("trains in generation {}", trainer.generation),
        };
        self.report(trainer, Report::Log(line)).await;
        if trainer.rank != 0 {
            return;
        }
        let position = Some(position(1));
        let progress = pb::Progress { position, generation: trainer.generation, loss: 0.5, ..Default::default() };
        self.report(trainer, Report::Progress(progress)).await;
        self.report(trainer, Report::Evaluation(evaluation(1))).await;
        let act = *self.doing.borrow();
        if act == Act::FailForGood {
            let failed = pb::TrainerFailed {
                class: pb::FailureClass::Invalid.into(),
                reason: pb::RunReason::TrainerError.into(),
                message: "the weights do not fit the graph".to_owned(),
            };
            return self.report(trainer, Report::Failed(failed)).await;
        }
        let resumed = trainer.resume.as_ref().map_or(0, |resume| resume.position.unwrap().step);
        let step = match act {
            Act::Finish => resumed.max(1) + 1,
            Act::HoldAtStepOne | Act::DieAfterStepOne | Act::CrashAfterStepOne | Act::FailForGood => resumed.max(1),
        };
        self.report(
            trainer,
            Report::Checkpoint(pb::CheckpointWritten { checkpoint: Some(checkpoint(trainer.generation, step)) }),
        )
        .await;
    }

    async fn committed(&mut self, trainer: &Trainer, checkpoint: &pb::CheckpointRef) {
        let act = *self.doing.borrow();
        match act {
            Act::Finish => {
                let step = checkpoint.position.unwrap().step;
                let ended = pb::StageResult {
                    stage: 0,
                    steps: u32::try_from(step).unwrap(),
                    epochs: 1.0,
                    seconds: 2.0,
                    end: pb::StageEnd::MaxEpochs.into(),
                    eval: Some(evaluation(step)),
                    deciding_eval: Some(evaluation(step)),
                    replica_digest: "00".to_owned(),
                    peak_memory_bytes: 1,
                    saves: 0,
                    test: None,
                };
                self.report(trainer, Report::StageEnded(ended)).await;
                let result = pb::RunResult {
                    test: Some(evaluation(step)),
                    best: Some(evaluation(step)),
                    weights_blake3: "abc".to_owned(),
                    model: format!("{}model/", trainer.start.run_url),
                    steps: step,
                    seconds: 2.0,
                };
                let finished = pb::RunFinished { result: Some(result), reason: pb::RunReason::LastStageEnded.into() };
                self.report(trainer, Report::Finished(finished)).await;
            }
            Act::DieAfterStepOne => {
                self.trainers.remove(&trainer.start.slot);
                self.report(trainer, Report::Exited(pb::TrainerExited { code: None, signal: Some(9) })).await;
            }
            Act::CrashAfterStepOne => {
                self.trainers.remove(&trainer.start.slot);
                self.report(trainer, Report::Exited(pb::TrainerExited { code: Some(101), signal: None })).await;
            }
            Act::HoldAtStepOne | Act::FailForGood => {}
        }
    }
}

/// A session with whoever leads, asked for in turn.
async fn connect(addresses: &[SocketAddr], hello: pb::Hello) -> Streams {
    for at in 0.. {
        let address = addresses[at % addresses.len()];
        let (up, queue) = mpsc::channel(64);
        up.send(pb::WorkerMessage { message: Some(Up::Hello(hello.clone())) }).await.unwrap();
        let connected = pb::worker_service_client::WorkerServiceClient::connect(format!("http://{address}")).await;
        let opened = match connected {
            Ok(mut client) => client.session(ReceiverStream::new(queue)).await.ok(),
            Err(_) => None,
        };
        if let Some(down) = opened {
            return (up, down.into_inner());
        }
        assert!(addresses.len() > 1, "no session with the only coordinator");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    unreachable!("it goes on for ever")
}

fn checkpoint(generation: u64, step: u64) -> pb::CheckpointRef {
    pb::CheckpointRef {
        position: Some(position(step)),
        generation,
        manifest: format!("manifests/{generation:08}-{step:010}.json"),
        manifest_blake3: "00".to_owned(),
    }
}
