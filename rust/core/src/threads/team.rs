//! A caller and its workers: how a region of tasks starts, is shared out and ends.
//!
//! Each thread has a share of the tasks, neighbours in their order, and takes them one by one by counting its share down;
//! when it is empty, it takes from the others'. So the same thread mostly meets the same rows again in one region after the
//! other, out of its own caches: what another core wrote is read at three quarters of that speed, and at a third where the
//! two have no cache in common (Zen 5).
//!
//! The caller publishes a region by one store to `region`, after it has filled the shares, which bear the region's
//! number: a claim with an old number fails. The region ends when all its *tasks* are done, so a worker that is late,
//! asleep or gone delays nobody.

use crate::error::{Error, Result};
use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// One region: what to run, and the text of the first panic in it.
struct Job<'a> {
    /// Its number.
    region: u64,
    task: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    /// How many shares they are cut into.
    shares: usize,
    panic: OnceLock<String>,
}

impl Job<'_> {
    /// The number of the task that was claimed.
    fn index(&self, claim: Claim) -> usize {
        part(self.tasks, self.shares, claim.share).end - claim.left
    }
}

/// The tasks, `index` among them, that one of so many threads takes one after the other, if nobody helps it.
pub fn share_of(index: usize, tasks: usize, threads: usize) -> Range<usize> {
    let shares = threads.min(MAX_SHARES).min(tasks);
    // The last share that begins at `index` or before: start(i) ≤ index means i · tasks < (index + 1) · shares.
    let i = ((index as u64 + 1) * shares as u64).div_ceil(tasks as u64) - 1;
    part(tasks, shares, i as usize)
}

/// Part `i` of 0..`len` in so many parts, as even as can be. (`len` · `parts` fits into 64 bits.)
pub fn part(len: usize, parts: usize, i: usize) -> Range<usize> {
    let start = |i: usize| (i as u64 * len as u64 / parts as u64) as usize;
    start(i)..start(i + 1)
}

/// Its own pair of cache lines (the processor fetches them in pairs).
#[repr(align(128))]
struct Line<T>(T);

struct Published {
    /// The number of the present region, the first being 1; `CLOSED` at the end.
    region: AtomicU64,
    job: AtomicPtr<Job<'static>>,
}

pub(super) struct Team {
    published: Line<Published>,
    /// Each thread's share: the number of its region in the upper half, tasks left to claim in the lower.
    shares: Box<[Line<AtomicU64>]>,
    /// Tasks of this region that workers, not the caller, have finished.
    done: Line<AtomicUsize>,
    /// Turns of a waiting loop before it yields.
    spins: u32,
}

const CLOSED: u64 = u64::MAX;
/// No region has more tasks: a share counts them in 32 bits.
pub(super) const MAX_TASKS: usize = u32::MAX as usize;
/// More threads than this have shares in common.
const MAX_SHARES: usize = 64;

/// A task that nobody else will run.
#[derive(Clone, Copy)]
struct Claim {
    share: usize,
    /// How many were left in that share, this one included.
    left: usize,
}

/// Tasks claimed: those that ran, and those that were dropped after a panic or an interrupt.
type Claimed = usize;

fn left(share: u64) -> usize {
    share as u32 as usize
}

fn region(share: u64) -> u64 {
    share >> 32
}

impl Team {
    /// For so many threads. `crowded`: there are more than processors, so that spinning would only take time from who has work.
    pub(super) fn new(threads: usize, crowded: bool) -> Self {
        Team {
            published: Line(Published { region: AtomicU64::new(0), job: AtomicPtr::new(null_mut()) }),
            shares: (0..threads.min(MAX_SHARES)).map(|_| Line(AtomicU64::new(0))).collect(),
            done: Line(AtomicUsize::new(0)),
            spins: if crowded { 0 } else { 2000 },
        }
    }

