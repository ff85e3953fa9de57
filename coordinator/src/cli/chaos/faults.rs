//! The faults: what is done, and what is measured of it.

use super::super::Failure;
use super::super::client::{self, Again};
use super::cluster::{Cluster, DEADLINE, leading, voices};
use super::follow::{Sight, has_ended};
use super::processes::{self, POLL};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::{self, RunState};
use tonic::transport::Channel;

/// What an update that was under way needs to be seen.
const SETTLE: Duration = Duration::from_millis(30);
/// A trainer that stands still and is not missed by then is let go on.
const UNNOTICED: Duration = Duration::from_secs(60);
/// Until a coordinator says that a run has ended whose trainers have.
const ENDING: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Fault {
    /// SIGKILL of a trainer.
    KillTrainer,
    /// SIGSTOP of a trainer.
    StopTrainer,
    /// SIGKILL of an agent, which takes its trainers with it. It is started again once it is missed.
    KillAgent,
    /// SIGSTOP of an agent until its worker is missed: silent, as behind a link that is cut, while its trainers go on.
    StopAgent,
    /// SIGKILL of the leading coordinator. It is started again once another leads.
    KillLeader,
    /// SIGTERM to the leading coordinator, which hands over.
    HandOver,
    /// SIGKILL of all coordinators and of etcd; they are started again after --outage.
    Outage,
    /// The network of an agent and its trainers is cut off until its worker is missed. Needs root, or user namespaces, and the cluster of this
    /// program.
    Partition,
    /// As many processors as there are kept busy for --load: nobody may be taken for lost.
    Load,
}

/// When a fault is inflicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Moment {
    /// As soon as it is due.
    Any,
    /// While the gang goes from one stage to the next.
    StageChange,
}

impl Fault {
    /// In rows.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::KillTrainer => "kill_trainer",
            Self::StopTrainer => "stop_trainer",
            Self::KillAgent => "kill_agent",
            Self::StopAgent => "stop_agent",
            Self::KillLeader => "kill_leader",
            Self::HandOver => "hand_over",
            Self::Outage => "outage",
            Self::Partition => "partition",
            Self::Load => "load",
        }
    }

    /// Whether trainers are to notice nothing of it.
    pub(super) fn spares_the_gang(self) -> bool {
        match self {
            Self::KillLeader | Self::HandOver | Self::Outage | Self::Load => true,
            Self::KillTrainer | Self::StopTrainer | Self::KillAgent | Self::StopAgent | Self::Partition => false,
        }
    }
}

/// One fault, and what came of it.
#[derive(Debug, Clone)]
pub(super) struct Done {
    pub(super) fault: Fault,
    pub(super) at: Instant,
    /// Until a client saw that the gang is not whole.
    pub(super) detected: Option<Duration>,
    /// Until the others were a gang again: they have let go of what they waited for in the old one.
    pub(super) released: Option<Duration>,
    /// Until the next update that was not made before; of a coordinator, until the next one serves.
    pub(super) recovered: Option<Duration>,
    /// Trainers that the fault was done to, or to whose agent.
    victims: BTreeSet<u32>,
    /// The others that lived before, and how many of them live after.
    pub(super) others: usize,
    pub(super) kept: usize,
    /// How long an outage, or a load, lasted.
    pub(super) length: Duration,
    /// When the next fault may begin.
    pub(super) over: Instant,
    /// Of a change of leaders, how often a client had to make one call again, at most.
    pub(super) retries: Option<u32>,
    /// Of a load, how often a gang was broken up meanwhile.
    pub(super) verdicts: u64,
    /// Of an outage, whether a checkpoint was committed after it.
    pub(super) head_moved: bool,
    /// What did not come, in words.
    pub(super) missed: Option<String>,
}

/// Random numbers that follow from a seed (SplitMix64: Steele, Lea and Flood, 2014).
#[derive(Debug, Clone)]
pub(super) struct Draw(u64);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In `0..bound`; 0 where that is empty.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        let drawn = self.next() % u64::try_from(bound).unwrap_or(u64::MAX).max(1);
        usize::try_from(drawn).unwrap_or(0)
    }
}

