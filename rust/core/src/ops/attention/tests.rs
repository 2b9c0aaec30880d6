use super::*;
use crate::kernels::testing;
use crate::rng::Key;
use crate::simd::Buffer;
use crate::tape::{Builder, Grads, Params, Pool, gradcheck};
use crate::threads::with_local_limit;

fn normal<T: Float>(rows: usize, cols: usize, seed: u64) -> Tensor<T> {
    Tensor::from_slice(rows, cols, &testing::normal(rows * cols, seed)).unwrap()
}

fn no_params<T: Float>() -> Params<T> {
    Params::init(Arc::new(Builder::new().finish()), 0).unwrap()
}

fn heads(n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Heads {
    Heads { n_heads, n_kv_heads, head_dim, scale: 0.7 }
}

fn at(var: Var, start: usize) -> Columns {
    Columns { var, start }
}

fn mask(shape: [usize; 4]) -> DenseMask {
    let n = shape.iter().product::<usize>() as u64;
    DenseMask { keep: (0..n).map(|i| Key::new(9).uniform(i) < 0.7).collect(), shape }
}

#[test]
fn gradients_equal_differences_on_merged_projections() {
    let rows = Rows::from_lengths(&[4, 1, 0, 6]);
    let keep = mask([4, 3, 6, 6]);
    let all = [
        Masks::default(),
        Masks { causal: true, ..Masks::default() },
        Masks { keep: Some(&keep), ..Masks::default() },
        Masks { causal: true, keep: Some(&keep), dropout: Some((5, 0.3)), ..Masks::default() },
    ];
    for (i, masks) in all.iter().enumerate() {
        for kv in [1, 3] {
            let width = (3 + 2 * kv) * 5;
            let forward = |tape: &mut Tape<f64>, _: &Params<f64>, x: &[Var]| {
                let (k, v) = (at(x[0], 15), at(x[0], 15 + 5 * kv));
                attention(tape, at(x[0], 0), &rows, KeysValues::Packed { k, v, rows: &rows }, heads(3, kv, 5), masks)
            };
            gradcheck(&no_params(), &[normal(11, width, 1)], Some(Key::new(2)), forward)
                .unwrap_or_else(|e| panic!("masks {i}, {kv} key/value heads: {e}"));
        }
    }
}

#[test]
fn gradients_equal_differences_across_lengths_with_a_bias() {
    let (queries, keys) = (Rows::from_lengths(&[3, 5]), Rows::from_lengths(&[7, 2]));
    for shape in [[2, 2, 5, 7], [1, 2, 5, 7], [2, 1, 1, 7], [1, 1, 5, 1], [1, 1, 1, 1]] {
        for dropout in [None, Some((1, 0.25))] {
            let bias = normal(shape[..3].iter().product(), shape[3], 4);
            // q, k and v in variables of their own, q with a column that nothing reads.
            let inputs = [normal(8, 7, 1), normal(9, 6, 2), normal(9, 6, 3), bias];
            gradcheck(&no_params(), &inputs, Some(Key::new(2)), |tape, _, x| {
                let masks = Masks { bias: Some(Bias { var: x[3], shape }), dropout, ..Masks::default() };
                let keys_values = KeysValues::Packed { k: at(x[1], 0), v: at(x[2], 0), rows: &keys };
                attention(tape, at(x[0], 1), &queries, keys_values, heads(2, 2, 3), &masks)
            })
            .unwrap_or_else(|e| panic!("bias {shape:?}, dropout {dropout:?}: {e}"));
        }
    }
}

#[test]
fn gradients_equal_differences_where_one_variable_is_query_key_and_value() {
    let rows = Rows::from_lengths(&[3, 4]).starting_at(&[2, 0]).unwrap();
    gradcheck(&no_params(), &[normal(7, 6, 1)], None, |tape, _, x| {
        let masks = Masks { causal: true, ..Masks::default() };
        let keys_values = KeysValues::Packed { k: at(x[0], 0), v: at(x[0], 0), rows: &rows };
        attention(tape, at(x[0], 0), &rows, keys_values, heads(2, 2, 3), &masks)
    })
    .unwrap();
}

/// Output and gradients of (q, kv) with a pool full of NaN, so that whatever is not written shows.
fn run(training: Option<Key>, weights: bool) -> (Vec<f32>, Vec<Vec<f32>>, Vec<AttentionWeights<f32>>) {
    let (queries, keys) = (Rows::from_lengths(&[70, 3, 150]), Rows::from_lengths(&[129, 40, 150]));
    let mut pool = Pool::default();
    for n in (6..18).map(|e| 1 << e) {
        (0..8).for_each(|_| pool.recycle(Tensor::from_slice(1, n, &vec![f32::NAN; n]).unwrap()));
    }
    let mut tape = match training {
        Some(key) => Tape::training(pool, key),
        None => Tape::recording(pool),
    };
    if weights {
        tape.collect_attention();
    }
    let (q, kv) = (tape.leaf(normal(223, 32, 1)), tape.leaf(normal(319, 32, 2)));
    let masks = Masks { causal: true, dropout: Some((3, 0.1)), ..Masks::default() };
    let keys_values = KeysValues::Packed { k: at(kv, 0), v: at(kv, 16), rows: &keys };
    let y = attention(&mut tape, at(q, 0), &queries, keys_values, heads(4, 2, 8), &masks).unwrap();
    let value = tape.value(y).unwrap().to_vec();
    let collected = tape.take_attention();
    let params = no_params();
    let dy = normal(223, 32, 3);
    let mut dvars = tape.backward(&params, &mut Grads::new(&params).unwrap(), [(y, dy)]).unwrap();
    let gradients = [q, kv].map(|var| dvars.take(var).unwrap().to_vec());
    (value, gradients.into(), collected)
}

#[test]
fn neither_threads_nor_asking_for_weights_change_a_bit() {
    for training in [None, Some(Key::new(4))] {
        let bits = |(y, gradients, weights): (Vec<f32>, Vec<Vec<f32>>, Vec<AttentionWeights<f32>>)| {
            let mut all = y;
            gradients.into_iter().for_each(|g| all.extend(g));
            assert!(all.iter().all(|x| x.is_finite()), "a stale number");
            (all.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), weights)
        };
        let (plain, none) = bits(with_local_limit(1, || run(training, false)));
        assert!(none.is_empty());
        let (asked, weights) = bits(with_local_limit(1, || run(training, true)));
        assert!(asked == plain);
        assert_eq!(weights[0].shapes, [(4, 70, 129), (4, 3, 40), (4, 150, 150)]);
        // Before dropout: every row sums to 1.
        let first = &weights[0].values[..4 * 70 * 129];
        assert!(first.chunks(129).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-5));
        for threads in [2, 3, 7] {
            let (same, again) = bits(with_local_limit(threads, || run(training, true)));
            assert!(same == plain && again == weights, "{threads} threads");
        }
    }
}

