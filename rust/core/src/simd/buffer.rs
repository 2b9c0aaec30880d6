//! Memory for tensors and packed panels.

use std::ops::{Deref, DerefMut};

use super::Float;
use crate::error::{Error, Result};

const ALIGNMENT: usize = 64;
const SPARE: usize = 16;

/// Numbers that start on a cache line. The length is fixed; a refused allocation is an error, not an abort.
#[derive(Debug)]
pub struct Buffer<T> {
    data: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Float> Buffer<T> {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Result<Self> {
        let mut data = Vec::new();
        let total = len.saturating_add(SPARE);
        data.try_reserve_exact(total).map_err(|_| {
            let bytes = total as u128 * size_of::<T>() as u128;
            Error::OutOfMemory(format!("cannot allocate {bytes} bytes; use a smaller batch or model"))
        })?;
        data.resize(total, T::ZERO);
        // The spare numbers are one cache line at least, so an aligned start always fits.
        let start = data.as_ptr().align_offset(ALIGNMENT).min(SPARE);
        Ok(Buffer { data, start, len })
    }
}

impl<T> Default for Buffer<T> {
    /// No numbers.
    fn default() -> Self {
        Buffer { data: Vec::new(), start: 0, len: 0 }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        &self.data[self.start..self.start + self.len]
    }
}

impl<T> DerefMut for Buffer<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[self.start..self.start + self.len]
    }
}
