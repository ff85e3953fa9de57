//! A trainer without tensors: it speaks the pipe's frames to the real agent, forms gangs over the simulated network, and its weights are
//! the hash of every sample it has seen, in order, and of every sum that the trainers' own collective made. What it saves goes through the real checkpoint store; what it keeps when a gang breaks, and
//! which state a new gang goes on from, is decided by the real trainers' rules ([`thaw_core::survivors`]).
//!
//! ```text
//! Ready ─▶ Propose ─▶ connect ─▶ Built ─▶ Commit ─▶ agree ─▶ step … ─▶ saved, finished, or suspended ─▶ stands still until killed
//!             ▲_________________________________________|_______|  a peer is lost, or a newer gang is proposed: Interrupted
//! ```

mod gang;
mod keep;
mod launch;
mod mesh;
mod pipes;
mod save;

pub(crate) use launch::Toys;

use crate::dice::Dice;
use crate::one_stage::position;
use crate::world::{Gradient, Living, SHARDS, Workload, World, gradient_of, next_weights, samples_of};
use gang::Gang;
use keep::State;
use mesh::Mesh;
use pipes::{Heard, hear, superseded};
use std::io;
use std::time::Duration;
use thaw_core::sampler::tree::maximal_subtrees;
use thaw_mutants::planted;
use thaw_node::collective::Collective as _;
use thaw_node::pipe;
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::pb::trainer_report::Event;
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use turmoil::net::TcpListener;

/// For a peer's share of a step.
const PEER_LIMIT: Duration = Duration::from_secs(4);
/// For all peers to come.
const JOIN_LIMIT: Duration = Duration::from_secs(15);
/// Rank 0 in place of its samples: there is no step.
const STAND_STILL: &[u8] = b"stand still";
/// Until a checkpoint that was written is committed, mostly.
const COMMIT: Duration = Duration::from_millis(150);
/// A rank that stands still does so for less than its peers wait.
const LULL_MS: std::ops::Range<u64> = 300..3000;
/// Steps between two words of progress.
const LOGGING_STEPS: u64 = 2;

/// What befalls trainers. Chances are in a thousand.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hazards {
    /// Milliseconds a save takes at most.
    pub(crate) slowest_ms: u64,
    /// Of saves: the writer dies and its blob is torn.
    pub(crate) torn: u64,
    /// Of saves: somebody else writes the same manifest with other words.
    pub(crate) zombies: u64,
    /// Of steps of a trainer: it says what must not be believed.
    pub(crate) lies: u64,
    /// Of chunks of a copy: it arrives changed.
    pub(crate) garbled: u64,
    /// Of steps that are saved: a trainer stands still once it has given the others what they need for the sum.
    pub(crate) lulls: u64,
    /// Of checkpoints: rank 0 dies as soon as they are committed.
    pub(crate) last_words: u64,
    /// Of gangs that break: what one of the survivors keeps changes by itself.
    pub(crate) rot: u64,
}

/// A process that has yet to hear what it is for.
struct Newborn {
    world: World,
    host: String,
    life: String,
    dice: Dice,
    hazards: Hazards,
    _log: DuplexStream,
}

impl Newborn {
    /// Lives until killed, or its agent is gone; the exit code.
    async fn live(mut self, mut hears: DuplexStream, says: DuplexStream) -> i32 {
        let Ok(Some(first)) = pipe::read_frame_async::<pb::CoordinatorMessage>(&mut hears).await else { return 1 };
        self.world.told(&self.life, &first);
        let Some(Message::Start(start)) = first.message else { return 2 };
        let Some(workload) = self.world.workload(&start.run) else { return 4 };
        let _living: Living = self.world.born(&self.life, &start.incarnation, &start.run);
        self.world.say(format!("{} starts {} slot {}", self.life, start.run, start.slot));
        let (heard, ears) = watch::channel(Heard::default());
        let (reports, waiting) = mpsc::unbounded_channel();
        let reading = pipes::read(hears, heard, reports.downgrade(), (self.world.clone(), self.life.clone()));
        let working = async {
            sleep(self.dice.millis(20..600)).await;
            let Ok(listener) = TcpListener::bind(("0.0.0.0", 0)).await else { return 3 };
            let port = listener.local_addr().map_or(0, |address| address.port());
            let ready = pb::TrainerReady { address: format!("{}:{port}", self.host), keeps_state: workload.keeps };
            let (world, life, dice, hazards) = (self.world.clone(), self.life.clone(), self.dice.clone(), self.hazards);
            let toy =
                Toy { world, life, dice, hazards, start, workload, ears, reports, listener, generation: 0, held: None };
            toy.report(Event::Ready(ready));
            toy.work().await
        };
        tokio::select! {
            biased;
            () = reading => 1,
            // What it has said last arrives.
            (code, ()) = async { tokio::join!(working, pipes::write(says, waiting)) } => code,
        }
    }
}

