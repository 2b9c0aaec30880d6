//! Memory for tensors and packed panels.

use std::alloc::{Layout, alloc_zeroed};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use super::Float;
use crate::error::{Error, Result};

/// A cache line, and a huge page.
const LINE: usize = 64;
const HUGE: usize = 2 << 20;

/// Numbers that start on a cache line. The length is fixed; a refused allocation is an error, not an abort.
///
/// Where there are enough of them they start on a huge page and the system is asked for such pages: there are fewer to look up
/// while weights pass by. A step of training takes 1 to 3 % less time (Zen 5, a virtual machine).
///
/// A buffer can be split; its memory is freed with the last of the parts.
#[derive(Debug)]
pub struct Buffer<T> {
    memory: Arc<Vec<T>>,
    start: NonNull<T>,
    len: usize,
}

// SAFETY: a buffer alone has the numbers from `start` on, as a `Vec` has its own; `memory` is there to be freed.
unsafe impl<T: Send> Send for Buffer<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Buffer<T> {}

impl<T: Float> Buffer<T> {
    /// `len` zeros.
    pub fn zeroed(len: usize) -> Result<Self> {
        let huge = len.saturating_mul(size_of::<T>()) >= HUGE;
        let alignment = if huge { HUGE } else { LINE };
        // An aligned start fits into the spare numbers. Nobody writes them, so they take no memory.
        let spare = alignment / size_of::<T>();
        let mut data = zeros::<T>(len.saturating_add(spare))?;
        let start = data.as_ptr().align_offset(alignment).min(spare);
        let numbers = &mut data[start..start + len];
        if huge {
            ask_for_huge_pages(numbers);
        }
        let start = NonNull::from(numbers).cast();
        Ok(Buffer { memory: Arc::new(data), start, len })
    }
}

impl<T> Buffer<T> {
    /// The numbers from `at` on, as a buffer of their own.
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.len, "a buffer of {} numbers is split at {at}", self.len);
        // SAFETY: inside of this buffer, or just behind it.
        let start = unsafe { self.start.add(at) };
        let len = self.len - at;
        self.len = at;
        Buffer { memory: self.memory.clone(), start, len }
    }

    /// How many parts its memory was split into, those that were dropped or joined not counted.
    pub fn parts(&self) -> usize {
        Arc::strong_count(&self.memory)
    }

    /// Whether `other` is a part of the same memory.
    pub fn is_beside(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
    }

    /// Whether `next` lies right behind it, split off once.
    pub fn touches(&self, next: &Self) -> bool {
        self.is_beside(next) && self.start.as_ptr().wrapping_add(self.len) == next.start.as_ptr()
    }

    /// Takes in again what lies right behind.
    pub fn join(&mut self, next: Self) {
        assert!(self.touches(&next), "only neighbours can be joined");
        self.len += next.len;
    }
}

/// For the whole ones of `data`, which starts on such a page.
fn ask_for_huge_pages<T>(data: &[T]) {
    #[cfg(target_os = "linux")]
    // SAFETY: the range is inside of `data`, and what it holds does not change. If the system has no such pages, nothing happens.
    unsafe {
        libc::madvise(data.as_ptr().cast_mut().cast(), size_of_val(data) / HUGE * HUGE, libc::MADV_HUGEPAGE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = data;
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
    Err(refused::<T>(len))
}

/// No numbers, and room for `len`: for what is written wholly before it is read.
pub fn room<T: Float>(len: usize) -> Result<Vec<T>> {
    let mut values = Vec::new();
    values.try_reserve_exact(len).map_err(|_| refused::<T>(len))?;
    Ok(values)
}

fn refused<T>(len: usize) -> Error {
    let bytes = len as u128 * size_of::<T>() as u128;
    Error::OutOfMemory(format!("cannot allocate {bytes} bytes; use a smaller batch or model"))
}

impl<T> Default for Buffer<T> {
    /// No numbers.
    fn default() -> Self {
        Buffer { memory: Arc::new(Vec::new()), start: NonNull::dangling(), len: 0 }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `memory` holds these numbers, and no other buffer does.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Buffer<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}
