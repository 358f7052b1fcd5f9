//! TLS messages made by hand, so that they can be wrong in any place, and records sealed with a TLS 1.3 client's own secrets.

use rustls::KeyLog;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

pub const CHANGE_CIPHER_SPEC: u8 = 20;
pub const ALERT: u8 = 21;
pub const HANDSHAKE: u8 = 22;
pub const APPLICATION_DATA: u8 = 23;
pub const HEARTBEAT: u8 = 24;

pub const SERVER_NAME: u16 = 0;
pub const SUPPORTED_GROUPS: u16 = 10;
pub const SIGNATURE_ALGORITHMS: u16 = 13;
pub const ALPN: u16 = 16;
pub const PADDING: u16 = 21;
pub const EARLY_DATA: u16 = 42;
pub const PRE_SHARED_KEY: u16 = 41;
pub const SUPPORTED_VERSIONS: u16 = 43;
pub const PSK_MODES: u16 = 45;
pub const KEY_SHARE: u16 = 51;

pub const SECP256R1: u16 = 0x0017;
pub const X25519: u16 = 0x001d;
pub const X25519MLKEM768: u16 = 0x11ec;

/// A record (RFC 8446 section 5.1), its version that of TLS 1.2.
pub fn record(kind: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    [&[kind, 3, 3], &length[..], content].concat()
}

/// A handshake message (RFC 8446 section 4).
pub fn message(kind: u8, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[kind], &length[1..], body].concat()
}

/// Bytes after their length in one octet.
pub fn short(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    [&[u8::try_from(bytes.len()).unwrap()], bytes].concat()
}

/// Bytes after their length in two octets.
pub fn long(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let bytes = bytes.as_ref();
    let length = u16::try_from(bytes.len()).unwrap();
    [&length.to_be_bytes()[..], bytes].concat()
}

/// Numbers, two octets each.
pub fn words(words: &[u16]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// One entry of `key_share`.
pub fn share(group: u16, key: impl AsRef<[u8]>) -> Vec<u8> {
    [words(&[group]), long(key)].concat()
}

/// A ClientHello: a good one, to be changed.
#[derive(Clone)]
pub struct Hello {
    pub version: u16,
    pub session: Vec<u8>,
    pub suites: Vec<u8>,
    pub compressions: Vec<u8>,
    /// `None`: not even their length.
    pub extensions: Option<Vec<(u16, Vec<u8>)>>,
}

impl Hello {
    /// TLS 1.3 with a share for X25519; every 32 octets are one.
    pub fn tls13() -> Self {
        let mut hello = Self::tls12();
        hello.suites = words(&[0x1301, 0x1302, 0x1303]);
        hello
            .with(SUPPORTED_VERSIONS, short(words(&[0x0304])))
            .with(KEY_SHARE, long(share(X25519, [9; 32])))
    }

    /// TLS 1.2 with ECDHE and an ECDSA certificate.
    pub fn tls12() -> Self {
        let hello = Self {
            version: 0x0303,
            session: vec![7; 32],
            suites: words(&[0xc02b, 0xc02c, 0xcca9]),
            compressions: vec![0],
            extensions: Some(Vec::new()),
        };
        hello
            .with(SUPPORTED_GROUPS, long(words(&[X25519, SECP256R1])))
            .with(SIGNATURE_ALGORITHMS, long(words(&[0x0403, 0x0804])))
            // extended_master_secret (RFC 7627).
            .with(23, [])
    }

    /// With this extension, in the place of the one that it has or as the last.
    pub fn with(mut self, kind: u16, content: impl Into<Vec<u8>>) -> Self {
        let extensions = self.extensions.as_mut().unwrap();
        let content = content.into();
        match extensions.iter_mut().find(|(other, _)| *other == kind) {
            Some((_, old)) => *old = content,
            None => extensions.push((kind, content)),
        }
        self
    }

    /// With this extension too, whatever there is.
    pub fn adding(mut self, kind: u16, content: impl Into<Vec<u8>>) -> Self {
        let extensions = self.extensions.as_mut().unwrap();
        extensions.push((kind, content.into()));
        self
    }

    pub fn without(mut self, kind: u16) -> Self {
        let extensions = self.extensions.as_mut().unwrap();
        extensions.retain(|(other, _)| *other != kind);
        self
    }

    pub fn body(&self) -> Vec<u8> {
        let mut body = words(&[self.version]);
        body.extend([0x5a; 32]);
        body.extend(short(&self.session));
        body.extend(long(&self.suites));
        body.extend(short(&self.compressions));
        if let Some(extensions) = &self.extensions {
            let extensions = extensions.iter();
            let bytes =
                extensions.flat_map(|(kind, content)| [words(&[*kind]), long(content)].concat());
            body.extend(long(bytes.collect::<Vec<_>>()));
        }
        body
    }

    pub fn message(&self) -> Vec<u8> {
        message(1, self.body())
    }

    /// In as few records as it needs.
    pub fn records(&self) -> Vec<u8> {
        let message = self.message();
        let pieces = message.chunks(1 << 14);
        pieces.flat_map(|piece| record(HANDSHAKE, piece)).collect()
    }
}

/// The secrets of a TLS 1.3 client, as rustls logs them.
#[derive(Debug, Default)]
pub struct Secrets(Mutex<BTreeMap<String, Vec<u8>>>);

impl KeyLog for Secrets {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        let mut secrets = self.0.lock().unwrap();
        secrets.insert(label.to_owned(), secret.to_vec());
    }
}

/// Seals records as a client with TLS_AES_128_GCM_SHA256 does (RFC 8446 section 5.2).
pub struct Sealer {
    key: ring::aead::LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Sealer {
    /// From `CLIENT_HANDSHAKE_TRAFFIC_SECRET` or `CLIENT_TRAFFIC_SECRET_0`; the client must have sealed nothing with it yet.
    pub fn new(secrets: &Arc<Secrets>, label: &str) -> Self {
        let secret = secrets.0.lock().unwrap()[label].clone();
        let key = expand_label(&secret, "key", 16);
        let key = ring::aead::UnboundKey::new(&ring::aead::AES_128_GCM, &key).unwrap();
        Self {
            key: ring::aead::LessSafeKey::new(key),
            iv: expand_label(&secret, "iv", 12).try_into().unwrap(),
            sequence: 0,
        }
    }

    /// A record of this inner kind.
    pub fn record(&mut self, kind: u8, content: impl AsRef<[u8]>) -> Vec<u8> {
        self.inner([content.as_ref(), &[kind]].concat())
    }

    /// A record with this inside: content, its kind, zeros.
    pub fn inner(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        let mut nonce = self.iv;
        for (octet, number) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *octet ^= number;
        }
        self.sequence += 1;
        let length = u16::try_from(bytes.len() + 16).unwrap().to_be_bytes();
        let header = [APPLICATION_DATA, 3, 3, length[0], length[1]];
        let nonce = ring::aead::Nonce::assume_unique_for_key(nonce);
        let header_data = ring::aead::Aad::from(header);
        let sealed = self
            .key
            .seal_in_place_append_tag(nonce, header_data, &mut bytes);
        sealed.unwrap();
        [&header[..], &bytes].concat()
    }
}

/// HKDF-Expand-Label of RFC 8446 section 7.1, with an empty context, for at most one block.
fn expand_label(secret: &[u8], label: &str, length: u16) -> Vec<u8> {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret);
    let mut info = length.to_be_bytes().to_vec();
    info.extend(short(format!("tls13 {label}")));
    info.extend([0, 1]);
    ring::hmac::sign(&key, &info).as_ref()[..usize::from(length)].to_vec()
}
