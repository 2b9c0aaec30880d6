//! The backward pass: weights are computed again from the saved log-sum-exp, block by block.

use super::product::{Left, Start, copy_out, pack, pack_transposed, packed_len, product, stride};
use super::scores::{BLOCK, Block, ROW, factor, score_gradients};
use super::work::{Item, LONG, each_task, split};
use super::{Grid, Heads, Inputs, KEYS, Operand, Out, QUERIES};
use crate::error::Result;
use crate::kernel;
use crate::simd::Float;
use crate::threads;
use std::f64::consts::LN_2;

/// What the forward pass left, and the gradient of its output.
#[derive(Clone, Copy)]
pub struct Saved<'a, T> {
    /// Gradient of the output, (R, H K).
    pub dy: &'a [T],
    /// The output, (R, H K).
    pub y: &'a [T],
    /// log₂ Σ eˣ of the scores, (R, H).
    pub lse: &'a [T],
}

/// Where gradients go; each is (rows, heads · K) and is overwritten. `None` where it is not wanted.
#[derive(Default)]
pub struct Gradients<'a, T> {
    /// Of the queries.
    pub dq: Option<Out<'a, T>>,
    /// Of the keys.
    pub dk: Option<Out<'a, T>>,
    /// Of the values.
    pub dv: Option<Out<'a, T>>,
}

/// Blocks of keys that meet a block of queries one after the other, while its rows are packed and its part of dQ is in the
/// cache. Few enough that all that is kept of them stays in the L2 cache. dQ is summed up span by span, so bits depend on it.
const SPAN: usize = 3;

/// Numbers of scratch that a task needs: K, Kᵀ, Vᵀ, dK and dV of a span of keys, Q, dy and dQ of a block of queries, and
/// two blocks of scores.
fn scratch<T>(inputs: &Inputs<'_, T>) -> [usize; 10] {
    let longest = inputs.sequences.iter().map(|s| s.keys).max().unwrap_or(0);
    let (span, head_dim) = ((SPAN * KEYS).min(longest), inputs.heads.head_dim);
    let [keys, turned, queries] =
        [(span, head_dim), (head_dim, span), (QUERIES, head_dim)].map(|(rows, cols)| packed_len(rows, cols));
    [keys, turned, turned, keys, keys, queries, queries, queries, BLOCK, BLOCK]
}

/// Gradients of the queries, keys and values. `d` (R, H) is room for D = rowsum(dy ∘ y).
pub fn attention_backward<T: Float>(
    gradients: Gradients<'_, T>,
    d: &mut [T],
    saved: Saved<'_, T>,
    inputs: &Inputs<'_, T>,
) -> Result<()> {
    row_sums(d, saved, &inputs.heads)?;
    let Gradients { dq, dk, dv } = gradients;
    let pass = |items, dq: Option<&Out<'_, T>>, dk: Option<&Out<'_, T>>, dv: Option<&Out<'_, T>>| {
        inputs.run(items, scratch(inputs).iter().sum(), |item, _, scratch| {
            Walk { inputs, saved, d, scratch }.run(item, Sink::Inputs { dq, dk, dv });
        })
    };
    let (dq, dk, dv) = (dq.as_ref(), dk.as_ref(), dv.as_ref());
    if dq.or(dk).or(dv).is_none() {
        return Ok(());
    }
    // An element of dq is one chain along the keys, of dk and dv one along heads and queries: either way of cutting
    // the work adds the same terms in the same order.
    let items = inputs.by_heads();
    let costs = || items.iter().map(|item| item.pairs(inputs));
    let (total, longest) = (costs().sum::<usize>(), costs().max().unwrap_or(0));
    if dq.is_some() && (dk.is_some() || dv.is_some()) && total < (longest * 5 / 2) * (threads::num_threads() - 1) {
        // Too few heads for all threads: twice the scores, but as many tasks as there are blocks.
        pass(inputs.by_queries(), dq, None, None)?;
        return pass(inputs.by_keys(), None, dk, dv);
    }
    // Wave after wave of key blocks, so that no task is too long.
    let longest = items.iter().map(|item| item.blocks.end).max().unwrap_or(0);
    let step = LONG * longest / (costs().max().unwrap_or(0) * inputs.heads.head_dim).max(1);
    let step = step.next_multiple_of(SPAN).max(SPAN);
    for first in (0..longest.max(1)).step_by(step) {
        let wave = items.iter().map(|item| {
            let end = item.blocks.end;
            Item { blocks: first.min(end)..(first + step).min(end), ..item.clone() }
        });
        pass(wave.collect(), dq, dk, dv)?;
    }
    Ok(())
}

