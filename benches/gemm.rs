//! Matrix products beside the `gemm` crate and beside what the multipliers can do at most, in GFLOP/s:
//! `cargo bench --bench gemm -- THREADS`. All three take turns, so that a busy machine disturbs them alike; a cell is the
//! fast quartile of its rounds.

mod numbers;

use numbers::numbers;
use std::hint::black_box;
use std::time::{Duration, Instant};

use gemm_common::Parallelism;
use transformer_core::kernel;
use transformer_core::kernels::Beta;
use transformer_core::kernels::gemm::{Mat, MatMut, NoEpilogue, PackedRhs, Rhs, gemm};
use transformer_core::simd::isa;
use transformer_core::threads::{parallel, section, set_num_threads};

/// Rows, columns, depth, and how the factors lie: N as they are, T transposed, P packed before.
const SHAPES: [(usize, usize, usize, &str); 24] = [
    // y = x W', dx = dy W and dW = dy' x of the four training steps
    (1024, 128, 128, "NT"),
    (1024, 512, 128, "NT"),
    (2048, 256, 256, "NT"),
    (2048, 1024, 256, "NT"),
    (2048, 512, 512, "NT"),
    (2048, 2048, 512, "NT"),
    (2048, 512, 2048, "NT"),
    (2048, 512, 512, "NN"),
    (2048, 512, 2048, "NN"),
    (2048, 2048, 512, "NN"),
    (128, 512, 1024, "TN"),
    (512, 512, 2048, "TN"),
    (2048, 512, 2048, "TN"),
    (512, 2048, 2048, "TN"),
    (256, 8000, 256, "NT"),
    // decoding
    (1, 512, 512, "NP"),
    (1, 2048, 512, "NP"),
    (4, 2048, 512, "NP"),
    (8, 512, 2048, "NP"),
    (8, 32_000, 512, "NP"),
    (32, 512, 512, "NP"),
    (64, 2048, 512, "NP"),
    (8, 2048, 512, "NN"),
    (32, 2048, 512, "NT"),
];
/// More chains than latency times multipliers of any CPU, fewer than registers.
const CHAINS: usize = 12;
const ROUNDS: usize = 200_000;
const TIME: Duration = Duration::from_millis(800);

kernel! {
    /// ROUNDS times CHAINS multiply-adds that need no memory.
    fn multiply_add<T>(s: S; x: T) -> T {
        let x = s.splat(x);
        let mut sums = [x; CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = s.mul_add(*sum, x, x);
            }
        }
        let mut total = x;
        for sum in sums {
            total = s.add(total, sum);
        }
        s.reduce_sum(total)
    }
}

kernel! {
    fn lanes_of<T>(s: S;) -> usize {
        let _ = s;
        S::LANES
    }
}

/// Floating-point operations per nanosecond.
fn rate(work: impl FnOnce() -> f64) -> f64 {
    let start = Instant::now();
    work() / start.elapsed().as_secs_f64() * 1e-9
}

fn quartile(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() * 3 / 4]
}

fn main() {
    let threads = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(1);
    set_num_threads(threads).unwrap();
    let rival = gemm_f32::gemm::f32::get_gemm_fn();
    println!("{threads} threads, {}", isa().unwrap());
    println!(
        "{:>5} x {:>5} x {:>5}    {:>6} {:>6} {:>6} {:>8} {:>8}",
        "M", "N", "K", "peak", "ours", "crate", "of peak", "of crate"
    );
    for (m, n, k, kind) in SHAPES {
        let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
        let (mut c, mut d) = (vec![0.0f32; m * n], vec![0.0f32; m * n]);
        let (left, right) = (kind.starts_with('T'), kind.ends_with('T'));
        let a_mat = if left { Mat::new(&a, k, m).unwrap().t() } else { Mat::new(&a, m, k).unwrap() };
        let b_mat = if right { Mat::new(&b, n, k).unwrap().t() } else { Mat::new(&b, k, n).unwrap() };
        let packed = PackedRhs::new(b_mat).unwrap();
        let rhs = if kind.ends_with('P') { Rhs::Packed(&packed) } else { Rhs::Plain(b_mat) };
        let repeat = (20_000_000 / (m * n * k)).max(1);
        let work = (2 * repeat * m * n * k) as f64;
        let pool = if threads == 1 { Parallelism::None } else { Parallelism::Rayon(threads) };

        let mut rates = [vec![], vec![], vec![]];
        let start = Instant::now();
        while start.elapsed() < TIME || rates[0].len() < 8 {
            rates[0].push(rate(|| {
                let turn = |_| _ = black_box(multiply_add(black_box(0.5f32)));
                parallel(threads, turn).unwrap();
                threads as f64 * (ROUNDS * 2 * CHAINS * lanes_of::<f32>()) as f64
            }));
            let ours = || {
                for _ in 0..repeat {
                    gemm(MatMut::new(&mut c, m, n)?, a_mat, rhs, Beta::Assign, &NoEpilogue)?;
                }
                Ok(work)
            };
            rates[1].push(rate(|| section(None, ours).unwrap()));
            rates[2].push(rate(|| {
                let (a_col, a_row) = if left { (m as isize, 1) } else { (1, k as isize) };
                let (b_col, b_row) = if right { (k as isize, 1) } else { (1, n as isize) };
                let (d, d_row) = (d.as_mut_ptr(), n as isize);
                for _ in 0..repeat {
                    // SAFETY: the strides describe m x k, k x n and m x n numbers of three separate vectors. The crate
                    // writes columns, so it is asked for D' = B' A'.
                    unsafe {
                        let (a, b) = ((a.as_ptr(), a_row, a_col), (b.as_ptr(), b_row, b_col));
                        rival(
                            n, m, k, d, d_row, 1, false, b.0, b.1, b.2, a.0, a.1, a.2, 0.0, 1.0, false, false, false,
                            pool,
                        );
                    }
                }
                work
            }));
        }
        let largest = c.iter().zip(&d).map(|(c, d)| (c - d).abs()).fold(0.0, f32::max);
        assert!(largest < 1e-5 * k as f32, "the two products differ by {largest}");
        let [peak, ours, rival] = rates.map(quartile);
        let (of_peak, of_rival) = (100.0 * ours / peak, 100.0 * ours / rival);
        println!("{m:5} x {n:5} x {k:5} {kind} {peak:6.0} {ours:6.0} {rival:6.0} {of_peak:6.0} % {of_rival:6.0} %");
    }
}
