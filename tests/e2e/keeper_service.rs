//! The keeper as a service (`--keep`): sessions of those who come to it and can read no key, who may come, reload, whatever may die,
//! and what is asked of it that should not be.

use crate::harness::*;
use crate::listener::{Supervisor, assert_keys_are_held_by};
use libtest_mimic::Trial;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, bind, connect, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use rustls::HandshakeKind;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const ROOT: &[Need] = &[Need::Root];
const TCPSERVER: &[Need] = &[
    Need::Root,
    Need::EachStarted,
    Need::Command("tcpserver", "ucspi-tcp"),
];
const SYSTEMD: &[Need] = &[
    Need::Root,
    Need::Command("systemd-socket-activate", "systemd"),
];

pub fn tests() -> Vec<Trial> {
    vec![
        test(
            "keeper service: sessions under tcpserver, which have no key and no keeper",
            TCPSERVER,
            sessions,
        ),
        test(
            "keeper service: tickets resume another connection's session, also another keeper's",
            ROOT,
            resumption,
        ),
        test(
            "keeper service: tickets are bound to the policy of those who ask",
            ROOT,
            binding,
        ),
        test(
            "keeper service: keys are in its keeper's memory and in no other",
            ROOT,
            keys,
        ),
        test(
            "keeper service: its keeper is confined, and its socket is root's alone",
            ROOT,
            confined,
        ),
        test(
            "keeper service: root of another service finds no key by way of its parent",
            &[Need::Root, Need::Command("setpriv", "util-linux")],
            untraceable,
        ),
        test(
            "keeper service: another user cannot come to it",
            ROOT,
            another_user,
        ),
        test(
            "keeper service: another user's socket is not gone to",
            ROOT,
            stranger,
        ),
        test(
            "keeper service: where there is none clients are told, and the log says where it should be",
            ROOT,
            absent,
        ),
        test(
            "keeper service: when it has gone away STARTTLS is refused",
            ROOT,
            gone,
        ),
        test(
            "keeper service: one that does not answer is given up, and clients are told",
            ROOT,
            unresponsive,
        ),
        test(
            "keeper service: SIGHUP shows the new certificate to those who come then",
            ROOT,
            reload,
        ),
        test(
            "keeper service: a broken certificate is not reloaded, and the one before is shown",
            ROOT,
            broken_reload,
        ),
        test(
            "keeper service: SIGHUP reads settings, and takes no other socket",
            ROOT,
            settings,
        ),
        test(
            "keeper service: reloads fail no connection",
            ROOT,
            reload_under_load,
        ),
        test(
            "keeper service: certificates are read anew by themselves",
            ROOT,
            renewal,
        ),
        test(
            "keeper service: when the keeper is killed another takes its place, and sessions go on",
            ROOT,
            keeper_killed,
        ),
        test(
            "keeper service: when a keeper is killed and its files are broken, it comes back with them",
            ROOT,
            keeper_killed_for_long,
        ),
        test(
            "keeper service: SIGTERM lets handshakes go on, and takes the socket away",
            ROOT,
            drain,
        ),
        test(
            "keeper service: a second SIGTERM, or time, ends handshakes",
            ROOT,
            drain_is_over,
        ),
        test(
            "keeper service: when its parent is killed the keeper stays for those who came, and another service can begin",
            ROOT,
            parent_killed,
        ),
        test(
            "keeper service: a socket that is left behind is replaced, and one in use is not",
            ROOT,
            second_start,
        ),
        test(
            "keeper service: who comes beyond --max-connections waits for room",
            ROOT,
            most,
        ),
        test(
            "keeper service: where the limit on open files is too low for --max-connections, the log says for how many there is room",
            &[Need::Root, Need::Command("prlimit", "util-linux")],
            too_few_descriptors,
        ),
        test(
            "keeper service: a keeper that is not over does not look who is outside",
            ROOT,
            retired_is_idle,
        ),
        test(
            "keeper service: whatever one asks disturbs no other",
            ROOT,
            hostile,
        ),
        test(
            "keeper service: hundreds who come and say nothing leave room for others",
            ROOT,
            crowd,
        ),
        test("keeper service: --check of both sides", ROOT, check),
        test(
            "keeper service: --check of both sides finds what is wrong",
            ROOT,
            check_faults,
        ),
        test(
            "keeper service: options that make no sense are refused",
            ROOT,
            usage,
        ),
        test(
            "keeper service: under a superserver it serves nobody, and tells the client nothing",
            ROOT,
            under_superserver,
        ),
        test("keeper service: certificates for each name", ROOT, names),
        test(
            "keeper service: when the opener is killed there is another, and another keeper",
            ROOT,
            opener_killed,
        ),
        test("keeper service: a socket from systemd", SYSTEMD, inherited),
        test(
            "keeper service: no other kind of socket from systemd, nor several",
            SYSTEMD,
            inherited_wrongly,
        ),
        test(
            "keeper service: no socket from systemd to which everybody may come",
            SYSTEMD,
            inherited_for_everybody,
        ),
        test(
            "keeper service: the supervisor is told of readiness, status, reload, end, and that it lives",
            ROOT,
            supervisor,
        ),
        test(
            "keeper service: a plain user's own serves that user",
            ROOT,
            unprivileged,
        ),
    ]
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn start(test: &Test) -> Service {
    Service::start(test, &Service::keeping(test))
}

/// A client before TLS, whose network process has come to the service.
fn greeted(test: &Test) -> Session {
    let mut session = Service::serving(test).start();
    session.client().greeting();
    session
}

fn logged_in(test: &Test) -> Session {
    let mut session = greeted(test);
    log_in(&mut session);
    session
}

fn log_in(session: &mut Session) {
    session.client().starttls(pki());
    session.client().login();
}

fn log_out(mut session: Session) {
    session.take_client().log_out();
    assert_eq!(session.wait_code(), 0, "{}", session.log());
}

/// The whole of a session, as a sign of life.
fn serve(test: &Test) {
    log_out(logged_in(test));
}

/// What a client is told that cannot be served, and the log with that.
fn turned_away(program: &Program, status: i32) -> String {
    let mut session = program.start();
    let (said, _) = session.client().read_to_end();
    let said = String::from_utf8(said).unwrap();
    assert!(said.starts_with("* BYE [UNAVAILABLE] "), "{said:?}");
    assert_eq!(said.matches("\r\n").count(), 1, "{said:?}");
    session.close_client();
    assert_eq!(session.wait_code(), status, "{}", session.log());
    session.log()
}

/// A certificate, as clients are shown it.
fn der(pki: &Pki) -> Vec<u8> {
    CertificateDer::from_pem_file(&pki.cert).unwrap().to_vec()
}

/// The certificate that this client was shown.
fn shown(client: &mut Client) -> Vec<u8> {
    client.tls().peer_certificates().unwrap()[0].to_vec()
}

/// The certificate that a new client is shown.
fn shown_now(test: &Test) -> Vec<u8> {
    let mut session = logged_in(test);
    let certificate = shown(session.client());
    log_out(session);
    certificate
}

/// Where the options `--cert` and `--key` lead: to another pair after a moment.
struct Links<'a>(&'a Test);

