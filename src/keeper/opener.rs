//! The opener (`--cert-dir`): a privileged process that reads the files for one name from the directory, and hands their
//! bytes to the keeper.
//!
//! Which name is known only when the client has spoken, and by then nobody else may open files. Opening all of them before would
//! cost each connection as much as there are names. So this process waits, like the launcher, for a record of fixed size:
//! a host name, checked again here before it becomes part of a path. It parses nothing else, its system calls are few,
//! and it ends with the keeper.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::socket::{MsgFlags, SockType, recv, send};
use nix::sys::stat::Mode;

use super::message::{put, take};
use super::store::Unparsed;
use super::{receive_whole, socket_pair};
use crate::error::{EXIT_SETUP, EXIT_TEMPORARY, Error, reason};
use crate::files::{Place, any_mode, check_mode, read_open};
use crate::host_name::{HostName, NAME_LIMIT};
use crate::sandbox::{self, BoundingSet};
use crate::sys;

/// The keeper's end of the way to the opener.
#[derive(Debug)]
pub(crate) struct Opener {
    /// It has ended, or did not answer in time: what it says later would be taken for the answer to another question.
    is_lost: Cell<bool>,
    socket: OwnedFd,
}

/// A length, and room for the longest name.
const RECORD_LENGTH: usize = 1 + NAME_LIMIT;
/// The largest file of a directory: both of a name have to fit a message.
const FILE_LIMIT: u64 = 48 * 1024;
/// How many names are looked up.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lookups {
    /// For one connection: the client's, its wildcard and the wildcard's domain.
    Few,
    /// For the listener's connections; the keeper allows each a [`Lookups::Few`].
    Unbounded,
}

impl Lookups {
    fn number(self) -> usize {
        match self {
            Self::Few => 3,
            Self::Unbounded => usize::MAX,
        }
    }
}
const OPTION: &str = "--cert-dir";
/// How long the keeper waits for an answer: less than whoever waits for the keeper's, who is told why there is none.
const ANSWER_SECONDS: i64 = super::ANSWER_SECONDS - 3;

const ABSENT: u8 = 0;
const FAULT: u8 = 1;
const ONE_FILE: u8 = 2;
const TWO_FILES: u8 = 3;

