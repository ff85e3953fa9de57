//! The checkpoint manifest: one JSON document that names everything a trainer needs to go on, each piece by its content.
//!
//! - CKPT-1: a manifest is written once and never changed; its name tells generation and step.
//! - CKPT-2: a group that has never trained has no blob; one that froze again keeps the blob it had.
//! - CKPT-3: it is complete: weights and optimizer state of every group that ever trained, and the counters that the sampler,
//!   the schedules and the decisions read. No generator state: randomness follows from (seed, step, shard).
//! - CKPT-4: a reader checks it against its own spec, data and graph before it uses it.

use crate::stage_end::RunTracker;
use serde::{Deserialize, Serialize};
use thaw_proto::ids::{Generation, GroupIndex, LeaderEpoch, RunId, Step};
use thaw_proto::plan::Plan;
use thaw_proto::run::{Position, StageResult};

/// The only layout this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format_version: u32,
    pub run: RunId,
    /// Of the gang that wrote it.
    pub generation: Generation,
    /// Of the coordinator under which it was written. Absent: not known to the writer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader_epoch: Option<LeaderEpoch>,
    /// After this many updates.
    pub position: Position,
    /// Updates of each stage that has ended, in order; as many as `position.stage`.
    pub ended_stage_steps: Vec<u32>,
    /// Epoch, counted from the run's start, that this stage began with.
    pub stage_first_epoch: u32,
    /// Evaluations so far, as far as decisions read them.
    pub tracker: RunTracker,
    pub stage_results: Vec<StageResult>,
    /// Wall time of training and evaluation so far, over all attempts.
    pub seconds: f64,
    /// Of the present stage's share of `seconds`.
    pub stage_seconds: f64,
    /// Trainers of the gang that wrote it.
    pub world_size: u32,
    pub fingerprints: Fingerprints,
    /// In the plan's order, one per layer group.
    pub groups: Vec<GroupState>,
    /// The state at `tracker.best`, one per layer group. Absent: no evaluation yet.
    pub best_groups: Option<Vec<GroupState>>,
}

/// BLAKE3, hex, of what a manifest belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprints {
    /// Of the run spec.
    pub spec: String,
    /// Of the data and its split.
    pub data: String,
    /// Of the exported graph.
    pub graph: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupState {
    pub name: String,
    /// Parameters and buffers. Absent: the group has never trained, so they are those the run began with.
    pub weights: Option<BlobRef>,
    /// Absent: the group has not trained, or its weights are the best ones and no stage to come goes on from those.
    pub optimizer: Option<BlobRef>,
    /// Updates the optimizer state has had; its bias correction counts them.
    pub optimizer_steps: u64,
}

/// A blob by its content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlobRef {
    /// 64 hex digits, lower case.
    pub blake3: String,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "reading a checkpoint manifest: it is not the JSON document that this version writes; restore it from its storage or use an older checkpoint"
    )]
    Json(#[from] serde_json::Error),
    #[error(
        "reading a checkpoint manifest: its format version is {found}, this version reads {FORMAT_VERSION}; use the release that wrote it"
    )]
    Version { found: u32 },
    #[error("reading a checkpoint manifest: {field} {problem}")]
    Field { field: String, problem: String },
    #[error(
        "reading a checkpoint manifest: it belongs to another {what} ({theirs}, not {ours}); give the run its own folder"
    )]
    Foreign { what: &'static str, theirs: String, ours: String },
}

/// Path below the run's folder (CKPT-1).
#[must_use]
pub fn file_name(generation: Generation, step: Step) -> String {
    format!("manifests/{:08}-{:010}.json", generation.0, step.0)
}

/// Path of a blob below the run's folder.
#[must_use]
pub fn blob_name(blake3_hex: &str) -> String {
    let prefix = blake3_hex.get(..2).unwrap_or(blake3_hex);
    format!("blobs/{prefix}/{blake3_hex}")
}

impl Manifest {
    /// Reads and validates a manifest.
    ///
    /// # Errors
    /// When it is not JSON of this layout, or does not hold together.
    pub fn from_json(bytes: &[u8]) -> Result<Self, Error> {
        let manifest: Self = serde_json::from_slice(bytes)?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// The bytes to store; equal manifests have equal bytes.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("plain data with text keys is always JSON");
        bytes.push(b'\n');
        bytes
    }

    /// Its path below the run's folder.
    #[must_use]
    pub fn file_name(&self) -> String {
        file_name(self.generation, self.position.step)
    }

    /// Every blob it names, each once, ascending.
    #[must_use]
    pub fn blobs(&self) -> Vec<&BlobRef> {
        let groups = self.groups.iter().chain(self.best_groups.iter().flatten());
        let mut blobs: Vec<&BlobRef> = groups.flat_map(|group| group.weights.iter().chain(&group.optimizer)).collect();
        blobs.sort();
        blobs.dedup();
        blobs
    }

