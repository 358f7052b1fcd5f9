//! Client certificates: which are accepted, what is said about the others, what the backend is told, whom it runs as, and that no
//! resumed session outlives the trust that it began with.

use crate::harness::identity::now;
use crate::harness::*;
use libtest_mimic::Trial;
use rcgen::{
    BasicConstraints, CustomExtension, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa,
    NameConstraints, SanType,
};
use rustls::client::Resumption;
use rustls::version::{TLS12, TLS13};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const YEAR: i64 = 365 * 86_400;

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for policy in ["required", "implicit"] {
        for version in ["1.2", "1.3"] {
            tests.extend([
                test(
                    &format!("client certificates: TLS {version}, {policy}: good ones are accepted, others refused in words"),
                    &[],
                    move |test| verdicts(test, policy, version),
                ),
                test(
                    &format!("client certificates: TLS {version}, {policy}: the backend and the log are told who the client is"),
                    &[],
                    move |test| told(test, policy, version),
                ),
            ]);
        }
    }
    tests.extend([
        test(
            "client certificates: revocation lists as large as the memory limit allows are used",
            &[Need::Root],
            large_lists,
        ),
        test(
            "client certificates: AUTH=EXTERNAL is left to a client that is known, and to no other",
            &[],
            external,
        ),
        test(
            "client certificates: the backend runs as the user that the certificate names",
            ROOT,
            user_of_certificate,
        ),
        test(
            "client certificates: root, unknown and unusable names start no backend",
            &[
                Need::Root,
                Need::Command("unshare", "util-linux"),
                Need::Command("tcpserver", "ucspi-tcp"),
                Need::EachStarted,
            ],
            no_user_of_certificate,
        ),
        test(
            "client certificates: of two authorities of one name each has its own list",
            &[Need::Root],
            namesakes,
        ),
        test(
            "client certificates: the listener says what is wrong with lists, once each time that it reads them",
            &[Need::Root],
            concerns,
        ),
        test(
            "client certificates: a resumed session knows the client",
            &[Need::Root],
            resumed,
        ),
        test(
            "client certificates: no session is resumed under other authorities, lists or demands",
            &[Need::Root],
            changed_trust,
        ),
        test(
            "client certificates: a session whose certificate has expired is not resumed",
            &[Need::Root],
            expired_meanwhile,
        ),
        test(
            "client certificates: curl and openssl s_client show theirs",
            &[
                Need::Command("tcpserver", "ucspi-tcp"),
                Need::Command("curl", "curl"),
                Need::Command("openssl", "openssl"),
            ],
            real_clients,
        ),
    ]);
    tests
}

const ROOT: &[Need] = &[
    Need::Root,
    Need::Command("unshare", "util-linux"),
    Need::Command("tcpserver", "ucspi-tcp"),
];

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn authority(test: &Test) -> Authority {
    Authority::make(&test.path("clients"), "client CA")
}

fn offer(version: &str) -> TlsOffer {
    TlsOffer {
        versions: vec![if version == "1.2" { &TLS12 } else { &TLS13 }],
        ..TlsOffer::new(pki())
    }
}

fn config(version: &str, identity: Option<&Identity>) -> Arc<rustls::ClientConfig> {
    let config = offer(version).config();
    Arc::new(match identity {
        Some(identity) => identity.shown_by(config),
        None => config,
    })
}

/// The client's handshake; TLS 1.3 tells it of a refusal only afterwards, so it asks for something then.
fn handshake(
    session: &mut Session,
    policy: &str,
    config: &Arc<rustls::ClientConfig>,
) -> Result<(), String> {
    let client = session.client();
    if policy != "implicit" {
        client.greeting();
        assert!(client.command("tls STARTTLS").is_ok());
    }
    client.handshake_by(config)?;
    if !client.try_send(b"a NOOP\r\n") {
        return Err(format!("{:?}", client.read_to_end().1));
    }
    let answer = if policy == "implicit" { "* " } else { "a OK" };
    loop {
        match client.line_or_end() {
            Ok(line) if line.starts_with(answer) => return Ok(()),
            Ok(_) => {}
            Err(end) => return Err(format!("{end:?}")),
        }
    }
}

struct Row<'a> {
    name: &'a str,
    demand: &'a str,
    shows: Option<&'a Identity>,
    lists: Vec<&'a Path>,
    /// What the log says, and the alert as our log and the client's library name it; or all is well.
    refusal: Option<Refusal<'a>>,
}

