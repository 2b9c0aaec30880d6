//! Vector code written once and run by the best instructions of the machine.
//!
//! A kernel is one function body, generic over a token `S: Simd<T>`; [`kernel!`](crate::kernel) turns it into a plain
//! function that picks the token: [`Portable`] anywhere, `Avx2` (8 lanes) or `Avx512` (16 lanes) where the CPU has them,
//! `Portable` always for f64. Products of bf16 and int8 have tiles beside it, in [`amx`]. Each lane is computed alone and correctly rounded, so the bits of an element depend on the
//! path taken, never on where in a vector, row or tail it stands.
//!
//! ```
//! use transformer_core::{kernel, simd::{Float, Simd}};
//!
//! kernel! {
//!     /// y = max(x, 0) + b, element by element.
//!     pub fn relu_plus<'a, T>(s: S; y: &'a mut [T], x: &'a [T], b: T) {
//!         let (b, zero) = (s.splat(b), s.zero());
//!         for (y, x) in y.chunks_mut(S::LANES).zip(x.chunks(S::LANES)) {
//!             // `load_first` and `store_first` take what the slice has, at most LANES: whole vectors and tails alike.
//!             s.store_first(s.add(s.max(s.load_first(x, T::ZERO), zero), b), y);
//!         }
//!     }
//! }
//!
//! let mut y = [0.0f32; 5];
//! relu_plus(&mut y, &[1.0, -2.0, 3.0, -4.0, 5.0], 0.5);
//! assert_eq!(y, [1.5, 0.5, 3.5, 0.5, 5.5]);
//! ```
//!
//! Rules for bodies: helpers that take `s` are `#[inline(always)]`, closures that use `s` carry `#[inline(always)]` too
//! (a function that is not inlined loses the instructions and runs ten times slower); no `std` float function that ends in
//! the platform's libm (`exp`, `ln`, `powf`, `tanh`, `sin`, `round`, `mul_add`, ...): see [`math`] and [`Float`].

mod buffer;
pub mod bytes;
mod dispatch;
mod float;
mod keeping;
pub mod math;
mod portable;

#[cfg(target_arch = "x86_64")]
pub mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

#[cfg(test)]
mod tests;

pub use buffer::{Buffer, room, zeros};
pub use dispatch::{Features, Isa, features, isa, l1_ways};
pub use float::Float;
pub use keeping::Keeping;
pub use portable::Portable;

/// A computation that runs with whatever token it is given.
pub trait Kernel<T: Float> {
    /// What it returns.
    type Output;
    /// The body; implementations are `#[inline(always)]`.
    fn run<S: Simd<T>>(self, s: S) -> Self::Output;
}

/// No token has more lanes than this.
pub const MAX_LANES: usize = 16;

