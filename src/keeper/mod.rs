//! The keeper: the one process that holds private keys and ticket keys. Started and asked from here.
//!
//! ```text
//! network process                         keeper                                    opener (--cert-dir only)
//!   |  <-- introduction: certificates ---  reads keys and certificates with
//!   |                                      privilege, enters its sandbox, then parses
//!   |  --- certificate for a name ------>  --- a name ----------------------------->  reads that name's files
//!   |  <-- reply: certificate ----------   <-- their bytes -------------------------
//!   |  --- open, seal, sign ------------>  refuses what is no TLS server's signature
//!   |  <-- reply: ticket, signature ----   input, and what is asked for too often
//!   |  --- end of file ----------------->  ends                                       ends
//! ```
//! The network process learns certificate chains, one signature and its own session's tickets, never a key (DESIGN promise 2): it
//! forks the keeper before anybody reads the files, so not even a freed copy is in its memory.

pub mod message;
pub mod ocsp;
mod opener;
mod process;
mod shared;
mod signer;
pub mod signing;
mod store;
pub mod tickets;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, UnixAddr, connect, getsockopt, send,
    setsockopt, shutdown, socket, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use nix::unistd::{Pid, geteuid};

pub(crate) use opener::{CHAIN_FILE, KEY_FILE, Lookups, Opener};

use crate::channel::is_ready;
use crate::error::{EXIT_TEMPORARY, Error, reason};
use crate::sandbox::Plan;
use crate::sys;
use crate::tls::{AsksKeeper, Certified};
use message::{INTRODUCTION_LIMIT, Introduction, Request};
use process::Audience;
use shared::Door;

/// A certificate chain and its key, as the options name them.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct CertificateFiles {
    pub(crate) certificate: PathBuf,
    /// `None`: it is in the certificate's file.
    pub(crate) key: Option<PathBuf>,
}

/// What the keeper reads, and what it is to know.
#[derive(Debug)]
pub(crate) struct KeeperFiles<'a> {
    /// What tickets are bound to: a session does not resume where other rules hold. `None`: whoever asks says it.
    pub(crate) binding: Option<&'a [u8]>,
    pub(crate) certificates: &'a [CertificateFiles],
    pub(crate) ocsp: &'a [PathBuf],
    /// For how many seconds ticket keys are to seal: until the files are read again.
    pub(crate) sealing: u64,
    pub(crate) ticket_keys: Option<&'a Path>,
}

/// The network process's side: the socket to the keeper, shared with what asks it inside rustls.
#[derive(Clone, Debug)]
pub(crate) struct KeeperClient {
    line: Line,
}

/// The side of a keeper that serves many connections, where it is the listener's or a service.
#[derive(Debug)]
pub(crate) struct SharedKeeper {
    /// What the network processes ask on, each once it has its own socket.
    pub(crate) client: KeeperClient,
    control: OwnedFd,
    pub(crate) process: Pid,
}

/// What a keeper has to offer.
#[derive(Debug)]
pub(crate) struct Offer {
    /// In the order of `--cert`.
    pub(crate) certificates: Vec<Certified>,
    /// Whether there are more by name.
    pub(crate) has_directory: bool,
    pub(crate) has_ticket_keys: bool,
    pub(crate) keeper: Arc<dyn AsksKeeper>,
    /// For the log.
    pub(crate) warnings: Vec<String>,
}

/// How many tickets of a client's are tried, and how many it is given. More would make each handshake dearer; a client that
/// wants more gets one with each session.
pub(crate) const OPENS: u8 = 4;
pub(crate) const SEALS: u8 = 4;
/// How many certificates there may be: their places are numbered in an octet, and the directory's comes on top.
pub(crate) const CERTIFICATES: usize = 16;

/// How long the network process waits for an answer, in seconds: a signature takes a thousandth of one, so a keeper that takes
/// longer was stopped.
const ANSWER_SECONDS: i64 = 10;
const ANSWER_TIME: Duration = Duration::from_secs(ANSWER_SECONDS.unsigned_abs());
/// A keeper that has less is not to blame for having no answer: the client has left it so little.
const FAIR_TIME: Duration = Duration::from_millis(500);

