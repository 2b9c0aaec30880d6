//! How attention is cut into tasks. No bit depends on it.

use super::{Inputs, KEYS, QUERIES};
use crate::error::Result;
use crate::kernels::gemm::stash;
use crate::simd::{Float, MAX_LANES};
use crate::threads;
use std::cmp::Reverse;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Queries that share packed keys and values in the forward pass, at most.
const CHUNK: usize = 576;
/// Multiply-adds of a task that is worth handing out.
const GRAIN: usize = 1 << 18;
/// As many times longer are tasks of items of one sequence.
const TOGETHER: usize = 4;
/// Multiply-adds of a task where there are less than `GRAIN` for each thread, as in the step of a decoding.
const LEAST: usize = 1 << 15;
/// Pairs that take as long as an item without any: the step of a decoding has items of one query.
const ITEM: usize = 128;
/// Multiply-adds per product of a task that is long enough: some 15 ms of the five products of the backward pass.
pub(super) const LONG: usize = 1 << 27;
/// Items per thread aimed at, so that all have work to the end.
const ITEMS: usize = 4;

/// A part of one sequence: some queries against some blocks of keys, for heads that share their keys.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub sequence: usize,
    pub heads: Range<usize>,
    pub queries: Range<usize>,
    pub blocks: Range<usize>,
}

impl Item {
    /// Pairs of a query and a key that it may see, times heads.
    pub fn pairs<T>(&self, inputs: &Inputs<'_, T>) -> usize {
        let sequence = &inputs.sequences[self.sequence];
        let end = (self.blocks.end * KEYS).min(sequence.keys);
        let keys = (self.blocks.start * KEYS).min(end)..end;
        self.heads.len() * inputs.masks.pairs(sequence, self.queries.clone(), keys)
    }
}

