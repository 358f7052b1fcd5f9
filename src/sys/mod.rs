//! What nix and std lack, and the only `unsafe` of the program: small safe functions over libc that decide nothing.
#![allow(unsafe_code)]

mod memory;
mod reaping;
mod relocated;

use std::convert::Infallible;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

pub use memory::Allocator;
pub(crate) use memory::{give_back_free_memory, note_stack};
pub(crate) use reaping::{ChildEnd, reap};
pub(crate) use relocated::protect_relocated_data;

use nix::libc;
use nix::sys::epoll::{Epoll, EpollEvent};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::{ForkResult, Pid};

/// Turns the `-1` of a system call into the error it set.
fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The same for syscall(2), which returns a long, where only failure matters.
fn checked_long(result: libc::c_long) -> io::Result<()> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes a system call again that a signal interrupted: none that we take interrupts on purpose.
///
/// # Errors
/// As the call, other than `EINTR`.
pub(crate) fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(nix::errno::Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Has these signals wait until they are read. Returns their set.
///
/// # Errors
/// As sigprocmask(2).
pub(crate) fn hold_signals(signals: &[Signal]) -> nix::Result<SigSet> {
    let mask: SigSet = signals.iter().copied().collect();
    mask.thread_block()?;
    Ok(mask)
}

/// The same, and a descriptor to poll and to read them from, which never waits.
///
/// # Errors
/// As above, and signalfd(2).
pub(crate) fn watch_signals(signals: &[Signal]) -> nix::Result<SignalFd> {
    let mask = hold_signals(signals)?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
}

/// Descriptor 0. Not `std::io::stdin`, which for its number alone makes a buffer that lives as long as the process.
pub(crate) fn standard_input() -> BorrowedFd<'static> {
    // SAFETY: Rust's runtime sees to it that the standard descriptors are open, and they are replaced but never closed.
    unsafe { BorrowedFd::borrow_raw(libc::STDIN_FILENO) }
}

/// Descriptor 1, likewise.
pub(crate) fn standard_output() -> BorrowedFd<'static> {
    // SAFETY: as for descriptor 0.
    unsafe { BorrowedFd::borrow_raw(libc::STDOUT_FILENO) }
}

/// Ends this process at once, running no destructors and flushing nothing of the parent's.
pub(crate) fn exit_now(status: u8) -> ! {
    // SAFETY: _exit takes an integer, touches no memory of ours and does not return.
    unsafe { libc::_exit(i32::from(status)) }
}

/// Forks and runs `child` in the new process, which ends when it returns: nothing of the parent's story runs twice.
///
/// # Errors
/// As fork(2): no memory, or no more processes.
pub(crate) fn fork_into(child: impl FnOnce() -> u8) -> io::Result<Pid> {
    // SAFETY: this program never starts a thread, so the child may allocate and lock as its parent could.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => exit_now(child()),
    }
}

/// Makes a process that was just forked the first of a process group of its own (setpgid(2)): what its parent's group is sent, it is
/// not, and the other way round. In the same session, so that each is still seen to be the other's, and costs the scheduler no more.
///
/// It fails for no new process, but where something forbids the call; what happens then is what has always happened.
pub(crate) fn leave_process_group() {
    let own = Pid::from_raw(0);
    let _ = nix::unistd::setpgid(own, own);
}

/// Takes ownership of a descriptor that the superserver handed over by number.
///
/// # Errors
/// `EBADF` if no such descriptor is open.
pub(crate) fn own_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only reads the descriptor table.
    checked(unsafe { libc::fcntl(number, libc::F_GETFD) })?;
    // SAFETY: the descriptor is open, and each caller names a number that nothing else in the program owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Takes ownership of a descriptor that came over a socket (`SCM_RIGHTS`, unix(7)).
