//! From a proposal to a gang that is connected: what the agent passes on, and what it ends.

use super::error::Error;
use super::outbox::Outbox;
use super::reduce::Links;
use crate::gpus::{Gpus, Limits};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;
use thaw_node::collective::{Abort, Collective, Listener, Membership, Options};
use thaw_proto::ids::{Generation, Rank, Step};
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::peers::Peers;
use thaw_torch::tch::Device;

/// Longer than NCCL takes to let go of a communicator, where it does.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The newest proposal, and what ends the forming of its gang, and the gang that trains.
#[derive(Default)]
pub(super) struct Latest(Mutex<Proposed>);

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
    pub(super) fn train(&self, generation: u64, collective: &Arc<dyn Collective>) {
        let mut latest = self.proposed();
        if latest.generation > generation {
            drop(latest);
            collective.abort();
        } else {
            latest.training = Some((generation, Arc::downgrade(collective)));
        }
    }
}

/// What the training thread waits for; everything else is noted as it comes.
pub(super) enum Order {
    Propose(pb::Propose),
    Commit(Generation),
}

/// Passes on what forms a gang, and notes what concerns the one in training, until the agent is gone.
pub(super) fn note(
    messages: &Receiver<pb::CoordinatorMessage>,
    orders: &Sender<Order>,
    outbox: &Outbox,
    latest: &Latest,
) {
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
                    outbox.note_commit(Step(position.step));
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
pub(super) fn form(
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
