//! `--accept-proxy`: a balancer's PROXY header says whose the connection is; without one, or from anybody else, nothing is served.

use crate::harness::*;
use libtest_mimic::Trial;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Addresses for documentation (RFC 5737, RFC 3849): nobody connects from them.
const CLIENT4: &str = "192.0.2.7:4711";
const SERVER4: &str = "198.51.100.1:143";
const CLIENT6: &str = "[2001:db8::7]:65535";
const SERVER6: &str = "[2001:db8::1]:993";

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for policy in ["required", "optional", "implicit"] {
        for (version, header) in VERSIONS {
            tests.push(test(
                &format!("accept-proxy: {policy}: a client is whom a header of version {version} names, in the log and for the backend"),
                &[],
                move |test| replaced(test, policy, *header),
            ));
        }
        tests.extend([
            test(
                &format!("accept-proxy: {policy}: a header and what follows it in one segment"),
                &[],
                move |test| in_one_segment(test, policy),
            ),
            test(
                &format!("accept-proxy: {policy}: LOCAL and UNKNOWN leave the balancer's address"),
                &[],
                move |test| local(test, policy),
            ),
            test(
                &format!("accept-proxy: {policy}: health checks leave no line in the log"),
                &[],
                move |test| health_checks(test, policy),
            ),
            test(
                &format!("accept-proxy: {policy}: without the option a header is but a bad client"),
                &[],
                move |test| off(test, policy),
            ),
        ]);
    }
    tests.extend([
        test("accept-proxy: a header byte by byte", &[], byte_by_byte),
        test(
            "accept-proxy: a header in two pieces, cut at every byte",
            &[],
            two_pieces,
        ),
        test(
            "accept-proxy: a connection that ends within the header, at every byte",
            &[],
            cut_off,
        ),
        test(
            "accept-proxy: malformed headers are refused with one line, without a backend",
            &[],
            malformed,
        ),
        test(
            "accept-proxy: nobody writes the log through a header",
            &[],
            forging,
        ),
        test(
            "accept-proxy: a header that never ends is cut off at its limit",
            &[],
            endless,
        ),
        test(
            "accept-proxy: a header that is slow, or never comes, ends in time",
            &[],
            slow,
        ),
        test(
            "accept-proxy: --quiet has bad headers, not strangers",
            &[],
            quiet,
        ),
        test(
            "accept-proxy: whoever is not among the balancers is refused unread",
            &[],
            stranger,
        ),
        test(
            "accept-proxy: balancers are known by address and prefix",
            &[Need::Ipv6],
            prefixes,
        ),
        test(
            "accept-proxy: a balancer on a unix socket or a pipe is 'unix'",
            &[],
            unix,
        ),
        test(
            "accept-proxy: a header is read in the sandbox only",
            &[Need::Root],
            in_the_sandbox,
        ),
        test(
            "accept-proxy: what a balancer says about TLS is neither believed nor handed on",
            &[],
            tls_of_the_balancer,
        ),
        test("accept-proxy: IPv4 in IPv6 is given as IPv4", &[], mapped),
        test(
            "accept-proxy: the time for the header is part of the time until login",
            &[],
            login_timeout,
        ),
        test(
            "accept-proxy: a backend that cannot be executed is reported with the client's address",
            &[],
            launcher_log,
        ),
        test("accept-proxy: under tcpserver", TCPSERVER, |test| {
            superserver(test, Superserver::Tcpserver)
        }),
        test("accept-proxy: under xinetd", XINETD, |test| {
            superserver(test, Superserver::Xinetd)
        }),
        test(
            "accept-proxy: under the listener limits are for clients, not for the balancer",
            &[],
            listener,
        ),
        test(
            "accept-proxy: under the listener strangers are refused, too",
            &[],
            listener_strangers,
        ),
        test(
            "accept-proxy: --check tells who the balancers are",
            &[],
            check,
        ),
        test("accept-proxy: HAProxy with send-proxy", HAPROXY, |test| {
            haproxy(test, "send-proxy")
        }),
        test(
            "accept-proxy: HAProxy with send-proxy-v2",
            HAPROXY,
            |test| haproxy(test, "send-proxy-v2"),
        ),
        test(
            "accept-proxy: HAProxy with send-proxy-v2 and all of its TLVs",
            HAPROXY,
            |test| {
                haproxy(test, "send-proxy-v2 proxy-v2-options crc32c,unique-id");
            },
        ),
    ]);
    for (name, line) in CHECKS {
        tests.push(test(
            &format!("accept-proxy: HAProxy's health check, {name}"),
            HAPROXY,
            |test| haproxy_check(test, line),
        ));
    }
    tests
}

const TCPSERVER: &[Need] = &[Need::Command("tcpserver", "ucspi-tcp")];
const XINETD: &[Need] = &[Need::Root, Need::Command("xinetd", "xinetd")];
const HAPROXY: &[Need] = &[
    Need::Command("haproxy", "haproxy"),
    Need::Command("tcpserver", "ucspi-tcp"),
];

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

/// The program behind a balancer on loopback.
fn program(test: &Test) -> Program {
    let program = Program::new(test).flag("--accept-proxy");
    program.option("--proxy-from", "127.0.0.1")
}

// ---- headers ----

type Header = fn(&str, &str) -> Vec<u8>;

const VERSIONS: &[(u8, Header)] = &[(1, v1), (2, v2)];

