//! Bad set-ups: each is found before the first byte of the client, named in the log with the option that mends it, and the client
//! is told in its own protocol (DESIGN promise 5).

use crate::harness::*;
use libtest_mimic::Trial;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A way to break a set-up, and what the log must say about it.
pub struct Fault {
    pub name: &'static str,
    pub breaks: Change,
    pub says: &'static [&'static str],
}

pub const FAULTS: &[Fault] = &[
    // Certificates.
    Fault {
        name: "a certificate that is not there",
        breaks: |test, program| program.option("--cert", test.path("none.pem")),
        says: &[
            "cannot read certificate",
            "none.pem' (--cert): No such file or directory",
        ],
    },
    Fault {
        name: "a directory for a certificate",
        breaks: |test, program| program.option("--cert", test.dir()),
        says: &["cannot read certificate", "(--cert): not a regular file"],
    },
    Fault {
        name: "a certificate file with something else in it",
        breaks: |test, program| program.option("--cert", file(test, "cert", "hello\n", 0o644)),
        says: &[
            "cannot use certificate",
            "(--cert): no certificate in PEM form",
        ],
    },
    Fault {
        name: "a certificate file with the key in its place",
        breaks: |test, program| {
            let key = std::fs::read_to_string(&Pki::of(Key::P256).key).unwrap();
            program.option("--cert", file(test, "cert", &key, 0o600))
        },
        says: &[
            "cannot use certificate",
            "(--cert): no certificate in PEM form",
        ],
    },
    Fault {
        name: "a certificate in broken PEM",
        breaks: |test, program| {
            let text = "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
            program.option("--cert", file(test, "cert", text, 0o644))
        },
        says: &["cannot use certificate", "(--cert): malformed PEM"],
    },
    Fault {
        name: "a certificate in broken DER",
        breaks: |test, program| {
            let text = "-----BEGIN CERTIFICATE-----\nMAMBAf8=\n-----END CERTIFICATE-----\n";
            program.option("--cert", file(test, "cert", text, 0o644))
        },
        says: &["cannot use certificate", "(--cert): malformed certificate"],
    },
    Fault {
        name: "a certificate that has expired",
        breaks: |test, program| {
            let pki = Pki::make(&place(test).join("pki"), Key::P256, |params| {
                params.not_after = rcgen::date_time_ymd(2025, 6, 1);
            });
            program.pki(&pki)
        },
        says: &[
            "cannot use certificate",
            "(--cert): it expired on Jun",
            "2025",
            "renew it",
        ],
    },
    Fault {
        name: "a certificate that is not valid yet",
        breaks: |test, program| {
            let pki = Pki::make(&place(test).join("pki"), Key::P256, |params| {
                params.not_before = rcgen::date_time_ymd(2044, 1, 1);
            });
            program.pki(&pki)
        },
        says: &[
            "cannot use certificate",
            "(--cert): it is not valid before Jan",
            "2044",
            "clock",
        ],
    },
    Fault {
        name: "a FIFO for a certificate",
        breaks: |test, program| program.option("--cert", fifo(test)),
        says: &["cannot read certificate", "(--cert): not a regular file"],
    },
    Fault {
        name: "two certificates and one key",
        breaks: |_, program| program.also("--cert", &Pki::of(Key::P384).cert),
        says: &["--cert is given 2 times and --key 1 times"],
    },
    Fault {
        name: "a certificate's file with its key that everybody can read",
        breaks: |test, program| {
            let pki = Pki::of(Key::P256);
            let read = |path| std::fs::read_to_string(path).unwrap();
            let text = read(&pki.cert) + &read(&pki.key);
            program
                .without("--key")
                .option("--cert", file(test, "both.pem", &text, 0o644))
        },
        says: &[
            "cannot use private key in",
            "both.pem' (--cert): it is open to everybody (mode 0644): chmod o= it",
        ],
    },
    Fault {
        name: "two certificates with each other's keys",
        breaks: |_, program| {
            let (one, other) = (Pki::of(Key::P256), Pki::of(Key::P384));
            program
                .also("--cert", &other.cert)
                .option("--key", &other.key)
                .also("--key", &one.key)
        },
        says: &[
            "(--key) does not go with certificate",
            "the public keys differ",
        ],
    },
    Fault {
        name: "a certificate directory that is not there",
        breaks: |test, program| program.option("--cert-dir", test.path("none")),
        says: &[
            "cannot use directory",
            "none' (--cert-dir): No such file or directory",
        ],
    },
    Fault {
        name: "a file for a certificate directory",
        breaks: |_, program| program.option("--cert-dir", &Pki::of(Key::P256).cert),
        says: &["cannot use directory", "(--cert-dir): Not a directory"],
    },
    Fault {
        name: "a certificate directory that others can write to",
        breaks: |test, program| program.option("--cert-dir", directory(test, 0o777)),
        says: &[
            "cannot use directory",
            "(--cert-dir): others than its owner can write to it (mode 0777): chmod go-w it",
        ],
    },
    // Keys.
    Fault {
        name: "a FIFO for a key",
        breaks: |test, program| program.option("--key", fifo(test)),
        says: &["cannot read private key", "(--key): not a regular file"],
    },
    Fault {
        name: "a key that is not there",
        breaks: |test, program| program.option("--key", test.path("none.pem")),
        says: &[
            "cannot read private key",
            "none.pem' (--key): No such file or directory",
        ],
    },
    Fault {
        name: "a key that everybody can read",
        breaks: |test, program| program.option("--key", key_with_mode(test, 0o644)),
        says: &[
            "cannot read private key",
            "(--key): it is open to everybody (mode 0644)",
        ],
    },
    Fault {
        name: "a key that its group can write to",
        breaks: |test, program| program.option("--key", key_with_mode(test, 0o660)),
        says: &[
            "cannot read private key",
            "(--key): its group can write to it (mode 0660)",
        ],
    },
    Fault {
        name: "a key file without a key",
        breaks: |test, program| program.option("--key", file(test, "key", "hello\n", 0o600)),
        says: &[
            "cannot use private key",
            "(--key): no private key in PEM form",
        ],
    },
    Fault {
        name: "an empty key file",
        breaks: |test, program| program.option("--key", file(test, "key", "", 0o600)),
        says: &[
            "cannot use private key",
            "(--key): no private key in PEM form",
        ],
    },
    Fault {
        name: "an encrypted key",
        breaks: |test, program| {
            let text = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAMBAf8=\n-----END ENCRYPTED PRIVATE KEY-----\n";
            program.option("--key", file(test, "key", text, 0o600))
        },
        says: &["cannot use private key", "(--key): it is encrypted"],
    },
    Fault {
        name: "an encrypted key in the traditional form",
        breaks: |test, program| {
            let text = "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,0123456789ABCDEF\n\n\
                 MAMBAf8=\n-----END EC PRIVATE KEY-----\n";
            program.option("--key", file(test, "key", text, 0o600))
        },
        says: &["cannot use private key", "(--key): it is encrypted"],
    },
    Fault {
        name: "a chain that does not begin with our own certificate",
        breaks: |test, program| {
            let pki = Pki::of(Key::P256);
            let read = |path| std::fs::read_to_string(path).unwrap();
            let chain = read(&pki.ca) + &read(&pki.cert);
            program.option("--cert", file(test, "chain", &chain, 0o644))
        },
        says: &[
            "(--key) does not go with certificate",
            "(--cert): it goes with certificate 2 in that file: put our own first, then each one's issuer",
        ],
    },
    Fault {
        name: "a key of an unknown kind",
        breaks: |test, program| {
            let text = "-----BEGIN PRIVATE KEY-----\nMAMBAf8=\n-----END PRIVATE KEY-----\n";
            program.option("--key", file(test, "key", text, 0o600))
        },
        says: &["cannot use private key", "(--key): neither an RSA"],
    },
    Fault {
        name: "a key of another certificate",
        breaks: |_, program| program.option("--key", &Pki::of(Key::P384).key),
        says: &[
            "private key",
            "(--key) does not go with certificate",
            "(--cert): the public keys differ",
        ],
    },
    Fault {
        name: "an enormous key file",
        breaks: |test, program| {
            program.option("--key", file(test, "key", &"x".repeat(2 << 20), 0o600))
        },
        says: &[
            "cannot read private key",
            "(--key): larger than 1048576 octets",
        ],
    },
    // The backend.
    Fault {
        name: "a backend that is not there",
        breaks: |test, program| program.backend([test.path("none")]),
        says: &[
            "cannot execute the IMAP server",
            "none' (BACKEND): No such file or directory",
        ],
    },
    Fault {
        name: "a backend that is not in PATH",
        breaks: |_, program| program.backend(["no-such-imap-server"]),
        says: &[
            "cannot execute the IMAP server 'no-such-imap-server' (BACKEND): not found in PATH",
        ],
    },
    Fault {
        name: "a backend that is not executable",
        breaks: |test, program| program.backend([file(test, "backend", "#!/bin/sh\n", 0o644)]),
        says: &[
            "cannot execute the IMAP server",
            "(BACKEND): Permission denied",
        ],
    },
    Fault {
        name: "a backend that is a directory",
        breaks: |test, program| program.backend([test.dir()]),
        says: &[
            "cannot execute the IMAP server",
            "(BACKEND): not a regular file",
        ],
    },
    Fault {
        name: "no backend",
        breaks: |_, program| program.backend([] as [&str; 0]),
        says: &["no BACKEND"],
    },
    Fault {
        name: "a backend and a descriptor",
        breaks: |_, program| program.option("--backend-fd", "3"),
        says: &["--backend-fd and a BACKEND"],
    },
    Fault {
        name: "a descriptor that is not open",
        breaks: |_, program| {
            program
                .backend([] as [&str; 0])
                .option("--backend-fd", "77")
        },
        says: &["cannot use descriptor 77 as the backend (--backend-fd): Bad file"],
    },
    Fault {
        name: "a descriptor and an address to listen on",
        breaks: |_, program| {
            program
                .backend([] as [&str; 0])
                .option("--backend-fd", "3")
                .option("--listen", "127.0.0.1:0")
        },
        says: &["--backend-fd is one connection's, so it conflicts with --listen"],
    },
    // Options.
    Fault {
        name: "an address to listen on, twice",
        breaks: |_, program| program.env("IMAP_TLS_LISTEN", "143 127.0.0.1:143 [::]:143"),
        says: &["--listen [::]:143 is given more than once"],
    },
    Fault {
        name: "an address to listen on, and all of its port",
        breaks: |_, program| program.env("IMAP_TLS_LISTEN", "127.0.0.1:4143 4143"),
        says: &[
            "--listen 127.0.0.1:4143 and --listen [::]:4143 have addresses in common: leave one of them out",
        ],
    },
    Fault {
        name: "no certificate",
        breaks: |_, program| program.without("--cert"),
        says: &["no certificate: name its file with --cert"],
    },
    Fault {
        name: "no key",
        breaks: |_, program| program.without("--key"),
        says: &["in it: name the key's file with --key"],
    },
    Fault {
        name: "an unknown option",
        breaks: |_, program| program.option("--certificate", "x"),
        says: &["--certificate"],
    },
    Fault {
        name: "an unknown policy in the environment",
        breaks: |_, program| program.without("--tls").env("IMAP_TLS_TLS", "sometimes"),
        says: &["sometimes", "--tls"],
    },
    Fault {
        name: "a setting in the environment that there is not",
        breaks: |_, program| program.env("IMAP_TLS_CLIENTCA", "/etc/ca.pem"),
        says: &["there is no setting IMAP_TLS_CLIENTCA, which is in the environment"],
    },
    Fault {
        name: "an empty setting in the environment",
        breaks: |_, program| program.env("IMAP_TLS_CLIENT_CA", ""),
        says: &["IMAP_TLS_CLIENT_CA is empty: give it a value, or take it away"],
    },
    Fault {
        name: "an empty flag in the environment",
        breaks: |_, program| program.env("IMAP_TLS_STRICT_SNI", ""),
        says: &["IMAP_TLS_STRICT_SNI is empty: give it a value, or take it away"],
    },
    Fault {
        name: "a flag in the environment that is neither yes nor no",
        breaks: |_, program| program.env("IMAP_TLS_STRICT_SNI", "nope"),
        says: &["invalid value 'nope' for '--strict-sni': value was not a boolean"],
    },
    Fault {
        name: "both less and more in the log",
        breaks: |_, program| program.flag("--verbose").env("IMAP_TLS_QUIET", "yes"),
        says: &["--quiet and --verbose (or IMAP_TLS_QUIET and IMAP_TLS_VERBOSE)"],
    },
    Fault {
        name: "a revocation list that is too large for the memory limit",
        breaks: |test, program| {
            let pki = Pki::of(Key::P256);
            let list = file(test, "crl", &"0".repeat(1 << 20), 0o644);
            program
                .option("--client-ca", &pki.ca)
                .option("--client-crl", list)
                .option("--memory-limit", "31M")
        },
        says: &[
            "cannot use revocation list",
            "crl' (--client-crl): it has 1048576 octets",
            "raise --memory-limit",
        ],
    },
    Fault {
        name: "a memory limit in which nothing works",
        breaks: |_, program| program.option("--memory-limit", "1M"),
        says: &["--memory-limit"],
    },
    // Client certificates.
    Fault {
        name: "client authorities that are not there",
        breaks: |test, program| program.option("--client-ca", test.path("none.pem")),
        says: &[
            "cannot read certificate authorities",
            "none.pem' (--client-ca): No such file or directory",
        ],
    },
    Fault {
        name: "a file of client authorities with something else in it",
        breaks: |test, program| program.option("--client-ca", file(test, "ca", "hello\n", 0o644)),
        says: &[
            "cannot use client authorities",
            "(--client-ca): no certificate in PEM form",
        ],
    },
    Fault {
        name: "client authorities in broken PEM",
        breaks: |test, program| {
            let text = "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
            program.option("--client-ca", file(test, "ca", text, 0o644))
        },
        says: &[
            "cannot use client authorities",
            "(--client-ca): certificate 1: malformed PEM",
        ],
    },
    Fault {
        name: "a client authority that is none",
        breaks: |_, program| program.option("--client-ca", &Pki::of(Key::P256).cert),
        says: &[
            "cannot use client authorities",
            "(--client-ca): certificate 1: 'CN=localhost' is not an authority",
        ],
    },
    Fault {
        name: "a revocation list that is not there",
        breaks: |test, program| {
            let program = program.option("--client-ca", &Pki::of(Key::P256).ca);
            program.option("--client-crl", test.path("none.pem"))
        },
        says: &[
            "cannot read revocation list",
            "none.pem' (--client-crl): No such file or directory",
        ],
    },
    Fault {
        name: "a certificate for a revocation list",
        breaks: |_, program| {
            let ca = &Pki::of(Key::P256).ca;
            program.option("--client-ca", ca).option("--client-crl", ca)
        },
        says: &[
            "cannot use revocation list",
            "(--client-crl): no revocation list in it, neither in PEM form",
        ],
    },
    Fault {
        name: "a revocation list in broken DER, the second of two",
        breaks: |test, program| {
            let ca = Authority::make(&place(test).join("authority"), "client CA");
            let broken = file(test, "crl", "0\u{1}\u{2}\u{3}", 0o644);
            let lists = std::env::join_paths([ca.list(&[], 1000), broken]).unwrap();
            program
                .option("--client-ca", &ca.file)
                .option("--client-crl", lists)
        },
        says: &["cannot use revocation list", "/crl' (--client-crl): "],
    },
];

