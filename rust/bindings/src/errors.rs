//! One exception per variant of the core's error.

use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::{PyErr, import_exception};
use transformer_core::error::Error;

import_exception!(transformer_rs.errors, ShapeError);
import_exception!(transformer_rs.errors, ConfigError);
import_exception!(transformer_rs.errors, NonFiniteError);
import_exception!(transformer_rs.errors, CheckpointError);
import_exception!(transformer_rs.errors, DTypeError);
import_exception!(transformer_rs.errors, TokenOutOfRangeError);
import_exception!(transformer_rs.errors, UnsupportedError);
import_exception!(transformer_rs.errors, OutOfMemoryError);
import_exception!(transformer_rs.errors, StorageError);
import_exception!(transformer_rs.errors, PullbackError);
import_exception!(transformer_rs.errors, InternalError);

/// The exception of an error. `core_call().map_err(raise)?` is for what is too quick for [`crate::door::run`].
pub fn raise(error: Error) -> PyErr {
    match error {
        Error::Shape(text) => ShapeError::new_err(text),
        Error::Config(text) => ConfigError::new_err(text),
        Error::NonFinite(text) => NonFiniteError::new_err(text),
        Error::Checkpoint(text) => CheckpointError::new_err(text),
        Error::TokenOutOfRange(text) => TokenOutOfRangeError::new_err(text),
        Error::Unsupported(text) => UnsupportedError::new_err(text),
        Error::OutOfMemory(text) => OutOfMemoryError::new_err(text),
        Error::Storage(text) => StorageError::new_err(text),
        Error::Interrupted => PyKeyboardInterrupt::new_err(()),
        Error::Internal(text) => InternalError::new_err(format!("internal error: {text}; please report it")),
    }
}
