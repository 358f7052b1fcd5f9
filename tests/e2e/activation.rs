//! What a superserver hands over: real ones, and every kind of socket and descriptor that one could leave us with.

use crate::harness::*;
use libtest_mimic::Trial;

const SUPERSERVERS: [(&str, Superserver); 7] = [
    ("tcpserver", Superserver::Tcpserver),
    ("xinetd", Superserver::Xinetd),
    ("openbsd-inetd", Superserver::OpenbsdInetd),
    ("systemd-socket-activate --inetd", Superserver::SystemdInetd),
    ("systemd-socket-activate", Superserver::SystemdListenFds),
    ("its own listener", Superserver::Listener),
    (
        "its own listener, with systemd-socket-activate's socket",
        Superserver::SystemdListener,
    ),
];

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for (name, kind) in SUPERSERVERS {
        let needs = needs_of(kind);
        tests.push(test(
            &format!("activation: under {name} mail is read by STARTTLS"),
            needs,
            move |test| under_superserver(test, kind),
        ));
        tests.push(test(
            &format!("activation: under {name} mail is read by implicit TLS"),
            needs,
            move |test| implicit_under_superserver(test, kind),
        ));
        if kind.is_listener() {
            // Without a set-up it does not even begin to listen: see listener.rs.
            continue;
        }
        tests.push(test(
            &format!(
                "activation: under {name} a set-up fault gives the client BYE and nothing else"
            ),
            needs,
            move |test| fault_under_superserver(test, kind),
        ));
    }
    for (name, socket, needs) in SOCKETS {
        tests.push(test(
            &format!("activation: {name} on descriptors 0 and 1"),
            needs,
            move |test| on(test, socket, Handover::Stdio, Stderr::Log),
        ));
        if socket != Socket::Pipes {
            tests.push(test(
                &format!("activation: {name} in LISTEN_FDS"),
                needs,
                move |test| on(test, socket, Handover::ListenFd, Stderr::Log),
            ));
        }
    }
    tests.push(test(
        "activation: under inetd the session line goes to syslog",
        needs_of(Superserver::OpenbsdInetd),
        syslog,
    ));
    tests.extend([
        test("activation: a socket in LISTEN_FDS with descriptors 0, 1 and 2 closed", &[], |test| on(test, Socket::Tcp4, Handover::ListenFdOnly, Stderr::Closed)),
        test("activation: descriptor 2 closed", &[], |test| on(test, Socket::Tcp4, Handover::Stdio, Stderr::Closed)),
        test("activation: descriptor 2 is /dev/null", &[], |test| on(test, Socket::Tcp4, Handover::Stdio, Stderr::Null)),
        test("activation: descriptor 2 is the client's socket", &[], |test| on(test, Socket::Tcp4, Handover::Stdio, Stderr::Client)),
        test("activation: descriptor 2 is the client's pipe", &[], |test| on(test, Socket::Pipes, Handover::Stdio, Stderr::Client)),
        test("activation: descriptor 2 is the client's socket, which is in LISTEN_FDS", &[], |test| on(test, Socket::Tcp4, Handover::ListenFd, Stderr::Client)),
        test("activation: with the client's socket on descriptor 2 nothing but protocol is on it", &[], nothing_but_protocol),
        test("activation: with the client's socket on descriptor 2 a failed handshake is not explained on it", &[], failed_handshake_is_silent),
        test("activation: with the client's socket on descriptor 2 a wrong option is not explained on it", &[], usage_error_is_silent),
        test("activation: a TCP client's addresses are in the backend's environment", &[], |test| addresses(test, Socket::Tcp4, "127.0.0.1")),
        test("activation: an IPv6 client's addresses are in the backend's environment", &[Need::Ipv6], |test| addresses(test, Socket::Tcp6, "::1")),
        test("activation: an IPv4-mapped client's addresses are given as IPv4", &[Need::Ipv6], |test| addresses(test, Socket::MappedTcp4, "127.0.0.1")),
        test("activation: a unix-socket client has no addresses", &[], no_addresses),
        test("activation: ignored and blocked signals of the superserver do no harm", &[], careless_superserver),
        test("activation: the client's socket, which the superserver may share, stays blocking", &[Need::Root], stays_blocking),
        test("activation: a client that has gone before the start is an ordinary end", &[], gone_before_start),
        test("activation: a TCP client that has reset before the start is not taken for one on a unix socket", &[], reset_before_start),
    ]);
    tests
}