/// A token: proof that the CPU has the instructions behind its methods. All of them are `#[inline(always)]`.
pub trait Simd<T: Float>: Copy + Send + Sync + 'static {
    /// Numbers in a vector.
    const LANES: usize;
    /// Rows of the register tile of a matrix product.
    const TILE_ROWS: usize;
    /// Vectors in a row of that tile.
    const TILE_VECTORS: usize;
    /// A vector.
    type V: Copy;
    /// One truth value per lane.
    type M: Copy;

    /// All lanes `x`.
    fn splat(self, x: T) -> Self::V;

    /// Reads LANES numbers.
    /// # Safety
    /// `p` is valid for reading LANES numbers; no alignment is asked for.
    unsafe fn load_ptr(self, p: *const T) -> Self::V;
    /// Writes LANES numbers.
    /// # Safety
    /// `p` is valid for writing LANES numbers; no alignment is asked for.
    unsafe fn store_ptr(self, v: Self::V, p: *mut T);
    /// Reads `n` ≤ LANES numbers, the other lanes are `fill`; memory behind them is not touched.
    /// # Safety
    /// `n` ≤ LANES and `p` is valid for reading `n` numbers.
    unsafe fn load_ptr_first(self, p: *const T, n: usize, fill: T) -> Self::V;
    /// Writes the first `n` ≤ LANES lanes; memory behind them is not touched.
    /// # Safety
    /// `n` ≤ LANES and `p` is valid for writing `n` numbers.
    unsafe fn store_ptr_first(self, v: Self::V, p: *mut T, n: usize);
    /// Reads V = TILE_VECTORS vectors of bf16 numbers: lane i of vector v stands at i V + v.
    /// # Safety
    /// `p` is valid for reading V · LANES of them; no alignment is asked for.
    unsafe fn load_bf16_ptr<const V: usize>(self, p: *const u16) -> [Self::V; V];
    /// Transposes a square of LANES x LANES: the number at (i, j) of `src` goes to (j, i) of `dst`. Of fewer `rows` the last
    /// one is repeated.
    /// # Safety
    /// 0 < `rows` ≤ LANES; `src` is valid for reading so many rows of LANES numbers that are `src_stride` apart, `dst` for
    /// writing LANES of them likewise.
    unsafe fn transpose_ptr(self, src: *const T, src_stride: usize, rows: usize, dst: *mut T, dst_stride: usize);

    /// a + b
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, fused except on the portable path.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// c − a · b, fused except on the portable path.
    fn neg_mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a < b ? a : b, so b where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// a > b ? a : b, so b where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// √a, correctly rounded.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// |a|
    fn abs(self, a: Self::V) -> Self::V;
    /// −a
    fn neg(self, a: Self::V) -> Self::V;
    /// The nearest integer, ties to even; a zero may lose its sign.
    fn round(self, a: Self::V) -> Self::V;
    /// a · 2ⁿ for integral n; a and the result must be normal numbers.
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V;

    /// a < b
    fn lt(self, a: Self::V, b: Self::V) -> Self::M;
    /// a ≤ b
    fn le(self, a: Self::V, b: Self::V) -> Self::M;
    /// a = b
    fn eq(self, a: Self::V, b: Self::V) -> Self::M;
    /// The opposite.
    fn not(self, a: Self::M) -> Self::M;
    /// Whether one lane is true.
    fn any(self, m: Self::M) -> bool;
    /// The first `n` lanes true, n ≤ LANES.
    fn first(self, n: usize) -> Self::M;
    /// m ? yes : no
    fn select(self, m: Self::M, yes: Self::V, no: Self::V) -> Self::V;

    /// The sum by one fixed tree: the upper half is added to the lower half until one lane is left.
    fn reduce_sum(self, v: Self::V) -> T;
    /// The largest lane, none of them NaN.
    fn reduce_max(self, v: Self::V) -> T;

    /// sums[i] += (lane i)², in f64; there are LANES sums.
    fn add_squares(self, v: Self::V, sums: &mut [f64]);

    /// The dropout mask: lane i is `keep_scalar(row_key, first_column + i, threshold)`, the same on every path and type.
    fn keep(self, row_key: [u32; 2], first_column: u32, threshold: u32) -> Self::M;

    /// Whether the path can have [`dot_pairs`](Simd::dot_pairs) and what makes its operands; the CPU must have them too
    /// ([`Features::avx512_bf16`]).
    const PAIRS: bool = false;
    /// Lane i holds two bf16 numbers, the rounded lanes i of `first` and `second`.
    /// # Safety
    /// `PAIRS`, and the CPU has [`Features::avx512_bf16`], which the token does not prove.
    unsafe fn pairs(self, first: Self::V, second: Self::V) -> Self::V {
        let _ = (first, second);
        unreachable!("no pairs of bf16 on this path")
    }
    /// Lane i holds two bf16 numbers, the rounded lanes 2 i and 2 i + 1 of `low` followed by `high`.
    /// # Safety
    /// As of [`pairs`](Simd::pairs).
    unsafe fn adjacent_pairs(self, low: Self::V, high: Self::V) -> Self::V {
        let _ = (low, high);
        unreachable!("no pairs of bf16 on this path")
    }
    /// c + a₀ b₀ + a₁ b₁ for the pairs in a and b.
    /// # Safety
    /// As of [`pairs`](Simd::pairs).
    unsafe fn dot_pairs(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let _ = (a, b, c);
        unreachable!("no pairs of bf16 on this path")
    }

    /// All lanes +0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(T::ZERO)
    }
    /// The first LANES numbers of `x`, which must have them.
    #[inline(always)]
    fn load(self, x: &[T]) -> Self::V {
        let x = &x[..Self::LANES];
        // SAFETY: the slice has LANES numbers.
        unsafe { self.load_ptr(x.as_ptr()) }
    }
    /// Writes the first LANES numbers of `y`, which must have them.
    #[inline(always)]
    fn store(self, v: Self::V, y: &mut [T]) {
        let y = &mut y[..Self::LANES];
        // SAFETY: the slice has LANES numbers.
        unsafe { self.store_ptr(v, y.as_mut_ptr()) }
    }
    /// The first min(len, LANES) numbers of `x`, then `fill`.
    #[inline(always)]
    fn load_first(self, x: &[T], fill: T) -> Self::V {
        if x.len() >= Self::LANES {
            self.load(x)
        } else {
            // SAFETY: fewer than LANES numbers, all inside the slice.
            unsafe { self.load_ptr_first(x.as_ptr(), x.len(), fill) }
        }
    }
    /// Writes the first min(len, LANES) numbers of `y`.
    #[inline(always)]
    fn store_first(self, v: Self::V, y: &mut [T]) {
        if y.len() >= Self::LANES {
            self.store(v, y)
        } else {
            // SAFETY: fewer than LANES numbers, all inside the slice.
            unsafe { self.store_ptr_first(v, y.as_mut_ptr(), y.len()) }
        }
    }
}

