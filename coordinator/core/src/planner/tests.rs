//! Plans of one small graph, one strategy at a time.

use super::*;
use crate::test_support::{data, graph, plan_of, reference, spec};
use proptest::prelude::*;
use serde_json::json;
use thaw_proto::plan::StepWork;

fn groups(plan: &Plan, stage: usize) -> Vec<&str> {
    plan.stages[stage].trainable_groups.iter().map(|group| plan.groups[group.0 as usize].name.as_str()).collect()
}

fn mistakes(changes: serde_json::Value) -> Vec<String> {
    plan(&spec(changes), &graph(), &data()).unwrap_err().0.iter().map(ToString::to_string).collect()
}

#[test]
fn plan_3_gradual_unfreezing_adds_units_from_the_top() {
    let plan = plan_of(&spec(json!({})));
    let stages: Vec<(&str, Vec<&str>)> =
        (0..plan.stages.len()).map(|stage| (plan.stages[stage].name.as_str(), groups(&plan, stage))).collect();
    let layers = |from: usize| -> Vec<String> {
        (from..6).map(|layer| format!("encoder.layer.{layer}")).chain(["head".to_owned()]).collect()
    };
    let expected = [
        ("head", layers(6)),
        ("thaw-1", layers(5)),
        ("thaw-2", layers(4)),
        ("thaw-3", layers(2)),
        ("thaw-4", layers(0)),
    ];
    assert_eq!(stages.len(), expected.len());
    for ((name, groups), (expected_name, expected_groups)) in stages.iter().zip(&expected) {
        assert_eq!((name, groups), (expected_name, &expected_groups.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    assert_eq!(plan.steps_per_epoch, 10);
    assert_eq!(plan.stages[1].max_steps, 30);
    assert_eq!(plan.stages[1].warmup_steps, 10);
    assert_eq!(plan.stages[1].thawed_groups, [GroupIndex(6)]);
    assert_eq!(plan.stages[1].schedule, LrSchedulerType::Linear);
    assert_eq!([plan.stages[0].on_enter, plan.stages[1].on_enter], [OnEnter::Keep, OnEnter::RestoreBest]);
    assert!(plan.notes.iter().any(|note| note.contains("embeddings") && note.contains("5000")), "{:?}", plan.notes);
}

#[test]
fn rates_fall_by_thaw_unit_and_the_heads_halves() {
    let plan = plan_of(&spec(json!({})));
    let level = |d: f64| 1e-3 * 40_f64.powf(-d / 4.0);
    assert_eq!(plan.stages[0].learning_rates, [1e-3]);
    assert_eq!(plan.stages[1].learning_rates, [level(1.0), 5e-4]);
    assert_eq!(
        plan.stages[4].learning_rates,
        [level(4.0), level(4.0), level(3.0), level(3.0), level(2.0), level(1.0), 5e-4]
    );
    assert_eq!(plan.stages[4].learning_rates[0], 1e-3 / 40.0);
}

#[test]
fn layer_decay_is_a_factor_per_level() {
    let plan = plan_of(&spec(
        json!({"rate_decay": {"per_level": 0.5}, "strategy": "full_fine_tuning", "head_rate_after_thaw": 1.0}),
    ));
    let rates = &plan.stages[0].learning_rates;
    assert_eq!(rates.len(), 7);
    assert_eq!((rates[0], rates[6]), (1e-3 / 64.0, 1e-3));
}

/// O6: with one level a group, timm's layer decay and fastai's even multiples.
#[test]
fn rates_by_group_are_those_of_timm_and_fastai() {
    let rates = |decay: serde_json::Value| {
        let changes = json!({
            "rate_decay": decay, "strategy": "full_fine_tuning", "thaw_embeddings": true, "head_rate_after_thaw": 1.0,
        });
        plan_of(&spec(changes)).stages[0].learning_rates.clone()
    };
    let check = |found: Vec<f64>, expected: Vec<f64>| {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found / expected - 1.0).abs() < 1e-12, "{found} is not {expected}");
        }
    };
    let numbers = |value: &serde_json::Value| serde_json::from_value::<Vec<f64>>(value.clone()).unwrap();
    for table in reference("layer_decay") {
        let scaled = numbers(&table["scales"]).iter().map(|scale| 1e-3 * scale).collect();
        check(rates(json!({"per_level": table["decay"]})), scaled);
    }
    for table in reference("even_mults") {
        check(rates(json!({"spread": table["spread"]})), numbers(&table["rates"]));
    }
}

