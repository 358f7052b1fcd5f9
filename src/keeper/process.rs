//! The keeper's own story: read the files, enter the sandbox, only then parse them, answer until end of file.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::socket::{MsgFlags, recv, send};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::{CertifiedKey, SigningKey};

use super::KeeperFiles;
use super::message::{
    Holding, INTRODUCTION_LIMIT, Introduction, REQUEST_LIMIT, Reply, SCHEMES, SignRequest,
};
use crate::error::{EXIT_SETUP, EXIT_TEMPORARY, Error, reason};
use crate::sandbox::{self, Plan, Role, Sandboxed};

/// How many signatures one handshake needs (RFC 8446 section 4.4.3, RFC 8422 section 5.4).
const SIGNATURES: usize = 1;
/// The largest file that is read: far beyond any certificate chain.
const FILE_LIMIT: u64 = 1 << 20;

/// The keeper's life; returns its exit status.
pub(super) fn run(socket: &OwnedFd, files: &KeeperFiles<'_>, plan: Plan) -> u8 {
    let held = read_files(files).and_then(|bytes| {
        let sandboxed = sandbox::enter(Role::Keeper, plan, &[socket.as_fd()])?;
        parse(&bytes, files, &sandboxed)
    });
    let (introduction, key) = match held {
        Ok((holding, key)) => (Introduction::Ready(holding), Some(key)),
        Err(error) => (Introduction::Fault(error.to_string()), None),
    };
    let message = introduction.encode();
    let is_sent = send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL).is_ok();
    match key {
        Some(key) if is_sent => answer(socket, &*key),
        Some(_) => EXIT_TEMPORARY,
        None => EXIT_SETUP,
    }
}

struct Bytes {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

fn read_files(files: &KeeperFiles<'_>) -> Result<Bytes, Error> {
    let certificate = read(files.certificate, "certificate", "--cert", |_| Ok(()))?;
    let key = read(files.key, "private key", "--key", check_mode)?;
    Ok(Bytes { certificate, key })
}

/// A key that everybody can read is no secret, and one that others can write is not ours.
fn check_mode(mode: u32) -> Result<(), String> {
    match mode {
        mode if mode & 0o007 != 0 => Err(format!(
            "it is open to everybody (mode {:04o}): chmod o= it",
            mode & 0o7777
        )),
        mode if mode & 0o020 != 0 => Err(format!(
            "its group can write to it (mode {:04o}): chmod g-w it",
            mode & 0o7777
        )),
        _ => Ok(()),
    }
}

fn read(
    path: &Path,
    what: &str,
    option: &str,
    check: fn(u32) -> Result<(), String>,
) -> Result<Vec<u8>, Error> {
    let fault = |why: String| {
        Error::setup(
            format!("cannot read {what} '{}' ({option})", path.display()),
            why,
        )
    };
    let file = File::open(path).map_err(|error| fault(reason(&error)))?;
    let metadata = file.metadata().map_err(|error| fault(reason(&error)))?;
    if !metadata.is_file() {
        return Err(fault("not a regular file".to_owned()));
    }
    check(metadata.mode()).map_err(fault)?;
    // One octet more than there should be, so that the end is seen without growing.
    let expected = metadata.len().min(FILE_LIMIT) + 1;
    let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or_default());
    file.take(FILE_LIMIT + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| fault(reason(&error)))?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(fault(format!("larger than {FILE_LIMIT} octets")));
    }
    Ok(bytes)
}

fn parse(
    bytes: &Bytes,
    files: &KeeperFiles<'_>,
    _: &Sandboxed,
) -> Result<(Holding, Arc<dyn SigningKey>), Error> {
    let chain = parse_chain(&bytes.certificate, files.certificate)?;
    let key = parse_key(&bytes.key, files.key)?;
    let fault = |why: &str| {
        Error::setup(
            format!(
                "private key '{}' (--key) does not go with certificate '{}' (--cert)",
                files.key.display(),
                files.certificate.display()
            ),
            why,
        )
    };
    match CertifiedKey::new(chain.clone(), key.clone()).keys_match() {
        Ok(()) => {}
        Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::KeyMismatch)) => {
            return Err(fault("the public keys differ"));
        }
        Err(error) => return Err(fault(&error.to_string())),
    }
    let schemes = SCHEMES
        .iter()
        .copied()
        .filter(|scheme| key.choose_scheme(&[*scheme]).is_some())
        .collect();
    let holding = Holding {
        chain: chain
            .iter()
            .map(|certificate| certificate.to_vec())
            .collect(),
        schemes,
    };
    Ok((holding, key))
}

