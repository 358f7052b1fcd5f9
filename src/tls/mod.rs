//! rustls configured for IMAP, and its unbuffered connection: bytes in, bytes out; no descriptors.

#[allow(
    dead_code,
    reason = "failures are logged as the library words them, so far"
)]
mod alert;
#[allow(dead_code, reason = "client certificates are not asked for yet")]
mod client_auth;
#[allow(dead_code, reason = "client certificates are not asked for yet")]
mod client_identity;
#[allow(dead_code, reason = "client certificates are not asked for yet")]
mod facts;
#[allow(
    dead_code,
    reason = "failures are logged as the library words them, so far"
)]
mod failure;
#[allow(
    dead_code,
    reason = "failures are logged as the library words them, so far"
)]
mod hello;
mod hybrid;

use std::sync::{Arc, OnceLock};

use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{
    ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerConnectionData,
    UnbufferedServerConnection,
};
use rustls::sign::CertifiedKey;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{Error, ServerConfig};

pub(crate) use facts::{FACTS_LENGTH, Facts};

/// The protocol name that IANA registered for IMAP in TLS (RFC 7301, RFC 8437's registry).
const ALPN_IMAP: &[u8] = b"imap";

/// The one certificate, and a place for the name that the client asked for.
#[derive(Debug)]
struct Resolver {
    certified: Arc<CertifiedKey>,
    server_name: OnceLock<String>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(name) = hello.server_name() {
            let _ = self.server_name.set(name.to_ascii_lowercase());
        }
        Some(self.certified.clone())
    }
}

/// ring, with the post-quantum hybrid before its own groups: a recorded session should not be readable later.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.kx_groups.insert(0, &hybrid::X25519MlKem768);
    provider
}

/// One TLS session with the client.
pub(crate) struct Tls {
    connection: UnbufferedServerConnection,
    /// Records, or parts of one, not yet worked on.
    incoming: Vec<u8>,
    resolver: Arc<Resolver>,
    is_failed: bool,
    is_peer_closed: bool,
}

/// What has become of the session after more bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Progress {
    /// Not yet secure.
    Handshaking,
    /// Secure, and the client may still send.
    Open,
    /// The client sent close_notify: no more will come from it, but it can still be written to (RFC 8446 section 6.1).
    PeerClosed,
}

impl Tls {
    /// A session that expects a ClientHello, with nothing to tune: TLS 1.2 and 1.3, ECDHE and AEAD only (RFC 9325).
    ///
    /// # Errors
    /// rustls's, if the certificate cannot be used.
    pub(crate) fn new(certified: CertifiedKey) -> Result<Self, Error> {
        let resolver = Arc::new(Resolver {
            certified: Arc::new(certified),
            server_name: OnceLock::new(),
        });
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
            .with_no_client_auth()
            .with_cert_resolver(resolver.clone());
        // Strict: a client that offers protocols and not this one is none of ours (the ALPACA attack).
        config.alpn_protocols = vec![ALPN_IMAP.to_vec()];
        // A process per connection has no memory of others, so a ticket could never be redeemed.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let connection = UnbufferedServerConnection::new(Arc::new(config))?;
        Ok(Self {
            connection,
            incoming: Vec::new(),
            resolver,
            is_failed: false,
            is_peer_closed: false,
        })
    }

    /// Takes bytes from the client; what it said is appended to `plaintext`, what has to be sent to it to `outgoing`.
    ///
    /// # Errors
    /// rustls's, when the client broke the protocol; the alert for it is in `outgoing` then.
    pub(crate) fn receive(
        &mut self,
        bytes: &[u8],
        plaintext: &mut Vec<u8>,
        outgoing: &mut Vec<u8>,
    ) -> Result<Progress, Error> {
        self.incoming.extend_from_slice(bytes);
        self.work(plaintext, outgoing, |_, _| Ok(()))
    }

