//! The machine's clock jumps, by hours or decades, forwards and backwards: no session ends by it, no deadline moves, the listener
//! goes on, and whatever has a date is judged by the new one. The clock is the processes' own: see [`tracer::Clock`].

use crate::harness::tracer::{self, Cast, Clock, Tracing};
use crate::harness::*;
use crate::ocsp;
use libtest_mimic::Trial;
use rustls::HandshakeKind;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const NEEDS: &[Need] = &[Need::Root, Need::X86_64];
const OPENSSL: &[Need] = &[
    Need::Root,
    Need::X86_64,
    Need::Command("openssl", "openssl"),
];

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for policy in ["required", "optional", "implicit"] {
        tests.push(test(
            &format!("time: {policy}: a session goes on, whatever the clock does meanwhile"),
            NEEDS,
            move |test| session_goes_on(test, policy),
        ));
        tests.push(test(
            &format!("time: {policy}: the listener's sessions go on, and new ones begin"),
            NEEDS,
            move |test| listener_goes_on(test, policy),
        ));
        tests.push(test(
            &format!("time: {policy}: with a certificate that is not good now nobody is served"),
            NEEDS,
            move |test| bad_certificate(test, policy),
        ));
    }
    tests.extend([
        test(
            "time: deadlines are neither sooner nor later when the clock jumps",
            NEEDS,
            deadlines,
        ),
        test(
            "time: the listener's deadlines are neither sooner nor later when the clock jumps",
            NEEDS,
            listener_deadlines,
        ),
        test(
            "time: the listener renews as often as before when the clock jumps",
            NEEDS,
            renewals,
        ),
        test(
            "time: tickets are good for hours and not from the future, and keys go on",
            NEEDS,
            tickets,
        ),
        test(
            "time: the listener goes on with a certificate that has run out until it has none, and then serves nobody",
            NEEDS,
            certificate_runs_out,
        ),
        test(
            "time: the listener staples an OCSP response as long as it is fresh",
            OPENSSL,
            response_runs_out,
        ),
        test(
            "time: a certificate for one name is good or not at each connection",
            NEEDS,
            certificate_for_name,
        ),
        test(
            "time: a client's certificate is good or not at each connection, tickets or not",
            NEEDS,
            clients_certificate,
        ),
        test(
            "time: the listener takes an authority that has expired for none, tickets or not",
            NEEDS,
            authority_expires,
        ),
    ]);
    tests
}

/// Nobody's part matters here.
const CAST: Cast = Cast {
    first: "first",
    children: &[],
};

const HOUR: i64 = 3600;
const DAY: i64 = 24 * HOUR;
/// In 1970; Linux lets nobody set its clock to a time before that.
const EARLY: i64 = 1000;
/// In 2039: more than 32 bits hold.
const LATE: i64 = 2_180_000_000;
/// In 2050, when the tests' certificates have expired.
const EXPIRED: i64 = 2_530_000_000;

#[derive(Clone, Copy, Debug)]
enum Jump {
    By(i64),
    To(i64),
}

/// All but one to when the tests' certificate is not good yet: read anew, it would be refused.
fn within_certificate() -> impl Iterator<Item = Jump> {
    let is_early = |jump: &Jump| matches!(jump, Jump::To(EARLY));
    JUMPS.into_iter().filter(move |jump| !is_early(jump))
}

const JUMPS: [Jump; 5] = [
    Jump::By(DAY),
    Jump::By(10 * 365 * DAY),
    Jump::By(-DAY),
    Jump::To(EARLY),
    Jump::To(LATE),
];

