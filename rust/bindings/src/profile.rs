//! Where the time goes, for Python.

use crate::door;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::time::Duration;
use transformer_core::profile::{self, Row, peak, table};
use transformer_core::threads::{MAX_THREADS, num_threads};

/// How long each rate of the machine is measured for a table.
const MEASURE: Duration = Duration::from_millis(200);

/// What operations took between `start` and `stop`, in all threads.
#[pyclass(module = "transformer_rs._core")]
#[derive(Default)]
pub struct Profile {
    /// What the process had measured at `start`, while running.
    before: Option<Vec<Row>>,
    rows: Vec<Row>,
}

/// What so many threads can do, each rate measured for about `seconds`: GFLOP/s, GB/s read and copied.
#[pyfunction]
#[pyo3(name = "peak")]
pub fn machine_peak(py: Python<'_>, threads: usize, seconds: f64) -> PyResult<Bound<'_, PyDict>> {
    let time = Duration::try_from_secs_f64(seconds).unwrap_or(MEASURE);
    let peak = door::run(py, || peak::measure(threads.clamp(1, MAX_THREADS), time))?;
    let dict = PyDict::new(py);
    for (name, rate) in [("gflops", peak.flops), ("read", peak.read), ("copy", peak.copy)] {
        dict.set_item(name, rate / 1e9)?;
    }
    Ok(dict)
}

#[pymethods]
impl Profile {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// All that this process has measured.
    #[staticmethod]
    fn of_process() -> Self {
        Profile { before: None, rows: profile::rows() }
    }

    /// Begins anew.
    fn start(&mut self) {
        if self.before.replace(profile::rows()).is_none() {
            profile::start();
        }
        self.rows.clear();
    }

    /// Ends it; once more does nothing.
    fn stop(&mut self) {
        if let Some(before) = self.before.take() {
            profile::stop();
            self.rows = profile::since(&before);
        }
    }

    /// One dictionary for each operation, pass and sizes.
    #[getter]
    fn rows<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let dict = |row: &Row| {
            let dict = PyDict::new(py);
            dict.set_item("operation", row.op)?;
            dict.set_item("part", row.part)?;
            dict.set_item("pass", row.pass.name())?;
            dict.set_item("sizes", row.sizes.iter().filter(|&&n| n > 0).collect::<Vec<_>>())?;
            dict.set_item("calls", row.calls)?;
            dict.set_item("rows", row.work.rows)?;
            dict.set_item("seconds", row.seconds)?;
            dict.set_item("flops", row.work.flops)?;
            dict.set_item("bytes", row.work.bytes)?;
            Ok(dict)
        };
        PyList::new(py, self.rows.iter().map(dict).collect::<PyResult<Vec<_>>>()?)
    }

    /// The rows as text; what the machine can do is measured for it.
    fn table(&self, py: Python<'_>) -> PyResult<String> {
        let rows = &self.rows;
        // Without the memory to measure, there are no shares.
        door::run(py, || Ok(table(rows, peak::measure(num_threads(), MEASURE).ok().as_ref())))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        if self.before.is_some() {
            profile::stop();
        }
    }
}
