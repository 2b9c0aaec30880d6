//! Files as they should be, as a kill leaves them, and as nobody should make them.

pub(crate) use super::files::tests::Folder;
use super::*;
use crate::tape::{Builder, Init, Layout};
use crate::threads::section;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};
use std::collections::HashMap;
use std::io::Write;
use std::sync::Arc;

const JSON: &str = r#"{"d_model": 4, "dropout": 0.30000000000000004, "norm": {"kind": "layer"}}"#;

fn params(seed: u64) -> Params<f32> {
    let mut b = Builder::new();
    b.param("embedding.weight", &[5, 3], Init::Normal { std: 1.0 });
    b.param("head.bias", &[5], Init::Normal { std: 1.0 });
    b.stat("norm.running_var", 3, 1.0);
    Params::init(Arc::new(b.finish()), seed).unwrap()
}

fn bits(params: &Params<f32>) -> Vec<u32> {
    state_dict(params).iter().flat_map(|(.., values)| values.iter().map(|x| x.to_bits())).collect()
}

fn load(folder: &Path) -> Result<Params<f32>> {
    let mut to = params(99);
    Checkpoint::open(folder)?.load_into(&mut to, &[])?;
    Ok(to)
}

fn checkpoint_error(folder: &Path, case: &str) -> String {
    match load(folder) {
        Err(Error::Checkpoint(text)) => text,
        other => panic!("{case}: expected a checkpoint error, got {:?}", other.map(|_| "a model")),
    }
}

#[test]
fn a_model_comes_back_bit_for_bit_and_other_files_stay() {
    let folder = Folder::new();
    let inside = folder.0.join("a").join("b");
    let mut model = params(1);
    model.set(model.layout().find("head.bias").unwrap(), &[f32::NAN, -0.0, 1e-45, f32::INFINITY, f32::MAX]).unwrap();
    save_model(&inside, JSON, "transformer", &model).unwrap();
    fs::write(inside.join("notes.txt"), "mine").unwrap();
    save_model(&inside, JSON, "transformer", &model).unwrap();
    let mut names: Vec<_> =
        fs::read_dir(&inside).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "notes.txt"]);
    assert_eq!(fs::read_to_string(inside.join("notes.txt")).unwrap(), "mine");

    assert_eq!(bits(&load(&inside).unwrap()), bits(&model));
    let checkpoint = Checkpoint::open(&inside).unwrap();
    assert_eq!(checkpoint.model_type(), "transformer");
    let json = |text: &str| serde_json::from_str::<Value>(text).unwrap();
    assert_eq!(json(checkpoint.config_json()), json(JSON));
    let written = json(&fs::read_to_string(inside.join("config.json")).unwrap());
    assert_eq!((&written["format_version"], &written["model_type"]), (&json("1"), &json("\"transformer\"")));
}

/// Two matrices and a vector, and their layout in another form.
fn two_matrices(stored: Stored) -> (Params<f32>, Arc<Layout>) {
    let mut b = Builder::new();
    b.param("up.weight", &[7, 5], Init::Xavier);
    b.param("up.bias", &[7], Init::Normal { std: 1.0 });
    b.param("down.weight", &[3, 7], Init::Xavier);
    let layout = Arc::new(b.finish());
    let other = layout.stored_in(stored, &[]);
    (Params::init(layout, 1).unwrap(), other)
}

fn int8_dict(params: &Params<f32>) -> Vec<(&str, &[usize], Vec<i8>)> {
    let bytes = |(name, shape, numbers)| match numbers {
        Numbers::Int8(w) => Some((name, shape, w.values())),
        _ => None,
    };
    tensors(params).into_iter().filter_map(bytes).collect()
}

