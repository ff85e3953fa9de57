//! Exported models, run and differentiated by Thaw, against the eager model in PyTorch: the same libtorch, one thread, so bit for bit.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{alone, join, python_reference, read_safetensors, relative_difference, same_bits, text};
use thaw_graph::Archive;
use thaw_torch::model::Options;
use thaw_torch::tch::{Device, Tensor};
use thaw_torch::{MemoryFormat, Precision, SegmentedModel, runtime};

/// The script seeds its scenarios with this.
const SCENARIO_SEED: u64 = 9;

fn load(folder: &Path, options: Options) -> SegmentedModel {
    let archive = Archive::open(&join(folder, "model.pt2")).unwrap();
    let graph = thaw_graph::segment(&archive.graph().unwrap(), &[]).unwrap();
    let mut source = |name: &str| {
        let payload = archive.payload(name)?;
        Ok((payload.dtype, payload.shape.clone(), archive.weight_bytes(name)?))
    };
    SegmentedModel::new(graph, &mut source, options).unwrap()
}

/// Attention must be one operator: libtorch picks its kernel by it.
fn assert_attention_is_whole(folder: &Path, model_name: &str) {
    if !matches!(model_name, "minilm" | "vit_b_16" | "vit_tiny") {
        return;
    }
    let graph = Archive::open(&join(folder, "model.pt2")).unwrap().graph().unwrap();
    let uses = |operator: &str| graph.nodes.iter().any(|node| node.operator == operator);
    assert!(uses("aten::scaled_dot_product_attention"), "{model_name}");
    assert!(!uses("aten::softmax") && !uses("aten::_softmax") && !uses("aten::bmm"), "{model_name}");
}

/// Per scenario: how many groups from the head down are trainable, given as a predicate on parameter names that the script knows as a
/// regular expression.
struct Scenario {
    pattern: &'static str,
    trainable: fn(&str) -> bool,
}

fn all(_: &str) -> bool {
    true
}

fn compare(model_name: &str, precision: Precision, scenarios: &[Scenario]) {
    compare_in(model_name, precision, MemoryFormat::Contiguous, scenarios);
}

fn compare_in(model_name: &str, precision: Precision, memory_format: MemoryFormat, scenarios: &[Scenario]) {
    let _alone = alone();
    runtime::set_num_threads(1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let dtype = match precision {
        Precision::Fp32 => "fp32",
        Precision::Fp64 => "fp64",
        Precision::Bf16 => "bf16",
    };
    let format = if memory_format == MemoryFormat::ChannelsLast { "channels_last" } else { "contiguous" };
    let mut arguments = vec!["model", model_name, text(folder.path()), dtype, format];
    arguments.extend(scenarios.iter().map(|scenario| scenario.pattern));
    if !python_reference(&arguments) {
        return;
    }
    assert_attention_is_whole(folder.path(), model_name);
    let expected = read_safetensors(&join(folder.path(), "expected.safetensors"));
    let mut model = load(folder.path(), Options { precision, device: Device::Cpu, memory_format });
    let inputs: Vec<Tensor> =
        (0..).map_while(|index| expected.get(&format!("input/{index}"))).map(Tensor::shallow_clone).collect();
    assert_same(&model.forward(&inputs).unwrap(), &expected["eval/logits"], "logits");
    let states: Vec<_> = (0..model.groups().len()).map(|group| model.state(group).unwrap()).collect();
    let both = [false, true].into_iter().flat_map(|checkpointing| {
        scenarios.iter().enumerate().map(move |(index, scenario)| (index, scenario, checkpointing))
    });
    for (index, scenario, checkpointing) in both {
        model.set_activation_checkpointing(checkpointing);
        for (group, state) in states.iter().enumerate() {
            model.load_state(group, state).unwrap();
        }
        let groups = trainable_groups(&model, scenario);
        model.set_trainable(&groups).unwrap();
        runtime::manual_seed(SCENARIO_SEED).unwrap();
        let mut flats = BTreeMap::new();
        let output = model.train_step(&inputs, &expected["labels"], 1.0, &mut |group, flat| {
            flats.insert(group, flat.copy());
        });
        assert_same(&output.unwrap().loss, &expected[&format!("{index}/loss")], "loss");
        assert_eq!(flats.keys().copied().collect::<Vec<_>>(), groups);
        let prefix = format!("{index}/grad/");
        let mut compared = 0;
        for (group, flat) in &flats {
            for place in &model.groups()[*group].parameters {
                let name = format!("{prefix}{}", place.name);
                assert_same(&place.view(flat).unwrap(), &expected[&name], &name);
                compared += 1;
            }
        }
        // A parameter that the output does not depend on (a text encoder's pooler) is in no group.
        let wanted = expected
            .iter()
            .filter(|(name, gradient)| name.starts_with(&prefix) && gradient.abs().max().double_value(&[]) > 0.0);
        assert!(compared >= wanted.count(), "only {compared} gradients in the scenario `{}`", scenario.pattern);
        for (name, buffer) in model.groups().iter().flat_map(|group| &group.buffers) {
            if let Some(wanted) = expected.get(&format!("{index}/buffer/{name}")) {
                assert_same(buffer, wanted, name);
            }
        }
    }
}

/// The groups of which the scenario trains any parameter; it must train all of them.
fn trainable_groups(model: &SegmentedModel, scenario: &Scenario) -> Vec<usize> {
    let groups = model.groups().iter().enumerate();
    let trained = groups.filter(|(_, group)| group.parameters.iter().any(|place| (scenario.trainable)(&place.name)));
    let mut found = Vec::new();
    for (index, group) in trained {
        assert!(
            group.parameters.iter().all(|place| (scenario.trainable)(&place.name)),
            "{} cuts {}",
            scenario.pattern,
            group.name
        );
        found.push(index);
    }
    found
}

fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}");
    assert!(same_bits(found, expected), "{what} differs by {:e} relative", relative_difference(found, expected));
}

