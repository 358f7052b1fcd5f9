//! Follows the program and its processes with ptrace(2), without anything in them: lists their system calls by role, and makes
//! one of these fail, or kills a process at one, or sets their clock. Backends are let go when they begin. x86-64 only.
//!
//! A call is made to fail by putting another in its place, close(-1), and an error in the place of that one's: the call that
//! was asked for never happens. (No call at all, number -1, would be death: seccomp looks at what ptrace left.)
//!
//! The time of day is told in memory that the kernel shares with each process, without a call. So where the clock is to be another
//! one, a new program is not told where that memory is, and asks.
#![allow(unsafe_code)]

use super::Process;
use super::program::{Program, Session};
use super::sys;
use nix::libc;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Which part a process plays.
pub type Role = &'static str;

/// Who is forked by whom, in that order; the last stands for all further ones.
#[derive(Clone, Copy, Debug)]
pub struct Cast {
    pub first: Role,
    pub children: &'static [(Role, &'static [Role])],
}

/// Of a connection with one backend.
pub const ONE_LAUNCHER: Cast = Cast {
    first: "network",
    children: &[("network", &["launcher", "keeper"])],
};
/// With `--cert-dir`.
pub const NAMES: Cast = Cast {
    first: "network",
    children: &[("network", &["launcher", "opener", "keeper"])],
};
/// With `--connect`.
pub const CONNECTED: Cast = Cast {
    first: "network",
    children: &[("network", &["connector", "keeper"])],
};

impl Cast {
    fn child(self, parent: Role, number: usize) -> Role {
        let children = self.children.iter().find(|(role, _)| *role == parent);
        let children = children.map_or(&[][..], |(_, children)| children);
        children
            .get(number)
            .or(children.last())
            .copied()
            .unwrap_or("other")
    }
}

/// One system call of a run: the `nth` (from 0) of its kind in a role.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Point {
    pub role: Role,
    pub call: i64,
    pub nth: u32,
}

/// What happens there.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Fault {
    Fails(i32),
    /// This pipe, one of the test's descriptors, fills before the call is made.
    Fills(i32),
    Killed,
}

/// A system call that was seen.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    pub point: Point,
    pub arguments: [u64; 6],
    pub pid: i32,
    /// Whether the process had put its filter on.
    pub is_confined: bool,
}

/// What is wanted of a run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wanted {
    /// All calls are listed.
    List,
    /// The same, of a program that is not told where the kernel shares the time of day: it asks.
    ListWithoutClock,
    At(Point, Fault),
}

/// The time of day of a run's processes: so many seconds from the machine's, and it may jump at any moment.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicI64>);

impl Clock {
    /// So far ahead of the machine's.
    pub fn set(&self, seconds: i64) {
        self.0.store(seconds, Ordering::SeqCst);
    }

    /// It shows this time, in seconds since 1970.
    pub fn set_to(&self, time: i64) {
        self.set(time - Self::default().now());
    }

    /// The time that it shows, in seconds since 1970.
    pub fn now(&self) -> i64 {
        let machines = SystemTime::now().duration_since(UNIX_EPOCH);
        let machines = machines.expect("after 1970").as_secs();
        i64::try_from(machines).expect("before the end of time") + self.0.load(Ordering::SeqCst)
    }
}

/// How a process of ours ended.
#[derive(Clone, Copy, Debug)]
pub struct Ended {
    pub role: Role,
    pub status: ExitStatus,
}

/// What a run was.
pub struct Trace {
    /// Where they were to be listed.
    pub seen: Vec<Seen>,
    /// Whether the point was reached.
    pub is_hit: bool,
    pub ended: Vec<Ended>,
    /// Processes that became another program.
    pub backends: Vec<i32>,
    /// All that were ours.
    pub all: Vec<i32>,
    /// How often they were told the time of day by a [`Clock`].
    pub told_time: u32,
}

/// A run under way, followed by a thread of its own.
pub struct Tracing {
    /// Until somebody has waited for it.
    thread: Option<JoinHandle<(Session, Trace)>>,
    started: Receiver<(super::Client, Process)>,
    done: Receiver<()>,
    alive: Arc<Mutex<BTreeMap<i32, Role>>>,
}

