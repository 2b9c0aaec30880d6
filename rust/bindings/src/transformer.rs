//! The Transformer as Python sees it.

use crate::arrays::{State, copy, stored_in, to_array};
use crate::door;
use crate::errors::raise;
use crate::generate;
use crate::model::{Model, Sequences};
use numpy::{PyArray1, PyArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;
use transformer_core::checkpoint;
use transformer_core::models::{self, Batch, TransformerConfig};
use transformer_core::rows::Rows;
use transformer_core::tape::{AttentionWeights, Params};

type Ids<'py> = Bound<'py, PyArray1<i64>>;
type Array<'py> = Bound<'py, PyArrayDyn<f32>>;

/// The model of "Attention Is All You Need", whole.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct Transformer {
    pub model: Arc<Model>,
}

#[pymethods]
impl Transformer {
    #[new]
    fn new(py: Python<'_>, config: &str, seed: u64) -> PyResult<Self> {
        let config = TransformerConfig::from_json(config).map_err(raise)?;
        let model = door::run(py, || {
            let layers = models::Transformer::new(config)?;
            let params = Params::init(layers.layout().clone(), seed)?;
            Ok(Model::new(layers, params))
        })?;
        Ok(Transformer { model })
    }

    /// A model whose weights are zero, kept in a precision, for values that come from elsewhere.
    #[staticmethod]
    fn blank(py: Python<'_>, config: &str, precision: &str) -> PyResult<Self> {
        let (config, stored) = (TransformerConfig::from_json(config).map_err(raise)?, stored_in(precision)?);
        Ok(Transformer { model: door::run(py, || Model::blank(config, stored))? })
    }

    /// The same model with its matrices in another precision.
    fn convert(&self, py: Python<'_>, precision: &str) -> PyResult<Self> {
        let (layers, stored) = (self.model.layers.clone(), stored_in(precision)?);
        let params = door::run(py, || self.model.read(|params| params.convert(layers.layout_in(stored))))?;
        Ok(Transformer { model: Model::new(layers, params) })
    }

    /// What matrices are kept in.
    fn precision(&self, py: Python<'_>) -> PyResult<&'static str> {
        door::run(py, || self.model.read(|params| Ok(params.stored().name())))
    }

    #[staticmethod]
    fn load(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        let (model, _) = door::run(py, || Model::open(&folder))?;
        Ok(Transformer { model })
    }

    fn save(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        let (config, kind) = self.model.about();
        door::run(py, || self.model.read(|params| checkpoint::save_model(&folder, &config, kind, params)))
    }

    fn config(&self) -> String {
        self.model.layers.config().to_json()
    }

    fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let layout = self.model.layers.layout();
        layout.ids().map(|id| layout.entry(id)).map(|entry| (entry.name.clone(), entry.shape.clone())).collect()
    }

    fn aliases(&self) -> Vec<(&'static str, &'static str)> {
        self.model.layers.aliases().to_vec()
    }

