//! Affine maps.

use super::residual::draw;
use super::{Activation, activation, dropout, expect_len};
use crate::ensure;
use crate::error::{Result, Shape};
use crate::kernels::Beta;
use crate::kernels::activation::{self as curves, relu_backward};
use crate::kernels::elementwise::multiple;
use crate::kernels::gemm::{self, Affine, Epilogue, Mat, MatMut, NoEpilogue, Precision, Rhs};
use crate::kernels::int8;
use crate::kernels::reduce::{fold_partials, partial_rows, sum_blocks};
use crate::profile::{self, Work};
use crate::rng::Dropout;
use crate::simd::Float;
use crate::tape::{Backward, CompactRhs, Operation, ParamId, Params, Pool, Tape, Tensor, Var};

/// y = x Wᵀ + b for weights of shape (out, in). Several weights, declared as one group, stand on top of each other: the
/// results stand side by side, (R, ΣO). Biases: none, or a group of one for each weight.
pub fn linear<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weights: &[ParamId],
    biases: &[ParamId],
) -> Result<Var> {
    affine(tape, params, x, weights, biases, None, None)
}

/// y = dropout(f(x Wᵀ + b)), the same values as [`linear`], [`activation`] and [`dropout`] one after the other. `site` is the
/// number of dropout's place in the model, `p` its probability.
pub fn linear_activation<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weights: &[ParamId],
    biases: &[ParamId],
    kind: Activation,
    (site, p): (u32, f64),
) -> Result<Var> {
    let wanted = tape.wants(params, &[x], weights) || tape.wants(params, &[], biases);
    // What ReLU and dropout let pass can be seen in y; for the others x Wᵀ + b must be kept: there is nothing to fuse.
    if wanted && kind != Activation::Relu {
        let y = linear(tape, params, x, weights, biases)?;
        let y = activation(tape, y, kind)?;
        return dropout(tape, y, site, p);
    }
    let drawn = draw(tape, "linear", site, p)?;
    affine(tape, params, x, weights, biases, Some(kind), drawn)
}

fn affine<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weights: &[ParamId],
    biases: &[ParamId],
    kind: Option<Activation>,
    dropout: Option<Dropout>,
) -> Result<Var> {
    let (rows, d) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    let widths = check(params, d, weights, biases)?;
    let o = widths.iter().sum();
    if let Some(w) = params.compact(weights)? {
        refuse_gradients(tape, params, "linear")?;
        let name = match w {
            CompactRhs::Bf16(_) => "linear_bf16",
            CompactRhs::Int8(_) => "linear_int8",
        };
        let _timed = profile::forward(name, [d, o], || Work::product::<T>(rows, d, o));
        let mut y = tape.pool.tensor(rows, o)?;
        let b = (!biases.is_empty()).then(|| params.group(biases));
        finish(OfCompact { y: &mut y, x: tape.value(x)?, w: &w }, b, kind, dropout)?;
        return Ok(tape.push(y, false));
    }
    let wanted = tape.wants(params, &[x], weights) || tape.wants(params, &[], biases);
    let _timed = profile::forward("linear", [d, o], || Work::product::<T>(rows, d, o));
    let mut y = tape.pool.tensor(rows, o)?;
    let b = (!biases.is_empty()).then(|| params.group(biases));
    // Packing a weight again costs as much as some ten rows; a pass that records is soon followed by another weight.
    let keeps = !tape.is_recording() && tape.precision == Precision::Full;
    let packed = keeps.then(|| params.packed(weights, o, d)).transpose()?;
    let w = match &packed {
        Some(packed) => Rhs::Packed(packed),
        None => transposed(params.group(weights), o, d)?,
    };
    product(tape.precision, &mut y, matrix(tape.value(x)?)?, w, b, kind, dropout)?;
    let y = tape.push(y, wanted);
    if wanted {
        let scale = dropout.map_or(T::ONE, |dropout| T::from_f64(dropout.scale));
        let relu = kind.map(|_| (y, scale));
        let node = Node { x, weights: weights.into(), biases: biases.into(), widths, relu };
        match relu {
            Some((y, _)) => tape.record(y, &[x, y], node),
            None => tape.record(y, &[x], node),
        }
    }
    Ok(y)
}

