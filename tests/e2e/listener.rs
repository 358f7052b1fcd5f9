//! The listener: addresses, limits, one keeper for all, reload, drain, and whatever may die or run out.

use crate::harness::ptrace::{Arg, inject};
use crate::harness::*;
use libtest_mimic::Trial;
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

pub fn tests() -> Vec<Trial> {
    let root: &'static [Need] = &[Need::Root];
    let systemd: &'static [Need] = &[Need::Command("systemd-socket-activate", "systemd")];
    vec![
        test(
            "listener: several addresses at once, IPv6 and a unix socket too",
            &[Need::Ipv6],
            addresses,
        ),
        test(
            "listener: a bare port is IPv4 as well, whatever the machine has sockets of IPv6 be",
            &[
                Need::Root,
                Need::Ipv6,
                Need::Command("ip", "iproute2"),
                Need::Command("unshare", "util-linux"),
            ],
            bare_port,
        ),
        test("listener: two sockets from systemd", systemd, inherited),
        test(
            "listener: what cannot be listened on, or served, is told and ends with 100",
            &[],
            faults,
        ),
        test(
            "listener: CVE-2014-0016 (stunnel): no two connections share a random number or a key share",
            &[],
            |test| {
                let program = Program::new(test)
                    .tls("implicit")
                    .option("--max-per-source", "1000");
                randomness(&start(test, &program));
            },
        ),
        test(
            "listener: processes are confined, and have nothing of the listener's",
            root,
            confined,
        ),
        test(
            "listener: the private key and ticket keys are in the keeper's memory and in no other",
            root,
            keys,
        ),
        test(
            "listener: what one connection does to the keeper disturbs no other",
            root,
            keeper_isolation,
        ),
        test(
            "listener: as many as --max-connections are served, and then others",
            &[],
            most,
        ),
        test(
            "listener: of many that end at the same moment none is forgotten",
            &[],
            many_at_once,
        ),
        test(
            "listener: one source has its limit, and others are served promptly meanwhile",
            &[],
            per_source,
        ),
        test(
            "listener: a client that has gone before it was accepted gets no process, and is no stranger in the log",
            &[],
            gone,
        ),
        test(
            "listener: --source-prefix makes neighbours one source",
            &[],
            prefix,
        ),
        test(
            "listener: refusals are silent where they have to be, and do not flood the log",
            &[],
            silent,
        ),
        test(
            "listener: SIGHUP reads settings and certificates, and disturbs no session",
            &[],
            reload,
        ),
        test(
            "listener: SIGHUP before it serves is no end, and not lost",
            &[],
            early_reload,
        ),
        test(
            "listener: a broken set-up is not reloaded, and what was there goes on",
            &[],
            broken_reload,
        ),
        test(
            "listener: after a reload that was refused, backends are still started as before",
            &[],
            refused_environment,
        ),
        test(
            "listener: a hundred reloads with alternating certificates fail no connection",
            &[],
            reload_under_load,
        ),
        test(
            "listener: certificates are read anew by themselves",
            &[],
            renewal,
        ),
        test(
            "listener: SIGTERM lets sessions go on, and then says goodbye",
            &[],
            drain,
        ),
        test(
            "listener: whoever ignores the goodbye is killed",
            root,
            stubborn,
        ),
        test(
            "listener: whom it may not signal is in the log",
            &[Need::Root, Need::Command("setpriv", "util-linux")],
            powerless,
        ),
        test(
            "listener: when the keeper is killed another takes its place, and sessions go on",
            root,
            keeper_killed,
        ),
        test(
            "listener: keepers that are killed as soon as they are there do not begin without a pause",
            root,
            keeper_killed_at_once,
        ),
        test(
            "listener: when a network process is killed its backend goes, and nobody else",
            root,
            network_killed,
        ),
        test(
            "listener: when a backend is killed its client has a clean end",
            &[],
            backend_killed,
        ),
        test(
            "listener: a backend that signals its process group ends its own session alone",
            &[],
            signalled_group,
        ),
        test(
            "listener: when the listener is killed sessions go on, and nothing is left after them",
            root,
            listener_killed,
        ),
        test(
            "listener: without descriptors it accepts more slowly, and recovers",
            root,
            exhausted,
        ),
        test(
            "listener: without processes it accepts more slowly, and recovers",
            root,
            exhausted_processes,
        ),
        test(
            "listener: the supervisor is told of readiness, status, reload, end, and that it lives",
            &[],
            supervisor,
        ),
        test(
            "listener: a supervisor that does not read stops nothing, and is told when it does",
            &[],
            busy_supervisor,
        ),
        test(
            "listener: a supervisor that cannot be told is logged once, and clients are served",
            &[],
            no_supervisor,
        ),
        test(
            "listener: hundreds of connections in a second are served, and hundreds stay idle",
            root,
            load,
        ),
    ]
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn start(test: &Test, program: &Program) -> Server {
    Server::start(test, Superserver::Listener, program)
}

/// One of loopback's addresses.
fn source(last: u8) -> std::net::Ipv4Addr {
    std::net::Ipv4Addr::new(127, 0, 0, last)
}

fn log_in(server: &Server) -> Client {
    let mut client = server.connect();
    client.log_in_by_starttls(pki());
    client
}

/// Whether a connection is greeted and not refused.
fn is_greeted(mut client: Client) -> bool {
    client
        .line_or_end()
        .is_ok_and(|line| line.starts_with("* OK "))
}

fn wait_until_empty(server: &Server) {
    // The keeper is the one child that stays.
    eventually("all connections are gone", || {
        (server.process().children().len() <= 1).then_some(())
    });
}

fn addresses(test: &Test) {
    let path = test.path("imap.sock");
    // Left behind by one that was killed.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let (v6, both) = (free_port(), free_port());
    let program = Program::new(test)
        .also("--listen", format!("[::1]:{v6}"))
        .also("--listen", both.to_string())
        .also("--listen", format!("0.0.0.0:{both}"))
        .also("--listen", format!("unix:{}", path.display()));
    let mut server = start(test, &program);
    let line = server.wait_log("listening on ");
    let wanted = format!(
        "[::1]:{v6}, [::]:{both}, 0.0.0.0:{both}, unix:{}",
        path.display()
    );
    assert!(line.contains(&wanted), "{line}");
    let mut clients = vec![
        (server.connect(), "127.0.0.1"),
        (Client::on(TcpStream::connect(("::1", v6)).unwrap()), "::1"),
        (
            Client::on(TcpStream::connect(("::1", both)).unwrap()),
            "::1",
        ),
        (
            Client::on(TcpStream::connect(("127.0.0.1", both)).unwrap()),
            "127.0.0.1",
        ),
        (Client::on(UnixStream::connect(&path).unwrap()), ""),
    ];
    for (number, (client, address)) in clients.iter_mut().enumerate() {
        client.log_in_by_starttls(pki());
        let environment = test.record().backend(number).environment();
        let found = environment.get("TCPREMOTEIP").map_or("", String::as_str);
        assert_eq!(found, *address);
    }
    for (client, _) in clients {
        client.log_out();
    }
    server.signal(libc::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    assert!(!path.exists());
}

/// In a network of its own, so that the setting is this test's to change.
fn bare_port(test: &Test) {
    let program = Program::new(test).option("--listen", "143");
    let script = "ip link set lo up; echo 1 > /proc/sys/net/ipv6/bindv6only; exec \"$0\" \"$@\"";
    let listener = Tool::new(test, "unshare")
        .args(["--net", "/bin/sh", "-ec", script])
        .args(program.command_line())
        .envs(program.environment().clone())
        .start();
    eventually("it listens", || {
        let log = listener.log();
        log.contains("listening on [::]:143").then_some(())
    });
    let network = File::open(format!("/proc/{}/ns/net", listener.process().0)).unwrap();
    // A socket stays in the network in which it was made, and only that thread ever enters it.
    let connected = std::thread::spawn(move || {
        setns(network, CloneFlags::CLONE_NEWNET).unwrap();
        ["127.0.0.1", "::1"].map(|address| TcpStream::connect((address, 143)))
    });
    for stream in connected.join().unwrap() {
        let mut client = Client::on(stream.unwrap());
        client.log_in_by_starttls(pki());
        client.log_out();
    }
}

fn inherited(test: &Test) {
    let (one, other) = (free_port(), free_port());
    let mut tool = Tool::new(test, "systemd-socket-activate");
    for port in [one, other] {
        tool = tool.args(["-l", &format!("127.0.0.1:{port}")]);
    }
    let program = Program::new(test);
    for (name, value) in program.environment() {
        tool = tool.args(["-E", &format!("{name}={}", value.to_str().unwrap())]);
    }
    let running = tool.args(program.command_line()).start();
    let mut clients: Vec<Client> = [one, other]
        .into_iter()
        .map(|port| {
            Client::on(eventually("it listens", || {
                TcpStream::connect(("127.0.0.1", port)).ok()
            }))
        })
        .collect();
    for client in &mut clients {
        client.log_in_by_starttls(pki());
    }
    clients.into_iter().for_each(Client::log_out);
    let log = running.log();
    assert!(
        log.contains(&format!("127.0.0.1:{one}, 127.0.0.1:{other}")),
        "{log}"
    );
}

fn faults(test: &Test) {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let free = format!("127.0.0.1:{}", free_port());
    let listening = |address: &str| Program::new(test).option("--listen", address);
    for (program, status, expected) in [
        (
            listening(&format!("127.0.0.1:{port}")),
            100,
            "(--listen): Address already in use",
        ),
        (
            listening("192.0.2.1:143"),
            100,
            "(--listen): Cannot assign requested address",
        ),
        (
            listening("unix:/nonexistent/socket"),
            100,
            "(--listen): No such file or directory",
        ),
        (listening("mail.example:143"), 100, "--listen"),
        (
            listening(&free).option("--key", test.path("none")),
            100,
            "(--key)",
        ),
        (listening(&free).backend(["/nonexistent"]), 100, "(BACKEND)"),
        (
            listening(&free).option("--max-per-source", "0"),
            100,
            "--max-per-source",
        ),
        (
            listening(&free).option("--source-prefix", "33,64"),
            100,
            "--source-prefix",
        ),
        (
            listening(&free).option("--settings", test.path("none")),
            100,
            "(--settings)",
        ),
        (
            listening(&free)
                .backend(&[] as &[&str])
                .option("--backend-fd", "3"),
            100,
            "--backend-fd",
        ),
    ] {
        let output = program.run();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{text}");
        assert!(text.contains(expected), "{expected}: {text}");
        assert!(output.stdout.is_empty());
    }
}

/// The handshake messages of a server's first flight, in clear as far as they are, by type.
fn server_messages(port: u16, hello: &[u8], last: u8) -> Vec<(u8, Vec<u8>)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    stream.write_all(hello).unwrap();
    let (mut bytes, mut messages) = (Vec::new(), Vec::new());
    while messages.iter().all(|(kind, _)| *kind != last) {
        let mut head = [0; 5];
        stream.read_exact(&mut head).unwrap();
        assert_eq!(head[0], 22, "a handshake record");
        let mut body = vec![0; usize::from(u16::from_be_bytes([head[3], head[4]]))];
        stream.read_exact(&mut body).unwrap();
        bytes.extend(body);
        while let Some(length) = bytes.get(1..4) {
            let length =
                usize::from(length[0]) << 16 | usize::from(length[1]) << 8 | usize::from(length[2]);
            if bytes.len() < 4 + length {
                break;
            }
            let message: Vec<u8> = bytes.drain(..4 + length).collect();
            messages.push((message[0], message[4..].to_vec()));
        }
    }
    messages
}

/// Processes that are forked and not executed begin with the same memory: were a generator of random numbers, or a key, in it, two
/// of them would say the same. One ClientHello is sent to all.
pub fn randomness(server: &Server) {
    const CONNECTIONS: usize = 200;
    const SERVER_HELLO: u8 = 2;
    const SERVER_KEY_EXCHANGE: u8 = 12;
    for (version, last) in [
        (&rustls::version::TLS13, SERVER_HELLO),
        (&rustls::version::TLS12, SERVER_KEY_EXCHANGE),
    ] {
        let hello = Client::client_hello(&TlsOffer {
            versions: vec![version],
            groups: vec![rustls::crypto::aws_lc_rs::kx_group::X25519],
            ..TlsOffer::new(pki())
        });
        let mut seen = BTreeSet::new();
        for _ in 0..CONNECTIONS {
            for (kind, message) in server_messages(server.port, &hello, last) {
                let share = match kind {
                    // Version, then the random number; the key share is at the end of one of the extensions.
                    SERVER_HELLO => {
                        assert!(
                            seen.insert(message[2..34].to_vec()),
                            "a random number twice"
                        );
                        if last == SERVER_KEY_EXCHANGE {
                            continue;
                        }
                        let at = message
                            .windows(6)
                            .position(|bytes| bytes == [0, 51, 0, 36, 0, 29]);
                        message[at.unwrap() + 8..][..32].to_vec()
                    }
                    // Curve type, named group, length of the point.
                    SERVER_KEY_EXCHANGE => message[4..36].to_vec(),
                    _ => continue,
                };
                assert!(seen.insert(share), "a key share twice");
            }
        }
        assert_eq!(seen.len(), 2 * CONNECTIONS);
    }
}

fn sockets_of(process: Process) -> BTreeSet<String> {
    let all = process.descriptors().into_values();
    all.filter(|target| target.starts_with("socket:") || target.starts_with("anon_inode:"))
        .collect()
}

fn confined(test: &Test) {
    let server = start(test, &Program::new(test));
    let mut clients = [server.connect(), server.connect()];
    for client in &mut clients {
        client.greeting();
    }
    let keeper = server.keeper().unwrap();
    let early = server.sessions();
    assert_eq!(early.len(), 2);
    for client in &mut clients {
        client.starttls(pki());
        client.login();
    }
    let sessions = server.sessions();
    let parents = sockets_of(server.process());
    for session in &sessions {
        crate::process::assert_confined(test, session.network, NETWORK_ID);
        assert!(session.keeper.is_none());
    }
    let own: Vec<_> = sessions.iter().map(|one| sockets_of(one.network)).collect();
    let is_socket = |name: &&String| name.starts_with("socket:");
    for one in &own {
        assert!(
            one.iter()
                .filter(is_socket)
                .all(|name| !parents.contains(name)),
            "{one:?} {parents:?}"
        );
    }
    assert!(
        own[0]
            .iter()
            .filter(is_socket)
            .all(|name| !own[1].contains(name))
    );
    for number in 0..2 {
        let backend = test.record().backend(number).descriptors();
        assert_eq!(backend.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
    }
    // The limits are those that it was started with.
    let limit = Process(test.record().backend(0).pid).limit("Max open files");
    assert_eq!(
        limit,
        Process(i32::try_from(std::process::id()).unwrap()).limit("Max open files")
    );
    let status = keeper.status();
    assert_eq!(status.numbers("Uid"), [KEEPER_ID; 4]);
    assert_eq!(
        (status.field("NoNewPrivs"), status.field("Seccomp")),
        ("1", "2")
    );
    assert_eq!((status.mask("CapEff"), status.mask("CapBnd")), (0, 0));
    assert_eq!(keeper.root(), test.empty_dir());
    if cfg!(target_arch = "x86_64") {
        eventually("the keeper waits", || {
            (keeper.state() == Some('S')).then_some(())
        });
        let outcome = inject(
            keeper,
            libc::SYS_socket,
            &[
                Arg::Number(libc::AF_INET as u64),
                Arg::Number(1),
                Arg::Number(0),
            ],
        );
        assert!(outcome.is_refused(), "{outcome:?}");
        // That was its end, and another is there.
        eventually("there is another keeper", || {
            server.keeper().filter(|other| *other != keeper)
        });
    }
    clients.into_iter().for_each(Client::log_out);
    log_in(&server).log_out();
}

fn keys(test: &Test) {
    let tickets = test.path("tickets");
    let program = Program::new(test).option("--ticket-keys", &tickets);
    let server = start(test, &program);
    let mut early = server.connect();
    early.greeting();
    let late = log_in(&server);
    let mut others = vec![server.process()];
    for session in server.sessions() {
        others.extend(
            [Some(session.network), session.launcher, session.backend]
                .into_iter()
                .flatten(),
        );
    }
    assert_keys_are_held_by(server.keeper().unwrap(), &tickets, &others);
    drop(early);
    late.log_out();
}

/// The usual private key and those of tickets are in the keeper's memory, and in no other's.
pub fn assert_keys_are_held_by(keeper: Process, tickets: &Path, others: &[Process]) {
    let private = pki().secrets().into_iter();
    let mut secrets: Vec<Vec<u8>> = private.map(|(_, bytes)| bytes).collect();
    let count = secrets.len();
    for file in std::fs::read_dir(tickets).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        secrets.extend(bytes.chunks_exact(32).take(64).map(<[u8]>::to_vec));
    }
    assert!(secrets.len() > count, "there are ticket keys");
    let find = |process: Process| process.find_in_memory(&secrets);
    assert!(
        find(keeper)[..count].contains(&true),
        "else the search would prove nothing"
    );
    assert!(others.len() >= 5, "{others:?}");
    for process in others {
        assert!(!find(*process).contains(&true), "{}", describe(&[*process]));
    }
}

fn keeper_isolation(test: &Test) {
    let server = start(test, &Program::new(test));
    let keeper = server.keeper().unwrap();
    let mut clients: Vec<Client> = (0..4).map(|_| server.connect()).collect();
    for client in &mut clients {
        client.greeting();
    }
    let sessions = server.sessions();
    // One is frozen in the middle of its handshake.
    assert!(clients[0].command("a STARTTLS").is_ok());
    sys::kill(sessions[0].network.0, libc::SIGSTOP).unwrap();
    clients[0].send_raw(Client::client_hello(&TlsOffer::new(pki())));
    // One says what makes no sense, and one asks for more than a handshake needs, on every socket that they have.
    for (session, words) in [
        (&sessions[1], &b"\xff nonsense"[..]),
        (&sessions[2], &b"\x04\0\x04\x03 no signature"[..]),
    ] {
        for (number, target) in session.network.descriptors() {
            if number > 2 && target.starts_with("socket:") {
                let copy = sys::copy_descriptor(session.network.0, number).unwrap();
                let socket = UnixStream::from(copy);
                for _ in 0..3 {
                    let _ = nix::sys::socket::send(
                        std::os::fd::AsRawFd::as_raw_fd(&socket),
                        words,
                        nix::sys::socket::MsgFlags::MSG_NOSIGNAL
                            | nix::sys::socket::MsgFlags::MSG_DONTWAIT,
                    );
                }
            }
        }
    }
    // One is killed.
    sys::kill(sessions[3].network.0, libc::SIGKILL).unwrap();
    for _ in 0..5 {
        log_in(&server).log_out();
    }
    assert_eq!(server.keeper(), Some(keeper), "it is the same all the time");
    sys::kill(sessions[0].network.0, libc::SIGCONT).unwrap();
    drop(clients);
    wait_until_empty(&server);
    assert_eq!(server.keeper(), Some(keeper));
}

fn most(test: &Test) {
    let program = Program::new(test).option("--max-connections", "3");
    let server = start(test, &program);
    let mut clients: Vec<Client> = (0..3).map(|_| log_in(&server)).collect();
    let (bytes, end) = server.connect().read_to_end();
    let text = String::from_utf8(bytes).unwrap();
    assert_eq!(
        text,
        "* BYE [UNAVAILABLE] too many connections, try again later\r\n"
    );
    assert_eq!(end, End::Eof);
    server.wait_log("refused 127.0.0.1: there is no room (--max-connections)");
    clients.pop().unwrap().log_out();
    eventually("there is room again", || {
        is_greeted(server.connect()).then_some(())
    });
    clients.into_iter().for_each(Client::log_out);
}

/// One signal stands for all of them, and there are more than are asked for whenever there is news.
fn many_at_once(test: &Test) {
    const MANY: usize = 100;
    let program = Program::new(test)
        .option("--max-connections", MANY.to_string())
        .option("--max-per-source", MANY.to_string());
    let server = start(test, &program);
    let fill = || {
        let mut clients: Vec<Client> = (0..MANY).map(|_| server.connect()).collect();
        for client in &mut clients {
            client.greeting();
        }
        clients
    };
    let clients = fill();
    server.process().stop();
    drop(clients);
    let zombies = || {
        let children = server.process().children();
        children
            .into_iter()
            .filter(|child| child.state() == Some('Z'))
            .count()
    };
    eventually("they have all ended", || (zombies() >= MANY).then_some(()));
    server.signal(libc::SIGCONT);
    wait_until_empty(&server);
    fill();
}

fn per_source(test: &Test) {
    let program = Program::new(test).option("--max-per-source", "5");
    let server = start(test, &program);
    let held: Vec<Client> = (0..5)
        .map(|_| {
            let mut client = server.connect_from(source(2));
            client.greeting();
            client
        })
        .collect();
    let is_over = AtomicBool::new(false);
    let attempts = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                assert!(!is_greeted(server.connect_from(source(2))));
                attempts.fetch_add(1, Ordering::Relaxed);
            }
        });
        eventually("the attack is under way", || {
            (attempts.load(Ordering::Relaxed) > 50).then_some(())
        });
        for _ in 0..10 {
            let mut client = server.connect_from(source(3));
            client.log_in_by_starttls(pki());
            client.log_out();
        }
        is_over.store(true, Ordering::Relaxed);
    });
    server.wait_log("refused 127.0.0.2: there are too many from there (--max-per-source)");
    drop(held);
    eventually("there is room again", || {
        is_greeted(server.connect_from(source(2))).then_some(())
    });
}