type Refusal<'a> = (&'a str, &'a str, &'a str);

fn row<'a>(
    name: &'a str,
    demand: &'a str,
    shows: Option<&'a Identity>,
    lists: &[&'a PathBuf],
    refusal: Option<Refusal<'a>>,
) -> Row<'a> {
    let lists = lists.iter().map(|path| path.as_path()).collect();
    Row {
        name,
        demand,
        shows,
        lists,
        refusal,
    }
}

fn verdicts(test: &Test, policy: &str, version: &str) {
    let ca = authority(test);
    let between = ca.intermediate("between");
    let foreign = Authority::make(&test.path("foreign"), "foreign CA");
    let namesake = Authority::make(&test.path("namesake"), "client CA");
    let numbered = |serial: u64| {
        move |params: &mut rcgen::CertificateParams| params.serial_number = Some(serial.into())
    };
    let good = ca.issue("alice", numbered(10));
    let gone = ca.issue("mallory", numbered(11));
    let below = between.issue("bob", numbered(12));
    let own = ca.self_signed("alice");
    let wrong = foreign.issue("alice", |_| {});
    let forged = namesake.issue("alice", |_| {});
    let old = ca.issue("alice", |params| {
        params.not_after = rcgen::date_time_ymd(2025, 6, 1);
    });
    let early = ca.issue("alice", |params| {
        params.not_before = rcgen::date_time_ymd(2044, 1, 1);
    });
    let server = ca.issue("alice", |params| {
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    });
    let authoritative = ca.issue("alice", |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    });
    let bare = ca.issue_version_1("alice");
    let critical = ca.issue("alice", |params| {
        let mut extension =
            CustomExtension::from_oid_content(&[1, 3, 6, 1, 4, 1, 99_999, 1], vec![5, 0]);
        extension.set_criticality(true);
        params.custom_extensions = vec![extension];
    });
    let short = ca.intermediate_with("short", |params| {
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    });
    let far = short.intermediate("far").issue("alice", |_| {});
    let named = ca.intermediate_with("named", |params| {
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![GeneralSubtree::DnsName("example.org".to_owned())],
            excluded_subtrees: Vec::new(),
        });
    });
    let outside = named.issue("alice", |params| {
        params.subject_alt_names = vec![SanType::DnsName("pc.example.net".try_into().unwrap())];
    });
    let list = ca.list(&[11], YEAR);
    let (stale, below_list) = (ca.list(&[11], -86_400), between.list(&[13], YEAR));
    let (below_revoked, nothing) = (between.list(&[12], YEAR), ca.list(&[], YEAR));
    // Alert names: ours (RFC 8446 section 6.2), rustls's.
    let unknown = Some((
        "the client's certificate is from no authority in --client-ca",
        "unknown_ca",
        "UnknownCA",
    ));
    let expired = Some((
        "the client's certificate has expired: Jun  1 00:00:00 2025",
        "certificate_expired",
        "CertificateExpired",
    ));
    let revoked = Some((
        "the client's certificate is revoked",
        "certificate_revoked",
        "CertificateRevoked",
    ));
    let uncovered = Some((
        "the client's certificate or an authority's between is covered by no list in --client-crl",
        "unknown_ca",
        "UnknownCA",
    ));
    let mut rows = vec![
        row(
            "none, required",
            "required",
            None,
            &[],
            Some((
                "the client shows no certificate, and --client-cert required asks for one",
                // The library has TLS 1.3's alert for TLS 1.2 too; clients of our days know it.
                "certificate_required",
                "CertificateRequired",
            )),
        ),
        row("none, request", "request", None, &[], None),
        row("good, not revoked", "required", Some(&good), &[&list], None),
        row("revoked", "required", Some(&gone), &[&list], revoked),
        row(
            "revoked, request",
            "request",
            Some(&gone),
            &[&list],
            revoked,
        ),
        row(
            "list out of date",
            "required",
            Some(&good),
            &[&stale],
            Some((
                "the client's certificate cannot be checked: --client-crl is out of date, a new list was due",
                "unknown_ca",
                "UnknownCA",
            )),
        ),
        row(
            "no list of the authority between",
            "required",
            Some(&below),
            &[&list],
            uncovered,
        ),
        row(
            "no list of the root",
            "required",
            Some(&below),
            &[&below_list],
            uncovered,
        ),
        row(
            "lists of both",
            "required",
            Some(&below),
            &[&nothing, &below_list],
            None,
        ),
        row(
            "revoked by the authority between",
            "required",
            Some(&below),
            &[&nothing, &below_revoked],
            revoked,
        ),
    ];
    // For all of these the library has one name, Other: the words come from what is inside.
    for (name, identity, words) in [
        (
            "an authority's own",
            &authoritative,
            "the client's certificate is an authority's own (CA:TRUE in its basicConstraints): issue clients one without \
             (CaUsedAsEndEntity; ",
        ),
        (
            "of version 1",
            &bare,
            "the client's certificate is not of X.509 version 3: have it issued with extensions (openssl x509 -req -extfile) \
             (UnsupportedCertVersion; ",
        ),
        (
            "with an unknown critical extension",
            &critical,
            "the client's certificate has a critical extension that is not understood (UnsupportedCriticalExtension; ",
        ),
        (
            "by more authorities than allowed",
            &far,
            "the client's certificate is from more authorities in a row than one of them allows (pathlen in its basicConstraints) \
             (PathLenConstraintViolated; ",
        ),
        (
            "of a name that is not allowed",
            &outside,
            "the client's certificate is for a name that an authority of it may not certify (nameConstraints) \
             (NameConstraintViolation; ",
        ),
    ] {
        let refusal = (words, "certificate_unknown", "CertificateUnknown");
        rows.push(row(name, "required", Some(identity), &[], Some(refusal)));
    }
    for demand in ["required", "request"] {
        rows.extend([
            row("good", demand, Some(&good), &[], None),
            row("by an authority between", demand, Some(&below), &[], None),
            row("self-signed", demand, Some(&own), &[], unknown),
            row("another authority's", demand, Some(&wrong), &[], unknown),
            row(
                "another authority's of the same name",
                demand,
                Some(&forged),
                &[],
                Some((
                    "the client's certificate does not go with its signature",
                    "decrypt_error",
                    "DecryptError",
                )),
            ),
            row("expired", demand, Some(&old), &[], expired),
            row(
                "not valid yet",
                demand,
                Some(&early),
                &[],
                Some((
                    "the client's certificate is not valid before Jan  1 00:00:00 2044",
                    "certificate_expired",
                    "CertificateExpired",
                )),
            ),
            row(
                "for servers",
                demand,
                Some(&server),
                &[],
                Some((
                    "the client's certificate is not for clients (clientAuth is missing in its extendedKeyUsage)",
                    "unsupported_certificate",
                    "UnsupportedCertificate",
                )),
            ),
        ]);
    }
    for row in rows {
        let name = format!("{}, {}", row.name, row.demand);
        let before = test.record().backends().len();
        let mut program = Program::new(test)
            .tls(policy)
            .option("--client-ca", &ca.file)
            .option("--client-cert", row.demand);
        if !row.lists.is_empty() {
            let lists = std::env::join_paths(&row.lists).unwrap();
            program = program.option("--client-crl", lists);
        }
        let mut session = program.start();
        let result = handshake(&mut session, policy, &config(version, row.shows));
        match row.refusal {
            None => {
                assert_eq!(result, Ok(()), "{name}: {}", session.log());
                assert!(session.client().command("z LOGOUT").is_ok());
                session.close_client();
                let line = session.session_line();
                let shown = row.shows.map(|_| {
                    if name.contains("between") || name.contains("both") {
                        "bob"
                    } else {
                        "alice"
                    }
                });
                assert_eq!(line.get("client").map(String::as_str), shown, "{name}");
                assert_eq!(line["tls"], format!("TLSv{version}"), "{name}");
            }
            Some((words, ours, theirs)) => {
                let error = result.expect_err(&name);
                assert!(error.contains(theirs), "{name}: the client got {error}");
                session.close_client();
                let line = session.wait_log("handshake failed: ");
                assert!(line.contains(words), "{name}: {line}");
                assert!(
                    line.contains(&format!("alert sent: {ours})")),
                    "{name}: {line}"
                );
                let line = session.session_line();
                assert_eq!(
                    (line["tls"].as_str(), line["end"].as_str()),
                    ("none", "handshake failed"),
                    "{name}"
                );
                assert_eq!(
                    test.record().backends().len(),
                    before,
                    "{name}: a backend was started"
                );
            }
        }
        assert_eq!(session.wait_code(), 0, "{name}: {}", session.log());
    }
}

