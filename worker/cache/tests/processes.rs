//! Several processes at one key, killed and not. A process here is this test's program once more, told what to do by its environment.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and its process speaks by lines")]

mod common;

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Folders, MIB, bytes_in, config, has, key, put};
use thaw_cache::{Config, Put, Store};

const TASK: &str = "THAW_CACHE_TEST_TASK";
const DEADLINE: Duration = Duration::from_secs(60);

/// Not a test: what a writer process does. It puts its samples and says of each what became of it, once that is so.
#[test]
#[ignore = "started by the other tests"]
fn writer_process() {
    let Ok(task) = std::env::var(TASK) else { return };
    let words: Vec<&str> = task.split(' ').collect();
    let [memory, memory_bytes, disk, disk_bytes, name, writer, from, to, step, bytes] = words[..] else {
        panic!("{task}")
    };
    let number = |text: &str| text.parse::<u64>().unwrap();
    let config = config(memory.as_ref(), number(memory_bytes), disk.as_ref(), number(disk_bytes));
    let store = Store::open(&config, key(name), writer).unwrap();
    let mut out = std::io::stdout().lock();
    for sample in (number(from)..number(to)).step_by(number(step) as usize) {
        let sample = sample as u32;
        let word = match put(&store, sample, 0, length(sample, number(bytes) as usize)) {
            Put::Stored(_) | Put::Present => "put",
            Put::Full => "full",
        };
        // A long line: the pipe holds few, so whoever listens sets the pace.
        writeln!(out, "\n{word} {sample}\n{:.>400}", "").unwrap();
        out.flush().unwrap();
        if sample.is_multiple_of(16) {
            store.refresh().unwrap();
        }
    }
    writeln!(out, "\ndone 0").unwrap();
}

/// Samples differ in length.
fn length(sample: u32, bytes: usize) -> usize {
    bytes / 2 + (sample as usize * 97) % bytes
}

struct Writer {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    fn start(config: &Config, name: &str, writer: &str, samples: [u64; 3], bytes: u64) -> Writer {
        let [from, to, step] = samples;
        let (memory, disk) = (&config.memory, &config.disk);
        let (m, d) = (memory.folder.display(), disk.folder.display());
        let task =
            format!("{m} {} {d} {} {name} {writer} {from} {to} {step} {bytes}", memory.max_bytes, disk.max_bytes);
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer_process", "--ignored", "--nocapture"])
            .env(TASK, task)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Writer { process, lines }
    }

    /// The next thing it says: a word and a sample.
    fn next(&mut self) -> Option<(String, u32)> {
        self.lines.by_ref().map_while(Result::ok).find_map(|line| {
            let (word, sample) = line.split_once(' ')?;
            if !["put", "full", "done"].contains(&word) {
                return None;
            }
            Some((word.to_owned(), sample.parse().ok()?))
        })
    }

    /// Kills it as it is, and everything that it had said before.
    fn kill(mut self) -> Vec<(String, u32)> {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        std::iter::from_fn(|| self.next()).collect()
    }
}

/// A small generator, so that a failing round can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn a_writer_killed_anywhere_loses_nothing_that_it_had_put() {
    let folders = Folders::new();
    let config = folders.config(MIB, 3 * MIB);
    let mut random = Random(20_260_217);
    let mut evictions = 0;
    for round in 0..40 {
        // Three keys take turns, so that each one's writer has to evict the others'.
        let name = ["a", "b", "c"][round % 3];
        let before: BTreeSet<u32> = {
            let store = Store::open(&config, key(name), "before").unwrap();
            (0..2000).filter(|sample| has(&store, *sample, 0)).collect()
        };
        let mut writer = Writer::start(&config, name, &format!("life{round}"), [0, 2000, 1], 8000);
        let heard = random.below(400);
        let mut said: Vec<(String, u32)> = (0..heard).map_while(|_| writer.next()).collect();
        for _ in 0..random.below(200_000) {
            std::hint::spin_loop();
        }
        said.extend(writer.kill());
        assert!(
            bytes_in(folders.memory.path()) <= MIB && bytes_in(folders.disk.path()) <= 3 * MIB,
            "CACHE-3, round {round}"
        );

        let store = Store::open(&config, key(name), "after").unwrap();
        for sample in said.iter().filter(|(word, _)| word == "put").map(|(_, sample)| sample).chain(&before) {
            assert!(has(&store, *sample, 0), "CACHE-2, round {round}: sample {sample} was put and is gone");
        }
        // At most the one that it was putting is there beside those, and damage is nowhere.
        let told: BTreeSet<u32> = said.iter().map(|(_, sample)| *sample).collect();
        let untold = (0..2000)
            .filter(|sample| store.contains(*sample, 0) && !told.contains(sample) && !before.contains(sample))
            .count();
        assert!(untold <= 1, "round {round}: {untold} records that nobody told of");
        assert_eq!(store.stats().damaged, 0, "round {round}");
        evictions +=
            usize::from(["a", "b", "c"].iter().any(|name| !folders.disk.path().join(key(name).to_string()).exists()));
    }
    assert!(evictions > 0, "no round had to evict");
}

