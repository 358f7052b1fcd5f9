//! Malformed and hostile handshakes, a hundred and more. Each ends with an alert or a close, never later than the deadline, with exit
//! status 0, a line in the log, no backend, and nothing left behind.

use crate::harness::records::*;
use crate::harness::*;
use libtest_mimic::Trial;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::version::TLS13;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<Trial> {
    let mut tests = vec![
        test(
            "hostile handshake: a client that drips bytes is cut off when the time is over",
            &[],
            drip,
        ),
        test(
            "hostile handshake: forged records before a TLS 1.3 client's Finished",
            &[],
            |test| {
                table(before_finished(), |row| sealed(test, row, true));
            },
        ),
        test(
            "hostile handshake: forged records in a TLS 1.3 session",
            &[],
            |test| {
                table(in_session(), |row| sealed(test, row, false));
            },
        ),
    ];
    for policy in ["required", "implicit"] {
        tests.extend([
            test(
                &format!("hostile handshake: {policy}: malformed first messages are refused with an alert"),
                &[],
                move |test| {
                    table(refused(), |row| refuse(test, policy, row));
                },
            ),
            test(
                &format!("hostile handshake: {policy}: odd but legal first messages are answered"),
                &[Need::Root],
                move |test| answer(test, policy),
            ),
            test(
                &format!("hostile handshake: {policy}: what is never finished ends when the time is over"),
                &[],
                move |test| unfinished(test, policy),
            ),
        ]);
    }
    tests
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

/// What is sent, and the alert that must come: for clear ones the number, else the library's name for it; 0 or none is a close.
struct Row<S, A> {
    sent: S,
    alert: A,
}

/// Runs all rows, and tells all that go wrong, up to one that panics: what it leaves behind would disturb the others.
fn table<S, A>(rows: Vec<(&'static str, S, A)>, run: impl Fn(&Row<S, A>) -> Result<(), String>) {
    let mut wrong = Vec::new();
    for (name, sent, alert) in rows {
        let row = Row { sent, alert };
        match catch_unwind(AssertUnwindSafe(|| run(&row))) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => wrong.push(format!("{name}: {error}")),
            Err(_) => {
                wrong.push(format!("{name}: see above"));
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The alert in a server's last clear record, if that is what it is.
pub fn alert_of(answer: &[u8]) -> Option<u8> {
    match answer {
        [.., ALERT, 3, 3, 0, 2, 2, description] => Some(*description),
        _ => None,
    }
}

/// None: a close.
const NONE: u8 = 0;
const UNEXPECTED_MESSAGE: u8 = 10;
const HANDSHAKE_FAILURE: u8 = 40;
const ILLEGAL_PARAMETER: u8 = 47;
const DECODE_ERROR: u8 = 50;
const PROTOCOL_VERSION: u8 = 70;
const MISSING_EXTENSION: u8 = 109;

/// Malformed first messages, and the alert for each.
#[rustfmt::skip] // A row is a line.
pub fn refused() -> Vec<(&'static str, Vec<u8>, u8)> {
    let good = Hello::tls13();
    let old = Hello::tls12();
    let key = |bytes: &[u8]| good.clone().with(KEY_SHARE, long(bytes)).records();
    let nist = |point: &[u8]| {
        let hello = good.clone().with(SUPPORTED_GROUPS, long(words(&[SECP256R1])));
        hello.with(KEY_SHARE, long(share(SECP256R1, point))).records()
    };
    let with = |kind, content: &[u8]| good.clone().with(kind, content).records();
    let name = |name: &[u8]| long([&[0][..], &long(name)].concat());
    vec![
        // Records (RFC 8446 section 5.1).
        ("a record longer than any may be", [&[HANDSHAKE, 3, 3, 0x48, 1][..], &[0; 0x4801]].concat(), DECODE_ERROR),
        ("a record of the greatest length that can be written", [HANDSHAKE, 3, 3, 0xff, 0xff].to_vec(), DECODE_ERROR),
        ("an empty handshake record", record(HANDSHAKE, []), DECODE_ERROR),
        ("an empty alert", record(ALERT, []), DECODE_ERROR),
        ("an alert of one octet", record(ALERT, [2]), DECODE_ERROR),
        ("an alert of three octets", record(ALERT, [2, 40, 0]), DECODE_ERROR),
        ("an empty ChangeCipherSpec", record(CHANGE_CIPHER_SPEC, []), DECODE_ERROR),
        ("a ChangeCipherSpec of 2", record(CHANGE_CIPHER_SPEC, [2]), DECODE_ERROR),
        ("a ChangeCipherSpec first", record(CHANGE_CIPHER_SPEC, [1]), UNEXPECTED_MESSAGE),
        ("application data first", record(APPLICATION_DATA, [0; 64]), UNEXPECTED_MESSAGE),
        ("a heartbeat first", record(HEARTBEAT, [1, 0x40, 0]), DECODE_ERROR),
        ("a record of kind 0", record(0, [1]), DECODE_ERROR),
        ("a record of kind 255", record(255, [1]), DECODE_ERROR),
        ("a record of SSL 2's version", [HANDSHAKE, 2, 0, 0, 1, 1].to_vec(), DECODE_ERROR),
        ("a record of version 5.5", [HANDSHAKE, 5, 5, 0, 1, 1].to_vec(), DECODE_ERROR),
        // Handshake messages (RFC 8446 section 4).
        ("a message of 16 MiB", record(HANDSHAKE, [1, 0xff, 0xff, 0xff]), NONE),
        ("an empty ClientHello", record(HANDSHAKE, message(1, [])), DECODE_ERROR),
        ("a ClientHello of two octets", record(HANDSHAKE, message(1, [3, 3])), DECODE_ERROR),
        ("a HelloRequest", record(HANDSHAKE, message(0, [])), UNEXPECTED_MESSAGE),
        ("a ServerHello", record(HANDSHAKE, message(2, good.body())), DECODE_ERROR),
        ("a Finished first", record(HANDSHAKE, message(20, [0; 32])), UNEXPECTED_MESSAGE),
        ("a KeyUpdate first", record(HANDSHAKE, message(24, [1])), UNEXPECTED_MESSAGE),
        ("an unknown message", record(HANDSHAKE, message(99, [0; 32])), UNEXPECTED_MESSAGE),
        ("a ClientHello cut off inside", record(HANDSHAKE, message(1, &good.body()[..60])), DECODE_ERROR),
        ("octets after the extensions", record(HANDSHAKE, message(1, [&good.body()[..], &[0]].concat())), DECODE_ERROR),
        ("two ClientHellos in one record", record(HANDSHAKE, [good.message(), good.message()].concat()), UNEXPECTED_MESSAGE),
        ("an alert between two halves of a ClientHello", halves(&good, &record(ALERT, [1, 90])), NONE),
        ("a ChangeCipherSpec between two halves of a ClientHello", halves(&good, &record(CHANGE_CIPHER_SPEC, [1])), NONE),
        // The hello's fields (RFC 8446 section 4.1.2).
        ("a session id of 33 octets", Hello { session: vec![1; 33],..good.clone() }.records(), DECODE_ERROR),
        ("a session id of 255 octets", Hello { session: vec![1; 255],..good.clone() }.records(), DECODE_ERROR),
        ("no cipher suites", Hello { suites: vec![],..good.clone() }.records(), DECODE_ERROR),
        ("half a cipher suite", Hello { suites: vec![0x13],..good.clone() }.records(), DECODE_ERROR),
        ("no suite that we have", Hello { suites: words(&[0x0a0a, 0x00ff]),..good.clone() }.records(), HANDSHAKE_FAILURE),
        ("no compression method", Hello { compressions: vec![],..good.clone() }.records(), DECODE_ERROR),
        ("deflate alone", Hello { compressions: vec![1],..good.clone() }.records(), ILLEGAL_PARAMETER),
        ("deflate alone, TLS 1.2", Hello { compressions: vec![1],..old.clone() }.records(), ILLEGAL_PARAMETER),
        ("no room for extensions", Hello { extensions: None,..good.clone() }.records(), HANDSHAKE_FAILURE),
        ("version 3.1", Hello { version: 0x0301,..old.clone() }.records(), PROTOCOL_VERSION),
        ("version 3.0", Hello { version: 0x0300,..old.clone() }.records(), PROTOCOL_VERSION),
        ("version 0", Hello { version: 0,..old.clone() }.records(), PROTOCOL_VERSION),
        // Extensions.
        ("an extension twice", good.clone().adding(SUPPORTED_GROUPS, long(words(&[X25519]))).records(), ILLEGAL_PARAMETER),
        ("an unknown extension twice", good.clone().adding(0xfafa, []).adding(0xfafa, []).records(), ILLEGAL_PARAMETER),
        ("an extension longer than the hello", overlong_extension(&good), DECODE_ERROR),
        ("no versions", with(SUPPORTED_VERSIONS, &[0]), DECODE_ERROR),
        ("half a version", with(SUPPORTED_VERSIONS, &[1, 3]), DECODE_ERROR),
        ("versions 1.0 and 1.1", with(SUPPORTED_VERSIONS, &[4, 3, 2, 3, 1]), PROTOCOL_VERSION),
        ("no groups", with(SUPPORTED_GROUPS, &[0, 0]), DECODE_ERROR),
        ("unknown groups", with(SUPPORTED_GROUPS, &[0, 2, 0x7a, 0x7a]), HANDSHAKE_FAILURE),
        ("groups missing", good.clone().without(SUPPORTED_GROUPS).records(), HANDSHAKE_FAILURE),
        ("no signature algorithms", with(SIGNATURE_ALGORITHMS, &[0, 0]), DECODE_ERROR),
        ("signature algorithms missing", good.clone().without(SIGNATURE_ALGORITHMS).records(), HANDSHAKE_FAILURE),
        ("unknown signature algorithms", old.clone().with(SIGNATURE_ALGORITHMS, [0, 2, 0x7a, 0x7a]).records(), HANDSHAKE_FAILURE),
        ("an empty list of names", with(SERVER_NAME, &[0, 0]), DECODE_ERROR),
        ("an empty name", with(SERVER_NAME, &name(b"")), DECODE_ERROR),
        ("a name with a zero octet", with(SERVER_NAME, &name(b"local\0host")), ILLEGAL_PARAMETER),
        ("two names", with(SERVER_NAME, &long([&[0][..], &long(b"a.example"), &[0], &long(b"b.example")].concat())), DECODE_ERROR),
        ("no protocol", with(ALPN, &[0, 0]), DECODE_ERROR),
        ("an empty protocol", with(ALPN, &[0, 1, 0]), DECODE_ERROR),
        ("a protocol longer than its list", with(ALPN, &[0, 2, 9, b'i']), DECODE_ERROR),
        // Key shares (RFC 8446 section 4.2.8; SP 800-56A and RFC 7748 section 6.1 on bad points).
        ("an empty share", key(&share(X25519, [])), DECODE_ERROR),
        ("an X25519 share of zeros", key(&share(X25519, [0; 32])), ILLEGAL_PARAMETER),
        ("an X25519 share of order 8", key(&share(X25519, ORDER_8)), ILLEGAL_PARAMETER),
        ("an X25519 share of 31 octets", key(&share(X25519, [9; 31])), ILLEGAL_PARAMETER),
        ("an X25519 share of 33 octets", key(&share(X25519, [9; 33])), ILLEGAL_PARAMETER),
        ("a P-256 share that is not on the curve", nist(&[&[4][..], &[9; 64]].concat()), ILLEGAL_PARAMETER),
        ("a P-256 share at infinity", nist(&[0]), ILLEGAL_PARAMETER),
        ("a compressed P-256 share", nist(&[&[2][..], &[9; 32]].concat()), ILLEGAL_PARAMETER),
        ("a hybrid share that is too short", hybrid(&good, &[9; 1215]), ILLEGAL_PARAMETER),
        ("a hybrid share that is too long", hybrid(&good, &[9; 1217]), ILLEGAL_PARAMETER),
        ("a hybrid share with numbers beyond ML-KEM's modulus", hybrid(&good, &[0xff; 1216]), ILLEGAL_PARAMETER),
        ("a hybrid share with zeros for X25519", hybrid(&good, &[0; 1216]), ILLEGAL_PARAMETER),
        ("two shares of one group", key(&[share(X25519, [9; 32]), share(X25519, [8; 32])].concat()), ILLEGAL_PARAMETER),
        ("shares missing", good.clone().without(KEY_SHARE).records(), HANDSHAKE_FAILURE),
        // HelloRetryRequest (RFC 8446 section 4.1.4): once.
        ("no share, twice", [with(KEY_SHARE, &[0, 0]), with(KEY_SHARE, &[0, 0])].concat(), ILLEGAL_PARAMETER),
        ("another share than the one asked for", [with(KEY_SHARE, &[0, 0]), key(&share(0x0100, [9; 64]))].concat(), ILLEGAL_PARAMETER),
        // Pre-shared keys (RFC 8446 section 4.2.11).
        ("a pre-shared key that is not the last extension", psk(&good, 1, 1, 32).with(0xfafa, []).records(), ILLEGAL_PARAMETER),
        ("fewer binders than pre-shared keys", psk(&good, 2, 1, 32).records(), ILLEGAL_PARAMETER),
        ("no pre-shared keys in the list", psk(&good, 0, 0, 32).records(), DECODE_ERROR),
        ("a pre-shared key without its modes", psk(&good, 1, 1, 32).without(PSK_MODES).records(), MISSING_EXTENSION),
        // TLS 1.2 after its hello: all that follows is in the first flight too, unasked.
        ("TLS 1.2: ChangeCipherSpec before the key exchange", after(&old, &[record(CHANGE_CIPHER_SPEC, [1])]), UNEXPECTED_MESSAGE),
        ("TLS 1.2: Finished in clear", after(&old, &[record(HANDSHAKE, message(20, [0; 12]))]), UNEXPECTED_MESSAGE),
        ("TLS 1.2: a certificate that was not asked for", after(&old, &[record(HANDSHAKE, message(11, [0, 0, 0]))]), UNEXPECTED_MESSAGE),
        ("TLS 1.2: application data in clear", after(&old, &[record(APPLICATION_DATA, b"a NOOP\r\n")]), UNEXPECTED_MESSAGE),
        ("TLS 1.2: a second hello", after(&old, &[old.records()]), UNEXPECTED_MESSAGE),
        ("TLS 1.2: an empty point", after(&old, &[record(HANDSHAKE, message(16, [0]))]), NONE),
        ("TLS 1.2: a point of zeros", after(&old, &[record(HANDSHAKE, message(16, short([0; 32])))]), ILLEGAL_PARAMETER),
        ("TLS 1.2: a point of 33 octets", after(&old, &[record(HANDSHAKE, message(16, short([9; 33])))]), ILLEGAL_PARAMETER),
        ("TLS 1.2: octets after the point", after(&old, &[record(HANDSHAKE, message(16, [&short([9; 32])[..], &[0]].concat()))]), DECODE_ERROR),
        ("TLS 1.2: an RSA key exchange", after(&old, &[record(HANDSHAKE, message(16, long([9; 256])))]), DECODE_ERROR),
        ("TLS 1.2: a Finished of random octets", after(&old, &[record(HANDSHAKE, message(16, short([9; 32]))), record(CHANGE_CIPHER_SPEC, [1]), record(HANDSHAKE, [0x55; 40])]), 20),
        ("TLS 1.2: a ChangeCipherSpec too many", after(&old, &[record(HANDSHAKE, message(16, short([9; 32]))), record(CHANGE_CIPHER_SPEC, [1]), record(CHANGE_CIPHER_SPEC, [1])]), UNEXPECTED_MESSAGE),
        ("warnings without end", record(ALERT, [1, 90]).repeat(2000), NONE),
        ("ChangeCipherSpecs without end", [good.records(), record(CHANGE_CIPHER_SPEC, [1]).repeat(2000)].concat(), NONE),
    ]
}

/// A point of small order on Curve25519: with it, the shared secret would be zero.
const ORDER_8: [u8; 32] = [
    0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a,
    0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
];

fn halves(hello: &Hello, between: &[u8]) -> Vec<u8> {
    let message = hello.message();
    let (first, second) = message.split_at(40);
    [
        &record(HANDSHAKE, first),
        between,
        &record(HANDSHAKE, second),
    ]
    .concat()
}

fn overlong_extension(hello: &Hello) -> Vec<u8> {
    let mut body = hello.clone().adding(0xfafa, [0]).body();
    let length = body.len() - 3;
    body[length..length + 2].copy_from_slice(&[0xff, 0xff]);
    record(HANDSHAKE, message(1, body))
}

fn hybrid(hello: &Hello, key: &[u8]) -> Vec<u8> {
    let hello = hello
        .clone()
        .with(SUPPORTED_GROUPS, long(words(&[X25519MLKEM768])));
    hello
        .with(KEY_SHARE, long(share(X25519MLKEM768, key)))
        .records()
}

/// With pre-shared keys that nobody knows.
fn psk(hello: &Hello, keys: usize, binders: usize, binder: usize) -> Hello {
    let identity = [long([0x33; 24]), vec![0; 4]].concat();
    let list = [
        long(identity.repeat(keys)),
        long(short(vec![0x44; binder]).repeat(binders)),
    ];
    let hello = hello.clone().with(PSK_MODES, [1, 1]);
    hello.with(PRE_SHARED_KEY, list.concat())
}

fn after(hello: &Hello, records: &[Vec<u8>]) -> Vec<u8> {
    [hello.records(), records.concat()].concat()
}

/// A session where TLS is to begin.
fn begin(test: &Test, policy: &str, change: impl FnOnce(Program) -> Program) -> Session {
    let mut session = change(Program::new(test).tls(policy)).start();
    if policy == "required" {
        session.client().greeting();
        assert!(session.client().command("a STARTTLS").is_ok());
    }
    session
}

fn refuse(test: &Test, policy: &str, row: &Row<Vec<u8>, u8>) -> Result<(), String> {
    let mut session = begin(test, policy, |program| program);
    // It may be refused before all is sent.
    session.client().try_send(&row.sent);
    let (answer, end) = session.client().read_to_end();
    session.close_client();
    let line = session.wait_log("handshake failed: ");
    assert!(
        line.starts_with(&session.peer) && line.ends_with(')'),
        "{line}"
    );
    // What the log claims is true.
    assert!(
        row.alert != NONE || !line.contains("alert sent: "),
        "{line}"
    );
    assert_eq!(session.session_line()["end"], "handshake failed");
    assert_eq!(session.wait_as_last().code(), Some(0), "{}", session.log());
    assert!(test.record().is_empty(), "a backend was started");
    if alert_of(&answer).unwrap_or(NONE) == row.alert && end == End::Eof {
        return Ok(());
    }
    let last = &answer[answer.len().saturating_sub(16)..];
    Err(format!("{end:?} after {last:?}: {line}"))
}

/// What is refused by many and is legal: the server's answer comes.
fn answer(test: &Test, policy: &str) {
    let (good, old) = (Hello::tls13(), Hello::tls12());
    make_dir(&test.path("ticket-keys"), 0o700);
    let single_octets: Vec<u8> = good
        .message()
        .iter()
        .flat_map(|octet| record(HANDSHAKE, [*octet]))
        .collect();
    let early = psk(&good.clone().with(EARLY_DATA, []), 1, 1, 32).records();
    for (name, bytes) in [
        ("TLS 1.3", good.records()),
        ("TLS 1.2", old.records()),
        ("a hello in records of one octet", single_octets),
        (
            "a hello of 60 KiB",
            good.clone().with(PADDING, vec![0; 60_000]).records(),
        ),
        (
            "extensions that nobody knows",
            good.clone().with(0xfafa, [1, 2, 3]).with(15, [1]).records(),
        ),
        (
            "a pre-shared key that nobody knows",
            psk(&good, 1, 1, 32).records(),
        ),
        ("a thousand of them", psk(&good, 1000, 1000, 32).records()),
        (
            "no share: HelloRetryRequest",
            good.clone().with(KEY_SHARE, [0, 0]).records(),
        ),
        (
            "no share, then one",
            [
                good.clone().with(KEY_SHARE, [0, 0]).records(),
                good.records(),
            ]
            .concat(),
        ),
        (
            "early data",
            [early, record(APPLICATION_DATA, [0x77; 200])].concat(),
        ),
        (
            "a share of a group that is not in the list",
            good.clone()
                .with(
                    KEY_SHARE,
                    long([share(0x7a7a, [1]), share(X25519, [9; 32])].concat()),
                )
                .records(),
        ),
        (
            "a TLS 1.2 ticket that nobody knows",
            old.clone().with(35, [0x33; 200]).records(),
        ),
        (
            "version 3.4 in the old field",
            Hello {
                version: 0x0304,
                ..old.clone()
            }
            .records(),
        ),
    ] {
        let keys = test.path("ticket-keys");
        let mut session = begin(test, policy, |program| {
            program.option("--ticket-keys", keys)
        });
        session.client().send_raw(bytes);
        let header = session.client().read_exact(6);
        // A ServerHello, which HelloRetryRequest is a form of.
        assert_eq!((header[0], header[5]), (HANDSHAKE, 2), "{name}: {header:?}");
        session.close_client();
        let line = session.session_line();
        assert!(line["end"].starts_with("client closed"), "{name}: {line:?}");
        assert_eq!(session.wait_as_last().code(), Some(0), "{name}");
    }
    assert!(test.record().is_empty(), "a backend was started");
}

const TIME: Duration = Duration::from_secs(2);

fn unfinished(test: &Test, policy: &str) {
    let good = Hello::tls13().records();
    let rows = [
        ("nothing", Vec::new()),
        ("half a record's header", vec![HANDSHAKE, 3]),
        ("half a record", good[..good.len() - 1].to_vec()),
        (
            "half a message",
            record(HANDSHAKE, &Hello::tls13().message()[..50]),
        ),
        (
            "a message longer than what comes",
            record(HANDSHAKE, [&[1, 0, 0xf0, 0][..], &[3; 100]].concat()),
        ),
        ("a hello and nothing more", good),
        ("a TLS 1.2 hello and nothing more", Hello::tls12().records()),
        (
            "a record of 16 KiB that does not come",
            [&[HANDSHAKE, 3, 3, 0x40, 0][..], &[1; 100]].concat(),
        ),
    ];
    let seconds = TIME.as_secs().to_string();
    // All at once: each takes the whole time.
    let mut sessions: Vec<_> = rows
        .into_iter()
        .map(|(name, bytes)| {
            // From before the program counts.
            let began = Instant::now();
            let mut session = begin(test, policy, |program| {
                program.option("--handshake-timeout", &seconds)
            });
            session.client().send_raw(bytes);
            (name, began, session)
        })
        .collect();
    for (name, began, session) in &mut sessions {
        session.client().read_to_end();
        assert!(
            began.elapsed() + Duration::from_millis(200) > TIME,
            "{name}: too early"
        );
        session.close_client();
        assert_eq!(session.session_line()["end"], "handshake timeout", "{name}");
        assert_eq!(session.wait_code(), 0, "{name}");
    }
    assert!(test.record().is_empty(), "a backend was started");
}

fn drip(test: &Test) {
    let began = Instant::now();
    let mut session = begin(test, "required", |program| {
        program.option("--handshake-timeout", TIME.as_secs().to_string())
    });
    let hello = Hello::tls13().with(PADDING, vec![0; 4000]).records();
    let mut sent = 0;
    for octet in &hello {
        if !session.client().try_send(&[*octet])
            || !session.client().is_quiet_for(Duration::from_millis(20))
        {
            break;
        }
        sent += 1;
    }
    assert!(sent > 10 && sent < hello.len(), "{sent} octets");
    assert!(began.elapsed() + Duration::from_millis(200) > TIME);
    session.client().read_to_end();
    session.close_client();
    assert_eq!(session.session_line()["end"], "handshake timeout");
    assert_eq!(session.wait_code(), 0);
}

type Make = fn(&mut Sealer) -> Vec<u8>;

#[rustfmt::skip] // A row is a line.
fn before_finished() -> Vec<(&'static str, Make, &'static str)> {
    vec![
        ("a wrong Finished", |seal| seal.record(HANDSHAKE, message(20, [0; 32])), "DecryptError"),
        ("a Finished that is too short", |seal| seal.record(HANDSHAKE, message(20, [0; 31])), "DecryptError"),
        ("an empty Finished", |seal| seal.record(HANDSHAKE, message(20, [])), "DecryptError"),
        ("a Finished in clear", |_| record(HANDSHAKE, message(20, [0; 32])), "BadRecordMac"),
        ("a record that does not decrypt", |_| record(APPLICATION_DATA, [0x55; 64]), "BadRecordMac"),
        ("a record that is shorter than its tag", |_| record(APPLICATION_DATA, [0x55; 8]), "BadRecordMac"),
        ("application data before Finished", |seal| seal.record(APPLICATION_DATA, b"a NOOP\r\n"), "UnexpectedMessage"),
        ("a record of zeros", |seal| seal.inner(vec![0; 100]), ""),
        ("an unknown kind inside", |seal| seal.record(99, [1, 2, 3]), "DecodeError"),
        ("a heartbeat inside", |seal| seal.record(HEARTBEAT, [1, 0x40, 0]), "DecodeError"),
        ("a ChangeCipherSpec inside", |seal| seal.record(CHANGE_CIPHER_SPEC, [1]), "UnexpectedMessage"),
        ("a KeyUpdate before Finished", |seal| seal.record(HANDSHAKE, message(24, [0])), "UnexpectedMessage"),
        ("a certificate that was not asked for", |seal| seal.record(HANDSHAKE, message(11, [0, 0, 0, 0])), "UnexpectedMessage"),
        ("EndOfEarlyData without early data", |seal| seal.record(HANDSHAKE, message(5, [])), "UnexpectedMessage"),
        ("a second hello inside", |seal| seal.record(HANDSHAKE, Hello::tls13().message()), "UnexpectedMessage"),
        ("a second hello in clear", |_| Hello::tls13().records(), "BadRecordMac"),
        ("empty handshake records without end", |seal| (0..2000).flat_map(|_| seal.record(HANDSHAKE, [])).collect(), ""),
        ("ChangeCipherSpecs without end", |_| record(CHANGE_CIPHER_SPEC, [1]).repeat(2000), ""),
    ]
}

#[rustfmt::skip] // A row is a line.
fn in_session() -> Vec<(&'static str, Make, &'static str)> {
    vec![
        ("KeyUpdates without end", |seal| { /* Each changes the keys: only the first can be read, and what follows no more. */ let first = seal.record(HANDSHAKE, message(24, [1])); [first, seal.record(HANDSHAKE, message(24, [1]))].concat() }, "BadRecordMac"),
        ("many KeyUpdates in one record", |seal| seal.record(HANDSHAKE, message(24, [1]).repeat(100)), "UnexpectedMessage"),
        ("a KeyUpdate of 2", |seal| seal.record(HANDSHAKE, message(24, [2])), "IllegalParameter"),
        ("a KeyUpdate that is empty", |seal| seal.record(HANDSHAKE, message(24, [])), "DecodeError"),
        ("a hello inside: renegotiation", |seal| seal.record(HANDSHAKE, Hello::tls13().message()), "UnexpectedMessage"),
        ("a hello in clear", |_| Hello::tls13().records(), "BadRecordMac"),
        ("a Finished again", |seal| seal.record(HANDSHAKE, message(20, [0; 32])), "UnexpectedMessage"),
        ("a ticket from the client", |seal| { seal.record(HANDSHAKE, message(4, [[0; 8].to_vec(), short([]), long([1; 8]), long([])].concat())) }, "UnexpectedMessage"),
        ("a request for a certificate", |seal| seal.record(HANDSHAKE, message(13, [0, 0, 0])), "UnexpectedMessage"),
        ("a certificate after the handshake", |seal| seal.record(HANDSHAKE, message(11, [0, 0, 0, 0])), "UnexpectedMessage"),
        ("a heartbeat", |seal| seal.record(HEARTBEAT, [1, 0x40, 0]), "DecodeError"),
        ("a heartbeat in clear", |_| record(HEARTBEAT, [1, 0x40, 0]), "BadRecordMac"),
        ("a ChangeCipherSpec", |_| record(CHANGE_CIPHER_SPEC, [1]), "UnexpectedMessage"),
        ("a record of zeros", |seal| seal.inner(vec![0; 100]), ""),
        ("a record of more than 16 KiB", |seal| seal.record(APPLICATION_DATA, vec![b'a'; (1 << 14) + 1]), "RecordOverflow"),
        ("a record that does not decrypt", |_| record(APPLICATION_DATA, [0x55; 64]), "BadRecordMac"),
        ("a record again", |seal| { let record = seal.record(APPLICATION_DATA, b"a NOOP\r\n"); record.repeat(2) }, "BadRecordMac"),
        ("empty records without end", |seal| { (0..2000).flat_map(|_| seal.record(APPLICATION_DATA, [])).collect() }, ""),
        ("an alert of one octet", |seal| seal.record(ALERT, [2]), "DecodeError"),
        ("warnings without end", |seal| { (0..2000).flat_map(|_| seal.record(ALERT, [1, 90])).collect() }, ""),
    ]
}

/// A TLS 1.3 client that seals what it sends itself, from its Finished on or from after it.
fn sealed(test: &Test, row: &Row<Make, &str>, is_before_finished: bool) -> Result<(), String> {
    let secrets = Arc::new(Secrets::default());
    let mut provider: CryptoProvider = aws_lc_rs::default_provider();
    let suite = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
    provider.cipher_suites.retain(|one| one.suite() == suite);
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(TlsOffer::new(pki()).roots)
        .with_no_client_auth();
    config.key_log = secrets.clone();
    let before = test.record().backends().len();
    let mut session = begin(test, "required", |program| program);
    let client = session.client();
    client.hear_server_by(&Arc::new(config)).unwrap();
    let mut sealer;
    if is_before_finished {
        sealer = Sealer::new(&secrets, "CLIENT_HANDSHAKE_TRAFFIC_SECRET");
    } else {
        client.finish_handshake().unwrap();
        sealer = Sealer::new(&secrets, "CLIENT_TRAFFIC_SECRET_0");
        client.send_raw(sealer.record(APPLICATION_DATA, "a NOOP\r\n"));
        assert!(client.reply("a").is_ok());
    }
    for piece in (row.sent)(&mut sealer).chunks(8192) {
        if !client.try_send_raw(piece) {
            break;
        }
    }
    let (_, end) = client.read_to_end();
    session.close_client();
    let what = if is_before_finished {
        "handshake failed"
    } else {
        "TLS failed"
    };
    let line = session.wait_log(&format!("{what}: "));
    assert_eq!(session.session_line()["end"], what);
    assert_eq!(session.wait_as_last().code(), Some(0), "{}", session.log());
    assert_eq!(
        test.record().backends().len() == before,
        is_before_finished,
        "backends"
    );
    let expected = match row.alert {
        "" => End::Eof,
        alert => End::Tls(format!("received fatal alert: {alert}")),
    };
    if end == expected {
        Ok(())
    } else {
        Err(format!("{end:?}: {line}"))
    }
}
