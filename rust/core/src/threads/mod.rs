//! Threads: `parallel` runs tasks, `section` keeps the workers awake between them.
//!
//! One rule gives the same bits for any number of threads: **a task owns its outputs**. Which thread runs a task, and when,
//! can then not be seen in any result. Where a sum goes over tasks, they are cut by sizes and written constants, never by
//! the number of threads, and the sum is made afterwards, from one partial per task, in a fixed tree. Where each output is
//! one task's alone (products, rows of attention), the number of threads may decide how many tasks there are.
//!
//! rayon owns the threads, one less than asked for, because the caller is worker 0. Waking a sleeping thread costs
//! 30–50 µs, more than most regions last, so a *hot section* borrows the threads for a training step or a decode
//! call: inside it they spin between regions and a region costs a fraction of a microsecond. No call to rayon is made
//! inside a section. There is one team per process; a thread that finds it taken runs its tasks itself, at once.
//!
//! Every task runs under one fixed floating-point environment (`environment`), whatever the caller's is.

mod environment;
mod lock;
mod pool;
mod section;
mod team;

pub use lock::briefly;
pub use pool::{MAX_THREADS, num_threads, set_num_threads, try_num_threads, with_local_limit};
pub use section::{parallel, section, uninterrupted};
pub use team::{part, share_of};

use crate::error::Result;
use std::sync::Mutex;

/// Elements per task of an elementwise job: 64 KiB of f32, some microseconds of work.
pub const GRAIN: usize = 16 * 1024;

/// Rows of `cols` elements that one task of an elementwise job takes: blocks of a fixed size, so that the split never
/// depends on the number of threads. Cut with `chunks_mut(rows_per_task(cols) * cols)`; a small job is one task.
pub fn rows_per_task(cols: usize) -> usize {
    (GRAIN / cols.max(1)).max(1)
}

/// [`parallel`] over owned items, such as disjoint `&mut` chunks zipped together:
/// `for_each(y.chunks_mut(n).zip(x.chunks(n)), |(y, x)| kernel(y, x))?`. Items of tasks that are skipped are dropped.
pub fn for_each<I>(items: I, task: impl Fn(I::Item) + Sync) -> Result<()>
where
    I: ExactSizeIterator,
    I::Item: Send,
{
    // The iterator stays on this thread; each lock is taken once, by the task that owns the item.
    let items: Vec<_> = items.map(|item| Mutex::new(Some(item))).collect();
    parallel(items.len(), |index| {
        if let Some(item) = items[index].lock().ok().and_then(|mut item| item.take()) {
            task(item);
        }
    })
}

/// Pieces in their order, as tasks of [`GRAIN`] elements at least, so that small ones share one.
pub fn gather<P>(pieces: impl Iterator<Item = P>, len: impl Fn(&P) -> usize) -> Vec<Vec<P>> {
    let (mut tasks, mut held): (Vec<Vec<P>>, _) = (Vec::new(), GRAIN);
    for piece in pieces {
        let n = len(&piece);
        match tasks.last_mut() {
            Some(task) if held < GRAIN => {
                task.push(piece);
                held += n;
            }
            _ => {
                tasks.push(vec![piece]);
                held = n;
            }
        }
    }
    tasks
}

#[cfg(test)]
mod tests;
