//! A new head for an exported graph, made by editing the archive's JSON.
//!
//! ```text
//! replace:  features -> [dropout] -> fc                     the exported classifier, with another number of outputs
//! append:   features -> [dropout] -> head                   after a graph that ends in features
//! MLP:      features -> head.0 linear -> [batch norm] -> relu -> dropout -> ... -> head.N linear
//! ```
//!
//! HEAD-1: the edited document is what is read, executed and written, so Python loads what Thaw trained.
//! HEAD-2: a replaced classifier that stays one linear layer keeps its parameters' names.
//! HEAD-3: the head's modules carry the class `thaw.Head`, by which its layer group is found again.

mod document;

use crate::archive::{self, Archive};
use crate::init::Init;
use crate::ir::{Arg, DType, Dim, Graph, IntArg, Node, ValueId};
use crate::modules;
use crate::payload;
use document::{Document, Layer, Place};

/// Where the head goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// Replace where the graph ends in a linear layer named like a classifier; append otherwise.
    Auto,
    Replace,
    Append,
}

/// The head wanted.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSpec {
    pub attach: Attach,
    /// Sizes of the hidden layers; empty for one linear layer.
    pub hidden_sizes: Vec<usize>,
    /// Probability; 0 for none.
    pub dropout: f64,
    /// After each hidden layer.
    pub batch_norm: bool,
    pub classes: usize,
}

/// A tensor that the head brought in and that has no bytes yet.
#[derive(Debug, Clone, PartialEq)]
pub struct NewParameter {
    pub name: String,
    pub shape: Vec<i64>,
    pub dtype: DType,
    pub init: Init,
    /// A buffer (batch-norm statistics), not to be trained.
    pub is_buffer: bool,
}

/// Why the head could not be attached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the graph to attach a head")]
    Archive(#[from] archive::Error),
    #[error(
        "a head with {classes} classes and hidden sizes {hidden_sizes:?} is impossible: give sizes of at least 1, and at least 2 classes"
    )]
    Sizes { classes: usize, hidden_sizes: Vec<usize> },
    #[error("the dropout {dropout} is impossible: give a probability from 0 to below 1")]
    Dropout { dropout: f64 },
    #[error("batch norm needs a hidden layer: give hidden_sizes or leave batch_norm out")]
    BatchNormWithoutHidden,
    #[error(
        "the head cannot replace the last layer, because the graph does not end in a linear layer with its own weight: append the head instead"
    )]
    NotReplaceable,
    #[error("the head cannot replace `{name}`, because other layers use that weight too: append the head instead")]
    Shared { name: String },
    #[error(
        "the head cannot replace the classifier, because `{node}` after it is tied to the old number of classes: export without it"
    )]
    FixedClasses { node: String },
    #[error(
        "the head cannot be appended to an output of shape {shape}: export the model so that it returns one vector of floats per sample"
    )]
    NotFeatures { shape: String },
    #[error(
        "batch norm in the head needs one vector per sample, and `{value}` has another shape: leave batch_norm out"
    )]
    BatchNormRank { value: String },
    #[error("the size of a new tensor overflows")]
    Overflow(#[from] payload::Error),
    #[error("the graph document lacks `{field}`: export again with PyTorch 2.11")]
    Document { field: String },
}

impl Archive {
    /// The archive with a new head; its tensors are listed by [`Archive::new_parameters`] and get their bytes when it is written.
    ///
    /// # Errors
    /// Where the graph's end does not fit the head; each error says what to do.
    pub fn with_head(&self, spec: &HeadSpec) -> Result<Self, Error> {
        check(spec)?;
        let graph = self.graph()?;
        let site = match spec.attach {
            Attach::Append => None,
            Attach::Replace => Some(site(&graph)?),
            Attach::Auto => match site(&graph) {
                Ok(site) => Some(site).filter(|site| modules::is_classifier(&site.node.module)),
                Err(Error::NotReplaceable) => None,
                Err(error) => return Err(error),
            },
        };
        let mut document = Document::new(self.clone());
        match site {
            Some(site) => replace(&mut document, &graph, &site, spec)?,
            None => append(&mut document, &graph, spec)?,
        }
        Ok(document.finish())
    }
}

fn check(spec: &HeadSpec) -> Result<(), Error> {
    if spec.classes < 2 || spec.hidden_sizes.contains(&0) {
        return Err(Error::Sizes { classes: spec.classes, hidden_sizes: spec.hidden_sizes.clone() });
    }
    if !(0.0..1.0).contains(&spec.dropout) {
        return Err(Error::Dropout { dropout: spec.dropout });
    }
    if spec.batch_norm && spec.hidden_sizes.is_empty() {
        return Err(Error::BatchNormWithoutHidden);
    }
    Ok(())
}

/// The exported classifier: a linear layer with a weight of its own.
struct Site<'a> {
    node: &'a Node,
    input: ValueId,
    output: ValueId,
    /// Indices into the graph's parameters.
    weight: usize,
    bias: Option<usize>,
    /// Values from the logits to the output, the latter included.
    after: Vec<ValueId>,
}

