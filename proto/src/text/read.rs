//! From the tree to a message, along its descriptor. Every mistake is noted and reading goes on; what could not be read stays absent.

use super::scalar::{Scalar, scalar_kind};
use super::tree::{Key, Node, Value as Tree};
use crate::convert::{quote, short_name};
use crate::pb;
use crate::violation::{Violations, join};
use base64::Engine as _;
use prost::Name as _;
use prost_reflect::{
    DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage as _, Value,
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// No enum has this number.
const UNKNOWN: i32 = -1;

#[derive(Debug, Default)]
pub(super) struct Reader {
    path: String,
    pub(super) violations: Violations,
    pub(super) lines: BTreeMap<String, usize>,
    /// Paths of fields whose value is not in the message because of a mistake.
    pub(super) unread: BTreeSet<String>,
}

impl Reader {
    /// The message that `node` holds.
    pub(super) fn message(&mut self, descriptor: &MessageDescriptor, node: &Node) -> DynamicMessage {
        let mut message = DynamicMessage::new(descriptor.clone());
        match &node.value {
            Tree::Map(entries) => self.fields(&mut message, entries),
            // Nothing given is a message without fields; the check says which are required.
            _ if node.is_null() => {}
            _ if self.short_form(&mut message, node) => {}
            Tree::Plain(_) | Tree::Quoted(_) | Tree::List(_) => {
                let names = field_names(descriptor);
                self.unreadable(node.line, format!("expected fields ({names}), found {}", found(node)));
            }
        }
        message
    }

    /// Class weights may be given as the list or the word alone.
    fn short_form(&mut self, message: &mut DynamicMessage, node: &Node) -> bool {
        let descriptor = message.descriptor();
        if descriptor.full_name() != pb::ClassWeights::full_name() {
            return false;
        }
        let (field, value) = match &node.value {
            Tree::List(_) => ("weights", None),
            Tree::Plain(word) | Tree::Quoted(word) if word == "balanced" => ("balanced", Some(Value::Bool(true))),
            Tree::Plain(_) | Tree::Quoted(_) => {
                self.unreadable(node.line, format!("expected balanced or a list of numbers, found {}", found(node)));
                return true;
            }
            Tree::Map(_) => return false,
        };
        let field = descriptor.get_field_by_name(field).expect("the message has both fields");
        // The path of an element is that of the long form, as the check gives it.
        self.within(field.name(), |at| {
            at.lines.insert(at.path.clone(), node.line);
            if let Some(value) = value.or_else(|| at.field(&field, node)) {
                message.set_field(&field, value);
            }
        });
        true
    }

    fn fields(&mut self, message: &mut DynamicMessage, entries: &[(Key, Node)]) {
        let descriptor = message.descriptor();
        let mut seen: BTreeMap<u32, usize> = BTreeMap::new();
        let mut chosen: BTreeMap<String, String> = BTreeMap::new();
        for (key, node) in entries {
            let Some(field) = known_field(&descriptor, &key.text) else {
                let names: Vec<_> = descriptor.fields().map(|field| field.name().to_owned()).collect();
                let meant = nearest(&snake_case(&key.text), &names);
                if let Some(meant) = meant {
                    // That it is absent is the same mistake, and one message is enough.
                    self.within(meant, |at| {
                        at.unread.insert(at.path.clone());
                    });
                }
                self.within(&cut(&key.text), |at| at.refuse(key.line, unknown_key(meant, &names)));
                continue;
            };
            self.within(field.name(), |at| {
                if let Some(first) = seen.get(&field.number()) {
                    at.refuse(key.line, format!("is given twice (first in line {first}): remove one"));
                    return;
                }
                seen.insert(field.number(), key.line);
                at.lines.insert(at.path.clone(), key.line);
                if node.is_null() {
                    return;
                }
                if let Some(oneof) = field.containing_oneof().filter(|oneof| !oneof.is_synthetic()) {
                    if let Some(other) = chosen.get(oneof.name()) {
                        at.refuse(key.line, format!("excludes {other}: remove one of the two"));
                        return;
                    }
                    chosen.insert(oneof.name().to_owned(), field.name().to_owned());
                }
                if let Some(value) = at.field(&field, node) {
                    message.set_field(&field, value);
                }
            });
        }
    }

    fn field(&mut self, field: &FieldDescriptor, node: &Node) -> Option<Value> {
        if field.is_map() {
            return self.map(field, node);
        }
        if !field.is_list() {
            return self.single(&field.kind(), node);
        }
        let Tree::List(items) = &node.value else {
            self.unreadable(node.line, format!("expected a list ([a, b]), found {}", found(node)));
            return None;
        };
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            self.within(&format!("[{index}]"), |at| {
                at.lines.insert(at.path.clone(), item.line);
                if item.is_null() && field.kind().as_message().is_none() {
                    at.unreadable(item.line, format!("expected {}, found nothing", expected(&field.kind())));
                } else {
                    values.extend(at.single(&field.kind(), item));
                }
            });
        }
        Some(Value::List(values))
    }

    fn map(&mut self, field: &FieldDescriptor, node: &Node) -> Option<Value> {
        let Tree::Map(entries) = &node.value else {
            self.unreadable(node.line, format!("expected keys and values, found {}", found(node)));
            return None;
        };
        let kind = field.kind();
        let entry = kind.as_message()?;
        let (key_kind, value_kind) = (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
        let mut values: HashMap<MapKey, Value> = HashMap::new();
        for (key, node) in entries {
            self.within(&format!("[{}]", quote(&key.text)), |at| {
                let key_node = Node { line: key.line, value: Tree::Quoted(key.text.clone()) };
                let map_key = at.single(&key_kind, &key_node).and_then(Value::into_map_key);
                let value = at.single(&value_kind, node);
                if let (Some(map_key), Some(value)) = (map_key, value)
                    && values.insert(map_key, value).is_some()
                {
                    at.refuse(key.line, "is given twice: remove one".to_owned());
                }
            });
        }
        Some(Value::Map(values))
    }

    fn single(&mut self, kind: &Kind, node: &Node) -> Option<Value> {
        let result = match kind {
            Kind::Message(message) if message.full_name().starts_with("google.protobuf.") => well_known(message, node),
            Kind::Message(message) => return Some(Value::Message(self.message(message, node))),
            Kind::Enum(choices) => enum_number(choices, node).map(Value::EnumNumber),
            Kind::Bool => boolean(node).map(Value::Bool),
            Kind::String => text(node).map(Value::String),
            Kind::Bytes => bytes(node).map(|bytes| Value::Bytes(bytes.into())),
            Kind::Double => real(node).map(Value::F64),
            Kind::Float => real(node).map(|value| Value::F32(value as f32)),
            Kind::Uint32 | Kind::Fixed32 => whole(node, 0, u32::MAX.into()).map(Value::U32),
            Kind::Uint64 | Kind::Fixed64 => whole(node, 0, u64::MAX.into()).map(Value::U64),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                whole(node, i32::MIN.into(), i32::MAX.into()).map(Value::I32)
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                whole(node, i64::MIN.into(), i64::MAX.into()).map(Value::I64)
            }
        };
        match result {
            Ok(value) => Some(value),
            Err(mistake) => {
                self.unreadable(node.line, mistake);
                // "Given but unknown", so that no rule takes the default for the user's choice.
                kind.as_enum().map(|_| Value::EnumNumber(UNKNOWN))
            }
        }
    }

    /// Notes a mistake that keeps a value out of the message.
    fn unreadable(&mut self, line: usize, message: String) {
        self.unread.insert(self.path.clone());
        self.refuse(line, message);
    }

    fn refuse(&mut self, line: usize, message: String) {
        self.violations.push_at(self.path.clone(), message, Some(line));
    }

    fn within(&mut self, segment: &str, read: impl FnOnce(&mut Self)) {
        let outer = self.path.len();
        self.path = join(&self.path, segment);
        read(self);
        self.path.truncate(outer);
    }
}

