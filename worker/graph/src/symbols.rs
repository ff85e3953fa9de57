//! Size expressions: integers over named symbols, as `torch.export` writes them.
//!
//! SYM-1: evaluation is exact; an overflow, a division by zero or an unknown symbol is an error, never a wrapped number.
//! SYM-2: unbacked symbols (`u0`, sizes that depend on data) parse, and [`Expr::unbacked`] names them; the reader refuses them.
//!
//! Two spellings occur in one archive: sympy's constructor form, `Mul(Integer(2), Symbol('s37', positive=True, integer=True))`, and infix
//! text, `2*s37 + 1`. One parser takes both.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Deepest nesting accepted, so that a hostile file cannot exhaust the stack.
const MAX_DEPTH: usize = 128;

/// Why an expression could not be read or evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("cannot read the size expression `{text}`: {reason}")]
    Syntax { text: String, reason: String },
    #[error("the size symbol `{name}` has no value for this batch")]
    UnknownSymbol { name: String },
    #[error("the size expression `{expression}` overflows 64 bits")]
    Overflow { expression: String },
    #[error("the size expression `{expression}` divides by zero")]
    DivisionByZero { expression: String },
}

/// An integer expression over symbols.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    Known(i64),
    Symbol(String),
    Add(Vec<Self>),
    Mul(Vec<Self>),
    /// Rounds towards minus infinity, as Python's `//`.
    FloorDiv(Box<Self>, Box<Self>),
    /// Has the sign of the divisor, as Python's `%`.
    Mod(Box<Self>, Box<Self>),
    Pow(Box<Self>, u32),
    Min(Vec<Self>),
    Max(Vec<Self>),
}

impl Expr {
    /// Reads constructor or infix text.
    ///
    /// # Errors
    /// [`Error::Syntax`] for anything but integers, symbols, `+ - * // % **`, `Min` and `Max`.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let mut parser = Parser { text, bytes: text.as_bytes(), position: 0, depth: 0 };
        let expression = parser.sum()?;
        parser.space();
        if parser.position < text.len() {
            return Err(parser.error("text follows the expression"));
        }
        Ok(expression)
    }

    /// The value, with `symbols` giving each symbol's.
    ///
    /// # Errors
    /// Where a symbol has no value, a divisor is zero or the result leaves 64 bits.
    pub fn eval(&self, symbols: &BTreeMap<String, i64>) -> Result<i64, Error> {
        let overflow = || Error::Overflow { expression: self.to_string() };
        match self {
            Self::Known(value) => Ok(*value),
            Self::Symbol(name) => symbols.get(name).copied().ok_or_else(|| Error::UnknownSymbol { name: name.clone() }),
            Self::Add(terms) => {
                terms.iter().try_fold(0_i64, |sum, term| sum.checked_add(term.eval(symbols)?).ok_or_else(overflow))
            }
            Self::Mul(factors) => factors
                .iter()
                .try_fold(1_i64, |product, factor| product.checked_mul(factor.eval(symbols)?).ok_or_else(overflow)),
            Self::FloorDiv(left, right) => {
                self.divide(left.eval(symbols)?, right.eval(symbols)?).map(|(quotient, _)| quotient)
            }
            Self::Mod(left, right) => {
                self.divide(left.eval(symbols)?, right.eval(symbols)?).map(|(_, remainder)| remainder)
            }
            Self::Pow(base, exponent) => base.eval(symbols)?.checked_pow(*exponent).ok_or_else(overflow),
            Self::Min(items) => Ok(evaluate_all(items, symbols)?.into_iter().min().unwrap_or(0)),
            Self::Max(items) => Ok(evaluate_all(items, symbols)?.into_iter().max().unwrap_or(0)),
        }
    }

    fn divide(&self, left: i64, right: i64) -> Result<(i64, i64), Error> {
        if right == 0 {
            return Err(Error::DivisionByZero { expression: self.to_string() });
        }
        floor_div(left, right)
            .zip(floor_mod(left, right))
            .ok_or_else(|| Error::Overflow { expression: self.to_string() })
    }

    /// Every symbol that occurs, in order of name.
    #[must_use]
    pub fn symbols(&self) -> BTreeSet<String> {
        let mut found = BTreeSet::new();
        self.collect(&mut found);
        found
    }

    fn collect(&self, found: &mut BTreeSet<String>) {
        match self {
            Self::Known(_) => {}
            Self::Symbol(name) => {
                found.insert(name.clone());
            }
            Self::Add(items) | Self::Mul(items) | Self::Min(items) | Self::Max(items) => {
                for item in items {
                    item.collect(found);
                }
            }
            Self::FloorDiv(left, right) | Self::Mod(left, right) => {
                left.collect(found);
                right.collect(found);
            }
            Self::Pow(base, _) => base.collect(found),
        }
    }

    /// The first symbol whose value depends on data (`u0`, `u1`, ...), if any.
    #[must_use]
    pub fn unbacked(&self) -> Option<String> {
        self.symbols().into_iter().find(|name| is_unbacked(name))
    }
}

