//! The forward pass, and the weights for whoever asks to see them.

use super::product::{Left, Start, pack, pack_transposed, packed_len, product, stride};
use super::scores::{BLOCK, Block, Piece, ROW, advance, factor, normalise};
use super::work::{Item, split};
use super::{Heads, Inputs, KEYS, Out, QUERIES};
use crate::error::Result;
use crate::kernel;
use crate::simd::Float;
use std::f64::consts::LOG2_E;

/// out (R, H K) = softmax(scale · Q Kᵀ + bias, where kept) V; `lse` (R, H) gets log₂ Σ eˣ of the scores, −∞ where no key
/// is kept, and the output is 0 there.
pub fn attention_forward<T: Float>(out: &mut [T], lse: Option<&mut [T]>, inputs: &Inputs<'_, T>) -> Result<()> {
    let Heads { n_heads, head_dim, .. } = inputs.heads;
    let out = Out::new(out, n_heads * head_dim);
    let lse = lse.map(|lse| Out::new(lse, n_heads));
    let items = inputs.by_queries();
    let rows = items.iter().map(|item| item.heads.len() * item.queries.len()).max().unwrap_or(0);
    inputs.run(items, scratch(head_dim, rows).iter().sum(), |item, next, scratch| {
        forward_item(&out, lse.as_ref(), inputs, item, next, scratch);
    })
}

/// Numbers of scratch for `rows` queries: Kᵀ, V, a block of scores; Q and y; the running maximum and sum of every row.
fn scratch(head_dim: usize, rows: usize) -> [usize; 7] {
    let (keys, queries) = (packed_len(KEYS, head_dim), packed_len(rows, head_dim));
    [packed_len(head_dim, KEYS), keys, BLOCK, queries, queries, rows, rows]
}

fn forward_item<T: Float>(
    out: &Out<'_, T>,
    lse: Option<&Out<'_, T>>,
    inputs: &Inputs<'_, T>,
    item: &Item,
    next: Option<&Item>,
    scratch: &mut [T],
) {
    let Inputs { heads, q, k, v, cache, sequences, masks } = *inputs;
    let Item { sequence: index, queries, blocks, .. } = item.clone();
    let Heads { n_heads, head_dim, .. } = heads;
    let (sequence, kv_head) = (sequences[index], item.heads.start / heads.group());
    let next = next.map(|next| (sequences[next.sequence], next.heads.start / heads.group()));
    if let (Some((next, kv_head)), Some(cache)) = (next, cache) {
        cache.prefetch(next.key, kv_head, next.keys);
    }

    let rows = item.heads.len() * queries.len();
    let [kt, v_rows, x, q_rows, y, maximum, sum] = split(scratch, self::scratch(head_dim, rows));
    maximum.fill(T::NEG_INFINITY);
    sum.fill(T::ZERO);
    let mut shrink = [T::ZERO; QUERIES];
    let width = stride(head_dim);
    // Rows of scratch: heads first, then queries.
    for (head, q_rows) in item.heads.clone().zip(q_rows.chunks_mut((queries.len() * width).max(1))) {
        let q_head = q.at(sequence.query + queries.start, head, head_dim);
        pack(q_rows, q_head, q.stride, queries.len(), head_dim, factor(heads.scale));
    }

    for block in blocks {
        let m = block * KEYS;
        let keys = KEYS.min(masks.visible(&sequence, queries.end - 1) - m);
        let pieces: Vec<_> = match cache {
            Some(cache) => {
                let next = next.map(|(next, kv_head)| (next.key, kv_head));
                cache.pieces(kt, (sequence.key, sequence.keys), kv_head, m, keys, next).collect()
            }
            None => {
                let key = sequence.key + m;
                let kt = pack_transposed(kt, k.at(key, kv_head, head_dim), k.stride, keys, head_dim);
                let v = pack(v_rows, v.at(key, kv_head, head_dim), v.stride, keys, head_dim, T::ONE);
                vec![Piece { at: 0, keys, kt, v }]
            }
        };
        for (g, head) in item.heads.clone().enumerate() {
            for l in queries.clone().step_by(QUERIES) {
                let rows = QUERIES.min(queries.end - l);
                let cols = keys.min(masks.visible(&sequence, l + rows - 1).saturating_sub(m));
                if cols == 0 {
                    continue;
                }
                let block = Block { sequence, index, head, l, rows, m, cols };
                let first = g * queries.len() + l - queries.start;
                let q = Left { data: &q_rows[first * width..], row: width, col: 1 };
                block.scores(x, q, block.seen(&pieces).map(|piece| (piece.at, piece.keys, piece.kt)), inputs);
                let (maximum, sum) = (&mut maximum[first..][..rows], &mut sum[first..][..rows]);
                advance(x, block, maximum, sum, &mut shrink, masks.dropout, n_heads);
                let start = if m == 0 { Start::Zero } else { Start::Scaled(&shrink[..rows]) };
                let y = &mut y[first * width..];
                for Piece { at, keys, v, .. } in block.seen(&pieces) {
                    let start = if at == 0 { start } else { Start::Sum };
                    let x = Left { data: &x[at..], row: ROW, col: 1 };
                    product(y, width, x, v, rows, head_dim, keys, start);
                }
            }
        }
    }

    let query_rows = sequence.query + queries.start..sequence.query + queries.end;
    for (g, head) in item.heads.clone().enumerate() {
        let first = g * queries.len();
        let (maximum, sum) = (&maximum[first..][..queries.len()], &sum[first..][..queries.len()]);
        // SAFETY: rows and columns of this item alone.
        unsafe {
            finish(out.part(query_rows.clone(), head * head_dim..(head + 1) * head_dim), &y[first * width..], sum);
            if let Some(lse) = lse {
                let mut lse = lse.part(query_rows.clone(), head..head + 1);
                for (i, (&maximum, &sum)) in maximum.iter().zip(sum).enumerate() {
                    lse.row(i)[0] = maximum + sum.ln() * T::from_f64(LOG2_E);
                }
            }
        }
    }
}

