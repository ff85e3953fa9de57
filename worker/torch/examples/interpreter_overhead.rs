//! Times a forward of an exported model on a batch of one: what the interpreter costs beside PyTorch eager.
//!
//! `cargo run -p thaw-torch --example interpreter_overhead -- MODEL.pt2 [FORWARDS]` prints one JSON line: seconds, and the operators run.
//! `make bench ONLY=interpreter_overhead` gives it a model of 300 small operators.

#![expect(clippy::print_stdout, reason = "a benchmark reports on stdout")]

use std::path::Path;
use std::time::Instant;

use thaw_graph::Archive;
use thaw_graph::ir::{DType, Dim};
use thaw_torch::model::Options;
use thaw_torch::tch::{Device, Tensor};
use thaw_torch::{Precision, SegmentedModel, executor, runtime};

type Failure = Box<dyn std::error::Error>;

const WARM: usize = 50;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("usage: interpreter_overhead MODEL.pt2 [FORWARDS]")?;
    let forwards: usize = arguments.get(1).map_or(Ok(1000), |count| count.parse())?;
    runtime::set_num_threads(1)?;
    let _kept = runtime::keep_memory();
    let archive = Archive::open(Path::new(path))?;
    let graph = thaw_graph::segment(&archive.graph()?, &[])?;
    let mut source = |name: &str| {
        let payload = archive.payload(name)?;
        Ok((payload.dtype, payload.shape.clone(), archive.weight_bytes(name)?))
    };
    let mut model = SegmentedModel::new(graph, &mut source, Options::new(Precision::Fp32, Device::Cpu))?;
    let graph = &model.graph().graph;
    let operators = graph.nodes.len();
    let inputs: Vec<Tensor> = graph
        .inputs
        .iter()
        .map(|input| {
            let meta = graph.value(input.value).tensor.as_ref();
            let dims = meta.map(|meta| meta.shape.as_slice()).unwrap_or_default();
            let hinted = graph.hinted_shape(input.value).unwrap_or_default();
            let size = |(index, dim): (usize, &Dim)| if matches!(dim, Dim::Symbolic(_)) { 1 } else { hinted[index] };
            let shape: Vec<i64> = dims.iter().enumerate().map(size).collect();
            let kind = executor::kind_of(meta.map_or(DType::Float32, |meta| meta.dtype));
            Tensor::ones(shape.as_slice(), (kind, Device::Cpu))
        })
        .collect();
    let mut seconds = Vec::with_capacity(forwards);
    for forward in 0..WARM + forwards {
        let started = Instant::now();
        let logits = model.forward(&inputs)?;
        if forward >= WARM {
            seconds.push(started.elapsed().as_secs_f64());
        }
        drop(logits);
    }
    seconds.sort_by(f64::total_cmp);
    let (median, least) = (seconds[seconds.len() / 2], seconds[0]);
    println!("{{\"operators\": {operators}, \"median\": {median:e}, \"least\": {least:e}}}");
    Ok(())
}
