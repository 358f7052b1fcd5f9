//! A system call that hostile code would make, made by a confined process itself; what it needs to know of its surroundings, and what
//! has to come of it under each set of protections.

use super::calls::{b, n, rights_to};
use super::stage::Role;
use crate::harness::ptrace::{Arg, Gate, Outcome, inject_by};
use crate::harness::*;
use Expected::{Dies, Either, Errno, Succeeds, Untried};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

/// What has to come of a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Expected {
    /// Death by the filter.
    Dies,
    Errno(i32),
    /// As the kernel was built.
    Either(i32, i32),
    /// It is none of this layer's to refuse.
    Succeeds,
    /// Nothing is meant to refuse it here, and what would come of it is nobody's business.
    Untried,
}

impl Expected {
    pub(super) fn is(self, outcome: Outcome) -> bool {
        match (self, outcome) {
            (Dies, Outcome::Killed(signal)) => signal == libc::SIGSYS,
            (Errno(errno), Outcome::Returned(value)) => value == -i64::from(errno),
            (Either(one, other), Outcome::Returned(value)) => {
                value == -i64::from(one) || value == -i64::from(other)
            }
            (Succeeds, Outcome::Returned(value)) => value >= 0,
            (Untried, _) => true,
            _ => false,
        }
    }
}

/// What calls need to know of their surroundings.
pub(super) struct Context {
    /// What the call before returned.
    pub(super) last: i64,
    /// An address in a page of the process's stack.
    pub(super) stack: u64,
    /// `struct sockaddr_in` of a socket that listens, and of any port.
    pub(super) inet: Vec<u8>,
    pub(super) any_port: Vec<u8>,
    /// `struct sockaddr_un` of abstract sockets that listen, and take datagrams.
    pub(super) stream: Vec<u8>,
    pub(super) datagram: Vec<u8>,
    /// [`RIGHTS`] to the latter.
    pub(super) rights: Vec<u8>,
    /// A file of root's, which root alone may read: as a path, and as one that begins below.
    pub(super) file: Vec<u8>,
    pub(super) dotted: Vec<u8>,
    /// What nobody may make, and where it would be seen.
    pub(super) new: Vec<u8>,
    pub(super) queue: Vec<u8>,
    pub(super) target: Process,
    pub(super) signal: u64,
    /// What is kept open.
    _sockets: (TcpListener, UnixListener, UnixDatagram),
}

impl Context {
    pub(super) fn new(test: &Test, role: Role) -> Self {
        let tcp = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let inet = |port: u16| {
            let mut address = u16::try_from(libc::AF_INET).unwrap().to_ne_bytes().to_vec();
            address.extend(port.to_be_bytes());
            address.extend(Ipv4Addr::LOCALHOST.octets());
            address.resize(16, 0);
            address
        };
        let unix = |name: &str| {
            let mut address = u16::try_from(libc::AF_UNIX).unwrap().to_ne_bytes().to_vec();
            address.push(0);
            address.extend(name.as_bytes());
            address
        };
        let name = |kind: &str| format!("imap-tls-{kind}-{}", test.marker());
        let address = |kind| SocketAddr::from_abstract_name(name(kind)).unwrap();
        let file = test.path("secret");
        write_file(&file, "secret", 0o600);
        let file = file.to_str().unwrap();
        Self {
            last: 0,
            stack: 0,
            inet: inet(tcp.local_addr().unwrap().port()),
            any_port: inet(0),
            stream: unix(&name("stream")),
            rights: rights_to(&unix(&name("datagram"))),
            datagram: unix(&name("datagram")),
            file: format!("{file}\0").into(),
            dotted: format!("../../../../../../../..{file}\0").into(),
            new: match role {
                // It is in no chroot.
                Role::Opener => format!("{}\0", test.path("new").display()).into(),
                _ => "/new\0".into(),
            },
            queue: format!("{}\0", name("queue")).into(),
            target: Process(1),
            signal: 0,
            _sockets: (
                tcp,
                UnixListener::bind_addr(&address("stream")).unwrap(),
                UnixDatagram::bind_addr(&address("datagram")).unwrap(),
            ),
        }
    }

    /// For calls made by this process.
    pub(super) fn of(mut self, process: Process) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.0)).unwrap();
        let line = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
        let (start, _) = line.split_once('-').unwrap();
        self.stack = u64::from_str_radix(start, 16).unwrap();
        self
    }
}

