//! Where the time goes: `TRANSFORMER_RS_PROFILE=1`, or [`start`] and [`stop`] around a piece of work.
//!
//! An operation holds a [`Span`] while it works: `let _timed = profile::forward("linear", [d, o], || Work::product::<T>(..));`.
//! Off, that is one relaxed load and a branch. On, the span's time, less the time of the spans inside it, is added to the
//! row of its name, pass and sizes; so the rows add up to the time of the outermost spans. Only the thread that calls the
//! operation holds spans: the time of a region on many threads is its wall time.

pub mod peak;
mod report;
mod work;

pub use peak::Peak;
pub use report::table;
pub use work::Work;

use crate::bail;
use crate::error::Result;
use crate::threads::briefly;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

/// The variable that turns the profile on for a whole process.
pub const VARIABLE: &str = "TRANSFORMER_RS_PROFILE";

/// How many want spans to be timed; [`UNREAD`] until the environment was asked.
static USERS: AtomicU32 = AtomicU32::new(UNREAD);
const UNREAD: u32 = u32::MAX;

static ROWS: Mutex<BTreeMap<Key, Sums>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// What this thread's innermost span is called, and how long the spans inside it took so far.
    static INNERMOST: Cell<(Name, Duration)> = const { Cell::new((Name { op: "", part: "", pass: Pass::Other }, Duration::ZERO)) };
}

/// Which way an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// From inputs to the output.
    Forward,
    /// From the gradient of the output to those of the inputs.
    Backward,
    /// Neither: an update, a search.
    Other,
}

impl Pass {
    /// Its name in tables; empty for [`Pass::Other`].
    pub fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
            Pass::Other => "",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    op: &'static str,
    part: &'static str,
    pass: Pass,
}

type Key = (Name, [usize; 2]);

#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    calls: u64,
    time: Duration,
    work: Work,
}

/// All calls of an operation, in one direction, with the same sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The operation, by the name it has in errors.
    pub op: &'static str,
    /// The part of it, or empty: the rest, or all where it has no parts.
    pub part: &'static str,
    /// Which way it ran.
    pub pass: Pass,
    /// What does not depend on the batch: inputs and outputs of a product, heads and their width, ...; 0 is no size.
    pub sizes: [usize; 2],
    /// How often.
    pub calls: u64,
    /// Wall time in seconds, without that of other rows.
    pub seconds: f64,
    /// What was done in all calls together.
    pub work: Work,
}

/// Whether spans are timed now.
#[inline]
pub fn is_on() -> bool {
    match USERS.load(Ordering::Relaxed) {
        0 => false,
        UNREAD => read_environment(),
        _ => true,
    }
}

#[cold]
fn read_environment() -> bool {
    // What cannot be read counts as unset; the door says so by `check`.
    let wanted = matches!(check(), Ok(true));
    let _ = USERS.compare_exchange(UNREAD, u32::from(wanted), Ordering::Relaxed, Ordering::Relaxed);
    USERS.load(Ordering::Relaxed) > 0
}

/// What [`VARIABLE`] says; an error where it is neither `1` nor `0`, empty or unset.
pub fn check() -> Result<bool> {
    static WANTED: OnceLock<Result<bool>> = OnceLock::new();
    let read = || parse(std::env::var_os(VARIABLE).map(|text| text.to_string_lossy().into_owned()).as_deref());
    WANTED.get_or_init(read).clone()
}

fn parse(text: Option<&str>) -> Result<bool> {
    match text {
        None | Some("" | "0") => Ok(false),
        Some("1") => Ok(true),
        Some(text) => bail!(Config, "{VARIABLE}: expected 1 (on) or 0 (off), got `{text}`; correct or unset it"),
    }
}

/// Times spans from here on, until as many calls of [`stop`]. What was measured before stays: see [`rows`].
pub fn start() {
    is_on(); // the environment counts as one that never stops
    USERS.fetch_add(1, Ordering::Relaxed);
}

/// Ends one [`start`].
pub fn stop() {
    let _ = USERS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |users| match users {
        0 | UNREAD => None,
        users => Some(users - 1),
    });
}