kernel! {
    /// out = y / l, 0 where no key was kept. Adding +0 first makes the sign of a zero independent of keys that were not.
    fn finish<'a, T>(s: S; out: Out<'a, T>, y: &'a [T], sum: &'a [T]) {
        let mut out = out;
        for (i, (y, &sum)) in y.chunks(stride(out.cols)).zip(sum).enumerate() {
            let factor = s.splat(T::ONE / sum);
            for (out, y) in out.row(i).chunks_mut(S::LANES).zip(y.chunks_exact(S::LANES)) {
                let mean = s.mul(s.add(s.load(y), s.zero()), factor);
                s.store_first(if sum == T::ZERO { s.zero() } else { mean }, out);
            }
        }
    }
}

/// The weights before dropout, (H, L, M) of one sequence after the other, from the same scores and `lse`. Every element
/// of `weights` that no query may see is left as it is: 0 is expected there.
pub fn attention_weights<T: Float>(weights: &mut [T], lse: &[T], inputs: &Inputs<'_, T>) -> Result<()> {
    let Heads { n_heads, head_dim, .. } = inputs.heads;
    let mut rest = weights;
    let per_sequence: Vec<_> = inputs
        .sequences
        .iter()
        .map(|s| {
            let (weights, behind) = std::mem::take(&mut rest).split_at_mut(n_heads * s.queries * s.keys);
            rest = behind;
            Out::new(weights, s.keys)
        })
        .collect();
    let parts = [packed_len(head_dim, KEYS), packed_len(QUERIES, head_dim), BLOCK];
    inputs.run(inputs.by_queries(), parts.iter().sum(), |item, _, scratch| {
        let Item { sequence: index, queries, blocks, .. } = item.clone();
        let Inputs { heads, q, k, cache, sequences, masks, .. } = *inputs;
        let (sequence, kv_head) = (sequences[index], item.heads.start / heads.group());
        let [kt, q_rows, x] = split(scratch, parts);
        for block in blocks {
            let m = block * KEYS;
            let keys = KEYS.min(masks.visible(&sequence, queries.end - 1) - m);
            let keys_of: Vec<_> = match cache {
                Some(cache) => {
                    let pieces = cache.pieces(kt, (sequence.key, sequence.keys), kv_head, m, keys, None);
                    pieces.map(|piece| (piece.at, piece.keys, piece.kt)).collect()
                }
                None => {
                    let k_block = k.at(sequence.key + m, kv_head, head_dim);
                    vec![(0, keys, pack_transposed(kt, k_block, k.stride, keys, head_dim))]
                }
            };
            for head in item.heads.clone() {
                for l in queries.clone().step_by(QUERIES) {
                    let rows = QUERIES.min(queries.end - l);
                    let block = Block { sequence, index, head, l, rows, m, cols: keys };
                    let q_block = q.at(sequence.query + l, head, head_dim);
                    let q = pack(q_rows, q_block, q.stride, rows, head_dim, factor(heads.scale));
                    block.scores(x, q.left(), keys_of.iter().copied(), inputs);
                    normalise(x, block, lse, n_heads);
                    let to = head * sequence.queries + l;
                    // SAFETY: a part of this item alone.
                    let mut to = unsafe { per_sequence[index].part(to..to + rows, m..m + keys) };
                    x.chunks(ROW).take(rows).enumerate().for_each(|(i, x)| to.row(i).copy_from_slice(&x[..keys]));
                }
            }
        }
    })
}
