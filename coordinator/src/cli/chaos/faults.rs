//! The faults: what is done, and what is measured of it.

use super::super::Failure;
use super::cluster::{Cluster, DEADLINE, leading, voices};
use super::follow::{Followed, has_ended};
use super::processes::{self, POLL};
use clap::ValueEnum;
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use thaw_proto::pb::{self, RunState};

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
        }
    }

    /// Whether trainers are to notice nothing of it.
    pub(super) fn spares_the_gang(self) -> bool {
        match self {
            Self::KillLeader | Self::HandOver | Self::Outage => true,
            Self::KillTrainer | Self::StopTrainer | Self::KillAgent | Self::StopAgent => false,
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
    /// Until the next update that was not made before; of a coordinator, until the next one serves.
    pub(super) recovered: Option<Duration>,
    /// Trainers that the fault was done to, or to whose agent.
    victims: BTreeSet<u32>,
    /// The others that lived before, and how many of them live after.
    pub(super) others: usize,
    pub(super) kept: usize,
    /// Of an outage, how long there was no coordinator.
    pub(super) length: Duration,
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

    fn next(&mut self) -> u64 {
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
pub(super) async fn settled(cluster: &Cluster, run: &Followed, head: Option<u64>) -> bool {
    let end = Instant::now() + DEADLINE;
    loop {
        let seen = run.run();
        if run.has_ended() {
            return false;
        }
        // Who is starting to join is no member that a fault could spare.
        let full = seen.world_sizes.iter().copied().max().unwrap_or(0);
        let whole = seen.world_size == full && cluster.is_whole(full);
        if seen.state() == RunState::Running && whole && head_step(&seen) > head {
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

/// Does `fault` to the cluster and waits for what follows.
pub(super) async fn inflict(
    cluster: &mut Cluster,
    run: &Followed,
    fault: Fault,
    draw: &mut Draw,
    outage: Duration,
) -> Result<Done, Failure> {
    let before = cluster.trainers();
    let mut done = match fault {
        Fault::KillTrainer | Fault::StopTrainer => harm_trainer(cluster, run, fault, draw).await,
        Fault::KillAgent => kill_agent(cluster, run, draw).await?,
        Fault::StopAgent => stop_agent(cluster, run, draw).await,
        Fault::KillLeader => change_leader(cluster, fault, Signal::SIGKILL).await?,
        Fault::HandOver => change_leader(cluster, fault, Signal::SIGTERM).await?,
        Fault::Outage => outage_of(cluster, run, outage).await?,
    };
    let others: BTreeSet<u32> = before.difference(&done.victims).copied().collect();
    let kept = cluster.trainers().intersection(&others).count();
    // The trainers of a run that has ended are ended with it, and say nothing about the fault.
    let is_over = kept < others.len() && run.until_run(ENDING, has_ended).await.is_some();
    if !is_over {
        (done.kept, done.others) = (kept, others.len());
    }
    Ok(done)
}

fn begun(fault: Fault) -> Done {
    let (detected, recovered, missed) = (None, None, None);
    let (length, victims) = (Duration::ZERO, BTreeSet::new());
    Done {
        fault,
        at: Instant::now(),
        detected,
        recovered,
        victims,
        others: 0,
        kept: 0,
        length,
        head_moved: false,
        missed,
    }
}

async fn harm_trainer(cluster: &Cluster, run: &Followed, fault: Fault, draw: &mut Draw) -> Done {
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
async fn recover(done: &mut Done, run: &Followed, generation: u64, next: u64) {
    let lost = |seen: &pb::Run| seen.generation > generation || seen.state() != RunState::Running;
    let Some(detected) = run.until_run(UNNOTICED, lost).await else {
        done.missed = Some(format!("not noticed within {} s", UNNOTICED.as_secs()));
        return;
    };
    done.detected = Some(detected - done.at);
    match run.until_step(DEADLINE, next).await {
        Some(at) => done.recovered = Some(at - done.at),
        None => done.missed = Some("the run ended, or stood still, before its next step".to_owned()),
    }
}

async fn kill_agent(cluster: &mut Cluster, run: &Followed, draw: &mut Draw) -> Result<Done, Failure> {
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

async fn stop_agent(cluster: &Cluster, run: &Followed, draw: &mut Draw) -> Done {
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
            let _ = run.until_run(DEADLINE, again).await;
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

async fn change_leader(cluster: &mut Cluster, fault: Fault, signal: Signal) -> Result<Done, Failure> {
    let leader = cluster.wait_for_workers().await?;
    let mut others = cluster.addresses();
    others.remove(leader);
    let others = voices(&others)?;
    // So that the answer of the next one does not wait for a connection.
    let _ = leading(&others).await;
    let mut done = begun(fault);
    cluster.signal_leader(leader, signal).await?;
    let end = done.at + DEADLINE;
    while leading(&others).await.is_none() {
        if Instant::now() > end {
            done.missed = Some("no other coordinator leads".to_owned());
            break;
        }
        tokio::time::sleep(POLL).await;
    }
    if done.missed.is_none() {
        done.recovered = Some(done.at.elapsed());
    }
    cluster.restart_member(leader).await?;
    cluster.wait_for_workers().await?;
    Ok(done)
}

async fn outage_of(cluster: &mut Cluster, run: &Followed, outage: Duration) -> Result<Done, Failure> {
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
