//! Intake: from a submitted spec to a run the driver can own.
//!
//! Everything that can be wrong is found here, before anything is kept: the spec's own mistakes, then the graph's and
//! the data's, which are read side by side and reported together. With `validate_only` that is all. Else the run's
//! folder is written first (index, spec, plan), then the store: a crash in between leaves a folder nobody names, never
//! a run without its files.

mod files;

pub use files::FilesPlanner;

use crate::driver::{self, Driver, NewRun};
use crate::folder::{self, RunFolder};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use thaw_data::Index;
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use thaw_proto::plan::Plan;
use thaw_proto::spec::RunSpec;
use thaw_proto::violation::Violations;
use thaw_proto::{convert, text};
use thaw_runtime::surroundings;
use tokio::sync::Semaphore;

/// Submissions planned at once; each reads a whole data set.
const PLANNED_AT_ONCE: usize = 2;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the spec cannot be run")]
    Invalid(Violations),
    #[error(transparent)]
    Folder(#[from] folder::Error),
    #[error("keep the index of the run's data")]
    Index(#[source] thaw_data::index::Error),
    #[error("{0} ended early")]
    Ended(&'static str),
    #[error(transparent)]
    Driver(#[from] driver::Error),
}

/// Turns a checked spec into a plan. Blocking: reads the graph and the data set.
pub trait SpecPlanner: Send + Sync + fmt::Debug + 'static {
    /// The plan and what it was made from, or every mistake.
    fn plan(&self, spec: &RunSpec) -> Result<Planned, Violations>;
}

/// A plan, and the index to keep beside it.
#[derive(Debug)]
pub struct Planned {
    pub plan: Plan,
    /// `None`: nothing to keep.
    pub index: Option<Index>,
}

/// Submissions. A cheap clone.
#[derive(Debug, Clone)]
pub struct Intake {
    planner: Arc<dyn SpecPlanner>,
    driver: Driver,
    data_dir: PathBuf,
    slots: Arc<Semaphore>,
    /// Submissions in hand, by request id: the same one sent again waits here instead of planning beside itself.
    turns: Arc<Mutex<BTreeMap<String, Turn>>>,
}

type Turn = Arc<tokio::sync::Mutex<()>>;

impl Intake {
    pub(crate) fn new(planner: Arc<dyn SpecPlanner>, driver: Driver, data_dir: PathBuf) -> Self {
        Self { planner, driver, data_dir, slots: Arc::new(Semaphore::new(PLANNED_AT_ONCE)), turns: Arc::default() }
    }

    /// Validates, and unless told otherwise keeps the run and answers with it. Of several with one request id, one is kept
    /// and answers all.
    pub async fn create(&self, mut request: pb::CreateRunRequest) -> Result<Arc<pb::Run>, Error> {
        let request_id = Some(std::mem::take(&mut request.request_id)).filter(|id| !id.is_empty());
        let Some(id) = request_id else { return self.plan_and_keep(&request, None).await };
        if uuid::Uuid::parse_str(&id).is_err() {
            let message = format!("{id:?} is no UUID; make one with uuidgen, or leave it out");
            return Err(Error::Invalid(Violations::one("request_id", message)));
        }
        let turn = Arc::clone(self.turns().entry(id.clone()).or_default());
        let created = {
            let _mine = turn.lock().await;
            match self.driver.requested(&id).await {
                Ok(Some(run)) if !thaw_mutants::planted("request-forgotten") => Ok(run),
                Ok(_) => self.plan_and_keep(&request, Some(id.clone())).await,
                Err(error) => Err(error.into()),
            }
        };
        drop(turn);
        // Nobody else has it in hand.
        let mut turns = self.turns();
        if turns.get(&id).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            turns.remove(&id);
        }
        created
    }

    fn turns(&self) -> MutexGuard<'_, BTreeMap<String, Turn>> {
        self.turns.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    async fn plan_and_keep(
        &self,
        request: &pb::CreateRunRequest,
        request_id: Option<String>,
    ) -> Result<Arc<pb::Run>, Error> {
        let raw = request.spec.as_ref().ok_or_else(|| Error::Invalid(Violations::one("spec", "is required")))?;
        let spec = convert::spec::check(raw).map_err(Error::Invalid)?;
        let id = new_run_id(&spec);
        let folder = RunFolder::of(&id, spec.checkpoint.url.as_ref(), &self.data_dir)
            .map_err(|error| Error::Invalid(Violations::one("checkpoint.url", error.to_string())))?;
        let _slot = self.slots.acquire().await.map_err(|_| Error::Ended("intake"))?;
        let planned = self.plan(spec.clone()).await?;
        let new = NewRun { id, spec, plan: planned.plan, folder, request_id };
        if request.validate_only {
            return Ok(Arc::new(driver::preview(&new)));
        }
        let written = write(new.clone(), planned.index).await;
        let kept = match written {
            Ok(()) => self.driver.create(new.clone()).await.map_err(Error::from),
            Err(error) => Err(error),
        };
        // A run the store may hold keeps its folder.
        let undo = match &kept {
            Ok(run) => run.name != format!("runs/{}", new.id),
            Err(Error::Driver(error)) => error.is_definite(),
            Err(_) => true,
        };
        if undo {
            remove(new.folder).await;
        }
        kept
    }

    async fn plan(&self, spec: RunSpec) -> Result<Planned, Error> {
        let planner = Arc::clone(&self.planner);
        let planned = surroundings::blocking(move || planner.plan(&spec)).await;
        planned.map_err(|_| Error::Ended("planning"))?.map_err(Error::Invalid)
    }
}

async fn write(new: NewRun, index: Option<Index>) -> Result<(), Error> {
    let written = surroundings::blocking(move || {
        new.folder.create()?;
        if let Some(index) = index {
            index.save(&new.folder.path().join("data")).map_err(Error::Index)?;
        }
        new.folder.write("spec.yaml", text::to_yaml(&pb::RunSpec::from(&new.spec)).as_bytes())?;
        new.folder.write("plan.json", text::to_json(&pb::Plan::from(&new.plan)).as_bytes())?;
        Ok(())
    });
    written.await.map_err(|_| Error::Ended("writing the run's folder"))?
}

async fn remove(folder: RunFolder) {
    let path = folder.path().to_owned();
    match surroundings::blocking(move || folder.remove()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(error = &error as &dyn std::error::Error, "a refused run's folder is left"),
        Err(_) => tracing::warn!(path = %path.display(), "a refused run's folder is left"),
    }
}

/// The spec's name and eight hex digits.
fn new_run_id(spec: &RunSpec) -> RunId {
    let digits = surroundings::uuid().simple().to_string();
    RunId(format!("{}-{}", spec.name, &digits[..8]))
}
