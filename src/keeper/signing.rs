//! What a TLS server signs, and nothing else: the one thing that the keeper's keys may be used for. Pure.

use rustls::SignatureScheme;

/// The longest sign request: TLS 1.2's two randoms and a P-384 point are 165 octets, TLS 1.3's context 146.
pub const SIGN_LIMIT: usize = 256;

/// What the network process asks to be signed: which certificate's key in one octet, the scheme in two, then the TLS message.
#[derive(Debug, Eq, PartialEq)]
pub struct SignRequest<'a> {
    /// The certificate's place among those that the keeper has shown.
    pub certificate: u8,
    /// The signature scheme that the network process chose.
    pub scheme: SignatureScheme,
    /// The signature input of RFC 8446 section 4.4.3 or RFC 8422 section 5.4.
    pub message: &'a [u8],
}

impl<'a> SignRequest<'a> {
    /// The request as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.certificate];
        bytes.extend(u16::from(self.scheme).to_be_bytes());
        bytes.extend_from_slice(self.message);
        bytes
    }

    /// The request in `bytes`, if it is one of TLS 1.2 or 1.3 servers and of no other kind.
    ///
    /// Security: the keeper is an oracle for TLS handshakes, not for signatures in general. A hole in the network process
    /// must not be able to have certificates, tokens or client authentications signed.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        if bytes.len() > SIGN_LIMIT {
            return None;
        }
        let (&certificate, bytes) = bytes.split_first()?;
        let (scheme, message) = bytes.split_first_chunk::<2>()?;
        let scheme = SignatureScheme::from(u16::from_be_bytes(*scheme));
        let is_permitted = match Form::of(message)? {
            Form::Tls12 => is_tls12_scheme(scheme),
            Form::Tls13 => is_tls13_scheme(scheme),
        };
        is_permitted.then_some(Self {
            certificate,
            scheme,
            message,
        })
    }
}

/// The two things that a TLS server signs.
enum Form {
    Tls12,
    Tls13,
}

impl Form {
    fn of(message: &[u8]) -> Option<Self> {
        if is_tls13_signature_input(message) {
            Some(Self::Tls13)
        } else if is_tls12_signature_input(message) {
            Some(Self::Tls12)
        } else {
            None
        }
    }
}

/// RFC 8446 section 4.4.3: 64 spaces, the context string, a zero octet, the transcript hash (SHA-256 or SHA-384).
fn is_tls13_signature_input(message: &[u8]) -> bool {
    const CONTEXT: &[u8] = b"TLS 1.3, server CertificateVerify\0";
    let hash = message
        .strip_prefix(&[b' '; 64])
        .and_then(|rest| rest.strip_prefix(CONTEXT));
    hash.is_some_and(|hash| matches!(hash.len(), 32 | 48))
}

/// RFC 8422 section 5.4: both randoms, then `ServerECDHParams` of a named curve, whose point has the curve's length.
fn is_tls12_signature_input(message: &[u8]) -> bool {
    const NAMED_CURVE: u8 = 3;
    let Some((_randoms, parameters)) = message.split_first_chunk::<64>() else {
        return false;
    };
    let Some(([curve_type, group_high, group_low, length], point)) =
        parameters.split_first_chunk::<4>()
    else {
        return false;
    };
    let expected = match u16::from_be_bytes([*group_high, *group_low]) {
        23 => 65, // secp256r1, uncompressed
        24 => 97, // secp384r1, uncompressed
        29 => 32, // x25519
        _ => return false,
    };
    *curve_type == NAMED_CURVE && usize::from(*length) == expected && point.len() == expected
        // A 1.3 input must not pass for a 1.2 one: its prefix is what RFC 8446 section 4.4.3 has it for.
        && !message.starts_with(&[b' '; 32])
}

/// RFC 8446 section 4.2.3: no PKCS#1 v1.5 in TLS 1.3 handshakes.
fn is_tls13_scheme(scheme: SignatureScheme) -> bool {
    matches!(
        scheme,
        SignatureScheme::ECDSA_NISTP256_SHA256
            | SignatureScheme::ECDSA_NISTP384_SHA384
            | SignatureScheme::ED25519
            | SignatureScheme::RSA_PSS_SHA256
            | SignatureScheme::RSA_PSS_SHA384
            | SignatureScheme::RSA_PSS_SHA512
    )
}

