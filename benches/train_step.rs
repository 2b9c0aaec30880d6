//! A whole training step, forward, loss, backward, clipping and AdamW, in useful FLOPs per second: `cargo bench --bench
//! train_step`. The shapes are the first two of `make bench`, which compares them with PyTorch.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use transformer_core::models::{Batch, Transformer, TransformerConfig};
use transformer_core::tape::Params;
use transformer_core::train::{Trainer, TrainerConfig};

struct Shape {
    name: &'static str,
    vocabulary: usize,
    d_model: usize,
    layers: usize,
    d_ff: usize,
    /// Sources, and targets of one token less than the decoder reads.
    length: usize,
}

const PAIRS: usize = 64;
const SHAPES: [Shape; 2] = [
    Shape { name: "tiny", vocabulary: 100, d_model: 128, layers: 2, d_ff: 512, length: 16 },
    Shape { name: "small", vocabulary: 8000, d_model: 256, layers: 3, d_ff: 1024, length: 24 },
];

impl Shape {
    /// 3 × the matrix products of the forward pass, causal attention counted at half.
    fn useful_flops(&self) -> u64 {
        let Shape { vocabulary: v, d_model: d, d_ff: f, length: n, .. } = self;
        let encoder = n * (4 * d * d + 2 * d * f) + 2 * n * n * d;
        let decoder = n * (6 * d * d + 2 * d * f) + n * 2 * d * d + 3 * n * n * d;
        (3 * 2 * PAIRS * (self.layers * (encoder + decoder) + n * d * v)) as u64
    }
}

fn train_step(c: &mut Criterion) {
    let mut group = c.benchmark_group("training step");
    group.sample_size(10).warm_up_time(Duration::from_secs(2)).measurement_time(Duration::from_secs(8));
    for shape in SHAPES {
        let Shape { vocabulary, d_model, layers, d_ff, length, .. } = shape;
        let config = TransformerConfig {
            d_model,
            n_heads: 4,
            n_encoder_layers: layers,
            n_decoder_layers: layers,
            d_ff,
            ..TransformerConfig::new(vocabulary, vocabulary)
        };
        let model = Transformer::new(config).unwrap();
        let mut params = Params::init(model.layout().clone(), 0).unwrap();
        let ids: Vec<u32> = (0..PAIRS * length).map(|i| 3 + (i * 37 % (vocabulary - 3)) as u32).collect();
        let sources: Vec<&[u32]> = ids.chunks(length).collect();
        let targets: Vec<&[u32]> = ids.chunks(length).map(|ids| &ids[1..]).collect();
        let batch = [Batch::new(&sources, &targets, 1, 2).unwrap()];
        let config = TrainerConfig { label_smoothing: 0.1, clip_norm: Some(1.0), ..TrainerConfig::default() };
        let mut trainer = Trainer::new(config, &mut params).unwrap();
        group.throughput(Throughput::Elements(shape.useful_flops()));
        group.bench_function(shape.name, |b| {
            b.iter(|| black_box(trainer.step(&model, &mut params, &batch).unwrap()));
        });
    }
    group.finish();
}

criterion_group!(benches, train_step);
criterion_main!(benches);
