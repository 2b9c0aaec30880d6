//! How a product is cut: what is packed of the factors, how much of them at a time, and the tasks of it. No bit depends on it.

use super::form::Form;
use super::left::{FEW, Left, NEAR};
use super::pack::panel_len;
use super::tile::{self, KC};
use super::{Mat, Rhs};
use crate::kernels::grid::{Cut, LEAST_ROWS, Tasks};
use crate::simd::Float;

/// A task has at least so many multiply-adds: some ten microseconds.
const TASK: usize = 1 << 18;
/// Rows and columns of a task at most: its part of A and of C stay in the L2 cache.
pub(super) const TASK_ROWS: usize = 96;
pub(super) const TASK_COLS: usize = 512;
/// Numbers of A that a task may have at a time where B comes from memory: 256 KiB of f32.
const TASK_A: usize = 1 << 16;
/// Numbers of B packed at a time, a MiB of f32, which stay in the L2 cache, and columns of it; the same for A,
/// whose slab is read once for each slab of B.
pub(super) const SLAB_B: usize = 1 << 18;
pub(super) const SLAB_COLS: usize = 512;
const SLAB_A: usize = 1 << 19;
pub(super) const SLAB_ROWS: usize = 2048;
/// With fewer rows than this, or so few numbers that they fit the L1 cache, B is read where it lies, if its rows are
/// contiguous: packing costs as much as a few rows.
const PACK_FROM_ROWS: usize = 24;
const PACK_FROM: usize = 4096;

/// For one product. Steps along K are counted in units of the form.
pub(super) struct Plan {
    /// Rows and columns of the register tile.
    pub tile: (usize, usize),
    /// How tiles get A.
    pub left: Left,
    /// Whether B is packed here.
    pub packs_b: bool,
    /// Rows, columns and units along K of a slab: of what is packed at a time, or of all.
    pub rows: usize,
    pub cols: usize,
    pub depth: usize,
}

impl Plan {
    /// For A and B that fit each other and this tile.
    pub fn of<T: Float, F: Form>(a: &Mat<T>, b: &Rhs<T>, tile: (usize, usize)) -> Self {
        let ((m, depth), (_, n)) = (a.shape(), b.shape());
        let left = Left::of::<T, F>(a, n, tile.0);
        let few = m < PACK_FROM_ROWS || depth * n <= PACK_FROM;
        let in_place = |b: &Mat<T>| b.col_stride == 1 && (few || (m <= FEW && b.row_stride <= NEAR));
        let packs_a = left != Left::InPlace;
        let packs_b = matches!(b, Rhs::Plain(b) if !F::IN_PLACE || !in_place(b));

        let rows = if packs_a { m.min(SLAB_ROWS) } else { m };
        let cols = if packs_b { n.min(SLAB_COLS) } else { n };
        let units = F::units(depth);
        let deepest =
            |packs: bool, numbers: usize, width: usize| if packs { (numbers / width / KC * KC).max(KC) } else { units };
        let depth = units.min(deepest(packs_a, SLAB_A, rows)).min(deepest(packs_b, SLAB_B, cols));
        Plan { tile, left, packs_b, rows, cols, depth }
    }

    /// Whether A is packed.
    pub fn packs_a(&self) -> bool {
        self.left != Left::InPlace
    }

    /// Numbers of a packed slab of A, and of B.
    pub fn packed_len<T: Float>(&self, a: &Mat<T>) -> (usize, usize) {
        let of_a = || self.rows.div_ceil(self.tile.0) * self.left.strides(a, self.depth, self.tile.0).tile;
        let of_b = || self.cols.div_ceil(self.tile.1) * panel_len(self.depth, self.tile.1);
        (if self.packs_a() { of_a() } else { 0 }, if self.packs_b { of_b() } else { 0 })
    }

    /// The tasks of a slab: about eight per worker, or four, none too small.
    pub fn tasks(&self, rows: usize, cols: usize, depth: usize, workers: usize, from_memory: bool) -> Tasks {
        let (tile_rows, tile_cols) = self.tile;
        let thin = TASK_ROWS / 2;
        let row_parts = if workers > 1 && rows >= 8 * workers * thin {
            // Where there are rows for all, tasks are thin and wide, and as many for each: each row of A is read by few of them.
            rows / thin / workers * workers
        } else if from_memory {
            // Where B comes from memory it is to come once.
            rows.div_ceil(TASK_ROWS.max(TASK_A / depth.clamp(1, KC)))
        } else {
            rows.div_ceil(TASK_ROWS)
        };
        let least = rows / row_parts; // rows of a task, about
        let (height, panels) = tile::shape(least, tile_rows);
        // Packed tiles are as high as the tallest.
        let by_row = Cut::new(rows, if self.packs_a() { tile_rows } else { height }, row_parts);
        let at_least = (TASK / (least.max(LEAST_ROWS) * depth.max(1)).max(1)).max(1);
        // The first panels of a task are waited for where they come from memory.
        let tasks = if from_memory { 4 } else { 8 } * workers;
        let wanted = if workers == 1 { cols } else { cols.div_ceil(tasks.div_ceil(row_parts)) };
        let col_parts = cols.div_ceil(wanted.max(at_least).min(TASK_COLS));
        Tasks::new(by_row, Cut::new(cols, panels * tile_cols, col_parts), workers)
    }
}
