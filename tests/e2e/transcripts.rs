//! The dialogues in tests/transcripts, which the protocol core passes by itself, once more through the whole program: the test is
//! the client on one side and, by `--backend-fd`, the IMAP server on the other.

use crate::harness::*;
use libtest_mimic::Trial;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the client's bytes are cut.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// Each input in one piece.
    Whole,
    /// Each byte in a segment, or a TLS record, of its own.
    Bytes,
}

pub fn tests() -> Vec<Trial> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts");
    let mut files: Vec<PathBuf> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "txt"))
        .collect();
    files.sort();
    assert!(files.len() > 30, "where are the transcripts?");
    let mut tests = Vec::new();
    for file in files {
        for cut in [Cut::Whole, Cut::Bytes] {
            let name = file.file_stem().unwrap().to_string_lossy().into_owned();
            let file = file.clone();
            // Only root can tell which process is the keeper.
            let needs: &[Need] = if name.contains("tls-unavailable") {
                &[Need::Root]
            } else {
                &[]
            };
            tests.push(test(
                &format!("transcript: {name}, {cut:?}"),
                needs,
                move |test| play(test, &file, cut),
            ));
        }
    }
    tests
}

/// One line of a transcript.
#[derive(Debug)]
enum Step {
    Client(Vec<u8>),
    ClientEnd,
    ToClient(Vec<u8>),
    Backend(Vec<u8>),
    BackendEnd,
    ToBackend(Vec<u8>),
    TlsUnavailable,
    StartTls,
    Unread,
    Opaque,
    /// With the reason.
    Close(String),
}

fn parse(text: &str) -> (String, Vec<Step>) {
    let mut policy = None;
    let mut steps = Vec::new();
    for line in text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let (mark, rest) = line.split_once(' ').unwrap_or((line, ""));
        let word = rest.split(' ').next().unwrap_or_default();
        steps.push(match (mark, word) {
            ("policy", name) => {
                policy = Some(name.to_owned());
                continue;
            }
            ("C:", _) => Step::Client(unescape(rest)),
            ("S:", _) => Step::ToClient(unescape(rest)),
            ("B>", _) => Step::Backend(unescape(rest)),
            ("B<", _) => Step::ToBackend(unescape(rest)),
            ("C!", _) => Step::ClientEnd,
            ("B!", _) => Step::BackendEnd,
            ("!", "tls-unavailable") => Step::TlsUnavailable,
            ("=", "starttls") => Step::StartTls,
            ("=", "unread") => Step::Unread,
            ("=", "opaque") => Step::Opaque,
            ("=", "close") => Step::Close(rest.to_owned()),
            _ => panic!("no such line in a transcript: {line}"),
        });
    }
    (policy.expect("a policy"), steps)
}

fn unescape(text: &str) -> Vec<u8> {
    let (text, end) = text
        .strip_suffix("\\c")
        .map_or((text, &b"\r\n"[..]), |text| (text, b""));
    let mut bytes = Vec::new();
    let mut characters = text.bytes();
    while let Some(byte) = characters.next() {
        bytes.push(match (byte, byte == b'\\') {
            (_, true) => match characters.next().unwrap() {
                b'r' => b'\r',
                b'n' => b'\n',
                b't' => b'\t',
                b'0' => 0,
                b'x' => {
                    let digits = [characters.next().unwrap(), characters.next().unwrap()];
                    u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
                }
                other => other,
            },
            (other, false) => other,
        });
    }
    bytes.extend_from_slice(end);
    bytes
}

/// The number under which the backend's descriptor is handed over.
const BACKEND: i32 = 9;

