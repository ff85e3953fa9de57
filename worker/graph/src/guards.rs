//! Conditions that the exporter wrote down about input sizes.
//!
//! GUARD-1: a guard is checked per batch on sizes alone, before any operator runs.
//! GUARD-2: a condition that cannot be read is never guessed at: it becomes a note on the graph.

use std::collections::BTreeMap;
use std::fmt;

use crate::ir::{Dim, Graph};
use crate::symbols::{self, Expr};

/// Why a batch does not fit the graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the graph takes {expected} inputs and the batch has {actual}: give one tensor for each of {names}")]
    InputCount { expected: usize, actual: usize, names: String },
    #[error(
        "the input `{input}` has {actual} dimensions and the graph was exported with {expected}: reshape the input or export again"
    )]
    Rank { input: String, expected: usize, actual: usize },
    #[error(
        "dimension {dimension} of the input `{input}` is {actual} and must be {expected}: change the input or export with that dimension dynamic"
    )]
    Size { input: String, dimension: usize, expected: i64, actual: i64 },
    #[error(
        "dimension {dimension} of the input `{input}` is {actual} and must be between {min} and {max}: change the input or export with a wider range"
    )]
    Range { input: String, dimension: usize, min: i64, max: String, actual: i64 },
    #[error(
        "the batch breaks the exported condition `{guard}`: change the input sizes or export with wider dynamic shapes"
    )]
    Guard { guard: String },
    #[error("cannot evaluate a size of the batch")]
    Symbol(#[from] symbols::Error),
}

/// How two sizes must compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

impl Relation {
    const SPELLINGS: [(&'static str, Self); 6] = [
        ("==", Self::Equal),
        ("!=", Self::NotEqual),
        ("<=", Self::LessOrEqual),
        (">=", Self::GreaterOrEqual),
        ("<", Self::Less),
        (">", Self::Greater),
    ];

    /// Whether `left` stands in this relation to `right`.
    #[must_use]
    pub fn holds(self, left: i64, right: i64) -> bool {
        match self {
            Self::Equal => left == right,
            Self::NotEqual => left != right,
            Self::Less => left < right,
            Self::LessOrEqual => left <= right,
            Self::Greater => left > right,
            Self::GreaterOrEqual => left >= right,
        }
    }
}

impl fmt::Display for Relation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Equal => "==",
            Self::NotEqual => "!=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
        })
    }
}

/// One comparison of two size expressions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    pub left: Expr,
    pub relation: Relation,
    pub right: Expr,
}

impl fmt::Display for Guard {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {}", self.left, self.relation, self.right)
    }
}

impl Guard {
    /// Reads one line of the archive's `guards_code`, such as `L['input_ids'].size()[1] <= 512`; `size` gives the expression of an input's
    /// dimension. `None`: a form this reader does not know.
    pub(crate) fn parse(text: &str, size: impl Fn(&str, usize) -> Option<Expr>) -> Option<Self> {
        let plain = substitute(text, size)?;
        let (spelling, relation) = Relation::SPELLINGS.into_iter().find(|(spelling, _)| plain.contains(spelling))?;
        let (left, right) = plain.split_once(spelling)?;
        Some(Self { left: Expr::parse(left).ok()?, relation, right: Expr::parse(right).ok()? })
    }

    /// Whether the batch with these symbols meets it.
    ///
    /// # Errors
    /// As [`Expr::eval`].
    pub fn holds(&self, symbols: &BTreeMap<String, i64>) -> Result<bool, symbols::Error> {
        Ok(self.relation.holds(self.left.eval(symbols)?, self.right.eval(symbols)?))
    }
}

/// Replaces each `L['name'].size()[dimension]` by the expression for it.
fn substitute(text: &str, size: impl Fn(&str, usize) -> Option<Expr>) -> Option<String> {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("L['") {
        let (name, after) = after.split_once("'].size()[")?;
        let (dimension, after) = after.split_once(']')?;
        let expression = size(name, dimension.parse().ok()?)?;
        plain.push_str(before);
        plain.push('(');
        plain.push_str(&expression.to_string());
        plain.push(')');
        rest = after;
    }
    plain.push_str(rest);
    Some(plain)
}

/// Binds every symbol of `graph` from the sizes of a batch, one shape per graph input, and checks ranges, fixed sizes and guards.
///
/// # Errors
/// The first condition that the batch breaks, by name.
pub fn bind(graph: &Graph, shapes: &[Vec<i64>]) -> Result<BTreeMap<String, i64>, Error> {
    let names: Vec<&str> = graph.inputs.iter().map(|input| input.name.as_str()).collect();
    if shapes.len() != names.len() {
        return Err(Error::InputCount { expected: names.len(), actual: shapes.len(), names: names.join(", ") });
    }
    for (input, shape) in shapes.iter().enumerate() {
        let expected = dimensions(graph, input).len();
        if shape.len() != expected {
            return Err(Error::Rank { input: names[input].to_owned(), expected, actual: shape.len() });
        }
    }
    let mut bound = BTreeMap::new();
    for (symbol, &(input, dimension)) in &graph.symbol_sources {
        let value = shapes[input][dimension];
        let range = graph.symbols.get(symbol);
        let (min, max) = range.map_or((0, None), |range| (range.min, range.max));
        if value < min || max.is_some_and(|max| value > max) {
            let max = max.map_or_else(|| "any size".to_owned(), |max| max.to_string());
            return Err(Error::Range { input: names[input].to_owned(), dimension, min, max, actual: value });
        }
        bound.insert(symbol.clone(), value);
    }
    for (input, shape) in shapes.iter().enumerate() {
        for (dimension, (size, &actual)) in dimensions(graph, input).iter().zip(shape).enumerate() {
            let expected = match size {
                Dim::Known(size) => *size,
                Dim::Symbolic(expression) => expression.eval(&bound)?,
            };
            if expected != actual {
                return Err(Error::Size { input: names[input].to_owned(), dimension, expected, actual });
            }
        }
    }
    for guard in &graph.guards {
        if !guard.holds(&bound)? {
            return Err(Error::Guard { guard: guard.to_string() });
        }
    }
    Ok(bound)
}

fn dimensions(graph: &Graph, input: usize) -> &[Dim] {
    let value = graph.inputs[input].value;
    graph.values[value.0 as usize].tensor.as_ref().map_or(&[], |tensor| &tensor.shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(name: &str, dimension: usize) -> Option<Expr> {
        (name == "x").then(|| Expr::Symbol(format!("s{dimension}")))
    }

    #[test]
    fn exported_lines_are_read() {
        let symbols = BTreeMap::from([("s0".to_owned(), 4), ("s1".to_owned(), 17)]);
        let holds = |text: &str| Guard::parse(text, size).map(|guard| guard.holds(&symbols).unwrap());
        assert_eq!(holds("L['x'].size()[1] <= 512"), Some(true));
        assert_eq!(holds("L['x'].size()[1] == L['x'].size()[0]"), Some(false));
        assert_eq!(holds("L['x'].size()[1] + ((-1)*L['x'].size()[0]) <= 0"), Some(false));
        assert_eq!(holds("min(8*L['x'].size()[1], 16*L['x'].size()[1]) == (8*L['x'].size()[1])"), Some(true));
        assert_eq!(holds("((L['x'].size()[0]*3) % L['x'].size()[0]) == 0"), Some(true));
        assert_eq!(holds("L['y'].size()[1] <= 512"), None);
        assert_eq!(holds("isinstance(L['x'], int)"), None);
    }
}
