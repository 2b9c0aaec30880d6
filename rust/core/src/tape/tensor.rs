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
/// Large ones are cut from blocks and joined again with their neighbours, so that in the backward pass gradients of weights take
/// the memory of activations, which have other sizes. Small ones stay as they were made.
#[derive(Debug)]
pub struct Pool<T> {
    /// No two of them are neighbours.
    large: Vec<Buffer<T>>,
    small: BTreeMap<usize, Vec<Buffer<T>>>,
    /// What is left of the last block that small buffers were cut from.
    block: Buffer<T>,
    /// Numbers of all memory that came from the system and was not freed.
    held: usize,
}

/// The most numbers of a small buffer; what is left of a large one is longer too.
const SMALL: usize = 1 << 16;
/// Numbers of a block at most, where fewer suffice: half a GiB of f32.
const LONGEST: usize = 1 << 27;
/// Numbers of a block of small buffers: where there are as many, these lie side by side on huge pages.
const BLOCK: usize = 1 << 21;
/// Large buffers have whole pages of f32, and a cache line more: equal places in two of them are not equal places in a page.
const PAGE: usize = 1 << 10;
const GAP: usize = 16;

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { large: Vec::new(), small: BTreeMap::new(), block: Buffer::default(), held: 0 }
    }
}

impl<T: Float> Pool<T> {
    /// A matrix whose contents are unspecified: whoever asks writes every element.
    pub fn tensor(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let n = rows * cols;
        let buffer = if n <= SMALL { self.small(size_class(n)) } else { self.large(n.next_multiple_of(PAGE) + GAP) }?;
        Ok(Tensor { buffer, rows, cols })
    }

    /// The shortest that suffices, cut to the length.
    fn large(&mut self, len: usize) -> Result<Buffer<T>> {
        let enough = self.large.iter().enumerate().filter(|(_, buffer)| buffer.len() >= len);
        let mut buffer = match enough.min_by_key(|(_, buffer)| buffer.len()).map(|(at, _)| at) {
            Some(at) => self.large.swap_remove(at),
            // A block is as long as all before it, so that there are few, and its pages come when they are first used. Where the
            // system does not promise so many, one that suffices.
            None => self.make(len.max(self.held.min(LONGEST))).or_else(|_| self.make(len))?,
        };
        if buffer.len() - len > SMALL {
            let rest = buffer.split_off(len);
            self.large.push(rest);
        }
        Ok(buffer)
    }

    /// One of the same or a slightly higher class.
    fn small(&mut self, len: usize) -> Result<Buffer<T>> {
        if let Some((_, buffers)) = self.small.range_mut(len..=2 * len).find(|(_, buffers)| !buffers.is_empty()) {
            return Ok(buffers.pop().expect("it is not empty"));
        }
        if self.held < BLOCK {
            return self.make(len);
        }
        if self.block.len() < len + GAP {
            self.block = self.make(BLOCK)?;
        }
        let rest = self.block.split_off(len + GAP);
        let mut buffer = std::mem::replace(&mut self.block, rest);
        buffer.split_off(len);
        Ok(buffer)
    }

    fn make(&mut self, len: usize) -> Result<Buffer<T>> {
        let buffer = Buffer::zeroed(len)?;
        self.held += len;
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
        if buffer.len() <= SMALL {
            self.small.entry(buffer.len()).or_default().push(buffer);
            return;
        }
        while let Some(at) = self.large.iter().position(|other| other.touches(&buffer) || buffer.touches(other)) {
            let mut other = self.large.swap_remove(at);
            if other.touches(&buffer) {
                std::mem::swap(&mut other, &mut buffer);
            }
            buffer.join(other);
        }
        self.large.push(buffer);
    }

    /// Frees memory until at most so many bytes wait: whole blocks, the largest first, then all small buffers.
    pub fn shrink(&mut self, most: usize) {
        let mut excess = self.bytes().saturating_sub(most);
        self.large.sort_unstable_by_key(|buffer| std::cmp::Reverse(buffer.len()));
        self.large.retain(|buffer| {
            let goes = excess > 0 && !buffer.is_part();
            if goes {
                excess = excess.saturating_sub(buffer.len() * size_of::<T>());
                self.held = self.held.saturating_sub(buffer.len());
            }
            !goes
        });
        if excess > 0 {
            *self = Pool::default();
        }
    }

