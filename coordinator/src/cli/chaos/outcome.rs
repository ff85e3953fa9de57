//! What came of it all, as rows and as problems (CHAOS-2).

use super::super::{Failure, print};
use super::count;
use super::faults::{Done, Fault};
use super::follow::Steps;
use super::rows::{Goal, Row};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
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
pub(super) fn faults(report: &mut Report, done: &[Done], disturbed: &Ended) {
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
            Fault::KillLeader => leader_rows(report, done, &all, &disturbed.steps),
            Fault::HandOver => {}
            Fault::Outage => outage_rows(report, done, &all, disturbed),
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

/// The rate of steps while nobody led against that of as long a time just before, over all changes: one alone is too short for a rate. And
/// what a client that calls all the time noticed.
fn leader_rows(report: &mut Report, done: &[Done], all: &[&Done], steps: &Steps) {
    let led: Vec<(&Done, Duration)> = all.iter().filter_map(|one| Some((*one, one.recovered?))).collect();
    let meanwhile: Vec<Span> = led.iter().map(|(one, length)| one.at..one.at + *length).collect();
    let before: Vec<Span> = led.iter().map(|(one, length)| calm_before(done, one, *length)).collect();
    let share = share_of_rate(steps, &meanwhile, &before);
    let row = Row::new("kill_leader.step_rate", share.into_iter().collect(), Goal::AtLeast(0.99));
    report.row(row.with("faults", all.len()).with("seconds", format!("{:.1}", seconds(&meanwhile))));
    let retries: Vec<f64> = all.iter().filter_map(|one| one.retries).map(f64::from).collect();
    let unanswered = all.len() - retries.len();
    report.row(Row::new("kill_leader.retries", retries, Goal::AtMost(1.0)).with("unanswered", unanswered));
}

/// What went on while there was no coordinator. The rate of steps is held against that before and after, so that what changes slowly is no
/// difference.
fn outage_rows(report: &mut Report, done: &[Done], all: &[&Done], disturbed: &Ended) {
    let rate = |one: &&Done| {
        let calm = [calm_before(done, one, one.length / 3), calm_after(done, one, one.length / 3)];
        let share = share_of_rate(&disturbed.steps, &[one.at..one.at + one.length], &calm)?;
        Some((share, seconds(&calm)))
    };
    let (shares, calm): (Vec<f64>, Vec<f64>) = all.iter().filter_map(rate).unzip();
    let row = Row::new("outage.step_rate", shares, Goal::AtLeast(0.99));
    report.row(row.with("seconds_around", format!("{:.0}", calm.iter().sum::<f64>())));
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

type Span = Range<Instant>;

fn seconds(spans: &[Span]) -> f64 {
    spans.iter().map(|span| span.end.saturating_duration_since(span.start).as_secs_f64()).sum()
}

/// So long before a fault, or since what the one before it cost.
fn calm_before(done: &[Done], one: &Done, length: Duration) -> Span {
    let free = done.iter().map(|other| other.over).filter(|over| *over < one.at).max();
    let from = one.at.checked_sub(length).into_iter().chain(free).max();
    from.unwrap_or(one.at)..one.at
}

/// So long after what a fault cost, or until the next one.
fn calm_after(done: &[Done], one: &Done, length: Duration) -> Span {
    let next = done.iter().map(|other| other.at).filter(|at| *at > one.at).min();
    one.over..next.into_iter().chain([one.over + length]).min().unwrap_or(one.over)
}

/// The rate of steps, each when it was first made, in some spans of a run over that in others: one machine's speed within minutes, where two
/// runs that follow each other would differ by what it changes in an hour. Nothing before the first step and after the last counts.
fn share_of_rate(steps: &Steps, during: &[Span], calm: &[Span]) -> Option<f64> {
    let firsts = steps.firsts();
    let (begin, end) = (*firsts.values().min()?, *firsts.values().max()?);
    let rate = |spans: &[Span]| {
        let spans: Vec<Span> = spans.iter().map(|span| span.start.max(begin)..span.end.min(end)).collect();
        let made = firsts.values().filter(|at| spans.iter().any(|span| span.contains(at))).count();
        count(made) / seconds(&spans)
    };
    let share = rate(during) / rate(calm);
    share.is_finite().then_some(share)
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

/// The rate of steps from the first fault to the last, whole intervals, each with what its fault cost, against that of the last third of each:
/// by then the gang is whole, and has been since a checkpoint.
pub(super) fn goodput(report: &mut Report, done: &[Done], steps: &Steps) {
    let [first, .., last] = done else { return };
    let between = (last.at - first.at) / u32::try_from(done.len() - 1).unwrap_or(u32::MAX);
    let calm: Vec<Span> = done.iter().skip(1).map(|one| calm_before(done, one, between / 3)).collect();
    if let Some(share) = share_of_rate(steps, &[first.at..last.at], &calm) {
        let row = Row::new("goodput", vec![share], Goal::AtLeast(0.95)).with("faults", done.len());
        let row = row.with("seconds", format!("{:.0}", (last.at - first.at).as_secs_f64()));
        let row = row.with("seconds_a_fault", format!("{:.1}", between.as_secs_f64()));
        report.row(row.with("seconds_calm", format!("{:.0}", seconds(&calm))));
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

    use super::super::faults::begun;
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
    fn a_share_of_rate_is_of_steps_first_made_while_the_run_lasts() {
        let begin = Instant::now();
        let at = |second: u64| begin + Duration::from_secs(second);
        let run = |made: &[(u64, u64)]| {
            let all = made.iter().map(|(second, step)| Applied { at: at(*second), step: *step, stage: 0 });
            Steps { all: all.collect(), ..Steps::default() }
        };
        // A step a second for ten seconds; then one every other second, some made again; then as before.
        let slow = (10..20).filter(|second| second % 2 == 0).map(|second| (second, second / 2 + 5));
        let again = (10..20).filter(|second| second % 2 == 1).map(|second| (second, 4));
        let made: Vec<(u64, u64)> =
            (0..10).map(|second| (second, second)).chain(slow).chain(again).chain((20..31).map(|s| (s, s))).collect();
        let share = |during: Span, calm: &[Span]| share_of_rate(&run(&made), &[during], calm);
        assert_eq!(share(at(10)..at(20), &[at(0)..at(10), at(20)..at(30)]), Some(0.5));
        assert_eq!(share(at(0)..at(20), &[at(20)..at(30)]), Some(0.75));
        assert_eq!(share(at(10)..at(20), &[at(20)..at(90)]), Some(0.5), "it ends at 30 s");
        assert_eq!(share(at(10)..at(20), &[at(90)..at(99)]), None, "nothing was made");
        assert_eq!(share_of_rate(&Steps::default(), &[at(0)..at(1)], &[at(1)..at(2)]), None);
    }

    #[test]
    fn goodput_is_what_faults_leave_of_the_rate_before_them() {
        let begin = Instant::now();
        let at = |second: u64| begin + Duration::from_secs(second);
        let fault = |second: u64, cost: u64| {
            let mut done = begun(Fault::KillTrainer);
            (done.at, done.over) = (at(second), at(second + cost));
            done
        };
        // A step a second, but none for three after each fault.
        let made = (0..100).filter(|second| second % 30 >= 3);
        let all = made.map(|second| Applied { at: at(second), step: second, stage: 0 }).collect();
        let (done, mut report) = ([fault(30, 3), fault(60, 3), fault(90, 0)], Report::default());
        goodput(&mut report, &done, &Steps { all, ..Steps::default() });
        let lines: Vec<String> = report.rows.iter().map(Row::line).collect();
        assert!(lines.len() == 1 && lines[0].contains("goodput p50=0.9000 "), "{lines:?}");
        let late = [fault(30, 28), fault(60, 3)];
        assert_eq!(
            calm_before(&late, &late[1], Duration::from_secs(10)),
            at(58)..at(60),
            "what a fault costs is not calm"
        );
        assert_eq!(
            calm_after(&late, &late[0], Duration::from_secs(10)),
            at(58)..at(60),
            "nor is what the next one costs"
        );
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