pub(crate) fn own_received(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made the number for whoever received the message, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// Takes a client that has arrived.
///
/// # Errors
/// As accept4(2): `EAGAIN` where there is none, and the socket does not block.
pub(crate) fn accept(socket: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    accept4(socket.as_raw_fd(), SockFlag::SOCK_CLOEXEC).map(own_received)
}

/// Waits for events, or so long, by the one system call that all libraries and architectures have for it: epoll_pwait(2).
///
/// # Errors
/// As epoll_pwait(2).
pub(crate) fn wait_for_events(
    epoll: &Epoll,
    events: &mut [EpollEvent],
    limit: Option<Duration>,
) -> io::Result<usize> {
    const FOR_EVER: libc::c_int = -1;
    let limit = limit.map_or(FOR_EVER, |limit| {
        libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX)
    });
    let most = libc::c_int::try_from(events.len()).unwrap_or(libc::c_int::MAX);
    // SAFETY: nix's event is the kernel's, `most` of them are borrowed for writing, and there is no signal mask.
    let count = checked(unsafe {
        libc::epoll_pwait(
            epoll.0.as_raw_fd(),
            events.as_mut_ptr().cast(),
            most,
            limit,
            std::ptr::null(),
        )
    })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Discards what the peer has sent, without this process ever holding the bytes: TCP drops them in the kernel
/// (`MSG_TRUNC`, tcp(7)). Returns how many were dropped; 0 at end of file.
///
/// # Errors
/// As recv(2), `EAGAIN` included: it never blocks.
pub(crate) fn discard_input(socket: BorrowedFd<'_>, most: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with MSG_TRUNC on a TCP socket the kernel writes nothing to the (null) buffer.
    let count = unsafe { libc::recv(socket.as_raw_fd(), std::ptr::null_mut(), most, flags) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Sets `TCP_QUICKACK` (tcp(7)), which nix lacks; a socket that is no TCP one stays as it is.
pub(crate) fn acknowledge_now(socket: BorrowedFd<'_>) {
    let on: libc::c_int = 1;
    const SIZE: libc::socklen_t = 4;
    // SAFETY: the kernel reads one integer, which lives through the call.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_QUICKACK,
            (&raw const on).cast(),
            SIZE,
        );
    }
}

/// Undoes a connect(2) that failed or was given up (`AF_UNSPEC`, connect(2)): nothing of it stays with the socket.
///
/// # Errors
/// As connect(2).
pub(crate) fn dissolve(socket: BorrowedFd<'_>) -> io::Result<()> {
    /// `AF_UNSPEC`, which is zero.
    const UNSPECIFIED: libc::sa_family_t = 0;
    let nobody = libc::sockaddr {
        sa_family: UNSPECIFIED,
        sa_data: [0; 14],
    };
    const SIZE: libc::socklen_t = 16;
    // SAFETY: the kernel reads one address of that size, which lives through the call.
    checked(unsafe { libc::connect(socket.as_raw_fd(), &raw const nobody, SIZE) }).map(drop)
}

/// The socket whose other end [`end_with_peer`] is about; one for each process.
static PEER: AtomicI32 = AtomicI32::new(-1);

/// From now on this process ends when the other end of the socketpair is closed, or says more; fcntl(2).
///
/// SIGIO tells of that, but not of that alone: it comes late for what was read before, when the sender was interrupted between
/// handing it over and telling of it. So a handler looks what there is. A call that it interrupts begins again, or fails with `EINTR`
/// where it has a time limit of its own (signal(7)).
///
/// # Errors
/// As fcntl(2) and sigaction(2); `EPIPE` if it is closed already.
pub(crate) fn end_with_peer(socket: BorrowedFd<'_>) -> io::Result<()> {
    let number = socket.as_raw_fd();
    PEER.store(number, Ordering::Relaxed);
    let handler = SigHandler::Handler(look_at_peer);
    let action = SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty());
    // SAFETY: the handler does only what a handler may (signal-safety(7)). The rest takes integers, and changes nothing but whom the
    // kernel tells of the socket's events.
    unsafe {
        nix::sys::signal::sigaction(Signal::SIGIO, &action)?;
        checked(libc::fcntl(number, libc::F_SETOWN, libc::getpid()))?;
        let flags = checked(libc::fcntl(number, libc::F_GETFL))?;
        checked(libc::fcntl(number, libc::F_SETFL, flags | libc::O_ASYNC))?;
    }
    // It may have happened just before.
    if crate::channel::is_ready(socket, nix::poll::PollFlags::POLLIN)? {
        return Err(io::Error::from_raw_os_error(libc::EPIPE));
    }
    Ok(())
}

extern "C" fn look_at_peer(_: libc::c_int) {
    let interrupted = nix::errno::Errno::last_raw();
    let mut peer = libc::pollfd {
        fd: PEER.load(Ordering::Relaxed),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: poll writes to the one structure that it is given.
    if unsafe { libc::poll(&raw mut peer, 1, 0) } > 0 {
        exit_now(0);
    }
    nix::errno::Errno::set_raw(interrupted);
}

/// Closes every descriptor from 3 up that is not in `kept`.
///
/// # Errors
/// As close_range(2), other than its being unknown to kernels before 5.9, where each number is closed by itself.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<libc::c_uint> = kept
        .iter()
        .filter_map(|fd| fd.as_raw_fd().try_into().ok())
        .collect();
    numbers.sort_unstable();
    let mut next: libc::c_uint = 3;
    for number in numbers {
        if number > next {
            close_range(next, number - 1)?;
        }
        next = next.max(number.saturating_add(1));
    }
    close_range(next, libc::c_uint::MAX)
}

