//! Small graphs built by hand, against autograd over the same operators in one piece.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Builder, Weights, same_bits};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use thaw_graph::ir::{Arg, DType, IntArg, ValueId};
use thaw_graph::segment::SegmentedGraph;
use thaw_torch::model::{BatchNorm, Error, Options};
use thaw_torch::optim::{AdamWSettings, AdamWState, Optimizers};
use thaw_torch::tch::{Device, Kind, Reduction, Tensor};
use thaw_torch::{Precision, SegmentedModel, runtime};

fn load(graph: &SegmentedGraph, weights: &Weights, precision: Precision) -> SegmentedModel {
    let options = Options::new(precision, Device::Cpu);
    SegmentedModel::new(graph.clone(), &mut |name| weights.read(name), options).unwrap()
}

/// A group's flat gradient cut up into the shapes of its parameters.
fn by_name(model: &SegmentedModel, group: usize, flat: &Tensor) -> Vec<(String, Tensor)> {
    let parameters = &model.groups()[group].parameters;
    let part = |offset: usize, elements: usize| {
        flat.narrow(0, i64::try_from(offset).unwrap(), i64::try_from(elements).unwrap())
    };
    parameters
        .iter()
        .map(|place| (place.name.clone(), part(place.offset, place.elements).view(place.shape.as_slice()).copy()))
        .collect()
}

/// Gradients of a step by parameter name, and the order in which groups came.
fn gradients(
    model: &mut SegmentedModel,
    inputs: &[Tensor],
    labels: &Tensor,
    weight: f64,
) -> (Vec<(String, Tensor)>, Vec<usize>, Tensor) {
    let mut flats = Vec::new();
    let output = model.train_step(inputs, labels, weight, &mut |group, flat| flats.push((group, flat.copy()))).unwrap();
    let order = flats.iter().map(|(group, _)| *group).collect();
    let named = flats.iter().flat_map(|(group, flat)| by_name(model, *group, flat)).collect();
    (named, order, output.loss)
}

fn batch() -> (Tensor, Tensor) {
    (Tensor::randn([5, 4], (Kind::Float, Device::Cpu)), Tensor::from_slice(&[0_i64, 1, 2, 1, 0]))
}

/// relu_ writes to a value that crossed the cut below; the segment above reads that value again.
fn in_place_over_a_cut() -> SegmentedGraph {
    let mut builder = Builder::new();
    let x = builder.input("x", DType::Float32, &[5, 4]);
    builder.segment("low", &[]);
    let (w, b) = (builder.parameter("low.weight", &[6, 4]), builder.parameter("low.bias", &[6]));
    let h = builder.linear(x, w, b);
    builder.outputs(&[h]);
    builder.segment("middle", &[h]);
    let (w, b) = (builder.parameter("middle.weight", &[6, 6]), builder.parameter("middle.bias", &[6]));
    let relu = builder.node("aten::relu_", "", vec![("self", Arg::Tensor(h))]);
    let m = builder.linear(relu, w, b);
    builder.outputs(&[h, m]);
    builder.segment("head", &[h, m]);
    let (w, b) = (builder.parameter("head.weight", &[3, 6]), builder.parameter("head.bias", &[3]));
    let sum = builder.node("aten::add", "Tensor", vec![("self", Arg::Tensor(m)), ("other", Arg::Tensor(h))]);
    let logits = builder.linear(sum, w, b);
    builder.outputs(&[logits]);
    builder.finish(logits)
}

/// Whoever watches sees that a batch gets on within it: at each of 5 operators (linear, relu_, linear, add, linear), then at each backward.
#[test]
fn a_batch_beats_at_each_operator_and_each_backward() {
    let graph = in_place_over_a_cut();
    let mut model = load(&graph, &Weights::random(&graph.graph), Precision::Fp32);
    let beats = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&beats);
    model.set_beat(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let taken = || beats.swap(0, Ordering::Relaxed);
    let (x, labels) = batch();
    let _logits = model.forward(&[x.shallow_clone()]).unwrap();
    let forward = taken();
    assert!(forward >= 5, "{forward}");
    model.set_trainable(&[1, 2]).unwrap();
    let _found = gradients(&mut model, &[x], &labels, 1.0);
    assert_eq!(taken(), forward + 2, "two segments have a backward");
}

