//! What a run left in its folder, checked again: nothing is taken from what the run said about itself.
//!
//! VERIFY-1: every blob that a manifest names is there and hashes to its name.
//! VERIFY-2: between two manifests only groups that a stage in between trains have changed.
//! VERIFY-3: where a trace was written, each epoch used every training sample exactly once.
//! VERIFY-4: every stage that ended has the digest that its trainers agreed on, and as many updates as its manifests say.
//!
//! Beside it stands what the plan said of each stage, and what was measured.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::path::{Path, PathBuf};
use thaw_core::manifest::{BlobRef, GroupState, Manifest, blob_name};
use thaw_core::step_time::{self, StepSeconds};
use thaw_proto::pb;
use thaw_proto::plan::Plan;
use thaw_proto::spec::OnEnter;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{} is no run's folder: {what}; give a run's id with its --data-dir, or its folder", path.display())]
    NotARun { path: PathBuf, what: String },
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
}

/// What was found. Field names are a contract.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verified {
    pub checks: Vec<Check>,
    pub stages: Vec<StageFacts>,
}

/// One law, and whether it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub holds: bool,
    /// What was looked at, or the first thing that is wrong.
    pub detail: String,
}

/// A stage as planned and as measured. `null` for what was not measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageFacts {
    pub name: String,
    /// Bytes summed over trainers in a step.
    pub gradient_bytes: Pair,
    pub optimizer_bytes: Pair,
    pub checkpoint_bytes: Pair,
    /// The plan's work at rates that the run's first stages give (`thaw_core::step_time`): of the others a prediction.
    pub step_seconds: Pair,
    /// Whether the rates come from this stage.
    pub calibrates: bool,
    /// Of a trainer's tensors, with a checkpoint's copies where one was written within the stage.
    pub memory_bytes: Pair,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Pair {
    pub planned: Option<f64>,
    pub actual: Option<f64>,
}

impl Pair {
    /// Of the actual to the planned value.
    #[must_use]
    pub fn ratio(&self) -> Option<f64> {
        let (planned, actual) = (self.planned?, self.actual?);
        (planned > 0.0).then(|| actual / planned)
    }
}

impl Verified {
    #[must_use]
    pub fn holds(&self) -> bool {
        self.checks.iter().all(|check| check.holds)
    }
}

/// Checks the run in `folder`; `progress` hears of every blob that is read: how many are done, of how many.
///
/// # Errors
/// [`Error`] where there is no run, or its files cannot be read. A law that does not hold is no error but a [`Check`].
pub fn verify(folder: &Path, progress: impl FnMut(usize, usize)) -> Result<Verified, Error> {
    let plan = plan(folder)?;
    let manifests = manifests(folder)?;
    let lines = metrics(folder)?;
    let checks = vec![
        blobs(folder, &manifests, progress)?,
        frozen(&plan, &manifests),
        samples(folder, &plan)?,
        stages(&manifests),
    ];
    Ok(Verified { checks, stages: facts(&plan, &manifests, &lines) })
}

fn plan(folder: &Path) -> Result<Plan, Error> {
    let path = folder.join("plan.json");
    let not = |what: String| Error::NotARun { path: folder.to_owned(), what };
    let text = fs::read_to_string(&path).map_err(|error| not(format!("plan.json cannot be read ({error})")))?;
    let plan: pb::Plan = thaw_proto::text::parse(&text).map_err(|error| not(format!("plan.json: {error}")))?;
    Plan::try_from(&plan).map_err(|error| not(format!("plan.json: {error}")))
}

/// Oldest first: generations and steps are in their names, with leading zeros.
fn manifests(folder: &Path) -> Result<Vec<Manifest>, Error> {
    let path = folder.join("manifests");
    let read = |source| Error::Read { path: path.clone(), source };
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read(error)),
    };
    let mut paths =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>().map_err(read)?;
    paths.sort();
    let mut manifests = Vec::with_capacity(paths.len());
    for path in paths {
        let bytes = fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        manifests.push(Manifest::from_json(&bytes).map_err(|error| Error::NotARun {
            path: folder.to_owned(),
            what: format!("{}: {error}", path.display()),
        })?);
    }
    Ok(manifests)
}

