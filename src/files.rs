//! Files of the administrator's, read as bytes while there are privileges; nothing in them is looked at here.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::libc;

use crate::error::{Error, reason};

/// The largest file that is read: far beyond any certificate chain.
pub(crate) const FILE_LIMIT: u64 = 1 << 20;

/// Where something was read, for messages: what it is, its path, and the option that named it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Place {
    pub(crate) what: &'static str,
    pub(crate) path: String,
    pub(crate) option: &'static str,
}

impl Place {
    /// Where the file at `path` is, which `option` names.
    pub(crate) fn new(what: &'static str, path: &Path, option: &'static str) -> Self {
        Self {
            what,
            path: path.display().to_string(),
            option,
        }
    }

    /// That it cannot be read, and why.
    pub(crate) fn cannot_read(&self, why: &str) -> Error {
        Error::setup(format!("cannot read {self}"), why)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} '{}' ({})", self.what, self.path, self.option)
    }
}

/// A key that everybody can read is no secret, and one that others can write is not ours.
pub(crate) fn check_mode(mode: u32) -> Result<(), String> {
    match mode {
        mode if mode & 0o007 != 0 => Err(format!(
            "it is open to everybody (mode {:04o}): chmod o= it",
            mode & 0o7777
        )),
        mode if mode & 0o020 != 0 => Err(format!(
            "its group can write to it (mode {:04o}): chmod g-w it",
            mode & 0o7777
        )),
        _ => Ok(()),
    }
}

/// For files that are no secret.
pub(crate) fn any_mode(_: u32) -> Result<(), String> {
    Ok(())
}

/// Reads a file of at most `limit` octets whole.
///
/// # Errors
/// `Setup`, naming the place.
pub(crate) fn read(
    path: &Path,
    place: &Place,
    limit: u64,
    check: fn(u32) -> Result<(), String>,
) -> Result<Vec<u8>, Error> {
    let (bytes, mode) = read_with_mode(path, place, limit)?;
    check(mode).map_err(|why| place.cannot_read(&why))?;
    Ok(bytes)
}

/// The same, for one whose mode is judged later.
///
/// # Errors
/// `Setup`, naming the place.
pub(crate) fn read_with_mode(
    path: &Path,
    place: &Place,
    limit: u64,
) -> Result<(Vec<u8>, u32), Error> {
    // Not blocking: in the place of a file there could be a FIFO that nobody writes to.
    File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|error| reason(&error))
        .and_then(|file| read_open(file, limit))
        .map_err(|why| place.cannot_read(&why))
}

/// Reads an open file of at most `limit` octets, and its mode.
///
/// # Errors
/// The reason in words.
pub(crate) fn read_open(file: File, limit: u64) -> Result<(Vec<u8>, u32), String> {
    let metadata = file.metadata().map_err(|error| reason(&error))?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    // One octet more than there should be, so that the end is seen without growing.
    let expected = metadata.len().min(limit) + 1;
    let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or_default());
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| reason(&error))?;
    if bytes.len() as u64 > limit {
        return Err(format!("larger than {limit} octets"));
    }
    Ok((bytes, metadata.mode()))
}
