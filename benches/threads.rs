//! What a region and a section cost, beside rayon's own fork and join: `cargo bench -p transformer_core --bench threads`.
//! "18us": two tasks of that length, so that 18 µs is perfect and 36 µs is one thread; "idle": after 1 ms of sleep.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::{Duration, Instant};
use transformer_core::threads::{parallel, section, with_local_limit};

/// Arithmetic that takes about `micros` µs.
fn work(turns: u64) {
    let mut x = 1.0f64;
    for _ in 0..turns {
        x = black_box(x * 1.000001);
    }
    black_box(x);
}

/// Turns of `work` in a microsecond, from the fastest of several tries.
fn turns_per_micro() -> f64 {
    let time = |_| {
        let start = Instant::now();
        work(100_000);
        start.elapsed().as_secs_f64() * 1e6
    };
    100_000.0 / (0..20).map(time).fold(f64::INFINITY, f64::min)
}

fn nap() {
    std::thread::sleep(Duration::from_millis(1));
}

fn regions(c: &mut Criterion) {
    let turns = (18.0 * turns_per_micro()) as u64;
    let rayon = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let mut group = c.benchmark_group("region");
    for threads in [1, 2] {
        with_local_limit(threads, || {
            let mut in_section = |name: &str, job: &dyn Fn()| {
                let name = format!("{name}/{threads}");
                section(None, || Ok(_ = group.bench_function(name, |b| b.iter(job)))).unwrap();
            };
            in_section("empty", &|| parallel(2, |i| _ = black_box(i)).unwrap());
            in_section("64 empty tasks", &|| parallel(64, |i| _ = black_box(i)).unwrap());
            in_section("18us", &|| parallel(2, |_| work(turns)).unwrap());
        });
    }
    let join = || rayon::join(|| work(turns), || work(turns));
    group.bench_function("18us/rayon join", |b| {
        b.iter_custom(|turns| {
            rayon.install(|| {
                let start = Instant::now();
                (0..turns).for_each(|_| _ = join());
                start.elapsed()
            })
        });
    });
    group.bench_function("18us/rayon install, join", |b| b.iter(|| rayon.install(join)));
    group.bench_function("18us idle/rayon install, join", |b| {
        b.iter_batched(nap, |()| rayon.install(join), BatchSize::PerIteration);
    });
    group.finish();
}

fn sections(c: &mut Criterion) {
    let turns = (18.0 * turns_per_micro()) as u64;
    let mut group = c.benchmark_group("section");
    let poll: &dyn Fn() -> bool = &|| false;
    with_local_limit(2, || {
        group.bench_function("open, close", |b| b.iter(|| section(None, || Ok(())).unwrap()));
        group.bench_function("open, region, close", |b| b.iter(|| parallel(2, |i| _ = black_box(i)).unwrap()));
        group.bench_function("open, 18us, close", |b| b.iter(|| parallel(2, |_| work(turns)).unwrap()));
        group.bench_function("open, 18us, close, idle", |b| {
            b.iter_batched(nap, |()| parallel(2, |_| work(turns)).unwrap(), BatchSize::PerIteration);
        });
        let polled = || Ok(_ = group.bench_function("region with poll", |b| b.iter(|| parallel(2, |_| ()).unwrap())));
        section(Some(poll), polled).unwrap();
    });
    with_local_limit(1, || group.bench_function("one thread", |b| b.iter(|| section(None, || Ok(())).unwrap())));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).measurement_time(Duration::from_millis(1500)).warm_up_time(Duration::from_millis(300));
    targets = regions, sections
}
criterion_main!(benches);
