//! One simulated cluster, from a seed to what came of it.

use crate::dice::Dice;
use crate::etcd::{Call, Client, Fate, Link, Model};
use crate::net;
use crate::one_stage::OneStage;
use crate::plan::{Fault, Plan, Planned};
use crate::trainer::Toys;
use crate::user::User;
use crate::world::{GLOBAL_BATCH, SHARDS, Workload, World};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thaw_coordinator::driver::Tenants;
use thaw_coordinator::server::{ServeConfig, Server};
use thaw_coordinator::store::{EtcdAccess, OPERATION_DEADLINE, StoreUrl};
use thaw_core::scheduler::Share;
use thaw_node::agent;
use thaw_proto::convert::WireEnum;
use thaw_proto::pb;
use thaw_runtime::standstill::{self, Process};
use thaw_runtime::surroundings;
use tokio_util::sync::CancellationToken;
use turmoil::Sim;

/// The host of the user, whose runs they are.
const USER: &str = "user";
/// Every host runs for so long before the next does.
const TICK: Duration = Duration::from_millis(20);
/// In calm, every run has ended by then: start and suspension have the longest limits, 10 and 5 minutes.
const CALM_LIMIT: Duration = Duration::from_secs(1200);

/// What came of a seed.
#[derive(Debug, Clone)]
pub struct Outcome {
    pub seed: u64,
    /// What happened, in order; equal for equal seeds.
    pub log: Vec<String>,
    /// Each begins with the invariant's id after the time.
    pub violations: Vec<String>,
    /// Virtual time.
    pub lasted: Duration,
}

impl Outcome {
    /// A hash of the log.
    #[must_use]
    pub fn digest(&self) -> String {
        blake3::hash(self.log.join("\n").as_bytes()).to_hex()[..16].to_owned()
    }
}

/// How the store is reached by each coordinator.
#[derive(Debug, Default)]
struct Links {
    cut: Mutex<BTreeSet<String>>,
    calm: AtomicBool,
}

/// Simulates one seed on this thread.
#[must_use]
pub fn simulate(seed: u64) -> Outcome {
    let plan = Plan::draw(seed);
    let world = World::new();
    let (wall, steady) = (world.clone(), world.clone());
    let chance = Dice::new(seed, "surroundings").draw();
    let _entered = surroundings::simulate(chance, move || wall.wall(), move || steady.now());
    // In memory, where there is such a place: what is durable is the simulation's to say.
    let shm = Path::new("/dev/shm");
    let folder = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
    // Of one length, whoever runs it: it is in what the store holds.
    let name = format!("thaw-sim-{:010}-", std::process::id());
    let folder = tempfile::Builder::new().prefix(&name).tempdir_in(folder);
    let folder = match folder {
        Ok(folder) => folder,
        Err(error) => {
            let violations = vec![format!("0 ms VIOLATION the simulation has no folder: {error}")];
            return Outcome { seed, log: Vec::new(), violations, lasted: Duration::ZERO };
        }
    };
    let cluster = Cluster::new(seed, plan, world.clone(), folder.path().to_owned());
    let lasted = cluster.run();
    Outcome { seed, violations: world.violations(), log: world.take_log(), lasted }
}

struct Cluster {
    seed: u64,
    plan: Plan,
    world: World,
    model: Arc<Model>,
    links: Arc<Links>,
    calm: Arc<AtomicBool>,
    processes: Processes,
    folder: PathBuf,
}

/// The present life of each host that is no user.
#[derive(Debug, Clone, Default)]
struct Processes(Arc<Mutex<BTreeMap<String, Process>>>);

impl Processes {
    fn start(&self, host: &str) -> Process {
        let process = Process::default();
        self.hosts().insert(host.to_owned(), process.clone());
        process
    }

    fn of(&self, host: &str, act: impl FnOnce(&Process)) {
        if let Some(process) = self.hosts().get(host) {
            act(process);
        }
    }

    /// Every host but this one.
    fn others(&self, host: &str) -> Vec<String> {
        let hosts = self.hosts();
        let all = hosts.keys().map(String::as_str).chain([USER]);
        all.filter(|other| *other != host).map(str::to_owned).collect()
    }

