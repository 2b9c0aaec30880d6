//! The largest logits of each row, without the others.

use super::linear::{check, refuse_gradients};
use crate::ensure;
use crate::error::Result;
use crate::kernels::Beta;
use crate::kernels::gemm::{Mat, MatMut, NoEpilogue, gemm_serial};
use crate::kernels::top_k::Entry;
use crate::profile::{self, Work};
use crate::simd::{Float, zeros};
use crate::tape::{ParamId, Params, Tape, Var};
use crate::threads::for_each;
use std::cmp::Ordering;

/// So many outputs in question are multiplied one by one, or so large a share of all, if that is more: beyond it all together take no
/// longer.
const MOST: usize = 32;
const SHARE: usize = 64;

/// The `k` largest outputs of x Wᵀ + b in each row, but for those that are `forbidden` there: ids and the values of [`super::linear`],
/// bit for bit, largest first, the lower id first among equals. `None` for a row where only all outputs together can tell.
///
/// W is read in int8 first, which leaves a few outputs in question ([`Shortlist`](crate::kernels::int8::Shortlist)); of these alone its
/// own numbers are multiplied.
pub fn likeliest<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weight: ParamId,
    bias: Option<ParamId>,
    k: usize,
    forbidden: &[&[(u32, T)]],
) -> Result<Vec<Option<Vec<Entry<T>>>>> {
    let (rows, d) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    let o = check(params, d, &[weight], bias.as_slice())?[0];
    refuse_gradients(tape, params, "likeliest")?;
    ensure!(
        forbidden.len() == rows,
        Shape,
        "likeliest: {} lists of forbidden outputs for {rows} rows",
        forbidden.len()
    );
    let Some(shortlist) = params.shortlist(weight, bias)? else { return Ok(vec![None; rows]) };
    let bias = bias.map(|id| params.get(id));
    let _timed = profile::forward("likeliest", [d, o], || Work::product::<i8>(rows, d, o));
    let mut y = tape.pool.tensor(rows, o)?;
    let x = tape.value(x)?;
    shortlist.product(&mut y, x, bias)?;
    let mut found = vec![None; rows];
    let items = x.chunks(d.max(1)).zip(y.chunks_mut(o)).zip(forbidden).zip(&mut found);
    for_each(items, |(((x, y), forbidden), found)| {
        let ids = shortlist.likely(x, y, k, MOST.max(o / SHARE), forbidden);
        // Where there is no memory for a few of them, the product of all will say so.
        *found = ids.and_then(|ids| outputs(params, x, weight, bias, &ids).ok()).map(|mut entries| {
            // Stable; +0 and −0 are equal.
            entries.sort_by(|a, b| b.value.partial_cmp(&a.value).unwrap_or(Ordering::Equal));
            entries.truncate(k);
            entries
        });
    })?;
    tape.pool.recycle(y);
    Ok(found)
}