/// Gradient of the bias, summed over the axes it was broadcast along, in one fixed order. `d` comes from
/// [`attention_backward`], the data of `shape` is not read.
pub fn attention_bias_backward<T: Float>(
    dbias: &mut [T],
    d: &[T],
    saved: Saved<'_, T>,
    inputs: &Inputs<'_, T>,
) -> Result<()> {
    let Some(Grid { shape: [b, h, l, m], .. }) = inputs.masks.bias else { return Ok(()) };
    // One task owns the elements of one (b, h) and a run of queries; it meets all that was added to them.
    let chunk = if l == 1 { usize::MAX } else { QUERIES };
    let longest = inputs.sequences.iter().map(|s| s.queries).max().unwrap_or(0);
    let planes = (0..b).flat_map(|b| (0..h).map(move |h| (b, h)));
    let tasks: Vec<_> = planes.flat_map(|at| (0..longest).step_by(chunk).map(move |first| (at, first))).collect();
    dbias.fill(T::ZERO);
    let out = Out::new(dbias, m);
    let n_heads = inputs.heads.n_heads;
    each_task(tasks.len(), scratch(inputs).iter().sum(), |task, scratch| {
        let ((at_b, at_h), first) = tasks[task];
        for (sequence, s) in inputs.sequences.iter().enumerate().filter(|&(i, _)| b == 1 || i == at_b) {
            for head in (0..n_heads).filter(|&i| h == 1 || i == at_h) {
                let queries = first.min(s.queries)..s.queries.min(first.saturating_add(chunk));
                let row = (at_b * h + at_h) * l + if l == 1 { 0 } else { queries.start };
                // SAFETY: rows of this task alone.
                let mut out = unsafe { out.part(row..row + if l == 1 { 1 } else { queries.len() }, 0..m) };
                let blocks = 0..s.keys.div_ceil(KEYS);
                let item = Item { sequence, heads: head..head + 1, queries, blocks };
                Walk { inputs, saved, d, scratch }.run(&item, Sink::Bias(&mut out));
            }
        }
    })
}

/// Who takes the gradients of the scores.
enum Sink<'a, 'o, T> {
    Inputs {
        dq: Option<&'a Out<'o, T>>,
        dk: Option<&'a Out<'o, T>>,
        dv: Option<&'a Out<'o, T>>,
    },
    /// Rows from the item's first query on, or one row for all.
    Bias(&'a mut Out<'o, T>),
}

struct Walk<'a, T> {
    inputs: &'a Inputs<'a, T>,
    saved: Saved<'a, T>,
    d: &'a [T],
    scratch: &'a mut [T],
}

