//! The agent between a coordinator that the test plays and real trainer processes: this test program, started again as
//! [`fake_trainer`].

use super::*;
use crate::collective::{Record, Ring};
use crate::host_snapshot::HostSnapshot;
use std::collections::VecDeque;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use thaw_core::survivors::Snapshot;
use thaw_proto::ids::{Generation, Step};
use thaw_proto::pb::coordinator_message::Message as Down;
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::pb::worker_message::Message as Up;
use thaw_proto::pb::worker_service_server::{WorkerService, WorkerServiceServer};
use thaw_proto::pb::{
    self, CollectiveKind, Commit, CoordinatorMessage, GangBuilt, Hello, Position, Progress, Propose, StartTrainer,
    StopTrainer, SuspendTrainer, Suspended, TrainerFailed, TrainerReady, TrainerReport, Welcome, WorkerMessage,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

/// Far above what any of this takes; a test that needs it has failed.
const SOON: Duration = Duration::from_secs(30);

/// Not a test: the program that the agents of these tests start. Frames leave by descriptor 3, since the test harness owns
/// stdout. It does what the run's name says.
#[test]
#[ignore = "it is the trainer process of other tests"]
fn fake_trainer() {
    crate::pipe::die_with_parent().unwrap();
    let frames = std::fs::File::options().write(true).open("/proc/self/fd/3").unwrap();
    let (pipe, messages) = crate::pipe::TrainerPipe::start(std::io::stdin(), frames, || std::process::exit(0)).unwrap();
    let ring = Arc::new(Ring::open(std::env::var("RING").unwrap().parse().unwrap()).unwrap());
    let (mut hangs, mut hangs_now) = (false, false);
    let pulse = crate::collective::Pulse::of(Some(Arc::clone(&ring)));
    let mut _waits = None;
    let mut kept = None;
    for message in &messages {
        if let Some(Down::Start(start)) = &message.message {
            hangs = start.run == "hang";
            if ["stand", "wait"].contains(&start.run.as_str()) {
                pulse.beat();
            }
            _waits = (start.run == "wait").then(|| pulse.wait());
            if start.run == "keep" {
                let found = start.host_snapshot.as_ref().map(|told| HostSnapshot::open("keep", told).unwrap());
                let found = found.map(|found| (found.snapshot().step.0, found.read().unwrap().1));
                eprintln!("found {found:?}");
                kept = Some(written_by(std::process::id()));
            }
        }
        if let (Some(Down::Propose(_)), Some(kept)) = (&message.message, &kept) {
            let event = Some(Event::HostSnapshot(kept.told()));
            pipe.sender().send(TrainerReport { event, ..TrainerReport::default() }).unwrap();
        }
        if let (Some(Down::Suspend(_)), Some(_)) = (&message.message, &kept) {
            let event = Some(Event::HostSnapshot(pb::HostSnapshot::default()));
            pipe.sender().send(TrainerReport { event, ..TrainerReport::default() }).unwrap();
        }
        let (event, generation) = match message.message.unwrap() {
            Down::Start(start) if start.run == "crash" => {
                eprintln!("cannot go on");
                std::process::exit(7)
            }
            Down::Start(start) if start.run == "nonsense" => {
                std::fs::write("/proc/self/fd/3", [0xff; 64]).unwrap();
                continue;
            }
            Down::Start(_) => (Event::Ready(TrainerReady { address: "127.0.0.1:1".to_owned(), keeps_state: false }), 0),
            Down::Propose(propose) => {
                eprintln!("building");
                let record = Record::of(Some(Arc::clone(&ring)), Generation(propose.generation));
                let gathered = record.begin(thaw_proto::worker::CollectiveKind::AllGather, 0, propose.generation);
                record.end(gathered, true);
                let _lasts = record.begin(thaw_proto::worker::CollectiveKind::ReduceF32, 1, 4);
                hangs_now = hangs;
                (Event::Built(GangBuilt {}), propose.generation)
            }
            Down::Commit(commit) => {
                let position = Some(Position { stage: 0, stage_step: 5, step: 5 });
                (Event::Progress(Progress { position, ..Progress::default() }), commit.generation)
            }
            Down::Suspend(suspend) => (Event::Suspended(Suspended {}), suspend.generation),
            Down::Ping(_) if !hangs_now => (Event::Pong(pb::Pong {}), 0),
            Down::Ping(_) | Down::Welcome(_) | Down::Stop(_) | Down::Committed(_) => continue,
        };
        let report = TrainerReport { generation, event: Some(event), ..TrainerReport::default() };
        pipe.sender().send(report).unwrap();
    }
}

/// The state of a trainer of the run `keep`, whose process id is its step and its body.
fn written_by(process: u32) -> HostSnapshot {
    let step = Step(process.into());
    let snapshot = Snapshot { step, moves: 1, generation: Generation(1) };
    let body = bytes::Bytes::copy_from_slice(&process.to_le_bytes());
    HostSnapshot::create("keep", snapshot, thaw_proto::run::Position { step, ..Default::default() }, b"{}", vec![body])
        .unwrap()
}

/// One session as the coordinator sees it.
struct Peer {
    up: Streaming<WorkerMessage>,
    down: mpsc::Sender<Result<CoordinatorMessage, Status>>,
    seen: VecDeque<TrainerReport>,
}

struct Service(mpsc::UnboundedSender<Peer>);

#[tonic::async_trait]
impl WorkerService for Service {
    type SessionStream = ReceiverStream<Result<CoordinatorMessage, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<WorkerMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (down, sent) = mpsc::channel(16);
        self.0.send(Peer { up: request.into_inner(), down, seen: VecDeque::new() }).unwrap();
        Ok(Response::new(ReceiverStream::new(sent)))
    }
}

