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
mod error;
mod feed;
mod forming;
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
mod state;
mod statistics;
mod trace;

pub use hold::{Hold, HoldPoint};
pub use prefix::CacheFolders;

use crate::device::DeviceOptions;
use error::Error;
use forming::{Latest, form, note};
use job::Job;
use outbox::{Identity, Outbox};
use reduce::Links;
use replica::{Replica, Settings};
use save::{Begun, Hosted};
use session::{Ending, Session};
use state::State;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;
use thaw_core::survivors::Head;
use thaw_node::collective::{HostId, Listener, Options, Pulse, Ring, RingAddress};
use thaw_node::host_snapshot::HostSnapshot;
use thaw_node::pipe::{TrainerPipe, die_with_parent};
use thaw_proto::ids::{Generation, Step};
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::run::CheckpointRef;
use thaw_proto::spec::BatchNormPolicy;
use thaw_torch::SegmentedModel;
use thaw_torch::executor::Options as ModelOptions;
use thaw_torch::tch::Device;

const DEFAULT_COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(30);
/// A gang whose members do not come within this is formed anew by the coordinator.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);

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
    let (class, reason) = error.classify();
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

/// What outlives a generation.
enum Held {
    /// Loaded, and in no gang so far.
    Model(Box<SegmentedModel>),
    /// A replica; and its state, once it is as a checkpoint or a peer has it.
    Replica(Box<Replica>, Option<Box<State>>),
    /// Between two of the others.
    Nothing,
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
            Err(error) if keeps_state && error.is_interruption(outbox) => {
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
