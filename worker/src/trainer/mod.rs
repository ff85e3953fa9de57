//! The trainer: a process that holds one replica, trains through the plan, and never talks to the coordinator but through its agent.
//!
//! ```text
//! StartTrainer → load → TrainerReady → Propose → connect → GangBuilt → Commit → agree → train … → Finished → stand still until killed
//!                                         ▲________________________________|________|_________|
//!                          a newer Propose starts over, and so does, on CPUs, a gang that breaks: state and listener are kept
//! ```
//!
//! TRN-1: killing it at any moment is safe: what counts is in committed checkpoints.
//! TRN-2: it ends when its agent does.
//! TRN-3: every failure is reported once, with its class, before the process ends.
//! TRN-4: the loss of a peer, and a newer proposal, end a generation and not the process: it says that it was interrupted, and waits.

mod accumulate;
mod feed;
mod hold;
mod init;
mod job;
mod metrics;
mod optimizer;
mod outbox;
mod pace;
mod prefix;
mod reduce;
mod regularize;
mod replica;
mod save;
mod session;
mod shard_tree;
mod snapshot;
mod statistics;
mod trace;

pub use hold::{Hold, HoldPoint};
pub use prefix::CacheFolders;

use crate::device::DeviceOptions;
use crate::gpus::{Gpus, Limits};
use job::Job;
use outbox::{Identity, Outbox};
use reduce::Links;
use replica::{Replica, Settings};
use save::{Begun, Hosted};
use session::{Ending, Session, State};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;
use thaw_core::survivors::Head;
use thaw_node::checkpoint;
use thaw_node::collective::{self, Abort, Collective, HostId, Listener, Membership, Options, Pulse, Ring, RingAddress};
use thaw_node::host_snapshot::HostSnapshot;
use thaw_node::pipe::{TrainerPipe, die_with_parent};
use thaw_proto::ids::{Generation, Rank, Step};
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::pb::{self, FailureClass};
use thaw_proto::peers::Peers;
use thaw_proto::run::{CheckpointRef, RunReason};
use thaw_proto::spec::BatchNormPolicy;
use thaw_proto::status::ErrorClass;
use thaw_torch::SegmentedModel;
use thaw_torch::executor::Options as ModelOptions;
use thaw_torch::tch::Device;

