//! How an array of Python lies in the rows of a matrix, and back.

use crate::arrays::copy;
use crate::errors::ShapeError;
use pyo3::PyResult;
use transformer_core::error::Result;
use transformer_core::kernels::elementwise;
use transformer_core::rows::Rows;
use transformer_core::simd::{Float, zeros};
use transformer_core::tape::{Pool, Tensor};
use transformer_core::threads;

/// Numbers that are worth the help of sleeping threads: 1 MiB of f32, some 100 µs of copying.
pub const LARGE: usize = 256 * 1024;

/// The layout of an argument or a result.
#[derive(Clone)]
pub enum Form {
    /// Rows as they are, under any leading shape.
    Plain {
        /// The array's shape.
        shape: Vec<usize>,
        /// Columns of the matrix.
        cols: usize,
    },
    /// An array whose columns stand among others, from `start`.
    Columns {
        /// The array's shape.
        shape: Vec<usize>,
        /// Its first column in the matrix.
        start: usize,
    },
    /// (B, H, L, K) as rows of heads side by side, padding left out.
    Heads {
        /// The array's shape.
        shape: [usize; 4],
        /// The real rows of each sequence.
        rows: Rows,
    },
}

impl Form {
    /// (..., D) as rows of D columns.
    pub fn rows(shape: &[usize]) -> PyResult<Self> {
        match shape.last() {
            Some(&cols) => Ok(Form::Plain { shape: shape.to_vec(), cols }),
            None => Err(ShapeError::new_err("expected an array with at least one axis, got a single number")),
        }
    }

    /// The form of a result with other columns.
    pub fn with_last(&self, cols: usize) -> Self {
        let mut shape = self.shape();
        if let Some(last) = shape.last_mut() {
            *last = cols;
        }
        Form::Plain { shape, cols }
    }

    /// The array's shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Form::Plain { shape, .. } | Form::Columns { shape, .. } => shape.clone(),
            Form::Heads { shape, .. } => shape.to_vec(),
        }
    }

    /// Rows and columns of the array's own part.
    pub fn size(&self) -> (usize, usize) {
        match self {
            Form::Plain { shape, cols } => {
                (shape.iter().product::<usize>().checked_div(*cols).unwrap_or(rows(shape)), *cols)
            }
            Form::Columns { shape, .. } => (rows(shape), shape.last().copied().unwrap_or(1)),
            Form::Heads { shape: [_, h, _, k], rows } => (rows.total(), h * k),
        }
    }

    /// An array as rows.
    pub fn pack<T: Float>(&self, values: &[T], pool: &mut Pool<T>) -> Result<Tensor<T>> {
        let (rows, cols) = self.size();
        let mut packed = pool.tensor(rows, cols)?;
        match self {
            Form::Plain { .. } | Form::Columns { .. } if values.len() < LARGE => packed.copy_from_slice(values),
            Form::Plain { .. } | Form::Columns { .. } => elementwise::copy(&mut packed, values)?,
            Form::Heads { shape: [_, h, l, k], rows: sequences } => {
                let (rows, mut rest, mut parts) = (threads::rows_per_task(cols), &mut packed[..], Vec::new());
                for (b, length) in sequences.lengths().enumerate() {
                    for first in (0..length).step_by(rows) {
                        let (part, behind) = rest.split_at_mut(rows.min(length - first) * cols);
                        parts.push((b, first, part));
                        rest = behind;
                    }
                }
                threads::for_each(parts.into_iter(), |(b, first, part)| {
                    for (to, i) in part.chunks_exact_mut((*k).max(1)).zip(0..) {
                        let at = ((b * h + i % h) * l + first + i / h) * k;
                        if let Some(from) = values.get(at..at + k) {
                            to.copy_from_slice(from);
                        }
                    }
                })?;
            }
        }
        Ok(packed)
    }

    /// Rows as an array; zeros at padding.
    pub fn unpack<T: Float>(&self, tensor: &Tensor<T>) -> Result<Vec<T>> {
        Ok(match self {
            Form::Plain { .. } => copy(tensor)?,
            Form::Columns { start, .. } => {
                let (rows, cols) = self.size();
                let mut values = zeros(rows * cols)?;
                for (i, to) in values.chunks_exact_mut(cols.max(1)).enumerate() {
                    to.copy_from_slice(tensor.row(i).get(*start..start + cols).unwrap_or_default());
                }
                values
            }
            Form::Heads { shape: [b, h, l, k], rows: sequences } => {
                let mut values = zeros(b * h * l * k)?;
                let heads = values.chunks_exact_mut((l * k).max(1)).enumerate();
                threads::for_each(heads, |(i, values)| {
                    let (sequence, first) = (i / h, i % h * k);
                    for (to, row) in values.chunks_exact_mut((*k).max(1)).zip(sequences.range(sequence)) {
                        to.copy_from_slice(tensor.row(row).get(first..first + k).unwrap_or_default());
                    }
                })?;
                values
            }
        })
    }
}

fn rows(shape: &[usize]) -> usize {
    shape.split_last().map_or(1, |(_, leading)| leading.iter().product())
}
