//! What was measured, one plain line each: `chaos NAME p50=… p99=… n=… goal=…`.

/// Values of one row, and the most that is meant for it.
pub(crate) struct Row {
    name: String,
    values: Vec<f64>,
    /// Of all values, or of their 99th percentile: with few they are the same.
    goal: Option<f64>,
    more: String,
}

impl Row {
    pub(crate) fn new(name: impl Into<String>, values: Vec<f64>, goal: Option<f64>) -> Self {
        Self { name: name.into(), values, goal, more: String::new() }
    }

    pub(crate) fn with(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.more.push_str(&format!(" {name}={value}"));
        self
    }

    /// The least value that `percent` of all are not above.
    fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        sorted.get((sorted.len() * percent).div_ceil(100).max(1) - 1).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn line(&self) -> String {
        let (p50, p99) = (self.percentile(50), self.percentile(99));
        let (goal, met) = match self.goal {
            Some(most) => (format!("p99<={most}"), if p99 <= most { " met=yes" } else { " met=no" }),
            None => ("-".to_owned(), ""),
        };
        format!("chaos {} p50={p50:.4} p99={p99:.4} n={} goal={goal}{met}{}", self.name, self.values.len(), self.more)
    }

    /// To stdout, at once.
    #[expect(clippy::print_stdout, reason = "results belong on stdout")]
    pub(crate) fn print(&self) {
        println!("{}", self.line());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_one_line() {
        let values = (1..=200).map(f64::from).collect();
        let row = Row::new("gang", values, Some(198.0)).with("unit", "s");
        assert_eq!(row.line(), "chaos gang p50=100.0000 p99=198.0000 n=200 goal=p99<=198 met=yes unit=s");
        assert_eq!(Row::new("one", vec![0.5], None).line(), "chaos one p50=0.5000 p99=0.5000 n=1 goal=-");
    }
}
