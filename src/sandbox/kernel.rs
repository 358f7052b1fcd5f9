//! Protections that not every kernel and container has: Landlock (landlock(7)) and the refusal of writable memory that becomes
//! executable (`PR_SET_MDWE`, prctl(2)).
//!
//! They stand beneath the system call filter and the chroot, so by default what is lacking is said, not fatal; `--require` makes
//! it so.

use std::fmt;
use std::io;
use std::str::FromStr;

use landlock::{ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _};
use landlock::{Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope};

use crate::error::{Error, reason};
use crate::sys;

/// The newest ABI that was tried. What a later one could deny is not asked for: it might be what a session needs.
const NEWEST: ABI = ABI::V7;
/// The first ABI that has all we ask for.
const COMPLETE: u32 = 6;

/// One thing that has to be there (`--require`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Requirement {
    /// Of this ABI or a later one.
    Landlock(u32),
    Mdwe,
}

impl FromStr for Requirement {
    type Err = String;

    /// `landlock`, `landlock=N` or `mdwe`.
    fn from_str(text: &str) -> Result<Self, String> {
        let abi = match text {
            "mdwe" => return Ok(Self::Mdwe),
            "landlock" => Some(1),
            _ => text
                .strip_prefix("landlock=")
                .and_then(|number| number.parse().ok())
                .filter(|number| *number > 0),
        };
        abi.map(Self::Landlock).ok_or_else(|| {
            "neither landlock, nor landlock=N with the number of an ABI, nor mdwe".to_owned()
        })
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Landlock(1) => f.write_str("landlock"),
            Self::Landlock(abi) => write!(f, "landlock={abi}"),
            Self::Mdwe => f.write_str("mdwe"),
        }
    }
}

/// What this kernel, or the container, lets a process do to itself.
#[derive(Debug)]
pub(crate) struct Features {
    /// The ABI.
    landlock: io::Result<u32>,
    mdwe: io::Result<()>,
}

impl Features {
    /// Asks the kernel. Nothing changes by it.
    pub(crate) fn of_kernel() -> Self {
        Self {
            landlock: sys::landlock_abi(),
            mdwe: sys::has_mdwe(),
        }
    }

    /// What is there, in words.
    pub(crate) fn present(&self) -> Vec<String> {
        let landlock = self.landlock.as_ref().ok();
        let landlock = landlock.map(|abi| format!("Landlock (ABI {abi})"));
        let mdwe = self.mdwe.is_ok().then(|| "PR_SET_MDWE".to_owned());
        landlock.into_iter().chain(mdwe).collect()
    }

    /// What is lacking, and what follows from that, a sentence each.
    pub(crate) fn lacking(&self) -> Vec<String> {
        let landlock = match &self.landlock {
            Ok(COMPLETE..) => None,
            Ok(abi) => Some(format!(
                "Landlock is there in part only (ABI {abi}): nothing but the system call filter and the user ids denies {}",
                not_denied_before(*abi)
            )),
            Err(error) => Some(format!(
                "no Landlock here ({}): nothing but the system call filter, the chroot and the user ids denies files, network and signals",
                reason(error)
            )),
        };
        let mdwe = self.mdwe.as_ref().err().map(|error| {
            format!(
                "no PR_SET_MDWE here ({}): nothing but the system call filter denies memory that becomes executable",
                reason(error)
            )
        });
        landlock.into_iter().chain(mdwe).collect()
    }

    /// Whether all of `required` is there.
    ///
    /// # Errors
    /// `Setup`, naming the first thing that is not.
    pub(crate) fn check(&self, required: &[Requirement]) -> Result<(), Error> {
        for requirement in required {
            let why = match (requirement, &self.landlock, &self.mdwe) {
                (Requirement::Landlock(least), Ok(abi), _) if abi < least => {
                    format!("this kernel has Landlock ABI {abi}")
                }
                (Requirement::Landlock(_), Err(error), _) => {
                    format!(
                        "this kernel or container has no Landlock ({})",
                        reason(error)
                    )
                }
                (Requirement::Mdwe, _, Err(error)) => {
                    format!(
                        "this kernel or container has no PR_SET_MDWE ({})",
                        reason(error)
                    )
                }
                _ => continue,
            };
            return Err(Error::Setup(format!(
                "{requirement} is required (--require), and {why}"
            )));
        }
        Ok(())
    }
}

/// What each ABI brought.
fn not_denied_before(abi: u32) -> String {
    let brought = [
        (3, "truncating files"),
        (4, "TCP"),
        (5, "ioctl(2) on devices"),
        (6, "signals and abstract unix sockets"),
    ];
    let missing = brought.iter().filter(|(first, _)| abi < *first);
    let missing: Vec<_> = missing.map(|(_, what)| *what).collect();
    missing.join(", ")
}