/// All that was measured in this process so far, sorted by name.
pub fn rows() -> Vec<Row> {
    let row = |(&(Name { op, part, pass }, sizes), sums): (&Key, &Sums)| {
        let Sums { calls, time, work } = *sums;
        Row { op, part, pass, sizes, calls, seconds: time.as_secs_f64(), work }
    };
    briefly(|| ROWS.try_lock()).map_or_else(Vec::new, |rows| rows.iter().map(row).collect())
}

/// What was added to the rows of `before` since then.
pub fn since(before: &[Row]) -> Vec<Row> {
    let mut rows = rows();
    for row in &mut rows {
        let same = |old: &&Row| (old.op, old.part, old.pass, old.sizes) == (row.op, row.part, row.pass, row.sizes);
        if let Some(old) = before.iter().find(same) {
            row.calls -= old.calls;
            row.seconds -= old.seconds;
            row.work -= old.work;
        }
    }
    rows.retain(|row| row.calls > 0);
    rows
}

/// Times the forward pass of an operation while it is held. `sizes` do not depend on the batch.
#[inline]
#[must_use = "it ends when it is dropped"]
pub fn forward(op: &'static str, sizes: [usize; 2], work: impl FnOnce() -> Work) -> Span {
    Span(is_on().then(|| Running::begin(Name { op, part: "", pass: Pass::Forward }, sizes, work())))
}

/// The same for the backward pass.
#[inline]
#[must_use = "it ends when it is dropped"]
pub fn backward(op: &'static str, sizes: [usize; 2], work: impl FnOnce() -> Work) -> Span {
    Span(is_on().then(|| Running::begin(Name { op, part: "", pass: Pass::Backward }, sizes, work())))
}

/// The same for what has no direction.
#[inline]
#[must_use = "it ends when it is dropped"]
pub fn span(op: &'static str, sizes: [usize; 2], work: impl FnOnce() -> Work) -> Span {
    Span(is_on().then(|| Running::begin(Name { op, part: "", pass: Pass::Other }, sizes, work())))
}

/// The same for a part of the operation whose span is the innermost now.
#[inline]
#[must_use = "it ends when it is dropped"]
pub fn part(part: &'static str, sizes: [usize; 2], work: impl FnOnce() -> Work) -> Span {
    Span(is_on().then(|| Running::begin(Name { part, ..INNERMOST.get().0 }, sizes, work())))
}

// Boxed, so that a span which is off is a null pointer in a register.
/// A piece of work that is timed, if anything is, until this is dropped.
#[derive(Debug)]
pub struct Span(Option<Box<Running>>);

impl Span {
    /// Runs what the span is for, and ends it.
    #[inline]
    pub fn run<R>(self, work: impl FnOnce() -> R) -> R {
        work()
    }
}

impl Drop for Span {
    #[inline]
    fn drop(&mut self) {
        if let Some(running) = self.0.take() {
            running.end();
        }
    }
}

#[derive(Debug)]
struct Running {
    name: Name,
    sizes: [usize; 2],
    work: Work,
    start: Instant,
    outer: (Name, Duration),
    this_thread: PhantomData<*const ()>,
}

impl Running {
    #[cold]
    fn begin(name: Name, sizes: [usize; 2], work: Work) -> Box<Self> {
        let outer = INNERMOST.replace((name, Duration::ZERO));
        Box::new(Running { name, sizes, work, start: Instant::now(), outer, this_thread: PhantomData })
    }

    #[cold]
    fn end(self) {
        let time = self.start.elapsed();
        let (outer, inside) = self.outer;
        let (_, inner) = INNERMOST.replace((outer, inside + time));
        // A process that was forked while the rows were taken measures nothing.
        let Some(mut rows) = briefly(|| ROWS.try_lock()) else { return };
        let sums = rows.entry((self.name, self.sizes)).or_default();
        sums.calls += 1;
        sums.time += time.saturating_sub(inner);
        sums.work += self.work;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_is_one_or_zero() {
        assert_eq!([None, Some(""), Some("0"), Some("1")].map(parse), [Ok(false), Ok(false), Ok(false), Ok(true)]);
        assert!(parse(Some("yes")).unwrap_err().to_string().contains("expected 1 (on) or 0 (off), got `yes`"));
    }
}
