//! STARTTLS: where it is accepted and where it is refused. That nothing from before TLS is executed, answered or forwarded after it is
//! in `attacks`, by the names of those who had such holes (README, "Old STARTTLS holes").

use crate::harness::*;
use libtest_mimic::Trial;
use rustls::version::{TLS12, TLS13};
use std::time::{Duration, Instant};

pub fn tests() -> Vec<Trial> {
    let mut tests = vec![
        test(
            "starttls: required accepts it after everything that may come before",
            &[],
            required_orderings,
        ),
        test(
            "starttls: optional accepts it after everything that may come before",
            &[],
            optional_orderings,
        ),
        test(
            "starttls: in TLS, after STARTTLS and on an implicit port, it is BAD and the session goes on",
            &[],
            refused_in_tls,
        ),
        test(
            "starttls: in optional, after a login in clear, it is the backend's to refuse",
            &[],
            after_login,
        ),
        test(
            "starttls: the session line tells how logins went, in clear and inside TLS",
            &[],
            logins_in_the_log,
        ),
        test(
            "starttls: a backend that greets PREAUTH is never shown in clear under required",
            &[],
            preauth_required,
        ),
        test(
            "starttls: a backend that greets PREAUTH is passed on under implicit",
            &[],
            preauth_implicit,
        ),
        test(
            "starttls: a backend that greets BYE is passed on inside TLS",
            &[],
            greeting_bye,
        ),
        test(
            "starttls: a backend that writes nothing, half a line, or ends at once gives a BYE inside TLS",
            &[],
            no_greeting,
        ),
        test(
            "starttls: a backend that never greets is ended by the login timeout, with a BYE inside TLS",
            &[],
            silent,
        ),
        test(
            "starttls: a keeper that was killed turns STARTTLS into NO and BYE",
            &[Need::Root],
            keeper_killed,
        ),
        test(
            "starttls: on port 993 a keeper that was killed is our fault, and said so",
            &[Need::Root],
            keeper_killed_implicit,
        ),
        test(
            "starttls: a launcher that was killed gives a BYE inside TLS and no wait",
            &[Need::Root],
            launcher_killed,
        ),
        test(
            "starttls: a backend that is no IMAP server is a BYE, and in the log",
            &[],
            no_imap,
        ),
        test(
            "starttls: a keeper that is stopped makes the handshake fail in time",
            &[Need::Root],
            keeper_stopped,
        ),
        test(
            "attacks: ALPACA: ALPN imap or none is accepted, anything else refused",
            &[],
            alpn,
        ),
        test(
            "starttls: the groups that clients offer are taken, the post-quantum one first",
            &[],
            groups,
        ),
        test(
            "starttls: the backend is told about TLS and the client",
            &[],
            environment,
        ),
    ];
    for policy in ["required", "optional"] {
        for version in ["TLS 1.2", "TLS 1.3"] {
            tests.push(test(
                &format!("starttls: {policy}, {version}: a ClientHello in STARTTLS's segment is taken, cut anywhere"),
                &[],
                move |test| hello_in_one_segment(test, policy, version),
            ));
        }
    }
    tests
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn offer(version: &str) -> TlsOffer {
    let versions = vec![if version == "TLS 1.2" { &TLS12 } else { &TLS13 }];
    TlsOffer {
        versions,
        ..TlsOffer::new(pki())
    }
}

fn secured(client: &mut Client) {
    client.login();
    assert!(client.command("z NOOP").is_ok());
}

fn required_orderings(test: &Test) {
    let before: &[&[(&str, &str)]] = &[
        &[],
        &[("a NOOP", "OK")],
        &[("a ID NIL", "OK"), ("b ID (\"name\" \"x\")", "OK")],
        &[("a CAPABILITY", "OK"), ("b capability", "OK")],
        &[("a LOGIN u sekret", "NO [PRIVACYREQUIRED]")],
        &[
            ("a AUTHENTICATE PLAIN", "NO [PRIVACYREQUIRED]"),
            ("b AUTHENTICATE PLAIN AHUAc2VrcmV0", "NO [PRIVACYREQUIRED]"),
        ],
        &[
            ("a SELECT INBOX", "BAD"),
            ("b STARTTLS x", "BAD"),
            ("c STARTTLSX", "BAD"),
            ("d START", "BAD"),
        ],
        &[
            ("a LOGIN u {6+}\r\nsekret", "NO [PRIVACYREQUIRED]"),
            ("b NOOP", "OK"),
        ],
    ];
    for commands in before {
        for starttls in ["t]&1 STARTTLS", "t starttls", "t StArTtLs"] {
            let mut session = Program::new(test).start();
            let client = session.client();
            assert!(client.greeting().contains(" STARTTLS LOGINDISABLED]"));
            for (command, expected) in *commands {
                let reply = client.command(command);
                assert!(reply.status().starts_with(expected), "{command}: {reply:?}");
            }
            assert!(client.command(starttls).is_ok());
            client.handshake(&TlsOffer::new(pki())).unwrap();
            secured(client);
            session.close_client();
            session.wait();
        }
    }
    for backend in test.record().backends() {
        let received = backend.received_text();
        assert!(
            received.starts_with("login LOGIN "),
            "the backend saw something from before TLS: {received}"
        );
    }
}

fn optional_orderings(test: &Test) {
    let before: &[&[(&str, &str)]] = &[
        &[],
        &[("a NOOP", "OK")],
        &[("a ID NIL", "OK")],
        &[("a CAPABILITY", "OK"), ("b CAPABILITY", "OK")],
        &[("a LOGIN u wrong", "NO")],
        &[("a STARTTLS x", "BAD"), ("b NOOP", "OK")],
    ];
    for commands in before {
        let mut session = Program::new(test).tls("optional").start();
        let client = session.client();
        client.greeting();
        for (command, expected) in *commands {
            let reply = client.command(command);
            assert!(reply.status().starts_with(expected), "{command}: {reply:?}");
            if command.contains("CAPABILITY") {
                assert_eq!(reply.text().matches(" STARTTLS").count(), 1, "{reply:?}");
            }
        }
        client.starttls(pki());
        secured(client);
        session.close_client();
        session.wait();
    }
    // An aborted AUTHENTICATE, with STARTTLS as SASL data on the way, and pipelined commands whose answers come first.
    let mut session = Program::new(test).tls("optional").start();
    let client = session.client();
    client.greeting();
    client.send("a AUTHENTICATE PLAIN\r\n");
    assert!(client.line().starts_with('+'));
    client.send("*\r\n");
    let aborted = client.line();
    assert!(
        aborted.starts_with("a BAD") || aborted.starts_with("a NO"),
        "{aborted}"
    );
    client.send("b NOOP\r\nc NOOP\r\nd STARTTLS\r\n");
    for tag in ["b", "c", "d"] {
        assert!(client.line().starts_with(&format!("{tag} OK")));
    }
    client.handshake(&TlsOffer::new(pki())).unwrap();
    secured(client);
    session.close_client();
    session.wait();
    for backend in test.record().backends() {
        assert!(
            !backend.received_text().to_uppercase().contains("STARTTLS"),
            "{}",
            backend.received_text()
        );
    }
}

fn refused_in_tls(test: &Test) {
    for policy in ["required", "implicit"] {
        let mut session = Program::new(test).tls(policy).start();
        let client = session.client();
        if policy == "implicit" {
            client.handshake(&TlsOffer::new(pki())).unwrap();
            assert!(!client.greeting().contains("STARTTLS"));
        } else {
            client.greeting();
            client.starttls(pki());
        }
        assert!(client.command("a STARTTLS").status().starts_with("BAD"));
        let reply = client.command("b CAPABILITY");
        assert!(
            reply.is_ok() && !reply.text().contains("STARTTLS"),
            "{reply:?}"
        );
        secured(client);
        session.close_client();
        session.wait();
    }
    for backend in test.record().backends() {
        assert!(!backend.received_text().contains("STARTTLS"));
    }
}

fn after_login(test: &Test) {
    let mut session = Program::new(test).tls("optional").start();
    let client = session.client();
    client.greeting();
    client.login();
    let reply = client.command("a STARTTLS");
    assert!(
        reply.status().starts_with("BAD") || reply.status().starts_with("NO"),
        "{reply:?}"
    );
    assert!(client.command("b NOOP").is_ok());
    session.close_client();
    session.wait();
    assert_eq!(session.session_line()["tls"], "none");
}

fn logins_in_the_log(test: &Test) {
    for (policy, login, failed) in [
        ("optional", "yes", "3"),
        ("optional", "no", "3"),
        // In clear it is we who refuse.
        ("required", "yes", "2"),
        ("required", "no", "2"),
    ] {
        let mut session = Program::new(test).tls(policy).start();
        let client = session.client();
        client.greeting();
        assert!(!client.command("a LOGIN u wrong").is_ok());
        client.starttls(pki());
        assert!(!client.command("b LOGIN u wrong").is_ok());
        assert!(!client.command("c AUTHENTICATE PLAIN AHUAd3Jvbmc=").is_ok());
        // Given up by the client.
        assert!(!client.command("d AUTHENTICATE PLAIN *").is_ok());
        if login == "yes" {
            client.login();
        }
        session.close_client();
        session.wait();
        let line = session.session_line();
        let told = (line["login"].as_str(), line["failed_logins"].as_str());
        assert_eq!(told, (login, failed), "{policy}");
    }
}

fn preauth_required(test: &Test) {
    let program = Program::new(test).play(&Backend::greeting("* PREAUTH welcome"));
    let mut session = program.start();
    let client = session.client();
    assert!(client.greeting().starts_with("* OK "));
    client.starttls(pki());
    let (said, end) = client.read_to_end();
    assert!(
        said.starts_with(b"* BYE [UNAVAILABLE]"),
        "{}",
        String::from_utf8_lossy(&said)
    );
    assert_eq!(end, End::CloseNotify);
    session.close_client();
    session.wait();
    assert!(
        session
            .log()
            .contains("PREAUTH, which no client expects after STARTTLS: --tls implicit"),
        "{}",
        session.log()
    );
}

fn preauth_implicit(test: &Test) {
    let program = Program::new(test)
        .tls("implicit")
        .play(&Backend::greeting("* PREAUTH welcome"));
    let mut session = program.start();
    session.client().handshake(&TlsOffer::new(pki())).unwrap();
    assert_eq!(session.client().greeting(), "* PREAUTH welcome");
    session.close_client();
    session.wait();
    assert_eq!(session.session_line()["login"], "preauth");
}

fn greeting_bye(test: &Test) {
    for policy in ["required", "implicit"] {
        let mut session = Program::new(test)
            .tls(policy)
            .play(&Backend::scenario("bye", &[]))
            .start();
        let client = session.client();
        if policy == "required" {
            client.greeting();
            assert!(client.command("a STARTTLS").is_ok());
        }
        client.handshake(&TlsOffer::new(pki())).unwrap();
        let (said, end) = client.read_to_end();
        assert!(
            said.starts_with(b"* BYE "),
            "{}",
            String::from_utf8_lossy(&said)
        );
        assert_eq!(end, End::CloseNotify);
        session.close_client();
        session.wait();
    }
}

fn no_greeting(test: &Test) {
    for (name, arguments) in [
        ("half-line", &["exit"][..]),
        ("exit", &["0"]),
        ("exit", &["3"]),
        ("signal", &["9"]),
    ] {
        for policy in ["required", "optional", "implicit"] {
            let mut session = Program::new(test)
                .tls(policy)
                .play(&Backend::scenario(name, arguments))
                .start();
            let client = session.client();
            client.ask_for_backend(policy, pki());
            let (said, end) = client.read_to_end();
            let said = String::from_utf8_lossy(&said).into_owned();
            assert!(
                said.starts_with("* BYE [UNAVAILABLE] ") && said.ends_with("\r\n"),
                "{name}, {policy}: {said:?}"
            );
            assert_eq!(
                end,
                if policy == "optional" {
                    End::Eof
                } else {
                    End::CloseNotify
                }
            );
            session.close_client();
            session.wait();
            assert!(
                session.session_line()["end"].contains("backend"),
                "{}",
                session.log()
            );
        }
    }
}

/// Whoever is no IMAP server, or stumbles over its configuration, says so in the log, also in a quiet one.
fn no_imap(test: &Test) {
    for (arguments, says) in [
        (
            &["raw", "220 mx \u{1b}ESMTP\\r\\n"][..],
            "the backend is of no use: it greets with '220 mx \\x1bESMTP', which is not IMAP",
        ),
        (
            &["raw", "* NO not now\\r\\n"],
            "the backend is of no use: it greets with '* NO not now', which is not IMAP",
        ),
        (
            &["exit", "0"],
            "the backend is of no use: it closed before its greeting",
        ),
    ] {
        for policy in ["required", "optional", "implicit"] {
            let mut session = Program::new(test)
                .tls(policy)
                .flag("--quiet")
                .play(&Backend::scenario(arguments[0], &arguments[1..]))
                .start();
            let client = session.client();
            client.ask_for_backend(policy, pki());
            let (text, _) = client.read_to_end();
            assert!(text.starts_with(b"* BYE [UNAVAILABLE] "), "{text:?}");
            session.close_client();
            session.wait_as_last();
            assert!(session.log().contains(says), "{}", session.log());
        }
    }
}

fn silent(test: &Test) {
    let program = Program::new(test)
        .play(&Backend::scenario("silent", &[]))
        .option("--login-timeout", "3");
    let mut session = program.start();
    let client = session.client();
    client.greeting();
    client.starttls(pki());
    let (said, end) = client.read_to_end();
    assert_eq!(
        String::from_utf8_lossy(&said),
        "* BYE too long without login\r\n"
    );
    assert_eq!(end, End::CloseNotify);
    session.close_client();
    test.record().release();
    session.wait();
    assert_eq!(session.session_line()["end"], "login timeout");
}

fn keeper_killed(test: &Test) {
    let mut session = Program::new(test).start();
    session.client().greeting();
    let keeper = session.processes().keeper.expect("a keeper");
    session.kill(keeper, libc::SIGKILL);
    session.wait_log("the keeper has ended");
    let client = session.client();
    assert!(client.command("a NOOP").is_ok());
    let reply = client.command("b LOGIN u sekret");
    assert!(reply.status().starts_with("NO [PRIVACYREQUIRED]"));
    let reply = client.command("c STARTTLS");
    assert!(reply.status().starts_with("NO "), "{reply:?}");
    let (rest, _) = client.read_to_end();
    assert!(rest.starts_with(b"* BYE [UNAVAILABLE] "), "{rest:?}");
    session.close_client();
    assert_eq!(session.wait_code(), 111);
}

/// On port 993, where there is nothing before the handshake.
fn keeper_killed_implicit(test: &Test) {
    for is_quiet in [false, true] {
        let mut program = Program::new(test).tls("implicit");
        if is_quiet {
            program = program.flag("--quiet");
        }
        let mut session = program.start();
        // By then the keeper has said that it is ready.
        session.wait_idle();
        let keeper = session.processes().keeper.expect("a keeper");
        session.kill(keeper, libc::SIGKILL);
        let offer = TlsOffer::new(pki());
        assert!(session.client().handshake(&offer).is_err());
        session.close_client();
        assert_eq!(session.wait_code(), 111);
        let log = session.log();
        assert!(
            log.contains("handshake failed: the keeper has ended (sni=localhost)"),
            "{log}"
        );
    }
}

fn keeper_stopped(test: &Test) {
    // Sooner than the keeper's own limit for an answer.
    let program = Program::new(test).option("--handshake-timeout", "2");
    let mut session = program.start();
    session.client().greeting();
    let keeper = session.processes().keeper.expect("a keeper");
    session.kill(keeper, libc::SIGSTOP);
    assert!(session.client().command("a STARTTLS").is_ok());
    let begin = Instant::now();
    let failure = session
        .client()
        .handshake(&TlsOffer::new(pki()))
        .unwrap_err();
    let waited = begin.elapsed();
    session.kill(keeper, libc::SIGCONT);
    session.close_client();
    assert_eq!(session.wait_code(), 111);
    let log = session.log();
    assert!(
        log.contains("handshake failed: the keeper does not answer in time"),
        "{failure}: {log}"
    );
    assert!(waited < Duration::from_secs(8), "{waited:?}");
    assert!(test.record().is_empty());
}

fn alpn(test: &Test) {
    for (protocols, accepted) in [
        (&[][..], true),
        (&["imap"], true),
        (&["h2", "imap"], true),
        (&["h2", "http/1.1"], false),
        (&["IMAP"], false),
    ] {
        for policy in ["required", "implicit"] {
            let mut session = Program::new(test).tls(policy).start();
            let client = session.client();
            if policy == "required" {
                client.greeting();
                assert!(client.command("a STARTTLS").is_ok());
            }
            let alpn = protocols
                .iter()
                .map(|name| name.as_bytes().to_vec())
                .collect();
            let result = client.handshake(&TlsOffer {
                alpn,
                ..TlsOffer::new(pki())
            });
            assert_eq!(result.is_ok(), accepted, "{protocols:?}: {result:?}");
            if accepted {
                let expected = protocols.contains(&"imap").then_some(&b"imap"[..]);
                assert_eq!(client.tls().alpn_protocol(), expected);
            } else {
                assert!(result.unwrap_err().contains("NoApplicationProtocol"));
            }
            session.close_client();
            assert_eq!(session.wait_code(), 0);
        }
    }
}

fn groups(test: &Test) {
    use rustls::crypto::aws_lc_rs::kx_group;
    let all = TlsOffer::new(pki()).groups;
    for (groups, expected) in [
        (all, "X25519MLKEM768"),
        (vec![kx_group::X25519, kx_group::SECP256R1], "X25519"),
        // The client's order counts.
        (vec![kx_group::X25519, kx_group::X25519MLKEM768], "X25519"),
        (vec![kx_group::SECP256R1], "secp256r1"),
        (vec![kx_group::SECP384R1], "secp384r1"),
    ] {
        let mut session = Program::new(test).start();
        let client = session.client();
        client.greeting();
        client.starttls_with(&TlsOffer {
            groups,
            ..TlsOffer::new(pki())
        });
        secured(client);
        session.close_client();
        session.wait();
        assert_eq!(
            session.session_line()["group"],
            expected,
            "{}",
            session.log()
        );
    }
}

fn environment(test: &Test) {
    for (version, protocol) in [("TLS 1.2", "TLSv1.2"), ("TLS 1.3", "TLSv1.3")] {
        for policy in ["required", "implicit"] {
            let index = test.record().backends().len();
            let program = Program::new(test)
                .tls(policy)
                .env("SSL_CLIENT_S_DN_CN", "forged")
                .env("TCPREMOTEINFO", "forged")
                .env("IMAP_TLS_REQUIRED", "couriers own")
                .env("REMOTE_HOST", "client.example")
                .env("IMAP_TLS_LOGIN_TIMEOUT", "100");
            let mut session = program.start();
            let client = session.client();
            if policy == "required" {
                client.greeting();
                assert!(client.command("a STARTTLS").is_ok());
            }
            let offer = TlsOffer {
                server_name: "MAIL.example".to_owned(),
                ..offer(version)
            };
            client.handshake(&offer).unwrap();
            client.login();
            session.close_client();
            session.wait();
            let environment = test.record().backend(index).environment();
            assert_eq!(environment["SSL_PROTOCOL"], protocol);
            assert_eq!(environment["SSL_TLS_SNI"], "mail.example");
            assert_eq!(environment["IMAP_TLS"], "1");
            assert!(environment["SSL_CIPHER"].contains("GCM"), "{environment:?}");
            assert_eq!(environment["TCPREMOTEIP"], "127.0.0.1");
            assert_eq!(environment["REMOTE_ADDR"], "127.0.0.1");
            assert_eq!(
                format!("127.0.0.1:{}", environment["TCPREMOTEPORT"]),
                session.peer
            );
            assert_eq!(environment["REMOTE_HOST"], "client.example");
            assert_eq!(environment["IMAP_TLS_REQUIRED"], "couriers own");
            for gone in [
                "SSL_CLIENT_S_DN_CN",
                "TCPREMOTEINFO",
                "IMAP_TLS_LOGIN_TIMEOUT",
            ] {
                assert!(!environment.contains_key(gone), "{gone}");
            }
            assert_eq!(session.session_line()["sni"], "mail.example");
        }
    }
}

/// RFC 9051's friendlier choice (REQUIREMENTS 4a): the rest of the segment is the beginning of the handshake.
fn hello_in_one_segment(test: &Test, policy: &str, version: &str) {
    let offer = TlsOffer {
        groups: vec![rustls::crypto::aws_lc_rs::kx_group::X25519],
        ..offer(version)
    };
    for count in 0..=Client::client_hello(&offer).len() {
        let mut session = Program::new(test).tls(policy).start();
        let client = session.client();
        client.greeting();
        client.starttls_in_one_segment("a STARTTLS\r\n", &offer, count);
        secured(client);
        session.close_client();
        session.wait();
    }
}

fn launcher_killed(test: &Test) {
    // The second is of the real-time ones, which have no names.
    for (signal, name) in [(libc::SIGKILL, "SIGKILL"), (40, "SIG40")] {
        let mut session = Program::new(test).start();
        session.client().greeting();
        let launcher = session.processes().launcher.expect("a launcher");
        session.kill(launcher, signal);
        let client = session.client();
        client.starttls(pki());
        let (said, end) = client.read_to_end();
        assert!(said.starts_with(b"* BYE [UNAVAILABLE] "));
        assert_eq!(end, End::CloseNotify);
        session.close_client();
        assert_eq!(session.wait_code(), 128 + signal);
        assert_eq!(session.session_line()["backend"], name);
        let seconds: f64 = session.session_line()["seconds"].parse().unwrap();
        assert!(seconds < 5.0, "{}", session.log());
    }
}
