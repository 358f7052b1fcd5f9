//! The OCSP response that is stapled (RFC 6960): whether it is good, about our certificate, signed by its issuer, and fresh.
//!
//! The structure is walked with the DER reader that x509-parser stands on: what is needed of it is too little for a crate more.

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use x509_parser::asn1_rs::{Class, GeneralizedTime, Tag};
use x509_parser::certificate::X509Certificate;
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

use crate::clock::SKEW;
use crate::signed::{Signed, tagged, take, universal};

/// What is known of a response that may be stapled.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fresh {
    /// Whether the issuer's certificate was there to verify the signature with.
    pub is_verified: bool,
    /// Until when clients take it, in seconds since 1970.
    pub next_update: i64,
}

/// How long a response without nextUpdate counts, in seconds. Such a responder has newer news at any time (RFC 6960 section
/// 4.2.2.1), so how old one may be is the client's to say, and some say: a day.
const DEFAULT_LIFETIME: i64 = 86_400;
/// What [`check`] has against a response that is good for another certificate, perhaps.
pub(super) const ANOTHER: &str = "it is about another certificate: was the certificate renewed?";
/// What is said of a certificate of `--cert` that demands a response in vain.
pub(crate) const MISSING: &str = "demands a stapled OCSP response (must-staple), and there is none: give --ocsp FILE, or have it issued without";
/// The largest response, in octets: it is sent in every full handshake, and real ones have hundreds of octets to 2 KiB.
const RESPONSE_LIMIT: usize = 16_384;
/// How many of the certificates in a response are looked at: its signer's is the only one that should be there.
const CERTIFICATE_LIMIT: usize = 4;

/// The TLS extension of a client that takes a stapled response (RFC 6066 section 8).
const STATUS_REQUEST: u8 = 5;

// Object identifiers, as they are encoded.
const BASIC_RESPONSE: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 0x30, 1, 1];
const SHA1_IDENTIFIER: &[u8] = &[0x2b, 0x0e, 3, 2, 0x1a];
const SHA256_IDENTIFIER: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, 1];
const TLS_FEATURE: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 1, 0x18];

/// Whether clients are told to refuse the certificate where no response is stapled (RFC 7633).
pub(crate) fn is_demanded(own: &X509Certificate<'_>) -> bool {
    let mut extensions = own.iter_extensions();
    extensions
        .find(|extension| extension.oid.as_bytes() == TLS_FEATURE)
        .and_then(|extension| universal(&mut { extension.value }, Tag::Sequence))
        .is_some_and(|mut features| {
            std::iter::from_fn(|| universal(&mut features, Tag::Integer))
                .any(|feature| feature == [STATUS_REQUEST])
        })
}

/// Judges a response for the certificate, at the time `now`. With the issuer's certificate, the next in the chain, its
/// signature is verified too; without, a forged response would be found by the clients.
///
/// # Errors
/// Why it should not be stapled.
pub fn check(
    response: &[u8],
    certificate: &[u8],
    issuer: Option<&[u8]>,
    now: i64,
) -> Result<Fresh, String> {
    if response.len() > RESPONSE_LIMIT {
        return Err(format!("larger than {RESPONSE_LIMIT} octets"));
    }
    let basic = basic_response(response)?;
    let own = parse_certificate(certificate)?;
    let issuer = issuer.map(parse_certificate).transpose()?;
    let signed = Signed::read(basic).ok_or_else(malformed)?;
    let single = find(&signed, &own, issuer.as_ref())?;
    if let Some(issuer) = &issuer {
        verify(&signed, issuer, now)?;
    }
    match single.status {
        Status::Good => {}
        Status::Revoked => return Err("it says that the certificate is revoked".to_owned()),
        Status::Unknown => return Err("its responder does not know the certificate".to_owned()),
    }
    if single.this_update > now + SKEW {
        return Err(format!(
            "it is not valid before {}: look at this machine's clock",
            date(single.this_update)
        ));
    }
    let next_update = single
        .next_update
        .unwrap_or_else(|| single.this_update.saturating_add(DEFAULT_LIFETIME));
    if next_update < now {
        return Err(format!(
            "it was to be renewed by {}: fetch a new one",
            date(next_update)
        ));
    }
    Ok(Fresh {
        is_verified: issuer.is_some(),
        next_update,
    })
}

