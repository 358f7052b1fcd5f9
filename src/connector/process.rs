//! The connector's own life: it gives up its privileges, waits for one order, connects, answers, and ends.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::socket::{
    MsgFlags, SockaddrLike, SockaddrStorage, UnixAddr, connect, recv, send, setsockopt, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use nix::unistd::{AccessFlags, alarm};

use super::message::{ORDER_LENGTH, Order, Outcome};
use super::{ALARM_SECONDS, ATTEMPTS_LIMIT, Route, Target, families};
use crate::error::{EXIT_SETUP, EXIT_TEMPORARY, Error, reason};
use crate::log::Log;
use crate::sandbox::{BoundingSet, confine_connector};
use crate::sys;

/// How many addresses of a name are tried.
const ADDRESSES: usize = 8;

/// All that the connector does; returns its exit status, which nobody asks for.
pub(super) fn live(
    route: &Route,
    bounding_set: BoundingSet,
    log: &Log,
    control: &OwnedFd,
    sockets: &[OwnedFd],
) -> u8 {
    let mut kept = vec![control.as_fd()];
    kept.extend(sockets.iter().map(OwnedFd::as_fd));
    kept.extend(log.descriptor());
    // The alarm must not be ignored or blocked, as a superserver may have left it.
    let confined = sys::reset_signals()
        .map_err(|error| Error::system("cannot reset signals", reason(&error)))
        .and_then(|()| confine_connector(bounding_set, &route.user, &kept));
    if let Err(error) = confined {
        log.error(&error);
        return error.exit_status();
    }
    let Some(order) = wait_for_order(control) else {
        // Released without having been needed: no TLS, no backend.
        return 0;
    };
    alarm::set(ALARM_SECONDS);
    // From here on nobody is kept waiting by a resolver or a backend that does not answer.
    if sys::end_with_peer(control.as_fd()).is_err() {
        return EXIT_TEMPORARY;
    }
    let outcome = match order {
        Order::Connect => reach(&route.target, sockets),
        Order::Examine => examine(&route.target),
    };
    let (number, answer) = (control.as_raw_fd(), outcome.encode());
    let _ = sys::uninterrupted(|| send(number, &answer, MsgFlags::MSG_NOSIGNAL));
    0
}

fn wait_for_order(control: &OwnedFd) -> Option<Order> {
    let mut order = [0; ORDER_LENGTH + 1];
    let number = control.as_raw_fd();
    let length = sys::uninterrupted(|| recv(number, &mut order, MsgFlags::empty())).ok()?;
    Order::decode(order.get(..length)?)
}

/// Connects one of the sockets.
fn reach(target: &Target, sockets: &[OwnedFd]) -> Outcome {
    let deadline = Instant::now() + ATTEMPTS_LIMIT;
    match target {
        Target::Unix(path) => reach_path(path, sockets, deadline),
        Target::Address(address) => reach_addresses(&[*address], target, sockets, deadline),
        Target::Name(..) => match resolve(target) {
            Ok(addresses) => reach_addresses(&addresses, target, sockets, deadline),
            Err(outcome) => outcome,
        },
    }
}

fn reach_path(path: &Path, sockets: &[OwnedFd], deadline: Instant) -> Outcome {
    let connected = match (UnixAddr::new(path), sockets.first()) {
        (Ok(address), Some(socket)) => connect_by(socket, &address, deadline),
        (Err(error), _) => Err(error),
        (_, None) => Err(Errno::EAFNOSUPPORT),
    };
    match connected {
        Ok(()) => Outcome::Done {
            socket: 0,
            text: format!("unix:{}", path.display()),
        },
        // Somebody has to mend that; all else may pass, such as a backend that is just being restarted.
        Err(error @ (Errno::EACCES | Errno::EPERM)) => Outcome::Failed {
            exit_status: EXIT_SETUP,
            text: format!(
                "{}: the connector's user may not connect to it (--backend-user)",
                error.desc()
            ),
        },
        Err(error) => temporary(error.desc()),
    }
}

fn temporary(text: impl Into<String>) -> Outcome {
    Outcome::Failed {
        exit_status: EXIT_TEMPORARY,
        text: text.into(),
    }
}

