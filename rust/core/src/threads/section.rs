//! The two calls that everything runs through: `parallel` and `section`.

use super::environment::Environment;
use super::pool;
use super::team::{MAX_TASKS, Team, panic_text};
use crate::error::{Error, Result};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often the caller is asked whether to stop.
const POLL_EVERY: Duration = Duration::from_millis(50);

/// Where this thread is.
#[derive(Clone, Copy)]
enum Place {
    Outside,
    Section(*const Open<'static>),
    /// Inside a task, where everything runs inline.
    Task,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Outside) };
}

/// Sets the place of this thread for a while.
struct Visit(Place);

impl Visit {
    fn to(place: Place) -> Self {
        Visit(PLACE.replace(place))
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        PLACE.set(self.0);
    }
}

/// An open section, seen from the thread that opened it.
struct Open<'a> {
    /// None: one thread, or somebody else has the team.
    team: Option<&'a Team>,
    poll: Option<&'a dyn Fn() -> bool>,
    /// When it was asked last.
    asked: Cell<Instant>,
    /// Inside `uninterrupted`.
    deaf: Cell<bool>,
    interrupted: Cell<bool>,
    environment: Environment,
}

/// Runs `task(0..tasks)`, each index once, and returns when all are done. Neighbours mostly run on the same thread, and
/// the same part of the tasks on the same one in every region: number them along the rows. Serial and in order when
/// there is one task or one thread, inside another task, or when another thread has the team.
///
/// A task writes only what it owns; then no result depends on the number of threads. Tasks should last between a few
/// microseconds and 20 ms. A panic in a task is returned as [`Error::Internal`], tasks not yet begun are dropped.
/// [`Error::Interrupted`] comes from the `poll` of the open [`section`]. Without one, a section is opened for this call.
pub fn parallel(tasks: usize, task: impl Fn(usize) + Sync) -> Result<()> {
    match PLACE.get() {
        Place::Task => {
            (0..tasks).for_each(task);
            Ok(())
        }
        // SAFETY: `open` sets this place for as long as `Open` lives on its stack, and on its own thread only.
        Place::Section(open) => unsafe { &*open }.run(tasks, &task),
        Place::Outside => {
            let threads = if tasks > 1 { pool::try_num_threads()? } else { 1 };
            open(threads, None, || parallel(tasks, task))
        }
    }
}

/// Opens a hot section on this thread for the time of `body`: workers spin between regions instead of sleeping. One
/// per training step or decode call, and none while waiting for something else. Inside a section or a task, `body`
/// simply runs.
///
/// `poll` is asked on this thread, between its tasks, at most every 50 ms. After it said true, no further task begins
/// and this region, every later one and the section return [`Error::Interrupted`].
pub fn section<R>(poll: Option<&dyn Fn() -> bool>, body: impl FnOnce() -> Result<R>) -> Result<R> {
    match PLACE.get() {
        Place::Outside => open(pool::try_num_threads()?, poll, body),
        _ => body(),
    }
}

/// Runs `body` without asking the section's `poll`: for what must not be left half done, such as an optimiser's pass.
pub fn uninterrupted<R>(body: impl FnOnce() -> R) -> R {
    struct Restore<'a>(&'a Cell<bool>, bool);
    impl Drop for Restore<'_> {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let Place::Section(open) = PLACE.get() else { return body() };
    // SAFETY: as in `parallel`.
    let deaf = &unsafe { &*open }.deaf;
    let _restore = Restore(deaf, deaf.replace(true));
    body()
}

/// Sends the workers home when the section ends, also by a panic.
struct Closing(Arc<Team>);

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn open<R>(threads: usize, poll: Option<&dyn Fn() -> bool>, body: impl FnOnce() -> Result<R>) -> Result<R> {
    let borrowed = pool::borrow(threads - 1)?;
    let team = borrowed.as_ref().and_then(|pool| pool.as_ref()).map(|pool| {
        let team = Arc::new(Team::new(threads, threads > pool::available()));
        let theirs = Arc::clone(&team);
        // No scope around it: that would wait, at the end, for a worker that the system has not even run yet (0.4 µs
        // against 15–25 µs per section on a busy machine). A worker that comes too late finds its team closed.
        pool.spawn_broadcast(move |worker| {
            if worker.index() < threads - 1 {
                let _place = Visit::to(Place::Task);
                let _environment = Environment::enter();
                theirs.serve(worker.index() + 1);
            }
        });
        Closing(team)
    });
    let open = Open {
        team: team.as_ref().map(|team| &*team.0),
        poll,
        asked: Cell::new(Instant::now()),
        deaf: Cell::new(false),
        interrupted: Cell::new(false),
        environment: Environment::enter(),
    };
    let _place = Visit::to(Place::Section((&raw const open).cast()));
    let result = body()?;
    // `body` may have passed over the error of a region whose tasks did not all run.
    if open.interrupted.get() { Err(Error::Interrupted) } else { Ok(result) }
}

impl Open<'_> {
    fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        if self.interrupted.get() && !self.deaf.get() {
            return Err(Error::Interrupted);
        }
        let _place = Visit::to(Place::Task);
        match self.team {
            Some(team) if 1 < tasks && tasks <= MAX_TASKS => team.run(tasks, task, || self.stop()),
            _ => self.run_alone(tasks, task),
        }
    }

    fn run_alone(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> Result<()> {
        let run = || {
            for index in 0..tasks {
                if self.stop() {
                    return Err(Error::Interrupted);
                }
                task(index);
            }
            Ok(())
        };
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|payload| Err(Error::Internal(panic_text(payload))))
    }

    /// Asks whether to stop, if it is time to ask again.
    fn stop(&self) -> bool {
        let Some(poll) = self.poll else { return false };
        if self.deaf.get() || self.asked.get().elapsed() < POLL_EVERY {
            return false;
        }
        let stop = self.environment.outside(poll); // may run the caller's signal handlers
        self.asked.set(Instant::now());
        self.interrupted.set(stop);
        stop
    }
}
