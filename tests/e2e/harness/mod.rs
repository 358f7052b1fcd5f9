//! The harness: plays superserver, mail client and IMAP server around the built program, and looks at its processes.
//!
//! A test is a function of [`Test`], registered with [`test`]. It makes a [`Program`], starts it, talks to it as a
//! [`Client`], reads what the scripted backend saw from a [`Record`], and returns; then nothing of it may be left.

pub mod backend;
pub mod client;
pub mod dir;
pub mod identity;
pub mod kernel;
pub mod pki;
pub mod process;
pub mod program;
pub mod ptrace;
pub mod records;
pub mod remote;
pub mod service;
pub mod superserver;
pub mod sys;
pub mod system_log;
pub mod tool;
pub mod tracer;

pub use backend::{Backend, Played, Record};
pub use client::{Client, End, Memory, Reply, TlsOffer};
pub use dir::{TempDir, is_static, make_dir, write_file};
pub use identity::{Authority, Identity};
pub use kernel::Kernel;
pub use pki::{Format, Key, Pki};
pub use process::Process;
pub use program::{
    Handover, KEEPER_ID, NETWORK_ID, Processes, Program, Session, Socket, Stderr, eventually,
    within,
};
pub use remote::{Introduction, Remote};
pub use service::Service;
pub use superserver::{Server, Superserver, is_listening};
pub use system_log::SystemLog;
pub use tool::Tool;

pub use nix::libc;

use libtest_mimic::{Completion, Failed, Trial};
use std::collections::BTreeSet;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The environment variable that marks every process of a test.
pub const MARKER: &str = "E2E_TEST";

/// What a test needs of the machine besides the program. A test whose needs are not met is ignored, aloud.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    Root,
    /// A command and the Debian package that has it.
    Command(&'static str, &'static str),
    /// A file in the tree of unpacked packages, and its Debian package.
    Unpacked(&'static str, &'static str),
    /// A Python module in the tree, and its package's name on PyPI.
    Python(&'static str, &'static str),
    /// IPv6 on loopback.
    Ipv6,
    /// A superserver that starts the program for each connection: not the listener, which E2E_LISTENER puts in tcpserver's place.
    EachStarted,
    /// x86-64, whose registers the ptrace tool knows.
    X86_64,
    /// A kernel with everything that confinement can use, of which `Kernel` can take away.
    NewKernel,
}

impl Need {
    /// Why the need is not met.
    fn missing(self) -> Option<String> {
        match self {
            Need::Root => (!is_root()).then(|| "needs root".to_owned()),
            Need::Command(name, package) => tool::find(name).is_none().then(|| {
                format!(
                    "needs the command {name} (Debian package {package}; tests/run installs it)"
                )
            }),
            Need::Unpacked(path, package) => (!tool::tools()
                .is_some_and(|tree| tree.join(path).exists()))
            .then(|| format!("needs the Debian package {package} unpacked (tests/run does it)")),
            Need::Python(module, package) => (!tool::tools()
                .is_some_and(|tree| tree.join("python").join(module).exists())
                || tool::find("python3").is_none())
            .then(|| format!("needs the Python package {package} (tests/run installs it)")),
            Need::Ipv6 => std::net::TcpListener::bind("[::1]:0")
                .is_err()
                .then(|| "needs IPv6 on loopback".to_owned()),
            Need::EachStarted => std::env::var_os("E2E_LISTENER").is_some().then(|| {
                "is about each start of the program, or about what tcpserver says".to_owned()
            }),
            Need::X86_64 => (!cfg!(target_arch = "x86_64"))
                .then(|| "knows the registers of x86-64 only".to_owned()),
            Need::NewKernel => (!kernel::is_new())
                .then(|| "needs Landlock ABI 6 and PR_SET_MDWE (Linux 6.12)".to_owned()),
        }
    }
}

/// Registers a test: `name` is a sentence. After `body` has returned, every process and the directory of the test must be
/// gone or go by themselves, else the test fails.
pub fn test(
    name: &str,
    needs: &'static [Need],
    body: impl FnOnce(&Test) + Send + 'static,
) -> Trial {
    let name = name.to_owned();
    Trial::ignorable_test(name.clone(), move || {
        if let Some(reason) = needs.iter().find_map(|need| need.missing()) {
            // In CI nothing may be missing.
            if std::env::var_os("E2E_IGNORE_NOTHING").is_some() {
                return Err(Failed::from(reason));
            }
            eprintln!("ignored: {name}: {reason}");
            return Ok(Completion::ignored_with(reason));
        }
        let began = Instant::now();
        let test = Test::new();
        let result = catch_unwind(AssertUnwindSafe(|| body(&test)));
        test.record().release();
        let left = test.wait_for_descendants(if result.is_ok() {
            Duration::from_secs(10)
        } else {
            Duration::ZERO
        });
        test.end_descendants();
        if std::env::var_os("E2E_TIMES").is_some() {
            eprintln!("{:7.2} s  {name}", began.elapsed().as_secs_f64());
        }
        if let Err(panic) = result {
            resume_unwind(panic);
        }
        if !left.is_empty() {
            return Err(Failed::from(format!("left behind: {}", left.join("; "))));
        }
        if let Some(litter) = std::fs::read_dir(test.empty_dir()).unwrap().next() {
            return Err(Failed::from(format!(
                "left in the chroot directory: {:?}",
                litter.unwrap().path()
            )));
        }
        Ok(Completion::Completed)
    })
}

/// One running test: its directory and all processes it has started. Cloning gives another handle to the same test.
#[derive(Clone, Debug)]
pub struct Test(Arc<Inner>);

