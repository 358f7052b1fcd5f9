//! Confinement: [`enter`] takes every step, in the one order that works, and makes the proof that it was done.

mod filter;
mod identity;
mod kernel;
mod limits;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::libc;

pub(crate) use identity::{BackendUser, ConnectorUser, Identity, OwnUsers};
pub(crate) use kernel::{Features, Requirement};
pub(crate) use limits::{FEW_DESCRIPTORS, FileGrowth, Limits, close_all_but, forbid_tracing};

use crate::error::{Error, reason};
use crate::sys;
use kernel::Denied;

/// Which of our confined processes this is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// Holds the private key; talks to one network process alone.
    Keeper,
    /// The same as a service, for all who come to its socket.
    KeeperService,
    /// The same under the listener, for all its connections.
    SharedKeeper,
    /// Reads from the network.
    Network,
    /// Opens files by name for the keeper, which is what it keeps its privileges for.
    Opener,
}

/// This process has given up its privileges for good. Only [`enter`] makes one.
#[derive(Debug)]
pub(crate) struct Sandboxed(());

#[cfg(any(test, fuzzing))]
impl Sandboxed {
    /// For tests of what happens in the sandbox: they cannot give up the privileges of their whole process.
    pub(crate) fn pretended() -> Self {
        Self(())
    }
}

/// Whether the capability bounding set is still to be emptied.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BoundingSet {
    /// Here or in the process that forked this one: it stays empty for good.
    Emptied(Emptied),
    Full,
}

/// Only [`BoundingSet::empty`] makes one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Emptied(());

impl BoundingSet {
    /// Empties it, for this process and those that it will fork: each capability is a system call, so once is better.
    /// The backend is to have what the superserver left, so its launchers are forked before.
    pub(crate) fn empty() -> Self {
        sys::empty_capability_bounding_set();
        Self::Emptied(Emptied(()))
    }

    /// Empties it unless that was done.
    fn ensure_empty(self) {
        if let Self::Full = self {
            Self::empty();
        }
    }
}

/// Everything [`enter`] needs, looked up and opened while that was still possible.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) bounding_set: BoundingSet,
    /// `None`: started by a plain user, without privileges to give up.
    pub(crate) confinement: Option<Confinement>,
    pub(crate) limits: Limits,
}

impl Plan {
    /// Closes every descriptor but those, and what the plan needs, before it is carried out.
    ///
    /// # Errors
    /// `System` if the kernel refuses.
    pub(crate) fn close_all_but(&self, kept: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let root = self.confinement.as_ref().map(|one| one.root.as_fd());
        let kept: Vec<_> = kept.iter().copied().chain(root).collect();
        limits::close_all_but(&kept)
    }

    /// The same for one more process.
    ///
    /// # Errors
    /// `System` if there is no descriptor to be had.
    pub(crate) fn copy(&self) -> Result<Self, Error> {
        let copy = |Confinement { identity, root }: &Confinement| {
            let identity = *identity;
            sys::duplicate(root.as_fd()).map(|root| Confinement { identity, root })
        };
        let confinement = self.confinement.as_ref().map(copy).transpose();
        Ok(Self {
            confinement: confinement
                .map_err(|error| Error::system("cannot copy a descriptor", reason(&error)))?,
            ..*self
        })
    }
}

/// What only root can do to itself.
#[derive(Debug)]
pub(crate) struct Confinement {
    pub(crate) identity: Identity,
    pub(crate) root: OwnedFd,
}

