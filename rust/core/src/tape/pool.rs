//! Buffers that wait to be used again.

use super::Tensor;
use crate::error::Result;
use crate::simd::{Buffer, Float};
use std::cmp::Reverse;

/// Buffers that wait to be used again: after the first step of a shape, a step allocates nothing large.
///
/// They are parts of blocks. Values come from the beginning, first come, first placed; gradients of parameters, which last
/// to the end of a step, from the end of what was used so far: in the backward pass they grow into the place that values leave,
/// and what is free stays in one piece between them. Small buffers have blocks of their own, so that they do not stand between
/// large ones.
#[derive(Debug)]
pub struct Pool<T> {
    large: Blocks<T>,
    small: Blocks<T>,
}

/// The most numbers of a small matrix.
const SMALL: usize = 1 << 16;
/// Large buffers have whole pages of f32, small ones whole cache lines, and both a line more: equal places in two of them are
/// not equal places in a page.
const PAGE: usize = 1 << 10;
const LINE: usize = 16;

/// How memory is cut into blocks, in bytes at least and at most, unless more is asked for at once, and how many numbers a part
/// may have too much.
#[derive(Debug, Clone, Copy)]
struct Cut {
    shortest: usize,
    longest: usize,
    spare: usize,
}

const LARGE_CUT: Cut = Cut { shortest: 32 << 20, longest: 512 << 20, spare: SMALL };
const SMALL_CUT: Cut = Cut { shortest: 256 << 10, longest: 8 << 20, spare: 4 * LINE };

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Pool { large: Blocks::new(LARGE_CUT), small: Blocks::new(SMALL_CUT) }
    }
}

impl<T: Float> Pool<T> {
    /// A matrix whose contents are unspecified: whoever asks writes every element.
    pub fn tensor(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let buffer = match rows * cols {
            n if n <= SMALL => self.small.first(n.next_multiple_of(LINE) + LINE)?,
            n => self.large.first(n.next_multiple_of(PAGE) + LINE)?,
        };
        Ok(Tensor { buffer, rows, cols })
    }

    /// The same for one that lasts longer than others that are asked for meanwhile.
    pub fn lasting(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let n = rows * cols;
        if n > SMALL
            && let Some(buffer) = self.large.last(n.next_multiple_of(PAGE) + LINE)
        {
            return Ok(Tensor { buffer, rows, cols });
        }
        self.tensor(rows, cols)
    }

    /// A matrix of zeros.
    pub fn zeros(&mut self, rows: usize, cols: usize) -> Result<Tensor<T>> {
        let mut tensor = self.tensor(rows, cols)?;
        tensor.fill(T::ZERO);
        Ok(tensor)
    }

    /// Takes a matrix back.
    pub fn recycle(&mut self, tensor: Tensor<T>) {
        let buffer = tensor.buffer;
        // A small one has some lines more than its matrix, a large one is a page longer at least.
        if buffer.len() < SMALL + PAGE { self.small.put(buffer) } else { self.large.put(buffer) }
    }

    /// Frees memory until at most so many bytes wait: whole blocks, the largest first, then all small buffers.
    pub fn shrink(&mut self, most: usize) {
        let excess = self.bytes().saturating_sub(most).div_ceil(size_of::<T>());
        if excess > 0 && self.large.free(excess) < excess {
            *self = Pool::default();
        }
    }

    /// Bytes that wait in the pool, without the end of blocks that was never used.
    pub fn bytes(&self) -> usize {
        (self.large.used() + self.small.used()) * size_of::<T>()
    }
}

/// Memory from the system, in the order in which it came; the largest first after `free`.
#[derive(Debug)]
struct Blocks<T> {
    blocks: Vec<Block<T>>,
    cut: Cut,
    /// Numbers of all blocks.
    held: usize,
}

impl<T> Blocks<T> {
    fn new(cut: Cut) -> Self {
        Blocks { blocks: Vec::new(), cut, held: 0 }
    }

    /// The last place in use that suffices.
    fn last(&mut self, len: usize) -> Option<Buffer<T>> {
        self.blocks.iter_mut().rev().find_map(|block| block.last(len, self.cut.spare))
    }

    /// Takes a part back.
    fn put(&mut self, mut buffer: Buffer<T>) {
        match self.blocks.iter_mut().find(|block| block.fresh.is_beside(&buffer)) {
            Some(block) => block.put(buffer),
            // From elsewhere.
            None => self.blocks.push(Block { fresh: buffer.split_off(buffer.len()), holes: vec![buffer] }),
        }
    }

