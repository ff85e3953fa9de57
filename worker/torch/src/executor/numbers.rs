//! Arithmetic on sizes: the `python::*` nodes of a graph, as Python computes them.

use super::NumberOperand;

/// A number during a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Number {
    Int(i64),
    Float(f64),
    Bool(bool),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Function {
    Add,
    Sub,
    Mul,
    FloorDiv,
    TrueDiv,
    Mod,
    Pow,
    Neg,
    Pos,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    And,
    Or,
    Not,
    Max,
    Min,
    ToInt,
    ToFloat,
    Ceil,
    Floor,
    /// `b if a else c`.
    Choose,
}

impl Function {
    /// Found by a node's operator, e.g. `python::add`; `None` for what is not one.
    pub(crate) fn named(operator: &str) -> Option<Self> {
        Some(match operator.strip_prefix("python::")? {
            "add" => Self::Add,
            "sub" => Self::Sub,
            "mul" => Self::Mul,
            "floordiv" => Self::FloorDiv,
            "truediv" => Self::TrueDiv,
            "mod" => Self::Mod,
            "pow" | "pow_by_natural" => Self::Pow,
            "neg" => Self::Neg,
            "pos" => Self::Pos,
            "eq" => Self::Eq,
            "ne" => Self::Ne,
            "lt" => Self::Lt,
            "le" => Self::Le,
            "gt" => Self::Gt,
            "ge" => Self::Ge,
            "and" | "and_" => Self::And,
            "or" | "or_" => Self::Or,
            "not" | "not_" | "sym_not" => Self::Not,
            "max" | "sym_max" => Self::Max,
            "min" | "sym_min" => Self::Min,
            "int" | "sym_int" | "trunc" => Self::ToInt,
            "float" | "sym_float" => Self::ToFloat,
            "ceil" => Self::Ceil,
            "floor" => Self::Floor,
            "sym_ite" => Self::Choose,
            _ => return None,
        })
    }

    /// Applies it.
    pub(crate) fn apply(self, operands: &[Number]) -> Result<Number, String> {
        match (self, operands) {
            (Self::Choose, &[condition, a, b]) => Ok(if condition.real() == 0.0 { b } else { a }),
            (_, &[a]) => self.unary(a),
            (_, &[a, b]) => match (a, b) {
                (Number::Float(_), _) | (_, Number::Float(_)) => self.on_floats(a.real(), b.real()),
                _ => self.on_integers(a.integer(), b.integer()),
            },
            _ => Err(format!("{self:?} of {} numbers", operands.len())),
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "sizes are far below 2^53")]
    fn unary(self, a: Number) -> Result<Number, String> {
        Ok(match (self, a) {
            (Self::Neg, Number::Float(a)) => Number::Float(-a),
            (Self::Neg, a) => Number::Int(-a.integer()),
            (Self::Pos, a) => a,
            (Self::Not, a) => Number::Bool(a.real() == 0.0),
            (Self::ToFloat, a) => Number::Float(a.real()),
            (Self::ToInt, Number::Float(a)) => Number::Int(a.trunc() as i64),
            (Self::Ceil, Number::Float(a)) => Number::Int(a.ceil() as i64),
            (Self::Floor, Number::Float(a)) => Number::Int(a.floor() as i64),
            (Self::ToInt | Self::Ceil | Self::Floor, a) => Number::Int(a.integer()),
            _ => return Err(format!("{self:?} of one number")),
        })
    }

    fn on_integers(self, a: i64, b: i64) -> Result<Number, String> {
        let overflow = || format!("{self:?} of {a} and {b} overflows");
        let nonzero = || if b == 0 { Err(format!("{a} divided by zero")) } else { Ok(()) };
        Ok(match self {
            Self::Add => Number::Int(a.checked_add(b).ok_or_else(overflow)?),
            Self::Sub => Number::Int(a.checked_sub(b).ok_or_else(overflow)?),
            Self::Mul => Number::Int(a.checked_mul(b).ok_or_else(overflow)?),
            Self::FloorDiv => {
                nonzero()?;
                Number::Int(floor_div(a, b))
            }
            Self::Mod => {
                nonzero()?;
                Number::Int(a - floor_div(a, b) * b)
            }
            Self::TrueDiv => {
                nonzero()?;
                Number::Float(Number::Int(a).real() / Number::Int(b).real())
            }
            Self::Pow => {
                let exponent = u32::try_from(b).map_err(|_| format!("{a} to the power of {b}"))?;
                Number::Int(a.checked_pow(exponent).ok_or_else(overflow)?)
            }
            Self::Eq => Number::Bool(a == b),
            Self::Ne => Number::Bool(a != b),
            Self::Lt => Number::Bool(a < b),
            Self::Le => Number::Bool(a <= b),
            Self::Gt => Number::Bool(a > b),
            Self::Ge => Number::Bool(a >= b),
            Self::And => Number::Bool(a != 0 && b != 0),
            Self::Or => Number::Bool(a != 0 || b != 0),
            Self::Max => Number::Int(a.max(b)),
            Self::Min => Number::Int(a.min(b)),
            Self::Neg
            | Self::Pos
            | Self::Not
            | Self::ToInt
            | Self::ToFloat
            | Self::Ceil
            | Self::Floor
            | Self::Choose => {
                return Err(format!("{self:?} of two numbers"));
            }
        })
    }

