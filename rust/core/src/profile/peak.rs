//! What this machine can do: multiply-adds from registers, reading from memory, and copying.

use crate::error::{Error, Result};
use crate::kernel;
use crate::simd::Buffer;
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Independent chains of multiply-adds: more than latency times units of any CPU we know, fewer than its registers.
const CHAINS: usize = 12;
const ROUNDS: usize = 200_000;
/// Numbers that each thread reads at most, and all of them together: 128 and 512 MiB of f32, far beyond the caches.
const NUMBERS: usize = 32 << 20;
const ALL_NUMBERS: usize = 128 << 20;

/// Rates per second of some threads together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// How many threads.
    pub threads: usize,
    /// Floating-point operations in f32, a multiply-add being two.
    pub flops: f64,
    /// Bytes read from memory.
    pub read: f64,
    /// Bytes read and written by a copy in memory. (What is written is mostly read first by the cache; that is not counted.)
    pub copy: f64,
}

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

kernel! {
    /// Copies `x` to `y` by plain loads and stores; gives the bytes read and written.
    pub fn copy<'a, T>(s: S; y: &'a mut [T], x: &'a [T]) -> f64 {
        for (y, x) in y.chunks_exact_mut(S::LANES).zip(x.chunks_exact(S::LANES)) {
            s.store(s.load(x), y);
        }
        2.0 * size_of_val(x) as f64
    }
}

/// The best rate, per second, of threads that do one `work` each at the same time, again and again: a slower round was disturbed.
/// (The sum of what each reaches by itself says too much: one that runs while another waits for its core has the memory alone.)
fn best_rate<W: Send>(
    time: Duration,
    works: &mut [W],
    builder: impl Fn(usize) -> Builder,
    work: impl Fn(&mut W) -> f64 + Sync,
) -> Result<f64> {
    let (begin, threads) = (Instant::now(), works.len());
    let (arrivals, rounds) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
    let one = |own: &mut W| {
        let mut done = Vec::new();
        while done.len() < rounds.load(Ordering::Acquire) {
            arrivals.fetch_add(1, Ordering::AcqRel);
            while arrivals.load(Ordering::Acquire) < threads * (done.len() + 1) {
                std::hint::spin_loop();
            }
            let start = Instant::now();
            done.push((work(own), start, Instant::now()));
            if begin.elapsed() >= time {
                // The next round, which nobody can begin before this thread does, is the last.
                rounds.fetch_min(done.len() + 1, Ordering::AcqRel);
            }
        }
        done
    };
    let done = std::thread::scope(|scope| -> Result<Vec<Vec<(f64, Instant, Instant)>>> {
        let mut handles = Vec::new();
        for (i, own) in works.iter_mut().enumerate() {
            handles.push(builder(i).spawn_scoped(scope, || one(own)).map_err(|error| {
                // Those that wait for it already must not wait for ever.
                rounds.store(0, Ordering::Release);
                arrivals.store(usize::MAX / 2, Ordering::Release);
                Error::Unsupported(format!("peak: cannot start {threads} threads ({error}); ask for fewer"))
            })?);
        }
        Ok(handles.into_iter().filter_map(|handle| handle.join().ok()).collect())
    })?;
    let rate = |round: usize| {
        let round = || done.iter().map(|own| own[round]);
        let (first, last) = (round().map(|(_, start, _)| start).min()?, round().map(|(.., end)| end).max()?);
        Some(round().map(|(amount, ..)| amount).sum::<f64>() / (last - first).as_secs_f64())
    };
    Ok((0..done.first().map_or(0, Vec::len)).filter_map(rate).fold(0.0, f64::max))
}

/// Measures with `threads` threads of its own; each of the three rates takes about `time`.
pub fn measure(threads: usize, time: Duration) -> Result<Peak> {
    let builder = |_| Builder::new();
    let flops = best_rate(time, &mut vec![[0.0f32; 16]; threads], builder, |y| {
        let flops = multiply_add(&mut y[..], black_box(0.5), black_box(1.0));
        black_box(y);
        flops
    })?;
    let numbers = NUMBERS.min(ALL_NUMBERS / threads.max(1));
    let mut memory = (0..threads).map(|_| Buffer::<f32>::zeroed(numbers)).collect::<Result<Vec<_>>>()?;
    memory.iter_mut().for_each(|x| x.fill(1.0)); // memory that was never written is one page of zeros
    let read = best_rate(time, &mut memory, builder, |x| {
        let mut y = [0.0f32; 16];
        let bytes = read(&mut y, black_box(&x[..]));
        black_box(y);
        bytes
    })?;
    let copy = best_rate(time, &mut memory, builder, |x| {
        let (x, y) = x.split_at_mut(numbers / 2);
        copy(y, black_box(x))
    })?;
    Ok(Peak { threads, flops, read, copy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_cannot_start_is_an_error() {
        let builder = |i| Builder::new().stack_size(if i == 2 { 1 << 60 } else { 1 << 20 });
        let rate = best_rate(Duration::from_millis(1), &mut [0.0; 4], builder, |x| *x);
        assert!(matches!(&rate, Err(Error::Unsupported(text)) if text.contains("4 threads")), "{rate:?}");
    }
}
