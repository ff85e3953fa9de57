//! The trainers of this node, by slot.

use super::child;
use super::launch::{Launch, Running};
use super::outbox::{Delivery, Outbox, delivery};
use super::snapshots::Snapshots;
use super::still::Still;
use super::trainer::{PING, Trainer, TrainerId, most_looks};
use super::{Config, KILL_LIMIT, POLICY};
use crate::host_snapshot::HostSnapshot;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::convert::Infallible;
use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::pb::{
    self, CoordinatorMessage, FailureClass, LogLine, RunReason, TrainerExited, TrainerFailed, TrainerReport,
    TrainerStatus,
};
use thaw_proto::worker::RecentOperations;
use thaw_runtime::surroundings;
use thaw_runtime::tasks::Tasks;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Messages that may wait for a trainer; a trainer reads all the time, so more mean that it does not.
const MAX_WAITING_MESSAGES: usize = 64;
/// Between two looks for states that nobody comes for.
const LOOK: Duration = Duration::from_secs(30);
/// Last lines of a trainer that are kept for the agent's own log.
const KEPT_LINES: usize = 20;

/// A cheap handle; clones share the trainers.
#[derive(Debug, Clone)]
pub(super) struct Trainers {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    slots: u32,
    launch: Arc<dyn Launch>,
    tasks: Tasks,
    outbox: Outbox,
    /// The last trainer of each slot, alive or not.
    by_slot: Mutex<BTreeMap<u32, Trainer>>,
    snapshots: Mutex<Snapshots>,
}

impl Trainers {
    pub(super) fn new(config: &Config, launch: Arc<dyn Launch>, tasks: Tasks) -> Self {
        let shared = Shared {
            slots: config.slots,
            launch,
            tasks,
            outbox: Outbox::default(),
            by_slot: Mutex::default(),
            snapshots: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    pub(super) fn outbox(&self) -> &Outbox {
        &self.shared.outbox
    }

    /// Who is alive, by slot.
    pub(super) fn statuses(&self) -> Vec<TrainerStatus> {
        let by_slot = self.by_slot();
        let alive = by_slot.values().filter(|trainer| trainer.is_alive());
        alive
            .map(|trainer| TrainerStatus {
                run: trainer.id.run.clone(),
                slot: trainer.id.slot,
                incarnation: trainer.id.incarnation.clone(),
                generation: trainer.generation,
                position: trainer.position,
                pid: trainer.pid,
            })
            .collect()
    }

    /// What a new session must hear again (AGENT-2).
    pub(super) fn ledgers(&self) -> Vec<TrainerReport> {
        if thaw_mutants::planted("reports-not-repeated") {
            return Vec::new();
        }
        self.by_slot().values().flat_map(|trainer| trainer.ledger.iter().cloned()).collect()
    }

    /// Starts a trainer in its slot and passes it the message. The slot's trainer before it is killed first: the coordinator
    /// would not start another if it still counted on that one.
    pub(super) async fn start(&self, id: TrainerId, message: CoordinatorMessage) {
        if id.slot >= self.shared.slots {
            let text = format!("slot {} does not exist; this worker has {}", id.slot, self.shared.slots);
            self.refuse(&id, FailureClass::Invalid, RunReason::TrainerError, text);
            return;
        }
        if self.send_again(&id) {
            return;
        }
        if !self.clear_slot(id.slot).await {
            let text = format!("the trainer before it in slot {} does not end", id.slot);
            self.refuse(&id, FailureClass::Retry, RunReason::TrainerHung, text);
            return;
        }
        let spawned = match tokio::time::timeout(KILL_LIMIT, self.shared.launch.launch()).await {
            Ok(spawned) => spawned,
            Err(_elapsed) => Err(std::io::ErrorKind::TimedOut.into()),
        };
        match spawned {
            Ok(running) => self.adopt(id, running, message),
            Err(error) => {
                let text = format!("cannot start trainer {}: {error}", self.shared.launch.name());
                self.refuse(&id, FailureClass::Fatal, RunReason::TrainerError, text);
            }
        }
    }

    fn adopt(&self, id: TrainerId, running: Running, mut message: CoordinatorMessage) {
        let Running { child, stdin, stdout, stderr, ring } = running;
        if let Some(pb::coordinator_message::Message::Start(start)) = &mut message.message {
            start.host_snapshot = self.snapshots().of(&id.run);
        }
        let (messages, waiting) = mpsc::channel(MAX_WAITING_MESSAGES);
        let still = Still::new(most_looks(&message));
        messages.try_send(message).expect("the queue is empty");
        let kill = CancellationToken::new();
        let trainer = Trainer {
            id: id.clone(),
            pid: child.id(),
            place: None,
            ring,
            generation: 0,
            position: None,
            unanswered: 0,
            still,
            ledger: Vec::new(),
            last_lines: VecDeque::new(),
            messages,
            kill: kill.clone(),
            ended: CancellationToken::new(),
        };
        let (ended, watched) = (trainer.ended.clone(), trainer.ended.clone());
        tracing::info!(run = id.run, slot = id.slot, pid = trainer.pid, "trainer started");
        self.by_slot().insert(id.slot, trainer);
        let tasks = &self.shared.tasks;
        let of_writer = kill.clone();
        tasks.spawn(format!("messages to slot {}", id.slot), POLICY, |_| {
            child::write_messages(stdin, waiting, of_writer, ended)
        });
        let (trainers, of_pings, watched) = (self.clone(), watched, id.clone());
        tasks.spawn(format!("pings to slot {}", id.slot), POLICY, |_| async move {
            trainers.watch_answers(&watched, of_pings).await;
            Ok::<_, io::Error>(())
        });
        let trainers = self.clone();
        tasks.spawn(format!("trainer in slot {}", id.slot), POLICY, |_| {
            child::watch(child, stdout, stderr, id, trainers, kill)
        });
    }

    /// Pings a trainer that is ready until it has ended, and kills it where it does not answer (AGENT-6) or gets nowhere (AGENT-8). A trainer that
    /// is only slow answers: none of its threads but one has anything to do with that. An agent that was kept from running has sent fewer
    /// pings meanwhile.
    async fn watch_answers(&self, id: &TrainerId, ended: CancellationToken) {
        let mut pings = tokio::time::interval(PING);
        pings.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = ended.cancelled() => return,
                _ = pings.tick() => {}
            }
            let (failed, recent, kill) = {
                let mut by_slot = self.by_slot();
                let Some(trainer) = find(&mut by_slot, id) else { return };
                let Some((reason, message)) = trainer.check() else { continue };
                let recent = trainer.recent();
                let last = recent.as_ref().and_then(|(_, recent)| recent.operations.last());
                let last = last.map_or_else(String::new, |last| format!("; its last operation was {last}"));
                let message = format!("{message}{last}");
                tracing::warn!(run = id.run, slot = id.slot, why = message, "killing a trainer");
                let failed = TrainerFailed { class: FailureClass::Retry.into(), reason: reason.into(), message };
                // It may have been asked for a generation that it has never heard of.
                let generation = trainer.place.map_or(trainer.generation, |place| place.generation);
                let failed = id.report(generation, Event::Failed(failed));
                trainer.keep(&failed);
                (failed, recent, trainer.kill.clone())
            };
            self.tell(id, recent);
            self.shared.outbox.push(failed);
            // Last, so that its end is not heard of before the reason.
            kill.cancel();
            return;
        }
    }

