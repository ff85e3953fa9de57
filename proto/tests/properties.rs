//! Properties of reading, writing and checking (TEXT-1), on values nobody thought of.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use proptest::option;
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::Path;
use thaw_proto::ids::{Generation, GroupIndex, StageIndex, Step};
use thaw_proto::plan::{DataSummary, LayerGroup, Plan, PlannedStage};
use thaw_proto::run::{CheckpointRef, Evaluation, Position, RunResult, StageEnd, StageResult};
use thaw_proto::spec::{LrSchedulerType, Plateau};
use thaw_proto::{convert, pb, text};

fn any_text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z0-9-]{0,8}",
        any::<String>(),
        Just("null".to_owned()),
        Just("1e3".to_owned()),
        Just("a: b #c".to_owned())
    ]
}

fn source() -> impl Strategy<Value = pb::DataSource> {
    (any_text(), 0..4, any_text(), any_text(), any_text())
        .prop_map(|(path, format, text, label, tokenizer)| pb::DataSource { path, format, text, label, tokenizer })
}

fn stage() -> impl Strategy<Value = pb::Stage> {
    let numbers = (option::of(any::<f64>()), option::of(any::<u32>()), rates());
    (any_text(), prop::collection::vec(any_text(), 0..3), 0..3, any::<bool>(), numbers).prop_map(
        |(name, thaw, on_enter, recompute_batch_norm, (rate, steps, learning_rates))| pb::Stage {
            recompute_batch_norm,
            workers: steps,
            name,
            thaw,
            learning_rate: rate.filter(|rate| !rate.is_nan()),
            on_enter,
            until: steps.map(|steps| pb::Until { max_steps: Some(steps), ..Default::default() }),
            learning_rates,
            ..Default::default()
        },
    )
}

fn not_nan() -> impl Strategy<Value = f64> {
    any::<f64>().prop_filter("text reads it back as itself", |number| !number.is_nan())
}

fn rates() -> impl Strategy<Value = HashMap<String, f64>> {
    prop::collection::hash_map(any_text(), not_nan(), 0..3)
}