impl Jump {
    fn make(self, clock: &Clock) {
        match self {
            Jump::By(seconds) => clock.set(seconds),
            Jump::To(time) => clock.set_to(time),
        }
    }
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn is_served(client: &mut Client, line: &str) {
    let reply = client.command(line);
    assert!(reply.is_ok(), "{reply:?}");
}

// ---- sessions ----

/// At each step of a session the clock jumps to and fro.
fn converse(mut client: Client, clock: &Clock, policy: &str) {
    let at_all_times = |client: &mut Client, line: &str| {
        for jump in JUMPS {
            jump.make(clock);
            is_served(client, line);
        }
    };
    if policy != "implicit" {
        client.greeting();
        at_all_times(&mut client, "a CAPABILITY");
        is_served(&mut client, "tls STARTTLS");
    }
    let [before, within, after, ..] = JUMPS;
    before.make(clock);
    let offer = TlsOffer::new(pki());
    client.handshake_until_server_is_heard(&offer).unwrap();
    within.make(clock);
    client.finish_handshake().unwrap();
    if policy == "implicit" {
        client.greeting();
    }
    at_all_times(&mut client, "b CAPABILITY");
    client.send("c LOGIN u {6}\r\n");
    after.make(clock);
    assert!(client.line().starts_with("+ "));
    before.make(clock);
    client.send("sekret\r\n");
    assert!(client.reply("c").is_ok());
    for jump in JUMPS {
        jump.make(clock);
        assert!(client.is_quiet_for(Duration::from_millis(50)));
        is_served(&mut client, "d NOOP");
    }
    in_bulk(&mut client, clock);
    client.log_out();
}

fn in_bulk(client: &mut Client, clock: &Clock) {
    const SIZE: u64 = 2 << 20;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for jump in JUMPS.iter().cycle() {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                jump.make(clock);
                std::thread::yield_now();
            }
        });
        client.sink(SIZE);
        client.source(SIZE);
        is_over.store(true, Ordering::Relaxed);
    });
}

/// All that belongs to the run has ended; gives its status and its log.
fn finish(tracing: Tracing) -> (ExitStatus, String) {
    let (session, trace, hung) = tracing.finish(Duration::from_secs(20));
    let log = session.log();
    assert!(hung.is_empty(), "{hung:?} {log}");
    assert!(trace.told_time > 0, "nobody asked for the time");
    // By these it could be asked for, too.
    let others = [libc::SYS_gettimeofday, libc::SYS_time];
    assert!(
        !trace
            .seen
            .iter()
            .any(|seen| others.contains(&seen.point.call))
    );
    (session.status(), log)
}

/// As a person sees it with a watch.
fn assert_short(session_line: &str) {
    let (_, rest) = session_line.split_once(" seconds=").unwrap();
    let seconds: f64 = rest.split(' ').next().unwrap().parse().unwrap();
    assert!(seconds < 60.0, "{session_line}");
}

fn session_goes_on(test: &Test, policy: &str) {
    let clock = Clock::default();
    let (client, _, tracing) =
        tracer::start_by_clock(&Program::new(test).tls(policy), CAST, &clock);
    converse(client, &clock, policy);
    let (status, log) = finish(tracing);
    assert_eq!(status.code(), Some(0));
    let [line] = log.lines().collect::<Vec<_>>()[..] else {
        panic!("{log}");
    };
    assert!(line.ends_with("end=\"backend ended\""), "{line}");
    assert_short(line);
}

// ---- the listener ----

struct Listener {
    address: SocketAddr,
    log: PathBuf,
    process: Process,
    tracing: Tracing,
}

impl Listener {
    fn start(program: &Program, clock: &Clock) -> Self {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let program = program.clone().option("--listen", address.to_string());
        let (_, process, tracing) = tracer::start_by_clock(&program, CAST, clock);
        let log = std::fs::read_link(format!("/proc/{}/fd/2", process.0)).unwrap();
        let listener = Self {
            address,
            log,
            process,
            tracing,
        };
        listener.wait_log("listening on ");
        listener
    }

