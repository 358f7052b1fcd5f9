//! Resumption: by real TLS clients in other processes of ours, across rotations and instances; what does not resume costs a full
//! handshake and no error; ticket keys are where they belong and nowhere else.

use crate::harness::client::sha256;
use crate::harness::pki::{der_element, der_encode};
use crate::harness::program::parse_session_line;
use crate::harness::*;
use imap_tls::keeper::tickets::{TICKET_LIMIT, TicketKeys};
use libtest_mimic::Trial;
use nix::fcntl::{Flock, FlockArg};
use rustls::HandshakeKind;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const OPENSSL: Need = Need::Command("openssl", "openssl");
const TCPSERVER: Need = Need::Command("tcpserver", "ucspi-tcp");

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for (policy, version) in [
        ("required", "-tls1_2"),
        ("required", "-tls1_3"),
        ("implicit", "-tls1_2"),
        ("implicit", "-tls1_3"),
    ] {
        tests.push(test(
            &format!("tickets: openssl {version} resumes in another process, {policy}"),
            &[OPENSSL, TCPSERVER],
            move |test| openssl_resumes(test, policy, version),
        ));
    }
    for version in ["1.2", "1.3"] {
        tests.push(test(
            &format!("tickets: gnutls-cli resumes TLS {version} in another process"),
            &[
                TCPSERVER,
                Need::Command("gnutls-cli", "gnutls-bin"),
                Need::Command("timeout", "coreutils"),
            ],
            move |test| gnutls_resumes(test, version),
        ));
    }
    for (name, version) in [
        ("1.2", &rustls::version::TLS12),
        ("1.3", &rustls::version::TLS13),
    ] {
        tests.push(test(
            &format!("tickets: rustls resumes TLS {name} in another process, again and again"),
            &[],
            move |test| rustls_resumes(test, version),
        ));
    }
    for case in AGES {
        tests.push(test(&format!("tickets: {}", case.name), &[], move |test| {
            aged_keys(test, case)
        }));
    }
    for case in KEY_FILES {
        tests.push(test(
            &format!(
                "tickets: {} costs a full handshake and a line in the log",
                case.name
            ),
            case.needs,
            move |test| broken_key_file(test, case),
        ));
    }
    for case in PLACES {
        tests.push(test(
            &format!(
                "tickets: {} costs resumption and a line in the log",
                case.name
            ),
            case.needs,
            move |test| broken_place(test, case),
        ));
    }
    for (name, script, says) in FILE_SYSTEMS {
        tests.push(test(
            &format!("tickets: {name} costs resumption and a line in the log"),
            &[
                Need::Root,
                TCPSERVER,
                Need::Command("unshare", "util-linux"),
                Need::EachStarted,
            ],
            move |test| file_system(test, script, says),
        ));
    }
    for version in ["-tls1_2", "-tls1_3"] {
        tests.push(test(
            &format!(
                "tickets: none that is damaged, foreign or of another length is an error, {version}"
            ),
            &[OPENSSL, TCPSERVER],
            move |test| damaged_tickets(test, version),
        ));
    }
    tests.extend([
        test(
            "tickets: one is good for twelve hours and not before its time",
            &[OPENSSL, TCPSERVER],
            lifetime,
        ),
        test(
            "tickets: another policy or name does not resume",
            &[OPENSSL, TCPSERVER],
            other_policy_or_name,
        ),
        test(
            "tickets: another demand for client certificates or another CA does not resume",
            &[OPENSSL, TCPSERVER],
            other_client_certificates,
        ),
        test(
            "tickets: two instances that share a directory resume each other's",
            &[],
            shared_directory,
        ),
        test(
            "tickets: a fleet that shares a file of keys resumes each other's while the key is in it",
            &[],
            shared_file,
        ),
        test(
            "tickets: two hundred first connections to a directory that is missing leave one key",
            &[Need::Root, TCPSERVER],
            |test| first_connections(test, false),
        ),
        test(
            "tickets: two hundred first connections to an empty directory leave one key",
            &[Need::Root, TCPSERVER],
            |test| first_connections(test, true),
        ),
        test(
            "tickets: whoever holds the lock and does not go on delays a connection by a second",
            &[],
            held_lock,
        ),
        test(
            "tickets: without the option nothing is resumed and nothing offered",
            &[OPENSSL, TCPSERVER],
            without_option,
        ),
        test(
            "tickets: no early data is offered, and none accepted",
            &[OPENSSL, TCPSERVER],
            early_data,
        ),
        test(
            "tickets: a resumption after a HelloRetryRequest",
            &[OPENSSL, TCPSERVER],
            hello_retry,
        ),
        test(
            "tickets: keys of certificates and of tickets are in the keeper's memory alone",
            &[Need::Root, OPENSSL],
            keys_in_memory,
        ),
    ]);
    tests
}

// ---- the program ----

/// The directory for ticket keys: not there yet.
fn directory(test: &Test) -> PathBuf {
    test.path("tickets")
}

fn resuming(test: &Test) -> Program {
    Program::new(test).option("--ticket-keys", directory(test))
}

fn remembering() -> TlsOffer {
    TlsOffer {
        memory: Some(Memory::default()),
        ..TlsOffer::new(Pki::of(Key::P256))
    }
}

/// What one whole session was like.
struct Visit {
    is_resumed: bool,
    log: String,
}