/// Those that only root can have.
pub const ROOT_FAULTS: &[Fault] = &[
    Fault {
        name: "an unknown user",
        breaks: |_, program| program.option("--user", "no-such-user"),
        says: &["unknown user 'no-such-user' (--user)"],
    },
    Fault {
        name: "an unknown group",
        breaks: |_, program| program.option("--group", "no-such-group"),
        says: &["unknown group 'no-such-group' (--group)"],
    },
    Fault {
        name: "an unknown keeper user",
        breaks: |_, program| program.option("--keeper-user", "no-such-user"),
        says: &["unknown user 'no-such-user' (--keeper-user)"],
    },
    Fault {
        name: "an unknown backend user",
        breaks: |_, program| program.option("--backend-user", "no-such-user"),
        says: &["unknown user 'no-such-user' (--backend-user)"],
    },
    Fault {
        name: "root as the network process's user",
        breaks: |_, program| program.option("--user", "root").without("--group"),
        says: &["user 'root' (--user) has uid 0 or gid 0"],
    },
    Fault {
        name: "root's group as the network process's",
        breaks: |_, program| program.option("--group", "0"),
        says: &["(--user) has uid 0 or gid 0"],
    },
    Fault {
        name: "root as the keeper's user",
        breaks: |_, program| program.option("--keeper-user", "0"),
        says: &["user '0' (--keeper-user) has uid 0 or gid 0"],
    },
    Fault {
        name: "one user for network process and keeper",
        breaks: |_, program| program.option("--keeper-user", NETWORK_ID.to_string()),
        says: &["--user and --keeper-user are both uid 61001"],
    },
    Fault {
        name: "the network process's user as the backend's",
        breaks: |_, program| {
            program
                .option("--user", "games")
                .without("--group")
                .option("--backend-user", "games")
        },
        says: &["--backend-user and --user are both uid"],
    },
    Fault {
        name: "the keeper's user as the backend's",
        breaks: |_, program| {
            program
                .option("--keeper-user", "games")
                .option("--backend-user", "games")
        },
        says: &["--backend-user and --keeper-user are both uid"],
    },
    Fault {
        name: "the keeper's user as the connector's",
        breaks: |_, program| {
            program
                .backend([""; 0])
                .option("--connect", "127.0.0.1:10143")
                .option("--keeper-user", "games")
                .option("--backend-user", "games")
        },
        says: &["--backend-user and --keeper-user are both uid"],
    },
    Fault {
        name: "a chroot directory that is not there",
        breaks: |test, program| program.option("--chroot", test.path("none")),
        says: &["none' (--chroot) cannot be opened: No such file or directory"],
    },
    Fault {
        name: "a chroot that is a file",
        breaks: |test, program| program.option("--chroot", file(test, "root", "", 0o644)),
        says: &["(--chroot) cannot be opened: Not a directory"],
    },
    Fault {
        name: "a chroot directory that the user can write to",
        breaks: |test, program| {
            let path = directory(test, 0o755);
            std::os::unix::fs::chown(&path, Some(NETWORK_ID), None).unwrap();
            program.option("--chroot", path)
        },
        says: &["(--chroot) belongs to uid 61001, not to root"],
    },
    Fault {
        name: "a chroot directory that everybody can write to",
        breaks: |test, program| program.option("--chroot", directory(test, 0o777)),
        says: &["(--chroot) is writable by others than root (mode 0777)"],
    },
    Fault {
        name: "a chroot directory with something in it",
        breaks: |test, program| {
            let path = directory(test, 0o755);
            write_file(&path.join("x"), "", 0o600);
            program.option("--chroot", path)
        },
        says: &["(--chroot) is not empty"],
    },
    Fault {
        name: "--unprivileged as root",
        breaks: |_, program| program.flag("--unprivileged"),
        says: &["--unprivileged is for a plain user"],
    },
];

