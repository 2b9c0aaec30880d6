//! An allocator that keeps what is large and was freed, for what is asked for next.
//!
//! The system takes large memory back as soon as it is freed and gives fresh pages, zeroed one by one, to whoever asks again: a
//! call that returns arrays of 8 MiB pays for 2,000 page faults each time. A returned array owns its memory; when Python
//! drops it, wherever and whenever that is, its memory comes here.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a block from which on the system maps memory anew.
const SMALLEST: usize = 64 << 10;
/// Bytes that are kept at most.
const MOST: usize = 32 << 20;
/// Blocks that are kept at most.
const BLOCKS: usize = 64;
/// The largest alignment of what is kept.
const ALIGNMENT: usize = 16;

/// For `#[global_allocator]`: the system's allocator, behind at most 32 MiB in blocks that were freed. The oldest leave first.
#[derive(Debug)]
pub struct Keeping;

#[derive(Clone, Copy)]
struct Block {
    address: *mut u8,
    bytes: usize,
}

/// Blocks that wait, the oldest first.
struct Kept {
    blocks: [Block; BLOCKS],
    count: usize,
    bytes: usize,
}

struct Shelf {
    busy: AtomicBool,
    kept: UnsafeCell<Kept>,
}

// SAFETY: `kept` is touched by who has set `busy`, and by nobody else.
unsafe impl Sync for Shelf {}

static SHELF: Shelf = Shelf {
    busy: AtomicBool::new(false),
    kept: UnsafeCell::new(Kept { blocks: [Block { address: null_mut(), bytes: 0 }; BLOCKS], count: 0, bytes: 0 }),
};

impl Shelf {
    /// Lets `f` work on what is kept. Nobody waits: another thread may be at it, or have been when the process forked.
    fn visit<R>(&self, f: impl FnOnce(&mut Kept) -> R) -> Option<R> {
        if self.busy.swap(true, Ordering::Acquire) {
            return None;
        }
        // SAFETY: `busy` was false and is true now: nobody else is here. `f` does not panic and does not allocate.
        let result = f(unsafe { &mut *self.kept.get() });
        self.busy.store(false, Ordering::Release);
        Some(result)
    }
}

impl Kept {
    fn remove(&mut self, i: usize) -> Block {
        let block = self.blocks[i];
        self.blocks.copy_within(i + 1..self.count, i);
        self.count -= 1;
        self.bytes -= block.bytes;
        block
    }

    /// The block of so many bytes that was freed last: the caches may still know it.
    fn take(&mut self, bytes: usize) -> Option<Block> {
        let found = self.blocks[..self.count].iter().rposition(|block| block.bytes == bytes)?;
        Some(self.remove(found))
    }

    fn put(&mut self, block: Block) {
        while self.count == BLOCKS || self.bytes + block.bytes > MOST {
            let oldest = self.remove(0);
            // SAFETY: it came from the system, in a layout made of its size.
            unsafe { System.dealloc(oldest.address, aligned(oldest.bytes)) };
        }
        self.blocks[self.count] = block;
        self.count += 1;
        self.bytes += block.bytes;
    }
}

fn aligned(bytes: usize) -> Layout {
    // SAFETY: the alignment is a power of two, and `class` gives no sizes near the largest.
    unsafe { Layout::from_size_align_unchecked(bytes, ALIGNMENT) }
}

/// The bytes behind an allocation where they may be kept: rounded up, so that batches of nearly one size share a block.
fn class(layout: Layout) -> Option<usize> {
    let bytes = layout.size();
    let fits = (SMALLEST..=MOST).contains(&bytes) && layout.align() <= ALIGNMENT;
    fits.then(|| bytes.next_multiple_of(bytes.next_power_of_two() / 16))
}

/// The layout in which the system has an allocation. What is large has one alignment, kept or not, so that the system can resize it.
fn layout(asked: Layout) -> Layout {
    match class(asked) {
        Some(bytes) => aligned(bytes),
        None if asked.size() > MOST => asked.align_to(ALIGNMENT).unwrap_or(asked),
        None => asked,
    }
}

fn take(asked: Layout) -> Option<*mut u8> {
    let bytes = class(asked)?;
    SHELF.visit(|kept| kept.take(bytes)).flatten().map(|block| block.address)
}

// SAFETY: a block is the system's, in `layout` of what was asked, from `alloc` to `dealloc`; while it is kept nobody else has it.
unsafe impl GlobalAlloc for Keeping {
    unsafe fn alloc(&self, asked: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        take(asked).unwrap_or_else(|| unsafe { System.alloc(layout(asked)) })
    }