#[test]
fn segments_equal_one_backward_pass() {
    let graph = in_place_over_a_cut();
    let weights = Weights::random(&graph.graph);
    let (x, labels) = batch();
    let names = ["low.weight", "low.bias", "middle.weight", "middle.bias", "head.weight", "head.bias"];
    let leaves: Vec<Tensor> = names.iter().map(|name| weights.leaf(name)).collect();
    let hidden = x.linear(&leaves[0], Some(&leaves[1])).relu();
    let logits = (hidden.linear(&leaves[2], Some(&leaves[3])) + &hidden).linear(&leaves[4], Some(&leaves[5]));
    let loss = logits.cross_entropy_loss::<Tensor>(&labels, None, Reduction::Mean, -100, 0.0);
    (&loss * 0.37).backward();

    let mut model = load(&graph, &weights, Precision::Fp32);
    let given = x.copy();
    assert!(same_bits(&model.forward(&[given.shallow_clone()]).unwrap(), &logits));
    model.set_trainable(&[0, 1, 2]).unwrap();
    let (found, order, found_loss) = gradients(&mut model, &[given.shallow_clone()], &labels, 0.37);
    assert_eq!(order, [2, 1, 0]);
    assert!(same_bits(&found_loss, &loss.detach()));
    for (name, gradient) in &found {
        let place = names.iter().position(|other| other == name).unwrap();
        assert!(same_bits(gradient, &leaves[place].grad()), "{name}");
    }
    assert!(same_bits(&given, &x), "the batch was written to");

    // Frozen groups are absent; a frozen one between two trainable ones still passes the gradient on.
    model.set_trainable(&[0, 2]).unwrap();
    let (found, order, _) = gradients(&mut model, &[x.shallow_clone()], &labels, 0.37);
    assert_eq!(order, [2, 0]);
    assert!(found.iter().all(|(name, _)| !name.starts_with("middle")));
    let place = found.iter().position(|(name, _)| name == "low.weight").unwrap();
    assert!(same_bits(&found[place].1, &leaves[0].grad()));

    model.set_trainable(&[]).unwrap();
    let error = model.train_step(&[x], &labels, 1.0, &mut |_, _| ()).unwrap_err();
    assert!(matches!(error, Error::NothingTrainable));
}

/// The embedding of the first segment is the weight of the last; both belong to the head.
#[test]
fn a_tied_parameter_waits_for_its_lowest_reader() {
    let mut builder = Builder::new();
    let ids = builder.input("ids", DType::Int64, &[5]);
    builder.segment("low", &[]);
    let weight = ValueId(2);
    let bias = builder.parameter("low.bias", &[4]);
    builder.graph.values.push(thaw_graph::ir::Value { name: "tied".to_owned(), tensor: None });
    let embedded =
        builder.node("aten::embedding", "", vec![("weight", Arg::Tensor(weight)), ("indices", Arg::Tensor(ids))]);
    let sum = builder.node("aten::add", "Tensor", vec![("self", Arg::Tensor(embedded)), ("other", Arg::Tensor(bias))]);
    builder.outputs(&[sum]);
    builder.segment("head", &[sum]);
    let logits = builder.node("aten::linear", "", vec![("input", Arg::Tensor(sum)), ("weight", Arg::Tensor(weight))]);
    builder.outputs(&[logits]);
    builder.graph.parameters.push(thaw_graph::ir::Weight {
        value: weight,
        name: "tied".to_owned(),
        dtype: DType::Float32,
        shape: vec![7, 4],
        flag: true,
    });
    builder.segments[1].parameters.push(1);
    let graph = builder.finish(logits);
    let weights = Weights::random(&graph.graph);
    let (ids, labels) = (Tensor::from_slice(&[1_i64, 6, 6, 0, 3]), Tensor::from_slice(&[0_i64, 1, 2, 6, 0]));

    let (tied, bias) = (weights.leaf("tied"), weights.leaf("low.bias"));
    let logits = (Tensor::embedding(&tied, &ids, -1, false, false) + &bias).linear::<Tensor>(&tied, None);
    let loss = logits.cross_entropy_loss::<Tensor>(&labels, None, Reduction::Mean, -100, 0.0);
    loss.backward();

    let mut model = load(&graph, &weights, Precision::Fp32);
    model.set_trainable(&[0, 1]).unwrap();
    let (found, order, _) = gradients(&mut model, &[ids.shallow_clone()], &labels, 1.0);
    assert_eq!(order, [1, 0]);
    assert!(same_bits(&found[0].1, &tied.grad()));
    assert!(same_bits(&found[1].1, &bias.grad()));
    // With the embedding's segment below the boundary, only the head's use counts.
    model.set_trainable(&[1]).unwrap();
    let (found, order, _) = gradients(&mut model, &[ids], &labels, 1.0);
    assert_eq!(order, [1]);
    assert!(!same_bits(&found[0].1, &tied.grad()));
}

