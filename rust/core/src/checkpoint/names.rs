//! Arrays by name: what a model has, against what is offered.

use crate::bail;
use crate::error::{Error, Result, Shape};
use crate::kernels::gemm::Bf16Rhs;
use crate::kernels::int8::Int8Rhs;
use crate::tape::{ParamId, Params, StatId, Stored, check_bf16};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;

/// A named array in row-major order.
pub type NamedArray<'a> = (&'a str, &'a [usize], &'a [f32]);

/// Another name of a tied matrix, and its canonical one.
pub type Alias<'a> = (&'a str, &'a str);

/// A named array of int8 in row-major order.
pub type NamedBytes<'a> = (&'a str, &'a [usize], &'a [i8]);

/// The numbers of a parameter or statistic, in what they are kept in.
#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    /// Row-major.
    F32(&'a [f32]),
    /// A matrix.
    Bf16(&'a Bf16Rhs<f32>),
    /// A weight of a linear map, without its scales.
    Int8(&'a Int8Rhs),
}

/// A name, a shape and numbers.
pub type Tensor<'a> = (&'a str, &'a [usize], Numbers<'a>);

/// Where an array belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    /// A parameter that is not in int8.
    Param(ParamId),
    Stat(StatId),
    /// A weight in int8.
    Int8(ParamId),
    /// The scales of a weight in int8.
    Scale(ParamId),
}

/// Every parameter and every statistic by its name, in the order of declaration; the scales of a weight in int8 follow it.
pub fn tensors(params: &Params<f32>) -> Vec<Tensor<'_>> {
    let tensor = |(name, shape, place)| Some((name, shape, numbers(params, place)?));
    places(params).into_iter().filter_map(tensor).collect()
}

/// The same, those alone that are kept in f32.
pub fn state_dict(params: &Params<f32>) -> Vec<NamedArray<'_>> {
    let floats = |(name, shape, numbers)| match numbers {
        Numbers::F32(values) => Some((name, shape, values)),
        _ => None,
    };
    tensors(params).into_iter().filter_map(floats).collect()
}

/// What errors call the arrays that do not come from a file.
const ARRAYS: &str = "argument `arrays`";

/// Overwrites every parameter and statistic. All of them must be there, in their shapes, and nothing else; aliases may
/// stand for the canonical name or beside it, then with equal values. All or nothing: after an error nothing changed.
pub fn load_state(params: &mut Params<f32>, arrays: &[NamedArray<'_>], aliases: &[Alias<'_>]) -> Result<()> {
    load_state_int8(params, arrays, &[], aliases)
}