    unsafe fn alloc_zeroed(&self, asked: Layout) -> *mut u8 {
        match take(asked) {
            Some(address) => {
                // SAFETY: the block has at least as many bytes.
                unsafe { address.write_bytes(0, asked.size()) };
                address
            }
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc_zeroed(layout(asked)) },
        }
    }

    unsafe fn dealloc(&self, address: *mut u8, given: Layout) {
        let kept = class(given).and_then(|bytes| SHELF.visit(|kept| kept.put(Block { address, bytes })));
        if kept.is_none() {
            // SAFETY: the caller's promise; the system has it in that layout.
            unsafe { System.dealloc(address, layout(given)) };
        }
    }

    unsafe fn realloc(&self, address: *mut u8, given: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises a size that fits a layout.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, given.align()) };
        let (from, to) = (layout(given), layout(wanted));
        if from == to {
            return address;
        }
        // What grows step by step and is freed at its full size would be kept, and never asked for.
        let block = match take(wanted) {
            Some(block) => block,
            // SAFETY: the caller's promise; the system has the block in `from`, and has it in `to` afterwards.
            None if from.align() == to.align() => return unsafe { System.realloc(address, from, to.size()) },
            // SAFETY: the caller's promise.
            None => unsafe { System.alloc(to) },
        };
        if !block.is_null() {
            // SAFETY: both blocks have that many bytes; the old one is the caller's to give back.
            unsafe {
                address.copy_to_nonoverlapping(block, given.size().min(size));
                self.dealloc(address, given);
            }
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The shelf is one for the process: one test.
    #[test]
    fn what_is_freed_is_given_again_within_bounds() {
        let of = |bytes| Layout::from_size_align(bytes, 4).unwrap();
        // SAFETY: each block is written within its size and freed in its layout, once.
        unsafe {
            let first = Keeping.alloc(of(1 << 20));
            first.write_bytes(7, 1 << 20);
            Keeping.dealloc(first, of(1 << 20));
            let again = Keeping.alloc_zeroed(of((1 << 20) - 100));
            assert_eq!(again, first, "of nearly one size");
            assert!((0..(1 << 20) - 100).all(|i| *again.add(i) == 0));
            let grown = Keeping.realloc(again, of((1 << 20) - 100), 5 << 20);
            assert_eq!(*grown.add((1 << 20) - 101), 0);
            let kept = Keeping.alloc(of(6 << 20));
            Keeping.dealloc(kept, of(6 << 20));
            let grown = Keeping.realloc(grown, of(5 << 20), 6 << 20);
            assert_eq!((grown, *grown.add((1 << 20) - 101)), (kept, 0), "what grows takes what was kept");
            let shrunk = Keeping.realloc(grown, of(6 << 20), 1000);
            assert!((0..1000).all(|i| *shrunk.add(i) == 0));
            shrunk.write_bytes(3, 1000);
            let large = Keeping.realloc(shrunk, of(1000), MOST + 1);
            let shrunk = Keeping.realloc(large, of(MOST + 1), 1 << 20);
            let small = Keeping.realloc(shrunk, of(1 << 20), 1000);
            assert!((0..1000).all(|i| *small.add(i) == 3));
            Keeping.dealloc(small, of(1000));
            // The system resizes a block in the alignment that it knows.
            let aligned: Vec<_> = [SMALLEST, MOST, MOST + 1, 1 << 40].map(|bytes| layout(of(bytes)).align()).into();
            assert!(aligned.iter().all(|align| *align == ALIGNMENT) && layout(of(1000)) == of(1000));
            let (small, aligned) = (of(1000), Layout::from_size_align(1 << 20, 4096).unwrap());
            for layout in [small, aligned, of(MOST + 1)] {
                let block = Keeping.alloc(layout);
                assert!(!block.is_null() && (block as usize).is_multiple_of(layout.align()));
                Keeping.dealloc(block, layout);
            }
            let many: Vec<_> = (0..2 * BLOCKS).map(|i| of(SMALLEST + i * (64 << 10))).collect();
            let blocks: Vec<_> = many.iter().map(|layout| (Keeping.alloc(*layout), *layout)).collect();
            for (block, layout) in blocks {
                Keeping.dealloc(block, layout);
                let within = SHELF.visit(|kept| kept.count <= BLOCKS && kept.bytes <= MOST);
                assert!(within.unwrap());
            }
            let kept = SHELF.visit(|kept| (kept.count, kept.bytes)).unwrap();
            assert!(kept.0 > 1 && kept.1 > MOST / 2, "{kept:?}");
        }
    }
}
