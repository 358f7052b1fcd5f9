//! The time of day, as certificates and tickets count it.

use std::time::{SystemTime, UNIX_EPOCH};

/// By how much the clocks of those who date what we read may be ahead of ours, in seconds.
pub(crate) const SKEW: i64 = 300;

/// A day, in seconds.
pub(crate) const DAY: i64 = 86_400;

/// Below this, a certificate should have been renewed (they are, at a third of 90 days).
pub(crate) const RENEWAL_DAYS: i64 = 30;

/// Whether what is good from one time until another should have been renewed by now. What lives shorter than certificates, as
/// revocation lists do, is due with its last third.
pub(crate) fn is_due(from: i64, until: i64, now: i64) -> bool {
    let left = until.saturating_sub(now);
    left < RENEWAL_DAYS * DAY && left < until.saturating_sub(from) / 3
}

/// Seconds since 1970.
///
/// # Errors
/// In words, if the machine's clock is set to what cannot be counted so.
pub(crate) fn now() -> Result<i64, String> {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|_| "this machine's clock is before 1970")?;
    i64::try_from(since.as_secs())
        .map_err(|_| "this machine's clock is beyond all dates".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_shorter_is_due_later() {
        for (lifetime, left, expected) in [
            (365, 31, false),
            (365, 29, true),
            (90, 30, false),
            (7, 3, false),
            (7, 2, true),
            (7, -1, true),
        ] {
            let now = (lifetime - left) * DAY;
            assert_eq!(
                is_due(0, lifetime * DAY, now),
                expected,
                "{left} of {lifetime}"
            );
        }
    }
}