struct Inner {
    dir: TempDir,
    number: u32,
    /// Processes that the test itself started; each leads a session, to which its descendants belong.
    started: Mutex<BTreeSet<i32>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, out: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(out, "test {}", self.number)
    }
}

impl Test {
    fn new() -> Self {
        let test = Self(Arc::new(Inner {
            dir: TempDir::new("imap-tls-test"),
            number: next_number(),
            started: Mutex::default(),
        }));
        make_dir(&test.record().0, 0o1777);
        make_dir(&test.empty_dir(), 0o755);
        test
    }

    /// A directory of this test's own; everybody may enter it.
    pub fn dir(&self) -> &Path {
        self.0.dir.path()
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    /// The empty directory for `--chroot`; it must still be empty when the test ends.
    pub fn empty_dir(&self) -> PathBuf {
        self.path("empty")
    }

    /// Where scripted backends write.
    pub fn record(&self) -> Record {
        Record(self.path("backend"))
    }

    /// What marks this test's processes in their environment.
    pub fn marker(&self) -> String {
        format!("{}.{}", std::process::id(), self.0.number)
    }

    /// A new log file, opened for appending.
    pub fn log_file(&self) -> (PathBuf, File) {
        let path = self.path(&format!("log.{}", next_number()));
        let file = program::open_log(&path);
        (path, file)
    }

    /// Starts a command that went through `sys::prepare`.
    pub fn spawn_prepared(&self, mut command: Command) -> Child {
        command.env(MARKER, self.marker());
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        self.0
            .started
            .lock()
            .unwrap()
            .insert(i32::try_from(child.id()).unwrap());
        child
    }

    /// A child that has been waited for: its number may soon be another process's, and a session of that number another's, which
    /// is none of this test's business. What it has left behind is still known by its environment.
    pub fn forget(&self, child: &Child) {
        let id = i32::try_from(child.id()).unwrap();
        let is_left = process::all()
            .into_iter()
            .any(|process| process.session() == Some(id));
        if !is_left {
            self.0.started.lock().unwrap().remove(&id);
        }
    }

    /// Orphans come to us, not to init, and are ours to reap. Returns those that there were, reaped now.
    pub fn reap_orphans(&self, among: &[Process]) -> usize {
        let me = i32::try_from(std::process::id()).unwrap();
        let started = self.0.started.lock().unwrap().clone();
        let is_orphan = |process: &&Process| {
            process.state() == Some('Z')
                && process.parent() == Some(Process(me))
                && !started.contains(&process.0)
        };
        let orphans: Vec<_> = among.iter().filter(is_orphan).collect();
        for orphan in &orphans {
            sys::reap(orphan.0);
        }
        orphans.len()
    }

    /// All processes that come from this test and still exist, zombies included.
    pub fn descendants(&self) -> Vec<Process> {
        let started = self.0.started.lock().unwrap().clone();
        let marker = format!("{MARKER}={}", self.marker());
        let ours = |process: &Process| {
            process.session().is_some_and(|session| started.contains(&session))
                // A process may lead a new session; its environment still tells (for root: of every user's process).
                || std::fs::read(format!("/proc/{}/environ", process.0)).is_ok_and(|environment| environment.split(|byte| *byte == 0).any(|entry| entry == marker.as_bytes()))
        };
        let me = i32::try_from(std::process::id()).unwrap();
        process::all()
            .into_iter()
            .filter(|process| process.0 != me && ours(process))
            .collect()
    }

    /// Waits until there are none; returns descriptions of those that stay.
    fn wait_for_descendants(&self, patience: Duration) -> Vec<String> {
        let deadline = Instant::now() + patience;
        loop {
            let left = self.descendants();
            let started = self.0.started.lock().unwrap().clone();
            // Orphans come to us, not to init, and are ours to reap.
            for zombie in left
                .iter()
                .filter(|process| process.state() == Some('Z') && !started.contains(&process.0))
            {
                sys::reap(zombie.0);
            }
            let left: Vec<Process> = left.into_iter().filter(|process| process.alive()).collect();
            if left.is_empty() || Instant::now() >= deadline {
                return left
                    .into_iter()
                    .map(|process| describe(&[process]))
                    .collect();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends those of the test's processes that `which` chooses: daemons that a test started and that do not end by themselves.
    pub fn end_processes(&self, which: impl Fn(Process) -> bool) {
        for process in self
            .descendants()
            .into_iter()
            .filter(|process| which(*process))
        {
            let _ = sys::kill(process.0, libc::SIGTERM);
        }
    }

    /// Kills what is left, so that one failed test does not disturb others.
    fn end_descendants(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let left = self.descendants();
            if left.is_empty() {
                return;
            }
            for process in left {
                let _ = sys::kill(process.0, libc::SIGKILL);
                sys::reap(process.0);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Processes in words, for messages.
pub fn describe(processes: &[Process]) -> String {
    let one = |process: &Process| {
        format!(
            "{} {:?} ({:?}, parent {:?})",
            process.0,
            process.state(),
            process.command_line(),
            process.parent()
        )
    };
    processes.iter().map(one).collect::<Vec<_>>().join(", ")
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A number that no other call in this run gets.
pub fn next_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A TCP port that is free on all addresses now, below the range that the kernel hands out by itself.
pub fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = (std::process::id() * 131) % 8000;
    for _ in 0..8000 {
        let port =
            20_000 + u16::try_from((first + NEXT.fetch_add(1, Ordering::Relaxed)) % 8000).unwrap();
        if std::net::TcpListener::bind(("0.0.0.0", port)).is_ok()
            && std::net::TcpListener::bind(("127.0.0.1", port)).is_ok()
        {
            return port;
        }
    }
    panic!("no free port");
}