fn v1(client: &str, server: &str) -> Vec<u8> {
    let [client, server]: [SocketAddr; 2] = [client, server].map(|text| text.parse().unwrap());
    let family = if client.is_ipv4() { 4 } else { 6 };
    let (source, destination) = (client.ip(), server.ip());
    let (from, to) = (client.port(), server.port());
    format!("PROXY TCP{family} {source} {destination} {from} {to}\r\n").into_bytes()
}

fn v2(client: &str, server: &str) -> Vec<u8> {
    v2_with(client, server, &[])
}

fn v2_with(client: &str, server: &str, tlvs: &[u8]) -> Vec<u8> {
    let [client, server]: [SocketAddr; 2] = [client, server].map(|text| text.parse().unwrap());
    let octets = |address: SocketAddr| match address.ip() {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    let ports = [client.port().to_be_bytes(), server.port().to_be_bytes()].concat();
    let content = [octets(client), octets(server), ports, tlvs.to_vec()].concat();
    v2_raw(0x21, if client.is_ipv4() { 0x11 } else { 0x21 }, &content)
}

fn v2_raw(command: u8, family: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    [
        b"\r\n\r\n\0\r\nQUIT\n",
        &[command, family][..],
        &length,
        content,
    ]
    .concat()
}

// ---- sessions ----

/// From the greeting, or the handshake, to a login.
fn log_in(client: &mut Client, policy: &str) {
    match policy {
        "implicit" => {
            client.handshake(&TlsOffer::new(pki())).unwrap();
            client.greeting();
            client.login();
        }
        _ => client.log_in_by_starttls(pki()),
    }
}

/// What the log and the last backend must say when `client` has connected to `server` through the balancer at `balancer`.
fn assert_told(session: &Session, client: &str, server: &str, balancer: &str) {
    let environment = session
        .record()
        .backends()
        .last()
        .expect("a backend")
        .environment();
    let [client, server]: [SocketAddr; 2] = [client, server].map(|text| text.parse().unwrap());
    for (name, value) in [
        ("PROTO", "TCP".to_owned()),
        ("TCPREMOTEIP", client.ip().to_string()),
        ("TCPREMOTEPORT", client.port().to_string()),
        ("REMOTE_ADDR", client.ip().to_string()),
        ("REMOTE_PORT", client.port().to_string()),
        ("TCPLOCALIP", server.ip().to_string()),
        ("TCPLOCALPORT", server.port().to_string()),
    ] {
        assert_eq!(environment.get(name), Some(&value), "{name}");
    }
    let stray = ["REMOTE_HOST", "TCPREMOTEHOST", "TCPLOCALHOST"]
        .into_iter()
        .find(|name| environment.contains_key(*name));
    assert_eq!(stray, None);
    let line = session.wait_log(": session ");
    let fields = program::parse_session_line(&line, &client.to_string());
    assert_eq!(fields["proxy"], balancer, "{line}");
}

fn replaced(test: &Test, policy: &str, header: Header) {
    for (client, server) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
        let program = program(test).tls(policy).flag("--verbose");
        // What a superserver has said of the balancer.
        let program = program
            .env("REMOTE_HOST", "balancer.example")
            .env("TCPREMOTEHOST", "balancer.example")
            .env("TCPREMOTEIP", "127.0.0.1");
        let mut session = program.start();
        let balancer = session.peer.clone();
        session.client().send_raw(header(client, server));
        log_in(session.client(), policy);
        assert!(session.client().command("z LOGOUT").is_ok());
        assert_eq!(session.client().expect_end(), End::CloseNotify);
        assert_eq!(session.wait_as_last().code(), Some(0));
        assert_told(&session, client, server, &balancer);
        // Every line from then on.
        for line in session.log().lines() {
            assert!(line.starts_with(&format!("{client}: ")), "{line}");
        }
    }
}

fn in_one_segment(test: &Test, policy: &str) {
    for (_, header) in VERSIONS {
        let mut session = program(test).tls(policy).start();
        let balancer = session.peer.clone();
        let client = session.client();
        client.hold(header(CLIENT4, SERVER4));
        if policy == "implicit" {
            // With the ClientHello.
            log_in(client, policy);
        } else {
            client.send("a NOOP\r\nb CAPABILITY\r\n");
            client.greeting();
            assert!(client.reply("a").is_ok());
            assert!(client.reply("b").text().contains("STARTTLS"));
            client.starttls(pki());
            client.login();
        }
        session.close_client();
        assert_eq!(session.wait_code(), 0);
        assert_told(&session, CLIENT4, SERVER4, &balancer);
    }
}

fn byte_by_byte(test: &Test) {
    for (_, header) in VERSIONS {
        let program = program(test).option("--proxy-from", "unix");
        let mut session = program.start_on(Socket::Pair, Handover::Stdio, Stderr::Log);
        for byte in header(CLIENT6, SERVER6) {
            session.client().send_raw([byte]);
            session.client().wait_until_read();
        }
        log_in(session.client(), "required");
        session.close_client();
        session.wait_code();
        assert_told(&session, CLIENT6, SERVER6, "unix");
    }
}

fn two_pieces(test: &Test) {
    let program = program(test).option("--proxy-from", "unix");
    for (_, header) in VERSIONS {
        let header = header(CLIENT4, SERVER4);
        for cut in 1..header.len() {
            let mut session = program.start_on(Socket::Pair, Handover::Stdio, Stderr::Log);
            let client = session.client();
            client.send_raw(&header[..cut]);
            client.wait_until_read();
            client.send_raw([&header[cut..], b"a LOGOUT\r\n"].concat());
            client.greeting();
            assert!(client.reply("a").is_ok());
            session.close_client();
            assert_eq!(session.wait_code(), 0);
            session.peer = CLIENT4.to_owned();
            assert_eq!(session.session_line()["proxy"], "unix", "{cut}");
        }
    }
}