fn is_unbacked(name: &str) -> bool {
    name.strip_prefix('u').is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

fn evaluate_all(items: &[Expr], symbols: &BTreeMap<String, i64>) -> Result<Vec<i64>, Error> {
    items.iter().map(|item| item.eval(symbols)).collect()
}

/// Python's `//` on integers; `None` for a zero divisor or overflow.
#[must_use]
pub fn floor_div(left: i64, right: i64) -> Option<i64> {
    let quotient = left.checked_div(right)?;
    let rounds_up = left % right != 0 && (left < 0) != (right < 0);
    Some(if rounds_up { quotient - 1 } else { quotient })
}

/// Python's `%` on integers; `None` for a zero divisor or overflow.
#[must_use]
pub fn floor_mod(left: i64, right: i64) -> Option<i64> {
    let remainder = left.checked_rem(right)?;
    let wrong_sign = remainder != 0 && (remainder < 0) != (right < 0);
    Some(if wrong_sign { remainder + right } else { remainder })
}

impl fmt::Display for Expr {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join =
            |items: &[Self], separator: &str| items.iter().map(ToString::to_string).collect::<Vec<_>>().join(separator);
        match self {
            Self::Known(value) => write!(formatter, "{value}"),
            Self::Symbol(name) => formatter.write_str(name),
            Self::Add(items) => write!(formatter, "({})", join(items, " + ")),
            Self::Mul(items) => formatter.write_str(&join(items, "*")),
            Self::FloorDiv(left, right) => write!(formatter, "({left} // {right})"),
            Self::Mod(left, right) => write!(formatter, "({left} % {right})"),
            Self::Pow(base, exponent) => write!(formatter, "({base})**{exponent}"),
            Self::Min(items) => write!(formatter, "Min({})", join(items, ", ")),
            Self::Max(items) => write!(formatter, "Max({})", join(items, ", ")),
        }
    }
}

struct Parser<'a> {
    text: &'a str,
    bytes: &'a [u8],
    position: usize,
    depth: usize,
}

