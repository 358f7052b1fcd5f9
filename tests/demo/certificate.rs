//! A certificate for `localhost`, made on the spot, from an authority whose key is forgotten at once.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

use crate::Result;

/// The files that were made.
pub(crate) struct Certificate {
    /// What clients trust.
    pub(crate) authority: PathBuf,
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

const HOUR: Duration = Duration::from_secs(60 * 60);

impl Certificate {
    pub(crate) fn make(directory: &Path) -> Result<Self> {
        let mut authority = valid_for_a_week(Vec::new())?;
        authority
            .distinguished_name
            .push(DnType::CommonName, "imap-tls demonstration authority");
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let authority_key = KeyPair::generate()?;
        let authority = authority.self_signed(&authority_key)?;

        let mut server = valid_for_a_week(vec!["localhost".into(), "127.0.0.1".into()])?;
        server
            .distinguished_name
            .push(DnType::CommonName, "localhost");
        server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        server.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        server.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let server = server.signed_by(&key, &authority, &authority_key)?;

        let files = Self {
            authority: directory.join("ca.pem"),
            certificate: directory.join("cert.pem"),
            key: directory.join("key.pem"),
        };
        fs::write(&files.authority, authority.pem())?;
        fs::write(&files.certificate, server.pem())?;
        let mut key_file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&files.key)?;
        key_file.write_all(key.serialize_pem().as_bytes())?;
        Ok(files)
    }
}

fn valid_for_a_week(names: Vec<String>) -> Result<CertificateParams> {
    let now = rcgen::date_time_ymd(1970, 1, 1) + SystemTime::now().duration_since(UNIX_EPOCH)?;
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    // A little in the past, for a client whose clock is slow.
    params.not_before = now - HOUR;
    params.not_after = now + 7 * 24 * HOUR;
    Ok(params)
}
