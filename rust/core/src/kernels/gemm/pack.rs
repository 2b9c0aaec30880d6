//! Operands rearranged in the order of use: B as panels of the tile's width, along K without gaps; A as contiguous rows.

use super::Mat;
use crate::simd::{Float, Simd};

/// From one panel to the next: a row more than the panel has, so that rows of panels side by side do not fall on the
/// same set of the caches.
pub(super) fn panel_len(depth: usize, width: usize) -> usize {
    (depth + 1).saturating_mul(width)
}

crate::kernel! {
    /// Panel p of `dst` holds the columns p · width.. of `b` (K x columns), row after row; columns that `b` lacks are
    /// zeros.
    pub(super) fn pack_panels<'a, T>(s: S; dst: &'a mut [T], b: Mat<'a, T>, width: usize) {
        let (depth, cols) = b.shape();
        let len = panel_len(depth, width);
        assert!(dst.len() >= cols.div_ceil(width) * len);
        if b.col_stride == 1 {
            copy_panels(s, dst, b, width);
            return;
        }
        // A panel made of whole vectors is filled by transposing squares.
        let whole = if width.is_multiple_of(S::LANES) { cols / width * width } else { 0 };
        for col in (0..whole).step_by(S::LANES) {
            let panel = &mut dst[col / width * len..][..len];
            transpose(s, &mut panel[col % width..], width, b.t(), col);
        }
        for from in (whole..cols).step_by(width) {
            let used = width.min(cols - from);
            for (k, row) in dst[from / width * len..].chunks_exact_mut(width).take(depth).enumerate() {
                for (j, x) in row.iter_mut().enumerate() {
                    *x = if j < used { b.at(k, from + j) } else { T::ZERO };
                }
            }
        }
    }
}

/// `pack_panels` of contiguous rows. Every piece is written as whole vectors: what a vector has too much lands where the
/// next row is written afterwards, or in the row that a panel has to spare.
#[inline(always)]
fn copy_panels<T: Float, S: Simd<T>>(s: S, dst: &mut [T], b: Mat<T>, width: usize) {
    let (depth, cols) = b.shape();
    let (len, reach) = (panel_len(depth, width), width.next_multiple_of(S::LANES));
    assert!(depth == 0 || cols == 0 || (depth - 1) * b.row_stride + cols <= b.data.len());
    assert!(reach <= 2 * width && dst.len() >= cols.div_ceil(width) * len);
    // Panels whose last vector is inside the row. A few at a time: more of them written at once are slower than short
    // pieces read.
    let (inside, panels) = ((cols + width).saturating_sub(reach) / width, cols.div_ceil(width));
    let group = (128 / width).max(1);
    for first in (0..inside).step_by(group) {
        let group = group.min(inside - first);
        for k in 0..depth {
            // SAFETY: by the assertions row k has `cols` columns, and a panel has room for `reach` from its row k on.
            unsafe {
                let mut from = b.data.as_ptr().add(k * b.row_stride + first * width);
                let mut to = dst.as_mut_ptr().add(first * len + k * width);
                for _ in 0..group {
                    let mut v = 0;
                    while v < width {
                        s.store_ptr(s.load_ptr(from.add(v)), to.add(v));
                        v += S::LANES;
                    }
                    from = from.add(width);
                    to = to.wrapping_add(len);
                }
            }
        }
    }
    for panel in inside..panels {
        for k in 0..depth {
            for v in (0..width).step_by(S::LANES) {
                let used = (cols - panel * width).saturating_sub(v).min(S::LANES);
                // SAFETY: as above, for the columns that are left.
                unsafe {
                    let from = b.data.as_ptr().wrapping_add(k * b.row_stride + panel * width + v);
                    s.store_ptr(
                        s.load_ptr_first(from, used, T::ZERO),
                        dst.as_mut_ptr().add(panel * len + k * width + v),
                    );
                }
            }
        }
    }
}

crate::kernel! {
    /// The rows of `a`, each contiguous, `stride` apart.
    pub(super) fn pack_rows<'a, T>(s: S; dst: &'a mut [T], stride: usize, a: Mat<'a, T>) {
        let (rows, depth) = a.shape();
        if a.col_stride == 1 {
            for (i, dst) in dst.chunks_mut(stride).take(rows).enumerate() {
                dst[..depth].copy_from_slice(&a.data[i * a.row_stride..][..depth]);
            }
            return;
        }
        // Strips of LANES steps along K: their source rows are read from end to end.
        let a = a.t();
        let whole = depth / S::LANES * S::LANES;
        for k in (0..whole).step_by(S::LANES) {
            transpose(s, &mut dst[k..], stride, a, k);
        }
        for (i, dst) in dst.chunks_mut(stride).take(rows).enumerate() {
            for (k, x) in dst.iter_mut().enumerate().take(depth).skip(whole) {
                *x = a.at(k, i);
            }
        }
    }
}

/// LANES rows of `src`, from `row` on, become columns of `dst`: `dst[j * stride + i] = src[row + i][j]`.
#[inline(always)]
fn transpose<T: Float, S: Simd<T>>(s: S, dst: &mut [T], stride: usize, src: Mat<T>, row: usize) {
    let cols = src.shape().1;
    let mut done = 0;
    if src.col_stride == 1 && cols >= S::LANES {
        done = cols / S::LANES * S::LANES;
        let last = (row + S::LANES - 1) * src.row_stride + done;
        assert!(last <= src.data.len() && (done - 1) * stride + S::LANES <= dst.len() && stride >= S::LANES);
        for j in (0..done).step_by(S::LANES) {
            // SAFETY: the last number read and the last one written lie inside the slices.
            unsafe {
                let from = src.data.as_ptr().add(row * src.row_stride + j);
                s.transpose_ptr(from, src.row_stride, dst.as_mut_ptr().add(j * stride), stride);
            }
        }
    }
    for j in done..cols {
        for i in 0..S::LANES {
            dst[j * stride + i] = src.at(row + i, j);
        }
    }
}
