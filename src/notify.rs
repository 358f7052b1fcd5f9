//! What the supervisor is told (sd_notify(3)): readiness, a line of status, and that we are alive.
//!
//! Clients do not wait for a supervisor that does not read, so nothing here waits for one.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use sd_notify::NotifyState;

use crate::error::reason;
use crate::log::Log;

/// How often the status may change, and how soon a supervisor that does not read is tried again.
const INTERVAL: Duration = Duration::from_secs(1);

/// The way to the supervisor, if there is one; without it, nothing happens.
#[derive(Debug)]
pub(crate) struct Notifier {
    /// Whether it has been logged that the supervisor cannot be told.
    has_warned: bool,
    next_status: Instant,
    next_watchdog: Option<Instant>,
    /// Made at once: later there may be no descriptor to be had.
    socket: Option<UnixDatagram>,
    status: String,
    /// `NOTIFY_SOCKET`
    supervisor: Option<OsString>,
    /// What there was no room for, and when it is tried again.
    unsent: VecDeque<String>,
    unsent_at: Instant,
    /// Half of what the supervisor allows.
    watchdog: Option<Duration>,
}

impl Notifier {
    pub(crate) fn new() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
        let supervisor = std::env::var_os("NOTIFY_SOCKET");
        let now = Instant::now();
        Self {
            has_warned: false,
            next_status: now,
            next_watchdog: watchdog.map(|_| now),
            status: String::new(),
            socket: supervisor.as_ref().and_then(|_| socket().ok()),
            supervisor,
            unsent: VecDeque::new(),
            unsent_at: now,
            watchdog,
        }
    }

    pub(crate) fn ready(&mut self, log: &Log) {
        self.tell(&[NotifyState::Ready], log);
    }

    pub(crate) fn reloading(&mut self, log: &Log) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            // What came of those before is of no use any more.
            self.unsent.clear();
            self.tell(&[NotifyState::Reloading, now], log);
        }
    }

    pub(crate) fn stopping(&mut self, log: &Log) {
        self.tell(&[NotifyState::Stopping], log);
    }

    /// When there is something to tell next.
    pub(crate) fn next(&self, status: impl FnOnce() -> String) -> Option<Instant> {
        self.supervisor.as_ref()?;
        let unsent = (!self.unsent.is_empty()).then_some(self.unsent_at);
        let status = (status() != self.status).then_some(self.next_status);
        [unsent, status, self.next_watchdog]
            .into_iter()
            .flatten()
            .min()
    }

    /// Tells what is due.
    pub(crate) fn tend(&mut self, now: Instant, status: impl FnOnce() -> String, log: &Log) {
        if self.supervisor.is_none() {
            return;
        }
        if self.unsent_at <= now {
            self.send_unsent(log);
        }
        if self.next_watchdog.is_some_and(|next| next <= now) {
            let is_sent = self.send(&text(&[NotifyState::Watchdog]), log);
            self.next_watchdog = self.watchdog.map(|interval| {
                now + if is_sent {
                    interval
                } else {
                    interval.min(INTERVAL)
                }
            });
        }
        if self.next_status <= now {
            let status = status();
            if status != self.status {
                self.next_status = now + INTERVAL;
                if self.send(&text(&[NotifyState::Status(&status)]), log) {
                    self.status = status;
                }
            }
        }
    }

    /// What must not be lost, and keeps its order.
    fn tell(&mut self, states: &[NotifyState<'_>], log: &Log) {
        self.unsent.push_back(text(states));
        self.send_unsent(log);
    }

    fn send_unsent(&mut self, log: &Log) {
        while let Some(first) = self.unsent.pop_front() {
            if !self.send(&first, log) {
                self.unsent.push_front(first);
                self.unsent_at = Instant::now() + INTERVAL;
                return;
            }
        }
    }

    /// Whether the supervisor has room for it. One that cannot be told at all is no reason not to serve, and not tried again.
    fn send(&mut self, text: &str, log: &Log) -> bool {
        let Some(supervisor) = &self.supervisor else {
            return true;
        };
        match send(self.socket.as_ref(), supervisor, text.as_bytes()) {
            Err(error) if is_passing(&error) => return false,
            Err(error) if !self.has_warned => {
                self.has_warned = true;
                log.warning(format_args!(
                    "cannot tell the supervisor of our state (NOTIFY_SOCKET={}): {}",
                    Path::new(supervisor).display(),
                    reason(&error)
                ));
            }
            Err(_) => {}
            Ok(()) => self.has_warned = false,
        }
        true
    }
}

fn text(states: &[NotifyState<'_>]) -> String {
    states.iter().fold(String::new(), |mut text, state| {
        let _ = writeln!(text, "{state}");
        text
    })
}

/// Whether it may go better soon: there is no room, or the system is short of something.
fn is_passing(error: &io::Error) -> bool {
    let error = error.raw_os_error().map(Errno::from_raw);
    matches!(
        error,
        Some(Errno::EAGAIN | Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
    )
}

fn socket() -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Not `sd_notify::notify`, which waits, and has no abstract names.
fn send(socket: Option<&UnixDatagram>, supervisor: &OsStr, text: &[u8]) -> io::Result<()> {
    let address = match supervisor.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(supervisor)?,
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "neither a path nor an abstract name",
            ));
        }
    };
    match socket {
        Some(socket) => socket.send_to_addr(text, &address),
        None => self::socket()?.send_to_addr(text, &address),
    }
    .map(drop)
}