    fn connect(&self) -> Client {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_nodelay(true).unwrap();
        Client::on(socket)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn wait_log(&self, wanted: &str) -> String {
        eventually(&format!("the log has {wanted:?}"), || {
            let log = self.log();
            log.contains(wanted).then_some(log)
        })
    }

    /// Until it has said so once more.
    fn reload(&self, answer: &str) {
        let before = self.log().matches(answer).count();
        self.signal(libc::SIGHUP);
        eventually("it has read all anew", || {
            (self.log().matches(answer).count() > before).then_some(())
        });
    }

    fn signal(&self, signal: i32) {
        sys::kill(self.process.0, signal).unwrap();
    }

    fn keeper(&self) -> Option<Process> {
        let waits_for_many = |child: &Process| {
            // It may end meanwhile, when another is started in its place.
            let mut all = child.descriptors_if_alive().into_iter();
            all.any(|target| target.contains("eventpoll"))
        };
        self.process.children().into_iter().find(waits_for_many)
    }

    fn end(self) -> String {
        self.signal(libc::SIGTERM);
        let (status, log) = finish(self.tracing);
        assert_eq!(status.code(), Some(0), "{log}");
        log
    }
}

fn listener_goes_on(test: &Test, policy: &str) {
    let clock = Clock::default();
    let listener = Listener::start(&Program::new(test).tls(policy), &clock);
    converse(listener.connect(), &clock, policy);
    for jump in JUMPS {
        jump.make(&clock);
        converse(listener.connect(), &clock, policy);
    }
    let log = listener.end();
    let lines: Vec<_> = log
        .lines()
        .filter(|line| line.contains(": session "))
        .collect();
    assert_eq!(lines.len(), 1 + JUMPS.len(), "{log}");
    for line in lines {
        assert!(line.ends_with("end=\"backend ended\""), "{line}");
        assert_short(line);
    }
    // And nothing was wrong.
    let others = log.lines().filter(|line| !line.contains(": session "));
    assert!(
        others.clone().all(|line| {
            line.starts_with("imap-tls: listening on ") || line.starts_with("imap-tls: ending: ")
        }),
        "{log}"
    );
}

// ---- deadlines ----

/// Something that is waited for in vain.
#[derive(Clone, Copy, Debug)]
struct Wait {
    name: &'static str,
    options: &'static [(&'static str, &'static str)],
    /// When it ends, in seconds after the connection.
    limit: u64,
    reach: fn(&mut Client),
    goodbye: &'static str,
}

const WAITS: [Wait; 4] = [
    Wait {
        name: "for STARTTLS",
        options: &[("--login-timeout", "5")],
        limit: 5,
        reach: |client| drop(client.greeting()),
        goodbye: "* BYE ",
    },
    Wait {
        name: "for a ClientHello",
        options: &[("--handshake-timeout", "5")],
        limit: 5,
        reach: |client| {
            client.greeting();
            is_served(client, "tls STARTTLS");
        },
        goodbye: "",
    },
    Wait {
        name: "for login",
        options: &[("--login-timeout", "5")],
        limit: 5,
        reach: |client| {
            client.greeting();
            client.starttls(pki());
        },
        goodbye: "* BYE ",
    },
    Wait {
        name: "for a PROXY header",
        options: &[("--proxy-from", "127.0.0.1")],
        limit: 5,
        reach: |client| client.send_raw("PROXY TCP4 "),
        goodbye: "",
    },
];

impl Wait {
    fn program(self, test: &Test) -> Program {
        let program = Program::new(test);
        let is_behind = self.options.iter().any(|(name, _)| *name == "--proxy-from");
        let program = if is_behind {
            program.flag("--accept-proxy")
        } else {
            program
        };
        let options = self.options.iter();
        options.fold(program, |program, (name, value)| {
            program.option(name, value)
        })
    }

