//! Which certificate a client is shown: by the kinds of signatures that it takes and by the name that it asks for; what is wrong with
//! one name's files is that name's trouble alone; new files serve the next connection. And the opener, which reads them.

use crate::harness::ptrace::{Arg, Outcome, inject};
use crate::harness::*;
use libtest_mimic::Trial;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

const OPENSSL: Need = Need::Command("openssl", "openssl");
const TCPSERVER: Need = Need::Command("tcpserver", "ucspi-tcp");

pub fn tests() -> Vec<Trial> {
    let mut tests = vec![
        test(
            "certificates: a client that takes only RSA gets RSA, others the first",
            &[OPENSSL, TCPSERVER],
            kinds,
        ),
        test(
            "certificates: a file that holds both, and several of them",
            &[OPENSSL, TCPSERVER],
            in_one_file,
        ),
        test(
            "certificates: each name in the directory has its own, however it is filed",
            &[OPENSSL, TCPSERVER],
            by_name,
        ),
        test(
            "certificates: what is wrong with a domain's file is no trouble of names that it is not for",
            &[OPENSSL, TCPSERVER],
            broken_domain,
        ),
        test(
            "certificates: without a default, unknown and missing names are unrecognized",
            &[OPENSSL, TCPSERVER],
            |test| unrecognized(test, false),
        ),
        test(
            "certificates: with --strict-sni, unknown and missing names are unrecognized",
            &[OPENSSL, TCPSERVER],
            |test| unrecognized(test, true),
        ),
        test(
            "certificates: a name that could be a path opens nothing",
            &[OPENSSL, TCPSERVER],
            paths,
        ),
        test(
            "certificates: by name after a HelloRetryRequest too",
            &[OPENSSL, TCPSERVER],
            hello_retry,
        ),
        test(
            "certificates: new files serve the next connection, and old sessions live on",
            &[],
            replaced,
        ),
        test(
            "certificates: a new file in the directory serves the next connection",
            &[],
            replaced_in_directory,
        ),
        test(
            "certificates: the opener can read files and do nothing else",
            &[Need::Root],
            opener_is_confined,
        ),
        test(
            "certificates: the opener is refused every other system call",
            &[Need::Root, Need::X86_64],
            opener_is_refused,
        ),
        test(
            "certificates: the opener ends with the handshake, and with the connection",
            &[Need::Root],
            opener_ends,
        ),
        test(
            "certificates: without its opener a handshake fails and nothing else",
            &[Need::Root],
            opener_is_killed,
        ),
        test(
            "certificates: a listener whose opener was killed has another, and a keeper",
            &[Need::Root],
            |test| opener_is_lost(test, libc::SIGKILL),
        ),
        test(
            "certificates: a listener whose opener answered late has another, and a keeper",
            &[Need::Root],
            |test| opener_is_lost(test, libc::SIGSTOP),
        ),
    ];
    for case in BROKEN {
        tests.push(test(
            &format!(
                "certificates: {} in the directory is that name's trouble, until it is mended",
                case.name
            ),
            &[OPENSSL, TCPSERVER],
            move |test| broken(test, case),
        ));
    }
    tests
}

// ---- certificates and clients ----

/// A certificate for these names; the first one is its subject.
pub fn certificate(test: &Test, kind: Key, names: &[&str]) -> Pki {
    let directory = test.path(&format!("pki-{}", next_number()));
    Pki::make(&directory, kind, |params| {
        params.subject_alt_names = names
            .iter()
            .map(|name| rcgen::SanType::DnsName((*name).try_into().unwrap()))
            .collect();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, names[0]);
    })
}

/// Certificate and key as one text.
fn both(pki: &Pki) -> String {
    [&pki.cert, &pki.key]
        .map(|path| fs::read_to_string(path).unwrap())
        .concat()
}

pub fn directory(test: &Test) -> PathBuf {
    let path = test.path("live");
    if !path.exists() {
        make_dir(&path, 0o755);
    }
    path
}

/// Files a certificate as `NAME.pem`.
pub fn file_whole(test: &Test, name: &str, pki: &Pki) {
    write_file(
        &directory(test).join(format!("{name}.pem")),
        both(pki),
        0o600,
    );
}

/// Files it as certbot does: links in `live`, files in `archive`.
pub fn file_as_certbot(test: &Test, name: &str, pki: &Pki) {
    let archive = test.path("archive");
    if !archive.exists() {
        make_dir(&archive, 0o700);
    }
    make_dir(&archive.join(name), 0o755);
    make_dir(&directory(test).join(name), 0o755);
    for (source, file, mode) in [
        (&pki.cert, "fullchain", 0o644),
        (&pki.key, "privkey", 0o600),
    ] {
        write_file(
            &archive.join(name).join(format!("{file}1.pem")),
            fs::read(source).unwrap(),
            mode,
        );
        symlink(
            format!("../../archive/{name}/{file}1.pem"),
            directory(test).join(name).join(format!("{file}.pem")),
        )
        .unwrap();
    }
}