/// Refuses to record what a matrix in another form than f32 is used for.
pub(super) fn refuse_gradients<T: Float>(tape: &Tape<T>, params: &Params<T>, op: &str) -> Result<()> {
    ensure!(
        !tape.is_recording(),
        Unsupported,
        "{op}: weights in {} give no gradients; take those of the f32 model",
        params.stored().name()
    );
    Ok(())
}

/// Refuses parameters that do not fit x; returns the number of rows of each weight.
pub(super) fn check<T: Float>(
    params: &Params<T>,
    d: usize,
    weights: &[ParamId],
    biases: &[ParamId],
) -> Result<Vec<usize>> {
    let shape = |id: ParamId| &params.layout().entry(id).shape[..];
    let mut widths = Vec::with_capacity(weights.len());
    for &w in weights {
        ensure!(
            matches!(shape(w), &[_, columns] if columns == d),
            Shape,
            "linear: argument `weight`: expected shape (out, {d}) for `x` of {d} columns, got {}",
            Shape(shape(w))
        );
        widths.push(shape(w)[0]);
    }
    ensure!(
        biases.is_empty() || biases.len() == weights.len(),
        Shape,
        "linear: argument `bias`: expected none or one for each of {} weights, got {}",
        weights.len(),
        biases.len()
    );
    for (&b, &width) in biases.iter().zip(&widths) {
        expect_len(params, "linear", "bias", b, width, "the rows of its `weight`")?;
    }
    Ok(widths)
}

/// Wᵀ of a weight (out, in), where it lies.
pub(super) fn transposed<T: Float>(w: &[T], outputs: usize, inputs: usize) -> Result<Rhs<'_, T>> {
    Ok(Mat::new(w, outputs, inputs)?.t().into())
}

pub(super) fn matrix<T: Float>(x: &Tensor<T>) -> Result<Mat<'_, T>> {
    Mat::new(x, x.rows(), x.cols())
}

/// A product that waits for what is done to its results.
trait Multiply<T: Float> {
    fn by<E: Epilogue<T>>(self, epilogue: &E) -> Result<()>;
}

/// x Wᵀ of floats.
struct Floats<'a, T> {
    precision: Precision,
    y: MatMut<'a, T>,
    x: Mat<'a, T>,
    w: Rhs<'a, T>,
}

impl<T: Float> Multiply<T> for Floats<'_, T> {
    fn by<E: Epilogue<T>>(self, epilogue: &E) -> Result<()> {
        gemm::gemm_with(self.precision, self.y, self.x, self.w, Beta::Assign, epilogue)
    }
}

/// x Wᵀ with weights in another form: in bf16 that of f32 once W is rounded; in int8 x is brought there row by row.
struct OfCompact<'a, T> {
    y: &'a mut [T],
    x: &'a [T],
    w: &'a CompactRhs<T>,
}

impl<T: Float> Multiply<T> for OfCompact<'_, T> {
    fn by<E: Epilogue<T>>(self, epilogue: &E) -> Result<()> {
        match self.w {
            CompactRhs::Bf16(w) => gemm::product_bf16(self.y, self.x, w, epilogue),
            CompactRhs::Int8(w) => int8::product(self.y, self.x, w, epilogue),
        }
    }
}

/// y = dropout(f(x Wᵀ + b)): the one place where a weight in f32 meets a product going forward.
pub(super) fn product<T: Float>(
    precision: Precision,
    y: &mut Tensor<T>,
    x: Mat<T>,
    w: Rhs<T>,
    bias: Option<&[T]>,
    kind: Option<Activation>,
    dropout: Option<Dropout>,
) -> Result<()> {
    let (rows, o) = (x.shape().0, y.cols());
    finish(Floats { precision, y: MatMut::new(y, rows, o)?, x, w }, bias, kind, dropout)
}