/// A coordinator on a free port, and an agent that talks to it.
struct Bench {
    sessions: mpsc::UnboundedReceiver<Peer>,
    agent: JoinHandle<Result<(), Error>>,
    shutdown: CancellationToken,
    server: JoinHandle<Result<(), tonic::transport::Error>>,
    _folder: tempfile::TempDir,
}

impl Bench {
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("trainer");
        let this = std::env::current_exe().unwrap();
        let test = "agent::tests::fake_trainer --exact --ignored --nocapture";
        // The agent says `--ring ADDRESS`.
        let script = format!("#!/bin/sh\nexport RING=\"$2\"\nexec '{}' {test} 3>&1 >/dev/null\n", this.display());
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self::with_program(folder, program).await
    }

    async fn with_program(folder: tempfile::TempDir, trainer_program: PathBuf) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let coordinator = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (opened, sessions) = mpsc::unbounded_channel();
        let server = tonic::transport::Server::builder().add_service(WorkerServiceServer::new(Service(opened)));
        let server = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let shutdown = CancellationToken::new();
        let config = Config {
            coordinators: vec![coordinator],
            tls: None,
            name: "node-1".to_owned(),
            slots: 2,
            host: "127.0.0.1".to_owned(),
            trainer_program,
            trainer_arguments: Vec::new(),
        };
        let agent = tokio::spawn(run(config, shutdown.clone()));
        Self { sessions, agent, shutdown, server, _folder: folder }
    }

    /// The next session, after its Hello and Welcome.
    async fn session(&mut self, leader_epoch: u64) -> (Peer, Hello) {
        let mut peer = tokio::time::timeout(SOON, self.sessions.recv()).await.unwrap().unwrap();
        let Up::Hello(hello) = peer.message().await else { panic!("the first message is no Hello") };
        peer.say(leader_epoch, Down::Welcome(Welcome { heartbeat_interval_ms: 10 })).await;
        (peer, hello)
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(SOON, self.agent).await.unwrap().unwrap().unwrap();
        self.server.abort();
    }
}

impl Peer {
    async fn say(&self, leader_epoch: u64, message: Down) {
        self.down.send(Ok(CoordinatorMessage { leader_epoch, message: Some(message) })).await.unwrap();
    }

    async fn message(&mut self) -> Up {
        let message = tokio::time::timeout(SOON, self.up.message()).await.unwrap();
        message.unwrap().expect("the session is open").message.unwrap()
    }

    /// The first report that fits; those before it are kept for later calls.
    async fn report<R>(&mut self, fits: impl Fn(&TrainerReport) -> Option<R>) -> R {
        if let Some(at) = self.seen.iter().position(|report| fits(report).is_some()) {
            let report = self.seen.remove(at).unwrap();
            return fits(&report).unwrap();
        }
        loop {
            if let Up::Report(report) = self.message().await {
                match fits(&report) {
                    Some(found) => return found,
                    None => self.seen.push_back(report),
                }
            }
        }
    }

