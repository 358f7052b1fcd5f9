//! Files -> bytes -> keys that sign and the certificates that they go with: read before the sandbox, parsed in it, and examined
//! before they are used.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SigningKey};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::x509::X509Version;

use super::CertificateFiles;
use super::message::{Holding, INTRODUCTION_LIMIT};
use super::ocsp;
use super::signing::SCHEMES;
use crate::clock;
use crate::error::{Error, MALFORMED_PEM};
use crate::files::{FILE_LIMIT, Place, any_mode, check_mode, read, read_with_mode};
use crate::host_name::HostName;
use crate::log::Escaped;
use crate::sandbox::Sandboxed;

/// A certificate and its key, as they are in their files.
pub(super) struct Unparsed {
    pub(super) certificate: (Place, Vec<u8>),
    pub(super) key: (Place, Vec<u8>),
    /// Why a file that may hold a key, if it does, is open to too many.
    pub(super) mode: Result<(), String>,
}

impl Unparsed {
    /// Where one file holds both.
    pub(super) fn of_one_file(
        path: String,
        option: &'static str,
        bytes: Vec<u8>,
        mode: Result<(), String>,
    ) -> Self {
        let place = |what| Place {
            what,
            path: path.clone(),
            option,
        };
        Self {
            certificate: (place("certificate"), bytes.clone()),
            key: (place("private key in"), bytes),
            mode,
        }
    }

    /// Reads what the options name.
    ///
    /// # Errors
    /// `Setup`, with the file, the option and the system's reason.
    pub(super) fn read(files: &CertificateFiles) -> Result<Self, Error> {
        let path = &files.certificate;
        let certificate = Place::new("certificate", path, "--cert");
        let Some(key_path) = &files.key else {
            let (bytes, mode) = read_with_mode(path, &certificate, FILE_LIMIT)?;
            let mode = check_mode(mode);
            return Ok(Self::of_one_file(certificate.path, "--cert", bytes, mode));
        };
        let bytes = read(path, &certificate, FILE_LIMIT, any_mode)?;
        let key = Place::new("private key", key_path, "--key");
        let key_bytes = read(key_path, &key, FILE_LIMIT, check_mode)?;
        Ok(Self {
            certificate: (certificate, bytes),
            key: (key, key_bytes),
            mode: Ok(()),
        })
    }
}

/// A key with what the network process may know about it.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) demands_response: bool,
    pub(super) holding: Holding,
    pub(super) key: Arc<dyn SigningKey>,
}

/// Parses a chain and its key.
///
/// # Errors
/// `Setup`, if one is malformed or not valid now, or if they do not go together.
pub(super) fn parse(unparsed: &Unparsed, _: &Sandboxed) -> Result<Held, Error> {
    let (certificate_place, certificate) = &unparsed.certificate;
    let (key_place, key) = &unparsed.key;
    let Chain {
        certificates: chain,
        demands_response,
        names,
    } = parse_chain(certificate).map_err(|why| cannot_use(certificate_place, why))?;
    let is_one_file = key_place.path == certificate_place.path;
    let key = parse_key(key, is_one_file.then_some(key_place.option))
        .map_err(|why| cannot_use(key_place, why))?;
    // Only now, since a file that turns out to hold no key may be open to all.
    let mode = unparsed.mode.clone();
    mode.map_err(|why| cannot_use(key_place, why))?;
    match examine_pair(&chain, &key) {
        Ok(()) => {}
        Err(Blame::Certificate(why)) => return Err(cannot_use(certificate_place, why)),
        Err(Blame::Pair(why)) => {
            let what = format!("{key_place} does not go with {certificate_place}");
            return Err(Error::setup(what, why));
        }
    }
    let schemes = SCHEMES
        .iter()
        .copied()
        .filter(|scheme| key.choose_scheme(&[*scheme]).is_some())
        .collect();
    let holding = Holding {
        chain: chain
            .iter()
            .map(|certificate| certificate.to_vec())
            .collect(),
        names,
        ocsp: Vec::new(),
        ocsp_end: 0,
        schemes,
    };
    Ok(Held {
        demands_response,
        holding,
        key,
    })
}

/// Whether a certificate is for the name; `None` if it cannot be read. Why not, and whether it can be used, is for [`parse`] to say.
pub(super) fn is_for(unparsed: &Unparsed, name: &HostName, _: &Sandboxed) -> Option<bool> {
    let (_, pem) = &unparsed.certificate;
    let own = rustls_pemfile::certs(&mut pem.as_slice()).next()?.ok()?;
    let (_, own) = x509_parser::parse_x509_certificate(&own).ok()?;
    let mut names = host_names(&own).into_iter();
    Some(names.any(|pattern| name.is_covered_by(&pattern)))
}

