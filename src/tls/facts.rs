//! What the backend and the log are told about a TLS session, and its fixed-size form for the launcher.

use std::fmt;

use super::client_identity::{CLIENT_LENGTH, ClientIdentity};
use crate::host_name::{HostName, NAME_LIMIT};
use crate::log::Escaped;
use rustls::{CipherSuite, NamedGroup, ProtocolVersion};

/// Checked facts about a TLS session.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Facts {
    version: u16,
    cipher: u16,
    group: u16,
    server_name: Option<HostName>,
    is_resumed: bool,
    client: Option<ClientIdentity>,
}

/// Octets of [`Facts::encode`]: three numbers, two flags, a length, and room for the longest name and the client's identity.
pub(crate) const FACTS_LENGTH: usize = 6 + 2 + 1 + NAME_LIMIT + CLIENT_LENGTH;

/// Reserved by IANA, so no group's number.
const NO_GROUP: u16 = 0;

impl Facts {
    pub(super) fn new(
        version: Option<ProtocolVersion>,
        cipher: Option<CipherSuite>,
        group: Option<NamedGroup>,
        server_name: Option<&str>,
    ) -> Self {
        Self {
            version: version.map_or(0, u16::from),
            cipher: cipher.map_or(0, u16::from),
            group: group.map_or(NO_GROUP, u16::from),
            server_name: server_name.and_then(HostName::new),
            is_resumed: false,
            client: None,
        }
    }

    /// With the identity that the client's verified certificate gives it.
    pub(super) fn with_client(self, client: Option<ClientIdentity>) -> Self {
        Self { client, ..self }
    }

    /// Whether an earlier session was resumed.
    pub(super) fn with_resumption(self, is_resumed: bool) -> Self {
        Self { is_resumed, ..self }
    }

    /// Fixed-size bytes for the launcher.
    pub(crate) fn encode(&self) -> [u8; FACTS_LENGTH] {
        let mut bytes = [0; FACTS_LENGTH];
        let name = self.server_name().unwrap_or_default().as_bytes();
        let numbers = [self.version, self.cipher, self.group]
            .into_iter()
            .flat_map(u16::to_be_bytes);
        let room = NAME_LIMIT.saturating_sub(name.len());
        let client = self.client.as_ref().map(ClientIdentity::encode);
        let content = numbers
            .chain([u8::from(self.is_resumed), u8::from(client.is_some())])
            .chain([u8::try_from(name.len()).unwrap_or(0)])
            .chain(name.iter().copied())
            .chain(std::iter::repeat_n(0, room))
            .chain(client.into_iter().flatten());
        for (to, from) in bytes.iter_mut().zip(content) {
            *to = from;
        }
        bytes
    }

    /// The facts in `bytes`, checked again: who reads them has privileges, who wrote them has none.
    pub(crate) fn decode(bytes: &[u8; FACTS_LENGTH]) -> Option<Self> {
        let [v1, v2, c1, c2, g1, g2, resumed, known, length, rest @ ..] = bytes;
        let (name, client) = rest.split_first_chunk::<NAME_LIMIT>()?;
        let name = std::str::from_utf8(name.get(..usize::from(*length))?).ok()?;
        let server_name = HostName::new(name);
        let client = match known {
            0 if client.iter().all(|&octet| octet == 0) => None,
            1 => Some(ClientIdentity::decode(client.try_into().ok()?)?),
            _ => return None,
        };
        let is_read = server_name.is_some() || name.is_empty();
        (is_read && *resumed <= 1).then(|| Self {
            version: u16::from_be_bytes([*v1, *v2]),
            cipher: u16::from_be_bytes([*c1, *c2]),
            group: u16::from_be_bytes([*g1, *g2]),
            server_name,
            is_resumed: *resumed == 1,
            client,
        })
    }

