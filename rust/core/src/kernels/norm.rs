//! Layer norm (Ba, Kiros and Hinton 2016) and RMS norm (Zhang and Sennrich 2019), row by row.

use super::lanes::{map, sums, sweep};
use super::reduce::ROW_BLOCK;
use super::{Beta, task_len};
use crate::error::Result;
use crate::kernel;
use crate::simd::Float;
use crate::threads::{for_each, rows_per_task};

/// What a norm does to a row before gain and bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Subtracts the mean and divides by the standard deviation.
    Layer,
    /// Divides by the root of the mean square: the mean counts as 0.
    Rms,
}

kernel! {
    fn forward_rows<'a, T>(
        s: S; norm: Norm, y: &'a mut [T], mean: &'a mut [T], rstd: &'a mut [T], x: &'a [T], w: &'a [T], b: &'a [T], eps: T,
    ) {
        let cols = w.len();
        let n = T::from_f64(cols as f64);
        for (((y, x), mean), rstd) in y.chunks_mut(cols).zip(x.chunks(cols)).zip(mean).zip(rstd) {
            *mean = match norm {
                Norm::Layer => sums(s, [x], #[inline(always)] |x| x)[0] / n,
                Norm::Rms => T::ZERO,
            };
            let m = s.splat(*mean);
            let [squares] = sums(s, [x], #[inline(always)] |[x]| {
                let d = s.sub(x, m);
                [s.mul(d, d)]
            });
            *rstd = T::ONE / (squares / n + eps).sqrt();
            let r = s.splat(*rstd);
            map(s, [y], [x, w, b], #[inline(always)] |_, [x, w, b]| [s.mul_add(s.mul(s.sub(x, m), r), w, b)]);
        }
    }
}

/// y = (x − mean) · rstd · w + b with rstd = 1 / √(mean of (x − mean)² + eps). Rows have `w.len()` columns; `mean` and
/// `rstd` one number per row.
pub fn norm_forward<T: Float>(
    norm: Norm,
    y: &mut [T],
    mean: &mut [T],
    rstd: &mut [T],
    x: &[T],
    w: &[T],
    b: &[T],
    eps: f64,
) -> Result<()> {
    let (n, rows) = (task_len(w.len()), rows_per_task(w.len()));
    let stats = mean.chunks_mut(rows).zip(rstd.chunks_mut(rows));
    for_each(y.chunks_mut(n).zip(x.chunks(n)).zip(stats), |((y, x), (mean, rstd))| {
        forward_rows(norm, y, mean, rstd, x, w, b, T::from_f64(eps))
    })
}

kernel! {
    fn backward_rows<'a, T>(
        s: S; norm: Norm, dx: &'a mut [T], beta: Beta, partial: &'a mut [T], dy: &'a [T], x: &'a [T], w: &'a [T],
        mean: &'a [T], rstd: &'a [T],
    ) {
        let cols = w.len();
        let n = T::from_f64(cols as f64);
        let (dw, db) = partial.split_at_mut(partial.len() / 2);
        for ((((dx, dy), x), mean), rstd) in
            dx.chunks_mut(cols).zip(dy.chunks(cols)).zip(x.chunks(cols)).zip(mean).zip(rstd)
        {
            let (m, r) = (s.splat(*mean), s.splat(*rstd));
            // y = xhat · w + b  =>  dw += dy · xhat, db += dy, g = dxhat = dy · w
            let [g, g_xhat] = if dw.is_empty() {
                sums(s, [dy, x, w], #[inline(always)] |[dy, x, w]| {
                    let g = s.mul(dy, w);
                    [g, s.mul(g, s.mul(s.sub(x, m), r))]
                })
            } else {
                sweep(s, [&mut *dw, &mut *db], [dy, x, w], #[inline(always)] |_, [dw, db], [dy, x, w]| {
                    let (g, xhat) = (s.mul(dy, w), s.mul(s.sub(x, m), r));
                    ([s.mul_add(dy, xhat, dw), s.add(db, dy)], [g, s.mul(g, xhat)])
                })
            };
            // xhat = (x − mean) · rstd  =>  dx = rstd · (g − mean of g − xhat · mean of (g · xhat))
            let mean_g = s.splat(if norm == Norm::Layer { g / n } else { T::ZERO });
            let mean_g_xhat = s.splat(g_xhat / n);
            map(s, [dx], [dy, x, w], #[inline(always)] |[dx], [dy, x, w]| {
                let xhat = s.mul(s.sub(x, m), r);
                let centred = s.neg_mul_add(xhat, mean_g_xhat, s.sub(s.mul(dy, w), mean_g));
                [match beta {
                    Beta::Assign => s.mul(centred, r),
                    Beta::Add => s.mul_add(centred, r, dx),
                }]
            });
        }
    }
}

