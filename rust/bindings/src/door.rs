//! The one door between Python and the engine.

use crate::errors::raise;
use crate::form::LARGE;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use transformer_core::error::{Error, Result};
use transformer_core::{profile, simd, threads};

/// How often signals are looked for.
const POLL_EVERY: Duration = Duration::from_millis(50);

/// Runs `work` without the interpreter, inside a hot section. Signals are looked for at most every 50 ms, and what
/// a handler raises (Ctrl-C: KeyboardInterrupt) comes out; errors become exceptions, panics included.
///
/// Only this file lets go of the interpreter. Locks that a long call may hold are taken inside `work`.
pub fn run<R: Send>(py: Python<'_>, work: impl FnOnce() -> Result<R> + Send) -> PyResult<R> {
    run_until(py, None, work)
}

/// [`run`], ended as by Ctrl-C when another thread sets `stop`, and not begun when it is set.
pub fn run_until<R: Send>(
    py: Python<'_>,
    stop: Option<&AtomicBool>,
    work: impl FnOnce() -> Result<R> + Send,
) -> PyResult<R> {
    if stop.is_some_and(|stop| stop.load(Ordering::Relaxed)) {
        return Err(raise(Error::Interrupted));
    }
    simd::isa().map_err(raise)?;
    profile::check().map_err(raise)?;
    let limit = context_limit(py)?;
    let main = on_main_thread(py)?;
    #[allow(clippy::disallowed_methods)]
    let (result, raised) = py.detach(|| {
        let raised = Cell::new(None);
        let poll = || {
            // Only the main thread runs signal handlers: the others need not ask.
            let signals = if main { call_back(|py| py.check_signals()) } else { Ok(()) };
            let end = signals.is_err() || stop.is_some_and(|stop| stop.load(Ordering::Relaxed));
            raised.set(signals.err());
            end
        };
        let poll: Option<&dyn Fn() -> bool> = if main || stop.is_some() { Some(&poll) } else { None };
        let section = || threads::section(poll, work);
        let limited = || match limit {
            Some(n) => threads::with_local_limit(n, section),
            None => section(),
        };
        let result = catch_unwind(AssertUnwindSafe(limited)).unwrap_or_else(|panic| Err(Error::Internal(text(panic))));
        (result, raised.take())
    });
    match (result, raised) {
        (Err(Error::Interrupted), Some(raised)) => Err(raised),
        (result, _) => result.map_err(raise),
    }
}

thread_local! {
    /// How many calls of this thread are waiting for Python.
    static OUTER: Cell<usize> = const { Cell::new(0) };
}

/// Runs Python in the midst of a call: signal handlers, or a hook.
pub fn call_back<R>(work: impl FnOnce(Python<'_>) -> R) -> R {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            OUTER.set(OUTER.get() - 1);
        }
    }
    OUTER.set(OUTER.get() + 1);
    let _leave = Leave;
    Python::attach(work)
}

/// Whether Python that a call of this thread runs has called again. That one goes on only when we are done, so nothing that it
/// holds can be waited for.
pub fn is_nested() -> bool {
    OUTER.get() > 0
}

/// Lets go of the interpreter until `attempt` has something, outside of any section. It comes back when its patience ends, and
/// signals are looked for.
pub fn wait<R: Send>(py: Python<'_>, attempt: impl Fn(Duration) -> Option<R> + Sync) -> PyResult<R> {
    if let Some(found) = attempt(Duration::ZERO) {
        return Ok(found);
    }
    let main = on_main_thread(py)?;
    loop {
        #[allow(clippy::disallowed_methods)]
        if let Some(found) = py.detach(|| attempt(POLL_EVERY)) {
            return Ok(found);
        }
        if main {
            py.check_signals()?;
        }
    }
}

/// Runs `work`, which copies so many numbers between arrays and the engine, while the interpreter is held: nobody can write to
/// the arrays meanwhile. Where there is much to copy, all threads do it, in one section.
pub fn copying<R>(py: Python<'_>, numbers: usize, work: impl FnOnce() -> PyResult<R>) -> PyResult<R> {
    if numbers < LARGE {
        return work();
    }
    // Not worth a poll: a second of it is 10 GB.
    let section = || threads::section(None, || Ok(work())).map_err(raise);
    match context_limit(py)? {
        Some(n) => threads::with_local_limit(n, section)?,
        None => section()?,
    }
}

/// What `with num_threads(n):` says here.
pub fn context_limit(py: Python<'_>) -> PyResult<Option<usize>> {
    static LIMIT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    LIMIT.import(py, "transformer_rs.threads", "_limit")?.call_method0("get")?.extract()
}

fn on_main_thread(py: Python<'_>) -> PyResult<bool> {
    static GET_IDENT: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    static MAIN_THREAD: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    let here = GET_IDENT.import(py, "threading", "get_ident")?.call0()?;
    let main = MAIN_THREAD.import(py, "threading", "main_thread")?.call0()?;
    here.eq(main.getattr("ident")?)
}

fn text(panic: Box<dyn Any + Send>) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_string(),
        (_, Some(text)) => text.clone(),
        _ => "a panic without text".to_string(),
    }
}