impl Parser<'_> {
    fn error(&self, reason: &str) -> Error {
        Error::Syntax {
            text: self.text.chars().take(200).collect(),
            reason: format!("{reason} at column {}", self.position + 1),
        }
    }

    fn space(&mut self) {
        while self.bytes.get(self.position).is_some_and(u8::is_ascii_whitespace) {
            self.position += 1;
        }
    }

    fn eat(&mut self, token: &str) -> bool {
        self.space();
        let found = self.text[self.position..].starts_with(token);
        if found {
            self.position += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str) -> Result<(), Error> {
        if self.eat(token) { Ok(()) } else { Err(self.error(&format!("expected `{token}`"))) }
    }

    fn sum(&mut self) -> Result<Expr, Error> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error("nested too deeply"));
        }
        let mut terms = vec![self.product()?];
        loop {
            if self.eat("+") {
                terms.push(self.product()?);
            } else if self.eat("-") {
                let term = self.product()?;
                terms.push(Expr::Mul(vec![Expr::Known(-1), term]));
            } else {
                self.depth -= 1;
                return Ok(single(terms, Expr::Add));
            }
        }
    }

    fn product(&mut self) -> Result<Expr, Error> {
        let mut left = self.power()?;
        loop {
            if self.eat("//") {
                left = Expr::FloorDiv(Box::new(left), Box::new(self.power()?));
            } else if self.eat("%") {
                left = Expr::Mod(Box::new(left), Box::new(self.power()?));
            } else if self.eat("*") {
                let right = self.power()?;
                left = match left {
                    Expr::Mul(mut factors) => {
                        factors.push(right);
                        Expr::Mul(factors)
                    }
                    other => Expr::Mul(vec![other, right]),
                };
            } else {
                return Ok(left);
            }
        }
    }

    fn power(&mut self) -> Result<Expr, Error> {
        if self.eat("-") {
            self.depth += 1;
            if self.depth > MAX_DEPTH {
                return Err(self.error("nested too deeply"));
            }
            let inner = self.power()?;
            self.depth -= 1;
            return Ok(match inner {
                // A literal of -2^63 never occurs: sizes are small.
                Expr::Known(value) => {
                    Expr::Known(value.checked_neg().ok_or_else(|| self.error("number out of range"))?)
                }
                other => Expr::Mul(vec![Expr::Known(-1), other]),
            });
        }
        let base = self.atom()?;
        if self.eat("**") {
            let exponent = self.power()?;
            return self.raise(base, &exponent);
        }
        Ok(base)
    }

    fn raise(&self, base: Expr, exponent: &Expr) -> Result<Expr, Error> {
        let Expr::Known(exponent) = exponent else { return Err(self.error("an exponent must be a number")) };
        let exponent =
            u32::try_from(*exponent).map_err(|_| self.error("an exponent must be a small positive number"))?;
        Ok(Expr::Pow(Box::new(base), exponent))
    }

    fn atom(&mut self) -> Result<Expr, Error> {
        if self.eat("(") {
            let inner = self.sum()?;
            self.expect(")")?;
            return Ok(inner);
        }
        self.space();
        match self.bytes.get(self.position) {
            Some(byte) if byte.is_ascii_digit() => self.number().map(Expr::Known),
            Some(byte) if byte.is_ascii_alphabetic() || *byte == b'_' => self.named(),
            _ => Err(self.error("expected a number, a symbol or a function")),
        }
    }

    fn number(&mut self) -> Result<i64, Error> {
        let start = self.position;
        while self.bytes.get(self.position).is_some_and(u8::is_ascii_digit) {
            self.position += 1;
        }
        self.text[start..self.position].parse().map_err(|_| self.error("number out of range"))
    }

    fn word(&mut self) -> String {
        let start = self.position;
        while self
            .bytes
            .get(self.position)
            .is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'))
        {
            self.position += 1;
        }
        self.text[start..self.position].to_owned()
    }

    fn named(&mut self) -> Result<Expr, Error> {
        let word = self.word();
        if !self.eat("(") {
            return Ok(Expr::Symbol(word));
        }
        // Functions may carry their module: `torch.utils._sympy.functions.FloorDiv`.
        let function = word.rsplit('.').next().unwrap_or(&word);
        if function == "Symbol" {
            return self.symbol();
        }
        let arguments = self.arguments()?;
        self.call(function, arguments)
    }

    /// The rest of `Symbol('s37', positive=True, integer=True)`; the assumptions do not matter.
    fn symbol(&mut self) -> Result<Expr, Error> {
        self.space();
        let quote = match self.bytes.get(self.position) {
            Some(quote @ (b'\'' | b'"')) => *quote,
            _ => return Err(self.error("expected a quoted symbol name")),
        };
        self.position += 1;
        let start = self.position;
        while self.bytes.get(self.position).is_some_and(|byte| *byte != quote) {
            self.position += 1;
        }
        let name = self.text[start..self.position].to_owned();
        self.position += 1;
        while self.eat(",") {
            self.space();
            self.word();
            self.expect("=")?;
            self.space();
            self.word();
        }
        self.expect(")")?;
        if name.is_empty() {
            return Err(self.error("a symbol without a name"));
        }
        Ok(Expr::Symbol(name))
    }

    fn arguments(&mut self) -> Result<Vec<Expr>, Error> {
        let mut arguments = Vec::new();
        if self.eat(")") {
            return Ok(arguments);
        }
        loop {
            if self.assumption() {
                // `evaluate=False` and the like.
            } else {
                arguments.push(self.sum()?);
            }
            if self.eat(")") {
                return Ok(arguments);
            }
            self.expect(",")?;
        }
    }

    fn assumption(&mut self) -> bool {
        let start = self.position;
        self.space();
        let word = self.word();
        if !word.is_empty() && self.eat("=") {
            self.space();
            self.word();
            return true;
        }
        self.position = start;
        false
    }

    fn call(&self, function: &str, arguments: Vec<Expr>) -> Result<Expr, Error> {
        let two = |arguments: Vec<Expr>| {
            <[Expr; 2]>::try_from(arguments).map_err(|_| self.error(&format!("`{function}` takes two arguments")))
        };
        if arguments.is_empty() {
            return Err(self.error(&format!("`{function}` needs an argument")));
        }
        match function {
            "Integer" => match <[Expr; 1]>::try_from(arguments) {
                Ok([Expr::Known(value)]) => Ok(Expr::Known(value)),
                _ => Err(self.error("`Integer` takes one number")),
            },
            "Add" => Ok(single(arguments, Expr::Add)),
            "Mul" => Ok(single(arguments, Expr::Mul)),
            "Min" | "min" => Ok(single(arguments, Expr::Min)),
            "Max" | "max" => Ok(single(arguments, Expr::Max)),
            "FloorDiv" | "CleanDiv" => {
                two(arguments).map(|[left, right]| Expr::FloorDiv(Box::new(left), Box::new(right)))
            }
            "Mod" | "PythonMod" => two(arguments).map(|[left, right]| Expr::Mod(Box::new(left), Box::new(right))),
            "CeilToInt" | "TruncToInt" | "ToFloat" => {
                Err(self.error("sizes that go through floating point are not supported"))
            }
            "Pow" | "PowByNatural" => {
                let [base, exponent] = two(arguments)?;
                self.raise(base, &exponent)
            }
            other => Err(self.error(&format!("unknown function `{other}`"))),
        }
    }
}

