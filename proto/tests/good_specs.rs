//! Specs that are right, and what they mean.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use thaw_proto::spec::{
    BatchNormPolicy, ClassWeights, EarlyStopping, Metric, Optimizer, Plateau, Precision, Priority, RateDecay, RunSpec,
    Strategy, ThawedBatchNormPolicy,
};
use thaw_proto::{convert, pb, text};

const EXAMPLE: &str = "\
name: debian-sections
backbone: {graph: file:///models/minilm.pt2}           # any object_store URL
data:
  train: {path: file:///data/packages.csv, format: csv, text: description, label: section}
  split: {train: 0.70, eval: 0.15, test: 0.15, stratified: true}
strategy: gradual_unfreezing     # or feature_extraction, full_fine_tuning, from_scratch, custom (stages given)
global_batch_size: 64
precision: bf16
learning_rate: 1e-3             # of the head
learning_rate_spread: 40         # head's rate over the lowest thawed group's
until: {max_epochs: 3, early_stopping: {metric: eval_loss, patience: 1}}
workers: {min: 1, max: 4}
checkpoint: {url: s3://lab/runs, save_steps: 200, save_total_limit: 3}
seed: 7
";

fn check(text: &str) -> RunSpec {
    text::check_spec_at(text, Path::new("/specs")).unwrap().1
}

#[test]
fn the_designs_example() {
    let spec = check(EXAMPLE);
    assert_eq!(spec.name, "debian-sections");
    assert_eq!(spec.strategy, Strategy::GradualUnfreezing);
    assert_eq!(spec.precision, Precision::Bf16);
    assert_eq!(spec.learning_rate, 1e-3);
    assert_eq!(spec.rate_decay, RateDecay::Spread(Some(40.0)));
    assert_eq!(spec.until.max_epochs, Some(3));
    let stopping: EarlyStopping = spec.until.early_stopping.unwrap();
    assert_eq!((stopping.metric, stopping.patience, stopping.min_delta), (Metric::EvalLoss, 1, 1e-3));
    assert_eq!((spec.workers.min, spec.workers.max, spec.logical_shards), (1, 4, 4));
    assert_eq!(spec.checkpoint.url.unwrap().as_str(), "s3://lab/runs");
    assert_eq!(spec.seed, 7);
    assert_eq!((spec.data.split.train, spec.data.split.eval, spec.data.split.test), (0.7, 0.15, 0.15));
    assert!(spec.stop_when_no_gain && !spec.thaw_embeddings);
    assert_eq!(
        (spec.head_rate_after_thaw, spec.thaw_units, spec.logging_steps, spec.data.max_length),
        (0.5, 4, 10, 128)
    );
}

#[test]
fn defaults_follow_the_strategy_and_the_optimizer() {
    let base =
        "name: a\nbackbone: {graph: m.pt2}\nglobal_batch_size: 8\ndata: {train: {path: ../d, format: image_folder}}\n";
    let spec = check(&format!("{base}strategy: from_scratch\noptimizer: {{type: sgd}}\n"));
    assert_eq!(spec.backbone.graph.as_str(), "file:///specs/m.pt2");
    assert_eq!(spec.data.train.path.as_str(), "file:///d");
    assert_eq!(spec.rate_decay, RateDecay::Spread(Some(1.0)));
    assert_eq!(spec.learning_rate, 1e-2);
    assert_eq!(spec.optimizer, Optimizer::Sgd { weight_decay: 0.0, momentum: 0.9, nesterov: false });
    assert!(!spec.stop_when_no_gain && spec.thaw_embeddings);
    assert_eq!(spec.head_rate_after_thaw, 1.0);
    assert_eq!(spec.until.max_epochs, Some(3));
    assert_eq!(spec.data.image.unwrap().mean, [0.485, 0.456, 0.406]);
    let patient = check(&format!("{base}until: {{earlyStopping: {{}}}}"));
    assert_eq!(patient.until.max_epochs, Some(100));
}

#[test]
fn policies_and_their_defaults() {
    let base =
        "name: a\nbackbone: {graph: m.pt2}\nglobal_batch_size: 8\ndata: {train: {path: ../d, format: image_folder}}\n";
    let plain = check(base);
    assert_eq!((plain.gradient_accumulation_steps, plain.label_smoothing_factor), (1, 0.0));
    assert_eq!((plain.class_weights, plain.l2_sp, plain.ema), (ClassWeights::Equal, None, None));
    assert_eq!((plain.checkpoint.save_steps, plain.checkpoint.max_overhead), (None, 0.03));
    assert_eq!(plain.checkpoint.host_snapshot_steps, None);
    assert_eq!(
        (plain.thawed_batch_norm.policy, plain.thawed_batch_norm.minimum_batch),
        (ThawedBatchNormPolicy::Auto, 16)
    );
    let full = check(&format!(
        "{base}gradient_accumulation_steps: 4\nlabel_smoothing_factor: 0.1\nclass_weights: [1, 2.5]\nl2_sp: {{alpha: 0.2}}\n\
         ema: {{decay: 0.99, evaluate: false}}\nlearning_rates: {{head: 1e-2, '/layer[12]/': 1e-4}}\n\
         activation_checkpointing: true\nlr_scheduler: {{type: reduce_on_plateau, warmup_ratio: 0.1, patience: 3}}\n\
         batch_norm: {{frozen_groups: recompute, thawed_groups: frozen_statistics, minimum_batch: 8}}\n\
         scheduling: {{tenant: vision, priority: high}}\n"
    ));
    assert_eq!((plain.scheduling.tenant.as_str(), plain.scheduling.priority), ("default", Priority::Normal));
    assert_eq!((full.scheduling.tenant.as_str(), full.scheduling.priority), ("vision", Priority::High));
    assert_eq!(full.class_weights, ClassWeights::Given(vec![1.0, 2.5]));
    assert_eq!(
        full.learning_rates.iter().map(|(key, rate)| (key.as_str(), *rate)).collect::<Vec<_>>(),
        [("/layer[12]/", 1e-4), ("head", 1e-2)]
    );
    assert_eq!(full.lr_scheduler.plateau, Some(Plateau { factor: 0.1, patience: 3 }));
    assert_eq!((full.frozen_batch_norm, full.thawed_batch_norm.minimum_batch), (BatchNormPolicy::Recompute, 8));
    assert_eq!((full.gradient_accumulation_steps, full.activation_checkpointing), (4, true));
    assert_eq!(check(&format!("{base}class_weights: balanced")).class_weights, ClassWeights::Balanced);
    assert_eq!(check(&format!("{base}class_weights: {{weights: [1]}}")).class_weights, ClassWeights::Given(vec![1.0]));
    let raw = pb::RunSpec::from(&full);
    assert_eq!(convert::spec::check(&text::parse_spec(&text::to_yaml(&raw)).unwrap()).unwrap(), full);
    assert_eq!(convert::spec::check(&text::parse_spec(&text::to_json(&raw)).unwrap()).unwrap(), full);
}

#[test]
fn changes_of_images_and_their_defaults() {
    let base =
        "name: a\nbackbone: {graph: m.pt2}\nglobal_batch_size: 8\ndata: {train: {path: ../d, format: image_folder}";
    assert_eq!(check(&format!("{base}}}\n")).augmentation(), None);
    let full = check(&format!(
        "{base}, image: {{augmentation: {{random_resized_crop: {{}}, horizontal_flip: 0.5, color_jitter: {{contrast: 0.4}}, \
         random_erasing: {{scale: [0.1, 0.2]}}}}}}}}\nprefix_cache: {{views: 8}}\n"
    ));
    let found = full.augmentation().unwrap();
    let crop = found.random_resized_crop.unwrap();
    assert_eq!((crop.scale, crop.ratio), ([0.08, 1.0], [3.0 / 4.0, 4.0 / 3.0]));
    let jitter = found.color_jitter.unwrap();
    assert_eq!((jitter.brightness, jitter.contrast, jitter.saturation), (0.0, 0.4, 0.0));
    let erasing = found.random_erasing.unwrap();
    assert_eq!((erasing.probability, erasing.rectangle.scale, erasing.rectangle.ratio), (0.5, [0.1, 0.2], [0.3, 3.3]));
    assert_eq!((found.horizontal_flip, full.prefix_cache.views), (0.5, Some(8)));
    let raw = pb::RunSpec::from(&full);
    assert_eq!(convert::spec::check(&text::parse_spec(&text::to_yaml(&raw)).unwrap()).unwrap(), full);
    assert_eq!(convert::spec::check(&text::parse_spec(&text::to_json(&raw)).unwrap()).unwrap(), full);
}

#[test]
fn a_part_with_its_own_source_takes_no_share() {
    let base = "name: a\nbackbone: {graph: m.pt2}\nglobal_batch_size: 8\n";
    let shares = |parts: &str| {
        let split = check(&format!("{base}data: {{train: {{path: d, format: image_folder}}{parts}}}\n")).data.split;
        (split.train, split.eval, split.test)
    };
    assert_eq!(shares(""), (0.8, 0.1, 0.1));
    assert_eq!(shares(", split: {stratified: false}"), (0.8, 0.1, 0.1));
    assert_eq!(shares(", eval: {path: e, format: image_folder}"), (1.0, 0.0, 0.0));
    assert_eq!(shares(", test: {path: e, format: image_folder}"), (0.9, 0.1, 0.0));
    assert_eq!(shares(", eval: {path: e, format: image_folder}, split: {train: 0.9, test: 0.1}"), (0.9, 0.0, 0.1));
}

#[test]
fn json_in_camel_case_means_the_same() {
    let json = "{\n\t\"name\": \"debian-sections\",\n\t\"backbone\": {\"graph\": \"file:\\/\\/\\/models/minilm.pt2\"},\n\t\
        \"data\": {\"train\": {\"path\": \"file:///data/packages.csv\", \"format\": \"DATA_FORMAT_CSV\", \"text\": \"description\", \
        \"label\": \"section\"},\n\t\t\"split\": {\"train\": 0.7, \"eval\": 0.15, \"test\": 0.15, \"stratified\": true}},\n\t\
        \"globalBatchSize\": 64, \"precision\": \"bf16\", \"learningRate\": 1e-3, \"learningRateSpread\": 40.0,\n\t\
        \"strategy\": 2, \"until\": {\"maxEpochs\": 3, \"earlyStopping\": {\"metric\": \"eval_loss\", \"patience\": 1}},\n\t\
        \"workers\": {\"min\": 1, \"max\": 4}, \"checkpoint\": {\"url\": \"s3://lab/runs\", \"saveSteps\": 200, \
        \"saveTotalLimit\": 3}, \"seed\": \"7\"}";
    assert_eq!(check(json), check(EXAMPLE));
}

#[test]
fn json_escapes_survive() {
    let json = r#"{"name": "\ud83d\ude00 \"\\\u00e9\t/", "backbone": {"graph": null}}"#;
    let raw = text::parse_spec(json).unwrap();
    assert_eq!(raw.name, "\u{1f600} \"\\\u{e9}\t/");
    assert_eq!(raw.backbone, Some(pb::Backbone::default()));
}

#[test]
fn a_checked_spec_survives_every_form() {
    let spec = check(EXAMPLE);
    let raw = pb::RunSpec::from(&spec);
    assert_eq!(convert::spec::check(&raw).unwrap(), spec);
    assert_eq!(text::parse_spec(&text::to_yaml(&raw)).unwrap(), raw);
    assert_eq!(text::parse_spec(&text::to_json(&raw)).unwrap(), raw);
}

#[test]
fn yaml_reads_like_one_wrote_it() {
    let raw = text::parse_spec(&format!("{EXAMPLE}strategy_: 1").replace("strategy_: 1", "")).unwrap();
    let yaml = text::to_yaml(&raw);
    assert!(yaml.starts_with(
        "name: debian-sections\nbackbone:\n  graph: file:///models/minilm.pt2\ndata:\n  train:\n    path: file:///data/packages.csv\n    \
         format: csv\n"
    ));
    assert!(yaml.contains("\nstrategy: gradual_unfreezing\n"));
    let staged = pb::RunSpec {
        stages: vec![
            pb::Stage { name: "one".into(), thaw: vec!["head".into(), "/b: 1/".into()], ..Default::default() },
            pb::Stage::default(),
        ],
        ..Default::default()
    };
    assert_eq!(text::to_yaml(&staged), "stages:\n  - name: one\n    thaw: [head, \"/b: 1/\"]\n  - {}\n");
}
