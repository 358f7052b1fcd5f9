//! What the superserver hands over: descriptors 0 and 1, or one in `LISTEN_FDS` -> [`Connection`], with its addresses; or
//! sockets to listen on.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    SockType, SockaddrStorage, UnixAddr, getpeername, getsockname, getsockopt, setsockopt, sockopt,
};

use crate::channel::{Channel, is_pipe, is_socket};
use crate::error::{Error, reason};
use crate::proxy_header::Sender;
use crate::sys;

/// The client's connection, off the standard descriptors.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) channel: Channel,
    pub(crate) addresses: Option<Addresses>,
    kind: Kind,
}

/// Both ends of a TCP connection; IPv4 in IPv6 is given as IPv4.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Addresses {
    /// Ours, or with a PROXY header the one that the client connected to.
    pub local: SocketAddr,
    /// The client's.
    pub peer: SocketAddr,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Inet,
    Pipe,
    Unix,
}

/// Who is at the other end, where that must be a balancer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Peer {
    /// It has reset the connection before we could ask.
    Gone,
    Listed,
    Stranger,
    /// The system does not say.
    Unknown,
}

/// What fd 2 is good for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stderr {
    /// It is the client's, or was closed: it is /dev/null from now on.
    Unusable,
    Usable,
}

/// Makes fd 2 safe to print to: under inetd it is the client's socket, and nothing but protocol may go there.
///
/// Call this before anything can print. Closed standard descriptors are /dev/null by now: Rust's runtime opens them before
/// `main`, so a socket of ours cannot land on one.
pub(crate) fn secure_stderr() -> io::Result<Stderr> {
    let stderr = io::stderr();
    // A shell's `2>&1 | less` makes fd 2 the same pipe as fd 1, but has no connection on fd 0.
    let is_clients = is_channel(stderr.as_fd())
        && (sys::is_same_file(&stderr, sys::standard_input())
            || (is_channel(sys::standard_input())
                && sys::is_same_file(&stderr, sys::standard_output()))
            || inherited_descriptor().is_some_and(|fd| sys::is_same_file_as_number(fd, &stderr)));
    if is_clients {
        let null = dev_null()?;
        sys::uninterrupted(|| nix::unistd::dup2_stderr(&null))?;
    }
    Ok(if is_clients || is_dev_null(stderr.as_fd()) {
        Stderr::Unusable
    } else {
        Stderr::Usable
    })
}

/// The number of the first descriptor that systemd passes on; sd_listen_fds(3).
const LISTEN_FDS_START: libc::c_int = 3;

fn inherited_descriptor() -> Option<libc::c_int> {
    std::env::var_os("LISTEN_FDS").map(|_| LISTEN_FDS_START)
}

fn dev_null() -> io::Result<OwnedFd> {
    Ok(std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?
        .into())
}

fn is_dev_null(fd: BorrowedFd<'_>) -> bool {
    let null = nix::sys::stat::stat("/dev/null");
    match (null, nix::sys::stat::fstat(fd)) {
        (Ok(null), Ok(stat)) => {
            stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == null.st_rdev
        }
        _ => false,
    }
}

/// What there is to serve.
pub(crate) enum Activation {
    /// One client.
    Connection(Connection),
    /// Sockets on which clients arrive (systemd's `Accept=no`): there may be none, where we open our own.
    Listening(Vec<OwnedFd>),
}

impl Activation {
    /// Takes what was handed over and leaves /dev/null on descriptors 0 and 1. With `listens`, what else is on these is none of our
    /// business, but a superserver's client is a client. Where there is one and yet no way on, it is told `goodbye`.
    ///
    /// # Errors
    /// `Setup` if what was handed over is no connection, `System` if a descriptor cannot be had.
    pub(crate) fn take(listens: bool, goodbye: &[u8]) -> Result<Self, Error> {
        let mut inherited = take_inherited()?;
        let is_listening = |socket: &OwnedFd| getsockopt(socket, sockopt::AcceptConn) == Ok(true);
        let listening = inherited
            .iter()
            .filter(|socket| is_listening(socket))
            .count();
        if listening != inherited.len() && (listening > 0 || inherited.len() > 1) {
            return Err(Error::Setup(
                "LISTEN_FDS: there is a connection among several descriptors: either one connection or listening sockets are passed on"
                    .to_owned(),
            ));
        }
        let is_alone = inherited.is_empty() && !is_of_superserver(sys::standard_input());
        if listening > 0 || (listens && is_alone) {
            put_null_on_standard()?;
            return Ok(Self::Listening(inherited));
        }
        let channel = match inherited.pop() {
            Some(socket) => Channel::new(socket, None),
            None => take_standard()?,
        };
        let mut connection = Connection::of(channel);
        if let Err(error) = put_null_on_standard() {
            connection.part(goodbye);
            return Err(error);
        }
        Ok(Self::Connection(connection))
    }
}