const SOCKETS: [(&str, Socket, &[Need]); 6] = [
    ("an IPv4 socket", Socket::Tcp4, &[]),
    ("an IPv6 socket", Socket::Tcp6, &[Need::Ipv6]),
    (
        "an IPv4 client of an IPv6 socket",
        Socket::MappedTcp4,
        &[Need::Ipv6],
    ),
    ("a unix socket", Socket::Unix, &[]),
    ("a socketpair", Socket::Pair, &[]),
    ("a pair of pipes", Socket::Pipes, &[]),
];

fn needs_of(kind: Superserver) -> &'static [Need] {
    const fn command(kind: Superserver) -> Need {
        let (name, package) = kind.command();
        Need::Command(name, package)
    }
    match kind {
        Superserver::Tcpserver => const { &[command(Superserver::Tcpserver)] },
        // Their configuration names root as the user.
        Superserver::Xinetd => const { &[Need::Root, command(Superserver::Xinetd)] },
        Superserver::OpenbsdInetd => const { &[Need::Root, command(Superserver::OpenbsdInetd)] },
        Superserver::SystemdInetd => const { &[command(Superserver::SystemdInetd)] },
        Superserver::SystemdListenFds => const { &[command(Superserver::SystemdListenFds)] },
        Superserver::SystemdListener => const { &[command(Superserver::SystemdListener)] },
        Superserver::Listener => &[],
    }
}

/// Inside TLS: log in, read the message, log out, and a clean end.
fn read_mail(client: &mut Client) {
    client.login();
    assert!(client.command("s SELECT INBOX").text().contains("1 EXISTS"));
    assert!(
        client
            .command("f FETCH 1 BODY[]")
            .text()
            .contains("hello-body")
    );
    let reply = client.command("z LOGOUT");
    assert!(reply.is_ok() && reply.text().contains("* BYE"), "{reply:?}");
    assert_eq!(client.expect_end(), End::CloseNotify);
}

fn under_superserver(test: &Test, kind: Superserver) {
    let server = Server::start(test, kind, &Program::new(test));
    // Twice, the second beside the first.
    let mut clients = [server.connect(), server.connect()];
    for client in &mut clients {
        assert!(client.greeting().contains("STARTTLS"));
    }
    for client in &mut clients {
        client.starttls(Pki::of(Key::P256));
        read_mail(client);
    }
    assert_eq!(test.record().backends().len(), 2);
    if !kind.stderr_is_client() {
        let line = server.wait_log(": session ");
        assert!(
            line.contains("tls=TLSv1.3") && line.contains("127.0.0.1:"),
            "{line}"
        );
    }
    let environment = test.record().backend(0).environment();
    assert_eq!(environment["TCPREMOTEIP"], "127.0.0.1");
    assert_eq!(environment["TCPLOCALPORT"], server.port.to_string());
    assert!(
        !environment.contains_key("LISTEN_FDS") && !environment.contains_key("LISTEN_PID"),
        "{environment:?}"
    );
    eventually("the connections' processes are gone", || {
        server.sessions().is_empty().then_some(())
    });
}

fn implicit_under_superserver(test: &Test, kind: Superserver) {
    let server = Server::start(test, kind, &Program::new(test).tls("implicit"));
    let mut client = server.connect();
    client
        .handshake(&TlsOffer::new(Pki::of(Key::P256)))
        .unwrap();
    client.greeting();
    read_mail(&mut client);
}

fn fault_under_superserver(test: &Test, kind: Superserver) {
    let program = Program::new(test).option("--key", test.path("no-such-key.pem"));
    let server = Server::start(test, kind, &program);
    let (bytes, end) = server.connect().read_to_end();
    let text = String::from_utf8_lossy(&bytes);
    assert!(
        text.starts_with("* BYE [UNAVAILABLE]")
            && text.ends_with("\r\n")
            && text.lines().count() == 1,
        "{text:?}"
    );
    assert_eq!(end, End::Eof);
    assert!(test.record().is_empty());
    if !kind.stderr_is_client() {
        assert!(server.wait_log("--key").contains("no-such-key.pem"));
    }
}