/// What `openssl s_client` meets: the subject of the certificate that it is shown, once the whole handshake has succeeded, or
/// the alert in its words.
fn shown(test: &Test, server: &Server, arguments: &[&str]) -> Result<String, String> {
    let target = format!("127.0.0.1:{}", server.port);
    let text = Tool::new(test, "openssl")
        .args(["s_client", "-starttls", "imap", "-ign_eof", "-crlf"])
        .args(["-connect", &target])
        .args(arguments)
        .input("z LOGOUT\n")
        .run()
        .text();
    let after = |start: &str| {
        let line = text.lines().find_map(|line| line.split_once(start));
        line.map(|(_, rest)| rest.split(':').next().unwrap().trim().to_owned())
    };
    if text.contains("z OK ") {
        return Ok(after("subject=CN = ").unwrap_or_else(|| panic!("no subject: {text}")));
    }
    Err(after(":ssl3_read_bytes:").unwrap_or_else(|| panic!("no alert: {text}")))
}

fn shown_for(test: &Test, server: &Server, name: &str) -> Result<String, String> {
    shown(test, server, &["-servername", name])
}

fn start(test: &Test, program: &Program) -> Server {
    Server::start(test, Superserver::Tcpserver, program)
}

/// A client that asks for this name, and trusts that certificate.
fn offer_for(name: &str, pki: &Pki) -> TlsOffer {
    TlsOffer {
        server_name: name.to_owned(),
        ..TlsOffer::new(pki)
    }
}

fn serving_directory(test: &Test) -> Program {
    Program::new(test).option("--cert-dir", directory(test))
}

// ---- kinds ----

fn kinds(test: &Test) {
    let ecdsa = certificate(test, Key::P256, &["ecdsa", "localhost"]);
    let rsa = certificate(test, Key::Rsa2048, &["rsa", "localhost"]);
    for (first, second) in [(&ecdsa, &rsa), (&rsa, &ecdsa)] {
        let program = Program::new(test)
            .pki(first)
            .also("--cert", &second.cert)
            .also("--key", &second.key);
        let server = start(test, &program);
        let preferred = if first.kind == Key::P256 {
            "ecdsa"
        } else {
            "rsa"
        };
        let clients: [(&[&str], &str); 8] = [
            (&["-tls1_3"], preferred),
            (&["-tls1_2"], preferred),
            (&["-tls1_3", "-sigalgs", "RSA-PSS+SHA256"], "rsa"),
            (&["-tls1_2", "-sigalgs", "RSA-PSS+SHA256:RSA+SHA256"], "rsa"),
            // In TLS 1.2 it is the suite that names the kind.
            (
                &["-tls1_2", "-cipher", "ECDHE-RSA-AES128-GCM-SHA256"],
                "rsa",
            ),
            (&["-tls1_3", "-sigalgs", "ECDSA+SHA256"], "ecdsa"),
            (&["-tls1_2", "-sigalgs", "ECDSA+SHA256"], "ecdsa"),
            (
                &["-tls1_2", "-cipher", "ECDHE-ECDSA-AES128-GCM-SHA256"],
                "ecdsa",
            ),
        ];
        for (arguments, expected) in clients {
            for name in [&["-servername", "localhost"][..], &["-noservername"]] {
                let arguments = [arguments, name].concat();
                assert_eq!(
                    shown(test, &server, &arguments).as_deref(),
                    Ok(expected),
                    "{arguments:?}, {preferred} first"
                );
            }
        }
    }
    // With one kind alone there is nothing to choose, and the log says what is missing.
    let server = start(test, &Program::new(test).pki(&ecdsa));
    let only_rsa = ["-tls1_3", "-sigalgs", "RSA-PSS+SHA256"];
    assert_eq!(
        shown(test, &server, &only_rsa).unwrap_err(),
        "sslv3 alert handshake failure"
    );
    let line = server.wait_log("handshake failed");
    assert!(line.contains("RSA"), "{line}");
}

fn in_one_file(test: &Test) {
    let mut program = Program::new(test).without("--cert").without("--key");
    for (kind, name) in [(Key::P256, "ecdsa"), (Key::Rsa2048, "rsa")] {
        let path = test.path(&format!("{name}.pem"));
        write_file(&path, both(&certificate(test, kind, &[name])), 0o600);
        program = program.also("--cert", path);
    }
    // The key before the certificate, and its group may read it.
    let path = test.path("third.pem");
    let third = certificate(test, Key::P384, &["third"]);
    let read = |path| fs::read_to_string(path).unwrap();
    write_file(&path, read(&third.key) + &read(&third.cert), 0o640);
    program = program.also("--cert", path);
    let server = start(test, &program);
    for name in ["ecdsa", "rsa", "third"] {
        assert_eq!(shown_for(test, &server, name).as_deref(), Ok(name));
    }
    // The name comes first: this client cannot verify RSA, and nothing else is for that name.
    let arguments = ["-servername", "rsa", "-sigalgs", "ECDSA+SHA256"];
    assert!(shown(test, &server, &arguments).is_err());
    assert_eq!(
        shown(test, &server, &["-noservername"]).as_deref(),
        Ok("ecdsa")
    );
}

