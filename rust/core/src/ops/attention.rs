//! Scaled dot-product attention of many heads over ragged rows (Vaswani et al. 2017, section 3.2).

use crate::error::{Result, Shape};
use crate::kernels::attention::{
    self as kernel, Gradients, Grid, Inputs, Operand, Out, Saved, Sequence, attention_backward,
    attention_bias_backward, attention_forward, attention_weights,
};
use crate::profile::{self, Work};
use crate::rng::Dropout;
use crate::rows::Rows;
use crate::simd::{Float, zeros};
use crate::tape::{AttentionWeights, Backward, Operation, Tape, Tensor, Var};
use crate::{bail, ensure};
use std::ops::Range;
use std::sync::Arc;

pub use crate::kernels::attention::{Cache, Heads, Page};

#[cfg(test)]
mod tests;

/// A block of columns of a variable that holds heads side by side, so that merged projections need no split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The variable.
    pub var: Var,
    /// The first column of head 0.
    pub start: usize,
}

/// A mask of shape (B, H, L, M), where 1 stands for any length. True: may attend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DenseMask {
    /// The elements, row-major.
    pub keep: Arc<[bool]>,
    /// The lengths of the axes.
    pub shape: [usize; 4],
}

/// A variable added to the scaled scores, with a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bias {
    /// Its rows are (B, H, L), its columns M.
    pub var: Var,
    /// The lengths of the axes (B, H, L, M); 1 stands for any length.
    pub shape: [usize; 4],
}

/// Which keys a query sees; everything combines.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Masks<'a> {
    /// No key behind the query's own position.
    pub causal: bool,
    /// Keys that may be attended to.
    pub keep: Option<&'a DenseMask>,
    /// Added to the scaled scores.
    pub bias: Option<Bias>,
    /// Site and probability of dropout on the weights.
    pub dropout: Option<(u32, f64)>,
}

/// Where keys and values are.
#[derive(Clone, Copy, Debug)]
pub enum KeysValues<'a, T> {
    /// On the tape, rows without padding.
    Packed {
        /// Keys.
        k: Columns,
        /// Values.
        v: Columns,
        /// The sequences of both.
        rows: &'a Rows,
    },
    /// In a cache; not for a tape that records. The first key of a sequence stands at position 0.
    Cached {
        /// Pages of keys and values.
        cache: Cache<'a, T>,
        /// The slot of each sequence.
        slots: &'a [usize],
        /// The number of keys of each sequence.
        lengths: &'a [usize],
    },
}

