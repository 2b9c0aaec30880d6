//! The numbers of a model's parameters, in one flat arena.

use super::layout::{Init, Layout, ParamId, StatId, Stored};
use super::made::Made;
use crate::error::{Error, Result, Shape};
use crate::kernels::gemm::{Bf16Rhs, Mat, PackedRhs};
use crate::kernels::int8::{self, Int8Rhs, Shortlist};
use crate::rng::Key;
use crate::simd::{Buffer, Float};
use crate::threads::{GRAIN, for_each};
use crate::{bail, ensure};
use std::collections::HashMap;
use std::sync::Arc;

/// The numbers: one flat arena of parameters, one of statistics, and which parameters train.
#[derive(Debug)]
pub struct Params<T> {
    layout: Arc<Layout>,
    data: Buffer<T>,
    stats: Buffer<T>,
    trainable: Vec<bool>,
    version: u64,
    /// Matrices that are kept in another form than f32.
    compact: HashMap<ParamId, Compact<T>>,
    /// Forgotten when a value changes.
    copies: Copies<T>,
}

/// A matrix in another form than f32: weights of linear maps as products read them, others as tables. A table that is a weight
/// too is packed besides.
#[derive(Clone, Debug)]
enum Compact<T> {
    Bf16(Arc<Bf16Rhs<T>>),
    Int8(Arc<Int8Rhs>),
}

impl<T: Float> Compact<T> {
    /// Whether it is made for looking up rows.
    fn is_table(&self) -> bool {
        match self {
            Compact::Bf16(w) => w.is_table(),
            Compact::Int8(w) => w.is_table(),
        }
    }
}

/// A weight in another form than f32, or each of a group of them, as products read it.
#[derive(Debug)]
pub enum CompactRhs<T> {
    Bf16(Vec<Arc<Bf16Rhs<T>>>),
    Int8(Vec<Arc<Int8Rhs>>),
}

/// Weights as products read them.
#[derive(Debug)]
struct Copies<T> {
    /// In the order in which products of few rows read them, by where they begin and how long they are.
    packed: Made<(usize, usize), Arc<PackedRhs<T>>>,
    /// Of tables that are weights too.
    tables: Made<ParamId, Compact<T>>,
    /// `None` where there is none.
    shortlists: Made<Head, Option<Arc<Shortlist<T>>>>,
}

/// A weight and its bias.
type Head = (ParamId, Option<ParamId>);

impl<T> Default for Copies<T> {
    fn default() -> Self {
        Copies { packed: Made::default(), tables: Made::default(), shortlists: Made::default() }
    }
}

/// The products of a smaller matrix take no longer than a shortlist. (At 2¹⁷ numbers it cost a batch 6 %, at 2¹⁹ it gains 1 to 7 %.)
pub const SHORTLIST_FROM: usize = 1 << 18;

impl<T: Float> Params<T> {
    /// Fresh parameters. Each is drawn by its own name, so that layers never start as copies of one another.
    pub fn init(layout: Arc<Layout>, seed: u64) -> Result<Self> {
        let mut params = Self::zeros(layout)?;
        let Params { layout, data, stats, .. } = &mut params;
        for (arena, entries) in [(data, &layout.params), (stats, &layout.stats)] {
            let mut tasks = Vec::new();
            let (mut rest, mut at) = (&mut arena[..], 0);
            for e in entries {
                let (_, from_here) = std::mem::take(&mut rest).split_at_mut(e.range.start - at);
                let (values, after) = from_here.split_at_mut(e.range.len());
                (rest, at) = (after, e.range.end);
                if e.init != Init::Constant(0.0) {
                    let key = Key::new(seed).fold_name(&e.name);
                    tasks.extend(values.chunks_mut(GRAIN).enumerate().map(|(i, part)| (part, i * GRAIN, e, key)));
                }
            }
            for_each(tasks.into_iter(), |(part, first, e, key)| fill(part, first, &e.shape, e.init, key))?;
        }
        Ok(params)
    }