impl Links<'_> {
    fn point(&self, to: &Pki) {
        for (name, to) in [("cert", &to.cert), ("key", &to.key)] {
            let new = self.0.path("link.new");
            std::os::unix::fs::symlink(to, &new).unwrap();
            std::fs::rename(&new, self.0.path(name)).unwrap();
        }
    }

    fn keeping(&self) -> Program {
        Service::keeping(self.0)
            .option("--cert", self.0.path("cert"))
            .option("--key", self.0.path("key"))
    }
}

fn sessions(test: &Test) {
    let service = start(test);
    let keeper = service.keeper().unwrap();
    for policy in ["required", "implicit", "optional"] {
        let program = Service::serving(test).tls(policy);
        let words = program.command_line();
        assert!(
            !words.iter().any(|word| ["--cert", "--key", "--cert-dir"]
                .iter()
                .any(|it| word == it)),
            "{words:?}"
        );
        let server = Server::start(test, Superserver::Tcpserver, &program);
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let offer = TlsOffer {
                versions: vec![version],
                ..TlsOffer::new(pki())
            };
            let mut client = server.connect();
            let processes = || server.sessions().first().copied();
            if policy == "implicit" {
                let processes = eventually("its process is there", || {
                    processes().filter(|found| found.launcher.is_some())
                });
                assert!(processes.keeper.is_none());
                client.handshake(&offer).unwrap();
                client.greeting();
            } else {
                client.greeting();
                // Launchers are all that it has started.
                let network = processes().unwrap().network;
                let found = Processes::of(network);
                assert!(
                    found.keeper.is_none() && found.opener.is_none(),
                    "{found:?}"
                );
                assert!(
                    network
                        .children()
                        .iter()
                        .all(|child| child.status().numbers("Uid")[0] != KEEPER_ID)
                );
                client.starttls_with(&offer);
            }
            client.login();
            // Neither the backend nor who was to become it has the way to the keeper.
            let last = test.record().backends().len() - 1;
            let descriptors = test.record().backend(last).descriptors();
            assert_eq!(descriptors.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
            assert!(client.command("a SELECT INBOX").is_ok());
            assert_eq!(client.tls().protocol_version(), Some(version.version));
            assert_eq!(shown(&mut client), der(pki()));
            client.log_out();
            eventually("the session is over", || {
                server.sessions().is_empty().then_some(())
            });
        }
    }
    assert_eq!(service.keeper(), Some(keeper));
}

/// Whether a session was resumed, as the client and the log have it.
fn visit(program: &Program, offer: &TlsOffer, policy: &str) -> bool {
    let mut session = program.clone().tls(policy).start();
    let client = session.client();
    if policy == "implicit" {
        client.handshake(offer).unwrap();
        client.greeting();
        client.login();
    } else {
        client.log_in_by_starttls_with(offer);
    }
    // Tickets of TLS 1.3 are here with the answer.
    let is_resumed = client.tls().handshake_kind() == Some(HandshakeKind::Resumed);
    log_out_with(session, is_resumed)
}

fn log_out_with(mut session: Session, is_resumed: bool) -> bool {
    session.take_client().log_out();
    session.wait();
    let said = session.session_line()["resumed"].clone();
    assert_eq!(said, if is_resumed { "yes" } else { "no" });
    is_resumed
}

fn with_tickets(test: &Test) -> Service {
    let program = Service::keeping(test).option("--ticket-keys", test.path("tickets"));
    Service::start(test, &program)
}

fn remembering(version: &'static rustls::SupportedProtocolVersion) -> TlsOffer {
    TlsOffer {
        memory: Some(Memory::default()),
        versions: vec![version],
        ..TlsOffer::new(pki())
    }
}

fn resumption(test: &Test) {
    let service = with_tickets(test);
    let program = Service::serving(test);
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let offer = remembering(version);
        assert!(!visit(&program, &offer, "required"));
        assert!(visit(&program, &offer, "required"));
        service.reload();
        assert!(visit(&program, &offer, "required"));
    }
    // Without ticket keys of the service's there are none.
    drop(service);
    let _service = start(test);
    let offer = remembering(&rustls::version::TLS13);
    assert!(!visit(&program, &offer, "required"));
    assert!(!visit(&program, &offer, "required"));
}

fn binding(test: &Test) {
    let _service = with_tickets(test);
    let program = Service::serving(test);
    let authority = Authority::make(&test.path("clients"), "client CA");
    let asking = program
        .clone()
        .option("--client-ca", &authority.file)
        .option("--client-cert", "request");
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        for (first, second) in [
            ("implicit", "required"),
            ("required", "implicit"),
            ("optional", "required"),
        ] {
            let offer = remembering(version);
            assert!(!visit(&program, &offer, first));
            assert!(!visit(&program, &offer, second), "{first}, {second}");
        }
        let offer = remembering(version);
        assert!(!visit(&program, &offer, "required"));
        assert!(!visit(&asking, &offer, "required"));
    }
}

fn keys(test: &Test) {
    let service = with_tickets(test);
    let early = greeted(test);
    let late = logged_in(test);
    late.wait_idle();
    let mut others = vec![service.process()];
    for session in [&early, &late] {
        let processes = session.processes();
        assert!(processes.keeper.is_none());
        others.push(processes.network);
        others.extend(processes.launcher);
        others.extend(processes.backend);
    }
    assert_keys_are_held_by(service.keeper().unwrap(), &test.path("tickets"), &others);
    log_out(late);
}

fn confined(test: &Test) {
    let service = start(test);
    let mut early = greeted(test);
    let keeper = service.keeper().unwrap();
    let status = keeper.status();
    assert_eq!(status.numbers("Uid"), [KEEPER_ID; 4]);
    assert!(status.numbers("Gid").iter().all(|gid| *gid != 0));
    assert!(status.numbers("Groups").is_empty());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status.mask(set), 0, "{set}");
    }
    assert_eq!(
        (status.field("NoNewPrivs"), status.field("Seccomp")),
        ("1", "2")
    );
    assert_eq!(keeper.root(), test.empty_dir());
    assert_eq!(keeper.cwd(), test.empty_dir());
    for name in ["Max core file size", "Max processes"] {
        assert_eq!(
            keeper.limit(name),
            ("0".to_owned(), "0".to_owned()),
            "{name}"
        );
    }
    // Who came to it is confined as those who have a keeper of their own.
    crate::process::assert_confined(test, early.network(), NETWORK_ID);
    // The parent keeps its rights, for the next keeper, and hears nobody: there is no connection among its descriptors.
    assert_eq!(service.process().status().numbers("Uid"), [0; 4]);
    assert_eq!(service.process().children(), [keeper]);
    let shared = sockets_of(service.process());
    let own = || sockets_of(keeper).difference(&shared).count();
    // The other end of the parent's, and the asker's.
    assert_eq!(own(), 2);
    let metadata = std::fs::symlink_metadata(Service::socket(test)).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.mode() & 0o7777, 0o600);
    assert_eq!((metadata.uid(), metadata.gid()), (0, 0));
    log_in(&mut early);
    // Handshake over: it has let go.
    eventually("nobody asks any more", || (own() == 1).then_some(()));
    log_out(early);
}

