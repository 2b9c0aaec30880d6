//! The passes of batch norm (Ioffe and Szegedy 2015): statistics and gradients of each column over all rows.
//! `mean`, `rstd`, `w` and `b` have one number per column.

use super::lanes::map;
use super::reduce::row_block;
use super::{Beta, task_len};
use crate::error::Result;
use crate::kernel;
use crate::simd::Float;
use crate::threads::for_each;

/// Σ (x − mean)² of each column, block by block into the rows of `partials`, as [`super::reduce`] sums them.
pub fn squared_deviations<T: Float>(partials: &mut [T], x: &[T], mean: &[T]) -> Result<()> {
    kernel! {
        fn block<'a, T>(s: S; partial: &'a mut [T], x: &'a [T], mean: &'a [T]) {
            for x in x.chunks(mean.len()) {
                map(s, [&mut *partial], [x, mean], #[inline(always)] |[sum], [x, mean]| {
                    let d = s.sub(x, mean);
                    [s.mul_add(d, d, sum)]
                });
            }
        }
    }
    partials.fill(T::ZERO);
    let cols = mean.len();
    for_each(partials.chunks_mut(cols).enumerate(), |(i, partial)| block(partial, row_block(x, i, cols), mean))
}

/// y = (x − mean) · rstd · w + b
pub fn batch_norm_forward<T: Float>(y: &mut [T], x: &[T], mean: &[T], rstd: &[T], w: &[T], b: &[T]) -> Result<()> {
    kernel! {
        fn rows<'a, T>(s: S; y: &'a mut [T], x: &'a [T], mean: &'a [T], rstd: &'a [T], w: &'a [T], b: &'a [T]) {
            let cols = mean.len();
            for (y, x) in y.chunks_mut(cols).zip(x.chunks(cols)) {
                map(s, [y], [x, mean, rstd, w, b], #[inline(always)] |_, [x, mean, rstd, w, b]| {
                    [s.mul_add(s.mul(s.sub(x, mean), rstd), w, b)]
                });
            }
        }
    }
    let n = task_len(mean.len());
    for_each(y.chunks_mut(n).zip(x.chunks(n)), |(y, x)| rows(y, x, mean, rstd, w, b))
}

/// dw = Σ dy · xhat and db = Σ dy, side by side in the rows of `partials`, as [`super::reduce`] sums them.
pub fn batch_norm_sums<T: Float>(partials: &mut [T], dy: &[T], x: &[T], mean: &[T], rstd: &[T]) -> Result<()> {
    kernel! {
        fn block<'a, T>(s: S; partial: &'a mut [T], dy: &'a [T], x: &'a [T], mean: &'a [T], rstd: &'a [T]) {
            let cols = mean.len();
            let (dw, db) = partial.split_at_mut(cols);
            for (dy, x) in dy.chunks(cols).zip(x.chunks(cols)) {
                map(s, [&mut *dw, &mut *db], [dy, x, mean, rstd], #[inline(always)] |[dw, db], [dy, x, mean, rstd]| {
                    [s.mul_add(dy, s.mul(s.sub(x, mean), rstd), dw), s.add(db, dy)]
                });
            }
        }
    }
    partials.fill(T::ZERO);
    let cols = mean.len();
    for_each(partials.chunks_mut(2 * cols).enumerate(), |(i, partial)| {
        block(partial, row_block(dy, i, cols), row_block(x, i, cols), mean, rstd)
    })
}

/// dx (+)= w · rstd · (dy − mean_dy − xhat · mean_dy_xhat). With running statistics, which do not depend on x, both
/// means are 0.
pub fn batch_norm_backward<T: Float>(
    dx: &mut [T],
    beta: Beta,
    dy: &[T],
    x: &[T],
    mean: &[T],
    rstd: &[T],
    w: &[T],
    mean_dy: &[T],
    mean_dy_xhat: &[T],
) -> Result<()> {
    kernel! {
        fn rows<'a, T>(
            s: S; dx: &'a mut [T], beta: Beta, dy: &'a [T], x: &'a [T], mean: &'a [T], rstd: &'a [T], w: &'a [T],
            mean_dy: &'a [T], mean_dy_xhat: &'a [T],
        ) {
            let cols = mean.len();
            for ((dx, dy), x) in dx.chunks_mut(cols).zip(dy.chunks(cols)).zip(x.chunks(cols)) {
                let columns = [dy, x, mean, rstd, w, mean_dy, mean_dy_xhat];
                map(s, [dx], columns, #[inline(always)] |[dx], [dy, x, mean, rstd, w, mean_dy, mean_dy_xhat]| {
                    let xhat = s.mul(s.sub(x, mean), rstd);
                    let centred = s.neg_mul_add(xhat, mean_dy_xhat, s.sub(dy, mean_dy));
                    let scale = s.mul(w, rstd);
                    [match beta {
                        Beta::Assign => s.mul(scale, centred),
                        Beta::Add => s.mul_add(scale, centred, dx),
                    }]
                });
            }
        }
    }
    let n = task_len(mean.len());
    for_each(dx.chunks_mut(n).zip(dy.chunks(n)).zip(x.chunks(n)), |((dx, dy), x)| {
        rows(dx, beta, dy, x, mean, rstd, w, mean_dy, mean_dy_xhat)
    })
}