fn site(graph: &Graph) -> Result<Site<'_>, Error> {
    let index = modules::last_linear(graph).ok_or(Error::NotReplaceable)?;
    let node = &graph.nodes[index];
    let parameter = |value: ValueId| graph.parameters.iter().position(|weight| weight.value == value);
    let weight = node.tensor("weight").and_then(parameter).ok_or(Error::NotReplaceable)?;
    let bias = match node.tensor("bias") {
        None => None,
        Some(value) => Some(parameter(value).ok_or(Error::NotReplaceable)?),
    };
    for used in std::iter::once(weight).chain(bias) {
        let weight = &graph.parameters[used];
        if graph.nodes.iter().filter(|node| node.reads().contains(&weight.value)).count() > 1 {
            return Err(Error::Shared { name: weight.name.clone() });
        }
    }
    let (Some(input), Some(Some(output))) = (node.tensor("input"), node.outputs.first().copied()) else {
        return Err(Error::NotReplaceable);
    };
    let old_classes = graph.parameters[weight].shape.first().copied().unwrap_or(0);
    let mut after = Vec::new();
    let mut current = output;
    while current != graph.output {
        let next = graph.nodes[index..]
            .iter()
            .find(|node| node.tensor("self") == Some(current))
            .ok_or(Error::NotReplaceable)?;
        let names_classes = next.arguments.iter().any(|argument| match &argument.value {
            Arg::Ints(items) => items.contains(&IntArg::Known(old_classes)),
            _ => false,
        });
        if names_classes {
            return Err(Error::FixedClasses { node: next.name.clone() });
        }
        current = next.makes().first().copied().ok_or(Error::NotReplaceable)?;
        after.push(current);
    }
    Ok(Site { node, input, output, weight, bias, after })
}

fn replace(document: &mut Document, graph: &Graph, site: &Site<'_>, spec: &HeadSpec) -> Result<(), Error> {
    let input = &graph.value(site.input).name;
    let output = graph.value(site.output).name.clone();
    let weight = graph.parameters[site.weight].name.clone();
    let bias = site.bias.map(|bias| graph.parameters[bias].name.clone());
    let features = features(graph, site.input)?;
    let layers = layers(spec, features.size);
    check_batch_norm(&layers, &features, input)?;
    let start = document.node_index(&site.node.name)?;
    let mut place = Place::at(start, document.take_node(start)?, &site.node.module);
    place.has_bias = bias.is_some();
    if is_single(&layers) {
        place.single_names = Some((weight.clone(), bias.clone()));
    }
    document.remove_parameter(&weight)?;
    if let Some(bias) = &bias {
        document.remove_parameter(bias)?;
    }
    let logits = document.add_layers(&mut place, input, &layers, features.dtype, Some(&output))?;
    debug_assert_eq!(logits, output, "the new logits take the old name");
    for value in &site.after {
        document.set_last_size(&graph.value(*value).name, spec.classes as i64)?;
    }
    Ok(())
}

fn append(document: &mut Document, graph: &Graph, spec: &HeadSpec) -> Result<(), Error> {
    let name = graph.value(graph.output).name.clone();
    let features = features(graph, graph.output)?;
    if features.rank != 2 {
        return Err(Error::NotFeatures { shape: shape_text(graph, graph.output) });
    }
    let layers = layers(spec, features.size);
    let prefix =
        if graph.modules.contains_key("head") || document.has_parameter_below("head") { "thaw_head" } else { "head" };
    let root = graph.modules.get("").map_or("torch.nn.modules.module.Module", String::as_str);
    let mut place = Place::at_end(document.node_count()?, root, prefix);
    let logits = document.add_layers(&mut place, &name, &layers, features.dtype, None)?;
    document.rename_output(&name, &logits)
}

struct Features {
    size: i64,
    rank: usize,
    dtype: DType,
}

fn features(graph: &Graph, value: ValueId) -> Result<Features, Error> {
    let not_features = || Error::NotFeatures { shape: shape_text(graph, value) };
    let tensor = graph.value(value).tensor.as_ref().ok_or_else(not_features)?;
    match tensor.shape.last() {
        Some(&Dim::Known(size)) if size > 0 && tensor.dtype.is_float() => {
            Ok(Features { size, rank: tensor.shape.len(), dtype: tensor.dtype })
        }
        _ => Err(not_features()),
    }
}

fn shape_text(graph: &Graph, value: ValueId) -> String {
    let sizes = graph.value(value).tensor.as_ref().map_or(&[][..], |tensor| &tensor.shape);
    let sizes: Vec<String> = sizes
        .iter()
        .map(|size| match size {
            Dim::Known(size) => size.to_string(),
            Dim::Symbolic(expression) => expression.to_string(),
        })
        .collect();
    format!("({})", sizes.join(", "))
}

fn check_batch_norm(layers: &[Layer], features: &Features, value: &str) -> Result<(), Error> {
    let has_norm = layers.iter().any(|layer| matches!(layer, Layer::BatchNorm { .. }));
    if has_norm && features.rank != 2 { Err(Error::BatchNormRank { value: value.to_owned() }) } else { Ok(()) }
}

fn layers(spec: &HeadSpec, features: i64) -> Vec<Layer> {
    let mut layers = Vec::new();
    let mut size = features;
    for &hidden in &spec.hidden_sizes {
        let hidden = hidden as i64;
        layers.push(Layer::Linear { inputs: size, outputs: hidden });
        if spec.batch_norm {
            layers.push(Layer::BatchNorm { size: hidden });
        }
        layers.push(Layer::Relu { size: hidden });
        size = hidden;
        if spec.dropout > 0.0 {
            layers.push(Layer::Dropout { size, probability: spec.dropout });
        }
    }
    if spec.hidden_sizes.is_empty() && spec.dropout > 0.0 {
        layers.push(Layer::Dropout { size, probability: spec.dropout });
    }
    layers.push(Layer::Linear { inputs: size, outputs: spec.classes as i64 });
    layers
}

/// One linear layer, with or without dropout before it: it is named as the head itself.
fn is_single(layers: &[Layer]) -> bool {
    layers.iter().filter(|layer| matches!(layer, Layer::Linear { .. })).count() == 1
}
