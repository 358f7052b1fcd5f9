//! One line per event, to stderr or syslog; opened before chroot, never waiting for a reader, peers' bytes escaped.
//!
//! The syslog line is made here and not by a crate: those at hand look up the time zone and open their socket again at
//! each fault, and after the sandbox is entered either would be death by its filter.

use std::cell::RefCell;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::rc::Rc;

use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr};

use crate::channel::{is_pipe, is_ready, is_socket};
use crate::sys;

/// Where lines go, as asked for with `--log`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Destination {
    /// stderr, unless that is the client's socket or closed: then syslog.
    Auto,
    /// Standard error.
    Stderr,
    /// The system log, facility mail.
    Syslog,
}

/// How much is said.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Verbosity {
    /// Faults and warnings only.
    Quiet,
    /// And the session line.
    Normal,
    /// And each step.
    Verbose,
}

/// Importance of a line, with its number in syslog(3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Severity {
    Error = 3,
    Warning = 4,
    Informational = 6,
    Debug = 7,
}

#[derive(Clone, Debug)]
enum Sink {
    Nowhere,
    /// Of one who reads the lines himself, and knows whose they are. There is room for the few that there can be.
    Pipe(Rc<OwnedFd>),
    Stderr {
        priorities: bool,
        way: Way,
    },
    Syslog(Rc<OwnedFd>),
}

/// How fd 2 is written to without waiting for its reader.
#[derive(Clone, Debug)]
enum Way {
    /// After poll(2): a file or a device. There is no better way to what could not be opened again.
    Asked,
    /// A pipe or a terminal, opened again, so that its `O_NONBLOCK` is ours alone (src/channel.rs says why). Poll would not do:
    /// what has room for one line has none for those of two connections, nor a terminal for a line longer than its room.
    OpenedAgain(Rc<OwnedFd>),
    /// As the journal is.
    Socket,
}

/// The open log. Lines start with the client's address once it is known.
#[derive(Debug)]
pub(crate) struct Log {
    /// As it was asked for.
    destination: Destination,
    /// Whose lines these are; asked for once, since the sandbox does not let it be asked for again.
    process: u32,
    sink: Sink,
    /// Of this process: it changes when a PROXY header tells whose the connection is.
    subject: RefCell<String>,
    verbosity: Verbosity,
}

/// The longest line, in octets: a pipe takes this much in one piece or not at all (`PIPE_BUF`, pipe(7)).
const LINE_LIMIT: usize = 4096;
/// syslog(3)'s facility for mail.
const FACILITY_MAIL: u8 = 2 << 3;

impl Log {
    /// Opens the log. `is_stderr_usable` is false where fd 2 is the client's or was closed.
    ///
    /// A log that cannot be opened does not stop mail: what remains is used.
    pub(crate) fn open(
        destination: Destination,
        verbosity: Verbosity,
        is_stderr_usable: bool,
    ) -> Self {
        let stderr = || Sink::Stderr {
            priorities: is_journal(io::stderr().as_fd()),
            way: Way::to_stderr(),
        };
        let sink = match destination {
            Destination::Auto | Destination::Stderr if is_stderr_usable => stderr(),
            Destination::Auto | Destination::Stderr | Destination::Syslog => match connect_syslog()
            {
                Ok(socket) => Sink::Syslog(Rc::new(socket)),
                Err(_) if is_stderr_usable => stderr(),
                Err(_) => Sink::Nowhere,
            },
        };
        Self {
            destination,
            process: std::process::id(),
            sink,
            subject: RefCell::new("imap-tls".to_owned()),
            verbosity,
        }
    }

    /// Faults and warnings, for whoever reads the other end of the pipe.
    pub(crate) fn to_pipe(pipe: OwnedFd) -> Self {
        Self {
            destination: Destination::Auto,
            process: std::process::id(),
            sink: Sink::Pipe(Rc::new(pipe)),
            subject: RefCell::default(),
            verbosity: Verbosity::Quiet,
        }
    }

