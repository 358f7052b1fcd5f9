//! Sockets to listen on: opened here, or handed over by systemd.

use std::fmt;
use std::fs::Metadata;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, UnixAddr, bind, connect,
    getsockname, getsockopt, listen, setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::unistd::AccessFlags;

use crate::activation::inet;
use crate::cli::ListenAddress;
use crate::error::{Error, reason};
use crate::keeper::{distrust, is_trusted};

/// One that is listened on.
#[derive(Debug)]
struct Opened {
    file: Option<OwnFile>,
    name: String,
    socket: OwnedFd,
}

/// The file of a socket that we made, to be removed at the end: that one, and not what another has put in its place.
#[derive(Debug)]
struct OwnFile {
    inode: (u64, u64),
    path: PathBuf,
}

impl OwnFile {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::symlink_metadata(path).ok()?;
        Some(Self {
            inode: (metadata.dev(), metadata.ino()),
            path: path.to_owned(),
        })
    }

    fn remove(self) {
        if Self::of(&self.path).is_some_and(|now| now.inode == self.inode) {
            // It may have been removed already.
            let _ = std::fs::remove_file(self.path);
        }
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Sockets(Vec<Opened>);

impl Sockets {
    /// Opens the addresses, and takes those that were handed over along.
    ///
    /// # Errors
    /// `Setup` for the first address that cannot be listened on, or if there is none.
    pub(crate) fn open(
        addresses: &[ListenAddress],
        inherited: Vec<OwnedFd>,
    ) -> Result<Self, Error> {
        let mut sockets = Vec::new();
        for address in addresses {
            sockets.push(open(address, addresses).map_err(|error| {
                Error::setup(
                    format!("cannot listen on {address} (--listen)"),
                    error.desc(),
                )
            })?);
        }
        for socket in inherited {
            sockets.push(Opened {
                file: None,
                name: name(socket.as_fd()),
                socket,
            });
        }
        sockets.iter().try_for_each(do_not_block)?;
        Ok(Self(sockets))
    }

    /// The one that network processes come to: systemd's, or at a path where nobody but our own user may connect.
    ///
    /// # Errors
    /// `Setup` if there is none, or it is of another kind.
    pub(crate) fn of_keeper(path: Option<&Path>, inherited: Vec<OwnedFd>) -> Result<Self, Error> {
        let mut inherited = inherited.into_iter();
        let opened = match (inherited.next(), inherited.next(), path) {
            (None, _, None) => {
                return Err(Error::Usage(
                    "--keep without --keeper SOCKET: say where network processes come to, or have systemd listen there"
                        .to_owned(),
                ));
            }
            (None, _, Some(path)) => open_keepers(path).map_err(|error| {
                Error::setup(
                    format!("cannot listen on '{}' (--keeper)", path.display()),
                    error.desc(),
                )
            })?,
            (Some(socket), None, _) => {
                if getsockopt(&socket, sockopt::SockType) != Ok(SockType::SeqPacket) {
                    return Err(Error::Setup(
                        "LISTEN_FDS: the keeper needs a socket of ListenSequentialPacket="
                            .to_owned(),
                    ));
                }
                check_mode(&socket)?;
                let name = name(socket.as_fd());
                let file = None;
                Opened { file, name, socket }
            }
            (Some(_), Some(_), _) => {
                return Err(Error::Setup(
                    "LISTEN_FDS: the keeper needs one socket, and there are several".to_owned(),
                ));
            }
        };
        do_not_block(&opened)?;
        Ok(Self(vec![opened]))
    }

    /// The first, of one or more.
    ///
    /// # Errors
    /// `System` after [`Self::close`].
    pub(crate) fn first(&self) -> Result<BorrowedFd<'_>, Error> {
        let socket = self.descriptors().next();
        socket.ok_or_else(|| Error::System("nothing is listened on any more".to_owned()))
    }

    /// Whether a socket that we made ourselves is elsewhere than at this path.
    pub(crate) fn would_move_to(&self, path: Option<&Path>) -> bool {
        let mut own = self.0.iter().filter_map(|opened| opened.file.as_ref());
        own.any(|file| Some(file.path.as_path()) != path)
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|opened| opened.socket.as_fd())
    }

    /// Listens no more. Who comes meanwhile is refused by the kernel, or waits at the socket that systemd keeps.
    pub(crate) fn close(&mut self) {
        for opened in self.0.drain(..) {
            if let Some(file) = opened.file {
                file.remove();
            }
        }
    }
}

