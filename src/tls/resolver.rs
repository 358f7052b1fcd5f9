//! Which certificate a client is shown: by the name that it asks for, and by what it can verify.

use std::sync::{Arc, OnceLock};

use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, NamedGroup, SignatureAlgorithm, SignatureScheme};

use super::hello::{self, HelloFacts, KeyKind};
use super::{AsksKeeper, Filed, now};
use crate::host_name::HostName;

/// A certificate chain with a key that signs for it, and the host names that it is for.
#[derive(Clone, Debug)]
pub(crate) struct Certified {
    pub(crate) key: Arc<CertifiedKey>,
    pub(crate) names: Vec<String>,
    /// Until when its OCSP response is fresh, if it has one, in seconds since 1970.
    pub(crate) ocsp_end: i64,
}

impl Certified {
    /// What kind of key it is for.
    pub(super) fn kind(&self) -> Option<KeyKind> {
        match self.key.key.algorithm() {
            SignatureAlgorithm::ECDSA => Some(KeyKind::Ecdsa),
            SignatureAlgorithm::ED25519 => Some(KeyKind::Ed25519),
            SignatureAlgorithm::RSA => Some(KeyKind::Rsa),
            _ => None,
        }
    }

    /// The curve of an ECDSA key; it signs in the one scheme of its curve.
    fn curve(&self) -> Option<NamedGroup> {
        let curves = [
            (
                SignatureScheme::ECDSA_NISTP256_SHA256,
                NamedGroup::secp256r1,
            ),
            (
                SignatureScheme::ECDSA_NISTP384_SHA384,
                NamedGroup::secp384r1,
            ),
        ];
        let mut curves = curves.into_iter();
        curves
            .find(|(scheme, _)| self.key.key.choose_scheme(&[*scheme]).is_some())
            .map(|(_, curve)| curve)
    }

    /// As it is shown now: under the listener a response may have been read long ago, and a client that is shown one out of date
    /// may refuse us, but not for want of one.
    fn shown(&self) -> Arc<CertifiedKey> {
        if self.key.ocsp.is_none() || now() <= self.ocsp_end {
            return self.key.clone();
        }
        Arc::new(CertifiedKey {
            ocsp: None,
            ..(*self.key).clone()
        })
    }
}

/// What is done for a client that asks for a name that no certificate is for, or for none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum UnknownName {
    /// The first certificate is shown; whether that will do is the client's to say.
    Default,
    /// The handshake ends with `unrecognized_name` (RFC 6066 section 3).
    Refused,
}

/// Why no certificate was shown.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Refusal {
    /// The client wants what we do not have.
    Client(hello::Refusal),
    /// Ours to mend, in words.
    Fault(String),
}

impl Refusal {
    /// The alert that says so (RFC 8446 section 6.2).
    pub(super) fn alert(&self) -> AlertDescription {
        match self {
            Self::Client(_) => AlertDescription::UnrecognisedName,
            Self::Fault(_) => AlertDescription::InternalError,
        }
    }
}

/// What the ClientHello said, for those who come after the resolver.
#[derive(Debug, Default)]
pub(super) struct Heard {
    facts: OnceLock<HelloFacts>,
}

impl Heard {
    pub(super) fn facts(&self) -> Option<&HelloFacts> {
        self.facts.get()
    }

    /// The name that the client asked for, where it is a host name.
    pub(super) fn name(&self) -> Option<HostName> {
        HostName::new(self.facts()?.server_name.as_deref()?)
    }
}

#[derive(Debug)]
pub(super) struct Resolver {
    pub(super) certificates: Vec<Certified>,
    /// Whether the keeper may know more of them (`--cert-dir`).
    pub(super) has_directory: bool,
    pub(super) heard: Arc<Heard>,
    pub(super) keeper: Arc<dyn AsksKeeper>,
    /// A client that is sent a HelloRetryRequest asks twice, and the keeper answers once.
    pub(super) answer: OnceLock<Result<Arc<CertifiedKey>, Refusal>>,
    /// What is wrong with a file that might have had a certificate for the name.
    pub(super) passed_over: OnceLock<String>,
    pub(super) unknown_name: UnknownName,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.heard.facts.get_or_init(|| HelloFacts::read(&hello));
        let answer = self
            .answer
            .get_or_init(|| self.choose(self.heard.name().as_ref(), Verifies::read(&hello)));
        answer.as_ref().ok().cloned()
    }
}

/// What a client can verify.
#[derive(Clone, Copy)]
struct Verifies<'a> {
    /// The curves of keys, where the client lists them: up to TLS 1.2 its groups are those too (RFC 8422 section 5.1.1), in TLS 1.3
    /// they are for the key exchange alone (RFC 8446 section 4.2.7).
    curves: Option<&'a [NamedGroup]>,
    schemes: &'a [SignatureScheme],
}

impl<'a> Verifies<'a> {
    fn read(hello: &'a ClientHello<'_>) -> Self {
        // All suites of TLS 1.3 begin so, and no others (RFC 8446 appendix B.4).
        const TLS13: u16 = 0x13;
        let mut suites = hello.cipher_suites().iter();
        let is_tls13 = suites.any(|suite| u16::from(*suite) >> 8 == TLS13);
        Self {
            curves: hello.named_groups().filter(|_| !is_tls13),
            schemes: hello.signature_schemes(),
        }
    }

