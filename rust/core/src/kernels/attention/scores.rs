//! One block of scores, from the products q · k to weights and back to their gradients.
//!
//! A score of −∞ is what "not kept" means from here on: its weight is exactly 0, in softmax and in the backward pass,
//! whatever stands in the key or the value.

use super::mask::{Masks, Plane};
use super::product::{Left, Panels, Start, product};
use super::{Inputs, KEYS, Out, QUERIES, Sequence};
use crate::kernel;
use crate::rng::Dropout;
use crate::simd::{Float, MAX_LANES, math};
use std::ops::Range;

/// From one row of a block to the next. A power of two would put the elements of a column into few cache sets.
pub(super) const ROW: usize = KEYS + MAX_LANES;
/// Numbers of a block.
pub(super) const BLOCK: usize = QUERIES * ROW;

/// `rows` queries of a head from query `l` on against `cols` keys from key `m` on.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub sequence: Sequence,
    /// Number of the sequence.
    pub index: usize,
    pub head: usize,
    pub l: usize,
    pub rows: usize,
    pub m: usize,
    pub cols: usize,
}

impl Block {
    /// The rows of its queries in the batch.
    pub fn query_rows(&self) -> Range<usize> {
        self.sequence.query + self.l..self.sequence.query + self.l + self.rows
    }

    /// x = the scores
    pub fn scores<T: Float>(&self, x: &mut [T], k: Panels<'_, T>, inputs: &Inputs<'_, T>) {
        let Inputs { heads, q, masks, .. } = inputs;
        let q = Left { data: q.at(self.query_rows().start, self.head, heads.head_dim), row: q.stride, col: 1 };
        product(Out::new(x, ROW), q, k, self.rows, self.cols, heads.head_dim, Start::Zero);
        mask(x, *self, *masks, T::from_f64(heads.scale));
    }

    /// x = the weights before dropout
    pub fn weights<T: Float>(&self, x: &mut [T], k: Panels<'_, T>, inputs: &Inputs<'_, T>, lse: &[T]) {
        self.scores(x, k, inputs);
        weights(x, *self, lse, inputs.heads.n_heads);
    }

    /// Dropout's key of row `i` of the block.
    fn row_key(&self, dropout: &Dropout, i: usize, n_heads: usize) -> [u32; 2] {
        dropout.row((self.query_rows().start + i) * n_heads + self.head)
    }
}

kernel! {
    /// Turns products q · k into scores. Columns behind the block, to the end of a vector, become −∞ too.
    fn mask<'a, T>(s: S; x: &'a mut [T], block: Block, masks: Masks<'a, T>, scale: T) {
        let Block { sequence, index, head, l, rows, m, cols } = block;
        let factor = s.splat(scale);
        let bias = masks.bias.map(|grid| grid.block(index, head, l, m));
        let keep = masks.keep.map(|grid| grid.block(index, head, l, m));
        for (i, x) in x.chunks_mut(ROW).take(rows).enumerate() {
            let visible = masks.visible(&sequence, l + i).saturating_sub(m).min(cols);
            for (j, x) in (0..cols).step_by(S::LANES).zip(x.chunks_exact_mut(S::LANES)) {
                let mut score = s.mul(s.load(x), factor);
                if let Some(Plane { data, row, col }) = bias {
                    let bias = &data[i * row..];
                    score = s.add(score, if col == 0 { s.splat(bias[0]) } else { s.load_first(&bias[j..cols], T::ZERO) });
                }
                if visible < j + S::LANES {
                    score = s.select(s.first(visible.saturating_sub(j)), score, s.splat(T::NEG_INFINITY));
                }
                s.store(score, x);
            }
            if let Some(Plane { data, row, col }) = keep {
                let keep = &data[i * row..];
                let x = &mut x[..visible];
                if col == 0 {
                    x.iter_mut().filter(|_| !keep[0]).for_each(|x| *x = T::NEG_INFINITY);
                } else {
                    x.iter_mut().zip(keep).for_each(|(x, &keep)| *x = if keep { *x } else { T::NEG_INFINITY });
                }
            }
        }
    }
}