    /// Encrypts for the client: appends records to `outgoing`.
    ///
    /// # Errors
    /// rustls's: before the handshake is over, after close_notify, or when the keys are worn out.
    pub(crate) fn send(&mut self, plaintext: &[u8], outgoing: &mut Vec<u8>) -> Result<(), Error> {
        self.write(outgoing, |traffic, room| traffic.encrypt(plaintext, room))
    }

    /// Ends our side: appends close_notify to `outgoing`. The client may go on until it ends its own.
    ///
    /// # Errors
    /// rustls's, before the handshake is over or after an alert.
    pub(crate) fn close(&mut self, outgoing: &mut Vec<u8>) -> Result<(), Error> {
        self.write(outgoing, |traffic, room| traffic.queue_close_notify(room))
    }

    fn write(
        &mut self,
        outgoing: &mut Vec<u8>,
        mut encrypt: impl FnMut(&mut WriteTraffic<'_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), Error> {
        let mut plaintext = Vec::new();
        let mut is_written = false;
        self.work(&mut plaintext, outgoing, |mut traffic, outgoing| {
            is_written = true;
            append(outgoing, |room| match encrypt(&mut traffic, room) {
                Ok(count) => Ok(Ok(count)),
                Err(EncryptError::InsufficientSize(size)) => Ok(Err(size.required_size)),
                Err(error @ EncryptError::EncryptExhausted) => {
                    Err(Error::General(error.to_string()))
                }
            })
        })?;
        // `receive` leaves no complete record behind, so there is nothing to read here.
        if is_written && plaintext.is_empty() {
            Ok(())
        } else {
            Err(Error::HandshakeNotComplete)
        }
    }

    /// Drives the session as far as its input goes; where it can be written to, `write` does so.
    ///
    /// The library keeps places in `incoming` between calls, so it is always given the same bytes, less what it gave up.
    fn work(
        &mut self,
        plaintext: &mut Vec<u8>,
        outgoing: &mut Vec<u8>,
        mut write: impl FnMut(WriteTraffic<'_>, &mut Vec<u8>) -> Result<(), Error>,
    ) -> Result<Progress, Error> {
        if self.is_failed {
            return Err(Error::General("the TLS session has failed".to_owned()));
        }
        let mut used = 0;
        let result = loop {
            let rest = self.incoming.get_mut(used..).unwrap_or_default();
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(rest);
            let step = match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
                    match traffic.next_record() {
                        Some(Ok(record)) => {
                            discard += record.discard;
                            plaintext.extend_from_slice(record.payload);
                        }
                        Some(Err(error)) => break Err(error),
                        None => break Ok(None),
                    }
                },
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, outgoing).map(|()| None),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Ok(None)
                }
                Ok(ConnectionState::PeerClosed) => {
                    self.is_peer_closed = true;
                    Ok(None)
                }
                Ok(ConnectionState::Closed) => Ok(Some(Progress::PeerClosed)),
                Ok(ConnectionState::BlockedHandshake) => Ok(Some(Progress::Handshaking)),
                Ok(ConnectionState::WriteTraffic(traffic)) => write(traffic, outgoing)
                    // After the client's close_notify nothing that it sends counts (RFC 8446 section 6.1).
                    .map(|()| {
                        Some(if self.is_peer_closed {
                            Progress::PeerClosed
                        } else {
                            Progress::Open
                        })
                    }),
                // 0-RTT is never offered, and the library may grow states.
                Ok(_) => Err(Error::General(
                    "unexpected state of the TLS session".to_owned(),
                )),
                Err(error) => Err(error),
            };
            used += discard;
            match step {
                Ok(None) => {}
                Ok(Some(progress)) => break Ok(progress),
                Err(error) => break Err(error),
            }
        };
        if result.is_err() {
            self.is_failed = true;
            // What is left of the session is the alert that tells the client; there may be none.
            let _ = self.encode_alert(outgoing);
        }
        self.incoming.drain(..used.min(self.incoming.len()));
        if self.is_peer_closed {
            self.incoming.clear();
        }
        result
    }

    /// After a fault: what is still to be sent, the alert last. The session reads nothing any more; where it has something to
    /// send it says so before it looks at its input.
    fn encode_alert(&mut self, outgoing: &mut Vec<u8>) -> Result<(), Error> {
        while self.connection.wants_write() {
            match self
                .connection
                .process_tls_records(&mut self.incoming)
                .state?
            {
                ConnectionState::EncodeTlsData(data) => encode(data, outgoing)?,
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Gives memory back while no record is under way. Not after each: a buffer that is made anew for every read costs more
    /// than the cipher.
    pub(crate) fn give_back_memory(&mut self) {
        if self.incoming.is_empty() {
            self.incoming = Vec::new();
        }
    }

    /// What is known about the session once it is secure.
    pub(crate) fn facts(&self) -> Facts {
        Facts::new(
            self.connection.protocol_version(),
            self.connection
                .negotiated_cipher_suite()
                .map(|suite| suite.suite()),
            self.connection
                .negotiated_key_exchange_group()
                .map(|group| group.name()),
            self.resolver.server_name.get().map(String::as_str),
        )
    }

    /// The name that the client asked for, even if the handshake failed.
    pub(crate) fn server_name(&self) -> Option<&str> {
        self.resolver.server_name.get().map(String::as_str)
    }
}

type WriteTraffic<'a> = rustls::unbuffered::WriteTraffic<'a, ServerConnectionData>;
type EncodeTlsData<'a> = rustls::unbuffered::EncodeTlsData<'a, ServerConnectionData>;

fn encode(mut data: EncodeTlsData<'_>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    append(outgoing, |room| match data.encode(room) {
        Ok(count) => Ok(Ok(count)),
        Err(EncodeError::InsufficientSize(size)) => Ok(Err(size.required_size)),
        Err(error @ EncodeError::AlreadyEncoded) => Err(Error::General(error.to_string())),
    })
}

