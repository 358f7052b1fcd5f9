//! The program under test: its options, and starting it with a client's connection as a superserver does.

use super::backend::{Backend, Record};
use super::client::{Client, PATIENCE};
use super::pki::{Key, Pki};
use super::process::Process;
use super::sys::{self, Descriptor};
use super::{Test, dir, is_root};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The uid and gid of the network process in tests: a number that no account has.
pub const NETWORK_ID: u32 = 61001;
/// The uid of the keeper in tests.
pub const KEEPER_ID: u32 = 61002;

/// What the client's socket is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Socket {
    Tcp4,
    Tcp6,
    /// The same, which the client has reset before the program starts.
    ResetTcp4,
    /// An IPv4 client on a dual-stack IPv6 socket: `::ffff:127.0.0.1`.
    MappedTcp4,
    /// A connection to a listening unix socket.
    Unix,
    /// The other end of one, as of the journal's on standard output: who listens plays the client.
    UnixOutgoing,
    /// A socketpair.
    Pair,
    /// A pipe on descriptor 0 and another on 1.
    Pipes,
}

/// Where the program finds it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Handover {
    /// Descriptors 0 and 1.
    Stdio,
    /// Descriptor 3 with LISTEN_FDS; 0 and 1 are /dev/null.
    ListenFd,
    /// Descriptor 3 with LISTEN_FDS; 0 and 1 are closed.
    ListenFdOnly,
}

/// What descriptor 2 is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stderr {
    /// A file that `Session::log` reads.
    Log,
    /// The client's socket, as under inetd.
    Client,
    Closed,
    Null,
}

/// The program's command line and environment. Each method replaces what was set before.
#[derive(Clone, Debug)]
pub struct Program {
    options: Vec<(String, Option<OsString>)>,
    backend: Vec<OsString>,
    environment: BTreeMap<String, OsString>,
    test: Test,
    ignored_signals: Vec<i32>,
    blocked_signals: Vec<i32>,
    passed: Vec<(Arc<OwnedFd>, i32)>,
    user: Option<u32>,
    is_traced: bool,
}

impl Program {
    /// `--tls required`, a P-256 certificate, the normal scripted backend; as root `--user`, `--group`, `--keeper-user` and
    /// `--chroot` (numbers, an empty directory of this test), else `--unprivileged`.
    pub fn new(test: &Test) -> Self {
        let program = Self {
            options: Vec::new(),
            backend: Vec::new(),
            environment: BTreeMap::new(),
            test: test.clone(),
            ignored_signals: Vec::new(),
            blocked_signals: Vec::new(),
            passed: Vec::new(),
            user: None,
            is_traced: false,
        };
        let program = program
            .option("--tls", "required")
            .pki(Pki::of(Key::P256))
            .play(&Backend::imap());
        let program = program
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env(super::MARKER, test.marker());
        if is_root() {
            let program = program
                .option("--user", NETWORK_ID.to_string())
                .option("--group", NETWORK_ID.to_string());
            program
                .option("--keeper-user", KEEPER_ID.to_string())
                .option("--chroot", test.empty_dir())
        } else {
            program.flag("--unprivileged")
        }
    }