/// A session from greeting to LOGOUT in a process of its own; client, log and backend must agree on whether it was resumed.
fn visit(test: &Test, program: &Program, offer: &TlsOffer) -> Visit {
    let mut session = program.start();
    let client = session.client();
    client.greeting();
    client.starttls_with(offer);
    client.login();
    assert!(client.command("z LOGOUT").is_ok());
    let is_resumed = client.tls().handshake_kind() == Some(HandshakeKind::Resumed);
    assert_eq!(client.expect_end(), End::CloseNotify);
    // Else the program would linger for its end of file.
    session.close_client();
    assert_eq!(session.wait_code(), 0);
    let fields = session.session_line();
    assert_eq!(fields["resumed"], if is_resumed { "yes" } else { "no" });
    assert_eq!(fields["end"], "backend ended");
    let told = last_backend_is_told(test);
    assert_eq!(told, if is_resumed { "Resumed" } else { "Initial" });
    Visit {
        is_resumed,
        log: session.log(),
    }
}

fn last_backend_is_told(test: &Test) -> String {
    let backends = test.record().backends();
    let environment = backends.last().expect("a backend").environment();
    environment["SSL_SESSION_RESUMED"].clone()
}

fn without_faults(log: &str) {
    let is_fault = |line: &&str| !line.contains(": session ");
    assert_eq!(log.lines().filter(is_fault).collect::<Vec<_>>(), [""; 0]);
}

/// All session lines of a server, once there are as many.
fn session_lines(server: &Server, count: usize) -> Vec<BTreeMap<String, String>> {
    eventually(&format!("{count} session lines"), || {
        let log = server.log();
        let lines: Vec<_> = log
            .lines()
            .filter_map(|line| {
                line.split_once(": session ")
                    .map(|(peer, _)| parse_session_line(line, peer))
            })
            .collect();
        (lines.len() >= count).then_some(lines)
    })
}

/// Whether the newest of `count` sessions was resumed.
fn is_resumed(server: &Server, count: usize) -> bool {
    let lines = session_lines(server, count);
    assert_eq!(lines.len(), count);
    let last = &lines[count - 1];
    assert_eq!(last["end"], "backend ended", "{last:?}");
    last["resumed"] == "yes"
}

// ---- openssl ----

/// One session of `openssl s_client`, which must get through to the backend; gives all that it printed.
fn s_client(test: &Test, server: &Server, policy: &str, arguments: &[&str]) -> String {
    let target = format!("127.0.0.1:{}", server.port);
    let mut tool =
        Tool::new(test, "openssl").args(["s_client", "-ign_eof", "-crlf", "-connect", &target]);
    if policy != "implicit" {
        tool = tool.args(["-starttls", "imap"]);
    }
    if !arguments.contains(&"-servername") {
        tool = tool.args(["-servername", "localhost"]);
    }
    let output = tool
        .args(arguments)
        .input("a LOGIN u sekret\nz LOGOUT\n")
        .run();
    let text = output.text();
    assert!(text.contains("z OK "), "{text}");
    text
}

/// Whether s_client says that it resumed.
fn says_resumed(text: &str) -> bool {
    let (new, reused) = (text.contains("New, TLSv1"), text.contains("Reused, TLSv1"));
    assert!(new != reused, "{text}");
    reused
}

fn openssl_resumes(test: &Test, policy: &str, version: &str) {
    let server = Server::start(test, Superserver::Tcpserver, &resuming(test).tls(policy));
    let session = test.path("session.pem");
    let session = session.to_str().unwrap();
    let first = s_client(test, &server, policy, &[version, "-sess_out", session]);
    assert!(!says_resumed(&first));
    assert!(!is_resumed(&server, 1));
    assert_eq!(last_backend_is_told(test), "Initial");
    for count in 2..4 {
        // What the second one gets is as good as what the first got.
        let arguments = [version, "-sess_in", session, "-sess_out", session];
        let text = s_client(test, &server, policy, &arguments);
        assert!(says_resumed(&text), "{text}");
        assert!(is_resumed(&server, count));
        assert_eq!(last_backend_is_told(test), "Resumed");
    }
    let lines = session_lines(&server, 3);
    for line in &lines {
        assert_eq!(line["sni"], "localhost");
        assert_eq!(line["tls"], lines[0]["tls"]);
    }
}

/// An openssl session file with another ticket in it.
fn with_ticket(test: &Test, session: &Path, change: impl FnOnce(Vec<u8>) -> Vec<u8>) -> PathBuf {
    let [der, changed, pem] = ["der", "changed.der", "changed.pem"]
        .map(|end| test.path(&format!("session-{}.{end}", next_number())));
    let convert = |from: &Path, to: &Path, forms: [&str; 2]| {
        Tool::new(test, "openssl")
            .args(["sess_id", "-inform", forms[0], "-outform", forms[1], "-in"])
            .arg(from)
            .arg("-out")
            .arg(to)
            .run()
            .success();
    };
    convert(session, &der, ["PEM", "DER"]);
    let bytes = fs::read(&der).unwrap();
    let (_, mut rest, _) = der_element(&bytes);
    let (mut fields, mut change) = (Vec::new(), Some(change));
    while !rest.is_empty() {
        let (tag, mut value, next) = der_element(rest);
        rest = next;
        // SSL_SESSION's ticket: an OCTET STRING inside [10].
        let ticket = (tag == 0xaa).then(|| (change.take().unwrap())(der_element(value).1.to_vec()));
        let wrapped = ticket.map(|ticket| der_encode(0x04, &ticket));
        value = wrapped.as_deref().unwrap_or(value);
        fields.extend(der_encode(tag, value));
    }
    assert!(change.is_none(), "a ticket in the session file");
    fs::write(&changed, der_encode(0x30, &fields)).unwrap();
    convert(&changed, &pem, ["DER", "PEM"]);
    pem
}

// ---- our file with keys ----

/// The time in which each key was made, and the key; newest first.
type KeySet = Vec<(u64, [u8; 32])>;

