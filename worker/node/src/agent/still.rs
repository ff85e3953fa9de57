//! [`Still`]: for how many looks in a row training has not moved (AGENT-8).

use crate::collective::Movement;

#[derive(Debug)]
pub(super) struct Still {
    /// Beats at the last look.
    beats: u64,
    /// In a row at which it had not moved.
    looks: u32,
    /// At how many that is too long. `None`: never.
    most: Option<u32>,
}

impl Still {
    pub(super) fn new(most: Option<u32>) -> Self {
        Self { beats: 0, looks: 0, most }
    }

    /// Looks again. `answers`: whether its process has run since the last look.
    pub(super) fn look(&mut self, now: Movement, answers: bool) {
        if now.beats != self.beats || now.waits || now.beats == 0 {
            (self.beats, self.looks) = (now.beats, 0);
        } else if answers {
            self.looks = self.looks.saturating_add(1);
        }
    }

    pub(super) fn looks(&self) -> u32 {
        self.looks
    }

    pub(super) fn is_too_long(&self) -> bool {
        self.most.is_some_and(|most| self.looks >= most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use thaw_proto::ids::{StageIndex, Step};

    fn movement(beats: u64, waits: bool) -> Movement {
        Movement { beats, waits, stage: StageIndex(0), step: Step(0) }
    }

    /// Beats, whether it waits, and whether it answers.
    type Look = (u64, bool, bool);

    fn after(most: Option<u32>, looks: &[Look]) -> Still {
        let mut still = Still::new(most);
        for (beats, waits, answers) in looks {
            still.look(movement(*beats, *waits), *answers);
        }
        still
    }

    /// AGENT-8
    #[test]
    fn only_looks_at_a_process_that_runs_and_neither_beats_nor_waits_count() {
        let table: [(&str, &[Look], u32); 7] = [
            ("the first look finds it moving", &[(1, false, true)], 0),
            ("it stands", &[(1, false, true), (1, false, true), (1, false, true)], 2),
            ("one beat is enough", &[(1, false, true), (1, false, true), (2, false, true), (2, false, true)], 1),
            ("it waits for others", &[(1, false, true), (1, false, true), (1, true, true), (1, true, true)], 0),
            ("what did not run could not move", &[(1, false, true), (1, false, false), (1, false, true)], 1),
            ("it has just begun to compute", &[(1, true, true), (1, true, true), (1, false, true)], 1),
            ("who never beats is not judged by that", &[(0, false, true), (0, false, true), (0, false, true)], 0),
        ];
        for (what, looks, expected) in table {
            assert_eq!(after(None, looks).looks(), expected, "{what}");
        }
    }

    #[test]
    fn the_limit_is_reached_at_its_last_look_or_never() {
        let stands = [(1, false, true); 4];
        assert!(after(Some(3), &stands).is_too_long());
        assert!(!after(Some(4), &stands).is_too_long());
        assert!(!after(None, &stands).is_too_long());
    }
}