fn single(mut items: Vec<Expr>, several: impl FnOnce(Vec<Expr>) -> Expr) -> Expr {
    if items.len() == 1 { items.remove(0) } else { several(items) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> i64 {
        let symbols = BTreeMap::from([("s37".to_owned(), 7), ("s5".to_owned(), 3)]);
        Expr::parse(text).unwrap().eval(&symbols).unwrap()
    }

    #[test]
    fn constructor_text_is_read() {
        assert_eq!(value("Symbol('s37', positive=True, integer=True)"), 7);
        assert_eq!(value("Pow(Symbol('s37', positive=True, integer=True), Integer(2))"), 49);
        assert_eq!(value("Mul(Integer(32), Symbol('s5', positive=True, integer=True), Integer(-1))"), -96);
        assert_eq!(value("FloorDiv(Add(Symbol('s37', integer=True), Integer(-1)), Integer(4))"), 1);
        assert_eq!(value("Max(Integer(1), Min(Symbol('s37'), Symbol('s5')))"), 3);
        assert_eq!(value("Add(Symbol('s37'), Integer(2), evaluate=False)"), 9);
    }

    #[test]
    fn infix_text_is_read() {
        assert_eq!(value("2*s37 - (s5 + 1)//2"), 12);
        assert_eq!(value("-s5 // 2"), -2);
        assert_eq!(value("-s5 % 2"), 1);
        assert_eq!(value("s5**2 + 1"), 10);
    }

    #[test]
    fn mistakes_are_typed() {
        assert!(matches!(Expr::parse("sqrt(s3)"), Err(Error::Syntax { .. })));
        assert!(matches!(Expr::parse("s3 s4"), Err(Error::Syntax { .. })));
        assert!(matches!(Expr::parse(&"(".repeat(10_000)), Err(Error::Syntax { .. })));
        assert!(matches!(Expr::parse(&"-".repeat(10_000)), Err(Error::Syntax { .. })));
        let none = BTreeMap::new();
        assert_eq!(Expr::parse("s9").unwrap().eval(&none), Err(Error::UnknownSymbol { name: "s9".to_owned() }));
        assert!(matches!(Expr::parse("1//(2-2)").unwrap().eval(&none), Err(Error::DivisionByZero { .. })));
        assert!(matches!(Expr::parse("9223372036854775807*2").unwrap().eval(&none), Err(Error::Overflow { .. })));
        assert_eq!(Expr::parse("u0 + s1").unwrap().unbacked(), Some("u0".to_owned()));
    }

    #[test]
    fn text_survives_a_round_trip() {
        for text in [
            "Mul(Integer(2), Add(Symbol('s5'), Integer(1)))",
            "(s37 // 2) % 3",
            "Min(s37, s5**2)",
            "Pow(Mul(Symbol('s5'), Integer(2)), Integer(3))",
        ] {
            let parsed = Expr::parse(text).unwrap();
            assert_eq!(value(&parsed.to_string()), value(text));
        }
    }
}