const MAGIC: &[u8] = b"imap-tls ticket keys 1\n";

fn key_file(test: &Test) -> PathBuf {
    directory(test).join("keys")
}

fn read_keys(test: &Test) -> KeySet {
    let bytes = fs::read(key_file(test)).unwrap();
    let (body, checksum) = bytes.split_at(bytes.len() - 32);
    assert_eq!(digest(body), checksum);
    let entries = &body.strip_prefix(MAGIC).unwrap()[1..];
    entries
        .chunks_exact(40)
        .map(|entry| {
            let (created, secret) = entry.split_first_chunk().unwrap();
            (u64::from_be_bytes(*created), secret.try_into().unwrap())
        })
        .collect()
}

fn write_keys(test: &Test, keys: &KeySet) {
    write_file(&key_file(test), encode(keys), 0o600);
}

fn encode(keys: &KeySet) -> Vec<u8> {
    let mut body = MAGIC.to_vec();
    body.push(keys.len() as u8);
    for (created, secret) in keys {
        body.extend(created.to_be_bytes());
        body.extend(secret);
    }
    let checksum = digest(&body);
    [body, checksum].concat()
}

fn digest(bytes: &[u8]) -> Vec<u8> {
    let mut hash = sha256();
    hash.update(bytes);
    hash.finish().as_ref().to_vec()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

// ---- who resumes ----

fn gnutls_resumes(test: &Test, version: &str) {
    let server = Server::start(
        test,
        Superserver::Tcpserver,
        &resuming(test).tls("implicit"),
    );
    let priority = format!("--priority=NORMAL:-VERS-ALL:+VERS-TLS{version}");
    let output = Tool::new(test, "timeout")
        .args([
            "60",
            "gnutls-cli",
            "--resume",
            "--waitresumption",
            &priority,
        ])
        .args(["--x509cafile", Pki::of(Key::P256).ca.to_str().unwrap()])
        .args(["--port", &server.port.to_string(), "localhost"])
        .input("a LOGIN u sekret\nz LOGOUT\n")
        .run();
    let text = output.text();
    assert!(text.contains("*** This is a resumed session"), "{text}");
    let lines = session_lines(&server, 2);
    let mut resumed: Vec<_> = lines.iter().map(|line| line["resumed"].as_str()).collect();
    // The first connection may take longer to end than the second.
    resumed.sort_unstable();
    assert_eq!(resumed, ["no", "yes"]);
}

fn rustls_resumes(test: &Test, version: &'static rustls::SupportedProtocolVersion) {
    let offer = TlsOffer {
        versions: vec![version],
        ..remembering()
    };
    let program = resuming(test);
    let visits: Vec<_> = (0..4).map(|_| visit(test, &program, &offer)).collect();
    let resumed: Vec<_> = visits.iter().map(|visit| visit.is_resumed).collect();
    assert_eq!(resumed, [false, true, true, true]);
    // A resumed TLS 1.2 session exchanges no keys (RFC 5077 section 3.1), any other does.
    let is_new = version.version == rustls::ProtocolVersion::TLSv1_3;
    for visit in &visits {
        without_faults(&visit.log);
        let has_group = visit.log.contains(" group=X25519MLKEM768 ")
            || !is_new && visit.log.contains(" group=X25519 ");
        assert_eq!(has_group, is_new || !visit.is_resumed, "{}", visit.log);
        assert_eq!(visit.log.contains(" group=none "), !has_group);
    }
    assert_eq!(read_keys(test).len(), 1);
    let modes = [directory(test), key_file(test)]
        .map(|path| fs::metadata(path).unwrap().permissions().mode() & 0o7777);
    assert_eq!(modes, [0o700, 0o600]);
}

// ---- time ----

struct Age {
    name: &'static str,
    /// How much older the key is made, in seconds.
    seconds: i64,
    is_resumed: bool,
    /// Whether the key is in the set after it.
    is_kept: bool,
    /// How many keys there are after it.
    count: usize,
    says: Option<&'static str>,
}

const AGES: &[Age] = &[
    Age {
        name: "a key that is nearly half a day old still seals",
        seconds: 12 * 3600 - 300,
        is_resumed: true,
        is_kept: true,
        count: 1,
        says: None,
    },
    Age {
        name: "a session resumes after a rotation",
        seconds: 12 * 3600 + 1,
        is_resumed: true,
        is_kept: true,
        count: 2,
        says: None,
    },
    Age {
        name: "a key that is nearly a day old still opens",
        seconds: 24 * 3600 - 300,
        is_resumed: true,
        is_kept: true,
        count: 2,
        says: None,
    },
    Age {
        name: "a session does not resume when its key has expired",
        seconds: 24 * 3600 + 1,
        is_resumed: false,
        is_kept: false,
        count: 1,
        says: None,
    },
    Age {
        name: "a session does not resume with a key from the future",
        seconds: -3600,
        is_resumed: false,
        is_kept: false,
        count: 1,
        says: Some("a key from the future, which is replaced: was this machine's clock set back?"),
    },
];

fn aged_keys(test: &Test, case: &Age) {
    let (program, offer) = (resuming(test), remembering());
    assert!(!visit(test, &program, &offer).is_resumed);
    let mut keys = read_keys(test);
    assert_eq!(keys.len(), 1);
    keys[0].0 = keys[0].0.checked_add_signed(-case.seconds).unwrap();
    write_keys(test, &keys);
    let second = visit(test, &program, &offer);
    assert_eq!(second.is_resumed, case.is_resumed, "{}", second.log);
    match case.says {
        None => without_faults(&second.log),
        Some(words) => assert!(second.log.contains(words), "{}", second.log),
    }
    let after = read_keys(test);
    assert_eq!(after.len(), case.count);
    let kept = after.iter().any(|(_, secret)| *secret == keys[0].1);
    assert_eq!(kept, case.is_kept);
    if case.count > 1 {
        assert!(after[0].0 > after[1].0, "the newest comes first");
    }
    // Whatever it was, the next one resumes, and with nothing to complain of.
    let third = visit(test, &program, &offer);
    assert!(third.is_resumed);
    without_faults(&third.log);
}

/// Tickets are opened and sealed again with another time of issue, by the same code but from outside.
fn lifetime(test: &Test) {
    let server = Server::start(test, Superserver::Tcpserver, &resuming(test));
    for (count, version) in (0..).zip(["-tls1_2", "-tls1_3"]) {
        let first = test.path(&format!("session{version}.pem"));
        let path = first.to_str().unwrap();
        s_client(test, &server, "required", &[version, "-sess_out", path]);
        let keys = TicketKeys::decode(&fs::read(key_file(test)).unwrap()).unwrap();
        let ages = [
            (0, true),
            (12 * 3600 - 60, true),
            (12 * 3600 + 60, false),
            (-240, true),
            (-3600, false),
        ];
        for (index, (age, expected)) in (0..).zip(ages) {
            let session = with_ticket(test, &first, |ticket| {
                // The policy, no demand for client certificates, the name.
                let context = [b"r".as_slice(), &[0; 32], b"localhost"].concat();
                let plaintext = keys.open(&context, &ticket, now()).expect("it opens");
                // The key seems as old as the ticket to the code that seals.
                let mut set = read_keys(test);
                let time = now().checked_add_signed(-age).unwrap();
                set[0].0 = time;
                let old = TicketKeys::decode(&encode(&set)).unwrap();
                old.seal(&context, &plaintext, time).unwrap()
            });
            let text = s_client(
                test,
                &server,
                "required",
                &[version, "-sess_in", session.to_str().unwrap()],
            );
            assert_eq!(says_resumed(&text), expected, "{version}, {age} s old");
            let total = count * (ages.len() + 1) + index + 2;
            assert_eq!(is_resumed(&server, total), expected);
        }
    }
}

// ---- tickets that are none ----

fn damaged_tickets(test: &Test, version: &str) {
    type Change = fn(Vec<u8>) -> Vec<u8>;
    fn flipped(mut ticket: Vec<u8>, at: usize) -> Vec<u8> {
        ticket[at] ^= 0x40;
        ticket
    }
    let server = Server::start(test, Superserver::Tcpserver, &resuming(test));
    let first = test.path("session.pem");
    s_client(
        test,
        &server,
        "required",
        &[version, "-sess_out", first.to_str().unwrap()],
    );
    let changes: [(&str, Change); 13] = [
        ("untouched", |ticket| ticket),
        ("another version", |ticket| flipped(ticket, 0)),
        ("another key", |ticket| flipped(ticket, 1)),
        ("another salt", |ticket| flipped(ticket, 17)),
        ("another session", |ticket| flipped(ticket, 60)),
        ("another tag", |ticket| {
            let last = ticket.len() - 1;
            flipped(ticket, last)
        }),
        ("one octet", |mut ticket| {
            ticket.truncate(1);
            ticket
        }),
        ("half", |mut ticket| {
            ticket.truncate(ticket.len() / 2);
            ticket
        }),
        ("one octet less", |mut ticket| {
            ticket.pop();
            ticket
        }),
        ("one octet more", |mut ticket| {
            ticket.push(0);
            ticket
        }),
        ("somebody else's", |_| vec![0xa5; 192]),
        ("too long by one octet", |mut ticket| {
            ticket.resize(TICKET_LIMIT + 1, 7);
            ticket
        }),
        ("much too long", |mut ticket| {
            ticket.resize(40_000, 7);
            ticket
        }),
    ];
    for (index, (name, change)) in changes.into_iter().enumerate() {
        let session = with_ticket(test, &first, change);
        let arguments = [version, "-sess_in", session.to_str().unwrap()];
        let text = s_client(test, &server, "required", &arguments);
        let expected = name == "untouched";
        assert_eq!(says_resumed(&text), expected, "{name}: {text}");
        assert_eq!(is_resumed(&server, index + 2), expected, "{name}");
    }
    let log = server.log();
    assert!(!log.contains("handshake failed"), "{log}");
    assert!(!log.contains("keeper"), "{log}");
}

// ---- key files that are none ----

struct KeyFile {
    name: &'static str,
    needs: &'static [Need],
    /// Breaks the file at this path.
    breaks: fn(&Path),
    says: &'static str,
    /// Whether it is replaced, so that the next session resumes.
    heals: bool,
}

fn rewrite(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

const KEY_FILES: &[KeyFile] = &[
    KeyFile {
        name: "a damaged key file",
        needs: &[],
        breaks: |path| rewrite(path, |bytes| bytes[40] ^= 1),
        says: "'keys' in it is not used but made new: it is damaged",
        heals: true,
    },
    KeyFile {
        name: "a truncated key file",
        needs: &[],
        breaks: |path| rewrite(path, |bytes| bytes.truncate(50)),
        says: "'keys' in it is not used but made new: it is damaged",
        heals: true,
    },
    KeyFile {
        name: "an empty key file",
        needs: &[],
        breaks: |path| rewrite(path, Vec::clear),
        says: "'keys' in it is not used but made new: it is damaged",
        heals: true,
    },
    KeyFile {
        name: "an oversized key file",
        needs: &[],
        breaks: |path| rewrite(path, |bytes| bytes.resize(10 << 20, 0)),
        says: "'keys' in it is not used but made new: it is damaged",
        heals: true,
    },
    KeyFile {
        name: "a key file that everybody can read",
        needs: &[],
        breaks: |path| fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap(),
        says: "'keys' in it is not used but made new: ",
        heals: true,
    },
    KeyFile {
        name: "a key file of another user's",
        needs: &[Need::Root],
        breaks: |path| std::os::unix::fs::chown(path, Some(61_005), None).unwrap(),
        says: "'keys' in it is not used but made new: ",
        heals: true,
    },
    KeyFile {
        name: "a link for a key file",
        needs: &[],
        breaks: |path| {
            let other = path.with_extension("other");
            fs::rename(path, &other).unwrap();
            symlink(other, path).unwrap();
        },
        says: "'keys' in it is not used but made new: it is a symbolic link",
        heals: true,
    },
    KeyFile {
        name: "a FIFO for a key file",
        needs: &[],
        breaks: |path| {
            fs::remove_file(path).unwrap();
            nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap();
        },
        says: "'keys' in it is not used but made new: it is no regular file",
        heals: true,
    },
    KeyFile {
        name: "a directory for a key file",
        needs: &[],
        breaks: |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        },
        says: "cannot write 'keys' in it: Is a directory",
        heals: false,
    },
];

fn broken_key_file(test: &Test, case: &KeyFile) {
    let (program, offer) = (resuming(test), remembering());
    assert!(!visit(test, &program, &offer).is_resumed);
    (case.breaks)(&key_file(test));
    let second = visit(test, &program, &offer);
    assert!(!second.is_resumed);
    let path = directory(test).display().to_string();
    let start = format!("ticket keys '{path}' (--ticket-keys): ");
    let line = second.log.lines().find(|line| line.contains(case.says));
    let line = line.unwrap_or_else(|| panic!("no {:?} in {}", case.says, second.log));
    assert!(line.contains(&start), "{line}");
    let third = visit(test, &program, &offer);
    assert_eq!(third.is_resumed, case.heals);
    if case.heals {
        without_faults(&third.log);
    }
}

struct BadPlace {
    name: &'static str,
    needs: &'static [Need],
    /// Makes something at this path that is no place for keys.
    makes: fn(&Path),
    says: &'static str,
}

const LINE: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n";

const PLACES: &[BadPlace] = &[
    BadPlace {
        name: "a key directory that others can enter",
        needs: &[],
        makes: |path| make_dir(path, 0o755),
        says: "make it ours alone (chown, chmod 0700)",
    },
    BadPlace {
        name: "a key directory that its group can write to",
        needs: &[],
        makes: |path| make_dir(path, 0o770),
        says: "make it ours alone (chown, chmod 0700)",
    },
    BadPlace {
        name: "a key directory of another user's",
        needs: &[Need::Root],
        makes: |path| {
            make_dir(path, 0o700);
            std::os::unix::fs::chown(path, Some(61_005), None).unwrap();
        },
        says: "make it ours alone (chown, chmod 0700)",
    },
    BadPlace {
        name: "a link to a key directory",
        needs: &[],
        makes: |path| {
            let other = path.with_extension("other");
            make_dir(&other, 0o700);
            symlink(other, path).unwrap();
        },
        says: "it is a symbolic link, but not to a file with keys: name the directory itself",
    },
    BadPlace {
        name: "a file of keys that everybody can read",
        needs: &[],
        makes: |path| write_file(path, LINE, 0o644),
        says: "it is open to everybody (mode 0644): chmod o= it",
    },
    BadPlace {
        name: "a file of keys with none in it",
        needs: &[],
        makes: |path| write_file(path, "# none\n", 0o600),
        says: "there is no key in it",
    },
    BadPlace {
        name: "a file of keys with something else in it",
        needs: &[],
        makes: |path| write_file(path, [LINE, "secret\n"].concat(), 0o600),
        says: "line 2 is not 64 hexadecimal digits",
    },
    BadPlace {
        name: "a file of keys that is all zeros",
        needs: &[],
        makes: |path| write_file(path, "0".repeat(64), 0o600),
        says: "line 1 repeats one octet, which is no secret",
    },
    BadPlace {
        name: "a file of keys that is too large",
        needs: &[],
        makes: |path| write_file(path, "#".repeat(1 << 20), 0o600),
        says: "it is larger than 65536 octets",
    },
    BadPlace {
        name: "a FIFO for a file of keys",
        needs: &[],
        makes: |path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap(),
        says: "it is neither a directory nor a regular file",
    },
];

fn broken_place(test: &Test, case: &BadPlace) {
    let (program, offer) = (resuming(test), remembering());
    (case.makes)(&directory(test));
    for _ in 0..2 {
        let visit = visit(test, &program, &offer);
        assert!(!visit.is_resumed);
        let line = visit.log.lines().find(|line| line.contains(case.says));
        let line = line.unwrap_or_else(|| panic!("no {:?} in {}", case.says, visit.log));
        let start = format!(
            "ticket keys '{}' (--ticket-keys): ",
            directory(test).display()
        );
        assert!(line.contains(&start), "{line}");
    }
    // `--check` says so too, and that it is no more than a warning.
    let report = program.flag("--check").run();
    let text = String::from_utf8(report.stdout).unwrap();
    let is_found = |line: &str| line.starts_with("warning: ") && line.contains(case.says);
    assert!(text.lines().any(is_found), "{text}");
    assert_eq!(report.status.code(), Some(0), "{text}");
}

const FILE_SYSTEMS: &[(&str, &str, &str)] = &[
    (
        "a full file system",
        "mount -t tmpfs -o size=4k,mode=0700 none \"$tickets\"; echo x > \"$tickets/filler\"",
        "cannot write 'keys' in it: No space left on device",
    ),
    (
        "a read-only file system",
        "mount -t tmpfs -o mode=0700 none \"$tickets\"; mount -o remount,ro \"$tickets\"",
        "cannot write 'keys' in it: Read-only file system",
    ),
];

fn file_system(test: &Test, script: &str, says: &str) {
    make_dir(&directory(test), 0o700);
    let setup = format!("tickets='{}'\n{script}", directory(test).display());
    let server = Server::start_in(test, Superserver::Tcpserver, &resuming(test), Some(&setup));
    let offer = remembering();
    for count in 1..3 {
        let mut client = server.connect();
        client.log_in_by_starttls_with(&offer);
        assert!(client.command("z LOGOUT").is_ok());
        assert_eq!(client.expect_end(), End::CloseNotify);
        drop(client);
        assert!(!is_resumed(&server, count));
    }
    let count = server
        .log()
        .lines()
        .filter(|line| line.contains(says))
        .count();
    assert_eq!(count, 2, "{}", server.log());
}

// ---- who does not resume ----

fn other_policy_or_name(test: &Test) {
    for version in ["-tls1_2", "-tls1_3"] {
        let session = test.path(&format!("session{version}.pem"));
        let session = session.to_str().unwrap();
        let [required, implicit, optional] = ["required", "implicit", "optional"]
            .map(|policy| Server::start(test, Superserver::Tcpserver, &resuming(test).tls(policy)));
        s_client(
            test,
            &required,
            "required",
            &[version, "-sess_out", session],
        );
        let arguments = [version, "-sess_in", session];
        for (server, policy) in [(&implicit, "implicit"), (&optional, "optional")] {
            assert!(!says_resumed(&s_client(test, server, policy, &arguments)));
            assert!(!is_resumed(server, 1));
        }
        for (count, name) in [(2, "mail.example"), (3, "LOCALHOST.example")] {
            let arguments = [version, "-sess_in", session, "-servername", name];
            let text = s_client(test, &required, "required", &arguments);
            assert!(!says_resumed(&text), "{name}: {text}");
            assert!(!is_resumed(&required, count));
        }
        // The ticket itself is as good as ever.
        assert!(says_resumed(&s_client(
            test, &required, "required", &arguments
        )));
    }
}

fn other_client_certificates(test: &Test) {
    let own = Pki::make(&test.path("client"), Key::P256, |params| {
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    });
    let authorities = fs::read_to_string(&own.ca).unwrap();
    // The same authority, but not the same file: whoever changes it changes who is let in.
    let changed = test.path("changed-ca.pem");
    write_file(&changed, format!("{authorities}# changed\n"), 0o644);
    let program = resuming(test);
    let request = program
        .clone()
        .option("--client-ca", &own.ca)
        .option("--client-cert", "request");
    let programs = [
        request.clone(),
        program,
        request.clone().option("--client-cert", "required"),
        request.option("--client-ca", &changed),
    ];
    let [asking, silent, demanding, other] =
        programs.map(|program| Server::start(test, Superserver::Tcpserver, &program));
    for (round, version) in (0..).zip(["-tls1_2", "-tls1_3"]) {
        let session = test.path(&format!("session{version}.pem"));
        let session = session.to_str().unwrap();
        let client = [
            "-cert",
            own.cert.to_str().unwrap(),
            "-key",
            own.key.to_str().unwrap(),
        ];
        let first = [&[version, "-sess_out", session], &client[..]].concat();
        s_client(test, &asking, "required", &first);
        let again = [&[version, "-sess_in", session], &client[..]].concat();
        for server in [&silent, &demanding, &other] {
            let text = s_client(test, server, "required", &again);
            assert!(!says_resumed(&text), "{text}");
            assert!(!is_resumed(server, round + 1));
        }
        assert!(says_resumed(&s_client(test, &asking, "required", &again)));
        let lines = session_lines(&asking, 2 * round + 2);
        assert_eq!(lines[2 * round + 1]["client"], "localhost");
    }
}

fn shared_directory(test: &Test) {
    let one = resuming(test);
    // What tickets are not bound to may differ.
    let other = resuming(test)
        .pki(Pki::of(Key::P384))
        .option("--handshake-timeout", "29");
    let offer = remembering();
    let resumed = [&one, &other, &one, &other].map(|program| {
        let visit = visit(test, program, &offer);
        without_faults(&visit.log);
        visit.is_resumed
    });
    assert_eq!(resumed, [false, true, true, true]);
    assert_eq!(read_keys(test).len(), 1);
}

fn shared_file(test: &Test) {
    let line = |octet: &str| format!("{}\n", [octet, &"5a".repeat(31)].concat());
    let [old, new, newest] = ["01", "02", "03"].map(line);
    let machines = ["one", "other"].map(|name| test.path(name));
    let hand_out = |index: usize, lines: &[&String]| {
        let text: String = lines.iter().map(|line| line.as_str()).collect();
        write_file(&machines[index], text, 0o600);
    };
    let programs = machines
        .each_ref()
        .map(|path| Program::new(test).option("--ticket-keys", path));
    let offer = remembering();
    let resumes = |index: usize| {
        let visit = visit(test, &programs[index], &offer);
        without_faults(&visit.log);
        visit.is_resumed
    };
    hand_out(0, &[&old]);
    hand_out(1, &[&old]);
    assert!(!resumes(0));
    assert!(resumes(1));
    // A new key reaches one machine after the other, first to open, then to seal.
    hand_out(0, &[&old, &new]);
    assert!(resumes(0));
    hand_out(1, &[&old, &new]);
    assert!(resumes(1));
    hand_out(0, &[&new, &old]);
    assert!(resumes(0));
    assert!(resumes(1));
    hand_out(1, &[&new]);
    assert!(!resumes(1), "sealed with the key that was taken away");
    assert!(resumes(0));
    // Nothing is rotated by us.
    assert_eq!(fs::read_to_string(&machines[1]).unwrap(), new);
    hand_out(0, &[&newest]);
    assert!(!resumes(0));
}

// ---- many at once ----

fn first_connections(test: &Test, is_there: bool) {
    const COUNT: usize = 200;
    if is_there {
        make_dir(&directory(test), 0o700);
    }
    let patient = resuming(test)
        .option("--handshake-timeout", "300")
        .option("--login-timeout", "300");
    let server = Server::start(test, Superserver::Tcpserver, &patient);
    // All are accepted before any is answered.
    let sockets: Vec<_> = (0..COUNT).map(|_| server.connect_socket()).collect();
    let offers: Vec<_> = (0..COUNT).map(|_| remembering()).collect();
    for (socket, offer) in sockets.into_iter().zip(&offers) {
        let mut client = Client::on(socket);
        client.patience = Duration::from_secs(120);
        client.log_in_by_starttls_with(offer);
        assert!(client.command("z LOGOUT").is_ok());
        assert_eq!(client.expect_end(), End::CloseNotify);
    }
    let names: Vec<_> = fs::read_dir(directory(test))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["keys"]);
    assert_eq!(read_keys(test).len(), 1);
    // What the first, the last and some between were given was sealed with that one key.
    for offer in offers.iter().step_by(20).chain(offers.last()) {
        let mut client = server.connect();
        client.log_in_by_starttls_with(offer);
        assert!(client.command("z LOGOUT").is_ok());
        assert_eq!(client.tls().handshake_kind(), Some(HandshakeKind::Resumed));
    }
    let log = server.log();
    assert!(!log.contains("--ticket-keys"), "{log}");
}

