//! The system calls that each role may make, as a table with reasons; everything else is death (seccomp(2)).
//!
//! The kernel runs a new filter over every system call number, to learn which need no look at their arguments, and compiles it:
//! a list, which is what seccompiler makes, costs a connection twice what a search tree does. So the tables are also there as
//! search trees, made by libseccomp with `tests/filters/run` for the usual architectures; tests run both over every number and
//! compare them with the tables. Where there is no tree, and in debug builds, seccompiler translates when it is needed.

use std::borrow::Cow;
use std::collections::BTreeMap;

use nix::libc::{self, c_long};
use seccompiler::{
    BackendError, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, sock_filter,
};

use super::Role;
use crate::error::Error;

#[cfg(any(test, target_arch = "aarch64"))]
mod aarch64;
#[cfg(any(test, target_arch = "riscv64"))]
mod riscv64;
#[cfg(any(test, target_arch = "x86_64"))]
mod x86_64;

/// A filter as the kernel takes it.
pub(crate) type Program = Cow<'static, [sock_filter]>;

/// One allowed system call. `why` is for the reader: a call without a reason does not belong here.
struct Rule {
    call: c_long,
    #[cfg(test)]
    name: &'static str,
    argument: Argument,
    #[allow(dead_code, reason = "documentation that cannot be left out")]
    why: &'static str,
}

/// What must hold for the arguments.
enum Argument {
    Any,
    /// Each argument has its value, in all 64 bits.
    Are(&'static [(u8, u64)]),
    /// The argument of this number has none of these bits.
    Lacks(u8, u64),
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
const FOR_WRITING: u64 = (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u64;

const COMMON: &[Rule] = &[
    rule!(SYS_brk, "the allocator grows and shrinks the heap"),
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
    rule!(SYS_madvise, "the allocator gives memory back"),
    rule!(
        SYS_mmap,
        Argument::Lacks(2, PROT_EXEC),
        "the allocator takes large blocks"
    ),
    rule!(SYS_mremap, "the allocator moves large blocks"),
    rule!(SYS_munmap, "the allocator gives large blocks back"),
    rule!(
        SYS_ppoll,
        "waiting, and asking whether a pipe or the log has room"
    ),
    rule!(SYS_recvfrom, "sockets are read without changing their mode"),
    rule!(
        SYS_restart_syscall,
        "the kernel's own, after SIGSTOP and SIGCONT in ppoll"
    ),
    rule!(
        SYS_rt_sigprocmask,
        "glibc 2.41 and later, around its own state at the first getrandom"
    ),
    rule!(
        SYS_rt_sigreturn,
        "the kernel's own, after a signal handler of the runtime's"
    ),
    rule!(
        SYS_sendto,
        Argument::Are(&[(4, 0)]),
        "sockets and syslog are written to, connected ones only: no address may be given"
    ),
    rule!(SYS_write, "stderr"),
];

const NETWORK: &[Rule] = &[
    rule!(SYS_read, "signals, and a client or backend on pipes"),
    rule!(
        SYS_setsockopt,
        Argument::Are(&[
            (1, libc::IPPROTO_TCP as u64),
            (2, libc::TCP_QUICKACK as u64),
        ]),
        "the end of the handshake is acknowledged at once"
    ),
    rule!(SYS_shutdown, "half-close"),
    rule!(SYS_wait4, "the keeper's and the backend's ends"),
];

/// Nothing but answering on its one socket.
const KEEPER: &[Rule] = &[];

/// And waiting for many.
const SHARED_KEEPER: &[Rule] = &[
    rule!(SYS_epoll_ctl, "who may ask, and who no longer"),
    rule!(SYS_epoll_pwait, "waiting for all of them"),
    rule!(SYS_recvmsg, "a connection's socket, from the listener"),
];

/// Reading a name's files, beneath its directory or where links in there lead.
const OPENER: &[Rule] = &[
    rule!(SYS_fstat, "a file's mode and length"),
    rule!(SYS_newfstatat, "the same, as libraries have it"),
    rule!(
        SYS_openat,
        Argument::Lacks(2, FOR_WRITING),
        "certificates and keys, for reading only"
    ),
    rule!(SYS_read, "their content"),
    rule!(SYS_statx, "mode and length, as std asks for them"),
];

/// For debug builds only, which have no tree for this reason.
const DEBUG: &[Rule] = &[rule!(
    SYS_fcntl,
    Argument::Are(&[(1, libc::F_GETFD as u64)]),
    "debug builds of std look whether a descriptor is open before they close it"
)];

/// The filter of a role. Other architectures than the compiled one are refused by the filter itself.
///
/// # Errors
/// `System` if this architecture has no filter.
pub(crate) fn compile(role: Role) -> Result<Program, Error> {
    if let (false, Some(tree)) = (cfg!(debug_assertions), tree(role)) {
        return Ok(Cow::Borrowed(tree));
    }
    let debug: &[Rule] = if cfg!(debug_assertions) { DEBUG } else { &[] };
    translate(
        rules(role).chain(debug).map(|rule| (rule.call, rule)),
        std::env::consts::ARCH,
    )
    .map(Cow::Owned)
    .map_err(|error| Error::system("cannot make the system call filter", error))
}

fn rules(role: Role) -> impl Iterator<Item = &'static Rule> {
    let own = match role {
        Role::Keeper => KEEPER,
        Role::Network => NETWORK,
        Role::Opener => OPENER,
        Role::SharedKeeper => SHARED_KEEPER,
    };
    COMMON.iter().chain(own)
}

/// The search tree of a role, where this architecture has one.
#[allow(
    unreachable_code,
    reason = "what comes last is for other architectures"
)]
fn tree(role: Role) -> Option<&'static [sock_filter]> {
    #[cfg(target_arch = "aarch64")]
    use aarch64 as trees;
    #[cfg(target_arch = "riscv64")]
    use riscv64 as trees;
    #[cfg(target_arch = "x86_64")]
    use x86_64 as trees;
    #[cfg(any(
        target_arch = "aarch64",
        target_arch = "riscv64",
        target_arch = "x86_64"
    ))]
    return Some(match role {
        Role::Keeper => trees::KEEPER,
        Role::Network => trees::NETWORK,
        Role::Opener => trees::OPENER,
        Role::SharedKeeper => trees::SHARED_KEEPER,
    });
    None
}

