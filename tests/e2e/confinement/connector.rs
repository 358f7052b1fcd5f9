//! The connector, which is confined without a filter.

use super::attempt::Expected::{Errno, Succeeds, Untried};
use super::attempt::{Context, Differences, row};
use super::calls::*;
use super::stage::Role;
use crate::harness::ptrace::Arg;
use crate::harness::*;

/// It has no filter, so it survives: what Landlock, ids and limits leave to it.
pub(super) fn connector(test: &Test) {
    let remote = Remote::tcp(test, Introduction::None, &Backend::imap());
    let start = || {
        let mut session = Program::new(test).connect(&remote).start();
        session.client().greeting();
        let connector = eventually("the connector waits", || {
            let process = session.processes().connector?;
            (process.blocked_in() == Some(libc::SYS_recvfrom)).then_some(process)
        });
        (session, connector)
    };
    let (mut session, process) = start();
    let (mut other, sibling) = start();
    let mut context = Context::new(test, Role::Opener).of(process);
    // What its user could do to files, were it not for Landlock.
    let open = test.path("open");
    make_dir(&open, 0o1777);
    std::fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let file = open.join("file");
    write_file(&file, "anybody's", 0o666);
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    context.file = format!("{}\0", file.display()).into();
    context.dotted = format!("{}\0", open.join("new").display()).into();
    let rows = [
        (
            row("openat", libc::SYS_openat, |c| vec![CWD, b(&c.file), ZERO]),
            Succeeds,
        ),
        (
            row("openat for writing", libc::SYS_openat, |c| {
                vec![CWD, b(&c.file), n(libc::O_WRONLY as i64)]
            }),
            Errno(libc::EACCES),
        ),
        (
            row("openat to create", libc::SYS_openat, |c| {
                let flags = libc::O_CREAT | libc::O_WRONLY;
                vec![CWD, b(&c.dotted), n(flags as i64), n(0o600)]
            }),
            Errno(libc::EACCES),
        ),
        (
            row("truncate", libc::SYS_truncate, |c| vec![b(&c.file), ZERO]),
            Errno(libc::EACCES),
        ),
        (
            row("unlink", libc::SYS_unlink, |c| vec![b(&c.file)]),
            Errno(libc::EACCES),
        ),
        (
            row("mkdir", libc::SYS_mkdir, |c| vec![b(&c.dotted), n(0o700)]),
            Errno(libc::EACCES),
        ),
        (
            row("execve", libc::SYS_execve, |_| vec![TRUE, ZERO, ZERO]),
            Errno(libc::EACCES),
        ),
        (row("fork", libc::SYS_fork, |_| vec![]), Errno(libc::EAGAIN)),
        (
            row("bind of a TCP port", libc::SYS_bind, |c| {
                vec![last(c), b(&c.any_port), n(16)]
            })
            .after(libc::SYS_socket, TCP),
            Errno(libc::EACCES),
        ),
        (
            row("connect by TCP", libc::SYS_connect, |c| {
                vec![last(c), b(&c.inet), n(16)]
            })
            .after(libc::SYS_socket, TCP),
            Succeeds,
        ),
        (
            row("connect to an abstract socket", libc::SYS_connect, |c| {
                vec![last(c), b(&c.stream), n(c.stream.len() as i64)]
            })
            .after(libc::SYS_socket, UNIX_STREAM),
            Errno(libc::EPERM),
        ),
        (
            row("mprotect of the stack", libc::SYS_mprotect, |c| {
                vec![Arg::Number(c.stack), n(4096), n(EXECUTABLE)]
            }),
            Errno(libc::EACCES),
        ),
        (
            row("setuid", libc::SYS_setuid, |_| vec![ZERO]),
            Errno(libc::EPERM),
        ),
        (
            row("chroot", libc::SYS_chroot, |_| vec![ROOT]),
            Errno(libc::EPERM),
        ),
    ];
    let mut differences = Differences::default();
    for (row, expected) in rows {
        let outcome = row.attempt(process, &mut context);
        differences.note(row.name, expected, outcome);
    }
    context.signal = libc::SIGKILL as u64;
    for (whose, target) in [
        ("another connector", sibling),
        ("its network process", session.network()),
        ("another network process", other.network()),
    ] {
        // All of them are one user's.
        assert_eq!(target.status().numbers("Uid"), [NETWORK_ID; 4]);
        context.target = target;
        for row in TOWARDS {
            let expected = if row.is_signal() {
                Errno(libc::EPERM)
            } else {
                row.beneath
            };
            if expected != Untried {
                let outcome = row.attempt(process, &mut context);
                differences.note(&format!("{} {whose}", row.name), expected, outcome);
            }
        }
    }
    differences.end(30);
    for session in [&mut session, &mut other] {
        session.client().starttls(Pki::of(Key::P256));
        session.client().login();
        assert!(session.client().command("z LOGOUT").is_ok());
    }
}