fn cut_off(test: &Test) {
    let program = program(test);
    for (version, header) in VERSIONS {
        let header = header(CLIENT4, SERVER4);
        for length in 1..header.len() {
            let mut session = program.start();
            session.client().send_raw(&header[..length]);
            session.close_client();
            assert_eq!(session.wait_as_last().code(), Some(0));
            let expected = format!(
                "{}: no PROXY header (--accept-proxy): it is cut off by the end of the connection\n",
                session.peer
            );
            assert_eq!(
                session.log(),
                expected,
                "version {version}, {length} octets"
            );
        }
    }
    assert!(test.record().is_empty());
}

/// Without addresses in it the client is served under the balancer's own.
fn local(test: &Test, policy: &str) {
    for header in LOCAL {
        let program = program(test).tls(policy).env("REMOTE_HOST", "kept.example");
        let mut session = program.start();
        session.client().send_raw(header);
        log_in(session.client(), policy);
        session.close_client();
        assert_eq!(session.wait_code(), 0);
        let line = session.session_line();
        assert!(!line.contains_key("proxy"), "{line:?}");
        let environment = test.record().backends().last().unwrap().environment();
        assert_eq!(environment["TCPREMOTEIP"], "127.0.0.1");
        assert_eq!(environment["REMOTE_HOST"], "kept.example");
    }
}

const LOCAL: &[&[u8]] = &[
    b"PROXY UNKNOWN\r\n",
    b"PROXY UNKNOWN ffff::1 ffff::2 65535 65535\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
    // The specification: "discard the protocol block including the family".
    b"\r\n\r\n\0\r\nQUIT\n\x20\x11\0\x04abcd",
    b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\0",
];

/// What a balancer does every second or two, to see whether we are there.
fn health_checks(test: &Test, policy: &str) {
    for check in [
        "close",
        "reset",
        "LOCAL and close",
        "UNKNOWN, a word and close",
    ] {
        for is_verbose in [false, true] {
            let mut program = program(test).tls(policy);
            if is_verbose {
                program = program.flag("--verbose");
            }
            let mut session = program.start();
            match check {
                "close" => {}
                "reset" => session.take_client().reset(),
                "LOCAL and close" => session.client().send_raw(LOCAL[2]),
                _ => {
                    session.client().send_raw(LOCAL[0]);
                    if policy != "implicit" {
                        session.client().greeting();
                    }
                }
            }
            session.close_client();
            assert_eq!(session.wait_as_last().code(), Some(0), "{check}");
            let log = session.log();
            assert_eq!(log.is_empty(), !is_verbose, "{check}: {log}");
        }
    }
}

fn off(test: &Test, policy: &str) {
    for (version, header) in VERSIONS {
        let mut session = Program::new(test).tls(policy).start();
        let client = session.client();
        client.send_raw(header(CLIENT4, SERVER4));
        if policy != "implicit" {
            client.greeting();
            if *version == 1 {
                // A command like any other, with PROXY for its tag, that does not exist.
                assert!(client.reply("PROXY").status().starts_with("BAD"));
            }
        }
        client.shutdown();
        client.read_to_end();
        session.close_client();
        assert_eq!(session.wait_code(), 0);
        // Checks that the line begins with the socket's address.
        let line = session.session_line();
        assert!(
            !line.contains_key("proxy") && line["tls"] == "none",
            "{line:?}"
        );
        assert!(!session.log().contains("192.0.2.7:4711: "));
    }
    for backend in test.record().backends() {
        assert_eq!(backend.environment()["TCPREMOTEIP"], "127.0.0.1");
    }
}

// ---- what is refused ----