/// Asks for the cache line at `p`, which may be any address, to be read soon.
#[inline(always)]
pub fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 CPU has the instruction; it reads nothing and never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

const KEEP_MULTIPLIERS: [u32; 2] = [0x85d0_59ad, 0xc2f1_64b5];

/// Whether dropout keeps the element of this column: false with probability `threshold` / 2³², decided by a hash of the
/// column and the two key words of its row. The key words must be well mixed already; the columns need not.
#[inline(always)]
pub fn keep_scalar(row_key: [u32; 2], column: u32, threshold: u32) -> bool {
    let mut h = column ^ row_key[0];
    h = (h ^ (h >> 16)).wrapping_mul(KEEP_MULTIPLIERS[0]);
    h = h.wrapping_add(row_key[1]);
    h = (h ^ (h >> 15)).wrapping_mul(KEEP_MULTIPLIERS[1]);
    h ^= h >> 16;
    // As signed numbers: the only comparison AVX2 has. The hash is as uniform in that order as in the other.
    (h as i32) >= keep_bound(threshold)
}

#[inline(always)]
fn keep_bound(threshold: u32) -> i32 {
    (threshold ^ 0x8000_0000) as i32
}

/// Declares a public function whose body runs with the best token: `fn name<'a, T>(s: S; args) -> R { body }` becomes
/// `fn name<'a, T: Float>(args) -> R`, and inside the body `s` is the token, `S` its type. More type parameters may follow
/// `T`, each with one bound: `<'a, T, A: Activation>`. Borrowed arguments need their lifetime written out. The module's
/// documentation has an example and the rules for bodies.
#[macro_export]
macro_rules! kernel {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$($life:lifetime,)* $T:ident $(, $G:ident: $bound:path)* $(,)?>
        ($s:ident: $S:ident; $($arg:ident: $ty:ty),* $(,)?) $(-> $R:ty)? $body:block
    ) => {
        $(#[$meta])*
        // One copy in the whole program: a generic function that may be inlined is compiled again in every crate.
        #[inline(never)]
        $vis fn $name<$($life,)* $T: $crate::simd::Float $(, $G: $bound)*>($($arg: $ty),*) $(-> $R)? {
            struct Run<$($life,)* $T: $crate::simd::Float $(, $G: $bound)*> {
                $($arg: $ty,)*
                types: ::core::marker::PhantomData<($(&$life (),)* $T, $($G,)*)>,
            }
            impl<$($life,)* $T: $crate::simd::Float $(, $G: $bound)*> $crate::simd::Kernel<$T> for Run<$($life,)* $T $(, $G)*> {
                type Output = $crate::kernel!(@output $($R)?);
                #[inline(always)]
                fn run<$S: $crate::simd::Simd<$T>>(self, $s: $S) -> Self::Output {
                    let Run { $($arg,)* .. } = self;
                    $body
                }
            }
            $T::dispatch(Run::<$($life,)* $T $(, $G)*> { $($arg,)* types: ::core::marker::PhantomData })
        }
    };
    (@output) => { () };
    (@output $R:ty) => { $R };
}