/// With the same capabilities: a process may be looked at by whoever has as many, unless it forbids it (ptrace(2)).
fn untraceable(test: &Test) {
    const AS_A_UNIT_DOES: [&str; 2] = ["--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"];
    let program = Service::keeping(test);
    let start = |command: Vec<std::ffi::OsString>| {
        let tool = Tool::new(test, "setpriv").args(AS_A_UNIT_DOES);
        let variables = program.environment().clone();
        tool.envs(variables).args(command).start()
    };
    let can_be_looked_at = |process: Process| {
        let root = format!("/proc/{}/root/etc", process.0);
        let tool = Tool::new(test, "setpriv").args(AS_A_UNIT_DOES);
        tool.args(["ls", &root]).run().status.success()
    };
    let service = start(program.command_line());
    eventually("the service is ready", || {
        service.log().contains("keeping keys").then_some(())
    });
    let other = start(vec!["sleep".into(), "100".into()]);
    eventually("else this would prove nothing", || {
        can_be_looked_at(other.process()).then_some(())
    });
    assert!(!can_be_looked_at(service.process()));
}

fn sockets_of(process: Process) -> BTreeSet<String> {
    let all = process.descriptors().into_values();
    all.filter(|target| target.starts_with("socket:")).collect()
}

/// The program as this plain user starts it.
fn as_plain_user(program: Program, user: u32) -> Program {
    ["--user", "--group", "--keeper-user", "--chroot"]
        .iter()
        .fold(program, |program, name| program.without(name))
        .flag("--unprivileged")
        .started_by(user)
}

fn another_user(test: &Test) {
    let service = start(test);
    let log = turned_away(&as_plain_user(Service::serving(test), 61_003), 100);
    let wanted = format!(
        "cannot reach the keeper at '{}' (--keeper): Permission denied",
        Service::socket(test).display()
    );
    assert!(log.contains(&wanted), "{log}");
    assert!(test.record().is_empty());
    assert!(service.keeper().is_some());
}

/// A socket for messages, bound there and not listened on.
fn bound(path: &Path) -> OwnedFd {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    bind(socket.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    socket
}

fn stranger(test: &Test) {
    const USER: u32 = 61_003;
    let socket = bound(&Service::socket(test));
    assert_eq!(sys::as_user(USER, sys::try_listen, socket.as_raw_fd()), 0);
    let log = turned_away(&Service::serving(test), 100);
    let wanted = format!("(--keeper) belongs to uid {USER}, who is not to be trusted with it");
    assert!(log.contains(&wanted), "{log}");
    assert!(test.record().is_empty());
    // A port for TLS hears nothing that is not TLS.
    let mut session = Service::serving(test).tls("implicit").start();
    assert_eq!(session.client().read_to_end().0, b"");
    session.close_client();
    assert_eq!(session.wait_code(), 100);
    // Nothing was said to it.
    let taken = accept(&socket);
    let mut buffer = [0; 16];
    assert_eq!(
        recv(taken.as_raw_fd(), &mut buffer, MsgFlags::empty()),
        Ok(0)
    );
}

fn accept(socket: &OwnedFd) -> OwnedFd {
    let listener = std::os::unix::net::UnixListener::from(socket.try_clone().unwrap());
    listener.accept().unwrap().0.into()
}

fn absent(test: &Test) {
    let path = Service::socket(test);
    let program = Service::serving(test);
    let wanted = |why: &str| {
        format!(
            "cannot reach the keeper at '{}' (--keeper): {why}: is it running",
            path.display()
        )
    };
    let log = turned_away(&program, 111);
    assert!(log.contains(&wanted("No such file or directory")), "{log}");
    // Nobody listens.
    drop(bound(&path));
    let log = turned_away(&program, 111);
    assert!(log.contains(&wanted("Connection refused")), "{log}");
    // It is another kind of socket.
    std::fs::remove_file(&path).unwrap();
    let _stream = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let log = turned_away(&program, 100);
    assert!(log.contains("(--keeper): "), "{log}");
    assert!(test.record().is_empty());
    let mut session = program.tls("implicit").start();
    assert_eq!(session.client().read_to_end().0, b"");
    session.close_client();
    assert_eq!(session.wait_code(), 100);
}

/// After ten seconds, whether it does not let in or says nothing.
fn unresponsive(test: &Test) {
    let service = start(test);
    let full = test.path("full.sock");
    let socket = bound(&full);
    assert_eq!(sys::try_listen(socket.as_raw_fd()), 0);
    let waiting: Vec<OwnedFd> = std::iter::from_fn(|| come_without_waiting(&full)).collect();
    let keeper = service.keeper().unwrap();
    sys::kill(keeper.0, libc::SIGSTOP).unwrap();
    let began = Instant::now();
    let programs = [
        (Service::serving(test), "no answer from the keeper: "),
        (
            Service::serving(test).option("--keeper", &full),
            ": it does not keep up",
        ),
    ];
    std::thread::scope(|scope| {
        for (program, says) in &programs {
            scope.spawn(move || {
                let log = turned_away(program, 111);
                assert!(log.contains(says), "{log}");
                let waited = began.elapsed();
                assert!(waited >= Duration::from_secs(9), "{says}: {waited:?}");
            });
        }
    });
    sys::kill(keeper.0, libc::SIGCONT).unwrap();
    serve(test);
    drop(waiting);
}

/// One more who has come there, if there is room.
fn come_without_waiting(path: &Path) -> Option<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let address = UnixAddr::new(path).unwrap();
    connect(socket.as_raw_fd(), &address).ok().map(|()| socket)
}

fn gone(test: &Test) {
    let mut service = start(test);
    let mut early = greeted(test);
    let late = logged_in(test);
    let keeper = service.keeper().unwrap();
    service.signal(libc::SIGKILL);
    sys::kill(keeper.0, libc::SIGKILL).unwrap();
    service.wait();
    early.wait_log("the keeper has ended");
    let reply = early.client().command("a LOGIN u sekret");
    assert!(reply.status().starts_with("NO [PRIVACYREQUIRED]"));
    let reply = early.client().command("b STARTTLS");
    assert!(reply.status().starts_with("NO "), "{reply:?}");
    let (rest, _) = early.client().read_to_end();
    assert!(rest.starts_with(b"* BYE [UNAVAILABLE] "), "{rest:?}");
    early.close_client();
    assert_eq!(early.wait_code(), 111);
    log_out(late);
}

