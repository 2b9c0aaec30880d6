//! Products of small blocks: one micro-kernel in registers, and the panels it reads its right factor from.
//!
//! An element of the result is one chain of multiply-adds along the contracted axis, from the first term to the last,
//! whatever the sizes of the blocks. Where the right factor holds an infinity or NaN, terms whose left factor is zero are
//! left out, so that a key which is not kept cannot leak; elsewhere they are added, which changes at most the sign of a
//! zero.

use super::Out;
use crate::kernel;
use crate::simd::{Float, MAX_LANES, Simd};

/// The left factor, read through two strides: element (i, p) is `data[i * row + p * col]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

/// The right factor, `rows` by `cols`, as `pack` laid it out: panels of two vectors of columns, row after row; where a
/// last panel needs only one vector it is that narrow.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    /// No infinity and no NaN inside.
    finite: bool,
}

/// Room for the panels of a `rows` by `cols` matrix on every instruction set.
pub(super) fn panels_len(rows: usize, cols: usize) -> usize {
    rows * cols.next_multiple_of(MAX_LANES)
}

/// What the chains of a product begin with.
#[derive(Clone, Copy)]
pub(super) enum Start<'a, T> {
    /// +0
    Zero,
    /// What stands in C.
    Sum,
    /// What stands in C, each row times its factor.
    Scaled(&'a [T]),
}

/// Lays out `rows` rows of `cols` numbers, `stride` apart in `from`.
pub(super) fn pack<'a, T: Float>(
    to: &'a mut [T],
    from: &[T],
    stride: usize,
    rows: usize,
    cols: usize,
) -> Panels<'a, T> {
    let finite = pack_rows(to, from, stride, rows, cols);
    Panels { data: to, rows, cols, finite }
}

/// The same of the transposed matrix: the panels have `cols` rows and `rows` columns.
pub(super) fn pack_transposed<'a, T: Float>(
    to: &'a mut [T],
    from: &[T],
    stride: usize,
    rows: usize,
    cols: usize,
) -> Panels<'a, T> {
    pack_columns(to, from, stride, rows, cols);
    // Each column belongs to one key: it makes scores that the mask overwrites.
    Panels { data: to, rows: cols, cols: rows, finite: true }
}

/// Width of the panel that begins at column `c` of `cols`.
#[inline(always)]
fn panel_width<T: Float, S: Simd<T>>(cols: usize, c: usize) -> usize {
    if cols - c > S::LANES { 2 * S::LANES } else { S::LANES }
}

kernel! {
    fn pack_rows<'a, T>(s: S; to: &'a mut [T], from: &'a [T], stride: usize, rows: usize, cols: usize) -> bool {
        // Stays 0 while all numbers are finite.
        let mut check = s.zero();
        for r in 0..rows {
            let row = &from[r * stride..][..cols];
            for (c, x) in (0..cols).step_by(S::LANES).zip(row.chunks(S::LANES)) {
                let panel = c - c % (2 * S::LANES);
                let at = panel * rows + r * panel_width::<T, S>(cols, panel) + (c - panel);
                let x = s.load_first(x, T::ZERO);
                check = s.mul_add(x, s.zero(), check);
                s.store(x, &mut to[at..]);
            }
        }
        !s.any(s.not(s.eq(check, s.zero())))
    }
}

kernel! {
    fn pack_columns<'a, T>(s: S; to: &'a mut [T], from: &'a [T], stride: usize, rows: usize, cols: usize) {
        for c in (0..rows).step_by(S::LANES) {
            let panel = c - c % (2 * S::LANES);
            let width = panel_width::<T, S>(rows, panel);
            let to = &mut to[panel * cols + (c - panel)..];
            let lanes = S::LANES.min(rows - c);
            assert!(cols == 0 || (c + lanes - 1) * stride + cols <= from.len());
            let from = from[c * stride..].as_ptr();
            let mut done = 0;
            if lanes == S::LANES && cols >= S::LANES {
                done = cols / S::LANES * S::LANES;
                assert!((done - 1) * width + S::LANES <= to.len());
                for r in (0..done).step_by(S::LANES) {
                    // SAFETY: whole squares, inside by the assertions.
                    unsafe { s.transpose_ptr(from.add(r), stride, to.as_mut_ptr().add(r * width), width) };
                }
            }
            for r in done..cols {
                let mut column = [T::ZERO; MAX_LANES];
                for (lane, x) in column[..lanes].iter_mut().enumerate() {
                    // SAFETY: row c + lane and column r, inside by the assertion.
                    *x = unsafe { *from.add(lane * stride + r) };
                }
                s.store(s.load(&column), &mut to[r * width..]);
            }
        }
    }
}

/// Rows of C that the micro-kernel keeps in registers.
const ROWS: usize = 6;