fn known_field(descriptor: &MessageDescriptor, key: &str) -> Option<FieldDescriptor> {
    descriptor.get_field_by_name(key).or_else(|| descriptor.get_field_by_json_name(key))
}

fn field_names(descriptor: &MessageDescriptor) -> String {
    descriptor.fields().map(|field| field.name().to_owned()).collect::<Vec<_>>().join(", ")
}

fn unknown_key(meant: Option<&str>, names: &[String]) -> String {
    match meant {
        Some(name) => format!("is not a field: did you mean {name}?"),
        None if names.is_empty() => "is not a field: there are none here".to_owned(),
        None => format!("is not a field: known are {}", names.join(", ")),
    }
}

/// The known name that is a few slips away, if there is one.
fn nearest<'a>(given: &str, names: &'a [String]) -> Option<&'a str> {
    // Longer than any name: no need to compare.
    if given.len() > 100 {
        return None;
    }
    let near = |name: &&String| strsim::damerau_levenshtein(given, name) <= 1 + name.len().max(given.len()) / 4;
    let contained = |name: &&String| given.len() >= 4 && (name.contains(given) || given.contains(name.as_str()));
    let by_slips = names.iter().filter(near).min_by_key(|name| strsim::damerau_levenshtein(given, name));
    by_slips.or_else(|| names.iter().find(contained)).map(String::as_str)
}