    fn hosts(&self) -> MutexGuard<'_, BTreeMap<String, Process>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Cluster {
    fn new(seed: u64, plan: Plan, world: World, folder: PathBuf) -> Self {
        for (name, workload, _) in &plan.runs {
            world.set_workload(name, workload.clone());
        }
        world.set_quotas(plan.quotas.clone());
        let (clock, second_ms) = (world.clone(), plan.store_second_ms);
        let model = Arc::new(Model::new(move || clock.now() * second_ms / 1000));
        model.set_witness(world.clone());
        let (links, calm, processes) = Default::default();
        Self { seed, plan, world, model, links, calm, processes, folder }
    }

    fn run(self) -> Duration {
        let mut sim = turmoil::Builder::new()
            .rng_seed(self.seed)
            .tick_duration(TICK)
            .simulation_duration(Duration::from_secs(1 << 20))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(Duration::from_millis(self.plan.slowest_message_ms))
            .tcp_capacity(1 << 16)
            .build();
        for index in 0..self.plan.coordinators {
            self.add_coordinator(&mut sim, index);
        }
        for (index, slots) in self.plan.agents.iter().enumerate() {
            self.add_agent(&mut sim, index, *slots);
        }
        self.add_user(&mut sim);
        let mut storm =
            Storm { cluster: &self, pending: self.plan.faults.clone(), begun: Vec::new(), down: BTreeMap::new() };
        let end = self.plan.storm + if self.plan.liveness { CALM_LIMIT } else { Duration::ZERO };
        loop {
            let now = sim.elapsed();
            self.world.set_now(now);
            self.model.advance();
            if now < self.plan.storm {
                storm.blow(&mut sim, now);
            } else if !self.calm.swap(true, Ordering::Relaxed) {
                storm.end(&mut sim);
            }
            storm.restart(&mut sim, now);
            if let Err(error) = sim.step() {
                self.world.violated("SIM", error.to_string());
            }
            if !self.world.violations().is_empty() || (self.world.all_ended() && self.world.nobody_lives()) {
                return now;
            }
            if now >= end {
                if self.plan.liveness {
                    self.world.violated("RUN-7", format!("not everything ends: {}", self.world.summary()));
                }
                return now;
            }
        }
    }

    fn add_coordinator(&self, sim: &mut Sim<'_>, index: u64) {
        let name = format!("c{index}");
        let (world, model, data_dir) = (self.world.clone(), Arc::clone(&self.model), self.folder.clone());
        let (links, plan) = (Arc::clone(&self.links), self.plan.clone());
        let dice = Arc::new(Mutex::new(Dice::new(self.seed, &name)));
        let share = |quota: &u32| Share { quota: Some(*quota), ..Share::default() };
        let tenants: Tenants = plan.quotas.iter().map(|(tenant, quota)| ((*tenant).to_owned(), share(quota))).collect();
        let (lives, processes) = (std::cell::Cell::new(0), self.processes.clone());
        sim.host(name.clone(), move || {
            lives.set(lives.get() + 1);
            let life = format!("{name}#{}", lives.get());
            let link = link(&name, &plan, Arc::clone(&links), Arc::clone(&dice));
            let store = Arc::new(Client::new(Arc::clone(&model), &life, link));
            let address = format!("{name}:{}", net::PORT);
            let config = ServeConfig {
                listen: std::net::SocketAddr::from(([127, 0, 0, 1], net::PORT)),
                tls: None,
                store: StoreUrl::Embedded(PathBuf::new()),
                etcd: EtcdAccess::default(),
                data_dir: data_dir.clone(),
                name: life.clone(),
                advertise: Some(address),
                tenants: tenants.clone(),
            };
            let open = Server::over(config, store).with_planner(Arc::new(OneStage));
            let world = world.clone();
            standstill::within(Some(processes.start(&name)), async move {
                world.say(format!("{life} starts"));
                match open.serve(net::listen().await?, CancellationToken::new()).await {
                    Ok(()) => world.say(format!("{life} ends")),
                    Err(error) => world.violated("SERVER-2", format!("{life} ends: {}", thaw_runtime::chain(&error))),
                }
                Ok(())
            })
        });
    }