    async fn ready(&mut self) {
        self.report(|report| matches!(report.event, Some(Event::Ready(_))).then_some(())).await;
    }

    /// Code and signal of an incarnation's end.
    async fn exited(&mut self, incarnation: &str) -> (Option<i32>, Option<i32>) {
        self.report(|report| match &report.event {
            Some(Event::Exited(exited)) if report.incarnation == incarnation => Some((exited.code, exited.signal)),
            _ => None,
        })
        .await
    }

    async fn failed(&mut self) -> TrainerFailed {
        self.report(|report| match &report.event {
            Some(Event::Failed(failed)) => Some(failed.clone()),
            _ => None,
        })
        .await
    }

    /// What follows `begin` in the next line of a log that begins so.
    async fn line(&mut self, begin: &str) -> String {
        self.report(|report| match &report.event {
            Some(Event::Log(line)) => line.text.strip_prefix(begin).map(str::to_owned),
            _ => None,
        })
        .await
    }

    /// The next report of where a trainer was as its generation ended.
    async fn recent(&mut self) -> (u64, pb::RecentOperations) {
        self.report(|report| match &report.event {
            Some(Event::Operations(recent)) => Some((report.generation, recent.clone())),
            _ => None,
        })
        .await
    }

    /// The process id of the trainer in a heartbeat that has exactly one, of this generation.
    async fn heartbeat(&mut self, generation: u64) -> u32 {
        loop {
            let Up::Heartbeat(beat) = self.message().await else {
                continue;
            };
            if let [trainer] = &beat.trainers[..]
                && trainer.generation == generation
            {
                return trainer.pid;
            }
        }
    }
}

fn start(run: &str, slot: u32, incarnation: &str) -> Down {
    let (run, incarnation) = (run.to_owned(), incarnation.to_owned());
    Down::Start(StartTrainer { run, slot, incarnation, ..StartTrainer::default() })
}

fn propose(run: &str, incarnation: &str, generation: u64, rank: u32) -> Down {
    let (run, incarnation, peers) = (run.to_owned(), incarnation.to_owned(), Some([""; 4].iter().collect()));
    Down::Propose(Propose { run, incarnation, generation, rank, peers, ..Propose::default() })
}

fn is_running(pid: u32) -> bool {
    // A zombie is not running; the agent must have reaped it as well.
    Path::new(&format!("/proc/{pid}")).exists()
}

#[tokio::test]
async fn a_trainer_is_started_followed_and_killed() {
    let mut bench = Bench::start().await;
    let (mut peer, hello) = bench.session(1).await;
    assert_eq!((hello.worker.as_str(), hello.slots, hello.host.as_str()), ("node-1", 2, "127.0.0.1"));
    assert!(hello.trainers.is_empty());
    peer.say(1, start("demo", 0, "a")).await;
    peer.ready().await;
    peer.say(1, propose("demo", "a", 4, 3)).await;
    let built = peer.report(|report| matches!(report.event, Some(Event::Built(_))).then(|| report.clone())).await;
    assert_eq!((built.run.as_str(), built.incarnation.as_str(), built.generation), ("demo", "a", 4));
    let source = peer
        .report(|report| match &report.event {
            Some(Event::Log(line)) if line.text == "building" => Some(line.source.clone()),
            _ => None,
        })
        .await;
    assert_eq!(source, "rank 3");
    let (run, incarnation) = ("demo".to_owned(), "a".to_owned());
    peer.say(1, Down::Commit(Commit { run: run.clone(), slot: 0, incarnation: incarnation.clone(), generation: 4 }))
        .await;
    let step = peer
        .report(|report| match &report.event {
            Some(Event::Progress(progress)) => progress.position.map(|position| position.step),
            _ => None,
        })
        .await;
    assert_eq!(step, 5);
    let pid = peer.heartbeat(4).await;
    assert!(is_running(pid));
    peer.say(1, Down::Suspend(SuspendTrainer { run, slot: 0, incarnation, generation: 4 })).await;
    peer.report(|report| matches!(report.event, Some(Event::Suspended(_))).then_some(())).await;
    let stop = StopTrainer { run: "demo".to_owned(), slot: 0, incarnation: "a".to_owned(), generation: 4 };
    peer.say(1, Down::Stop(stop.clone())).await;
    assert_eq!(peer.exited("a").await, (None, Some(9)));
    assert!(!is_running(pid));
    // Asked again about what is gone, it says so again; also about what never was.
    peer.say(1, Down::Stop(stop)).await;
    assert_eq!(peer.exited("a").await, (None, Some(9)));
    peer.say(1, propose("demo", "b", 5, 0)).await;
    assert_eq!(peer.exited("b").await, (None, None));
    bench.stop().await;
}