// ---- names ----

fn by_name(test: &Test) {
    let file = |name: &str, names: &[&str]| {
        file_whole(test, name, &certificate(test, Key::P256, names));
    };
    file("exact.example", &["exact.example"]);
    file("*.wild.example", &["*.wild.example"]);
    file("own.wild.example", &["own.wild.example"]);
    file("plain.example", &["plain.example"]);
    file("xn--bcher-kva.example", &["xn--bcher-kva.example"]);
    file("localhost", &["localhost"]);
    file_as_certbot(
        test,
        "certbot.example",
        &certificate(
            test,
            Key::Rsa2048,
            &["certbot.example", "*.certbot.example"],
        ),
    );
    file_as_certbot(
        test,
        "alone.example",
        &certificate(test, Key::P384, &["alone.example"]),
    );
    let default = certificate(test, Key::P256, &["default.example", "also.example"]);
    let server = start(test, &serving_directory(test).pki(&default));
    for (name, expected) in [
        ("exact.example", "exact.example"),
        ("EXACT.Example", "exact.example"),
        ("any.wild.example", "*.wild.example"),
        ("own.wild.example", "own.wild.example"),
        ("two.labels.wild.example", "default.example"),
        ("wild.example", "default.example"),
        ("plain.example", "plain.example"),
        // What is filed under the domain is not for that name.
        ("sub.plain.example", "default.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("localhost", "localhost"),
        ("certbot.example", "certbot.example"),
        ("imap.certbot.example", "certbot.example"),
        ("a.b.certbot.example", "default.example"),
        ("alone.example", "alone.example"),
        ("also.example", "default.example"),
        ("unknown.example", "default.example"),
        ("example", "default.example"),
    ] {
        for version in ["-tls1_2", "-tls1_3"] {
            let arguments = [version, "-servername", name];
            assert_eq!(
                shown(test, &server, &arguments).as_deref(),
                Ok(expected),
                "{arguments:?}"
            );
        }
    }
    assert_eq!(
        shown(test, &server, &["-noservername"]).as_deref(),
        Ok("default.example")
    );
    let line = server.wait_log("sni=any.wild.example");
    assert!(line.contains("tls=TLSv1.2"), "{line}");
    let log = server.log();
    assert!(
        log.lines()
            .filter(|line| line.starts_with("127.0.0.1:"))
            .all(|line| line.contains(": session ")),
        "{log}"
    );
}

fn broken_domain(test: &Test) {
    let expired = |names: &[&str]| {
        let directory = test.path(&format!("expired-{}", next_number()));
        Pki::make(&directory, Key::P256, |params| {
            params.subject_alt_names = names
                .iter()
                .map(|name| rcgen::SanType::DnsName((*name).try_into().unwrap()))
                .collect();
            params.not_after = rcgen::date_time_ymd(2025, 6, 1);
        })
    };
    let below = "mail.domain.example";
    let default = certificate(test, Key::P256, &[below]);
    let server = start(test, &serving_directory(test).pki(&default));
    let file = directory(test).join("domain.example.pem");
    let good = both(&certificate(test, Key::P256, &["domain.example"]));
    let alone = both(&expired(&["domain.example"]));
    let all = both(&expired(&["domain.example", "*.domain.example"]));
    for (case, text, mode, is_served, words) in [
        ("empty", "", 0o600, true, "no certificate in PEM form"),
        ("cut", &good[..300], 0o600, true, "domain.example.pem"),
        ("open to everybody", &good, 0o644, true, "chmod o= it"),
        ("expired, and for the domain alone", &alone, 0o600, true, ""),
        (
            "expired, and for the name too",
            &all,
            0o600,
            false,
            "it expired on Jun",
        ),
    ] {
        let before = server.log().len();
        remove(&file);
        write_file(&file, text, mode);
        assert!(
            shown_for(test, &server, "domain.example").is_err(),
            "{case}"
        );
        let shown = shown_for(test, &server, below);
        let expected = if is_served {
            Ok(below.to_owned())
        } else {
            Err("tlsv1 alert internal error".to_owned())
        };
        assert_eq!(shown, expected, "{case}");
        eventually("the session has ended", || {
            let log = server.log();
            (log[before..].matches(": session ").count() == 2).then_some(())
        });
        let log = server.log();
        let mut lines = log[before..].lines();
        let line = lines.find(|line| line.ends_with(&format!("(sni={below})")));
        let line = line.unwrap_or_default();
        assert!(line.contains(words), "{case}: {line}");
        assert_eq!(line.is_empty(), words.is_empty(), "{case}: {line}");
        assert_eq!(
            line.contains("passed over"),
            is_served && !words.is_empty(),
            "{case}: {line}"
        );
    }
}

fn unrecognized(test: &Test, is_strict: bool) {
    file_whole(
        test,
        "exact.example",
        &certificate(test, Key::P256, &["exact.example"]),
    );
    let program = serving_directory(test);
    let program = if is_strict {
        program.flag("--strict-sni")
    } else {
        program.without("--cert").without("--key")
    };
    let server = start(test, &program);
    assert_eq!(
        shown_for(test, &server, "exact.example").as_deref(),
        Ok("exact.example")
    );
    for (version, name) in [
        ("-tls1_2", &["-servername", "unknown.example"][..]),
        ("-tls1_3", &["-servername", "unknown.example"]),
        ("-tls1_2", &["-noservername"]),
        ("-tls1_3", &["-noservername"]),
    ] {
        let arguments = [&[version], name].concat();
        assert_eq!(
            shown(test, &server, &arguments).unwrap_err(),
            "tlsv1 unrecognized name",
            "{arguments:?}"
        );
    }
    for words in ["unrecognized_name", "(sni=unknown.example)"] {
        assert!(server.wait_log(words).contains("handshake failed"));
    }
    // The one that --cert names is still for its own names.
    if is_strict {
        assert_eq!(
            shown_for(test, &server, "mail.example").as_deref(),
            Ok("localhost")
        );
    }
}

fn paths(test: &Test) {
    let outside = certificate(
        test,
        Key::P256,
        &["outside", "etc", "live", "exact.example"],
    );
    // Each of these would be served by a program that joins what it is given to the directory's path.
    write_file(&test.path("outside.pem"), both(&outside), 0o600);
    write_file(&test.path(".pem"), both(&outside), 0o600);
    write_file(&directory(test).join(".pem"), both(&outside), 0o600);
    write_file(&directory(test).join("..pem"), both(&outside), 0o600);
    write_file(&directory(test).join("...pem"), both(&outside), 0o600);
    write_file(&directory(test).join(".hidden.pem"), both(&outside), 0o600);
    make_dir(&directory(test).join("sub"), 0o755);
    write_file(
        &directory(test).join("sub").join("inner.pem"),
        both(&outside),
        0o600,
    );
    for name in ["fullchain.pem", "privkey.pem"] {
        write_file(&test.path(name), both(&outside), 0o600);
    }
    file_whole(
        test,
        "exact.example",
        &certificate(test, Key::P256, &["exact.example"]),
    );
    let default = certificate(test, Key::P256, &["default.example"]);
    let server = start(test, &serving_directory(test).pki(&default));
    let absolute = test.path("outside").display().to_string();
    for name in [
        "..",
        ".",
        "../outside",
        "../../outside",
        absolute.as_str(),
        ".hidden",
        "sub/inner",
        "./exact.example",
        "exact.example/../exact.example",
        "exact.example/",
        "..%2foutside",
        "..\\outside",
        "a..b",
        "*.example",
        "exact.example\n",
        "exact example",
        "b\u{fc}cher.example",
    ] {
        // The library finds it to be no host name at all; nobody gets to see it.
        assert_eq!(
            shown_for(test, &server, name),
            Err("sslv3 alert illegal parameter".to_owned()),
            "{name:?}"
        );
    }
    // Host names, but none that is more than itself.
    for name in ["pem", "live", "etc", "fullchain", "outside"] {
        assert_eq!(
            shown_for(test, &server, name).as_deref(),
            Ok("default.example"),
            "{name:?}"
        );
    }
    assert_eq!(
        shown_for(test, &server, "exact.example").as_deref(),
        Ok("exact.example")
    );
}

fn hello_retry(test: &Test) {
    file_whole(
        test,
        "exact.example",
        &certificate(test, Key::P256, &["exact.example"]),
    );
    let server = start(test, &serving_directory(test));
    // Its first share is of a group that we do not have.
    let arguments = [
        "-servername",
        "exact.example",
        "-groups",
        "X448:P-256",
        "-tls1_3",
    ];
    assert_eq!(
        shown(test, &server, &arguments).as_deref(),
        Ok("exact.example")
    );
    let line = server.wait_log(": session ");
    assert!(line.contains("group=secp256r1"), "{line}");
}

// ---- what is wrong with one name ----

struct Broken {
    name: &'static str,
    /// Files something for broken.example that cannot be used.
    files: fn(&Test),
    /// How the file is called below the directory.
    file: &'static str,
    says: &'static [&'static str],
}

