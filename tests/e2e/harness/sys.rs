//! The few system calls of the tests that neither std nor nix has, and the only `unsafe` of the harness besides ptrace.rs.
#![allow(unsafe_code)]

use nix::libc;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What a child does with a descriptor number between fork and exec.
#[derive(Clone, Copy, Debug)]
pub enum Descriptor {
    /// Closed, as a superserver may leave it.
    Closed(RawFd),
    /// A copy of the first at the number of the second.
    CopiedTo(RawFd, RawFd),
}

/// Makes `command` the leader of a session of its own (so that the leak check finds all of its descendants) and
/// arranges its descriptors, in the order given, after std has set up 0 to 2.
pub fn prepare(command: &mut Command, descriptors: Vec<Descriptor>) {
    let arrange = move || {
        // SAFETY: setsid, close and dup2 are async-signal-safe and touch no memory of ours.
        unsafe {
            libc::setsid();
            for descriptor in &descriptors {
                let result = match *descriptor {
                    Descriptor::Closed(number) => libc::close(number),
                    Descriptor::CopiedTo(from, to) => libc::dup2(from, to),
                };
                if result < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            // Other tests in this process may have blocked or ignored nothing, but the runtime ignores SIGPIPE: a superserver does not.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        }
        Ok(())
    };
    // SAFETY: the closure only makes async-signal-safe calls and allocates nothing.
    unsafe { command.pre_exec(arrange) };
}

/// Adds to `command`, before exec: ignore this signal, as a careless superserver does.
pub fn ignore_signal(command: &mut Command, signal: i32) {
    let ignore = move || {
        // SAFETY: signal with SIG_IGN is async-signal-safe.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
        Ok(())
    };
    // SAFETY: as in `prepare`.
    unsafe { command.pre_exec(ignore) };
}

/// Adds to `command`, before exec: block this signal.
pub fn block_signal(command: &mut Command, signal: i32) {
    let block = move || {
        // SAFETY: a zeroed set is valid input of sigemptyset; the calls are async-signal-safe and the set lives on this stack.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, signal);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        }
        Ok(())
    };
    // SAFETY: as in `prepare`.
    unsafe { command.pre_exec(block) };
}

/// Adds to `command`, before exec: the thread that starts it traces it.
pub fn be_traced(command: &mut Command) {
    let ask = || {
        // SAFETY: an integer and no pointers that are read.
        if unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: as in `prepare`.
    unsafe { command.pre_exec(ask) };
}

/// Takes the numbers 3 to 9 for good, so that no descriptor of ours (std's error pipe to a child, above all) is ever at
/// a number that a child of ours gives a meaning (LISTEN_FDS starts at 3).
pub fn reserve_low_descriptors() {
    // SAFETY: open with a constant path; the descriptors are leaked on purpose.
    unsafe {
        loop {
            let number = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
            if !(0..9).contains(&number) {
                break;
            }
        }
    }
}

/// Orphans of this process's descendants become its children, instead of init's, so that none gets lost.
pub fn become_subreaper() {
    nix::sys::prctl::set_child_subreaper(true).expect("PR_SET_CHILD_SUBREAPER");
}

/// Reaps `pid` if it is a zombie child of ours.
pub fn reap(pid: i32) {
    // SAFETY: a null status pointer is allowed.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WNOHANG) };
}

/// Sends a signal to one process.
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: kill takes two integers. Only ids of processes that the tests started come here.
    if unsafe { libc::kill(pid, signal) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A handle of a process, which is never another's, however numbers are used again; pidfd_open(2).
pub fn open_process(pid: i32) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::{FromRawFd, OwnedFd};
    // SAFETY: the call takes two integers and makes a descriptor that nothing else owns.
    unsafe {
        match RawFd::try_from(libc::syscall(libc::SYS_pidfd_open, pid, 0)) {
            Ok(number) if number >= 0 => Ok(OwnedFd::from_raw_fd(number)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Sends a signal to the process of a handle; pidfd_send_signal(2).
pub fn signal_opened(process: BorrowedFd, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed, and the rest are integers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_raw_fd(),
            signal,
            none,
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets another process's soft limit.
pub fn set_limit(pid: i32, resource: libc::__rlimit_resource_t, soft: u64) {
    let limit = libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: 1024,
    };
    // SAFETY: the kernel reads one limit and writes none back.
    let result = unsafe { libc::prlimit64(pid, resource, &limit, std::ptr::null_mut()) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// On close, a TCP reset instead of an orderly end: SO_LINGER with no time.
pub fn reset_on_close(socket: BorrowedFd) {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: the pointer and length describe `linger`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as u32,
        )
    };
    assert_eq!(result, 0, "SO_LINGER: {}", io::Error::last_os_error());
}

/// Runs `act` in a child process with these ids and no groups and gives back its exit status (0 to 255).
/// `act` runs between fork and exit: system calls only.
pub fn as_user(uid: u32, act: fn(i32) -> i32, argument: i32) -> i32 {
    // SAFETY: the child only makes system calls and leaves by _exit.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork: {}", io::Error::last_os_error());
        if child == 0 {
            if libc::setgroups(0, std::ptr::null()) != 0
                || libc::setresgid(uid, uid, uid) != 0
                || libc::setresuid(uid, uid, uid) != 0
            {
                libc::_exit(255);
            }
            libc::_exit(act(argument));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::WEXITSTATUS(status)
    }
}

/// A copy of another process's descriptor; pidfd_getfd(2).
pub fn copy_descriptor(pid: i32, number: RawFd) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::{FromRawFd, OwnedFd};
    let owned = |result: libc::c_long| match RawFd::try_from(result) {
        // SAFETY: the calls below make a descriptor that nothing else owns.
        Ok(number) if number >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: both calls take integers.
    unsafe {
        let process = owned(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        owned(libc::syscall(
            libc::SYS_pidfd_getfd,
            process.as_raw_fd(),
            number,
            0,
        ))
    }
}

/// For [`as_user`]: 0 if `pid` could be traced, else errno.
pub fn try_ptrace(pid: i32) -> i32 {
    // SAFETY: PTRACE_SEIZE reads no memory; the child that calls this exits at once, which detaches.
    if unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) } == 0 {
        0
    } else {
        io::Error::last_os_error().raw_os_error().unwrap_or(254)
    }
}

/// For [`as_user`]: 0 if `pid`'s memory could be opened, else errno.
pub fn try_memory(pid: i32) -> i32 {
    match std::fs::File::open(format!("/proc/{pid}/mem")) {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(254),
    }
}

/// For [`as_user`]: 0 if the socket is listened on now, in that user's name (SO_PEERCRED), else errno.
pub fn try_listen(number: RawFd) -> i32 {
    // SAFETY: listen takes integers.
    if unsafe { libc::listen(number, 8) } == 0 {
        0
    } else {
        io::Error::last_os_error().raw_os_error().unwrap_or(254)
    }
}

/// Whether `needle` is in `hay`. memmem, because these tests search whole address spaces, also in builds without optimisation.
pub fn contains(hay: &[u8], needle: &[u8]) -> bool {
    // SAFETY: both pointers come with the lengths of the slices that they belong to.
    unsafe {
        !libc::memmem(
            hay.as_ptr().cast(),
            hay.len(),
            needle.as_ptr().cast(),
            needle.len(),
        )
        .is_null()
    }
}

/// Ends this process by a signal (the scripted backend's own death).
pub fn die_by(signal: i32) -> ! {
    // SAFETY: integers only; SIGKILL-like signals do not return, for others the exit below follows.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
        libc::_exit(99)
    }
}

/// Closes a descriptor by number (the scripted backend's 0 and 1, which std does not own).
pub fn close(number: RawFd) {
    // SAFETY: an integer; the caller does not use the number again.
    unsafe { libc::close(number) };
}

/// `shutdown(2)` on a descriptor by number; false for pipes.
pub fn shutdown_write(number: RawFd) -> bool {
    // SAFETY: integers only.
    unsafe { libc::shutdown(number, libc::SHUT_WR) == 0 }
}

/// A descriptor by number, borrowed for good: for 0, 1 and 2.
pub fn borrow(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: only standard descriptors, which stay open for the process's whole life unless the scenario is to close them.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// What the scripted backend was started with, taken before Rust's runtime changes anything (it ignores SIGPIPE and opens
/// missing standard descriptors).
pub struct AtStart {
    pub status: Vec<u8>,
    pub descriptors: String,
}

/// Set in a scripted backend only.
pub static AT_START: std::sync::OnceLock<AtStart> = std::sync::OnceLock::new();

extern "C" fn look_before_main() {
    let command = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    if command.split(|byte| *byte == 0).nth(1) != Some(super::backend::PLAY.as_bytes()) {
        return;
    }
    let mut descriptors = String::new();
    for entry in std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
    {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        // Not the descriptor that this very listing uses.
        if !target
            .to_string_lossy()
            .ends_with(&format!("/{}/fd", std::process::id()))
        {
            descriptors += &format!(
                "{} {}\n",
                entry.file_name().to_string_lossy(),
                target.display()
            );
        }
    }
    let _ = AT_START.set(AtStart {
        status: std::fs::read("/proc/self/status").unwrap_or_default(),
        descriptors,
    });
}

// SAFETY: the loader calls every entry once before main, with a signature that a function without arguments satisfies on all
// Linux ABIs; std's file functions need no initialised runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_BEFORE_MAIN: extern "C" fn() = look_before_main;

/// How much of what was written to a unix socket its peer has not read yet; unix(7), SIOCOUTQ.
pub fn unread_by_peer(socket: impl AsFd) -> i32 {
    let mut count = 0;
    // SAFETY: the ioctl writes one integer.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    assert_eq!(result, 0, "SIOCOUTQ");
    count
}

/// A terminal: what a person sees of it, and what programs have. It changes no octet of what is written.
pub fn open_terminal() -> (OwnedFd, OwnedFd) {
    use std::os::fd::FromRawFd;
    let (mut person, mut programs) = (-1, -1);
    // SAFETY: openpty writes two integers, and takes null for what is not wanted; the descriptors that it makes are nobody
    // else's. A zeroed termios is filled before it is used.
    unsafe {
        let result = libc::openpty(
            &raw mut person,
            &raw mut programs,
            std::ptr::null_mut(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        );
        assert_eq!(result, 0, "openpty: {}", io::Error::last_os_error());
        let mut settings: libc::termios = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(programs, &raw mut settings), 0);
        libc::cfmakeraw(&raw mut settings);
        assert_eq!(
            libc::tcsetattr(programs, libc::TCSANOW, &raw const settings),
            0
        );
        for descriptor in [person, programs] {
            libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC);
        }
        (OwnedFd::from_raw_fd(person), OwnedFd::from_raw_fd(programs))
    }
}

/// Stops and starts a terminal's output, as ^S and ^Q do; tcflow(3).
pub fn control_flow(terminal: &OwnedFd, action: i32) {
    // SAFETY: integers only.
    let result = unsafe { libc::tcflow(terminal.as_raw_fd(), action) };
    assert_eq!(result, 0, "tcflow: {}", io::Error::last_os_error());
}

/// Writes to a pipe or a terminal until not an octet more fits. The mode of the descriptor, which others may share, stays as it is.
pub fn fill(number: RawFd) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let again = std::fs::OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{number}"));
    let mut again = again.unwrap();
    for size in [4096, 1] {
        while again.write(&vec![b'x'; size]).is_ok() {}
    }
}
