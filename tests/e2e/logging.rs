//! A log that takes nothing, or is gone, does not stop mail: a full pipe, a stuck journal, a terminal stopped with ^S, a full
//! disk, a system log that does not read. And when it takes lines again, it gets them, each whole.

use crate::harness::tracer::{self, Fault, ONE_LAUNCHER, Point, Wanted};
use crate::harness::*;
use libtest_mimic::Trial;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::Read;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub fn tests() -> Vec<Trial> {
    let stuck = |name: &str, make: fn() -> Stuck| {
        let name = format!("log: blocked: {name} stops no mail, and has later lines whole");
        test(&name, &[], move |test| stderr(test, make))
    };
    let syslog: &'static [Need] = &[Need::Root, Need::Command("tcpserver", "ucspi-tcp")];
    vec![
        stuck("a full pipe", full_pipe),
        stuck("a full stream socket, as the journal's", full_socket),
        stuck("a terminal stopped with ^S", stopped_terminal),
        test(
            "log: blocked: a pipe that fills as a line is written stops no mail",
            &[Need::Root, Need::X86_64],
            pipe_that_fills,
        ),
        test(
            "log: blocked: a pipe whose reader is gone stops no mail",
            &[],
            broken_pipe,
        ),
        test(
            "log: blocked: a file on a full disk stops no mail, and has later lines",
            syslog,
            full_disk,
        ),
        test(
            "log: blocked: a system log that does not read stops no mail, and has later lines",
            syslog,
            full_syslog,
        ),
        test(
            "log: blocked: a system log that is gone stops no mail, and has lines when it is back",
            syslog,
            syslog_gone,
        ),
    ]
}

const POLICIES: [&str; 3] = ["required", "optional", "implicit"];
/// Bulk, each way.
const BULK: u64 = 1 << 20;
/// How many clients there are at once under the listener.
const AT_ONCE: usize = 4;

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

/// With a line for each step.
fn program(test: &Test, policy: &str) -> Program {
    Program::new(test).tls(policy).flag("--verbose")
}

/// From the greeting to bulk in both directions.
fn work(client: &mut Client, policy: &str) {
    if policy == "implicit" {
        client.handshake(&TlsOffer::new(pki())).unwrap();
        client.greeting();
    } else {
        client.greeting();
        assert!(client.command("a CAPABILITY").is_ok());
        client.starttls(pki());
    }
    client.login();
    assert!(client.command("b SELECT INBOX").is_ok());
    assert!(client.command("c FETCH 1 BODY[]").is_ok());
    client.sink(BULK);
    client.source(BULK);
}

// ---- standard error ----

