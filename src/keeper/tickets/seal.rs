//! Sealing a session into a ticket, and opening it again (pure, but for random numbers).
//!
//! ```text
//! version (1) | key id (16) | salt (32) | AES-256-GCM of: time of issue (8) | session, and the tag (16)
//! ```
//! Each ticket has a key of its own, HKDF-SHA256 of ticket key and salt: no number of tickets comes near the bound that random
//! 96-bit nonces would set (NIST SP 800-38D section 8.3). What precedes the ciphertext is authenticated, and so is the context.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom as _, SystemRandom};

use super::{ID_LENGTH, Key, TicketKeys, is_yet_to_come};

/// The longest ticket that is made or opened. A session with a client's certificate chain takes some KiB, any other 200 octets.
pub const TICKET_LIMIT: usize = 16 * 1024;
/// The longest session that fits into a ticket.
pub const PLAINTEXT_LIMIT: usize = TICKET_LIMIT - HEADER_LENGTH - TIME_LENGTH - TAG_LENGTH;
/// How long a ticket opens, in seconds: the lifetime that clients are told.
pub const LIFETIME_SECONDS: u32 = 12 * 3600;

const VERSION: u8 = 1;
const SALT_LENGTH: usize = 32;
const HEADER_LENGTH: usize = 1 + ID_LENGTH + SALT_LENGTH;
const TIME_LENGTH: usize = 8;
const TAG_LENGTH: usize = 16;

impl TicketKeys {
    /// A ticket for the session `plaintext`, which opens under the same `context` alone; none if no key seals now.
    pub fn seal(&self, context: &[u8], plaintext: &[u8], now: u64) -> Option<Vec<u8>> {
        if plaintext.len() > PLAINTEXT_LIMIT {
            return None;
        }
        let key = self.sealing_key(now)?;
        let mut salt = [0; SALT_LENGTH];
        SystemRandom::new().fill(&mut salt).ok()?;
        let header = [&[VERSION], &key.id[..], &salt].concat();
        let mut sealed = [&now.to_be_bytes(), plaintext].concat();
        ticket_key(key, &salt)?
            .seal_in_place_append_tag(only_nonce(), associated(&header, context)?, &mut sealed)
            .ok()?;
        Some([header, sealed].concat())
    }

    /// The session in `ticket`, if one of these keys sealed it under the same `context` and it is neither old nor from the
    /// future.
    pub fn open(&self, context: &[u8], ticket: &[u8], now: u64) -> Option<Vec<u8>> {
        if ticket.len() > TICKET_LIMIT {
            return None;
        }
        let (header, sealed) = ticket.split_first_chunk::<HEADER_LENGTH>()?;
        let ([version], rest) = header.split_first_chunk::<1>()?;
        let (id, salt) = rest.split_first_chunk()?;
        if *version != VERSION {
            return None;
        }
        let key = self.opening_key(id, now)?;
        let mut sealed = sealed.to_vec();
        let opened = ticket_key(key, salt)?
            .open_in_place(only_nonce(), associated(header, context)?, &mut sealed)
            .ok()?;
        let (issued, session) = opened.split_first_chunk()?;
        let issued = u64::from_be_bytes(*issued);
        let is_old = now.saturating_sub(issued) > u64::from(LIFETIME_SECONDS);
        (!is_old && !is_yet_to_come(issued, now)).then(|| session.to_vec())
    }
}

/// The key of the one ticket that has this salt.
fn ticket_key(key: &Key, salt: &[u8]) -> Option<LessSafeKey> {
    let extracted = Salt::new(HKDF_SHA256, salt).extract(&key.secret);
    let expanded = extracted.expand(&[b"imap-tls ticket 1"], &AES_256_GCM);
    Some(LessSafeKey::new(UnboundKey::from(expanded.ok()?)))
}

/// All zero: the key is used for this one message.
fn only_nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

/// The header, then the context with its length before it, so that no two pairs look alike.
fn associated(header: &[u8], context: &[u8]) -> Option<Aad<Vec<u8>>> {
    let length = u64::try_from(context.len()).ok()?.to_be_bytes();
    Some(Aad::from([header, &length, context].concat()))
}

#[cfg(test)]
mod tests {
    use super::super::{CLOCK_TOLERANCE_SECONDS, KEYS_LIMIT, OPENING_SECONDS, SEALING_SECONDS};
    use super::*;