/// Each of `kinds` as often as the others, in an order that the seed gives.
pub(super) fn schedule(draw: &mut Draw, kinds: &[Fault], count: usize) -> Vec<Fault> {
    let mut faults: Vec<Fault> = kinds.iter().copied().cycle().take(if kinds.is_empty() { 0 } else { count }).collect();
    for last in (1..faults.len()).rev() {
        let other = draw.below(last + 1);
        faults.swap(last, other);
    }
    faults
}

/// Until the run trains, with all its trainers there, and has committed a checkpoint of a later step than `head`: a run that never comes to one
/// ends by itself after some losses. `false` where it has ended or stands still.
pub(super) async fn settled(cluster: &Cluster, run: &Sight, head: Option<u64>) -> bool {
    let end = Instant::now() + DEADLINE;
    loop {
        let seen = run.run();
        if run.has_ended() {
            return false;
        }
        // Who is starting to join is no member that a fault could spare. Processes are looked for last: that takes a while.
        let full = seen.world_sizes.iter().copied().max().unwrap_or(0);
        let is_saved = seen.state() == RunState::Running && seen.world_size == full && head_step(&seen) > head;
        if is_saved && cluster.is_whole(full) {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        tokio::time::sleep(POLL).await;
    }
}

pub(super) fn head_step(run: &pb::Run) -> Option<u64> {
    Some(run.head.as_ref()?.position.as_ref()?.step)
}

/// Of faults that last as long as they are told to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lengths {
    pub(super) outage: Duration,
    pub(super) load: Duration,
}

/// Does `fault` to the cluster and waits for what follows.
pub(super) async fn inflict(
    cluster: &mut Cluster,
    run: &Sight,
    fault: Fault,
    draw: &mut Draw,
    lengths: Lengths,
) -> Result<Done, Failure> {
    let before = cluster.trainers();
    let mut done = match fault {
        Fault::KillTrainer | Fault::StopTrainer => harm_trainer(cluster, run, fault, draw).await,
        Fault::KillAgent => kill_agent(cluster, run, draw).await?,
        Fault::StopAgent => stop_agent(cluster, run, draw).await,
        Fault::KillLeader => change_leader(cluster, run, fault, Signal::SIGKILL).await?,
        Fault::HandOver => change_leader(cluster, run, fault, Signal::SIGTERM).await?,
        Fault::Outage => outage_of(cluster, run, lengths.outage).await?,
        Fault::Partition => partition(cluster, run, draw).await?,
        Fault::Load => load(run, lengths.load).await,
    };
    let others: BTreeSet<u32> = before.difference(&done.victims).copied().collect();
    let kept = cluster.trainers().intersection(&others).count();
    // The trainers of a run that has ended are ended with it, and say nothing about the fault.
    let is_over = kept < others.len() && run.until_run(ENDING, has_ended).await.is_some();
    if !is_over {
        (done.kept, done.others) = (kept, others.len());
    }
    done.over = Instant::now();
    Ok(done)
}

pub(super) fn begun(fault: Fault) -> Done {
    let at = Instant::now();
    Done {
        fault,
        at,
        detected: None,
        released: None,
        recovered: None,
        victims: BTreeSet::new(),
        others: 0,
        kept: 0,
        length: Duration::ZERO,
        over: at,
        retries: None,
        verdicts: 0,
        head_moved: false,
        missed: None,
    }
}

async fn harm_trainer(cluster: &Cluster, run: &Sight, fault: Fault, draw: &mut Draw) -> Done {
    let generation = run.run().generation;
    let trainers: Vec<u32> = cluster.trainers().into_iter().collect();
    let Some(victim) = trainers.get(draw.below(trainers.len())).copied() else {
        return Done { missed: Some("no trainer lives".to_owned()), ..begun(fault) };
    };
    let mut done = Done { victims: BTreeSet::from([victim]), ..begun(fault) };
    processes::send(victim, if fault == Fault::KillTrainer { Signal::SIGKILL } else { Signal::SIGSTOP });
    tokio::time::sleep(SETTLE).await;
    let next = run.next();
    recover(&mut done, run, generation, next).await;
    // One that stood still is gone by now, or belongs to a generation that is over: it must do no harm when it wakes.
    processes::send(victim, Signal::SIGCONT);
    done
}