/// Starts the program with a client's connection, traced.
pub fn start(program: &Program, cast: Cast, wanted: Wanted) -> (super::Client, Process, Tracing) {
    start_by(program, cast, wanted, Program::start)
}

/// The same by another clock; all calls are listed.
pub fn start_by_clock(
    program: &Program,
    cast: Cast,
    clock: &Clock,
) -> (super::Client, Process, Tracing) {
    let clock = Some(clock.clone());
    start_all(program, cast, Wanted::List, clock, Program::start)
}

/// The same; `begin` starts it.
pub fn start_by(
    program: &Program,
    cast: Cast,
    wanted: Wanted,
    begin: impl FnOnce(&Program) -> Session + Send + 'static,
) -> (super::Client, Process, Tracing) {
    start_all(program, cast, wanted, None, begin)
}

fn start_all(
    program: &Program,
    cast: Cast,
    wanted: Wanted,
    clock: Option<Clock>,
    begin: impl FnOnce(&Program) -> Session + Send + 'static,
) -> (super::Client, Process, Tracing) {
    let (tell_started, started) = channel();
    let (tell_done, done) = channel();
    let alive = Arc::new(Mutex::new(BTreeMap::new()));
    let (program, shared) = (program.clone().traced(), alive.clone());
    // Only the thread that a process was started by traces it.
    let thread = std::thread::spawn(move || {
        let mut session = begin(&program);
        let first = session.network();
        let mut follower = Follower {
            cast,
            wanted,
            clock,
            first: first.0,
            processes: BTreeMap::new(),
            early: BTreeSet::new(),
            alive: shared,
            counts: BTreeMap::new(),
            has_begun: false,
            trace: Trace {
                seen: Vec::new(),
                is_hit: false,
                ended: Vec::new(),
                backends: Vec::new(),
                all: Vec::new(),
                told_time: 0,
            },
        };
        follower.know(first.0, cast.first);
        follower.begin();
        tell_started
            .send((session.take_client(), first))
            .expect("somebody waits");
        let status = follower.follow();
        session.ended_with(status);
        let _ = tell_done.send(());
        (session, follower.trace)
    });
    let tracing = Tracing {
        thread: Some(thread),
        started,
        done,
        alive,
    };
    let (client, first) = tracing.started.recv().expect("the program starts");
    (client, first, tracing)
}

impl Tracing {
    /// The processes in this role that are there now.
    pub fn processes(&self, role: Role) -> Vec<Process> {
        let alive = self.alive.lock().unwrap();
        let those = alive.iter().filter(|(_, other)| **other == role);
        those.map(|(pid, _)| Process(*pid)).collect()
    }

    /// All that are there now.
    pub fn alive(&self) -> Vec<Process> {
        self.alive
            .lock()
            .unwrap()
            .keys()
            .copied()
            .map(Process)
            .collect()
    }

    /// Waits until the last of them has ended; with those that had to be killed because they did not.
    pub fn finish(mut self, patience: Duration) -> (Session, Trace, Vec<Role>) {
        let left = self.end(patience);
        let thread = self.thread.take().expect("nobody has waited yet");
        let (session, trace) = thread.join().unwrap_or_else(|panic| {
            std::panic::resume_unwind(panic);
        });
        (session, trace, left)
    }

    fn end(&self, patience: Duration) -> Vec<Role> {
        let mut left = Vec::new();
        if self.done.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            loop {
                let alive = self.alive.lock().unwrap().clone();
                if left.is_empty() {
                    left.extend(alive.values().copied());
                }
                // One that is traced is reaped by nobody else meanwhile, so the number is still its own.
                for pid in alive.keys() {
                    let _ = sys::kill(*pid, libc::SIGKILL);
                }
                if self.done.recv_timeout(Duration::from_millis(50))
                    != Err(RecvTimeoutError::Timeout)
                {
                    break;
                }
            }
        }
        left
    }
}

/// Of a test that fails: before somebody else reaps them, whom their tracer would miss.
impl Drop for Tracing {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.end(Duration::ZERO);
            let _ = thread.join();
        }
    }
}

