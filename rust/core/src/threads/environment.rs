//! The floating-point environment of a thread: rounding mode and treatment of subnormal numbers.

use std::marker::PhantomData;

/// The environment of the engine: round to nearest, subnormals kept, exceptions masked. It is the processor's default
/// and the one that the compiler assumes.
const FIXED: u32 = 0x1F80;

/// Sets the engine's environment on this thread and gives the earlier one back when dropped, with its sticky flags.
/// (Only x86-64 so far: elsewhere the caller's environment stays.)
pub(super) struct Environment {
    before: u32,
    this_thread: PhantomData<*const ()>,
}

impl Environment {
    pub(super) fn enter() -> Self {
        Environment { before: replace(FIXED), this_thread: PhantomData }
    }

    /// Runs `body` under the environment found by `enter`.
    pub(super) fn outside<R>(&self, body: impl FnOnce() -> R) -> R {
        let _outside = Environment { before: replace(self.before), this_thread: PhantomData };
        body()
    }
}

impl Drop for Environment {
    fn drop(&mut self) {
        replace(self.before);
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(never)]
fn replace(new: u32) -> u32 {
    let mut old = 0u32;
    // SAFETY: both operands are addresses of live u32 values. The value loaded is the default or one that was read
    // from this register, so no reserved bit is set.
    unsafe {
        std::arch::asm!(
            "stmxcsr [{old}]",
            "ldmxcsr [{new}]",
            old = in(reg) &raw mut old,
            new = in(reg) &raw const new,
            options(nostack),
        );
    }
    old
}

#[cfg(not(target_arch = "x86_64"))]
fn replace(new: u32) -> u32 {
    new
}
