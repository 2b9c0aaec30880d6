//! Parameters by name in one flat arena.

use crate::error::Result;
use crate::kernels::gemm::{Mat, PackedRhs};
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
    /// Its elements in the arena.
    pub range: Range<usize>,
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
            self.params.push(Entry { name: self.full(name), shape: shape.to_vec(), range: start..end, init: *init });
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
}

/// Weights in the order in which products of few rows read them, by where they begin and how long they are.
type Packed<T> = HashMap<(usize, usize), Arc<PackedRhs<T>>>;

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
        Ok(Params { layout, data, stats, trainable, version: 0, packed: Mutex::default() })
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
        })
    }

    /// Names, shapes and ranges.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The values of a parameter.
    pub fn get(&self, id: ParamId) -> &[T] {
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

    /// The values change.
    fn touch(&mut self) {
        self.version += 1;
        self.packed.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Overwrites a parameter.
    pub fn set(&mut self, id: ParamId, values: &[T]) -> Result<()> {
        let entry = self.layout.entry(id);
        ensure!(
            values.len() == entry.range.len(),
            Shape,
            "parameter `{}`: expected {} values for shape {:?}, got {}",
            entry.name,
            entry.range.len(),
            entry.shape,
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