/// What a test does to a set-up.
pub type Change = fn(&Test, Program) -> Program;

/// Sessions that must work though something about them is unusual.
const UNUSUAL: &[(&str, Change)] = &[
    (
        "a key that its group can read, as Debian's snakeoil key is",
        |test, program| program.option("--key", key_with_mode(test, 0o640)),
    ),
    ("certificate and key in one file", |test, program| {
        let pki = Pki::of(Key::P256);
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        let both = file(
            test,
            "both.pem",
            &(read(&pki.key) + &read(&pki.cert)),
            0o600,
        );
        program.option("--cert", &both).option("--key", &both)
    }),
    (
        "a certificate behind a symbolic link, as certbot lays it out",
        |test, program| {
            let link = test.path("live.pem");
            symlink(&Pki::of(Key::P256).cert, &link).unwrap();
            program.option("--cert", link)
        },
    ),
    ("every option from the environment", |_, program| {
        let settings = program.as_environment();
        let bare = [
            "--tls",
            "--cert",
            "--key",
            "--user",
            "--group",
            "--keeper-user",
            "--chroot",
            "--unprivileged",
        ]
        .iter()
        .fold(program.backend([] as [&str; 0]), |program, name| {
            program.without(name)
        });
        settings
            .iter()
            .fold(bare, |program, (name, value)| program.env(name, value))
    }),
    (
        "a flag where the environment says no to its opposite",
        |_, program| program.flag("--verbose").env("IMAP_TLS_QUIET", "no"),
    ),
    ("no PATH at all", |_, program| program.env("PATH", "")),
    (
        "the smallest memory limit that is accepted",
        |_, program| program.option("--memory-limit", "16M"),
    ),
];