/// y (R, H K): for every query and head, Σ w v with w = softmax(scale · q · k + bias) over the keys it may see; zeros where
/// there is none. The position of a query is its row's; of a key its row's, or its number in the cache.
pub fn attention<T: Float>(
    tape: &mut Tape<T>,
    q: Columns,
    rows: &Rows,
    keys_values: KeysValues<'_, T>,
    heads: Heads,
    masks: &Masks<'_>,
) -> Result<Var> {
    let Heads { n_heads, n_kv_heads, head_dim, scale } = heads;
    ensure!(
        n_kv_heads > 0 && n_heads > 0 && n_heads.is_multiple_of(n_kv_heads) && head_dim > 0 && scale.is_finite(),
        Config,
        "attention: expected positive sizes, n_kv_heads a divisor of n_heads and a finite scale, got {heads:?}"
    );
    if let Some((_, p)) = masks.dropout {
        ensure!((0.0..1.0).contains(&p), Config, "attention: argument `dropout`: expected 0 <= p < 1, got {p}");
    }
    let mut vars = vec![q.var];
    vars.extend(masks.bias.map(|bias| bias.var));
    let (keys, cache) = match keys_values {
        KeysValues::Packed { k, v, .. } => {
            vars.extend([k.var, v.var]);
            (Some((k, v)), None)
        }
        KeysValues::Cached { cache, .. } => {
            ensure!(
                !tape.is_recording(),
                Config,
                "attention: a cache has no gradient; decode on a tape that does not record"
            );
            (None, Some(cache))
        }
    };
    let asked = tape.attention_mut().is_some();
    let mut sequences = sequences(rows, &keys_values)?;
    if cache.is_some() && !masks.causal && masks.keep.is_none() && masks.bias.is_none() && !asked {
        together(&mut sequences);
    }
    let call = Call {
        q,
        keys,
        sequences,
        heads,
        causal: masks.causal,
        keep: masks.keep.cloned(),
        bias: masks.bias,
        dropout: masks.dropout.and_then(|(site, p)| tape.dropout(site, p)),
    };

    let wanted = tape.wants_any(&vars);
    let _timed = profile::forward(call.name(), [n_heads, head_dim], || call.work::<T>(2, 0));
    let mut y = tape.pool.tensor(rows.total(), n_heads * head_dim)?;
    let mut lse = if wanted || asked { Some(tape.pool.tensor(rows.total(), n_heads)?) } else { None };
    let inputs = call.inputs(|var| tape.value(var), cache)?;
    attention_forward(&mut y, lse.as_deref_mut(), &inputs)?;
    if let (true, Some(lse)) = (asked, &lse) {
        let shapes: Vec<_> = call.sequences.iter().map(|s| (n_heads, s.queries, s.keys)).collect();
        let mut values = zeros(shapes.iter().map(|(h, l, m)| h * l * m).sum())?;
        attention_weights(&mut values, lse, &inputs)?;
        if let Some(all) = tape.attention_mut() {
            all.push(AttentionWeights { values, shapes });
        }
    }

    let y = tape.push(y, wanted);
    match lse {
        Some(lse) if wanted => {
            vars.push(y);
            tape.record(y, &vars, Node { call, y, lse });
        }
        lse => lse.into_iter().for_each(|lse| tape.pool.recycle(lse)),
    }
    Ok(y)
}

/// All that a call is, but for the numbers.
struct Call {
    q: Columns,
    /// Keys and values on the tape.
    keys: Option<(Columns, Columns)>,
    sequences: Vec<Sequence>,
    heads: Heads,
    causal: bool,
    keep: Option<DenseMask>,
    bias: Option<Bias>,
    dropout: Option<Dropout>,
}

impl Call {
    /// Its name in profiles.
    fn name(&self) -> &'static str {
        if self.causal { "attention (causal)" } else { "attention" }
    }

    /// What it has to do: so many products of what its queries may see as far as lengths and causality go; y, q, k and v
    /// cross from or to memory, and `again` as many gradients.
    fn work<T>(&self, products: usize, again: usize) -> Work {
        let masks = kernel::Masks::<T> { causal: self.causal, keep: None, bias: None, dropout: None };
        let pairs = |s: &Sequence| masks.pairs(s, 0..s.queries, 0..s.keys);
        let Heads { n_heads, n_kv_heads, head_dim, .. } = self.heads;
        let sum = |of: &dyn Fn(&Sequence) -> usize| self.sequences.iter().map(of).sum::<usize>();
        let (queries, keys) = (sum(&|s| s.queries), sum(&|s| s.keys));
        let numbers = 2 * (1 + again) * (queries * n_heads + keys * n_kv_heads) * head_dim;
        Work::attention::<T>(products, queries, sum(&pairs), [n_heads, head_dim], numbers)
    }

    /// What the kernels work on, checked.
    fn inputs<'a, T: Float>(
        &'a self,
        value: impl Fn(Var) -> Result<&'a Tensor<T>>,
        cache: Option<Cache<'a, T>>,
    ) -> Result<Inputs<'a, T>> {
        let Heads { n_heads, n_kv_heads, head_dim, .. } = self.heads;
        let largest = |of: fn(&Sequence) -> usize| self.sequences.iter().map(of).max().unwrap_or(0);
        let queries = largest(|s| s.query + s.queries);
        let keys = largest(|s| if s.keys > 0 { s.key + s.keys } else { 0 });
        let operand = |name: &str, columns: Columns, rows: usize, width: usize| {
            let tensor = value(columns.var)?;
            ensure!(
                tensor.rows() == rows && tensor.cols() >= columns.start + width,
                Shape,
                "attention: argument `{name}`: expected {rows} rows of columns {}..{}, got ({}, {})",
                columns.start,
                columns.start + width,
                tensor.rows(),
                tensor.cols()
            );
            Ok(Operand { data: tensor.get(columns.start..).unwrap_or_default(), stride: tensor.cols() })
        };
        let width = n_kv_heads * head_dim;
        let nothing = Operand { data: &[][..], stride: 0 };
        let (k, v) = match (self.keys, cache) {
            (Some((k, v)), _) => (operand("k", k, keys, width)?, operand("v", v, keys, width)?),
            (None, Some(cache)) => {
                ensure!(
                    cache.is_for(n_kv_heads, head_dim),
                    Shape,
                    "attention: the cache is not for {n_kv_heads} heads of {head_dim}"
                );
                for s in self.sequences.iter().filter(|s| s.keys > 0) {
                    ensure!(cache.has(s.key, s.keys), Shape, "attention: slot {} has no {} keys", s.key, s.keys);
                }
                (nothing, nothing)
            }
            (None, None) => bail!(Internal, "attention: keys are missing"),
        };
        let sizes = [self.sequences.len(), n_heads, largest(|s| s.queries), largest(|s| s.keys)];
        let keep = self.keep.as_ref().map(|DenseMask { keep, shape }| grid("keep", keep, *shape, sizes)).transpose()?;
        let bias = self.bias.map(|Bias { var, shape }| {
            let bias = value(var)?;
            ensure!(
                bias.cols() == shape[3],
                Shape,
                "attention: argument `bias`: expected {} columns, got {}",
                shape[3],
                bias.cols()
            );
            grid("bias", bias, shape, sizes)
        });
        let bias = bias.transpose()?;
        Ok(Inputs {
            heads: self.heads,
            q: operand("q", self.q, queries, n_heads * head_dim)?,
            k,
            v,
            cache,
            sequences: &self.sequences,
            masks: kernel::Masks { causal: self.causal, keep, bias, dropout: self.dropout },
        })
    }
}

