//! A private certificate authority and server certificates with keys of every kind, made on the spot.

use super::dir::{make_dir, run_path, write_file};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedKey, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Kinds of server key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Key {
    P256,
    P384,
    Ed25519,
    Rsa2048,
}

/// How a key is written in its PEM file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Format {
    Pkcs8,
    /// `BEGIN EC PRIVATE KEY`.
    Sec1,
    /// `BEGIN RSA PRIVATE KEY`.
    Pkcs1,
}

/// A server certificate for localhost, mail.example, 127.0.0.1 and ::1, signed by a CA of its own.
pub struct Pki {
    pub kind: Key,
    /// The CA's certificate (PEM), for clients.
    pub ca: PathBuf,
    /// The server's certificate (PEM).
    pub cert: PathBuf,
    /// The server's private key (PKCS#8 PEM, mode 0600).
    pub key: PathBuf,
    /// The private key as DER (PKCS#8).
    pub key_der: Vec<u8>,
}

impl Pki {
    /// The certificate of this kind that all tests of a run share.
    pub fn of(kind: Key) -> &'static Pki {
        static ALL: [OnceLock<Pki>; 4] = [const { OnceLock::new() }; 4];
        ALL[kind as usize].get_or_init(|| {
            let dir = run_path("pki").join(format!("{kind:?}"));
            Pki::make(&dir, kind, |_| {})
        })
    }

    /// A certificate in a new directory `dir`, after `change` had its way with it (expired, other names ...).
    pub fn make(dir: &Path, kind: Key, change: impl FnOnce(&mut CertificateParams)) -> Pki {
        make_dir(dir, 0o755);
        let authority = authority();
        let key = generate(kind);
        let mut params = CertificateParams::new(
            ["localhost", "mail.example", "127.0.0.1", "::1"].map(str::to_owned),
        )
        .unwrap();
        params.distinguished_name = name("localhost");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.not_before = rcgen::date_time_ymd(2024, 1, 1);
        params.not_after = rcgen::date_time_ymd(2045, 1, 1);
        change(&mut params);
        let cert = params
            .signed_by(&key, &authority.cert, &authority.key_pair)
            .unwrap();
        let pki = Pki {
            kind,
            ca: dir.join("ca.pem"),
            cert: dir.join("cert.pem"),
            key: dir.join("key.pem"),
            key_der: key.serialize_der(),
        };
        write_file(&pki.ca, authority.cert.pem(), 0o644);
        write_file(&pki.cert, cert.pem(), 0o644);
        write_file(&pki.key, key.serialize_pem(), 0o600);
        pki
    }

    /// The authority's own key as a file beside its certificate, for what only the authority can make.
    pub fn authority_key(&self) -> PathBuf {
        let path = self.ca.with_file_name("ca-key.pem");
        write_file(&path, authority().key_pair.serialize_pem(), 0o600);
        path
    }

    /// The authority's signature, ECDSA with P-256 and SHA-256.
    pub fn sign_as_authority(&self, bytes: &[u8]) -> Vec<u8> {
        sign(&authority().key_pair, bytes)
    }

    /// The same key in another PEM form, as a file beside `test_dir`'s other files.
    pub fn key_as(&self, format: Format, test_dir: &Path) -> PathBuf {
        let path = test_dir.join(format!("key-{format:?}.pem"));
        let marker = match (format, self.kind) {
            (Format::Pkcs8, _) => "BEGIN PRIVATE KEY",
            (Format::Sec1, Key::P256 | Key::P384) => "BEGIN EC PRIVATE KEY",
            (Format::Pkcs1, Key::Rsa2048) => "BEGIN RSA PRIVATE KEY",
            combination => panic!("no such key file: {combination:?}"),
        };
        let text = if format == Format::Pkcs8 {
            std::fs::read(&self.key).unwrap()
        } else {
            openssl(&["pkey", "-traditional", "-in", self.key.to_str().unwrap()])
        };
        assert!(
            String::from_utf8_lossy(&text).contains(marker),
            "openssl wrote another form than {marker}"
        );
        write_file(&path, text, 0o600);
        path
    }

    /// Every part of the private key that must be nowhere but in the keeper, each in the byte orders that libraries keep
    /// numbers in, with a name. For RSA: d, p, q and the CRT numbers; for EC: the scalar; for Ed25519: the seed and what
    /// is derived from it. Also the key file's own text.
    pub fn secrets(&self) -> Vec<(String, Vec<u8>)> {
        let mut parts: Vec<(String, Vec<u8>)> = match self.kind {
            Key::Rsa2048 => {
                let numbers = der_integers(der_value(&self.key_der, &[0x30, 0x02, 0x30, 0x04]));
                let names = ["version", "n", "e", "d", "p", "q", "dP", "dQ", "qInv"];
                assert_eq!(
                    numbers.len(),
                    names.len(),
                    "an RSA private key has nine numbers"
                );
                names
                    .iter()
                    .zip(numbers)
                    .skip(3)
                    .map(|(name, number)| ((*name).to_owned(), number))
                    .collect()
            }
            Key::P256 | Key::P384 => {
                let inner = der_value(&self.key_der, &[0x30, 0x02, 0x30, 0x04]);
                let scalar = der_value(inner, &[0x30, 0x02, 0x04]).to_vec();
                let order: &[u8] = if self.kind == Key::P256 {
                    &P256_ORDER
                } else {
                    &P384_ORDER
                };
                let computed = montgomery(&scalar, order);
                vec![
                    ("scalar".to_owned(), scalar),
                    // What ring keeps, and all that is sure to be there: the rest is what was freed and not yet used again.
                    ("scalar as it is computed with".to_owned(), computed),
                ]
            }
            Key::Ed25519 => {
                let seed = der_value(der_value(&self.key_der, &[0x30, 0x02, 0x30, 0x04]), &[0x04])
                    .to_vec();
                let expanded = sha512(&seed);
                vec![
                    ("seed".to_owned(), seed),
                    ("prefix".to_owned(), expanded[32..].to_vec()),
                ]
            }
        };
        let reversed: Vec<_> = parts
            .iter()
            .map(|(name, bytes)| {
                (
                    format!("{name}, little-endian"),
                    bytes.iter().rev().copied().collect(),
                )
            })
            .collect();
        parts.extend(reversed);
        let text = std::fs::read_to_string(&self.key).unwrap();
        let line = text.lines().nth(1).unwrap().as_bytes().to_vec();
        // The first line of a short key's base64 is mostly the algorithm's name: its second half is the key.
        parts.push(("the PEM text".to_owned(), line[line.len() / 2..].to_vec()));
        // A copy may be cut (freed and partly used again): half of each is enough to be found.
        parts
            .into_iter()
            .map(|(name, bytes)| (name, bytes[..bytes.len().min(24)].to_vec()))
            .collect()
    }
}

