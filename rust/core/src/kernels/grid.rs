//! How the rows and columns of a product are cut into tasks. No bit depends on it.

use crate::error::Result;
use crate::threads;
use std::ops::Range;

/// A product of fewer rows than this takes as long: the weights have to come from memory.
pub(super) const LEAST_ROWS: usize = 8;

/// Runs so many tasks, on the calling thread where it is the only worker.
pub(super) fn run(tasks: usize, workers: usize, task: impl Fn(usize) + Sync) -> Result<()> {
    if workers > 1 {
        return threads::parallel(tasks, task);
    }
    (0..tasks).for_each(task);
    Ok(())
}

/// 0..`len` in parts of whole units (the last unit may be short), as even as can be: a thread whose parts are larger lets the
/// others wait.
#[derive(Clone, Copy)]
pub(super) struct Cut {
    len: usize,
    unit: usize,
    parts: usize,
}

impl Cut {
    /// In so many parts, if there are as many units.
    pub fn new(len: usize, unit: usize, parts: usize) -> Self {
        Cut { len, unit, parts: parts.clamp(1, len.div_ceil(unit).max(1)) }
    }

    pub fn parts(self) -> usize {
        self.parts
    }

    fn part(self, i: usize) -> Range<usize> {
        let units = threads::part(self.len.div_ceil(self.unit), self.parts, i);
        units.start * self.unit..self.len.min(units.end * self.unit)
    }
}

/// Parts of the rows times parts of the columns, a task each. Columns may be counted in panels.
#[derive(Clone, Copy)]
pub(super) struct Tasks {
    rows: Cut,
    cols: Cut,
}

impl Tasks {
    /// With some more parts of the columns where the workers would not have the same to do.
    pub fn new(rows: Cut, cols: Cut, workers: usize) -> Self {
        let tasks = rows.parts * cols.parts;
        let even = tasks < workers || tasks.is_multiple_of(workers);
        let across = if even { cols.parts } else { cols.parts.next_multiple_of(workers) };
        Tasks { rows, cols: Cut::new(cols.len, cols.unit, across) }
    }

    /// Tasks side by side.
    pub fn across(&self) -> usize {
        self.cols.parts
    }

    pub fn count(&self) -> usize {
        self.rows.parts * self.across()
    }

    /// Neighbouring tasks share their rows, which then are in the L2 cache already.
    pub fn block(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let across = self.across();
        (self.rows.part(index / across), self.cols.part(index % across))
    }

    /// What task `index` has before and after it.
    pub fn neighbours(&self, index: usize, workers: usize) -> Neighbours {
        let share = threads::share_of(index, self.count(), workers);
        let then = (index + 1 < share.end).then(|| self.block(index + 1).1.start);
        Neighbours { first: index == share.start, then }
    }
}

/// What a task knows of those that its thread has before and after it.
#[derive(Clone, Copy)]
pub(super) struct Neighbours {
    /// There was none before it: nobody asked for its first panels.
    pub first: bool,
    /// The first column of the one after it, if there is one.
    pub then: Option<usize>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_in_one_task_and_two_workers_have_about_the_same() {
        for (rows, unit, parts) in [(1024, 6, 20), (1024, 12, 20), (256, 12, 3), (7, 4, 9), (1, 12, 1)] {
            for (cols, panels, across) in [(512, 64, 1), (512, 64, 3), (33, 32, 1), (1, 64, 4)] {
                for workers in [1, 2, 3, 16] {
                    let tasks = Tasks::new(Cut::new(rows, unit, parts), Cut::new(cols, panels, across), workers);
                    let blocks: Vec<_> = (0..tasks.count()).map(|index| tasks.block(index)).collect();
                    let mut seen = vec![0; rows * cols];
                    for (r, c) in &blocks {
                        assert!(r.start.is_multiple_of(unit) && c.start.is_multiple_of(panels));
                        assert!(!r.is_empty() && !c.is_empty());
                        r.clone().for_each(|r| c.clone().for_each(|c| seen[r * cols + c] += 1));
                    }
                    assert!(seen.iter().all(|&n| n == 1));
                    if workers == 2 && rows > 100 && cols > 100 {
                        let first = threads::part(blocks.len(), 2, 0);
                        let of_first: usize = blocks[first].iter().map(|(r, c)| r.len() * c.len()).sum();
                        assert!(
                            (2 * of_first).abs_diff(rows * cols) * 25 <= rows * cols,
                            "{of_first}: {rows} x {cols}"
                        );
                    }
                }
            }
        }
    }
}
