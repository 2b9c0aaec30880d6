//! Keys and values as a cache keeps them: laid out as the products read them, so that a step of a decoding packs nothing.

use super::KEYS;
use super::product::Packed;
use crate::kernel;
use crate::simd::Float;

/// How the keys and values of one sequence lie in memory, up to `capacity` of them: head by head, keys transposed in blocks
/// of [`KEYS`] (or of all, where there are fewer), values in rows of whole vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    n_kv_heads: usize,
    head_dim: usize,
    /// Numbers of a value in memory.
    width: usize,
    /// The most keys there is room for.
    pub capacity: usize,
}

impl Slot {
    /// The least capacity; others are this one times a power of two.
    pub const LEAST: usize = 16;

    /// A slot for so many keys or more.
    pub fn new<T: Float>(n_kv_heads: usize, head_dim: usize, keys: usize) -> Self {
        kernel! {
            fn lanes<T>(s: S;) -> usize {
                let _ = s;
                S::LANES
            }
        }
        let width = head_dim.next_multiple_of(lanes::<T>());
        Slot { n_kv_heads, head_dim, width, capacity: 0 }.for_keys(keys)
    }

    /// The same for so many keys or more.
    pub fn for_keys(self, keys: usize) -> Self {
        Slot { capacity: keys.next_power_of_two().max(Self::LEAST), ..self }
    }

    /// Numbers of a key, all heads together.
    pub fn key_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// The memory of slot `number`.
    pub fn of<'a, T>(&self, keys: &'a [T], values: &'a [T], number: usize) -> (&'a [T], &'a [T]) {
        let (k, v) = (self.keys_len(), self.values_len());
        (&keys[number * k..][..k], &values[number * v..][..v])
    }

    /// The same, to be written.
    pub fn of_mut<'a, T>(&self, keys: &'a mut [T], values: &'a mut [T], number: usize) -> (&'a mut [T], &'a mut [T]) {
        let (k, v) = (self.keys_len(), self.values_len());
        (&mut keys[number * k..][..k], &mut values[number * v..][..v])
    }

    /// Numbers of its keys.
    pub fn keys_len(&self) -> usize {
        self.n_kv_heads * self.head_dim * self.capacity
    }

    /// Numbers of its values.
    pub fn values_len(&self) -> usize {
        self.n_kv_heads * self.width * self.capacity
    }

    /// Keys of a block.
    fn block(&self) -> usize {
        KEYS.min(self.capacity)
    }

    /// Where the first number of a key is; the others follow a block apart.
    fn key(&self, head: usize, at: usize) -> usize {
        let block = self.block();
        (head * self.capacity + at / block * block) * self.head_dim + at % block
    }

    fn value(&self, head: usize, at: usize) -> usize {
        (head * self.capacity + at) * self.width
    }

    /// Writes key and value number `at`, heads side by side, into the slot's memory; whether the value is finite.
    pub fn put<T: Float>(&self, keys: &mut [T], values: &mut [T], at: usize, key: &[T], value: &[T]) -> bool {
        let d = self.head_dim;
        for (head, (key, value)) in key.chunks(d).zip(value.chunks(d)).enumerate() {
            let places = keys[self.key(head, at)..].iter_mut().step_by(self.block());
            places.zip(key).for_each(|(place, &x)| *place = x);
            values[self.value(head, at)..][..d].copy_from_slice(value);
        }
        value.iter().all(|x| x.is_finite())
    }

    /// Copies the first `n` keys and values of another slot's memory, which may be smaller or larger, into this one's.
    pub fn copy<T: Float>(&self, to: (&mut [T], &mut [T]), slot: &Slot, from: (&[T], &[T]), n: usize) {
        let (mine, theirs) = (self.block(), slot.block());
        for head in 0..self.n_kv_heads {
            for first in (0..n).step_by(mine.min(theirs)) {
                let keys = mine.min(theirs).min(n - first);
                let to = to.0[self.key(head, first)..].chunks_mut(mine);
                let from = from.0[slot.key(head, first)..].chunks(theirs);
                to.zip(from).take(self.head_dim).for_each(|(to, from)| to[..keys].copy_from_slice(&from[..keys]));
            }
            let numbers = n * self.width;
            to.1[self.value(head, 0)..][..numbers].copy_from_slice(&from.1[slot.value(head, 0)..][..numbers]);
        }
    }
}

