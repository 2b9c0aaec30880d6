//! What must hold whoever has the team. (What needs the team for itself is in `rust/core/tests/threads.rs`.)

use super::*;
use crate::error::Error;
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const THREADS: [usize; 4] = [1, 2, 3, 7];

fn squares(n: usize) -> Vec<u64> {
    let mut squares = vec![0; n];
    let numbers: Vec<u64> = (0..n as u64).collect();
    for_each(squares.chunks_mut(3).zip(numbers.chunks(3)), |(squares, numbers)| {
        for (square, number) in squares.iter_mut().zip(numbers) {
            *square += number * number;
        }
    })
    .unwrap();
    squares
}

#[test]
fn every_task_runs_once_for_any_number_of_threads() {
    for threads in THREADS {
        with_local_limit(threads, || {
            for tasks in [0, 1, 2, 3, 64, 1000] {
                let runs: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                parallel(tasks, |i| _ = runs[i].fetch_add(1, Ordering::Relaxed)).unwrap();
                assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{threads} threads, {tasks} tasks");
            }
            let expected: Vec<u64> = (0..1000).map(|i| i * i).collect();
            assert_eq!(squares(1000), expected);
            section(None, || {
                (0..2000).for_each(|n| assert_eq!(squares(n % 40), expected[..n % 40]));
                Ok(())
            })
            .unwrap();
        });
    }
}

#[test]
fn one_thread_runs_tasks_in_order_and_stays_alone() {
    with_local_limit(1, || {
        let me = std::thread::current().id();
        let order = Mutex::new(vec![]);
        parallel(5, |i| order.lock().unwrap().push((i, std::thread::current().id()))).unwrap();
        assert_eq!(order.into_inner().unwrap(), (0..5).map(|i| (i, me)).collect::<Vec<_>>());
    });
}

#[test]
fn nested_calls_run_inline_in_order() {
    for threads in THREADS {
        with_local_limit(threads, || {
            let seen = Mutex::new(HashSet::new());
            parallel(8, |outer| {
                let me = std::thread::current().id();
                let next = AtomicUsize::new(0);
                section(None, || {
                    parallel(5, |inner| {
                        assert_eq!(std::thread::current().id(), me);
                        assert_eq!(next.fetch_add(1, Ordering::Relaxed), inner);
                        seen.lock().unwrap().insert((outer, inner));
                    })
                })
                .unwrap();
            })
            .unwrap();
            assert_eq!(seen.into_inner().unwrap().len(), 40);
        });
    }
}

#[test]
fn a_panic_in_a_task_is_an_error_and_the_next_region_runs() {
    for threads in THREADS {
        with_local_limit(threads, || {
            for bad in [0, 1, 50, 99] {
                let error = parallel(100, |i| assert!(i != bad, "task {i} is bad")).unwrap_err();
                assert_eq!(error, Error::Internal(format!("panic in a task: task {bad} is bad")));
            }
            section(None, || {
                for _ in 0..20 {
                    let dropped = Dropped::default();
                    let items: Vec<_> = (0..50).map(|i| (i, dropped.clone())).collect();
                    let error = for_each(items.into_iter(), |(i, _)| assert!(i % 7 != 3)).unwrap_err();
                    assert!(matches!(error, Error::Internal(_)), "{error}");
                    assert_eq!(std::sync::Arc::strong_count(&dropped), 1, "every item was dropped");
                    assert_eq!(squares(10)[9], 81);
                }
                // A panic inside a nested call ends the task that made it.
                let error = parallel(4, |_| parallel(2, |i| assert!(i == 0, "inner")).unwrap()).unwrap_err();
                assert_eq!(error, Error::Internal("panic in a task: inner".into()));
                Ok(())
            })
            .unwrap();
        });
    }
}

type Dropped = std::sync::Arc<()>;

#[test]
fn a_panic_drops_the_tasks_that_have_not_begun() {
    with_local_limit(1, || {
        for bad in 0..4 {
            let ran = AtomicUsize::new(0);
            let result = parallel(10_000, |i| {
                ran.fetch_add(1, Ordering::Relaxed);
                assert!(i != bad, "task {i}");
            });
            assert_eq!(result, Err(Error::Internal(format!("panic in a task: task {bad}"))));
            assert_eq!(ran.into_inner(), bad + 1);
        }
    });
}

#[test]
fn a_panic_in_the_body_closes_the_section() {
    with_local_limit(2, || {
        let body = || section(None, || -> Result<()> { panic!("body") });
        assert!(std::panic::catch_unwind(body).is_err());
        assert_eq!(squares(100)[99], 9801);
    });
}

