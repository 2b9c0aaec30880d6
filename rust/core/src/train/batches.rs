//! Batches of about the same number of tokens.

use crate::bail;
use crate::error::Result;
use crate::rng::Key;

/// Pairs are sorted by length inside random pools of this many batches: large enough for batches of one length, small
/// enough that every epoch mixes the pairs anew.
const POOL_BATCHES: usize = 64;

/// Cuts pairs into batches of at most `max_tokens` real tokens, source plus target: every index once, in an order that
/// is a pure function of the arguments. Batches are full but for the last, and hold pairs of about the same length.
pub fn batches(
    src_lengths: &[usize],
    tgt_lengths: &[usize],
    max_tokens: usize,
    seed: u64,
    epoch: u64,
) -> Result<Vec<Vec<usize>>> {
    if src_lengths.len() != tgt_lengths.len() {
        bail!(Shape, "batches: got {} source and {} target lengths", src_lengths.len(), tgt_lengths.len());
    }
    let tokens = |i: usize| src_lengths[i].saturating_add(tgt_lengths[i]);
    if let Some(i) = (0..src_lengths.len()).find(|&i| tokens(i) > max_tokens) {
        bail!(
            Shape,
            "batches: pair {i} has {} source and {} target tokens, more than max_tokens={max_tokens}; \
             raise max_tokens or leave the pair out",
            src_lengths[i],
            tgt_lengths[i]
        );
    }
    let key = Key::new(seed).fold_name("batches").fold(epoch);
    let order = key.fold(0).permutation(src_lengths.len());

    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut batch = Vec::new();
    let mut room = max_tokens;
    for (number, mut pool) in pools(&order, tokens, max_tokens.max(1).saturating_mul(POOL_BATCHES)).enumerate() {
        pool.sort_by_key(|&i| (tgt_lengths[i], src_lengths[i]));
        // Every second pool runs downwards, so that a batch across two pools holds one length, too.
        if number % 2 == 1 {
            pool.reverse();
        }
        for i in pool {
            if tokens(i) > room {
                batches.push(std::mem::take(&mut batch));
                room = max_tokens;
            }
            room -= tokens(i);
            batch.push(i);
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    let shuffled = key.fold(1).permutation(batches.len());
    Ok(shuffled.into_iter().map(|b| std::mem::take(&mut batches[b])).collect())
}

/// Cuts `order` where `size` tokens, at least one, are reached.
fn pools(order: &[usize], tokens: impl Fn(usize) -> usize, size: usize) -> impl Iterator<Item = Vec<usize>> {
    let mut rest = order.iter().copied().peekable();
    std::iter::from_fn(move || {
        rest.peek()?;
        let mut held = 0usize;
        let mut pool = Vec::new();
        while held < size
            && let Some(i) = rest.next()
        {
            held = held.saturating_add(tokens(i));
            pool.push(i);
        }
        Some(pool)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(n: usize, name: &str, longest: u64) -> Vec<usize> {
        (0..n as u64).map(|i| 1 + Key::new(3).fold_name(name).below(i, longest) as usize).collect()
    }

    #[test]
    fn every_pair_comes_once_and_batches_are_full_and_alike() {
        let (src, tgt) = (lengths(20_000, "src", 30), lengths(20_000, "tgt", 25));
        let tokens = |batch: &[usize]| batch.iter().map(|&i| src[i] + tgt[i]).sum::<usize>();
        for max_tokens in [55, 300, 4096] {
            let batches = batches(&src, &tgt, max_tokens, 1, 0).unwrap();
            let mut all: Vec<usize> = batches.iter().flatten().copied().collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..20_000));
            assert!(batches.iter().all(|b| !b.is_empty() && tokens(b) <= max_tokens));
            // All but the last made leave less room than the longest pair needs.
            assert!(batches.iter().filter(|b| tokens(b) + 55 <= max_tokens).count() <= 1);
        }
        let batches = batches(&src, &tgt, 4096, 1, 0).unwrap();
        let spread = |b: &Vec<usize>| {
            let lengths = b.iter().map(|&i| tgt[i]);
            lengths.clone().max().unwrap() - lengths.min().unwrap()
        };
        assert!(batches.iter().filter(|b| spread(b) > 3).count() <= batches.len() / 20);
        // Batches come in no order of length.
        let longer = batches.windows(2).filter(|w| tgt[w[0][0]] < tgt[w[1][0]]).count();
        assert!((batches.len() / 3..batches.len() * 2 / 3).contains(&longer));
    }

    #[test]
    fn seed_and_epoch_decide_the_order() {
        let (src, tgt) = (lengths(500, "src", 9), lengths(500, "tgt", 9));
        let cut = |seed, epoch| batches(&src, &tgt, 100, seed, epoch).unwrap();
        assert_eq!(cut(1, 0), cut(1, 0));
        assert_ne!(cut(1, 0), cut(1, 1));
        assert_ne!(cut(1, 0), cut(2, 0));
    }

    #[test]
    fn what_cannot_be_cut_is_an_error_that_names_the_pair() {
        let error = batches(&[2, 9, 9], &[3, 2, 9], 10, 0, 0).unwrap_err().to_string();
        assert!(error.contains("pair 1 has 9 source and 2 target tokens"), "{error}");
        assert!(batches(&[1, 2], &[1], 10, 0, 0).is_err());
        assert!(batches(&[usize::MAX], &[usize::MAX], usize::MAX - 1, 0, 0).is_err());
        assert!(batches(&[], &[], 0, 0, 0).unwrap().is_empty());
        assert_eq!(batches(&[0, 0], &[0, 0], 0, 0, 0).unwrap().concat().len(), 2);
        assert_eq!(batches(&[5], &[5], 10, 0, 0).unwrap(), [[0]]);
    }
}