#[rustfmt::skip] // A row is a line.
fn bad_headers() -> Vec<(&'static str, Vec<u8>)> {
    let text = |text: &str| text.as_bytes().to_vec();
    let tcp4 = |rest: &str| format!("PROXY TCP4 192.0.2.7 198.51.100.1 {rest}").into_bytes();
    let ipv4 = &v2(CLIENT4, SERVER4)[16..];
    vec![
        ("an HTTP request", text("GET / HTTP/1.1\r\nHost: mail\r\n\r\n")),
        ("a password", text("a LOGIN u hunter2-secret\r\n")),
        ("STARTTLS", text("a STARTTLS\r\n")),
        ("TLS", Client::client_hello(&TlsOffer::new(pki()))),
        ("lower case", text("proxy tcp4 192.0.2.7 198.51.100.1 4711 143\r\n")),
        ("a space before it", text(" PROXY UNKNOWN\r\n")),
        ("a line end before it", text("\r\nPROXY UNKNOWN\r\n")),
        ("zeroes", vec![0; 64]),
        ("0xff", vec![0xff; 64]),
        ("version 1: LF alone", tcp4("4711 143\n")),
        ("version 1: CR alone", tcp4("4711 143\r ")),
        ("version 1: two spaces", tcp4("4711  143\r\n")),
        ("version 1: a space at the end", tcp4("4711 143 \r\n")),
        ("version 1: a tabulator", tcp4("4711\t143\r\n")),
        ("version 1: one port", tcp4("4711\r\n")),
        ("version 1: three ports", tcp4("4711 143 144\r\n")),
        ("version 1: a port with a zero in front", tcp4("04711 143\r\n")),
        ("version 1: a port with a plus", tcp4("+4711 143\r\n")),
        ("version 1: a negative port", tcp4("-1 143\r\n")),
        ("version 1: port 65536", tcp4("65536 143\r\n")),
        ("version 1: a hexadecimal port", tcp4("0x12 143\r\n")),
        ("version 1: no ports", text("PROXY TCP4 192.0.2.7 198.51.100.1\r\n")),
        ("version 1: an octet with zeroes in front", text("PROXY TCP4 192.0.2.007 198.51.100.1 4711 143\r\n")),
        ("version 1: an octet of 256", text("PROXY TCP4 192.0.2.256 198.51.100.1 4711 143\r\n")),
        ("version 1: IPv6 as TCP4", text("PROXY TCP4 ::1 ::1 4711 143\r\n")),
        ("version 1: IPv4 as TCP6", text("PROXY TCP6 192.0.2.7 198.51.100.1 4711 143\r\n")),
        ("version 1: an address with a scope", text("PROXY TCP6 fe80::1%eth0 ::1 4711 143\r\n")),
        ("version 1: a host name", text("PROXY TCP4 client.example mail.example 4711 143\r\n")),
        ("version 1: UDP4", text("PROXY UDP4 192.0.2.7 198.51.100.1 4711 143\r\n")),
        ("version 1: UNKNOWN2", text("PROXY UNKNOWN2\r\n")),
        ("version 1: nothing", text("PROXY \r\n")),
        ("version 1: a zero octet in an address", text("PROXY TCP4 192.0.2.7\0 198.51.100.1 4711 143\r\n")),
        ("version 1: no ASCII", text("PROXY TCP4 ä 198.51.100.1 4711 143\r\n")),
        ("version 2: version 1", v2_raw(0x11, 0x11, ipv4)),
        ("version 2: version 3", v2_raw(0x31, 0x11, ipv4)),
        ("version 2: command 2", v2_raw(0x22, 0x11, ipv4)),
        ("version 2: command 15", v2_raw(0x2f, 0x11, ipv4)),
        ("version 2: addresses too short for IPv4", v2_raw(0x21, 0x11, &ipv4[..11])),
        ("version 2: addresses too short for IPv6", v2_raw(0x21, 0x21, ipv4)),
        ("version 2: no addresses", v2_raw(0x21, 0x11, &[])),
        ("version 2: datagrams", v2_raw(0x21, 0x12, ipv4)),
        ("version 2: family 4", v2_raw(0x21, 0x41, ipv4)),
        ("version 2: half a TLV", v2_with(CLIENT4, SERVER4, b"\x04\0")),
        ("version 2: a TLV beyond the end", v2_with(CLIENT4, SERVER4, b"\x20\xff\xff\x01")),
        ("version 2: too long", v2_with(CLIENT4, SERVER4, &[0; 4096])),
        ("version 2: LOCAL, too long", v2_raw(0x20, 0, &[0; 65535])),
        ("version 2: a signature that is not", b"\r\n\r\n\0\r\nQUIT\r\x21\x11\0\x0c123456789012".to_vec()),
        ("version 1: too long", format!("PROXY UNKNOWN {}\r\n", "x".repeat(100)).into_bytes()),
    ]
}