fn snake_case(key: &str) -> String {
    let mut name = String::with_capacity(key.len());
    for c in key.chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(if c == '-' { '_' } else { c.to_ascii_lowercase() });
    }
    name
}

/// A key as part of a path.
fn cut(key: &str) -> String {
    let plain = !key.is_empty() && key.len() <= 64 && key.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-');
    if plain { key.to_owned() } else { quote(key) }
}

fn enum_number(choices: &EnumDescriptor, node: &Node) -> Result<i32, String> {
    let zero = choices.default_value().name().to_owned();
    let known: Vec<_> =
        choices.values().filter(|value| value.number() != 0).map(|value| short_name(value.name(), &zero)).collect();
    let given = match &node.value {
        Tree::Plain(text) | Tree::Quoted(text) => text.as_str(),
        Tree::List(_) | Tree::Map(_) => {
            return Err(format!("expected one of {}, found {}", known.join(", "), found(node)));
        }
    };
    let named = |value: &prost_reflect::EnumValueDescriptor| {
        value.name() == given || (value.number() != 0 && short_name(value.name(), &zero) == given)
    };
    if let Some(value) = choices.values().find(named) {
        return Ok(value.number());
    }
    // The canonical mapping also takes numbers.
    if let Some(value) = given.parse().ok().and_then(|number| choices.get_value(number)) {
        return Ok(value.number());
    }
    match nearest(&snake_case(given), &known) {
        Some(name) => Err(format!("{} is not a known value: did you mean {name}?", quote(given))),
        None => Err(format!("{} is not a known value: use one of {}", quote(given), known.join(", "))),
    }
}

fn boolean(node: &Node) -> Result<bool, String> {
    match plain(node) {
        Some("true" | "True" | "TRUE") => Ok(true),
        Some("false" | "False" | "FALSE") => Ok(false),
        _ => Err(format!("expected true or false, found {}", found(node))),
    }
}

fn text(node: &Node) -> Result<String, String> {
    match &node.value {
        Tree::Quoted(text) => Ok(text.clone()),
        Tree::Plain(text) if scalar_kind(text) == Scalar::Text => Ok(text.clone()),
        Tree::Plain(text) => Err(format!("expected a text, found {}: put it in quotes (\"{text}\")", found(node))),
        Tree::List(_) | Tree::Map(_) => Err(format!("expected a text, found {}", found(node))),
    }
}

fn bytes(node: &Node) -> Result<Vec<u8>, String> {
    let text = text(node)?;
    base64::engine::general_purpose::STANDARD.decode(text).map_err(|_| "expected bytes in base64".to_owned())
}