    /// Sets an option with a value.
    pub fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self = self.without(name);
        self.options
            .push((name.to_owned(), Some(value.as_ref().to_owned())));
        self
    }

    /// Gives an option that may be repeated once more.
    pub fn also(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.options
            .push((name.to_owned(), Some(value.as_ref().to_owned())));
        self
    }

    /// Sets an option without a value.
    pub fn flag(mut self, name: &str) -> Self {
        self = self.without(name);
        self.options.push((name.to_owned(), None));
        self
    }

    /// `--connect`, in the place of BACKEND.
    pub fn connect(self, remote: &super::Remote) -> Self {
        self.backend([] as [&str; 0])
            .option("--connect", &remote.target)
    }

    /// Removes an option.
    pub fn without(mut self, name: &str) -> Self {
        self.options.retain(|(other, _)| other != name);
        self
    }

    /// `--tls`: required, optional, implicit.
    pub fn tls(self, policy: &str) -> Self {
        self.option("--tls", policy)
    }

    /// `--cert` and `--key`.
    pub fn pki(self, pki: &Pki) -> Self {
        self.option("--cert", &pki.cert).option("--key", &pki.key)
    }

    /// Sets an environment variable; nothing is inherited from the tests but PATH.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .insert(name.to_owned(), value.as_ref().to_owned());
        self
    }

    /// The scripted backend.
    pub fn play(self, backend: &Backend) -> Self {
        let command = backend.command(&self.test.record());
        self.backend(command)
    }

    /// Any backend command; an empty one leaves BACKEND away.
    pub fn backend(mut self, command: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.backend = command
            .into_iter()
            .map(|word| word.as_ref().to_owned())
            .collect();
        self
    }

    /// The superserver leaves this signal ignored.
    pub fn ignoring(mut self, signal: i32) -> Self {
        self.ignored_signals.push(signal);
        self
    }

    /// The superserver leaves this signal blocked.
    pub fn blocking(mut self, signal: i32) -> Self {
        self.blocked_signals.push(signal);
        self
    }

    /// The superserver hands this descriptor over too, under this number.
    pub fn passing(mut self, descriptor: impl Into<OwnedFd>, number: i32) -> Self {
        self.passed.push((Arc::new(descriptor.into()), number));
        self
    }

    /// With /dev/null on descriptor 0.
    pub fn without_input(self) -> Self {
        self.passing(File::open("/dev/null").unwrap(), 0)
    }

    /// The thread that starts it traces it: see [`super::tracer`].
    pub fn traced(mut self) -> Self {
        self.is_traced = true;
        self
    }

    /// It is started by this user instead of the tests' own (who must be root); group of the same number, no other groups.
    pub fn started_by(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// Who starts it, if not the tests' own user.
    pub fn user(&self) -> Option<u32> {
        self.user
    }

    /// The whole command line, the program's path first.
    pub fn command_line(&self) -> Vec<OsString> {
        let mut line = vec![dir::run_path("imap-tls").into_os_string()];
        for (name, value) in &self.options {
            line.push(name.into());
            line.extend(value.clone());
        }
        if !self.backend.is_empty() {
            line.push("--".into());
            line.extend(self.backend.iter().cloned());
        }
        line
    }

    /// The options and BACKEND as IMAP_TLS_ variables, and the other variables.
    pub fn as_environment(&self) -> BTreeMap<String, OsString> {
        let mut all = self.environment.clone();
        for (name, value) in &self.options {
            let name = format!(
                "IMAP_TLS_{}",
                name.trim_start_matches('-')
                    .replace('-', "_")
                    .to_uppercase()
            );
            all.insert(name, value.clone().unwrap_or_else(|| "true".into()));
        }
        if !self.backend.is_empty() {
            all.insert(
                "IMAP_TLS_BACKEND".to_owned(),
                self.backend.join(OsStr::new(" ")),
            );
        }
        all
    }

    /// The environment without options.
    pub fn environment(&self) -> &BTreeMap<String, OsString> {
        &self.environment
    }

    /// Starts it on an IPv4 connection on descriptors 0 and 1, with a log file on 2.
    pub fn start(&self) -> Session {
        // Who is to listen is given no client.
        let is_listening = |(name, _): &(String, _)| name == "--listen" || name == "--keep";
        let socket = if self.options.iter().any(is_listening) {
            Socket::Pair
        } else {
            Socket::Tcp4
        };
        self.start_on(socket, Handover::Stdio, Stderr::Log)
    }

    /// Starts it on any kind of connection.
    pub fn start_on(&self, socket: Socket, handover: Handover, stderr: Stderr) -> Session {
        let pair = connect(socket, self.test.dir());
        let mut command = self.bare_command(handover);
        let mut descriptors: Vec<_> = self
            .passed
            .iter()
            .map(|(passed, number)| Descriptor::CopiedTo(passed.as_raw_fd(), *number))
            .collect();
        let null = || {
            Stdio::from(
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/dev/null")
                    .unwrap(),
            )
        };
        let (log_path, log_file) = self.test.log_file();
        match handover {
            Handover::Stdio => {
                command.stdin(Stdio::from(pair.server_input.try_clone().unwrap()));
                command.stdout(Stdio::from(pair.server_output.try_clone().unwrap()));
            }
            Handover::ListenFd | Handover::ListenFdOnly => {
                command.stdin(null()).stdout(null());
                descriptors.push(Descriptor::CopiedTo(pair.server_input.as_raw_fd(), 3));
                command.env("LISTEN_FDS", "1");
                if handover == Handover::ListenFdOnly {
                    descriptors.extend([Descriptor::Closed(0), Descriptor::Closed(1)]);
                }
            }
        }
        match stderr {
            Stderr::Log => command.stderr(Stdio::from(log_file)),
            Stderr::Client => command.stderr(Stdio::from(pair.server_output.try_clone().unwrap())),
            Stderr::Closed | Stderr::Null => command.stderr(null()),
        };
        if stderr == Stderr::Closed {
            descriptors.push(Descriptor::Closed(2));
        }
        sys::prepare(&mut command, descriptors);
        for signal in &self.ignored_signals {
            sys::ignore_signal(&mut command, *signal);
        }
        for signal in &self.blocked_signals {
            sys::block_signal(&mut command, *signal);
        }
        if self.is_traced {
            sys::be_traced(&mut command);
        }
        let initial = [&pair.server_input, &pair.server_output].map(|descriptor| {
            let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
            fs::read_link(path).unwrap().display().to_string()
        });
        let child = self.test.spawn_prepared(command);
        Session {
            initial,
            child,
            client: pair.client,
            peer: pair.peer,
            local: pair.local,
            log_path,
            test: self.test.clone(),
            status: None,
        }
    }

    /// Runs it to its end without any connection: descriptor 0 is /dev/null, for usage errors and `--help`.
    /// Gives exit status and output.
    pub fn run(&self) -> std::process::Output {
        let mut command = self.bare_command(Handover::Stdio);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        sys::prepare(&mut command, Vec::new());
        self.test
            .spawn_prepared(command)
            .wait_with_output()
            .unwrap()
    }

    fn bare_command(&self, handover: Handover) -> Command {
        let line = self.command_line();
        let mut command = if handover == Handover::Stdio {
            Command::new(&line[0])
        } else {
            // LISTEN_PID must be the program's own id, which only it itself can know in time.
            let mut shell = Command::new("/bin/sh");
            shell
                .args(["-c", "LISTEN_PID=$$; export LISTEN_PID; exec \"$0\" \"$@\""])
                .arg(&line[0]);
            shell
        };
        if let Some(uid) = self.user {
            command.uid(uid).gid(uid);
        }
        command
            .args(&line[1..])
            .env_clear()
            .envs(&self.environment)
            .current_dir("/");
        command
    }
}

