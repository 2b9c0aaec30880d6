//! The forward pass, and the weights for whoever asks to see them.

use super::product::{Left, Start, pack, pack_transposed, panels_len, product};
use super::scores::{BLOCK, Block, ROW, advance, drop_weights};
use super::work::{CHUNK, Item};
use super::{Heads, Inputs, KEYS, Out, QUERIES};
use crate::error::Result;
use crate::kernel;
use crate::simd::Float;

/// Numbers of scratch that a task needs.
fn scratch(heads: &Heads) -> usize {
    panels_len(heads.head_dim, KEYS) + panels_len(KEYS, heads.head_dim) + BLOCK + 2 * heads.group() * CHUNK
}

/// out (R, H K) = softmax(scale · Q Kᵀ + bias, where kept) V; `lse` (R, H) gets the log-sum-exp of the scores, −∞ where
/// no key is kept, and the output is 0 there.
pub fn attention_forward<T: Float>(out: &mut [T], lse: Option<&mut [T]>, inputs: &Inputs<'_, T>) -> Result<()> {
    let Heads { n_heads, head_dim, .. } = inputs.heads;
    let out = Out::new(out, n_heads * head_dim);
    let lse = lse.map(|lse| Out::new(lse, n_heads));
    inputs.run(inputs.by_queries(), scratch(&inputs.heads), |item, scratch| {
        forward_item(&out, lse.as_ref(), inputs, item, scratch);
    })
}

fn forward_item<T: Float>(
    out: &Out<'_, T>,
    lse: Option<&Out<'_, T>>,
    inputs: &Inputs<'_, T>,
    item: &Item,
    scratch: &mut [T],
) {
    let Inputs { heads, k, v, sequences, masks, .. } = *inputs;
    let Item { sequence: index, queries, blocks, .. } = item.clone();
    let Heads { head_dim, .. } = heads;
    let (sequence, kv_head) = (sequences[index], item.heads.start / heads.group());

    let (k_panels, rest) = scratch.split_at_mut(panels_len(head_dim, KEYS));
    let (v_panels, rest) = rest.split_at_mut(panels_len(KEYS, head_dim));
    let (x, rest) = rest.split_at_mut(BLOCK);
    // Running maximum and sum of every row: heads first, then queries.
    let states = item.heads.len() * queries.len();
    let (maximum, rest) = rest.split_at_mut(states);
    let sum = &mut rest[..states];
    maximum.fill(T::NEG_INFINITY);
    sum.fill(T::ZERO);
    let mut shrink = [T::ZERO; QUERIES];

    for block in blocks {
        let m = block * KEYS;
        let keys = KEYS.min(masks.visible(&sequence, queries.end - 1) - m);
        let k = pack_transposed(k_panels, k.at(sequence.key + m, kv_head, head_dim), k.stride, keys, head_dim);
        let v = pack(v_panels, v.at(sequence.key + m, kv_head, head_dim), v.stride, keys, head_dim);
        for (g, head) in item.heads.clone().enumerate() {
            for l in queries.clone().step_by(QUERIES) {
                let rows = QUERIES.min(queries.end - l);
                let cols = keys.min(masks.visible(&sequence, l + rows - 1).saturating_sub(m));
                if cols == 0 {
                    continue;
                }
                let block = Block { sequence, index, head, l, rows, m, cols };
                block.scores(x, k, inputs);
                let state = g * queries.len() + l - queries.start;
                advance(x, cols, &mut maximum[state..][..rows], &mut sum[state..][..rows], &mut shrink);
                if let Some(dropout) = masks.dropout {
                    drop_weights(x, block, dropout, heads.n_heads);
                }
                let start = if m == 0 { Start::Zero } else { Start::Scaled(&shrink[..rows]) };
                // SAFETY: rows and columns of this item alone.
                let out = unsafe { out.part(block.query_rows(), head * head_dim..(head + 1) * head_dim) };
                product(out, Left { data: x, row: ROW, col: 1 }, v, rows, head_dim, cols, start);
            }
        }
    }

    for (state, (&maximum, &sum)) in maximum.iter().zip(&*sum).enumerate() {
        let (head, row) =
            (item.heads.start + state / queries.len(), sequence.query + queries.start + state % queries.len());
        // SAFETY: a row and columns of this item alone.
        unsafe {
            finish(out.part(row..row + 1, head * head_dim..(head + 1) * head_dim).row(0), sum);
            if let Some(lse) = lse {
                lse.part(row..row + 1, head..head + 1).row(0)[0] = maximum + sum.ln();
            }
        }
    }
}

kernel! {
    /// y = y / l, 0 where no key was kept. Adding +0 first makes the sign of a zero independent of keys that were not.
    fn finish<'a, T>(s: S; y: &'a mut [T], sum: T) {
        let factor = s.splat(T::ONE / sum);
        for y in y.chunks_mut(S::LANES) {
            let mean = s.mul(s.add(s.load_first(y, T::ZERO), s.zero()), factor);
            s.store_first(if sum == T::ZERO { s.zero() } else { mean }, y);
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
    inputs.run(inputs.by_queries(), scratch(&inputs.heads), |item, scratch| {
        let Item { sequence: index, queries, blocks, .. } = item.clone();
        let sequence = inputs.sequences[index];
        let (k_panels, rest) = scratch.split_at_mut(panels_len(head_dim, KEYS));
        let x = &mut rest[..BLOCK];
        for block in blocks {
            let m = block * KEYS;
            let keys = KEYS.min(inputs.masks.visible(&sequence, queries.end - 1) - m);
            let kv_head = item.heads.start / inputs.heads.group();
            let k = inputs.k.at(sequence.key + m, kv_head, head_dim);
            let k = pack_transposed(k_panels, k, inputs.k.stride, keys, head_dim);
            for head in item.heads.clone() {
                for l in queries.clone().step_by(QUERIES) {
                    let rows = QUERIES.min(queries.end - l);
                    let block = Block { sequence, index, head, l, rows, m, cols: keys };
                    block.weights(x, k, inputs, lse);
                    let to = head * sequence.queries + l;
                    // SAFETY: a part of this item alone.
                    let mut to = unsafe { per_sequence[index].part(to..to + rows, m..m + keys) };
                    x.chunks(ROW).take(rows).enumerate().for_each(|(i, x)| to.row(i).copy_from_slice(&x[..keys]));
                }
            }
        }
    })
}
