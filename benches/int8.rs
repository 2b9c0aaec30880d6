//! Products in int8, inputs quantised on the way, in operations per second: `cargo bench -p transformer_core --bench int8`.

mod numbers;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use numbers::numbers;
use std::sync::Arc;
use std::time::Duration;
use transformer_core::kernels::activation::Gelu;
use transformer_core::kernels::gemm::Affine;
use transformer_core::kernels::int8::{Int8Rhs, product};

/// Rows, outputs, depth.
const SHAPES: [(usize, usize, usize); 9] = [
    // sentence embedding: 6 layers of 384
    (16, 1536, 384),
    (2048, 1152, 384),
    (2048, 384, 384),
    (2048, 1536, 384),
    (2048, 384, 1536),
    // decoding: layers of 512 and the head
    (1, 2048, 512),
    (32, 512, 512),
    (128, 2048, 512),
    (128, 32_000, 512),
];

fn int8(c: &mut Criterion) {
    let mut group = c.benchmark_group("int8");
    for (m, n, k) in SHAPES {
        let (x, bias, mut y) = (numbers(m * k, 1), numbers(n, 2), vec![0.0f32; m * n]);
        let weights = [Arc::new(Int8Rhs::quantize(&numbers(n * k, 3), n, k).unwrap())];
        group.throughput(Throughput::Elements((2 * m * n * k) as u64));
        let plain = Affine::bias(Some(&bias[..]));
        group.bench_function(format!("{m}x{n}x{k}"), |b| b.iter(|| product(&mut y, &x, &weights, &plain).unwrap()));
        let gelu = Affine { bias: Some(&bias[..]), activation: Gelu, dropout: None };
        group.bench_function(format!("{m}x{n}x{k} gelu"), |b| b.iter(|| product(&mut y, &x, &weights, &gelu).unwrap()));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(Duration::from_millis(800)).warm_up_time(Duration::from_millis(200));
    targets = int8
}
criterion_main!(benches);
