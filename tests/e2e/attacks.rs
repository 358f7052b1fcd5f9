//! The attacks on STARTTLS that became known, by name: each is run, and shown to come to nothing.
//!
//! In most of them somebody on the path puts commands of his own between a client's STARTTLS and its handshake, or has the server's
//! words from before TLS read inside it. What he may want is always the same: `b LOGIN`, `c CREATE injected`, executed or answered in
//! the client's session. Tests whose name begins with `attacks:` are in other files too, where the rest of their kind is.

use crate::connect_servers::Dovecot;
use crate::harness::records::*;
use crate::harness::*;
use crate::listener::randomness;
use libtest_mimic::Trial;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use rustls::version::{TLS12, TLS13};
use std::os::unix::net::UnixStream;
use std::time::Duration;

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for policy in ["required", "optional"] {
        for version in ["TLS 1.2", "TLS 1.3"] {
            tests.extend([
                test(
                    &format!(
                        "attacks: CVE-2011-0411, -1430, -1431, -1432, -1506, -1575, -2165 (Postfix and its kin): {policy}, {version}: \
                         commands between STARTTLS and the ClientHello, the stream cut anywhere"
                    ),
                    &[],
                    move |test| cut_anywhere(test, policy, version, Place::BeforeHello),
                ),
                test(
                    &format!(
                        "attacks: CVE-2014-3556 (nginx): {policy}, {version}: commands behind the ClientHello, the stream cut anywhere"
                    ),
                    &[],
                    move |test| cut_anywhere(test, policy, version, Place::BehindHello),
                ),
                test(
                    &format!(
                        "attacks: CVE-2011-1926 (Cyrus), CVE-2021-33515 (Dovecot), CVE-2021-38084 (Courier): {policy}, {version}: \
                         whatever follows STARTTLS in one segment is never executed"
                    ),
                    &[],
                    move |test| in_one_segment(test, policy, version),
                ),
                test(
                    &format!(
                        "attacks: CVE-2020-15955 (s/qmail), CVE-2020-29547, CVE-2021-37844 (Citadel, Gordano): {policy}, {version}: \
                         commands at any octet of the client's handshake"
                    ),
                    &[],
                    move |test| into_handshake(test, policy, version),
                ),
                test(
                    &format!(
                        "attacks: CVE-2020-29548 (SmarterMail), CVE-2021-33487 (Mercury): {policy}, {version}: \
                         commands in records of any kind between those of the handshake"
                    ),
                    &[],
                    move |test| between_records(test, policy, version),
                ),
            ]);
        }
    }
    tests.extend([
        test(
            "attacks: CVE-2022-28220 (James): STARTTLS waits for commands that are still being worked on",
            &[],
            slow_commands,
        ),
        test(
            "attacks: CVE-2021-38371 (Exim), CVE-2021-22947 (curl): optional: what the backend says behind its last answer is in neither \
             phase",
            &[],
            late_words,
        ),
        test(
            "attacks: CVE-2021-38371 (Exim), CVE-2021-22947 (curl): optional: a backend that never stops talking is cut off at OK",
            &[],
            talks_on,
        ),
        test(
            "attacks: CVE-2021-38371 (Exim), CVE-2021-22947 (curl): a backend that is kept says nothing between OK and ServerHello",
            &[],
            kept_backend,
        ),
        test(
            "attacks: a backend that is kept takes nothing from inside TLS for the rest of a command from before it",
            &[],
            early_answer,
        ),
        test(
            "attacks: CVE-2021-38371 (Exim), CVE-2021-22947 (curl): a backend inside TLS that talks out of turn is heard as it is",
            &[],
            out_of_turn,
        ),
        test(
            "attacks: CVE-2021-38371 (Exim), CVE-2021-22947 (curl): no end within the handshake is told in clear",
            &[Need::Root],
            silent_ends,
        ),
        test(
            "attacks: CVE-2021-37845 (Citadel), CVE-2021-37846 (IMail): nothing said in clear has an effect inside TLS",
            &[],
            fixation,
        ),
        test(
            "attacks: CVE-2021-37845 (Citadel), CVE-2021-37846 (IMail): a command that is not over takes STARTTLS for data",
            &[],
            unfinished_commands,
        ),
        test(
            "attacks: CVE-2021-38542, CVE-2022-28220 (James): a line that two parsers may read in two ways starts no TLS",
            &[],
            |test| differential(test, &Program::new(test).tls("optional"), true),
        ),
        test(
            "attacks: CVE-2021-38542, CVE-2022-28220 (James): mailutils imap4d is in step with us, whatever the lines",
            &[Need::Root, Need::Command("imap4d", "mailutils-imap4d")],
            |test| {
                let imap4d = tool::find("imap4d").unwrap();
                let backend = [imap4d.to_str().unwrap(), "--inetd"];
                let program = Program::new(test).tls("optional").backend(backend);
                differential(test, &program, false);
            },
        ),
        test(
            "attacks: CVE-2021-38542, CVE-2022-28220 (James): Dovecot is in step with us, whatever the lines",
            &[Need::Root, Need::Command("dovecot", "dovecot-imapd")],
            |test| {
                let dovecot = Dovecot::start(test);
                differential(test, &dovecot.program(test, "optional", "v2"), false);
            },
        ),
        test(
            "attacks: Nemesis (GMX, web.de), stunnel's imap filter: no way to log in is offered before TLS, nor taken",
            &[],
            nemesis,
        ),
        test(
            "attacks: CVE-2013-4584 (perdition), CVE-2015-3644, CVE-2021-20230 (stunnel): by STARTTLS every setting holds that holds on \
             an implicit port",
            &[],
            same_settings,
        ),
        test(
            "attacks: CVE-2014-0016 (stunnel): no two processes of a superserver's share a random number or a key share",
            &[Need::EachStarted, Need::Command("tcpserver", "ucspi-tcp")],
            |test| {
                let program = Program::new(test).tls("implicit");
                randomness(&Server::start(test, Superserver::Tcpserver, &program));
            },
        ),
        test(
            "attacks: CVE-2013-1762 (stunnel): no word before TLS is too long for us",
            &[],
            long_words,
        ),
        test(
            "attacks: ALPACA: another protocol's client hears nothing of what it said, and not for long",
            &[],
            other_protocols,
        ),
        test(
            "attacks: ALPACA: inside TLS another protocol's client is not answered for long either",
            &[],
            other_protocols_inside,
        ),
    ]);
    tests
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

