//! Products in int8: weights with a scale for each output, inputs with one for each row, found when they come.
//!
//! A number x of a row is q · s with s = max |x| / 127 and q = x / s, rounded to the nearest in [−127, 127]. Then
//! x Wᵀ = s_x s_w Σ q_x q_w, and the sum is of integers: exact, so the same on every path and in any order. A row's result
//! depends on that row alone.

mod pack;
mod quantize;

#[cfg(test)]
mod tests;

pub use pack::Int8Rhs;
pub use quantize::{Int8Matrix, quantize_rows};

use super::gemm::{Epilogue, stash};
use crate::error::Result;
use crate::simd::bytes::{Bytes, Multiplier, Operands, PANEL, Products, STEP, WIDTH};
use crate::simd::{Float, Kernel, Simd};
use crate::{ensure, threads};
use std::ops::Range;

/// The longest sum: beyond it one of 127² each could leave 32 bits.
pub const MAX_DEPTH: usize = 1 << 17;

/// Bytes of the rows of a task at most: they stay in the L2 cache, and weights pass by once for all of them.
const TASK_BYTES: usize = 256 << 10;
/// A task may have so many rows, whatever their bytes.
const TASK_ROWS: usize = 96;
/// A task has at least so many multiply-adds: some ten microseconds.
const TASK: usize = 1 << 20;
/// Below this number of multiply-adds a product runs on the calling thread.
const SERIAL_BELOW: usize = 1 << 21;
/// Fewer rows than this take as long: the weights have to come from memory.
const LEAST_ROWS: usize = 8;

/// y (R, O) = epilogue(x Wᵀ), with x (R, K) brought to int8 row by row.
pub fn product<T: Float, E: Epilogue<T>>(y: &mut [T], x: &[T], w: &Int8Rhs, epilogue: &E) -> Result<()> {
    product_by(Bytes::best(), y, x, w, epilogue)
}

fn product_by<T: Float, E: Epilogue<T>>(bytes: Bytes, y: &mut [T], x: &[T], w: &Int8Rhs, epilogue: &E) -> Result<()> {
    let (depth, outputs) = (w.depth, w.outputs);
    let rows = y.len().checked_div(outputs).unwrap_or(0);
    ensure!(
        x.len() == rows * depth && y.len() == rows * outputs,
        Shape,
        "int8: {} numbers of x and {} of y do not fit weights of {outputs} x {depth}",
        x.len(),
        y.len()
    );
    epilogue.check(rows, outputs)?;
    if rows == 0 {
        return Ok(());
    }
    let work = rows.max(LEAST_ROWS).saturating_mul(outputs).saturating_mul(depth);
    if work < SERIAL_BELOW {
        return run(bytes, y, x, w, epilogue, 1);
    }
    threads::section(None, || run(bytes, y, x, w, epilogue, threads::num_threads()))
}

fn run<T: Float, E: Epilogue<T>>(
    bytes: Bytes,
    y: &mut [T],
    x: &[T],
    w: &Int8Rhs,
    epilogue: &E,
    workers: usize,
) -> Result<()> {
    let (depth, outputs) = (w.depth, w.outputs);
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

        let out = Output(y.as_mut_ptr());
        let grid = Grid::new(rows, w.panels(), depth, workers, bytes);
        let (q, sums, scales) = (&*q, &*sums, &*scales);
        let task = |index: usize| {
            let (rows, panels) = grid.block(index);
            block(bytes, &out, Rows { q, stride, sums, scales }, w, epilogue, rows, panels);
        };
        if workers > 1 {
            return threads::parallel(grid.tasks(), task);
        }
        (0..grid.tasks()).for_each(task);
        Ok(())
    })
}

/// The rows of x as bytes.
#[derive(Clone, Copy)]
struct Rows<'a> {
    q: &'a [i8],
    stride: usize,
    sums: &'a [i32],
    scales: &'a [f32],
}

/// y, shared by tasks that write different elements of it.
struct Output<T>(*mut T);

// SAFETY: the pointer stands for a borrow that `run` holds; tasks write disjoint elements.
unsafe impl<T: Send> Sync for Output<T> {}

/// How the work is cut; no bit depends on it.
struct Grid {
    rows: usize,
    panels: usize,
    row_block: usize,
    panel_block: usize,
}

