//! Thread control and what this build is.

use crate::door;
use crate::errors::raise;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use transformer_core::{simd, threads};

/// Sets the number of threads of the process; 0 means all.
#[pyfunction]
pub fn set_num_threads(n: usize) -> PyResult<()> {
    threads::set_num_threads(n).map_err(raise)
}

/// The number of threads that the next call from this context uses.
#[pyfunction]
pub fn get_num_threads(py: Python<'_>) -> PyResult<usize> {
    match door::context_limit(py)? {
        Some(n) => Ok(threads::with_local_limit(n, threads::num_threads)),
        None => threads::try_num_threads().map_err(raise),
    }
}

/// Version, instruction set, threads, compiler and libraries.
#[pyfunction]
pub fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    let features = simd::features();
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("isa", simd::isa().map_err(raise)?.name())?;
    info.set_item("best_isa", features.best.name())?;
    info.set_item("avx512_bf16", features.avx512_bf16)?;
    info.set_item("avx512_vnni", features.avx512_vnni)?;
    info.set_item("threads", get_num_threads(py)?)?;
    info.set_item("target", env!("BUILD_TARGET"))?;
    info.set_item("profile", env!("BUILD_PROFILE"))?;
    info.set_item("rustc", env!("BUILD_RUSTC"))?;
    let libraries = PyDict::new(py);
    libraries.set_item("pyo3", env!("BUILD_PYO3"))?;
    libraries.set_item("numpy", env!("BUILD_NUMPY"))?;
    libraries.set_item("ndarray", env!("BUILD_NDARRAY"))?;
    libraries.set_item("rayon", env!("BUILD_RAYON"))?;
    libraries.set_item("safetensors", env!("BUILD_SAFETENSORS"))?;
    info.set_item("libraries", libraries)?;
    Ok(info)
}
