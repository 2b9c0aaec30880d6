//! Locks that are never waited for without end.

use std::sync::{TryLockError, TryLockResult};
use std::time::{Duration, Instant};

/// How long a lock is tried that is held for nanoseconds.
const PATIENCE: Duration = Duration::from_millis(1);

/// Takes a lock that everybody holds for a moment only. `None` where it stays taken: a process that forks while another of its
/// threads has the lock has a child in which nobody gives it back.
pub fn briefly<G>(attempt: impl Fn() -> TryLockResult<G>) -> Option<G> {
    let mut start = None;
    loop {
        match attempt() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if start.get_or_insert_with(Instant::now).elapsed() < PATIENCE => {
                std::thread::yield_now();
            }
            Err(TryLockError::WouldBlock) => return None,
        }
    }
}