fn on(test: &Test, socket: Socket, handover: Handover, stderr: Stderr) {
    let mut session = Program::new(test).start_on(socket, handover, stderr);
    let client = session.client();
    client.greeting();
    client.starttls(Pki::of(Key::P256));
    read_mail(client);
    assert_eq!(session.wait_as_last().code(), Some(0));
    if stderr == Stderr::Log {
        let line = session.session_line();
        assert_eq!(
            (
                line["policy"].as_str(),
                line["tls"].as_str(),
                line["end"].as_str()
            ),
            ("required", "TLSv1.3", "backend ended")
        );
    }
    let descriptors = test.record().backend(0).descriptors();
    assert_eq!(
        descriptors.keys().copied().collect::<Vec<_>>(),
        [0, 1, 2],
        "{descriptors:?}"
    );
    assert!(
        descriptors[&0].starts_with("socket:") && descriptors[&0] == descriptors[&1],
        "{descriptors:?}"
    );
    assert_ne!(
        descriptors[&2], descriptors[&0],
        "the backend's errors must not go to its IMAP stream"
    );
    let wanted = if stderr == Stderr::Log {
        test.dir().to_str().unwrap()
    } else {
        "/dev/null"
    };
    assert!(descriptors[&2].starts_with(wanted), "{descriptors:?}");
}

/// Every byte outside TLS is one of the lines that IMAP wants there, although everything that can is made to log: the
/// program by `--verbose`, the backend by writing to its descriptor 2.
fn nothing_but_protocol(test: &Test) {
    let program =
        Program::new(test).play(&Backend::imap().with(&["--stderr", "the backend complains"]));
    let mut session =
        program
            .flag("--verbose")
            .start_on(Socket::Tcp4, Handover::Stdio, Stderr::Client);
    let client = session.client();
    client.greeting();
    let reply = client.command("a NOOP");
    assert_eq!(reply.lines.len(), 1, "{reply:?}");
    client.starttls(Pki::of(Key::P256));
    client.login();
    let reply = client.command("b XSTDERR more complaints");
    assert_eq!(reply.lines, ["b OK XSTDERR done"]);
    client.command("c LOGOUT");
    // A log line in the clear would be a broken record here.
    assert_eq!(client.expect_end(), End::CloseNotify);
    assert_eq!(session.wait_code(), 0);
}

fn failed_handshake_is_silent(test: &Test) {
    let mut session = Program::new(test).flag("--verbose").start_on(
        Socket::Tcp4,
        Handover::Stdio,
        Stderr::Client,
    );
    let client = session.client();
    client.greeting();
    assert!(client.command("a STARTTLS").is_ok());
    client.send_raw("this is no ClientHello\r\n");
    let (bytes, _) = client.read_to_end();
    // At most one alert record: type 21, version, length 2.
    assert!(
        bytes.is_empty() || bytes.len() == 7 && bytes[0] == 21,
        "{:?}",
        String::from_utf8_lossy(&bytes)
    );
    assert_eq!(session.wait_code(), 0);
    assert!(test.record().is_empty());
}

fn usage_error_is_silent(test: &Test) {
    let mut session = Program::new(test).flag("--no-such-option").start_on(
        Socket::Tcp4,
        Handover::Stdio,
        Stderr::Client,
    );
    let (bytes, _) = session.client().read_to_end();
    let text = String::from_utf8_lossy(&bytes);
    // A client of either port may be told goodbye in IMAP, or nothing.
    assert!(
        text.is_empty() || text.starts_with("* BYE ") && text.lines().count() == 1,
        "{text:?}"
    );
    assert_eq!(session.wait_code(), 100);
}

fn addresses(test: &Test, socket: Socket, ip: &str) {
    // What the superserver or an attacker had set before does not count.
    let program = Program::new(test)
        .env("TCPREMOTEIP", "192.0.2.99")
        .env("REMOTE_HOST", "name.example")
        .env("TCPREMOTEINFO", "smuggled");
    let mut session = program.start_on(socket, Handover::Stdio, Stderr::Log);
    session.client().log_in_by_starttls(Pki::of(Key::P256));
    let environment = test.record().backend(0).environment();
    let port = session.peer.rsplit(':').next().unwrap().to_owned();
    for (name, value) in [
        ("PROTO", "TCP"),
        ("TCPREMOTEIP", ip),
        ("TCPLOCALIP", ip),
        ("REMOTE_ADDR", ip),
        ("TCPREMOTEPORT", &port),
        ("REMOTE_PORT", &port),
        ("REMOTE_HOST", "name.example"),
    ] {
        assert_eq!(
            environment.get(name).map(String::as_str),
            Some(value),
            "{name} in {environment:?}"
        );
    }
    assert!(environment["TCPLOCALPORT"].parse::<u16>().is_ok());
    assert!(!environment.contains_key("TCPREMOTEINFO"));
    session.close_client();
    session.wait();
    // Checks that the line begins with the client's address.
    session.session_line();
}

