//! Handshakes of real clients that must fail, and what is said about them: versions, certificates, protocols, renegotiation.

use crate::harness::*;
use crate::hostile::alert_of;
use libtest_mimic::Trial;
use rustls::version::{TLS12, TLS13};

pub fn tests() -> Vec<Trial> {
    let openssl: &[Need] = &[
        Need::Command("openssl", "openssl"),
        Need::Command("tcpserver", "ucspi-tcp"),
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
            "it offers none (NoKxGroupsInCommon; alert sent: handshake_failure)",
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
        assert!(line.unwrap().contains(" failed: "), "{arguments:?}: {log}");
        assert!(log.contains(" status 0\n"), "{arguments:?}: {log}");
    }
    assert!(test.record().is_empty() || ecdsa.log().contains("TLS failed"));
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
