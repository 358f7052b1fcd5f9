//! What processes with privileges are told by those without: the launcher's record, and what passes to and from a connector.
//!
//! Whoever wrote the bytes, what is accepted of a record is only what could be true of a TLS session: no variable of the backend's
//! has another name or a control character in its value, no user is one that useradd(8) would not make, and what was accepted is
//! the same when it is written and read again.
#![no_main]

use imap_tls::fuzzing::launcher::{RECORD_LENGTH, Read, read};
use imap_tls::fuzzing::{Addresses, connector};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use std::os::unix::ffi::OsStrExt as _;

/// All that a record can set, by the names of README's section on the backend's environment.
const VARIABLES: [&str; 23] = [
    "IMAP_TLS",
    "PROTO",
    "REMOTE_ADDR",
    "REMOTE_PORT",
    "SSL_CIPHER",
    "SSL_CLIENT_CERT_SHA256",
    "SSL_CLIENT_I_DN",
    "SSL_CLIENT_M_SERIAL",
    "SSL_CLIENT_SAN_DNS_0",
    "SSL_CLIENT_SAN_Email_0",
    "SSL_CLIENT_S_DN",
    "SSL_CLIENT_S_DN_CN",
    "SSL_CLIENT_S_DN_Email",
    "SSL_CLIENT_VERIFY",
    "SSL_CLIENT_V_END",
    "SSL_PROTOCOL",
    "SSL_SESSION_RESUMED",
    "SSL_TLS_SNI",
    "TCPLOCALIP",
    "TCPLOCALPORT",
    "TCPREMOTEIP",
    "TCPREMOTEPORT",
    "SSL_CLIENT_S_DN_Email",
];
/// Octet, addresses, numbers and flags: where the record's parts begin (src/backend.rs, src/tls/facts.rs).
const ADDRESSES: usize = 1;
const FACTS: usize = ADDRESSES + 37;
const NAME: usize = FACTS + 9;
const CLIENT: usize = NAME + 253;

fuzz_target!(|input: &[u8]| {
    connector_messages(input);
    let mut record = input.to_vec();
    record.resize(RECORD_LENGTH, 0);
    let behind = read(&record, true, true);
    let socket = read(&record, false, true);
    // Where the address is the socket's, nobody may say another.
    match (&behind, &socket) {
        (Some(read), None) => assert!(read.addresses.is_some()),
        (behind, socket) => assert_eq!(behind, socket),
    }
    // Where no client is asked for a certificate, nobody may say that one has shown it.
    let is_client = |read: &Read| {
        let variables = &mut read.environment.iter();
        variables.any(|variable| variable.to_bytes() == b"SSL_CLIENT_VERIFY=SUCCESS")
    };
    match (&behind, &read(&record, true, false)) {
        (Some(read), None) => assert!(is_client(read)),
        (behind, unasked) => {
            assert_eq!(behind, unasked);
            assert!(!unasked.as_ref().is_some_and(is_client));
        }
    }
    let naive = naive(&record);
    assert_eq!(behind.is_some(), naive.is_some(), "{behind:?}");
    let (Some(accepted), Some(naive)) = (behind, naive) else {
        return;
    };
    assert_eq!(accepted.addresses.is_some(), naive.has_addresses);
    assert_eq!(accepted.encoded.len(), RECORD_LENGTH);
    assert_eq!(
        read(&accepted.encoded, true, true).as_ref(),
        Some(&accepted)
    );
    for variable in &accepted.environment {
        let text = variable.to_str().expect("text");
        let (name, value) = text.split_once('=').expect("a name");
        assert!(VARIABLES.contains(&name), "{name}");
        assert!(!value.chars().any(char::is_control) && value.len() <= 512);
    }
    let mut names: Vec<_> = accepted
        .environment
        .iter()
        .map(|variable| name_of(variable))
        .collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), accepted.environment.len(), "a variable twice");
    let value = |name: &str| {
        let variables = accepted
            .environment
            .iter()
            .filter_map(|variable| variable.to_str().ok());
        variables
            .filter_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
            .next()
    };
    assert_eq!(value("IMAP_TLS").is_some(), naive.is_tls);
    assert_eq!(value("SSL_TLS_SNI").unwrap_or_default(), naive.name);
    let common_name = value("SSL_CLIENT_S_DN_CN");
    if let Some(user) = &accepted.user {
        assert_eq!(Some(user.as_str()), common_name);
        assert!(user != "root" || common_name == Some("root"));
        assert!(user.bytes().all(|byte| byte.is_ascii_lowercase()
            || byte.is_ascii_digit()
            || b"_-.".contains(&byte)));
        assert!(
            !user.starts_with(['-', '.'])
                && !user.as_bytes()[0].is_ascii_digit()
                && user.len() <= 32
        );
    }
    if let Some(Addresses { peer, .. }) = &accepted.addresses {
        assert_eq!(value("TCPREMOTEIP"), Some(peer.ip().to_string().as_str()));
    }
});