    /// Kills what is alive in a slot and waits for its end; `false` where it does not end in time.
    async fn clear_slot(&self, slot: u32) -> bool {
        let (kill, ended) = match self.by_slot().get(&slot) {
            Some(trainer) if trainer.is_alive() => (trainer.kill.clone(), trainer.ended.clone()),
            Some(_) | None => return true,
        };
        kill.cancel();
        tokio::time::timeout(KILL_LIMIT, ended.cancelled()).await.is_ok()
    }

    /// Passes a message to a trainer, or reports that there is none.
    pub(super) fn forward(&self, id: &TrainerId, generation: u64, message: CoordinatorMessage) {
        let delivered = {
            let mut by_slot = self.by_slot();
            find(&mut by_slot, id).filter(|trainer| trainer.is_alive()).map(|trainer| {
                let mut before = None;
                if let Some(pb::coordinator_message::Message::Propose(propose)) = &message.message {
                    before = trainer.propose(propose);
                }
                if trainer.messages.try_send(message).is_err() {
                    tracing::warn!(slot = id.slot, "a trainer does not read its messages; killing it");
                    trainer.kill.cancel();
                }
                before
            })
        };
        match delivered {
            Some(before) => self.tell(id, before),
            None => self.say_ended(id, generation),
        }
    }

    /// Kills a trainer, or reports that there is none.
    pub(super) fn stop(&self, id: &TrainerId, generation: u64) {
        let known = {
            let mut by_slot = self.by_slot();
            find(&mut by_slot, id).filter(|trainer| trainer.is_alive()).map(|trainer| {
                let recent = trainer.recent();
                trainer.kill.cancel();
                recent
            })
        };
        match known {
            Some(recent) => self.tell(id, recent),
            None => self.say_ended(id, generation),
        }
    }

    /// Kills every trainer. Their ends are awaited by joining the tasks.
    pub(super) fn kill_all(&self) {
        self.by_slot().values().for_each(|trainer| trainer.kill.cancel());
    }

    /// Takes a report from a trainer's pipe. Whose it is, is known from the pipe.
    pub(super) fn report(&self, id: &TrainerId, report: TrainerReport) {
        let (run, incarnation) = (id.run.clone(), id.incarnation.clone());
        let report = TrainerReport { run, slot: id.slot, incarnation, ..report };
        let recent = {
            let mut by_slot = self.by_slot();
            let Some(trainer) = find(&mut by_slot, id) else {
                return;
            };
            if matches!(report.event, Some(Event::Pong(_))) {
                trainer.unanswered = 0;
                return;
            }
            if let Some(Event::HostSnapshot(told)) = &report.event {
                drop(by_slot);
                let before = self.snapshots().hear(&id.run, told, Instant::now());
                self.let_go(before);
                return;
            }
            trainer.observe(&report);
            if delivery(&report) == Delivery::AtLeastOnce {
                trainer.keep(&report);
            }
            let is_over = matches!(report.event, Some(Event::Interrupted(_) | Event::Failed(_) | Event::Exited(_)));
            // A newer proposal may have come to it meanwhile.
            let is_last = trainer.place.is_some_and(|place| place.generation == report.generation);
            if is_over && is_last { trainer.recent() } else { None }
        };
        self.tell(id, recent);
        self.shared.outbox.push(report);
    }