/// Both ends of a connection.
struct Pair {
    /// Unless it has gone.
    client: Option<Client>,
    server_input: OwnedFd,
    server_output: OwnedFd,
    peer: String,
    local: String,
}

fn connect(socket: Socket, dir: &Path) -> Pair {
    let on_tcp = |listen: SocketAddr, to: SocketAddr| {
        let listener = TcpListener::bind(listen).unwrap();
        let client = TcpStream::connect(SocketAddr::new(
            to.ip(),
            listener.local_addr().unwrap().port(),
        ))
        .unwrap();
        client.set_nodelay(true).unwrap();
        let (server, _) = listener.accept().unwrap();
        // As log lines name it: a mapped address as plain IPv4.
        let peer = SocketAddr::new(
            client.local_addr().unwrap().ip().to_canonical(),
            client.local_addr().unwrap().port(),
        )
        .to_string();
        let local = server.local_addr().unwrap();
        let local = SocketAddr::new(local.ip().to_canonical(), local.port()).to_string();
        let server: OwnedFd = server.into();
        Pair {
            client: Some(Client::on(client)),
            server_input: server.try_clone().unwrap(),
            server_output: server,
            peer,
            local,
        }
    };
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, 0));
    match socket {
        Socket::Tcp4 => on_tcp(v4, v4),
        Socket::ResetTcp4 => {
            let mut pair = on_tcp(v4, v4);
            // On this machine it has come when the call returns.
            if let Some(client) = pair.client.take() {
                client.reset();
            }
            Pair {
                peer: "gone".to_owned(),
                ..pair
            }
        }
        Socket::Tcp6 => on_tcp(v6, v6),
        Socket::MappedTcp4 => on_tcp(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)), v4),
        Socket::Unix | Socket::UnixOutgoing => {
            let path = dir.join(format!("client-{}.sock", super::next_number()));
            let listener = UnixListener::bind(&path).unwrap();
            let outgoing = UnixStream::connect(&path).unwrap();
            let (incoming, _) = listener.accept().unwrap();
            let (client, server) = if socket == Socket::Unix {
                (outgoing, incoming)
            } else {
                (incoming, outgoing)
            };
            let server: OwnedFd = server.into();
            Pair {
                client: Some(Client::on(client)),
                server_input: server.try_clone().unwrap(),
                server_output: server,
                peer: "unix".to_owned(),
                local: "unix".to_owned(),
            }
        }
        Socket::Pair => {
            let (client, server) = socketpair(
                AddressFamily::Unix,
                SockType::Stream,
                None,
                SockFlag::SOCK_CLOEXEC,
            )
            .unwrap();
            Pair {
                client: Some(Client::on(client)),
                server_input: server.try_clone().unwrap(),
                server_output: server,
                peer: "unix".to_owned(),
                local: "unix".to_owned(),
            }
        }
        Socket::Pipes => {
            let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
            let ((server_input, to_server), (from_server, server_output)) = (pipe(), pipe());
            let client = Client::on_pair(from_server, to_server);
            Pair {
                client: Some(client),
                server_input,
                server_output,
                peer: "pipe".to_owned(),
                local: "pipe".to_owned(),
            }
        }
    }
}

