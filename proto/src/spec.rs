//! The checked run spec: what [`crate::pb::RunSpec`] says, with every default filled in and every range held.
//!
//! Only [`crate::convert::spec`] builds these (the structs are non-exhaustive), so a value of type [`RunSpec`] is a valid one.
//! What depends on the graph or the data (that a stage names a group, that classes agree) is checked by the planner in `thaw-core`.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use url::Url;

/// A valid request to fine-tune one backbone on one dataset.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunSpec {
    pub name: String,
    pub backbone: Backbone,
    pub data: Data,
    pub strategy: Strategy,
    /// Samples per optimizer update over all workers.
    pub global_batch_size: u32,
    pub precision: Precision,
    /// Peak rate of the head.
    pub learning_rate: f64,
    /// How rates fall below the head.
    pub rate_decay: RateDecay,
    pub until: Until,
    pub workers: Workers,
    pub checkpoint: Checkpoint,
    pub seed: u64,
    pub optimizer: Optimizer,
    pub lr_scheduler: LrScheduler,
    pub max_grad_norm: Option<f64>,
    pub logical_shards: u32,
    /// Stages of strategy custom; empty otherwise.
    pub stages: Vec<Stage>,
    pub thaw_units: u32,
    pub stop_when_no_gain: bool,
    pub frozen_batch_norm: BatchNormPolicy,
    pub thaw_embeddings: bool,
    /// `None`: at each epoch's end.
    pub eval_steps: Option<u32>,
    pub logging_steps: u32,
    pub head_rate_after_thaw: f64,
    pub verification: Verification,
    /// Later than the first version: records without it are read too.
    #[serde(default)]
    pub prefix_cache: PrefixCache,
    #[serde(default)]
    pub memory_format: MemoryFormat,
    /// In training only.
    #[serde(default)]
    pub label_smoothing_factor: f64,
    #[serde(default)]
    pub class_weights: ClassWeights,
    #[serde(default)]
    pub l2_sp: Option<L2Sp>,
    #[serde(default)]
    pub ema: Option<Ema>,
    #[serde(default)]
    pub activation_checkpointing: bool,
    /// Micro-batches of a logical shard's part of the global batch.
    #[serde(default = "one")]
    pub gradient_accumulation_steps: u32,
    /// Peak rates by name of a layer group, or by a regular expression between slashes that is known to compile.
    #[serde(default)]
    pub learning_rates: BTreeMap<String, f64>,
    #[serde(default)]
    pub thawed_batch_norm: ThawedBatchNorm,
    #[serde(default)]
    pub scheduling: Scheduling,
}

/// Whose slots a run takes, and before whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Scheduling {
    pub tenant: String,
    pub priority: Priority,
}

impl Default for Scheduling {
    fn default() -> Self {
        Self { tenant: "default".to_owned(), priority: Priority::Normal }
    }
}

/// Ascending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    Low,
    Normal,
    High,
}

fn one() -> u32 {
    1
}

/// What batch norm of thawed groups normalises by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ThawedBatchNorm {
    pub policy: ThawedBatchNormPolicy,
    /// Samples of a micro-batch from which on `Auto` takes its own statistics.
    pub minimum_batch: u32,
}

impl Default for ThawedBatchNorm {
    fn default() -> Self {
        Self { policy: ThawedBatchNormPolicy::Auto, minimum_batch: 16 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThawedBatchNormPolicy {
    Auto,
    BatchStatistics,
    FrozenStatistics,
}

/// What each class counts for in the training loss.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClassWeights {
    #[default]
    Equal,
    /// By how seldom a class is.
    Balanced,
    /// In label order.
    Given(Vec<f64>),
}

/// Pull towards the weights the run started from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct L2Sp {
    /// Of the backbone, towards its start.
    pub alpha: f64,
    /// Of the head, towards 0.
    pub beta: f64,
}

/// Exponential mean of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Ema {
    pub decay: f64,
    /// Whether the mean is what is evaluated and kept.
    pub evaluate: bool,
}