#[test]
fn rates_given_by_name_stand_before_derived_ones() {
    let by_run = json!({"head": 7e-3, "/layer/": 5e-5, "encoder.layer.5": 1e-4});
    let plan = plan_of(&spec(json!({"learning_rates": by_run.clone()})));
    assert_eq!(plan.stages[0].learning_rates, [7e-3]);
    assert_eq!(plan.stages[2].learning_rates, [5e-5, 1e-4, 7e-3]);
    let mut own = stage_json("a", &["head", "encoder.layer.5", "encoder.layer.4"]);
    own["learning_rates"] = json!({"encoder.layer.5": 9e-4});
    let plan = plan_of(&spec(json!({"strategy": "custom", "stages": [own], "learning_rates": by_run})));
    assert_eq!(plan.stages[0].learning_rates, [5e-5, 9e-4, 7e-3]);
}

#[test]
fn rates_given_by_name_name_groups_once() {
    let mut stage = stage_json("a", &["head"]);
    stage["learning_rates"] = json!({"encoder.layer.1": 1e-3});
    let rates = json!({"hed": 1e-3, "/layer/": 1e-4, "/encoder/": 1e-5});
    let found = mistakes(json!({"strategy": "custom", "stages": [stage], "learning_rates": rates}));
    let expected = [
        "learning_rates[\"/layer/\"]: and \"/encoder/\" both name encoder.layer.0; give encoder.layer.0 a rate by its name",
        "learning_rates[\"hed\"]: names no layer group; did you mean `head`?",
        "stages[0].learning_rates[\"encoder.layer.1\"]: names no layer group that this stage trains; add it to thaw, or remove the rate",
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_plateau_must_come_before_the_stage_ends() {
    let early = json!({"metric": "eval_loss", "patience": 2, "min_delta": 0.001});
    let until = json!({"max_epochs": 3, "max_steps": null, "early_stopping": early});
    let scheduler = |patience: u32| json!({"kind": "reduce_on_plateau", "warmup_steps": null, "plateau": {"factor": 0.1, "patience": patience}});
    let found = mistakes(json!({"until": until.clone(), "lr_scheduler": scheduler(2)}));
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("lr_scheduler.patience: is 2, so the stage ends"), "{}", found[0]);
    let plan = plan_of(&spec(json!({"until": until, "lr_scheduler": scheduler(1)})));
    assert_eq!(plan.stages[0].plateau.map(|plateau| plateau.patience), Some(1));
    assert_eq!(plan.stages[0].schedule, LrSchedulerType::ReduceOnPlateau);
}

#[test]
fn convolution_nets_spread_wider() {
    let facts = GraphFacts { convolutional: true, ..graph() };
    let plan = plan(&spec(json!({})), &facts, &data()).unwrap();
    assert!((plan.stages[4].learning_rates[0] / 1e-5 - 1.0).abs() < 1e-12);
}

#[test]
fn one_stage_strategies() {
    let plan = plan_of(&spec(json!({"strategy": "feature_extraction"})));
    assert_eq!((plan.stages.len(), groups(&plan, 0)), (1, vec!["head"]));
    assert_eq!(plan.stages[0].boundary_bytes_per_sample, 512);
    let scratch =
        plan_of(&spec(json!({"strategy": "from_scratch", "thaw_embeddings": true, "head_rate_after_thaw": 1.0})));
    assert_eq!(groups(&scratch, 0).len(), 8);
    assert!(scratch.stages[0].learning_rates.iter().all(|rate| *rate == 1e-3));
    assert_eq!(scratch.stages[0].boundary_bytes_per_sample, 0);
    assert_eq!(scratch.stages[0].trainable_parameters, 11_036);
}

/// PLAN-4
#[test]
fn plan_4_embeddings_thaw_only_when_asked() {
    let frozen = plan_of(&spec(json!({"strategy": "full_fine_tuning"})));
    assert!(!groups(&frozen, 0).contains(&"embeddings"));
    let asked = plan_of(&spec(json!({"thaw_embeddings": true, "thaw_units": 7})));
    assert_eq!(asked.stages.len(), 8);
    assert_eq!(groups(&asked, 7)[0], "embeddings");
}

#[test]
fn a_stage_states_what_no_engine_can_go_below() {
    let plan = plan_of(&spec(json!({"global_batch_size": 2, "logical_shards": 2})));
    let forward = |groups: &[usize]| groups.iter().map(|&group| 2 * 2 * plan.groups[group].forward_flops).sum::<u64>();
    let all: Vec<usize> = (0..plan.groups.len()).collect();
    for stage in &plan.stages {
        let boundary = stage.trainable_groups[0].0 as usize;
        assert_eq!(stage.cost.step_flops, 3 * forward(&all[boundary..]), "{}", stage.name);
        assert_eq!(stage.cost.uncached_step_flops, forward(&all) + 2 * forward(&all[boundary..]), "{}", stage.name);
        assert_eq!(stage.cost.full_step_flops, 3 * forward(&all));
        assert_eq!(stage.cost.optimizer_bytes, 2 * stage.cost.gradient_bytes, "AdamW keeps two moments");
        assert_eq!(stage.cost.cache_bytes, 512 * 200);
    }
    let bytes: Vec<u64> = plan.stages.iter().map(|stage| stage.cost.checkpoint_bytes).collect();
    assert!(bytes.is_sorted() && bytes[0] < bytes[4], "{bytes:?}");
}

#[test]
fn the_cache_holds_every_view_of_a_training_sample() {
    let planned = |augmentation: serde_json::Value, views: Option<u32>| {
        let mut changes = json!({"prefix_cache": {"mode": "auto", "memory_mib": null, "disk_mib": null, "chunk_size": null, "views": views}});
        let mut data = serde_json::to_value(spec(json!({})).data).unwrap();
        data["image"] = json!({"size": 8, "mean": [0.5], "std": [0.5], "augmentation": augmentation});
        changes["data"] = data;
        let plan = plan_of(&spec(changes));
        let noted = plan.notes.iter().find(|note| note.contains("frozen groups run")).cloned();
        (plan.stages[0].cost.cache_bytes / 512, noted)
    };
    let flips =
        json!({"random_resized_crop": null, "horizontal_flip": 0.5, "color_jitter": null, "random_erasing": null});
    assert_eq!(planned(json!(null), None), (200, None));
    let (samples, note) = planned(flips.clone(), Some(4));
    assert_eq!(samples, 4 * 160 + 40);
    assert!(note.unwrap().contains("in the first 4 epochs and cost nothing from epoch 5 on"));
    let (samples, note) = planned(flips, None);
    assert_eq!(samples, 40, "new views are not kept");
    assert!(note.unwrap().contains("prefix_cache.views"));
}

#[test]
fn warmup_may_be_a_share_and_class_weights_fit_the_classes() {
    let plan = plan_of(&spec(json!({"lr_scheduler": {"kind": "linear", "warmup_steps": null, "warmup_ratio": 0.1}})));
    let stage = &plan.stages[0];
    assert_eq!(stage.warmup_steps, (f64::from(stage.max_steps) * 0.1).round() as u32);
    let balanced = spec(json!({"class_weights": "balanced"}));
    let weights = class_weights(&balanced, &plan).unwrap();
    let counts = &plan.data.class_counts;
    let sum: f64 = weights.iter().zip(counts).map(|(weight, count)| weight * *count as f64).sum();
    assert!((sum - counts.iter().sum::<u64>() as f64).abs() < 1e-9, "the mean weight of a sample is one");
    assert_eq!(class_weights(&spec(json!({})), &plan), None);
    let wrong = spec(json!({"class_weights": {"given": [1.0]}}));
    let text = super::plan(&wrong, &graph(), &data()).unwrap_err().to_string();
    assert!(text.contains("class_weights.weights: has 1 weights"), "{text}");
}

#[test]
fn costs_follow_format_and_optimizer() {
    let stage = |changes| plan_of(&spec(changes)).stages[1].clone();
    let single = stage(json!({}));
    assert_eq!((single.trainable_parameters, single.all_reduce_bytes), (1036, 4144));
    // Eight samples at the head's backward: what three groups keep, what the boundary gives, the rise; the head's weights' gradients.
    let activations = 8 * (512 + 3 * 1000 + 300) + 40;
    // Gradients, in which they are summed, and two moments; the best weights with their moments.
    assert_eq!(single.memory_bytes, 4 * 11_036 + (3 + 3) * 4144 + activations);
    let mut other = spec(json!({}));
    (other.workers.min, other.workers.max) = (1, 1);
    // A trainer alone adds its two shards up in a copy.
    assert_eq!(plan_of(&other).stages[1].memory_bytes, 4 * 11_036 + (4 + 3) * 4144 + activations);
    assert!(!cost::gives_several_parts(&other));
    // MEM-5: it writes all of a checkpoint, weights and moments; two share that, unless the host gets a copy too.
    let (alone, hosted) = (plan_of(&other).stages[1].cost.save_bytes, single.cost.save_bytes);
    assert_eq!((alone, hosted), (3 * 4144, 3 * 4144));
    let mut apart = spec(json!({}));
    apart.checkpoint.host_snapshot_steps = Some(0);
    let shared = plan_of(&apart).stages[1].cost.save_bytes;
    assert!(shared < alone && 2 * shared >= alone, "{shared} of {alone}");
    (other.workers.max, other.logical_shards) = (2, 3);
    assert!(cost::gives_several_parts(&other), "the second one has shards 1 and 2, and the tree joins 0 and 1 first");
    let checkpointed = stage(json!({"activation_checkpointing": true}));
    assert_eq!(single.memory_bytes - checkpointed.memory_bytes, 8 * (2 * 1000 - 2 * 512));
    assert_eq!(stage(json!({"precision": "fp64"})).all_reduce_bytes, 8288);
    let halves = 8 * (512 + 3 * 1000 + 300) / 2 + 40;
    assert_eq!(stage(json!({"precision": "bf16"})).memory_bytes, 4 * 11_036 + 6 * 4144 + 2 * 11_036 + halves);
    let sgd = stage(json!({"optimizer": {"sgd": {"weight_decay": 0.0, "momentum": 0.0, "nesterov": false}}}));
    assert_eq!(sgd.memory_bytes, 4 * 11_036 + (1 + 1) * 4144 + activations);
}

/// Two trainers of eight samples each; the sixth layer, a pooling without weights, the head.
#[test]
fn work_4_a_step_is_forward_backward_sum_and_update() {
    let work = |changes| plan_of(&spec(changes)).stages[1].cost.work;
    let found = work(json!({}));
    let expected = StepWork {
        // Forward, backward, and the sums of two groups' gradients.
        operators: 3 * 10 + (15 + 20 + 20) + 2 * 2,
        flops: 8 * (2 * (4000 + 50 + 33) + (3 * 4000 + 4 * 50 + 4 * 33)),
        // With the boundary's 512 bytes, read and written.
        activation_bytes: 8 * (3 * 2000 + (2500 + 3000 + 3000) + 2 * 512),
        weight_bytes: 4 * 1036 + (7 * 1000 + 8 * 36) + 2 * 4144,
        update_operators: 4 * 2,
        // AdamW: the norm reads the gradient; weights and two moments are read and written, the gradient read.
        update_bytes: 8 * 4144,
    };
    assert_eq!(found, expected);
    let uncached = work(json!({"prefix_cache": {"mode": "off"}}));
    assert_eq!(uncached.flops - found.flops, 8 * 2 * (10 + 5 * 4000), "the frozen prefix runs in every step");
    let again = work(json!({"activation_checkpointing": true}));
    assert_eq!(again.flops - found.flops, 8 * 2 * (4000 + 50), "all but the head runs twice");
    let parts = work(json!({"gradient_accumulation_steps": 4}));
    assert_eq!((parts.flops, parts.operators), (found.flops, 4 * 85 + 4));
    let clipped = work(json!({"max_grad_norm": 1.0}));
    assert_eq!(clipped.update_bytes - found.update_bytes, 2 * 4144);
    let alone = work(json!({"workers": {"min": 1, "max": 1, "threads_per_trainer": 1}}));
    assert_eq!((alone.flops, alone.update_bytes), (2 * found.flops, found.update_bytes));
    // Two batches' weights; the second shard's gradient is put aside and added.
    assert_eq!(alone.weight_bytes, 2 * (4 * 1036 + 7 * 1000 + 8 * 36) + 5 * 4144);
    // A stage above what an earlier one trained has a prefix that no cache keeps.
    let stages = json!([stage_json("a", &["head", "encoder.layer.5"]), stage_json("b", &["head"])]);
    let plan = plan_of(&spec(json!({"strategy": "custom", "stages": stages})));
    assert_eq!(plan.stages[1].cost.work.flops, 8 * (2 * (10 + 6 * 4000 + 50 + 33) + 3 * 33));
}

/// SIZE-1, SIZE-2: the head over a cached prefix pays for the fewest, and more pay as the run thaws.
#[test]
fn size_2_stages_use_the_trainers_that_pay() {
    // Layers of BERT-base's size, texts of 64 tokens: 7 million weights each, and a head of a few thousand.
    let mut graph = graph();
    for group in graph.groups.iter_mut().filter(|group| group.name.starts_with("encoder")) {
        group.parameters = 7_000_000;
        let flops = 2 * 64 * 7_000_000;
        group.forward = Work { flops, bytes: 8_000_000, weight_bytes: 28_000_000, operators: 40 };
        group.backward = Work { flops: 2 * flops, bytes: 16_000_000, weight_bytes: 56_000_000, operators: 80 };
        group.lowest_backward = group.backward;
    }
    let data = DataFacts { shard_sizes: vec![10; 16], ..data() };
    let until = json!({"max_epochs": 400, "max_steps": null, "early_stopping": null});
    let base = json!({"logical_shards": 16, "global_batch_size": 64, "until": until});
    let sizes = |workers: serde_json::Value, changes: serde_json::Value| -> Vec<Option<u32>> {
        let mut all = base.as_object().unwrap().clone();
        all.extend([("workers".to_owned(), workers)]);
        all.extend(changes.as_object().unwrap().clone());
        plan(&spec(all.into()), &graph, &data).unwrap().stages.iter().map(|stage| stage.workers).collect()
    };
    let by_cost = |min: u32| json!({"min": min, "max": 16, "threads_per_trainer": 1, "sizing": "by_cost"});
    let found: Vec<u32> = sizes(by_cost(1), json!({})).into_iter().flatten().collect();
    assert_eq!(found.len(), 5);
    assert!(found.is_sorted() && found[0] < found[4], "{found:?}");
    let least: Vec<u32> = sizes(by_cost(12), json!({})).into_iter().flatten().collect();
    assert!(least.len() == 5 && least.iter().all(|size| (12..=16).contains(size)), "{least:?}");
    // Where no cache keeps the prefix, the head's steps are those of all layers' forward pass.
    let uncached = sizes(by_cost(1), json!({"prefix_cache": {"mode": "off"}}))[0].unwrap();
    assert!(uncached > found[0], "{uncached} of {found:?}");
    assert_eq!(sizes(json!({"min": 1, "max": 16, "threads_per_trainer": 1}), json!({})), [None; 5]);
    let mut stages = json!([stage_json("a", &["head"]), stage_json("b", &["head", "encoder.layer.5"])]);
    stages[0]["workers"] = json!(3);
    let custom = sizes(by_cost(1), json!({"strategy": "custom", "stages": stages}));
    assert_eq!(custom[0], Some(3), "it says so itself");
    assert!(custom[1].unwrap() > found[0], "{custom:?}");
}

/// Which moment is the fullest (MEM-3), and whose the best weights are by then (MEM-4).
#[test]
fn mem_3_and_4_follow_the_stage() {
    let of = |changes: serde_json::Value, stage: usize| plan_of(&spec(changes)).stages[stage].memory_bytes;
    let weights = 4 * 11_036;
    // The head, 36 weights: a chunk of 8 texts of 64 tokens through the prefix, and the boundaries of the later stages.
    let chunk = 8 * (64 * 24 + 600 + 4 * 512);
    assert_eq!(of(json!({}), 0), weights + (3 + 3) * 4 * 36 + chunk);
    let larger = json!({"prefix_cache": {"mode": "auto", "chunk_size": 32}});
    assert_eq!(of(larger, 0), weights + 6 * 4 * 36 + 4 * chunk);
    // Without a cache every batch has the prefix; an evaluation is the largest, with all its 20 samples' inputs.
    let off = json!({"prefix_cache": {"mode": "off"}});
    assert_eq!(of(off, 0), weights + 6 * 4 * 36 + 20 * (64 * 24 + 600));
    // A stage of one evaluation, at its end: a step has the best weights of the stage before, with their moments.
    let short = json!({"until": {"max_epochs": 1, "max_steps": null, "early_stopping": null}});
    let (two, three) = (1036 + 1000, 1036 + 3000);
    let step = 8 * (512 + 6 * 1000 + 300) + 40;
    assert_eq!(of(short.clone(), 3), weights + 4 * three * (3 + 1) + 4 * two * 2 + step);
    // Of several: its own.
    assert_eq!(of(json!({}), 3), weights + 4 * three * (3 + 1) + 4 * three * 2 + step);
    // Nothing restores the last stage's: no moments, neither of its own nor of the stage before.
    let all = 1036 + 5000;
    let deepest = 8 * (512 + 8 * 1000 + 300) + 40;
    assert_eq!(of(json!({}), 4), weights + 4 * all * (3 + 1) + deepest);
    assert_eq!(of(short, 4), of(json!({}), 4));
}

#[test]
fn length_and_schedule_follow_until() {
    let early = json!({"metric": "eval_loss", "patience": 2, "min_delta": 0.001});
    let only_early = plan_of(&spec(json!({"until": {"max_epochs": null, "max_steps": null, "early_stopping": early}})));
    assert_eq!((only_early.stages[0].max_steps, only_early.stages[0].schedule), (1000, LrSchedulerType::Constant));
    let shorter = plan_of(&spec(json!({"until": {"max_epochs": 3, "max_steps": 4, "early_stopping": null}})));
    assert_eq!((shorter.stages[0].max_steps, shorter.stages[0].warmup_steps), (4, 4));
}

fn stage_json(name: &str, thaw: &[&str]) -> serde_json::Value {
    json!({"name": name, "thaw": thaw, "learning_rate": null, "learning_rate_spread": null, "until": null, "on_enter": "restore_best", "lr_scheduler": null})
}

#[test]
fn custom_stages_name_groups() {
    let mut second = stage_json("b", &["/layer\\.[45]$/", "encoder.layer.5"]);
    second["learning_rate"] = json!(2e-4);
    let plan = plan_of(&spec(
        json!({"strategy": "custom", "rate_decay": {"spread": 16.0}, "stages": [stage_json("a", &["head"]), second]}),
    ));
    assert_eq!(groups(&plan, 1), ["encoder.layer.4", "encoder.layer.5"]);
    // Of two levels: the stage's highest group has its rate, the one below it a quarter.
    assert_eq!(plan.stages[1].learning_rates, [2e-4 / 4.0, 2e-4]);
    assert_eq!(plan.stages[1].thawed_groups, [GroupIndex(5), GroupIndex(6)]);
}

/// PLAN-1: several mistakes at once, each with its path.
#[test]
fn plan_1_every_mistake_is_reported() {
    let stages = json!([stage_json("a", &["encoder.layr.3", "head"]), stage_json("a", &["pooling", "/nothing/"])]);
    let found = mistakes(json!({"strategy": "custom", "stages": stages, "global_batch_size": 1}));
    let expected = [
        "global_batch_size: is 1, smaller than the 2 logical shards it is cut into",
        "stages[0].thaw[0]: `encoder.layr.3` names no layer group; did you mean `encoder.layer.3`?",
        "stages[1].name: `a` is the name of an earlier stage",
        "stages[1].thaw[0]: `pooling` names only layer groups without parameters",
    ];
    for (line, expected) in found.iter().zip(expected) {
        assert_eq!(line, expected);
    }
    assert!(found[4].starts_with("stages[1].thaw[1]: `/nothing/` names no layer group"), "{}", found[4]);
    assert_eq!(found.len(), 5);
}

#[test]
fn rates_out_of_range_are_refused() {
    assert!(mistakes(json!({"rate_decay": {"spread": 20_000.0}}))[0].starts_with("learning_rate_spread: is 20000"));
    assert!(
        mistakes(json!({"rate_decay": {"per_level": 0.01}}))[0].starts_with("layer_decay: is 0.01, so over 4 levels")
    );
    let mut stage = stage_json("a", &["head"]);
    stage["learning_rate_spread"] = json!(1e5);
    assert!(
        mistakes(json!({"strategy": "custom", "stages": [stage]}))[0].starts_with("stages[0].learning_rate_spread")
    );
}

#[test]
fn a_schedule_of_known_length_needs_one() {
    let early = json!({"metric": "eval_loss", "patience": 2, "min_delta": 0.001});
    let until = json!({"max_epochs": null, "max_steps": null, "early_stopping": early});
    let found = mistakes(json!({"until": until, "lr_scheduler": {"kind": "cosine", "warmup_steps": null}}));
    assert!(found.iter().all(|line| line.starts_with("lr_scheduler.type: needs a stage of known length")), "{found:?}");
    assert_eq!(found.len(), 1);
}

#[test]
fn data_that_cannot_be_trained_on_is_refused() {
    let mut facts = data();
    facts.classes.truncate(1);
    facts.summary.class_counts = vec![0];
    facts.summary.eval_samples = 0;
    facts.shard_sizes[1] = 0;
    let found: Vec<String> =
        plan(&spec(json!({})), &graph(), &facts).unwrap_err().0.iter().map(|mistake| mistake.path.clone()).collect();
    assert_eq!(found, ["data.train", "data.train", "data.eval", "logical_shards"]);
    let empty = GraphFacts { groups: Vec::new(), feature_size: 0, ..graph() };
    assert_eq!(plan(&spec(json!({})), &empty, &data()).unwrap_err().0.len(), 2);
}

proptest! {
    /// PLAN-2, PLAN-3 over random graphs.
    #[test]
    fn plan_2_plan_3_hold(costs in prop::collection::vec((0_u64..1_000_000, prop::bool::weighted(0.9)), 1..20), units in 1_u32..12) {
        let mut facts = graph();
        let head = facts.groups.pop().unwrap();
        let block = facts.groups[1].clone();
        facts.groups.truncate(1);
        for (index, (cost, trainable)) in costs.iter().enumerate() {
            facts.groups.push(GroupFacts { name: format!("b{index}"), forward_flops: *cost, parameters: if *trainable { 10 } else { 0 }, ..block.clone() });
        }
        facts.groups.push(head);
        let plan = plan(&spec(json!({"thaw_units": units})), &facts, &data()).unwrap();
        let trainable = costs.iter().filter(|(_, trainable)| *trainable).count();
        prop_assert_eq!(plan.stages.len(), 1 + trainable.min(units as usize));
        let mut thawed: Vec<GroupIndex> = plan.stages.iter().flat_map(|stage| stage.thawed_groups.clone()).collect();
        thawed.sort_unstable();
        prop_assert_eq!(&thawed, &plan.stages.last().unwrap().trainable_groups);
        prop_assert_eq!(thawed.len(), trainable + 1);
        for pair in plan.stages.windows(2) {
            prop_assert!(pair[1].trainable_groups.ends_with(&pair[0].trainable_groups));
            prop_assert!(pair[1].learning_rates.len() == pair[1].trainable_groups.len());
        }
    }
}
