//! A trainer without tensors: it speaks the pipe's frames to the real agent, forms gangs over the simulated network, and
//! its weights are the hash of every sample it has seen, in order. What it saves goes through the real checkpoint store.

use crate::dice::Dice;
use crate::world::{Living, ToyManifest, World, next_state, samples_of};
use async_trait::async_trait;
use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use thaw_proto::ids::{Generation, Step};
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::peers::Peers;
use thaw_proto::run::CheckpointRef;
use thaw_worker::agent::launch::{Launch, Life, Running};
use thaw_worker::checkpoint::{self, CheckpointStore};
use thaw_worker::pipe;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{sleep, timeout};
use turmoil::net::{TcpListener, TcpStream};

/// For a peer's share of a step, and to join a gang.
const PEER_LIMIT: Duration = Duration::from_secs(4);
const PIPE_BYTES: usize = 1 << 16;

/// What storage does to those who write.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Storage {
    /// Milliseconds a save takes at most.
    pub(crate) slowest_ms: u64,
    /// In a thousand saves: the writer dies and its blob is torn.
    pub(crate) torn: u64,
    /// In a thousand saves: somebody else writes the same manifest with other words.
    pub(crate) zombies: u64,
    /// In a thousand steps of a trainer: it says what must not be believed.
    pub(crate) lies: u64,
}

/// Starts toy trainers on one agent's host.
pub(crate) struct Toys {
    pub(crate) world: World,
    pub(crate) host: String,
    /// Names this life of the agent.
    pub(crate) life: String,
    pub(crate) dice: Arc<Mutex<Dice>>,
    pub(crate) storage: Storage,
}

impl fmt::Debug for Toys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Toys")
    }
}

struct ToyLife {
    task: JoinHandle<i32>,
    ended: Option<ExitStatus>,
}

#[async_trait]
impl Launch for Toys {
    fn name(&self) -> String {
        "toy".to_owned()
    }

    async fn launch(&self) -> io::Result<Running> {
        let (stdin, hears) = duplex(PIPE_BYTES);
        let (says, stdout) = duplex(PIPE_BYTES);
        let (log, stderr) = duplex(64);
        let seed = self.dice.lock().unwrap_or_else(PoisonError::into_inner).draw();
        let toy = Toy {
            world: self.world.clone(),
            host: self.host.clone(),
            life: self.life.clone(),
            dice: Dice::new(seed, "toy"),
            storage: self.storage,
            says: Arc::new(tokio::sync::Mutex::new(says)),
            _log: log,
        };
        let task = tokio::spawn(toy.live(hears));
        let child = Box::new(ToyLife { task, ended: None });
        Ok(Running { child, stdin: Box::new(stdin), stdout: Box::new(stdout), stderr: Box::new(stderr), ring: None })
    }
}

#[async_trait]
impl Life for ToyLife {
    fn id(&self) -> u32 {
        1
    }

    async fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(ended) = self.ended {
            return Ok(ended);
        }
        let status = match (&mut self.task).await {
            Ok(code) => ExitStatus::from_raw(code << 8),
            Err(end) => ExitStatus::from_raw(if JoinError::is_panic(&end) { 6 } else { 9 }),
        };
        self.ended = Some(status);
        Ok(status)
    }

    fn start_kill(&mut self) -> io::Result<()> {
        self.task.abort();
        Ok(())
    }
}

impl Drop for ToyLife {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Toy {
    world: World,
    host: String,
    life: String,
    dice: Dice,
    storage: Storage,
    says: Arc<tokio::sync::Mutex<DuplexStream>>,
    _log: DuplexStream,
}

/// Why a gang is over for this trainer, which then waits for another or its end.
enum Over {
    /// Tell the coordinator that a peer is gone.
    Lost(&'static str),
    /// Nothing more to do: saved, or finished.
    Stands,
    /// The process ends.
    Dies(i32),
}

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self::Lost("a peer is gone")
    }
}

