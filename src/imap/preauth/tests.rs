//! What transcripts cannot say well: limits, sizes, held input, and the same for every cut of random sessions.

use super::*;
use crate::imap::testing::{Cut, Event, Input, Numbers, Session, Setting};

const REQUIRED: Setting = Setting::Cleartext(Policy::Required);
const OPTIONAL: Setting = Setting::Cleartext(Policy::Optional);
const IMPLICIT: Setting = Setting::Secured(Entry::Implicit);
const STARTTLS: Setting = Setting::Secured(Entry::StartTls);

/// A session past its greeting.
fn greeted(setting: Setting, cut: Cut) -> Session {
    let mut session = Session::new(setting, cut);
    session.backend("* OK hello\r\n").events();
    session
}

fn to_client(events: &[Event]) -> String {
    let bytes = events.iter().filter_map(|event| match event {
        Event::ToClient(bytes) => Some(String::from_utf8_lossy(bytes)),
        _ => None,
    });
    bytes.collect()
}

fn to_backend(events: &[Event]) -> String {
    let bytes = events.iter().filter_map(|event| match event {
        Event::ToBackend(bytes) => Some(String::from_utf8_lossy(bytes)),
        _ => None,
    });
    bytes.collect()
}

fn over(limit: ClientLimit) -> Option<Event> {
    Some(Event::Close(CloseReason::ClientLimit(limit)))
}

#[test]
fn lines_up_to_the_limit_are_taken() {
    for (setting, limit) in [
        (REQUIRED, 16 << 10),
        (OPTIONAL, 64 << 10),
        (IMPLICIT, 128 << 10),
    ] {
        for cut in [
            Cut::Whole,
            Cut::Random(7),
            Cut::At(limit),
            Cut::At(limit + 1),
        ] {
            let line = format!("a XYZ {}\r\n", "x".repeat(limit - 7));
            let events = greeted(setting, cut).client(&line).events();
            assert_eq!(events.len(), 1, "{setting:?} {cut:?}");
            assert!(!matches!(events[0], Event::Close(_)));
            let events = greeted(setting, cut)
                .client(&format!("x{line}a NOOP\r\n"))
                .events();
            assert_eq!(to_client(&events), "* BYE Line too long\r\n");
            assert_eq!(events.last().cloned(), over(ClientLimit::Line));
            let endless = "x".repeat(limit + 1);
            assert_eq!(
                greeted(setting, cut).client(&endless).events(),
                events,
                "{setting:?} {cut:?}"
            );
        }
    }
}

#[test]
fn literal_sizes_neither_wrap_nor_pass() {
    for size in [
        "65537",
        "4294967296",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        &"9".repeat(60),
    ] {
        let refused = "a NO [TOOBIG] Literal too big\r\nb BAD Invalid command\r\n";
        let events = greeted(OPTIONAL, Cut::Bytes)
            .client(&format!("a LOGIN {{{size}}}\r\nb \r\n"))
            .events();
        assert_eq!(to_client(&events), refused);
        assert_eq!(to_backend(&events), "");
        for setting in [REQUIRED, OPTIONAL, STARTTLS] {
            let events = greeted(setting, Cut::Bytes)
                .client(&format!("a LOGIN {{{size}+}}\r\nb NOOP\r\n"))
                .events();
            assert_eq!(to_client(&events), "* BYE Literal too big\r\n");
            assert_eq!(events.last().cloned(), over(ClientLimit::Literal));
        }
    }
    let mut session = greeted(OPTIONAL, Cut::Random(3));
    session
        .client("a LOGIN {65536}\r\n")
        .backend("+ go\r\n")
        .client(&"x".repeat(65536))
        .client(" {1}\r\n");
    assert!(to_backend(&session.events()).ends_with("x {1}\r\n"));
}

#[test]
fn commands_before_login_are_counted() {
    let mut session = greeted(REQUIRED, Cut::Whole);
    for _ in 0..1000 {
        session.client("a NOOP\r\n");
    }
    assert_eq!(
        to_client(&session.events()).len(),
        1000 * "a OK NOOP completed\r\n".len()
    );
    let events = session.client("a NOOP\r\n").events();
    assert_eq!(to_client(&events), "* BYE Too much before login\r\n");
    assert_eq!(events.last().cloned(), over(ClientLimit::Commands));

    let mut session = greeted(OPTIONAL, Cut::Whole);
    for _ in 0..10_000 {
        session.client("a NOOP\r\n").backend("a OK\r\n");
    }
    session.events();
    assert_eq!(
        session.client("a NOOP\r\n").events().last().cloned(),
        over(ClientLimit::Commands)
    );
}

