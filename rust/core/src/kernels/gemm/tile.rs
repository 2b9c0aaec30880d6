//! The micro-kernel: a tile of C in registers, one multiply-add per element and step along K.

// Loops over rows, panels and vectors read like the formula; iterators would hide it.
#![allow(clippy::needless_range_loop)]

use super::form::Form;
use crate::simd::{Float, Simd, prefetch};

/// Depth of a block along K, in units of the form: while its panel of B (64 KiB of f32 at most) meets the rows of A, the L2
/// cache gives what the L1 cache lacks; 256 and 384 are no faster. No bit depends on it, because the accumulators of a
/// later block start from C.
pub(super) const KC: usize = 512;

/// Steps along K, 8 KiB of a panel at most, between what a tile multiplies and what it asks for, where the next rows of its own
/// panel are to come from memory: by itself the CPU runs ahead of one stream so little that it reads at half the speed.
pub(super) const AHEAD: usize = 64;
/// The same where a factor is read where it lies, a line or a few of each step: from the L2 cache, or a far L3. More would fall on each
/// other's sets of the L1 cache. Gradients of weights take 1.00 to 1.15 times as long without it (an Intel Xeon).
pub(super) const NEXT: usize = 8;
/// Rows of A that one pointer reaches: it, and a stride and two further on, are addresses of an instruction.
const ROWS_AT: usize = 3;
/// Bytes of a cache line.
const LINE: usize = 64;

/// Where a tile finds its operands. Strides are in elements. Nothing is read or written outside
/// of the tile's `rows` x `k`, `k` x `cols` and `rows` x `cols` elements.
#[derive(Clone, Copy)]
pub(super) struct Operands<T> {
    /// Units along K.
    pub k: usize,
    pub a: *const T,
    pub a_row: usize,
    pub a_k: usize,
    /// From the first of TILE_ROWS rows of A to the first of the next.
    pub a_tile: usize,
    pub b: *const T,
    pub b_k: usize,
    /// From the first column of one panel of B to the first of the next.
    pub b_panel: usize,
    pub c: *mut T,
    pub c_row: usize,
    /// Start from C instead of +0.
    pub accumulate: bool,
    /// What is asked for meanwhile, a row of a panel at each step along K, and from one step to the next. Any address will do.
    pub ahead: *const T,
    pub ahead_k: usize,
}

/// Rows of a tile and panels that it covers side by side, for a block of so many rows of A: one row reads several panels, which
/// come faster from memory than one (two rows with two panels took 1.03 to 1.12 times as long as with one), and many rows are read
/// half as often by tiles half as high and twice as wide. (Those read 10 vectors for 24 multiply-adds instead of 14, which counts
/// where the CPU reads two at a time. They also read B twice as often, which counts below 48 rows. AVX2 lacks the registers.)
pub(super) const fn shape(rows: usize, tile_rows: usize) -> (usize, usize) {
    match rows {
        1 => (1, 4),
        _ if rows >= 8 * WIDE_ROWS && tile_rows == 2 * WIDE_ROWS => (WIDE_ROWS, 2),
        _ => (tile_rows, 1),
    }
}

/// Rows of a tile of two panels.
const WIDE_ROWS: usize = 6;

/// `panels` whole panels of B times `rows` rows of A, as `shape` allows.
/// # Safety
/// The operands are valid as `Operands` says, with C not aliased.
#[inline(always)]
pub(super) unsafe fn whole<T: Float, S: Simd<T>, F: Form>(s: S, rows: usize, panels: usize, o: &Operands<T>) {
    // SAFETY: the caller's promise.
    unsafe {
        // `if const`, so that only what this token needs is compiled.
        if const { S::TILE_VECTORS == 1 } {
            match panels {
                4 => tile::<T, S, F, 1, 4, 1, false>(s, o, 0),
                2 => rows_of::<T, S, F, 2, 1, false>(s, rows, o, 0),
                _ => rows_of::<T, S, F, 1, 1, false>(s, rows, o, 0),
            }
        } else {
            match panels {
                4 => tile::<T, S, F, 1, 4, 2, false>(s, o, 0),
                2 => rows_of::<T, S, F, 2, 2, false>(s, rows, o, 0),
                _ => rows_of::<T, S, F, 1, 2, false>(s, rows, o, 0),
            }
        }
    }
}

/// The first `cols` columns of one panel of B times `rows` rows of A.
/// # Safety
/// As for `whole`.
#[inline(always)]
pub(super) unsafe fn partial<T: Float, S: Simd<T>, F: Form>(s: S, rows: usize, cols: usize, o: &Operands<T>) {
    // SAFETY: the caller's promise.
    unsafe {
        if const { S::TILE_VECTORS == 1 } {
            rows_of::<T, S, F, 1, 1, true>(s, rows, o, cols)
        } else {
            rows_of::<T, S, F, 1, 2, true>(s, rows, o, cols)
        }
    }
}