/// x Wᵀ + b with a weight in another form than f32.
pub(super) fn product_compact<T: Float>(y: &mut [T], x: &[T], w: &CompactRhs<T>, bias: Option<&[T]>) -> Result<()> {
    finish(OfCompact { y, x, w }, bias, None, None)
}

/// The product, its bias, activation and dropout, in one pass.
fn finish<T: Float>(
    product: impl Multiply<T>,
    bias: Option<&[T]>,
    kind: Option<Activation>,
    dropout: Option<Dropout>,
) -> Result<()> {
    fn run<T: Float, A: curves::Curve>(
        product: impl Multiply<T>,
        bias: Option<&[T]>,
        activation: A,
        dropout: Option<Dropout>,
    ) -> Result<()> {
        product.by(&Affine { bias, activation, dropout })
    }
    match kind {
        None if bias.is_none() && dropout.is_none() => product.by(&NoEpilogue),
        None => run(product, bias, curves::Identity, dropout),
        Some(Activation::Relu) => run(product, bias, curves::Relu, dropout),
        Some(Activation::Gelu) => run(product, bias, curves::Gelu, dropout),
        Some(Activation::GeluTanh) => run(product, bias, curves::GeluTanh, dropout),
        Some(Activation::Silu) => run(product, bias, curves::Silu, dropout),
    }
}

/// dx (+)= dy W
pub(super) fn product_dx<T: Float>(
    precision: Precision,
    dx: &mut [T],
    beta: Beta,
    dy: Mat<T>,
    w: &[T],
    d: usize,
) -> Result<()> {
    let (rows, o) = dy.shape();
    let _timed = profile::part("dx", [d, o], || Work::product::<T>(rows, o, d));
    gemm::gemm_with(precision, MatMut::new(dx, rows, d)?, dy, Mat::new(w, o, d)?, beta, &NoEpilogue)
}

/// dW (+)= dyᵀ x
pub(super) fn product_dw<T: Float>(
    precision: Precision,
    dw: &mut [T],
    beta: Beta,
    dy: Mat<T>,
    x: Mat<T>,
) -> Result<()> {
    let ((rows, o), (_, d)) = (dy.shape(), x.shape());
    let _timed = profile::part("dW", [d, o], || Work::product::<T>(o, rows, d));
    gemm::gemm_with(precision, MatMut::new(dw, dy.shape().1, x.shape().1)?, dy.t(), x, beta, &NoEpilogue)
}

/// The sum of the rows of dy, in the first row of what is returned.
pub(super) fn column_sums<T: Float>(dy: &Tensor<T>, pool: &mut Pool<T>) -> Result<Tensor<T>> {
    let _timed = profile::part("db", [dy.cols(), 0], || Work::passes::<T>(1, dy.rows(), dy.cols()));
    let mut sums = pool.tensor(partial_rows(dy.rows()), dy.cols())?;
    sum_blocks(&mut sums, dy, dy.cols())?;
    fold_partials(&mut sums, dy.cols())?;
    Ok(sums)
}

struct Node<T> {
    x: Var,
    weights: Box<[ParamId]>,
    biases: Box<[ParamId]>,
    widths: Vec<usize>,
    /// y, where it went through ReLU, and what the survivors of dropout were multiplied with.
    relu: Option<(Var, T)>,
}