impl Opener {
    /// Opens the directory and forks the opener.
    ///
    /// # Errors
    /// `Setup` if the directory is none, or not ours alone to write to; `System` if there is no process to be had.
    pub(crate) fn start(
        path: &Path,
        bounding_set: BoundingSet,
        lookups: Lookups,
    ) -> Result<Self, Error> {
        let directory = open_directory(path)?;
        let (ours, theirs) = socket_pair(SockType::SeqPacket, ANSWER_SECONDS)?;
        let opener = || {
            // The listener's, like its keeper.
            if matches!(lookups, Lookups::Unbounded) {
                sys::leave_process_group();
            }
            run(&theirs, &directory, path, bounding_set, lookups)
        };
        sys::fork_into(opener)
            .map_err(|error| Error::system("cannot start the opener", reason(&error)))?;
        Ok(Self {
            is_lost: Cell::new(false),
            socket: ours,
        })
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether it is of no use any more.
    pub(super) fn is_lost(&self) -> bool {
        self.is_lost.get()
    }

    /// What is filed under exactly this name.
    ///
    /// # Errors
    /// In words for the log: there is something, but it cannot be read.
    pub(super) fn find(&self, name: &HostName) -> Result<Option<Unparsed>, String> {
        let mut record = [0; RECORD_LENGTH];
        let text = name.as_str().as_bytes();
        let length = u8::try_from(text.len()).map_err(|_| "a name of that length is none")?;
        for (to, from) in record.iter_mut().zip([length].iter().chain(text)) {
            *to = *from;
        }
        let reply = self.ask(&record).map_err(|error| {
            self.is_lost.set(true);
            format!("no answer from the opener: {}", reason(&error))
        })?;
        decode(&reply).ok_or("the opener's answer is none")?
    }

    fn ask(&self, record: &[u8]) -> io::Result<Vec<u8>> {
        let number = self.socket.as_raw_fd();
        sys::uninterrupted(|| send(number, record, MsgFlags::MSG_NOSIGNAL))?;
        receive_whole(self.socket.as_fd())
    }
}

fn decode(reply: &[u8]) -> Option<Result<Option<Unparsed>, String>> {
    let (&kind, mut rest) = reply.split_first()?;
    let path = String::from_utf8_lossy(take(&mut rest)?).into_owned();
    let certificate = take(&mut rest)?.to_vec();
    let found = match kind {
        ABSENT => None,
        FAULT => return Some(Err(String::from_utf8_lossy(&certificate).into_owned())),
        ONE_FILE => Some(Unparsed::of_one_file(path, OPTION, certificate, Ok(()))),
        TWO_FILES => {
            let place = |what, file| Place {
                what,
                path: format!("{path}/{file}"),
                option: OPTION,
            };
            Some(Unparsed {
                certificate: (place("certificate", CHAIN_FILE), certificate),
                key: (place("private key", KEY_FILE), take(&mut rest)?.to_vec()),
                mode: Ok(()),
            })
        }
        _ => return None,
    };
    Some(Ok(found))
}

/// As certbot and its like lay a name's files out.
pub(crate) const CHAIN_FILE: &str = "fullchain.pem";
pub(crate) const KEY_FILE: &str = "privkey.pem";

fn open_directory(path: &Path) -> Result<OwnedFd, Error> {
    let fault = |why: String| {
        Error::setup(
            format!("cannot use directory '{}' ({OPTION})", path.display()),
            why,
        )
    };
    let directory = File::options()
        .read(true)
        .custom_flags(libc::O_DIRECTORY)
        .open(path)
        .map_err(|error| fault(reason(&error)))?;
    let metadata = directory
        .metadata()
        .map_err(|error| fault(reason(&error)))?;
    if metadata.mode() & 0o022 != 0 {
        return Err(fault(format!(
            "others than its owner can write to it (mode {:04o}): chmod go-w it",
            metadata.mode() & 0o7777
        )));
    }
    Ok(directory.into())
}

/// The opener's life; returns its exit status.
fn run(
    socket: &OwnedFd,
    directory: &OwnedFd,
    path: &Path,
    bounding_set: BoundingSet,
    lookups: Lookups,
) -> u8 {
    if sandbox::confine_opener(bounding_set, &[socket.as_fd(), directory.as_fd()]).is_err() {
        return EXIT_SETUP;
    }
    for _ in 0..lookups.number() {
        let mut record = [0; RECORD_LENGTH + 1];
        let received =
            sys::uninterrupted(|| recv(socket.as_raw_fd(), &mut record, MsgFlags::empty()));
        let name = match received {
            Ok(0) => return 0,
            Ok(RECORD_LENGTH) => decode_record(&record),
            Ok(_) | Err(_) => None,
        };
        let Some(name) = name else {
            return EXIT_TEMPORARY;
        };
        let reply = look_up(directory.as_fd(), path, &name);
        let is_sent =
            sys::uninterrupted(|| send(socket.as_raw_fd(), &reply, MsgFlags::MSG_NOSIGNAL));
        if is_sent.is_err() {
            return EXIT_TEMPORARY;
        }
    }
    0
}

/// Security: who writes the record may be an attacker in the keeper's place; what comes out is a path component.
fn decode_record(record: &[u8]) -> Option<HostName> {
    let (&length, name) = record.split_first()?;
    let name = std::str::from_utf8(name.get(..usize::from(length))?).ok()?;
    HostName::or_wildcard(name)
}

/// `NAME.pem`, which holds both, or `NAME/fullchain.pem` and `NAME/privkey.pem`.
fn look_up(directory: BorrowedFd<'_>, path: &Path, name: &HostName) -> Vec<u8> {
    let one = format!("{name}.pem");
    let (chain, key) = (format!("{name}/{CHAIN_FILE}"), format!("{name}/{KEY_FILE}"));
    match read_at(directory, &one, check_mode) {
        Ok(Some(bytes)) => return encode(ONE_FILE, &path.join(&one), &[&bytes]),
        Ok(None) => {}
        Err(why) => return encode_fault(path, &one, &why),
    }
    match read_at(directory, &chain, any_mode) {
        Ok(None) if is_present(directory, &key) || is_broken_link(directory, name.as_str()) => {
            encode_fault(path, &chain, Errno::ENOENT.desc())
        }
        Ok(None) => encode(ABSENT, path, &[&[]]),
        Ok(Some(chain)) => match read_at(directory, &key, check_mode) {
            Ok(Some(key)) => encode(TWO_FILES, &path.join(name.as_str()), &[&chain, &key]),
            Ok(None) => encode_fault(path, &key, Errno::ENOENT.desc()),
            Err(why) => encode_fault(path, &key, &why),
        },
        Err(why) => encode_fault(path, &chain, &why),
    }
}

fn encode(kind: u8, path: &Path, files: &[&[u8]]) -> Vec<u8> {
    let mut reply = vec![kind];
    put(&mut reply, path.as_os_str().as_encoded_bytes());
    for file in files {
        put(&mut reply, file);
    }
    reply
}

fn encode_fault(path: &Path, file: &str, why: &str) -> Vec<u8> {
    let text = format!(
        "cannot read '{}' ({OPTION}): {why}",
        path.join(file).display()
    );
    encode(FAULT, path, &[text.as_bytes()])
}

/// The file's content; `None` if there is no such file.
fn read_at(
    directory: BorrowedFd<'_>,
    path: &str,
    check: fn(u32) -> Result<(), String>,
) -> Result<Option<Vec<u8>>, String> {
    // Not blocking: in the place of a file there could be a pipe that nobody writes to.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK;
    match sys::uninterrupted(|| nix::fcntl::openat(directory, path, flags, Mode::empty())) {
        Ok(file) => {
            let (bytes, mode) = read_open(file.into(), FILE_LIMIT)?;
            check(mode).map(|()| Some(bytes))
        }
        Err(Errno::ENOENT) if is_present(directory, path) => {
            Err("it is a symbolic link to nowhere".to_owned())
        }
        // Not every name of a server's can be one of a file's.
        Err(Errno::ENAMETOOLONG | Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(error) => Err(error.desc().to_owned()),
    }
}

/// Whether there is something of that name, though maybe nothing to be opened: somebody meant a certificate to be there, and no
/// other may be shown in its place.
fn is_present(directory: BorrowedFd<'_>, path: &str) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::openat(directory, path, flags, Mode::empty()).is_ok()
}

fn is_broken_link(directory: BorrowedFd<'_>, path: &str) -> bool {
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
    let target = nix::fcntl::openat(directory, path, flags, Mode::empty());
    target.is_err() && is_present(directory, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> [u8; RECORD_LENGTH] {
        let mut record = [0; RECORD_LENGTH];
        record[0] = u8::try_from(name.len()).unwrap();
        record[1..=name.len()].copy_from_slice(name.as_bytes());
        record
    }

    #[test]
    fn a_record_that_is_no_name_opens_nothing() {
        for name in [
            "",
            "..",
            "../../etc/shadow",
            "a/b",
            ".hidden",
            "a..b",
            "a\0b",
            "*",
            "a.*",
        ] {
            assert_eq!(decode_record(&record(name)), None, "{name:?}");
        }
        for name in ["mail.example", "*.example"] {
            assert_eq!(decode_record(&record(name)).unwrap().as_str(), name);
        }
        let mut too_long = record("mail.example");
        too_long[0] = 255;
        assert_eq!(decode_record(&too_long), None);
    }

    #[test]
    fn files_are_found_where_certbot_or_haproxy_put_them() {
        let made = nix::unistd::mkdtemp("/tmp/imap-tls-opener.XXXXXX").unwrap();
        let write = |name: &str, text: &str| {
            use std::os::unix::fs::OpenOptionsExt as _;
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(made.join(name))
                .unwrap();
            std::io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        };
        write("one.example.pem", "both");
        std::fs::create_dir(made.join("two.example")).unwrap();
        write("two.example/fullchain.pem", "chain");
        std::fs::create_dir(made.join("half.example")).unwrap();
        write("half.example/fullchain.pem", "chain");
        write("two.example/privkey.pem", "key");
        let directory = open_directory(&made).unwrap();
        let found = |name: &str| {
            let name = HostName::or_wildcard(name).unwrap();
            decode(&look_up(directory.as_fd(), &made, &name)).unwrap()
        };
        let one = found("one.example").unwrap().unwrap();
        assert_eq!(
            (one.certificate.1.as_slice(), one.key.1.as_slice()),
            (b"both".as_slice(), b"both".as_slice())
        );
        let two = found("two.example").unwrap().unwrap();
        assert_eq!(
            (two.certificate.1.as_slice(), two.key.1.as_slice()),
            (b"chain".as_slice(), b"key".as_slice())
        );
        assert!(
            two.key
                .0
                .to_string()
                .ends_with("/two.example/privkey.pem' (--cert-dir)")
        );
        assert!(found("none.example").unwrap().is_none());
        std::fs::create_dir(made.join("key.example")).unwrap();
        write("key.example/privkey.pem", "key");
        std::os::unix::fs::symlink("/nowhere", made.join("link.example")).unwrap();
        std::os::unix::fs::symlink("/nowhere", made.join("file.example.pem")).unwrap();
        for (name, end) in [
            (
                "half.example",
                "/half.example/privkey.pem' (--cert-dir): No such file or directory",
            ),
            (
                "key.example",
                "/key.example/fullchain.pem' (--cert-dir): No such file or directory",
            ),
            (
                "link.example",
                "/link.example/fullchain.pem' (--cert-dir): No such file or directory",
            ),
            (
                "file.example",
                "/file.example.pem' (--cert-dir): it is a symbolic link to nowhere",
            ),
        ] {
            let Err(why) = found(name) else {
                panic!("{name}")
            };
            assert!(why.ends_with(end), "{why}");
        }
        // A name of a server's that is too long for one of a file's.
        let label = "a".repeat(62);
        let longest = format!("{label}.{label}.{label}.{label}.b");
        assert_eq!(longest.len(), 253);
        assert!(found(&longest).unwrap().is_none());
        std::fs::remove_dir_all(&made).unwrap();
    }
}