/// Appends to `outgoing` what `encode` writes, asking it first how much room it needs.
fn append(
    outgoing: &mut Vec<u8>,
    mut encode: impl FnMut(&mut [u8]) -> Result<Result<usize, usize>, Error>,
) -> Result<(), Error> {
    let start = outgoing.len();
    let mut room = 0;
    loop {
        outgoing.resize(start + room, 0);
        match encode(outgoing.get_mut(start..).unwrap_or_default())? {
            Ok(count) => {
                outgoing.truncate(start + count);
                return Ok(());
            }
            Err(required) if required > room => room = required,
            Err(_) => {
                return Err(Error::General(
                    "the TLS library asks for no more room than it has".to_owned(),
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};

    fn server() -> Tls {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::from_pem_slice(made.key_pair.serialize_pem().as_bytes()).unwrap();
        let key = ring::sign::any_supported_type(&key).unwrap();
        let chain = vec![CertificateDer::from(made.cert.der().to_vec())];
        Tls::new(CertifiedKey::new(chain, key)).unwrap()
    }

    #[test]
    fn what_is_no_client_hello_gets_an_alert() {
        for garbage in [
            b"XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX\r\n".as_slice(),
            b"a LOGIN u p\r\n",
            &[0; 100],
            &[0x16; 100],
            &[0xff; 100],
            b"\x16\x03\x01\x00\x05hello",
            b"\x15\x03\x01\x00\x02\x02\x28",
            b"\x17\x03\x03\x00\x05hello",
            b"\x14\x03\x03\x00\x01\x01",
        ] {
            let (mut plaintext, mut outgoing) = (Vec::new(), Vec::new());
            let mut server = server();
            let result = server.receive(garbage, &mut plaintext, &mut outgoing);
            assert!(result.is_err(), "{garbage:?}");
            assert!(plaintext.is_empty());
            // Nothing is done with a failed session, whatever comes.
            assert!(
                server
                    .receive(garbage, &mut plaintext, &mut outgoing)
                    .is_err()
            );
            assert!(
                server.send(b"x", &mut outgoing).is_err() && server.close(&mut outgoing).is_err()
            );
        }
    }
}
