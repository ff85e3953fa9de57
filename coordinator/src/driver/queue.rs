//! Who waits for slots, and why.

use super::Error;
use super::main_loop::MainLoop;
use crate::clock;
use std::collections::BTreeMap;
use thaw_core::run_machine::wants_slots;
use thaw_core::scheduler::{self, Policy, Reason, Share, Verdict, Waiting};
use thaw_proto::convert::WireEnum;
use thaw_proto::ids::RunId;
use thaw_proto::pb;

/// What tenants may have, by name; one that is not named has the default.
pub type Tenants = BTreeMap<String, Share>;

impl MainLoop {
    /// What becomes of every run that wants slots, now.
    pub(super) fn schedule(&self) -> BTreeMap<RunId, Verdict> {
        let now = clock::now_ms().unsigned_abs();
        let wants = |run: &super::main_loop::Run| wants_slots(&run.stored.record, &run.observed, now);
        let waiting: Vec<Waiting> = self.runs.values().filter_map(wants).collect();
        if waiting.is_empty() {
            return BTreeMap::new();
        }
        let free = self.workers.free(&self.held());
        scheduler::schedule(&Policy::default(), now, &self.tenants, &self.held_by_tenant(), &waiting, &free)
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
        let verdicts = self.schedule();
        let waits = |verdict: &Verdict| matches!(verdict, Verdict::Waits { .. });
        let (queue_place, kept_for) = match verdicts.get(id) {
            Some(Verdict::Waits { place, reason: Reason::Reserved { run } }) => (*place, format!("runs/{run}")),
            Some(Verdict::Waits { place, .. }) => (*place, String::new()),
            Some(Verdict::Granted(_)) | None => (0, String::new()),
        };
        Ok(pb::ExplainRunResponse {
            name: format!("runs/{id}"),
            state: record.state.number(),
            reason: record.reason.number(),
            message: record.message.clone(),
            queue_place,
            queue_length: count(verdicts.values().filter(|verdict| waits(verdict)).count()),
            tenant_slots: self.held_by_tenant().get(&tenant).copied().unwrap_or(0),
            tenant_quota: self.tenants.get(&tenant).and_then(|share| share.quota),
            tenant,
            slots_needed: record.spec.workers.min,
            slots_free: count(self.workers.free(&self.held()).len()),
            kept_for,
        })
    }
}

fn count(things: usize) -> u32 {
    u32::try_from(things).unwrap_or(u32::MAX)
}