/// Tries one address after the other, each with its share of the time: the first may be silent and the second answer.
fn reach_addresses(
    addresses: &[SocketAddr],
    target: &Target,
    sockets: &[OwnedFd],
    deadline: Instant,
) -> Outcome {
    let mut faults = Vec::new();
    for (address, waiting) in addresses.iter().zip((1..=addresses.len()).rev()) {
        let now = Instant::now();
        let share = u32::try_from(waiting).unwrap_or(u32::MAX);
        let until = now + deadline.saturating_duration_since(now) / share;
        match reach_address(*address, target, sockets, until) {
            Ok(socket) => {
                let text = address.to_string();
                return Outcome::Done { socket, text };
            }
            Err(error) => faults.push((address, error.desc())),
        }
    }
    let texts = faults.iter().map(|(address, why)| match target {
        // The log has it already.
        Target::Address(_) => (*why).to_owned(),
        Target::Name(..) | Target::Unix(_) => format!("{address}: {why}"),
    });
    temporary(texts.collect::<Vec<_>>().join("; "))
}

/// Connects the socket of the address's family, and says which one that is.
fn reach_address(
    address: SocketAddr,
    target: &Target,
    sockets: &[OwnedFd],
    deadline: Instant,
) -> nix::Result<u8> {
    let storage = SockaddrStorage::from(address);
    let mut numbered = (0..).zip(families(target).iter().zip(sockets));
    let (number, (_, socket)) = numbered
        .find(|(_, (family, _))| Some(**family) == storage.family())
        .ok_or(Errno::EAFNOSUPPORT)?;
    connect_by(socket, &storage, deadline).map(|()| number)
}

/// `SO_SNDTIMEO` is what bounds connect(2), for TCP and for a unix socket whose queue is full (socket(7)).
fn connect_by(socket: &OwnedFd, address: &dyn SockaddrLike, deadline: Instant) -> nix::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = i64::try_from(left.as_millis()).unwrap_or(i64::MAX).max(1);
    setsockopt(socket, sockopt::SendTimeout, &TimeVal::milliseconds(left))?;
    // Begun again, it goes on waiting for what is under way.
    match sys::uninterrupted(|| connect(socket.as_raw_fd(), address)) {
        Ok(()) => setsockopt(socket, sockopt::SendTimeout, &TimeVal::milliseconds(0)),
        Err(error) => {
            // Without it the next address would be tried from this one's local address, or not at all.
            let _ = sys::dissolve(socket.as_fd());
            Err(match error {
                Errno::EAGAIN | Errno::EINPROGRESS => Errno::ETIMEDOUT,
                error => error,
            })
        }
    }
}

/// The addresses that the name has, in the resolver's order.
fn resolve(target: &Target) -> Result<Vec<SocketAddr>, Outcome> {
    let found = match target {
        Target::Name(host, port) => (host.as_str(), *port).to_socket_addrs(),
        Target::Address(_) | Target::Unix(_) => return Ok(Vec::new()),
    };
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in found.map_err(|error| temporary(reason(&error)))? {
        if addresses.len() < ADDRESSES && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        return Err(temporary("the name has no address"));
    }
    Ok(addresses)
}

/// What can be seen without connecting.
fn examine(target: &Target) -> Outcome {
    let good = |text| Outcome::Done { socket: 0, text };
    match target {
        Target::Address(_) => good("an address, which needs no look-up".to_owned()),
        Target::Name(host, _) => match resolve(target) {
            Ok(addresses) => {
                let texts = addresses.iter().map(|address| address.ip().to_string());
                good(format!(
                    "{host} is {}",
                    texts.collect::<Vec<_>>().join(", ")
                ))
            }
            Err(Outcome::Failed { exit_status, text }) => Outcome::Failed {
                exit_status,
                text: format!("{text}: is it in the DNS or in /etc/hosts?"),
            },
            Err(outcome) => outcome,
        },
        Target::Unix(path) => match examine_path(path) {
            Ok(()) => good("a socket that the connector may connect to".to_owned()),
            Err(text) => temporary(text),
        },
    }
}

fn examine_path(path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|error| match error.raw_os_error() {
        Some(nix::libc::ENOENT) => format!(
            "{}: is the server running, and does it listen there?",
            reason(&error)
        ),
        Some(nix::libc::EACCES) => format!(
            "{}: open its directory to the connector's user, or name another (--backend-user)",
            reason(&error)
        ),
        _ => reason(&error),
    })?;
    if !metadata.file_type().is_socket() {
        return Err("it is no socket".to_owned());
    }
    nix::unistd::access(path, AccessFlags::W_OK).map_err(|error| {
        format!(
            "{}: the connector's user may not write to it: mend its mode, or name another (--backend-user)",
            error.desc()
        )
    })
}
