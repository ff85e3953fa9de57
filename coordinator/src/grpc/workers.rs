//! WorkerService: one session per agent. Messages in become inputs of the driver; its commands go out through the
//! session's outbox.

use super::{Services, stream_while_leading};
use crate::driver::{Outbox, SessionId};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::time::Duration;
use thaw_proto::pb;
use thaw_proto::pb::worker_message::Message;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Commands that may wait for a slow worker; beyond, it is taken for lost.
const OUTBOX: usize = 1024;
/// A session must say hello within this.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);

#[tonic::async_trait]
impl pb::worker_service_server::WorkerService for Services {
    type SessionStream = BoxStream<'static, Result<pb::CoordinatorMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<pb::WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let leader = self.leading().await?;
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(HELLO_DEADLINE, inbound.message()).await;
        let Ok(Ok(Some(pb::WorkerMessage { message: Some(Message::Hello(hello)) }))) = first else {
            return Err(super::errors::bad_field("message", "the first message of a session must be hello".to_owned()));
        };
        let (sender, commands) = tokio::sync::mpsc::channel(OUTBOX);
        let driver = leader.driver.clone();
        let session = driver.open_session(hello, Outbox::new(sender)).await.map_err(super::errors::driver)?;
        let until = leader.term.clone();
        self.tasks.spawn(
            format!("session {}", session.worker),
            thaw_runtime::tasks::OnError::LogAndCount,
            move |_| async move {
                let ended = tokio::select! {
                    biased;
                    ended = receive(&driver, &session, &mut inbound) => ended,
                    () = until.cancelled() => Ok(()),
                };
                if let Err(status) = &ended {
                    tracing::debug!(worker = %session.worker, %status, "session broke");
                }
                driver.close_session(session).await;
                Ok::<_, std::convert::Infallible>(())
            },
        );
        Ok(Response::new(stream_while_leading(&leader.term, ReceiverStream::new(commands).boxed())))
    }
}

async fn receive(
    driver: &crate::driver::Driver,
    session: &SessionId,
    inbound: &mut Streaming<pb::WorkerMessage>,
) -> Result<(), Status> {
    while let Some(message) = inbound.message().await? {
        match message.message {
            Some(message) => driver.from_worker(session, message).await,
            None => tracing::debug!(worker = %session.worker, "an empty message is left out"),
        }
    }
    Ok(())
}
