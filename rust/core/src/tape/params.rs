//! Parameters by name in one flat arena.

use crate::error::{Error, Result, Shape};
use crate::kernels::gemm::{Mat, PackedRhs};
use crate::kernels::int8::{Int8Matrix, Int8Rhs};
use crate::rng::Key;
use crate::simd::{Buffer, Float};
use crate::threads::{GRAIN, for_each};
use crate::{bail, ensure};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A parameter: an index into its layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParamId(u32);

impl ParamId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }

    pub(super) fn from_index(i: usize) -> Self {
        ParamId(i as u32)
    }
}

/// A statistic kept beside the parameters (BatchNorm's running mean and variance), never trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StatId(u32);

/// How a parameter starts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    /// All the same value.
    Constant(f64),
    /// Normal with mean 0.
    Normal {
        /// Its standard deviation.
        std: f64,
    },
    /// Uniform in ±√(6 / (fan_in + fan_out)) for an (out, in) matrix (Glorot and Bengio 2010).
    Xavier,
}

/// A named range of an arena.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The checkpoint key.
    pub name: String,
    /// Its shape, row-major; linear weights are (out, in).
    pub shape: Vec<usize>,
    /// Its elements in the arena; none where it is kept in int8.
    pub range: Range<usize>,
    /// Where it is kept in int8: the checkpoint key of its scales, one for each output.
    pub scale: Option<String>,
    init: Init,
}

/// Declares parameters while layers are built. `within` sets the prefix of the names inside it.
#[derive(Debug, Default)]
pub struct Builder {
    prefix: String,
    params: Vec<Entry>,
    stats: Vec<Entry>,
    sites: u32,
}

impl Builder {
    /// An empty declaration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `build` with `name.` in front of every name declared inside.
    pub fn within<R>(&mut self, name: &str, build: impl FnOnce(&mut Self) -> R) -> R {
        let length = self.prefix.len();
        self.prefix.push_str(name);
        self.prefix.push('.');
        let built = build(self);
        self.prefix.truncate(length);
        built
    }

    /// Declares one parameter on its own cache lines.
    pub fn param(&mut self, name: &str, shape: &[usize], init: Init) -> ParamId {
        self.group(&[(name, shape, init)])[0]
    }

    /// Declares parameters stored without gaps, so that one GEMM can read them as one matrix.
    pub fn group(&mut self, members: &[(&str, &[usize], Init)]) -> Vec<ParamId> {
        let first = self.params.len() as u32;
        let mut start = self.params.last().map_or(0, |e| e.range.end.next_multiple_of(16));
        for (name, shape, init) in members {
            let end = start + shape.iter().product::<usize>();
            let (name, shape) = (self.full(name), shape.to_vec());
            self.params.push(Entry { name, shape, range: start..end, scale: None, init: *init });
            start = end;
        }
        (first..self.params.len() as u32).map(ParamId).collect()
    }

    /// Declares a statistic.
    pub fn stat(&mut self, name: &str, len: usize, start: f64) -> StatId {
        let begin = self.stats.last().map_or(0, |e| e.range.end);
        self.stats.push(Entry {
            name: self.full(name),
            shape: vec![len],
            range: begin..begin + len,
            scale: None,
            init: Init::Constant(start),
        });
        StatId(self.stats.len() as u32 - 1)
    }

    /// The whole name. A layer that stands alone has an empty name: `.weight` is `weight`.
    fn full(&self, name: &str) -> String {
        format!("{}{name}", self.prefix).trim_start_matches('.').to_string()
    }

    /// A number for one place where dropout acts.
    pub fn site(&mut self) -> u32 {
        self.sites += 1;
        self.sites
    }

    /// Ends the declaration.
    pub fn finish(self) -> Layout {
        let by_name = self.params.iter().enumerate().map(|(i, e)| (e.name.clone(), ParamId(i as u32))).collect();
        Layout { params: self.params, stats: self.stats, by_name }
    }
}

/// Names, shapes and ranges of all parameters and statistics of a model.
#[derive(Debug)]
pub struct Layout {
    params: Vec<Entry>,
    stats: Vec<Entry>,
    by_name: HashMap<String, ParamId>,
}