#[test]
fn bytes_before_login_are_counted() {
    let mut session = greeted(REQUIRED, Cut::Whole);
    let line = format!("a LOGIN {}\r\n", "x".repeat(16_000));
    let mut last = None;
    for _ in 0..100 {
        last = session.client(&line).events().pop().or(last);
    }
    assert_eq!(last, over(ClientLimit::Bytes));
}

#[test]
fn bad_commands_are_counted() {
    for setting in [REQUIRED, OPTIONAL, STARTTLS] {
        let events = greeted(setting, Cut::Random(5))
            .client(&"\r\n".repeat(20))
            .events();
        let expected = format!(
            "{}* BYE Too many bad commands\r\n",
            "* BAD Invalid tag\r\n".repeat(10)
        );
        assert_eq!(to_client(&events), expected);
        assert_eq!(
            events.last(),
            Some(&Event::Close(CloseReason::TooManyBadCommands))
        );
    }
}

#[test]
fn held_input_is_bounded() {
    for cut in [Cut::Whole, Cut::Random(11)] {
        let mut session = greeted(OPTIONAL, cut);
        assert!(session.preauth.wants_client_input());
        session.client("a NOOP\r\n");
        assert!(session.preauth.wants_client_input());
        session.client(&"x".repeat(limits::HELD_INPUT));
        assert!(!session.preauth.wants_client_input());
        session.events();
        let room = limits::HELD_INPUT_MAXIMUM - limits::HELD_INPUT;
        assert_eq!(session.client(&"x".repeat(room)).events(), []);
        let events = session.client("xy").events();
        assert_eq!(
            to_client(&events),
            "* BYE Too much sent ahead of the answers\r\n"
        );
        assert_eq!(events.last().cloned(), over(ClientLimit::HeldInput));
        assert_eq!(session.preauth.client.len(), 0);
        assert_eq!(
            session.client("a NOOP\r\n").backend("a OK\r\n").events(),
            []
        );
    }
}

#[test]
fn nothing_is_read_or_said_after_starttls() {
    let mut session = greeted(OPTIONAL, Cut::Whole);
    session.client("a STARTTLS\r\nb NOOP\r\n").events();
    assert!(!session.preauth.wants_client_input());
    assert_eq!(session.preauth.goodbye("x"), None);
    session
        .backend("* BYE injected\r\n")
        .client("c LOGIN u p\r\n");
    session.play(&Input::BackendEnd);
    for _ in 0..10 {
        session
            .client(&"x".repeat(100_000))
            .backend(&"x".repeat(100_000));
    }
    session.play(&Input::ClientEnd);
    assert_eq!(session.events(), []);
    assert_eq!(
        session.preauth.take_backend_unread().len(),
        limits::HELD_INPUT_MAXIMUM
    );
    let unread = session.preauth.into_unread();
    assert!(unread.starts_with(b"b NOOP\r\nc LOGIN u p\r\nxxx"));
    assert_eq!(unread.len(), limits::HELD_INPUT_MAXIMUM);
}

#[test]
fn goodbye_only_between_responses() {
    let mut session = Session::new(IMPLICIT, Cut::Whole);
    let bye = Some(b"* BYE x\r\n".to_vec());
    assert_eq!(session.preauth.goodbye("x"), bye);
    session.backend("* OK hel");
    assert_eq!(session.preauth.goodbye("x"), bye);
    session.backend("lo\r\n* ID (\"a\" {5}\r\n");
    assert_eq!(session.preauth.goodbye("x"), None);
    session.backend("12345");
    assert_eq!(session.preauth.goodbye("x"), None);
    session.backend(")\r\n");
    assert_eq!(session.preauth.goodbye("x"), bye);
    session.client("a LOGIN {3}\r\n");
    assert_eq!(session.preauth.goodbye("x"), bye);
    session.backend("a OK\r\n");
    assert_eq!(session.preauth.goodbye("x"), None);
}

#[test]
fn no_goodbye_inside_a_response_of_the_backend() {
    let mut session = greeted(OPTIONAL, Cut::Whole);
    session
        .client("a NOOP\r\n")
        .backend("* ID (\"a\" {500}\r\nxx")
        .events();
    let events = session
        .client(&"x".repeat(limits::HELD_INPUT_MAXIMUM + 1))
        .events();
    assert_eq!(
        events,
        [Event::Close(CloseReason::ClientLimit(
            ClientLimit::HeldInput
        ))]
    );
}

