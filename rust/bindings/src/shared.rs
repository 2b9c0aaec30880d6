//! Locks that a long call may hold, and how others wait for them.

use crate::door;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{RwLock, TryLockError, TryLockResult};
use std::time::{Duration, Instant};
use transformer_core::error::{Error, Result};
use transformer_core::threads;

/// How long a signal handler or a hook waits for what may belong to the very call that it is called from. Others have weights
/// for so long only to write them.
const PATIENCE: Duration = Duration::from_millis(200);

/// Takes a lock as soon as it is free. Called inside [`door::run`]: Ctrl-C ends the wait. A call from within another gives up soon:
/// that one may hold the lock, or something that the lock's owner waits for.
pub fn patiently<G>(what: &str, attempt: impl Fn() -> TryLockResult<G>) -> Result<G> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(guard) => return Ok(guard),
            // What is written under a lock is written by steps that are whole or not done.
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if door::is_nested() && start.elapsed() >= PATIENCE => {
                return Err(Error::Config(format!(
                    "{what}: in use, maybe by the call at work on it that this signal handler or hook was called from; set a flag \
                     there and act when that call has returned"
                )));
            }
            Err(TryLockError::WouldBlock) => {
                threads::parallel(1, |_| ())?; // asks whether to stop
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }
}

/// Weights: calls read them together, training writes them alone.
pub struct Shared<P> {
    weights: RwLock<P>,
    /// Those who wait to write: readers let them go first.
    writers: AtomicUsize,
}

impl<P> Shared<P> {
    pub fn new(weights: P) -> Self {
        Shared { weights: RwLock::new(weights), writers: AtomicUsize::new(0) }
    }

    /// Reads the weights, beside any number of others.
    pub fn read<R>(&self, work: impl FnOnce(&P) -> Result<R>) -> Result<R> {
        // From within another call nobody goes first: a writer may wait for that very call.
        let yields = !door::is_nested();
        let attempt = || match self.writers.load(Ordering::Relaxed) {
            1.. if yields => Err(TryLockError::WouldBlock),
            _ => self.weights.try_read(),
        };
        let weights = patiently("the weights", attempt)?;
        work(&weights)
    }

    /// Writes the weights, alone.
    pub fn write<R>(&self, work: impl FnOnce(&mut P) -> Result<R>) -> Result<R> {
        struct Waits<'a>(&'a AtomicUsize);
        impl Drop for Waits<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.writers.fetch_add(1, Ordering::Relaxed);
        let waits = Waits(&self.writers);
        let mut weights = patiently("the weights", || self.weights.try_write())?;
        drop(waits);
        work(&mut weights)
    }
}
