//! The keeper, the launcher and the backend as child processes: their ends arrive as a descriptor to poll, and none stays a zombie.

use std::os::fd::{AsFd as _, BorrowedFd};

use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;

use crate::error::{Error, reason};
use crate::sys::{self, ChildEnd};

/// The signals that concern us, as a descriptor: signals become messages that the loop reads.
#[derive(Debug)]
pub(crate) struct Children {
    signals: SignalFd,
}

/// What the signals said.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) ended: Vec<(Pid, ChildEnd)>,
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
        while let Ok(Some(ended)) = sys::reap(None) {
            news.ended.push(ended);
        }
        news
    }

    /// Waits for the children that have been let go of, at most for `patience`.
    pub(crate) fn reap_rest(&self, patience: std::time::Duration) {
        let deadline = std::time::Instant::now() + patience;
        loop {
            let _ = self.news();
            if sys::reap(None) == Err(nix::errno::Errno::ECHILD) {
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

#[cfg(any(test, fuzzing))]
impl Children {
    /// For tests within one process: no signal is ever read.
    pub(super) fn pretended() -> nix::Result<Self> {
        sys::watch_signals(&[]).map(|signals| Self { signals })
    }
}