#[tokio::test]
async fn a_trainer_that_ends_by_itself_is_reported_with_its_code_and_its_words() {
    let mut bench = Bench::start().await;
    let (mut peer, _) = bench.session(1).await;
    peer.say(1, start("crash", 1, "a")).await;
    assert_eq!(peer.exited("a").await, (Some(7), None));
    let source = peer
        .report(|report| match &report.event {
            Some(Event::Log(line)) if line.text == "cannot go on" => Some(line.source.clone()),
            _ => None,
        })
        .await;
    assert_eq!(source, "slot 1");
    peer.say(1, start("nonsense", 1, "b")).await;
    assert_eq!(peer.exited("b").await, (None, Some(9)), "one that does not speak the protocol is killed");
    bench.stop().await;
}

/// AGENT-6
#[tokio::test]
async fn a_trainer_that_does_not_answer_is_reported_and_killed_and_one_that_does_is_left_alone() {
    let mut bench = Bench::start().await;
    let (mut peer, _) = bench.session(1).await;
    peer.say(1, start("demo", 0, "a")).await;
    peer.ready().await;
    let answers = peer.heartbeat(0).await;
    peer.say(1, start("hang", 1, "b")).await;
    peer.ready().await;
    let Down::Propose(proposed) = propose("hang", "b", 6, 2) else { unreachable!() };
    peer.say(1, Down::Propose(Propose { slot: 1, ..proposed })).await;
    let message = peer.failed().await.message;
    assert!(message.contains("has not answered its agent"), "{message}");
    assert!(
        message.ends_with("its last operation was reduce_shards_f32 1 (4 bytes) of step 0 in stage 0"),
        "{message}"
    );
    let (generation, recent) = peer.recent().await;
    assert_eq!((generation, recent.rank, recent.operations.len()), (6, 2, 2), "AGENT-7");
    assert_eq!(peer.exited("b").await, (None, Some(9)));
    assert!(is_running(answers), "it was pinged for longer");
    bench.stop().await;
}

fn start_with_limit(run: &str, slot: u32, incarnation: &str, seconds: u32) -> Down {
    let Down::Start(start) = start(run, slot, incarnation) else { unreachable!() };
    let workers = Some(pb::Workers { stall_timeout_seconds: Some(seconds), ..pb::Workers::default() });
    Down::Start(StartTrainer { spec: Some(pb::RunSpec { workers, ..pb::RunSpec::default() }), ..start })
}

/// AGENT-8
#[tokio::test]
async fn a_trainer_that_answers_and_gets_nowhere_is_reported_and_killed_and_one_that_waits_is_left_alone() {
    let mut bench = Bench::start().await;
    let (mut peer, _) = bench.session(1).await;
    peer.say(1, start_with_limit("wait", 0, "a", 1)).await;
    peer.ready().await;
    let waits = peer.heartbeat(0).await;
    peer.say(1, start_with_limit("stand", 1, "b", 2)).await;
    peer.ready().await;
    let Down::Propose(proposed) = propose("stand", "b", 6, 2) else { unreachable!() };
    peer.say(1, Down::Propose(Propose { slot: 1, ..proposed })).await;
    let (generation, failed) = peer
        .report(|report| match &report.event {
            Some(Event::Failed(failed)) => Some((report.generation, failed.clone())),
            _ => None,
        })
        .await;
    assert_eq!((generation, failed.class(), failed.reason()), (6, pb::FailureClass::Retry, pb::RunReason::TrainerHung));
    let said = "training has not moved for 2 s, and waits for nobody, at step 0 of stage 0; its process answers; its last operation was \
                reduce_shards_f32 1 (4 bytes) of step 0 in stage 0";
    assert_eq!(failed.message, said);
    let (generation, recent) = peer.recent().await;
    assert_eq!((generation, recent.rank), (6, 2), "AGENT-7");
    assert!(recent.still_ms >= 2_000, "{recent:?}");
    assert_eq!(peer.exited("b").await, (None, Some(9)));
    assert!(is_running(waits), "it was looked at for longer, with a shorter limit");
    bench.stop().await;
}

