//! What several tests share: the virtual environment's Python, safetensors files, graphs built by hand.

#![allow(dead_code, reason = "each test uses its part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use thaw_graph::ir::{Arg, Argument, DType, Dim, Graph, GraphInput, Node, NodeId, TensorMeta, Value, ValueId, Weight};
use thaw_graph::segment::{Segment, SegmentedGraph};
use thaw_torch::model::{SourceError, WeightBytes};
use thaw_torch::tch::{Kind, Tensor};

/// Held by every test of a program that has more than one and sets or reads what belongs to the process: the generator, the number of
/// threads, the count of memory.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the reference script; `false` where there is no virtual environment (a failure in CI).
pub(crate) fn python_reference(arguments: &[&str]) -> bool {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "no virtual environment: run `make setup`");
        eprintln!("skipped: no virtual environment; run `make setup`");
        return false;
    }
    let output =
        Command::new(python).arg(root.join("tests/reference/graph_reference.py")).args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    true
}

/// All tensors of a safetensors file.
pub(crate) fn read_safetensors(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap().into_iter().collect()
}

/// A temporary folder as text.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub(crate) fn join(folder: &Path, name: &str) -> PathBuf {
    folder.join(name)
}

/// Whether two tensors hold the same bits.
pub(crate) fn same_bits(left: &Tensor, right: &Tensor) -> bool {
    left.kind() == right.kind() && left.size() == right.size() && bits(left) == bits(right)
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    let tensor = tensor.detach().contiguous();
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    if !bytes.is_empty() {
        tensor.copy_data_u8(&mut bytes, tensor.numel());
    }
    bytes
}

/// The largest difference relative to the largest magnitude.
pub(crate) fn relative_difference(left: &Tensor, right: &Tensor) -> f64 {
    if left.numel() == 0 {
        return 0.0;
    }
    let scale = right.abs().max().to_kind(Kind::Double).double_value(&[]).max(1e-30);
    (left - right).abs().max().to_kind(Kind::Double).double_value(&[]) / scale
}

