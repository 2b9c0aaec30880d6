//! Operands rearranged into panels: `width` columns wide, along K without gaps, so that the micro-kernel reads one stream.

// Loops over rows, panels and vectors read like the formula; iterators would hide it.
#![allow(clippy::needless_range_loop)]

use super::Mat;
use crate::simd::Float;

crate::kernel! {
    /// Panel p of `dst` holds the columns p · width.. of `src` (K x columns), row after row; columns that `src` lacks
    /// are zeros.
    pub(super) fn pack<'a, T>(s: S; dst: &'a mut [T], src: Mat<'a, T>, width: usize) {
        let _ = (s, S::LANES);
        match width {
            4 => panels::<T, 4>(dst, src),
            6 => panels::<T, 6>(dst, src),
            8 => panels::<T, 8>(dst, src),
            12 => panels::<T, 12>(dst, src),
            16 => panels::<T, 16>(dst, src),
            32 => panels::<T, 32>(dst, src),
            _ => unreachable!("the width of a panel comes from the token's tile"),
        }
    }
}

/// Steps along K that are transposed at a time: a good part of a cache line.
const STEP: usize = 8;

#[inline(always)]
fn panels<T: Float, const W: usize>(dst: &mut [T], src: Mat<T>) {
    let (depth, cols) = src.shape();
    if depth == 0 {
        return;
    }
    let len = depth * W;
    let whole = cols / W;
    if src.col_stride == 1 {
        for k in 0..depth {
            let row = &src.data[k * src.row_stride..][..cols];
            for (panel, row) in dst.chunks_exact_mut(len).zip(row.chunks_exact(W)) {
                panel[k * W..][..W].copy_from_slice(row);
            }
        }
    } else if src.row_stride == 1 {
        for (p, panel) in dst.chunks_exact_mut(len).take(whole).enumerate() {
            let columns: [&[T]; W] = std::array::from_fn(|j| &src.data[(p * W + j) * src.col_stride..][..depth]);
            transpose(panel, columns);
        }
    } else {
        for (p, panel) in dst.chunks_exact_mut(len).take(whole).enumerate() {
            for (k, row) in panel.chunks_exact_mut(W).enumerate() {
                for (j, x) in row.iter_mut().enumerate() {
                    *x = src.at(k, p * W + j);
                }
            }
        }
    }
    if whole * W < cols {
        for (k, row) in dst[whole * len..].chunks_exact_mut(W).take(depth).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = if whole * W + j < cols { src.at(k, whole * W + j) } else { T::ZERO };
            }
        }
    }
}

/// W columns of the same length to rows of W numbers, by small squares that stay in registers.
#[inline(always)]
fn transpose<T: Float, const W: usize>(panel: &mut [T], columns: [&[T]; W]) {
    let whole = columns[0].len() / STEP * STEP;
    for k in (0..whole).step_by(STEP) {
        let mut square = [[T::ZERO; STEP]; W];
        for j in 0..W {
            square[j].copy_from_slice(&columns[j][k..k + STEP]);
        }
        let rows = &mut panel[k * W..][..STEP * W];
        for i in 0..STEP {
            for j in 0..W {
                rows[i * W + j] = square[j][i];
            }
        }
    }
    for (k, row) in panel.chunks_exact_mut(W).enumerate().skip(whole) {
        for j in 0..W {
            row[j] = columns[j][k];
        }
    }
}
