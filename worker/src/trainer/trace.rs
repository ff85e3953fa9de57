//! A record of every step for a reference to follow: which samples, which seeds, which rates, which loss.
//!
//! ```text
//! trace/initial.pt2   the archive as the run starts from it
//! trace/layout.json   the flat buffer of every layer group
//! trace/steps.jsonl   one line per step; a stage's first names the step its weights were put back to, and the seconds that took
//! trace/stage-<n>.safetensors   every parameter and buffer at the end of stage n
//! ```

use super::feed::Order;
use super::job::Job;
use super::replica::{Replica, StepPlan};
use super::save;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::time::Duration;
use thaw_core::sampler;
use thaw_data::index::Part;
use thaw_proto::ids::{StageIndex, Step};
use thaw_proto::run::Position;

pub(crate) struct Trace {
    /// On rank 0.
    steps: Option<File>,
}

/// What the trace says last and next, which every rank knows: the one that writes may die before it has.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Traced {
    line: Option<String>,
    /// The step whose best weights and optimizer state the stage started from, where it did not go on from the last one, and how long it took
    /// to put them back; for the next line.
    pub(crate) restored: Option<(Step, Duration)>,
}

/// What one line says.
pub(crate) struct TraceStep<'a> {
    /// Before the step.
    pub(crate) position: Position,
    pub(crate) plan: &'a StepPlan,
    pub(crate) loss: f64,
    pub(crate) first_epoch: u32,
    pub(crate) digest: Option<blake3::Hash>,
}

impl Trace {
    /// Of a rank that does not write it.
    pub(crate) fn followed() -> Self {
        Self { steps: None }
    }

    /// Opens the trace; where the run is at its beginning, also writes what it starts from. Says again what was said last.
    pub(crate) fn open(job: &Job, replica: &Replica, beginning: bool, traced: &Traced) -> Result<Self, save::Error> {
        let folder = job.folder.join("trace");
        let failed = |source| save::Error::File { path: folder.clone(), source };
        fs::create_dir_all(&folder).map_err(failed)?;
        if beginning {
            save::write_archive(job, replica, &folder.join("initial.pt2"))?;
            let layout = serde_json::to_vec_pretty(&layout(replica)).expect("names and numbers are plain data");
            fs::write(folder.join("layout.json"), layout).map_err(failed)?;
        }
        let mut steps =
            OpenOptions::new().create(true).append(true).open(folder.join("steps.jsonl")).map_err(failed)?;
        if let Some(line) = &traced.line {
            steps.write_all(line.as_bytes()).map_err(failed)?;
        }
        Ok(Self { steps: Some(steps) })
    }

    /// Writes the weights that a stage ended with.
    pub(crate) fn end(&self, job: &Job, replica: &Replica, stage: StageIndex) -> Result<(), save::Error> {
        if self.steps.is_none() {
            return Ok(());
        }
        save::write_weights(
            job,
            replica,
            &job.folder.join("trace").join(format!("stage-{stage}.safetensors")),
            save::StoredAs::Trained,
        )
    }

    pub(crate) fn step(
        &mut self,
        traced: &mut Traced,
        order: &Order,
        job: &Job,
        step: &TraceStep<'_>,
    ) -> io::Result<()> {
        let index = job.dataset.index();
        let shards: Vec<_> = (0..job.plan.logical_shards)
            .map(|shard| {
                let positions = order.samples(step.first_epoch, step.position.stage_step, shard);
                let records: Vec<u32> =
                    positions.iter().map(|&position| index.records(Part::Train)[position as usize]).collect();
                json!({
                    "shard": shard,
                    "samples": positions,
                    "records": records,
                    "seed": sampler::shard_seed(job.spec.seed, step.plan.step.0, shard),
                })
            })
            .collect();
        let restored = traced.restored.take();
        let line = json!({
            "step": step.plan.step,
            "stage": step.position.stage,
            "stage_step": step.position.stage_step,
            "restored": restored.map(|(step, _)| step),
            "restore_seconds": restored.map(|(_, took)| took.as_secs_f64()),
            "view": order.view(step.first_epoch, step.position.stage_step).map(|view| view.0),
            "shards": shards,
            "rates": step.plan.rates,
            "loss": step.loss,
            "digest": step.digest.map(|digest| digest.to_hex().to_string()),
        });
        let line = traced.line.insert(format!("{line}\n"));
        // One write: a death leaves a whole line or none.
        self.steps.as_mut().map_or(Ok(()), |steps| steps.write_all(line.as_bytes()))
    }
}

fn layout(replica: &Replica) -> serde_json::Value {
    let groups = replica.model().groups().iter().map(|group| {
        let parameters = group.parameters.iter().map(|parameter| {
            json!({"name": parameter.name, "shape": parameter.shape, "offset": parameter.offset, "elements": parameter.elements})
        });
        json!({
            "name": group.name,
            "elements": group.flat.numel(),
            "decay_elements": group.decay_elements,
            "parameters": parameters.collect::<Vec<_>>(),
            "buffers": group.buffers.iter().map(|(name, _)| name).collect::<Vec<_>>(),
        })
    });
    json!({ "groups": groups.collect::<Vec<_>>() })
}