fn held_lock(test: &Test) {
    make_dir(&directory(test), 0o700);
    let (program, offer) = (resuming(test), remembering());
    // As one that was stopped (or hangs in a slow disk) while it replaces the keys.
    let open = || File::open(directory(test)).unwrap();
    let Ok(held) = Flock::lock(open(), FlockArg::LockExclusiveNonblock) else {
        panic!("the directory is locked");
    };
    let began = Instant::now();
    let first = visit(test, &program, &offer);
    let took = began.elapsed();
    assert!(!first.is_resumed);
    assert!(
        (Duration::from_millis(900)..Duration::from_secs(8)).contains(&took),
        "{took:?}"
    );
    assert!(!key_file(test).exists());
    drop(held);
    assert!(!visit(test, &program, &offer).is_resumed);
    let Ok(_held) = Flock::lock(open(), FlockArg::LockExclusiveNonblock) else {
        panic!("the directory is locked");
    };
    // Where nothing is to be replaced nobody waits; old keys are used while the lock is held.
    let began = Instant::now();
    assert!(visit(test, &program, &offer).is_resumed);
    let quick = began.elapsed();
    let mut keys = read_keys(test);
    keys[0].0 -= 13 * 3600;
    write_keys(test, &keys);
    let began = Instant::now();
    assert!(visit(test, &program, &offer).is_resumed);
    let slow = began.elapsed();
    assert!(slow > Duration::from_millis(900), "{slow:?}");
    assert!(quick < slow, "{quick:?} and {slow:?}");
    assert_eq!(read_keys(test), keys);
}