fn reload(test: &Test) {
    let other = Pki::make(&test.path("pki"), Key::P384, |_| {});
    let links = Links(test);
    links.point(pki());
    let service = Service::start(test, &links.keeping());
    let keeper = service.keeper().unwrap();
    let late = logged_in(test);
    let mut early = greeted(test);
    links.point(&other);
    // Nothing is read before it is asked for.
    assert_eq!(shown_now(test), der(pki()));
    service.reload();
    service.wait_log("imap-tls: reloaded");
    assert_eq!(shown_now(test), der(&other));
    assert_eq!(service.keepers().len(), 2);
    // Who had begun goes on, with the keeper from before.
    log_in(&mut early);
    assert_eq!(shown(early.client()), der(pki()));
    eventually("the keeper from before is gone", || {
        (!keeper.alive()).then_some(())
    });
    log_out(early);
    log_out(late);
    eventually("one keeper is left", || service.keeper());
    let log = service.log();
    assert!(!log.contains("another is started"), "{log}");
}

fn broken_reload(test: &Test) {
    let links = Links(test);
    links.point(pki());
    let service = Service::start(test, &links.keeping());
    let keeper = service.keeper().unwrap();
    let mut early = greeted(test);
    let broken = Pki::make(&test.path("broken"), Key::P256, |_| {});
    write_file(&broken.cert, "nonsense", 0o644);
    links.point(&broken);
    service.reload();
    let line = service.wait_log("nothing was renewed, and the keeper stays as it was: ");
    assert!(line.contains("(--cert)"), "{line}");
    assert_eq!(shown_now(test), der(pki()));
    // Neither does one that fits no key.
    let [one, other] = ["one", "other"].map(|name| Pki::make(&test.path(name), Key::P256, |_| {}));
    std::fs::copy(&other.cert, &one.cert).unwrap();
    links.point(&one);
    service.reload();
    assert_eq!(shown_now(test), der(pki()));
    assert_eq!(service.keeper(), Some(keeper));
    log_in(&mut early);
    log_out(early);
    let log = service.log();
    assert_eq!(log.matches("nothing was renewed").count(), 2, "{log}");
    links.point(&other_whole(test));
    service.reload();
    assert_ne!(shown_now(test), der(pki()));
}

fn other_whole(test: &Test) -> Pki {
    Pki::make(&test.path("whole"), Key::P256, |_| {})
}

fn settings(test: &Test) {
    let path = test.path("settings");
    let set = |text: &str| write_file(&path, text, 0o644);
    let (first, second) = (Service::socket(test), test.path("other.sock"));
    let keeper = |socket: &Path| format!("IMAP_TLS_KEEPER={}\n", socket.display());
    set(&(keeper(&first) + "IMAP_TLS_TLS=required\nIMAP_TLS_BACKEND=imapd\n"));
    let program = Service::keeping(test)
        .without("--keeper")
        .option("--settings", &path);
    let service = Service::start(test, &program);
    // The same file will do for both sides, certificates and all.
    let serving = Program::new(test)
        .without("--keeper")
        .option("--settings", &path);
    let mut session = serving.start();
    session.client().log_in_by_starttls(pki());
    assert!(session.processes().keeper.is_none());
    log_out(session);
    set(&(keeper(&second) + "IMAP_TLS_VERBOSE=yes\nIMAP_TLS_LOG=syslog\n"));
    service.reload();
    for option in ["--keeper", "--log"] {
        service.wait_log(&format!("{option} has changed, which takes a restart"));
    }
    assert!(!second.exists());
    serve(test);
    for (text, wanted) in [
        (
            "IMAP_TLS_NONSENSE=1\n",
            "there is no setting IMAP_TLS_NONSENSE",
        ),
        ("no assignment\n", "line 1 of settings"),
    ] {
        set(text);
        service.reload();
        service.wait_log(wanted);
        serve(test);
    }
}

fn reload_under_load(test: &Test) {
    const RELOADS: usize = 30;
    let other = other_whole(test);
    let both = [pki(), &other];
    let links = Links(test);
    links.point(both[0]);
    let service = Service::start(test, &links.keeping());
    let open = service.process().descriptors().len();
    let is_over = AtomicBool::new(false);
    let served = AtomicUsize::new(0);
    let certificates = Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    certificates.lock().unwrap().insert(shown_now(test));
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for number in 1..=RELOADS {
            links.point(both[number % 2]);
            let before = served.load(Ordering::Relaxed);
            service.reload();
            eventually("somebody is served", || {
                (served.load(Ordering::Relaxed) > before).then_some(())
            });
        }
        is_over.store(true, Ordering::Relaxed);
    });
    assert_eq!(
        certificates.into_inner().unwrap().len(),
        2,
        "both were shown"
    );
    eventually("one keeper is left", || service.keeper());
    assert_eq!(service.process().descriptors().len(), open);
}

fn renewal(test: &Test) {
    let links = Links(test);
    links.point(pki());
    let service = Service::start(test, &links.keeping().option("--renewal", "1"));
    let mut early = greeted(test);
    let other = other_whole(test);
    links.point(&other);
    eventually("the other certificate is shown", || {
        (shown_now(test) == der(&other)).then_some(())
    });
    log_in(&mut early);
    assert_eq!(shown(early.client()), der(pki()));
    log_out(early);
    // A broken one does no harm.
    std::fs::remove_file(test.path("key")).unwrap();
    service.wait_log("nothing was renewed, and the keeper stays as it was: ");
    assert_eq!(shown_now(test), der(&other));
}

fn keeper_killed(test: &Test) {
    let service = start(test);
    let late = logged_in(test);
    let mut early = greeted(test);
    for _ in 0..3 {
        let keeper = eventually("there is a keeper", || service.keeper());
        sys::kill(keeper.0, libc::SIGKILL).unwrap();
        service.wait_log(&format!("keeper {}: SIGKILL: another is started", keeper.0));
        // Who comes meanwhile waits for the next one.
        serve(test);
    }
    early.wait_log("the keeper has ended");
    let reply = early.client().command("a STARTTLS");
    assert!(reply.status().starts_with("NO "), "{reply:?}");
    early.close_client();
    assert_eq!(early.wait_code(), 111);
    log_out(late);
    assert_eq!(service.process().children().len(), 1);
}

/// Who comes meanwhile waits outside, for longer than the pause between attempts.
fn keeper_killed_for_long(test: &Test) {
    let links = Links(test);
    links.point(pki());
    let mut service = Service::start(test, &links.keeping().option("--renewal", "1"));
    // Not one that is about to be replaced.
    let kill = |service: &Service| {
        let keeper = eventually("there is one keeper", || service.keeper());
        sys::kill(keeper.0, libc::SIGKILL).unwrap();
    };
    std::fs::remove_file(test.path("cert")).unwrap();
    kill(&service);
    service.wait_log("nothing was renewed, and there is no keeper: ");
    let mut waiting = Service::serving(test).start();
    // There is nobody to greet it before.
    assert!(waiting.client().is_quiet_for(Duration::from_millis(200)));
    links.point(pki());
    waiting.client().log_in_by_starttls(pki());
    log_out(waiting);
    // Without a keeper, too, it can be told to end.
    std::fs::remove_file(test.path("cert")).unwrap();
    let failures = |log: &str| log.matches("there is no keeper: ").count();
    let before = failures(&service.log());
    kill(&service);
    eventually("there is none again", || {
        (failures(&service.log()) > before).then_some(())
    });
    service.signal(libc::SIGTERM);
    assert_eq!(service.wait().code(), Some(0));
    assert!(!Service::socket(test).exists());
}