/// A process that is traced.
#[derive(Clone, Copy, Debug)]
struct Traced {
    role: Role,
    children: usize,
    is_confined: bool,
    /// Its call is one that puts a filter on.
    is_confining: bool,
    /// What it is told when close(-1) in the place of its call has returned, and what its first argument was.
    answer: Option<(i64, u64)>,
    /// It asks for the time of day: where that will be.
    time: Option<u64>,
}

struct Follower {
    cast: Cast,
    wanted: Wanted,
    clock: Option<Clock>,
    first: i32,
    processes: BTreeMap<i32, Traced>,
    /// New ones that stopped before their parent's news of them came.
    early: BTreeSet<i32>,
    alive: Arc<Mutex<BTreeMap<i32, Role>>>,
    counts: BTreeMap<(Role, i64), u32>,
    /// Whether the program's own code runs: before that it is the loader's and the runtime's.
    has_begun: bool,
    trace: Trace,
}

const OPTIONS: i32 = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEEXEC
    | libc::PTRACE_O_EXITKILL;

impl Follower {
    fn know(&mut self, pid: i32, role: Role) {
        let traced = Traced {
            role,
            children: 0,
            is_confined: false,
            is_confining: false,
            answer: None,
            time: None,
        };
        self.processes.insert(pid, traced);
        self.alive.lock().unwrap().insert(pid, role);
        self.trace.all.push(pid);
    }

    fn forget(&mut self, pid: i32) -> Option<Traced> {
        self.alive.lock().unwrap().remove(&pid);
        self.processes.remove(&pid)
    }

    /// From where exec(2) has stopped the first process. Who started it was told so before it had its environment.
    fn begin(&self) {
        let (_, status) = wait_for(self.first).expect("it was started");
        let has_stopped = libc::WIFSTOPPED(status) && libc::WSTOPSIG(status) == libc::SIGTRAP;
        assert!(has_stopped, "{status:#x}");
        if self.clock.is_some() || self.wanted == Wanted::ListWithoutClock {
            hide_shared_clock(self.first);
        }
        let _ = request(libc::PTRACE_SETOPTIONS, self.first, 0, OPTIONS as usize);
        self.resume(self.first, 0);
    }

