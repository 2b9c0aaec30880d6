//! The same in plain loops: what attention means. For tests.

use super::{Inputs, Masks};
use crate::simd::{Float, keep_scalar};
use std::f64::consts::LOG2_E;

/// One row of softmax(scale · q Kᵀ + bias, where kept).
struct Row<T> {
    /// Before dropout, 0 where not kept.
    weights: Vec<T>,
    /// What dropout multiplies each weight with.
    factors: Vec<T>,
    kept: Vec<bool>,
    /// log₂ Σ eˣ of the scores.
    lse: T,
}

fn row<T: Float>(inputs: &Inputs<'_, T>, index: usize, head: usize, l: usize) -> Row<T> {
    let Inputs { heads, q, k, sequences, masks: Masks { causal, keep, bias, dropout }, .. } = *inputs;
    let sequence = sequences[index];
    let q = &q.at(sequence.query + l, head, heads.head_dim)[..heads.head_dim];
    let kept: Vec<bool> = (0..sequence.keys)
        .map(|m| {
            let past = m as isize <= l as isize + sequence.shift;
            (past || !causal) && keep.is_none_or(|grid| grid.data[grid.index([index, head, l, m])])
        })
        .collect();
    let score = |m: usize| {
        let k = k.at(sequence.key + m, head / heads.group(), heads.head_dim);
        let bias = bias.map_or(T::ZERO, |grid| grid.data[grid.index([index, head, l, m])]);
        q.iter().zip(k).map(|(q, k)| *q * *k).sum::<T>() * T::from_f64(heads.scale) + bias
    };
    let scores: Vec<T> = (0..sequence.keys).map(|m| if kept[m] { score(m) } else { T::NEG_INFINITY }).collect();
    let highest = scores.iter().fold(T::NEG_INFINITY, |a, &b| if b > a { b } else { a });
    let base = if highest == T::NEG_INFINITY { T::ZERO } else { highest };
    let sum = scores.iter().map(|&x| (x - base).exp()).sum::<T>();
    let share = |&x: &T| if x == T::NEG_INFINITY { T::ZERO } else { (x - base).exp() / sum };
    let factor = |m: usize| match dropout {
        None => T::ONE,
        Some(dropout) => {
            let key = dropout.row((sequence.query + l) * heads.n_heads + head);
            if keep_scalar(key, m as u32, dropout.threshold) { T::from_f64(dropout.scale) } else { T::ZERO }
        }
    };
    Row {
        weights: scores.iter().map(share).collect(),
        factors: (0..sequence.keys).map(factor).collect(),
        kept,
        lse: (base + sum.ln()) * T::from_f64(LOG2_E),
    }
}

/// Calls `visit(sequence, head, query)` for every row.
fn rows<T: Float>(inputs: &Inputs<'_, T>, mut visit: impl FnMut(usize, usize, usize)) {
    for (index, sequence) in inputs.sequences.iter().enumerate() {
        for head in 0..inputs.heads.n_heads {
            (0..sequence.queries).for_each(|l| visit(index, head, l));
        }
    }
}

/// y (R, H K), lse (R, H) and the weights, (H, L, M) of one sequence after the other.
pub fn attention_reference<T: Float>(y: &mut [T], lse: &mut [T], weights: &mut Vec<T>, inputs: &Inputs<'_, T>) {
    let (n_heads, head_dim) = (inputs.heads.n_heads, inputs.heads.head_dim);
    rows(inputs, |index, head, l| {
        let sequence = inputs.sequences[index];
        let row = row(inputs, index, head, l);
        let at = (sequence.query + l) * n_heads + head;
        lse[at] = row.lse;
        let y = &mut y[at * head_dim..][..head_dim];
        y.fill(T::ZERO);
        for m in (0..sequence.keys).filter(|&m| row.kept[m]) {
            let v = inputs.v.at(sequence.key + m, head / inputs.heads.group(), head_dim);
            y.iter_mut().zip(v).for_each(|(y, v)| *y += row.weights[m] * row.factors[m] * *v);
        }
        weights.extend(row.weights);
    });
}

/// dq (R, H K), dk and dv (rows, H' K) and dbias; all start at 0.
pub fn attention_backward_reference<T: Float>([dq, dk, dv, dbias]: [&mut [T]; 4], dy: &[T], inputs: &Inputs<'_, T>) {
    let (heads, scale) = (inputs.heads, T::from_f64(inputs.heads.scale));
    let (n, n_kv) = (heads.head_dim, heads.n_kv_heads);
    rows(inputs, |index, head, l| {
        let sequence = inputs.sequences[index];
        let kv_head = head / heads.group();
        let Row { weights, factors, kept, .. } = row(inputs, index, head, l);
        let at = ((sequence.query + l) * heads.n_heads + head) * n;
        let dy = &dy[at..][..n];
        let kept: Vec<usize> = (0..sequence.keys).filter(|&m| kept[m]).collect();
        // y = Σ w v: dw = dy · v
        let dw: Vec<T> = kept
            .iter()
            .map(|&m| {
                let v = inputs.v.at(sequence.key + m, kv_head, n);
                dy.iter().zip(v).map(|(dy, v)| *dy * *v).sum::<T>() * factors[m]
            })
            .collect();
        // w = softmax(x): dx = w (dw − Σ w dw)
        let mean = kept.iter().zip(&dw).map(|(&m, dw)| weights[m] * *dw).sum::<T>();
        for (&m, dw) in kept.iter().zip(&dw) {
            let dx = weights[m] * (*dw - mean);
            let key = ((sequence.key + m) * n_kv + kv_head) * n;
            let q = inputs.q.at(sequence.query + l, head, n);
            let k = inputs.k.at(sequence.key + m, kv_head, n);
            for d in 0..n {
                dq[at + d] += scale * dx * k[d];
                dk[key + d] += scale * dx * q[d];
                dv[key + d] += weights[m] * factors[m] * dy[d];
            }
            if let Some(grid) = inputs.masks.bias {
                dbias[grid.index([index, head, l, m])] += dx;
            }
        }
    });
}