fn malformed() -> String {
    "not an OCSP response in DER form, as 'openssl ocsp -respout' writes it".to_owned()
}

fn date(seconds: i64) -> String {
    ASN1Time::from_timestamp(seconds).map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

fn parse_certificate(der: &[u8]) -> Result<X509Certificate<'_>, String> {
    let parsed = parse_x509_certificate(der);
    parsed
        .map(|(_, parsed)| parsed)
        .map_err(|error| format!("malformed certificate: {error}"))
}

fn time(input: &mut &[u8]) -> Option<i64> {
    let text = universal(input, Tag::GeneralizedTime)?;
    // As DER and RFC 5280 section 4.1.2.5.2 want it: in UTC.
    if text.last() != Some(&b'Z') {
        return None;
    }
    let time = GeneralizedTime::from_bytes(text)
        .ok()?
        .utc_datetime()
        .ok()?;
    Some(time.unix_timestamp())
}

/// The BasicOCSPResponse inside an OCSPResponse (RFC 6960 section 4.2.1).
fn basic_response(response: &[u8]) -> Result<&[u8], String> {
    let mut rest = response;
    let mut outer = universal(&mut rest, Tag::Sequence).ok_or_else(malformed)?;
    if !rest.is_empty() {
        return Err(malformed());
    }
    let status = universal(&mut outer, Tag::Enumerated).ok_or_else(malformed)?;
    let fault = match status {
        [0] => None,
        [1] => Some("malformedRequest"),
        [2] => Some("internalError"),
        [3] => Some("tryLater"),
        [5] => Some("sigRequired"),
        [6] => Some("unauthorized"),
        _ => Some("a status that is not known"),
    };
    if let Some(fault) = fault {
        return Err(format!(
            "the responder had nothing but an error for us: {fault}"
        ));
    }
    let basic = tagged(&mut outer, 0).and_then(|mut bytes| {
        let mut bytes = universal(&mut bytes, Tag::Sequence)?;
        let kind = universal(&mut bytes, Tag::Oid)?;
        let content = universal(&mut bytes, Tag::OctetString)?;
        (kind == BASIC_RESPONSE).then_some(content)
    });
    basic.ok_or_else(malformed)
}

/// What the responder says about one certificate.
struct Single {
    status: Status,
    this_update: i64,
    next_update: Option<i64>,
}

enum Status {
    Good,
    Revoked,
    Unknown,
}

/// The answer about our certificate.
fn find(
    signed: &Signed<'_>,
    own: &X509Certificate<'_>,
    issuer: Option<&X509Certificate<'_>>,
) -> Result<Single, String> {
    let mut data = signed.content.content;
    // The version, if it is given, is the first and only.
    let _ = tagged(&mut data, 0);
    let responder = tagged(&mut data, 1).or_else(|| tagged(&mut data, 2));
    let mut responses = responder
        .and_then(|_| time(&mut data))
        .and_then(|_| universal(&mut data, Tag::Sequence))
        .ok_or_else(malformed)?;
    while !responses.is_empty() {
        let mut response = universal(&mut responses, Tag::Sequence).ok_or_else(malformed)?;
        let identifier = universal(&mut response, Tag::Sequence).ok_or_else(malformed)?;
        if is_about(identifier, own, issuer).ok_or_else(malformed)? {
            return single(response).ok_or_else(malformed);
        }
    }
    Err(ANOTHER.to_owned())
}

/// Whether a CertID is that of the certificate; `None` if it is malformed.
fn is_about(
    mut identifier: &[u8],
    own: &X509Certificate<'_>,
    issuer: Option<&X509Certificate<'_>>,
) -> Option<bool> {
    let mut algorithm = universal(&mut identifier, Tag::Sequence)?;
    let name_hash = universal(&mut identifier, Tag::OctetString)?;
    let key_hash = universal(&mut identifier, Tag::OctetString)?;
    let serial = universal(&mut identifier, Tag::Integer)?;
    let algorithm = match universal(&mut algorithm, Tag::Oid)? {
        SHA1_IDENTIFIER => &SHA1_FOR_LEGACY_USE_ONLY,
        SHA256_IDENTIFIER => &SHA256,
        _ => return Some(false),
    };
    let is_same = |hash: &[u8], bytes: &[u8]| digest(algorithm, bytes).as_ref() == hash;
    let is_key_right =
        issuer.is_none_or(|issuer| is_same(key_hash, &issuer.public_key().subject_public_key.data));
    Some(serial == own.raw_serial() && is_same(name_hash, own.issuer().as_raw()) && is_key_right)
}