/// Nothing can be told to it, and it would be counted for no source.
fn gone(test: &Test) {
    for program in [
        Program::new(test).tls("optional"),
        Program::new(test)
            .flag("--accept-proxy")
            .option("--proxy-from", "127.0.0.1"),
    ] {
        let has_balancer = program.command_line().contains(&"--accept-proxy".into());
        let server = start(test, &program.option("--max-connections", "20"));
        server.wait_log("listening on ");
        server.process().stop();
        for _ in 0..40 {
            server.connect().reset();
        }
        let mut client = server.connect();
        if has_balancer {
            client.send_raw("PROXY TCP4 192.0.2.7 192.0.2.1 4711 143\r\n");
        }
        server.signal(libc::SIGCONT);
        client.log_in_by_starttls(pki());
        client.log_out();
        server.wait_log(": session ");
        wait_until_empty(&server);
        let log = server.log();
        assert_eq!(log.matches(": session ").count(), 1, "{log}");
        assert!(!log.contains("unix") && !log.contains("refused"), "{log}");
    }
}

fn prefix(test: &Test) {
    let program = Program::new(test)
        .option("--max-per-source", "2")
        .option("--source-prefix", "31,64");
    let server = start(test, &program);
    let held: Vec<Client> = [2, 3]
        .into_iter()
        .map(|last| server.connect_from(source(last)))
        .collect();
    eventually("both are served", || {
        (server.sessions().len() == 2).then_some(())
    });
    assert!(!is_greeted(server.connect_from(source(3))));
    assert!(is_greeted(server.connect_from(source(4))));
    drop(held);
}

