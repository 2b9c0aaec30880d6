//! Products of small blocks: one micro-kernel in registers, and copies of its right factor that it reads fast.
//!
//! An element of the result is one chain of multiply-adds along the contracted axis, from the first term to the last,
//! whatever the sizes of the blocks. Where the right factor holds an infinity or NaN, terms whose left factor is zero are
//! left out, so that a key which is not kept cannot leak; elsewhere they are added, which changes at most the sign of a
//! zero.

use super::Out;
use crate::kernel;
use crate::kernels::gemm::opaque;
use crate::simd::{Float, MAX_LANES, Simd, prefetch};

/// The left factor, read through two strides: element (i, p) is `data[i * row + p * col]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, T> {
    pub data: &'a [T],
    pub row: usize,
    pub col: usize,
}

/// The right factor, `rows` by `cols`, as `pack` laid it out, or a cache.
#[derive(Clone, Copy)]
pub(super) struct Packed<'a, T> {
    pub data: &'a [T],
    rows: usize,
    cols: usize,
    /// From one row to the next, each with room for whole vectors.
    stride: usize,
    /// No infinity and no NaN inside.
    finite: bool,
    /// What comes next and lies in the same way: asked for, line by line, as this one is read.
    next: Option<&'a [T]>,
}

impl<'a, T> Packed<'a, T> {
    /// What lies so already.
    pub fn new(data: &'a [T], rows: usize, cols: usize, stride: usize, finite: bool) -> Self {
        Packed { data, rows, cols, stride, finite, next: None }
    }

    /// The same, with what comes next.
    pub fn before(self, next: Option<&'a [T]>) -> Self {
        Packed { next, ..self }
    }

    /// From row `first` on.
    pub fn rows_from(self, first: usize) -> Self {
        Packed { data: &self.data[first * self.stride..], rows: self.rows - first, ..self }
    }

    /// From column `first` on, which begins a vector.
    pub fn columns_from(self, first: usize) -> Self {
        Packed { data: &self.data[first..], cols: self.cols - first, ..self }
    }

    /// The same numbers as a left factor.
    pub fn left(&self) -> Left<'a, T> {
        Left { data: self.data, row: self.stride, col: 1 }
    }
}

/// From one row of a packed matrix to the next: whole vectors, and never a power of two, which would put the elements of a
/// column into few cache sets.
pub(super) const fn stride(cols: usize) -> usize {
    cols.next_multiple_of(MAX_LANES) + MAX_LANES
}

/// Room for a packed `rows` by `cols` matrix.
pub(super) const fn packed_len(rows: usize, cols: usize) -> usize {
    rows * stride(cols)
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

/// Copies `rows` rows of `cols` numbers, `from_stride` apart in `from`, times `factor`.
pub(super) fn pack<'a, T: Float>(
    to: &'a mut [T],
    from: &[T],
    from_stride: usize,
    rows: usize,
    cols: usize,
    factor: T,
) -> Packed<'a, T> {
    let finite = copy_rows(to, from, from_stride, rows, cols, factor);
    Packed::new(to, rows, cols, stride(cols), finite)
}

/// The transposed matrix: `cols` rows and `rows` columns; those behind, to the end of a vector, hold anything. Its numbers
/// are taken for finite.
pub(super) fn pack_transposed<'a, T: Float>(
    to: &'a mut [T],
    from: &[T],
    from_stride: usize,
    rows: usize,
    cols: usize,
) -> Packed<'a, T> {
    copy_columns(to, stride(rows), from, from_stride, rows, cols);
    Packed::new(to, cols, rows, stride(rows), true)
}

/// Rows ahead that are asked for: the rows of a head lie far apart.
const AHEAD: usize = 8;

kernel! {
    fn copy_rows<'a, T>(s: S; to: &'a mut [T], from: &'a [T], from_stride: usize, rows: usize, cols: usize, factor: T) -> bool {
        // Stays 0 while all numbers are finite.
        let mut check = s.zero();
        let factor = s.splat(factor);
        for (r, to) in to.chunks_mut(stride(cols)).take(rows).enumerate() {
            let row = &from[r * from_stride..][..cols];
            for (to, x) in to.chunks_exact_mut(S::LANES).zip(row.chunks(S::LANES)) {
                prefetch(x.as_ptr().wrapping_add(AHEAD * from_stride));
                let x = s.mul(s.load_first(x, T::ZERO), factor);
                check = s.mul_add(x, s.zero(), check);
                s.store(x, to);
            }
        }
        !s.any(s.not(s.eq(check, s.zero())))
    }
}

