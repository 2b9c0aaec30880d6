//! Row-major matrices in pooled buffers.

use crate::error::Result;
use crate::simd::{Buffer, Float};
use ndarray::{ArrayView2, ArrayViewMut2};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};

/// A row-major `(rows, cols)` matrix. The buffer behind it may be longer.
#[derive(Debug)]
pub struct Tensor<T> {
    buffer: Buffer<T>,
    rows: usize,
    cols: usize,
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

/// Buffers that wait to be used again: after the first step of a shape, a step allocates nothing large.
#[derive(Debug)]
pub struct Pool<T> {
    free: BTreeMap<usize, Vec<Buffer<T>>>,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { free: BTreeMap::new() }
    }
}

impl<T: Float> Pool<T> {
    /// A matrix whose contents are unspecified: whoever asks writes every element.
    pub fn tensor(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let n = rows * cols;
        // A little slack lets ragged batches share buffers; a lot of it would waste memory.
        let class = size_class(n);
        let found = self.free.range_mut(class..=class.saturating_mul(2)).find_map(|(_, buffers)| buffers.pop());
        let buffer = match found {
            Some(buffer) => buffer,
            None => Buffer::zeroed(class)?,
        };
        Ok(Tensor { buffer, rows, cols })
    }

    /// A matrix of zeros.
    pub fn zeros(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let mut tensor = self.tensor(rows, cols)?;
        tensor.fill(T::ZERO);
        Ok(tensor)
    }

    /// Takes a matrix back.
    pub fn recycle(&mut self, tensor: Tensor<T>) {
        self.free.entry(tensor.buffer.len()).or_default().push(tensor.buffer);
    }

    /// Frees buffers, the largest first, until at most so many bytes wait.
    pub fn shrink(&mut self, most: usize) {
        let mut bytes = self.bytes();
        while bytes > most
            && let Some(mut largest) = self.free.last_entry()
        {
            bytes -= largest.get_mut().pop().map_or(0, |buffer| buffer.len() * size_of::<T>());
            if largest.get().is_empty() {
                largest.remove();
            }
        }
    }

    /// Bytes that wait in the pool.
    pub fn bytes(&self) -> usize {
        self.free.iter().map(|(len, buffers)| len * buffers.len() * size_of::<T>()).sum()
    }
}

/// Rounds up to eight classes per power of two.
fn size_class(n: usize) -> usize {
    let step = (n.max(512).next_power_of_two() / 16).max(64);
    n.max(1).next_multiple_of(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_buffer_is_used_again() {
        let mut pool = Pool::<f32>::default();
        let first = pool.tensor(30, 40).unwrap();
        let address = first.as_ptr();
        pool.recycle(first);
        let again = pool.tensor(29, 40).unwrap();
        assert_eq!(again.as_ptr(), address);
        assert_eq!((again.rows(), again.cols(), again.len()), (29, 40, 29 * 40));
        assert_eq!(pool.bytes(), 0);
    }

    #[test]
    fn a_pool_that_holds_too_much_frees_the_largest_first() {
        let mut pool = Pool::<f32>::default();
        let tensors = [1024, 4096, 4096].map(|n| pool.tensor(1, n).unwrap());
        tensors.into_iter().for_each(|tensor| pool.recycle(tensor));
        for (most, bytes) in [(9 * 4096, 9 * 4096), (9 * 4096 - 1, 5 * 4096), (4 * 4096, 4096), (0, 0)] {
            pool.shrink(most);
            assert_eq!(pool.bytes(), bytes, "{most}");
        }
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for n in (1..100_000).step_by(7) {
            let class = size_class(n);
            assert!(class >= n && (n < 512 || class - n <= n / 8), "{n} -> {class}");
        }
    }
}