    /// Parameters of zero, for values that come from elsewhere.
    pub fn zeros(layout: Arc<Layout>) -> Result<Self> {
        let (data, stats) = (Buffer::zeroed(layout.len())?, Buffer::zeroed(layout.stats_len())?);
        let trainable = vec![true; layout.params.len()];
        let mut compact = HashMap::new();
        for id in layout.ids() {
            let entry = layout.entry(id);
            let (shape, is_table) = (&entry.shape, entry.is_table());
            let zeros = match entry.stored {
                Stored::F32 => continue,
                Stored::Bf16 if is_table => Compact::Bf16(Bf16Rhs::table(shape[0], shape[1])?.into()),
                Stored::Bf16 => Compact::Bf16(Bf16Rhs::zeros(shape[0], shape[1])?.into()),
                Stored::Int8 if is_table => Compact::Int8(Int8Rhs::table(shape[0], shape[1])?.into()),
                Stored::Int8 => Compact::Int8(Int8Rhs::zeros(shape[0], shape[1])?.into()),
            };
            compact.insert(id, zeros);
        }
        Ok(Params { layout, data, stats, trainable, version: 0, compact, copies: Copies::default() })
    }

    /// The same parameters as numbers of another type, for gradient checks. Matrices must be f32.
    pub fn cast<U: Float>(&self) -> Result<Params<U>> {
        ensure!(self.compact.is_empty(), Unsupported, "cast: the weights are in {}", self.stored().name());
        let convert = |from: &[T]| -> Result<Buffer<U>> {
            let mut to = Buffer::zeroed(from.len())?;
            to.iter_mut().zip(from).for_each(|(to, from)| *to = U::from_f64(from.to_f64()));
            Ok(to)
        };
        Ok(Params {
            layout: self.layout.clone(),
            data: convert(&self.data)?,
            stats: convert(&self.stats)?,
            trainable: self.trainable.clone(),
            version: self.version,
            compact: HashMap::new(),
            copies: Copies::default(),
        })
    }

    /// Names, shapes and ranges.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The values of a parameter that is kept in f32.
    pub fn get(&self, id: ParamId) -> &[T] {
        debug_assert!(!self.compact.contains_key(&id), "this weight is kept in another form");
        &self.data[self.layout.entry(id).range.clone()]
    }

    /// The values of a group declared together, as one matrix.
    pub fn group(&self, ids: &[ParamId]) -> &[T] {
        let range = |id: ParamId| &self.layout.entry(id).range;
        debug_assert!(ids.windows(2).all(|w| range(w[0]).end == range(w[1]).start), "a group has no gaps");
        match ids {
            [] => &[],
            [first, .., last] => &self.data[range(*first).start..range(*last).end],
            [only] => self.get(*only),
        }
    }

    /// The transpose of a weight, or of a group of them, packed for products with few rows: once for each version of the
    /// values, at the price of a copy.
    pub fn packed(&self, ids: &[ParamId], rows: usize, cols: usize) -> Result<Arc<PackedRhs<T>>> {
        let weight = self.group(ids);
        let start = ids.first().map_or(0, |&id| self.layout.entry(id).range.start);
        let pack = || Ok(Arc::new(PackedRhs::new(Mat::new(weight, rows, cols)?.t())?));
        self.copies.packed.get((start, weight.len()), pack)
    }

    /// The same values in another layout of these parameters: matrices rounded to bf16, to the nearest of 255 numbers of each
    /// output, or widened from bf16. What was rounded is not rounded once more to less.
    pub fn convert(&self, layout: Arc<Layout>) -> Result<Self> {
        match (self.stored(), layout.stored()) {
            (Stored::F32, _) | (Stored::Bf16, Stored::F32 | Stored::Bf16) => {}
            (from, Stored::Int8) => {
                bail!(Unsupported, "quantize: the weights are in {} already; quantize the f32 model", from.name())
            }
            (from, to) => bail!(
                Unsupported,
                "astype: the weights are in {}, which holds less than {}; convert the f32 model",
                from.name(),
                to.name()
            ),
        }
        let mut new = Self::zeros(layout)?;
        new.stats.copy_from_slice(&self.stats);
        for id in self.layout.ids() {
            match (new.compact.get_mut(&id), self.bf16(id)) {
                (Some(Compact::Bf16(w)), None) => own(w)?.set(self.get(id))?,
                (Some(Compact::Bf16(w)), Some(old)) => *w = Arc::new(old.copy()?),
                (None, Some(old)) => old.values(&mut new.data[new.layout.entry(id).range.clone()])?,
                (None, None) => new.data[new.layout.entry(id).range.clone()].copy_from_slice(self.get(id)),
                (Some(Compact::Int8(w)), _) => own(w)?.round(self.get(id)).map_err(|error| match error {
                    Error::NonFinite(_) => Error::NonFinite(format!(
                        "quantize: parameter `{}` has numbers that are not finite; load weights that are",
                        self.layout.entry(id).name
                    )),
                    other => other,
                })?,
            }
        }
        Ok(new)
    }

