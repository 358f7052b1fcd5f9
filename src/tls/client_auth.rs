//! Which client certificates are accepted: authorities (`--client-ca`) and revocation lists (`--client-crl`) as a verifier.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::slice;
use std::sync::{Arc, Mutex};

use ring::digest::{Context, SHA256};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, RootCertStore};
use x509_parser::asn1_rs::{Any, Class, FromDer as _, Tag};
use x509_parser::certificate::X509Certificate;
use x509_parser::time::ASN1Time;

use crate::clock::SKEW;
use crate::error::{Error, MALFORMED_PEM};
use crate::log::Escaped;
use crate::signed::{Signed, take};

/// What `--client-cert` asks of a client.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ClientDemand {
    /// A certificate is asked for. A client without one is welcome; one with a bad one is not.
    Request,
    /// No session without a good certificate.
    Require,
}

/// A file that was read with privileges, to be parsed without.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TrustFile<'a> {
    pub(crate) path: &'a Path,
    pub(crate) bytes: &'a [u8],
}

/// A verifier, and until when all its authorities are good, in seconds since 1970.
pub(crate) struct Verifier {
    end: i64,
    /// Whether several of the revocation lists are of one issuer's name.
    has_namesakes: bool,
    pub(super) inner: Arc<dyn ClientCertVerifier>,
    /// Without revocation lists, for all that does not hang on certificates.
    timeless: Arc<dyn ClientCertVerifier>,
}

/// Who examines client certificates, for as long as there is an authority.
///
/// The library takes an authority for granted, whatever the time is, and the listener's may have been read long ago.
pub(crate) struct Examiner {
    current: Mutex<Option<Verifier>>,
    make: Box<Make>,
    timeless: Arc<dyn ClientCertVerifier>,
}

