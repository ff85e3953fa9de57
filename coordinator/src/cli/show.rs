//! Tables and documents for people.

use super::args::Format;
use super::{Failure, print_as};
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use std::fmt::Write as _;
use std::process::ExitCode;
use thaw_coordinator::recover::Recovered;
use thaw_coordinator::verify::Verified;
use thaw_core::quarantine::{Resting, time_of_day};
use thaw_core::step_time::Rates;
use thaw_proto::pb;
use thaw_proto::plan::StepWork;

pub(super) fn run(run: &pb::Run, output: Format) -> Result<ExitCode, Failure> {
    print_as(run, output, || run_table(run));
    Ok(ExitCode::SUCCESS)
}

pub(super) fn runs(list: &pb::ListRunsResponse, output: Format) -> Result<ExitCode, Failure> {
    print_as(list, output, || {
        let mut table = table(&["run", "state", "reason", "stage", "step", "workers", "generation"]);
        for run in &list.runs {
            let position = run.position.unwrap_or_default();
            table.add_row([
                short(&run.name).to_owned(),
                state(run.state()),
                reason(run.reason()),
                stage_name(run, position.stage),
                position.step.to_string(),
                run.world_size.to_string(),
                run.generation.to_string(),
            ]);
        }
        table.to_string()
    });
    Ok(ExitCode::SUCCESS)
}

pub(super) fn workers(list: &pb::ListWorkersResponse, output: Format) -> Result<ExitCode, Failure> {
    print_as(list, output, || {
        let mut table = table(&["worker", "host", "slots", "free", "heartbeat", "runs", "quarantined"]);
        for worker in &list.workers {
            table.add_row([
                worker.name.clone(),
                worker.host.clone(),
                worker.slots.to_string(),
                worker.free_slots.to_string(),
                format!("{} ms", worker.heartbeat_age_ms),
                worker.runs.join(", "),
                worker.quarantined.iter().map(quarantined).collect::<Vec<_>>().join(", "),
            ]);
        }
        table.to_string()
    });
    Ok(ExitCode::SUCCESS)
}

pub(super) fn checkpoints(list: &pb::ListCheckpointsResponse, output: Format) -> Result<ExitCode, Failure> {
    print_as(list, output, || {
        let mut table = table(&["step", "stage", "generation", "manifest"]);
        for checkpoint in &list.checkpoints {
            let position = checkpoint.position.unwrap_or_default();
            table.add_row([
                position.step.to_string(),
                position.stage.to_string(),
                checkpoint.generation.to_string(),
                checkpoint.manifest.clone(),
            ]);
        }
        table.to_string()
    });
    Ok(ExitCode::SUCCESS)
}

pub(super) fn explained(found: &pb::ExplainRunResponse, output: Format) -> Result<ExitCode, Failure> {
    print_as(found, output, || {
        let mut text = format!("{}  {}  {}", short(&found.name), state(found.state()), reason(found.reason()));
        if !found.message.is_empty() {
            let _ = write!(text, "\n{}", found.message);
        }
        if found.queue_place > 0 {
            let (place, length) = (found.queue_place, found.queue_length);
            let _ = write!(text, "\nplace {place} of {length} in the queue; {} slot(s) free", found.slots_free);
        }
        if let Some(until) = &found.quarantined_until {
            let resting = Resting { slots: found.slots_quarantined, until_ms: unix_ms(until) };
            let _ = write!(text, "\n{resting}");
        }
        if found.world_size > 0 {
            let _ = write!(text, "\n{}", trainers(found.world_size, found.wanted_world_size));
        }
        let quota = found.tenant_quota.map_or_else(String::new, |quota| format!(" of {quota}"));
        let _ = write!(text, "\ntenant {} holds {}{quota} slot(s)", found.tenant, found.tenant_slots);
        text
    });
    Ok(ExitCode::SUCCESS)
}

fn quarantined(slot: &pb::QuarantinedSlot) -> String {
    let until = slot.until.as_ref().map_or_else(String::new, |until| format!(" until {}", time_of_day(unix_ms(until))));
    format!("slot {}{until} ({} faults)", slot.slot, slot.faults)
}