    /// What matrices are kept in. Only those in f32 are trained.
    pub fn stored(&self) -> Stored {
        self.layout.stored()
    }

    /// A matrix that is kept in bf16.
    pub fn bf16(&self, id: ParamId) -> Option<&Bf16Rhs<T>> {
        match self.compact.get(&id) {
            Some(Compact::Bf16(w)) => Some(&**w),
            _ => None,
        }
    }

    /// A matrix that is kept in int8.
    pub fn int8(&self, id: ParamId) -> Option<&Int8Rhs> {
        match self.compact.get(&id) {
            Some(Compact::Int8(w)) => Some(w),
            _ => None,
        }
    }

    /// The same, for somebody who is about to change it.
    pub fn int8_mut(&mut self, id: ParamId) -> Result<&mut Int8Rhs> {
        self.touch();
        match self.compact.get_mut(&id) {
            Some(Compact::Int8(w)) => own(w),
            _ => bail!(Internal, "a matrix that is not kept in int8"),
        }
    }

    /// A weight, or a group of them, for products, where it is kept in another form than f32. A table is packed once for each
    /// version of the values.
    pub fn compact(&self, ids: &[ParamId]) -> Result<Option<CompactRhs<T>>> {
        let (mut bf16, mut int8) = (Vec::new(), Vec::new());
        for &id in ids {
            match self.packed_compact(id)? {
                Some(Compact::Bf16(w)) => bf16.push(w),
                Some(Compact::Int8(w)) => int8.push(w),
                None => {}
            }
        }
        match (bf16.len(), int8.len()) {
            (0, 0) => Ok(None),
            (n, 0) if n == ids.len() => Ok(Some(CompactRhs::Bf16(bf16))),
            (0, n) if n == ids.len() => Ok(Some(CompactRhs::Int8(int8))),
            _ => bail!(Internal, "a group of weights is kept in several forms"),
        }
    }

    /// A matrix that is kept in another form than f32, for products.
    fn packed_compact(&self, id: ParamId) -> Result<Option<Compact<T>>> {
        let Some(w) = self.compact.get(&id).filter(|w| w.is_table()) else { return Ok(self.compact.get(&id).cloned()) };
        let pack = || {
            Ok(match w {
                Compact::Bf16(w) => Compact::Bf16(w.packed()?.into()),
                Compact::Int8(w) => Compact::Int8(w.packed()?.into()),
            })
        };
        self.copies.tables.get(id, pack).map(Some)
    }

    /// What says which outputs of a weight, and of its bias, may be the largest; `None` where that would be no faster than to compute
    /// all, or says nothing. It is made once for each version of the values.
    pub fn shortlist(&self, id: ParamId, bias: Option<ParamId>) -> Result<Option<Arc<Shortlist<T>>>> {
        let &[outputs, depth] = &self.layout.entry(id).shape[..] else { return Ok(None) };
        if !int8::is_fast() || self.int8(id).is_some() || outputs * depth < SHORTLIST_FROM {
            return Ok(None);
        }
        self.copies.shortlists.get((id, bias), || {
            let numbers = bias.map(|id| self.get(id));
            let shortlist = match self.bf16(id) {
                Some(w) => {
                    let mut values = Buffer::zeroed(outputs * depth)?;
                    w.values(&mut values)?;
                    Shortlist::new(&values, numbers, outputs, depth)?
                }
                None => Shortlist::new(self.get(id), numbers, outputs, depth)?,
            };
            Ok(shortlist.map(Arc::new))
        })
    }

    /// A row of a matrix, whatever it is kept in.
    pub fn row(&self, id: ParamId, row: usize, to: &mut [T]) {
        match self.compact.get(&id) {
            Some(Compact::Bf16(w)) => w.row(row, to),
            Some(Compact::Int8(w)) => w.numbers(row, to),
            None => to.copy_from_slice(&self.get(id)[row * to.len()..][..to.len()]),
        }
    }

    /// The values change.
    fn touch(&mut self) {
        self.version += 1;
        self.copies = Copies::default();
    }