fn close_range(first: libc::c_uint, last: libc::c_uint) -> io::Result<()> {
    // SAFETY: the caller gives up every descriptor in the range; owners of such descriptors live on only in the parent.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::ENOSYS) {
        return Err(error);
    }
    let (soft, _) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    let end = libc::c_uint::try_from(soft).unwrap_or(65_536).min(last);
    for number in first..=end {
        let Ok(number) = RawFd::try_from(number) else {
            break;
        };
        // SAFETY: as above; closing a number that is not open does nothing.
        unsafe { libc::close(number) };
    }
    Ok(())
}

/// Gives up every capability in the permitted, effective and inheritable sets of this process; capabilities(7).
///
/// # Errors
/// As capset(2).
pub(crate) fn drop_all_capabilities() -> io::Result<()> {
    set_capabilities(0)
}

/// The same, except for the right to read files whoever they belong to. A process that never had it keeps nothing.
///
/// # Errors
/// As capset(2).
pub(crate) fn keep_file_reading_capability() -> io::Result<()> {
    const CAP_DAC_READ_SEARCH: u32 = 2;
    set_capabilities(1 << CAP_DAC_READ_SEARCH).or_else(|_| drop_all_capabilities())
}

/// Only the first 32 capabilities can be kept.
fn set_capabilities(kept: u32) -> io::Result<()> {
    /// `struct __user_cap_header_struct` of linux/capability.h.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: libc::c_int,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header {
        version: VERSION_3,
        pid: 0,
    };
    // Two `struct __user_cap_data_struct` of three words each: effective, permitted, inheritable.
    let sets = [kept, kept, 0, 0, 0, 0];
    // SAFETY: capset reads one header and, for version 3, two data structures; both live through the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, sets.as_ptr()) };
    checked_long(result)
}

/// Empties the bounding set, as far as this process may: without `CAP_SETPCAP` it stays as the superserver left it, which
/// no_new_privs makes worthless too.
pub(crate) fn empty_capability_bounding_set() {
    for capability in 0..libc::c_ulong::from(u64::BITS) {
        // SAFETY: prctl takes integers here. An unknown capability, beyond the kernel's last, is the end of the list.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } == -1 {
            return;
        }
    }
}