fn silent(test: &Test) {
    for program in [
        Program::new(test).option("--refusal", "silent"),
        Program::new(test).tls("implicit"),
    ] {
        let server = start(test, &program.option("--max-connections", "1"));
        let held = server.connect();
        eventually("it is served", || {
            (server.sessions().len() == 1).then_some(())
        });
        for _ in 0..100 {
            assert_eq!(server.connect().read_to_end(), (Vec::new(), End::Eof));
        }
        let lines = server
            .log()
            .lines()
            .filter(|line| line.contains("refused"))
            .count();
        assert!((1..20).contains(&lines), "{lines} lines for 100 refusals");
        drop(held);
        wait_until_empty(&server);
    }
}

fn set(test: &Test, text: &str) -> std::path::PathBuf {
    let path = test.path("settings");
    write_file(&path, text, 0o644);
    path
}

fn reload(test: &Test) {
    let settings = set(test, "IMAP_TLS_LOGIN_TIMEOUT=60\n");
    let other = Pki::make(&test.path("pki"), Key::Rsa2048, |_| {});
    // Links, so that what the options name is another after a moment.
    let (cert, key) = (test.path("cert"), test.path("key"));
    let point = |to: &Pki| {
        for (link, to) in [(&cert, &to.cert), (&key, &to.key)] {
            let _ = std::fs::remove_file(link);
            std::os::unix::fs::symlink(to, link).unwrap();
        }
    };
    point(pki());
    let program = Program::new(test)
        .option("--cert", &cert)
        .option("--key", &key)
        .option("--settings", &settings);
    let server = start(test, &program);
    let mut session = log_in(&server);
    let (first, keeper) = (server.sessions()[0].network, server.keeper().unwrap());
    point(&other);
    set(
        test,
        "# other settings\nIMAP_TLS_VERBOSE=yes\nIMAP_TLS_LOG=syslog\nIMAP_TLS_MAX_PER_SOURCE=2\nNOTE=\"for the backend\"\n",
    );
    server.signal(libc::SIGHUP);
    server.wait_log("imap-tls: reloaded");
    server.wait_log("--log has changed, which takes a restart");
    let mut client = server.connect();
    client.log_in_by_starttls(&other);
    server.wait_log(": secure: ");
    assert_eq!(
        test.record().backend(1).environment()["NOTE"],
        "for the backend"
    );
    assert!(
        !is_greeted(server.connect()),
        "two of that source are there"
    );
    assert!(session.command("a NOOP").is_ok());
    assert_eq!(server.sessions()[0].network, first);
    client.log_out();
    session.log_out();
    eventually("the keeper from before is gone", || {
        (!keeper.alive()).then_some(())
    });
    // What is not in the file any more does not hold any more.
    set(test, "");
    server.signal(libc::SIGHUP);
    eventually("it is reloaded again", || {
        (server.log().matches("imap-tls: reloaded").count() == 2).then_some(())
    });
    let many: Vec<Client> = (0..4).map(|_| server.connect()).collect();
    assert!(many.into_iter().all(is_greeted));
}