#[test]
fn resnet18() {
    let upper = Scenario {
        pattern: r"^(layer4|fc)\.",
        trainable: |name| name.starts_with("layer4.") || name.starts_with("fc."),
    };
    let head = Scenario { pattern: r"^fc\.", trainable: |name| name.starts_with("fc.") };
    compare("resnet18", Precision::Fp32, &[Scenario { pattern: "", trainable: all }, upper, head]);
}

#[test]
fn resnet18_in_double_precision() {
    compare("resnet18", Precision::Fp64, &[Scenario { pattern: "", trainable: all }]);
}

#[test]
fn resnet18_with_channels_last() {
    let upper = Scenario {
        pattern: r"^(layer4|fc)\.",
        trainable: |name| name.starts_with("layer4.") || name.starts_with("fc."),
    };
    let scenarios = [Scenario { pattern: "", trainable: all }, upper];
    compare_in("resnet18", Precision::Fp32, MemoryFormat::ChannelsLast, &scenarios);
}

#[test]
fn resnet18_in_mixed_precision() {
    let upper = Scenario {
        pattern: r"^(layer4|fc)\.",
        trainable: |name| name.starts_with("layer4.") || name.starts_with("fc."),
    };
    let scenarios = [Scenario { pattern: "", trainable: all }, upper];
    compare_in("resnet18", Precision::Bf16, MemoryFormat::ChannelsLast, &scenarios);
}

#[test]
fn minilm_in_mixed_precision() {
    compare("minilm", Precision::Bf16, &[Scenario { pattern: "", trainable: all }]);
}

#[test]
fn convnext_with_channels_last() {
    compare_in("convnext", Precision::Fp32, MemoryFormat::ChannelsLast, &[Scenario { pattern: "", trainable: all }]);
}

#[test]
fn vision_transformer_of_torchvision() {
    compare("vit_b_16", Precision::Fp32, &[Scenario { pattern: "", trainable: all }]);
}

#[test]
fn vision_transformer_of_timm() {
    let upper = Scenario {
        pattern: r"^(blocks\.3|norm|head)\.",
        trainable: |name| ["blocks.3.", "norm.", "head."].iter().any(|prefix| name.starts_with(prefix)),
    };
    compare("vit_tiny", Precision::Fp32, &[Scenario { pattern: "", trainable: all }, upper]);
}

#[test]
fn stochastic_depth_of_convnext() {
    let upper = Scenario {
        pattern: r"^(classifier|features\.7)\.",
        trainable: |name| name.starts_with("classifier.") || name.starts_with("features.7."),
    };
    compare("convnext", Precision::Fp32, &[Scenario { pattern: "", trainable: all }, upper]);
}

#[test]
fn minilm_with_dropout() {
    let upper = Scenario {
        pattern: r"^(head|model\.encoder\.layer\.[45])\.",
        trainable: |name| {
            ["head.", "model.encoder.layer.4.", "model.encoder.layer.5."].iter().any(|prefix| name.starts_with(prefix))
        },
    };
    let head = Scenario { pattern: r"^head\.", trainable: |name| name.starts_with("head.") };
    compare("minilm", Precision::Fp32, &[Scenario { pattern: "", trainable: all }, upper, head]);
}
