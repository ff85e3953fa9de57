//! Exported models end to end: reading, groups, cuts, heads and writing back, the last judged by Python.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use thaw_graph::ir::{Arg, Graph, ValueId};
use thaw_graph::{
    Archive, Attach, GroupRule, HeadSpec, Init, SegmentedGraph, TensorBytes, guards, operators, segment, summary,
};

fn open(name: &str) -> Option<Archive> {
    Some(Archive::open(&common::fixtures()?.join(format!("{name}.pt2"))).unwrap())
}

fn names(graph: &SegmentedGraph) -> Vec<&str> {
    graph.segments.iter().map(|segment| segment.name.as_str()).collect()
}

fn value_names<'a>(graph: &'a Graph, values: &[ValueId]) -> Vec<&'a str> {
    values.iter().map(|value| graph.value(*value).name.as_str()).collect()
}

fn head(classes: usize) -> HeadSpec {
    HeadSpec { attach: Attach::Auto, hidden_sizes: Vec::new(), dropout: 0.0, batch_norm: false, classes }
}

/// Segments follow node order, read nothing that is not below them or in the prologue, and pass on what they say.
fn check_laws(graph: &SegmentedGraph) {
    let mut known: BTreeSet<ValueId> = graph.graph.inputs.iter().map(|input| input.value).collect();
    known.extend(graph.graph.buffers.iter().chain(&graph.graph.constants).map(|weight| weight.value));
    for id in &graph.prologue {
        let node = graph.graph.node(*id);
        assert!(
            node.reads().iter().all(|value| known.contains(value)),
            "prologue node {} reads a parameter",
            node.name
        );
        known.extend(node.makes());
    }
    let mut last = None;
    for (index, segment) in graph.segments.iter().enumerate() {
        let below = index.checked_sub(1).map(|below| graph.segments[below].outputs.clone()).unwrap_or_default();
        assert_eq!(segment.inputs, below, "what enters {} is what left below", segment.name);
        let mut visible = known.clone();
        visible.extend(&segment.inputs);
        visible.extend(segment.parameters.iter().map(|&index| graph.graph.parameters[index].value));
        // A tied parameter is owned by a higher group.
        visible.extend(graph.graph.parameters.iter().map(|weight| weight.value));
        for id in &segment.nodes {
            assert!(last < Some(*id), "segments follow node order");
            last = Some(*id);
            let node = graph.graph.node(*id);
            for value in node.reads() {
                assert!(visible.contains(&value), "{} reads {} from nowhere", node.name, graph.graph.value(value).name);
            }
            visible.extend(node.makes());
        }
        assert!(segment.outputs.iter().all(|value| visible.contains(value)));
    }
    assert_eq!(graph.segments.last().unwrap().outputs, [graph.graph.output]);
}

#[test]
fn a_convolution_network_is_cut_between_its_blocks() {
    let Some(archive) = open("convolutions") else { return };
    let graph = segment(&archive.graph().unwrap(), &[]).unwrap();
    check_laws(&graph);
    assert_eq!(names(&graph), ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "head"]);
    assert!(graph.segments.iter().all(|segment| segment.outputs.len() == 1));
    assert!(graph.prologue.is_empty());
    assert_eq!(archive.extra("thaw.json").unwrap().unwrap(), br#"{"name": "convolutions"}"#);
    assert_eq!(archive.extra("tokenizer.json").unwrap(), None);
    let facts = summary(&graph, archive.fingerprint().unwrap());
    assert!(facts.convolutional);
    assert_eq!((facts.feature_size, facts.max_length), (16, None));
    assert_eq!(facts.inputs[0].shape, [None, Some(3), Some(8), Some(8)]);
    let stem = &facts.groups[0];
    assert_eq!((stem.parameters, stem.decay_parameters, stem.buffers), (3 * 8 * 9 + 16, 3 * 8 * 9, 17));
    // The convolution's multiply-adds, then 5 an element for the norm and 1 for the activation.
    assert_eq!(stem.forward_flops, 2 * 8 * 64 * 27 + 6 * 8 * 64);
    assert_eq!(stem.boundary_bytes_per_sample, 8 * 64 * 4);
    assert_eq!(facts.groups[5].parameters, 170);
    assert_eq!(facts.groups[5].forward_flops, 320);
}