    /// Frees whole blocks, the largest first, until they had so many numbers; how many they had.
    fn free(&mut self, excess: usize) -> usize {
        let mut freed = 0;
        self.blocks.sort_by_key(|block| Reverse(block.used()));
        self.blocks.retain(|block| {
            let goes = freed < excess && block.is_whole();
            if goes {
                freed += block.used();
                self.held = self.held.saturating_sub(block.used() + block.fresh.len());
            }
            !goes
        });
        freed
    }

    /// Numbers that wait.
    fn used(&self) -> usize {
        self.blocks.iter().map(Block::used).sum()
    }
}

impl<T: Float> Blocks<T> {
    /// The first place that suffices.
    fn first(&mut self, len: usize) -> Result<Buffer<T>> {
        let Cut { shortest, longest, spare } = self.cut;
        if let Some(buffer) = self.blocks.iter_mut().find_map(|block| block.first(len, spare)) {
            return Ok(buffer);
        }
        // A block is twice as long as all before it, so that there are few; its pages come when they are first used. Where the
        // system does not promise so many, one that suffices.
        let [shortest, longest] = [shortest, longest].map(|bytes| bytes / size_of::<T>());
        let wanted = len.max((2 * self.held).clamp(shortest, longest));
        let fresh = Buffer::zeroed(wanted).or_else(|_| Buffer::zeroed(len))?;
        self.held += fresh.len();
        let mut block = Block { fresh, holes: Vec::new() };
        let buffer = block.start(len);
        self.blocks.push(block);
        Ok(buffer)
    }
}

/// Memory from the system, of which parts are out.
#[derive(Debug)]
struct Block<T> {
    /// What waits, in the order of addresses; no two are neighbours.
    holes: Vec<Buffer<T>>,
    /// What was never used, at the end.
    fresh: Buffer<T>,
}

impl<T> Block<T> {
    /// So many numbers from the first hole that has them, or from the end of what was used on.
    fn first(&mut self, len: usize, spare: usize) -> Option<Buffer<T>> {
        if let Some(at) = self.holes.iter().position(|hole| hole.len() >= len) {
            let hole = &mut self.holes[at];
            return Some(if hole.len() - len > spare { take_front(hole, len) } else { self.holes.remove(at) });
        }
        let before = self.holes.last().filter(|hole| hole.touches(&self.fresh)).map_or(0, |hole| hole.len());
        (before + self.fresh.len() >= len).then(|| self.start(len))
    }

    /// The beginning of what was never used, and the hole before it.
    fn start(&mut self, len: usize) -> Buffer<T> {
        match self.holes.pop_if(|hole| hole.touches(&self.fresh)) {
            Some(mut hole) => {
                hole.join(take_front(&mut self.fresh, len - hole.len()));
                hole
            }
            None => take_front(&mut self.fresh, len),
        }
    }

    /// So many numbers from the end of the last hole that has them.
    fn last(&mut self, len: usize, spare: usize) -> Option<Buffer<T>> {
        let at = self.holes.iter().rposition(|hole| hole.len() >= len)?;
        let hole = &mut self.holes[at];
        Some(if hole.len() - len > spare { hole.split_off(hole.len() - len) } else { self.holes.remove(at) })
    }

    /// Takes a part back.
    fn put(&mut self, buffer: Buffer<T>) {
        let at = self.holes.partition_point(|hole| hole.as_ptr() < buffer.as_ptr());
        self.holes.insert(at, buffer);
        for i in [at + 1, at] {
            if i > 0 && i < self.holes.len() && self.holes[i - 1].touches(&self.holes[i]) {
                let next = self.holes.remove(i);
                self.holes[i - 1].join(next);
            }
        }
    }

    /// Numbers that wait.
    fn used(&self) -> usize {
        self.holes.iter().map(|hole| hole.len()).sum()
    }

    /// Whether nothing is out.
    fn is_whole(&self) -> bool {
        self.fresh.parts() == 1 + self.holes.len()
    }
}