fn broken_file(test: &Test) -> PathBuf {
    directory(test).join("broken.example.pem")
}

fn good(test: &Test) -> Pki {
    certificate(test, Key::P256, &["broken.example"])
}

const BROKEN: &[Broken] = &[
    Broken {
        name: "an empty file",
        files: |test| write_file(&broken_file(test), "", 0o600),
        file: "broken.example.pem",
        says: &["cannot use certificate", "no certificate in PEM form"],
    },
    Broken {
        name: "broken PEM",
        files: |test| {
            let text = "-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n";
            write_file(&broken_file(test), text, 0o600);
        },
        file: "broken.example.pem",
        says: &["cannot use certificate", "malformed PEM"],
    },
    Broken {
        name: "a certificate that was cut",
        files: |test| {
            let text = both(&good(test));
            write_file(&broken_file(test), &text[..300], 0o600);
        },
        file: "broken.example.pem",
        says: &["cannot use certificate"],
    },
    Broken {
        name: "a certificate without its key",
        files: |test| {
            write_file(
                &broken_file(test),
                fs::read(good(test).cert).unwrap(),
                0o600,
            );
        },
        file: "broken.example.pem",
        says: &[
            "cannot use private key in",
            "no private key in PEM form",
            "append the certificate's key to it",
        ],
    },
    Broken {
        name: "another certificate's key",
        files: |test| {
            let read = |path| fs::read_to_string(path).unwrap();
            let text = read(good(test).cert) + &read(good(test).key);
            write_file(&broken_file(test), text, 0o600);
        },
        file: "broken.example.pem",
        says: &["does not go with certificate", "the public keys differ"],
    },
    Broken {
        name: "a file that everybody can read",
        files: |test| write_file(&broken_file(test), both(&good(test)), 0o644),
        file: "broken.example.pem",
        says: &[
            "cannot read",
            "it is open to everybody (mode 0644): chmod o= it",
        ],
    },
    Broken {
        name: "a file that its group can write to",
        files: |test| write_file(&broken_file(test), both(&good(test)), 0o660),
        file: "broken.example.pem",
        says: &[
            "cannot read",
            "its group can write to it (mode 0660): chmod g-w it",
        ],
    },
    Broken {
        name: "a certificate for another name",
        files: |test| {
            file_whole(
                test,
                "broken.example",
                &certificate(test, Key::P256, &["other.example"]),
            );
        },
        file: "broken.example.pem",
        says: &["is for other.example, "],
    },
    Broken {
        name: "an expired certificate",
        files: |test| {
            let pki = Pki::make(&test.path("expired"), Key::P256, |params| {
                params.not_after = rcgen::date_time_ymd(2025, 6, 1);
            });
            file_whole(test, "broken.example", &pki);
        },
        file: "broken.example.pem",
        says: &["cannot use certificate", "it expired on Jun", "renew it"],
    },
    Broken {
        name: "a FIFO",
        files: |test| {
            nix::unistd::mkfifo(&broken_file(test), nix::sys::stat::Mode::S_IRUSR).unwrap();
        },
        file: "broken.example.pem",
        says: &["cannot read", "not a regular file"],
    },
    Broken {
        name: "a device",
        files: |test| symlink("/dev/zero", broken_file(test)).unwrap(),
        file: "broken.example.pem",
        says: &["cannot read", "not a regular file"],
    },
    Broken {
        name: "a directory in a file's place",
        files: |test| make_dir(&broken_file(test), 0o755),
        file: "broken.example.pem",
        says: &["cannot read", "not a regular file"],
    },
    Broken {
        name: "a huge file",
        files: |test| write_file(&broken_file(test), vec![b'\n'; 8 << 20], 0o600),
        file: "broken.example.pem",
        says: &["cannot read", "larger than"],
    },
    Broken {
        name: "a link to itself",
        files: |test| symlink(broken_file(test), broken_file(test)).unwrap(),
        file: "broken.example.pem",
        says: &["cannot read", "Too many"],
    },
    Broken {
        name: "a link to nowhere",
        files: |test| symlink(test.path("none"), broken_file(test)).unwrap(),
        file: "broken.example.pem",
        says: &["cannot read", "it is a symbolic link to nowhere"],
    },
    Broken {
        name: "a missing privkey.pem",
        files: |test| {
            file_as_certbot(test, "broken.example", &good(test));
            fs::remove_file(directory(test).join("broken.example/privkey.pem")).unwrap();
        },
        file: "broken.example/privkey.pem",
        says: &["cannot read", "No such file or directory"],
    },
    Broken {
        name: "a privkey.pem that everybody can read",
        files: |test| {
            file_as_certbot(test, "broken.example", &good(test));
            let key = directory(test).join("broken.example/privkey.pem");
            fs::set_permissions(key, fs::Permissions::from_mode(0o644)).unwrap();
        },
        file: "broken.example/privkey.pem",
        says: &[
            "cannot read",
            "it is open to everybody (mode 0644): chmod o= it",
        ],
    },
    Broken {
        name: "a privkey.pem that is another certificate's",
        files: |test| {
            file_as_certbot(test, "broken.example", &good(test));
            let key = directory(test).join("broken.example/privkey.pem");
            fs::write(key, fs::read(good(test).key).unwrap()).unwrap();
        },
        file: "broken.example/privkey.pem",
        says: &["does not go with certificate", "the public keys differ"],
    },
    Broken {
        name: "a fullchain.pem that leads nowhere",
        files: |test| {
            file_as_certbot(test, "broken.example", &good(test));
            fs::remove_file(test.path("archive/broken.example/fullchain1.pem")).unwrap();
        },
        file: "broken.example/fullchain.pem",
        says: &["cannot read", "it is a symbolic link to nowhere"],
    },
];

