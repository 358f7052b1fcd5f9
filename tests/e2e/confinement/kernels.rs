//! Other kernels and containers, which have less: what works there, what is said, and what is fatal.

use super::attempt::Expected::{Errno, Succeeds};
use super::attempt::{Context, Differences};
use super::calls::{ROWS, TOWARDS};
use super::stage::{Role, Stage};
use crate::harness::*;

/// How a kernel or container says that it has no Landlock.
pub(super) const ABSENT: [i32; 3] = [libc::ENOSYS, libc::EOPNOTSUPP, libc::EPERM];

pub(super) fn kernels(test: &Test) {
    let directory = test.path("names");
    make_dir(&directory, 0o755);
    let program = Program::new(test).option("--cert-dir", directory);
    let none = ABSENT.map(|errno| Kernel::OURS.without_landlock(errno));
    let some = (1..=7).map(|abi| Kernel::OURS.landlock(abi));
    for kernel in none.into_iter().chain(some) {
        for kernel in [kernel, kernel.without_mdwe()] {
            let mut session = kernel.run(|| program.start());
            session.client().log_in_by_starttls(Pki::of(Key::P256));
            assert!(session.client().command("z LOGOUT").is_ok());
            session.close_client();
            assert_eq!(session.wait_code(), 0, "{kernel:?}: {}", session.log());
            let log = session.log();
            assert_eq!(log.lines().count(), 1, "{kernel:?}: {log}");
        }
    }
    let remote = Remote::tcp(test, Introduction::None, &Backend::imap());
    for kernel in [
        Kernel::OURS.without_landlock(libc::ENOSYS).without_mdwe(),
        Kernel::OURS.landlock(3),
    ] {
        let mut session = kernel.run(|| Program::new(test).connect(&remote).start());
        session.client().log_in_by_starttls(Pki::of(Key::P256));
        assert!(session.client().command("z LOGOUT").is_ok());
    }
}

/// The same calls on each ABI: the emulation is real, and so is what is denied.
pub(super) fn abis(test: &Test) {
    let mut differences = Differences::default();
    for abi in 0..=7 {
        let kernel = Kernel::OURS.without_filters();
        let kernel = match abi {
            0 => kernel.without_landlock(libc::ENOSYS),
            abi => kernel.landlock(abi),
        };
        let stage = kernel.run(|| Stage::new(test, Role::Keeper));
        let (first, held) = (stage.take_on(kernel), stage.take_on(kernel));
        let mut context = Context::new(test, Role::Keeper).of(held.process);
        // None, so that it does no harm where it is not refused.
        context.signal = 0;
        context.target = first.process;
        for row in ROWS.iter().chain(TOWARDS) {
            let (since, errno) = match row.name {
                "openat" => (1, libc::EACCES),
                "connect by TCP" | "bind of a TCP port" => (4, libc::EACCES),
                "connect to an abstract socket"
                | "sendto an abstract socket"
                | "sendmsg with a descriptor to an abstract socket" => (6, libc::EPERM),
                _ if row.is_signal() => (6, libc::EPERM),
                _ => continue,
            };
            let expected = if abi >= since { Errno(errno) } else { Succeeds };
            let outcome = row.attempt(held.process, &mut context);
            differences.note(&format!("ABI {abi}: {}", row.name), expected, outcome);
        }
    }
    differences.end(80);
}

pub(super) const NO_LANDLOCK: &str = "no Landlock here (Function not implemented)";
pub(super) const NO_MDWE: &str = "no PR_SET_MDWE here (Invalid argument)";