fn unix_ms(time: &prost_types::Timestamp) -> u64 {
    u64::try_from(time.seconds).unwrap_or(0) * 1000 + u64::try_from(time.nanos / 1_000_000).unwrap_or(0)
}

/// The checks, and each stage's plan beside what was measured.
pub(super) fn verified(found: &Verified) -> String {
    let mut checks = table(&["", "check", "what was looked at"]);
    for check in &found.checks {
        checks.add_row([if check.holds { "holds" } else { "FAILS" }, check.name, check.detail.as_str()]);
    }
    let mut stages = table(&["stage", "what", "planned", "measured", "measured / planned"]);
    for stage in &found.stages {
        let sizes = [
            ("gradients", stage.gradient_bytes),
            ("optimizer", stage.optimizer_bytes),
            ("checkpoint", stage.checkpoint_bytes),
            ("memory", stage.memory_bytes),
        ];
        let as_bytes = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| bytes(value as u64));
        let rows = sizes.map(|(what, pair)| (what, as_bytes(pair.planned), as_bytes(pair.actual), pair.ratio()));
        let seconds =
            |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{:.2} ms", 1000.0 * value));
        let time = stage.step_seconds;
        let step = if stage.calibrates { "step (calibrates)" } else { "step" };
        let step = (step, seconds(time.planned), seconds(time.actual), time.ratio());
        for (index, (what, planned, actual, ratio)) in rows.into_iter().chain([step]).enumerate() {
            let name = if index == 0 { stage.name.as_str() } else { "" };
            let ratio = ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}"));
            stages.add_row([name, what, &planned, &actual, &ratio]);
        }
    }
    align_right(&mut stages, &[2, 3, 4]);
    format!("{checks}\n{stages}")
}

/// What was rebuilt, and what could not be.
pub(super) fn recovered(recovered: &Recovered) -> String {
    let mut runs = table(&["run", "state", "from step", "not as it was"]);
    for run in &recovered.runs {
        runs.add_row([
            run.id.to_string(),
            format!("{:?}", run.state).to_uppercase(),
            run.step.to_string(),
            run.lost.join("\n"),
        ]);
    }
    align_right(&mut runs, &[2]);
    let mut text = format!("{} run(s) rebuilt; request ids of submissions are forgotten\n{runs}", recovered.runs.len());
    for (path, why) in &recovered.left_out {
        let _ = write!(text, "\nleft out: {}: {why}", path.display());
    }
    text
}

fn run_table(run: &pb::Run) -> String {
    let mut text = format!("{}  {}  {}", short(&run.name), state(run.state()), reason(run.reason()));
    if !run.message.is_empty() {
        let _ = write!(text, "\n{}", run.message);
    }
    let position = run.position.unwrap_or_default();
    let _ = write!(
        text,
        "\nstage {}, step {}, attempt {}, generation {}, {}\n",
        stage_name(run, position.stage),
        position.step,
        run.attempt,
        run.generation,
        trainers(run.world_size, run.wanted_world_size)
    );
    if !run.stage_results.is_empty() {
        text.push_str(&closing(run));
    }
    text
}

/// How many there are, and how many there are to be where that is another number.
fn trainers(present: u32, wanted: u32) -> String {
    let of = if present == wanted { String::new() } else { format!(" of {wanted} wanted") };
    format!("{present}{of} trainer(s)")
}

