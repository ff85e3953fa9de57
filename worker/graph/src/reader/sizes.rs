//! Symbols: what they are, where a batch gives them, and arithmetic on them.

use std::collections::BTreeMap;

use super::{Error, Reader};
use crate::ir::{Arg, Argument, Dim, Node, Symbol, TensorMeta, ValueId};
use crate::schema::{self, Hint, Program, SymInt};
use crate::symbols::Expr;

/// The exporter's lower bound for every dynamic size, because it treats 0 and 1 specially while tracing; it does not ask for it at run time.
const TRACING_MINIMUM: i64 = 2;

/// All symbols with their ranges and export-time values.
pub(super) fn symbols(program: &Program) -> Result<BTreeMap<String, Symbol>, Error> {
    let mut symbols = BTreeMap::new();
    for (name, range) in &program.range_constraints {
        if let Some(symbol) = Expr::Symbol(name.clone()).unbacked() {
            return Err(Error::DataDependent { value: "range_constraints".to_owned(), symbol });
        }
        let min = match range.min_val {
            None => 0,
            Some(TRACING_MINIMUM) => 1,
            Some(min) => min,
        };
        symbols.insert(name.clone(), Symbol { min, max: range.max_val, hint: min.max(1) });
    }
    let graph = &program.graph_module.graph;
    let sizes = graph.tensor_values.iter().flat_map(|(name, meta)| meta.sizes.iter().map(move |size| (name, size)));
    for (value, size) in sizes.chain(&graph.sym_int_values) {
        let (Expr::Symbol(name), SymInt::AsExpr(expr)) = (expression(value, size)?, size) else { continue };
        let entry = symbols.entry(name).or_insert(Symbol { min: 1, max: None, hint: 1 });
        if let Some(Hint::AsInt(hint)) = expr.hint {
            entry.hint = hint;
        }
    }
    Ok(symbols)
}

/// A size as an expression.
pub(super) fn expression(value: &str, size: &SymInt) -> Result<Expr, Error> {
    match size {
        SymInt::AsInt(known) => Ok(Expr::Known(*known)),
        SymInt::AsExpr(expr) => {
            let expression =
                Expr::parse(&expr.expr_str).map_err(|source| Error::Size { value: value.to_owned(), source })?;
            match expression.unbacked() {
                None => Ok(expression),
                Some(symbol) => Err(Error::DataDependent { value: value.to_owned(), symbol }),
            }
        }
    }
}

/// dtype and shape of a tensor value; only the dense layout is supported.
pub(super) fn tensor_meta(value: &str, meta: &schema::TensorMeta) -> Result<TensorMeta, Error> {
    let number = |what, number| Error::Number { what, number, place: value.to_owned() };
    if meta.layout != schema::STRIDED {
        return Err(number("a layout", meta.layout));
    }
    let dtype = schema::dtype(meta.dtype).ok_or_else(|| number("a dtype", meta.dtype))?;
    let shape = meta.sizes.iter().map(|size| {
        Ok(match expression(value, size)? {
            Expr::Known(known) => Dim::Known(known),
            symbolic => Dim::Symbolic(symbolic),
        })
    });
    Ok(TensorMeta { dtype, shape: shape.collect::<Result<_, Error>>()? })
}

impl Reader {
    /// Finds, for each symbol, the input dimension that is just it.
    pub(super) fn find_symbol_sources(&mut self) {
        for (input, given) in self.graph.inputs.iter().enumerate() {
            let shape = self.graph.values[given.value.0 as usize].tensor.as_ref().map_or(&[][..], |meta| &meta.shape);
            for (dimension, size) in shape.iter().enumerate() {
                if let Dim::Symbolic(Expr::Symbol(name)) = size {
                    self.graph.symbol_sources.entry(name.clone()).or_insert((input, dimension));
                }
            }
        }
    }

    /// Makes `value` hold `expression` by arithmetic on input sizes. `false`: a symbol has no input dimension of its own, or the arithmetic has
    /// no operator here, and nothing was added.
    pub(super) fn emit(&mut self, expression: &Expr, value: ValueId, module: &str) -> Result<bool, Error> {
        let is_bound = expression.symbols().iter().all(|name| self.graph.symbol_sources.contains_key(name));
        if !is_bound || matches!(expression, Expr::Known(_)) {
            return Ok(false);
        }
        self.emit_into(expression, value, module)?;
        Ok(true)
    }

    fn emit_into(&mut self, expression: &Expr, value: ValueId, module: &str) -> Result<(), Error> {
        let (operator, items): (&str, Vec<Expr>) = match expression {
            Expr::Symbol(name) => {
                let (input, dimension) = self.graph.symbol_sources[name];
                let node =
                    sym_size(self.graph.inputs[input].value, dimension, value, module, &self.graph.value(value).name);
                self.graph.nodes.push(node);
                self.symbol_values.entry(name.clone()).or_insert(value);
                return Ok(());
            }
            // Written as a sum with nothing, so that every value has a node.
            Expr::Known(known) => ("add", vec![Expr::Known(*known), Expr::Known(0)]),
            Expr::Add(items) => ("add", items.clone()),
            Expr::Mul(items) => ("mul", items.clone()),
            Expr::FloorDiv(left, right) => ("floordiv", vec![(**left).clone(), (**right).clone()]),
            Expr::Mod(left, right) => ("mod", vec![(**left).clone(), (**right).clone()]),
            Expr::Pow(base, exponent) => ("pow", vec![(**base).clone(), Expr::Known(i64::from(*exponent))]),
            Expr::Min(items) => ("sym_min", items.clone()),
            Expr::Max(items) => ("sym_max", items.clone()),
        };
        let mut left = self.operand(&items[0], module)?;
        let last = items.len() - 1;
        for (index, item) in items.iter().enumerate().skip(1) {
            let right = self.operand(item, module)?;
            let result = if index == last { value } else { self.number_value()? };
            self.graph.nodes.push(python(operator, left, right, result, module, &self.graph.value(result).name));
            left = Arg::SymInt(result);
        }
        Ok(())
    }

    fn operand(&mut self, expression: &Expr, module: &str) -> Result<Arg, Error> {
        if let Expr::Known(known) = expression {
            return Ok(Arg::Int(*known));
        }
        if let Expr::Symbol(name) = expression
            && let Some(&value) = self.symbol_values.get(name)
        {
            return Ok(Arg::SymInt(value));
        }
        let value = self.number_value()?;
        self.emit_into(expression, value, module)?;
        Ok(Arg::SymInt(value))
    }

    fn number_value(&mut self) -> Result<ValueId, Error> {
        let name = format!("thaw_size_{}", self.graph.values.len());
        self.add_value(&name, None)
    }
}

fn sym_size(input: ValueId, dimension: usize, value: ValueId, module: &str, name: &str) -> Node {
    Node {
        operator: "aten::sym_size".to_owned(),
        overload: "int".to_owned(),
        arguments: vec![
            Argument { name: "self".to_owned(), value: Arg::Tensor(input) },
            Argument { name: "dim".to_owned(), value: Arg::Int(dimension as i64) },
        ],
        outputs: vec![Some(value)],
        module: module.to_owned(),
        name: name.to_owned(),
    }
}

fn python(operator: &str, left: Arg, right: Arg, result: ValueId, module: &str, name: &str) -> Node {
    Node {
        operator: format!("python::{operator}"),
        overload: String::new(),
        arguments: vec![
            Argument { name: "a".to_owned(), value: left },
            Argument { name: "b".to_owned(), value: right },
        ],
        outputs: vec![Some(result)],
        module: module.to_owned(),
        name: name.to_owned(),
    }
}
