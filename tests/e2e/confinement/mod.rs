//! Confinement, proven from inside: system calls that hostile code would make, made by the confined processes themselves, each with
//! what came of it; with all protections, and with the upper ones taken away, so that the lower ones are seen to hold by themselves.
//! And other kernels, which have less.

mod minimal;
mod tour;

use crate::harness::kernel::Kernel;
use crate::harness::ptrace::{Arg, Gate, Outcome, inject_by};
use crate::harness::*;
use Expected::{Dies, Either, Errno, Succeeds, Untried};
use libtest_mimic::Trial;
use nix::libc;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};

const NEEDS: &[Need] = &[Need::Root, Need::X86_64, Need::NewKernel];

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for role in ROLES {
        let name = role.name();
        tests.push(test(
            &format!("confinement: {name}: every hostile call is death or refused"),
            NEEDS,
            move |test| filtered(test, role),
        ));
        tests.push(test(
            &format!(
                "confinement: {name}, without its filter: what else there is refuses by itself"
            ),
            NEEDS,
            move |test| beneath(test, role),
        ));
        tests.push(test(
            &format!("confinement: {name}: it has no descriptor but those that it needs"),
            NEEDS,
            move |test| descriptors(test, role),
        ));
    }
    for role in ROLES {
        tests.push(test(
            &format!(
                "confinement: {}, without filter, Landlock and MDWE: ids, root and limits refuse by themselves",
                role.name()
            ),
            NEEDS,
            move |test| bare(test, role),
        ));
    }
    tests.push(test(
        "confinement: capabilities that the superserver left to be inherited are given up",
        &[Need::Root, Need::Command("setpriv", "util-linux")],
        inheritable,
    ));
    tests.push(test(
        "confinement: the connector can write, execute, signal and wait for connections nowhere",
        NEEDS,
        connector,
    ));
    tests.extend([
        test(
            "confinement: on kernels with each Landlock from none to the newest, with and without MDWE, sessions work",
            NEEDS,
            kernels,
        ),
        test(
            "confinement: what Landlock denies grows with its ABI",
            NEEDS,
            abis,
        ),
        test(
            "confinement: what the kernel lacks is warned of once by the listener, and by a connection with -v alone",
            NEEDS,
            warnings,
        ),
        test(
            "confinement: what is required and lacking ends with BYE and 100, and with 100 under --check and --listen",
            NEEDS,
            required,
        ),
        test(
            "confinement: what is required and there is served",
            NEEDS,
            satisfied,
        ),
        test(
            "confinement: the systemd units let Landlock and seccomp through",
            &[],
            units,
        ),
    ]);
    tests.extend(minimal::tests());
    tests
}

/// Whose place hostile code has taken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Role {
    Network,
    /// Of one connection.
    Keeper,
    /// The listener's.
    SharedKeeper,
    Opener,
}

const ROLES: [Role; 4] = [
    Role::Network,
    Role::Keeper,
    Role::SharedKeeper,
    Role::Opener,
];

impl Role {
    fn name(self) -> &'static str {
        match self {
            Role::Network => "network process",
            Role::Keeper => "keeper",
            Role::SharedKeeper => "listener's keeper",
            Role::Opener => "opener",
        }
    }

    /// The system call in which it waits.
    fn waits_in(self, call: i64) -> bool {
        match self {
            Role::Network => call == libc::SYS_ppoll || call == libc::SYS_poll,
            Role::Keeper | Role::Opener => call == libc::SYS_recvfrom,
            Role::SharedKeeper => call == libc::SYS_epoll_pwait,
        }
    }
}

/// What has to come of a call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Expected {
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
    fn is(self, outcome: Outcome) -> bool {
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
struct Context {
    /// What the call before returned.
    last: i64,
    /// An address in a page of the process's stack.
    stack: u64,
    /// `struct sockaddr_in` of a socket that listens, and of any port.
    inet: Vec<u8>,
    any_port: Vec<u8>,
    /// `struct sockaddr_un` of abstract sockets that listen, and take datagrams.
    stream: Vec<u8>,
    datagram: Vec<u8>,
    /// [`RIGHTS`] to the latter.
    rights: Vec<u8>,
    /// A file of root's, which root alone may read: as a path, and as one that begins below.
    file: Vec<u8>,
    dotted: Vec<u8>,
    /// What nobody may make, and where it would be seen.
    new: Vec<u8>,
    queue: Vec<u8>,
    target: Process,
    signal: u64,
    /// What is kept open.
    _sockets: (TcpListener, UnixListener, UnixDatagram),
}

impl Context {
    fn new(test: &Test, role: Role) -> Self {
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
    fn of(mut self, process: Process) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.0)).unwrap();
        let line = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
        let (start, _) = line.split_once('-').unwrap();
        self.stack = u64::from_str_radix(start, 16).unwrap();
        self
    }
}

type Arguments = for<'a> fn(&'a Context) -> Vec<Arg<'a>>;

/// A call, and what comes of it under each set of protections.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    gate: Gate,
    number: i64,
    arguments: Arguments,
    /// What is called before, for a descriptor.
    before: Option<(i64, Arguments)>,
    /// Of network process and keepers: without filters, and without Landlock and MDWE as well.
    beneath: Expected,
    bare: Expected,
    /// Of the opener, without filters.
    opener: Expected,
}

const fn row(name: &'static str, number: i64, arguments: Arguments) -> Row {
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
    const fn refused(self, errno: i32) -> Self {
        self.all(Errno(errno))
    }

    const fn all(self, expected: Expected) -> Self {
        Self {
            beneath: expected,
            bare: expected,
            opener: expected,
            ..self
        }
    }

    const fn bare(self, bare: Expected) -> Self {
        Self { bare, ..self }
    }

    const fn opener(self, opener: Expected) -> Self {
        Self { opener, ..self }
    }

    const fn after(self, number: i64, arguments: Arguments) -> Self {
        Self {
            before: Some((number, arguments)),
            ..self
        }
    }

    const fn by(self, gate: Gate) -> Self {
        Self { gate, ..self }
    }
}

const CWD: Arg<'static> = Arg::Number(-100_i64 as u64);
const ZERO: Arg<'static> = Arg::Number(0);
const ROOT: Arg<'static> = Arg::Bytes(b"/\0");
const TRUE: Arg<'static> = Arg::Bytes(b"/bin/true\0");
const EMPTY: Arg<'static> = Arg::Bytes(b"\0");
const ZEROES: Arg<'static> = Arg::Bytes(&[0; 128]);

const fn n(number: i64) -> Arg<'static> {
    Arg::Number(number as u64)
}

fn b(bytes: &[u8]) -> Arg<'_> {
    Arg::Bytes(bytes)
}

fn last(context: &Context) -> Arg<'static> {
    n(context.last)
}

const EXECUTABLE: i64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as i64;
const PRIVATE: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
const X32: i64 = 0x4000_0000;
const TCP: Arguments = |_| vec![n(libc::AF_INET as i64), n(libc::SOCK_STREAM as i64), ZERO];
const UNIX_STREAM: Arguments = |_| vec![n(libc::AF_UNIX as i64), n(libc::SOCK_STREAM as i64), ZERO];
const UNIX_DATAGRAM: Arguments =
    |_| vec![n(libc::AF_UNIX as i64), n(libc::SOCK_DGRAM as i64), ZERO];