struct Gang {
    propose: pb::Propose,
    /// Of rank 0: one a peer, in rank order. Of the others: rank 0.
    peers: Vec<TcpStream>,
}

type Inbox = mpsc::UnboundedReceiver<Message>;

impl Toy {
    /// Lives until killed, or its agent is gone.
    async fn live(self, mut hears: DuplexStream) -> i32 {
        let (queue, inbox) = mpsc::unbounded_channel();
        let (world, life, says) = (self.world.clone(), self.life.clone(), Arc::clone(&self.says));
        // For as long as the trainer: whoever kills it must not leave a reader behind.
        let reading = async move {
            while let Ok(Some(told)) = pipe::read_frame_async::<pb::CoordinatorMessage>(&mut hears).await {
                if matches!(told.message, Some(Message::Ping(_))) {
                    let pong = pb::TrainerReport { event: Some(Event::Pong(pb::Pong {})), ..Default::default() };
                    let _gone = pipe::write_frame_async(&mut *says.lock().await, &pong).await;
                    continue;
                }
                world.told(&life, &told);
                if let Some(message) = told.message
                    && queue.send(message).is_err()
                {
                    break;
                }
            }
            1
        };
        tokio::select! {
            biased;
            code = reading => code,
            code = self.work(inbox) => code,
        }
    }

    async fn work(mut self, mut inbox: Inbox) -> i32 {
        let Some(Message::Start(start)) = inbox.recv().await else { return 2 };
        let _living: Living = self.world.born(&self.life, &start.incarnation, &start.run);
        self.world.say(format!("{} starts {} slot {}", self.life, start.run, start.slot));
        sleep(self.dice.millis(20..600)).await;
        let Ok(listener) = TcpListener::bind(("0.0.0.0", 0)).await else { return 3 };
        let port = listener.local_addr().map_or(0, |address| address.port());
        let address = format!("{}:{port}", self.host);
        self.report(&start, 0, Event::Ready(pb::TrainerReady { address, keeps_state: false })).await;
        loop {
            let Some(message) = inbox.recv().await else { return 1 };
            let Message::Propose(propose) = message else { continue };
            let generation = propose.generation;
            let over = match self.gang(&start, propose, &listener, &mut inbox).await {
                Ok(never) => match never {},
                Err(over) => over,
            };
            match over {
                Over::Stands => {}
                Over::Dies(code) => return code,
                Over::Lost(what) => {
                    let failed = pb::TrainerFailed {
                        class: pb::FailureClass::Retry.into(),
                        reason: pb::RunReason::TrainerLost.into(),
                        message: what.to_owned(),
                    };
                    self.report(&start, generation, Event::Failed(failed)).await;
                }
            }
        }
    }

    async fn report(&mut self, start: &pb::StartTrainer, generation: u64, event: Event) {
        let report = pb::TrainerReport {
            run: start.run.clone(),
            slot: start.slot,
            incarnation: start.incarnation.clone(),
            generation,
            event: Some(event),
        };
        // An error is the agent's end, which ends this task too.
        let _gone = pipe::write_frame_async(&mut *self.says.lock().await, &report).await;
    }

    /// One generation, to its end.
    async fn gang(
        &mut self,
        start: &pb::StartTrainer,
        propose: pb::Propose,
        listener: &TcpListener,
        inbox: &mut Inbox,
    ) -> Result<std::convert::Infallible, Over> {
        let generation = propose.generation;
        let joining = timeout(PEER_LIMIT, join(propose, listener)).await;
        let mut gang = joining.map_err(|_| Over::Lost("a peer does not come"))??;
        self.world.has_built(&start.run, generation, &start.incarnation);
        self.report(start, generation, Event::Built(pb::GangBuilt {})).await;
        loop {
            match inbox.recv().await {
                Some(Message::Commit(commit)) if commit.generation == generation => break,
                Some(_) => {}
                None => return Err(Over::Dies(1)),
            }
        }
        self.train(start, &mut gang, inbox).await
    }

