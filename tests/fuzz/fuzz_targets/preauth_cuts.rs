//! A session of any bytes: the same for every cut, bounded, and with nothing after its end; the same as a second, naive reading
//! of RFC 3501 makes of it; and no STARTTLS reaches a backend that answers every line.
#![no_main]

mod naive_capability;
mod preauth_naive;

use imap_tls::imap::{Action, Entry, Policy, Preauth};
use libfuzzer_sys::fuzz_target;
use preauth_naive::{Naive, Setting};

/// More than is ever held: the limits of the core and one input of the fuzzer.
const HELD_MAXIMUM: usize = 600 * 1024;

fuzz_target!(|input: &[u8]| {
    let Some((&setting, script)) = input.split_first() else {
        return;
    };
    let whole = play(setting, script, usize::MAX);
    assert_eq!(play(setting, script, 1), whole, "byte by byte");
    for cut in [2, 3, 7] {
        assert_eq!(play(setting, script, cut), whole, "in pieces of {cut}");
    }
    no_starttls_gets_through(setting, script);
    compare_with_naive(setting, script);
});

/// Steps are what one side does.
enum Step<'a> {
    Client(&'a [u8]),
    Backend(&'a [u8]),
    ClientEnd,
    BackendEnd,
    TlsUnavailable,
}

/// Lines of the script ended by 0xFF; the first byte of each says who does what.
fn steps(script: &[u8]) -> impl Iterator<Item = Step<'_>> {
    let lines = script.split(|&byte| byte == 0xff);
    lines.filter_map(|line| {
        let (&who, bytes) = line.split_first()?;
        Some(match who % 16 {
            0..=5 => Step::Client(bytes),
            6..=11 => Step::Backend(bytes),
            12 => Step::ClientEnd,
            13 => Step::BackendEnd,
            14 => Step::TlsUnavailable,
            _ => Step::Client(b"\r\n"),
        })
    })
}

/// What came of a session: what each side got, in order, and what was left.
#[derive(Debug, Eq, PartialEq)]
struct Outcome {
    events: Vec<(char, Vec<u8>)>,
    unread: Vec<u8>,
}

fn preauth(setting: u8) -> Preauth {
    match setting % 5 {
        0 => Preauth::cleartext(Policy::Required),
        1 => Preauth::cleartext(Policy::Optional),
        2 => Preauth::secured(Entry::Implicit),
        3 => Preauth::secured(Entry::StartTls),
        _ => Preauth::secured(Entry::StartTlsKept),
    }
}

fn play(setting: u8, script: &[u8], cut: usize) -> Outcome {
    let mut preauth = preauth(setting);
    let mut actions = Vec::new();
    preauth.start(&mut actions);
    let mut events = Vec::new();
    for step in steps(script) {
        match step {
            Step::Client(bytes) => bytes
                .chunks(cut)
                .for_each(|piece| preauth.client_input(piece, &mut actions)),
            Step::Backend(bytes) => bytes
                .chunks(cut)
                .for_each(|piece| preauth.backend_input(piece, &mut actions)),
            Step::ClientEnd => preauth.client_end(&mut actions),
            Step::BackendEnd => preauth.backend_end(&mut actions),
            Step::TlsUnavailable => preauth.tls_unavailable(),
        }
        record(std::mem::take(&mut actions), &mut events);
        let wants = u8::from(preauth.wants_client_input());
        let finished = u8::from(preauth.client_finished());
        events.push(('?', vec![wants, finished]));
    }
    let unread = preauth.into_unread();
    assert!(unread.len() <= HELD_MAXIMUM);
    Outcome { events, unread }
}

