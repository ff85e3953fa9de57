//! What is wrong with a message, field by field: a path, a sentence, and the line of the text it was read from where there is one.

use std::fmt;

/// One mistake in one field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Where: `data.train.path`, `stages[1].until.max_epochs`; empty for the whole message.
    pub path: String,
    /// What is wrong, what is allowed, and what to do: lowercase, no full stop.
    pub message: String,
    /// Line in the text, from 1. `None`: not read from text.
    pub line: Option<usize>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if let Some(line) = self.line {
            write!(f, " (line {line})")?;
        }
        Ok(())
    }
}

/// Every mistake in one message, in the order they were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Violations(pub Vec<Violation>);

impl Violations {
    /// One mistake.
    #[must_use]
    pub fn one(path: impl Into<String>, message: impl Into<String>) -> Self {
        let mut violations = Self::default();
        violations.push(path, message);
        violations
    }

    /// Adds a mistake that has no line.
    pub fn push(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.push_at(path, message, None);
    }

    /// Adds a mistake found at a line, from 1.
    pub fn push_at(&mut self, path: impl Into<String>, message: impl Into<String>, line: Option<usize>) {
        self.0.push(Violation { path: path.into(), message: message.into(), line });
    }

    /// Adds the mistakes of a nested message, with `prefix` before each path.
    pub fn extend_under(&mut self, prefix: &str, nested: Self) {
        self.0.extend(nested.under(prefix).0);
    }

    /// The same mistakes with `prefix` before each path.
    #[must_use]
    pub fn under(mut self, prefix: &str) -> Self {
        for violation in &mut self.0 {
            violation.path = join(prefix, &violation.path);
        }
        self
    }

    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `value` where nothing is wrong, else the mistakes.
    ///
    /// # Errors
    /// Where there is at least one mistake.
    pub fn or_ok<T>(self, value: T) -> Result<T, Self> {
        if self.is_empty() { Ok(value) } else { Err(self) }
    }
}

impl fmt::Display for Violations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, violation) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            violation.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Violations {}

/// `prefix.path`, or one of them where the other is empty; an index (`[2]`) follows without a dot.
#[must_use]
pub fn join(prefix: &str, path: &str) -> String {
    if prefix.is_empty() {
        path.to_owned()
    } else if path.is_empty() {
        prefix.to_owned()
    } else if path.starts_with('[') {
        format!("{prefix}{path}")
    } else {
        format!("{prefix}.{path}")
    }
}
