//! Operands rearranged in the order of use, in units of their form: B as panels of the tile's width, along K without gaps;
//! A as contiguous rows, or as panels of the tile's height.

use super::Mat;
use super::form::Form;
use crate::simd::{Float, MAX_LANES, Simd, prefetch};

/// How many numbers ahead rows are asked for: a loop that writes to the caches as well has too few lines under way by itself.
const AHEAD: usize = 512;

/// From one panel to the next: a row more than the panel has, so that rows of panels side by side do not fall on the
/// same set of the caches.
pub(super) fn panel_len(depth: usize, width: usize) -> usize {
    (depth + 1).saturating_mul(width)
}

crate::kernel! {
    /// Panel p of `dst` holds the columns p · width.. of `b` (K x columns), row after row of units; columns and steps that
    /// `b` lacks are zeros.
    pub(super) fn pack_panels<'a, T, F: Form>(s: S; dst: &'a mut [T], b: Mat<'a, T>, width: usize) {
        if const { F::STEPS > 1 && !S::PAIRS } {
            unreachable!("`product` chose a form that this path lacks");
        }
        let (depth, cols) = b.shape();
        let (filled, units) = (depth.div_ceil(F::STEPS), F::units(depth));
        let len = panel_len(units, width);
        assert!(dst.len() >= cols.div_ceil(width) * len);
        for panel in dst.chunks_mut(len).take(cols.div_ceil(width)) {
            panel[filled * width..units * width].fill(T::ZERO);
        }
        if b.col_stride == 1 {
            copy_panels::<T, S, F>(s, dst, b, width);
            return;
        }
        // A panel made of whole vectors is filled by turning squares.
        let whole = if width.is_multiple_of(S::LANES) { cols / width * width } else { 0 };
        for col in (0..whole).step_by(S::LANES) {
            let panel = &mut dst[col / width * len..][..len];
            turn::<T, S, F>(s, &mut panel[col % width..], width, b.t(), col);
        }
        for from in (whole..cols).step_by(width) {
            let used = width.min(cols - from);
            for (u, row) in dst[from / width * len..].chunks_exact_mut(width).take(filled).enumerate() {
                for (v, row) in row.chunks_mut(S::LANES).enumerate() {
                    let column = |j: usize| (v * S::LANES + j < used).then_some(from + v * S::LANES + j);
                    let step = |k: usize| gather(s, |j| column(j).filter(|_| k < depth).map(|j| b.at(k, j)));
                    let second = if const { F::STEPS == 2 } { step(u * F::STEPS + 1) } else { s.zero() };
                    s.store_first(F::unit(s, step(u * F::STEPS), second), row);
                }
            }
        }
    }
}

