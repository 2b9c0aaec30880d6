//! The product of bf16 pairs by tiles of AMX.
//!
//! It multiplies ten times as fast as vectors of f32, so that reading and packing cost as much as the product: B is packed
//! slab by slab for all tasks, A by each task, some rows at a time, which then are multiplied while they are in the cache.

use super::form::{Form, Pairs};
use super::pack::{self, panel_len};
use super::*;
use crate::simd::amx::{self, Tiles, Units};

type Blocks = Pairs<{ amx::DEPTH }>;

/// Columns and units along K of a slab of B: 1 MiB, half of the L2 cache.
const SLAB_COLS: usize = 512;
const SLAB_DEPTH: usize = 512;
/// Rows of a task at most: its part of C stays in the L2 cache.
const TASK_ROWS: usize = 96;
/// A task has at least so many multiply-adds.
const TASK: usize = 1 << 21;

/// From one packed row of A to the next.
const A_STRIDE: usize = SLAB_DEPTH + GAP;

/// Some rows of A, packed.
#[repr(align(64))]
struct Rows<T>([T; amx::BLOCK * A_STRIDE]);

/// C = [C +] A · B, then the epilogue, for shapes that fit.
///
/// An element of C is a chain over blocks of 32 steps along K, in order; a block is summed up from +0 by one instruction.
/// Slabs begin with a block.
pub(super) fn product<T: Float, E: Epilogue<T>>(
    out: Output<T>,
    a: Mat<T>,
    b: Mat<T>,
    beta: Beta,
    epilogue: &E,
    workers: usize,
) -> Result<()> {
    let ((m, depth), n) = (a.shape(), b.cols);
    let units = Blocks::units(depth);
    let slab_cols = n.min(SLAB_COLS).next_multiple_of(amx::BLOCK);
    let slab_depth = units.min(SLAB_DEPTH);
    stash::with(slab_cols / amx::BLOCK * panel_len(slab_depth, amx::BLOCK), |b_packed| {
        for cols in blocks(n, slab_cols) {
            for ks in blocks(units, slab_depth) {
                let steps = ks.start * Blocks::STEPS..depth.min(ks.end * Blocks::STEPS);
                let (a, b) = (a.columns(steps.clone())?, b.rows(steps)?.columns(cols.clone())?);
                pack_panels::<T, Blocks>(b_packed, b, amx::BLOCK, workers)?;
                let b_packed = &*b_packed;
                let grid = grid(m, cols.len(), ks.len(), workers);
                let task = |index| {
                    let (rows, some) = grid.block(index);
                    let mut a_packed = Rows([T::ZERO; amx::BLOCK * A_STRIDE]);
                    // SAFETY: `product` chose tiles because this path has them.
                    let mut tiles = unsafe { Tiles::new() };
                    for row in rows.clone().step_by(amx::BLOCK) {
                        let rows = row..rows.end.min(row + amx::BLOCK);
                        let Ok(a) = a.rows(rows.clone()) else { return };
                        pack::pack_rows::<T, Blocks>(&mut a_packed.0, A_STRIDE, a);
                        for col in some.clone().step_by(amx::BLOCK) {
                            let operands = amx::Operands {
                                tiles: ks.len() / amx::DEPTH,
                                a: a_packed.0.as_ptr().cast(),
                                a_row: A_STRIDE,
                                b: b_packed[col / amx::BLOCK * panel_len(ks.len(), amx::BLOCK)..].as_ptr().cast(),
                                c: out.data.wrapping_add(row * out.row_stride + cols.start + col).cast(),
                                c_row: out.row_stride,
                                rows: rows.len(),
                                cols: amx::BLOCK.min(some.end - col),
                                accumulate: beta == Beta::Add || ks.start > 0,
                            };
                            // SAFETY: A and B were packed to whole tiles; this task alone has these elements of C.
                            unsafe { tiles.multiply(Units::Pairs, &operands) };
                        }
                    }
                    if ks.end == units && E::ACTIVE {
                        finish(epilogue, out, rows, shift(some, cols.start));
                    }
                };
                run(grid.tasks(), workers, task)?;
            }
        }
        Ok(())
    })
}

/// About eight tasks per worker, none too small; few of them beside each other, for each packs its rows.
fn grid(rows: usize, cols: usize, depth: usize, workers: usize) -> Grid {
    let wanted = if workers > 1 { 8 * workers } else { 1 };
    let row_block = rows.div_ceil(wanted).min(TASK_ROWS).next_multiple_of(amx::BLOCK);
    let at_least = TASK / (row_block.min(rows) * depth.max(1));
    let col_block = cols.div_ceil(wanted.div_ceil(rows.div_ceil(row_block))).max(at_least).next_multiple_of(amx::BLOCK);
    Grid { rows, cols, row_block, col_block }
}
