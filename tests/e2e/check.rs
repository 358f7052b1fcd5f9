//! `--check`: every bad set-up of setup.rs is found by it too, in the same words, without a connection; and some that a session
//! would not mind, or would meet too late.

use crate::certificates::{certificate, directory, file_as_certbot, file_whole};
use crate::harness::*;
use crate::ocsp;
use crate::setup::{FAULTS, Fault, ROOT_FAULTS};
use libtest_mimic::Trial;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

pub fn tests() -> Vec<Trial> {
    let mut tests = vec![
        test(
            "check: a good set-up passes, in text and in JSON",
            &[Need::Root],
            good,
        ),
        test(
            "check: a client on standard output does not get the report",
            &[],
            client,
        ),
        test(
            "check: a socket on standard output that is no client's gets the report",
            &[],
            no_client,
        ),
        test(
            "check: a listener of ours has the address it listens on, and not others of its port",
            &[],
            addresses,
        ),
        test(
            "check: a unix socket cannot be listened on where a listener would fail, and is left alone",
            &[],
            unix_sockets,
        ),
        test(
            "check: another daemon on the port is named, with what to do",
            &[
                Need::Root,
                Need::Command("unshare", "util-linux"),
                Need::Command("python3", "python3"),
            ],
            stranger,
        ),
    ];
    for (faults, needs) in [(FAULTS, &[][..]), (ROOT_FAULTS, &[Need::Root][..])] {
        // A descriptor is there in a session only.
        for fault in faults
            .iter()
            .filter(|fault| fault.name != "a descriptor that is not open")
        {
            tests.push(test(
                &format!("check: {} is found", fault.name),
                needs,
                |test| found(test, fault),
            ));
        }
    }
    for (name, level, change, says) in ADVICE {
        tests.push(test(
            &format!("check: {name} is pointed out"),
            &[],
            |test| {
                advised(test, level, *change, says);
            },
        ));
    }
    for (name, needs, change, reason) in UNEXECUTABLE {
        tests.push(test(
            &format!("check: {name} is found, with the system's reason"),
            needs,
            |test| unexecutable(test, *change, reason),
        ));
    }
    tests
}

// Few enough to be looked at one by one, too many to lose some unnoticed.
const _: () = assert!(FAULTS.len() + ROOT_FAULTS.len() + ADVICE.len() > 50);

fn found(test: &Test, fault: &Fault) {
    let output = (fault.breaks)(test, Program::new(test))
        .flag("--check")
        .run();
    let report = String::from_utf8(output.stdout).unwrap();
    let line = report
        .lines()
        .find(|line| fault.says.iter().all(|words| line.contains(words)));
    let line = line.unwrap_or_else(|| panic!("no line with {:?} in: {report}", fault.says));
    assert!(line.starts_with("error: "), "{line}");
    assert_eq!(output.status.code(), Some(100), "{report}");
}

type Unexecutable = (
    &'static str,
    &'static [Need],
    fn(&Test, Program) -> Program,
    &'static str,
);

/// Backends that are there, and yet cannot be executed, which execve(2) alone can tell.
const UNEXECUTABLE: &[Unexecutable] = &[
    (
        "a backend in a directory that its user cannot enter",
        &[Need::Root],
        |test, program| {
            make_dir(&test.path("closed"), 0o700);
            let backend = test.path("closed/backend");
            write_file(&backend, "#!/bin/sh\n", 0o755);
            program.backend([backend]).option("--backend-user", "games")
        },
        "Permission denied",
    ),
    (
        "a script without an interpreter as the backend",
        &[],
        |test, program| {
            let backend = test.path("script");
            write_file(&backend, "echo '* OK hello'\n", 0o755);
            program.backend([backend])
        },
        "Exec format error",
    ),
    (
        "a script with line ends of another system as the backend",
        &[],
        |test, program| {
            let backend = test.path("script");
            write_file(&backend, "#!/bin/sh\r\necho '* OK hello'\r\n", 0o755);
            program.backend([backend])
        },
        "No such file or directory",
    ),
];

