//! Planted protocol bugs, for the simulation's mutation gate: each is one condition in the code it harms, and some seed of the
//! simulation must notice it.
//!
//! Without the feature `mutants` the question is answered by a constant, so nothing of a bug is left in a binary. Nobody's
//! manifest turns the feature on, and a build without debug assertions refuses it.

#[cfg(all(feature = "mutants", not(debug_assertions)))]
compile_error!("the feature `mutants` plants bugs; it is for the simulation's debug builds alone");

/// Every bug that can be planted, sorted.
pub const ALL: &[&str] = &[
    "abort-forgotten",
    "acknowledged-before-head",
    "applied-step-undone",
    "cancel-does-not-win",
    "cancel-leaves-trainers",
    "commit-before-all-built",
    "copy-unchecked",
    "digests-not-compared",
    "failures-uncounted",
    "gang-key-reused",
    "generation-reused",
    "hash-unchecked",
    "head-forgotten",
    "held-slots-are-free",
    "interrupted-looks-finished",
    "laggard-goes-on",
    "leader-compare-dropped",
    "leader-takes-over",
    "leader-without-lease",
    "leavers-let-go-early",
    "lower-generation-accepted",
    "manifest-overwritten",
    "members-not-awaited",
    "preempts-above",
    "progress-uncounted",
    "quota-ignored",
    "reads-do-not-wait",
    "reports-not-repeated",
    "request-forgotten",
    "resume-from-nothing",
    "save-without-compare",
    "scale-unbounded",
    "shard-dropped",
    "silence-ends-leader",
    "speak-before-save",
    "step-taken-twice",
    "strays-not-stopped",
    "success-uncommitted",
    "sum-out-of-order",
    "survivors-stopped",
    "takeover-stops-all",
    "two-ranks-commit",
    "unapplied-step-kept",
    "unknown-is-applied",
    "waits-by-wall-clock",
    "yield-for-good",
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

#[cfg(test)]
mod tests {
    #[test]
    fn each_is_listed_once_and_in_order() {
        assert!(super::ALL.is_sorted_by(|one, next| one < next));
    }
}
