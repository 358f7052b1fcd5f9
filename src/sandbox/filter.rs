//! The system calls that each role may make, as a table with reasons; everything else is death (seccomp(2)).

use std::collections::BTreeMap;

use nix::libc::{self, c_long};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::Role;
use crate::error::Error;

/// One allowed system call. `why` is for the reader: a call without a reason does not belong here.
struct Rule {
    call: c_long,
    argument: Argument,
    #[allow(dead_code, reason = "documentation that cannot be left out")]
    why: &'static str,
}

/// What must hold for the arguments.
enum Argument {
    Any,
    /// Each argument has its value, in all 64 bits.
    Are(&'static [(u8, u64)]),
    /// Argument `index` has none of the bits in `mask`.
    Lacks {
        index: u8,
        mask: u64,
    },
}

const fn allow(call: c_long, why: &'static str) -> Rule {
    Rule {
        call,
        argument: Argument::Any,
        why,
    }
}

/// Memory is never made executable, so code that was written cannot be run.
const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

const COMMON: &[Rule] = &[
    allow(libc::SYS_brk, "the allocator grows and shrinks the heap"),
    allow(
        libc::SYS_clock_gettime,
        "deadlines and the log, where the vDSO cannot tell the time",
    ),
    allow(
        libc::SYS_close,
        "descriptors are given up as soon as they are of no more use",
    ),
    allow(libc::SYS_exit_group, "the end"),
    #[cfg(debug_assertions)]
    Rule {
        call: libc::SYS_fcntl,
        argument: Argument::Are(&[(1, libc::F_GETFD as u64)]),
        why: "debug builds of std look whether a descriptor is open before they close it",
    },
    allow(libc::SYS_getrandom, "keys and nonces"),
    allow(libc::SYS_madvise, "the allocator gives memory back"),
    Rule {
        call: libc::SYS_mmap,
        argument: Argument::Lacks {
            index: 2,
            mask: PROT_EXEC,
        },
        why: "the allocator takes large blocks",
    },
    allow(libc::SYS_mremap, "the allocator moves large blocks"),
    allow(libc::SYS_munmap, "the allocator gives large blocks back"),
    allow(
        libc::SYS_ppoll,
        "waiting, and asking whether a pipe or the log has room",
    ),
    allow(
        libc::SYS_recvfrom,
        "sockets are read without changing their mode",
    ),
    allow(
        libc::SYS_restart_syscall,
        "the kernel's own, after SIGSTOP and SIGCONT in ppoll",
    ),
    allow(
        libc::SYS_rt_sigprocmask,
        "glibc 2.41 and later, around its own state at the first getrandom",
    ),
    allow(
        libc::SYS_rt_sigreturn,
        "the kernel's own, after a signal handler of the runtime's",
    ),
    Rule {
        call: libc::SYS_sendto,
        argument: Argument::Are(&[(4, 0)]),
        why: "sockets and syslog are written to, connected ones only: no address may be given",
    },
    allow(libc::SYS_write, "stderr"),
];

const NETWORK: &[Rule] = &[
    allow(libc::SYS_read, "signals, and a client or backend on pipes"),
    Rule {
        call: libc::SYS_setsockopt,
        argument: Argument::Are(&[
            (1, libc::IPPROTO_TCP as u64),
            (2, libc::TCP_QUICKACK as u64),
        ]),
        why: "the end of the handshake is acknowledged at once",
    },
    allow(libc::SYS_shutdown, "half-close"),
    allow(libc::SYS_wait4, "the keeper's and the backend's ends"),
];

/// Nothing but answering on its one socket.
const KEEPER: &[Rule] = &[];

/// And waiting for many.
const SHARED_KEEPER: &[Rule] = &[
    allow(libc::SYS_epoll_ctl, "who may ask, and who no longer"),
    #[cfg(not(any(target_arch = "aarch64", target_arch = "riscv64")))]
    allow(libc::SYS_epoll_wait, "waiting for all of them"),
    allow(libc::SYS_epoll_pwait, "the same, as libraries have it"),
    allow(
        libc::SYS_recvmsg,
        "a connection's socket, from the listener",
    ),
];

/// Reading a name's files, beneath its directory or where links in there lead.
const OPENER: &[Rule] = &[
    allow(libc::SYS_fstat, "a file's mode and length"),
    #[cfg(not(target_arch = "riscv64"))]
    allow(libc::SYS_newfstatat, "the same, as libraries have it"),
    Rule {
        call: libc::SYS_openat,
        argument: Argument::Lacks {
            index: 2,
            mask: (libc::O_WRONLY | libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC) as u64,
        },
        why: "certificates and keys, for reading only",
    },
    allow(libc::SYS_read, "their content"),
    allow(libc::SYS_statx, "mode and length, as std asks for them"),
];

/// Translates the tables for this machine. Other architectures than the compiled one are refused by the filter itself.
///
/// # Errors
/// `System` if this architecture has no filter.
pub(crate) fn compile(role: Role) -> Result<BpfProgram, Error> {
    let own = match role {
        Role::Keeper => KEEPER,
        Role::Network => NETWORK,
        Role::Opener => OPENER,
        Role::SharedKeeper => SHARED_KEEPER,
    };
    let unusable = |error: seccompiler::BackendError| {
        Error::system("cannot make the system call filter", error)
    };
    let mut table: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in COMMON.iter().chain(own) {
        table.insert(rule.call, rule.conditions().map_err(unusable)?);
    }
    let architecture = std::env::consts::ARCH.try_into().map_err(unusable)?;
    let filter = SeccompFilter::new(
        table,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        architecture,
    );
    filter.and_then(TryInto::try_into).map_err(unusable)
}

impl Rule {
    /// No rule means that any arguments will do.
    fn conditions(&self) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
        let conditions: Result<Vec<_>, _> = match self.argument {
            Argument::Any => return Ok(Vec::new()),
            Argument::Are(values) => values
                .iter()
                .map(|(index, value)| condition(*index, SeccompCmpOp::Eq, *value))
                .collect(),
            Argument::Lacks { index, mask } => {
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
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value)
}

/// Puts the filter on for the rest of this process's life.
///
/// # Errors
/// `System` if the kernel refuses.
pub(crate) fn apply(program: &BpfProgram) -> Result<(), Error> {
    seccompiler::apply_filter(program)
        .map_err(|error| Error::system("cannot put the system call filter on", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_has_its_reason_and_stands_once() {
        for own in [NETWORK, KEEPER, OPENER, SHARED_KEEPER] {
            let rules: Vec<_> = COMMON.iter().chain(own).collect();
            assert!(rules.iter().all(|rule| !rule.why.is_empty()));
            let calls: std::collections::BTreeSet<_> = rules.iter().map(|rule| rule.call).collect();
            assert_eq!(calls.len(), rules.len());
        }
    }

    #[test]
    fn the_tables_compile() {
        assert!(!compile(Role::Network).unwrap().is_empty());
        assert!(!compile(Role::Keeper).unwrap().is_empty());
        assert!(!compile(Role::Opener).unwrap().is_empty());
        assert!(!compile(Role::SharedKeeper).unwrap().is_empty());
    }
}