/// Enters the sandbox: nothing that a privileged process may do is possible after it.
///
/// The order is OpenSSH's, and no other works: chroot needs root, groups need it too, uids go last of these; limits and
/// `dumpable` come after the ids because changing ids resets the latter; Landlock needs no_new_privs, and a descriptor before there
/// is a limit on them; the filter is last, since it forbids all before it.
///
/// # Errors
/// `System` at the first step that fails. The process must not serve then.
pub(crate) fn enter(role: Role, plan: Plan, kept: &[BorrowedFd<'_>]) -> Result<Sandboxed, Error> {
    // Compiled first: the filter's tables need memory, which the limits may not leave.
    let program = filter::compile(role)?;
    plan.bounding_set.ensure_empty();
    if let Some(Confinement { identity, root }) = plan.confinement {
        change_root(root.as_fd())?;
        drop(root);
        identity::drop_ids_permanently(identity)?;
    }
    sys::drop_all_capabilities()
        .map_err(|error| Error::system("cannot give up capabilities", reason(&error)))?;
    forbid_new_privileges()?;
    kernel::deny(Denied::All)?;
    limits::close_all_but(kept)?;
    limits::set_limits(plan.limits)?;
    kernel::deny_new_code()?;
    filter::apply(&program)?;
    Ok(Sandboxed(()))
}

/// Takes from the opener what it does not need: it goes on being root to files, and to nothing else.
///
/// # Errors
/// `System` at the first step that fails. The process must not serve then.
pub(crate) fn confine_opener(
    bounding_set: BoundingSet,
    kept: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let program = filter::compile(Role::Opener)?;
    bounding_set.ensure_empty();
    sys::keep_file_reading_capability()
        .map_err(|error| Error::system("cannot give up capabilities", reason(&error)))?;
    forbid_new_privileges()?;
    kernel::deny(Denied::AllButReading)?;
    limits::close_all_but(kept)?;
    forbid_tracing()?;
    kernel::deny_new_code()?;
    filter::apply(&program)
}

/// Takes from the connector what it does not need: it goes on seeing files and the network, which it is there for, as a user
/// without privileges; or as root, if that was asked for because of who may enter a directory.
///
/// # Errors
/// `System` at the first step that fails. The process must not go on then.
pub(crate) fn confine_connector(
    bounding_set: BoundingSet,
    user: &ConnectorUser,
    kept: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    bounding_set.ensure_empty();
    user.become_for_good()?;
    if !user.is_root() {
        sys::drop_all_capabilities()
            .map_err(|error| Error::system("cannot give up capabilities", reason(&error)))?;
    }
    forbid_new_privileges()?;
    kernel::deny(Denied::Writing)?;
    limits::close_all_but(kept)?;
    limits::set_connector_limits()?;
    kernel::deny_new_code()
}

/// No program that could be started may ever give privileges back. landlock_restrict_self(2) and seccomp(2) ask for it too.
fn forbid_new_privileges() -> Result<(), Error> {
    nix::sys::prctl::set_no_new_privs()
        .map_err(|error| Error::system("cannot set no_new_privs", error.desc()))
}

/// By descriptor, so that what was checked is what is entered.
fn change_root(root: BorrowedFd<'_>) -> Result<(), Error> {
    nix::unistd::fchdir(root)
        .and_then(|()| nix::unistd::chroot("."))
        .and_then(|()| nix::unistd::chdir("/"))
        .map_err(|error| Error::system("cannot change the root directory (--chroot)", error.desc()))
}

/// Opens the directory to be confined in: root's, empty, and not writable by anybody else.
///
/// # Errors
/// `Setup`, saying what is wrong with it.
pub(crate) fn open_root(path: &Path) -> Result<OwnedFd, Error> {
    let fault = |what: String| {
        Error::Setup(format!(
            "chroot directory '{}' (--chroot) {what}",
            path.display()
        ))
    };
    let directory = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path)
        .map_err(|error| fault(format!("cannot be opened: {}", reason(&error))))?;
    let metadata = directory
        .metadata()
        .map_err(|error| fault(format!("cannot be examined: {}", reason(&error))))?;
    if metadata.uid() != 0 {
        return Err(fault(format!(
            "belongs to uid {}, not to root",
            metadata.uid()
        )));
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(fault(format!(
            "is writable by others than root (mode {:04o})",
            metadata.mode() & 0o7777
        )));
    }
    let is_empty = sys::is_empty_directory(directory.as_fd())
        .map_err(|error| fault(format!("cannot be listed: {}", reason(&error))))?;
    if !is_empty {
        return Err(fault("is not empty".to_owned()));
    }
    Ok(directory.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_that_is_no_place_for_confinement_is_refused() {
        for (path, expected) in [
            (
                "/nonexistent/imap-tls",
                "cannot be opened: No such file or directory",
            ),
            ("/etc/passwd", "cannot be opened: Not a directory"),
            ("/tmp", "is writable by others than root (mode 1777)"),
            ("/etc", "is not empty"),
        ] {
            let message = open_root(Path::new(path)).unwrap_err().to_string();
            assert_eq!(
                message,
                format!("chroot directory '{path}' (--chroot) {expected}")
            );
        }
    }
}