fn name_of(variable: &std::ffi::CStr) -> &[u8] {
    let bytes = variable.to_bytes();
    let end = bytes.iter().position(|&byte| byte == b'=').unwrap_or(0);
    &bytes[..end]
}

/// What a second, naive reading of the record finds.
struct Naive {
    has_addresses: bool,
    is_tls: bool,
    name: String,
}

fn naive(record: &[u8]) -> Option<Naive> {
    let addresses = &record[ADDRESSES..FACTS];
    let has_addresses = match addresses[0] {
        0 if addresses.iter().all(|&byte| byte == 0) => false,
        6 => true,
        _ => return None,
    };
    let is_tls = match record[0] {
        1 => false,
        2 => true,
        _ => return None,
    };
    let mut name = String::new();
    if is_tls {
        let [resumed, known, length] = [6, 7, 8].map(|at| record[FACTS + at]);
        if resumed > 1 || known > 1 || length > 253 {
            return None;
        }
        name = String::from_utf8(record[NAME..NAME + usize::from(length)].to_vec()).ok()?;
        let is_label = |label: &str| {
            let is_good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
            (1..=63).contains(&label.len()) && label.bytes().all(is_good)
        };
        if !name.is_empty() && !name.split('.').all(is_label) {
            return None;
        }
        name.make_ascii_lowercase();
        let client = &record[CLIENT..];
        if known == 0 && client.iter().any(|&byte| byte != 0) {
            return None;
        }
        if known == 1 {
            naive_client(client)?;
        }
    }
    Some(Naive {
        has_addresses,
        is_tls,
        name,
    })
}

/// Lengths and texts, and nothing but zeroes behind.
fn naive_client(bytes: &[u8]) -> Option<()> {
    let mut at = 0;
    for (limit, is_number) in [
        (512, false),
        (80, true),
        (253, false),
        (320, false),
        (512, false),
        (253, false),
        (320, false),
        (24, false),
        (64, true),
    ] {
        let length = usize::from(*bytes.get(at)?) * 256 + usize::from(*bytes.get(at + 1)?);
        let text = std::str::from_utf8(bytes.get(at + 2..at + 2 + length)?).ok()?;
        let is_digit = |character: char| "0123456789ABCDEF".contains(character);
        if length > limit
            || text.chars().any(char::is_control)
            || is_number && !text.chars().all(is_digit)
        {
            return None;
        }
        at += 2 + length;
    }
    bytes[at..].iter().all(|&byte| byte == 0).then_some(())
}

fn connector_messages(input: &[u8]) {
    if let Some(order) = connector::order(input) {
        assert_eq!(order, input);
    }
    if let Some((answer, is_done)) = connector::answer(input) {
        assert!(answer.len() <= 512);
        // A text is repaired and cut, but what it is about stays.
        assert_eq!(
            (answer[0], is_done),
            (input[0], ![100, 111].contains(&input[0]))
        );
        let (_, is_done_again) = connector::answer(&answer).expect("an answer");
        assert_eq!(is_done_again, is_done);
    } else {
        assert!(input.is_empty());
    }
    let text = std::ffi::OsStr::from_bytes(input);
    if let Some(shown) = connector::target(text) {
        assert!(!shown.is_empty());
        // A path need not be text, and is shown so that it is.
        if text.to_str().is_some() {
            assert_eq!(connector::target(shown.as_ref()), Some(shown));
        }
    }
}

// From nothing a fuzzer would hardly come to a record: it begins with good ones.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = if size < 8 && max_size >= RECORD_LENGTH && seed % 4 != 0 {
        data[..RECORD_LENGTH].fill(0);
        data[0] = 2;
        data[FACTS..FACTS + 6].copy_from_slice(&[3, 4, 0x13, 1, 0, 29]);
        data[FACTS + 8] = 9;
        data[NAME..NAME + 9].copy_from_slice(b"localhost");
        if seed % 4 > 1 {
            data[FACTS + 7] = 1;
            let texts = [
                "CN=ca",
                "01",
                "",
                "a@b",
                "CN=joe",
                "joe",
                "",
                "Nov 22 12:30:02 2027 GMT",
                "AB",
            ];
            let mut at = CLIENT;
            for text in texts {
                data[at + 1] = u8::try_from(text.len()).unwrap();
                data[at + 2..at + 2 + text.len()].copy_from_slice(text.as_bytes());
                at += 2 + text.len();
            }
        }
        if seed % 4 == 3 {
            data[ADDRESSES] = 6;
            data[ADDRESSES + 11..ADDRESSES + 17].copy_from_slice(&[255, 255, 192, 0, 2, 7]);
        }
        RECORD_LENGTH
    } else {
        size
    };
    fuzzer_mutate(data, size, max_size)
});
