//! Models on disk: `model.safetensors`, and a readable copy of its config in `config.json`.
//!
//! The config stands in the metadata of the safetensors file as well and wins there: one rename decides what the folder
//! holds, whenever a process is killed. A trainer's state has a file of its own, put in place before the model's; the
//! model's metadata names it, so the same rename decides for both. Saves into one folder wait for each other.

mod container;
mod files;
mod names;

pub(crate) use container::{Container, parse_object};
pub use names::{Alias, NamedArray, NamedBytes, Numbers, Tensor, load_state, load_state_int8, state_dict, tensors};
pub(crate) use names::{Offer, match_names};

use crate::error::{Error, Result};
use crate::tape::{Params, Stored};
use crate::{bail, ensure};
use files::{Staged, prepare, storage, sync_folder};
use names::{check_int8, equal, match_places, set, set_int8, stored_as, unequal};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// The layout of the files; raised when older programs would read them wrongly.
pub const FORMAT_VERSION: u64 = 1;

const MODEL: &str = "model.safetensors";
const CONFIG: &str = "config.json";
const TRAINER: &str = "trainer";
/// Keys of the config that say what matrices are kept in if not in f32, each with its one value.
const FORMS: [(&str, Stored); 2] = [("quantization", Stored::Int8), ("dtype", Stored::Bf16)];
/// A config above this is refused before it is read.
const MAX_CONFIG: u64 = 1 << 20;

/// The state of a trainer: a JSON text and arrays, kept in `trainer-<step>.safetensors` beside the model they belong to.
pub(crate) struct TrainerState<'a> {
    pub step: u64,
    pub json: String,
    pub arrays: Vec<NamedArray<'a>>,
}

/// Writes a model into a folder, which is made if need be: `config_json`, an object, with `format_version`, `model_type`
/// and, where matrices are not in f32, `quantization` or `dtype` added, and every parameter and statistic. Other files stay as they are. After an error before the model's
/// rename the old model is in place, after a later one the new.
pub fn save_model(folder: &Path, config_json: &str, model_type: &str, params: &Params<f32>) -> Result<()> {
    save(folder, config_json, model_type, params, None)
}

pub(crate) fn save(
    folder: &Path,
    config_json: &str,
    model_type: &str,
    params: &Params<f32>,
    trainer: Option<TrainerState>,
) -> Result<()> {
    let mut config = container::parse_object("config", config_json.as_bytes())?;
    config.insert("format_version".into(), FORMAT_VERSION.into());
    config.insert("model_type".into(), model_type.into());
    for (key, stored) in FORMS {
        if params.stored() == stored {
            config.insert(key.into(), stored.name().into());
        }
    }
    let config = Value::Object(config);
    let mut metadata = BTreeMap::from([("format", "pt".to_string()), ("config", config.to_string())]);

    let _alone = prepare(folder, &[MODEL, CONFIG, TRAINER])?;
    for target in [MODEL, CONFIG].map(|name| folder.join(name)) {
        ensure!(!target.is_dir(), Storage, "{}: a folder stands where a file goes; move it away", target.display());
    }
    // All that can fail for want of space comes first, in temporary files.
    let state = match &trainer {
        None => None,
        Some(state) => {
            let name = free_name(folder, state.step);
            let about = BTreeMap::from([("format", "pt".to_string()), ("trainer", state.json.clone())]);
            let arrays = state.arrays.iter().map(|&(name, shape, values)| (name, shape, Numbers::F32(values)));
            let arrays: Vec<Tensor> = arrays.collect();
            let staged = Staged::write(folder, &name, |out| container::write(out, &about, &arrays))?;
            metadata.insert("trainer", name);
            Some(staged)
        }
    };
    // The widest numbers first, so that all are aligned.
    let mut tensors = tensors(params);
    tensors.sort_by_key(|(.., numbers)| match numbers {
        Numbers::F32(_) => 0,
        Numbers::Bf16(_) => 1,
        Numbers::Int8(_) => 2,
    });
    let model = Staged::write(folder, MODEL, |out| container::write(out, &metadata, &tensors))?;
    let config = Staged::write(folder, CONFIG, |out| writeln!(out, "{config:#}"))?;

    if let Some(state) = state {
        state.commit()?;
        sync_folder(folder)?;
    }
    model.commit()?;
    config.commit()?;
    sync_folder(folder)?;
    if trainer.is_some() {
        remove_old_states(folder);
    }
    Ok(())
}