/// With short serial numbers, which take the most memory for their size.
fn large_lists(test: &Test) {
    const LIMIT: usize = (32 << 20) / 32;
    let ca = authority(test);
    let alice = ca.issue("alice", |params| params.serial_number = Some(10.into()));
    let serials: Vec<u64> = (0x01_00_00..0x01_00_00 + 35_000).collect();
    let list = ca.list(&serials, YEAR);
    let size = std::fs::read(&list).unwrap().len();
    assert!((LIMIT * 9 / 10..=LIMIT).contains(&size), "{size}");
    let program = Program::new(test)
        .option("--client-ca", &ca.file)
        .option("--client-crl", &list);
    let mut session = program.start();
    handshake(&mut session, "required", &config("1.3", Some(&alice))).unwrap();
    assert!(session.client().command("z LOGOUT").is_ok());
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

/// The certificate with everything in it that is told.
fn alice(ca: &Authority) -> Identity {
    ca.issue("alice", |params| {
        params.serial_number = Some(0x0a_bc_de.into());
        params
            .distinguished_name
            .push(DnType::OrganizationName, "Wonder, Land");
        params.distinguished_name.push(
            DnType::from_oid(&[1, 2, 840, 113_549, 1, 9, 1]),
            "alice@example.org",
        );
        params.subject_alt_names = vec![
            SanType::DnsName("pc.example.org".try_into().unwrap()),
            SanType::Rfc822Name("a.liddell@example.org".try_into().unwrap()),
        ];
    })
}

fn told(test: &Test, policy: &str, version: &str) {
    let ca = authority(test);
    let alice = alice(&ca);
    let print = Tool::new(test, "openssl")
        .args(["x509", "-noout", "-fingerprint", "-sha256", "-in"])
        .arg(&alice.cert)
        .run()
        .success()
        .text();
    let print = print.trim().rsplit('=').next().unwrap().replace(':', "");
    let wanted = [
        ("SSL_CLIENT_VERIFY", "SUCCESS"),
        (
            "SSL_CLIENT_S_DN",
            "emailAddress=alice@example.org,O=Wonder\\, Land,CN=alice",
        ),
        ("SSL_CLIENT_S_DN_CN", "alice"),
        ("SSL_CLIENT_S_DN_Email", "alice@example.org"),
        ("SSL_CLIENT_SAN_DNS_0", "pc.example.org"),
        ("SSL_CLIENT_SAN_Email_0", "a.liddell@example.org"),
        ("SSL_CLIENT_I_DN", "CN=client CA"),
        ("SSL_CLIENT_M_SERIAL", "0ABCDE"),
        ("SSL_CLIENT_V_END", "Jan  1 00:00:00 2045 GMT"),
        ("SSL_CLIENT_CERT_SHA256", &print),
    ];
    for (identity, demand) in [
        (Some(&alice), "required"),
        (Some(&alice), "request"),
        (None, "request"),
    ] {
        let index = test.record().backends().len();
        let mut session = Program::new(test)
            .tls(policy)
            .option("--client-ca", &ca.file)
            .option("--client-cert", demand)
            // A superserver's own words about some client are nothing that we vouch for.
            .env("SSL_CLIENT_S_DN_CN", "root")
            .env("SSL_CLIENT_A_KEY", "forged")
            .start();
        handshake(&mut session, policy, &config(version, identity)).unwrap();
        let environment = test.record().backend(index).environment();
        let found: Vec<_> = environment
            .iter()
            .filter(|(name, _)| name.starts_with("SSL_CLIENT_"))
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let mut expected = match identity {
            Some(_) => wanted.to_vec(),
            None => vec![("SSL_CLIENT_VERIFY", "NONE")],
        };
        expected.sort_unstable();
        assert_eq!(found, expected);
        assert_eq!(environment["SSL_SESSION_RESUMED"], "Initial");
        session.close_client();
        let line = session.session_line();
        assert_eq!(
            line.get("client").map(String::as_str),
            identity.map(|_| "alice")
        );
        assert_eq!(session.wait_code(), 0);
    }
}

fn external(test: &Test) {
    let ca = authority(test);
    let alice = ca.issue("alice", |_| {});
    let backend = Backend::capabilities("IMAP4rev1 STARTTLS AUTH=PLAIN AUTH=EXTERNAL");
    for policy in ["required", "optional", "implicit"] {
        for identity in [Some(&alice), None] {
            let mut session = Program::new(test)
                .tls(policy)
                .play(&backend)
                .option("--client-ca", &ca.file)
                .option("--client-cert", "request")
                .start();
            handshake(&mut session, policy, &config("1.3", identity)).unwrap();
            let said = session.client().command("c CAPABILITY").text();
            assert!(said.contains("AUTH=PLAIN"), "{policy}: {said}");
            assert_eq!(
                said.contains("AUTH=EXTERNAL"),
                identity.is_some(),
                "{policy}: {said}"
            );
        }
        // Without --client-ca nobody is known.
        let mut session = Program::new(test).tls(policy).play(&backend).start();
        handshake(&mut session, policy, &config("1.3", Some(&alice))).unwrap();
        let said = session.client().command("c CAPABILITY").text();
        assert!(!said.contains("AUTH=EXTERNAL"), "{policy}: {said}");
    }
}

/// Accounts that the machine does not have: two of people, one with uid 0, one whose group is root's, and those of our own processes.
fn accounts(test: &Test) -> String {
    let add = |name: &str, lines: &str| {
        let path = test.path(name);
        let all = std::fs::read_to_string(format!("/etc/{name}")).unwrap() + lines;
        write_file(&path, all, 0o644);
        format!("mount --bind {} /etc/{name}\n", path.display())
    };
    add(
        "passwd",
        "alice:x:61020:61020::/home/alice:/bin/rbash\nb.o-b_1:x:61021:61020::/home/bob:/bin/sh\n\
         toor:x:0:61020::/root:/bin/sh\nwheel:x:61022:0::/root:/bin/sh\nAlice:x:61023:61023::/:/bin/sh\n\
         alice@example.org:x:61023:61023::/:/bin/sh\n61020:x:61023:61023::/:/bin/sh\n\
         e2enetwork:x:61001:61020::/:/bin/sh\ne2ekeeper:x:61002:61020::/:/bin/sh\n",
    ) + &add(
        "group",
        "alice:x:61020:\ne2efriends:x:61024:alice,mallory\ne2eothers:x:61025:bob\n",
    )
}

fn by_certificate(test: &Test, ca: &Authority, policy: &str) -> Server {
    let program = Program::new(test)
        .tls(policy)
        .option("--client-ca", &ca.file)
        .flag("--backend-user-from-cert")
        .env("USER", "root")
        .env("HOME", "/root");
    let setup = accounts(test);
    Server::start_in(test, Superserver::Tcpserver, &program, Some(&setup))
}

fn user_of_certificate(test: &Test) {
    let ca = authority(test);
    let server = by_certificate(test, &ca, "required");
    let alice: (u32, &[u32], _, _) = (61_020, &[61_020, 61_024], "/home/alice", "/bin/rbash");
    let bob: (u32, &[u32], _, _) = (61_021, &[61_020], "/home/bob", "/bin/sh");
    for (index, (name, (uid, groups, home, shell))) in
        [("alice", alice), ("b.o-b_1", bob)].into_iter().enumerate()
    {
        let mut client = server.connect();
        client.greeting();
        assert!(client.command("tls STARTTLS").is_ok());
        let identity = ca.issue(name, |_| {});
        client
            .handshake_by(&config("1.3", Some(&identity)))
            .unwrap();
        client.login();
        let backend = test.record().backend(index);
        let status = backend.status();
        assert_eq!(status.numbers("Uid"), [uid; 4], "{name}");
        assert_eq!(status.numbers("Gid"), [61_020; 4], "{name}");
        let mut found = status.numbers("Groups");
        found.sort_unstable();
        assert_eq!(found, groups, "{name}");
        for set in ["CapEff", "CapPrm", "CapInh"] {
            assert_eq!(status.mask(set), 0, "{name}: {set}");
        }
        let environment = backend.environment();
        for (variable, value) in [
            ("USER", name),
            ("LOGNAME", name),
            ("HOME", home),
            ("SHELL", shell),
        ] {
            assert_eq!(environment[variable], value, "{name}: {variable}");
        }
        assert_eq!(environment["SSL_CLIENT_S_DN_CN"], name);
        assert!(client.command("z LOGOUT").is_ok());
    }
}

fn no_user_of_certificate(test: &Test) {
    let ca = authority(test);
    for policy in ["required", "implicit"] {
        let server = by_certificate(test, &ca, policy);
        let names_none = "the client's certificate names no user (--backend-user-from-cert)";
        for (name, why) in [
            (
                "root",
                "the client's certificate names 'root', who has uid 0 or gid 0 (--backend-user-from-cert)",
            ),
            (
                "toor",
                "the client's certificate names 'toor', who has uid 0 or gid 0 (--backend-user-from-cert)",
            ),
            (
                "wheel",
                "the client's certificate names 'wheel', who has uid 0 or gid 0 (--backend-user-from-cert)",
            ),
            (
                "e2enetwork",
                "the client's certificate names 'e2enetwork', whose uid is that of --user (--backend-user-from-cert)",
            ),
            (
                "e2ekeeper",
                "the client's certificate names 'e2ekeeper', whose uid is that of --keeper-user (--backend-user-from-cert)",
            ),
            (
                "nemo",
                "the client's certificate names 'nemo', who is no user here (--backend-user-from-cert)",
            ),
            ("", names_none),
            ("0", names_none),
            ("61020", names_none),
            ("Alice", names_none),
            ("alice@example.org", names_none),
            ("alice ", names_none),
            ("../alice", names_none),
        ] {
            let before = server.log().len();
            let mut client = server.connect();
            if policy == "required" {
                client.greeting();
                assert!(client.command("tls STARTTLS").is_ok());
            }
            let identity = ca.issue(name, |_| {});
            client
                .handshake_by(&config("1.3", Some(&identity)))
                .unwrap();
            client.try_send(b"a LOGIN u sekret\r\n");
            let (said, end) = client.read_to_end();
            let said = String::from_utf8(said).unwrap();
            assert!(
                said.lines().all(|line| line.starts_with("* BYE")),
                "{name}: {said}"
            );
            assert_eq!(end, End::CloseNotify, "{name}");
            drop(client);
            let log = eventually("tcpserver tells the end", || {
                let log = server.log()[before..].to_owned();
                log.contains("tcpserver: end").then_some(log)
            });
            assert!(log.contains(why), "{name}: {log}");
            // tcpserver gives wait(2)'s word.
            assert!(log.contains(" status 0\n"), "{name}: {log}");
        }
    }
    assert!(test.record().is_empty(), "a backend was started");
}

/// A program with tickets, as root alone may keep them.
fn with_tickets(test: &Test, ca: &Authority) -> Program {
    let keys = test.path("ticket-keys");
    if !keys.exists() {
        make_dir(&keys, 0o700);
    }
    Program::new(test)
        .option("--client-ca", &ca.file)
        .option("--ticket-keys", keys)
}

fn resuming(version: &str, identity: Option<&Identity>) -> Arc<rustls::ClientConfig> {
    let mut config = offer(version).config();
    config.resumption = Resumption::in_memory_sessions(8);
    Arc::new(match identity {
        Some(identity) => identity.shown_by(config),
        None => config,
    })
}

/// A whole session, in which the client hears of a ticket; whether it was resumed, and the client's name.
fn whole(program: &Program, config: &Arc<rustls::ClientConfig>) -> (String, Option<String>) {
    let mut session = program.start();
    handshake(&mut session, "required", config)
        .unwrap_or_else(|error| panic!("{error}: {}", session.log()));
    assert!(session.client().command("z LOGOUT").is_ok());
    session.close_client();
    let line = session.session_line();
    assert_eq!(session.wait_code(), 0);
    (line["resumed"].clone(), line.get("client").cloned())
}

fn resumed(test: &Test) {
    let ca = authority(test);
    let alice = alice(&ca);
    let program = with_tickets(test, &ca);
    for version in ["1.2", "1.3"] {
        let first = test.record().backends().len();
        let config = resuming(version, Some(&alice));
        let name = Some("alice".to_owned());
        assert_eq!(
            whole(&program, &config),
            ("no".to_owned(), name.clone()),
            "{version}"
        );
        assert_eq!(
            whole(&program, &config),
            ("yes".to_owned(), name),
            "{version}"
        );
        let told = |index: usize| {
            let mut environment = test.record().backend(index).environment();
            environment
                .retain(|name, _| name.starts_with("SSL_CLIENT") || name == "SSL_SESSION_RESUMED");
            let resumed = environment.remove("SSL_SESSION_RESUMED").unwrap();
            (resumed, environment)
        };
        let ((full, identity), (resumed, again)) = (told(first), told(first + 1));
        assert_eq!(
            (full.as_str(), resumed.as_str()),
            ("Initial", "Resumed"),
            "{version}"
        );
        assert_eq!(identity.len(), 10, "{identity:?}");
        assert_eq!(identity, again, "{version}");
    }
}

/// An authority that was given another key.
fn namesakes(test: &Test) {
    let old = authority(test);
    let new = Authority::make(&test.path("namesake"), "client CA");
    let both = test.path("both.pem");
    let read = |path| std::fs::read_to_string(path).unwrap();
    write_file(&both, read(&new.file) + &read(&old.file), 0o644);
    let issue = |ca: &Authority, serial: u64| {
        ca.issue("alice", |params| params.serial_number = Some(serial.into()))
    };
    let clients = [
        (issue(&old, 10), true),
        (issue(&new, 10), true),
        (issue(&old, 11), false),
        (issue(&new, 12), false),
    ];
    let lists = [old.list(&[11], YEAR), new.list(&[12], YEAR)];
    for [first, second] in [[0, 1], [1, 0]] {
        for (client, is_good) in &clients {
            let mut session = Program::new(test)
                .option("--client-ca", &both)
                .option("--client-crl", &lists[first])
                .also("--client-crl", &lists[second])
                .start();
            let result = handshake(&mut session, "required", &config("1.3", Some(client)));
            assert_eq!(result.is_ok(), *is_good, "{result:?}");
            session.close_client();
            if !is_good {
                session.wait_log("handshake failed: the client's certificate is revoked");
            }
            session.session_line();
        }
    }
}

fn concerns(test: &Test) {
    let ca = authority(test);
    let list = ca.list(&[], 86_400);
    let program = Program::new(test)
        .option("--client-ca", &ca.file)
        .option("--client-crl", &list);
    let words = "it is to be renewed by";
    let server = Server::start(test, Superserver::Listener, &program);
    for count in 1..3 {
        server.connect().greeting();
        eventually("it was said", || {
            (server.log().matches(words).count() >= count).then_some(())
        });
        server.connect().greeting();
        server.signal(libc::SIGHUP);
        eventually("it is reloaded", || {
            (server.log().matches("imap-tls: reloaded").count() == count).then_some(())
        });
        assert_eq!(server.log().matches(words).count(), count + 1);
    }
    let line = server.wait_log(words);
    assert!(line.contains("(--client-crl)"), "{line}");
    // Nobody is told for each connection.
    let mut session = program.start();
    session.client().greeting();
    session.close_client();
    session.session_line();
    assert!(!session.log().contains(words), "{}", session.log());
}

fn changed_trust(test: &Test) {
    let ca = authority(test);
    let alice = ca.issue("alice", |params| params.serial_number = Some(10.into()));
    let (empty, revoking) = (ca.list(&[], YEAR), ca.list(&[10], YEAR));
    for version in ["1.2", "1.3"] {
        let config = resuming(version, Some(&alice));
        let program = with_tickets(test, &ca);
        let is_resumed = |program: &Program| whole(program, &config).0;
        assert_eq!(is_resumed(&program), "no");
        assert_eq!(is_resumed(&program), "yes");
        let request = program.clone().option("--client-cert", "request");
        assert_eq!(is_resumed(&request), "no", "{version}: another demand");
        let list = program.clone().option("--client-crl", &empty);
        assert_eq!(is_resumed(&list), "no", "{version}: with a list");
        assert_eq!(is_resumed(&list), "yes", "{version}: with the same list");
        let both = test.path("both.pem");
        let text = std::fs::read_to_string(&ca.file).unwrap();
        let other = Authority::make(&test.path(&format!("other-{version}")), "other");
        write_file(
            &both,
            text + &std::fs::read_to_string(&other.file).unwrap(),
            0o644,
        );
        let more = list.clone().option("--client-ca", &both);
        assert_eq!(
            is_resumed(&more),
            "no",
            "{version}: with one more authority"
        );
        // Revoked, or not certified any more: neither the ticket nor the certificate counts.
        for refusing in [
            list.clone().option("--client-crl", &revoking),
            program.clone().option("--client-ca", &other.file),
        ] {
            // The client may have given its ticket up, or used it.
            whole(&list, &config);
            assert_eq!(is_resumed(&list), "yes", "{version}");
            let mut session = refusing.start();
            handshake(&mut session, "required", &config).unwrap_err();
            session.close_client();
            session.wait_log("handshake failed: the client's certificate is ");
            assert_eq!(session.session_line()["end"], "handshake failed");
            assert_eq!(session.wait_code(), 0);
        }
        // And a ticket from before certificates were asked for makes nobody known.
        let plain = program.clone().without("--client-ca");
        let anonymous = resuming(version, None);
        assert_eq!(whole(&plain, &anonymous).0, "no");
        assert_eq!(whole(&plain, &anonymous).0, "yes");
        let mut session = program.start();
        handshake(&mut session, "required", &anonymous).unwrap_err();
        session.close_client();
        session.wait_log("the client shows no certificate");
    }
}

fn expired_meanwhile(test: &Test) {
    let ca = authority(test);
    let program = with_tickets(test, &ca);
    let end = now() + 6;
    let alice = ca.issue("alice", |params| {
        params.not_after = (SystemTime::UNIX_EPOCH + Duration::from_secs(end)).into();
    });
    let clients = ["1.2", "1.3"].map(|version| {
        let config = resuming(version, Some(&alice));
        assert_eq!(whole(&program, &config).0, "no");
        (version, config)
    });
    eventually("the certificate expires", || {
        (now() > end + 1).then_some(())
    });
    for (version, config) in clients {
        let before = test.record().backends().len();
        let mut session = program.start();
        let error = handshake(&mut session, "required", &config).unwrap_err();
        session.close_client();
        let line = session.wait_log("handshake failed: ");
        assert!(
            line.contains("the client's certificate has expired"),
            "{version}: {line}"
        );
        assert_eq!(session.session_line()["end"], "handshake failed");
        assert_eq!(session.wait_code(), 0);
        assert_eq!(
            test.record().backends().len(),
            before,
            "{version}: a backend was started"
        );
        // The ticket has run out with the certificate, and the full handshake says so.
        assert!(error.contains("CertificateExpired"), "{version}: {error}");
        assert!(
            line.contains("alert sent: certificate_expired"),
            "{version}: {line}"
        );
    }
}

fn real_clients(test: &Test) {
    let ca = authority(test);
    let between = ca.intermediate("between");
    let program = Program::new(test).option("--client-ca", &ca.file);
    let server = Server::start(test, Superserver::Tcpserver, &program);
    let alice = between.issue("alice", |_| {});
    let trusted = pki().ca.to_str().unwrap();
    let curl = |shown: &[&str], version: &[&str]| {
        Tool::new(test, "curl")
            .args(["-sS", "--ssl-reqd", "--cacert", trusted, "-u", "u:sekret"])
            .args(["--login-options", "AUTH=PLAIN", "-X", "NOOP"])
            .args(shown)
            .args(version)
            .arg(format!("imap://localhost:{}/", server.port))
            .run()
    };
    let (cert, key) = (alice.cert.to_str().unwrap(), alice.key.to_str().unwrap());
    let shown = ["--cert", cert, "--key", key];
    for version in [&["--tlsv1.3"][..], &["--tls-max", "1.2"][..]] {
        curl(&shown, version).success();
        assert!(!curl(&[], version).status.success());
    }
    let s_client = |shown: &[&str], version: &str| {
        let at = format!("127.0.0.1:{}", server.port);
        Tool::new(test, "openssl")
            .args([
                "s_client",
                "-starttls",
                "imap",
                "-connect",
                &at,
                "-CAfile",
                trusted,
            ])
            .args(["-servername", "localhost", "-verify_return_error", version])
            .args(shown)
            .args(["-ign_eof", "-quiet"])
            .input("a LOGIN u sekret\r\nb LOGOUT\r\n")
            .run()
            .text()
    };
    // s_client shows what comes after the first certificate only if it is told.
    let shown = ["-cert", cert, "-key", key, "-cert_chain", cert];
    for version in ["-tls1_2", "-tls1_3"] {
        let said = s_client(&shown, version);
        assert!(said.contains("b OK"), "{version}: {said}");
        let said = s_client(&[], version);
        assert!(
            !said.contains("OK LOGIN") && said.contains("alert"),
            "{version}: {said}"
        );
    }
    eventually("every session is told of", || {
        let log = server.log();
        let count = |words: &str| log.matches(words).count();
        (count("client=\"alice\"") == 4 && count("the client shows no certificate") == 4)
            .then_some(())
    });
}
