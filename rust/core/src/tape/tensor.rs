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
///
/// Backward, gradients of weights take the memory of activations, which have other sizes: what is much longer than asked for
/// is split. Parts are joined when they come back, so that the next step finds what this one found.
#[derive(Debug)]
pub struct Pool<T> {
    free: BTreeMap<usize, Vec<Buffer<T>>>,
    /// What is left of the last block that small buffers were cut from.
    block: Buffer<T>,
    /// Numbers of all buffers that were made.
    made: usize,
}

/// Fewer numbers than this are not worth a buffer of their own.
const LEAST_PART: usize = 1 << 16;
/// Numbers of a block: where there are as many in small buffers, these lie side by side on huge pages.
const BLOCK: usize = 1 << 21;
/// What lies between them, a cache line of f32, so that they are not joined.
const GAP: usize = 16;

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { free: BTreeMap::new(), block: Buffer::default(), made: 0 }
    }
}

impl<T: Float> Pool<T> {
    /// A matrix whose contents are unspecified: whoever asks writes every element.
    pub fn tensor(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let n = rows * cols;
        // A little slack lets ragged batches share buffers; a lot of it would waste memory.
        let class = size_class(n);
        let longest = class.saturating_mul(if class >= LEAST_PART { 4 } else { 2 });
        let found = self.free.range_mut(class..=longest).find_map(|(_, buffers)| buffers.pop());
        let mut buffer = match found {
            Some(buffer) => buffer,
            None => self.make(class)?,
        };
        if buffer.len() - class >= LEAST_PART {
            let rest = buffer.split_off(class);
            self.keep(rest);
        }
        Ok(Tensor { buffer, rows, cols })
    }

    fn make(&mut self, len: usize) -> Result<Buffer<T>> {
        self.made += len;
        if len >= BLOCK / 4 || self.made < BLOCK {
            return Buffer::zeroed(len);
        }
        if self.block.len() < len + GAP {
            let rest = std::mem::replace(&mut self.block, Buffer::zeroed(BLOCK)?);
            self.keep(rest);
        }
        let rest = self.block.split_off(len + GAP);
        let mut buffer = std::mem::replace(&mut self.block, rest);
        buffer.split_off(len);
        Ok(buffer)
    }

    /// A matrix of zeros.
    pub fn zeros(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let mut tensor = self.tensor(rows, cols)?;
        tensor.fill(T::ZERO);
        Ok(tensor)
    }

    /// Takes a matrix back.
    pub fn recycle(&mut self, tensor: Tensor<T>) {
        let mut buffer = tensor.buffer;
        while buffer.is_part()
            && let Some(mut other) = self.neighbour(&buffer)
        {
            if other.touches(&buffer) {
                std::mem::swap(&mut other, &mut buffer);
            }
            buffer.join(other);
        }
        self.keep(buffer);
    }

    fn keep(&mut self, buffer: Buffer<T>) {
        if buffer.is_empty() {
            return;
        }
        self.free.entry(buffer.len()).or_default().push(buffer);
    }

    /// Takes out what lies right before or behind this part.
    fn neighbour(&mut self, part: &Buffer<T>) -> Option<Buffer<T>> {
        self.free.values_mut().find_map(|buffers| {
            let at = buffers.iter().position(|other| other.touches(part) || part.touches(other))?;
            Some(buffers.swap_remove(at))
        })
    }

    /// Frees memory until at most so many bytes wait: whole buffers, the largest first, then all parts, which free nothing alone.
    pub fn shrink(&mut self, most: usize) {
        let mut excess = self.bytes().saturating_sub(most);
        for (len, buffers) in self.free.iter_mut().rev() {
            buffers.retain(|buffer| {
                let goes = excess > 0 && !buffer.is_part();
                if goes {
                    excess = excess.saturating_sub(len * size_of::<T>());
                }
                !goes
            });
        }
        if excess > 0 {
            *self = Pool::default();
        }
    }

