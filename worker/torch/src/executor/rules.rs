//! The rules that depend on an operator's name: mixed precision, what is off outside training, what is left out.

use tch::{Device, Kind};
use thaw_graph::ir::{Arg, Graph, Node};

use super::Flag;
use crate::op::Cast;

/// The numbers a model is trained in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    Fp32,
    /// Matrix products, convolutions and attention in bf16; weights, norms, softmax and loss in fp32.
    Bf16,
    Fp64,
}

impl Precision {
    /// The type of weights, gradients and optimizer state.
    #[must_use]
    pub fn master(self) -> Kind {
        match self {
            Self::Fp32 | Self::Bf16 => Kind::Float,
            Self::Fp64 => Kind::Double,
        }
    }

    /// How an operator's floating arguments are cast, as autocast would.
    pub(super) fn cast(self, operator: &str, device: Device) -> Cast {
        let name = operator.strip_prefix("aten::").unwrap_or(operator);
        match self {
            Self::Fp32 | Self::Fp64 => Cast::AsIs,
            Self::Bf16 if device == Device::Cpu && takes_mixed_types(name) => Cast::AsIs,
            Self::Bf16 => mixed(name),
        }
    }
}

/// Norms that on a CPU take activations in bf16 beside weights and statistics in fp32, and compute in fp32 within: a cast around them would
/// double what they read and write. As autocast has it on a CPU.
fn takes_mixed_types(name: &str) -> bool {
    matches!(
        name,
        "batch_norm"
            | "native_batch_norm"
            | "_native_batch_norm_legit"
            | "layer_norm"
            | "native_layer_norm"
            | "group_norm"
    )
}

fn mixed(name: &str) -> Cast {
    const LOW: &[&str] = &[
        "linear",
        "matmul",
        "__matmul__",
        "mm",
        "bmm",
        "mv",
        "addmm",
        "addbmm",
        "addmv",
        "baddbmm",
        "einsum",
        "convolution",
        "_convolution",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_tbc",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "scaled_dot_product_attention",
        "_native_multi_head_attention",
    ];
    const HIGH: &[&str] = &[
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "group_norm",
        "native_group_norm",
        "instance_norm",
        "batch_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "norm",
        "linalg_vector_norm",
        "linalg_norm",
        "renorm",
        "cosine_similarity",
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "cross_entropy_loss",
        "nll_loss",
        "nll_loss2d",
        "nll_loss_nd",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "kl_div",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cosine_embedding_loss",
        "exp",
        "expm1",
        "log",
        "log10",
        "log1p",
        "log2",
        "logsumexp",
        "pow",
        "reciprocal",
        "rsqrt",
        "softplus",
        "sum",
        "mean",
        "prod",
        "cumsum",
        "cumprod",
        "erfinv",
        "acos",
        "asin",
        "cosh",
        "sinh",
        "tan",
        "std",
        "var",
        "var_mean",
    ];
    const WIDEST: &[&str] = &[
        "cat",
        "stack",
        "addcdiv",
        "addcmul",
        "atan2",
        "bilinear",
        "cross",
        "dot",
        "grid_sampler",
        "grid_sampler_2d",
        "index_put",
        "index_copy",
        "scatter_add",
        "where",
        "tensordot",
        "lerp",
    ];
    if LOW.contains(&name) {
        Cast::ToBf16
    } else if HIGH.contains(&name) {
        Cast::ToFp32
    } else if WIDEST.contains(&name) {
        Cast::Widest
    } else {
        Cast::AsIs
    }
}

/// How images, and with them the weights of convolutions, lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryFormat {
    /// Channels last where the graph has convolutions over images and no attention, and numbers are not fp64 (which has no such kernels).
    Automatic,
    /// Row-major, as PyTorch's default.
    Contiguous,
    /// Pixels outermost, channels innermost.
    ChannelsLast,
}