    async fn train(
        &mut self,
        start: &pb::StartTrainer,
        gang: &mut Gang,
        inbox: &mut Inbox,
    ) -> Result<std::convert::Infallible, Over> {
        let workload = self.world.workload(&start.run).ok_or(Over::Dies(4))?;
        let (rank, resume) = (gang.propose.rank, gang.propose.resume.clone());
        let (mut step, mut state) = match &resume {
            Some(resume) => self.load(start, resume).await?,
            None => (0, [0; 32]),
        };
        let mut saved = step;
        loop {
            let mut suspend = false;
            while let Ok(message) = inbox.try_recv() {
                suspend |=
                    matches!(&message, Message::Suspend(suspend) if suspend.generation == gang.propose.generation);
            }
            if rank == 0 && (suspend || step == workload.last_step) {
                for peer in &mut gang.peers {
                    peer.write_u8(0).await?;
                }
                if saved < step || step == workload.last_step {
                    self.save(start, gang, step, &state).await?;
                }
                return Err(if step == workload.last_step {
                    self.finish(start, gang, step, inbox).await?
                } else {
                    self.report(start, gang.propose.generation, Event::Suspended(pb::Suspended {})).await;
                    Over::Stands
                });
            }
            sleep(workload.step).await;
            let next = step + 1;
            if rank == 0 && workload.dies_at == Some(next) {
                return Err(Over::Dies(137));
            }
            (step, state) = (next, self.step(gang, next, state).await?);
            self.lie(start, gang, step, workload.last_step).await;
            if step < workload.last_step && step.is_multiple_of(workload.save_every) && rank == 0 {
                saved = step;
                self.save(start, gang, step, &state).await?;
            }
        }
    }

    /// Says, now and then, what no trainer may be believed: that the run has finished before its last step is committed, or,
    /// from another rank than 0, that a checkpoint asks to become the head.
    async fn lie(&mut self, start: &pb::StartTrainer, gang: &Gang, step: u64, last_step: u64) {
        let generation = gang.propose.generation;
        if !self.dice.permille(self.storage.lies) {
            return;
        }
        if gang.propose.rank == 0 {
            self.report(start, generation, finished(start, last_step)).await;
            return;
        }
        let checkpoint = pb::CheckpointRef {
            position: Some(position(step)),
            generation,
            manifest: thaw_core::manifest::file_name(Generation(generation), Step(step)),
            manifest_blake3: "00".repeat(32),
        };
        let written = pb::CheckpointWritten { checkpoint: Some(checkpoint) };
        self.report(start, generation, Event::Checkpoint(written)).await;
    }

    /// One step of the gang: rank 0 gathers everybody's samples and tells the state that comes of them.
    async fn step(&mut self, gang: &mut Gang, step: u64, state: [u8; 32]) -> Result<[u8; 32], Over> {
        let world = u32::try_from(gang.propose.peers.as_ref().map_or(0, Peers::len)).unwrap_or(1);
        let shards = thaw_core::sampler::ranks_shards(gang.propose.rank, world, crate::world::SHARDS);
        let mut samples: Vec<u64> = shards.flat_map(|shard| samples_of(step, shard)).collect();
        let exchange = async {
            if gang.propose.rank != 0 {
                let rank_0 = &mut gang.peers[0];
                let mut bytes = vec![u8::try_from(samples.len()).unwrap_or(u8::MAX)];
                bytes.extend(samples.iter().flat_map(|sample| sample.to_le_bytes()));
                rank_0.write_all(&bytes).await?;
                if rank_0.read_u8().await? == 0 {
                    return Err(Over::Stands);
                }
                let mut state = [0; 32];
                rank_0.read_exact(&mut state).await?;
                return Ok(state);
            }
            for peer in &mut gang.peers {
                for _ in 0..peer.read_u8().await? {
                    samples.push(peer.read_u64_le().await?);
                }
            }
            let state = next_state(state, step, &mut samples);
            for peer in &mut gang.peers {
                let mut bytes = vec![1];
                bytes.extend(state);
                peer.write_all(&bytes).await?;
            }
            Ok(state)
        };
        timeout(PEER_LIMIT, exchange).await.map_err(|_| Over::Lost("a peer is silent"))?
    }

