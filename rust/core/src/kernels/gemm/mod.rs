//! The matrix product: C = [C +] A · B, the kernel that most of the time is spent in.
//!
//! **Same bits.** Every element of C is one chain of multiply-adds along K, in order, from +0 (or from C, where the product
//! is added). Tiles, blocks, packing, strides, the number of rows and of threads decide when a step is made, never in which
//! order: a later block along K starts from what the earlier one left in C. So a row's result is the same alone, in a
//! batch, and on any number of threads; only the path of [`simd`](crate::simd) (fused or not) is part of it.
//!
//! **Speed.** One micro-kernel (`tile`) holds a tile of C in registers and reads B from panels in the order of use: packed
//! once for inference ([`PackedRhs`]), per call otherwise, or not at all where there are too few rows to make up for it.
//! A is read where it lies, or packed where that is faster (`left`). Tasks are blocks of C that fit the L2 cache; skinny
//! products are cut by columns alone.

mod bf16;
mod epilogue;
mod form;
mod left;
mod mat;
mod pack;
mod plan;
pub(super) mod stash;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tiled;

#[cfg(test)]
mod tests;

pub use super::Beta;
pub use bf16::{Bf16Rhs, product_bf16};
pub use epilogue::{Affine, Epilogue, NoEpilogue};
pub use form::Precision;
pub use mat::{Mat, MatMut};

use std::marker::PhantomData;
use std::ops::Range;

use super::grid::{LEAST_ROWS, Neighbours, Tasks, run};
use crate::error::Result;
use crate::simd::{Buffer, Float};
use crate::{ensure, kernel, threads};
use form::{Exact, Form, Pairs, Rounded};
use left::Left;
use pack::panel_len;
use plan::Plan;
use tile::{KC, Operands};

pub(super) use tile::opaque;

/// The right factor.
#[derive(Debug, Clone, Copy)]
pub enum Rhs<'a, T> {
    /// As it lies in memory.
    Plain(Mat<'a, T>),
    /// Packed before.
    Packed(&'a PackedRhs<T>),
    /// Kept in bf16 and multiplied in f32, by [`product_bf16`] alone.
    Bf16(&'a Bf16Rhs<T>),
}

impl<'a, T> From<Mat<'a, T>> for Rhs<'a, T> {
    fn from(b: Mat<'a, T>) -> Self {
        Rhs::Plain(b)
    }
}

impl<'a, T> From<&'a PackedRhs<T>> for Rhs<'a, T> {
    fn from(b: &'a PackedRhs<T>) -> Self {
        Rhs::Packed(b)
    }
}

impl<T: Float> Rhs<'_, T> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Rhs::Plain(b) => b.shape(),
            Rhs::Packed(b) => (b.rows, b.cols),
            Rhs::Bf16(b) => (b.depth, b.outputs),
        }
    }
}

/// A right factor in the order in which products read it, for weights that are used many times.
#[derive(Debug)]
pub struct PackedRhs<T> {
    panels: Buffer<T>,
    rows: usize,
    cols: usize,
}

impl<T: Float> PackedRhs<T> {
    /// Packs `b`; the product's bits stay the same.
    pub fn new(b: Mat<T>) -> Result<Self> {
        let width = tile_shape::<T>().1;
        let (rows, cols) = b.shape();
        let mut panels = Buffer::zeroed(cols.div_ceil(width).saturating_mul(panel_len(rows, width)))?;
        pack_panels::<T, Exact>(&mut panels, b, width, threads::num_threads())?;
        Ok(PackedRhs { panels, rows, cols })
    }
}

/// Below this number of multiply-adds a product runs on the calling thread.
const SERIAL_BELOW: usize = 1 << 20;
/// C = [C +] A · B, then the epilogue; on all threads where it pays.
pub fn gemm<'a, T: Float, E: Epilogue<T>>(
    c: MatMut<T>,
    a: Mat<T>,
    b: impl Into<Rhs<'a, T>>,
    beta: Beta,
    epilogue: &E,
) -> Result<()> {
    gemm_with(Precision::Full, c, a, b, beta, epilogue)
}

