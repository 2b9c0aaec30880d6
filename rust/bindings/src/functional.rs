//! Functions of arrays: each is one operation of the core in a [`Call`]. `gradients` is the number of leading arguments
//! that get a gradient; without any, nothing is recorded.

use crate::arrays::{Floats, Real, to_array, with_slice};
use crate::call::{Answer, Call, Mode};
use crate::door;
use crate::errors::{ConfigError, ShapeError, TokenOutOfRangeError, raise};
use crate::form::Form;
use numpy::PyArrayDyn;
use numpy::PyUntypedArrayMethods;
use pyo3::prelude::*;
use std::iter::repeat_n;
use transformer_core::error::{Result, Shape};
use transformer_core::ops::{
    self, Activation, Bias, Columns, DenseMask, Gate, Heads, IGNORE, KeysValues, Masks, Running,
};
use transformer_core::rows::Rows;
use transformer_core::simd::zeros;
use transformer_core::tape::AttentionWeights;

/// Evaluates its body with `T` as the type of `x`.
macro_rules! by_type {
    ($x:expr, $T:ident => $body:expr) => {
        if $x.is_double() {
            type $T = f64;
            $body
        } else {
            type $T = f32;
            $body
        }
    };
}

fn plain(gradients: usize) -> Mode {
    Mode { gradients, seed: None }
}

/// y = (x − mean) / √(var + ε) · w + b
#[pyfunction]
pub fn layer_norm<'py>(
    py: Python<'py>,
    gradients: usize,
    x: Floats<'py>,
    weight: Option<Floats<'py>>,
    bias: Option<Floats<'py>>,
    eps: f64,
) -> PyResult<Answer<'py>> {
    by_type!(x, T => {
        let (mut call, form) = (Call::<T>::new(py, plain(gradients)), Form::rows(x.shape())?);
        let x = call.leaf(&x, form.clone())?;
        let (weight, bias) = (call.maybe_weight("weight", weight), call.maybe_weight("bias", bias));
        call.run(form, |tape, params| ops::layer_norm(tape, params, x, weight, bias, eps))
    })
}

/// y = x / √(mean(x²) + ε) · w
#[pyfunction]
pub fn rms_norm<'py>(
    py: Python<'py>,
    gradients: usize,
    x: Floats<'py>,
    weight: Option<Floats<'py>>,
    eps: f64,
) -> PyResult<Answer<'py>> {
    by_type!(x, T => {
        let (mut call, form) = (Call::<T>::new(py, plain(gradients)), Form::rows(x.shape())?);
        let x = call.leaf(&x, form.clone())?;
        let weight = call.maybe_weight("weight", weight);
        call.run(form, |tape, params| ops::rms_norm(tape, params, x, weight, eps))
    })
}

/// y = (x − mean) / √(var + ε) · w + b with the statistics of each column, or with given ones.
#[pyfunction]
pub fn batch_norm<'py>(
    py: Python<'py>,
    gradients: usize,
    x: Floats<'py>,
    weight: Option<Floats<'py>>,
    bias: Option<Floats<'py>>,
    running: Option<(Floats<'py>, Floats<'py>)>,
    eps: f64,
) -> PyResult<Answer<'py>> {
    let form = Form::rows(x.shape())?;
    for (name, statistic) in running.iter().flat_map(|(mean, var)| [("mean", mean), ("var", var)]) {
        if statistic.shape() != [form.size().1] {
            let text = format!("expected shape ({},), got {}", form.size().1, Shape(statistic.shape()));
            return Err(ShapeError::new_err(format!(
                "batch_norm: argument `{name}`: {text}; it must fit the last axis of `x`"
            )));
        }
    }
    by_type!(x, T => {
        let mut call = Call::<T>::new(py, plain(gradients));
        let x = call.leaf(&x, form.clone())?;
        let (weight, bias) = (call.maybe_weight("weight", weight), call.maybe_weight("bias", bias));
        let running = running.map(|(mean, var)| Running {
            mean: call.statistic("mean", mean),
            var: call.statistic("var", var),
            momentum: 0.0,
        });
        call.run(form, |tape, params| ops::batch_norm(tape, params, x, weight, bias, running, eps))
    })
}