/// What is wrong with a chain and a key that are both good by themselves.
#[derive(Debug)]
enum Blame {
    Certificate(String),
    Pair(String),
}

fn examine_pair(chain: &[CertificateDer<'static>], key: &Arc<dyn SigningKey>) -> Result<(), Blame> {
    let fits = |certificate: &CertificateDer<'static>| {
        CertifiedKey::new(vec![certificate.clone()], key.clone()).keys_match()
    };
    match CertifiedKey::new(chain.to_vec(), key.clone()).keys_match() {
        Ok(()) => Ok(()),
        Err(rustls::Error::InconsistentKeys(_)) => {
            let other = chain
                .iter()
                .position(|certificate| fits(certificate).is_ok());
            Err(Blame::Pair(match other {
                Some(place) => format!(
                    "it goes with certificate {} in that file: put our own first, then each one's issuer",
                    place + 1
                ),
                None => "the public keys differ".to_owned(),
            }))
        }
        // rustls says of it that it is a peer's.
        Err(rustls::Error::InvalidCertificate(why)) => Err(Blame::Certificate(format!(
            "malformed certificate: {why:?}"
        ))),
        Err(error) => Err(Blame::Certificate(error.to_string())),
    }
}

fn cannot_use(place: &Place, why: String) -> Error {
    Error::setup(format!("cannot use {place}"), why)
}

#[derive(Debug)]
struct Chain {
    certificates: Vec<CertificateDer<'static>>,
    /// Of the first, as are the names.
    demands_response: bool,
    names: Vec<String>,
}

fn parse_chain(pem: &[u8]) -> Result<Chain, String> {
    let certificates: Vec<_> = rustls_pemfile::certs(&mut &*pem)
        .collect::<Result<_, _>>()
        .map_err(|_| {
            if is_encrypted(pem) {
                format!("the private key in it is encrypted: {NO_PASSPHRASE}")
            } else {
                MALFORMED_PEM.to_owned()
            }
        })?;
    let own = certificates
        .first()
        .ok_or("no certificate in PEM form (BEGIN CERTIFICATE) in it")?;
    let length: usize = certificates
        .iter()
        .map(|certificate| certificate.len())
        .sum();
    if length > INTRODUCTION_LIMIT / 4 {
        return Err("the chain is too long".to_owned());
    }
    let (_, own) = x509_parser::parse_x509_certificate(own)
        .map_err(|error| format!("malformed certificate: {error}"))?;
    check_version(own.version())?;
    check_validity(&own)?;
    let (demands_response, names) = (ocsp::is_demanded(&own), host_names(&own));
    Ok(Chain {
        certificates,
        demands_response,
        names,
    })
}

/// Those that old scripts make have no extensions, so no names either; TLS libraries read none but version 3.
fn check_version(version: X509Version) -> Result<(), String> {
    if version == X509Version::V3 {
        return Ok(());
    }
    Err(format!(
        "it is of X.509 version {}: have it issued anew with extensions (subjectAltName), which are in version 3 only",
        u64::from(version.0) + 1
    ))
}

/// An expired certificate is refused by every client that looks; saying so in the log is kinder (DESIGN promise 5).
fn check_validity(own: &X509Certificate<'_>) -> Result<(), String> {
    let now = clock::now()?;
    let validity = own.validity();
    if now > validity.not_after.timestamp() {
        return Err(format!("it expired on {}: renew it", validity.not_after));
    }
    if now < validity.not_before.timestamp() {
        return Err(format!(
            "it is not valid before {}: look at this machine's clock",
            validity.not_before
        ));
    }
    Ok(())
}

/// The `dNSName`s of the certificate, fit to be printed; clients look at nothing else (RFC 6125 section 6.4.4).
fn host_names(own: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = own.subject_alternative_name() else {
        return Vec::new();
    };
    let names = extension.value.general_names.iter();
    names
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(Escaped(name.as_bytes()).to_string()),
            _ => None,
        })
        .collect()
}

/// `shared` is the option that names the file, where that is the certificate's too.
fn parse_key(pem: &[u8], shared: Option<&str>) -> Result<Arc<dyn SigningKey>, String> {
    let key: PrivateKeyDer<'static> = match rustls_pemfile::private_key(&mut &*pem) {
        Ok(Some(key)) => key,
        // The traditional form says in headers that it is encrypted, which are no base64.
        Err(_) if !is_encrypted(pem) => return Err(MALFORMED_PEM.to_owned()),
        Ok(None) | Err(_) => return Err(describe_no_key(pem, shared)),
    };
    rustls::crypto::ring::sign::any_supported_type(&key).map_err(|_| {
        "neither an RSA (2048 bits or more), ECDSA P-256 or P-384 nor Ed25519 key".to_owned()
    })
}

