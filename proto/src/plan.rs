//! What a run will do: the stages derived from its spec, as plain values.

use crate::ids::GroupIndex;
use crate::spec::{LrSchedulerType, OnEnter, Plateau, Until};
use serde::{Deserialize, Serialize};

/// The stages of a run, and what they cost. Made by `thaw_core::planner`, followed by every trainer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Group 0 is nearest the input; the head is last.
    pub groups: Vec<LayerGroup>,
    /// At least one.
    pub stages: Vec<PlannedStage>,
    /// Class names in label order.
    pub classes: Vec<String>,
    pub data: DataSummary,
    pub logical_shards: u32,
    pub global_batch_size: u32,
    /// Optimizer updates per epoch.
    pub steps_per_epoch: u32,
    pub notes: Vec<String>,
    /// Width in elements of the features the head reads.
    pub feature_size: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerGroup {
    pub name: String,
    /// Elements.
    pub parameters: u64,
    /// Multiply-adds of one sample's forward pass.
    pub forward_flops: u64,
    /// Whether it holds a token embedding.
    pub embedding: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedStage {
    pub name: String,
    /// Ascending.
    pub trainable_groups: Vec<GroupIndex>,
    /// Peak rate per trainable group, same order.
    pub learning_rates: Vec<f64>,
    pub until: Until,
    pub on_enter: OnEnter,
    pub schedule: LrSchedulerType,
    /// Updates of linear warmup from a group's thaw.
    pub warmup_steps: u32,
    /// Most optimizer updates the stage can take.
    pub max_steps: u32,
    pub trainable_parameters: u64,
    /// Bytes per optimizer update and trainer, before the algorithm's factor.
    pub all_reduce_bytes: u64,
    pub memory_bytes: u64,
    pub boundary_bytes_per_sample: u64,
    /// Groups trained here for the first time, ascending.
    pub thawed_groups: Vec<GroupIndex>,
    /// Zeros in plans of the first version.
    #[serde(default)]
    pub cost: StageCost,
    /// Present exactly for reduce_on_plateau.
    #[serde(default)]
    pub plateau: Option<Plateau>,
    /// On entering, of the groups trained so far.
    #[serde(default)]
    pub recompute_batch_norm: bool,
    /// Most trainers. `None`: `workers.max`.
    #[serde(default)]
    pub workers: Option<u32>,
}

/// What a stage costs: estimates for people and for the scheduler. A floating-point operation is half a multiply-add.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StageCost {
    /// Of one update over all trainers, once the frozen prefix costs nothing.
    pub step_flops: u64,
    /// Of one update that runs the frozen prefix too.
    pub uncached_step_flops: u64,
    /// Of one update of the whole network.
    pub full_step_flops: u64,
    /// Per trainer.
    pub gradient_bytes: u64,
    /// Per trainer.
    pub optimizer_bytes: u64,
    pub checkpoint_bytes: u64,
    /// For all samples and their views, at the exported sizes.
    pub cache_bytes: u64,
    /// Of a checkpoint's copies, on top of the stage's `memory_bytes`, in the trainer with the most; 0 in plans of the first versions.
    #[serde(default)]
    pub save_bytes: u64,
    /// Zeros in plans of the first versions.
    #[serde(default)]
    pub work: StepWork,
}

/// What one trainer does in one update, in a gang of the most trainers that the stage uses, once the frozen prefix costs nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StepWork {
    /// Kernels that run.
    pub operators: u64,
    /// Of matrix products and convolutions, texts at the longest.
    pub flops: u64,
    /// Of activations and their gradients, for each time that one is read or written.
    pub activation_bytes: u64,
    /// Of weights, gradients and their sums, for each time that one is read or written before the update.
    pub weight_bytes: u64,
    /// Kernels of the update, norms included.
    pub update_operators: u64,
    /// Read and written by the update.
    pub update_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DataSummary {
    pub train_samples: u64,
    pub eval_samples: u64,
    pub test_samples: u64,
    /// Over all parts, in label order.
    pub class_counts: Vec<u64>,
    /// BLAKE3 of the source bytes and the split, hex.
    pub fingerprint: String,
}