    /// It lasts as long as it should by the watch.
    fn lasts(self, client: &mut Client, began: Instant) {
        let half = Duration::from_secs(self.limit) / 2;
        let is_quiet = client.is_quiet_for(half.saturating_sub(began.elapsed()));
        assert!(
            is_quiet,
            "{self:?} ends at once: {:?}",
            client.read_to_end()
        );
        let (bytes, _) = client.read_to_end();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        assert!(
            text.starts_with(self.goodbye) && text.is_empty() == self.goodbye.is_empty(),
            "{self:?}: {text}"
        );
        let lasted = began.elapsed().as_secs_f64();
        let limit = self.limit as f64;
        // The machine may be busy; that it is late by days is ruled out by the client's patience.
        assert!(
            lasted > limit - 0.1 && lasted < limit + 8.0,
            "{self:?}: {lasted} s"
        );
    }
}

fn deadlines(test: &Test) {
    let one = |wait: Wait, jump: Jump| {
        let clock = Clock::default();
        let began = Instant::now();
        let program = wait.program(test);
        let (mut client, network, tracing) = tracer::start_by_clock(&program, CAST, &clock);
        (wait.reach)(&mut client);
        eventually("it waits", || {
            (network.blocked_in() == Some(libc::SYS_ppoll)).then_some(())
        });
        jump.make(&clock);
        wait.lasts(&mut client, began);
        drop(client);
        let (status, log) = finish(tracing);
        assert_eq!(status.code(), Some(0), "{log}");
    };
    for jump in JUMPS {
        std::thread::scope(|scope| {
            for wait in WAITS {
                scope.spawn(move || one(wait, jump));
            }
        });
    }
}

/// And how long the listener waits for open sessions when it ends.
fn listener_deadlines(test: &Test) {
    const DRAIN: Duration = Duration::from_secs(4);
    let one = |jump: Jump| {
        let clock = Clock::default();
        // Its handshake has all the time until login.
        let [starttls, _, login, _] = WAITS;
        let program = Program::new(test)
            .option("--login-timeout", "5")
            .option("--drain-timeout", "4");
        let listener = Listener::start(&program, &clock);
        let mut idle = listener.connect();
        idle.log_in_by_starttls(pki());
        let mut waits: Vec<_> = [starttls, login]
            .into_iter()
            .map(|wait| {
                let began = Instant::now();
                let mut client = listener.connect();
                (wait.reach)(&mut client);
                (wait, client, began)
            })
            .collect();
        jump.make(&clock);
        std::thread::scope(|scope| {
            for (wait, client, began) in &mut waits {
                scope.spawn(|| wait.lasts(client, *began));
            }
        });
        drop(waits);
        // Who has logged in has no deadline.
        is_served(&mut idle, "a NOOP");
        clock.set(0);
        let began = Instant::now();
        listener.signal(libc::SIGTERM);
        listener.wait_log("ending: ");
        jump.make(&clock);
        assert!(idle.is_quiet_for((DRAIN / 2).saturating_sub(began.elapsed())));
        is_served(&mut idle, "b NOOP");
        idle.read_to_end();
        let lasted = began.elapsed();
        assert!(
            lasted >= DRAIN && lasted < DRAIN + Duration::from_secs(8),
            "{jump:?}: {lasted:?}"
        );
        drop(idle);
        let (status, log) = finish(listener.tracing);
        assert_eq!(status.code(), Some(0), "{log}");
    };
    std::thread::scope(|scope| {
        for jump in JUMPS {
            scope.spawn(move || one(jump));
        }
    });
}

fn renewals(test: &Test) {
    let clock = Clock::default();
    let program = Program::new(test).option("--renewal", "1");
    let listener = Listener::start(&program, &clock);
    for jump in within_certificate() {
        jump.make(&clock);
        let keeper = eventually("there is a keeper", || listener.keeper());
        let began = Instant::now();
        // Three times, since the first may have been due; and how long the one before it stays is not always the same.
        let next = |than: Process| {
            eventually("another keeper", || {
                listener.keeper().filter(|keeper| *keeper != than)
            })
        };
        next(next(next(keeper)));
        let lasted = began.elapsed().as_secs_f64();
        assert!(lasted > 1.5 && lasted < 13.0, "{jump:?}: {lasted}");
    }
    listener.end();
}

// ---- tickets ----

fn remembering() -> TlsOffer {
    TlsOffer {
        memory: Some(Memory::default()),
        ..TlsOffer::new(pki())
    }
}

/// A whole session; whether it resumed an earlier one.
fn is_resumed(listener: &Listener, offer: &TlsOffer) -> bool {
    let mut client = listener.connect();
    client.log_in_by_starttls_with(offer);
    let is_resumed = client.tls().handshake_kind() == Some(HandshakeKind::Resumed);
    client.log_out();
    is_resumed
}

fn tickets(test: &Test) {
    let clock = Clock::default();
    let program = Program::new(test).option("--ticket-keys", test.path("keys"));
    let listener = Listener::start(&program, &clock);
    let is_resumed = |offer: &TlsOffer| is_resumed(&listener, offer);
    let new_ones_are_resumed = || {
        let offer = remembering();
        assert!(!is_resumed(&offer));
        is_resumed(&offer)
    };
    let far = [Jump::By(13 * HOUR), Jump::By(-600)];
    let near = [Jump::By(0), Jump::By(11 * HOUR), Jump::By(-200)];
    // Of a ticket and its key, while the keeper stays.
    for (jumps, expected) in [(&near[..], true), (&far, false), (&JUMPS, false)] {
        for jump in jumps {
            let offer = remembering();
            assert!(!is_resumed(&offer));
            jump.make(&clock);
            assert_eq!(is_resumed(&offer), expected, "{jump:?}");
            // One that is too old or of the future seals no new ones, either.
            assert_eq!(new_ones_are_resumed(), expected, "{jump:?}");
            // It is the same key as before when the clock is right again.
            clock.set(0);
            assert!(new_ones_are_resumed(), "after {jump:?}");
        }
    }
    // Little ones lose no key, nor make one: it is to last until the next renewal, an hour later.
    for jump in [Jump::By(0), Jump::By(10 * HOUR), Jump::By(-200)] {
        clock.set(0);
        let offer = remembering();
        assert!(!is_resumed(&offer));
        jump.make(&clock);
        listener.reload("reloaded");
        assert!(is_resumed(&offer), "{jump:?}");
    }
    // Great ones have other keys made, and what the others sealed opens no more.
    for jump in within_certificate() {
        clock.set(0);
        listener.reload("reloaded");
        let old = remembering();
        assert!(!is_resumed(&old));
        jump.make(&clock);
        listener.reload("reloaded");
        assert!(!is_resumed(&old), "{jump:?}");
        assert!(new_ones_are_resumed(), "{jump:?}");
        let other = remembering();
        assert!(!is_resumed(&other));
        clock.set(0);
        assert!(!is_resumed(&other), "back from {jump:?}");
        listener.reload("reloaded");
        assert!(new_ones_are_resumed(), "back from {jump:?}");
    }
    // Nothing is said of it but where a key's time has not come yet: in one jump back, and on the way back from those forwards.
    let log = listener.end();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("ticket")).collect();
    assert_eq!(lines.len(), within_certificate().count(), "{log}");
    for line in lines {
        let reason = "key from the future, which is replaced: was this machine's clock set back?";
        assert!(line.ends_with(reason), "{line}");
    }
}

