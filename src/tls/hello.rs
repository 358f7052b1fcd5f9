//! What a client's first octets and its hello say, for the words about a handshake that failed.

use rustls::server::ClientHello;
use rustls::{CipherSuite, NamedGroup, SignatureScheme};

/// What is known about a handshake beside the library's error.
#[derive(Clone, Debug, Default)]
pub(crate) struct HelloFacts {
    /// The first octets of what should be TLS, at least [`OPENING_LENGTH`] if there were as many.
    pub(crate) opening: Vec<u8>,
    /// Whether no alert was sent: the error is ours and not the library's, or one for which the library has none.
    pub(crate) is_without_alert: bool,
    /// Whether `--min-tls 1.3` is set.
    pub(crate) is_tls13_only: bool,
    /// How TLS began.
    pub(crate) start: Start,
    /// The kinds of certificates that there are for this client.
    pub(crate) certificates: Vec<KeyKind>,
    /// Why the client was given no certificate, if it was not.
    pub(crate) refusal: Option<Refusal>,
    pub(super) server_name: Option<String>,
    pub(super) protocols: Vec<Vec<u8>>,
    pub(super) groups: Vec<NamedGroup>,
    /// By the signature schemes.
    pub(super) takes: Vec<KeyKind>,
    /// By the cipher suites, which name the kind in TLS 1.2.
    pub(super) takes_in_suites: Vec<KeyKind>,
    pub(super) is_read: bool,
}

/// The kinds of keys, by which a client says what it can verify.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum KeyKind {
    Ecdsa,
    Ed25519,
    Rsa,
}

/// How TLS began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) enum Start {
    #[default]
    Implicit,
    StartTls,
}

/// Why the resolver has no certificate for a client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Refusal {
    /// The client named no server, and only named ones are served.
    NoName,
    /// None for the name that the client asked for.
    UnknownName,
}

/// How much of the first octets is looked at: enough for a word or two of a cleartext protocol, or for the version in a hello.
pub(crate) const OPENING_LENGTH: usize = 24;
/// How much of what a client lists is kept: more would not be read.
const LIST_LIMIT: usize = 8;

impl KeyKind {
    /// The kind that makes signatures of a scheme; `None` for what nobody should make any more.
    pub(crate) fn of(scheme: SignatureScheme) -> Option<Self> {
        Some(match scheme {
            SignatureScheme::ECDSA_NISTP256_SHA256
            | SignatureScheme::ECDSA_NISTP384_SHA384
            | SignatureScheme::ECDSA_NISTP521_SHA512 => Self::Ecdsa,
            SignatureScheme::ED25519 => Self::Ed25519,
            SignatureScheme::RSA_PKCS1_SHA256
            | SignatureScheme::RSA_PKCS1_SHA384
            | SignatureScheme::RSA_PKCS1_SHA512
            | SignatureScheme::RSA_PSS_SHA256
            | SignatureScheme::RSA_PSS_SHA384
            | SignatureScheme::RSA_PSS_SHA512 => Self::Rsa,
            _ => return None,
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ecdsa => "ECDSA",
            Self::Ed25519 => "Ed25519",
            Self::Rsa => "RSA",
        }
    }
}

impl HelloFacts {
    /// What a client's hello says about itself, for the resolver to keep.
    pub(crate) fn read(hello: &ClientHello<'_>) -> Self {
        let protocols = hello.alpn().into_iter().flatten();
        let groups = hello.named_groups().unwrap_or_default().iter();
        Self {
            server_name: hello.server_name().map(str::to_ascii_lowercase),
            protocols: protocols.take(LIST_LIMIT).map(<[u8]>::to_vec).collect(),
            groups: groups.take(LIST_LIMIT).copied().collect(),
            takes: kinds(hello.signature_schemes(), KeyKind::of),
            takes_in_suites: kinds(hello.cipher_suites(), kind_in_suite),
            is_read: true,
            ..Self::default()
        }
    }
}

/// The kinds that a client's list comes down to, in its order.
fn kinds<T: Copy>(list: &[T], kind: impl Fn(T) -> Option<KeyKind>) -> Vec<KeyKind> {
    let mut kinds = Vec::new();
    for kind in list.iter().copied().filter_map(kind) {
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    kinds
}

/// The kind of certificate for one of our suites of TLS 1.2.
fn kind_in_suite(suite: CipherSuite) -> Option<KeyKind> {
    Some(match suite {
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256 => KeyKind::Ecdsa,
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
        | CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384
        | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256 => KeyKind::Rsa,
        _ => return None,
    })
}

/// The version field of a hello at the beginning of a record (RFC 8446 sections 5.1 and 4.1.2): the latest that the client
/// offers, unless it has an extension for that.
pub(super) fn hello_version(opening: &[u8]) -> Option<u16> {
    const HANDSHAKE: u8 = 22;
    const CLIENT_HELLO: u8 = 1;
    match opening {
        [
            HANDSHAKE,
            3,
            _,
            _,
            _,
            CLIENT_HELLO,
            _,
            _,
            _,
            major,
            minor,
            ..,
        ] => Some(u16::from_be_bytes([*major, *minor])),
        _ => None,
    }
}

/// What it is, if it is no TLS, by its first octets.
pub(super) fn no_tls(opening: &[u8], start: Start) -> Option<&'static str> {
    const HTTP: [&[u8]; 7] = [
        b"CONNECT ",
        b"DELETE ",
        b"GET /",
        b"HEAD /",
        b"OPTIONS ",
        b"POST /",
        b"PRI * HTTP",
    ];
    const IMAP: [&[u8]; 8] = [
        b"AUTHENTICATE",
        b"CAPABILITY",
        b"ID (",
        b"ID NIL",
        b"LOGIN",
        b"LOGOUT",
        b"NOOP",
        b"STARTTLS",
    ];
    let begins = |words: &[&[u8]]| words.iter().any(|word| opening.starts_with(word));
    let command = opening
        .splitn(2, |&octet| octet == b' ')
        .nth(1)
        .unwrap_or_default();
    let command = command.to_ascii_uppercase();
    match opening {
        [] => None,
        _ if begins(&HTTP) => Some("the client speaks HTTP, not TLS"),
        _ if begins(&[b"SSH-"]) => Some("the client speaks SSH, not TLS"),
        _ if begins(&[b"EHLO ", b"HELO "]) => Some("the client speaks SMTP, not TLS"),
        _ if begins(&[b"PROXY ", b"\r\n\r\n\0\r\nQUIT\n"]) => Some(
            "a PROXY header stands before the client's TLS: the balancer sends one that is not expected",
        ),
        // RFC 6101 appendix E: the hello of SSL 2.0, in which old clients offered later versions as well.
        [length, _, 1, ..] if length & 0x80 != 0 => {
            Some("the client begins with a hello of SSL 2.0: it is too old")
        }
        _ if IMAP.iter().any(|word| command.starts_with(word)) => Some(match start {
            Start::Implicit => {
                "the client speaks IMAP in clear where TLS has to begin: its encryption setting does not go with the port"
            }
            // The injection of CVE-2011-0411.
            Start::StartTls => {
                "IMAP commands follow STARTTLS in clear: the client did not wait for TLS, or somebody on the path put them there"
            }
        }),
        _ if opening
            .iter()
            .all(|octet| matches!(octet, b' '..=b'~' | b'\t' | b'\r' | b'\n')) =>
        {
            Some("the client sends text in clear where TLS has to begin")
        }
        // A record of TLS (RFC 8446 section 5.1).
        [20..=23, 3, ..] => None,
        _ => Some("the client does not speak TLS"),
    }
}