/// Writes keys in the older forms.
const OPENSSL: &[Need] = &[Need::Command("openssl", "openssl")];

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for (faults, needs) in [(FAULTS, &[][..]), (ROOT_FAULTS, &[Need::Root][..])] {
        for fault in faults {
            tests.push(test(
                &format!("setup: {} is refused", fault.name),
                needs,
                |test| refused(test, fault),
            ));
        }
    }
    for (name, change) in UNUSUAL {
        tests.push(test(&format!("setup: {name} works"), &[], |test| {
            let mut session = change(test, Program::new(test)).start();
            let client = session.client();
            client.log_in_by_starttls(Pki::of(Key::P256));
            assert!(client.command("z LOGOUT").is_ok());
            session.close_client();
            assert_eq!(session.wait_code(), 0, "{}", session.log());
        }));
    }
    for kind in [Key::P256, Key::P384, Key::Ed25519, Key::Rsa2048] {
        let formats: &[Format] = match kind {
            Key::P256 | Key::P384 => &[Format::Pkcs8, Format::Sec1],
            Key::Ed25519 => &[Format::Pkcs8],
            Key::Rsa2048 => &[Format::Pkcs8, Format::Pkcs1],
        };
        for format in formats {
            tests.push(test(
                &format!("setup: a {kind:?} key in {format:?} form works in TLS 1.2 and 1.3"),
                OPENSSL,
                move |test| {
                    key_works(test, kind, *format);
                },
            ));
        }
    }
    tests.push(test(
        "setup: not started as root it asks for --unprivileged",
        &[Need::Root],
        not_root,
    ));
    tests.push(test(
        "setup: a backend that cannot be executed after all ends in a BYE inside TLS",
        &[],
        not_a_program,
    ));
    tests.push(test(
        "setup: without a connection it says what it is for",
        &[],
        no_connection,
    ));
    tests.push(test(
        "setup: what is to listen refuses the client that a superserver hands over",
        &[],
        listens,
    ));
    tests.push(test(
        "setup: with-settings names the file of settings, and prints nothing",
        &[],
        with_settings,
    ));
    tests.push(test(
        "setup: help goes to a terminal or a pager and never to a client",
        &[],
        help,
    ));
    tests
}

