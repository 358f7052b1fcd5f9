//! The keeper, the launcher and the backend as child processes: their ends arrive as a descriptor to poll, and none stays a zombie.

use std::os::fd::{AsFd as _, BorrowedFd};

use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::error::{Error, reason};
use crate::sys;

/// How the backend ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum BackendEnd {
    Exited(u8),
    Signalled(Signal),
}

/// The signals that concern us, as a descriptor: signals become messages that the loop reads.
#[derive(Debug)]
pub(crate) struct Children {
    signals: SignalFd,
}

/// What the signals said.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) ended: Vec<(Pid, BackendEnd)>,
    pub(super) is_terminated: bool,
}

impl Children {
    /// Begins to watch. Call it after the forks, since a blocked signal would be handed down, and before the sandbox.
    ///
    /// # Errors
    /// `System` if the descriptor cannot be had.
    pub(crate) fn watch() -> Result<Self, Error> {
        sys::watch_signals(&[Signal::SIGCHLD, Signal::SIGTERM])
            .map(|signals| Self { signals })
            .map_err(|error| Error::system("cannot watch for signals", error.desc()))
    }

    /// A superserver that ignores SIGCHLD would have the kernel reap our children, and their status would be lost.
    ///
    /// # Errors
    /// `System` if the kernel refuses.
    pub(crate) fn expect() -> Result<(), Error> {
        sys::default_signal(Signal::SIGCHLD)
            .map_err(|error| Error::system("cannot reset SIGCHLD", reason(&error)))
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.signals.as_fd()
    }

    /// Reads the signals that came and reaps what ended. Never waits.
    pub(super) fn news(&self) -> News {
        let mut news = News::default();
        while let Ok(Some(signal)) = self.signals.read_signal() {
            news.is_terminated |= signal.ssi_signo == Signal::SIGTERM as u32;
        }
        // One SIGCHLD may stand for several children.
        loop {
            match any_child() {
                Ok(WaitStatus::Exited(process, status)) => {
                    // wait(2) gives the low eight bits.
                    news.ended.push((
                        process,
                        BackendEnd::Exited(u8::try_from(status & 0xff).unwrap_or(u8::MAX)),
                    ));
                }
                Ok(WaitStatus::Signaled(process, signal, _)) => {
                    news.ended.push((process, BackendEnd::Signalled(signal)));
                }
                Ok(_) | Err(_) => return news,
            }
        }
    }

    /// Waits for the children that have been let go of, at most for `patience`.
    pub(crate) fn reap_rest(&self, patience: std::time::Duration) {
        let deadline = std::time::Instant::now() + patience;
        loop {
            let _ = self.news();
            if any_child() == Err(nix::errno::Errno::ECHILD) {
                return;
            }
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return;
            }
            let mut poll = [nix::poll::PollFd::new(
                self.descriptor(),
                nix::poll::PollFlags::POLLIN,
            )];
            let _ = nix::poll::ppoll(&mut poll, Some(left.into()), None);
        }
    }
}

/// Reaps one that has ended, if one has.
fn any_child() -> nix::Result<WaitStatus> {
    sys::uninterrupted(|| waitpid(None, Some(WaitPidFlag::WNOHANG)))
}

#[cfg(any(test, fuzzing))]
impl Children {
    /// For tests within one process: no signal is ever read.
    pub(super) fn pretended() -> nix::Result<Self> {
        sys::watch_signals(&[]).map(|signals| Self { signals })
    }
}

impl BackendEnd {
    /// The exit status to hand on: the backend's, or what a shell makes of a signal.
    pub(super) fn exit_status(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Signalled(signal) => u8::try_from(128 + signal as i32).unwrap_or(u8::MAX),
        }
    }
}

impl std::fmt::Display for BackendEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "{status}"),
            Self::Signalled(signal) => f.write_str(signal.as_str()),
        }
    }
}