    /// To the end of the last process; gives the first one's status.
    fn follow(&mut self) -> ExitStatus {
        let mut first = None;
        while let Some((pid, status)) = wait_for(ANY) {
            if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
                let status = ExitStatus::from_raw(status);
                if pid == self.first {
                    first = Some(status);
                }
                if let Some(traced) = self.forget(pid) {
                    let role = traced.role;
                    self.trace.ended.push(Ended { role, status });
                }
                continue;
            }
            let signal = libc::WSTOPSIG(status);
            match status >> 16 {
                libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
                    self.forked(pid);
                }
                libc::PTRACE_EVENT_EXEC => {
                    self.trace.backends.push(pid);
                    self.forget(pid);
                    let _ = request(libc::PTRACE_DETACH, pid, 0, 0);
                }
                _ if signal == libc::SIGTRAP | 0x80 => self.called(pid),
                _ if signal == libc::SIGSTOP && !self.processes.contains_key(&pid) => {
                    self.early.insert(pid);
                }
                _ if signal == libc::SIGSTOP && self.early.remove(&pid) => self.resume(pid, 0),
                // The stop that a stop signal leads to is no signal any more.
                _ if !has_signal(pid) => self.resume(pid, 0),
                _ => self.resume(pid, signal),
            }
        }
        first.expect("the first process was waited for")
    }

    fn forked(&mut self, parent: i32) {
        let mut child: libc::c_ulong = 0;
        let place = (&raw mut child).expose_provenance();
        if request(libc::PTRACE_GETEVENTMSG, parent, 0, place).is_ok() {
            let child = i32::try_from(child).expect("a process's number");
            let known = self.processes.get_mut(&parent).expect("its parent");
            let number = known.children;
            known.children += 1;
            let role = self.cast.child(known.role, number);
            self.know(child, role);
            if self.early.remove(&child) {
                self.resume(child, 0);
            } else {
                // Its first stop is still to come.
                self.early.insert(child);
            }
        }
        self.resume(parent, 0);
    }

    fn called(&mut self, pid: i32) {
        let Some(call) = Call::of(pid) else {
            // Killed meanwhile.
            return self.resume(pid, 0);
        };
        match call {
            Call::Entry { number, arguments } => self.entered(pid, number, arguments),
            Call::Exit { value } => self.left(pid, value),
        }
        self.resume(pid, 0);
    }

    fn entered(&mut self, pid: i32, call: i64, arguments: [u64; 6]) {
        // The program's own code begins by looking at descriptor 2; the runtime before it has looked at all three, by poll.
        let looks = [libc::SYS_fstat, libc::SYS_newfstatat, libc::SYS_statx].contains(&call);
        let looks_at_stderr = looks && arguments[0] == 2;
        self.has_begun |= looks_at_stderr;
        let traced = self.processes.get_mut(&pid).expect("known");
        traced.is_confining = call == libc::SYS_seccomp
            || call == libc::SYS_prctl && arguments[0] == libc::PR_SET_SECCOMP as u64;
        let clocks = [libc::CLOCK_REALTIME, libc::CLOCK_REALTIME_COARSE].map(|clock| clock as u64);
        let asks = call == libc::SYS_clock_gettime && clocks.contains(&arguments[0]);
        traced.time = (self.clock.is_some() && asks).then_some(arguments[1]);
        // What was forked runs the program's own code from the start.
        if !self.has_begun && pid == self.first {
            return;
        }
        let traced = *traced;
        let count = self.counts.entry((traced.role, call)).or_default();
        let point = Point {
            role: traced.role,
            call,
            nth: *count,
        };
        *count += 1;
        match self.wanted {
            Wanted::List | Wanted::ListWithoutClock => self.trace.seen.push(Seen {
                point,
                arguments,
                pid,
                is_confined: traced.is_confined,
            }),
            Wanted::At(wanted, fault) if wanted == point => {
                self.trace.is_hit = true;
                match fault {
                    Fault::Killed => drop(sys::kill(pid, libc::SIGKILL)),
                    Fault::Fails(errno) => self.replace(pid, call, errno),
                    Fault::Fills(pipe) => sys::fill(pipe),
                }
            }
            Wanted::At(..) => {}
        }
    }

    fn replace(&mut self, pid: i32, call: i64, errno: i32) {
        let Some(mut registers) = registers(pid) else {
            return;
        };
        // brk(2) tells of failure by the old end.
        let answer = if call == libc::SYS_brk {
            0
        } else {
            -i64::from(errno)
        };
        let traced = self.processes.get_mut(&pid).expect("known");
        traced.answer = Some((answer, registers.rdi));
        traced.is_confining = false;
        registers.orig_rax = libc::SYS_close as u64;
        registers.rdi = u64::MAX;
        set_registers(pid, &registers);
    }

    fn left(&mut self, pid: i32, value: i64) {
        let traced = self.processes.get_mut(&pid).expect("known");
        if traced.is_confining && value == 0 {
            traced.is_confined = true;
        }
        if let (Some(clock), Some(place), 0) = (&self.clock, traced.time.take(), value) {
            self.trace.told_time += 1;
            let place = usize::try_from(place).expect("an address");
            // The seconds come first, and it may have been killed.
            let _ = request(libc::PTRACE_POKEDATA, pid, place, clock.now() as usize);
        }
        let Some((answer, first)) = traced.answer.take() else {
            return;
        };
        if let Some(mut registers) = registers(pid) {
            registers.rax = answer as u64;
            registers.rdi = first;
            set_registers(pid, &registers);
        }
    }

    /// Only those calls are stopped at that matter.
    fn resume(&self, pid: i32, signal: i32) {
        let role = self.processes.get(&pid).map(|traced| traced.role);
        let is_answered = self
            .processes
            .get(&pid)
            .is_some_and(|traced| traced.answer.is_some());
        let how = match self.wanted {
            Wanted::At(point, _)
                if self.trace.is_hit && !is_answered || role != Some(point.role) =>
            {
                libc::PTRACE_CONT
            }
            _ => libc::PTRACE_SYSCALL,
        };
        // One that was killed cannot be resumed, and has its end to tell.
        let _ = request(how, pid, 0, usize::try_from(signal).unwrap_or(0));
    }
}

