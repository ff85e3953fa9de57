//! Questions and cleaning that need no open key.

use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::room::{file_system, room};
use crate::tier::{KeyFolder, LOCK_DEADLINE, OpenTier, Unused};
use crate::{Config, Error, Key, Tier, TierName};

/// Where so many bytes of a key would go, if they were put now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fit {
    /// Bytes that memory would take.
    pub memory: u64,
    /// Bytes that disk would take, other keys evicted where need be.
    pub disk: u64,
    /// Bytes that would be computed again each time.
    pub no: u64,
}

/// Which keys to clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// This one.
    Key(Key),
    /// All.
    Unused,
    /// All that were last opened or closed longer ago than this.
    UnusedFor(Duration),
}

/// What was cleared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cleared {
    /// Keys removed, counted in each tier.
    pub keys: u64,
    /// Bytes of their files.
    pub bytes: u64,
    /// Keys that were asked for and stay, for a process has them open.
    pub in_use: u64,
}

/// Removes keys that no process has open.
///
/// # Errors
/// When a tier's folder cannot be used, or its lock is not free within 5 s. What was removed before stays removed.
pub fn clear(config: &Config, which: Which) -> Result<Cleared, Error> {
    let now = SystemTime::now();
    let asked = |found: &KeyFolder| match which {
        Which::Key(key) => found.key == key,
        Which::Unused => true,
        Which::UnusedFor(age) => now.duration_since(found.last_use).is_ok_and(|unused| unused > age),
    };
    let mut cleared = Cleared::default();
    for (name, tier) in tiers(config) {
        let Some(tier) = OpenTier::existing(name, tier)? else { continue };
        let wrong = || Error::folder("clear", &tier.folder, &tier.folder);
        let locked = tier.lock(LOCK_DEADLINE)?;
        for found in locked.keys().map_err(wrong())?.into_iter().filter(asked) {
            if let Some(unused) = Unused::of(&found).map_err(wrong())? {
                locked.remove(&found, &unused).map_err(wrong())?;
                cleared.keys += 1;
                cleared.bytes += found.bytes;
            } else {
                cleared.in_use += 1;
            }
        }
    }
    Ok(cleared)
}

/// Where `bytes`, everything that `key` is to hold, would go. What the key holds already counts as room for it.
///
/// # Errors
/// When a tier's folder cannot be used, or its lock is not free within 5 s.
pub fn would_fit(config: &Config, key: &Key, bytes: u64) -> Result<Fit, Error> {
    let memory = Space::of(TierName::Memory, &config.memory, key)?;
    let disk = Space::of(TierName::Disk, &config.disk, key)?;
    let mut rest = bytes;
    let mut take = |room: u64| {
        let taken = rest.min(room);
        rest -= taken;
        taken
    };
    let mut fit = Fit { memory: take(memory.free), disk: take(disk.free), no: 0 };
    fit.disk += take(disk.evictable);
    fit.memory += take(memory.evictable);
    fit.no = rest;
    Ok(fit)
}

/// Bytes that all keys of a tier hold, for a budget that is a share of what is free: what the cache itself takes is not lost to it.
/// 0 where the folder is absent.
///
/// # Errors
/// When the folder cannot be used, or its lock is not free within 5 s.
pub fn held_bytes(name: TierName, folder: &Path) -> Result<u64, Error> {
    let tier = Tier { folder: folder.to_owned(), max_bytes: u64::MAX };
    let Some(tier) = OpenTier::existing(name, &tier)? else { return Ok(0) };
    let keys = tier.lock(LOCK_DEADLINE)?.keys().map_err(Error::folder("look at", folder, folder))?;
    Ok(keys.iter().map(|key| key.bytes).sum())
}

/// A tier's room for one key.
#[derive(Default)]
struct Space {
    /// Without eviction, what the key holds included.
    free: u64,
    /// More, if all unused keys went.
    evictable: u64,
}

impl Space {
    fn of(name: TierName, tier: &Tier, key: &Key) -> Result<Space, Error> {
        if tier.max_bytes == 0 {
            return Ok(Space::default());
        }
        let wrong = || Error::folder("look at", &tier.folder, &tier.folder);
        let Some(open) = OpenTier::existing(name, tier)? else {
            if name == TierName::Memory && !file_system(&tier.folder).map_err(wrong())?.in_memory {
                return Err(Error::NotMemory { folder: tier.folder.clone() });
            }
            return Ok(Space { free: tier.max_bytes.min(room(name, &tier.folder).map_err(wrong())?), evictable: 0 });
        };
        let locked = open.lock(LOCK_DEADLINE)?;
        let mut space = Space { free: locked.room().map_err(wrong())?, evictable: 0 };
        for found in locked.keys().map_err(wrong())? {
            if found.key == *key {
                space.free += found.bytes;
            } else if Unused::of(&found).map_err(wrong())?.is_some() {
                space.evictable += found.bytes;
            }
        }
        Ok(space)
    }
}

fn tiers(config: &Config) -> [(TierName, &Tier); 2] {
    [(TierName::Memory, &config.memory), (TierName::Disk, &config.disk)]
}