fn drain(test: &Test) {
    let program = Service::keeping(test).option("--drain-timeout", "3600");
    let mut service = Service::start(test, &program);
    let late = logged_in(test);
    let mut early = greeted(test);
    service.signal(libc::SIGTERM);
    eventually("the socket is gone", || {
        (!Service::socket(test).exists()).then_some(())
    });
    turned_away(&Service::serving(test), 111);
    // SIGHUP has no meaning any more.
    service.signal(libc::SIGHUP);
    assert!(early.client().command("a NOOP").is_ok());
    assert!(!service.has_ended());
    log_in(&mut early);
    assert_eq!(service.wait().code(), Some(0), "{}", service.log());
    log_out(early);
    log_out(late);
    assert!(!service.log().contains("killed"), "{}", service.log());
    // Where nobody is there it ends at once; by the other signal, too.
    let mut service = start(test);
    service.signal(libc::SIGINT);
    assert_eq!(service.wait().code(), Some(0));
    assert!(!Service::socket(test).exists());
}

fn drain_is_over(test: &Test) {
    for (limit, signals) in [("3600", 2), ("1", 1)] {
        let program = Service::keeping(test).option("--drain-timeout", limit);
        let mut service = Service::start(test, &program);
        let mut early = greeted(test);
        service.signal(libc::SIGTERM);
        eventually("the socket is gone", || {
            (!Service::socket(test).exists()).then_some(())
        });
        if signals > 1 {
            service.signal(libc::SIGTERM);
        }
        assert_eq!(service.wait().code(), Some(0));
        let log = service.log();
        assert!(
            log.contains("killed: clients that are not inside TLS have not let go"),
            "{log}"
        );
        early.wait_log("the keeper has ended");
        let reply = early.client().command("a STARTTLS");
        assert!(reply.status().starts_with("NO "), "{reply:?}");
        early.close_client();
        early.wait();
    }
}

fn parent_killed(test: &Test) {
    let mut service = start(test);
    let late = logged_in(test);
    let mut early = greeted(test);
    let keeper = service.keeper().unwrap();
    service.signal(libc::SIGKILL);
    service.wait();
    // It lets nobody in any more.
    eventually("there is nobody to come to", || {
        let error = Asker::try_connect(test).err();
        (error == Some(nix::errno::Errno::ECONNREFUSED)).then_some(())
    });
    assert!(keeper.alive());
    let other = start(test);
    serve(test);
    log_in(&mut early);
    eventually("the keeper has nobody left", || {
        (!keeper.alive()).then_some(())
    });
    log_out(early);
    log_out(late);
    drop(other);
}

fn second_start(test: &Test) {
    let mut service = start(test);
    let refused = |says: &str| {
        let output = Service::keeping(test).run();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(100), "{text}");
        let wanted = format!("(--keeper): {says}");
        assert!(text.contains(&wanted), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
    };
    refused("Address already in use");
    // Which has not disturbed it.
    serve(test);
    let keeper = service.keeper().unwrap();
    service.signal(libc::SIGKILL);
    service.wait();
    eventually("the keeper has nobody left", || {
        (!keeper.alive()).then_some(())
    });
    assert!(Service::socket(test).exists(), "it is left behind");
    let mut service = start(test);
    serve(test);
    service.signal(libc::SIGTERM);
    assert_eq!(service.wait().code(), Some(0));
    // What is no socket stays.
    write_file(&Service::socket(test), "precious", 0o644);
    refused("Address already in use");
    let text = std::fs::read(Service::socket(test)).unwrap();
    assert_eq!(text, b"precious");
}

fn most(test: &Test) {
    let program = Service::keeping(test).option("--max-connections", "1");
    let service = Service::start(test, &program);
    let mut first = greeted(test);
    let mut others: Vec<Session> = (0..3).map(|_| Service::serving(test).start()).collect();
    for other in &mut others {
        assert!(other.client().is_quiet_for(Duration::from_millis(200)));
    }
    log_in(&mut first);
    let mut sessions = vec![first];
    // One after the other, in the order of their coming, which is not known here.
    while !others.is_empty() {
        let ready = eventually("one is greeted", || {
            let mut clients = others.iter_mut();
            clients.position(|other| !other.client().is_quiet_for(Duration::from_millis(5)))
        });
        let mut next = others.remove(ready);
        next.client().log_in_by_starttls(pki());
        sessions.push(next);
    }
    sessions.into_iter().for_each(log_out);
    let log = service.log();
    assert_eq!(log.lines().count(), 1, "{log}");
}

fn too_few_descriptors(test: &Test) {
    // A keeper needs 64 itself.
    let start = |limit: u32, most: &str| {
        let program = Service::keeping(test).option("--max-connections", most);
        let running = Tool::new(test, "prlimit")
            .arg(format!("--nofile={limit}"))
            .args(program.command_line())
            .envs(program.environment().clone())
            .start();
        eventually("the service lets network processes in", || {
            running.log().contains("keeping keys for").then_some(())
        });
        running
    };
    let warning = |room: u32, most: u32| {
        format!(
            "there is room for {room} at a time, not for {most} (--max-connections): the limit on open files is too low (ulimit -n, LimitNOFILE=)"
        )
    };
    let running = start(66, "1000");
    let log = running.log();
    assert!(log.contains(&warning(2, 1000)), "{log}");
    // And it is so.
    let mut first = greeted(test);
    let other = greeted(test);
    let mut third = Service::serving(test).start();
    assert!(third.client().is_quiet_for(Duration::from_millis(200)));
    log_in(&mut first);
    log_in(&mut third);
    [first, third].into_iter().for_each(log_out);
    drop(other);
    drop(running);
    let log = start(66, "2").log();
    assert!(!log.contains("there is room"), "{log}");
}

/// Who waits outside is the next keeper's, and no reason for the one before to look again and again.
fn retired_is_idle(test: &Test) {
    let program = Service::keeping(test)
        .option("--max-connections", "2")
        .option("--drain-timeout", "3600");
    let mut service = Service::start(test, &program);
    let retired = service.keeper().unwrap();
    // It still has room when it is told to let nobody in any more.
    let early = greeted(test);
    service.reload();
    // The new keeper has all that it may have, and one is outside.
    let others = [greeted(test), greeted(test)];
    let mut outside = Service::serving(test).start();
    let ticks = retired.ticks();
    assert!(outside.client().is_quiet_for(Duration::from_secs(1)));
    let used = retired.ticks() - ticks;
    assert!(used < 20, "{used} hundredths of a second of one");
    for mut session in others.into_iter().chain([early]) {
        log_in(&mut session);
        log_out(session);
    }
    outside.client().log_in_by_starttls(pki());
    log_out(outside);
    service.signal(libc::SIGTERM);
    assert_eq!(service.wait().code(), Some(0));
}

/// One who comes to the socket as a network process does.
struct Asker(OwnedFd);