impl<T: Float> Walk<'_, T> {
    /// Span of keys by span of keys, against the blocks of queries that may see it.
    fn run(self, item: &Item, mut sink: Sink<'_, '_, T>) {
        let Inputs { heads, q, k, v, sequences, masks, .. } = *self.inputs;
        let Heads { n_heads, head_dim, .. } = heads;
        let Item { sequence: index, queries, blocks, .. } = item.clone();
        let (sequence, kv_head) = (sequences[index], item.heads.start / heads.group());
        let columns = |head: usize| head * head_dim..(head + 1) * head_dim;
        let dy = Operand { data: self.saved.dy, stride: n_heads * head_dim };
        let [k_rows, kt, vt, dk_rows, dv_rows, q_rows, dy_rows, dq_rows, x, dx] =
            split(self.scratch, scratch(self.inputs));
        let width = stride(head_dim);
        // Weights are 2ˣ of x = (factor · Q) Kᵀ, whose gradient is ln 2 times that of x in eˣ.
        let factor = factor(heads.scale);
        let unit = T::from_f64(if let Sink::Bias(_) = sink { 1.0 } else { LN_2 });

        // The first span assigns dQ, unless there are queries that see no key.
        let unseen = queries.is_empty() || masks.visible(&sequence, queries.start) == 0;
        if let (Sink::Inputs { dq: Some(dq), .. }, 0, true) = (&sink, blocks.start, unseen) {
            let rows = sequence.query + queries.start..sequence.query + queries.end;
            // SAFETY: rows and columns of this item alone.
            unsafe { dq.part(rows, item.heads.start * head_dim..item.heads.end * head_dim) }.clear();
        }
        for span in blocks.clone().step_by(SPAN) {
            let begin = span * KEYS;
            let end = (blocks.end.min(span + SPAN) * KEYS).min(sequence.keys);
            let (keys, key_rows) = (end - begin, sequence.key + begin..sequence.key + end);
            let k_span = k.at(key_rows.start, kv_head, head_dim);
            let kt = pack_transposed(kt, k_span, k.stride, keys, head_dim);
            let k = pack(k_rows, k_span, k.stride, keys, head_dim, T::ONE);
            let vt = pack_transposed(vt, v.at(key_rows.start, kv_head, head_dim), v.stride, keys, head_dim);
            let mut begun = [false; SPAN];
            let first = masks.first_query(&sequence, begin) / QUERIES * QUERIES;
            for head in item.heads.clone() {
                for l in (queries.start.max(first)..queries.end).step_by(QUERIES) {
                    let rows = QUERIES.min(queries.end - l);
                    let visible = end.min(masks.visible(&sequence, l + rows - 1));
                    if visible <= begin {
                        continue;
                    }
                    let query_rows = sequence.query + l..sequence.query + l + rows;
                    let q = pack(q_rows, q.at(query_rows.start, head, head_dim), q.stride, rows, head_dim, factor);
                    let dy = pack(dy_rows, dy.at(query_rows.start, head, head_dim), dy.stride, rows, head_dim, T::ONE);
                    for (begun, m) in begun.iter_mut().zip((begin..visible).step_by(KEYS)) {
                        let (cols, at) = (KEYS.min(visible - m), m - begin);
                        let block = Block { sequence, index, head, l, rows, m, cols };

                        // P = 2^(x − lse), dP = dy Vᵀ, dx = P ∘ (dP − D)
                        block.scores(x, q.left(), [(0, cols, kt.columns_from(at))], self.inputs);
                        product(dx, ROW, dy.left(), vt.columns_from(at), rows, cols, head_dim, Start::Zero);
                        score_gradients(x, dx, block, self.saved.lse, self.d, masks.dropout, unit, n_heads);
                        match &mut sink {
                            Sink::Inputs { dq, dk, dv } => {
                                let start = if *begun { Start::Sum } else { Start::Zero };
                                // y = P V: dV += Pᵀ dy
                                if dv.is_some() {
                                    let p = Left { data: x, row: 1, col: ROW };
                                    product(&mut dv_rows[at * width..], width, p, dy, cols, head_dim, rows, start);
                                }
                                // x = (factor · Q) Kᵀ: dK += dxᵀ (factor · Q), dQ += factor · dx K
                                if dk.is_some() {
                                    let dx = Left { data: dx, row: 1, col: ROW };
                                    product(&mut dk_rows[at * width..], width, dx, q, cols, head_dim, rows, start);
                                }
                                if dq.is_some() {
                                    let dx = Left { data: dx, row: ROW, col: 1 };
                                    let start = if at == 0 { Start::Zero } else { Start::Sum };
                                    product(dq_rows, width, dx, k.rows_from(at), rows, head_dim, cols, start);
                                }
                                // Keys behind `cols` were not met yet.
                                if !*begun {
                                    let block = KEYS.min(keys - at);
                                    for sums in [&mut *dk_rows, &mut *dv_rows] {
                                        sums[(at + cols) * width..(at + block) * width].fill(T::ZERO);
                                    }
                                    *begun = true;
                                }
                            }
                            Sink::Bias(dbias) => {
                                for (i, dx) in dx.chunks(ROW).take(rows).enumerate() {
                                    let row = dbias.row(if dbias.rows == 1 { 0 } else { l - queries.start + i });
                                    if let [all] = row {
                                        dx[..cols].iter().for_each(|dx| *all += *dx);
                                    } else {
                                        row[m..].iter_mut().zip(&dx[..cols]).for_each(|(sum, dx)| *sum += *dx);
                                    }
                                }
                            }
                        }
                    }
                    if let Sink::Inputs { dq: Some(dq), .. } = &sink {
                        // SAFETY: rows and columns of this item alone.
                        copy_out(unsafe { dq.part(query_rows, columns(head)) }, dq_rows, factor, begin > 0);
                    }
                }
            }
            if let Sink::Inputs { dk, dv, .. } = &sink {
                for (begun, at) in begun.iter().zip((0..keys).step_by(KEYS)) {
                    let here = KEYS.min(keys - at);
                    let rows = key_rows.start + at..key_rows.start + at + here;
                    for (out, from) in [(dk, &*dk_rows), (dv, &*dv_rows)] {
                        if let Some(out) = out {
                            // SAFETY: rows and columns of this item alone.
                            let mut out = unsafe { out.part(rows.clone(), columns(kv_head)) };
                            if *begun {
                                copy_out(out, &from[at * width..], T::ONE, false);
                            } else {
                                out.clear();
                            }
                        }
                    }
                }
            }
        }
    }
}

/// D = rowsum(dy ∘ y), head by head.
fn row_sums<T: Float>(d: &mut [T], saved: Saved<'_, T>, heads: &Heads) -> Result<()> {
    let Heads { n_heads, head_dim, .. } = *heads;
    let rows = threads::rows_per_task(n_heads * head_dim);
    let (tall, wide) = (rows * n_heads, rows * n_heads * head_dim);
    threads::for_each(d.chunks_mut(tall).zip(saved.dy.chunks(wide).zip(saved.y.chunks(wide))), |(d, (dy, y))| {
        dots(d, dy, y, head_dim);
    })
}

kernel! {
    fn dots<'a, T>(s: S; d: &'a mut [T], a: &'a [T], b: &'a [T], cols: usize) {
        for (d, (a, b)) in d.iter_mut().zip(a.chunks(cols).zip(b.chunks(cols))) {
            let mut sum = s.zero();
            for (a, b) in a.chunks(S::LANES).zip(b.chunks(S::LANES)) {
                sum = s.mul_add(s.load_first(a, T::ZERO), s.load_first(b, T::ZERO), sum);
            }
            *d = s.reduce_sum(sum);
        }
    }
}