/// [`load_state`] for what [`tensors`] gives, matrices in bf16 widened.
pub fn load_state_int8(
    params: &mut Params<f32>,
    arrays: &[NamedArray<'_>],
    int8: &[NamedBytes<'_>],
    aliases: &[Alias<'_>],
) -> Result<()> {
    for (name, shape, values) in arrays {
        if shape.iter().product::<usize>() != values.len() {
            bail!(Checkpoint, "{ARRAYS}: `{name}`: shape {} with {} values", Shape(shape), values.len());
        }
        if stored_as(params, name, aliases) == Stored::Int8 {
            bail!(
                Unsupported,
                "{ARRAYS}: `{name}` is kept in int8 here and floats came; load them into the f32 model and quantize that"
            );
        }
    }
    for (name, shape, values) in int8 {
        if shape.iter().product::<usize>() != values.len() {
            bail!(Checkpoint, "{ARRAYS}: `{name}`: shape {} with {} values", Shape(shape), values.len());
        }
        check_int8(ARRAYS, name, values)?;
    }
    let floats = arrays.iter().map(|(name, shape, _)| Offer { name, shape, problem: None });
    let bytes = int8.iter().map(|(name, shape, _)| {
        let fits = stored_as(params, name, aliases) == Stored::Int8;
        let problem = (!fits).then(|| "expected floats, got int8".to_string());
        Offer { name, shape, problem }
    });
    let plan = match_places(ARRAYS, params, floats.chain(bytes), aliases)?;
    // The int8 are offered behind the floats.
    let of_int8 = |i: usize| i.checked_sub(arrays.len()).map(|i| &int8[i]);
    let name = |i: usize| of_int8(i).map_or_else(|| arrays[i].0, |(name, ..)| *name);
    let same = |one: usize, other: usize| match (of_int8(one), of_int8(other)) {
        (Some(one), Some(other)) => one.2 == other.2,
        (None, None) => equal(arrays[one].2, arrays[other].2),
        _ => false,
    };
    for (place, first, others) in &plan {
        if let Place::Param(id) = place
            && params.bf16(*id).is_some()
        {
            check_bf16(arrays[*first].0, arrays[*first].2)?;
        }
        if let Some(&other) = others.iter().find(|&&other| !same(*first, other)) {
            return Err(unequal(ARRAYS, name(*first), name(other)));
        }
    }
    for (place, first, _) in plan {
        match of_int8(first) {
            None => set(params, place, arrays[first].2)?,
            Some((.., values)) => set_int8(params, place, values)?,
        }
    }
    Ok(())
}

/// What the array of a name, which may be an alias, is kept in.
pub(crate) fn stored_as(params: &Params<f32>, name: &str, aliases: &[Alias<'_>]) -> Stored {
    let name = aliases.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, canonical)| canonical);
    let layout = params.layout();
    layout.find(name).map_or(Stored::F32, |id| layout.entry(id).stored)
}

/// Refuses a number that quantising never gives: products with it are not exact on every path.
pub(crate) fn check_int8(what: &str, name: &str, values: &[i8]) -> Result<()> {
    if values.contains(&i8::MIN) {
        bail!(Checkpoint, "{what}: `{name}`: expected numbers from -127 to 127, got -128");
    }
    Ok(())
}

/// [`match_names`] for the parameters and statistics of a model.
pub(crate) fn match_places<'a>(
    what: &str,
    params: &Params<f32>,
    offers: impl Iterator<Item = Offer<'a>>,
    aliases: &[Alias<'_>],
) -> Result<Vec<(Place, usize, Vec<usize>)>> {
    let places = places(params);
    let names: Vec<_> = places.iter().map(|(name, shape, _)| (*name, *shape)).collect();
    let plan = match_names(what, &names, offers, aliases)?;
    Ok(plan.into_iter().map(|(i, first, others)| (places[i].2, first, others)).collect())
}

/// Equal bit for bit, so that NaN equals itself.
pub(crate) fn equal(one: &[f32], other: &[f32]) -> bool {
    one.iter().map(|x| x.to_bits()).eq(other.iter().map(|x| x.to_bits()))
}

pub(crate) fn unequal(what: &str, one: &str, other: &str) -> Error {
    Error::Checkpoint(format!(
        "{what}: `{one}` and `{other}` are one matrix here, but their values differ; untie them in the config"
    ))
}

pub(crate) fn set(params: &mut Params<f32>, place: Place, values: &[f32]) -> Result<()> {
    match place {
        Place::Param(id) => params.set(id, values),
        Place::Stat(id) => params.set_stat(id, values),
        Place::Scale(id) => {
            params.int8_mut(id)?.scales_mut().copy_from_slice(values);
            Ok(())
        }
        Place::Int8(_) => bail!(Internal, "floats for a weight in int8"),
    }
}

pub(crate) fn set_int8(params: &mut Params<f32>, place: Place, values: &[i8]) -> Result<()> {
    match place {
        Place::Int8(id) => params.int8_mut(id)?.set(values),
        _ => bail!(Internal, "int8 for an array of floats"),
    }
}

/// The numbers of a place.
fn numbers(params: &Params<f32>, place: Place) -> Option<Numbers<'_>> {
    match place {
        Place::Param(id) => Some(params.bf16(id).map_or_else(|| Numbers::F32(params.get(id)), Numbers::Bf16)),
        Place::Stat(id) => Some(Numbers::F32(params.stat(id))),
        Place::Scale(id) => params.int8(id).map(|w| Numbers::F32(w.scales())),
        Place::Int8(id) => params.int8(id).map(Numbers::Int8),
    }
}

fn places(params: &Params<f32>) -> Vec<(&str, &[usize], Place)> {
    let layout = params.layout();
    let mut places = Vec::new();
    for id in layout.ids() {
        let entry = layout.entry(id);
        match &entry.scale {
            None => places.push((entry.name.as_str(), &entry.shape[..], Place::Param(id))),
            Some(scale) => {
                places.push((entry.name.as_str(), &entry.shape[..], Place::Int8(id)));
                places.push((scale.as_str(), &entry.shape[..1], Place::Scale(id)));
            }
        }
    }
    let stats = layout.stat_ids().map(|id| (layout.stat_entry(id), Place::Stat(id)));
    places.extend(stats.map(|(e, place)| (e.name.as_str(), &e.shape[..], place)));
    places
}

/// An array that is offered: its name, its shape, and what is wrong with it whatever its place.
pub(crate) struct Offer<'a> {
    pub name: &'a str,
    pub shape: &'a [usize],
    pub problem: Option<String>,
}