// ---- certificates ----

/// In `optional`, too, there is no session in clear instead.
fn bad_certificate(test: &Test, policy: &str) {
    for (time, reason) in [
        (EXPIRED, "it expired on Jan"),
        (EARLY, "look at this machine's clock"),
    ] {
        let clock = Clock::default();
        clock.set_to(time);
        let program = Program::new(test).tls(policy);
        let (mut client, _, tracing) = tracer::start_by_clock(&program, CAST, &clock);
        let (bytes, _) = client.read_to_end();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if policy == "implicit" {
            assert_eq!(text, "");
        } else {
            assert!(text.starts_with("* BYE [UNAVAILABLE] "), "{text}");
            assert_eq!(text.lines().count(), 1);
        }
        drop(client);
        let (status, log) = finish(tracing);
        assert_eq!(status.code(), Some(100));
        assert!(log.contains(reason) && log.contains("--cert"), "{log}");
        assert!(test.record().is_empty());
    }
}

/// Clients examine it themselves (here by a clock that is right), and one that does not is better served than turned away: so
/// the listener goes on with what it has, aloud. When its keeper is gone it has nothing.
fn certificate_runs_out(test: &Test) {
    let clock = Clock::default();
    let program = Program::new(test).tls("optional").option("--renewal", "2");
    let listener = Listener::start(&program, &clock);
    clock.set_to(EXPIRED);
    let log = listener.wait_log("nothing was renewed");
    let line = log
        .lines()
        .find(|line| line.contains("nothing was renewed"));
    assert!(line.unwrap().contains("it expired on Jan"), "{log}");
    let mut client = listener.connect();
    client.log_in_by_starttls(pki());

    let keeper = listener.keeper().unwrap();
    sys::kill(keeper.0, libc::SIGKILL).unwrap();
    listener.wait_log("another is started");
    // It is started, and finds the certificate.
    eventually("no keeper is left", || {
        listener.keeper().is_none().then_some(())
    });
    is_served(&mut client, "a NOOP");
    client.log_out();
    let backends = test.record().backends().len();
    listener.wait_log("nothing was renewed, and new connections are refused: ");
    let (text, _) = listener.connect().read_to_end();
    assert_eq!(
        String::from_utf8_lossy(&text),
        "* BYE [UNAVAILABLE] the server is not set up correctly, try again later\r\n"
    );
    assert_eq!(test.record().backends().len(), backends);
    listener.wait_log("refused 127.0.0.1: there is no keeper");

    clock.set(0);
    let mut client = eventually("a keeper is started", || {
        let mut client = listener.connect();
        client.line().starts_with("* OK ").then_some(client)
    });
    client.starttls(pki());
    client.login();
    client.log_out();
    listener.end();
}