/// Where a broken set-up keeps its files.
fn place(test: &Test) -> PathBuf {
    let path = test.path("setup");
    if !path.exists() {
        make_dir(&path, 0o755);
    }
    path
}

fn file(test: &Test, name: &str, contents: &str, mode: u32) -> PathBuf {
    let path = place(test).join(name);
    write_file(&path, contents, mode);
    path
}

fn fifo(test: &Test) -> PathBuf {
    let path = place(test).join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    path
}

fn key_with_mode(test: &Test, mode: u32) -> PathBuf {
    file(
        test,
        "key.pem",
        &std::fs::read_to_string(&Pki::of(Key::P256).key).unwrap(),
        mode,
    )
}

fn directory(test: &Test, mode: u32) -> PathBuf {
    let path = place(test).join("chroot");
    make_dir(&path, mode);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    path
}

/// The fault under each policy: a BYE in clear, or nothing at all where TLS is expected; status 100; a log line; no backend.
fn refused(test: &Test, fault: &Fault) {
    for policy in ["required", "optional", "implicit"] {
        let program = (fault.breaks)(test, Program::new(test).tls(policy));
        let mut session = program.start_on(Socket::Tcp4, Handover::Stdio, Stderr::Log);
        // Whatever the client says first is not looked at.
        session.client().send_raw("a STARTTLS\r\n");
        let (said, end) = session.client().read_to_end();
        session.close_client();
        let said = String::from_utf8_lossy(&said).into_owned();
        // A policy that cannot be read is none; then the client is taken for one that expects IMAP.
        if policy == "implicit" && !fault.name.contains("policy") {
            assert_eq!(said, "", "{}", session.log());
        } else {
            assert!(
                said.starts_with("* BYE [UNAVAILABLE] ") && said.ends_with("\r\n"),
                "{said:?}: {}",
                session.log()
            );
            assert_eq!(said.lines().count(), 1, "{said:?}");
        }
        assert_eq!(end, End::Eof, "the client must see an orderly end");
        assert_eq!(session.wait_code(), 100, "{}", session.log());
        let log = session.log();
        let line = log
            .lines()
            .find(|line| fault.says.iter().all(|words| line.contains(words)));
        assert!(
            line.is_some(),
            "{policy}: no line with {:?} in: {log}",
            fault.says
        );
        assert!(line.unwrap().starts_with(&session.peer), "{log}");
        let _ = std::fs::remove_dir_all(test.path("setup"));
    }
    assert!(test.record().is_empty(), "a backend was started");
}