#[test]
fn the_client_is_finished_when_all_it_sent_is_forwarded() {
    let mut session = greeted(OPTIONAL, Cut::Whole);
    session.client("a NOOP\r\nb NOOP\r\nc NO");
    session.play(&Input::ClientEnd);
    assert!(!session.preauth.client_finished());
    session.backend("a OK\r\n");
    assert!(!session.preauth.client_finished());
    session.backend("b OK\r\n");
    assert!(session.preauth.client_finished());
    assert_eq!(to_backend(&session.events()), "a NOOP\r\nb NOOP\r\n");

    let mut session = Session::new(OPTIONAL, Cut::Whole);
    session.client("a LOGOUT\r\n");
    session.play(&Input::ClientEnd);
    assert!(!session.preauth.client_finished());
    session.backend("* OK hello\r\n");
    assert!(session.preauth.client_finished());
}

#[test]
fn endless_lines_of_the_backend_end_the_connection() {
    for setting in [OPTIONAL, IMPLICIT, STARTTLS] {
        for (cut, start) in [
            (Cut::Whole, ""),
            (Cut::Random(1), ""),
            (Cut::Whole, "* OK\r\n"),
        ] {
            let mut session = Session::new(setting, cut);
            session.backend(start).events();
            let events = session
                .backend(&"x".repeat(limits::BACKEND_LINE + 1))
                .events();
            assert_eq!(
                to_client(&events),
                "* BYE [UNAVAILABLE] The mail server is not available\r\n"
            );
            assert_eq!(
                events.last(),
                Some(&Event::Close(CloseReason::BackendLimit))
            );
        }
    }
    let mut session = greeted(OPTIONAL, Cut::Whole);
    let list = " X".repeat(50_000);
    let events = session.backend(&format!("* CAPABILITY{list}\r\n")).events();
    assert_eq!(
        to_client(&events),
        format!("* CAPABILITY{list} STARTTLS\r\n")
    );
    let events = session
        .backend(&format!("* ID ({{{}}}\r\n", "9".repeat(60)))
        .events();
    assert_eq!(
        events.last(),
        Some(&Event::Close(CloseReason::BackendLimit))
    );
}

#[test]
fn large_literals_of_the_backend_are_passed_on() {
    let mut session = greeted(OPTIONAL, Cut::Whole);
    let octets = "* CAPABILITY STARTTLS\r\n".repeat(10_000);
    let response = format!("* X {{{}}}\r\n{octets})\r\n", octets.len());
    assert_eq!(to_client(&session.backend(&response).events()), response);
}

#[test]
fn actions_do_not_show_what_they_carry() {
    assert_eq!(
        format!("{:?}", Action::SendToBackend(b"a LOGIN u secret".to_vec())),
        "SendToBackend(16 bytes)"
    );
}

/// What a session of pseudo-random parts does must not depend on how each part is cut.
#[test]
fn random_sessions_do_not_depend_on_the_cuts() {
    let settings = [
        REQUIRED,
        OPTIONAL,
        IMPLICIT,
        STARTTLS,
        Setting::Secured(Entry::StartTlsKept),
    ];
    for seed in 0..20_000 {
        let mut numbers = Numbers(seed);
        let setting = *numbers.pick(&settings);
        let inputs = random_inputs(&mut numbers);
        let whole = outcome(setting, Cut::Whole, &inputs);
        for cut in [
            Cut::Bytes,
            Cut::At(3),
            Cut::Random(seed),
            Cut::Random(seed + 1),
        ] {
            assert_eq!(
                outcome(setting, cut, &inputs),
                whole,
                "{setting:?} {cut:?} {inputs:?}"
            );
        }
    }
}

type Outcome = (Vec<Vec<Event>>, Vec<bool>, Vec<u8>, Vec<u8>);

fn outcome(setting: Setting, cut: Cut, inputs: &[Input]) -> Outcome {
    let mut session = Session::new(setting, cut);
    let mut wants = Vec::new();
    let mut events = Vec::new();
    for input in inputs {
        session.play(input);
        events.push(session.events());
        wants.push(session.preauth.wants_client_input());
        wants.push(session.preauth.client_finished());
    }
    let all: Vec<&Event> = events.iter().flatten().collect();
    let end = all
        .iter()
        .position(|event| matches!(event, Event::StartTls | Event::Close(_)));
    assert!(
        end.is_none_or(|end| end + 1 == all.len()),
        "something follows the end: {all:?}"
    );
    let backend_unread = session.preauth.take_backend_unread();
    (events, wants, backend_unread, session.preauth.into_unread())
}