/// With one small key share, so that there are not more octets to cut at than needed.
fn offer(version: &str) -> TlsOffer {
    TlsOffer {
        versions: vec![if version == "TLS 1.2" { &TLS12 } else { &TLS13 }],
        groups: vec![rustls::crypto::aws_lc_rs::kx_group::X25519],
        ..TlsOffer::new(pki())
    }
}

const STARTTLS: &str = "a STARTTLS\r\n";
const BEGIN: &str = "a OK Begin TLS negotiation now";
const INJECTED: &str = "b LOGIN u sekret\r\nc CREATE injected\r\nd NOOP\r\n";

/// The kinds of the records that bytes consist of, and of nothing else: no line of IMAP is among them.
fn kinds(bytes: &[u8]) -> Vec<u8> {
    let (mut kinds, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let legal = rest.len() > 5 && (20..=23).contains(&rest[0]) && rest[1] == 3;
        let words = String::from_utf8_lossy(rest);
        assert!(legal, "after STARTTLS there came {words:?}");
        let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        assert!(rest.len() >= 5 + length, "half a record: {words:?}");
        kinds.push(rest[0]);
        rest = &rest[5 + length..];
    }
    kinds
}

/// No backend has read anything: neither one from before TLS nor one inside it.
fn assert_nothing_received(test: &Test) {
    for backend in test.record().backends() {
        let received = backend.received_text();
        assert!(received.is_empty(), "the backend got {received:?}");
    }
}

/// A listener on a unix socket, on which it can be known when what was sent has been read. Nobody has to wait for exec(2) some
/// thousand times.
fn start_listener(test: &Test, policy: &str) -> (Server, std::path::PathBuf) {
    let path = test.path("attacks.sock");
    let program = Program::new(test)
        .tls(policy)
        .also("--listen", format!("unix:{}", path.display()))
        .option("--max-per-source", "1000")
        .option("--handshake-timeout", "2");
    (Server::start(test, Superserver::Listener, &program), path)
}

fn assert_all_ended_in_order(server: &Server) {
    eventually("the connections end", || {
        server.sessions().is_empty().then_some(())
    });
    let log = server.log();
    assert!(
        !log.contains("SIG") && !log.contains("panicked"),
        "{}",
        &log[log.len().saturating_sub(4000)..]
    );
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    BeforeHello,
    BehindHello,
}

/// The whole stream - STARTTLS, injected commands, ClientHello, in either order - in two reads, for every place to cut it at.
fn cut_anywhere(test: &Test, policy: &str, version: &str, place: Place) {
    let (server, path) = start_listener(test, policy);
    let hello = Client::client_hello(&offer(version));
    let stream = match place {
        Place::BeforeHello => [STARTTLS.as_bytes(), INJECTED.as_bytes(), &hello].concat(),
        Place::BehindHello => [STARTTLS.as_bytes(), &hello, INJECTED.as_bytes()].concat(),
    };
    for cut in 0..=stream.len() {
        let mut client = Client::on(UnixStream::connect(&path).unwrap());
        client.greeting();
        client.send_raw(&stream[..cut]);
        client.wait_until_read();
        client.send_raw(&stream[cut..]);
        assert_eq!(client.line(), BEGIN, "cut at {cut}");
        client.shutdown();
        let (rest, _) = client.read_to_end();
        let kinds = kinds(&rest);
        match place {
            Place::BeforeHello => assert_eq!(kinds, [ALERT], "cut at {cut}"),
            // The server answers the hello before it sees what follows.
            Place::BehindHello => assert!(kinds.contains(&HANDSHAKE), "cut at {cut}: {kinds:?}"),
        }
    }
    assert_all_ended_in_order(&server);
    assert_nothing_received(test);
    let started = test.record().backends().len();
    let expected = if policy == "required" {
        0
    } else {
        stream.len() + 1
    };
    assert_eq!(started, expected, "backends of the TLS phase were started");
}

/// What an attacker puts behind STARTTLS, in the same segment.
const WORDS: &[&str] = &[
    INJECTED,
    "b NOOP\r\n",
    "b CAPABILITY\r\nc LOGOUT\r\n",
    "b ID (\"x\" \"injected\")\r\n",
    "b AUTHENTICATE PLAIN\r\nAHUAc2VrcmV0\r\n",
    "b AUTHENTICATE PLAIN AHUAc2VrcmV0\r\n",
    "b STARTTLS\r\n",
    "b STARTTLS\r\nc NOOP\r\n",
    "\r\n",
    "\n",
    "\0",
    "b NOOP",
    "b LOGIN {1}\r\n",
    "b LOGIN {1+}\r\nu sekret\r\n",
    "{10000+}\r\n",
    "b NOOP\rc NOOP\n",
];

/// Alone, the injected words end the connection: they are no ClientHello. Sent before a good ClientHello they do too. In no case is
/// one of them answered, executed or forwarded.
fn in_one_segment(test: &Test, policy: &str, version: &str) {
    for injected in WORDS {
        for with_hello in [false, true] {
            let mut session = Program::new(test).tls(policy).start();
            let client = session.client();
            client.greeting();
            let mut bytes = format!("{STARTTLS}{injected}").into_bytes();
            if with_hello {
                bytes.extend(Client::client_hello(&offer(version)));
            }
            client.send_raw(bytes);
            assert_eq!(client.line(), BEGIN);
            client.shutdown();
            let (rest, _) = client.read_to_end();
            assert_eq!(kinds(&rest), [ALERT], "{injected:?}");
            session.close_client();
            assert_eq!(session.wait_code(), 0, "{}", session.log());
            if injected.starts_with("b ") {
                let words = "handshake failed: IMAP commands follow STARTTLS in clear: ";
                let log = session.log();
                assert!(log.contains(words), "{injected:?}: {log}");
            }
        }
    }
    assert_nothing_received(test);
    for backend in test.record().backends() {
        assert!(!backend.environment().contains_key("SSL_PROTOCOL"));
    }
}