/// AGENT-7
#[tokio::test]
async fn what_a_trainer_did_last_is_told_once_as_its_generation_ends() {
    let mut bench = Bench::start().await;
    let (mut peer, _) = bench.session(1).await;
    peer.say(1, start("demo", 0, "a")).await;
    peer.ready().await;
    peer.say(1, propose("demo", "a", 4, 3)).await;
    peer.heartbeat(4).await;
    peer.say(1, propose("demo", "a", 5, 1)).await;
    let (generation, recent) = peer.recent().await;
    assert_eq!((generation, recent.rank, recent.world_size), (4, 3, 4));
    let [gathered, reduces] = &recent.operations[..] else { panic!("{recent:?}") };
    assert_eq!((gathered.kind(), gathered.sequence, gathered.bytes), (CollectiveKind::AllGather, 0, 4));
    assert!(gathered.ended_us.is_some_and(|ended| ended >= gathered.began_us) && !gathered.failed, "{gathered:?}");
    assert_eq!((reduces.kind(), reduces.sequence, reduces.ended_us), (CollectiveKind::ReduceF32, 1, None));
    peer.heartbeat(5).await;
    let stop = StopTrainer { run: "demo".to_owned(), slot: 0, incarnation: "a".to_owned(), generation: 5 };
    peer.say(1, Down::Stop(stop)).await;
    assert_eq!(peer.exited("a").await, (None, Some(9)));
    let told = |report: &TrainerReport| matches!(report.event, Some(Event::Operations(_)));
    let of_last = peer.seen.iter().filter(|report| told(report)).map(|report| report.generation).collect::<Vec<_>>();
    assert_eq!(of_last, [5], "it ended after it was stopped, and is not told twice");
    bench.stop().await;
}

/// AGENT-9: what one trainer has put into memory the next one finds, however the first has ended.
#[tokio::test]
async fn a_state_in_memory_outlives_its_trainer_until_the_run_needs_it_no_more() {
    let mut bench = Bench::start().await;
    let (mut peer, _) = bench.session(1).await;
    peer.say(1, start("keep", 0, "a")).await;
    peer.ready().await;
    assert_eq!(peer.line("found ").await, "None");
    peer.say(1, propose("keep", "a", 1, 0)).await;
    peer.report(|report| matches!(report.event, Some(Event::Built(_))).then_some(())).await;
    let pid = peer.heartbeat(1).await;
    let stop = |slot: u32, incarnation: &str| {
        let (run, incarnation) = ("keep".to_owned(), incarnation.to_owned());
        Down::Stop(StopTrainer { run, slot, incarnation, generation: 9 })
    };
    peer.say(1, stop(0, "a")).await;
    assert_eq!(peer.exited("a").await, (None, Some(9)));
    // In another slot, while a trainer of another run is there.
    peer.say(1, start("demo", 0, "other")).await;
    peer.ready().await;
    peer.say(1, start("keep", 1, "b")).await;
    peer.ready().await;
    let body = bytes::Bytes::copy_from_slice(&pid.to_le_bytes());
    assert_eq!(peer.line("found ").await, format!("{:?}", Some((u64::from(pid), body))));
    let (run, incarnation) = ("keep".to_owned(), "b".to_owned());
    peer.say(1, Down::Suspend(SuspendTrainer { run, slot: 1, incarnation, generation: 1 })).await;
    peer.report(|report| matches!(report.event, Some(Event::Suspended(_))).then_some(())).await;
    peer.say(1, stop(1, "b")).await;
    assert_eq!(peer.exited("b").await, (None, Some(9)));
    peer.say(1, start("keep", 1, "c")).await;
    peer.ready().await;
    assert_eq!(peer.line("found ").await, "None");
    let heard = |report: &TrainerReport| matches!(report.event, Some(Event::HostSnapshot(_)));
    assert!(!peer.seen.iter().any(heard), "it is for the agent alone");
    bench.stop().await;
}

