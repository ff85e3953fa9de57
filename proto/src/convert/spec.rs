//! The run spec: every range held, every default filled in, every mistake reported at once.
//!
//! What depends on the graph or the data (that a stage names a group, that classes agree) is the planner's.

mod augmentation;
mod data;
mod policies;
mod stage;
mod wire;

use super::checker::{Checker, Interval};
use super::enums::{OptimizerType, WireEnum};
use crate::pb;
use crate::spec::{
    Backbone, BatchNormPolicy, Checkpoint, ClassWeights, DEFAULT_STALL_TIMEOUT_SECONDS, EarlyStopping, Ema, Head,
    HeadAttach, L2Sp, LayerGroupRule, LrScheduler, LrSchedulerType, MemoryFormat, Metric, OnEnter, Optimizer, Plateau,
    Precision, PrefixCache, PrefixCacheMode, RateDecay, RunSpec, Scheduling, Strategy, Until, Verification, Workers,
};
use crate::violation::Violations;
use std::ops::RangeInclusive;

/// Epochs that bound a stage which only patience would end.
const PATIENCE_MAX_EPOCHS: u32 = 100;
const MOST_TRAINERS: u32 = 4096;
/// Below these a busy machine would be taken for one that stands still.
const STALL_TIMEOUT_SECONDS: RangeInclusive<u32> = 5..=86_400;

/// The spec that `raw` says, with its defaults.
///
/// # Errors
/// Every mistake, in the order of the proto's fields; rules over several fields follow at the field that should change.
pub fn check(raw: &pb::RunSpec) -> Result<RunSpec, Violations> {
    let mut at = Checker::default();
    let name = at.name("name", &raw.name);
    let backbone = match &raw.backbone {
        Some(raw) => at.within("backbone", |at| backbone(at, raw)),
        None => at.within("backbone", |at| backbone(at, &pb::Backbone::default())),
    };
    let data = at.within("data", |at| data::data(at, &raw.data.clone().unwrap_or_default()));
    let strategy = at.choice("strategy", raw.strategy).unwrap_or(Strategy::GradualUnfreezing);
    let global_batch_size = global_batch_size(&mut at, raw.global_batch_size);
    let precision = at.choice("precision", raw.precision).unwrap_or(Precision::Fp32);
    let optimizer = at.within("optimizer", |at| optimizer(at, &raw.optimizer.unwrap_or_default()));
    let default_rate = match optimizer {
        Optimizer::AdamW { .. } => 1e-3,
        Optimizer::Sgd { .. } => 1e-2,
    };
    let learning_rate = at.real("learning_rate", raw.learning_rate, Interval::Positive, default_rate);
    let rate_decay = rate_decay(&mut at, raw, strategy);
    let until = match &raw.until {
        Some(raw) => at.within("until", |at| until(at, raw)),
        None => Until { max_epochs: Some(3), max_steps: None, early_stopping: None },
    };
    let workers = at.within("workers", |at| workers(at, &raw.workers.unwrap_or_default()));
    let checkpoint = at.within("checkpoint", |at| checkpoint(at, &raw.checkpoint.clone().unwrap_or_default()));
    let lr_scheduler = at.within("lr_scheduler", |at| lr_scheduler(at, &raw.lr_scheduler.unwrap_or_default()));
    let max_grad_norm = at.real_or_none("max_grad_norm", raw.max_grad_norm, Interval::Positive, "no clipping");
    let logical_shards = logical_shards(&mut at, raw.logical_shards, &workers, global_batch_size);
    let stages = stage::stages(&mut at, raw, &workers);
    stage::known_lengths(&mut at, strategy, raw);
    let gradual = strategy == Strategy::GradualUnfreezing;
    let every_group = matches!(strategy, Strategy::FullFineTuning | Strategy::FromScratch);
    let spec = RunSpec {
        name,
        backbone,
        data,
        strategy,
        global_batch_size,
        precision,
        learning_rate,
        rate_decay,
        until,
        workers,
        checkpoint,
        seed: raw.seed,
        optimizer,
        lr_scheduler,
        max_grad_norm,
        logical_shards,
        stages,
        thaw_units: at.whole("thaw_units", raw.thaw_units, 1..=1000, 4),
        stop_when_no_gain: raw.stop_when_no_gain.unwrap_or(gradual),
        frozen_batch_norm: at.within("batch_norm", |at| {
            let policy = at.choice("frozen_groups", raw.batch_norm.unwrap_or_default().frozen_groups);
            if policy == Some(BatchNormPolicy::Recompute) && strategy == Strategy::FromScratch {
                at.refuse(
                    "frozen_groups",
                    "recompute needs pretrained weights, and from_scratch has none: leave it out",
                );
            }
            policy.unwrap_or(BatchNormPolicy::Frozen)
        }),
        thaw_embeddings: raw.thaw_embeddings.unwrap_or(every_group),
        eval_steps: at.whole_or_none("eval_steps", raw.eval_steps, 1..=u32::MAX, "an evaluation at each epoch's end"),
        logging_steps: at.whole("logging_steps", raw.logging_steps, 1..=u32::MAX, 10),
        head_rate_after_thaw: {
            let default = if gradual { 0.5 } else { 1.0 };
            at.real("head_rate_after_thaw", raw.head_rate_after_thaw, Interval::LeftOpen(0.0, 1.0), default)
        },
        verification: at.within("verification", |at| verification(at, &raw.verification.unwrap_or_default())),
        label_smoothing_factor: {
            let allowed = Interval::RightOpen(0.0, 1.0);
            at.real("label_smoothing_factor", raw.label_smoothing_factor, allowed, 0.0)
        },
        class_weights: at
            .within("class_weights", |at| class_weights(at, &raw.class_weights.clone().unwrap_or_default())),
        l2_sp: raw.l2_sp.as_ref().map(|raw| {
            if strategy == Strategy::FromScratch {
                at.refuse("l2_sp", "pulls towards pretrained weights, and from_scratch has none: remove it");
            }
            at.within("l2_sp", |at| l2_sp(at, raw))
        }),
        ema: raw.ema.as_ref().map(|raw| at.within("ema", |at| ema(at, raw))),
        memory_format: at.choice("memory_format", raw.memory_format).unwrap_or(MemoryFormat::Auto),
        prefix_cache: at.within("prefix_cache", |at| prefix_cache(at, raw)),
        activation_checkpointing: raw.activation_checkpointing,
        gradient_accumulation_steps: policies::accumulation(&mut at, raw, logical_shards),
        learning_rates: policies::learning_rates(&mut at, &raw.learning_rates),
        thawed_batch_norm: {
            let raw = raw.batch_norm.unwrap_or_default();
            at.within("batch_norm", |at| policies::thawed_batch_norm(at, &raw))
        },
        scheduling: at.within("scheduling", |at| scheduling(at, &raw.scheduling.clone().unwrap_or_default())),
    };
    at.finish(spec)
}

