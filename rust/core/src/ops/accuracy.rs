//! How exact f32 is: operations of common sizes beside themselves in f64, on the same numbers.
//! `cargo test -p transformer_core --lib accuracy -- --nocapture` prints the table of docs/numerics.md.

use super::testing::{normal, params, run};
use super::*;
use crate::rows::Rows;

const ROWS: usize = 192;
const D: usize = 512;

/// The largest error in `found`, as a share of the largest number of `exact`.
fn error(found: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(found.len(), exact.len());
    let largest = exact.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    found.iter().zip(exact).fold(0.0f64, |max, (a, b)| max.max((a - b).abs())) / largest
}

/// One line of the table: the error of the value, and the largest among the gradients'.
macro_rules! line {
    ($name:literal, $inputs:literal, $shapes:expr, |$tape:ident, $params:ident, $ids:ident, $x:ident| $body:expr) => {{
        let (single, $ids) = params::<f32>($shapes);
        let double = single.cast::<f64>().unwrap();
        let inputs: Vec<Tensor<f32>> = (1..=$inputs).map(|seed| normal(ROWS, D, seed)).collect();
        let doubled = |x: &Tensor<f32>| {
            let values: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            Tensor::from_slice(x.rows(), x.cols(), &values).unwrap()
        };
        let inputs64: Vec<Tensor<f64>> = inputs.iter().map(doubled).collect();
        let found = run(&single, &inputs, None, |$tape, $params, $x| $body).unwrap().parts();
        let exact = run(&double, &inputs64, None, |$tape, $params, $x| $body).unwrap().parts();
        let errors: Vec<f64> = found.iter().zip(&exact).map(|(found, exact)| error(found, exact)).collect();
        let (value, gradients) = (errors[0], errors[1..].iter().fold(0.0f64, |max, &e| max.max(e)));
        println!("| {} | {value:.1e} | {gradients:.1e} |", $name);
        assert!(value < 2e-6 && gradients < 2e-6, "{}: {value:e} and {gradients:e}", $name);
    }};
}

#[test]
fn accuracy_is_that_of_the_table() {
    println!("| operation | value | gradients |\n|---|---|---|");
    line!("linear, 512 to 512", 1, &[&[D, D], &[D]], |tape, p, i, x| linear(tape, p, x[0], &i[..1], &i[1..]));
    line!("layer_norm", 1, &[&[D], &[D]], |tape, p, i, x| layer_norm(tape, p, x[0], Some(i[0]), Some(i[1]), 1e-5));
    line!("rms_norm", 1, &[&[D]], |tape, p, i, x| rms_norm(tape, p, x[0], Some(i[0]), 1e-5));
    line!("batch_norm", 1, &[&[D], &[D]], |tape, p, i, x| {
        batch_norm(tape, p, x[0], Some(i[0]), Some(i[1]), None, 1e-5)
    });
    line!("softmax", 1, &[], |tape, _p, _i, x| softmax(tape, x[0]));
    line!("gelu", 1, &[], |tape, _p, _i, x| activation(tape, x[0], Activation::Gelu));
    line!("gelu_tanh", 1, &[], |tape, _p, _i, x| activation(tape, x[0], Activation::GeluTanh));
    line!("silu", 1, &[], |tape, _p, _i, x| activation(tape, x[0], Activation::Silu));
    let rows = Rows::from_lengths(&[ROWS]);
    let heads = Heads { n_heads: 8, n_kv_heads: 8, head_dim: D / 8, scale: 0.125 };
    macro_rules! attend {
        ($name:literal, $causal:literal) => {
            line!($name, 3, &[], |tape, _p, _i, x| {
                let [q, k, v] = [0, 1, 2].map(|i| Columns { var: x[i], start: 0 });
                let masks = Masks { causal: $causal, ..Masks::default() };
                attention(tape, q, &rows, KeysValues::Packed { k, v, rows: &rows }, heads, &masks)
            })
        };
    }
    attend!("attention, 192 keys, heads of 64", false);
    attend!("attention, the same, causal", true);
    let targets: Vec<u32> = (0..ROWS as u32).map(|i| i * 7 % D as u32).collect();
    line!("cross_entropy", 1, &[], |tape, _p, _i, x| Ok(cross_entropy(tape, x[0], &targets, 0.1)?.loss));
}