/// What makes a verifier of the authorities that are good at a time, for a client's chain if one is known.
type Make = dyn Fn(i64, Chain<'_>) -> Result<Verifier, Error> + Send + Sync;

/// A client's certificates, its own first; empty where none is known yet.
pub(crate) type Chain<'a> = &'a [&'a [u8]];

impl Examiner {
    /// With what makes its verifiers.
    ///
    /// # Errors
    /// Its own, at the time `now`.
    pub(super) fn new(
        make: impl Fn(i64, Chain<'_>) -> Result<Verifier, Error> + Send + Sync + 'static,
        now: i64,
    ) -> Result<Self, Error> {
        let first = make(now, &[])?;
        Ok(Self {
            timeless: first.timeless.clone(),
            current: Mutex::new(Some(first)),
            make: Box::new(make),
        })
    }

    /// The verifier for what does not hang on certificates.
    pub(super) fn timeless(&self) -> &Arc<dyn ClientCertVerifier> {
        &self.timeless
    }

    /// Examines a client's certificate.
    ///
    /// # Errors
    /// The library's, which says why it is refused.
    pub(super) fn examine(
        &self,
        own: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let verifier = self.at(seconds).ok_or(CertificateError::UnknownIssuer)?;
        let verdict = verifier.verify_client_cert(own, issuers, now);
        drop(verifier);
        if !verdict.as_ref().is_err_and(is_of_another_key) {
            return verdict;
        }
        let chain: Vec<&[u8]> = [own]
            .into_iter()
            .chain(issuers)
            .map(AsRef::as_ref)
            .collect();
        match self.made_for(&chain, seconds) {
            Some(verifier) => verifier.verify_client_cert(own, issuers, now),
            None => verdict,
        }
    }

    /// The verifier whose lists are in the order that is right for the chain; `None` if there is but one order.
    fn made_for(&self, chain: Chain<'_>, now: i64) -> Option<Arc<dyn ClientCertVerifier>> {
        let mut current = self.current.lock().ok()?;
        current.as_ref().filter(|verifier| verifier.has_namesakes)?;
        // As below.
        *current = None;
        *current = (self.make)(now, chain).ok();
        current.as_ref().map(|verifier| verifier.inner.clone())
    }

    /// The verifier of the authorities that are left; `None` if none is. Making another costs only those who have not renewed
    /// since one has expired.
    fn at(&self, now: i64) -> Option<Arc<dyn ClientCertVerifier>> {
        let mut current = self.current.lock().ok()?;
        if current.as_ref().is_some_and(|verifier| verifier.end < now) {
            // The old one is let go first: there may be no memory for the lists of two.
            *current = None;
            *current = (self.make)(now, &[]).ok();
        }
        current.as_ref().map(|verifier| verifier.inner.clone())
    }
}

impl fmt::Debug for Examiner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Examiner").finish_non_exhaustive()
    }
}

/// Whether a signature was held to the wrong key, as that of a list is where two authorities have one name. The library may then blame
/// the certificate, for having been held to the other's.
fn is_of_another_key(error: &rustls::Error) -> bool {
    use rustls::CertRevocationListError as List;
    matches!(
        error,
        rustls::Error::InvalidCertRevocationList(
            List::BadSignature | List::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
        ) | rustls::Error::InvalidCertificate(
            CertificateError::BadSignature
                | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
        )
    )
}

/// The names of authorities that are sent as a hint, at most, in octets. It may be left out (RFC 8446 section 4.2.4, RFC 5246
/// section 7.4.4); a list of all public authorities would make every handshake longer and help no client to choose.
const HINT_LIMIT: usize = 8192;

/// A verifier for client certificates.
///
/// Every certificate in `authorities` is trusted by itself, also an intermediate one whose root is not there. With revocation
/// lists given, each certificate of the chain must be covered by one that is in force, as with nginx's `ssl_crl` and Apache's
/// `SSLCARevocationCheck chain`: a list that is missing or out of date may be one that somebody withheld. With a client's `chain`, the
/// lists of its own issuers are looked at before those of others of their names.
///
/// # Errors
/// `Setup`, naming file and option.
pub(crate) fn verifier(
    authorities: TrustFile<'_>,
    revocations: &[TrustFile<'_>],
    demand: ClientDemand,
    provider: &Arc<CryptoProvider>,
    now: i64,
    chain: Chain<'_>,
) -> Result<Verifier, Error> {
    let (roots, end) = roots(authorities, now)?;
    let roots = Arc::new(roots);
    let mut lists = newest_first(revocations, now)?;
    if !chain.is_empty() {
        own_first(&mut lists, authorities, chain);
    }
    let build = |lists: &[List<'_>]| {
        let mut builder =
            WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
                .with_crls(lists.iter().map(|list| list.der.to_vec().into()))
                .enforce_revocation_expiration();
        if demand == ClientDemand::Request {
            builder = builder.allow_unauthenticated();
        }
        if roots
            .subjects()
            .iter()
            .map(|name| name.as_ref().len())
            .sum::<usize>()
            > HINT_LIMIT
        {
            builder = builder.clear_root_hint_subjects();
        }
        builder.build().map_err(|error| match lists {
            [list, ..] => list_fault(list.file, error),
            [] => authorities_fault(authorities, error),
        })
    };
    let inner = build(&lists).map_err(|error| {
        // Which of the lists is it?
        let mut each = lists.iter();
        let single = each.find_map(|list| build(slice::from_ref(list)).err());
        single.unwrap_or(error)
    })?;
    let issuers: BTreeSet<_> = lists.iter().map(|list| &list.issuer).collect();
    Ok(Verifier {
        end,
        has_namesakes: issuers.len() < lists.len(),
        inner,
        timeless: build(&[])?,
    })
}

/// What a session's acceptance hangs on: SHA-256 over the demand, the authorities and the lists. A session ticket carries it,
/// so that no session outlives the trust under which it was made.
pub(crate) fn binding(
    authorities: TrustFile<'_>,
    revocations: &[TrustFile<'_>],
    demand: ClientDemand,
) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    context.update(match demand {
        ClientDemand::Request => b"request",
        ClientDemand::Require => b"require",
    });
    for file in [&authorities].into_iter().chain(revocations) {
        // With their lengths, so that no two sets of files read alike.
        context.update(&(file.bytes.len() as u64).to_be_bytes());
        context.update(file.bytes);
    }
    let mut binding = [0; 32];
    for (to, from) in binding.iter_mut().zip(context.finish().as_ref()) {
        *to = *from;
    }
    binding
}

/// The authorities that are good now, and until when all of them are.
fn roots(file: TrustFile<'_>, now: i64) -> Result<(RootCertStore, i64), Error> {
    let mut roots = RootCertStore::empty();
    let mut end = i64::MAX;
    let mut out_of_date = None;
    for (index, certificate) in CertificateDer::pem_slice_iter(file.bytes).enumerate() {
        let fault =
            |why: String| authorities_fault(file, format!("certificate {}: {why}", index + 1));
        let certificate = certificate.map_err(|_| fault(MALFORMED_PEM.to_owned()))?;
        match check_authority(&certificate, now).map_err(fault)? {
            Ok(not_after) => {
                end = end.min(not_after);
                roots
                    .add(certificate)
                    .map_err(|error| fault(format!("malformed: {error}")))?;
            }
            // One that is renewed in time stands beside its successor for a while: no reason to stop.
            Err(why) => out_of_date = Some(fault(why)),
        }
    }
    if roots.is_empty() {
        return Err(out_of_date.unwrap_or_else(|| {
            let why = "no certificate in PEM form (BEGIN CERTIFICATE) in it";
            authorities_fault(file, why)
        }));
    }
    Ok((roots, end))
}

/// Until when a certificate may stand for an authority, which the verifier takes for granted; or why not now, or why never (the
/// outer `Err`).
///
/// One that is no authority's must not: whoever holds its key could certify anybody.
pub(super) fn check_authority(certificate: &[u8], now: i64) -> Result<Result<i64, String>, String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|error| format!("malformed: {error}"))?;
    let validity = parsed.validity();
    if !parsed.is_ca() {
        return Err(format!(
            "'{}' is not an authority (no CA:TRUE in its basicConstraints)",
            Escaped(parsed.subject().to_string().as_bytes())
        ));
    }
    if now > validity.not_after.timestamp() {
        return Ok(Err(format!("it expired on {}", validity.not_after)));
    }
    if now < validity.not_before.timestamp() {
        return Ok(Err(format!(
            "it is not valid before {}",
            validity.not_before
        )));
    }
    Ok(Ok(validity.not_after.timestamp()))
}