/// What Landlock denies to whom. Descriptors that are open, and sockets that are connected, go on working in any case.
#[derive(Clone, Copy, Debug)]
pub(super) enum Denied {
    /// All that there is: files, TCP, signals to others, abstract sockets.
    All,
    /// Everything but reading files, for the opener. (Links in its directory may lead anywhere.)
    AllButReading,
    /// Writing and executing files, waiting for connections, signals, abstract sockets: the connector's resolver reads files, and
    /// it connects.
    Writing,
}

impl Denied {
    fn files(self) -> BitFlags<AccessFs> {
        match self {
            Self::All => AccessFs::from_all(NEWEST),
            Self::AllButReading | Self::Writing => AccessFs::from_write(NEWEST) | AccessFs::Execute,
        }
    }

    fn network(self) -> BitFlags<AccessNet> {
        match self {
            Self::All | Self::AllButReading => AccessNet::from_all(NEWEST),
            Self::Writing => AccessNet::BindTcp.into(),
        }
    }
}

/// Denies by Landlock what this kernel's Landlock can deny. no_new_privs must be set.
///
/// # Errors
/// `System` if there is a Landlock and it refuses.
pub(super) fn deny(denied: Denied) -> Result<(), Error> {
    let failed =
        |error: landlock::RulesetError| Error::system("cannot enter a Landlock domain", error);
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(denied.files())
        .and_then(|ruleset| ruleset.handle_access(denied.network()))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.no_new_privs(false).restrict_self())
        .map_err(failed)?;
    // It was asked for, so that a kernel that changes its mind is no kernel without.
    match (restricted.ruleset, restricted.landlock) {
        (RulesetStatus::NotEnforced, landlock::LandlockStatus::Available { .. }) => Err(
            Error::System("cannot enter a Landlock domain: it does not take effect".to_owned()),
        ),
        _ => Ok(()),
    }
}

/// Memory that is or was writable never becomes executable, where the kernel can see to that.
///
/// # Errors
/// `System` if it can, and refuses.
pub(super) fn deny_new_code() -> Result<(), Error> {
    match sys::deny_write_execute() {
        Err(error) if sys::has_mdwe().is_ok() => Err(Error::system(
            "cannot deny memory that becomes executable (PR_SET_MDWE)",
            reason(&error),
        )),
        Ok(()) | Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;

    fn features(landlock: Result<u32, Errno>, mdwe: Result<(), Errno>) -> Features {
        Features {
            landlock: landlock.map_err(io::Error::from),
            mdwe: mdwe.map_err(io::Error::from),
        }
    }

    #[test]
    fn a_requirement_is_written_as_it_is_read() {
        for (text, written) in [
            ("landlock", "landlock"),
            ("landlock=1", "landlock"),
            ("landlock=6", "landlock=6"),
            ("mdwe", "mdwe"),
        ] {
            assert_eq!(text.parse::<Requirement>().unwrap().to_string(), written);
        }
        for text in [
            "",
            "landlock=",
            "landlock=0",
            "landlock=-1",
            "landlock=x",
            "mdwe=1",
            "Landlock",
            "seccomp",
        ] {
            assert!(text.parse::<Requirement>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_required_and_not_there_is_named() {
        let all = features(Ok(7), Ok(()));
        let required = [Requirement::Landlock(6), Requirement::Mdwe];
        assert!(all.check(&required).is_ok() && all.lacking().is_empty());
        let none = features(Err(Errno::ENOSYS), Err(Errno::EINVAL));
        assert!(none.check(&[]).is_ok());
        assert_eq!(none.lacking().len(), 2);
        assert!(none.present().is_empty());
        for (features, required, expected) in [
            (
                none,
                Requirement::Landlock(1),
                "landlock is required (--require), and this kernel or container has no Landlock (Function not implemented)",
            ),
            (
                features(Ok(5), Ok(())),
                Requirement::Landlock(6),
                "landlock=6 is required (--require), and this kernel has Landlock ABI 5",
            ),
            (
                features(Ok(7), Err(Errno::EINVAL)),
                Requirement::Mdwe,
                "mdwe is required (--require), and this kernel or container has no PR_SET_MDWE (Invalid argument)",
            ),
        ] {
            assert_eq!(
                features.check(&[required]).unwrap_err().to_string(),
                expected
            );
        }
    }

    #[test]
    fn each_abi_lacks_what_later_ones_brought() {
        for (abi, missing) in [
            (
                1,
                "truncating files, TCP, ioctl(2) on devices, signals and abstract unix sockets",
            ),
            (
                3,
                "TCP, ioctl(2) on devices, signals and abstract unix sockets",
            ),
            (5, "signals and abstract unix sockets"),
        ] {
            let lacking = features(Ok(abi), Ok(())).lacking();
            assert!(lacking[0].ends_with(missing), "{lacking:?}");
        }
        for abi in [6, 7, 99] {
            assert!(features(Ok(abi), Ok(())).lacking().is_empty());
        }
    }
}
