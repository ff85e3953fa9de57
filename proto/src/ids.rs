//! Names and counters as types of their own, so that a step is never taken for a rank.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// The value one above.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter! {
    /// Membership counter of a run. 0 is "before the first gang".
    Generation(u64)
}
counter! {
    /// The coordinator's fencing token.
    LeaderEpoch(u64)
}
counter! {
    /// How often a run has started or resumed, from 1.
    Attempt(u32)
}
counter! {
    /// Optimizer updates in the run, over all stages.
    Step(u64)
}
counter! {
    /// Index into a plan's stages.
    StageIndex(u32)
}
counter! {
    /// Index into a plan's layer groups; 0 is nearest the input.
    GroupIndex(u32)
}
counter! {
    /// Position in a gang.
    Rank(u32)
}
counter! {
    /// One device of a worker.
    Slot(u32)
}
name! {
    /// `<spec name>-<8 hex digits>`.
    RunId
}
name! {
    /// Unique name of a worker.
    WorkerName
}
name! {
    /// UUID of one process life.
    Incarnation
}
