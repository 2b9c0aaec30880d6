//! Products in int8: weights with a scale for each output, inputs with one for each row, found when they come.
//!
//! A number x of a row is q · s with s = max |x| / 127 and q = x / s, rounded to the nearest in [−127, 127]. Then
//! x Wᵀ = s_x s_w Σ q_x q_w, and the sum is of integers: exact, so the same on every path and in any order. A row's result
//! depends on that row alone.

mod pack;
mod quantize;
mod shortlist;

#[cfg(test)]
mod tests;

pub use pack::Int8Rhs;
pub use quantize::quantize_rows;
pub use shortlist::Shortlist;

use super::gemm::{Epilogue, stash};
use super::grid::{Cut, LEAST_ROWS, Neighbours, Tasks, run};
use super::out::Out;
use crate::error::Result;
use crate::simd::bytes::{Bytes, Multiplier, Operands, PANEL, Products, STEP, Sums, WIDTH};
use crate::simd::{Float, Kernel, MAX_LANES, Simd, prefetch};
use crate::{ensure, threads};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

/// The longest sum: beyond it one of 127² each could leave 32 bits.
pub const MAX_DEPTH: usize = 1 << 17;

/// Bytes of the rows of a task at most: they stay in the L2 cache, and weights pass by once for all of them.
const TASK_BYTES: usize = 256 << 10;
/// A task may have so many rows, whatever their bytes.
const TASK_ROWS: usize = 96;
/// Where there are so many rows for each thread they are shared out: a thread then reads and writes rows of its own, as the
/// operations before and after do. Where two cores have no cache in common 128 rows take a tenth less time, elsewhere the same; with
/// fewer rows for each, many threads would read all weights for little work.
const THREAD_ROWS: usize = 64;
/// A task has at least so many multiply-adds: some ten microseconds.
const TASK: usize = 1 << 20;
/// Below this number of multiply-adds a product runs on the calling thread.
const SERIAL_BELOW: usize = 1 << 21;
/// The places of a result of more bytes than this are asked for while its tiles are multiplied, for they have left the L2 cache.
/// (Asking for those of a smaller one costs 3 % of a product of 16 rows.)
const NEAR_BYTES: usize = 1 << 20;
/// Steps along the depth, 8 KiB of a panel, between what a tile multiplies and what it asks for, where the next steps of its own
/// panel are to come from memory.
const AHEAD: usize = 64;
/// Bytes of a panel at each step.
const STEP_BYTES: usize = STEP * PANEL;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Whether bytes are multiplied faster than floats: plain Rust takes twice as long.
pub fn is_fast() -> bool {
    Bytes::best() != Bytes::Portable
}

/// y (R, ΣO) = epilogue(x Wᵀ), with x (R, K) brought to int8 row by row: the results of several weights side by side.
pub fn product<T: Float, E: Epilogue<T>>(y: &mut [T], x: &[T], weights: &[Arc<Int8Rhs>], epilogue: &E) -> Result<()> {
    ensure!(!weights.iter().any(|w| w.is_table()), Internal, "int8: a table was not packed for a product");
    let w = Group::of(weights)?;
    let (depth, outputs) = (w.depth, w.outputs);
    let rows = y.len().checked_div(outputs).unwrap_or(0);
    ensure!(
        x.len() == rows * depth && y.len() == rows * outputs,
        Shape,
        "int8: {} numbers of x and {} of y do not fit weights of {outputs} x {depth}",
        x.len(),
        y.len()
    );
    epilogue.check(outputs)?;
    if rows == 0 {
        return Ok(());
    }
    let work = rows.max(LEAST_ROWS).saturating_mul(outputs).saturating_mul(depth);
    if work < SERIAL_BELOW {
        return multiply(y, x, w, epilogue, 1);
    }
    threads::section(None, || multiply(y, x, w, epilogue, threads::num_threads()))
}