/// The plan: groups, stages, what they cost, and remarks.
pub(super) fn plan(plan: &pb::Plan) -> String {
    let data = plan.data.clone().unwrap_or_default();
    let mut text = format!(
        "{} training, {} evaluation and {} test samples in {} classes; {} samples a step in {} shards, {} steps an epoch\n",
        data.train_samples,
        data.eval_samples,
        data.test_samples,
        plan.classes.len(),
        plan.global_batch_size,
        plan.logical_shards,
        plan.steps_per_epoch
    );
    let mut groups = table(&["layer group", "parameters", "forward", "first trained in"]);
    for (index, group) in plan.groups.iter().enumerate() {
        let first = plan.stages.iter().find(|stage| stage.thawed_groups.iter().any(|&thawed| thawed as usize == index));
        groups.add_row([
            group.name.clone(),
            count(group.parameters),
            format!("{} MAC", count(group.forward_flops)),
            first.map_or_else(|| "never".to_owned(), |stage| stage.name.clone()),
        ]);
    }
    align_right(&mut groups, &[1, 2]);
    let headings = ["stage", "trainable", "rate", "until", "steps at most", "trainers", "all-reduced a step", "memory"];
    let mut stages = table(&headings);
    for stage in &plan.stages {
        stages.add_row([
            stage.name.clone(),
            count(stage.trainable_parameters),
            rates(&stage.learning_rates),
            until(stage.until.as_ref()),
            stage.max_steps.to_string(),
            stage.workers.map_or_else(|| "all".to_owned(), |most| format!("at most {most}")),
            bytes(stage.all_reduce_bytes),
            bytes(stage.memory_bytes),
        ]);
    }
    align_right(&mut stages, &[1, 4, 5, 6, 7]);
    let headings = [
        "stage",
        "flops a step",
        "of a full step",
        "time of a step",
        "cache gains",
        "optimizer",
        "checkpoint",
        "kept for saving",
        "cache",
    ];
    let mut costs = table(&headings);
    let times: Vec<f64> = plan.stages.iter().map(step_time_on_a_common_core).collect();
    let longest = times.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    for (stage, time) in plan.stages.iter().zip(times) {
        let cost = stage.cost.unwrap_or_default();
        costs.add_row([
            stage.name.clone(),
            count(cost.step_flops),
            format!("{:.1} %", 100.0 * ratio(cost.step_flops, cost.full_step_flops)),
            format!("{:.1} %", 100.0 * time / longest),
            gain(&cost),
            bytes(cost.optimizer_bytes),
            bytes(cost.checkpoint_bytes),
            bytes(cost.save_bytes),
            if cost.cache_bytes == 0 { "-".to_owned() } else { bytes(cost.cache_bytes) },
        ]);
    }
    align_right(&mut costs, &[1, 2, 3, 4, 5, 6, 7, 8]);
    let _ = write!(
        text,
        "{groups}\n{stages}\n{costs}\n\
         flops a step: of all trainers, when the frozen prefix costs nothing, as from the stage's second epoch on where nothing is augmented; no engine can go below that. \
         time of a step: of the longest stage's, on a common processor core; thaw verify has it in seconds, from a run's first two stages. \
         cache gains: how much faster that makes a step, at most."
    );
    for note in &plan.notes {
        let _ = write!(text, "\nnote: {note}");
    }
    text
}

/// Seconds. Only their proportions mean anything before a machine is known.
fn step_time_on_a_common_core(stage: &pb::PlannedStage) -> f64 {
    let work = stage.cost.and_then(|cost| cost.work).unwrap_or_default();
    Rates::COMMON.seconds(&StepWork::from(&work))
}