/// One instruction of a tree.
const fn instruction(code: u16, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Has seccompiler translate rules, each with its call's number, for an architecture.
fn translate<'a>(
    rules: impl Iterator<Item = (c_long, &'a Rule)>,
    architecture: &str,
) -> Result<Vec<sock_filter>, BackendError> {
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for (call, rule) in rules {
        table.insert(call, rule.conditions()?);
    }
    SeccompFilter::new(
        table,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        architecture.try_into()?,
    )?
    .try_into()
}

impl Rule {
    /// No rule means that any arguments will do.
    fn conditions(&self) -> Result<Vec<SeccompRule>, BackendError> {
        let conditions: Result<Vec<_>, _> = match self.argument {
            Argument::Any => return Ok(Vec::new()),
            Argument::Are(values) => values
                .iter()
                .map(|(index, value)| condition(*index, SeccompCmpOp::Eq, *value))
                .collect(),
            Argument::Lacks(index, mask) => {
                condition(index, SeccompCmpOp::MaskedEq(mask), 0).map(|condition| vec![condition])
            }
        };
        Ok(vec![SeccompRule::new(conditions?)?])
    }
}

fn condition(
    index: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)
}

/// Puts the filter on for the rest of this process's life.
///
/// # Errors
/// `System` if the kernel refuses.
pub(crate) fn apply(program: &Program) -> Result<(), Error> {
    seccompiler::apply_filter(program)
        .map_err(|error| Error::system("cannot put the system call filter on", error))
}

#[cfg(test)]
mod tests;
