//! Other programs: real mail clients and IMAP servers, found where Debian or tests/run puts them.

use super::client::Client;
use super::program::wait_child;
use super::{Test, sys};
use nix::libc;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// Where a command is: in E2E_TOOLS (a tree of unpacked Debian packages that tests/run makes), in PATH or in the sbin directories.
pub fn find(name: &str) -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = tools()
        .map(|tree| ["usr/sbin", "usr/bin"].map(|sub| tree.join(sub)).to_vec())
        .unwrap_or_default();
    places.extend(std::env::split_paths(
        &std::env::var_os("PATH").unwrap_or_default(),
    ));
    places.extend(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    places
        .into_iter()
        .map(|place| place.join(name))
        .find(|path| path.is_file())
}

/// The tree of unpacked packages.
pub fn tools() -> Option<PathBuf> {
    std::env::var_os("E2E_TOOLS").map(PathBuf::from)
}

/// A command of another program. Its environment holds only PATH, HOME (the test's directory), LC_ALL and what is set.
pub struct Tool {
    command: Command,
    test: Test,
    input: Option<Vec<u8>>,
    patience: Duration,
}

/// What a [`Tool`] did.
#[derive(Debug)]
pub struct Output {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
}

impl Output {
    /// Both outputs as text.
    pub fn text(&self) -> String {
        format!(
            "{}{}",
            String::from_utf8_lossy(&self.stdout),
            String::from_utf8_lossy(&self.stderr)
        )
    }

    /// Itself, if it succeeded.
    pub fn success(self) -> Self {
        assert!(
            self.status.success(),
            "{:?}: {}",
            self.status,
            self.text().chars().take(4000).collect::<String>()
        );
        self
    }
}

impl Tool {
    /// A command by name (see [`find`]) or path.
    pub fn new(test: &Test, name: &str) -> Self {
        let path = if name.contains('/') {
            PathBuf::from(name)
        } else {
            find(name).unwrap_or_else(|| panic!("no {name}"))
        };
        let from_tree = tools().is_some_and(|tree| path.starts_with(tree));
        let mut command = Command::new(path);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", test.dir())
            .env("LC_ALL", "C.UTF-8");
        if from_tree {
            let tree = tools().unwrap();
            let libraries = [
                tree.join("usr/lib/x86_64-linux-gnu"),
                tree.join("lib/x86_64-linux-gnu"),
            ];
            command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
        }
        command.current_dir(test.dir());
        Self {
            command,
            test: test.clone(),
            input: None,
            patience: Duration::from_secs(60),
        }
    }

    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.command.args(arguments);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn envs(mut self, all: impl IntoIterator<Item = (String, OsString)>) -> Self {
        self.command.envs(all);
        self
    }

    /// What it reads from descriptor 0 (else /dev/null).
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Some(bytes.into());
        self
    }

    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Runs it to its end, at most for the patience (60 s).
    pub fn run(mut self) -> Output {
        let number = super::next_number();
        let [input, output, errors] = ["input", "output", "errors"]
            .map(|name| self.test.path(&format!("tool-{number}.{name}")));
        match &self.input {
            Some(bytes) => {
                std::fs::write(&input, bytes).unwrap();
                self.command.stdin(File::open(&input).unwrap());
            }
            None => drop(self.command.stdin(Stdio::null())),
        }
        self.command
            .stdout(File::create(&output).unwrap())
            .stderr(File::create(&errors).unwrap());
        let words = format!("{:?}", self.command);
        sys::prepare(&mut self.command, Vec::new());
        let mut child = self.test.spawn_prepared(self.command);
        let status = wait_child(&mut child, self.patience);
        if status.is_some() {
            self.test.forget(&child);
        }
        let read = |path: &PathBuf| {
            let bytes = std::fs::read(path).unwrap();
            let _ = std::fs::remove_file(path);
            bytes
        };
        let _ = std::fs::remove_file(&input);
        let Some(status) = status else {
            let _ = child.kill();
            let _ = child.wait();
            panic!(
                "{words} does not end: {}{}",
                String::from_utf8_lossy(&read(&output)),
                String::from_utf8_lossy(&read(&errors))
            );
        };
        Output {
            status,
            stdout: read(&output),
            stderr: read(&errors),
        }
    }

    /// Starts it and talks to its descriptors 0 and 1 like a client to a server.
    pub fn talk(mut self) -> (Running, Client) {
        let (log_path, log) = self.test.log_file();
        self.command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log);
        sys::prepare(&mut self.command, Vec::new());
        let mut child = self.test.spawn_prepared(self.command);
        let client = Client::on_pair(child.stdout.take().unwrap(), child.stdin.take().unwrap());
        let running = Running {
            child,
            log_path,
            test: self.test,
        };
        (running, client)
    }

    /// Starts it in the background; both outputs go to its log.
    pub fn start(mut self) -> Running {
        let (log_path, log) = self.test.log_file();
        self.command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        sys::prepare(&mut self.command, Vec::new());
        Running {
            child: self.test.spawn_prepared(self.command),
            log_path,
            test: self.test,
        }
    }
}

/// A program in the background; ended when dropped.
pub struct Running {
    child: Child,
    pub log_path: PathBuf,
    test: Test,
}

impl Running {
    pub fn process(&self) -> super::Process {
        super::Process(i32::try_from(self.child.id()).unwrap())
    }

    /// What it wrote so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log_path).unwrap_or_default()).into_owned()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_child(&mut self.child, Duration::from_secs(60))
            .unwrap_or_else(|| panic!("it does not end: {}", self.log()))
    }

    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.has_ended() {
            let _ = sys::kill(self.process().0, libc::SIGTERM);
            if wait_child(&mut self.child, Duration::from_secs(3)).is_none() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
        self.test.forget(&self.child);
        if std::thread::panicking() {
            eprintln!(
                "--- log of {:?} ---\n{}---",
                self.log_path,
                self.log().chars().take(8000).collect::<String>()
            );
        }
    }
}