fn early_reload(test: &Test) {
    let program = Program::new(test);
    let server = Server::start_listening(test, Superserver::Listener, &program, None);
    server.signal(libc::SIGHUP);
    server.wait_log("imap-tls: reloaded");
}

fn broken_reload(test: &Test) {
    let settings = set(test, "");
    let server = start(test, &Program::new(test).option("--settings", &settings));
    let keeper = server.keeper().unwrap();
    for (text, wanted) in [
        (
            "IMAP_TLS_NONSENSE=1\n",
            "there is no setting IMAP_TLS_NONSENSE",
        ),
        ("\nno assignment\n", "line 2 of settings"),
        ("IMAP_TLS_OCSP=/nonexistent\n", "(--ocsp)"),
        ("IMAP_TLS_LOGIN_TIMEOUT=never\n", "--login-timeout"),
    ] {
        set(test, text);
        server.signal(libc::SIGHUP);
        server.wait_log(wanted);
        log_in(&server).log_out();
        assert_eq!(server.keeper(), Some(keeper), "{text}");
    }
    let log = server.log();
    assert_eq!(
        log.matches("nothing was renewed, and new connections are served as before")
            .count(),
        4,
        "{log}"
    );
    set(test, "");
    server.signal(libc::SIGHUP);
    server.wait_log("imap-tls: reloaded");
    log_in(&server).log_out();
}

