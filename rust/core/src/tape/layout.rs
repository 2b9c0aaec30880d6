//! Which parameters a model has: their names, shapes, beginnings, and where they lie in the arena.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

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

/// What the matrices of a model are kept in; its vectors are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// As they are trained.
    F32,
    /// All of them rounded to bf16; products widen them and are those of f32.
    Bf16,
    /// All of them but those that a model leaves out in int8, with a scale for each row.
    Int8,
}

impl Stored {
    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Stored::F32 => "f32",
            Stored::Bf16 => "bf16",
            Stored::Int8 => "int8",
        }
    }

    /// What users call so.
    pub fn of_name(name: &str) -> Option<Self> {
        [Stored::F32, Stored::Bf16, Stored::Int8].into_iter().find(|stored| stored.name() == name)
    }
}

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

/// More elements than any machine has memory for: where ranges end that would wrap around.
const TOO_MANY: usize = 1 << 60;

/// A named range of an arena.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The checkpoint key.
    pub name: String,
    /// Its shape, row-major; linear weights are (out, in).
    pub shape: Vec<usize>,
    /// What it is kept in.
    pub stored: Stored,
    /// Its elements in the arena; none where it is kept in another form.
    pub range: Range<usize>,
    /// Where it is kept in int8: the checkpoint key of its scales, one for each row.
    pub scale: Option<String>,
    pub(super) init: Init,
}

impl Entry {
    /// Whether it is a matrix whose rows are looked up; the others are multiplied with, and start so.
    pub(super) fn is_table(&self) -> bool {
        self.init != Init::Xavier
    }
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
            let elements = shape.iter().fold(1usize, |n, &size| n.saturating_mul(size));
            let end = start.saturating_add(elements).min(TOO_MANY); // the arena refuses so many
            let (name, shape) = (self.full(name), shape.to_vec());
            let (stored, range) = (Stored::F32, start..end);
            self.params.push(Entry { name, shape, stored, range, scale: None, init: *init });
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
            stored: Stored::F32,
            range: begin..begin.saturating_add(len).min(TOO_MANY),
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
        Layout { params: self.params, stats: self.stats, by_name, stored: Stored::F32 }
    }
}

/// Names, shapes and ranges of all parameters and statistics of a model.
#[derive(Debug)]
pub struct Layout {
    pub(super) params: Vec<Entry>,
    pub(super) stats: Vec<Entry>,
    by_name: HashMap<String, ParamId>,
    stored: Stored,
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

    /// The same parameters, as a model declares them in f32, with its matrices in another form, in int8 all but `except`. They
    /// have no elements in the arena; groups stay without gaps.
    pub fn stored_in(self: &Arc<Self>, stored: Stored, except: &[ParamId]) -> Arc<Layout> {
        let except = match stored {
            Stored::F32 => return self.clone(),
            Stored::Bf16 => &[],
            Stored::Int8 => except,
        };
        let (mut params, mut old_end, mut end) = (Vec::with_capacity(self.params.len()), 0, 0usize);
        for (id, entry) in self.ids().zip(&self.params) {
            let start = if entry.range.start == old_end { end } else { end.next_multiple_of(16) };
            old_end = entry.range.end;
            let own = if entry.shape.len() == 2 && !except.contains(&id) { stored } else { Stored::F32 };
            end = start + if own == Stored::F32 { entry.range.len() } else { 0 };
            let scale = (own == Stored::Int8).then(|| format!("{}_scale", entry.name));
            params.push(Entry { stored: own, range: start..end, scale, ..entry.clone() });
        }
        Arc::new(Layout { params, stats: self.stats.clone(), by_name: self.by_name.clone(), stored })
    }

    /// What matrices are kept in.
    pub fn stored(&self) -> Stored {
        self.stored
    }

    /// Elements of the arena.
    pub(super) fn len(&self) -> usize {
        self.params.last().map_or(0, |e| e.range.end)
    }

    /// Elements of all statistics.
    pub(super) fn stats_len(&self) -> usize {
        self.stats.last().map_or(0, |e| e.range.end)
    }
}
