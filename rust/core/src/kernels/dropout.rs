//! Dropout (Srivastava and others 2014), with the residual connection that often follows it.

use super::lanes::sweep;
use super::task_len;
use crate::error::Result;
use crate::kernel;
use crate::rng::Dropout;
use crate::simd::{Float, keep_scalar};
use crate::threads::{for_each, rows_per_task};

/// z = x + dropout(y), row by row of `cols` columns; `x` is zero where absent. The gradient of `y` is the same function
/// of dz. An element is decided by its row and column.
pub fn dropout_rows<T: Float>(z: &mut [T], x: Option<&[T]>, y: &[T], cols: usize, dropout: &Dropout) -> Result<()> {
    kernel! {
        fn with_residual<'a, T>(s: S; z: &'a mut [T], x: &'a [T], y: &'a [T], cols: usize, first_row: usize, dropout: &'a Dropout) {
            let scale = s.splat(T::from_f64(dropout.scale));
            for (r, ((z, x), y)) in z.chunks_mut(cols).zip(x.chunks(cols)).zip(y.chunks(cols)).enumerate() {
                let key = dropout.row(first_row + r);
                let [] = sweep(s, [z], [x, y], #[inline(always)] |i, _, [x, y]| {
                    let kept = s.keep(key, i as u32, dropout.threshold);
                    ([s.select(kept, s.mul_add(scale, y, x), x)], [])
                });
            }
        }
    }
    kernel! {
        fn alone<'a, T>(s: S; z: &'a mut [T], y: &'a [T], cols: usize, first_row: usize, dropout: &'a Dropout) {
            let scale = s.splat(T::from_f64(dropout.scale));
            for (r, (z, y)) in z.chunks_mut(cols).zip(y.chunks(cols)).enumerate() {
                let key = dropout.row(first_row + r);
                let [] = sweep(s, [z], [y], #[inline(always)] |i, _, [y]| {
                    ([s.select(s.keep(key, i as u32, dropout.threshold), s.mul(scale, y), s.zero())], [])
                });
            }
        }
    }
    let (n, rows, cols) = (task_len(cols), rows_per_task(cols), cols.max(1));
    match x {
        Some(x) => for_each(z.chunks_mut(n).zip(x.chunks(n)).zip(y.chunks(n)).enumerate(), |(task, ((z, x), y))| {
            with_residual(z, x, y, cols, task * rows, dropout)
        }),
        None => for_each(z.chunks_mut(n).zip(y.chunks(n)).enumerate(), |(task, (z, y))| {
            alone(z, y, cols, task * rows, dropout)
        }),
    }
}

/// [`dropout_rows`] in plain words.
pub fn dropout_rows_reference<T: Float>(z: &mut [T], x: Option<&[T]>, y: &[T], cols: usize, dropout: &Dropout) {
    for e in 0..z.len() {
        let kept = keep_scalar(dropout.row(e / cols), (e % cols) as u32, dropout.threshold);
        let y = if kept { y[e] * T::from_f64(dropout.scale) } else { T::ZERO };
        z[e] = x.map_or(T::ZERO, |x| x[e]) + y;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::normal;
    use crate::rng::Key;

    #[test]
    fn rows_equal_the_reference_and_the_rate_is_p() {
        let dropout = Dropout::new(Key::new(9), 0.25);
        for (rows, cols) in [(0, 4), (1, 1), (5, 7), (300, 130)] {
            let (x, y): (Vec<f32>, Vec<f32>) = (normal(rows * cols, 1), normal(rows * cols, 2));
            for x in [None, Some(&x[..])] {
                let (mut z, mut expected) = (vec![f32::NAN; y.len()], vec![f32::NAN; y.len()]);
                dropout_rows(&mut z, x, &y, cols, &dropout).unwrap();
                dropout_rows_reference(&mut expected, x, &y, cols, &dropout);
                crate::kernels::testing::assert_close(&z, &expected, 1e-6);
                if rows == 300 && x.is_none() {
                    let dropped = z.iter().filter(|&&z| z == 0.0).count() as f64 / z.len() as f64;
                    assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
                }
            }
        }
    }
}
