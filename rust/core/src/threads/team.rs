//! A caller and its workers: how a region of tasks starts, is shared out and ends.
//!
//! The caller publishes a region by one store to `cursor`, which holds the region's number and how many of its tasks
//! are still to be claimed. Everybody, the caller too, claims tasks by counting it down; a claim with an old number
//! fails. The region ends when all its *tasks* are done, so a worker that is late, asleep or gone delays nobody.

use crate::error::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// One region: what to run, and the text of the first panic in it.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    panic: OnceLock<String>,
}

/// Its own pair of cache lines (the processor fetches them in pairs).
#[repr(align(128))]
struct Line<T>(T);

struct Published {
    /// Region number in the upper half, tasks left to claim in the lower; `CLOSED` at the end.
    cursor: AtomicU64,
    job: AtomicPtr<Job<'static>>,
}

pub(super) struct Team {
    published: Line<Published>,
    /// Tasks of this region that workers, not the caller, have finished.
    done: Line<AtomicUsize>,
    /// Turns of a waiting loop before it yields.
    spins: u32,
}

/// No region has this many tasks.
const CLOSED: u64 = u64::MAX;
pub(super) const MAX_TASKS: usize = u32::MAX as usize - 1;

fn region(cursor: u64) -> u64 {
    cursor >> 32
}

fn left(cursor: u64) -> usize {
    cursor as u32 as usize
}

/// Tasks claimed: those that ran, and those that were dropped after a panic or an interrupt.
type Claimed = usize;

impl Team {
    /// `crowded`: there are more threads than processors, so that spinning would only take time from who has work.
    pub(super) fn new(crowded: bool) -> Self {
        Team {
            published: Line(Published { cursor: AtomicU64::new(0), job: AtomicPtr::new(null_mut()) }),
            done: Line(AtomicUsize::new(0)),
            spins: if crowded { 0 } else { 2000 },
        }
    }

    /// Runs one region on the calling thread and whoever comes to help. Only the owner of the team may call it.
    /// `stop` is asked before each of the caller's tasks; after true the tasks not yet claimed are dropped.
    pub(super) fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync), stop: impl Fn() -> bool) -> Result<()> {
        debug_assert!(0 < tasks && tasks <= MAX_TASKS);
        let Published { cursor, job: published } = &self.published.0;
        let job = Job { task, tasks, panic: OnceLock::new() };
        let number = (region(cursor.load(Ordering::Relaxed)) + 1) & u64::from(u32::MAX);
        self.done.0.store(0, Ordering::Relaxed);
        published.store((&raw const job).cast::<Job<'static>>().cast_mut(), Ordering::Relaxed);
        cursor.store(number << 32 | tasks as u64, Ordering::Release);

        // From here to the end of `wait` nothing may unwind: workers use `job`.
        let mut claimed = 0;
        let mut stopped = false;
        while let Some(left) = self.claim(number) {
            claimed += 1;
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let stop = stop();
                if !stop {
                    task(tasks - left);
                }
                stop
            }));
            claimed += match outcome {
                Ok(false) => 0,
                Ok(true) => {
                    stopped = true;
                    self.drop_rest()
                }
                Err(payload) => self.report(&job, payload),
            };
        }
        self.wait(|| self.done.0.load(Ordering::Acquire) + claimed == tasks);

        match job.panic.into_inner() {
            Some(text) => Err(Error::Internal(text)),
            None if stopped => Err(Error::Interrupted),
            None => Ok(()),
        }
    }

    /// A worker's life in a section: helps with one region after the other until the team is closed.
    pub(super) fn serve(&self) {
        let Published { cursor, job } = &self.published.0;
        loop {
            let mut seen = 0;
            self.wait(|| {
                seen = cursor.load(Ordering::Acquire);
                left(seen) > 0
            });
            if seen == CLOSED {
                return;
            }
            // Of this region or, if we are late, of a later one; then no claim below succeeds.
            let job = job.load(Ordering::Relaxed);
            let mut claimed: Claimed = 0;
            while let Some(left) = self.claim(region(seen)) {
                claimed += 1;
                // SAFETY: the claim succeeded, so the region was not over, and it will not be before `claimed` is
                // added to `done` below: `run` is still waiting, its `job` alive and `self.job` unchanged since the
                // store to `cursor` that was seen above.
                let job = unsafe { &*job };
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (job.task)(job.tasks - left))) {
                    claimed += self.report(job, payload);
                }
            }
            if claimed > 0 {
                self.done.0.fetch_add(claimed, Ordering::Release);
            }
        }
    }

    /// Sends the workers home. No region is open.
    pub(super) fn close(&self) {
        self.published.0.cursor.store(CLOSED, Ordering::Release);
    }

    /// Takes a task of region `number`: how many were left, itself included; None when there is none.
    fn claim(&self, number: u64) -> Option<usize> {
        let open = |cursor| region(cursor) == number && left(cursor) > 0;
        let cursor = &self.published.0.cursor;
        cursor
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |cursor| open(cursor).then(|| cursor - 1))
            .ok()
            .map(left)
    }

    /// Claims all that is left of the present region, to drop it. Only for who holds a task of that region.
    fn drop_rest(&self) -> Claimed {
        left(self.published.0.cursor.fetch_and(!u64::from(u32::MAX), Ordering::Acquire))
    }

    fn report(&self, job: &Job, payload: Box<dyn Any + Send>) -> Claimed {
        let _ = job.panic.set(panic_text(payload)); // the first one is told
        self.drop_rest()
    }

    fn wait(&self, mut ready: impl FnMut() -> bool) {
        let mut spins = 0;
        while !ready() {
            if spins < self.spins {
                spins += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

pub(super) fn panic_text(payload: Box<dyn Any + Send>) -> String {
    let text = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "of unknown type",
    };
    let text = format!("panic in a task: {text}");
    std::mem::forget(payload); // dropping a foreign payload could panic again
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_for_a_region_that_is_over_fails() {
        let team = Team::new(false);
        team.run(2, &|_| (), || false).unwrap();
        let (ran, stale) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let late = |_| {
            ran.fetch_add(1, Ordering::Relaxed);
            if team.claim(1).is_some() {
                stale.fetch_add(1, Ordering::Relaxed);
                team.done.0.fetch_add(1, Ordering::Release);
            }
        };
        team.run(4, &late, || false).unwrap();
        assert_eq!((ran.into_inner(), stale.into_inner()), (4, 0));
    }
}