impl TryFrom<&pb::RunSpec> for RunSpec {
    type Error = Violations;

    fn try_from(raw: &pb::RunSpec) -> Result<Self, Violations> {
        check(raw)
    }
}

fn scheduling(at: &mut Checker, raw: &pb::Scheduling) -> Scheduling {
    let default = Scheduling::default();
    let tenant = if raw.tenant.is_empty() { default.tenant } else { at.name("tenant", &raw.tenant) };
    Scheduling { tenant, priority: at.choice("priority", raw.priority).unwrap_or(default.priority) }
}

fn global_batch_size(at: &mut Checker, size: u32) -> u32 {
    match size {
        1..=1_048_576 => {}
        0 => at.refuse("global_batch_size", "is required: samples per optimizer update over all workers, 1-1048576"),
        _ => at.refuse("global_batch_size", format!("must be in 1-1048576, not {size}")),
    }
    size
}

fn backbone(at: &mut Checker, raw: &pb::Backbone) -> Backbone {
    let graph = at.url("graph", &raw.graph, "URL of a .pt2 archive, e.g. file:///models/minilm.pt2");
    let head = at.within("head", |at| head(at, &raw.head.clone().unwrap_or_default()));
    let layer_groups = at.each("layer_groups", &raw.layer_groups, |at, raw| {
        let name = at.text("name", &raw.name, "the group's name");
        let pattern = at.text("pattern", &raw.pattern, "a regular expression over module paths");
        at.pattern("pattern", &pattern);
        LayerGroupRule { name, pattern }
    });
    Backbone { graph, head, layer_groups }
}