impl KeeperClient {
    /// Forks the keeper, which reads the files and confines itself.
    ///
    /// # Errors
    /// `System` if there is no process or socket to be had.
    pub(crate) fn start(
        files: &KeeperFiles<'_>,
        opener: Option<Opener>,
        plan: Plan,
    ) -> Result<Self, Error> {
        let (ours, theirs) = socket_pair(SockType::SeqPacket, ANSWER_SECONDS)?;
        start_process(|| process::run(&theirs, files, opener.as_ref(), plan, Audience::One))?;
        Ok(Self::with(ours))
    }

    /// Goes to the keeper service that listens at `path`, and says what its tickets are to be bound to. Nobody else's socket will do:
    /// whoever may have put it there is root, or whom we were started as.
    ///
    /// # Errors
    /// `System` if it is not there or does not let anybody in, `Setup` if it is a stranger, or that path can be no keeper's.
    pub(crate) fn connect(path: &Path, binding: &[u8]) -> Result<Self, Error> {
        let place = || format!("the keeper at '{}' (--keeper)", path.display());
        let failed = |error: nix::Error| {
            let hint = match error {
                Errno::ENOENT | Errno::ECONNREFUSED => {
                    ": is it running (imap-tls --keep, or imap-tls-keeper.socket)?"
                }
                Errno::EAGAIN => ": it does not keep up",
                _ => "",
            };
            let text = format!("cannot reach {}: {}{hint}", place(), error.desc());
            match error {
                // These do not pass by themselves.
                Errno::EACCES | Errno::ENAMETOOLONG | Errno::ENOTDIR | Errno::EPROTOTYPE => {
                    Error::Setup(text)
                }
                _ => Error::System(text),
            }
        };
        let address = UnixAddr::new(path).map_err(failed)?;
        let (kind, flags) = (SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
        let ours = socket(AddressFamily::Unix, kind, flags, None).map_err(failed)?;
        // Of connect(2), too, where many are waiting before us.
        setsockopt(
            &ours,
            sockopt::SendTimeout,
            &TimeVal::seconds(ANSWER_SECONDS),
        )
        .map_err(failed)?;
        be_patient(&ours, ANSWER_SECONDS).map_err(failed)?;
        sys::uninterrupted(|| connect(ours.as_raw_fd(), &address)).map_err(failed)?;
        let owner = getsockopt(&ours, sockopt::PeerCredentials)
            .map_err(failed)?
            .uid();
        if !is_trusted(owner) {
            return Err(Error::Setup(format!("{} {}", place(), distrust(owner))));
        }
        let begin = Request::Begin(binding).encode();
        sys::uninterrupted(|| send(ours.as_raw_fd(), &begin, MsgFlags::MSG_NOSIGNAL))
            .map_err(failed)?;
        Ok(Self::with(ours))
    }

    /// The side of a keeper that is at the other end of this socket.
    pub(crate) fn with(socket: OwnedFd) -> Self {
        Self {
            line: Line(Arc::new(Mutex::new(Way {
                socket: Some(socket),
                deadline: None,
                fault: None,
                is_late: false,
            }))),
        }
    }

    /// Takes the socket that [`SharedKeeper::admit`] made: what asks the keeper asks there from now on.
    pub(crate) fn adopt(&self, socket: OwnedFd) {
        if let Ok(mut way) = self.line.0.lock() {
            way.socket = Some(socket);
        }
    }

    /// Answers that come later than this are not waited for.
    pub(crate) fn expect_answers_until(&self, deadline: Instant) {
        if let Ok(mut way) = self.line.0.lock() {
            way.deadline = Some(deadline);
        }
    }

    /// Why the keeper is of no use any more, if that has shown.
    pub(crate) fn fault(&self) -> Option<String> {
        self.line.0.lock().ok()?.fault.clone()
    }

    /// Waits for the keeper's first message: the certificates, with keys that ask the keeper for its signature.
    ///
    /// # Errors
    /// `Setup` with the keeper's own words if a certificate or key is unusable, `System` if it is gone.
    pub(crate) fn introduction(&self) -> Result<Offer, Error> {
        self.offer(&self.first_message()?)
    }

    fn first_message(&self) -> Result<Vec<u8>, Error> {
        let received = self.line.receive();
        received.map_err(|error| Error::system("no answer from the keeper", reason(&error)))
    }

    fn offer(&self, first_message: &[u8]) -> Result<Offer, Error> {
        match Introduction::decode(first_message) {
            Some(Introduction::Ready(holdings)) => {
                let numbered = (0..).zip(holdings.certificates);
                let certificates: Vec<_> = numbered
                    .map(|(place, holding)| signer::certified(holding, place, &self.line))
                    .collect();
                let shown = u8::try_from(certificates.len()).unwrap_or(u8::MAX);
                Ok(Offer {
                    certificates,
                    has_directory: holdings.has_directory,
                    has_ticket_keys: holdings.has_ticket_keys,
                    keeper: Arc::new(signer::Asking {
                        line: self.line.clone(),
                        shown,
                    }),
                    warnings: holdings.warnings,
                })
            }
            Some(Introduction::Fault(text)) => Err(Error::Setup(text)),
            None => Err(Error::System(
                "the keeper ended before it was ready".to_owned(),
            )),
        }
    }

    /// The socket's number, to be kept open in the sandbox and watched for a keeper that died; `None` after release.
    pub(crate) fn with_descriptor<T>(&self, use_it: impl FnOnce(BorrowedFd<'_>) -> T) -> Option<T> {
        let way = self.line.0.lock().ok()?;
        way.socket.as_ref().map(|socket| use_it(socket.as_fd()))
    }

    /// Whether the keeper has closed its side: it ended, however that came about.
    pub(crate) fn is_gone(&self) -> bool {
        let is_closed =
            self.with_descriptor(|socket| is_ready(socket, PollFlags::empty()).unwrap_or(true));
        is_closed.unwrap_or(true)
    }

    /// Lets the keeper go: it ends at end of file.
    pub(crate) fn release(&self) {
        if let Ok(mut way) = self.line.0.lock() {
            way.socket = None;
        }
    }
}

impl SharedKeeper {
    /// Forks a keeper that serves all who are admitted or, as a service, come to a socket that is listened on; waits until it is
    /// ready. It ends when this is dropped and the last of them has let go.
    ///
    /// # Errors
    /// As [`KeeperClient::start`] and [`KeeperClient::introduction`].
    pub(crate) fn start(
        files: &KeeperFiles<'_>,
        opener: Option<Opener>,
        plan: Plan,
        listened_on: Option<BorrowedFd<'_>>,
    ) -> Result<(Self, Offer), Error> {
        let (ours, theirs) = socket_pair(SockType::SeqPacket, ANSWER_SECONDS)?;
        let process = start_process(|| {
            // It serves sessions to their end, also when the listener is told to end with all of its group, as by a terminal's Ctrl-C.
            sys::leave_process_group();
            match audience(listened_on, plan.limits.descriptors) {
                Ok(audience) => process::run(&theirs, files, opener.as_ref(), plan, audience),
                Err(_) => EXIT_TEMPORARY,
            }
        })?;
        // Else it would not be seen to end.
        drop(theirs);
        let client = KeeperClient::with(ours);
        let first_message = client.first_message().inspect_err(|_| {
            // It may wait for a file for ever, with copies of what it was forked with. It has not been reaped, so that it is this one.
            let _ = kill(process, Signal::SIGKILL);
        })?;
        let offer = client.offer(&first_message)?;
        let control = client.line.take()?;
        let keeper = Self {
            client,
            control,
            process,
        };
        Ok((keeper, offer))
    }

    /// Lets the keeper go, whoever has a copy of the way to it. Not for one whose way others have by right.
    pub(crate) fn let_go(self) {
        // It may have ended already.
        let _ = shutdown(self.control.as_raw_fd(), Shutdown::Both);
    }

    /// A socket for one more connection to ask on, for [`KeeperClient::adopt`].
    ///
    /// # Errors
    /// `System` if there is none to be had, or the keeper has ended or does not keep up.
    pub(crate) fn admit(&self) -> Result<OwnedFd, Error> {
        let (ours, theirs) = socket_pair(SockType::SeqPacket, ANSWER_SECONDS)?;
        shared::hand_over(self.control.as_fd(), &theirs).map_err(|error| {
            Error::system(
                "cannot introduce the connection to the keeper",
                error.desc(),
            )
        })?;
        Ok(ours)
    }
}

/// Whether a user may be the one who keeps our keys: whoever listens somewhere may be anybody.
pub(crate) fn is_trusted(owner: u32) -> bool {
    owner == 0 || owner == geteuid().as_raw()
}

/// What is wrong with any other.
pub(crate) fn distrust(owner: u32) -> String {
    format!("belongs to uid {owner}, who is not to be trusted with it: root has to start it")
}

/// Who is to be answered by a keeper with so many descriptors.
fn audience(listened_on: Option<BorrowedFd<'_>>, descriptors: u64) -> io::Result<Audience> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let Some(listened_on) = listened_on else {
        return Ok(Audience::Many(epoll));
    };
    let door = Door {
        most: room(descriptors),
        socket: sys::duplicate(listened_on)?,
    };
    Ok(Audience::Service(epoll, door))
}

/// What a keeper of many has open beside a socket for each connection, and for those of clients that are leaving.
const SPARE_DESCRIPTORS: u64 = 64;

/// How many descriptors a keeper of so many connections needs, or as many as the superserver allows at all.
pub(crate) fn descriptors(connections: usize) -> u64 {
    let most = getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(_, hard)| hard);
    most.min(connections as u64 + SPARE_DESCRIPTORS)
}