    async fn load(&mut self, start: &pb::StartTrainer, resume: &pb::CheckpointRef) -> Result<(u64, [u8; 32]), Over> {
        sleep(self.dice.millis(1..self.storage.slowest_ms + 2)).await;
        let checkpoint = CheckpointRef::try_from(resume).map_err(|_| Over::Dies(5))?;
        let loaded = with_store(start, move |store| {
            let bytes = store.get_manifest(&checkpoint)?;
            let manifest: Option<ToyManifest> = serde_json::from_slice(&bytes).ok();
            Ok(match manifest {
                Some(manifest) => Some((manifest.step, store.get_blob(&manifest.blob)?)),
                None => None,
            })
        });
        match loaded {
            Ok(Some((step, blob))) => {
                let state = <[u8; 32]>::try_from(&blob[..]).map_err(|_| Over::Dies(6))?;
                Ok((step, state))
            }
            Ok(None) => Err(Over::Dies(6)),
            Err(error) => {
                self.world.violated("CKPT-3", format!("the head of {} cannot be loaded: {error}", start.run));
                Err(Over::Dies(6))
            }
        }
    }

    async fn save(&mut self, start: &pb::StartTrainer, gang: &Gang, step: u64, state: &[u8; 32]) -> Result<(), Over> {
        let (generation, rank) = (gang.propose.generation, gang.propose.rank);
        sleep(self.dice.millis(1..self.storage.slowest_ms + 2)).await;
        let bytes = state.to_vec();
        let torn = self.dice.permille(self.storage.torn);
        let folder = start.run_url.trim_start_matches("file://").to_owned();
        let blob = with_store(start, move |store| {
            let blob = store.put_blob(vec![bytes.into()])?;
            if torn {
                let path = std::path::Path::new(&folder).join(thaw_core::manifest::blob_name(&blob.blake3));
                let _torn = std::fs::write(path, b"torn");
            }
            Ok(blob)
        });
        let Ok(blob) = blob else { return Err(Over::Lost("storage refuses")) };
        if torn {
            self.world.say(format!("{} dies with a torn blob", self.life));
            return Err(Over::Dies(137));
        }
        sleep(self.dice.millis(1..self.storage.slowest_ms + 2)).await;
        let manifest = ToyManifest { run: start.run.clone(), generation, step, rank, blob };
        let json = serde_json::to_vec(&manifest).unwrap_or_default();
        let written = with_store(start, move |store| store.put_manifest(Generation(generation), Step(step), json));
        let Ok(written) = written else { return Err(Over::Lost("the manifest is another's")) };
        if self.dice.permille(self.storage.zombies) {
            let other = serde_json::to_vec(&ToyManifest { rank: rank + 100, ..manifest }).unwrap_or_default();
            let put = with_store(start, move |store| store.put_manifest(Generation(generation), Step(step), other));
            if !matches!(put, Err(checkpoint::Error::Fenced { .. })) {
                self.world.violated("CKPT-1", "a manifest is written twice with different words");
            }
        }
        let position = Some(position(step));
        let (manifest, manifest_blake3) = (written.path, written.blake3);
        let checkpoint = pb::CheckpointRef { position, generation, manifest, manifest_blake3 };
        self.world.reports(&start.run, rank, &checkpoint);
        let written = pb::CheckpointWritten { checkpoint: Some(checkpoint) };
        self.report(start, generation, Event::Checkpoint(written)).await;
        Ok(())
    }