    fn on_floats(self, a: f64, b: f64) -> Result<Number, String> {
        Ok(match self {
            Self::Add => Number::Float(a + b),
            Self::Sub => Number::Float(a - b),
            Self::Mul => Number::Float(a * b),
            Self::TrueDiv => Number::Float(a / b),
            Self::FloorDiv => Number::Float((a / b).floor()),
            Self::Mod => Number::Float(a - (a / b).floor() * b),
            Self::Pow => Number::Float(a.powf(b)),
            #[expect(clippy::float_cmp, reason = "Python compares them so")]
            Self::Eq => Number::Bool(a == b),
            #[expect(clippy::float_cmp, reason = "Python compares them so")]
            Self::Ne => Number::Bool(a != b),
            Self::Lt => Number::Bool(a < b),
            Self::Le => Number::Bool(a <= b),
            Self::Gt => Number::Bool(a > b),
            Self::Ge => Number::Bool(a >= b),
            Self::Max => Number::Float(a.max(b)),
            Self::Min => Number::Float(a.min(b)),
            Self::And
            | Self::Or
            | Self::Neg
            | Self::Pos
            | Self::Not
            | Self::ToInt
            | Self::ToFloat
            | Self::Ceil
            | Self::Floor
            | Self::Choose => {
                return Err(format!("{self:?} of two real numbers"));
            }
        })
    }
}

fn floor_div(a: i64, b: i64) -> i64 {
    let quotient = a.wrapping_div(b);
    if a % b != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient }
}

impl Number {
    pub(crate) fn integer(self) -> i64 {
        match self {
            Self::Int(value) => value,
            #[expect(clippy::cast_possible_truncation, reason = "sizes are far below 2^53")]
            Self::Float(value) => value as i64,
            Self::Bool(value) => i64::from(value),
        }
    }

    fn real(self) -> f64 {
        match self {
            #[expect(clippy::cast_precision_loss, reason = "sizes are far below 2^53")]
            Self::Int(value) => value as f64,
            Self::Float(value) => value,
            Self::Bool(value) => f64::from(u8::from(value)),
        }
    }
}

impl NumberOperand {
    /// The number, where it is not read from a value.
    pub(crate) fn literal(self) -> Option<Number> {
        match self {
            Self::Int(value) => Some(Number::Int(value)),
            Self::Float(value) => Some(Number::Float(value)),
            Self::Bool(value) => Some(Number::Bool(value)),
            Self::Value(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divisions_round_down_as_in_python() {
        for (a, b, quotient, rest) in [(7, 2, 3, 1), (-7, 2, -4, 1), (7, -2, -4, -1), (-7, -2, 3, -1), (6, -2, -3, 0)] {
            let numbers = [Number::Int(a), Number::Int(b)];
            assert_eq!(Function::FloorDiv.apply(&numbers), Ok(Number::Int(quotient)));
            assert_eq!(Function::Mod.apply(&numbers), Ok(Number::Int(rest)));
        }
        assert!(Function::FloorDiv.apply(&[Number::Int(1), Number::Int(0)]).is_err());
        assert_eq!(Function::TrueDiv.apply(&[Number::Int(1), Number::Int(2)]), Ok(Number::Float(0.5)));
        assert_eq!(Function::Mul.apply(&[Number::Float(0.5), Number::Int(8)]), Ok(Number::Float(4.0)));
    }

    #[test]
    fn every_operator_that_the_reader_makes_is_known() {
        for (_, name) in thaw_graph::operators::PYTHON {
            assert!(Function::named(&format!("python::{name}")).is_some(), "{name}");
        }
        let chosen = Function::Choose.apply(&[Number::Bool(false), Number::Int(1), Number::Int(2)]);
        assert_eq!(chosen, Ok(Number::Int(2)));
    }
}
