//! The header for a backend that was connected to: the client's address, and what is known about TLS.

use std::net::{IpAddr, SocketAddr};

use ppp::v2::{Builder, Command, Protocol, Type, WriteToHeader};
use ppp::{v1, v2};

use crate::activation::Addresses;
use crate::tls::Facts;

/// The form of the header (`--send-proxy`).
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Version {
    /// A line of text: addresses only.
    V1,
    /// Binary: addresses, and facts about TLS.
    V2,
}

/// The client connected by TLS.
const CLIENT_SSL: u8 = 1;
/// It showed a certificate on this connection.
const CLIENT_CERT_CONN: u8 = 2;
/// It showed one on this connection, or when the session that was resumed began.
const CLIENT_CERT_SESS: u8 = 4;

/// The bytes to send first. `addresses` is `None` where the client has none, as on a unix socket; `tls` is `None` where there is
/// no TLS, and nothing is said about it then.
pub(crate) fn header(
    version: Version,
    addresses: Option<Addresses>,
    tls: Option<(&Facts, Option<&[u8]>)>,
) -> std::io::Result<Vec<u8>> {
    let pair = addresses.map(of_one_family);
    match version {
        Version::V1 => {
            let addresses = pair.map_or(v1::Addresses::Unknown, Into::into);
            Ok(addresses.to_string().into_bytes())
        }
        Version::V2 => {
            // Without addresses it is LOCAL, and not PROXY with none: section 2.2 leaves it to the receiver whether it takes the
            // latter, and Dovecot does not. Who reads the rest of the header all the same, which Dovecot does not either, reads
            // what is true.
            let known = Builder::with_addresses(
                v2::Version::Two | pair.map_or(Command::Local, |_| Command::Proxy),
                pair.map_or(Protocol::Unspecified, |_| Protocol::Stream),
                pair.map_or(v2::Addresses::Unspecified, Into::into),
            );
            match tls {
                Some((facts, alpn)) => with_tls(known, facts, alpn)?.build(),
                None => known.build(),
            }
        }
    }
}

/// Source and destination, both IPv4 or both IPv6: the format knows nothing else.
fn of_one_family(Addresses { local, peer }: Addresses) -> (SocketAddr, SocketAddr) {
    let mapped = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.to_ipv6_mapped().into(), address.port()),
        IpAddr::V6(_) => address,
    };
    if peer.is_ipv4() == local.is_ipv4() {
        (peer, local)
    } else {
        (mapped(peer), mapped(local))
    }
}

/// Section 2.2: `PP2_TYPE_ALPN`, `PP2_TYPE_AUTHORITY` and `PP2_TYPE_SSL`, in the order of their numbers. Algorithms of our own
/// certificate (`PP2_SUBTYPE_SSL_SIG_ALG`, `_KEY_ALG`) are not told: the process that knows the session does not examine it.
fn with_tls(header: Builder, facts: &Facts, alpn: Option<&[u8]>) -> std::io::Result<Builder> {
    let mut header = header;
    if let Some(alpn) = alpn {
        header = header.write_tlv(Type::ALPN, alpn)?;
    }
    if let Some(name) = facts.server_name() {
        header = header.write_tlv(Type::Authority, name.as_bytes())?;
    }
    header.write_tlv(Type::SSL, &ssl(facts)?)
}