/// The slots of a cache.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a, T> {
    /// Keys, slot by slot.
    pub keys: &'a [T],
    /// Values, slot by slot.
    pub values: &'a [T],
    /// How a slot is laid out.
    pub slot: Slot,
    /// No value is infinite or NaN.
    pub finite: bool,
}

impl<'a, T: Float> Cache<'a, T> {
    /// Transposed keys, and values, of `n` keys of a slot from `first` on, which begins a block.
    pub(super) fn block(&self, slot: usize, head: usize, first: usize, n: usize) -> (Packed<'a, T>, Packed<'a, T>) {
        let Slot { head_dim, width, .. } = self.slot;
        let (keys, values) = self.slot.of(self.keys, self.values, slot);
        (
            Packed::new(&keys[self.slot.key(head, first)..], head_dim, n, self.slot.block(), true),
            Packed::new(&values[self.slot.value(head, first)..], n, head_dim, width, self.finite),
        )
    }

    /// Whether there are so many slots, for heads of these sizes.
    pub fn has(&self, slots: usize, n_kv_heads: usize, head_dim: usize) -> bool {
        let Slot { n_kv_heads: heads, head_dim: dim, .. } = self.slot;
        let fits = |numbers: &[T], len: usize| slots.checked_mul(len).is_some_and(|len| len <= numbers.len());
        (heads, dim) == (n_kv_heads, head_dim)
            && fits(self.keys, self.slot.keys_len())
            && fits(self.values, self.slot.values_len())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Heads, Inputs, Masks, Operand, Sequence, attention_forward};
    use super::*;
    use crate::kernels::testing::normal;

    /// What a query makes of the first `n` keys of a slot.
    fn read(slot: Slot, (keys, values): (&[f32], &[f32]), n: usize) -> Vec<u32> {
        let heads = Heads { n_heads: 2, n_kv_heads: 2, head_dim: 5, scale: 0.4 };
        let (q, mut y) = (normal::<f32>(10, 1), [f32::NAN; 10]);
        let nothing = Operand { data: &[][..], stride: 0 };
        let cache = Some(Cache { keys, values, slot, finite: true });
        let sequences = &[Sequence { query: 0, queries: 1, key: 0, keys: n, shift: 0 }];
        let masks = Masks { causal: false, keep: None, bias: None, dropout: None };
        let q = Operand { data: &q, stride: 10 };
        attention_forward(&mut y, None, &Inputs { heads, q, k: nothing, v: nothing, cache, sequences, masks }).unwrap();
        y.iter().map(|y| y.to_bits()).collect()
    }

    #[test]
    fn a_copy_reads_as_the_original_whatever_the_capacities() {
        let rows = normal::<f32>(300 * 10, 2);
        let room = |slot: Slot| (vec![f32::NAN; slot.keys_len()], vec![f32::NAN; slot.values_len()]);
        for n in [1, 15, 16, 17, 33, 127, 128, 130, 300] {
            let slots = [n, 2 * n, 600].map(|keys| Slot::new::<f32>(2, 5, keys));
            let mut first = room(slots[0]);
            for (at, row) in rows.chunks(10).take(n).enumerate() {
                assert!(slots[0].put(&mut first.0, &mut first.1, at, row, row));
            }
            let expected = read(slots[0], (&first.0, &first.1), n);
            for slot in slots {
                let mut copy = room(slot);
                slot.copy((&mut copy.0, &mut copy.1), &slots[0], (&first.0, &first.1), n);
                assert_eq!(read(slot, (&copy.0, &copy.1), n), expected, "{n} keys in {}", slot.capacity);
                let mut back = room(slots[0]);
                slots[0].copy((&mut back.0, &mut back.1), &slot, (&copy.0, &copy.1), n);
                assert_eq!(read(slots[0], (&back.0, &back.1), n), expected);
            }
        }
    }
}
