//! Directories of a test run: all of them are gone at its end, also when a test panics.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// A directory that is removed with all its contents when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new directory that everybody may enter and only its owner may write.
    pub fn new(prefix: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{prefix}.{}.{number}", std::process::id()));
        make_dir(&path, 0o755);
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Makes a directory with exactly this mode, whatever the umask.
pub fn make_dir(path: &Path, mode: u32) {
    DirBuilder::new()
        .mode(mode)
        .create(path)
        .unwrap_or_else(|error| panic!("mkdir {}: {error}", path.display()));
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Writes a file with exactly this mode.
pub fn write_file(path: &Path, contents: impl AsRef<[u8]>, mode: u32) {
    fs::write(path, contents).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

static RUN: OnceLock<PathBuf> = OnceLock::new();

/// Makes the directory that all tests of this run share, with copies of the program and of this test binary that every
/// user may execute (the build directory may be closed to others). It is removed when the result is dropped.
pub fn begin_run() -> TempDir {
    let dir = TempDir::new("imap-tls-e2e");
    let program = std::env::var_os("E2E_PROGRAM").map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_imap-tls")),
        PathBuf::from,
    );
    for (from, to) in [
        (program, "imap-tls"),
        (std::env::current_exe().unwrap(), "play"),
    ] {
        let to = dir.path().join(to);
        fs::copy(&from, &to).unwrap_or_else(|error| panic!("copy {}: {error}", from.display()));
        fs::set_permissions(&to, Permissions::from_mode(0o755)).unwrap();
    }
    make_dir(&dir.path().join("pki"), 0o755);
    RUN.set(dir.path().to_owned()).unwrap();
    dir
}

/// A path in the run's shared directory: `imap-tls`, `play` (this binary), `pki`.
pub fn run_path(name: &str) -> PathBuf {
    RUN.get().expect("begin_run was called").join(name)
}

/// Whether the program is linked statically: no ELF program header of it names an interpreter (`PT_INTERP`, elf(5)).
pub fn is_static() -> bool {
    let program = fs::read(run_path("imap-tls")).unwrap();
    let number = |at: usize, size: usize| {
        let bytes = program[at..at + size].iter().rev();
        bytes.fold(0_usize, |all, byte| all << 8 | usize::from(*byte))
    };
    // ELF64: e_phoff, e_phentsize, e_phnum; p_type comes first in a header.
    let (start, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    const PT_INTERP: usize = 3;
    (0..count).all(|index| number(start + index * size, 4) != PT_INTERP)
}
