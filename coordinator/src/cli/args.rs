//! What can be typed.

use super::Failure;
use super::chaos::{Fault, Moment};
use clap::{Parser, Subcommand, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use thaw_coordinator::store::{EtcdAccess, ParseError, Password, StoreUrl};
use thaw_runtime::tls::TlsOptions;

/// Fine-tune a pretrained backbone by gradual unfreezing, on one machine or a cluster.
#[derive(Debug, Parser)]
#[command(name = "thaw", version, max_term_width = 120)]
pub(crate) struct Args {
    /// Address of the coordinator, or of several with commas between, for the verbs that talk to one.
    #[arg(long, global = true, env = "THAW_SERVER", default_value = "http://127.0.0.1:7070")]
    pub(crate) server: String,
    #[command(flatten)]
    pub(crate) tls: TlsOptions,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Train a spec on this machine, from nothing to the trained model.
    #[command(
        after_help = "Example:\n  thaw train spec.yaml --workers 2\n\nThe same through a coordinator:\n  thaw up --workers 2 &\n  thaw submit spec.yaml\n\nWith grpcurl:\n  grpcurl -plaintext -d @ 127.0.0.1:7070 thaw.v1.RunService/CreateRun <<< '{\"spec\": {...}}'"
    )]
    Train(TrainOptions),
    /// Find a learning rate: train one stage of a spec on this machine with a rate that rises until the loss does.
    #[command(
        after_help = "Example:\n  thaw lr-find spec.yaml --workers 2\n\nIt is a run of at most 100 updates; a loss that has left its valley ends it early.\n\nWith grpcurl, a stage with lr_scheduler {type: RANGE_TEST} does the same:\n  grpcurl -plaintext -d '{\"spec\": {...}}' 127.0.0.1:7070 thaw.v1.RunService/CreateRun"
    )]
    LrFind(LrFindOptions),
    /// Check what a run left in its folder, and set its plan beside what was measured.
    #[command(
        after_help = "Example:\n  thaw verify debian-sections-f9d98544\n  thaw verify /shared/thaw/runs/debian-sections-f9d98544\n\nIt reads files alone; what they belong to is in the run:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/GetRun"
    )]
    Verify(VerifyOptions),
    /// Train a spec twice on a cluster of its own, the second time under faults, and report what they cost. Needs etcd on the path.
    #[command(
        after_help = "Example:\n  thaw chaos spec.yaml --workers 8 --faults kill-trainer,kill-leader --count 40 --seed 7\n\nIt starts etcd, coordinators and workers on this machine, and ends all of them. With --attach it harms a staging cluster:\n  thaw chaos spec.yaml --attach --server http://127.0.0.1:7070 --data-dir /shared/thaw\n\nIt fails where the weights differ from the\nundisturbed run's, a run does not end, samples are missing or used twice, or a process is left; a goal that is missed\nis no failure. The same seed gives the same faults in the same order.\n\nWhat a client sees of a run meanwhile:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/WatchRun"
    )]
    Chaos(ChaosOptions),
    /// Start a coordinator with an embedded store and workers, on this machine.
    #[command(
        after_help = "Example:\n  thaw up --workers 2\n\nWith grpcurl:\n  grpcurl -plaintext 127.0.0.1:7070 list"
    )]
    Up(UpOptions),
    /// Start a coordinator alone.
    #[command(
        after_help = "Example:\n  thaw serve --store etcd://127.0.0.1:2379/thaw --data-dir /shared/thaw\n\nOn other than loopback addresses it serves with TLS only:\n  thaw serve --listen 0.0.0.0:7070 --tls-ca ca.crt --tls-cert tls.crt --tls-key tls.key --store ...\n\nWith grpcurl:\n  grpcurl -plaintext 127.0.0.1:7070 grpc.health.v1.Health/Check"
    )]
    Serve(ServeOptions),
    /// Rebuild a lost store from the folders of its runs. Stop all coordinators first.
    #[command(
        after_help = "Example:\n  thaw recover --store etcd://127.0.0.1:2379/thaw --data-dir /shared/thaw\n\nEach run goes on from its newest whole checkpoint. Nothing does this by itself: a coordinator that finds an empty store\nbeside a data folder with runs refuses to lead."
    )]
    Recover(RecoverOptions),
    /// Show what a spec would do: groups, stages, rates, costs, and every mistake. Runs nothing.
    #[command(
        after_help = "Example:\n  thaw plan spec.yaml\n\nWith grpcurl:\n  grpcurl -plaintext -d '{\"spec\": {...}, \"validate_only\": true}' 127.0.0.1:7070 thaw.v1.RunService/CreateRun"
    )]
    Plan(PlanOptions),
    /// Give a spec to a coordinator.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"spec\": {...}}' 127.0.0.1:7070 thaw.v1.RunService/CreateRun"
    )]
    Submit {
        /// The run spec, YAML or JSON.
        spec: PathBuf,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Show one run.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/GetRun"
    )]
    Get {
        name: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Show all runs, newest first.
    #[command(after_help = "With grpcurl:\n  grpcurl -plaintext 127.0.0.1:7070 thaw.v1.RunService/ListRuns")]
    List {
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Show why a run does not train yet, and its place in the queue.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/ExplainRun"
    )]
    Explain {
        name: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Follow a run to its end; the exit code is its outcome, 3 where one step failed again and again.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\", \"include_progress\": true}' 127.0.0.1:7070 thaw.v1.RunService/WatchRun"
    )]
    Watch {
        name: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Show what a run's trainers wrote.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\", \"follow\": true}' 127.0.0.1:7070 thaw.v1.RunService/TailLogs"
    )]
    Logs {
        name: String,
        /// Go on until the run has ended.
        #[arg(short, long)]
        follow: bool,
    },
    /// End a run that has not ended.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/CancelRun"
    )]
    Cancel {
        name: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Save a run and give its workers back.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/SuspendRun"
    )]
    Suspend {
        name: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Go on with a suspended run.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/ResumeRun"
    )]
    Resume {
        name: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Set how many trainers a run is to have; those that stay are not restarted.
    #[command(
        after_help = "Example:\n  thaw scale RUN 4\n\nWith grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\", \"workers\": 1}' 127.0.0.1:7070 thaw.v1.RunService/ScaleRun"
    )]
    Scale {
        name: String,
        /// From workers.min to workers.max of the run's spec.
        workers: u32,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Show the workers.
    #[command(after_help = "With grpcurl:\n  grpcurl -plaintext 127.0.0.1:7070 thaw.v1.ClusterService/ListWorkers")]
    Workers {
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Ask a coordinator whether it serves; the exit code is the answer.
    #[command(
        after_help = "Example:\n  thaw health\n  thaw health --service thaw.v1.WorkerService\n\nWith grpcurl:\n  grpcurl -plaintext 127.0.0.1:7070 grpc.health.v1.Health/Check"
    )]
    Health {
        /// One service, e.g. thaw.v1.RunService. Default: the coordinator as a whole.
        #[arg(long, default_value = "")]
        service: String,
        /// Any answer will do: the process lives, even if it does not serve now.
        #[arg(long)]
        live: bool,
    },
    /// Show a run's checkpoints.
    #[command(
        after_help = "With grpcurl:\n  grpcurl -plaintext -d '{\"name\": \"RUN\"}' 127.0.0.1:7070 thaw.v1.RunService/ListCheckpoints"
    )]
    Checkpoints {
        name: String,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
}

