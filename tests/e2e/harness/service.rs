//! The keeper service (`--keep`), and the program as those are started with who come to it.

use super::process::Process;
use super::program::{Program, eventually};
use super::tool::{Running, Tool};
use super::{Test, dir};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

/// A running keeper service; ended when dropped.
pub struct Service {
    running: Running,
}

impl Service {
    /// Where it listens, in a directory of this test's.
    pub fn socket(test: &Test) -> PathBuf {
        test.path("keeper.sock")
    }

    /// The program as the service, with the usual certificate.
    pub fn keeping(test: &Test) -> Program {
        Program::new(test)
            .without("--tls")
            .backend([] as [&str; 0])
            .flag("--keep")
            .option("--keeper", Self::socket(test))
    }

    /// The program as it serves a client, with no key of its own.
    pub fn serving(test: &Test) -> Program {
        Program::new(test)
            .without("--cert")
            .without("--key")
            .option("--keeper", Self::socket(test))
    }

    /// Starts it; returns when it lets network processes in.
    pub fn start(test: &Test, program: &Program) -> Self {
        let mut service = Self::start_without_waiting(test, program);
        eventually("the service lets network processes in", || {
            assert!(!service.has_ended(), "the service ended: {}", service.log());
            service
                .log()
                .contains("keeping keys for those who come to ")
                .then_some(())
        });
        service
    }

    /// The same, when it may not have read its files yet, or is to fail.
    pub fn start_without_waiting(test: &Test, program: &Program) -> Self {
        let line = program.command_line();
        let tool = Tool::new(test, dir::run_path("imap-tls").to_str().unwrap());
        let running = tool
            .args(&line[1..])
            .envs(program.environment().clone())
            .start();
        Self { running }
    }

    /// Its privileged parent.
    pub fn process(&self) -> Process {
        self.running.process()
    }

    /// Its keepers, which alone wait for many: one, and those before it that are not over.
    pub fn keepers(&self) -> Vec<Process> {
        let waits_for_many = |child: &Process| {
            let targets = child.descriptors_if_alive();
            targets.iter().any(|target| target.contains("eventpoll"))
        };
        let children = self.process().children().into_iter();
        children.filter(waits_for_many).collect()
    }

    /// The one keeper, if there is one and no other.
    pub fn keeper(&self) -> Option<Process> {
        match self.keepers()[..] {
            [keeper] => Some(keeper),
            _ => None,
        }
    }

    /// All that it logged so far.
    pub fn log(&self) -> String {
        self.running.log()
    }

    /// Waits until a line of the log contains this and returns the line.
    pub fn wait_log(&self, wanted: &str) -> String {
        eventually(&format!("the service's log has {wanted:?}"), || {
            let log = self.log();
            log.lines()
                .find(|line| line.contains(wanted))
                .map(str::to_owned)
        })
    }

    /// Has it read everything anew; returns when it has, or has said that it could not.
    pub fn reload(&self) {
        let count = |log: &str| {
            log.matches("imap-tls: reloaded").count() + log.matches("nothing was renewed").count()
        };
        let before = count(&self.log());
        self.signal(super::libc::SIGHUP);
        eventually("the service has reloaded, or not", || {
            (count(&self.log()) > before).then_some(())
        });
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        super::sys::kill(self.process().0, signal).unwrap();
    }

    pub fn has_ended(&mut self) -> bool {
        self.running.has_ended()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        self.running.wait()
    }
}

/// Whether anybody listens there, found without connecting (which would be one who asks).
pub fn is_listened_on(path: &Path) -> bool {
    // Flags: __SO_ACCEPTCON.
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = path.to_str().unwrap();
    let mut lines = table.lines().filter(|line| line.ends_with(path));
    lines.any(|line| line.split_whitespace().nth(3) == Some("00010000"))
}