fn unexecutable(test: &Test, change: fn(&Test, Program) -> Program, reason: &str) {
    let program = change(test, Program::new(test));
    let backend = program.command_line().pop().unwrap();
    let backend = backend.to_str().unwrap();
    let is_there = format!("'{backend}' is there");
    let fault = format!("cannot execute the IMAP server '{backend}' (BACKEND): {reason}");
    for format in ["text", "json"] {
        let output = program.clone().flag(&format!("--check={format}")).run();
        assert!(output.stderr.is_empty(), "{output:?}");
        let report = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(100), "{report}");
        for (level, text) in [("ok", &is_there), ("error", &fault)] {
            if format == "text" {
                let line = format!("{level}: backend: {text}\n");
                assert!(report.contains(&line), "{line}: {report}");
            } else {
                let findings: serde_json::Value = serde_json::from_str(&report).unwrap();
                let finding = serde_json::json!({
                    "level": level,
                    "subject": "backend",
                    "text": text,
                });
                assert!(findings.as_array().unwrap().contains(&finding), "{report}");
            }
        }
        assert!(!report.contains("by hand"), "{report}");
    }
}

type Advice = (
    &'static str,
    &'static str,
    fn(&Test, Program) -> Program,
    &'static [&'static str],
);

const ADVICE: &[Advice] = &[
    (
        "a directory of ticket keys that was not there",
        "ok",
        |test, program| program.option("--ticket-keys", test.path("tickets")),
        &[
            "tickets: sessions are resumed:",
            "/tickets' was not there, and is now a directory",
        ],
    ),
    (
        "a directory of ticket keys",
        "ok",
        |test, program| {
            make_dir(&test.path("tickets"), 0o700);
            program.option("--ticket-keys", test.path("tickets"))
        },
        &["/tickets' is a directory with keys that only this machine has"],
    ),
    (
        "a file of ticket keys",
        "ok",
        |test, program| {
            let file = test.path("ticket-keys");
            write_file(&file, "0123456789abcdef".repeat(4), 0o600);
            program.option("--ticket-keys", file)
        },
        &["/ticket-keys' has keys that this machine did not make"],
    ),
    (
        "a certificate that expires soon",
        "warning",
        |test, program| {
            let pki = Pki::make(&test.path("pki"), Key::P256, |params| {
                let day = std::time::Duration::from_secs(86_400);
                params.not_after = (std::time::SystemTime::now() + 10 * day).into();
            });
            program.pki(&pki)
        },
        &["certificate: valid for", "more days", "renew it"],
    ),
    (
        "a certificate without names",
        "warning",
        |test, program| {
            let pki = Pki::make(&test.path("pki"), Key::P256, |params| {
                params.subject_alt_names.clear()
            });
            program.pki(&pki)
        },
        &["it has no subjectAltName"],
    ),
    (
        "a certificate that is not for servers",
        "error",
        |test, program| {
            let pki = Pki::make(&test.path("pki"), Key::P256, |params| {
                params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
            });
            program.pki(&pki)
        },
        &["certificate: it is not for servers (no serverAuth"],
    ),
    (
        "a certificate that demands a stapled response",
        "error",
        |test, program| program.pki(&must_staple(test)),
        &[
            "certificate: it demands a stapled OCSP response (must-staple), and there is none",
            "give --ocsp FILE",
        ],
    ),
    (
        "a certificate in the directory that demands a stapled response",
        "error",
        |test, program| {
            file_whole(test, "mail.example", &must_staple(test));
            program.option("--cert-dir", directory(test))
        },
        &[
            "certificate: mail.example: it demands a stapled OCSP response (must-staple)",
            "--ocsp is for --cert alone",
        ],
    ),
    (
        "a chain whose next certificate has another key than the issuer",
        "error",
        |test, program| {
            let namesake = Authority::make(&test.path("namesake"), "imap-tls test CA");
            let read = |path| std::fs::read_to_string(path).unwrap();
            let chain = test.path("chain.pem");
            write_file(
                &chain,
                read(&Pki::of(Key::P256).cert) + &read(&namesake.file),
                0o644,
            );
            program.option("--cert", chain)
        },
        &["certificate chain:", "is not signed with the key of the"],
    ),
    (
        "a chain without its issuer",
        "warning",
        |_, program| program,
        &["certificate chain: only our own certificate is in the file"],
    ),
    (
        "a chain in the wrong order",
        "error",
        |test, program| {
            let pki = Pki::of(Key::P256);
            let read = |path| std::fs::read_to_string(path).unwrap();
            let chain = test.path("chain.pem");
            write_file(&chain, read(&pki.cert) + &read(&pki.cert), 0o644);
            program.option("--cert", chain)
        },
        &["certificate chain:", "was issued by", "put our own first"],
    ),
    (
        "a revocation list that has expired",
        "error",
        |test, program| {
            let ca = Authority::make(&test.path("clients"), "client CA");
            program
                .option("--client-ca", &ca.file)
                .option("--client-crl", ca.list(&[], -86_400))
        },
        &["client certificates: no client's certificate is accepted"],
    ),
    (
        "a revocation list that is to be renewed soon",
        "warning",
        |test, program| {
            let ca = Authority::make(&test.path("clients"), "client CA");
            program
                .option("--client-ca", &ca.file)
                .option("--client-crl", ca.list(&[], 86_400))
        },
        &[
            "client certificates: revocation list of 'CN=client CA'",
            "it is to be renewed by",
        ],
    ),
    (
        "a revocation list of no authority",
        "warning",
        |test, program| {
            let ca = Authority::make(&test.path("clients"), "client CA");
            let foreign = Authority::make(&test.path("foreign"), "foreign CA");
            let year = 365 * 86_400;
            program
                .option("--client-ca", &ca.file)
                .option("--client-crl", ca.list(&[], year))
                .also("--client-crl", foreign.list(&[], year))
        },
        &[
            "client certificates: revocation list of 'CN=foreign CA'",
            "no authority of --client-ca has signed it",
        ],
    ),
    (
        "a key that its group can read",
        "warning",
        |test, program| {
            let key = test.path("key.pem");
            write_file(&key, std::fs::read(&Pki::of(Key::P256).key).unwrap(), 0o600);
            open_to_group(&key);
            program.option("--key", key)
        },
        &["key file:", "can read it too (mode 0640)"],
    ),
    (
        "a key in the directory that its group can read",
        "warning",
        |test, program| {
            file_as_certbot(test, "mail.example", Pki::of(Key::P256));
            open_to_group(&directory(test).join("mail.example/privkey.pem"));
            program.option("--cert-dir", directory(test))
        },
        &["key file: mail.example: ", "can read it too (mode 0640)"],
    ),
    (
        "a key with its certificate in the directory that its group can read",
        "warning",
        |test, program| {
            file_whole(test, "mail.example", Pki::of(Key::P256));
            open_to_group(&directory(test).join("mail.example.pem"));
            program.option("--cert-dir", directory(test))
        },
        &["key file: mail.example: ", "can read it too (mode 0640)"],
    ),
    (
        "a file in the directory that is called in capitals",
        "warning",
        |test, program| {
            file_whole(test, "Mail.Example", Pki::of(Key::P256));
            program.option("--cert-dir", directory(test))
        },
        &[
            "certificate directory: ",
            "/Mail.Example.pem' is never used, since names are looked for in lower case: rename it",
        ],
    ),
    (
        "certbot's duplicate of a certificate in the directory",
        "warning",
        |test, program| {
            let pki = certificate(test, Key::P256, &["mail.example", "imap.example"]);
            file_as_certbot(test, "mail.example", &pki);
            file_as_certbot(test, "mail.example-0001", &pki);
            program.option("--cert-dir", directory(test))
        },
        &[
            "certificate directory: ",
            "/mail.example-0001' is for mail.example, imap.example, so it is never shown",
            "a client that asks for 'mail.example-0001' is refused: call it after a name that it is for (certbot: --cert-name)",
        ],
    ),
    (
        "a certificate under its domain that is not for that",
        "warning",
        |test, program| {
            let pki = certificate(test, Key::P256, &["*.domain.example"]);
            file_as_certbot(test, "domain.example", &pki);
            program.option("--cert-dir", directory(test))
        },
        &[
            "certificate directory: ",
            "/domain.example' is for *.domain.example; a client that asks for 'domain.example' itself is refused",
        ],
    ),
    (
        "a certificate under its domain",
        "ok",
        |test, program| {
            let pki = certificate(test, Key::P256, &["mail.domain.example"]);
            file_whole(test, "domain.example", &pki);
            program.option("--cert-dir", directory(test))
        },
        &["certificate: domain.example: it is for mail.domain.example"],
    ),
    (
        "a backend that greets PREAUTH under required",
        "error",
        |_, program| program.play(&Backend::greeting("* PREAUTH welcome")),
        &["backend: it greets PREAUTH", "--tls implicit"],
    ),
    (
        "a backend that says BYE",
        "error",
        |_, program| program.play(&Backend::scenario("bye", &[])),
        &["backend: it says BYE"],
    ),
    (
        "a backend that ends without a greeting",
        "error",
        |_, program| program.backend(["/bin/true"]),
        &["'/bin/true' (BACKEND) ends without a greeting"],
    ),
    (
        "a backend that is no IMAP server",
        "error",
        |_, program| program.backend(["/bin/echo", "hello\u{1b}[31m"]),
        &["'/bin/echo' (BACKEND) says \"hello\\x1b[31m\", which is no IMAP greeting"],
    ),
    (
        "a backend that says nothing",
        "error",
        |_, program| program.play(&Backend::scenario("silent", &[])),
        &["(BACKEND) says nothing within 10 s"],
    ),
];

