//! One small run for the tests of every module, as the first version would have stored it: embeddings, six layers, a head; 200 samples in two shards.

use crate::planner::{DataFacts, GraphFacts, GroupFacts, Work, plan};
use crate::prefix::SampleSize;
use serde_json::{Value, json};
use thaw_proto::plan::{DataSummary, Plan};
use thaw_proto::run::{Evaluation, Position};
use thaw_proto::spec::RunSpec;

/// The spec with the given top-level fields in place of the usual ones.
pub(crate) fn spec(changes: Value) -> RunSpec {
    let mut spec = json!({
        "name": "demo",
        "backbone": {
            "graph": "file:///models/m.pt2",
            "head": {"attach": "auto", "hidden_sizes": [], "dropout": 0.0, "batch_norm": false},
            "layer_groups": [],
        },
        "data": {
            "train": {"path": "file:///data/d.csv", "format": "csv", "text": "text", "label": "label", "tokenizer": null},
            "eval": null, "test": null,
            "split": {"train": 0.8, "eval": 0.1, "test": 0.1, "stratified": true},
            "max_length": 128, "image": null,
        },
        "strategy": "gradual_unfreezing",
        "global_batch_size": 16,
        "precision": "fp32",
        "learning_rate": 1e-3,
        "rate_decay": {"spread": null},
        "until": {"max_epochs": 3, "max_steps": null, "early_stopping": null},
        "workers": {"min": 1, "max": 2, "threads_per_trainer": 1},
        "checkpoint": {"url": null, "save_steps": 200, "save_total_limit": 3},
        "seed": 7,
        "optimizer": {"adam_w": {"weight_decay": 0.01, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}},
        "lr_scheduler": {"kind": null, "warmup_steps": null},
        "max_grad_norm": null,
        "logical_shards": 2,
        "stages": [],
        "thaw_units": 4,
        "stop_when_no_gain": true,
        "frozen_batch_norm": "frozen",
        "thaw_embeddings": false,
        "eval_steps": null,
        "logging_steps": 10,
        "head_rate_after_thaw": 0.5,
        "verification": {"digest_steps": null, "trace": false},
    });
    let Value::Object(changes) = changes else { panic!("changes are an object") };
    spec.as_object_mut().unwrap().extend(changes);
    serde_json::from_value(spec).unwrap()
}

pub(crate) fn graph() -> GraphFacts {
    let group = |name: &str, parameters, forward_flops, embedding| GroupFacts {
        name: name.to_owned(),
        parameters,
        decay_parameters: parameters,
        buffers: 0,
        forward_flops,
        embedding,
        boundary_bytes_per_sample: 512,
        saved_bytes_per_sample: 1000,
        rise_bytes_per_sample: 300,
        alive_bytes_per_sample: 600,
        weight_gradient_bytes: 40,
        forward: Work { flops: 2 * forward_flops, bytes: 2000, weight_bytes: 4 * parameters, operators: 10 },
        backward: Work { flops: 4 * forward_flops, bytes: 3000, weight_bytes: 8 * parameters, operators: 20 },
        lowest_backward: Work { flops: 3 * forward_flops, bytes: 2500, weight_bytes: 7 * parameters, operators: 15 },
    };
    let mut groups = vec![group("embeddings", 5000, 10, true)];
    groups.extend((0..6).map(|layer| group(&format!("encoder.layer.{layer}"), 1000, 4000, false)));
    groups.push(group("pooling", 0, 50, false));
    groups.push(group("head", 36, 33, false));
    GraphFacts { groups, feature_size: 11, convolutional: false, sample: SampleSize::Tokens(64) }
}

pub(crate) fn data() -> DataFacts {
    DataFacts {
        classes: ["a", "b", "c"].map(str::to_owned).to_vec(),
        summary: DataSummary {
            train_samples: 160,
            eval_samples: 20,
            test_samples: 20,
            class_counts: vec![70, 70, 60],
            fingerprint: "f".repeat(64),
        },
        shard_sizes: vec![80, 80],
    }
}

pub(crate) fn plan_of(spec: &RunSpec) -> Plan {
    match plan(spec, &graph(), &data()) {
        Ok(plan) => plan,
        Err(violations) => panic!("{violations}"),
    }
}

pub(crate) fn evaluation(loss: f64) -> Evaluation {
    Evaluation { position: Position::default(), loss, accuracy: 0.5, macro_f1: 0.5, samples: 20, confusion: vec![0; 9] }
}

/// One part of what others compute (`tests/reference/rates.py`).
pub(crate) fn reference(part: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(include_str!("../fixtures/rates.json")).unwrap();
    all[part].as_array().unwrap().clone()
}
