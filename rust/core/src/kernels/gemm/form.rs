//! The form in which the factors of a product are multiplied: as they are, or rounded to bf16.

// Loops over vectors read like the formula; iterators would hide it.
#![allow(clippy::needless_range_loop)]

use crate::simd::{Float, Isa, Simd, features, isa};

/// How exactly the factors of a product enter it. Sums and results are never rounded to less than the type holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    #[default]
    Full,
    /// Rounded to the 8 significant bits of bf16 (Kalamkar et al. 2019), the exponents of f32.
    Bf16,
}

impl Precision {
    /// Whether products of bf16 numbers are faster than those of f32 on the path in use.
    pub fn bf16_is_fast() -> bool {
        tiles::<f32>() || pairs::<f32>()
    }
}

/// Whether products of bf16 go by tiles of AMX. (f64 is there for checks of f32, whose pairs would not fit.)
pub(super) fn tiles<T>() -> bool {
    isa() == Ok(Isa::Amx) && size_of::<T>() == size_of::<f32>()
}

/// Whether they go by vectors of pairs.
pub(super) fn pairs<T>() -> bool {
    isa() == Ok(Isa::Avx512) && features().fast_bf16 && size_of::<T>() == size_of::<f32>()
}

/// What packed operands are made of: units of `STEPS` steps along K, each as wide as a `T`.
pub(super) trait Form: Copy + Send + Sync + 'static {
    /// Steps along K in a unit.
    const STEPS: usize;
    /// Packed operands have a multiple of so many units along K, the last ones zeros.
    const BLOCK: usize = 1;
    /// Whether operands may be read where they lie.
    const IN_PLACE: bool;
    /// Whether B is kept in bf16.
    const WIDENS: bool = false;
    /// How packed operands are multiplied.
    type Packed: Form;

    /// Units of LANES columns, from one row of a factor and, with two steps, the row behind it.
    #[inline(always)]
    fn unit<T: Float, S: Simd<T>>(s: S, first: S::V, second: S::V) -> S::V {
        let _ = (s, second);
        first
    }
    /// LANES units of one row that is contiguous along K, from its next numbers and, with two steps, those behind them.
    #[inline(always)]
    fn adjacent<T: Float, S: Simd<T>>(s: S, low: S::V, high: S::V) -> S::V {
        Self::unit(s, low, high)
    }
    /// c + a · b, over the steps of the units.
    #[inline(always)]
    fn multiply_add<T: Float, S: Simd<T>>(s: S, a: S::V, b: S::V, c: S::V) -> S::V {
        s.mul_add(a, b, c)
    }

    /// V vectors of a row of B; where PART, the first `used` lanes of each, and zeros.
    /// # Safety
    /// `b` is valid for reading these.
    #[inline(always)]
    unsafe fn row<T: Float, S: Simd<T>, const V: usize, const PART: bool>(
        s: S,
        b: *const T,
        used: [usize; V],
    ) -> [S::V; V] {
        let mut row = [s.zero(); V];
        for v in 0..V {
            // SAFETY: the caller's promise.
            row[v] = unsafe {
                let b = b.add(v * S::LANES);
                if PART { s.load_ptr_first(b, used[v], T::ZERO) } else { s.load_ptr(b) }
            };
        }
        row
    }

    /// Units of a packed operand with so many steps along K.
    fn units(depth: usize) -> usize {
        depth.div_ceil(Self::STEPS).next_multiple_of(Self::BLOCK)
    }
}

/// Numbers as they are.
#[derive(Clone, Copy)]
pub(super) struct Exact;

/// Numbers rounded to what bf16 holds, for a CPU without its products.
#[derive(Clone, Copy)]
pub(super) struct Rounded;

/// Numbers as they are times a B that is kept in bf16 ([`Bf16Rhs`](super::Bf16Rhs)), widened when it is read.
#[derive(Clone, Copy)]
pub(super) struct Widened;

/// Two bf16 numbers side by side, for [`Simd::dot_pairs`], or in blocks as deep as a tile of AMX.
#[derive(Clone, Copy)]
pub(super) struct Pairs<const BLOCK: usize>;

impl Form for Exact {
    const STEPS: usize = 1;
    const IN_PLACE: bool = true;
    type Packed = Exact;
}

impl Form for Widened {
    const STEPS: usize = 1;
    const IN_PLACE: bool = true;
    const WIDENS: bool = true;
    type Packed = Widened;

    #[inline(always)]
    unsafe fn row<T: Float, S: Simd<T>, const V: usize, const PART: bool>(
        s: S,
        b: *const T,
        _: [usize; V],
    ) -> [S::V; V] {
        // SAFETY: the rows of a panel are whole.
        unsafe { s.load_bf16_ptr(b.cast()) }
    }
}

impl Form for Rounded {
    const STEPS: usize = 1;
    const IN_PLACE: bool = false;
    type Packed = Exact;

    #[inline(always)]
    fn unit<T: Float, S: Simd<T>>(s: S, first: S::V, _: S::V) -> S::V {
        // Dekker's splitting (1971): the upper bits of x, rounded to the nearest. 8 of f32's 24 bits stay.
        let split = s.splat(T::from_f64(2.0 / T::EPSILON.to_f64() / 256.0 + 1.0));
        let scaled = s.mul(first, split);
        let upper = s.sub(scaled, s.sub(scaled, first));
        // What would overflow is infinite, or as good as that for a product.
        s.select(s.lt(s.abs(first), s.splat(T::from_f64(1e33))), upper, first)
    }
}

impl<const BLOCK: usize> Form for Pairs<BLOCK> {
    const STEPS: usize = 2;
    const BLOCK: usize = BLOCK;
    const IN_PLACE: bool = false;
    type Packed = Self;

    #[inline(always)]
    fn unit<T: Float, S: Simd<T>>(s: S, first: S::V, second: S::V) -> S::V {
        // SAFETY: a product takes this form where `pairs` or `tiles` is true; each says that the CPU has AVX-512 BF16.
        unsafe { s.pairs(first, second) }
    }
    #[inline(always)]
    fn adjacent<T: Float, S: Simd<T>>(s: S, low: S::V, high: S::V) -> S::V {
        // SAFETY: as above.
        unsafe { s.adjacent_pairs(low, high) }
    }
    #[inline(always)]
    fn multiply_add<T: Float, S: Simd<T>>(s: S, a: S::V, b: S::V, c: S::V) -> S::V {
        // SAFETY: as above.
        unsafe { s.dot_pairs(a, b, c) }
    }
}