    /// Overwrites a parameter. Where it is kept in bf16, the numbers are such that bf16 holds.
    pub fn set(&mut self, id: ParamId, values: &[T]) -> Result<()> {
        let entry = self.layout.entry(id);
        let len: usize = entry.shape.iter().product();
        ensure!(
            values.len() == len,
            Shape,
            "parameter `{}`: expected {len} values for shape {}, got {}",
            entry.name,
            Shape(&entry.shape),
            values.len()
        );
        match self.compact.get_mut(&id) {
            None => self.data[entry.range.clone()].copy_from_slice(values),
            Some(Compact::Bf16(w)) => {
                check_bf16(&entry.name, values)?;
                own(w)?.set(values)?;
            }
            Some(Compact::Int8(_)) => bail!(
                Unsupported,
                "parameter `{}`: it is kept in int8; set it in the f32 model and quantize that",
                entry.name
            ),
        }
        self.touch();
        Ok(())
    }

    /// A statistic.
    pub fn stat(&self, id: StatId) -> &[T] {
        &self.stats[self.layout.stat_entry(id).range.clone()]
    }

    /// Overwrites a statistic.
    pub fn set_stat(&mut self, id: StatId, values: &[T]) -> Result<()> {
        let entry = self.layout.stat_entry(id);
        if values.len() != entry.range.len() {
            bail!(Shape, "statistic `{}`: expected {} values, got {}", entry.name, entry.range.len(), values.len());
        }
        self.stats[entry.range.clone()].copy_from_slice(values);
        self.version += 1;
        Ok(())
    }

    /// The whole arena, for the optimiser pass; whoever asks is about to change it.
    pub fn arena_mut(&mut self) -> &mut [T] {
        self.touch();
        &mut self.data
    }

    /// Grows with every change of a value.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether a parameter is trained.
    pub fn is_trainable(&self, id: ParamId) -> bool {
        self.trainable[id.index()]
    }

    /// Freezes a parameter or sets it free. Gradients made before no longer fit.
    pub fn set_trainable(&mut self, id: ParamId, trainable: bool) {
        self.trainable[id.index()] = trainable;
    }
}

/// A matrix, for somebody who is about to change it. (None of those who took it for a product is at work now.)
fn own<W>(w: &mut Arc<W>) -> Result<&mut W> {
    match Arc::get_mut(w) {
        Some(w) => Ok(w),
        None => bail!(Internal, "a matrix changes while it is in use"),
    }
}

/// Refuses numbers that bf16 does not hold as they are, for a matrix of this name.
pub(crate) fn check_bf16<T: Float>(name: &str, values: &[T]) -> Result<()> {
    if let Some(x) = Bf16Rhs::foreign(values) {
        bail!(
            Unsupported,
            "`{name}` is kept in bf16 here, which does not hold {x}; load the numbers into the f32 model and convert that"
        );
    }
    Ok(())
}

/// Draws the elements `first..` of a parameter: a value is a function of its number.
fn fill<T: Float>(to: &mut [T], first: usize, shape: &[usize], init: Init, key: Key) {
    let draw: &dyn Fn(u64) -> f64 = match init {
        Init::Constant(c) => &move |_| c,
        Init::Normal { std } => &move |i| std * key.normal(i),
        Init::Xavier => {
            let bound = (6.0 / shape.iter().sum::<usize>() as f64).sqrt();
            &move |i| bound * (2.0 * key.uniform(i) - 1.0)
        }
    };
    to.iter_mut().zip(first as u64..).for_each(|(x, i)| *x = T::from_f64(draw(i)));
}

#[cfg(test)]
mod tests {
    use super::super::layout::Builder;
    use super::*;

    fn two_linears() -> Arc<Layout> {
        let mut b = Builder::new();
        for name in ["a", "b"] {
            b.within(name, |b| {
                b.param("weight", &[3, 5], Init::Xavier);
                b.group(&[("q", &[3], Init::Constant(1.0)), ("k", &[2], Init::Constant(2.0))]);
            });
        }
        Arc::new(b.finish())
    }

    #[test]
    fn parameters_have_names_ranges_and_their_own_start() {
        let params = Params::<f32>::init(two_linears(), 3).unwrap();
        let find = |name| params.layout().find(name).unwrap();
        assert_ne!(params.get(find("a.weight")), params.get(find("b.weight")));
        assert_eq!(params.group(&[find("b.q"), find("b.k")]), [1.0, 1.0, 1.0, 2.0, 2.0]);
        assert!(params.layout().ids().all(|id| id == find("a.k")
            || id == find("b.k")
            || params.layout().entry(id).range.start.is_multiple_of(16)));
        let bound = (6.0f32 / 8.0).sqrt();
        assert!(params.get(find("a.weight")).iter().all(|w| w.abs() <= bound));
    }

