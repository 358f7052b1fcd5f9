//! Handshakes of real clients that must fail, and what is said about them: versions, certificates, protocols, renegotiation.

use crate::harness::*;
use crate::hostile::alert_of;
use libtest_mimic::Trial;
use rustls::version::{TLS12, TLS13};

pub fn tests() -> Vec<Trial> {
    let openssl: &[Need] = &[
        Need::Command("openssl", "openssl"),
        Need::Command("tcpserver", "ucspi-tcp"),
        Need::EachStarted,
    ];
    vec![
        test(
            "handshake: --min-tls 1.3 refuses TLS 1.2, in words",
            &[],
            min_tls,
        ),
        test(
            "handshake: openssl's failures are told in words",
            openssl,
            words_for_openssl,
        ),
        test(
            "handshake: a cleartext protocol on the TLS port is told in words",
            &[],
            cleartext,
        ),
        test(
            "handshake: openssl, gnutls and nss work in TLS 1.2 and 1.3",
            &[
                Need::Command("tcpserver", "ucspi-tcp"),
                Need::Command("openssl", "openssl"),
                Need::Command("gnutls-cli", "gnutls-bin"),
                Need::Command("tstclnt", "libnss3-tools"),
            ],
            other_libraries,
        ),
        test(
            "handshake: openssl 3.5 and newer meets us in X25519MLKEM768",
            &[
                Need::Command("tcpserver", "ucspi-tcp"),
                Need::Python("OpenSSL", "pyopenssl"),
            ],
            post_quantum,
        ),
        test(
            "handshake: renegotiation is refused to openssl",
            openssl,
            renegotiation,
        ),
    ]
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn min_tls(test: &Test) {
    for policy in ["required", "implicit"] {
        for (version, works) in [(&TLS12, false), (&TLS13, true)] {
            let mut session = Program::new(test)
                .tls(policy)
                .option("--min-tls", "1.3")
                .start();
            let client = session.client();
            if policy == "required" {
                client.greeting();
                assert!(client.command("a STARTTLS").is_ok());
            }
            let versions = vec![version];
            let offer = TlsOffer {
                versions,
                ..TlsOffer::new(pki())
            };
            let result = client.handshake(&offer);
            assert_eq!(result.is_ok(), works, "{result:?}");
            if !works {
                assert!(result.unwrap_err().contains("ProtocolVersion"));
                session.close_client();
                session.wait_log(
                    "handshake failed: the client does not offer TLS 1.3, and --min-tls 1.3 asks for it \
                     (Tls12NotOfferedOrEnabled; alert sent: protocol_version)",
                );
            }
            session.close_client();
            assert_eq!(session.wait_code(), 0);
        }
    }
}

fn words_for_openssl(test: &Test) {
    let server = |pki: &Pki| {
        let program = Program::new(test).tls("implicit").pki(pki);
        Server::start(test, Superserver::Tcpserver, &program)
    };
    let ecdsa = server(pki());
    let add_rsa = "the client takes no ECDSA certificate, only RSA: add an RSA certificate with a second --cert and --key";
    let ca = pki().ca.to_str().unwrap();
    for (arguments, words) in [
        (
            &["-tls1_1", "-cipher", "DEFAULT:@SECLEVEL=0"][..],
            "the client offers TLS 1.1 at most, and 1.2 is the least (",
        ),
        (
            &["-tls1", "-cipher", "DEFAULT:@SECLEVEL=0"],
            "the client offers TLS 1.0 at most, and 1.2 is the least (",
        ),
        (
            &["-tls1_3", "-sigalgs", "RSA-PSS+SHA256:RSA+SHA256"],
            add_rsa,
        ),
        (
            &["-tls1_2", "-sigalgs", "RSA-PSS+SHA256:RSA+SHA256"],
            add_rsa,
        ),
        (
            &["-tls1_2", "-cipher", "ECDHE-RSA-AES128-GCM-SHA256"],
            add_rsa,
        ),
        (
            &["-tls1_2", "-cipher", "AES128-SHA"],
            // RSA key exchange, for which there are no groups.
            "the client offers no cipher suite that we have: ECDHE with AES-GCM or ChaCha20-Poly1305 (NoKxGroupsInCommon; alert sent: handshake_failure)",
        ),
        (
            &["-groups", "P-521"],
            "it offers secp521r1 (NoKxGroupsInCommon; alert sent: handshake_failure)",
        ),
        (
            &["-alpn", "h2,http/1.1"],
            "the client wants h2 or http/1.1, not imap (ALPN) (NoApplicationProtocol; alert sent: no_application_protocol)",
        ),
        (
            &["-verify_return_error"],
            "it does not know the authority that issued it; are the intermediate certificates in --cert? (alert received: unknown_ca)",
        ),
        (
            &[
                "-CAfile",
                ca,
                "-verify_return_error",
                "-attime",
                "1500000000",
            ],
            "(alert received: bad_certificate)",
        ),
        (
            &[
                "-CAfile",
                ca,
                "-verify_return_error",
                "-attime",
                "2500000000",
            ],
            "the client holds our certificate for expired, or not valid yet: is its clock right? (alert received: certificate_expired)",
        ),
    ] {
        let before = ecdsa.log().len();
        let output = Tool::new(test, "openssl")
            .args(["s_client", "-brief", "-connect"])
            .arg(format!("127.0.0.1:{}", ecdsa.port))
            .args(["-servername", "localhost"])
            .args(arguments)
            .run();
        assert!(!output.status.success(), "{arguments:?}");
        let log = eventually("tcpserver tells the end", || {
            let log = ecdsa.log()[before..].to_owned();
            log.contains("tcpserver: end").then_some(log)
        });
        let line = log.lines().find(|line| line.contains(words));
        assert!(line.is_some(), "{arguments:?}: {log}");
        assert!(
            line.unwrap().contains(": handshake failed: "),
            "{arguments:?}: {log}"
        );
        assert!(log.contains(" status 0\n"), "{arguments:?}: {log}");
    }
    assert!(test.record().is_empty(), "a backend was started");
}

fn cleartext(test: &Test) {
    for (said, words) in [
        (
            &b"a LOGIN u sekret\r\n"[..],
            "the client speaks IMAP in clear where TLS has to begin",
        ),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP"),
        (
            b"\x80\x2e\x01\x03\x01\0\x15\0\0\0\x10\0\0\x39\0\0\x38\0\0\x35",
            "",
        ),
    ] {
        let mut session = Program::new(test).tls("implicit").start();
        session.client().send_raw(said);
        let (answer, _) = session.client().read_to_end();
        assert_eq!(alert_of(&answer), Some(50), "{answer:?}");
        session.close_client();
        let line = session.wait_log("handshake failed: ");
        assert!(line.contains(words), "{line}");
        assert!(!line.contains("sekret"), "{line}");
        assert_eq!(session.wait_code(), 0);
    }
    assert!(test.record().is_empty());
}

/// `R` makes s_client ask for a new handshake (TLS 1.2), `k` and `K` for new keys (TLS 1.3), which is legal.
fn renegotiation(test: &Test) {
    let server = Server::start(
        test,
        Superserver::Tcpserver,
        &Program::new(test).tls("implicit"),
    );
    let talk = |version: &str, lines: &str| {
        Tool::new(test, "openssl")
            .args(["s_client", "-connect"])
            .arg(format!("127.0.0.1:{}", server.port))
            .args(["-CAfile", pki().ca.to_str().unwrap(), version])
            .input(lines)
            .talk()
    };
    for (version, command, works) in [
        ("-tls1_2", "R", false),
        ("-tls1_3", "k", true),
        ("-tls1_3", "K", true),
    ] {
        let before = server.log().len();
        let (running, mut client) = talk(version, "");
        client.read_until("* OK");
        client.read_until("\n");
        client.send(format!("{command}\n"));
        // What comes with the command's line in one piece is dropped by s_client.
        let word = if works { "KEYUPDATE" } else { "RENEGOTIATING" };
        eventually("s_client has seen the command", || {
            running.log().contains(word).then_some(())
        });
        if works {
            client.send("a LOGOUT\r\n");
            client.read_until("a OK");
        }
        // Refused: it ends by itself.
        client.read_to_end();
        drop((running, client));
        let log = eventually("tcpserver tells the end", || {
            let log = server.log()[before..].to_owned();
            log.contains("tcpserver: end").then_some(log)
        });
        assert!(log.contains(" status 0\n"), "{log}");
        assert_eq!(log.contains("end=\"logout\""), works, "{log}");
    }
}

fn other_libraries(test: &Test) {
    let server = Server::start(
        test,
        Superserver::Tcpserver,
        &Program::new(test).tls("implicit"),
    );
    let (at, port) = (
        format!("127.0.0.1:{}", server.port),
        server.port.to_string(),
    );
    let ca = pki().ca.to_str().unwrap();
    let database = test.path("nss");
    make_dir(&database, 0o755);
    let database = format!("sql:{}", database.display());
    let certutil = |arguments: &[&str]| {
        let tool = Tool::new(test, "certutil").args(["-d", &database]);
        tool.args(arguments).run().success()
    };
    certutil(&["-N", "--empty-password"]);
    certutil(&["-A", "-n", "ca", "-t", "C,,", "-i", ca]);
    for version in ["1.2", "1.3"] {
        let nss = format!("tls{version}:tls{version}");
        let gnutls = format!("NORMAL:-VERS-ALL:+VERS-TLS{version}");
        let openssl = format!("-tls{}", version.replace('.', "_"));
        let clients: [(&str, Vec<&str>); 3] = [
            (
                "openssl",
                vec![
                    "s_client",
                    &openssl,
                    "-connect",
                    &at,
                    "-CAfile",
                    ca,
                    "-verify_return_error",
                ],
            ),
            (
                "gnutls-cli",
                vec![
                    "--priority",
                    &gnutls,
                    "--x509cafile",
                    ca,
                    "--port",
                    &port,
                    "localhost",
                ],
            ),
            (
                "tstclnt",
                vec!["-h", "127.0.0.1", "-p", &port, "-d", &database, "-V", &nss],
            ),
        ];
        for (name, arguments) in clients {
            let before = server.log().len();
            let (running, mut client) = Tool::new(test, name).args(arguments).talk();
            client.read_until("* OK");
            client.read_until("\n");
            client.send("a LOGOUT\r\n");
            client.read_until("a OK");
            drop((running, client));
            let line = eventually("the session line", || {
                let log = server.log()[before..].to_owned();
                log.lines()
                    .find(|line| line.contains(": session "))
                    .map(str::to_owned)
            });
            assert!(
                line.contains(&format!(" tls=TLSv{version} ")),
                "{name}: {line}"
            );
            // GnuTLS prefers the groups of NIST, and asks for what it prefers.
            let is_curve25519 = line.contains(" group=X25519");
            let is_nist = name == "gnutls-cli" && line.contains(" group=secp256r1 ");
            assert!(is_curve25519 || is_nist, "{name}: {line}");
        }
    }
}

/// pyOpenSSL brings an OpenSSL of its own, which is newer than Debian's.
fn post_quantum(test: &Test) {
    for policy in ["implicit", "required"] {
        let server = Server::start(
            test,
            Superserver::Tcpserver,
            &Program::new(test).tls(policy),
        );
        let script = format!(
            r#"
import socket, sys
from OpenSSL import SSL
plain = socket.create_connection(('127.0.0.1', {port}))
if '{policy}' == 'required':
    file = plain.makefile('rb')
    assert file.readline().startswith(b'* OK')
    plain.sendall(b'a STARTTLS\r\n')
    assert file.readline().startswith(b'a OK')
context = SSL.Context(SSL.TLS_CLIENT_METHOD)
context.load_verify_locations('{ca}')
context.set_verify(SSL.VERIFY_PEER, lambda connection, certificate, error, depth, good: good)
tls = SSL.Connection(context, plain)
tls.set_tlsext_host_name(b'localhost')
tls.set_connect_state()
tls.do_handshake()
tls.sendall(b'b NOOP\r\n')
said = b''
while b'b OK' not in said:
    said += tls.recv(1000)
print(SSL.SSLeay_version(0).decode(), tls.get_group_name())
tls.shutdown()
"#,
            port = server.port,
            ca = pki().ca.display(),
        );
        let said = Tool::new(test, "python3")
            .env("PYTHONPATH", tool::tools().unwrap().join("python"))
            .args(["-c", &script])
            .run()
            .success()
            .text();
        assert!(said.contains("X25519MLKEM768"), "{said}");
        let line = server.wait_log(": session ");
        assert!(
            line.contains(" tls=TLSv1.3 group=X25519MLKEM768 "),
            "{line}"
        );
    }
}
