//! Products of bytes with sums of 32 bits: the one computation of int8, exact and so the same on every path.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::{Isa, features, isa};

/// Outputs that stand side by side in a panel of weights.
pub const PANEL: usize = 32;
/// Bytes along the depth that stand together: one step of the instructions.
pub const STEP: usize = 4;
/// Rows of a tile at most: of vectors, and of AMX.
const TILE_ROWS: usize = 12;
const AMX_ROWS: usize = 32;
/// With fewer rows than this AMX leaves the tile to VNNI.
const AMX_FROM_ROWS: usize = 7;

/// From one row of [`Products`] to the next: some panels side by side.
pub const WIDTH: usize = 4 * PANEL;

/// The results of tiles of the same rows, row by row.
#[derive(Debug)]
#[repr(align(64))]
pub struct Products(pub [f32; AMX_ROWS * WIDTH]);

/// Sums of a tile before they are multiplied by scales: row by row, panels side by side.
#[derive(Debug)]
#[repr(align(64))]
pub struct Sums([i32; AMX_ROWS * PANEL]);

impl Products {
    /// Memory for them.
    pub const ZERO: Self = Products([0.0; _]);
}

impl Sums {
    /// Memory for them.
    pub const ZERO: Self = Sums([0; _]);
}

/// Which instructions multiply bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bytes {
    /// Plain Rust.
    Portable,
    /// `vpmaddubsw` of magnitudes and signed weights: no sum of two leaves 16 bits, for both sides are within ±127.
    Avx2,
    /// AVX-512 VNNI; weights are kept with 128 added, for one side has no sign.
    Vnni,
    /// The same weights, and tiles of AMX.
    Amx,
}

impl Bytes {
    /// What the path of this process and its CPU have.
    pub fn best() -> Self {
        match isa() {
            Ok(Isa::Amx) if features().avx512_vnni => Bytes::Amx,
            Ok(Isa::Avx512) if features().avx512_vnni => Bytes::Vnni,
            Ok(Isa::Amx | Isa::Avx512 | Isa::Avx2) => Bytes::Avx2,
            _ => Bytes::Portable,
        }
    }

    /// Every way that this CPU has, whatever path was chosen.
    pub fn all() -> Vec<Self> {
        [Bytes::Portable, Bytes::Avx2, Bytes::Vnni, Bytes::Amx].into_iter().filter(|bytes| bytes.is_here()).collect()
    }

    /// Whether this CPU has it.
    fn is_here(self) -> bool {
        let cpu = features();
        match self {
            Bytes::Portable => true,
            Bytes::Avx2 => cpu.best >= Isa::Avx2,
            Bytes::Vnni => cpu.avx512_vnni,
            Bytes::Amx => cpu.avx512_vnni && cpu.best == Isa::Amx,
        }
    }

    /// What is added to a weight before it is packed.
    pub fn offset(self) -> u8 {
        if matches!(self, Bytes::Vnni | Bytes::Amx) { 128 } else { 0 }
    }

    /// Bytes that a row of this depth is filled up to.
    pub fn depth(self, depth: usize) -> usize {
        depth.next_multiple_of(if self == Bytes::Amx { 64 } else { STEP })
    }

    /// Rows of a tile at most, out of so many.
    pub fn tile_rows(self, rows: usize) -> usize {
        if self == Bytes::Amx && rows >= AMX_FROM_ROWS { AMX_ROWS } else { TILE_ROWS }
    }
}

/// A product of at most [`Bytes::tile_rows`] rows of bytes with a panel of weights.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    /// Steps along the depth.
    pub steps: usize,
    /// The rows, `stride` bytes apart, `steps` · [`STEP`] bytes of each.
    pub x: &'a [i8],
    /// From one row to the next.
    pub stride: usize,
    /// The sum of every row.
    pub sums: &'a [i32],
    /// The scale of every row.
    pub x_scales: &'a [f32],
    /// The panel: for each step the bytes of [`PANEL`] outputs.
    pub w: &'a [u8],
    /// The scale of every output of the panel.
    pub w_scales: &'a [f32; PANEL],
    /// What vectors ask for meanwhile, as many bytes at each step as they multiply. Any address will do.
    pub ahead: *const u8,
    /// From one step to the next.
    pub ahead_step: usize,
}

/// Multiplies tiles, on the thread that made it and within one task.
pub struct Multiplier<'a> {
    bytes: Bytes,
    sums: &'a mut Sums,
    #[cfg(target_arch = "x86_64")]
    tiles: Option<amx::Tiles>,
}