kernel! {
    /// `cols` rows of `to`, `stride` apart: the columns of `rows` rows, `from_stride` apart in `from`, and anything to the end of a vector.
    pub(super) fn copy_columns<'a, T>(s: S; to: &'a mut [T], stride: usize, from: &'a [T], from_stride: usize, rows: usize, cols: usize) {
        let whole = rows.next_multiple_of(S::LANES);
        assert!(whole <= stride && (cols == 0 || (cols - 1) * stride + whole <= to.len()));
        assert!(rows == 0 || cols == 0 || (rows - 1) * from_stride + cols <= from.len());
        for c in (0..rows).step_by(S::LANES) {
            let lanes = S::LANES.min(rows - c);
            // SAFETY: `lanes` rows from row c on, inside by the assertion, go to columns c.. of every row of `to`.
            unsafe {
                let (from, to) = (from.as_ptr().add(c * from_stride), to.as_mut_ptr().add(c));
                let squares = cols / S::LANES * S::LANES;
                for r in (0..squares).step_by(S::LANES) {
                    for lane in 0..S::LANES {
                        prefetch(from.wrapping_add((S::LANES + lane) * from_stride + r));
                    }
                    s.transpose_ptr(from.add(r), from_stride, lanes, to.add(r * stride), stride);
                }
                for r in squares..cols {
                    let mut column = [T::ZERO; MAX_LANES];
                    for (lane, x) in column[..lanes].iter_mut().enumerate() {
                        *x = *from.add(lane * from_stride + r);
                    }
                    s.store_ptr(s.load(&column), to.add(r * stride));
                }
            }
        }
    }
}

/// Rows of C that the micro-kernel keeps in registers.
const ROWS: usize = 6;

/// Vectors in a row of its tile: as many as there are registers for.
const fn wide<T: Float, S: Simd<T>>() -> usize {
    if S::TILE_ROWS * S::TILE_VECTORS >= 4 * ROWS { 4 } else { 2 }
}

kernel! {
    /// C (m, n) = start + A (m, k) B (k, n). B may have more rows and columns than are used. Rows of C are `c_row` apart and
    /// are written in whole vectors.
    pub(super) fn product<'a, T>(s: S; c: &'a mut [T], c_row: usize, a: Left<'a, T>, b: Packed<'a, T>, m: usize, n: usize, k: usize, start: Start<'a, T>) {
        if m == 0 || n == 0 {
            return;
        }
        assert!(n.next_multiple_of(S::LANES) <= c_row && (m - 1) * c_row + n.next_multiple_of(S::LANES) <= c.len());
        assert!(k == 0 || (m - 1) * a.row + (k - 1) * a.col < a.data.len());
        let whole = b.cols.next_multiple_of(S::LANES);
        assert!(n <= b.cols && k <= b.rows && whole <= b.stride);
        assert!(k == 0 || (k - 1) * b.stride + whole <= b.data.len());
        let rows = if b.finite { ROWS } else { 1 };
        let next = b.next.filter(|_| m <= rows); // once is enough
        for panel in (0..n).step_by(wide::<T, S>() * S::LANES) {
            let vectors = (n - panel).div_ceil(S::LANES).min(wide::<T, S>());
            for i in (0..m).step_by(rows) {
                // SAFETY: by the assertions row i of A and of C exist, and so does column `panel` of B.
                let tile = unsafe {
                    Tile {
                        a: (a.data.as_ptr().add(i * a.row), a.row, a.col),
                        b: (b.data.as_ptr().add(panel), b.stride),
                        next: next.map(|next| next.as_ptr().wrapping_add(panel)),
                        c: (c.as_mut_ptr().add(i * c_row + panel), c_row),
                        k,
                        start: if let Start::Scaled(factors) = start { Start::Scaled(&factors[i..m]) } else { start },
                    }
                };
                // SAFETY: there are as many rows, and columns for as many vectors.
                unsafe {
                    match if b.finite { m - i } else { 0 } {
                        0 => tile.columns::<S, 1, true>(s, vectors),
                        1 => tile.columns::<S, 1, false>(s, vectors),
                        2 => tile.columns::<S, 2, false>(s, vectors),
                        3 => tile.columns::<S, 3, false>(s, vectors),
                        4 => tile.columns::<S, 4, false>(s, vectors),
                        5 => tile.columns::<S, 5, false>(s, vectors),
                        _ => tile.columns::<S, ROWS, false>(s, vectors),
                    }
                }
            }
        }
    }
}