kernel! {
    /// C (m, n) = start + A (m, k) B (k, n). B may have more rows and columns than are used. C is written in whole
    /// vectors as far as its columns reach.
    pub(super) fn product<'a, T>(s: S; c: Out<'a, T>, a: Left<'a, T>, b: Panels<'a, T>, m: usize, n: usize, k: usize, start: Start<'a, T>) {
        if m == 0 || n == 0 {
            return;
        }
        assert!(m <= c.rows && n <= c.cols && n <= b.cols && k <= b.rows);
        assert!(k == 0 || (m - 1) * a.row + (k - 1) * a.col < a.data.len());
        assert!(b.rows * b.cols.next_multiple_of(S::LANES) <= b.data.len());
        let rows = if b.finite { ROWS } else { 1 };
        for panel in (0..n).step_by(2 * S::LANES) {
            for i in (0..m).step_by(rows) {
                // SAFETY: by the assertions row i of A and of C exist, and so does the panel of B.
                let tile = unsafe {
                    Tile {
                        a: (a.data.as_ptr().add(i * a.row), a.row, a.col),
                        b: (b.data.as_ptr().add(panel * b.rows), panel_width::<T, S>(b.cols, panel)),
                        c: (c.at.add(i * c.stride + panel), c.stride),
                        cols: c.cols - panel,
                        k,
                        start: if let Start::Scaled(factors) = start { Start::Scaled(&factors[i..m]) } else { start },
                    }
                };
                macro_rules! run {
                    ($rows:expr, $skip:expr) => {
                        if n - panel > S::LANES {
                            // SAFETY: there are as many rows, and columns for a second vector.
                            unsafe { tile.run::<S, { $rows }, 2, $skip>(s) }
                        } else {
                            // SAFETY: there are as many rows.
                            unsafe { tile.run::<S, { $rows }, 1, $skip>(s) }
                        }
                    };
                }
                match if b.finite { m - i } else { 0 } {
                    0 => run!(1, true),
                    1 => run!(1, false),
                    2 => run!(2, false),
                    3 => run!(3, false),
                    4 => run!(4, false),
                    5 => run!(5, false),
                    _ => run!(ROWS, false),
                }
            }
        }
    }
}

/// What the micro-kernel works on: pointers, each with its strides.
struct Tile<'a, T> {
    a: (*const T, usize, usize),
    b: (*const T, usize),
    c: (*mut T, usize),
    /// Columns of C from here on.
    cols: usize,
    k: usize,
    start: Start<'a, T>,
}

impl<T: Float> Tile<'_, T> {
    /// `M` rows and `N` vectors of columns. With `SKIP`, terms whose left factor is zero are left out.
    ///
    /// # Safety
    /// A is readable for M rows and k columns, B for k rows of N vectors, C valid for M rows of min(cols, N vectors).
    #[inline(always)]
    unsafe fn run<S: Simd<T>, const M: usize, const N: usize, const SKIP: bool>(&self, s: S) {
        let Tile { a: (a, a_row, a_col), b: (b, b_row), c: (c, c_row), cols, k, start } = *self;
        let width = |v: usize| S::LANES.min(cols.saturating_sub(v * S::LANES));
        let mut sum = [[s.zero(); N]; M];
        if !matches!(start, Start::Zero) {
            for (i, sum) in sum.iter_mut().enumerate() {
                for (v, sum) in sum.iter_mut().enumerate() {
                    // SAFETY: inside C.
                    *sum = unsafe { s.load_ptr_first(c.add(i * c_row + v * S::LANES), width(v), T::ZERO) };
                    if let Start::Scaled(factors) = start {
                        *sum = s.mul(*sum, s.splat(factors[i]));
                    }
                }
            }
        }
        for p in 0..k {
            // SAFETY: row p of B, column p of A.
            unsafe {
                let mut row = [s.zero(); N];
                for (v, row) in row.iter_mut().enumerate() {
                    *row = s.load_ptr(b.add(p * b_row + v * S::LANES));
                }
                for (i, sum) in sum.iter_mut().enumerate() {
                    let x = s.splat(*a.add(i * a_row + p * a_col));
                    for (sum, row) in sum.iter_mut().zip(row) {
                        let next = s.mul_add(x, row, *sum);
                        *sum = if SKIP { s.select(s.eq(x, s.zero()), *sum, next) } else { next };
                    }
                }
            }
        }
        for (i, sum) in sum.iter().enumerate() {
            for (v, sum) in sum.iter().enumerate() {
                // SAFETY: inside C.
                unsafe {
                    let to = c.add(i * c_row + v * S::LANES);
                    if width(v) == S::LANES { s.store_ptr(*sum, to) } else { s.store_ptr_first(*sum, to, width(v)) }
                }
            }
        }
    }
}