impl<'a> Multiplier<'a> {
    /// One that uses these instructions, which the CPU must have.
    pub fn new(bytes: Bytes, sums: &'a mut Sums) -> Self {
        assert!(bytes.is_here(), "this CPU lacks the instructions of {bytes:?}");
        Multiplier {
            bytes,
            sums,
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the CPU has them.
            tiles: (bytes == Bytes::Amx).then(|| unsafe { amx::Tiles::new() }),
        }
    }

    /// The first [`PANEL`] numbers of as many rows as there are sums, [`WIDTH`] apart, = x Wᵀ, times the scales of both.
    pub fn tile(&mut self, out: &mut [f32], o: Operands<'_>) {
        let rows = o.sums.len();
        assert!(
            (1..=self.bytes.tile_rows(rows)).contains(&rows)
                && o.x.len() >= (rows - 1) * o.stride + o.steps * STEP
                && o.w.len() >= o.steps * STEP * PANEL
                && o.x_scales.len() == rows
                && out.len() >= (rows - 1) * WIDTH + PANEL,
            "operands of a tile of bytes"
        );
        match self.bytes {
            #[cfg(target_arch = "x86_64")]
            Bytes::Amx if rows >= AMX_FROM_ROWS => {
                self.amx(o);
                // SAFETY: a CPU with AMX has AVX-512.
                unsafe { x86::scale_avx512(out, self.sums, o) };
            }
            // SAFETY: `new` asked whether the CPU has them; the lengths were checked.
            #[cfg(target_arch = "x86_64")]
            Bytes::Vnni | Bytes::Amx => unsafe { x86::vnni(out, o) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Bytes::Avx2 => unsafe {
                x86::avx2(&mut self.sums.0, o);
                x86::scale_avx2(out, self.sums, o);
            },
            _ => {
                portable(&mut self.sums.0, o);
                scale(out, self.sums, o);
            }
        }
    }

    #[cfg(target_arch = "x86_64")]
    fn amx(&mut self, o: Operands<'_>) {
        assert!(o.steps.is_multiple_of(amx::DEPTH) && o.stride.is_multiple_of(4));
        // (w + 128) x summed up is w x summed up and 128 times the sum of x.
        for (out, sum) in self.sums.0.chunks_exact_mut(PANEL).zip(o.sums) {
            out.fill(-128 * sum);
        }
        let operands = amx::Operands {
            tiles: o.steps / amx::DEPTH,
            a: o.x.as_ptr().cast(),
            a_row: o.stride / 4,
            b: o.w.as_ptr().cast(),
            c: self.sums.0.as_mut_ptr().cast(),
            c_row: PANEL,
            rows: o.sums.len(),
            cols: PANEL,
            accumulate: true,
        };
        if let Some(tiles) = &mut self.tiles
            && o.steps > 0
        {
            // SAFETY: `tile` checked the lengths of x and w, and `sums` has the rows of a block.
            unsafe { tiles.multiply(amx::Units::Bytes, &operands) };
        }
    }
}

/// Sums of one panel to numbers.
#[inline(always)]
fn scale(out: &mut [f32], sums: &Sums, o: Operands<'_>) {
    for ((out, sums), &x_scale) in out.chunks_mut(WIDTH).zip(sums.0.as_chunks::<PANEL>().0).zip(o.x_scales) {
        for ((out, &sum), &w_scale) in out[..PANEL].iter_mut().zip(sums).zip(o.w_scales) {
            *out = sum as f32 * (x_scale * w_scale);
        }
    }
}

fn portable(out: &mut [i32], o: Operands<'_>) {
    for (r, out) in out.chunks_mut(PANEL).take(o.sums.len()).enumerate() {
        out.fill(0);
        let panel = &o.w[..o.steps * STEP * PANEL];
        for (x, w) in o.x[r * o.stride..].chunks_exact(STEP).zip(panel.chunks_exact(STEP * PANEL)) {
            for (out, w) in out.iter_mut().zip(w.chunks_exact(STEP)) {
                *out += x.iter().zip(w).map(|(&x, &w)| i32::from(x) * i32::from(w as i8)).sum::<i32>();
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::prefetch;
    use super::{Operands, PANEL, STEP, Sums, WIDTH};
    use std::arch::x86_64::*;

    macro_rules! choose {
        ($rows:expr; $($r:literal)*; $body:ident) => {
            match $rows {
                $($r => $body!($r),)*
                _ => unreachable!("a tile has at most TILE_ROWS rows"),
            }
        };
    }

    /// # Safety
    /// The CPU has AVX-512 VNNI, and the operands are as long as `tile` asks.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    pub unsafe fn vnni(out: &mut [f32], o: Operands<'_>) {
        macro_rules! run {
            ($r:literal) => {
                // SAFETY: the caller's promise.
                unsafe { vnni_tile::<$r>(out, o) }
            };
        }
        choose!(o.sums.len(); 1 2 3 4 5 6 7 8 9 10 11 12; run)
    }

    /// R rows, two vectors of 16 outputs, in registers throughout. (Few rows could take several panels at once, to keep the
    /// multipliers busy; but then they read several streams of memory, of which the CPU does not run far enough ahead:
    /// 3 to 6 rows with two panels took 1.1 to 1.3 times as long, one row with four as long.)
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
    #[inline]
    unsafe fn vnni_tile<const R: usize>(out: &mut [f32], o: Operands<'_>) {
        // (w + 128) x summed up is w x summed up and 128 times the sum of x.
        let mut acc: [[__m512i; 2]; R] = std::array::from_fn(|r| [_mm512_set1_epi32(-128 * o.sums[r]); 2]);
        let mut ahead = o.ahead;
        for k in 0..o.steps {
            prefetch(ahead);
            prefetch(ahead.wrapping_add(64));
            ahead = ahead.wrapping_add(o.ahead_step);
            // SAFETY: `tile` checked the lengths of x and w.
            unsafe {
                let w = o.w.as_ptr().add(k * STEP * PANEL);
                let w: [__m512i; 2] = std::array::from_fn(|v| _mm512_loadu_si512(w.add(v * 64).cast()));
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = o.x.as_ptr().add(r * o.stride + k * STEP).cast::<i32>().read_unaligned();
                    let x = _mm512_set1_epi32(x);
                    for (acc, &w) in acc.iter_mut().zip(&w) {
                        *acc = _mm512_dpbusd_epi32(*acc, w, x);
                    }
                }
            }
        }
        // SAFETY: `tile` checked the lengths of the scales and of `out`.
        unsafe {
            let w_scales: [__m512; 2] = std::array::from_fn(|v| _mm512_loadu_ps(o.w_scales.as_ptr().add(v * 16)));
            for (r, acc) in acc.iter().enumerate() {
                let x_scale = _mm512_set1_ps(*o.x_scales.get_unchecked(r));
                for (v, (&acc, &w_scale)) in acc.iter().zip(&w_scales).enumerate() {
                    let product = _mm512_mul_ps(_mm512_cvtepi32_ps(acc), _mm512_mul_ps(x_scale, w_scale));
                    _mm512_storeu_ps(out.as_mut_ptr().add(r * WIDTH + v * 16), product);
                }
            }
        }
    }

    /// # Safety
    /// The CPU has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub unsafe fn scale_avx512(out: &mut [f32], sums: &Sums, o: Operands<'_>) {
        super::scale(out, sums, o);
    }

    /// # Safety
    /// The CPU has AVX2.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn scale_avx2(out: &mut [f32], sums: &Sums, o: Operands<'_>) {
        super::scale(out, sums, o);
    }

