//! The binary `thaw-worker`: the agent on a node, and the trainers it starts.

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use thaw_node::agent;
use thaw_node::collective::RingAddress;
use thaw_runtime::tls::TlsOptions;
use thaw_worker::device::DeviceOptions;
use thaw_worker::trainer::{self, CacheFolders, Hold, Node};

/// The worker of a Thaw cluster.
#[derive(Debug, Parser)]
#[command(name = "thaw-worker", version)]
struct Args {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serve a coordinator from this node, with one trainer process per slot.
    Agent(AgentOptions),
    /// Train. Started by the agent, which talks to it over standard input and output.
    Trainer {
        /// Host name or address under which the trainers of other nodes reach this one.
        #[arg(long, default_value = "127.0.0.1")]
        host: String,
        /// point@step=path: at point (forward, all-reduce, update, checkpoint-write) of that step, create the file and wait to be killed;
        /// where the file exists, go on. For tests.
        #[arg(long)]
        hold: Option<Hold>,
        /// process:descriptor of the agent's memory in which this trainer records its operations over all ranks.
        #[arg(long, hide = true)]
        ring: Option<RingAddress>,
        #[command(flatten)]
        cache: CacheOptions,
        #[command(flatten)]
        device: DeviceOptions,
    },
}

/// Where this node keeps the outputs of frozen layer groups, for all runs.
#[derive(Debug, clap::Args)]
struct CacheOptions {
    /// Folder on a memory file system; emptied when the agent ends. Absent: one in /dev/shm.
    #[arg(long, env = "THAW_PREFIX_CACHE_MEMORY")]
    prefix_cache_memory: Option<PathBuf>,
    /// Folder on a local disk; kept. Absent: one in the system's folder for temporary files.
    #[arg(long, env = "THAW_PREFIX_CACHE_DISK")]
    prefix_cache_disk: Option<PathBuf>,
}

impl CacheOptions {
    fn folders(self) -> CacheFolders {
        // By user: a folder of somebody else's could not be written to.
        let own = format!("thaw-prefix-cache-{}", nix::unistd::getuid());
        CacheFolders {
            memory: self.prefix_cache_memory.unwrap_or_else(|| Path::new("/dev/shm").join(&own)),
            disk: self.prefix_cache_disk.unwrap_or_else(|| std::env::temp_dir().join(&own)),
        }
    }
}

#[derive(Debug, clap::Args)]
struct AgentOptions {
    /// Address of the coordinator, e.g. http://127.0.0.1:7070, https:// with TLS; of several with commas between, the one that leads is found.
    #[arg(long, env = "THAW_COORDINATOR", value_delimiter = ',', required = true)]
    coordinator: Vec<tonic::transport::Uri>,
    /// Unique name of this worker.
    #[arg(long, env = "THAW_WORKER_NAME")]
    name: String,
    /// Trainers this node can hold at once: one per device.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    slots: u32,
    /// Host name or address under which the trainers of other nodes reach this one's.
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// End when standard input ends: the process that started this one is gone.
    #[arg(long)]
    exit_with_stdin: bool,
    /// Log only what went wrong, unless THAW_LOG says otherwise.
    #[arg(long)]
    quiet: bool,
    #[command(flatten)]
    cache: CacheOptions,
    #[command(flatten)]
    device: DeviceOptions,
    #[command(flatten)]
    tls: TlsOptions,
    /// Passed on to the trainers; see `thaw-worker trainer --help`. For tests.
    #[arg(long, hide = true)]
    hold: Option<String>,
}

fn main() -> ExitCode {
    match Args::parse().role {
        Role::Trainer { host, hold, ring, cache, device } => {
            trainer::run(Node { host, cache: cache.folders(), device, ring }, hold)
        }
        Role::Agent(options) => match serve(options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("error: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn serve(options: AgentOptions) -> anyhow::Result<()> {
    let mut trainer_arguments = vec!["trainer".to_owned(), "--host".to_owned(), options.host.clone()];
    let cache = options.cache.folders();
    for (option, folder) in [("--prefix-cache-memory", &cache.memory), ("--prefix-cache-disk", &cache.disk)] {
        trainer_arguments.extend([option.to_owned(), folder.display().to_string()]);
    }
    // Now rather than when the first run starts.
    options.device.check(options.slots).context("cannot train on --device cuda")?;
    trainer_arguments.extend(options.device.arguments());
    if let Some(hold) = options.hold {
        trainer_arguments.extend(["--hold".to_owned(), hold]);
    }
    let config = agent::Config {
        coordinators: options.coordinator,
        tls: options.tls.load()?,
        name: options.name,
        slots: options.slots,
        host: options.host,
        trainer_program: own_program()?,
        trainer_arguments,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let _telemetry = thaw_runtime::telemetry::init(
            "thaw-worker",
            &thaw_runtime::telemetry::Options::from_env(if options.quiet { "warn" } else { "info" })?,
        )?;
        let shutdown = thaw_runtime::shutdown::signal()?;
        if options.exit_with_stdin {
            let ended = shutdown.clone();
            // Never joined: it sits in a read that ends with the parent, or with this process.
            std::thread::Builder::new().name("stdin".to_owned()).spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                ended.cancel();
            })?;
        }
        anyhow::Ok(agent::run(config, shutdown).await?)
    });
    runtime.shutdown_background();
    cache.clear_memory();
    outcome
}

fn own_program() -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe()?)
}
