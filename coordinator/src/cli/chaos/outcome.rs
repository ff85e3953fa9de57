//! What came of it all, as rows and as problems (CHAOS-2).

use super::super::{Failure, print};
use super::count;
use super::faults::{Done, Fault};
use super::follow::Steps;
use super::rows::{Goal, Row};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use thaw_coordinator::verify;
use thaw_proto::pb;

/// What was found so far.
#[derive(Debug, Default)]
pub(super) struct Report {
    rows: Vec<Row>,
    pub(super) problems: Vec<String>,
    pub(super) plain: bool,
}

impl Report {
    pub(super) fn row(&mut self, row: Row) {
        if self.plain {
            print(&row.line());
        }
        self.rows.push(row);
    }

    pub(super) fn json(&self) -> String {
        let document = serde_json::json!({"rows": self.rows, "problems": self.problems});
        serde_json::to_string_pretty(&document).expect("names and numbers are plain data")
    }
}

/// A run that has ended, with its steps.
pub(super) struct Ended {
    pub(super) run: pb::Run,
    pub(super) steps: Steps,
    pub(super) folder: PathBuf,
}

/// Rows of each kind of fault: what it cost, and what the gang noticed of those that it must not notice.
pub(super) fn faults(report: &mut Report, done: &[Done], reference: Option<&Ended>, disturbed: &Ended) {
    let mut kinds: BTreeMap<Fault, Vec<&Done>> = BTreeMap::new();
    for one in done {
        kinds.entry(one.fault).or_default().push(one);
    }
    for (fault, all) in kinds {
        let name = fault.name();
        let kept: usize = all.iter().map(|one| one.kept).sum();
        let others: usize = all.iter().map(|one| one.others).sum();
        if fault != Fault::Load {
            let missed = all.iter().filter(|one| one.missed.is_some()).count();
            let row = Row::new(name, times(&all, |one| one.recovered), goals(fault).0);
            report.row(row.with("kept", format!("{kept}/{others}")).with("missed", missed).with("unit", "s"));
        }
        // CHAOS-2
        if fault.spares_the_gang() && kept < others {
            report.problems.push(format!("{} of {others} trainers did not outlive {name}", others - kept));
        }
        match fault {
            Fault::KillTrainer | Fault::StopTrainer | Fault::KillAgent | Fault::StopAgent | Fault::Partition => {
                loss_rows(report, fault, &all);
            }
            Fault::KillLeader => leader_rows(report, done, &all, disturbed),
            Fault::HandOver => {}
            Fault::Outage => outage_rows(report, &all, reference, disturbed),
            Fault::Load => load_rows(report, &all),
        }
    }
}

/// Seconds of those that have them.
fn times(all: &[&Done], of: impl Fn(&Done) -> Option<Duration>) -> Vec<f64> {
    all.iter().filter_map(|one| of(one)).map(|time| time.as_secs_f64()).collect()
}

/// Of what is done until a gang goes on, and until its loss is declared and the others are let go.
fn goals(fault: Fault) -> (Goal, Goal) {
    match fault {
        Fault::KillTrainer => (Goal::P50AndP99(1.0, 2.5), Goal::None),
        Fault::StopTrainer | Fault::StopAgent | Fault::Partition => (Goal::None, Goal::P99(2.5)),
        Fault::KillAgent | Fault::Outage | Fault::Load => (Goal::None, Goal::None),
        Fault::KillLeader => (Goal::P99(4.0), Goal::None),
        Fault::HandOver => (Goal::P99(0.3), Goal::None),
    }
}

/// When a loss was declared, when the others were a gang again, and how many of them kept their processes.
fn loss_rows(report: &mut Report, fault: Fault, all: &[&Done]) {
    let (name, goal) = (fault.name(), goals(fault).1);
    report.row(Row::new(format!("{name}.detected"), times(all, |one| one.detected), goal).with("unit", "s"));
    report.row(Row::new(format!("{name}.released"), times(all, |one| one.released), goal).with("unit", "s"));
    survivors(report, name, all);
}

/// The share of those it was not done to that live on, by process id.
fn survivors(report: &mut Report, name: &str, all: &[&Done]) {
    let shares = all.iter().filter(|one| one.others > 0).map(|one| count(one.kept) / count(one.others)).collect();
    report.row(Row::new(format!("{name}.survivors"), shares, Goal::AtLeast(1.0)).with("unit", "share"));
}