fn key_works(test: &Test, kind: Key, format: Format) {
    let pki = Pki::of(kind);
    let key = pki.key_as(format, test.dir());
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut session = Program::new(test).pki(pki).option("--key", &key).start();
        let client = session.client();
        client.greeting();
        client.starttls_with(&TlsOffer {
            versions: vec![version],
            ..TlsOffer::new(pki)
        });
        client.login();
        assert!(client.command("z LOGOUT").is_ok());
        session.close_client();
        assert_eq!(session.wait_code(), 0);
    }
}

fn not_root(test: &Test) {
    let mut session = Program::new(test).started_by(NETWORK_ID).start();
    let (said, _) = session.client().read_to_end();
    assert!(said.starts_with(b"* BYE [UNAVAILABLE] "));
    assert_eq!(session.wait_code(), 100);
    assert!(
        session.log().contains("--unprivileged"),
        "{}",
        session.log()
    );
}

/// What execve(2) alone can tell: a file with execute permission that is no program.
fn not_a_program(test: &Test) {
    let backend = file(test, "backend", "\x7fELF is not enough\n", 0o755);
    let mut session = Program::new(test).backend([backend]).start();
    let client = session.client();
    client.greeting();
    client.starttls(Pki::of(Key::P256));
    let (said, end) = client.read_to_end();
    assert!(
        said.starts_with(b"* BYE [UNAVAILABLE] "),
        "{}",
        String::from_utf8_lossy(&said)
    );
    assert_eq!(end, End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_code(), 100);
    assert!(
        session.log().contains("(BACKEND): Exec format error"),
        "{}",
        session.log()
    );
}

