//! A trainer on disk and in memory: training goes on from it bit for bit.

use super::optimizer::Slot;
use super::{Trainer, TrainerConfig};
use crate::checkpoint::{self, Checkpoint, Container, NamedArray, Offer, TrainerState, match_names, parse_object};
use crate::ensure;
use crate::error::{Error, Result};
use crate::tape::Params;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What is kept beside the moments.
#[derive(Serialize, Deserialize)]
struct Saved {
    step: u64,
    total_steps: Option<u64>,
    /// Always 0.
    rank: u64,
    config: TrainerConfig,
    /// Updates of each trainable parameter: `step` for all.
    updates: BTreeMap<String, u64>,
    /// Where the data stand: the caller's.
    cursor: Value,
}

/// Weights, statistics and a trainer's state at one moment.
#[derive(Clone, Debug)]
pub struct Snapshot {
    step: u64,
    values: Vec<Vec<f32>>,
    moments: Vec<Vec<f32>>,
}

impl Trainer {
    /// Writes the model as `save_model` does and the trainer's state beside it, whole or not at all, whenever the process
    /// is killed. `cursor` is handed back by [`Trainer::load`].
    pub fn save(
        &self,
        folder: &Path,
        config_json: &str,
        model_type: &str,
        params: &Params<f32>,
        cursor: Value,
    ) -> Result<()> {
        let layout = params.layout();
        let name = |slot: &Slot| layout.entry(slot.id).name.clone();
        let updates = self.state.slots.iter().map(|slot| (name(slot), self.state.updates)).collect();
        let (step, total_steps) = (self.step, self.total_steps);
        let saved = Saved { step, total_steps, rank: 0, config: self.config.clone(), updates, cursor };
        let json = serde_json::to_string(&saved).map_err(|error| Error::Internal(error.to_string()))?;

        let moments: Vec<_> = self.state.state_dict(&self.config.optimizer, params).collect();
        let arrays = moments.iter().map(|(name, shape, values)| (name.as_str(), *shape, *values)).collect();
        checkpoint::save(folder, config_json, model_type, params, Some(TrainerState { step, json, arrays }))
    }

    /// The trainer that saved a checkpoint, and its cursor. `params` are those the checkpoint was loaded into.
    pub fn load(checkpoint: &Checkpoint, params: &mut Params<f32>) -> Result<(Trainer, Value)> {
        let (json, mut container) = checkpoint.trainer_state()?;
        let what = container.path().display().to_string();
        let map = parse_object(&what, json.as_bytes())?;
        let saved: Saved = serde_json::from_value(Value::Object(map))
            .map_err(|error| Error::Checkpoint(format!("{what}: the trainer's state: {error}")))?;
        let mut trainer = Trainer::new(saved.config, params)?;
        (trainer.step, trainer.total_steps) = (saved.step, saved.total_steps);

        let places = trainer.state.places(&trainer.config.optimizer, params);
        let places: Vec<_> = places.iter().map(|(name, shape)| (name.as_str(), *shape)).collect();
        let offers = container.tensors.iter().map(|(name, info)| Offer {
            name,
            shape: &info.shape,
            problem: Container::unreadable(info),
        });
        let plan = match_names(&what, &places, offers, &[])?;
        for (place, array, _) in plan {
            trainer.state.moment_mut(place).copy_from_slice(&container.read(array)?);
        }
        trainer.state.updates = saved.step;
        let names = trainer.state.slots.iter().map(|slot| &params.layout().entry(slot.id).name);
        ensure!(
            saved.updates.keys().eq(names.collect::<BTreeSet<_>>())
                && saved.updates.values().all(|&updates| updates == saved.step),
            Checkpoint,
            "{what}: expected {} updates of each trained parameter; the file is damaged",
            saved.step
        );
        Ok((trainer, saved.cursor))
    }

    /// A copy of everything that training changes.
    pub fn snapshot(&self, params: &Params<f32>) -> Snapshot {
        Snapshot {
            step: self.step,
            values: checkpoint::state_dict(params).into_iter().map(|(.., values)| values.to_vec()).collect(),
            moments: self.state.moments.iter().map(|arena| arena.to_vec()).collect(),
        }
    }

    /// Goes back to a snapshot of this trainer and model.
    pub fn restore(&mut self, snapshot: &Snapshot, params: &mut Params<f32>) -> Result<()> {
        let here = self.state.moments.iter().map(|arena| arena.len());
        ensure!(
            here.eq(snapshot.moments.iter().map(Vec::len)),
            Config,
            "restore: the snapshot belongs to another trainer; restore one of this trainer"
        );
        let layout = params.layout().clone();
        let names = layout.ids().map(|id| layout.entry(id)).chain(layout.stat_ids().map(|id| layout.stat_entry(id)));
        let arrays: Vec<NamedArray> =
            names.zip(&snapshot.values).map(|(e, values)| (e.name.as_str(), e.shape.as_slice(), &values[..])).collect();
        checkpoint::load_state(params, &arrays, &[])?;
        (self.step, self.state.updates) = (snapshot.step, snapshot.step);
        self.state.moments.iter_mut().zip(&snapshot.moments).for_each(|(arena, values)| arena.copy_from_slice(values));
        Ok(())
    }
}
