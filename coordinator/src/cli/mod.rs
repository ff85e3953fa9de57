//! The command line. Results go to stdout, words to stderr; nothing is coloured or animated off a terminal.

mod args;
mod chaos;
mod client;
mod embedded;
mod lr_find;
mod progress;
mod recover;
mod show;
mod train;
mod verify;

pub(crate) use args::Args;
use args::{Format, Verb};
use client::{Again, Coordinators};
use std::process::ExitCode;
use thaw_proto::text::Printable;
use thaw_proto::violation::Violations;
use thaw_proto::{pb, text};
use thaw_runtime::telemetry::{self, Options};

/// A verb that could not be carried out: one text for people, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    code: u8,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl Failure {
    /// The request itself is wrong.
    fn invalid(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 2 }
    }

    /// The request was right and did not succeed.
    fn failed(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 1 }
    }

    /// A run has ended since one step failed again and again. Starting it again as it is would end the same way.
    fn of_step(text: impl Into<String>) -> Self {
        Self { text: text.into(), code: 3 }
    }

    fn from_error(error: &dyn std::error::Error) -> Self {
        Self::failed(thaw_runtime::chain(error))
    }
}

impl From<Violations> for Failure {
    fn from(violations: Violations) -> Self {
        Self::invalid(violations.to_string())
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        let text = thaw_proto::status::describe(&status);
        match status.code() {
            tonic::Code::InvalidArgument | tonic::Code::NotFound => Self::invalid(text),
            _ => Self::failed(text),
        }
    }
}

/// Carries out one verb.
pub(crate) fn run(args: Args) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: cannot start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        let options = Options::from_env(args.verb.default_log_filter()).map_err(|error| Failure::from_error(&error))?;
        let _telemetry = telemetry::init("thaw", &options).map_err(|error| Failure::from_error(&error))?;
        dispatch(args).await
    });
    // Threads that index data or wait on a socket must not hold the exit.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => code,
        Err(failure) => {
            for line in failure.text.lines() {
                eprintln!("error: {line}");
            }
            ExitCode::from(failure.code)
        }
    }
}

async fn dispatch(args: Args) -> Result<ExitCode, Failure> {
    let coordinators = || Coordinators::at(&args.server, client::load(&args.tls)?);
    match args.verb {
        Verb::Serve(options) => embedded::serve(options, client::load(&args.tls)?).await,
        Verb::Up(options) => embedded::up(options).await,
        Verb::Train(options) => train::train(options).await,
        Verb::Verify(options) => verify::verify(options).await,
        Verb::Chaos(options) => chaos::chaos(options, &args.server).await,
        Verb::LrFind(options) => lr_find::lr_find(options).await,
        Verb::Recover(options) => recover::recover(options).await,
        Verb::Plan(options) => train::plan(options).await,
        Verb::Submit { spec, output } => {
            let run = client::submit(&mut coordinators()?, train::read_spec(&spec)?.0).await?;
            eprintln!("watch it: thaw watch {}", run.name);
            show::run(&run, output)
        }
        Verb::Get { name, output } => {
            let request = pb::GetRunRequest { name };
            let call = async |mut runs: client::Runs| runs.get_run(request.clone()).await;
            show::run(&coordinators()?.call(Again::Yes, call).await?, output)
        }
        Verb::Explain { name, output } => {
            let request = pb::ExplainRunRequest { name };
            let call = async |mut runs: client::Runs| runs.explain_run(request.clone()).await;
            show::explained(&coordinators()?.call(Again::Yes, call).await?, output)
        }
        Verb::List { output } => show::runs(&client::list(&mut coordinators()?).await?, output),
        Verb::Watch { name, output } => train::watch(&mut coordinators()?, &name, output).await,
        Verb::Logs { name, follow } => client::logs(&mut coordinators()?, name, follow).await,
        Verb::Cancel { name, output } => {
            let request = pb::CancelRunRequest { name };
            let call = async |mut runs: client::Runs| runs.cancel_run(request.clone()).await;
            show::run(&coordinators()?.call(Again::Yes, call).await?, output)
        }
        Verb::Suspend { name, output } => {
            let request = pb::SuspendRunRequest { name };
            let call = async |mut runs: client::Runs| runs.suspend_run(request.clone()).await;
            show::run(&coordinators()?.call(Again::Yes, call).await?, output)
        }
        Verb::Resume { name, output } => {
            let request = pb::ResumeRunRequest { name };
            let call = async |mut runs: client::Runs| runs.resume_run(request.clone()).await;
            // A second one would be refused.
            show::run(&coordinators()?.call(Again::No, call).await?, output)
        }
        Verb::Scale { name, workers, output } => {
            let request = pb::ScaleRunRequest { name, workers };
            let call = async |mut runs: client::Runs| runs.scale_run(request.clone()).await;
            show::run(&coordinators()?.call(Again::Yes, call).await?, output)
        }
        Verb::Health { service, live } => client::health(&mut coordinators()?, service, live).await,
        Verb::Workers { output } => show::workers(&client::workers(&mut coordinators()?).await?, output),
        Verb::Checkpoints { name, output } => {
            let request = pb::ListCheckpointsRequest { name };
            let call = async |mut runs: client::Runs| runs.list_checkpoints(request.clone()).await;
            show::checkpoints(&coordinators()?.call(Again::Yes, call).await?, output)
        }
    }
}

/// Prints a result: the one place that writes to stdout.
#[expect(clippy::print_stdout, reason = "results of the command line belong on stdout")]
fn print(text: &str) {
    println!("{}", text.trim_end());
}

/// A message as JSON or YAML, or as `table` draws it.
fn print_as<M: Printable>(message: &M, output: Format, table: impl FnOnce() -> String) {
    match output {
        Format::Json => print(&text::to_json(message)),
        Format::Yaml => print(&text::to_yaml(message)),
        Format::Table | Format::Wide => print(&table()),
    }
}
