//! NumPy in, NumPy out: the Python border of `transformer_core`.

use pyo3::prelude::*;

/// The compiled part of `transformer_rs`.
#[pymodule]
mod _core {
    #[pymodule_export]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