/// Runs the openssl command; RSA keys and the old PEM forms come from there.
fn openssl(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("openssl")
        .args(arguments)
        .output()
        .expect("the openssl command");
    assert!(
        output.status.success(),
        "openssl {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

fn sha512(bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("openssl")
        .args(["dgst", "-sha512", "-binary"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    child.wait_with_output().unwrap().stdout
}

fn generate(kind: Key) -> KeyPair {
    match kind {
        Key::P256 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(),
        Key::P384 => KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(),
        Key::Ed25519 => {
            // rcgen's own are PKCS#8 version 2, which openssl before 3.5 cannot read.
            let pem = openssl(&["genpkey", "-algorithm", "ED25519"]);
            rebuild(&pem, &rcgen::PKCS_ED25519)
        }
        Key::Rsa2048 => {
            let pem = openssl(&[
                "genpkey",
                "-algorithm",
                "RSA",
                "-pkeyopt",
                "rsa_keygen_bits:2048",
            ]);
            rebuild(&pem, &rcgen::PKCS_RSA_SHA256)
        }
    }
}

fn rebuild(pem: &[u8], algorithm: &'static rcgen::SignatureAlgorithm) -> KeyPair {
    KeyPair::from_pkcs8_pem_and_sign_algo(std::str::from_utf8(pem).unwrap(), algorithm).unwrap()
}

fn authority() -> &'static CertifiedKey {
    static AUTHORITY: OnceLock<CertifiedKey> = OnceLock::new();
    AUTHORITY.get_or_init(|| {
        let key_pair = generate(Key::P256);
        let mut params = CertificateParams::default();
        params.distinguished_name = name("imap-tls test CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.not_before = rcgen::date_time_ymd(2024, 1, 1);
        params.not_after = rcgen::date_time_ymd(2045, 1, 1);
        let cert = params.self_signed(&key_pair).unwrap();
        CertifiedKey { cert, key_pair }
    })
}

fn name(common: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::CommonName, common);
    name
}

/// A signature, ECDSA with P-256 and SHA-256.
pub fn sign(key: &KeyPair, bytes: &[u8]) -> Vec<u8> {
    let random = ring::rand::SystemRandom::new();
    let algorithm = &ring::signature::ECDSA_P256_SHA256_ASN1_SIGNING;
    let key = key.serialize_der();
    let key = ring::signature::EcdsaKeyPair::from_pkcs8(algorithm, &key, &random).unwrap();
    key.sign(&random, bytes).unwrap().as_ref().to_vec()
}

/// Walks into DER: for each wanted tag, enters (a SEQUENCE that is not the last) or skips to the next element; gives
/// the contents of the last.
fn der_value<'a>(mut der: &'a [u8], tags: &[u8]) -> &'a [u8] {
    for (index, tag) in tags.iter().enumerate() {
        let (found, value, rest) = der_element(der);
        assert_eq!(found, *tag, "DER tag");
        let last = index + 1 == tags.len();
        // The first SEQUENCE is the envelope: go in. Others are passed over.
        der = if last || index == 0 && *tag == 0x30 {
            value
        } else {
            rest
        };
    }
    der
}

/// Its tag, its content, and what follows it.
pub fn der_element(der: &[u8]) -> (u8, &[u8], &[u8]) {
    let (length, header) = match der[1] {
        short @ 0..=0x7f => (usize::from(short), 2),
        0x81 => (usize::from(der[2]), 3),
        0x82 => (usize::from(der[2]) << 8 | usize::from(der[3]), 4),
        other => panic!("DER length {other:#x}"),
    };
    (
        der[0],
        &der[header..header + length],
        &der[header + length..],
    )
}

/// The reverse.
pub fn der_encode(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    // As short as it can be, which DER wants.
    let header = match length {
        [0, low @ 0..=0x7f] => vec![tag, low],
        [0, low] => vec![tag, 0x81, low],
        [high, low] => vec![tag, 0x82, high, low],
    };
    [header.as_slice(), content].concat()
}

/// The INTEGERs of a SEQUENCE, without the leading zero of positive numbers.
fn der_integers(der: &[u8]) -> Vec<Vec<u8>> {
    let (_, mut rest, _) = der_element(der);
    let mut numbers = Vec::new();
    while !rest.is_empty() {
        let (tag, value, next) = der_element(rest);
        assert_eq!(tag, 2, "an INTEGER");
        numbers.push(if value.len() > 1 && value[0] == 0 {
            value[1..].to_vec()
        } else {
            value.to_vec()
        });
        rest = next;
    }
    numbers
}

/// The orders of the groups (SEC 2, sections 2.4.2 and 2.5.1), big-endian.
const P256_ORDER: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0x00, 0x00, 0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17, 0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
];
const P384_ORDER: [u8; 48] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xc7, 0x63, 0x4d, 0x81, 0xf4, 0x37, 0x2d, 0xdf,
    0x58, 0x1a, 0x0d, 0xb2, 0x48, 0xb0, 0xa7, 0x7a, 0xec, 0xec, 0x19, 0x6a, 0xcc, 0xc5, 0x29, 0x73,
];

/// The number in Montgomery's form: times 2 for each of its bits, modulo the order. All are big-endian and of one length.
fn montgomery(number: &[u8], order: &[u8]) -> Vec<u8> {
    let mut value = number.to_vec();
    for _ in 0..8 * number.len() {
        let mut carry = 0;
        for byte in value.iter_mut().rev() {
            let doubled = u16::from(*byte) << 1 | carry;
            *byte = doubled as u8;
            carry = doubled >> 8;
        }
        if carry == 1 || value.as_slice() >= order {
            let mut borrow = 0;
            for (byte, subtrahend) in value.iter_mut().zip(order).rev() {
                let difference = i16::from(*byte) - i16::from(*subtrahend) - borrow;
                *byte = difference.rem_euclid(256) as u8;
                borrow = i16::from(difference < 0);
            }
        }
    }
    value
}
