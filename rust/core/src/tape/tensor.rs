//! Row-major matrices in pooled buffers.

use crate::error::Result;
use crate::simd::{Buffer, Float};
use ndarray::{ArrayView2, ArrayViewMut2};
use std::ops::{Deref, DerefMut};

/// A row-major `(rows, cols)` matrix. The buffer behind it may be longer.
#[derive(Debug)]
pub struct Tensor<T> {
    pub(super) buffer: Buffer<T>,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl<T: Float> Tensor<T> {
    /// A matrix outside any pool, filled from a slice of `rows * cols` values.
    pub fn from_slice(rows: usize, cols: usize, values: &[T]) -> Result<Self> {
        let mut tensor = Tensor { buffer: Buffer::zeroed(rows * cols)?, rows, cols };
        tensor.copy_from_slice(values);
        Ok(tensor)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// One row.
    pub fn row(&self, i: usize) -> &[T] {
        &self[i * self.cols..][..self.cols]
    }

    /// The matrix as ndarray sees it.
    pub fn view(&self) -> ArrayView2<'_, T> {
        ArrayView2::from_shape((self.rows, self.cols), self).expect("a tensor holds rows * cols values")
    }

    /// The matrix as ndarray sees it, writable.
    pub fn view_mut(&mut self) -> ArrayViewMut2<'_, T> {
        ArrayViewMut2::from_shape((self.rows, self.cols), self).expect("a tensor holds rows * cols values")
    }
}

impl<T: Float> Deref for Tensor<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.buffer[..self.rows * self.cols]
    }
}

impl<T: Float> DerefMut for Tensor<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let n = self.rows * self.cols;
        &mut self.buffer[..n]
    }
}