impl Asker {
    fn try_connect(test: &Test) -> nix::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(20))?;
        let address = UnixAddr::new(&Service::socket(test))?;
        connect(socket.as_raw_fd(), &address)?;
        Ok(Self(socket))
    }

    fn connect(test: &Test) -> Self {
        Self::try_connect(test).unwrap()
    }

    /// One that has begun.
    fn begin(test: &Test) -> Self {
        let asker = Self::connect(test);
        asker.say(BEGIN);
        let introduction = asker.hear().unwrap();
        let certificate = der(pki());
        assert!(sys::contains(&introduction, &certificate));
        asker
    }

    /// It may have been let go of already.
    fn say(&self, message: &[u8]) {
        let _ = send(self.0.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL);
    }

    /// The next message, or nothing at the end.
    fn hear(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 256 << 10];
        match recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            // What it had not read when it closed is told so.
            Ok(0) | Err(nix::errno::Errno::ECONNRESET) => None,
            Ok(length) => Some(buffer[..length].to_vec()),
            Err(error) => panic!("recv: {error}"),
        }
    }
}

// Messages by their first octet (src/keeper/message.rs).
const BEGIN: &[u8] = b"\x05r";
const REFUSED: &[u8] = &[0];
const SIGNED: u8 = 4;
const SEALED: u8 = 3;

/// A request for a signature that a TLS 1.3 server needs.
fn sign_request() -> Vec<u8> {
    let input = [
        &[b' '; 64][..],
        b"TLS 1.3, server CertificateVerify\0",
        &[7; 32],
    ];
    [&b"\x04\0\x04\x03"[..], &input.concat()].concat()
}

fn hostile(test: &Test) {
    let service = with_tickets(test);
    let keeper = service.keeper().unwrap();
    let mut early = greeted(test);
    let before = keeper.descriptors().len();
    // Without a beginning.
    let too_long = vec![5; 100_000];
    let long_binding = [&b"\x05"[..], &[b'r'; 34]].concat();
    for first in [
        &b"\xff garbage"[..],
        b"\0",
        b"\x01mail.example",
        b"\x02\0ticket",
        b"\x03\0session",
        &sign_request(),
        &too_long,
        &long_binding,
    ] {
        let asker = Asker::connect(test);
        asker.say(first);
        assert_eq!(asker.hear().as_deref(), Some(REFUSED), "{:?}", &first[..1]);
        asker.say(BEGIN);
        assert_eq!(asker.hear(), None, "{:?}", &first[..1]);
    }
    // With one.
    let other_scheme = [&b"\x04\0\x08\x04"[..], &sign_request()[4..]].concat();
    let other_key = [&b"\x04\x01\x04\x03"[..], &sign_request()[4..]].concat();
    let no_server = sign_request()
        .iter()
        .map(|octet| octet.to_ascii_lowercase())
        .collect::<Vec<u8>>();
    for second in [
        BEGIN,
        b"\x05i",
        b"\xff garbage",
        b"\x04\0\x04\x03 no signature of TLS",
        &other_scheme,
        &other_key,
        &no_server,
        &too_long,
    ] {
        let asker = Asker::begin(test);
        asker.say(second);
        assert_eq!(asker.hear().as_deref(), Some(REFUSED), "{:?}", &second[..2]);
        asker.say(&sign_request());
        assert_eq!(asker.hear(), None, "{:?}", &second[..2]);
    }
    // One signature, and no second; four tickets, and no fifth.
    let asker = Asker::begin(test);
    asker.say(&sign_request());
    assert_eq!(asker.hear().unwrap()[0], SIGNED);
    asker.say(&sign_request());
    assert_eq!(asker.hear().as_deref(), Some(REFUSED));
    assert_eq!(asker.hear(), None);
    let asker = Asker::begin(test);
    for _ in 0..4 {
        asker.say(b"\x03\0session");
        assert_eq!(asker.hear().unwrap()[0], SEALED);
    }
    asker.say(b"\x03\0session");
    assert_eq!(asker.hear().as_deref(), Some(REFUSED));
    assert_eq!(asker.hear(), None);
    // What one is bound to, it does not open for another.
    let (one, other) = (Asker::begin(test), Asker::connect(test));
    other.say(b"\x05i");
    assert!(other.hear().is_some());
    one.say(b"\x03\0session");
    let ticket = one.hear().unwrap();
    let open = [&b"\x02\0"[..], &ticket[1..]].concat();
    other.say(&open);
    assert_eq!(other.hear().as_deref(), Some(&[5][..]));
    one.say(&open);
    assert_eq!(one.hear().as_deref(), Some(&b"\x02session"[..]));
    // Many messages at once, and nobody who takes the answers.
    let deaf = Asker::connect(test);
    for _ in 0..200 {
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let _ = send(deaf.0.as_raw_fd(), BEGIN, flags);
    }
    // An empty message, which is like the end; half a connection; nothing at all.
    let empty = Asker::connect(test);
    empty.say(b"");
    assert_eq!(empty.hear(), None);
    let half = Asker::begin(test);
    nix::sys::socket::shutdown(half.0.as_raw_fd(), nix::sys::socket::Shutdown::Write).unwrap();
    assert_eq!(half.hear(), None);
    let silent = [Asker::connect(test), Asker::begin(test)];
    for _ in 0..50 {
        drop(Asker::connect(test));
        let asker = Asker::connect(test);
        asker.say(BEGIN);
    }
    serve(test);
    log_in(&mut early);
    log_out(early);
    drop((one, other, deaf, silent));
    assert_eq!(
        service.keeper(),
        Some(keeper),
        "it is the same all the time"
    );
    eventually("all have been let go of", || {
        (keeper.descriptors().len() < before).then_some(())
    });
    let log = service.log();
    assert_eq!(log.lines().count(), 1, "{log}");
}

fn crowd(test: &Test) {
    const MANY: usize = 300;
    let service = start(test);
    let keeper = service.keeper().unwrap();
    let crowd: Vec<Asker> = (0..MANY).map(|_| Asker::connect(test)).collect();
    serve(test);
    drop(crowd);
    serve(test);
    assert_eq!(service.keeper(), Some(keeper));
}

/// The report, which has no error or nothing but.
fn report(program: Program, status: i32) -> String {
    let output = program.flag("--check").run();
    let report = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(status), "{report}");
    assert_eq!(report.contains("error: "), status != 0, "{report}");
    report
}

#[track_caller]
fn assert_says(report: &str, all: &[&str]) {
    for wanted in all {
        let is_said = report.lines().any(|line| line.contains(wanted));
        assert!(is_said, "{wanted} is not in: {report}");
    }
}

