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
            let known = Builder::with_addresses(
                v2::Version::Two | Command::Proxy,
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
