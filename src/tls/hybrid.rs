//! X25519MLKEM768 for ring, which has no ML-KEM: the group of draft-ietf-tls-ecdhe-mlkem, from rustls's X25519 and libcrux.

use libcrux_ml_kem::mlkem768;
use rustls::crypto::ring::kx_group::X25519;
use rustls::crypto::{ActiveKeyExchange, CompletedKeyExchange, SharedSecret, SupportedKxGroup};
use rustls::ffdhe_groups::FfdheGroup;
use rustls::{Error, NamedGroup, PeerMisbehaved, ProtocolVersion};

/// The server's side of the hybrid group. (A client would generate ML-KEM keys; this program is never one.)
#[derive(Debug)]
pub(super) struct X25519MlKem768;

/// Octets of an ML-KEM-768 encapsulation key (FIPS 203, table 3), which comes first in the client's share.
const ENCAPSULATION_KEY: usize = 1184;
/// Octets of randomness that encapsulation takes (FIPS 203, algorithm 20).
const ENCAPSULATION_SEED: usize = 32;

impl SupportedKxGroup for X25519MlKem768 {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        // rustls's servers call `start_and_complete` only: a key encapsulation needs the client's share first.
        Err(Error::General(
            "X25519MLKEM768 is for servers here".to_owned(),
        ))
    }

    fn start_and_complete(&self, client_share: &[u8]) -> Result<CompletedKeyExchange, Error> {
        const INVALID: Error = Error::PeerMisbehaved(PeerMisbehaved::InvalidKeyShare);
        let (key, classical) = client_share
            .split_first_chunk::<ENCAPSULATION_KEY>()
            .ok_or(INVALID)?;
        let key = mlkem768::MlKem768PublicKey::from(key);
        // FIPS 203 section 7.2: the modulus check that an encapsulation key must pass.
        if !mlkem768::validate_public_key(&key) {
            return Err(INVALID);
        }
        let classical = X25519.start_and_complete(classical)?;
        let (ciphertext, secret) = mlkem768::encapsulate(&key, seed()?);
        Ok(CompletedKeyExchange {
            group: self.name(),
            pub_key: [ciphertext.as_slice(), classical.pub_key.as_slice()].concat(),
            secret: SharedSecret::from(
                [secret.as_slice(), classical.secret.secret_bytes()].concat(),
            ),
        })
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }

    fn usable_for_version(&self, version: ProtocolVersion) -> bool {
        version == ProtocolVersion::TLSv1_3
    }
}

fn seed() -> Result<[u8; ENCAPSULATION_SEED], Error> {
    let mut seed = [0; ENCAPSULATION_SEED];
    rustls::crypto::ring::default_provider()
        .secure_random
        .fill(&mut seed)?;
    Ok(seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_agree_on_the_secret() {
        let pair = mlkem768::generate_key_pair([7; 64]);
        let classical = X25519.start().unwrap();
        let share = [pair.public_key().as_slice(), classical.pub_key()].concat();
        let completed = X25519MlKem768.start_and_complete(&share).unwrap();
        let (ciphertext, server_classical) = completed.pub_key.split_at(1088);
        let post_quantum =
            mlkem768::decapsulate(pair.private_key(), &ciphertext.try_into().unwrap());
        let classical = classical.complete(server_classical).unwrap();
        let expected = [post_quantum.as_slice(), classical.secret_bytes()].concat();
        assert_eq!(completed.secret.secret_bytes(), expected);
    }

    #[test]
    fn a_malformed_share_is_the_clients_fault() {
        let valid = mlkem768::generate_key_pair([7; 64]);
        let valid = valid.public_key().as_slice().as_slice();
        let out_of_range = [0xff; ENCAPSULATION_KEY];
        for (key, point) in [
            (valid, [9; 31].as_slice()),
            (valid, &[0; 32]),
            (&out_of_range, &[9; 32]),
            (&[], &[]),
        ] {
            let share = [key, point].concat();
            let Err(error) = X25519MlKem768.start_and_complete(&share) else {
                panic!("a key exchange with a malformed share");
            };
            assert!(matches!(error, Error::PeerMisbehaved(_)), "{error}");
        }
    }
}