    fn add_agent(&self, sim: &mut Sim<'_>, index: usize, slots: u32) {
        let name = format!("a{index}");
        let (world, hazards, coordinators) = (self.world.clone(), self.plan.hazards, self.plan.coordinators);
        let dice = Arc::new(Mutex::new(Dice::new(self.seed, &name)));
        let (lives, processes) = (std::cell::Cell::new(0), self.processes.clone());
        sim.host(name.clone(), move || {
            lives.set(lives.get() + 1);
            let (host, life) = (name.clone(), format!("{name}#{}", lives.get()));
            let addresses = (0..coordinators).filter_map(|at| format!("http://c{at}:{}", net::PORT).parse().ok());
            let config = agent::Config {
                coordinators: addresses.collect(),
                tls: None,
                name: name.clone(),
                slots,
                host: name.clone(),
                trainer_program: PathBuf::new(),
                trainer_arguments: Vec::new(),
            };
            let toys = Toys { world: world.clone(), host, life: life.clone(), dice: Arc::clone(&dice), hazards };
            let world = world.clone();
            standstill::within(Some(processes.start(&name)), async move {
                world.say(format!("{life} starts"));
                let around = agent::Surroundings { dial: net::dial(), launch: Arc::new(toys) };
                if let Err(error) = agent::run_among(config, around, CancellationToken::new()).await {
                    world.violated("AGENT-2", format!("{life} ends: {}", thaw_runtime::chain(&error)));
                }
                Ok(())
            })
        });
    }

    fn add_user(&self, sim: &mut Sim<'_>) {
        let specs = self.plan.runs.iter().map(|(name, load, wait)| (spec(name, load), *wait)).collect();
        let user = User {
            world: self.world.clone(),
            dice: Dice::new(self.seed, "user"),
            coordinators: self.plan.coordinators,
            specs,
            calm: Arc::clone(&self.calm),
            acknowledged: BTreeMap::new(),
        };
        sim.client(USER, async move {
            user.act().await;
            std::future::pending().await
        });
    }
}

/// What becomes of a coordinator's calls to the store.
fn link(name: &str, plan: &Plan, links: Arc<Links>, dice: Arc<Mutex<Dice>>) -> Arc<Link> {
    let name = name.to_owned();
    let (trouble, slowest) = (plan.store_trouble, plan.store_slowest_ms);
    Arc::new(move || {
        let mut dice = dice.lock().unwrap_or_else(PoisonError::into_inner);
        let travel = dice.millis(1..slowest + 1);
        if links.calm.load(Ordering::Relaxed) {
            return Call { travel, fate: Fate::Answered, told_after: OPERATION_DEADLINE };
        }
        if links.cut.lock().unwrap_or_else(PoisonError::into_inner).contains(&name) {
            return Call { travel, fate: Fate::RequestLost, told_after: OPERATION_DEADLINE - travel };
        }
        let fate = match dice.below(1000) {
            roll if roll >= trouble => Fate::Answered,
            roll => match roll % 5 {
                0 => Fate::Refused,
                1 => Fate::RequestLost,
                2 | 3 => Fate::ReplyLost,
                _ => Fate::Late(dice.millis(0..4000)),
            },
        };
        let breaks = dice.permille(600);
        let told_after = if breaks { dice.millis(1..400) } else { OPERATION_DEADLINE - travel };
        Call { travel, fate, told_after }
    })
}

/// Faults as they come and go.
struct Storm<'a> {
    cluster: &'a Cluster,
    pending: Vec<Planned>,
    begun: Vec<(Duration, Fault)>,
    /// Hosts that are killed, until when.
    down: BTreeMap<String, Duration>,
}

