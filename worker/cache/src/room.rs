//! How many bytes a tier may still take without anybody else on the node going short.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::TierName;

const GIB: u64 = 1 << 30;

/// A file system's kind and room, in bytes.
pub(crate) struct FileSystem {
    pub(crate) in_memory: bool,
    total: u64,
    free: u64,
}

/// The file system that `folder` is on, or would be made on.
pub(crate) fn file_system(folder: &Path) -> io::Result<FileSystem> {
    let existing = folder.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stat = statfs(existing)?;
    let block = u64::try_from(stat.block_size()).unwrap_or(0);
    Ok(FileSystem {
        in_memory: stat.filesystem_type() == TMPFS_MAGIC,
        total: stat.blocks().saturating_mul(block),
        free: stat.blocks_available().saturating_mul(block),
    })
}

/// Bytes that a tier in `folder` may take now, its own budget aside: what is free, less a margin for everybody else.
/// Memory is bounded by the machine's and the control group's too: tmpfs promises more than there is.
pub(crate) fn room(tier: TierName, folder: &Path) -> io::Result<u64> {
    let disk = file_system(folder)?;
    match tier {
        TierName::Disk => Ok(disk.free.saturating_sub((disk.total / 20).min(8 * GIB))),
        TierName::Memory => {
            let own = less_margin(disk.free, disk.total);
            Ok(own.min(memory_room().unwrap_or(u64::MAX)))
        }
    }
}

/// Bytes of memory that this process may still take, with a margin left for everybody else: the least of the machine's and the control
/// group's. `None` where neither says.
#[must_use]
pub fn memory_room() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| machine_room(&text));
    let group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_room(&text));
    machine.into_iter().chain(group).min()
}

fn less_margin(free: u64, total: u64) -> u64 {
    free.saturating_sub((total / 10).min(4 * GIB))
}

fn machine_room(meminfo: &str) -> Option<u64> {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    };
    Some(less_margin(kib("MemAvailable:")? << 10, kib("MemTotal:")? << 10))
}

/// The least room of this process's control group (version 2) and those above it; `None` where none has a limit.
fn group_room(groups: &str) -> Option<u64> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = PathBuf::from("/sys/fs/cgroup");
    root.join(path).ancestors().take_while(|group| group.starts_with(&root)).filter_map(one_group_room).min()
}

fn one_group_room(group: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let limit = read("memory.max")?.trim().parse::<u64>().ok()?;
    let used = read("memory.current")?.trim().parse::<u64>().ok()?;
    let given_back = read("memory.stat")
        .and_then(|stat| stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.parse::<u64>().ok()))
        .unwrap_or(0);
    Some(less_margin(limit.saturating_sub(used.saturating_sub(given_back)), limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_keeps_a_margin() {
        let text = "MemTotal:       1048576 kB\nMemFree:        1 kB\nMemAvailable:    524288 kB\n";
        assert_eq!(machine_room(text), Some((512 << 20) - (1 << 30) / 10));
        assert_eq!(machine_room("MemTotal: 1 kB\n"), None);
        assert_eq!(less_margin(5, 100), 0);
        assert_eq!(less_margin(100 * GIB, 200 * GIB), 96 * GIB);
    }

    #[test]
    fn a_folder_to_be_made_is_judged_by_its_parent() {
        let parent = tempfile::tempdir().unwrap();
        let there = file_system(parent.path()).unwrap();
        let not_yet = file_system(&parent.path().join("a/b")).unwrap();
        assert_eq!((there.in_memory, there.total), (not_yet.in_memory, not_yet.total));
        assert!(room(TierName::Disk, parent.path()).unwrap() <= there.free);
    }
}
