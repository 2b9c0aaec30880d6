//! One error type for the whole core; the binding maps each variant to one Python exception.

use std::fmt;

/// What went wrong. The text names the operation, the argument, what was expected, what came, and a remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Sizes that do not fit each other.
    #[error("{0}")]
    Shape(String),
    /// A setting outside its domain, or settings that exclude each other.
    #[error("{0}")]
    Config(String),
    /// NaN or infinity where training or decoding cannot go on.
    #[error("{0}")]
    NonFinite(String),
    /// A checkpoint that is damaged or belongs to something else.
    #[error("{0}")]
    Checkpoint(String),
    /// A token id outside the vocabulary.
    #[error("{0}")]
    TokenOutOfRange(String),
    /// Valid, but not available.
    #[error("{0}")]
    Unsupported(String),
    /// An allocation the machine cannot serve.
    #[error("{0}")]
    OutOfMemory(String),
    /// The file system refused.
    #[error("{0}")]
    Storage(String),
    /// The caller asked to stop (Ctrl-C).
    #[error("interrupted")]
    Interrupted,
    /// A defect of this crate: a panic caught at the door or inside a task.
    #[error("internal error: {0}")]
    Internal(String),
}

/// A shape in an error, as NumPy writes it: `(2, 3)`, `(4,)`, `()`.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a>(pub &'a [usize]);

impl fmt::Display for Shape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.0 {
            [one] => write!(f, "({one},)"),
            all => write!(f, "({})", all.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")),
        }
    }
}

/// Shorthand for results of the core.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Returns early with `Error::$variant(format!(..))`.
#[macro_export]
macro_rules! bail {
    ($variant:ident, $($text:tt)+) => {
        return Err($crate::error::Error::$variant(format!($($text)+)))
    };
}

/// Returns early with `Error::$variant(format!(..))` unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $variant:ident, $($text:tt)+) => {
        if !$condition {
            $crate::bail!($variant, $($text)+);
        }
    };
}
