//! Multi-head attention (section 3.2.2, figure 2 right).

use super::{KeyValueCache, Linear};
use crate::ensure;
use crate::error::Result;
use crate::ops::{self, Columns, Heads, KeysValues, Masks};
use crate::rows::Rows;
use crate::simd::Float;
use crate::tape::{Builder, Params, Tape, Var};

/// Sizes of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Width of the input and the output.
    pub d_model: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key/value heads; query heads share them in turn (Ainslie et al. 2023).
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// What scores are multiplied with; 1/√K in the paper.
    pub scale: f64,
    /// Biases in the projections.
    pub bias: bool,
    /// Dropout on the attention weights.
    pub dropout: f64,
}

impl AttentionConfig {
    /// The paper's sizes: K = D / H, one key/value head per query head, scale 1/√K.
    pub fn new(d_model: usize, n_heads: usize) -> Result<Self> {
        ensure!(
            n_heads > 0 && d_model > 0 && d_model.is_multiple_of(n_heads),
            Config,
            "attention: d_model = {d_model} is not a positive multiple of n_heads = {n_heads}; choose n_heads that divides d_model"
        );
        let head_dim = d_model / n_heads;
        let scale = (head_dim as f64).sqrt().recip();
        Ok(AttentionConfig { d_model, n_heads, n_kv_heads: n_heads, head_dim, scale, bias: true, dropout: 0.0 })
    }
}

/// Where keys and values come from.
pub enum Source<'a, T> {
    /// Self-attention.
    Itself,
    /// Self-attention of new rows over all rows so far: theirs are appended to the cache first.
    Growing(&'a mut KeyValueCache<T>),
    /// Cross-attention to the rows of `memory`.
    Memory(Var, &'a Rows),
    /// Cross-attention to keys and values projected before, by [`MultiHeadAttention::project_memory`].
    Projected(&'a KeyValueCache<T>),
}

/// Concat(head_1, .., head_h) W_O with head_i = Attention(Q W_Q, K W_K, V W_V).
#[derive(Clone, Debug)]
pub struct MultiHeadAttention {
    qkv: Linear,
    q: Linear,
    kv: Linear,
    out: Linear,
    heads: Heads,
    dropout: (u32, f64),
}

impl MultiHeadAttention {
    /// Declares `q`, `k`, `v` (stored side by side) and `out`.
    pub fn new(b: &mut Builder, config: &AttentionConfig) -> Self {
        let &AttentionConfig { d_model, n_heads, n_kv_heads, head_dim, scale, bias, dropout } = config;
        let (queries, keys) = (n_heads.saturating_mul(head_dim), n_kv_heads.saturating_mul(head_dim));
        let qkv = Linear::group(b, &[("q", queries), ("k", keys), ("v", keys)], d_model, bias);
        MultiHeadAttention {
            q: qkv.members(0..1),
            kv: qkv.members(1..3),
            qkv,
            out: Linear::new(b, "out", queries, d_model, bias),
            heads: Heads { n_heads, n_kv_heads, head_dim, scale },
            dropout: (b.site(), dropout),
        }
    }

    /// x (R, D) and what it attends to -> (R, D)
    pub fn forward<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        x: Var,
        rows: &Rows,
        source: Source<'_, T>,
        masks: &Masks<'_>,
    ) -> Result<Var> {
        let masks = Masks { dropout: Some(self.dropout), ..*masks };
        // Widths of the query columns and of the key columns: values stand behind the keys.
        let (queries, keys) = (self.heads.n_heads * self.heads.head_dim, self.kv_width());
        tape.scope(|tape| {
            let (q, keys_values) = match source {
                Source::Itself => {
                    let qkv = self.qkv.forward(tape, params, x)?;
                    let k = Columns { var: qkv, start: queries };
                    let v = Columns { var: qkv, start: queries + keys };
                    (qkv, KeysValues::Packed { k, v, rows })
                }
                Source::Growing(cache) => {
                    let qkv = self.qkv.forward(tape, params, x)?;
                    cache.append(tape.value(qkv)?, queries + 2 * keys, queries, queries + keys, rows)?;
                    (qkv, cache.view())
                }
                Source::Memory(memory, rows) => {
                    let q = self.q.forward(tape, params, x)?;
                    let kv = self.kv.forward(tape, params, memory)?;
                    let (k, v) = (Columns { var: kv, start: 0 }, Columns { var: kv, start: keys });
                    (q, KeysValues::Packed { k, v, rows })
                }
                Source::Projected(cache) => (self.q.forward(tape, params, x)?, cache.view()),
            };
            let heads = ops::attention(tape, Columns { var: q, start: 0 }, rows, keys_values, self.heads, &masks)?;
            self.out.forward(tape, params, heads)
        })
    }

    /// The keys and values of a memory, projected once for all steps of a decoding.
    pub fn project_memory<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        memory: Var,
        rows: &Rows,
    ) -> Result<KeyValueCache<T>> {
        let kv = self.kv.forward(tape, params, memory)?;
        let mut cache = self.cache(rows.sequences());
        cache.append(tape.value(kv)?, 2 * self.kv_width(), 0, self.kv_width(), rows)?;
        let kv = tape.take(kv)?;
        tape.pool.recycle(kv);
        Ok(cache)
    }

    /// An empty cache for [`Source::Growing`].
    pub fn cache<T: Float>(&self, sequences: usize) -> KeyValueCache<T> {
        KeyValueCache::new(sequences, self.heads.n_kv_heads, self.heads.head_dim)
    }

    fn kv_width(&self) -> usize {
        self.heads.n_kv_heads * self.heads.head_dim
    }
}