    /// `TLSv1.2` or `TLSv1.3`, as mod_ssl's `SSL_PROTOCOL`.
    pub(crate) fn version(&self) -> &'static str {
        match ProtocolVersion::from(self.version) {
            ProtocolVersion::TLSv1_2 => "TLSv1.2",
            ProtocolVersion::TLSv1_3 => "TLSv1.3",
            _ => "unknown",
        }
    }

    /// The cipher suite's name in OpenSSL's notation, as mod_ssl's `SSL_CIPHER`; ciphers(1).
    pub(crate) fn cipher(&self) -> &'static str {
        match CipherSuite::from(self.cipher) {
            CipherSuite::TLS13_AES_128_GCM_SHA256 => "TLS_AES_128_GCM_SHA256",
            CipherSuite::TLS13_AES_256_GCM_SHA384 => "TLS_AES_256_GCM_SHA384",
            CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => "TLS_CHACHA20_POLY1305_SHA256",
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 => "ECDHE-ECDSA-AES128-GCM-SHA256",
            CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384 => "ECDHE-ECDSA-AES256-GCM-SHA384",
            CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 => {
                "ECDHE-ECDSA-CHACHA20-POLY1305"
            }
            CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256 => "ECDHE-RSA-AES128-GCM-SHA256",
            CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384 => "ECDHE-RSA-AES256-GCM-SHA384",
            CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => {
                "ECDHE-RSA-CHACHA20-POLY1305"
            }
            _ => "unknown",
        }
    }

    /// The key exchange group's IANA name; `none` where no keys were exchanged, as in a resumed TLS 1.2 session.
    pub(crate) fn group(&self) -> &'static str {
        if self.group == NO_GROUP {
            return "none";
        }
        match NamedGroup::from(self.group) {
            NamedGroup::X25519 => "X25519",
            NamedGroup::X25519MLKEM768 => "X25519MLKEM768",
            NamedGroup::secp256r1 => "secp256r1",
            NamedGroup::secp384r1 => "secp384r1",
            _ => "unknown",
        }
    }

    /// The host name that the client asked for, if it was one.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.server_name.as_ref().map(HostName::as_str)
    }

    /// Whether an earlier session was resumed.
    pub(crate) fn is_resumed(&self) -> bool {
        self.is_resumed
    }

    /// Who the client is by its certificate, if it has shown one.
    pub(crate) fn client(&self) -> Option<&ClientIdentity> {
        self.client.as_ref()
    }
}

/// As the session line has it.
impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sni = self.server_name().unwrap_or("none");
        write!(
            f,
            "tls={} group={} cipher={} sni={sni} resumed={}",
            self.version(),
            self.group(),
            self.cipher(),
            if self.is_resumed { "yes" } else { "no" }
        )?;
        match self.client.as_ref().map(ClientIdentity::name) {
            Some(name) => {
                let name = name.unwrap_or("unnamed").as_bytes();
                write!(f, " client=\"{}\"", Escaped(name))
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(name: &str) -> Facts {
        Facts::new(
            Some(ProtocolVersion::TLSv1_3),
            Some(CipherSuite::TLS13_AES_128_GCM_SHA256),
            Some(NamedGroup::X25519MLKEM768),
            Some(name),
        )
    }

    fn client(name: &str) -> ClientIdentity {
        let mut params = rcgen::CertificateParams::default();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        ClientIdentity::from_der(params.self_signed(&key).unwrap().der()).unwrap()
    }

    #[test]
    fn facts_survive_the_way_to_the_launcher() {
        for name in ["", "mail.example", &format!("{}a", "a.".repeat(126))] {
            for is_resumed in [false, true] {
                for client in [None, Some(client("alice"))] {
                    let facts = facts(name).with_client(client).with_resumption(is_resumed);
                    assert_eq!(Facts::decode(&facts.encode()), Some(facts));
                }
            }
        }
    }

    #[test]
    fn a_name_that_is_none_is_left_out() {
        for name in [
            "mail.example\nX=1",
            "a b",
            "$(id)",
            "ü.example",
            &"a".repeat(NAME_LIMIT + 1),
        ] {
            assert_eq!(facts(name).server_name(), None, "{name}");
        }
        assert_eq!(facts("MAIL.Example").server_name(), Some("mail.example"));
    }

    #[test]
    fn a_forged_record_is_refused() {
        let good = facts("mail.example")
            .with_client(Some(client("alice")))
            .encode();
        assert!(Facts::decode(&good).is_some());
        // No bool, no bool, a length beyond the room, no host name, no identity.
        for (at, octet) in [
            (6, 2),
            (7, 2),
            (7, 0),
            (8, 254),
            (10, b'='),
            (FACTS_LENGTH - 1, 1),
        ] {
            let mut bytes = good;
            bytes[at] = octet;
            assert_eq!(Facts::decode(&bytes), None, "{at}");
        }
    }

    #[test]
    fn the_session_line_names_everything() {
        let line = "tls=TLSv1.3 group=X25519MLKEM768 cipher=TLS_AES_128_GCM_SHA256 sni=mail.example resumed=";
        let facts = facts("mail.example");
        assert_eq!(facts.to_string(), format!("{line}no"));
        let resumed = facts.with_resumption(true);
        assert_eq!(resumed.to_string(), format!("{line}yes"));
        let suite = CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256;
        let old = Facts::new(Some(ProtocolVersion::TLSv1_2), Some(suite), None, None);
        let old_line =
            "tls=TLSv1.2 group=none cipher=ECDHE-RSA-AES128-GCM-SHA256 sni=none resumed=yes";
        assert_eq!(old.with_resumption(true).to_string(), old_line);
        for (name, escaped) in [
            ("alice", "alice"),
            ("a\" end=\"x", "a\\\" end=\\\"x"),
            ("ä", "\\xc3\\xa4"),
            // No common name then, so the subject stands in, which escapes it itself.
            ("a\nb", "CN=a\\\\0Ab"),
        ] {
            let known = resumed.clone().with_client(Some(client(name)));
            assert_eq!(known.to_string(), format!("{line}yes client=\"{escaped}\""));
        }
    }
}
