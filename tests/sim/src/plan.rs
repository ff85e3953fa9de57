//! What a seed draws: who there is, what they do, and what befalls them.

use crate::dice::Dice;
use crate::trainer::Hazards;
use crate::world::{SHARDS, Workload};
use std::collections::BTreeMap;
use std::time::Duration;
use thaw_proto::spec::Priority;

const TENANTS: [&str; 2] = ["red", "blue"];

/// Where a partition or a hold lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Killed; started again after.
    Crash(String),
    /// Nothing of it passes, both ways or one.
    Partition(String, String),
    OneWay(String, String),
    /// What is sent arrives when it is over: a full queue.
    Hold(String, String),
    /// A machine stands still, and goes on as if nothing had been.
    Stop(String),
    /// A coordinator does not reach the store.
    CutStore(String),
    /// Every lease ends at once.
    EndLeases,
    /// The store forgets its history.
    Compact,
    /// The wall clocks are set.
    Jump(u64),
}

/// A fault, when it begins, and how long it lasts.
#[derive(Debug, Clone)]
pub(crate) struct Planned {
    pub(crate) at: Duration,
    pub(crate) lasts: Duration,
    pub(crate) fault: Fault,
}

/// All that a seed says.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) coordinators: u64,
    /// Slots of each agent.
    pub(crate) agents: Vec<u32>,
    pub(crate) runs: Vec<(String, Workload, Duration)>,
    /// Slots at most, by tenant.
    pub(crate) quotas: BTreeMap<&'static str, u32>,
    pub(crate) faults: Vec<Planned>,
    pub(crate) hazards: Hazards,
    /// In a thousand calls: the store errs.
    pub(crate) store_trouble: u64,
    /// Milliseconds one way.
    pub(crate) store_slowest_ms: u64,
    /// What the store's clock, which ends leases, goes forward in a second of everybody else's.
    pub(crate) store_second_ms: u32,
    /// How long faults may happen.
    pub(crate) storm: Duration,
    /// Whether calm follows, in which every run has to end.
    pub(crate) liveness: bool,
    pub(crate) slowest_message_ms: u64,
}

impl Plan {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut dice = Dice::new(seed, "plan");
        let coordinators = 1 + dice.below(3);
        let agents: Vec<u32> = (0..dice.within(1..5)).map(|_| 1 + dice.below(3) as u32).collect();
        let slots: u32 = agents.iter().sum();
        let mut runs: Vec<_> = (0..dice.within(1..4)).map(|index| draw_run(&mut dice, index, slots)).collect();
        if dice.permille(400) {
            crowd(&mut dice, &mut runs, slots);
        }
        let quotas = if dice.permille(300) { draw_quotas(&mut dice, &runs, slots) } else { BTreeMap::new() };
        let liveness = !dice.permille(200);
        let storm = dice.millis(8_000..40_000);
        let calm_seed = dice.permille(80);
        let mut plan = Self {
            coordinators,
            agents,
            runs,
            quotas,
            faults: Vec::new(),
            hazards: Hazards {
                slowest_ms: if dice.permille(300) { 1500 } else { 40 },
                torn: if dice.permille(400) { 60 } else { 0 },
                zombies: 100,
                lies: 15,
                garbled: if dice.permille(250) { 250 } else { 0 },
                lulls: if dice.permille(400) { 500 } else { 0 },
                last_words: if dice.permille(400) { 300 } else { 0 },
                rot: if dice.permille(200) { 300 } else { 0 },
            },
            store_trouble: if calm_seed || dice.permille(400) { 0 } else { dice.within(1..60) },
            store_slowest_ms: if dice.permille(250) { 300 } else { 8 },
            store_second_ms: 1000,
            storm,
            liveness,
            slowest_message_ms: if dice.permille(250) { 200 } else { 20 },
        };
        let count = if calm_seed { 0 } else { dice.within(1..12) };
        plan.faults = (0..count).map(|_| plan.draw_fault(&mut dice)).collect();
        plan.set_clocks(&mut Dice::new(seed, "clocks"));
        plan.stop_hosts(&mut Dice::new(seed, "stops"));
        plan.faults.sort_by_key(|planned| planned.at);
        plan
    }

    /// The store's clock goes wrong, by far more than one does that is not broken; wall clocks are set while something else is being mended.
    fn set_clocks(&mut self, dice: &mut Dice) {
        if dice.permille(400) {
            self.store_second_ms = 900 + dice.below(201) as u32;
        }
        if dice.permille(200) && !self.faults.is_empty() {
            let beside = &self.faults[dice.below(self.faults.len() as u64) as usize];
            let at = beside.at + dice.millis(20..4_000);
            let fault = Fault::Jump(dice.below(3_600_000));
            self.faults.push(Planned { at, lasts: Duration::ZERO, fault });
        }
    }

    fn stop_hosts(&mut self, dice: &mut Dice) {
        if self.faults.is_empty() || !dice.permille(300) {
            return;
        }
        let storm = u64::try_from(self.storm.as_millis()).unwrap_or(u64::MAX);
        for _ in 0..dice.within(1..4) {
            let at = Duration::from_millis(dice.below(storm));
            let fault = Fault::Stop(self.host(dice));
            self.faults.push(Planned { at, lasts: dice.millis(100..8_000), fault });
        }
    }

    fn host(&self, dice: &mut Dice) -> String {
        let at = dice.below(self.coordinators + self.agents.len() as u64);
        if at < self.coordinators { format!("c{at}") } else { format!("a{}", at - self.coordinators) }
    }

    fn draw_fault(&self, dice: &mut Dice) -> Planned {
        let storm = u64::try_from(self.storm.as_millis()).unwrap_or(u64::MAX);
        let at = Duration::from_millis(dice.below(storm));
        let lasts = dice.millis(100..12_000);
        let (one, other) = (self.host(dice), self.host(dice));
        let coordinator = format!("c{}", dice.below(self.coordinators));
        let fault = match dice.below(100) {
            0..=29 => Fault::Crash(one),
            30..=44 if one != other => Fault::Partition(one, other),
            45..=54 if one != other => Fault::OneWay(one, other),
            55..=64 if one != other => Fault::Hold(one, other),
            65..=79 => Fault::CutStore(coordinator),
            80..=87 => Fault::EndLeases,
            88..=92 => Fault::Compact,
            93..=95 => Fault::Jump(dice.below(3_600_000)),
            _ => Fault::Crash(other),
        };
        Planned { at, lasts, fault }
    }
}