fn random_inputs(numbers: &mut Numbers) -> Vec<Input> {
    const CLIENT: &[&str] = &[
        "a NOOP\r\n",
        "b STARTTLS\r\n",
        "b STARTTLS x\r\n",
        "a LOGIN u p\r\n",
        "a LOGIN {3}\r\n",
        "a LOGIN {3+}\r\n",
        "abc",
        " {2+}\r\n",
        "xy\r\n",
        "\r\n",
        "\n",
        "a AUTHENTICATE PLAIN\r\n",
        "dGVzdA==\r\n",
        "*\r\n",
        "a X \0\r\n",
        "a X\rb\n",
        "c COMPRESS DEFLATE\r\n",
        "d LOGOUT\r\n",
        "a ID {0}\r\n",
        "a ID NIL\n",
        "a CAPABILITY\r\n",
        "half",
        "a {8+}\r\nSTARTTLS\r\n",
        "a X {99999+}\r\n",
        "a X {99999}\r\n",
        "a AUTHENTICATE {3+}\r\n",
    ];
    const BACKEND: &[&str] = &[
        "* OK hi\r\n",
        "* OK [CAPABILITY A] hi\r\n",
        "+ go\r\n",
        "a OK done\r\n",
        "a NO no\r\n",
        "b OK x\r\n",
        "c OK x\r\n",
        "d OK bye\r\n",
        "* BYE x\r\n",
        "* CAPABILITY STARTTLS AUTH=EXTERNAL\r\n",
        "* ID (\"a\" {4}\r\n",
        "wxyz",
        ")\r\n",
        "* PREAUTH x\r\n",
        "half",
        "\r\n",
        "a OK [CAPABILITY STARTTLS A]\n",
        "+\r\n",
        "zz OK\r\n",
    ];
    let mut inputs = vec![Input::Backend(b"* OK hi\r\n".to_vec())];
    if numbers.below(8) == 0 {
        inputs.clear();
    }
    for _ in 0..numbers.below(12) + 2 {
        let count = numbers.below(4) + 1;
        inputs.push(match numbers.below(20) {
            0 => Input::ClientEnd,
            1 => Input::BackendEnd,
            2 => Input::TlsUnavailable,
            number if number % 2 == 0 => Input::Client(parts(CLIENT, count, numbers)),
            _ => Input::Backend(parts(BACKEND, count, numbers)),
        });
    }
    inputs
}

fn parts(choices: &[&str], count: usize, numbers: &mut Numbers) -> Vec<u8> {
    (0..count)
        .flat_map(|_| numbers.pick(choices).bytes())
        .collect()
}

/// A backend that reads its input in its own way, with an IMAP server's usual leniencies, and fails the test if that
/// makes it see STARTTLS.
struct ModelBackend {
    numbers: Numbers,
    unread: Vec<u8>,
    /// Octets of a literal it has invited.
    literal: usize,
    /// It has asked for a line of data.
    data: bool,
    /// It reads the line after a literal.
    tag: Option<String>,
}

impl ModelBackend {
    fn read(&mut self, bytes: &[u8]) -> String {
        self.unread.extend_from_slice(bytes);
        let mut replies = String::new();
        loop {
            let octets = self.literal.min(self.unread.len());
            self.unread.drain(..octets);
            self.literal -= octets;
            let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') else {
                return replies;
            };
            let line: Vec<u8> = self.unread.drain(..=end).collect();
            replies += &self.answer(&String::from_utf8_lossy(&line));
        }
    }

    fn answer(&mut self, line: &str) -> String {
        assert!(line.ends_with("\r\n"), "a line ends otherwise: {line:?}");
        let line = line.trim_end();
        let tag = match self.tag.take() {
            Some(tag) => tag,
            None => Self::tag_of_command(line),
        };
        // A "+" that answers a line with a literal invites that literal, as in every server there is.
        let announced = line.strip_suffix('}').and_then(|line| {
            let (_, size) = line.rsplit_once('{')?;
            size.parse().ok()
        });
        let is_data = std::mem::take(&mut self.data);
        let announced: Option<usize> = announced.filter(|_| !is_data);
        let literal = announced.is_some();
        if let Some(size) = announced.filter(|_| self.numbers.below(3) > 0) {
            self.literal = size;
            self.tag = Some(tag);
            return "+ go\r\n".to_owned();
        }
        match self.numbers.below(5) {
            0 if !literal => {
                self.data = true;
                self.tag = Some(tag);
                "* 1 EXISTS\r\n+ more\r\n".to_owned()
            }
            1 => format!("{tag} BAD no\r\n"),
            2 => format!("* ID (\"x\" {{3}}\r\nabc)\r\n{tag} NO no\r\n"),
            3 => format!("{tag} OK [CAPABILITY STARTTLS X] yes\r\n"),
            _ => format!("{tag} NO no\r\n"),
        }
    }

    fn tag_of_command(line: &str) -> String {
        for part in line.split(['\r', '\0', '\n']) {
            let words: Vec<String> = part
                .split_whitespace()
                .map(|word| word.trim_matches('"').to_uppercase())
                .collect();
            assert!(
                !words.iter().take(2).any(|word| word == "STARTTLS"),
                "STARTTLS got through: {line:?}"
            );
        }
        line.split(' ').next().unwrap().to_owned()
    }
}