#[test]
fn cached_keys_give_the_bits_of_packed_ones() {
    let (n, heads) = (140, heads(4, 2, 6));
    let masks = Masks { causal: true, ..Masks::default() };
    let rows = Rows::from_lengths(&[n]);
    let mut tape = Tape::<f32>::evaluation(Pool::default());
    let x = tape.constant(normal(n, 48, 1));
    let packed = KeysValues::Packed { k: at(x, 24), v: at(x, 36), rows: &rows };
    let whole = attention(&mut tape, at(x, 0), &rows, packed, heads, &masks).unwrap();
    // Another sequence has the slot before this one, and the pages lie in another order.
    let (values, page) = (normal::<f32>(n, 48, 1), Page::new(2, 6));
    let tables = [vec![], (0..n.div_ceil(Page::KEYS)).rev().collect::<Vec<_>>()];
    let mut pages: Vec<_> = tables[1].iter().map(|_| Buffer::zeroed(page.size()).unwrap()).collect();
    for i in 0..n {
        let to = &mut pages[tables[1][i / Page::KEYS]];
        assert!(page.put(to, i % Page::KEYS, &values.row(i)[24..36], &values.row(i)[36..]));
    }
    let cache = Cache { pages: &pages, tables: &tables, page, finite: true };
    for (first, queries) in [(0, 1), (0, 130), (127, 1), (128, 1), (100, 40), (139, 1)] {
        let q: Vec<f32> = (first..first + queries).flat_map(|i| values.row(i)[..24].to_vec()).collect();
        let q = tape.constant(Tensor::from_slice(queries, 24, &q).unwrap());
        let new = Rows::from_lengths(&[queries]).starting_at(&[first]).unwrap();
        let cached = KeysValues::Cached { cache, slots: &[1], lengths: &[first + queries] };
        let y = attention(&mut tape, at(q, 0), &new, cached, heads, &masks).unwrap();
        let expected = &tape.value(whole).unwrap()[first * 24..(first + queries) * 24];
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(tape.value(y).unwrap()), bits(expected), "{queries} queries from {first}");
    }
}

