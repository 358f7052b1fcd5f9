//! rlimits, not dumpable, all other descriptors closed: what a confined process may use up.

use std::os::fd::BorrowedFd;

use nix::sys::resource::{Resource, setrlimit};

use crate::error::{Error, reason};
use crate::sys;

/// Whether files may grow: only where the log is a regular file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum FileGrowth {
    Allowed,
    Forbidden,
}

/// What a process for one connection needs: poll(2) refuses more descriptors than this limit allows to be open.
pub(crate) const FEW_DESCRIPTORS: u64 = 8;

/// How much there may be of what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// How many may be open.
    pub(crate) descriptors: u64,
    pub(crate) file_growth: FileGrowth,
    /// In octets of address space.
    pub(crate) memory: u64,
}

/// A resolver opens files and sockets of its own.
const CONNECTOR_DESCRIPTORS: u64 = 64;

/// Sets the limits of getrlimit(2), soft and hard, and makes the process neither dumpable nor traceable (prctl(2)).
///
/// # Errors
/// `System` at the first limit that the kernel refuses.
pub(super) fn set_limits(limits: Limits) -> Result<(), Error> {
    let mut all = vec![
        (Resource::RLIMIT_AS, limits.memory, "address space"),
        (Resource::RLIMIT_CORE, 0, "core files"),
        (Resource::RLIMIT_NOFILE, limits.descriptors, "descriptors"),
        (Resource::RLIMIT_NPROC, 0, "processes"),
        (Resource::RLIMIT_MEMLOCK, 0, "locked memory"),
        (Resource::RLIMIT_MSGQUEUE, 0, "message queues"),
    ];
    if limits.file_growth == FileGrowth::Forbidden {
        all.push((Resource::RLIMIT_FSIZE, 0, "file size"));
    }
    set_all(&all)?;
    forbid_tracing()
}

/// The same for the connector. How much memory a resolver's libraries take is the system's affair, and none of a peer's.
///
/// # Errors
/// `System` at the first limit that the kernel refuses.
pub(crate) fn set_connector_limits() -> Result<(), Error> {
    set_all(&[
        (Resource::RLIMIT_CORE, 0, "core files"),
        (
            Resource::RLIMIT_NOFILE,
            CONNECTOR_DESCRIPTORS,
            "descriptors",
        ),
        (Resource::RLIMIT_NPROC, 0, "processes"),
    ])?;
    forbid_tracing()
}

fn set_all(limits: &[(Resource, u64, &str)]) -> Result<(), Error> {
    for (resource, limit, what) in limits {
        setrlimit(*resource, *limit, *limit).map_err(|error| {
            Error::system(format!("cannot limit {what} to {limit}"), error.desc())
        })?;
    }
    Ok(())
}

/// After the ids were changed, which makes a process dumpable again or not as the system pleases.
///
/// # Errors
/// `System` if the kernel refuses.
pub(crate) fn forbid_tracing() -> Result<(), Error> {
    nix::sys::prctl::set_dumpable(false)
        .map_err(|error| Error::system("cannot forbid core dumps and tracing", error.desc()))
}

/// Closes every descriptor from 3 up but those named.
///
/// # Errors
/// `System` if the kernel refuses.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) -> Result<(), Error> {
    sys::close_all_but(kept)
        .map_err(|error| Error::system("cannot close the other descriptors", reason(&error)))
}