    /// Whether it holds together.
    ///
    /// # Errors
    /// The first field that contradicts another, by name.
    pub fn validate(&self) -> Result<(), Error> {
        if self.format_version != FORMAT_VERSION {
            return Err(Error::Version { found: self.format_version });
        }
        if self.ended_stage_steps.len() != self.position.stage.0 as usize {
            return Err(field(
                "ended_stage_steps",
                format!("has {} entries in stage {}", self.ended_stage_steps.len(), self.position.stage),
            ));
        }
        let ended: u64 = self.ended_stage_steps.iter().copied().map(u64::from).sum();
        if ended + u64::from(self.position.stage_step) != self.position.step.0 {
            return Err(field(
                "position",
                format!(
                    "is step {}, but its stages add up to {}",
                    self.position.step,
                    ended + u64::from(self.position.stage_step)
                ),
            ));
        }
        if self.stage_results.len() != self.ended_stage_steps.len() {
            return Err(field(
                "stage_results",
                format!("has {} entries for {} ended stages", self.stage_results.len(), self.ended_stage_steps.len()),
            ));
        }
        for (name, seconds) in [("seconds", self.seconds), ("stage_seconds", self.stage_seconds)] {
            if !(seconds.is_finite() && seconds >= 0.0) {
                return Err(field(name, "is not a duration".to_owned()));
            }
        }
        if self.world_size == 0 {
            return Err(field("world_size", "is 0".to_owned()));
        }
        if self.tracker.best.is_some() != self.best_groups.is_some() {
            return Err(field("best_groups", "and tracker.best are not present together".to_owned()));
        }
        validate_groups("groups", &self.groups)?;
        if let Some(best) = &self.best_groups {
            validate_groups("best_groups", best)?;
            if !best.iter().map(|group| &group.name).eq(self.groups.iter().map(|group| &group.name)) {
                return Err(field("best_groups", "names other groups than groups".to_owned()));
            }
        }
        Ok(())
    }

    /// Whether it belongs to this run (CKPT-4).
    ///
    /// # Errors
    /// What differs, with both values.
    pub fn check_belongs(&self, run: &RunId, plan: &Plan, fingerprints: &Fingerprints) -> Result<(), Error> {
        let pairs = [
            ("run", self.run.as_str(), run.as_str()),
            ("run spec", &self.fingerprints.spec, &fingerprints.spec),
            ("data set", &self.fingerprints.data, &fingerprints.data),
            ("graph", &self.fingerprints.graph, &fingerprints.graph),
        ];
        for (what, theirs, ours) in pairs {
            if theirs != ours {
                return Err(Error::Foreign { what, theirs: theirs.to_owned(), ours: ours.to_owned() });
            }
        }
        if !self.groups.iter().map(|group| &group.name).eq(plan.groups.iter().map(|group| &group.name)) {
            return Err(field("groups", "are not those of the plan".to_owned()));
        }
        if self.position.stage.0 as usize > plan.stages.len() {
            return Err(field(
                "position.stage",
                format!("is {}, but the plan has {} stages", self.position.stage, plan.stages.len()),
            ));
        }
        Ok(())
    }

    /// State of one group.
    #[must_use]
    pub fn group(&self, index: GroupIndex) -> Option<&GroupState> {
        self.groups.get(index.0 as usize)
    }
}

fn validate_groups(name: &str, groups: &[GroupState]) -> Result<(), Error> {
    if groups.is_empty() {
        return Err(field(name, "is empty".to_owned()));
    }
    for (index, group) in groups.iter().enumerate() {
        if groups[..index].iter().any(|other| other.name == group.name) {
            return Err(field(&format!("{name}[{index}].name"), format!("`{}` is there twice", group.name)));
        }
        if let Some(weights) = &group.weights {
            validate_blob(&format!("{name}[{index}].weights"), weights)?;
        }
        match &group.optimizer {
            Some(blob) => validate_blob(&format!("{name}[{index}].optimizer"), blob)?,
            None if group.optimizer_steps > 0 => {
                return Err(field(
                    &format!("{name}[{index}].optimizer"),
                    format!("is absent after {} updates", group.optimizer_steps),
                ));
            }
            None => {}
        }
    }
    Ok(())
}

fn validate_blob(name: &str, blob: &BlobRef) -> Result<(), Error> {
    let hex = blob.blake3.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if blob.blake3.len() != 64 || !hex {
        return Err(field(&format!("{name}.blake3"), "is not 64 lower-case hex digits".to_owned()));
    }
    Ok(())
}

