//! A failed handshake in words that an administrator can act upon, with the technical names at the end.

use std::fmt::Write as _;

use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible, PeerMisbehaved,
};
use x509_parser::time::ASN1Time;

use super::alert::{alert_name, alert_words};
use super::hello::{HelloFacts, KeyKind, Refusal, hello_version, no_tls};

/// The longest text, in octets before it is escaped.
const TEXT_LIMIT: usize = 400;

/// Why a handshake, or a session, failed. The text may hold octets of the client's, so the log has to escape it.
pub(crate) fn explain(error: &Error, hello: &HelloFacts) -> String {
    let mut text = match error {
        Error::AlertReceived(alert) => {
            let words = alert_words(*alert);
            let name = alert_name(*alert);
            return format!("{words} (alert received: {name})");
        }
        Error::PeerIncompatible(what) => incompatible(what, hello),
        Error::PeerMisbehaved(what) => misbehaved(what).to_owned(),
        Error::InvalidMessage(_) | Error::InappropriateMessage { .. } => {
            no_tls(&hello.opening, hello.start)
                .unwrap_or("the client's message is malformed or out of place")
                .to_owned()
        }
        Error::InappropriateHandshakeMessage { .. } => {
            "the client's handshake messages come in the wrong order".to_owned()
        }
        Error::InvalidCertificate(what) => certificate(what),
        Error::InvalidCertRevocationList(_) => {
            "a revocation list (--client-crl) is not usable for the client's certificate: replace it"
                .to_owned()
        }
        Error::NoCertificatesPresented => {
            "the client shows no certificate, and --client-cert required asks for one".to_owned()
        }
        Error::NoApplicationProtocol => protocols(hello),
        Error::DecryptError => {
            "the client's message does not decrypt: it was changed on the way, or one side miscalculated"
                .to_owned()
        }
        Error::PeerSentOversizedRecord => "the client sent a record that is too long".to_owned(),
        Error::General(text) => match hello.refusal {
            Some(refusal) => refused(refusal, hello),
            None => text.clone(),
        },
        other => other.to_string(),
    };
    if text.len() > TEXT_LIMIT {
        let end = (0..=TEXT_LIMIT).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or(0));
        text.push_str("...");
    }
    let sent = alert_sent(error, hello)
        .filter(|_| !hello.is_without_alert)
        .map(alert_name);
    let names = [
        technical_name(error),
        sent.map(|name| format!("alert sent: {name}")),
    ];
    let names = names.into_iter().flatten().collect::<Vec<_>>().join("; ");
    if !names.is_empty() {
        // Writing to a string does not fail.
        let _ = write!(text, " ({names})");
    }
    text
}

/// What the client cannot do, or we do not.
fn incompatible(what: &PeerIncompatible, hello: &HelloFacts) -> String {
    match what {
        PeerIncompatible::Tls12NotOffered
        | PeerIncompatible::Tls12NotOfferedOrEnabled
        | PeerIncompatible::SupportedVersionsExtensionRequired => too_old(hello),
        // A hello of TLS 1.1 has no such list (RFC 5246 section 7.4.1.4.1 brought it), and the library misses that first.
        PeerIncompatible::SignatureAlgorithmsExtensionRequired
            if hello_version(&hello.opening).is_some_and(|version| version < TLS12) =>
        {
            too_old(hello)
        }
        PeerIncompatible::SignatureAlgorithmsExtensionRequired => {
            "the client names no signature algorithms, which stands for SHA-1: it is too old"
                .to_owned()
        }
        PeerIncompatible::NoSignatureSchemesInCommon => {
            no_fitting_certificate(&hello.takes, &hello.certificates)
        }
        // TLS 1.2 only, as the suites of TLS 1.3 go with any certificate.
        PeerIncompatible::NoCipherSuitesInCommon if !hello.takes_in_suites.is_empty() => {
            no_fitting_certificate(&hello.takes_in_suites, &hello.certificates)
        }
        // One without groups does not know elliptic curves, so its suites are what is wrong with it.
        PeerIncompatible::NamedGroupsExtensionRequired | PeerIncompatible::NoKxGroupsInCommon
            if hello.groups.is_empty() =>
        {
            NO_SUITE.to_owned()
        }
        PeerIncompatible::NoCipherSuitesInCommon => NO_SUITE.to_owned(),
        PeerIncompatible::KeyShareExtensionRequired
        | PeerIncompatible::NamedGroupsExtensionRequired
        | PeerIncompatible::NoKxGroupsInCommon => {
            let offered: Vec<_> = hello
                .groups
                .iter()
                .map(|group| format!("{group:?}"))
                .collect();
            let offered = match offered.as_slice() {
                [] => "none".to_owned(),
                groups => groups.join(", "),
            };
            format!(
                "the client offers no key exchange group that we have: X25519MLKEM768, X25519, secp256r1 or secp384r1; \
                 it offers {offered}"
            )
        }
        PeerIncompatible::ExtendedMasterSecretExtensionRequired => {
            "the client lacks the extended master secret of RFC 7627: it is too old".to_owned()
        }
        _ => "the client and we have too little in common".to_owned(),
    }
}

