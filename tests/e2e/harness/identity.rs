//! An authority for client certificates: its certificates, intermediate authorities and revocation lists, made on the spot.

use super::dir::{make_dir, write_file};
use super::pki::{der_element, der_encode, sign};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
};
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Who certifies clients.
pub struct Authority {
    /// Its certificate (PEM), for `--client-ca`.
    pub file: PathBuf,
    certificate: Certificate,
    key: KeyPair,
    dir: PathBuf,
    /// What a holder of its certificates has to show beside his own: all but the root.
    chain: Vec<Shown>,
}

/// A certificate as it is shown.
#[derive(Clone)]
struct Shown {
    der: CertificateDer<'static>,
    pem: String,
}

impl Shown {
    fn of(certificate: &Certificate) -> Self {
        Self {
            der: certificate.der().clone(),
            pem: certificate.pem(),
        }
    }
}

/// A client certificate and its key.
pub struct Identity {
    /// The certificate and those between it and the root (PEM).
    pub cert: PathBuf,
    /// The private key (PKCS#8 PEM).
    pub key: PathBuf,
    chain: Vec<Shown>,
    key_der: Vec<u8>,
}

impl Authority {
    /// A root in a directory of its own.
    pub fn make(dir: &Path, name: &str) -> Self {
        Self::make_with(dir, name, |_| {})
    }

    /// The same, after `change` had its way with it.
    pub fn make_with(dir: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        make_dir(dir, 0o755);
        let key = KeyPair::generate().unwrap();
        let mut params = authority_params(name);
        change(&mut params);
        let certificate = params.self_signed(&key).unwrap();
        Self::new(dir, name, certificate, key, Vec::new())
    }

    /// An authority that this one certifies.
    pub fn intermediate(&self, name: &str) -> Self {
        self.intermediate_with(name, |_| {})
    }

    /// The same, after `change` had its way with it.
    pub fn intermediate_with(
        &self,
        name: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = authority_params(name);
        change(&mut params);
        let certificate = params.signed_by(&key, &self.certificate, &self.key);
        let certificate = certificate.unwrap();
        let mut chain = vec![Shown::of(&certificate)];
        chain.extend(self.chain.iter().cloned());
        Self::new(&self.dir, name, certificate, key, chain)
    }

    fn new(
        dir: &Path,
        name: &str,
        certificate: Certificate,
        key: KeyPair,
        chain: Vec<Shown>,
    ) -> Self {
        let file = dir.join(format!("{}.pem", name.replace(' ', "-")));
        write_file(&file, certificate.pem(), 0o644);
        Self {
            file,
            certificate,
            key,
            dir: dir.to_owned(),
            chain,
        }
    }

    /// A client's certificate with this common name, after `change` had its way with it.
    pub fn issue(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let (params, key) = (client_params(name, change), KeyPair::generate().unwrap());
        let certificate = params.signed_by(&key, &self.certificate, &self.key);
        Identity::new(&self.dir, &certificate.unwrap(), &key, &self.chain)
    }

    /// The same of X.509 version 1, which has no extensions, as `openssl x509 -req` made it for long. For [`Identity::shown_by`]
    /// alone: there is no file of it.
    pub fn issue_version_1(&self, name: &str) -> Identity {
        let mut identity = self.issue(name, |_| {});
        let own = &mut identity.chain[0];
        own.der = version_1(&own.der, &self.key).into();
        identity
    }

    /// A client's certificate that its holder signed himself.
    pub fn self_signed(&self, name: &str) -> Identity {
        let (params, key) = (client_params(name, |_| {}), KeyPair::generate().unwrap());
        Identity::new(&self.dir, &params.self_signed(&key).unwrap(), &key, &[])
    }

    /// A revocation list (PEM) of these serial numbers, to be renewed within `lifetime` from now (negative: before now).
    pub fn list(&self, revoked: &[u64], lifetime: i64) -> PathBuf {
        let revoked = revoked.iter().map(|serial| RevokedCertParams {
            serial_number: (*serial).into(),
            revocation_time: rcgen::date_time_ymd(2025, 1, 1),
            reason_code: None,
            invalidity_date: None,
        });
        let list = CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2025, 1, 1),
            next_update: rcgen::date_time_ymd(1970, 1, 1)
                + Duration::from_secs(now().checked_add_signed(lifetime).unwrap()),
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.certificate, &self.key).unwrap();
        let path = self.dir.join(format!("crl-{}.pem", super::next_number()));
        write_file(&path, list.pem().unwrap(), 0o644);
        path
    }
}

impl Identity {
    fn new(dir: &Path, certificate: &Certificate, key: &KeyPair, issuers: &[Shown]) -> Self {
        let number = super::next_number();
        let mut chain = vec![Shown::of(certificate)];
        chain.extend(issuers.iter().cloned());
        let identity = Self {
            cert: dir.join(format!("client-{number}.pem")),
            key: dir.join(format!("client-{number}.key")),
            chain,
            key_der: key.serialize_der(),
        };
        let chain: Vec<_> = identity.chain.iter().map(|one| one.pem.as_str()).collect();
        write_file(&identity.cert, chain.concat(), 0o644);
        write_file(&identity.key, key.serialize_pem(), 0o644);
        identity
    }

    /// Makes a client show this certificate, whichever authorities the server names.
    pub fn shown_by(&self, mut config: ClientConfig) -> ClientConfig {
        let key = PrivateKeyDer::try_from(self.key_der.clone()).unwrap();
        let key = aws_lc_rs::sign::any_supported_type(&key).unwrap();
        let chain = self.chain.iter().map(|one| one.der.clone()).collect();
        let certified = CertifiedKey::new(chain, key);
        config.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(certified));
        config
    }
}

/// A certificate without its version and its extensions (RFC 5280 section 4.1), signed anew by its authority.
fn version_1(certificate: &[u8], authority: &KeyPair) -> Vec<u8> {
    const VERSION: u8 = 0xa0;
    const EXTENSIONS: u8 = 0xa3;
    const SEQUENCE: u8 = 0x30;
    const BIT_STRING: u8 = 3;
    let sequence = |parts: &[&[u8]]| der_encode(SEQUENCE, &parts.concat());
    let (_, certificate, _) = der_element(certificate);
    let (_, mut fields, after) = der_element(certificate);
    let (_, _, signature) = der_element(after);
    let algorithm = &after[..after.len() - signature.len()];
    let mut kept = Vec::new();
    while !fields.is_empty() {
        let (tag, _, rest) = der_element(fields);
        if ![VERSION, EXTENSIONS].contains(&tag) {
            kept.push(&fields[..fields.len() - rest.len()]);
        }
        fields = rest;
    }
    let signed = sequence(&kept);
    // The first octet says that all its bits are used.
    let signature = [&[0], sign(authority, &signed).as_slice()].concat();
    let signature = der_encode(BIT_STRING, &signature);
    sequence(&[&signed, algorithm, &signature])
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap().as_secs()
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if !name.is_empty() {
        params.distinguished_name.push(DnType::CommonName, name);
    }
    params.not_before = rcgen::date_time_ymd(2024, 1, 1);
    params.not_after = rcgen::date_time_ymd(2045, 1, 1);
    params
}

fn authority_params(name: &str) -> CertificateParams {
    let mut params = params(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn client_params(name: &str, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = params(name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    change(&mut params);
    params
}
