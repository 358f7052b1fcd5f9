//! Another kernel: what is started under it finds an older Landlock or none, no PR_SET_MDWE, or a seccomp(2) that does nothing.
//!
//! A thread puts a seccomp filter of its own on itself and starts the program, which inherits it. Some calls get an error from it;
//! landlock_create_ruleset(2), which older kernels answer with another number, is answered by a supervisor, as that kernel would.
#![allow(unsafe_code)]

use super::libc;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// What a kernel has, or what a container leaves of it. Needs root.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    landlock: Result<u64, i32>,
    has_mdwe: bool,
    has_filters: bool,
    has_statx: bool,
}

impl Kernel {
    /// This machine's.
    pub const OURS: Self = Self {
        landlock: Ok(u64::MAX),
        has_mdwe: true,
        has_filters: true,
        has_statx: true,
    };

    /// Its Landlock is of this ABI.
    pub const fn landlock(self, abi: u64) -> Self {
        Self {
            landlock: Ok(abi),
            ..self
        }
    }

    /// It has no Landlock: this is what the system calls return.
    pub const fn without_landlock(self, errno: i32) -> Self {
        Self {
            landlock: Err(errno),
            ..self
        }
    }

    pub const fn without_mdwe(self) -> Self {
        Self {
            has_mdwe: false,
            ..self
        }
    }

    /// It is older than Linux 4.11, or the container's manager is.
    pub const fn without_statx(self) -> Self {
        Self {
            has_statx: false,
            ..self
        }
    }

    /// System call filters are taken and thrown away, so that it shows what else there is.
    pub const fn without_filters(self) -> Self {
        Self {
            has_filters: false,
            ..self
        }
    }

    /// Runs `start` on this kernel: whatever it starts, and the descendants of that, never see another.
    pub fn run<T: Send>(self, start: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                self.enter();
                start()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Puts the calling thread on it for good.
    pub fn enter(self) {
        let program = self.filter();
        let description = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_ptr().cast_mut(),
        };
        // SAFETY: the description and the program that it points to live through the call, which copies them.
        let listener = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const description,
            )
        };
        assert!(listener >= 0, "seccomp: {}", io::Error::last_os_error());
        // SAFETY: the call has just made it, close-on-exec, and nobody else has it.
        let listener = unsafe { OwnedFd::from_raw_fd(listener as i32) };
        let abi = self.landlock.unwrap_or(0);
        // It ends with the last process that is under the filter.
        std::thread::spawn(move || supervise(&listener, abi));
    }

    fn filter(self) -> Vec<libc::sock_filter> {
        let mut program = vec![load(ARCHITECTURE)];
        // Another architecture's numbers mean other calls.
        program.extend(if_equal(NATIVE, &[load(NUMBER)]));
        let otherwise = program.len();
        let landlock = match self.landlock {
            Ok(abi) if abi > NEWEST => None,
            Ok(_) => Some(libc::SECCOMP_RET_USER_NOTIF),
            Err(errno) => Some(error(errno)),
        };
        if let Some(answer) = landlock {
            program.extend(if_equal(
                libc::SYS_landlock_create_ruleset as u32,
                &[give(answer)],
            ));
        }
        if let Err(errno) = self.landlock {
            program.extend(if_equal(
                libc::SYS_landlock_restrict_self as u32,
                &[give(error(errno))],
            ));
        }
        if !self.has_statx {
            program.extend(if_equal(
                libc::SYS_statx as u32,
                &[give(error(libc::ENOSYS))],
            ));
        }
        let by_argument = |call: libc::c_long, argument: u32, answer| {
            let rest = if_equal(argument, &[give(answer)]);
            let mut then = vec![load(FIRST_ARGUMENT)];
            then.extend(rest);
            // The number is looked at again afterwards.
            then.push(load(NUMBER));
            if_equal(call as u32, &then)
        };
        if !self.has_mdwe {
            for option in [libc::PR_SET_MDWE, libc::PR_GET_MDWE] {
                let answer = error(libc::EINVAL);
                program.extend(by_argument(libc::SYS_prctl, option as u32, answer));
            }
        }
        if !self.has_filters {
            let mode = libc::SECCOMP_SET_MODE_FILTER;
            program.extend(by_argument(libc::SYS_seccomp, mode, error(0)));
        }
        program.push(give(libc::SECCOMP_RET_ALLOW));
        // What `if_equal` of the architecture skips is one instruction: make it skip all the rest.
        program[1].jf = (program.len() - otherwise) as u8;
        program
    }
}