fn draw_run(dice: &mut Dice, index: u64, slots: u32) -> (String, Workload, Duration) {
    let min = 1 + dice.below(u64::from(slots.min(3))) as u32;
    let max = min + dice.below(3) as u32;
    let save_every = dice.within(2..8);
    let last_step = dice.within(4..40);
    let dies_at = dice.permille(80).then(|| 1 + dice.below(last_step));
    let step = dice.millis(30..400);
    let wait = dice.millis(0..4000);
    let keeps = !dice.permille(250);
    let priority = priority(dice);
    let tenant = TENANTS[usize::from(dice.permille(500))];
    let workload = Workload { workers: (min, max), priority, tenant, keeps, last_step, step, save_every, dies_at };
    (format!("r{index}"), workload, wait)
}

/// Each run of a tenant can start, and not always all of them at once.
fn draw_quotas(dice: &mut Dice, runs: &[(String, Workload, Duration)], slots: u32) -> BTreeMap<&'static str, u32> {
    let quota = |tenant: &'static str| {
        let of_tenant = runs.iter().map(|(_, load, _)| load).filter(|load| load.tenant == tenant);
        let least = of_tenant.map(|load| load.workers.0).max().unwrap_or(1);
        (tenant, least + dice.below(u64::from(slots)) as u32 / 2)
    };
    TENANTS.into_iter().map(quota).collect()
}

fn priority(dice: &mut Dice) -> Priority {
    match dice.below(4) {
        0 => Priority::Low,
        1 | 2 => Priority::Normal,
        _ => Priority::High,
    }
}

/// A long run holds all slots, or nearly, when one comes that is as important or more.
fn crowd(dice: &mut Dice, runs: &mut Vec<(String, Workload, Duration)>, slots: u32) {
    let mut holder = draw_run(dice, 0, slots);
    let load = &mut holder.1;
    let most = slots.min(SHARDS);
    let max = most - dice.below(2).min(u64::from(most) - 1) as u32;
    load.workers = (1 + dice.below(u64::from(max)) as u32, max);
    load.last_step = dice.within(30..70);
    load.dies_at = None;
    load.priority = if dice.permille(700) { Priority::Low } else { Priority::Normal };
    holder.2 = Duration::ZERO;
    let mut taker = draw_run(dice, 1, slots);
    taker.1.priority = if dice.permille(700) { Priority::High } else { Priority::Normal };
    taker.2 = dice.millis(2_000..7_000);
    runs.truncate(1);
    if let Some(other) = runs.first_mut() {
        other.0 = "r2".to_owned();
    }
    drop(runs.splice(0..0, [holder, taker]));
}
