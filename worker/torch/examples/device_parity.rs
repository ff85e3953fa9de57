//! How far training on one device is from training on the CPU: the same weights, batches and updates on both.
//!
//! `cargo run -p thaw-torch --example device_parity -- MODEL.pt2 [device=cuda] [batch=8] [steps=5] [precision=fp32] [within=1e-3]`.
//! The model must draw no noise (dropout off), since devices draw different ones. On a GPU set `NVIDIA_TF32_OVERRIDE=0`: else its products
//! keep ten bits.
//!
//! The last line is `parity forward=D gradient=D loss=D weights=D within=W`: of logits in evaluation, of the first step's gradients, of the losses of
//! all steps and of the weights after the last, each the norm of the difference over the norm. Ends with 1 where one is not within bounds.

#![expect(clippy::print_stdout, reason = "a benchmark reports on stdout")]

use std::collections::BTreeMap;
use std::process::ExitCode;

use thaw_graph::Archive;
use thaw_graph::ir::{DType, Dim};
use thaw_torch::model::Options;
use thaw_torch::optim::{AdamWSettings, AdamWState, Optimizers};
use thaw_torch::tch::{Device, Kind, Tensor};
use thaw_torch::{Precision, SegmentedModel, cuda, executor, runtime};

type Failure = Box<dyn std::error::Error>;

const ADAMW: AdamWSettings = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
const RATE: f64 = 1e-4;
const CLASSES: i64 = 5;

/// What training on one device gave, all on the CPU.
struct Found {
    logits: Tensor,
    gradients: Vec<Tensor>,
    losses: Vec<f64>,
    weights: Vec<Tensor>,
}

