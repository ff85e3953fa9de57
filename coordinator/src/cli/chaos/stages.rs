//! Going from one stage to the next without faults: how long the gang stands still, and who is still there after it.

use super::STAGE;
use super::cluster::Cluster;
use super::faults::settled;
use super::follow::{Sight, Steps};
use super::outcome::{Ended, Report};
use super::rows::{Goal, Row};

/// Trainers that were there as the run began, at each stage that began since.
#[derive(Debug, Default)]
pub(super) struct Kept {
    kept: usize,
    of: usize,
}

/// Looks at the trainers, by process id, each time that a stage begins, until the last has.
pub(super) async fn observe(cluster: &Cluster, run: Sight) -> Kept {
    let mut found = Kept::default();
    let stages = run.run().plan.map_or(0, |plan| plan.stages.len());
    if stages < 2 || !settled(cluster, &run, None).await {
        return found;
    }
    let first = cluster.trainers();
    for stage in 1..u32::try_from(stages).unwrap_or(u32::MAX) {
        if !run.until_stage(STAGE, stage).await {
            break;
        }
        let now = cluster.trainers();
        // Those of a run that ends are ended with it.
        if run.has_ended() {
            break;
        }
        found.kept += now.intersection(&first).count();
        found.of += first.len();
    }
    found
}

/// From the last update of a stage to the first of the next, with all that is evaluated between.
pub(super) fn rows(report: &mut Report, ended: &Ended, found: &Kept) {
    let pauses = pauses(&ended.steps);
    if pauses.is_empty() {
        return;
    }
    // The digest is of all ranks, at one step, and equal.
    let agreed = ended.run.stage_results.iter().filter(|result| !result.replica_digest.is_empty()).count();
    let row = Row::new("stage_change", pauses, Goal::P99(0.2)).with("kept", format!("{}/{}", found.kept, found.of));
    report.row(row.with("at_one_step", format!("{agreed}/{}", ended.run.stage_results.len())).with("unit", "s"));
    // CHAOS-2
    if found.kept < found.of {
        report.problems.push(format!("{} trainers did not outlive a change of stages", found.of - found.kept));
    }
}

fn pauses(steps: &Steps) -> Vec<f64> {
    let changes = steps.all.windows(2).filter(|pair| pair[1].stage > pair[0].stage);
    changes.map(|pair| (pair[1].at - pair[0].at).as_secs_f64()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_counted_where_the_stage_changes() {
        let line = |step, stage| format!("{{\"step\":{step},\"stage\":{stage},\"shards\":[]}}");
        let lines = [line(0, 0), line(1, 0), line(2, 1), line(3, 1), line(4, 2)];
        let steps = Steps::of(&lines.each_ref().map(String::as_str));
        assert_eq!(pauses(&steps).len(), 2);
        assert!(pauses(&Steps::default()).is_empty());
    }
}