    /// Waits until the last checkpoint is the head, then says that the run has finished.
    async fn finish(
        &mut self,
        start: &pb::StartTrainer,
        gang: &Gang,
        step: u64,
        inbox: &mut Inbox,
    ) -> Result<Over, Over> {
        let generation = gang.propose.generation;
        loop {
            match inbox.recv().await {
                Some(Message::Committed(committed))
                    if committed.checkpoint.as_ref().and_then(|it| it.position).map(|at| at.step) == Some(step) =>
                {
                    break;
                }
                Some(Message::Suspend(_)) => {
                    self.report(start, generation, Event::Suspended(pb::Suspended {})).await;
                    return Ok(Over::Stands);
                }
                Some(_) => {}
                None => return Err(Over::Dies(1)),
            }
        }
        self.report(start, generation, finished(start, step)).await;
        Ok(Over::Stands)
    }
}

/// Connects the ranks of a generation, each showing its key.
async fn join(propose: pb::Propose, listener: &TcpListener) -> Result<Gang, Over> {
    let listed = propose.peers.clone().unwrap_or_default();
    let world = listed.len();
    if propose.rank != 0 {
        let mut rank_0 = connect(listed.iter().next().unwrap_or_default()).await?;
        rank_0.write_all(&propose.key).await?;
        rank_0.write_u32(propose.rank).await?;
        rank_0.read_u8().await?;
        return Ok(Gang { propose, peers: vec![rank_0] });
    }
    let mut peers: Vec<Option<TcpStream>> = (1..world).map(|_| None).collect();
    while peers.iter().any(Option::is_none) {
        let (mut peer, _) = listener.accept().await?;
        let mut key = vec![0; propose.key.len()];
        // Whoever shows another key belongs to another generation.
        if peer.read_exact(&mut key).await.is_err() || key != propose.key {
            continue;
        }
        let Ok(rank) = peer.read_u32().await else { continue };
        if let Some(place) = peers.get_mut((rank as usize).wrapping_sub(1)) {
            *place = Some(peer);
        }
    }
    let mut peers: Vec<TcpStream> = peers.into_iter().flatten().collect();
    for peer in &mut peers {
        peer.write_u8(1).await?;
    }
    Ok(Gang { propose, peers })
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "0"));
    TcpStream::connect((host.to_owned(), port.parse().unwrap_or(0))).await
}

/// Works on the run's folder. On a thread of its own, since the store drives a runtime; nobody else moves meanwhile.
fn with_store<T: Send>(
    start: &pb::StartTrainer,
    work: impl FnOnce(&CheckpointStore) -> Result<T, checkpoint::Error> + Send,
) -> Result<T, checkpoint::Error> {
    let url = start.run_url.clone();
    #[cfg(feature = "mutants")]
    let planted = thaw_mutants::present();
    std::thread::scope(|scope| {
        let working = scope.spawn(move || {
            #[cfg(feature = "mutants")]
            thaw_mutants::plant(planted);
            let url = url.parse().map_err(|_| checkpoint::Error::Panicked)?;
            work(&CheckpointStore::open(&url)?)
        });
        working.join().unwrap_or(Err(checkpoint::Error::Panicked))
    })
}

fn finished(start: &pb::StartTrainer, step: u64) -> Event {
    let result = pb::RunResult {
        test: Some(evaluation(step)),
        best: Some(evaluation(step)),
        weights_blake3: "abc".to_owned(),
        model: format!("{}model/", start.run_url),
        steps: step,
        seconds: 2.0,
    };
    Event::Finished(pb::RunFinished { result: Some(result), reason: pb::RunReason::LastStageEnded.into() })
}

fn position(step: u64) -> pb::Position {
    pb::Position { stage: 0, stage_step: u32::try_from(step).unwrap_or(u32::MAX), step }
}

fn evaluation(step: u64) -> pb::Evaluation {
    pb::Evaluation {
        position: Some(position(step)),
        loss: 0.25,
        accuracy: 0.75,
        macro_f1: 0.5,
        samples: 4,
        confusion: vec![2, 1, 0, 1],
    }
}