/// Lets a group read it that is not root's, whoever runs the test.
fn open_to_group(key: &Path) {
    std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let _ = std::os::unix::fs::chown(key, None, Some(61_005));
}

fn must_staple(test: &Test) -> Pki {
    Pki::make(&test.path("pki"), Key::P256, |params| {
        params.custom_extensions.push(ocsp::must_staple());
    })
}

fn advised(test: &Test, level: &str, change: fn(&Test, Program) -> Program, says: &[&str]) {
    let output = change(test, Program::new(test)).flag("--check").run();
    let report = String::from_utf8(output.stdout).unwrap();
    let line = report
        .lines()
        .find(|line| says.iter().all(|words| line.contains(words)));
    let line = line.unwrap_or_else(|| panic!("no line with {says:?} in: {report}"));
    assert!(line.starts_with(&format!("{level}: ")), "{line}");
    let is_error = report.lines().any(|line| line.starts_with("error: "));
    assert_eq!(is_error, level == "error", "{report}");
    assert_eq!(
        output.status.code(),
        Some(if is_error { 100 } else { 0 }),
        "{report}"
    );
    test.record().release();
}

fn good(test: &Test) {
    for policy in ["required", "optional", "implicit"] {
        let output = Program::new(test).tls(policy).flag("--check").run();
        let report = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{report}");
        for expected in [
            "ok: network process: ",
            "ok: keeper: ",
            "ok: chroot: ",
            "ok: sandbox: chroot, ids, limits, no_new_privs and system call filter work",
            "ok: certificate and key: they match",
            "ok: certificate: it is for localhost, mail.example, 127.0.0.1, ::1",
            "ok: backend: it greets: * OK ",
        ] {
            assert!(report.contains(expected), "{expected} is not in: {report}");
        }
        assert!(!report.contains("error: "), "{report}");
    }
    let output = Program::new(test).flag("--check=json").run();
    let report = String::from_utf8(output.stdout).unwrap();
    let findings: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert!(
        findings
            .as_array()
            .unwrap()
            .iter()
            .all(|finding| finding["level"] != "error"),
        "{report}"
    );
    assert!(
        findings
            .as_array()
            .unwrap()
            .iter()
            .any(|finding| finding["subject"] == "sandbox")
    );
}