#[tokio::test]
async fn a_lost_session_stops_nobody_and_its_news_come_again() {
    let mut bench = Bench::start().await;
    let (mut peer, _) = bench.session(7).await;
    peer.say(7, start("demo", 0, "a")).await;
    peer.ready().await;
    peer.say(7, propose("demo", "a", 2, 0)).await;
    let pid = peer.heartbeat(2).await;
    drop(peer);

    let (mut peer, hello) = bench.session(6).await;
    assert_eq!((hello.trainers[0].pid, hello.trainers[0].generation), (pid, 2));
    let closed = tokio::time::timeout(SOON, peer.up.message()).await.unwrap();
    assert!(!matches!(closed, Ok(Some(_))), "an earlier leader is left");

    let (mut peer, hello) = bench.session(8).await;
    assert_eq!(hello.trainers[0].pid, pid);
    peer.ready().await;
    peer.report(|report| (report.generation == 2 && matches!(report.event, Some(Event::Built(_)))).then_some(())).await;
    // A late message of an earlier leader does nothing; that of the present one does.
    let stop = |generation| StopTrainer { run: "demo".into(), slot: 0, incarnation: "a".into(), generation };
    peer.say(7, Down::Stop(stop(2))).await;
    peer.say(8, propose("demo", "a", 3, 0)).await;
    assert_eq!(peer.heartbeat(3).await, pid);
    bench.stop().await;
    assert!(!is_running(pid), "no trainer outlives its agent");
}

#[tokio::test]
async fn a_slot_has_one_trainer_and_refusals_have_reasons() {
    let mut bench = Bench::start().await;
    let (mut peer, _) = bench.session(1).await;
    peer.say(1, start("demo", 0, "a")).await;
    peer.ready().await;
    peer.say(1, start("demo", 0, "a")).await;
    peer.ready().await;
    peer.say(1, start("demo", 0, "b")).await;
    assert_eq!(peer.exited("a").await, (None, Some(9)));
    peer.ready().await;
    peer.say(1, start("demo", 2, "c")).await;
    assert_eq!(peer.failed().await.message, "slot 2 does not exist; this worker has 2");
    assert_eq!(peer.exited("c").await, (None, None));
    bench.stop().await;

    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("nothing");
    let mut bench = Bench::with_program(folder, program).await;
    let (mut peer, _) = bench.session(1).await;
    peer.say(1, start("demo", 0, "a")).await;
    assert!(peer.failed().await.message.starts_with("cannot start trainer "));
    assert_eq!(peer.exited("a").await, (None, None));
    bench.stop().await;
}

#[tokio::test]
async fn a_refused_hello_ends_the_agent_and_settings_are_checked() {
    let mut bench = Bench::start().await;
    let peer = tokio::time::timeout(SOON, bench.sessions.recv()).await.unwrap().unwrap();
    peer.down.send(Err(Status::invalid_argument("worker: a name is needed"))).await.unwrap();
    let error = tokio::time::timeout(SOON, bench.agent).await.unwrap().unwrap().unwrap_err();
    assert!(error.to_string().ends_with("refuses worker node-1: worker: a name is needed"), "{error}");
    bench.server.abort();

    let config = Config {
        coordinators: vec!["http://127.0.0.1:1".parse().unwrap()],
        tls: None,
        name: "node-1".to_owned(),
        slots: 65,
        host: String::new(),
        trainer_program: PathBuf::new(),
        trainer_arguments: Vec::new(),
    };
    let coordinators = vec!["https://127.0.0.1:1".parse().unwrap()];
    let secure = Config { coordinators, slots: 1, ..config.clone() };
    assert!(matches!(run(config, CancellationToken::new()).await, Err(Error::Slots(65))));
    let error = run(secure, CancellationToken::new()).await.unwrap_err();
    let text = thaw_runtime::chain(&error);
    assert!(text.contains("https://127.0.0.1:1/ asks for TLS; give --tls-ca"), "{text}");
}