/// A name that no file has: the model in place may name another state of this step.
fn free_name(folder: &Path, step: u64) -> String {
    let plain = format!("{TRAINER}-{step}.safetensors");
    let numbered = (1u64..).map(|k| format!("{TRAINER}-{step}-{k}.safetensors"));
    let mut names = std::iter::once(plain).chain(numbered);
    names.find(|name| !folder.join(name).exists()).expect("one of endlessly many names is free")
}

/// Whether `free_name` may have made this name.
fn is_state(file: &str) -> bool {
    let numbers = (|| file.strip_prefix(TRAINER)?.strip_prefix('-')?.strip_suffix(".safetensors"))();
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    numbers.is_some_and(|text| text.split_once('-').map_or(digits(text), |(step, k)| digits(step) && digits(k)))
}

/// Removes the states that the model in place does not name. What cannot be removed is no harm.
fn remove_old_states(folder: &Path) {
    let Ok(model) = Container::open(&folder.join(MODEL)) else { return };
    let (Some(current), Ok(entries)) = (model.metadata.get("trainer"), fs::read_dir(folder)) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(|file| is_state(file) && file != current) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A saved model whose files were found sound; its numbers are read by [`Checkpoint::load_into`].
#[derive(Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    container: Container,
    config_json: String,
    model_type: String,
    stored: Stored,
}

impl Checkpoint {
    /// Opens the folder of a model or of a trainer.
    pub fn open(folder: &Path) -> Result<Self> {
        let container = Container::open(&folder.join(MODEL))?;
        let (place, text) = match container.metadata.get("config") {
            Some(text) => (folder.join(MODEL), text.clone()),
            None => (folder.join(CONFIG), read_config(&folder.join(CONFIG))?),
        };
        let place = place.display().to_string();
        let mut config = container::parse_object(&place, text.as_bytes())?;
        match config.remove("format_version").map(|version| (version.as_u64(), version)) {
            Some((Some(version), _)) if version <= FORMAT_VERSION => {}
            Some((Some(version), _)) => bail!(
                Checkpoint,
                "{place}: format_version {version} is newer than {FORMAT_VERSION}, which this program reads; update it"
            ),
            Some((None, version)) => bail!(Checkpoint, "{place}: `format_version`: expected a number, got {version}"),
            None => bail!(Checkpoint, "{place}: `format_version` is missing; the folder was not written by `save`"),
        }
        let Some(Value::String(model_type)) = config.remove("model_type") else {
            bail!(Checkpoint, "{place}: `model_type`: expected a text; the folder was not written by `save`")
        };
        let mut stored = Stored::F32;
        for (key, form) in FORMS {
            match config.remove(key) {
                None => {}
                Some(value) if value == form.name() && stored == Stored::F32 => stored = form,
                Some(value) if value == form.name() => {
                    bail!(Checkpoint, "{place}: `{key}`: {value} does not go with {:?}", stored.name())
                }
                Some(value) => {
                    bail!(Checkpoint, "{place}: `{key}`: expected {:?} or nothing, got {value}", form.name())
                }
            }
        }
        let config_json = Value::Object(config).to_string();
        Ok(Checkpoint { folder: folder.to_owned(), container, config_json, model_type, stored })
    }

    /// The config as it was given to [`save_model`].
    pub fn config_json(&self) -> &str {
        &self.config_json
    }

