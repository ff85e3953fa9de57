//! What thousands of workers cost one coordinator, how fast it forms their gang, and how they come back after its end.

use crate::cluster::{Cluster, DEADLINE, peak_memory, processor_seconds};
use crate::rows::Row;
use crate::worker::{Settings, What, Word, Worker};
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use thaw_proto::pb;
use thaw_runtime::tasks::{OnError, Tasks};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

/// Samples of the data set: more than shards, also after what is held out.
const ROWS: usize = 8192;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Simulated workers of one slot each.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) workers: u32,
    /// Sizes of gangs, at most --workers. The last one trains while the rest is measured.
    #[arg(long, value_delimiter = ',', default_value = "1024,4096")]
    gangs: Vec<u32>,
    /// Gangs of each size.
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Seconds over which the leader's processor time is counted.
    #[arg(long, default_value_t = 60)]
    steady: u32,
    /// Times the leader is killed.
    #[arg(long, default_value_t = 5)]
    kills: u32,
    /// Milliseconds between heartbeats; 0: as the coordinator says.
    #[arg(long, default_value_t = 1000)]
    beat: u64,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=9))]
    coordinators: u32,
    /// Seconds after a leader's end in which no trainer may be disturbed. Default: as long as the next may still lose some.
    #[arg(long, default_value_t = 12)]
    settle: u64,
    /// The coordinator's program.
    #[arg(long, default_value = "target/debug/thaw")]
    thaw: PathBuf,
    #[arg(long, default_value = "etcd")]
    etcd: PathBuf,
    /// A folder with text.pt2 and texts.csv, as tests/fixtures/make.py makes it.
    #[arg(long)]
    fixtures: PathBuf,
    /// Where logs and runs go. Default: a folder that is removed.
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// The workers, and what they have said.
struct Fleet {
    /// Of each worker: the epoch of the leader that has taken it in.
    sessions: Vec<Option<u64>>,
    words: mpsc::UnboundedReceiver<Word>,
    tasks: Tasks,
    stop: CancellationToken,
    /// Sessions that ended while their leader lived.
    broken: Vec<String>,
}

/// Measures, prints a row each, and fails where a worker or trainer was lost without reason.
pub(crate) async fn measure(options: Options) -> Result<()> {
    for size in &options.gangs {
        ensure!((1..=options.workers).contains(size), "--gangs: {size} is not in 1-{} (--workers)", options.workers);
    }
    ensure!(options.kills == 0 || options.coordinators > 1, "--kills needs --coordinators of 2 or more");
    let own = tempfile::Builder::new().prefix("thaw-fleet-").tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| own.path().to_owned());
    fs::create_dir_all(&folder)?;
    let texts = texts(&options, &folder)?;
    let mut cluster = Cluster::start(&options.thaw, &options.etcd, options.coordinators, &folder).await?;
    let mut fleet = Fleet::start(&options, &cluster);
    let measured = measure_on(&options, &mut cluster, &mut fleet, &texts).await;
    fleet.stop().await;
    cluster.stop().await;
    measured
}

async fn measure_on(options: &Options, cluster: &mut Cluster, fleet: &mut Fleet, texts: &Path) -> Result<()> {
    let began = Instant::now();
    let (joined, _) = fleet.return_to(0, began).await?;
    Row::new("control_plane.join", vec![joined], None).with("workers", options.workers).with("unit", "s").print();
    let mut last: Option<(String, u32)> = None;
    for size in &options.gangs {
        let (mut whole, mut formed) = (Vec::new(), Vec::new());
        for _ in 0..options.rounds.max(1) {
            if let Some((run, size)) = last.take() {
                cancel(cluster, fleet, &run, size).await?;
            }
            let (run, gang) = form(cluster, fleet, &spec(options, texts, *size)?).await?;
            whole.push(gang.whole);
            formed.push(gang.formed);
            last = Some((run, *size));
        }
        let goal = match *size {
            4096 => Some(3.0),
            1024 => Some(1.0),
            _ => None,
        };
        let name = format!("control_plane.gang_{size}");
        Row::new(&name, whole, goal).with("unit", "s").print();
        Row::new(format!("{name}.from_first_start"), formed, None).with("unit", "s").print();
    }
    steady(options, cluster, fleet).await?;
    if options.kills > 0 {
        kills(options, cluster, fleet).await?;
    }
    ensure!(fleet.broken.is_empty(), "{} session(s) ended without reason, as: {}", fleet.broken.len(), fleet.broken[0]);
    Ok(())
}

struct Gang {
    /// From the answer to the submission until every trainer has heard that it may train, in seconds.
    whole: f64,
    /// As before, from the first trainer's start.
    formed: f64,
}