/// Cuts off the first `len` numbers.
fn take_front<T>(buffer: &mut Buffer<T>, len: usize) -> Buffer<T> {
    let rest = buffer.split_off(len);
    std::mem::replace(buffer, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Key;

    #[test]
    fn a_recycled_buffer_is_used_again() {
        let mut pool = Pool::<f32>::default();
        let first = pool.tensor(30, 40).unwrap();
        let address = first.as_ptr();
        pool.recycle(first);
        let again = pool.tensor(29, 40).unwrap();
        assert_eq!(again.as_ptr(), address);
        assert_eq!((again.rows(), again.cols(), again.len()), (29, 40, 29 * 40));
        assert_eq!(pool.bytes(), 0);
    }

    /// Numbers of a tensor of which blocks are made to measure.
    const LONG: usize = LARGE_CUT.shortest / size_of::<f32>();

    fn starts(tensors: &[Tensor<f32>]) -> Vec<*const f32> {
        tensors.iter().map(|tensor| tensor.as_ptr()).collect()
    }

    #[test]
    fn a_long_buffer_is_split_and_becomes_whole_again() {
        let mut pool = Pool::<f32>::default();
        let whole = pool.tensor(4, LONG).unwrap();
        let (address, bytes) = (whole.as_ptr(), (4 * LONG + LINE) * size_of::<f32>());
        pool.recycle(whole);
        for order in [[0, 1, 2], [1, 0, 2], [2, 0, 1]] {
            let mut parts: Vec<_> = [LONG, LONG / 2 + 1, LONG].map(|n| Some(pool.tensor(1, n).unwrap())).into();
            let starts: Vec<_> = parts.iter().flatten().map(|part| part.as_ptr()).collect();
            assert!(starts.is_sorted() && starts[0] == address, "one behind the other in the one buffer");
            order.iter().for_each(|&i| pool.recycle(parts[i].take().unwrap()));
            assert_eq!((pool.large.blocks[0].holes.len(), pool.bytes()), (1, bytes), "{order:?}");
        }
        assert_eq!(pool.tensor(4, LONG).unwrap().as_ptr(), address);
    }

    #[test]
    fn gradients_take_the_place_of_values_and_leave_one_hole() {
        let (mut pool, n) = (Pool::<f32>::default(), 2 * SMALL);
        let mut high = std::ptr::null();
        for step in 0..3 {
            let mut values: Vec<_> = (0..8).map(|_| pool.tensor(3, n).unwrap()).collect();
            assert!(starts(&values).is_sorted());
            let mut gradients = Vec::new();
            while let Some(value) = values.pop() {
                let passing = pool.tensor(2, n).unwrap();
                pool.recycle(value);
                gradients.push(pool.lasting(1, n).unwrap());
                pool.recycle(passing);
            }
            let room = pool.tensor(12, n).unwrap();
            let places = starts(&gradients);
            assert!(places.iter().all(|&place| place > room.as_ptr()));
            let end = places.into_iter().max().unwrap();
            assert!(step == 0 || end == high, "nothing new was touched");
            high = end;
            gradients.into_iter().chain([room]).for_each(|tensor| pool.recycle(tensor));
            assert_eq!(pool.large.blocks[0].holes.len(), 1);
        }
    }

    #[test]
    fn blocks_grow_and_the_second_round_finds_what_the_first_left() {
        let (mut pool, n) = (Pool::<f32>::default(), LONG / 4);
        let mut seen = Vec::new();
        for _ in 0..2 {
            let many: Vec<_> = (0..60).map(|_| pool.tensor(1, n).unwrap()).collect();
            many.into_iter().for_each(|tensor| pool.recycle(tensor));
            let one = pool.tensor(9, n).unwrap();
            pool.recycle(one);
            seen.push((pool.large.blocks.len(), pool.bytes(), pool.large.held));
        }
        assert!(seen[0].0 <= 6 && seen[0] == seen[1], "{seen:?}");
    }

    #[test]
    fn a_block_has_its_limit_and_a_refusal_leaves_the_pool_as_it_was() {
        let (mut pool, n) = (Pool::<f32>::default(), 2 * SMALL);
        pool.large.held = usize::MAX / 16;
        pool.large.cut.longest = LARGE_CUT.shortest + 4096; // of the real one a small machine may have too little
        let tensor = pool.tensor(1, n).unwrap();
        assert_eq!(pool.large.blocks[0].fresh.len() + n + LINE, pool.large.cut.longest / size_of::<f32>());
        pool.recycle(tensor);
        // More than there are addresses.
        let error = pool.tensor(1, usize::MAX / 32).unwrap_err();
        assert!(matches!(error, crate::error::Error::OutOfMemory(_)), "{error}");
        assert_eq!((pool.large.blocks.len(), pool.bytes()), (1, (n + LINE) * size_of::<f32>()));
    }

    #[test]
    fn tensors_never_overlap_and_all_parts_find_together_again() {
        let key = Key::new(4);
        let (mut pool, mut out) = (Pool::<f32>::default(), Vec::<(Tensor<f32>, f32)>::new());
        for i in 0..2000 {
            if key.below(4 * i, 100) < 52 {
                let n = 1 << key.below(4 * i + 1, 20);
                let n = n + key.below(4 * i + 2, n as u64) as usize;
                let lasts = key.below(4 * i + 3, 3) == 0;
                let mut tensor = if lasts { pool.lasting(1, n) } else { pool.tensor(1, n) }.unwrap();
                tensor.fill(i as f32);
                out.push((tensor, i as f32));
            } else if !out.is_empty() {
                let (tensor, mark) = out.swap_remove(key.below(4 * i + 1, out.len() as u64) as usize);
                assert!(tensor.iter().all(|&x| x == mark), "tensor {mark} was written to by another");
                pool.recycle(tensor);
            }
            for Block { holes, .. } in pool.large.blocks.iter().chain(&pool.small.blocks) {
                let apart = |a: &Buffer<f32>, b: &Buffer<f32>| a.as_ptr() < b.as_ptr() && !a.touches(b);
                assert!(holes.is_sorted_by(apart));
            }
        }
        out.into_iter().for_each(|(tensor, _)| pool.recycle(tensor));
        assert!(pool.large.blocks.iter().all(|block| block.is_whole() && block.holes.len() == 1), "a part is missing");
    }

    #[test]
    fn a_tensor_from_elsewhere_is_used_too() {
        let (mut one, mut two) = (Pool::<f32>::default(), Pool::<f32>::default());
        let [a, b] = [(); 2].map(|()| one.tensor(1, LONG / 4).unwrap());
        let address = a.as_ptr();
        two.recycle(b);
        two.recycle(a);
        assert_eq!((two.large.blocks.len(), two.large.blocks[0].holes.len()), (1, 1));
        assert_eq!(two.tensor(1, LONG / 2).unwrap().as_ptr(), address);
    }

    #[test]
    fn many_small_buffers_lie_in_blocks_and_stay_apart() {
        let (mut pool, n) = (Pool::<f32>::default(), SMALL);
        let many = |pool: &mut Pool<f32>| {
            (0..4 * SMALL_CUT.longest / size_of::<f32>() / n).map(|_| pool.tensor(1, n).unwrap()).collect::<Vec<_>>()
        };
        let first = many(&mut pool);
        let sorted = |tensors: &[Tensor<f32>]| {
            let mut starts = starts(tensors);
            starts.sort_unstable();
            starts
        };
        let places = sorted(&first);
        let side_by_side = places.windows(2).filter(|pair| pair[0].wrapping_add(n + LINE) == pair[1]).count();
        assert!(side_by_side >= 2 * SMALL_CUT.longest / size_of::<f32>() / n, "only {side_by_side} are neighbours");
        first.into_iter().for_each(|tensor| pool.recycle(tensor));
        assert_eq!(sorted(&many(&mut pool)), places, "the second round finds what the first one left");
    }

    #[test]
    fn a_pool_that_holds_too_much_frees_whole_blocks_first() {
        let mut pool = Pool::<f32>::default();
        let bytes = |n: usize| (n * LONG + LINE) * size_of::<f32>();
        let out = [1, 2, 4].map(|n| pool.tensor(n, LONG).unwrap());
        out.into_iter().for_each(|tensor| pool.recycle(tensor));
        let all = bytes(1) + bytes(2) + bytes(4);
        for (most, left) in [(all, all), (all - 1, all - bytes(4)), (bytes(2), bytes(1)), (0, 0)] {
            pool.shrink(most);
            assert_eq!(pool.bytes(), left, "{most}");
        }
        let part = pool.tensor(4, LONG).unwrap();
        pool.recycle(part);
        let part = pool.tensor(1, LONG).unwrap();
        pool.shrink(0);
        assert_eq!(pool.bytes(), 0, "what is left of a block goes when the block goes");
        pool.recycle(part);
        pool.shrink(0);
        assert_eq!(pool.bytes(), 0);
    }
}