    /// Bytes that wait in the pool.
    pub fn bytes(&self) -> usize {
        let free: usize = self.free.iter().map(|(len, buffers)| len * buffers.len()).sum();
        (free + self.block.len()) * size_of::<T>()
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
    fn a_long_buffer_is_split_and_becomes_whole_again() {
        let (mut pool, n) = (Pool::<f32>::default(), LEAST_PART);
        let whole = pool.tensor(4, n).unwrap();
        let address = whole.as_ptr();
        pool.recycle(whole);
        let parts: Vec<_> = [n, 2 * n, n].map(|n| pool.tensor(1, n).unwrap()).into();
        assert_eq!(pool.bytes(), 0, "all parts are of the one buffer");
        let mut starts: Vec<_> = parts.iter().map(|part| part.as_ptr() as usize).collect();
        starts.sort_unstable();
        starts.iter().zip([0, n, 3 * n]).for_each(|(&start, at)| assert_eq!(start, address.wrapping_add(at) as usize));
        parts.into_iter().for_each(|part| pool.recycle(part));
        for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1]] {
            let mut parts: Vec<_> = [n, 2 * n, n].map(|n| Some(pool.tensor(1, n).unwrap())).into();
            order.iter().for_each(|&i| pool.recycle(parts[i].take().unwrap()));
            let whole = pool.tensor(4, n).unwrap();
            assert_eq!((whole.as_ptr(), pool.bytes()), (address, 0), "{order:?}");
            pool.recycle(whole);
        }
    }

    #[test]
    fn many_small_buffers_lie_in_blocks_and_stay_apart() {
        let (mut pool, n) = (Pool::<f32>::default(), LEAST_PART);
        let many = |pool: &mut Pool<f32>| (0..4 * BLOCK / n).map(|_| pool.tensor(1, n).unwrap()).collect::<Vec<_>>();
        let first = many(&mut pool);
        let addresses = |tensors: &[Tensor<f32>]| {
            let mut starts: Vec<_> = tensors.iter().map(|tensor| tensor.as_ptr() as usize).collect();
            starts.sort_unstable();
            starts
        };
        let starts = addresses(&first);
        let side_by_side = starts.windows(2).filter(|pair| pair[1] - pair[0] == (n + GAP) * size_of::<f32>()).count();
        assert!(side_by_side >= 2 * BLOCK / n, "only {side_by_side} are neighbours");
        first.into_iter().for_each(|tensor| pool.recycle(tensor));
        assert_eq!(addresses(&many(&mut pool)), starts, "the second round finds what the first one left");
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
    fn parts_of_blocks_are_freed_together() {
        let (mut pool, n) = (Pool::<f32>::default(), LEAST_PART);
        let many: Vec<_> = (0..2 * BLOCK / n).map(|_| pool.tensor(1, n).unwrap()).collect();
        many.into_iter().for_each(|tensor| pool.recycle(tensor));
        let (all, whole) = (pool.bytes(), pool.free[&n].iter().filter(|buffer| !buffer.is_part()).count());
        assert!(all >= 2 * BLOCK * size_of::<f32>() && whole > 0);
        pool.shrink(all - 1);
        assert_eq!(pool.bytes(), all - n * size_of::<f32>(), "a buffer of its own is enough");
        let parts = all - whole * n * size_of::<f32>();
        pool.shrink(parts);
        assert_eq!(pool.bytes(), parts, "the parts may stay");
        pool.shrink(parts - 1);
        assert_eq!(pool.bytes(), 0);
        let again = pool.tensor(1, n).unwrap();
        pool.recycle(again);
        assert_eq!(pool.bytes(), n * size_of::<f32>());
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for n in (1..100_000).step_by(7) {
            let class = size_class(n);
            assert!(class >= n && (n < 512 || class - n <= n / 8), "{n} -> {class}");
        }
    }
}