fn put_null_on_standard() -> Result<(), Error> {
    let null =
        dev_null().map_err(|error| Error::system("cannot open /dev/null", reason(&error)))?;
    sys::uninterrupted(|| nix::unistd::dup2_stdin(&null))
        .and_then(|()| sys::uninterrupted(|| nix::unistd::dup2_stdout(&null)))
        .map_err(|error| {
            Error::system(
                "cannot put /dev/null on standard input and output",
                error.desc(),
            )
        })
}

impl Connection {
    /// The connection on this channel.
    pub(crate) fn of(channel: Channel) -> Self {
        let kind = match channel.input() {
            Some(input) if is_socket(input) => prepare_socket(input),
            _ => Kind::Pipe,
        };
        let addresses = channel.input().and_then(addresses);
        Self {
            channel,
            addresses,
            kind,
        }
    }
}

/// Resumed TLS 1.3 stalls for 40 ms without `TCP_NODELAY`, and only keepalive tells that a client is gone for good.
fn prepare_socket(socket: BorrowedFd<'_>) -> Kind {
    if nodelay(socket).is_err() {
        return Kind::Unix;
    }
    // Without keepalive a vanished client is noticed later, by the backend's autologout.
    let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
    Kind::Inet
}

fn nodelay(socket: BorrowedFd<'_>) -> nix::Result<()> {
    setsockopt(&socket, sockopt::TcpNoDelay, &true)
}

/// What is in `LISTEN_FDS`: a connected socket (systemd's `Accept=yes` without `StandardInput=socket`), or listening ones.
fn take_inherited() -> Result<Vec<OwnedFd>, Error> {
    let mut inherited = listenfd::ListenFd::from_env();
    let fault = |text: &str| Error::Setup(format!("LISTEN_FDS: {text}"));
    let mut taken = Vec::new();
    for place in 0..inherited.len() {
        let number = inherited
            .take_raw_fd(place)
            .map_err(|error| fault(&error.to_string()))?;
        if let Some(number) = number {
            let socket = sys::own_descriptor(number).map_err(|error| fault(&reason(&error)))?;
            taken.push(sys::duplicate(socket.as_fd()).map_err(|error| fault(&reason(&error)))?);
        }
    }
    Ok(taken)
}

fn take_standard() -> Result<Channel, Error> {
    let (stdin, stdout) = (sys::standard_input(), sys::standard_output());
    for (name, fd) in [("input", stdin), ("output", stdout)] {
        if !is_channel(fd) {
            return Err(Error::Setup(format!(
                "standard {name} is no connection: imap-tls is to be started by a superserver (systemd, xinetd, inetd, tcpserver)"
            )));
        }
    }
    if getsockopt(&stdin, sockopt::AcceptConn) == Ok(true) {
        return Err(Error::Setup(
            "standard input is a listening socket: 'nowait' in inetd, 'wait = no' in xinetd, Accept=yes in systemd, or a unit without StandardInput=socket is needed"
                .to_owned(),
        ));
    }
    let copy = |fd| {
        sys::duplicate(fd)
            .map_err(|error| Error::system("cannot copy a descriptor", reason(&error)))
    };
    let input = copy(stdin)?;
    let is_one_socket = is_socket(input.as_fd()) && sys::is_same_file(stdin, stdout);
    let output = if is_one_socket {
        None
    } else {
        Some(copy(stdout)?)
    };
    Ok(Channel::new(input, output))
}

/// Whether it is a client's connection for sure: a stream that has come in at a name. The pairs of sockets that sshd and the like
/// have for standard input have none.
fn is_of_superserver(fd: BorrowedFd<'_>) -> bool {
    let is_connection = getsockopt(&fd, sockopt::SockType) == Ok(SockType::Stream)
        && getsockopt(&fd, sockopt::AcceptConn) == Ok(false);
    let name = getsockname::<SockaddrStorage>(fd.as_raw_fd());
    is_connection
        && name.is_ok_and(|name| {
            let unix = name.as_unix_addr();
            inet(&name).is_some()
                || unix.is_some_and(|unix| unix.path().is_some() || unix.as_abstract().is_some())
        })
}

/// Whether what is written there may reach a client. Of a socket it cannot only if that has no name and is not standard input as well:
/// then it is one of a pair that is there for output, as Node's are, or was connected by whoever started us, as the journal's was.
/// What a superserver accepts on has the name that it listens at, and a pair that stands for a connection is for both.
pub(crate) fn may_be_clients(output: BorrowedFd<'_>, input: BorrowedFd<'_>) -> bool {
    let name = getsockname::<UnixAddr>(output.as_raw_fd());
    let is_for_output =
        name.is_ok_and(|name| name.is_unnamed()) && !sys::is_same_file(output, input);
    is_socket(output) && !is_for_output
}

