//! The checked spec as a message, every default spelled out: what is stored and shown.

use crate::convert::enums::{OptimizerType, WireEnum};
use crate::pb;
use crate::spec::{
    Backbone, Checkpoint, ClassWeights, Data, DataFormat, DataSource, EarlyStopping, Head, ImageAugmentation,
    ImageTransform, LayerGroupRule, LrScheduler, Optimizer, PrefixCache, RateDecay, RunSpec, Split, Stage, Until,
    Verification, Workers,
};
use url::Url;

impl From<&RunSpec> for pb::RunSpec {
    fn from(spec: &RunSpec) -> Self {
        let (learning_rate_spread, layer_decay) = match spec.rate_decay {
            RateDecay::Spread(spread) => (spread, None),
            RateDecay::PerLevel(decay) => (None, Some(decay)),
        };
        Self {
            name: spec.name.clone(),
            backbone: Some((&spec.backbone).into()),
            data: Some((&spec.data).into()),
            strategy: spec.strategy.number(),
            global_batch_size: spec.global_batch_size,
            precision: spec.precision.number(),
            learning_rate: Some(spec.learning_rate),
            learning_rate_spread,
            layer_decay,
            until: Some((&spec.until).into()),
            workers: Some((&spec.workers).into()),
            checkpoint: Some((&spec.checkpoint).into()),
            seed: spec.seed,
            optimizer: Some((&spec.optimizer).into()),
            lr_scheduler: Some((&spec.lr_scheduler).into()),
            max_grad_norm: spec.max_grad_norm,
            logical_shards: Some(spec.logical_shards),
            stages: spec.stages.iter().map(Into::into).collect(),
            thaw_units: Some(spec.thaw_units),
            stop_when_no_gain: Some(spec.stop_when_no_gain),
            batch_norm: Some(pb::BatchNorm {
                frozen_groups: spec.frozen_batch_norm.number(),
                thawed_groups: spec.thawed_batch_norm.policy.number(),
                minimum_batch: Some(spec.thawed_batch_norm.minimum_batch),
            }),
            thaw_embeddings: Some(spec.thaw_embeddings),
            eval_steps: spec.eval_steps,
            logging_steps: Some(spec.logging_steps),
            head_rate_after_thaw: Some(spec.head_rate_after_thaw),
            verification: Some((&spec.verification).into()),
            prefix_cache: Some((&spec.prefix_cache).into()),
            memory_format: spec.memory_format.number(),
            label_smoothing_factor: Some(spec.label_smoothing_factor),
            class_weights: match &spec.class_weights {
                ClassWeights::Equal => None,
                ClassWeights::Balanced => Some(pb::ClassWeights { balanced: true, weights: Vec::new() }),
                ClassWeights::Given(weights) => Some(pb::ClassWeights { balanced: false, weights: weights.clone() }),
            },
            l2_sp: spec.l2_sp.map(|l2_sp| pb::L2Sp { alpha: Some(l2_sp.alpha), beta: Some(l2_sp.beta) }),
            activation_checkpointing: spec.activation_checkpointing,
            gradient_accumulation_steps: Some(spec.gradient_accumulation_steps),
            learning_rates: spec.learning_rates.iter().map(|(group, rate)| (group.clone(), *rate)).collect(),
            scheduling: Some(pb::Scheduling {
                tenant: spec.scheduling.tenant.clone(),
                priority: spec.scheduling.priority.number(),
            }),
            ema: spec.ema.map(|ema| pb::Ema { decay: ema.decay, evaluate: Some(ema.evaluate) }),
        }
    }
}

impl From<&PrefixCache> for pb::PrefixCache {
    fn from(cache: &PrefixCache) -> Self {
        Self {
            mode: cache.mode.number(),
            memory_mib: cache.memory_mib,
            disk_mib: cache.disk_mib,
            chunk_size: cache.chunk_size,
            views: cache.views,
        }
    }
}

impl From<&Backbone> for pb::Backbone {
    fn from(backbone: &Backbone) -> Self {
        Self {
            graph: backbone.graph.to_string(),
            head: Some((&backbone.head).into()),
            layer_groups: backbone.layer_groups.iter().map(Into::into).collect(),
        }
    }
}

impl From<&Head> for pb::Head {
    fn from(head: &Head) -> Self {
        Self {
            attach: head.attach.number(),
            hidden_sizes: head.hidden_sizes.clone(),
            dropout: head.dropout,
            batch_norm: head.batch_norm,
        }
    }
}

impl From<&LayerGroupRule> for pb::LayerGroupRule {
    fn from(rule: &LayerGroupRule) -> Self {
        Self { name: rule.name.clone(), pattern: rule.pattern.clone() }
    }
}

impl From<&Data> for pb::Data {
    fn from(data: &Data) -> Self {
        let images = data.train.format == DataFormat::ImageFolder;
        Self {
            train: Some((&data.train).into()),
            eval: data.eval.as_ref().map(Into::into),
            test: data.test.as_ref().map(Into::into),
            split: Some((&data.split).into()),
            max_length: (!images).then_some(data.max_length),
            image: data.image.as_ref().map(Into::into),
        }
    }
}

