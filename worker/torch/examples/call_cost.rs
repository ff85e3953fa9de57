//! Microseconds per operator: boxed through the dispatcher from Rust, and eagerly from Python; then a whole training step of a model.
//!
//! `cargo run -p thaw-torch --example call_cost [MODEL.pt2 BATCH]`; sizes are the graph's at export but for the batch.

#![expect(clippy::print_stdout, reason = "a benchmark reports on stdout")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use thaw_graph::Archive;
use thaw_graph::ir::Dim;
use thaw_torch::autograd::GradMode;
use thaw_torch::model::Options;
use thaw_torch::op::{self, Value};
use thaw_torch::tch::{Device, Kind, Tensor};
use thaw_torch::{Precision, SegmentedModel, executor, runtime};

type Failure = Box<dyn std::error::Error>;

const CALLS: u32 = 200_000;
const REPEATS: usize = 5;

const PYTHON: &str = "
import time, torch
torch.set_num_threads(1)
x = torch.ones(8); calls = 200000
def cost(body):
    best = 1e9
    for _ in range(5):
        start = time.process_time()
        for _ in range(calls): body()
        best = min(best, time.process_time() - start)
    return best / calls * 1e6
with torch.no_grad():
    print(f'python eager: add {cost(lambda: torch.add(x, x)):.3f}, view {cost(lambda: x.view(2, 4)):.3f} us')
";

fn main() -> Result<(), Failure> {
    runtime::set_num_threads(1)?;
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, path, batch] = &arguments[..] {
        return step_cost(Path::new(path), batch.parse()?);
    }
    let _mode = GradMode::set(false);
    let x = Tensor::ones([8], (Kind::Float, Device::Cpu));
    let add = op::resolve("aten::add", "Tensor")?;
    let view = op::resolve("aten::view", "")?;
    let sizes = view.constant(1, Value::Ints(&[2, 4]))?;
    let added = cost(|| add.call_tensor(&[Value::Tensor(&x), Value::Tensor(&x)]).map(drop))?;
    let viewed = cost(|| view.call_tensor(&[Value::Tensor(&x), Value::Constant(&sizes)]).map(drop))?;
    println!("boxed from Rust: add {added:.3}, view {viewed:.3} us");
    let unboxed = cost(|| x.f_add(&x).map(drop))?;
    println!("unboxed (tch): add {unboxed:.3} us");
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.venv/bin/python");
    if python.exists() {
        let output = Command::new(python).args(["-c", PYTHON]).output()?;
        print!("{}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

/// The least mean time of one call in microseconds.
fn cost<E>(mut body: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let mut best = f64::INFINITY;
    for _ in 0..REPEATS {
        let start = Instant::now();
        for _ in 0..CALLS {
            body()?;
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best / f64::from(CALLS) * 1e6)
}

/// Milliseconds of a training step with all groups thawed, and with the head only.
fn step_cost(path: &Path, batch: i64) -> Result<(), Failure> {
    let archive = Archive::open(path)?;
    let graph = thaw_graph::segment(&archive.graph()?, &[])?;
    let inputs: Vec<Tensor> =
        graph.graph.inputs.iter().map(|input| example(&graph.graph, input.value, batch)).collect();
    let mut source = |name: &str| {
        let payload = archive.payload(name)?;
        Ok((payload.dtype, payload.shape.clone(), archive.weight_bytes(name)?))
    };
    let mut model = SegmentedModel::new(graph, &mut source, Options::new(Precision::Fp32, Device::Cpu))?;
    let labels = Tensor::zeros([batch], (Kind::Int64, Device::Cpu));
    let groups = model.groups().len();
    for trainable in [(0..groups).collect::<Vec<_>>(), vec![groups - 1]] {
        model.set_trainable(&trainable)?;
        let mut best = f64::INFINITY;
        for _ in 0..REPEATS {
            let start = Instant::now();
            let _ = model.train_step(&inputs, &labels, 1.0, &mut |_, _| ())?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!("{} of {groups} groups trainable: {:.1} ms a step", trainable.len(), best * 1e3);
    }
    Ok(())
}

/// Zeros (ones for integers) of the graph's shape, free sizes: the batch first, then what they were at export.
fn example(graph: &thaw_graph::ir::Graph, value: thaw_graph::ir::ValueId, batch: i64) -> Tensor {
    let meta = graph.value(value).tensor.as_ref();
    let hinted = graph.hinted_shape(value).unwrap_or_default();
    let dims = meta.map(|meta| meta.shape.as_slice()).unwrap_or_default();
    let free = |(index, dim): (usize, &Dim)| match dim {
        Dim::Symbolic(_) if index == 0 => batch,
        _ => hinted[index],
    };
    let shape: Vec<i64> = dims.iter().enumerate().map(free).collect();
    let kind = meta.map_or(Kind::Float, |meta| executor::kind_of(meta.dtype));
    Tensor::ones(shape.as_slice(), (kind, Device::Cpu))
}
