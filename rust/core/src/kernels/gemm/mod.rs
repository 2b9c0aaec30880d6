//! The matrix product: C = [C +] A · B, the kernel that most of the time is spent in.
//!
//! **Same bits.** Every element of C is one chain of multiply-adds along K, in order, from +0 (or from C, where the product
//! is added). Tiles, blocks, packing, strides, the number of rows and of threads decide when a step is made, never in which
//! order: a later block along K starts from what the earlier one left in C. So a row's result is the same alone, in a
//! batch, and on any number of threads; only the path of [`simd`](crate::simd) (fused or not) is part of it.
//!
//! **Speed.** One micro-kernel (`tile`) holds a tile of C in registers and reads B from panels in the order of use: packed
//! once for inference ([`PackedRhs`]), per call otherwise, or not at all where there are too few rows to make up for it.
//! A is read where it lies, unless it is transposed. Tasks are blocks of C that fit the L2 cache; skinny products are cut by
//! columns alone.

mod epilogue;
mod mat;
mod pack;
mod stash;
mod tile;

#[cfg(test)]
mod tests;

pub use super::Beta;
pub use epilogue::{Activation, Affine, Epilogue, Identity, NoEpilogue};
pub use mat::{Mat, MatMut};

use std::marker::PhantomData;
use std::ops::Range;

use crate::error::Result;
use crate::simd::{Buffer, Float};
use crate::{ensure, kernel, threads};
use tile::{KC, Operands};

/// The right factor.
#[derive(Debug, Clone, Copy)]
pub enum Rhs<'a, T> {
    /// As it lies in memory.
    Plain(Mat<'a, T>),
    /// Packed before.
    Packed(&'a PackedRhs<T>),
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
        let mut panels = Buffer::zeroed(cols.next_multiple_of(width).saturating_mul(rows))?;
        pack_in_parallel(&mut panels, b, width, true)?;
        Ok(PackedRhs { panels, rows, cols })
    }
}

/// Below this number of multiply-adds a product runs on the calling thread.
const SERIAL_BELOW: usize = 1 << 20;
/// A task has at least so many multiply-adds: some ten microseconds.
const TASK: usize = 1 << 18;
/// Rows and columns of a task at most: its part of A and of C stay in the L2 cache.
const TASK_ROWS: usize = 192;
const TASK_COLS: usize = 256;
/// Numbers packed at a time, 8 MiB of f32, and rows or columns of them.
const PACKED: usize = 1 << 21;
const PACKED_WIDTH: usize = 4096;
/// With fewer rows than this B is read where it lies, if its rows are contiguous: packing costs as much as a few rows.
const PACK_FROM_ROWS: usize = 24;

/// C = [C +] A · B, then the epilogue; on all threads where it pays.
pub fn gemm<'a, T: Float, E: Epilogue<T>>(
    c: MatMut<T>,
    a: Mat<T>,
    b: impl Into<Rhs<'a, T>>,
    beta: Beta,
    epilogue: &E,
) -> Result<()> {
    product(c, a, b.into(), beta, epilogue, true)
}

/// The same, bit for bit, on the calling thread alone: for use inside tasks.
pub fn gemm_serial<'a, T: Float, E: Epilogue<T>>(
    c: MatMut<T>,
    a: Mat<T>,
    b: impl Into<Rhs<'a, T>>,
    beta: Beta,
    epilogue: &E,
) -> Result<()> {
    product(c, a, b.into(), beta, epilogue, false)
}

/// Where a factor is read from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    InPlace,
    /// Panels of a `PackedRhs`.
    Ready,
    /// Packed into the workspace of this call.
    Workspace,
}