/// The same with factors of this precision. A factor packed before is multiplied as it is, at full precision.
pub fn gemm_with<'a, T: Float, E: Epilogue<T>>(
    precision: Precision,
    c: MatMut<T>,
    a: Mat<T>,
    b: impl Into<Rhs<'a, T>>,
    beta: Beta,
    epilogue: &E,
) -> Result<()> {
    let b = b.into();
    let empty = c.rows == 0 || c.cols == 0 || a.cols == 0;
    spread((c.rows, c.cols, a.cols), |workers| match (precision, b) {
        (Precision::Full, _) | (_, Rhs::Packed(_)) => product::<T, E, Exact>(c, a, b, beta, epilogue, workers),
        #[cfg(target_arch = "x86_64")]
        (Precision::Bf16, Rhs::Plain(b)) if form::tiles::<T>() && !empty => {
            tiled::product(c, a, b, beta, epilogue, workers)
        }
        (Precision::Bf16, _) if form::pairs::<T>() => product::<T, E, Pairs<1>>(c, a, b, beta, epilogue, workers),
        (Precision::Bf16, _) => product::<T, E, Rounded>(c, a, b, beta, epilogue, workers),
    })
}

/// Runs a product of this size with as many workers as it is worth.
fn spread((rows, cols, depth): (usize, usize, usize), run: impl FnOnce(usize) -> Result<()>) -> Result<()> {
    let work = rows.max(LEAST_ROWS).saturating_mul(cols).saturating_mul(depth);
    if work < SERIAL_BELOW {
        return run(1);
    }
    // One section for all regions of the product, if the caller has none.
    threads::section(None, || run(threads::num_threads()))
}

/// The same as [`gemm`], bit for bit, on the calling thread alone: for use inside tasks.
pub fn gemm_serial<'a, T: Float, E: Epilogue<T>>(
    c: MatMut<T>,
    a: Mat<T>,
    b: impl Into<Rhs<'a, T>>,
    beta: Beta,
    epilogue: &E,
) -> Result<()> {
    product::<T, E, Exact>(c, a, b.into(), beta, epilogue, 1)
}

