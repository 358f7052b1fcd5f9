//! A backend that is connected to (`--connect`): what it is told of the client, the ways in which it fails, and what the processes
//! may do meanwhile.

use crate::harness::ptrace::{Arg, inject};
use crate::harness::remote::{accept_by_hand, fill, fill_unix, unix_path};
use crate::harness::*;
use crate::process::assert_confined;
use libtest_mimic::Trial;
use nix::sys::socket::{getsockopt, sockopt};
use rustls::client::Resumption;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for policy in ["required", "optional", "implicit"] {
        for (name, place) in [("TCP", Place::Tcp), ("a unix socket", Place::Unix)] {
            for (words, introduction) in [
                ("without a header", Introduction::None),
                ("with a v1 header", Introduction::V1),
                ("with a v2 header", Introduction::V2),
            ] {
                tests.push(test(
                    &format!("connect: {policy} over {name} {words}"),
                    &[],
                    move |test| served(test, policy, place, introduction),
                ));
            }
        }
        tests.push(test(
            &format!(
                "connect: {policy}, a backend that refuses is a BYE, a log line and status 111"
            ),
            &[],
            move |test| refused(test, policy),
        ));
    }
    tests.extend(telling());
    tests.extend(failing());
    tests.extend(processes());
    tests.extend(relaying());
    tests
}

fn telling() -> Vec<Trial> {
    vec![
        test(
            "connect: a client over IPv6 is told of as such",
            &[Need::Ipv6],
            |test| clients(test, Socket::Tcp6),
        ),
        test(
            "connect: an IPv4 client of an IPv6 socket is told of as IPv4",
            &[Need::Ipv6],
            |test| clients(test, Socket::MappedTcp4),
        ),
        test(
            "connect: a client without an address is told of as one, and its TLS all the same",
            &[],
            |test| {
                clients(test, Socket::Unix);
                clients(test, Socket::Pipes);
            },
        ),
        test(
            "connect: TLS 1.2, ALPN, and no server name are told",
            &[],
            sessions,
        ),
        test(
            "connect: a client's certificate is told, and whether it was shown now or in a session that is resumed",
            &[Need::Root],
            certificates,
        ),
        test(
            "connect: AUTH=EXTERNAL is left to a backend that is told of the certificate, and taken from others",
            &[],
            external,
        ),
        test(
            "connect: no TLS is ever claimed before it stands, and no connection made under required and implicit",
            &[],
            nothing_before_tls,
        ),
        test(
            "connect: behind a balancer the client is whom its header names",
            &[],
            behind_balancer,
        ),
        test(
            "connect: under the listener each connection has its own backend, told of its own client",
            &[],
            under_listener,
        ),
        test(
            "connect: the environment's variables do as well",
            &[],
            by_environment,
        ),
    ]
}

fn failing() -> Vec<Trial> {
    vec![
        test(
            "connect: a port that swallows connections is given up in time",
            &[Need::Root],
            black_hole,
        ),
        test(
            "connect: a unix socket whose queue is full is given up in time",
            &[],
            full_queue,
        ),
        test(
            "connect: the login timeout holds while connecting",
            &[],
            login_timeout,
        ),
        test(
            "connect: a backend that accepts late loses nothing of what the client has sent meanwhile",
            &[Need::Root],
            |test| accepts_late(test, |_| ()),
        ),
        test(
            "connect: news of its order that comes late does not end the connector",
            &[Need::Root],
            |test| {
                accepts_late(test, |connector| {
                    sys::kill(connector.0, libc::SIGIO).unwrap()
                })
            },
        ),
        test(
            "connect: a backend that closes before its greeting is a BYE and status 111",
            &[],
            |test| ends_early(test, false),
        ),
        test(
            "connect: a client that leaves before the greeting is no fault of the backend's",
            &[],
            leaves_early,
        ),
        test(
            "connect: a backend that resets before its greeting is a BYE and status 111",
            &[],
            |test| ends_early(test, true),
        ),
        test(
            "connect: a backend that never greets is ended by the login timeout",
            &[],
            silent,
        ),
        test(
            "connect: a backend that resets after login ends the session, with its reason in the log",
            &[],
            resets_late,
        ),
        test(
            "connect: a client that has the backend reset, by a command behind LOGOUT, makes nothing fail",
            &[],
            reset_by_client,
        ),
        test(
            "connect: a unix socket that is not there, that nobody listens on, or that is forbidden",
            &[Need::Root],
            unix_faults,
        ),
        test(
            "connect: the next address of a name is tried when the first one refuses",
            NAMES,
            next_address,
        ),
        test(
            "connect: a name that nobody knows is a BYE, a log line and status 111",
            NAMES,
            unknown_name,
        ),
        test(
            "connect: a name server that does not answer holds nobody for longer than 10 s",
            NAMES,
            mute_name_server,
        ),
        test(
            "connect: --check finds what can be found without connecting",
            &[Need::Root],
            examined,
        ),
        test("connect: --check resolves names", NAMES, examined_names),
    ]
}

fn processes() -> Vec<Trial> {
    vec![
        test(
            "connect: the connector has no privileges when it waits and when it connects, and is gone afterwards",
            &[Need::Root],
            connector,
        ),
        test(
            "connect: the network process is confined as ever, before, during and after connecting",
            &[Need::Root],
            network_process,
        ),
        test(
            "connect: the network process can neither connect, nor make a socket, nor be handed one",
            &[Need::Root, Need::X86_64],
            forbidden,
        ),
        test(
            "connect: the connector runs as --backend-user, with that user's groups",
            &[Need::Root],
            backend_user,
        ),
        test(
            "connect: root reaches a path that only root may reach, when told so, and nothing else",
            &[Need::Root],
            as_root,
        ),
        test(
            "connect: the socket to the backend has TCP_NODELAY and keepalive",
            &[Need::Root],
            socket_options,
        ),
        test(
            "connect: when the connector is killed the client gets a clean end",
            &[Need::Root],
            connector_killed,
        ),
        test(
            "connect: when the network process is killed while connecting nothing survives",
            &[Need::Root],
            network_killed,
        ),
        test(
            "connect: a client that leaves while connecting leaves nothing",
            &[Need::Root],
            client_leaves,
        ),
        test(
            "connect: a plain user can run it when told so",
            &[Need::Root],
            unprivileged,
        ),
    ]
}

fn relaying() -> Vec<Trial> {
    let mut tests = Vec::new();
    for (name, place) in [("TCP", Place::Tcp), ("a unix socket", Place::Unix)] {
        let mut add = |words: &str, body: fn(&Test, Place)| {
            tests.push(test(
                &format!("connect: over {name}, {words}"),
                &[],
                move |test| body(test, place),
            ));
        };
        add("bulk both ways arrives whole in bounded memory", bulk);
        add(
            "a backend that does not read stops the client, not the memory",
            backpressure_up,
        );
        add(
            "a client that does not read stops the backend, not the memory",
            backpressure_down,
        );
        add(
            "after the client's half-close the backend's answer still arrives",
            client_half_close,
        );
        add(
            "after the backend's half-close the client can still send",
            backend_half_close,
        );
        add(
            "all that the client sent before it left reaches the backend",
            client_leaves_data,
        );
        add(
            "all that the backend wrote before it ended reaches the client",
            backend_leaves_data,
        );
        add("a client's reset is an ordinary end", client_resets);
    }
    tests
}

