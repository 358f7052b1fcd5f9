//! OCSP stapling: a response that `openssl ocsp` made for the test authority is stapled; one that would not convince is not, and costs
//! nothing but the staple.

use crate::harness::*;
use libtest_mimic::Trial;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub fn tests() -> Vec<Trial> {
    let needs: &[Need] = &[
        Need::Command("openssl", "openssl"),
        Need::Command("tcpserver", "ucspi-tcp"),
    ];
    vec![
        test(
            "ocsp: a good response is stapled in TLS 1.2 and 1.3",
            needs,
            stapled,
        ),
        test(
            "ocsp: a stale, foreign, revoking or broken response is told of and left out",
            needs,
            left_out,
        ),
        test(
            "ocsp: beside other certificates the reason is that of the one that it is about",
            needs,
            one_of_several,
        ),
        test(
            "ocsp: a certificate that demands a response and has none is told of",
            needs,
            demanded,
        ),
    ]
}

const SERIAL: u8 = 0x42;

/// A certificate, and a response about it that is fresh for a week.
pub fn certificate_and_response(test: &Test) -> (Pki, PathBuf) {
    let pki = certificate(test, None);
    let response = response(test, &pki, VALID, SERIAL);
    (pki, response)
}

/// The extension of a certificate that is to be refused without a stapled response: status_request, which is 5 (RFC 7633).
pub fn must_staple() -> rcgen::CustomExtension {
    let identifier = [1, 3, 6, 1, 5, 5, 7, 1, 24];
    rcgen::CustomExtension::from_oid_content(&identifier, vec![0x30, 3, 2, 1, 5])
}

fn certificate(test: &Test, extension: Option<rcgen::CustomExtension>) -> Pki {
    let pki = Pki::make(&test.path("pki"), Key::P256, |params| {
        params.serial_number = Some(vec![SERIAL].into());
        params.custom_extensions.extend(extension);
    });
    // With its issuer, by whose key the response is verified.
    let read = |path: &Path| std::fs::read_to_string(path).unwrap();
    write_file(&pki.cert, read(&pki.cert) + &read(&pki.ca), 0o644);
    pki
}

/// What the authority's responder says about the certificate, `status` being a line's beginning in openssl-ca(1)'s index.
fn response(test: &Test, pki: &Pki, status: &str, serial: u8) -> PathBuf {
    let number = next_number();
    let (index, path) = (
        test.path(&format!("index.{number}")),
        test.path(&format!("response.{number}")),
    );
    write_file(
        &index,
        format!("{status}\t{serial:02X}\tunknown\t/CN=localhost\n"),
        0o644,
    );
    let key = pki.authority_key();
    Tool::new(test, "openssl")
        .arg("ocsp")
        .arg("-index")
        .arg(index)
        .arg("-CA")
        .arg(&pki.ca)
        .arg("-rsigner")
        .arg(&pki.ca)
        .arg("-rkey")
        .arg(key)
        .arg("-issuer")
        .arg(&pki.ca)
        .args([
            "-sha1",
            "-serial",
            &format!("0x{serial:02x}"),
            "-ndays",
            "7",
        ])
        .arg("-respout")
        .arg(&path)
        .run()
        .success();
    path
}

const VALID: &str = "V\t450101000000Z\t";
const REVOKED: &str = "R\t450101000000Z\t250101000000Z";

/// What a client sees that asks for it.
pub fn seen_at(test: &Test, pki: &Pki, address: &str, policy: &str, version: &str) -> String {
    Tool::new(test, "openssl")
        .args(["s_client", "-connect", address])
        .args(if policy == "implicit" {
            &[][..]
        } else {
            &["-starttls", "imap"]
        })
        .args([
            "-servername",
            "localhost",
            "-verify_return_error",
            "-CAfile",
        ])
        .arg(&pki.ca)
        .args(["-status", "-ign_eof", version])
        .input("a LOGIN u sekret\r\nb LOGOUT\r\n")
        .run()
        .text()
}

/// The same in each version, behind STARTTLS and on an implicit port.
fn seen(test: &Test, pki: &Pki, response: &Path) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for policy in ["required", "implicit"] {
        let program = Program::new(test)
            .tls(policy)
            .pki(pki)
            .option("--ocsp", response);
        let server = Server::start(test, Superserver::Tcpserver, &program);
        for version in ["-tls1_2", "-tls1_3"] {
            let text = seen_at(
                test,
                pki,
                &format!("127.0.0.1:{}", server.port),
                policy,
                version,
            );
            assert!(
                text.contains("a OK") && text.contains("b OK"),
                "{policy}, {version}: {text}"
            );
            all.push((format!("{policy}, {version}: {text}"), server.log()));
        }
    }
    all
}

fn stapled(test: &Test) {
    let (pki, good) = certificate_and_response(test);
    for (text, log) in seen(test, &pki, &good) {
        assert!(text.contains("OCSP Response Status: successful"), "{text}");
        assert!(text.contains("Cert Status: good"), "{text}");
        assert!(!log.contains("--ocsp"), "{log}");
    }
}