/// The rows of each sequence.
fn sequences<T>(rows: &Rows, keys_values: &KeysValues<'_, T>) -> Result<Vec<Sequence>> {
    let n = rows.sequences();
    let given = match keys_values {
        KeysValues::Packed { rows, .. } => rows.sequences(),
        KeysValues::Cached { slots, lengths, .. } if slots.len() == n => lengths.len(),
        KeysValues::Cached { slots, .. } => slots.len(),
    };
    ensure!(given == n, Shape, "attention: expected keys of {n} sequences, one for each of the queries', got {given}");
    let one = |i: usize| {
        let (key, keys, first) = match keys_values {
            KeysValues::Packed { rows, .. } => (rows.range(i).start, rows.length(i), rows.first_position(i)),
            KeysValues::Cached { slots, lengths, .. } => (slots[i], lengths[i], 0),
        };
        let shift = rows.first_position(i) as isize - first as isize;
        Sequence { query: rows.range(i).start, queries: rows.length(i), key, keys, shift }
    };
    Ok((0..n).map(one).collect())
}

/// Makes one of neighbours that read the same slot, as the beams of a source do: its keys and values are then read once.
/// Where every query sees every key, no query knows which sequence it belongs to.
fn together(sequences: &mut Vec<Sequence>) {
    sequences.dedup_by(|next, all| {
        let same = (next.key, next.keys, next.query) == (all.key, all.keys, all.query + all.queries);
        all.queries += if same { next.queries } else { 0 };
        same
    });
}

/// An array of shape (B, H, L, M) that covers batches of these `sizes`.
fn grid<'a, E>(name: &str, data: &'a [E], shape: [usize; 4], sizes: [usize; 4]) -> Result<Grid<'a, E>> {
    let len = shape.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
    let [b, h, l, m] = std::array::from_fn(|axis| shape[axis] == 1 || shape[axis] == sizes[axis]);
    let reaches = |axis: usize| shape[axis] >= sizes[axis];
    ensure!(
        len == Some(data.len()) && b && h && (l || reaches(2)) && (m || reaches(3)),
        Shape,
        "attention: argument `{name}`: expected shape {} (sequences, heads, queries, keys), 1 allowed for each, \
         got {} with {} elements",
        Shape(&sizes),
        Shape(&shape),
        data.len()
    );
    Ok(Grid { data, shape })
}

