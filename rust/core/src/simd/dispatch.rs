//! Which instructions are used: the best the CPU has, or the level that `TRANSFORMER_RS_ISA` names.

use std::fmt;
use std::sync::OnceLock;

use super::{Kernel, Portable};
use crate::error::{Error, Result};

/// A path through the kernels. Results are the same bit for bit within one path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, no fused multiply-add: any CPU.
    Portable,
    /// 8 lanes, AVX2 and FMA.
    Avx2,
    /// 16 lanes with masks, AVX-512 F, BW, VL and DQ.
    Avx512,
    /// The same, and tiles of AMX for products of bf16 and int8.
    Amx,
}

impl Isa {
    /// All paths, the slowest first.
    pub const ALL: [Isa; 4] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// The name `TRANSFORMER_RS_ISA` takes.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What the CPU can do, whatever path was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// The best path.
    pub best: Isa,
    /// AVX-512 BF16 dot products.
    pub avx512_bf16: bool,
    /// AVX-512 VNNI int8 dot products.
    pub avx512_vnni: bool,
    /// Dot products of bf16 that do twice the work of f32's in the same time. Intel's, outside of AMX, take twice as long
    /// as f32's instead.
    pub fast_bf16: bool,
}

/// What the CPU answered, asked once per process.
pub fn features() -> Features {
    static FEATURES: OnceLock<Features> = OnceLock::new();
    *FEATURES.get_or_init(detect)
}

fn detect() -> Features {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = has!("avx2") && has!("fma");
        let avx512 = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
        let avx512_bf16 = avx512 && has!("avx512bf16");
        let best = if avx512_bf16 && super::amx::usable() {
            Isa::Amx
        } else if avx512 {
            Isa::Avx512
        } else if avx2 {
            Isa::Avx2
        } else {
            Isa::Portable
        };
        let amd = vendor() == *b"AuthenticAMD";
        Features { best, avx512_bf16, avx512_vnni: avx512 && has!("avx512vnni"), fast_bf16: avx512_bf16 && amd }
    }
    #[cfg(not(target_arch = "x86_64"))]
    Features { best: Isa::Portable, avx512_bf16: false, avx512_vnni: false, fast_bf16: false }
}

/// Lines of a set of the L1 data cache: rows that lie a page apart share one. 8 where the CPU does not tell.
pub fn l1_ways() -> usize {
    static WAYS: OnceLock<usize> = OnceLock::new();
    *WAYS.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{__cpuid, __cpuid_count};
            // The first cache that is listed: level 1, data.
            let leaf = if vendor() == *b"AuthenticAMD" { 0x8000_001d } else { 4 };
            if __cpuid(leaf & 0x8000_0000).eax >= leaf {
                let cache = __cpuid_count(leaf, 0);
                if cache.eax & 0xff == 0x21 {
                    return (cache.ebx >> 22) as usize + 1;
                }
            }
        }
        8
    })
}

#[cfg(target_arch = "x86_64")]
fn vendor() -> [u8; 12] {
    let id = std::arch::x86_64::__cpuid(0);
    let mut name = [0; 12];
    for (bytes, word) in name.chunks_exact_mut(4).zip([id.ebx, id.edx, id.ecx]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    name
}

/// The path in use, decided once per process. The door of the engine checks it; an unknown or unsupported
/// `TRANSFORMER_RS_ISA` is an error there, and kernels called past the door run portably.
pub fn isa() -> Result<Isa> {
    chosen().clone()
}

fn chosen() -> &'static Result<Isa> {
    static CHOSEN: OnceLock<Result<Isa>> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        let wanted = std::env::var_os("TRANSFORMER_RS_ISA").map(|name| name.to_string_lossy().into_owned());
        choose(wanted.as_deref(), features().best)
    })
}

pub(super) fn choose(wanted: Option<&str>, best: Isa) -> Result<Isa> {
    let Some(name) = wanted.filter(|name| !name.is_empty()) else { return Ok(best) };
    match Isa::ALL.into_iter().find(|isa| isa.name() == name) {
        Some(isa) if isa <= best => Ok(isa),
        Some(isa) => Err(Error::Unsupported(format!(
            "TRANSFORMER_RS_ISA: this CPU lacks `{isa}`, its best is `{best}`; unset the variable or name a lower level"
        ))),
        None => Err(Error::Config(format!(
            "TRANSFORMER_RS_ISA: expected `portable`, `avx2`, `avx512` or `amx`, got `{name}`; unset it to use the best"
        ))),
    }
}

#[inline]
pub(super) fn best<K: Kernel<f32>>(kernel: K) -> K::Output {
    match chosen() {
        // SAFETY: `choose` returns what the CPU has, never more.
        #[cfg(target_arch = "x86_64")]
        Ok(Isa::Avx512 | Isa::Amx) => unsafe { super::avx512::run(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Ok(Isa::Avx2) => unsafe { super::avx2::run(kernel) },
        _ => kernel.run(Portable),
    }
}