    #[test]
    fn more_elements_than_can_be_counted_are_refused() {
        for shapes in [&[[1 << 48, 1 << 16]][..], &[[1 << 32, 1 << 32], [3, 5]], &[[1 << 31, 1 << 31]; 5]] {
            let mut b = Builder::new();
            shapes.iter().enumerate().for_each(|(i, shape)| _ = b.param(&i.to_string(), shape, Init::Xavier));
            let error = Params::<f32>::init(Arc::new(b.finish()), 0).err();
            assert!(matches!(error, Some(Error::OutOfMemory(_))), "{shapes:?}");
        }
    }

    #[test]
    fn in_bf16_all_matrices_leave_the_arena_and_come_back_rounded() {
        let params = Params::<f32>::init(two_linears(), 3).unwrap();
        let find = |name| params.layout().find(name).unwrap();
        let (a, q, k) = (find("a.weight"), find("b.q"), find("b.k"));
        let layout = params.layout().stored_in(Stored::Bf16, &[]);
        let mut bf16 = params.convert(layout.clone()).unwrap();
        assert_eq!((params.stored(), bf16.stored()), (Stored::F32, Stored::Bf16));
        assert_eq!(bf16.group(&[q, k]), params.group(&[q, k]));
        assert_eq!(bf16.data.len(), 16 + 5, "vectors alone are in the arena");
        let widened = bf16.convert(params.layout().clone()).unwrap();
        let rounded: Vec<f32> = params.get(a).iter().map(|&w| half::bf16::from_f32(w).to_f32()).collect();
        assert_eq!(widened.get(a), rounded);
        assert_ne!(widened.get(a), params.get(a));
        let again = bf16.convert(layout).unwrap();
        assert!(again.bf16(a).unwrap().bits(2).eq(bf16.bf16(a).unwrap().bits(2)));
        assert!(matches!(bf16.compact(&[a]), Ok(Some(CompactRhs::Bf16(_)))) && bf16.compact(&[q]).unwrap().is_none());
        assert!(!bf16.bf16(a).unwrap().is_table() && bf16.compact(&[a, q]).is_err());

        let version = bf16.version();
        let error = bf16.set(a, params.get(a)).unwrap_err().to_string();
        assert!(error.contains("`a.weight` is kept in bf16 here, which does not hold"), "{error}");
        assert!(bf16.set(a, &[0.5; 14]).is_err() && bf16.version() == version);
        bf16.set(a, &[0.5; 15]).unwrap();
        assert!(bf16.bf16(a).unwrap().bits(0).eq([0x3f00; 5]) && bf16.version() > version);

        let int8 = params.layout().stored_in(Stored::Int8, &[]);
        let error = bf16.convert(int8.clone()).unwrap_err().to_string();
        assert!(error.contains("in bf16 already; quantize the f32 model"), "{error}");
        let int8 = params.convert(int8).unwrap();
        for layout in [params.layout(), bf16.layout()] {
            let error = int8.convert(layout.clone()).unwrap_err();
            assert!(matches!(&error, Error::Unsupported(text) if text.contains("astype: the weights are in int8")));
        }
        assert!(bf16.cast::<f64>().is_err());
    }

    #[test]
    fn a_table_is_packed_for_products_and_follows_its_values() {
        let mut b = Builder::new();
        let id = b.param("embedding.weight", &[70, 5], Init::Normal { std: 1.0 });
        let params = Params::<f32>::init(Arc::new(b.finish()), 3).unwrap();
        let mut bf16 = params.convert(params.layout().stored_in(Stored::Bf16, &[])).unwrap();
        let packed = |params: &Params<f32>| match params.compact(&[id]) {
            Ok(Some(CompactRhs::Bf16(packed))) => packed[0].clone(),
            other => panic!("{other:?}"),
        };
        let before = packed(&bf16);
        assert!(bf16.bf16(id).unwrap().is_table() && !before.is_table());
        assert!(Arc::ptr_eq(&before, &packed(&bf16)) && before.bits(69).eq(bf16.bf16(id).unwrap().bits(69)));
        bf16.set(id, &[2.0; 350]).unwrap();
        assert!(packed(&bf16).bits(69).eq([0x4000; 5]));

        let mut int8 = params.convert(params.layout().stored_in(Stored::Int8, &[])).unwrap();
        let packed = |params: &Params<f32>| match params.compact(&[id]) {
            Ok(Some(CompactRhs::Int8(packed))) => packed[0].clone(),
            other => panic!("{other:?}"),
        };
        let (table, before) = (int8.int8(id).unwrap(), packed(&int8));
        assert!(table.is_table() && !before.is_table() && Arc::ptr_eq(&before, &packed(&int8)));
        assert!(before.values() == table.values() && before.scales() == table.scales());
        int8.int8_mut(id).unwrap().set(&[2; 350]).unwrap();
        assert_eq!(packed(&int8).values(), [2; 350]);
    }

