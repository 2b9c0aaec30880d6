//! Memory for packed operands, kept between calls.
//!
//! It lives in one list for the process, under a mutex that is held for a few nanoseconds: not in the threads, which would
//! each keep their own largest block for ever, and not with the caller, who would have to know what a product packs. A
//! call takes the block it finds and puts it back when done, so there are never more blocks than calls at one time.

use std::any::Any;
use std::sync::Mutex;

use crate::error::Result;
use crate::simd::{Buffer, Float};

/// Bytes of a block at least, enough for most calls: its pages come when they are first used, and shorter ones that had to grow
/// would stay behind with the allocator.
const SHORTEST: usize = 8 << 20;

static STASH: Mutex<Vec<Box<dyn Any + Send>>> = Mutex::new(Vec::new());

/// Calls `body` with `len` numbers of unspecified value, or with none if `len` is 0.
pub(in crate::kernels) fn with<T: Float, R>(len: usize, body: impl FnOnce(&mut [T]) -> Result<R>) -> Result<R> {
    if len == 0 {
        return body(&mut []);
    }
    let mut block = take::<T>().unwrap_or_default();
    if block.len() < len {
        *block = Buffer::default(); // frees before it allocates
        *block = Buffer::zeroed(len.next_power_of_two().max(SHORTEST / size_of::<T>()))?;
    }
    let result = body(&mut block[..len]);
    if let Ok(mut stash) = STASH.lock() {
        stash.push(block);
    }
    result
}

/// The block put back last that holds numbers of this type.
fn take<T: Float>() -> Option<Box<Buffer<T>>> {
    let mut stash = STASH.lock().ok()?;
    let at = stash.iter().rposition(|block| block.is::<Buffer<T>>())?;
    stash.remove(at).downcast().ok()
}