const NAMES: &[Need] = &[
    Need::Root,
    Need::Command("unshare", "util-linux"),
    Need::Command("tcpserver", "ucspi-tcp"),
];

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Tcp,
    Unix,
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn remote(test: &Test, place: Place, introduction: Introduction) -> Remote {
    match place {
        Place::Tcp => Remote::tcp(test, introduction, &Backend::imap()),
        Place::Unix => Remote::unix(test, introduction, &Backend::imap()),
    }
}

fn program(test: &Test, remote: &Remote, introduction: Introduction) -> Program {
    let program = Program::new(test).connect(remote);
    match introduction {
        Introduction::None => program,
        Introduction::V1 => program.option("--send-proxy", "v1"),
        Introduction::V2 => program.option("--send-proxy", "v2"),
    }
}

/// The client comes in, by the policy's way, and TLS stands.
fn enter(client: &mut Client, policy: &str, offer: &TlsOffer) {
    if policy == "implicit" {
        client.handshake(offer).unwrap();
        client.greeting();
    } else {
        client.greeting();
        client.starttls_with(offer);
    }
}

fn served(test: &Test, policy: &str, place: Place, introduction: Introduction) {
    let remote = remote(test, place, introduction);
    let mut session = program(test, &remote, introduction).tls(policy).start();
    let offer = TlsOffer::new(pki());
    enter(session.client(), policy, &offer);
    session.client().login();
    let ends = ends(&session);
    let tls = facts(session.client(), Some("localhost"), None);
    let secured = match introduction {
        Introduction::None => Vec::new(),
        Introduction::V1 => v1(ends),
        Introduction::V2 => v2(Some(ends), Some(&tls)),
    };
    if policy == "optional" {
        // The backend of the cleartext phase is told the truth too: no TLS.
        let clear = match introduction {
            Introduction::V2 => v2(Some(ends), None),
            _ => secured.clone(),
        };
        assert_eq!(remote.headers(), [clear, secured]);
    } else {
        assert_eq!(remote.headers(), [secured]);
    }
    log_out(&mut session);
    let line = session.session_line();
    assert_eq!(line["policy"], policy);
    assert!(!line.contains_key("backend"), "{line:?}");
    // Nothing of the header counts as IMAP.
    let received = test.record().backends().last().unwrap().received().len();
    assert_eq!(line["in"], received.to_string());
}

