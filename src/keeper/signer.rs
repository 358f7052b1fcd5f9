//! rustls's `SigningKey` and `Signer` that have no key: they ask the keeper.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use rustls::sign::{Signer, SigningKey};
use rustls::{Error, SignatureAlgorithm, SignatureScheme};

use super::exchange;
use super::message::{REPLY_LIMIT, Reply, SignRequest};
use crate::error::reason;

type Socket = Arc<Mutex<Option<OwnedFd>>>;

/// The private key as the network process sees it: what it can sign with, and whom to ask.
#[derive(Debug)]
pub(super) struct KeeperKey {
    schemes: Vec<SignatureScheme>,
    socket: Socket,
}

impl KeeperKey {
    pub(super) fn new(schemes: Vec<SignatureScheme>, socket: Socket) -> Self {
        Self { schemes, socket }
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
            scheme,
            socket: self.socket.clone(),
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
    scheme: SignatureScheme,
    socket: Socket,
}

impl Signer for KeeperSigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        let request = SignRequest {
            scheme: self.scheme,
            message,
        }
        .encode();
        let reply = exchange(&self.socket, Some(&request), REPLY_LIMIT).map_err(|error| {
            Error::General(format!("no signature from the keeper: {}", reason(&error)))
        })?;
        match Reply::decode(&reply) {
            Some(Reply::Signed(signature)) => Ok(signature.to_vec()),
            Some(Reply::Refused) => Err(Error::General("the keeper refused to sign".to_owned())),
            None => Err(Error::General("the keeper's answer is none".to_owned())),
        }
    }

    fn scheme(&self) -> SignatureScheme {
        self.scheme
    }
}