impl<T: Float> Operation<T> for Node<T> {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, mut dy: Tensor<T>) -> Result<()> {
        let Node { x: input, weights, biases, widths, relu } = *self;
        let slope = if relu.is_some() { 3 } else { 0 };
        let _timed = profile::backward("linear", [cx.value(input)?.cols(), dy.cols()], || {
            Work::passes::<T>(slope, dy.rows(), dy.cols())
        });
        if let Some((y, scale)) = relu {
            relu_backward(&mut dy, cx.value(y)?, scale)?;
        }
        let (x, params, precision) = (matrix(cx.value(input)?)?, cx.params, cx.precision);
        let (rows, d) = x.shape();
        let all = matrix(&dy)?;
        // y = x Wᵀ + b  =>  dx = dy W, dW = dyᵀ x, db = Σ dy over the rows
        cx.accumulate(input, rows, d, |dx, beta| product_dx(precision, dx, beta, all, params.group(&weights), d))?;
        if !cx.accumulate_group(&weights, |dw, beta| product_dw(precision, dw, beta, all, x))? {
            let mut first = 0;
            for (&w, width) in weights.iter().zip(&widths) {
                let part = all.columns(first..first + width)?;
                cx.accumulate_param(w, |dw, beta| product_dw(precision, dw, beta, part, x))?;
                first += width;
            }
        }
        if biases.iter().any(|&b| cx.wants_param(b)) {
            let sums = column_sums(&dy, cx.pool)?;
            let mut first = 0;
            for (&b, width) in biases.iter().zip(&widths) {
                cx.accumulate_param(b, |db, beta| multiple(db, beta, T::ONE, &sums[first..first + width]))?;
                first += width;
            }
            cx.pool.recycle(sums);
        }
        cx.pool.recycle(dy);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::rng::Key;
    use crate::tape::{Builder, Init, Stored, gradcheck};
    use std::sync::Arc;

    /// Weights of these heights as one group, and their biases as another.
    fn group<T: Float>(d: usize, widths: &[usize]) -> (Params<T>, Vec<ParamId>, Vec<ParamId>) {
        let mut b = Builder::new();
        let names: Vec<_> = (0..widths.len()).map(|i| (format!("w{i}"), format!("b{i}"), [widths[i], d])).collect();
        let normal = Init::Normal { std: 1.0 };
        let weights: Vec<_> = names.iter().map(|(w, _, shape)| (&w[..], &shape[..], normal)).collect();
        let weights = b.group(&weights);
        let biases: Vec<_> = names.iter().map(|(_, b, shape)| (&b[..], &shape[..1], normal)).collect();
        let biases = b.group(&biases);
        (Params::init(Arc::new(b.finish()), 2).unwrap(), weights, biases)
    }

    #[test]
    fn gradients_equal_differences() {
        for (rows, d, widths) in [(1, 1, &[1][..]), (5, 3, &[4]), (67, 4, &[3, 2, 5])] {
            let (mut params, w, b) = group(d, widths);
            let x = [testing::normal(rows, d, 1)];
            gradcheck(&params, &x, None, |tape, params, x| linear(tape, params, x[0], &w, &b)).unwrap();
            b.iter().for_each(|&b| params.set_trainable(b, false));
            gradcheck(&params, &x, None, |tape, params, x| {
                let y = linear(tape, params, x[0], &w, &[])?;
                let z = linear(tape, params, x[0], &w, &b)?; // a second gradient for x and for the weights
                super::super::add(tape, y, z)
            })
            .unwrap();
            params.set_trainable(w[0], false);
            gradcheck(&params, &x, None, |tape, params, x| linear(tape, params, x[0], &w, &b)).unwrap();
        }
    }

    #[test]
    fn fused_with_activation_and_dropout_equals_composed_bit_for_bit() {
        let (params, w, b) = group::<f32>(20, &[33]);
        let inputs = [testing::normal(70, 20, 1)];
        for kind in [Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
            for (b, training) in [(&b[..], None), (&[], None), (&b, Some(Key::new(5)))] {
                let fused = testing::run(&params, &inputs, training, |tape, params, x| {
                    linear_activation(tape, params, x[0], &w, b, kind, (3, 0.4))
                });
                let composed = testing::run(&params, &inputs, training, |tape, params, x| {
                    let y = linear(tape, params, x[0], &w, b)?;
                    let y = activation(tape, y, kind)?;
                    dropout(tape, y, 3, 0.4)
                });
                let composed = composed.unwrap();
                assert_eq!(fused.unwrap(), composed);
                assert_eq!(
                    composed.y.iter().filter(|&&y| y == 0.0).count() > 500,
                    training.is_some() || kind == Activation::Relu
                );
                if training.is_none() {
                    let mut tape = Tape::evaluation(Pool::default());
                    let x = tape.constant(testing::normal(70, 20, 1));
                    let y = linear_activation(&mut tape, &params, x, &w, b, kind, (3, 0.4)).unwrap();
                    assert_eq!(tape.value(y).unwrap()[..], composed.y);
                }
            }
        }
    }