fn product<T: Float, E: Epilogue<T>>(
    c: MatMut<T>,
    a: Mat<T>,
    b: Rhs<T>,
    beta: Beta,
    epilogue: &E,
    team: bool,
) -> Result<()> {
    let (m, depth) = a.shape();
    let (b_rows, n) = b.shape();
    ensure!(depth == b_rows, Shape, "gemm: A is {m} x {depth}, so B needs {depth} rows; it is {b_rows} x {n}");
    ensure!((c.rows, c.cols) == (m, n), Shape, "gemm: C must be {m} x {n}, it is {} x {}", c.rows, c.cols);
    epilogue.check(m, n)?;
    if m == 0 || n == 0 {
        return Ok(());
    }

    let (tile_rows, tile_cols) = tile_shape::<T>();
    let work = m.saturating_mul(n).saturating_mul(depth);
    let workers = if team && work >= SERIAL_BELOW { threads::num_threads() } else { 1 };
    let a_from = if a.col_stride == 1 || m == 1 { Source::InPlace } else { Source::Workspace };
    let b_from = match b {
        Rhs::Packed(_) => Source::Ready,
        Rhs::Plain(b) if b.col_stride == 1 && m < PACK_FROM_ROWS => Source::InPlace,
        Rhs::Plain(_) => Source::Workspace,
    };

    // Slabs: what is packed at a time.
    let width = |from: Source, all: usize, tile: usize| match from {
        Source::Workspace => all.next_multiple_of(tile).min(PACKED_WIDTH / tile * tile),
        _ => 0,
    };
    let (a_width, b_width) = (width(a_from, m, tile_rows), width(b_from, n, tile_cols));
    let slab_rows = if a_width > 0 { a_width } else { m };
    let slab_cols = if b_width > 0 { b_width } else { n };
    let slab_depth = match a_width + b_width {
        0 => depth,
        width => (PACKED / width / KC * KC).clamp(KC, depth.max(KC)).min(depth),
    };

    let out = Output { data: c.data.as_mut_ptr(), row_stride: c.row_stride, borrow: PhantomData };
    stash::with((a_width + b_width) * slab_depth, |workspace| {
        let (a_panels, b_panels) = workspace.split_at_mut(a_width * slab_depth);
        for cols in blocks(n, slab_cols) {
            for ks in blocks(depth, slab_depth) {
                let mut o = Operands {
                    k: ks.len(),
                    a: a.data.as_ptr(),
                    a_row: a.row_stride,
                    a_k: a.col_stride,
                    b: b_panels.as_ptr(),
                    b_k: tile_cols,
                    b_panel: ks.len() * tile_cols,
                    c: out.data,
                    c_row: out.row_stride,
                    accumulate: beta == Beta::Add || ks.start > 0,
                };
                match b {
                    Rhs::Packed(b) => {
                        o.b = b.panels.as_ptr().wrapping_add(cols.start * depth + ks.start * tile_cols);
                        o.b_panel = depth * tile_cols;
                    }
                    Rhs::Plain(b) if b_from == Source::InPlace => {
                        o.b = b.data.as_ptr().wrapping_add(ks.start * b.row_stride + cols.start);
                        o.b_k = b.row_stride;
                        o.b_panel = tile_cols;
                    }
                    Rhs::Plain(b) => {
                        let slab = b.rows(ks.clone())?.columns(cols.clone())?;
                        pack_in_parallel(b_panels, slab, tile_cols, workers > 1)?;
                    }
                }
                for rows in blocks(m, slab_rows) {
                    let mut a_step = a.row_stride;
                    if a_from == Source::Workspace {
                        let slab = a.columns(ks.clone())?.rows(rows.clone())?;
                        pack_in_parallel(a_panels, slab.t(), tile_rows, workers > 1)?;
                        (o.a, o.a_row, o.a_k) = (a_panels.as_ptr(), 1, tile_rows);
                        // Tiles begin at multiples of `tile_rows`: row r is r · depth numbers on.
                        a_step = ks.len();
                    } else {
                        let from = rows.start * a.row_stride + ks.start * a.col_stride;
                        o.a = a.data.as_ptr().wrapping_add(from);
                    }
                    o.c = out.data.wrapping_add(rows.start * out.row_stride + cols.start);
                    let slab = Slab { o, a_step, in_place: a_from == Source::InPlace };
                    let grid = Grid::new(rows.len(), cols.len(), ks.len(), workers, (tile_rows, tile_cols));
                    let last = ks.end == depth && E::ACTIVE;
                    let task = |index| {
                        let (r, c) = grid.block(index);
                        multiply(slab, r.clone(), c.clone());
                        if last {
                            finish(epilogue, out, shift(r, rows.start), shift(c, cols.start));
                        }
                    };
                    run(grid.tasks(), workers > 1 || team, task)?;
                }
            }
        }
        Ok(())
    })
}

/// 0..len in pieces of `step`; one empty piece if there is nothing.
fn blocks(len: usize, step: usize) -> impl Iterator<Item = Range<usize>> {
    let step = step.max(1);
    (0..len.max(1)).step_by(step).map(move |from| from..len.min(from + step))
}

fn shift(range: Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}

