//! One block of scores, from the products q · k to weights and back to their gradients.
//!
//! A score of −∞ is what "not kept" means from here on: its weight is exactly 0, in softmax and in the backward pass,
//! whatever stands in the key or the value.

use super::mask::{Masks, Plane};
use super::product::{Left, Packed, Start, product, stride};
use super::{Inputs, KEYS, QUERIES, Sequence};
use crate::kernel;
use crate::rng::Dropout;
use crate::simd::{Float, Simd, math};
use std::f64::consts::LOG2_E;
use std::ops::Range;

/// From one row of a block to the next.
pub(super) const ROW: usize = stride(KEYS);
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

/// Some keys of a block, transposed, and their values.
#[derive(Clone, Copy)]
pub(super) struct Piece<'a, T> {
    /// The number of the first one in the block, which begins a vector, and how many there are.
    pub at: usize,
    pub keys: usize,
    pub kt: Packed<'a, T>,
    pub v: Packed<'a, T>,
}

impl Block {
    /// The rows of its queries in the batch.
    pub fn query_rows(&self) -> Range<usize> {
        self.sequence.query + self.l..self.sequence.query + self.l + self.rows
    }

    /// What its queries see of the pieces of a block.
    pub fn seen<'a, T: Copy>(&self, pieces: &[Piece<'a, T>]) -> impl Iterator<Item = Piece<'a, T>> {
        let inside = pieces.iter().take_while(|piece| piece.at < self.cols);
        inside.map(|piece| Piece { keys: piece.keys.min(self.cols - piece.at), ..*piece })
    }

    /// x = the scores, from queries q (times [`factor`]) and keys: some, and their number in the block, after the others. Behind
    /// them, to the end of a vector, stands anything.
    pub fn scores<'a, T: Float>(
        &self,
        x: &mut [T],
        q: Left<'_, T>,
        keys: impl IntoIterator<Item = (usize, usize, Packed<'a, T>)>,
        inputs: &Inputs<'_, T>,
    ) {
        for (at, keys, kt) in keys {
            product(&mut x[at..], ROW, q, kt, self.rows, keys, inputs.heads.head_dim, Start::Zero);
        }
        let Masks { causal, keep, bias, .. } = inputs.masks;
        let every = !causal || inputs.masks.visible(&self.sequence, self.l) >= self.m + self.cols;
        if !every || keep.is_some() || bias.is_some() {
            mask(x, *self, inputs.masks);
        }
    }

    /// Dropout's key of row `i` of the block.
    fn row_key(&self, dropout: &Dropout, i: usize, n_heads: usize) -> [u32; 2] {
        dropout.row((self.query_rows().start + i) * n_heads + self.head)
    }
}

/// What q · k is multiplied with: the scale of the scores, which are kept in units of ln 2, so that weights are powers of 2.
pub(super) fn factor<T: Float>(scale: f64) -> T {
    T::from_f64(scale * LOG2_E)
}

