//! Small segmented graphs for the tests of every module.

use std::collections::BTreeMap;

use crate::ir::{Arg, Argument, DType, Dim, Graph, GraphInput, Node, NodeId, TensorMeta, Value, ValueId, Weight};
use crate::segment::{Segment, SegmentedGraph};

/// Values get sizes as they are made; all are fp32. Segments run from one [`Builder::segment`] to the next.
pub(crate) struct Builder {
    graph: Graph,
    segments: Vec<Segment>,
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
        Self { graph, segments: Vec::new() }
    }

    fn value(&mut self, shape: &[i64]) -> ValueId {
        let shape = shape.iter().copied().map(Dim::Known).collect();
        let tensor = Some(TensorMeta { dtype: DType::Float32, shape });
        self.graph.values.push(Value { name: format!("v{}", self.graph.values.len()), tensor });
        ValueId(self.graph.values.len() as u32 - 1)
    }

    pub(crate) fn input(&mut self, shape: &[i64]) -> ValueId {
        let value = self.value(shape);
        self.graph.inputs.push(GraphInput { value, name: "x".to_owned() });
        value
    }

    pub(crate) fn parameter(&mut self, shape: &[i64]) -> ValueId {
        let value = self.value(shape);
        let index = self.graph.parameters.len();
        let (name, shape) = (format!("p{index}"), shape.to_vec());
        self.graph.parameters.push(Weight { value, name, dtype: DType::Float32, shape, flag: true });
        self.segments.last_mut().unwrap().parameters.push(index);
        value
    }

    /// Ends the segment before; `inputs` come through the cut.
    pub(crate) fn segment(&mut self, name: &str, inputs: &[ValueId]) {
        if let Some(before) = self.segments.last_mut() {
            before.outputs = inputs.to_vec();
        }
        self.segments.push(Segment {
            name: name.to_owned(),
            nodes: Vec::new(),
            parameters: Vec::new(),
            buffers: Vec::new(),
            inputs: inputs.to_vec(),
            outputs: Vec::new(),
        });
    }

    pub(crate) fn node(&mut self, operator: &str, arguments: &[(&str, Arg)], made: &[i64]) -> ValueId {
        let output = self.value(made);
        self.graph.nodes.push(Node {
            operator: format!("aten::{operator}"),
            overload: String::new(),
            arguments: arguments
                .iter()
                .map(|(name, value)| Argument { name: (*name).to_owned(), value: value.clone() })
                .collect(),
            outputs: vec![Some(output)],
            module: String::new(),
            name: format!("n{}", self.graph.nodes.len()),
        });
        let id = NodeId(self.graph.nodes.len() as u32 - 1);
        self.segments.last_mut().unwrap().nodes.push(id);
        output
    }

    /// A layer of `outputs` features over `[batch, inputs]`.
    pub(crate) fn linear(&mut self, input: ValueId, batch: i64, inputs: i64, outputs: i64) -> ValueId {
        let (weight, bias) = (self.parameter(&[outputs, inputs]), self.parameter(&[outputs]));
        let arguments = [("input", input), ("weight", weight), ("bias", bias)];
        self.node("linear", &arguments.map(|(name, value)| (name, Arg::Tensor(value))), &[batch, outputs])
    }

    pub(crate) fn finish(mut self, output: ValueId) -> SegmentedGraph {
        self.graph.output = output;
        self.segments.last_mut().unwrap().outputs = vec![output];
        SegmentedGraph { graph: self.graph, prologue: Vec::new(), segments: self.segments }
    }
}
