//! Floating-point operations of a node's forward pass, from tensor shapes at their export-time hints.
//!
//! COST-1: a multiply-add counts as two operations. Costs rank layer groups and estimate time; they are not a measurement.

use crate::ir::{Graph, Node, ValueId};
use crate::operators;

/// Operations of one forward pass of the node over the exported example batch.
pub(crate) fn forward_flops(graph: &Graph, node: &Node) -> u64 {
    flops(node, |value| graph.hinted_shape(value))
}

/// Operations of one forward pass of the node over a batch of these sizes.
pub(crate) fn flops(node: &Node, shape: impl Fn(ValueId) -> Option<Vec<i64>>) -> u64 {
    let result = node.makes().first().copied().and_then(&shape);
    let shape = |value: Option<ValueId>| value.and_then(&shape);
    let made = result.as_deref().map_or(0, elements);
    let name = node.operator.strip_prefix("aten::").unwrap_or(&node.operator);
    match name {
        "linear" => sums(made, shape(node.tensor("weight"))),
        "addmm" => sums(made, shape(node.tensor("mat1"))),
        "mm" | "bmm" | "matmul" => sums(made, shape(node.tensor("self"))),
        "baddbmm" => sums(made, shape(node.tensor("batch1"))),
        "scaled_dot_product_attention" => {
            let keys = shape(node.tensor("key")).and_then(|key| key.iter().rev().nth(1).copied()).unwrap_or(0);
            let queries = shape(node.tensor("query")).map_or(0, |query| elements(&query));
            // Scores and their weighted sum over the keys.
            queries.saturating_mul(keys.unsigned_abs()).saturating_mul(4)
        }
        _ if operators::is_convolution(&node.operator) => {
            // The weight is (out, in / groups, ...kernel).
            let kernel = shape(node.tensor("weight")).map_or(0, |weight| elements(weight.get(1..).unwrap_or(&[])));
            made.saturating_mul(kernel).saturating_mul(2)
        }
        _ if operators::is_norm(&node.operator) => made.saturating_mul(5),
        _ if operators::is_view(&node.operator) || node.operator.starts_with("python::") => 0,
        _ => made,
    }
}

pub(crate) fn elements(shape: &[i64]) -> u64 {
    shape.iter().fold(1, |product, size| product.saturating_mul(size.unsigned_abs()))
}

/// Each made element sums over the last dimension of the left operand.
fn sums(made: u64, left: Option<Vec<i64>>) -> u64 {
    let length = left.and_then(|left| left.last().copied()).map_or(0, i64::unsigned_abs);
    made.saturating_mul(length).saturating_mul(2)
}
