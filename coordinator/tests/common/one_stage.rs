//! Plans that need no files, and what trainers say of such runs. The simulation's, too (`tests/sim`).

use thaw_coordinator::intake::{Planned, SpecPlanner};
use thaw_proto::ids::GroupIndex;
use thaw_proto::pb;
use thaw_proto::plan::{DataSummary, LayerGroup, Plan, PlannedStage, StageCost};
use thaw_proto::spec::{LrSchedulerType, OnEnter, RunSpec};
use thaw_proto::violation::Violations;

/// Plans one stage of the head, whatever the spec.
#[derive(Debug)]
pub(crate) struct OneStage;

impl SpecPlanner for OneStage {
    fn plan(&self, spec: &RunSpec) -> Result<Planned, Violations> {
        let group = LayerGroup { name: "head".to_owned(), parameters: 10, forward_flops: 10, embedding: false };
        let stage = PlannedStage {
            name: "head".to_owned(),
            trainable_groups: vec![GroupIndex(0)],
            learning_rates: vec![spec.learning_rate],
            until: spec.until.clone(),
            on_enter: OnEnter::RestoreBest,
            schedule: LrSchedulerType::Linear,
            warmup_steps: 0,
            max_steps: 100,
            trainable_parameters: 10,
            all_reduce_bytes: 40,
            memory_bytes: 160,
            boundary_bytes_per_sample: 0,
            thawed_groups: vec![GroupIndex(0)],
            cost: StageCost::default(),
            recompute_batch_norm: false,
            workers: None,
            plateau: None,
        };
        let data = DataSummary {
            train_samples: 4,
            eval_samples: 4,
            test_samples: 4,
            class_counts: vec![6, 6],
            fingerprint: "ff".to_owned(),
        };
        let plan = Plan {
            groups: vec![group],
            stages: vec![stage],
            classes: vec!["no".to_owned(), "yes".to_owned()],
            data,
            logical_shards: spec.logical_shards,
            global_batch_size: spec.global_batch_size,
            steps_per_epoch: 1,
            notes: Vec::new(),
            feature_size: 5,
        };
        Ok(Planned { plan, index: None })
    }
}

pub(crate) fn position(step: u64) -> pb::Position {
    pb::Position { stage: 0, stage_step: u32::try_from(step).unwrap_or(u32::MAX), step }
}

pub(crate) fn evaluation(step: u64) -> pb::Evaluation {
    pb::Evaluation {
        position: Some(position(step)),
        loss: 0.25,
        accuracy: 0.75,
        macro_f1: 0.5,
        samples: 4,
        confusion: vec![2, 1, 0, 1],
    }
}
