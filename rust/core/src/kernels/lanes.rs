//! The loop that most kernels are made of: over the elements of some rows at once, vector by vector.

use crate::simd::{Float, Simd, prefetch};

/// Vectors that are summed in chains of their own before the chains are added: enough to hide the latency of an addition.
const CHAINS: usize = 4;

/// How many numbers ahead of the loop its rows are asked for. What lies behind a row is mostly the next one, and a kernel
/// that computes much per number has too few lines under way by itself: dropout beyond the caches took 1.4 times as long.
pub(super) const AHEAD: usize = 512;

/// Walks rows `y` and `x` of one length: `f(i, y, x)` gets the vectors from column `i` on and returns new vectors for `y`
/// and summands. Returns the sums. A sum depends on its row alone: vector `j` of the row goes to chain `j mod 4`, then
/// chains and lanes are added in one fixed tree.
#[inline(always)]
pub(crate) fn sweep<T: Float, S: Simd<T>, const M: usize, const N: usize, const Q: usize>(
    s: S,
    y: [&mut [T]; M],
    x: [&[T]; N],
    f: impl Fn(usize, [S::V; M], [S::V; N]) -> ([S::V; M], [S::V; Q]),
) -> [T; Q] {
    let n = y.first().map(|y| y.len()).or(x.first().map(|x| x.len())).unwrap_or(0);
    assert!(y.iter().all(|y| y.len() == n) && x.iter().all(|x| x.len() == n), "rows of one length");
    let mut chains = [[s.zero(); Q]; CHAINS];
    let mut i = 0;
    while i + CHAINS * S::LANES <= n {
        for chain in &mut chains {
            let (mut old, mut read) = ([s.zero(); M], [s.zero(); N]);
            for k in 0..M {
                // SAFETY: every row has n numbers and i + LANES ≤ n.
                old[k] = unsafe { s.load_ptr(y[k].as_ptr().add(i)) };
            }
            for k in 0..N {
                prefetch(x[k].as_ptr().wrapping_add(i + AHEAD));
                // SAFETY: as above.
                read[k] = unsafe { s.load_ptr(x[k].as_ptr().add(i)) };
            }
            let (new, summands) = f(i, old, read);
            for k in 0..M {
                // SAFETY: as above.
                unsafe { s.store_ptr(new[k], y[k].as_mut_ptr().add(i)) };
            }
            for q in 0..Q {
                chain[q] = s.add(chain[q], summands[q]);
            }
            i += S::LANES;
        }
    }
    for chain in &mut chains {
        if i >= n {
            break;
        }
        let lanes = S::LANES.min(n - i);
        let (mut old, mut read) = ([s.zero(); M], [s.zero(); N]);
        for k in 0..M {
            // SAFETY: every row has n numbers and i + lanes ≤ n.
            old[k] = unsafe { s.load_ptr_first(y[k].as_ptr().add(i), lanes, T::ZERO) };
        }
        for k in 0..N {
            // SAFETY: as above.
            read[k] = unsafe { s.load_ptr_first(x[k].as_ptr().add(i), lanes, T::ZERO) };
        }
        let (new, summands) = f(i, old, read);
        for k in 0..M {
            // SAFETY: as above.
            unsafe { s.store_ptr_first(new[k], y[k].as_mut_ptr().add(i), lanes) };
        }
        for q in 0..Q {
            // Lanes beyond the row hold what `f` made of zeros.
            chain[q] = s.add(chain[q], s.select(s.first(lanes), summands[q], s.zero()));
        }
        i += lanes;
    }
    let mut sums = [T::ZERO; Q];
    for q in 0..Q {
        sums[q] = s.reduce_sum(s.add(s.add(chains[0][q], chains[2][q]), s.add(chains[1][q], chains[3][q])));
    }
    sums
}

/// [`sweep`] without sums.
#[inline(always)]
pub(crate) fn map<T: Float, S: Simd<T>, const M: usize, const N: usize>(
    s: S,
    y: [&mut [T]; M],
    x: [&[T]; N],
    f: impl Fn([S::V; M], [S::V; N]) -> [S::V; M],
) {
    let [] = sweep(
        s,
        y,
        x,
        #[inline(always)]
        |_, y, x| (f(y, x), []),
    );
}

/// [`sweep`] that writes nothing.
#[inline(always)]
pub(crate) fn sums<T: Float, S: Simd<T>, const N: usize, const Q: usize>(
    s: S,
    x: [&[T]; N],
    f: impl Fn([S::V; N]) -> [S::V; Q],
) -> [T; Q] {
    sweep(
        s,
        [],
        x,
        #[inline(always)]
        |_, [], x| ([], f(x)),
    )
}

/// The largest number of a row, NaN left out; −∞ for none.
#[inline(always)]
pub(crate) fn largest<T: Float, S: Simd<T>>(s: S, x: &[T]) -> T {
    let lowest = s.splat(T::NEG_INFINITY);
    let mut chains = [lowest; CHAINS];
    let mut blocks = x.chunks_exact(CHAINS * S::LANES);
    for block in &mut blocks {
        for (chain, x) in chains.iter_mut().zip(block.chunks_exact(S::LANES)) {
            *chain = s.max(s.load(x), *chain);
        }
    }
    for (chain, x) in chains.iter_mut().zip(blocks.remainder().chunks(S::LANES)) {
        *chain = s.max(s.load_first(x, T::NEG_INFINITY), *chain);
    }
    s.reduce_max(s.max(s.max(chains[0], chains[1]), s.max(chains[2], chains[3])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel;

    kernel! {
        fn dot_and_square<'a, T>(s: S; y: &'a mut [T], a: &'a [T], b: &'a [T]) -> [T; 2] {
            sweep(s, [y], [a, b], #[inline(always)] |i, [y], [a, b]| {
                let ab = s.mul(a, b);
                ([s.add(y, ab)], [ab, s.add(s.splat(T::ONE), s.mul(s.splat(T::from_f64(i as f64)), s.zero()))])
            })
        }
    }

    kernel! {
        fn max<'a, T>(s: S; x: &'a [T]) -> T {
            largest(s, x)
        }
    }

    #[test]
    fn a_sweep_sees_every_element_once_and_nothing_else() {
        for n in 0..150 {
            let a: Vec<f32> = (0..n).map(|i| i as f32).collect();
            let b: Vec<f32> = (0..n).map(|i| (i % 5) as f32).collect();
            let mut y = vec![1.0f32; n];
            let [dot, count] = dot_and_square(&mut y, &a, &b);
            let expected: f32 = (0..n).map(|i| a[i] * b[i]).sum();
            assert_eq!((dot, count), (expected, n as f32));
            assert!((0..n).all(|i| y[i] == 1.0 + a[i] * b[i]));
        }
    }

    #[test]
    fn the_largest_is_found_anywhere_and_nan_left_out() {
        assert_eq!(max::<f32>(&[]), f32::NEG_INFINITY);
        for n in 1..150 {
            for at in 0..n {
                let mut x = vec![-2.0f32; n];
                x[n - 1 - at] = f32::NAN;
                x[at] = -1.0;
                assert_eq!(max(&x), -1.0, "{at} of {n}");
            }
        }
    }
}
