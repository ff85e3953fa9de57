//! What workers report, as inputs of the machine; and what is only passed on to readers.

use super::outbound::trainer_on;
use thaw_core::run_machine::{Ending, FailureClass, Input, Trainer};
use thaw_proto::convert;
use thaw_proto::ids::{Generation, RunId, WorkerName};
use thaw_proto::pb;
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::run::{CheckpointRef, RunResult, StageResult};
use thaw_proto::violation::Violations;
use thaw_proto::worker::RecentOperations;

/// One report, checked.
#[derive(Debug)]
pub(super) enum Report {
    /// For the machine.
    Input(Input),
    /// Measurements of a generation, which only readers want.
    Progress(pb::Progress),
    Evaluation(pb::Evaluation),
    Log(pb::LogLine),
    /// What the trainer's agent has read of it.
    Operations(RecentOperations),
}

/// A checked report with its sender.
#[derive(Debug)]
pub(super) struct Reported {
    pub(super) run: RunId,
    pub(super) trainer: Trainer,
    pub(super) generation: Generation,
    pub(super) report: Report,
}

/// Checks a report that `worker` passed on.
pub(super) fn report(worker: &WorkerName, raw: pb::TrainerReport) -> Result<Reported, Violations> {
    let key = convert::worker::trainer(&raw.run, raw.slot, &raw.incarnation)?;
    let trainer = trainer_on(worker, &key);
    let generation = Generation(raw.generation);
    let event = raw.event.ok_or_else(|| Violations::one("event", "is required"))?;
    let report = event_of(event, trainer.clone(), generation)?;
    Ok(Reported { run: key.run, trainer, generation, report })
}

fn event_of(event: Event, trainer: Trainer, generation: Generation) -> Result<Report, Violations> {
    Ok(Report::Input(match event {
        Event::Ready(ready) => Input::TrainerReady { trainer, address: ready.address, keeps: ready.keeps_state },
        Event::Built(pb::GangBuilt {}) => Input::GangBuilt { trainer, generation },
        Event::Progress(progress) => return Ok(Report::Progress(progress)),
        Event::Evaluation(evaluation) => return Ok(Report::Evaluation(evaluation)),
        Event::Log(line) => return Ok(Report::Log(line)),
        Event::Operations(raw) => {
            let recent = RecentOperations::try_from(&raw).map_err(|wrong| wrong.under("operations"))?;
            return Ok(Report::Operations(recent));
        }
        Event::Checkpoint(written) => {
            let raw =
                written.checkpoint.as_ref().ok_or_else(|| Violations::one("checkpoint.checkpoint", "is required"))?;
            let checkpoint = CheckpointRef::try_from(raw).map_err(|wrong| wrong.under("checkpoint.checkpoint"))?;
            Input::CheckpointWritten { trainer, generation, checkpoint }
        }
        Event::StageEnded(raw) => {
            let result = StageResult::try_from(&raw).map_err(|wrong| wrong.under("stage_ended"))?;
            Input::StageEnded { trainer, generation, result: Box::new(result) }
        }
        Event::Finished(raw) => {
            let result = raw.result.as_ref().ok_or_else(|| Violations::one("finished.result", "is required"))?;
            let result = RunResult::try_from(result).map_err(|wrong| wrong.under("finished.result"))?;
            let reason = convert::run::reason(raw.reason).map_err(|wrong| wrong.under("finished"))?;
            Input::Finished { trainer, generation, result: Box::new(result), reason }
        }
        Event::Suspended(pb::Suspended {}) => Input::Suspended { trainer, generation },
        Event::Failed(raw) => {
            let class = failure_class(raw.class)?;
            let reason = convert::run::reason(raw.reason).map_err(|wrong| wrong.under("failed"))?;
            Input::TrainerFailed { trainer, generation, class, reason, message: raw.message }
        }
        Event::Interrupted(raw) => Input::TrainerInterrupted { trainer, generation, message: raw.message },
        Event::Pong(pb::Pong {}) => return Err(Violations::one("pong", "is for the agent alone")),
        Event::HostSnapshot(_) => return Err(Violations::one("host_snapshot", "is for the agent alone")),
        Event::Exited(exited) => Input::TrainerExited { trainer, ending: ending(&exited) },
    }))
}

fn failure_class(number: i32) -> Result<FailureClass, Violations> {
    match pb::FailureClass::try_from(number) {
        Ok(pb::FailureClass::Retry) => Ok(FailureClass::Retry),
        Ok(pb::FailureClass::Fenced) => Ok(FailureClass::Fenced),
        Ok(pb::FailureClass::Invalid) => Ok(FailureClass::Invalid),
        Ok(pb::FailureClass::Fatal) => Ok(FailureClass::Fatal),
        Ok(pb::FailureClass::Unspecified) | Err(_) => {
            Err(Violations::one("failed.class", "is required: retry, fenced, invalid or fatal"))
        }
    }
}

fn ending(exited: &pb::TrainerExited) -> Ending {
    match (exited.code, exited.signal) {
        (_, Some(signal)) => Ending::Signal(signal),
        (Some(code), None) => Ending::Code(code),
        (None, None) => Ending::Unknown,
    }
}
