//! The product of bf16 pairs by tiles of AMX.
//!
//! Tiles multiply ten times as fast as vectors of f32, so that reading and packing cost as much as the product. B is packed
//! slab by slab for all tasks; a task packs its rows of A, a block at a time, and multiplies them while they are in the cache.

use super::form::{Form, Pairs};
use super::left::GAP;
use super::pack::{self, panel_len};
use super::*;
use crate::kernels::grid::Cut;
use crate::simd::amx::{BLOCK, DEPTH, Operands, Tiles, Units};

type Blocks = Pairs<DEPTH>;

/// Columns and units along K of a slab of B at most, 2 MiB, which stay in the L2 cache for the greater part.
const SLAB_COLS: usize = 1024;
const SLAB_DEPTH: usize = 512;
/// From one packed row of A to the next.
const A_STRIDE: usize = SLAB_DEPTH + GAP;
/// Rows of a task at most, and multiply-adds at least: some microseconds.
const TASK_ROWS: usize = 192;
const TASK: usize = 1 << 21;

/// A block of rows of A, packed.
#[repr(align(64))]
struct Rows<T>([T; BLOCK * A_STRIDE]);

/// C = [C +] A · B, then the epilogue, with K > 0.
///
/// An element of C is one chain along K, in order, of blocks of 32 steps that an instruction sums up from +0. Slabs begin with
/// a block, so that nothing but K decides where blocks begin.
pub(super) fn product<T: Float, E: Epilogue<T>>(
    c: MatMut<T>,
    a: Mat<T>,
    b: Mat<T>,
    beta: Beta,
    epilogue: &E,
    workers: usize,
) -> Result<()> {
    let (m, n, depth) = check(&c, &a, b.shape(), epilogue)?;
    let out = Output { data: c.data.as_mut_ptr(), row_stride: c.row_stride, borrow: PhantomData };
    let units = Blocks::units(depth);
    let (slab_cols, slab_depth) = (n.min(SLAB_COLS), units.min(SLAB_DEPTH));
    stash::with(slab_cols.div_ceil(BLOCK) * panel_len(slab_depth, BLOCK), |b_packed| {
        for slab in blocks(n, slab_cols) {
            for ks in blocks(units, slab_depth) {
                let steps = ks.start * Blocks::STEPS..depth.min(ks.end * Blocks::STEPS);
                let b = b.rows(steps.clone())?.columns(slab.clone())?;
                pack_panels::<T, Blocks>(b_packed, b, BLOCK, workers)?;
                let (b_packed, b_panel) = (&*b_packed, panel_len(ks.len(), BLOCK));
                let tasks = tasks(m, slab.len(), ks.len(), workers);
                let task = |index| {
                    let (rows, cols) = tasks.block(index);
                    let mut a_packed = Rows([T::ZERO; BLOCK * A_STRIDE]);
                    // SAFETY: whoever calls for tiles has asked `isa`.
                    let mut tiles = unsafe { Tiles::new() };
                    for row in rows.clone().step_by(BLOCK) {
                        let height = BLOCK.min(rows.end - row);
                        pack::pack_rows::<T, Blocks>(
                            &mut a_packed.0,
                            A_STRIDE,
                            a.block(row..row + height, steps.clone()),
                        );
                        for col in cols.clone().step_by(BLOCK) {
                            let operands = Operands {
                                tiles: ks.len() / DEPTH,
                                a: a_packed.0.as_ptr().cast(),
                                a_row: A_STRIDE,
                                b: b_packed[col / BLOCK * b_panel..][..b_panel].as_ptr().cast(),
                                c: out.data.wrapping_add(row * out.row_stride + slab.start + col).cast(),
                                c_row: out.row_stride,
                                rows: height,
                                cols: BLOCK.min(cols.end - col),
                                accumulate: beta == Beta::Add || ks.start > 0,
                            };
                            // SAFETY: A and B were packed to whole tiles, numbers of 4 bytes; this task alone has these
                            // elements of C, which `check` found inside.
                            unsafe { tiles.multiply(Units::Pairs, &operands) };
                        }
                    }
                    drop(tiles);
                    if ks.end == units && E::ACTIVE {
                        finish(epilogue, out, rows, shift(cols, slab.start));
                    }
                };
                run(tasks.count(), workers, task)?;
            }
        }
        Ok(())
    })
}

/// About eight tasks per worker, none too small; side by side only where there are few rows, for each packs its own. No bit
/// depends on it.
fn tasks(rows: usize, cols: usize, depth: usize, workers: usize) -> Tasks {
    let wanted = if workers == 1 { 1 } else { 8 * workers };
    let by_row = Cut::new(rows, BLOCK, wanted.max(rows.div_ceil(TASK_ROWS)));
    let least = rows / by_row.parts();
    let at_least = TASK / (least.max(1) * depth * Blocks::STEPS);
    let across = wanted.div_ceil(by_row.parts()).min(cols / at_least.max(1));
    Tasks::new(by_row, Cut::new(cols, BLOCK, across), workers)
}