/// How images lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryFormat {
    /// By kind of network and precision.
    #[default]
    Auto,
    Contiguous,
    ChannelsLast,
}

/// How the outputs of frozen groups are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PrefixCache {
    pub mode: PrefixCacheMode,
    /// `None`: a quarter of what is free.
    pub memory_mib: Option<u32>,
    /// `None`: a quarter of what is free.
    pub disk_mib: Option<u32>,
    /// Samples that a prefix is computed for at a time; `None`: by the size of a sample.
    pub chunk_size: Option<u32>,
    /// Draws of each augmented sample; `None`: a new one in every epoch.
    #[serde(default)]
    pub views: Option<u32>,
}

impl RunSpec {
    /// Random changes of training images.
    #[must_use]
    pub fn augmentation(&self) -> Option<&ImageAugmentation> {
        self.data.image.as_ref()?.augmentation.as_ref()
    }
}

impl Default for PrefixCache {
    fn default() -> Self {
        Self { mode: PrefixCacheMode::Auto, memory_mib: None, disk_mib: None, chunk_size: None, views: None }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixCacheMode {
    #[default]
    Auto,
    Off,
    Required,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    FeatureExtraction,
    GradualUnfreezing,
    FullFineTuning,
    FromScratch,
    Custom,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    Fp32,
    Bf16,
    Fp64,
}

/// How a group's rate follows from the head's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RateDecay {
    /// The head's rate over the lowest thawable group's; `None`: by kind of network.
    Spread(Option<f64>),
    /// Factor per level below the head.
    PerLevel(f64),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Backbone {
    pub graph: Url,
    pub head: Head,
    pub layer_groups: Vec<LayerGroupRule>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Head {
    pub attach: HeadAttach,
    pub hidden_sizes: Vec<u32>,
    pub dropout: f64,
    pub batch_norm: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadAttach {
    Auto,
    Replace,
    Append,
}

/// A group by name and a regular expression over module paths; known to compile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayerGroupRule {
    pub name: String,
    pub pattern: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Data {
    pub train: DataSource,
    pub eval: Option<DataSource>,
    pub test: Option<DataSource>,
    pub split: Split,
    /// Tokens; for text only.
    pub max_length: u32,
    /// Present exactly for image folders.
    pub image: Option<ImageTransform>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DataSource {
    pub path: Url,
    pub format: DataFormat,
    /// Column of the text; empty for images.
    pub text: String,
    /// Column of the label; empty for images.
    pub label: String,
    /// `None`: tokenizer.json inside or beside the .pt2.
    pub tokenizer: Option<Url>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataFormat {
    Csv,
    Jsonl,
    ImageFolder,
}

/// Shares of the training source. A part that has a source of its own has share 0.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Split {
    pub train: f64,
    pub eval: f64,
    pub test: f64,
    pub stratified: bool,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ImageTransform {
    /// Height and width in pixels.
    pub size: u32,
    /// One entry per channel (1 or 3).
    pub mean: Vec<f64>,
    pub std: Vec<f64>,
    /// Of training images only.
    #[serde(default)]
    pub augmentation: Option<ImageAugmentation>,
}

/// Random changes of an image; at least one is at work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ImageAugmentation {
    pub random_resized_crop: Option<RandomRectangle>,
    /// Probability.
    pub horizontal_flip: f64,
    pub color_jitter: Option<ColorJitter>,
    pub random_erasing: Option<RandomErasing>,
}

/// Bounds of a random rectangle within an image.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RandomRectangle {
    /// Smallest and largest share of the area.
    pub scale: [f64; 2],
    /// Smallest and largest ratio of its sides; which over which is its user's.
    pub ratio: [f64; 2],
}

/// Widths of the factors' intervals around 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ColorJitter {
    pub brightness: f64,
    pub contrast: f64,
    pub saturation: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RandomErasing {
    pub probability: f64,
    /// Ratios are height over width.
    pub rectangle: RandomRectangle,
}

/// At least one bound is present.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Until {
    pub max_epochs: Option<u32>,
    pub max_steps: Option<u32>,
    pub early_stopping: Option<EarlyStopping>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EarlyStopping {
    pub metric: Metric,
    pub patience: u32,
    /// Share of the best so far.
    pub min_delta: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    EvalLoss,
    EvalAccuracy,
    EvalMacroF1,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Workers {
    pub min: u32,
    pub max: u32,
    pub threads_per_trainer: u32,
    #[serde(default)]
    pub sizing: WorkerSizing,
    /// How long a trainer may stand still; 0: for ever. Left out where it is the default, so that specs of earlier versions keep their hash.
    #[serde(default = "default_stall_timeout", skip_serializing_if = "is_default_stall_timeout")]
    pub stall_timeout_seconds: u32,
}

/// [`Workers::stall_timeout_seconds`] where a spec says nothing.
pub const DEFAULT_STALL_TIMEOUT_SECONDS: u32 = 300;

fn default_stall_timeout() -> u32 {
    DEFAULT_STALL_TIMEOUT_SECONDS
}

fn is_default_stall_timeout(seconds: &u32) -> bool {
    *seconds == DEFAULT_STALL_TIMEOUT_SECONDS
}

/// How many trainers a stage uses that does not say it itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerSizing {
    #[default]
    Most,
    /// As many as pay by the plan's cost model.
    ByCost,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Checkpoint {
    /// Folder that holds `runs/<run>/`; `None`: the server's data folder.
    pub url: Option<Url>,
    /// `None`: as often as `max_overhead` allows.
    pub save_steps: Option<u32>,
    pub save_total_limit: u32,
    /// Share of the training time.
    #[serde(default = "default_max_overhead")]
    pub max_overhead: f64,
    /// `None`: with every checkpoint on CPUs, and never on GPUs. Zero: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_snapshot_steps: Option<u32>,
}

fn default_max_overhead() -> f64 {
    0.03
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optimizer {
    AdamW { weight_decay: f64, beta1: f64, beta2: f64, epsilon: f64 },
    Sgd { weight_decay: f64, momentum: f64, nesterov: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LrScheduler {
    /// `None`: constant where patience ends the stage, linear where its length is given.
    pub kind: Option<LrSchedulerType>,
    /// `None`: 6 % of the planned steps, 10-500.
    pub warmup_steps: Option<u32>,
    /// Instead, as a share of the planned steps.
    #[serde(default)]
    pub warmup_ratio: Option<f64>,
    /// Present exactly for reduce_on_plateau.
    #[serde(default)]
    pub plateau: Option<Plateau>,
}

/// When and by how much reduce_on_plateau lowers the rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Plateau {
    pub factor: f64,
    /// Evaluations without improvement before each reduction.
    pub patience: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrSchedulerType {
    Constant,
    InverseSqrt,
    Linear,
    Cosine,
    SlantedTriangular,
    OneCycle,
    ReduceOnPlateau,
    RangeTest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchNormPolicy {
    Frozen,
    Recompute,
}

/// One stage of strategy custom. Absent values mean the run's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stage {
    pub name: String,
    /// Names, or regular expressions between slashes; the latter are known to compile.
    pub thaw: Vec<String>,
    pub learning_rate: Option<f64>,
    pub learning_rate_spread: Option<f64>,
    pub until: Option<Until>,
    pub on_enter: OnEnter,
    pub lr_scheduler: Option<LrScheduler>,
    /// As those of the spec.
    #[serde(default)]
    pub learning_rates: BTreeMap<String, f64>,
    /// On entering, of the groups trained so far.
    #[serde(default)]
    pub recompute_batch_norm: bool,
    /// Most trainers, within the run's.
    #[serde(default)]
    pub workers: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnEnter {
    RestoreBest,
    Keep,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Verification {
    /// `None`: only at stage ends.
    pub digest_steps: Option<u32>,
    pub trace: bool,
}
