//! The keeper: the one process that holds the private key. Started and asked from here.
//!
//! ```text
//! network process                         keeper
//!   |  <-- introduction: chain, schemes --  reads key and certificate with privilege, enters its sandbox, then parses them
//!   |  --- sign request (one) ----------->  refuses what is no TLS server's signature input
//!   |  <-- reply: signature --------------
//!   |  --- end of file ------------------>  ends
//! ```
//! The network process learns the certificate chain and one signature, never the key (DESIGN promise 2): it forks the keeper
//! before anybody reads the file, so not even a freed copy is in its memory.

pub mod message;
#[allow(dead_code, reason = "no option gives an OCSP response yet")]
mod ocsp;
mod process;
mod signer;
#[allow(dead_code, unused_imports, reason = "not asked yet")]
pub mod tickets;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::poll::PollFlags;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, setsockopt, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use rustls::sign::CertifiedKey;

use crate::channel::is_ready;
use crate::error::{Error, reason};
use crate::sandbox::Plan;
use crate::sys;
use message::{INTRODUCTION_LIMIT, Introduction};

/// The network process's side: the socket to the keeper, shared with the signer inside rustls.
#[derive(Debug)]
pub(crate) struct KeeperClient {
    socket: Arc<Mutex<Option<OwnedFd>>>,
}

/// Files that the keeper reads.
#[derive(Debug)]
pub(crate) struct KeeperFiles<'a> {
    pub(crate) certificate: &'a Path,
    pub(crate) key: &'a Path,
}

/// How long the network process waits for an answer, in seconds: a signature takes a thousandth of one, so a keeper that takes
/// longer was stopped.
const ANSWER_SECONDS: i64 = 10;

impl KeeperClient {
    /// Forks the keeper, which reads the files and confines itself.
    ///
    /// # Errors
    /// `System` if there is no process or socket to be had.
    pub(crate) fn start(files: &KeeperFiles<'_>, plan: Plan) -> Result<Self, Error> {
        let failed =
            |error: nix::Error| Error::system("cannot make the keeper's socket", error.desc());
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(failed)?;
        setsockopt(
            &ours,
            sockopt::ReceiveTimeout,
            &TimeVal::seconds(ANSWER_SECONDS),
        )
        .map_err(failed)?;
        sys::fork_into(|| process::run(&theirs, files, plan))
            .map_err(|error| Error::system("cannot start the keeper", reason(&error)))?;
        Ok(Self {
            socket: Arc::new(Mutex::new(Some(ours))),
        })
    }

    /// Waits for the keeper's first message: the certificate chain, with a key that asks the keeper for its signature.
    ///
    /// # Errors
    /// `Setup` with the keeper's own words if certificate or key are unusable, `System` if it is gone.
    pub(crate) fn introduction(&self) -> Result<CertifiedKey, Error> {
        let bytes = exchange(&self.socket, None, INTRODUCTION_LIMIT)
            .map_err(|error| Error::system("no answer from the keeper", reason(&error)))?;
        match Introduction::decode(&bytes) {
            Some(Introduction::Ready(holding)) if !holding.chain.is_empty() => {
                let chain = holding.chain.into_iter().map(Into::into).collect();
                Ok(CertifiedKey::new(
                    chain,
                    Arc::new(signer::KeeperKey::new(holding.schemes, self.socket.clone())),
                ))
            }
            Some(Introduction::Fault(text)) => Err(Error::Setup(text)),
            Some(Introduction::Ready(_)) | None => Err(Error::System(
                "the keeper ended before it was ready".to_owned(),
            )),
        }
    }

    /// The socket's number, to be kept open in the sandbox and watched for a keeper that died; `None` after release.
    pub(crate) fn with_descriptor<T>(&self, use_it: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        let socket = self.socket.lock().ok()?;
        socket.as_ref().map(|socket| use_it(socket.as_fd()))
    }

    /// Whether the keeper has closed its side: it ended, however that came about.
    pub(crate) fn is_gone(&self) -> bool {
        let is_closed =
            self.with_descriptor(|socket| is_ready(socket, PollFlags::empty()).unwrap_or(true));
        is_closed.unwrap_or(true)
    }

    /// Lets the keeper go: it ends at end of file.
    pub(crate) fn release(&self) {
        if let Ok(mut socket) = self.socket.lock() {
            *socket = None;
        }
    }
}

/// Sends a request, if there is one, and waits for one message of at most `limit` octets.
fn exchange(
    socket: &Mutex<Option<OwnedFd>>,
    request: Option<&[u8]>,
    limit: usize,
) -> std::io::Result<Vec<u8>> {
    let gone = || std::io::Error::from(nix::errno::Errno::EPIPE);
    let socket = socket.lock().map_err(|_| gone())?;
    let socket = socket.as_ref().ok_or_else(gone)?.as_raw_fd();
    if let Some(request) = request {
        nix::sys::socket::send(socket, request, MsgFlags::MSG_NOSIGNAL)?;
    }
    let mut buffer = vec![0; limit];
    loop {
        match nix::sys::socket::recv(socket, &mut buffer, MsgFlags::empty()) {
            Ok(0) => return Err(gone()),
            Ok(count) => {
                buffer.truncate(count);
                return Ok(buffer);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
