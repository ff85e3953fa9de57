//! The coordinator's driver and a real etcd under the workload of thaw-core's example `scheduler`, in virtual time:
//! every decision is saved as in production, by compare-and-set and fenced by the leader's key, and the agents answer
//! as agents do. Only the network between agents and coordinator is left out, and trainers have no tensors.
//!
//! `cargo run -p thaw-coordinator --example scheduler_over_etcd` prints how many decisions a second of the driver's
//! ticks makes, in which they are taken and saved; what the laws say; and how long all the rest took. It ends with 1
//! where a law was broken. It needs etcd on the path. `RUNS=N` takes another number of runs.

#[path = "../tests/common/mod.rs"]
#[allow(clippy::unwrap_used, reason = "it is the tests'")]
mod common;
#[path = "../core/examples/scheduler/workload.rs"]
#[allow(dead_code, reason = "the scheduler alone uses the rest")]
mod workload;

use anyhow::{Context as _, bail, ensure};
use common::cluster::OneStage;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};
use thaw_coordinator::driver::{self, Driver, MainLoop, NewRun, Outbox, SessionId};
use thaw_coordinator::folder::RunFolder;
use thaw_coordinator::intake::SpecPlanner as _;
use thaw_coordinator::leader::{self, Identity, Timing};
use thaw_coordinator::{journal, store, views};
use thaw_core::gang::FreeSlot;
use thaw_proto::ids::{Incarnation, RunId, Slot};
use thaw_proto::pb::coordinator_message::Message as Down;
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::pb::worker_message::Message as Up;
use thaw_proto::spec::{Priority, RunSpec};
use thaw_proto::{convert, pb};
use thaw_runtime::surroundings;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use workload::{Book, SLOTS, SLOTS_A_WORKER, TICK_MS, worker};

/// Of real time: below what a silent worker is given up after, many times.
const BEAT: Duration = Duration::from_millis(500);
/// Commands to one agent between two looks at them.
const OUTBOX: usize = 1 << 16;
/// Messages to the coordinator between two turns of its loop, whose queue holds more.
const AT_ONCE: usize = 1000;
/// Of virtual time: the Unix time at which it begins, so that no time is near 0.
const BEGIN_MS: u64 = 1_700_000_000_000;

fn main() -> anyhow::Result<ExitCode> {
    // One thread: it is the simulated one, whose wall clock is the virtual time.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure())
}