    /// What kind of model it is.
    pub fn model_type(&self) -> &str {
        &self.model_type
    }

    /// What matrices are kept in: the numbers belong into parameters of such a layout.
    pub fn stored(&self) -> Stored {
        self.stored
    }

    /// Reads every parameter and statistic, strictly as [`load_state`] does. After an error while reading, some are
    /// overwritten.
    pub fn load_into(&mut self, params: &mut Params<f32>, aliases: &[Alias<'_>]) -> Result<()> {
        let what = self.folder.join(MODEL).display().to_string();
        let offers = self.container.tensors.iter().map(|(name, info)| Offer {
            name,
            shape: &info.shape,
            problem: match stored_as(params, name, aliases) {
                Stored::F32 => Container::unreadable(info),
                Stored::Bf16 => (info.dtype != Dtype::BF16).then(|| format!("expected BF16, got {}", info.dtype)),
                Stored::Int8 => (info.dtype != Dtype::I8).then(|| format!("expected I8, got {}", info.dtype)),
            },
        });
        for (place, first, others) in match_places(&what, params, offers, aliases)? {
            let name = self.container.tensors[first].0.clone();
            let differs = |other: usize, container: &Container| unequal(&what, &name, &container.tensors[other].0);
            if self.container.tensors[first].1.dtype == Dtype::I8 {
                let values = self.container.read_int8(first)?;
                check_int8(&what, &name, &values)?;
                for other in others {
                    if values != self.container.read_int8(other)? {
                        return Err(differs(other, &self.container));
                    }
                }
                set_int8(params, place, &values)?;
                continue;
            }
            let values = self.container.read(first)?;
            for other in others {
                if !equal(&values, &self.container.read(other)?) {
                    return Err(differs(other, &self.container));
                }
            }
            set(params, place, &values)?;
        }
        Ok(())
    }

    /// The state of the trainer that saved this model: its JSON text and its arrays.
    pub(crate) fn trainer_state(&self) -> Result<(String, Container)> {
        let Some(name) = self.container.metadata.get("trainer").filter(|name| is_state(name)) else {
            bail!(
                Checkpoint,
                "{}: no trainer saved this model; load it as a model and make a new trainer",
                self.folder.display()
            )
        };
        let path = self.folder.join(name);
        let container = Container::open(&path)?;
        match container.metadata.get("trainer") {
            Some(json) => Ok((json.clone(), container)),
            None => bail!(Checkpoint, "{}: its metadata holds no trainer; the file is damaged", path.display()),
        }
    }
}

/// A name, a shape and the values of an array, all its own.
pub type OwnedArray = (String, Vec<usize>, Vec<f32>);

/// Reads the arrays of any safetensors file whose names are `wanted`, as f32.
pub fn read_arrays(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<OwnedArray>> {
    let mut container = Container::open(path)?;
    let mut arrays = Vec::new();
    for i in 0..container.tensors.len() {
        let (name, info) = container.tensors[i].clone();
        if !wanted(&name) {
            continue;
        }
        if let Some(problem) = Container::unreadable(&info) {
            bail!(Checkpoint, "{}: `{}`: {problem}", path.display(), name.escape_debug());
        }
        arrays.push((name, info.shape, container.read(i)?));
    }
    Ok(arrays)
}

fn read_config(path: &Path) -> Result<String> {
    let io = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::InvalidData => Error::Checkpoint(format!("{}: expected UTF-8 text", path.display())),
        _ => storage(path, &error),
    };
    let mut text = String::new();
    let read = fs::File::open(path).map_err(io)?.take(MAX_CONFIG + 1).read_to_string(&mut text).map_err(io)?;
    ensure!(read as u64 <= MAX_CONFIG, Checkpoint, "{}: more than {MAX_CONFIG} bytes are no config", path.display());
    Ok(text)
}

#[cfg(test)]
pub(crate) mod tests;