/// How many connections there is room for with so many descriptors.
pub(crate) fn room(descriptors: u64) -> usize {
    let most = descriptors.saturating_sub(SPARE_DESCRIPTORS).max(1);
    usize::try_from(most).unwrap_or(usize::MAX)
}

fn start_process(child: impl FnOnce() -> u8) -> Result<Pid, Error> {
    sys::fork_into(child).map_err(|error| Error::system("cannot start the keeper", reason(&error)))
}

/// The way to the keeper, shared by all that ask it.
#[derive(Clone, Debug)]
struct Line(Arc<Mutex<Way>>);

#[derive(Debug)]
struct Way {
    /// While it is needed.
    socket: Option<OwnedFd>,
    /// When the handshake must be over.
    deadline: Option<Instant>,
    /// What was wrong with an answer, or with there being none.
    fault: Option<String>,
    /// The handshake left no time for an answer, and there will be none.
    is_late: bool,
}

impl Line {
    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// What is wrong with the keeper. It is asked nothing more then: a late answer would be taken for that to another question.
    fn ask(&self, request: &Request<'_>) -> Result<Vec<u8>, String> {
        let mut way = self.0.lock().map_err(|_| GONE.to_owned())?;
        way.ask(request).map_err(|error| {
            let why = way.words(&error);
            if error.raw_os_error() == Some(LATE as i32) {
                way.is_late = true;
                way.socket = None;
                return why;
            }
            way.fail(why)
        })
    }