/// Until the loss is seen, and until the update after `next` others.
async fn recover(done: &mut Done, run: &Sight, generation: u64, next: u64) {
    let lost = |seen: &pb::Run| seen.generation > generation || seen.state() != RunState::Running;
    let Some(detected) = run.until_run(UNNOTICED, lost).await else {
        done.missed = Some(format!("not noticed within {} s", UNNOTICED.as_secs()));
        return;
    };
    done.detected = Some(detected - done.at);
    let again = |seen: &pb::Run| seen.generation > generation && seen.state() == RunState::Running;
    // A client may hear of the next step before it hears of the gang that makes it.
    let (released, recovered) = tokio::join!(run.until_run(DEADLINE, again), run.until_step(DEADLINE, next));
    done.released = released.filter(|_| again(&run.run())).map(|at| at - done.at);
    match recovered {
        Some(at) => done.recovered = Some(at - done.at),
        None => done.missed = Some("the run ended, or stood still, before its next step".to_owned()),
    }
}

/// Its trainers stand still with those that wait for their sums.
async fn partition(cluster: &Cluster, run: &Sight, draw: &mut Draw) -> Result<Done, Failure> {
    let generation = run.run().generation;
    let victim = draw.below(cluster.workers());
    let mut done = Done { victims: cluster.trainers_of(victim), ..begun(Fault::Partition) };
    cluster.network()?.cut(victim).await?;
    tokio::time::sleep(SETTLE).await;
    let next = run.next();
    recover(&mut done, run, generation, next).await;
    cluster.network()?.mend(victim).await?;
    cluster.wait_for_workers().await?;
    Ok(done)
}

async fn load(run: &Sight, length: Duration) -> Done {
    let generation = run.run().generation;
    let mut done = begun(Fault::Load);
    let busy = Busy::start();
    if run.until_run(length, |_| false).await.is_some() {
        done.missed = Some("the run ended before the load did".to_owned());
    }
    drop(busy);
    done.length = done.at.elapsed();
    done.verdicts = run.run().generation.saturating_sub(generation);
    done
}

