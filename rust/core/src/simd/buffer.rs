//! Memory for tensors and packed panels.

use std::alloc::{Layout, alloc_zeroed};
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
        let total = len.saturating_add(SPARE);
        let data = zeros::<T>(total)?;
        // The spare numbers are one cache line at least, so an aligned start always fits.
        let start = data.as_ptr().align_offset(ALIGNMENT).min(SPARE);
        Ok(Buffer { data, start, len })
    }
}

/// `len` zeros, as the system gives them: who first uses a page, not this thread, pays for it.
pub fn zeros<T: Float>(len: usize) -> Result<Vec<T>> {
    if len == 0 {
        return Ok(Vec::new());
    }
    if let Ok(layout) = Layout::array::<T>(len) {
        // SAFETY: the size is not 0; bytes of 0 are the number 0; `Vec` frees by the same layout.
        unsafe {
            let data = alloc_zeroed(layout).cast::<T>();
            if !data.is_null() {
                return Ok(Vec::from_raw_parts(data, len, len));
            }
        }
    }
    let bytes = len as u128 * size_of::<T>() as u128;
    Err(Error::OutOfMemory(format!("cannot allocate {bytes} bytes; use a smaller batch or model")))
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