fn left_out(test: &Test) {
    let pki = certificate(test, None);
    let garbage = test.path("garbage");
    write_file(&garbage, "hello\n", 0o644);
    let cut = test.path("cut");
    let original = std::fs::read(response(test, &pki, VALID, SERIAL)).unwrap();
    write_file(&cut, &original[..original.len() - 1], 0o644);
    let forged = test.path("forged");
    let mut bytes = original.clone();
    let signature = parts(&bytes).1;
    bytes[signature.end - 1] ^= 1;
    write_file(&forged, &bytes, 0o644);
    let foreign = response(test, &pki, VALID, SERIAL + 1);
    let revoking = response(test, &pki, REVOKED, SERIAL);
    let stale = test.path("stale");
    write_file(&stale, two_years_older(&pki, &original), 0o644);
    for (response, words) in [
        (&stale, "it was to be renewed by "),
        (&garbage, "not an OCSP response in DER form"),
        (&cut, "not an OCSP response in DER form"),
        (&forged, ""),
        (&foreign, ""),
        (&revoking, "it says that the certificate is revoked"),
    ] {
        for (text, log) in seen(test, &pki, response) {
            assert!(text.contains("OCSP response: no response sent"), "{text}");
            let name = format!(
                "OCSP response '{}' (--ocsp) is not used: {words}",
                response.display()
            );
            let line = log.lines().find(|line| line.contains(&name));
            assert!(line.is_some(), "{name}: {log}");
        }
    }
}

fn one_of_several(test: &Test) {
    let (own, other) = (certificate(test, None), Pki::of(Key::Rsa2048));
    let both = |one: &PathBuf, two: &PathBuf| std::env::join_paths([one, two]).unwrap();
    for (response, words) in [
        (
            response(test, &own, REVOKED, SERIAL),
            "it says that the certificate is revoked",
        ),
        (
            response(test, &own, VALID, SERIAL + 1),
            "it is about another certificate",
        ),
    ] {
        let mut session = Program::new(test)
            .option("--cert", both(&own.cert, &other.cert))
            .option("--key", both(&own.key, &other.key))
            .option("--ocsp", response)
            .start();
        session.client().greeting();
        let line = session.wait_log("(--ocsp) is not used: ");
        assert!(line.contains(words), "{line}");
    }
}

fn demanded(test: &Test) {
    let pki = certificate(test, Some(must_staple()));
    let fresh = response(test, &pki, VALID, SERIAL);
    let revoking = response(test, &pki, REVOKED, SERIAL);
    let words = "demands a stapled OCSP response (must-staple), and there is none";
    for (response, is_told) in [(None, true), (Some(fresh), false), (Some(revoking), true)] {
        let mut program = Program::new(test).pki(&pki);
        if let Some(response) = response {
            program = program.option("--ocsp", response);
        }
        let mut session = program.start();
        session.client().greeting();
        let line = format!("certificate '{}' (--cert) {words}", pki.cert.display());
        assert_eq!(session.log().contains(&line), is_told, "{}", session.log());
        let output = program.flag("--check").run();
        let report = String::from_utf8(output.stdout).unwrap();
        let line = format!("error: certificate: it {words}");
        assert_eq!(report.contains(&line), is_told, "{report}");
        // Once.
        let count = report.matches(words).count();
        assert_eq!(count, usize::from(is_told), "{report}");
        let code = if is_told { 100 } else { 0 };
        assert_eq!(output.status.code(), Some(code), "{report}");
    }
}

/// Where in a response the signed part is, and the signature (RFC 6960 section 4.2.1).
fn parts(response: &[u8]) -> (Range<usize>, Range<usize>) {
    let mut at = 0;
    let header = |at: usize| match response[at + 1] {
        0x82 => (
            4,
            usize::from(response[at + 2]) << 8 | usize::from(response[at + 3]),
        ),
        0x81 => (3, usize::from(response[at + 2])),
        short => (2, usize::from(short)),
    };
    // Into the response, past its status, into its bytes, past their kind, into the BasicOCSPResponse.
    for is_entered in [true, false, true, true, false, true, true] {
        let (size, length) = header(at);
        at += if is_entered { size } else { size + length };
    }
    let end = |at: usize| at + header(at).0 + header(at).1;
    let signed = at..end(at);
    let signature = end(signed.end);
    // A bit string's first octet says that all its bits are used.
    (signed, signature + header(signature).0 + 1..end(signature))
}

/// The same in the year 2024, signed again; openssl-ocsp(1) makes none that are old.
fn two_years_older(pki: &Pki, response: &[u8]) -> Vec<u8> {
    let (signed, signature) = parts(response);
    let mut response = response.to_vec();
    for at in signed.clone() {
        // GeneralizedTime of 15 octets.
        if response[at..].starts_with(b"\x18\x0f20") {
            response[at + 2..at + 6].copy_from_slice(b"2024");
        }
    }
    // One of the same length as the old one comes soon: its numbers are random.
    let made = std::iter::repeat_with(|| pki.sign_as_authority(&response[signed.clone()]));
    let made = { made }.find(|made| made.len() == signature.len()).unwrap();
    response[signature].copy_from_slice(&made);
    response
}