/// `struct clone_args` with SIGCHLD as its `exit_signal`.
const CLONE: [u8; 88] = {
    let mut bytes = [0; 88];
    bytes[32] = libc::SIGCHLD as u8;
    bytes
};
/// Version 3, this process; and every capability.
const CAPABILITY_HEADER: [u8; 8] = [0x22, 0x05, 0x08, 0x20, 0, 0, 0, 0];
const CAPABILITIES: [u8; 24] = [0xff; 24];
/// Two limits of 2^20, which is more than any of ours.
const LIMIT: [u8; 16] = [0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0];
/// `struct file_handle` for an inode's number, 2.
const HANDLE: [u8; 16] = [8, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
/// `struct msghdr`, then an octet to send at 56, its iovec at 64, and descriptor 0 in a control message at 80.
const RIGHTS: [u8; 104] = {
    let mut bytes = [0; 104];
    bytes[24] = 1;
    bytes[40] = 20;
    bytes[72] = 1;
    bytes[80] = 20;
    bytes[88] = libc::SOL_SOCKET as u8;
    bytes[92] = libc::SCM_RIGHTS as u8;
    bytes
};
const RIGHTS_LINKS: &[(usize, usize)] = &[(16, 64), (32, 80), (64, 56)];
/// The same to an address, which follows.
const ADDRESSED_LINKS: &[(usize, usize)] = &[(0, 104), (16, 64), (32, 80), (64, 56)];

fn rights_to(address: &[u8]) -> Vec<u8> {
    let mut bytes = RIGHTS.to_vec();
    bytes[8] = address.len() as u8;
    bytes.extend(address);
    bytes
}

/// `struct iovec` of eight octets behind it.
const VECTOR: [u8; 24] = {
    let mut bytes = [0; 24];
    bytes[8] = 8;
    bytes
};
const VECTOR_LINKS: &[(usize, usize)] = &[(0, 16)];

/// Errors that a call has where the kernel was built without it.
const fn or_absent(errno: i32) -> Expected {
    Either(errno, libc::ENOSYS)
}

/// Everything that an attacker would try with the machine.
const ROWS: &[Row] = &[
    // Files. In the chroot there is but the empty directory: that it can be opened there is the chroot's doing.
    row("open", libc::SYS_open, |_| vec![ROOT, ZERO])
        .refused(libc::EACCES)
        .bare(Succeeds)
        .opener(Succeeds),
    row("openat", libc::SYS_openat, |_| vec![CWD, ROOT, ZERO])
        .refused(libc::EACCES)
        .bare(Succeeds)
        .opener(Succeeds),
    row("openat2", libc::SYS_openat2, |_| {
        vec![CWD, ROOT, ZEROES, n(24)]
    })
    .refused(libc::EACCES)
    .bare(Succeeds)
    .opener(Succeeds),
    row("openat of a secret", libc::SYS_openat, |c| {
        vec![CWD, b(&c.file), ZERO]
    })
    .refused(libc::ENOENT)
    .opener(Succeeds),
    row("openat of a secret by dots", libc::SYS_openat, |c| {
        vec![CWD, b(&c.dotted), ZERO]
    })
    .refused(libc::ENOENT)
    .opener(Succeeds),
    row("openat for writing", libc::SYS_openat, |c| {
        vec![CWD, b(&c.file), n(libc::O_RDWR as i64)]
    })
    .refused(libc::ENOENT)
    .opener(Errno(libc::EACCES)),
    row("openat to truncate", libc::SYS_openat, |c| {
        vec![CWD, b(&c.file), n(libc::O_TRUNC as i64)]
    })
    .refused(libc::ENOENT)
    .opener(Errno(libc::EACCES)),
    row("openat to create", libc::SYS_openat, |c| {
        let flags = libc::O_CREAT | libc::O_WRONLY;
        vec![CWD, b(&c.new), n(flags as i64), n(0o600)]
    })
    .refused(libc::EACCES),
    row("open to create", libc::SYS_creat, |c| {
        vec![b(&c.new), n(0o600)]
    })
    .refused(libc::EACCES),
    row("truncate", libc::SYS_truncate, |c| vec![b(&c.file), ZERO])
        .refused(libc::ENOENT)
        .opener(Errno(libc::EACCES)),
    row("openat of init's memory", libc::SYS_openat, |_| {
        vec![CWD, b(b"/proc/1/mem\0"), ZERO]
    })
    .refused(libc::ENOENT)
    .opener(Either(libc::EACCES, libc::EPERM)),
    row("openat of init's environment", libc::SYS_openat, |_| {
        vec![CWD, b(b"/proc/1/environ\0"), ZERO]
    })
    .refused(libc::ENOENT)
    .opener(Either(libc::EACCES, libc::EPERM)),
    row("openat of its own memory", libc::SYS_openat, |_| {
        vec![CWD, b(b"/proc/self/mem\0"), n(libc::O_RDWR as i64)]
    })
    .refused(libc::ENOENT)
    .opener(Errno(libc::EACCES)),
    row("openat of a kernel's setting", libc::SYS_openat, |_| {
        vec![
            CWD,
            b(b"/proc/sys/kernel/core_pattern\0"),
            n(libc::O_WRONLY as i64),
        ]
    })
    .refused(libc::ENOENT)
    .opener(Errno(libc::EACCES)),
    row("open_by_handle_at", libc::SYS_open_by_handle_at, |_| {
        vec![CWD, b(&HANDLE), ZERO]
    })
    .all(Either(libc::EPERM, libc::ENOSYS))
    // The right to read any file is what it is for.
    .opener(Untried),
    row("mkdir", libc::SYS_mkdir, |c| vec![b(&c.new), n(0o700)]).refused(libc::EACCES),
    row("mkdirat", libc::SYS_mkdirat, |c| {
        vec![CWD, b(&c.new), n(0o700)]
    })
    .refused(libc::EACCES),
    row("mknod of a device", libc::SYS_mknod, |c| {
        vec![b(&c.new), n((libc::S_IFCHR | 0o600) as i64), n(0x103)]
    })
    .all(Either(libc::EPERM, libc::EACCES)),
    row("mknod of a pipe", libc::SYS_mknod, |c| {
        vec![b(&c.new), n((libc::S_IFIFO | 0o600) as i64), ZERO]
    })
    .refused(libc::EACCES),
    row("symlink", libc::SYS_symlink, |c| vec![ROOT, b(&c.new)]).refused(libc::EACCES),
    row("rename", libc::SYS_rename, |c| vec![b(&c.file), b(&c.new)])
        .refused(libc::ENOENT)
        .opener(Either(libc::EACCES, libc::EXDEV)),
    row("link", libc::SYS_link, |c| vec![b(&c.file), b(&c.new)])
        .refused(libc::ENOENT)
        .opener(Either(libc::EACCES, libc::EXDEV)),
    row("unlink", libc::SYS_unlink, |c| vec![b(&c.file)])
        .refused(libc::ENOENT)
        .opener(Errno(libc::EACCES)),
    // Should they ever succeed, nothing changes that is not the test's own.
    row("chmod", libc::SYS_chmod, |_| vec![ROOT, n(0o755)])
        .refused(libc::EPERM)
        .opener(Untried),
    row("chown", libc::SYS_chown, |_| vec![ROOT, ZERO, ZERO])
        .refused(libc::EPERM)
        .opener(Untried),
    row("chown of a secret", libc::SYS_chown, |c| {
        vec![b(&c.file), n(NETWORK_ID as i64), n(NETWORK_ID as i64)]
    })
    .refused(libc::ENOENT)
    .opener(Errno(libc::EPERM)),
    row("memfd_create", libc::SYS_memfd_create, |_| {
        vec![EMPTY, ZERO]
    }),
    row("memfd_secret", libc::SYS_memfd_secret, |_| vec![ZERO]),
    row("dup", libc::SYS_dup, |_| vec![ZERO]),
    row("pipe2", libc::SYS_pipe2, |_| vec![ZEROES, ZERO]),
    row("ioctl TIOCSTI", libc::SYS_ioctl, |_| {
        vec![ZERO, n(libc::TIOCSTI as i64), b(b"x")]
    })
    .refused(libc::ENOTTY),
    // Programs and processes.
    row("execve", libc::SYS_execve, |_| vec![TRUE, ZERO, ZERO])
        .refused(libc::ENOENT)
        .opener(Errno(libc::EACCES)),
    row("execveat", libc::SYS_execveat, |_| {
        vec![CWD, TRUE, ZERO, ZERO, ZERO]
    })
    .refused(libc::ENOENT)
    .opener(Errno(libc::EACCES)),
    row("fork", libc::SYS_fork, |_| vec![])
        .refused(libc::EAGAIN)
        .opener(Untried),
    row("vfork", libc::SYS_vfork, |_| vec![])
        .refused(libc::EAGAIN)
        .opener(Untried),
    row("clone", libc::SYS_clone, |_| {
        vec![n(libc::SIGCHLD as i64), ZERO, ZERO, ZERO, ZERO]
    })
    .refused(libc::EAGAIN)
    .opener(Untried),
    row("clone of a thread", libc::SYS_clone, |_| {
        let flags = libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD;
        vec![n(flags as i64), ZERO, ZERO, ZERO, ZERO]
    })
    .refused(libc::EAGAIN)
    .opener(Untried),
    row("clone3", libc::SYS_clone3, |_| vec![b(&CLONE), n(88)])
        .refused(libc::EAGAIN)
        .opener(Untried),
    // The network.
    row("socket", libc::SYS_socket, TCP),
    row("socketpair", libc::SYS_socketpair, |_| {
        vec![
            n(libc::AF_UNIX as i64),
            n(libc::SOCK_STREAM as i64),
            ZERO,
            ZEROES,
        ]
    }),
    row("connect by TCP", libc::SYS_connect, |c| {
        vec![last(c), b(&c.inet), n(16)]
    })
    .after(libc::SYS_socket, TCP)
    .refused(libc::EACCES)
    .bare(Succeeds),
    row("bind of a TCP port", libc::SYS_bind, |c| {
        vec![last(c), b(&c.any_port), n(16)]
    })
    .after(libc::SYS_socket, TCP)
    .refused(libc::EACCES)
    .bare(Succeeds),
    row("listen on any TCP port", libc::SYS_listen, |c| {
        vec![last(c), n(1)]
    })
    .after(libc::SYS_socket, TCP)
    .bare(Succeeds),
    row("connect to an abstract socket", libc::SYS_connect, |c| {
        vec![last(c), b(&c.stream), n(c.stream.len() as i64)]
    })
    .after(libc::SYS_socket, UNIX_STREAM)
    .refused(libc::EPERM)
    .bare(Succeeds),
    row("sendto an abstract socket", libc::SYS_sendto, |c| {
        let length = n(c.datagram.len() as i64);
        vec![last(c), b(b"x"), n(1), ZERO, b(&c.datagram), length]
    })
    .after(libc::SYS_socket, UNIX_DATAGRAM)
    .refused(libc::EPERM)
    .bare(Succeeds),
    row("sendto with an address", libc::SYS_sendto, |c| {
        vec![ZERO, b(b"x"), n(1), ZERO, b(&c.inet), n(16)]
    }),
    row("sendmsg with a descriptor", libc::SYS_sendmsg, |_| {
        vec![n(3), Arg::Linked(&RIGHTS, RIGHTS_LINKS), ZERO]
    }),
    row(
        "sendmsg with a descriptor to an abstract socket",
        libc::SYS_sendmsg,
        |c| vec![last(c), Arg::Linked(&c.rights, ADDRESSED_LINKS), ZERO],
    )
    .after(libc::SYS_socket, UNIX_DATAGRAM)
    .refused(libc::EPERM)
    .bare(Succeeds),
    row("sendmmsg", libc::SYS_sendmmsg, |_| {
        vec![n(3), Arg::Linked(&RIGHTS, RIGHTS_LINKS), n(1), ZERO]
    }),
    row("recvmmsg", libc::SYS_recvmmsg, |_| {
        vec![n(3), ZEROES, n(1), n(libc::MSG_DONTWAIT as i64), ZERO]
    }),
    row("accept4", libc::SYS_accept4, |_| {
        vec![ZERO, ZERO, ZERO, ZERO]
    }),
    row("setsockopt SO_PEEK_OFF", libc::SYS_setsockopt, |_| {
        vec![
            ZERO,
            n(libc::SOL_SOCKET as i64),
            n(libc::SO_PEEK_OFF as i64),
            ZEROES,
            n(4),
        ]
    }),
    // Ids and capabilities.
    row("setuid", libc::SYS_setuid, |_| vec![ZERO])
        .refused(libc::EPERM)
        .opener(Untried),
    row("setgid", libc::SYS_setgid, |_| vec![ZERO])
        .refused(libc::EPERM)
        .opener(Untried),
    row("setreuid", libc::SYS_setreuid, |_| vec![ZERO, ZERO])
        .refused(libc::EPERM)
        .opener(Untried),
    row("setresuid", libc::SYS_setresuid, |_| vec![ZERO, ZERO, ZERO])
        .refused(libc::EPERM)
        .opener(Untried),
    row("setresgid", libc::SYS_setresgid, |_| vec![ZERO, ZERO, ZERO])
        .refused(libc::EPERM)
        .opener(Untried),
    row("setuid to another", libc::SYS_setuid, |_| vec![n(61_000)]).refused(libc::EPERM),
    row("setgroups", libc::SYS_setgroups, |_| vec![n(1), ZEROES]).refused(libc::EPERM),
    row("capset", libc::SYS_capset, |_| {
        vec![b(&CAPABILITY_HEADER), b(&CAPABILITIES)]
    })
    .refused(libc::EPERM),
    row("prctl PR_CAP_AMBIENT", libc::SYS_prctl, |_| {
        let raise = n(libc::PR_CAP_AMBIENT_RAISE as i64);
        vec![n(libc::PR_CAP_AMBIENT as i64), raise, n(21), ZERO, ZERO]
    })
    .refused(libc::EPERM),
    row("prctl PR_SET_NO_NEW_PRIVS", libc::SYS_prctl, |_| {
        vec![n(libc::PR_SET_NO_NEW_PRIVS as i64), ZERO, ZERO, ZERO, ZERO]
    })
    .refused(libc::EINVAL),
    row("prctl PR_SET_DUMPABLE", libc::SYS_prctl, |_| {
        vec![n(libc::PR_SET_DUMPABLE as i64), n(1), ZERO, ZERO, ZERO]
    }),
    row("prctl PR_SET_PTRACER", libc::SYS_prctl, |_| {
        vec![n(libc::PR_SET_PTRACER as i64), n(-1), ZERO, ZERO, ZERO]
    }),
    row("prctl PR_SET_SECCOMP", libc::SYS_prctl, |_| {
        vec![n(libc::PR_SET_SECCOMP as i64), ZERO, ZERO, ZERO, ZERO]
    })
    .refused(libc::EINVAL),
    row("prctl PR_SET_MDWE", libc::SYS_prctl, |_| {
        vec![n(libc::PR_SET_MDWE as i64), ZERO, ZERO, ZERO, ZERO]
    })
    .refused(libc::EPERM)
    .bare(Errno(libc::EINVAL)),
    row("prctl PR_SET_MM", libc::SYS_prctl, |c| {
        let stack = Arg::Number(c.stack);
        vec![n(libc::PR_SET_MM as i64), n(6), stack, ZERO, ZERO]
    })
    .refused(libc::EPERM),
    row("prlimit64 of descriptors", libc::SYS_prlimit64, |_| {
        let which = n(i64::from(libc::RLIMIT_NOFILE));
        vec![ZERO, which, b(&LIMIT), ZERO]
    })
    .refused(libc::EPERM)
    .opener(Untried),
    row("setrlimit of processes", libc::SYS_setrlimit, |_| {
        vec![n(i64::from(libc::RLIMIT_NPROC)), b(&LIMIT)]
    })
    .refused(libc::EPERM)
    .opener(Untried),
    row("personality", libc::SYS_personality, |_| {
        vec![n(libc::READ_IMPLIES_EXEC as i64)]
    }),
    // Root, mounts, namespaces. The classic way out of a chroot is mkdir, chroot into that, and up from outside of it.
    row("chroot", libc::SYS_chroot, |_| vec![ROOT]).refused(libc::EPERM),
    row("chdir", libc::SYS_chdir, |_| vec![b(b"..\0")]),
    row("fchdir", libc::SYS_fchdir, |_| vec![ZERO]).refused(libc::ENOTDIR),
    row("mount", libc::SYS_mount, |_| {
        vec![b(b"none\0"), ROOT, b(b"tmpfs\0"), ZERO, ZERO]
    })
    .refused(libc::EPERM),
    row("umount2", libc::SYS_umount2, |_| {
        vec![ROOT, n(libc::MNT_EXPIRE as i64)]
    })
    .refused(libc::EPERM),
    row("move_mount", libc::SYS_move_mount, |_| {
        vec![CWD, ROOT, CWD, ROOT, ZERO]
    })
    .refused(libc::EPERM),
    row("fsopen", libc::SYS_fsopen, |_| vec![b(b"tmpfs\0"), ZERO]).refused(libc::EPERM),
    row("open_tree", libc::SYS_open_tree, |_| {
        vec![CWD, ROOT, n(libc::OPEN_TREE_CLONE as i64)]
    })
    .refused(libc::EPERM),
    row("pivot_root", libc::SYS_pivot_root, |_| vec![ROOT, ROOT]).refused(libc::EPERM),
    row("unshare of users", libc::SYS_unshare, |_| {
        vec![n(libc::CLONE_NEWUSER as i64)]
    })
    .refused(libc::EPERM)
    .opener(Untried),
    row("unshare of mounts", libc::SYS_unshare, |_| {
        vec![n(libc::CLONE_NEWNS as i64)]
    })
    .refused(libc::EPERM),
    row("unshare of the network", libc::SYS_unshare, |_| {
        vec![n(libc::CLONE_NEWNET as i64)]
    })
    .refused(libc::EPERM),
    row("setns", libc::SYS_setns, |c| {
        vec![last(c), n(libc::CLONE_NEWNET as i64)]
    })
    .after(libc::SYS_pidfd_open, |_| vec![n(1), ZERO])
    .refused(libc::EPERM),
    // Memory.
    row("mmap writable and executable", libc::SYS_mmap, |_| {
        vec![ZERO, n(4096), n(EXECUTABLE), n(PRIVATE), n(-1), ZERO]
    })
    .refused(libc::EACCES)
    .bare(Succeeds),
    row("mprotect of the stack", libc::SYS_mprotect, |c| {
        vec![Arg::Number(c.stack), n(4096), n(EXECUTABLE)]
    })
    .refused(libc::EACCES)
    .bare(Succeeds),
    row("pkey_mprotect of the stack", libc::SYS_pkey_mprotect, |c| {
        vec![Arg::Number(c.stack), n(4096), n(EXECUTABLE), n(-1)]
    })
    .refused(libc::EACCES)
    .bare(Succeeds),
    row("mlock", libc::SYS_mlock, |c| {
        vec![Arg::Number(c.stack), n(4096)]
    })
    .refused(libc::EPERM)
    .opener(Untried),
    row("shmget", libc::SYS_shmget, |_| {
        vec![ZERO, n(4096), n(0o600)]
    }),
    row("mq_open", libc::SYS_mq_open, |c| {
        let flags = libc::O_CREAT | libc::O_RDWR;
        vec![b(&c.queue), n(flags as i64), n(0o600), ZERO]
    })
    .all(or_absent(libc::EMFILE))
    .opener(Untried),
    row("userfaultfd", libc::SYS_userfaultfd, |_| vec![n(1)]),
    row("modify_ldt", libc::SYS_modify_ldt, |_| {
        vec![n(1), ZEROES, n(16)]
    }),
    row("arch_prctl", libc::SYS_arch_prctl, |_| {
        vec![n(0x1001), ZERO]
    }),
    row("brk", libc::SYS_brk, |_| vec![ZERO]),
    row("process_madvise", libc::SYS_process_madvise, |_| {
        vec![ZERO, ZEROES, ZERO, ZERO, ZERO]
    }),
    // Big, new and often broken parts of the kernel.
    row("io_uring_setup", libc::SYS_io_uring_setup, |_| {
        vec![n(1), ZEROES]
    }),
    row("io_uring_enter", libc::SYS_io_uring_enter, |_| {
        vec![ZERO, ZERO, ZERO, ZERO, ZERO, ZERO]
    }),
    row("io_uring_register", libc::SYS_io_uring_register, |_| {
        vec![n(-1), ZERO, ZERO, ZERO]
    }),
    row("bpf", libc::SYS_bpf, |_| vec![n(5), ZEROES, n(128)]),
    row("perf_event_open", libc::SYS_perf_event_open, |_| {
        vec![ZEROES, ZERO, n(-1), n(-1), ZERO]
    }),
    row("keyctl", libc::SYS_keyctl, |_| vec![ZERO, n(-3), ZERO]),
    row("add_key", libc::SYS_add_key, |_| {
        vec![b(b"user\0"), b(b"x\0"), b(b"x"), n(1), n(-2)]
    }),
    row("request_key", libc::SYS_request_key, |_| {
        vec![b(b"user\0"), b(b"x\0"), ZERO, n(-2)]
    }),
    row("seccomp", libc::SYS_seccomp, |_| vec![n(2), ZERO, ZEROES]),
    row(
        "landlock_create_ruleset",
        libc::SYS_landlock_create_ruleset,
        |_| vec![ZERO, ZERO, n(1)],
    ),
    row(
        "landlock_restrict_self",
        libc::SYS_landlock_restrict_self,
        |_| vec![ZERO, ZERO],
    ),
    // What makes exploits easier, and is of no use here.
    row("rt_sigreturn", libc::SYS_rt_sigreturn, |_| vec![]),
    row("rt_sigaction", libc::SYS_rt_sigaction, |_| {
        vec![n(libc::SIGUSR1.into()), ZERO, ZERO, n(8)]
    }),
    row("restart_syscall", libc::SYS_restart_syscall, |_| vec![]),
    row("inotify_init1", libc::SYS_inotify_init1, |_| vec![ZERO]),
    row("fanotify_init", libc::SYS_fanotify_init, |_| {
        vec![ZERO, ZERO]
    }),
    row("name_to_handle_at", libc::SYS_name_to_handle_at, |_| {
        vec![CWD, ROOT, ZEROES, ZEROES, ZERO]
    }),
    // The whole machine.
    row("reboot", libc::SYS_reboot, |_| vec![ZERO, ZERO, ZERO, ZERO]).refused(libc::EPERM),
    row("kexec_load", libc::SYS_kexec_load, |_| {
        vec![ZERO, ZERO, ZERO, ZERO]
    })
    .all(or_absent(libc::EPERM)),
    row("kexec_file_load", libc::SYS_kexec_file_load, |_| {
        vec![n(-1), n(-1), ZERO, ZERO, ZERO]
    })
    .all(or_absent(libc::EPERM)),
    row("init_module", libc::SYS_init_module, |_| {
        vec![ZERO, ZERO, EMPTY]
    })
    .all(or_absent(libc::EPERM)),
    row("finit_module", libc::SYS_finit_module, |_| {
        vec![n(-1), EMPTY, ZERO]
    })
    .all(or_absent(libc::EPERM)),
    row("delete_module", libc::SYS_delete_module, |_| {
        vec![b(b"imap-tls-hostile\0"), ZERO]
    })
    .all(or_absent(libc::EPERM)),
    row("swapon", libc::SYS_swapon, |_| vec![ROOT, ZERO]).all(or_absent(libc::EPERM)),
    row("swapoff", libc::SYS_swapoff, |_| vec![ROOT]).all(or_absent(libc::EPERM)),
    row("settimeofday", libc::SYS_settimeofday, |_| {
        vec![ZERO, ZEROES]
    })
    .refused(libc::EPERM),
    row("sethostname", libc::SYS_sethostname, |_| vec![EMPTY, n(-1)]).refused(libc::EPERM),
    row("setdomainname", libc::SYS_setdomainname, |_| {
        vec![EMPTY, n(-1)]
    })
    .refused(libc::EPERM),
    row("quotactl", libc::SYS_quotactl, |_| {
        vec![n(0x8000_0200), ROOT, ZERO, ZERO]
    }),
    row("acct", libc::SYS_acct, |_| vec![ZERO]).all(or_absent(libc::EPERM)),
    row("iopl", libc::SYS_iopl, |_| vec![n(3)]).all(or_absent(libc::EPERM)),
    row("ioperm", libc::SYS_ioperm, |_| vec![ZERO, n(1), n(1)]).all(or_absent(libc::EPERM)),
    row("vhangup", libc::SYS_vhangup, |_| vec![]).refused(libc::EPERM),
    // Other ways in: the filter knows the numbers of one architecture.
    row("x32: openat", X32 | libc::SYS_openat, |_| {
        vec![CWD, ROOT, ZERO]
    }),
    row("x32: sendto", X32 | libc::SYS_sendto, |_| vec![]),
    row("x32: execve", X32 | 520, |_| vec![TRUE, ZERO, ZERO]),
    row("i386: fork", 2, |_| vec![]).by(Gate::Interrupt80),
    row("i386: write", 4, |_| vec![n(2), ZERO, ZERO]).by(Gate::Interrupt80),
    row("i386: execve", 11, |_| vec![ZERO, ZERO, ZERO]).by(Gate::Interrupt80),
    row("i386: getpid", 20, |_| vec![]).by(Gate::Interrupt80),
    row("i386: socketcall", 102, |_| vec![ZERO, ZERO]).by(Gate::Interrupt80),
    // A number that no kernel has, and one that new kernels have.
    row("no call", 4000, |_| vec![]),
    row("fchmodat2", 452, |_| vec![CWD, ROOT, n(0o755), ZERO]),
];

/// What the opener's filter lets through: reading files is what it is for.
const OPENER_MAY: &[(&str, Expected)] = &[
    ("openat", Succeeds),
    ("openat of a secret", Succeeds),
    ("openat of a secret by dots", Succeeds),
    ("openat of init's memory", Either(libc::EACCES, libc::EPERM)),
    (
        "openat of init's environment",
        Either(libc::EACCES, libc::EPERM),
    ),
];

/// What an attacker would try with another process.
const TOWARDS: &[Row] = &[
    row("kill", libc::SYS_kill, |c| vec![pid(c), signal(c)]),
    row("tkill", libc::SYS_tkill, |c| vec![pid(c), signal(c)]),
    row("tgkill", libc::SYS_tgkill, |c| {
        vec![pid(c), pid(c), signal(c)]
    }),
    row("ptrace attach", libc::SYS_ptrace, |c| {
        vec![n(libc::PTRACE_ATTACH.into()), pid(c), ZERO, ZERO]
    })
    .refused(libc::EPERM),
    row("ptrace seize", libc::SYS_ptrace, |c| {
        vec![n(libc::PTRACE_SEIZE.into()), pid(c), ZERO, ZERO]
    })
    .refused(libc::EPERM),
    row("process_vm_readv", libc::SYS_process_vm_readv, |c| {
        let vector = Arg::Linked(&VECTOR, VECTOR_LINKS);
        vec![pid(c), vector, n(1), vector, n(1), ZERO]
    })
    .refused(libc::EPERM),
    row("process_vm_writev", libc::SYS_process_vm_writev, |c| {
        let vector = Arg::Linked(&VECTOR, VECTOR_LINKS);
        vec![pid(c), vector, n(1), vector, n(1), ZERO]
    })
    .refused(libc::EPERM),
    row("pidfd_send_signal", libc::SYS_pidfd_send_signal, |c| {
        vec![last(c), signal(c), ZERO, ZERO]
    })
    .after(libc::SYS_pidfd_open, |c| vec![pid(c), ZERO]),
    row("pidfd_getfd", libc::SYS_pidfd_getfd, |c| {
        vec![last(c), ZERO, ZERO]
    })
    .after(libc::SYS_pidfd_open, |c| vec![pid(c), ZERO])
    .refused(libc::EPERM),
    row("pidfd_open", libc::SYS_pidfd_open, |c| vec![pid(c), ZERO]),
    row("prlimit64 of another", libc::SYS_prlimit64, |c| {
        let which = n(i64::from(libc::RLIMIT_CORE));
        vec![pid(c), which, b(&LIMIT), ZERO]
    }),
    row("setpriority of another", libc::SYS_setpriority, |c| {
        vec![ZERO, pid(c), n(19)]
    }),
];

fn pid(context: &Context) -> Arg<'static> {
    n(context.target.0.into())
}

