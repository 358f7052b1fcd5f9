//! Real superservers in the foreground, each with a configuration of its own, on loopback.

use super::client::Client;
use super::process::Process;
use super::program::{Processes, Program, eventually};
use super::tool::{Running, Tool, find};
use super::{Test, free_port, write_file};
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::net::{SocketAddr, TcpStream};

/// The superservers that tests can start.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Superserver {
    /// ucspi-tcp's: descriptors 0 and 1; 2 is its log; TCPREMOTEIP and others are set.
    Tcpserver,
    /// Descriptors 0, 1 and 2 are the client's socket; REMOTE_HOST is set.
    Xinetd,
    /// Descriptors 0, 1 and 2 are the client's socket. The program is set up by IMAP_TLS_ variables alone, since inetd
    /// takes few arguments: backend arguments must be free of spaces.
    OpenbsdInetd,
    /// `systemd-socket-activate --accept --inetd`: descriptors 0 and 1; 2 is its log.
    SystemdInetd,
    /// `systemd-socket-activate --accept`: LISTEN_FDS; 2 is its log.
    SystemdListenFds,
    /// None: the program listens by itself (`--listen`).
    Listener,
    /// `systemd-socket-activate`: the program listens, on a socket in LISTEN_FDS.
    SystemdListener,
}

impl Superserver {
    /// The command and its Debian package, for `Need::Command`.
    pub const fn command(self) -> (&'static str, &'static str) {
        match self {
            Superserver::Tcpserver => ("tcpserver", "ucspi-tcp"),
            Superserver::Xinetd => ("xinetd", "xinetd"),
            Superserver::OpenbsdInetd => ("inetd", "openbsd-inetd"),
            Superserver::SystemdInetd
            | Superserver::SystemdListenFds
            | Superserver::SystemdListener => ("systemd-socket-activate", "systemd"),
            // Always there.
            Superserver::Listener => ("sh", "dash"),
        }
    }

    /// Whether one process of the program serves all clients, by processes of theirs.
    pub fn is_listener(self) -> bool {
        matches!(self, Superserver::Listener | Superserver::SystemdListener)
    }

    /// Whether descriptor 2 of the program is the client's socket.
    pub fn stderr_is_client(self) -> bool {
        matches!(self, Superserver::Xinetd | Superserver::OpenbsdInetd)
    }
}

/// A running superserver; ended when dropped.
pub struct Server {
    kind: Superserver,
    running: Running,
    pub port: u16,
}

impl Server {
    /// Starts `program` under a superserver on a free port of 127.0.0.1.
    pub fn start(test: &Test, kind: Superserver, program: &Program) -> Self {
        Self::start_in(test, kind, program, None)
    }

    /// The same; with `setup` in a mount namespace of its own (root), after that shell script has arranged it.
    pub fn start_in(
        test: &Test,
        kind: Superserver,
        program: &Program,
        setup: Option<&str>,
    ) -> Self {
        let mut server = Self::start_listening(test, kind, program, setup);
        if server.kind == Superserver::Listener {
            // It listens first, then starts its keeper and waits for that to be ready, and looks for clients and signals at last.
            eventually("the listener serves", || {
                assert!(
                    !server.running.has_ended(),
                    "the listener ended: {}",
                    server.log()
                );
                server.keeper().filter(|_| server.process().is_idle())
            });
        }
        server
    }

    /// The same, but waits only until it listens: a listener has then not read yet what it needs to serve.
    pub fn start_listening(
        test: &Test,
        kind: Superserver,
        program: &Program,
        setup: Option<&str>,
    ) -> Self {
        let mut program = program.clone();
        let mut kind = kind;
        if kind == Superserver::Tcpserver && std::env::var_os("E2E_LISTENER").is_some() {
            kind = Superserver::Listener;
            program = program.env("IMAP_TLS_MAX_PER_SOURCE", "240");
        }
        let program = &program;
        let port = free_port();
        let line = program.command_line();
        let at = format!("127.0.0.1:{port}");
        let mut environment = program.environment().clone();
        environment.insert(super::MARKER.to_owned(), test.marker().into());
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
        match kind {
            Superserver::Tcpserver => {
                add(&[
                    "-v",
                    "-H",
                    "-R",
                    "-l",
                    "0",
                    "-c",
                    "240",
                    "-b",
                    "240",
                    "127.0.0.1",
                    &port.to_string(),
                ]);
                arguments.extend(line);
            }
            Superserver::Xinetd => {
                let config = test.path("xinetd.conf");
                write_file(
                    &config,
                    xinetd_config(test, port, &line, &environment),
                    0o644,
                );
                add(&[
                    "-f",
                    config.to_str().unwrap(),
                    "-dontfork",
                    "-pidfile",
                    test.path("xinetd.pid").to_str().unwrap(),
                ]);
            }
            Superserver::OpenbsdInetd => {
                let config = test.path("inetd.conf");
                let program_path = line[0].to_str().unwrap();
                write_file(
                    &config,
                    format!("{at} stream tcp nowait root {program_path} imap-tls\n"),
                    0o644,
                );
                add(&["-d", "-i", "-E", config.to_str().unwrap()]);
                environment = program.as_environment();
            }
            Superserver::Listener => {
                add(&["--listen", &at]);
                arguments.extend(line[1..].iter().cloned());
            }
            Superserver::SystemdInetd
            | Superserver::SystemdListenFds
            | Superserver::SystemdListener => {
                if kind != Superserver::SystemdListener {
                    add(&["--accept"]);
                }
                add(&["-l", &at]);
                if kind == Superserver::SystemdInetd {
                    add(&["--inetd"]);
                }
                for (name, value) in &environment {
                    add(&["-E", &format!("{name}={}", value.to_str().unwrap())]);
                }
                arguments.extend(line);
            }
        }
        let path = match kind {
            Superserver::Listener => super::dir::run_path("imap-tls"),
            _ => find(kind.command().0).unwrap_or_else(|| panic!("no {kind:?}")),
        };
        let tool = match (setup, program.user()) {
            (None, None) => Tool::new(test, path.to_str().unwrap()),
            (None, Some(user)) => Tool::new(test, "setpriv")
                .args([format!("--reuid={user}"), format!("--regid={user}")])
                .arg("--clear-groups")
                .arg(&path),
            (Some(script), _) => {
                let script = format!("set -e\n{script}\nexec \"$0\" \"$@\"");
                let tool = Tool::new(test, "unshare").args([
                    "--mount",
                    "--propagation",
                    "private",
                    "/bin/sh",
                    "-c",
                    &script,
                ]);
                tool.arg(&path)
            }
        };
        let running = tool.args(arguments).envs(environment).start();
        let mut server = Self {
            kind,
            running,
            port,
        };
        eventually(&format!("{kind:?} listens"), || {
            assert!(
                !server.running.has_ended(),
                "{kind:?} ended: {}",
                server.log()
            );
            is_listening(port).then_some(())
        });
        server
    }

