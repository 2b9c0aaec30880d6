//! Tiles of AMX: a CPU's eight registers of 16 rows of 64 bytes, and its products of two of them.
//!
//! Who has them: Intel's servers since Sapphire Rapids (2023), where Linux allows them to a process that asks. The operations
//! are written out in assembly, because their intrinsics are not stable yet.
//!
//! **State.** Tiles have shapes, set by `ldtilecfg` on the thread that uses them. No compiled code touches either, and the
//! system keeps both for each thread, signals included; so they live from one piece of assembly to the next. [`Tiles`] is
//! that time: made at the start of a task, dropped at its end, so that no switch of threads carries 8 KiB for nothing.

use std::arch::asm;
use std::marker::PhantomData;

/// Rows and columns of a block of C, two tiles by two.
pub const BLOCK: usize = 32;
/// Units of four bytes in a row of a tile: the depth that one instruction multiplies.
pub const DEPTH: usize = 16;

/// What a unit of four bytes is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Units {
    /// Two bf16 numbers, with sums in f32.
    Pairs,
    /// Four bytes, signed in A and unsigned in B, with sums in i32.
    Bytes,
}

/// A block of C = \[C +\] A · B. Distances are in units and numbers of four bytes.
#[derive(Debug, Clone, Copy)]
pub struct Operands {
    /// Units along K, in tiles of [`DEPTH`].
    pub tiles: usize,
    /// `rows` rows of `tiles` · [`DEPTH`] units.
    pub a: *const u32,
    /// From one row of A to the next.
    pub a_row: usize,
    /// `tiles` · [`DEPTH`] rows of [`BLOCK`] units, without gaps.
    pub b: *const u32,
    /// `rows` rows of `cols` sums.
    pub c: *mut u32,
    /// From one row of C to the next.
    pub c_row: usize,
    /// Rows, 1 to [`BLOCK`].
    pub rows: usize,
    /// Columns, 1 to [`BLOCK`].
    pub cols: usize,
    /// Start from C instead of 0.
    pub accumulate: bool,
}

/// Whether the CPU has tiles, for bf16 and for bytes, and the system lets this process use them.
pub(super) fn usable() -> bool {
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25; // AMX-BF16, AMX-TILE, AMX-INT8
    let has = || std::arch::x86_64::__cpuid_count(7, 0).edx & FEATURES == FEATURES;
    std::arch::x86_64::__cpuid(0).eax >= 7 && has() && allowed()
}

/// Asks Linux for the tiles' state, for all threads of this process and its children. It may refuse, for example where a
/// thread handles signals on a stack too small for that state.
fn allowed() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const XTILEDATA: u64 = 18;
        let answer: i64;
        // SAFETY: a system call that reads and writes no memory.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL => answer, in("rdi") ARCH_REQ_XCOMP_PERM, in("rsi") XTILEDATA,
                lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        answer == 0
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The tiles of this thread, while a task needs them.
pub struct Tiles {
    /// Rows and columns of the block that they are shaped for.
    shape: (usize, usize),
    /// Registers do not go to another thread.
    here: PhantomData<*mut ()>,
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Tiles {
    /// # Safety
    /// [`isa`](super::isa) is [`Amx`](super::Isa::Amx).
    pub unsafe fn new() -> Self {
        Tiles { shape: (0, 0), here: PhantomData }
    }

    /// The second tile of a block, down or across: where it begins, and its rows or columns. Where there is none it lies on
    /// the first, which is stored after it.
    fn second(len: usize) -> (usize, usize) {
        if len > DEPTH { (DEPTH, len - DEPTH) } else { (0, len) }
    }

    fn shape(&mut self, rows: usize, cols: usize) {
        if self.shape == (rows, cols) {
            return;
        }
        self.shape = (rows, cols);
        let rows = [rows.min(DEPTH), Self::second(rows).1].map(|rows| rows as u8);
        let cols = [cols.min(DEPTH), Self::second(cols).1].map(|cols| cols as u16 * 4);
        let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        // C in tiles 0 to 3, row by row; A in 4 and 5, B in 6 and 7.
        shapes.rows[..8].copy_from_slice(&[rows[0], rows[0], rows[1], rows[1], rows[0], rows[1], 16, 16]);
        shapes.row_bytes[..8].copy_from_slice(&[cols[0], cols[1], cols[0], cols[1], 64, 64, cols[0], cols[1]]);
        // SAFETY: the CPU has tiles, as `new` was promised.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, preserves_flags, readonly)) };
    }

    /// A block of C. Along K the units of each tile are summed up from 0, then added to C; rows and columns that a block has
    /// or lacks show in no other.
    /// # Safety
    /// The operands are valid as [`Operands`] says, with C not aliased.
    #[inline]
    pub unsafe fn multiply(&mut self, units: Units, o: &Operands) {
        debug_assert!((1..=BLOCK).contains(&o.rows) && (1..=BLOCK).contains(&o.cols) && o.tiles > 0);
        self.shape(o.rows, o.cols);
        let (down, across) = (Self::second(o.rows).0, Self::second(o.cols).0);
        macro_rules! multiply {
            ($product:literal) => {
                asm!(
                    "test {from_c:e}, {from_c:e}",
                    "jz 2f",
                    "tileloadd tmm0, [{c0} + {c_row}]",
                    "tileloadd tmm1, [{c1} + {c_row}]",
                    "tileloadd tmm2, [{c2} + {c_row}]",
                    "tileloadd tmm3, [{c3} + {c_row}]",
                    "jmp 3f",
                    "2:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "3:",
                    "tileloadd tmm4, [{a0} + {a_row}]",
                    "tileloadd tmm6, [{b} + {b_row}]",
                    "tileloadd tmm7, [{b} + {b_row} + 64]",
                    "tileloadd tmm5, [{a1} + {a_row}]",
                    concat!($product, " tmm0, tmm4, tmm6"),
                    concat!($product, " tmm1, tmm4, tmm7"),
                    concat!($product, " tmm2, tmm5, tmm6"),
                    concat!($product, " tmm3, tmm5, tmm7"),
                    "add {a0}, 64",
                    "add {a1}, 64",
                    "add {b}, 2048",
                    "dec {tiles}",
                    "jnz 3b",
                    "tilestored [{c3} + {c_row}], tmm3",
                    "tilestored [{c2} + {c_row}], tmm2",
                    "tilestored [{c1} + {c_row}], tmm1",
                    "tilestored [{c0} + {c_row}], tmm0",
                    from_c = in(reg) u32::from(o.accumulate),
                    tiles = inout(reg) o.tiles => _,
                    a0 = inout(reg) o.a => _,
                    a1 = inout(reg) o.a.wrapping_add(down * o.a_row) => _,
                    a_row = in(reg) o.a_row * 4,
                    b = inout(reg) o.b => _,
                    b_row = in(reg) BLOCK * 4,
                    c0 = in(reg) o.c,
                    c1 = in(reg) o.c.wrapping_add(across),
                    c2 = in(reg) o.c.wrapping_add(down * o.c_row),
                    c3 = in(reg) o.c.wrapping_add(down * o.c_row + across),
                    c_row = in(reg) o.c_row * 4,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            };
        }
        // SAFETY: the caller's promise, and `new`'s that the CPU has tiles.
        unsafe {
            match units {
                Units::Pairs => multiply!("tdpbf16ps"),
                Units::Bytes => multiply!("tdpbsud"),
            }
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: as in `shape`; without shapes it does nothing.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