fn log_out(session: &mut Session) {
    let client = session.client();
    assert!(client.command("bye LOGOUT").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

// ---- what is told ----

/// With both forms of the header, a client on this kind of socket.
fn clients(test: &Test, socket: Socket) {
    for introduction in [Introduction::V1, Introduction::V2] {
        let remote = remote(test, Place::Tcp, introduction);
        let mut session =
            program(test, &remote, introduction).start_on(socket, Handover::Stdio, Stderr::Log);
        session.client().log_in_by_starttls(pki());
        let tls = facts(session.client(), Some("localhost"), None);
        let ends = session.peer.contains(':').then(|| ends(&session));
        if let Some((source, _)) = ends {
            assert_eq!(source.is_ipv6(), socket == Socket::Tcp6);
        }
        let expected = match (introduction, ends) {
            (Introduction::V2, _) => v2(ends, Some(&tls)),
            (_, Some(ends)) => v1(ends),
            (_, None) => b"PROXY UNKNOWN\r\n".to_vec(),
        };
        assert_eq!(remote.headers(), [expected]);
        log_out(&mut session);
    }
}

fn sessions(test: &Test) {
    let remote = remote(test, Place::Tcp, Introduction::V2);
    let program = program(test, &remote, Introduction::V2);
    let new = || TlsOffer::new(pki());
    let offers = [
        (
            TlsOffer {
                versions: vec![&rustls::version::TLS12],
                ..new()
            },
            Some("localhost"),
        ),
        (
            TlsOffer {
                alpn: vec![b"imap".to_vec()],
                server_name: "mail.example".to_owned(),
                ..new()
            },
            Some("mail.example"),
        ),
        // An address is no server name.
        (
            TlsOffer {
                server_name: "127.0.0.1".to_owned(),
                ..new()
            },
            None,
        ),
    ];
    for (index, (offer, name)) in offers.iter().enumerate() {
        let mut session = program.start();
        session.client().log_in_by_starttls_with(offer);
        let tls = facts(session.client(), *name, None);
        assert_eq!(
            remote.header(index),
            v2(Some(ends(&session)), Some(&tls)),
            "{index}"
        );
        log_out(&mut session);
    }
}

fn certificates(test: &Test) {
    const CONNECTION: u8 = 2;
    const SESSION: u8 = 4;
    let ca = Authority::make(&test.path("clients"), "client CA");
    let alice = ca.issue("Alice \u{e4}", |_| {});
    let remote = remote(test, Place::Tcp, Introduction::V2);
    let keys = test.path("ticket-keys");
    make_dir(&keys, 0o700);
    let program = program(test, &remote, Introduction::V2)
        .option("--client-ca", &ca.file)
        .option("--client-cert", "request")
        .option("--ticket-keys", keys);
    let mut index = 0;
    for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
        let mut config = TlsOffer {
            versions: vec![version],
            ..TlsOffer::new(pki())
        }
        .config();
        config.resumption = Resumption::in_memory_sessions(8);
        let config = Arc::new(alice.shown_by(config));
        for flags in [CONNECTION | SESSION, SESSION] {
            let mut session = program.start();
            let client = session.client();
            client.greeting();
            assert!(client.command("tls STARTTLS").is_ok());
            client.handshake_by(&config).unwrap();
            client.login();
            let tls = facts(client, Some("localhost"), Some((flags, "Alice \u{e4}")));
            assert_eq!(
                remote.header(index),
                v2(Some(ends(&session)), Some(&tls)),
                "{version:?}"
            );
            log_out(&mut session);
            index += 1;
        }
    }
    // One that shows none.
    let mut session = program.start();
    session.client().log_in_by_starttls(pki());
    let tls = facts(session.client(), Some("localhost"), None);
    assert_eq!(remote.header(index), v2(Some(ends(&session)), Some(&tls)));
}

fn external(test: &Test) {
    let ca = Authority::make(&test.path("clients"), "client CA");
    let alice = ca.issue("alice", |_| {});
    let backend = Backend::capabilities("IMAP4rev1 STARTTLS AUTH=PLAIN AUTH=EXTERNAL");
    for introduction in [Introduction::None, Introduction::V1, Introduction::V2] {
        let remote = Remote::tcp(test, introduction, &backend);
        let mut session = program(test, &remote, introduction)
            .option("--client-ca", &ca.file)
            .start();
        let client = session.client();
        client.greeting();
        assert!(client.command("tls STARTTLS").is_ok());
        let config = Arc::new(alice.shown_by(TlsOffer::new(pki()).config()));
        client.handshake_by(&config).unwrap();
        let said = client.command("c CAPABILITY").text();
        assert_eq!(
            said.contains("AUTH=EXTERNAL"),
            introduction == Introduction::V2,
            "{said}"
        );
    }
}

fn nothing_before_tls(test: &Test) {
    for policy in ["required", "implicit"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut session = Program::new(test)
            .backend([""; 0])
            .tls(policy)
            .option("--connect", listener.local_addr().unwrap().to_string())
            .option("--send-proxy", "v2")
            .start();
        let client = session.client();
        if policy == "required" {
            client.greeting();
            assert!(client.command("a NOOP").is_ok());
            assert!(client.command("b STARTTLS").is_ok());
        }
        // All but the last word of the handshake; then the client breaks it off.
        client
            .handshake_until_server_is_heard(&TlsOffer::new(pki()))
            .unwrap();
        session.close_client();
        assert_eq!(session.wait_code(), 0);
        let line = session.session_line();
        assert_eq!(line["tls"], "none", "{line:?}");
        let came = listener.accept();
        assert_eq!(
            came.err().map(|error| error.kind()),
            Some(std::io::ErrorKind::WouldBlock)
        );
    }
}

/// What comes in by `--accept-proxy` goes out by `--send-proxy`: the addresses, not what the balancer says of TLS.
fn behind_balancer(test: &Test) {
    let ends: Ends = (
        "192.0.2.7:4711".parse().unwrap(),
        "198.51.100.1:143".parse().unwrap(),
    );
    for policy in ["required", "optional", "implicit"] {
        for introduction in [Introduction::V1, Introduction::V2] {
            let remote = remote(test, Place::Tcp, introduction);
            let mut session = program(test, &remote, introduction)
                .tls(policy)
                .flag("--accept-proxy")
                .option("--proxy-from", "127.0.0.1")
                .start();
            let client = session.client();
            client.send(v2(Some(ends), None));
            enter(client, policy, &TlsOffer::new(pki()));
            client.login();
            let tls = facts(client, Some("localhost"), None);
            let secured = match introduction {
                Introduction::V2 => v2(Some(ends), Some(&tls)),
                _ => v1(ends),
            };
            let clear = match introduction {
                Introduction::V2 => v2(Some(ends), None),
                _ => v1(ends),
            };
            let mut expected = vec![secured];
            if policy == "optional" {
                expected.insert(0, clear);
            }
            assert_eq!(remote.headers(), expected, "{policy}");
            assert!(client.command("bye LOGOUT").is_ok());
            session.close_client();
            assert_eq!(session.wait_code(), 0);
        }
    }
}

fn under_listener(test: &Test) {
    let remote = remote(test, Place::Tcp, Introduction::V2);
    let port = free_port();
    let program =
        program(test, &remote, Introduction::V2).option("--listen", format!("127.0.0.1:{port}"));
    let line = program.command_line();
    let mut listener = Tool::new(test, line[0].to_str().unwrap())
        .args(&line[1..])
        .envs(program.environment().clone())
        .start();
    eventually("it listens", || {
        assert!(!listener.has_ended(), "{}", listener.log());
        is_listening(port).then_some(())
    });
    let mut clients: Vec<_> = (0..3)
        .map(|_| {
            let stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
            let ends = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
            (Client::on(stream), ends)
        })
        .collect();
    for (index, (client, ends)) in clients.iter_mut().enumerate() {
        client.log_in_by_starttls(pki());
        let tls = facts(client, Some("localhost"), None);
        assert_eq!(remote.header(index), v2(Some(*ends), Some(&tls)));
    }
    for (client, _) in &mut clients {
        assert!(client.command("bye LOGOUT").is_ok());
        assert_eq!(client.expect_end(), End::CloseNotify);
    }
    drop(clients);
    // A backend that is gone disturbs nobody but the client that wants it.
    drop(remote);
    let stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut client = Client::on(stream);
    client.greeting();
    client.starttls(pki());
    assert!(client.line().starts_with("* BYE [UNAVAILABLE]"));
    drop(client);
    eventually("the connections end", || {
        let ended = listener.log().matches(": session ").count() == 4;
        ended.then_some(())
    });
    assert!(!listener.has_ended());
}

fn by_environment(test: &Test) {
    let remote = remote(test, Place::Tcp, Introduction::V2);
    let options = program(test, &remote, Introduction::V2).as_environment();
    let mut program = Program::new(test).backend([""; 0]);
    for name in ["--connect", "--send-proxy"] {
        let variable = format!("IMAP_TLS_{}", name[2..].replace('-', "_").to_uppercase());
        program = program.env(&variable, &options[&variable]);
    }
    let mut session = program.start();
    session.client().log_in_by_starttls(pki());
    assert_eq!(remote.headers().len(), 1);
    log_out(&mut session);
    // Another backend beside it is not left out silently.
    let output = program.env("IMAP_TLS_BACKEND", "/bin/imapd").run();
    assert_eq!(output.status.code(), Some(100));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("--connect and IMAP_TLS_BACKEND exclude each other"),
        "{said}"
    );
}

// ---- backends that fail ----

/// A program whose backend is at this address, under a policy.
fn at(test: &Test, policy: &str, target: &str) -> Program {
    Program::new(test)
        .backend([""; 0])
        .tls(policy)
        .option("--connect", target)
        .option("--send-proxy", "v2")
}

/// The client's end where the backend cannot be had: BYE, where the session is; the log line and the status.
fn unavailable(session: &mut Session, policy: &str, says: &[&str], end: &str, status: i32) {
    let client = session.client();
    client.ask_for_backend(policy, pki());
    let line = client.line();
    assert!(line.starts_with("* BYE [UNAVAILABLE] "), "{line}");
    let expected = if policy == "optional" {
        End::Eof
    } else {
        End::CloseNotify
    };
    assert_eq!(client.expect_end(), expected);
    session.close_client();
    assert_eq!(session.wait_code(), status);
    let log = session.log();
    let fault = log
        .lines()
        .find(|line| says.iter().all(|words| line.contains(words)));
    let fault = fault.unwrap_or_else(|| panic!("no line with {says:?} in {log}"));
    assert!(
        fault.starts_with(&format!("{}: the backend '", session.peer))
            && fault.contains("' (--connect) "),
        "{fault}"
    );
    assert_eq!(session.session_line()["end"], end);
    // One line for the fault, and no more.
    assert_eq!(log.matches("(--connect)").count(), 1, "{log}");
}

const NOT_REACHED: &str = "backend not reached";

/// The address of a port that nobody listens on, and what keeps it so.
fn closed_port() -> (String, std::os::fd::OwnedFd) {
    use nix::sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, socket,
    };
    use std::os::fd::AsRawFd;
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    let address: SockaddrIn = getsockname(socket.as_raw_fd()).unwrap();
    (address.to_string(), socket)
}