/// P panels, any number of rows that there are registers for.
#[inline(always)]
unsafe fn rows_of<T: Float, S: Simd<T>, F: Form, const P: usize, const V: usize, const PART: bool>(
    s: S,
    rows: usize,
    o: &Operands<T>,
    cols: usize,
) {
    macro_rules! choose {
        ($($r:literal)*) => {
            match rows {
                $($r => {
                    if const { $r * P <= S::TILE_ROWS } {
                        // SAFETY: the caller's promise.
                        unsafe { tile::<T, S, F, $r, P, V, PART>(s, o, cols) }
                    }
                })*
                _ => unreachable!("more rows than a tile has"),
            }
        };
    }
    choose!(1 2 3 4 5 6 7 8 9 10 11 12)
}

/// R rows, P panels of V vectors; only the first `cols` columns where PART.
#[inline(always)]
unsafe fn tile<T: Float, S: Simd<T>, F: Form, const R: usize, const P: usize, const V: usize, const PART: bool>(
    s: S,
    o: &Operands<T>,
    cols: usize,
) {
    // Columns of vector v that are in use.
    let used = |v: usize| cols.saturating_sub(v * S::LANES).min(S::LANES);
    let used: [usize; V] = std::array::from_fn(used);
    let mut sum = [[[s.zero(); V]; P]; R];
    // SAFETY: the caller's promise; parts of vectors are read and written under masks.
    unsafe {
        if o.accumulate {
            for r in 0..R {
                for p in 0..P {
                    for v in 0..V {
                        let c = o.c.add(r * o.c_row + (p * V + v) * S::LANES);
                        sum[r][p][v] = if PART { s.load_ptr_first(c, used[v], T::ZERO) } else { s.load_ptr(c) };
                    }
                }
            }
        }
        let mut a: [*const T; 4] = std::array::from_fn(|g| opaque(o.a.wrapping_add(ROWS_AT * g * o.a_row)));
        let mut b: [*const T; P] = std::array::from_fn(|p| opaque(o.b.wrapping_add(p * o.b_panel)));
        let mut ahead = o.ahead;
        for _ in 0..o.k {
            // Several panels that are read once are streams enough for the CPU to run ahead of by itself. Where tiles are wide there
            // are more of them, and each asks for less.
            if P == 1 || R > 2 {
                for line in 0..(V * S::LANES * size_of::<T>() / P).div_ceil(LINE) {
                    prefetch(ahead.wrapping_add(line * LINE / size_of::<T>()));
                }
                ahead = ahead.wrapping_add(o.ahead_k);
            }
            // (Where a row's steps lie side by side this asks for what is there, which costs nothing.)
            if R > 2 {
                prefetch(a[0].wrapping_add(NEXT * o.a_k));
            }
            let mut row = [[s.zero(); V]; P];
            for p in 0..P {
                row[p] = F::row::<T, S, V, PART>(s, b[p], used);
                b[p] = b[p].wrapping_add(o.b_k);
            }
            for r in 0..R {
                let x = s.splat(*a[r / ROWS_AT].add(r % ROWS_AT * o.a_row));
                for p in 0..P {
                    for v in 0..V {
                        sum[r][p][v] = F::multiply_add(s, x, row[p][v], sum[r][p][v]);
                    }
                }
            }
            for g in 0..R.div_ceil(ROWS_AT) {
                a[g] = opaque(a[g].wrapping_add(o.a_k));
            }
        }
        for r in 0..R {
            for p in 0..P {
                for v in 0..V {
                    let c = o.c.add(r * o.c_row + (p * V + v) * S::LANES);
                    if PART { s.store_ptr_first(sum[r][p][v], c, used[v]) } else { s.store_ptr(sum[r][p][v], c) }
                }
            }
        }
    }
}

/// Asks for the tile of C that comes next: a chain goes on from C, so a tile cannot begin without it. (Addresses past the
/// end of C are harmless.)
#[inline(always)]
pub(super) fn prefetch_c<T: Float, S: Simd<T>>(_: S, c: *const T, c_row: usize) {
    for r in 0..S::TILE_ROWS {
        for v in 0..S::TILE_VECTORS {
            prefetch(c.wrapping_add(r * c_row + v * S::LANES));
        }
        prefetch(c.wrapping_add(r * c_row + S::TILE_VECTORS * S::LANES - 1));
    }
}

/// The same pointer, its origin hidden: else the compiler derives the rows' addresses from each other, step by step.
#[inline(always)]
#[allow(clippy::pointers_in_nomem_asm_block)]
pub(in crate::kernels) fn opaque<T>(p: *const T) -> *const T {
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    {
        let mut p = p;
        // SAFETY: no instruction at all.
        unsafe { std::arch::asm!("/* {0} */", inout(reg) p, options(pure, nomem, nostack, preserves_flags)) };
        p
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    p
}