fn response_runs_out(test: &Test) {
    let (pki, response) = ocsp::certificate_and_response(test);
    let clock = Clock::default();
    let program = Program::new(test).pki(&pki).option("--ocsp", response);
    let listener = Listener::start(&program, &clock);
    for (days, said) in [
        (0, "OCSP Response Status: successful"),
        (6, "OCSP Response Status: successful"),
        (8, "OCSP response: no response sent"),
    ] {
        clock.set(days * DAY);
        for version in ["-tls1_2", "-tls1_3"] {
            let address = listener.address.to_string();
            let text = ocsp::seen_at(test, &pki, &address, "required", version);
            assert!(text.contains(said), "after {days} days, {version}: {text}");
            assert!(
                text.contains("b OK"),
                "after {days} days, {version}: {text}"
            );
        }
    }
    listener.end();
}

fn certificate_for_name(test: &Test) {
    let directory = test.path("live");
    make_dir(&directory, 0o755);
    let both = [&pki().cert, &pki().key].map(|path| std::fs::read(path).unwrap());
    write_file(&directory.join("localhost.pem"), both.concat(), 0o600);
    let clock = Clock::default();
    let program = Program::new(test)
        .without("--cert")
        .without("--key")
        .option("--cert-dir", &directory);
    let listener = Listener::start(&program, &clock);
    for jump in JUMPS.into_iter().chain([Jump::To(EXPIRED), Jump::By(0)]) {
        jump.make(&clock);
        let is_good = !matches!(jump, Jump::To(EARLY | EXPIRED));
        let mut client = listener.connect();
        client.greeting();
        is_served(&mut client, "tls STARTTLS");
        let result = client.handshake(&TlsOffer::new(pki()));
        assert_eq!(result.is_ok(), is_good, "{jump:?}: {result:?}");
        if is_good {
            client.login();
            client.log_out();
        }
    }
    let log = listener.end();
    for reason in ["it expired on Jan", "look at this machine's clock"] {
        let lines: Vec<_> = log.lines().filter(|line| line.contains(reason)).collect();
        assert_eq!(lines.len(), 1, "{log}");
        assert!(lines[0].contains("localhost.pem"), "{log}");
    }
}