/// y = x Wᵀ + b
#[pyfunction]
pub fn linear<'py>(
    py: Python<'py>,
    gradients: usize,
    x: Floats<'py>,
    weight: Floats<'py>,
    bias: Option<Floats<'py>>,
) -> PyResult<Answer<'py>> {
    let &[outputs, _] = weight.shape() else {
        let text = format!("expected shape (out, in), got {}", Shape(weight.shape()));
        return Err(ShapeError::new_err(format!("linear: argument `weight`: {text}")));
    };
    by_type!(x, T => {
        let (mut call, form) = (Call::<T>::new(py, plain(gradients)), Form::rows(x.shape())?);
        let result = form.with_last(outputs);
        let x = call.leaf(&x, form)?;
        let weight = call.weight("weight", weight);
        let bias = call.maybe_weight("bias", bias);
        call.run(result, |tape, params| ops::linear(tape, params, x, &[weight], bias.as_slice()))
    })
}

/// An activation or the softmax over the last axis, by name.
#[pyfunction]
pub fn activation<'py>(py: Python<'py>, gradients: usize, kind: &str, x: Floats<'py>) -> PyResult<Answer<'py>> {
    let activation = match kind {
        "relu" => Some(Activation::Relu),
        "gelu" => Some(Activation::Gelu),
        "gelu_tanh" => Some(Activation::GeluTanh),
        "silu" => Some(Activation::Silu),
        "softmax" => None,
        _ => return Err(ConfigError::new_err(format!("activation: unknown kind {kind:?}"))),
    };
    by_type!(x, T => {
        let (mut call, form) = (Call::<T>::new(py, plain(gradients)), Form::rows(x.shape())?);
        let x = call.leaf(&x, form.clone())?;
        call.run(form, |tape, _| match activation {
            Some(activation) => ops::activation(tape, x, activation),
            None => ops::softmax(tape, x),
        })
    })
}

/// y = f(gate) · up
#[pyfunction]
pub fn gated<'py>(
    py: Python<'py>,
    gradients: usize,
    kind: &str,
    gate: Floats<'py>,
    up: Floats<'py>,
) -> PyResult<Answer<'py>> {
    let kind = match kind {
        "glu" => Gate::Glu,
        "swiglu" => Gate::Swiglu,
        _ => return Err(ConfigError::new_err(format!("gated: unknown kind {kind:?}"))),
    };
    if gate.shape() != up.shape() {
        let text = format!("expected the shape of `gate`, {}, got {}", Shape(gate.shape()), Shape(up.shape()));
        return Err(ShapeError::new_err(format!("gated: argument `up`: {text}")));
    }
    by_type!(gate, T => {
        let mut call = Call::<T>::new(py, plain(gradients));
        let form = Form::rows(gate.shape())?;
        let x = call.leaf_pair(&gate, &up)?;
        call.run(form, |tape, _| ops::gated(tape, x, kind))
    })
}

/// Drops elements with probability `p` and scales the others by 1 / (1 − p).
#[pyfunction]
pub fn dropout<'py>(py: Python<'py>, gradients: usize, x: Floats<'py>, p: f64, seed: u64) -> PyResult<Answer<'py>> {
    by_type!(x, T => {
        let mut call = Call::<T>::new(py, Mode { gradients, seed: Some(seed) });
        let form = Form::rows(x.shape())?;
        let x = call.leaf(&x, form.clone())?;
        call.run(form, |tape, _| ops::dropout(tape, x, 0, p))
    })
}

/// Rows of a table by id, times `scale`.
#[pyfunction]
pub fn embedding<'py>(
    py: Python<'py>,
    gradients: usize,
    ids: Bound<'py, PyArrayDyn<i64>>,
    weight: Floats<'py>,
    scale: f64,
) -> PyResult<Answer<'py>> {
    let &[_, d] = weight.shape() else {
        let text = format!("expected shape (V, D), got {}", Shape(weight.shape()));
        return Err(ShapeError::new_err(format!("embedding: argument `weight`: {text}")));
    };
    let form = Form::Plain { shape: ids.shape().iter().copied().chain([d]).collect(), cols: d };
    let ids = tokens("embedding", "ids", &ids)?;
    by_type!(weight, T => {
        let mut call = Call::<T>::new(py, plain(gradients));
        call.nothing();
        let table = call.weight("weight", weight);
        call.run(form, |tape, params| ops::embedding(tape, params, table, &ids, scale))
    })
}

