//! YAML (and so JSON) as a tree of nodes with lines. Limits: 1 MiB, 32 levels, one document, no anchors, aliases or tags.

use crate::violation::Violations;
use saphyr_parser::{Event, Parser, ScalarStyle, Span};
use std::borrow::Cow;

const MOST_BYTES: usize = 1 << 20;
const MOST_LEVELS: usize = 32;

/// A value and the line it starts at, from 1.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

#[derive(Debug)]
pub(super) enum Value {
    /// A word without quotes: its text decides what it is.
    Plain(String),
    /// A text in quotes or a block text.
    Quoted(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

#[derive(Debug)]
pub(super) struct Key {
    pub(super) line: usize,
    pub(super) text: String,
}

impl Node {
    /// Whether it stands for "absent": nothing, `~` or `null`.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.value, Value::Plain(text) if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }
}

/// The text's one document.
pub(super) fn parse(text: &str) -> Result<Node, Violations> {
    if text.len() > MOST_BYTES {
        return Err(Violations::one("", format!("the text has {} bytes: at most {MOST_BYTES} are read", text.len())));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let text = if is_json(text) { Cow::Owned(json_to_yaml(text)) } else { Cow::Borrowed(text) };
    let mut builder = Builder::default();
    let mut parser = Parser::new_from_str(&text);
    while let Some(next) = parser.next_event() {
        match next {
            Ok((event, span)) => builder.take(event, span)?,
            Err(error) => {
                return Err(refusal(error.marker().line(), &format!("is neither YAML nor JSON: {}", error.info())));
            }
        }
    }
    builder.root.ok_or_else(|| Violations::one("", "the text is empty: give at least the required fields"))
}

fn refusal(line: usize, message: &str) -> Violations {
    let mut violations = Violations::default();
    violations.push_at("", format!("the text {message}"), Some(line));
    violations
}

/// A list or map whose end has not come yet.
#[derive(Debug)]
enum Open {
    List(usize, Vec<Node>),
    Map(usize, Vec<(Key, Node)>, Option<Key>),
}

#[derive(Debug, Default)]
struct Builder {
    open: Vec<Open>,
    root: Option<Node>,
    documents: usize,
}

impl Builder {
    fn take(&mut self, event: Event<'_>, span: Span) -> Result<(), Violations> {
        let line = span.start.line();
        match event {
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentEnd => Ok(()),
            Event::DocumentStart(_) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(refusal(line, "holds several documents: give one a file"));
                }
                Ok(())
            }
            Event::Alias(_) => Err(refusal(line, "has an alias (*name): write the value out")),
            Event::Scalar(text, style, anchor, tag) => {
                refuse_marks(line, anchor, tag.is_some())?;
                let text = text.into_owned();
                let value = if style == ScalarStyle::Plain { Value::Plain(text) } else { Value::Quoted(text) };
                self.place(Node { line, value })
            }
            Event::SequenceStart(anchor, tag) => {
                refuse_marks(line, anchor, tag.is_some())?;
                self.enter(line, Open::List(line, Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                refuse_marks(line, anchor, tag.is_some())?;
                self.enter(line, Open::Map(line, Vec::new(), None))
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(Open::List(line, items)) => self.place(Node { line, value: Value::List(items) }),
                Some(Open::Map(line, entries, _)) => self.place(Node { line, value: Value::Map(entries) }),
                None => Ok(()),
            },
        }
    }

    fn enter(&mut self, line: usize, opened: Open) -> Result<(), Violations> {
        if self.open.len() >= MOST_LEVELS {
            return Err(refusal(line, &format!("is nested deeper than {MOST_LEVELS} levels")));
        }
        if matches!(self.open.last(), Some(Open::Map(_, _, None))) {
            return Err(refusal(line, "has a list or map as a key: keys are field names"));
        }
        self.open.push(opened);
        Ok(())
    }

    /// Puts a finished node where it belongs: it is a key, a value, an element or the root.
    fn place(&mut self, node: Node) -> Result<(), Violations> {
        match self.open.last_mut() {
            None => self.root = Some(node),
            Some(Open::List(_, items)) => items.push(node),
            Some(Open::Map(_, entries, key)) => match key.take() {
                Some(key) => entries.push((key, node)),
                None => match node.value {
                    Value::Plain(text) | Value::Quoted(text) => *key = Some(Key { line: node.line, text }),
                    Value::List(_) | Value::Map(_) => {
                        return Err(refusal(node.line, "has a list or map as a key: keys are field names"));
                    }
                },
            },
        }
        Ok(())
    }
}

fn refuse_marks(line: usize, anchor: usize, tagged: bool) -> Result<(), Violations> {
    if anchor > 0 {
        return Err(refusal(line, "has an anchor (&name): write the value out where it is needed"));
    }
    if tagged {
        return Err(refusal(line, "has a tag (!name): remove it, the field decides the type"));
    }
    Ok(())
}

fn is_json(text: &str) -> bool {
    text.trim_start().starts_with(['{', '[']) && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}

/// JSON as YAML reads it: tabs between tokens become spaces, and pairs of surrogate escapes become their character. Lines stay.
fn json_to_yaml(text: &str) -> String {
    let mut yaml = String::with_capacity(text.len());
    let mut in_string = false;
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            '\t' if !in_string => yaml.push(' '),
            '"' => {
                in_string = !in_string;
                yaml.push('"');
            }
            '\\' if in_string => {
                if let Some((character, after)) = surrogate_pair(rest.as_str()) {
                    yaml.push(character);
                    rest = after.chars();
                } else {
                    yaml.push('\\');
                    yaml.extend(rest.next());
                }
            }
            _ => yaml.push(c),
        }
    }
    yaml
}

/// The character of `uD83DuDE00`-like escapes (their backslashes as in JSON, the first one taken) and what follows them.
fn surrogate_pair(text: &str) -> Option<(char, &str)> {
    let unit = |digits: &str| u16::from_str_radix(digits, 16).ok();
    let high = unit(text.strip_prefix('u')?.get(..4)?)?;
    let low = unit(text.get(5..)?.strip_prefix("\\u")?.get(..4)?)?;
    let character = char::decode_utf16([high, low]).next()?.ok()?;
    (character.len_utf16() == 2).then(|| (character, &text[11..]))
}