/// A standard error that takes nothing.
struct Stuck {
    stderr: OwnedFd,
    environment: Option<(&'static str, String)>,
    reader: File,
    /// Lets it take something again: what was in it is read away, and forgotten.
    let_go: fn(&Stuck),
}

impl Stuck {
    /// What can be read now.
    fn read(&self) -> String {
        let mut bytes = Vec::new();
        let mut piece = [0; 64 << 10];
        while is_ready(&self.reader, PollFlags::POLLIN) {
            let length = (&self.reader).read(&mut piece).unwrap();
            if length == 0 {
                break;
            }
            bytes.extend_from_slice(&piece[..length]);
        }
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    fn given_to(&self, program: Program) -> Program {
        let program = program.passing(self.stderr.try_clone().unwrap(), 2);
        match &self.environment {
            Some((name, value)) => program.env(name, value),
            None => program,
        }
    }
}

fn is_ready(fd: impl AsFd, event: PollFlags) -> bool {
    let mut descriptors = [PollFd::new(fd.as_fd(), event)];
    poll(&mut descriptors, PollTimeout::ZERO).unwrap() == 1
        && descriptors[0].revents().unwrap().contains(event)
}

fn full_pipe() -> Stuck {
    let (reader, stderr) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    sys::fill(stderr.as_raw_fd());
    Stuck {
        stderr,
        environment: None,
        reader: reader.into(),
        let_go: |stuck| drop(stuck.read()),
    }
}

fn full_socket() -> Stuck {
    let (reader, stderr) = UnixStream::pair().unwrap();
    let stderr = OwnedFd::from(stderr);
    let flags = nix::sys::socket::MsgFlags::MSG_DONTWAIT;
    for size in [4096, 1] {
        while nix::sys::socket::send(stderr.as_raw_fd(), &vec![b'x'; size], flags).is_ok() {}
    }
    let stat = File::from(stderr.try_clone().unwrap()).metadata().unwrap();
    Stuck {
        environment: Some(("JOURNAL_STREAM", format!("{}:{}", stat.dev(), stat.ino()))),
        stderr,
        reader: OwnedFd::from(reader).into(),
        let_go: |stuck| drop(stuck.read()),
    }
}

fn stopped_terminal() -> Stuck {
    let (reader, stderr) = sys::open_terminal();
    sys::control_flow(&stderr, libc::TCOOFF);
    Stuck {
        stderr,
        environment: None,
        reader: reader.into(),
        let_go: |stuck| sys::control_flow(&stuck.stderr, libc::TCOON),
    }
}

fn stderr(test: &Test, make: fn() -> Stuck) {
    // First, since it looks for zombies, and the listener leaves its keeper to whoever is its subreaper.
    for policy in POLICIES {
        each_by_itself(test, policy, &make());
    }
    for policy in POLICIES {
        listening(test, policy, &make());
        nobody_logs_in(test, policy, &make());
    }
}

fn each_by_itself(test: &Test, policy: &str, stuck: &Stuck) {
    let program = stuck.given_to(program(test, policy));
    let mut session = program.start();
    work(session.client(), policy);
    session.take_client().log_out();
    assert_eq!(session.wait_as_last().code(), Some(0));

    let mut session = program.start();
    work(session.client(), policy);
    (stuck.let_go)(stuck);
    session.take_client().log_out();
    assert_eq!(session.wait_code(), 0);
    let text = stuck.read();
    assert!(
        text.contains(&format!("{}: session policy={policy} ", session.peer)),
        "{text}"
    );
    assert_whole(&text, stuck);
    // It went nowhere else.
    assert_eq!(session.log(), "");
}

fn listening(test: &Test, policy: &str, stuck: &Stuck) {
    let port = free_port();
    let program = program(test, policy).option("--listen", format!("127.0.0.1:{port}"));
    let mut listener = stuck.given_to(program).start();
    let connect = || {
        Client::on(eventually("it listens", || {
            TcpStream::connect(("127.0.0.1", port)).ok()
        }))
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let mut client = connect();
                work(&mut client, policy);
                client.log_out();
            });
        }
    });
    let mut client = connect();
    work(&mut client, policy);
    (stuck.let_go)(stuck);
    client.log_out();
    let wanted = format!(": session policy={policy} ");
    let mut text = String::new();
    eventually("the session's line", || {
        text += &stuck.read();
        text.contains(&wanted).then_some(())
    });
    sys::kill(listener.network().0, libc::SIGTERM).unwrap();
    assert_eq!(listener.wait_code(), 0);
    text += &stuck.read();
    assert!(text.contains("imap-tls: ending: "), "{text}");
    assert_whole(&text, stuck);
    assert_eq!(listener.log(), "");
}

/// Deadlines hold, too.
fn nobody_logs_in(test: &Test, policy: &str, stuck: &Stuck) {
    let program = program(test, policy).option("--login-timeout", "3");
    let mut session = stuck.given_to(program).start();
    if policy == "implicit" {
        session.client().handshake(&TlsOffer::new(pki())).unwrap();
    }
    session.client().greeting();
    let line = session.client().line();
    assert!(line.starts_with("* BYE "), "{line}");
    session.client().read_to_end();
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

/// No line is torn, and none is in another. (What was there before it was let go is the beginning of the first, on a terminal.)
fn assert_whole(text: &str, stuck: &Stuck) {
    assert!(text.ends_with('\n'), "{text}");
    let priority = if stuck.environment.is_some() { "<" } else { "" };
    for line in text.lines().skip(1) {
        let start = line.trim_start_matches(|octet: char| {
            !priority.is_empty() && "<>0123456789".contains(octet)
        });
        assert!(
            line.starts_with(priority)
                && (line.starts_with("127.0.0.1:") || start.contains(": "))
                && line.matches("127.0.0.1:").count() <= 1,
            "{line:?} in {text}"
        );
    }
}

/// Between the moment when it is asked and the one when it writes, others fill it.
fn pipe_that_fills(test: &Test) {
    for nth in 0..3 {
        let (reader, stderr) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let program = program(test, "required").passing(stderr.try_clone().unwrap(), 2);
        let point = Point {
            role: "network",
            call: libc::SYS_write,
            nth,
        };
        let fills = Fault::Fills(stderr.as_raw_fd());
        let (mut client, _, tracing) =
            tracer::start(&program, ONE_LAUNCHER, Wanted::At(point, fills));
        work(&mut client, "required");
        client.log_out();
        let (session, trace, hung) = tracing.finish(Duration::from_secs(20));
        assert!(trace.is_hit, "write {nth}");
        assert!(hung.is_empty(), "{hung:?}");
        assert_eq!(session.status().code(), Some(0));
        drop(reader);
    }
}

fn broken_pipe(test: &Test) {
    for policy in POLICIES {
        let (_, stderr) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let mut session = program(test, policy).passing(stderr, 2).start();
        work(session.client(), policy);
        session.take_client().log_out();
        assert_eq!(session.wait_as_last().code(), Some(0));
        assert_eq!(session.log(), "");
    }
}

// ---- in a mount namespace ----

fn servers(test: &Test, program: &Program, setup: &str) -> [Server; 2] {
    [Superserver::Tcpserver, Superserver::Listener]
        .map(|kind| Server::start_in(test, kind, program, Some(setup)))
}

/// Returns when their processes have ended, too.
fn serve_many(server: &Server, policy: &str) {
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let mut client = server.connect();
                work(&mut client, policy);
                client.log_out();
            });
        }
    });
    eventually("all sessions have ended", || {
        server.sessions().is_empty().then_some(())
    });
}