/// One connection's run of the program. Dropping it closes the client; the leak check then wants everything gone.
pub struct Session {
    child: Child,
    client: Option<Client>,
    /// How log lines name the client: `127.0.0.1:50312`, `[::1]:50312`, `unix`, `pipe`, `gone`.
    pub peer: String,
    /// The address that the client connected to, likewise.
    pub local: String,
    log_path: PathBuf,
    test: Test,
    status: Option<ExitStatus>,
    initial: [String; 2],
}

/// The processes of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Processes {
    pub network: Process,
    /// While the handshake is not over.
    pub keeper: Option<Process>,
    /// With `--cert-dir`, while the handshake is not over: root, but for most of its capabilities.
    pub opener: Option<Process>,
    /// Privileged and waiting, before it becomes the backend.
    pub launcher: Option<Process>,
    /// With `--connect`, while there is no connection to the backend: without privileges.
    pub connectors: usize,
    pub connector: Option<Process>,
    pub backend: Option<Process>,
}

impl Processes {
    /// Sorts out the children of a network process.
    pub fn of(network: Process) -> Self {
        let mut found = Self {
            network,
            keeper: None,
            opener: None,
            launcher: None,
            connectors: 0,
            connector: None,
            backend: None,
        };
        let program = network.exe();
        for child in network.children().into_iter().filter(|child| child.alive()) {
            let Some(status) = child.status_if_alive() else {
                continue;
            };
            let uid = status.numbers("Uid")[0];
            if child.exe() != program {
                found.backend = Some(child);
            } else if is_root() && uid == KEEPER_ID || !is_root() && found.launcher.is_some() {
                found.keeper = Some(child);
            } else if is_root() && uid == NETWORK_ID {
                found.connectors += 1;
                found.connector = Some(child);
            } else if is_root() && status.mask("CapBnd") == 0 {
                found.opener = Some(child);
            } else {
                found.launcher = Some(child);
            }
        }
        found
    }
}

impl Session {
    /// The client's side.
    pub fn client(&mut self) -> &mut Client {
        self.client.as_mut().expect("the client is still here")
    }

    /// Takes the client's side away, for another thread or to drop it.
    pub fn take_client(&mut self) -> Client {
        self.client.take().expect("the client is still here")
    }

    /// The client goes away: its socket is closed.
    pub fn close_client(&mut self) {
        self.client = None;
    }

    /// What the program's descriptors 0 and 1 (or 3) were at the start, as /proc names them: `socket:[123]`.
    pub fn initial_descriptors(&self) -> &[String; 2] {
        &self.initial
    }

    /// The process that was started: the network process.
    pub fn network(&self) -> Process {
        Process(i32::try_from(self.child.id()).unwrap())
    }

    /// All processes of the connection as they are now.
    pub fn processes(&self) -> Processes {
        Processes::of(self.network())
    }

    /// Waits until the network process waits for input in poll or ppoll, so that nothing is going on in it.
    pub fn wait_idle(&self) -> Process {
        let network = self.network();
        eventually("the network process waits in poll", || {
            network.is_idle().then_some(())
        });
        network
    }

