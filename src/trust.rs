//! Whose client certificates are accepted: the files, read while there are privileges and parsed where there are none.

use std::path::PathBuf;
use std::sync::Arc;

use crate::cli::Options;
use crate::error::Error;
use crate::files::{FILE_LIMIT, Place, any_mode, read};
use crate::tls::{self, ClientDemand, Concern, Examiner, TrustFile};

/// `--client-ca` and `--client-crl`, unparsed.
#[derive(Clone, Debug)]
pub(crate) struct Trust(Arc<Files>);

#[derive(Debug)]
struct Files {
    authorities: (PathBuf, Vec<u8>),
    demand: ClientDemand,
    revocations: Vec<(PathBuf, Vec<u8>)>,
}

/// The largest revocation list that is read. Those of large authorities have megabytes, which each connection pays for.
const REVOCATION_LIMIT: u64 = 8 << 20;
/// Which part of `--memory-limit` the revocation lists may have: parsing takes 15 times their size where their entries are short,
/// and whoever runs out of memory in the sandbox ends without a word.
const REVOCATION_SHARE: u64 = 32;

impl Trust {
    /// Reads the files, if clients are asked for certificates.
    ///
    /// # Errors
    /// `Setup`, naming file and option.
    pub(crate) fn read(options: &Options) -> Result<Option<Self>, Error> {
        let Some(client_auth) = &options.client_auth else {
            return Ok(None);
        };
        let read = |path: &PathBuf, what, option, limit| {
            let place = Place::new(what, path, option);
            Ok((path.clone(), read(path, &place, limit, any_mode)?))
        };
        let authorities = read(
            &client_auth.authorities,
            "certificate authorities",
            "--client-ca",
            FILE_LIMIT,
        )?;
        let revocations = client_auth.revocations.iter();
        let revocations = revocations
            .map(|path| read(path, "revocation list", "--client-crl", REVOCATION_LIMIT))
            .collect::<Result<Vec<_>, _>>()?;
        check_size(&revocations, options.common.memory_limit)?;
        Ok(Some(Self(Arc::new(Files {
            authorities,
            demand: client_auth.demand,
            revocations,
        }))))
    }

    /// What tickets are bound to: no session outlives the trust under which it was made.
    pub(crate) fn binding(&self) -> [u8; 32] {
        let files = &*self.0;
        tls::client_auth_binding(file(&files.authorities), &files.revocations(), files.demand)
    }

    /// Parses the files, which are kept to be parsed again when one of the authorities has expired, or two are of one name.
    ///
    /// # Errors
    /// `Setup`, naming file and option.
    pub(crate) fn examiner(&self) -> Result<Examiner, Error> {
        let files = self.0.clone();
        tls::client_examiner(move |now, chain| {
            let (authorities, revocations) = (file(&files.authorities), files.revocations());
            tls::client_verifier(authorities, &revocations, files.demand, now, chain)
        })
    }

    /// What is wrong with the files, though they can be used.
    pub(crate) fn concerns(&self) -> Vec<Concern> {
        tls::client_concerns(file(&self.0.authorities), &self.0.revocations())
    }
}

impl Files {
    fn revocations(&self) -> Vec<TrustFile<'_>> {
        self.revocations.iter().map(file).collect()
    }
}

/// Whether there is memory for the lists, all of them together.
fn check_size(revocations: &[(PathBuf, Vec<u8>)], memory_limit: u64) -> Result<(), Error> {
    let most = memory_limit / REVOCATION_SHARE;
    let mut size = 0;
    for (path, bytes) in revocations {
        size += bytes.len() as u64;
        if size > most {
            let path = path.display();
            return Err(Error::setup(
                format!("cannot use revocation list '{path}' (--client-crl)"),
                format!(
                    "it has {} octets, all lists up to it {size}, and they may have a {REVOCATION_SHARE}nd of --memory-limit, \
                     {most}: raise --memory-limit",
                    bytes.len()
                ),
            ));
        }
    }
    Ok(())
}

fn file((path, bytes): &(PathBuf, Vec<u8>)) -> TrustFile<'_> {
    TrustFile { path, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lists_together_have_a_share_of_the_memory() {
        let list = |name: &str, size| (PathBuf::from(name), vec![0; size]);
        let lists = [list("small", 1000), list("large", 2000)];
        assert!(check_size(&lists, 3000 * 32).is_ok());
        assert_eq!(
            check_size(&lists, 3000 * 32 - 1).unwrap_err().to_string(),
            "cannot use revocation list 'large' (--client-crl): it has 2000 octets, all lists up to it 3000, \
             and they may have a 32nd of --memory-limit, 2999: raise --memory-limit"
        );
    }
}