#[test]
fn an_interrupt_ends_the_region_and_the_section() {
    for threads in THREADS {
        with_local_limit(threads, || {
            let (start, asked, ran) = (Instant::now(), Cell::new(0), AtomicUsize::new(0));
            let me = std::thread::current().id();
            // Tasks that this thread has begun, in all and when it was asked last.
            let (mine, when_asked) = (AtomicUsize::new(0), Cell::new(0));
            let poll = || {
                asked.set(asked.get() + 1);
                when_asked.set(mine.load(Ordering::Relaxed));
                asked.get() == 3
            };
            let nap = |_| {
                ran.fetch_add(1, Ordering::Relaxed);
                mine.fetch_add((std::thread::current().id() == me) as usize, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(2));
            };
            let result = section(Some(&poll), || {
                assert_eq!(parallel(100_000, nap), Err(Error::Interrupted));
                let before = ran.load(Ordering::Relaxed);
                assert_eq!(parallel(10, nap), Err(Error::Interrupted));
                assert_eq!(parallel(1, nap), Err(Error::Interrupted));
                assert_eq!(ran.load(Ordering::Relaxed), before, "nothing runs after an interrupt");
                Ok(()) // the section does not believe it
            });
            assert_eq!(result, Err(Error::Interrupted));
            assert_eq!(asked.get(), 3);
            assert_eq!(mine.load(Ordering::Relaxed), when_asked.get(), "nothing begins after it said stop");
            assert!(start.elapsed() >= Duration::from_millis(150), "asked more often than every 50 ms");
            assert_eq!(squares(10)[9], 81, "the next section knows nothing of it");
        });
    }
}

#[test]
fn regions_of_one_task_are_interrupted_too() {
    let asked = Cell::new(false);
    let result = section(Some(&|| !asked.replace(true)), || {
        (0..100).try_for_each(|_| parallel(1, |_| std::thread::sleep(Duration::from_millis(10))))
    });
    assert_eq!(result, Err(Error::Interrupted));
}

#[test]
fn what_must_finish_is_not_interrupted() {
    let asked = AtomicUsize::new(0);
    let poll = || asked.fetch_add(1, Ordering::Relaxed) == 0;
    let result = section(Some(&poll), || {
        uninterrupted(|| {
            for _ in 0..12 {
                assert_eq!(parallel(2, |_| std::thread::sleep(Duration::from_millis(10))), Ok(()));
            }
            assert_eq!(asked.load(Ordering::Relaxed), 0);
        });
        parallel(1, |_| ()) // of two, a worker might take both before this thread is asked
    });
    assert_eq!(result, Err(Error::Interrupted));
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[test]
fn a_poll_that_calls_the_engine_or_panics_does_no_harm() {
    for threads in [1, 2] {
        with_local_limit(threads, || {
            let nap = |_| std::thread::sleep(Duration::from_millis(1));
            let total = AtomicUsize::new(0);
            let poll = || {
                section(None, || parallel(3, |i| _ = total.fetch_add(i, Ordering::Relaxed))).unwrap();
                true
            };
            assert_eq!(section(Some(&poll), || parallel(10_000, nap)), Err(Error::Interrupted));
            assert_eq!(total.load(Ordering::Relaxed), 3);
            let error = section(Some(&|| panic!("poll")), || parallel(10_000, nap)).unwrap_err();
            assert_eq!(error, Error::Internal("panic in a task: poll".into()));
        });
    }
}

#[test]
fn the_local_limit_is_for_this_thread_and_goes_back() {
    let process = std::thread::spawn(num_threads).join().unwrap();
    with_local_limit(5, || {
        assert_eq!(num_threads(), 5);
        assert_eq!(std::thread::spawn(num_threads).join().unwrap(), process);
        with_local_limit(3, || assert_eq!(num_threads(), 3));
        assert_eq!(num_threads(), 5);
        with_local_limit(0, || assert_eq!(num_threads(), pool::available()));
        with_local_limit(usize::MAX, || assert_eq!(num_threads(), MAX_THREADS));
        let panics = std::panic::catch_unwind(|| with_local_limit(3, || panic!("inside")));
        assert!(panics.is_err() && num_threads() == 5);
    });
    assert_eq!(num_threads(), process);
}

#[test]
fn environment_variables_are_read_as_documented() {
    let read =
        |ours: Option<&str>, omp: Option<&str>| pool::from_environment(ours.map(Into::into), omp.map(Into::into));
    let all = Ok(pool::available());
    assert_eq!(read(None, None), all);
    assert_eq!(read(Some("3"), Some("4")), Ok(3));
    assert_eq!(read(Some(" 3 "), None), Ok(3));
    assert_eq!(read(Some("0"), Some("4")), all);
    assert_eq!(read(Some(""), Some("4")), Ok(4));
    assert_eq!(read(None, Some("4,2")), Ok(4));
    for bad in ["0", "-1", "many", "", "99999999999999999999"] {
        assert_eq!(read(None, Some(bad)), all, "{bad}");
    }
    for bad in ["-1", "two", "1.5", "1025", "99999999999999999999"] {
        assert!(matches!(read(Some(bad), Some("4")), Err(Error::Config(text)) if text.contains(bad)), "{bad}");
    }
    assert!(matches!(set_num_threads(MAX_THREADS + 1), Err(Error::Config(_))));
}

#[test]
fn row_blocks_depend_on_columns_alone() {
    assert_eq!(rows_per_task(0), GRAIN);
    assert_eq!(rows_per_task(1), GRAIN);
    assert_eq!(rows_per_task(512), 32);
    assert_eq!(rows_per_task(GRAIN + 1), 1);
}