fn showing(identity: &Identity, is_resuming: bool) -> Arc<rustls::ClientConfig> {
    let mut config = identity.shown_by(TlsOffer::new(pki()).config());
    if is_resuming {
        config.resumption = rustls::client::Resumption::in_memory_sessions(16);
    }
    Arc::new(config)
}

/// Whether the session was resumed; `None` if there was none.
fn visit(listener: &Listener, config: &Arc<rustls::ClientConfig>) -> Option<bool> {
    let mut client = listener.connect();
    client.greeting();
    is_served(&mut client, "tls STARTTLS");
    client.handshake_by(config).ok()?;
    // In TLS 1.3 a client learns of its refusal afterwards.
    client.try_command("a LOGIN u sekret").ok()?;
    let kind = client.tls().handshake_kind();
    client.log_out();
    Some(kind == Some(HandshakeKind::Resumed))
}

fn authority_expires(test: &Test) {
    let start = u64::try_from(Clock::default().now()).unwrap();
    let [short, long] = [("short", 1800), ("long", 3 * 3600)].map(|(name, seconds)| {
        let end = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(start + seconds);
        Authority::make_with(&test.path(name), name, |params| params.not_after = end)
    });
    let (of_short, of_long) = (short.issue("alice", |_| {}), long.issue("bob", |_| {}));
    let both = test.path("both.pem");
    let text = [&short, &long].map(|one| std::fs::read(&one.file).unwrap());
    write_file(&both, text.concat(), 0o644);
    let lists = [&short, &long].map(|one| one.list(&[], DAY));
    let clock = Clock::default();
    let program = Program::new(test)
        .option("--client-ca", &both)
        .option("--client-crl", std::env::join_paths(lists).unwrap())
        .option("--ticket-keys", test.path("keys"));
    let listener = Listener::start(&program, &clock);
    let resuming = showing(&of_short, true);
    assert_eq!(visit(&listener, &resuming), Some(false));
    assert_eq!(visit(&listener, &resuming), Some(true));
    for (hours, [first, second]) in [
        (0, [Some(false), Some(false)]),
        (1, [None, Some(false)]),
        (4, [None, None]),
    ] {
        clock.set(hours * HOUR);
        for (identity, expected) in [(&of_short, first), (&of_long, second)] {
            let config = showing(identity, false);
            assert_eq!(visit(&listener, &config), expected, "after {hours} hours");
        }
        if hours > 0 {
            assert_eq!(visit(&listener, &resuming), None, "after {hours} hours");
        }
    }
    let log = listener.end();
    let words = "the client's certificate is from no authority in --client-ca";
    assert_eq!(log.matches(words).count(), 5, "{log}");
}

fn clients_certificate(test: &Test) {
    let authority = Authority::make(&test.path("clients"), "client CA");
    let now = u64::try_from(Clock::default().now()).unwrap();
    let end = Duration::from_secs(now + 1800);
    let identity = authority.issue("alice", |params| {
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + end;
    });
    let clock = Clock::default();
    let program = Program::new(test)
        .option("--client-ca", &authority.file)
        .option("--ticket-keys", test.path("keys"));
    let listener = Listener::start(&program, &clock);
    let config = |is_resuming| showing(&identity, is_resuming);
    let visit = |config: &Arc<rustls::ClientConfig>| visit(&listener, config);
    let resuming = config(true);
    assert_eq!(visit(&resuming), Some(false));
    assert_eq!(visit(&resuming), Some(true));
    // The ticket would be good for another eleven hours.
    clock.set(HOUR);
    assert_eq!(visit(&resuming), None);
    let log = listener.wait_log("expired");
    assert!(log.contains("certificate"), "{log}");
    for jump in JUMPS {
        jump.make(&clock);
        let expected = matches!(jump, Jump::By(seconds) if seconds < 0).then_some(false);
        assert_eq!(visit(&config(false)), expected, "{jump:?}");
    }
    clock.set(0);
    assert_eq!(visit(&config(true)), Some(false));
    listener.end();
}
