//! Arrays in and out. The Python shim (`_arrays.py`) brings every input into C order, aligned, in native f32, f64,
//! int64 or bool; here they are copied into the engine's own buffers while the interpreter is held.

use crate::errors::{ConfigError, DTypeError, TokenOutOfRangeError, raise};
use crate::pools::{self, Home};
use numpy::{Element, IntoPyArray, PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use transformer_core::checkpoint::{self, Alias, Numbers};
use transformer_core::error::Result;
use transformer_core::kernels::elementwise;
use transformer_core::simd::{Float, room, zeros};
use transformer_core::tape::{Params, Stored};

/// f32 or f64, on both sides of the border.
pub trait Real: Float + Element {
    /// Where the buffers of functions stay.
    fn home() -> Home<Self>;
}

impl Real for f32 {
    fn home() -> Home<f32> {
        pools::of_f32()
    }
}

impl Real for f64 {
    fn home() -> Home<f64> {
        pools::of_f64()
    }
}

/// A float array as an argument.
pub enum Floats<'py> {
    /// Single precision.
    F32(Bound<'py, PyArrayDyn<f32>>),
    /// Double precision.
    F64(Bound<'py, PyArrayDyn<f64>>),
}

impl<'py> FromPyObject<'_, 'py> for Floats<'py> {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(array) = object.cast::<PyArrayDyn<f32>>() {
            return Ok(Floats::F32(array.to_owned()));
        }
        match object.cast::<PyArrayDyn<f64>>() {
            Ok(array) => Ok(Floats::F64(array.to_owned())),
            Err(_) => Err(DTypeError::new_err(format!("expected an f32 or f64 array, got {}", object.get_type()))),
        }
    }
}

impl Floats<'_> {
    /// Whether it is f64.
    pub fn is_double(&self) -> bool {
        matches!(self, Floats::F64(_))
    }

    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        match self {
            Floats::F32(array) => array.shape(),
            Floats::F64(array) => array.shape(),
        }
    }

    /// Reads its values.
    pub fn read<T: Real, R>(&self, read: impl FnOnce(&[T]) -> PyResult<R>) -> PyResult<R> {
        let any = match self {
            Floats::F32(array) => array.as_any(),
            Floats::F64(array) => array.as_any(),
        };
        match any.cast::<PyArrayDyn<T>>() {
            Ok(array) => with_slice(array, read),
            Err(_) => Err(DTypeError::new_err(format!("expected an array of {}, got another float type", T::NAME))),
        }
    }

    /// A copy as it lies.
    pub fn to_vec<T: Real>(&self) -> PyResult<Vec<T>> {
        self.read(|values: &[T]| {
            let mut copy = room(values.len()).map_err(raise)?;
            copy.extend_from_slice(values);
            Ok(copy)
        })
    }
}

/// A copy, made by all threads; Ctrl-C ends it.
pub fn copy<T: Float>(from: &[T]) -> Result<Vec<T>> {
    elementwise::copied(from)
}

/// Reads the values of an array in C order.
pub fn with_slice<T: Element, R>(
    array: &Bound<'_, PyArrayDyn<T>>,
    read: impl FnOnce(&[T]) -> PyResult<R>,
) -> PyResult<R> {
    let array: PyReadonlyArrayDyn<'_, T> =
        array.try_readonly().map_err(|_| DTypeError::new_err("an array is being written by another call"))?;
    match array.as_slice() {
        Ok(values) => read(values),
        Err(_) => Err(DTypeError::new_err("expected an aligned array in C order")),
    }
}

/// Token ids as the engine takes them. The shim has checked them against the vocabulary; this is the last fence.
pub fn token_ids(array: &Bound<'_, PyArray1<i64>>) -> PyResult<Vec<u32>> {
    with_slice(array.to_dyn(), |ids| {
        ids.iter()
            .map(|&id| u32::try_from(id).ok().filter(|&id| id != u32::MAX))
            .collect::<Option<Vec<u32>>>()
            .ok_or_else(|| TokenOutOfRangeError::new_err("token ids: expected ids from 0 to 2^32 - 2"))
    })
}