/// Steps made while nobody led, for those made in as long a time just before, over all changes: one alone is too short for a rate. And what a
/// client that calls all the time noticed.
fn leader_rows(report: &mut Report, done: &[Done], all: &[&Done], disturbed: &Ended) {
    let made = |from: Instant, to: Instant| {
        count(disturbed.steps.all.iter().filter(|applied| (from..to).contains(&applied.at)).count())
    };
    let (mut before, mut meanwhile) = ((0.0, 0.0), (0.0, 0.0));
    for one in all {
        let Some(length) = one.recovered else { continue };
        let free = done.iter().map(|other| other.over).filter(|over| *over < one.at).max();
        let from = free.into_iter().chain(one.at.checked_sub(length)).max().unwrap_or(one.at);
        before = (before.0 + made(from, one.at), before.1 + (one.at - from).as_secs_f64());
        meanwhile = (meanwhile.0 + made(one.at, one.at + length), meanwhile.1 + length.as_secs_f64());
    }
    let rate = |(steps, seconds): (f64, f64)| steps / seconds;
    let shares = (before.0 > 0.0 && meanwhile.1 > 0.0).then(|| rate(meanwhile) / rate(before));
    let row = Row::new("kill_leader.step_rate", shares.into_iter().collect(), Goal::AtLeast(0.99));
    report.row(row.with("faults", all.len()).with("steps", meanwhile.0).with("seconds", format!("{:.1}", meanwhile.1)));
    let retries: Vec<f64> = all.iter().filter_map(|one| one.retries).map(f64::from).collect();
    let unanswered = all.len() - retries.len();
    report.row(Row::new("kill_leader.retries", retries, Goal::AtMost(1.0)).with("unanswered", unanswered));
}

/// What went on while there was no coordinator.
fn outage_rows(report: &mut Report, all: &[&Done], reference: Option<&Ended>, disturbed: &Ended) {
    if let Some(reference) = reference {
        let rate = |one: &&Done| share_of_steps(&reference.steps, &disturbed.steps, one.at, one.at + one.length);
        let rates = all.iter().filter_map(rate).collect();
        report.row(Row::new("outage.step_rate", rates, Goal::AtLeast(0.99)));
    }
    let during = |one: &&Done| {
        let until = one.at + one.length;
        let steps = disturbed.steps.all.iter().filter(|applied| (one.at..=until).contains(&applied.at));
        let stages: BTreeSet<u32> = steps.clone().map(|applied| applied.stage).collect();
        (count(steps.count()), count(stages.len().saturating_sub(1)))
    };
    let (steps, changes): (Vec<f64>, Vec<f64>) = all.iter().map(during).unzip();
    report.row(Row::new("outage.steps", steps, Goal::None));
    let planned = disturbed.run.plan.as_ref().map_or(0, |plan| plan.stages.len());
    let goal = if planned > 1 { Goal::AtLeast(1.0) } else { Goal::None };
    report.row(Row::new("outage.stage_changes", changes, goal));
    let heads = all.iter().map(|one| count(usize::from(one.head_moved))).collect();
    report.row(Row::new("outage.checkpoint_after", heads, Goal::AtLeast(1.0)));
    survivors(report, "outage", all);
}

/// Time that the undisturbed run took for the steps first made from one instant to another, over the time they took: 1 is undisturbed.
fn share_of_steps(reference: &Steps, disturbed: &Steps, from: Instant, until: Instant) -> Option<f64> {
    let (firsts, expected) = (disturbed.firsts(), reference.firsts());
    let last_by = |end: Instant| firsts.iter().filter(|(_, at)| **at <= end).map(|(step, _)| *step).max();
    // From the last step before, so that a pause at the beginning counts.
    let (first, last) = (last_by(from)?, last_by(until)?);
    let took = *firsts.get(&last)? - *firsts.get(&first)?;
    let undisturbed = *expected.get(&last)? - *expected.get(&first)?;
    (took > Duration::ZERO).then(|| undisturbed.as_secs_f64() / took.as_secs_f64())
}

/// Gangs that were broken up although nobody was lost.
fn load_rows(report: &mut Report, all: &[&Done]) {
    let verdicts: u64 = all.iter().map(|one| one.verdicts).sum();
    let counts = all.iter().map(|one| count(usize::try_from(one.verdicts).unwrap_or(usize::MAX))).collect();
    let seconds: f64 = all.iter().map(|one| one.length.as_secs_f64()).sum();
    report.row(Row::new("false_verdict", counts, Goal::AtMost(0.0)).with("seconds", format!("{seconds:.0}")));
    if verdicts > 0 {
        report.problems.push(format!("{verdicts} gangs were broken up under load although nobody was lost"));
    }
}

/// Steps from the first fault to the last against those of the undisturbed run in as long a time: whole intervals, each with what its fault cost.
pub(super) fn goodput(report: &mut Report, done: &[Done], reference: &Ended, disturbed: &Ended) {
    let (Some(first), Some(last)) = (done.first(), done.last()) else { return };
    if let Some(share) = share_of_steps(&reference.steps, &disturbed.steps, first.at, last.at) {
        let seconds = (last.at - first.at).as_secs_f64();
        let row = Row::new("goodput", vec![share], Goal::AtLeast(0.95)).with("faults", done.len());
        let between = seconds / count(done.len() - 1);
        report.row(row.with("seconds", format!("{seconds:.0}")).with("seconds_a_fault", format!("{between:.1}")));
    }
}

