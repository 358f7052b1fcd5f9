//! What is signed in DER (X.509, RFC 6960): taken apart, and its signature verified, with the reader that x509-parser stands on.

use rustls::crypto::ring::default_provider;
use rustls::pki_types::SignatureVerificationAlgorithm;
use x509_parser::asn1_rs::{Any, Class, FromDer as _, Tag};
use x509_parser::certificate::X509Certificate;
use x509_parser::public_key::PublicKey;

/// What certificates, revocation lists and OCSP responses have in common: something, and a signature over it.
pub(crate) struct Signed<'a> {
    /// As it was signed.
    pub(crate) content: Element<'a>,
    algorithm: &'a [u8],
    signature: &'a [u8],
    /// What follows the signature.
    pub(crate) rest: &'a [u8],
}

impl<'a> Signed<'a> {
    /// `None` if it is malformed.
    pub(crate) fn read(mut bytes: &'a [u8]) -> Option<Self> {
        let mut rest = universal(&mut bytes, Tag::Sequence)?;
        let content = take(&mut rest, Class::Universal, Tag::Sequence)?;
        let algorithm = universal(&mut rest, Tag::Sequence)?;
        let signature = bits(&mut rest)?;
        bytes.is_empty().then_some(Self {
            content,
            algorithm,
            signature,
            rest,
        })
    }

    /// Whether the signature is of this certificate's key. What the certificate is for, and its name, is not looked at.
    pub(crate) fn is_signed_by(&self, signer: &X509Certificate<'_>) -> bool {
        self.verify(signer) == Signature::Good
    }

    /// The same, for whom it makes a difference why not.
    pub(crate) fn verify(&self, signer: &X509Certificate<'_>) -> Signature {
        let mut key = signer.public_key().raw;
        let key = universal(&mut key, Tag::Sequence).and_then(|mut key| {
            let algorithm = universal(&mut key, Tag::Sequence)?;
            Some((algorithm, bits(&mut key)?))
        });
        let Some((key_algorithm, key)) = key else {
            return Signature::Bad;
        };
        let algorithms = default_provider().signature_verification_algorithms.all;
        let of_key = |algorithm: &dyn SignatureVerificationAlgorithm| {
            algorithm.public_key_alg_id().as_ref() == key_algorithm
        };
        let mut known = algorithms
            .iter()
            .filter(|algorithm| algorithm.signature_alg_id().as_ref() == self.algorithm)
            .peekable();
        if known.peek().is_none()
            || !algorithms.iter().any(|algorithm| of_key(*algorithm))
            || is_of_odd_length(signer)
        {
            return Signature::Unknown;
        }
        let is_good = known
            .filter(|algorithm| of_key(**algorithm))
            .any(|algorithm| {
                algorithm
                    .verify_signature(key, self.content.whole, self.signature)
                    .is_ok()
            });
        if is_good {
            Signature::Good
        } else {
            Signature::Bad
        }
    }
}

/// How a signature was found to be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Signature {
    Bad,
    Good,
    /// Of an algorithm or a key that our library does not have, and another may.
    Unknown,
}

/// Whether it is an RSA key, and shorter or longer than those that the library takes.
fn is_of_odd_length(signer: &X509Certificate<'_>) -> bool {
    match signer.public_key().parsed() {
        Ok(PublicKey::RSA(key)) => !(2048..=8192).contains(&key.key_size()),
        _ => false,
    }
}

/// An element's content, and the element with its header.
#[derive(Clone, Copy)]
pub(crate) struct Element<'a> {
    pub(crate) content: &'a [u8],
    pub(crate) whole: &'a [u8],
}

/// Takes the next element if it is of the kind.
pub(crate) fn take<'a>(input: &mut &'a [u8], class: Class, tag: Tag) -> Option<Element<'a>> {
    let (rest, any) = Any::from_der(input).ok()?;
    if any.class() != class || any.tag() != tag {
        return None;
    }
    let whole = input.get(..input.len().checked_sub(rest.len())?)?;
    *input = rest;
    Some(Element {
        content: any.data,
        whole,
    })
}

/// The content of the next element if it is of this type.
pub(crate) fn universal<'a>(input: &mut &'a [u8], tag: Tag) -> Option<&'a [u8]> {
    take(input, Class::Universal, tag).map(|element| element.content)
}

/// The content of the next element if it has this tag of its context's.
pub(crate) fn tagged<'a>(input: &mut &'a [u8], tag: u32) -> Option<&'a [u8]> {
    take(input, Class::ContextSpecific, Tag(tag)).map(|element| element.content)
}

/// A bit string of whole octets.
fn bits<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    match universal(input, Tag::BitString)? {
        [0, octets @ ..] => Some(octets),
        _ => None,
    }
}

/// For tests: certificates with their keys.
#[cfg(test)]
pub(crate) mod testing {
    use rcgen::{Certificate, CertificateParams, DnType, KeyPair, date_time_ymd};

    /// A certificate, and its key.
    pub(crate) struct Holder {
        pub(crate) certificate: Certificate,
        pub(crate) key: KeyPair,
    }

    /// Valid for 2026; signed by itself where there is no issuer.
    pub(crate) fn holder(
        name: &str,
        issuer: Option<&Holder>,
        change: impl Fn(&mut CertificateParams),
    ) -> Holder {
        let mut params = params(name);
        params.serial_number = Some(vec![0xfe, 1].into());
        change(&mut params);
        certify(params, KeyPair::generate().unwrap(), issuer)
    }

    pub(crate) fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = date_time_ymd(2026, 1, 1);
        params.not_after = date_time_ymd(2027, 1, 1);
        params
    }

    pub(crate) fn certify(
        params: CertificateParams,
        key: KeyPair,
        issuer: Option<&Holder>,
    ) -> Holder {
        let certificate = match issuer {
            Some(issuer) => params.signed_by(&key, &issuer.certificate, &issuer.key),
            None => params.self_signed(&key),
        };
        Holder {
            certificate: certificate.unwrap(),
            key,
        }
    }
}