fn refused_environment(test: &Test) {
    let settings = set(test, "NOTE=old\nOTHER=kept\n");
    let program = Program::new(test)
        .option("--settings", &settings)
        .option("--renewal", "1");
    let server = start(test, &program);
    // One that is no file of settings, one that sets no options, and one that names what there is not.
    let refused = [
        ("NOTE=new\nno assignment\n", "line 2 of settings"),
        (
            "NOTE=new\nIMAP_TLS_LOGIN_TIMEOUT=never\n",
            "--login-timeout",
        ),
        ("NOTE=new\nIMAP_TLS_OCSP=/nonexistent\n", "(--ocsp)"),
    ];
    for (number, (text, wanted)) in refused.into_iter().enumerate() {
        set(test, text);
        server.signal(libc::SIGHUP);
        server.wait_log(wanted);
        // The next renewal, which looks at the environment, is seen by its keeper.
        let keeper = server.keeper();
        eventually("another keeper", || {
            server
                .keeper()
                .filter(|other| Some(*other) != keeper)
                .map(drop)
        });
        log_in(&server).log_out();
        let environment = test.record().backend(number).environment();
        assert_eq!(environment["NOTE"], "old", "{text}");
        assert_eq!(environment["OTHER"], "kept", "{text}");
    }
}

fn reload_under_load(test: &Test) {
    const RELOADS: usize = 100;
    let other = Pki::make(&test.path("pki"), Key::P256, |_| {});
    let both = [pki(), &other];
    let settings = |number: usize| {
        let pki = both[number % 2];
        format!(
            "IMAP_TLS_CERT={}\nIMAP_TLS_KEY={}\n",
            pki.cert.display(),
            pki.key.display()
        )
    };
    let path = set(test, &settings(0));
    let program = Program::new(test)
        .without("--cert")
        .without("--key")
        .option("--settings", &path)
        .option("--max-per-source", "100");
    let server = start(test, &program);
    // Trusts either.
    let mut offer = TlsOffer::new(pki());
    offer.roots.extend(TlsOffer::new(&other).roots.roots);
    let is_over = AtomicBool::new(false);
    let served = AtomicUsize::new(0);
    let mut certificates = BTreeSet::new();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut seen = BTreeSet::new();
                    while !is_over.load(Ordering::Relaxed) {
                        let mut client = server.connect();
                        client.greeting();
                        client.starttls_with(&offer);
                        seen.insert(client.tls().peer_certificates().unwrap()[0].to_vec());
                        client.login();
                        client.log_out();
                        served.fetch_add(1, Ordering::Relaxed);
                    }
                    seen
                })
            })
            .collect();
        for number in 1..=RELOADS {
            // As an administrator would: the new file in the place of the old one.
            let new = test.path("settings.new");
            write_file(&new, settings(number), 0o644);
            std::fs::rename(&new, &path).unwrap();
            let before = served.load(Ordering::Relaxed);
            server.signal(libc::SIGHUP);
            eventually("it is reloaded", || {
                (server.log().matches("imap-tls: reloaded").count() >= number).then_some(())
            });
            eventually("somebody is served", || {
                (served.load(Ordering::Relaxed) > before).then_some(())
            });
        }
        is_over.store(true, Ordering::Relaxed);
        for thread in threads {
            certificates.extend(thread.join().unwrap());
        }
    });
    assert_eq!(certificates.len(), 2, "both were shown");
    wait_until_empty(&server);
    assert!(served.load(Ordering::Relaxed) >= RELOADS);
}