    /// Lets go of states that nobody comes for (AGENT-9), for as long as the agent lives.
    pub(super) async fn let_go_of_old_states(&self) -> Infallible {
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let now = looks.tick().await;
            let alive: BTreeSet<String> = self.statuses().into_iter().map(|trainer| trainer.run).collect();
            let old = self.snapshots().take_old(&alive, now);
            self.let_go(old);
        }
    }

    /// Gives memory back, of which there may be much, where nothing waits for it.
    fn let_go(&self, states: impl IntoIterator<Item = HostSnapshot>) {
        for state in states {
            let name = format!("memory of {}", state.snapshot());
            self.shared.tasks.spawn(name, POLICY, |_| surroundings::blocking(move || drop(state)));
        }
    }

    fn snapshots(&self) -> MutexGuard<'_, Snapshots> {
        self.shared.snapshots.lock().expect("no code that holds the lock panics")
    }

    /// Takes a line that a trainer wrote to stderr.
    pub(super) fn line(&self, id: &TrainerId, text: String) {
        let (generation, source) = {
            let mut by_slot = self.by_slot();
            let Some(trainer) = find(&mut by_slot, id) else {
                return;
            };
            if trainer.last_lines.len() == KEPT_LINES {
                trainer.last_lines.pop_front();
            }
            trainer.last_lines.push_back(text.clone());
            (trainer.generation, trainer.source())
        };
        let line = LogLine { time: Some(thaw_runtime::surroundings::wall_clock().into()), source, text };
        self.report(id, TrainerReport { generation, event: Some(Event::Log(line)), ..TrainerReport::default() });
    }

    /// A trainer's process is gone.
    pub(super) fn ended(&self, id: &TrainerId, status: Option<ExitStatus>) {
        let (code, signal) = child::code_and_signal(status);
        let (generation, ended) = {
            let mut by_slot = self.by_slot();
            let Some(trainer) = find(&mut by_slot, id) else {
                return;
            };
            let was_asked = trainer.kill.is_cancelled();
            if was_asked || code == Some(0) {
                tracing::info!(run = id.run, slot = id.slot, ?code, ?signal, "trainer ended");
            } else {
                let tail = Vec::from(std::mem::take(&mut trainer.last_lines)).join("\n");
                tracing::warn!(run = id.run, slot = id.slot, ?code, ?signal, tail, "trainer ended by itself");
            }
            (trainer.generation, trainer.ended.clone())
        };
        let exited = Event::Exited(TrainerExited { code, signal });
        self.report(id, TrainerReport { generation, event: Some(exited), ..TrainerReport::default() });
        ended.cancel();
    }

    /// Where this incarnation is known, sends what it reported again.
    fn send_again(&self, id: &TrainerId) -> bool {
        let ledger = find(&mut self.by_slot(), id).map(|trainer| trainer.ledger.clone());
        let is_known = ledger.is_some();
        ledger.into_iter().flatten().for_each(|report| self.shared.outbox.push(report));
        is_known
    }

    /// Says (again) that a trainer is not there (AGENT-3).
    fn say_ended(&self, id: &TrainerId, generation: u64) {
        if !self.send_again(id) {
            self.push_for(id, generation, Event::Exited(TrainerExited { code: None, signal: None }));
        }
    }

    fn refuse(&self, id: &TrainerId, class: FailureClass, reason: RunReason, message: String) {
        tracing::warn!(run = id.run, slot = id.slot, message, "no trainer started");
        let failed = TrainerFailed { class: class.into(), reason: reason.into(), message };
        self.push_for(id, 0, Event::Failed(failed));
        self.push_for(id, 0, Event::Exited(TrainerExited { code: None, signal: None }));
    }

    /// Reports what a trainer did last in a generation.
    fn tell(&self, id: &TrainerId, recent: Option<(u64, RecentOperations)>) {
        if let Some((generation, recent)) = recent {
            self.push_for(id, generation, Event::Operations((&recent).into()));
        }
    }

    fn push_for(&self, id: &TrainerId, generation: u64, event: Event) {
        self.shared.outbox.push(id.report(generation, event));
    }

    fn by_slot(&self) -> MutexGuard<'_, BTreeMap<u32, Trainer>> {
        self.shared.by_slot.lock().expect("no code that holds the lock panics")
    }
}

fn find<'a>(by_slot: &'a mut BTreeMap<u32, Trainer>, id: &TrainerId) -> Option<&'a mut Trainer> {
    by_slot.get_mut(&id.slot).filter(|trainer| trainer.id == *id)
}