/// Whether this machine's kernel has all that can be taken away.
pub fn is_new() -> bool {
    // SAFETY: neither call reads or writes memory of ours.
    let (abi, mdwe) = unsafe {
        (
            libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1),
            libc::prctl(libc::PR_GET_MDWE, 0, 0, 0, 0),
        )
    };
    abi >= 6 && mdwe >= 0
}

/// The newest ABI that the supervisor need not play.
const NEWEST: u64 = 7;

/// `struct seccomp_data`: the call's number, the architecture, the instruction, six arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
/// Its lower half.
const FIRST_ARGUMENT: u32 = if cfg!(target_endian = "little") {
    16
} else {
    20
};
/// `AUDIT_ARCH_` of linux/audit.h.
const NATIVE: u32 = if cfg!(target_arch = "aarch64") {
    0xc000_00b7
} else {
    0xc000_003e
};

const fn instruction(code: u32, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    }
}

const fn load(offset: u32) -> libc::sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, offset)
}

const fn give(answer: u32) -> libc::sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, 0, answer)
}

const fn error(errno: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | errno as u32
}

/// `then`, if what was loaded is `value`.
fn if_equal(value: u32, then: &[libc::sock_filter]) -> Vec<libc::sock_filter> {
    let test = instruction(
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        then.len() as u8,
        value,
    );
    [&[test], then].concat()
}

/// `_IOWR('!', 0, struct seccomp_notif)` and `_IOWR('!', 1, struct seccomp_notif_resp)`.
const RECEIVE: libc::c_ulong = 0xc050_2100;
const SEND: libc::c_ulong = 0xc018_2101;

/// Answers landlock_create_ruleset(2) as a kernel of this ABI would.
fn supervise(listener: &OwnedFd, abi: u64) {
    let number = listener.as_raw_fd();
    loop {
        let mut polled = libc::pollfd {
            fd: number,
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one structure, which the kernel writes to.
        let result = unsafe { libc::poll(&raw mut polled, 1, -1) };
        if result < 0 {
            continue;
        }
        if polled.revents & libc::POLLIN == 0 {
            return;
        }
        // SAFETY: all zeroes are a valid value of these structures of integers; the first must be zero when the kernel gets it.
        let (mut call, mut answer): (libc::seccomp_notif, libc::seccomp_notif_resp) =
            unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one structure of that kind.
        if unsafe { libc::ioctl(number, RECEIVE as _, &raw mut call) } < 0 {
            // Whoever asked is gone.
            continue;
        }
        answer.id = call.id;
        match play_create_ruleset(call.pid, &call.data.args, abi) {
            Ok(Some(value)) => answer.val = value,
            Ok(None) => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
            Err(errno) => answer.error = -errno,
        }
        // SAFETY: the kernel reads one structure of that kind. An error is that whoever asked is gone.
        unsafe { libc::ioctl(number, SEND as _, &raw mut answer) };
    }
}

/// What the call returns; nothing, if the real kernel's own answer is right.
fn play_create_ruleset(pid: u32, arguments: &[u64; 6], abi: u64) -> Result<Option<i64>, i32> {
    const VERSION: u64 = 1;
    let [place, size, flags, ..] = *arguments;
    match (flags, place, size) {
        (VERSION, 0, 0) => return Ok(Some(abi as i64)),
        (0, ..) => {}
        _ => return Err(libc::EINVAL),
    }
    let mut attribute = vec![0; usize::try_from(size.min(4096)).unwrap()];
    File::open(format!("/proc/{pid}/mem"))
        .and_then(|memory| memory.read_exact_at(&mut attribute, place))
        .map_err(|_| libc::EFAULT)?;
    let known = match abi {
        0..4 => 1,
        4 | 5 => 2,
        _ => 3,
    };
    let words: Vec<u64> = attribute
        .chunks_exact(8)
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect();
    if words.iter().skip(known).any(|word| *word != 0) {
        return Err(libc::E2BIG);
    }
    let files = match abi {
        1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    // Files, network, scopes: how many bits this ABI knows of each.
    let bits = [files, 2, 2];
    if words.iter().zip(bits).any(|(word, bits)| word >> bits != 0) {
        return Err(libc::EINVAL);
    }
    Ok(None)
}