fn product<T: Float, E: Epilogue<T>, F: Form>(
    c: MatMut<T>,
    a: Mat<T>,
    b: Rhs<T>,
    beta: Beta,
    epilogue: &E,
    workers: usize,
) -> Result<()> {
    let (m, n, depth) = check(&c, &a, b.shape(), epilogue)?;
    ensure!(matches!(b, Rhs::Bf16(_)) == F::WIDENS, Internal, "gemm: `product_bf16` alone reads what is kept in bf16");
    if m == 0 || n == 0 {
        return Ok(());
    }

    let plan = Plan::of::<T, F>(&a, &b, tile_shape::<T>());
    let (tile_rows, tile_cols) = plan.tile;
    let (a_len, b_len) = plan.packed_len(&a);
    let units = F::units(depth);
    let steps = |units: &Range<usize>| units.start * F::STEPS..depth.min(units.end * F::STEPS);

    let out = Output { data: c.data.as_mut_ptr(), row_stride: c.row_stride, borrow: PhantomData };
    stash::with(b_len + a_len, |workspace| {
        let (b_packed, a_packed) = workspace.split_at_mut(b_len);
        for rows in blocks(m, plan.rows) {
            for ks in blocks(units, plan.depth) {
                let part = a.block(rows.clone(), steps(&ks));
                let strides = plan.left.strides(&a, ks.len(), tile_rows);
                if plan.left == Left::Panels {
                    // Threads pack the rows that they will multiply. (Of pairs, half the bytes, it is better to read one's own.)
                    let shares = if F::STEPS == 1 { workers } else { 1 };
                    pack_shares::<T, F>(a_packed, part.t(), tile_rows, shares, workers)?;
                }
                let a_rows = Output { data: a_packed.as_mut_ptr(), row_stride: strides.row, borrow: PhantomData };
                let pack_rows = |rows: Range<usize>| {
                    // SAFETY: the place of these rows, which nobody else packs.
                    let to = unsafe { a_rows.part(rows.start * strides.row, rows.len() * strides.row) };
                    pack::pack_rows::<T, F>(to, strides.row, part.block(rows, 0..part.shape().1));
                };
                for cols in blocks(n, plan.cols) {
                    let (b_from, b_k, b_panel) = match b {
                        Rhs::Packed(b) => {
                            (b.panels[ks.start * tile_cols..].as_ptr(), tile_cols, panel_len(depth, tile_cols))
                        }
                        Rhs::Bf16(b) => {
                            let (panels, row) = b.panels();
                            (panels[ks.start * row..].as_ptr(), row, panel_len(depth, row))
                        }
                        Rhs::Plain(b) if plan.packs_b => {
                            let b = b.rows(steps(&ks))?.columns(cols.clone())?;
                            pack_panels::<T, F>(b_packed, b, tile_cols, workers)?;
                            (b_packed.as_ptr(), tile_cols, panel_len(ks.len(), tile_cols))
                        }
                        Rhs::Plain(b) => {
                            (b.data.as_ptr().wrapping_add(ks.start * b.row_stride), b.row_stride, tile_cols)
                        }
                    };
                    let slab = Slab(Operands {
                        k: ks.len(),
                        a: if plan.packs_a() { a_rows.data } else { part.data.as_ptr() },
                        a_row: strides.row,
                        a_k: strides.k,
                        a_tile: strides.tile,
                        b: b_from,
                        b_k,
                        b_panel,
                        c: out.data.wrapping_add(rows.start * out.row_stride + cols.start),
                        c_row: out.row_stride,
                        accumulate: beta == Beta::Add || ks.start > 0,
                        ahead: b_from,
                        ahead_k: 0,
                    });
                    let from_memory = !matches!(b, Rhs::Plain(_));
                    let tasks = plan.tasks(rows.len(), cols.len(), ks.len(), workers, from_memory);
                    // Packed for the first columns, rows serve all. A task that has all of them packs its own, which then are in its
                    // cache; else they are packed before.
                    let packs = plan.left == Left::Rows && cols.start == 0;
                    let in_tasks = packs && tasks.across() == 1;
                    if packs && !in_tasks {
                        let some = (threads::GRAIN / (ks.len() * tile_rows).max(1)).clamp(1, 16) * tile_rows;
                        let pack = |i: usize| pack_rows(i * some..rows.len().min((i + 1) * some));
                        run(rows.len().div_ceil(some), workers, pack)?;
                    }
                    let last = ks.end == units && E::ACTIVE;
                    let task = |index| {
                        let (r, c) = tasks.block(index);
                        if in_tasks {
                            pack_rows(r.clone());
                        }
                        let neighbours = tasks.neighbours(index, workers);
                        multiply::<T, F::Packed>(slab, r.clone(), c.clone(), neighbours);
                        if last {
                            finish(epilogue, out, shift(r, rows.start), shift(c, cols.start));
                        }
                    };
                    run(tasks.count(), workers, task)?;
                }
            }
        }
        Ok(())
    })
}

/// Rows and columns of C and the depth, which fit each other.
fn check<T: Float, E: Epilogue<T>>(
    c: &MatMut<T>,
    a: &Mat<T>,
    (b_rows, n): (usize, usize),
    epilogue: &E,
) -> Result<(usize, usize, usize)> {
    let (m, depth) = a.shape();
    ensure!(depth == b_rows, Shape, "gemm: A is {m} x {depth}, so B needs {depth} rows; it is {b_rows} x {n}");
    ensure!((c.rows, c.cols) == (m, n), Shape, "gemm: C must be {m} x {n}, it is {} x {}", c.rows, c.cols);
    epilogue.check(n)?;
    Ok((m, n, depth))
}

