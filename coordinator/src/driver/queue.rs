//! Who waits for slots, and why.

use super::Error;
use super::main_loop::MainLoop;
use crate::clock;
use crate::clock::timestamp;
use std::collections::BTreeMap;
use thaw_core::gang::FreeSlot;
use thaw_core::quarantine::{self, Quarantine, Resting};
use thaw_core::run_machine::{RunRecord, gives_up, holds_slots, wants_slots};
use thaw_core::scheduler::{self, Decided, Policy, Reason, Running, Share, Verdict, Waiting};
use thaw_proto::convert::WireEnum;
use thaw_proto::ids::RunId;
use thaw_proto::pb;
use thaw_proto::run::RunState;

/// What tenants may have, by name; one that is not named has the default.
pub type Tenants = BTreeMap<String, Share>;

impl MainLoop {
    /// What becomes of every run that wants slots, now.
    pub(super) fn schedule(&self) -> Decided {
        let now = clock::now();
        let wants = |run: &super::main_loop::Run| wants_slots(&run.stored.record, &run.observed, now);
        let waiting: Vec<Waiting> = self.runs.values().filter_map(wants).collect();
        if waiting.is_empty() {
            return Decided { verdicts: BTreeMap::new(), reclaim: None };
        }
        let held = self.held();
        let quarantined = self.quarantined();
        let mut free = self.workers.free(&held);
        free.retain(|slot| !quarantined.contains_key(slot));
        let given_up: u32 = self.runs.values().map(|run| gives_up(&run.stored.record)).sum();
        let running = Running {
            holders: self.runs.values().filter_map(|run| holds_slots(&run.stored.record, &run.observed)).collect(),
            coming: given_up + self.workers.ending(&held),
        };
        let held = self.held_by_tenant();
        scheduler::decide(&Policy::default(), now.unix_ms, &self.tenants, &held, &waiting, &free, &running)
    }

    /// Slots that nobody is given now (QUAR-3).
    pub(super) fn quarantined(&self) -> BTreeMap<FreeSlot, Quarantine> {
        let blames = self.runs.values().flat_map(|run| &run.stored.record.blames);
        quarantine::quarantined(&quarantine::Policy::default(), clock::now().unix_ms, blames)
    }

    /// Those of them that would be free.
    pub(super) fn resting(&self) -> Option<Resting> {
        let quarantined = self.quarantined();
        if quarantined.is_empty() {
            return None;
        }
        quarantine::resting(&self.workers.free(&self.held()), &quarantined)
    }

    fn held_by_tenant(&self) -> BTreeMap<String, u32> {
        let mut held = BTreeMap::new();
        for record in self.runs.values().map(|run| &run.stored.record) {
            let slots = u32::try_from(record.trainers().count()).unwrap_or(u32::MAX);
            if slots > 0 {
                *held.entry(record.spec.scheduling.tenant.clone()).or_default() += slots;
            }
        }
        held
    }

    pub(super) fn explain(&self, id: &RunId) -> Result<pb::ExplainRunResponse, Error> {
        let record = &self.find(id)?.stored.record;
        let tenant = record.spec.scheduling.tenant.clone();
        let verdicts = self.schedule().verdicts;
        let resting = self.resting();
        let slots_quarantined = resting.map_or(0, |resting| resting.slots);
        let waits = |verdict: &Verdict| matches!(verdict, Verdict::Waits { place, .. } if *place > 0);
        let (queue_place, kept_for) = match verdicts.get(id) {
            Some(Verdict::Waits { place, reason: Reason::Reserved { run } }) => (*place, format!("runs/{run}")),
            Some(Verdict::Waits { place, .. }) => (*place, String::new()),
            Some(Verdict::Granted(_)) | None => (0, String::new()),
        };
        Ok(pb::ExplainRunResponse {
            name: format!("runs/{id}"),
            state: record.state.number(),
            reason: record.reason.number(),
            message: match growth(record, verdicts.get(id), resting) {
                Some(growth) => format!("{}; {growth}", record.message),
                None => record.message.clone(),
            },
            queue_place,
            queue_length: count(verdicts.values().filter(|verdict| waits(verdict)).count()),
            tenant_slots: self.held_by_tenant().get(&tenant).copied().unwrap_or(0),
            tenant_quota: self.tenants.get(&tenant).and_then(|share| share.quota),
            tenant,
            slots_needed: record.spec.workers.min,
            world_size: record.world_size(),
            wanted_world_size: record.wanted_size(),
            slots_free: count(self.workers.free(&self.held()).len()).saturating_sub(slots_quarantined),
            slots_quarantined,
            quarantined_until: resting.map(|resting| timestamp(i64::try_from(resting.until_ms).unwrap_or(i64::MAX))),
            kept_for,
        })
    }
}

/// Why a gang that trains has fewer trainers than are wanted.
fn growth(record: &RunRecord, verdict: Option<&Verdict>, resting: Option<Resting>) -> Option<String> {
    let (present, wanted) = (record.world_size(), record.wanted_size());
    if record.state != RunState::Running || present >= wanted {
        return None;
    }
    let why = match verdict {
        Some(Verdict::Waits { reason: Reason::TooFewSlots { .. } | Reason::Preempts { .. }, .. }) => {
            let resting = resting.map_or_else(String::new, |resting| format!(", and {resting}"));
            format!("no slot is free{resting}")
        }
        Some(Verdict::Waits { reason: Reason::QuotaExhausted { quota, .. }, .. }) => {
            format!("tenant {} holds its quota of {quota}", record.spec.scheduling.tenant)
        }
        Some(Verdict::Waits { reason: Reason::Reserved { run }, .. }) => format!("free slots are kept for {run}"),
        Some(Verdict::Granted(_)) => "others are about to start".to_owned(),
        None if record.joining.is_empty() => "it is to change later".to_owned(),
        None => format!("{} start", record.joining.len()),
    };
    Some(format!("{wanted} are wanted: {why}"))
}

fn count(things: usize) -> u32 {
    u32::try_from(things).unwrap_or(u32::MAX)
}