    /// The same for an answer that makes no sense.
    fn fail(&self, why: &str) -> String {
        match self.0.lock() {
            Ok(mut way) => way.fail(why.to_owned()),
            Err(_) => why.to_owned(),
        }
    }

    fn take(&self) -> Result<OwnedFd, Error> {
        let taken = self.0.lock().ok().and_then(|mut way| way.socket.take());
        taken.ok_or_else(|| Error::System(GONE.to_owned()))
    }

    /// Waits for one message.
    fn receive(&self) -> io::Result<Vec<u8>> {
        let way = self.0.lock().map_err(|_| Errno::EPIPE)?;
        receive_whole(way.socket()?)
    }
}

const GONE: &str = "the keeper's socket is gone";
/// The handshake took too long before the keeper was asked.
const LATE: Errno = Errno::ETIMEDOUT;

impl Way {
    fn ask(&self, request: &Request<'_>) -> io::Result<Vec<u8>> {
        if self.is_late {
            return Err(LATE.into());
        }
        let socket = self.socket()?;
        let bytes = request.encode();
        sys::uninterrupted(|| send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL))?;
        self.wait(socket)?;
        receive_whole(socket)
    }

    fn socket(&self) -> io::Result<BorrowedFd<'_>> {
        let socket = self.socket.as_ref().map(AsFd::as_fd);
        socket.ok_or_else(|| Errno::EPIPE.into())
    }

    /// Waits for an answer, no longer than the handshake may take. (The socket's own limit is that of one answer.)
    fn wait(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let Some(deadline) = self.deadline else {
            return Ok(());
        };
        let now = Instant::now();
        let until = deadline.min(now + ANSWER_TIME);
        let answered = sys::uninterrupted(|| {
            let left = until.saturating_duration_since(Instant::now());
            let answer = PollFd::new(socket, PollFlags::POLLIN);
            ppoll(&mut [answer], Some(left.into()), None)
        })?;
        if answered > 0 {
            return Ok(());
        }
        // Security: the client chooses when it asks, and must not be able to make an error of ours of it.
        Err(if until.saturating_duration_since(now) < FAIR_TIME {
            LATE.into()
        } else {
            Errno::EAGAIN.into()
        })
    }

    fn words(&self, error: &io::Error) -> String {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(LATE) => "the handshake took too long".to_owned(),
            _ if self.socket.is_none() => GONE.to_owned(),
            Some(Errno::EAGAIN) => {
                "the keeper does not answer in time: is it stopped, or the machine too busy?"
                    .to_owned()
            }
            Some(Errno::EPIPE | Errno::ECONNRESET) => "the keeper has ended".to_owned(),
            _ => format!("no answer from the keeper: {}", reason(error)),
        }
    }

    fn fail(&mut self, why: String) -> String {
        self.socket = None;
        self.fault.get_or_insert(why).clone()
    }
}