const DEFAULT_COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(30);
/// A gang whose members do not come within this is formed anew by the coordinator.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longer than NCCL takes to let go of a communicator, where it does.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the agent sent {found} where StartTrainer was due")]
    Protocol { found: &'static str },
    #[error("cannot read the proposal of generation {generation}: {problem}")]
    Proposal { generation: u64, problem: String },
    #[error(transparent)]
    Job(#[from] job::Error),
    #[error("cannot train on --device cuda")]
    Device(#[from] thaw_torch::cuda::Error),
    #[error("cannot load the model")]
    Model(#[from] thaw_torch::model::Error),
    #[error("cannot set up libtorch")]
    Runtime(#[from] thaw_torch::runtime::Error),
    #[error("cannot join the gang")]
    Collective(#[from] collective::Error),
    #[error(transparent)]
    Replica(#[from] replica::Error),
    #[error(transparent)]
    Save(#[from] save::Error),
    #[error(transparent)]
    Session(#[from] session::Error),
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
    #[error("the agent is gone")]
    AgentGone,
}

/// What a trainer is told about its node.
#[derive(Debug)]
pub struct Node {
    /// Host name or address under which the trainers of other nodes reach this one.
    pub host: String,
    pub cache: CacheFolders,
    pub device: DeviceOptions,
    /// Where its agent reads its operations over all ranks.
    pub ring: Option<RingAddress>,
}

/// Runs the trainer of this process until its agent ends it.
#[must_use]
pub fn run(node: Node, hold: Option<Hold>) -> ExitCode {
    let _telemetry = thaw_runtime::telemetry::Options::from_env("info")
        .and_then(|options| thaw_runtime::telemetry::init("thaw-trainer", &options));
    // Without it the end of standard input still ends this process (TRN-2).
    let _ = die_with_parent();
    let pipe = TrainerPipe::start(std::io::stdin(), std::io::stdout(), || std::process::exit(0));
    let (pipe, messages) = match pipe {
        Ok(both) => both,
        Err(error) => {
            tracing::error!(error = thaw_runtime::chain(&error), "cannot talk to the agent");
            return ExitCode::FAILURE;
        }
    };
    let Some(start) = first_message(&messages) else { return ExitCode::FAILURE };
    let identity = Identity { run: start.run.clone(), slot: start.slot, incarnation: start.incarnation.clone() };
    let outbox = Arc::new(Outbox::new(identity, pipe.sender()));
    let span = tracing::info_span!("trainer", run = start.run, slot = start.slot);
    thaw_runtime::telemetry::set_parent(&span, &start.traceparent);
    let _entered = span.entered();
    let Err(error) = train(&start, node, messages, &outbox, hold) else { return ExitCode::SUCCESS };
    let (class, reason) = classify(&error);
    outbox.send(Outbox::failed(class, reason, thaw_runtime::chain(&error)));
    drop(outbox);
    pipe.finish();
    ExitCode::FAILURE
}

fn first_message(messages: &Receiver<pb::CoordinatorMessage>) -> Option<pb::StartTrainer> {
    let message = messages.recv().ok()?;
    match message.message {
        Some(Message::Start(start)) => Some(start),
        other => {
            let error = Error::Protocol { found: if other.is_some() { "another message" } else { "nothing" } };
            tracing::error!(error = thaw_runtime::chain(&error), "cannot start");
            None
        }
    }
}

/// The newest proposal, and what ends the forming of its gang, and the gang that trains.
#[derive(Default)]
struct Latest(Mutex<Proposed>);

#[derive(Default)]
struct Proposed {
    generation: u64,
    forming: Abort,
    training: Option<(u64, Weak<dyn Collective>)>,
}

impl Latest {
    fn proposed(&self) -> MutexGuard<'_, Proposed> {
        self.0.lock().expect("no code that holds the lock panics")
    }

    /// A newer proposal ends the forming of what was proposed before, and what trains.
    fn propose(&self, generation: u64) {
        let mut latest = self.proposed();
        if generation > latest.generation {
            latest.generation = generation;
            std::mem::take(&mut latest.forming).abort();
            let training = latest.training.take();
            drop(latest);
            if let Some(collective) = training.and_then(|(_, collective)| collective.upgrade()) {
                collective.abort();
            }
        }
    }

    /// What ends the forming of a generation; has ended it where a newer one is proposed.
    fn abort_of(&self, generation: u64) -> Abort {
        let latest = self.proposed();
        let abort = if latest.generation == generation { latest.forming.clone() } else { Abort::default() };
        if latest.generation > generation {
            abort.abort();
        }
        abort
    }

    /// From here on a newer proposal ends this generation's collective.
    fn train(&self, generation: u64, collective: &Arc<dyn Collective>) {
        let mut latest = self.proposed();
        if latest.generation > generation {
            drop(latest);
            collective.abort();
        } else {
            latest.training = Some((generation, Arc::downgrade(collective)));
        }
    }
}

/// What outlives a generation.
enum Held {
    /// Loaded, and in no gang so far.
    Model(Box<SegmentedModel>),
    /// A replica; and its state, once it is as a checkpoint or a peer has it.
    Replica(Box<Replica>, Option<Box<State>>),
    /// Between two of the others.
    Nothing,
}

/// What the training thread waits for; everything else is noted as it comes.
enum Order {
    Propose(pb::Propose),
    Commit(Generation),
}

fn train(
    start: &pb::StartTrainer,
    node: Node,
    messages: Receiver<pb::CoordinatorMessage>,
    outbox: &Arc<Outbox>,
    hold: Option<Hold>,
) -> Result<(), Error> {
    // Before anything else of libtorch, which looks for GPUs once.
    let device = node.device.of_slot(start.slot)?;
    if !thaw_torch::runtime::keep_memory() {
        tracing::warn!("malloc did not take its settings; scratch memory may be mapped anew at each step");
    }
    // Now, before the agent comes to hold another.
    let snapshot = start.host_snapshot.as_ref().and_then(|told| open_snapshot(&start.run, told));
    let ring = node.ring.and_then(open_ring);
    let pulse = Pulse::of(ring.clone());
    let job = Job::load(start, node.cache, pulse.clone())?;
    thaw_torch::runtime::set_num_threads(job.spec.workers.threads_per_trainer as usize)?;
    let mut model = load_model(&job, device)?;
    let beats = pulse.clone();
    model.set_beat(move || beats.beat());
    let timeout = match start.collective_timeout_ms {
        0 => DEFAULT_COLLECTIVE_TIMEOUT,
        milliseconds => Duration::from_millis(u64::from(milliseconds)),
    };
    let options = Options {
        shards: job.plan.logical_shards,
        connect_deadline: CONNECT_TIMEOUT,
        operation_deadline: timeout,
        host: HostId::of_this_machine(),
    };
    let (listener, address) = Listener::bind(&node.host)?;
    let listener = listener.recording(ring);
    // NCCL's end on a loss is not trusted.
    let keeps_state = device == Device::Cpu;
    outbox.send(pb::trainer_report::Event::Ready(pb::TrainerReady { address, keeps_state }));
    let (orders, ordered) = channel();
    let (noting, latest) = (Arc::clone(outbox), Arc::new(Latest::default()));
    let proposed = Arc::clone(&latest);
    // Never joined: it listens until the agent is gone, and with the agent this process ends (TRN-2).
    std::thread::Builder::new().name("note".to_owned()).spawn(move || note(&messages, &orders, &noting, &proposed))?;
    let mut trainer = Trainer {
        job: &job,
        outbox,
        hold,
        held: Held::Model(Box::new(model)),
        snapshot,
        hosted: Hosted::new(&job, device, outbox),
    };
    loop {
        let step = trainer.step();
        let waits = pulse.wait();
        let formed = form(&listener, (&ordered, &latest), outbox, (options, device), &start.run);
        drop(waits);
        let outcome = match formed {
            Ok((proposal, links)) => {
                latest.train(proposal.generation, &links.host);
                trainer.generation(links, &proposal)
            }
            Err(error) => Err(error),
        };
        match outcome {
            // Leaving by itself would look like a loss; the coordinator says when.
            Ok(()) => {}
            Err(error) if keeps_state && is_interruption(&error, outbox) => {
                let message = thaw_runtime::chain(&error);
                tracing::warn!(message, "the gang is broken; waiting for the next with what this trainer holds");
                outbox.send(Outbox::interrupted(trainer.step().max(step), message));
            }
            Err(error) => return Err(error),
        }
    }
}

/// Its agent's; without it all goes on, unrecorded.
fn open_ring(address: RingAddress) -> Option<Arc<Ring>> {
    let opened = Ring::open(address);
    opened
        .inspect_err(|error| tracing::warn!(%error, "what this trainer waits for will not be known"))
        .ok()
        .map(Arc::new)
}

/// Its agent's; without it a trainer begins with what its peers have, or the head.
fn open_snapshot(run: &str, told: &pb::HostSnapshot) -> Option<HostSnapshot> {
    match HostSnapshot::open(run, told) {
        Ok(snapshot) => Some(snapshot),
        Err(error) => {
            tracing::warn!(error = thaw_runtime::chain(&error), "the state that this host has kept cannot be used");
            None
        }
    }
}

/// Whether an error ends the generation alone (TRN-4). The state is as it was before what failed (TRAIN-5).
fn is_interruption(error: &Error, outbox: &Outbox) -> bool {
    let of_collective = |error: &collective::Error| matches!(error.class(), ErrorClass::Retry | ErrorClass::Fenced);
    match error {
        Error::Collective(error)
        | Error::Replica(replica::Error::Collective(error))
        | Error::Session(session::Error::Replica(replica::Error::Collective(error))) => of_collective(error),
        Error::Session(session::Error::Superseded | session::Error::Prefix(prefix::Error::Superseded)) => true,
        // Of a checkpoint that nobody waits for any more.
        Error::Save(error) | Error::Session(session::Error::Save(error)) => match error {
            save::Error::Superseded => true,
            save::Error::Checkpoint(checkpoint::Error::Late { .. }) => outbox.is_behind(),
            _ => false,
        },
        Error::Protocol { .. }
        | Error::Proposal { .. }
        | Error::Job(_)
        | Error::Device(_)
        | Error::Model(_)
        | Error::Runtime(_)
        | Error::Replica(_)
        | Error::Session(_)
        | Error::Thread(_)
        | Error::AgentGone => false,
    }
}

fn load_model(job: &Job, device: Device) -> Result<SegmentedModel, Error> {
    let precision = match job.spec.precision {
        thaw_proto::spec::Precision::Fp32 => thaw_torch::Precision::Fp32,
        thaw_proto::spec::Precision::Bf16 => thaw_torch::Precision::Bf16,
        thaw_proto::spec::Precision::Fp64 => thaw_torch::Precision::Fp64,
    };
    let memory_format = match job.spec.memory_format {
        thaw_proto::spec::MemoryFormat::Auto => thaw_torch::MemoryFormat::Automatic,
        thaw_proto::spec::MemoryFormat::Contiguous => thaw_torch::MemoryFormat::Contiguous,
        thaw_proto::spec::MemoryFormat::ChannelsLast => thaw_torch::MemoryFormat::ChannelsLast,
    };
    let options = ModelOptions { memory_format, ..ModelOptions::new(precision, device) };
    let mut initial = init::Initial::new(job);
    Ok(SegmentedModel::new(job.graph.clone(), &mut |name| initial.weight(name), options)?)
}

/// Passes on what forms a gang, and notes what concerns the one in training, until the agent is gone.
fn note(messages: &Receiver<pb::CoordinatorMessage>, orders: &Sender<Order>, outbox: &Outbox, latest: &Latest) {
    while let Ok(message) = messages.recv() {
        match message.message {
            Some(Message::Propose(propose)) => {
                outbox.note_proposal(Generation(propose.generation));
                latest.propose(propose.generation);
                let _ = orders.send(Order::Propose(propose));
            }
            Some(Message::Commit(commit)) => {
                let _ = orders.send(Order::Commit(Generation(commit.generation)));
            }
            Some(Message::Committed(committed)) => {
                if let Some(position) = committed.checkpoint.and_then(|checkpoint| checkpoint.position) {
                    outbox.note_commit(thaw_proto::ids::Step(position.step));
                }
            }
            Some(Message::Suspend(suspend)) => outbox.ask_suspension(Generation(suspend.generation)),
            Some(Message::Ping(pb::Ping {})) => outbox.send(pb::trainer_report::Event::Pong(pb::Pong {})),
            // The agent keeps these for itself.
            Some(Message::Welcome(_) | Message::Start(_) | Message::Stop(_)) | None => {}
        }
    }
}

/// Builds the communicator of the latest proposal, until one is committed.
fn form(
    listener: &Listener,
    (orders, latest): (&Receiver<Order>, &Latest),
    outbox: &Outbox,
    (options, device): (Options, Device),
    run: &str,
) -> Result<(pb::Propose, Links), Error> {
    let mut built: Option<(pb::Propose, Links)> = None;
    loop {
        match orders.recv().map_err(|_| Error::AgentGone)? {
            Order::Propose(proposal) => {
                outbox.enter(Generation(proposal.generation));
                let membership = Membership {
                    run: run.to_owned(),
                    generation: Generation(proposal.generation),
                    rank: Rank(proposal.rank),
                    addresses: proposal.peers.iter().flat_map(Peers::iter).map(str::to_owned).collect(),
                    key: proposal.key.clone(),
                };
                let abort = latest.abort_of(proposal.generation);
                let links = match connect(listener, &membership, options, device, &abort) {
                    // The newer proposal is the next order.
                    Err(_) if abort.is_asked() => continue,
                    links => links?,
                };
                outbox.send(pb::trainer_report::Event::Built(pb::GangBuilt {}));
                built = Some((proposal, links));
            }
            Order::Commit(generation) => {
                if let Some(ready) = built.take_if(|(proposal, _)| proposal.generation == generation.0) {
                    return Ok(ready);
                }
            }
        }
    }
}

/// Connects the gang, and its GPUs where it has some.
fn connect(
    listener: &Listener,
    membership: &Membership,
    options: Options,
    device: Device,
    abort: &Abort,
) -> Result<Links, Error> {
    let host: Arc<dyn Collective> = Arc::new(listener.connect(membership, options, abort)?);
    let limits = Limits { join: options.connect_deadline, operation: options.operation_deadline, abort: ABORT_TIMEOUT };
    let gpus = if host.world_size() > 1 { Gpus::join(&host, device, limits)? } else { None };
    Ok(Links { host, gpus })
}

/// What this process trains, through its generations.
struct Trainer<'a> {
    job: &'a Job,
    outbox: &'a Arc<Outbox>,
    hold: Option<Hold>,
    held: Held,
    /// That its host had kept of the run, until it holds a state itself.
    snapshot: Option<HostSnapshot>,
    /// What it copies to its host.
    hosted: Hosted,
}

impl Trainer<'_> {
    /// The last step it has applied.
    fn step(&self) -> Step {
        match &self.held {
            Held::Replica(_, Some(state)) => state.position.step,
            Held::Model(_) | Held::Replica(_, None) | Held::Nothing => Step(0),
        }
    }

    /// One generation, to the run's end or a suspension. After an interruption `held` is what the next one begins with.
    fn generation(&mut self, links: Links, proposal: &pb::Propose) -> Result<(), Error> {
        let span = tracing::info_span!("generation", generation = proposal.generation, rank = proposal.rank);
        let _entered = span.entered();
        let resume = proposal.resume.as_ref().map(CheckpointRef::try_from).transpose();
        let resume = resume
            .map_err(|problem| Error::Proposal { generation: proposal.generation, problem: problem.to_string() })?;
        let (mut replica, mut state) = self.take_place(links)?;
        let head = resume.as_ref().map(|head| Head { step: head.position.step, generation: head.generation });
        let mut ledger = save::Ledger::default();
        let begun = match save::agree(self.job, &mut replica, &mut state, &mut self.snapshot, head) {
            Ok(Begun::Kept) => Ok(true),
            Ok(Begun::Loaded(snapshot)) => {
                if proposal.rank == 0 {
                    let beyond = snapshot.step.0 - head.map_or(0, |head| head.step.0);
                    tracing::info!(%snapshot, "goes on from what a host has kept in memory, {beyond} step(s) beyond the head");
                }
                Ok(true)
            }
            Ok(Begun::Head) => {
                let given_up = || self.outbox.is_superseded(Generation(proposal.generation));
                begin(self.job, &mut replica, resume.as_ref(), &mut ledger, &given_up).map(|begun| {
                    state = Some(Box::new(begun));
                    false
                })
            }
            Err(error) => Err(error.into()),
        };
        let (kept, mut state) = match (begun, state) {
            (Ok(kept), Some(state)) => (kept, state),
            (Ok(_), None) => unreachable!("a generation that has begun has a state"),
            (Err(error), state) => {
                self.held = Held::Replica(replica, state);
                return Err(error);
            }
        };
        let ended = self.train((&mut replica, &mut state, kept), proposal, resume.as_ref(), ledger);
        self.held = Held::Replica(replica, Some(state));
        let ended = ended?;
        self.hosted.end();
        match ended {
            Ending::Finished { result, reason } if proposal.rank == 0 => {
                self.outbox.send(Outbox::finished(&result, reason));
            }
            Ending::Suspended if proposal.rank == 0 => {
                self.outbox.send(pb::trainer_report::Event::Suspended(pb::Suspended {}));
            }
            Ending::Finished { .. } | Ending::Suspended => {}
        }
        Ok(())
    }

    /// The replica in its place in a gang, and the state it was kept with.
    fn take_place(&mut self, links: Links) -> Result<(Box<Replica>, Option<Box<State>>), Error> {
        match std::mem::replace(&mut self.held, Held::Nothing) {
            Held::Model(model) => {
                let mut replica = Replica::new(*model, settings(self.job, self.hold.clone()), links)?;
                replica.model_mut().set_activation_checkpointing(self.job.spec.activation_checkpointing);
                Ok((Box::new(replica), None))
            }
            Held::Replica(mut replica, state) => {
                replica.rejoin(links)?;
                Ok((replica, state))
            }
            Held::Nothing => unreachable!("a generation that ended without a replica ended the process"),
        }
    }

    fn train(
        &mut self,
        (replica, state, kept): (&mut Replica, &mut State, bool),
        proposal: &pb::Propose,
        resume: Option<&CheckpointRef>,
        ledger: save::Ledger,
    ) -> Result<Ending, Error> {
        let Self { job, outbox, hold, hosted, .. } = self;
        let leads = proposal.rank == 0;
        if leads {
            // The coordinator may have missed what the last generation said just before it ended.
            state.results.iter().for_each(|result| outbox.send(Outbox::stage_ended(result)));
        }
        let trace = match (job.spec.verification.trace, leads) {
            (true, true) => {
                Some(trace::Trace::open(job, replica, resume.is_none() && state.moves == 0, &state.traced)?)
            }
            (true, false) => Some(trace::Trace::followed()),
            (false, _) => None,
        };
        let generation = Generation(proposal.generation);
        let saver = save::Saver::start(job, generation, proposal.rank, outbox, hold.clone(), resume, ledger)?;
        let mut session = Session {
            job,
            generation,
            replica,
            state,
            kept,
            outbox,
            prefix: None,
            evaluated: prefix::Counts::default(),
            saver,
            hosted,
            restored_in: Duration::ZERO,
            trace,
        };
        match session.run() {
            // What was saved is told first: a suspended run resumes from it.
            Ok(ending) => Ok(ending),
            Err(error) => {
                session.saver.abandon();
                Err(error.into())
            }
        }
    }
}

fn settings(job: &Job, hold: Option<Hold>) -> Settings {
    Settings {
        seed: job.spec.seed,
        logical_shards: job.plan.logical_shards,
        optimizer: job.spec.optimizer,
        ema: job.spec.ema,
        l2_sp: job.spec.l2_sp,
        label_smoothing: job.spec.label_smoothing_factor,
        class_weights: thaw_core::planner::class_weights(&job.spec, &job.plan),
        thawed_batch_norm: job.spec.thawed_batch_norm,
        max_grad_norm: job.spec.max_grad_norm,
        classes: job.plan.classes.len(),
        hold,
        pulse: job.pulse.clone(),
    }
}

/// The state that a gang begins with of which nobody holds one.
fn begin(
    job: &Job,
    replica: &mut Replica,
    resume: Option<&CheckpointRef>,
    ledger: &mut save::Ledger,
    given_up: &impl Fn() -> bool,
) -> Result<State, Error> {
    match job.spec.frozen_batch_norm {
        BatchNormPolicy::Frozen => {}
        // Before the checkpoint, which holds the statistics of thawed groups only.
        BatchNormPolicy::Recompute => {
            let all: Vec<usize> = (0..replica.model().groups().len()).collect();
            statistics::recompute(job, replica, &all, given_up)?;
        }
    }
    match resume {
        Some(checkpoint) => Ok(save::load(job, checkpoint, replica, ledger)?),
        None => Ok(State::beginning(job)),
    }
}

/// What the coordinator should do about a failure, and what to call it.
fn classify(error: &Error) -> (FailureClass, RunReason) {
    let of_collective = |error: &collective::Error| match error.class() {
        ErrorClass::Retry => (FailureClass::Retry, RunReason::TrainerLost),
        ErrorClass::Fenced => (FailureClass::Fenced, RunReason::TrainerLost),
        ErrorClass::Invalid | ErrorClass::NotFound | ErrorClass::AlreadyExists | ErrorClass::Precondition => {
            (FailureClass::Invalid, RunReason::TrainerError)
        }
        ErrorClass::Fatal => (FailureClass::Fatal, RunReason::TrainerError),
    };
    let of_replica = |error: &replica::Error| match error {
        replica::Error::Collective(error) => of_collective(error),
        replica::Error::Diverged { .. } => (FailureClass::Fatal, RunReason::ReplicasDiverged),
        replica::Error::Model(_)
        | replica::Error::Update(_)
        | replica::Error::Runtime(_)
        | replica::Error::Device(_)
        | replica::Error::Restore { .. }
        | replica::Error::Snapshot { .. }
        | replica::Error::Thread(_)
        | replica::Error::Weights { .. }
        | replica::Error::Tally { .. }
        | replica::Error::Miscounted { .. } => (FailureClass::Fatal, RunReason::TrainerError),
    };
    let of_save = |error: &save::Error| match error {
        save::Error::Checkpoint(error) if error.is_storage() => (FailureClass::Invalid, RunReason::StorageError),
        save::Error::File { .. } => (FailureClass::Invalid, RunReason::StorageError),
        save::Error::NotCommitted | save::Error::Superseded | save::Error::Behind => {
            (FailureClass::Retry, RunReason::TrainerLost)
        }
        save::Error::Differ { .. } => (FailureClass::Fatal, RunReason::ReplicasDiverged),
        // A process of its own asks for another copy.
        save::Error::Damaged { .. } => (FailureClass::Retry, RunReason::TrainerLost),
        save::Error::Peer { .. } => (FailureClass::Fatal, RunReason::TrainerError),
        save::Error::Checkpoint(_)
        | save::Error::Manifest { .. }
        | save::Error::Unfit { .. }
        | save::Error::Model(_)
        | save::Error::Optimizer(_)
        | save::Error::Snapshot { .. }
        | save::Error::Part { .. }
        | save::Error::Archive(_)
        | save::Error::Weights(_) => (FailureClass::Invalid, RunReason::TrainerError),
    };
    match error {
        Error::Collective(error) => of_collective(error),
        Error::Replica(error) | Error::Session(session::Error::Replica(error)) => of_replica(error),
        Error::Save(error) | Error::Session(session::Error::Save(error)) => of_save(error),
        Error::AgentGone
        | Error::Thread(_)
        | Error::Session(
            session::Error::Superseded | session::Error::Prefix(prefix::Error::Superseded | prefix::Error::Thread(_)),
        ) => (FailureClass::Retry, RunReason::TrainerLost),
        // Storage may answer the next time; where it does not, the step fails again, and the coordinator ends that.
        Error::Session(session::Error::Prefix(prefix::Error::Data(thaw_data::batch::Error::Read { .. }))) => {
            (FailureClass::Retry, RunReason::TrainerError)
        }
        Error::Job(_)
        | Error::Device(_)
        | Error::Model(_)
        | Error::Session(
            session::Error::Prefix(prefix::Error::Data(_) | prefix::Error::Required { .. })
            | session::Error::NeverFinite
            | session::Error::Trace(_),
        ) => (FailureClass::Invalid, RunReason::TrainerError),
        Error::Protocol { .. }
        | Error::Proposal { .. }
        | Error::Runtime(_)
        | Error::Session(
            session::Error::DataEnded | session::Error::Prefix(prefix::Error::Model(_) | prefix::Error::Tensor(_)),
        ) => (FailureClass::Fatal, RunReason::TrainerError),
    }
}