    #[test]
    fn gradients_through_relu_and_dropout_equal_differences() {
        let (params, w, b) = group(4, &[6]);
        let x = [testing::normal(9, 4, 1)];
        for training in [None, Some(Key::new(2))] {
            gradcheck(&params, &x, training, |tape, params, x| {
                linear_activation(tape, params, x[0], &w, &b, Activation::Relu, (3, 0.3))
            })
            .unwrap();
        }
    }

    #[test]
    fn a_group_equals_its_members_bit_for_bit() {
        let (params, w, b) = group::<f32>(37, &[5, 16, 30]);
        let x = [testing::normal(50, 37, 1)];
        let together = testing::run(&params, &x, None, |tape, params, x| linear(tape, params, x[0], &w, &b)).unwrap();
        let mut first = 0;
        for i in 0..3 {
            let (w, b) = (w[i], b[i]);
            let alone =
                testing::run(&params, &x, None, |tape, params, x| linear(tape, params, x[0], &[w], &[b])).unwrap();
            let width = alone.y.len() / 50;
            let columns = together.y.chunks(51).flat_map(|row| &row[first..first + width]);
            assert!(columns.eq(&alone.y));
            first += width;
        }
    }

    #[test]
    fn a_packed_weight_gives_the_same_bits_and_follows_the_values() {
        let (mut params, w, b) = group::<f32>(37, &[5, 30]);
        let x = [testing::normal(9, 37, 1)];
        let forward = |tape: &mut Tape<f32>, params: &Params<f32>, x: &[Var]| linear(tape, params, x[0], &w, &b);
        for _ in 0..2 {
            let recorded = testing::run(&params, &x, None, forward).unwrap();
            for _ in 0..2 {
                let mut tape = Tape::evaluation(Pool::default());
                let x = tape.constant(testing::normal(9, 37, 1));
                let y = forward(&mut tape, &params, &[x]).unwrap();
                assert_eq!(tape.value(y).unwrap()[..], recorded.y);
            }
            params.set(w[1], &[0.5; 30 * 37]).unwrap();
        }
    }

    #[test]
    fn a_group_in_int8_is_its_product_with_bias_and_activation() {
        let mut b = Builder::new();
        let bias = |i| (["a", "b"][i], [5usize, 30][i]);
        let weights = b.group(&[("v", &[5, 37], Init::Xavier), ("w", &[30, 37], Init::Xavier)]);
        let normal = Init::Normal { std: 1.0 };
        let biases = b.group(&[(bias(0).0, &[bias(0).1], normal), (bias(1).0, &[bias(1).1], normal)]);
        let layout = Arc::new(b.finish());
        let params = Params::<f32>::init(layout.clone(), 2).unwrap();
        let int8 = params.convert(layout.stored_in(Stored::Int8, &[])).unwrap();
        let x: Tensor<f32> = testing::normal(9, 37, 1);
        let Ok(Some(CompactRhs::Int8(packed))) = int8.compact(&weights) else { panic!("not in int8") };
        let mut expected = vec![0.0; 9 * 35];
        int8::product(&mut expected, &x, &packed, &NoEpilogue).unwrap();
        for (y, b) in expected.chunks_mut(35).flat_map(|row| row.iter_mut().zip(params.group(&biases))) {
            *y = (*y + b).max(0.0);
        }
        let mut tape = Tape::evaluation(Pool::default());
        let x = tape.constant(x);
        let y = linear_activation(&mut tape, &int8, x, &weights, &biases, Activation::Relu, (0, 0.0)).unwrap();
        assert_eq!(tape.value(y).unwrap()[..], expected);
        let part = linear(&mut tape, &int8, x, &weights[1..], &biases[1..]).unwrap();
        let both = linear(&mut tape, &int8, x, &weights, &biases).unwrap();
        for r in 0..9 {
            assert_eq!(tape.value(part).unwrap().row(r), &tape.value(both).unwrap().row(r)[5..]);
        }
        let mut tape = Tape::recording(Pool::default());
        let x = tape.leaf(testing::normal(9, 37, 1));
        let error = linear(&mut tape, &int8, x, &weights, &biases).unwrap_err();
        assert!(matches!(error, crate::error::Error::Unsupported(_)));
    }