/// What follows the CertID.
fn single(mut response: &[u8]) -> Option<Single> {
    let status = if tagged(&mut response, 0).is_some() {
        Status::Good
    } else if tagged(&mut response, 1).is_some() {
        Status::Revoked
    } else {
        tagged(&mut response, 2).map(|_| Status::Unknown)?
    };
    let this_update = time(&mut response)?;
    let next_update = match tagged(&mut response, 0) {
        Some(mut bytes) => Some(time(&mut bytes)?),
        None => None,
    };
    Some(Single {
        status,
        this_update,
        next_update,
    })
}

/// The signer is the issuer itself, or has a certificate for that purpose from it, in the response (RFC 6960 section 4.2.2.2).
fn verify(signed: &Signed<'_>, issuer: &X509Certificate<'_>, now: i64) -> Result<(), String> {
    if signed.is_signed_by(issuer) {
        return Ok(());
    }
    let mut rest = signed.rest;
    let mut certificates = tagged(&mut rest, 0)
        .and_then(|mut bytes| universal(&mut bytes, Tag::Sequence))
        .unwrap_or_default();
    for _ in 0..CERTIFICATE_LIMIT {
        let Some(certificate) = take(&mut certificates, Class::Universal, Tag::Sequence) else {
            break;
        };
        let signer = parse_certificate(certificate.whole)?;
        let is_delegated = is_responder(&signer, now)
            && Signed::read(certificate.whole).is_some_and(|it| it.is_signed_by(issuer));
        if is_delegated && signed.is_signed_by(&signer) {
            return Ok(());
        }
    }
    Err(
        "its signature is not of the certificate's issuer, the second certificate in --cert"
            .to_owned(),
    )
}

