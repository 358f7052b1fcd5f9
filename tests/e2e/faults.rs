//! Each system call of each process fails once, and each process is killed at each step: nobody hangs, nothing is left behind,
//! nothing passes in clear that should not, nobody gets a wrong byte, and the log says why.
//!
//! A first run lists the calls; then there is one run for each, with a session of a client. By default each call fails in one
//! way (each fourth, where most calls are another scenario's, too), and each process is killed at every fourth step;
//! E2E_FAULTS=all has each call fail in each plausible way, and each process killed at each step.
//! E2E_FAULTS=ROLE:CALL:NTH:ERRNO (a number, or `kill`) runs one point alone, and shows its log.

use super::harness::tracer::{
    self, CONNECTED, Cast, Fault, NAMES, ONE_LAUNCHER, Point, Role, Trace, Wanted,
};
use super::harness::*;
use libtest_mimic::Trial;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const NEEDS: &[Need] = &[Need::Root, Need::X86_64];

pub fn tests() -> Vec<Trial> {
    let scenario = |name: &str, make: fn(&Test) -> Scenario| {
        let name =
            format!("faults: each system call fails once and each process is killed: {name}");
        test(&name, NEEDS, move |test| run_all(test, &make(test)))
    };
    vec![
        scenario("required", |_| Scenario::new("required", Kind::Plain)),
        scenario("optional", |_| Scenario::new("optional", Kind::Plain)),
        scenario("implicit", |_| Scenario::new("implicit", Kind::Plain)),
        scenario("names and tickets", |test| {
            Scenario::new("required", Kind::Names(file_name(test)))
        }),
        scenario("a backend that is connected to", |test| {
            let remote = Remote::tcp(test, Introduction::None, &Backend::imap());
            Scenario::new("required", Kind::Connected(remote))
        }),
        scenario("the listener", |_| {
            Scenario::new("required", Kind::Listener)
        }),
        scenario("the listener, reloaded", |_| {
            Scenario::new("required", Kind::Reloaded)
        }),
        scenario("the keeper service", |_| {
            Scenario::new("required", Kind::Service)
        }),
        scenario("a client of the keeper service", |test| {
            let service = Service::start(test, &Service::keeping(test));
            Scenario::new("required", Kind::Guest(service))
        }),
        scenario("behind a balancer", |_| {
            Scenario::new("required", Kind::Behind)
        }),
        scenario("a client's certificate", |test| {
            let authority = Authority::make(&test.path("clients"), "client CA");
            let identity = authority.issue("alice", |_| {});
            Scenario::new("implicit", Kind::Certified(Box::new((authority, identity))))
        }),
        scenario("the system log", |_| {
            Scenario::new("required", Kind::SystemLog)
        }),
    ]
}

/// What is run again and again.
struct Scenario {
    policy: &'static str,
    cast: Cast,
    kind: Kind,
}

enum Kind {
    Plain,
    /// `--accept-proxy`.
    Behind,
    /// `--client-ca`, and the client's.
    Certified(Box<(Authority, Identity)>),
    /// `--cert-dir`, this directory, and `--ticket-keys`, a new one each time.
    Names(PathBuf),
    Connected(Remote),
    /// `--keeper`, and the service.
    Guest(Service),
    /// Two clients, one after the other.
    Listener,
    /// The same, and SIGHUP between them.
    Reloaded,
    /// Two clients, SIGHUP between them, and a keeper service, which is where calls fail.
    Service,
    /// `--log syslog`, to a socket of each run's own.
    SystemLog,
}

impl Kind {
    fn is_listener(&self) -> bool {
        matches!(self, Kind::Listener | Kind::Reloaded)
    }

    /// By default each so-manieth call fails: most of these scenarios' are those of others, too.
    fn stride(&self) -> usize {
        match self {
            Kind::Connected(_) | Kind::Guest(_) | Kind::Listener | Kind::Names(_) | Kind::Plain => {
                1
            }
            Kind::Behind
            | Kind::Certified(_)
            | Kind::Reloaded
            | Kind::Service
            | Kind::SystemLog => 4,
        }
    }

    /// Without a standard error.
    fn is_speechless(&self) -> bool {
        matches!(self, Kind::SystemLog)
    }
}

/// A directory with the certificate for the name that clients ask for.
fn file_name(test: &Test) -> PathBuf {
    let directory = test.path("live");
    make_dir(&directory, 0o755);
    let pki = Pki::of(Key::P256);
    let both = [&pki.cert, &pki.key].map(|path| std::fs::read(path).unwrap());
    write_file(&directory.join("localhost.pem"), both.concat(), 0o600);
    directory
}