fn malformed(test: &Test) {
    let rows = bad_headers();
    assert!(rows.len() > 40);
    let mut wrong = Vec::new();
    for (name, header) in rows {
        let run = || {
            let mut session = program(test).start();
            session.client().try_send_raw(&header);
            // What it would have wanted next.
            session
                .client()
                .try_send_raw(b"b LOGIN u hunter2-secret\r\n");
            let (said, _) = session.client().read_to_end();
            assert!(said.is_empty(), "{said:?}");
            session.close_client();
            assert_eq!(session.wait_as_last().code(), Some(0));
            assert_one_line(&session, "no PROXY header (--accept-proxy): ");
        };
        if catch_unwind(AssertUnwindSafe(run)).is_err() {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(test.record().is_empty());
}

/// One short line that begins with the balancer's address, with no octet of what was sent.
fn assert_one_line(session: &Session, says: &str) {
    let log = session.log();
    let start = format!("{}: {says}", session.peer);
    assert!(log.starts_with(&start) && log.ends_with('\n'), "{log:?}");
    assert!(log.lines().count() == 1 && log.len() < 200, "{log:?}");
    assert!(
        !log.contains("hunter2") && !log.contains("forged"),
        "{log:?}"
    );
}

fn forging(test: &Test) {
    for header in [
        &b"PROXY TCP4 \n<3>forged: 198.51.100.1 4711 143\r\n"[..],
        b"PROXY TCP4 192.0.2.7\x1b[31mforged 198.51.100.1 4711 143\r\n",
        b"PROXY TCP6 forged:: ::1 4711 143\r\n",
        b"PROXY forged\r\n",
        b"forged: session policy=required\r\n",
    ] {
        let mut session = program(test).start();
        session.client().send_raw(header);
        session.client().read_to_end();
        session.close_client();
        session.wait();
        assert_one_line(&session, "no PROXY header (--accept-proxy): ");
    }
    // What is ignored is not shown either.
    let mut session = program(test).flag("--verbose").start();
    let client = session.client();
    client.send_raw("PROXY UNKNOWN \x1b[31mforged\r\na LOGOUT\r\n");
    client.greeting();
    assert!(client.reply("a").is_ok());
    session.close_client();
    session.wait();
    assert!(!session.log().contains("forged"), "{}", session.log());
}

fn endless(test: &Test) {
    const ENDLESS: usize = 64 << 20;
    for (start, again) in [
        ("PROXY TCP4 ", "1"),
        ("PROXY UNKNOWN ", "x"),
        ("PROXY UNKNOWN ", "\0"),
    ] {
        let mut session = program(test).start();
        let client = session.client();
        client.try_send_raw(start.as_bytes());
        let piece = again.repeat(1000);
        let mut sent = 0;
        // More than is thrown away in parting, and than the kernel keeps of what nobody has read yet.
        while sent < ENDLESS && client.try_send_raw(piece.as_bytes()) {
            sent += piece.len();
        }
        assert!(sent < ENDLESS, "{sent} octets were taken without end");
        session.close_client();
        assert_eq!(session.wait_as_last().code(), Some(0));
        assert_one_line(
            &session,
            "no PROXY header (--accept-proxy): it is longer than ",
        );
    }
}

fn slow(test: &Test) {
    for header in [&b""[..], b"PROXY TCP4 192", &v2(CLIENT4, SERVER4)[..20]] {
        let mut session = program(test).start();
        let started = Instant::now();
        session.client().send_raw(header);
        session.client().read_to_end();
        assert!((4..15).contains(&started.elapsed().as_secs()));
        session.close_client();
        assert_eq!(session.wait_as_last().code(), Some(0));
        assert_one_line(
            &session,
            "no PROXY header (--accept-proxy): it is not complete in time",
        );
    }
    // Each octet is in time, the whole is not.
    let mut session = program(test).start();
    let started = Instant::now();
    let header = v2_with(CLIENT4, SERVER4, &[4; 512]);
    let mut octets = header.iter();
    while session.client().is_quiet_for(Duration::from_millis(100)) {
        session.client().try_send_raw(&[*octets.next().unwrap()]);
    }
    assert!((4..15).contains(&started.elapsed().as_secs()));
    session.close_client();
    assert_eq!(session.wait_as_last().code(), Some(0));
    assert_one_line(
        &session,
        "no PROXY header (--accept-proxy): it is not complete in time",
    );
}

fn quiet(test: &Test) {
    // The administrator has something to mend, so --quiet has it, too; a stranger's visit is no fault.
    let quiet = program(test).flag("--quiet");
    let mut session = quiet.start();
    session.client().send_raw("a NOOP\r\na NOOP\r\n");
    session.client().read_to_end();
    session.close_client();
    assert_eq!(session.wait_as_last().code(), Some(0));
    assert_one_line(&session, "no PROXY header (--accept-proxy): there is none");
    let mut session = quiet.option("--proxy-from", "192.0.2.1").start();
    session.client().read_to_end();
    session.close_client();
    assert_eq!(
        (session.wait_as_last().code(), session.log()),
        (Some(0), String::new())
    );
}

fn stranger(test: &Test) {
    for policy in ["required", "optional", "implicit"] {
        let program = program(test)
            .tls(policy)
            .option("--proxy-from", "192.0.2.1");
        for header in [
            v1(CLIENT4, SERVER4),
            v2(CLIENT4, SERVER4),
            LOCAL[2].to_vec(),
            Vec::new(),
        ] {
            let mut session = program.start();
            session.client().try_send_raw(&header);
            let (said, _) = session.client().read_to_end();
            assert!(said.is_empty(), "{said:?}");
            session.close_client();
            assert_eq!(session.wait_as_last().code(), Some(0));
            assert_one_line(
                &session,
                "refused: not among the balancers (--proxy-from)\n",
            );
        }
    }
    assert!(test.record().is_empty());
}

/// Whether the balancer on this kind of socket is taken for one.
fn is_taken(program: &Program, socket: Socket) -> bool {
    let mut session = program.start_on(socket, Handover::Stdio, Stderr::Log);
    let client = session.client();
    client.try_send_raw(&[v1(CLIENT4, SERVER4), b"a LOGOUT\r\n".to_vec()].concat());
    let (said, _) = client.read_to_end();
    session.close_client();
    assert_eq!(session.wait_code(), 0);
    let is_taken = said.starts_with(b"* OK");
    assert_eq!(
        is_taken,
        session.log().starts_with(CLIENT4),
        "{}",
        session.log()
    );
    is_taken
}

fn prefixes(test: &Test) {
    for (senders, socket, expected) in [
        ("127.0.0.1", Socket::Tcp4, true),
        ("127.0.0.1", Socket::MappedTcp4, true),
        ("127.0.0.1", Socket::Tcp6, false),
        ("127.0.0.0/31", Socket::Tcp4, true),
        ("127.0.0.0/32", Socket::Tcp4, false),
        ("127.0.0.2/31", Socket::Tcp4, false),
        ("127.0.0.0/8", Socket::Tcp4, true),
        ("126.0.0.0/7", Socket::Tcp4, true),
        ("128.0.0.0/1", Socket::Tcp4, false),
        ("0.0.0.0/0", Socket::Tcp4, true),
        ("0.0.0.0/0", Socket::Tcp6, false),
        ("::/0", Socket::Tcp4, false),
        ("::/0", Socket::Tcp6, true),
        ("::1", Socket::Tcp6, true),
        ("::/127", Socket::Tcp6, true),
        ("::2/127", Socket::Tcp6, false),
        ("::ffff:127.0.0.0/104", Socket::Tcp4, true),
        ("192.0.2.1 2001:db8::/32 127.0.0.1", Socket::Tcp4, true),
        ("192.0.2.1 2001:db8::/32 127.0.0.1", Socket::Tcp6, false),
        ("unix", Socket::Tcp4, false),
        ("unix ::1", Socket::Tcp6, true),
    ] {
        let program = program(test);
        let by_option = program.clone().option("--proxy-from", senders);
        assert_eq!(
            is_taken(&by_option, socket),
            expected,
            "{senders} {socket:?}"
        );
        let by_variables = Program::new(test)
            .env("IMAP_TLS_ACCEPT_PROXY", "yes")
            .env("IMAP_TLS_PROXY_FROM", senders);
        assert_eq!(
            is_taken(&by_variables, socket),
            expected,
            "{senders} {socket:?}"
        );
    }
    let repeated = program(test).option("--proxy-from", "192.0.2.1");
    assert!(is_taken(
        &repeated.also("--proxy-from", "127.0.0.1"),
        Socket::Tcp4
    ));
}

fn unix(test: &Test) {
    for socket in [Socket::Unix, Socket::Pair, Socket::Pipes] {
        assert!(!is_taken(&program(test), socket));
        assert!(!is_taken(
            &program(test).option("--proxy-from", "0.0.0.0/0 ::/0"),
            socket
        ));
        let program = program(test).option("--proxy-from", "unix");
        for (_, header) in VERSIONS {
            let mut session = program.start_on(socket, Handover::Stdio, Stderr::Log);
            let balancer = session.peer.clone();
            session.client().send_raw(header(CLIENT6, SERVER6));
            log_in(session.client(), "required");
            session.close_client();
            assert_eq!(session.wait_code(), 0);
            assert_told(&session, CLIENT6, SERVER6, &balancer);
        }
    }
    // The descriptor in LISTEN_FDS, too.
    let program = program(test).option("--proxy-from", "unix");
    let mut session = program.start_on(Socket::Unix, Handover::ListenFd, Stderr::Log);
    session.client().send_raw(v2(CLIENT4, SERVER4));
    log_in(session.client(), "required");
    session.close_client();
    session.wait();
    assert_told(&session, CLIENT4, SERVER4, "unix");
}

/// It waits for the header with nothing left to lose, and what is told to the privileged launcher is of fixed size.
fn in_the_sandbox(test: &Test) {
    let mut session = program(test).start();
    // It waits for the signals and the keeper in another order before; what it waits for now is a header.
    let network = session.wait_idle();
    eventually("the network process is confined", || {
        (network.status().field("Seccomp") == "2").then_some(())
    });
    let header = v1(CLIENT4, SERVER4);
    session.client().send_raw(&header[..20]);
    let status = network.status();
    assert_eq!(status.numbers("Uid"), [NETWORK_ID; 4]);
    assert_eq!(status.field("NoNewPrivs"), "1");
    assert_eq!(
        status.mask("CapEff") | status.mask("CapPrm") | status.mask("CapBnd"),
        0
    );
    assert!(test.record().is_empty());
    session.client().send_raw(&header[20..]);
    log_in(session.client(), "required");
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

fn tls_of_the_balancer(test: &Test) {
    // PP2_TYPE_SSL: TLS 1.3 with a client certificate of root's, verified; authority; ALPN.
    let mut tls = vec![0x07, 0, 0, 0, 0];
    tls.extend(b"\x21\0\x07TLSv1.3\x22\0\x04root\x23\0\x16TLS_AES_128_GCM_SHA256");
    let mut tlvs = vec![0x20, 0, u8::try_from(tls.len()).unwrap()];
    tlvs.extend(tls);
    tlvs.extend(b"\x02\0\x0bevil.server\x01\0\x04smtp");
    for policy in ["required", "optional"] {
        let mut session = program(test).tls(policy).start();
        let balancer = session.peer.clone();
        let client = session.client();
        client.send_raw(v2_with(CLIENT4, SERVER4, &tlvs));
        client.greeting();
        // Nothing about this connection is secure yet.
        let reply = client.command("a CAPABILITY").text();
        assert!(reply.contains("STARTTLS"), "{reply}");
        assert_eq!(
            client.command("b LOGIN u sekret").is_ok(),
            policy == "optional"
        );
        if policy == "required" {
            client.starttls(pki());
            client.login();
        }
        let environment = test.record().backends().last().unwrap().environment();
        assert_eq!(
            environment.contains_key("SSL_PROTOCOL"),
            policy == "required"
        );
        assert_ne!(
            environment.get("SSL_CLIENT_S_DN_CN").map(String::as_str),
            Some("root")
        );
        assert!(!format!("{environment:?}").contains("evil.server"));
        session.close_client();
        session.wait();
        assert_told(&session, CLIENT4, SERVER4, &balancer);
        assert!(!session.log().contains("evil.server"));
    }
}

fn mapped(test: &Test) {
    for (_, header) in VERSIONS {
        let mut session = program(test).start();
        let balancer = session.peer.clone();
        let (client, server) = ("[::ffff:192.0.2.7]:4711", "[::ffff:198.51.100.1]:143");
        session.client().send_raw(header(client, server));
        log_in(session.client(), "required");
        session.close_client();
        session.wait();
        assert_told(&session, CLIENT4, SERVER4, &balancer);
    }
}

fn login_timeout(test: &Test) {
    let program = program(test).option("--login-timeout", "5");
    let mut session = program.start();
    let started = Instant::now();
    let client = session.client();
    assert!(client.is_quiet_for(Duration::from_millis(3500)));
    client.send_raw(v1(CLIENT4, SERVER4));
    client.greeting();
    client.read_until("* BYE too long without login\r\n");
    // Without the time for the header it were 8.5 s.
    let elapsed = started.elapsed();
    assert!(elapsed < Duration::from_millis(8000), "{elapsed:?}");
    session.close_client();
    session.wait();
    // And the header itself may not take longer than that.
    let mut session = program.option("--login-timeout", "1").start();
    let started = Instant::now();
    session.client().read_to_end();
    assert!(started.elapsed() < Duration::from_secs(4));
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

/// The launcher was forked before the header came, and is told.
fn launcher_log(test: &Test) {
    let backend = test.path("backend.sh");
    write_file(&backend, "#!/no/such/interpreter\n", 0o755);
    let mut session = program(test).backend([backend.to_str().unwrap()]).start();
    let client = session.client();
    client.send_raw(v1(CLIENT4, SERVER4));
    client.greeting();
    client.starttls(pki());
    client.read_to_end();
    session.close_client();
    assert_eq!(session.wait_code(), 100);
    let line = session.wait_log("cannot execute");
    assert!(line.starts_with(&format!("{CLIENT4}: ")), "{line}");
}

// ---- others around it ----

fn superserver(test: &Test, kind: Superserver) {
    let server = Server::start(test, kind, &program(test));
    for (_, header) in VERSIONS {
        for (client, address) in [(CLIENT4, SERVER4), (CLIENT6, SERVER6)] {
            let mut connection = server.connect();
            connection.send_raw(header(client, address));
            connection.log_in_by_starttls(pki());
            assert!(connection.command("z LOGOUT").is_ok());
            assert_eq!(connection.expect_end(), End::CloseNotify);
            let environment = test.record().backends().last().unwrap().environment();
            let client: SocketAddr = client.parse().unwrap();
            assert_eq!(environment["TCPREMOTEIP"], client.ip().to_string());
            assert_eq!(environment["REMOTE_PORT"], client.port().to_string());
            // xinetd's, and what tcpserver might have looked up.
            let text = format!("{environment:?}");
            assert!(!environment.contains_key("REMOTE_HOST"), "{text}");
            assert!(!environment.contains_key("TCPLOCALHOST"), "{text}");
        }
    }
    if !kind.stderr_is_client() {
        let line = server.wait_log(&format!("{CLIENT6}: session "));
        assert!(line.contains(" proxy=127.0.0.1:"), "{line}");
    }
    // And without: nothing, not even a greeting.
    let mut connection = server.connect();
    connection.send_raw("a NOOP\r\nb NOOP\r\n");
    let (said, _) = connection.read_to_end();
    assert!(said.is_empty(), "{said:?}");
    eventually("the connections' processes are gone", || {
        server.sessions().is_empty().then_some(())
    });
}

/// The program as the listener, on a port of 127.0.0.1.
fn listen(test: &Test, program: &Program) -> (tool::Running, u16) {
    let port = free_port();
    let line = program
        .clone()
        .option("--listen", format!("127.0.0.1:{port}"))
        .command_line();
    let mut running = Tool::new(test, line[0].to_str().unwrap())
        .args(&line[1..])
        .env(MARKER, test.marker())
        .start();
    eventually("the listener is ready", || {
        assert!(!running.has_ended(), "{}", running.log());
        running.log().contains("listening on").then_some(())
    });
    (running, port)
}

/// Its limit for a source is for clients, not for the balancer from which all of them come.
fn listener(test: &Test) {
    let program = program(test).option("--max-per-source", "2");
    let (running, port) = listen(test, &program);
    let connect = |address: &str| {
        let socket = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut client = Client::on(socket);
        client.send_raw(v2(address, SERVER4));
        let greeting = client.line();
        (client, greeting)
    };
    let mut clients = Vec::new();
    // Two of each of five sources, though all are the balancer's.
    for number in 1..=5 {
        for port in [1000, 1001] {
            let (mut client, greeting) = connect(&format!("192.0.2.{number}:{port}"));
            assert!(greeting.starts_with("* OK"), "{greeting}");
            client.starttls(pki());
            client.login();
            clients.push(client);
        }
    }
    let (_, refusal) = connect("192.0.2.3:1002");
    assert!(refusal.starts_with("* BYE [UNAVAILABLE]"), "{refusal}");
    let mut leaving = clients.remove(4);
    assert!(leaving.command("z LOGOUT").is_ok());
    assert_eq!(leaving.expect_end(), End::CloseNotify);
    // As soon as its process is gone.
    eventually("there is room again", || {
        connect("192.0.2.3:1003")
            .1
            .starts_with("* OK")
            .then_some(())
    });
    let line = eventually("the session line", || {
        let log = running.log();
        let mut lines = log.lines().map(str::to_owned);
        lines.find(|line| line.starts_with("192.0.2.3:1000: session "))
    });
    assert!(line.contains(" proxy=127.0.0.1:"), "{line}");
    drop(clients);
}

/// And whoever is no balancer gets nothing from it either.
fn listener_strangers(test: &Test) {
    let program = program(test).option("--proxy-from", "192.0.2.1");
    let (running, port) = listen(test, &program);
    let mut client = Client::on(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
    client.try_send_raw(&v1(CLIENT4, SERVER4));
    let (said, _) = client.read_to_end();
    assert!(said.is_empty(), "{said:?}");
    eventually("the refusal is logged", || {
        let log = running.log();
        log.contains(": refused: not among the balancers (--proxy-from)")
            .then_some(())
    });
    assert!(test.record().is_empty());
}

fn check(test: &Test) {
    let report = |program: Program| program.flag("--check").run().stdout;
    let text = String::from_utf8(report(
        program(test).option("--proxy-from", "192.0.2.0/24 unix"),
    ))
    .unwrap();
    let expected =
        "ok: balancer: a PROXY header must come, from 192.0.2.0/24, unix; nobody else is served\n";
    assert!(text.contains(expected), "{text}");
    let text = String::from_utf8(report(program(test).option("--proxy-from", "::/0"))).unwrap();
    assert!(
        text.contains("warning: balancer: --proxy-from ::/0 is everybody"),
        "{text}"
    );
    let text = String::from_utf8(report(Program::new(test))).unwrap();
    assert!(!text.contains("balancer"), "{text}");
}

/// HAProxy in the foreground, with one IPv4 and one IPv6 port in front of a server.
struct HaProxy {
    running: tool::Running,
    ports: [u16; 2],
}

impl HaProxy {
    fn start(test: &Test, server: &Server, options: &str, backend: &str) -> Self {
        let ports = [free_port(), free_port()];
        let mut config = "global\n log stdout format raw local0\n maxconn 100\n\
            defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n timeout check 5s\n log global\n"
            .to_owned();
        write!(
            config,
            "listen mail\n bind 127.0.0.1:{}\n bind ::1:{}\n{backend} server one 127.0.0.1:{} {options}\n",
            ports[0], ports[1], server.port
        )
        .unwrap();
        let path = test.path("haproxy.cfg");
        write_file(&path, config, 0o644);
        let tool = Tool::new(test, "haproxy").args(["-db", "-f", path.to_str().unwrap()]);
        let running = tool.start();
        eventually("HAProxy listens", || {
            std::fs::read_to_string("/proc/net/tcp")
                .unwrap()
                .contains(&format!(":{:04X} 00000000:0000 0A", ports[0]))
                .then_some(())
        });
        Self { running, ports }
    }
}

fn haproxy(test: &Test, options: &str) {
    let server = Server::start(test, Superserver::Tcpserver, &program(test));
    let haproxy = HaProxy::start(test, &server, options, "");
    for address in [
        SocketAddr::from(([127, 0, 0, 1], haproxy.ports[0])),
        SocketAddr::new("::1".parse().unwrap(), haproxy.ports[1]),
    ] {
        let socket = std::net::TcpStream::connect(address).unwrap();
        socket.set_nodelay(true).unwrap();
        let own = socket.local_addr().unwrap();
        let mut client = Client::on(socket);
        client.log_in_by_starttls(pki());
        assert!(client.command("z LOGOUT").is_ok());
        assert_eq!(client.expect_end(), End::CloseNotify);
        let environment = test.record().backends().last().unwrap().environment();
        assert_eq!(environment["TCPREMOTEIP"], own.ip().to_string());
        assert_eq!(environment["TCPREMOTEPORT"], own.port().to_string());
        assert_eq!(environment["TCPLOCALIP"], address.ip().to_string());
        assert_eq!(environment["TCPLOCALPORT"], address.port().to_string());
        let line = server.wait_log(&format!("{own}: session "));
        assert!(line.contains(" proxy=127.0.0.1:"), "{line}");
    }
    drop(haproxy);
}

/// What the administrator writes, after `send-proxy-v2` on the server's line and above it.
const CHECKS: &[(&str, (&str, &str))] = &[
    (
        "a connection that it closes at once",
        ("check inter 100ms", ""),
    ),
    (
        "a header of its own",
        ("check inter 100ms check-send-proxy", ""),
    ),
    (
        "a greeting that it waits for",
        (
            "check inter 100ms",
            " option tcp-check\n tcp-check connect send-proxy\n tcp-check expect string \"* OK\"\n",
        ),
    ),
];

fn haproxy_check(test: &Test, (options, backend): &(&str, &str)) {
    let server = Server::start(test, Superserver::Tcpserver, &program(test));
    let haproxy = HaProxy::start(test, &server, &format!("send-proxy-v2 {options}"), backend);
    // tcpserver's own lines: each check is a connection.
    eventually("HAProxy has checked often", || {
        (server.log().matches("tcpserver: ok ").count() >= 10).then_some(())
    });
    let log = haproxy.running.log();
    assert!(!log.contains("is DOWN"), "{log}");
    let socket = std::net::TcpStream::connect(("127.0.0.1", haproxy.ports[0])).unwrap();
    let own = socket.local_addr().unwrap();
    let mut client = Client::on(socket);
    client.log_in_by_starttls(pki());
    assert!(client.command("z LOGOUT").is_ok());
    client.expect_end();
    server.wait_log(&format!("{own}: session "));
    drop(haproxy);
    // Nothing was said but about that client.
    let ours: Vec<String> = server
        .log()
        .lines()
        .filter(|line| !line.starts_with("tcpserver: "))
        .map(str::to_owned)
        .collect();
    assert!(
        ours.iter().all(|line| line.starts_with(&own.to_string())),
        "{ours:#?}"
    );
    assert_eq!(ours.len(), 1, "{ours:#?}");
}
