//! What TLS scanners say: sslscan sees our versions, suites and groups and nothing else, and testssl.sh has nothing to find fault with.

use crate::harness::*;
use libtest_mimic::Trial;
use std::time::{Duration, SystemTime};

pub fn tests() -> Vec<Trial> {
    let sslscan: &[Need] = &[
        Need::Command("tcpserver", "ucspi-tcp"),
        Need::Command("sslscan", "sslscan"),
        Need::Command("openssl", "openssl"),
    ];
    let testssl: &[Need] = &[
        Need::Command("tcpserver", "ucspi-tcp"),
        Need::Command("testssl", "testssl.sh"),
        Need::Command("openssl", "openssl"),
    ];
    let mut tests = Vec::new();
    for policy in ["implicit", "required"] {
        tests.extend([
            test(
                &format!("scanners: {policy}: sslscan sees what we speak and nothing else"),
                sslscan,
                move |test| run_sslscan(test, policy),
            ),
            test(
                &format!("scanners: {policy}: testssl.sh finds no fault"),
                testssl,
                move |test| run_testssl(test, policy),
            ),
        ]);
    }
    tests
}

/// A certificate as an authority gives it: short-lived, and revocable, which testssl.sh wants.
fn certificate(test: &Test, kind: Key) -> Pki {
    Pki::make(&test.path(&format!("{kind:?}")), kind, |params| {
        let (now, day) = (SystemTime::now(), Duration::from_secs(86_400));
        params.not_before = (now - day).into();
        params.not_after = (now + 89 * day).into();
        params.serial_number = Some(vec![0x5a; 16].into());
        params.crl_distribution_points = vec![rcgen::CrlDistributionPoint {
            uris: vec!["http://crl.example.org/ca.crl".to_owned()],
        }];
    })
}

/// With a certificate of each kind, so that all our suites are there to be seen.
fn start(test: &Test, policy: &str) -> (Pki, Server) {
    let (pki, rsa) = (
        certificate(test, Key::P256),
        certificate(test, Key::Rsa2048),
    );
    let both = |one, other| std::env::join_paths([one, other]).unwrap();
    let program = Program::new(test)
        .tls(policy)
        .option("--cert", both(&pki.cert, &rsa.cert))
        .option("--key", both(&pki.key, &rsa.key));
    let server = Server::start(test, Superserver::Tcpserver, &program);
    (pki, server)
}

/// What sslscan prints between its headings; the scanner speaks TLS 1.3 and older, and no post-quantum group yet.
const SEEN: &[&str] = &[
    "protocol ssl 2 0",
    "protocol ssl 3 0",
    "protocol tls 1.0 0",
    "protocol tls 1.1 0",
    "protocol tls 1.2 1",
    "protocol tls 1.3 1",
    "cipher TLSv1.3 TLS_AES_128_GCM_SHA256",
    "cipher TLSv1.3 TLS_AES_256_GCM_SHA384",
    "cipher TLSv1.3 TLS_CHACHA20_POLY1305_SHA256",
    "cipher TLSv1.2 ECDHE-ECDSA-AES256-GCM-SHA384",
    "cipher TLSv1.2 ECDHE-ECDSA-AES128-GCM-SHA256",
    "cipher TLSv1.2 ECDHE-ECDSA-CHACHA20-POLY1305",
    "cipher TLSv1.2 ECDHE-RSA-AES256-GCM-SHA384",
    "cipher TLSv1.2 ECDHE-RSA-AES128-GCM-SHA256",
    "cipher TLSv1.2 ECDHE-RSA-CHACHA20-POLY1305",
    "group TLSv1.3 secp256r1 (NIST P-256)",
    "group TLSv1.3 secp384r1 (NIST P-384)",
    "group TLSv1.3 x25519",
    "heartbleed TLSv1.2 0",
    "heartbleed TLSv1.3 0",
    "renegotiation 0 0",
];

fn run_sslscan(test: &Test, policy: &str) {
    let (_, server) = start(test, policy);
    let xml = test.path("sslscan.xml");
    let tool = Tool::new(test, "sslscan")
        .args(["--no-colour", "--sni-name=localhost"])
        .args(if policy == "implicit" {
            &[][..]
        } else {
            &["--starttls-imap"]
        })
        .arg(format!("--xml={}", xml.display()))
        .arg(format!("127.0.0.1:{}", server.port));
    tool.patience(Duration::from_secs(120)).run().success();
    let text = std::fs::read_to_string(xml).unwrap();
    let mut seen: Vec<String> = text.lines().filter_map(scan_line).collect();
    let mut wanted: Vec<_> = SEEN.to_vec();
    seen.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(seen, wanted, "{text}");
}