    #[test]
    fn in_int8_matrices_leave_the_arena_and_groups_stay_together() {
        let mut params = Params::<f32>::init(two_linears(), 3).unwrap();
        let find = |name| params.layout().find(name).unwrap();
        let (a, b, q, k) = (find("a.weight"), find("b.weight"), find("b.q"), find("b.k"));
        let layout = params.layout().stored_in(Stored::Int8, &[a]);
        let mut int8 = params.convert(layout.clone()).unwrap();
        assert_eq!((params.stored(), int8.stored()), (Stored::F32, Stored::Int8));
        assert!(int8.int8(a).is_none());
        assert_eq!(layout.entry(b).scale.as_deref(), Some("b.weight_scale"));
        assert!(layout.entry(b).range.is_empty() && layout.entry(b).shape == [3, 5]);
        assert_eq!((int8.get(a), int8.group(&[q, k])), (params.get(a), params.group(&[q, k])));
        let (kept, expected) = (int8.int8(b).unwrap(), Int8Rhs::quantize(params.get(b), 3, 5).unwrap());
        assert!(kept.values() == expected.values() && kept.scales() == expected.scales());
        assert!(matches!(int8.set(b, &[0.0; 15]), Err(Error::Unsupported(_))));
        assert!(matches!(int8.convert(layout.clone()), Err(Error::Unsupported(_))));
        let Ok(Some(CompactRhs::Int8(taken))) = int8.compact(&[b]) else { panic!("not in int8") };
        assert!(int8.compact(&[a]).unwrap().is_none() && int8.int8_mut(a).is_err());
        assert!(int8.int8_mut(b).is_err(), "a product has it");
        drop(taken);
        int8.int8_mut(b).unwrap().set(&[1; 15]).unwrap();
        assert_eq!(int8.int8(b).unwrap().values(), [1; 15]);
        params.set(b, &[f32::INFINITY; 15]).unwrap();
        let error = params.convert(layout).unwrap_err();
        assert!(matches!(&error, Error::NonFinite(text) if text.contains("`b.weight`")), "{error}");
    }

    #[test]
    fn a_layer_that_stands_alone_needs_no_name() {
        let mut b = Builder::new();
        let weight = b.within("", |b| b.param("weight", &[2], Init::Constant(0.0)));
        let bias = b.param(".bias", &[2], Init::Constant(0.0));
        let layout = b.finish();
        assert_eq!([weight, bias].map(|id| layout.entry(id).name.as_str()), ["weight", "bias"]);
    }

    #[test]
    fn a_value_is_a_function_of_its_number_whatever_the_threads_and_tasks() {
        let mut b = Builder::new();
        b.param("small", &[3], Init::Constant(0.0));
        b.param("large", &[5, GRAIN], Init::Normal { std: 2.0 });
        let layout = Arc::new(b.finish());
        let key = Key::new(7).fold_name("large");
        for n in [1, 3] {
            let params = crate::threads::with_local_limit(n, || Params::<f64>::init(layout.clone(), 7)).unwrap();
            let values = params.get(layout.find("large").unwrap());
            assert!(values.iter().zip(0..).all(|(&x, i)| x == 2.0 * key.normal(i)));
        }
    }

    #[test]
    fn setting_checks_the_length_and_counts_versions() {
        let mut params = Params::<f32>::init(two_linears(), 3).unwrap();
        let id = params.layout().find("a.q").unwrap();
        assert!(params.set(id, &[0.0; 4]).unwrap_err().to_string().contains("`a.q`"));
        let version = params.version();
        params.set(id, &[5.0; 3]).unwrap();
        assert_eq!((params.get(id), params.version()), (&[5.0; 3][..], version + 1));
    }
}