#[test]
fn frozen_inputs_get_nothing_and_the_others_the_same() {
    let rows = Rows::from_lengths(&[20, 5]);
    let gradients = |frozen: usize| -> Vec<Option<Vec<f32>>> {
        let mut tape = Tape::<f32>::recording(Pool::default());
        let vars = [0, 1, 2].map(|i| {
            let x = normal(25, 8, i as u64);
            if i == frozen { tape.constant(x) } else { tape.leaf(x) }
        });
        let keys_values = KeysValues::Packed { k: at(vars[1], 0), v: at(vars[2], 0), rows: &rows };
        let y = attention(&mut tape, at(vars[0], 0), &rows, keys_values, heads(2, 2, 4), &Masks::default()).unwrap();
        let params = no_params();
        let dy = normal(25, 8, 7);
        let mut dvars = tape.backward(&params, &mut Grads::new(&params).unwrap(), [(y, dy)]).unwrap();
        vars.map(|var| dvars.take(var).map(|dx| dx.to_vec())).into()
    };
    let all = gradients(3);
    for frozen in 0..3 {
        let some = gradients(frozen);
        for i in 0..3 {
            assert!(if i == frozen { some[i].is_none() } else { some[i] == all[i] }, "frozen {frozen}, gradient {i}");
        }
    }
}

#[test]
fn wrong_arguments_are_named() {
    let mut tape = Tape::<f32>::recording(Pool::default());
    let rows = Rows::from_lengths(&[2, 3]);
    let x = tape.leaf(normal(5, 24, 1));
    let mut error = |q: usize, v: usize, rows_k: &Rows, heads: Heads, masks: &Masks<'_>| {
        let keys_values = KeysValues::Packed { k: at(x, 8), v: at(x, v), rows: rows_k };
        attention(&mut tape, at(x, q), &rows, keys_values, heads, masks).unwrap_err().to_string()
    };
    let (good, none) = (heads(2, 2, 4), Masks::default());
    let text = error(0, 17, &rows, good, &none);
    assert!(text.contains("argument `v`: expected 5 rows of columns 17..25, got (5, 24)"), "{text}");
    assert!(error(20, 16, &rows, good, &none).contains("argument `q`"));
    assert!(error(0, 16, &Rows::from_lengths(&[5]), good, &none).contains("keys of 2 sequences"));
    assert!(error(0, 16, &Rows::from_lengths(&[2, 2]), good, &none).contains("argument `k`: expected 4 rows"));
    for bad in [heads(2, 0, 4), heads(3, 2, 4), heads(0, 1, 4), heads(2, 2, 0), Heads { scale: f64::NAN, ..good }] {
        assert!(error(0, 16, &rows, bad, &none).contains("divisor of n_heads"));
    }
    for shape in [[3, 1, 1, 1], [1, 3, 1, 1], [1, 1, 2, 1], [1, 1, 1, 2], [usize::MAX, 2, 1, 1]] {
        let keep = DenseMask { keep: vec![true; if shape[0] > 3 { 0 } else { shape.iter().product() }].into(), shape };
        let text = error(0, 16, &rows, good, &Masks { keep: Some(&keep), ..none });
        assert!(text.contains("argument `keep`: expected shape (2, 2, 3, 3)"), "{text}");
    }
    let bias = Some(Bias { var: x, shape: [1, 1, 3, 3] });
    assert!(error(0, 16, &rows, good, &Masks { bias, ..none }).contains("argument `bias`"));
    for p in [-0.1, 1.0, f64::NAN] {
        assert!(error(0, 16, &rows, good, &Masks { dropout: Some((0, p)), ..none }).contains("`dropout`"));
    }

    let page = Page::new(2, 4);
    let (pages, tables) = ([Buffer::zeroed(page.size()).unwrap()], [vec![0], vec![1], vec![0]]);
    let cache = Cache { pages: &pages, tables: &tables, page, finite: true };
    let cached = |slots, lengths| KeysValues::Cached { cache, slots, lengths };
    let text = attention(&mut tape, at(x, 0), &rows, cached(&[0, 2], &[2, 3]), good, &none).unwrap_err().to_string();
    assert!(text.contains("decode on a tape that does not record"), "{text}");
    let mut tape = Tape::<f32>::evaluation(Pool::default());
    let x = tape.constant(normal(5, 24, 1));
    assert!(attention(&mut tape, at(x, 0), &rows, cached(&[0, 2], &[2, 3]), good, &none).is_ok());
    for (slots, lengths) in
        [(&[0, 3][..], &[2, 3][..]), (&[0], &[2, 3]), (&[0, 2], &[2]), (&[0, 1], &[1, 1]), (&[0, 2], &[1, 17])]
    {
        assert!(attention(&mut tape, at(x, 0), &rows, cached(slots, lengths), good, &none).is_err());
    }
    let other = heads(1, 1, 8);
    assert!(attention(&mut tape, at(x, 0), &rows, cached(&[0, 2], &[2, 3]), other, &none).is_err());
}