/// An element of the report that is about TLS, in a form to compare.
fn scan_line(line: &str) -> Option<String> {
    let line = line.trim().strip_prefix('<')?;
    let (element, rest) = line.split_once(' ')?;
    let attribute = |name: &str| {
        let (_, value) = rest.split_once(&format!("{name}=\""))?;
        value.split_once('"').map(|(value, _)| value)
    };
    let names: &[&str] = match element {
        "protocol" => &["type", " version", "enabled"],
        "cipher" => &["sslversion", "cipher"],
        "group" => &["sslversion", "name"],
        "heartbleed" => &["sslversion", "vulnerable"],
        "renegotiation" => &["supported", "secure"],
        _ => return None,
    };
    let values: Option<Vec<_>> = names.iter().map(|name| attribute(name)).collect();
    Some(format!("{element} {}", values?.join(" ")))
}

/// What testssl.sh must have seen, so that a scan that saw nothing is no success.
const FINDINGS: &[(&str, &str)] = &[
    ("SSLv2", "not offered"),
    ("SSLv3", "not offered"),
    ("TLS1", "not offered"),
    ("TLS1_1", "not offered"),
    ("TLS1_2", "offered"),
    ("TLS1_3", "offered with final"),
    ("cipherlist_NULL", "not offered"),
    ("cipherlist_aNULL", "not offered"),
    ("cipherlist_EXPORT", "not offered"),
    ("cipherlist_LOW", "not offered"),
    ("cipherlist_3DES_IDEA", "not offered"),
    ("cipherlist_AVERAGE", "not offered"),
];

/// What it says that is not about us, and why.
const ABOUT_OTHERS: &[&str] = &[
    // Its own openssl command knows no GOST.
    "engine_problem",
    // Behind TLS is nothing whose first words it knows.
    "service",
];

fn run_testssl(test: &Test, policy: &str) {
    let (pki, server) = start(test, policy);
    let csv = test.path("testssl.csv");
    // The vulnerabilities take half a minute, and are the same code behind STARTTLS, where only that way is new.
    let parts: &[&str] = match policy {
        "implicit" => &["-p", "-s", "-f", "-S", "-U"],
        _ => &["-t", "imap", "-p", "-s", "-S", "--ccs", "--renegotiation"],
    };
    let tool = Tool::new(test, "testssl")
        .args(["--quiet", "--color", "0", "--warnings", "off"])
        .args(["--nodns", "none", "--openssl-timeout", "20"])
        .args(parts)
        .arg("--add-ca")
        .arg(&pki.ca)
        .arg("--csvfile")
        .arg(&csv)
        .arg(format!("127.0.0.1:{}", server.port))
        .env("TERM", "dumb");
    let output = tool.patience(Duration::from_secs(240)).run().text();
    let text = std::fs::read_to_string(&csv).unwrap_or_else(|error| panic!("{error}: {output}"));
    let rows: Vec<Vec<&str>> = text
        .lines()
        .skip(1)
        .map(|line| line.trim_matches('"').split("\",\"").collect())
        .collect();
    for (id, finding) in FINDINGS {
        let row = rows.iter().find(|row| row[0] == *id);
        assert_eq!(row.map(|row| row[4]), Some(*finding), "{id}: {output}");
    }
    let faults: Vec<_> = rows
        .iter()
        .filter(|row| !matches!(row[3], "OK" | "INFO" | "LOW") && !ABOUT_OTHERS.contains(&row[0]))
        .collect();
    assert!(faults.is_empty(), "{faults:?}\n{output}");
    let needed: &[&str] = match policy {
        "implicit" => &[
            "heartbleed",
            "CCS",
            "secure_client_renego",
            "POODLE_SSL",
            "LUCKY13",
            "ROBOT",
        ],
        _ => &["CCS", "secure_client_renego"],
    };
    for id in needed {
        assert!(rows.iter().any(|row| row[0] == *id), "{id}: {output}");
    }
}