fn renewal(test: &Test) {
    let other = Pki::make(&test.path("pki"), Key::P256, |_| {});
    let both = test.path("both.pem");
    let write = |pki: &Pki| {
        let text = [&pki.cert, &pki.key]
            .map(|path| std::fs::read_to_string(path).unwrap())
            .concat();
        let new = test.path("new.pem");
        write_file(&new, text, 0o600);
        std::fs::rename(&new, &both).unwrap();
    };
    write(pki());
    let program = Program::new(test)
        .without("--key")
        .option("--cert", &both)
        .option("--renewal", "1");
    let server = start(test, &program);
    let session = log_in(&server);
    write(&other);
    eventually("the other certificate is shown", || {
        let mut client = server.connect();
        client.greeting();
        assert!(client.command("a STARTTLS").is_ok());
        client.handshake(&TlsOffer::new(&other)).ok()
    });
    // A broken one does no harm.
    write_file(&both, "nonsense", 0o600);
    server.wait_log("nothing was renewed");
    let mut client = server.connect();
    client.log_in_by_starttls(&other);
    client.log_out();
    session.log_out();
}

fn drain(test: &Test) {
    let mut server = start(test, &Program::new(test).option("--drain-timeout", "3600"));
    let mut session = log_in(&server);
    let mut early = server.connect();
    early.greeting();
    server.signal(libc::SIGTERM);
    server.wait_log("ending: 2 connections have 3600 s");
    eventually("nobody is accepted any more", || {
        TcpStream::connect(("127.0.0.1", server.port))
            .is_err()
            .then_some(())
    });
    // They go on: login too.
    assert!(session.command("a SELECT INBOX").is_ok());
    early.starttls(pki());
    early.login();
    let mut unready = early;
    assert!(unready.command("b NOOP").is_ok());
    // No more patience.
    server.signal(libc::SIGTERM);
    for client in [&mut session, &mut unready] {
        assert_eq!(client.expect_end(), End::CloseNotify);
    }
    drop((session, unready));
    assert_eq!(server.wait().code(), Some(0));
}

fn stubborn(test: &Test) {
    let mut server = start(test, &Program::new(test).option("--drain-timeout", "1"));
    let mut early = server.connect();
    early.greeting();
    let frozen = log_in(&server);
    let process = server.sessions()[1].network;
    sys::kill(process.0, libc::SIGSTOP).unwrap();
    server.signal(libc::SIGTERM);
    assert_eq!(early.line(), "* BYE the server is going down");
    drop(early);
    assert_eq!(server.wait().code(), Some(0));
    assert!(!process.alive());
    drop(frozen);
}

/// As in a unit without CAP_KILL. Nobody can be hurried then, so it ends when the clients do.
fn powerless(test: &Test) {
    let port = free_port();
    let program = Program::new(test)
        .option("--drain-timeout", "1")
        .option("--listen", format!("127.0.0.1:{port}"));
    let mut running = Tool::new(test, "setpriv")
        .args(["--bounding-set", "-kill"])
        .envs(program.environment().clone())
        .args(program.command_line())
        .start();
    let connect = || Client::on(TcpStream::connect(("127.0.0.1", port)).unwrap());
    eventually("it listens", || {
        TcpStream::connect(("127.0.0.1", port)).ok()
    });
    let mut clients = [connect(), connect()];
    for client in &mut clients {
        client.log_in_by_starttls(pki());
    }
    sys::kill(running.process().0, libc::SIGTERM).unwrap();
    let wanted = " connections cannot be told to end: Operation not permitted (CAP_KILL is needed)";
    eventually("it is said", || {
        running.log().contains(wanted).then_some(())
    });
    clients.into_iter().for_each(Client::log_out);
    assert_eq!(running.wait().code(), Some(0));
    assert_eq!(running.log().matches(wanted).count(), 1);
}

fn keeper_killed(test: &Test) {
    let server = start(test, &Program::new(test));
    let mut session = log_in(&server);
    let mut early = server.connect();
    early.greeting();
    let keeper = server.keeper().unwrap();
    sys::kill(keeper.0, libc::SIGKILL).unwrap();
    server.wait_log(&format!("keeper {}: SIGKILL: another is started", keeper.0));
    log_in(&server).log_out();
    assert_ne!(server.keeper().unwrap(), keeper);
    // Who came before has no keeper; the cleartext that there is goes on, and TLS is refused before it is begun.
    eventually("STARTTLS is refused", || {
        (!early.command("a STARTTLS").is_ok()).then_some(())
    });
    assert!(session.command("b NOOP").is_ok());
    session.log_out();
}

/// Each time as soon as it is there. Whoever comes meanwhile waits for the next one and is not refused.
fn keeper_killed_at_once(test: &Test) {
    let server = start(test, &Program::new(test));
    let begin = Instant::now();
    let mut keeper = server.keeper().unwrap();
    for _ in 0..3 {
        sys::kill(keeper.0, libc::SIGKILL).unwrap();
        server.wait_log(&format!("keeper {}: SIGKILL: another is started", keeper.0));
        log_in(&server).log_out();
        keeper = server.keeper().unwrap();
    }
    // The first may have had its second before we came.
    assert!(begin.elapsed() >= Duration::from_secs(2));
    assert!(!server.log().contains("refused"), "{}", server.log());
}

fn network_killed(test: &Test) {
    let server = start(test, &Program::new(test));
    let mut session = log_in(&server);
    // The second is of the real-time ones, which have no names.
    for (signal, name) in [(libc::SIGKILL, "SIGKILL"), (40, "SIG40")] {
        let mut victim = log_in(&server);
        let processes = server.sessions()[1];
        sys::kill(processes.network.0, signal).unwrap();
        victim.expect_end();
        server.wait_log(&format!(
            "process {} of a connection: {name}",
            processes.network.0
        ));
        eventually("its backend is gone", || {
            (!processes.backend.unwrap().alive()).then_some(())
        });
    }
    assert!(session.command("a NOOP").is_ok());
    session.log_out();
    no_zombies(&server);
}