prop_compose! {
    /// What bends the training, right or wrong.
    fn raw_policies()(
        flags in (any::<bool>(), any::<bool>()), steps in option::of(any::<u32>()), smoothing in option::of(not_nan()),
        weights in option::of(prop::collection::vec(not_nan(), 0..4)), pull in option::of((option::of(not_nan()), option::of(not_nan()))),
        ema in option::of((not_nan(), option::of(any::<bool>()))), learning_rates in rates(), memory_format in 0..4,
        chunk_size in option::of(any::<u32>()), norm in option::of((0..3, 0..4, option::of(any::<u32>()))),
        scheduler in option::of((0..9, option::of(any::<u32>()), option::of(not_nan()), option::of(not_nan()), option::of(any::<u32>()))),
        overhead in option::of(not_nan()), scheduling in option::of((any_text(), 0..4)),
    ) -> pb::RunSpec {
        pb::RunSpec {
            activation_checkpointing: flags.0,
            gradient_accumulation_steps: steps,
            label_smoothing_factor: smoothing,
            class_weights: weights.map(|weights| pb::ClassWeights { balanced: flags.1, weights }),
            l2_sp: pull.map(|(alpha, beta)| pb::L2Sp { alpha, beta }),
            ema: ema.map(|(decay, evaluate)| pb::Ema { decay, evaluate }),
            learning_rates,
            memory_format,
            prefix_cache: Some(pb::PrefixCache { chunk_size, views: steps, ..Default::default() }),
            batch_norm: norm.map(|(frozen_groups, thawed_groups, minimum_batch)| pb::BatchNorm { frozen_groups, thawed_groups, minimum_batch }),
            lr_scheduler: scheduler.map(|(kind, warmup_steps, warmup_ratio, factor, patience)| {
                pb::LrScheduler { r#type: kind, warmup_steps, warmup_ratio, factor, patience }
            }),
            checkpoint: Some(pb::Checkpoint { max_overhead: overhead, save_steps: steps, host_snapshot_steps: chunk_size, ..Default::default() }),
            scheduling: scheduling.map(|(tenant, priority)| pb::Scheduling { tenant, priority }),
            ..Default::default()
        }
    }
}

prop_compose! {
    /// What bends the training, as it passes the check.
    fn good_policies()(
        flags in (any::<bool>(), any::<bool>()), smoothing in option::of(0.0..0.99f64), weights in option::of(prop::collection::vec(1e-3..9.0f64, 1..4)),
        pull in option::of((option::of(0.0..10.0f64), option::of(0.0..10.0f64))), ema in option::of((0.01..0.9999f64, option::of(any::<bool>()))),
        learning_rates in prop::collection::hash_map("[a-z.]{1,8}|/[a-z]{1,8}/", 1e-9..1.0f64, 0..3), memory_format in 0..4,
        norm in option::of((0..2, 0..4, option::of(2..64u32))), plateau in option::of((option::of(0.01..0.99f64), option::of(1..9u32))),
        ratio in option::of(0.0..=1.0f64), (overhead, copies) in (option::of(0.001..=1.0f64), option::of(0..=1_000_000u32)), scheduling in option::of(("[a-z][a-z0-9-]{0,9}", 0..4)),
    ) -> pb::RunSpec {
        let balanced = weights.is_none() && flags.1;
        pb::RunSpec {
            activation_checkpointing: flags.0,
            gradient_accumulation_steps: Some(1),
            label_smoothing_factor: smoothing,
            class_weights: (balanced || weights.is_some())
                .then(|| pb::ClassWeights { balanced, weights: weights.unwrap_or_default() }),
            l2_sp: pull.map(|(alpha, beta)| pb::L2Sp { alpha, beta }),
            ema: ema.map(|(decay, evaluate)| pb::Ema { decay, evaluate }),
            learning_rates,
            memory_format,
            batch_norm: norm.map(|(frozen_groups, thawed_groups, minimum_batch)| pb::BatchNorm { frozen_groups, thawed_groups, minimum_batch }),
            lr_scheduler: Some(match plateau {
                Some((factor, patience)) => pb::LrScheduler { r#type: 7, warmup_ratio: ratio, factor, patience, ..Default::default() },
                None => pb::LrScheduler { warmup_ratio: ratio, ..Default::default() },
            }),
            checkpoint: Some(pb::Checkpoint { max_overhead: overhead, host_snapshot_steps: copies, ..Default::default() }),
            scheduling: scheduling.map(|(tenant, priority)| pb::Scheduling { tenant, priority }),
            ..Default::default()
        }
    }
}

prop_compose! {
    /// Changes of images, right or wrong.
    fn raw_augmentation()(
        flip in option::of(not_nan()), crop in option::of((bounds(), bounds())), erasing in option::of((option::of(not_nan()), bounds(), bounds())),
        jitter in option::of((option::of(not_nan()), option::of(not_nan()), option::of(not_nan()))),
    ) -> pb::ImageAugmentation {
        pb::ImageAugmentation {
            random_resized_crop: crop.map(|(scale, ratio)| pb::RandomResizedCrop { scale, ratio }),
            horizontal_flip: flip,
            color_jitter: jitter.map(|(brightness, contrast, saturation)| pb::ColorJitter { brightness, contrast, saturation }),
            random_erasing: erasing.map(|(probability, scale, ratio)| pb::RandomErasing { probability, scale, ratio }),
        }
    }
}

fn bounds() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec(not_nan(), 0..4)
}

prop_compose! {
    /// Any message, right or wrong.
    fn raw_spec()(
        name in any_text(), graph in any_text(), hidden in prop::collection::vec(any::<u32>(), 0..3), train in source(),
        eval in option::of(source()), shares in option::of((0.0..1.0f64, 0.0..1.0f64)), strategy in 0..6, batch in any::<u32>(),
        rate in option::of(any::<f64>()), seed in any::<u64>(), stages in prop::collection::vec(stage(), 0..3),
        flag in option::of(any::<bool>()), mean in prop::collection::vec(any::<f64>(), 0..4), policies in raw_policies(),
        augmentation in option::of(raw_augmentation()),
    ) -> pb::RunSpec {
        pb::RunSpec {
            name,
            backbone: Some(pb::Backbone {
                graph,
                head: Some(pb::Head { hidden_sizes: hidden, ..Default::default() }),
                layer_groups: Vec::new(),
            }),
            data: Some(pb::Data {
                train: Some(train),
                eval,
                split: shares.map(|(train, eval)| pb::Split { train, eval, test: 1.0 - train - eval, stratified: flag }),
                image: Some(pb::ImageTransform { mean: mean.into_iter().filter(|mean| !mean.is_nan()).collect(), augmentation, ..Default::default() }),
                ..Default::default()
            }),
            strategy,
            global_batch_size: batch,
            learning_rate: rate.filter(|rate| !rate.is_nan()),
            seed,
            stages,
            stop_when_no_gain: flag,
            ..policies
        }
    }
}

prop_compose! {
    /// A message that passes the check.
    fn good_spec()(
        name in "[a-z][a-z0-9-]{0,20}", batch in 8..4096u32, strategy in 0..5, precision in 0..4, rate in option::of(1e-9..10.0f64),
        decay in option::of(0.01..=1.0f64), epochs in option::of(1..100u32), stopping in option::of((0..4, 1..9u32)),
        min in option::of(1..4u32), max in option::of(4..9u32), images in any::<bool>(), own_eval in any::<bool>(),
        sgd in any::<bool>(), seed in any::<u64>(), shards in option::of(8..9u32), policies in good_policies(),
        (flip, views) in (option::of(0.01..=1.0f64), option::of(1..=256u32)),
    ) -> pb::RunSpec {
        let source = || pb::DataSource {
            path: "/d".into(),
            format: if images { 3 } else { 1 },
            text: if images { "" } else { "t" }.into(),
            label: if images { "" } else { "l" }.into(),
            tokenizer: String::new(),
        };
        let early_stopping = stopping.map(|(metric, patience)| pb::EarlyStopping { metric, patience: Some(patience), min_delta: None });
        let bounded = epochs.is_some() || early_stopping.is_some();
        pb::RunSpec {
            name,
            backbone: Some(pb::Backbone { graph: "s3://models/m.pt2".into(), ..Default::default() }),
            data: Some(pb::Data {
                train: Some(source()),
                eval: own_eval.then(source),
                image: flip.filter(|_| images).map(|flip| pb::ImageTransform {
                    augmentation: Some(pb::ImageAugmentation {
                        horizontal_flip: Some(flip),
                        random_resized_crop: sgd.then(Default::default),
                        random_erasing: own_eval.then(Default::default),
                        color_jitter: sgd.then_some(pb::ColorJitter { saturation: Some(flip), ..Default::default() }),
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            prefix_cache: views.filter(|_| images && flip.is_some()).map(|views| pb::PrefixCache { views: Some(views), ..Default::default() }),
            strategy,
            global_batch_size: batch,
            precision,
            learning_rate: rate,
            layer_decay: decay,
            until: bounded.then_some(pb::Until { max_epochs: epochs, max_steps: None, early_stopping }),
            workers: Some(pb::Workers {
                min,
                max,
                threads_per_trainer: None,
                sizing: precision.min(2),
                stall_timeout_seconds: Some(0).filter(|_| sgd),
            }),
            optimizer: sgd.then_some(pb::Optimizer { r#type: 2, ..Default::default() }),
            seed,
            logical_shards: shards,
            // Nothing is pulled to weights that are drawn anew.
            l2_sp: policies.l2_sp.filter(|_| strategy != 4),
            ..policies
        }
    }
}

prop_compose! {
    fn position()(stage in 0..9u32, stage_step in any::<u32>(), step in any::<u64>()) -> Position {
        Position { stage: StageIndex(stage), stage_step, step: Step(step) }
    }
}

prop_compose! {
    fn evaluation()(position in position(), loss in 0.0..9.0f64, samples in any::<u64>(), confusion in prop::collection::vec(any::<u64>(), 0..5))
        -> Evaluation {
        Evaluation { position, loss, accuracy: 0.5, macro_f1: 0.25, samples, confusion }
    }
}

proptest! {
    #[test]
    fn any_text_is_read_without_a_panic(text in any::<String>()) {
        let _ = text::check_spec_at(&text, Path::new("/"));
    }

    #[test]
    fn any_yaml_like_text_is_read_without_a_panic(text in "([a-z:&*!|>'\"#%@`{}\\[\\],?~ \n\t-]|name: |- |---\n|\\PC){0,60}") {
        let _ = text::check_spec_at(&text, Path::new("/"));
    }

    #[test]
    fn any_field_with_any_value_is_read_without_a_panic(
        field in prop::sample::select(vec!["name", "backbone", "data", "until", "stages", "seed", "learning_rate", "strategy", "workers"]),
        value in "[0-9a-fxo.eE+_\\[\\]{}, -]{0,30}",
    ) {
        let _ = text::check_spec_at(&format!("{field}: {value}\n"), Path::new("/"));
    }

    #[test]
    fn text_round_trips(raw in raw_spec()) {
        prop_assert_eq!(&text::parse_spec(&text::to_yaml(&raw)).unwrap(), &raw);
        prop_assert_eq!(&text::parse_spec(&text::to_json(&raw)).unwrap(), &raw);
    }

    #[test]
    fn any_message_is_checked_without_a_panic(raw in raw_spec()) {
        if let Ok(spec) = convert::spec::check(&raw) {
            prop_assert_eq!(convert::spec::check(&pb::RunSpec::from(&spec)).unwrap(), spec);
        }
    }

    #[test]
    fn a_checked_spec_round_trips(raw in good_spec()) {
        let spec = convert::spec::check(&raw).unwrap();
        prop_assert_eq!(convert::spec::check(&pb::RunSpec::from(&spec)).unwrap(), spec);
    }

    #[test]
    fn a_plan_round_trips(
        raw in good_spec(), rate in 1e-9..1.0f64, warmup in 0..500u32, count in any::<u64>(),
        plateau in option::of((0.01..0.99f64, 1..9u32)),
    ) {
        let plateau = plateau.map(|(factor, patience)| Plateau { factor, patience });
        let until = convert::spec::check(&raw).unwrap().until;
        let group = |name: &str| LayerGroup { name: name.into(), parameters: count, forward_flops: 1, embedding: false };
        let plan = Plan {
            groups: vec![group("stem"), group("head")],
            stages: vec![PlannedStage {
                name: "head".into(),
                trainable_groups: vec![GroupIndex(0), GroupIndex(1)],
                learning_rates: vec![rate, rate],
                until,
                on_enter: thaw_proto::spec::OnEnter::Keep,
                schedule: if plateau.is_some() { LrSchedulerType::ReduceOnPlateau } else { LrSchedulerType::OneCycle },
                warmup_steps: warmup,
                max_steps: 9,
                trainable_parameters: count,
                all_reduce_bytes: 2,
                memory_bytes: 3,
                boundary_bytes_per_sample: 4,
                thawed_groups: vec![GroupIndex(1)],
                cost: thaw_proto::plan::StageCost {
                    step_flops: 3,
                    cache_bytes: 7,
                    work: thaw_proto::plan::StepWork { operators: 5, update_bytes: 11, ..Default::default() },
                    ..Default::default()
                },
                plateau,
                recompute_batch_norm: count % 2 == 1,
                workers: (count % 3 > 0).then_some(2),
            }],
            classes: vec!["a".into(), "b".into()],
            data: DataSummary { train_samples: count, class_counts: vec![count, 1], fingerprint: "f".into(), ..Default::default() },
            logical_shards: 2,
            global_batch_size: 8,
            steps_per_epoch: 5,
            notes: vec!["n".into()],
            feature_size: 384,
        };
        let message = pb::Plan::from(&plan);
        prop_assert_eq!(&Plan::try_from(&message).unwrap(), &plan);
        prop_assert_eq!(&text::parse::<pb::Plan>(&text::to_yaml(&message)).unwrap(), &message);
    }

    #[test]
    fn results_round_trip(eval in evaluation(), test in option::of(evaluation()), seconds in 0.0..1e6f64, count in any::<u64>()) {
        let stage = StageResult {
            stage: StageIndex(1), steps: 7, epochs: 1.5, seconds, end: StageEnd::Patience, eval: eval.clone(),
            deciding_eval: eval.clone(), replica_digest: "d".into(), peak_memory_bytes: 1, saves: 2, test: test.clone(),
        };
        prop_assert_eq!(&StageResult::try_from(&pb::StageResult::from(&stage)).unwrap(), &stage);
        let checkpoint = CheckpointRef {
            position: eval.position, generation: Generation(count), manifest: "manifests/1-2.json".into(), manifest_blake3: "b".into(),
        };
        prop_assert_eq!(&CheckpointRef::try_from(&pb::CheckpointRef::from(&checkpoint)).unwrap(), &checkpoint);
        let result = RunResult { test, best: eval, weights_blake3: "w".into(), model: "file:///m".into(), steps: Step(count), seconds };
        let message = pb::RunResult::from(&result);
        prop_assert_eq!(&RunResult::try_from(&message).unwrap(), &result);
        prop_assert_eq!(&text::parse::<pb::RunResult>(&text::to_json(&message)).unwrap(), &message);
    }
}
