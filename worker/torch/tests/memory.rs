//! What a training step holds, counted by the process's own allocator.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Builder, Weights, alone, same_bits};
use thaw_graph::Activations;
use thaw_graph::ir::{Arg, DType};
use thaw_graph::segment::SegmentedGraph;
use thaw_torch::model::Options;
use thaw_torch::tch::{Device, Kind, Tensor};
use thaw_torch::{Precision, SegmentedModel, runtime};

const ROWS: i64 = 1024;
const WIDTH: i64 = 64;
const SEGMENTS: usize = 6;
const LAYERS: usize = 4;

/// Segments of four layers each, with dropout, over 256 KiB of activations a layer.
fn deep() -> SegmentedGraph {
    let mut builder = Builder::new();
    let mut value = builder.input("x", DType::Float32, &[ROWS, WIDTH]);
    for segment in 0..SEGMENTS {
        builder.segment(&format!("s{segment}"), &if segment == 0 { vec![] } else { vec![value] });
        for layer in 0..LAYERS {
            let weight = builder.parameter(&format!("s{segment}.{layer}.weight"), &[WIDTH, WIDTH]);
            let bias = builder.parameter(&format!("s{segment}.{layer}.bias"), &[WIDTH]);
            let linear = builder.linear(value, weight, bias);
            let tanh = builder.node("aten::tanh", "", vec![("self", Arg::Tensor(linear))]);
            let dropout = vec![("input", Arg::Tensor(tanh)), ("p", Arg::Float(0.1)), ("train", Arg::Bool(true))];
            value = builder.node("aten::dropout", "", dropout);
            for result in [linear, tanh, value] {
                builder.shaped(result, DType::Float32, &[ROWS, WIDTH]);
            }
        }
        builder.outputs(&[value]);
    }
    builder.finish(value)
}

/// The most that a backward pass holds, going down from each segment.
fn planned(groups: &[Activations]) -> u64 {
    let kept = |top: usize| groups[..=top].iter().map(|group| group.saved).sum::<u64>();
    let most = (0..groups.len()).map(|top| kept(top) + groups[top].rise).max().unwrap();
    most * u64::try_from(ROWS).unwrap()
}

/// The most that a step holds beyond what was there before it, and its gradients.
fn step(model: &mut SegmentedModel, x: &Tensor, labels: &Tensor) -> (u64, Vec<Tensor>) {
    runtime::manual_seed(5).unwrap();
    let before = runtime::memory_use(true).now;
    let mut flats = Vec::new();
    let _ =
        model.train_step(&[x.shallow_clone()], labels, 1.0, &mut |_, flat| flats.push(flat.shallow_clone())).unwrap();
    let peak = runtime::memory_use(true).peak - before;
    (peak, flats.iter().map(Tensor::copy).collect())
}

#[test]
fn checkpointing_holds_one_segments_activations_and_gives_the_same_gradients() {
    let _alone = alone();
    assert!(runtime::keep_memory());
    runtime::set_num_threads(1).unwrap();
    let graph = deep();
    let activations = thaw_graph::activations(&graph, None);
    let weights = Weights::random(&graph.graph);
    let options = Options::new(Precision::Fp32, Device::Cpu);
    let mut model = SegmentedModel::new(graph, &mut |name| weights.read(name), options).unwrap();
    model.set_trainable(&(0..SEGMENTS).collect::<Vec<_>>()).unwrap();
    let x = Tensor::randn([ROWS, WIDTH], (Kind::Float, Device::Cpu));
    let labels = Tensor::zeros([ROWS], (Kind::Int64, Device::Cpu));
    let (whole, expected) = step(&mut model, &x, &labels);
    let planned = planned(&activations);
    let ratio = whole as f64 / planned as f64;
    assert!((ratio - 1.0).abs() < 0.05, "a step holds {whole} bytes, {planned} by the graph");
    model.set_activation_checkpointing(true);
    let (checkpointed, found) = step(&mut model, &x, &labels);
    assert!(found.iter().zip(&expected).all(|(left, right)| same_bits(left, right)));
    assert!(expected.iter().all(|gradient| gradient.abs().max().double_value(&[]) > 0.0));
    // Two whole tensors a layer are kept for backward; of five segments only the inputs remain.
    let activation = u64::try_from(ROWS * WIDTH * 4).unwrap();
    let saved = u64::try_from((SEGMENTS - 2) * (2 * LAYERS - 1)).unwrap() * activation;
    assert!(whole >= checkpointed + saved, "{whole} bytes without, {checkpointed} with checkpoints");
}

#[test]
fn touched_memory_is_nobodys() {
    let _alone = alone();
    assert!(runtime::keep_memory());
    let _ = runtime::memory_use(true);
    let most = 512 << 20;
    runtime::touch_memory(most);
    assert!(runtime::memory_use(false).peak < most, "what was touched is not counted");
    let held = Tensor::ones([64 << 20], (Kind::Float, Device::Cpu));
    assert_eq!(held.sum(Kind::Double).double_value(&[]), f64::from(64 << 20));
    assert!(runtime::memory_use(false).now >= 256 << 20);
}
