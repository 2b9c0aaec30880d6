//! The pool, where a test needs it for itself: who takes part, two callers at once, fork, the number of threads.
//! (A process of its own, so that no other test has the team; within it one test at a time.)

use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread::ThreadId;
use std::time::{Duration, Instant};
use transformer_core::error::{Error, Result};
use transformer_core::threads::{
    MAX_THREADS, for_each, num_threads, parallel, section, set_num_threads, with_local_limit,
};

fn alone() -> MutexGuard<'static, ()> {
    static ONE_TEST: Mutex<()> = Mutex::new(());
    ONE_TEST.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// How long a test waits for what only a defect keeps from coming. Who waits for such a test has twice as long.
const PATIENCE: Duration = Duration::from_secs(120);

/// The threads that take part in a region whose tasks wait until there are `expected`.
fn helpers(expected: usize) -> Result<HashSet<ThreadId>> {
    helpers_doing(expected, || ())
}

/// The same; each task does something first.
fn helpers_doing(expected: usize, task: impl Fn() + Sync) -> Result<HashSet<ThreadId>> {
    let (start, seen) = (Instant::now(), Mutex::new(HashSet::new()));
    parallel(expected + 20, |_| {
        task();
        seen.lock().unwrap().insert(std::thread::current().id());
        while seen.lock().unwrap().len() < expected && start.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_micros(100));
        }
        std::thread::sleep(Duration::from_micros(500)); // time for one too many
    })?;
    Ok(seen.into_inner().unwrap())
}

/// Waits until `ready`.
fn eventually(what: &str, ready: impl Fn() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn as_many_threads_as_asked_for_take_part() {
    let _alone = alone();
    for threads in [1, 2, 3, 7, 2, 1] {
        with_local_limit(threads, || {
            assert_eq!(helpers(threads).unwrap().len(), threads);
            section(None, || {
                let seen = helpers(threads)?;
                assert_eq!(seen.len(), threads);
                assert!(seen.contains(&std::thread::current().id()), "the caller is worker 0");
                assert!(helpers(threads)?.is_subset(&seen), "the same threads all along");
                Ok(())
            })
            .unwrap();
        });
    }
}

#[test]
fn regions_follow_each_other_without_mixing_up_their_tasks() {
    /// A region whose closure and counter lie at another place of the stack each time, so that a worker that takes
    /// one region for another cannot be right by chance.
    #[inline(never)]
    fn region(number: u64, tasks: u64, depth: u64) -> Result<()> {
        let below = std::hint::black_box([number; 64]);
        if depth > 0 {
            let result = region(number, tasks, depth - 1);
            std::hint::black_box(below); // or the call would become a loop
            return result;
        }
        let sum = AtomicU64::new(0);
        parallel(tasks as usize, |i| _ = sum.fetch_add(number << 8 | 1 << i, Ordering::Relaxed))?;
        assert_eq!(sum.into_inner(), (number << 8) * tasks + (1 << tasks) - 1);
        Ok(())
    }
    let _alone = alone();
    for threads in [2, 3, 7] {
        let mut state = 1u64;
        let mut random = |below| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let regions = || section(None, || (0..100_000).try_for_each(|number| region(number, random(9), random(4))));
        with_local_limit(threads, regions).unwrap();
    }
}

#[test]
fn a_second_caller_works_alone_and_does_not_wait() {
    let _alone = alone();
    let (open, done, start) = (AtomicBool::new(false), AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        // It has the team until the second caller is done, or has waited in vain.
        let first = scope.spawn(|| {
            with_local_limit(2, || {
                section(None, || {
                    open.store(true, Ordering::Release);
                    while !done.load(Ordering::Acquire) && start.elapsed() < PATIENCE {
                        helpers(2)?;
                    }
                    Ok(done.load(Ordering::Acquire))
                })
            })
        });
        eventually("the first section opens", || open.load(Ordering::Acquire));
        let seen = with_local_limit(2, || section(None, || helpers(1))).unwrap();
        done.store(true, Ordering::Release);
        assert_eq!(seen, HashSet::from([std::thread::current().id()]));
        assert_eq!(first.join().unwrap(), Ok(true), "the second caller waited for the first");
    });
    assert_eq!(with_local_limit(2, || helpers(2)).unwrap().len(), 2, "the team is free again");
}