fn play(test: &Test, file: &Path, cut: Cut) {
    let (policy, steps) = parse(&std::fs::read_to_string(file).unwrap());
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .unwrap();
    let mut session = {
        let program = Program::new(test).backend([] as [&str; 0]);
        let name = match policy.as_str() {
            "starttls" => "required",
            "starttls-kept" => "optional",
            name => name,
        };
        program
            .tls(name)
            .option("--backend-fd", BACKEND.to_string())
            .passing(theirs, BACKEND)
            .start()
    };
    let mut backend = Client::on(ours);
    enter(&mut session, &mut backend, &policy);
    for (index, step) in steps.iter().enumerate() {
        let _place = Place(file, step);
        match step {
            Step::Client(bytes) => match cut {
                Cut::Whole => session.client().send(bytes),
                Cut::Bytes => bytes.iter().for_each(|byte| session.client().send([*byte])),
            },
            Step::Backend(bytes) => {
                backend.send(bytes);
                if matches!(steps.get(index + 1), Some(Step::Client(_))) {
                    // Nothing tells in between that it was taken, and the order matters.
                    backend.wait_until_read();
                    session.wait_idle();
                }
            }
            Step::ToClient(bytes) => expect(session.client(), bytes),
            Step::ToBackend(bytes) => expect(&mut backend, bytes),
            Step::ClientEnd => session.client().shutdown(),
            Step::BackendEnd => backend.shutdown(),
            Step::TlsUnavailable => {
                let keeper = session.processes().keeper.expect("a keeper");
                session.kill(keeper, libc::SIGKILL);
                session.wait_log("the keeper has ended");
            }
            Step::StartTls if matches!(steps.get(index + 1), Some(Step::Unread)) => {}
            Step::StartTls => session
                .client()
                .handshake(&TlsOffer::new(Pki::of(Key::P256)))
                .unwrap(),
            Step::Unread => not_executed(&mut session, &mut backend),
            Step::Opaque => is_opaque(&mut session, &mut backend),
            Step::Close(_) => {
                let (rest, _) = session.client().read_to_end();
                assert_eq!(
                    String::from_utf8_lossy(&rest),
                    "",
                    "more than the transcript says"
                );
            }
        }
    }
    drop(backend);
    session.close_client();
    let is_fault = |step: &Step| match step {
        Step::Close(reason) => reason.ends_with("-garbage") || reason.ends_with("-silent"),
        step => matches!(step, Step::TlsUnavailable),
    };
    let status = if steps.iter().any(is_fault) { 111 } else { 0 };
    assert_eq!(session.wait_code(), status, "{}", session.log());
}

/// Says where in a transcript the test was, should it fail there.
struct Place<'a>(&'a Path, &'a Step);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: {:?}", self.0.display(), self.1);
        }
    }
}

/// To the place where the transcript begins.
fn enter(session: &mut Session, backend: &mut Client, policy: &str) {
    let offer = TlsOffer::new(Pki::of(Key::P256));
    match policy {
        "implicit" => session.client().handshake(&offer).unwrap(),
        "starttls" => {
            session.client().greeting();
            session.client().starttls_with(&offer);
        }
        "starttls-kept" => {
            backend.send("* OK [CAPABILITY IMAP4rev1] hello\r\n");
            session.client().greeting();
            session.client().starttls_with(&offer);
        }
        _ => {}
    }
}

fn expect(peer: &mut Client, bytes: &[u8]) {
    let received = peer.read_exact(bytes.len());
    assert_eq!(
        String::from_utf8_lossy(&received),
        String::from_utf8_lossy(bytes)
    );
}

/// What a client sent in clear after STARTTLS is the TLS engine's: no ClientHello, so the connection ends with at most an alert,
/// and the backend sees nothing of it.
fn not_executed(session: &mut Session, backend: &mut Client) {
    session.client().shutdown();
    let (answer, _) = session.client().read_to_end();
    const ALERT: u8 = 21;
    assert!(
        answer.is_empty() || answer[0] == ALERT,
        "{:?}",
        String::from_utf8_lossy(&answer)
    );
    assert!(backend.is_quiet_for(Duration::from_millis(1)) || backend.read_to_end().0.is_empty());
}

/// Bytes that no IMAP parser would leave alone.
fn is_opaque(session: &mut Session, backend: &mut Client) {
    const BYTES: &[u8] = b"x STARTTLS\r\n* CAPABILITY STARTTLS\r\n{99999999999999999999}\r\n\0\r\n";
    session.client().send(BYTES);
    expect(backend, BYTES);
    backend.send(BYTES);
    expect(session.client(), BYTES);
}