    fn scheme_of(&self, certified: &Certified) -> bool {
        certified.key.key.choose_scheme(self.schemes).is_some()
    }

    fn curve_of(&self, certified: &Certified) -> bool {
        self.curves.is_none_or(|curves| {
            let curve = certified.curve();
            curve.is_none_or(|curve| curves.contains(&curve))
        })
    }
}

impl Resolver {
    pub(super) fn refusal(&self) -> Option<&Refusal> {
        self.answer.get()?.as_ref().err()
    }

    fn choose(
        &self,
        name: Option<&HostName>,
        client: Verifies<'_>,
    ) -> Result<Arc<CertifiedKey>, Refusal> {
        let named = match name {
            Some(name) => self.find(name, client)?,
            None => None,
        };
        if let Some(certified) = named {
            return Ok(certified.shown());
        }
        let default = match self.unknown_name {
            UnknownName::Default => best(self.certificates.iter(), client),
            UnknownName::Refused => None,
        };
        default
            .map(Certified::shown)
            .ok_or(Refusal::Client(match name {
                Some(_) => hello::Refusal::UnknownName,
                None => hello::Refusal::NoName,
            }))
    }

    /// One for this name: the directory's if the client can verify it, or else one of the others.
    fn find(&self, name: &HostName, client: Verifies<'_>) -> Result<Option<Certified>, Refusal> {
        let filed = if self.has_directory {
            self.keeper.certificate(name).map_err(Refusal::Fault)?
        } else {
            Filed::Nothing
        };
        let filed = match filed {
            Filed::Certificate(certified) => Some(certified),
            Filed::Nothing => None,
            Filed::PassedOver(why) => {
                self.passed_over.get_or_init(|| why);
                None
            }
        };
        let known = self.certificates.iter().filter(|certified| {
            let mut names = certified.names.iter();
            names.any(|pattern| name.is_covered_by(pattern))
        });
        Ok(best(filed.iter().chain(known), client).cloned())
    }
}

/// The first whose key can make a signature that the client can verify, best on a curve that it lists; or else the first, so that
/// the library says what the two do not have in common. ECDSA before RSA is a matter of the order in which they are named.
fn best<'a>(
    certificates: impl Iterator<Item = &'a Certified> + Clone,
    client: Verifies<'_>,
) -> Option<&'a Certified> {
    let mut fitting = certificates
        .clone()
        .filter(|certified| client.scheme_of(certified));
    let first = fitting.clone().next();
    fitting
        .find(|certified| client.curve_of(certified))
        .or(first)
        .or(certificates.clone().next())
}

#[cfg(test)]
mod tests {
    use rustls::crypto::ring;
    use rustls::pki_types::PrivateKeyDer;
    use rustls::pki_types::pem::PemObject as _;

    use super::*;

    fn certified(ocsp: Option<&[u8]>, ocsp_end: i64) -> Certified {
        with_key(&rcgen::PKCS_ECDSA_P256_SHA256, ocsp, ocsp_end)
    }

    fn with_key(
        algorithm: &'static rcgen::SignatureAlgorithm,
        ocsp: Option<&[u8]>,
        ocsp_end: i64,
    ) -> Certified {
        let pair = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let made = rcgen::CertificateParams::default()
            .self_signed(&pair)
            .unwrap();
        let key = PrivateKeyDer::from_pem_slice(pair.serialize_pem().as_bytes()).unwrap();
        let key = ring::sign::any_supported_type(&key).unwrap();
        let mut key = CertifiedKey::new(vec![made.der().clone()], key);
        key.ocsp = ocsp.map(<[u8]>::to_vec);
        Certified {
            key: Arc::new(key),
            names: Vec::new(),
            ocsp_end,
        }
    }

    #[test]
    fn a_response_is_stapled_until_it_is_out_of_date() {
        let response = Some(b"response".as_slice());
        let fresh = certified(response, now() + 60);
        assert!(Arc::ptr_eq(&fresh.shown(), &fresh.key));
        let stale = certified(response, now() - 1);
        assert_eq!(stale.shown().ocsp, None);
        assert_eq!(stale.shown().cert, stale.key.cert);
        let without = certified(None, 0);
        assert!(Arc::ptr_eq(&without.shown(), &without.key));
    }

    #[test]
    fn a_client_of_tls_1_2_is_shown_a_key_on_a_curve_that_it_lists() {
        let all = [
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ECDSA_P256_SHA256,
        ]
        .map(|algorithm| with_key(algorithm, None, 0));
        let both = [
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
        ];
        let (p256, p384) = (NamedGroup::secp256r1, NamedGroup::secp384r1);
        for (curves, schemes, place) in [
            (None, &both[..], 0),
            (Some(&[p384, p256][..]), &both, 0),
            (Some(&[NamedGroup::X25519, p256]), &both, 1),
            // One that is listed only as a scheme is better than none.
            (Some(&[NamedGroup::X25519]), &both, 0),
            (Some(&[p384]), &both[..1], 1),
            (None, &[], 0),
        ] {
            let shown = best(all.iter(), Verifies { curves, schemes }).unwrap();
            assert!(std::ptr::eq(shown, &all[place]), "{curves:?}, {schemes:?}");
        }
    }
}