    const NOW: u64 = 1_800_000_000;
    const LIFETIME: u64 = LIFETIME_SECONDS as u64;

    fn fresh() -> TicketKeys {
        TicketKeys::renewed(None, NOW, NOW).unwrap()
    }

    fn fixed(secrets: &[u8]) -> TicketKeys {
        let line = |octet: &u8| format!("{octet:02x}{}\n", "5a".repeat(31));
        TicketKeys::from_text(secrets.iter().map(line).collect::<String>().as_bytes()).unwrap()
    }

    #[test]
    fn what_is_sealed_opens() {
        let keys = fresh();
        for length in [0, 1, 200, PLAINTEXT_LIMIT] {
            let session = vec![7; length];
            let ticket = keys.seal(b"policy", &session, NOW).unwrap();
            assert_eq!(ticket.len(), length + TICKET_LIMIT - PLAINTEXT_LIMIT);
            assert_eq!(keys.open(b"policy", &ticket, NOW), Some(session));
        }
        assert!(keys.seal(b"", &[7; PLAINTEXT_LIMIT + 1], NOW).is_none());
    }

    #[test]
    fn a_ticket_shows_neither_its_session_nor_that_it_is_the_same_one() {
        let keys = fresh();
        let [one, other] = [(); 2].map(|()| keys.seal(b"", &[b'x'; 64], NOW).unwrap());
        assert!(!one.windows(8).any(|window| window == [b'x'; 8]));
        assert_ne!(one[1 + ID_LENGTH..], other[1 + ID_LENGTH..]);
        assert!(
            !one.windows(8)
                .any(|window| other[1 + ID_LENGTH..].windows(8).any(|w| w == window))
        );
    }

    #[test]
    fn a_damaged_ticket_does_not_open() {
        let keys = fresh();
        let ticket = keys.seal(b"policy", b"session", NOW).unwrap();
        for at in 0..ticket.len() {
            for damage in [1, 0x80, 0xff] {
                let mut damaged = ticket.clone();
                damaged[at] ^= damage;
                assert_eq!(keys.open(b"policy", &damaged, NOW), None, "octet {at}");
            }
            assert_eq!(keys.open(b"policy", &ticket[..at], NOW), None);
        }
        let longer = [&ticket[..], &[0]].concat();
        assert_eq!(keys.open(b"policy", &longer, NOW), None);
    }

    #[test]
    fn a_ticket_over_the_limit_does_not_open() {
        let keys = fresh();
        let mut ticket = keys.seal(b"", &[7; PLAINTEXT_LIMIT], NOW).unwrap();
        assert_eq!(ticket.len(), TICKET_LIMIT);
        assert!(keys.open(b"", &ticket, NOW).is_some());
        ticket.push(0);
        assert!(keys.open(b"", &ticket, NOW).is_none());
        // As large, but otherwise in order: the size alone is the reason.
        let key = keys.sealing_key(NOW).unwrap();
        let header = [&[VERSION], &key.id[..], &[0; SALT_LENGTH]].concat();
        let mut sealed = [&NOW.to_be_bytes()[..], &[7; PLAINTEXT_LIMIT + 1]].concat();
        ticket_key(key, &[0; SALT_LENGTH])
            .unwrap()
            .seal_in_place_append_tag(only_nonce(), associated(&header, b"").unwrap(), &mut sealed)
            .unwrap();
        assert!(keys.open(b"", &[header, sealed].concat(), NOW).is_none());
    }

    #[test]
    fn a_ticket_opens_under_its_own_context_alone() {
        let keys = fresh();
        let ticket = keys.seal(b"policy", b"session", NOW).unwrap();
        for context in [&b""[..], b"polic", b"policy\0", b"Policy", b"\0policy"] {
            assert_eq!(keys.open(context, &ticket, NOW), None);
        }
    }

    #[test]
    fn a_ticket_of_another_key_does_not_open() {
        let ticket = fresh().seal(b"", b"session", NOW).unwrap();
        assert_eq!(fresh().open(b"", &ticket, NOW), None);
        // Not under another key that goes by the same name either.
        let mut namesake = fixed(&[1]);
        let ticket = namesake.seal(b"", b"session", NOW).unwrap();
        namesake.keys[0].secret[0] ^= 1;
        assert_eq!(namesake.open(b"", &ticket, NOW), None);
    }

