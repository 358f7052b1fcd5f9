//! Replays tests/transcripts/*.txt into [`super::Preauth`] at every cut. The format is described in the README there.

use super::testing::{Cut, Event, Input, Numbers, Session, Setting};
use super::{CloseReason, Entry, OpaqueReason, Policy};
use std::fs;
use std::path::{Path, PathBuf};

struct Transcript {
    setting: Setting,
    /// What is said at once.
    opening: Vec<Event>,
    steps: Vec<(Input, Vec<Event>)>,
    unread: Option<Vec<u8>>,
}

#[test]
fn transcripts_hold_at_every_cut() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts");
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "txt"));
    files.sort();
    assert!(files.len() >= 20, "transcripts are missing");
    for file in files {
        let transcript = parse(&fs::read_to_string(&file).unwrap(), &file);
        for cut in cuts(&transcript) {
            replay(&transcript, cut, &file);
        }
    }
}

fn cuts(transcript: &Transcript) -> Vec<Cut> {
    let longest = transcript.steps.iter().map(|(input, _)| match input {
        Input::Client(bytes) | Input::Backend(bytes) => bytes.len(),
        _ => 0,
    });
    let mut cuts = vec![Cut::Whole, Cut::Bytes];
    cuts.extend((1..longest.max().unwrap_or(1)).map(Cut::At));
    let mut numbers = Numbers(1);
    cuts.extend((0..50).map(|_| Cut::Random(u64::try_from(numbers.below(1 << 30)).unwrap())));
    cuts
}

fn replay(transcript: &Transcript, cut: Cut, file: &Path) {
    let mut session = Session::new(transcript.setting, cut);
    assert_eq!(
        session.events(),
        transcript.opening,
        "{}: opening",
        file.display()
    );
    for (number, (input, expected)) in transcript.steps.iter().enumerate() {
        session.play(input);
        let step = number + 1;
        assert_eq!(
            &session.events(),
            expected,
            "{}: {cut:?}: step {step}: {input:?}",
            file.display()
        );
    }
    if let Some(unread) = &transcript.unread {
        assert_eq!(
            &session.preauth.into_unread(),
            unread,
            "{}: {cut:?}: unread",
            file.display()
        );
    }
}

fn parse(text: &str, file: &Path) -> Transcript {
    let mut setting = None;
    let mut opening = Vec::new();
    let mut steps: Vec<(Input, Vec<Event>)> = Vec::new();
    let mut unread = None;
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
        let expected = steps
            .last_mut()
            .map_or(&mut opening, |(_, expected)| expected);
        match kind {
            "policy" => setting = Some(parse_setting(rest)),
            "S:" => expect_bytes(expected, Event::ToClient(unescape(rest))),
            "B<" => expect_bytes(expected, Event::ToBackend(unescape(rest))),
            "=" => match rest.split_once(' ') {
                Some(("unread", bytes)) => unread = Some(unescape(bytes)),
                _ => expected.push(parse_event(rest)),
            },
            "C:" => add_input(&mut steps, Input::Client(unescape(rest))),
            "B>" => add_input(&mut steps, Input::Backend(unescape(rest))),
            "C!" => steps.push((Input::ClientEnd, Vec::new())),
            "B!" => steps.push((Input::BackendEnd, Vec::new())),
            "!" if rest == "tls-unavailable" => steps.push((Input::TlsUnavailable, Vec::new())),
            _ => panic!("{}: {line:?}", file.display()),
        }
    }
    let setting = setting.unwrap_or_else(|| panic!("{}: no policy", file.display()));
    Transcript {
        setting,
        opening,
        steps,
        unread,
    }
}

fn parse_setting(name: &str) -> Setting {
    match name {
        "required" => Setting::Cleartext(Policy::Required),
        "optional" => Setting::Cleartext(Policy::Optional),
        "implicit" => Setting::Secured(Entry::Implicit),
        "starttls" => Setting::Secured(Entry::StartTls),
        "starttls-kept" => Setting::Secured(Entry::StartTlsKept),
        _ => panic!("policy {name}"),
    }
}

fn parse_event(text: &str) -> Event {
    match text {
        "starttls" => Event::StartTls,
        "opaque authenticated" => Event::Opaque(OpaqueReason::Authenticated),
        "opaque preauthenticated" => Event::Opaque(OpaqueReason::Preauthenticated),
        "close backend-bye" => Event::Close(CloseReason::BackendBye),
        "close backend-ended" => Event::Close(CloseReason::BackendEnded),
        "close backend-garbage" => Event::Close(CloseReason::BackendGarbage),
        "close backend-out-of-step" => Event::Close(CloseReason::BackendOutOfStep),
        "close backend-preauth" => Event::Close(CloseReason::BackendPreauth),
        "close backend-silent" => Event::Close(CloseReason::BackendSilent),
        "close client-ended" => Event::Close(CloseReason::ClientEnded),
        "close client-limit-literal" => {
            Event::Close(CloseReason::ClientLimit(super::ClientLimit::Literal))
        }
        "close client-malformed" => Event::Close(CloseReason::ClientMalformed),
        "close logout" => Event::Close(CloseReason::Logout),
        "close tls-unavailable" => Event::Close(CloseReason::TlsUnavailable),
        "close too-many-bad-commands" => Event::Close(CloseReason::TooManyBadCommands),
        _ => panic!("= {text}"),
    }
}

/// Lines of one peer in a row arrive together.
fn add_input(steps: &mut Vec<(Input, Vec<Event>)>, input: Input) {
    match (steps.last_mut(), input) {
        (Some((Input::Client(bytes), expected)), Input::Client(more)) if expected.is_empty() => {
            bytes.extend(more)
        }
        (Some((Input::Backend(bytes), expected)), Input::Backend(more)) if expected.is_empty() => {
            bytes.extend(more)
        }
        (_, input) => steps.push((input, Vec::new())),
    }
}

fn expect_bytes(expected: &mut Vec<Event>, event: Event) {
    match (expected.last_mut(), event) {
        (Some(Event::ToClient(bytes)), Event::ToClient(more)) => bytes.extend(more),
        (Some(Event::ToBackend(bytes)), Event::ToBackend(more)) => bytes.extend(more),
        (_, event) => expected.push(event),
    }
}

/// Text with `\r`, `\n`, `\t`, `\0`, `\\`, `\xHH`; CRLF is added unless it ends in `\c`.
fn unescape(text: &str) -> Vec<u8> {
    let (text, end) = match text.strip_suffix("\\c") {
        Some(text) => (text, ""),
        None => (text, "\r\n"),
    };
    let mut bytes = Vec::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => bytes.push(match characters.next().unwrap() {
                'r' => b'\r',
                'n' => b'\n',
                't' => b'\t',
                '0' => 0,
                '\\' => b'\\',
                'x' => {
                    let digits: String = characters.by_ref().take(2).collect();
                    u8::from_str_radix(&digits, 16).unwrap()
                }
                other => panic!("\\{other}"),
            }),
            _ => bytes.extend(character.to_string().bytes()),
        }
    }
    bytes.extend(end.bytes());
    bytes
}