fn field(name: &str, problem: String) -> Error {
    Error::Field { field: name.to_owned(), problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stage_end::Judge;
    use crate::test_support::{evaluation, plan_of, spec};
    use serde_json::json;
    use thaw_proto::ids::StageIndex;
    use thaw_proto::run::StageEnd;

    fn blob(digit: &str) -> BlobRef {
        BlobRef { blake3: digit.repeat(64), bytes: 12 }
    }

    fn sample() -> Manifest {
        let spec = spec(json!({}));
        let group = |name: &str, trained: bool| GroupState {
            name: name.to_owned(),
            weights: Some(blob("a")),
            optimizer: trained.then(|| blob("b")),
            optimizer_steps: if trained { 7 } else { 0 },
        };
        let groups: Vec<GroupState> =
            plan_of(&spec).groups.iter().map(|planned| group(&planned.name, planned.name == "head")).collect();
        let mut tracker = RunTracker::new(Judge::of_run(&spec));
        let _ = tracker.observe(&plan_of(&spec).stages[0], &evaluation(0.1 + 0.2));
        Manifest {
            format_version: FORMAT_VERSION,
            run: "demo-00000001".into(),
            generation: Generation(3),
            leader_epoch: None,
            position: Position { stage: StageIndex(1), stage_step: 2, step: Step(7) },
            ended_stage_steps: vec![5],
            stage_first_epoch: 1,
            tracker,
            stage_results: vec![StageResult {
                stage: StageIndex(0),
                steps: 5,
                epochs: 1.0,
                seconds: 1.5,
                end: StageEnd::NotFinite,
                eval: evaluation(0.5),
                deciding_eval: evaluation(0.6),
                replica_digest: "c".repeat(64),
                peak_memory_bytes: 1,
                saves: 0,
                test: None,
            }],
            seconds: 2.5,
            stage_seconds: 1.0,
            world_size: 2,
            fingerprints: Fingerprints { spec: "1".into(), data: "2".into(), graph: "3".into() },
            best_groups: Some(groups.clone()),
            groups,
        }
    }

    #[test]
    fn ckpt_1_the_name_tells_generation_and_step() {
        assert_eq!(sample().file_name(), "manifests/00000003-0000000007.json");
        assert_eq!(blob_name("abcd"), "blobs/ab/abcd");
    }

    #[test]
    fn a_manifest_survives_json_and_names_each_blob_once() {
        let manifest = sample();
        assert_eq!(Manifest::from_json(&manifest.to_json()).unwrap(), manifest);
        assert_eq!(manifest.blobs(), [&blob("a"), &blob("b")]);
    }

    /// A stage that ended because it diverged can be stored.
    #[test]
    fn a_non_finite_evaluation_survives_json() {
        let mut manifest = sample();
        manifest.stage_results[0].deciding_eval.loss = f64::NAN;
        let back = Manifest::from_json(&manifest.to_json()).unwrap();
        assert!(back.stage_results[0].deciding_eval.loss.is_nan());
    }

    #[test]
    fn contradictions_are_named() {
        let broken = |change: fn(&mut Manifest)| {
            let mut manifest = sample();
            change(&mut manifest);
            manifest.validate().unwrap_err().to_string()
        };
        assert!(broken(|m| m.format_version = 2).contains("version is 2"));
        assert!(broken(|m| m.ended_stage_steps.clear()).contains("ended_stage_steps has 0 entries in stage 1"));
        assert!(broken(|m| m.position.step = Step(9)).contains("is step 9, but its stages add up to 7"));
        assert!(broken(|m| m.stage_results.clear()).contains("stage_results"));
        assert!(broken(|m| m.seconds = f64::NAN).contains("seconds"));
        assert!(broken(|m| m.world_size = 0).contains("world_size"));
        assert!(broken(|m| m.groups.clear()).contains("groups is empty"));
        assert!(
            broken(|m| m.groups[0].weights = Some(BlobRef { blake3: "xyz".into(), bytes: 1 }))
                .contains("groups[0].weights.blake3")
        );
        assert!(broken(|m| m.groups[0].optimizer_steps = 3).contains("absent after 3 updates"));
        assert!(broken(|m| m.groups[1].name = m.groups[0].name.clone()).contains("twice"));
        assert!(broken(|m| m.best_groups = None).contains("best_groups"));
    }

    #[test]
    fn unknown_fields_are_refused() {
        let text = String::from_utf8(sample().to_json()).unwrap().replacen("\"run\"", "\"more\": 1, \"run\"", 1);
        assert!(matches!(Manifest::from_json(text.as_bytes()), Err(Error::Json(_))));
    }

    #[test]
    fn ckpt_4_another_runs_manifest_is_refused() {
        let manifest = sample();
        let plan = plan_of(&spec(json!({})));
        manifest.check_belongs(&manifest.run, &plan, &manifest.fingerprints).unwrap();
        let other = Fingerprints { data: "9".into(), ..manifest.fingerprints.clone() };
        let error = manifest.check_belongs(&manifest.run, &plan, &other).unwrap_err().to_string();
        assert!(error.contains("another data set (2, not 9)"), "{error}");
    }
}
