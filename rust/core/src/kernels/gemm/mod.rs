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
pub(super) mod stash;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tiled;

#[cfg(test)]
mod tests;

pub use super::Beta;
pub use bf16::{Bf16Rhs, product_bf16};
pub use epilogue::{Activation, Affine, Epilogue, Identity, NoEpilogue};
pub use form::Precision;
pub use mat::{Mat, MatMut};

use std::marker::PhantomData;
use std::ops::Range;

use crate::error::Result;
use crate::simd::{Buffer, Float};
use crate::{ensure, kernel, threads};
use form::{Exact, Form, Pairs, Rounded};
use left::Left;
use pack::panel_len;
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
/// Fewer rows than this take as long: B has to come from memory.
const LEAST_ROWS: usize = 8;
/// A task has at least so many multiply-adds: some ten microseconds.
const TASK: usize = 1 << 18;
/// Rows and columns of a task at most: its part of A and of C stay in the L2 cache.
const TASK_ROWS: usize = 96;
const TASK_COLS: usize = 512;
/// Numbers of A that a task may have at a time where B comes from memory: 256 KiB of f32.
const TASK_A: usize = 1 << 16;
/// Numbers of B packed at a time, a MiB of f32, which stay in the L2 cache, and columns of it; the same for A,
/// whose slab is read once for each slab of B.
const SLAB_B: usize = 1 << 18;
const SLAB_COLS: usize = 512;
const SLAB_A: usize = 1 << 19;
const SLAB_ROWS: usize = 2048;
const GAP: usize = 16;
/// With fewer rows than this, or so few numbers that they fit the L1 cache, B is read where it lies, if its rows are
/// contiguous: packing costs as much as a few rows.
const PACK_FROM_ROWS: usize = 24;
const PACK_FROM: usize = 4096;
/// The same goes for a factor of which every number is used so few times, if its steps along K are so near each other that a
/// block of them does not fall on few sets of the caches.
const FEW: usize = 512;
const NEAR: usize = 512;

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

    let (tile_rows, tile_cols) = tile_shape::<T>();
    let left = Left::of::<T, F>(&a, n, tile_rows);
    let pack_a = left != Left::InPlace;
    let few = m < PACK_FROM_ROWS || depth * n <= PACK_FROM;
    let in_place = |b: &Mat<T>| b.col_stride == 1 && (few || (m <= FEW && b.row_stride <= NEAR));
    let pack_b = matches!(b, Rhs::Plain(b) if !F::IN_PLACE || !in_place(&b));

    // From here on, steps along K are counted in units of the form.
    let units = F::units(depth);
    let steps = |units: &Range<usize>| units.start * F::STEPS..depth.min(units.end * F::STEPS);
    // Slabs: what is packed at a time.
    let slab_rows = if pack_a { m.min(SLAB_ROWS) } else { m };
    let slab_cols = if pack_b { n.min(SLAB_COLS) } else { n };
    let deepest =
        |pack: bool, numbers: usize, width: usize| if pack { (numbers / width / KC * KC).max(KC) } else { units };
    let slab_depth = units.min(deepest(pack_a, SLAB_A, slab_rows)).min(deepest(pack_b, SLAB_B, slab_cols));
    let a_len = if pack_a { slab_rows.div_ceil(tile_rows) * left.strides(&a, slab_depth, tile_rows).tile } else { 0 };
    let b_len = if pack_b { slab_cols.div_ceil(tile_cols) * panel_len(slab_depth, tile_cols) } else { 0 };

    let out = Output { data: c.data.as_mut_ptr(), row_stride: c.row_stride, borrow: PhantomData };
    stash::with(b_len + a_len, |workspace| {
        let (b_packed, a_packed) = workspace.split_at_mut(b_len);
        let a_packed = Output { data: a_packed.as_mut_ptr(), row_stride: 0, borrow: PhantomData };
        for rows in blocks(m, slab_rows) {
            for ks in blocks(units, slab_depth) {
                let part = a.block(rows.clone(), steps(&ks));
                let strides = left.strides(&a, ks.len(), tile_rows);
                // Some of its rows, whole tiles of them.
                let pack_part = |rows: Range<usize>| {
                    let (first, tiles) = (rows.start / tile_rows, rows.len().div_ceil(tile_rows));
                    // SAFETY: the place of these rows, which nobody else packs.
                    let to = unsafe { a_packed.part(first * strides.tile, tiles * strides.tile) };
                    left.pack::<T, F>(to, part.block(rows, 0..part.shape().1), strides);
                };
                for cols in blocks(n, slab_cols) {
                    let (b_from, b_k, b_panel) = match b {
                        Rhs::Packed(b) => {
                            (b.panels[ks.start * tile_cols..].as_ptr(), tile_cols, panel_len(depth, tile_cols))
                        }
                        Rhs::Bf16(b) => {
                            let (panels, row) = b.panels();
                            (panels[ks.start * row..].as_ptr(), row, panel_len(depth, row))
                        }
                        Rhs::Plain(b) if pack_b => {
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
                        a: if pack_a { a_packed.data } else { part.data.as_ptr() },
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
                    let grid =
                        Grid::new(rows.len(), cols.len(), ks.len(), workers, (tile_rows, tile_cols), from_memory);
                    // Packed for the first columns, A serves all. A task that has all of them packs its own rows, which then are in
                    // its cache; else they are packed before.
                    let packs = pack_a && cols.start == 0;
                    let in_tasks = packs && grid.across() == 1;
                    if packs && !in_tasks {
                        let some = (threads::GRAIN / (ks.len() * tile_rows).max(1)).clamp(1, 16) * tile_rows;
                        let pack = |i: usize| pack_part(i * some..rows.len().min((i + 1) * some));
                        run(rows.len().div_ceil(some), workers, pack)?;
                    }
                    let last = ks.end == units && E::ACTIVE;
                    let task = |index| {
                        let (r, c) = grid.block(index);
                        if in_tasks {
                            pack_part(r.clone());
                        }
                        let neighbours = Neighbours::of(index, grid.tasks(), workers, |next| grid.block(next).1.start);
                        multiply::<T, F::Packed>(slab, r.clone(), c.clone(), neighbours);
                        if last {
                            finish(epilogue, out, shift(r, rows.start), shift(c, cols.start));
                        }
                    };
                    run(grid.tasks(), workers, task)?;
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
    epilogue.check(m, n)?;
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

fn run(tasks: usize, workers: usize, task: impl Fn(usize) + Sync) -> Result<()> {
    if workers > 1 {
        return threads::parallel(tasks, task);
    }
    (0..tasks).for_each(task);
    Ok(())
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
    let (depth, cols) = b.shape();
    if depth == 0 || cols == 0 {
        return Ok(());
    }
    let group = (threads::GRAIN / (depth * width)).clamp(1, 16);
    let parts = dst.chunks_mut(group * panel_len(F::units(depth), width));
    let group = group * width;
    let parts = parts.zip((0..cols).step_by(group)).map(|(part, from)| (part, from..cols.min(from + group)));
    each(parts, workers, |(part, range)| {
        if let Ok(b) = b.columns(range) {
            pack::pack_panels::<T, F>(part, b, width);
        }
    })
}

fn each<I>(items: I, workers: usize, task: impl Fn(I::Item) + Sync) -> Result<()>
where
    I: ExactSizeIterator,
    I::Item: Send,
{
    if workers > 1 {
        return threads::for_each(items, task);
    }
    items.for_each(task);
    Ok(())
}

/// How the rows and columns of a slab are cut into tasks.
#[derive(Clone, Copy)]
struct Grid {
    rows: usize,
    cols: usize,
    row_block: usize,
    col_block: usize,
}

impl Grid {
    /// About eight tasks per worker, or four, none too small. No bit depends on it.
    fn new(rows: usize, cols: usize, depth: usize, workers: usize, tile: (usize, usize), from_memory: bool) -> Self {
        // Where there are rows for all, tasks are thin and wide: each row of A is read by few of them. Where B comes from memory
        // it is to come once.
        let most = if workers > 1 && rows >= 8 * workers * TASK_ROWS / 2 {
            TASK_ROWS / 2
        } else if from_memory {
            TASK_ROWS.max(TASK_A / depth.clamp(1, KC))
        } else {
            TASK_ROWS
        };
        let row_blocks = rows.div_ceil(most);
        let row_block = rows.div_ceil(row_blocks).next_multiple_of(tile.0);
        let at_once = tile::shape(rows.min(row_block), tile.0).1 * tile.1;
        let at_least = (TASK / (row_block.min(rows).max(LEAST_ROWS) * depth.max(1)).max(1)).max(1);
        // The first panels of a task are waited for where they come from memory.
        let tasks = if from_memory { 4 } else { 8 } * workers;
        let wanted = if workers == 1 { cols } else { cols.div_ceil(tasks.div_ceil(row_blocks)) };
        let col_block = wanted.max(at_least).min(TASK_COLS).next_multiple_of(at_once);
        Grid { rows, cols, row_block, col_block }
    }

    /// Blocks side by side.
    fn across(&self) -> usize {
        self.cols.div_ceil(self.col_block)
    }

    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.row_block) * self.across()
    }

    /// Neighbouring tasks share their rows, which then are in the L2 cache already.
    fn block(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let across = self.across();
        let (row, col) = (index / across * self.row_block, index % across * self.col_block);
        (row..self.rows.min(row + self.row_block), col..self.cols.min(col + self.col_block))
    }
}

/// C, or A's packed rows, shared by tasks that write different elements of it.
#[derive(Clone, Copy)]
struct Output<'a, T> {
    data: *mut T,
    row_stride: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T> Output<'a, T> {
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

/// What a task knows of those that its thread has before and after it.
#[derive(Clone, Copy)]
pub(super) struct Neighbours {
    /// There was none before it: nobody asked for its first panels.
    pub first: bool,
    /// The first column, or panel, of the one after it, if there is one.
    pub then: Option<usize>,
}

impl Neighbours {
    /// Those of task `index`; `start` gives where a task begins.
    pub fn of(index: usize, tasks: usize, workers: usize, start: impl Fn(usize) -> usize) -> Self {
        let share = threads::share_of(index, tasks, workers);
        Neighbours { first: index == share.start, then: (index + 1 < share.end).then(|| start(index + 1)) }
    }
}

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