/// A graph under construction.
pub(crate) struct Builder {
    pub(crate) graph: Graph,
    /// The nodes of each segment, then of the prologue.
    pub(crate) segments: Vec<Segment>,
    pub(crate) prologue: Vec<NodeId>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        let graph = Graph {
            values: Vec::new(),
            nodes: Vec::new(),
            inputs: Vec::new(),
            parameters: Vec::new(),
            buffers: Vec::new(),
            constants: Vec::new(),
            output: ValueId(0),
            symbols: BTreeMap::new(),
            symbol_sources: BTreeMap::new(),
            guards: Vec::new(),
            modules: BTreeMap::new(),
            notes: Vec::new(),
        };
        Self { graph, segments: Vec::new(), prologue: Vec::new() }
    }

    fn value(&mut self, name: &str, tensor: Option<TensorMeta>) -> ValueId {
        self.graph.values.push(Value { name: name.to_owned(), tensor });
        ValueId(u32::try_from(self.graph.values.len() - 1).unwrap())
    }

    pub(crate) fn input(&mut self, name: &str, dtype: DType, shape: &[i64]) -> ValueId {
        let meta = TensorMeta { dtype, shape: shape.iter().map(|size| Dim::Known(*size)).collect() };
        let value = self.value(name, Some(meta));
        self.graph.inputs.push(GraphInput { value, name: name.to_owned() });
        value
    }

    fn weight(&mut self, name: &str, dtype: DType, shape: &[i64]) -> Weight {
        let value = self.value(name, None);
        Weight { value, name: name.to_owned(), dtype, shape: shape.to_vec(), flag: true }
    }

    /// Tells what a node's result looks like, where a test reads it from the graph.
    #[allow(dead_code, reason = "not every test asks")]
    pub(crate) fn shaped(&mut self, value: ValueId, dtype: DType, shape: &[i64]) -> ValueId {
        let shape = shape.iter().map(|size| Dim::Known(*size)).collect();
        self.graph.values[value.0 as usize].tensor = Some(TensorMeta { dtype, shape });
        value
    }

    /// A parameter of the segment begun last.
    pub(crate) fn parameter(&mut self, name: &str, shape: &[i64]) -> ValueId {
        let weight = self.weight(name, DType::Float32, shape);
        let value = weight.value;
        self.graph.parameters.push(weight);
        let index = self.graph.parameters.len() - 1;
        self.segments.last_mut().unwrap().parameters.push(index);
        value
    }

    /// A buffer of the segment begun last.
    pub(crate) fn buffer(&mut self, name: &str, dtype: DType, shape: &[i64]) -> ValueId {
        let weight = self.weight(name, dtype, shape);
        let value = weight.value;
        self.graph.buffers.push(weight);
        let index = self.graph.buffers.len() - 1;
        self.segments.last_mut().unwrap().buffers.push(index);
        value
    }

    pub(crate) fn segment(&mut self, name: &str, inputs: &[ValueId]) {
        self.segments.push(Segment {
            name: name.to_owned(),
            nodes: Vec::new(),
            parameters: Vec::new(),
            buffers: Vec::new(),
            inputs: inputs.to_vec(),
            outputs: Vec::new(),
        });
    }

    pub(crate) fn outputs(&mut self, outputs: &[ValueId]) {
        self.segments.last_mut().unwrap().outputs = outputs.to_vec();
    }

    /// A node of the segment begun last, or of the prologue before any; with one result.
    pub(crate) fn node(&mut self, operator: &str, overload: &str, arguments: Vec<(&str, Arg)>) -> ValueId {
        let name = format!("{}_{}", operator.rsplit(':').next().unwrap(), self.graph.nodes.len());
        let output = self.value(&name, None);
        let arguments = arguments.into_iter().map(|(name, value)| Argument { name: name.to_owned(), value }).collect();
        self.graph.nodes.push(Node {
            operator: operator.to_owned(),
            overload: overload.to_owned(),
            arguments,
            outputs: vec![Some(output)],
            module: String::new(),
            name,
        });
        let id = NodeId(u32::try_from(self.graph.nodes.len() - 1).unwrap());
        match self.segments.last_mut() {
            Some(segment) => segment.nodes.push(id),
            None => self.prologue.push(id),
        }
        output
    }

    pub(crate) fn linear(&mut self, input: ValueId, weight: ValueId, bias: ValueId) -> ValueId {
        let arguments =
            vec![("input", Arg::Tensor(input)), ("weight", Arg::Tensor(weight)), ("bias", Arg::Tensor(bias))];
        self.node("aten::linear", "", arguments)
    }

    pub(crate) fn finish(mut self, output: ValueId) -> SegmentedGraph {
        self.graph.output = output;
        SegmentedGraph { graph: self.graph, prologue: self.prologue, segments: self.segments }
    }
}

/// Weights by name, for the model's reader.
pub(crate) struct Weights(pub(crate) BTreeMap<String, Tensor>);

impl Weights {
    /// Random parameters for every weight of the graph; floating buffers are ones, counters zero.
    pub(crate) fn random(graph: &Graph) -> Self {
        let mut tensors = BTreeMap::new();
        for weight in &graph.parameters {
            let values = Tensor::randn(weight.shape.as_slice(), (Kind::Float, thaw_torch::tch::Device::Cpu)) * 0.3;
            tensors.insert(weight.name.clone(), values);
        }
        for weight in &graph.buffers {
            let kind = thaw_torch::executor::kind_of(weight.dtype);
            let options = (kind, thaw_torch::tch::Device::Cpu);
            let shape = weight.shape.as_slice();
            tensors.insert(
                weight.name.clone(),
                if weight.dtype.is_float() { Tensor::ones(shape, options) } else { Tensor::zeros(shape, options) },
            );
        }
        Self(tensors)
    }

    pub(crate) fn read(&self, name: &str) -> Result<WeightBytes, SourceError> {
        let tensor = self.0.get(name).ok_or_else(|| format!("no weight {name}"))?;
        Ok((thaw_torch::executor::dtype_of(tensor.kind()).unwrap(), tensor.size(), bits(tensor)))
    }

    pub(crate) fn leaf(&self, name: &str) -> Tensor {
        self.0[name].copy().set_requires_grad(true)
    }
}
