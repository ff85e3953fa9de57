//! The driver's loop, turn by turn: what goes to the store side by side, and what is forgotten.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use async_trait::async_trait;
use common::cluster::{OneStage, WAIT, spec};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use thaw_coordinator::driver::{self, Driver, MainLoop, NewRun, Outbox, Tenants};
use thaw_coordinator::folder::RunFolder;
use thaw_coordinator::intake::SpecPlanner as _;
use thaw_coordinator::leader::{self, Identity, Leadership, Timing};
use thaw_coordinator::store::{
    At, Compare, Embedded, Entry, Error, LeaseId, Op, Revision, Store, TxnOutcome, WatchStream,
};
use thaw_coordinator::{journal, views};
use thaw_proto::ids::{Incarnation, RunId};
use thaw_proto::pb::coordinator_message::Message;
use thaw_proto::{convert, pb};
use thaw_runtime::surroundings;
use tokio::sync::{Semaphore, mpsc, watch};

/// A store that takes changes of runs only once it is let, and says which it was asked for.
#[derive(Debug)]
struct Gated {
    inner: Embedded,
    /// `None`: open.
    held: Mutex<Option<Arc<Semaphore>>>,
    asked: watch::Sender<BTreeSet<String>>,
}

#[async_trait]
impl Store for Gated {
    async fn get(&self, key: &str) -> Result<At<Option<Entry>>, Error> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<At<Vec<Entry>>, Error> {
        self.inner.list(prefix).await
    }

    async fn txn(&self, compares: Vec<Compare>, ops: Vec<Op>) -> Result<TxnOutcome, Error> {
        let key = ops.first().map_or("", |op| op.key()).to_owned();
        let held = self.held.lock().unwrap().clone().filter(|_| key.starts_with("runs/"));
        if let Some(held) = held {
            self.asked.send_if_modified(|asked| asked.insert(key));
            held.acquire().await.unwrap().forget();
        }
        self.inner.txn(compares, ops).await
    }

    async fn watch(&self, prefix: &str, after: Revision) -> Result<WatchStream, Error> {
        self.inner.watch(prefix, after).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.inner.revoke(lease).await
    }
}

struct Led {
    store: Arc<Gated>,
    leadership: Leadership,
    driver: Driver,
    main_loop: MainLoop,
}

impl Led {
    async fn start(folder: &Path) -> Self {
        let inner = Embedded::open(folder.join("store.redb")).await.unwrap();
        let store = Arc::new(Gated { inner, held: Mutex::default(), asked: watch::Sender::default() });
        Self::over(store, folder).await
    }

    /// Leads as soon as nobody else does.
    async fn over(store: Arc<Gated>, folder: &Path) -> Self {
        let identity = Identity {
            name: "one".to_owned(),
            address: "127.0.0.1:1".to_owned(),
            incarnation: Incarnation("one".to_owned()),
        };
        let leadership = leader::campaign(store.clone(), &identity, Timing::alone(), |_| ()).await.unwrap();
        let (journal, _) = journal::journal();
        let views = views::Views::default();
        let loaded = driver::load(leadership.fenced(), views, journal, folder.to_owned(), Tenants::new());
        let (driver, main_loop) = loaded.await.unwrap();
        Self { store, leadership, driver, main_loop }
    }

    /// An agent with so many slots; what it is told.
    async fn agent(&mut self, slots: u32) -> mpsc::Receiver<Result<pb::CoordinatorMessage, tonic::Status>> {
        let (outbox, told) = mpsc::channel(64);
        let hello = pb::Hello {
            worker: "one".to_owned(),
            incarnation: "1f9d2a52-3b1e-4c11-9f2c-2f1c9b7d7a10".to_owned(),
            slots,
            host: "127.0.0.1".to_owned(),
            trainers: Vec::new(),
        };
        let opening = self.driver.open_session(hello, Outbox::new(outbox));
        let (opened, handled) = tokio::join!(opening, self.main_loop.handle_queued());
        handled.unwrap();
        opened.unwrap();
        told
    }

    async fn create(&mut self, id: &str, request_id: Option<&str>, folder: &Path) -> pb::Run {
        let spec = convert::spec::check(&spec("run", 1)).unwrap();
        let plan = OneStage.plan(&spec).unwrap().plan;
        let id = RunId(id.to_owned());
        let folder = RunFolder::of(&id, None, folder).unwrap();
        let new = NewRun { id, spec, plan, folder, request_id: request_id.map(str::to_owned) };
        let (created, handled) = tokio::join!(self.driver.create(new), self.main_loop.handle_queued());
        handled.unwrap();
        created.unwrap().as_ref().clone()
    }

