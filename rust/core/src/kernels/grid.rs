//! How the rows and columns of a product are cut into tasks. No bit depends on it.

use crate::threads;
use std::ops::Range;

/// Blocks of rows and columns, a task each. Columns may be counted in panels.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    pub rows: usize,
    pub cols: usize,
    pub row_block: usize,
    pub col_block: usize,
}

impl Grid {
    /// Blocks side by side.
    pub fn across(&self) -> usize {
        self.cols.div_ceil(self.col_block)
    }

    pub fn tasks(&self) -> usize {
        self.rows.div_ceil(self.row_block) * self.across()
    }

    /// Neighbouring tasks share their rows, which then are in the L2 cache already.
    pub fn block(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let across = self.across();
        let (row, col) = (index / across * self.row_block, index % across * self.col_block);
        (row..self.rows.min(row + self.row_block), col..self.cols.min(col + self.col_block))
    }

    /// What task `index` has before and after it.
    pub fn neighbours(&self, index: usize, workers: usize) -> Neighbours {
        let share = threads::share_of(index, self.tasks(), workers);
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
