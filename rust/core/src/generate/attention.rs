//! What the tokens of hypotheses attended to.

use super::hypothesis::{CrossAttention, Hypothesis};
use super::{Loaded, on_tape};
use crate::error::Result;
use crate::profile::{self, Work};
use crate::rows::Rows;
use crate::tape::Pool;

/// Gives every hypothesis its attention: by one pass over whole targets for every rank, which has the bits of the steps.
pub(super) fn attend(
    Loaded { layers: model, params }: Loaded<'_>,
    pool: &mut Pool<f32>,
    src: &[u32],
    rows: &Rows,
    found: &mut [Vec<Hypothesis>],
) -> Result<()> {
    let _timed = profile::span("attention weights", [0, 0], || Work::of_parts(rows.total()));
    let ranks = found.iter().map(Vec::len).max().unwrap_or(0);
    on_tape(pool, |tape| {
        let memory = model.encode(tape, params, src, rows)?;
        tape.collect_attention();
        for rank in 0..ranks {
            let tokens = |of: &Vec<Hypothesis>| of.get(rank).map_or(0, |h| h.ids.len() + usize::from(h.finished));
            let read = |of: &Vec<Hypothesis>| {
                let ids = of.get(rank).into_iter().flat_map(|h| h.ids.iter().copied());
                [model.config().bos_id].into_iter().chain(ids).take(tokens(of)).collect::<Vec<_>>()
            };
            let tgt_in: Vec<u32> = found.iter().flat_map(read).collect();
            let tgt_rows = Rows::from_lengths(&found.iter().map(tokens).collect::<Vec<_>>());
            let hidden = model.decode(tape, params, &tgt_in, &tgt_rows, memory, rows)?;
            let hidden = tape.take(hidden)?;
            tape.pool.recycle(hidden);
            // Every layer of the decoder attends to the target first, then to the source.
            let calls = tape.take_attention();
            let layers: Vec<_> = calls.iter().skip(1).step_by(2).collect();
            let mut starts = vec![0; layers.len()];
            for (i, found) in found.iter_mut().enumerate() {
                let mut values = Vec::new();
                let mut shape = [layers.len(), 0, 0, 0];
                for (layer, start) in layers.iter().zip(&mut starts) {
                    let (heads, queries, keys) = layer.shapes[i];
                    let end = *start + heads * queries * keys;
                    values.extend_from_slice(&layer.values[*start..end]);
                    (shape, *start) = ([layers.len(), heads, queries, keys], end);
                }
                if let Some(hypothesis) = found.get_mut(rank) {
                    hypothesis.attention = Some(CrossAttention { values, shape });
                }
            }
        }
        Ok(())
    })
}