    /// # Safety
    /// The CPU has AVX2, and the operands are as long as `tile` asks.
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(out: &mut [i32], o: Operands<'_>) {
        let rows = o.sums.len();
        for first in (0..rows).step_by(2) {
            let (to, x) = (&mut out[first * PANEL..], &o.x[first * o.stride..]);
            // SAFETY: the caller's promise.
            unsafe {
                if rows - first > 1 {
                    avx2_tile::<2>(to, x, &o);
                } else {
                    avx2_tile::<1>(to, x, &o);
                }
            }
        }
    }

    /// R rows, one panel.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    unsafe fn avx2_tile<const R: usize>(out: &mut [i32], x: &[i8], o: &Operands<'_>) {
        let mut acc = [[_mm256_setzero_si256(); R]; 4]; // a vector of eight outputs for each row
        let ones = _mm256_set1_epi16(1);
        for k in 0..o.steps {
            // SAFETY: `tile` checked the lengths of x and w.
            unsafe {
                let x: [__m256i; R] = std::array::from_fn(|r| {
                    _mm256_set1_epi32(x.as_ptr().add(r * o.stride + k * STEP).cast::<i32>().read_unaligned())
                });
                for (v, acc) in acc.iter_mut().enumerate() {
                    let w = _mm256_loadu_si256(o.w.as_ptr().add(k * STEP * PANEL + v * 32).cast());
                    for (acc, &x) in acc.iter_mut().zip(&x) {
                        // x w = |x| (w with the sign of x); two products have at most 2 · 127² < 2¹⁵.
                        let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));
                        *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
        }
        for (v, acc) in acc.iter().enumerate() {
            for (r, &acc) in acc.iter().enumerate() {
                let to = &mut out[r * PANEL + v * 8..][..8];
                // SAFETY: eight numbers.
                unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), acc) };
            }
        }
    }
}