fn refused(test: &Test, policy: &str) {
    let (target, _port) = closed_port();
    let mut session = at(test, policy, &target).start();
    let says = [
        target.as_str(),
        "cannot be connected to: Connection refused",
    ];
    unavailable(&mut session, policy, &says, NOT_REACHED, 111);
}

/// A port whose queue is full: the kernel drops each further SYN.
fn black_hole(test: &Test) {
    let (listener, _fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "required", &target).start();
    let began = Instant::now();
    let says = [
        target.as_str(),
        "cannot be connected to: Connection timed out",
    ];
    unavailable(&mut session, "required", &says, NOT_REACHED, 111);
    let took = began.elapsed();
    assert!(
        took > Duration::from_secs(8) && took < Duration::from_secs(18),
        "{took:?}"
    );
}

fn full_queue(test: &Test) {
    let path = unix_path(test);
    let _queue = fill_unix(&path);
    let target = format!("unix:{}", path.display());
    let mut session = at(test, "optional", &target).start();
    let began = Instant::now();
    let says = [
        target.as_str(),
        "cannot be connected to: Connection timed out",
    ];
    unavailable(&mut session, "optional", &says, NOT_REACHED, 111);
    let took = began.elapsed();
    assert!(
        took > Duration::from_secs(8) && took < Duration::from_secs(18),
        "{took:?}"
    );
}

fn login_timeout(test: &Test) {
    let (listener, _fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "required", &target)
        .option("--login-timeout", "5")
        .start();
    let client = session.client();
    client.greeting();
    client.starttls(pki());
    assert!(client.line().starts_with("* BYE"));
    assert_eq!(client.expect_end(), End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_as_last().code(), Some(0));
    assert_eq!(session.session_line()["end"], "login timeout");
}

/// Waits until a connector of this session is in connect(2), and gives it.
fn connecting(session: &Session) -> Process {
    eventually("the connector connects", || {
        let connectors = session.network().children();
        connectors
            .into_iter()
            .find(|child| child.blocked_in() == Some(libc::SYS_connect))
    })
}

/// `disturb` is done to a connector that waits for the backend.
fn accepts_late(test: &Test, disturb: impl Fn(Process)) {
    let (listener, fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "required", &target).start();
    let client = session.client();
    client.greeting();
    client.starttls(pki());
    // Ahead of a greeting that a client of STARTTLS never sees; then it has no more to say.
    client.send("a LOGIN u sekret\r\nb XECHO\r\n");
    client.close_notify();
    disturb(connecting(&session));
    drop(fillers);
    let _remote = Remote::on(
        test,
        remote::Listener::Tcp(listener),
        target,
        Introduction::V2,
        &Backend::imap(),
    );
    let client = session.client();
    assert!(client.reply("a").is_ok());
    assert!(client.reply("b").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_code(), 0);
    let played = test.record().backend(0);
    assert_eq!(played.received_text(), "a LOGIN u sekret\r\nb XECHO\r\n");
    assert_eq!(played.wait_end(), "eof");
}

/// Reads all of a header of version 2, so that closing is no reset.
fn skip_header(backend: &mut Client) {
    let header = backend.read_exact(16);
    backend.read_exact(u16::from_be_bytes([header[14], header[15]]).into());
}

fn ends_early(test: &Test, by_reset: bool) {
    for policy in ["required", "optional", "implicit"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap().to_string();
        let backend = std::thread::spawn(move || {
            let mut backend = accept_by_hand(&listener);
            skip_header(&mut backend);
            backend.send("* OK half a gree");
            if by_reset {
                backend.reset();
            }
        });
        let mut session = at(test, policy, &target).start();
        let (says, end) = if by_reset {
            (
                "is gone: Connection reset by peer",
                "backend gone: Connection reset by peer",
            )
        } else {
            (
                "is of no use: it closed before its greeting",
                "backend ended before its greeting",
            )
        };
        unavailable(&mut session, policy, &[&target, says], end, 111);
        backend.join().unwrap();
    }
}

fn leaves_early(test: &Test) {
    for policy in ["required", "optional", "implicit"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap().to_string();
        let mut session = at(test, policy, &target).start();
        let client = session.client();
        client.ask_for_backend(policy, pki());
        let mut backend = accept_by_hand(&listener);
        skip_header(&mut backend);
        session.close_client();
        assert_eq!(backend.expect_end(), End::Eof);
        drop(backend);
        assert_eq!(session.wait_code(), 0);
        let log = session.log();
        assert!(!log.contains("(--connect)"), "{log}");
        assert!(log.contains("end=\"client closed"), "{log}");
    }
}

fn silent(test: &Test) {
    let remote = Remote::tcp(test, Introduction::V2, &Backend::scenario("silent", &[]));
    let mut session = program(test, &remote, Introduction::V2)
        .option("--login-timeout", "5")
        .start();
    let client = session.client();
    client.greeting();
    client.starttls(pki());
    let line = client.line();
    assert!(line.starts_with("* BYE "), "{line}");
    assert_eq!(client.expect_end(), End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_code(), 0);
    assert_eq!(test.record().backend(0).wait_end(), "eof");
}

fn resets_late(test: &Test) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = Program::new(test)
        .backend([""; 0])
        .option("--connect", &target)
        .start();
    let client = session.client();
    client.greeting();
    client.starttls(pki());
    client.send("a LOGIN u sekret\r\n");
    let mut backend = accept_by_hand(&listener);
    backend.send("* OK ready\r\n");
    assert_eq!(backend.line(), "a LOGIN u sekret");
    backend.send("a OK in\r\n");
    let client = session.client();
    assert!(client.reply("a").is_ok());
    backend.send("* 1 EXISTS\r\n");
    assert_eq!(client.line(), "* 1 EXISTS");
    backend.reset();
    assert_eq!(client.expect_end(), End::CloseNotify);
    session.close_client();
    // It may be the client's doing (see below).
    assert_eq!(session.wait_code(), 0);
    let line = session.wait_log("(--connect)");
    assert!(
        line.contains(&format!(
            "the backend '{target}' (--connect) is gone: Connection reset by peer"
        )),
        "{line}"
    );
    let end = &session.session_line()["end"];
    assert_eq!(end, "backend gone: Connection reset by peer");
}

fn reset_by_client(test: &Test) {
    for place in [Place::Tcp, Place::Unix] {
        let (_remote, mut session) = logged_in(test, place);
        let client = session.client();
        // The backend ends at the first command, with the other one unread.
        client.send("a LOGOUT\r\n");
        let rest = "b NOOP\r\n".repeat(20_000);
        client.try_send(rest.as_bytes());
        client.read_to_end();
        session.close_client();
        assert_eq!(session.wait_code(), 0, "{}", session.log());
    }
}