/// Some of the outputs of x Wᵀ + b for a row x.
fn outputs<T: Float>(
    params: &Params<T>,
    x: &[T],
    weight: ParamId,
    bias: Option<&[T]>,
    ids: &[u32],
) -> Result<Vec<Entry<T>>> {
    let d = x.len();
    let (mut w, mut y) = (zeros(ids.len() * d)?, zeros(ids.len())?);
    for (row, &id) in w.chunks_mut(d.max(1)).zip(ids) {
        params.row(weight, id as usize, row);
    }
    let (c, a, b) = (MatMut::new(&mut y, 1, ids.len())?, Mat::new(x, 1, d)?, Mat::new(&w, ids.len(), d)?.t());
    gemm_serial(c, a, b, Beta::Assign, &NoEpilogue)?;
    let of = |(&id, y)| Entry { id, value: bias.map_or(y, |bias| y + bias[id as usize]) };
    Ok(ids.iter().zip(y).map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::super::{linear, testing};
    use super::*;
    use crate::kernels::int8::is_fast;
    use crate::kernels::top_k::{Finite, top_k};
    use crate::tape::{Builder, Init, Pool, SHORTLIST_FROM, Stored, Tensor};
    use crate::threads::with_local_limit;
    use std::sync::Arc;

    const D: usize = 32;
    const O: usize = SHORTLIST_FROM / D;

    /// A table and a weight of a linear map, as large as they must be, and a bias.
    fn params() -> (Params<f32>, [ParamId; 3]) {
        let mut b = Builder::new();
        let ids = [
            b.param("table", &[O, D], Init::Normal { std: 1.0 }),
            b.param("weight", &[O, D], Init::Xavier),
            b.param("bias", &[O], Init::Normal { std: 0.3 }),
        ];
        (Params::init(Arc::new(b.finish()), 5).unwrap(), ids)
    }

    type Found = Vec<Option<Vec<Entry<f32>>>>;

    fn find(params: &Params<f32>, x: &[f32], weight: ParamId, bias: Option<ParamId>, k: usize) -> Result<Found> {
        let mut tape = Tape::evaluation(Pool::default());
        let rows = x.len() / D;
        let x = tape.constant(Tensor::from_slice(rows, D, x)?);
        likeliest(&mut tape, params, x, weight, bias, k, &[&[(3, f32::NEG_INFINITY)][..]; 9][..rows])
    }

    #[test]
    fn they_are_those_of_the_whole_product_bit_for_bit() {
        let (f32s, [table, weight, bias]) = params();
        let bf16s = f32s.convert(f32s.layout().stored_in(Stored::Bf16, &[])).unwrap();
        let x = testing::normal::<f32>(9, D, 1);
        for params in [&f32s, &bf16s] {
            for (weight, bias) in [(table, None), (table, Some(bias)), (weight, Some(bias))] {
                let mut tape = Tape::evaluation(Pool::default());
                let of = tape.constant(Tensor::from_slice(9, D, &x).unwrap());
                let y = linear(&mut tape, params, of, &[weight], bias.as_slice()).unwrap();
                for k in [1, 3] {
                    let found = find(params, &x, weight, bias, k).unwrap();
                    for (found, y) in found.iter().zip(tape.value(y).unwrap().chunks(O)) {
                        let mut best = vec![Entry::NONE; k];
                        top_k::<f32, Finite<f32>>(&mut best, y, &[(3, f32::NEG_INFINITY)]);
                        assert_eq!(found.as_ref(), Some(&best).filter(|_| is_fast()));
                    }
                    for threads in [1, 3] {
                        assert_eq!(with_local_limit(threads, || find(params, &x, weight, bias, k)).unwrap(), found);
                    }
                }
            }
        }
    }

    #[test]
    fn equals_come_by_id_and_what_it_cannot_tell_is_left_open() {
        let (mut params, [table, weight, bias]) = params();
        let mut w = params.get(table).to_vec();
        let mut x = testing::normal::<f32>(3, D, 1).to_vec();
        // The row most like x, twice.
        for at in [700, 9] {
            w[at * D..][..D].copy_from_slice(&x[..D].iter().map(|x| 9.0 * x).collect::<Vec<_>>());
        }
        params.set(table, &w).unwrap();
        x[D] = f32::NAN;
        x[2 * D..].fill(0.0);
        let found = find(&params, &x, table, None, 2).unwrap();
        if !is_fast() {
            assert_eq!(found, [None, None, None]);
            return;
        }
        assert_eq!(found[0].as_ref().unwrap().iter().map(|entry| entry.id).collect::<Vec<_>>(), [9, 700]);
        assert!(found[1].is_none() && found[2].is_none());
        // It follows the values.
        w[700 * D] += 1.0;
        params.set(table, &w).unwrap();
        assert_eq!(
            find(&params, &x, table, None, 1).unwrap()[0].as_ref().unwrap()[0].id,
            if x[0] > 0.0 { 700 } else { 9 }
        );
        let int8 = params.convert(params.layout().stored_in(Stored::Int8, &[])).unwrap();
        assert_eq!(find(&int8, &x[..D], weight, None, 1).unwrap(), [None]);
        params.set(bias, &vec![f32::NEG_INFINITY; O]).unwrap();
        assert!(find(&params, &x[..D], table, None, 1).unwrap()[0].is_some());
        assert_eq!(find(&params, &x[..D], table, Some(bias), 1).unwrap(), [None]);
    }

    #[test]
    fn it_is_no_part_of_training_and_checks_shapes() {
        let (params, [table, _, bias]) = params();
        let x = testing::normal::<f32>(1, D, 1);
        let error = find(&params, &testing::normal::<f32>(1, 2 * D, 1), bias, None, 1).unwrap_err();
        assert!(error.to_string().contains("`weight`"), "{error}");
        let mut tape = Tape::recording(Pool::default());
        let x = tape.constant(x);
        let error = likeliest(&mut tape, &params, x, table, None, 1, &[&[]]).unwrap_err();
        assert!(error.to_string().contains("likeliest"), "{error}");
    }
}