fn check(name: &'static str, wrong: Option<String>, looked_at: String) -> Check {
    Check { name, holds: wrong.is_none(), detail: wrong.unwrap_or(looked_at) }
}

/// VERIFY-1
fn blobs(folder: &Path, manifests: &[Manifest], mut progress: impl FnMut(usize, usize)) -> Result<Check, Error> {
    let named: BTreeSet<&BlobRef> = manifests.iter().flat_map(Manifest::blobs).collect();
    let (mut wrong, mut bytes) = (None, 0);
    for (done, blob) in named.iter().enumerate() {
        progress(done, named.len());
        let path = folder.join(blob_name(&blob.blake3));
        let problem = match hash(&path) {
            Ok((hash, length)) if hash == blob.blake3 && length == blob.bytes => None,
            Ok((hash, length)) => Some(format!("{} has {length} bytes that hash to {hash}", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some(format!("{} is missing", path.display())),
            Err(source) => return Err(Error::Read { path, source }),
        };
        bytes += blob.bytes;
        wrong = wrong.or(problem);
    }
    progress(named.len(), named.len());
    let looked_at = format!("{} blobs of {} checkpoints, {bytes} bytes", named.len(), manifests.len());
    Ok(check("blobs hash to their names", wrong, looked_at))
}

fn hash(path: &Path) -> io::Result<(String, u64)> {
    let (mut file, mut hasher, mut length) = (fs::File::open(path)?, blake3::Hasher::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((hasher.finalize().to_hex().to_string(), length));
        }
        hasher.update(&buffer[..read]);
        length += read as u64;
    }
}

/// VERIFY-2. A stage's end may hold the best weights of an earlier step, so that all stages from one manifest's to the next's count.
fn frozen(plan: &Plan, manifests: &[Manifest]) -> Check {
    let (mut compared, mut wrong) = (0_usize, None);
    for pair in manifests.windows(2) {
        let of = |manifest: &Manifest| manifest.position.stage.0 as usize;
        let (from, to) = (of(&pair[0]), of(&pair[1]));
        let between = plan.stages.iter().take(to + 1).skip(from.min(to).saturating_sub(1));
        let trained: BTreeSet<usize> =
            between.flat_map(|stage| &stage.trainable_groups).map(|group| group.0 as usize).collect();
        for (index, (before, after)) in pair[0].groups.iter().zip(&pair[1].groups).enumerate() {
            if trained.contains(&index) {
                continue;
            }
            compared += 1;
            if before.weights != after.weights && wrong.is_none() {
                wrong = Some(format!(
                    "{} differs between steps {} and {}, and no stage in between trains it",
                    before.name, pair[0].position.step, pair[1].position.step
                ));
            }
        }
    }
    check("frozen groups never change", wrong, format!("{compared} pairs of a group's states"))
}

#[derive(Deserialize)]
struct TraceLine {
    stage: u32,
    stage_step: u32,
    shards: Vec<TraceShard>,
}

#[derive(Deserialize)]
struct TraceShard {
    samples: Vec<u32>,
}

/// VERIFY-3
fn samples(folder: &Path, plan: &Plan) -> Result<Check, Error> {
    const NAME: &str = "every sample once an epoch";
    let path = folder.join("trace/steps.jsonl");
    let file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(check(NAME, None, "no trace was written (verification.trace)".to_owned()));
        }
        Err(source) => return Err(Error::Read { path, source }),
    };
    // A step that was done again after a loss is the one that counts.
    let mut steps: BTreeMap<(u32, u32), Vec<u32>> = BTreeMap::new();
    for line in BufReader::new(file).lines() {
        let line = line.map_err(|source| Error::Read { path: path.clone(), source })?;
        // The last line may have been cut short by a loss.
        let Ok(line) = serde_json::from_str::<TraceLine>(&line) else { continue };
        let samples = line.shards.into_iter().flat_map(|shard| shard.samples).collect();
        steps.insert((line.stage, line.stage_step), samples);
    }
    let per_epoch = plan.steps_per_epoch.max(1);
    let mut epochs: BTreeMap<(u32, u32), (u32, Vec<u32>)> = BTreeMap::new();
    for ((stage, stage_step), samples) in steps {
        let (count, all) = epochs.entry((stage, stage_step / per_epoch)).or_default();
        *count += 1;
        all.extend(samples);
    }
    let (mut wrong, mut whole) = (None, 0);
    for ((stage, epoch), (count, mut samples)) in epochs {
        let used = samples.len();
        samples.sort_unstable();
        samples.dedup();
        let expected = usize::try_from(plan.data.train_samples).unwrap_or(usize::MAX);
        let complete = count == per_epoch;
        whole += usize::from(complete);
        if samples.len() != used {
            wrong = wrong.or(Some(format!("stage {stage}, epoch {epoch} used {} samples twice", used - samples.len())));
        } else if complete && used != expected {
            wrong = wrong.or(Some(format!("stage {stage}, epoch {epoch} used {used} of {expected} samples")));
        }
    }
    Ok(check(NAME, wrong, format!("{whole} whole epochs of the trace")))
}

