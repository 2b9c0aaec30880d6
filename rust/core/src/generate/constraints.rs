//! What may follow a hypothesis, and at which logits.

use super::options::{GenerateOptions, Plan};
use crate::models::TransformerConfig;
use std::borrow::Cow;

/// What may follow.
#[derive(Debug, PartialEq)]
pub(super) enum Next<'a> {
    /// One token, whatever the model says.
    Only(u32),
    /// All tokens at their logits, but for these: (id, logit), ids going up; −∞ forbids.
    All(Cow<'a, [(u32, f32)]>),
}

impl Next<'_> {
    /// What is read instead of some logits.
    pub fn edits(&self) -> &[(u32, f32)] {
        match self {
            Next::Only(_) => &[],
            Next::All(edits) => edits,
        }
    }
}

/// The options that change or forbid.
#[derive(Debug)]
pub(super) struct Constraints {
    /// BOS, PAD and what is suppressed: edits of every row.
    never: Vec<(u32, f32)>,
    eos: u32,
    options: GenerateOptions,
}

impl Constraints {
    pub fn new(options: &GenerateOptions, config: &TransformerConfig) -> Self {
        let ids = options.suppress.iter().copied().chain([config.bos_id]).chain(config.pad_id);
        let mut never: Vec<_> = ids.map(|id| (id, f32::NEG_INFINITY)).collect();
        merge(&mut never);
        Constraints { never, eos: config.eos_id, options: options.clone() }
    }

    /// The token that must stand at a place, if one must.
    pub fn forced(&self, plan: &Plan, place: usize) -> Option<u32> {
        plan.prefix.get(place).or_else(|| self.options.forced.get(&place)).copied()
    }

    /// Whether [`Constraints::next`] looks at the ids so far.
    pub fn reads_ids(&self) -> bool {
        self.options.repetition_penalty != 1.0 || self.options.no_repeat_ngram.is_some()
    }

    /// Whether a logit that is not forbidden may become another one.
    pub fn changes(&self) -> bool {
        self.options.repetition_penalty != 1.0
    }

    /// Whether a logit may become larger than the model's.
    pub fn raises(&self) -> bool {
        self.options.repetition_penalty < 1.0
    }

    /// What may follow the ids of a hypothesis; `len` is their number, `logits` are the model's or a processor's.
    pub fn next(&self, plan: &Plan, len: usize, ids: &[u32], logits: &[f32]) -> Next<'_> {
        if let Some(id) = self.forced(plan, len) {
            return Next::Only(id);
        }
        let mut edits = Cow::Borrowed(&self.never[..]);
        if len < plan.min_len {
            edits.to_mut().push((self.eos, f32::NEG_INFINITY));
        }
        let penalty = self.options.repetition_penalty as f32;
        if penalty != 1.0 {
            edits.to_mut().extend(ids.iter().map(|&id| {
                let logit = logits[id as usize];
                (id, if logit > 0.0 { logit / penalty } else { logit * penalty })
            }));
        }
        if let Some(n) = self.options.no_repeat_ngram {
            edits.to_mut().extend(repeats(ids, n).map(|id| (id, f32::NEG_INFINITY)));
        }
        if let Cow::Owned(edits) = &mut edits {
            merge(edits);
        }
        Next::All(edits)
    }
}

/// Sorts by id; the lowest value of an id counts.
fn merge(edits: &mut Vec<(u32, f32)>) {
    edits.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    edits.dedup_by_key(|&mut (id, _)| id);
}

/// Tokens that would complete a sequence of n ids that is there already.
fn repeats(ids: &[u32], n: usize) -> impl Iterator<Item = u32> {
    let last = &ids[(ids.len() + 1).saturating_sub(n).min(ids.len())..];
    ids.windows(n).filter(move |window| window[..n - 1] == *last).map(move |window| window[n - 1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Key;

    const NEVER: f32 = f32::NEG_INFINITY;

    fn plan(min_len: usize, prefix: &[u32]) -> Plan {
        Plan { source: 0, ids: 3, max_len: 9, min_len, prefix: prefix.to_vec(), key: Key::new(0) }
    }

    fn edits(options: GenerateOptions, plan: &Plan, ids: &[u32]) -> Vec<(u32, f32)> {
        let logits = [0.0, 0.0, 0.0, 4.0, -4.0, 8.0, 0.0, 0.0];
        match Constraints::new(&options, &TransformerConfig::new(9, 8)).next(plan, ids.len(), ids, &logits) {
            Next::Only(id) => vec![(id, f32::NAN)],
            Next::All(edits) => edits.into_owned(),
        }
    }

    #[test]
    fn each_option_changes_its_own_tokens() {
        let d = GenerateOptions::default();
        assert_eq!(edits(d.clone(), &plan(0, &[]), &[3]), [(0, NEVER), (1, NEVER)]);
        assert_eq!(edits(d.clone(), &plan(2, &[]), &[3]), [(0, NEVER), (1, NEVER), (2, NEVER)]);
        assert_eq!(edits(d.clone(), &plan(2, &[]), &[3, 3]).len(), 2);
        let suppress = GenerateOptions { suppress: vec![7, 1, 7], ..d.clone() };
        assert_eq!(edits(suppress, &plan(0, &[]), &[]), [(0, NEVER), (1, NEVER), (7, NEVER)]);
        let penalty = GenerateOptions { repetition_penalty: 2.0, suppress: vec![5], ..d.clone() };
        let expected = [(0, NEVER), (1, NEVER), (3, 2.0), (4, -8.0), (5, NEVER)];
        assert_eq!(edits(penalty, &plan(0, &[]), &[4, 3, 5, 4]), expected);
        let places = GenerateOptions { forced: [(0, 7), (1, 6), (3, 2)].into(), suppress: vec![6], ..d };
        let only = |ids: &[u32]| match Constraints::new(&places, &TransformerConfig::new(9, 8)).next(
            &plan(9, &[5]),
            ids.len(),
            ids,
            &[0.0; 8],
        ) {
            Next::Only(id) => Some(id),
            Next::All(_) => None,
        };
        // The prefix first, then forced tokens, even suppressed ones and an early EOS.
        assert_eq!([&[][..], &[5], &[5, 6], &[5, 6, 3]].map(only), [Some(5), Some(6), None, Some(2)]);
    }

    #[test]
    fn what_would_repeat_is_found() {
        let found = |ids: &[u32], n| repeats(ids, n).collect::<Vec<_>>();
        assert_eq!(found(&[3, 4, 3], 1), [3, 4, 3]);
        assert_eq!(found(&[3, 4, 5, 3, 6, 3], 2), [4, 6]);
        assert_eq!(found(&[3, 4, 5, 3, 4], 3), [5]);
        assert_eq!(found(&[3, 3, 3], 3), [3]);
        for (ids, n) in [(&[][..], 1), (&[3], 2), (&[3, 4], 3), (&[3, 4, 5], 2), (&[], 3)] {
            assert!(found(ids, n).is_empty(), "{ids:?} {n}");
        }
    }
}