fn is_channel(fd: BorrowedFd<'_>) -> bool {
    is_socket(fd) || is_pipe(fd)
}

fn addresses(socket: BorrowedFd<'_>) -> Option<Addresses> {
    let peer = getpeername::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
    let local = getsockname::<SockaddrStorage>(socket.as_raw_fd()).ok()?;
    Some(Addresses {
        local: inet(&local)?,
        peer: inet(&peer)?,
    })
}

/// As std sees it, with IPv4-mapped IPv6 as plain IPv4 (RFC 4291 section 2.5.5.2): logs and access lists know one form.
pub(crate) fn inet(address: &SockaddrStorage) -> Option<SocketAddr> {
    if let Some(v4) = address.as_sockaddr_in() {
        return Some(SocketAddr::new(IpAddr::V4(v4.ip()), v4.port()));
    }
    let v6 = address.as_sockaddr_in6()?;
    Some(SocketAddr::new(
        IpAddr::V6(v6.ip()).to_canonical(),
        v6.port(),
    ))
}

/// Octets of [`Addresses::encode`]: the family, two addresses, two ports.
pub(crate) const ADDRESSES_LENGTH: usize = 1 + 2 * 16 + 2 * 2;
/// All travel as IPv6, IPv4 within it.
const FAMILY_IPV6: u8 = 6;

impl Addresses {
    /// Fixed-size bytes for the launcher, which are zero where there are no addresses.
    pub(crate) fn encode(addresses: Option<&Self>) -> [u8; ADDRESSES_LENGTH] {
        let mut bytes = [0; ADDRESSES_LENGTH];
        let Some(Self { local, peer }) = addresses else {
            return bytes;
        };
        let octets = |ip| match ip {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let ports = [peer.port().to_be_bytes(), local.port().to_be_bytes()];
        let content = [FAMILY_IPV6]
            .into_iter()
            .chain(octets(peer.ip()))
            .chain(octets(local.ip()))
            .chain(ports.into_iter().flatten());
        for (to, from) in bytes.iter_mut().zip(content) {
            *to = from;
        }
        bytes
    }

    /// The addresses in `bytes`, checked: who reads them has privileges, who wrote them has none. The outer `None` refuses them.
    pub(crate) fn decode(bytes: &[u8; ADDRESSES_LENGTH]) -> Option<Option<Self>> {
        let (kind, rest) = bytes.split_first()?;
        let (peer, rest) = rest.split_first_chunk::<16>()?;
        let (local, ports) = rest.split_first_chunk::<16>()?;
        let address = |octets: &[u8; 16], port| {
            SocketAddr::new(IpAddr::V6((*octets).into()).to_canonical(), port)
        };
        let &[p1, p2, l1, l2] = ports else {
            return None;
        };
        match *kind {
            0 if bytes.iter().all(|octet| *octet == 0) => Some(None),
            FAMILY_IPV6 => Some(Some(Self {
                local: address(local, u16::from_be_bytes([l1, l2])),
                peer: address(peer, u16::from_be_bytes([p1, p2])),
            })),
            _ => None,
        }
    }
}

/// The client as log lines name it.
impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.kind, self.addresses) {
            (_, Some(Addresses { peer, .. })) => write!(f, "{peer}"),
            // The system forgets a peer's address at its reset.
            (Kind::Inet, None) => f.write_str("gone"),
            (Kind::Pipe, None) => f.write_str("pipe"),
            (Kind::Unix, None) => f.write_str("unix"),
        }
    }
}

impl Connection {
    /// Whether these are the senders of its PROXY header. Nothing can be said of an inet peer that is gone already, except that
    /// it is none of them.
    pub(crate) fn is_from(&self, senders: &[Sender]) -> Peer {
        let peer = match (self.kind, self.addresses) {
            (Kind::Inet, None) => return self.why_unknown(),
            (_, addresses) => addresses.map(|addresses| addresses.peer.ip()),
        };
        if senders.iter().any(|sender| sender.includes(peer)) {
            Peer::Listed
        } else {
            Peer::Stranger
        }
    }

    fn why_unknown(&self) -> Peer {
        let socket = self.channel.input();
        let asked = socket.map(|socket| getpeername::<SockaddrStorage>(socket.as_raw_fd()));
        match asked {
            Some(Err(Errno::ENOTCONN)) => Peer::Gone,
            _ => Peer::Unknown,
        }
    }