/// For the log: the addresses with commas between.
impl fmt::Display for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|socket| socket.name.as_str()).collect();
        f.write_str(&names.join(", "))
    }
}

/// Whether this one of `all` addresses could be listened on now. Nobody can connect meanwhile, nobody is connected to, and no file is
/// made.
///
/// # Errors
/// Why not, in words.
pub(crate) fn can_be_bound(address: &ListenAddress, all: &[ListenAddress]) -> Result<(), String> {
    let path = match address {
        ListenAddress::Inet(address) => {
            return bind_inet(*address, all).map(drop).map_err(in_words);
        }
        ListenAddress::Unix(path) => path,
    };
    let Some((address, _)) = socket_at(path)? else {
        return can_be_made(path);
    };
    // Whoever listens for connections does not notice a socket of datagrams.
    match probe(&address, SockType::Datagram) {
        Err(Errno::ECONNREFUSED) => can_be_made(path),
        _ => Err(in_words(Errno::EADDRINUSE)),
    }
}

/// The same for a path where nobody listens.
fn can_be_made(path: &Path) -> Result<(), String> {
    // A bare name's is "".
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    nix::unistd::access(directory.unwrap_or(Path::new(".")), AccessFlags::W_OK).map_err(in_words)
}

/// The socket that is at a path where one is to be made, if there is one.
///
/// # Errors
/// What stands in the way, in words.
fn socket_at(path: &Path) -> Result<Option<(UnixAddr, Metadata)>, String> {
    let address = UnixAddr::new(path).map_err(in_words)?;
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => Ok(Some((address, metadata))),
        Ok(_) => Err("it is there already, and is no socket".to_owned()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(reason(&error)),
    }
}

fn in_words(error: Errno) -> String {
    error.desc().to_owned()
}

fn open(address: &ListenAddress, all: &[ListenAddress]) -> nix::Result<Opened> {
    match address {
        ListenAddress::Inet(address) => {
            bind_inet(*address, all).and_then(|socket| begin(socket, None))
        }
        ListenAddress::Unix(path) => open_unix(path, SockType::Stream),
    }
}

fn bind_inet(address: SocketAddr, all: &[ListenAddress]) -> nix::Result<OwnedFd> {
    let family = match address.ip() {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
    let socket = match new_socket(family, SockType::Stream) {
        // All addresses of a machine without IPv6.
        Err(Errno::EAFNOSUPPORT)
            if address.ip().is_unspecified()
                && address.is_ipv6()
                && !all.contains(&ListenAddress::Inet(v4)) =>
        {
            return bind_inet(v4, all);
        }
        result => result?,
    };
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        // Where IPv4 has a socket of its own, this one would be in the way of it. Said in both cases, since the default is the
        // machine's to set (net.ipv6.bindv6only).
        let has_own = all.contains(&ListenAddress::Inet(v4));
        setsockopt(&socket, sockopt::Ipv6V6Only, &has_own)?;
    }
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(socket)
}

fn open_unix(path: &Path, kind: SockType) -> nix::Result<Opened> {
    let address = UnixAddr::new(path)?;
    remove_stale(path, &address, kind);
    let socket = new_socket(AddressFamily::Unix, kind)?;
    bind(socket.as_raw_fd(), &address)?;
    begin(socket, OwnFile::of(path))
}

/// Nobody may come in the time between bind(2) and chmod(2), so the mode is there from the start.
fn open_keepers(path: &Path) -> nix::Result<Opened> {
    let before = umask(Mode::all() & !(Mode::S_IRUSR | Mode::S_IWUSR));
    let opened = open_unix(path, SockType::SeqPacket);
    umask(before);
    opened
}

/// Who may come has signatures made, so it is with this as with a key's file. systemd lets everybody come, unless told otherwise.
fn check_mode(socket: &OwnedFd) -> Result<(), Error> {
    let address = getsockname::<UnixAddr>(socket.as_raw_fd());
    let path = address.as_ref().ok().and_then(UnixAddr::path);
    let Some(path) = path else {
        return Err(Error::Setup(
            "LISTEN_FDS: everybody may come to a socket that is no file: the keeper needs one with SocketMode=0600"
                .to_owned(),
        ));
    };
    let metadata = std::fs::metadata(path).map_err(|error| {
        let what = format!(
            "LISTEN_FDS: cannot see who may come to '{}'",
            path.display()
        );
        Error::setup(what, reason(&error))
    })?;
    if !is_for_everybody(&metadata) {
        return Ok(());
    }
    Err(Error::Setup(format!(
        "LISTEN_FDS: everybody may come to '{}' (mode {:04o}): the keeper needs SocketMode=0600",
        path.display(),
        metadata.mode() & 0o7777
    )))
}

