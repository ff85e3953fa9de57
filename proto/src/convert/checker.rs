//! Collects every mistake of a message while it is read: a path, the violations so far, and one method per kind of rule.
//!
//! After a mistake a method answers with a stand-in, so that reading goes on; [`Checker::finish`] lets no stand-in out.

use super::WireEnum;
use crate::violation::{Violations, join};
use std::fmt;
use std::ops::RangeInclusive;
use url::Url;

/// Schemes the object store knows, besides `file`.
const REMOTE_SCHEMES: [&str; 11] =
    ["s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "http", "https", "memory"];

#[derive(Debug, Default)]
pub(super) struct Checker {
    path: String,
    violations: Violations,
}

/// Finite numbers between two bounds, each of which may be excluded.
#[derive(Debug, Clone, Copy)]
pub(super) enum Interval {
    /// `(0, ∞)`
    Positive,
    /// `[low, high]`
    Closed(f64, f64),
    /// `[low, high)`
    RightOpen(f64, f64),
    /// `(low, high]`
    LeftOpen(f64, f64),
}

impl Interval {
    fn contains(self, value: f64) -> bool {
        value.is_finite()
            && match self {
                Self::Positive => value > 0.0,
                Self::Closed(low, high) => low <= value && value <= high,
                Self::RightOpen(low, high) => low <= value && value < high,
                Self::LeftOpen(low, high) => low < value && value <= high,
            }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Positive => f.write_str("a finite number > 0"),
            Self::Closed(low, high) => write!(f, "in [{low}, {high}]"),
            Self::RightOpen(low, high) => write!(f, "in [{low}, {high})"),
            Self::LeftOpen(low, high) => write!(f, "in ({low}, {high}]"),
        }
    }
}

impl Checker {
    /// `value` where nothing was wrong.
    pub(super) fn finish<T>(self, value: T) -> Result<T, Violations> {
        self.violations.or_ok(value)
    }

    /// Notes a mistake in `field` of the message being read.
    pub(super) fn refuse(&mut self, field: &str, message: impl Into<String>) {
        self.violations.push(join(&self.path, field), message);
    }

    /// The value, or a stand-in and the mistakes that kept it away.
    pub(super) fn collect<T: Default>(&mut self, result: Result<T, Violations>) -> T {
        result.unwrap_or_else(|mistakes| {
            self.violations.extend_under(&self.path, mistakes);
            T::default()
        })
    }

    /// Reads a nested message: paths get `segment` as a prefix meanwhile.
    pub(super) fn within<T>(&mut self, segment: &str, read: impl FnOnce(&mut Self) -> T) -> T {
        let outer = self.path.len();
        self.path = join(&self.path, segment);
        let value = read(self);
        self.path.truncate(outer);
        value
    }

    /// Reads every element of a repeated message.
    pub(super) fn each<M, T>(
        &mut self,
        field: &str,
        messages: &[M],
        mut read: impl FnMut(&mut Self, &M) -> T,
    ) -> Vec<T> {
        let mut values = Vec::with_capacity(messages.len());
        for (index, message) in messages.iter().enumerate() {
            values.push(self.within(&format!("{field}[{index}]"), |at| read(at, message)));
        }
        values
    }

    /// A whole number with a default.
    pub(super) fn whole(&mut self, field: &str, value: Option<u32>, range: RangeInclusive<u32>, default: u32) -> u32 {
        match value {
            None => default,
            Some(value) if range.contains(&value) => value,
            Some(value) => {
                let (low, high) = range.into_inner();
                self.refuse(field, format!("must be in {low}-{high}, not {value}; leave it out for {default}"));
                default
            }
        }
    }

    /// A whole number that may be absent; `absent` says what that means.
    pub(super) fn whole_or_none(
        &mut self,
        field: &str,
        value: Option<u32>,
        range: RangeInclusive<u32>,
        absent: &str,
    ) -> Option<u32> {
        let value = value?;
        if !range.contains(&value) {
            let (low, high) = range.into_inner();
            self.refuse(field, format!("must be in {low}-{high}, not {value}; leave it out for {absent}"));
        }
        Some(value)
    }

    /// A number with a default.
    pub(super) fn real(&mut self, field: &str, value: Option<f64>, interval: Interval, default: f64) -> f64 {
        match value {
            None => default,
            Some(value) if interval.contains(value) => value,
            Some(value) => {
                self.refuse(field, format!("must be {interval}, not {value}; leave it out for {default}"));
                default
            }
        }
    }

