//! softmax(scale · Q Kᵀ + bias, where kept) V per sequence and head, forward and backward, without an (L, M) matrix.
//!
//! Work goes in blocks of [`QUERIES`] queries by [`KEYS`] keys, both counted from 0 within the sequence. A row keeps its
//! running maximum m and sum l over the key blocks (Milakov and Gimelshein 2018, Rabe and Staats 2021, Dao et al. 2022);
//! all that is saved for the backward pass is m + log₂ l, the log-sum-exp in units of ln 2. Every number of a row depends on
//! that row, the keys it may see and the two constants; which rows share a block or a task cannot be seen in any bit.

mod backward;
mod cache;
mod forward;
mod mask;
mod product;
mod reference;
mod scores;
mod work;

#[cfg(test)]
mod tests;

pub use backward::{Gradients, Saved, attention_backward, attention_bias_backward};
pub use cache::{Cache, Page};
pub use forward::{attention_forward, attention_weights};
pub use mask::{Grid, Masks};
pub use reference::{attention_backward_reference, attention_reference};

use crate::ensure;
use crate::error::Result;
use crate::simd::Float;
use std::marker::PhantomData;
use std::ops::Range;

/// Queries of a block: whole tiles of every instruction set, and few enough that their scores stay in the L1 cache.
pub(crate) const QUERIES: usize = 48;
/// Keys of a block. Softmax rescales once per block, so bits depend on it.
pub(crate) const KEYS: usize = 128;

/// Sizes of the heads. Query head h reads key/value head h / (n_heads / n_kv_heads) (Ainslie et al. 2023).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key/value heads, a divisor of `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head, K.
    pub head_dim: usize,
    /// What scores are multiplied with.
    pub scale: f64,
}

impl Heads {
    /// Query heads per key/value head.
    pub(crate) fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }
}

/// A matrix whose rows hold the heads side by side.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a, T> {
    /// Begins with row 0 of head 0.
    pub data: &'a [T],
    /// From one row to the next.
    pub stride: usize,
}

impl<'a, T> Operand<'a, T> {
    /// What begins at a row and a head.
    fn at(&self, row: usize, head: usize, head_dim: usize) -> &'a [T] {
        &self.data[row * self.stride + head * head_dim..]
    }
}

/// The rows of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// First row of its queries.
    pub query: usize,
    /// Number of queries, L.
    pub queries: usize,
    /// First row of its keys and values, or its slot of the cache.
    pub key: usize,
    /// Number of keys, M.
    pub keys: usize,
    /// Position of query 0 less position of key 0.
    pub shift: isize,
}

/// The inputs of attention.
#[derive(Clone, Copy)]
pub struct Inputs<'a, T> {
    /// Sizes of the heads.
    pub heads: Heads,
    /// Queries, (R, H K).
    pub q: Operand<'a, T>,
    /// Keys, one row per key.
    pub k: Operand<'a, T>,
    /// Values, one row per key.
    pub v: Operand<'a, T>,
    /// Where keys and values are instead of `k` and `v`; for the forward pass.
    pub cache: Option<Cache<'a, T>>,
    /// Which rows belong together.
    pub sequences: &'a [Sequence],
    /// Which keys a query may see, and what is added to and dropped from it.
    pub masks: Masks<'a, T>,
}

/// A writable matrix, rows `stride` apart. Parts that do not overlap may be written by different tasks.
#[derive(Debug)]
pub struct Out<'a, T> {
    at: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    life: PhantomData<&'a mut T>,
}

// SAFETY: an `Out` is the only way to its elements, like the `&mut [T]` it was made from.
unsafe impl<T: Send> Send for Out<'_, T> {}
// SAFETY: through `&Out` elements are reached by `part` alone, whose caller vouches for them.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<'a, T> Out<'a, T> {
    /// The matrix of `cols` columns whose rows fill `data`.
    pub fn new(data: &'a mut [T], cols: usize) -> Self {
        let rows = data.len().checked_div(cols).unwrap_or(0);
        Out { at: data.as_mut_ptr(), rows, cols, stride: cols, life: PhantomData }
    }

    /// Ranges of columns of that matrix, which must not overlap.
    pub fn columns(data: &'a mut [T], cols: usize, ranges: &[Range<usize>]) -> Result<Vec<Self>> {
        let whole = Out::new(data, cols);
        for (i, a) in ranges.iter().enumerate() {
            ensure!(a.end <= cols, Internal, "columns {a:?} of {cols}");
            let overlap = |b: &Range<usize>| a.start < b.end && b.start < a.end;
            ensure!(!ranges[..i].iter().any(overlap), Internal, "columns {a:?} are given twice");
        }
        // SAFETY: the ranges share no column.
        Ok(ranges.iter().map(|range| unsafe { whole.part(0..whole.rows, range.clone()) }).collect())
    }

    /// A part of the matrix.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    unsafe fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Out<'a, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols);
        // SAFETY: inside the matrix; wrapping, because an empty part may begin behind the last element.
        let at = self.at.wrapping_add(rows.start * self.stride + cols.start);
        Out { at, rows: rows.len(), cols: cols.len(), stride: self.stride, life: PhantomData }
    }

    /// One row.
    fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows);
        // SAFETY: row i has `cols` elements, and `self` is borrowed for as long as they are.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(i * self.stride), self.cols) }
    }

    fn clear(&mut self)
    where
        T: Float,
    {
        (0..self.rows).for_each(|i| self.row(i).fill(T::ZERO));
    }
}
