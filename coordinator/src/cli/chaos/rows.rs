//! What was measured, one plain line each: `chaos NAME p50=… p99=… n=… goal=…`, and what else belongs to it behind.

use serde::Serialize;
use std::fmt::Write as _;

/// What Thaw means to reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) enum Goal {
    None,
    /// Of all values.
    P50AndP99(f64, f64),
    P99(f64),
    /// The least of them.
    AtLeast(f64),
    /// The most of them.
    AtMost(f64),
}

/// One measurement. Times are seconds, the rest are counts and shares.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    values: Vec<f64>,
    goal: Goal,
    /// Name and value each.
    more: Vec<(&'static str, String)>,
}

impl Row {
    pub(super) fn new(name: impl Into<String>, values: Vec<f64>, goal: Goal) -> Self {
        Self { name: name.into(), values, goal, more: Vec::new() }
    }

    pub(super) fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        self.more.push((name, value.to_string()));
        self
    }

    pub(super) fn line(&self) -> String {
        let (p50, p99) = (number(self.percentile(50)), number(self.percentile(99)));
        let mut line = format!("chaos {} p50={p50} p99={p99} n={} goal={}", self.name, self.values.len(), self.goal());
        if let Some(met) = self.met() {
            let _infallible = write!(line, " met={}", if met { "yes" } else { "no" });
        }
        for (name, value) in &self.more {
            let _infallible = write!(line, " {name}={value}");
        }
        line
    }

    /// The least value that `percent` of all are not above. `None` without values.
    fn percentile(&self, percent: usize) -> Option<f64> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied()
    }

    fn goal(&self) -> String {
        match self.goal {
            Goal::None => "-".to_owned(),
            Goal::P50AndP99(p50, p99) => format!("p50<={p50},p99<={p99}"),
            Goal::P99(p99) => format!("p99<={p99}"),
            Goal::AtLeast(least) => format!(">={least}"),
            Goal::AtMost(most) => format!("<={most}"),
        }
    }

    fn met(&self) -> Option<bool> {
        let (p50, p99) = (self.percentile(50)?, self.percentile(99)?);
        match self.goal {
            Goal::None => None,
            Goal::P50AndP99(most, most_of_all) => Some(p50 <= most && p99 <= most_of_all),
            Goal::P99(most) => Some(p99 <= most),
            Goal::AtLeast(least) => Some(self.values.iter().all(|value| *value >= least)),
            Goal::AtMost(most) => Some(self.values.iter().all(|value| *value <= most)),
        }
    }
}

/// Four significant digits; `-` where there is none.
fn number(value: Option<f64>) -> String {
    let Some(value) = value else { return "-".to_owned() };
    if value == value.trunc() && value.abs() < 1e12 {
        return format!("{value:.0}");
    }
    match value.abs() {
        1000.0.. => format!("{value:.0}"),
        100.0.. => format!("{value:.1}"),
        10.0.. => format!("{value:.2}"),
        0.001.. => format!("{value:.4}"),
        _ => format!("{value:.3e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_one_line_with_its_percentiles() {
        let values = (1..=100).map(f64::from).collect();
        let row = Row::new("kill", values, Goal::P50AndP99(50.0, 98.0)).with("kept", 7);
        assert_eq!(row.line(), "chaos kill p50=50 p99=99 n=100 goal=p50<=50,p99<=98 met=no kept=7");
        assert_eq!(Row::new("none", Vec::new(), Goal::P99(1.0)).line(), "chaos none p50=- p99=- n=0 goal=p99<=1");
        let share = Row::new("share", vec![0.98765], Goal::AtLeast(0.95));
        assert_eq!(share.line(), "chaos share p50=0.9877 p99=0.9877 n=1 goal=>=0.95 met=yes");
    }
}
