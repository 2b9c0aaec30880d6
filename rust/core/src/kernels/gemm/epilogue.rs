//! What happens to C after its last multiplication, while it is still in the cache.

use crate::ensure;
use crate::error::Result;
use crate::kernels::activation::{Curve, Identity};
use crate::rng::Dropout;
use crate::simd::{Float, Simd};

/// Finishes C. Each element is met once, after its last step along K.
pub trait Epilogue<T: Float>: Sync {
    /// False where there is nothing to do.
    const ACTIVE: bool = true;

    /// Whether it fits a product of `cols` columns.
    fn check(&self, cols: usize) -> Result<()>;

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

    fn check(&self, _: usize) -> Result<()> {
        Ok(())
    }

    #[inline(always)]
    fn finish_from<S: Simd<T>>(&self, s: S, _: usize, _: usize, c: &mut [T], number: impl Fn(usize, &[T]) -> S::V) {
        for (i, c) in c.chunks_mut(S::LANES).enumerate() {
            s.store_first(number(i * S::LANES, c), c);
        }
    }
}

/// y = dropout(activation(c + bias))
#[derive(Debug, Clone, Copy)]
pub struct Affine<'a, T, A = Identity> {
    /// One number per column.
    pub bias: Option<&'a [T]>,
    /// Applied after the bias.
    pub activation: A,
    /// Applied after the activation; an element is decided by its row and column.
    pub dropout: Option<Dropout>,
}

impl<'a, T> Affine<'a, T> {
    /// y = c + bias
    pub fn bias(bias: Option<&'a [T]>) -> Self {
        Affine { bias, activation: Identity, dropout: None }
    }
}

impl<T: Float, A: Curve> Epilogue<T> for Affine<'_, T, A> {
    fn check(&self, cols: usize) -> Result<()> {
        if let Some(bias) = self.bias {
            ensure!(bias.len() == cols, Shape, "gemm: argument `bias`: expected {cols} numbers, got {}", bias.len());
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
        let dropout = self.dropout.map(|d| (d.row(row), d.threshold, s.splat(T::from_f64(d.scale))));
        for (i, c) in c.chunks_mut(S::LANES).enumerate() {
            let mut y = number(i * S::LANES, c);
            if let Some(bias) = bias {
                y = s.add(y, s.load_first(&bias[i * S::LANES..], T::ZERO));
            }
            y = A::value(s, y);
            if let Some((key, threshold, scale)) = dropout {
                let kept = s.keep(key, (column + i * S::LANES) as u32, threshold);
                y = s.select(kept, s.mul(scale, y), s.zero());
            }
            s.store_first(y, c);
        }
    }
}