/// `pack_panels` of contiguous rows. Every piece is written as whole vectors: what a vector has too much lands where the
/// next row is written afterwards, or in the row that a panel has to spare.
#[inline(always)]
fn copy_panels<T: Float, S: Simd<T>, F: Form>(s: S, dst: &mut [T], b: Mat<T>, width: usize) {
    let (depth, cols) = b.shape();
    let units = depth.div_ceil(F::STEPS);
    let (len, reach) = (panel_len(F::units(depth), width), width.next_multiple_of(S::LANES));
    assert!(depth == 0 || cols == 0 || (depth - 1) * b.row_stride + cols <= b.data.len());
    assert!(reach <= 2 * width && dst.len() >= cols.div_ceil(width) * len);
    // Panels whose last vector is inside the row. A few at a time: more of them written at once are slower than short
    // pieces read.
    let (inside, panels) = ((cols + width).saturating_sub(reach) / width, cols.div_ceil(width));
    let group = (128 / width).max(1);
    for first in (0..inside).step_by(group) {
        let group = group.min(inside - first);
        for u in 0..units {
            let k = u * F::STEPS;
            let paired = F::STEPS == 2 && k + 1 < depth;
            // SAFETY: by the assertions row k has `cols` columns, and a panel has room for `reach` from its row u on.
            unsafe {
                let mut from = b.data.as_ptr().add(k * b.row_stride + first * width);
                let mut to = dst.as_mut_ptr().add(first * len + u * width);
                for _ in 0..group {
                    let mut v = 0;
                    while v < width {
                        let second = if paired { s.load_ptr(from.add(b.row_stride + v)) } else { s.zero() };
                        s.store_ptr(F::unit(s, s.load_ptr(from.add(v)), second), to.add(v));
                        v += S::LANES;
                    }
                    from = from.add(width);
                    to = to.wrapping_add(len);
                }
            }
        }
    }
    for panel in inside..panels {
        for u in 0..units {
            let k = u * F::STEPS;
            for v in (0..width).step_by(S::LANES) {
                let used = (cols - panel * width).saturating_sub(v).min(S::LANES);
                // SAFETY: as above, for the columns that are left.
                unsafe {
                    let row = |k: usize| {
                        let from = b.data.as_ptr().wrapping_add(k * b.row_stride + panel * width + v);
                        s.load_ptr_first(from, used, T::ZERO)
                    };
                    let second = if F::STEPS == 2 && k + 1 < depth { row(k + 1) } else { s.zero() };
                    s.store_ptr(F::unit(s, row(k), second), dst.as_mut_ptr().add(panel * len + u * width + v));
                }
            }
        }
    }
}

crate::kernel! {
    /// The rows of `a` as contiguous units, `stride` apart; steps that `a` lacks are zeros. Rows that lie side by side are
    /// turned in squares, for which `dst` has a multiple of LANES rows and `stride` as many units.
    pub(super) fn pack_rows<'a, T, F: Form>(s: S; dst: &'a mut [T], stride: usize, a: Mat<'a, T>) {
        if const { F::STEPS > 1 && !S::PAIRS } {
            unreachable!("`product` chose a form that this path lacks");
        }
        let (rows, depth) = a.shape();
        let units = F::units(depth);
        if a.row_stride == 1 && a.col_stride != 1 {
            assert!(dst.len() >= rows.next_multiple_of(S::LANES) * stride && stride >= units.next_multiple_of(S::LANES));
            for from in (0..units).step_by(S::LANES) {
                for row in (0..rows).step_by(S::LANES) {
                    let count = S::LANES.min(rows - row);
                    let step = |k: usize| match k < depth {
                        true => s.load_first(&a.data[k * a.col_stride + row..][..count], T::ZERO),
                        false => s.zero(),
                    };
                    let mut square = [T::ZERO; MAX_LANES * MAX_LANES];
                    for (u, square) in square.chunks_mut(S::LANES).take(S::LANES).enumerate() {
                        let k = (from + u) * F::STEPS;
                        let second = if const { F::STEPS == 2 } { step(k + 1) } else { s.zero() };
                        s.store(F::unit(s, step(k), second), square);
                    }
                    // SAFETY: by the assertion `dst` has the square's rows and columns.
                    unsafe { s.transpose_ptr(square.as_ptr(), S::LANES, S::LANES, dst.as_mut_ptr().add(row * stride + from), stride) };
                }
            }
            return;
        }
        if a.col_stride == 1 {
            copy_rows::<T, S, F>(s, dst, stride, a);
            return;
        }
        for (i, dst) in dst.chunks_mut(stride).take(rows).enumerate() {
            for (v, dst) in dst[..units].chunks_mut(S::LANES).enumerate() {
                let part = |from: usize| gather(s, |k| (from + k < depth).then(|| a.at(i, from + k)));
                let from = v * S::LANES * F::STEPS;
                let high = if const { F::STEPS == 2 } { part(from + S::LANES) } else { s.zero() };
                s.store_first(F::adjacent(s, part(from), high), dst);
            }
        }
    }
}