    async fn requests(&self) -> Vec<String> {
        let listed = self.store.list("requests/").await.unwrap().value;
        listed.into_iter().map(|entry| entry.key.strip_prefix("requests/").unwrap().to_owned()).collect()
    }
}

/// Runs that were told to start.
fn started(told: &mut mpsc::Receiver<Result<pb::CoordinatorMessage, tonic::Status>>) -> Vec<String> {
    let mut runs = Vec::new();
    while let Ok(message) = told.try_recv() {
        if let Some(Message::Start(start)) = message.unwrap().message {
            runs.push(start.run);
        }
    }
    runs
}

/// DRIVE-6, DRIVE-1
#[tokio::test]
async fn what_a_tick_decides_is_saved_side_by_side_and_said_run_by_run() {
    let folder = tempfile::tempdir().unwrap();
    let mut led = Led::start(folder.path()).await;
    let ids: Vec<String> = (0..8).map(|index| format!("run-0000000{index}")).collect();
    for id in &ids {
        led.create(id, None, folder.path()).await;
    }
    let mut told = led.agent(8).await;
    let gate = Arc::new(Semaphore::new(0));
    *led.store.held.lock().unwrap() = Some(Arc::clone(&gate));
    let mut asked = led.store.asked.subscribe();
    let look = async {
        // All are asked for while none is answered.
        let all = tokio::time::timeout(WAIT, asked.wait_for(|asked| asked.len() == ids.len())).await;
        drop(all.expect("the changes of all runs go to the store at once").unwrap());
        assert_eq!(started(&mut told), Vec::<String>::new(), "DRIVE-1");
        // The first three are answered: what follows from them is said, and no more.
        gate.add_permits(3);
        let three = async {
            let mut runs = Vec::new();
            while runs.len() < 3 {
                tokio::task::yield_now().await;
                runs.extend(started(&mut told));
            }
            runs
        };
        assert_eq!(tokio::time::timeout(WAIT, three).await.expect("their own save is enough"), ids[..3], "DRIVE-6");
        gate.add_permits(5);
    };
    let (ticked, ()) = tokio::join!(led.main_loop.tick(), look);
    assert_eq!(ticked.unwrap(), None);
    assert_eq!(started(&mut told), ids[3..]);
}

#[tokio::test]
async fn request_ids_are_forgotten_after_a_day() {
    const DAY: Duration = Duration::from_secs(24 * 3600);
    let folder = tempfile::tempdir().unwrap();
    let now = Rc::new(Cell::new(SystemTime::UNIX_EPOCH + 1000 * DAY));
    let clock = Rc::clone(&now);
    let _simulated = surroundings::simulate(1, move || clock.get(), || Duration::ZERO);
    let mut led = Led::start(folder.path()).await;
    for (index, id) in ["a", "b"].into_iter().enumerate() {
        led.create(&format!("run-0000000{index}"), Some(id), folder.path()).await;
    }
    now.set(now.get() + DAY / 2);
    let again = led.create("run-00000002", Some("a"), folder.path()).await;
    assert_eq!(again.name, "runs/run-00000000", "the same submission is the same run");
    led.create("run-00000003", Some("c"), folder.path()).await;
    led.main_loop.tick().await.unwrap();
    assert_eq!(led.requests().await, ["a", "b", "c"]);
    // A day after the first two; one of them is sent again before it is forgotten, and means another run from then on.
    now.set(now.get() + DAY / 2);
    let anew = led.create("run-00000004", Some("a"), folder.path()).await;
    assert_eq!(anew.name, "runs/run-00000004");
    led.main_loop.tick().await.unwrap();
    assert_eq!(led.requests().await, ["a", "c"]);
    now.set(now.get() + DAY / 2);
    led.main_loop.tick().await.unwrap();
    assert_eq!(led.requests().await, ["a"]);
    // The next leader forgets what it finds.
    now.set(now.get() + DAY);
    led.leadership.fenced().resign();
    drop(led.main_loop);
    led.leadership.keep().await;
    let mut next = Led::over(led.store, folder.path()).await;
    next.main_loop.tick().await.unwrap();
    assert_eq!(next.requests().await, Vec::<String>::new());
}
