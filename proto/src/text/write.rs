//! Messages as text. Field names in snake_case; absent fields are left out.

use super::scalar::{Scalar, scalar_kind};
use super::{Printable, descriptor};
use crate::convert::short_name;
use base64::Engine as _;
use prost_reflect::{DynamicMessage, EnumDescriptor, Kind, MapKey, ReflectMessage as _, SerializeOptions, Value};
use serde_json::{Map, Value as Json};
use std::fmt::Write as _;

/// The message as YAML: enums by their short names, numbers of 64 bits without quotes.
#[must_use]
pub fn to_yaml<M: Printable>(message: &M) -> String {
    let json = json_of(&dynamic(message));
    let mut yaml = String::new();
    match &json {
        Json::Object(fields) if !fields.is_empty() => write_fields(&mut yaml, fields, 0),
        _ => yaml.push_str("{}\n"),
    }
    yaml
}

/// The message as indented JSON in the canonical mapping: enums by their full names, numbers of 64 bits in quotes.
#[must_use]
pub fn to_json<M: Printable>(message: &M) -> String {
    serde_json::to_string_pretty(&to_json_value(message)).expect("a JSON value has text keys")
}

/// The message as a JSON value in the canonical mapping, for embedding.
#[must_use]
pub fn to_json_value<M: Printable>(message: &M) -> Json {
    canonical(&dynamic(message))
}

fn dynamic<M: Printable>(message: &M) -> DynamicMessage {
    let mut dynamic = DynamicMessage::new(descriptor::<M>());
    dynamic.transcode_from(message).expect("the descriptor is the message's own");
    dynamic
}

fn canonical(message: &DynamicMessage) -> Json {
    let options = SerializeOptions::new().use_proto_field_name(true);
    // Fails only on values outside a well-known type's range, such as a timestamp in the year 10000.
    message.serialize_with_options(serde_json::value::Serializer, &options).unwrap_or(Json::Null)
}

/// As [`canonical`], but for people: short enum names, plain numbers.
fn json_of(message: &DynamicMessage) -> Json {
    if message.descriptor().full_name().starts_with("google.protobuf.") {
        return canonical(message);
    }
    let mut fields: Vec<_> = message.fields().collect();
    fields.sort_by_key(|(field, _)| field.number());
    let entries = fields.into_iter().map(|(field, value)| (field.name().to_owned(), value_of(value, &field.kind())));
    Json::Object(entries.collect::<Map<_, _>>())
}

fn value_of(value: &Value, kind: &Kind) -> Json {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::I32(value) => (*value).into(),
        Value::I64(value) => (*value).into(),
        Value::U32(value) => (*value).into(),
        Value::U64(value) => (*value).into(),
        Value::F32(value) => real(f64::from(*value)),
        Value::F64(value) => real(*value),
        Value::String(text) => text.as_str().into(),
        Value::Bytes(bytes) => base64::engine::general_purpose::STANDARD.encode(bytes).into(),
        Value::EnumNumber(number) => kind.as_enum().map_or(Json::Null, |choices| enum_name(choices, *number)),
        Value::Message(message) => json_of(message),
        Value::List(values) => values.iter().map(|value| value_of(value, kind)).collect(),
        Value::Map(entries) => {
            let value_kind = kind.as_message().map(|entry| entry.map_entry_value_field().kind());
            let mut pairs: Vec<_> = entries
                .iter()
                .map(|(key, value)| (key_text(key), value_of(value, value_kind.as_ref().unwrap_or(kind))))
                .collect();
            pairs.sort_by(|one, other| one.0.cmp(&other.0));
            Json::Object(pairs.into_iter().collect())
        }
    }
}

fn key_text(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

/// JSON has no numbers for the last three; they are the canonical mapping's words.
fn real(value: f64) -> Json {
    match serde_json::Number::from_f64(value) {
        Some(number) => Json::Number(number),
        None if value.is_nan() => "NaN".into(),
        None if value > 0.0 => "Infinity".into(),
        None => "-Infinity".into(),
    }
}

fn enum_name(choices: &EnumDescriptor, number: i32) -> Json {
    match choices.get_value(number) {
        Some(value) if number != 0 => short_name(value.name(), choices.default_value().name()).into(),
        Some(value) => value.name().into(),
        None => number.into(),
    }
}

fn write_fields(yaml: &mut String, fields: &Map<String, Json>, indent: usize) {
    for (index, (name, value)) in fields.iter().enumerate() {
        // The first field of a list's element follows its dash.
        if index > 0 || indent == 0 || yaml.ends_with('\n') {
            yaml.extend(std::iter::repeat_n(' ', indent));
        }
        yaml.push_str(&scalar_text(name));
        yaml.push(':');
        match value {
            Json::Object(nested) if !nested.is_empty() => {
                yaml.push('\n');
                write_fields(yaml, nested, indent + 2);
            }
            Json::Array(items) if items.iter().any(Json::is_object) => {
                yaml.push('\n');
                for item in items {
                    yaml.extend(std::iter::repeat_n(' ', indent + 2));
                    yaml.push_str("- ");
                    match item {
                        Json::Object(nested) if !nested.is_empty() => write_fields(yaml, nested, indent + 4),
                        _ => yaml.push_str("{}\n"),
                    }
                }
            }
            _ => {
                let _ = writeln!(yaml, " {}", flow(value));
            }
        }
    }
}

/// Readers of YAML 1.1 take `1e-8` for text; a number there needs a point and a signed exponent.
fn number_text(number: &str) -> String {
    let Some((digits, exponent)) = number.split_once('e') else { return number.to_owned() };
    let point = if digits.contains('.') { "" } else { ".0" };
    let sign = if exponent.starts_with(['-', '+']) { "" } else { "+" };
    format!("{digits}{point}e{sign}{exponent}")
}

fn flow(value: &Json) -> String {
    match value {
        Json::Null => "null".to_owned(),
        Json::Bool(value) => value.to_string(),
        Json::Number(number) => number_text(&number.to_string()),
        Json::String(text) => scalar_text(text),
        Json::Array(items) => format!("[{}]", items.iter().map(flow).collect::<Vec<_>>().join(", ")),
        Json::Object(_) => "{}".to_owned(),
    }
}

/// The text without quotes where it then reads back as that text, else in double quotes.
fn scalar_text(text: &str) -> String {
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/');
    let reads_well = text.chars().all(|c| c.is_ascii_alphanumeric() || "_-./:".contains(c));
    if starts_well && reads_well && !text.ends_with(':') && scalar_kind(text) == Scalar::Text && !is_reserved_real(text)
    {
        return text.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            ' '..='~' => quoted.push(c),
            _ if c.is_alphanumeric() => quoted.push(c),
            _ => {
                let _ = write!(quoted, "\\U{:08X}", u32::from(c));
            }
        }
    }
    quoted.push('"');
    quoted
}

/// Words that stand for numbers in quotes only.
fn is_reserved_real(text: &str) -> bool {
    matches!(text, "NaN" | "Infinity")
}
