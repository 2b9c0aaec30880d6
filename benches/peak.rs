//! What this machine can do: multiply-adds from registers, and reading from memory. One JSON line, for the shares that
//! `benches/vs_torch.py` prints: `cargo bench --bench peak -- THREADS`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use transformer_core::kernel;

/// Independent chains of multiply-adds: more than latency times units of any CPU we know, fewer than its registers.
const CHAINS: usize = 12;
const ROUNDS: usize = 1_000_000;
/// Numbers that each thread reads: 128 MiB of f32, far beyond the caches.
const NUMBERS: usize = 32 << 20;
const TIME: Duration = Duration::from_millis(700);

kernel! {
    /// ROUNDS · CHAINS vector multiply-adds; gives their number of floating-point operations. `y` is there to be used.
    pub fn multiply_add<'a, T>(s: S; y: &'a mut [T], a: T, b: T) -> f64 {
        let (a, b) = (s.splat(a), s.splat(b));
        let mut sums = [b; CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = s.mul_add(*sum, a, b);
            }
        }
        for sum in sums {
            s.store_first(s.add(sum, s.load_first(y, T::ZERO)), y);
        }
        (2 * CHAINS * ROUNDS * S::LANES) as f64
    }
}

kernel! {
    /// Reads all of `x`; gives the bytes.
    pub fn read<'a, T>(s: S; y: &'a mut [T], x: &'a [T]) -> f64 {
        let mut sums = [s.zero(); CHAINS];
        for x in x.chunks_exact(CHAINS * S::LANES) {
            for (sum, x) in sums.iter_mut().zip(x.chunks_exact(S::LANES)) {
                *sum = s.add(*sum, s.load(x));
            }
        }
        for sum in sums {
            s.store_first(s.add(sum, s.load_first(y, T::ZERO)), y);
        }
        size_of_val(x) as f64
    }
}

/// The best rate, per second, of `threads` threads that all do `work` again and again: a slower round was disturbed.
fn best_rate(threads: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let start = Instant::now();
    let mut best = 0.0f64;
    while start.elapsed() < TIME {
        let rates: Vec<f64> = std::thread::scope(|scope| {
            let one = |thread| {
                let start = Instant::now();
                work(thread) / start.elapsed().as_secs_f64()
            };
            let handles: Vec<_> = (0..threads).map(|thread| scope.spawn(move || one(thread))).collect();
            handles.into_iter().filter_map(|handle| handle.join().ok()).collect()
        });
        best = best.max(rates.iter().sum());
    }
    best
}

fn main() {
    let threads = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(1);
    let flops = best_rate(threads, |_| {
        let mut y = [0.0f32; 16];
        let flops = multiply_add(&mut y, black_box(0.5), black_box(1.0));
        black_box(y);
        flops
    });
    let x = vec![1.0f32; threads * NUMBERS];
    let bytes = best_rate(threads, |thread| {
        let mut y = [0.0f32; 16];
        let bytes = read(&mut y, black_box(&x[thread * NUMBERS..][..NUMBERS]));
        black_box(y);
        bytes
    });
    println!(r#"{{"threads": {threads}, "gflops": {:.1}, "gigabytes_per_second": {:.1}}}"#, flops / 1e9, bytes / 1e9);
}
