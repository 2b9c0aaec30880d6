//! Rows at a time, in GB/s of the numbers that must be read and written: `cargo bench -p transformer_core --bench elementwise`.

mod numbers;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use numbers::numbers;
use std::time::Duration;
use transformer_core::error::Result;
use transformer_core::kernels::Beta;
use transformer_core::kernels::activation::{Gelu, Relu, activation_backward, activation_forward};
use transformer_core::kernels::dropout::dropout_rows;
use transformer_core::kernels::elementwise::add_into;
use transformer_core::kernels::norm::{Norm, norm_backward, norm_forward};
use transformer_core::kernels::reduce::{fold_partials, partial_rows, sum_blocks, sum_of_squares};
use transformer_core::kernels::softmax::{
    RowLoss, cross_entropy_rows, cross_entropy_rows_backward, softmax_backward, softmax_forward,
};
use transformer_core::rng::{Dropout, Key};
use transformer_core::threads::section;

/// A batch of the base model of 2017 and one that fits the caches.
const SHAPES: [(usize, usize); 2] = [(2048, 512), (128, 512)];
/// Rows and vocabulary of one chunk of logits.
const LOGITS: (usize, usize) = (256, 16_000);

fn elementwise(c: &mut Criterion) {
    let mut group = c.benchmark_group("elementwise");
    for (rows, cols) in SHAPES {
        let n = rows * cols;
        let (x, y, w) = (numbers(n, 1), numbers(n, 2), numbers(cols, 3));
        let (mut z, mut mean, mut rstd) = (numbers(n, 4), numbers(rows, 5), numbers(rows, 6));
        let mut partials = numbers(partial_rows(rows) * 2 * cols, 7);
        let dropout = Dropout::new(Key::new(1), 0.1);
        // `passes`: how often all the numbers cross from or to memory, at least.
        let mut run = |name: &str, passes: usize, job: &mut dyn FnMut() -> Result<()>| {
            group.throughput(Throughput::Bytes((passes * n * 4) as u64));
            let name = format!("{name}/{rows}x{cols}");
            section(None, || Ok(_ = group.bench_function(name, |b| b.iter(|| job().unwrap())))).unwrap();
        };
        run("add", 3, &mut || add_into(&mut z, &x, &y));
        run("residual with dropout", 3, &mut || dropout_rows(&mut z, Some(&x), &y, cols, &dropout));
        run("relu", 2, &mut || activation_forward(Relu, &mut z, &x));
        run("gelu", 2, &mut || activation_forward(Gelu, &mut z, &x));
        // In place: a fresh dy each time, else it dwindles to subnormal numbers.
        run("copy, gelu backward", 5, &mut || {
            z.copy_from_slice(&y);
            activation_backward(Gelu, &mut z, &x)
        });
        run("layer norm", 2, &mut || norm_forward(Norm::Layer, &mut z, &mut mean, &mut rstd, &x, &w, &w, 1e-5));
        run("layer norm backward", 3, &mut || {
            norm_backward(Norm::Layer, &mut z, Beta::Assign, &mut partials, &y, &x, &w, &mean, &rstd)?;
            fold_partials(&mut partials, 2 * cols)
        });
        run("softmax", 2, &mut || softmax_forward(&mut z, &x, cols));
        run("copy, softmax backward", 5, &mut || {
            z.copy_from_slice(&x);
            softmax_backward(&mut z, &y, cols)
        });
        run("column sums", 1, &mut || {
            sum_blocks(&mut partials[..partial_rows(rows) * cols], &x, cols)?;
            fold_partials(&mut partials[..partial_rows(rows) * cols], cols)
        });
        run("sum of squares", 1, &mut || sum_of_squares(std::iter::once(&x[..]), 1.0).map(|_| ()));
    }
    let (rows, cols) = LOGITS;
    let (mut logits, mut losses) = (numbers(rows * cols, 8), vec![RowLoss::default(); rows]);
    let (targets, dloss): (Vec<u32>, _) = ((0..rows as u32).collect(), vec![1.0; rows]);
    for (name, passes, gradient) in [("cross-entropy", 1, false), ("cross-entropy and gradient", 2, true)] {
        group.throughput(Throughput::Bytes((passes * rows * cols * 4) as u64));
        let mut job = || match gradient {
            true => cross_entropy_rows_backward(&mut losses, &mut logits, &targets, cols, 0.1, &dloss).unwrap(),
            false => cross_entropy_rows(&mut losses, &logits, &targets, cols, 0.1).unwrap(),
        };
        let name = format!("{name}/{rows}x{cols}");
        section(None, || Ok(_ = group.bench_function(name, |b| b.iter(&mut job)))).unwrap();
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).measurement_time(Duration::from_millis(1500)).warm_up_time(Duration::from_millis(300));
    targets = elementwise
}
criterion_main!(benches);
