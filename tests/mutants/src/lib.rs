//! Planted protocol bugs, for the simulation's mutation gate: each is one condition in the code it harms, and some seed of the
//! simulation must notice it.
//!
//! Without the feature `mutants` the question is answered by a constant, so nothing of a bug is left in a binary. Nobody's
//! manifest turns the feature on, and a build without debug assertions refuses it.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("the feature `mutants` plants bugs; it is for the simulation's debug builds alone");

/// Every bug that can be planted.
pub const ALL: &[&str] = &[
    "abort-forgotten",
    "acknowledged-before-head",
    "cancel-does-not-win",
    "cancel-leaves-trainers",
    "commit-before-all-built",
    "failures-uncounted",
    "reads-do-not-wait",
    "gang-key-reused",
    "generation-reused",
    "hash-unchecked",
    "held-slots-are-free",
    "leader-compare-dropped",
    "leader-takes-over",
    "leader-without-lease",
    "lower-generation-accepted",
    "manifest-overwritten",
    "members-not-awaited",
    "progress-uncounted",
    "reports-not-repeated",
    "request-forgotten",
    "resume-from-nothing",
    "save-without-compare",
    "shard-dropped",
    "speak-before-save",
    "strays-not-stopped",
    "success-uncommitted",
    "takeover-stops-all",
    "two-ranks-commit",
    "unknown-is-applied",
];

/// Whether this build can plant bugs.
pub const AVAILABLE: bool = cfg!(feature = "mutants");

/// Whether the named bug is planted.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
#[must_use]
pub const fn planted(_name: &str) -> bool {
    false
}

#[cfg(feature = "mutants")]
pub use self::active::{plant, planted, present};

#[cfg(feature = "mutants")]
mod active {
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<&'static str>> = const { Cell::new(None) };
    }

    /// Whether the named bug is planted on this thread: a simulation runs on one.
    #[must_use]
    pub fn planted(name: &str) -> bool {
        debug_assert!(super::ALL.contains(&name), "{name} is not in the list");
        PLANTED.get() == Some(name)
    }

    /// The one that is planted on this thread.
    #[must_use]
    pub fn present() -> Option<&'static str> {
        PLANTED.get()
    }

    /// Plants a bug on this thread, or none.
    pub fn plant(name: Option<&'static str>) {
        PLANTED.set(name);
    }
}