/// VERIFY-4
fn stages(manifests: &[Manifest]) -> Check {
    const NAME: &str = "trainers agreed at every stage's end";
    let Some(last) = manifests.last() else {
        return check(NAME, None, "no checkpoint was written".to_owned());
    };
    let is_digest = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let wrong = last.stage_results.iter().zip(&last.ended_stage_steps).find_map(|(result, steps)| {
        if !is_digest(&result.replica_digest) {
            return Some(format!("stage {} has no digest", result.stage));
        }
        (result.steps != *steps)
            .then(|| format!("stage {} made {} updates, its manifest says {steps}", result.stage, result.steps))
    });
    check(NAME, wrong, format!("{} stages have ended", last.stage_results.len()))
}

/// The part of a line of metrics that is compared.
#[derive(Deserialize)]
struct MetricsLine {
    kind: String,
    #[serde(default)]
    stage: u32,
    #[serde(default)]
    stage_step: u32,
    #[serde(default)]
    step_time: Option<StepTime>,
    #[serde(default)]
    all_reduced_bytes: u64,
    #[serde(default)]
    prefix_computed: u64,
}

#[derive(Deserialize)]
struct StepTime {
    whole: f64,
    optimizer: f64,
    prefix: f64,
}

fn metrics(folder: &Path) -> Result<Vec<MetricsLine>, Error> {
    let path = folder.join("metrics.jsonl");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(source) => return Err(Error::Read { path, source }),
    };
    let lines = text.lines().filter_map(|line| serde_json::from_str::<MetricsLine>(line).ok());
    Ok(lines.filter(|line| line.kind == "progress").collect())
}