#[test]
fn many_callers_at_once_all_get_their_results() {
    let _alone = alone();
    std::thread::scope(|scope| {
        for caller in 0..8usize {
            scope.spawn(move || {
                for turn in 0..200 {
                    let mut squares = vec![0; caller + turn % 50];
                    let task = |(i, square): (usize, &mut usize)| *square = i * i;
                    with_local_limit(1 + turn % 4, || for_each(squares.iter_mut().enumerate(), task)).unwrap();
                    assert!(squares.iter().enumerate().all(|(i, square)| *square == i * i));
                }
            });
        }
    });
}

#[test]
fn the_number_changes_between_sections() {
    let _alone = alone();
    let before = num_threads();
    set_num_threads(3).unwrap();
    assert_eq!(num_threads(), 3);
    section(None, || {
        set_num_threads(2).unwrap();
        std::thread::spawn(|| set_num_threads(5).unwrap()).join().unwrap();
        assert_eq!(num_threads(), 5);
        assert_eq!(helpers(3)?.len(), 3, "an open section keeps its threads");
        Ok(())
    })
    .unwrap();
    assert_eq!(helpers(5).unwrap().len(), 5);
    set_num_threads(2).unwrap();
    assert_eq!(helpers(2).unwrap().len(), 2);
    set_num_threads(0).unwrap();
    assert_eq!(num_threads(), std::thread::available_parallelism().unwrap().get());
    set_num_threads(before).unwrap();
}

#[cfg(target_os = "linux")]
#[test]
fn threads_start_with_the_first_region_and_one_thread_needs_none() {
    let _alone = alone();
    let count = || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        // A thread may end between the two readings.
        let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names.filter(|name| name.starts_with("transformer_rs-")).count()
    };
    let before = num_threads();
    set_num_threads(63).unwrap(); // a number that no other test leaves behind
    eventually("the old pool goes", || count() == 0);
    set_num_threads(1).unwrap();
    helpers(1).unwrap();
    set_num_threads(4).unwrap();
    parallel(1, |_| ()).unwrap();
    assert_eq!(count(), 0);
    helpers(4).unwrap();
    assert_eq!(count(), 3);
    set_num_threads(before).unwrap();
}

/// Runs `body` in a forked child; false when it fails, panics or does not end.
#[cfg(unix)]
fn succeeds_in_child(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs `body` and leaves by `_exit`; it holds no lock that a lost thread might have.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
        // SAFETY: ends the child without the destructors of the parent's test harness.
        unsafe { libc::_exit(if good { 0 } else { 1 }) };
    }
    let (start, mut status) = (Instant::now(), 0);
    loop {
        // SAFETY: `child` is our own, `status` is live.
        if unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) } == child {
            return libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
        }
        if start.elapsed() > 2 * PATIENCE {
            // SAFETY: `child` is our own and has not been waited for.
            unsafe { (libc::kill(child, libc::SIGKILL), libc::waitpid(child, &raw mut status, 0)) };
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(unix)]
#[test]
fn a_forked_child_gets_threads_of_its_own() {
    let _alone = alone();
    with_local_limit(3, || {
        assert_eq!(helpers(3).unwrap().len(), 3);
        let in_child = || helpers(3).unwrap().len() == 3 && succeeds_in_child(|| helpers(3).unwrap().len() == 3);
        assert!(succeeds_in_child(in_child), "after use, and in a child of the child");
        assert_eq!(helpers(3).unwrap().len(), 3, "the parent keeps its own");
    });
    // While another thread, which the child will not have, holds the team in the middle of a region.
    let (open, done) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let wait = |_| {
                open.store(true, Ordering::Release);
                eventually("the child is done", || done.load(Ordering::Acquire));
            };
            with_local_limit(2, || parallel(2, wait)).unwrap();
        });
        eventually("the section opens", || open.load(Ordering::Acquire));
        let good = succeeds_in_child(|| with_local_limit(3, || helpers(3).unwrap().len() == 3));
        done.store(true, Ordering::Release);
        assert!(good, "while the team was taken");
    });
}