#[test]
fn a_dead_writers_reserve_is_taken_back() {
    let folders = Folders::new();
    let config = folders.config(64 * MIB, 0);
    let mut writer = Writer::start(&config, "a", "w", [0, 100_000, 1], 1000);
    for _ in 0..10 {
        writer.next().unwrap();
    }
    writer.kill();
    let reserved = bytes_in(folders.memory.path());
    let store = Store::open(&config, key("a"), "x").unwrap();
    let stats = store.stats();
    let held = bytes_in(folders.memory.path());
    assert!(held < reserved, "CACHE-3: {held} of {reserved} bytes stay");
    // Payloads start at multiples of 64, and an entry is shorter than 128.
    assert!(held <= stats.memory.bytes + stats.memory.entries * (64 + 128));
    assert!(stats.memory.entries >= 10 && (0..10).all(|sample| has(&store, sample, 0)));
}

#[test]
fn two_write_while_a_third_reads() {
    let folders = Folders::new();
    let config = folders.config(4 * MIB, 64 * MIB);
    let store = Store::open(&config, key("a"), "reader").unwrap();
    let mut writers = [0, 1].map(|first| Writer::start(&config, "a", &format!("w{first}"), [first, 1000, 2], 10_000));
    let (deadline, mut missing) = (Instant::now() + DEADLINE, (0..1000).collect::<BTreeSet<u32>>());
    let mut put = 0;
    while !missing.is_empty() {
        assert!(Instant::now() < deadline, "{} records were never seen", missing.len());
        for writer in &mut writers {
            put += (0..10).map_while(|_| writer.next()).filter(|(word, _)| word == "put").count();
        }
        store.refresh().unwrap();
        missing.retain(|sample| !has(&store, *sample, 0));
    }
    for writer in &mut writers {
        put += std::iter::from_fn(|| writer.next()).filter(|(word, _)| word == "put").count();
        assert!(writer.process.wait().unwrap().success());
    }
    assert_eq!(put, 1000);
    let stats = store.stats();
    assert_eq!((stats.memory.entries + stats.disk.entries, stats.damaged), (1000, 0));
    assert!(stats.memory.entries > 0 && stats.disk.entries > 0);
}

#[test]
fn all_together_never_exceed_a_budget() {
    let folders = Folders::new();
    let config = folders.config(2 * MIB, 3 * MIB);
    // Two writers of one key and one of another, each with more than all that there is.
    let starts = [("a", 0, 2), ("a", 1, 2), ("b", 0, 1)];
    let mut writers = starts
        .map(|(name, from, step)| Writer::start(&config, name, &format!("w{from}{step}"), [from, 1500, step], 10_000));
    let (mut full, mut speaking) = (false, 3);
    while speaking > 0 {
        for writer in &mut writers {
            for _ in 0..20 {
                match writer.next() {
                    Some((word, _)) if word == "done" => speaking -= 1,
                    Some((word, _)) => full |= word == "full",
                    None => break,
                }
            }
        }
        let (memory, disk) = (bytes_in(folders.memory.path()), bytes_in(folders.disk.path()));
        assert!(memory <= 2 * MIB && disk <= 3 * MIB, "CACHE-3: {memory} bytes in memory, {disk} on disk");
    }
    assert!(full, "there was room for everything");
    for writer in &mut writers {
        assert!(writer.process.wait().unwrap().success());
    }
    for name in ["a", "b"] {
        let store = Store::open(&config, key(name), "after").unwrap();
        let kept =
            (0..1500).filter(|sample| store.contains(*sample, 0)).filter(|sample| has(&store, *sample, 0)).count();
        assert_eq!(
            (kept as u64, store.stats().damaged),
            (store.stats().memory.entries + store.stats().disk.entries, 0)
        );
    }
}