/// Else it would be closed without a word, and there would be another listener for each client that comes.
fn listens(test: &Test) {
    let address = format!("127.0.0.1:{}", free_port());
    let option = Program::new(test).option("--listen", &address);
    let variable = Program::new(test).env("IMAP_TLS_LISTEN", &address);
    for (program, socket, handover) in [
        (&option, Socket::Tcp4, Handover::Stdio),
        (&variable, Socket::Unix, Handover::Stdio),
        (&variable, Socket::Tcp4, Handover::ListenFd),
    ] {
        let mut session = program.start_on(socket, handover, Stderr::Log);
        let (said, end) = session.client().read_to_end();
        assert!(said.starts_with(b"* BYE [UNAVAILABLE] "), "{said:?}");
        assert_eq!(end, End::Eof);
        session.close_client();
        assert_eq!(session.wait_code(), 100);
        let log = session.log();
        let expected = format!(
            "{}: --listen (IMAP_TLS_LISTEN), but a superserver has handed over a client's connection: one or the other",
            session.peer
        );
        assert!(log.contains(&expected), "{log}");
        assert!(!log.contains("listening on"), "{log}");
    }
    assert!(test.record().is_empty(), "a backend was started");
}

fn no_connection(test: &Test) {
    let output = Program::new(test).run();
    assert_eq!(output.status.code(), Some(100));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.starts_with("imap-tls: standard input is no connection"),
        "{text}"
    );
    assert_eq!(output.stdout, b"");
}

