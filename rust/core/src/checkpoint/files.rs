//! Files that are whole or not there, whatever happens while they are written.

use crate::error::{Error, Result};
use crate::threads::parallel;
use std::fs::{self, File, TryLockError};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{process, thread};

pub(crate) fn storage(path: &Path, error: &std::io::Error) -> Error {
    Error::Storage(format!("{}: {error}", path.display()))
}

/// A file that is written and synced under a temporary name; [`Staged::commit`] puts it in place. Dropped before, it
/// leaves no trace.
#[derive(Debug)]
pub(crate) struct Staged {
    temporary: PathBuf,
    target: PathBuf,
    /// Locked, so that [`prepare`] elsewhere lets it be; a process that ends, however it ends, unlocks.
    file: File,
}

impl Staged {
    /// Writes the file `name` of a folder beside the one in place.
    pub(crate) fn write(
        folder: &Path,
        name: &str,
        write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
    ) -> Result<Self> {
        let target = folder.join(name);
        let (temporary, file) = create(folder, name).map_err(|error| storage(&target, &error))?;
        let staged = Staged { temporary, target, file };
        let written = (|| {
            let mut buffered = BufWriter::with_capacity(1 << 20, &staged.file);
            write(&mut buffered)?;
            buffered.into_inner().map_err(|error| error.into_error())?.sync_all()
        })();
        // An interrupt comes as it is.
        written.map_err(|error| error.downcast().unwrap_or_else(|error| storage(&staged.target, &error)))?;
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

/// A fresh temporary file, locked where the file system can.
fn create(folder: &Path, name: &str) -> std::io::Result<(PathBuf, File)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let temporary = format!(".{name}.{}-{}.tmp", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = folder.join(temporary);
        let file = match File::create_new(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
            file => file?,
        };
        // Before it was locked, another process may have seen a leftover in it, which it removes under the lock.
        if !matches!(file.try_lock(), Err(TryLockError::WouldBlock)) && path.exists() {
            return Ok((path, file));
        }
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

/// A folder into which nobody else on this machine saves while this lives.
#[derive(Debug)]
pub(crate) struct Alone(File);

impl Alone {
    /// Waits until the others are done; the `poll` of a section ends that. `None` where folders cannot be locked.
    ///
    /// The folder itself is locked: nothing is left in it, and a process that ends, however it ends, unlocks.
    fn wait(folder: &Path) -> Result<Option<Self>> {
        let Ok(file) = File::open(folder) else { return Ok(None) };
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Alone(file))),
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) => {
                    parallel(1, |_| ())?; // asks whether to stop
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // Closing is not enough: a process that was forked meanwhile has the file open as well.
        let _ = self.0.unlock();
    }
}

/// Makes the folder, waits until nobody else saves into it, and removes what a killed process left of files whose names
/// start so.
pub(crate) fn prepare(folder: &Path, names: &[&str]) -> Result<Option<Alone>> {
    fs::create_dir_all(folder).map_err(|error| storage(folder, &error))?;
    let alone = Alone::wait(folder)?;
    for entry in fs::read_dir(folder).map_err(|error| storage(folder, &error))?.flatten() {
        if entry.file_name().to_str().is_some_and(|file| names.iter().any(|name| is_temporary(file, name))) {
            let file = File::options().write(true).open(entry.path());
            // Who writes it holds the lock. Where there are no locks nobody can tell: then it stays.
            if let Ok(file) = file
                && file.try_lock().is_ok()
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
    Ok(alone)
}

/// Whether a file is a temporary one of a name that starts so.
fn is_temporary(file: &str, name: &str) -> bool {
    let numbers = (|| {
        let (_, middle) = file.strip_prefix('.')?.strip_prefix(name)?.strip_suffix(".tmp")?.rsplit_once('.')?;
        middle.split_once('-')
    })();
    numbers.is_some_and(|(pid, count)| pid.parse::<u32>().is_ok() && count.parse::<u64>().is_ok())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::threads::section;

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
    fn leftovers_go_and_all_else_stays() {
        let folder = Folder::new();
        // The second has the number of a process that lives, as where a number is used again.
        let left = [".a.4294967295-0.tmp".to_string(), format!(".a.{}-18446744073709551615.tmp", process::id())];
        let others = [".a.tmp", ".b.4294967295-0.tmp", "a.4294967295-0.tmp", ".a.4294967295-x.tmp"];
        for name in left.iter().map(String::as_str).chain(others) {
            fs::write(folder.0.join(name), b"").unwrap();
        }
        let staged = Staged::write(&folder.0, "a", |f| f.write_all(b"new")).unwrap();
        prepare(&folder.0, &["a"]).unwrap();
        assert!(left.iter().all(|name| !folder.names().contains(name)));
        assert_eq!(folder.names().len(), others.len() + 1);
        staged.commit().unwrap();
        assert_eq!(fs::read(folder.0.join("a")).unwrap(), b"new");
        assert_eq!(folder.names().len(), others.len() + 1);
    }

    #[test]
    #[cfg(unix)]
    fn who_waits_for_a_folder_can_be_stopped_and_goes_on_when_it_is_free() {
        let folder = Folder::new();
        let here = prepare(&folder.0, &[]).unwrap().unwrap();
        let _forked = here.0.try_clone().unwrap(); // what a process forked now would have
        let stopped = section(Some(&|| true), || prepare(&folder.0, &[]).map(|_| ()));
        assert_eq!(stopped, Err(Error::Interrupted));
        thread::scope(|scope| {
            let other = scope.spawn(|| prepare(&folder.0, &[]).map(|_| ()));
            thread::sleep(Duration::from_millis(20));
            assert!(!other.is_finished());
            drop(here);
            assert_eq!(other.join().unwrap(), Ok(()));
        });
        assert!(folder.names().is_empty());
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