/// Ids of the core; −1 becomes [`IGNORE`].
fn tokens(op: &str, name: &str, ids: &Bound<'_, PyArrayDyn<i64>>) -> PyResult<Vec<u32>> {
    let convert = |&id: &i64| match id {
        -1 => Ok(IGNORE),
        _ => u32::try_from(id).map_err(|_| {
            TokenOutOfRangeError::new_err(format!("{op}: argument `{name}`: id {id} is outside every vocabulary"))
        }),
    };
    with_slice(ids, |ids| ids.iter().map(convert).collect())
}

/// The label-smoothed loss of logits against one target per row; −1 is ignored. With `mean`, over the others.
#[pyfunction]
pub fn cross_entropy<'py>(
    py: Python<'py>,
    gradients: usize,
    logits: Floats<'py>,
    targets: Bound<'py, PyArrayDyn<i64>>,
    label_smoothing: f64,
    reduction: &str,
) -> PyResult<Answer<'py>> {
    let form = Form::rows(logits.shape())?;
    let shape = targets.shape().to_vec();
    let targets = tokens("cross_entropy", "targets", &targets)?;
    let counted = targets.iter().filter(|&&target| target != IGNORE).count();
    if reduction == "mean" && counted == 0 {
        let text = "no target counts, so there is no mean; use reduction=\"sum\" or give targets";
        return Err(ShapeError::new_err(format!("cross_entropy: argument `targets`: {text}")));
    }
    by_type!(logits, T => {
        let mut call = Call::<T>::new(py, plain(gradients));
        let x = call.leaf(&logits, form)?;
        call.nothing();
        if reduction == "none" {
            let form = Form::Plain { shape, cols: 1 };
            return call.run(form, |tape, _| ops::token_losses(tape, x, &targets, label_smoothing));
        }
        if reduction == "mean" {
            call.scale = 1.0 / counted as T;
        }
        let form = Form::Plain { shape: Vec::new(), cols: 1 };
        call.run(form, |tape, _| Ok(ops::cross_entropy(tape, x, &targets, label_smoothing)?.loss))
    })
}

/// Everything of an attention but its arrays.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct AttentionOptions<'py> {
    query_lengths: Vec<usize>,
    key_lengths: Vec<usize>,
    causal: bool,
    query_start: Vec<usize>,
    keep: Option<Bound<'py, PyArrayDyn<bool>>>,
    scale: Option<f64>,
    dropout: f64,
    seed: Option<u64>,
    return_weights: bool,
}

/// A mask of four axes.
pub fn dense_mask(keep: &Bound<'_, PyArrayDyn<bool>>) -> PyResult<DenseMask> {
    let shape = keep.shape().try_into().map_err(|_| ShapeError::new_err("expected a mask of four axes"))?;
    with_slice(keep, |keep| Ok(DenseMask { keep: keep.into(), shape }))
}

/// softmax(scale · q kᵀ + bias) v of every head, and the weights where they are asked for.
#[pyfunction]
pub fn attention<'py>(
    py: Python<'py>,
    gradients: usize,
    q: Floats<'py>,
    k: Floats<'py>,
    v: Floats<'py>,
    bias: Option<Floats<'py>>,
    options: AttentionOptions<'py>,
) -> PyResult<(Answer<'py>, Option<Bound<'py, PyAny>>)> {
    by_type!(q, T => attend::<T>(py, gradients, q, k, v, bias, options))
}

