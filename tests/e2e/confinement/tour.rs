//! A tour of all that the program does in its sandboxes, with every system call on the way.

use crate::harness::tracer::{
    self, CONNECTED, Cast, NAMES, ONE_LAUNCHER, Seen, Trace, Tracing, Wanted,
};
use crate::harness::*;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The confined processes, as casts call them.
pub(super) const NETWORK: &str = "network";
pub(super) const KEEPER: &str = "keeper";
pub(super) const SHARED_KEEPER: &str = "shared keeper";
pub(super) const KEEPER_SERVICE: &str = "keeper service";
pub(super) const OPENER: &str = "opener";

const TWO_LAUNCHERS: Cast = Cast {
    first: NETWORK,
    children: &[(NETWORK, &["launcher", "launcher", KEEPER])],
};
const LISTENER: Cast = Cast {
    first: "listener",
    children: &[
        ("listener", &[OPENER, SHARED_KEEPER, NETWORK]),
        (NETWORK, &["launcher"]),
    ],
};
/// Reloaded once.
const SERVICE: Cast = Cast {
    first: "service",
    children: &[("service", &[OPENER, KEEPER_SERVICE, OPENER, KEEPER_SERVICE])],
};
/// Of a connection that goes there.
const GUEST: Cast = Cast {
    first: NETWORK,
    children: &[(NETWORK, &["launcher"])],
};

/// Longer than any deadline of the tour's.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many stops are visited at once.
const AT_ONCE: usize = 6;
/// Of a bulk transfer, each way.
const BULK: u64 = 1 << 20;

/// How the tour is made.
pub(super) struct Tour<'a> {
    test: &'a Test,
    wanted: Wanted,
    environment: &'a [(&'a str, &'a str)],
    /// What is its own among the test's files.
    number: u32,
}

/// What was seen at one stop.
pub(super) struct Stop {
    pub(super) name: &'static str,
    pub(super) trace: Trace,
}