async fn form(cluster: &Cluster, fleet: &mut Fleet, spec: &pb::RunSpec) -> Result<(String, Gang)> {
    let size = spec.workers.unwrap_or_default().max();
    let mut runs = cluster.runs(cluster.leader().await?).await?;
    let request = pb::CreateRunRequest { spec: Some(spec.clone()), ..Default::default() };
    let created = runs.create_run(request).await.context("submit the run")?.into_inner();
    let began = Instant::now();
    let (mut first, mut commits, mut last) = (None, 0, began);
    while commits < size {
        let word = fleet.next().await.with_context(|| format!("{commits} of {size} trainers may train"))?;
        match word.what {
            What::Started { .. } => drop(first.get_or_insert(word.at)),
            What::Committed { generation, .. } => {
                ensure!(generation == 1, "the gang was formed again: generation {generation}");
                commits += 1;
                last = last.max(word.at);
            }
            What::Stopped { run } => bail!("a trainer of {run} was stopped while the gang formed"),
            What::Welcomed { .. } | What::Broken { .. } => {}
        }
    }
    let since = |from: Instant| last.saturating_duration_since(from).as_secs_f64();
    // The answer may take longer than the first start.
    let first = first.unwrap_or(began);
    Ok((created.name, Gang { whole: since(began.min(first)), formed: since(first) }))
}

