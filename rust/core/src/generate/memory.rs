//! How much memory decoding may take, and how much there is.

use super::options::{GenerateOptions, Plan};
use crate::ensure;
use crate::error::Result;
use crate::models::TransformerConfig;
use crate::ops::Page;
use std::path::Path;

/// Hypotheses that are decoded side by side: more would be no faster, and their logits fill the memory.
const ROWS: usize = 256;

/// What caches may take.
#[derive(Debug)]
pub(super) struct Room {
    /// Bytes of keys and values of one token in all layers.
    token: u128,
    /// Hypotheses of a source.
    width: usize,
    /// Bytes that are free; the most there can be where the system does not say.
    free: u128,
}

impl Room {
    /// What this machine has for models like these, all at work on the same sources.
    pub fn of<'a>(models: impl Iterator<Item = &'a TransformerConfig>, options: &GenerateOptions) -> Self {
        let token = |config: &TransformerConfig| {
            2 * config.n_decoder_layers as u128 * config.d_model as u128 * size_of::<f32>() as u128
        };
        Room {
            token: models.map(token).sum(),
            width: options.width(),
            free: available(Path::new("/")).unwrap_or(u128::MAX),
        }
    }

    /// What sources take when each of their hypotheses reaches `max_len` and shares nothing, all in whole pages.
    fn bytes(&self, sources: usize, max_len: usize, ids: usize) -> u128 {
        let (sources, page) = (sources as u128, Page::KEYS as u128);
        let own = (sources * self.width as u128).saturating_mul((max_len as u128).div_ceil(page) * page);
        own.saturating_add(ids as u128 + sources * page).saturating_mul(self.token)
    }

    /// Refuses a source that the machine cannot serve.
    pub fn check(&self, plan: &Plan) -> Result<()> {
        let needed = self.bytes(1, plan.max_len, plan.ids);
        ensure!(
            needed <= self.free,
            OutOfMemory,
            "decoding: {} hypotheses of up to {} tokens for source {} may need {} of keys and values, {} are free; \
             lower beam or max_len",
            self.width,
            plan.max_len,
            plan.source,
            text(needed),
            text(self.free)
        );
        Ok(())
    }

    /// How many of the waiting sources may join those here: none before a quarter of the places is free, so that they are
    /// encoded together.
    pub fn admits<'a>(
        &self,
        here: impl ExactSizeIterator<Item = &'a Plan>,
        waiting: impl Iterator<Item = &'a Plan>,
    ) -> usize {
        let places = (ROWS / self.width).max(1);
        if here.len() > places - places.div_ceil(4) {
            return 0;
        }
        let (mut sources, mut max_len, mut ids) = (0, 0, 0);
        let mut fits = |plan: &Plan| {
            (sources, max_len, ids) = (sources + 1, max_len.max(plan.max_len), ids + plan.ids);
            sources == 1 || sources <= places && self.bytes(sources, max_len, ids) <= self.free / 2
        };
        here.for_each(|plan| {
            fits(plan);
        });
        waiting.take_while(|plan| fits(plan)).count()
    }
}

fn text(bytes: u128) -> String {
    let gib = bytes as f64 / f64::from(1 << 30);
    if gib >= 1.0 { format!("{gib:.1} GiB") } else { format!("{:.1} MiB", gib * 1024.0) }
}

/// Bytes that this process may still take: what the system has left, and no more than its group has left. `root` is `/`.
fn available(root: &Path) -> Option<u128> {
    let read = |file: &str| std::fs::read_to_string(root.join(file)).ok();
    let number = |text: &str| text.trim().trim_end_matches("kB").trim().parse::<u128>().ok();
    let line = |text: &str, name: &str| text.lines().find_map(|line| number(line.strip_prefix(name)?));
    let free = line(&read("proc/meminfo")?, "MemAvailable:")?.saturating_mul(1024);
    let group = |file: &str| read(&format!("sys/fs/cgroup/memory.{file}"));
    let Some(most) = group("max").and_then(|text| number(&text)) else { return Some(free) };
    let used = group("current").and_then(|text| number(&text)).unwrap_or(0);
    // What was read from files and not of late is given up for the asking.
    let cached = group("stat").and_then(|text| line(&text, "inactive_file ")).unwrap_or(0);
    Some(free.min(most.saturating_sub(used.saturating_sub(cached))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::tests::Folder;
    use crate::rng::Key;

    fn plan(max_len: usize) -> Plan {
        Plan { source: 3, ids: 10, max_len, min_len: 0, prefix: Vec::new(), key: Key::new(0) }
    }

    #[test]
    fn what_cannot_fit_is_refused_with_the_estimate() {
        let room = Room { token: 1 << 20, width: 4, free: 1 << 30 };
        assert!(room.check(&plan(128)).is_ok());
        let message = room.check(&plan(1000)).unwrap_err().to_string();
        for part in ["4 hypotheses", "1000 tokens", "source 3", "4.0 GiB", "1.0 GiB", "beam"] {
            assert!(message.contains(part), "{part}: {message}");
        }
        assert!(room.check(&plan(usize::MAX)).is_err());
        let plans = [plan(128), plan(64), plan(64)];
        let admits = |here: usize| room.admits(plans[..here].iter(), plans[here..].iter());
        // 512 MiB are one source of 128 tokens.
        assert_eq!([0, 1, 2].map(admits), [1, 0, 0]);
        assert_eq!(room.admits([].iter(), plans[1..].iter()), 1);
        let room = Room { free: 1 << 40, ..room };
        assert_eq!((room.admits([].iter(), plans.iter()), room.admits(plans.iter(), plans.iter())), (3, 3));
        let many = vec![plan(16); ROWS];
        assert_eq!((room.admits([].iter(), many.iter()), room.admits(many[..49].iter(), many.iter())), (64, 0));
        assert!(available(Path::new("/")).is_none_or(|bytes| bytes > 1 << 20));
    }

    #[test]
    fn what_the_group_uses_already_is_not_free() {
        let folder = Folder::new();
        let free = |files: &[(&str, &str)]| {
            for (file, text) in files {
                let path = folder.0.join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            available(&folder.0)
        };
        assert_eq!(free(&[]), None);
        let system = "MemTotal:       9000 kB\nMemAvailable:   8000 kB\nBuffers: 7 kB\n";
        assert_eq!(free(&[("proc/meminfo", system)]), Some(8_192_000));
        assert_eq!(free(&[("sys/fs/cgroup/memory.max", "max\n")]), Some(8_192_000));
        assert_eq!(free(&[("sys/fs/cgroup/memory.max", "5000000\n")]), Some(5_000_000));
        assert_eq!(free(&[("sys/fs/cgroup/memory.current", "3000000\n")]), Some(2_000_000));
        let stat = "anon 1\nactive_file 500\ninactive_file 400000\nfile 8\n";
        assert_eq!(free(&[("sys/fs/cgroup/memory.stat", stat)]), Some(2_400_000));
        assert_eq!(free(&[("sys/fs/cgroup/memory.current", "6000000\n")]), Some(0));
        assert_eq!(free(&[("sys/fs/cgroup/memory.max", "50000000\n")]), Some(8_192_000));
    }
}
