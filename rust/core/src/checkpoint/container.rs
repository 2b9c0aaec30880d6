//! The safetensors container: a JSON header that tells name, type, shape and place of each tensor, then the numbers.

use super::files::storage;
use super::names::{Numbers, Tensor};
use crate::bail;
use crate::error::{Error, Result};
use crate::threads::parallel;
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Headers above this are refused before they are read: 10,000 tensors need about 1 MiB.
const MAX_HEADER: u64 = 16 << 20;
const MAX_TENSORS: usize = 100_000;
const MAX_DIMS: usize = 8;
/// Numbers are read and written in pieces of this many bytes.
const PIECE: usize = 1 << 16;

/// Writes tensors in the order given.
pub(crate) fn write(
    out: &mut dyn Write,
    metadata: &BTreeMap<&str, String>,
    tensors: &[Tensor<'_>],
) -> std::io::Result<()> {
    let mut header = Vec::new();
    let mut json = serde_json::Serializer::new(&mut header);
    let mut map = json.serialize_map(None)?;
    map.serialize_entry("__metadata__", metadata)?;
    let mut start = 0;
    for (name, shape, numbers) in tensors {
        let dtype = match numbers {
            Numbers::F32(_) => Dtype::F32,
            Numbers::Bf16(_) => Dtype::BF16,
            Numbers::Int8(_) => Dtype::I8,
        };
        let end = start + shape.iter().product::<usize>() * dtype.bitsize() / 8;
        map.serialize_entry(name, &TensorInfo { dtype, shape: shape.to_vec(), data_offsets: (start, end) })?;
        start = end;
    }
    map.end()?;
    header.resize(header.len().next_multiple_of(8), b' ');

    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    let mut bytes = Vec::with_capacity(PIECE);
    let mut put = |piece: &mut dyn Iterator<Item = u8>| {
        parallel(1, |_| ()).map_err(std::io::Error::other)?; // asks whether to stop
        bytes.clear();
        bytes.extend(piece);
        out.write_all(&bytes)
    };
    for (_, shape, numbers) in tensors {
        match numbers {
            Numbers::F32(x) => {
                x.chunks(PIECE / 4).try_for_each(|x| put(&mut x.iter().flat_map(|x| x.to_le_bytes())))?;
            }
            Numbers::Bf16(w) => {
                (0..shape[0]).try_for_each(|row| put(&mut w.bits(row).flat_map(|x| x.to_le_bytes())))?;
            }
            Numbers::Int8(w) => (0..shape[0]).try_for_each(|row| put(&mut w.row(row).map(i8::cast_unsigned)))?,
        }
    }
    Ok(())
}

/// An open file whose header was found sound: every tensor lies inside, none overlap, no byte is left over.
#[derive(Debug)]
pub(crate) struct Container {
    path: PathBuf,
    file: File,
    data_start: u64,
    pub(crate) metadata: HashMap<String, String>,
    /// By name, in the order of their place in the file.
    pub(crate) tensors: Vec<(String, TensorInfo)>,
}

impl Container {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |error: std::io::Error| storage(path, &error);
        let mut file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let damaged = |what: String| Error::Checkpoint(format!("{}: {what}; the file is damaged", path.display()));

        if length < 8 {
            return Err(damaged(format!("{length} bytes are too few for a header")));
        }
        let mut prefix = [0; 8];
        file.read_exact(&mut prefix).map_err(io)?;
        let header_len = u64::from_le_bytes(prefix);
        if header_len > MAX_HEADER {
            return Err(damaged(format!("the header claims {header_len} bytes, more than {MAX_HEADER}")));
        }
        let data_start = 8 + header_len;
        if data_start > length {
            return Err(damaged(format!("the header claims {header_len} bytes, the file has {length}")));
        }
        let mut header = vec![0; header_len as usize];
        file.read_exact(&mut header).map_err(io)?;
        let bad_header = |error: serde_json::Error| damaged(format!("the header is no sound JSON: {error}"));
        check_json(&header, MAX_TENSORS, MAX_DIMS).map_err(bad_header)?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(bad_header)?;
        if data_start + metadata.data_len() as u64 != length {
            let expected = u128::from(data_start) + metadata.data_len() as u128;
            return Err(damaged(format!("the header describes {expected} bytes, the file has {length}")));
        }
        let names = metadata.offset_keys().into_iter();
        let tensors = names.filter_map(|name| metadata.info(&name).cloned().map(|info| (name, info))).collect();
        let metadata = metadata.metadata().clone().unwrap_or_default();
        Ok(Container { path: path.to_owned(), file, data_start, metadata, tensors })
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Why a tensor of this type cannot be read, if so.
    pub(crate) fn unreadable(info: &TensorInfo) -> Option<String> {
        let readable = matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64);
        (!readable).then(|| format!("expected F32, F16, BF16 or F64, got {}", info.dtype))
    }

    /// Reads tensor number `i` as f32.
    pub(crate) fn read(&mut self, i: usize) -> Result<Vec<f32>> {
        let dtype = self.tensors[i].1.dtype;
        self.read_by(i, |values, piece| {
            match dtype {
                Dtype::F32 => extend(values, piece, f32::from_le_bytes),
                Dtype::F16 => extend(values, piece, |b| f16::from_le_bytes(b).to_f32()),
                Dtype::BF16 => extend(values, piece, |b| bf16::from_le_bytes(b).to_f32()),
                Dtype::F64 => extend(values, piece, |b| f64::from_le_bytes(b) as f32),
                other => bail!(Internal, "a tensor of type {other} was read as floats"),
            }
            Ok(())
        })
    }

    /// Reads tensor number `i`, which is one of int8.
    pub(crate) fn read_int8(&mut self, i: usize) -> Result<Vec<i8>> {
        self.read_by(i, |values, piece| {
            values.extend(piece.iter().map(|x| x.cast_signed()));
            Ok(())
        })
    }

    /// Reads the bytes of tensor number `i` in pieces.
    fn read_by<V>(&mut self, i: usize, mut add: impl FnMut(&mut Vec<V>, &[u8]) -> Result<()>) -> Result<Vec<V>> {
        let info = &self.tensors[i].1;
        let io = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::Checkpoint(format!("{}: the file became shorter while it was read", self.path.display()))
            }
            _ => storage(&self.path, &error),
        };
        let (start, end) = info.data_offsets;
        self.file.seek(SeekFrom::Start(self.data_start + start as u64)).map_err(io)?;
        let mut values = Vec::new();
        let count: usize = info.shape.iter().product();
        if values.try_reserve_exact(count).is_err() {
            bail!(OutOfMemory, "{}: cannot allocate {count} numbers", self.path.display());
        }
        let mut bytes = vec![0; PIECE.min(end - start)];
        let mut left = end - start;
        while left > 0 {
            parallel(1, |_| ())?; // asks whether to stop
            let piece = &mut bytes[..PIECE.min(left)];
            self.file.read_exact(piece).map_err(io)?;
            left -= piece.len();
            add(&mut values, piece)?;
        }
        Ok(values)
    }
}