fn head(at: &mut Checker, raw: &pb::Head) -> Head {
    let attach = at.choice("attach", raw.attach).unwrap_or(HeadAttach::Auto);
    for (index, &size) in raw.hidden_sizes.iter().enumerate() {
        if !(1..=65536).contains(&size) {
            at.refuse(&format!("hidden_sizes[{index}]"), format!("must be in 1-65536, not {size}"));
        }
    }
    let dropout = at.real("dropout", Some(raw.dropout), Interval::RightOpen(0.0, 1.0), 0.0);
    Head { attach, hidden_sizes: raw.hidden_sizes.clone(), dropout, batch_norm: raw.batch_norm }
}

fn rate_decay(at: &mut Checker, raw: &pb::RunSpec, strategy: Strategy) -> RateDecay {
    let by_kind = if strategy == Strategy::FromScratch { Some(1.0) } else { None };
    let absent = if by_kind.is_some() { "1" } else { "100 on convolution nets and 40 on others" };
    let spread = at
        .real_or_none("learning_rate_spread", raw.learning_rate_spread, Interval::Closed(1.0, 10_000.0), absent)
        .or(by_kind);
    let decay = at.real_or_none("layer_decay", raw.layer_decay, Interval::LeftOpen(0.0, 1.0), "learning_rate_spread");
    if raw.learning_rate_spread.is_some() && raw.layer_decay.is_some() {
        at.refuse("layer_decay", "is the alternative to learning_rate_spread: remove one of the two");
    }
    decay.map_or(RateDecay::Spread(spread), RateDecay::PerLevel)
}

fn until(at: &mut Checker, raw: &pb::Until) -> Until {
    let max_epochs = at.whole_or_none("max_epochs", raw.max_epochs, 1..=100_000, "no limit by epochs");
    let max_steps = at.whole_or_none("max_steps", raw.max_steps, 1..=1_000_000_000, "no limit by steps");
    let early_stopping = raw.early_stopping.as_ref().map(|raw| {
        at.within("early_stopping", |at| EarlyStopping {
            metric: at.choice("metric", raw.metric).unwrap_or(Metric::EvalLoss),
            patience: at.whole("patience", raw.patience, 1..=1000, 2),
            min_delta: at.real("min_delta", raw.min_delta, Interval::Closed(0.0, 1.0), 1e-3),
        })
    });
    let bounded = max_epochs.is_some() || max_steps.is_some();
    if !bounded && early_stopping.is_none() {
        at.refuse("", "must give at least one of max_epochs, max_steps and early_stopping, or be left out");
    }
    Until { max_epochs: if bounded { max_epochs } else { Some(PATIENCE_MAX_EPOCHS) }, max_steps, early_stopping }
}

fn workers(at: &mut Checker, raw: &pb::Workers) -> Workers {
    let min = at.whole("min", raw.min, 1..=MOST_TRAINERS, 1);
    let max = at.whole("max", raw.max, 1..=MOST_TRAINERS, min);
    if max < min {
        at.refuse(
            "max",
            format!("must be in {min}-{MOST_TRAINERS} (not below min), not {max}: raise max or lower min"),
        );
    }
    let threads_per_trainer = at.whole("threads_per_trainer", raw.threads_per_trainer, 1..=1024, 1);
    let sizing = at.choice("sizing", raw.sizing).unwrap_or_default();
    Workers { min, max, threads_per_trainer, sizing, stall_timeout_seconds: stall_timeout(at, raw) }
}

fn stall_timeout(at: &mut Checker, raw: &pb::Workers) -> u32 {
    match raw.stall_timeout_seconds {
        // Never.
        Some(0) => 0,
        Some(seconds) if !STALL_TIMEOUT_SECONDS.contains(&seconds) => {
            let (low, high) = STALL_TIMEOUT_SECONDS.into_inner();
            let default = DEFAULT_STALL_TIMEOUT_SECONDS;
            at.refuse(
                "stall_timeout_seconds",
                format!("must be in {low}-{high}, or 0 for never, not {seconds}; leave it out for {default}"),
            );
            default
        }
        given => given.unwrap_or(DEFAULT_STALL_TIMEOUT_SECONDS),
    }
}

fn checkpoint(at: &mut Checker, raw: &pb::Checkpoint) -> Checkpoint {
    Checkpoint {
        url: at.url_or_none("url", &raw.url),
        save_steps: at.whole_or_none("save_steps", raw.save_steps, 1..=1_000_000, "an interval by cost"),
        save_total_limit: at.whole("save_total_limit", raw.save_total_limit, 1..=1000, 3),
        max_overhead: at.real("max_overhead", raw.max_overhead, Interval::LeftOpen(0.0, 1.0), 0.03),
        host_snapshot_steps: at.whole_or_none(
            "host_snapshot_steps",
            raw.host_snapshot_steps,
            0..=1_000_000,
            "a copy with every checkpoint",
        ),
    }
}