fn backend_killed(test: &Test) {
    let server = start(test, &Program::new(test));
    let mut client = log_in(&server);
    sys::kill(test.record().backend(0).pid, libc::SIGKILL).unwrap();
    assert_eq!(client.expect_end(), End::CloseNotify);
    drop(client);
    server.wait_log(" backend=SIGKILL ");
    log_in(&server).log_out();
    no_zombies(&server);
}

fn signalled_group(test: &Test) {
    let names = test.path("names");
    make_dir(&names, 0o755);
    let program = Program::new(test).option("--cert-dir", &names);
    let server = start(test, &program);
    let keeper = server.keeper().unwrap();
    let mut neighbour = log_in(&server);
    let mut early = server.connect();
    early.greeting();
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let mut client = log_in(&server);
        client.send(format!("a XGROUP {signal}\r\n"));
        client.expect_end();
        assert!(neighbour.command("b NOOP").is_ok());
    }
    assert_eq!(server.keeper(), Some(keeper));
    early.starttls(pki());
    early.login();
    early.log_out();
    neighbour.log_out();
    log_in(&server).log_out();
    eventually("the keeper and the opener are left", || {
        (server.process().descendants().len() == 2).then_some(())
    });
    let log = server.log();
    assert!(!log.contains("ending: "), "{log}");
}

fn no_zombies(server: &Server) {
    wait_until_empty(server);
    eventually("nothing but the keeper is left", || {
        let left = server.process().descendants();
        (left.len() == 1 && left[0].state() != Some('Z')).then_some(())
    });
}

fn listener_killed(test: &Test) {
    let mut server = start(test, &Program::new(test));
    let mut session = log_in(&server);
    let mut early = server.connect();
    early.greeting();
    let keeper = server.keeper().unwrap();
    server.signal(libc::SIGKILL);
    server.wait();
    // The keeper is there as long as somebody may need it.
    early.starttls(pki());
    early.login();
    assert!(session.command("a NOOP").is_ok());
    early.log_out();
    eventually("the keeper has nobody left", || {
        (!keeper.alive()).then_some(())
    });
    session.log_out();
}

fn exhausted(test: &Test) {
    let server = start(test, &Program::new(test));
    log_in(&server).log_out();
    wait_until_empty(&server);
    let limit = |soft: u64| sys::set_limit(server.process().0, libc::RLIMIT_NOFILE, soft);
    let used = server.process().descriptors().len() as u64;
    limit(used);
    let mut waiting: Vec<Client> = (0..5).map(|_| server.connect()).collect();
    let line = server.wait_log("accepting clients more slowly");
    assert!(line.contains("Too many open files"), "{line}");
    limit(1024);
    for client in &mut waiting {
        client.log_in_by_starttls(pki());
    }
    waiting.into_iter().for_each(Client::log_out);
    server.wait_log("accepting clients again");
    let log = server.log();
    assert!(log.matches("more slowly").count() <= 2, "{log}");
    no_zombies(&server);
}

/// For root there is no limit on processes but a control group's; for a plain user there is.
fn exhausted_processes(test: &Test) {
    const USER: u32 = 61004;
    let mut program = Program::new(test);
    for option in ["--user", "--group", "--keeper-user", "--chroot"] {
        program = program.without(option);
    }
    let (cert, key) = (test.path("cert.pem"), test.path("key.pem"));
    std::fs::copy(&pki().cert, &cert).unwrap();
    std::fs::copy(&pki().key, &key).unwrap();
    std::os::unix::fs::chown(&key, Some(USER), None).unwrap();
    let program = program
        .option("--cert", &cert)
        .option("--key", &key)
        .flag("--unprivileged");
    let server = start(test, &program.started_by(USER));
    let limit = |most: u32| {
        let limit = format!("--nproc={most}:1024");
        let pid = format!("--pid={}", server.process().0);
        let tool = Tool::new(test, "setpriv")
            .args([format!("--reuid={USER}"), format!("--regid={USER}")])
            .args(["--clear-groups", "prlimit"]);
        tool.args([limit, pid]).run().success();
    };
    // The listener and its keeper are there. First there is one more process for a client, and none for its backend.
    limit(3);
    let began = Instant::now();
    for _ in 0..20 {
        let (said, _) = server.connect().read_to_end();
        assert_eq!(
            String::from_utf8_lossy(&said),
            "* BYE [UNAVAILABLE] a temporary fault of the server, try again later\r\n"
        );
        // Else the next client's process would be one too many, and the pause another one.
        wait_until_empty(&server);
    }
    // A tenth of a second between each and the next.
    let spent = began.elapsed();
    assert!(spent >= Duration::from_millis(900), "{spent:?}");
    let log = server.log();
    assert!(
        log.contains("cannot start the backend's launcher: Try again"),
        "{log}"
    );
    assert!(!log.contains("more slowly"), "{log}");
    limit(2);
    let mut client = server.connect();
    let line = server.wait_log("accepting clients more slowly");
    assert!(
        line.contains("cannot start a process for a client: Try again"),
        "{line}"
    );
    limit(1024);
    client.log_in_by_starttls(pki());
    client.log_out();
    server.wait_log("accepting clients again");
    no_zombies(&server);
}

/// What the test is as the program's supervisor.
pub struct Supervisor {
    path: PathBuf,
    socket: UnixDatagram,
}

impl Supervisor {
    pub fn new(test: &Test) -> Self {
        let path = test.path("notify.sock");
        let socket = UnixDatagram::bind(&path).unwrap();
        let patience = Some(Duration::from_secs(20));
        socket.set_read_timeout(patience).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(&path, mode).unwrap();
        Self { path, socket }
    }

    /// The program, which is to tell it of itself.
    pub fn of(&self, program: Program) -> Program {
        program
            .env("NOTIFY_SOCKET", &self.path)
            .env("WATCHDOG_USEC", "1000000")
    }