enum Call {
    Entry { number: i64, arguments: [u64; 6] },
    Exit { value: i64 },
}

impl Call {
    /// `PTRACE_GET_SYSCALL_INFO`, ptrace(2).
    fn of(pid: i32) -> Option<Self> {
        const GET_SYSCALL_INFO: libc::c_uint = 0x420e;
        let mut info = [0_u64; 11];
        let place = info.as_mut_ptr().expose_provenance();
        request(GET_SYSCALL_INFO, pid, size_of_val(&info), place).ok()?;
        match info[0] & 0xff {
            1 => Some(Self::Entry {
                number: info[3] as i64,
                arguments: info[4..10].try_into().expect("six"),
            }),
            2 => Some(Self::Exit {
                value: info[3] as i64,
            }),
            _ => None,
        }
    }
}

const ANY: i32 = -1;

/// The next stop or end of a process that this thread traces, or of any of them.
fn wait_for(process: i32) -> Option<(i32, i32)> {
    loop {
        let mut status = 0;
        let options = libc::__WALL | libc::__WNOTHREAD;
        // SAFETY: waitpid writes one integer.
        let pid = unsafe { libc::waitpid(process, &raw mut status, options) };
        if pid > 0 {
            return Some((pid, status));
        }
        if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
            return None;
        }
    }
}

/// Takes `AT_SYSINFO_EHDR` out of what a new program is told (getauxval(3)). It begins on top of its stack, behind the
/// arguments and the environment.
fn hide_shared_clock(pid: i32) {
    const IGNORE: u64 = 1;
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .expect("its memory");
    let word = |place: u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, place).expect("its stack");
        u64::from_ne_bytes(bytes)
    };
    let top = registers(pid).expect("it has stopped").rsp;
    let mut place = top + 8 * (word(top) + 2);
    while word(place) != 0 {
        place += 8;
    }
    place += 8;
    while word(place) != libc::AT_NULL {
        if word(place) == libc::AT_SYSINFO_EHDR {
            let _ = memory.write_all_at(&IGNORE.to_ne_bytes(), place);
        }
        place += 16;
    }
}

fn has_signal(pid: i32) -> bool {
    // SAFETY: all zeroes are a valid value of this structure, which the kernel fills.
    let mut information: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let place = (&raw mut information).expose_provenance();
    request(libc::PTRACE_GETSIGINFO, pid, 0, place).is_ok()
}

fn request(request: libc::c_uint, pid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: these requests take integers, or a pointer to a value of the caller's that lives through the call.
    if unsafe { libc::ptrace(request, pid, address, data) } == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(target_arch = "x86_64")]
use libc::user_regs_struct as Registers;

/// For the compiler alone: tests that need them are ignored elsewhere (`Need::X86_64`).
#[cfg(not(target_arch = "x86_64"))]
#[derive(Default)]
struct Registers {
    rax: u64,
    rdi: u64,
    rsp: u64,
    orig_rax: u64,
}

#[cfg(target_arch = "x86_64")]
fn registers(pid: i32) -> Option<Registers> {
    // SAFETY: all zeroes are a valid value of this structure of integers.
    let mut registers: Registers = unsafe { std::mem::zeroed() };
    let place = (&raw mut registers).expose_provenance();
    request(libc::PTRACE_GETREGS, pid, 0, place).ok()?;
    Some(registers)
}

#[cfg(target_arch = "x86_64")]
fn set_registers(pid: i32, registers: &Registers) {
    let place = std::ptr::from_ref(registers).expose_provenance();
    // It may have been killed.
    let _ = request(libc::PTRACE_SETREGS, pid, 0, place);
}

#[cfg(not(target_arch = "x86_64"))]
fn registers(_: i32) -> Option<Registers> {
    None
}

#[cfg(not(target_arch = "x86_64"))]
fn set_registers(_: i32, _: &Registers) {}