/// A pair of sockets for messages; whoever asks on the first waits at most `patience` seconds for an answer.
fn socket_pair(kind: SockType, patience: i64) -> Result<(OwnedFd, OwnedFd), Error> {
    let failed = |error: nix::Error| Error::system("cannot make the keeper's socket", error.desc());
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).map_err(failed)?;
    be_patient(&ours, patience).map_err(failed)?;
    Ok((ours, theirs))
}

/// Whoever waits for an answer there gives up after so many seconds.
fn be_patient(socket: &OwnedFd, patience: i64) -> nix::Result<()> {
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::seconds(patience))
}

/// Waits for one message, however long it is within the limit.
fn receive_whole(socket: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let receive = |buffer: &mut [u8], flags| {
        sys::uninterrupted(|| nix::sys::socket::recv(socket.as_raw_fd(), buffer, flags))
    };
    let length = receive(&mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
    if length == 0 || length > INTRODUCTION_LIMIT {
        return Err(nix::errno::Errno::EPIPE.into());
    }
    let mut buffer = vec![0; length];
    let count = receive(&mut buffer, MsgFlags::empty())?;
    buffer.truncate(count);
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keeper_that_was_left_no_time_is_not_to_blame() {
        for (left, is_to_blame) in [(5, false), (2000, true)] {
            let (ours, _silent) = socket_pair(SockType::SeqPacket, ANSWER_SECONDS).unwrap();
            let keeper = KeeperClient::with(ours);
            keeper.expect_answers_until(Instant::now() + Duration::from_millis(left));
            keeper.line.ask(&Request::Begin(&[])).unwrap_err();
            // After a ticket that could not be opened a signature is asked for.
            keeper.line.ask(&Request::Begin(&[])).unwrap_err();
            assert_eq!(keeper.fault().is_some(), is_to_blame, "{left} ms");
        }
    }
}

/// For fuzz targets.
#[cfg(fuzzing)]
#[allow(missing_docs)]
pub mod door {
    use super::store::{Unparsed, parse};
    use crate::files::Place;
    use crate::sandbox::Sandboxed;

    /// What a chain and its key have to offer.
    #[derive(Debug)]
    pub struct Offered {
        pub chain: Vec<Vec<u8>>,
        pub names: Vec<String>,
        pub schemes: Vec<rustls::SignatureScheme>,
        /// Whether the key signs, in the first of them.
        pub signs: bool,
    }

    /// From two files, or with no key's from one.
    pub fn certificate(certificate: &[u8], key: Option<&[u8]>) -> Result<Offered, String> {
        let place = |what, path: &str| Place {
            what,
            path: path.to_owned(),
            option: "--cert",
        };
        let unparsed = match key {
            Some(key) => Unparsed {
                certificate: (place("certificate", "c"), certificate.to_vec()),
                key: (place("private key", "k"), key.to_vec()),
                mode: Ok(()),
            },
            None => Unparsed::of_one_file("c".to_owned(), "--cert", certificate.to_vec(), Ok(())),
        };
        let held = parse(&unparsed, &Sandboxed::pretended()).map_err(|error| error.to_string())?;
        let signs = |scheme: &rustls::SignatureScheme| {
            let signer = held.key.choose_scheme(&[*scheme]);
            signer.is_some_and(|signer| signer.sign(b"message").is_ok())
        };
        Ok(Offered {
            signs: held.holding.schemes.first().is_some_and(signs),
            chain: held.holding.chain,
            names: held.holding.names,
            schemes: held.holding.schemes,
        })
    }
}