/// A revocation list, and what the library does not look at.
pub(super) struct List<'a> {
    der: Cow<'a, [u8]>,
    pub(super) file: TrustFile<'a>,
    /// As it is encoded.
    pub(super) issuer: Vec<u8>,
    pub(super) this_update: ASN1Time,
    pub(super) next_update: ASN1Time,
}

impl<'a> List<'a> {
    /// Walks as far as the dates (RFC 5280 section 5.1): parsing it whole would take its size in memory several times over.
    fn read(der: Cow<'a, [u8]>, file: TrustFile<'a>) -> Option<Self> {
        let (_, list) = Any::from_der(&der).ok()?;
        let (_, content) = Any::from_der(list.data).ok()?;
        let (after_version, version) = Any::from_der(content.data).ok()?;
        let rest = match version.tag() {
            Tag::Integer => after_version,
            _ => content.data,
        };
        let (mut rest, _algorithm) = Any::from_der(rest).ok()?;
        let issuer = take(&mut rest, Class::Universal, Tag::Sequence)?;
        let (rest, this_update) = ASN1Time::from_der(rest).ok()?;
        let (_, next_update) = ASN1Time::from_der(rest).ok()?;
        Some(Self {
            issuer: issuer.whole.to_vec(),
            file,
            this_update,
            next_update,
            der,
        })
    }

    /// Whether this authority, and none that only has its name, has signed it.
    pub(super) fn is_of(&self, authority: &X509Certificate<'_>) -> bool {
        authority.subject().as_raw() == self.issuer && is_signed_by(&self.der, authority)
    }
}

/// The lists as the library is to be given them: it takes the first that is of a certificate's issuer, looks at no other, and
/// never asks whether a list is in force already.
///
/// So the newest comes first, or a certificate that it revokes would be good by an older one; and one from the future does not
/// stand in the way of those that are in force.
pub(super) fn newest_first<'a>(files: &[TrustFile<'a>], now: i64) -> Result<Vec<List<'a>>, Error> {
    let mut lists = Vec::new();
    for file in files {
        for der in parse_lists(*file)? {
            let why = "malformed: its issuer and its dates cannot be read";
            lists.push(List::read(der, *file).ok_or_else(|| list_fault(*file, why))?);
        }
    }
    lists.sort_by_key(|list| Reverse((list.this_update, list.next_update)));
    let latest = now.saturating_add(SKEW);
    let (lists, early): (Vec<_>, Vec<_>) = lists
        .into_iter()
        .partition(|list| list.this_update.timestamp() <= latest);
    let is_alone = |list: &&List<'_>| !lists.iter().any(|other| other.issuer == list.issuer);
    match early.iter().find(is_alone) {
        // With no list at all nobody would be examined.
        Some(list) => Err(list_fault(
            list.file,
            format!(
                "it is not in force before {}: was this machine's clock set back?",
                list.this_update
            ),
        )),
        None => Ok(lists),
    }
}

/// How many of a client's certificates are looked at: the library takes no longer chain, and each may cost a signature's verification
/// with each that is of its issuer's name.
const LONGEST_CHAIN: usize = 8;

