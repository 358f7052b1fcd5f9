//! Makes a live process of ours attempt a system call, as an attacker who controls its instructions could: the proof
//! that its sandbox refuses. x86-64 only.
#![allow(unsafe_code)]

use super::Process;
use nix::libc;
use std::io;
use std::os::unix::fs::FileExt;

/// An argument of the injected call.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    Number(u64),
    /// A pointer to these bytes, which are put on the stack (and the stack restored).
    Bytes(&'a [u8]),
    /// The same, with pointers among them: each pair is where one is, and to which of the bytes it points.
    Linked(&'a [u8], &'a [(usize, usize)]),
}

/// How the process enters the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Gate {
    /// x86-64's own; x32 calls come by it as well.
    Syscall,
    /// i386's `int 0x80`: other numbers, and arguments of 32 bits.
    Interrupt80,
}

impl Gate {
    /// The instruction, which is as long in both cases.
    fn instruction(self) -> [u8; 2] {
        match self {
            Gate::Syscall => [0x0f, 0x05],
            Gate::Interrupt80 => [0xcd, 0x80],
        }
    }
}

/// What the call did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It returned this: negative numbers are -errno.
    Returned(i64),
    /// The process was killed by this signal for it.
    Killed(i32),
}

impl Outcome {
    /// Refused for what it is: the process was ended by SIGSYS, or the answer is one of permission. Any other error would only
    /// mean that the arguments were wrong.
    pub fn is_refused(self) -> bool {
        match self {
            Outcome::Killed(signal) => signal == libc::SIGSYS,
            Outcome::Returned(value) => [libc::EACCES, libc::ENOSYS, libc::EPERM]
                .iter()
                .any(|errno| value == -i64::from(*errno)),
        }
    }
}

/// Stops `process`, which must be blocked in a system call (see `Session::wait_idle`), makes it attempt system call `number`, gives the
/// result, and lets it go on as if nothing had been.
pub fn inject(process: Process, number: i64, arguments: &[Arg]) -> Outcome {
    inject_by(Gate::Syscall, process, number, arguments)
}

