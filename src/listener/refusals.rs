//! Refusals in the log: a flood of them must not fill the disk.

use std::fmt;
use std::time::{Duration, Instant};

use crate::log::Log;

/// How often refusals are logged: a flood must not fill the disk.
const REFUSAL_INTERVAL: Duration = Duration::from_secs(1);

/// Refusals that were not logged yet.
#[derive(Debug, Default)]
pub(super) struct Refusals {
    count: u64,
    logged_at: Option<Instant>,
}

impl Refusals {
    /// Logs it, or counts it if one was logged a moment ago.
    pub(super) fn note(&mut self, log: &Log, line: fmt::Arguments<'_>) {
        let now = Instant::now();
        if self.next().is_none_or(|next| next <= now) && self.count == 0 {
            log.warning(line);
            self.logged_at = Some(now);
        } else {
            self.count += 1;
        }
    }

    /// When there is something to say about those that were counted.
    pub(super) fn next(&self) -> Option<Instant> {
        self.logged_at.map(|logged_at| logged_at + REFUSAL_INTERVAL)
    }

    /// Says how many there were.
    pub(super) fn tell(&mut self, now: Instant, log: &Log) {
        if self.next().is_some_and(|next| next <= now) {
            self.logged_at = None;
            if self.count > 0 {
                log.warning(format_args!("refused {} more", self.count));
                self.logged_at = Some(now);
                self.count = 0;
            }
        }
    }
}
