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
    pub(super) fn pack_panels<'a, T>(s: S; dst: &'a mut [T], b: Mat<'a, T>) {
        let width = S::TILE_VECTORS * S::LANES;
        let (depth, cols) = b.shape();
        let len = panel_len(depth, width);
        assert!(dst.len() >= cols.div_ceil(width) * len);
        let whole = cols / width * width;
        if b.col_stride == 1 {
            // A few panels at a time: more of them written at once are slower than short pieces read.
            let group = 4 * width;
            for from in (0..whole).step_by(group) {
                let cols = group.min(whole - from);
                for k in 0..depth {
                    let row = &b.data[k * b.row_stride + from..][..cols];
                    for (panel, row) in dst[from / width * len..].chunks_exact_mut(len).zip(row.chunks_exact(width)) {
                        let panel = &mut panel[k * width..][..width];
                        for (panel, row) in panel.chunks_exact_mut(S::LANES).zip(row.chunks_exact(S::LANES)) {
                            s.store(s.load(row), panel);
                        }
                    }
                }
            }
        } else {
            for col in (0..whole).step_by(S::LANES) {
                let panel = &mut dst[col / width * len..][..len];
                transpose(s, &mut panel[col % width..], width, b.t(), col);
            }
        }
        if whole < cols {
            for (k, row) in dst[whole / width * len..].chunks_exact_mut(width).take(depth).enumerate() {
                for (j, x) in row.iter_mut().enumerate() {
                    *x = if whole + j < cols { b.at(k, whole + j) } else { T::ZERO };
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
