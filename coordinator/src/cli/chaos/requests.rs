//! What clients wait for without any fault, and what a run costs etcd.

use super::super::Failure;
use super::super::client::{self, Again};
use super::cluster::{Cluster, DEADLINE, leading, voices};
use super::outcome::Report;
use super::processes::POLL;
use super::rows::{Goal, Row};
use super::{count, say};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use thaw_proto::pb::{self, RunState};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Of one submission.
const SENT: usize = 100;
/// Runs that wait while their bytes are counted.
const WAITING: usize = 30;
/// Of a run that trains.
const STEADY: Duration = Duration::from_secs(10);
/// Runs that are cancelled while they train.
const CANCELLED: usize = 5;
const KIB: f64 = 1024.0;

pub(super) async fn measure(cluster: &Cluster, spec: &pb::RunSpec, report: &mut Report) -> Result<(), Failure> {
    say("requests");
    let first = create(cluster, spec, report).await?;
    until(cluster, &first, RunState::Running).await?;
    let steady = writes(cluster).await?;
    report.row(Row::new("etcd_writes", vec![steady], Goal::AtMost(1.0)).with("unit", "writes/s/run"));
    bytes(cluster, spec, report).await?;
    let (mut told, mut freed) = (Vec::new(), Vec::new());
    let mut run = first;
    for round in 0..CANCELLED {
        if round > 0 {
            run = client::submit(&mut cluster.client()?, spec.clone()).await?;
            until(cluster, &run, RunState::Running).await?;
        }
        let began = Instant::now();
        cancel(cluster, &run).await?;
        told.push(began.elapsed().as_secs_f64());
        all_free(cluster).await?;
        freed.push(began.elapsed().as_secs_f64());
    }
    report.row(Row::new("cancel", told, Goal::P99(0.1)).with("unit", "s"));
    report.row(Row::new("cancel.slots_free", freed, Goal::P99(5.0)).with("unit", "s"));
    Ok(())
}

/// The same submission many times.
async fn create(cluster: &Cluster, spec: &pb::RunSpec, report: &mut Report) -> Result<pb::Run, Failure> {
    let request_id = uuid::Uuid::new_v4().to_string();
    let request = pb::CreateRunRequest { spec: Some(spec.clone()), request_id, validate_only: false };
    let mut coordinators = cluster.client()?;
    let (mut times, mut names, mut first) = (Vec::new(), BTreeSet::new(), None);
    for _ in 0..SENT {
        let began = Instant::now();
        let run = coordinators.call(Again::Yes, async |mut runs| runs.create_run(request.clone()).await).await?;
        times.push(began.elapsed().as_secs_f64());
        names.insert(run.name.clone());
        first.get_or_insert(run);
    }
    let listed = client::list(&mut coordinators).await?.runs.len();
    report.row(Row::new("create_run", times, Goal::None).with("runs", listed).with("unit", "s"));
    if names.len() != 1 || listed != 1 {
        report.problems.push(format!("{SENT} submissions with one request_id made {listed} runs"));
    }
    first.ok_or_else(|| Failure::failed("nothing was submitted"))
}

async fn until(cluster: &Cluster, run: &pb::Run, state: RunState) -> Result<(), Failure> {
    let mut coordinators = cluster.client()?;
    let request = pb::GetRunRequest { name: run.name.clone() };
    let end = Instant::now() + DEADLINE;
    loop {
        let seen = coordinators.call(Again::Yes, async |mut runs| runs.get_run(request.clone()).await).await?;
        if seen.state() == state {
            return Ok(());
        }
        if super::follow::has_ended(&seen) || Instant::now() > end {
            let (name, now, wanted) = (&run.name, seen.state().as_str_name(), state.as_str_name());
            return Err(Failure::failed(format!("{name} is {now} instead of {wanted}: {}", seen.message)));
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn cancel(cluster: &Cluster, run: &pb::Run) -> Result<(), Failure> {
    let request = pb::CancelRunRequest { name: run.name.clone() };
    let call = async |mut runs: client::Runs| runs.cancel_run(request.clone()).await;
    cluster.client()?.call(Again::Yes, call).await.map(drop)
}

async fn all_free(cluster: &Cluster) -> Result<(), Failure> {
    let voices = voices(&cluster.addresses())?;
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some((_, workers)) = leading(&voices).await
            && workers.len() == cluster.workers()
            && workers.iter().all(|worker| worker.free_slots == worker.slots)
        {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(Failure::failed("the slots of a cancelled run are not free in time"));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Keys written a second while one run trains.
async fn writes(cluster: &Cluster) -> Result<f64, Failure> {
    let read = async || metric(cluster, &["etcd_mvcc_put_total", "etcd_debugging_mvcc_put_total"]).await;
    let (before, began) = (read().await?, Instant::now());
    tokio::time::sleep(STEADY).await;
    Ok((read().await? - before) / began.elapsed().as_secs_f64())
}

/// What runs that wait, and runs that have ended, hold in etcd, once it has forgotten their history.
async fn bytes(cluster: &Cluster, spec: &pb::RunSpec, report: &mut Report) -> Result<(), Failure> {
    let before = live_bytes(cluster).await?;
    let mut coordinators = cluster.client()?;
    let mut waiting = Vec::new();
    for _ in 0..WAITING {
        waiting.push(client::submit(&mut coordinators, spec.clone()).await?);
    }
    let live = (live_bytes(cluster).await? - before) / count(WAITING);
    let mut told = Vec::new();
    for run in &waiting {
        let began = Instant::now();
        cancel(cluster, run).await?;
        told.push(began.elapsed().as_secs_f64());
    }
    let ended = (live_bytes(cluster).await? - before) / count(WAITING);
    report.row(Row::new("etcd_bytes.live_run", vec![live], Goal::AtMost(64.0 * KIB)).with("unit", "B"));
    let goal = Goal::AtMost(100.0 * KIB * KIB / 10_000.0);
    report.row(Row::new("etcd_bytes.ended_run", vec![ended], goal).with("unit", "B"));
    report.row(Row::new("cancel.waiting", told, Goal::P99(0.1)).with("unit", "s"));
    Ok(())
}

/// Bytes in use once the history is gone, and two looks in a row agree.
async fn live_bytes(cluster: &Cluster) -> Result<f64, Failure> {
    compact(cluster.etcd_address()).await.map_err(|error| Failure::from_error(&error))?;
    let end = Instant::now() + DEADLINE;
    let mut last = f64::NAN;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = metric(cluster, &["etcd_mvcc_db_total_size_in_use_in_bytes"]).await?;
        if now == last || Instant::now() > end {
            return Ok(now);
        }
        last = now;
    }
}

async fn metric(cluster: &Cluster, names: &[&str]) -> Result<f64, Failure> {
    let text = metrics(cluster.etcd_address()).await.map_err(|error| Failure::from_error(&error))?;
    let find = |name: &&str| {
        let line = text.lines().find_map(|line| line.strip_prefix(*name)?.strip_prefix(' '))?;
        line.trim().parse::<f64>().ok()
    };
    let missing = || Failure::failed(format!("etcd shows none of {}", names.join(", ")));
    names.iter().find_map(find).ok_or_else(missing)
}

/// Forgets the history of etcd up to now.
pub(super) async fn compact(address: &str) -> Result<(), etcd_client::Error> {
    let mut client = etcd_client::Client::connect([address], None).await?;
    let revision = client.get("none", None).await?.header().map_or(0, etcd_client::ResponseHeader::revision);
    client.compact(revision, None).await.map(drop)
}

/// What etcd says of itself, as text.
async fn metrics(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}
