//! Errors over gRPC: the one place that maps what an error means to a status with typed details, and a status back to text.
//!
//! Every status carries `ErrorInfo` (a stable reason in UPPER_SNAKE_CASE, domain [`DOMAIN`]); mistakes in fields travel as `BadRequest`.

use crate::violation::{Violation, Violations};
use std::collections::HashMap;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

/// Domain of every `ErrorInfo`.
pub const DOMAIN: &str = "thaw.v1";

/// What the caller can do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ErrorClass {
    /// The same call may succeed later, or at another replica.
    Retry,
    /// The caller is behind: a newer leader epoch, generation or revision exists. Read again before trying again.
    Fenced,
    /// The request is wrong whatever the state.
    Invalid,
    /// The named object does not exist.
    NotFound,
    /// An object of that name exists.
    AlreadyExists,
    /// The request is right but the object's state forbids it.
    Precondition,
    /// Thaw itself is at fault.
    Fatal,
}

impl ErrorClass {
    /// The class's gRPC code.
    #[must_use]
    pub fn code(self) -> Code {
        match self {
            Self::Retry => Code::Unavailable,
            Self::Fenced => Code::Aborted,
            Self::Invalid => Code::InvalidArgument,
            Self::NotFound => Code::NotFound,
            Self::AlreadyExists => Code::AlreadyExists,
            Self::Precondition => Code::FailedPrecondition,
            Self::Fatal => Code::Internal,
        }
    }

    /// The class of a status, also of one that this code did not make.
    #[must_use]
    pub fn of(status: &Status) -> Self {
        match status.code() {
            Code::Unavailable | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Cancelled => Self::Retry,
            Code::Aborted => Self::Fenced,
            Code::InvalidArgument | Code::OutOfRange => Self::Invalid,
            Code::NotFound => Self::NotFound,
            Code::AlreadyExists => Self::AlreadyExists,
            Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated => Self::Precondition,
            Code::Ok | Code::Unknown | Code::Unimplemented | Code::Internal | Code::DataLoss => Self::Fatal,
        }
    }
}

/// A status for an error.
///
/// `reason` is stable and in UPPER_SNAKE_CASE (`RUN_NOT_FOUND`); `metadata` holds what it is about (`run`, `leader`).
#[must_use]
pub fn error(class: ErrorClass, reason: &str, message: impl Into<String>, metadata: &[(&str, &str)]) -> Status {
    Status::with_error_details(class.code(), message, details(reason, metadata))
}

/// A status for a request with mistakes in its fields.
#[must_use]
pub fn invalid(reason: &str, violations: &Violations) -> Status {
    let mut details = details(reason, &[]);
    let fields: Vec<_> = violations.0.iter().map(field_violation).collect();
    details.set_bad_request(fields);
    let message = match violations.0.as_slice() {
        [only] => only.to_string(),
        all => format!("{} fields are wrong", all.len()),
    };
    Status::with_error_details(ErrorClass::Invalid.code(), message, details)
}

/// The stable reason of a status. `None`: it has none, so Thaw did not make it.
#[must_use]
pub fn reason(status: &Status) -> Option<String> {
    status.get_details_error_info().filter(|info| info.domain == DOMAIN).map(|info| info.reason)
}

/// A value from the metadata of a status's `ErrorInfo`.
#[must_use]
pub fn metadata(status: &Status, key: &str) -> Option<String> {
    status.get_details_error_info().and_then(|mut info| info.metadata.remove(key))
}

/// The mistakes in fields that a status carries; none where it carries none.
#[must_use]
pub fn violations(status: &Status) -> Violations {
    let fields = status.get_details_bad_request().map(|request| request.field_violations).unwrap_or_default();
    let violation = |field: FieldViolation| Violation { path: field.field, message: field.description, line: None };
    Violations(fields.into_iter().map(violation).collect())
}

/// A status as a person reads it: the sentence, its reason, then one mistake a line.
#[must_use]
pub fn describe(status: &Status) -> String {
    let what = if status.message().is_empty() { status.code().description() } else { status.message() };
    let mut text = what.to_owned();
    if let Some(reason) = reason(status) {
        text.push_str(&format!(" [{reason}]"));
    }
    let violations = violations(status);
    // One mistake is the sentence itself.
    if violations.0.len() > 1 || violations.0.first().is_some_and(|only| only.to_string() != what) {
        for violation in &violations.0 {
            text.push_str(&format!("\n  {violation}"));
        }
    }
    text
}

fn details(reason: &str, metadata: &[(&str, &str)]) -> ErrorDetails {
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    ErrorDetails::with_error_info(reason, DOMAIN, metadata)
}

fn field_violation(violation: &Violation) -> FieldViolation {
    let without_path = Violation { path: String::new(), ..violation.clone() };
    FieldViolation::new(violation.path.clone(), without_path.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn violations_survive_the_wire() {
        let mut sent = Violations::one("name", "is required");
        sent.push_at("data.train.path", "is not a URL", Some(4));
        let status = invalid("INVALID_SPEC", &sent);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(reason(&status).as_deref(), Some("INVALID_SPEC"));
        assert_eq!(
            describe(&status),
            "2 fields are wrong [INVALID_SPEC]\n  name: is required\n  data.train.path: is not a URL (line 4)"
        );
    }

    #[test]
    fn one_violation_is_said_once() {
        let status = invalid("INVALID_SPEC", &Violations::one("name", "is required"));
        assert_eq!(describe(&status), "name: is required [INVALID_SPEC]");
    }

    #[test]
    fn classes_survive_the_wire() {
        let classes = [
            ErrorClass::Retry,
            ErrorClass::Fenced,
            ErrorClass::Invalid,
            ErrorClass::NotFound,
            ErrorClass::AlreadyExists,
            ErrorClass::Precondition,
            ErrorClass::Fatal,
        ];
        for class in classes {
            let status = error(class, "SOME_REASON", "it failed", &[("run", "a-1")]);
            assert_eq!(ErrorClass::of(&status), class);
            assert_eq!(metadata(&status, "run").as_deref(), Some("a-1"));
            assert_eq!(describe(&status), "it failed [SOME_REASON]");
        }
    }
}