    /// Reads until a line of a message begins so; gives that message.
    pub fn wait_for(&self, wanted: &str) -> String {
        let mut messages = std::iter::repeat_with(|| self.read());
        messages.find(|message| tells(message, wanted)).unwrap()
    }

    /// The next message that it is told.
    fn read(&self) -> String {
        let mut buffer = [0; 1024];
        let length = self.socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }
}

/// Whether a line of a message begins so.
fn tells(message: &str, wanted: &str) -> bool {
    message.lines().any(|line| line.starts_with(wanted))
}

fn supervisor(test: &Test) {
    let supervisor = Supervisor::new(test);
    let wait_for = |wanted: &str| supervisor.wait_for(wanted);
    let mut server = start(test, &supervisor.of(Program::new(test)));
    wait_for("READY=1");
    let began = Instant::now();
    for _ in 0..3 {
        wait_for("WATCHDOG=1");
    }
    assert!(
        began.elapsed() < Duration::from_secs(3),
        "{:?}",
        began.elapsed()
    );
    let session = log_in(&server);
    wait_for("STATUS=1 connections from 1 sources; 1 served, 0 refused");
    let environment = test.record().backend(0).environment();
    assert!(
        !environment.contains_key("NOTIFY_SOCKET") && !environment.contains_key("WATCHDOG_USEC")
    );
    server.signal(libc::SIGHUP);
    assert!(wait_for("RELOADING=1").contains("MONOTONIC_USEC="));
    wait_for("READY=1");
    session.log_out();
    wait_for("STATUS=0 connections from 0 sources; 1 served, 0 refused");
    server.signal(libc::SIGTERM);
    wait_for("STOPPING=1");
    assert_eq!(server.wait().code(), Some(0));
}

/// As at boot, when many services fill systemd's queue.
fn busy_supervisor(test: &Test) {
    let supervisor = Supervisor::new(test);
    let other = UnixDatagram::unbound().unwrap();
    other.set_nonblocking(true).unwrap();
    let full = loop {
        if let Err(error) = other.send_to(b"STATUS=another service's\n", &supervisor.path) {
            break error;
        }
    };
    assert_eq!(full.kind(), std::io::ErrorKind::WouldBlock);
    let mut server = start(test, &supervisor.of(Program::new(test)));
    log_in(&server).log_out();
    server.signal(libc::SIGHUP);
    server.wait_log("imap-tls: reloaded");
    log_in(&server).log_out();
    // What it would have been told is not lost.
    let mut missing = vec![
        "RELOADING=1",
        "READY=1",
        "WATCHDOG=1",
        "STATUS=0 connections",
    ];
    while !missing.is_empty() {
        let message = supervisor.read();
        missing.retain(|wanted| !tells(&message, wanted));
    }
    server.signal(libc::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    assert!(!server.log().contains("supervisor"), "{}", server.log());
}

fn no_supervisor(test: &Test) {
    for (address, reason) in [
        ("/nonexistent/notify.sock", "No such file or directory"),
        ("@imap-tls/nobody", "Connection refused"),
        ("vsock:2:99", "neither a path nor an abstract name"),
    ] {
        let server = start(test, &Program::new(test).env("NOTIFY_SOCKET", address));
        let line = server.wait_log("cannot tell the supervisor");
        assert!(line.contains(address) && line.contains(reason), "{line}");
        log_in(&server).log_out();
        let log = server.log();
        assert_eq!(log.matches("supervisor").count(), 1, "{log}");
    }
}

/// A short load by default; E2E_SOAK seconds at E2E_RATE a second, and E2E_IDLE connections, where they are set; with the backend
/// E2E_BACKEND, since at a high rate the scripted one costs more than all the rest (tests/bench/imapd.c will do).
fn load(test: &Test) {
    let number = |name: &str, default: usize| {
        let text = std::env::var(name).ok();
        text.map_or(default, |text| text.parse().unwrap())
    };
    let (seconds, rate, idle) = (
        number("E2E_SOAK", 2),
        number("E2E_RATE", 50),
        number("E2E_IDLE", 100),
    );
    let program = Program::new(test)
        .tls("implicit")
        .option("--max-connections", "20000")
        .option("--max-per-source", "20000")
        .option("--login-timeout", "3600")
        .flag("--quiet");
    let program = match std::env::var_os("E2E_BACKEND") {
        Some(backend) => program.backend([backend]),
        None => program,
    };
    let server = start(test, &program);
    let offer = TlsOffer::new(pki());
    let config = std::sync::Arc::new(offer.config());
    let served = AtomicUsize::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (server, config, served) = (&server, &config, &served);
            scope.spawn(move || {
                for turn in (thread..seconds * rate).step_by(8) {
                    let due = Duration::from_secs_f64(turn as f64 / rate as f64);
                    // A pace to be kept, not something to wait for.
                    std::thread::sleep(due.saturating_sub(began.elapsed()));
                    let mut client = server.connect();
                    client.handshake_by(config).unwrap();
                    client.greeting();
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(served.load(Ordering::Relaxed), seconds * rate);
    eprintln!(
        "listener: {} connections in {:.1} s, none failed",
        seconds * rate,
        began.elapsed().as_secs_f64()
    );
    wait_until_empty(&server);
    let before = memory_available();
    let clients: Vec<Client> = (0..idle)
        .map(|_| {
            let mut client = server.connect();
            client.handshake_by(&config).unwrap();
            client.greeting();
            client
        })
        .collect();
    let sessions = server.sessions();
    assert_eq!(sessions.len(), idle);
    let private =
        |process: Process| process.smaps_kib("Private_Dirty") + process.smaps_kib("Private_Clean");
    eventually("memory is given back", || {
        (private(sessions[0].network) < 1024).then_some(())
    });
    let sum: u64 = sessions
        .iter()
        .map(|session| private(session.network))
        .sum();
    eprintln!(
        "listener: {idle} idle connections: USS {} KiB each; {} KiB each of the machine's memory, backend and test's client included",
        sum / idle as u64,
        before.saturating_sub(memory_available()) / idle as u64
    );
    drop(clients);
    wait_until_empty(&server);
}

/// What /proc/meminfo has of it, in KiB.
fn memory_available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