#[test]
fn a_text_encoder_has_masks_in_its_prologue_and_loses_its_pooler() {
    let Some(archive) = open("text") else { return };
    let graph = segment(&archive.graph().unwrap(), &[]).unwrap();
    check_laws(&graph);
    assert_eq!(names(&graph), ["stem", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]);
    assert!(graph.segments.iter().all(|segment| segment.outputs.len() == 1));
    assert!(graph.prologue.len() >= 5);
    assert!(
        graph
            .graph
            .notes
            .contains(&"the parameter pooler.weight does not reach the output and is kept as it is".to_owned())
    );
    assert!(!graph.graph.nodes.iter().any(|node| node.module == "pooler"));
    let facts = summary(&graph, String::new());
    assert!(!facts.convolutional);
    assert_eq!((facts.feature_size, facts.max_length), (8, Some(16)));
    assert_eq!(facts.groups.iter().map(|group| group.embedding).collect::<Vec<_>>(), [true, false, false, false]);
}

#[test]
fn batches_are_checked_against_the_exported_sizes() {
    let Some(archive) = open("text") else { return };
    let graph = archive.graph().unwrap();
    let bind = |ids: [i64; 2], mask: [i64; 2]| guards::bind(&graph, &[ids.to_vec(), mask.to_vec()]);
    assert!(bind([1, 16], [1, 16]).is_ok(), "a last batch may hold one sample");
    assert!(matches!(bind([4, 17], [4, 17]), Err(guards::Error::Range { .. })));
    assert!(matches!(bind([4, 9], [4, 8]), Err(guards::Error::Size { .. })));
    assert!(matches!(guards::bind(&graph, &[vec![4, 9]]), Err(guards::Error::InputCount { .. })));
    assert!(matches!(guards::bind(&graph, &[vec![4], vec![4]]), Err(guards::Error::Rank { .. })));
}

#[test]
fn writes_into_memory_from_below_run_out_of_place() {
    let Some(archive) = open("writing") else { return };
    let graph = segment(&archive.graph().unwrap(), &[]).unwrap();
    check_laws(&graph);
    assert_eq!(names(&graph), ["blocks.0", "blocks.1", "blocks.2", "head"]);
    for group in &graph.segments[1..3] {
        let first = graph.graph.node(group.nodes[0]);
        assert_eq!(first.operator, "aten::relu", "{}", group.name);
        assert_eq!(first.tensor("self"), Some(group.inputs[0]));
    }
    assert!(
        graph.graph.nodes.iter().any(|node| operators::is_in_place(&node.operator)),
        "the first write stays in place"
    );
}

#[test]
fn tied_parameters_are_one_and_belong_to_the_group_nearest_the_head() {
    let Some(archive) = open("tied") else { return };
    let graph = segment(&archive.graph().unwrap(), &[]).unwrap();
    check_laws(&graph);
    let parameters: Vec<&str> = graph.graph.parameters.iter().map(|weight| weight.name.as_str()).collect();
    assert_eq!(parameters, ["words.weight", "middle.weight", "middle.bias"]);
    assert_eq!(graph.segments.last().unwrap().parameters, [0]);
    assert!(
        graph
            .graph
            .notes
            .iter()
            .any(|note| note == "the parameter lm_head.weight is tied to words.weight and is trained under that name")
    );
    assert!(
        graph.graph.notes.iter().any(|note| note.contains("words.weight is used by stem and head")),
        "{:?}",
        graph.graph.notes
    );
    let error = archive.with_head(&head(3)).unwrap_err().to_string();
    assert!(error.contains("other layers use that weight too"), "{error}");
}

#[test]
fn a_region_without_gradients_is_inlined_and_detached() {
    let Some(archive) = open("region") else { return };
    let graph = archive.graph().unwrap();
    assert!(graph.nodes.iter().any(|node| node.operator == "aten::detach"));
    assert!(graph.nodes.iter().any(|node| node.operator == "python::mul"));
    check_laws(&segment(&graph, &[]).unwrap());
}

#[test]
fn what_cannot_run_is_refused_by_name() {
    let Some(folder) = common::fixtures() else { return };
    let refused = |name: &str| {
        let error = Archive::open(&folder.join(name)).and_then(|archive| archive.graph()).unwrap_err();
        let mut text = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    };
    assert!(refused("checkpoint.pt2").contains("checkpoint written by torch.save"));
    assert!(refused("pickle.pt2").contains("Python pickle"));
    assert!(refused("script.pt2").contains("TorchScript"));
    assert!(refused("branches.pt2").contains("the control flow operator `cond`"));
    assert!(refused("missing.pt2").contains("cannot read the model archive"));
}

