//! waitpid(2) for all signals: nix's reaps a child that a real-time signal has killed, too, but has no word for it and gives an error.

use std::fmt;

use nix::errno::Errno;
use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// How a child ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ChildEnd {
    Exited(u8),
    /// The signal's number: those from 32 to 64 have no names (signal(7)).
    Signalled(libc::c_int),
}

impl ChildEnd {
    /// For the log, where the status says nothing.
    pub(crate) fn how(self) -> String {
        match self {
            Self::Exited(_) => "ended".to_owned(),
            Self::Signalled(_) => self.to_string(),
        }
    }

    /// The exit status to hand on: the child's, or what a shell makes of a signal.
    pub(crate) fn exit_status(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Signalled(number) => u8::try_from(128 + number).unwrap_or(u8::MAX),
        }
    }
}

impl fmt::Display for ChildEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "{status}"),
            Self::Signalled(number) => match Signal::try_from(*number) {
                Ok(signal) => f.write_str(signal.as_str()),
                Err(_) => write!(f, "SIG{number}"),
            },
        }
    }
}

/// Reaps this child, or any, if it has ended. Never waits.
///
/// # Errors
/// As waitpid(2): `ECHILD` where there is none.
pub(crate) fn reap(child: Option<Pid>) -> nix::Result<Option<(Pid, ChildEnd)>> {
    let child = child.map_or(-1, Pid::as_raw);
    let mut status = 0;
    let process = super::uninterrupted(|| {
        // SAFETY: the kernel writes an int, which outlives the call.
        let process = unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) };
        Errno::result(process)
    })?;
    let end = if libc::WIFEXITED(status) {
        ChildEnd::Exited(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
    } else {
        ChildEnd::Signalled(libc::WTERMSIG(status))
    };
    Ok((process != 0).then(|| (Pid::from_raw(process), end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn real_time_signals_are_told() {
        let end = ChildEnd::Signalled(34);
        assert_eq!((end.exit_status(), end.to_string()), (162, "SIG34".into()));
        let end = ChildEnd::Signalled(libc::SIGTERM);
        assert_eq!(
            (end.exit_status(), end.to_string()),
            (143, "SIGTERM".into())
        );
        assert_eq!(ChildEnd::Exited(3).to_string(), "3");
    }
}
