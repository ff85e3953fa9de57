//! What a word without quotes means: YAML's core schema.

/// What a word without quotes is, by YAML's core schema.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scalar {
    Null,
    Bool,
    Whole(i128),
    Real(f64),
    Text,
}

pub(super) fn scalar_kind(text: &str) -> Scalar {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Scalar::Null,
        "true" | "True" | "TRUE" | "false" | "False" | "FALSE" => return Scalar::Bool,
        ".nan" | ".NaN" | ".NAN" => return Scalar::Real(f64::NAN),
        ".inf" | ".Inf" | ".INF" | "+.inf" | "+.Inf" | "+.INF" => {
            return Scalar::Real(f64::INFINITY);
        }
        "-.inf" | "-.Inf" | "-.INF" => return Scalar::Real(f64::NEG_INFINITY),
        _ => {}
    }
    let radix = |prefix, radix| {
        let digits: &str = text.strip_prefix(prefix)?;
        if digits.starts_with(['+', '-']) { None } else { i128::from_str_radix(digits, radix).ok() }
    };
    if let Some(value) = radix("0x", 16).or_else(|| radix("0o", 8)) {
        return Scalar::Whole(value);
    }
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') || !digits.contains(|c: char| c.is_ascii_digit()) {
        return Scalar::Text;
    }
    if digits.bytes().all(|c| c.is_ascii_digit()) {
        // Longer than any field could hold: the range check says so.
        let most = if text.starts_with('-') { i128::MIN } else { i128::MAX };
        return Scalar::Whole(text.parse().unwrap_or(most));
    }
    if digits.bytes().all(|c| c.is_ascii_digit() || b".eE+-".contains(&c)) {
        return text.parse().map_or(Scalar::Text, Scalar::Real);
    }
    Scalar::Text
}