#[test]
fn rules_replace_the_automatic_groups() {
    let Some(archive) = open("convolutions") else { return };
    let graph = archive.graph().unwrap();
    let rule = |name: &str, pattern: &str| GroupRule { name: name.to_owned(), pattern: pattern.to_owned() };
    let cut = segment(&graph, &[rule("low", "^layer1"), rule("high", r"^layer2\.")]).unwrap();
    check_laws(&cut);
    assert_eq!(names(&cut), ["stem", "low", "high", "head"]);
    let error = |rules: &[GroupRule]| {
        let error = segment(&graph, rules).unwrap_err();
        std::error::Error::source(&error).map(ToString::to_string).unwrap()
    };
    assert!(error(&[rule("a", "^layer2"), rule("b", "^layer1")]).contains("list groups from the input to the output"));
    assert!(
        error(&[rule("a", "layr2.0.conv1")]).contains("the nearest name is `layer2"),
        "{}",
        error(&[rule("a", "layr2.0.conv1")])
    );
    assert!(error(&[rule("a", "(")]).contains("not a regular expression"));
    assert!(error(&[rule("a", "^layer1"), rule("a", "^layer2")]).contains("two layer groups are called `a`"));
}

#[test]
fn every_parameter_has_a_rule_to_begin_with() {
    let Some(archive) = open("convolutions") else { return };
    let graph = archive.graph().unwrap();
    let rules = thaw_graph::scratch_init(&graph);
    let rule = |name: &str| rules[graph.parameters.iter().position(|weight| weight.name == name).unwrap()].1;
    assert_eq!(rule("layer1.0.conv1.weight"), Init::LinearWeight { fan_in: 72 });
    assert_eq!(rule("layer2.0.downsample.bias"), Init::LinearBias { fan_in: 8 });
    assert_eq!((rule("bn1.weight"), rule("bn1.bias")), (Init::Ones, Init::Zeros));
    assert_eq!(thaw_graph::buffer_init(&graph).len(), graph.buffers.len());
    let Some(text) = open("text") else { return };
    let graph = text.graph().unwrap();
    assert_eq!(thaw_graph::scratch_init(&graph)[0].1, Init::Normal { std: 0.02 });
}

/// Values for a new head that make the logits 0, 1, 2, ...: matrices at zero, vectors counting up.
fn counting(archive: &Archive, name: &str) -> Option<TensorBytes> {
    let new = archive.new_parameters().iter().find(|new| new.name == name)?;
    let count: i64 = new.shape.iter().product();
    let value = |index: i64| match (new.shape.len(), new.init) {
        (1, Init::Ones) => 1.0,
        (1, _) => index as f32,
        _ => 0.0_f32,
    };
    let bytes = if new.shape.is_empty() {
        vec![0; 8]
    } else {
        (0..count).flat_map(|index| value(index).to_le_bytes()).collect()
    };
    Some((new.dtype, new.shape.clone(), bytes))
}

#[test]
fn python_loads_what_is_written() {
    let Some(folder) = common::fixtures() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut checks = Vec::new();
    for name in ["convolutions", "text", "tied", "region"] {
        std::fs::copy(folder.join(format!("{name}.pt2")), scratch.path().join(format!("{name}.pt2"))).unwrap();
        let archive = Archive::open(&folder.join(format!("{name}.pt2"))).unwrap();
        // Half of the tensors go through their bytes and back, the others are copied.
        let values = |tensor: &str| {
            let payload = archive.payload(tensor).unwrap();
            tensor
                .ends_with("weight")
                .then(|| (payload.dtype, payload.shape.clone(), archive.weight_bytes(tensor).unwrap()))
        };
        archive.write(&scratch.path().join(format!("{name}-same.pt2")), values).unwrap();
        checks.push(format!("{name}-same"));
    }
    let mlp = HeadSpec { hidden_sizes: vec![6], dropout: 0.5, batch_norm: true, ..head(7) };
    let dropout = HeadSpec { dropout: 0.25, ..head(7) };
    let heads = [("linear", head(7)), ("mlp", mlp), ("dropout", dropout)];
    for model in ["convolutions", "text"] {
        let archive = Archive::open(&folder.join(format!("{model}.pt2"))).unwrap();
        for (kind, spec) in &heads {
            let headed = archive.with_head(spec).unwrap();
            let cut = segment(&headed.graph().unwrap(), &[]).unwrap();
            check_laws(&cut);
            assert_eq!(names(&cut).last(), Some(&"head"));
            assert_eq!(cut.segments.len(), names(&cut).len());
            check_head(&headed, &cut, model, kind);
            let file = scratch.path().join(format!("{model}-{kind}.pt2"));
            headed.write(&file, |name| counting(&headed, name)).unwrap();
            check_rewritten(&file, &headed);
            checks.push(format!("{model}-{kind}"));
        }
    }
    let mut arguments = vec!["check", scratch.path().to_str().unwrap()];
    arguments.extend(checks.iter().map(String::as_str));
    common::python(&arguments);
}