impl Grid {
    fn new(rows: usize, panels: usize, depth: usize, workers: usize, bytes: Bytes) -> Self {
        let row_blocks = rows.div_ceil(TASK_ROWS.max(TASK_BYTES / depth.max(1)));
        let row_block = rows.div_ceil(row_blocks).next_multiple_of(bytes.tile_rows(rows));
        let at_once = bytes.panels_at_once(row_block.min(rows));
        let at_least = TASK.div_ceil((row_block.min(rows).max(LEAST_ROWS) * depth.max(1) * PANEL).max(1));
        let wanted = match workers {
            1 => panels,
            _ => panels.div_ceil((8 * workers).div_ceil(row_blocks)),
        };
        Grid { rows, panels, row_block, panel_block: wanted.max(at_least).next_multiple_of(at_once).min(panels.max(1)) }
    }

    fn across(&self) -> usize {
        self.panels.div_ceil(self.panel_block)
    }

    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.row_block) * self.across()
    }

    fn block(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let (row, panel) = (index / self.across() * self.row_block, index % self.across() * self.panel_block);
        (row..self.rows.min(row + self.row_block), panel..self.panels.min(panel + self.panel_block))
    }
}

/// Some rows times some panels.
fn block<T: Float, E: Epilogue<T>>(
    bytes: Bytes,
    out: &Output<T>,
    x: Rows<'_>,
    w: &Int8Rhs,
    epilogue: &E,
    rows: Range<usize>,
    panels: Range<usize>,
) {
    let mut multiplier = Multiplier::new(bytes);
    let mut products = Products([0.0; _]);
    let tile_rows = bytes.tile_rows(rows.len());
    // The same number of panels at once for every tile: the last one may have fewer rows.
    let at_once = bytes.panels_at_once(rows.len().min(tile_rows));
    for group in panels.clone().step_by(WIDTH / PANEL) {
        let group = group..panels.end.min(group + WIDTH / PANEL);
        let mut row = rows.start;
        while row < rows.end {
            let left = rows.end - row;
            // Two tiles of equal height, no thin one.
            let height = if left > tile_rows && left < 2 * tile_rows { left.div_ceil(2) } else { left.min(tile_rows) };
            let (first, last) = (row * x.stride, (row + height) * x.stride);
            let mut panel = group.start;
            while panel < group.end {
                let count = if group.end - panel >= at_once { at_once } else { 1 };
                let operands = Operands {
                    steps: x.stride / STEP,
                    x: &x.q[first..last],
                    stride: x.stride,
                    sums: &x.sums[row..row + height],
                    x_scales: &x.scales[row..row + height],
                    w: w.panel(panel..panel + count),
                    w_scales: &w.scales[panel * PANEL..(panel + count) * PANEL],
                    panels: count,
                };
                multiplier.tile(&mut products.0[(panel - group.start) * PANEL..], operands);
                panel += count;
            }
            let column = group.start * PANEL;
            T::dispatch(Finish {
                products: &products,
                out: out.0,
                outputs: w.outputs,
                rows: row..row + height,
                column,
                columns: (group.len() * PANEL).min(w.outputs - column),
                epilogue,
            });
            row += height;
        }
    }
}

/// Products to their places, and the epilogue.
struct Finish<'a, T, E> {
    products: &'a Products,
    out: *mut T,
    outputs: usize,
    rows: Range<usize>,
    column: usize,
    columns: usize,
    epilogue: &'a E,
}

impl<T: Float, E: Epilogue<T>> Kernel<T> for Finish<'_, T, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd<T>>(self, s: S) {
        let Finish { products, out, outputs, rows, column, columns, epilogue } = self;
        for (row, products) in rows.zip(products.0.as_chunks::<WIDTH>().0) {
            // SAFETY: these columns of this row are inside y, and this task alone has them.
            let y = unsafe { std::slice::from_raw_parts_mut(out.add(row * outputs + column), columns) };
            let number = |product: f32| T::from_f64(f64::from(product));
            let (whole, rest) = y.as_chunks_mut::<PANEL>();
            let (products, last) = products.split_at(whole.len() * PANEL);
            for (y, products) in whole.iter_mut().zip(products.as_chunks::<PANEL>().0) {
                *y = products.map(number);
            }
            rest.iter_mut().zip(last).for_each(|(y, &product)| *y = number(product));
            if E::ACTIVE {
                epilogue.finish(s, row, column, y);
            }
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