#[test]
fn no_backend_ever_reads_starttls() {
    const CLIENT: &[&str] = &[
        "a NOOP\r\n",
        "b STARTTLS x\r\n",
        "a LOGIN {3}\r\n",
        "a LOGIN {12+}\r\nx STARTTLS\r\n",
        "abc",
        " {14-}\r\nx STARTTLS\r\n\r\n",
        "\r\n",
        "a AUTHENTICATE X\r\n",
        "*\r\n",
        "a X \0b STARTTLS\r\n",
        "a X\rb STARTTLS\r\n",
        "a {8+}\r\nSTARTTLS\r\n",
        "a  STARTTLS\r\n",
        "a \"STARTTLS\"\r\n",
        "a STARTTLS\t\r\n",
        "\ta STARTTLS\r\n",
        "a X {12}\r\nx STARTTLS\r\n",
        "a AUTHENTICATE {12+}\r\nx STARTTLS\r\n",
        "a X \"{12+}\r\nx STARTTLS\r\n",
        "a X {0+}\r\n",
        "STARTTLS\r\n",
        "STARTTLS STARTTLS\r\n",
    ];
    let mut forwarded = 0;
    for seed in 0..20_000 {
        let mut numbers = Numbers(seed);
        let setting = *numbers.pick(&[IMPLICIT, STARTTLS, Setting::Secured(Entry::StartTlsKept)]);
        let mut session = greeted(setting, Cut::Random(seed));
        let mut backend = ModelBackend {
            numbers: Numbers(seed + 1),
            unread: Vec::new(),
            literal: 0,
            data: false,
            tag: None,
        };
        for _ in 0..numbers.below(9) + 1 {
            let count = numbers.below(4) + 1;
            session.play(&Input::Client(parts(CLIENT, count, &mut numbers)));
            forwarded += converse(&mut session, &mut backend);
            if session.preauth.stage == Stage::Opaque {
                break;
            }
        }
    }
    assert!(forwarded > 100_000, "the model saw little: {forwarded}");
}

/// Plays the backend until it has nothing more to say or the stream is opaque; gives the number of octets it got.
fn converse(session: &mut Session, backend: &mut ModelBackend) -> usize {
    let mut octets = 0;
    loop {
        let mut received = Vec::new();
        for event in session.events() {
            match event {
                Event::ToBackend(bytes) => received.extend(bytes),
                Event::Opaque(_) => return octets,
                _ => {}
            }
        }
        if received.is_empty() {
            return octets;
        }
        octets += received.len();
        let replies = backend.read(&received);
        session.backend(&replies);
    }
}

/// `}` and `+` are good characters of an atom (RFC 3501 section 9), and so of a password; that alone is no literal.
#[test]
fn what_only_ends_like_a_literal_is_passed_on_as_it_is() {
    for command in ["a LOGIN u pass+}\r\n", "a LOGIN u x-}\r\n", "a XYZ +}\r\n"] {
        let events = greeted(OPTIONAL, Cut::Whole).client(command).events();
        assert_eq!(to_backend(&events), command);
    }
    let mut session = greeted(IMPLICIT, Cut::Whole);
    let events = session
        .client("a LOGIN {1}\r\n")
        .backend("+ go\r\n")
        .events();
    assert_eq!(to_client(&events), "+ go\r\n");
    let events = session.client("u pass+}\r\n").events();
    assert_eq!(to_backend(&events), "u pass+}\r\n");
}
