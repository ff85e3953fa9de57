//! What clients wait for without any fault, and what a run costs etcd, by etcd's own word: keys put, and bytes in use
//! once the history is gone.

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
/// Short runs that train to their end.
const FINISHED: usize = 96;
const STEPS: u32 = 30;
/// So many as these are then put beside them.
const COPIES: usize = 10_000;
/// What etcd may hold of them.
const COPIES_BYTES: f64 = 100.0 * KIB * KIB;
/// Runs copied in one transaction, of which etcd takes 128 operations.
const COPIED_AT_ONCE: usize = 50;
/// Runs that are cancelled while they train.
const CANCELLED: usize = 5;
const KIB: f64 = 1024.0;

pub(super) async fn measure(cluster: &Cluster, spec: &pb::RunSpec, report: &mut Report) -> Result<(), Failure> {
    say("requests");
    let before = live_bytes(cluster).await?;
    let first = create(cluster, spec, report).await?;
    let workers = until_whole(cluster, &first).await?;
    let steady = writes(cluster).await?;
    let row = Row::new("etcd_writes", vec![steady], Goal::AtMost(1.0)).with("unit", "writes/s/run");
    report.row(row.with("workers", workers).with("seconds", STEADY.as_secs()));
    let live = live_bytes(cluster).await? - before;
    let row = Row::new("etcd_bytes.live_run", vec![live], Goal::AtMost(64.0 * KIB)).with("unit", "B");
    report.row(row.with("workers", workers));
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
    finished(cluster, spec, report).await
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

/// Waits until a run trains with as many trainers as it wants; how many those are.
async fn until_whole(cluster: &Cluster, run: &pb::Run) -> Result<u32, Failure> {
    let mut coordinators = cluster.client()?;
    let request = pb::GetRunRequest { name: run.name.clone() };
    let end = Instant::now() + DEADLINE;
    loop {
        let seen = coordinators.call(Again::Yes, async |mut runs| runs.get_run(request.clone()).await).await?;
        let wanted = seen.wanted_world_size.min(u32::try_from(cluster.workers()).unwrap_or(u32::MAX));
        if seen.state() == RunState::Running && seen.world_size == wanted {
            return Ok(wanted);
        }
        if super::follow::has_ended(&seen) || Instant::now() > end {
            let (name, size) = (&run.name, seen.world_size);
            return Err(Failure::failed(format!("{name} trains with {size} instead of {wanted}: {}", seen.message)));
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

/// What runs that wait, and those that are cancelled then, hold in etcd.
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
    let rows = [("etcd_bytes.waiting_run", live, 64.0 * KIB), ("etcd_bytes.cancelled_run", ended, of_one())];
    for (name, bytes, most) in rows {
        report.row(Row::new(name, vec![bytes], Goal::AtMost(most)).with("runs", WAITING).with("unit", "B"));
    }
    report.row(Row::new("cancel.waiting", told, Goal::P99(0.1)).with("unit", "s"));
    Ok(())
}

fn of_one() -> f64 {
    COPIES_BYTES / count(COPIES)
}

/// What [`COPIES`] short runs of one trainer hold in etcd once they have succeeded, with their results, checkpoints, events and request ids:
/// the values of [`FINISHED`] ones under other keys, where no coordinator sees them. Fewer would measure etcd's pages.
async fn finished(cluster: &Cluster, spec: &pb::RunSpec, report: &mut Report) -> Result<(), Failure> {
    let mut short = spec.clone();
    short.until = Some(pb::Until { max_steps: Some(STEPS), ..Default::default() });
    short.workers = Some(pb::Workers { min: Some(1), max: Some(1), ..short.workers.unwrap_or_default() });
    short.checkpoint.get_or_insert_default().save_steps = Some(STEPS / 3);
    let mut coordinators = cluster.client()?;
    let mut runs = Vec::new();
    for _ in 0..FINISHED {
        runs.push(client::submit(&mut coordinators, short.clone()).await?);
    }
    for run in &runs {
        until(cluster, run, RunState::Succeeded).await?;
    }
    let before = live_bytes(cluster).await?;
    let names: Vec<String> = runs.into_iter().map(|run| run.name).collect();
    let put = put_copies(cluster.etcd_address(), &names).await.map_err(|error| Failure::from_error(&error))?;
    if put < COPIES {
        return Err(Failure::failed(format!(
            "{put} of {COPIES} runs were copied: etcd does not have them where they should be"
        )));
    }
    let all = live_bytes(cluster).await? - before;
    let row = Row::new("etcd_bytes.finished_runs", vec![all], Goal::AtMost(COPIES_BYTES));
    report.row(row.with("runs", put).with("unit", "B"));
    Ok(())
}

/// The values of `names` in turn, with a request id each; how many.
async fn put_copies(address: &str, names: &[String]) -> Result<usize, etcd_client::Error> {
    let mut client = etcd_client::Client::connect([address], None).await?;
    let mut values = Vec::new();
    for name in names {
        let read = client.get(format!("thaw/{name}"), None).await?;
        values.extend(read.kvs().first().map(|pair| (name, pair.value().to_vec())));
    }
    let one = etcd_client::GetOptions::new().with_prefix().with_limit(1);
    let read = client.get("thaw/requests/", Some(one)).await?;
    let request = read.kvs().first().map(|pair| pair.value().to_vec()).unwrap_or_default();
    let all: Vec<(usize, &(&String, Vec<u8>))> = values.iter().cycle().take(COPIES).enumerate().collect();
    for some in all.chunks(COPIED_AT_ONCE) {
        let puts = some.iter().flat_map(|(index, (name, value))| {
            let run = etcd_client::TxnOp::put(format!("copies/{name}-{index}"), value.clone(), None);
            let id = uuid::Uuid::new_v4();
            [run, etcd_client::TxnOp::put(format!("copies/requests/{id}"), request.clone(), None)]
        });
        client.txn(etcd_client::Txn::new().and_then(puts.collect::<Vec<_>>())).await?;
    }
    Ok(all.len())
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
    match client.compact(revision, None).await {
        // Nothing was written since it was forgotten last.
        Err(etcd_client::Error::GRpcStatus(status)) if status.code() == tonic::Code::OutOfRange => Ok(()),
        compacted => compacted.map(drop),
    }
}

/// What etcd says of itself, as text.
async fn metrics(address: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::cli::chaos::cluster::start_etcd;

    /// A cluster at rest is looked at as one that works.
    #[tokio::test]
    async fn an_etcd_that_nothing_is_written_to_is_compacted_again() {
        if std::env::var_os("CI").is_none() && std::process::Command::new("etcd").arg("--version").output().is_err() {
            eprintln!("skipped: no etcd on the path (apt install etcd-server)");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (mut etcd, address) = start_etcd(folder.path(), "127.0.0.1:0").await.unwrap();
        let mut client = etcd_client::Client::connect([&address], None).await.unwrap();
        client.put("a", "1", None).await.unwrap();
        for _ in 0..3 {
            compact(&address).await.unwrap();
        }
        client.put("a", "2", None).await.unwrap();
        compact(&address).await.unwrap();
        let text = metrics(&address).await.unwrap();
        assert!(text.contains("etcd_mvcc_db_total_size_in_use_in_bytes "), "{text}");
        etcd.kill().await;
    }
}
