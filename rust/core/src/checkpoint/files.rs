//! Files that are whole or not there, whatever happens while they are written.

use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) fn storage(path: &Path, error: &std::io::Error) -> Error {
    Error::Storage(format!("{}: {error}", path.display()))
}

/// A file that is written and synced under a temporary name; [`Staged::commit`] puts it in place. Dropped before, it
/// leaves no trace.
#[derive(Debug)]
pub(crate) struct Staged {
    temporary: PathBuf,
    target: PathBuf,
}

impl Staged {
    /// Writes the file `name` of a folder beside the one in place.
    pub(crate) fn write(
        folder: &Path,
        name: &str,
        write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let temporary = format!(".{name}.{}-{}.tmp", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let staged = Staged { temporary: folder.join(temporary), target: folder.join(name) };
        let written = (|| {
            let mut buffered = BufWriter::with_capacity(1 << 20, File::create(&staged.temporary)?);
            write(&mut buffered)?;
            buffered.into_inner().map_err(|error| error.into_error())?.sync_all()
        })();
        written.map_err(|error| storage(&staged.target, &error))?;
        Ok(staged)
    }

    /// Renames the file: from now on it is the one in place. [`sync_folder`] makes that last.
    pub(crate) fn commit(self) -> Result<()> {
        fs::rename(&self.temporary, &self.target).map_err(|error| storage(&self.target, &error))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Gone already after a commit. Should it stay: such names are never read, and a later save removes them.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Makes renames in a folder last.
pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    // A folder cannot be opened as a file everywhere; where it can, syncing it must not fail.
    #[cfg(unix)]
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(|error| storage(folder, &error))?;
    let _ = folder;
    Ok(())
}

/// Makes the folder, and removes what a killed process left of files whose names start so.
pub(crate) fn prepare(folder: &Path, names: &[&str]) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| storage(folder, &error))?;
    for entry in fs::read_dir(folder).map_err(|error| storage(folder, &error))?.flatten() {
        if entry.file_name().to_str().is_some_and(|file| names.iter().any(|name| is_leftover(file, name))) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

/// Whether a file is a temporary one of a name that starts so, and its process is gone.
fn is_leftover(file: &str, name: &str) -> bool {
    let pid = (|| {
        let (_, middle) = file.strip_prefix('.')?.strip_prefix(name)?.strip_suffix(".tmp")?.rsplit_once('.')?;
        let (pid, count) = middle.split_once('-')?;
        count.parse::<u64>().ok()?;
        pid.parse::<u32>().ok()
    })();
    // Without /proc nobody can tell: then they stay.
    pid.is_some_and(|pid| Path::new("/proc/self").exists() && !Path::new(&format!("/proc/{pid}")).exists())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A folder of its own for each test, removed in the end.
    pub(crate) struct Folder(pub PathBuf);

    impl Folder {
        pub(crate) fn new() -> Self {
            static COUNT: AtomicU64 = AtomicU64::new(0);
            let name = format!("transformer_rs-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        pub(crate) fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = Folder::new();
        let replace = |text: &[u8]| Staged::write(&folder.0, "a", |f| f.write_all(text)).unwrap().commit().unwrap();
        replace(b"old");
        let full = |f: &mut dyn Write| {
            f.write_all(&[0; 3 << 20])?;
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        };
        let error = Staged::write(&folder.0, "a", full).unwrap_err();
        assert!(matches!(&error, Error::Storage(text) if text.contains("/a: ")), "{error}");
        assert_eq!((fs::read(folder.0.join("a")).unwrap(), folder.names()), (b"old".to_vec(), vec!["a".to_string()]));
        drop(Staged::write(&folder.0, "a", |f| f.write_all(b"never")).unwrap());
        assert_eq!((fs::read(folder.0.join("a")).unwrap(), folder.names()), (b"old".to_vec(), vec!["a".to_string()]));
        replace(b"new");
        assert_eq!((fs::read(folder.0.join("a")).unwrap(), folder.names()), (b"new".to_vec(), vec!["a".to_string()]));
    }

    #[test]
    fn leftovers_of_dead_processes_go_and_all_else_stays() {
        let folder = Folder::new();
        let dead = ".a.4294967295-0.tmp".to_string();
        let alive = format!(".a.{}-9.tmp", process::id());
        for name in [&dead, &alive, ".a.tmp", ".b.4294967295-0.tmp", "a.4294967295-0.tmp", ".a.4294967295-x.tmp"] {
            fs::write(folder.0.join(name), b"").unwrap();
        }
        prepare(&folder.0, &["a"]).unwrap();
        assert!(!folder.names().contains(&dead) || !Path::new("/proc/self").exists());
        assert_eq!(folder.names().iter().filter(|name| **name != dead).count(), 5);
        assert!(folder.names().contains(&alive));
    }

    #[test]
    fn a_folder_that_cannot_be_is_a_storage_error() {
        let folder = Folder::new();
        fs::write(folder.0.join("file"), b"").unwrap();
        let inside = folder.0.join("file").join("model");
        assert!(matches!(prepare(&inside, &[]), Err(Error::Storage(_))));
        assert!(matches!(Staged::write(&inside, "a", |_| Ok(())), Err(Error::Storage(_))));
    }
}