/// Keeps every processor busy until dropped.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn start() -> Self {
        let over = Arc::new(AtomicBool::new(false));
        for _ in 0..2 * std::thread::available_parallelism().map_or(1, std::num::NonZero::get) {
            let over = Arc::clone(&over);
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(over)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

async fn kill_agent(cluster: &mut Cluster, run: &Sight, draw: &mut Draw) -> Result<Done, Failure> {
    let generation = run.run().generation;
    let victim = draw.below(cluster.workers());
    let mut done = Done { victims: cluster.trainers_of(victim), ..begun(Fault::KillAgent) };
    if !cluster.kill_agent(victim).await {
        return Ok(Done { missed: Some("the worker is on another machine".to_owned()), ..done });
    }
    tokio::time::sleep(SETTLE).await;
    let next = run.next();
    let lost = |seen: &pb::Run| seen.generation > generation || seen.state() != RunState::Running;
    if let Some(at) = run.until_run(UNNOTICED, lost).await {
        done.detected = Some(at - done.at);
    }
    cluster.restart_agent(victim).await?;
    match run.until_step(DEADLINE, next).await {
        Some(at) => done.recovered = Some(at - done.at),
        None => done.missed = Some("the run ended, or stood still, before its next step".to_owned()),
    }
    Ok(done)
}

async fn stop_agent(cluster: &Cluster, run: &Sight, draw: &mut Draw) -> Done {
    let generation = run.run().generation;
    let victim = draw.below(cluster.workers());
    let mut done = Done { victims: cluster.trainers_of(victim), ..begun(Fault::StopAgent) };
    if !cluster.signal_agent(victim, Signal::SIGSTOP) {
        return Done { missed: Some("the worker is on another machine".to_owned()), ..done };
    }
    let lost = |seen: &pb::Run| seen.generation > generation || seen.state() != RunState::Running;
    // Its trainers train on until it is missed: only then is there something to recover from.
    match run.until_run(UNNOTICED, lost).await {
        Some(at) => {
            done.detected = Some(at - done.at);
            let again = |seen: &pb::Run| seen.generation > generation && seen.state() == RunState::Running;
            let released = run.until_run(DEADLINE, again).await;
            done.released = released.filter(|_| again(&run.run())).map(|at| at - done.at);
            match run.until_step(DEADLINE, run.next()).await {
                Some(at) => done.recovered = Some(at - done.at),
                None => done.missed = Some("the run ended, or stood still, before its next step".to_owned()),
            }
        }
        None => done.missed = Some(format!("not noticed within {} s", UNNOTICED.as_secs())),
    }
    cluster.signal_agent(victim, Signal::SIGCONT);
    done
}

async fn change_leader(cluster: &mut Cluster, run: &Sight, fault: Fault, signal: Signal) -> Result<Done, Failure> {
    let leader = cluster.wait_for_workers().await?;
    let mut others = cluster.addresses();
    others.remove(leader);
    let others = voices(&others)?;
    // So that the answer of the next one does not wait for a connection.
    let _ = leading(&others).await;
    let is_over = Cell::new(false);
    let change = async {
        let changed = until_another_leads(cluster, fault, (leader, signal), &others).await;
        is_over.set(true);
        changed
    };
    let name = run.run().name;
    let mut calls = cluster.client()?;
    // Now connected to the leader, as a client that is in use.
    let _ = explain(&mut calls, &name).await;
    let (done, retries) = tokio::join!(change, most_retries(calls, &name, &is_over));
    let mut done = done?;
    done.retries = retries;
    cluster.restart_member(leader).await?;
    cluster.wait_for_workers().await?;
    Ok(done)
}

async fn until_another_leads(
    cluster: &Cluster,
    fault: Fault,
    (leader, signal): (usize, Signal),
    others: &[ClusterServiceClient<Channel>],
) -> Result<Done, Failure> {
    let mut done = begun(fault);
    cluster.signal_leader(leader, signal).await?;
    let end = done.at + DEADLINE;
    while leading(others).await.is_none() {
        if Instant::now() > end {
            done.missed = Some("no other coordinator leads".to_owned());
            return Ok(done);
        }
        tokio::time::sleep(POLL).await;
    }
    done.recovered = Some(done.at.elapsed());
    Ok(done)
}

/// Makes one call of the leader's after another until the change is over: how often one had to be made again, at most. `None` where one failed.
async fn most_retries(mut calls: client::Coordinators, name: &str, is_over: &Cell<bool>) -> Option<u32> {
    let mut most = 0;
    while !is_over.get() {
        let before = calls.retries();
        explain(&mut calls, name).await.ok()?;
        most = most.max(calls.retries() - before);
        tokio::time::sleep(POLL).await;
    }
    Some(most)
}

async fn explain(calls: &mut client::Coordinators, name: &str) -> Result<(), Failure> {
    let request = pb::ExplainRunRequest { name: name.to_owned() };
    calls.call(Again::Yes, async |mut runs: client::Runs| runs.explain_run(request.clone()).await).await.map(drop)
}

async fn outage_of(cluster: &mut Cluster, run: &Sight, outage: Duration) -> Result<Done, Failure> {
    let head = head_step(&run.run());
    let mut done = begun(Fault::Outage);
    cluster.kill_control_plane().await;
    tokio::time::sleep(outage).await;
    done.length = done.at.elapsed();
    let back = Instant::now();
    cluster.restart_control_plane().await?;
    cluster.wait_for_workers().await?;
    done.recovered = Some(back.elapsed());
    let moved = |seen: &pb::Run| head_step(seen) > head;
    done.head_moved = run.until_run(DEADLINE, moved).await.is_some() && moved(&run.run());
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_schedule_with_each_fault_as_often() {
        let kinds = [Fault::KillTrainer, Fault::KillLeader, Fault::HandOver];
        let first = schedule(&mut Draw::new(7), &kinds, 30);
        assert_eq!(first, schedule(&mut Draw::new(7), &kinds, 30));
        assert_ne!(first, schedule(&mut Draw::new(8), &kinds, 30));
        for kind in kinds {
            assert_eq!(first.iter().filter(|fault| **fault == kind).count(), 10);
        }
        assert!(schedule(&mut Draw::new(7), &[], 5).is_empty());
    }
}