const TWO_LAUNCHERS: Cast = Cast {
    first: "network",
    children: &[("network", &["clear launcher", "launcher", "keeper"])],
};

const LISTENER: Cast = Cast {
    first: "listener",
    children: &[
        ("listener", &["keeper", "network"]),
        ("network", &["launcher"]),
    ],
};
const RELOADED: Cast = Cast {
    first: "listener",
    children: &[
        ("listener", &["keeper", "network", "keeper", "network"]),
        ("network", &["launcher"]),
    ],
};
const GUEST: Cast = Cast {
    first: "network",
    children: &[("network", &["launcher"])],
};
const SERVICE: Cast = Cast {
    first: "service",
    children: &[("service", &["keeper"])],
};

/// What one client saw.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Conversation {
    clear: Vec<String>,
    secure: Vec<String>,
    /// How far it came, if not to the end.
    stopped: Option<String>,
    /// What must never happen.
    wrong: Option<String>,
    /// How long the client waited for what did not come.
    waited: Duration,
}

/// What came of one run.
struct Outcome {
    conversations: Vec<Conversation>,
    backends: Vec<Vec<u8>>,
    log: String,
    status: ExitStatus,
    trace: Trace,
    hung: Vec<Role>,
    left: String,
    /// From the client's end to the last process's.
    ending: Duration,
    zombies: String,
}

/// Longer than any deadline that may have to pass: the ending's of a minute is the longest.
const PATIENCE: Duration = Duration::from_secs(80);
/// How late things may be where there are many at once and all are traced.
const LATE: Duration = Duration::from_secs(5);
const ZOMBIES_LIMIT: Duration = Duration::from_secs(3);
/// Of a process that is let go of: the goodbye's limit, and the listener's, which is longer.
const LONGEST_ENDING: Duration = Duration::from_secs(25);
const HANDSHAKE_SECONDS: u64 = 5;
const LOGIN_SECONDS: u64 = 8;

impl Scenario {
    fn new(policy: &'static str, kind: Kind) -> Self {
        let cast = match &kind {
            Kind::Plain if policy == "optional" => TWO_LAUNCHERS,
            Kind::Behind | Kind::Certified(_) | Kind::Plain | Kind::SystemLog => ONE_LAUNCHER,
            Kind::Names(_) => NAMES,
            Kind::Connected(_) => CONNECTED,
            Kind::Listener => LISTENER,
            Kind::Reloaded => RELOADED,
            Kind::Guest(_) => GUEST,
            Kind::Service => SERVICE,
        };
        Self { policy, cast, kind }
    }

    fn program(&self, test: &Test, record: &Record) -> Program {
        let program = Program::new(test)
            .tls(self.policy)
            .option("--handshake-timeout", HANDSHAKE_SECONDS.to_string())
            .option("--login-timeout", LOGIN_SECONDS.to_string())
            .backend(Backend::imap().command(record));
        match &self.kind {
            Kind::Plain => program,
            Kind::Behind => program
                .flag("--accept-proxy")
                .option("--proxy-from", "127.0.0.1"),
            Kind::Certified(both) => program.option("--client-ca", &both.0.file),
            Kind::SystemLog => program.option("--log", "syslog"),
            Kind::Names(directory) => program
                .without("--cert")
                .without("--key")
                .option("--cert-dir", directory)
                .option("--ticket-keys", record.0.join("keys")),
            Kind::Connected(remote) => program.connect(remote),
            Kind::Listener | Kind::Reloaded => program.option("--drain-timeout", "1"),
            Kind::Guest(_) => program
                .without("--cert")
                .without("--key")
                .option("--keeper", Service::socket(test)),
            // As it serves clients.
            Kind::Service => program
                .without("--cert")
                .without("--key")
                .option("--keeper", record.0.join("keeper.sock")),
        }
    }

