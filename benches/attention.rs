//! Attention by itself, forward and backward, in useful FLOPs per second (four and ten for every pair of a query and a key that it
//! may see, times the width): `cargo bench -p transformer_core --bench attention`. `make bench` compares it with PyTorch's.

mod numbers;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use numbers::numbers;
use std::time::Duration;
use transformer_core::kernels::attention::{
    Gradients, Heads, Inputs, Masks, Operand, Out, Saved, Sequence, attention_backward, attention_forward,
};
use transformer_core::rng::{Dropout, Key};
use transformer_core::threads::section;

/// Sequences, heads and length; the width is always 64.
const SHAPES: [(usize, usize, usize); 3] = [(64, 4, 24), (8, 8, 128), (1, 8, 1024)];
const HEAD_DIM: usize = 64;

fn attention(c: &mut Criterion) {
    let mut group = c.benchmark_group("attention");
    for (batch, n_heads, length) in SHAPES {
        let (rows, cols) = (batch * length, n_heads * HEAD_DIM);
        let heads = Heads { n_heads, n_kv_heads: n_heads, head_dim: HEAD_DIM, scale: 0.125 };
        let [q, k, v, dy] = std::array::from_fn(|i| numbers(rows * cols, i as u64));
        let [mut y, mut dq, mut dk, mut dv] = std::array::from_fn(|_| vec![0.0f32; rows * cols]);
        let (mut lse, mut d) = (vec![0.0f32; rows * n_heads], vec![0.0f32; rows * n_heads]);
        let first = |i: usize| Sequence { query: i * length, queries: length, key: i * length, keys: length, shift: 0 };
        let sequences: Vec<_> = (0..batch).map(first).collect();
        let operand = |data| Operand { data, stride: cols };
        for (causal, p) in [(false, 0.0), (true, 0.0), (true, 0.1)] {
            let dropout = (p > 0.0).then(|| Dropout::new(Key::new(1), p));
            let masks = Masks { causal, keep: None, bias: None, dropout };
            let inputs = Inputs {
                heads,
                q: operand(&q),
                k: operand(&k),
                v: operand(&v),
                cache: None,
                sequences: &sequences,
                masks,
            };
            let pairs = batch * if causal { length * (length + 1) / 2 } else { length * length };
            let name = format!("{batch}x{n_heads}x{length}x{HEAD_DIM}{}", if causal { " causal" } else { "" });
            let name = if p > 0.0 { format!("{name}, dropout") } else { name };
            group.throughput(Throughput::Elements((4 * pairs * cols) as u64));
            let mut forward = || attention_forward(&mut y, Some(&mut lse), &inputs).unwrap();
            let bench = || Ok(_ = group.bench_function(format!("forward/{name}"), |b| b.iter(&mut forward)));
            section(None, bench).unwrap();
            group.throughput(Throughput::Elements((10 * pairs * cols) as u64));
            let mut backward = || {
                let [dq, dk, dv] = [&mut dq, &mut dk, &mut dv].map(|out| Some(Out::new(out, cols)));
                let saved = Saved { dy: &dy, y: &y, lse: &lse };
                attention_backward(Gradients { dq, dk, dv }, &mut d, saved, &inputs).unwrap();
            };
            let bench = || Ok(_ = group.bench_function(format!("backward/{name}"), |b| b.iter(&mut backward)));
            section(None, bench).unwrap();
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).measurement_time(Duration::from_millis(1200)).warm_up_time(Duration::from_millis(300));
    targets = attention
}
criterion_main!(benches);
