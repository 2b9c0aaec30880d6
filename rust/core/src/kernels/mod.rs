//! Slices in, slices out: no tape, no allocation of anything large. A computation has a forward and, where it has a
//! derivative, also a backward; most have a `_reference` in plain loops, which the tests compare with.
//!
//! Rows are independent: the result of a row depends on that row alone, by one order of operations. Sums over rows go
//! through [`reduce`]. Work is cut into tasks by written constants, so that no bit depends on the number of threads.

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod dropout;
pub mod elementwise;
pub mod embedding;
pub mod gemm;
mod grid;
pub mod int8;
pub(crate) mod lanes;
pub mod norm;
pub mod optimizer;
mod out;
pub mod pooling;
pub mod reduce;
pub mod softmax;
pub mod top_k;
#[cfg(test)]
mod vectorised;

use crate::threads::rows_per_task;

/// Whether a result replaces what is there or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beta {
    /// y = result
    Assign,
    /// y += result
    Add,
}

/// Elements per task of a job over rows of `cols` columns: whole rows, at least one element.
pub(crate) fn task_len(cols: usize) -> usize {
    rows_per_task(cols) * cols.max(1)
}

#[cfg(test)]
pub(crate) mod testing {
    use crate::rng::Key;
    use crate::simd::Float;

    /// Standard normal numbers.
    pub fn normal<T: Float>(n: usize, seed: u64) -> Vec<T> {
        (0..n).map(|i| T::from_f64(Key::new(seed).normal(i as u64))).collect()
    }

    /// `tolerance` is relative where numbers are larger than 1.
    pub fn assert_close<T: Float>(got: &[T], expected: &[T], tolerance: f64) {
        assert_eq!(got.len(), expected.len());
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let (got, expected) = (got.to_f64(), expected.to_f64());
            let error = (got - expected).abs() / expected.abs().max(1.0);
            assert!(error <= tolerance, "{i}: {got} instead of {expected}");
        }
    }
}