    fn run(&self, test: &Test, wanted: Wanted) -> Outcome {
        let record = Record(test.path(&format!("record.{}", next_number())));
        make_dir(&record.0, 0o1777);
        let program = self.program(test, &record);
        let system_log = matches!(self.kind, Kind::SystemLog).then(|| record.0.join("log.sock"));
        let logged = system_log.as_deref().map(SystemLog::bind);
        let mut logs = String::new();
        let (conversations, tracing, zombies) = if self.kind.is_listener() {
            self.talk_to_listener(&program, wanted)
        } else if matches!(self.kind, Kind::Service) {
            let keeping = Service::keeping(test)
                .option("--keeper", record.0.join("keeper.sock"))
                .option("--drain-timeout", "1");
            self.talk_beside_service(&keeping, &program, wanted, &mut logs)
        } else {
            let begin = move |program: &Program| {
                let Some(path) = system_log else {
                    return program.start();
                };
                system_log::enter_namespace_with_system_log(&path);
                program.start_on(Socket::Tcp4, Handover::Stdio, Stderr::Null)
            };
            let (mut client, _, tracing) = tracer::start_by(&program, self.cast, wanted, begin);
            let (conversation, zombies) = self.converse(&mut client, &tracing);
            (vec![conversation], tracing, zombies)
        };
        let ended = Instant::now();
        let (session, trace, hung) = tracing.finish(PATIENCE);
        let ending = ended.elapsed();
        let left = left_behind(&trace);
        let played = record.backends();
        let logged = logged.map_or_else(String::new, |log| without_marks(&log.read()));
        let outcome = Outcome {
            conversations,
            backends: played.iter().map(Played::received).collect(),
            log: without_ports(&(session.log() + &logged + &logs)),
            status: session.status(),
            trace,
            hung,
            left,
            ending,
            zombies,
        };
        let _ = std::fs::remove_dir_all(&record.0);
        outcome
    }

    fn talk_to_listener(
        &self,
        program: &Program,
        wanted: Wanted,
    ) -> (Vec<Conversation>, tracer::Tracing, String) {
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let program = program.clone().option("--listen", address.to_string());
        let (_, listener, tracing) = tracer::start(&program, self.cast, wanted);
        let log = std::fs::read_link(format!("/proc/{}/fd/2", listener.0));
        let mut zombies = String::new();
        let conversations = (0..2)
            .map(|number| {
                if number == 1 && matches!(self.kind, Kind::Reloaded) {
                    reload(listener, "listener", &tracing, log.as_deref().ok());
                }
                let Some(socket) = connect(address, &tracing) else {
                    return Conversation {
                        stopped: Some("connect: nobody listens".to_owned()),
                        ..Conversation::default()
                    };
                };
                let (conversation, before) = self.converse(&mut Client::on(socket), &tracing);
                zombies += &before;
                zombies += &zombies_now(&tracing);
                conversation
            })
            .collect();
        // While it is traced its number is its own.
        if !tracing.processes("listener").is_empty() {
            let _ = sys::kill(listener.0, libc::SIGTERM);
        }
        (conversations, tracing, zombies)
    }

    /// `keeping` is the service, and each client has a start of the program of its own, whose log is added to `logs`.
    fn talk_beside_service(
        &self,
        keeping: &Program,
        program: &Program,
        wanted: Wanted,
        logs: &mut String,
    ) -> (Vec<Conversation>, tracer::Tracing, String) {
        let (_, service, tracing) = tracer::start(keeping, self.cast, wanted);
        let log = std::fs::read_link(format!("/proc/{}/fd/2", service.0)).ok();
        let says = |words: &str| says(log.as_deref(), &[words]);
        wait_for(&tracing, "service", || says(LETS_IN));
        let mut zombies = String::new();
        let conversations = (0..2)
            .map(|number| {
                if number == 1 {
                    reload(service, "service", &tracing, log.as_deref());
                }
                let mut session = program.start();
                let mut client = session.take_client();
                let (conversation, before) = self.converse(&mut client, &tracing);
                drop(client);
                session.wait();
                *logs += &session.log();
                zombies += &before;
                zombies += &zombies_now(&tracing);
                conversation
            })
            .collect();
        // While it is traced its number is its own.
        if !tracing.processes("service").is_empty() {
            let _ = sys::kill(service.0, libc::SIGTERM);
        }
        (conversations, tracing, zombies)
    }

