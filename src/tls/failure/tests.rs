//! Real handshakes that fail, and what is said about each.

use std::path::Path;
use std::sync::{Arc, Mutex};

use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, ring};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, DigitallySignedStruct, NamedGroup, OtherError,
    ServerConfig, ServerConnection, SignatureScheme, SupportedProtocolVersion, version,
};

use super::*;
use crate::tls::client_auth::{ClientDemand, TrustFile, verifier};
use crate::tls::hello::{OPENING_LENGTH, Start};

/// Gives its certificate or none, and keeps what it saw, as the program's own does.
#[derive(Debug)]
struct Resolver {
    certified: Arc<CertifiedKey>,
    refusal: Option<Refusal>,
    seen: Mutex<HelloFacts>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        *self.seen.lock().unwrap() = HelloFacts {
            refusal: self.refusal,
            ..HelloFacts::read(&hello)
        };
        self.refusal.is_none().then(|| self.certified.clone())
    }
}

/// A client that takes any certificate, or none for the reason given.
#[derive(Debug)]
struct Opinion {
    schemes: Vec<SignatureScheme>,
    verdict: Option<CertificateError>,
}

impl ServerCertVerifier for Opinion {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match &self.verdict {
            Some(error) => Err(error.clone().into()),
            None => Ok(ServerCertVerified::assertion()),
        }
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
        self.schemes.clone()
    }
}

type Versions = &'static [&'static SupportedProtocolVersion];
const BOTH: Versions = &[&version::TLS13, &version::TLS12];
const NEW: Versions = &[&version::TLS13];
const OLD: Versions = &[&version::TLS12];

/// Server and client, as different from the ordinary as a row of the table needs them.
struct Pair {
    ours: Versions,
    refusal: Option<Refusal>,
    demand: Option<ClientDemand>,
    theirs: Versions,
    provider: CryptoProvider,
    opinion: Opinion,
    protocols: Vec<Vec<u8>>,
    shows: Option<CertificateParams>,
    is_foreign: bool,
}

impl Pair {
    fn ordinary(versions: Versions) -> Self {
        let provider = aws_lc_rs::default_provider();
        Self {
            ours: BOTH,
            refusal: None,
            demand: None,
            theirs: versions,
            opinion: Opinion {
                schemes: provider
                    .signature_verification_algorithms
                    .supported_schemes(),
                verdict: None,
            },
            provider,
            protocols: Vec::new(),
            shows: None,
            is_foreign: false,
        }
    }
}

fn authority() -> (rcgen::Certificate, KeyPair) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap(), key)
}