fn unix_faults(test: &Test) {
    let path = unix_path(test);
    let target = format!("unix:{}", path.display());
    let reason = |reason: &'static str, status: i32| {
        let mut session = at(test, "required", &target).start();
        unavailable(
            &mut session,
            "required",
            &[&target, reason],
            NOT_REACHED,
            status,
        );
    };
    reason("No such file or directory", 111);
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    // Somebody has to mend this.
    reason(
        "Permission denied: the connector's user may not connect to it (--backend-user)",
        100,
    );
    drop(listener);
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    reason("Connection refused", 111);
}

/// Shell commands after which these names, and no others, are known in a mount namespace; nobody is asked over a network. A
/// resolver that knows no nsswitch.conf (musl's) asks a name server on loopback that is not there, and soon gives up.
fn hosts(test: &Test, lines: &str) -> String {
    let resolver = "nameserver 127.0.0.78\noptions timeout:1 attempts:1\n";
    names(test, lines, "files", resolver)
}

/// The same with another place to look names up in.
fn names(test: &Test, lines: &str, place: &str, resolver: &str) -> String {
    let switch = format!("passwd: files\ngroup: files\nhosts: {place}\n");
    let files = [
        ("hosts", lines),
        ("nsswitch.conf", &switch),
        ("host.conf", "multi on\n"),
        ("resolv.conf", resolver),
    ];
    let mut setup = String::new();
    for (name, text) in files {
        let path = test.path(name);
        write_file(&path, text, 0o644);
        // It may be a link.
        setup += &format!(
            "mount --bind {} \"$(readlink -f /etc/{name})\"\n",
            path.display()
        );
    }
    setup
}

fn next_address(test: &Test) {
    let listener = TcpListener::bind("127.0.0.3:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let setup = hosts(test, "127.0.0.2 backend.test\n127.0.0.3 backend.test\n");
    let remote = Remote::on(
        test,
        remote::Listener::Tcp(listener),
        format!("backend.test:{port}"),
        Introduction::V2,
        &Backend::imap(),
    );
    let program = program(test, &remote, Introduction::V2).flag("-v");
    let server = Server::start_in(test, Superserver::Tcpserver, &program, Some(&setup));
    let mut client = server.connect();
    client.log_in_by_starttls(pki());
    assert!(client.command("z LOGOUT").is_ok());
    server.wait_log(&format!("connected to the backend at 127.0.0.3:{port}"));
    assert_eq!(remote.headers().len(), 1);
    drop(client);
    eventually("the connection ends", || {
        server.sessions().is_empty().then_some(())
    });
    // Both refuse: the line has both.
    drop(remote);
    let mut client = server.connect();
    client.greeting();
    client.starttls(pki());
    assert!(client.line().starts_with("* BYE [UNAVAILABLE]"));
    server.wait_log(&format!(
        "the backend 'backend.test:{port}' (--connect) cannot be connected to: 127.0.0.2:{port}: Connection refused; \
         127.0.0.3:{port}: Connection refused"
    ));
    drop(client);
    eventually("the connection ends", || {
        server.sessions().is_empty().then_some(())
    });
}

fn unknown_name(test: &Test) {
    let setup = hosts(test, "127.0.0.1 localhost\n");
    let program = at(test, "required", "nobody.test:143");
    let server = Server::start_in(test, Superserver::Tcpserver, &program, Some(&setup));
    let mut client = server.connect();
    client.greeting();
    client.starttls(pki());
    assert!(client.line().starts_with("* BYE [UNAVAILABLE]"));
    assert_eq!(client.expect_end(), End::CloseNotify);
    let line = server.wait_log("(--connect)");
    assert!(
        line.contains("the backend 'nobody.test:143' (--connect) cannot be connected to: failed to lookup address"),
        "{line}"
    );
    drop(client);
    // tcpserver tells the exit status, as wait(2) has it.
    server.wait_log(&format!("status {}", 111 << 8));
    eventually("the connection ends", || {
        server.sessions().is_empty().then_some(())
    });
}

fn mute_name_server(test: &Test) {
    let _mute = std::net::UdpSocket::bind("127.0.0.77:53").unwrap();
    // More patient than we are.
    let resolver = "nameserver 127.0.0.77\noptions timeout:30\n";
    let setup = names(test, "127.0.0.1 localhost\n", "dns", resolver);
    let program = at(test, "required", "somebody.test:143");
    let server = Server::start_in(test, Superserver::Tcpserver, &program, Some(&setup));
    let mut client = server.connect();
    client.greeting();
    let began = Instant::now();
    client.starttls(pki());
    assert!(client.line().starts_with("* BYE [UNAVAILABLE]"));
    let took = began.elapsed();
    assert!(
        took > Duration::from_secs(9) && took < Duration::from_secs(18),
        "{took:?}"
    );
    server.wait_log(
        "the backend 'somebody.test:143' (--connect) cannot be connected to: no connection within 10 s",
    );
    // What asked the name server is gone before the network process is.
    let [processes] = server.sessions()[..] else {
        panic!("{:?}", server.sessions())
    };
    eventually("the connector is gone", || {
        processes.network.children().is_empty().then_some(())
    });
    drop(client);
    server.wait_log(&format!("status {}", 111 << 8));
}

fn report(program: &Program) -> (String, Option<i32>) {
    let output = program.clone().flag("--check").run();
    (
        String::from_utf8(output.stdout).unwrap(),
        output.status.code(),
    )
}

fn examined(test: &Test) {
    let check = |program: Program, level: &str, says: &[&str]| {
        let (report, status) = report(&program);
        let line = report
            .lines()
            .find(|line| says.iter().all(|words| line.contains(words)));
        let line = line.unwrap_or_else(|| panic!("no line with {says:?} in {report}"));
        assert!(line.starts_with(&format!("{level}: backend: ")), "{line}");
        assert_eq!(
            status,
            Some(if level == "error" { 100 } else { 0 }),
            "{report}"
        );
    };
    // A connection would be seen.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let target = listener.local_addr().unwrap().to_string();
    let good = at(test, "required", &target);
    check(good.clone(), "ok", &[&target, "an address"]);
    check(good.clone(), "ok", &["--send-proxy v2"]);
    check(
        good.clone().option("--send-proxy", "v1"),
        "warning",
        &["--send-proxy v1 cannot say that there is TLS"],
    );
    check(
        good.clone().without("--send-proxy"),
        "ok",
        &["it is not told who the client is"],
    );
    check(
        good.clone().option("--backend-user", "root"),
        "error",
        &["--connect", "no privileges are needed", "--backend-user"],
    );
    check(
        good.option("--backend-user", "no-such-user"),
        "error",
        &["unknown user 'no-such-user' (--backend-user)"],
    );
    assert!(listener.accept().is_err());
    // Nobody may be listening there, which is another line.
    let (report, _) = report(&at(test, "optional", "127.0.0.1:143"));
    assert!(
        report.contains("warning: backend: '127.0.0.1:143' (--connect) is where clients arrive"),
        "{report}"
    );
    let (closed, _port) = closed_port();
    check(
        at(test, "required", &closed),
        "error",
        &["nobody listens on", &closed, "--connect"],
    );

    let path = unix_path(test);
    let target = format!("unix:{}", path.display());
    let says = |words| {
        [
            "cannot connect to the backend",
            target.as_str(),
            "(--connect)",
            words,
        ]
    };
    let program = at(test, "required", &target);
    check(program.clone(), "error", &says("is the server running"));
    write_file(&path, "", 0o666);
    check(program.clone(), "error", &says("it is no socket"));
    std::fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    listener.set_nonblocking(true).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    check(
        program.clone(),
        "error",
        &says("may not write to it: mend its mode, or name another (--backend-user)"),
    );
    check(
        program.clone().option("--backend-user", "root"),
        "ok",
        &["a socket that the connector may connect to"],
    );
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    check(
        program,
        "ok",
        &["a socket that the connector may connect to"],
    );
    assert!(listener.accept().is_err());
}

fn examined_names(test: &Test) {
    let setup = hosts(test, "127.0.0.2 backend.test\n::1 backend.test\n");
    let check = |name: &str| {
        let program = at(test, "required", name).flag("--check");
        let script = format!("set -e\n{setup}\nexec \"$0\" \"$@\"");
        let output = Tool::new(test, "unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "/bin/sh",
                "-c",
                &script,
            ])
            .args(program.command_line())
            .envs(program.environment().clone())
            .run();
        (output.status.code(), output.text())
    };
    let (status, report) = check("backend.test:143");
    assert_eq!(status, Some(0), "{report}");
    let line = report
        .lines()
        .find(|line| line.starts_with("ok: backend: 'backend.test:143': backend.test is "));
    let line = line.unwrap_or_else(|| panic!("{report}"));
    assert!(line.contains("127.0.0.2") && line.contains("::1"), "{line}");
    let (status, report) = check("nobody.test:143");
    assert_eq!(status, Some(100), "{report}");
    assert!(
        report.contains(
            "error: backend: cannot connect to the backend 'nobody.test:143' (--connect): "
        ),
        "{report}"
    );
    assert!(
        report.contains("is it in the DNS or in /etc/hosts?"),
        "{report}"
    );
}