impl Storm<'_> {
    fn blow(&mut self, sim: &mut Sim<'_>, now: Duration) {
        while self.pending.first().is_some_and(|planned| planned.at <= now) {
            let Planned { lasts, fault, .. } = self.pending.remove(0);
            self.cluster.world.say(format!("fault {fault:?} for {lasts:?}"));
            self.begin(sim, &fault, now + lasts);
            self.begun.push((now + lasts, fault));
        }
        let over: Vec<Fault> =
            self.begun.iter().filter(|(end, _)| *end <= now).map(|(_, fault)| fault.clone()).collect();
        self.begun.retain(|(end, _)| *end > now);
        over.iter().for_each(|fault| self.mend(sim, fault));
    }

    fn begin(&mut self, sim: &mut Sim<'_>, fault: &Fault, until: Duration) {
        match fault {
            Fault::Crash(host) => {
                if self.down.insert(host.clone(), until).is_none() {
                    sim.crash(host.as_str());
                }
            }
            Fault::Partition(one, other) => sim.partition(one.as_str(), other.as_str()),
            Fault::OneWay(from, to) => sim.partition_oneway(from.as_str(), to.as_str()),
            Fault::Hold(one, other) => sim.hold(one.as_str(), other.as_str()),
            Fault::Stop(host) => {
                self.cluster.processes.of(host, Process::stop);
                for other in self.cluster.processes.others(host) {
                    sim.hold(host.as_str(), other);
                }
            }
            Fault::CutStore(host) => {
                self.cluster.links.cut.lock().unwrap_or_else(PoisonError::into_inner).insert(host.clone());
            }
            Fault::EndLeases => self.cluster.model.end_leases(),
            Fault::Compact => self.cluster.model.compact(),
            Fault::Jump(offset_ms) => self.cluster.world.jump(*offset_ms),
        }
    }

    fn mend(&mut self, sim: &mut Sim<'_>, fault: &Fault) {
        match fault {
            Fault::Partition(one, other) | Fault::OneWay(one, other) => sim.repair(one.as_str(), other.as_str()),
            Fault::Hold(one, other) => sim.release(one.as_str(), other.as_str()),
            Fault::Stop(host) => {
                // Unless it was killed meanwhile; then this is another.
                self.cluster.processes.of(host, Process::go_on);
                for other in self.cluster.processes.others(host) {
                    sim.release(host.as_str(), other);
                }
            }
            Fault::CutStore(host) => {
                self.cluster.links.cut.lock().unwrap_or_else(PoisonError::into_inner).remove(host);
            }
            Fault::Crash(_) | Fault::EndLeases | Fault::Compact | Fault::Jump(_) => {}
        }
    }

    /// Mends all; from now on nothing breaks.
    fn end(&mut self, sim: &mut Sim<'_>) {
        self.cluster.world.say("calm");
        self.cluster.links.calm.store(true, Ordering::Relaxed);
        for (_, fault) in std::mem::take(&mut self.begun) {
            self.mend(sim, &fault);
        }
        self.down.values_mut().for_each(|until| *until = Duration::ZERO);
    }

    /// Starts again who was killed long enough ago.
    fn restart(&mut self, sim: &mut Sim<'_>, now: Duration) {
        let due: Vec<String> =
            self.down.iter().filter(|(_, until)| **until <= now).map(|(host, _)| host.clone()).collect();
        for host in due {
            self.down.remove(&host);
            sim.bounce(host.as_str());
        }
    }
}

fn spec(name: &str, load: &Workload) -> pb::RunSpec {
    let (min, max) = load.workers;
    let text = format!(
        "name: {name}\nbackbone: {{graph: file:///m.pt2}}\nglobal_batch_size: {GLOBAL_BATCH}\nlogical_shards: {SHARDS}\n\
         workers: {{min: {min}, max: {max}}}\ndata: {{train: {{path: file:///d.csv, format: csv, text: t, label: l}}}}\n"
    );
    let spec = thaw_proto::text::parse_spec(&text).expect("the text is this function's own");
    let scheduling = pb::Scheduling { tenant: load.tenant.to_owned(), priority: load.priority.number() };
    pb::RunSpec { scheduling: Some(scheduling), ..spec }
}
