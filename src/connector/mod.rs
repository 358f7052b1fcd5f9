//! Connecting to a backend (`--connect`) without the network process being able to: a process without privileges, the connector,
//! connects a socket that both have.
//!
//! The sockets are made before anything is forked, and an open file description is one, whoever's descriptor it is connected by. So
//! the network process has a connected socket in the end, and its system call filter knows neither socket(2) nor connect(2) nor a
//! way to be handed a descriptor.

mod message;
mod process;
mod target;

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socket, socketpair,
    sockopt,
};

pub(crate) use target::Target;

use crate::channel::Channel;
use crate::error::{EXIT_TEMPORARY, Error, reason};
use crate::log::Log;
use crate::sandbox::{BoundingSet, ConnectorUser};
use crate::sys;
use message::{ANSWER_LIMIT, Order, Outcome};

/// How long it may take until there is a connection, names and all addresses included.
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How much of that the connector takes for itself, so that it can still say why there is none.
const ATTEMPTS_LIMIT: Duration = Duration::from_secs(9);
/// A resolver knows no deadline: the alarm ends the connector should nobody else have done so.
const ALARM_SECONDS: u32 = 11;

/// Where to connect to, and as whom: looked up while that was possible.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) target: Target,
    pub(crate) user: ConnectorUser,
}

/// A process that will connect when told to, and the sockets for it.
#[derive(Debug)]
pub(crate) struct Connector {
    control: OwnedFd,
    /// In the order of [`families`]. Made into channels here, since looking at a descriptor is forbidden in the sandbox.
    channels: Vec<Channel>,
}

/// A connector that was told to connect.
#[derive(Debug)]
pub(crate) struct Connecting(Connector);

/// What has become of it.
#[derive(Debug)]
pub(crate) enum Answer {
    /// This is the backend, which is at this address.
    Connected(Channel, String),
    Failed {
        exit_status: u8,
        reason: String,
    },
    /// Not known yet.
    Later(Connecting),
}

/// The address families in which the target may turn out to be: one socket for each.
fn families(target: &Target) -> &'static [AddressFamily] {
    match target {
        Target::Address(address) if address.is_ipv4() => &[AddressFamily::Inet],
        Target::Address(_) => &[AddressFamily::Inet6],
        Target::Name(..) => &[AddressFamily::Inet, AddressFamily::Inet6],
        Target::Unix(_) => &[AddressFamily::Unix],
    }
}

impl Route {
    /// Security: a name is never resolved with privileges, and a port needs none.
    ///
    /// # Errors
    /// `Setup` if the connector would be root for anything but a path.
    pub(crate) fn new(target: Target, user: ConnectorUser) -> Result<Self, Error> {
        if user.is_root() && !matches!(target, Target::Unix(_)) {
            return Err(Error::Setup(format!(
                "no privileges are needed to connect to '{target}' (--connect): leave --backend-user out, or name another \
                 user than root"
            )));
        }
        Ok(Self { target, user })
    }
}

impl Connector {
    /// Makes the sockets and forks the connector.
    ///
    /// # Errors
    /// `System` if there is no process or socket to be had.
    pub(crate) fn start(
        route: &Route,
        bounding_set: BoundingSet,
        log: &Log,
    ) -> Result<Self, Error> {
        let failed =
            |error: nix::Error| Error::system("cannot make the backend's socket", error.desc());
        let sockets = make_sockets(&route.target).map_err(failed)?;
        let flags = SockFlag::SOCK_CLOEXEC;
        let (control, controlled) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).map_err(failed)?;
        sys::fork_into(|| process::live(route, bounding_set, log, &controlled, &sockets))
            .map_err(|error| Error::system("cannot start the connector", reason(&error)))?;
        let channels = sockets.into_iter().map(|socket| Channel::new(socket, None));
        Ok(Self {
            control,
            channels: channels.collect(),
        })
    }

    /// The descriptors that the network process keeps for this connector.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let sockets = self.channels.iter().flat_map(Channel::descriptors);
        sockets.chain([self.control.as_fd()])
    }

    /// Has it connect. Should it be gone, the answer says so.
    pub(crate) fn go(self) -> Connecting {
        self.order(Order::Connect);
        Connecting(self)
    }

    fn order(&self, order: Order) {
        let flags = MsgFlags::MSG_NOSIGNAL;
        let control = self.control.as_raw_fd();
        let _ = sys::uninterrupted(|| send(control, &order.encode(), flags));
    }

    /// Has it look at what can be seen without connecting, and waits for the answer. What is good is in the text.
    ///
    /// # Errors
    /// The text says what is not, and how to mend it.
    pub(crate) fn examine(self) -> Result<String, String> {
        self.order(Order::Examine);
        let mut answer = [0; ANSWER_LIMIT];
        let length = recv(self.control.as_raw_fd(), &mut answer, MsgFlags::empty()).unwrap_or(0);
        match Outcome::decode(answer.get(..length).unwrap_or_default()) {
            Some(Outcome::Done { text, .. }) => Ok(text),
            Some(Outcome::Failed { text, .. }) => Err(text),
            None => Err(format!("no answer within {ALARM_SECONDS} s")),
        }
    }
}

