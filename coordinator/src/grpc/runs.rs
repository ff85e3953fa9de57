//! RunService: what users ask for.

use super::{MAX_PAGE, Services, run_id, stream_until, stream_while_leading};
use crate::driver::UserAction;
use crate::views::{Update, Views, Watch};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::collections::VecDeque;
use std::sync::Arc;
use thaw_proto::convert::WireEnum;
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use thaw_proto::pb::watch_run_response::Update as Measured;
use thaw_proto::run::RunState;
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl pb::run_service_server::RunService for Services {
    async fn create_run(&self, request: Request<pb::CreateRunRequest>) -> Answer<pb::Run> {
        // Planning takes a while; the rest of the term is not to wait for it.
        let intake = self.leading().await?.intake;
        let request = request.into_inner();
        let run = intake.create(request).await.map_err(super::errors::intake)?;
        Ok(Response::new(run.as_ref().clone()))
    }

    async fn get_run(&self, request: Request<pb::GetRunRequest>) -> Answer<pb::Run> {
        let id = run_id(&request.get_ref().name)?;
        self.catch_up(&id, 0).await?;
        Ok(Response::new(find(&self.views, &id)?.as_ref().clone()))
    }

    async fn list_runs(&self, request: Request<pb::ListRunsRequest>) -> Answer<pb::ListRunsResponse> {
        self.readable().await?;
        let request = request.into_inner();
        let size = match request.page_size {
            0 => 100,
            size => usize::try_from(size)
                .ok()
                .filter(|size| (1..=MAX_PAGE).contains(size))
                .ok_or_else(|| super::errors::bad_field("page_size", format!("is {size}: use 1 to {MAX_PAGE}")))?,
        };
        let all = self.views.list();
        // A token is the name of the last run shown, so that runs made meanwhile move no page.
        let start = match request.page_token.as_str() {
            "" => 0,
            token => all.iter().position(|run| run.name == token).map(|at| at + 1).ok_or_else(|| {
                super::errors::bad_field(
                    "page_token",
                    "is none that this server gave; leave it out to start over".to_owned(),
                )
            })?,
        };
        let page = &all[start..all.len().min(start + size)];
        let more = start + page.len() < all.len();
        let next_page_token = page.last().filter(|_| more).map_or_else(String::new, |run| run.name.clone());
        Ok(Response::new(pb::ListRunsResponse {
            runs: page.iter().map(|run| run.as_ref().clone()).collect(),
            next_page_token,
        }))
    }

    type WatchRunStream = BoxStream<'static, Result<pb::WatchRunResponse, Status>>;

    async fn watch_run(&self, request: Request<pb::WatchRunRequest>) -> Answer<Self::WatchRunStream> {
        let request = request.into_inner();
        let id = run_id(&request.name)?;
        let leader = if request.include_progress { Some(self.leading().await?) } else { None };
        self.catch_up(&id, request.after_revision).await?;
        let watch = self.views.watch(&id).ok_or_else(|| super::errors::run_not_found(&id))?;
        let following = Following::new(watch, &request, self.views.clone(), id)?;
        let stream = futures::stream::unfold(following, |mut following| async move {
            following.next().await.map(|response| (Ok(response), following))
        });
        let stream = match leader {
            Some(leader) => stream_while_leading(&leader.term, stream.boxed()),
            None => stream.boxed(),
        };
        Ok(Response::new(stream_until(self.shutdown.clone(), stream)))
    }

    async fn cancel_run(&self, request: Request<pb::CancelRunRequest>) -> Answer<pb::Run> {
        self.act(&request.get_ref().name, UserAction::Cancel).await
    }

    async fn suspend_run(&self, request: Request<pb::SuspendRunRequest>) -> Answer<pb::Run> {
        self.act(&request.get_ref().name, UserAction::Suspend).await
    }

    async fn resume_run(&self, request: Request<pb::ResumeRunRequest>) -> Answer<pb::Run> {
        self.act(&request.get_ref().name, UserAction::Resume).await
    }

    async fn scale_run(&self, request: Request<pb::ScaleRunRequest>) -> Answer<pb::Run> {
        let request = request.get_ref();
        self.act(&request.name, UserAction::Scale { workers: request.workers }).await
    }

    async fn explain_run(&self, request: Request<pb::ExplainRunRequest>) -> Answer<pb::ExplainRunResponse> {
        let leader = self.leading().await?;
        let id = run_id(&request.get_ref().name)?;
        Ok(Response::new(leader.driver.explain(&id).await.map_err(super::errors::driver)?))
    }

    type TailLogsStream = BoxStream<'static, Result<pb::LogLine, Status>>;

    async fn tail_logs(&self, request: Request<pb::TailLogsRequest>) -> Answer<Self::TailLogsStream> {
        let leader = self.leading().await?;
        let request = request.into_inner();
        let id = run_id(&request.name)?;
        find(&self.views, &id)?;
        let folder = leader.driver.folder(&id).await.map_err(super::errors::driver)?;
        let tail = super::tail::Tail::new(leader.journal.clone(), self.views.clone(), id, folder, request.follow);
        Ok(Response::new(stream_while_leading(&leader.term, tail.lines())))
    }

    async fn list_checkpoints(
        &self,
        request: Request<pb::ListCheckpointsRequest>,
    ) -> Answer<pb::ListCheckpointsResponse> {
        let id = run_id(&request.get_ref().name)?;
        self.catch_up(&id, 0).await?;
        let (folder, checkpoints) = self.views.checkpoints(&id).ok_or_else(|| super::errors::run_not_found(&id))?;
        let mut checkpoints = checkpoints.as_ref().clone();
        let kept = thaw_runtime::surroundings::blocking(move || {
            // Trainers delete those beyond the spec's limit.
            checkpoints.retain(|checkpoint| folder.join(&checkpoint.manifest).is_file());
            checkpoints
        });
        let checkpoints = kept.await.map_err(|_| super::errors::internal("listing the checkpoints ended early"))?;
        Ok(Response::new(pb::ListCheckpointsResponse { checkpoints }))
    }
}