/// `pack_rows` of contiguous rows.
#[inline(always)]
fn copy_rows<T: Float, S: Simd<T>, F: Form>(s: S, dst: &mut [T], stride: usize, a: Mat<T>) {
    let (rows, depth) = a.shape();
    let (step, units) = (S::LANES * F::STEPS, F::units(depth));
    let ahead = AHEAD.div_ceil(depth.max(1)) * a.row_stride; // rows
    for (i, dst) in dst.chunks_mut(stride).take(rows).enumerate() {
        let (row, dst) = (&a.data[i * a.row_stride..][..depth], &mut dst[..units]);
        let whole = depth / step;
        for v in 0..whole {
            // SAFETY: `whole` vectors of units, made of whole vectors of numbers, lie inside the slices.
            unsafe {
                let from = row.as_ptr().add(v * step);
                for line in 0..F::STEPS {
                    prefetch(from.wrapping_add(ahead + line * S::LANES));
                }
                let high = if F::STEPS == 2 { s.load_ptr(from.add(S::LANES)) } else { s.zero() };
                s.store_ptr(F::adjacent(s, s.load_ptr(from), high), dst.as_mut_ptr().add(v * S::LANES));
            }
        }
        for (v, dst) in dst[whole * S::LANES..].chunks_mut(S::LANES).enumerate() {
            let part = |from: usize| s.load_first(row.get(from..).unwrap_or_default(), T::ZERO);
            let from = (whole + v) * step;
            let high = if const { F::STEPS == 2 } { part(from + S::LANES) } else { s.zero() };
            s.store_first(F::adjacent(s, part(from), high), dst);
        }
    }
}

/// A vector of what `number` gives for its lanes; zero for nothing.
#[inline(always)]
fn gather<T: Float, S: Simd<T>>(s: S, number: impl Fn(usize) -> Option<T>) -> S::V {
    let mut lanes = [T::ZERO; MAX_LANES];
    for (i, lane) in lanes[..S::LANES].iter_mut().enumerate() {
        *lane = number(i).unwrap_or(T::ZERO);
    }
    s.load(&lanes)
}

/// LANES rows of `src`, from `row` on, become columns of `dst`: unit j of row i goes to `dst[j * stride + i]`.
#[inline(always)]
fn turn<T: Float, S: Simd<T>, F: Form>(s: S, dst: &mut [T], stride: usize, src: Mat<T>, row: usize) {
    let cols = src.shape().1;
    let units = cols.div_ceil(F::STEPS);
    let mut done = 0;
    if src.col_stride == 1 && cols >= S::LANES * F::STEPS {
        let step = S::LANES * F::STEPS;
        done = cols / step * S::LANES;
        let last = (row + S::LANES - 1) * src.row_stride + done * F::STEPS;
        assert!(last <= src.data.len() && (done - 1) * stride + S::LANES <= dst.len() && stride >= S::LANES);
        for j in (0..done).step_by(S::LANES) {
            // SAFETY: the last number read and the last one written lie inside the slices.
            unsafe {
                let from = src.data.as_ptr().add(row * src.row_stride + j * F::STEPS);
                let to = dst.as_mut_ptr().add(j * stride);
                if F::IN_PLACE {
                    s.transpose_ptr(from, src.row_stride, S::LANES, to, stride);
                    continue;
                }
                let mut square = [T::ZERO; MAX_LANES * MAX_LANES];
                for i in 0..S::LANES {
                    let from = from.add(i * src.row_stride);
                    let high = if F::STEPS == 2 { s.load_ptr(from.add(S::LANES)) } else { s.zero() };
                    let units = F::adjacent(s, s.load_ptr(from), high);
                    s.store_ptr(units, square.as_mut_ptr().add(i * S::LANES));
                }
                s.transpose_ptr(square.as_ptr(), S::LANES, S::LANES, to, stride);
            }
        }
    }
    for j in done..units {
        let step = |k: usize| gather(s, |i| (k < cols).then(|| src.at(row + i, k)));
        let second = if const { F::STEPS == 2 } { step(j * F::STEPS + 1) } else { s.zero() };
        s.store(F::unit(s, step(j * F::STEPS), second), &mut dst[j * stride..]);
    }
}
