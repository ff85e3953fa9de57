//! How fast records are put and read: `cargo run --release -p thaw-cache --example throughput [DISK_FOLDER]`.
//!
//! GB/s (10^9 bytes a second) of the process's CPU time on one thread, the best of several rounds, from the memory tier and from the disk
//! tier in the page cache: "put" into fresh files, "first" with the checksum, "again" without it, straight into a batch's buffer; "refresh" when nothing is new.

#![allow(clippy::print_stdout, reason = "a program of its own: its results are its output")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use thaw_cache::{Config, Key, Put, Store, Tensor, Tier, Which, clear};

const ROUNDS: usize = 5;
const TOTAL: usize = 192 << 20;
const BATCH: usize = 32;
const REFRESHES: u32 = 100;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let disk =
        std::env::args().nth(1).map_or_else(|| std::env::temp_dir().join("thaw-prefix-throughput"), PathBuf::from);
    let memory = Config::default_memory_folder().with_extension("throughput");
    println!("tier     record      put    first    again   GB/s   refresh µs");
    for record in [3 << 10, 100 << 10, 800 << 10] {
        for (name, max) in [("memory", [1 << 30, 0]), ("disk", [0, 1 << 30])] {
            let tier = |folder: &Path, max_bytes| Tier { folder: folder.to_owned(), max_bytes };
            let config = Config { memory: tier(&memory, max[0]), disk: tier(&disk, max[1]) };
            let mut best = [f64::NEG_INFINITY; 4];
            for _ in 0..ROUNDS {
                for (best, now) in best.iter_mut().zip(round(&config, record)?) {
                    *best = best.max(now);
                }
            }
            println!(
                "{name:6} {:4} KiB  {:7.2}  {:7.2}  {:7.2}          {:6.1}",
                record >> 10,
                best[0],
                best[1],
                best[2],
                -best[3]
            );
        }
    }
    for folder in [memory, disk] {
        std::fs::remove_dir_all(folder)?;
    }
    Ok(())
}

/// GB/s of put, of the first and of the second reading; microseconds of a refresh that finds nothing, negative so that more is better.
fn round(config: &Config, record: usize) -> Result<[f64; 4], Failure> {
    let key = Key::of(&[("throughput", &record.to_le_bytes())]);
    let count = (TOTAL / record) as u32;
    let bytes: Vec<u8> = (0..record).map(|i| (i * 7) as u8).collect();
    let tensors = [Tensor { dtype: 6, dims: vec![record as u32 / 4], bytes: record as u32 }];
    let store = Store::open(config, key, "put")?;
    let put = gigabytes_a_second(count, record, |sample| match store.put(sample, 0, &tensors, &[&bytes])? {
        Put::Stored(_) => Ok(()),
        other => Err(format!("not enough room: {other:?}").into()),
    })?;
    drop(store);

    let store = Store::open(config, key, "read")?;
    let mut batch = vec![1; BATCH * record];
    let mut read = |sample: u32| {
        let row = &mut batch[(sample as usize % BATCH) * record..][..record];
        let found = store.find(sample, 0).ok_or("a record is missing")?;
        if store.read(&found, &mut [row])? { Ok(()) } else { Err("a record is damaged".into()) }
    };
    let first = gigabytes_a_second(count, record, &mut read)?;
    let again = gigabytes_a_second(count, record, &mut read)?;
    let begun = cpu_time()?;
    (0..REFRESHES).try_for_each(|_| store.refresh())?;
    let refresh = (cpu_time()? - begun).as_secs_f64() * 1e6 / f64::from(REFRESHES);
    drop(store);
    clear(config, Which::Key(key))?;
    Ok([put, first, again, -refresh])
}

fn gigabytes_a_second(count: u32, record: usize, work: impl FnMut(u32) -> Result<(), Failure>) -> Result<f64, Failure> {
    let begun = cpu_time()?;
    (0..count).try_for_each(work)?;
    Ok(f64::from(count) * record as f64 / (cpu_time()? - begun).as_secs_f64() / 1e9)
}

/// Others' load on the machine does not count.
fn cpu_time() -> Result<Duration, Failure> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}