kernel! {
    /// One step of the running softmax: m' = max(m, max x), weights x = exp(x − m'), l' = exp(m − m') l + Σ x. What was
    /// summed up so far has to shrink by exp(m − m').
    pub(super) fn advance<'a, T>(s: S; x: &'a mut [T], cols: usize, maximum: &'a mut [T], sum: &'a mut [T], shrink: &'a mut [T; QUERIES]) {
        let mut sums = [T::ZERO; QUERIES];
        for (i, x) in x.chunks_mut(ROW).take(maximum.len()).enumerate() {
            let x = &mut x[..cols.next_multiple_of(S::LANES)];
            // The second argument of `max` wins over NaN: the maximum is never NaN, the weights are.
            let mut highest = s.splat(T::NEG_INFINITY);
            for x in x.chunks_exact(S::LANES) {
                highest = s.max(s.load(x), highest);
            }
            let highest = s.reduce_max(highest);
            let before = maximum[i];
            let now = if highest > before { highest } else { before };
            maximum[i] = now;
            // While no key is kept everything is −∞, and exp(−∞ − 0) = 0.
            let base = if now == T::NEG_INFINITY { T::ZERO } else { now };
            shrink[i] = if now == before { T::ZERO } else { before - base };
            let mut total = s.zero();
            for x in x.chunks_exact_mut(S::LANES) {
                let weight = math::exp(s, s.sub(s.load(x), s.splat(base)));
                total = s.add(total, weight);
                s.store(weight, x);
            }
            sums[i] = s.reduce_sum(total);
        }
        for shrink in shrink.chunks_exact_mut(S::LANES) {
            s.store(math::exp(s, s.load(shrink)), shrink);
        }
        for (i, sum) in sum.iter_mut().enumerate() {
            *sum = *sum * shrink[i] + sums[i];
        }
    }
}

kernel! {
    /// x = dropout(x)
    pub(super) fn drop_weights<'a, T>(s: S; x: &'a mut [T], block: Block, dropout: Dropout, n_heads: usize) {
        let scale = s.splat(T::from_f64(dropout.scale));
        for (i, x) in x.chunks_mut(ROW).take(block.rows).enumerate() {
            let key = block.row_key(&dropout, i, n_heads);
            for (j, x) in (0..block.cols).step_by(S::LANES).zip(x.chunks_exact_mut(S::LANES)) {
                let keep = s.keep(key, (block.m + j) as u32, dropout.threshold);
                s.store(s.select(keep, s.mul(s.load(x), scale), s.zero()), x);
            }
        }
    }
}

kernel! {
    /// x = exp(x − lse), the weights once the whole row is known.
    fn weights<'a, T>(s: S; x: &'a mut [T], block: Block, lse: &'a [T], n_heads: usize) {
        let nothing = s.splat(T::NEG_INFINITY);
        for (x, row) in x.chunks_mut(ROW).zip(block.query_rows()) {
            let lse = s.splat(lse[row * n_heads + block.head]);
            for x in x[..block.cols.next_multiple_of(S::LANES)].chunks_exact_mut(S::LANES) {
                let score = s.load(x);
                let weight = math::exp(s, s.sub(score, lse));
                s.store(s.select(s.eq(score, nothing), s.zero(), weight), x);
            }
        }
    }
}

kernel! {
    /// P = softmax(x), y = dropout(P) V, dropout(P) = P ∘ mask:
    /// dP = (dy Vᵀ) ∘ mask, dx = P ∘ (dP − D) with D = rowsum(P ∘ dP) = rowsum(dy ∘ y).
    /// On entry `p` holds P and `dx` holds dy Vᵀ; on return `p` holds dropout(P) and `dx` scale · dx.
    pub(super) fn score_gradients<'a, T>(s: S; p: &'a mut [T], dx: &'a mut [T], block: Block, d: &'a [T], dropout: Option<Dropout>, scale: T, n_heads: usize) {
        let scale = s.splat(scale);
        for (i, (p, dx)) in p.chunks_mut(ROW).zip(dx.chunks_mut(ROW)).take(block.rows).enumerate() {
            let row = block.query_rows().start + i;
            let d = s.splat(d[row * n_heads + block.head]);
            let key = dropout.map(|dropout| block.row_key(&dropout, i, n_heads));
            for (j, (p, dx)) in (0..block.cols).step_by(S::LANES).zip(p.chunks_exact_mut(S::LANES).zip(dx.chunks_exact_mut(S::LANES))) {
                let weight = s.load(p);
                let mut dp = s.load(dx);
                if let (Some(dropout), Some(key)) = (dropout, key) {
                    let keep = s.keep(key, (block.m + j) as u32, dropout.threshold);
                    let factor = s.splat(T::from_f64(dropout.scale));
                    s.store(s.select(keep, s.mul(weight, factor), s.zero()), p);
                    dp = s.select(keep, s.mul(dp, factor), s.zero());
                }
                let gradient = s.mul(s.mul(weight, s.sub(dp, d)), scale);
                s.store(s.select(s.eq(weight, s.zero()), s.zero(), gradient), dx);
            }
        }
    }
}
