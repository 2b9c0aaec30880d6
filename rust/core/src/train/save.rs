//! A trainer on disk and in memory: training goes on from it bit for bit.

use super::{Trainer, TrainerConfig};
use crate::checkpoint::{self, Checkpoint, Container, NamedArray, Offer, TrainerState, match_names, parse_object};
use crate::ensure;
use crate::error::{Error, Result};
use crate::tape::Params;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// What is kept beside the moments.
#[derive(Serialize, Deserialize)]
struct Saved {
    step: u64,
    total_steps: Option<u64>,
    rank: u64,
    config: TrainerConfig,
    /// Updates of each trainable parameter so far.
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
    updates: Vec<u64>,
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
        let updates = self.state.slots.iter().map(|s| (layout.entry(s.id).name.clone(), s.updates)).collect();
        let (step, total_steps, rank) = (self.step, self.total_steps, self.rank);
        let saved = Saved { step, total_steps, rank, config: self.config.clone(), updates, cursor };
        let json = serde_json::to_string(&saved).map_err(|error| Error::Internal(error.to_string()))?;

        let places = self.moment_places(params);
        let values = self.state.slots.iter().flat_map(|slot| self.state.moments.iter().map(|m| &m[slot.here.clone()]));
        let arrays: Vec<NamedArray> =
            places.iter().zip(values).map(|((name, shape), values)| (name.as_str(), *shape, values)).collect();
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
        (trainer.step, trainer.total_steps, trainer.rank) = (saved.step, saved.total_steps, saved.rank);

        let places = trainer.moment_places(params);
        let places: Vec<_> = places.iter().map(|(name, shape)| (name.as_str(), *shape)).collect();
        let offers = container.tensors.iter().map(|(name, info)| Offer {
            name,
            shape: &info.shape,
            problem: Container::unreadable(info),
        });
        let plan = match_names(&what, &places, offers, &[])?;
        let kinds = trainer.state.moments.len();
        for (place, array, _) in plan {
            let here = trainer.state.slots[place / kinds].here.clone();
            trainer.state.moments[place % kinds][here].copy_from_slice(&container.read(array)?);
        }
        ensure!(
            saved.updates.len() == trainer.state.slots.len(),
            Checkpoint,
            "{what}: expected the updates of {} parameters, got {}",
            trainer.state.slots.len(),
            saved.updates.len()
        );
        for slot in &mut trainer.state.slots {
            let name = &params.layout().entry(slot.id).name;
            match saved.updates.get(name) {
                Some(&updates) => slot.updates = updates,
                None => crate::bail!(Checkpoint, "{what}: the updates of `{name}` are missing; the file is damaged"),
            }
        }
        Ok((trainer, saved.cursor))
    }

    /// Name and shape of each moment of each trainable parameter.
    fn moment_places<'a>(&self, params: &'a Params<f32>) -> Vec<(String, &'a [usize])> {
        let kinds = self.config.optimizer.moments();
        let of = |slot: &super::optimizer::Slot| {
            let entry = params.layout().entry(slot.id);
            kinds.iter().map(move |kind| (format!("{}.{kind}", entry.name), entry.shape.as_slice()))
        };
        self.state.slots.iter().flat_map(of).collect()
    }

    /// A copy of everything that training changes.
    pub fn snapshot(&self, params: &Params<f32>) -> Snapshot {
        Snapshot {
            step: self.step,
            values: checkpoint::state_dict(params).into_iter().map(|(.., values)| values.to_vec()).collect(),
            moments: self.state.moments.iter().map(|arena| arena.to_vec()).collect(),
            updates: self.state.slots.iter().map(|slot| slot.updates).collect(),
        }
    }

    /// Goes back to a snapshot of this trainer and model.
    pub fn restore(&mut self, snapshot: &Snapshot, params: &mut Params<f32>) -> Result<()> {
        let here = self.state.moments.iter().map(|arena| arena.len());
        ensure!(
            here.eq(snapshot.moments.iter().map(Vec::len)) && self.state.slots.len() == snapshot.updates.len(),
            Config,
            "restore: the snapshot belongs to another set of trainable parameters"
        );
        let layout = params.layout().clone();
        let names = layout.ids().map(|id| layout.entry(id)).chain(layout.stat_ids().map(|id| layout.stat_entry(id)));
        let arrays: Vec<NamedArray> =
            names.zip(&snapshot.values).map(|(e, values)| (e.name.as_str(), e.shape.as_slice(), &values[..])).collect();
        checkpoint::load_state(params, &arrays, &[])?;
        self.step = snapshot.step;
        self.state.moments.iter_mut().zip(&snapshot.moments).for_each(|(arena, values)| arena.copy_from_slice(values));
        self.state.slots.iter_mut().zip(&snapshot.updates).for_each(|(slot, updates)| slot.updates = *updates);
        Ok(())
    }
}