fn attend<'py, T: Real>(
    py: Python<'py>,
    gradients: usize,
    q: Floats<'py>,
    k: Floats<'py>,
    v: Floats<'py>,
    bias: Option<Floats<'py>>,
    options: AttentionOptions<'py>,
) -> PyResult<(Answer<'py>, Option<Bound<'py, PyAny>>)> {
    let four = |x: &Floats<'py>| -> PyResult<[usize; 4]> {
        x.shape().try_into().map_err(|_| ShapeError::new_err("attention: expected arrays of four axes (B, H, L, K)"))
    };
    let (shape, keys) = (four(&q)?, four(&k)?);
    let [b, n_heads, l, head_dim] = shape;
    let [_, n_kv_heads, m, _] = keys;
    let scale = options.scale.unwrap_or_else(|| (head_dim as f64).sqrt().recip());
    let heads = Heads { n_heads, n_kv_heads, head_dim, scale };
    let rows = Rows::from_lengths(&options.query_lengths).starting_at(&options.query_start).map_err(raise)?;
    let key_rows = Rows::from_lengths(&options.key_lengths);
    let keep = options.keep.as_ref().map(dense_mask).transpose()?;

    let mut call = Call::<T>::new(py, Mode { gradients, seed: options.seed });
    // Where nothing says which head or sequence a row belongs to, each head is taken for a sequence of one head: then the
    // arrays need not be turned.
    let full = |lengths: &[usize], longest| lengths.iter().all(|&length| length == longest);
    let alike = n_heads == n_kv_heads
        && full(&options.query_lengths, l)
        && full(&options.key_lengths, m)
        && keep.is_none()
        && bias.is_none()
        && options.dropout == 0.0
        && !options.return_weights;
    let (heads, rows, key_rows, form, key_form) = if alike {
        let each = |values: &[usize]| values.iter().flat_map(|&value| repeat_n(value, n_heads)).collect::<Vec<_>>();
        let starts = each(&options.query_start);
        (
            Heads { n_heads: 1, n_kv_heads: 1, ..heads },
            Rows::from_lengths(&each(&options.query_lengths)).starting_at(&starts).map_err(raise)?,
            Rows::from_lengths(&each(&options.key_lengths)),
            Form::rows(&shape)?,
            Form::rows(&keys)?,
        )
    } else {
        let (form, key_form) = (rows.clone(), key_rows.clone());
        let (form, key_form) = (Form::Heads { shape, rows: form }, Form::Heads { shape: keys, rows: key_form });
        (heads, rows, key_rows, form, key_form)
    };
    let numbers = [shape, keys, keys].map(|shape| shape.iter().product::<usize>()).iter().sum();
    let [q, k, v] = door::copying(py, numbers, || {
        Ok([call.leaf(&q, form.clone())?, call.leaf(&k, key_form.clone())?, call.leaf(&v, key_form)?])
    })?
    .map(|var| Columns { var, start: 0 });
    let bias = match bias {
        Some(bias) => Some(Bias { var: call.leaf(&bias, Form::rows(bias.shape())?)?, shape: four(&bias)? }),
        None => None,
    };
    if options.return_weights {
        call.collect_attention();
    }
    let dropout = (options.dropout > 0.0).then_some((0, options.dropout));
    let (answer, weights) = call.run_with(form, |tape, _| {
        let masks = Masks { causal: options.causal, keep: keep.as_ref(), bias, dropout };
        let y = ops::attention(tape, q, &rows, KeysValues::Packed { k, v, rows: &key_rows }, heads, &masks)?;
        let weights = tape.take_attention();
        let padded = weights.first().map(|weights| pad_weights(weights, [b, n_heads, l, m])).transpose()?;
        Ok((y, padded))
    })?;
    let weights = weights.map(|weights| to_array(py, weights, &[b, n_heads, l, m])).transpose()?;
    Ok((answer, weights.map(Bound::into_any)))
}

/// (H, L_i, M_i) of each sequence as (B, H, L, M), zeros at padding.
fn pad_weights<T: Real>(weights: &AttentionWeights<T>, shape: [usize; 4]) -> Result<Vec<T>> {
    let [b, n_heads, l, m] = shape;
    let mut padded = zeros(b * n_heads * l * m)?;
    let mut from = weights.values.as_slice();
    for (i, &(heads, queries, keys)) in weights.shapes.iter().enumerate() {
        for head in 0..heads {
            for query in 0..queries {
                let at = ((i * n_heads + head) * l + query) * m;
                if let (Some((row, rest)), Some(to)) = (from.split_at_checked(keys), padded.get_mut(at..at + keys)) {
                    to.copy_from_slice(row);
                    from = rest;
                }
            }
        }
    }
    Ok(padded)
}