/// How much faster a step can become when the frozen prefix costs nothing.
fn gain(cost: &pb::StageCost) -> String {
    let gain = ratio(cost.uncached_step_flops, cost.step_flops);
    match cost.uncached_step_flops == cost.step_flops {
        true => "-".to_owned(),
        false if gain < 100.0 => format!("{gain:.1} x"),
        false => format!("{gain:.0} x"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// The closing table, then the test result and where the model is.
pub(super) fn closing(run: &pb::Run) -> String {
    let mut stages = table(&["stage", "thawed groups", "steps", "seconds", "eval loss", "eval accuracy"]);
    for result in &run.stage_results {
        let planned = run.plan.as_ref().and_then(|plan| plan.stages.get(result.stage as usize));
        let eval = result.eval.clone().unwrap_or_default();
        stages.add_row([
            planned.map_or_else(|| result.stage.to_string(), |stage| stage.name.clone()),
            planned.map_or_else(String::new, |stage| group_names(run, &stage.thawed_groups)),
            result.steps.to_string(),
            format!("{:.1}", result.seconds),
            format!("{:.4}", eval.loss),
            format!("{:.4}", eval.accuracy),
        ]);
    }
    align_right(&mut stages, &[2, 3, 4, 5]);
    let mut text = stages.to_string();
    for result in &run.stage_results {
        if let Some(test) = &result.test {
            let name = stage_name(run, result.stage);
            let _ = write!(
                text,
                "\nafter stage {name} alone: test accuracy {:.4}, macro F1 {:.4}, loss {:.4}",
                test.accuracy, test.macro_f1, test.loss
            );
        }
    }
    if let Some(result) = &run.result {
        if let Some(test) = &result.test {
            let _ = write!(
                text,
                "\ntest accuracy {:.4}, macro F1 {:.4}, loss {:.4} on {} samples",
                test.accuracy, test.macro_f1, test.loss, test.samples
            );
        }
        let _ = write!(text, "\n{} steps in {:.1} s\nmodel: {}", result.steps, result.seconds, result.model);
    }
    text
}

pub(super) fn stage_name(run: &pb::Run, stage: u32) -> String {
    let planned = run.plan.as_ref().and_then(|plan| plan.stages.get(stage as usize));
    planned.map_or_else(|| "-".to_owned(), |stage| stage.name.clone())
}

/// `runs/x` as `x`.
pub(super) fn short(name: &str) -> &str {
    name.strip_prefix("runs/").unwrap_or(name)
}

pub(super) fn state(state: pb::RunState) -> String {
    state.as_str_name().trim_start_matches("RUN_STATE_").to_owned()
}

pub(super) fn reason(reason: pb::RunReason) -> String {
    reason.as_str_name().trim_start_matches("RUN_REASON_").to_owned()
}

/// Consecutive rates that differ are shown from the highest group down.
pub(super) fn rates(rates: &[f64]) -> String {
    let mut shown: Vec<String> = rates.iter().rev().map(|rate| format!("{rate:.2e}")).collect();
    shown.dedup();
    match shown.as_slice() {
        [] => "-".to_owned(),
        [only] => only.clone(),
        [first, .., last] => format!("{first} … {last}"),
    }
}

fn group_names(run: &pb::Run, groups: &[u32]) -> String {
    let all = run.plan.as_ref().map(|plan| plan.groups.as_slice()).unwrap_or_default();
    let names: Vec<&str> =
        groups.iter().filter_map(|&group| all.get(group as usize)).map(|group| group.name.as_str()).collect();
    match names.as_slice() {
        [] => "-".to_owned(),
        [first, .., last] if names.len() > 3 => format!("{first} … {last} ({})", names.len()),
        _ => names.join(", "),
    }
}

fn until(until: Option<&pb::Until>) -> String {
    let Some(until) = until else { return "-".to_owned() };
    let mut parts = Vec::new();
    if let Some(epochs) = until.max_epochs {
        parts.push(format!("{epochs} epochs"));
    }
    if let Some(steps) = until.max_steps {
        parts.push(format!("{steps} steps"));
    }
    if let Some(early) = &until.early_stopping {
        parts.push(format!("patience {}", early.patience.unwrap_or_default()));
    }
    parts.join(" or ")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY).set_header(header);
    table
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for &column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn scaled(value: u64, step: f64, units: &[&str]) -> String {
    let mut scaled = value as f64;
    let mut unit = 0;
    while scaled >= step && unit + 1 < units.len() {
        scaled /= step;
        unit += 1;
    }
    if unit == 0 { format!("{value} {}", units[0]) } else { format!("{scaled:.1} {}", units[unit]) }
}

fn count(value: u64) -> String {
    scaled(value, 1000.0, &["", "k", "M", "G", "T"]).trim_end().to_owned()
}

fn bytes(value: u64) -> String {
    scaled(value, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(count(999), "999");
        assert_eq!(count(22_713_216), "22.7 M");
        assert_eq!(bytes(4620), "4.5 KiB");
    }

    #[test]
    fn rates_are_shown_from_the_head_down() {
        assert_eq!(rates(&[1e-5, 1e-4, 1e-3]), "1.00e-3 … 1.00e-5");
        assert_eq!(rates(&[1e-3]), "1.00e-3");
    }
}