/// 0..len in pieces of `step`; one empty piece if there is nothing.
fn blocks(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let step = step.max(1);
    (0..len.max(1)).step_by(step).map(move |from| from..len.min(from + step))
}

fn shift(range: Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

kernel! {
    /// Rows and columns of the register tile.
    fn tile_shape<T>(s: S;) -> (usize, usize) {
        let _ = s;
        (S::TILE_ROWS, S::TILE_VECTORS * S::LANES)
    }
}

/// Packs `b`, K x columns, into panels.
fn pack_panels<T: Float, F: Form>(dst: &mut [T], b: Mat<T>, width: usize, workers: usize) -> Result<()> {
    pack_shares::<T, F>(dst, b, width, 1, workers)
}

/// The same, columns that lie side by side in so many shares, one for each thread.
fn pack_shares<T: Float, F: Form>(dst: &mut [T], b: Mat<T>, width: usize, shares: usize, workers: usize) -> Result<()> {
    let (depth, cols) = b.shape();
    if depth == 0 || cols == 0 {
        return Ok(());
    }
    let (units, panels) = (F::units(depth), cols.div_ceil(width));
    let len = panel_len(units, width);
    assert!(dst.len() >= panels * len);
    let out = Output { data: dst.as_mut_ptr(), row_stride: len, borrow: PhantomData };
    let columns = |panels: Range<usize>| panels.start * width..cols.min(panels.end * width);
    if b.col_stride == 1 {
        // Whole rows of a share, some for each task.
        let some = (threads::GRAIN * shares / (F::STEPS * cols)).max(1).next_multiple_of(F::BLOCK);
        let tasks = units.div_ceil(some);
        return run(shares * tasks, workers, |i| {
            let (share, first) = (threads::part(panels, shares, i / tasks), i % tasks * some);
            let steps = first * F::STEPS..depth.min((first + some) * F::STEPS);
            let to = out.from(share.start * len + first * width);
            pack::pack_panels::<T, F>(to, b.block(steps, columns(share)), width);
        });
    }
    // Columns that are contiguous are turned panel by panel.
    let some = (threads::GRAIN / (depth * width)).clamp(1, 16);
    run(panels.div_ceil(some), workers, |i| {
        let part = i * some..panels.min((i + 1) * some);
        pack::pack_panels::<T, F>(out.from(part.start * len), b.block(0..depth, columns(part)), width);
    })
}

/// C, or packed rows or panels, shared by tasks that write different elements of it.
#[derive(Clone, Copy)]
struct Output<'a, T> {
    data: *mut T,
    row_stride: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T> Output<'a, T> {
    /// What begins with its number `first`.
    fn from(self, first: usize) -> Self {
        Output { data: self.data.wrapping_add(first), ..self }
    }

    /// Some of the numbers.
    /// # Safety
    /// They are inside, and nobody else has them meanwhile.
    unsafe fn part(self, from: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.wrapping_add(from), len) }
    }
}

/// The operands of one region.
#[derive(Clone, Copy)]
struct Slab<T>(Operands<T>);

// SAFETY: the pointers stand for borrows that `product` holds; tasks read A and B and write disjoint blocks of C.
unsafe impl<T: Send + Sync> Sync for Output<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Slab<T> {}

