//! What Thaw knows about operators by name alone; schemas live in libtorch, which this crate does not link.
//!
//! OP-1: integer arithmetic of the exporter (`_operator.mul`, ...) becomes an operator in the namespace `python`, from the closed list
//! [`PYTHON`]; its arguments are `a`, `b` (`x` for `trunc`; `b`, `t`, `f` for `sym_ite`) and its result is a number, never a tensor.

use crate::ir::{Arg, Node};

/// The operators on plain numbers: `python::NAME`, with Python's meaning on integers (floor division, modulo with the divisor's sign).
pub const PYTHON: [(&str, &str); 24] = [
    ("_operator.add", "add"),
    ("_operator.sub", "sub"),
    ("_operator.mul", "mul"),
    ("_operator.floordiv", "floordiv"),
    ("_operator.truediv", "truediv"),
    ("_operator.mod", "mod"),
    ("_operator.pow", "pow"),
    ("_operator.neg", "neg"),
    ("_operator.pos", "pos"),
    ("_operator.eq", "eq"),
    ("_operator.ne", "ne"),
    ("_operator.lt", "lt"),
    ("_operator.le", "le"),
    ("_operator.gt", "gt"),
    ("_operator.ge", "ge"),
    ("_operator.and_", "and"),
    ("_operator.or_", "or"),
    ("math.trunc", "trunc"),
    ("torch.sym_not", "sym_not"),
    ("torch.sym_int", "sym_int"),
    ("torch.sym_float", "sym_float"),
    ("torch.sym_ite", "sym_ite"),
    ("torch.sym_max", "sym_max"),
    ("torch.sym_min", "sym_min"),
];

/// Checks that the exporter inserts; they are checked once, when the graph is read, and not executed.
const ASSERTIONS: [&str; 7] = [
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::_functional_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
    "aten::_functional_sym_constrain_range",
];

/// Results may share memory with the first argument.
const VIEWS: [&str; 33] = [
    "aten::view",
    "aten::view_as",
    "aten::reshape",
    "aten::expand",
    "aten::expand_as",
    "aten::transpose",
    "aten::permute",
    "aten::t",
    "aten::mT",
    "aten::select",
    "aten::slice",
    "aten::narrow",
    "aten::squeeze",
    "aten::unsqueeze",
    "aten::flatten",
    "aten::unflatten",
    "aten::split",
    "aten::split_with_sizes",
    "aten::chunk",
    "aten::unbind",
    "aten::unfold",
    "aten::diagonal",
    "aten::as_strided",
    "aten::alias",
    "aten::detach",
    "aten::contiguous",
    "aten::to",
    "aten::movedim",
    "aten::swapaxes",
    "aten::tensor_split",
    "aten::numpy_T",
    "aten::lift_fresh",
    "aten::dropout",
];

/// Draw random numbers whatever their arguments.
const RANDOM: [&str; 14] = [
    "aten::bernoulli",
    "aten::bernoulli_",
    "aten::rand",
    "aten::rand_like",
    "aten::randn",
    "aten::randn_like",
    "aten::randint",
    "aten::randint_like",
    "aten::randperm",
    "aten::normal",
    "aten::normal_",
    "aten::uniform_",
    "aten::exponential_",
    "aten::rrelu",
];

/// Draw random numbers while training.
const DROPOUTS: [&str; 9] = [
    "aten::dropout",
    "aten::dropout_",
    "aten::native_dropout",
    "aten::feature_dropout",
    "aten::feature_dropout_",
    "aten::alpha_dropout",
    "aten::alpha_dropout_",
    "aten::feature_alpha_dropout",
    "aten::scaled_dot_product_attention",
];

/// In-place operators whose name without the underscore is the same function out of place, with the same overloads and arguments.
const OUT_OF_PLACE: [&str; 41] = [
    "abs",
    "add",
    "addcmul",
    "addcdiv",
    "bernoulli",
    "celu",
    "clamp",
    "clamp_max",
    "clamp_min",
    "cos",
    "detach",
    "div",
    "dropout",
    "elu",
    "exp",
    "feature_dropout",
    "floor",
    "gelu",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "index_fill",
    "leaky_relu",
    "log",
    "masked_fill",
    "mish",
    "mul",
    "neg",
    "pow",
    "reciprocal",
    "relu",
    "relu6",
    "round",
    "rsqrt",
    "selu",
    "sigmoid",
    "silu",
    "sin",
    "sqrt",
    "sub",
    "tanh",
];

/// `linear`, convolutions and the like: their `weight` and `bias` are those of a layer, with the fan-in read off the weight.
pub(crate) fn is_layer(operator: &str) -> bool {
    matches!(operator, "aten::linear" | "aten::addmm" | "aten::bilinear") || is_convolution(operator)
}

pub(crate) fn is_convolution(operator: &str) -> bool {
    operator.strip_prefix("aten::").is_some_and(|name| name.starts_with("conv") || name == "_convolution")
}

pub(crate) fn is_norm(operator: &str) -> bool {
    operator
        .strip_prefix("aten::")
        .is_some_and(|name| name.ends_with("_norm") && !name.contains("linalg") && !name.contains("weight_norm"))
}

pub(crate) fn is_assertion(operator: &str) -> bool {
    ASSERTIONS.contains(&operator)
}

/// Writes into its first argument and returns it: a trailing underscore, but not `__and__`.
#[must_use]
pub fn is_in_place(operator: &str) -> bool {
    operator.ends_with('_') && !operator.ends_with("__")
}

pub(crate) fn is_view(operator: &str) -> bool {
    VIEWS.contains(&operator)
}

/// The same function without writing into its argument, where there is one.
#[must_use]
pub fn out_of_place(operator: &str) -> Option<String> {
    let name = operator.strip_prefix("aten::")?.strip_suffix('_')?;
    OUT_OF_PLACE.contains(&name).then(|| format!("aten::{name}"))
}

/// Whether the node may draw random numbers.
#[must_use]
pub fn is_random(node: &Node) -> bool {
    RANDOM.contains(&node.operator.as_str()) || DROPOUTS.contains(&node.operator.as_str())
}

/// Whether the node drops elements while training, and does nothing else.
pub(crate) fn is_dropout(node: &Node) -> bool {
    let is_active = match node.argument("p") {
        Some(Arg::Float(p)) => *p > 0.0,
        Some(_) | None => true,
    };
    is_active && node.operator.contains("dropout")
}

/// The number operator for an exporter target such as `_operator.mul`.
pub(crate) fn python(target: &str) -> Option<String> {
    PYTHON.iter().find(|(name, _)| *name == target).map(|(_, name)| format!("python::{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_place_is_told_from_dunder() {
        assert!(is_in_place("aten::relu_"));
        assert!(!is_in_place("aten::__and__"));
        assert!(!is_in_place("aten::relu"));
        assert_eq!(out_of_place("aten::add_").as_deref(), Some("aten::add"));
        assert_eq!(out_of_place("aten::copy_"), None);
    }
}