async fn measure() -> anyhow::Result<ExitCode> {
    let Some(etcd) = common::EtcdProcess::start_on_disk() else { bail!("etcd is not on the path") };
    let now_ms = Rc::new(Cell::new(BEGIN_MS));
    let clock = Rc::clone(&now_ms);
    let since_epoch = move || Duration::from_millis(clock.get());
    let wall = since_epoch.clone();
    let _simulated = surroundings::simulate(1, move || SystemTime::UNIX_EPOCH + wall(), since_epoch);
    // Run folders in memory where there is such a place: what is measured is the store.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir())?;
    let mut cluster = Cluster::start(&etcd.address, folder.path(), now_ms).await?;
    while !cluster.book.is_over() {
        cluster.round(folder.path()).await?;
    }
    cluster.report();
    report_bytes(bytes_in_use(&etcd.address).await?, cluster.book.runs());
    Ok(if cluster.book.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

struct Cluster {
    driver: Driver,
    coordinator: MainLoop,
    agents: Vec<Agent>,
    book: Book,
    /// Of the clock that the coordinator sees.
    now_ms: Rc<Cell<u64>>,
    beaten: Instant,
    took: Took,
}

/// The driver's real time.
#[derive(Default)]
struct Took {
    rounds: u32,
    ticks: Duration,
    longest_tick: Duration,
    submissions: Duration,
    /// Taking reports in: of trainers that are ready, gangs that are built, checkpoints, ends.
    reports: Duration,
}

struct Agent {
    session: SessionId,
    commands: mpsc::Receiver<Result<pb::CoordinatorMessage, tonic::Status>>,
    /// By slot.
    trainers: BTreeMap<u32, Trainer>,
}

#[derive(Debug, Clone)]
struct Trainer {
    run: String,
    incarnation: String,
    generation: u64,
    rank: u32,
}

impl Cluster {
    async fn start(etcd: &str, data_dir: &std::path::Path, now_ms: Rc<Cell<u64>>) -> anyhow::Result<Self> {
        let store = store::open(&format!("etcd://{etcd}/scheduler").parse()?).await?;
        let identity = Identity {
            name: "scheduler".to_owned(),
            address: "127.0.0.1:1".to_owned(),
            incarnation: Incarnation("scheduler".to_owned()),
        };
        // Nobody else stands, and one round may take longer than a term in production.
        let leadership = leader::campaign(store, &identity, Timing::alone(), |_| ()).await?;
        let fenced = leadership.fenced();
        tokio::spawn(leadership.keep());
        let book = Book::new();
        // Lines about runs are left out.
        let (journal, _) = journal::journal();
        let loaded = driver::load(fenced, views::Views::default(), journal, data_dir.to_owned(), book.shares.clone());
        let (driver, mut coordinator) = loaded.await?;
        let mut agents = Vec::new();
        for index in 0..SLOTS / SLOTS_A_WORKER {
            let (outbox, commands) = mpsc::channel(OUTBOX);
            let hello = pb::Hello {
                worker: worker(index).to_string(),
                incarnation: surroundings::uuid().to_string(),
                slots: SLOTS_A_WORKER,
                host: "127.0.0.1".to_owned(),
                trainers: Vec::new(),
            };
            let (session, handled) =
                tokio::join!(driver.open_session(hello, Outbox::new(outbox)), coordinator.handle_queued());
            handled?;
            agents.push(Agent { session: session?, commands, trainers: BTreeMap::new() });
        }
        Ok(Self { driver, coordinator, agents, book, now_ms, beaten: Instant::now(), took: Took::default() })
    }

    /// A tick of virtual time, and all that comes of it.
    async fn round(&mut self, data_dir: &std::path::Path) -> anyhow::Result<()> {
        self.submit(data_dir).await?;
        self.beat().await?;
        let done = self.book.work();
        let checkpoints = done.iter().map(|run| self.last_checkpoint(run)).collect();
        self.say(checkpoints).await?;
        self.settle(data_dir).await?;
        let began = Instant::now();
        let reclaim = self.coordinator.tick().await?;
        let elapsed = began.elapsed();
        self.took.rounds += 1;
        self.took.ticks += elapsed;
        self.took.longest_tick = self.took.longest_tick.max(elapsed);
        if let Some(reclaim) = &reclaim {
            self.book.reclaimed(reclaim, self.at_ms());
        }
        self.settle(data_dir).await?;
        self.book.check(self.at_ms());
        self.now_ms.set(self.now_ms.get() + TICK_MS);
        Ok(())
    }

    /// Virtual time since the beginning.
    fn at_ms(&self) -> u64 {
        self.now_ms.get() - BEGIN_MS
    }

    async fn submit(&mut self, data_dir: &std::path::Path) -> anyhow::Result<()> {
        let mut new = Vec::new();
        for run in self.book.arrive(self.at_ms()) {
            let spec = spec(&self.book, &run)?;
            let plan = OneStage.plan(&spec).map_err(|violations| anyhow::anyhow!("{violations}"))?.plan;
            let folder = RunFolder::of(&run, None, data_dir)?;
            let request_id = Some(surroundings::uuid().to_string());
            new.push(NewRun { id: run, spec, plan, folder, request_id });
        }
        let began = Instant::now();
        for new in new {
            let (created, handled) = tokio::join!(self.driver.create(new), self.coordinator.handle_queued());
            handled?;
            created?;
        }
        self.took.submissions += began.elapsed();
        Ok(())
    }

    /// Says that the agents live, where it is time to.
    async fn beat(&mut self) -> anyhow::Result<()> {
        if self.beaten.elapsed() < BEAT {
            return Ok(());
        }
        self.beaten = Instant::now();
        let beat = |(index, agent): (usize, &Agent)| {
            let trainers = agent.trainers.iter().map(|(slot, trainer)| pb::TrainerStatus {
                run: trainer.run.clone(),
                slot: *slot,
                incarnation: trainer.incarnation.clone(),
                generation: trainer.generation,
                position: None,
                pid: 1,
            });
            (index, Up::Heartbeat(pb::Heartbeat { trainers: trainers.collect() }))
        };
        let beats = self.agents.iter().enumerate().map(beat).collect();
        self.say(beats).await
    }

    /// Lets agents and coordinator talk until there is nothing to say.
    async fn settle(&mut self, data_dir: &std::path::Path) -> anyhow::Result<()> {
        loop {
            let mut answers = Vec::new();
            for index in 0..self.agents.len() {
                loop {
                    match self.agents[index].commands.try_recv() {
                        Ok(command) => {
                            let command = command?.message.context("a command says something")?;
                            answers.extend(self.answer(index, command, data_dir)?.map(|up| (index, up)));
                        }
                        Err(mpsc::error::TryRecvError::Empty) => break,
                        Err(mpsc::error::TryRecvError::Disconnected) => {
                            bail!("{} was given up", self.agents[index].session.worker)
                        }
                    }
                }
            }
            if answers.is_empty() {
                return Ok(());
            }
            self.say(answers).await?;
        }
    }

    async fn say(&mut self, messages: Vec<(usize, Up)>) -> anyhow::Result<()> {
        let began = Instant::now();
        let mut messages = messages.into_iter().peekable();
        while messages.peek().is_some() {
            for (agent, message) in messages.by_ref().take(AT_ONCE) {
                self.driver.from_worker(&self.agents[agent].session, message).await;
            }
            self.coordinator.handle_queued().await?;
        }
        self.took.reports += began.elapsed();
        Ok(())
    }

    /// What the trainer that a command is for says to it.
    fn answer(&mut self, agent: usize, command: Down, data_dir: &std::path::Path) -> anyhow::Result<Option<Up>> {
        let at_ms = self.at_ms();
        let worker = self.agents[agent].session.worker.clone();
        let place = |slot: u32| FreeSlot { worker: worker.clone(), slot: Slot(slot) };
        let trainers = &mut self.agents[agent].trainers;
        Ok(match command {
            Down::Welcome(_) | Down::Commit(_) | Down::Ping(_) => None,
            Down::Start(start) => {
                let run = RunId(start.run.clone());
                self.book.take(&run, [place(start.slot)], at_ms);
                let trainer = Trainer { run: start.run, incarnation: start.incarnation, generation: 0, rank: 0 };
                let address = format!("127.0.0.1:{}", 9000 + start.slot);
                let ready = Event::Ready(pb::TrainerReady { address, keeps_state: true });
                let report = report(start.slot, &trainer, ready);
                ensure!(trainers.insert(start.slot, trainer).is_none(), "a slot has two trainers");
                Some(report)
            }
            Down::Propose(propose) => find(trainers, propose.slot, &propose.incarnation).map(|trainer| {
                (trainer.generation, trainer.rank) = (propose.generation, propose.rank);
                report(propose.slot, trainer, Event::Built(pb::GangBuilt {}))
            }),
            Down::Committed(committed) => find(trainers, committed.slot, &committed.incarnation)
                .map(|trainer| report(committed.slot, trainer, Event::Finished(finished()))),
            Down::Suspend(suspend) => find(trainers, suspend.slot, &suspend.incarnation)
                .filter(|trainer| trainer.rank == 0)
                .map(|trainer| report(suspend.slot, trainer, Event::Suspended(pb::Suspended {}))),
            Down::Stop(stop) => {
                let Some(trainer) = find(trainers, stop.slot, &stop.incarnation).cloned() else { return Ok(None) };
                trainers.remove(&stop.slot);
                let run = RunId(trainer.run.clone());
                self.book.give(&run, &place(stop.slot), at_ms);
                if !self.book.jobs.contains_key(&run) {
                    // Thousands of reports would fill the memory.
                    RunFolder::of(&run, None, data_dir)?.remove()?;
                }
                Some(report(stop.slot, &trainer, Event::Exited(pb::TrainerExited { code: None, signal: Some(9) })))
            }
        })
    }

    /// What rank 0 says once the work is done; its answer is what lets the run end.
    fn last_checkpoint(&self, run: &RunId) -> (usize, Up) {
        let mut trainers = self
            .agents
            .iter()
            .enumerate()
            .flat_map(|(index, agent)| agent.trainers.iter().map(move |(slot, trainer)| (index, *slot, trainer)));
        let found = trainers.find(|(_, _, trainer)| trainer.run == run.as_str() && trainer.rank == 0);
        let (agent, slot, trainer) = found.expect("a run that works has a rank 0");
        (agent, report(slot, trainer, Event::Checkpoint(checkpoint(trainer.generation))))
    }

    #[expect(clippy::print_stdout, reason = "a measurement is its output")]
    fn report(&self) {
        let (took, decisions) = (&self.took, self.book.decisions());
        let rate = f64::from(decisions) / took.ticks.as_secs_f64();
        println!(
            "chaos scheduler_over_etcd p50={rate:.0} p99={rate:.0} n={decisions} goal=>=100 met={} unit=decisions/s rounds={} \
             longest_round_ms={} ticks_s={:.1} submissions_s={:.1} reports_s={:.1} {}",
            if rate >= 100.0 { "yes" } else { "no" },
            took.rounds,
            took.longest_tick.as_millis(),
            took.ticks.as_secs_f64(),
            took.submissions.as_secs_f64(),
            took.reports.as_secs_f64(),
            self.book.row(),
        );
    }
}

/// What etcd holds once the history is gone, by its own word, and two looks in a row agree.
async fn bytes_in_use(etcd: &str) -> anyhow::Result<f64> {
    const METRIC: &str = "etcd_mvcc_db_total_size_in_use_in_bytes ";
    common::compact(etcd.to_owned()).await;
    let mut last = None;
    for _ in 0..60 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let mut stream = TcpStream::connect(etcd).await?;
        stream.write_all(format!("GET /metrics HTTP/1.0\r\nHost: {etcd}\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        let found = text.lines().find_map(|line| line.strip_prefix(METRIC)).context("etcd does not show its size")?;
        let now: f64 = found.trim().parse()?;
        if last.replace(now) == Some(now) {
            return Ok(now);
        }
    }
    bail!("etcd is not done with its history")
}

#[expect(clippy::print_stdout, reason = "a measurement is its output")]
fn report_bytes(bytes: f64, runs: u32) {
    let goal = f64::from(runs) / 10_000.0 * 100.0 * 1024.0 * 1024.0;
    let met = if bytes <= goal { "yes" } else { "no" };
    println!(
        "chaos etcd_bytes.scheduled_runs p50={bytes:.0} p99={bytes:.0} n=1 goal=<={goal:.0} met={met} unit=B runs={runs}"
    );
}

fn find<'a>(trainers: &'a mut BTreeMap<u32, Trainer>, slot: u32, incarnation: &str) -> Option<&'a mut Trainer> {
    trainers.get_mut(&slot).filter(|trainer| trainer.incarnation == incarnation)
}

fn report(slot: u32, trainer: &Trainer, event: Event) -> Up {
    Up::Report(pb::TrainerReport {
        run: trainer.run.clone(),
        slot,
        incarnation: trainer.incarnation.clone(),
        generation: trainer.generation,
        event: Some(event),
    })
}

fn spec(book: &Book, run: &RunId) -> anyhow::Result<RunSpec> {
    let job = &book.jobs[run];
    let priority = match job.class.priority {
        Priority::Low => pb::Priority::Low,
        Priority::Normal => pb::Priority::Normal,
        Priority::High => pb::Priority::High,
    };
    let mut raw = common::cluster::spec("run", job.class.min);
    // One sample each, at least.
    raw.global_batch_size = job.class.max;
    raw.logical_shards = Some(job.class.max);
    raw.workers.get_or_insert_default().max = Some(job.class.max);
    raw.scheduling = Some(pb::Scheduling { tenant: job.tenant.clone(), priority: priority.into() });
    convert::spec::check(&raw).map_err(|violations| anyhow::anyhow!("{violations}"))
}

fn position() -> pb::Position {
    pb::Position { stage: 0, stage_step: 1, step: 1 }
}

fn checkpoint(generation: u64) -> pb::CheckpointWritten {
    pb::CheckpointWritten {
        checkpoint: Some(pb::CheckpointRef {
            position: Some(position()),
            generation,
            manifest: "manifests/00000001-0000000001.json".to_owned(),
            manifest_blake3: "0".repeat(64),
        }),
    }
}

fn finished() -> pb::RunFinished {
    let best = pb::Evaluation {
        position: Some(position()),
        loss: 0.25,
        accuracy: 0.75,
        macro_f1: 0.5,
        samples: 4,
        confusion: vec![2, 1, 0, 1],
    };
    let result = pb::RunResult {
        test: Some(best.clone()),
        best: Some(best),
        weights_blake3: "0".repeat(64),
        model: "file:///model/".to_owned(),
        steps: 1,
        seconds: 2.0,
    };
    pb::RunFinished { result: Some(result), reason: pb::RunReason::LastStageEnded.into() }
}
