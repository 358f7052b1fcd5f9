//! What the supervisor is told (sd_notify(3)): readiness, a line of status, and that we are alive.

use std::time::{Duration, Instant};

use sd_notify::NotifyState;

/// How often the status may change.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The way to the supervisor, if there is one; without it, nothing happens.
#[derive(Debug)]
pub(super) struct Notifier {
    is_there: bool,
    next_status: Instant,
    next_watchdog: Option<Instant>,
    status: String,
    /// Half of what the supervisor allows.
    watchdog: Option<Duration>,
}

impl Notifier {
    pub(super) fn new() -> Self {
        let watchdog = sd_notify::watchdog_enabled().map(|limit| limit / 2);
        let now = Instant::now();
        Self {
            is_there: std::env::var_os("NOTIFY_SOCKET").is_some(),
            next_status: now,
            next_watchdog: watchdog.map(|_| now),
            status: String::new(),
            watchdog,
        }
    }

    /// A supervisor that cannot be told is no reason not to serve.
    fn tell(state: &[NotifyState<'_>]) {
        let _ = sd_notify::notify(state);
    }

    pub(super) fn ready(&self) {
        Self::tell(&[NotifyState::Ready]);
    }

    pub(super) fn reloading(&self) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            Self::tell(&[NotifyState::Reloading, now]);
        }
    }

    pub(super) fn stopping(&self) {
        Self::tell(&[NotifyState::Stopping]);
    }

    /// When there is something to tell next.
    pub(super) fn next(&self, status: impl FnOnce() -> String) -> Option<Instant> {
        let status = (self.is_there && status() != self.status).then_some(self.next_status);
        status.into_iter().chain(self.next_watchdog).min()
    }

    /// Tells what is due.
    pub(super) fn tend(&mut self, now: Instant, status: impl FnOnce() -> String) {
        if self.next_watchdog.is_some_and(|next| next <= now) {
            Self::tell(&[NotifyState::Watchdog]);
            self.next_watchdog = self.watchdog.map(|interval| now + interval);
        }
        if self.is_there && self.next_status <= now {
            let status = status();
            if status != self.status {
                Self::tell(&[NotifyState::Status(&status)]);
                self.status = status;
                self.next_status = now + STATUS_INTERVAL;
            }
        }
    }
}