    fn version(&self, py: Python<'_>) -> PyResult<u64> {
        door::run(py, || self.model.read(|params| Ok(params.version())))
    }

    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        door::run(py, || self.model.read(State::of))?.give(py)
    }

    fn load_state_dict(&self, py: Python<'_>, arrays: &Bound<'_, PyDict>) -> PyResult<()> {
        let state = State::read(arrays)?;
        door::run(py, || {
            let _alone = self.model.alone()?;
            self.model.write(|params| state.load_into(params, self.model.layers.aliases()))
        })
    }

    /// Logits (R, V) and, if asked for, the attention weights of every call, flat.
    fn forward<'py>(
        &self,
        py: Python<'py>,
        src: &Ids<'py>,
        src_lengths: &Ids<'py>,
        tgt_in: &Ids<'py>,
        tgt_lengths: &Ids<'py>,
        attention: bool,
    ) -> PyResult<(Array<'py>, Vec<Array<'py>>)> {
        let (src, tgt) = (Sequences::read(src, src_lengths)?, Sequences::read(tgt_in, tgt_lengths)?);
        let layers = &self.model.layers;
        let (logits, shape, weights) = door::run(py, || {
            self.model.evaluate(|tape, params| {
                if attention {
                    tape.collect_attention();
                }
                let (src_rows, tgt_rows) = (src.rows(), tgt.rows());
                let memory = layers.encode(tape, params, &src.ids, &src_rows)?;
                let hidden = layers.decode(tape, params, &tgt.ids, &tgt_rows, memory, &src_rows)?;
                let logits = layers.logits(tape, params, hidden)?;
                let logits = tape.value(logits)?;
                let (values, shape) = (copy(logits)?, [logits.rows(), logits.cols()]);
                Ok((values, shape, tape.take_attention()))
            })
        })?;
        let flat = |w: AttentionWeights<f32>| {
            let len = w.values.len();
            to_array(py, w.values, &[len])
        };
        Ok((to_array(py, logits, &shape)?, weights.into_iter().map(flat).collect::<PyResult<_>>()?))
    }

    /// The log-probability of every target token; where `eos` says so, of EOS after it. With `rows`, those of all tokens in
    /// these places too, (R, V).
    fn score<'py>(
        &self,
        py: Python<'py>,
        src: &Ids<'py>,
        src_lengths: &Ids<'py>,
        tgt: &Ids<'py>,
        tgt_lengths: &Ids<'py>,
        eos: Vec<bool>,
        rows: bool,
    ) -> PyResult<(Array<'py>, Option<Array<'py>>)> {
        let (src, tgt) = (Sequences::read(src, src_lengths)?, Sequences::read(tgt, tgt_lengths)?);
        let config = self.model.layers.config();
        let (mut tgt_in, mut tgt_out, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for (sequence, &eos) in tgt.iter().zip(&eos) {
            let end: &[u32] = if eos { &[config.eos_id] } else { &[] };
            let out = [sequence, end].concat();
            tgt_in.extend([config.bos_id].iter().chain(sequence).take(out.len()));
            lengths.push(out.len());
            tgt_out.extend(out);
        }
        let (src_rows, tgt_rows) = (src.rows(), Rows::from_lengths(&lengths));
        let batch = Batch { src: src.ids, src_rows, tgt_in, tgt_out, tgt_rows };
        let layers = &self.model.layers;
        let (scores, rows) = door::run(py, || {
            self.model.evaluate(|tape, params| {
                if !rows {
                    return Ok((layers.score(tape, params, &batch)?, None));
                }
                let all = layers.log_probabilities(tape, params, &batch)?;
                let rows = copy(&all)?;
                tape.pool.recycle(all);
                let of = |(row, &id): (&[f32], &u32)| row.get(id as usize).copied();
                let scores = rows.chunks(config.tgt_vocab).zip(&batch.tgt_out).filter_map(of).collect();
                Ok((scores, Some(rows)))
            })
        })?;
        let n = scores.len();
        let rows = rows.map(|rows| to_array(py, rows, &[n, config.tgt_vocab])).transpose()?;
        Ok((to_array(py, scores, &[n])?, rows))
    }

    /// The best hypotheses of every source.
    fn hypotheses<'py>(
        &self,
        py: Python<'py>,
        src: &Ids<'py>,
        src_lengths: &Ids<'py>,
        settings: generate::Settings,
        draft: Option<&Bound<'py, Self>>,
    ) -> PyResult<Vec<Vec<generate::Found<'py>>>> {
        let draft = draft.map(|draft| &*draft.get().model);
        generate::hypotheses(py, &self.model, draft, &Sequences::read(src, src_lengths)?, settings)
    }

    /// A decoding that goes on when it is asked to.
    fn decoder(&self, settings: generate::Settings, draft: Option<&Bound<'_, Self>>) -> PyResult<generate::Decoder> {
        let draft = draft.map(|draft| Arc::clone(&draft.get().model));
        generate::Decoder::new(Arc::clone(&self.model), draft, settings)
    }

    /// Encoder states (R, D).
    fn encode<'py>(&self, py: Python<'py>, src: &Ids<'py>, src_lengths: &Ids<'py>) -> PyResult<Array<'py>> {
        let src = Sequences::read(src, src_lengths)?;
        let (values, shape) = door::run(py, || {
            self.model.evaluate(|tape, params| {
                let memory = self.model.layers.encode(tape, params, &src.ids, &src.rows())?;
                let memory = tape.value(memory)?;
                Ok((copy(memory)?, [memory.rows(), memory.cols()]))
            })
        })?;
        to_array(py, values, &shape)
    }
}

/// Checks a config given as JSON and gives it back as the engine reads it.
#[pyfunction]
pub fn check_config(config: &str) -> PyResult<String> {
    Ok(TransformerConfig::from_json(config).map_err(raise)?.to_json())
}