    #[test]
    fn a_ticket_opens_for_its_lifetime_and_not_before_its_time() {
        let keys = fixed(&[1]);
        let ticket = keys.seal(b"", b"session", NOW).unwrap();
        let opens = |now| keys.open(b"", &ticket, now).is_some();
        assert!(opens(NOW + LIFETIME));
        assert!(!opens(NOW + LIFETIME + 1));
        assert!(!opens(u64::MAX));
        assert!(opens(NOW - CLOCK_TOLERANCE_SECONDS));
        assert!(!opens(NOW - CLOCK_TOLERANCE_SECONDS - 1));
        assert!(!opens(0));
    }

    #[test]
    fn our_key_seals_for_half_a_day_and_opens_for_a_day() {
        let keys = fresh();
        assert!(keys.seal(b"", b"", NOW + SEALING_SECONDS).is_none());
        assert!(
            keys.seal(b"", b"", NOW - CLOCK_TOLERANCE_SECONDS - 1)
                .is_none()
        );
        let last = NOW + SEALING_SECONDS - 1;
        let ticket = keys.seal(b"", b"session", last).unwrap();
        // A ticket's whole life lies within its key's.
        assert!(last + LIFETIME < NOW + OPENING_SECONDS);
        assert!(keys.open(b"", &ticket, last + LIFETIME).is_some());
        // The key's end is the ticket's, even if the ticket claims to be younger.
        let mut older = fresh();
        let ticket = older.seal(b"", b"session", NOW).unwrap();
        older.keys[0].created = NOW - OPENING_SECONDS + 1;
        assert!(older.open(b"", &ticket, NOW).is_some());
        older.keys[0].created -= 1;
        assert!(older.open(b"", &ticket, NOW).is_none());
        older.keys[0].created = NOW + CLOCK_TOLERANCE_SECONDS + 1;
        assert!(older.open(b"", &ticket, NOW).is_none());
    }

    #[test]
    fn before_and_after_a_rotation_tickets_open_and_then_the_old_key_goes() {
        let keys = fresh();
        let later = NOW + SEALING_SECONDS;
        let ticket = keys.seal(b"", b"session", later - 1).unwrap();
        let rotated = TicketKeys::renewed(Some(&keys), later, later).unwrap();
        assert_eq!(rotated.keys.len(), 2);
        assert!(rotated.open(b"", &ticket, later).is_some());
        let newer = rotated.seal(b"", b"session", later).unwrap();
        assert_ne!(newer[1..=ID_LENGTH], ticket[1..=ID_LENGTH]);
        let much_later = later + SEALING_SECONDS;
        let rotated = TicketKeys::renewed(Some(&rotated), much_later, much_later).unwrap();
        assert_eq!(rotated.keys.len(), 2, "the first key is a day old");
        assert!(rotated.open(b"", &newer, much_later).is_some());
        assert!(
            rotated
                .keys
                .iter()
                .all(|key| key.id[..] != ticket[1..=ID_LENGTH])
        );
    }

    #[test]
    fn a_set_never_grows_beyond_its_limit() {
        let mut keys = fresh();
        keys.keys = (0..20)
            .map(|age| Key::generate(NOW - SEALING_SECONDS - age).unwrap())
            .collect();
        let renewed = TicketKeys::renewed(Some(&keys), NOW, NOW).unwrap();
        assert_eq!(renewed.keys.len(), KEYS_LIMIT);
        assert!(renewed.sealing_key(NOW).is_some());
        assert!(TicketKeys::decode(&renewed.encode()).is_some());
    }

    #[test]
    fn of_a_fixed_set_the_first_key_seals_and_all_open() {
        let old = fixed(&[1]);
        let both = fixed(&[2, 1]);
        let ticket = old.seal(b"", b"session", NOW).unwrap();
        assert!(both.open(b"", &ticket, NOW).is_some());
        let ticket = both.seal(b"", b"session", NOW).unwrap();
        assert!(old.open(b"", &ticket, NOW).is_none());
        assert!(fixed(&[3, 2]).open(b"", &ticket, NOW).is_some());
    }

    #[test]
    fn keys_are_not_printed() {
        assert_eq!(format!("{:?}", fresh()), "TicketKeys(secret)");
    }
}