impl Services {
    async fn act(&self, name: &str, action: UserAction) -> Answer<pb::Run> {
        let leader = self.leading().await?;
        let id = run_id(name)?;
        let run = leader.driver.act(&id, action).await.map_err(super::errors::driver)?;
        Ok(Response::new(run.as_ref().clone()))
    }
}

fn find(views: &Views, id: &RunId) -> Result<Arc<pb::Run>, Status> {
    views.get(id).ok_or_else(|| super::errors::run_not_found(id))
}

/// One WatchRun in progress. A run and the events that led to it are one message, so that its revision says all that was
/// sent.
struct Following {
    id: RunId,
    views: Views,
    watch: Watch,
    ready: VecDeque<pb::WatchRunResponse>,
    /// Revision of the last run sent.
    seen: u64,
    include_progress: bool,
    ended: bool,
}

impl Following {
    fn new(watch: Watch, request: &pb::WatchRunRequest, views: Views, id: RunId) -> Result<Self, Status> {
        let after = request.after_revision;
        let mut events = Vec::new();
        if after > 0 {
            // The first event of a run is of no revision before; where it is gone, others may be.
            if watch.events.first().is_some_and(|oldest| oldest.after > 0 && oldest.after >= after) {
                return Err(super::errors::events_gone(&id, after));
            }
            let missed = watch.events.iter().filter(|kept| kept.after >= after);
            events.extend(missed.map(|kept| kept.event.clone()));
        }
        let mut ready = VecDeque::from([changed(watch.run.as_ref().clone(), events)]);
        if request.include_progress {
            ready.extend(watch.progress.clone().map(|progress| measured(Measured::Progress(progress))));
        }
        let (seen, ended) = (watch.run.revision, has_ended(&watch.run));
        Ok(Self { id, views, watch, ready, seen, include_progress: request.include_progress, ended })
    }

    async fn next(&mut self) -> Option<pb::WatchRunResponse> {
        loop {
            if let Some(response) = self.ready.pop_front() {
                return Some(response);
            }
            if self.ended {
                return None;
            }
            match self.watch.updates.recv().await {
                Ok(Update::Changed(run, events)) => self.changed(&run, events.into_iter().map(|kept| kept.event)),
                Ok(Update::Progress(progress)) if self.include_progress => {
                    return Some(measured(Measured::Progress(progress)));
                }
                Ok(Update::Evaluation(evaluation)) if self.include_progress => {
                    return Some(measured(Measured::Evaluation(evaluation)));
                }
                Ok(Update::Progress(_) | Update::Evaluation(_)) => {}
                // VIEW-2.
                Err(RecvError::Lagged(_)) => {
                    let watch = self.views.watch(&self.id)?;
                    let seen = self.seen;
                    let missed: Vec<_> =
                        watch.events.iter().filter(|kept| kept.after >= seen).map(|kept| kept.event.clone()).collect();
                    let run = Arc::clone(&watch.run);
                    self.watch = watch;
                    self.changed(&run, missed.into_iter());
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }

    fn changed(&mut self, run: &pb::Run, events: impl Iterator<Item = pb::Event>) {
        if run.revision <= self.seen {
            return;
        }
        self.seen = run.revision;
        self.ended = has_ended(run);
        self.ready.push_back(changed(run.clone(), events.collect()));
    }
}

fn changed(run: pb::Run, events: Vec<pb::Event>) -> pb::WatchRunResponse {
    pb::WatchRunResponse { update: Some(Measured::Run(run)), events }
}

fn measured(update: Measured) -> pb::WatchRunResponse {
    pb::WatchRunResponse { update: Some(update), events: Vec::new() }
}

/// Whether nothing more will happen to the run.
pub(super) fn has_ended(run: &pb::Run) -> bool {
    RunState::from_number(run.state).flatten().is_some_and(RunState::has_ended)
}
