//! Tokens per second of a small random model, 32 tokens in, 32 forced out: `cargo bench --bench decode`.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use transformer_core::generate::{GenerateOptions, Length, Loaded, hypotheses};
use transformer_core::models::{Transformer, TransformerConfig};
use transformer_core::rows::Rows;
use transformer_core::tape::{Params, Pool};

const TOKENS: usize = 32;

fn decode(c: &mut Criterion) {
    let config = TransformerConfig {
        d_model: 256,
        n_heads: 4,
        n_encoder_layers: 3,
        n_decoder_layers: 3,
        d_ff: 1024,
        ..TransformerConfig::new(8000, 8000)
    };
    let model = Transformer::new(config).unwrap();
    let params = Params::<f32>::init(model.layout().clone(), 0).unwrap();
    let model = Loaded { layers: &model, params: &params };
    let mut group = c.benchmark_group("decode 3+3 d256 V8000");
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    for sources in [1, 32] {
        let src: Vec<u32> = (0..sources * TOKENS).map(|i| 3 + (i * 37 % 7000) as u32).collect();
        let rows = Rows::from_lengths(&vec![TOKENS; sources]);
        for beam in [1, 4] {
            let options = GenerateOptions {
                beam,
                min_len: Length::Fixed(TOKENS),
                max_len: Some(Length::Fixed(TOKENS)),
                scores: false,
                ..GenerateOptions::default()
            };
            let mut pool = Pool::default();
            group.throughput(Throughput::Elements((sources * TOKENS) as u64));
            group.bench_function(BenchmarkId::new(format!("beam {beam}"), format!("batch {sources}")), |b| {
                b.iter(|| black_box(hypotheses(model, None, &mut pool, &src, &rows, &options, None).unwrap()));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);
