//! Memory for packed operands, kept between calls.
//!
//! It lives in one list for the process, under a mutex that is held for a few nanoseconds: not in the threads, which would
//! each keep their own largest block for ever, and not with the caller, who would have to know what a product packs. A
//! call takes the block it finds and puts it back when done, so there are never more blocks than calls at one time. One that
//! could not look, because its process was forked while the list was taken, keeps nothing.

use std::any::Any;
use std::sync::Mutex;

use crate::error::Result;
use crate::simd::{Buffer, Float};
use crate::threads::briefly;

/// Bytes of a block at least, enough for most calls: its pages come when they are first used, and shorter ones that had to grow
/// would stay behind with the allocator.
const SHORTEST: usize = 8 << 20;

static STASH: Mutex<Vec<Box<dyn Any + Send>>> = Mutex::new(Vec::new());

/// Calls `body` with `len` numbers of unspecified value, or with none if `len` is 0.
pub(in crate::kernels) fn with<T: Float, R>(len: usize, body: impl FnOnce(&mut [T]) -> Result<R>) -> Result<R> {
    if len == 0 {
        return body(&mut []);
    }
    let looked = briefly(|| STASH.try_lock()).map(|mut stash| take::<T>(&mut stash));
    let keeps = looked.is_some();
    let mut block = looked.flatten().unwrap_or_default();
    if block.len() < len {
        *block = Buffer::default(); // frees before it allocates
        *block = Buffer::zeroed(len.next_power_of_two().max(SHORTEST / size_of::<T>()))?;
    }
    let result = body(&mut block[..len]);
    if keeps && let Some(mut stash) = briefly(|| STASH.try_lock()) {
        stash.push(block);
    }
    result
}

/// The block put back last that holds numbers of this type.
fn take<T: Float>(stash: &mut Vec<Box<dyn Any + Send>>) -> Option<Box<Buffer<T>>> {
    let at = stash.iter().rposition(|block| block.is::<Buffer<T>>())?;
    stash.remove(at).downcast().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_stash_that_stays_taken_is_done_without() {
        let (say, hear) = mpsc::channel();
        let taken = STASH.lock().unwrap(); // as in a child that was forked meanwhile
        std::thread::spawn(move || say.send(with(3, |numbers: &mut [f32]| Ok(numbers.len()))));
        assert_eq!(hear.recv_timeout(Duration::from_secs(60)).expect("it hangs"), Ok(3));
        drop(taken);
    }
}