fn signal(context: &Context) -> Arg<'static> {
    Arg::Number(context.signal)
}

impl Row {
    /// Whether it is a signal, which only Landlock refuses between processes of one user.
    fn is_signal(&self) -> bool {
        ["kill", "tkill", "tgkill", "pidfd_send_signal"].contains(&self.name)
    }

    /// Makes the process call it.
    fn attempt(&self, process: Process, context: &mut Context) -> Outcome {
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
const OPENING: &[i64] = &[
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pidfd_open,
];

/// Has the process make a call once it waits again: being stopped ends some kinds of waiting.
fn call(gate: Gate, process: Process, number: i64, arguments: &[Arg]) -> Outcome {
    eventually("the process waits", || {
        let waits = process.state() == Some('S') && process.blocked_in() >= Some(0);
        waits.then_some(())
    });
    inject_by(gate, process, number, arguments)
}

fn close(process: Process, number: i64) {
    assert_eq!(
        call(Gate::Syscall, process, libc::SYS_close, &[n(number)]),
        Outcome::Returned(0)
    );
}

/// Collects what is not as it has to be, so that one run shows all of it.
#[derive(Default)]
struct Differences {
    text: String,
    tried: usize,
}

impl Differences {
    fn note(&mut self, name: &str, expected: Expected, outcome: Outcome) {
        self.tried += 1;
        if !expected.is(outcome) {
            writeln!(self.text, "{name}: {outcome:?}, not {expected:?}").unwrap();
        }
    }

    fn end(self, least: usize) {
        assert!(self.text.is_empty(), "\n{}", self.text);
        assert!(self.tried >= least, "only {} were tried", self.tried);
    }
}

/// Where a role's processes come from, one after the other.
enum Stage {
    /// Connections of a listener, and its keeper.
    Listener(Box<Server>, Role),
    /// A start for each.
    Starts(Program, Role),
}

/// A process, and the client that keeps it alive.
struct Held {
    process: Process,
    client: Option<Client>,
    session: Option<Session>,
}

impl Stage {
    fn new(test: &Test, role: Role) -> Self {
        let program = Program::new(test);
        match role {
            Role::Network | Role::SharedKeeper => {
                let server = Server::start(test, Superserver::Listener, &program);
                Stage::Listener(Box::new(server), role)
            }
            Role::Keeper => Stage::Starts(program, role),
            Role::Opener => {
                let directory = test.path("names");
                make_dir(&directory, 0o755);
                Stage::Starts(program.option("--cert-dir", directory), role)
            }
        }
    }

    /// A process that waits for its client, or for what the network process asks for.
    fn take(&self) -> Held {
        match self {
            Stage::Listener(server, role) => {
                let mut client = server.connect();
                client.greeting();
                let find = || match role {
                    Role::Network => {
                        let sessions = server.sessions();
                        // The one before it may still be on its way out.
                        (sessions.len() == 1).then(|| sessions[0].network)
                    }
                    _ => server.keeper(),
                };
                Held {
                    process: waiting(*role, find),
                    client: Some(client),
                    session: None,
                }
            }
            Stage::Starts(program, role) => {
                let mut session = program.start();
                session.client().greeting();
                let process = waiting(*role, || {
                    let processes = session.processes();
                    match role {
                        Role::Opener => processes.opener,
                        _ => processes.keeper,
                    }
                });
                Held {
                    process,
                    client: None,
                    session: Some(session),
                }
            }
        }
    }
}

/// The process, once it waits as its role does.
fn waiting(role: Role, find: impl Fn() -> Option<Process>) -> Process {
    eventually(&format!("the {} waits", role.name()), || {
        let process = find()?;
        let is_waiting = process.state() == Some('S')
            && process.blocked_in().is_some_and(|call| role.waits_in(call));
        is_waiting.then_some(process)
    })
}

/// One attempt in a process of its own, if the one before did not survive.
fn filtered(test: &Test, role: Role) {
    let stage = Stage::new(test, role);
    let mut context = Context::new(test, role);
    context.signal = libc::SIGKILL as u64;
    let mut differences = Differences::default();
    let mut held: Option<Held> = None;
    // Who is aimed at: another connection's processes.
    let mut victim = Program::new(test).start();
    victim.client().log_in_by_starttls(Pki::of(Key::P256));
    context.target = victim.network();
    for row in ROWS.iter().chain(TOWARDS) {
        let now = held.take().unwrap_or_else(|| stage.take());
        context = context.of(now.process);
        let may = OPENER_MAY.iter().find(|(name, _)| *name == row.name);
        let expected = match may {
            Some((_, expected)) if role == Role::Opener => *expected,
            _ => Dies,
        };
        // What comes before it is death already.
        let outcome = Row {
            before: None,
            ..*row
        }
        .attempt(now.process, &mut context);
        differences.note(row.name, expected, outcome);
        if let Outcome::Returned(_) = outcome {
            held = Some(now);
        }
    }
    // Every family of sockets that there is or will be.
    if role == Role::Network {
        for family in 0..=46 {
            let now = stage.take();
            let arguments = [n(family), n(libc::SOCK_RAW as i64), ZERO];
            let outcome = call(Gate::Syscall, now.process, libc::SYS_socket, &arguments);
            differences.note(&format!("socket of family {family}"), Dies, outcome);
        }
    }
    drop(held);
    assert!(victim.client().command("a NOOP").is_ok());
    assert!(victim.client().command("z LOGOUT").is_ok());
    assert_nothing_made(test);
    differences.end(ROWS.len() + TOWARDS.len());
}

/// In the chroot the harness looks.
fn assert_nothing_made(test: &Test) {
    assert!(!test.path("new").exists());
    let text = std::fs::read(test.path("secret")).unwrap();
    assert_eq!(text, b"secret");
}

/// Without filters one process survives it all, and serves its client afterwards.
fn beneath(test: &Test, role: Role) {
    let column = |row: &Row| {
        if role == Role::Opener {
            row.opener
        } else {
            row.beneath
        }
    };
    let landlock = Errno(libc::EPERM);
    layers(test, role, Kernel::OURS.without_filters(), column, landlock);
}

fn bare(test: &Test, role: Role) {
    let kernel = Kernel::OURS
        .without_filters()
        .without_landlock(libc::ENOSYS)
        .without_mdwe();
    // The opener is root to files, which is for Landlock and the filter to bound; to processes it is nobody.
    let column = |row: &Row| match role {
        Role::Opener => Untried,
        _ => row.bare,
    };
    layers(test, role, kernel, column, Succeeds);
}

/// Tries what `column` says on a kernel; `signalled` is what comes of a signal to a process of the same user.
fn layers(
    test: &Test,
    role: Role,
    kernel: Kernel,
    column: impl Fn(&Row) -> Expected + Sync,
    signalled: Expected,
) {
    let stage = kernel.run(|| Stage::new(test, role));
    // Of the listener there are two connections: the first is aimed at.
    let mut first = kernel.run(|| stage.take());
    let mut held = match &stage {
        Stage::Listener(server, Role::Network) => {
            let mut client = server.connect();
            client.greeting();
            let other = first.process;
            let process = waiting(role, || {
                let sessions = server.sessions().into_iter();
                sessions
                    .map(|session| session.network)
                    .find(|process| *process != other)
            });
            Held {
                process,
                client: Some(client),
                session: None,
            }
        }
        // There is one keeper.
        Stage::Listener(..) => Held {
            process: first.process,
            client: None,
            session: None,
        },
        Stage::Starts(..) => kernel.run(|| stage.take()),
    };
    let process = held.process;
    let status = process.status();
    assert_eq!(
        status.field("Seccomp_filters"),
        "1",
        "the program's own filter is there"
    );
    let mut context = Context::new(test, role).of(process);
    let mut differences = Differences::default();
    for row in ROWS {
        let expected = column(row);
        if expected != Untried {
            let outcome = row.attempt(process, &mut context);
            differences.note(row.name, expected, outcome);
        }
    }
    // Signals that would do harm are only sent where they have to be refused.
    context.signal = match signalled {
        Errno(_) => libc::SIGKILL as u64,
        _ => 0,
    };
    let sibling = (first.process != process).then_some(first.process);
    let parent = process.parent().expect("a parent");
    let mut targets: Vec<(&str, Process)> = vec![("a sibling", first.process)];
    targets.retain(|(_, target)| Some(*target) == sibling);
    if role != Role::Opener {
        // Root's, or another user's: not by Landlock alone.
        targets.push(("its parent", parent));
    }
    let launcher = match (&stage, &held.session, &first.client) {
        (Stage::Listener(server, _), ..) => {
            let sessions = server.sessions();
            sessions.iter().find_map(|session| session.launcher)
        }
        (_, Some(session), _) => session.processes().launcher,
        _ => None,
    };
    targets.push(("the launcher", launcher.expect("a launcher")));
    let same_user =
        |target: Process| target.status().numbers("Uid")[0] == process.status().numbers("Uid")[0];
    for (whose, target) in targets {
        context.target = target;
        for row in TOWARDS {
            let expected = match (row.is_signal(), same_user(target)) {
                (true, true) => signalled,
                (true, false) => Errno(libc::EPERM),
                (false, _) => row.beneath,
            };
            if expected != Untried {
                let outcome = row.attempt(process, &mut context);
                differences.note(&format!("{} {whose}", row.name), expected, outcome);
            }
        }
        assert!(target.alive(), "{whose} is gone");
    }
    differences.end(18);
    // All of it has changed nothing.
    for one in [&mut first, &mut held] {
        let client = match (&mut one.client, &mut one.session) {
            (Some(client), _) => client,
            (None, Some(session)) => session.client(),
            (None, None) => continue,
        };
        client.starttls(Pki::of(Key::P256));
        client.login();
        assert!(client.command("z LOGOUT").is_ok());
    }
    assert_nothing_made(test);
}

/// The numbers that are open, and what each is: the client, the log, /dev/null, a socket of another kind, and what has a name.
fn descriptors(test: &Test, role: Role) {
    let stage = Stage::new(test, role);
    let held = stage.take();
    let all = held.process.descriptors();
    let name = |target: &String| match target.as_str() {
        "/dev/null" => "null".to_owned(),
        target if target.starts_with("socket:") => {
            if clients(target) { "client" } else { "pair" }.to_owned()
        }
        target if target.starts_with(test.path("log.").to_str().unwrap()) => "log".to_owned(),
        target if target == test.path("names").to_str().unwrap() => "names".to_owned(),
        target => target.trim_start_matches("anon_inode:").to_owned(),
    };
    let mut kinds: Vec<_> = all.values().map(name).collect();
    kinds.sort();
    let expected: &[&str] = match role {
        // Standard input and output, or what is in their place, and the log; the launcher; the keeper; and children's ends.
        Role::Network => &[
            "[signalfd]",
            "client",
            "log",
            "null",
            "null",
            "pair",
            "pair",
            "pair",
        ],
        Role::Keeper => &["log", "null", "null", "pair"],
        Role::SharedKeeper => &["[eventpoll]", "log", "null", "null", "pair", "pair"],
        Role::Opener => &["log", "names", "null", "null", "pair"],
    };
    assert_eq!(kinds, expected, "{all:?}");
    // What is not listed is not there either: a descriptor that cannot be written to could be of an O_PATH kind.
    for number in (0..64).filter(|number| !all.contains_key(number)) {
        let arguments = [n(number.into()), ZERO, ZERO];
        let outcome = call(Gate::Syscall, held.process, libc::SYS_write, &arguments);
        assert_eq!(
            outcome,
            Outcome::Returned(-i64::from(libc::EBADF)),
            "{number}"
        );
    }
}

/// Whether `socket:[inode]` is a TCP socket.
fn clients(target: &str) -> bool {
    let inode = target.trim_start_matches("socket:[").trim_end_matches(']');
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table
        .lines()
        .skip(1)
        .any(|line| line.split_whitespace().nth(9) == Some(inode))
}

/// It has no filter, so it survives: what Landlock, ids and limits leave to it.
fn connector(test: &Test) {
    let remote = Remote::tcp(test, Introduction::None, &Backend::imap());
    let start = || {
        let mut session = Program::new(test).connect(&remote).start();
        session.client().greeting();
        let connector = eventually("the connector waits", || {
            let process = session.processes().connector?;
            (process.blocked_in() == Some(libc::SYS_recvfrom)).then_some(process)
        });
        (session, connector)
    };
    let (mut session, process) = start();
    let (mut other, sibling) = start();
    let mut context = Context::new(test, Role::Opener).of(process);
    // What its user could do to files, were it not for Landlock.
    let open = test.path("open");
    make_dir(&open, 0o1777);
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let file = open.join("file");
    write_file(&file, "anybody's", 0o666);
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    context.file = format!("{}\0", file.display()).into();
    context.dotted = format!("{}\0", open.join("new").display()).into();
    let rows = [
        (
            row("openat", libc::SYS_openat, |c| vec![CWD, b(&c.file), ZERO]),
            Succeeds,
        ),
        (
            row("openat for writing", libc::SYS_openat, |c| {
                vec![CWD, b(&c.file), n(libc::O_WRONLY as i64)]
            }),
            Errno(libc::EACCES),
        ),
        (
            row("openat to create", libc::SYS_openat, |c| {
                let flags = libc::O_CREAT | libc::O_WRONLY;
                vec![CWD, b(&c.dotted), n(flags as i64), n(0o600)]
            }),
            Errno(libc::EACCES),
        ),
        (
            row("truncate", libc::SYS_truncate, |c| vec![b(&c.file), ZERO]),
            Errno(libc::EACCES),
        ),
        (
            row("unlink", libc::SYS_unlink, |c| vec![b(&c.file)]),
            Errno(libc::EACCES),
        ),
        (
            row("mkdir", libc::SYS_mkdir, |c| vec![b(&c.dotted), n(0o700)]),
            Errno(libc::EACCES),
        ),
        (
            row("execve", libc::SYS_execve, |_| vec![TRUE, ZERO, ZERO]),
            Errno(libc::EACCES),
        ),
        (row("fork", libc::SYS_fork, |_| vec![]), Errno(libc::EAGAIN)),
        (
            row("bind of a TCP port", libc::SYS_bind, |c| {
                vec![last(c), b(&c.any_port), n(16)]
            })
            .after(libc::SYS_socket, TCP),
            Errno(libc::EACCES),
        ),
        (
            row("connect by TCP", libc::SYS_connect, |c| {
                vec![last(c), b(&c.inet), n(16)]
            })
            .after(libc::SYS_socket, TCP),
            Succeeds,
        ),
        (
            row("connect to an abstract socket", libc::SYS_connect, |c| {
                vec![last(c), b(&c.stream), n(c.stream.len() as i64)]
            })
            .after(libc::SYS_socket, UNIX_STREAM),
            Errno(libc::EPERM),
        ),
        (
            row("mprotect of the stack", libc::SYS_mprotect, |c| {
                vec![Arg::Number(c.stack), n(4096), n(EXECUTABLE)]
            }),
            Errno(libc::EACCES),
        ),
        (
            row("setuid", libc::SYS_setuid, |_| vec![ZERO]),
            Errno(libc::EPERM),
        ),
        (
            row("chroot", libc::SYS_chroot, |_| vec![ROOT]),
            Errno(libc::EPERM),
        ),
    ];
    let mut differences = Differences::default();
    for (row, expected) in rows {
        let outcome = row.attempt(process, &mut context);
        differences.note(row.name, expected, outcome);
    }
    context.signal = libc::SIGKILL as u64;
    for (whose, target) in [
        ("another connector", sibling),
        ("its network process", session.network()),
        ("another network process", other.network()),
    ] {
        // All of them are one user's.
        assert_eq!(target.status().numbers("Uid"), [NETWORK_ID; 4]);
        context.target = target;
        for row in TOWARDS {
            let expected = if row.is_signal() {
                Errno(libc::EPERM)
            } else {
                row.beneath
            };
            if expected != Untried {
                let outcome = row.attempt(process, &mut context);
                differences.note(&format!("{} {whose}", row.name), expected, outcome);
            }
        }
    }
    differences.end(30);
    for session in [&mut session, &mut other] {
        session.client().starttls(Pki::of(Key::P256));
        session.client().login();
        assert!(session.client().command("z LOGOUT").is_ok());
    }
}

/// How a kernel or container says that it has no Landlock.
const ABSENT: [i32; 3] = [libc::ENOSYS, libc::EOPNOTSUPP, libc::EPERM];

fn kernels(test: &Test) {
    let directory = test.path("names");
    make_dir(&directory, 0o755);
    let program = Program::new(test).option("--cert-dir", directory);
    let none = ABSENT.map(|errno| Kernel::OURS.without_landlock(errno));
    let some = (1..=7).map(|abi| Kernel::OURS.landlock(abi));
    for kernel in none.into_iter().chain(some) {
        for kernel in [kernel, kernel.without_mdwe()] {
            let mut session = kernel.run(|| program.start());
            session.client().log_in_by_starttls(Pki::of(Key::P256));
            assert!(session.client().command("z LOGOUT").is_ok());
            session.close_client();
            assert_eq!(session.wait_code(), 0, "{kernel:?}: {}", session.log());
            let log = session.log();
            assert_eq!(log.lines().count(), 1, "{kernel:?}: {log}");
        }
    }
    let remote = Remote::tcp(test, Introduction::None, &Backend::imap());
    for kernel in [
        Kernel::OURS.without_landlock(libc::ENOSYS).without_mdwe(),
        Kernel::OURS.landlock(3),
    ] {
        let mut session = kernel.run(|| Program::new(test).connect(&remote).start());
        session.client().log_in_by_starttls(Pki::of(Key::P256));
        assert!(session.client().command("z LOGOUT").is_ok());
    }
}

/// The same calls on each ABI: the emulation is real, and so is what is denied.
fn abis(test: &Test) {
    let mut differences = Differences::default();
    for abi in 0..=7 {
        let kernel = Kernel::OURS.without_filters();
        let kernel = match abi {
            0 => kernel.without_landlock(libc::ENOSYS),
            abi => kernel.landlock(abi),
        };
        let stage = kernel.run(|| Stage::new(test, Role::Keeper));
        let (first, held) = (stage.take_on(kernel), stage.take_on(kernel));
        let mut context = Context::new(test, Role::Keeper).of(held.process);
        // None, so that it does no harm where it is not refused.
        context.signal = 0;
        context.target = first.process;
        for row in ROWS.iter().chain(TOWARDS) {
            let (since, errno) = match row.name {
                "openat" => (1, libc::EACCES),
                "connect by TCP" | "bind of a TCP port" => (4, libc::EACCES),
                "connect to an abstract socket"
                | "sendto an abstract socket"
                | "sendmsg with a descriptor to an abstract socket" => (6, libc::EPERM),
                _ if row.is_signal() => (6, libc::EPERM),
                _ => continue,
            };
            let expected = if abi >= since { Errno(errno) } else { Succeeds };
            let outcome = row.attempt(held.process, &mut context);
            differences.note(&format!("ABI {abi}: {}", row.name), expected, outcome);
        }
    }
    differences.end(80);
}

impl Stage {
    fn take_on(&self, kernel: Kernel) -> Held {
        kernel.run(|| self.take())
    }
}

const NO_LANDLOCK: &str = "no Landlock here (Function not implemented)";
const NO_MDWE: &str = "no PR_SET_MDWE here (Invalid argument)";

fn warnings(test: &Test) {
    let none = Kernel::OURS.without_landlock(libc::ENOSYS).without_mdwe();
    let count = |log: &str, words: &str| log.lines().filter(|line| line.contains(words)).count();
    for (kernel, times) in [(none, 1), (Kernel::OURS, 0)] {
        let program = Program::new(test);
        let server = kernel.run(|| Server::start(test, Superserver::Listener, &program));
        for _ in 0..2 {
            let mut client = server.connect();
            client.log_in_by_starttls(Pki::of(Key::P256));
            assert!(client.command("z LOGOUT").is_ok());
        }
        server.wait_log(": session ");
        let log = server.log();
        assert_eq!(count(&log, NO_LANDLOCK), times, "{log}");
        assert_eq!(count(&log, NO_MDWE), times, "{log}");
        let mut session = kernel.run(|| program.clone().flag("-v").start());
        session.client().greeting();
        let log = session.log();
        assert_eq!(count(&log, NO_LANDLOCK), times, "{log}");
        assert_eq!(count(&log, NO_MDWE), times, "{log}");
        // Without -v there is nothing: see `kernels`.
    }
    let check = |kernel: Kernel| {
        let program = Program::new(test).flag("--check");
        let output = kernel.run(|| program.run());
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stdout).unwrap()
    };
    let report = check(none);
    for words in [NO_LANDLOCK, NO_MDWE] {
        let warning = format!("warning: kernel: {words}");
        assert_eq!(count(&report, &warning), 1, "{report}");
    }
    let report = check(Kernel::OURS.landlock(3));
    assert_eq!(
        count(&report, "ok: kernel: has Landlock (ABI 3) and PR_SET_MDWE"),
        1,
        "{report}"
    );
    let warning = "warning: kernel: Landlock is there in part only (ABI 3)";
    assert_eq!(count(&report, warning), 1, "{report}");
    let report = check(Kernel::OURS);
    assert_eq!(count(&report, "warning: kernel: "), 0, "{report}");
}

fn required(test: &Test) {
    let ours = Kernel::OURS;
    let cases = [
        (
            ours.without_landlock(libc::ENOSYS),
            "landlock",
            "landlock is required (--require), and this kernel or container has no Landlock (Function not implemented)",
        ),
        (
            ours.without_landlock(libc::EPERM),
            "mdwe:landlock",
            "landlock is required (--require), and this kernel or container has no Landlock (Operation not permitted)",
        ),
        (
            ours.landlock(5),
            "landlock=6",
            "landlock=6 is required (--require), and this kernel has Landlock ABI 5",
        ),
        (
            ours.without_mdwe(),
            "landlock=6:mdwe",
            "mdwe is required (--require), and this kernel or container has no PR_SET_MDWE (Invalid argument)",
        ),
    ];
    for (kernel, what, says) in cases {
        for policy in ["required", "optional", "implicit"] {
            let program = Program::new(test).tls(policy).env("IMAP_TLS_REQUIRE", what);
            let mut session = kernel.run(|| program.start());
            let (said, _) = session.client().read_to_end();
            let said = String::from_utf8(said).unwrap();
            assert_eq!(policy == "implicit", said.is_empty(), "{said}");
            assert!(
                said.is_empty() || said.starts_with("* BYE [UNAVAILABLE] "),
                "{said}"
            );
            session.close_client();
            assert_eq!(session.wait_code(), 100);
            assert!(session.log().contains(says), "{}", session.log());
        }
    }
    assert!(test.record().backends().is_empty());
    for (kernel, what, says) in cases {
        let program = Program::new(test).option("--require", what);
        let check = kernel.run(|| program.clone().flag("--check").run());
        assert_eq!(check.status.code(), Some(100));
        let report = String::from_utf8(check.stdout).unwrap();
        assert!(
            report.contains(&format!("error: kernel: {says}\n")),
            "{report}"
        );
        let at = format!("127.0.0.1:{}", free_port());
        let listener = kernel.run(|| program.clone().option("--listen", &at).run());
        assert_eq!(listener.status.code(), Some(100));
        let log = String::from_utf8(listener.stderr).unwrap();
        assert!(log.contains(says), "{log}");
    }
}

fn satisfied(test: &Test) {
    for (kernel, what) in [
        (Kernel::OURS, "landlock=6:mdwe"),
        (Kernel::OURS.landlock(4).without_mdwe(), "landlock=4"),
        (Kernel::OURS.without_landlock(libc::ENOSYS), "mdwe"),
    ] {
        let program = Program::new(test).option("--require", what);
        let mut session = kernel.run(|| program.start());
        session.client().log_in_by_starttls(Pki::of(Key::P256));
        assert!(session.client().command("z LOGOUT").is_ok());
    }
}

/// systemd's groups of calls differ from version to version, and what a unit denies looks like a kernel that lacks it.
fn units(_: &Test) {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text
            .lines()
            .filter(|line| line.starts_with("SystemCallFilter=@"))
        {
            seen += 1;
            for call in [
                "chroot",
                "landlock_create_ruleset",
                "landlock_restrict_self",
                "seccomp",
            ] {
                assert!(
                    line.split(' ').any(|word| word == call),
                    "{call} in {}",
                    path.display()
                );
            }
        }
    }
    assert_eq!(seen, 4);
}

/// Changing ids takes no capability out of that set.
fn inheritable(test: &Test) {
    let line = Program::new(test).command_line();
    let server = Tool::new(test, "setpriv")
        .args(["--inh-caps", "+chown"])
        .args(&line);
    let (running, mut client) = server.talk();
    client.greeting();
    let processes = Processes::of(running.process());
    let launcher = processes.launcher.expect("a launcher");
    assert_ne!(launcher.status().mask("CapInh"), 0, "nothing was left");
    for process in [processes.network, processes.keeper.expect("a keeper")] {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(process.status().mask(set), 0, "{set}");
        }
    }
    client.starttls(Pki::of(Key::P256));
    client.login();
    assert!(client.command("z LOGOUT").is_ok());
}
