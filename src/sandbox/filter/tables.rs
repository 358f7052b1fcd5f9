//! The tables: which system calls each role may make, with what arguments, and why.
//!
//! The end-to-end tests (`confinement: minimal: `) have this file too, and demand that each call in it is made. What is not there
//! needs a reason more than what is: rt_sigreturn, because no handler of a signal ever returns here, and it gives an attacker all
//! registers at once; restart_syscall, because ppoll, unlike poll, is restarted as itself; brk, because no C code allocates here.

use nix::libc::{self, c_long};

/// One allowed system call. `why` is for the reader: a call without a reason does not belong here.
pub(super) struct Rule {
    pub(super) call: c_long,
    #[cfg(test)]
    pub(super) name: &'static str,
    pub(super) argument: Argument,
    #[allow(dead_code, reason = "documentation that cannot be left out")]
    pub(super) why: &'static str,
}

/// What must hold for the arguments.
pub(super) enum Argument {
    Any,
    /// Each argument has its value, in all 64 bits.
    Are(&'static [(u8, u64)]),
    /// Of each argument the bits of a mask have their value: number, mask, value.
    Masked(&'static [(u8, u64, u64)]),
    /// Of one argument the bits of a mask have another value: number, mask, value.
    Differs(u8, u64, u64),
}

/// One line of a table: the call, what must hold for its arguments if anything must, and the reason.
macro_rules! rule {
    ($call:ident, $why:literal) => {
        rule!($call, Argument::Any, $why)
    };
    ($call:ident, $argument:expr, $why:literal) => {
        Rule {
            call: libc::$call,
            #[cfg(test)]
            name: stringify!($call),
            argument: $argument,
            why: $why,
        }
    };
}

/// Memory is never made executable, so code that was written cannot be run.
const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
const STDERR: u64 = libc::STDERR_FILENO as u64;
/// What is looked at of a descriptor. Each bit costs a connection a third of a microsecond, and no process has more descriptors than this
/// (`LimitNOFILE=` of our units). The kernel takes no bits beyond 32, so those must not make a difference.
const DESCRIPTOR: u64 = 0xffff;
const MAP_ANONYMOUS: u64 = libc::MAP_ANONYMOUS as u64;
const FOR_WRITING: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u64;

pub(super) const COMMON: &[Rule] = &[
    rule!(
        SYS_clock_gettime,
        "deadlines and the log, where the vDSO cannot tell the time"
    ),
    rule!(
        SYS_close,
        "descriptors are given up as soon as they are of no more use"
    ),
    rule!(SYS_exit_group, "the end"),
    rule!(SYS_getrandom, "keys and nonces"),
    rule!(
        SYS_mmap,
        Argument::Masked(&[(2, PROT_EXEC, 0), (3, MAP_ANONYMOUS, MAP_ANONYMOUS)]),
        "the allocator takes large blocks, and no file: the log may be one"
    ),
    rule!(SYS_mremap, "the allocator moves large blocks"),
    rule!(SYS_munmap, "the allocator gives large blocks back"),
    rule!(SYS_recvfrom, "sockets are read without changing their mode"),
    rule!(
        SYS_rt_sigprocmask,
        "glibc 2.41 and later, around its own state at the first getrandom"
    ),
    rule!(
        SYS_sendto,
        Argument::Are(&[(4, 0)]),
        "sockets and syslog are written to, connected ones only: no address may be given"
    ),
    rule!(SYS_write, "stderr: the log, and anybody's last words"),
];

pub(super) const NETWORK: &[Rule] = &[
    rule!(
        SYS_madvise,
        "memory is given back while the client is silent"
    ),
    rule!(
        SYS_ppoll,
        "waiting, and asking whether a pipe or the log has room"
    ),
    rule!(SYS_read, "signals, and a client or backend on pipes"),
    rule!(
        SYS_setsockopt,
        Argument::Are(&[
            (1, libc::IPPROTO_TCP as u64),
            (2, libc::TCP_QUICKACK as u64),
        ]),
        "the end of the handshake is acknowledged at once"
    ),
    rule!(
        SYS_shutdown,
        Argument::Differs(0, DESCRIPTOR, STDERR),
        "half-close; where the log is a socket it is everybody's, the listener's and all backends'"
    ),
    rule!(SYS_wait4, "the keeper's and the backend's ends"),
];

/// Nothing but answering on its one socket.
pub(super) const KEEPER: &[Rule] = &[];

/// And waiting for many.
pub(super) const SHARED_KEEPER: &[Rule] = &[
    rule!(SYS_epoll_ctl, "who may ask, and who no longer"),
    rule!(SYS_epoll_pwait, "waiting for all of them"),
    rule!(SYS_recvmsg, "a connection's socket, from the listener"),
];

/// The same, and nobody hands them over.
pub(super) const KEEPER_SERVICE: &[Rule] = &[
    rule!(SYS_accept4, "network processes, at the service's socket"),
    rule!(SYS_epoll_ctl, "who may ask, and who no longer"),
    rule!(SYS_epoll_pwait, "waiting for all of them"),
];

/// Reading a name's files, beneath its directory or where links in there lead.
pub(super) const OPENER: &[Rule] = &[
    rule!(SYS_fstat, "a file's mode and length, with musl"),
    rule!(
        SYS_newfstatat,
        "the same with glibc, where there is no statx"
    ),
    rule!(
        SYS_openat,
        Argument::Masked(&[(2, FOR_WRITING, 0)]),
        "certificates and keys, for reading only"
    ),
    rule!(SYS_read, "their content"),
    rule!(
        SYS_statx,
        "mode and length with glibc, as std asks for them"
    ),
];

/// For debug builds only, which have no tree for this reason.
pub(super) const DEBUG: &[Rule] = &[rule!(
    SYS_fcntl,
    Argument::Are(&[(1, libc::F_GETFD as u64)]),
    "debug builds of std look whether a descriptor is open before they close it"
)];
