//! A backend that is connected to (`--connect`): what it is told of the client, the ways in which it fails, and what the processes
//! may do meanwhile.

use crate::harness::*;
use libtest_mimic::Trial;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for policy in ["required", "optional", "implicit"] {
        for (name, place) in [("TCP", Place::Tcp), ("a unix socket", Place::Unix)] {
            for (words, introduction) in [
                ("without a header", Introduction::None),
                ("with a v1 header", Introduction::V1),
                ("with a v2 header", Introduction::V2),
            ] {
                tests.push(test(
                    &format!("connect: {policy} over {name} {words}"),
                    &[],
                    move |test| served(test, policy, place, introduction),
                ));
            }
        }
    }
    tests
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    Tcp,
    Unix,
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

fn remote(test: &Test, place: Place, introduction: Introduction) -> Remote {
    match place {
        Place::Tcp => Remote::tcp(test, introduction, &Backend::imap()),
        Place::Unix => Remote::unix(test, introduction, &Backend::imap()),
    }
}

fn program(test: &Test, remote: &Remote, introduction: Introduction) -> Program {
    let program = Program::new(test).connect(remote);
    match introduction {
        Introduction::None => program,
        Introduction::V1 => program.option("--send-proxy", "v1"),
        Introduction::V2 => program.option("--send-proxy", "v2"),
    }
}

/// The client comes in, by the policy's way, and TLS stands.
fn enter(client: &mut Client, policy: &str, offer: &TlsOffer) {
    if policy == "implicit" {
        client.handshake(offer).unwrap();
        client.greeting();
    } else {
        client.greeting();
        client.starttls_with(offer);
    }
}

fn served(test: &Test, policy: &str, place: Place, introduction: Introduction) {
    let remote = remote(test, place, introduction);
    let mut session = program(test, &remote, introduction).tls(policy).start();
    let offer = TlsOffer::new(pki());
    enter(session.client(), policy, &offer);
    session.client().login();
    let ends = ends(&session);
    let tls = facts(session.client(), Some("localhost"), None);
    let secured = match introduction {
        Introduction::None => Vec::new(),
        Introduction::V1 => v1(ends),
        Introduction::V2 => v2(Some(ends), Some(&tls)),
    };
    if policy == "optional" {
        // The backend of the cleartext phase is told the truth too: no TLS.
        let clear = match introduction {
            Introduction::V2 => v2(Some(ends), None),
            _ => secured.clone(),
        };
        assert_eq!(remote.headers(), [clear, secured]);
    } else {
        assert_eq!(remote.headers(), [secured]);
    }
    log_out(&mut session);
    let line = session.session_line();
    assert_eq!(line["policy"], policy);
    assert!(!line.contains_key("backend"), "{line:?}");
    // Nothing of the header counts as IMAP.
    let received = test.record().backends().last().unwrap().received().len();
    assert_eq!(line["in"], received.to_string());
}

fn log_out(session: &mut Session) {
    let client = session.client();
    assert!(client.command("bye LOGOUT").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_code(), 0);
}

// ---- headers as they must be, made by other code than the program's ----

type Ends = (SocketAddr, SocketAddr);

/// The client's address and the one it connected to.
fn ends(session: &Session) -> Ends {
    (
        session.peer.parse().unwrap(),
        session.local.parse().unwrap(),
    )
}

fn v1((source, destination): Ends) -> Vec<u8> {
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    format!(
        "PROXY {family} {} {} {} {}\r\n",
        source.ip(),
        destination.ip(),
        source.port(),
        destination.port()
    )
    .into_bytes()
}

fn v2(ends: Option<Ends>, tls: Option<&[u8]>) -> Vec<u8> {
    let mut content = Vec::new();
    let mut family = 0;
    if let Some((source, destination)) = ends {
        family = if source.is_ipv4() { 0x11 } else { 0x21 };
        for address in [source.ip(), destination.ip()] {
            match address {
                IpAddr::V4(ip) => content.extend(ip.octets()),
                IpAddr::V6(ip) => content.extend(ip.octets()),
            }
        }
        for port in [source.port(), destination.port()] {
            content.extend(port.to_be_bytes());
        }
    }
    content.extend(tls.unwrap_or_default());
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21".to_vec();
    header.push(family);
    header.extend((content.len() as u16).to_be_bytes());
    header.extend(content);
    header
}

fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend((value.len() as u16).to_be_bytes());
    bytes.extend(value);
    bytes
}

/// The TLVs about the session that this client is in. A certificate: flags beside the one for TLS, and the common name.
fn facts(client: &mut Client, name: Option<&str>, certificate: Option<(u8, &str)>) -> Vec<u8> {
    let tls = client.tls();
    let version = match tls.protocol_version().unwrap() {
        rustls::ProtocolVersion::TLSv1_2 => "TLSv1.2",
        rustls::ProtocolVersion::TLSv1_3 => "TLSv1.3",
        other => panic!("{other:?}"),
    };
    let suite = format!("{:?}", tls.negotiated_cipher_suite().unwrap().suite());
    let cipher = match suite.as_str() {
        "TLS13_AES_256_GCM_SHA384" => "TLS_AES_256_GCM_SHA384",
        "TLS13_AES_128_GCM_SHA256" => "TLS_AES_128_GCM_SHA256",
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384" => "ECDHE-ECDSA-AES256-GCM-SHA384",
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256" => "ECDHE-ECDSA-AES128-GCM-SHA256",
        other => panic!("unexpected cipher suite {other}"),
    };
    let mut bytes = Vec::new();
    if let Some(protocol) = tls.alpn_protocol() {
        bytes.extend(tlv(0x01, protocol));
    }
    if let Some(name) = name {
        bytes.extend(tlv(0x02, name.as_bytes()));
    }
    let mut ssl = vec![1 | certificate.map_or(0, |(flags, _)| flags)];
    ssl.extend(u32::from(certificate.is_none()).to_be_bytes());
    ssl.extend(tlv(0x21, version.as_bytes()));
    if let Some((_, name)) = certificate {
        ssl.extend(tlv(0x22, name.as_bytes()));
    }
    ssl.extend(tlv(0x23, cipher.as_bytes()));
    bytes.extend(tlv(0x20, &ssl));
    bytes
}