    /// A new client.
    pub fn connect(&self) -> Client {
        Client::on(self.connect_socket())
    }

    /// A new client whose address is another one of loopback's.
    pub fn connect_from(&self, source: std::net::Ipv4Addr) -> Client {
        Client::on(self.connect_socket_from(source))
    }

    /// The same as a bare socket.
    pub fn connect_socket_from(&self, source: std::net::Ipv4Addr) -> TcpStream {
        use nix::sys::socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket,
        };
        use std::os::fd::AsRawFd;
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
        let from = SockaddrIn::from(std::net::SocketAddrV4::new(source, 0));
        bind(socket.as_raw_fd(), &from).unwrap();
        connect(
            socket.as_raw_fd(),
            &SockaddrIn::new(127, 0, 0, 1, self.port),
        )
        .unwrap();
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// A new connection as a bare socket.
    pub fn connect_socket(&self) -> TcpStream {
        let stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], self.port))).unwrap();
        stream.set_nodelay(true).unwrap();
        stream
    }

    /// All that it and (unless descriptor 2 is the client's) the program and its backend wrote to descriptor 2.
    pub fn log(&self) -> String {
        self.running.log()
    }

    /// What [`Server::log`] reads.
    pub fn log_path(&self) -> &std::path::Path {
        &self.running.log_path
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

    /// What was started: the superserver, or the listener.
    pub fn process(&self) -> Process {
        self.running.process()
    }

    /// The listener's keeper, which alone waits for many.
    pub fn keeper(&self) -> Option<Process> {
        // Any of them may be gone before it was looked at.
        let waits_for_many = |child: &Process| {
            let entries = std::fs::read_dir(format!("/proc/{}/fd", child.0));
            let mut targets = entries
                .into_iter()
                .flatten()
                .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
            targets.any(|target| target.to_string_lossy().contains("eventpoll"))
        };
        if !self.kind.is_listener() {
            return None;
        }
        let children = self.running.process().children();
        children.into_iter().find(waits_for_many)
    }

    /// Whether the program listens by itself.
    pub fn is_listener(&self) -> bool {
        self.kind.is_listener()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        super::sys::kill(self.running.process().0, signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        self.running.wait()
    }

    /// The network processes of the connections that are open now.
    pub fn sessions(&self) -> Vec<Processes> {
        let program = super::dir::run_path("imap-tls");
        if self.kind.is_listener() {
            let keeper = self.keeper();
            let children = self.running.process().children().into_iter();
            return children
                .filter(|child| child.exe().as_ref() == Some(&program) && Some(*child) != keeper)
                .map(Processes::of)
                .collect();
        }
        let is_network = |process: &Process| {
            process.exe().as_ref() == Some(&program)
                && process.parent().and_then(Process::exe).as_ref() != Some(&program)
        };
        self.running
            .process()
            .descendants()
            .into_iter()
            .filter(is_network)
            .map(Processes::of)
            .collect()
    }
}

fn xinetd_config(
    test: &Test,
    port: u16,
    line: &[OsString],
    environment: &std::collections::BTreeMap<String, OsString>,
) -> String {
    let quote = |word: &OsStr| word.to_str().unwrap().to_owned();
    let mut config = format!(
        "defaults\n{{\n instances = 40\n log_type = FILE {}\n}}\nservice imap-tls\n{{\n type = UNLISTED\n socket_type = stream\n protocol = tcp\n \
         bind = 127.0.0.1\n port = {port}\n wait = no\n user = root\n server = {}\n disable = no\n server_args =",
        test.path("xinetd.log").display(),
        quote(&line[0])
    );
    for word in &line[1..] {
        write!(config, " {}", quote(word)).unwrap();
    }
    config.push_str("\n env =");
    for (name, value) in environment {
        write!(config, " {name}={}", quote(value)).unwrap();
    }
    config.push_str("\n}\n");
    config
}

/// Whether a TCP socket listens on this port, found without connecting (which would start a session).
pub fn is_listening(port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
        std::fs::read_to_string(table)
            .unwrap_or_default()
            .lines()
            .any(|line| {
                let mut words = line.split_whitespace().skip(1);
                words.next().is_some_and(|local| local.ends_with(&suffix))
                    && words.nth(1) == Some("0A")
            })
    })
}