    /// A number that may be absent; `absent` says what that means.
    pub(super) fn real_or_none(
        &mut self,
        field: &str,
        value: Option<f64>,
        interval: Interval,
        absent: &str,
    ) -> Option<f64> {
        let value = value?;
        if !interval.contains(value) {
            self.refuse(field, format!("must be {interval}, not {value}; leave it out for {absent}"));
        }
        Some(value)
    }

    /// An enum that may be absent.
    pub(super) fn choice<E: WireEnum>(&mut self, field: &str, number: i32) -> Option<E> {
        if let Some(value) = E::from_number(number) {
            return value;
        }
        self.refuse(field, format!("{number} is not a known value: use one of {}", E::names().join(", ")));
        None
    }

    /// A name: 1-63 characters of `[a-z0-9-]`, a letter first.
    pub(super) fn name(&mut self, field: &str, text: &str) -> String {
        let starts_well = text.starts_with(|first: char| first.is_ascii_lowercase());
        let reads_well = text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        if text.is_empty() {
            self.refuse(field, "is required: 1-63 characters of [a-z0-9-], starting with a letter");
        } else if !starts_well || !reads_well || text.len() > 63 {
            self.refuse(
                field,
                format!("must be 1-63 characters of [a-z0-9-], starting with a letter, not {}", quote(text)),
            );
        }
        text.to_owned()
    }

    /// A required text; `what` says which.
    pub(super) fn text(&mut self, field: &str, text: &str, what: &str) -> String {
        if text.is_empty() {
            self.refuse(field, format!("is required: {what}"));
        }
        text.to_owned()
    }

    /// A text that has no meaning here.
    pub(super) fn no_text(&mut self, field: &str, text: &str, why: &str) {
        if !text.is_empty() {
            self.refuse(field, format!("must be absent {why}: remove it"));
        }
    }

    /// A required URL; an absolute path stands for its `file` URL.
    pub(super) fn url(&mut self, field: &str, text: &str, what: &str) -> Url {
        if text.is_empty() {
            self.refuse(field, format!("is required: {what}"));
        }
        self.url_or_none(field, text).unwrap_or_else(|| Url::parse("file:///").expect("is a URL"))
    }

    /// A URL that may be absent (empty).
    pub(super) fn url_or_none(&mut self, field: &str, text: &str) -> Option<Url> {
        if text.is_empty() {
            return None;
        }
        match parse_url(text) {
            Ok(url) => Some(url),
            Err(mistake) => {
                self.refuse(field, mistake);
                None
            }
        }
    }

    /// A regular expression.
    pub(super) fn pattern(&mut self, field: &str, pattern: &str) {
        if let Err(error) = regex::Regex::new(pattern) {
            // The last line says what is wrong; those above draw the pattern.
            let text = error.to_string();
            let cause = text.lines().last().unwrap_or_default().trim().trim_start_matches("error: ").to_owned();
            self.refuse(field, format!("{} is not a regular expression (Rust regex syntax): {cause}", quote(pattern)));
        }
    }
}

fn parse_url(text: &str) -> Result<Url, String> {
    if text.starts_with('/') {
        return Url::from_file_path(text).map_err(|()| format!("{} is not a path", quote(text)));
    }
    if !text.contains("://") {
        return Err(format!("must be a URL or an absolute path, not {}: write file:///... or /...", quote(text)));
    }
    let url = Url::parse(text).map_err(|error| format!("{} is not a URL: {error}", quote(text)))?;
    if url.password().is_some() {
        return Err("must not hold a password: give credentials to the server and the workers".to_owned());
    }
    if url.scheme() == "file" {
        if let Some(host) = url.host_str() {
            return Err(format!("names the host {}: a file URL has three slashes (file:///...)", quote(host)));
        }
    } else if !REMOTE_SCHEMES.contains(&url.scheme()) {
        return Err(format!("has the unknown scheme {}: use file, s3, gs, az or https", quote(url.scheme())));
    }
    Ok(url)
}

/// The text in quotes, cut where it is long.
pub(crate) fn quote(text: &str) -> String {
    const LONGEST: usize = 80;
    if text.chars().count() <= LONGEST {
        format!("{text:?}")
    } else {
        format!("{:?}...", text.chars().take(LONGEST).collect::<String>())
    }
}
