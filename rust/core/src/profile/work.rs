//! What an operation has to do, counted from its sizes.

use std::ops::{AddAssign, SubAssign};

/// The work of some calls. Operations count matrix products as FLOPs and nothing else: elsewhere memory is what limits.
/// Bytes are what must be read and written at least, each operand once.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Rows, mostly tokens.
    pub rows: f64,
    /// Floating-point operations of matrix products, a multiplication and an addition being two.
    pub flops: f64,
    /// Bytes.
    pub bytes: f64,
}

impl Work {
    /// Nothing of its own: what its parts do is counted there.
    pub fn of_parts(rows: usize) -> Self {
        Work { rows: rows as f64, ..Work::default() }
    }

    /// A product of (rows, inner) with (inner, cols).
    pub fn product<T>(rows: usize, inner: usize, cols: usize) -> Self {
        let [rows, inner, cols] = [rows, inner, cols].map(|n| n as f64);
        let numbers = rows * inner + inner * cols + rows * cols;
        Work { rows, flops: 2.0 * rows * inner * cols, bytes: numbers * size_of::<T>() as f64 }
    }

    /// All of (rows, cols) crosses from or to memory so many times.
    pub fn passes<T>(passes: usize, rows: usize, cols: usize) -> Self {
        let bytes = (passes * size_of::<T>()) as f64 * rows as f64 * cols as f64;
        Work { rows: rows as f64, flops: 0.0, bytes }
    }

    /// `products` products of attention for `pairs` of a query and a key that it may see, in each of `heads` heads of
    /// `head_dim`; `numbers` are read and written.
    pub fn attention<T>(
        products: usize,
        rows: usize,
        pairs: usize,
        [heads, head_dim]: [usize; 2],
        numbers: usize,
    ) -> Self {
        let flops = 2.0 * products as f64 * pairs as f64 * (heads * head_dim) as f64;
        Work { rows: rows as f64, flops, bytes: (numbers * size_of::<T>()) as f64 }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

impl SubAssign for Work {
    fn sub_assign(&mut self, other: Self) {
        self.rows -= other.rows;
        self.flops -= other.flops;
        self.bytes -= other.bytes;
    }
}
