//! Each hostile call in each role: beneath all protections, and with the upper ones taken away, so that the lower ones are seen to
//! hold by themselves.

use super::attempt::Expected::{Dies, Errno, Succeeds, Untried};
use super::attempt::{Context, Differences, Expected, Row, call};
use super::calls::{OPENER_MAY, ROWS, SERVICE_MAY, TOWARDS, ZERO, n};
use super::stage::{Held, Role, Stage, waiting};
use crate::harness::ptrace::{Gate, Outcome};
use crate::harness::*;

/// One attempt in a process of its own, if the one before did not survive.
pub(super) fn filtered(test: &Test, role: Role) {
    let stage = Stage::new(test, role);
    let mut context = Context::new(test, role);
    context.signal = libc::SIGKILL as u64;
    let mut differences = Differences::default();
    let mut held: Option<Held> = None;
    let allowed = match role {
        Role::KeeperService => SERVICE_MAY,
        Role::Opener => OPENER_MAY,
        Role::Keeper | Role::Network | Role::SharedKeeper => &[],
    };
    // Who is aimed at: another connection's processes.
    let mut victim = Program::new(test).start();
    victim.client().log_in_by_starttls(Pki::of(Key::P256));
    context.target = victim.network();
    for row in ROWS.iter().chain(TOWARDS) {
        let now = held.take().unwrap_or_else(|| stage.take());
        context = context.of(now.process);
        let allowed = allowed.iter().find(|(name, _)| *name == row.name);
        let expected = allowed.map_or(Dies, |(_, expected)| *expected);
        // What comes before it is death already.
        let outcome = Row {
            before: None,
            ..*row
        }
        .attempt(now.process, &mut context);
        differences.note(row.name, expected, outcome);
        if let Outcome::Returned(_) = outcome {
            held = Some(now);
        }
    }
    // Every family of sockets that there is or will be.
    if role == Role::Network {
        for family in 0..=46 {
            let now = stage.take();
            let arguments = [n(family), n(libc::SOCK_RAW as i64), ZERO];
            let outcome = call(Gate::Syscall, now.process, libc::SYS_socket, &arguments);
            differences.note(&format!("socket of family {family}"), Dies, outcome);
        }
    }
    drop(held);
    assert!(victim.client().command("a NOOP").is_ok());
    assert!(victim.client().command("z LOGOUT").is_ok());
    assert_nothing_made(test);
    differences.end(ROWS.len() + TOWARDS.len());
}

/// In the chroot the harness looks.
pub(super) fn assert_nothing_made(test: &Test) {
    assert!(!test.path("new").exists());
    let text = std::fs::read(test.path("secret")).unwrap();
    assert_eq!(text, b"secret");
}

/// Without filters one process survives it all, and serves its client afterwards.
pub(super) fn beneath(test: &Test, role: Role) {
    let column = |row: &Row| {
        if role == Role::Opener {
            row.opener
        } else {
            row.beneath
        }
    };
    let landlock = Errno(libc::EPERM);
    layers(test, role, Kernel::OURS.without_filters(), column, landlock);
}

pub(super) fn bare(test: &Test, role: Role) {
    let kernel = Kernel::OURS
        .without_filters()
        .without_landlock(libc::ENOSYS)
        .without_mdwe();
    // The opener is root to files, which is for Landlock and the filter to bound; to processes it is nobody.
    let column = |row: &Row| match role {
        Role::Opener => Untried,
        _ => row.bare,
    };
    layers(test, role, kernel, column, Succeeds);
}

/// Tries what `column` says on a kernel; `signalled` is what comes of a signal to a process of the same user.
pub(super) fn layers(
    test: &Test,
    role: Role,
    kernel: Kernel,
    column: impl Fn(&Row) -> Expected + Sync,
    signalled: Expected,
) {
    let stage = kernel.run(|| Stage::new(test, role));
    // Of the listener there are two connections: the first is aimed at.
    let mut first = kernel.run(|| stage.take());
    let mut held = match &stage {
        Stage::Listener(server, Role::Network) => {
            let mut client = server.connect();
            client.greeting();
            let other = first.process;
            let process = waiting(role, || {
                let sessions = server.sessions().into_iter();
                sessions
                    .map(|session| session.network)
                    .find(|process| *process != other)
            });
            Held {
                process,
                client: Some(client),
                session: None,
            }
        }
        // There is one keeper.
        Stage::Listener(..) | Stage::Service(..) => Held {
            process: first.process,
            client: None,
            session: None,
        },
        Stage::Starts(..) => kernel.run(|| stage.take()),
    };
    let process = held.process;
    let status = process.status();
    assert_eq!(
        status.field("Seccomp_filters"),
        "1",
        "the program's own filter is there"
    );
    let mut context = Context::new(test, role).of(process);
    let mut differences = Differences::default();
    for row in ROWS {
        let expected = column(row);
        if expected != Untried {
            let outcome = row.attempt(process, &mut context);
            differences.note(row.name, expected, outcome);
        }
    }
    // Signals that would do harm are only sent where they have to be refused.
    context.signal = match signalled {
        Errno(_) => libc::SIGKILL as u64,
        _ => 0,
    };
    let sibling = (first.process != process).then_some(first.process);
    let parent = process.parent().expect("a parent");
    let mut targets: Vec<(&str, Process)> = vec![("a sibling", first.process)];
    targets.retain(|(_, target)| Some(*target) == sibling);
    if role != Role::Opener {
        // Root's, or another user's: not by Landlock alone.
        targets.push(("its parent", parent));
    }
    let launcher = match (&stage, held.session.as_ref().or(first.session.as_ref())) {
        (Stage::Listener(server, _), _) => {
            let sessions = server.sessions();
            sessions.iter().find_map(|session| session.launcher)
        }
        (_, Some(session)) => session.processes().launcher,
        (_, None) => None,
    };
    targets.push(("the launcher", launcher.expect("a launcher")));
    let same_user =
        |target: Process| target.status().numbers("Uid")[0] == process.status().numbers("Uid")[0];
    for (whose, target) in targets {
        context.target = target;
        for row in TOWARDS {
            let expected = match (row.is_signal(), same_user(target)) {
                (true, true) => signalled,
                (true, false) => Errno(libc::EPERM),
                (false, _) => row.beneath,
            };
            if expected != Untried {
                let outcome = row.attempt(process, &mut context);
                differences.note(&format!("{} {whose}", row.name), expected, outcome);
            }
        }
        assert!(target.alive(), "{whose} is gone");
    }
    differences.end(18);
    // All of it has changed nothing.
    for one in [&mut first, &mut held] {
        let client = match (&mut one.client, &mut one.session) {
            (Some(client), _) => client,
            (None, Some(session)) => session.client(),
            (None, None) => continue,
        };
        client.starttls(Pki::of(Key::P256));
        client.login();
        assert!(client.command("z LOGOUT").is_ok());
    }
    assert_nothing_made(test);
}