impl Verb {
    /// Servers say what they do; client verbs speak for themselves and log only what went wrong.
    pub(crate) fn default_log_filter(&self) -> &'static str {
        match self {
            Self::Serve(_) | Self::Up(_) => "info",
            Self::Train(_)
            | Self::Recover(_)
            | Self::LrFind(_)
            | Self::Chaos(_)
            | Self::Verify(_)
            | Self::Plan(_)
            | Self::Submit { .. }
            | Self::Get { .. }
            | Self::Explain { .. }
            | Self::List { .. }
            | Self::Watch { .. }
            | Self::Logs { .. }
            | Self::Cancel { .. }
            | Self::Suspend { .. }
            | Self::Resume { .. }
            | Self::Scale { .. }
            | Self::Workers { .. }
            | Self::Health { .. }
            | Self::Checkpoints { .. } => "error",
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct TrainOptions {
    /// The run spec, YAML or JSON.
    pub(crate) spec: PathBuf,
    #[command(flatten)]
    pub(crate) cluster: ClusterOptions,
    /// Address the coordinator listens on while it trains. Port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct LrFindOptions {
    /// The run spec, YAML or JSON.
    pub(crate) spec: PathBuf,
    /// The stage of its plan to test. Default: the first.
    #[arg(long)]
    pub(crate) stage: Option<String>,
    #[command(flatten)]
    pub(crate) cluster: ClusterOptions,
    /// Address the coordinator listens on meanwhile. Port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub(crate) listen: SocketAddr,
    /// A plot, or every point as JSON.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct VerifyOptions {
    /// The run's id, or its folder.
    pub(crate) run: String,
    /// The folder that has the run.
    #[arg(long, env = "THAW_DATA_DIR", default_value = ".thaw")]
    pub(crate) data_dir: PathBuf,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ChaosOptions {
    /// The run spec, YAML or JSON.
    pub(crate) spec: PathBuf,
    /// Workers of one slot each.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) workers: u32,
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub(crate) coordinators: u32,
    /// Kinds of faults, with commas between; each comes as often as the others.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Fault::KillTrainer, Fault::KillAgent, Fault::KillLeader, Fault::HandOver])]
    pub(crate) faults: Vec<Fault>,
    /// Faults in all. A run that ends before them has fewer.
    #[arg(long, default_value_t = 20)]
    pub(crate) count: usize,
    /// Seconds from one fault to the next, or until the run has recovered and saved again, whichever is later.
    #[arg(long, default_value_t = 5.0, value_parser = seconds)]
    pub(crate) every: f64,
    /// What order and victims follow from.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Harm the cluster at --server instead of one of its own, which must train nothing else: those of its processes that run on this machine. Whoever started them starts
    /// them again.
    #[arg(long)]
    pub(crate) attach: bool,
    /// With --attach: the folder that holds the folder runs.
    #[arg(long, env = "THAW_DATA_DIR", default_value = ".thaw")]
    pub(crate) data_dir: PathBuf,
    /// When faults that are due are inflicted.
    #[arg(long, value_enum, default_value_t = Moment::Any)]
    pub(crate) at: Moment,
    /// Seconds that an outage lasts.
    #[arg(long, default_value_t = 300.0, value_parser = seconds)]
    pub(crate) outage: f64,
    /// Seconds that a load lasts.
    #[arg(long, default_value_t = 300.0, value_parser = seconds)]
    pub(crate) load: f64,
    /// Clients that watch the run under faults, each leaving again and again to go on elsewhere from the revision it has seen, while etcd
    /// forgets its history: all of them must see each event once.
    #[arg(long, default_value_t = 0)]
    pub(crate) watchers: usize,
    /// Leave the undisturbed run out: weights are not compared.
    #[arg(long)]
    pub(crate) no_reference: bool,
    /// Workers of the undisturbed run. Its weights and samples do not depend on them; fewer are faster where cores are few.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64), conflicts_with = "no_reference")]
    pub(crate) reference_workers: Option<u32>,
    /// Before the runs, also time requests of clients, and what etcd holds and writes.
    #[arg(long)]
    pub(crate) requests: bool,
    /// Folder of its store, runs and logs; must not be there. Default: one for temporary files, removed at the end unless something broke.
    #[arg(long)]
    pub(crate) folder: Option<PathBuf>,
    /// The worker's program. Default: thaw-worker beside this program.
    #[arg(long)]
    pub(crate) worker_program: Option<PathBuf>,
    /// Passed on to every trainer: point@step=path, see `thaw-worker trainer --help`. For tests.
    #[arg(long, hide = true)]
    pub(crate) hold: Option<String>,
    /// Said to itself, where it has made namespaces.
    #[arg(long, hide = true)]
    pub(crate) in_namespaces: bool,
    /// Plain lines, or everything as JSON.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

fn seconds(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is no number of seconds"))?;
    if (0.0..=86_400.0).contains(&number) { Ok(number) } else { Err("give 0 to 86400 seconds".to_owned()) }
}

#[derive(Debug, clap::Args)]
pub(crate) struct UpOptions {
    #[command(flatten)]
    pub(crate) cluster: ClusterOptions,
    #[arg(long, default_value = "127.0.0.1:7070")]
    pub(crate) listen: SocketAddr,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ClusterOptions {
    /// Worker processes to start.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub(crate) workers: u32,
    /// Folder of the store, the runs and their checkpoints.
    #[arg(long, env = "THAW_DATA_DIR", default_value = ".thaw")]
    pub(crate) data_dir: PathBuf,
    /// The worker's program. Default: thaw-worker beside this program.
    #[arg(long)]
    pub(crate) worker_program: Option<PathBuf>,
    /// Passed on to every trainer: point@step=path, see `thaw-worker trainer --help`. For tests.
    #[arg(long, hide = true)]
    pub(crate) hold: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ServeOptions {
    #[command(flatten)]
    pub(crate) store: StoreOptions,
    /// Folder of the runs and their checkpoints, shared with the workers and the other coordinators.
    #[arg(long, env = "THAW_DATA_DIR", default_value = ".thaw")]
    pub(crate) data_dir: PathBuf,
    /// Address to listen on. Without TLS a loopback address.
    #[arg(long, default_value = "127.0.0.1:7070")]
    pub(crate) listen: SocketAddr,
    /// Unique name of this coordinator.
    #[arg(long, env = "THAW_NAME", default_value = "coordinator")]
    pub(crate) name: String,
    /// HOST:PORT under which users and workers reach this coordinator. Absent: where it listens.
    #[arg(long, env = "THAW_ADVERTISE")]
    pub(crate) advertise: Option<String>,
    /// TENANT=SLOTS that the tenant's runs may hold together, once for each tenant. Default: as many as there are.
    #[arg(long, value_name = "TENANT=SLOTS", value_parser = tenant_number)]
    pub(crate) tenant_quota: Vec<(String, u32)>,
    /// TENANT=WEIGHT: with twice another's weight, a tenant's turn comes twice as often. Default: 1.
    #[arg(long, value_name = "TENANT=WEIGHT", value_parser = tenant_weight)]
    pub(crate) tenant_weight: Vec<(String, u32)>,
}

fn tenant_number(text: &str) -> Result<(String, u32), String> {
    let (tenant, number) = text.split_once('=').ok_or("use TENANT=NUMBER, e.g. vision=8")?;
    let number = number.parse().map_err(|_| format!("{number:?} is no whole number"))?;
    Ok((tenant.to_owned(), number))
}

fn tenant_weight(text: &str) -> Result<(String, u32), String> {
    let (tenant, weight) = tenant_number(text)?;
    if weight == 0 { Err("a weight is at least 1".to_owned()) } else { Ok((tenant, weight)) }
}

/// Where run state is kept, and what etcd is shown.
#[derive(Debug, clap::Args)]
pub(crate) struct StoreOptions {
    /// embedded:PATH, or `etcd://HOST:PORT[,HOST:PORT…][/PREFIX]`; etcd+tls:// where etcd speaks TLS.
    #[arg(long, env = "THAW_STORE")]
    store: String,
    /// PEM file of the authority that signed etcd's certificate; required with etcd+tls.
    #[arg(long, env = "THAW_ETCD_CA")]
    etcd_ca: Option<PathBuf>,
    /// PEM file of this coordinator's certificate, where etcd asks for one.
    #[arg(long, env = "THAW_ETCD_CERT")]
    etcd_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key.
    #[arg(long, env = "THAW_ETCD_KEY")]
    etcd_key: Option<PathBuf>,
    /// User, where etcd asks for one. Its password is in --etcd-password-file, or in the environment as THAW_ETCD_PASSWORD.
    #[arg(long, env = "THAW_ETCD_USER")]
    etcd_user: Option<String>,
    /// File with the user's password.
    #[arg(long, env = "THAW_ETCD_PASSWORD_FILE")]
    etcd_password_file: Option<PathBuf>,
}

impl StoreOptions {
    /// The checked address.
    pub(crate) fn url(&self) -> Result<StoreUrl, Failure> {
        self.store.parse().map_err(|error: ParseError| Failure::invalid(error.to_string()))
    }

    pub(crate) fn access(&self) -> EtcdAccess {
        // Never an argument: those are for everybody on the machine to see.
        let password = std::env::var("THAW_ETCD_PASSWORD").ok().filter(|password| !password.is_empty());
        EtcdAccess {
            ca: self.etcd_ca.clone(),
            cert: self.etcd_cert.clone(),
            key: self.etcd_key.clone(),
            user: self.etcd_user.clone(),
            password_file: self.etcd_password_file.clone(),
            password: password.map(Password),
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct RecoverOptions {
    #[command(flatten)]
    pub(crate) store: StoreOptions,
    /// Folder that holds the folder runs.
    #[arg(long, env = "THAW_DATA_DIR", default_value = ".thaw")]
    pub(crate) data_dir: PathBuf,
    /// Another such folder: what the checkpoint.url of specs named. May be given several times.
    #[arg(long)]
    pub(crate) also_in: Vec<PathBuf>,
    /// Throw away what the store has.
    #[arg(long)]
    pub(crate) replace: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PlanOptions {
    /// The run spec, YAML or JSON.
    pub(crate) spec: PathBuf,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(crate) output: Format,
}

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Wide,
    Json,
    Yaml,
}