fn extend<const N: usize>(values: &mut Vec<f32>, bytes: &[u8], number: impl Fn([u8; N]) -> f32) {
    values.extend(bytes.as_chunks::<N>().0.iter().map(|&b| number(b)));
}

/// Reads a JSON object from outside: no key twice, at any depth.
pub(crate) fn parse_object(what: &str, json: &[u8]) -> Result<serde_json::Map<String, serde_json::Value>> {
    let bad = |error| Error::Checkpoint(format!("{what}: {error}"));
    check_json(json, MAX_TENSORS, usize::MAX).map_err(bad)?;
    match serde_json::from_slice(json).map_err(bad)? {
        serde_json::Value::Object(map) => Ok(map),
        _ => bail!(Checkpoint, "{what}: expected a JSON object"),
    }
}

/// Walks over JSON and keeps nothing: an error where a key comes twice, or where objects or lists are too long.
fn check_json(json: &[u8], max_keys: usize, max_items: usize) -> serde_json::Result<()> {
    #[derive(Clone, Copy)]
    struct Check {
        max_keys: usize,
        max_items: usize,
    }

    impl<'de> DeserializeSeed<'de> for Check {
        type Value = ();
        fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
            deserializer.deserialize_any(self)
        }
    }

    impl<'de> Visitor<'de> for Check {
        type Value = ();
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("JSON")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            let mut keys = HashSet::new();
            while let Some(key) = map.next_key::<String>()? {
                if keys.contains(&key) {
                    return Err(A::Error::custom(format!("the key {key:?} comes twice")));
                }
                if keys.len() > self.max_keys {
                    return Err(A::Error::custom(format!("more than {} keys", self.max_keys)));
                }
                keys.insert(key);
                map.next_value_seed(self)?;
            }
            Ok(())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
            let mut items = 0;
            while seq.next_element_seed(self)?.is_some() {
                items += 1;
                if items > self.max_items {
                    return Err(A::Error::custom(format!("a list of more than {} items", self.max_items)));
                }
            }
            Ok(())
        }
        fn visit_bool<E>(self, _: bool) -> Result<(), E> {
            Ok(())
        }
        fn visit_i64<E>(self, _: i64) -> Result<(), E> {
            Ok(())
        }
        fn visit_u64<E>(self, _: u64) -> Result<(), E> {
            Ok(())
        }
        fn visit_f64<E>(self, _: f64) -> Result<(), E> {
            Ok(())
        }
        fn visit_str<E>(self, _: &str) -> Result<(), E> {
            Ok(())
        }
        fn visit_unit<E>(self) -> Result<(), E> {
            Ok(())
        }
    }

    let mut json = serde_json::Deserializer::from_slice(json);
    Check { max_keys, max_items }.deserialize(&mut json)?;
    json.end()
}