impl Layout {
    /// Every parameter in the order of declaration.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = ParamId> + use<> {
        (0..self.params.len() as u32).map(ParamId)
    }

    /// Every statistic in the order of declaration.
    pub fn stat_ids(&self) -> impl ExactSizeIterator<Item = StatId> + use<> {
        (0..self.stats.len() as u32).map(StatId)
    }

    /// Name, shape and range of a parameter.
    pub fn entry(&self, id: ParamId) -> &Entry {
        &self.params[id.0 as usize]
    }

    /// Name, shape and range of a statistic.
    pub fn stat_entry(&self, id: StatId) -> &Entry {
        &self.stats[id.0 as usize]
    }

    /// The parameter of a name.
    pub fn find(&self, name: &str) -> Option<ParamId> {
        self.by_name.get(name).copied()
    }

    /// The same parameters with the matrices of linear maps in int8, all but some. They have no elements in the arena;
    /// groups stay without gaps.
    pub fn in_int8(&self, except: &[ParamId]) -> Layout {
        let (mut params, mut old_end, mut end) = (Vec::with_capacity(self.params.len()), 0, 0usize);
        for (id, entry) in self.ids().zip(&self.params) {
            let start = if entry.range.start == old_end { end } else { end.next_multiple_of(16) };
            old_end = entry.range.end;
            let kept = entry.init != Init::Xavier || except.contains(&id);
            end = start + if kept { entry.range.len() } else { 0 };
            let scale = (!kept).then(|| format!("{}_scale", entry.name));
            params.push(Entry { range: start..end, scale, ..entry.clone() });
        }
        Layout { params, stats: self.stats.clone(), by_name: self.by_name.clone() }
    }

    fn len(&self) -> usize {
        self.params.last().map_or(0, |e| e.range.end)
    }

    fn stats_len(&self) -> usize {
        self.stats.last().map_or(0, |e| e.range.end)
    }
}

/// The numbers: one flat arena of parameters, one of statistics, and which parameters train.
#[derive(Debug)]
pub struct Params<T> {
    layout: Arc<Layout>,
    data: Buffer<T>,
    stats: Buffer<T>,
    trainable: Vec<bool>,
    version: u64,
    packed: Mutex<Packed<T>>,
    /// Weights of linear maps that are kept in int8.
    int8: HashMap<ParamId, Int8Matrix>,
    packed_int8: Mutex<PackedInt8>,
}

/// Weights in the order in which products of few rows read them, by where they begin and how long they are.
type Packed<T> = HashMap<(usize, usize), Arc<PackedRhs<T>>>;