fn server(pair: &Pair, trusted: &rcgen::Certificate) -> (Arc<Resolver>, ServerConnection) {
    let made = rcgen::generate_simple_self_signed(["mail.example".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.key_pair.serialize_der()).unwrap();
    let key = ring::sign::any_supported_type(&key).unwrap();
    let resolver = Arc::new(Resolver {
        certified: Arc::new(CertifiedKey::new(vec![made.cert.der().clone()], key)),
        refusal: pair.refusal,
        seen: Mutex::default(),
    });
    let provider = Arc::new(crate::tls::provider());
    let pem = trusted.pem();
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(pair.ours)
        .unwrap();
    let builder = match pair.demand {
        Some(demand) => {
            let authorities = TrustFile {
                path: Path::new("ca"),
                bytes: pem.as_bytes(),
            };
            let now = i64::try_from(UnixTime::now().as_secs()).unwrap();
            let verifier = verifier(authorities, &[], demand, &provider, now, &[]);
            builder.with_client_cert_verifier(verifier.unwrap().inner)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(resolver.clone());
    config.alpn_protocols = vec![b"imap".to_vec()];
    let connection = ServerConnection::new(Arc::new(config)).unwrap();
    (resolver, connection)
}

fn client(pair: Pair, issuer: &(rcgen::Certificate, KeyPair)) -> ClientConnection {
    let builder = ClientConfig::builder_with_provider(Arc::new(pair.provider))
        .with_protocol_versions(pair.theirs)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(pair.opinion));
    let mut config = match pair.shows {
        Some(params) => {
            let key = KeyPair::generate().unwrap();
            let certificate = params.signed_by(&key, &issuer.0, &issuer.1).unwrap();
            let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
            builder
                .with_client_auth_cert(vec![certificate.der().clone()], key)
                .unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = pair.protocols;
    let name = ServerName::try_from("mail.example").unwrap();
    ClientConnection::new(Arc::new(config), name).unwrap()
}

fn push(
    from: &mut Vec<u8>,
    to: &mut impl std::ops::DerefMut<Target = rustls::ConnectionCommon<impl rustls::SideData>>,
) -> Result<(), Error> {
    let mut rest = from.as_slice();
    while !rest.is_empty() {
        to.read_tls(&mut rest).unwrap();
        to.process_new_packets()?;
    }
    from.clear();
    Ok(())
}

/// The server's error in words. An alert that it sends is compared with the one that the words name.
fn outcome(pair: Pair) -> String {
    let (trusted, other) = (authority(), authority());
    let is_tls13_only = pair.ours.len() == 1;
    let (resolver, mut server) = server(&pair, &trusted.0);
    let issuer = if pair.is_foreign { &other } else { &trusted };
    let mut client = client(pair, issuer);
    let mut opening = Vec::new();
    let mut bytes = Vec::new();
    for _ in 0..10 {
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        if opening.is_empty() {
            opening.clone_from(&bytes);
        }
        let result = push(&mut bytes, &mut server);
        bytes.clear();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let received = push(&mut bytes, &mut client);
        bytes.clear();
        if let Err(error) = result {
            let facts = HelloFacts {
                opening,
                is_tls13_only,
                certificates: vec![KeyKind::Ecdsa],
                ..resolver.seen.lock().unwrap().clone()
            };
            check_sent_alert(&error, &facts, received);
            return explain(&error, &facts);
        }
    }
    panic!("the handshake did not fail");
}

fn check_sent_alert(error: &Error, facts: &HelloFacts, received: Result<(), Error>) {
    let sent = match received {
        Err(Error::AlertReceived(alert)) => Some(alert),
        _ => None,
    };
    // The library's alert for a client without a certificate is another one, which `Tls` replaces.
    let claimed = alert_sent(error, facts).filter(|_| facts.refusal.is_none());
    if let Some(claimed) = claimed {
        assert_eq!(Some(claimed), sent, "{error:?}");
    }
}

fn without_suites(pair: &mut Pair, unwanted: &str) {
    let suites = &mut pair.provider.cipher_suites;
    suites.retain(|suite| !format!("{:?}", suite.suite()).contains(unwanted));
    assert!(!suites.is_empty());
}

#[test]
fn failures_are_told_in_words() {
    let rsa = vec![
        SignatureScheme::RSA_PSS_SHA256,
        SignatureScheme::RSA_PKCS1_SHA256,
    ];
    let no_group = "the client offers no key exchange group that we have: X25519MLKEM768, X25519, secp256r1 or secp384r1; \
                    it offers secp521r1 (NoKxGroupsInCommon; alert sent: handshake_failure)";
    let add_rsa = "the client takes no ECDSA certificate, only RSA: add an RSA certificate with a second --cert and --key";
    let with = |versions, change: &dyn Fn(&mut Pair)| {
        let mut pair = Pair::ordinary(versions);
        change(&mut pair);
        pair
    };
    let shows = |change: &dyn Fn(&mut CertificateParams)| {
        let mut params = CertificateParams::default();
        change(&mut params);
        let mut pair = Pair::ordinary(NEW);
        pair.demand = Some(ClientDemand::Request);
        pair.shows = Some(params);
        pair
    };
    let refuses = |error| {
        with(BOTH, &|pair| {
            pair.opinion.verdict = Some(CertificateError::clone(&error))
        })
    };
    let table = [
        (
            with(OLD, &|pair| pair.ours = NEW),
            "the client does not offer TLS 1.3, and --min-tls 1.3 asks for it \
             (Tls12NotOfferedOrEnabled; alert sent: protocol_version)".to_owned(),
        ),
        (
            with(BOTH, &|pair| pair.opinion.schemes.clone_from(&rsa)),
            format!("{add_rsa} (NoSignatureSchemesInCommon; alert sent: handshake_failure)"),
        ),
        (
            with(OLD, &|pair| pair.opinion.schemes.clone_from(&rsa)),
            format!("{add_rsa} (NoSignatureSchemesInCommon; alert sent: handshake_failure)"),
        ),
        (
            with(OLD, &|pair| without_suites(pair, "_ECDSA_")),
            format!("{add_rsa} (NoCipherSuitesInCommon; alert sent: handshake_failure)"),
        ),
        (
            with(BOTH, &|pair| pair.opinion.schemes = vec![SignatureScheme::ECDSA_NISTP384_SHA384]),
            "the client takes no signature that an ECDSA certificate's key can make \
             (NoSignatureSchemesInCommon; alert sent: handshake_failure)".to_owned(),
        ),
        (
            with(NEW, &|pair| pair.provider.kx_groups = vec![&Secp521r1]),
            no_group.to_owned(),
        ),
        (
            with(OLD, &|pair| pair.provider.kx_groups = vec![&Secp521r1]),
            no_group.to_owned(),
        ),
        (
            with(BOTH, &|pair| pair.protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()]),
            "the client wants h2 or http/1.1, not imap (ALPN) \
             (NoApplicationProtocol; alert sent: no_application_protocol)".to_owned(),
        ),
        (
            with(BOTH, &|pair| pair.refusal = Some(Refusal::UnknownName)),
            "the client asks for 'mail.example', and there is no certificate for that name \
             (alert sent: unrecognized_name)".to_owned(),
        ),
        (
            with(BOTH, &|pair| pair.refusal = Some(Refusal::NoName)),
            "the client does not say which server it wants (SNI), and only known names are served \
             (alert sent: unrecognized_name)".to_owned(),
        ),
        (
            refuses(CertificateError::UnknownIssuer),
            "the client does not trust our certificate: it does not know the authority that issued it; \
             are the intermediate certificates in --cert? (alert received: unknown_ca)".to_owned(),
        ),
        (
            refuses(CertificateError::Expired),
            "the client holds our certificate for expired, or not valid yet: is its clock right? \
             (alert received: certificate_expired)".to_owned(),
        ),
        (
            refuses(CertificateError::NotValidForName),
            "the client does not accept our certificate: it may be for another name, or self-signed \
             (alert received: bad_certificate)".to_owned(),
        ),
        (
            with(NEW, &|pair| pair.demand = Some(ClientDemand::Require)),
            "the client shows no certificate, and --client-cert required asks for one \
             (NoCertificatesPresented; alert sent: certificate_required)".to_owned(),
        ),
        (
            with(OLD, &|pair| pair.demand = Some(ClientDemand::Require)),
            "the client shows no certificate, and --client-cert required asks for one \
             (NoCertificatesPresented; alert sent: certificate_required)".to_owned(),
        ),
        (
            shows(&|params| params.not_after = rcgen::date_time_ymd(2020, 2, 3)),
            "the client's certificate has expired: Feb  3 00:00:00 2020 +00:00 \
             (ExpiredContext; alert sent: certificate_expired)".to_owned(),
        ),
        (
            shows(&|params| params.not_before = rcgen::date_time_ymd(4000, 2, 3)),
            "the client's certificate is not valid before Feb  3 00:00:00 4000 +00:00 \
             (NotValidYetContext; alert sent: certificate_expired)".to_owned(),
        ),
        (
            shows(&|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
            "the client's certificate is not for clients (clientAuth is missing in its extendedKeyUsage) \
             (InvalidPurposeContext; alert sent: unsupported_certificate)".to_owned(),
        ),
        (
            Pair {
                is_foreign: true,
                ..shows(&|params| params.distinguished_name.push(rcgen::DnType::CommonName, "x"))
            },
            "the client's certificate does not go with its signature \
             (BadSignature; alert sent: decrypt_error)".to_owned(),
        ),
    ];
    for (pair, words) in table {
        assert_eq!(outcome(pair), words);
    }
}

/// A group that we do not have, in name only: its share is never looked at.
#[derive(Debug)]
struct Secp521r1;

impl rustls::crypto::SupportedKxGroup for Secp521r1 {
    fn start(&self) -> Result<Box<dyn rustls::crypto::ActiveKeyExchange>, Error> {
        Ok(Box::new(Self))
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

impl rustls::crypto::ActiveKeyExchange for Secp521r1 {
    fn complete(self: Box<Self>, _: &[u8]) -> Result<rustls::crypto::SharedSecret, Error> {
        Err(Error::General("no such group".to_owned()))
    }

    fn pub_key(&self) -> &[u8] {
        &[4; 133]
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::secp521r1
    }
}

/// A hello without extensions but these, in one record.
fn hello(version: u16, suites: &[CipherSuite], extensions: &[u8]) -> Vec<u8> {
    let length = |bytes: &[u8]| u16::try_from(bytes.len()).unwrap().to_be_bytes();
    let suites: Vec<u8> = suites
        .iter()
        .flat_map(|suite| u16::from(*suite).to_be_bytes())
        .collect();
    let mut body = version.to_be_bytes().to_vec();
    body.extend([7; 32]);
    body.push(0);
    body.extend(length(&suites));
    body.extend(suites);
    body.extend([1, 0]);
    if !extensions.is_empty() {
        body.extend(length(extensions));
        body.extend(extensions);
    }
    let mut message = vec![1, 0];
    message.extend(length(&body));
    message.extend(body);
    [&[22, 3, 1], length(&message).as_slice(), &message].concat()
}

/// As [`outcome`], for what no client of today sends.
fn outcome_of(bytes: &[u8]) -> String {
    outcome_after(Start::Implicit, bytes)
}

fn outcome_after(start: Start, bytes: &[u8]) -> String {
    let pair = Pair::ordinary(BOTH);
    let (resolver, mut server) = server(&pair, &authority().0);
    let error = push(&mut bytes.to_vec(), &mut server).unwrap_err();
    let mut outgoing = Vec::new();
    while server.wants_write() {
        server.write_tls(&mut outgoing).unwrap();
    }
    let facts = HelloFacts {
        opening: bytes.iter().copied().take(OPENING_LENGTH).collect(),
        start,
        certificates: vec![KeyKind::Ecdsa],
        ..resolver.seen.lock().unwrap().clone()
    };
    let sent = match outgoing.as_slice() {
        [21, 3, _, 0, 2, 2, alert] => Err(Error::AlertReceived((*alert).into())),
        _ => Ok(()),
    };
    check_sent_alert(&error, &facts, sent);
    explain(&error, &facts)
}

#[test]
fn clients_of_the_past_are_told_in_words() {
    let old_suites = [
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA,
        CipherSuite::TLS_RSA_WITH_AES_128_CBC_SHA,
    ];
    // signature_algorithms: ecdsa_secp256r1_sha256; supported_groups: x25519.
    let extensions = [0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 4, 0, 2, 0, 29];
    let no_list = "SignatureAlgorithmsExtensionRequired; alert sent: handshake_failure";
    for (bytes, words) in [
        (
            hello(0x0300, &old_suites, &[]),
            format!("the client offers SSL 3.0 at most, and 1.2 is the least ({no_list})"),
        ),
        (
            hello(0x0301, &old_suites, &[]),
            format!("the client offers TLS 1.0 at most, and 1.2 is the least ({no_list})"),
        ),
        (
            hello(0x0302, &old_suites, &[]),
            format!("the client offers TLS 1.1 at most, and 1.2 is the least ({no_list})"),
        ),
        (
            hello(0x0302, &old_suites, &extensions),
            "the client offers TLS 1.1 at most, and 1.2 is the least \
             (Tls12NotOffered; alert sent: protocol_version)".to_owned(),
        ),
        (
            // supported_versions: TLS 1.1 alone.
            hello(0x0303, &old_suites, &[&extensions[..], &[0, 43, 0, 3, 2, 3, 2]].concat()),
            "the client offers neither TLS 1.2 nor TLS 1.3 \
             (Tls12NotOfferedOrEnabled; alert sent: protocol_version)".to_owned(),
        ),
        (
            hello(0x0303, &old_suites, &[]),
            format!("the client names no signature algorithms, which stands for SHA-1: it is too old ({no_list})"),
        ),
        (
            hello(0x0303, &old_suites, &extensions),
            "the client offers no cipher suite that we have: ECDHE with AES-GCM or ChaCha20-Poly1305 \
             (NoCipherSuitesInCommon; alert sent: handshake_failure)".to_owned(),
        ),
        (
            b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10".to_vec(),
            "the client begins with a hello of SSL 2.0: it is too old \
             (InvalidContentType; alert sent: decode_error)".to_owned(),
        ),
        (
            b"\x15\x03\x01\x00\x02\x02\x30".to_vec(),
            "the client does not trust our certificate: it does not know the authority that issued it; \
             are the intermediate certificates in --cert? (alert received: unknown_ca)".to_owned(),
        ),
        (
            b"\x15\x03\x01\x00\x02\x02\xfe".to_vec(),
            "the client refused (alert received: 254)".to_owned(),
        ),
        (
            b"\x16\x03\x01\x00\x09\x01\x00\x00\x05hello".to_vec(),
            "the client's message is malformed or out of place \
             (MissingData; alert sent: decode_error)".to_owned(),
        ),
        (
            b"\x17\x03\x03\x00\x05hello".to_vec(),
            "the client's message is malformed or out of place \
             (InappropriateMessage; alert sent: unexpected_message)".to_owned(),
        ),
    ] {
        assert_eq!(outcome_of(&bytes), words);
    }
}

#[test]
fn what_is_no_tls_is_told_by_its_first_octets() {
    for (bytes, words) in [
        (
            b"a1 login user secret\r\n".as_slice(),
            "the client speaks IMAP in clear where TLS has to begin: its encryption setting does not go with the port",
        ),
        (b"GET / HTTP/1.1\r\n", "the client speaks HTTP, not TLS"),
        (
            b"EHLO client.example\r\n",
            "the client speaks SMTP, not TLS",
        ),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "the client speaks SSH, not TLS"),
        (
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
            "a PROXY header stands before the client's TLS: the balancer sends one that is not expected",
        ),
        (
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11",
            "a PROXY header stands before the client's TLS: the balancer sends one that is not expected",
        ),
        (
            b"hello there\r\n",
            "the client sends text in clear where TLS has to begin",
        ),
        (b"\xff\xf4\xff\xfd\x06", "the client does not speak TLS"),
    ] {
        let end = " (InvalidContentType; alert sent: decode_error)";
        assert_eq!(outcome_of(bytes), format!("{words}{end}"));
    }
}

#[test]
fn commands_behind_starttls_are_no_setting_of_the_client() {
    let outcome = |bytes: &[u8]| outcome_after(Start::StartTls, bytes);
    assert_eq!(
        outcome(b"b NOOP\r\n"),
        "IMAP commands follow STARTTLS in clear: the client did not wait for TLS, or somebody on the path put them there \
         (InvalidContentType; alert sent: decode_error)"
    );
    let others = [&b"GET / HTTP/1.1\r\n"[..], b"\r\n", b"\xff\xf4"];
    for bytes in others {
        assert_eq!(outcome(bytes), outcome_of(bytes));
    }
}

#[test]
fn what_the_keeper_or_the_resolver_says_is_passed_on() {
    let error = Error::General("the keeper refused to sign".to_owned());
    assert_eq!(
        explain(&error, &HelloFacts::default()),
        "the keeper refused to sign"
    );
    let long = explain(&Error::General("ä".repeat(1000)), &HelloFacts::default());
    assert!(
        long.len() <= TEXT_LIMIT + 3 && long.ends_with("ä..."),
        "{long}"
    );
}

#[test]
fn an_rsa_certificate_alone_asks_for_its_sister() {
    let facts = HelloFacts {
        certificates: vec![KeyKind::Rsa],
        takes: vec![KeyKind::Ecdsa, KeyKind::Ed25519],
        ..HelloFacts::default()
    };
    assert_eq!(
        explain(&PeerIncompatible::NoSignatureSchemesInCommon.into(), &facts),
        "the client takes no RSA certificate, only ECDSA or Ed25519: add an ECDSA certificate with a second --cert and \
         --key (NoSignatureSchemesInCommon; alert sent: handshake_failure)"
    );
}

#[test]
fn errors_of_certificates_that_are_hard_to_make_are_told() {
    let of_day =
        |day: u64| UnixTime::since_unix_epoch(std::time::Duration::from_secs(day * 86_400));
    for (error, words) in [
        (
            CertificateError::Revoked,
            "the client's certificate is revoked (Revoked; alert sent: certificate_revoked)",
        ),
        (
            CertificateError::UnknownIssuer,
            "the client's certificate is from no authority in --client-ca (UnknownIssuer; alert sent: unknown_ca)",
        ),
        (
            CertificateError::UnknownRevocationStatus,
            "the client's certificate or an authority's between is covered by no list in --client-crl \
             (UnknownRevocationStatus; alert sent: unknown_ca)",
        ),
        (
            CertificateError::ExpiredRevocationListContext {
                time: of_day(20_001),
                next_update: of_day(20_000),
            },
            "the client's certificate cannot be checked: --client-crl is out of date, a new list was due \
             Oct  4 00:00:00 2024 +00:00 (ExpiredRevocationListContext; alert sent: unknown_ca)",
        ),
        (
            CertificateError::Other(OtherError(Arc::from(Box::from(
                "SignatureAlgorithmMismatch",
            )))),
            "the client's certificate is not acceptable (SignatureAlgorithmMismatch; alert sent: certificate_unknown)",
        ),
    ] {
        assert_eq!(explain(&error.into(), &HelloFacts::default()), words);
    }
}
