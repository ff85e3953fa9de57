//! Copies of the state in the memory of a host, made beside training by one of its trainers (SAVE-5, SAVE-6).

use super::contents::Copies;
use crate::trainer::job::Job;
use crate::trainer::outbox::{Event, Outbox};
use crate::trainer::replica::Replica;
use crate::trainer::state::State;
use std::sync::Arc;
use std::thread::JoinHandle;
use thaw_core::survivors::Snapshot;
use thaw_node::host_snapshot::HostSnapshot;
use thaw_proto::ids::Generation;
use thaw_proto::run::Position;
use thaw_runtime::BoxError;
use thaw_torch::tch::Device;

/// When a host gets a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Never,
    WithCheckpoints,
    /// After so many updates.
    Every(u32),
}

/// See the module. It outlives generations.
pub(crate) struct Hosted {
    when: When,
    run: String,
    outbox: Arc<Outbox>,
    /// The last that was begun.
    last: Option<Snapshot>,
    /// Gives back what is told, and else what was told before.
    writing: Option<JoinHandle<Option<HostSnapshot>>>,
    told: Option<HostSnapshot>,
    left_out: u64,
}

/// One that is to be written.
pub(crate) struct Hosting {
    pub(crate) copies: Copies,
    snapshot: Snapshot,
    position: Position,
}

impl Hosted {
    pub(crate) fn new(job: &Job, device: Device, outbox: &Arc<Outbox>) -> Self {
        let when = match job.spec.checkpoint.host_snapshot_steps {
            Some(0) => When::Never,
            Some(every) => When::Every(every),
            // There copies take memory of the device, which the plan has not set aside.
            None if device.is_cuda() => When::Never,
            None => When::WithCheckpoints,
        };
        let (run, outbox) = (job.run.to_string(), Arc::clone(outbox));
        Self { when, run, outbox, last: None, writing: None, told: None, left_out: 0 }
    }

    /// Begins the copy that goes with a checkpoint, where one does.
    pub(crate) fn at_checkpoint(
        &mut self,
        job: &Job,
        replica: &mut Replica,
        state: &State,
        generation: Generation,
    ) -> Option<Hosting> {
        (self.when == When::WithCheckpoints).then(|| self.begin(job, replica, state, generation)).flatten()
    }

    /// Begins the copy that is due after a step, where one is.
    pub(crate) fn after_step(
        &mut self,
        job: &Job,
        replica: &mut Replica,
        state: &State,
        generation: Generation,
    ) -> Option<Hosting> {
        let is_due = match self.when {
            When::Never | When::WithCheckpoints => false,
            When::Every(steps) => state.position.step.0.is_multiple_of(u64::from(steps)),
        };
        is_due.then(|| self.begin(job, replica, state, generation)).flatten()
    }

    fn begin(&mut self, job: &Job, replica: &mut Replica, state: &State, generation: Generation) -> Option<Hosting> {
        let position = state.position;
        let snapshot = Snapshot { step: position.step, moves: state.moves, generation };
        if !replica.leads_host() || self.last == Some(snapshot) {
            return None;
        }
        let missing = if self.is_idle() { self.missing_room(replica) } else { Some("the last is still being written") };
        if let Some(missing) = missing {
            self.left_out += 1;
            if self.left_out.is_power_of_two() {
                let (left_out, step) = (self.left_out, position.step.0);
                tracing::warn!(left_out, step, missing, "left out a copy of the state in this host's memory");
            }
            return None;
        }
        self.last = Some(snapshot);
        Some(Hosting { copies: Copies::of(job, replica, state), snapshot, position })
    }

    /// Whether there is not room for a copy and for what it is made from, with others' share of memory left alone.
    fn missing_room(&self, replica: &Replica) -> Option<&'static str> {
        let bytes: u64 = (0..replica.model().groups().len()).map(|group| replica.state_bytes(group)).sum();
        let room = thaw_cache::memory_room();
        room.is_some_and(|room| room < bytes.saturating_mul(2)).then_some("this host is short of memory")
    }

    /// Whether the last one is written, so that a next one would be.
    pub(crate) fn is_idle(&mut self) -> bool {
        if self.writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
            return false;
        }
        if let Some(writing) = self.writing.take() {
            self.told = writing.join().unwrap_or_else(|_panicked| {
                tracing::warn!("the thread that copies the state to this host's memory has panicked");
                None
            });
        }
        true
    }

    /// As [`Hosted::is_idle`]; what is copied apart from checkpoints does not count.
    pub(crate) fn is_idle_of_checkpoints(&mut self) -> bool {
        self.when != When::WithCheckpoints || self.is_idle()
    }

    /// Writes one on a thread of its own, and tells it.
    pub(crate) fn write(&mut self, hosting: Hosting) {
        let (before, run, outbox) = (self.told.take(), self.run.clone(), Arc::clone(&self.outbox));
        let write = move || match hosting.write(&run) {
            Ok(written) => {
                outbox.send(Event::HostSnapshot(written.told()));
                // The one before goes here, which gives back much memory, and so takes its time.
                drop(before);
                Some(written)
            }
            Err(error) => {
                tracing::warn!(error = thaw_runtime::chain(&*error), "cannot copy the state to this host's memory");
                before
            }
        };
        match std::thread::Builder::new().name("host-snapshot".to_owned()).spawn(write) {
            Ok(writing) => self.writing = Some(writing),
            // As if it had been written: the next one tries again.
            Err(error) => tracing::warn!(%error, "cannot copy the state to this host's memory"),
        }
    }

    /// The run does not need one any more: it has ended, or saved and stands still. All hosts are told, also those that have none.
    pub(crate) fn end(&mut self) {
        if let Some(writing) = self.writing.take() {
            let _unread = writing.join();
        }
        (self.told, self.last) = (None, None);
        self.outbox.send(Event::HostSnapshot(thaw_proto::pb::HostSnapshot::default()));
    }
}

impl Hosting {
    fn write(self, run: &str) -> Result<HostSnapshot, BoxError> {
        let (contents, body) = self.copies.encode()?;
        Ok(HostSnapshot::create(run, self.snapshot, self.position, &contents, body)?)
    }
}
