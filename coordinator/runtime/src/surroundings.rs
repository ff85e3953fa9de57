//! Chance, the clocks and blocking work: what a process takes from the machine it runs on, and a simulation from its seed.
//!
//! Law: on a thread that a simulation has entered, equal seeds give equal answers, and no other thread is used.

use std::cell::RefCell;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::marker::PhantomData;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};
use tokio::task::JoinError;
use uuid::Uuid;

/// Before any reading of [`steady_clock`].
static BEGIN: LazyLock<Instant> = LazyLock::new(Instant::now);

thread_local! {
    static SIMULATED: RefCell<Option<Simulated>> = const { RefCell::new(None) };
}

struct Simulated {
    random: u64,
    wall: Box<dyn Fn() -> SystemTime>,
    steady: Box<dyn Fn() -> Duration>,
}

/// A thread that is simulated until this is dropped.
pub struct Entered {
    /// Stays on its thread.
    here: PhantomData<*const ()>,
}

impl fmt::Debug for Entered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entered")
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        SIMULATED.set(None);
    }
}

/// Simulates this thread: chance comes from `seed`, the clocks are `wall` and `steady`.
#[must_use]
pub fn simulate(
    seed: u64,
    wall: impl Fn() -> SystemTime + 'static,
    steady: impl Fn() -> Duration + 'static,
) -> Entered {
    SIMULATED.set(Some(Simulated { random: seed, wall: Box::new(wall), steady: Box::new(steady) }));
    Entered { here: PhantomData }
}

/// 64 random bits, which are no secret.
#[must_use]
pub fn random() -> u64 {
    let drawn = SIMULATED.with_borrow_mut(|simulated| simulated.as_mut().map(Simulated::draw));
    // The standard library keys every hasher from the operating system's randomness.
    drawn.unwrap_or_else(|| std::collections::hash_map::RandomState::new().build_hasher().finish())
}

/// A new identifier. Unpredictable, unless simulated.
#[must_use]
pub fn uuid() -> Uuid {
    let drawn = SIMULATED.with_borrow_mut(|simulated| simulated.as_mut().map(|it| (it.draw(), it.draw())));
    match drawn {
        Some((high, low)) => {
            uuid::Builder::from_random_bytes((u128::from(high) << 64 | u128::from(low)).to_be_bytes()).into_uuid()
        }
        None => Uuid::new_v4(),
    }
}

/// The wall clock, for people: anybody may set it.
#[must_use]
pub fn wall_clock() -> SystemTime {
    let simulated = SIMULATED.with_borrow(|simulated| simulated.as_ref().map(|it| (it.wall)()));
    simulated.unwrap_or_else(SystemTime::now)
}

/// Since an instant of this process; never set, so what waits are counted by.
#[must_use]
pub fn steady_clock() -> Duration {
    let simulated = SIMULATED.with_borrow(|simulated| simulated.as_ref().map(|it| (it.steady)()));
    simulated.unwrap_or_else(|| BEGIN.elapsed())
}

/// Does what may block for long on a thread made for that; in a simulation, at once.
///
/// # Errors
/// The work panicked, or the runtime ends.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if SIMULATED.with_borrow(Option::is_some) { Ok(work()) } else { tokio::task::spawn_blocking(work).await }
}

impl Simulated {
    /// SplitMix64.
    fn draw(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_give_equal_answers_and_the_thread_is_freed() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(7);
        let draw = |seed| {
            let _entered = simulate(seed, move || at, || Duration::from_secs(3));
            assert_eq!((wall_clock(), steady_clock()), (at, Duration::from_secs(3)));
            (uuid(), random())
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_ne!(uuid(), draw(1).0);
        assert!(wall_clock() > at);
        let before = steady_clock();
        assert!(steady_clock() >= before);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn simulated_work_stays_on_its_thread() {
        let here = std::thread::current().id();
        assert_ne!(blocking(|| std::thread::current().id()).await.unwrap(), here);
        let _entered = simulate(1, || SystemTime::UNIX_EPOCH, || Duration::ZERO);
        assert_eq!(blocking(|| std::thread::current().id()).await.unwrap(), here);
    }
}
