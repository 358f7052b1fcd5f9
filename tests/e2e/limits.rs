//! Floods, slow clients and endless waits before login: each ends by a named limit, with bounded memory and a clean goodbye.

use crate::harness::*;
use libtest_mimic::Trial;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<Trial> {
    let mut tests = vec![
        test(
            "limits: a slow handshake is ended by its total deadline",
            &[],
            slow_handshake,
        ),
        test(
            "limits: a client without login is ended by the login timeout, with a BYE",
            &[],
            login_timeout,
        ),
        test(
            "limits: a byte at a time does not hold the login timeout off",
            &[],
            slow_login,
        ),
        test(
            "limits: a login in time is not ended by the login timeout",
            &[],
            no_timeout_after_login,
        ),
        test(
            "limits: a command line of 8192 octets is taken",
            &[],
            long_line_taken,
        ),
        test("limits: bad commands end in a BYE", &[], bad_commands),
        test(
            "limits: 100 connections at once are served",
            &[],
            many_connections,
        ),
    ];
    for policy in ["required", "optional", "implicit"] {
        for flood in FLOODS {
            tests.push(test(
                &format!(
                    "limits: {policy}: {} ends by a limit in bounded memory",
                    flood.name
                ),
                &[],
                move |test| flood_ends(test, policy, flood),
            ));
        }
    }
    tests
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

/// Something that a hostile client sends again and again.
struct Flood {
    name: &'static str,
    first: &'static str,
    again: &'static str,
}

const FLOODS: &[Flood] = &[
    Flood {
        name: "a line without end",
        first: "a LOGIN ",
        again: "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    },
    Flood {
        name: "a line of NUL without end",
        first: "",
        again: "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
    },
    Flood {
        name: "a literal of 4 GiB",
        first: "a LOGIN {4294967295+}\r\n",
        again: "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    },
    Flood {
        name: "a literal of a size with 60 digits",
        first: "a LOGIN {111111111111111111111111111111111111111111111111111111111111+}\r\n",
        again: "xxxxxxxx",
    },
    Flood {
        name: "a flood of commands",
        first: "",
        again: "a NOOP\r\n",
    },
    Flood {
        name: "a flood of literals",
        first: "",
        again: "a LOGIN {4+}\r\nuser {4+}\r\nwrong\r\n",
    },
    Flood {
        name: "a flood of empty lines",
        first: "",
        again: "\r\n",
    },
];

/// More than any limit before login allows.
const FLOOD_OCTETS: usize = 40 << 20;

/// The most that the network process may take at its peak, beyond the program itself: the limits allow half a megabyte
/// of input held, and queues and buffers.
const MEMORY_KIB: u64 = 12 << 10;

fn flood_ends(test: &Test, policy: &str, flood: &Flood) {
    let mut session = Program::new(test).tls(policy).start();
    if policy == "implicit" {
        session.client().handshake(&TlsOffer::new(pki())).unwrap();
    }
    session.client().greeting();
    session.client().send(flood.first);
    let piece = flood.again.repeat(16384 / flood.again.len());
    let mut sent = 0;
    while sent < FLOOD_OCTETS && session.client().try_send(piece.as_bytes()) {
        sent += piece.len();
        let peak = session.network().peak_kib_if_alive();
        assert!(
            peak.is_none_or(|peak| peak < MEMORY_KIB),
            "{peak:?} KiB after {sent} octets"
        );
    }
    assert!(sent < FLOOD_OCTETS, "{sent} octets were taken without end");
    session.client().read_to_end();
    session.close_client();
    session.wait_code();
    let end = session.session_line()["end"].clone();
    assert!(
        ["limit", "too many", "NUL"]
            .iter()
            .any(|word| end.contains(word)),
        "{end}"
    );
}

fn slow_handshake(test: &Test) {
    for policy in ["required", "implicit"] {
        let mut session = Program::new(test)
            .tls(policy)
            .option("--handshake-timeout", "1")
            .start();
        let client = session.client();
        if policy == "required" {
            client.greeting();
            assert!(client.command("a STARTTLS").is_ok());
        }
        let started = Instant::now();
        let hello = Client::client_hello(&TlsOffer::new(pki()));
        // A byte every tenth of the deadline: each read is in time, the whole is not.
        let mut bytes = hello.iter();
        while client.is_quiet_for(Duration::from_millis(100)) {
            client.try_send(&[*bytes.next().unwrap()]);
        }
        let (rest, _) = client.read_to_end();
        assert!(rest.is_empty());
        assert!(started.elapsed() < Duration::from_secs(10));
        session.close_client();
        assert_eq!(session.wait_code(), 0);
        assert_eq!(session.session_line()["end"], "handshake timeout");
    }
}

fn login_timeout(test: &Test) {
    for policy in ["required", "optional", "implicit"] {
        let mut session = Program::new(test)
            .tls(policy)
            .option("--login-timeout", "3")
            .start();
        let client = session.client();
        if policy == "implicit" {
            client.handshake(&TlsOffer::new(pki())).unwrap();
        }
        client.greeting();
        let (said, end) = client.read_to_end();
        assert_eq!(
            String::from_utf8_lossy(&said),
            "* BYE too long without login\r\n"
        );
        assert_eq!(
            end,
            if policy == "implicit" {
                End::CloseNotify
            } else {
                End::Eof
            }
        );
        session.close_client();
        assert_eq!(session.wait_code(), 0, "{}", session.log());
        assert_eq!(session.session_line()["end"], "login timeout");
    }
}

fn slow_login(test: &Test) {
    let mut session = Program::new(test).option("--login-timeout", "3").start();
    let client = session.client();
    client.greeting();
    while client.is_quiet_for(Duration::from_millis(100)) {
        client.try_send(b"x");
    }
    let (said, _) = client.read_to_end();
    assert_eq!(
        String::from_utf8_lossy(&said),
        "* BYE too long without login\r\n"
    );
    session.close_client();
    session.wait();
}

fn no_timeout_after_login(test: &Test) {
    let mut session = Program::new(test).option("--login-timeout", "3").start();
    let client = session.client();
    client.log_in_by_starttls(pki());
    assert!(client.is_quiet_for(Duration::from_millis(3500)));
    assert!(client.command("a NOOP").is_ok());
    session.close_client();
    session.wait();
}

/// RFC 2683 section 3.2.1.5, RFC 7162 section 4.
fn long_line_taken(test: &Test) {
    let mut session = Program::new(test).start();
    let client = session.client();
    client.greeting();
    let line = format!("a ID (\"x\" \"{}\")", "y".repeat(8192 - 14));
    assert!(client.command(&line).is_ok());
    client.starttls(pki());
    client.login();
    session.close_client();
    session.wait();
}

fn bad_commands(test: &Test) {
    let mut session = Program::new(test).start();
    let client = session.client();
    client.greeting();
    client.send("a FROB\r\n".repeat(100));
    let (said, end) = client.read_to_end();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(said.lines().last().unwrap().starts_with("* BYE "), "{said}");
    assert_eq!(end, End::Eof);
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

fn many_connections(test: &Test) {
    let server_needs = Program::new(test);
    let mut sessions: Vec<_> = (0..100).map(|_| server_needs.start()).collect();
    for session in &mut sessions {
        session.client().log_in_by_starttls(pki());
    }
    for session in &mut sessions {
        assert!(session.client().command("z LOGOUT").is_ok());
        session.close_client();
        assert_eq!(session.wait_code(), 0);
    }
}