fn main() -> Result<ExitCode, Failure> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("usage: device_parity MODEL.pt2 [NAME=VALUE ...]")?;
    let mut given: BTreeMap<String, String> = BTreeMap::new();
    for argument in arguments {
        let (name, value) = argument.split_once('=').ok_or_else(|| format!("{argument}: expected NAME=VALUE"))?;
        given.insert(name.to_owned(), value.to_owned());
    }
    let mut take = |name: &str, default: &str| given.remove(name).unwrap_or_else(|| default.to_owned());
    let (device, batch, steps) = (take("device", "cuda"), take("batch", "8").parse()?, take("steps", "5").parse()?);
    let (precision, within) = (take("precision", "fp32"), take("within", "1e-3").parse::<f64>()?);
    if let Some(name) = given.keys().next() {
        return Err(format!("{name}: unknown; see the head of this file").into());
    }
    let precision = match precision.as_str() {
        "fp32" => Precision::Fp32,
        "fp64" => Precision::Fp64,
        other => return Err(format!("precision={other}: expected fp32 or fp64").into()),
    };
    let device = match device.as_str() {
        "cuda" => cuda::select(0)?,
        "cpu" => Device::Cpu,
        other => return Err(format!("device={other}: expected cuda or cpu").into()),
    };
    let reference = train(&path, precision, Device::Cpu, batch, steps)?;
    let other = train(&path, precision, device, batch, steps)?;
    let losses = |found: &Found| vec![Tensor::from_slice(&found.losses)];
    let distances = [
        distance(&[other.logits.shallow_clone()], &[reference.logits.shallow_clone()]),
        distance(&other.gradients, &reference.gradients),
        distance(&losses(&other), &losses(&reference)),
        distance(&other.weights, &reference.weights),
    ];
    let [forward, gradient, loss, weights] = distances;
    println!("losses on the CPU {:?}, on {device:?} {:?}", reference.losses, other.losses);
    println!(
        "parity forward={forward:.2e} gradient={gradient:.2e} loss={loss:.2e} weights={weights:.2e} within={within:e}"
    );
    // Also false for what is not a number.
    let fits = distances.iter().all(|distance| *distance <= within);
    Ok(if fits { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn train(path: &str, precision: Precision, device: Device, batch: i64, steps: usize) -> Result<Found, Failure> {
    let archive = Archive::open(path.as_ref())?;
    let graph = thaw_graph::segment(&archive.graph()?, &[])?;
    let mut source = |name: &str| {
        let payload = archive.payload(name)?;
        Ok((payload.dtype, payload.shape.clone(), archive.weight_bytes(name)?))
    };
    let mut model = SegmentedModel::new(graph, &mut source, Options::new(precision, device))?;
    model.set_trainable(&(0..model.groups().len()).collect::<Vec<_>>())?;
    let optimizers = Optimizers::resolve()?;
    let states = model.groups().iter().map(AdamWState::zeros_for).collect::<Result<Vec<_>, _>>();
    let mut states = states?;
    let logits = cpu(&model.forward(&inputs(&model, batch, 0)?)?)?;
    let (mut first, mut losses) = (Vec::new(), Vec::new());
    for step in 0..steps {
        let labels = Tensor::from_slice(&(0..batch).map(|row| (row * 7 + 3) % CLASSES).collect::<Vec<i64>>());
        let mut gradients = BTreeMap::new();
        let output = model.train_step(&inputs(&model, batch, step)?, &labels, 1.0, &mut |group, gradient| {
            gradients.insert(group, gradient.shallow_clone());
        })?;
        losses.push(output.loss.f_double_value(&[])?);
        if step == 0 {
            first = gradients.values().map(cpu).collect::<Result<Vec<_>, _>>()?;
        }
        for (group, gradient) in &gradients {
            optimizers.adamw(&ADAMW, RATE, &model.groups()[*group], gradient, &mut states[*group])?;
        }
    }
    let weights = model.groups().iter().map(|group| cpu(&group.flat)).collect::<Result<Vec<_>, _>>()?;
    Ok(Found { logits, gradients: first, losses, weights })
}

fn cpu(tensor: &Tensor) -> Result<Tensor, Failure> {
    // A copy: the gradient's buffer is written again.
    Ok(tensor.f_detach()?.f_to_device_(Device::Cpu, Kind::Double, false, true)?)
}

/// The norm of the difference of two lists of tensors, over the norm of the second.
fn distance(found: &[Tensor], expected: &[Tensor]) -> f64 {
    let square = |tensor: &Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
    let apart: f64 = found.iter().zip(expected).map(|(found, expected)| square(&(found - expected))).sum();
    let size: f64 = expected.iter().map(square).sum();
    (apart / size.max(f64::MIN_POSITIVE)).sqrt()
}

/// A batch drawn on the CPU, the same for a step on every device: noise, token ids below 1000, then ones (masks).
fn inputs(model: &SegmentedModel, batch: i64, step: usize) -> Result<Vec<Tensor>, Failure> {
    runtime::manual_seed(11 + u64::try_from(step)?)?;
    let graph = &model.graph().graph;
    let mut made = Vec::new();
    for input in &graph.inputs {
        let hinted = graph.hinted_shape(input.value).unwrap_or_default();
        let meta = graph.value(input.value).tensor.as_ref();
        let dims = meta.map(|meta| meta.shape.as_slice()).unwrap_or_default();
        let size = |(index, dim): (usize, &Dim)| match dim {
            Dim::Symbolic(_) if index == 0 => batch,
            Dim::Symbolic(_) | Dim::Known(_) => hinted[index],
        };
        let shape: Vec<i64> = dims.iter().enumerate().map(size).collect();
        let dtype = meta.map_or(DType::Float32, |meta| meta.dtype);
        let options = (executor::kind_of(dtype), Device::Cpu);
        made.push(if dtype.is_float() {
            Tensor::f_randn(shape.as_slice(), options)?
        } else if made.is_empty() {
            Tensor::f_randint(1000, shape.as_slice(), options)?
        } else {
            Tensor::f_ones(shape.as_slice(), options)?
        });
    }
    Ok(made)
}