#[expect(clippy::cast_precision_loss, reason = "bytes and operations are compared by their ratio")]
fn facts(plan: &Plan, manifests: &[Manifest], lines: &[MetricsLine]) -> Vec<StageFacts> {
    let of_stage = |index: usize| lines.iter().filter(move |line| line.stage as usize == index);
    let steps: Vec<Option<StepSeconds>> = (0..plan.stages.len())
        .map(|index| step_seconds(&of_stage(index).collect::<Vec<_>>(), plan.steps_per_epoch))
        .collect();
    let predicted = step_time::predictions(plan, &steps);
    let results = manifests.last().map_or(&[][..], |manifest| &manifest.stage_results);
    let stage = |(index, stage): (usize, &thaw_proto::plan::PlannedStage)| {
        let trained: BTreeSet<usize> = stage.trainable_groups.iter().map(|group| group.0 as usize).collect();
        let ended = results.get(index);
        // At its end a stage's state is its own where the next goes on from it, else that of the best weights: those may be an earlier stage's,
        // and those of the last stage have no optimizer state.
        let keeps = plan.stages.get(index + 1).map(|next| next.on_enter == OnEnter::Keep);
        let manifest = manifests.iter().rfind(|manifest| {
            let (at, best) =
                (manifest.position, manifest.tracker.best.as_ref().map(|best| best.position.stage.0 as usize));
            let within = at.stage.0 as usize == index && at.stage_step > 0;
            let own = keeps.is_some_and(|keeps| keeps || best == Some(index));
            within || (at.stage.0 as usize == index + 1 && at.stage_step == 0 && own)
        });
        let pair = |planned: u64, actual: Option<u64>| Pair {
            planned: (planned > 0).then_some(planned as f64),
            actual: actual.filter(|actual| *actual > 0).map(|actual| actual as f64),
        };
        let optimizer = |group: &GroupState| group.optimizer.as_ref().map_or(0, |blob| blob.bytes);
        let whole = |group: &GroupState| optimizer(group) + group.weights.as_ref().map_or(0, |blob| blob.bytes);
        let of_trained = |manifest: &Manifest| {
            manifest
                .groups
                .iter()
                .enumerate()
                .filter(|(index, _)| trained.contains(index))
                .map(|(_, group)| optimizer(group))
                .sum()
        };
        StageFacts {
            name: stage.name.clone(),
            gradient_bytes: pair(stage.cost.gradient_bytes, of_stage(index).map(|line| line.all_reduced_bytes).max()),
            optimizer_bytes: pair(stage.cost.optimizer_bytes, manifest.map(of_trained)),
            checkpoint_bytes: pair(
                stage.cost.checkpoint_bytes,
                manifest.map(|manifest| manifest.groups.iter().map(whole).sum()),
            ),
            step_seconds: Pair { planned: predicted[index].seconds, actual: steps[index].map(|step| step.whole) },
            calibrates: predicted[index].calibrates,
            memory_bytes: pair(
                stage.memory_bytes + if ended.is_some_and(|ended| ended.saves > 0) { stage.cost.save_bytes } else { 0 },
                ended.map(|ended| ended.peak_memory_bytes),
            ),
        }
    };
    plan.stages.iter().enumerate().map(stage).collect()
}

/// A stage's median step. Its first epoch fills the cache and warms up; a stage of one epoch has no other, and the time in the prefix is
/// taken off.
fn step_seconds(lines: &[&MetricsLine], steps_per_epoch: u32) -> Option<StepSeconds> {
    let mut later: Vec<&MetricsLine> =
        lines.iter().copied().filter(|line| line.stage_step > steps_per_epoch && line.prefix_computed == 0).collect();
    if later.is_empty() {
        later = lines.iter().copied().skip(1).collect();
    }
    let times = |part: fn(&MetricsLine, &StepTime) -> f64| {
        median(later.iter().filter_map(|line| Some(part(line, line.step_time.as_ref()?))).collect())
    };
    let whole = times(|line, time| time.whole - if line.prefix_computed > 0 { time.prefix } else { 0.0 })?;
    Some(StepSeconds { whole, update: times(|_, time| time.optimizer) })
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (below, above) = (values.get(values.len().checked_sub(1)? / 2)?, values.get(values.len() / 2)?);
    Some(f64::midpoint(*below, *above))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_or_between_the_two() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }

    #[test]
    fn a_folder_without_a_plan_is_no_run() {
        let folder = tempfile::tempdir().unwrap();
        let error = verify(folder.path(), |_, _| ()).unwrap_err();
        assert!(error.to_string().contains("plan.json cannot be read"), "{error}");
    }
}
