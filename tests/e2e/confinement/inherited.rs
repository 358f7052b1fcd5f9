//! What a confined process has from those before it: descriptors and capabilities.

use super::attempt::call;
use super::calls::{ZERO, n};
use super::stage::{Role, Stage};
use crate::harness::ptrace::{Gate, Outcome};
use crate::harness::*;

/// The numbers that are open, and what each is: the client, the log, /dev/null, a socket of another kind, and what has a name.
pub(super) fn descriptors(test: &Test, role: Role) {
    let stage = Stage::new(test, role);
    let held = stage.take();
    let all = held.process.descriptors();
    let name = |target: &String| match target.as_str() {
        "/dev/null" => "null".to_owned(),
        target if target.starts_with("socket:") => {
            if clients(target) { "client" } else { "pair" }.to_owned()
        }
        target if target.starts_with(test.path("log.").to_str().unwrap()) => "log".to_owned(),
        target if target == test.path("names").to_str().unwrap() => "names".to_owned(),
        target => target.trim_start_matches("anon_inode:").to_owned(),
    };
    let mut kinds: Vec<_> = all.values().map(name).collect();
    kinds.sort();
    let expected: &[&str] = match role {
        // Standard input and output, or what is in their place, and the log; the launcher; the keeper; and children's ends.
        Role::Network => &[
            "[signalfd]",
            "client",
            "log",
            "null",
            "null",
            "pair",
            "pair",
            "pair",
        ],
        Role::Keeper => &["log", "null", "null", "pair"],
        Role::SharedKeeper => &["[eventpoll]", "log", "null", "null", "pair", "pair"],
        // And where it lets network processes in.
        Role::KeeperService => &["[eventpoll]", "log", "null", "null", "pair", "pair", "pair"],
        Role::Opener => &["log", "names", "null", "null", "pair"],
    };
    assert_eq!(kinds, expected, "{all:?}");
    // What is not listed is not there either: a descriptor that cannot be written to could be of an O_PATH kind.
    for number in (0..64).filter(|number| !all.contains_key(number)) {
        let arguments = [n(number.into()), ZERO, ZERO];
        let outcome = call(Gate::Syscall, held.process, libc::SYS_write, &arguments);
        assert_eq!(
            outcome,
            Outcome::Returned(-i64::from(libc::EBADF)),
            "{number}"
        );
    }
}

/// Whether `socket:[inode]` is a TCP socket.
pub(super) fn clients(target: &str) -> bool {
    let inode = target.trim_start_matches("socket:[").trim_end_matches(']');
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    table
        .lines()
        .skip(1)
        .any(|line| line.split_whitespace().nth(9) == Some(inode))
}

/// Changing ids takes no capability out of that set.
pub(super) fn inheritable(test: &Test) {
    let line = Program::new(test).command_line();
    let server = Tool::new(test, "setpriv")
        .args(["--inh-caps", "+chown"])
        .args(&line);
    let (running, mut client) = server.talk();
    client.greeting();
    let processes = Processes::of(running.process());
    let launcher = processes.launcher.expect("a launcher");
    assert_ne!(launcher.status().mask("CapInh"), 0, "nothing was left");
    for process in [processes.network, processes.keeper.expect("a keeper")] {
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(process.status().mask(set), 0, "{set}");
        }
    }
    client.starttls(Pki::of(Key::P256));
    client.login();
    assert!(client.command("z LOGOUT").is_ok());
}