fn multiply<T: Float, E: Epilogue<T>>(y: &mut [T], x: &[T], w: Group<'_>, epilogue: &E, workers: usize) -> Result<()> {
    let Group { bytes, depth, outputs, .. } = w;
    let rows = y.len() / outputs;
    let stride = bytes.depth(depth);
    // For each row its bytes, its scale and the sum of its bytes, in memory for f32.
    stash::with::<f32, _>(rows * (stride / 4 + 2), |memory| {
        let (memory, scales) = memory.split_at_mut(rows * (stride / 4 + 1));
        let (q, sums) = memory.split_at_mut(rows * (stride / 4));
        // SAFETY: any bits are bytes and any bits are an i32; size and alignment fit, and nobody else has them.
        let q = unsafe { std::slice::from_raw_parts_mut(q.as_mut_ptr().cast::<i8>(), rows * stride) };
        // SAFETY: as above.
        let sums = unsafe { std::slice::from_raw_parts_mut(sums.as_mut_ptr().cast::<i32>(), rows) };
        quantize_rows(q, scales, sums, x, depth, stride, workers)?;

        let (far, out) = (size_of_val(y) > NEAR_BYTES, Out::new(y, outputs));
        let tasks = tasks(rows, w.panels(), depth, workers);
        let x = Rows { q, stride, sums, scales };
        let task = |index: usize| {
            let (rows, panels) = tasks.block(index);
            let Neighbours { first, then } = tasks.neighbours(index, workers);
            SCRATCH.with_borrow_mut(|scratch| {
                for (i, part) in w.parts(panels.clone()).enumerate() {
                    let cold = first && i == 0;
                    let next = if part.end < panels.end { Some(part.end) } else { then };
                    let next = next.map(|next| w.start(next));
                    block(bytes, scratch, &out, far, x, &part, epilogue, rows.clone(), cold, next);
                }
            });
        };
        run(tasks.count(), workers, task)
    })
}

/// Weights whose outputs stand side by side. Their panels are counted through.
#[derive(Clone, Copy)]
struct Group<'a> {
    weights: &'a [Arc<Int8Rhs>],
    bytes: Bytes,
    outputs: usize,
    depth: usize,
}

/// Some panels of one of them.
struct Part<'a> {
    w: &'a Int8Rhs,
    panels: Range<usize>,
    /// The one behind them, as all are counted.
    end: usize,
    /// The column of y of the weight's first output.
    column: usize,
}

impl<'a> Group<'a> {
    fn of(weights: &'a [Arc<Int8Rhs>]) -> Result<Self> {
        let (bytes, depth) = weights.first().map_or((Bytes::Portable, 0), |w| (w.bytes, w.depth));
        let fits = weights.iter().all(|w| (w.bytes, w.depth) == (bytes, depth));
        ensure!(fits, Shape, "int8: weights that stand side by side have one depth");
        Ok(Group { weights, bytes, outputs: weights.iter().map(|w| w.outputs).sum(), depth })
    }

    fn panels(self) -> usize {
        self.weights.iter().map(|w| w.panels()).sum()
    }

    /// Some panels, weight by weight.
    fn parts(self, panels: Range<usize>) -> impl Iterator<Item = Part<'a>> {
        let (mut first, mut column) = (0, 0);
        self.weights.iter().filter_map(move |w| {
            let (here, of_w) = (first..first + w.panels(), column);
            (first, column) = (here.end, column + w.outputs);
            let (start, end) = (panels.start.max(here.start), panels.end.min(here.end));
            (start < end).then(|| Part { w, panels: start - here.start..end - here.start, end, column: of_w })
        })
    }

    /// Where a panel begins.
    fn start(self, panel: usize) -> *const u8 {
        self.parts(panel..panel + 1).next().map_or(std::ptr::null(), |part| part.w.start(part.panels.start))
    }
}

/// The rows of x as bytes.
#[derive(Clone, Copy)]
struct Rows<'a> {
    q: &'a [i8],
    stride: usize,
    sums: &'a [i32],
    scales: &'a [f32],
}

/// Some eight tasks for each worker, none too small. Columns are panels.
fn tasks(rows: usize, panels: usize, depth: usize, workers: usize) -> Tasks {
    let row_parts = rows.div_ceil(TASK_ROWS.max(TASK_BYTES / depth.max(1)));
    let shared_out = workers > 1 && rows >= THREAD_ROWS * workers;
    let row_parts = if shared_out { row_parts.next_multiple_of(workers) } else { row_parts };
    let least = rows / row_parts; // rows of a task, about
    let at_least = TASK.div_ceil((least.max(LEAST_ROWS) * depth.max(1) * PANEL).max(1));
    let wanted = match workers {
        1 => panels,
        _ => panels.div_ceil((8 * workers).div_ceil(row_parts)),
    };
    // Not whole tiles: tiles of equal height take what is left.
    let by_row = Cut::new(rows, 4, row_parts);
    Tasks::new(by_row, Cut::new(panels, 1, panels.div_ceil(wanted.max(at_least))), workers)
}

thread_local! {
    /// What tiles leave on the way to y; to zero it for each task takes as long as a small tile.
    static SCRATCH: RefCell<(Products, Sums)> = const { RefCell::new((Products::ZERO, Sums::ZERO)) };
}

