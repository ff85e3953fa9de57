//! A user of the cluster: submits runs, some twice, looks at them through any coordinator, and acts on them. What was answered is
//! held against the store.

use crate::dice::Dice;
use crate::net::{PORT, dial};
use crate::world::World;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use thaw_proto::pb;
use thaw_proto::pb::run_service_client::RunServiceClient;
use thaw_proto::run::RunState;
use thaw_runtime::surroundings;
use tokio::time::{sleep, timeout};
use tonic::transport::{Channel, Endpoint};

const CALL_LIMIT: Duration = Duration::from_secs(8);

pub(crate) struct User {
    pub(crate) world: World,
    pub(crate) dice: Dice,
    pub(crate) coordinators: u64,
    pub(crate) specs: Vec<(pb::RunSpec, Duration)>,
    /// From then on it wants every run to end.
    pub(crate) calm: Arc<AtomicBool>,
    /// Highest revision of a run that somebody acknowledged.
    pub(crate) acknowledged: BTreeMap<String, u64>,
}

impl User {
    /// Acts for as long as the simulation lasts.
    pub(crate) async fn act(mut self) {
        for (spec, wait) in std::mem::take(&mut self.specs) {
            sleep(wait).await;
            self.create(spec).await;
        }
        loop {
            sleep(self.dice.millis(150..2500)).await;
            let count = self.acknowledged.len() as u64;
            if count == 0 {
                return;
            }
            let at = usize::try_from(self.dice.below(count)).unwrap_or(0);
            let Some(name) = self.acknowledged.keys().nth(at).cloned() else { return };
            match self.dice.below(100) {
                0..=3 if !self.is_calm() => self.change(&name, "cancel").await,
                4..=15 if !self.is_calm() => self.change(&name, "suspend").await,
                16..=31 if !self.is_calm() => self.scale(&name).await,
                32..=54 => self.change(&name, "resume").await,
                _ => self.look(&name).await,
            }
        }
    }

    fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    fn coordinator(&mut self) -> u64 {
        self.dice.below(self.coordinators)
    }

    async fn client(&self, coordinator: u64) -> Option<RunServiceClient<Channel>> {
        let endpoint = Endpoint::from_shared(format!("http://c{coordinator}:{PORT}")).ok()?;
        let channel = timeout(CALL_LIMIT, dial().connect(&endpoint)).await.ok()?.ok()?;
        Some(RunServiceClient::new(channel))
    }

    /// Submits until it is acknowledged.
    async fn create(&mut self, spec: pb::RunSpec) {
        let request_id = surroundings::uuid().to_string();
        let mut first: Option<String> = None;
        let mut times = 1 + self.dice.below(3);
        while times > 0 {
            let coordinator = self.coordinator();
            let request =
                pb::CreateRunRequest { spec: Some(spec.clone()), request_id: request_id.clone(), validate_only: false };
            let answer = match self.client(coordinator).await {
                Some(mut client) => timeout(CALL_LIMIT, client.create_run(request)).await.ok(),
                None => None,
            };
            match answer {
                Some(Ok(run)) => {
                    times -= 1;
                    let run = run.into_inner();
                    self.answered("create", &run);
                    let name = first.get_or_insert_with(|| run.name.clone());
                    if *name != run.name {
                        self.world.violated("SERVER-4", format!("one submission made {name} and {}", run.name));
                    }
                }
                Some(Err(status)) if status.code() == tonic::Code::InvalidArgument => {
                    self.world.violated("SERVER-4", format!("a good spec is refused: {status:?}"));
                    return;
                }
                Some(Err(_)) | None => sleep(self.dice.millis(100..800)).await,
            }
        }
    }

    /// What was answered as done has to be in the store.
    fn answered(&mut self, what: &str, run: &pb::Run) {
        self.world.say(format!("user: {what} {} is answered", run.name.rsplit('-').nth(1).unwrap_or("")));
        let id = run.name.trim_start_matches("runs/");
        let stored = self.world.stored(id);
        if stored.is_none_or(|(_, revision)| revision < run.revision) {
            self.world
                .violated("DRIVE-1", format!("{what} of {id} is answered at {}, stored: {stored:?}", run.revision));
        }
        let known = self.acknowledged.entry(id.to_owned()).or_default();
        *known = run.revision.max(*known);
    }

    async fn change(&mut self, id: &str, what: &'static str) {
        let coordinator = self.coordinator();
        let Some(mut client) = self.client(coordinator).await else { return };
        let name = format!("runs/{id}");
        let calling = async {
            match what {
                "cancel" => client.cancel_run(pb::CancelRunRequest { name }).await,
                "suspend" => client.suspend_run(pb::SuspendRunRequest { name }).await,
                _ => client.resume_run(pb::ResumeRunRequest { name }).await,
            }
        };
        if let Ok(Ok(run)) = timeout(CALL_LIMIT, calling).await {
            let run = run.into_inner();
            self.answered(what, &run);
            // It wins, so no later state can be another.
            if what == "cancel" && self.world.stored(id).map(|(state, _)| state) != Some(RunState::Cancelled) {
                self.world.violated("RUN-4", format!("{id} was acknowledged as cancelled and is not"));
            }
        }
    }

    /// To any size, also to one that the run cannot have.
    async fn scale(&mut self, id: &str) {
        let Some((min, max)) = self.world.workload(id).map(|workload| workload.workers) else { return };
        let workers = u32::try_from(self.dice.below(u64::from(max) + 3)).unwrap_or(0);
        let coordinator = self.coordinator();
        let Some(mut client) = self.client(coordinator).await else { return };
        let request = pb::ScaleRunRequest { name: format!("runs/{id}"), workers };
        match timeout(CALL_LIMIT, client.scale_run(request)).await {
            Ok(Ok(run)) => {
                if !(min..=max).contains(&workers) {
                    self.world.violated("RUN-11", format!("{id} of {min}-{max} trainers is scaled to {workers}"));
                }
                self.answered("scale", &run.into_inner());
            }
            Ok(Err(status)) if status.code() == tonic::Code::InvalidArgument && (min..=max).contains(&workers) => {
                self.world
                    .violated("RUN-11", format!("{id} of {min}-{max} trainers is not scaled to {workers}: {status}"));
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }

    async fn look(&mut self, id: &str) {
        let coordinator = self.coordinator();
        let Some(mut client) = self.client(coordinator).await else { return };
        let before = self.acknowledged.get(id).copied().unwrap_or(0);
        let request = pb::GetRunRequest { name: format!("runs/{id}") };
        match timeout(CALL_LIMIT, client.get_run(request)).await {
            Ok(Ok(run)) => {
                let seen = run.into_inner().revision;
                if seen < before {
                    self.world.violated("GRPC-2", format!("{id} is shown at {seen}, {before} was acknowledged before"));
                }
                let stored = self.world.stored(id);
                if stored.is_none_or(|(_, revision)| revision < seen) {
                    self.world.violated("VIEW-1", format!("{id} is shown at {seen}, stored: {stored:?}"));
                }
                self.acknowledged.insert(id.to_owned(), seen.max(before));
            }
            Ok(Err(status)) if status.code() == tonic::Code::NotFound => {
                self.world.violated("GRPC-2", format!("{id} is not found by c{coordinator}"));
            }
            Ok(Err(_)) | Err(_) => {}
        }
    }
}
