//! Clients that watch a run, leave in the middle, and go on elsewhere from the revision they have seen.

use super::super::Failure;
use super::cluster::DEADLINE;
use super::count;
use super::faults::Draw;
use super::outcome::Report;
use super::requests::compact;
use super::rows::{Goal, Row};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use thaw_proto::pb;
use thaw_proto::pb::run_service_client::RunServiceClient;
use thaw_proto::pb::watch_run_response::Update;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

/// Before another coordinator is asked, where one does not answer.
const AGAIN: Duration = Duration::from_millis(50);
/// Longest that a watch is kept open: what it may hold back is seen by the next.
const STAY: Duration = Duration::from_secs(2);
/// Until a coordinator has answered.
const ANSWER: Duration = Duration::from_secs(10);
/// Messages read before leaving, at most.
const MOST: usize = 3;
/// From one compaction of etcd to the next.
const COMPACT_EVERY: Duration = Duration::from_millis(500);

type Runs = RunServiceClient<Channel>;
/// Each event in words, and how often it was seen.
type Events = BTreeMap<String, usize>;

/// What one client saw.
#[derive(Debug, Default)]
struct Seen {
    events: Events,
    resumed: usize,
    /// Of a coordinator that refused to go on from a revision.
    refused: Option<String>,
}

/// All of them, of one run.
pub(super) struct Watchers {
    name: String,
    since: u64,
    runs: Vec<Runs>,
    clients: Vec<JoinHandle<Seen>>,
    compacting: JoinHandle<()>,
}

impl Watchers {
    /// Starts `clients` on a run that was just made, while the etcd at `etcd` forgets its history again and again.
    pub(super) fn start(
        clients: usize,
        run: &pb::Run,
        addresses: &[String],
        etcd: &str,
        mut draw: Draw,
    ) -> Result<Self, Failure> {
        let connect = |address: &String| {
            let endpoint = Endpoint::from_shared(format!("http://{address}"))
                .map_err(|error| Failure::invalid(format!("{address} is no address: {error}")))?;
            Ok(Runs::new(endpoint.connect_timeout(ANSWER).timeout(ANSWER).connect_lazy()))
        };
        let runs = addresses.iter().map(connect).collect::<Result<Vec<_>, Failure>>()?;
        let (name, since) = (run.name.clone(), run.revision);
        let start = |_| {
            let (name, runs, draw) = (name.clone(), runs.clone(), Draw::new(draw.next()));
            tokio::spawn(watch(name, since, runs, draw))
        };
        let clients = (0..clients).map(start).collect();
        let compacting = tokio::spawn(compact_again(etcd.to_owned()));
        Ok(Self { name, since, runs, clients, compacting })
    }

    /// Once the run has ended.
    pub(super) async fn finish(self, report: &mut Report) -> Result<(), Failure> {
        let mut all = Vec::new();
        for client in self.clients {
            let seen = tokio::time::timeout(DEADLINE, client).await;
            let seen = seen.map_err(|_| Failure::failed("a watch did not see the run's end in time"))?;
            all.push(seen.map_err(|error| Failure::from_error(&error))?);
        }
        self.compacting.abort();
        let happened = everything(&self.runs, &self.name, self.since).await?;
        let less = |a: &Events, b: &Events| -> usize {
            a.iter().map(|(event, times)| times.saturating_sub(b.get(event).copied().unwrap_or(0))).sum()
        };
        let missed: Vec<usize> = all.iter().map(|seen| less(&happened, &seen.events)).collect();
        let repeated: Vec<usize> = all.iter().map(|seen| less(&seen.events, &happened)).collect();
        let resumed: usize = all.iter().map(|seen| seen.resumed).sum();
        for (name, found) in [("missed", &missed), ("repeated", &repeated)] {
            let values = found.iter().copied().map(count).collect();
            let row = Row::new(format!("watch.{name}"), values, Goal::AtMost(0.0));
            report.row(row.with("events", happened.values().sum::<usize>()).with("resumed", resumed));
            let sum: usize = found.iter().sum();
            if sum > 0 {
                report.problems.push(format!("watches that were resumed have {name} {sum} events"));
            }
        }
        report.problems.extend(all.into_iter().filter_map(|seen| seen.refused));
        Ok(())
    }
}

/// Watches to the run's end.
async fn watch(name: String, since: u64, mut runs: Vec<Runs>, mut draw: Draw) -> Seen {
    let (mut seen, mut revision) = (Seen::default(), since);
    loop {
        let coordinator = draw.below(runs.len());
        let request = pb::WatchRunRequest { name: name.clone(), after_revision: revision, include_progress: false };
        let mut updates = match runs[coordinator].watch_run(request).await {
            Ok(updates) => updates.into_inner(),
            Err(refused) if matches!(refused.code(), Code::FailedPrecondition | Code::OutOfRange | Code::Aborted) => {
                seen.refused = Some(format!("a watch from revision {revision} is refused: {}", refused.message()));
                return seen;
            }
            Err(_) => {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
        };
        seen.resumed += 1;
        let leave = Instant::now() + STAY;
        for _ in 0..=draw.below(MOST) {
            let message = tokio::time::timeout_at(leave.into(), updates.message()).await;
            let Ok(Ok(Some(pb::WatchRunResponse { update: Some(Update::Run(run)), events }))) = message else { break };
            revision = revision.max(run.revision);
            for event in events {
                *seen.events.entry(format!("{event:?}")).or_default() += 1;
            }
            if super::follow::has_ended(&run) {
                return seen;
            }
        }
    }
}

/// Every event of a run that has ended, since a revision.
async fn everything(runs: &[Runs], name: &str, since: u64) -> Result<Events, Failure> {
    let request = pb::WatchRunRequest { name: name.to_owned(), after_revision: since, include_progress: false };
    let mut events = Events::new();
    let mut runs = runs.first().cloned().ok_or_else(|| Failure::failed("there is no coordinator"))?;
    let mut updates = runs.watch_run(request).await?.into_inner();
    while let Some(message) = updates.message().await? {
        for event in message.events {
            *events.entry(format!("{event:?}")).or_default() += 1;
        }
    }
    Ok(events)
}

/// Until it is aborted. An etcd that is not there now is again later.
async fn compact_again(etcd: String) {
    loop {
        let _ = compact(&etcd).await;
        tokio::time::sleep(COMPACT_EVERY).await;
    }
}