/// A client on whose path somebody puts words of his own at one octet of what it sends: in its hello, in its last flight, or in the
/// first record of the session. The client itself, which knows nothing of it, must be answered nothing.
fn into_handshake(test: &Test, policy: &str, version: &str) {
    let (server, path) = start_listener(test, policy);
    let connect = || {
        let mut client = Client::on(UnixStream::connect(&path).unwrap());
        client.greeting();
        assert_eq!(client.command("a STARTTLS").lines, [BEGIN]);
        client
    };
    // How long its flights are; what comes through unchanged works.
    let mut lengths = Vec::new();
    let mut client = connect();
    let unchanged = |_: usize, flight: Vec<u8>| {
        lengths.push(flight.len());
        flight
    };
    client
        .handshake_through(&offer(version), unchanged)
        .unwrap();
    client.login();
    drop(client);
    assert_eq!(lengths.len(), 2, "flights");
    for (flight, length) in lengths.into_iter().enumerate() {
        for at in 0..=length {
            let mut client = connect();
            let result = client.handshake_through(&offer(version), |number, mut bytes| {
                if number == flight {
                    // The lengths of signatures and the like may differ a little.
                    let at = at.min(bytes.len());
                    bytes.splice(at..at, INJECTED.bytes());
                }
                bytes
            });
            // In TLS 1.3 the client has done its part before it is refused.
            if result.is_ok() {
                client.try_send(b"e NOOP\r\n");
            }
            client.shutdown();
            let (said, end) = client.read_to_end();
            let said = String::from_utf8_lossy(&said);
            assert!(said.is_empty(), "flight {flight}, octet {at}: {said:?}");
            assert_ne!(end, End::CloseNotify, "flight {flight}, octet {at}");
        }
    }
    assert_all_ended_in_order(&server);
    for backend in test.record().backends() {
        let received = backend.received_text();
        assert!(
            received.is_empty() || received == "login LOGIN u sekret\r\n",
            "the backend got {received:?}"
        );
    }
}

/// The same, by records that are in order by themselves.
fn between_records(test: &Test, policy: &str, version: &str) {
    let (server, path) = start_listener(test, policy);
    let kinds = [CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA];
    for kind in kinds {
        for flight in 0..2 {
            for place in 0..5 {
                let mut client = Client::on(UnixStream::connect(&path).unwrap());
                client.greeting();
                assert!(client.command("a STARTTLS").is_ok());
                let result = client.handshake_through(&offer(version), |number, bytes| {
                    if number != flight {
                        return bytes;
                    }
                    let mut records = split_records(&bytes);
                    if number == 0 {
                        // A hello in two records has a place in the middle.
                        let hello = records.remove(0)[5..].to_vec();
                        let (first, second) = hello.split_at(hello.len() / 2);
                        records = vec![record(HANDSHAKE, first), record(HANDSHAKE, second)];
                    }
                    records.insert(place.min(records.len()), record(kind, INJECTED));
                    records.concat()
                });
                if result.is_ok() {
                    client.try_send(b"e NOOP\r\n");
                }
                client.shutdown();
                let (said, end) = client.read_to_end();
                let said = String::from_utf8_lossy(&said);
                let what = format!("kind {kind}, flight {flight}, place {place}");
                assert!(said.is_empty(), "{what}: {said:?}");
                assert_ne!(end, End::CloseNotify, "{what}");
            }
        }
    }
    // What a server that refuses early data has to skip (RFC 8446 section 4.2.10).
    let early = Hello::tls13().with(EARLY_DATA, []).with(PSK_MODES, [1, 1]);
    let keys = [
        long([long([0x33; 24]), vec![0; 4]].concat()),
        long(short([0x44; 32])),
    ];
    let early = early.with(PRE_SHARED_KEY, keys.concat()).records();
    let mut client = Client::on(UnixStream::connect(&path).unwrap());
    client.greeting();
    assert!(client.command("a STARTTLS").is_ok());
    client.send_raw([early, record(APPLICATION_DATA, INJECTED)].concat());
    client.shutdown();
    let (rest, _) = client.read_to_end();
    self::kinds(&rest);
    assert_all_ended_in_order(&server);
    assert_nothing_received(test);
}

fn split_records(bytes: &[u8]) -> Vec<Vec<u8>> {
    let (mut records, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let length = 5 + usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        records.push(rest[..length].to_vec());
        rest = &rest[length..];
    }
    records
}

// ---- the backend's words ----

const BACKEND: i32 = 9;

/// A session whose backend the test itself is, by `--backend-fd`.
fn with_backend(test: &Test, policy: &str) -> (Session, Client) {
    let (flags, kind) = (SockFlag::SOCK_CLOEXEC, SockType::Stream);
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, flags).unwrap();
    // Little room, so that what the backend has not read waits in our queue.
    setsockopt(&theirs, sockopt::SndBuf, &4096).unwrap();
    let program = Program::new(test).backend([] as [&str; 0]).tls(policy);
    let session = program
        .option("--backend-fd", BACKEND.to_string())
        .passing(theirs, BACKEND)
        .start();
    (session, Client::on(ours))
}

/// One backend before TLS and another one inside it.
fn before_and_inside(test: &Test, before: &Backend, inside: &Backend) -> Program {
    let words = |backend: &Backend| {
        let line = backend.command(&test.record());
        let quoted: Vec<_> = line.iter().map(|word| format!("'{word}'")).collect();
        quoted.join(" ")
    };
    let script = format!(
        "[ -n \"$SSL_PROTOCOL\" ] || exec {}\nexec {}",
        words(before),
        words(inside)
    );
    Program::new(test)
        .tls("optional")
        .backend(["/bin/sh", "-c", &script])
}