/// Whoever shares a socket may have taken the client that poll(2) announced.
fn do_not_block(opened: &Opened) -> Result<(), Error> {
    let Opened { name, socket, .. } = opened;
    let flags = fcntl(socket, FcntlArg::F_GETFL).map(OFlag::from_bits_truncate);
    flags
        .and_then(|flags| fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)))
        .map(drop)
        .map_err(|error| Error::system(format!("cannot use socket {name}"), error.desc()))
}

fn new_socket(family: AddressFamily, kind: SockType) -> nix::Result<OwnedFd> {
    socket(family, kind, SockFlag::SOCK_CLOEXEC, None)
}

fn begin(socket: OwnedFd, file: Option<OwnFile>) -> nix::Result<Opened> {
    listen(&socket, Backlog::MAXCONN)?;
    Ok(Opened {
        file,
        name: name(socket.as_fd()),
        socket,
    })
}

/// A socket that nobody listens on any more is in the way. Anything else stays where it is, and binding says so.
fn remove_stale(path: &Path, address: &UnixAddr, kind: SockType) {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && probe(address, kind) == Err(Errno::ECONNREFUSED) {
        // Should it fail, binding says why.
        let _ = std::fs::remove_file(path);
    }
}

/// Who listens there, by user. Where so many are waiting that there is no room for us, somebody does.
///
/// # Errors
/// As connect(2): `ECONNREFUSED` where nobody does.
fn probe(address: &UnixAddr, kind: SockType) -> nix::Result<Option<u32>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let probe = socket(AddressFamily::Unix, kind, flags, None)?;
    match connect(probe.as_raw_fd(), address) {
        Ok(()) => getsockopt(&probe, sockopt::PeerCredentials).map(|whose| Some(whose.uid())),
        Err(Errno::EAGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the keeper service listens there, or could.
///
/// # Errors
/// Why not, in words.
pub(crate) fn examine_keepers(path: &Path) -> Result<&'static str, String> {
    let say = |why: String| format!("cannot be listened on: {why}");
    let can_be = || can_be_made(path).map(|()| "can be listened on");
    let Some((address, metadata)) = socket_at(path).map_err(say)? else {
        return can_be().map_err(say);
    };
    match probe(&address, SockType::SeqPacket) {
        Ok(Some(owner)) if !is_trusted(owner) => Err(distrust(owner)),
        Ok(_) if is_for_everybody(&metadata) => Err(format!(
            "is listened on, but everybody may come to it (mode {:04o}): the keeper needs SocketMode=0600",
            metadata.mode() & 0o7777
        )),
        Ok(_) => Ok("is listened on"),
        Err(Errno::ECONNREFUSED) => can_be().map_err(say),
        Err(error) => Err(say(in_words(error))),
    }
}

/// Connecting takes the right to write (unix(7)).
fn is_for_everybody(socket: &Metadata) -> bool {
    socket.mode() & Mode::S_IWOTH.bits() != 0
}

fn name(socket: BorrowedFd<'_>) -> String {
    let Ok(address) = getsockname::<SockaddrStorage>(socket.as_raw_fd()) else {
        return "a socket without name".to_owned();
    };
    match (
        inet(&address),
        address.as_unix_addr().and_then(UnixAddr::path),
    ) {
        (Some(address), _) => address.to_string(),
        (None, Some(path)) => format!("unix:{}", path.display()),
        (None, None) => "a unix socket".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys;

    fn open(texts: &[&str]) -> Result<Sockets, Error> {
        let addresses: Vec<ListenAddress> =
            texts.iter().map(|text| text.parse().unwrap()).collect();
        Sockets::open(&addresses, Vec::new())
    }

    /// Runs a test with a directory of its own.
    fn in_directory(test: impl FnOnce(&Path)) {
        let directory = nix::unistd::mkdtemp("/tmp/imap-tls-listen.XXXXXX").unwrap();
        test(&directory);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_unix_socket_that_nobody_listens_on_is_replaced_and_no_other_file() {
        in_directory(|directory| {
            let address = format!("unix:{}", directory.join("socket").display());
            // Left behind, as after kill -9.
            drop(open(&[&address]).unwrap());
            let mut sockets = open(&[&address]).unwrap();
            assert_eq!(sockets.to_string(), address);
            let message = open(&[&address]).unwrap_err().to_string();
            assert!(
                message.ends_with("(--listen): Address already in use"),
                "{message}"
            );
            sockets.close();
            assert!(!directory.join("socket").exists());
            std::fs::write(directory.join("socket"), b"precious").unwrap();
            assert!(open(&[&address]).is_err());
            assert_eq!(
                std::fs::read(directory.join("socket")).unwrap(),
                b"precious"
            );
        });
    }

    #[test]
    fn what_another_has_put_in_the_place_of_a_socket_stays() {
        in_directory(|directory| {
            let path = directory.join("socket");
            let mut sockets = open(&[&format!("unix:{}", path.display())]).unwrap();
            std::fs::remove_file(&path).unwrap();
            let another = std::os::unix::net::UnixListener::bind(&path).unwrap();
            sockets.close();
            assert!(path.exists());
            drop(another);
        });
    }

    #[test]
    fn where_the_keeper_is_to_listen_is_examined() {
        in_directory(|directory| {
            let path = directory.join("keeper");
            let mode = |mode| {
                use std::os::unix::fs::PermissionsExt as _;
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            };
            assert_eq!(examine_keepers(&path), Ok("can be listened on"));
            // Not with the mode, which takes umask(2), which is the whole process's.
            let keeper = open_unix(&path, SockType::SeqPacket).unwrap();
            mode(0o600);
            assert_eq!(examine_keepers(&path), Ok("is listened on"));
            mode(0o666);
            let why = examine_keepers(&path).unwrap_err();
            assert!(
                why.contains("everybody may come to it (mode 0666)"),
                "{why}"
            );
            mode(0o600);
            // Left behind, as after kill -9.
            drop(keeper);
            assert_eq!(examine_keepers(&path), Ok("can be listened on"));
            std::fs::remove_file(&path).unwrap();
            let stream = std::os::unix::net::UnixListener::bind(&path).unwrap();
            let why = examine_keepers(&path).unwrap_err();
            assert_eq!(why, "cannot be listened on: Protocol wrong type for socket");
            drop(stream);
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, b"precious").unwrap();
            let why = examine_keepers(&path).unwrap_err();
            assert_eq!(
                why,
                "cannot be listened on: it is there already, and is no socket"
            );
            let long = directory.join("x".repeat(120));
            let why = examine_keepers(&long).unwrap_err();
            assert_eq!(why, "cannot be listened on: File name too long");
        });
    }

    #[test]
    fn a_path_can_be_bound_where_its_directory_can_be_written_to() {
        const ENOENT: &str = "No such file or directory";
        for (path, expected) in [
            // Tests run where they may write.
            ("imap-tls.socket", Ok(())),
            ("/tmp/imap-tls.socket", Ok(())),
            ("none/imap-tls.socket", Err(ENOENT.to_owned())),
            ("/none/imap-tls.socket", Err(ENOENT.to_owned())),
        ] {
            let address = ListenAddress::Unix(path.into());
            assert_eq!(can_be_bound(&address, &[]), expected, "{path}");
        }
    }

    #[test]
    fn a_path_can_be_bound_where_nothing_is_or_nobody_listens_any_more() {
        in_directory(|directory| {
            let path = directory.join("socket");
            let examine = |path: &Path| can_be_bound(&ListenAddress::Unix(path.to_owned()), &[]);
            assert_eq!(examine(&path), Ok(()));
            let other = std::os::unix::net::UnixListener::bind(&path).unwrap();
            other.set_nonblocking(true).unwrap();
            assert_eq!(examine(&path), Err("Address already in use".to_owned()));
            // It is none of its clients who looks.
            assert!(other.accept().is_err());
            // Left behind, as after kill -9.
            drop(other);
            assert_eq!(examine(&path), Ok(()));
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, b"precious").unwrap();
            let why = examine(&path).unwrap_err();
            assert_eq!(why, "it is there already, and is no socket");
            let long = directory.join("x".repeat(120));
            assert_eq!(examine(&long), Err("File name too long".to_owned()));
        });
    }

    #[test]
    fn there_are_clients_or_there_are_none_and_nobody_waits() {
        let sockets = open(&["127.0.0.1:0"]).unwrap();
        let socket = sockets.descriptors().next().unwrap();
        assert_eq!(sys::accept(socket).unwrap_err(), Errno::EAGAIN);
        let client = std::net::TcpStream::connect(sockets.to_string()).unwrap();
        sys::accept(socket).unwrap();
        drop(client);
    }
}
