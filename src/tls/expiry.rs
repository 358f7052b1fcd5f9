//! How long a client's certificate is good, so that its session's tickets are good no longer.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, Error, SignatureScheme};

use super::now;

/// Until when the client's certificate is good, in seconds since 1970; for ever where there is none.
///
/// The library keeps the certificate in the ticket, and examines it no more. So the date goes there with it: with a certificate
/// that has run out, a ticket is no ticket, and the full handshake says why or takes the new one.
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

    pub(super) fn seal(&self, session: &[u8]) -> Vec<u8> {
        let seconds = self.0.load(Ordering::Relaxed);
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

/// A verifier that does what another does, and notes down the date.
#[derive(Debug)]
pub(super) struct Noting {
    pub(super) expiry: Arc<Expiry>,
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for Noting {
    fn client_auth_mandatory(&self) -> bool {
        self.verifier.client_auth_mandatory()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        issuers: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verifier.verify_client_cert(own, issuers, now)?;
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
        self.verifier
            .verify_tls12_signature(message, own, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier
            .verify_tls13_signature(message, own, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_ends_with_the_certificate() {
        let made = Expiry::default();
        assert_eq!(
            Expiry::default().open(&made.seal(b"session")).as_deref(),
            Some(b"session".as_slice())
        );
        made.set(now() + 60);
        let resumed = Expiry::default();
        let sealed = made.seal(b"session");
        assert_eq!(
            resumed.open(&sealed).as_deref(),
            Some(b"session".as_slice())
        );
        // The next ticket is of the same certificate.
        assert_eq!(resumed.seal(b"session"), sealed);
        made.set(now() - 1);
        assert_eq!(Expiry::default().open(&made.seal(b"session")), None);
        assert_eq!(Expiry::default().open(b"short"), None);
    }
}