const NO_SUITE: &str =
    "the client offers no cipher suite that we have: ECDHE with AES-GCM or ChaCha20-Poly1305";

/// The version's number in a TLS 1.2 hello.
const TLS12: u16 = 0x0303;

fn too_old(hello: &HelloFacts) -> String {
    match hello_version(&hello.opening) {
        _ if hello.is_tls13_only => {
            "the client does not offer TLS 1.3, and --min-tls 1.3 asks for it".to_owned()
        }
        Some(0x0300) => "the client offers SSL 3.0 at most, and 1.2 is the least".to_owned(),
        Some(0x0301) => "the client offers TLS 1.0 at most, and 1.2 is the least".to_owned(),
        Some(0x0302) => "the client offers TLS 1.1 at most, and 1.2 is the least".to_owned(),
        _ => "the client offers neither TLS 1.2 nor TLS 1.3".to_owned(),
    }
}

fn no_fitting_certificate(takes: &[KeyKind], certificates: &[KeyKind]) -> String {
    let names = |kinds: &[KeyKind]| {
        let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
        names.join(" or ")
    };
    let ours = match certificates {
        [] => "any".to_owned(),
        kinds => names(kinds),
    };
    let addition = [KeyKind::Ecdsa, KeyKind::Rsa]
        .into_iter()
        .find(|kind| takes.contains(kind) && !certificates.contains(kind));
    match addition {
        Some(kind) => format!(
            "the client takes no {ours} certificate, only {}: add an {} certificate with a second --cert and --key",
            names(takes),
            kind.name()
        ),
        None => format!("the client takes no signature that an {ours} certificate's key can make"),
    }
}

fn refused(refusal: Refusal, hello: &HelloFacts) -> String {
    match (refusal, &hello.server_name) {
        (Refusal::UnknownName, Some(name)) => {
            format!("the client asks for '{name}', and there is no certificate for that name")
        }
        (Refusal::NoName | Refusal::UnknownName, _) => {
            "the client does not say which server it wants (SNI), and only known names are served"
                .to_owned()
        }
    }
}

fn protocols(hello: &HelloFacts) -> String {
    let offered: Vec<_> = hello
        .protocols
        .iter()
        .map(|protocol| String::from_utf8_lossy(protocol))
        .collect();
    format!("the client wants {}, not imap (ALPN)", offered.join(" or "))
}

fn misbehaved(what: &PeerMisbehaved) -> &'static str {
    match what {
        PeerMisbehaved::ServerNameMustContainOneHostName => {
            "the client asks for a server by what is no host name (SNI)"
        }
        PeerMisbehaved::TooManyKeyUpdateRequests
        | PeerMisbehaved::TooManyRenegotiationRequests
        | PeerMisbehaved::TooManyEmptyFragments
        | PeerMisbehaved::TooManyWarningAlertsReceived => "the client keeps us busy with nothing",
        PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme
        | PeerMisbehaved::SignedKxWithWrongAlgorithm => {
            "the client signs with an algorithm that it was not offered"
        }
        _ => "the client breaks the rules of TLS",
    }
}