kernel! {
    /// Turns products q · k into scores.
    fn mask<'a, T>(s: S; x: &'a mut [T], block: Block, masks: Masks<'a, T>) {
        let Block { sequence, index, head, l, rows, m, cols } = block;
        let unit = s.splat(T::from_f64(LOG2_E));
        let bias = masks.bias.map(|grid| grid.block(index, head, l, m));
        let keep = masks.keep.map(|grid| grid.block(index, head, l, m));
        for (i, x) in x.chunks_mut(ROW).take(rows).enumerate() {
            let visible = masks.visible(&sequence, l + i).saturating_sub(m).min(cols);
            // Without a bias whole vectors before that stay as they are.
            let first = if bias.is_some() { 0 } else { visible / S::LANES * S::LANES };
            for (j, x) in (first..cols).step_by(S::LANES).zip(x[first..].chunks_exact_mut(S::LANES)) {
                let mut score = s.load(x);
                if let Some(Plane { data, row, col }) = bias {
                    let bias = &data[i * row..];
                    let bias = if col == 0 { s.splat(bias[0]) } else { s.load_first(&bias[j..cols], T::ZERO) };
                    score = s.mul_add(bias, unit, score);
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
    /// One step of the running softmax: m' = max(m, max x), weights w = 2^(x − m'), l' = 2^(m − m') l + Σ w. What was
    /// summed up so far has to shrink by 2^(m − m'). On return `x` holds dropout(w).
    pub(super) fn advance<'a, T>(s: S; x: &'a mut [T], block: Block, maximum: &'a mut [T], sum: &'a mut [T], shrink: &'a mut [T; QUERIES], dropout: Option<Dropout>, n_heads: usize) {
        let (mut highest, mut sums) = ([T::NEG_INFINITY; QUERIES], [T::ZERO; QUERIES]);
        let whole = block.cols / S::LANES * S::LANES;
        // Loops over all rows: the maximum of one and the sum of another do not wait for each other.
        for (x, highest) in x.chunks_mut(ROW).zip(&mut highest[..block.rows]) {
            // The second argument of `max` wins over NaN: the maximum is never NaN, the weights are.
            let mut maximum = s.splat(T::NEG_INFINITY);
            for x in x[..whole].chunks_exact(S::LANES) {
                maximum = s.max(s.load(x), maximum);
            }
            if whole < block.cols {
                let last = &mut x[whole..][..S::LANES];
                let scores = s.select(s.first(block.cols - whole), s.load(last), s.splat(T::NEG_INFINITY));
                s.store(scores, last);
                maximum = s.max(scores, maximum);
            }
            *highest = s.reduce_max(maximum);
        }
        for ((highest, shrink), maximum) in highest.iter_mut().zip(shrink.iter_mut()).zip(maximum) {
            let before = *maximum;
            let now = if *highest > before { *highest } else { before };
            *maximum = now;
            // While no key is kept everything is −∞, and 2^(−∞ − 0) = 0.
            let base = if now == T::NEG_INFINITY { T::ZERO } else { now };
            *shrink = if now == before { T::ZERO } else { before - base };
            *highest = base;
        }
        for (i, x) in x.chunks_mut(ROW).take(block.rows).enumerate() {
            let x = &mut x[..block.cols.next_multiple_of(S::LANES)];
            let base = s.splat(highest[i]);
            let mut total = s.zero();
            for x in x.chunks_exact_mut(S::LANES) {
                let weight = math::exp2(s, s.sub(s.load(x), base));
                total = s.add(total, weight);
                s.store(weight, x);
            }
            sums[i] = s.reduce_sum(total);
            if let Some(dropout) = dropout {
                let (key, scale) = (block.row_key(&dropout, i, n_heads), s.splat(T::from_f64(dropout.scale)));
                for (j, x) in (block.m..).step_by(S::LANES).zip(x.chunks_exact_mut(S::LANES)) {
                    let keep = s.keep(key, j as u32, dropout.threshold);
                    s.store(s.select(keep, s.mul(s.load(x), scale), s.zero()), x);
                }
            }
        }
        for shrink in shrink.chunks_exact_mut(S::LANES) {
            s.store(math::exp2(s, s.load(shrink)), shrink);
        }
        for (i, sum) in sum.iter_mut().enumerate() {
            *sum = *sum * shrink[i] + sums[i];
        }
    }
}

/// w = 2^(x − lse), the weight once the whole row is known.
#[inline(always)]
fn weight<T: Float, S: Simd<T>>(s: S, x: S::V, lse: S::V) -> S::V {
    s.select(s.eq(x, s.splat(T::NEG_INFINITY)), s.zero(), math::exp2(s, s.sub(x, lse)))
}

kernel! {
    /// x = the weights before dropout
    pub(super) fn normalise<'a, T>(s: S; x: &'a mut [T], block: Block, lse: &'a [T], n_heads: usize) {
        for (x, row) in x.chunks_mut(ROW).zip(block.query_rows()) {
            let lse = s.splat(lse[row * n_heads + block.head]);
            for x in x[..block.cols.next_multiple_of(S::LANES)].chunks_exact_mut(S::LANES) {
                s.store(weight(s, s.load(x), lse), x);
            }
        }
    }
}

kernel! {
    /// P = softmax(x), y = dropout(P) V, dropout(P) = P ∘ mask:
    /// dP = (dy Vᵀ) ∘ mask, dx = P ∘ (dP − D) with D = rowsum(P ∘ dP) = rowsum(dy ∘ y).
    /// On entry `x` holds the scores and `dx` holds dy Vᵀ; on return `x` holds dropout(P) and `dx` unit · dx.
    pub(super) fn score_gradients<'a, T>(s: S; x: &'a mut [T], dx: &'a mut [T], block: Block, lse: &'a [T], d: &'a [T], dropout: Option<Dropout>, unit: T, n_heads: usize) {
        let unit = s.splat(unit);
        for (i, (x, dx)) in x.chunks_mut(ROW).zip(dx.chunks_mut(ROW)).take(block.rows).enumerate() {
            let at = (block.query_rows().start + i) * n_heads + block.head;
            let (lse, d) = (s.splat(lse[at]), s.splat(d[at]));
            let key = dropout.map(|dropout| block.row_key(&dropout, i, n_heads));
            for (j, (x, dx)) in (0..block.cols).step_by(S::LANES).zip(x.chunks_exact_mut(S::LANES).zip(dx.chunks_exact_mut(S::LANES))) {
                let p = weight(s, s.load(x), lse);
                let (mut dropped, mut dp) = (p, s.load(dx));
                if let (Some(dropout), Some(key)) = (dropout, key) {
                    let keep = s.keep(key, (block.m + j) as u32, dropout.threshold);
                    let scale = s.splat(T::from_f64(dropout.scale));
                    dropped = s.select(keep, s.mul(p, scale), s.zero());
                    dp = s.select(keep, s.mul(dp, scale), s.zero());
                }
                let gradient = s.mul(s.mul(p, s.sub(dp, d)), unit);
                s.store(dropped, x);
                s.store(s.select(s.eq(p, s.zero()), s.zero(), gradient), dx);
            }
        }
    }
}