#[test]
fn weights_in_int8_come_back_bit_for_bit_and_say_so() {
    let (f32, int8) = two_matrices(Stored::Int8);
    let model = f32.convert(int8.clone()).unwrap();
    let folder = Folder::new();
    save_model(&folder.0, JSON, "transformer", &model).unwrap();
    let bytes = fs::read(folder.0.join(MODEL)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 5);
    for (name, shape, values) in int8_dict(&model) {
        let (tensor, scale) = (tensors.tensor(name).unwrap(), tensors.tensor(&format!("{name}_scale")).unwrap());
        assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::I8, shape));
        assert!(tensor.data().iter().map(|&x| x.cast_signed()).eq(values.iter().copied()));
        assert_eq!((scale.dtype(), scale.shape()), (Dtype::F32, &shape[..1]));
    }
    let mut checkpoint = Checkpoint::open(&folder.0).unwrap();
    assert!(checkpoint.stored() == Stored::Int8 && !checkpoint.config_json().contains("quantization"));
    let mut again = Params::zeros(int8).unwrap();
    checkpoint.load_into(&mut again, &[]).unwrap();
    assert_eq!((bits(&again), int8_dict(&again)), (bits(&model), int8_dict(&model)));
    // In parameters of f32 they have no place.
    let error = checkpoint.load_into(&mut Params::zeros(f32.layout().clone()).unwrap(), &[]).unwrap_err().to_string();
    assert!(error.contains("2 unexpected") && error.contains("got I8"), "{error}");
}

