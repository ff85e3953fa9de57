//! Errors as users get them: a stable reason, one sentence, and what to do next. All statuses of the services are made
//! here.

use crate::leader::Identity;
use crate::{driver, intake, store};
use thaw_core::run_machine::Rejection;
use thaw_proto::ids::RunId;
use thaw_proto::status::{self, ErrorClass};
use thaw_proto::violation::Violations;
use thaw_runtime::chain;
use tonic::Status;

pub(super) fn intake(error: intake::Error) -> Status {
    match error {
        intake::Error::Invalid(violations) => status::invalid("INVALID_SPEC", &violations),
        intake::Error::Driver(error) => driver(error),
        error @ (intake::Error::Folder(_) | intake::Error::Index(_)) => {
            status::error(ErrorClass::Retry, "STORAGE_ERROR", chain(&error), &[])
        }
        error @ intake::Error::Ended(_) => status::error(ErrorClass::Fatal, "INTERNAL", chain(&error), &[]),
    }
}

pub(super) fn driver(error: driver::Error) -> Status {
    let text = chain(&error);
    match &error {
        driver::Error::NotFound(run) => run_not_found(run),
        driver::Error::Rejected { source: source @ Rejection::SizeOutOfRange { .. }, .. } => {
            bad_field("workers", source.to_string())
        }
        driver::Error::Rejected { run, state, .. } => {
            let metadata = [("run", run.as_str()), ("state", state.as_str())];
            status::error(ErrorClass::Precondition, "RUN_STATE_FORBIDS", text, &metadata)
        }
        driver::Error::Hello(violations) => status::invalid("INVALID_HELLO", violations),
        driver::Error::NameTaken(worker) => {
            status::error(ErrorClass::AlreadyExists, "WORKER_NAME_TAKEN", text, &[("worker", worker)])
        }
        driver::Error::Stopped => not_leading(None),
        driver::Error::Leader(_) => status::error(ErrorClass::Retry, "STORE_UNAVAILABLE", text, &[]),
        driver::Error::Stored { run, .. } => {
            status::error(ErrorClass::Fatal, "STORED_RUN_UNREADABLE", text, &[("run", run)])
        }
        driver::Error::Folder { run, .. } => {
            status::error(ErrorClass::Fatal, "STORED_RUN_UNREADABLE", text, &[("run", run.as_str())])
        }
    }
}

pub(super) fn store(error: &store::Error) -> Status {
    status::error(ErrorClass::Retry, "STORE_UNAVAILABLE", chain(error), &[])
}

pub(super) fn run_not_found(run: &RunId) -> Status {
    let text = format!("there is no run {run}; `thaw list` shows those there are");
    status::error(ErrorClass::NotFound, "RUN_NOT_FOUND", text, &[("run", run.as_str())])
}

/// Names the leader where one is known, so that the caller need not search.
pub(super) fn not_leading(leader: Option<&Identity>) -> Status {
    match leader {
        Some(leader) => {
            let text = format!("this coordinator does not lead; ask {} at {}", leader.name, leader.address);
            let metadata = [("leader", leader.address.as_str()), ("leader_name", leader.name.as_str())];
            status::error(ErrorClass::Retry, "NOT_LEADING", text, &metadata)
        }
        None => {
            let text = "this coordinator does not lead now; try again, or ask the one that GetLeader names";
            status::error(ErrorClass::Retry, "NOT_LEADING", text, &[])
        }
    }
}

/// This coordinator has not seen yet what the store has.
pub(super) fn behind() -> Status {
    let text = "this coordinator is behind the store; try again, or ask another";
    status::error(ErrorClass::Retry, "BEHIND", text, &[])
}

pub(super) fn events_gone(run: &RunId, after: u64) -> Status {
    let text = format!(
        "events after revision {after} are no longer kept; watch again without after_revision, and read the run's events.jsonl"
    );
    status::error(ErrorClass::Fenced, "EVENTS_GONE", text, &[("run", run.as_str())])
}

pub(super) fn no_leader() -> Status {
    status::error(ErrorClass::Retry, "NO_LEADER", "no coordinator leads now; try again in a few seconds", &[])
}

pub(super) fn internal(what: &str) -> Status {
    status::error(ErrorClass::Fatal, "INTERNAL", what, &[])
}

pub(super) fn bad_field(path: &str, message: String) -> Status {
    status::invalid("INVALID_REQUEST", &Violations::one(path, message))
}