// ---- what is not offered ----

fn without_option(test: &Test) {
    let server = Server::start(test, Superserver::Tcpserver, &Program::new(test));
    for (count, version) in (0..).zip(["-tls1_2", "-tls1_3"]) {
        let session = test.path(&format!("session{version}.pem"));
        let session = session.to_str().unwrap();
        let text = s_client(test, &server, "required", &[version, "-sess_out", session]);
        assert!(!text.contains("TLS session ticket"), "{text}");
        // TLS 1.3 without a ticket leaves nothing to be taken up.
        if Path::new(session).exists() {
            let again = s_client(test, &server, "required", &[version, "-sess_in", session]);
            assert!(!says_resumed(&again));
        }
        assert!(
            session_lines(&server, count + 1)
                .iter()
                .all(|line| line["resumed"] == "no")
        );
    }
}

fn early_data(test: &Test) {
    let server = Server::start(
        test,
        Superserver::Tcpserver,
        &resuming(test).tls("implicit"),
    );
    let session = test.path("session.pem");
    let session = session.to_str().unwrap();
    let text = s_client(
        test,
        &server,
        "implicit",
        &["-tls1_3", "-sess_out", session],
    );
    assert!(text.contains("Max Early Data: 0"), "{text}");
    // A client that sends some all the same, since it believes a ticket that says otherwise.
    let der = Tool::new(test, "openssl")
        .args(["sess_id", "-in", session, "-outform", "DER"])
        .run()
        .success()
        .stdout;
    let (_, fields, _) = der_element(&der);
    // SSL_SESSION's max_early_data: an INTEGER inside [15], between [13] and [16].
    let (mut before, mut rest) = (Vec::new(), fields);
    while !rest.is_empty() && der_element(rest).0 < 0xaf {
        let (tag, value, next) = der_element(rest);
        before.extend(der_encode(tag, value));
        rest = next;
    }
    assert!(rest.is_empty() || der_element(rest).0 != 0xaf, "{der:02x?}");
    let early = der_encode(0xaf, &der_encode(0x02, &[0x40, 0]));
    let changed = test.path("early.der");
    fs::write(
        &changed,
        der_encode(0x30, &[&before, &early, rest].concat()),
    )
    .unwrap();
    let pem = test.path("early.pem");
    Tool::new(test, "openssl")
        .args(["sess_id", "-inform", "DER", "-in"])
        .arg(&changed)
        .arg("-out")
        .arg(&pem)
        .run()
        .success();
    let data = test.path("early.txt");
    write_file(&data, "early NOOP\r\n", 0o644);
    let text = s_client(
        test,
        &server,
        "implicit",
        &[
            "-tls1_3",
            "-sess_in",
            pem.to_str().unwrap(),
            "-early_data",
            data.to_str().unwrap(),
        ],
    );
    assert!(text.contains("Early data was rejected"), "{text}");
    // It resumes, but nothing of what came early is acted on.
    assert!(is_resumed(&server, 2));
    let received = test.record().backends()[1].received_text();
    assert!(received.starts_with("a LOGIN"), "{received}");
}