type Visit = fn(&Tour<'_>) -> (Session, Trace);

const STOPS: &[(&str, Visit)] = &[
    ("STARTTLS, bulk, and an idle client", starttls),
    ("implicit TLS 1.2", implicit),
    ("no TLS", cleartext),
    ("what is no handshake", no_handshake),
    ("a client that is too slow", too_slow),
    ("a client on pipes", pipes),
    ("the system log", system_log),
    ("a certificate for each name", names),
    (
        "a certificate for each name, without statx",
        names_on_old_kernel,
    ),
    ("a name that leads nowhere", no_such_name),
    ("resumption", resumption),
    ("client certificates", client_certificates),
    ("large certificates", large_certificates),
    ("a balancer", balancer),
    ("a backend that is connected to", connected),
    ("a network process that is stopped", stopped),
    ("a network process that is to end", terminated),
    ("the listener", listener),
    ("the keeper service", service),
    ("a client of the keeper service", guest),
];

impl<'a> Tour<'a> {
    /// With this in the program's environment.
    pub(super) fn new(
        test: &'a Test,
        wanted: Wanted,
        environment: &'a [(&'a str, &'a str)],
    ) -> Self {
        Self {
            test,
            wanted,
            environment,
            number: next_number(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.test.path(&format!("{}-{name}", self.number))
    }

    /// All stops, some at once: most of each one's time is waiting.
    pub(super) fn all(&self) -> Vec<Stop> {
        let next = AtomicUsize::new(0);
        let visit_some = || {
            let next = || STOPS.get(next.fetch_add(1, Ordering::Relaxed));
            let stops = std::iter::from_fn(next).map(|(name, visit)| {
                let (_, trace) = visit(self);
                Stop { name, trace }
            });
            stops.collect::<Vec<_>>()
        };
        std::thread::scope(|scope| {
            let visitors: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(visit_some)).collect();
            let stops = visitors
                .into_iter()
                .flat_map(|visitor| visitor.join().unwrap_or_else(|panic| resume_unwind(panic)));
            stops.collect()
        })
    }

    fn program(&self) -> Program {
        let program = Program::new(self.test);
        self.environment
            .iter()
            .fold(program, |program, (name, value)| program.env(name, value))
    }

    /// One connection; `talk` is the client.
    fn visit(
        &self,
        program: &Program,
        cast: Cast,
        talk: impl FnOnce(&mut Client, Process),
    ) -> (Session, Trace) {
        self.visit_by(program, cast, Program::start, talk)
    }

    /// The same; `begin` starts the program.
    fn visit_by(
        &self,
        program: &Program,
        cast: Cast,
        begin: impl FnOnce(&Program) -> Session + Send + 'static,
        talk: impl FnOnce(&mut Client, Process),
    ) -> (Session, Trace) {
        let (mut client, first, tracing) = tracer::start_by(program, cast, self.wanted, begin);
        let has = first.environment();
        for (name, value) in self.environment {
            assert!(has.contains(&format!("{name}={value}")), "{has:?}");
        }
        let talked = catch_unwind(AssertUnwindSafe(|| talk(&mut client, first)));
        drop(client);
        let (session, trace) = finish(tracing);
        if let Err(panic) = talked {
            eprintln!("{}{}", session.log(), deaths(&trace).join("\n"));
            resume_unwind(panic);
        }
        (session, trace)
    }
}

fn finish(tracing: Tracing) -> (Session, Trace) {
    let (session, trace, hung) = tracing.finish(PATIENCE);
    assert!(hung.is_empty(), "{hung:?} hung; log: {}", session.log());
    (session, trace)
}

/// Who died of a system call, and of which.
pub(super) fn deaths(trace: &Trace) -> Vec<String> {
    let ended = trace.ended.iter();
    let died = ended.filter(|ended| ended.status.signal() == Some(libc::SIGSYS));
    let words = died.map(|ended| {
        let mut made = trace.seen.iter().rev().map(|seen| seen.point);
        let last = made.find(|point| point.role == ended.role);
        format!(
            "{} died of call {:?}",
            ended.role,
            last.map(|point| point.call)
        )
    });
    words.collect()
}

impl Stop {
    /// The calls that were made beneath a filter.
    pub(super) fn confined(&self) -> impl Iterator<Item = &Seen> {
        self.trace.seen.iter().filter(|seen| seen.is_confined)
    }
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn log_out(client: &mut Client) {
    assert!(client.command("z LOGOUT").is_ok());
}

fn starttls(tour: &Tour<'_>) -> (Session, Trace) {
    tour.visit(&tour.program(), ONE_LAUNCHER, |client, _| {
        client.log_in_by_starttls(pki());
        // The network process gives its memory back meanwhile.
        assert!(client.is_quiet_for(Duration::from_millis(500)));
        assert!(client.command("a XECHO").is_ok());
        client.exchange(BULK, BULK);
        client.close_notify();
    })
}

fn implicit(tour: &Tour<'_>) -> (Session, Trace) {
    let program = tour.program().tls("implicit");
    tour.visit(&program, ONE_LAUNCHER, |client, _| {
        let offer = TlsOffer {
            versions: vec![&rustls::version::TLS12],
            ..TlsOffer::new(pki())
        };
        client.handshake(&offer).unwrap();
        client.greeting();
        client.login();
        log_out(client);
    })
}

fn cleartext(tour: &Tour<'_>) -> (Session, Trace) {
    let program = tour.program().tls("optional");
    tour.visit(&program, TWO_LAUNCHERS, |client, _| {
        client.greeting();
        client.login();
        assert!(client.command("a XECHO").is_ok());
        client.exchange(BULK, BULK);
        client.shutdown();
    })
}

fn no_handshake(tour: &Tour<'_>) -> (Session, Trace) {
    tour.visit(&tour.program(), ONE_LAUNCHER, |client, _| {
        client.greeting();
        assert!(client.command("a STARTTLS").is_ok());
        client.send_raw("b LOGIN u sekret\r\n");
        client.read_to_end();
    })
}

fn too_slow(tour: &Tour<'_>) -> (Session, Trace) {
    let program = tour.program().option("--login-timeout", "5");
    tour.visit(&program, ONE_LAUNCHER, |client, _| {
        client.greeting();
        let (said, _) = client.read_to_end();
        assert!(said.starts_with(b"* BYE "));
    })
}

fn pipes(tour: &Tour<'_>) -> (Session, Trace) {
    let start = |program: &Program| program.start_on(Socket::Pipes, Handover::Stdio, Stderr::Log);
    tour.visit_by(&tour.program(), ONE_LAUNCHER, start, |client, _| {
        client.log_in_by_starttls(pki());
        log_out(client);
    })
}

fn names(tour: &Tour<'_>) -> (Session, Trace) {
    let program = with_names(tour, "names");
    tour.visit(&program, NAMES, |client, _| {
        client.log_in_by_starttls(pki());
        log_out(client);
    })
}

/// In two files, and on a kernel that has no statx.
fn names_on_old_kernel(tour: &Tour<'_>) -> (Session, Trace) {
    let program = with_names(tour, "old");
    let start = |program: &Program| {
        Kernel::OURS.without_statx().enter();
        program.start()
    };
    tour.visit_by(&program, NAMES, start, |client, _| {
        let offer = TlsOffer {
            server_name: "mail.example".to_owned(),
            ..TlsOffer::new(pki())
        };
        client.log_in_by_starttls_with(&offer);
        log_out(client);
    })
}

fn no_such_name(tour: &Tour<'_>) -> (Session, Trace) {
    let program = with_names(tour, "none");
    tour.visit(&program, NAMES, |client, _| {
        client.greeting();
        assert!(client.command("a STARTTLS").is_ok());
        let offer = TlsOffer {
            server_name: "dangling.example".to_owned(),
            ..TlsOffer::new(pki())
        };
        assert!(client.handshake(&offer).is_err());
    })
}

fn with_names(tour: &Tour<'_>, name: &str) -> Program {
    let directory = tour.path(name);
    let in_two = directory.join("mail.example");
    for made in [&directory, &in_two] {
        make_dir(made, 0o755);
    }
    let [certificate, key] = [&pki().cert, &pki().key].map(|path| std::fs::read(path).unwrap());
    write_file(&in_two.join("fullchain.pem"), &certificate, 0o644);
    write_file(&in_two.join("privkey.pem"), &key, 0o600);
    write_file(
        &directory.join("localhost.pem"),
        [certificate, key].concat(),
        0o600,
    );
    std::os::unix::fs::symlink("nowhere", directory.join("dangling.example.pem")).unwrap();
    tour.program().option("--cert-dir", directory)
}

fn resumption(tour: &Tour<'_>) -> (Session, Trace) {
    let program = tour.program();
    let program = program.option("--ticket-keys", tour.path("tickets"));
    let offer = TlsOffer {
        memory: Some(Memory::default()),
        ..TlsOffer::new(pki())
    };
    let mut first = program.start();
    first.client().log_in_by_starttls_with(&offer);
    log_out(first.client());
    tour.visit(&program, ONE_LAUNCHER, |client, _| {
        client.log_in_by_starttls_with(&offer);
        log_out(client);
    })
}

fn client_certificates(tour: &Tour<'_>) -> (Session, Trace) {
    let authority = Authority::make(&tour.path("clients"), "client CA");
    let alice = authority.issue("alice", |_| {});
    let program = tour.program().option("--client-ca", &authority.file);
    let program = program.option("--client-cert", "required");
    let program = program.option("--client-crl", authority.list(&[1], 86_400));
    tour.visit(&program, ONE_LAUNCHER, |client, _| {
        client.greeting();
        assert!(client.command("a STARTTLS").is_ok());
        let config = alice.shown_by(TlsOffer::new(pki()).config());
        client.handshake_by(&std::sync::Arc::new(config)).unwrap();
        client.login();
        log_out(client);
    })
}

/// Three chains of the length that is allowed, so that what the keeper makes of them grows beyond the size of small blocks, and
/// then again.
fn large_certificates(tour: &Tour<'_>) -> (Session, Trace) {
    const ALLOWED: usize = 32 * 1024;
    let mut program = tour.program().without("--cert").without("--key");
    for kind in [Key::P256, Key::P384, Key::Rsa2048] {
        let pki = Pki::of(kind);
        let [leaf, authority] = [&pki.cert, &pki.ca].map(|path| {
            let length = CertificateDer::from_pem_file(path).unwrap().len();
            (std::fs::read(path).unwrap(), length)
        });
        let rest = authority.0.repeat((ALLOWED - leaf.1) / authority.1);
        let chain = tour.path(&format!("{kind:?}"));
        write_file(&chain, [leaf.0, rest].concat(), 0o644);
        program = program.also("--cert", chain).also("--key", &pki.key);
    }
    tour.visit(&program, ONE_LAUNCHER, |client, _| {
        client.log_in_by_starttls(pki());
        log_out(client);
    })
}

fn balancer(tour: &Tour<'_>) -> (Session, Trace) {
    let program = tour.program().flag("--accept-proxy");
    let program = program.option("--proxy-from", "127.0.0.1");
    tour.visit(&program, ONE_LAUNCHER, |client, _| {
        client.send_raw("PROXY TCP4 192.0.2.1 192.0.2.2 50000 143\r\n");
        client.log_in_by_starttls(pki());
        log_out(client);
    })
}

fn connected(tour: &Tour<'_>) -> (Session, Trace) {
    let remote = Remote::tcp(tour.test, Introduction::V2, &Backend::imap());
    let program = tour.program().connect(&remote);
    let program = program.option("--send-proxy", "v2");
    tour.visit(&program, CONNECTED, |client, _| {
        client.log_in_by_starttls(pki());
        log_out(client);
    })
}

/// While it waits for no longer than some time, and so goes on waiting for the rest of that.
fn stopped(tour: &Tour<'_>) -> (Session, Trace) {
    tour.visit(&tour.program(), ONE_LAUNCHER, |client, network| {
        client.greeting();
        waits_in(network, libc::SYS_ppoll);
        for signal in [libc::SIGSTOP, libc::SIGCONT] {
            sys::kill(network.0, signal).unwrap();
        }
        client.starttls(pki());
        client.login();
        log_out(client);
    })
}

fn waits_in(process: Process, call: i64) {
    eventually("it waits", || {
        (process.state() == Some('S') && process.blocked_in() == Some(call)).then_some(())
    });
}

fn terminated(tour: &Tour<'_>) -> (Session, Trace) {
    tour.visit(&tour.program(), ONE_LAUNCHER, |client, network| {
        client.greeting();
        sys::kill(network.0, libc::SIGTERM).unwrap();
        client.read_to_end();
    })
}

/// In a mount namespace of the tracing thread's.
fn system_log(tour: &Tour<'_>) -> (Session, Trace) {
    let path = tour.path("log.sock");
    let log = SystemLog::bind(&path);
    let start = move |program: &Program| {
        system_log::enter_namespace_with_system_log(&path);
        program.start_on(Socket::Tcp4, Handover::Stdio, Stderr::Closed)
    };
    let seen = tour.visit_by(&tour.program(), ONE_LAUNCHER, start, |client, _| {
        client.log_in_by_starttls(pki());
        log_out(client);
    });
    assert!(log.read()[0].starts_with("<22>imap-tls["));
    seen
}

/// Two clients, one after the other.
fn listener(tour: &Tour<'_>) -> (Session, Trace) {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let program = with_names(tour, "listened").option("--listen", address.to_string());
    let program = program.option("--drain-timeout", "1");
    let (_, listener, tracing) = tracer::start(&program, LISTENER, tour.wanted);
    for _ in 0..2 {
        let socket = eventually("the listener listens", || TcpStream::connect(address).ok());
        let mut client = Client::on(socket);
        client.log_in_by_starttls(pki());
        log_out(&mut client);
    }
    sys::kill(listener.0, libc::SIGTERM).unwrap();
    finish(tracing)
}

/// Two names, also of one client who comes and says nothing, and a reload between.
fn service(tour: &Tour<'_>) -> (Session, Trace) {
    let socket = tour.path("kept.sock");
    let program = with_names(tour, "kept")
        .backend([] as [&str; 0])
        .flag("--keep")
        .option("--keeper", &socket)
        .option("--ticket-keys", tour.path("kept-tickets"));
    let (_, service, tracing) = tracer::start(&program, SERVICE, tour.wanted);
    let serving = Service::serving(tour.test).option("--keeper", &socket);
    let offer = TlsOffer {
        memory: Some(Memory::default()),
        ..TlsOffer::new(pki())
    };
    for _ in 0..2 {
        eventually("the service lets network processes in", || {
            service::is_listened_on(&socket).then_some(())
        });
        let mut early = serving.start();
        early.client().greeting();
        for name in ["localhost", "mail.example"] {
            let offer = TlsOffer {
                server_name: name.to_owned(),
                ..offer.clone()
            };
            let mut session = serving.start();
            session.client().log_in_by_starttls_with(&offer);
            log_out(session.client());
        }
        sys::kill(service.0, libc::SIGHUP).unwrap();
        early.client().starttls(pki());
        early.client().login();
        log_out(early.client());
    }
    sys::kill(service.0, libc::SIGTERM).unwrap();
    finish(tracing)
}

fn guest(tour: &Tour<'_>) -> (Session, Trace) {
    let socket = tour.path("guest.sock");
    let keeping = Service::keeping(tour.test).option("--keeper", &socket);
    let _service = Service::start(tour.test, &keeping);
    let program = tour.program().without("--cert").without("--key");
    let program = program.option("--keeper", &socket);
    tour.visit(&program, GUEST, |client, _| {
        client.log_in_by_starttls(pki());
        log_out(client);
    })
}