/// TLS 1.2 adds PKCS#1 v1.5, never with SHA-1 (RFC 9155).
fn is_tls12_scheme(scheme: SignatureScheme) -> bool {
    is_tls13_scheme(scheme)
        || matches!(
            scheme,
            SignatureScheme::RSA_PKCS1_SHA256
                | SignatureScheme::RSA_PKCS1_SHA384
                | SignatureScheme::RSA_PKCS1_SHA512
        )
}

/// Every scheme that a keeper may offer, best first.
pub const SCHEMES: &[SignatureScheme] = &[
    SignatureScheme::ED25519,
    SignatureScheme::ECDSA_NISTP256_SHA256,
    SignatureScheme::ECDSA_NISTP384_SHA384,
    SignatureScheme::RSA_PSS_SHA256,
    SignatureScheme::RSA_PSS_SHA384,
    SignatureScheme::RSA_PSS_SHA512,
    SignatureScheme::RSA_PKCS1_SHA256,
    SignatureScheme::RSA_PKCS1_SHA384,
    SignatureScheme::RSA_PKCS1_SHA512,
];

#[cfg(test)]
mod tests {
    use super::*;

    fn tls13_input(hash: usize) -> Vec<u8> {
        [
            &[b' '; 64],
            b"TLS 1.3, server CertificateVerify\0".as_slice(),
            &vec![7; hash],
        ]
        .concat()
    }

    fn tls12_input(group: u16, length: u8, point: usize) -> Vec<u8> {
        let mut input = vec![9; 64];
        input.push(3);
        input.extend(group.to_be_bytes());
        input.push(length);
        input.extend(vec![4; point]);
        input
    }

    fn is_accepted(scheme: SignatureScheme, message: &[u8]) -> bool {
        SignRequest::decode(
            &SignRequest {
                certificate: 0,
                scheme,
                message,
            }
            .encode(),
        )
        .is_some()
    }

    #[test]
    fn only_what_a_tls_server_signs_is_a_request() {
        let scheme = SignatureScheme::ECDSA_NISTP256_SHA256;
        for (message, expected) in [
            (tls13_input(32), true),
            (tls13_input(48), true),
            (tls13_input(31), false),
            (tls13_input(64), false),
            (tls13_input(0), false),
            (
                String::from_utf8(tls13_input(32))
                    .unwrap()
                    .replace("server", "client")
                    .into_bytes(),
                false,
            ),
            (tls12_input(29, 32, 32), true),
            (tls12_input(23, 65, 65), true),
            (tls12_input(24, 97, 97), true),
            (tls12_input(23, 65, 64), false),
            (tls12_input(23, 64, 64), false),
            (tls12_input(25, 133, 133), false),
            (tls12_input(29, 32, 33), false),
            (Vec::new(), false),
            (vec![b' '; 200], false),
            (b"-----BEGIN CERTIFICATE REQUEST-----".to_vec(), false),
        ] {
            assert_eq!(is_accepted(scheme, &message), expected, "{message:?}");
        }
    }

    #[test]
    fn a_tls12_input_of_another_curve_type_is_refused() {
        let mut message = tls12_input(29, 32, 32);
        message[64] = 1;
        assert!(!is_accepted(SignatureScheme::ED25519, &message));
    }

    #[test]
    fn schemes_follow_the_version() {
        for scheme in SCHEMES {
            let is_pkcs1 = format!("{scheme:?}").contains("PKCS1");
            assert_eq!(
                is_accepted(*scheme, &tls13_input(32)),
                !is_pkcs1,
                "{scheme:?}"
            );
            assert!(is_accepted(*scheme, &tls12_input(29, 32, 32)), "{scheme:?}");
        }
        for scheme in [
            SignatureScheme::RSA_PKCS1_SHA1,
            SignatureScheme::ECDSA_SHA1_Legacy,
            SignatureScheme::Unknown(0),
        ] {
            assert!(!is_accepted(scheme, &tls12_input(29, 32, 32)), "{scheme:?}");
        }
    }

    #[test]
    fn oversized_and_truncated_requests_are_refused() {
        let whole = SignRequest {
            certificate: 1,
            scheme: SignatureScheme::ED25519,
            message: &tls13_input(48),
        }
        .encode();
        for length in 0..whole.len() {
            let is_shorter_hash = length == whole.len() - 16;
            assert_eq!(
                SignRequest::decode(&whole[..length]).is_some(),
                is_shorter_hash,
                "{length}"
            );
        }
        assert!(SignRequest::decode(&vec![b' '; SIGN_LIMIT + 1]).is_none());
    }
}