    #[test]
    fn a_group_in_bf16_is_that_of_rounded_weights_bit_for_bit() {
        let (params, w, b) = group::<f32>(37, &[5, 64, 30]);
        let bf16 = params.convert(params.layout().stored_in(Stored::Bf16, &[])).unwrap();
        let rounded = bf16.convert(params.layout().clone()).unwrap();
        let key = Key::new(5);
        for rows in [1, 9, 70] {
            let forward = |params: &Params<f32>, members: std::ops::Range<usize>, training: bool| {
                let tape = Tape::training(Pool::default(), key).without_recording();
                let mut tape = if training { tape } else { Tape::evaluation(Pool::default()) };
                let x = tape.constant(testing::normal(rows, 37, 1));
                let (w, b, dropout) = (&w[members.clone()], &b[members], (3, 0.4));
                let y = linear_activation(&mut tape, params, x, w, b, Activation::Gelu, dropout).unwrap();
                tape.value(y).unwrap().to_vec()
            };
            for (members, training) in [(0..3, false), (1..3, false), (0..1, false), (0..3, true)] {
                let expected = forward(&rounded, members.clone(), training);
                assert!(forward(&bf16, members.clone(), training) == expected, "{rows} rows, {members:?}");
            }
        }
        let mut tape = Tape::recording(Pool::default());
        let x = tape.leaf(testing::normal(9, 37, 1));
        let error = linear(&mut tape, &bf16, x, &w, &b).unwrap_err();
        assert!(matches!(&error, crate::error::Error::Unsupported(text) if text.contains("in bf16 give no gradients")));
    }

    #[test]
    fn the_result_equals_plain_sums() {
        let (params, w, b) = group::<f64>(9, &[4, 3]);
        let x = testing::normal::<f64>(6, 9, 1);
        let y =
            testing::run(&params, std::slice::from_ref(&x), None, |tape, params, x| linear(tape, params, x[0], &w, &b));
        let (w, b) = (params.group(&w), params.group(&b));
        let cell = |i: usize| (0..9).map(|k| x.row(i / 7)[k] * w[i % 7 * 9 + k]).sum::<f64>() + b[i % 7];
        let expected: Vec<f64> = (0..42).map(cell).collect();
        crate::kernels::testing::assert_close(&y.unwrap().y, &expected, 1e-13);
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, w, b) = group::<f32>(100, &[130, 40]);
        let forward = |tape: &mut Tape<f32>, params: &Params<f32>, x: &[Var]| linear(tape, params, x[0], &w, &b);
        testing::same_bits(&params, &[testing::normal(700, 100, 1)], None, forward);
        testing::no_rows(&params, &[testing::normal(0, 100, 1)], None, forward);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (params, w, b) = group::<f32>(4, &[3, 2]);
        let mut tape = Tape::evaluation(Pool::default());
        let (x, wide) = (tape.constant(testing::normal(2, 4, 1)), tape.constant(testing::normal(2, 5, 1)));
        let mut error = |x, w: &[ParamId], b: &[ParamId]| linear(&mut tape, &params, x, w, b).unwrap_err().to_string();
        assert!(error(wide, &w, &b).contains("linear: argument `weight`: expected shape (out, 5)"));
        assert!(error(x, &w, &b[..1]).contains("`bias`: expected none or one for each of 2 weights, got 1"));
        assert!(
            error(x, &w[..1], &b[1..])
                .contains("`bias`: expected shape (3,), got (2,); it must fit the rows of its `weight`")
        );
        assert!(error(x, &b[..1], &[]).contains("got (3,)"));
    }
}
