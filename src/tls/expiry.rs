//! How long a session may be resumed: no longer than its client's certificate is good, and than a ticket's lifetime from its full
//! handshake on.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::client_auth::Examiner;
use super::now;

/// Until when the session may be resumed, in seconds since 1970, as far as is known: the end of its client's certificate, or the
/// date in the ticket by which it was resumed.
///
/// The library keeps the certificate in the ticket, and examines it no more. So the date goes there with it: with a certificate
/// that has run out, a ticket is no ticket, and the full handshake says why or takes the new one. And tickets of one session,
/// each got by the one before, would go on for ever without it: nobody would prove again that he has the key, and in TLS 1.2
/// one secret would be sealed with each new ticket key.
#[derive(Debug)]
pub(super) struct Expiry(AtomicI64);

impl Default for Expiry {
    fn default() -> Self {
        Self(AtomicI64::new(i64::MAX))
    }
}

impl Expiry {
    fn set(&self, seconds: i64) {
        self.0.store(seconds, Ordering::Relaxed);
    }

    /// `lifetime` is that of a ticket, in seconds.
    pub(super) fn seal(&self, session: &[u8], lifetime: u32) -> Vec<u8> {
        let end = now().saturating_add(i64::from(lifetime));
        let seconds = self.0.load(Ordering::Relaxed).min(end);
        [&seconds.to_be_bytes(), session].concat()
    }

    /// The session, if it has not run out.
    pub(super) fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (seconds, session) = sealed.split_first_chunk::<8>()?;
        let seconds = i64::from_be_bytes(*seconds);
        (now() <= seconds).then(|| {
            self.set(seconds);
            session.to_vec()
        })
    }
}

/// A verifier that does what the examiner's do, and notes down the date.
#[derive(Debug)]
pub(super) struct Noting {
    pub(super) examiner: Examiner,
    pub(super) expiry: Arc<Expiry>,
}

impl ClientCertVerifier for Noting {
    fn client_auth_mandatory(&self) -> bool {
        self.examiner.timeless().client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.examiner.timeless().root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.examiner.examine(own, issuers, now)?;
        // One that cannot be read, though it was verified, makes no tickets.
        let end = x509_parser::parse_x509_certificate(own)
            .map_or(i64::MIN, |(_, own)| own.validity().not_after.timestamp());
        self.expiry.set(end);
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.examiner
            .timeless()
            .verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.examiner
            .timeless()
            .verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.examiner.timeless().supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_with_the_certificate() {
        let made = Expiry::default();
        let seal = |expiry: &Expiry| expiry.seal(b"session", 3600);
        assert_eq!(
            Expiry::default().open(&seal(&made)).as_deref(),
            Some(b"session".as_slice())
        );
        made.set(now() + 60);
        let resumed = Expiry::default();
        let sealed = seal(&made);
        assert_eq!(
            resumed.open(&sealed).as_deref(),
            Some(b"session".as_slice())
        );
        // The next ticket is of the same certificate.
        assert_eq!(seal(&resumed), sealed);
        made.set(now() - 1);
        assert_eq!(Expiry::default().open(&seal(&made)), None);
        assert_eq!(Expiry::default().open(b"short"), None);
    }

    #[test]
    fn a_session_that_was_resumed_ends_when_its_first_ticket_does() {
        let first = Expiry::default().seal(b"session", 60);
        let end = i64::from_be_bytes(*first.first_chunk().unwrap());
        assert!(end <= now() + 60);
        let resumed = Expiry::default();
        assert!(resumed.open(&first).is_some());
        assert_eq!(resumed.seal(b"session", 3600), first);
    }
}