// ---- processes ----

/// The user and groups of a connector, which has nothing beyond them.
fn assert_unprivileged(process: Process, id: u32) {
    let status = process.status();
    assert_eq!(status.numbers("Uid"), [id; 4]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"] {
        assert_eq!(status.mask(set), 0, "{set}");
    }
    assert_eq!(status.field("NoNewPrivs"), "1");
    assert_eq!(process.limit("Max core file size").1, "0");
    assert_eq!(process.limit("Max processes").1, "0");
    // Its files in /proc belong to root as long as the process is not dumpable.
    let environment = std::fs::metadata(format!("/proc/{}/environ", process.0)).unwrap();
    assert_eq!(
        std::os::unix::fs::MetadataExt::uid(&environment),
        0,
        "dumpable"
    );
}

/// Waits until the connector, which nobody waits for before TLS, has got as far as waiting itself.
fn waiting_connector(session: &Session) -> Process {
    eventually("the connector waits", || {
        let children = session.network().children();
        children
            .into_iter()
            .filter(|child| child.blocked_in() == Some(libc::SYS_recvfrom))
            .find(|child| {
                child.status().field("NoNewPrivs") == "1" && child.status().field("Seccomp") == "0"
            })
    })
}

fn connector(test: &Test) {
    let (listener, fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "required", &target).start();
    session.client().greeting();
    let waiting = waiting_connector(&session);
    assert_unprivileged(waiting, NETWORK_ID);
    assert!(waiting.status().numbers("Groups").is_empty());
    // Control socket, two of the standard descriptors and the log, and the one socket.
    let descriptors = waiting.descriptors();
    assert_eq!(
        descriptors.keys().filter(|number| **number > 2).count(),
        2,
        "{descriptors:?}"
    );
    session.client().starttls(pki());
    let connector = connecting(&session);
    assert_eq!(connector, waiting);
    assert_unprivileged(connector, NETWORK_ID);
    assert!(connector.status().numbers("Groups").is_empty());
    drop(fillers);
    let remote = Remote::on(
        test,
        remote::Listener::Tcp(listener),
        target,
        Introduction::V2,
        &Backend::imap(),
    );
    session.client().login();
    assert_eq!(remote.headers().len(), 1);
    eventually("the connector is gone", || {
        session.network().children().is_empty().then_some(())
    });
    log_out(&mut session);
    // Under `optional` there are two, for the same reasons as there are two launchers.
    let (listener, _fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "optional", &target).start();
    let first = connecting(&session);
    let second = waiting_connector(&session);
    assert_ne!(first, second);
    let processes = session.processes();
    assert_eq!((processes.connectors, processes.launcher), (2, None));
    for process in [first, second] {
        assert_unprivileged(process, NETWORK_ID);
    }
    session.take_client().reset();
    assert_eq!(session.wait_as_last().code(), Some(0));
}

fn network_process(test: &Test) {
    let (listener, fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "required", &target).start();
    session.client().greeting();
    assert_confined(test, session.network(), NETWORK_ID);
    session.client().starttls(pki());
    connecting(&session);
    assert_confined(test, session.network(), NETWORK_ID);
    drop(fillers);
    let _remote = Remote::on(
        test,
        remote::Listener::Tcp(listener),
        target,
        Introduction::V2,
        &Backend::imap(),
    );
    session.client().login();
    assert_confined(test, session.network(), NETWORK_ID);
    // Client, backend, log, three standard descriptors, something for signals: the connector's are closed.
    let descriptors = session.network().descriptors();
    assert!(descriptors.len() <= 7, "{descriptors:?}");
}