/// What is wrong with the client's certificate. Most of what the verifier has no variant for is an error of a crate beneath the
/// library, whose type is not to be had: its text is its name.
fn certificate(what: &CertificateError) -> String {
    let date = |seconds: u64| {
        let time = i64::try_from(seconds).ok();
        let time = time.and_then(|seconds| ASN1Time::from_timestamp(seconds).ok());
        time.map_or_else(String::new, |time| format!(" {time}"))
    };
    let what = match what {
        CertificateError::Expired => "has expired",
        CertificateError::ExpiredContext { not_after, .. } => {
            let date = date(not_after.as_secs());
            return format!("the client's certificate has expired:{date}");
        }
        CertificateError::NotValidYet => "is not valid yet",
        CertificateError::NotValidYetContext { not_before, .. } => {
            let date = date(not_before.as_secs());
            return format!("the client's certificate is not valid before{date}");
        }
        CertificateError::Revoked => "is revoked",
        CertificateError::UnknownIssuer => "is from no authority in --client-ca",
        CertificateError::UnknownRevocationStatus => {
            "or an authority's between is covered by no list in --client-crl"
        }
        CertificateError::ExpiredRevocationList => "cannot be checked: --client-crl is out of date",
        CertificateError::ExpiredRevocationListContext { next_update, .. } => {
            let date = date(next_update.as_secs());
            return format!(
                "the client's certificate cannot be checked: --client-crl is out of date, a new list was due{date}"
            );
        }
        CertificateError::BadEncoding => "is malformed",
        CertificateError::BadSignature => "does not go with its signature",
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not for clients (clientAuth is missing in its extendedKeyUsage)"
        }
        CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "is signed by an algorithm that is not accepted, such as SHA-1"
        }
        CertificateError::Other(what) => match what.to_string().as_str() {
            "CaUsedAsEndEntity" => {
                "is an authority's own (CA:TRUE in its basicConstraints): issue clients one without"
            }
            "NameConstraintViolation" => {
                "is for a name that an authority of it may not certify (nameConstraints)"
            }
            "PathLenConstraintViolated" => {
                "is from more authorities in a row than one of them allows (pathlen in its basicConstraints)"
            }
            "UnsupportedCertVersion" => {
                "is not of X.509 version 3: have it issued with extensions (openssl x509 -req -extfile)"
            }
            "UnsupportedCriticalExtension" => "has a critical extension that is not understood",
            _ => NOT_ACCEPTABLE,
        },
        _ => NOT_ACCEPTABLE,
    };
    format!("the client's certificate {what}")
}

const NOT_ACCEPTABLE: &str = "is not acceptable";

/// The alert that the library sends for an error; `None` where it depends on the place, or there is none.
fn alert_sent(error: &Error, hello: &HelloFacts) -> Option<AlertDescription> {
    Some(match error {
        Error::PeerIncompatible(
            PeerIncompatible::Tls12NotOffered
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::SupportedVersionsExtensionRequired,
        ) => AlertDescription::ProtocolVersion,
        Error::PeerIncompatible(
            PeerIncompatible::ExtendedMasterSecretExtensionRequired
            | PeerIncompatible::KeyShareExtensionRequired
            | PeerIncompatible::NoCipherSuitesInCommon
            | PeerIncompatible::NoKxGroupsInCommon
            | PeerIncompatible::NoSignatureSchemesInCommon
            | PeerIncompatible::SignatureAlgorithmsExtensionRequired,
        ) => AlertDescription::HandshakeFailure,
        Error::PeerIncompatible(
            PeerIncompatible::NullCompressionRequired
            | PeerIncompatible::UncompressedEcPointsRequired,
        )
        | Error::PeerMisbehaved(PeerMisbehaved::ServerNameMustContainOneHostName)
        | Error::InvalidMessage(
            InvalidMessage::DuplicateExtension(_) | InvalidMessage::PreSharedKeyIsNotFinalExtension,
        ) => AlertDescription::IllegalParameter,
        Error::InvalidMessage(_) => AlertDescription::DecodeError,
        Error::InappropriateHandshakeMessage { .. } | Error::InappropriateMessage { .. } => {
            AlertDescription::UnexpectedMessage
        }
        Error::InvalidCertificate(what) => what.clone().into(),
        Error::NoCertificatesPresented => AlertDescription::CertificateRequired,
        Error::NoApplicationProtocol => AlertDescription::NoApplicationProtocol,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        Error::General(_) if hello.is_read && hello.refusal.is_some() => {
            AlertDescription::UnrecognisedName
        }
        _ => return None,
    })
}

/// The library's name for the error: the variant, without what it carries; of a certificate's that has none, its verifier's.
fn technical_name(error: &Error) -> Option<String> {
    let name = match error {
        Error::PeerIncompatible(what) => format!("{what:?}"),
        Error::PeerMisbehaved(what) => format!("{what:?}"),
        Error::InvalidMessage(what) => format!("{what:?}"),
        Error::InvalidCertificate(CertificateError::Other(what)) => what.to_string(),
        Error::InvalidCertificate(what) => format!("{what:?}"),
        Error::InvalidCertRevocationList(what) => format!("{what:?}"),
        Error::General(_) => return None,
        other => format!("{other:?}"),
    };
    let end = name.find(|character: char| !character.is_ascii_alphanumeric());
    name.get(..end.unwrap_or(name.len())).map(str::to_owned)
}

#[cfg(test)]
mod tests;