    /// Bytes that wait in the pool.
    pub fn bytes(&self) -> usize {
        let small: usize = self.small.iter().map(|(len, buffers)| len * buffers.len()).sum();
        let large: usize = self.large.iter().map(|buffer| buffer.len()).sum();
        (small + large + self.block.len()) * size_of::<T>()
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
    use crate::rng::Key;

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
        let (mut pool, n) = (Pool::<f32>::default(), 2 * SMALL);
        let whole = pool.tensor(4, n).unwrap();
        let (address, bytes) = (whole.as_ptr(), (4 * n + GAP) * size_of::<f32>());
        pool.recycle(whole);
        for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1]] {
            let mut parts: Vec<_> = [n, n / 2 + 1, n].map(|n| Some(pool.tensor(1, n).unwrap())).into();
            let mut starts: Vec<_> = parts.iter().flatten().map(|part| part.as_ptr() as usize).collect();
            starts.sort_unstable();
            assert!(starts[0] == address as usize && starts[2] < address as usize + bytes, "all are of the one buffer");
            order.iter().for_each(|&i| pool.recycle(parts[i].take().unwrap()));
            assert_eq!((pool.large.len(), pool.bytes()), (1, bytes), "{order:?}");
        }
        assert_eq!(pool.tensor(4, n).unwrap().as_ptr(), address);
    }

    #[test]
    fn the_shortest_buffer_that_suffices_is_taken() {
        let (mut pool, n) = (Pool::<f32>::default(), 2 * SMALL);
        let [short, long] = [3, 8].map(|rows| pool.tensor(rows, n).unwrap());
        let (at_short, at_long) = (short.as_ptr(), long.as_ptr());
        [long, short].into_iter().for_each(|tensor| pool.recycle(tensor));
        let taken = [2, 8].map(|rows| pool.tensor(rows, n).unwrap());
        assert_eq!([taken[0].as_ptr(), taken[1].as_ptr()], [at_short, at_long]);
    }

    #[test]
    fn blocks_grow_so_that_the_second_round_finds_what_the_first_left() {
        let (mut pool, n) = (Pool::<f32>::default(), 2 * SMALL);
        let mut bytes = Vec::new();
        for _ in 0..2 {
            let many: Vec<_> = (0..100).map(|_| pool.tensor(1, n).unwrap()).collect();
            many.into_iter().for_each(|tensor| pool.recycle(tensor));
            assert!(pool.large.len() <= 8, "{} blocks", pool.large.len());
            bytes.push(pool.bytes());
            let one = pool.tensor(30, n).unwrap();
            pool.recycle(one);
        }
        assert_eq!(bytes[0], bytes[1], "the one came out of what many left, and broke nothing");
    }

    #[test]
    fn a_block_has_its_limit_and_a_refusal_leaves_the_pool_as_it_was() {
        let (mut pool, n) = (Pool::<f32>::default(), 2 * SMALL);
        pool.held = usize::MAX / 16;
        drop(pool.tensor(1, n).unwrap());
        assert_eq!(pool.bytes(), (LONGEST - n - GAP) * size_of::<f32>());
        // More than there are addresses.
        let error = pool.tensor(1, usize::MAX / 32).unwrap_err();
        assert!(matches!(error, crate::error::Error::OutOfMemory(_)), "{error}");
        assert_eq!(pool.bytes(), (LONGEST - n - GAP) * size_of::<f32>());
    }

    #[test]
    fn tensors_never_overlap_and_all_parts_find_together_again() {
        let key = Key::new(4);
        let (mut pool, mut out) = (Pool::<f32>::default(), Vec::<(Tensor<f32>, f32)>::new());
        for i in 0..2000 {
            if key.below(3 * i, 100) < 52 {
                let n = 1 << key.below(3 * i + 1, 20);
                let mut tensor = pool.tensor(1, n + key.below(3 * i + 2, n as u64) as usize).unwrap();
                tensor.fill(i as f32);
                out.push((tensor, i as f32));
            } else if !out.is_empty() {
                let (tensor, mark) = out.swap_remove(key.below(3 * i + 1, out.len() as u64) as usize);
                assert!(tensor.iter().all(|&x| x == mark), "tensor {mark} was written to by another");
                pool.recycle(tensor);
            }
            let mut free = pool.large.iter().enumerate();
            assert!(free.all(|(at, a)| pool.large[at + 1..].iter().all(|b| !a.touches(b) && !b.touches(a))));
        }
        out.into_iter().for_each(|(tensor, _)| pool.recycle(tensor));
        assert!(pool.large.iter().all(|buffer| !buffer.is_part()), "a part is missing");
    }

    #[test]
    fn many_small_buffers_lie_in_blocks_and_stay_apart() {
        let (mut pool, n) = (Pool::<f32>::default(), SMALL);
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
    fn a_pool_that_holds_too_much_frees_whole_blocks_first() {
        let (mut pool, n) = (Pool::<f32>::default(), 2 * SMALL);
        let bytes = |rows: usize| (rows * n + GAP) * size_of::<f32>();
        let mut out = Vec::new();
        for rows in [1, 2, 4] {
            out.push(pool.tensor(rows, n).unwrap());
        }
        out.drain(..).for_each(|tensor| pool.recycle(tensor));
        let all = bytes(1) + bytes(2) + bytes(4);
        for (most, left) in [(all, all), (all - 1, all - bytes(4)), (bytes(2), bytes(1)), (0, 0)] {
            pool.shrink(most);
            assert_eq!(pool.bytes(), left, "{most}");
        }
        let part = pool.tensor(4, n).unwrap();
        pool.recycle(part);
        let part = pool.tensor(1, n).unwrap();
        pool.shrink(0);
        assert_eq!(pool.bytes(), 0, "what is left of a block goes when the block goes");
        pool.recycle(part);
        pool.shrink(0);
        assert_eq!(pool.bytes(), 0);
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for n in (1..100_000).step_by(7) {
            let class = size_class(n);
            assert!(class >= n && (n < 512 || class - n <= n / 8), "{n} -> {class}");
        }
    }
}