/// dx (+)= the gradient of x. `partials` takes dw and db side by side, (blocks, 2 · cols) as [`super::reduce`] sums them;
/// it is empty where neither is wanted.
pub fn norm_backward<T: Float>(
    norm: Norm,
    dx: &mut [T],
    beta: Beta,
    partials: &mut [T],
    dy: &[T],
    x: &[T],
    w: &[T],
    mean: &[T],
    rstd: &[T],
) -> Result<()> {
    partials.fill(T::ZERO);
    let (n, cols) = (ROW_BLOCK * w.len(), w.len());
    let partials = partials.chunks_mut(2 * cols).map(Some).chain(std::iter::repeat_with(|| None));
    let stats = mean.chunks(ROW_BLOCK).zip(rstd.chunks(ROW_BLOCK));
    let blocks: Vec<_> = dx.chunks_mut(n).zip(partials).zip(dy.chunks(n)).zip(x.chunks(n)).zip(stats).collect();
    for_each(blocks.into_iter(), |((((dx, partial), dy), x), (mean, rstd))| {
        backward_rows(norm, dx, beta, partial.unwrap_or_default(), dy, x, w, mean, rstd)
    })
}

/// [`norm_forward`] in plain words.
pub fn norm_forward_reference<T: Float>(
    norm: Norm,
    y: &mut [T],
    mean: &mut [T],
    rstd: &mut [T],
    x: &[T],
    w: &[T],
    b: &[T],
    eps: f64,
) {
    let cols = w.len();
    for (r, x) in x.chunks(cols).enumerate() {
        let n = cols as f64;
        let average = |f: &dyn Fn(f64) -> f64| x.iter().map(|x| f(x.to_f64())).sum::<f64>() / n;
        let m = if norm == Norm::Layer { average(&|x| x) } else { 0.0 };
        let inverse = 1.0 / (average(&|x| (x - m) * (x - m)) + eps).sqrt();
        for c in 0..cols {
            let xhat = (x[c].to_f64() - m) * inverse;
            y[r * cols + c] = T::from_f64(xhat * w[c].to_f64() + b[c].to_f64());
        }
        (mean[r], rstd[r]) = (T::from_f64(m), T::from_f64(inverse));
    }
}