    /// A session: before TLS, STARTTLS, LOGIN, a small exchange, LOGOUT. And the zombies that there were before the last.
    fn converse(&self, client: &mut Client, tracing: &tracer::Tracing) -> (Conversation, String) {
        let mut conversation = Conversation::default();
        let mut zombies = String::new();
        let mut last = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut look = || zombies = zombies_now(tracing);
            self.speak(client, &mut conversation, &mut last, &mut look)
        }));
        conversation.waited = last.elapsed();
        match result {
            Ok(Ok(())) => {}
            Ok(Err(why)) => conversation.stopped = Some(why),
            Err(panic) => {
                let words = panic.downcast_ref::<String>().cloned();
                conversation.wrong = Some(words.unwrap_or_else(|| "the client gave up".to_owned()));
            }
        }
        (conversation, zombies)
    }

    fn speak(
        &self,
        client: &mut Client,
        seen: &mut Conversation,
        last: &mut Instant,
        look: &mut dyn FnMut(),
    ) -> Result<(), String> {
        if matches!(self.kind, Kind::Behind) {
            let _ = client.try_send(b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 143\r\n");
        }
        if self.policy != "implicit" {
            read_line(client, &mut seen.clear, "greeting", |line| {
                line.starts_with("* OK")
            })?;
            for line in ["a CAPABILITY", "tls STARTTLS"] {
                *last = Instant::now();
                ask(client, &mut seen.clear, line)?;
            }
        }
        *last = Instant::now();
        self.handshake(client).map_err(|why| {
            // Anything but TLS would be corrupt.
            if !["Eof", "Reset"].contains(&why.as_str()) && !why.contains("received fatal alert") {
                seen.wrong = Some(format!("in the handshake: {why}"));
            }
            format!("handshake: {why}")
        })?;
        if self.policy == "implicit" {
            read_line(client, &mut seen.secure, "greeting", |line| {
                line.starts_with("* OK")
            })?;
        }
        for line in [
            "b CAPABILITY",
            "c LOGIN u sekret",
            "d SELECT INBOX",
            "e FETCH 1 BODY[]",
            "f APPEND INBOX {5+}\r\nhello",
            "g FETCH 2 BODY[]",
            "z LOGOUT",
        ] {
            if line == "z LOGOUT" {
                look();
            }
            *last = Instant::now();
            ask(client, &mut seen.secure, line)?;
        }
        match client.line_or_end() {
            Err(End::CloseNotify) => Ok(()),
            other => Err(format!("at the end: {other:?}")),
        }
    }

    fn handshake(&self, client: &mut Client) -> Result<(), String> {
        let mut offer = TlsOffer::new(Pki::of(Key::P256));
        offer.groups.truncate(2);
        match &self.kind {
            Kind::Certified(both) => {
                client.handshake_by(&Arc::new(both.1.shown_by(offer.config())))
            }
            _ => client.handshake(&offer),
        }
    }
}

/// What the listener and the keeper service log when they have begun.
const LISTENS: &str = "imap-tls: listening on ";
const LETS_IN: &str = "imap-tls: keeping keys for ";

/// Whether a log has any of these.
fn says(log: Option<&Path>, any: &[&str]) -> bool {
    let text = log.and_then(|log| std::fs::read_to_string(log).ok());
    text.is_some_and(|text| any.iter().any(|words| text.contains(words)))
}

/// Where even the line fails there is no telling.
fn wait_for(tracing: &tracer::Tracing, role: Role, is_told: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_told() && !tracing.processes(role).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Has the listener or the service read all anew; returns when it has said how that went, or has ended.
fn reload(process: Process, role: Role, tracing: &tracer::Tracing, log: Option<&Path>) {
    // One that fails to start has not taken the signal in hand.
    if !says(log, &[LISTENS, LETS_IN]) || tracing.processes(role).is_empty() {
        return;
    }
    let _ = sys::kill(process.0, libc::SIGHUP);
    let ends = ["imap-tls: reloaded", "nothing was renewed"];
    wait_for(tracing, role, || says(log, &ends));
}

/// What the system log has of ours, as standard error would have it.
fn without_marks(lines: &[String]) -> String {
    let mut text = String::new();
    for line in lines {
        let (_, line) = line.split_once("]: ").expect("our name and number");
        writeln!(text, "{line}").unwrap();
    }
    text
}

/// To the listener, once it listens; nothing if it has ended.
fn connect(address: SocketAddr, tracing: &tracer::Tracing) -> Option<TcpStream> {
    eventually("the listener listens", || {
        match TcpStream::connect(address) {
            Ok(socket) => {
                socket.set_nodelay(true).unwrap();
                Some(Some(socket))
            }
            Err(_) => tracing.processes("listener").is_empty().then_some(None),
        }
    })
}

/// Clients' ports differ from run to run.
fn without_ports(log: &str) -> String {
    let mut parts = log.split("127.0.0.1:");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        text += "CLIENT";
        text += part.trim_start_matches(|digit: char| digit.is_ascii_digit());
    }
    text
}

fn ask(client: &mut Client, lines: &mut Vec<String>, line: &str) -> Result<(), String> {
    // What came before the end is still there to be read.
    let _ = client.try_send(format!("{line}\r\n").as_bytes());
    let tag = format!("{} ", line.split(' ').next().unwrap());
    loop {
        let mut is_ok = false;
        let mut is_last = false;
        read_line(client, lines, line, |line| {
            is_last = line.starts_with(&tag);
            is_ok = line.starts_with(&format!("{tag}OK"));
            true
        })?;
        if is_last {
            return if is_ok {
                Ok(())
            } else {
                Err(format!("{line}: refused"))
            };
        }
    }
}