fn run(tasks: usize, team: bool, task: impl Fn(usize) + Sync) -> Result<()> {
    if team {
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

/// Packs `src`, K x columns, into panels.
fn pack_in_parallel<T: Float>(dst: &mut [T], src: Mat<T>, width: usize, team: bool) -> Result<()> {
    let (depth, cols) = src.shape();
    let panels = cols.div_ceil(width);
    if depth == 0 || panels == 0 {
        return Ok(());
    }
    let group = (threads::GRAIN / (depth * width)).clamp(1, 16);
    let parts = dst[..panels * depth * width].chunks_mut(group * depth * width);
    let parts = parts.enumerate().map(|(i, part)| {
        let from = i * group * width;
        (part, src.columns(from..cols.min(from + group * width)))
    });
    let task = |(part, src): (&mut [T], Result<Mat<T>>)| {
        if let Ok(src) = src {
            pack::pack(part, src, width);
        }
    };
    if team {
        return threads::for_each(parts, task);
    }
    parts.for_each(task);
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
    /// About eight tasks per worker, none too small. No bit depends on it.
    fn new(rows: usize, cols: usize, depth: usize, workers: usize, tile: (usize, usize)) -> Self {
        let row_blocks = rows.div_ceil(TASK_ROWS);
        let row_block = rows.div_ceil(row_blocks).next_multiple_of(tile.0);
        let at_once = tile::panels_at_once(rows.min(row_block)) * tile.1;
        let at_least = (TASK / (row_block.min(rows) * depth.max(1)).max(1)).max(1);
        let wanted = match workers {
            1 => cols,
            _ => cols.div_ceil((8 * workers).div_ceil(row_blocks)),
        };
        let col_block = wanted.max(at_least).min(TASK_COLS).next_multiple_of(at_once);
        Grid { rows, cols, row_block, col_block }
    }

    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.row_block) * self.cols.div_ceil(self.col_block)
    }

    /// Neighbouring tasks share their rows, which then are in the L2 cache already.
    fn block(&self, index: usize) -> (Range<usize>, Range<usize>) {
        let across = self.cols.div_ceil(self.col_block);
        let (row, col) = (index / across * self.row_block, index % across * self.col_block);
        (row..self.rows.min(row + self.row_block), col..self.cols.min(col + self.col_block))
    }
}

/// C, shared by tasks that write different elements of it.
#[derive(Clone, Copy)]
struct Output<'a, T> {
    data: *mut T,
    row_stride: usize,
    borrow: PhantomData<&'a mut [T]>,
}

/// The operands of one region.
#[derive(Clone, Copy)]
struct Slab<T> {
    o: Operands<T>,
    /// From one row of A to the next, at the start of a tile.
    a_step: usize,
    in_place: bool,
}

// SAFETY: the pointers stand for borrows that `product` holds; tasks read A and B and write disjoint blocks of C.
unsafe impl<T: Send + Sync> Sync for Output<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Slab<T> {}

kernel! {
    /// One block of C: panel by panel of B, and for each the rows of A.
    fn multiply<T>(s: S; slab: Slab<T>, rows: Range<usize>, cols: Range<usize>) {
        let (tile_rows, tile_cols) = (S::TILE_ROWS, S::TILE_VECTORS * S::LANES);
        // With one tile of rows a panel is read once only: no need to keep it in the L1 cache.
        let step = if rows.len() <= tile_rows { slab.o.k } else { KC };
        let at_once = tile::panels_at_once(rows.len());
        for ks in blocks(slab.o.k, step) {
            let mut col = cols.start;
            while col < cols.end {
                let left = cols.end - col;
                let panels = if left >= at_once * tile_cols { at_once } else { 1 };
                let mut row = rows.start;
                while row < rows.end {
                    let left_rows = rows.end - row;
                    let count = if slab.in_place && left_rows > tile_rows && left_rows < 2 * tile_rows {
                        left_rows.div_ceil(2) // two tiles of equal height, no thin one
                    } else {
                        left_rows.min(tile_rows)
                    };
                    let o = Operands {
                        k: ks.len(),
                        a: slab.o.a.wrapping_add(row * slab.a_step + ks.start * slab.o.a_k),
                        b: slab.o.b.wrapping_add(col / tile_cols * slab.o.b_panel + ks.start * slab.o.b_k),
                        c: slab.o.c.wrapping_add(row * slab.o.c_row + col),
                        accumulate: slab.o.accumulate || ks.start > 0,
                        ..slab.o
                    };
                    // SAFETY: `product` checked that the views hold these rows, columns and steps; this task alone
                    // has these elements of C.
                    unsafe {
                        if left < tile_cols {
                            tile::partial(s, count, left, &o);
                        } else {
                            tile::whole(s, count, panels, &o);
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
            let c = out.data.wrapping_add(row * out.row_stride + cols.start);
            // SAFETY: a part of a row of C that this task alone has.
            let c = unsafe { std::slice::from_raw_parts_mut(c, cols.len()) };
            epilogue.finish(s, row, cols.start, c);
        }
    }
}