pub(super) type Arguments = for<'a> fn(&'a Context) -> Vec<Arg<'a>>;

/// A call, and what comes of it under each set of protections.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) gate: Gate,
    pub(super) number: i64,
    pub(super) arguments: Arguments,
    /// What is called before, for a descriptor.
    pub(super) before: Option<(i64, Arguments)>,
    /// Of network process and keepers: without filters, and without Landlock and MDWE as well.
    pub(super) beneath: Expected,
    pub(super) bare: Expected,
    /// Of the opener, without filters.
    pub(super) opener: Expected,
}

pub(super) const fn row(name: &'static str, number: i64, arguments: Arguments) -> Row {
    Row {
        name,
        gate: Gate::Syscall,
        number,
        arguments,
        before: None,
        beneath: Untried,
        bare: Untried,
        opener: Untried,
    }
}

impl Row {
    /// By everything but the filter, too.
    pub(super) const fn refused(self, errno: i32) -> Self {
        self.all(Errno(errno))
    }

    pub(super) const fn all(self, expected: Expected) -> Self {
        Self {
            beneath: expected,
            bare: expected,
            opener: expected,
            ..self
        }
    }

    pub(super) const fn bare(self, bare: Expected) -> Self {
        Self { bare, ..self }
    }

    pub(super) const fn opener(self, opener: Expected) -> Self {
        Self { opener, ..self }
    }

    pub(super) const fn after(self, number: i64, arguments: Arguments) -> Self {
        Self {
            before: Some((number, arguments)),
            ..self
        }
    }

    pub(super) const fn by(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }
}

impl Row {
    /// Whether it is a signal, which only Landlock refuses between processes of one user.
    pub(super) fn is_signal(&self) -> bool {
        ["kill", "tkill", "tgkill", "pidfd_send_signal"].contains(&self.name)
    }

    /// Makes the process call it.
    pub(super) fn attempt(&self, process: Process, context: &mut Context) -> Outcome {
        let mut opened = None;
        if let Some((number, arguments)) = self.before {
            let outcome = call(Gate::Syscall, process, number, &arguments(context));
            let Outcome::Returned(value) = outcome else {
                return outcome;
            };
            assert!(value >= 0, "before {}: {outcome:?}", self.name);
            context.last = value;
            opened = Some(value);
        }
        let outcome = call(self.gate, process, self.number, &(self.arguments)(context));
        let is_open = OPENING.contains(&self.number) && self.gate == Gate::Syscall;
        if let (true, Outcome::Returned(value @ 0..)) = (is_open, outcome) {
            close(process, value);
        }
        if let (libc::SYS_mq_open, Outcome::Returned(0..)) = (self.number, outcome) {
            // It would outlive its maker.
            let queue = [b(&context.queue)];
            call(Gate::Syscall, process, libc::SYS_mq_unlink, &queue);
        }
        if let (Some(value), Outcome::Returned(_)) = (opened, outcome) {
            close(process, value);
        }
        outcome
    }
}

/// Calls that return a descriptor.
pub(super) const OPENING: &[i64] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pidfd_open,
];

/// Has the process make a call once it waits again: being stopped ends some kinds of waiting.
pub(super) fn call(gate: Gate, process: Process, number: i64, arguments: &[Arg]) -> Outcome {
    eventually("the process waits", || {
        let waits = process.state() == Some('S') && process.blocked_in() >= Some(0);
        waits.then_some(())
    });
    inject_by(gate, process, number, arguments)
}

pub(super) fn close(process: Process, number: i64) {
    assert_eq!(
        call(Gate::Syscall, process, libc::SYS_close, &[n(number)]),
        Outcome::Returned(0)
    );
}

/// Collects what is not as it has to be, so that one run shows all of it.
#[derive(Default)]
pub(super) struct Differences {
    text: String,
    tried: usize,
}

impl Differences {
    pub(super) fn note(&mut self, name: &str, expected: Expected, outcome: Outcome) {
        self.tried += 1;
        if !expected.is(outcome) {
            writeln!(self.text, "{name}: {outcome:?}, not {expected:?}").unwrap();
        }
    }

    pub(super) fn end(self, least: usize) {
        assert!(self.text.is_empty(), "\n{}", self.text);
        assert!(self.tried >= least, "only {} were tried", self.tried);
    }
}