struct Node<T> {
    call: Call,
    y: Var,
    lse: Tensor<T>,
}

impl<T: Float> Operation<T> for Node<T> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let Node { call, y, lse } = *self;
        // S and dP, then dQ, dK and dV.
        let _timed = profile::backward(call.name(), [call.heads.n_heads, call.heads.head_dim], || call.work::<T>(5, 2));
        let inputs = call.inputs(|var| cx.value(var), None)?;
        let saved = Saved { dy: &dy, y: cx.value(y)?, lse: &lse };
        let mut d = cx.pool.tensor(lse.rows(), lse.cols())?;

        let mut merged = Merged::default();
        let (q, kv) = (call.heads.n_heads * call.heads.head_dim, call.heads.n_kv_heads * call.heads.head_dim);
        let (k, v) = call.keys.unzip();
        for (which, columns, width) in [(0, Some(call.q), q), (1, k, kv), (2, v, kv)] {
            if let Some(Columns { var, start }) = columns.filter(|columns| cx.wants(columns.var)) {
                merged.add(cx, which, var, start..start + width)?;
            }
        }
        let [dq, dk, dv] = merged.parts()?;
        attention_backward(Gradients { dq, dk, dv }, &mut d, saved, &inputs)?;
        let dbias = match call.bias.filter(|bias| cx.wants(bias.var)) {
            Some(Bias { var, shape }) => {
                let mut dbias = cx.pool.tensor(shape[..3].iter().product(), shape[3])?;
                attention_bias_backward(&mut dbias, &d, saved, &inputs)?;
                Some((var, dbias))
            }
            None => None,
        };

        for tensor in [d, lse, dy] {
            cx.pool.recycle(tensor);
        }
        merged.tensors.into_iter().map(|m| (m.var, m.dx)).chain(dbias).try_for_each(|(var, dx)| cx.give(var, dx))
    }
}

/// Gradients of variables of which q, k and v are columns: one tensor for all that lie side by side in one variable.
struct Merged<T> {
    tensors: Vec<MergedTensor<T>>,
}

struct MergedTensor<T> {
    var: Var,
    dx: Tensor<T>,
    /// Which of q, k, v, and its columns.
    parts: Vec<(usize, Range<usize>)>,
}

impl<T> Default for Merged<T> {
    fn default() -> Self {
        Merged { tensors: Vec::new() }
    }
}

impl<T: Float> Merged<T> {
    fn add(&mut self, cx: &mut Backward<'_, T>, which: usize, var: Var, columns: Range<usize>) -> Result<()> {
        let apart = |other: &Range<usize>| columns.end <= other.start || other.end <= columns.start;
        let beside = self.tensors.iter_mut().find(|m| m.var == var && m.parts.iter().all(|(_, other)| apart(other)));
        match beside {
            Some(merged) => merged.parts.push((which, columns)),
            None => {
                let (rows, cols) = (cx.value(var)?.rows(), cx.value(var)?.cols());
                let dx = cx.pool.tensor(rows, cols)?;
                self.tensors.push(MergedTensor { var, dx, parts: vec![(which, columns)] });
            }
        }
        Ok(())
    }

    /// Where the gradients of q, k and v go. Columns of none of them are zero.
    fn parts(&mut self) -> Result<[Option<Out<'_, T>>; 3]> {
        let mut outs = [None, None, None];
        for MergedTensor { dx, parts, .. } in &mut self.tensors {
            let cols = dx.cols();
            if parts.iter().map(|(_, columns)| columns.len()).sum::<usize>() < cols {
                dx.fill(T::ZERO);
            }
            let columns: Vec<_> = parts.iter().map(|(_, columns)| columns.clone()).collect();
            for ((which, _), out) in parts.iter().zip(Out::columns(dx, cols, &columns)?) {
                outs[*which] = Some(out);
            }
        }
        Ok(outs)
    }
}