fn read_line(
    client: &mut Client,
    lines: &mut Vec<String>,
    what: &str,
    is_wanted: impl FnOnce(&str) -> bool,
) -> Result<(), String> {
    let line = client
        .line_or_end()
        .map_err(|end| format!("{what}: {end:?}"))?;
    let is_wanted = is_wanted(&line);
    lines.push(line);
    is_wanted.then_some(()).ok_or(format!("{what}: refused"))
}

/// Children that have ended and that their parent, which is there, does not wait for. (What an orphan becomes is not its parent's.)
fn zombies_now(tracing: &tracer::Tracing) -> String {
    let deadline = Instant::now() + ZOMBIES_LIMIT;
    loop {
        let all = tracing.alive().into_iter().flat_map(Process::children);
        let zombies: Vec<_> = all.filter(|child| child.state() == Some('Z')).collect();
        if zombies.is_empty() {
            return String::new();
        }
        if Instant::now() > deadline {
            return describe(&zombies);
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Processes of the run that are still there, zombies of the program's included; what is an orphan is ours, and is reaped.
fn left_behind(trace: &Trace) -> String {
    let all: Vec<Process> = trace.all.iter().copied().map(Process).collect();
    let deadline = std::time::Instant::now() + Duration::from_secs(15);
    loop {
        for process in &all {
            if process.state() == Some('Z') {
                sys::reap(process.0);
            }
        }
        let left: Vec<Process> = all
            .iter()
            .copied()
            .filter(|process| process.state().is_some())
            .collect();
        if left.is_empty() {
            return String::new();
        }
        if std::time::Instant::now() > deadline {
            return describe(&left);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

// ---- what must hold ----

fn judge(
    scenario: &Scenario,
    right: &Outcome,
    point: Point,
    fault: Fault,
    got: &Outcome,
) -> Vec<String> {
    let mut faults = Vec::new();
    if !got.hung.is_empty() {
        faults.push(format!("does not end: {:?}", got.hung));
    }
    if !got.left.is_empty() {
        faults.push(format!("left behind: {}", got.left));
    }
    for (right, got) in right.conversations.iter().zip(&got.conversations) {
        faults.extend(got.wrong.clone());
        let deviations = [(&right.clear, &got.clear), (&right.secure, &got.secure)];
        faults.extend(
            deviations
                .iter()
                .flat_map(|(right, got)| deviation(right, got)),
        );
        if scenario.policy == "implicit" && !got.clear.is_empty() {
            faults.push(format!("in clear: {:?}", got.clear));
        }
    }
    if got.backends.len() > right.backends.len() {
        faults.push(format!("{} backends", got.backends.len()));
    }
    // In optional, the backend of the cleartext phase is the first, and the other one may be the only one left.
    let is_right = |bytes: &Vec<u8>| right.backends.iter().any(|whole| whole.starts_with(bytes));
    if let Some(bytes) = got.backends.iter().find(|bytes| !is_right(bytes)) {
        faults.push(format!(
            "a backend received {:?}",
            String::from_utf8_lossy(bytes)
        ));
    }
    let is_complete = got.conversations.iter().all(Conversation::is_complete);
    let is_served_again = got.conversations.iter().any(Conversation::is_complete);
    let is_listening = got
        .trace
        .ended
        .iter()
        .any(|ended| ["listener", "service"].contains(&ended.role) && ended.status.success());
    if is_listening && !is_served_again {
        faults.push("neither client was served".to_owned());
    }
    if is_complete && got.backends != right.backends {
        faults.push(format!("the backends received {:?}", got.backends));
    }
    faults.extend(judge_ends(scenario, point, fault, got));
    faults.extend(judge_times(got));
    if is_left_without_goodbye(scenario, got) {
        faults.push("the client was told nothing".to_owned());
    }
    if !got.zombies.is_empty() {
        faults.push(format!("zombies: {}", got.zombies));
    }
    if got.log.contains("panicked") {
        faults.push("a panic".to_owned());
    }
    // Nobody is left to say anything when the network process is killed.
    let is_silent = point.role == scenario.cast.first && fault == Fault::Killed;
    // A peer that closes breaks its socket: its end is in the session line, for whatever reason it was.
    let is_peers = point.role == "network"
        && [libc::SYS_sendto, libc::SYS_recvfrom].contains(&point.call)
        && [libc::EPIPE, libc::ECONNRESET]
            .map(Fault::Fails)
            .contains(&fault)
        && got.log.contains(": session ");
    // A balancer's health check begins like this, and is nobody's concern.
    let is_check = matches!(scenario.kind, Kind::Behind)
        && (point.call, fault) == (libc::SYS_recvfrom, Fault::Fails(libc::ECONNRESET));
    // It is told on standard error by the runtime, which knows nothing of a system log.
    let is_untold = scenario.kind.is_speechless() && fault == Fault::Fails(libc::ENOMEM);
    let is_told = is_silent || is_peers || is_check || is_untold;
    if !is_complete && !is_told && !has_cause(&right.log, &got.log) {
        faults.push("the log does not say why".to_owned());
    }
    if !is_complete && fault == Fault::Fails(libc::EINTR) {
        faults.push("EINTR ends it".to_owned());
    }
    faults
}

impl Conversation {
    fn is_complete(&self) -> bool {
        self.stopped.is_none() && self.wrong.is_none()
    }
}

/// Whether the client in clear heard not a word, though there was a process to say it, which ended by itself.
fn is_left_without_goodbye(scenario: &Scenario, got: &Outcome) -> bool {
    // To the listener's, and to a balancer whose header has not been read, nothing can be said by then.
    let is_spoken_to = scenario.policy != "implicit"
        && !matches!(scenario.kind, Kind::Behind)
        && !scenario.kind.is_listener();
    // What it is on cannot be found out, or not be copied: there is nothing yet by which to speak. Or it is what is broken.
    let is_unreachable = [
        "is no connection",
        "cannot copy a descriptor",
        "client gone",
    ]
    .iter()
    .any(|words| got.log.contains(words));
    let is_silent = got
        .conversations
        .iter()
        .all(|conversation| conversation.stopped.is_some() && conversation.clear.is_empty());
    is_spoken_to && is_silent && !is_unreachable && got.status.code().is_some()
}

/// Each wait ends by the limit that is its own.
fn judge_times(got: &Outcome) -> Vec<String> {
    let mut faults = Vec::new();
    for conversation in &got.conversations {
        let stopped = conversation.stopped.as_deref().unwrap_or_default();
        let limit = match stopped.split([':', ' ']).next().unwrap_or_default() {
            "handshake" => HANDSHAKE_SECONDS,
            // The goodbye's own limit is after that of login.
            _ => LOGIN_SECONDS,
        };
        let (limit, waited) = (Duration::from_secs(limit) + LATE, conversation.waited);
        if waited > limit {
            faults.push(format!("{waited:?} for {stopped}"));
        }
    }
    // A client that has gone is a side that has ended.
    if got.ending > LONGEST_ENDING {
        faults.push(format!("{:?} to the end", got.ending));
    }
    faults
}

/// Exit statuses and signals.
fn judge_ends(scenario: &Scenario, point: Point, fault: Fault, got: &Outcome) -> Vec<String> {
    let mut faults = Vec::new();
    let is_told = scenario.kind.is_speechless() || got.log.contains("memory allocation of");
    let is_out_of_memory = fault == Fault::Fails(libc::ENOMEM) && is_told;
    for ended in &got.trace.ended {
        let is_expected = match (ended.status.code(), ended.status.signal()) {
            (Some(0 | 100 | 111), _) => true,
            // Of a backend, or of a launcher in its place, that was killed: as a shell has it.
            (Some(137), _) => fault == Fault::Killed && ended.role == "network",
            (Some(134), _) => is_out_of_memory && ended.role == "network",
            (_, Some(libc::SIGKILL)) => {
                // Nothing was closed here, unlike by the kernel's close(2) that fails: a keeper was not told to end.
                let is_untold = (point.role, point.call, ended.role)
                    == ("service", libc::SYS_close, "keeper")
                    && got.log.contains("keepers are killed");
                // It said nothing, as far as could be told.
                let is_given_up =
                    ended.role == "keeper" && got.log.contains("no answer from the keeper");
                fault == Fault::Killed && point.role == ended.role
                    || !got.hung.is_empty()
                    || is_given_up
                    || is_untold
            }
            // In the sandbox the filter has something against abort(3) first.
            (_, Some(libc::SIGABRT | libc::SIGSYS)) => is_out_of_memory && point.role == ended.role,
            // The listener's and the connector's peer is gone.
            (_, Some(libc::SIGIO)) => ended.role == "connector",
            // The network process is gone: it was tied to it.
            (_, Some(libc::SIGTERM)) => point.role == "network",
            _ => false,
        };
        if !is_expected {
            faults.push(format!("{} ended by {}", ended.role, ended.status));
        }
    }
    faults
}

/// All lines as they should be, up to somewhere; then nothing, or our goodbye, or a refusal of STARTTLS, which may not have been
/// offered.
fn deviation(right: &[String], got: &[String]) -> Vec<String> {
    let is_same = |right: &str, got: &str| got == right || got == right.replace(" STARTTLS", "");
    let same = right
        .iter()
        .zip(got)
        .take_while(|(right, got)| is_same(right, got));
    let rest = &got[same.count()..];
    let is_ours = |line: &String| {
        line.starts_with("* BYE ") || line.starts_with("tls NO ") || line.starts_with("* NO ")
    };
    rest.iter()
        .filter(|line| !is_ours(line))
        .map(|line| format!("the client received {line:?}"))
        .collect()
}

/// Whether the log has a line that it has not where all is well, or a session that ended otherwise.
fn has_cause(right: &str, got: &str) -> bool {
    let end = |line: &str| {
        let (_, end) = line.split_once(" seconds=")?;
        Some(end.split_once(' ')?.1.to_owned())
    };
    let ends = |log: &str| -> BTreeSet<String> { log.lines().filter_map(end).collect() };
    let has_more = got.lines().any(|line| {
        let is_usual = line.starts_with("imap-tls: ending: ") || right.contains(line);
        end(line).is_none() && !is_usual
    });
    has_more || ends(got).difference(&ends(right)).next().is_some()
}

// ---- which points, and how they fail ----

/// How each call may plausibly fail (its manual page, and what resources there are); empty: never.
#[cfg(target_arch = "x86_64")]
#[allow(
    non_upper_case_globals,
    reason = "the names of system calls, as libc has them"
)]
fn plausible(call: i64, arguments: [u64; 6]) -> &'static [i32] {
    use libc::*;
    match call {
        SYS_read | SYS_recvfrom | SYS_recvmsg => &[EINTR, EAGAIN, ENOMEM, ECONNRESET, EIO],
        SYS_write => &[EINTR, EAGAIN, ENOSPC, EIO, EPIPE],
        SYS_sendto | SYS_sendmsg => &[EINTR, EAGAIN, EPIPE, ENOMEM, ECONNRESET, ENOBUFS],
        SYS_open | SYS_openat => &[EMFILE, EINTR, ENFILE, ENOMEM, EIO],
        SYS_socket | SYS_socketpair | SYS_epoll_create1 | SYS_signalfd4 | SYS_pipe2 => {
            &[EMFILE, ENFILE, ENOMEM]
        }
        SYS_accept4 | SYS_accept => &[ENFILE, EINTR, EAGAIN, EMFILE, ENOMEM, ECONNABORTED],
        // Only where it makes a descriptor; F_SETFL and the like have nothing to run out of.
        SYS_fcntl if arguments[1] == F_DUPFD_CLOEXEC as u64 => &[EMFILE],
        SYS_dup2 | SYS_dup3 => &[EINTR, EMFILE],
        SYS_clone | SYS_fork | SYS_vfork => &[EAGAIN, ENOMEM],
        SYS_execve => &[ENOMEM, EIO, EAGAIN, ENFILE],
        SYS_poll | SYS_ppoll | SYS_epoll_pwait => &[EINTR, ENOMEM],
        SYS_epoll_ctl => &[ENOMEM, ENOSPC],
        SYS_wait4 => &[EINTR],
        SYS_brk | SYS_mmap | SYS_mremap => &[ENOMEM],
        SYS_munmap => &[ENOMEM],
        SYS_madvise => &[ENOMEM, EAGAIN],
        SYS_mprotect => &[ENOMEM],
        SYS_close => &[EINTR, EIO],
        SYS_close_range => &[ENOMEM, EMFILE],
        SYS_fstat | SYS_newfstatat | SYS_stat | SYS_lstat | SYS_statx | SYS_access
        | SYS_faccessat | SYS_faccessat2 | SYS_readlink => &[ENOMEM, EIO],
        SYS_getdents64 | SYS_fsync | SYS_lseek | SYS_rename | SYS_unlink | SYS_mkdir
        | SYS_fchmod | SYS_fchown => &[EIO],
        SYS_chdir | SYS_fchdir | SYS_chroot => &[ENOMEM, EIO],
        SYS_getrandom => &[EINTR],
        SYS_bind | SYS_listen => &[ENOMEM],
        SYS_connect => &[EAGAIN, ENOMEM],
        SYS_setsockopt | SYS_getsockname | SYS_getpeername => &[ENOBUFS],
        SYS_shutdown => &[ENOTCONN],
        SYS_setuid | SYS_setgid | SYS_setresuid | SYS_setresgid | SYS_setgroups => {
            &[EAGAIN, ENOMEM]
        }
        // The steps of the sandbox, whatever a kernel may have against them.
        SYS_capset | SYS_prlimit64 | SYS_seccomp => &[EPERM],
        SYS_prctl if arguments[0] != PR_CAPBSET_DROP as u64 => &[EPERM],
        _ => &[],
    }
}

/// For the compiler alone: see `NEEDS`.
#[cfg(not(target_arch = "x86_64"))]
fn plausible(_: i64, _: [u64; 6]) -> &'static [i32] {
    &[]
}

/// All points with all ways to fail, or a choice of them.
fn jobs(scenario: &Scenario, right: &Outcome) -> Vec<(Point, Fault)> {
    let is_all = std::env::var("E2E_FAULTS").is_ok_and(|value| value == "all");
    let mut jobs = Vec::new();
    let stride = if is_all { 1 } else { scenario.kind.stride() };
    for (number, seen) in right.trace.seen.iter().enumerate().step_by(stride) {
        let errnos = plausible(seen.point.call, seen.arguments);
        if is_all {
            jobs.extend(
                errnos
                    .iter()
                    .map(|errno| (seen.point, Fault::Fails(*errno))),
            );
            jobs.push((seen.point, Fault::Killed));
        } else {
            let nth = seen.point.nth as usize;
            let chosen = errnos.get(nth % errnos.len().max(1));
            jobs.extend(chosen.map(|errno| (seen.point, Fault::Fails(*errno))));
            if number % 4 == 0 {
                jobs.push((seen.point, Fault::Killed));
            }
        }
    }
    jobs
}

/// `ROLE:CALL:NTH:ERRNO`, with numbers.
fn chosen_alone() -> Option<(String, i64, u32, Fault)> {
    let text = std::env::var("E2E_FAULTS")
        .ok()
        .filter(|value| value != "all")?;
    let parts: Vec<&str> = text.split(':').collect();
    let fault = match parts[3] {
        "kill" => Fault::Killed,
        errno => Fault::Fails(errno.parse().unwrap()),
    };
    Some((
        parts[0].to_owned(),
        parts[1].parse().unwrap(),
        parts[2].parse().unwrap(),
        fault,
    ))
}

/// How many runs there are at once: most of one's time is waiting.
const AT_ONCE: usize = 6;

fn run_all(test: &Test, scenario: &Scenario) {
    let right = scenario.run(test, Wanted::List);
    assert!(
        right.conversations.iter().all(Conversation::is_complete),
        "{:?}, log: {}",
        right.conversations,
        right.log
    );
    assert_eq!(right.status.code(), Some(0));
    let mut jobs = jobs(scenario, &right);
    if let Some((role, call, nth, fault)) = chosen_alone() {
        let seen = right.trace.seen.iter();
        let point = seen
            .map(|seen| seen.point)
            .find(|point| (point.role, point.call, point.nth) == (role.as_str(), call, nth));
        jobs = point.map(|point| (point, fault)).into_iter().collect();
    }
    let next = AtomicUsize::new(0);
    let missed = AtomicUsize::new(0);
    let completed = AtomicUsize::new(0);
    let found = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((point, fault)) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let got = scenario.run(test, Wanted::At(*point, *fault));
                    if !got.trace.is_hit {
                        missed.fetch_add(1, Ordering::Relaxed);
                    }
                    if got.conversations.iter().all(Conversation::is_complete) {
                        completed.fetch_add(1, Ordering::Relaxed);
                    }
                    let faults = judge(scenario, &right, *point, *fault, &got);
                    if chosen_alone().is_some() {
                        eprintln!("{:?}\n{:?}\n{}", got.conversations, got.status, got.log);
                    }
                    if !faults.is_empty() {
                        let mut text = format!("{point:?} {fault:?}: {}\n", faults.join("; "));
                        for conversation in &got.conversations {
                            writeln!(text, "  stopped: {:?}", conversation.stopped).unwrap();
                        }
                        for line in got.log.lines() {
                            writeln!(text, "  log: {line}").unwrap();
                        }
                        found.lock().unwrap().push(text);
                    }
                }
            });
        }
    });
    let (missed, completed) = (missed.into_inner(), completed.into_inner());
    let found = found.into_inner().unwrap();
    eprintln!(
        "{} calls, {} runs: {completed} sessions went on to their end, {missed} points were not reached, {} faults",
        right.trace.seen.len(),
        jobs.len(),
        found.len()
    );
    assert!(found.is_empty(), "{}", found.join("\n"));
    // What the kernel cuts otherwise, in one run or the other.
    assert!(
        missed * 20 <= jobs.len(),
        "{missed} points were not reached"
    );
}
