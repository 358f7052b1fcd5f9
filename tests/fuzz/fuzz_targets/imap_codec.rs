//! `imap-codec` as an oracle: what is a command, what is a literal, and where a message ends.
#![no_main]

use imap_codec::CommandCodec;
use imap_codec::decode::Decoder as _;
use imap_codec::fragmentizer::{FragmentInfo, Fragmentizer};
use imap_codec::imap_types::command::CommandBody;
use imap_codec::imap_types::core::LiteralMode;
use imap_tls::fuzzing::imap::{command, literal};
use imap_tls::imap::{Action, Entry, Preauth};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let line = input
        .split(|&byte| byte == b'\n')
        .next()
        .unwrap_or_default();
    literals(line);
    commands(line);
    messages(input);
});

/// The literal that the end of a line announces.
fn literals(line: &[u8]) {
    let mut fragmentizer = Fragmentizer::without_max_message_size();
    fragmentizer.enqueue_bytes(line);
    fragmentizer.enqueue_bytes(b"\r\n");
    let announced = match fragmentizer.progress() {
        Some(FragmentInfo::Line { announcement, .. }) => announcement,
        other => panic!("a line is no line: {other:?}"),
    };
    let announced =
        announced.map(|literal| (u64::from(literal.length), literal.mode == LiteralMode::Sync));
    match literal(line) {
        // LITERAL- of RFC 7888 is written with a plus; those who write `-` mean the same, and the codec does not know them.
        Some(_) if line.ends_with(b"-}") => assert_eq!(announced, None),
        // Beyond 32 bits there is none for the codec, and one beyond our limits for us: it is refused, not overlooked.
        Some((size, _)) if size > u64::from(u32::MAX) => assert_eq!(announced, None),
        ours => assert_eq!(ours, announced),
    }
}

/// A whole command on one line.
fn commands(line: &[u8]) {
    if line.ends_with(b"\r") {
        return;
    }
    let text = [line, b"\r\n"].concat();
    let ours = command(line);
    let Ok((b"", theirs)) = CommandCodec::default().decode(&text) else {
        // By the grammar it is none. We need not look at arguments, except where they make the difference: STARTTLS has none.
        if let Some((_, name)) = ours {
            assert!(name != "STARTTLS" || line.iter().filter(|&&byte| byte == b' ').count() > 1);
        }
        return;
    };
    // Our limit for tags is not the grammar's.
    let tag = theirs.tag.inner();
    let Some((our_tag, name)) = ours else {
        assert!(tag.len() > 64, "no command for us: {theirs:?}");
        return;
    };
    assert_eq!(our_tag, tag.as_bytes());
    let expected = match &theirs.body {
        CommandBody::Authenticate { .. } => "AUTHENTICATE",
        CommandBody::Capability => "CAPABILITY",
        CommandBody::Compress { .. } => "COMPRESS",
        CommandBody::Id { .. } => "ID",
        CommandBody::Login { .. } => "LOGIN",
        CommandBody::Logout => "LOGOUT",
        CommandBody::Noop => "NOOP",
        CommandBody::StartTLS => "STARTTLS",
        _ => "OTHER",
    };
    assert_eq!(name, expected);
}

/// What a backend gets that takes every literal and answers every command with NO: the messages that the codec finds in what the
/// client sent, each whole, in order, and with literals that wait to be invited.
fn messages(input: &[u8]) {
    let mut preauth = Preauth::secured(Entry::StartTlsKept);
    let (mut received, mut answers) = (Vec::new(), Vec::new());
    let mut actions = Vec::new();
    let mut seen = Fragmentizer::without_max_message_size();
    preauth.client_input(input, &mut actions);
    let mut got = Vec::new();
    while !actions.is_empty() {
        for action in std::mem::take(&mut actions) {
            match action {
                Action::SendToBackend(bytes) => {
                    seen.enqueue_bytes(&bytes);
                    received.extend(bytes);
                }
                Action::SendToClient(bytes) => answers.extend(bytes),
                // A client that breaks a rule, or asks for what is refused: there is nothing to compare.
                Action::Close(_) | Action::Opaque(_) | Action::StartTls => return,
            }
        }
        while let Some(fragment) = seen.progress() {
            if let FragmentInfo::Line {
                announcement: Some(literal),
                ..
            } = fragment
            {
                assert_eq!(
                    literal.mode,
                    LiteralMode::Sync,
                    "a literal that nobody invites"
                );
                preauth.backend_input(b"+ go on\r\n", &mut actions);
            }
            if seen.is_message_complete() {
                let message = seen.message_bytes().to_vec();
                let tag = message
                    .split(|&byte| byte == b' ')
                    .next()
                    .unwrap_or_default();
                let answer = [tag, b" NO no\r\n"].concat();
                got.push(message);
                preauth.backend_input(&answer, &mut actions);
            }
        }
    }
    let refusals = [&b" BAD "[..], b" NO [CANNOT]", b" NO [TOOBIG]"];
    if refusals
        .iter()
        .any(|text| answers.windows(text.len()).any(|part| part == *text))
    {
        // What is refused is not passed on, and what belongs to it is for the other targets.
        return;
    }
    if ends_in_minus(input) {
        return;
    }
    let mut sent = Fragmentizer::without_max_message_size();
    sent.enqueue_bytes(input);
    let mut expected = Vec::new();
    let mut message = Vec::new();
    while let Some(fragment) = sent.progress() {
        message.extend(as_forwarded(sent.fragment_bytes(fragment), fragment));
        if sent.is_message_complete() {
            expected.push(std::mem::take(&mut message));
        }
    }
    assert_eq!(got, expected, "{:?}", String::from_utf8_lossy(&received));
}

/// Whether there is a line that may announce a literal by `-}`, which the codec does not know (see [`literals`]).
fn ends_in_minus(input: &[u8]) -> bool {
    let mut lines = input.split(|&byte| byte == b'\n');
    lines.any(|line| line.ends_with(b"-}") || line.ends_with(b"-}\r"))
}

/// A line as the backend gets it: ended by CRLF, with a literal that waits to be invited.
fn as_forwarded(bytes: &[u8], fragment: FragmentInfo) -> Vec<u8> {
    let FragmentInfo::Line { announcement, .. } = fragment else {
        return bytes.to_vec();
    };
    let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let is_non_synchronizing =
        announcement.is_some_and(|literal| literal.mode == LiteralMode::NonSync);
    let mut line = line.to_vec();
    if is_non_synchronizing {
        line.truncate(line.len() - 2);
        line.push(b'}');
    }
    line.extend(b"\r\n");
    line
}