impl From<&DataSource> for pb::DataSource {
    fn from(source: &DataSource) -> Self {
        Self {
            path: source.path.to_string(),
            format: source.format.number(),
            text: source.text.clone(),
            label: source.label.clone(),
            tokenizer: url_text(source.tokenizer.as_ref()),
        }
    }
}

impl From<&Split> for pb::Split {
    fn from(split: &Split) -> Self {
        Self { train: split.train, eval: split.eval, test: split.test, stratified: Some(split.stratified) }
    }
}

impl From<&ImageTransform> for pb::ImageTransform {
    fn from(image: &ImageTransform) -> Self {
        Self {
            size: Some(image.size),
            mean: image.mean.clone(),
            std: image.std.clone(),
            augmentation: image.augmentation.as_ref().map(Into::into),
        }
    }
}

impl From<&ImageAugmentation> for pb::ImageAugmentation {
    fn from(augmentation: &ImageAugmentation) -> Self {
        let crop = augmentation.random_resized_crop;
        Self {
            random_resized_crop: crop
                .map(|crop| pb::RandomResizedCrop { scale: crop.scale.to_vec(), ratio: crop.ratio.to_vec() }),
            horizontal_flip: Some(augmentation.horizontal_flip),
            color_jitter: augmentation.color_jitter.map(|jitter| pb::ColorJitter {
                brightness: Some(jitter.brightness),
                contrast: Some(jitter.contrast),
                saturation: Some(jitter.saturation),
            }),
            random_erasing: augmentation.random_erasing.map(|erasing| pb::RandomErasing {
                probability: Some(erasing.probability),
                scale: erasing.rectangle.scale.to_vec(),
                ratio: erasing.rectangle.ratio.to_vec(),
            }),
        }
    }
}

impl From<&Until> for pb::Until {
    fn from(until: &Until) -> Self {
        Self {
            max_epochs: until.max_epochs,
            max_steps: until.max_steps,
            early_stopping: until.early_stopping.as_ref().map(Into::into),
        }
    }
}

impl From<&EarlyStopping> for pb::EarlyStopping {
    fn from(stopping: &EarlyStopping) -> Self {
        Self {
            metric: stopping.metric.number(),
            patience: Some(stopping.patience),
            min_delta: Some(stopping.min_delta),
        }
    }
}

impl From<&Workers> for pb::Workers {
    fn from(workers: &Workers) -> Self {
        Self {
            min: Some(workers.min),
            max: Some(workers.max),
            threads_per_trainer: Some(workers.threads_per_trainer),
            sizing: workers.sizing.number(),
            stall_timeout_seconds: Some(workers.stall_timeout_seconds),
        }
    }
}

impl From<&Checkpoint> for pb::Checkpoint {
    fn from(checkpoint: &Checkpoint) -> Self {
        Self {
            url: url_text(checkpoint.url.as_ref()),
            save_steps: checkpoint.save_steps,
            save_total_limit: Some(checkpoint.save_total_limit),
            max_overhead: Some(checkpoint.max_overhead),
            host_snapshot_steps: checkpoint.host_snapshot_steps,
        }
    }
}

impl From<&Optimizer> for pb::Optimizer {
    fn from(optimizer: &Optimizer) -> Self {
        match *optimizer {
            Optimizer::AdamW { weight_decay, beta1, beta2, epsilon } => Self {
                r#type: OptimizerType::Adamw.number(),
                weight_decay: Some(weight_decay),
                beta1: Some(beta1),
                beta2: Some(beta2),
                epsilon: Some(epsilon),
                momentum: None,
                nesterov: false,
            },
            Optimizer::Sgd { weight_decay, momentum, nesterov } => Self {
                r#type: OptimizerType::Sgd.number(),
                weight_decay: Some(weight_decay),
                beta1: None,
                beta2: None,
                epsilon: None,
                momentum: Some(momentum),
                nesterov,
            },
        }
    }
}

impl From<&LrScheduler> for pb::LrScheduler {
    fn from(scheduler: &LrScheduler) -> Self {
        Self {
            r#type: scheduler.kind.map_or(0, WireEnum::number),
            warmup_steps: scheduler.warmup_steps,
            warmup_ratio: scheduler.warmup_ratio,
            factor: scheduler.plateau.map(|plateau| plateau.factor),
            patience: scheduler.plateau.map(|plateau| plateau.patience),
        }
    }
}

impl From<&Stage> for pb::Stage {
    fn from(stage: &Stage) -> Self {
        Self {
            name: stage.name.clone(),
            thaw: stage.thaw.clone(),
            learning_rate: stage.learning_rate,
            learning_rate_spread: stage.learning_rate_spread,
            until: stage.until.as_ref().map(Into::into),
            on_enter: stage.on_enter.number(),
            lr_scheduler: stage.lr_scheduler.as_ref().map(Into::into),
            learning_rates: stage.learning_rates.iter().map(|(group, rate)| (group.clone(), *rate)).collect(),
            recompute_batch_norm: stage.recompute_batch_norm,
            workers: stage.workers,
        }
    }
}

impl From<&Verification> for pb::Verification {
    fn from(verification: &Verification) -> Self {
        Self { digest_steps: verification.digest_steps, trace: verification.trace }
    }
}

fn url_text(url: Option<&Url>) -> String {
    url.map(ToString::to_string).unwrap_or_default()
}
