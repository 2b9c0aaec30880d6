//! What happens to C after its last multiplication, while it is still in the cache.

use super::Mat;
use crate::ensure;
use crate::error::Result;
use crate::rng::Dropout;
use crate::simd::{Float, Simd};

/// Finishes C. Each element is met once, after its last step along K.
pub trait Epilogue<T: Float>: Sync {
    /// False where there is nothing to do.
    const ACTIVE: bool = true;

    /// Whether it fits a product of `rows` x `cols`.
    fn check(&self, rows: usize, cols: usize) -> Result<()>;

    /// Finishes row `row` of C from column `column` on: makes `c` out of the numbers that `number` gives, a vector of them from
    /// the i-th on for (i, elements of c from there on). What an element becomes must not depend on where a segment begins or ends.
    /// `#[inline(always)]`.
    fn finish_from<S: Simd<T>>(
        &self,
        s: S,
        row: usize,
        column: usize,
        c: &mut [T],
        number: impl Fn(usize, &[T]) -> S::V,
    );

    /// The same for the numbers that stand in `c`.
    #[inline(always)]
    fn finish<S: Simd<T>>(&self, s: S, row: usize, column: usize, c: &mut [T]) {
        self.finish_from(
            s,
            row,
            column,
            c,
            #[inline(always)]
            |_, c| s.load_first(c, T::ZERO),
        );
    }
}

/// C stays as it is.
#[derive(Debug, Clone, Copy)]
pub struct NoEpilogue;

impl<T: Float> Epilogue<T> for NoEpilogue {
    const ACTIVE: bool = false;

    fn check(&self, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    #[inline(always)]
    fn finish_from<S: Simd<T>>(&self, s: S, _: usize, _: usize, c: &mut [T], number: impl Fn(usize, &[T]) -> S::V) {
        for (i, c) in c.chunks_mut(S::LANES).enumerate() {
            s.store_first(number(i * S::LANES, c), c);
        }
    }
}

/// A function of single numbers, written for vectors.
pub trait Activation<T: Float>: Sync {
    /// Lane by lane; `#[inline(always)]`.
    fn apply<S: Simd<T>>(&self, s: S, x: S::V) -> S::V;
}

/// f(x) = x
#[derive(Debug, Clone, Copy)]
pub struct Identity;

impl<T: Float> Activation<T> for Identity {
    #[inline(always)]
    fn apply<S: Simd<T>>(&self, _: S, x: S::V) -> S::V {
        x
    }
}

/// y = residual + dropout(activation(c + bias))
#[derive(Debug, Clone, Copy)]
pub struct Affine<'a, T, A = Identity> {
    /// One number per column.
    pub bias: Option<&'a [T]>,
    /// Applied after the bias.
    pub activation: A,
    /// Applied after the activation; an element is decided by its row and column.
    pub dropout: Option<Dropout>,
    /// Row-major, added last.
    pub residual: Option<Mat<'a, T>>,
}

impl<'a, T> Affine<'a, T> {
    /// y = c + bias
    pub fn bias(bias: &'a [T]) -> Self {
        Affine { bias: Some(bias), activation: Identity, dropout: None, residual: None }
    }
}

impl<T: Float, A: Activation<T>> Epilogue<T> for Affine<'_, T, A> {
    fn check(&self, rows: usize, cols: usize) -> Result<()> {
        if let Some(bias) = self.bias {
            ensure!(bias.len() == cols, Shape, "gemm: argument `bias`: expected {cols} numbers, got {}", bias.len());
        }
        if let Some(r) = self.residual {
            ensure!(
                r.shape() == (rows, cols) && (r.col_stride == 1 || cols <= 1),
                Shape,
                "gemm: argument `residual`: expected ({rows}, {cols}), row-major, got {:?}",
                r.shape()
            );
        }
        Ok(())
    }

    #[inline(always)]
    fn finish_from<S: Simd<T>>(
        &self,
        s: S,
        row: usize,
        column: usize,
        c: &mut [T],
        number: impl Fn(usize, &[T]) -> S::V,
    ) {
        let bias = self.bias.map(|bias| &bias[column..][..c.len()]);
        let residual = self.residual.map(|r| &r.data[row * r.row_stride + column..][..c.len()]);
        let dropout = self.dropout.map(|d| (d.row(row), d.threshold, s.splat(T::from_f64(d.scale))));
        for (i, c) in c.chunks_mut(S::LANES).enumerate() {
            let mut y = number(i * S::LANES, c);
            if let Some(bias) = bias {
                y = s.add(y, s.load_first(&bias[i * S::LANES..], T::ZERO));
            }
            y = self.activation.apply(s, y);
            if let Some((key, threshold, scale)) = dropout {
                let kept = s.keep(key, (column + i * S::LANES) as u32, threshold);
                y = s.select(kept, s.mul(scale, y), s.zero());
            }
            if let Some(residual) = residual {
                y = s.add(s.load_first(&residual[i * S::LANES..], T::ZERO), y);
            }
            s.store_first(y, c);
        }
    }
}