/// The program reads the file: what a script did not understand of it would silently not hold.
fn with_settings(test: &Test) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/with-settings");
    let command = r#"echo "$*: $IMAP_TLS_SETTINGS""#;
    let output = Tool::new(test, script.to_str().unwrap())
        .args(["sh", "-c", command, "sh", "a b", "c"])
        .run()
        .success();
    assert_eq!(output.text(), "a b c: /etc/imap-tls/imap-tls.conf\n");
}

fn help(test: &Test) {
    let bare = |flag| {
        let program = Program::new(test).backend([] as [&str; 0]).flag(flag);
        ["--tls", "--cert", "--key"]
            .iter()
            .fold(program, |program, name| program.without(name))
    };
    for (flag, expected) in [
        ("--help", "Usage: imap-tls [OPTIONS] [--] BACKEND [ARGS]..."),
        ("--version", "imap-tls 0."),
    ] {
        for program in [
            bare(flag),
            bare(flag).env("IMAP_TLS_STRICT_SNI", ""),
            bare(flag).env("IMAP_TLS_SETTINGS", test.path("none")),
        ] {
            let output = program.run();
            assert_eq!(output.status.code(), Some(0));
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(text.contains(expected), "{text}");
            assert!(text.lines().all(|line| line.len() <= 80), "{text}");
        }
        for socket in [Socket::Pair, Socket::UnixOutgoing] {
            let program = bare(flag).without_input();
            let mut session = program.start_on(socket, Handover::Stdio, Stderr::Log);
            let (said, _) = session.client().read_to_end();
            let text = String::from_utf8(said).unwrap();
            assert!(text.contains(expected), "{socket:?}: {text}");
            session.close_client();
            assert_eq!(session.wait_code(), 0, "{socket:?}");
        }
        let mut session = bare(flag).start();
        let (said, _) = session.client().read_to_end();
        assert_eq!(said, b"", "a client got the help");
        session.client().patience = Duration::from_secs(20);
        assert_eq!(session.wait_code(), 100);
    }
}
