//! What the backend and the log are told about a TLS session, and its fixed-size form for the launcher.

use std::fmt;

use rustls::{CipherSuite, NamedGroup, ProtocolVersion};

/// Checked facts about a TLS session.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Facts {
    version: u16,
    cipher: u16,
    group: u16,
    server_name: ServerName,
}

/// A name that is a host name as RFC 1123 section 2.1 has it (with `_`, which real names contain), or empty.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct ServerName(String);

/// Octets of [`Facts::encode`]: three numbers, a length, and room for the longest name.
pub(crate) const FACTS_LENGTH: usize = 6 + 1 + NAME_LIMIT;

/// The longest host name in text form (RFC 1035 section 2.3.4).
const NAME_LIMIT: usize = 253;

impl ServerName {
    fn new(name: &str) -> Self {
        let is_host_name = name.len() <= NAME_LIMIT
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
        Self(if is_host_name {
            name.to_ascii_lowercase()
        } else {
            String::new()
        })
    }
}

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
            group: group.map_or(0, u16::from),
            server_name: ServerName::new(server_name.unwrap_or_default()),
        }
    }

    /// Fixed-size bytes for the launcher.
    pub(crate) fn encode(&self) -> [u8; FACTS_LENGTH] {
        let mut bytes = [0; FACTS_LENGTH];
        let name = self.server_name.0.as_bytes();
        let numbers = [self.version, self.cipher, self.group]
            .into_iter()
            .flat_map(u16::to_be_bytes);
        let content = numbers
            .chain([u8::try_from(name.len()).unwrap_or(0)])
            .chain(name.iter().copied());
        for (to, from) in bytes.iter_mut().zip(content) {
            *to = from;
        }
        bytes
    }

    /// The facts in `bytes`, checked again: who reads them has privileges, who wrote them has none.
    pub(crate) fn decode(bytes: &[u8; FACTS_LENGTH]) -> Option<Self> {
        let [v1, v2, c1, c2, g1, g2, length, name @ ..] = bytes;
        let name = std::str::from_utf8(name.get(..usize::from(*length))?).ok()?;
        let server_name = ServerName::new(name);
        (server_name.0.len() == name.len()).then(|| Self {
            version: u16::from_be_bytes([*v1, *v2]),
            cipher: u16::from_be_bytes([*c1, *c2]),
            group: u16::from_be_bytes([*g1, *g2]),
            server_name,
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

    /// The key exchange group's IANA name.
    pub(crate) fn group(&self) -> &'static str {
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
        Some(self.server_name.0.as_str()).filter(|name| !name.is_empty())
    }
}

/// As the session line has it.
impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sni = self.server_name().unwrap_or("none");
        write!(
            f,
            "tls={} group={} cipher={} sni={sni}",
            self.version(),
            self.group(),
            self.cipher()
        )
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

    #[test]
    fn facts_survive_the_way_to_the_launcher() {
        for name in ["", "mail.example", &"a".repeat(NAME_LIMIT)] {
            assert_eq!(Facts::decode(&facts(name).encode()), Some(facts(name)));
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
        let mut bytes = facts("mail.example").encode();
        bytes[8] = b'=';
        assert_eq!(Facts::decode(&bytes), None);
        let mut bytes = facts("mail.example").encode();
        bytes[6] = 254;
        assert_eq!(Facts::decode(&bytes), None);
    }

    #[test]
    fn the_session_line_names_everything() {
        assert_eq!(
            facts("mail.example").to_string(),
            "tls=TLSv1.3 group=X25519MLKEM768 cipher=TLS_AES_128_GCM_SHA256 sni=mail.example"
        );
    }
}