async fn cancel(cluster: &Cluster, fleet: &mut Fleet, run: &str, size: u32) -> Result<()> {
    let mut runs = cluster.runs(cluster.leader().await?).await?;
    runs.cancel_run(pb::CancelRunRequest { name: run.to_owned() }).await.context("cancel the run")?;
    let mut stopped = 0;
    while stopped < size {
        let word = fleet.next().await.with_context(|| format!("{stopped} of {size} trainers are stopped"))?;
        stopped += u32::from(matches!(word.what, What::Stopped { .. }));
    }
    let end = Instant::now() + DEADLINE;
    let leader = cluster.leader().await?;
    while !cluster.workers(leader).await?.iter().all(|worker| worker.free_slots == worker.slots) {
        ensure!(Instant::now() < end, "the slots of a cancelled run are not free in time");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// The leader's processor time while a gang trains and nothing happens.
async fn steady(options: &Options, cluster: &Cluster, fleet: &mut Fleet) -> Result<()> {
    let id = cluster.id(cluster.leader().await?)?;
    // What the last gang left to do is done.
    sleep(Duration::from_secs(2)).await;
    fleet.drain();
    let (mut shares, began, first) = (Vec::new(), Instant::now(), processor_seconds(id)?);
    let (mut then, mut used) = (began, first);
    for _ in 0..options.steady {
        sleep(Duration::from_secs(1)).await;
        let (now, total) = (Instant::now(), processor_seconds(id)?);
        shares.push((total - used) / now.duration_since(then).as_secs_f64());
        (then, used) = (now, total);
    }
    let mean = (used - first) / then.duration_since(began).as_secs_f64();
    let lost = fleet.drain();
    let row = Row::new("control_plane.cpu", shares, Some(0.3)).with("mean", format!("{mean:.4}"));
    let row = row.with("workers", options.workers).with("heartbeat_ms", options.beat);
    row.with("peak_mib", peak_memory(id)?).with("false_deaths", lost).with("unit", "cores").print();
    ensure!(lost == 0, "{lost} trainer(s) were stopped or started while nothing happened");
    Ok(())
}

/// SIGKILL of the leader until every worker has a session with the next.
async fn kills(options: &Options, cluster: &mut Cluster, fleet: &mut Fleet) -> Result<()> {
    let (mut back, mut lost) = (Vec::new(), 0);
    for _ in 0..options.kills {
        let leader = cluster.leader().await?;
        let epoch = fleet.epoch()?;
        let began = Instant::now();
        cluster.kill(leader).await;
        let (seconds, disturbed) = fleet.return_to(epoch, began).await?;
        back.push(seconds);
        lost += disturbed;
        let next = cluster.leader().await?;
        wait_until_seen(options, cluster, next).await?;
        sleep(Duration::from_secs(options.settle)).await;
        lost += fleet.drain();
        cluster.start_coordinator(leader).await?;
    }
    let row = Row::new("control_plane.return", back, Some(10.0)).with("workers", options.workers);
    row.with("false_deaths", lost).with("unit", "s").print();
    ensure!(lost == 0, "{lost} trainer(s) were stopped or started, or formed a gang again, after a leader's end");
    Ok(())
}

/// Until the new leader shows every worker, and those of the gang with their run.
async fn wait_until_seen(options: &Options, cluster: &Cluster, leader: usize) -> Result<()> {
    let end = Instant::now() + DEADLINE;
    let gang = *options.gangs.last().context("--gangs is empty")? as usize;
    loop {
        let workers = cluster.workers(leader).await?;
        let busy = workers.iter().filter(|worker| !worker.runs.is_empty() && worker.free_slots == 0).count();
        if workers.len() == options.workers as usize && busy == gang {
            return Ok(());
        }
        ensure!(Instant::now() < end, "the new leader has {} workers, {busy} of them with a run", workers.len());
        sleep(Duration::from_millis(50)).await;
    }
}

impl Fleet {
    fn start(options: &Options, cluster: &Cluster) -> Self {
        let (sender, words) = mpsc::unbounded_channel();
        let beat = (options.beat > 0).then(|| Duration::from_millis(options.beat));
        let settings = Arc::new(Settings { coordinators: cluster.addresses(), beat, words: sender });
        let stop = CancellationToken::new();
        let tasks = Tasks::new(stop.clone());
        for index in 0..options.workers {
            let worker = Worker::new(index, Arc::clone(&settings));
            tasks.spawn(format!("worker {index}"), OnError::LogAndCount, move |token| async move {
                worker.run(token).await;
                Ok::<_, std::convert::Infallible>(())
            });
        }
        Self { sessions: vec![None; options.workers as usize], words, tasks, stop, broken: Vec::new() }
    }

    async fn stop(&mut self) {
        self.stop.cancel();
        if let Err(error) = self.tasks.join(DEADLINE).await {
            eprintln!("fleet: {error}");
        }
    }

    /// What is said next.
    async fn next(&mut self) -> Result<Word> {
        let word =
            timeout_at(Instant::now() + DEADLINE, self.words.recv()).await.context("nothing is heard any more")?;
        let word = word.context("all workers have ended")?;
        self.note(&word);
        Ok(word)
    }

    fn note(&mut self, word: &Word) {
        let session = &mut self.sessions[word.worker as usize];
        match &word.what {
            What::Welcomed { epoch } => *session = Some(*epoch),
            What::Broken { why } => {
                *session = None;
                self.broken.push(why.clone());
            }
            What::Started { .. } | What::Committed { .. } | What::Stopped { .. } => {}
        }
    }

    /// What has been said while nothing should have been: trainers that were started, stopped, or formed a gang again.
    fn drain(&mut self) -> u32 {
        let mut disturbed = 0;
        while let Ok(word) = self.words.try_recv() {
            self.note(&word);
            disturbed += u32::from(word.what.is_of_a_trainer());
        }
        disturbed
    }

    /// Seconds from `began` until every worker has a session with a leader above `epoch`; and how often a trainer was disturbed meanwhile.
    /// Sessions that end before that are none that count.
    async fn return_to(&mut self, epoch: u64, began: Instant) -> Result<(f64, u32)> {
        let (mut last, mut disturbed, broken) = (began, 0, self.broken.len());
        loop {
            let come = self.sessions.iter().filter(|session| session.is_some_and(|now| now > epoch)).count();
            if come == self.sessions.len() {
                self.broken.truncate(broken);
                return Ok((last.duration_since(began).as_secs_f64(), disturbed));
            }
            // As many words as are missing at least.
            for _ in come..self.sessions.len() {
                let all = self.sessions.len();
                let word = self.next().await.with_context(|| format!("{come} of {all} workers have come"))?;
                disturbed += u32::from(word.what.is_of_a_trainer());
                last = last.max(word.at);
            }
        }
    }

    /// The leader that all workers have a session with.
    fn epoch(&self) -> Result<u64> {
        let epochs: BTreeSet<Option<u64>> = self.sessions.iter().copied().collect();
        match epochs.into_iter().collect::<Vec<_>>().as_slice() {
            [Some(epoch)] => Ok(*epoch),
            several => bail!("the workers have sessions of several leaders, or none: {several:?}"),
        }
    }
}

/// The run spec of a gang of `size`.
fn spec(options: &Options, texts: &Path, size: u32) -> Result<pb::RunSpec> {
    let graph = fs::canonicalize(options.fixtures.join("text.pt2"))
        .with_context(|| format!("--fixtures {}: no text.pt2", options.fixtures.display()))?;
    let spec = json!({
        "name": "fleet",
        "backbone": {"graph": format!("file://{}", graph.display())},
        "data": {
            "train": {"path": format!("file://{}", texts.display()), "format": "csv", "text": "text", "label": "label"},
            "split": {"train": 0.9, "eval": 0.05, "test": 0.05},
            "max_length": 16,
        },
        "strategy": "full_fine_tuning",
        "global_batch_size": 4096,
        "workers": {"min": size, "max": size},
        "until": {"max_steps": 1_000_000},
        "prefix_cache": {"mode": "off"},
    });
    Ok(thaw_proto::text::parse_spec(&spec.to_string())?)
}

/// Texts enough for as many shards as a gang can have: the small set of the tests, over and over.
fn texts(options: &Options, folder: &Path) -> Result<PathBuf> {
    let path = options.fixtures.join("texts.csv");
    let small = fs::read_to_string(&path).with_context(|| format!("--fixtures: {}", path.display()))?;
    let (header, rows) = small.split_once('\n').context("texts.csv has no header")?;
    let mut large = format!("{header}\n");
    for (index, row) in rows.lines().filter(|row| !row.is_empty()).cycle().take(ROWS).enumerate() {
        // No text twice, so that none is left out.
        writeln!(large, "w{index} {row}")?;
    }
    let path = fs::canonicalize(folder)?.join("texts.csv");
    fs::write(&path, large)?;
    Ok(path)
}