#[cfg(any(test, fuzzing))]
impl Connector {
    /// For tests within one process: whoever has the other ends plays the connector and the backend.
    pub(crate) fn pretended(control: OwnedFd, channels: Vec<Channel>) -> Self {
        Self { control, channels }
    }
}

impl Connecting {
    /// Where the answer will come.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.control.as_fd()
    }

    /// The answer, if it is there.
    pub(crate) fn answer(self) -> Answer {
        let mut answer = [0; ANSWER_LIMIT];
        let flags = MsgFlags::MSG_DONTWAIT;
        let length = match recv(self.0.control.as_raw_fd(), &mut answer, flags) {
            Ok(length) => length,
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                return Answer::Later(self);
            }
            Err(_) => 0,
        };
        match Outcome::decode(answer.get(..length).unwrap_or_default()) {
            Some(Outcome::Done { socket, text }) => self.connected(socket.into(), text),
            Some(Outcome::Failed { exit_status, text }) => Answer::Failed {
                exit_status,
                reason: text,
            },
            None => no_answer(),
        }
    }

    fn connected(self, socket: usize, text: String) -> Answer {
        match self.0.channels.into_iter().nth(socket) {
            Some(channel) => Answer::Connected(channel, text),
            None => no_answer(),
        }
    }
}

fn no_answer() -> Answer {
    Answer::Failed {
        exit_status: EXIT_TEMPORARY,
        reason: "the connector has ended without an answer".to_owned(),
    }
}

fn make_sockets(target: &Target) -> nix::Result<Vec<OwnedFd>> {
    let mut sockets = Vec::new();
    for family in families(target) {
        let flags = SockFlag::SOCK_CLOEXEC;
        match socket(*family, SockType::Stream, flags, None) {
            Ok(socket) => {
                if *family != AddressFamily::Unix {
                    prepare_tcp(&socket);
                }
                sockets.push(socket);
            }
            // A kernel without IPv6 reaches the IPv4 addresses of a name.
            Err(nix::errno::Errno::EAFNOSUPPORT) if !sockets.is_empty() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// IMAP is small lines that wait for each other, and only keepalive tells that a backend is gone for good.
fn prepare_tcp(socket: &OwnedFd) {
    // Both hold from before the connection on; without either it works, if less well.
    let _ = setsockopt(socket, sockopt::TcpNoDelay, &true);
    let _ = setsockopt(socket, sockopt::KeepAlive, &true);
}

/// For fuzz targets.
#[cfg(fuzzing)]
#[allow(missing_docs)]
pub mod door {
    use super::*;

    /// An order that was read, written again.
    pub fn order(bytes: &[u8]) -> Option<Vec<u8>> {
        Order::decode(bytes).map(|order| order.encode().to_vec())
    }

    /// An answer that was read, written again, and whether it says that there is a connection.
    pub fn answer(bytes: &[u8]) -> Option<(Vec<u8>, bool)> {
        let outcome = Outcome::decode(bytes)?;
        Some((outcome.encode(), matches!(outcome, Outcome::Done { .. })))
    }

    /// A place to connect to that was read, as it is shown.
    pub fn target(text: &std::ffi::OsStr) -> Option<String> {
        Target::parse(text).ok().map(|target| target.to_string())
    }
}
