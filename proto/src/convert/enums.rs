//! Enums in both forms. The variants carry the same names, so one line per enum pairs them and a missing variant does not compile.

use crate::{pb, run, spec, worker};

/// A checked enum that has a message form with an additional zero value.
pub trait WireEnum: Copy + Sized {
    /// `None`: no such number. `Some(None)`: the zero value.
    fn from_number(number: i32) -> Option<Option<Self>>;
    /// The number on the wire.
    fn number(self) -> i32;
    /// Short lower-case name, e.g. `gradual_unfreezing`.
    fn name(self) -> String;
    /// Short names of all values but zero, in order.
    fn names() -> Vec<String>;
}

/// `GRADUAL_UNFREEZING` of `STRATEGY_GRADUAL_UNFREEZING`, in lower case: the name without the part it shares with the zero value's.
pub(crate) fn short_name(name: &str, zero: &str) -> String {
    let prefix = zero.strip_suffix("UNSPECIFIED").unwrap_or_default();
    name.strip_prefix(prefix).unwrap_or(name).to_ascii_lowercase()
}

macro_rules! wire_enums {
    ($($domain:ty = $wire:ty { $($variant:ident),+ $(,)? })+) => {$(
        impl From<$domain> for $wire {
            fn from(value: $domain) -> Self {
                match value {
                    $(<$domain>::$variant => <$wire>::$variant,)+
                }
            }
        }

        impl WireEnum for $domain {
            fn from_number(number: i32) -> Option<Option<Self>> {
                match <$wire>::try_from(number) {
                    Ok(<$wire>::Unspecified) => Some(None),
                    $(Ok(<$wire>::$variant) => Some(Some(<$domain>::$variant)),)+
                    Err(_) => None,
                }
            }

            fn number(self) -> i32 {
                <$wire>::from(self) as i32
            }

            fn name(self) -> String {
                short_name(<$wire>::from(self).as_str_name(), <$wire>::Unspecified.as_str_name())
            }

            fn names() -> Vec<String> {
                [$(<$domain>::$variant),+].map(WireEnum::name).to_vec()
            }
        }
    )+};
}

wire_enums! {
    spec::Strategy = pb::Strategy { FeatureExtraction, GradualUnfreezing, FullFineTuning, FromScratch, Custom }
    spec::Precision = pb::Precision { Fp32, Bf16, Fp64 }
    spec::HeadAttach = pb::HeadAttach { Auto, Replace, Append }
    spec::DataFormat = pb::DataFormat { Csv, Jsonl, ImageFolder }
    spec::Metric = pb::Metric { EvalLoss, EvalAccuracy, EvalMacroF1 }
    spec::LrSchedulerType = pb::LrSchedulerType { Constant, InverseSqrt, Linear, Cosine, SlantedTriangular, OneCycle, ReduceOnPlateau, RangeTest }
    spec::BatchNormPolicy = pb::BatchNormPolicy { Frozen, Recompute }
    spec::ThawedBatchNormPolicy = pb::ThawedBatchNorm { Auto, BatchStatistics, FrozenStatistics }
    spec::MemoryFormat = pb::MemoryFormat { Auto, Contiguous, ChannelsLast }
    spec::PrefixCacheMode = pb::PrefixCacheMode { Auto, Off, Required }
    spec::Priority = pb::Priority { Low, Normal, High }
    spec::OnEnter = pb::OnEnter { RestoreBest, Keep }
    spec::WorkerSizing = pb::WorkerSizing { Most, ByCost }
    run::RunState = pb::RunState {
        Pending, Admitted, Forming, Running, Resizing, Suspending, Suspended, Preempting, Succeeded, Failed, Cancelled,
    }
    run::RunReason = pb::RunReason {
        WaitingForWorkers, Starting, Training, TrainerLost, GangTimeout, UserRequest, LastStageEnded, NoGain, TrainerError,
        NoProgress, ReplicasDiverged, StorageError, CoordinatorRestarted, WaitingForQuota, WaitingInQueue,
        Scaled, Preempted, StepFailed, TrainerHung,
    }
    run::StageEnd = pb::StageEnd { MaxEpochs, MaxSteps, Patience, NotFinite }
    worker::CollectiveKind = pb::CollectiveKind { ReduceF32, ReduceF64, AllGather, Copy, GpuSum }
}

/// The optimizer's kind alone; [`spec::Optimizer`] also holds its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OptimizerType {
    Adamw,
    Sgd,
}

wire_enums! {
    OptimizerType = pb::OptimizerType { Adamw, Sgd }
}