/// linear, batch norm with its counter, dropout, stochastic depth; then a linear head. Sizes come from integer arithmetic.
fn switches() -> SegmentedGraph {
    let mut builder = Builder::new();
    let x = builder.input("x", DType::Float32, &[5, 4]);
    let size = builder.node("aten::sym_size", "int", vec![("self", Arg::Tensor(x)), ("dim", Arg::Int(0))]);
    let doubled = builder.node("python::mul", "", vec![("a", Arg::SymInt(size)), ("b", Arg::Int(2))]);
    let halved = builder.node("python::floordiv", "", vec![("a", Arg::SymInt(doubled)), ("b", Arg::Int(2))]);
    builder.segment("low", &[]);
    let (w, b) = (builder.parameter("w", &[6, 4]), builder.parameter("b", &[6]));
    let (scale, shift) = (builder.parameter("bn.weight", &[6]), builder.parameter("bn.bias", &[6]));
    let mean = builder.buffer("bn.running_mean", DType::Float32, &[6]);
    let variance = builder.buffer("bn.running_var", DType::Float32, &[6]);
    let counter = builder.buffer("bn.num_batches_tracked", DType::Int64, &[]);
    let h = builder.linear(x, w, b);
    builder.node("aten::add_", "Tensor", vec![("self", Arg::Tensor(counter)), ("other", Arg::Int(1))]);
    let arguments = vec![
        ("input", Arg::Tensor(h)),
        ("weight", Arg::Tensor(scale)),
        ("bias", Arg::Tensor(shift)),
        ("running_mean", Arg::Tensor(mean)),
        ("running_var", Arg::Tensor(variance)),
        ("training", Arg::Bool(true)),
        ("momentum", Arg::Float(0.1)),
        ("eps", Arg::Float(1e-5)),
        ("cudnn_enabled", Arg::Bool(false)),
    ];
    let h = builder.node("aten::batch_norm", "", arguments);
    let h = builder.node(
        "aten::dropout",
        "",
        vec![("input", Arg::Tensor(h)), ("p", Arg::Float(0.5)), ("train", Arg::Bool(true))],
    );
    let sizes = vec![IntArg::Value(halved), IntArg::Known(1)];
    let noise = builder.node("aten::new_empty", "", vec![("self", Arg::Tensor(h)), ("size", Arg::Ints(sizes))]);
    let noise = builder.node("aten::bernoulli_", "float", vec![("self", Arg::Tensor(noise)), ("p", Arg::Float(0.8))]);
    builder.node("aten::div_", "Scalar", vec![("self", Arg::Tensor(noise)), ("other", Arg::Float(0.8))]);
    let h = builder.node("aten::mul", "Tensor", vec![("self", Arg::Tensor(h)), ("other", Arg::Tensor(noise))]);
    builder.outputs(&[h]);
    builder.segment("head", &[h]);
    let (w, b) = (builder.parameter("head.weight", &[3, 6]), builder.parameter("head.bias", &[3]));
    let logits = builder.linear(h, w, b);
    builder.outputs(&[logits]);
    builder.finish(logits)
}

fn buffer(model: &SegmentedModel, name: &str) -> Tensor {
    let (_, tensor) = model.groups()[0].buffers.iter().find(|(other, _)| other == name).unwrap();
    tensor.copy()
}