#[test]
fn the_environment_sets_the_number() {
    const CHILD: &str = "TRANSFORMER_RS_TEST_EXPECTS";
    if let Ok(expected) = std::env::var(CHILD) {
        if expected == "error" {
            assert!(matches!(parallel(2, |_| ()), Err(Error::Config(text)) if text.contains("\"some\"")));
            set_num_threads(2).unwrap();
            parallel(2, |_| ()).unwrap();
        } else {
            assert_eq!(num_threads().to_string(), expected);
            assert_eq!(helpers(num_threads()).unwrap().len(), num_threads());
        }
        return;
    }
    let all = std::thread::available_parallelism().unwrap().to_string();
    for (ours, omp, expected) in
        [("3", "2", "3"), ("", "3", "3"), ("0", "5", all.as_str()), ("", "some", all.as_str()), ("some", "2", "error")]
    {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_environment_sets_the_number"])
            .envs([("TRANSFORMER_RS_NUM_THREADS", ours), ("OMP_NUM_THREADS", omp), (CHILD, expected)])
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success(), "{ours:?} {omp:?} {expected:?}");
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn tasks_see_one_float_environment_and_the_caller_keeps_its_own() {
    use std::hint::black_box;
    /// Flush to zero, denormals are zero, and the "inexact" flag raised.
    const CALLERS: u32 = 0x1F80 | 1 << 15 | 1 << 6 | 1 << 5;
    let get = || {
        let mut value = 0u32;
        // SAFETY: stores the register into a live u32.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
        value
    };
    let set = |value: u32| {
        // SAFETY: loads a valid value from a live u32.
        unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack)) };
    };
    let control = |value: u32| value & !0x3F; // without the sticky flags
    let flushes = || black_box(f32::MIN_POSITIVE) * black_box(0.5) == 0.0;

    let _alone = alone();
    let (environment, before) = (get(), num_threads());
    set(CALLERS);
    assert!(flushes());
    for threads in [1, 2, 3, 7] {
        // A new pool: its threads inherit the environment of the thread that starts them, this one.
        set_num_threads(MAX_THREADS).unwrap();
        set_num_threads(threads).unwrap();
        set(CALLERS);
        let wrong = AtomicUsize::new(0);
        let check = || _ = wrong.fetch_add((flushes() || control(get()) != 0x1F80) as usize, Ordering::Relaxed);
        parallel(1, |_| check()).unwrap();
        assert_eq!(helpers_doing(threads, check).unwrap().len(), threads);
        assert_eq!(get(), CALLERS);

        let polled = Cell::new(0);
        let poll = || {
            polled.set(get());
            false
        };
        section(Some(&poll), || {
            assert_eq!(control(get()), 0x1F80);
            parallel(1, |_| std::thread::sleep(Duration::from_millis(51)))?;
            assert_eq!(helpers_doing(threads, check)?.len(), threads);
            Ok(())
        })
        .unwrap();
        assert_eq!(polled.get(), CALLERS, "a signal handler runs in the caller's environment");
        assert_eq!(get(), CALLERS);

        let _ = std::panic::catch_unwind(|| section(None, || -> Result<()> { panic!("body") }));
        assert_eq!(get(), CALLERS);
        assert_eq!(wrong.load(Ordering::Relaxed), 0, "{threads} threads");
    }
    set(environment);
    set_num_threads(before).unwrap();
}

#[test]
fn an_interrupt_reaches_the_workers() {
    let _alone = alone();
    let ran = AtomicUsize::new(0);
    let nap = |_| {
        ran.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    };
    let result = with_local_limit(7, || section(Some(&|| true), || parallel(1_000_000, nap)));
    let before = ran.load(Ordering::Relaxed);
    assert_eq!(result, Err(Error::Interrupted));
    assert!(before < 1_000_000);
    assert_eq!(with_local_limit(7, || helpers(7)).unwrap().len(), 7);
    assert_eq!(ran.load(Ordering::Relaxed), before, "the workers went on");
}