impl<T: Float> Inputs<'_, T> {
    /// Query heads that share a key/value head.
    fn groups(&self) -> impl Iterator<Item = Range<usize>> + use<T> {
        let group = self.heads.group();
        (0..self.heads.n_kv_heads).map(move |g| g * group..(g + 1) * group)
    }

    /// The blocks of the first `keys` keys.
    fn blocks(&self, keys: usize) -> Range<usize> {
        0..keys.div_ceil(KEYS)
    }

    /// One item per sequence, group of heads and chunk of queries, which meets every key it may see.
    pub(super) fn by_queries(&self) -> Vec<Item> {
        let count =
            |chunk| self.sequences.iter().map(|s| s.queries.div_ceil(chunk)).sum::<usize>() * self.heads.n_kv_heads;
        let (group, items) = (self.heads.group(), ITEMS * threads::num_threads());
        let keys = self.sequences.iter().map(|s| s.keys).max().unwrap_or(0);
        let mut chunk = CHUNK;
        while chunk > QUERIES
            && (group * chunk > CHUNK || group * chunk * keys * self.heads.head_dim > 2 * LONG || count(chunk) < items)
        {
            chunk = (chunk / 2).next_multiple_of(QUERIES);
        }
        let mut items = Vec::with_capacity(count(chunk));
        for (sequence, s) in self.sequences.iter().enumerate() {
            for heads in self.groups() {
                for first in (0..s.queries).step_by(chunk) {
                    let queries = first..s.queries.min(first + chunk);
                    let blocks = self.blocks(self.masks.visible(s, queries.end - 1));
                    items.push(Item { sequence, heads: heads.clone(), queries, blocks });
                }
            }
        }
        items
    }

    /// One item per sequence and group of heads: all queries against all keys.
    pub(super) fn by_heads(&self) -> Vec<Item> {
        let mut items = Vec::with_capacity(self.sequences.len() * self.heads.n_kv_heads);
        for (sequence, s) in self.sequences.iter().enumerate() {
            items.extend(self.groups().map(|heads| Item {
                sequence,
                heads,
                queries: 0..s.queries,
                blocks: self.blocks(s.keys),
            }));
        }
        items
    }

    /// One item per sequence, group of heads and block of keys, which meets every query that may see it.
    pub(super) fn by_keys(&self) -> Vec<Item> {
        let split = |item: Item| item.blocks.clone().map(move |b| Item { blocks: b..b + 1, ..item.clone() });
        self.by_heads().into_iter().flat_map(split).collect()
    }

    /// Runs `work` on every item, and tells it the next one of the task, with `scratch` numbers of its own; small items share a
    /// task.
    pub(super) fn run(
        &self,
        items: Vec<Item>,
        scratch: usize,
        work: impl Fn(&Item, Option<&Item>, &mut [T]) + Sync,
    ) -> Result<()> {
        // Every task's scratch begins on a cache line, like that of the first.
        let scratch = scratch.next_multiple_of(MAX_LANES);
        let of_pairs = |multiply_adds: usize| multiply_adds / self.heads.head_dim.max(1);
        let threads = threads::num_threads();
        let mut items: Vec<_> = items.into_iter().map(|item| (ITEM + item.pairs(self), item)).collect();
        let all: usize = items.iter().map(|(weight, _)| weight).sum();
        let grain = of_pairs(GRAIN).max(1);
        // As many short tasks for each thread. Heads of a sequence lie beside each other: threads that share its rows wait for each
        // other's cache lines, so they are parted only where a thread would have nothing else.
        let apart = all.div_ceil((all / grain).max(1).next_multiple_of(threads)).max(of_pairs(LEAST));
        let beside = if all < threads * grain { apart } else { TOGETHER * grain };
        // The longest first, if some are: no thread is left with one at the end. Short ones share tasks, which are much alike.
        let long = items.iter().any(|&(weight, _)| weight > beside);
        if long {
            items.sort_by_key(|&(weight, _)| Reverse(weight));
        }
        let mut tasks: Vec<Range<usize>> = Vec::new();
        let (mut filled, mut before) = (0, None);
        for (i, (weight, item)) in items.iter().enumerate() {
            let enough = if before.replace(item.sequence) == Some(item.sequence) { beside } else { apart };
            match tasks.last_mut() {
                Some(task) if filled < enough => task.end = i + 1,
                _ => {
                    tasks.push(i..i + 1);
                    filled = 0;
                }
            }
            filled += weight;
        }
        if long {
            // Every thread's share begins with long ones.
            tasks = (0..threads).flat_map(|first| tasks.iter().skip(first).step_by(threads).cloned()).collect();
        }
        each_task(tasks.len(), scratch, |task, scratch| {
            let items = &items[tasks[task].clone()];
            for (i, (_, item)) in items.iter().enumerate() {
                work(item, items.get(i + 1).map(|(_, next)| next), scratch);
            }
        })
    }
}

/// The parts of a task's scratch.
pub(super) fn split<T, const N: usize>(scratch: &mut [T], lengths: [usize; N]) -> [&mut [T]; N] {
    let mut rest = scratch;
    lengths.map(|n| {
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(n);
        rest = behind;
        part
    })
}

/// Runs `work(0..tasks)`, each with `scratch` numbers of its own.
pub(super) fn each_task<T: Float>(tasks: usize, scratch: usize, work: impl Fn(usize, &mut [T]) + Sync) -> Result<()> {
    stash::with(threads::num_threads().min(tasks) * scratch, |all: &mut [T]| {
        let free = Mutex::new(all.chunks_exact_mut(scratch).collect::<Vec<_>>());
        let free = || free.lock().unwrap_or_else(PoisonError::into_inner);
        threads::parallel(tasks, |task| {
            let mine = free().pop();
            match mine {
                Some(scratch) => {
                    work(task, scratch);
                    free().push(scratch);
                }
                // There is one for each thread, unless the open section has more than `num_threads` says by now.
                None => work(task, &mut vec![T::ZERO; scratch]),
            }
        })
    })
}