kernel! {
    /// One block of C: panel by panel of B, and for each the rows of A.
    fn multiply<T, F: Form>(s: S; slab: Slab<T>, rows: Range<usize>, cols: Range<usize>, neighbours: Neighbours) {
        if const { F::STEPS > 1 && !S::PAIRS } {
            unreachable!("`product` chose a form that this path lacks");
        }
        let Slab(slab) = slab;
        let (tile_rows, tile_cols) = (S::TILE_ROWS, S::TILE_VECTORS * S::LANES);
        let (height, at_once) = tile::shape(rows.len(), tile_rows);
        // With one tile of rows a panel is read once only: no need to keep it in the L1 cache.
        let step = if rows.len() <= height { slab.k } else { KC };
        // A panel comes from memory while the one before it is multiplied, each tile of rows asking for its share: also that of
        // the next block along K, and of the next task. The very first one, and every one that is read once only or where it lies,
        // just ahead of its use.
        let tiles = rows.len().div_ceil(height);
        let share = (at_once * slab.b_k).div_ceil(tiles.max(1));
        let even = slab.a_tile == tile_rows * slab.a_row; // a tile may begin with any row
        let packed = slab.b_panel > slab.k * slab.b_k; // else the next panel lies beside, not behind this one
        let panel = |col: usize, k: usize| slab.b.wrapping_add(col / tile_cols * slab.b_panel + k * slab.b_k);
        for ks in blocks(slab.k, step) {
            let mut col = cols.start;
            while col < cols.end {
                let left = cols.end - col;
                let panels = if left >= at_once * tile_cols { at_once } else { 1 };
                let b = panel(col, ks.start);
                let next = if left > panels * tile_cols {
                    Some(panel(col + panels * tile_cols, ks.start))
                } else if ks.end < slab.k {
                    Some(panel(cols.start, ks.end))
                } else {
                    neighbours.then.map(|col| panel(col, 0))
                };
                let cold = tiles == 1 || !packed || (neighbours.first && col == cols.start && ks.start == 0);
                // Numbers asked for by the tiles before this one; each of the panels has so many in this block along K.
                let (mut asked, each) = (0, (ks.len() * slab.b_k).max(1));
                let mut row = rows.start;
                while row < rows.end {
                    let left_rows = rows.end - row;
                    let count = if even && left_rows > height && left_rows < 2 * height {
                        left_rows.div_ceil(2) // two tiles of equal height, no thin one
                    } else {
                        left_rows.min(height)
                    };
                    let (ahead, ahead_k) = match next {
                        _ if cold && row == rows.start => (b.wrapping_add(tile::AHEAD * slab.b_k), slab.b_k),
                        Some(next) if packed => (next.wrapping_add(asked / each * slab.b_panel + asked % each), share),
                        _ if !packed => (b.wrapping_add(tile::NEXT * slab.b_k), slab.b_k),
                        _ => (b, 0),
                    };
                    asked += share * ks.len();
                    let o = Operands {
                        k: ks.len(),
                        a: slab.a.wrapping_add(
                            row / tile_rows * slab.a_tile + row % tile_rows * slab.a_row + ks.start * slab.a_k,
                        ),
                        b,
                        c: slab.c.wrapping_add(row * slab.c_row + col),
                        accumulate: slab.accumulate || ks.start > 0,
                        ahead,
                        ahead_k,
                        ..slab
                    };
                    let after = if count < left_rows { (row + count, col) } else { (rows.start, col + panels * tile_cols) };
                    tile::prefetch_c(s, slab.c.wrapping_add(after.0 * slab.c_row + after.1), slab.c_row);
                    // SAFETY: `product` checked that the views hold these rows, columns and steps; this task alone
                    // has these elements of C.
                    unsafe {
                        if left < tile_cols {
                            tile::partial::<T, S, F>(s, count, left, &o);
                        } else {
                            tile::whole::<T, S, F>(s, count, panels, &o);
                        }
                    }
                    row += count;
                }
                col += panels * tile_cols;
            }
        }
    }
}

kernel! {
    /// The epilogue on one block of C.
    fn finish<'a, T, E: Epilogue<T>>(s: S; epilogue: &'a E, out: Output<'a, T>, rows: Range<usize>, cols: Range<usize>) {
        for row in rows {
            // SAFETY: a part of a row of C that this task alone has.
            let c = unsafe { out.part(row * out.row_stride + cols.start, cols.len()) };
            epilogue.finish(s, row, cols.start, c);
        }
    }
}