fn is_responder(certificate: &X509Certificate<'_>, now: i64) -> bool {
    let usage = certificate.extended_key_usage().ok().flatten();
    let validity = certificate.validity();
    usage.is_some_and(|usage| usage.value.ocsp_signing)
        && (validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&now)
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, date_time_ymd,
    };
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;

    use super::*;
    use crate::signed::testing::{Holder, holder};

    /// 2026-06-01.
    const NOW: i64 = 1_780_272_000;
    const DAY: i64 = 86_400;
    const GOOD: &[u8] = &[0x80, 0];
    const UNKNOWN: &[u8] = &[0x82, 0];

    fn authority(name: &str) -> Holder {
        holder(name, None, |params| {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)
        })
    }

    fn element(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
        let content = parts.concat();
        let length = u16::try_from(content.len()).unwrap().to_be_bytes();
        let header = match length {
            [0, low @ 0..=0x7f] => vec![tag, low],
            [0, low] => vec![tag, 0x81, low],
            [high, low] => vec![tag, 0x82, high, low],
        };
        [header, content].concat()
    }

    /// What a responder would answer, with everything to be changed.
    struct Answer<'a> {
        issuer: &'a Holder,
        signer: &'a Holder,
        status: &'a [u8],
        serial: &'a [u8],
        hash: (&'static ring::digest::Algorithm, &'a [u8]),
        this_update: &'a str,
        next_update: Option<&'a str>,
        certificates: Vec<&'a [u8]>,
    }

    impl<'a> Answer<'a> {
        fn good(issuer: &'a Holder) -> Self {
            Self {
                issuer,
                signer: issuer,
                status: GOOD,
                serial: &[0, 0xfe, 1],
                hash: (&SHA1_FOR_LEGACY_USE_ONLY, SHA1_IDENTIFIER),
                this_update: "20260530000000Z",
                next_update: Some("20260606000000Z"),
                certificates: Vec::new(),
            }
        }

        fn to_der(&self) -> Vec<u8> {
            let (_, issuer) = parse_x509_certificate(self.issuer.certificate.der()).unwrap();
            let hash = |bytes: &[u8]| element(4, &[digest(self.hash.0, bytes).as_ref()]);
            let identifier = element(
                0x30,
                &[
                    &element(0x30, &[&element(6, &[self.hash.1])]),
                    &hash(issuer.subject().as_raw()),
                    &hash(&issuer.public_key().subject_public_key.data),
                    &element(2, &[self.serial]),
                ],
            );
            let time = |text: &str| element(0x18, &[text.as_bytes()]);
            let next = self.next_update.map(|text| element(0xa0, &[&time(text)]));
            let single = element(
                0x30,
                &[
                    &identifier,
                    self.status,
                    &time(self.this_update),
                    &next.unwrap_or_default(),
                ],
            );
            let data = element(
                0x30,
                &[
                    &element(0xa1, &[issuer.subject().as_raw()]),
                    &time(self.this_update),
                    &element(0x30, &[&single]),
                ],
            );
            let random = SystemRandom::new();
            let key = EcdsaKeyPair::from_pkcs8(
                &ECDSA_P256_SHA256_ASN1_SIGNING,
                &self.signer.key.serialize_der(),
                &random,
            );
            let signature = key.unwrap().sign(&random, &data).unwrap();
            let certificates = element(0xa0, &[&element(0x30, &self.certificates)]);
            let basic = element(
                0x30,
                &[
                    &data,
                    // ecdsa-with-SHA256
                    &element(0x30, &[&[6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2]]),
                    &element(3, &[&[0], signature.as_ref()]),
                    if self.certificates.is_empty() {
                        &[]
                    } else {
                        &certificates
                    },
                ],
            );
            let bytes = element(
                0x30,
                &[&element(6, &[BASIC_RESPONSE]), &element(4, &[&basic])],
            );
            element(0x30, &[&[0x0a, 1, 0], &element(0xa0, &[&bytes])])
        }
    }

    fn verdict(
        answer: &Answer<'_>,
        own: &Holder,
        issuer: &Holder,
        now: i64,
    ) -> Result<Fresh, String> {
        let issuer = Some(issuer.certificate.der().as_ref());
        check(&answer.to_der(), own.certificate.der(), issuer, now)
    }

    #[test]
    fn a_good_and_fresh_response_is_taken() {
        let issuer = authority("ca");
        let own = holder("mail.example", Some(&issuer), |_| {});
        let good = Answer::good(&issuer);
        let fresh = Fresh {
            is_verified: true,
            next_update: NOW + 5 * DAY,
        };
        assert_eq!(verdict(&good, &own, &issuer, NOW), Ok(fresh));
        let by_sha256 = Answer {
            hash: (&SHA256, SHA256_IDENTIFIER),
            ..Answer::good(&issuer)
        };
        assert_eq!(verdict(&by_sha256, &own, &issuer, NOW), Ok(fresh));
        // A chain of one certificate leaves nothing to verify with.
        let alone = check(&good.to_der(), own.certificate.der(), None, NOW);
        assert_eq!(
            alone,
            Ok(Fresh {
                is_verified: false,
                ..fresh
            })
        );
    }

    #[test]
    fn a_response_is_fresh_between_its_two_times() {
        let issuer = authority("ca");
        let own = holder("mail.example", Some(&issuer), |_| {});
        let good = Answer::good(&issuer);
        let open = Answer {
            next_update: None,
            ..Answer::good(&issuer)
        };
        let early =
            "it is not valid before May 30 00:00:00 2026 +00:00: look at this machine's clock";
        let late = "it was to be renewed by Jun  6 00:00:00 2026 +00:00: fetch a new one";
        let older = "it was to be renewed by May 31 00:00:00 2026 +00:00: fetch a new one";
        for (answer, now, reason) in [
            (&good, NOW - 2 * DAY - SKEW, None),
            (&good, NOW - 2 * DAY - SKEW - 1, Some(early)),
            (&good, NOW + 5 * DAY, None),
            (&good, NOW + 5 * DAY + 1, Some(late)),
            (&open, NOW - DAY, None),
            (&open, NOW - DAY + 1, Some(older)),
        ] {
            let result = verdict(answer, &own, &issuer, now);
            assert_eq!(result.err().as_deref(), reason, "{now}");
        }
    }

    #[test]
    fn bad_news_is_not_stapled() {
        let issuer = authority("ca");
        let own = holder("mail.example", Some(&issuer), |_| {});
        let revoked = element(0xa1, &[&element(0x18, &[b"20260501000000Z"])]);
        for (status, reason) in [
            (
                revoked.as_slice(),
                "it says that the certificate is revoked",
            ),
            (UNKNOWN, "its responder does not know the certificate"),
        ] {
            let answer = Answer {
                status,
                ..Answer::good(&issuer)
            };
            assert_eq!(verdict(&answer, &own, &issuer, NOW), Err(reason.to_owned()));
        }
    }

    #[test]
    fn another_certificates_response_is_not_stapled() {
        let (issuer, other) = (authority("ca"), authority("ca"));
        let own = holder("mail.example", Some(&issuer), |_| {});
        let reason =
            Err("it is about another certificate: was the certificate renewed?".to_owned());
        let of_old = Answer {
            serial: &[0, 0xfe, 0],
            ..Answer::good(&issuer)
        };
        assert_eq!(verdict(&of_old, &own, &issuer, NOW), reason);
        // The same name and number, but another key.
        assert_eq!(verdict(&Answer::good(&other), &own, &issuer, NOW), reason);
        let of_other_name = authority("another ca");
        assert_eq!(
            verdict(&Answer::good(&of_other_name), &own, &issuer, NOW),
            reason
        );
    }

    #[test]
    fn the_signer_is_the_issuer_or_has_its_mandate() {
        let (issuer, other) = (authority("ca"), authority("ca"));
        let own = holder("mail.example", Some(&issuer), |_| {});
        let mandate = |params: &mut CertificateParams| {
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::OcspSigning];
        };
        let judge = |signer: &Holder, certificates: Vec<&[u8]>| {
            let answer = Answer {
                signer,
                certificates,
                ..Answer::good(&issuer)
            };
            verdict(&answer, &own, &issuer, NOW).map(drop)
        };
        let reason = Err(
            "its signature is not of the certificate's issuer, the second certificate in --cert"
                .to_owned(),
        );
        let delegate = holder("ocsp", Some(&issuer), mandate);
        let der = delegate.certificate.der().as_ref();
        assert_eq!(judge(&delegate, vec![der]), Ok(()));
        assert_eq!(judge(&delegate, vec![own.certificate.der(), der]), Ok(()));
        assert_eq!(judge(&delegate, vec![]), reason);
        assert_eq!(
            judge(
                &delegate,
                [[own.certificate.der().as_ref(); 4].to_vec(), vec![der]].concat()
            ),
            reason
        );
        assert_eq!(judge(&other, vec![]), reason);
        for bad in [
            holder("ocsp", Some(&issuer), |_| {}),
            holder("ocsp", Some(&other), mandate),
            holder("ocsp", Some(&issuer), |params| {
                mandate(params);
                params.not_after = date_time_ymd(2026, 5, 31);
            }),
        ] {
            assert_eq!(judge(&bad, vec![bad.certificate.der()]), reason);
        }
    }

    #[test]
    fn any_octet_changed_is_noticed() {
        let issuer = authority("ca");
        let own = holder("mail.example", Some(&issuer), |_| {});
        let good = Answer::good(&issuer).to_der();
        let judge = |bytes: &[u8]| {
            let issuer = Some(issuer.certificate.der().as_ref());
            check(bytes, own.certificate.der(), issuer, NOW)
        };
        assert!(judge(&good).is_ok());
        for at in 0..good.len() {
            assert!(judge(&good[..at]).is_err(), "cut at {at}");
            let mut changed = good.clone();
            changed[at] ^= 1;
            assert!(judge(&changed).is_err(), "octet {at}");
        }
    }

    #[test]
    fn what_is_no_response_is_told() {
        let own = authority("ca");
        let judge = |bytes: &[u8]| check(bytes, own.certificate.der(), None, NOW).unwrap_err();
        assert_eq!(judge(b""), malformed());
        assert_eq!(judge(b"-----BEGIN OCSP RESPONSE-----"), malformed());
        assert_eq!(judge(own.certificate.der()), malformed());
        assert_eq!(
            judge(&[0x30, 3, 0x0a, 1, 6]),
            "the responder had nothing but an error for us: unauthorized"
        );
        assert_eq!(
            judge(&vec![0x30; RESPONSE_LIMIT + 1]),
            "larger than 16384 octets"
        );
    }

    /// Made by `openssl ocsp` of OpenSSL 3.0, without nextUpdate, for a certificate by `openssl x509 -req`.
    #[test]
    fn a_response_by_openssl_is_understood() {
        let response = "3081e90a0100a081e33081e006092b06010505073001010481d23081cf3077a10f300d310b300906035504030c026361180f\
         32303236313132323132343835365a30533051303c300906052b0e03021a0500041411048cd20cb3592307d019fd0889562b\
         62d364920414a263ca8d0dd9553ffdf3ec54e7c688027a0a06e5020300fe018000180f32303236313132323132343835365a\
         300a06082a8648ce3d0403020348003045022023096fe8951ec3a02f23cd761511493508dec57afd6f443ac0f64a9dbc8c69\
         15022100bbd0c207062b67cc88b40bf461b875fdcc76ba209ee946eac9cc308167e6a720";
        let response: Vec<_> = (0..response.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&response[at..at + 2], 16).unwrap())
            .collect();
        let issuer = "-----BEGIN CERTIFICATE-----\n\
MIIBbzCCARWgAwIBAgIUcWIkkLY24CdBLQNhUZazG2ZttbQwCgYIKoZIzj0EAwIw\n\
DTELMAkGA1UEAwwCY2EwHhcNMjYxMTIyMTI0ODU1WhcNMzYxMTE5MTI0ODU1WjAN\n\
MQswCQYDVQQDDAJjYTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABEc9SahbEJCV\n\
dG2guymE5VHH+hech2vqm0FF4bIAm7FYDnZEFY4qcS8Dh1ohZoXWeqFeXW4XswWh\n\
c76olo0718ejUzBRMB0GA1UdDgQWBBSiY8qNDdlVP/3z7FTnxogCegoG5TAfBgNV\n\
HSMEGDAWgBSiY8qNDdlVP/3z7FTnxogCegoG5TAPBgNVHRMBAf8EBTADAQH/MAoG\n\
CCqGSM49BAMCA0gAMEUCIQCwo1Zj+xCkJDQXDQStButCyQ5kqSeVPdTUYtPPeTJw\n\
fQIgW8ACLk1yGoRQvXAboh8YdM6SKYZEq9AXGyRj/k5fdmo=\n\
-----END CERTIFICATE-----\n";
        let own = "-----BEGIN CERTIFICATE-----\n\
MIIBDjCBtAIDAP4BMAoGCCqGSM49BAMCMA0xCzAJBgNVBAMMAmNhMB4XDTI2MTEy\n\
MjEyNDg1NloXDTM2MTExOTEyNDg1NlowFzEVMBMGA1UEAwwMbWFpbC5leGFtcGxl\n\
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEN9XuWH69itky5WImJMVV7Dlc5Lfl\n\
W7TFnkXNgx3M/C8Zg5jBPp4hH/djPI+vzbGK73XMcZV7zDiIdSpG2CuNqTAKBggq\n\
hkjOPQQDAgNJADBGAiEA6RytKFIbpGEZ8E3Jq2zPZvN/E2Y54S3CEjQuNVWRfvEC\n\
IQDsK3bq4hySHczhVKBOm3X/enTTcpUPJ6HIll7KSqGoIw==\n\
-----END CERTIFICATE-----\n";
        let [issuer, own] =
            [issuer, own].map(|pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).unwrap());
        let made = 1_795_351_736;
        assert_eq!(
            check(&response, &own, Some(&issuer), made),
            Ok(Fresh {
                is_verified: true,
                next_update: made + DAY,
            })
        );
    }
}