/// Where the port is free, taken in vain, and taken: in a network of its own, so that it is this test's to take.
fn stranger(test: &Test) {
    let check = |script: &str, policy: &str| {
        let program = Program::new(test).tls(policy).flag("--check");
        let output = Tool::new(test, "unshare")
            .args(["--net", "python3", "-c", script])
            .args(program.command_line())
            .envs(program.environment().clone())
            .run();
        assert_eq!(output.status.code(), Some(0), "{}", output.text());
        output.text()
    };
    let listening = "import socket, subprocess, sys\n\
        listener = socket.create_server(('0.0.0.0', 143))\n\
        sys.exit(subprocess.run(sys.argv[1:]).returncode)";
    let report = check(listening, "required");
    let line = report
        .lines()
        .find(|line| line.starts_with("warning: port: 143 is listened on by 'python3' (pid "));
    let line = line.unwrap_or_else(|| panic!("{report}"));
    assert!(line.contains(", so clients get that and not imap-tls: "));
    // The other port is free.
    let report = check(listening, "implicit");
    assert!(
        report.contains("warning: port: nobody listens on 993: enable the socket"),
        "{report}"
    );
}

fn addresses(test: &Test) {
    let server = Server::start(test, Superserver::Listener, &Program::new(test));
    let port = server.port;
    let check = |address: &str| {
        let program = Program::new(test).option("--listen", format!("{address}:{port}"));
        let output = program.flag("--check").run();
        let report = String::from_utf8(output.stdout).unwrap();
        let mut lines = report.lines();
        let line = lines.find(|line| line.contains("listen") && line.contains(address));
        line.unwrap_or_else(|| panic!("{report}")).to_owned()
    };
    let ours = format!("'imap-tls' (pid {}", server.process().0);
    for (address, level, says) in [
        ("127.0.0.1", "ok", [ours.as_str(), "listens on 127.0.0.1"]),
        ("127.0.0.2", "ok", ["127.0.0.2", "can be listened on"]),
        (
            "0.0.0.0",
            "error",
            [
                "(--listen): Address already in use: 'imap-tls' (pid ",
                "has a part of it: stop that one first",
            ],
        ),
    ] {
        let line = check(address);
        assert!(line.starts_with(&format!("{level}: listener: ")), "{line}");
        assert!(says.iter().all(|words| line.contains(words)), "{line}");
    }
}