/// Weights in int8, one or a group, by the first of them and their number.
type PackedInt8 = HashMap<(ParamId, usize), Arc<Int8Rhs>>;

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
        let (packed, packed_int8) = Default::default();
        let mut int8 = HashMap::new();
        for id in layout.ids().filter(|&id| layout.entry(id).scale.is_some()) {
            let shape = &layout.entry(id).shape;
            int8.insert(id, Int8Matrix::zeros(shape[0], shape[1])?);
        }
        Ok(Params { layout, data, stats, trainable, version: 0, packed, int8, packed_int8 })
    }

    /// The same parameters in another precision, for gradient checks.
    pub fn cast<U: Float>(&self) -> Result<Params<U>> {
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
            packed: Mutex::default(),
            int8: self.int8.clone(),
            packed_int8: Mutex::default(),
        })
    }

    /// Names, shapes and ranges.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The values of a parameter that is not kept in int8.
    pub fn get(&self, id: ParamId) -> &[T] {
        debug_assert!(!self.int8.contains_key(&id), "this weight is kept in int8");
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
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (start, weight.len());
        if let Some(found) = packed.get(&key) {
            return Ok(found.clone());
        }
        let new = Arc::new(PackedRhs::new(Mat::new(weight, rows, cols)?.t())?);
        packed.insert(key, new.clone());
        Ok(new)
    }

    /// The same values in a layout of [`Layout::in_int8`]: those weights to the nearest of 255 numbers of each output.
    pub fn quantize(&self, layout: Arc<Layout>) -> Result<Self> {
        ensure!(!self.is_int8(), Unsupported, "quantize: the weights are in int8 already; quantize the f32 model");
        let mut new = Self::zeros(layout)?;
        new.stats.copy_from_slice(&self.stats);
        for id in self.layout.ids() {
            let (entry, values) = (self.layout.entry(id), self.get(id));
            if let Some(w) = new.int8.get_mut(&id) {
                *w = Int8Matrix::quantize(values, entry.shape[0], entry.shape[1]).map_err(|error| match error {
                    Error::NonFinite(_) => Error::NonFinite(format!(
                        "quantize: parameter `{}` has numbers that are not finite; load weights that are",
                        entry.name
                    )),
                    other => other,
                })?;
            } else {
                new.data[new.layout.entry(id).range.clone()].copy_from_slice(values);
            }
        }
        Ok(new)
    }

    /// Whether weights are kept in int8. Such parameters are not trained.
    pub fn is_int8(&self) -> bool {
        !self.int8.is_empty()
    }

    /// A weight that is kept in int8.
    pub fn int8(&self, id: ParamId) -> Option<&Int8Matrix> {
        self.int8.get(&id)
    }

    /// A weight that is kept in int8, for somebody who is about to change it.
    pub fn int8_mut(&mut self, id: ParamId) -> Option<&mut Int8Matrix> {
        self.touch();
        self.int8.get_mut(&id)
    }

    /// A weight, or a group of them, packed for products in int8, where it is kept so.
    pub fn packed_int8(&self, ids: &[ParamId]) -> Result<Option<Arc<Int8Rhs>>> {
        let Some(first) = ids.first().filter(|first| self.int8.contains_key(first)) else { return Ok(None) };
        let mut packed = self.packed_int8.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (*first, ids.len());
        if let Some(found) = packed.get(&key) {
            return Ok(Some(found.clone()));
        }
        let weights: Option<Vec<_>> = ids.iter().map(|id| self.int8.get(id)).collect();
        let Some(weights) = weights else { bail!(Internal, "a group of weights is kept in int8 in part") };
        let new = Arc::new(Int8Rhs::new(&weights)?);
        packed.insert(key, new.clone());
        Ok(Some(new))
    }

    /// The values change.
    fn touch(&mut self) {
        self.version += 1;
        self.packed_int8.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        self.packed.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Overwrites a parameter.
    pub fn set(&mut self, id: ParamId, values: &[T]) -> Result<()> {
        let entry = self.layout.entry(id);
        if self.int8.contains_key(&id) {
            bail!(
                Unsupported,
                "parameter `{}`: it is kept in int8; set it in the f32 model and quantize that",
                entry.name
            );
        }
        ensure!(
            values.len() == entry.range.len(),
            Shape,
            "parameter `{}`: expected {} values for shape {}, got {}",
            entry.name,
            entry.range.len(),
            Shape(&entry.shape),
            values.len()
        );
        self.data[entry.range.clone()].copy_from_slice(values);
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
        self.trainable[id.0 as usize]
    }

    /// Freezes a parameter or sets it free. Gradients made before no longer fit.
    pub fn set_trainable(&mut self, id: ParamId, trainable: bool) {
        self.trainable[id.0 as usize] = trainable;
    }
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
    fn in_int8_matrices_leave_the_arena_and_groups_stay_together() {
        let mut params = Params::<f32>::init(two_linears(), 3).unwrap();
        let find = |name| params.layout().find(name).unwrap();
        let (a, b, q, k) = (find("a.weight"), find("b.weight"), find("b.q"), find("b.k"));
        let layout = Arc::new(params.layout().in_int8(&[a]));
        let mut int8 = params.quantize(layout.clone()).unwrap();
        assert!(int8.is_int8() && !params.is_int8() && int8.int8(a).is_none());
        assert_eq!(layout.entry(b).scale.as_deref(), Some("b.weight_scale"));
        assert!(layout.entry(b).range.is_empty() && layout.entry(b).shape == [3, 5]);
        assert_eq!((int8.get(a), int8.group(&[q, k])), (params.get(a), params.group(&[q, k])));
        assert_eq!(int8.int8(b), Some(&Int8Matrix::quantize(params.get(b), 3, 5).unwrap()));
        assert!(matches!(int8.set(b, &[0.0; 15]), Err(Error::Unsupported(_))));
        assert!(matches!(int8.quantize(layout.clone()), Err(Error::Unsupported(_))));
        let before = int8.packed_int8(&[b]).unwrap().unwrap();
        assert!(Arc::ptr_eq(&before, &int8.packed_int8(&[b]).unwrap().unwrap()));
        assert!(int8.packed_int8(&[a]).unwrap().is_none());
        int8.int8_mut(b).unwrap().values.fill(1);
        assert!(!Arc::ptr_eq(&before, &int8.packed_int8(&[b]).unwrap().unwrap()));
        params.set(b, &[f32::INFINITY; 15]).unwrap();
        let error = params.quantize(layout).unwrap_err();
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