/// What the scripted server says to CAPABILITY inside TLS.
const CAPABILITY: &[&str] = &[
    "* CAPABILITY IMAP4rev1 AUTH=PLAIN LITERAL+ SASL-IR ID IDLE",
    "p OK CAPABILITY done",
];

/// The attacker sends commands ahead, STARTTLS and injected ones among them, while the backend is at work. `rest` is what the client
/// does not wait with: words, or the beginning of its handshake.
fn slow_commands(test: &Test) {
    for rest in ["", INJECTED] {
        let (mut session, mut backend) = with_backend(test, "optional");
        backend.send("* OK hello\r\n");
        let client = session.client();
        client.greeting();
        client.send(format!("s LIST x y\r\nt SELECT z\r\n{STARTTLS}{rest}"));
        // One at a time, and STARTTLS neither before an answer nor within one.
        for (command, pieces) in [
            ("s LIST x y", ["* LIST () NIL x\r\ns OK", " done\r\n"]),
            ("t SELECT z", ["* 1 EXI", "STS\r\nt NO no\r\n"]),
        ] {
            assert_eq!(backend.line(), command);
            let mut heard = Vec::new();
            for piece in pieces {
                assert!(backend.is_quiet_for(Duration::from_millis(20)));
                backend.send(piece);
                backend.wait_until_read();
                heard.extend(piece.bytes());
                session.wait_idle();
            }
            let client = session.client();
            let text = String::from_utf8(client.read_exact(heard.len())).unwrap();
            assert_eq!(text.as_bytes(), heard);
        }
        let client = session.client();
        assert_eq!(client.line(), BEGIN);
        if rest.is_empty() {
            assert!(client.is_quiet_for(Duration::from_millis(20)));
            client.handshake(&TlsOffer::new(pki())).unwrap();
            client.send("e NOOP\r\n");
            assert_eq!(backend.line(), "e NOOP");
        } else {
            client.shutdown();
            let (answer, _) = client.read_to_end();
            assert_eq!(kinds(&answer), [ALERT]);
            let (received, _) = backend.read_to_end();
            assert_eq!(String::from_utf8_lossy(&received), "");
        }
        drop(backend);
        session.close_client();
        session.wait();
    }
}

/// What a backend may write behind the answer to the last command before STARTTLS, in one piece with it.
const LATE: &[&str] = &[
    "* OK late\\r\\n",
    "* OK late\\r\\n* CAPABILITY LATE\\r\\n",
    "* OK late\\r\\na OK late\\r\\np OK late\\r\\n",
    "* PREAUTH late\\r\\n",
    "* BYE late\\r\\n",
    "* CAPABILITY LATE\\r\\n",
    "a OK late\\r\\n",
    "+ late\\r\\n",
    "late\\r\\n",
    "\\r\\n",
    "* OK lat",
    "* OK [CAPABILITY LATE",
    "* ID (\"late\" {1000}\\r\\n",
    "* ID (\"late\" {10000}\\r\\nlate",
];

fn late_words(test: &Test) {
    for late in LATE {
        let path = test.path("before.txt");
        let script = format!("S: * OK before\nC: s NOOP\ns: s OK done\\r\\n{late}\n");
        write_file(&path, script, 0o644);
        let before = Backend::scenario("transcript", &[path.to_str().unwrap()]);
        let mut session = before_and_inside(test, &before, &Backend::imap()).start();
        let client = session.client();
        assert_eq!(client.greeting(), "* OK before");
        client.send(format!("s NOOP\r\n{STARTTLS}"));
        assert_eq!(client.line(), "s OK done", "{late}");
        assert_eq!(client.line(), BEGIN, "{late}");
        client.handshake(&TlsOffer::new(pki())).unwrap();
        assert_eq!(client.command("p CAPABILITY").lines, CAPABILITY, "{late}");
        session.close_client();
        session.wait();
    }
}

/// A backend that says one line after the other, whether anybody has asked or not.
fn talks_on(test: &Test) {
    let script = "if [ -n \"$SSL_PROTOCOL\" ]; then printf '* OK inside\\r\\n'; read line; printf 'p OK inside\\r\\n'; read line; else \
                  while printf '* OK before\\r\\n'; do :; done; fi";
    let program = Program::new(test)
        .tls("optional")
        .backend(["/bin/sh", "-c", script]);
    for _ in 0..20 {
        let mut session = program.start();
        let client = session.client();
        client.greeting();
        client.send(STARTTLS);
        let last = loop {
            let line = client.line();
            if line != "* OK before" {
                break line;
            }
        };
        assert_eq!(last, BEGIN);
        client.handshake(&TlsOffer::new(pki())).unwrap();
        assert_eq!(client.command("p NOOP").lines, ["p OK inside"]);
        session.close_client();
        session.wait();
    }
}

/// `--backend-fd`: the backend is there before and inside TLS, so that its words can only be held.
fn kept_backend(test: &Test) {
    for late in ["* OK late\r\n", "* CAPABILITY LATE\r\nx OK late\r\n", "* l"] {
        let (mut session, mut backend) = with_backend(test, "optional");
        backend.send("* OK hello\r\n");
        let client = session.client();
        client.greeting();
        client.send(format!("s NOOP\r\n{STARTTLS}"));
        assert_eq!(backend.line(), "s NOOP");
        backend.send(format!("s OK done\r\n{late}"));
        assert_eq!(client.line(), "s OK done");
        assert_eq!(client.line(), BEGIN);
        // And more of them meanwhile, which nobody reads.
        backend.send("ate OK\r\n");
        assert!(client.is_quiet_for(Duration::from_millis(50)));
        // In the middle of the handshake, too.
        let offer = TlsOffer::new(pki());
        client.handshake_until_server_is_heard(&offer).unwrap();
        backend.send("* OK still\r\n");
        client.finish_handshake().unwrap();
        let expected = format!("{late}ate OK\r\n* OK still\r\n");
        let heard = client.read_exact(expected.len());
        assert_eq!(String::from_utf8_lossy(&heard), expected);
        assert!(client.is_quiet_for(Duration::from_millis(20)));
        drop(backend);
        session.close_client();
        session.wait();
    }
}