fn optimizer(at: &mut Checker, raw: &pb::Optimizer) -> Optimizer {
    let decay =
        |at: &mut Checker, default| at.real("weight_decay", raw.weight_decay, Interval::Closed(0.0, 10.0), default);
    let fraction = Interval::RightOpen(0.0, 1.0);
    match at.choice("type", raw.r#type).unwrap_or(OptimizerType::Adamw) {
        OptimizerType::Adamw => {
            let foreign = [("momentum", raw.momentum.is_some()), ("nesterov", raw.nesterov)];
            // An unknown type may be a misspelled sgd.
            if OptimizerType::from_number(raw.r#type).is_some() {
                refuse_given(at, &foreign, "belongs to sgd: remove it, or set type to sgd");
            }
            Optimizer::AdamW {
                weight_decay: decay(at, 0.01),
                beta1: at.real("beta1", raw.beta1, fraction, 0.9),
                beta2: at.real("beta2", raw.beta2, fraction, 0.999),
                epsilon: at.real("epsilon", raw.epsilon, Interval::Positive, 1e-8),
            }
        }
        OptimizerType::Sgd => {
            let foreign =
                [("beta1", raw.beta1.is_some()), ("beta2", raw.beta2.is_some()), ("epsilon", raw.epsilon.is_some())];
            refuse_given(at, &foreign, "belongs to adamw: remove it, or set type to adamw");
            let momentum = at.real("momentum", raw.momentum, fraction, 0.9);
            if raw.nesterov && momentum == 0.0 {
                at.refuse("nesterov", "needs a momentum > 0: raise momentum, or remove nesterov");
            }
            Optimizer::Sgd { weight_decay: decay(at, 0.0), momentum, nesterov: raw.nesterov }
        }
    }
}

fn refuse_given(at: &mut Checker, fields: &[(&str, bool)], message: &str) {
    for (field, given) in fields {
        if *given {
            at.refuse(field, message);
        }
    }
}