fn hello_retry(test: &Test) {
    let server = Server::start(test, Superserver::Tcpserver, &resuming(test));
    let session = test.path("session.pem");
    let session = session.to_str().unwrap();
    // Its first share is of a group that we do not have.
    let base = ["-tls1_3", "-groups", "X448:P-256"];
    s_client(
        test,
        &server,
        "required",
        &[&base[..], &["-sess_out", session]].concat(),
    );
    let text = s_client(
        test,
        &server,
        "required",
        &[&base[..], &["-sess_in", session]].concat(),
    );
    assert!(says_resumed(&text));
    assert!(is_resumed(&server, 2));
    assert_eq!(session_lines(&server, 2)[1]["group"], "secp256r1");
}

// ---- where keys are ----

fn keys_in_memory(test: &Test) {
    let filed = Pki::make(&test.path("filed"), Key::P256, |params| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("dir.example".try_into().unwrap())];
    });
    let certificates = test.path("certificates");
    make_dir(&certificates, 0o755);
    let both = [&filed.cert, &filed.key].map(|path| fs::read_to_string(path).unwrap());
    write_file(&certificates.join("dir.example.pem"), both.concat(), 0o600);
    let program = resuming(test)
        .also("--cert", &Pki::of(Key::Rsa2048).cert)
        .also("--key", &Pki::of(Key::Rsa2048).key)
        .option("--cert-dir", &certificates);
    let offer = TlsOffer {
        server_name: "dir.example".to_owned(),
        ..remembering()
    };
    assert!(!visit(test, &program, &offer).is_resumed);
    // A set with a key that only opens, too.
    let mut keys = read_keys(test);
    keys[0].0 -= 13 * 3600;
    write_keys(test, &keys);
    for expected in [HandshakeKind::Resumed, HandshakeKind::Full] {
        let offer = match expected {
            HandshakeKind::Resumed => offer.clone(),
            _ => TlsOffer {
                memory: None,
                ..offer.clone()
            },
        };
        let mut session = program.start();
        session.client().greeting();
        let ticket_keys: Vec<_> = read_keys(test)
            .into_iter()
            .zip(["new ticket key", "old ticket key"])
            .map(|((_, secret), name)| (name.to_owned(), secret.to_vec()))
            .collect();
        assert_eq!(ticket_keys.len(), 2);
        let named: Vec<_> = [Pki::of(Key::P256), Pki::of(Key::Rsa2048)]
            .iter()
            .flat_map(|pki| pki.secrets())
            .chain(ticket_keys.iter().cloned())
            .collect();
        let all: Vec<_> = named.iter().cloned().chain(filed.secrets()).collect();
        let check = |session: &Session, when: &str| {
            let processes = session.processes();
            let cases = [
                ("network process", Some(processes.network), &all),
                ("launcher", processes.launcher, &all),
                ("backend", processes.backend, &all),
                // What is filed in the directory goes through its hands; nothing else does.
                ("opener", processes.opener, &named),
            ];
            for (name, process, secrets) in cases {
                let Some(process) = process else { continue };
                assert_eq!(
                    found(process, secrets),
                    [""; 0],
                    "{when}: in the {name}'s memory"
                );
            }
        };
        let keeper = session.processes().keeper.expect("a keeper");
        // Else the search would prove nothing.
        for secrets in [
            &ticket_keys[..1],
            &ticket_keys[1..],
            &Pki::of(Key::P256).secrets(),
            &Pki::of(Key::Rsa2048).secrets(),
        ] {
            assert!(
                !found(keeper, secrets).is_empty(),
                "{} is not in the keeper either",
                secrets[0].0
            );
        }
        eventually("the opener waits, confined", || {
            session.processes().opener.map(drop)
        });
        check(&session, "before TLS");
        assert!(session.client().command("a STARTTLS").is_ok());
        check(&session, "after STARTTLS");
        session
            .client()
            .handshake_until_server_is_heard(&offer)
            .unwrap();
        check(&session, "in the handshake");
        session.client().finish_handshake().unwrap();
        session.client().login();
        check(&session, "in TLS");
        assert!(session.client().command("z LOGOUT").is_ok());
        assert_eq!(session.client().tls().handshake_kind(), Some(expected));
    }
}

/// The names of those secrets that are somewhere in the process's memory.
fn found(process: Process, secrets: &[(String, Vec<u8>)]) -> Vec<String> {
    let needles: Vec<Vec<u8>> = secrets.iter().map(|(_, bytes)| bytes.clone()).collect();
    secrets
        .iter()
        .zip(process.find_in_memory(&needles))
        .filter(|(_, is_found)| *is_found)
        .map(|((name, _), _)| name.clone())
        .collect()
}
