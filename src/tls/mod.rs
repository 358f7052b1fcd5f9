//! rustls configured for IMAP, and its unbuffered connection: bytes in, bytes out; no descriptors.

mod alert;
mod client_auth;
mod client_concerns;
mod client_identity;
mod engine;
mod expiry;
mod facts;
mod failure;
mod hello;
mod hybrid;
mod resolver;
mod tickets;

use std::fmt;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, OnceLock};

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::UnixTime;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoClientAuth, NoServerSessionStorage};
use rustls::{AlertDescription, Error, HandshakeKind, ServerConfig};

pub(crate) use client_auth::{
    Chain, ClientDemand, Examiner, TrustFile, Verifier, binding as client_auth_binding,
};
pub(crate) use client_concerns::Concern;
pub(crate) use client_identity::ClientIdentity;
pub(crate) use facts::{FACTS_LENGTH, Facts};
pub(crate) use hello::Start;
pub(crate) use resolver::{Certified, UnknownName};

use crate::buffer::Buffer;
use crate::clock;
use crate::host_name::HostName;
use engine::Engine;
use expiry::{Expiry, Noting};
use hello::HelloFacts;
use hello::OPENING_LENGTH;
use resolver::{Heard, Refusal, Resolver};
use tickets::Ticketer;

/// The protocol name that IANA registered for IMAP in TLS (RFC 7301, RFC 8437's registry).
const ALPN_IMAP: &[u8] = b"imap";

/// What TLS wants of the keeper, beside signatures, which are rustls's `SigningKey` to ask for.
pub(crate) trait AsksKeeper: fmt::Debug + Send + Sync {
    /// The certificate for a name, from the directory (`--cert-dir`).
    ///
    /// # Errors
    /// In words for the log, if there is one and it cannot be used.
    fn certificate(&self, name: &HostName) -> Result<Filed, String>;

    /// What is sealed in a client's ticket; `None` if it is none of ours, or too old.
    fn open(&self, name: Option<&HostName>, ticket: &[u8]) -> Option<Vec<u8>>;

    /// A ticket for the session.
    fn seal(&self, name: Option<&HostName>, session: &[u8]) -> Option<Vec<u8>>;
}

/// What the directory has for a name.
#[derive(Debug)]
pub(crate) enum Filed {
    Certificate(Certified),
    Nothing,
    /// The file of its domain cannot be read, in words for the log: maybe it was for this name, too.
    PassedOver(String),
}

/// The oldest version that is spoken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum OldestVersion {
    Tls12,
    Tls13,
}

/// What sessions are to be like.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) certificates: Vec<Certified>,
    /// Who examines client certificates, if they are asked for.
    pub(crate) client_auth: Option<Examiner>,
    pub(crate) has_directory: bool,
    pub(crate) keeper: Arc<dyn AsksKeeper>,
    pub(crate) oldest_version: OldestVersion,
    /// `None`: no session is resumed.
    pub(crate) tickets: Option<TicketLimits>,
    pub(crate) unknown_name: UnknownName,
}

/// How long tickets are good for, in seconds, and how many the keeper opens and seals for one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TicketLimits {
    pub(crate) lifetime: u32,
    pub(crate) opens: u8,
    pub(crate) seals: u8,
}

/// A session that resumes is as good as new and gives a ticket of its own, so one is enough; a client that wants another
/// number says so (RFC 9149).
const TICKETS: usize = 1;

/// ring, with the post-quantum hybrid beside its own groups: a recorded session should not be readable later. The library goes by the
/// client's order.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.kx_groups.insert(0, &hybrid::X25519MlKem768);
    provider
}

/// Seconds since 1970; where the clock cannot tell, so late that nothing is good any more.
fn now() -> i64 {
    clock::now().unwrap_or(i64::MAX)
}