/// A process that has loaded.
struct Toy {
    world: World,
    life: String,
    dice: Dice,
    hazards: Hazards,
    start: pb::StartTrainer,
    workload: Workload,
    ears: watch::Receiver<Heard>,
    reports: mpsc::UnboundedSender<pb::TrainerReport>,
    listener: TcpListener,
    /// Of the newest gang that it has been in, or tried to be.
    generation: u64,
    /// What it has trained, through its gangs. Changed only where nothing is awaited meanwhile: a gang ends at any await.
    held: Option<State>,
}

/// Why a gang is over for this trainer.
enum Over {
    /// It keeps what it holds, where it is one that does, and waits for the next.
    Broken(&'static str),
    /// It says so, and ends.
    Fails(pb::FailureClass, pb::RunReason, &'static str),
    /// The process ends without a word.
    Dies(i32),
}

impl Over {
    fn lost(what: &'static str) -> Self {
        Self::Fails(pb::FailureClass::Retry, pb::RunReason::TrainerLost, what)
    }

    fn unfit(what: &'static str) -> Self {
        Self::Fails(pb::FailureClass::Fatal, pb::RunReason::TrainerError, what)
    }
}

impl From<io::Error> for Over {
    fn from(_: io::Error) -> Self {
        Self::Broken("a peer is gone")
    }
}

impl Toy {
    async fn work(mut self) -> i32 {
        loop {
            let over = match self.form().await {
                Ok((propose, gang)) => self.gang(propose, gang).await,
                Err(over) => Err(over),
            };
            match over {
                // Leaving by itself would look like a loss; the coordinator says when.
                Ok(()) => {}
                Err(Over::Broken(what)) if self.workload.keeps => {
                    self.rot();
                    let step = self.held.as_ref().map_or(0, |state| state.step);
                    self.report(Event::Interrupted(pb::TrainerInterrupted { message: what.to_owned(), step }));
                }
                // It ends, but slowly.
                Err(Over::Broken(what)) => self.fail(pb::FailureClass::Retry, pb::RunReason::TrainerLost, what),
                Err(Over::Fails(class, reason, what)) => {
                    self.fail(class, reason, what);
                    return 1;
                }
                Err(Over::Dies(code)) => return code,
            }
        }
    }

    fn report(&self, event: Event) {
        let report = pb::TrainerReport {
            run: self.start.run.clone(),
            slot: self.start.slot,
            incarnation: self.start.incarnation.clone(),
            generation: self.generation,
            event: Some(event),
        };
        // Without its writer this process is ending.
        let _ = self.reports.send(report);
    }

    fn fail(&self, class: pb::FailureClass, reason: pb::RunReason, what: &str) {
        let failed = pb::TrainerFailed { class: class.into(), reason: reason.into(), message: what.to_owned() };
        self.report(Event::Failed(failed));
    }

    /// Builds the connections of the latest proposal, until one is committed.
    async fn form(&mut self) -> Result<(pb::Propose, Gang), Over> {
        let mut ears = self.ears.clone();
        loop {
            let last = self.generation;
            let newer = |heard: &Heard| heard.proposed.clone().filter(|propose| propose.generation > last);
            let propose = hear(&mut ears, newer).await.ok_or(Over::Dies(1))?;
            let generation = propose.generation;
            self.generation = generation;
            let joined = tokio::select! {
                biased;
                () = superseded(ears.clone(), generation) => continue,
                joined = timeout(JOIN_LIMIT, Mesh::join(&propose, &self.listener)) => joined,
            };
            let mesh = joined.map_err(|_| Over::Broken("a peer does not come"))??;
            let gang = Gang::start(mesh, SHARDS, self.world.clone())?;
            self.world.has_built(&self.start.run, generation, &self.start.incarnation);
            self.report(Event::Built(pb::GangBuilt {}));
            let begins = hear(&mut ears, |heard| match () {
                () if heard.is_superseded(generation) => Some(false),
                () if heard.committed == generation => Some(true),
                () => None,
            });
            if begins.await.ok_or(Over::Dies(1))? {
                return Ok((propose, gang));
            }
        }
    }

    /// One generation, to the run's end, a suspension or an interruption.
    async fn gang(&mut self, propose: pb::Propose, mut gang: Gang) -> Result<(), Over> {
        if !self.workload.keeps {
            self.held = None;
        }
        let ears = self.ears.clone();
        tokio::select! {
            biased;
            () = superseded(ears, propose.generation) => Err(Over::Broken("a newer gang is proposed")),
            ended = self.train(&propose, &mut gang) => ended,
        }
    }

    async fn train(&mut self, propose: &pb::Propose, gang: &mut Gang) -> Result<(), Over> {
        let Workload { last_step, step: step_time, save_every, dies_at, .. } = self.workload.clone();
        let mut state = self.agree(gang, propose.resume.as_ref()).await?;
        // Of the last step there is a checkpoint of the very gang that says it has finished.
        let mut saved = propose.resume.as_ref().and_then(|head| head.position).map(|position| position.step);
        saved = saved.filter(|saved| *saved < last_step);
        let leads = gang.rank() == 0;
        loop {
            let suspend = self.ears.borrow().suspend == self.generation;
            if leads && (suspend || state.step == last_step) {
                self.meet(gang, STAND_STILL.to_vec()).await?;
                if saved.is_none_or(|saved| saved < state.step) && (state.step > 0) {
                    self.save(gang.rank(), state.step, &state.weights).await?;
                }
                if state.step == last_step {
                    return self.finish(state.step).await;
                }
                self.report(Event::Suspended(pb::Suspended {}));
                return Ok(());
            }
            sleep(step_time).await;
            if leads && dies_at == Some(state.step + 1) {
                return Err(Over::Dies(137));
            }
            match self.step(gang, &state).await? {
                Some(next) => state = next,
                None => return Ok(()),
            }
            self.lie(gang.rank(), state.step, last_step);
            if leads && state.step.is_multiple_of(LOGGING_STEPS) {
                let (position, generation) = (Some(position(state.step)), self.generation);
                self.report(Event::Progress(pb::Progress { position, generation, ..Default::default() }));
            }
            if leads && state.step < last_step && state.step.is_multiple_of(save_every) {
                saved = Some(state.step);
                self.save(gang.rank(), state.step, &state.weights).await?;
                if self.dice.permille(self.hazards.last_words) {
                    sleep(COMMIT).await;
                    return Err(Over::Dies(137));
                }
            }
        }
    }

    /// One step of the gang: each rank trains on what all have read. `None` where rank 0 has the others stand still.
    async fn step(&mut self, gang: &mut Gang, state: &State) -> Result<Option<State>, Over> {
        let next = state.step + 1;
        let shards = thaw_core::sampler::ranks_shards(gang.rank(), gang.world(), SHARDS);
        let own = shards.clone().flat_map(|shard| samples_of(next, shard)).flat_map(u64::to_le_bytes);
        if planted("unapplied-step-kept") {
            self.held = Some(State { step: next, ..state.clone() });
        }
        let all = self.meet(gang, own.collect()).await?;
        if all.first().is_some_and(|first| first == STAND_STILL) {
            return Ok(None);
        }
        let words = all.iter().flat_map(|bytes| bytes.chunks_exact(8));
        let samples: Vec<u64> = words.filter_map(|word| Some(u64::from_le_bytes(word.try_into().ok()?))).collect();
        let parts: Vec<Gradient> =
            maximal_subtrees(shards, SHARDS).into_iter().map(|node| gradient_of(next, node)).collect();
        if next.is_multiple_of(self.workload.save_every) && self.dice.permille(self.hazards.lulls) {
            gang.lull(self.dice.millis(LULL_MS));
        }
        let adding = gang.operate(move |tree| {
            let mut sum = Gradient::default();
            let parts: Vec<&[f64]> = parts.iter().map(Gradient::as_slice).collect();
            tree.reduce_shards_f64(&parts, &mut sum).map(|()| sum)
        });
        let sum = timeout(PEER_LIMIT, adding).await.map_err(|_| Over::Broken("a peer is silent"))??;
        let weights = next_weights(state.weights, next, &samples, &sum);
        if planted("step-taken-twice") {
            self.held = Some(State { weights, ..state.clone() });
            sleep(self.workload.step).await;
        }
        let applied = State { step: next, moves: state.moves + 1, weights };
        self.held = Some(applied.clone());
        self.world.applies(&self.start.run, &self.start.incarnation, state.step, (next, weights));
        Ok(Some(applied))
    }

    /// Gives every rank the bytes of every rank, in rank order.
    async fn meet(&self, gang: &mut Gang, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, Over> {
        let gathering = gang.operate(move |tree| tree.all_gather(&bytes));
        Ok(timeout(PEER_LIMIT, gathering).await.map_err(|_| Over::Broken("a peer is silent"))??)
    }
}
