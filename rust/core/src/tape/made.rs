//! What is made of parameters when it is first asked for.

use crate::error::Result;
use crate::threads::briefly;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::RwLock;

/// Values by key, each made at its first use.
///
/// They are made outside of the lock: making one runs tasks, and between tasks signal handlers, which may ask as well. So two who
/// are the first at once both make it, and one of the two is dropped. The lock is held to look and to insert, a moment, and who
/// finds it taken in a forked child, where it stays so, makes what it needs for itself.
#[derive(Debug)]
pub(super) struct Made<K, V>(RwLock<HashMap<K, V>>);

impl<K, V> Default for Made<K, V> {
    fn default() -> Self {
        Made(RwLock::new(HashMap::new()))
    }
}

impl<K: Eq + Hash, V: Clone> Made<K, V> {
    /// The value of a key.
    pub fn get(&self, key: K, make: impl FnOnce() -> Result<V>) -> Result<V> {
        let found = briefly(|| self.0.try_read()).and_then(|made| made.get(&key).cloned());
        if let Some(found) = found {
            return Ok(found);
        }
        let new = make()?;
        Ok(match briefly(|| self.0.try_write()) {
            Some(mut made) => made.entry(key).or_insert(new).clone(),
            None => new,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::{parallel, section};
    use std::cell::Cell;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Barrier, mpsc};
    use std::time::Duration;

    /// What `work` says, on a thread that is left behind if it never does.
    fn watched<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> R {
        let (say, hear) = mpsc::channel();
        std::thread::spawn(move || say.send(work()));
        hear.recv_timeout(Duration::from_secs(60)).expect("it hangs")
    }

    #[test]
    fn a_signal_handler_may_ask_while_a_value_is_made() {
        let got = watched(|| {
            let (made, inner) = (Made::<u32, u32>::default(), Cell::new(0));
            let poll = || {
                inner.set(made.get(7, || Ok(70)).unwrap());
                false
            };
            let slow = || (0..20).try_for_each(|_| parallel(1, |_| std::thread::sleep(Duration::from_millis(10))));
            let outer = section(Some(&poll), || made.get(7, || slow().map(|()| 71)));
            (outer, inner.get())
        });
        assert_eq!(got, (Ok(70), 70), "the first that was kept is everybody's");
    }

    #[test]
    fn readers_at_once_make_nothing_anew() {
        const KEYS: u32 = 8;
        let (made, start, count) = (Made::<u32, u32>::default(), Barrier::new(8), AtomicUsize::new(0));
        let make = |key| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(key)
        };
        (0..KEYS).for_each(|key| _ = made.get(key, || make(key)));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    start.wait();
                    (0..20_000).for_each(|i| assert_eq!(made.get(i % KEYS, || make(i % KEYS)), Ok(i % KEYS)));
                });
            }
        });
        assert_eq!(count.into_inner(), KEYS as usize);
    }

    #[test]
    fn where_the_lock_stays_taken_each_makes_its_own() {
        let made = Arc::new(Made::<u32, u32>::default());
        made.get(1, || Ok(10)).unwrap();
        let ask = |key| {
            let made = made.clone();
            watched(move || made.get(key, || Ok(99)).unwrap())
        };
        let reader = made.0.read().unwrap(); // of a parent, when it forked
        assert_eq!([ask(1), ask(2)], [10, 99]);
        drop(reader);
        let writer = made.0.write().unwrap();
        assert_eq!([ask(1), ask(2)], [99, 99]);
        drop(writer);
        assert_eq!(made.get(2, || Ok(20)), Ok(20));
    }
}