/// [`inject`] by another gate.
#[cfg(target_arch = "x86_64")]
pub fn inject_by(gate: Gate, process: Process, number: i64, arguments: &[Arg]) -> Outcome {
    let pid = process.0;
    request(libc::PTRACE_ATTACH, pid, 0, 0)
        .unwrap_or_else(|error| panic!("attach to {pid}: {error}"));
    assert!(
        matches!(wait(process), Event::Stopped),
        "{pid} ended while being attached"
    );
    let mut saved = registers(pid);
    let mut work = saved;
    // Blocked in a system call: the instruction before rip is `syscall`.
    let memory = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .unwrap();
    let mut instruction = [0; 2];
    memory
        .read_exact_at(&mut instruction, saved.rip - 2)
        .unwrap();
    assert_eq!(
        instruction,
        Gate::Syscall.instruction(),
        "{pid} is not blocked in a system call"
    );
    // The text is a copy of the process's own from now on.
    if gate != Gate::Syscall {
        memory
            .write_all_at(&gate.instruction(), saved.rip - 2)
            .unwrap();
    }
    work.rip = saved.rip - 2;
    work.rax = number as u64;
    // Not in a system call any more, for the kernel: nothing to restart.
    work.orig_rax = u64::MAX;
    // Below the red zone of the interrupted function.
    let mut place = (saved.rsp - 65_536) & !15;
    let slots = match gate {
        Gate::Syscall => [
            &raw mut work.rdi,
            &raw mut work.rsi,
            &raw mut work.rdx,
            &raw mut work.r10,
            &raw mut work.r8,
            &raw mut work.r9,
        ],
        Gate::Interrupt80 => [
            &raw mut work.rbx,
            &raw mut work.rcx,
            &raw mut work.rdx,
            &raw mut work.rsi,
            &raw mut work.rdi,
            &raw mut work.rbp,
        ],
    };
    let mut overwritten = Vec::new();
    for (slot, argument) in slots.iter().zip(arguments) {
        let (bytes, links): (&[u8], &[_]) = match argument {
            Arg::Number(value) => {
                // SAFETY: the slots point into `work`, which lives on this stack and is not otherwise borrowed here.
                unsafe { slot.write(*value) };
                continue;
            }
            Arg::Bytes(bytes) => (bytes, &[]),
            Arg::Linked(bytes, links) => (bytes, links),
        };
        place -= (bytes.len() as u64 + 15) & !15;
        let mut old = vec![0; bytes.len()];
        // Stack that was never touched cannot be read or written from outside; then a little higher will do.
        if memory.read_exact_at(&mut old, place).is_err() {
            place = (saved.rsp - 1024 - bytes.len() as u64) & !15;
            memory.read_exact_at(&mut old, place).unwrap();
        }
        memory.write_all_at(bytes, place).unwrap();
        for (from, to) in links {
            let pointer = (place + *to as u64).to_ne_bytes();
            memory.write_all_at(&pointer, place + *from as u64).unwrap();
        }
        overwritten.push((place, old));
        // SAFETY: the slots point into `work`, which lives on this stack and is not otherwise borrowed here.
        unsafe { slot.write(place) };
    }
    set_registers(pid, &work);
    request(libc::PTRACE_SINGLESTEP, pid, 0, 0).unwrap();
    match wait(process) {
        Event::Ended(signal) => return Outcome::Killed(signal),
        Event::Stopped => {}
    }
    let result = registers(pid).rax as i64;
    if gate != Gate::Syscall {
        memory.write_all_at(&instruction, saved.rip - 2).unwrap();
    }
    for (place, old) in overwritten {
        let _ = memory.write_all_at(&old, place);
    }
    // With orig_rax and rax as they were the kernel restarts the interrupted call.
    saved.eflags &= !0x100;
    set_registers(pid, &saved);
    request(libc::PTRACE_DETACH, pid, 0, 0).unwrap();
    Outcome::Returned(result)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn inject_by(_: Gate, _: Process, _: i64, _: &[Arg]) -> Outcome {
    unreachable!("tests that need this are ignored elsewhere (Need::X86_64)")
}

enum Event {
    Stopped,
    Ended(i32),
}

/// The next stop or the end. The end of a child of ours is only looked at: its `Child` wants to reap it.
fn wait(process: Process) -> Event {
    let id = libc::id_t::try_from(process.0).unwrap();
    // SAFETY: `info` is a plain structure that waitid fills.
    let (code, status) = unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let result = libc::waitid(
            libc::P_PID,
            id,
            &raw mut info,
            libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL,
        );
        assert_eq!(result, 0, "waitid: {}", io::Error::last_os_error());
        (info.si_code, info.si_status())
    };
    let ours = process.parent() == Some(Process(i32::try_from(std::process::id()).unwrap()));
    let ended = matches!(code, libc::CLD_EXITED | libc::CLD_KILLED | libc::CLD_DUMPED);
    if !(ended && ours) {
        // SAFETY: a null status pointer is allowed.
        unsafe { libc::waitpid(process.0, std::ptr::null_mut(), libc::__WALL) };
    }
    if ended {
        Event::Ended(status)
    } else {
        Event::Stopped
    }
}

fn request(request: libc::c_uint, pid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: these requests take integers, or (PTRACE_GETREGS, PTRACE_SETREGS) a pointer that the callers below keep valid.
    if unsafe { libc::ptrace(request, pid, address, data) } == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(target_arch = "x86_64")]
fn registers(pid: i32) -> libc::user_regs_struct {
    // SAFETY: all zeroes are a valid value of this structure of integers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    request(
        libc::PTRACE_GETREGS,
        pid,
        0,
        (&raw mut registers).expose_provenance(),
    )
    .unwrap();
    registers
}

#[cfg(target_arch = "x86_64")]
fn set_registers(pid: i32, registers: &libc::user_regs_struct) {
    request(
        libc::PTRACE_SETREGS,
        pid,
        0,
        std::ptr::from_ref(registers).expose_provenance(),
    )
    .unwrap();
}
