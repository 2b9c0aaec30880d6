//! Eight lanes of AVX2 with FMA.

use std::arch::x86_64::*;

use super::{KEEP_MULTIPLIERS, Kernel, Simd, keep_bound};

/// Proof of AVX2 and FMA.
#[derive(Debug, Clone, Copy)]
pub struct Avx2(());

/// Runs a kernel compiled for AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) fn run<K: Kernel<f32>>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

/// A window of eight, starting at 8 − n, has its first n entries set.
static WINDOW: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

/// Methods that are a few intrinsics each.
macro_rules! intrinsics {
    ($($name:ident($($arg:ident: $ty:ty),*) -> $R:ty = $body:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $ty),*) -> $R {
            // SAFETY: a token exists only where `run` made it, under its target features.
            unsafe { $body }
        }
    )*};
}
pub(super) use intrinsics;

impl Simd<f32> for Avx2 {
    const LANES: usize = 8;
    const TILE_ROWS: usize = 6;
    const TILE_VECTORS: usize = 2;
    type V = __m256;
    type M = __m256;

    intrinsics! {
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        neg_mul_add(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fnmadd_ps(a, b, c);
        min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        sqrt(a: __m256) -> __m256 = _mm256_sqrt_ps(a);
        abs(a: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
        neg(a: __m256) -> __m256 = _mm256_xor_ps(_mm256_set1_ps(-0.0), a);
        round(a: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale2(a: __m256, n: __m256) -> __m256 = {
            let exponent = _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent))
        };
        lt(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_LT_OQ>(a, b);
        le(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_LE_OQ>(a, b);
        eq(a: __m256, b: __m256) -> __m256 = _mm256_cmp_ps::<_CMP_EQ_OQ>(a, b);
        not(a: __m256) -> __m256 = _mm256_xor_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(-1)));
        any(m: __m256) -> bool = _mm256_movemask_ps(m) != 0;
        first(n: usize) -> __m256 = _mm256_castsi256_ps(window(n));
        select(m: __m256, yes: __m256, no: __m256) -> __m256 = _mm256_blendv_ps(no, yes, m);
        reduce_sum(v: __m256) -> f32 = {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        };
        reduce_max(v: __m256) -> f32 = {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        };
        add_squares(v: __m256, sums: &mut [f64]) -> () = {
            let halves = [_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v)];
            for (sums, half) in sums[..8].chunks_exact_mut(4).zip(halves) {
                let x = _mm256_cvtps_pd(half);
                let sum = _mm256_add_pd(_mm256_loadu_pd(sums.as_ptr()), _mm256_mul_pd(x, x));
                _mm256_storeu_pd(sums.as_mut_ptr(), sum);
            }
        };
        keep(row_key: [u32; 2], first_column: u32, threshold: u32) -> __m256 = {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let column = _mm256_add_epi32(_mm256_set1_epi32(first_column as i32), lane);
            let h = _mm256_xor_si256(column, _mm256_set1_epi32(row_key[0] as i32));
            let h = _mm256_xor_si256(h, _mm256_srli_epi32::<16>(h));
            let h = _mm256_mullo_epi32(h, _mm256_set1_epi32(KEEP_MULTIPLIERS[0] as i32));
            let h = _mm256_add_epi32(h, _mm256_set1_epi32(row_key[1] as i32));
            let h = _mm256_xor_si256(h, _mm256_srli_epi32::<15>(h));
            let h = _mm256_mullo_epi32(h, _mm256_set1_epi32(KEEP_MULTIPLIERS[1] as i32));
            let h = _mm256_xor_si256(h, _mm256_srli_epi32::<16>(h));
            let dropped = _mm256_cmpgt_epi32(_mm256_set1_epi32(keep_bound(threshold)), h);
            _mm256_castsi256_ps(_mm256_xor_si256(dropped, _mm256_set1_epi32(-1)))
        };
    }

    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's promise; the token vouches for AVX.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: __m256, p: *mut f32) {
        // SAFETY: the caller's promise; the token vouches for AVX.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_ptr_first(self, p: *const f32, n: usize, fill: f32) -> __m256 {
        // SAFETY: masked lanes are not read, the others are the caller's promise.
        unsafe { self.select(self.first(n), _mm256_maskload_ps(p, window(n)), self.splat(fill)) }
    }
    #[inline(always)]
    unsafe fn store_ptr_first(self, v: __m256, p: *mut f32, n: usize) {
        // SAFETY: masked lanes are not written, the others are the caller's promise.
        unsafe { _mm256_maskstore_ps(p, window(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr<const V: usize>(self, p: *const u16) -> [__m256; V] {
        debug_assert!(V == 2);
        // SAFETY: the caller's promise; the token vouches for AVX2.
        unsafe {
            let both = _mm256_loadu_si256(p.cast());
            let mut numbers = [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(both)); V];
            numbers[V - 1] = _mm256_and_ps(_mm256_castsi256_ps(both), _mm256_castsi256_ps(_mm256_set1_epi32(!0xffff)));
            numbers
        }
    }
    #[inline(always)]
    unsafe fn transpose_ptr(self, src: *const f32, src_stride: usize, rows: usize, dst: *mut f32, dst_stride: usize) {
        // SAFETY: the caller's promise; the token vouches for AVX.
        unsafe { transpose(src, src_stride, rows, dst, dst_stride) }
    }
}

/// A square of 8 x 8: pairs, then fours within each half, then the halves.
/// # Safety
/// As `Simd::transpose_ptr` for eight lanes, on a CPU with AVX.
#[inline(always)]
unsafe fn transpose(src: *const f32, src_stride: usize, rows: usize, dst: *mut f32, dst_stride: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let row: [__m256; 8] = std::array::from_fn(
            #[inline(always)]
            |i| _mm256_loadu_ps(src.add(i.min(rows - 1) * src_stride)),
        );
        let mut four = [_mm256_setzero_ps(); 8];
        for h in 0..2 {
            let [a, b, c, d] = [row[4 * h], row[4 * h + 1], row[4 * h + 2], row[4 * h + 3]];
            let (ab_low, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let (cd_low, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            four[4 * h] = _mm256_shuffle_ps::<0x44>(ab_low, cd_low);
            four[4 * h + 1] = _mm256_shuffle_ps::<0xee>(ab_low, cd_low);
            four[4 * h + 2] = _mm256_shuffle_ps::<0x44>(ab_high, cd_high);
            four[4 * h + 3] = _mm256_shuffle_ps::<0xee>(ab_high, cd_high);
        }
        for i in 0..4 {
            _mm256_storeu_ps(dst.add(i * dst_stride), _mm256_permute2f128_ps::<0x20>(four[i], four[i + 4]));
            _mm256_storeu_ps(dst.add((i + 4) * dst_stride), _mm256_permute2f128_ps::<0x31>(four[i], four[i + 4]));
        }
    }
}

#[inline(always)]
fn window(n: usize) -> __m256i {
    let window = &WINDOW[8 - n.min(8)..][..8];
    // SAFETY: the slice has eight entries; only methods of the token call this, so AVX is there.
    unsafe { _mm256_loadu_si256(window.as_ptr().cast()) }
}
