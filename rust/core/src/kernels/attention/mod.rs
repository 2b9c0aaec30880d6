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

pub use super::out::Out;

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