/// Moves values out as an array of this shape, without a copy.
pub fn to_array<'py, T: Real>(py: Python<'py>, values: Vec<T>, shape: &[usize]) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    values.into_pyarray(py).reshape(shape.to_vec())
}

/// A name, a shape and values.
pub type Owned<T> = (String, Vec<usize>, Vec<T>);

/// Copies of all parameters and statistics of a model: floats, those in bf16 widened, and weights in int8.
pub struct State {
    floats: Vec<Owned<f32>>,
    int8: Vec<Owned<i8>>,
}

impl State {
    /// Copies them.
    pub fn of(params: &Params<f32>) -> Result<Self> {
        let mut state = State { floats: Vec::new(), int8: Vec::new() };
        for (name, shape, numbers) in checkpoint::tensors(params) {
            let (name, shape) = (name.to_owned(), shape.to_vec());
            match numbers {
                Numbers::F32(values) => state.floats.push((name, shape, copy(values)?)),
                Numbers::Bf16(matrix) => {
                    let mut values = zeros(shape.iter().product())?;
                    matrix.values(&mut values)?;
                    state.floats.push((name, shape, values));
                }
                Numbers::Int8(values) => state.int8.push((name, shape, values.values())),
            }
        }
        Ok(state)
    }

    /// Reads them from Python.
    pub fn read(arrays: &Bound<'_, PyDict>) -> PyResult<Self> {
        let mut state = State { floats: Vec::new(), int8: Vec::new() };
        for (name, array) in arrays.iter() {
            let name = name.extract::<String>()?;
            if let Ok(array) = array.cast::<PyArrayDyn<i8>>() {
                let values = with_slice(array, |values| Ok(values.to_vec()))?;
                state.int8.push((name, array.shape().to_vec(), values));
            } else {
                let array: Floats<'_> = array.extract()?;
                state.floats.push((name, array.shape().to_vec(), array.to_vec()?));
            }
        }
        Ok(state)
    }

    /// By name, for Python.
    pub fn give(self, py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
        let dict = named_arrays(py, self.floats)?;
        for (name, shape, values) in self.int8 {
            dict.set_item(name, values.into_pyarray(py).reshape(shape)?)?;
        }
        Ok(dict)
    }

    /// Overwrites all parameters and statistics, or none of them.
    pub fn load_into(&self, params: &mut Params<f32>, aliases: &[Alias<'_>]) -> Result<()> {
        fn named<T>((name, shape, values): &Owned<T>) -> (&str, &[usize], &[T]) {
            (name, shape, values)
        }
        let (floats, int8): (Vec<_>, Vec<_>) =
            (self.floats.iter().map(named).collect(), self.int8.iter().map(named).collect());
        checkpoint::load_state_int8(params, &floats, &int8, aliases)
    }
}

/// What matrices are kept in, by its name.
pub fn stored_in(precision: &str) -> PyResult<Stored> {
    let unknown = || ConfigError::new_err(format!("expected \"f32\", \"bf16\" or \"int8\", got {precision:?}"));
    Stored::of_name(precision).ok_or_else(unknown)
}

/// Arrays by name, for Python.
pub fn named_arrays<T: Real>(py: Python<'_>, arrays: Vec<Owned<T>>) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    for (name, shape, values) in arrays {
        dict.set_item(name, to_array(py, values, &shape)?)?;
    }
    Ok(dict)
}

/// Arrays by name, from Python.
pub fn read_named<T: Real>(arrays: &Bound<'_, PyDict>) -> PyResult<Vec<Owned<T>>> {
    let read = |(name, array): (Bound<'_, PyAny>, Bound<'_, PyAny>)| {
        let array: Floats<'_> = array.extract()?;
        Ok((name.extract::<String>()?, array.shape().to_vec(), array.to_vec::<T>()?))
    };
    arrays.iter().map(read).collect()
}