    /// The same log for a connection that is served by this process, and not by the one that opened it. Before the sandbox.
    pub(crate) fn for_connection(&self, subject: &impl fmt::Display) -> Self {
        let sink = match &self.sink {
            Sink::Syslog(shared) => {
                // A system log that was started anew has another socket. The listener's is shared, and finds it by this.
                let _ = find_syslog(shared.as_fd());
                // And one of its own: who takes a connection over could shut a shared one down for everybody.
                connect_syslog().map_or(Sink::Nowhere, |socket| Sink::Syslog(Rc::new(socket)))
            }
            sink => sink.clone(),
        };
        Self {
            destination: self.destination,
            process: std::process::id(),
            sink,
            subject: RefCell::new(subject.to_string()),
            verbosity: self.verbosity,
        }
    }

    /// For one that stays: a system log that was started anew has another socket, and one may have been started since.
    pub(crate) fn find_again(&mut self) {
        match &self.sink {
            Sink::Syslog(socket) => {
                let _ = find_syslog(socket.as_fd());
            }
            Sink::Nowhere => {
                if let Ok(socket) = connect_syslog() {
                    self.sink = Sink::Syslog(Rc::new(socket));
                }
            }
            Sink::Pipe(_) | Sink::Stderr { .. } => {}
        }
    }

    /// Says so if lines go elsewhere than is asked for now: it is opened once, before the root directory changes.
    pub(crate) fn note_destination(&self, destination: Destination) {
        if self.destination != destination {
            self.warning("--log has changed, which takes a restart");
        }
    }

    /// From now on this much is said.
    pub(crate) fn set_verbosity(&mut self, verbosity: Verbosity) {
        self.verbosity = verbosity;
    }

    /// From now on lines start with the client's address.
    pub(crate) fn set_subject(&self, subject: &impl fmt::Display) {
        self.subject.replace(subject.to_string());
    }

    /// The descriptor that must stay open for the log to work.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.sink {
            Sink::Stderr {
                way: Way::OpenedAgain(fd),
                ..
            }
            | Sink::Pipe(fd)
            | Sink::Syslog(fd) => Some(fd.as_fd()),
            Sink::Nowhere | Sink::Stderr { .. } => None,
        }
    }

    /// Whether lines may go to a regular file, which a file size limit would break: a line would be death by SIGXFSZ. So it may
    /// be one, too, where the kernel does not tell.
    pub(crate) fn is_regular_file(&self) -> bool {
        matches!(self.sink, Sink::Stderr { .. })
            && !nix::sys::stat::fstat(io::stderr())
                .is_ok_and(|stat| stat.st_mode & libc::S_IFMT != libc::S_IFREG)
    }

    /// A fault that the administrator should look at.
    pub(crate) fn error(&self, text: impl fmt::Display) {
        self.write(Severity::Error, &text);
    }

    /// Something that weakens the service but does not stop it.
    pub(crate) fn warning(&self, text: impl fmt::Display) {
        self.write(Severity::Warning, &text);
    }

    /// The session line, and what a client did wrong.
    pub(crate) fn info(&self, text: impl fmt::Display) {
        if self.verbosity >= Verbosity::Normal {
            self.write(Severity::Informational, &text);
        }
    }

    /// A step on the way (`-v`).
    pub(crate) fn debug(&self, text: impl fmt::Display) {
        if self.verbosity >= Verbosity::Verbose {
            self.write(Severity::Debug, &text);
        }
    }

    fn write(&self, severity: Severity, text: &dyn fmt::Display) {
        let subject = self.subject.borrow();
        let mut line = match &self.sink {
            Sink::Nowhere => return,
            Sink::Stderr {
                priorities: true, ..
            } => {
                format!("<{}>{subject}: {text}", severity as u8)
            }
            Sink::Pipe(_) => text.to_string(),
            Sink::Stderr { .. } => format!("{subject}: {text}"),
            Sink::Syslog(_) => {
                let priority = FACILITY_MAIL | severity as u8;
                format!("<{priority}>imap-tls[{}]: {subject}: {text}", self.process)
            }
        }
        .replace('\n', "\\n");
        if line.len() >= LINE_LIMIT {
            line.truncate(line.floor_char_boundary_before(LINE_LIMIT - 1));
        }
        match &self.sink {
            Sink::Nowhere => {}
            Sink::Pipe(pipe) => {
                let _ = sys::uninterrupted(|| nix::unistd::write(pipe, line.as_bytes()));
            }
            Sink::Stderr { way, .. } => {
                line.push('\n');
                way.write(line.as_bytes());
            }
            Sink::Syslog(socket) => send_at_once(socket.as_fd(), line.as_bytes()),
        }
    }
}