fn check(test: &Test) {
    let place = Service::socket(test).display().to_string();
    let text = report(Service::keeping(test), 0);
    assert_says(
        &text,
        &[
            "ok: keeper: ",
            "ok: sandbox: chroot, ids, limits, no_new_privs and system call filter work",
            "ok: certificate and key: they match",
            "ok: certificate: it is for localhost, mail.example, 127.0.0.1, ::1",
            &format!("ok: keeper service: '{place}' (--keeper) can be listened on"),
        ],
    );
    // It serves nobody, and has not begun to listen.
    assert!(
        !text.contains("backend") && !text.contains("port: "),
        "{text}"
    );
    assert!(!Service::socket(test).exists());
    let service = with_tickets(test);
    let text = report(Service::keeping(test), 0);
    assert_says(
        &text,
        &[&format!(
            "ok: keeper service: '{place}' (--keeper) is listened on"
        )],
    );
    let text = report(Service::serving(test), 0);
    assert_says(
        &text,
        &[
            &format!("ok: keeper service: '{place}' answers: "),
            "ok: certificate: it is for localhost, mail.example, 127.0.0.1, ::1",
            "ok: tickets: sessions are resumed",
            "ok: TLS: can be set up with these options",
            "ok: backend: it greets: * OK ",
        ],
    );
    assert!(!text.contains("certificate and key"), "{text}");
    let output = Service::serving(test).flag("--check=json").run();
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = findings.as_array().unwrap();
    let mut subjects = findings.iter().map(|finding| finding["subject"].as_str());
    assert!(subjects.any(|subject| subject == Some("keeper service")));
    assert!(service.keeper().is_some());
    let text = report(Service::keeping(test).without("--keeper"), 0);
    assert_says(
        &text,
        &[
            "warning: keeper service: no --keeper SOCKET: that is right only where systemd listens for it",
        ],
    );
    test.record().release();
}

fn check_faults(test: &Test) {
    let place = Service::socket(test).display().to_string();
    let text = report(Service::serving(test), 100);
    assert_says(
        &text,
        &[&format!(
            "error: keeper service: cannot reach the keeper at '{place}' (--keeper): No such file or directory: is it running"
        )],
    );
    for (program, says) in [
        (
            Service::keeping(test).option("--key", test.path("none")),
            "error: certificate and key: cannot read private key",
        ),
        (
            Service::keeping(test).option("--keeper", "/nonexistent/keeper.sock"),
            "error: keeper service: '/nonexistent/keeper.sock' (--keeper) cannot be listened on: No such file or directory",
        ),
        (
            Service::keeping(test).backend(["imapd"]),
            "--keep serves no clients, so there is no BACKEND to start",
        ),
        (
            Service::keeping(test).option("--keeper-user", "nobody-here"),
            "unknown user 'nobody-here' (--keeper-user)",
        ),
        (
            Service::keeping(test).without("--cert").without("--key"),
            "--cert",
        ),
    ] {
        assert_says(&report(program, 100), &[says]);
    }
    // Whose it is, on both sides.
    let socket = bound(&Service::socket(test));
    assert_eq!(sys::as_user(61_003, sys::try_listen, socket.as_raw_fd()), 0);
    for program in [Service::serving(test), Service::keeping(test)] {
        assert_says(&report(program, 100), &["(--keeper) belongs to uid 61003"]);
    }
    test.record().release();
}

fn usage(test: &Test) {
    let free = format!("127.0.0.1:{}", free_port());
    for (program, says) in [
        (
            Service::keeping(test).backend(["imapd"]),
            "--keep serves no clients, so there is no BACKEND to start",
        ),
        (
            Service::keeping(test).without("--keeper"),
            "--keep without --keeper SOCKET",
        ),
        (
            Service::serving(test).option("--listen", &free),
            "--keeper conflicts with --listen",
        ),
        (
            Service::keeping(test).option("--listen", &free),
            "--keeper conflicts with --listen",
        ),
        (
            Service::keeping(test).without("--cert").without("--key"),
            "--cert",
        ),
        (
            Service::keeping(test).option("--keeper", "/nonexistent/keeper.sock"),
            "cannot listen on '/nonexistent/keeper.sock' (--keeper): No such file or directory",
        ),
        (
            Service::keeping(test).option("--keeper", test.path(&"x".repeat(110))),
            "(--keeper): File name too long",
        ),
        (
            Service::keeping(test).option("--key", test.path("none")),
            "(--key)",
        ),
    ] {
        let output = program.run();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(100), "{text}");
        assert!(text.contains(says), "{says}: {text}");
        assert!(output.stdout.is_empty());
        // Also where a socket was made before something else was found to be wrong.
        assert!(!Service::socket(test).exists(), "{says}");
    }
}

fn under_superserver(test: &Test) {
    for (handover, stderr) in [
        (Handover::Stdio, Stderr::Log),
        (Handover::ListenFd, Stderr::Log),
        // As under inetd.
        (Handover::Stdio, Stderr::Client),
    ] {
        let mut session = Service::keeping(test).start_on(Socket::Tcp4, handover, stderr);
        assert_eq!(session.client().read_to_end().0, b"");
        session.close_client();
        assert_eq!(session.wait_code(), 100);
        if stderr == Stderr::Log {
            session.wait_log(
                "--keep, but a superserver has handed over a client's connection: keepers serve no clients",
            );
        }
        assert!(!Service::socket(test).exists());
    }
}

/// A directory with a certificate for one of the names.
fn with_names(test: &Test) -> (Program, Pki) {
    let other = Pki::make(&test.path("pki"), Key::P384, |_| {});
    let directory = test.path("names");
    make_dir(&directory, 0o755);
    let both = [&other.cert, &other.key].map(|path| std::fs::read(path).unwrap());
    write_file(&directory.join("mail.example.pem"), both.concat(), 0o600);
    let program = Service::keeping(test).option("--cert-dir", directory);
    (program, other)
}

fn names(test: &Test) {
    let (program, other) = with_names(test);
    let service = Service::start(test, &program);
    let show = |name: &str, version| {
        let mut session = greeted(test);
        session.client().starttls_with(&TlsOffer {
            server_name: name.to_owned(),
            versions: vec![version],
            ..TlsOffer::new(pki())
        });
        let certificate = shown(session.client());
        session.client().login();
        log_out(session);
        certificate
    };
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        assert_eq!(show("mail.example", version), der(&other));
        assert_eq!(show("localhost", version), der(pki()));
    }
    let text = report(Service::serving(test), 0);
    assert_says(&text, &[", and more by name"]);
    // What is in the directory is found without a reload.
    let both = [&other.cert, &other.key].map(|path| std::fs::read(path).unwrap());
    write_file(
        &test.path("names").join("localhost.pem"),
        both.concat(),
        0o600,
    );
    assert_eq!(show("localhost", &rustls::version::TLS13), der(&other));
    service.reload();
    assert_eq!(show("mail.example", &rustls::version::TLS13), der(&other));
    eventually("a keeper and an opener are left", || {
        (service.process().children().len() == 2).then_some(())
    });
    test.record().release();
}

fn opener_killed(test: &Test) {
    let (program, other) = with_names(test);
    let service = Service::start(test, &program);
    let late = logged_in(test);
    let keeper = service.keeper().unwrap();
    let children = service.process().children().into_iter();
    let openers: Vec<_> = children.filter(|child| *child != keeper).collect();
    assert_eq!(openers.len(), 1, "{openers:?}");
    sys::kill(openers[0].0, libc::SIGKILL).unwrap();
    eventually("there is another keeper", || {
        // It finds out when somebody asks for a name.
        let mut session = Service::serving(test).start();
        let client = session.client();
        client.greeting();
        if client.command("a STARTTLS").is_ok() {
            let offer = TlsOffer {
                server_name: "mail.example".to_owned(),
                ..TlsOffer::new(pki())
            };
            let _ = client
                .handshake(&offer)
                .map(|()| assert_eq!(shown(client), der(&other)));
        }
        drop(session);
        service.keeper().filter(|other| *other != keeper)
    });
    log_out(late);
    serve(test);
    eventually("a keeper and an opener are left", || {
        (service.process().children().len() == 2).then_some(())
    });
}