fn forbidden(test: &Test) {
    let remote = remote(test, Place::Tcp, Introduction::V2);
    let (zero, number) = (Arg::Number(0), Arg::Number);
    // 127.0.0.1, port 9.
    let address = Arg::Bytes(&[2, 0, 0, 9, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    let calls = [
        (
            "connect",
            libc::SYS_connect,
            vec![number(5), address, number(16)],
        ),
        ("socket", libc::SYS_socket, vec![number(2), number(1), zero]),
        ("recvmsg", libc::SYS_recvmsg, vec![number(5), zero, zero]),
        ("sendmsg", libc::SYS_sendmsg, vec![number(5), zero, zero]),
        ("bind", libc::SYS_bind, vec![number(5), address, number(16)]),
    ];
    for is_connected in [false, true] {
        for (name, call, arguments) in &calls {
            let mut session = program(test, &remote, Introduction::V2).start();
            session.client().greeting();
            if is_connected {
                session.client().starttls(pki());
                session.client().login();
            }
            let outcome = inject(session.wait_idle(), *call, arguments);
            assert!(outcome.is_refused(), "{name}: {outcome:?}");
            session.close_client();
            session.wait();
        }
    }
}

fn backend_user(test: &Test) {
    let text = std::fs::read_to_string("/etc/passwd").unwrap();
    let entry = text
        .lines()
        .find(|line| line.starts_with("games:"))
        .unwrap();
    let entry: Vec<&str> = entry.split(':').collect();
    let (uid, gid): (u32, u32) = (entry[2].parse().unwrap(), entry[3].parse().unwrap());
    // In a directory that only this group may enter.
    let directory = test.path("of-games");
    make_dir(&directory, 0o710);
    std::os::unix::fs::chown(&directory, Some(0), Some(gid)).unwrap();
    let path = directory.join("imap.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o660)).unwrap();
    std::os::unix::fs::chown(&path, Some(0), Some(gid)).unwrap();
    let remote = Remote::on(
        test,
        remote::Listener::Unix(listener),
        format!("unix:{}", path.display()),
        Introduction::None,
        &Backend::imap(),
    );
    let program = program(test, &remote, Introduction::None).option("--backend-user", "games");
    let mut session = program.start();
    session.client().greeting();
    let waiting = waiting_connector(&session);
    assert_unprivileged(waiting, uid);
    assert_eq!(waiting.status().numbers("Gid"), [gid; 4]);
    session.client().starttls(pki());
    session.client().login();
    log_out(&mut session);
    let mut session = program.without("--backend-user").start();
    let says = ["Permission denied"];
    unavailable(&mut session, "required", &says, NOT_REACHED, 100);
}

fn as_root(test: &Test) {
    let directory = test.path("of-root");
    make_dir(&directory, 0o700);
    let path = directory.join("imap.sock");
    let remote = Remote::on(
        test,
        remote::Listener::Unix(UnixListener::bind(&path).unwrap()),
        format!("unix:{}", path.display()),
        Introduction::V2,
        &Backend::imap(),
    );
    let mut session = program(test, &remote, Introduction::V2)
        .option("--backend-user", "root")
        .start();
    session.client().greeting();
    session.client().starttls(pki());
    session.client().login();
    log_out(&mut session);
    for target in ["127.0.0.1:143", "localhost:143"] {
        let mut session = at(test, "required", target)
            .option("--backend-user", "root")
            .start();
        let line = session.client().line();
        assert!(line.starts_with("* BYE [UNAVAILABLE]"), "{line}");
        session.close_client();
        assert_eq!(session.wait_code(), 100);
        let line = session.wait_log("(--connect)");
        assert!(
            line.contains("no privileges are needed to connect to"),
            "{line}"
        );
    }
}

fn socket_options(test: &Test) {
    let remote = remote(test, Place::Tcp, Introduction::V2);
    let mut session = program(test, &remote, Introduction::V2).start();
    session.client().log_in_by_starttls(pki());
    let client = session.initial_descriptors()[0].clone();
    let descriptors = session.network().descriptors();
    let sockets = descriptors.iter().filter(|(number, target)| {
        **number > 2 && target.starts_with("socket:") && **target != client
    });
    let [number] = sockets.map(|(number, _)| *number).collect::<Vec<_>>()[..] else {
        panic!("{descriptors:?}")
    };
    let socket = sys::copy_descriptor(session.network().0, number).unwrap();
    assert_eq!(getsockopt(&socket, sockopt::TcpNoDelay), Ok(true));
    assert_eq!(getsockopt(&socket, sockopt::KeepAlive), Ok(true));
    let timeout = getsockopt(&socket, sockopt::SendTimeout).unwrap();
    assert_eq!((timeout.tv_sec(), timeout.tv_usec()), (0, 0));
}

fn connector_killed(test: &Test) {
    let remote = remote(test, Place::Tcp, Introduction::V2);
    let says = ["cannot be connected to: the connector has ended without an answer"];
    // While it waits, and the client does not know of it yet.
    let mut session = program(test, &remote, Introduction::V2).start();
    session.kill(waiting_connector(&session), libc::SIGKILL);
    unavailable(&mut session, "required", &says, NOT_REACHED, 111);
    // While it connects.
    let (listener, _fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "optional", &target).start();
    session.kill(connecting(&session), libc::SIGKILL);
    unavailable(&mut session, "optional", &says, NOT_REACHED, 111);
    assert!(remote.headers().is_empty());
}

fn network_killed(test: &Test) {
    let (listener, _fillers) = fill();
    let target = listener.local_addr().unwrap().to_string();
    let mut session = at(test, "optional", &target).start();
    let connector = connecting(&session);
    session.kill(session.network(), libc::SIGKILL);
    session.wait();
    // Long before its time for connecting is over.
    within("the connector ends", Duration::from_secs(3), || {
        (!connector.alive()).then_some(())
    });
}

fn client_leaves(test: &Test) {
    for by_reset in [false, true] {
        let (listener, _fillers) = fill();
        let target = listener.local_addr().unwrap().to_string();
        let mut session = at(test, "required", &target).start();
        session.client().greeting();
        session.client().starttls(pki());
        let connector = connecting(&session);
        let client = session.take_client();
        if by_reset {
            client.reset();
            // Nobody is there to be served: the connector is told so at once.
            assert_eq!(session.wait_as_last().code(), Some(0));
        } else {
            // It may still read: as a backend would, ours gets its chance.
            drop(client);
            assert_eq!(session.wait_code(), 111);
        }
        assert!(!connector.alive());
    }
}

fn unprivileged(test: &Test) {
    const USER: u32 = 61_007;
    let pki = Pki::make(&test.path("pki"), Key::P256, |_| {});
    std::os::unix::fs::chown(&pki.key, Some(USER), Some(USER)).unwrap();
    for place in [Place::Tcp, Place::Unix] {
        let remote = remote(test, place, Introduction::V2);
        let program = program(test, &remote, Introduction::V2)
            .pki(&pki)
            .started_by(USER)
            .flag("--unprivileged");
        let program = ["--user", "--group", "--keeper-user", "--chroot"]
            .iter()
            .fold(program, |program, name| program.without(name));
        let mut session = program.start();
        session.client().log_in_by_starttls(&pki);
        assert_eq!(remote.headers().len(), 1);
        log_out(&mut session);
    }
}

// ---- bytes ----

/// A session that is logged in, with a backend there.
fn logged_in(test: &Test, place: Place) -> (Remote, Session) {
    let remote = remote(test, place, Introduction::V2);
    let mut session = program(test, &remote, Introduction::V2).start();
    session.client().log_in_by_starttls(pki());
    (remote, session)
}

fn assert_memory(session: &Session) {
    let peak = session.network().peak_kib();
    assert!(peak < 20 << 10, "the network process used {peak} KiB");
}

fn bulk(test: &Test, place: Place) {
    let (_remote, mut session) = logged_in(test, place);
    let size = 32 << 20;
    let client = session.client();
    assert!(client.command("both XECHO").is_ok());
    let (sent, received) = client.exchange(size, size);
    assert_eq!(sent, received);
    assert_memory(&session);
    session.client().close_notify();
    assert_eq!(session.client().expect_end(), End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

fn backpressure_up(test: &Test, place: Place) {
    let (_remote, mut session) = logged_in(test, place);
    let size = 128 << 20;
    let client = session.client();
    assert!(client.command("a XSTALL").is_ok());
    client.send(format!("b XSINK {size}\r\n"));
    let sent = client.send_until_blocked(size, Duration::from_millis(500));
    assert!(
        sent < 64 << 20,
        "{sent} bytes were taken although the backend reads nothing"
    );
    assert_memory(&session);
    session.record().release();
    let client = session.client();
    client.send(vec![b'x'; size - sent]);
    assert!(client.reply("b").is_ok());
    assert_memory(&session);
    log_out(&mut session);
}

fn backpressure_down(test: &Test, place: Place) {
    let (_remote, mut session) = logged_in(test, place);
    let size = 128 << 20;
    session.client().send(format!("a XSOURCE {size}\r\n"));
    let backend = Process(session.record().backend(0).pid);
    eventually("the backend blocks in write", || {
        let stuck = || {
            if is_root() {
                backend.blocked_in() == Some(libc::SYS_write)
            } else {
                backend.state() == Some('S')
            }
        };
        (stuck() && {
            std::thread::sleep(Duration::from_millis(200));
            stuck()
        })
        .then_some(())
    });
    assert_memory(&session);
    let client = session.client();
    assert!(client.reply("a").is_ok());
    assert_eq!(client.exchange(0, size).1, client::pattern_hash(2, size));
    assert_memory(&session);
    log_out(&mut session);
}

fn client_half_close(test: &Test, place: Place) {
    for polite in [true, false] {
        let (_remote, mut session) = logged_in(test, place);
        let client = session.client();
        assert!(client.command("a XECHO").is_ok());
        let sent = client::Pattern::new(3).take(300_000);
        client.send(&sent);
        if polite {
            client.close_notify();
        }
        client.shutdown();
        let (echoed, end) = client.read_to_end();
        assert!(
            echoed == sent,
            "{} of {} bytes came back",
            echoed.len(),
            sent.len()
        );
        assert_eq!(end, End::CloseNotify);
        assert_eq!(session.wait_code(), 0);
        let played = test.record().backends().pop().unwrap();
        assert_eq!(played.wait_end(), "eof");
    }
}

fn backend_half_close(test: &Test, place: Place) {
    let (_remote, mut session) = logged_in(test, place);
    let client = session.client();
    assert!(client.command("a XSHUT").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    let backend = session.record().backend(0);
    assert!(Process(backend.pid).alive());
    session
        .client()
        .send("sent after the backend's half-close\r\n");
    eventually("the backend still reads", || {
        backend
            .received_text()
            .ends_with("half-close\r\n")
            .then_some(())
    });
    session.close_client();
    assert_eq!(session.wait_code(), 0);
    assert_eq!(backend.wait_end(), "eof");
}

fn client_leaves_data(test: &Test, place: Place) {
    let (_remote, mut session) = logged_in(test, place);
    let client = session.client();
    let size = 400_000;
    client.send_line_to_stalled(size);
    client.close_notify();
    session.close_client();
    session.record().release();
    session.record().backend(0).expect_line(size);
    assert_eq!(session.wait_code(), 0);
}

fn backend_leaves_data(test: &Test, place: Place) {
    for size in [1, 16_384, 2_000_000] {
        let (_remote, mut session) = logged_in(test, place);
        session.client().send(format!("a XLAST {size}\r\n"));
        session.client().expect_last_words(size);
        session.close_client();
        assert_eq!(session.wait_code(), 0);
        let line = session.session_line();
        assert_eq!(line["end"], "backend ended");
    }
}

fn client_resets(test: &Test, place: Place) {
    let (_remote, mut session) = logged_in(test, place);
    let client = session.take_client();
    client.reset();
    assert_eq!(session.wait_code(), 0);
    assert_eq!(session.record().backend(0).wait_end(), "eof");
    assert!(!session.log().contains("(--connect)"), "{}", session.log());
}

// ---- headers as they must be, made by other code than the program's ----

type Ends = (SocketAddr, SocketAddr);

/// The client's address and the one it connected to.
fn ends(session: &Session) -> Ends {
    (
        session.peer.parse().unwrap(),
        session.local.parse().unwrap(),
    )
}

fn v1((source, destination): Ends) -> Vec<u8> {
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    format!(
        "PROXY {family} {} {} {} {}\r\n",
        source.ip(),
        destination.ip(),
        source.port(),
        destination.port()
    )
    .into_bytes()
}

fn v2(ends: Option<Ends>, tls: Option<&[u8]>) -> Vec<u8> {
    let mut content = Vec::new();
    let mut family = 0;
    if let Some((source, destination)) = ends {
        family = if source.is_ipv4() { 0x11 } else { 0x21 };
        for address in [source.ip(), destination.ip()] {
            match address {
                IpAddr::V4(ip) => content.extend(ip.octets()),
                IpAddr::V6(ip) => content.extend(ip.octets()),
            }
        }
        for port in [source.port(), destination.port()] {
            content.extend(port.to_be_bytes());
        }
    }
    content.extend(tls.unwrap_or_default());
    let mut header = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    // PROXY and an address, or LOCAL and none.
    header.extend([0x20 | u8::from(ends.is_some()), family]);
    header.extend((content.len() as u16).to_be_bytes());
    header.extend(content);
    header
}

fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend((value.len() as u16).to_be_bytes());
    bytes.extend(value);
    bytes
}

/// The TLVs about the session that this client is in. A certificate: flags beside the one for TLS, and the common name.
fn facts(client: &mut Client, name: Option<&str>, certificate: Option<(u8, &str)>) -> Vec<u8> {
    let tls = client.tls();
    let version = match tls.protocol_version().unwrap() {
        rustls::ProtocolVersion::TLSv1_2 => "TLSv1.2",
        rustls::ProtocolVersion::TLSv1_3 => "TLSv1.3",
        other => panic!("{other:?}"),
    };
    let suite = format!("{:?}", tls.negotiated_cipher_suite().unwrap().suite());
    let cipher = match suite.as_str() {
        "TLS13_AES_256_GCM_SHA384" => "TLS_AES_256_GCM_SHA384",
        "TLS13_AES_128_GCM_SHA256" => "TLS_AES_128_GCM_SHA256",
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384" => "ECDHE-ECDSA-AES256-GCM-SHA384",
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256" => "ECDHE-ECDSA-AES128-GCM-SHA256",
        other => panic!("unexpected cipher suite {other}"),
    };
    let mut bytes = Vec::new();
    if let Some(protocol) = tls.alpn_protocol() {
        bytes.extend(tlv(0x01, protocol));
    }
    if let Some(name) = name {
        bytes.extend(tlv(0x02, name.as_bytes()));
    }
    let mut ssl = vec![1 | certificate.map_or(0, |(flags, _)| flags)];
    ssl.extend(u32::from(certificate.is_none()).to_be_bytes());
    ssl.extend(tlv(0x21, version.as_bytes()));
    if let Some((_, name)) = certificate {
        ssl.extend(tlv(0x22, name.as_bytes()));
    }
    ssl.extend(tlv(0x23, cipher.as_bytes()));
    bytes.extend(tlv(0x20, &ssl));
    bytes
}