const NO_PASSPHRASE: &str =
    "imap-tls cannot ask for a passphrase, so store it in clear with mode 0600";

fn is_encrypted(pem: &[u8]) -> bool {
    pem.windows(9).any(|window| window == b"ENCRYPTED")
}

fn describe_no_key(pem: &[u8], shared: Option<&str>) -> String {
    if is_encrypted(pem) {
        return format!("it is encrypted: {NO_PASSPHRASE}");
    }
    match shared {
        Some("--cert") => "no private key in PEM form (BEGIN PRIVATE KEY) in it: name the key's file with --key",
        Some(_) => "no private key in PEM form (BEGIN PRIVATE KEY) in it: append the certificate's key to it",
        None => "no private key in PEM form (BEGIN PRIVATE KEY) in it",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `openssl rsa -aes128 -traditional` writes it.
    #[test]
    fn an_encrypted_key_in_the_traditional_form_is_no_malformed_one() {
        let key = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\
             DEK-Info: AES-128-CBC,0123456789ABCDEF0123456789ABCDEF\n\nMAMBAf8=\n-----END RSA PRIVATE KEY-----\n";
        let why = parse_key(key.as_bytes(), None).map(drop).unwrap_err();
        assert!(why.starts_with("it is encrypted: "), "{why}");
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let why = parse_chain((made.cert.pem() + key).as_bytes()).unwrap_err();
        assert!(
            why.starts_with("the private key in it is encrypted: "),
            "{why}"
        );
    }

    #[test]
    fn a_key_of_another_certificate_in_the_file_is_told_where_it_is() {
        let [one, two, other] = [(); 3].map(|()| {
            let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
            let key = parse_key(made.key_pair.serialize_pem().as_bytes(), None).unwrap();
            (made.cert.pem(), key)
        });
        let chain = parse_chain((one.0 + &two.0).as_bytes()).unwrap();
        let chain = chain.certificates;
        examine_pair(&chain, &one.1).unwrap();
        for (key, expected) in [
            (two.1, "it goes with certificate 2 in that file: "),
            (other.1, "the public keys differ"),
        ] {
            let Err(Blame::Pair(why)) = examine_pair(&chain, &key) else {
                panic!("{expected}")
            };
            assert!(why.starts_with(expected), "{why}");
        }
    }

    #[test]
    fn a_certificate_without_extensions_is_blamed_itself() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = parse_key(made.key_pair.serialize_pem().as_bytes(), None).unwrap();
        let mut der = made.cert.der().to_vec();
        // The version comes first, as number 2.
        let version = [0xa0, 3, 2, 1, 2];
        let place = der.windows(5).position(|window| window == version).unwrap();
        der[place + 4] = 0;
        let certificate = CertificateDer::from(der);
        let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).unwrap();
        let why = check_version(parsed.version()).unwrap_err();
        assert!(why.starts_with("it is of X.509 version 1: "), "{why}");
        // What else rustls cannot read.
        let Err(Blame::Certificate(why)) = examine_pair(std::slice::from_ref(&certificate), &key)
        else {
            panic!()
        };
        assert!(why.starts_with("malformed certificate: "), "{why}");
    }

    /// As a shell or a store of secrets may have made of it.
    #[test]
    fn a_key_whose_line_breaks_were_lost_is_not_repeated() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let (key, certificate) = (made.key_pair.serialize_pem(), made.cert.pem());
        assert!(parse_key(key.as_bytes(), None).is_ok());
        let pieces: Vec<&str> = key.lines().filter(|line| !line.contains("---")).collect();
        for (old, new) in [
            ("\n", ""),
            ("\n", " "),
            ("\n", "\\n"),
            ("-----END", "----END"),
            ("-----\n", "----\n"),
            ("BEGIN PRIVATE KEY-----\n", "BEGIN PRIVATE KEY"),
        ] {
            let text = [key.as_str(), &certificate].concat().replace(old, new);
            for why in [
                parse_key(text.as_bytes(), None).map(drop),
                parse_chain(text.as_bytes()).map(drop),
            ] {
                let Err(why) = why else { continue };
                assert!(
                    !pieces.iter().any(|piece| why.contains(&piece[..16])),
                    "{why}"
                );
            }
            let why = parse_key(text.as_bytes(), None).map(drop).unwrap_err();
            assert!(
                why.contains("line breaks lost") || why.contains("no private key"),
                "{why}"
            );
        }
    }
}