/// For each place that fits, its number, the number of the offer that fills it, and those of others under its aliases.
/// Everything that is missing, unexpected or misshapen is told in one error.
pub(crate) fn match_names<'a>(
    what: &str,
    places: &[(&str, &[usize])],
    offers: impl Iterator<Item = Offer<'a>>,
    aliases: &[Alias<'_>],
) -> Result<Vec<(usize, usize, Vec<usize>)>> {
    let by_name: HashMap<&str, usize> = places.iter().enumerate().map(|(i, (name, _))| (*name, i)).collect();
    let canonical: HashMap<&str, &str> = aliases.iter().copied().collect();

    let mut found: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut names = HashSet::new();
    let (mut unexpected, mut unfit) = (Vec::new(), Vec::new());
    for (i, offer) in offers.enumerate() {
        if !names.insert(offer.name) {
            unfit.push(format!("`{}`: given twice", offer.name.escape_debug()));
        }
        let name = canonical.get(offer.name).copied().unwrap_or(offer.name);
        let Some(&place) = by_name.get(name) else {
            unexpected.push(format!("`{}`", offer.name.escape_debug()));
            continue;
        };
        // The canonical name goes first, so that an error about unequal values reads well.
        let same = found.entry(place).or_default();
        same.insert(if offer.name == name { 0 } else { same.len() }, i);
        let expected = places[place].1;
        if let Some(problem) = offer.problem {
            unfit.push(format!("`{}`: {problem}", offer.name));
        } else if offer.shape != expected {
            unfit.push(format!("`{}`: expected shape {}, got {}", offer.name, Shape(expected), Shape(offer.shape)));
        }
    }
    let missing: Vec<_> =
        (0..places.len()).filter(|i| !found.contains_key(i)).map(|i| format!("`{}`", places[i].0)).collect();

    let mut text = String::new();
    for (kind, list) in [("missing", missing), ("unexpected", unexpected), ("unfit", unfit)] {
        if !list.is_empty() {
            let comma = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{comma}{} {kind} ({})", list.len(), list.join(", "));
        }
    }
    if !text.is_empty() {
        bail!(Checkpoint, "{what}: the arrays do not fit: {text}; load them into what they were saved from");
    }
    Ok(found.into_iter().map(|(place, mut same)| (place, same.remove(0), same)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::{Builder, Init};
    use std::sync::Arc;

    fn params() -> Params<f32> {
        let mut b = Builder::new();
        b.param("a", &[2, 3], Init::Xavier);
        b.param("b", &[2], Init::Constant(1.0));
        b.stat("norm.running_mean", 2, 0.5);
        Params::init(Arc::new(b.finish()), 1).unwrap()
    }

    #[test]
    fn what_one_model_gives_another_takes() {
        let mut from = params();
        from.set(from.layout().find("b").unwrap(), &[7.0, f32::NAN]).unwrap();
        let state = state_dict(&from);
        assert_eq!(state.iter().map(|(name, ..)| *name).collect::<Vec<_>>(), ["a", "b", "norm.running_mean"]);
        let mut reversed = state.clone();
        reversed.reverse();
        let mut to = params();
        load_state(&mut to, &reversed, &[]).unwrap();
        let bits = |p: &Params<f32>| -> Vec<u32> {
            state_dict(p).iter().flat_map(|(.., values)| values.iter().map(|x| x.to_bits())).collect()
        };
        assert_eq!(bits(&to), bits(&from));
    }

    #[test]
    fn one_error_tells_everything() {
        let mut to = params();
        let before = to.version();
        let error = load_state(&mut to, &[("a", &[3, 2], &[0.0; 6]), ("c\n", &[1], &[0.0]), ("d", &[], &[0.0])], &[])
            .unwrap_err();
        assert!(matches!(error, Error::Checkpoint(_)));
        assert_eq!(
            error.to_string(),
            "argument `arrays`: the arrays do not fit: 2 missing (`b`, `norm.running_mean`), 2 unexpected (`c\\n`, `d`), \
             1 unfit (`a`: expected shape (2, 3), got (3, 2)); load them into what they were saved from"
        );
        assert_eq!(to.version(), before);
        assert!(load_state(&mut to, &[("a", &[2, 3], &[0.0; 5])], &[]).unwrap_err().to_string().contains("`a`"));
    }

    #[test]
    fn aliases_stand_for_a_matrix_or_beside_it_with_equal_values() {
        let with = |more: &[NamedArray<'static>]| -> Vec<NamedArray<'static>> {
            let rest: [NamedArray<'static>; 2] = [("b", &[2], &[0.0, 1.0]), ("norm.running_mean", &[2], &[3.0, 4.0])];
            rest.iter().chain(more).copied().collect()
        };
        let ties = [("head", "a"), ("src", "a")];
        const W: &[f32] = &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        const OTHER: &[f32] = &[1.0, 2.0, 3.0, 4.0, 5.0, -6.0];
        for arrays in
            [with(&[("head", &[2, 3], W)]), with(&[("src", &[2, 3], W), ("head", &[2, 3], W), ("a", &[2, 3], W)])]
        {
            let mut to = params();
            load_state(&mut to, &arrays, &ties).unwrap();
            assert_eq!(to.get(to.layout().find("a").unwrap()), W);
        }
        let mut to = params();
        let before = to.version();
        let error =
            load_state(&mut to, &with(&[("head", &[2, 3], OTHER), ("a", &[2, 3], W)]), &ties).unwrap_err().to_string();
        assert!(error.contains("`a` and `head`"), "{error}");
        assert_eq!(to.version(), before);
        let error =
            load_state(&mut to, &with(&[("head", &[3, 2], W), ("a", &[2, 3], W)]), &ties).unwrap_err().to_string();
        assert!(error.contains("`head`: expected shape"), "{error}");
    }

    #[test]
    fn a_name_given_twice_is_an_error() {
        let mut to = params();
        let twice: [NamedArray; 4] = [
            ("a", &[2, 3], &[0.0; 6]),
            ("a", &[2, 3], &[0.0; 6]),
            ("b", &[2], &[0.0; 2]),
            ("norm.running_mean", &[2], &[0.0; 2]),
        ];
        assert!(load_state(&mut to, &twice, &[]).unwrap_err().to_string().contains("`a`"));
    }
}