/// Puts the lists in front that are signed with a key that has signed one of the chain, the newest of a key still before its others.
///
/// An authority that was given another key under its old name has lists of both, and the library knows them by their issuer's name
/// alone (RFC 5280 section 6.3.3 has the key as well). It still verifies the signature of the list that it takes. The key that has
/// signed the client's own certificate comes first: its authority's certificate, signed with the old key, may be in the chain as well
/// (RFC 4210 section 4.4).
fn own_first(lists: &mut [List<'_>], authorities: TrustFile<'_>, chain: Chain<'_>) {
    let authorities: Vec<_> = CertificateDer::pem_slice_iter(authorities.bytes)
        .flatten()
        .collect();
    let parse = |der| x509_parser::parse_x509_certificate(der).ok();
    let chain: Vec<_> = chain.iter().take(LONGEST_CHAIN).copied().collect();
    let place_of_signed = |signer: &X509Certificate<'_>| {
        chain.iter().position(|der| {
            parse(der).is_some_and(|(_, own)| own.issuer() == signer.subject())
                && is_signed_by(der, signer)
        })
    };
    let signers: Vec<_> = authorities
        .iter()
        .map(AsRef::as_ref)
        .chain(chain.iter().copied())
        .filter_map(|der| parse(der).map(|(_, signer)| signer))
        .filter_map(|signer| Some((place_of_signed(&signer)?, signer)))
        .collect();
    lists.sort_by_cached_key(|list| {
        let of = signers.iter().filter(|(_, signer)| list.is_of(signer));
        of.map(|(place, _)| *place).min().unwrap_or(usize::MAX)
    });
}

fn is_signed_by(der: &[u8], signer: &X509Certificate<'_>) -> bool {
    Signed::read(der).is_some_and(|signed| signed.is_signed_by(signer))
}

