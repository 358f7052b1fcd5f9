//! What hostile code would call: the table.

use super::attempt::Expected::{Either, Errno, Succeeds, Untried};
use super::attempt::{Arguments, Context, Expected, Row, row};
use crate::harness::ptrace::{Arg, Gate};
use crate::harness::*;

pub(super) const CWD: Arg<'static> = Arg::Number(-100_i64 as u64);
pub(super) const ZERO: Arg<'static> = Arg::Number(0);
pub(super) const ROOT: Arg<'static> = Arg::Bytes(b"/\0");
pub(super) const TRUE: Arg<'static> = Arg::Bytes(b"/bin/true\0");
pub(super) const EMPTY: Arg<'static> = Arg::Bytes(b"\0");
pub(super) const ZEROES: Arg<'static> = Arg::Bytes(&[0; 128]);

pub(super) const fn n(number: i64) -> Arg<'static> {
    Arg::Number(number as u64)
}

pub(super) fn b(bytes: &[u8]) -> Arg<'_> {
    Arg::Bytes(bytes)
}

pub(super) fn last(context: &Context) -> Arg<'static> {
    n(context.last)
}

pub(super) const EXECUTABLE: i64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as i64;
pub(super) const PRIVATE: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;
pub(super) const X32: i64 = 0x4000_0000;
pub(super) const TCP: Arguments =
    |_| vec![n(libc::AF_INET as i64), n(libc::SOCK_STREAM as i64), ZERO];
pub(super) const UNIX_STREAM: Arguments =
    |_| vec![n(libc::AF_UNIX as i64), n(libc::SOCK_STREAM as i64), ZERO];
pub(super) const UNIX_DATAGRAM: Arguments =
    |_| vec![n(libc::AF_UNIX as i64), n(libc::SOCK_DGRAM as i64), ZERO];
/// `struct clone_args` with SIGCHLD as its `exit_signal`.
pub(super) const CLONE: [u8; 88] = {
    let mut bytes = [0; 88];
    bytes[32] = libc::SIGCHLD as u8;
    bytes
};
/// Version 3, this process; and every capability.
pub(super) const CAPABILITY_HEADER: [u8; 8] = [0x22, 0x05, 0x08, 0x20, 0, 0, 0, 0];
pub(super) const CAPABILITIES: [u8; 24] = [0xff; 24];
/// Two limits of 2^20, which is more than any of ours.
pub(super) const LIMIT: [u8; 16] = [0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0];
/// `struct file_handle` for an inode's number, 2.
pub(super) const HANDLE: [u8; 16] = [8, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
/// `struct msghdr`, then an octet to send at 56, its iovec at 64, and descriptor 0 in a control message at 80.
pub(super) const RIGHTS: [u8; 104] = {
    let mut bytes = [0; 104];
    bytes[24] = 1;
    bytes[40] = 20;
    bytes[72] = 1;
    bytes[80] = 20;
    bytes[88] = libc::SOL_SOCKET as u8;
    bytes[92] = libc::SCM_RIGHTS as u8;
    bytes
};
pub(super) const RIGHTS_LINKS: &[(usize, usize)] = &[(16, 64), (32, 80), (64, 56)];
/// The same to an address, which follows.
pub(super) const ADDRESSED_LINKS: &[(usize, usize)] = &[(0, 104), (16, 64), (32, 80), (64, 56)];

pub(super) fn rights_to(address: &[u8]) -> Vec<u8> {
    let mut bytes = RIGHTS.to_vec();
    bytes[8] = address.len() as u8;
    bytes.extend(address);
    bytes
}

/// `struct iovec` of eight octets behind it.
pub(super) const VECTOR: [u8; 24] = {
    let mut bytes = [0; 24];
    bytes[8] = 8;
    bytes
};
pub(super) const VECTOR_LINKS: &[(usize, usize)] = &[(0, 16)];

/// Errors that a call has where the kernel was built without it.
pub(super) const fn or_absent(errno: i32) -> Expected {
    Either(errno, libc::ENOSYS)
}

/// Everything that an attacker would try with the machine.
pub(super) const ROWS: &[Row] = &[
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
    row("mmap of the log", libc::SYS_mmap, |_| {
        let shared = n(libc::MAP_SHARED as i64);
        vec![ZERO, n(4096), n(libc::PROT_READ as i64), shared, n(2), ZERO]
    }),
    row("shutdown of the log", libc::SYS_shutdown, |_| {
        vec![n(2), n(libc::SHUT_RDWR as i64)]
    }),
    row(
        "shutdown of the log, by the number's lower half",
        libc::SYS_shutdown,
        |_| vec![n(0x1_0000_0002), n(libc::SHUT_RDWR as i64)],
    ),
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
pub(super) const OPENER_MAY: &[(&str, Expected)] = &[
    ("openat", Succeeds),
    ("openat of a secret", Succeeds),
    ("openat of a secret by dots", Succeeds),
    ("openat of init's memory", Either(libc::EACCES, libc::EPERM)),
    (
        "openat of init's environment",
        Either(libc::EACCES, libc::EPERM),
    ),
];

/// What the service's keeper may do: on standard input, which is no socket, it comes to nothing.
pub(super) const SERVICE_MAY: &[(&str, Expected)] = &[("accept4", Errno(libc::ENOTSOCK))];

/// What an attacker would try with another process.
pub(super) const TOWARDS: &[Row] = &[
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

pub(super) fn pid(context: &Context) -> Arg<'static> {
    n(context.target.0.into())
}

pub(super) fn signal(context: &Context) -> Arg<'static> {
    Arg::Number(context.signal)
}
