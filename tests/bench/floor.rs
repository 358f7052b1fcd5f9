//! What the mathematics alone costs, in this process: one handshake's server half, and the cipher.

use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use rustls::crypto::cipher::{InboundOpaqueMessage, OutboundChunks, OutboundPlainMessage};
use rustls::crypto::{CryptoProvider, aws_lc_rs, ring};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::NoServerSessionStorage;
use rustls::{
    ClientConfig, ClientConnection, ConnectionTrafficSecrets, ContentType, NamedGroup,
    ProtocolVersion, ServerConfig, ServerConnection,
};

use crate::client::{provider, roots};
use crate::report::median;
use crate::workspace::Workspace;
use crate::{Cipher, Result};

/// Medians, one per round.
#[derive(Debug, Default)]
pub(crate) struct Floors {
    /// Milliseconds; aws-lc-rs with X25519MLKEM768, the group that counts.
    pub(crate) handshake: Vec<f64>,
    /// Milliseconds; ring with X25519. (ring has no ML-KEM, and imap-tls's own is private to it.)
    pub(crate) handshake_classical: Vec<f64>,
    /// Seconds per GiB, ring, records of 16 KiB.
    pub(crate) encryption: Vec<f64>,
    pub(crate) decryption: Vec<f64>,
}

const HANDSHAKES: usize = 40;

impl Floors {
    pub(crate) fn measure(&mut self, workspace: &Workspace, cipher: Cipher) -> Result<()> {
        let mut classical = ring::default_provider();
        classical
            .kx_groups
            .retain(|group| group.name() == NamedGroup::X25519);
        let mut hybrid = aws_lc_rs::default_provider();
        hybrid
            .kx_groups
            .retain(|group| group.name() == NamedGroup::X25519MLKEM768);
        let time = |provider: CryptoProvider| {
            let pair = Pair::new(workspace, provider, cipher)?;
            let times = (0..HANDSHAKES)
                .map(|_| pair.handshake().map(|done| done.time.as_secs_f64() * 1e3))
                .collect::<Result<Vec<_>>>()?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(median(&times))
        };
        self.handshake.push(time(hybrid)?);
        self.handshake_classical.push(time(classical)?);
        let done = Pair::new(workspace, ring::default_provider(), cipher)?.handshake()?;
        let (encryption, decryption) = cipher_alone(done)?;
        self.encryption.push(encryption);
        self.decryption.push(decryption);
        Ok(())
    }
}

/// Both ends of a handshake, in memory.
struct Pair {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// A finished handshake.
struct Done {
    client: ClientConnection,
    server: ServerConnection,
    /// The server's half.
    time: Duration,
}

impl Pair {
    fn new(workspace: &Workspace, server: CryptoProvider, cipher: Cipher) -> Result<Self> {
        let mut client = ClientConfig::builder_with_provider(Arc::new(provider(cipher)))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(&workspace.authority)?)
            .with_no_client_auth();
        client.resumption = rustls::client::Resumption::disabled();
        client.enable_secret_extraction = true;
        let mut server = ServerConfig::builder_with_provider(Arc::new(server))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(
                vec![CertificateDer::from_pem_file(&workspace.certificate)?],
                PrivateKeyDer::from_pem_file(&workspace.key)?,
            )?;
        server.enable_secret_extraction = true;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }

    fn handshake(&self) -> Result<Done> {
        let name = ServerName::try_from("localhost")?;
        let mut client = ClientConnection::new(self.client.clone(), name)?;
        let mut time = Duration::ZERO;
        let start = thread_time();
        let mut server = ServerConnection::new(self.server.clone())?;
        time += thread_time() - start;
        while client.is_handshaking() || server.is_handshaking() {
            let mut to_server = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut to_server)?;
            }
            let start = thread_time();
            let mut to_client = Vec::new();
            let mut unread = to_server.as_slice();
            while !unread.is_empty() {
                server.read_tls(&mut unread)?;
                server.process_new_packets()?;
            }
            while server.wants_write() {
                server.write_tls(&mut to_client)?;
            }
            time += thread_time() - start;
            let mut unread = to_client.as_slice();
            while !unread.is_empty() {
                client.read_tls(&mut unread)?;
                client.process_new_packets()?;
            }
        }
        Ok(Done {
            client,
            server,
            time,
        })
    }
}

const RECORD: usize = 16 * 1024;
const RECORDS: u64 = 256;
const REPETITIONS: u32 = 8;

/// Seconds per GiB of encryption and of decryption, with ring and the keys of a session.
fn cipher_alone(done: Done) -> Result<(f64, f64)> {
    let suite = done.client.negotiated_cipher_suite();
    let suite = suite.ok_or("no cipher suite")?.suite();
    let (ours, theirs) = (
        done.server.dangerous_extract_secrets()?.tx.1,
        done.client.dangerous_extract_secrets()?.rx.1,
    );
    let key = |secrets| match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv }
        | ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        _ => Err("an unknown cipher"),
    };
    let algorithm = ring::ALL_CIPHER_SUITES
        .iter()
        .find(|candidate| candidate.suite() == suite)
        .and_then(|suite| suite.tls13())
        .ok_or("not TLS 1.3")?
        .aead_alg;
    let ((ours, our_iv), (theirs, their_iv)) = (key(ours)?, key(theirs)?);
    let mut encrypter = algorithm.encrypter(ours, our_iv);
    let mut decrypter = algorithm.decrypter(theirs, their_iv);
    let plain = vec![0; RECORD];
    let (mut encryption, mut decryption) = (Duration::ZERO, Duration::ZERO);
    for _ in 0..REPETITIONS {
        let start = thread_time();
        let records = (0..RECORDS)
            .map(|number| {
                let message = OutboundPlainMessage {
                    typ: ContentType::ApplicationData,
                    version: ProtocolVersion::TLSv1_3,
                    payload: OutboundChunks::Single(&plain),
                };
                encrypter.encrypt(message, number)
            })
            .collect::<std::result::Result<Vec<_>, _>>()?;
        encryption += thread_time() - start;
        let mut bytes: Vec<_> = records
            .into_iter()
            .map(|record| record.encode()[HEADER..].to_vec())
            .collect();
        let start = thread_time();
        for (number, bytes) in (0..).zip(&mut bytes) {
            let message = InboundOpaqueMessage::new(
                ContentType::ApplicationData,
                ProtocolVersion::TLSv1_2,
                bytes,
            );
            decrypter.decrypt(message, number)?;
        }
        decryption += thread_time() - start;
    }
    let octets = RECORD as f64 * RECORDS as f64 * f64::from(REPETITIONS);
    let per_gib = |time: Duration| time.as_secs_f64() * f64::from(1 << 30) / octets;
    Ok((per_gib(encryption), per_gib(decryption)))
}

/// Octets of a record's header (RFC 8446 section 5.1).
const HEADER: usize = 5;

/// Processor time of this thread.
#[expect(
    unsafe_code,
    reason = "nix's clocks need a feature that the program does not"
)]
fn thread_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec, which lives through the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(
        time.tv_sec.try_into().unwrap_or_default(),
        time.tv_nsec.try_into().unwrap_or_default(),
    )
}
