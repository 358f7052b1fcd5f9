//! Ticket keys, and the session tickets sealed with them: what lets a client resume its session in another process.
//!
//! A connection's processes share no memory with the next connection's, so a ticket (RFC 8446 section 4.6.1, RFC 5077) carries
//! the session itself, sealed with a key that only keepers read. Whatever is wrong with a ticket or with the keys costs a full
//! handshake and nothing else: no function here fails in another way than "no ticket".
//!
//! Keys that we make in a directory seal for half a day and open for a day (RFC 9325 section 3.4, RFC 5077 section 5.5); those
//! that the administrator hands to a fleet in a file live as long as the file says.

mod file;
mod format;
mod seal;
#[cfg(test)]
mod tests;

use std::fmt;

use ring::digest::{Context, SHA256};
use ring::rand::{SecureRandom as _, SystemRandom};

pub(super) use file::{Loaded, load};
pub use seal::{LIFETIME_SECONDS, PLAINTEXT_LIMIT, TICKET_LIMIT};

/// The most keys in one set.
pub const KEYS_LIMIT: usize = 16;
/// How long one of our keys seals. A ticket of its last second opens for [`LIFETIME_SECONDS`] more, which is the other half.
const SEALING_SECONDS: u64 = 12 * 3600;
/// How long one of our keys opens tickets.
const OPENING_SECONDS: u64 = 24 * 3600;
/// The longest time for which a new reader of our keys can be sure to have one that seals. A reader that wants more, as a listener does
/// whose `--renewal` is longer, may have none for the rest of it, and then there are full handshakes. This is less than
/// [`SEALING_SECONDS`], so that not each reader makes a key, and those that still open fit a set.
const SURE_SECONDS: u64 = SEALING_SECONDS - 2 * 3600;
const _: () = assert!(OPENING_SECONDS / (SEALING_SECONDS - SURE_SECONDS) < KEYS_LIMIT as u64);
/// How far two clocks may differ, or one be set back, before a time counts as one that has not come yet.
const CLOCK_TOLERANCE_SECONDS: u64 = 300;
const SECRET_LENGTH: usize = 32;
const ID_LENGTH: usize = 16;

/// The keys that tickets are sealed and opened with.
///
/// They are not wiped when dropped: nobody but the keeper ever reads them, it holds them until its end, and its end is `_exit`
/// as soon as the handshake is over.
pub struct TicketKeys {
    keys: Vec<Key>,
    origin: Origin,
}

/// Where keys come from, which says whether they age.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Origin {
    /// Ours: made, rotated and expired here.
    Directory,
    /// The administrator's: the first one seals, all open, for as long as they are in the file.
    File,
}

#[derive(Clone)]
struct Key {
    /// Seconds since the epoch; 0 in a fixed set, where nobody asks.
    created: u64,
    secret: [u8; SECRET_LENGTH],
    /// What a ticket calls its key: a hash, so that keepers that share nothing but the secret agree on it.
    id: [u8; ID_LENGTH],
}

impl Key {
    /// Refuses a secret of one and the same octet: no random one ever looks like that, but memory or a disk that was never
    /// written does. GnuTLS sealed its tickets with zeros for two years (CVE-2020-13777).
    fn new(created: u64, secret: [u8; SECRET_LENGTH]) -> Option<Self> {
        let [first, rest @ ..] = &secret;
        if rest.iter().all(|octet| octet == first) {
            return None;
        }
        let mut hash = Context::new(&SHA256);
        hash.update(b"imap-tls ticket key id 1\0");
        hash.update(&secret);
        let id = *hash.finish().as_ref().first_chunk()?;
        Some(Self {
            created,
            secret,
            id,
        })
    }

    /// A random key; none if the system has no random numbers to give.
    fn generate(now: u64) -> Option<Self> {
        let mut secret = [0; SECRET_LENGTH];
        SystemRandom::new().fill(&mut secret).ok()?;
        Self::new(now, secret)
    }

    /// Whether it was made less than `seconds` ago.
    fn is_younger_than(&self, seconds: u64, now: u64) -> bool {
        !is_yet_to_come(self.created, now) && now.saturating_sub(self.created) < seconds
    }
}

impl TicketKeys {
    /// The key that new tickets are sealed with.
    fn sealing_key(&self, now: u64) -> Option<&Key> {
        match self.origin {
            Origin::Directory => self
                .keys
                .iter()
                .filter(|key| key.is_younger_than(SEALING_SECONDS, now))
                .max_by_key(|key| key.created),
            Origin::File => self.keys.first(),
        }
    }

    /// The key of that name, if it still opens tickets.
    fn opening_key(&self, id: &[u8; ID_LENGTH], now: u64) -> Option<&Key> {
        let is_open =
            |key: &&Key| self.origin == Origin::File || key.is_younger_than(OPENING_SECONDS, now);
        self.keys.iter().filter(is_open).find(|key| key.id == *id)
    }

    /// The keys of `old` that still open tickets, newest first, with a new one in front if none of them seals until `last`.
    fn renewed(old: Option<&Self>, now: u64, last: u64) -> Option<Self> {
        let mut keys = old.map(|old| old.keys.clone()).unwrap_or_default();
        keys.retain(|key| key.is_younger_than(OPENING_SECONDS, now));
        keys.sort_by_key(|key| std::cmp::Reverse(key.created));
        if !keys
            .iter()
            .any(|key| key.is_younger_than(SEALING_SECONDS, last))
        {
            keys.insert(0, Key::generate(now)?);
        }
        keys.truncate(KEYS_LIMIT);
        let origin = Origin::Directory;
        Some(Self { keys, origin })
    }
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKeys(secret)")
    }
}

/// Whether `time` is so far ahead that this machine's clock, or the one that it came from, must have been wrong.
fn is_yet_to_come(time: u64, now: u64) -> bool {
    time > now.saturating_add(CLOCK_TOLERANCE_SECONDS)
}