/// One octet of flags, four that are zero only if a certificate was shown and verified, and sub-TLVs.
fn ssl(facts: &Facts) -> std::io::Result<Vec<u8>> {
    const UNVERIFIED: u32 = 1;
    let (flags, verify) = match facts.client() {
        // What is in a resumed session was shown and verified when that began, and verified again (Tls::examine_client).
        Some(_) if facts.is_resumed() => (CLIENT_SSL | CLIENT_CERT_SESS, 0),
        Some(_) => (CLIENT_SSL | CLIENT_CERT_CONN | CLIENT_CERT_SESS, 0),
        None => (CLIENT_SSL, UNVERIFIED),
    };
    let mut value = vec![flags];
    value.extend(u32::to_be_bytes(verify));
    let name = facts.client().and_then(|client| client.common_name());
    let facts = [
        (Type::SSLVersion, Some(facts.version())),
        (Type::SSLCommonName, name),
        (Type::SSLCipher, Some(facts.cipher())),
    ];
    for (kind, text) in facts {
        if let Some(text) = text {
            value.extend((kind, text.as_bytes()).to_bytes()?);
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::FACTS_LENGTH;

    fn addresses(peer: &str, local: &str) -> Option<Addresses> {
        Some(Addresses {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        })
    }

    /// TLS 1.3 with `TLS_AES_128_GCM_SHA256`, and this server name.
    fn facts(name: &str) -> Facts {
        let mut bytes = [0; FACTS_LENGTH];
        bytes[..4].copy_from_slice(&[0x03, 0x04, 0x13, 0x01]);
        bytes[8] = u8::try_from(name.len()).unwrap();
        bytes[9..9 + name.len()].copy_from_slice(name.as_bytes());
        Facts::decode(&bytes).unwrap()
    }

    #[test]
    fn the_first_form_is_a_line() {
        let line =
            |addresses| String::from_utf8(header(Version::V1, addresses, None).unwrap()).unwrap();
        assert_eq!(
            line(addresses("192.0.2.7:50312", "192.0.2.1:143")),
            "PROXY TCP4 192.0.2.7 192.0.2.1 50312 143\r\n"
        );
        assert_eq!(
            line(addresses("[2001:db8::7]:50312", "[2001:db8::1]:143")),
            "PROXY TCP6 2001:db8::7 2001:db8::1 50312 143\r\n"
        );
        // As a balancer may tell of them: the format has no room for one of each.
        assert_eq!(
            line(addresses("192.0.2.7:50312", "[2001:db8::1]:143")),
            "PROXY TCP6 ::ffff:192.0.2.7 2001:db8::1 50312 143\r\n"
        );
        assert_eq!(line(None), "PROXY UNKNOWN\r\n");
    }

    #[test]
    fn the_second_form_says_nothing_of_tls_where_there_is_none() {
        let known = addresses("192.0.2.7:258", "192.0.2.1:143");
        let signature = b"\r\n\r\n\0\r\nQUIT\n";
        let expected = [
            signature.as_slice(),
            &[0x21, 0x11, 0, 12, 192, 0, 2, 7, 192, 0, 2, 1, 1, 2, 0, 143],
        ]
        .concat();
        assert_eq!(header(Version::V2, known, None).unwrap(), expected);
        let expected = [signature.as_slice(), &[0x20, 0, 0, 0]].concat();
        assert_eq!(header(Version::V2, None, None).unwrap(), expected);
    }

    #[test]
    fn the_second_form_tells_of_tls() {
        let known = addresses("192.0.2.7:258", "192.0.2.1:143");
        let facts = facts("a.example");
        let told = header(Version::V2, known, Some((&facts, Some(b"imap")))).unwrap();
        let expected = [
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x4a".as_slice(),
            &[192, 0, 2, 7, 192, 0, 2, 1, 1, 2, 0, 143],
            b"\x01\x00\x04imap\x02\x00\x09a.example",
            b"\x20\x00\x28\x01\x00\x00\x00\x01\x21\x00\x07TLSv1.3\x23\x00\x16TLS_AES_128_GCM_SHA256",
        ]
        .concat();
        assert_eq!(told, expected);
        // Other code reads it so, too.
        let parsed = v2::Header::try_from(told.as_slice()).unwrap();
        assert_eq!(parsed.len(), told.len());
        let kinds: Vec<u8> = parsed.tlvs().map(|tlv| tlv.unwrap().kind).collect();
        assert_eq!(kinds, [1, 2, 0x20]);
    }

    #[test]
    fn the_longest_name_fits() {
        let facts = facts(&["a".repeat(63).as_str(); 4].join(".")[..253]);
        let told = header(Version::V2, None, Some((&facts, None))).unwrap();
        assert!(told.len() < 1024, "{}", told.len());
    }
}