/// [`norm_backward`] in plain words, with dw and db summed over all rows.
pub fn norm_backward_reference<T: Float>(
    norm: Norm,
    dx: &mut [T],
    dw: &mut [T],
    db: &mut [T],
    dy: &[T],
    x: &[T],
    w: &[T],
    mean: &[T],
    rstd: &[T],
) {
    let cols = w.len();
    let (mut dw_sum, mut db_sum) = (vec![0.0; cols], vec![0.0; cols]);
    for (r, (dy, x)) in dy.chunks(cols).zip(x.chunks(cols)).enumerate() {
        let rstd = rstd[r].to_f64();
        let xhat: Vec<f64> = x.iter().map(|x| (x.to_f64() - mean[r].to_f64()) * rstd).collect();
        let g: Vec<f64> = dy.iter().zip(w).map(|(dy, w)| dy.to_f64() * w.to_f64()).collect();
        let mean_g = if norm == Norm::Layer { g.iter().sum::<f64>() / cols as f64 } else { 0.0 };
        let mean_g_xhat = g.iter().zip(&xhat).map(|(g, xhat)| g * xhat).sum::<f64>() / cols as f64;
        for c in 0..cols {
            dw_sum[c] += dy[c].to_f64() * xhat[c];
            db_sum[c] += dy[c].to_f64();
            dx[r * cols + c] = T::from_f64(rstd * (g[c] - mean_g - xhat[c] * mean_g_xhat));
        }
    }
    for c in 0..cols {
        (dw[c], db[c]) = (T::from_f64(dw_sum[c]), T::from_f64(db_sum[c]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::reduce::{fold_partials, partial_rows};
    use crate::kernels::testing::{assert_close, normal};

    fn check<T: Float>(norm: Norm, rows: usize, cols: usize, tolerance: f64) {
        let [x, dy, w, b]: [Vec<T>; 4] =
            [(rows * cols, 1), (rows * cols, 2), (cols, 3), (cols, 4)].map(|(n, seed)| normal(n, seed));
        let x: Vec<T> = x.iter().map(|x| *x + T::from_f64(5.0)).collect();
        let nan = |n: usize| vec![T::NAN; n];
        let (mut y, mut mean, mut rstd) = (nan(x.len()), nan(rows), nan(rows));
        norm_forward(norm, &mut y, &mut mean, &mut rstd, &x, &w, &b, 1e-5).unwrap();
        let (mut y_expected, mut mean_expected, mut rstd_expected) = (nan(x.len()), nan(rows), nan(rows));
        norm_forward_reference(norm, &mut y_expected, &mut mean_expected, &mut rstd_expected, &x, &w, &b, 1e-5);
        assert_close(&mean, &mean_expected, tolerance);
        assert_close(&rstd, &rstd_expected, 10.0 * tolerance);
        assert_close(&y, &y_expected, 10.0 * tolerance);

        let (mut dx, mut partials) = (nan(x.len()), nan(partial_rows(rows) * 2 * cols));
        norm_backward(norm, &mut dx, Beta::Assign, &mut partials, &dy, &x, &w, &mean, &rstd).unwrap();
        fold_partials(&mut partials, 2 * cols).unwrap();
        let (mut dx_expected, mut dw, mut db) = (nan(x.len()), nan(cols), nan(cols));
        norm_backward_reference(norm, &mut dx_expected, &mut dw, &mut db, &dy, &x, &w, &mean, &rstd);
        assert_close(&dx, &dx_expected, 20.0 * tolerance);
        assert_close(&partials[..cols], &dw, 50.0 * tolerance);
        assert_close(&partials[cols..2 * cols], &db, 50.0 * tolerance);

        // Adding, and without dw and db.
        let mut twice = dx.clone();
        norm_backward(norm, &mut twice, Beta::Add, &mut [], &dy, &x, &w, &mean, &rstd).unwrap();
        let doubled: Vec<T> = dx.iter().map(|dx| *dx + *dx).collect();
        assert_close(&twice, &doubled, 10.0 * tolerance);
    }

    #[test]
    fn norms_equal_their_references() {
        for norm in [Norm::Layer, Norm::Rms] {
            for (rows, cols) in [(0, 5), (1, 1), (3, 8), (64, 33), (65, 100), (700, 31), (2, 20_000)] {
                check::<f32>(norm, rows, cols, 1e-6);
                check::<f64>(norm, rows, cols, 1e-13);
            }
        }
    }

    #[test]
    fn nan_stays_in_its_row() {
        let mut x: Vec<f32> = normal(3 * 20, 1);
        x[25] = f32::NAN;
        let (mut y, mut mean, mut rstd) = (vec![0.0; 60], vec![0.0; 3], vec![0.0; 3]);
        norm_forward(Norm::Layer, &mut y, &mut mean, &mut rstd, &x, &[1.0; 20], &[0.0; 20], 1e-5).unwrap();
        assert!(y[20..40].iter().all(|y| y.is_nan()));
        assert!(y[..20].iter().chain(&y[40..]).all(|y| y.is_finite()));
    }
}
