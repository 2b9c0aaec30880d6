//! Rows of numbers to bytes with a scale.

use crate::error::Result;
use crate::simd::{Float, Simd, prefetch};
use crate::{kernel, threads};

/// The largest byte: −128 is left out, so that magnitudes fit as well.
const LARGEST: f64 = 127.0;
/// Numbers that become bytes together: a fixed count, which the compiler turns into vector instructions.
const BLOCK: usize = 64;
/// Vectors whose largest numbers are sought side by side.
const CHAINS: usize = 4;
/// How many numbers ahead of that they are asked for: the rest of the row, or the next one.
const AHEAD: usize = 512;
/// A task has so many numbers at least: half a microsecond.
const TASK: usize = 4096;

kernel! {
    /// One row to bytes, zeros behind them; gives scale and sum. A row with a number that is not finite has the scale NaN.
    fn quantize_row<'a, T>(s: S; q: &'a mut [i8], x: &'a [T]) -> (f32, i32) {
        let (mut largest, mut poison) = ([s.zero(); CHAINS], [s.zero(); CHAINS]);
        let mut groups = x.chunks_exact(CHAINS * S::LANES);
        for group in &mut groups {
            let chains = group.chunks_exact(S::LANES).zip(&mut largest).zip(&mut poison);
            for ((x, largest), poison) in chains {
                prefetch(x.as_ptr().wrapping_add(AHEAD));
                let x = s.load(x);
                *largest = s.max(s.abs(x), *largest);
                *poison = s.mul_add(x, s.zero(), *poison); // 0, NaN from infinity and NaN on
            }
        }
        let chains = groups.remainder().chunks(S::LANES).zip(&mut largest).zip(&mut poison);
        for ((x, largest), poison) in chains {
            let x = s.load_first(x, T::ZERO);
            *largest = s.max(s.abs(x), *largest);
            *poison = s.mul_add(x, s.zero(), *poison);
        }
        let largest = s.reduce_max(largest.into_iter().fold(s.zero(), #[inline(always)] |a, b| s.max(a, b)));
        let poison = s.reduce_sum(poison.into_iter().fold(s.zero(), #[inline(always)] |a, b| s.add(a, b)));
        q[x.len()..].fill(0);
        let q = &mut q[..x.len()];
        let factor = T::from_f64(LARGEST) / largest;
        if poison.is_nan() || !factor.is_finite() {
            q.fill(0);
            return (if poison.is_nan() { f32::NAN } else { 0.0 }, 0); // zeros, or so small that they are
        }
        let factor = s.splat(factor);
        let (blocks, rest) = x.as_chunks::<BLOCK>();
        let (bytes, bytes_of_rest) = q.as_chunks_mut::<BLOCK>();
        let mut sum = 0;
        for (bytes, x) in bytes.iter_mut().zip(blocks) {
            sum += round(s, bytes, x, factor);
        }
        if !rest.is_empty() {
            let (mut x, mut bytes) = ([T::ZERO; BLOCK], [0; BLOCK]);
            x[..rest.len()].copy_from_slice(rest);
            sum += round(s, &mut bytes, &x, factor);
            bytes_of_rest.copy_from_slice(&bytes[..rest.len()]);
        }
        ((largest / T::from_f64(LARGEST)).to_f64() as f32, sum)
    }
}

/// x · factor to bytes, to the nearest integers; gives their sum.
#[inline(always)]
fn round<T: Float, S: Simd<T>>(s: S, bytes: &mut [i8; BLOCK], x: &[T; BLOCK], factor: S::V) -> i32 {
    let (mut rounded, mut sum) = ([T::ZERO; BLOCK], 0);
    for (rounded, x) in rounded.chunks_exact_mut(S::LANES).zip(x.chunks_exact(S::LANES)) {
        s.store(s.round(s.mul(s.load(x), factor)), rounded);
    }
    for (byte, &x) in bytes.iter_mut().zip(&rounded) {
        // SAFETY: finite, and at most 127 (1 + 2⁻²²) before it was rounded.
        let x = unsafe { (x.to_f64() as f32).to_int_unchecked::<i32>() };
        *byte = x as i8;
        sum += x;
    }
    sum
}

/// Every row of x (R, K) to bytes, rows of q being `stride` ≥ K apart with zeros behind; its scale, and the sum of its bytes.
pub fn quantize_rows<T: Float>(
    q: &mut [i8],
    scales: &mut [f32],
    sums: &mut [i32],
    x: &[T],
    depth: usize,
    stride: usize,
    workers: usize,
) -> Result<()> {
    if depth == 0 {
        q.fill(0);
        scales.fill(0.0);
        sums.fill(0);
        return Ok(());
    }
    fn some<T: Float>(q: &mut [i8], scales: &mut [f32], sums: &mut [i32], x: &[T], depth: usize, stride: usize) {
        let rows = q.chunks_mut(stride).zip(x.chunks(depth));
        for ((q, x), (scale, sum)) in rows.zip(scales.iter_mut().zip(sums)) {
            (*scale, *sum) = quantize_row(q, x);
        }
    }
    // Few tasks, for each is handed over under a lock.
    let rows = scales.len().div_ceil(4 * workers).max(TASK / depth).max(1);
    if workers == 1 || rows >= scales.len() {
        some(q, scales, sums, x, depth, stride);
        return Ok(());
    }
    let parts = (q.chunks_mut(rows * stride).zip(scales.chunks_mut(rows)))
        .zip(sums.chunks_mut(rows).zip(x.chunks(rows * depth)));
    threads::for_each(parts, |((q, scales), (sums, x))| some(q, scales, sums, x, depth, stride))
}
