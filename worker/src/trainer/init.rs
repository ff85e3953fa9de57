//! The weights a run starts from: the archive's, the new head's, or new ones for training from scratch.
//!
//! INIT-1: new weights are a function of (seed, name), so that every rank draws the same, in any order.

use super::job::Job;
use std::collections::BTreeMap;
use thaw_graph::ir::DType;
use thaw_graph::{Init, buffer_init, scratch_init};
use thaw_proto::spec::Strategy;
use thaw_torch::model::SourceError;

type Weight = (DType, Vec<i64>, Vec<u8>);

pub(super) struct Initial<'a> {
    job: &'a Job,
    /// Tensors that do not come from the archive.
    drawn: BTreeMap<String, Init>,
}

impl<'a> Initial<'a> {
    pub(super) fn new(job: &'a Job) -> Self {
        let mut drawn = BTreeMap::new();
        match job.spec.strategy {
            Strategy::FromScratch => {
                let graph = &job.graph.graph;
                let parameters =
                    scratch_init(graph).into_iter().map(|(index, init)| (graph.parameters[index].name.clone(), init));
                let buffers =
                    buffer_init(graph).into_iter().map(|(index, init)| (graph.buffers[index].name.clone(), init));
                drawn.extend(parameters.chain(buffers));
            }
            Strategy::FeatureExtraction | Strategy::GradualUnfreezing | Strategy::FullFineTuning | Strategy::Custom => {
            }
        }
        drawn.extend(job.archive.new_parameters().iter().map(|new| (new.name.clone(), new.init)));
        Self { job, drawn }
    }

    /// A weight by its dotted name.
    pub(super) fn weight(&mut self, name: &str) -> Result<Weight, SourceError> {
        let graph = &self.job.graph.graph;
        let known =
            graph.parameters.iter().chain(&graph.buffers).chain(&graph.constants).find(|weight| weight.name == name);
        let weight = known.ok_or_else(|| format!("the graph has no weight {name}"))?;
        let bytes = match self.drawn.get(name) {
            Some(init) => draw(self.job.spec.seed, name, *init, weight.dtype, &weight.shape)?,
            None => self.job.archive.weight_bytes(name)?,
        };
        Ok((weight.dtype, weight.shape.clone(), bytes))
    }
}

fn draw(seed: u64, name: &str, init: Init, dtype: DType, shape: &[i64]) -> Result<Vec<u8>, SourceError> {
    let elements: i64 = shape.iter().product();
    let elements = usize::try_from(elements)?;
    let mut stream = Uniform::new(seed, name);
    let mut values: Box<dyn FnMut() -> f64> = match init {
        Init::Zeros => Box::new(|| 0.0),
        Init::Ones => Box::new(|| 1.0),
        #[expect(clippy::cast_precision_loss, reason = "a layer has far fewer than 2^53 inputs")]
        Init::LinearWeight { fan_in } | Init::LinearBias { fan_in } => {
            let bound = 1.0 / (fan_in.max(1) as f64).sqrt();
            Box::new(move || (2.0 * stream.next() - 1.0) * bound)
        }
        // Box and Muller 1958.
        Init::Normal { std } => Box::new(move || {
            let radius = (-2.0 * (1.0 - stream.next()).ln()).sqrt();
            radius * (std::f64::consts::TAU * stream.next()).cos() * std
        }),
    };
    let mut bytes = Vec::with_capacity(elements * dtype.size());
    for _ in 0..elements {
        let value = values();
        match dtype {
            DType::Float64 => bytes.extend(value.to_le_bytes()),
            #[expect(clippy::cast_possible_truncation, reason = "the weight is stored in fp32")]
            DType::Float32 => bytes.extend((value as f32).to_le_bytes()),
            #[expect(clippy::cast_possible_truncation, reason = "counters start at 0")]
            DType::Int64 => bytes.extend((value as i64).to_le_bytes()),
            DType::Uint8
            | DType::Int8
            | DType::Int16
            | DType::Int32
            | DType::Float16
            | DType::BFloat16
            | DType::Bool => {
                return Err(format!(
                    "{name} has the element type {dtype:?}, for which no new weights can be drawn; export it in float32"
                )
                .into());
            }
        }
    }
    Ok(bytes)
}

/// Uniform numbers in [0, 1) from BLAKE3's extendable output.
struct Uniform {
    output: blake3::OutputReader,
}

impl Uniform {
    fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("thaw.v1 new weights");
        hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
        Self { output: hasher.finalize_xof() }
    }

    #[expect(clippy::cast_precision_loss, reason = "53 bits are what a double holds")]
    fn next(&mut self) -> f64 {
        let mut bytes = [0; 8];
        self.output.fill(&mut bytes);
        (u64::from_le_bytes(bytes) >> 11) as f64 / (1u64 << 53) as f64
    }
}