pub(super) fn warnings(test: &Test) {
    let none = Kernel::OURS.without_landlock(libc::ENOSYS).without_mdwe();
    let count = |log: &str, words: &str| log.lines().filter(|line| line.contains(words)).count();
    for (kernel, times) in [(none, 1), (Kernel::OURS, 0)] {
        let program = Program::new(test);
        let server = kernel.run(|| Server::start(test, Superserver::Listener, &program));
        for _ in 0..2 {
            let mut client = server.connect();
            client.log_in_by_starttls(Pki::of(Key::P256));
            assert!(client.command("z LOGOUT").is_ok());
        }
        server.wait_log(": session ");
        let log = server.log();
        assert_eq!(count(&log, NO_LANDLOCK), times, "{log}");
        assert_eq!(count(&log, NO_MDWE), times, "{log}");
        let mut session = kernel.run(|| program.clone().flag("-v").start());
        session.client().greeting();
        let log = session.log();
        assert_eq!(count(&log, NO_LANDLOCK), times, "{log}");
        assert_eq!(count(&log, NO_MDWE), times, "{log}");
        // Without -v there is nothing: see `kernels`.
    }
    let check = |kernel: Kernel| {
        let program = Program::new(test).flag("--check");
        let output = kernel.run(|| program.run());
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stdout).unwrap()
    };
    let report = check(none);
    for words in [NO_LANDLOCK, NO_MDWE] {
        let warning = format!("warning: kernel: {words}");
        assert_eq!(count(&report, &warning), 1, "{report}");
    }
    let report = check(Kernel::OURS.landlock(3));
    assert_eq!(
        count(&report, "ok: kernel: has Landlock (ABI 3) and PR_SET_MDWE"),
        1,
        "{report}"
    );
    let warning = "warning: kernel: Landlock is there in part only (ABI 3)";
    assert_eq!(count(&report, warning), 1, "{report}");
    let report = check(Kernel::OURS);
    assert_eq!(count(&report, "warning: kernel: "), 0, "{report}");
}

pub(super) fn required(test: &Test) {
    let ours = Kernel::OURS;
    let cases = [
        (
            ours.without_landlock(libc::ENOSYS),
            "landlock",
            "landlock is required (--require), and this kernel or container has no Landlock (Function not implemented)",
        ),
        (
            ours.without_landlock(libc::EPERM),
            "mdwe:landlock",
            "landlock is required (--require), and this kernel or container has no Landlock (Operation not permitted)",
        ),
        (
            ours.landlock(5),
            "landlock=6",
            "landlock=6 is required (--require), and this kernel has Landlock ABI 5",
        ),
        (
            ours.without_mdwe(),
            "landlock=6:mdwe",
            "mdwe is required (--require), and this kernel or container has no PR_SET_MDWE (Invalid argument)",
        ),
    ];
    for (kernel, what, says) in cases {
        for policy in ["required", "optional", "implicit"] {
            let program = Program::new(test).tls(policy).env("IMAP_TLS_REQUIRE", what);
            let mut session = kernel.run(|| program.start());
            let (said, _) = session.client().read_to_end();
            let said = String::from_utf8(said).unwrap();
            assert_eq!(policy == "implicit", said.is_empty(), "{said}");
            assert!(
                said.is_empty() || said.starts_with("* BYE [UNAVAILABLE] "),
                "{said}"
            );
            session.close_client();
            assert_eq!(session.wait_code(), 100);
            assert!(session.log().contains(says), "{}", session.log());
        }
    }
    assert!(test.record().backends().is_empty());
    for (kernel, what, says) in cases {
        let program = Program::new(test).option("--require", what);
        let check = kernel.run(|| program.clone().flag("--check").run());
        assert_eq!(check.status.code(), Some(100));
        let report = String::from_utf8(check.stdout).unwrap();
        assert!(
            report.contains(&format!("error: kernel: {says}\n")),
            "{report}"
        );
        let at = format!("127.0.0.1:{}", free_port());
        let listener = kernel.run(|| program.clone().option("--listen", &at).run());
        assert_eq!(listener.status.code(), Some(100));
        let log = String::from_utf8(listener.stderr).unwrap();
        assert!(log.contains(says), "{log}");
    }
}

pub(super) fn satisfied(test: &Test) {
    for (kernel, what) in [
        (Kernel::OURS, "landlock=6:mdwe"),
        (Kernel::OURS.landlock(4).without_mdwe(), "landlock=4"),
        (Kernel::OURS.without_landlock(libc::ENOSYS), "mdwe"),
    ] {
        let program = Program::new(test).option("--require", what);
        let mut session = kernel.run(|| program.start());
        session.client().log_in_by_starttls(Pki::of(Key::P256));
        assert!(session.client().command("z LOGOUT").is_ok());
    }
}

/// systemd's groups of calls differ from version to version, and what a unit denies looks like a kernel that lacks it.
pub(super) fn units(_: &Test) {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/systemd");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        for line in text
            .lines()
            .filter(|line| line.starts_with("SystemCallFilter=@"))
        {
            seen += 1;
            for call in [
                "chroot",
                "landlock_create_ruleset",
                "landlock_restrict_self",
                "seccomp",
            ] {
                assert!(
                    line.split(' ').any(|word| word == call),
                    "{call} in {}",
                    path.display()
                );
            }
        }
    }
    assert_eq!(seen, 5);
}
