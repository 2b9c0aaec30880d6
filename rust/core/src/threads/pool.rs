//! How many threads, and who owns them: one rayon pool per process, made at the first use, replaced when it is too
//! small or the number changes.

use crate::error::{Error, Result};
use crate::{bail, ensure};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::Cell;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

/// More threads than this are refused as a mistake.
pub const MAX_THREADS: usize = 1024;

/// The number of threads of the process; 0 while nobody asked. An atomic and no `OnceLock`: a process may fork at any
/// moment, and a lock held then stays locked in the child.
static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// The number for this thread's sections alone; 0: the process's.
    static LOCAL: Cell<usize> = const { Cell::new(0) };
}

/// Sets the number of threads of the process, 0 for all. Sections that are open keep theirs.
pub fn set_num_threads(n: usize) -> Result<()> {
    ensure!(n <= MAX_THREADS, Config, "set_num_threads: argument `n`: expected at most {MAX_THREADS}, got {n}");
    let n = if n == 0 { available() } else { n };
    COUNT.store(n, Ordering::Relaxed);
    // Sleeping threads are not kept; if a section is open, the next one finds the pool too small or large enough.
    if let Some(mut pool) = try_lock(&process().pool)
        && pool.as_ref().is_some_and(|pool| pool.current_num_threads() != n - 1)
    {
        *pool = None;
    }
    Ok(())
}

/// The number of threads that this thread's next section uses: the local limit, else what `set_num_threads` set, else
/// `TRANSFORMER_RS_NUM_THREADS`, else `OMP_NUM_THREADS`, else what the machine makes available to this process. Where
/// [`try_num_threads`] is an error, no section opens.
pub fn num_threads() -> usize {
    try_num_threads().unwrap_or_else(|_| available())
}

/// Runs `body` with another number of threads for the sections that this thread opens, 0 for all; also above the process's.
pub fn with_local_limit<R>(n: usize, body: impl FnOnce() -> R) -> R {
    struct Restore(usize);
    impl Drop for Restore {
        fn drop(&mut self) {
            LOCAL.set(self.0);
        }
    }
    let _restore = Restore(LOCAL.replace(if n == 0 { available() } else { n.min(MAX_THREADS) }));
    body()
}

/// [`num_threads`], with an error for an environment variable of ours that makes no sense.
pub fn try_num_threads() -> Result<usize> {
    match (LOCAL.get(), COUNT.load(Ordering::Relaxed)) {
        (0, 0) => {
            let variable = |name| std::env::var_os(name).map(|text| text.to_string_lossy().into_owned());
            let n = from_environment(variable("TRANSFORMER_RS_NUM_THREADS"), variable("OMP_NUM_THREADS"))?;
            // Whoever set a number meanwhile wins.
            Ok(COUNT.compare_exchange(0, n, Ordering::Relaxed, Ordering::Relaxed).map_or_else(|set| set, |_| n))
        }
        (0, n) | (n, _) => Ok(n),
    }
}

pub(super) fn from_environment(ours: Option<String>, omp: Option<String>) -> Result<usize> {
    if let Some(text) = ours.filter(|text| !text.trim().is_empty()) {
        return match text.trim().parse() {
            Ok(0) => Ok(available()),
            Ok(n) if n <= MAX_THREADS => Ok(n),
            _ => {
                bail!(
                    Config,
                    "TRANSFORMER_RS_NUM_THREADS: expected a number from 0 (all) to {MAX_THREADS}, got {text:?}; \
                     correct or unset it, or call set_num_threads"
                )
            }
        };
    }
    // OpenMP's own format is a list, one number per level of nesting.
    let omp = omp.and_then(|text| text.split(',').next()?.trim().parse().ok());
    Ok(omp.filter(|n| (1..=MAX_THREADS).contains(n)).unwrap_or_else(available))
}

/// What affinity and container quota leave to this process. Asked once: the answer is read from files.
pub(super) fn available() -> usize {
    static AVAILABLE: AtomicUsize = AtomicUsize::new(0);
    match AVAILABLE.load(Ordering::Relaxed) {
        0 => {
            let n = std::thread::available_parallelism().map_or(1, |n| n.get()).min(MAX_THREADS);
            AVAILABLE.store(n, Ordering::Relaxed);
            n
        }
        n => n,
    }
}

struct Process {
    id: u32,
    pool: Mutex<Option<ThreadPool>>,
}

/// The pool's place in this process. A forked child has its parent's memory but not its threads: it leaves the
/// parent's place as it is, locked or not, and makes its own.
fn process() -> &'static Process {
    static CURRENT: AtomicPtr<Process> = AtomicPtr::new(std::ptr::null_mut());
    let id = std::process::id();
    let current = CURRENT.load(Ordering::Acquire);
    // SAFETY: what is stored in CURRENT is null or was leaked below, so it lives as long as the process.
    if let Some(process) = unsafe { current.as_ref() }
        && process.id == id
    {
        return process;
    }
    let fresh = Box::into_raw(Box::new(Process { id, pool: Mutex::new(None) }));
    let winner = match CURRENT.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => fresh,
        Err(other) => other, // another thread of this process was faster; `fresh` stays as a few lost bytes
    };
    // SAFETY: as above; never null here.
    unsafe { &*winner }
}

/// The pool, for whoever holds this.
pub(super) type Borrowed = MutexGuard<'static, Option<ThreadPool>>;

/// Borrows at least `workers` threads, or returns None at once when somebody else has them.
pub(super) fn borrow(workers: usize) -> Result<Option<Borrowed>> {
    if workers == 0 {
        return Ok(None);
    }
    let Some(mut pool) = try_lock(&process().pool) else { return Ok(None) };
    if pool.as_ref().is_none_or(|pool| pool.current_num_threads() < workers) {
        let builder =
            ThreadPoolBuilder::new().num_threads(workers).thread_name(|i| format!("transformer_rs-{}", i + 1));
        *pool = Some(builder.build().map_err(|error| {
            Error::Config(format!(
                "threads: could not start {workers} threads: {error}; ask for fewer with set_num_threads"
            ))
        })?);
    }
    Ok(Some(pool))
}

/// Never waits. A panic while the lock was held came out of a section's body and says nothing about the pool.
fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match mutex.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}