impl Way {
    fn to_stderr() -> Self {
        let stderr = io::stderr();
        if is_socket(stderr.as_fd()) {
            return Self::Socket;
        }
        // A file would lose its place, and a device may do something when it is opened.
        if is_pipe(stderr.as_fd()) || stderr.is_terminal() {
            if let Ok(fd) = open_stderr_again() {
                return Self::OpenedAgain(Rc::new(fd));
            }
        }
        Self::Asked
    }

    /// By one call, so that a pipe takes a line whole or not at all. A stuck reader must not stop mail, and a log that is gone is
    /// no reason to end a session: a line that cannot be written at once is lost.
    fn write(&self, line: &[u8]) {
        match self {
            Self::Asked => {
                if is_ready(io::stderr().as_fd(), PollFlags::POLLOUT).unwrap_or(false) {
                    let _ = io::stderr().write_all(line);
                }
            }
            Self::OpenedAgain(fd) => {
                let _ = sys::uninterrupted(|| nix::unistd::write(fd, line));
            }
            Self::Socket => send_at_once(io::stderr().as_fd(), line),
        }
    }
}

/// Fails where there is no /proc, no right to it (a plain user with another's pipe), or no reader any more.
fn open_stderr_again() -> io::Result<OwnedFd> {
    let fd = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open("/proc/self/fd/2")?;
    Ok(fd.into())
}

fn send_at_once(socket: BorrowedFd<'_>, line: &[u8]) {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = sys::uninterrupted(|| nix::sys::socket::send(socket.as_raw_fd(), line, flags));
}

/// `str::floor_char_boundary` is younger than the oldest compiler that we support.
trait FloorCharBoundary {
    fn floor_char_boundary_before(&self, index: usize) -> usize;
}

impl FloorCharBoundary for String {
    fn floor_char_boundary_before(&self, index: usize) -> usize {
        (0..=index)
            .rev()
            .find(|&at| self.is_char_boundary(at))
            .unwrap_or(0)
    }
}

#[cfg(any(test, fuzzing))]
impl Log {
    /// For tests within one process: every line there can be goes to this socket, in the system log's form.
    pub(crate) fn to_socket(socket: OwnedFd) -> Self {
        Self {
            destination: Destination::Auto,
            process: std::process::id(),
            sink: Sink::Syslog(Rc::new(socket)),
            subject: RefCell::new("test".to_owned()),
            verbosity: Verbosity::Verbose,
        }
    }
}

/// Whether fd 2 goes to the journal, which reads `<N>` at the start of a line (sd-daemon(3), `JOURNAL_STREAM` in systemd.exec(5)).
fn is_journal(stderr: BorrowedFd<'_>) -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    nix::sys::stat::fstat(stderr)
        .is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

fn connect_syslog() -> io::Result<OwnedFd> {
    let socket = nix::sys::socket::socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let socket = sys::duplicate(socket.as_fd())?;
    find_syslog(socket.as_fd())?;
    Ok(socket)
}

fn find_syslog(socket: BorrowedFd<'_>) -> nix::Result<()> {
    let address = UnixAddr::new("/dev/log")?;
    sys::uninterrupted(|| nix::sys::socket::connect(socket.as_raw_fd(), &address))
}

/// Bytes from a peer, fit for a log line: printable ASCII stays, the rest is `\xNN` (CVE-2023-28486 is what happens without).
pub(crate) struct Escaped<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            match byte {
                b'"' | b'\\' => write!(f, "\\{}", char::from(byte))?,
                b' '..=b'~' => write!(f, "{}", char::from(byte))?,
                _ => write!(f, "\\x{byte:02x}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_cannot_forge_a_line() {
        assert_eq!(
            Escaped(b"a\r\n<3>root: \"\\\x1b[31m\xff").to_string(),
            "a\\x0d\\x0a<3>root: \\\"\\\\\\x1b[31m\\xff"
        );
    }

    #[test]
    fn a_long_line_is_cut_at_a_character() {
        let text = "ä".repeat(LINE_LIMIT);
        assert_eq!(
            text.floor_char_boundary_before(LINE_LIMIT - 1),
            LINE_LIMIT - 2
        );
    }
}