    /// Says goodbye to a client of whom nothing was read, so that it can read it: what it sent already is dropped by the
    /// kernel, unseen, since unread bytes would turn our close into a reset that takes the goodbye along.
    pub(crate) fn part(&mut self, goodbye: &[u8]) {
        // Best effort: a client that does not take a line now gets an end of file.
        let _ = self.channel.send(goodbye);
        self.channel.end_output();
        let (Kind::Inet, Some(socket)) = (self.kind, self.channel.input()) else {
            return;
        };
        let deadline = Instant::now() + PARTING_TIME;
        let mut left = PARTING_OCTETS;
        while left > 0 {
            let patience = deadline.saturating_duration_since(Instant::now());
            let mut poll = [nix::poll::PollFd::new(socket, nix::poll::PollFlags::POLLIN)];
            if patience.is_zero()
                || !matches!(
                    nix::poll::ppoll(&mut poll, Some(patience.into()), None),
                    Ok(1)
                )
            {
                return;
            }
            match sys::discard_input(socket, left) {
                Ok(0) | Err(_) => return,
                Ok(count) => left = left.saturating_sub(count),
            }
        }
    }
}

/// How long a client may take to close after a goodbye, however slowly it still sends.
const PARTING_TIME: Duration = Duration::from_secs(1);
/// How much a client may still send after a goodbye.
const PARTING_OCTETS: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapped_address_is_plain_ipv4() {
        let mapped = SocketAddr::new("::ffff:192.0.2.7".parse().unwrap(), 4711);
        let storage = SockaddrStorage::from(mapped);
        assert_eq!(inet(&storage).unwrap().to_string(), "192.0.2.7:4711");
    }

    #[test]
    fn a_superservers_client_is_told_from_other_standard_input() {
        use std::os::unix::net::{UnixListener, UnixStream};
        let directory = nix::unistd::mkdtemp("/tmp/imap-tls-activation.XXXXXX").unwrap();
        let path = directory.join("socket");
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let unix = UnixListener::bind(&path).unwrap();
        let clients = (
            std::net::TcpStream::connect(tcp.local_addr().unwrap()).unwrap(),
            UnixStream::connect(&path).unwrap(),
        );
        let accepted = (tcp.accept().unwrap().0, unix.accept().unwrap().0);
        // As the journal's on standard output: only the other end has a name.
        let null = dev_null().unwrap();
        let may_be_clients = |fd: BorrowedFd<'_>| may_be_clients(fd, null.as_fd());
        assert!(!is_of_superserver(clients.1.as_fd()) && !may_be_clients(clients.1.as_fd()));
        let are_clients = || {
            let accepted = [accepted.0.as_fd(), accepted.1.as_fd()];
            accepted.map(|fd| is_of_superserver(fd) && may_be_clients(fd)) == [true; 2]
        };
        assert!(are_clients());
        // Gone, and yet a client.
        drop(clients);
        assert!(are_clients());
        let (pair, _other) = UnixStream::pair().unwrap();
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        for other in [
            tcp.as_fd(),
            unix.as_fd(),
            pair.as_fd(),
            pipe.as_fd(),
            null.as_fd(),
        ] {
            assert!(!is_of_superserver(other), "{other:?}");
        }
        for other in [pair.as_fd(), pipe.as_fd(), null.as_fd()] {
            assert!(!may_be_clients(other), "{other:?}");
        }
        assert!(super::may_be_clients(pair.as_fd(), pair.as_fd()));
        std::fs::remove_dir_all(directory).unwrap();
    }

    fn addresses(peer: &str, local: &str) -> Addresses {
        let [local, peer] = [local, peer].map(|address| address.parse().unwrap());
        Addresses { local, peer }
    }

    #[test]
    fn addresses_survive_the_way_to_the_launcher() {
        assert_eq!(
            Addresses::decode(&Addresses::encode(None)),
            Some(None),
            "unchanged"
        );
        for addresses in [
            addresses("192.0.2.7:4711", "198.51.100.1:143"),
            addresses("[2001:db8::7]:65535", "[2001:db8::1]:0"),
            // A balancer that listens on both tells of both.
            addresses("192.0.2.7:1", "[2001:db8::1]:993"),
        ] {
            let bytes = Addresses::encode(Some(&addresses));
            assert_eq!(Addresses::decode(&bytes), Some(Some(addresses)));
        }
    }

    #[test]
    fn forged_addresses_are_refused() {
        let good = Addresses::encode(Some(&addresses("192.0.2.7:4711", "198.51.100.1:143")));
        for family in (0..=u8::MAX).filter(|family| *family != FAMILY_IPV6) {
            let mut bytes = good;
            bytes[0] = family;
            assert_eq!(Addresses::decode(&bytes), None, "{family}");
        }
    }

    #[test]
    fn an_ipv6_address_stays() {
        let address = SocketAddr::new("2001:db8::1".parse().unwrap(), 993);
        assert_eq!(
            inet(&SockaddrStorage::from(address)).unwrap().to_string(),
            "[2001:db8::1]:993"
        );
    }
}