#[test]
fn frozen_groups_and_evaluation_are_deterministic_and_leave_statistics_alone() {
    let graph = switches();
    let weights = Weights::random(&graph.graph);
    let (x, labels) = batch();
    let mut model = load(&graph, &weights, Precision::Fp32);
    let hidden = x.linear(&weights.0["w"], Some(&weights.0["b"]));
    let (mean, variance) = (&weights.0["bn.running_mean"], &weights.0["bn.running_var"]);
    let normal = hidden.batch_norm(
        Some(&weights.0["bn.weight"]),
        Some(&weights.0["bn.bias"]),
        Some(mean),
        Some(variance),
        false,
        0.1,
        1e-5,
        false,
    );
    let expected = normal.linear(&weights.0["head.weight"], Some(&weights.0["head.bias"]));
    for _ in 0..3 {
        assert!(same_bits(&model.forward(&[x.shallow_clone()]).unwrap(), &expected));
    }
    model.set_trainable(&[1]).unwrap();
    let (first, ..) = gradients(&mut model, &[x.shallow_clone()], &labels, 1.0);
    let (second, ..) = gradients(&mut model, &[x.shallow_clone()], &labels, 1.0);
    assert!(first.iter().zip(&second).all(|(left, right)| same_bits(&left.1, &right.1)));
    assert!(same_bits(&buffer(&model, "bn.running_mean"), mean));
    assert_eq!(buffer(&model, "bn.num_batches_tracked").int64_value(&[]), 0);

    model.set_trainable(&[0, 1]).unwrap();
    model.set_batch_norm(BatchNorm::FrozenStatistics);
    runtime::manual_seed(1).unwrap();
    let (first, ..) = gradients(&mut model, &[x.shallow_clone()], &labels, 1.0);
    let (second, ..) = gradients(&mut model, &[x.shallow_clone()], &labels, 1.0);
    assert!(!same_bits(&first[0].1, &second[0].1), "dropout draws anew");
    assert!(same_bits(&buffer(&model, "bn.running_var"), variance));
    model.set_batch_norm(BatchNorm::BatchStatistics);
    let _ = gradients(&mut model, &[x.shallow_clone()], &labels, 1.0);
    assert!(!same_bits(&buffer(&model, "bn.running_mean"), mean));
    assert_eq!(buffer(&model, "bn.num_batches_tracked").int64_value(&[]), 1);

    let before = buffer(&model, "bn.running_mean");
    model.observe(&[x.shallow_clone()], &[1]).unwrap();
    assert!(same_bits(&buffer(&model, "bn.running_mean"), &before), "statistics of a group that is not observed");
    model.observe(&[x.shallow_clone()], &[0]).unwrap();
    let moved = before * 0.9 + hidden.mean_dim(0, false, Kind::Float) * 0.1;
    assert!(buffer(&model, "bn.running_mean").allclose(&moved, 1e-5, 1e-6, false));
}

#[test]
fn state_goes_out_and_comes_back() {
    let graph = switches();
    let weights = Weights::random(&graph.graph);
    let (x, labels) = batch();
    let mut model = load(&graph, &weights, Precision::Fp32);
    let before = model.state(0).unwrap();
    assert_eq!(before.len(), 7);
    let logits = model.forward(&[x.shallow_clone()]).unwrap();
    model.set_trainable(&[0, 1]).unwrap();
    let _ = model.train_step(&[x.shallow_clone()], &labels, 1.0, &mut |_, _| ()).unwrap();
    // An update of the flat buffer moves the parameters.
    let _ = model.groups()[0].flat.shallow_clone().g_add_scalar_(0.5);
    assert!(!same_bits(&model.forward(&[x.shallow_clone()]).unwrap(), &logits));
    model.load_state(0, &before).unwrap();
    assert_eq!(model.state(0).unwrap(), before);
    assert!(same_bits(&model.forward(&[x]).unwrap(), &logits));
    let error = model.load_state(0, &before[1..]).unwrap_err();
    assert!(matches!(error, Error::StateMissing { .. }), "{error}");
}