    /// Runs one region on the calling thread, number 0, and whoever comes to help. Only the owner of the team may call it.
    /// `stop` is asked before each of the caller's tasks; after true the tasks not yet claimed are dropped.
    pub(super) fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync), stop: impl Fn() -> bool) -> Result<()> {
        debug_assert!(0 < tasks && tasks <= MAX_TASKS);
        let Published { region, job: published } = &self.published.0;
        let number = (region.load(Ordering::Relaxed) + 1) & u64::from(u32::MAX);
        let shares = self.shares.len().min(tasks);
        let job = Job { region: number, task, tasks, shares, panic: OnceLock::new() };
        self.done.0.store(0, Ordering::Relaxed);
        published.store((&raw const job).cast::<Job<'static>>().cast_mut(), Ordering::Relaxed);
        for (i, to) in self.shares[..shares].iter().enumerate() {
            to.0.store(number << 32 | part(tasks, shares, i).len() as u64, Ordering::Relaxed);
        }
        region.store(number, Ordering::Release);

        // From here to the end of `wait` nothing may unwind: workers use `job`.
        let mut claimed = 0;
        let mut stopped = false;
        while let Some(claim) = self.claim(number, 0) {
            claimed += 1;
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let stop = stop();
                if !stop {
                    task(job.index(claim));
                }
                stop
            }));
            claimed += match outcome {
                Ok(false) => 0,
                Ok(true) => {
                    stopped = true;
                    self.drop_rest(number)
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

    /// The life of thread `me` in a section: helps with one region after the other until the team is closed.
    pub(super) fn serve(&self, me: usize) {
        let Published { region, job } = &self.published.0;
        let mut number = 0;
        loop {
            self.wait(|| {
                let seen = region.load(Ordering::Acquire);
                std::mem::replace(&mut number, seen) != seen
            });
            if number == CLOSED {
                return;
            }
            // Of this region or, if we are late, of a later one; then no claim below succeeds.
            let job = job.load(Ordering::Relaxed);
            let mut claimed: Claimed = 0;
            while let Some(claim) = self.claim(number, me) {
                claimed += 1;
                // SAFETY: the claim succeeded, so the region was not over, and it will not be before `claimed` is
                // added to `done` below: `run` is still waiting, its `job` alive and `published.job` unchanged since
                // the store to `region` that was seen above.
                let job = unsafe { &*job };
                if let Err(payload) = catch_unwind(AssertUnwindSafe(|| (job.task)(job.index(claim)))) {
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
        self.published.0.region.store(CLOSED, Ordering::Release);
    }

    /// Takes a task of region `number`, of the share of thread `me` if there is one left; None when there is none at all.
    fn claim(&self, number: u64, me: usize) -> Option<Claim> {
        let open = |share| region(share) == number && left(share) > 0;
        let shares = self.shares.len();
        (me..me + shares).map(|i| i % shares).find_map(|i| {
            let taken = self.shares[i]
                .0
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, |share| open(share).then(|| share - 1));
            taken.ok().map(|share| Claim { share: i, left: left(share) })
        })
    }

    /// Claims all that is left of region `number`, to drop it. Only for who holds a task of that region.
    fn drop_rest(&self, number: u64) -> Claimed {
        let rest = |share: &Line<AtomicU64>| {
            let none = |share| (region(share) == number).then_some(number << 32);
            share.0.fetch_update(Ordering::Acquire, Ordering::Relaxed, none).map_or(0, left)
        };
        self.shares.iter().map(rest).sum()
    }

    fn report(&self, job: &Job, payload: Box<dyn Any + Send>) -> Claimed {
        let _ = job.panic.set(panic_text(payload)); // the first one is told
        self.drop_rest(job.region)
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
        let team = Team::new(2, false);
        team.run(2, &|_| (), || false).unwrap();
        let (ran, stale) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let late = |_| {
            ran.fetch_add(1, Ordering::Relaxed);
            if team.claim(1, 1).is_some() {
                stale.fetch_add(1, Ordering::Relaxed);
                team.done.0.fetch_add(1, Ordering::Release);
            }
        };
        team.run(4, &late, || false).unwrap();
        assert_eq!((ran.into_inner(), stale.into_inner()), (4, 0));
    }

    #[test]
    fn workers_who_never_come_delay_nobody() {
        let team = Team::new(MAX_SHARES, true);
        let ran = AtomicUsize::new(0);
        for tasks in 1..1000 {
            team.run(tasks, &|_| _ = ran.fetch_add(1, Ordering::Relaxed), || false).unwrap();
        }
        assert_eq!(ran.into_inner(), 999 * 1000 / 2);
    }

    #[test]
    fn a_panic_of_a_worker_drops_the_tasks_that_have_not_begun() {
        let (team, ran) = (Team::new(2, true), AtomicUsize::new(0));
        let task = |i| {
            ran.fetch_add(1, Ordering::Relaxed);
            assert!(i == 0, "task {i}");
            // The caller's: until the worker has dropped the others.
            while team.shares.iter().any(|share| left(share.0.load(Ordering::Relaxed)) > 0) {
                std::thread::yield_now();
            }
        };
        let result = std::thread::scope(|scope| {
            scope.spawn(|| team.serve(1));
            let result = team.run(100, &task, || false);
            team.close();
            result
        });
        assert_eq!(result, Err(Error::Internal("panic in a task: task 50".into())));
        assert_eq!(ran.into_inner(), 2);
    }

    #[test]
    fn after_a_panic_or_an_interrupt_of_the_caller_a_worker_finds_no_task() {
        for panics in [true, false] {
            let (team, ran) = (Team::new(3, false), AtomicUsize::new(0));
            // In the place of thread 2, which has begun one task and no more.
            let begin = || {
                assert!(team.claim(1, 2).is_some());
                team.done.0.fetch_add(1, Ordering::Release);
            };
            let task = |i| {
                ran.fetch_add(1, Ordering::Relaxed);
                begin();
                panic!("task {i}");
            };
            let stop = || {
                if !panics {
                    begin();
                }
                !panics
            };
            let error = if panics { Error::Internal("panic in a task: task 0".into()) } else { Error::Interrupted };
            assert_eq!(team.run(100, &task, stop), Err(error));
            assert_eq!(ran.into_inner(), panics as usize);
            assert!(team.claim(1, 2).is_none() && team.claim(1, 1).is_none());
        }
    }

    #[test]
    fn shares_are_all_the_tasks_in_their_order() {
        for (tasks, shares) in [(1, 1), (7, 2), (64, 64), (100, 7), (MAX_TASKS, MAX_SHARES)] {
            let parts: Vec<_> = (0..shares).map(|i| part(tasks, shares, i)).collect();
            assert!(parts[0].start == 0 && parts[shares - 1].end == tasks);
            assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert!(parts.iter().all(|part| part.len().abs_diff(tasks / shares) <= 1));
            let ends = |part: &Range<usize>| [part.start, part.end - 1];
            assert!(parts.iter().all(|part| ends(part).iter().all(|&i| share_of(i, tasks, shares) == *part)));
        }
    }

    #[test]
    fn a_thread_takes_its_own_share_first_and_then_the_others() {
        let team = Team::new(3, false);
        let order = std::sync::Mutex::new(Vec::new());
        let task = |i| order.lock().unwrap().push(i);
        // Nobody else comes: thread 0 has its own tasks, then those of 1 and 2.
        team.run(7, &task, || false).unwrap();
        assert_eq!(order.into_inner().unwrap(), [0, 1, 2, 3, 4, 5, 6]);
        let order = std::sync::Mutex::new(Vec::new());
        let task = |i| {
            order.lock().unwrap().push(i);
            if i == 0 {
                // In the place of thread 2, within the region.
                let number = team.published.0.region.load(Ordering::Relaxed);
                let job = Job { region: number, task: &|_| (), tasks: 7, shares: 3, panic: OnceLock::new() };
                let taken: Vec<_> =
                    std::iter::from_fn(|| team.claim(number, 2)).map(|claim| job.index(claim)).collect();
                assert_eq!(taken, [4, 5, 6, 1, 2, 3]);
                team.done.0.fetch_add(taken.len(), Ordering::Release);
            }
        };
        team.run(7, &task, || false).unwrap();
        assert_eq!(order.into_inner().unwrap(), [0]);
    }
}
