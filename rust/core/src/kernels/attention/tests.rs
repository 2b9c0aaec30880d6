use super::*;
use crate::kernels::testing::normal;
use crate::rng::{Dropout, Key};
use crate::simd::Float;
use crate::threads::with_local_limit;

/// A batch with everything it needs, and room for every result.
#[derive(Clone)]
struct Case<T> {
    heads: Heads,
    sequences: Vec<Sequence>,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    dy: Vec<T>,
    causal: bool,
    keep: Option<(Vec<bool>, [usize; 4])>,
    bias: Option<(Vec<T>, [usize; 4])>,
    dropout: Option<Dropout>,
}

#[derive(Clone, Debug, PartialEq)]
struct Results<T> {
    y: Vec<T>,
    lse: Vec<T>,
    weights: Vec<T>,
    dq: Vec<T>,
    dk: Vec<T>,
    dv: Vec<T>,
    dbias: Vec<T>,
}

/// Sequences of `(queries, keys)`, the last query at the position of the last key.
fn case<T: Float>(lengths: &[(usize, usize)], n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Case<T> {
    let heads = Heads { n_heads, n_kv_heads, head_dim, scale: (head_dim as f64).sqrt().recip() };
    let (mut query, mut key) = (0, 0);
    let mut sequences = Vec::new();
    for &(queries, keys) in lengths {
        sequences.push(Sequence { query, queries, key, keys, shift: keys as isize - queries as isize });
        (query, key) = (query + queries, key + keys);
    }
    Case {
        heads,
        sequences,
        q: normal(query * n_heads * head_dim, 1),
        k: normal(key * n_kv_heads * head_dim, 2),
        v: normal(key * n_kv_heads * head_dim, 3),
        dy: normal(query * n_heads * head_dim, 4),
        causal: false,
        keep: None,
        bias: None,
        dropout: None,
    }
}

impl<T: Float> Case<T> {
    fn causal(self) -> Self {
        Case { causal: true, ..self }
    }

    fn keep(self, shape: [usize; 4]) -> Self {
        let n = shape.iter().product::<usize>() as u64;
        Case { keep: Some(((0..n).map(|i| Key::new(5).uniform(i) < 0.6).collect(), shape)), ..self }
    }

    fn bias(self, shape: [usize; 4]) -> Self {
        Case { bias: Some((normal(shape.iter().product(), 6), shape)), ..self }
    }

    fn dropout(self, p: f64) -> Self {
        Case { dropout: Some(Dropout::new(Key::new(7), p)), ..self }
    }

    fn with_inputs<R>(&self, run: impl FnOnce(&Inputs<'_, T>) -> R) -> R {
        let Heads { n_heads, n_kv_heads, head_dim, .. } = self.heads;
        run(&Inputs {
            heads: self.heads,
            q: Operand { data: &self.q, stride: n_heads * head_dim },
            k: Operand { data: &self.k, stride: n_kv_heads * head_dim },
            v: Operand { data: &self.v, stride: n_kv_heads * head_dim },
            cache: None,
            sequences: &self.sequences,
            masks: Masks {
                causal: self.causal,
                keep: self.keep.as_ref().map(|(data, shape)| Grid { data, shape: *shape }),
                bias: self.bias.as_ref().map(|(data, shape)| Grid { data, shape: *shape }),
                dropout: self.dropout,
            },
        })
    }

    /// Results filled with NaN (weights with 0, as the kernel asks for), so that whatever is not written shows.
    fn room(&self) -> Results<T> {
        let stale = |n| vec![T::NAN; n];
        let pairs = self.sequences.iter().map(|s| s.queries * s.keys).sum::<usize>();
        Results {
            y: stale(self.q.len()),
            lse: stale(self.q.len() / self.heads.head_dim),
            weights: vec![T::ZERO; pairs * self.heads.n_heads],
            dq: stale(self.q.len()),
            dk: stale(self.k.len()),
            dv: stale(self.v.len()),
            dbias: stale(self.bias.as_ref().map_or(0, |(bias, _)| bias.len())),
        }
    }

    fn run(&self) -> Results<T> {
        let mut r = self.room();
        let mut d = vec![T::NAN; r.lse.len()];
        let kv_cols = self.heads.n_kv_heads * self.heads.head_dim;
        self.with_inputs(|inputs| {
            attention_forward(&mut r.y, Some(&mut r.lse), inputs).unwrap();
            attention_weights(&mut r.weights, &r.lse, inputs).unwrap();
            let saved = Saved { dy: &self.dy, y: &r.y, lse: &r.lse };
            let gradients = Gradients {
                dq: Some(Out::new(&mut r.dq, self.heads.n_heads * self.heads.head_dim)),
                dk: Some(Out::new(&mut r.dk, kv_cols)),
                dv: Some(Out::new(&mut r.dv, kv_cols)),
            };
            attention_backward(gradients, &mut d, saved, inputs).unwrap();
            attention_bias_backward(&mut r.dbias, &d, saved, inputs).unwrap();
        });
        r
    }

    fn reference(&self) -> Results<T> {
        let mut r = self.room();
        r.weights.clear();
        for x in [&mut r.dq, &mut r.dk, &mut r.dv, &mut r.dbias] {
            x.fill(T::ZERO);
        }
        self.with_inputs(|inputs| {
            attention_reference(&mut r.y, &mut r.lse, &mut r.weights, inputs);
            attention_backward_reference([&mut r.dq, &mut r.dk, &mut r.dv, &mut r.dbias], &self.dy, inputs);
        });
        r
    }

    fn cast<U: Float>(&self) -> Case<U> {
        let cast = |x: &[T]| x.iter().map(|x| U::from_f64(x.to_f64())).collect::<Vec<U>>();
        Case {
            heads: self.heads,
            sequences: self.sequences.clone(),
            q: cast(&self.q),
            k: cast(&self.k),
            v: cast(&self.v),
            dy: cast(&self.dy),
            causal: self.causal,
            keep: self.keep.clone(),
            bias: self.bias.as_ref().map(|(bias, shape)| (cast(bias), *shape)),
            dropout: self.dropout,
        }
    }
}

impl<T: Float> Results<T> {
    fn parts(&self) -> [(&'static str, &[T]); 7] {
        [
            ("y", &self.y),
            ("lse", &self.lse),
            ("weights", &self.weights),
            ("dq", &self.dq),
            ("dk", &self.dk),
            ("dv", &self.dv),
            ("dbias", &self.dbias),
        ]
    }

    #[track_caller]
    fn close_to(&self, expected: &Results<f64>, tolerance: f64, what: &str) {
        for ((name, got), (_, expected)) in self.parts().into_iter().zip(expected.parts()) {
            assert_eq!(got.len(), expected.len(), "{what}: {name}");
            for (i, (got, &expected)) in got.iter().zip(expected).enumerate() {
                let got = got.to_f64();
                let close = got == expected || (got - expected).abs() <= tolerance * expected.abs().max(1.0);
                assert!(close, "{what}: {name}[{i}] = {got}, reference {expected}");
            }
        }
    }

    /// Everything as bits, so that −0 and NaN count.
    fn bits(&self) -> Vec<Vec<u64>> {
        self.parts().iter().map(|(_, x)| bits(x)).collect()
    }
}

fn bits<T: Float>(x: &[T]) -> Vec<u64> {
    x.iter().map(|x| x.to_f64().to_bits()).collect()
}

/// Every mask alone and all together, on a batch of sequences of these lengths.
fn masked(lengths: &[(usize, usize)], n_heads: usize, n_kv_heads: usize, head_dim: usize) -> Vec<(String, Case<f64>)> {
    let plain = || case::<f64>(lengths, n_heads, n_kv_heads, head_dim);
    let l = lengths.iter().map(|s| s.0).max().unwrap_or(0).max(1);
    let m = lengths.iter().map(|s| s.1).max().unwrap_or(0).max(1);
    let b = lengths.len();
    let cases = [
        ("plain", plain()),
        ("causal", plain().causal()),
        ("keep", plain().keep([b, n_heads, l, m])),
        ("keep keys", plain().keep([b, 1, 1, m])),
        ("keep queries", plain().keep([1, 1, l, 1])),
        ("bias", plain().bias([b, n_heads, l, m])),
        ("bias per head", plain().bias([1, n_heads, l, m])),
        ("bias per key", plain().bias([b, 1, 1, m])),
        ("bias per query", plain().bias([1, n_heads, l, 1])),
        ("dropout", plain().dropout(0.3)),
        ("all", plain().causal().keep([1, n_heads, l, m]).bias([1, 1, l, m]).dropout(0.2)),
    ];
    let shape = format!("{lengths:?} heads {n_heads}/{n_kv_heads} of {head_dim}");
    cases.into_iter().map(|(name, case)| (format!("{name}, {shape}"), case)).collect()
}

#[test]
fn agrees_with_the_reference_in_both_types_on_every_mask() {
    let shapes = [
        (vec![(3, 3), (0, 2), (1, 1), (5, 4), (2, 0)], 2, 2, 8),
        (vec![(7, 13)], 4, 2, 5),
        (vec![(65, 129), (1, 31)], 2, 1, 16),
        (vec![(130, 257)], 1, 1, 33),
        (vec![(63, 127), (64, 128)], 3, 3, 7),
        (vec![(300, 300)], 1, 1, 1),
    ];
    for (lengths, n_heads, n_kv_heads, head_dim) in shapes {
        for (name, case) in masked(&lengths, n_heads, n_kv_heads, head_dim) {
            let expected = case.reference();
            case.run().close_to(&expected, 1e-12, &name);
            case.cast::<f32>().run().close_to(&expected, 3e-5, &name);
        }
    }
}

#[test]
fn an_empty_batch_is_nothing() {
    case::<f32>(&[], 2, 2, 4).run();
    let r = case::<f32>(&[(0, 3), (2, 0)], 2, 2, 4).causal().run();
    assert!(r.y.iter().chain(&r.dq).chain(&r.dk).chain(&r.dv).all(|&x| x == 0.0), "{r:?}");
    assert!(r.lse.iter().all(|&x| x == f32::NEG_INFINITY));
}

/// The part of a result that belongs to one sequence.
fn cut(case: &Case<f32>, r: &Results<f32>, i: usize) -> Vec<Vec<u64>> {
    let (s, heads) = (case.sequences[i], case.heads);
    let rows = |x: &[f32], first: usize, n: usize, cols: usize| bits(&x[first * cols..(first + n) * cols]);
    let (wide, kv) = (heads.n_heads * heads.head_dim, heads.n_kv_heads * heads.head_dim);
    let before = case.sequences[..i].iter().map(|s| s.queries * s.keys).sum::<usize>();
    vec![
        rows(&r.y, s.query, s.queries, wide),
        rows(&r.lse, s.query, s.queries, heads.n_heads),
        rows(&r.weights, before, s.queries * s.keys, heads.n_heads),
        rows(&r.dq, s.query, s.queries, wide),
        rows(&r.dk, s.key, s.keys, kv),
        rows(&r.dv, s.key, s.keys, kv),
    ]
}

#[test]
fn a_sequence_gives_the_same_bits_alone_and_in_any_batch() {
    let lengths = [(70, 150), (1, 150), (33, 33), (129, 260)];
    for causal in [false, true] {
        let mut batch = case::<f32>(&lengths, 4, 2, 24);
        batch.causal = causal;
        let r = batch.run();
        for (i, &s) in lengths.iter().enumerate() {
            let mut alone = case::<f32>(&[s], 4, 2, 24);
            alone.causal = causal;
            let Sequence { query, queries, key, keys, .. } = batch.sequences[i];
            alone.q = batch.q[query * 96..(query + queries) * 96].to_vec();
            alone.dy = batch.dy[query * 96..(query + queries) * 96].to_vec();
            alone.k = batch.k[key * 48..(key + keys) * 48].to_vec();
            alone.v = batch.v[key * 48..(key + keys) * 48].to_vec();
            assert_eq!(cut(&alone, &alone.run(), 0), cut(&batch, &r, i), "sequence {i}, causal {causal}");
        }
    }
}

#[test]
fn a_query_gives_the_same_bits_alone_with_the_keys_so_far() {
    // Values so small that products underflow: then even the sign of a zero tells paths apart.
    for (name, size) in [("normal", 1.0), ("tiny", 1e-43)] {
        let mut whole = case::<f32>(&[(300, 300)], 2, 1, 20).causal();
        whole.v.iter_mut().for_each(|v| *v *= size);
        let r = whole.run();
        for l in [0, 1, 7, 63, 64, 126, 127, 128, 129, 255, 256, 299] {
            let mut step = case::<f32>(&[(1, l + 1)], 2, 1, 20).causal();
            step.q = whole.q[l * 40..][..40].to_vec();
            step.k = whole.k[..(l + 1) * 20].to_vec();
            step.v = whole.v[..(l + 1) * 20].to_vec();
            let alone = step.run();
            assert_eq!(bits(&alone.y), bits(&r.y[l * 40..][..40]), "{name}, query {l}");
            assert_eq!(bits(&alone.lse), bits(&r.lse[l * 2..][..2]), "{name}, query {l}");
            for head in 0..2 {
                let row = &r.weights[(head * 300 + l) * 300..][..l + 1];
                assert_eq!(bits(&alone.weights[head * (l + 1)..][..l + 1]), bits(row), "{name}, query {l}");
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    // One head of one sequence takes the two passes with 2 threads and more, the others the single one.
    for (lengths, heads) in [(&[(200, 300)][..], 1), (&[(65, 65), (3, 140), (80, 80)], 4)] {
        for (name, case) in masked(lengths, heads, heads, 12) {
            let case = case.cast::<f32>();
            let expected = with_local_limit(1, || case.run());
            for threads in [2, 3, 7] {
                let r = with_local_limit(threads, || case.run());
                assert!(r.bits() == expected.bits(), "{name}, {threads} threads");
            }
        }
    }
}

#[test]
fn nothing_leaks_from_keys_and_queries_that_are_not_kept() {
    // Key 5 of head 0 is kept by the queries below 4 alone, causality hides keys from earlier queries.
    for poison in [f32::NAN, f32::INFINITY] {
        let (l, m) = (70, 140);
        let mut clean = case::<f32>(&[(l, m)], 1, 1, 9).keep([1, 1, l, m]);
        let keep = &mut clean.keep.as_mut().unwrap().0;
        (0..l).for_each(|l| keep[l * m + 5] = l < 4);
        let mut poisoned = clean.clone();
        poisoned.k[5 * 9..6 * 9].fill(poison);
        poisoned.v[5 * 9..6 * 9].fill(poison);
        // The first four queries see it; nothing of what they touch is compared.
        let (a, b) = (clean.run(), poisoned.run());
        assert_eq!(bits(&a.y[4 * 9..]), bits(&b.y[4 * 9..]));
        assert_eq!(bits(&a.lse[4..]), bits(&b.lse[4..]));
        assert_eq!(bits(&a.weights[4 * m..]), bits(&b.weights[4 * m..]));
        assert_eq!(bits(&a.dq[4 * 9..]), bits(&b.dq[4 * 9..]));
        assert!(b.y[..4 * 9].iter().all(|y| !y.is_finite()), "whoever keeps it sees it");

        let mut causal = case::<f32>(&[(150, 150)], 2, 2, 9).causal();
        let clean = causal.run();
        causal.k[140 * 18..].fill(poison);
        causal.v[140 * 18..].fill(poison);
        let r = causal.run();
        assert_eq!(bits(&clean.y[..140 * 18]), bits(&r.y[..140 * 18]));
        assert_eq!(bits(&clean.dq[..140 * 18]), bits(&r.dq[..140 * 18]));

        // A query that is not finite spoils the keys it keeps and no others.
        let mut query = case::<f32>(&[(150, 150)], 1, 1, 9).causal();
        let clean = query.run();
        query.q[20 * 9..21 * 9].fill(poison);
        query.dy[20 * 9..21 * 9].fill(poison);
        let r = query.run();
        assert_eq!(bits(&clean.dk[21 * 9..]), bits(&r.dk[21 * 9..]));
        assert_eq!(bits(&clean.dv[21 * 9..]), bits(&r.dv[21 * 9..]));
        assert!(r.dv[..21 * 9].iter().all(|x| !x.is_finite()));
    }
}

#[test]
fn a_query_without_keys_gives_zeros() {
    let (l, m) = (70, 140);
    let mut case = case::<f32>(&[(l, m)], 2, 2, 8).keep([1, 1, l, m]);
    // Query 3 keeps nothing, query 66 only one key of the second block.
    let keep = &mut case.keep.as_mut().unwrap().0;
    keep[3 * m..4 * m].fill(false);
    keep[66 * m..67 * m].fill(false);
    keep[66 * m + 130] = true;
    case.v[0] = f32::NAN;
    let r = case.run();
    assert!(r.y[3 * 16..4 * 16].iter().chain(&r.dq[3 * 16..4 * 16]).all(|x| x.to_bits() == 0));
    assert_eq!(r.lse[3 * 2..4 * 2], [f32::NEG_INFINITY; 2]);
    assert!(r.weights[3 * m..4 * m].iter().all(|&w| w == 0.0));
    assert_eq!(bits(&r.y[66 * 16..67 * 16]), bits(&case.v[130 * 16..131 * 16]));
    assert_eq!(r.weights[66 * m + 130], 1.0);
    // A bias of −∞ everywhere is the same thing.
    let mut biased = self::case::<f32>(&[(2, 3)], 1, 1, 4).bias([1, 1, 2, 1]);
    biased.bias.as_mut().unwrap().0[1] = f32::NEG_INFINITY;
    let r = biased.run();
    assert!(r.y[4..].iter().chain(&r.dq[4..]).chain(&r.weights[3..]).all(|&x| x == 0.0));
    assert!(r.dk.iter().chain(&r.dv).chain(&r.dbias).all(|x| x.is_finite()));
}

#[test]
fn gradients_go_into_columns_of_one_matrix() {
    let case = case::<f32>(&[(5, 5), (3, 3)], 2, 2, 6);
    let expected = case.run();
    let mut merged = vec![f32::NAN; 8 * 40];
    let mut d = vec![0.0; 16];
    case.with_inputs(|inputs| {
        let saved = Saved { dy: &case.dy, y: &expected.y, lse: &expected.lse };
        let mut parts = Out::columns(&mut merged, 40, &[0..12, 12..24, 28..40]).unwrap().into_iter();
        let gradients = Gradients { dq: parts.next(), dk: parts.next(), dv: parts.next() };
        attention_backward(gradients, &mut d, saved, inputs).unwrap();
    });
    for (i, row) in merged.chunks(40).enumerate() {
        let of = |x: &[f32]| bits(&x[i * 12..(i + 1) * 12]);
        assert_eq!((bits(&row[..12]), bits(&row[12..24])), (of(&expected.dq), of(&expected.dk)));
        assert_eq!(bits(&row[28..]), of(&expected.dv));
        assert!(row[24..28].iter().all(|x| x.is_nan()), "columns between are left alone");
    }
    assert!(Out::columns(&mut merged, 40, &[0..12, 8..20]).is_err());
    assert!(Out::columns(&mut merged, 40, &[0..1, 30..42]).is_err());
}
