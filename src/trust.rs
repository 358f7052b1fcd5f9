//! Whose client certificates are accepted: the files, read while there are privileges and parsed where there are none.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::server::danger::ClientCertVerifier;

use crate::cli::ClientAuth;
use crate::error::Error;
use crate::files::{FILE_LIMIT, Place, any_mode, read};
use crate::tls::{self, ClientDemand, TrustFile};

/// `--client-ca` and `--client-crl`, unparsed.
#[derive(Debug)]
pub(crate) struct Trust {
    authorities: (PathBuf, Vec<u8>),
    demand: ClientDemand,
    revocations: Vec<(PathBuf, Vec<u8>)>,
}

/// Revocation lists of large authorities have megabytes, which each connection pays for.
const REVOCATION_LIMIT: u64 = 8 << 20;

impl Trust {
    /// Reads the files.
    ///
    /// # Errors
    /// `Setup`, naming file and option.
    pub(crate) fn read(options: &ClientAuth) -> Result<Self, Error> {
        let read = |path: &PathBuf, what, option, limit| {
            let place = Place::new(what, path, option);
            Ok((path.clone(), read(path, &place, limit, any_mode)?))
        };
        let revocations = options.revocations.iter();
        Ok(Self {
            authorities: read(
                &options.authorities,
                "certificate authorities",
                "--client-ca",
                FILE_LIMIT,
            )?,
            demand: options.demand,
            revocations: revocations
                .map(|path| read(path, "revocation list", "--client-crl", REVOCATION_LIMIT))
                .collect::<Result<_, _>>()?,
        })
    }

    /// What tickets are bound to: no session outlives the trust under which it was made.
    pub(crate) fn binding(&self) -> [u8; 32] {
        tls::client_auth_binding(file(&self.authorities), &self.revocations(), self.demand)
    }

    /// Parses the files.
    ///
    /// # Errors
    /// `Setup`, naming file and option.
    pub(crate) fn verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, Error> {
        tls::client_verifier(file(&self.authorities), &self.revocations(), self.demand)
    }

    fn revocations(&self) -> Vec<TrustFile<'_>> {
        self.revocations.iter().map(file).collect()
    }
}

fn file((path, bytes): &(PathBuf, Vec<u8>)) -> TrustFile<'_> {
    TrustFile { path, bytes }
}
