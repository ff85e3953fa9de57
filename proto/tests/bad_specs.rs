//! Bad specs and exactly what is said about them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;
use thaw_proto::text;

/// A spec without mistakes; tests add lines to it.
const GOOD: &str = "\
name: a
backbone: {graph: /m.pt2}
data: {train: {path: /d.csv, format: csv, text: t, label: l}}
global_batch_size: 8
";

fn mistakes(spec: &str) -> String {
    match text::check_spec_at(spec, Path::new("/specs")) {
        Ok(_) => String::new(),
        Err(violations) => violations.to_string(),
    }
}

/// What is said about the good spec with these lines after it.
fn with(lines: &str) -> String {
    mistakes(&format!("{GOOD}{lines}"))
}

#[test]
fn the_good_spec_has_no_mistakes() {
    assert_eq!(mistakes(GOOD), "");
}

#[test]
fn every_mistake_is_reported_at_once() {
    let spec = "\
nmae: a
backbone:
  graph: m.pt2
  head: {attach: replac}
data:
  train: {path: s4://b/d.csv, format: cvs, text: t, label: l}
  split: {train: 0.7, eval: 0.2, test: 0.2}
global_batch_size: sixty-four
learning_rate: -1
until: {max_epochs: 0, early_stopping: {patience: 1.5}}
until: {max_epochs: 1}
workers: {min: 4, max: 2}
seed: -1
";
    assert_eq!(
        mistakes(spec),
        "\
nmae: is not a field: did you mean name? (line 1)
backbone.head.attach: \"replac\" is not a known value: did you mean replace? (line 4)
data.train.format: \"cvs\" is not a known value: did you mean csv? (line 6)
data.train.path: has the unknown scheme \"s4\": use file, s3, gs, az or https (line 6)
data.split: must sum to 1, not 1.1 (line 7)
global_batch_size: expected a whole number, found the text \"sixty-four\" (line 8)
learning_rate: must be a finite number > 0, not -1; leave it out for 0.001 (line 9)
until.early_stopping.patience: expected a whole number, found the number 1.5 (line 10)
until.max_epochs: must be in 1-100000, not 0; leave it out for no limit by epochs (line 10)
until: is given twice (first in line 10): remove one (line 11)
workers.max: must be in 4-4096 (not below min), not 2: raise max or lower min (line 12)
seed: must be in 0-18446744073709551615, not -1 (line 13)"
    );
}

/// TEXT-2.
#[test]
fn what_could_not_be_read_has_no_second_mistake() {
    let table = [
        (
            "strategy: costum\nstages: [{name: s, thaw: [head]}]",
            "strategy: \"costum\" is not a known value: did you mean custom? (line 5)",
        ),
        (
            "optimizer: {type: sdg, momentum: 0.5}",
            "optimizer.type: \"sdg\" is not a known value: did you mean sgd? (line 5)",
        ),
        ("until: {max_epochs: three}", "until.max_epochs: expected a whole number, found the text \"three\" (line 5)"),
        (
            "workers: 4",
            "workers: expected fields (min, max, threads_per_trainer, sizing, stall_timeout_seconds), found the number 4 (line 5)",
        ),
        (
            "workers: {stall_timeout_seconds: 4}",
            "workers.stall_timeout_seconds: must be in 5-86400, or 0 for never, not 4; leave it out for 300 (line 5)",
        ),
    ];
    for (lines, expected) in table {
        assert_eq!(with(lines), expected, "{lines}");
    }
}

#[test]
fn an_empty_spec_names_what_is_required() {
    assert_eq!(
        mistakes("{}"),
        "\
name: is required: 1-63 characters of [a-z0-9-], starting with a letter
backbone.graph: is required: URL of a .pt2 archive, e.g. file:///models/minilm.pt2
data.train.path: is required: URL of a file (csv, jsonl) or folder (image_folder)
data.train.format: is required: one of csv, jsonl, image_folder
global_batch_size: is required: samples per optimizer update over all workers, 1-1048576"
    );
}

#[test]
fn rules_over_several_fields() {
    let table = [
        (
            "learning_rate_spread: 2\nlayer_decay: 0.9",
            "layer_decay: is the alternative to learning_rate_spread: remove one of the two (line 6)",
        ),
        (
            "logical_shards: 2\nworkers: {max: 4}",
            "logical_shards: must be at least workers.max (4), not 2: raise it, or lower workers.max (line 5)",
        ),
        ("logical_shards: 9", "logical_shards: must be at most global_batch_size (8), not 9: lower it (line 5)"),
        (
            "workers: {max: 9}",
            "workers.max: must be at most global_batch_size (8), not 9: each worker needs a sample (line 5)",
        ),
        ("strategy: custom", "stages: is required for strategy custom: give at least one stage"),
        (
            "strategy: custom\nworkers: {min: 2, max: 4}\nstages: [{name: s, thaw: [head], workers: 1}]",
            "stages[0].workers: must be in 2-4 (workers.min to workers.max), not 1; leave it out for as many as workers.sizing gives (line 7)",
        ),
        (
            "stages: [{name: s, thaw: [head]}]",
            "stages: must be empty unless strategy is custom: remove the stages, or set strategy to custom (line 5)",
        ),
        (
            "strategy: custom\nstages:\n  - {name: s, thaw: [head]}\n  - {name: s, thaw: []}",
            "stages[1].name: \"s\" is the name of an earlier stage: choose another (line 8)\n\
             stages[1].thaw: is required: names of layer groups, or regular expressions between slashes (/block\\.[67]/) (line 8)",
        ),
        (
            "strategy: custom\nstages: [{name: s, thaw: ['/(/', /x, '/']}]",
            "stages[0].thaw[0]: \"(\" is not a regular expression (Rust regex syntax): unclosed group (line 6)\n\
             stages[0].thaw[1]: \"/x\" starts with a slash: close the regular expression with another (line 6)\n\
             stages[0].thaw[2]: \"/\" starts with a slash: close the regular expression with another (line 6)",
        ),
        (
            "until: {early_stopping: {}}\nlr_scheduler: {type: cosine}",
            "lr_scheduler.type: cosine needs a stage of known length: give until max_epochs or max_steps, or use constant, \
             inverse_sqrt or reduce_on_plateau (line 6)",
        ),
        (
            "until: {}",
            "until: must give at least one of max_epochs, max_steps and early_stopping, or be left out (line 5)",
        ),
        ("optimizer: {momentum: 0.5}", "optimizer.momentum: belongs to sgd: remove it, or set type to sgd (line 5)"),
        (
            "optimizer: {type: sgd, beta1: 0.5}",
            "optimizer.beta1: belongs to adamw: remove it, or set type to adamw (line 5)",
        ),
        ("learning_rate: .nan", "learning_rate: must be a finite number > 0, not NaN; leave it out for 0.001 (line 5)"),
        (
            "max_grad_norm: .inf",
            "max_grad_norm: must be a finite number > 0, not inf; leave it out for no clipping (line 5)",
        ),
        ("layer_decay: 0", "layer_decay: must be in (0, 1], not 0; leave it out for learning_rate_spread (line 5)"),
        ("learning_rate: 1e999", "learning_rate: \"1e999\" is too large: at most 1.7976931348623157e308 (line 5)"),
    ];
    for (lines, expected) in table {
        assert_eq!(with(lines), expected, "{lines}");
    }
}

#[test]
fn policies() {
    let table = [
        (
            "gradient_accumulation_steps: 5\nlogical_shards: 2",
            "gradient_accumulation_steps: must be at most 4, the samples of a logical shard, not 5: lower it, or raise \
             global_batch_size (line 5)",
        ),
        (
            "gradient_accumulation_steps: 0",
            "gradient_accumulation_steps: must be in 1-65536, not 0; leave it out for 1 (line 5)",
        ),
        ("label_smoothing_factor: 1", "label_smoothing_factor: must be in [0, 1), not 1; leave it out for 0 (line 5)"),
        ("class_weights: [1, 0]", "class_weights.weights[1]: must be a finite number > 0, not 0 (line 5)"),
        ("class_weights: [1, x]", "class_weights.weights[1]: expected a number, found the text \"x\" (line 5)"),
        (
            "class_weights: balance",
            "class_weights: expected balanced or a list of numbers, found the text \"balance\" (line 5)",
        ),
        (
            "strategy: from_scratch\nl2_sp: {alpha: -1}",
            "l2_sp: pulls towards pretrained weights, and from_scratch has none: remove it (line 6)\n\
             l2_sp.alpha: must be in [0, 10], not -1; leave it out for 0.1 (line 6)",
        ),
        (
            "learning_rates: {head: 0, '/(/': 1, '': 1}",
            "learning_rates[\"\"]: must not be empty: the name of a layer group, or a regular expression between slashes (line 5)\n\
             learning_rates[\"/(/\"]: \"(\" is not a regular expression (Rust regex syntax): unclosed group (line 5)\n\
             learning_rates[\"head\"]: must be a finite number > 0, not 0 (line 5)",
        ),
        (
            "scheduling: {tenant: Vision, priority: urgent}",
            "scheduling.priority: \"urgent\" is not a known value: use one of low, normal, high (line 5)\n\
             scheduling.tenant: must be 1-63 characters of [a-z0-9-], starting with a letter, not \"Vision\" (line 5)",
        ),
        (
            "lr_scheduler: {type: cosine, factor: 0.5}",
            "lr_scheduler.factor: belongs to reduce_on_plateau: remove it, or set type to reduce_on_plateau (line 5)",
        ),
        (
            "lr_scheduler: {type: reduce_on_plateau, factor: 1}",
            "lr_scheduler.factor: must be in (0, 1), not 1; leave it out for 0.1 (line 5)",
        ),
        (
            "strategy: from_scratch\nbatch_norm: {frozen_groups: recompute, minimum_batch: 1}",
            "batch_norm.frozen_groups: recompute needs pretrained weights, and from_scratch has none: leave it out (line 6)\n\
             batch_norm.minimum_batch: must be in 2-65536, not 1; leave it out for 16 (line 6)",
        ),
        (
            "checkpoint: {max_overhead: 0}",
            "checkpoint.max_overhead: must be in (0, 1], not 0; leave it out for 0.03 (line 5)",
        ),
        (
            "checkpoint: {host_snapshot_steps: 1000001}",
            "checkpoint.host_snapshot_steps: must be in 0-1000000, not 1000001; leave it out for a copy with every checkpoint (line 5)",
        ),
    ];
    for (lines, expected) in table {
        assert_eq!(with(lines), expected, "{lines}");
    }
}

#[test]
fn data_rules() {
    let spec =
        |data: &str| mistakes(&format!("name: a\nbackbone: {{graph: /m.pt2}}\nglobal_batch_size: 8\ndata: {data}\n"));
    let table = [
        (
            "{train: {path: /d, format: image_folder, text: t}, max_length: 8}",
            "data.train.text: must be absent for image_folder: remove it (line 4)\n\
             data.max_length: must be absent for image_folder: remove it (line 4)",
        ),
        (
            "{train: {path: /d, format: csv, text: t, label: l}, image: {size: 8}}",
            "data.image: must be absent for text (csv, jsonl): remove it, or set format to image_folder (line 4)",
        ),
        (
            "{train: {path: /d, format: image_folder}, image: {mean: [0.5]}}",
            "data.image.std: must have as many numbers as mean (1), not 3: give both (line 4)",
        ),
        (
            "{train: {path: /d, format: csv}}",
            "data.train.text: is required: the column or key of the text (line 4)\n\
             data.train.label: is required: the column or key of the label (line 4)",
        ),
        (
            "{train: {path: file://d/x.csv, format: csv, text: t, label: l}}",
            "data.train.path: names the host \"d\": a file URL has three slashes (file:///...) (line 4)",
        ),
        (
            "{train: {path: /d, format: csv, text: t, label: l}, eval: {path: /e, format: image_folder}}",
            "data.eval.format: must be of the same kind as train.format: text (csv, jsonl) or image_folder in all parts (line 4)",
        ),
        (
            "{train: {path: /d, format: csv, text: t, label: l}, split: {train: 1}}",
            "data.split.eval: must be > 0: give a share, or a source of its own in data.eval (line 4)",
        ),
    ];
    for (data, expected) in table {
        assert_eq!(spec(data), expected, "{data}");
    }
}

#[test]
fn augmentation_rules() {
    let spec = |more: &str, image: &str| {
        let source = "train: {path: /d, format: image_folder}";
        let start = format!("name: a\nbackbone: {{graph: /m.pt2}}\nglobal_batch_size: 8\n{more}");
        mistakes(&format!("{start}data: {{{source}, image: {{augmentation: {image}}}}}\n"))
    };
    let table = [
        (
            "{}",
            "data.image.augmentation: changes nothing: give random_resized_crop, horizontal_flip, color_jitter or random_erasing, or leave it out (line 4)",
        ),
        (
            "{horizontal_flip: 1.5}",
            "data.image.augmentation.horizontal_flip: must be in [0, 1], not 1.5; leave it out for 0 (line 4)",
        ),
        (
            "{random_resized_crop: {scale: [0.5], ratio: [2, 1]}}",
            "data.image.augmentation.random_resized_crop.scale: must have two numbers (smallest, largest), not 1 (line 4)\n\
             data.image.augmentation.random_resized_crop.ratio: must ascend (smallest, largest), not 2, 1: exchange the two (line 4)",
        ),
        (
            "{random_resized_crop: {scale: [0, 1]}}",
            "data.image.augmentation.random_resized_crop.scale[0]: must be in (0, 1], not 0; leave it out for 0.08 (line 4)",
        ),
        (
            "{color_jitter: {contrast: 0}}",
            "data.image.augmentation.color_jitter: changes nothing: give brightness, contrast or saturation above 0, or leave it out (line 4)",
        ),
        (
            "{color_jitter: {brightness: 2}}",
            "data.image.augmentation.color_jitter.brightness: must be in [0, 1], not 2; leave it out for 0 (line 4)",
        ),
        (
            "{random_erasing: {probability: 0, ratio: [0.001, 1]}}",
            "data.image.augmentation.random_erasing.probability: must be in (0, 1], not 0; leave it out for 0.5 (line 4)\n\
             data.image.augmentation.random_erasing.ratio[0]: must be in [0.01, 100], not 0.001; leave it out for 0.3 (line 4)",
        ),
    ];
    for (image, expected) in table {
        assert_eq!(spec("", image), expected, "{image}");
    }
    assert_eq!(
        spec("", "{color_jitter: {saturation: 0.1}}, mean: [0.5], std: [0.5]"),
        "data.image.augmentation.color_jitter.saturation: needs three channels, and data.image.mean has one (grey): leave it out (line 4)"
    );
    assert_eq!(
        spec("prefix_cache: {views: 0}\n", "{horizontal_flip: 0.5}"),
        "prefix_cache.views: must be in 1-256, not 0; leave it out for a new draw in every epoch (line 4)"
    );
    assert_eq!(
        mistakes(&format!("{GOOD}prefix_cache: {{views: 2}}\n")),
        "prefix_cache.views: is 2, and samples that nothing changes have one view: set data.image.augmentation, or leave views out (line 5)"
    );
}

#[test]
fn a_relative_path_is_refused_without_a_folder() {
    let raw = text::parse_spec(&GOOD.replace("/m.pt2", "models/m.pt2")).unwrap();
    let violations = thaw_proto::convert::spec::check(&raw).unwrap_err();
    assert_eq!(
        violations.to_string(),
        "backbone.graph: must be a URL or an absolute path, not \"models/m.pt2\": write file:///... or /..."
    );
}

#[test]
fn text_rules() {
    let deep = format!("stages: {}{}", "[".repeat(40), "]".repeat(40));
    let long = format!("name: {}", "a".repeat(1 << 20));
    let table = [
        ("name: &a b\nseed: *a", "the text has an anchor (&name): write the value out where it is needed (line 1)"),
        ("name: a\n---\nname: b", "the text holds several documents: give one a file (line 2)"),
        ("name: !x a", "the text has a tag (!name): remove it, the field decides the type (line 1)"),
        (deep.as_str(), "the text is nested deeper than 32 levels (line 1)"),
        (long.as_str(), "the text has 1048582 bytes: at most 1048576 are read"),
        ("", "the text is empty: give at least the required fields"),
        ("[a]: b", "the text has a list or map as a key: keys are field names (line 1)"),
    ];
    for (spec, expected) in table {
        assert_eq!(text::parse_spec(spec).unwrap_err().to_string(), expected);
    }
}

#[test]
fn wrong_types_name_what_was_expected() {
    let table = [
        ("name: 7", "name: expected a text, found the number 7: put it in quotes (\"7\") (line 1)"),
        ("name: [a]", "name: expected a text, found a list (line 1)"),
        (
            "data: x",
            "data: expected fields (train, eval, test, split, max_length, image), found the text \"x\" (line 1)",
        ),
        ("stages: {}", "stages: expected a list ([a, b]), found fields (line 1)"),
        ("global_batch_size: 4294967296", "global_batch_size: must be in 0-4294967295, not 4294967296 (line 1)"),
        ("stop_when_no_gain: yes", "stop_when_no_gain: expected true or false, found the text \"yes\" (line 1)"),
        ("learning_rate: \"1e-3\"", "learning_rate: expected a number, found the text \"1e-3\" (line 1)"),
        (
            "backbone: {head: {hidden_sizes: [8, x]}}",
            "backbone.head.hidden_sizes[1]: expected a whole number, found the text \"x\" (line 1)",
        ),
        (
            "globalBatchSize: 1\nglobal_batch_size: 2",
            "global_batch_size: is given twice (first in line 1): remove one (line 2)",
        ),
        ("zzz: 1\n\"a b\": 2", ""),
    ];
    for (spec, expected) in table {
        let said = text::parse_spec(spec).unwrap_err().to_string();
        if expected.is_empty() {
            assert!(said.starts_with("zzz: is not a field: known are name, backbone, "), "{said}");
            assert!(said.contains("\n\"a b\": is not a field"), "{said}");
        } else {
            assert_eq!(said, expected, "{spec}");
        }
    }
}