/// Some rows times some panels. `far`: y does not fit into the L2 cache. `cold`: nobody asked for the first of the panels;
/// `after` them, if it is known, another will be needed.
fn block<T: Float, E: Epilogue<T>>(
    bytes: Bytes,
    (products, sums): &mut (Products, Sums),
    out: &Out<'_, T>,
    far: bool,
    x: Rows<'_>,
    part: &Part<'_>,
    epilogue: &E,
    rows: Range<usize>,
    cold: bool,
    after: Option<*const u8>,
) {
    let Part { w, ref panels, column: first_column, .. } = *part;
    let mut multiplier = Multiplier::new(bytes, sums);
    let tile_rows = bytes.tile_rows(rows.len());
    let steps = x.stride / STEP;
    // Panels come from memory while those before them are multiplied, each tile of rows asking for its share: also those of
    // the next task. The very first ones, and all that are read once only, just ahead of their use.
    let tiles = rows.len().div_ceil(tile_rows);
    let share = STEP_BYTES.div_ceil(tiles.max(1));
    for group in panels.clone().step_by(WIDTH / PANEL) {
        let group = group..panels.end.min(group + WIDTH / PANEL);
        let next = if group.end < panels.end { Some(w.start(group.end)) } else { after };
        let cold = tiles == 1 || (cold && group.start == panels.start);
        let (mut row, mut asked) = (rows.start, 0);
        while row < rows.end {
            let left = rows.end - row;
            // Two tiles of equal height, no thin one.
            let height = if left > tile_rows && left < 2 * tile_rows { left.div_ceil(2) } else { left.min(tile_rows) };
            let (ahead, ahead_step) = match next {
                _ if cold && row == rows.start => (w.start(group.start).wrapping_add(AHEAD * STEP_BYTES), STEP_BYTES),
                Some(next) => (next.wrapping_add(asked), share),
                None => (w.start(group.start), 0),
            };
            asked += share * steps;
            for (place, panel) in group.clone().enumerate() {
                if far {
                    prefetch_rows(out, row..row + height, first_column + panel * PANEL);
                }
                let operands = Operands {
                    steps,
                    x: &x.q[row * x.stride..(row + height) * x.stride],
                    stride: x.stride,
                    sums: &x.sums[row..row + height],
                    x_scales: &x.scales[row..row + height],
                    w: w.panel(panel),
                    w_scales: &w.scales.as_chunks().0[panel],
                    ahead: ahead.wrapping_add(place * steps * STEP_BYTES),
                    ahead_step,
                };
                multiplier.tile(&mut products.0[place * PANEL..], operands);
            }
            let column = first_column + group.start * PANEL;
            let columns = (group.len() * PANEL).min(w.outputs - group.start * PANEL);
            // SAFETY: this task alone has these columns of its rows.
            let y = unsafe { out.part(row..row + height, column..column + columns) };
            T::dispatch(Finish { products, y, row, column, epilogue });
            row += height;
        }
    }
}

/// Asks for the place of a tile in y, which is written when it has been multiplied. (Addresses past the end are harmless.)
fn prefetch_rows<T>(y: &Out<'_, T>, rows: Range<usize>, column: usize) {
    for row in rows {
        for column in (column..column + PANEL).step_by(LINE / size_of::<T>()) {
            prefetch(y.address(row, column));
        }
    }
}

/// Products to their places, which begin at this row and column, and the epilogue.
struct Finish<'a, T, E> {
    products: &'a Products,
    y: Out<'a, T>,
    row: usize,
    column: usize,
    epilogue: &'a E,
}

impl<T: Float, E: Epilogue<T>> Kernel<T> for Finish<'_, T, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let Finish { products, mut y, row, column, epilogue } = self;
        for (i, products) in (0..y.rows).zip(products.0.as_chunks::<WIDTH>().0) {
            epilogue.finish_from(
                s,
                row + i,
                column,
                y.row(i),
                #[inline(always)]
                |i, _| {
                    let products = &products[i..][..S::LANES];
                    let mut numbers = [T::ZERO; MAX_LANES];
                    for (number, &product) in numbers.iter_mut().zip(products) {
                        *number = T::from_f64(f64::from(product));
                    }
                    s.load(&numbers)
                },
            );
        }
    }
}

/// x Wᵀ as [`product`] defines it, in plain loops: `q` and scales of both sides.
pub fn product_reference(x: (&[i8], &[f32]), w: (&[i8], &[f32]), depth: usize) -> Vec<f32> {
    let mut y = Vec::new();
    for (x, &x_scale) in x.0.chunks(depth).zip(x.1) {
        for (w, &w_scale) in w.0.chunks(depth).zip(w.1) {
            let sum: i32 = x.iter().zip(w).map(|(&x, &w)| i32::from(x) * i32::from(w)).sum();
            y.push(sum as f32 * (x_scale * w_scale));
        }
    }
    y
}
