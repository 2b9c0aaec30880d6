//! Operands rearranged in the order of use, in units of their form: B as panels of the tile's width, along K without gaps;
//! A as contiguous rows, or as panels of the tile's height.

use super::form::Form;
use super::{Mat, Output};
use crate::simd::{Float, MAX_LANES, Simd, prefetch};

/// How many numbers ahead rows are asked for: a loop that writes to the caches as well has too few lines under way by itself.
const AHEAD: usize = 1024;
/// How many steps along K ahead, where a line is read of each.
const TURN_AHEAD: usize = 32;

/// From one panel to the next: a row more than the panel has, so that rows of panels side by side do not fall on the
/// same set of the caches.
pub(super) fn panel_len(depth: usize, width: usize) -> usize {
    (depth + 1).saturating_mul(width)
}

crate::kernel! {
    /// Panel p of `dst` gets the columns p · width.. of `b` (K x columns), row after row of units; columns and steps that
    /// `b` lacks are zeros. Panels are `dst.row_stride` apart. The caller sees to it that they have these rows, and nobody else has
    /// them meanwhile.
    pub(super) fn pack_panels<'a, T, F: Form>(s: S; dst: Output<'a, T>, b: Mat<'a, T>, width: usize) {
        if const { F::STEPS > 1 && !S::PAIRS } {
            unreachable!("`product` chose a form that this path lacks");
        }
        let (depth, cols) = b.shape();
        let (filled, units) = (depth.div_ceil(F::STEPS), F::units(depth));
        // SAFETY: rows of the panels, which are this call's alone.
        let panel = |p: usize| unsafe { dst.part(p * dst.row_stride, units * width) };
        for p in 0..cols.div_ceil(width) {
            panel(p)[filled * width..].fill(T::ZERO);
        }
        if b.col_stride == 1 {
            copy_panels::<T, S, F>(s, dst, b, width);
            return;
        }
        // A panel made of whole vectors is filled by turning squares.
        let whole = if width.is_multiple_of(S::LANES) { cols / width * width } else { 0 };
        for col in (0..whole).step_by(S::LANES) {
            turn::<T, S, F>(s, &mut panel(col / width)[col % width..], width, b.t(), col);
        }
        for from in (whole..cols).step_by(width) {
            let used = width.min(cols - from);
            for (u, row) in panel(from / width).chunks_exact_mut(width).take(filled).enumerate() {
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

/// `pack_panels` of contiguous rows, one whole row after the other: of long runs the CPU asks the memory for what comes next. A vector
/// that is wider than the rest of a panel's row ends in the next one, which is written afterwards; the last row ends where it ends.
#[inline(always)]
fn copy_panels<T: Float, S: Simd<T>, F: Form>(s: S, dst: Output<T>, b: Mat<T>, width: usize) {
    let (depth, cols) = b.shape();
    assert!(depth == 0 || (depth - 1) * b.row_stride + cols <= b.data.len());
    let units = depth.div_ceil(F::STEPS);
    let ahead = AHEAD.div_ceil(cols.max(1)) * b.row_stride;
    for u in 0..units {
        let k = u * F::STEPS;
        let paired = F::STEPS == 2 && k + 1 < depth;
        let row = b.data[k * b.row_stride..].as_ptr();
        let mut to = dst.data.wrapping_add(u * width);
        for from in (0..cols).step_by(width) {
            for v in (0..width).step_by(S::LANES) {
                let (room, left) = (width - v, cols.saturating_sub(from + v));
                let row = row.wrapping_add(from + v);
                for step in 0..F::STEPS {
                    prefetch(row.wrapping_add(ahead + step * b.row_stride));
                }
                // SAFETY: the row has `left` more columns, and by the assertion so has the one behind it; the panel has room for
                // `room` numbers in this row, and for a vector if this is not the last one.
                unsafe {
                    if left >= S::LANES && (room >= S::LANES || u + 1 < units) {
                        let second = if paired { s.load_ptr(row.wrapping_add(b.row_stride)) } else { s.zero() };
                        s.store_ptr(F::unit(s, s.load_ptr(row), second), to.wrapping_add(v));
                    } else {
                        let used = left.min(room).min(S::LANES);
                        let part = |row: *const T| s.load_ptr_first(row, used, T::ZERO);
                        let second = if paired { part(row.wrapping_add(b.row_stride)) } else { s.zero() };
                        s.store_ptr_first(F::unit(s, part(row), second), to.wrapping_add(v), room.min(S::LANES));
                    }
                }
            }
            to = to.wrapping_add(dst.row_stride);
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
                        for step in k..k + F::STEPS {
                            prefetch(a.data.as_ptr().wrapping_add((step + TURN_AHEAD) * a.col_stride + row));
                        }
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