#[test]
fn other_precisions_run_and_come_close() {
    let graph = in_place_over_a_cut();
    let weights = Weights::random(&graph.graph);
    let (x, labels) = batch();
    let mut exact = load(&graph, &weights, Precision::Fp32);
    exact.set_trainable(&[0, 1, 2]).unwrap();
    let (reference, _, loss) = gradients(&mut exact, &[x.shallow_clone()], &labels, 1.0);
    for (precision, kind, tolerance) in [(Precision::Bf16, Kind::Float, 0.05), (Precision::Fp64, Kind::Double, 1e-5)] {
        let mut model = load(&graph, &weights, precision);
        model.set_trainable(&[0, 1, 2]).unwrap();
        let (found, _, found_loss) = gradients(&mut model, &[x.shallow_clone()], &labels, 1.0);
        assert_eq!(found_loss.kind(), kind);
        assert!((found_loss.double_value(&[]) - loss.double_value(&[])).abs() < tolerance);
        for ((_, left), (name, right)) in found.iter().zip(&reference) {
            assert_eq!(left.kind(), kind);
            assert!(
                common::relative_difference(&left.to_kind(Kind::Float), right) < tolerance,
                "{name} in {precision:?}"
            );
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let mut graph = in_place_over_a_cut();
    let weights = Weights::random(&graph.graph);
    let mut model = load(&graph, &weights, Precision::Fp32);
    let wrong = Tensor::zeros([5, 9], (Kind::Float, Device::Cpu));
    assert!(matches!(model.forward(&[wrong]).unwrap_err(), Error::Batch(_)));
    let wrong = Tensor::zeros([5, 4], (Kind::Int64, Device::Cpu));
    assert!(matches!(model.forward(&[wrong]).unwrap_err(), Error::Input { .. }));
    assert!(matches!(model.set_trainable(&[3]).unwrap_err(), Error::NoSuchGroup { .. }));

    graph.graph.nodes[0].operator = "custom::one".to_owned();
    graph.graph.nodes[1].operator = "custom::two".to_owned();
    let options = Options::new(Precision::Fp32, Device::Cpu);
    let error = SegmentedModel::new(graph, &mut |name| weights.read(name), options).unwrap_err().to_string();
    assert!(error.contains("custom::one, custom::two"), "{error}");
}

/// relu(x) + scale, where the scale is full([6], 2) * 3: made of nothing. With `write`, a layer writes to it.
fn with_a_constant(write: bool) -> SegmentedGraph {
    let mut builder = Builder::new();
    let x = builder.input("x", DType::Float32, &[5, 4]);
    let size = Arg::Ints(vec![IntArg::Known(6)]);
    let full = builder.node("aten::full", "", vec![("size", size), ("fill_value", Arg::Float(2.0))]);
    let scale = builder.node("aten::mul", "Scalar", vec![("self", Arg::Tensor(full)), ("other", Arg::Float(3.0))]);
    builder.segment("low", &[]);
    let (w, b) = (builder.parameter("low.weight", &[6, 4]), builder.parameter("low.bias", &[6]));
    let h = builder.linear(x, w, b);
    builder.outputs(&[h]);
    builder.segment("head", &[h]);
    let (w, b) = (builder.parameter("head.weight", &[3, 6]), builder.parameter("head.bias", &[3]));
    let scale = if write {
        builder.node("aten::add_", "Scalar", vec![("self", Arg::Tensor(scale)), ("other", Arg::Float(1.0))])
    } else {
        scale
    };
    let sum = builder.node("aten::add", "Tensor", vec![("self", Arg::Tensor(h)), ("other", Arg::Tensor(scale))]);
    let output = builder.linear(sum, w, b);
    builder.outputs(&[output]);
    builder.finish(output)
}

#[test]
fn what_depends_on_nothing_is_computed_once_unless_it_is_written_to() {
    for (write, added) in [(false, 6.0), (true, 7.0)] {
        let graph = with_a_constant(write);
        let weights = Weights::random(&graph.graph);
        let mut model = load(&graph, &weights, Precision::Fp32);
        let (x, _) = batch();
        let low = x.linear(&weights.leaf("low.weight"), Some(&weights.leaf("low.bias"))) + added;
        let expected = low.linear(&weights.leaf("head.weight"), Some(&weights.leaf("head.bias"))).detach();
        // Twice: what is kept between batches must not change.
        for _ in 0..2 {
            assert!(same_bits(&model.forward(&[x.shallow_clone()]).unwrap(), &expected), "write: {write}");
        }
    }
}

#[test]
fn kept_copies_in_bf16_follow_the_weights() {
    let graph = in_place_over_a_cut();
    let weights = Weights::random(&graph.graph);
    let mut model = load(&graph, &weights, Precision::Bf16);
    model.set_trainable(&[0, 1, 2]).unwrap();
    let (x, labels) = batch();
    let inputs = [x];
    let before = model.forward(&inputs).unwrap();
    let optimizers = Optimizers::resolve().unwrap();
    let settings = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
    let mut flats = Vec::new();
    let _ =
        model.train_step(&inputs, &labels, 1.0, &mut |group, flat| flats.push((group, flat.shallow_clone()))).unwrap();
    for (group, flat) in &flats {
        let group = &model.groups()[*group];
        optimizers.adamw(&settings, 0.1, group, flat, &mut AdamWState::zeros_for(group).unwrap()).unwrap();
    }
    let after = model.forward(&inputs).unwrap();
    assert!(!same_bits(&after, &before));
    // A model that has kept nothing, with the updated weights.
    let mut fresh = load(&graph, &weights, Precision::Bf16);
    for group in 0..3 {
        fresh.load_state(group, &model.state(group).unwrap()).unwrap();
    }
    assert!(same_bits(&fresh.forward(&inputs).unwrap(), &after));
    // Memory written without libtorch counts as well.
    let mut flat = model.groups()[0].flat.shallow_clone();
    runtime::with_slice_f32_mut(&mut flat, |values| values.fill(0.5)).unwrap();
    assert!(!same_bits(&model.forward(&inputs).unwrap(), &after));
}
