//! What a toy hears from its agent, noted as it comes, and what it says.

use crate::world::World;
use thaw_node::pipe;
use thaw_proto::pb;
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::pb::trainer_report::Event;
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, watch};

/// The newest of everything that the coordinator has said.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) proposed: Option<pb::Propose>,
    /// The gang whose training may begin.
    pub(super) committed: u64,
    /// The gang that is to save and stand still.
    pub(super) suspend: u64,
    /// The checkpoint that became the head.
    pub(super) head: Option<pb::CheckpointCommitted>,
}

impl Heard {
    pub(super) fn is_superseded(&self, generation: u64) -> bool {
        self.proposed.as_ref().is_some_and(|propose| propose.generation > generation)
    }

    fn note(&mut self, message: Message) {
        match message {
            Message::Propose(propose) if !self.is_superseded(propose.generation) => self.proposed = Some(propose),
            Message::Commit(commit) => self.committed = commit.generation.max(self.committed),
            Message::Suspend(suspend) => self.suspend = suspend.generation.max(self.suspend),
            Message::Committed(committed) => self.head = Some(committed),
            Message::Propose(_) | Message::Start(_) | Message::Stop(_) | Message::Welcome(_) | Message::Ping(_) => {}
        }
    }
}

/// Waits until what was heard answers; `None` where the agent is gone.
pub(super) async fn hear<T>(ears: &mut watch::Receiver<Heard>, answer: impl Fn(&Heard) -> Option<T>) -> Option<T> {
    let heard = ears.wait_for(|heard| answer(heard).is_some()).await.ok()?;
    answer(&heard)
}

/// Until a newer gang is proposed; without its agent, for ever: then this process is ended anyway.
pub(super) async fn superseded(mut ears: watch::Receiver<Heard>, generation: u64) {
    if hear(&mut ears, |heard| heard.is_superseded(generation).then_some(())).await.is_none() {
        std::future::pending().await
    }
}

/// Notes what comes for as long as the agent lives; whoever kills the toy must not leave a reader behind.
pub(super) async fn read(
    mut hears: DuplexStream,
    heard: watch::Sender<Heard>,
    reports: mpsc::WeakUnboundedSender<pb::TrainerReport>,
    (world, life): (World, String),
) {
    while let Ok(Some(told)) = pipe::read_frame_async::<pb::CoordinatorMessage>(&mut hears).await {
        if matches!(told.message, Some(Message::Ping(_))) {
            let pong = pb::TrainerReport { event: Some(Event::Pong(pb::Pong {})), ..Default::default() };
            if let Some(reports) = reports.upgrade() {
                // Without its writer this process is ending.
                let _ = reports.send(pong);
            }
            continue;
        }
        world.told(&life, &told);
        if let Some(message) = told.message {
            heard.send_modify(|heard| heard.note(message));
        }
    }
}

/// Writes reports, whole, until nobody makes any.
pub(super) async fn write(mut says: DuplexStream, mut reports: mpsc::UnboundedReceiver<pb::TrainerReport>) {
    while let Some(report) = reports.recv().await {
        if pipe::write_frame_async(&mut says, &report).await.is_err() {
            return;
        }
    }
}
