//! Seconds of a training step (forward, backward, update), as a trainer makes it, without the cluster around it.
//!
//! `cargo run -p thaw-torch --example step_time -- MODEL.pt2 [NAME=VALUE ...]`, where NAME is one of
//! `batch` (32), `length` (tokens; the export's), `precision` (fp32 | bf16 | fp64), `format` (automatic | contiguous |
//! channels_last), `strategy` (all | head | last:N), `steps` (10), `warm`
//! (3), `threads` (1), `keep_memory` (true), `checkpointing` (false), `device` (cpu | cuda: the first GPU). `tests/benches/step_peer.py` exports the models and times the same step in PyTorch.
//!
//! The last line is `step wall_median=S wall_min=S cpu_min=S forward=S backward=S norm=S update=S`: the parts are medians; CPU is this thread's.

#![expect(clippy::print_stdout, reason = "a benchmark reports on stdout")]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use thaw_graph::Archive;
use thaw_graph::ir::{DType, Dim, Graph, ValueId};
use thaw_torch::model::Options;
use thaw_torch::optim::{self, AdamWSettings, AdamWState, Optimizers};
use thaw_torch::tch::{Cuda, Device, Kind, Tensor};
use thaw_torch::{MemoryFormat, Precision, SegmentedModel, cuda, executor, runtime};

type Failure = Box<dyn std::error::Error>;

const ADAMW: AdamWSettings = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
const RATE: f64 = 1e-5;
const CLASSES: i64 = 8;

struct Settings {
    model: PathBuf,
    batch: i64,
    length: Option<i64>,
    precision: Precision,
    format: MemoryFormat,
    strategy: String,
    steps: usize,
    warm: usize,
    threads: usize,
    keep_memory: bool,
    checkpointing: bool,
    device: Device,
}

impl Settings {
    fn parse() -> Result<Self, Failure> {
        let mut arguments = std::env::args().skip(1);
        let model = arguments.next().ok_or("usage: step_time MODEL.pt2 [NAME=VALUE ...]")?.into();
        let mut settings = Self {
            model,
            batch: 32,
            length: None,
            precision: Precision::Fp32,
            format: MemoryFormat::Automatic,
            strategy: "all".to_owned(),
            steps: 10,
            warm: 3,
            threads: 1,
            keep_memory: true,
            checkpointing: false,
            device: Device::Cpu,
        };
        for argument in arguments {
            let (name, value) = argument.split_once('=').ok_or_else(|| format!("{argument}: expected NAME=VALUE"))?;
            match name {
                "batch" => settings.batch = value.parse()?,
                "length" => settings.length = Some(value.parse()?),
                "precision" => {
                    settings.precision = match value {
                        "fp32" => Precision::Fp32,
                        "bf16" => Precision::Bf16,
                        "fp64" => Precision::Fp64,
                        _ => return Err(format!("precision={value}: expected fp32, bf16 or fp64").into()),
                    }
                }
                "strategy" => value.clone_into(&mut settings.strategy),
                "format" => {
                    settings.format = match value {
                        "contiguous" => MemoryFormat::Contiguous,
                        "channels_last" => MemoryFormat::ChannelsLast,
                        "automatic" => MemoryFormat::Automatic,
                        _ => {
                            return Err(
                                format!("format={value}: expected contiguous, channels_last or automatic").into()
                            );
                        }
                    }
                }
                "steps" => settings.steps = value.parse()?,
                "warm" => settings.warm = value.parse()?,
                "threads" => settings.threads = value.parse()?,
                "checkpointing" => settings.checkpointing = value.parse()?,
                "device" => {
                    settings.device = match value {
                        "cpu" => Device::Cpu,
                        // Before anything else of libtorch.
                        "cuda" => cuda::select(0)?,
                        _ => return Err(format!("device={value}: expected cpu or cuda").into()),
                    }
                }
                "keep_memory" => settings.keep_memory = value.parse()?,
                _ => return Err(format!("{name}: unknown; see the head of this file").into()),
            }
        }
        Ok(settings)
    }

    fn trainable(&self, groups: usize) -> Result<Vec<usize>, Failure> {
        let first = match self.strategy.split_once(':') {
            None if self.strategy == "all" => 0,
            None if self.strategy == "head" => groups - 1,
            Some(("last", count)) => groups.saturating_sub(count.parse()?),
            _ => return Err(format!("strategy={}: expected all, head or last:N", self.strategy).into()),
        };
        Ok((first..groups).collect())
    }
}

/// Seconds of one step and of its parts.
struct Timing {
    wall: f64,
    cpu: f64,
    forward: f64,
    backward: f64,
    norm: f64,
    update: f64,
}