fn full_disk(test: &Test) {
    let disk = test.path("disk");
    make_dir(&disk, 0o755);
    let log = disk.join("log");
    // The shell's own complaint goes there, too.
    let setup = format!(
        "mount -t tmpfs -o size=4k none {disk}; exec 2>>{log}; head -c 100000 /dev/zero >> {log} || :",
        disk = disk.display(),
        log = log.display(),
    );
    for policy in POLICIES {
        for server in servers(test, &program(test, policy), &setup) {
            let seen = PathBuf::from(format!(
                "/proc/{}/root{}",
                server.process().0,
                log.display()
            ));
            let length = || std::fs::metadata(&seen).unwrap().len();
            let full = length();
            assert_eq!(full, 4096);
            serve_many(&server, policy);
            assert_eq!(length(), full, "the disk is full");

            let mut client = server.connect();
            work(&mut client, policy);
            Tool::new(test, "nsenter")
                .args(["--mount", "--target", &server.process().0.to_string()])
                .args(["mount", "-o", "remount,size=1m"])
                .arg(&disk)
                .run()
                .success();
            client.log_out();
            eventually("the session's line", || {
                let text = String::from_utf8_lossy(&std::fs::read(&seen).unwrap()).into_owned();
                text.contains(&format!(": session policy={policy} "))
                    .then_some(())
            });
            assert_eq!(server.log(), "");
        }
    }
}

fn fill_queue(path: &Path) {
    let socket = UnixDatagram::unbound().unwrap();
    socket.connect(path).unwrap();
    socket.set_nonblocking(true).unwrap();
    while socket.send(b"full").is_ok() {}
}

fn full_syslog(test: &Test) {
    let path = test.path("log.sock");
    let setup = system_log::with_system_log(test, &path);
    let log = SystemLog::bind(&path);
    for policy in POLICIES {
        let program = program(test, policy).option("--log", "syslog");
        for server in servers(test, &program, &setup) {
            log.read();
            fill_queue(&path);
            serve_many(&server, policy);
            assert!(log.read().iter().all(|line| line == "full"));

            fill_queue(&path);
            let mut client = server.connect();
            work(&mut client, policy);
            assert!(log.read().iter().all(|line| line == "full"));
            client.log_out();
            log.wait_for(&format!(": session policy={policy} "));
            assert_ended_well(server, AT_ONCE + 1);
        }
    }
}

/// A system log that is started anew has another socket: connections that come then use that, and the listener, too.
fn syslog_gone(test: &Test) {
    let path = test.path("log.sock");
    let setup = system_log::with_system_log(test, &path);
    for policy in POLICIES {
        let log = SystemLog::bind(&path);
        let program = program(test, policy).option("--log", "syslog");
        let servers = servers(test, &program, &setup);
        drop(log);
        // With an address that nobody is at, and without one.
        serve_many(&servers[1], policy);
        std::fs::remove_file(&path).unwrap();
        servers.iter().for_each(|server| serve_many(server, policy));

        let log = SystemLog::bind(&path);
        for mut server in servers {
            let mut client = server.connect();
            work(&mut client, policy);
            client.log_out();
            log.wait_for(&format!(": session policy={policy} "));
            if server.is_listener() {
                server.signal(libc::SIGTERM);
                assert_eq!(server.wait().code(), Some(0));
                log.wait_for("imap-tls: ending: ");
                assert_ended_well(server, 2 * AT_ONCE + 1);
            }
        }
        std::fs::remove_file(&path).unwrap();
    }
}

/// None of its sessions ended but with 0, and none of its lines went to standard error.
fn assert_ended_well(server: Server, sessions: usize) {
    let log = eventually("all sessions have ended", || {
        let log = server.log();
        let ends = log.matches("tcpserver: end ").count();
        (server.is_listener() || ends == sessions).then_some(log)
    });
    let is_tcpservers = |line: &str| line.starts_with("tcpserver: ");
    let is_good = |line: &str| !line.starts_with("tcpserver: end ") || line.ends_with(" status 0");
    for line in log.lines() {
        assert!(is_tcpservers(line) && is_good(line), "{line}");
    }
}
