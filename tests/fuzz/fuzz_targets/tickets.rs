//! Ticket keys and tickets: any bytes are taken without a panic, a key set that is accepted is accepted again after encoding, and
//! a ticket opens if it is the very one that was sealed, under the same context, in its time, and never otherwise.
#![no_main]

use imap_tls::keeper::tickets::{
    KEYS_LIMIT, LIFETIME_SECONDS, PLAINTEXT_LIMIT, TICKET_LIMIT, TicketKeys,
};
use libfuzzer_sys::fuzz_target;
use ring::digest::{SHA256, digest};

const NOW: u64 = 1_800_000_000;
const FIXED: &[u8] = b"000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

fuzz_target!(|input: (&[u8], &[u8], &[u8], u16, u8, i32)| {
    let (bytes, context, other, at, damage, age) = input;
    sets(bytes);
    if let Ok(keys) = TicketKeys::from_text(bytes) {
        assert!(bytes.len() >= 64);
        round_trip(&keys, context, other);
    }
    let Ok(keys) = TicketKeys::from_text(FIXED) else {
        unreachable!("a line of 64 digits is a key")
    };
    // Not ours, whatever it looks like: with our key's name, too.
    assert_eq!(keys.open(context, bytes, NOW), None);
    let Some(ticket) = keys.seal(context, other, NOW) else {
        assert!(other.len() > PLAINTEXT_LIMIT);
        return;
    };
    let forged = [&ticket[..17], bytes].concat();
    assert_eq!(keys.open(context, &forged, NOW), None);

    round_trip(&keys, context, other);
    assert_eq!(keys.open(bytes, &ticket, NOW).is_some(), bytes == context);

    let mut damaged = ticket.clone();
    let at = usize::from(at) % ticket.len();
    damaged[at] ^= damage;
    assert_eq!(keys.open(context, &damaged, NOW).is_some(), damage == 0);
    assert_eq!(keys.open(context, &ticket[..at], NOW), None);

    let opens = keys
        .open(context, &ticket, NOW.saturating_add_signed(age.into()))
        .is_some();
    assert_eq!(
        opens,
        (-300..=i64::from(LIFETIME_SECONDS)).contains(&i64::from(age))
    );
});

/// The set in `bytes`, and in `bytes` with what only a very patient fuzzer would find around them.
fn sets(bytes: &[u8]) {
    let count = u8::try_from(bytes.len() / 40).unwrap_or(u8::MAX);
    let body = [b"imap-tls ticket keys 1\n", &[count][..], bytes].concat();
    for body in [bytes, &body] {
        let summed = [body, digest(&SHA256, body).as_ref()].concat();
        for set in [body, &summed] {
            let Some(keys) = TicketKeys::decode(set) else {
                continue;
            };
            assert_eq!(keys.encode(), set);
            assert!(set.len() <= 24 + 40 * KEYS_LIMIT + 32);
            let created: [u8; 8] = set[24..32].try_into().unwrap_or_default();
            round_trip_at(&keys, b"context", b"session", u64::from_be_bytes(created));
        }
    }
}

fn round_trip(keys: &TicketKeys, context: &[u8], session: &[u8]) {
    round_trip_at(keys, context, session, NOW);
}

fn round_trip_at(keys: &TicketKeys, context: &[u8], session: &[u8], now: u64) {
    let Some(ticket) = keys.seal(context, session, now) else {
        assert!(session.len() > PLAINTEXT_LIMIT);
        return;
    };
    assert!(ticket.len() <= TICKET_LIMIT);
    assert_eq!(keys.open(context, &ticket, now).as_deref(), Some(session));
}