fn main() -> Result<(), Failure> {
    let settings = Settings::parse()?;
    if settings.keep_memory && !runtime::keep_memory() {
        println!("malloc did not take its settings");
    }
    runtime::set_num_threads(settings.threads)?;
    runtime::manual_seed(1)?;
    let mut model = load(&settings)?;
    let trainable = settings.trainable(model.groups().len())?;
    model.set_trainable(&trainable)?;
    model.set_activation_checkpointing(settings.checkpointing);
    let inputs = inputs(&model.graph().graph, &settings)?;
    let labels = Tensor::randint(CLASSES, [settings.batch], (Kind::Int64, Device::Cpu));
    let optimizers = Optimizers::resolve()?;
    let states = trainable.iter().map(|group| Ok((*group, AdamWState::zeros_for(&model.groups()[*group])?)));
    let mut states: BTreeMap<usize, AdamWState> = states.collect::<Result<_, Failure>>()?;
    let mut timings = Vec::new();
    for step in 0..settings.warm + settings.steps {
        let timing = one_step(&mut model, &inputs, &labels, &optimizers, &mut states)?;
        if step >= settings.warm {
            timings.push(timing);
        }
    }
    println!("{} groups trained of {}, {} threads", trainable.len(), model.groups().len(), runtime::num_threads());
    println!("peak {:.1} MiB of tensors", runtime::memory_use(false).peak as f64 / f64::from(1 << 20));
    let median = |part: fn(&Timing) -> f64| sorted(&timings, part)[timings.len() / 2];
    let least = |part: fn(&Timing) -> f64| sorted(&timings, part)[0];
    println!(
        "step wall_median={:.6} wall_min={:.6} cpu_min={:.6} forward={:.6} backward={:.6} norm={:.6} update={:.6}",
        median(|timing| timing.wall),
        least(|timing| timing.wall),
        least(|timing| timing.cpu),
        median(|timing| timing.forward),
        median(|timing| timing.backward),
        median(|timing| timing.norm),
        median(|timing| timing.update),
    );
    Ok(())
}

fn sorted(timings: &[Timing], part: fn(&Timing) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = timings.iter().map(part).collect();
    values.sort_by(f64::total_cmp);
    values
}

fn one_step(
    model: &mut SegmentedModel,
    inputs: &[Tensor],
    labels: &Tensor,
    optimizers: &Optimizers,
    states: &mut BTreeMap<usize, AdamWState>,
) -> Result<Timing, Failure> {
    let (started, cpu) = (Instant::now(), thread_seconds());
    let mut gradients = BTreeMap::new();
    let output = model.train_step(inputs, labels, 1.0, &mut |group, gradient| {
        gradients.insert(group, gradient.shallow_clone());
    })?;
    let normed = Instant::now();
    let norms = gradients.values().map(optim::norm).collect::<Result<Vec<_>, _>>()?;
    let norm = optim::global_norm(&norms)?;
    if !norm.is_finite() {
        return Err("the gradient is not finite".into());
    }
    let updated = Instant::now();
    for (group, state) in states {
        optimizers.adamw(&ADAMW, RATE, &model.groups()[*group], &gradients[group], state)?;
    }
    if let Device::Cuda(index) = model.device() {
        Cuda::synchronize(i64::try_from(index)?);
    }
    Ok(Timing {
        wall: started.elapsed().as_secs_f64(),
        cpu: thread_seconds() - cpu,
        forward: output.forward.as_secs_f64(),
        backward: output.backward.as_secs_f64(),
        norm: (updated - normed).as_secs_f64(),
        update: updated.elapsed().as_secs_f64(),
    })
}

fn load(settings: &Settings) -> Result<SegmentedModel, Failure> {
    let archive = Archive::open(&settings.model)?;
    let graph = thaw_graph::segment(&archive.graph()?, &[])?;
    let mut source = |name: &str| {
        let payload = archive.payload(name)?;
        Ok((payload.dtype, payload.shape.clone(), archive.weight_bytes(name)?))
    };
    let options = Options { precision: settings.precision, device: settings.device, memory_format: settings.format };
    Ok(SegmentedModel::new(graph, &mut source, options)?)
}

/// CPU seconds of this thread, to the nanosecond; zero where the kernel does not say.
fn thread_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split(' ').next().and_then(|nanoseconds| nanoseconds.parse::<f64>().ok()).unwrap_or(0.0) / 1e9
}

/// Noise for floating inputs; token ids below 1000 for the first whole-number input, ones (masks) for the others.
fn inputs(graph: &Graph, settings: &Settings) -> Result<Vec<Tensor>, Failure> {
    let mut made = Vec::new();
    for input in &graph.inputs {
        let shape = shape(graph, input.value, settings);
        let dtype = graph.value(input.value).tensor.as_ref().map_or(DType::Float32, |meta| meta.dtype);
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

/// The graph's shape; free sizes are the batch first, then the length.
fn shape(graph: &Graph, value: ValueId, settings: &Settings) -> Vec<i64> {
    let hinted = graph.hinted_shape(value).unwrap_or_default();
    let dims = graph.value(value).tensor.as_ref().map(|meta| meta.shape.as_slice()).unwrap_or_default();
    let size = |(index, dim): (usize, &Dim)| match dim {
        Dim::Symbolic(_) if index == 0 => settings.batch,
        Dim::Symbolic(_) => settings.length.unwrap_or(hinted[index]),
        Dim::Known(_) => hinted[index],
    };
    dims.iter().enumerate().map(size).collect()
}
