//! Locks that a long call may hold, and how others wait for them.

use crate::door;
use std::ops::{Deref, DerefMut};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, RwLock, TryLockError, TryLockResult};
use std::time::{Duration, Instant};
use transformer_core::error::{Error, Result};
use transformer_core::threads;

/// How long a signal handler or a hook waits for what may belong to the very call that it is called from. Others have weights
/// for so long only to write them.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long a lock is waited for that nobody in this process has: longer than anybody takes from the lock to `Present` and back.
const GHOST: Duration = Duration::from_secs(1);

/// How many threads of this process are in a place. Those of the process that this one was forked from are not here any more.
#[derive(Default)]
struct Present(AtomicU64);

impl Present {
    /// The process in the upper half, the number in the lower.
    fn change(&self, by: i64) {
        let here = u64::from(process::id()) << 32;
        let change =
            |all: u64| Some((if all >> 32 == here >> 32 { all } else { here }).saturating_add_signed(by).max(here));
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }

    fn enter(&self) -> Stay<'_> {
        self.change(1);
        Stay(self)
    }

    fn any(&self) -> bool {
        let all = self.0.load(Ordering::Relaxed);
        all as u32 > 0 && all >> 32 == u64::from(process::id())
    }
}

/// One of those who are present.
struct Stay<'a>(&'a Present);

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        self.0.change(-1);
    }
}

/// Takes a lock as soon as it is free. Called inside [`door::run`]: Ctrl-C ends the wait. A call from within another gives up soon:
/// that one may hold the lock, or something that the lock's owner waits for. So does who waits for a thread that was lost in a fork.
fn patiently<G>(what: &str, holders: &Present, attempt: impl Fn() -> TryLockResult<G>) -> Result<G> {
    let start = Instant::now();
    let mut seen = start; // a holder
    loop {
        match attempt() {
            Ok(guard) => return Ok(guard),
            // What is written under a lock is written by steps that are whole or not done.
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
        if door::is_nested() && start.elapsed() >= PATIENCE {
            return Err(Error::Config(format!(
                "{what}: in use, maybe by the call at work on it that this signal handler or hook was called from; set a flag \
                 there and act when that call has returned"
            )));
        }
        if holders.any() {
            seen = Instant::now();
        } else if seen.elapsed() >= GHOST {
            return Err(Error::Config(format!(
                "{what}: in use by a thread of the process that this one was forked from, which is not here; fork while nobody \
                 trains, or start processes by `spawn` and load the model there"
            )));
        }
        threads::parallel(1, |_| ())?; // asks whether to stop
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// What one call at a time has.
pub struct Turns<T> {
    mutex: Mutex<T>,
    holders: Present,
}

impl<T> Turns<T> {
    pub fn new(of: T) -> Self {
        Turns { mutex: Mutex::new(of), holders: Present::default() }
    }

    /// Waits for its turn, by `patiently`.
    pub fn take(&self, what: &str) -> Result<Turn<'_, T>> {
        let guard = patiently(what, &self.holders, || self.mutex.try_lock())?;
        Ok(Turn { guard, _stay: self.holders.enter() })
    }
}

/// A call's turn.
pub struct Turn<'a, T> {
    guard: MutexGuard<'a, T>,
    _stay: Stay<'a>,
}

impl<T> Deref for Turn<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for Turn<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// Weights: calls read them together, training writes them alone.
pub struct Shared<P> {
    weights: RwLock<P>,
    holders: Present,
    /// Those who wait to write: readers let them go first.
    writers: Present,
}

impl<P> Shared<P> {
    pub fn new(weights: P) -> Self {
        Shared { weights: RwLock::new(weights), holders: Present::default(), writers: Present::default() }
    }

    /// Reads the weights, beside any number of others.
    pub fn read<R>(&self, work: impl FnOnce(&P) -> Result<R>) -> Result<R> {
        // From within another call nobody goes first: a writer may wait for that very call.
        let yields = !door::is_nested();
        let attempt = || match self.writers.any() {
            true if yields => Err(TryLockError::WouldBlock),
            _ => self.weights.try_read(),
        };
        let weights = patiently("the weights", &self.holders, attempt)?;
        let _stay = self.holders.enter();
        work(&weights)
    }

    /// Writes the weights, alone.
    pub fn write<R>(&self, work: impl FnOnce(&mut P) -> Result<R>) -> Result<R> {
        let waits = self.writers.enter();
        let mut weights = patiently("the weights", &self.holders, || self.weights.try_write())?;
        drop(waits);
        let _stay = self.holders.enter();
        work(&mut weights)
    }
}
