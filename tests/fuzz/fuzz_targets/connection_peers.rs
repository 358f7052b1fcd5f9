//! The other ends of the relay: sockets that never wait, and a client that can speak TLS.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme,
    SupportedProtocolVersion,
};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

/// One end of a socket, with what is to be sent on it and what has come.
pub struct Peer {
    stream: Option<UnixStream>,
    pub outbox: Vec<u8>,
    pub inbox: Vec<u8>,
    /// Nothing is to be added to the outbox; when it is empty, the end is sent.
    pub is_finished: bool,
    is_shut: bool,
    /// It reads only when it is told to.
    pub is_lazy: bool,
    /// An end of file or an error was read.
    pub has_ended: bool,
}

impl Peer {
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream: Some(stream),
            outbox: Vec::new(),
            inbox: Vec::new(),
            is_finished: false,
            is_shut: false,
            is_lazy: false,
            has_ended: false,
        }
    }

    pub fn is_there(&self) -> bool {
        self.stream.is_some()
    }

    pub fn may_send(&self) -> bool {
        self.is_there() && !self.is_finished
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.outbox.extend_from_slice(bytes);
    }

    pub fn finish(&mut self) {
        self.is_finished = true;
        self.push();
    }

    pub fn leave(&mut self) {
        self.is_finished = true;
        self.stream = None;
        self.outbox.clear();
    }

    /// Writes what can be written; returns whether anything was.
    pub fn push(&mut self) -> bool {
        let Some(stream) = &mut self.stream else {
            return false;
        };
        let mut written = 0;
        while written < self.outbox.len() {
            match stream.write(&self.outbox[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // Nobody reads it any more.
                Err(_) => written = self.outbox.len(),
            }
        }
        self.outbox.drain(..written);
        if self.is_finished && self.outbox.is_empty() && !self.is_shut {
            self.is_shut = true;
            let _ = stream.shutdown(Shutdown::Write);
            return true;
        }
        written > 0
    }

    /// Reads at most so much; returns whether anything came.
    pub fn pull(&mut self, most: usize) -> bool {
        let before = self.inbox.len();
        let Some(stream) = &mut self.stream else {
            return false;
        };
        if self.has_ended {
            return false;
        }
        let mut buffer = [0; 16 * 1024];
        while self.inbox.len() - before < most {
            let room = buffer.len().min(most - (self.inbox.len() - before));
            match stream.read(&mut buffer[..room]) {
                Ok(0) => self.has_ended = true,
                Ok(count) => {
                    self.inbox.extend_from_slice(&buffer[..count]);
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => self.has_ended = true,
            }
            break;
        }
        self.inbox.len() > before || self.has_ended
    }
}

/// The mail program.
pub struct Client {
    pub peer: Peer,
    pub tls: Option<ClientConnection>,
    /// What it was told inside TLS.
    pub plaintext: Vec<u8>,
    pub has_close_notify: bool,
    /// It does not look at what comes inside TLS until it is told to.
    pub is_stepping: bool,
    /// It has sent octets that are no TLS of its own, and stops with it.
    pub is_poisoned: bool,
    is_tls12: bool,
    has_alpn: bool,
    /// How much of the inbox the TLS session has had.
    taken: usize,
}

impl Client {
    pub fn new(stream: UnixStream, is_tls12: bool, has_alpn: bool) -> Self {
        Self {
            peer: Peer::new(stream),
            tls: None,
            plaintext: Vec::new(),
            has_close_notify: false,
            is_stepping: false,
            is_poisoned: false,
            is_tls12,
            has_alpn,
            taken: 0,
        }
    }

    /// A new session, and its ClientHello.
    pub fn begin(&mut self) -> Vec<u8> {
        let name = ServerName::try_from("localhost").unwrap();
        let config = config(self.is_tls12, self.has_alpn);
        let mut tls = ClientConnection::new(config, name).unwrap();
        tls.set_buffer_limit(None);
        let mut hello = Vec::new();
        while tls.wants_write() {
            tls.write_tls(&mut hello).unwrap();
        }
        self.tls = Some(tls);
        hello
    }

    pub fn say_inside(&mut self, bytes: &[u8]) {
        if let Some(tls) = &mut self.tls {
            tls.writer().write_all(bytes).unwrap();
        }
    }

    pub fn notify_close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.send_close_notify();
            self.write_records();
        }
    }

    /// The handshake is over on this side.
    pub fn is_established(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| !tls.is_handshaking())
    }

    /// All that the server needs for TLS to stand has been sent.
    pub fn has_agreed(&self) -> bool {
        let agreed = |tls: &ClientConnection| {
            tls.negotiated_cipher_suite().is_some() && !(self.is_tls12 && tls.wants_write())
        };
        self.tls.as_ref().is_some_and(agreed)
    }

    pub fn has_unsent(&self) -> bool {
        !self.peer.outbox.is_empty()
    }

    fn write_records(&mut self) -> bool {
        let mut has_moved = false;
        if let Some(tls) = self.tls.as_mut().filter(|_| !self.is_poisoned) {
            while tls.wants_write() && !self.peer.is_finished {
                tls.write_tls(&mut self.peer.outbox).unwrap();
                has_moved = true;
            }
        }
        has_moved
    }

    pub fn write(&mut self) -> bool {
        let has_written = self.write_records();
        self.peer.push() || has_written
    }

    /// Reads what has come. `clear`: how much of it is before TLS, once that is known.
    pub fn read(&mut self, clear: Option<usize>) -> bool {
        let mut has_moved = !self.peer.is_lazy && self.peer.pull(usize::MAX);
        let (Some(tls), Some(clear)) = (&mut self.tls, clear) else {
            return has_moved;
        };
        if self.is_poisoned || self.is_stepping {
            return has_moved;
        }
        self.taken = self.taken.max(clear);
        let mut records = self.peer.inbox.get(self.taken..).unwrap_or_default();
        while !records.is_empty() {
            let count = tls.read_tls(&mut records).unwrap();
            if count == 0 {
                assert!(self.has_close_notify, "records that nobody takes");
                break;
            }
            self.taken += count;
            has_moved = true;
            let state = match tls.process_new_packets() {
                Ok(state) => state,
                Err(error) => panic!("the relay sent what is no TLS: {error}"),
            };
            let mut plaintext = vec![0; state.plaintext_bytes_to_read()];
            tls.reader().read_exact(&mut plaintext).unwrap();
            self.plaintext.extend(plaintext);
            self.has_close_notify |= state.peer_has_closed();
        }
        has_moved
    }
}

fn config(is_tls12: bool, has_alpn: bool) -> Arc<ClientConfig> {
    static CONFIGS: OnceLock<[Arc<ClientConfig>; 4]> = OnceLock::new();
    let configs = CONFIGS.get_or_init(|| {
        let make = |version, has_alpn: bool| {
            let mut provider = rustls::crypto::ring::default_provider();
            provider
                .kx_groups
                .retain(|group| group.name() == rustls::NamedGroup::X25519);
            let versions: [&'static SupportedProtocolVersion; 1] = [version];
            let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
                .with_protocol_versions(&versions)
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(Anybody))
                .with_no_client_auth();
            config.resumption = rustls::client::Resumption::disabled();
            if has_alpn {
                config.alpn_protocols = vec![b"imap".to_vec()];
            }
            Arc::new(config)
        };
        let (tls12, tls13) = (&rustls::version::TLS12, &rustls::version::TLS13);
        [
            make(tls13, false),
            make(tls13, true),
            make(tls12, false),
            make(tls12, true),
        ]
    });
    configs[2 * usize::from(is_tls12) + usize::from(has_alpn)].clone()
}

/// Whose certificate it is does not matter here.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256]
    }
}
