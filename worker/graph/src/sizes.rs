//! Sizes of a graph's values at a text length that is not the exported example's.

use std::collections::BTreeMap;

use crate::cost::elements;
use crate::ir::{Graph, ValueId};

/// Sizes of values.
pub(crate) struct Sizes<'a> {
    graph: &'a Graph,
    symbols: BTreeMap<String, i64>,
    /// Samples in the exported example.
    pub(crate) batch: u64,
}

impl<'a> Sizes<'a> {
    pub(crate) fn of(graph: &'a Graph, tokens: Option<u64>) -> Self {
        let mut symbols: BTreeMap<String, i64> =
            graph.symbols.iter().map(|(name, symbol)| (name.clone(), symbol.hint)).collect();
        for (name, &(_, dimension)) in &graph.symbol_sources {
            if let (1, Some(tokens)) = (dimension, tokens) {
                symbols.insert(name.clone(), i64::try_from(tokens).unwrap_or(i64::MAX));
            }
        }
        let mut sizes = Self { graph, symbols, batch: 1 };
        let first = graph.inputs.first().and_then(|input| sizes.shape(input.value));
        sizes.batch = first.and_then(|shape| shape.first().copied()).map_or(1, |size| size.unsigned_abs().max(1));
        sizes
    }

    pub(crate) fn shape(&self, value: ValueId) -> Option<Vec<i64>> {
        self.graph.shape_at(value, &self.symbols)
    }

    /// Of one sample.
    pub(crate) fn elements(&self, value: ValueId) -> u64 {
        self.shape(value).map_or(0, |shape| elements(&shape)) / self.batch
    }

    /// Of one sample.
    pub(crate) fn bytes(&self, value: ValueId) -> u64 {
        let size = self.graph.value(value).tensor.as_ref().map_or(0, |tensor| tensor.dtype.size() as u64);
        self.elements(value).saturating_mul(size)
    }
}