fn remove(path: &Path) {
    let is_directory = fs::symlink_metadata(path).map(|metadata| metadata.is_dir());
    match is_directory {
        Ok(true) => fs::remove_dir_all(path).unwrap(),
        Ok(false) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

fn broken(test: &Test, case: &Broken) {
    file_whole(
        test,
        "exact.example",
        &certificate(test, Key::P256, &["exact.example"]),
    );
    (case.files)(test);
    let program = serving_directory(test);
    let server = start(test, &program);
    for version in ["-tls1_2", "-tls1_3"] {
        let arguments = ["-servername", "broken.example", version];
        assert_eq!(
            shown(test, &server, &arguments).unwrap_err(),
            "tlsv1 alert internal error"
        );
        assert_eq!(
            shown_for(test, &server, "exact.example").as_deref(),
            Ok("exact.example")
        );
    }
    let path = directory(test).join(case.file).display().to_string();
    let line = server.wait_log("handshake failed");
    let place = format!("'{path}'");
    let all = ["(--cert-dir)", "(sni=broken.example)", &place];
    for words in case.says.iter().chain(&all) {
        assert!(line.contains(words), "{words:?} is not in {line}");
    }
    // `--check` finds it too; one that is good in itself may be meant for nobody.
    let (level, code) = match case.name {
        "a certificate for another name" => ("warning: ", 0),
        _ => ("error: ", 100),
    };
    let report = program.flag("--check").run();
    let text = String::from_utf8(report.stdout).unwrap();
    let is_found =
        |line: &str| line.starts_with(level) && case.says.iter().all(|words| line.contains(words));
    assert!(text.lines().any(is_found), "{text}");
    assert_eq!(report.status.code(), Some(code), "{text}");
    // Mended, it serves the next connection.
    remove(&directory(test).join("broken.example"));
    remove(&broken_file(test));
    file_whole(test, "broken.example", &good(test));
    assert_eq!(
        shown_for(test, &server, "broken.example").as_deref(),
        Ok("broken.example")
    );
}

// ---- new files ----

/// The certificate that this client was shown.
fn served(client: &mut Client) -> Vec<u8> {
    client.tls().peer_certificates().unwrap()[0].to_vec()
}

fn der(pki: &Pki) -> Vec<u8> {
    use rustls::pki_types::pem::PemObject;
    rustls::pki_types::CertificateDer::from_pem_file(&pki.cert)
        .unwrap()
        .to_vec()
}

fn replaced(test: &Test) {
    let [old, new] = [Key::P256, Key::Rsa2048].map(|kind| certificate(test, kind, &["localhost"]));
    let (cert, key) = (test.path("cert.pem"), test.path("key.pem"));
    let put = |pki: &Pki| {
        // As certbot does: a new file takes the old one's place.
        for (from, to, mode) in [(&pki.cert, &cert, 0o644), (&pki.key, &key, 0o600)] {
            let next = to.with_extension("next");
            write_file(&next, fs::read(from).unwrap(), mode);
            fs::rename(next, to).unwrap();
        }
    };
    put(&old);
    for policy in ["required", "implicit"] {
        put(&old);
        let program = Program::new(test)
            .tls(policy)
            .option("--cert", &cert)
            .option("--key", &key);
        let begin = |pki: &Pki| {
            let mut session = program.start();
            let client = session.client();
            if policy == "implicit" {
                client.handshake(&TlsOffer::new(pki)).unwrap();
                client.greeting();
                client.login();
            } else {
                client.log_in_by_starttls(pki);
            }
            assert_eq!(served(client), der(pki));
            session
        };
        let mut first = begin(&old);
        // One that has been accepted, but has not begun TLS, keeps what it began with.
        let mut waiting = program.start();
        eventually("the keeper has read its files", || {
            waiting.wait_idle();
            Some(())
        });
        put(&new);
        let mut second = begin(&new);
        for session in [&mut first, &mut second] {
            assert!(session.client().command("a NOOP").is_ok());
        }
        if policy == "required" {
            waiting.client().log_in_by_starttls(&old);
        } else {
            waiting.client().handshake(&TlsOffer::new(&old)).unwrap();
        }
        // One half of the pair is there, the other is not yet: refused, not served.
        write_file(&cert, fs::read(&old.cert).unwrap(), 0o644);
        let mut third = program.start();
        let (said, end) = third.client().read_to_end();
        let said = String::from_utf8(said).unwrap();
        if policy == "required" {
            assert!(said.starts_with("* BYE [UNAVAILABLE] "), "{said}");
        } else {
            assert_eq!(said, "");
        }
        assert_eq!(end, End::Eof);
        assert_eq!(third.wait_code(), 100);
        let line = third.wait_log("the public keys differ");
        assert!(line.contains("(--key) does not go with"), "{line}");
        for session in [&mut first, &mut second, &mut waiting] {
            if policy == "required" {
                assert!(session.client().command("b NOOP").is_ok());
            }
        }
        put(&old);
        let mut fourth = begin(&old);
        assert!(fourth.client().command("z LOGOUT").is_ok());
        assert!(first.client().command("z LOGOUT").is_ok());
        assert!(second.client().command("z LOGOUT").is_ok());
    }
}

fn replaced_in_directory(test: &Test) {
    let program = serving_directory(test);
    let names = ["exact.example"];
    let [old, new] = [Key::P256, Key::P384].map(|kind| certificate(test, kind, &names));
    let offer = |pki| offer_for(names[0], pki);
    file_whole(test, names[0], &old);
    let mut first = program.start();
    first.client().log_in_by_starttls_with(&offer(&old));
    assert_eq!(served(first.client()), der(&old));
    let mut waiting = program.start();
    waiting.client().greeting();
    file_whole(test, names[0], &new);
    // It is read when the client has said its name.
    waiting.client().starttls_with(&offer(&new));
    assert_eq!(served(waiting.client()), der(&new));
    waiting.client().login();
    assert!(first.client().command("a NOOP").is_ok());
    let mut second = program.start();
    second.client().log_in_by_starttls_with(&offer(&new));
    assert_eq!(served(second.client()), der(&new));
}

// ---- the opener ----

/// A session before TLS, and its opener, waiting.
fn with_opener(test: &Test) -> (Session, Process) {
    file_whole(
        test,
        "exact.example",
        &certificate(test, Key::P256, &["exact.example"]),
    );
    let mut session = serving_directory(test).start();
    session.client().greeting();
    session.wait_idle();
    // Nobody waits for it before TLS: it may still be on its way.
    let opener = eventually("the opener waits, confined", || {
        let opener = session.processes().opener?;
        let is_ready = opener.status().field("Seccomp") == "2"
            && opener.blocked_in() == Some(libc::SYS_recvfrom);
        is_ready.then_some(opener)
    });
    (session, opener)
}

fn opener_is_confined(test: &Test) {
    const READ_ANY_FILE: u64 = 1 << 2;
    let (mut session, opener) = with_opener(test);
    let status = opener.status();
    assert_eq!(status.numbers("Uid"), [0; 4]);
    assert_eq!(
        (status.mask("CapEff"), status.mask("CapPrm")),
        (READ_ANY_FILE, READ_ANY_FILE)
    );
    for set in ["CapInh", "CapBnd", "CapAmb"] {
        assert_eq!(status.mask(set), 0, "{set}");
    }
    assert_eq!(
        (status.field("NoNewPrivs"), status.field("Seccomp")),
        ("1", "2")
    );
    let descriptors = opener.descriptors();
    let mut targets: Vec<_> = descriptors.values().map(String::as_str).collect();
    targets.sort_unstable();
    targets.dedup();
    let [null, place, log, socket] = targets[..] else {
        panic!("{targets:?}");
    };
    assert_eq!(
        (null, place),
        ("/dev/null", directory(test).to_str().unwrap())
    );
    assert!(log.starts_with(test.path("log.").to_str().unwrap()));
    assert!(socket.starts_with("socket:"));
    session.client().starttls(Pki::of(Key::P256));
    session.client().login();
}

fn opener_is_refused(test: &Test) {
    let number = Arg::Number;
    let (zero, cwd) = (number(0), number(-100_i64 as u64));
    let (path, file) = (Arg::Bytes(b"/\0"), Arg::Bytes(b"/tmp/x\0"));
    let innocent = Process(std::process::id() as i32);
    let victim = number(innocent.0 as u64);
    let open = |flags: i32| vec![cwd, file, number(flags as u64), number(0o600)];
    let calls: Vec<(&str, i64, Vec<Arg>)> = vec![
        ("open to write", libc::SYS_openat, open(libc::O_WRONLY)),
        (
            "open to read and write",
            libc::SYS_openat,
            open(libc::O_RDWR),
        ),
        ("create", libc::SYS_openat, open(libc::O_CREAT)),
        ("truncate", libc::SYS_openat, open(libc::O_TRUNC)),
        (
            "make a nameless file",
            libc::SYS_openat,
            open(libc::O_TMPFILE | libc::O_WRONLY),
        ),
        ("open", libc::SYS_open, vec![path, zero]),
        ("openat2", libc::SYS_openat2, vec![cwd, path, zero, zero]),
        (
            "open_by_handle_at",
            libc::SYS_open_by_handle_at,
            vec![zero, zero, zero],
        ),
        ("mkdir", libc::SYS_mkdir, vec![file, number(0o700)]),
        ("unlink", libc::SYS_unlink, vec![file]),
        ("rename", libc::SYS_rename, vec![file, path]),
        ("link", libc::SYS_link, vec![path, file]),
        ("symlink", libc::SYS_symlink, vec![path, file]),
        ("chmod", libc::SYS_chmod, vec![file, number(0o777)]),
        ("chown", libc::SYS_chown, vec![file, zero, zero]),
        ("getdents", libc::SYS_getdents64, vec![zero, zero, zero]),
        ("execve", libc::SYS_execve, vec![file, zero, zero]),
        ("fork", libc::SYS_fork, vec![]),
        (
            "clone",
            libc::SYS_clone,
            vec![number(libc::SIGCHLD as u64), zero, zero, zero, zero],
        ),
        (
            "socket inet",
            libc::SYS_socket,
            vec![
                number(libc::AF_INET as u64),
                number(libc::SOCK_STREAM as u64),
                zero,
            ],
        ),
        (
            "socket unix",
            libc::SYS_socket,
            vec![
                number(libc::AF_UNIX as u64),
                number(libc::SOCK_STREAM as u64),
                zero,
            ],
        ),
        ("connect", libc::SYS_connect, vec![zero, zero, zero]),
        ("kill", libc::SYS_kill, vec![victim, number(9)]),
        ("tgkill", libc::SYS_tgkill, vec![victim, victim, number(9)]),
        (
            "ptrace",
            libc::SYS_ptrace,
            vec![number(u64::from(libc::PTRACE_ATTACH)), victim, zero, zero],
        ),
        (
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            vec![victim, zero, zero, zero, zero, zero],
        ),
        ("setuid", libc::SYS_setuid, vec![zero]),
        ("capset", libc::SYS_capset, vec![zero, zero]),
        ("chroot", libc::SYS_chroot, vec![path]),
        ("mount", libc::SYS_mount, vec![zero, zero, zero, zero, zero]),
        ("unshare", libc::SYS_unshare, vec![zero]),
        ("bpf", libc::SYS_bpf, vec![zero, zero, zero]),
        (
            "io_uring_setup",
            libc::SYS_io_uring_setup,
            vec![number(1), zero],
        ),
        (
            "mmap executable",
            libc::SYS_mmap,
            vec![
                zero,
                number(4096),
                number((libc::PROT_READ | libc::PROT_EXEC) as u64),
                number((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64),
                number(u64::MAX),
                zero,
            ],
        ),
    ];
    for (name, call, arguments) in calls {
        let (mut session, opener) = with_opener(test);
        let outcome = inject(opener, call, &arguments);
        assert_eq!(outcome, Outcome::Killed(libc::SIGSYS), "{name}");
        session.close_client();
        session.wait();
    }
    assert!(innocent.alive());
}

fn opener_ends(test: &Test) {
    // With the handshake, whether it was asked or not.
    for name in ["exact.example", "localhost"] {
        let (mut session, opener) = with_opener(test);
        assert!(session.client().command("a STARTTLS").is_ok());
        assert!(opener.alive());
        let offer = offer_for(name, Pki::of(Key::P256));
        session.client().handshake(&offer).unwrap();
        session.client().login();
        eventually("the opener is gone", || (!opener.alive()).then_some(()));
        assert!(session.client().command("b NOOP").is_ok());
    }
    // With the client that leaves before it.
    let (mut session, opener) = with_opener(test);
    session.close_client();
    session.wait_as_last();
    assert!(!opener.alive());
    // With the keeper.
    let (mut session, opener) = with_opener(test);
    let keeper = session.processes().keeper.expect("a keeper");
    session.kill(keeper, libc::SIGKILL);
    eventually("the opener is gone", || (!opener.alive()).then_some(()));
    session.close_client();
    session.wait_as_last();
    // And with the network process that is killed.
    let (mut session, opener) = with_opener(test);
    let processes = session.processes();
    session.kill(processes.network, libc::SIGKILL);
    session.wait();
    for process in [Some(opener), processes.keeper, processes.launcher] {
        let process = process.expect("a process");
        eventually("it is gone", || (!process.alive()).then_some(()));
    }
}

fn opener_is_killed(test: &Test) {
    let (mut session, opener) = with_opener(test);
    session.kill(opener, libc::SIGKILL);
    eventually("the opener is gone", || (!opener.alive()).then_some(()));
    assert!(session.client().command("a STARTTLS").is_ok());
    let offer = offer_for("exact.example", Pki::of(Key::P256));
    let error = session.client().handshake(&offer).unwrap_err();
    assert!(error.contains("InternalError"), "{error}");
    let line = session.wait_log("handshake failed");
    assert!(line.contains("no answer from the opener"), "{line}");
    assert_eq!(session.wait_code(), 0);
    assert!(test.record().is_empty());
}

/// What it says late is the answer to nobody's question.
fn opener_is_lost(test: &Test, signal: i32) {
    let names = ["one.example", "other.example"];
    for name in names {
        file_whole(test, name, &certificate(test, Key::P256, &[name]));
    }
    let program = serving_directory(test).tls("implicit");
    let server = Server::start(test, Superserver::Listener, &program);
    let opener = |server: &Server| {
        let children = server.process().children().into_iter();
        let mut rest = children.filter(|child| Some(*child) != server.keeper());
        rest.find(|child| child.blocked_in() == Some(libc::SYS_recvfrom))
    };
    let lost = eventually("the opener waits", || opener(&server));
    let attempt = |name: &str| {
        let offer = offer_for(name, Pki::of(Key::P256));
        server.connect().handshake(&offer)
    };
    sys::kill(lost.0, signal).unwrap();
    attempt(names[0]).unwrap_err();
    server.wait_log("no answer from the opener");
    if signal == libc::SIGSTOP {
        sys::kill(lost.0, libc::SIGCONT).unwrap();
    }
    eventually("there is another opener", || {
        opener(&server).filter(|opener| *opener != lost)
    });
    for name in [names, names].concat() {
        attempt(name).unwrap();
    }
    eventually("the old one is gone", || (!lost.alive()).then_some(()));
}