fn lr_scheduler(at: &mut Checker, raw: &pb::LrScheduler) -> LrScheduler {
    if raw.warmup_steps.is_some() && raw.warmup_ratio.is_some() {
        at.refuse("warmup_ratio", "says the same as warmup_steps: give one of the two");
    }
    let ratio = at.real_or_none("warmup_ratio", raw.warmup_ratio, Interval::Closed(0.0, 1.0), "warmup_steps");
    let kind = at.choice("type", raw.r#type);
    LrScheduler { kind, warmup_steps: raw.warmup_steps, warmup_ratio: ratio, plateau: plateau(at, raw, kind) }
}

fn plateau(at: &mut Checker, raw: &pb::LrScheduler, kind: Option<LrSchedulerType>) -> Option<Plateau> {
    if kind != Some(LrSchedulerType::ReduceOnPlateau) {
        // An unknown type may be a misspelled reduce_on_plateau.
        if LrSchedulerType::from_number(raw.r#type).is_some() {
            let foreign = [("factor", raw.factor.is_some()), ("patience", raw.patience.is_some())];
            refuse_given(at, &foreign, "belongs to reduce_on_plateau: remove it, or set type to reduce_on_plateau");
        }
        return None;
    }
    let allowed = raw.factor.is_none_or(|factor| factor > 0.0 && factor < 1.0);
    if !allowed {
        let factor = raw.factor.unwrap_or_default();
        at.refuse("factor", format!("must be in (0, 1), not {factor}; leave it out for 0.1"));
    }
    Some(Plateau {
        factor: raw.factor.filter(|_| allowed).unwrap_or(0.1),
        patience: at.whole("patience", raw.patience, 1..=1000, 1),
    })
}

fn logical_shards(at: &mut Checker, raw: Option<u32>, workers: &Workers, batch: u32) -> u32 {
    let most = workers.max;
    let shards = at.whole("logical_shards", raw, 1..=4096, most);
    // A missing batch size is reported on its own.
    let too_many = batch > 0 && shards > batch;
    if raw.is_none() {
        if too_many {
            at.refuse(
                "workers.max",
                format!("must be at most global_batch_size ({batch}), not {most}: each worker needs a sample"),
            );
        }
        return shards;
    }
    if shards < most {
        at.refuse(
            "logical_shards",
            format!("must be at least workers.max ({most}), not {shards}: raise it, or lower workers.max"),
        );
    }
    if too_many {
        at.refuse("logical_shards", format!("must be at most global_batch_size ({batch}), not {shards}: lower it"));
    }
    shards
}

fn verification(at: &mut Checker, raw: &pb::Verification) -> Verification {
    let digest_steps = at.whole_or_none("digest_steps", raw.digest_steps, 1..=u32::MAX, "a digest at stage ends only");
    Verification { digest_steps, trace: raw.trace }
}

fn class_weights(at: &mut Checker, raw: &pb::ClassWeights) -> ClassWeights {
    for (index, weight) in raw.weights.iter().enumerate() {
        if !(weight.is_finite() && *weight > 0.0) {
            at.refuse(&format!("weights[{index}]"), format!("must be a finite number > 0, not {weight}"));
        }
    }
    match (raw.balanced, raw.weights.is_empty()) {
        (true, false) => {
            at.refuse("weights", "says something else than balanced: give one of the two");
            ClassWeights::Balanced
        }
        (true, true) => ClassWeights::Balanced,
        (false, true) => ClassWeights::Equal,
        (false, false) => ClassWeights::Given(raw.weights.clone()),
    }
}

fn l2_sp(at: &mut Checker, raw: &pb::L2Sp) -> L2Sp {
    let allowed = Interval::Closed(0.0, 10.0);
    L2Sp { alpha: at.real("alpha", raw.alpha, allowed, 0.1), beta: at.real("beta", raw.beta, allowed, 0.01) }
}

fn ema(at: &mut Checker, raw: &pb::Ema) -> Ema {
    if !(raw.decay > 0.0 && raw.decay < 1.0) {
        at.refuse(
            "decay",
            format!("must be in (0, 1), not {}: what is kept of the mean at each update, e.g. 0.999", raw.decay),
        );
    }
    Ema { decay: raw.decay, evaluate: raw.evaluate.unwrap_or(true) }
}

fn prefix_cache(at: &mut Checker, spec: &pb::RunSpec) -> PrefixCache {
    const MOST_MIB: u32 = 1 << 24;
    let raw = spec.prefix_cache.unwrap_or_default();
    let free = "a quarter of what is free";
    PrefixCache {
        mode: at.choice("mode", raw.mode).unwrap_or(PrefixCacheMode::Auto),
        memory_mib: at.whole_or_none("memory_mib", raw.memory_mib, 0..=MOST_MIB, free),
        disk_mib: at.whole_or_none("disk_mib", raw.disk_mib, 0..=MOST_MIB, free),
        chunk_size: at.whole_or_none("chunk_size", raw.chunk_size, 1..=4096, "a size that suits the samples"),
        views: {
            let image = spec.data.as_ref().and_then(|data| data.image.as_ref());
            if let Some(views @ 2..) = raw.views
                && image.is_none_or(|image| image.augmentation.is_none())
            {
                at.refuse(
                    "views",
                    format!("is {views}, and samples that nothing changes have one view: set data.image.augmentation, or leave views out"),
                );
            }
            at.whole_or_none("views", raw.views, 1..=256, "a new draw in every epoch")
        },
    }
}

/// The end of a planned stage: here it is required.
pub(super) fn planned_until(at: &mut Checker, raw: Option<&pb::Until>) -> Until {
    at.within("until", |at| until(at, &raw.copied().unwrap_or_default()))
}

/// The schedule, the warmup and the plateau rule of a planned stage: here the first two are required.
pub(super) fn planned_schedule(
    at: &mut Checker,
    raw: Option<&pb::LrScheduler>,
) -> (LrSchedulerType, u32, Option<Plateau>) {
    at.within("lr_scheduler", |at| {
        let raw = raw.copied().unwrap_or_default();
        let kind = at.choice("type", raw.r#type);
        if raw.r#type == 0 {
            at.refuse("type", format!("is required: one of {}", LrSchedulerType::names().join(", ")));
        }
        if raw.warmup_steps.is_none() {
            at.refuse("warmup_steps", "is required");
        }
        let plateau = plateau(at, &raw, kind);
        (kind.unwrap_or(LrSchedulerType::Constant), raw.warmup_steps.unwrap_or_default(), plateau)
    })
}

/// What a planned stage starts from.
pub(super) fn planned_on_enter(at: &mut Checker, number: i32) -> OnEnter {
    at.choice("on_enter", number).unwrap_or(OnEnter::RestoreBest)
}