/// The ABI of this kernel's Landlock (landlock_create_ruleset(2)). The crate asks the same, and does not tell before it acts.
///
/// # Errors
/// `ENOSYS` or `EOPNOTSUPP` where there is none; whatever a container's filter says.
pub(crate) fn landlock_abi() -> io::Result<u32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION` of linux/landlock.h.
    const VERSION: libc::c_uint = 1;
    let nothing: *const u64 = std::ptr::null();
    const NO_SIZE: libc::size_t = 0;
    // SAFETY: with this flag the kernel reads nothing.
    let abi =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, nothing, NO_SIZE, VERSION) };
    checked_long(abi)?;
    u32::try_from(abi).map_err(|_| nix::errno::Errno::ENOSYS.into())
}

/// Whether [`deny_write_execute`] is there: the kernel has it since 6.3.
///
/// # Errors
/// `EINVAL` where it is not.
pub(crate) fn has_mdwe() -> io::Result<()> {
    // SAFETY: prctl takes integers here.
    checked(unsafe { libc::prctl(libc::PR_GET_MDWE, NONE, NONE, NONE, NONE) }).map(drop)
}

/// From now on memory that is writable cannot be made executable, nor mapped as both, in this process and in those that it
/// forks (`PR_SET_MDWE`, prctl(2)).
///
/// # Errors
/// `EINVAL` where the kernel lacks it.
pub(crate) fn deny_write_execute() -> io::Result<()> {
    let refuse = libc::c_ulong::from(libc::PR_MDWE_REFUSE_EXEC_GAIN);
    // SAFETY: as above.
    checked(unsafe { libc::prctl(libc::PR_SET_MDWE, refuse, NONE, NONE, NONE) }).map(drop)
}

/// An argument of prctl(2) that has to be zero.
const NONE: libc::c_ulong = 0;

/// Sets every signal to its default and unblocks them all: what a program expects to start with (signal(7)).
pub(crate) fn reset_signals() -> io::Result<()> {
    // As the kernel counts: libc hides the first real-time signals, and a superserver may have ignored those too.
    const SIGNALS: libc::c_int = 64;
    const SET_SIZE: usize = SIGNALS as usize / 8;
    // `struct sigaction` of the kernel: handler, flags, restorer, mask, on every architecture no longer than this; all zero is
    // SIG_DFL without flags. An empty signal set is all zero as well.
    let zero = [0_u64; 8];
    let nothing: *const u64 = std::ptr::null();
    for number in (1..=SIGNALS).filter(|number| ![libc::SIGKILL, libc::SIGSTOP].contains(number)) {
        // SAFETY: the kernel reads one action, which installs no function, and writes none back.
        let result = unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                number,
                zero.as_ptr(),
                nothing,
                SET_SIZE,
            )
        };
        checked_long(result)?;
    }
    // SAFETY: the kernel reads one signal set and writes none back.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            zero.as_ptr(),
            nothing,
            SET_SIZE,
        )
    };
    checked_long(result)
}

/// Sets a variable of this process's environment.
pub(crate) fn set_variable(name: &str, value: &OsStr) {
    // SAFETY: this program has one thread, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var(name, value) }
}

/// Takes a variable out of this process's environment.
pub(crate) fn unset_variable(name: &str) {
    // SAFETY: as above.
    unsafe { std::env::remove_var(name) }
}

/// Sets one signal to its default, whatever the superserver had chosen.
pub(crate) fn default_signal(signal: Signal) -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: SIG_DFL installs no function of ours.
    unsafe { nix::sys::signal::sigaction(signal, &action) }?;
    Ok(())
}

/// A copy of `fd` numbered 3 or higher, closed on exec.
pub(crate) fn duplicate(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: F_DUPFD_CLOEXEC makes a new descriptor, which nothing else owns.
    let number = checked(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Replaces this process by a program whose descriptors 0 and 1 are `socket`, whose 2 is ours, and that has no others.
/// `kept` stays open until the program has started. Returns only the reason why not.
///
/// # Errors
/// As dup2(2), close_range(2) and execve(2).
pub(crate) fn become_program(
    socket: BorrowedFd<'_>,
    kept: Option<BorrowedFd<'_>>,
    path: &CStr,
    arguments: &[CString],
    environment: &[CString],
) -> io::Result<Infallible> {
    uninterrupted(|| nix::unistd::dup2_stdin(socket))?;
    uninterrupted(|| nix::unistd::dup2_stdout(socket))?;
    close_all_but(kept.as_slice())?;
    Ok(nix::unistd::execve(path, arguments, environment)?)
}

/// Whether a directory, open and not read from yet, has no entry. Without opendir(3), which takes a mapping for its buffer.
///
/// # Errors
/// As getdents64(2).
pub(crate) fn is_empty_directory(directory: BorrowedFd<'_>) -> io::Result<bool> {
    /// Where `struct linux_dirent64` has the name, after two numbers of 64 bits, the entry's length in 16 and its type in 8.
    const LENGTH_AT: usize = 16;
    const NAME_AT: usize = 19;
    let mut buffer = [0_u64; 64];
    loop {
        // SAFETY: the kernel writes at most as much as the buffer holds, which lives through the call.
        let result = unsafe {
            libc::syscall(
                libc::SYS_getdents64,
                directory.as_raw_fd(),
                buffer.as_mut_ptr(),
                size_of_val(&buffer),
            )
        };
        checked_long(result)?;
        if result == 0 {
            return Ok(true);
        }
        let octets: Vec<u8> = buffer.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut entries = octets
            .get(..usize::try_from(result).unwrap_or(0))
            .unwrap_or_default();
        while let Some([low, high]) = entries.get(LENGTH_AT..LENGTH_AT + 2) {
            let name = entries.get(NAME_AT..).unwrap_or_default();
            if !name.starts_with(b".\0") && !name.starts_with(b"..\0") {
                return Ok(false);
            }
            let length = usize::from(u16::from_ne_bytes([*low, *high]));
            entries = entries.get(length.max(1)..).unwrap_or_default();
        }
    }
}

/// Whether the two descriptors are the same file: the same socket, pipe or device, however it was reached.
pub(crate) fn is_same_file(one: impl AsFd, other: impl AsFd) -> bool {
    match (nix::sys::stat::fstat(one), nix::sys::stat::fstat(other)) {
        (Ok(one), Ok(other)) => one.st_dev == other.st_dev && one.st_ino == other.st_ino,
        _ => false,
    }
}

/// The same for a descriptor that was handed over by number and that nobody owns yet; false if it is not open.
pub(crate) fn is_same_file_as_number(number: RawFd, other: impl AsFd) -> bool {
    // SAFETY: F_GETFD only reads the descriptor table.
    if checked(unsafe { libc::fcntl(number, libc::F_GETFD) }).is_err() {
        return false;
    }
    // SAFETY: the descriptor is open, and there is no other thread that could close it during the call.
    is_same_file(unsafe { BorrowedFd::borrow_raw(number) }, other)
}
