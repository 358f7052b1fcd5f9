//! rustls's `SigningKey` and `Signer` that have no key, and the rest of what TLS wants of the keeper: all ask it.

use std::sync::Arc;

use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};

use super::Line;
use super::message::{Holding, Reply, Request};
use super::signing::SignRequest;
use super::tickets::{PLAINTEXT_LIMIT, TICKET_LIMIT};
use crate::host_name::HostName;
use crate::tls::{AsksKeeper, Certified, Filed};

/// What does not decode, or answers another question.
const NO_ANSWER: &str = "the keeper's answer is none";

/// The private key as the network process sees it: what it can sign with, and whom to ask.
#[derive(Debug)]
struct KeeperKey {
    certificate: u8,
    line: Line,
    schemes: Vec<SignatureScheme>,
}

/// A certificate that the keeper has shown, with a key that asks it.
pub(super) fn certified(holding: Holding, certificate: u8, line: &Line) -> Certified {
    let chain = holding.chain.into_iter().map(Into::into).collect();
    let key = Arc::new(KeeperKey {
        certificate,
        line: line.clone(),
        schemes: holding.schemes,
    });
    let mut certified = CertifiedKey::new(chain, key);
    certified.ocsp = Some(holding.ocsp).filter(|response| !response.is_empty());
    Certified {
        key: Arc::new(certified),
        names: holding.names,
        ocsp_end: holding.ocsp_end,
    }
}

impl SigningKey for KeeperKey {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        let scheme = self
            .schemes
            .iter()
            .copied()
            .find(|scheme| offered.contains(scheme))?;
        Some(Box::new(KeeperSigner {
            certificate: self.certificate,
            line: self.line.clone(),
            scheme,
        }))
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        match self.schemes.first() {
            Some(SignatureScheme::ED25519) => SignatureAlgorithm::ED25519,
            Some(
                SignatureScheme::ECDSA_NISTP256_SHA256 | SignatureScheme::ECDSA_NISTP384_SHA384,
            ) => SignatureAlgorithm::ECDSA,
            Some(_) => SignatureAlgorithm::RSA,
            None => SignatureAlgorithm::Anonymous,
        }
    }
}

/// One signature to be had from the keeper.
#[derive(Debug)]
struct KeeperSigner {
    certificate: u8,
    line: Line,
    scheme: SignatureScheme,
}

impl Signer for KeeperSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let request = SignRequest {
            certificate: self.certificate,
            scheme: self.scheme,
            message,
        };
        let reply = self
            .line
            .ask(&Request::Sign(request))
            .map_err(Error::General)?;
        match Reply::decode(&reply) {
            Some(Reply::Signed(signature)) => Ok(signature.to_vec()),
            Some(Reply::Refused) => {
                Err(Error::General(self.line.fail("the keeper refuses to sign")))
            }
            _ => Err(Error::General(self.line.fail(NO_ANSWER))),
        }
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}

/// Certificates by name, and tickets.
#[derive(Debug)]
pub(super) struct Asking {
    pub(super) line: Line,
    /// How many certificates the keeper has shown, which is the next one's place.
    pub(super) shown: u8,
}

impl AsksKeeper for Asking {
    fn certificate(&self, name: &HostName) -> Result<Filed, String> {
        let request = Request::Certificate(name.clone());
        let reply = self.line.ask(&request)?;
        match Reply::decode(&reply) {
            Some(Reply::Certificate(holding)) => {
                let certified = certified(holding, self.shown, &self.line);
                Ok(Filed::Certificate(certified))
            }
            Some(Reply::Nothing) => Ok(Filed::Nothing),
            Some(Reply::PassedOver(why)) => Ok(Filed::PassedOver(why)),
            Some(Reply::Fault(why)) => Err(why),
            _ => Err(self.line.fail(NO_ANSWER)),
        }
    }

    fn open(&self, name: Option<&HostName>, ticket: &[u8]) -> Option<Vec<u8>> {
        // Whatever its length, it is the client's to choose: the keeper ends at a request that is too long, and it has yet to sign.
        if ticket.len() > TICKET_LIMIT {
            return None;
        }
        let name = name.cloned();
        let reply = self.line.ask(&Request::Open { name, ticket }).ok()?;
        match Reply::decode(&reply)? {
            Reply::Opened(session) => Some(session.to_vec()),
            _ => None,
        }
    }

    fn seal(&self, name: Option<&HostName>, session: &[u8]) -> Option<Vec<u8>> {
        // A client's certificate chain may make it so long.
        if session.len() > PLAINTEXT_LIMIT {
            return None;
        }
        let name = name.cloned();
        let reply = self.line.ask(&Request::Seal { name, session }).ok()?;
        match Reply::decode(&reply)? {
            Reply::Sealed(ticket) => Some(ticket.to_vec()),
            _ => None,
        }
    }
}