/// What the micro-kernel works on: pointers, each with its strides.
struct Tile<'a, T> {
    a: (*const T, usize, usize),
    b: (*const T, usize),
    next: Option<*const T>,
    c: (*mut T, usize),
    k: usize,
    start: Start<'a, T>,
}

// Loops over rows and vectors read like the formula; iterators would hide it, and keep the sums from their registers.
#[allow(clippy::needless_range_loop)]
impl<T: Float> Tile<'_, T> {
    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    unsafe fn columns<S: Simd<T>, const M: usize, const SKIP: bool>(&self, s: S, vectors: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match vectors {
                1 => self.run::<S, M, 1, SKIP>(s),
                2 => self.run::<S, M, 2, SKIP>(s),
                // `if const`, so that only what this token needs is compiled.
                3 if const { wide::<T, S>() == 4 } => self.run::<S, M, 3, SKIP>(s),
                _ if const { wide::<T, S>() == 4 } => self.run::<S, M, 4, SKIP>(s),
                _ => unreachable!("more vectors than a tile has"),
            }
        }
    }

    /// # Safety
    /// As for `tile`.
    #[inline(always)]
    unsafe fn run<S: Simd<T>, const M: usize, const N: usize, const SKIP: bool>(&self, s: S) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.next {
                Some(next) => self.tile::<S, M, N, SKIP, true>(s, next),
                None => self.tile::<S, M, N, SKIP, false>(s, self.b.0),
            }
        }
    }

    /// `M` rows and `N` vectors of columns. With `SKIP`, terms whose left factor is zero are left out; with `ASK`, what lies at
    /// `next` is asked for.
    ///
    /// # Safety
    /// A is readable for M rows and k columns, B for k rows of N vectors, C valid for M rows of N vectors.
    #[inline(always)]
    unsafe fn tile<S: Simd<T>, const M: usize, const N: usize, const SKIP: bool, const ASK: bool>(
        &self,
        s: S,
        mut next: *const T,
    ) {
        let Tile { a: (a, a_row, a_col), b: (mut b, b_row), c: (c, c_row), k, start, .. } = *self;
        let mut sum = [[s.zero(); N]; M];
        // SAFETY: the caller's promise.
        unsafe {
            if !matches!(start, Start::Zero) {
                for i in 0..M {
                    for v in 0..N {
                        sum[i][v] = s.load_ptr(c.add(i * c_row + v * S::LANES));
                    }
                }
            }
            if let Start::Scaled(factors) = start {
                for i in 0..M {
                    for v in 0..N {
                        sum[i][v] = s.mul(sum[i][v], s.splat(factors[i]));
                    }
                }
            }
            let a: [*const T; M] = std::array::from_fn(|i| opaque(a.wrapping_add(i * a_row)));
            let mut step = 0;
            for _ in 0..k {
                let mut row = [s.zero(); N];
                for v in 0..N {
                    row[v] = s.load_ptr(b.add(v * S::LANES));
                    if ASK {
                        prefetch(next.wrapping_add(v * S::LANES));
                    }
                }
                for i in 0..M {
                    let x = s.splat(*a[i].add(step));
                    for v in 0..N {
                        let more = s.mul_add(x, row[v], sum[i][v]);
                        sum[i][v] = if SKIP { s.select(s.eq(x, s.zero()), sum[i][v], more) } else { more };
                    }
                }
                (b, next) = (b.wrapping_add(b_row), next.wrapping_add(b_row));
                step += a_col;
            }
            for i in 0..M {
                for v in 0..N {
                    s.store_ptr(sum[i][v], c.add(i * c_row + v * S::LANES));
                }
            }
        }
    }
}

kernel! {
    /// out = factor · from, or added to it.
    pub(super) fn copy_out<'a, T>(s: S; out: Out<'a, T>, from: &'a [T], factor: T, add: bool) {
        let mut out = out;
        let factor = s.splat(factor);
        for (i, from) in from.chunks(stride(out.cols)).take(out.rows).enumerate() {
            for (out, from) in out.row(i).chunks_mut(S::LANES).zip(from.chunks(S::LANES)) {
                let before = if add { s.load_first(out, T::ZERO) } else { s.zero() };
                s.store_first(s.mul_add(factor, s.load_first(from, T::ZERO), before), out);
            }
        }
    }
}