fn real(node: &Node) -> Result<f64, String> {
    if let Tree::Quoted(text) = &node.value {
        // The canonical mapping's words for what JSON cannot say; the check refuses them with the field's range.
        match text.as_str() {
            "NaN" => return Ok(f64::NAN),
            "Infinity" => return Ok(f64::INFINITY),
            "-Infinity" => return Ok(f64::NEG_INFINITY),
            _ => {}
        }
    }
    match plain(node).map(|text| (text, scalar_kind(text))) {
        Some((_, Scalar::Whole(value))) => Ok(value as f64),
        Some((text, Scalar::Real(value))) if value.is_infinite() && !text.contains("inf") => {
            Err(format!("{} is too large: at most {:e}", quote(text), f64::MAX))
        }
        Some((_, Scalar::Real(value))) => Ok(value),
        _ => Err(format!("expected a number, found {}", found(node))),
    }
}

/// A whole number that fits; the canonical mapping also takes it in quotes, and as `1e3` or `64.0`.
fn whole<T: TryFrom<i128>>(node: &Node, low: i128, high: i128) -> Result<T, String> {
    let given = match &node.value {
        Tree::Plain(text) => scalar_kind(text),
        Tree::Quoted(text) if text.bytes().all(|c| c.is_ascii_digit() || c == b'-') => scalar_kind(text),
        Tree::Quoted(_) | Tree::List(_) | Tree::Map(_) => Scalar::Text,
    };
    let value = match given {
        Scalar::Whole(value) => value,
        Scalar::Real(value) if value.fract() == 0.0 && value.abs() < 1e15 => value as i128,
        Scalar::Real(_) | Scalar::Text | Scalar::Null | Scalar::Bool => {
            return Err(format!("expected a whole number, found {}", found(node)));
        }
    };
    let fits = (low..=high).contains(&value).then(|| T::try_from(value).ok()).flatten();
    fits.ok_or_else(|| format!("must be in {low}-{high}, not {}", found(node).trim_start_matches("the number ")))
}

/// Timestamps and their like have forms of their own, which the reflection library reads.
fn well_known(message: &MessageDescriptor, node: &Node) -> Result<Value, String> {
    let json = match &node.value {
        Tree::Plain(text) | Tree::Quoted(text) => serde_json::Value::String(text.clone()),
        Tree::List(_) | Tree::Map(_) => {
            return Err(format!("expected a {} as text, found {}", message.name(), found(node)));
        }
    };
    DynamicMessage::deserialize(message.clone(), json)
        .map(Value::Message)
        .map_err(|error| format!("is not a {}: {error}", message.name()))
}

fn plain(node: &Node) -> Option<&str> {
    match &node.value {
        Tree::Plain(text) => Some(text),
        Tree::Quoted(_) | Tree::List(_) | Tree::Map(_) => None,
    }
}

fn expected(kind: &Kind) -> &'static str {
    match kind {
        Kind::Bool => "true or false",
        Kind::String => "a text",
        Kind::Bytes => "bytes in base64",
        Kind::Double | Kind::Float => "a number",
        Kind::Message(_) => "fields",
        Kind::Enum(_) => "a name",
        Kind::Uint32
        | Kind::Fixed32
        | Kind::Uint64
        | Kind::Fixed64
        | Kind::Int32
        | Kind::Sint32
        | Kind::Sfixed32
        | Kind::Int64
        | Kind::Sint64
        | Kind::Sfixed64 => "a whole number",
    }
}

fn found(node: &Node) -> String {
    match &node.value {
        Tree::List(_) => "a list".to_owned(),
        Tree::Map(_) => "fields".to_owned(),
        Tree::Quoted(text) => format!("the text {}", quote(text)),
        Tree::Plain(text) => match scalar_kind(text) {
            Scalar::Null => "nothing".to_owned(),
            Scalar::Bool => text.clone(),
            Scalar::Whole(_) | Scalar::Real(_) => {
                format!("the number {}", text.chars().take(40).collect::<String>())
            }
            Scalar::Text => format!("the text {}", quote(text)),
        },
    }
}