fn check_head(headed: &Archive, cut: &SegmentedGraph, model: &str, kind: &str) {
    let own: Vec<&str> = cut
        .segments
        .last()
        .unwrap()
        .parameters
        .iter()
        .map(|&index| cut.graph.parameters[index].name.as_str())
        .collect();
    let new: BTreeSet<&str> =
        headed.new_parameters().iter().filter(|new| !new.is_buffer).map(|new| new.name.as_str()).collect();
    assert_eq!(own.iter().copied().collect::<BTreeSet<_>>(), new, "the head group is the new head and nothing else");
    let prefix = if model == "convolutions" { "fc" } else { "head" };
    let expected = if kind == "mlp" { format!("{prefix}.4.weight") } else { format!("{prefix}.weight") };
    assert!(new.contains(expected.as_str()), "{new:?}");
    let size = summary(cut, String::new()).feature_size;
    assert_eq!(size, if model == "convolutions" { 16 } else { 8 });
}

/// What was written opens again, with the new tensors stored and the backbone's unchanged.
fn check_rewritten(file: &Path, headed: &Archive) {
    let again = Archive::open(file).unwrap();
    assert!(again.new_parameters().is_empty());
    assert_eq!(again.graph().unwrap(), headed.graph().unwrap());
    let old: BTreeSet<&String> = headed.payloads().keys().collect();
    assert_eq!(again.payloads().keys().collect::<BTreeSet<_>>(), old);
    for name in old.into_iter().filter(|name| !headed.new_parameters().iter().any(|new| new.name == **name)) {
        assert_eq!(again.weight_bytes(name).unwrap(), headed.weight_bytes(name).unwrap(), "{name}");
    }
    assert_eq!(again.extra("thaw.json").unwrap(), headed.extra("thaw.json").unwrap());
}

#[test]
fn values_of_the_wrong_form_are_refused() {
    let Some(archive) = open("convolutions") else { return };
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("out.pt2");
    let (dtype, shape) = (archive.payload("fc.bias").unwrap().dtype, vec![10]);
    let write = |archive: &Archive, values: TensorBytes| {
        archive.write(&file, |name| (name == "fc.bias").then(|| values.clone())).unwrap_err().to_string()
    };
    assert!(write(&archive, (dtype, vec![9], vec![0; 36])).contains("the archive holds Float32 [10]"));
    assert!(write(&archive, (dtype, shape.clone(), vec![0; 36])).contains("36 bytes and the tensor takes 40"));
    let headed = archive.with_head(&head(3)).unwrap();
    assert!(headed.write(&file, |_| None).unwrap_err().to_string().contains("give every new parameter its bytes"));
    assert!(headed.weight_bytes("fc.weight").unwrap_err().to_string().contains("is not in"));
    assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "nothing is left behind");
}

#[test]
fn names_of_inner_values_are_those_of_the_archive() {
    let Some(archive) = open("convolutions") else { return };
    let graph = segment(&archive.graph().unwrap(), &[]).unwrap();
    assert_eq!(value_names(&graph.graph, &graph.segments.last().unwrap().inputs), ["flatten"]);
    let linear = graph.graph.node(*graph.segments.last().unwrap().nodes.last().unwrap());
    assert!(matches!(linear.argument("weight"), Some(Arg::Tensor(_))));
}