/// What has been let through to such a backend reaches it, though it answers before it has read it: it would take the first octets
/// inside TLS for the rest.
fn early_answer(test: &Test) {
    let (mut session, mut backend) = with_backend(test, "optional");
    // More than its socket holds, and less than that and a queue.
    let literal = "x".repeat(40_000);
    backend.send("* OK hello\r\n");
    let client = session.client();
    client.greeting();
    client.send(format!(
        "s XLONG {{{}+}}\r\n{literal}\r\n{STARTTLS}",
        literal.len()
    ));
    assert_eq!(backend.line(), "s XLONG {40000}");
    backend.send("+ go on\r\ns NO too long\r\n");
    assert_eq!(client.line(), "s NO too long");
    assert_eq!(client.line(), BEGIN);
    client.handshake(&TlsOffer::new(pki())).unwrap();
    client.send("e NOOP\r\n");
    assert_eq!(backend.line(), literal);
    assert_eq!(backend.line(), "e NOOP");
    drop(backend);
    session.close_client();
    session.wait();
}

/// What a backend that is started inside TLS says, and what of it the client hears after STARTTLS (where its greeting is not the
/// client's) and on an implicit port.
#[rustfmt::skip] // A row is a line.
const OUT_OF_TURN: &[(&str, &str, &str)] = &[
    ("* OK hi\r\n* OK again\r\n", "* OK again\r\n", "* OK hi\r\n* OK again\r\n"),
    ("* OK hi\r\n* PREAUTH late\r\n", "* PREAUTH late\r\n", "* OK hi\r\n* PREAUTH late\r\n"),
    ("* OK hi\r\n* BYE late\r\n", "* BYE late\r\n", "* OK hi\r\n* BYE late\r\n"),
    ("* OK hi\r\na OK done\r\nx NO [X] x\r\n", "a OK done\r\nx NO [X] x\r\n", "* OK hi\r\na OK done\r\nx NO [X] x\r\n"),
    ("* OK hi\r\n+ go\r\n+ \r\n", "+ go\r\n+ \r\n", "* OK hi\r\n+ go\r\n+ \r\n"),
    ("* OK hi\r\n* CAPABILITY A STARTTLS\r\n", "* CAPABILITY A\r\n", "* OK hi\r\n* CAPABILITY A\r\n"),
    ("* OK hi\r\n* ID (\"x\" {3}\r\na\r\n)\r\n", "* ID (\"x\" {3}\r\na\r\n)\r\n", "* OK hi\r\n* ID (\"x\" {3}\r\na\r\n)\r\n"),
    ("\r\n* OK hi\r\n", GONE, GONE),
    ("+ go\r\n* OK hi\r\n", GONE, GONE),
    ("a OK forged\r\n* OK hi\r\n", GONE, GONE),
    ("* 3 EXISTS\r\n* OK hi\r\n", GONE, GONE),
    ("* CAPABILITY A STARTTLS\r\n* OK hi\r\n", GONE, GONE),
    ("* NO\r\n* OK hi\r\n", GONE, GONE),
    ("* BYE no\r\n* OK hi\r\n", "* BYE no\r\n", "* BYE no\r\n"),
    ("* PREAUTH hi\r\n", GONE, "* PREAUTH hi\r\n"),
];

const GONE: &str = "* BYE [UNAVAILABLE] The mail server is not available\r\n";

fn out_of_turn(test: &Test) {
    for (said, after_starttls, implicit) in OUT_OF_TURN {
        for (policy, expected) in [("required", after_starttls), ("implicit", implicit)] {
            for is_cut in [false, true] {
                let (mut session, mut backend) = with_backend(test, policy);
                // It is there from the start, and is not asked before TLS stands.
                if !is_cut {
                    backend.send(said);
                }
                let client = session.client();
                if policy == "required" {
                    let greeting = client.greeting();
                    assert!(greeting.contains("LOGINDISABLED"), "{greeting}");
                    assert_eq!(client.command("a STARTTLS").lines, [BEGIN]);
                }
                client.handshake(&TlsOffer::new(pki())).unwrap();
                if is_cut {
                    for octet in said.bytes() {
                        backend.send([octet]);
                        backend.wait_until_read();
                    }
                }
                let heard = client.read_exact(expected.len());
                assert_eq!(&String::from_utf8_lossy(&heard), expected, "{said:?}");
                backend.shutdown();
                let (rest, end) = client.read_to_end();
                assert_eq!(String::from_utf8_lossy(&rest), "", "{said:?}");
                assert_eq!(end, End::CloseNotify, "{said:?}");
                session.close_client();
                session.wait();
            }
        }
    }
}

/// Whatever ends a connection between OK and ServerHello, nothing but a record is sent.
fn silent_ends(test: &Test) {
    for policy in ["required", "optional"] {
        for cause in [
            "SIGTERM",
            "the login timeout",
            "the handshake timeout",
            "the keeper's end",
            "the client's end",
            "an alert",
        ] {
            let program = match cause {
                "the login timeout" => Program::new(test).option("--login-timeout", "3"),
                "the handshake timeout" => Program::new(test).option("--handshake-timeout", "1"),
                _ => Program::new(test),
            };
            let mut session = program.tls(policy).start();
            let client = session.client();
            client.greeting();
            client.send(STARTTLS);
            assert_eq!(client.line(), BEGIN);
            let hello = Client::client_hello(&offer("TLS 1.3"));
            session.client().send_raw(&hello[..50]);
            match cause {
                "SIGTERM" => {
                    session.wait_idle();
                    session.kill(session.network(), libc::SIGTERM);
                }
                "the keeper's end" => {
                    let keeper = session.processes().keeper.expect("a keeper");
                    session.kill(keeper, libc::SIGKILL);
                    session.client().send_raw(&hello[50..]);
                }
                "the client's end" => session.client().shutdown(),
                // In the middle of the hello, and then in its place.
                "an alert" => session.client().send_raw(record(ALERT, [2, 40]).repeat(60)),
                _ => {}
            }
            let (rest, _) = session.client().read_to_end();
            kinds(&rest);
            session.close_client();
            session.wait();
        }
    }
    assert_nothing_received(test);
}