fn unix_sockets(test: &Test) {
    let path = test.path("socket");
    let long = test.path(&"x".repeat(120));
    let program = |path: &Path| {
        let address = format!("unix:{}", path.display());
        Program::new(test).option("--listen", address)
    };
    let check = |path: &Path| {
        let output = program(path).flag("--check").run();
        let report = String::from_utf8(output.stdout).unwrap();
        let mut lines = report.lines();
        let line = lines.find(|line| line.contains(": listener: "));
        line.unwrap_or_else(|| panic!("{report}")).to_owned()
    };
    let assert_fails = |path: &Path, says: &str| {
        let line = check(path);
        let start = "error: listener: cannot listen on unix:";
        assert!(line.starts_with(start) && line.contains(says), "{line}");
        assert_eq!(program(path).run().status.code(), Some(100), "{says}");
    };
    let says = format!("ok: listener: unix:{} can be listened on", path.display());
    assert_eq!(check(&path), says);
    assert_fails(&long, "(--listen): File name too long");
    std::fs::write(&path, "precious").unwrap();
    assert_fails(&path, "(--listen): it is there already, and is no socket");
    std::fs::remove_file(&path).unwrap();
    let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let own = std::process::id();
    let line = check(&path);
    let says = "(--listen): Address already in use: 'e2e-";
    assert!(
        line.contains(says) && line.contains(&format!("(pid {own}")),
        "{line}"
    );
    other.set_nonblocking(true).unwrap();
    assert!(other.accept().is_err(), "it was connected to");
    assert_fails(&path, says);
    // Left behind, as after kill -9.
    drop(other);
    let says = format!("ok: listener: unix:{} can be listened on", path.display());
    assert_eq!(check(&path), says);
    let running = Service::start_without_waiting(test, &program(&path));
    eventually("it listens", || {
        running.log().contains("listening on").then_some(())
    });
    let line = check(&path);
    assert!(line.starts_with("ok: listener: 'imap-tls' (pid "), "{line}");
    assert!(line.contains(") listens on unix:"), "{line}");
}

fn client(test: &Test) {
    // The last as something that accepts by itself, and starts programs on a pair, has them.
    for socket in [Socket::Tcp4, Socket::Tcp6, Socket::Unix, Socket::Pair] {
        let program = Program::new(test).flag("--check");
        let mut session = program.start_on(socket, Handover::Stdio, Stderr::Log);
        let (said, _) = session.client().read_to_end();
        assert_eq!(said, b"", "{socket:?}");
        session.close_client();
        assert_eq!(session.wait_code(), 100, "{socket:?}");
    }
}

/// As Node has them for a program's output, and as the journal's is.
fn no_client(test: &Test) {
    for socket in [Socket::Pair, Socket::UnixOutgoing] {
        let program = Program::new(test).flag("--check").without_input();
        let mut session = program.start_on(socket, Handover::Stdio, Stderr::Log);
        let (said, _) = session.client().read_to_end();
        let report = String::from_utf8(said).unwrap();
        assert!(
            report.contains("ok: backend: it greets: * OK "),
            "{socket:?}: {report}"
        );
        assert!(report.contains(": log: "), "{socket:?}: {report}");
        session.close_client();
        assert_eq!(session.wait_code(), 0, "{socket:?}: {report}");
    }
}