/// Who examines client certificates, with what makes a verifier of the authorities that are good at a time, for a client's chain.
///
/// # Errors
/// Its own.
pub(crate) fn client_examiner(
    make: impl Fn(i64, Chain<'_>) -> Result<Verifier, crate::error::Error> + Send + Sync + 'static,
) -> Result<Examiner, crate::error::Error> {
    Examiner::new(make, now())
}

/// A verifier of client certificates for a time, and for a client's chain if one is known, with the same cryptography as all the rest.
///
/// # Errors
/// `Setup`, naming file and option.
pub(crate) fn client_verifier(
    authorities: TrustFile<'_>,
    revocations: &[TrustFile<'_>],
    demand: ClientDemand,
    now: i64,
    chain: Chain<'_>,
) -> Result<Verifier, crate::error::Error> {
    let provider = Arc::new(provider());
    client_auth::verifier(authorities, revocations, demand, &provider, now, chain)
}

/// What is wrong with files that client certificates can be examined with.
pub(crate) fn client_concerns(
    authorities: TrustFile<'_>,
    revocations: &[TrustFile<'_>],
) -> Vec<Concern> {
    client_concerns::concerns(authorities, revocations, now())
}

/// Has the provider find out what the processor can do, which it does at the first digest and remembers across fork(2).
pub(crate) fn examine_processor() {
    if let rustls::SupportedCipherSuite::Tls13(suite) = ring::cipher_suite::TLS13_AES_128_GCM_SHA256
    {
        suite.common.hash_provider.hash(&[]);
    }
}

/// How a session is served. Made once; under the listener each connection's process has it from before its fork, for the one
/// session that it serves. There is no randomness in it.
pub(crate) struct TlsServer {
    client_auth: Option<Arc<Noting>>,
    config: Arc<ServerConfig>,
    oldest_version: OldestVersion,
    resolver: Arc<Resolver>,
}

/// One TLS session with the client.
pub(crate) struct Tls {
    engine: Engine,
    /// `None` when it is over.
    handshake: Option<Handshake>,
    oldest_version: OldestVersion,
    /// The client's first octets, to tell what it speaks if that is not TLS.
    opening: Vec<u8>,
    /// The name that the client asked for, when the handshake is over.
    server_name: Option<String>,
}

/// What only the handshake needs: chains of certificates, and files of authorities and revocation lists, have kilobytes and more.
struct Handshake {
    client_auth: Option<Arc<Noting>>,
    resolver: Arc<Resolver>,
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

impl Handshake {
    /// What the ClientHello said, if there was one.
    fn heard(&self) -> Option<&HelloFacts> {
        self.resolver.heard.facts()
    }
}

impl TlsServer {
    /// With little to tune: TLS 1.2 and 1.3, ECDHE and AEAD only (RFC 9325).
    ///
    /// # Errors
    /// rustls's, if it cannot be set up so.
    pub(crate) fn new(settings: Settings) -> Result<Self, Error> {
        let heard = Arc::new(Heard::default());
        let resolver = Arc::new(Resolver {
            answer: OnceLock::new(),
            certificates: settings.certificates,
            has_directory: settings.has_directory,
            heard: heard.clone(),
            keeper: settings.keeper.clone(),
            passed_over: OnceLock::new(),
            unknown_name: settings.unknown_name,
        });
        let expiry = Arc::new(Expiry::default());
        let client_auth = settings.client_auth.map(|examiner| {
            let expiry = expiry.clone();
            Arc::new(Noting { examiner, expiry })
        });
        let versions: &[_] = match settings.oldest_version {
            OldestVersion::Tls12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
            OldestVersion::Tls13 => &[&rustls::version::TLS13],
        };
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
            .with_protocol_versions(versions)?
            .with_client_cert_verifier(match &client_auth {
                Some(verifier) => verifier.clone(),
                None => Arc::new(NoClientAuth),
            })
            .with_cert_resolver(resolver.clone());
        // Strict: a client that offers protocols and not this one is none of ours (the ALPACA attack).
        config.alpn_protocols = vec![ALPN_IMAP.to_vec()];
        // A process per connection has no memory of others: what is remembered travels in tickets.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        if let Some(limits) = settings.tickets {
            config.ticketer = Arc::new(Ticketer {
                expiry,
                heard,
                keeper: settings.keeper,
                lifetime: limits.lifetime,
                opens: AtomicU8::new(limits.opens),
                seals: AtomicU8::new(limits.seals),
            });
            config.send_tls13_tickets = TICKETS;
            config.max_tls13_tickets = usize::from(limits.seals);
        }
        Ok(Self {
            client_auth,
            config: Arc::new(config),
            oldest_version: settings.oldest_version,
            resolver,
        })
    }

    /// The session of this process, which expects a ClientHello. All that is random in it is drawn from now on.
    ///
    /// # Errors
    /// rustls's, if it cannot be set up so.
    pub(crate) fn session(&self) -> Result<Tls, Error> {
        Ok(Tls {
            engine: Engine::new(self.config.clone())?,
            handshake: Some(Handshake {
                client_auth: self.client_auth.clone(),
                resolver: self.resolver.clone(),
            }),
            oldest_version: self.oldest_version,
            opening: Vec::new(),
            server_name: None,
        })
    }
}

impl Tls {
    /// Where to read the next `size` octets from the client to; [`Tls::receive`] is told how many there were.
    pub(crate) fn room(&mut self, size: usize) -> &mut [u8] {
        self.engine.room(size)
    }

    /// Takes `count` octets that were read to where [`Tls::room`] said; what the client said is appended to `plaintext`, what
    /// has to be sent to it to `outgoing`.
    ///
    /// # Errors
    /// rustls's, when the client broke the protocol; the alert for it is in `outgoing` then, unless close_notify was.
    pub(crate) fn receive(
        &mut self,
        count: usize,
        plaintext: &mut Buffer,
        outgoing: &mut Buffer,
    ) -> Result<Progress, Error> {
        let missing = OPENING_LENGTH.saturating_sub(self.opening.len());
        if missing > 0 {
            self.opening
                .extend(self.engine.arrived(count).iter().take(missing));
        }
        let before = outgoing.len();
        let result = self.engine.receive(count, plaintext, outgoing);
        if let (Err(_), Some(refusal)) = (&result, self.refusal()) {
            // The library has one alert for all reasons not to show a certificate. Nothing is encrypted yet.
            outgoing.truncate(before);
            outgoing.extend(&clear_alert(refusal.alert()));
        }
        result
    }

    /// Encrypts for the client: appends records to `outgoing`.
    ///
    /// # Errors
    /// rustls's: before the handshake is over, after close_notify, or when the keys are worn out.
    pub(crate) fn send(&mut self, plaintext: &[u8], outgoing: &mut Buffer) -> Result<(), Error> {
        self.engine.send(plaintext, outgoing)
    }

    /// Ends our side: appends close_notify to `outgoing`. The client may go on until it ends its own.
    ///
    /// # Errors
    /// rustls's, before the handshake is over or after an alert.
    pub(crate) fn close(&mut self, outgoing: &mut Buffer) -> Result<(), Error> {
        self.engine.close(outgoing)
    }

    /// Gives memory back while no record is under way. Not after each: a buffer that is made anew for every read costs more
    /// than the cipher.
    pub(crate) fn give_back_memory(&mut self) {
        self.engine.give_back_memory();
    }

    /// Whether there is memory that could be given back.
    pub(crate) fn holds_memory(&self) -> bool {
        self.engine.holds_memory()
    }

    /// Examines the client's certificate again where a session was resumed: its ticket says that it was good then, and its
    /// issuer's may have expired since.
    ///
    /// # Errors
    /// rustls's, as in a full handshake.
    pub(crate) fn examine_client(&self) -> Result<(), Error> {
        let chain = self
            .engine
            .connection
            .peer_certificates()
            .unwrap_or_default();
        let handshake = self.handshake.as_ref();
        let client_auth = handshake.and_then(|handshake| handshake.client_auth.as_ref());
        match (client_auth, chain.split_first()) {
            (Some(verifier), Some((own, issuers))) if self.is_resumed() => verifier
                .verify_client_cert(own, issuers, UnixTime::now())
                .map(drop),
            _ => Ok(()),
        }
    }

    fn is_resumed(&self) -> bool {
        self.engine.connection.handshake_kind() == Some(HandshakeKind::Resumed)
    }

    /// What is known about the session once it is secure.
    pub(crate) fn facts(&self) -> Facts {
        let own = self
            .engine
            .connection
            .peer_certificates()
            .and_then(<[_]>::first);
        let facts = Facts::new(
            self.engine.connection.protocol_version(),
            self.engine
                .connection
                .negotiated_cipher_suite()
                .map(|suite| suite.suite()),
            self.engine
                .connection
                .negotiated_key_exchange_group()
                .map(|group| group.name()),
            self.server_name(),
        );
        facts
            .with_client(own.and_then(|own| ClientIdentity::from_der(own)))
            .with_resumption(self.is_resumed())
    }

    /// The protocol that was agreed on, if the client offered any.
    pub(crate) fn alpn(&self) -> Option<&[u8]> {
        self.engine.connection.alpn_protocol()
    }

    /// The name that the client asked for, even if the handshake failed.
    pub(crate) fn server_name(&self) -> Option<&str> {
        match &self.handshake {
            Some(handshake) => handshake.heard()?.server_name.as_deref(),
            None => self.server_name.as_deref(),
        }
    }

    /// Lets go of what only the handshake needs, once it is over and all is known that there is to know.
    pub(crate) fn end_handshake(&mut self) {
        self.server_name = self.server_name().map(str::to_owned);
        self.handshake = None;
    }

    fn refusal(&self) -> Option<&Refusal> {
        self.handshake.as_ref()?.resolver.refusal()
    }

    /// What is wrong with a file that might have had a certificate for the name, while the handshake is not forgotten.
    pub(crate) fn passed_over(&self) -> Option<&str> {
        let handshake = self.handshake.as_ref()?;
        handshake.resolver.passed_over.get().map(String::as_str)
    }

    /// What is wrong with a certificate of ours, if that is what the handshake failed of.
    pub(crate) fn fault(&self) -> Option<&str> {
        match self.refusal()? {
            Refusal::Fault(why) => Some(why),
            Refusal::Client(_) => None,
        }
    }

    /// Why the handshake failed, in an administrator's words. They may contain octets of the client's.
    pub(crate) fn explain(&self, error: &Error, start: Start) -> String {
        let handshake = self.handshake.as_ref();
        let heard = handshake.and_then(Handshake::heard);
        let mut hello = heard.cloned().unwrap_or_default();
        let certificates = handshake.map(|handshake| &handshake.resolver.certificates);
        hello.opening.clone_from(&self.opening);
        hello.is_without_alert = !self.engine.has_sent_alert();
        hello.is_tls13_only = self.oldest_version == OldestVersion::Tls13;
        hello.start = start;
        let certificates = certificates.into_iter().flatten();
        hello.certificates = certificates.filter_map(Certified::kind).collect();
        if let Some(Refusal::Client(why)) = self.refusal() {
            hello.refusal = Some(*why);
        }
        failure::explain(error, &hello)
    }
}

/// A fatal alert before encryption (RFC 8446 section 5.1): type 21, version, length, level, description.
fn clear_alert(description: AlertDescription) -> [u8; 7] {
    const FATAL: u8 = 2;
    [21, 3, 3, 0, 2, FATAL, description.into()]
}

/// For tests: one that has no certificates by name, and no ticket keys.
#[cfg(any(test, fuzzing))]
#[derive(Debug)]
pub(crate) struct NoKeeper;

#[cfg(any(test, fuzzing))]
impl AsksKeeper for NoKeeper {
    fn certificate(&self, _: &HostName) -> Result<Filed, String> {
        Ok(Filed::Nothing)
    }

    fn open(&self, _: Option<&HostName>, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn seal(&self, _: Option<&HostName>, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::sign::CertifiedKey;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};

    fn server() -> (Tls, CertificateDer<'static>) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivateKeyDer::from_pem_slice(made.key_pair.serialize_pem().as_bytes()).unwrap();
        let key = ring::sign::any_supported_type(&key).unwrap();
        let certificate = made.cert.der().clone();
        let certified = Certified {
            key: Arc::new(CertifiedKey::new(vec![certificate.clone()], key)),
            names: vec!["localhost".to_owned()],
            ocsp_end: 0,
        };
        let server = TlsServer::new(Settings {
            certificates: vec![certified],
            client_auth: None,
            has_directory: false,
            keeper: Arc::new(NoKeeper),
            oldest_version: OldestVersion::Tls12,
            tickets: None,
            unknown_name: UnknownName::Default,
        })
        .and_then(|server| server.session())
        .unwrap();
        (server, certificate)
    }

    fn receive(
        server: &mut Tls,
        records: &[u8],
        plaintext: &mut Buffer,
        outgoing: &mut Buffer,
    ) -> Result<Progress, Error> {
        server.room(records.len()).copy_from_slice(records);
        server.receive(records.len(), plaintext, outgoing)
    }

    /// It would be asked again and again as long as the client keeps the rest.
    #[test]
    fn a_record_under_way_is_no_memory_to_give_back() {
        let (mut server, _) = server();
        let (mut plaintext, mut outgoing) = (Buffer::default(), Buffer::default());
        receive(&mut server, b"\x15\x03", &mut plaintext, &mut outgoing).unwrap();
        assert!(!server.holds_memory());
        let rest = b"\x01\x00\x02\x02\x28";
        receive(&mut server, rest, &mut plaintext, &mut outgoing).unwrap_err();
        assert!(server.holds_memory());
    }

    /// A handshake of this version; the client, which has nothing more to read or write.
    fn shake_hands(
        server: &mut Tls,
        certificate: CertificateDer<'_>,
        version: &'static rustls::SupportedProtocolVersion,
    ) -> ClientConnection {
        let mut roots = RootCertStore::empty();
        roots.add(certificate.into_owned()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = "localhost".try_into().unwrap();
        let mut client = ClientConnection::new(Arc::new(config), name).unwrap();
        let (mut plaintext, mut outgoing) = (Buffer::default(), Buffer::default());
        while client.is_handshaking() || client.wants_write() {
            let mut records = Vec::new();
            client.write_tls(&mut records).unwrap();
            receive(server, &records, &mut plaintext, &mut outgoing).unwrap();
            client.read_tls(&mut outgoing.filled()).unwrap();
            outgoing.consume(usize::MAX);
            client.process_new_packets().unwrap();
        }
        client
    }

    #[test]
    fn nothing_comes_after_close_notify() {
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let (mut server, certificate) = server();
            let mut client = shake_hands(&mut server, certificate, version);
            let (mut plaintext, mut outgoing) = (Buffer::default(), Buffer::default());
            server.close(&mut outgoing).unwrap();
            client.read_tls(&mut outgoing.filled()).unwrap();
            assert!(client.process_new_packets().unwrap().peer_has_closed());
            outgoing.consume(usize::MAX);
            let broken = b"\x17\x03\x03\x00\x20 which nobody has encrypted so  ";
            assert!(receive(&mut server, broken, &mut plaintext, &mut outgoing).is_err());
            assert!(outgoing.is_empty(), "{version:?}: {:?}", outgoing.filled());
            assert!(plaintext.is_empty());
        }
    }

    #[test]
    fn what_only_the_handshake_needs_is_let_go_of_after_it() {
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            let (mut server, certificate) = server();
            let resolver = Arc::downgrade(&server.handshake.as_ref().unwrap().resolver);
            shake_hands(&mut server, certificate, version);
            server.end_handshake();
            // The library has none of it either.
            assert!(resolver.upgrade().is_none(), "{version:?}");
            assert_eq!(server.server_name(), Some("localhost"));
        }
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
            let (mut plaintext, mut outgoing) = (Buffer::default(), Buffer::default());
            let (mut server, _) = server();
            let result = receive(&mut server, garbage, &mut plaintext, &mut outgoing);
            assert!(result.is_err(), "{garbage:?}");
            assert!(plaintext.is_empty());
            // Nothing is done with a failed session, whatever comes.
            assert!(receive(&mut server, garbage, &mut plaintext, &mut outgoing).is_err());
            assert!(
                server.send(b"x", &mut outgoing).is_err() && server.close(&mut outgoing).is_err()
            );
        }
    }
}