fn parse_chain(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let fault = |why: String| {
        Error::setup(
            format!("cannot use certificate '{}' (--cert)", path.display()),
            why,
        )
    };
    let chain: Vec<_> = rustls_pemfile::certs(&mut &*pem)
        .collect::<Result<_, _>>()
        .map_err(|error| fault(format!("malformed PEM: {error}")))?;
    let Some(own) = chain.first() else {
        return Err(fault(
            "no certificate in PEM form (BEGIN CERTIFICATE) in it".to_owned(),
        ));
    };
    if chain
        .iter()
        .map(|certificate| certificate.len())
        .sum::<usize>()
        > INTRODUCTION_LIMIT / 2
    {
        return Err(fault("the chain is too long".to_owned()));
    }
    check_validity(own).map_err(fault)?;
    Ok(chain)
}

/// An expired certificate is refused by every client that looks; saying so in the log is kinder (DESIGN promise 5).
fn check_validity(certificate: &[u8]) -> Result<(), String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate)
        .map_err(|error| format!("malformed certificate: {error}"))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|_| "this machine's clock is before 1970")?;
    let now =
        i64::try_from(now.as_secs()).map_err(|_| "this machine's clock is beyond all dates")?;
    let validity = parsed.validity();
    if now > validity.not_after.timestamp() {
        return Err(format!("it expired on {}: renew it", validity.not_after));
    }
    if now < validity.not_before.timestamp() {
        return Err(format!(
            "it is not valid before {}: look at this machine's clock",
            validity.not_before
        ));
    }
    Ok(())
}

fn parse_key(pem: &[u8], path: &Path) -> Result<Arc<dyn SigningKey>, Error> {
    let fault = |why: String| {
        Error::setup(
            format!("cannot use private key '{}' (--key)", path.display()),
            why,
        )
    };
    let key: PrivateKeyDer<'static> = rustls_pemfile::private_key(&mut &*pem)
        .map_err(|error| fault(format!("malformed PEM: {error}")))?
        .ok_or_else(|| fault(describe_no_key(pem)))?;
    rustls::crypto::ring::sign::any_supported_type(&key).map_err(|_| {
        fault("neither an RSA (2048 bits or more), ECDSA P-256 or P-384 nor Ed25519 key".to_owned())
    })
}

fn describe_no_key(pem: &[u8]) -> String {
    let is_encrypted = pem.windows(9).any(|window| window == b"ENCRYPTED");
    if is_encrypted {
        "it is encrypted: imap-tls cannot ask for a passphrase, so store it in clear with mode 0600"
            .to_owned()
    } else {
        "no private key in PEM form (BEGIN PRIVATE KEY) in it".to_owned()
    }
}

/// Answers until the network process lets go. A request too many or of another form is refused, and ends the keeper:
/// the honest network process makes none.
fn answer(socket: &OwnedFd, key: &dyn SigningKey) -> u8 {
    let mut signatures = 0;
    // One octet more than the limit, so that a request over it is seen to be too long and not cut to fit.
    let mut buffer = [0; REQUEST_LIMIT + 1];
    loop {
        let bytes = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(0) => return 0,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => return EXIT_TEMPORARY,
        };
        let signature = (signatures < SIGNATURES)
            .then(|| sign(key, bytes))
            .flatten();
        signatures += 1;
        let reply = signature.as_deref().map_or(Reply::Refused, Reply::Signed);
        let is_sent = send(socket.as_raw_fd(), &reply.encode(), MsgFlags::MSG_NOSIGNAL).is_ok();
        if signature.is_none() || !is_sent {
            return EXIT_TEMPORARY;
        }
    }
}

fn sign(key: &dyn SigningKey, request: &[u8]) -> Option<Vec<u8>> {
    let SignRequest { scheme, message } = SignRequest::decode(request)?;
    key.choose_scheme(&[scheme])?.sign(message).ok()
}