    /// What the scripted backends recorded.
    pub fn record(&self) -> Record {
        self.test.record()
    }

    /// All that was logged to descriptor 2 so far (the backend's own stderr too).
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log_path).unwrap()).into_owned()
    }

    /// Waits until a line of the log contains this and returns the line.
    pub fn wait_log(&self, wanted: &str) -> String {
        eventually(&format!("the log has {wanted:?}"), || {
            self.log()
                .lines()
                .find(|line| line.contains(wanted))
                .map(str::to_owned)
        })
    }

    /// The session line's fields (`policy`, `tls`, `group`, `cipher`, `sni`, `in`, `out`, `seconds`, `end` ...), without quotes.
    pub fn session_line(&self) -> BTreeMap<String, String> {
        parse_session_line(&self.wait_log(": session "), &self.peer)
    }

    /// Waits for the program's end.
    pub fn wait(&mut self) -> ExitStatus {
        if let Some(status) = self.status {
            return status;
        }
        let status = wait_child(&mut self.child, PATIENCE)
            .unwrap_or_else(|| panic!("the program does not end; its log: {}", self.log()));
        self.status = Some(status);
        status
    }

    /// Waits for the program's end, which must be an exit, and returns the status.
    pub fn wait_code(&mut self) -> i32 {
        let status = self.wait();
        status
            .code()
            .unwrap_or_else(|| panic!("ended by signal {:?}; log: {}", status.signal(), self.log()))
    }

    /// Waits for the end and shows that it was the last: no process of this test remains at that moment, not even a zombie.
    pub fn wait_as_last(&mut self) -> ExitStatus {
        let status = self.wait();
        let left = self.test.descendants();
        assert!(
            left.is_empty(),
            "still there when the program has ended: {}",
            super::describe(&left)
        );
        status
    }

    /// Who waited for it instead says how it ended.
    pub fn ended_with(&mut self, status: ExitStatus) {
        self.status = Some(status);
    }

    /// How it ended, which somebody has waited for.
    pub fn status(&self) -> ExitStatus {
        self.status.expect("it has ended")
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.status.is_some() || {
            self.status = self.child.try_wait().unwrap();
            self.status.is_some()
        }
    }

    /// Kills a process of this session.
    pub fn kill(&self, process: Process, signal: i32) {
        sys::kill(process.0, signal).unwrap();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.client = None;
        if std::thread::panicking() {
            eprintln!(
                "--- log of the session of {} ---\n{}---",
                self.peer,
                fs::read_to_string(&self.log_path).unwrap_or_default()
            );
        }
        if self.status.is_none()
            && wait_child(
                &mut self.child,
                if std::thread::panicking() {
                    Duration::ZERO
                } else {
                    PATIENCE
                },
            )
            .is_none()
        {
            let _ = self.child.kill();
            let _ = self.child.wait();
            if !std::thread::panicking() {
                panic!(
                    "the program does not end after its client has gone; its log: {}",
                    self.log()
                );
            }
        }
    }
}

/// Fields of a session line that must belong to `peer`.
pub fn parse_session_line(line: &str, peer: &str) -> BTreeMap<String, String> {
    let rest = line
        .strip_prefix(&format!("{peer}: session "))
        .unwrap_or_else(|| panic!("{line:?} does not begin with {peer}: session"));
    let mut fields = BTreeMap::new();
    let mut rest = rest.trim();
    while let Some((name, value)) = rest.split_once('=') {
        let (value, after) = match value.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').expect("a closing quote"),
            None => value.split_once(' ').unwrap_or((value, "")),
        };
        fields.insert(name.to_owned(), value.to_owned());
        rest = after.trim_start();
    }
    fields
}

/// Waits for a child; nothing when the time is over.
pub fn wait_child(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Polls until `attempt` gives something; panics with `what` when the usual patience is over.
pub fn eventually<T>(what: &str, attempt: impl FnMut() -> Option<T>) -> T {
    within(what, PATIENCE, attempt)
}

/// [`eventually`] with another patience.
pub fn within<T>(what: &str, patience: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// A log file opened for appending, as a supervisor gives it.
pub fn open_log(path: &Path) -> File {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap()
}
