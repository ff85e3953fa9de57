//! Between generated messages and the checked types: one file per message family, and every error names the field.
//!
//! Messages become checked types by [`spec::check`] and `TryFrom<&pb::X>`, which fail with [`Violations`]; the way back is
//! `From<&X>`. An enum's zero value means "absent" and is accepted only where the proto documents a default.

mod checker;
mod enums;
pub mod plan;
pub mod run;
pub mod spec;
pub mod worker;

pub(crate) use checker::quote;
pub use enums::WireEnum;
pub(crate) use enums::short_name;

use crate::violation::{Violations, join};

/// A required enum field.
fn required_enum<E: WireEnum>(path: &str, number: i32) -> Result<E, Violations> {
    match E::from_number(number) {
        Some(Some(value)) => Ok(value),
        Some(None) => Err(Violations::one(path, format!("is required: one of {}", E::names().join(", ")))),
        None => {
            Err(Violations::one(path, format!("{number} is not a known value: use one of {}", E::names().join(", "))))
        }
    }
}

/// A required nested message.
fn required<'a, M, T>(path: &str, message: Option<&'a M>) -> Result<T, Violations>
where
    T: TryFrom<&'a M, Error = Violations>,
{
    match message {
        Some(message) => nested(path, message),
        None => Err(Violations::one(path, "is required")),
    }
}

/// A nested message, its mistakes under `path`.
fn nested<'a, M, T>(path: &str, message: &'a M) -> Result<T, Violations>
where
    T: TryFrom<&'a M, Error = Violations>,
{
    T::try_from(message).map_err(|violations| violations.under(path))
}

/// A nested message that may be absent.
fn optional<'a, M, T>(path: &str, message: Option<&'a M>) -> Result<Option<T>, Violations>
where
    T: TryFrom<&'a M, Error = Violations>,
{
    message.map(|message| nested(path, message)).transpose()
}

/// Every element of a repeated field, with the mistakes of all of them.
fn each<'a, M, T>(path: &str, messages: &'a [M]) -> Result<Vec<T>, Violations>
where
    T: TryFrom<&'a M, Error = Violations>,
{
    let mut violations = Violations::default();
    let mut values = Vec::with_capacity(messages.len());
    for (index, message) in messages.iter().enumerate() {
        match T::try_from(message) {
            Ok(value) => values.push(value),
            Err(mistakes) => violations.extend_under(&join(path, &format!("[{index}]")), mistakes),
        }
    }
    violations.or_ok(values)
}