#[test]
fn matrices_in_bf16_come_back_bit_for_bit_and_say_so() {
    let (mut f32, layout) = two_matrices(Stored::Bf16);
    let mut special = vec![f32::NAN, -0.0, f32::INFINITY, f32::MAX, 1e-40];
    special.resize(35, 0.1);
    f32.set(f32.layout().find("up.weight").unwrap(), &special).unwrap();
    let model = f32.convert(layout.clone()).unwrap();
    let folder = Folder::new();
    save_model(&folder.0, JSON, "transformer", &model).unwrap();
    let bytes = fs::read(folder.0.join(MODEL)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 3);
    for (name, shape, values) in state_dict(&f32) {
        let tensor = tensors.tensor(name).unwrap();
        let rounded: Vec<u8> = values.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        match shape.len() {
            2 => assert_eq!((tensor.dtype(), tensor.shape(), tensor.data()), (Dtype::BF16, shape, &rounded[..])),
            _ => assert_eq!((tensor.dtype(), tensor.data().len()), (Dtype::F32, 28)),
        }
    }
    let mut checkpoint = Checkpoint::open(&folder.0).unwrap();
    assert!(checkpoint.stored() == Stored::Bf16 && !checkpoint.config_json().contains("dtype"));
    let mut again = Params::zeros(layout.clone()).unwrap();
    checkpoint.load_into(&mut again, &[]).unwrap();
    save_model(&folder.0, JSON, "transformer", &again).unwrap();
    assert_eq!(fs::read(folder.0.join(MODEL)).unwrap(), bytes);
    // f32 holds all of it; bf16 takes numbers of its own alone.
    let mut widened = Params::zeros(f32.layout().clone()).unwrap();
    checkpoint.load_into(&mut widened, &[]).unwrap();
    assert_eq!(bits(&widened), bits(&model.convert(f32.layout().clone()).unwrap()));
    save_model(&folder.0, JSON, "transformer", &f32).unwrap();
    let error = Checkpoint::open(&folder.0).unwrap().load_into(&mut again, &[]).unwrap_err().to_string();
    assert!(error.contains("2 unfit (`up.weight`: expected BF16, got F32, `down.weight`"), "{error}");
    let version = again.version();
    let error = load_state(&mut again, &state_dict(&f32), &[]).unwrap_err();
    assert!(matches!(&error, Error::Unsupported(text) if text.contains("`up.weight` is kept in bf16")), "{error}");
    assert_eq!(again.version(), version);
    load_state(&mut again, &state_dict(&widened), &[]).unwrap();

    for (more, part) in [
        (r#""dtype": "f16""#, "`dtype`: expected \"bf16\" or nothing, got \"f16\""),
        (r#""dtype": "bf16", "quantization": "int8""#, "`dtype`: \"bf16\" does not go with \"int8\""),
    ] {
        let config = format!(r#"{{"format_version": 1, "model_type": "transformer", {more}}}"#);
        write_foreign(&folder.0, &[], Some(&config));
        let error = Checkpoint::open(&folder.0).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_tied_matrix_in_bf16_may_stand_under_any_of_its_names() {
    let (f32, layout) = two_matrices(Stored::Bf16);
    let mut to = Params::zeros(layout.clone()).unwrap();
    let model = f32.convert(layout).unwrap().convert(f32.layout().clone()).unwrap();
    let aliases = [("head.weight", "up.weight")];
    let (mut tensors, halves) =
        (Vec::new(), |x: &[f32]| x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect());
    for (name, shape, values) in state_dict(&model) {
        match name {
            "up.bias" => {
                tensors.push((name, Dtype::F32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect()));
            }
            "up.weight" => tensors.push(("head.weight", Dtype::BF16, shape, halves(values))),
            _ => tensors.push((name, Dtype::BF16, shape, halves(values))),
        }
    }
    let folder = Folder::new();
    let config = r#"{"format_version": 1, "model_type": "transformer", "dtype": "bf16"}"#;
    let mut load = |tensors: &[_]| {
        write_foreign(&folder.0, tensors, Some(config));
        Checkpoint::open(&folder.0)?.load_into(&mut to, &aliases)?;
        Ok::<_, Error>(bits(&to.convert(f32.layout().clone())?))
    };
    assert_eq!(load(&tensors).unwrap(), bits(&model));
    let head = tensors.iter().find(|(name, ..)| *name == "head.weight").unwrap().clone();
    tensors.push(("up.weight", head.1, head.2, head.3));
    assert_eq!(load(&tensors).unwrap(), bits(&model));
    tensors.last_mut().unwrap().3[0] ^= 1;
    assert!(load(&tensors).unwrap_err().to_string().contains("`up.weight` and `head.weight`"));
}

#[test]
fn a_tied_matrix_in_int8_may_stand_under_both_names_with_equal_bytes() {
    let (f32, layout) = two_matrices(Stored::Int8);
    let model = f32.convert(layout.clone()).unwrap();
    let aliases = [("head.weight", "up.weight")];
    let (floats, mut int8) = (state_dict(&model), int8_dict(&model));
    let up = int8.iter().find(|(name, ..)| *name == "up.weight").unwrap().clone();
    int8.push(("head.weight", up.1, up.2));
    let folder = Folder::new();
    let config = r#"{"format_version": 1, "model_type": "transformer", "quantization": "int8"}"#;
    let load = |int8: &[(&str, &[usize], Vec<i8>)]| {
        let given: Vec<NamedBytes> = int8.iter().map(|(name, shape, values)| (*name, *shape, &values[..])).collect();
        let mut to = Params::zeros(layout.clone())?;
        load_state_int8(&mut to, &floats, &given, &aliases)?;
        Ok::<_, Error>(to)
    };
    let open = |int8: &[(&str, &[usize], Vec<i8>)]| {
        let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut all: Vec<_> = floats.iter().map(|&(name, shape, x)| (name, Dtype::F32, shape, bytes(x))).collect();
        let raw = |x: &[i8]| x.iter().map(|x| x.cast_unsigned()).collect();
        all.extend(int8.iter().map(|(name, shape, x)| (*name, Dtype::I8, *shape, raw(x))));
        write_foreign(&folder.0, &all, Some(config));
        let mut to = Params::zeros(layout.clone())?;
        Checkpoint::open(&folder.0)?.load_into(&mut to, &aliases)?;
        Ok::<_, Error>(to)
    };
    for to in [load(&int8).unwrap(), open(&int8).unwrap()] {
        assert_eq!((bits(&to), int8_dict(&to)), (bits(&model), int8_dict(&model)));
    }
    let last = &mut int8.last_mut().unwrap().2[34];
    *last = i8::from(*last == 0);
    for error in [load(&int8).unwrap_err(), open(&int8).unwrap_err()] {
        assert!(matches!(&error, Error::Checkpoint(text) if text.contains("`up.weight` and `head.weight`")), "{error}");
    }
}

#[test]
fn the_file_is_what_the_safetensors_crate_reads_and_the_same_each_time() {
    let folder = Folder::new();
    let model = params(1);
    let write = || {
        save_model(&folder.0, JSON, "transformer", &model).unwrap();
        fs::read(folder.0.join(MODEL)).unwrap()
    };
    let bytes = write();
    assert_eq!(write(), bytes);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(tensors.len(), 3);
    for (name, shape, values) in state_dict(&model) {
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, shape));
        let numbers: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        assert_eq!(numbers, values);
    }
}

/// Writes a model file by the safetensors crate.
fn write_foreign(folder: &Path, tensors: &[(&str, Dtype, &[usize], Vec<u8>)], config: Option<&str>) {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, data)| (name.to_string(), TensorView::new(*dtype, shape.to_vec(), data).unwrap()));
    let metadata = config.map(|config| HashMap::from([("config".to_string(), config.to_string())]));
    fs::write(folder.join(MODEL), serialize(views, metadata).unwrap()).unwrap();
}

const CONFIG_1: &str = r#"{"format_version": 1, "model_type": "transformer"}"#;

#[test]
fn half_and_double_precision_are_read_and_integers_refused() {
    let folder = Folder::new();
    let weight: Vec<f32> = (0..15).map(|i| i as f32 * 0.37 - 2.0).collect();
    let bias: Vec<f64> = (0..5).map(|i| f64::from(i) / 3.0).collect();
    let var = [0.5f32, 1.5, 2.5];
    let bytes = |dtype| -> Vec<u8> {
        match dtype {
            Dtype::F16 => weight.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect(),
            _ => weight.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect(),
        }
    };
    for dtype in [Dtype::F16, Dtype::BF16] {
        let tensors = [
            ("embedding.weight", dtype, &[5, 3][..], bytes(dtype)),
            ("head.bias", Dtype::F64, &[5][..], bias.iter().flat_map(|x| x.to_le_bytes()).collect()),
            ("norm.running_var", Dtype::F32, &[3][..], var.iter().flat_map(|x| x.to_le_bytes()).collect()),
        ];
        write_foreign(&folder.0, &tensors, Some(CONFIG_1));
        let model = load(&folder.0).unwrap();
        let get = |name| model.get(model.layout().find(name).unwrap());
        let rounded = |x: f32| if dtype == Dtype::F16 { f16::from_f32(x).to_f32() } else { bf16::from_f32(x).to_f32() };
        assert!(get("embedding.weight").iter().copied().eq(weight.iter().map(|&x| rounded(x))));
        assert!(get("head.bias").iter().copied().eq(bias.iter().map(|&x| x as f32)));
    }
    let tensors = [
        ("embedding.weight", Dtype::I32, &[5, 3][..], vec![0; 60]),
        ("head.bias", Dtype::F32, &[4][..], vec![0; 16]),
        ("other", Dtype::F32, &[][..], vec![0; 4]),
    ];
    write_foreign(&folder.0, &tensors, Some(CONFIG_1));
    let text = checkpoint_error(&folder.0, "integers");
    for part in
        ["1 missing (`norm.running_var`)", "1 unexpected (`other`)", "2 unfit", "got I32", "expected shape (5,)"]
    {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn the_config_in_the_model_file_wins_and_config_json_helps_out() {
    let folder = Folder::new();
    save_model(&folder.0, JSON, "transformer", &params(1)).unwrap();
    // As a kill between the two renames leaves it.
    fs::write(folder.0.join(CONFIG), r#"{"format_version": 1, "model_type": "gpt"}"#).unwrap();
    assert_eq!(Checkpoint::open(&folder.0).unwrap().model_type(), "transformer");
    fs::remove_file(folder.0.join(CONFIG)).unwrap();
    assert_eq!(Checkpoint::open(&folder.0).unwrap().model_type(), "transformer");

    write_foreign(&folder.0, &[], None);
    assert!(matches!(Checkpoint::open(&folder.0), Err(Error::Storage(_))));
    for (text, part) in [
        (r#"{"format_version": 1, "model_type": "a", "model_type": "b"}"#, "\"model_type\" comes twice"),
        (r#"{"format_version": 2, "model_type": "a"}"#, "newer"),
        (r#"{"format_version": -1, "model_type": "a"}"#, "format_version"),
        (r#"{"model_type": "a"}"#, "format_version"),
        (r#"{"format_version": 1}"#, "model_type"),
        (r#"{"format_version": 1, "model_type": 3}"#, "model_type"),
        ("[]", "JSON object"),
        ("{", "EOF"),
        ("{}x", "trailing"),
    ] {
        fs::write(folder.0.join(CONFIG), text).unwrap();
        let text = checkpoint_error(&folder.0, text);
        assert!(text.contains(part), "{text}");
    }
    fs::write(folder.0.join(CONFIG), "[".repeat(100_000)).unwrap();
    checkpoint_error(&folder.0, "deep");
    fs::write(folder.0.join(CONFIG), b"{\"\xff\": 1}").unwrap();
    checkpoint_error(&folder.0, "no UTF-8");
    fs::write(folder.0.join(CONFIG), " ".repeat(2 << 20)).unwrap();
    checkpoint_error(&folder.0, "long");
    fs::write(folder.0.join(CONFIG), CONFIG_1).unwrap();
    assert_eq!(Checkpoint::open(&folder.0).unwrap().model_type(), "transformer");
    assert!(save_model(&folder.0, "[]", "transformer", &params(1)).is_err());
}

#[test]
fn no_damage_passes_for_a_model_and_none_panics() {
    let folder = Folder::new();
    save_model(&folder.0, JSON, "transformer", &params(1)).unwrap();
    let sound = fs::read(folder.0.join(MODEL)).unwrap();
    let with = |bytes: &[u8], case: &str| {
        fs::write(folder.0.join(MODEL), bytes).unwrap();
        checkpoint_error(&folder.0, case)
    };
    for length in (0..sound.len()).step_by(64).chain([1, 7, 8, 9, sound.len() - 1]) {
        with(&sound[..length], &format!("{length} bytes"));
    }
    with(&[&sound[..], b"x"].concat(), "a byte too many");

    // Every bit of the header: either it is noticed, or nothing that decides where numbers go has changed.
    let header_end = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    let (mut noticed, model) = (0, bits(&params(1)));
    for i in 0..header_end {
        for bit in 0..8 {
            let mut bytes = sound.clone();
            bytes[i] ^= 1 << bit;
            fs::write(folder.0.join(MODEL), &bytes).unwrap();
            match load(&folder.0) {
                Ok(loaded) => assert_eq!(bits(&loaded), model, "byte {i}, bit {bit}"),
                Err(Error::Checkpoint(_)) => noticed += 1,
                Err(other) => panic!("byte {i}, bit {bit}: {other:?}"),
            }
        }
    }
    assert!(noticed > header_end * 4, "{noticed} of {} flips", header_end * 8);
}

#[test]
fn hostile_headers_are_refused_before_anything_is_allocated() {
    let folder = Folder::new();
    let with = |header: &str, data: &[u8]| {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat();
        fs::write(folder.0.join(MODEL), bytes).unwrap();
        checkpoint_error(&folder.0, header.get(..60).unwrap_or(header))
    };
    let tensor = |name: &str, shape: &str, start: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let data = [0; 64];
    for header in [
        "",
        "null",
        "[1]",
        "{}",
        "{\"a\":1}",
        r#"{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,64]}}"#,
        &format!("{{{}}}", tensor("a", "[15]", 0, 64)),
        &format!("{{{}}}", tensor("a", "[16]", 4, 68)),
        &format!("{{{}}}", tensor("a", "[-1]", 0, 64)),
        &format!("{{{}}}", tensor("a", "[1.5]", 0, 64)),
        &format!("{{{}}}", tensor("a", "[18446744073709551615,2]", 0, 64)),
        &format!("{{{}}}", tensor("a", "[4611686018427387904,4]", 0, 64)),
        &format!("{{{}}}", tensor("a", "[2,2,2,2,1,1,1,1,1]", 0, 64)),
        // Overlapping, with a hole, the wrong way round.
        &format!("{{{},{}}}", tensor("a", "[16]", 0, 64), tensor("b", "[8]", 0, 32)),
        &format!("{{{},{}}}", tensor("a", "[4]", 0, 16), tensor("b", "[8]", 32, 64)),
        &format!("{{{}}}", tensor("a", "[16]", 64, 0)),
    ] {
        with(header, &data);
    }
    let text = with(&format!("{{{0},{0}}}", tensor("a", "[16]", 0, 64)), &data);
    assert!(text.contains("\"a\" comes twice"), "{text}");
    let many: Vec<String> = (0..100_002).map(|i| tensor(&i.to_string(), "[0]", 0, 0)).collect();
    let text = with(&format!("{{{}}}", many.join(",")), &[]);
    assert!(text.contains("keys"), "{text}");
    let text = with(&format!("{{{}}}", tensor("a", &format!("[{}1]", "1,".repeat(1 << 20)), 0, 4)), &data[..4]);
    assert!(text.contains("list"), "{text}");
    with(&format!("{{\"a\":{}", "{\"a\":".repeat(200_000)), &[]);

    // A header length beyond the file, and beyond every machine, though the file claims to be large.
    for length in [57u64, 1 << 24, u64::MAX - 7, u64::MAX] {
        let file = fs::File::create(folder.0.join(MODEL)).unwrap();
        (&file).write_all(&length.to_le_bytes()).unwrap();
        file.set_len(64.max(length.min(1 << 40))).unwrap();
        checkpoint_error(&folder.0, &length.to_string());
    }
}

#[test]
fn a_folder_that_cannot_be_written_is_a_storage_error_and_the_old_model_stays() {
    let folder = Folder::new();
    save_model(&folder.0, JSON, "transformer", &params(1)).unwrap();
    let old = fs::read(folder.0.join(MODEL)).unwrap();
    // A folder stands where the new model, or its config, would go.
    for name in [MODEL, CONFIG] {
        let (path, aside) = (folder.0.join(name), folder.0.join("aside"));
        fs::rename(&path, &aside).unwrap();
        fs::create_dir(&path).unwrap();
        let error = save_model(&folder.0, JSON, "transformer", &params(2)).unwrap_err();
        assert!(matches!(&error, Error::Storage(text) if text.contains(name)), "{error}");
        assert_eq!(folder.names().len(), 3, "nothing temporary is left");
        fs::remove_dir(&path).unwrap();
        fs::rename(&aside, &path).unwrap();
        assert_eq!(fs::read(folder.0.join(MODEL)).unwrap(), old);
    }
    assert_eq!(bits(&load(&folder.0).unwrap()), bits(&params(1)));

    assert!(
        matches!(Checkpoint::open(&folder.0.join("nowhere")), Err(Error::Storage(text)) if text.contains("nowhere"))
    );
    #[cfg(target_os = "linux")]
    assert!(matches!(save_model(Path::new("/proc"), JSON, "transformer", &params(2)), Err(Error::Storage(_))));
}

#[test]
fn only_names_of_states_are_taken_for_states() {
    for name in ["trainer-0.safetensors", "trainer-12-3.safetensors"] {
        assert!(is_state(name), "{name}");
    }
    for name in [
        "trainer.safetensors",
        "trainer-.safetensors",
        "trainer-1-.safetensors",
        "trainer-notes.safetensors",
        "trainer-1-2-3.safetensors",
        "trainer-1/../2.safetensors",
        "../trainer-1.safetensors",
        "trainer-1.safetensors.bak",
    ] {
        assert!(!is_state(name), "{name}");
    }
}

#[test]
fn saving_and_loading_can_be_interrupted() {
    let folder = Folder::new();
    let (one, mut other) = (params(1), params(2));
    save_model(&folder.0, JSON, "transformer", &one).unwrap();
    let interrupted = |work: &mut dyn FnMut() -> Result<()>| {
        let late = || {
            std::thread::sleep(std::time::Duration::from_millis(60)); // the next time that somebody asks is the poll's
            work()
        };
        assert_eq!(section(Some(&|| true), late), Err(Error::Interrupted));
    };
    interrupted(&mut || save_model(&folder.0, JSON, "transformer", &other));
    assert_eq!(folder.names().len(), 2, "nothing temporary is left");
    assert_eq!(bits(&load(&folder.0).unwrap()), bits(&one));
    interrupted(&mut || Checkpoint::open(&folder.0)?.load_into(&mut other, &[]));
}