/// After each step, what each side has got of it, and how the session stands.
fn compare_with_naive(setting: u8, script: &[u8]) {
    let mut preauth = preauth(setting);
    let mut naive = Naive::new(match setting % 5 {
        0 => Setting::Required,
        1 => Setting::Optional,
        2 => Setting::Implicit,
        3 => Setting::StartTls,
        _ => Setting::StartTlsKept,
    });
    let mut actions = Vec::new();
    preauth.start(&mut actions);
    let mut end = None;
    for (number, step) in steps(script).enumerate() {
        match step {
            Step::Client(bytes) => {
                preauth.client_input(bytes, &mut actions);
                bytes.iter().for_each(|octet| naive.client_octet(*octet));
            }
            Step::Backend(bytes) => {
                preauth.backend_input(bytes, &mut actions);
                bytes.iter().for_each(|octet| naive.backend_octet(*octet));
            }
            Step::ClientEnd => {
                preauth.client_end(&mut actions);
                naive.client_end();
            }
            Step::BackendEnd => {
                preauth.backend_end(&mut actions);
                naive.backend_end();
            }
            Step::TlsUnavailable => {
                preauth.tls_unavailable();
                naive.tls_unavailable();
            }
        }
        let (mut to_client, mut to_backend) = (Vec::new(), Vec::new());
        for action in actions.drain(..) {
            match action {
                Action::SendToClient(bytes) => to_client.extend(bytes),
                Action::SendToBackend(bytes) => to_backend.extend(bytes),
                Action::StartTls => end = Some("StartTls".to_owned()),
                Action::Opaque(reason) => end = Some(format!("{reason:?}")),
                Action::Close(reason) => end = Some(format!("{reason:?}")),
            }
        }
        same(number, "to the client", &to_client, &naive.to_client);
        same(number, "to the backend", &to_backend, &naive.to_backend);
        assert_eq!(end, naive.end, "step {number}: what became of it");
        naive.to_client.clear();
        naive.to_backend.clear();
    }
    if end.as_deref() == Some("StartTls") {
        same(
            usize::MAX,
            "unread",
            &preauth.into_unread(),
            &naive.unread(),
        );
    }
}

fn same(number: usize, what: &str, real: &[u8], naive: &[u8]) {
    assert!(
        real == naive,
        "step {number}, {what}: {:?}, but {:?}",
        String::from_utf8_lossy(real),
        String::from_utf8_lossy(naive)
    );
}

/// Neighbours of one direction become one. Where in its step the stream became opaque may depend on the cuts.
fn record(actions: Vec<Action>, events: &mut Vec<(char, Vec<u8>)>) {
    let mut opaque = None;
    for action in actions {
        let ended = events.iter().any(|(kind, _)| matches!(kind, 'T' | '.'));
        assert!(!ended, "{action:?} after the end");
        let (kind, bytes) = match action {
            Action::SendToClient(bytes) => ('C', bytes),
            Action::SendToBackend(bytes) => ('B', bytes),
            Action::StartTls => ('T', Vec::new()),
            Action::Close(reason) => ('.', format!("{reason:?}").into_bytes()),
            Action::Opaque(reason) => {
                opaque = Some(('o', format!("{reason:?}").into_bytes()));
                continue;
            }
        };
        match events.last_mut() {
            Some((last, sent)) if *last == kind => sent.extend(bytes),
            _ => events.push((kind, bytes)),
        }
    }
    events.extend(opaque);
}

/// Plays the whole script as the client's, against a backend that takes every line for a command, knows no literals
/// and refuses everything.
fn no_starttls_gets_through(setting: u8, script: &[u8]) {
    let mut preauth = preauth(setting);
    let mut actions = Vec::new();
    let mut unread = Vec::new();
    preauth.backend_input(b"* OK hello\r\n", &mut actions);
    preauth.client_input(script, &mut actions);
    while !actions.is_empty() {
        for action in std::mem::take(&mut actions) {
            if let Action::SendToBackend(bytes) = action {
                unread.extend(bytes);
            }
        }
        while let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = unread.drain(..=end).collect();
            let reply = refuse(&line);
            preauth.backend_input(&reply, &mut actions);
        }
    }
}

fn refuse(line: &[u8]) -> Vec<u8> {
    assert!(line.ends_with(b"\r\n"), "a line ends otherwise");
    let mut words = line.split(|byte| byte.is_ascii_whitespace() || matches!(byte, 0 | b'"'));
    let tag = words.next().unwrap_or_default();
    let name = words.find(|word| !word.is_empty()).unwrap_or_default();
    assert!(
        !name.eq_ignore_ascii_case(b"STARTTLS"),
        "STARTTLS got through"
    );
    [tag, b" NO no\r\n"].concat()
}