/// Whether both runs came to the same weights.
pub(super) fn weights(report: &mut Report, done: &[Done], reference: &Ended, disturbed: &Ended) {
    let weights = |ended: &Ended| ended.run.result.as_ref().map(|result| result.weights_blake3.clone());
    let equal = weights(reference).is_some() && weights(reference) == weights(disturbed);
    report
        .row(Row::new("weights_equal", vec![count(usize::from(equal))], Goal::AtLeast(1.0)).with("faults", done.len()));
    if !equal {
        let (with, without) = (weights(disturbed), weights(reference));
        report.problems.push(format!("the weights are {with:?}, without faults they are {without:?}"));
    }
}

/// The ledger: each step there once, with the samples it has without faults, and each epoch using each sample once.
pub(super) fn samples(report: &mut Report, reference: Option<&Ended>, disturbed: &Ended) -> Result<(), Failure> {
    ledger(report, reference, disturbed);
    let verified = verify::verify(&disturbed.folder, |_, _| {}).map_err(|error| Failure::from_error(&error))?;
    for check in verified.checks.iter().filter(|check| !check.holds) {
        report.problems.push(format!("{}: {}", check.name, check.detail));
    }
    Ok(())
}

fn ledger(report: &mut Report, reference: Option<&Ended>, disturbed: &Ended) {
    let made = disturbed.run.result.as_ref().map_or(0, |result| result.steps);
    let found = &disturbed.steps.samples;
    let missing = (0..made).filter(|step| !found.contains_key(step)).count();
    let differs =
        |reference: &Ended| (0..made).filter(|step| found.get(step) != reference.steps.samples.get(step)).count();
    let differing = reference.map_or(0, differs) + usize::try_from(disturbed.steps.contradicted).unwrap_or(usize::MAX);
    let row = Row::new("ledger", vec![count(missing + differing)], Goal::AtMost(0.0));
    let again = disturbed.steps.all.len() - found.len();
    report.row(
        row.with("steps", made).with("missing", missing).with("other_samples", differing).with("made_again", again),
    );
    if missing + differing > 0 {
        report
            .problems
            .push(format!("{missing} steps are missing, {differing} have other samples than without faults"));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::super::follow::Applied;
    use super::*;

    fn made(weights: &str, lines: &[&str], steps: u64) -> Ended {
        let result = pb::RunResult { weights_blake3: weights.to_owned(), steps, ..Default::default() };
        let run = pb::Run { result: Some(result), ..Default::default() };
        Ended { run, steps: Steps::of(lines), folder: PathBuf::new() }
    }

    fn line(step: u64, sample: u32) -> String {
        format!("{{\"step\":{step},\"stage\":0,\"shards\":[{{\"shard\":0,\"samples\":[{sample}]}}],\"loss\":1}}")
    }

    #[test]
    fn a_share_of_steps_leaves_out_what_was_before_and_after() {
        let begin = Instant::now();
        let at = |second: u64| begin + Duration::from_secs(second);
        let run = |seconds: &[u64]| {
            let all = seconds.iter().zip(0..).map(|(second, step)| Applied { at: at(*second), step, stage: 0 });
            Steps { all: all.collect(), ..Steps::default() }
        };
        // A step a second. Ten are lost after the second step, and many before the last one.
        let (reference, disturbed) = (run(&[0, 1, 2, 3, 4]), run(&[0, 1, 12, 13, 99]));
        let from_to = |from, until| share_of_steps(&reference, &disturbed, at(from), at(until));
        assert_eq!(from_to(2, 20), Some(2.0 / 12.0), "what the first fault costs counts");
        assert_eq!(from_to(12, 20), Some(1.0));
        assert_eq!(from_to(12, 99), Some(2.0 / 87.0));
        assert_eq!(from_to(14, 20), None, "nothing was made");
    }

    /// CHAOS-2.
    #[test]
    fn other_weights_and_other_samples_are_problems_and_a_missed_goal_is_none() {
        let (first, second, other) = (line(0, 4), line(1, 5), line(1, 6));
        let reference = made("aa", &[&first, &second], 2);
        let problems = |disturbed: &Ended| {
            let mut report = Report::default();
            weights(&mut report, &[], &reference, disturbed);
            ledger(&mut report, Some(&reference), disturbed);
            report.problems.len()
        };
        // A step that was made again counts once.
        assert_eq!(problems(&made("aa", &[&first, &first, &second], 2)), 0);
        assert_eq!(problems(&made("bb", &[&first, &second], 2)), 1);
        assert_eq!(problems(&made("aa", &[&first], 2)), 1, "a step is missing");
        assert_eq!(problems(&made("aa", &[&first, &other], 2)), 1, "another sample");
        assert_eq!(problems(&made("aa", &[&first, &other, &second], 2)), 1, "another sample before a loss");
        let mut report = Report::default();
        report.row(Row::new("slow", vec![9.0], Goal::P99(1.0)));
        assert_eq!(report.problems, Vec::<String>::new());
    }
}