fn no_addresses(test: &Test) {
    let mut session = Program::new(test).start_on(Socket::Unix, Handover::Stdio, Stderr::Log);
    session.client().log_in_by_starttls(Pki::of(Key::P256));
    let environment = test.record().backend(0).environment();
    let stray: Vec<_> = environment
        .keys()
        .filter(|name| name.starts_with("TCP") || name.starts_with("REMOTE_"))
        .collect();
    assert!(stray.is_empty(), "{stray:?}");
}

fn careless_superserver(test: &Test) {
    let mut program = Program::new(test);
    for signal in [libc::SIGCHLD, libc::SIGPIPE, libc::SIGHUP, libc::SIGTERM] {
        program = program.ignoring(signal);
    }
    for signal in [libc::SIGCHLD, libc::SIGALRM, libc::SIGUSR1] {
        program = program.blocking(signal);
    }
    let mut session = program.start();
    let client = session.client();
    client.log_in_by_starttls(Pki::of(Key::P256));
    client.send("x XEXIT 7\r\n");
    assert_eq!(client.expect_end(), End::CloseNotify);
    assert_eq!(session.wait_as_last().code(), Some(7));
    let status = test.record().backend(0).status();
    assert_eq!(
        (status.mask("SigBlk"), status.ignored_signals()),
        (0, 0),
        "the backend starts with default signals"
    );
}

fn gone_before_start(test: &Test) {
    for socket in [Socket::Tcp4, Socket::Pair, Socket::Pipes] {
        let mut session = Program::new(test).start_on(socket, Handover::Stdio, Stderr::Log);
        session.close_client();
        assert_eq!(
            session.wait_as_last().code(),
            Some(0),
            "{socket:?}: {}",
            session.log()
        );
    }
    assert!(test.record().is_empty());
}

/// The system does not know its address any more.
fn reset_before_start(test: &Test) {
    for handover in [Handover::Stdio, Handover::ListenFd] {
        let mut session = Program::new(test).start_on(Socket::ResetTcp4, handover, Stderr::Log);
        assert_eq!(session.wait_as_last().code(), Some(0), "{}", session.log());
        let line = session.session_line();
        assert_eq!(line["end"], "client gone: Connection reset by peer");
    }
    assert!(test.record().is_empty());
}

/// Non-blocking mode belongs to the open file, which the superserver's own descriptor shares.
fn stays_blocking(test: &Test) {
    for socket in [Socket::Tcp4, Socket::Pipes] {
        let mut session = Program::new(test).start_on(socket, Handover::Stdio, Stderr::Log);
        let server_side = session.initial_descriptors().clone();
        session.client().log_in_by_starttls(Pki::of(Key::P256));
        let network = session.wait_idle();
        let shared = network
            .descriptors()
            .into_iter()
            .filter(|(_, target)| server_side.contains(target));
        let numbers: Vec<i32> = shared.map(|(number, _)| number).collect();
        assert!(!numbers.is_empty());
        for number in numbers {
            let info =
                std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", network.0)).unwrap();
            let flags = info
                .lines()
                .find_map(|line| line.strip_prefix("flags:"))
                .unwrap();
            let flags = i32::from_str_radix(flags.trim(), 8).unwrap();
            assert_eq!(
                flags & libc::O_NONBLOCK,
                0,
                "{socket:?}: descriptor {number} has flags {flags:o}"
            );
        }
    }
}

/// Under inetd standard error is the client's socket, so lines go to the system log: here a socket of the test's own, bound to
/// /dev/log in a mount namespace.
fn syslog(test: &Test) {
    let path = test.path("log.sock");
    let log = SystemLog::bind(&path);
    let setup = system_log::with_system_log(test, &path);
    let program = Program::new(test);
    let server = Server::start_in(test, Superserver::OpenbsdInetd, &program, Some(&setup));
    let mut client = server.connect();
    client.log_in_by_starttls(Pki::of(Key::P256));
    assert!(client.command("z LOGOUT").is_ok());
    drop(client);
    // inetd has something to say too.
    let line = log.wait_for("imap-tls[");
    // Facility mail (2), severity informational (6).
    assert!(line.starts_with("<22>imap-tls["), "{line}");
    assert!(line.contains("]: 127.0.0.1:"), "{line}");
    assert!(
        line.contains(": session policy=required tls=TLSv1.3 "),
        "{line}"
    );
    assert!(!line.contains("sekret"), "{line}");
}