// ---- session fixation ----

/// ID, ENABLE, failed logins, names that were half given: a backend remembers. The one inside TLS has never heard of it.
fn fixation(test: &Test) {
    let before: &[&[(&str, &str)]] = &[
        &[("s ID (\"from\" \"attacker\")", "OK")],
        &[("s ENABLE CONDSTORE attacker", "BAD")],
        &[("s LOGIN attacker wrong", "NO")],
        &[("s LOGIN {8+}\r\nattacker {1+}\r\nx", "NO")],
        &[("s AUTHENTICATE PLAIN YXR0YWNrZXI=", "NO")],
        &[
            ("s ID (\"from\" \"attacker\")", "OK"),
            ("t SELECT attacker", "OK"),
            ("s ID NIL", "OK"),
        ],
    ];
    for commands in before {
        let first = test.record().backends().len();
        let mut session = Program::new(test).tls("optional").start();
        let client = session.client();
        client.greeting();
        for (command, status) in *commands {
            let reply = client.command(command);
            assert!(reply.status().starts_with(status), "{command}: {reply:?}");
        }
        client.starttls(pki());
        client.login();
        assert!(client.command("p LOGOUT").is_ok());
        session.close_client();
        assert_eq!(session.wait_code(), 0);
        let [clear, secured] = &test.record().backends()[first..] else {
            panic!("two backends")
        };
        let received = clear.received_text();
        assert!(!received.is_empty() && !received.contains("sekret"));
        assert_eq!(
            secured.received_text(),
            "login LOGIN u sekret\r\np LOGOUT\r\n"
        );
        assert_eq!(secured.environment()["SSL_PROTOCOL"], "TLSv1.3");
        assert!(!clear.environment().contains_key("SSL_PROTOCOL"));
    }
    // Nor does a login in clear become one inside TLS: there is no STARTTLS after it.
    let mut session = Program::new(test).tls("optional").start();
    let client = session.client();
    client.greeting();
    client.login();
    let reply = client.command("s STARTTLS");
    assert!(reply.status().starts_with("BAD"), "{reply:?}");
    session.close_client();
    session.wait();
    // Under required there is nobody who could remember.
    let first = test.record().backends().len();
    let mut session = Program::new(test).start();
    let client = session.client();
    client.greeting();
    for command in [
        "s ID (\"from\" \"attacker\")",
        "s LOGIN u sekret",
        "s LOGIN {1+}\r\nu {6+}\r\nsekret",
        "s AUTHENTICATE PLAIN AHUAc2VrcmV0",
        "s ENABLE attacker",
    ] {
        client.command(command);
    }
    client.starttls(pki());
    let reply = client.command("p SELECT INBOX");
    assert!(client.command("q LOGOUT").is_ok(), "{reply:?}");
    session.close_client();
    session.wait();
    let [backend] = &test.record().backends()[first..] else {
        panic!("one backend")
    };
    assert_eq!(backend.received_text(), "p SELECT INBOX\r\nq LOGOUT\r\n");
}

/// Half a literal, half a line, a SASL exchange: what comes next is their rest, however it looks, and TLS does not begin in the
/// middle of a command.
fn unfinished_commands(test: &Test) {
    let rows: &[(&str, &str, &str)] = &[
        ("optional", "s LOGIN {30}\r\n", "+ "),
        ("optional", "s LOGIN {30+}\r\n", ""),
        ("optional", "s AUTHENTICATE PLAIN\r\n", "+ "),
        ("optional", "s ID (\"from\" {30}\r\n", "+ "),
        ("optional", "s LOGIN attacker ", ""),
        ("required", "s LOGIN {30+}\r\n", ""),
        ("required", "s LOGIN attacker ", ""),
        ("required", "s AUTHENTICATE PLAIN {30+}\r\n", ""),
        ("required", "s X {3+}\r\nabc {30+}\r\n", ""),
    ];
    for (policy, begun, invitation) in rows {
        let first = test.record().backends().len();
        let mut session = Program::new(test).tls(policy).start();
        let client = session.client();
        client.greeting();
        client.send(begun);
        if !invitation.is_empty() {
            assert!(client.line().starts_with(invitation), "{begun:?}");
        }
        client.send(STARTTLS);
        // A line of SASL data and half a line are over now, and their command is refused; a literal is not.
        client.send("a STARTTLS\r\na1\r\n \r\n");
        let reply = client.reply("s");
        // The scripted server takes any ID.
        assert!(!reply.is_ok() || begun.contains("ID"), "{begun:?}");
        let is_line = !begun.contains('{');
        if is_line {
            // Then the second one is a command.
            assert_eq!(client.line(), BEGIN, "{begun:?}");
        }
        if !is_line {
            client.starttls(pki());
            assert_eq!(client.command("p CAPABILITY").lines, CAPABILITY);
        }
        session.close_client();
        session.wait();
        for backend in &test.record().backends()[first..] {
            let received = backend.received_text();
            let is_inside = backend.environment().contains_key("SSL_PROTOCOL");
            assert!(!is_inside || received == "p CAPABILITY\r\n", "{received:?}");
        }
    }
}

// ---- what stunnel, perdition, Nemesis and James got wrong ----