fn systemd(test: &Test, arguments: &[&str], sockets: &[&Path], program: &Program) -> tool::Running {
    let mut tool = Tool::new(test, "systemd-socket-activate").args(arguments);
    for socket in sockets {
        tool = tool.arg("-l").arg(socket);
    }
    for (name, value) in program.environment() {
        tool = tool.args(["-E", &format!("{name}={}", value.to_str().unwrap())]);
    }
    let running = tool.args(program.command_line()).start();
    eventually("systemd listens", || {
        let mut sockets = sockets.iter();
        sockets
            .all(|socket| service::is_listened_on(socket))
            .then_some(())
    });
    running
}

fn inherited(test: &Test) {
    let path = Service::socket(test);
    for program in [
        Service::keeping(test).without("--keeper"),
        // As in settings for both sides.
        Service::keeping(test),
    ] {
        let mut running = systemd(test, &["--seqpacket"], &[&path], &program);
        // The first who comes has it started, and waits.
        serve(test);
        let log = running.log();
        let wanted = format!("keeping keys for those who come to unix:{}", path.display());
        assert!(log.contains(&wanted), "{log}");
        let mut early = greeted(test);
        sys::kill(running.process().0, libc::SIGHUP).unwrap();
        eventually("it has reloaded", || {
            running.log().contains("imap-tls: reloaded").then_some(())
        });
        serve(test);
        sys::kill(running.process().0, libc::SIGTERM).unwrap();
        log_in(&mut early);
        log_out(early);
        assert_eq!(running.wait().code(), Some(0), "{}", running.log());
        // It is not its own.
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
    }
}

fn inherited_wrongly(test: &Test) {
    let (path, other) = (Service::socket(test), test.path("other.sock"));
    let program = Service::keeping(test).without("--keeper");
    let mut running = systemd(test, &[], &[&path], &program);
    let _client = UnixStream::connect(&path).unwrap();
    assert_eq!(running.wait().code(), Some(100));
    let wanted = "LISTEN_FDS: the keeper needs a socket of ListenSequentialPacket=";
    assert!(running.log().contains(wanted), "{}", running.log());
    std::fs::remove_file(&path).unwrap();
    let mut running = systemd(test, &["--seqpacket"], &[&path, &other], &program);
    let _asker = Asker::connect(test);
    assert_eq!(running.wait().code(), Some(100));
    let wanted = "LISTEN_FDS: the keeper needs one socket, and there are several";
    assert!(running.log().contains(wanted), "{}", running.log());
    // Nor does a listener go to it.
    std::fs::remove_file(&path).unwrap();
    let mut running = systemd(test, &[], &[&path], &Service::serving(test));
    let _client = UnixStream::connect(&path).unwrap();
    assert_eq!(running.wait().code(), Some(100));
    let wanted = "--keeper conflicts with listening: the listener has a keeper of its own";
    assert!(running.log().contains(wanted), "{}", running.log());
}

/// As systemd makes it where no SocketMode= is given, and where there is none to give.
fn inherited_for_everybody(test: &Test) {
    let path = Service::socket(test);
    let program = Service::keeping(test).without("--keeper");
    let mut running = systemd(test, &["--seqpacket"], &[&path], &program);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    let _asker = Asker::connect(test);
    assert_eq!(running.wait().code(), Some(100));
    let wanted = format!(
        "LISTEN_FDS: everybody may come to '{}' (mode 0666): the keeper needs SocketMode=0600",
        path.display()
    );
    assert!(running.log().contains(&wanted), "{}", running.log());
    let name = format!("imap-tls-keeper-{}", test.marker());
    let place = format!("@{name}");
    let mut running = systemd(test, &["--seqpacket"], &[Path::new(&place)], &program);
    let flags = SockFlag::SOCK_CLOEXEC;
    let asker = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
    let address = UnixAddr::new_abstract(name.as_bytes()).unwrap();
    connect(asker.as_raw_fd(), &address).unwrap();
    assert_eq!(running.wait().code(), Some(100));
    let wanted = "LISTEN_FDS: everybody may come to a socket that is no file";
    assert!(running.log().contains(wanted), "{}", running.log());
}

fn supervisor(test: &Test) {
    let supervisor = Supervisor::new(test);
    let mut service = Service::start(test, &supervisor.of(Service::keeping(test)));
    supervisor.wait_for("READY=1");
    for _ in 0..3 {
        supervisor.wait_for("WATCHDOG=1");
    }
    let keeper = service.keeper().unwrap().0;
    let early = greeted(test);
    service.signal(libc::SIGHUP);
    let message = supervisor.wait_for("RELOADING=1");
    assert!(message.contains("MONOTONIC_USEC="), "{message}");
    supervisor.wait_for("READY=1");
    let message = supervisor.wait_for("STATUS=keeper ");
    assert!(
        message.contains("; 1 before it are not over") && !message.contains(&keeper.to_string()),
        "{message}"
    );
    drop(early);
    eventually("the one before it is over", || {
        supervisor
            .wait_for("STATUS=keeper ")
            .contains("; 0 before it are not over")
            .then_some(())
    });
    service.signal(libc::SIGTERM);
    supervisor.wait_for("STOPPING=1");
    assert_eq!(service.wait().code(), Some(0));
}

/// Who has no root does without users, and goes to its own.
fn unprivileged(test: &Test) {
    const USER: u32 = 61_008;
    let pki = Pki::make(&test.path("pki"), Key::P256, |_| {});
    std::os::unix::fs::chown(&pki.key, Some(USER), Some(USER)).unwrap();
    let place = test.path("run");
    make_dir(&place, 0o755);
    std::os::unix::fs::chown(&place, Some(USER), Some(USER)).unwrap();
    let socket = place.join("keeper.sock");
    let keeping = Service::keeping(test).pki(&pki).option("--keeper", &socket);
    let mut keeping = as_plain_user(keeping, USER).start();
    keeping.wait_log("keeping keys for those who come to ");
    let metadata = std::fs::symlink_metadata(&socket).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (USER, 0o600));
    let serving = Service::serving(test).option("--keeper", &socket);
    let mut session = as_plain_user(serving.clone(), USER).start();
    session.client().log_in_by_starttls(&pki);
    log_out(session);
    // Root does not go there.
    let log = turned_away(&serving, 100);
    assert!(log.contains(&format!("belongs to uid {USER}")), "{log}");
    keeping.kill(keeping.network(), libc::SIGTERM);
    assert_eq!(keeping.wait_code(), 0);
    assert!(!socket.exists());
}