/// The lists in a file: any number in PEM form, or one in DER, which is how authorities publish them (RFC 5280 section 5).
fn parse_lists(file: TrustFile<'_>) -> Result<Vec<Cow<'_, [u8]>>, Error> {
    const SEQUENCE: u8 = 0x30;
    if file.bytes.first() == Some(&SEQUENCE) {
        return Ok(vec![file.bytes.into()]);
    }
    let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(file.bytes)
        .map(|list| list.map(|list| list.to_vec().into()))
        .collect::<Result<_, _>>()
        .map_err(|_| list_fault(file, MALFORMED_PEM))?;
    if lists.is_empty() {
        let why = "no revocation list in it, neither in PEM form (BEGIN X509 CRL) nor in DER";
        return Err(list_fault(file, why));
    }
    Ok(lists)
}

fn authorities_fault(file: TrustFile<'_>, why: impl std::fmt::Display) -> Error {
    let path = file.path.display();
    Error::setup(
        format!("cannot use client authorities '{path}' (--client-ca)"),
        why,
    )
}

fn list_fault(file: TrustFile<'_>, why: impl std::fmt::Display) -> Error {
    let path = file.path.display();
    Error::setup(
        format!("cannot use revocation list '{path}' (--client-crl)"),
        why,
    )
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::signed::testing::{self, Holder as Authority};
    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams,
        ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
        date_time_ymd,
    };

    /// 2026-06-01; what is made here is valid from 2026-01-01 to 2027-01-01, revocation lists to 2026-07-01.
    pub(in crate::tls) const NOW: i64 = 1_780_272_000;
    pub(in crate::tls) const DAY: i64 = 86_400;

    pub(in crate::tls) fn params(name: &str, serial: u64) -> CertificateParams {
        let mut params = testing::params(name);
        params.serial_number = Some(serial.into());
        params
    }

    pub(in crate::tls) fn authority(
        name: &str,
        serial: u64,
        issuer: Option<&Authority>,
    ) -> Authority {
        authority_with(KeyPair::generate().unwrap(), name, serial, issuer)
    }

    fn authority_with(
        key: KeyPair,
        name: &str,
        serial: u64,
        issuer: Option<&Authority>,
    ) -> Authority {
        let mut params = params(name, serial);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        testing::certify(params, key, issuer)
    }

    impl Authority {
        fn client(&self, serial: u64, usage: ExtendedKeyUsagePurpose) -> CertificateDer<'static> {
            let mut params = params("alice", serial);
            params.extended_key_usages = vec![usage];
            let key = KeyPair::generate().unwrap();
            let client = params
                .signed_by(&key, &self.certificate, &self.key)
                .unwrap();
            client.der().clone()
        }

        pub(in crate::tls) fn list(&self, revoked: &[u64]) -> rcgen::CertificateRevocationList {
            self.list_of((2026, 1), (2026, 7), revoked)
        }

        /// From the first of a month to the first of another.
        pub(in crate::tls) fn list_of(
            &self,
            this_update: (i32, u8),
            next_update: (i32, u8),
            revoked: &[u64],
        ) -> rcgen::CertificateRevocationList {
            let revoked = revoked.iter().map(|serial| RevokedCertParams {
                serial_number: (*serial).into(),
                revocation_time: date_time_ymd(2026, 2, 1),
                reason_code: None,
                invalidity_date: None,
            });
            CertificateRevocationListParams {
                this_update: date_time_ymd(this_update.0, this_update.1, 1),
                next_update: date_time_ymd(next_update.0, next_update.1, 1),
                crl_number: 1.into(),
                issuing_distribution_point: None,
                revoked_certs: revoked.collect(),
                key_identifier_method: KeyIdMethod::Sha256,
            }
            .signed_by(&self.certificate, &self.key)
            .unwrap()
        }
    }

    fn provider() -> Arc<CryptoProvider> {
        Arc::new(rustls::crypto::ring::default_provider())
    }

    pub(in crate::tls) fn file<'a>(name: &'a str, bytes: &'a [u8]) -> TrustFile<'a> {
        let path = Path::new(name);
        TrustFile { path, bytes }
    }

    fn verifier_of(
        authorities: &str,
        lists: &[&[u8]],
    ) -> Result<Arc<dyn ClientCertVerifier>, String> {
        let lists: Vec<_> = lists.iter().map(|bytes| file("crl", bytes)).collect();
        let authorities = file("ca", authorities.as_bytes());
        verifier(
            authorities,
            &lists,
            ClientDemand::Require,
            &provider(),
            NOW,
            &[],
        )
        .map(|verifier| verifier.inner)
        .map_err(|error| error.to_string())
    }

    /// Without lists.
    fn verifier_at(authorities: &str, now: i64) -> Result<Verifier, Error> {
        verifier(
            file("ca", authorities.as_bytes()),
            &[],
            ClientDemand::Require,
            &provider(),
            now,
            &[],
        )
    }

    fn verdict(
        verifier: &dyn ClientCertVerifier,
        chain: &[&CertificateDer<'static>],
        now: i64,
    ) -> Result<(), rustls::Error> {
        let now = UnixTime::since_unix_epoch(Duration::from_secs(now.unsigned_abs()));
        let others: Vec<_> = chain[1..].iter().map(|one| (*one).clone()).collect();
        verifier
            .verify_client_cert(chain[0], &others, now)
            .map(drop)
    }

    fn kind(verdict: Result<(), rustls::Error>) -> String {
        let rustls::Error::InvalidCertificate(error) = verdict.unwrap_err() else {
            panic!("not about the certificate");
        };
        let text = format!("{error:?}");
        let end = text.find([' ', '{']).unwrap_or(text.len());
        text[..end].to_owned()
    }

    #[test]
    fn only_a_certificate_of_our_authority_for_clients_and_in_force_is_accepted() {
        let (ours, other) = (authority("ours", 1, None), authority("other", 2, None));
        let verifier = verifier_of(&ours.certificate.pem(), &[]).unwrap();
        let good = ours.client(10, ExtendedKeyUsagePurpose::ClientAuth);
        assert_eq!(verdict(&*verifier, &[&good], NOW), Ok(()));
        for (certificate, now, words) in [
            (&good, NOW + 300 * DAY, "ExpiredContext"),
            (&good, NOW - 300 * DAY, "NotValidYetContext"),
            (
                &other.client(10, ExtendedKeyUsagePurpose::ClientAuth),
                NOW,
                "UnknownIssuer",
            ),
            (
                &ours.client(11, ExtendedKeyUsagePurpose::ServerAuth),
                NOW,
                "InvalidPurposeContext",
            ),
        ] {
            assert_eq!(kind(verdict(&*verifier, &[certificate], now)), words);
        }
    }

    #[test]
    fn with_lists_each_certificate_of_the_chain_needs_one_in_force() {
        let root = authority("root", 1, None);
        let middle = authority("middle", 2, Some(&root));
        let client = middle.client(10, ExtendedKeyUsagePurpose::ClientAuth);
        let chain = [&client, middle.certificate.der()];
        let (of_root, of_middle) = (root.list(&[]), middle.list(&[99]));
        let judge = |lists: &[&[u8]], now| {
            let verifier = verifier_of(&root.certificate.pem(), lists).unwrap();
            verdict(&*verifier, &chain, now)
        };
        let both = [of_root.pem().unwrap() + &of_middle.pem().unwrap()];
        assert_eq!(judge(&[], NOW), Ok(()));
        assert_eq!(judge(&[both[0].as_bytes()], NOW), Ok(()));
        // In DER, and each in its own file.
        let (der_of_root, der_of_middle) = (of_root.der(), of_middle.der());
        assert_eq!(judge(&[der_of_root, der_of_middle], NOW), Ok(()));

        assert_eq!(
            kind(judge(&[der_of_middle], NOW)),
            "UnknownRevocationStatus"
        );
        assert_eq!(kind(judge(&[der_of_root], NOW)), "UnknownRevocationStatus");
        assert_eq!(
            kind(judge(&[der_of_root, der_of_middle], NOW + 60 * DAY)),
            "ExpiredRevocationListContext"
        );
        assert_eq!(
            kind(judge(&[der_of_root, middle.list(&[10]).der()], NOW)),
            "Revoked"
        );
        assert_eq!(
            kind(judge(&[root.list(&[2]).der(), der_of_middle], NOW)),
            "Revoked"
        );
    }

    #[test]
    fn of_several_lists_the_newest_in_force_counts() {
        let ours = authority("ours", 1, None);
        let client = ours.client(10, ExtendedKeyUsagePurpose::ClientAuth);
        let (old, new) = (
            ours.list_of((2026, 1), (2027, 1), &[]),
            ours.list_of((2026, 5), (2026, 7), &[10]),
        );
        let (expired, current) = (
            ours.list_of((2026, 1), (2026, 5), &[10]),
            ours.list_of((2026, 5), (2026, 7), &[]),
        );
        let future = ours.list_of((2026, 7), (2027, 1), &[]);
        let pem = ours.certificate.pem();
        for (lists, expected) in [
            (&[&old, &new][..], "Revoked"),
            (&[&expired, &current], ""),
            (&[&expired], "ExpiredRevocationListContext"),
            (&[&future, &new], "Revoked"),
            (&[&future, &expired], "ExpiredRevocationListContext"),
        ] {
            let mut lists: Vec<_> = lists.iter().map(|list| list.der().as_ref()).collect();
            for order in ["one way", "the other way"] {
                let verifier = verifier_of(&pem, &lists).unwrap();
                match verdict(&*verifier, &[&client], NOW) {
                    Ok(()) => assert_eq!("", expected, "{order}"),
                    refused => assert_eq!(kind(refused), expected, "{order}"),
                }
                lists.reverse();
            }
        }
    }

    #[test]
    fn of_two_authorities_of_one_name_each_has_its_own_list() {
        // With a key of another kind, the library has another word for a signature that is not of it.
        for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519] {
            lists_of_namesakes(KeyPair::generate_for(algorithm).unwrap());
        }
    }

    /// For an authority that was given this key under its old name.
    fn lists_of_namesakes(key: KeyPair) {
        let old = authority("Root", 1, None);
        let crossed = KeyPair::try_from(key.serialize_der()).unwrap();
        let cross = authority_with(crossed, "Root", 4, Some(&old)).certificate;
        let cross = cross.der();
        let new = authority_with(key, "Root", 2, None);
        let foreign = authority("Root", 3, None);
        let usage = ExtendedKeyUsagePurpose::ClientAuth;
        let [old_client, new_client, forged] =
            [&old, &new, &foreign].map(|one| one.client(10, usage.clone()));
        let middle = authority("middle", 11, Some(&old));
        let below = middle.client(12, usage);
        let (good, revoked) = ([].as_slice(), [10].as_slice());
        let newer = |revoked| new.list_of((2026, 5), (2026, 7), revoked);
        let (of_old, of_new) = (old.list(good), newer(good));
        let (revoked_old, revoked_new) = (old.list(revoked), newer(revoked));
        let (superseded, of_middle) = (old.list_of((2025, 12), (2026, 7), good), middle.list(&[]));
        let revoked_middle = old.list(&[11]);
        let newest_of_old = old.list_of((2026, 5), (2026, 8), good);
        let pems = [&old, &new].map(|one| one.certificate.pem());
        let bad = "Signature";
        for (name, chain, lists, expected) in [
            ("old", &[&old_client][..], &[&of_old, &of_new][..], ""),
            ("new", &[&new_client], &[&of_old, &of_new], ""),
            (
                "old, revoked",
                &[&old_client],
                &[&revoked_old, &of_new],
                "Revoked",
            ),
            (
                "new, revoked",
                &[&new_client],
                &[&of_old, &revoked_new],
                "Revoked",
            ),
            (
                "old, revoked by its newer list",
                &[&old_client],
                &[&superseded, &revoked_old, &of_new],
                "Revoked",
            ),
            (
                "new, with its authority crossed",
                &[&new_client, cross],
                &[&of_old, &of_new],
                "",
            ),
            (
                "new, with its authority crossed, whose list is newer",
                &[&new_client, cross],
                &[&newest_of_old, &of_new],
                "",
            ),
            (
                "new, revoked, with its authority crossed",
                &[&new_client, cross],
                &[&newest_of_old, &revoked_new],
                "Revoked",
            ),
            ("old, without a list", &[&old_client], &[&of_new], bad),
            ("new, without a list", &[&new_client], &[&of_old], bad),
            ("forged", &[&forged], &[&of_old, &of_new], bad),
            (
                "below old",
                &[&below, middle.certificate.der()],
                &[&of_middle, &of_old, &of_new],
                "",
            ),
            (
                "below old, revoked between",
                &[&below, middle.certificate.der()],
                &[&of_middle, &revoked_middle, &of_new],
                "Revoked",
            ),
        ] {
            for pem in [pems.concat(), pems[1].clone() + &pems[0]] {
                let lists: Vec<Vec<u8>> = lists.iter().map(|list| list.der().to_vec()).collect();
                let make = move |now, chain: Chain<'_>| {
                    let lists: Vec<_> = lists.iter().map(|bytes| file("crl", bytes)).collect();
                    let (authorities, demand) = (file("ca", pem.as_bytes()), ClientDemand::Require);
                    verifier(authorities, &lists, demand, &provider(), now, chain)
                };
                let examiner = Examiner::new(make, NOW).unwrap();
                let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW.unsigned_abs()));
                let issuers: Vec<_> = chain[1..].iter().map(|one| (*one).clone()).collect();
                // The second time the order of the first is there.
                for _ in 0..2 {
                    match examiner.examine(chain[0], &issuers, now) {
                        Ok(_) => assert_eq!(expected, "", "{name}"),
                        Err(error) => {
                            let text = format!("{error:?}");
                            assert!(
                                !expected.is_empty() && text.contains(expected),
                                "{name}: {text}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn with_nothing_but_a_list_from_the_future_nobody_is_served() {
        let (ours, other) = (authority("ours", 1, None), authority("other", 2, None));
        let pem = ours.certificate.pem();
        let future = ours.list_of((2026, 7), (2027, 1), &[]);
        for lists in [
            &[future.der().as_ref()][..],
            &[other.list(&[]).der(), future.der()],
        ] {
            assert_eq!(
                verifier_of(&pem, lists).err().unwrap(),
                "cannot use revocation list 'crl' (--client-crl): it is not in force before Jul  1 00:00:00 2026 +00:00: \
                 was this machine's clock set back?"
            );
        }
        // An authority's clock may be ahead of ours by a little.
        let july = NOW + 30 * DAY;
        let at = |now| {
            let lists = [file("crl", future.der())];
            verifier(
                file("ca", pem.as_bytes()),
                &lists,
                ClientDemand::Require,
                &provider(),
                now,
                &[],
            )
        };
        assert!(at(july - SKEW).is_ok());
        assert!(at(july - SKEW - 1).is_err());
    }

    #[test]
    fn a_request_leaves_the_choice_to_the_client_but_is_no_weaker() {
        let ours = authority("ours", 1, None);
        let pem = ours.certificate.pem();
        let requested = verifier(
            file("ca", pem.as_bytes()),
            &[],
            ClientDemand::Request,
            &provider(),
            NOW,
            &[],
        )
        .unwrap()
        .inner;
        assert!(requested.offer_client_auth() && !requested.client_auth_mandatory());
        assert!(verifier_of(&pem, &[]).unwrap().client_auth_mandatory());
        let foreign = authority("other", 1, None).client(1, ExtendedKeyUsagePurpose::ClientAuth);
        assert_eq!(
            verdict(&*requested, &[&foreign], NOW),
            Err(CertificateError::UnknownIssuer.into())
        );
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let ours = authority("ours", 1, None);
        let pem = ours.certificate.pem();
        let leaf = params("leaf", 5)
            .self_signed(&KeyPair::generate().unwrap())
            .unwrap();
        let refused =
            |authorities: &str, lists: &[&[u8]]| verifier_of(authorities, lists).err().unwrap();
        let ca = "cannot use client authorities 'ca' (--client-ca): ";
        let none = "no certificate in PEM form (BEGIN CERTIFICATE) in it";
        for empty in ["", "nonsense", &ours.key.serialize_pem()] {
            assert_eq!(refused(empty, &[]), format!("{ca}{none}"));
        }
        assert!(
            refused(&pem.replace("END", "FIN"), &[])
                .starts_with(&format!("{ca}certificate 1: malformed PEM"))
        );
        // A file may have been named by mistake that holds a key, and its line breaks may have been lost.
        let one_line = [pem.as_str(), &ours.key.serialize_pem()].concat();
        assert_eq!(
            refused(&one_line.replace('\n', ""), &[]),
            format!("{ca}certificate 1: {MALFORMED_PEM}")
        );
        let broken = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
        assert!(
            refused(&(pem.clone() + broken), &[])
                .starts_with(&format!("{ca}certificate 2: malformed"))
        );
        assert_eq!(
            refused(&leaf.pem(), &[]),
            format!(
                "{ca}certificate 1: 'CN=leaf' is not an authority (no CA:TRUE in its basicConstraints)"
            )
        );
        let crl = "cannot use revocation list 'crl' (--client-crl): ";
        let list = ours.list(&[]);
        for empty in [b"".as_slice(), b"nonsense", pem.as_bytes()] {
            assert_eq!(
                refused(&pem, &[list.der(), empty]),
                format!(
                    "{crl}no revocation list in it, neither in PEM form (BEGIN X509 CRL) nor in DER"
                )
            );
        }
        let cut = &list.der()[..list.der().len() - 1];
        assert!(refused(&pem, &[cut]).starts_with(&format!("{crl}malformed")));
    }

    #[test]
    fn of_several_bad_lists_the_bad_one_is_named() {
        let ours = authority("ours", 1, None);
        let (pem, list) = (ours.certificate.pem(), ours.list(&[]));
        // What the library has against a list: one that says only what has changed since another (RFC 5280 section 5.2.4).
        let (number, delta) = ([0x55, 0x1d, 0x14], [0x55, 0x1d, 0x1b]);
        let mut changes = list.der().to_vec();
        let at = changes
            .windows(3)
            .position(|window| window == number)
            .unwrap();
        changes[at..at + 3].copy_from_slice(&delta);
        for bad in [b"0nonsense", changes.as_slice()] {
            let lists = [file("good.crl", list.der()), file("bad.crl", bad)];
            let error = verifier(
                file("ca", pem.as_bytes()),
                &lists,
                ClientDemand::Require,
                &provider(),
                NOW,
                &[],
            );
            let text = error.err().unwrap().to_string();
            assert!(text.contains("'bad.crl'"), "{text}");
        }
    }

    #[test]
    fn an_authority_out_of_date_is_no_authority() {
        let (old, new) = (authority("old", 1, None), authority("new", 2, None));
        let of_2028 = NOW + 2 * 365 * DAY;
        let pem = old.certificate.pem();
        let text = verifier_at(&pem, of_2028).err().unwrap().to_string();
        assert!(
            text.contains("(--client-ca): certificate 1: it expired on "),
            "{text}"
        );
        // Beside one in force it is passed over.
        let mut params = params("older", 3);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.not_after = date_time_ymd(2026, 2, 1);
        let key = KeyPair::generate().unwrap();
        let older = Authority {
            certificate: params.self_signed(&key).unwrap(),
            key,
        };
        let both = older.certificate.pem() + &new.certificate.pem();
        let verifier = verifier_at(&both, NOW).unwrap().inner;
        let clients = [&new, &older].map(|one| one.client(9, ExtendedKeyUsagePurpose::ClientAuth));
        assert_eq!(verdict(&*verifier, &[&clients[0]], NOW), Ok(()));
        assert_eq!(
            kind(verdict(&*verifier, &[&clients[1]], NOW)),
            "UnknownIssuer"
        );
    }

    #[test]
    fn an_authority_that_expires_meanwhile_is_none_any_more() {
        let [short, long] = [("short", 9), ("long", 12)].map(|(name, month)| {
            let mut params = params(name, 1);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.not_after = date_time_ymd(2026, month, 1);
            let key = KeyPair::generate().unwrap();
            let certificate = params.self_signed(&key).unwrap();
            Authority { certificate, key }
        });
        let clients = [&short, &long].map(|one| one.client(9, ExtendedKeyUsagePurpose::ClientAuth));
        let pem = short.certificate.pem() + &long.certificate.pem();
        let make = move |now, _: Chain<'_>| verifier_at(&pem, now);
        let examiner = Examiner::new(make, NOW).unwrap();
        for (days, accepted) in [
            (0, [true, true]),
            (100, [false, true]),
            (200, [false, false]),
        ] {
            let now = NOW + days * DAY;
            for (client, is_accepted) in clients.iter().zip(accepted) {
                let verifier = examiner.at(now);
                let is_good = verifier.is_some_and(|one| verdict(&*one, &[client], now).is_ok());
                assert_eq!(is_good, is_accepted, "after {days} days");
            }
        }
    }

    #[test]
    fn hints_are_few() {
        let one = authority("ours", 1, None).certificate.pem();
        assert_eq!(
            verifier_of(&one, &[]).unwrap().root_hint_subjects().len(),
            1
        );
        let long = "x".repeat(HINT_LIMIT / 2);
        let two = authority(&long, 1, None).certificate.pem()
            + &authority(&long, 2, None).certificate.pem();
        assert_eq!(
            verifier_of(&two, &[]).unwrap().root_hint_subjects().len(),
            0
        );
    }

    #[test]
    fn the_binding_changes_with_each_input() {
        let of = |authorities: &[u8], lists: &[&[u8]], demand| {
            let lists: Vec<_> = lists.iter().map(|bytes| file("crl", bytes)).collect();
            binding(file("ca", authorities), &lists, demand)
        };
        let all = [
            of(b"ab", &[], ClientDemand::Request),
            of(b"ab", &[], ClientDemand::Require),
            of(b"a", &[b"b"], ClientDemand::Require),
            of(b"", &[b"ab"], ClientDemand::Require),
            of(b"", &[b"a", b"b"], ClientDemand::Require),
            of(b"ab", &[b""], ClientDemand::Require),
        ];
        for (index, one) in all.iter().enumerate() {
            assert!(!all[..index].contains(one), "{index}");
        }
        assert_eq!(all[0], of(b"ab", &[], ClientDemand::Request));
    }
}