/// Lines that others have read in another way than their backends did, sent in one piece and octet by octet. `evil` is never the tag
/// of a command that is carried out, and the backend is in step afterwards.
#[rustfmt::skip] // A row is a line.
const DIFFERENTIAL: &[(&[u8], &[&str])] = &[
    (b"s NOOP\nt NOOP\n", &["s OK", "t OK"]),
    (b"evil\tSTARTTLS\r\n", &["* BAD"]),
    (b"evil  STARTTLS\r\n", &["evil BAD"]),
    (b" evil STARTTLS\r\n", &["* BAD"]),
    (b"evil STARTTLS \r\n", &["evil BAD"]),
    (b"evil STARTTLS x\r\n", &["evil BAD"]),
    (b"evil STARTTLSX\r\n", &["evil BAD"]),
    (b"evil STARTTLS\0\r\n", &["evil BAD"]),
    (b"evil STARTTLS\0x\r\n", &["evil BAD"]),
    (b"evil STARTTLS\r\r\n", &["evil BAD"]),
    (b"s NOOP\revil STARTTLS\r\n", &["s BAD"]),
    (b"s NOOP\0evil STARTTLS\r\n", &["s BAD"]),
    (b"s NOOP\0\nt NOOP\r\n", &["s BAD", "t OK"]),
    (b"evil \"STARTTLS\"\r\n", &["evil BAD"]),
    (b"evil {8+}\r\nSTARTTLS\r\n", &["evil BAD"]),
    (b"{15+}\r\nevil STARTTLS\r\n NOOP\r\n", &["* BAD"]),
    (b"{4+}\r\nevil STARTTLS\r\n", &["* BAD"]),
    (b"\"evil\" STARTTLS\r\n", &["* BAD"]),
    (b"evil\xe9 STARTTLS\r\n", &["* BAD"]),
    (b"evil \xc5\xbfTARTTLS\r\n", &["evil BAD"]),
    (b"s ID (\"x\" \"evil STARTTLS\")\r\n", &["s OK"]),
    (b"s LOGIN {15+}\r\nevil STARTTLS\r\n {1+}\r\nx\r\n", &["s NO"]),
    (b"s AUTHENTICATE PLAIN {15+}\r\nevil STARTTLS\r\n\r\n", &["s BAD"]),
];

fn differential(test: &Test, program: &Program, is_scripted: bool) {
    for (bytes, answers) in DIFFERENTIAL {
        for is_cut in [false, true] {
            let mut session = program.start_on(Socket::Pair, Handover::Stdio, Stderr::Log);
            let client = session.client();
            client.greeting();
            let all = [*bytes, b"probe NOOP\r\n"].concat();
            if is_cut {
                for octet in all {
                    client.send([octet]);
                    client.wait_until_read();
                }
            } else {
                client.send(all);
            }
            let reply = client.reply("probe");
            let what = format!("{:?}: {reply:?}", String::from_utf8_lossy(bytes));
            assert!(reply.is_ok(), "{what}");
            // Dovecot warns of a password in clear besides its answer.
            let is_answer = |line: &&String| {
                !line.starts_with("* ")
                    || line.starts_with("* BAD") && !line.starts_with("* BAD [ALERT]")
            };
            let heard: Vec<_> = reply.lines.iter().filter(is_answer).collect();
            assert_eq!(heard.len(), answers.len() + 1, "{what}");
            for (line, answer) in heard.iter().zip(*answers) {
                // Servers differ in what they say, and not in what they answer; `evil` is never done.
                let tag = answer.split(' ').next().unwrap();
                let expected = if is_scripted || tag == "evil" {
                    answer
                } else {
                    tag
                };
                assert!(line.starts_with(expected), "{what}");
            }
            client.starttls(pki());
            assert!(client.command("p NOOP").is_ok(), "{what}");
            session.close_client();
            session.wait();
        }
    }
    for backend in test.record().backends() {
        let received = backend.received_text();
        let lines = received
            .lines()
            .filter(|line| line.to_uppercase().contains("STARTTLS"));
        for line in lines {
            let is_data = line == "evil STARTTLS" || line.starts_with("s ID ");
            assert!(is_data || line == "evil STARTTLSX", "{received:?}");
        }
    }
}

/// Nobody can log in before TLS, so nobody is told that he could; nor is a client asked for a password.
fn nemesis(test: &Test) {
    let mut session = Program::new(test).start();
    let client = session.client();
    let mut said = vec![client.greeting()];
    said.push(client.command("s CAPABILITY").text());
    for mechanism in [
        "PLAIN",
        "LOGIN",
        "CRAM-MD5",
        "SCRAM-SHA-256",
        "EXTERNAL",
        "XOAUTH2",
    ] {
        for response in ["", " =", " AHUAc2VrcmV0"] {
            let reply = client.command(&format!("s AUTHENTICATE {mechanism}{response}"));
            assert_eq!(reply.lines, ["s NO [PRIVACYREQUIRED] Use STARTTLS first"]);
        }
    }
    said.push(client.command("t CAPABILITY").text());
    for line in said {
        assert!(line.contains(" LOGINDISABLED"), "{line}");
        assert_eq!(line.matches(" STARTTLS").count(), 1, "{line}");
        for word in ["AUTH=", "SASL-IR", "LITERAL"] {
            assert!(!line.contains(word), "{line}");
        }
    }
    session.close_client();
    session.wait();
    assert!(test.record().is_empty());
}