pub(super) fn prefers_channels_last(graph: &Graph, precision: Precision) -> bool {
    const ATTENTION: &[&str] = &["aten::scaled_dot_product_attention", "aten::bmm", "aten::baddbmm", "aten::matmul"];
    let uses = |names: &[&str]| graph.nodes.iter().any(|node| names.contains(&node.operator.as_str()));
    precision != Precision::Fp64 && uses(&["aten::conv2d"]) && !uses(ATTENTION)
}

/// Makes a graph written for row-major tensors run on others: a view that the layout does not allow becomes a copy.
pub(super) fn allow_copies(graph: &mut Graph) {
    let views = graph.nodes.iter_mut().filter(|node| node.operator == "aten::view" && node.overload.is_empty());
    for node in views {
        "aten::reshape".clone_into(&mut node.operator);
        for argument in node.arguments.iter_mut().filter(|argument| argument.name == "size") {
            "shape".clone_into(&mut argument.name);
        }
    }
}

/// Checks of metadata, made when a graph is exported: they do nothing for a batch, and would object to another precision or device.
pub(super) fn is_assertion(operator: &str) -> bool {
    matches!(
        operator,
        "aten::_assert_tensor_metadata"
            | "aten::_assert_async"
            | "aten::_functional_assert_async"
            | "aten::_functional_sym_constrain_range"
            | "aten::_assert_scalar"
            | "aten::sym_constrain_range"
            | "aten::sym_constrain_range_for_size"
    )
}

/// Operators that may return their argument itself although their schema does not say so.
pub(super) fn may_return_argument(operator: &str) -> bool {
    matches!(
        operator,
        "aten::dropout"
            | "aten::feature_dropout"
            | "aten::alpha_dropout"
            | "aten::feature_alpha_dropout"
            | "aten::rrelu"
    )
}

/// The value an argument takes outside training, where that differs from the exported one.
pub(super) fn off_value(node: &Node, argument: &str, value: &Arg) -> Option<(Flag, Arg)> {
    let batch_norm = node.operator.contains("batch_norm");
    match (argument, value) {
        // Without running statistics there is nothing else to normalise by.
        ("training", Arg::Bool(true)) if batch_norm => {
            let tracked = node
                .arguments
                .iter()
                .any(|other| other.name == "running_mean" && matches!(other.value, Arg::Tensor(_)));
            tracked.then_some((Flag::BatchStatistics, Arg::Bool(false)))
        }
        ("training" | "train", Arg::Bool(true)) => Some((Flag::Dropout, Arg::Bool(false))),
        ("dropout_p", Arg::Float(p)) if *p != 0.0 => Some((Flag::Dropout, Arg::Float(0.0))),
        _ => None,
    }
}

/// `noise.bernoulli_(keep)`: how stochastic depth draws its noise. Where it is off the noise is one, and nothing is drawn: a frozen group
/// must not move the generator that the groups above it use.
pub(super) fn is_keep_noise(node: &Node) -> bool {
    node.operator == "aten::bernoulli_" && node.overload == "float"
}

/// The probability that noise is drawn with.
pub(super) fn keep_probability(node: &Node) -> Option<f64> {
    // The exporter leaves out what equals the schema's default.
    const DEFAULT: f64 = 0.5;
    node.argument("p").map_or(Some(DEFAULT), real)
}

/// A literal number.
pub(super) fn real(value: &Arg) -> Option<f64> {
    match value {
        Arg::Float(value) => Some(*value),
        #[expect(clippy::cast_precision_loss, reason = "a probability")]
        Arg::Int(value) => Some(*value as f64),
        _ => None,
    }
}

/// The scale that stochastic depth gives to its noise: a division by the probability that drew it.
pub(super) fn is_noise_scale(node: &Node) -> bool {
    matches!(node.operator.as_str(), "aten::div_" | "aten::div")
}

/// How noise is applied.
pub(super) fn is_product(node: &Node) -> bool {
    matches!(node.operator.as_str(), "aten::mul_" | "aten::mul")
}