/// Whatever a client offers, it gets the same by STARTTLS as on an implicit port.
fn same_settings(test: &Test) {
    let ca = Authority::make(&test.path("clients"), "client CA");
    let foreign = Authority::make(&test.path("foreign"), "foreign CA");
    let (alice, mallory) = (ca.issue("alice", |_| {}), foreign.issue("alice", |_| {}));
    let mut offers = Vec::new();
    let all = rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES;
    for suite in all {
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites = vec![*suite];
        let builder = rustls::ClientConfig::builder_with_provider(provider.into());
        let version = if suite.tls13().is_some() {
            &TLS13
        } else {
            &TLS12
        };
        let builder = builder.with_protocol_versions(&[version]).unwrap();
        let config = builder.with_root_certificates(TlsOffer::new(pki()).roots);
        offers.push(config.with_no_client_auth());
    }
    for group in TlsOffer::new(pki()).groups {
        for version in [&TLS12, &TLS13] {
            let (groups, versions) = (vec![group], vec![version]);
            let is_new_only = group.name() == rustls::NamedGroup::X25519MLKEM768;
            if !(is_new_only && version == &TLS12) {
                offers.push(
                    TlsOffer {
                        groups,
                        versions,
                        ..TlsOffer::new(pki())
                    }
                    .config(),
                );
            }
        }
    }
    for name in ["imap", "h2", "smtp"] {
        let alpn = vec![name.as_bytes().to_vec()];
        offers.push(
            TlsOffer {
                alpn,
                ..TlsOffer::new(pki())
            }
            .config(),
        );
    }
    offers.push(alice.shown_by(TlsOffer::new(pki()).config()));
    offers.push(mallory.shown_by(TlsOffer::new(pki()).config()));
    let plain = Program::new(test);
    let programs = [
        plain.clone(),
        plain.clone().option("--min-tls", "1.3"),
        plain.option("--client-ca", &ca.file),
    ];
    for program in programs {
        for (number, config) in offers.iter().enumerate() {
            let config = std::sync::Arc::new(config.clone());
            let outcomes = ["implicit", "required", "optional"].map(|policy| {
                let mut session = program.clone().tls(policy).start();
                let client = session.client();
                if policy != "implicit" {
                    client.greeting();
                    assert!(client.command("s STARTTLS").is_ok());
                }
                let mut result = client.handshake_by(&config);
                // In TLS 1.3 a client hears of a refusal when it has done its part.
                if result.is_ok() {
                    client.send("p NOOP\r\n");
                    result = client
                        .line_or_end()
                        .map(drop)
                        .map_err(|end| format!("{end:?}"));
                }
                let tls = client.tls();
                let agreed = format!(
                    "{result:?} {:?} {:?} {:?} {:?}",
                    tls.protocol_version(),
                    tls.negotiated_cipher_suite(),
                    tls.negotiated_key_exchange_group(),
                    tls.alpn_protocol()
                );
                session.close_client();
                session.wait();
                agreed
            });
            assert_eq!(outcomes[0], outcomes[1], "offer {number}");
            assert_eq!(outcomes[0], outcomes[2], "offer {number}");
        }
    }
}

/// Words of any length before TLS end in an answer or a BYE, and never in a crash.
fn long_words(test: &Test) {
    for bits in [6, 7, 8, 10, 12, 14] {
        for length in [(1 << bits) - 1, 1 << bits, (1 << bits) + 1] {
            let word = "A".repeat(length);
            for line in [
                format!("{word} NOOP"),
                format!("s {word}"),
                format!("s AUTHENTICATE PLAIN {word}"),
                format!("s LOGIN {word} {word}"),
                format!("s LOGIN {{{}}}", "9".repeat(length)),
            ] {
                let mut session = Program::new(test).start();
                let client = session.client();
                client.greeting();
                client.send(format!("{line}\r\n"));
                client.shutdown();
                let (said, end) = client.read_to_end();
                assert!(!said.is_empty() && said.ends_with(b"\r\n"), "{length}");
                assert_eq!(end, End::Eof);
                session.close_client();
                assert_eq!(session.wait_code(), 0, "{}", session.log());
            }
        }
    }
}

/// What another protocol's client says, led to our port by whoever controls it or its path.
const OTHERS: &[(&str, &str)] = &[
    (
        "HTTP",
        "POST /reflected HTTP/1.1\r\nHost: reflected\r\nUser-Agent: reflected\r\n\r\nreflected=<script>reflected(1)</script>\r\n",
    ),
    (
        "SMTP",
        "EHLO reflected\r\nMAIL FROM:<reflected@example.org>\r\nRCPT TO:<reflected>\r\nDATA\r\nSubject: reflected\r\n.\r\n",
    ),
    (
        "FTP",
        "USER reflected\r\nPASS reflected\r\nEPSV\r\nRETR reflected\r\n",
    ),
    (
        "POP3",
        "CAPA\r\nUSER reflected\r\nPASS reflected\r\nRETR 1\r\n",
    ),
];

/// In clear before TLS, where we answer: after a few lines it is over, and nothing but a tag comes back.
fn other_protocols(test: &Test) {
    for (name, said) in OTHERS {
        let mut session = Program::new(test).start();
        let client = session.client();
        client.greeting();
        client.try_send(said.repeat(10).as_bytes());
        let (answers, end) = client.read_to_end();
        let answers = String::from_utf8(answers).unwrap();
        assert!(answers.lines().count() <= 11, "{name}: {answers}");
        assert!(
            answers.lines().last().unwrap().starts_with("* BYE "),
            "{name}: {answers}"
        );
        assert!(!answers.contains("reflected"), "{name}: {answers}");
        assert!(!answers.contains('<'), "{name}: {answers}");
        assert_eq!(end, End::Eof);
        session.close_client();
        assert_eq!(session.wait_code(), 0);
    }
    assert!(test.record().is_empty());
}

/// Inside TLS, where the backend answers most of it: just as few answers.
fn other_protocols_inside(test: &Test) {
    for (name, said) in OTHERS {
        for policy in ["implicit", "required"] {
            let mut session = Program::new(test).tls(policy).start();
            let client = session.client();
            if policy == "implicit" {
                client.handshake(&TlsOffer::new(pki())).unwrap();
                client.greeting();
            } else {
                client.greeting();
                client.starttls(pki());
            }
            client.try_send(said.repeat(10).as_bytes());
            let (answers, end) = client.read_to_end();
            let answers = String::from_utf8(answers).unwrap();
            let refused = answers.lines().filter(|line| line.contains(" BAD "));
            assert_eq!(refused.count(), 10, "{name}: {answers}");
            assert_eq!(
                answers.lines().last(),
                Some("* BYE Too many bad commands"),
                "{name}"
            );
            assert!(!answers.contains("reflected"), "{name}: {answers}");
            assert_eq!(end, End::CloseNotify);
            session.close_client();
            assert_eq!(session.wait_code(), 0);
        }
    }
    // The backend had them, and it was it who refused.
    let backends = test.record().backends();
    assert!(!backends.is_empty());
    assert!(
        backends
            .iter()
            .all(|backend| backend.received_text().contains("reflected")),
    );
}
