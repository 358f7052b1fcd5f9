//! Ticket keys on disk: a directory that we keep in order between all connections, or the administrator's file.
//!
//! ```text
//! DIR/        ours alone (owner, mode 0700); locked with flock(2) while its keys are replaced
//! DIR/keys    the set, replaced whole by rename(2); each connection reads it, one in half a day writes it
//! ```
//! The lock is the directory's own: there is no lock file that could be missing, foreign, or not to be made on a full disk.

use std::fs::{File, Metadata};
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::NixPath;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open, openat, renameat};
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, geteuid, mkdir, unlinkat};

use super::format::SET_LIMIT;
use super::{SURE_SECONDS, TicketKeys, is_yet_to_come};
use crate::error::reason;
use crate::files::check_mode;

const KEYS: &str = "keys";
/// What the next set is called until it is complete. One name is enough, as only the lock's holder writes.
const NEW_KEYS: &str = "keys.new";
/// The largest file of the administrator's: sixteen keys, and room for comments.
const TEXT_LIMIT: usize = 64 * 1024;
/// How long a connection waits for another one that is replacing the keys. That takes less than a thousandth of it, unless the
/// other was stopped; then a full handshake is better than a client that waits.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often it looks whether that is done.
const PAUSE: Duration = Duration::from_millis(2);

/// For a file that must not be a symbolic link, and that must not make us wait if it is a FIFO.
const READING: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_CLOEXEC)
    .union(OFlag::O_NOCTTY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_NONBLOCK);

/// What there is to seal and open with, and what the administrator should know.
#[derive(Debug, Default)]
pub(in crate::keeper) struct Loaded {
    /// None: no resumption in this connection.
    pub(in crate::keeper) keys: Option<TicketKeys>,
    /// Each names the path, the option, the reason and what mends it.
    pub(in crate::keeper) warnings: Vec<String>,
}

/// When keys are read, and until when there is to be one that seals: their reader may go on for hours. In seconds since the epoch.
#[derive(Clone, Copy)]
struct Times {
    now: u64,
    last: u64,
}

/// Reads the keys at `path`; in a directory they are made and rotated too. `now` is in seconds since the epoch, and `sealing` how many
/// seconds they are to seal, of which [`SURE_SECONDS`] count.
///
/// Takes no longer than [`PATIENCE`] and a few system calls, whatever other processes do.
pub(in crate::keeper) fn load(path: &Path, now: u64, sealing: u64) -> Loaded {
    let last = now.saturating_add(sealing.min(SURE_SECONDS));
    let (keys, faults) = match Named::open(path) {
        Ok(Named::Directory(directory)) => load_rotating(directory, Times { now, last }),
        Ok(Named::File(file)) => match load_fixed(file) {
            Ok(keys) => (Some(keys), vec![]),
            Err(why) => (None, vec![why]),
        },
        Err(why) => (None, vec![why]),
    };
    let warnings = faults
        .into_iter()
        .map(|why| format!("ticket keys '{}' (--ticket-keys): {why}", path.display()))
        .collect();
    Loaded { keys, warnings }
}

/// What `--ticket-keys` names.
enum Named {
    Directory(OwnedFd),
    File(File),
}

impl Named {
    /// Opens what is at `path`, or makes a directory there: /run is empty after a boot.
    fn open(path: &Path) -> Result<Self, String> {
        let opened = match open(path, READING, Mode::empty()) {
            Err(Errno::ENOENT) => {
                make_directory(path)?;
                open(path, READING, Mode::empty())
            }
            // Secrets are often handed out as links to files; that is as good here as for --key.
            Err(Errno::ELOOP) => open(path, READING.difference(OFlag::O_NOFOLLOW), Mode::empty())
                .and_then(|file| match File::from(file) {
                    file if file.metadata().is_ok_and(|metadata| metadata.is_file()) => {
                        Ok(file.into())
                    }
                    _ => Err(Errno::ELOOP),
                }),
            result => result,
        };
        let file = match opened {
            Ok(file) => File::from(file),
            Err(Errno::ELOOP) => {
                return Err(
                    "it is a symbolic link, but not to a file with keys: name the directory itself"
                        .to_owned(),
                );
            }
            Err(error) => return Err(format!("cannot open it: {}", error.desc())),
        };
        let metadata = metadata(&file)?;
        if metadata.is_dir() {
            check_is_ours_alone(&metadata)
                .map_err(|why| format!("{why}: make it ours alone (chown, chmod 0700)"))?;
            Ok(Self::Directory(file.into()))
        } else if metadata.is_file() {
            // The administrator's own secret, as for --key: a group may read it.
            check_mode(metadata.mode())?;
            Ok(Self::File(file))
        } else {
            Err("it is neither a directory nor a regular file".to_owned())
        }
    }
}

fn make_directory(path: &Path) -> Result<(), String> {
    match mkdir(path, Mode::S_IRWXU) {
        // EEXIST: another connection was faster.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(Errno::ENOENT) => Err(
            "neither it nor the directory that it would be in exists: make the latter".to_owned(),
        ),
        Err(error) => Err(format!("cannot make it: {}", error.desc())),
    }
}

fn metadata(file: &File) -> Result<Metadata, String> {
    file.metadata()
        .map_err(|error| format!("cannot look at it: {}", reason(&error)))
}

/// What others can write is not ours, and what they can read is no secret.
fn check_is_ours_alone(metadata: &Metadata) -> Result<(), String> {
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if owner != geteuid().as_raw() {
        Err(format!(
            "it belongs to uid {owner}, not to uid {}",
            geteuid()
        ))
    } else if mode & 0o077 != 0 {
        Err(format!("it is open to others (mode {mode:04o})"))
    } else {
        Ok(())
    }
}

/// Up to one octet more than `limit`, so that the caller sees what is too long.
fn read(file: File, limit: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(limit + 1);
    file.take(limit as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("cannot read it: {}", reason(&error)))?;
    Ok(bytes)
}

fn load_fixed(file: File) -> Result<TicketKeys, String> {
    let text = read(file, TEXT_LIMIT)?;
    if text.len() > TEXT_LIMIT {
        return Err(format!("it is larger than {TEXT_LIMIT} octets"));
    }
    TicketKeys::from_text(&text)
}

/// What is in a directory of ours.
enum State {
    /// A set with a key that seals for as long as is wanted.
    Fresh(TicketKeys),
    /// To be replaced. There may be keys in it that still open, and something that should be told.
    Stale(Option<TicketKeys>, Option<String>),
}

/// The keys in our directory, made or replaced if it is time; and what went wrong.
fn load_rotating(mut directory: OwnedFd, times: Times) -> (Option<TicketKeys>, Vec<String>) {
    let mut deadline = None;
    loop {
        let old = match look(&directory, times) {
            Ok(State::Fresh(keys)) => return (Some(keys), vec![]),
            Ok(State::Stale(old, _)) => old,
            Err(why) => return (None, vec![why]),
        };
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return replace_stale(&*locked, times),
            Err((unlocked, Errno::EWOULDBLOCK | Errno::EINTR)) => directory = unlocked,
            Err((_, error)) => {
                return (old, vec![format!("cannot lock it: {}", error.desc())]);
            }
        }
        // Another connection is at it; what it finds wrong, it tells.
        if Instant::now() >= *deadline.get_or_insert_with(|| Instant::now() + PATIENCE) {
            return (old, vec![]);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Looks again, now that nobody else writes, and replaces what still needs it.
fn replace_stale(directory: impl AsFd, times: Times) -> (Option<TicketKeys>, Vec<String>) {
    let (old, fault) = match look(&directory, times) {
        Ok(State::Fresh(keys)) => return (Some(keys), vec![]),
        Ok(State::Stale(old, fault)) => (old, fault),
        Err(why) => return (None, vec![why]),
    };
    let mut warnings: Vec<_> = fault.into_iter().collect();
    let Some(renewed) = TicketKeys::renewed(old.as_ref(), times.now, times.last) else {
        warnings.push("cannot make a key: the system has no random numbers".to_owned());
        return (old, warnings);
    };
    match replace(&directory, &renewed.encode()) {
        Ok(()) => (Some(renewed), warnings),
        // A key that nobody else will ever see is of no use; those from before are, while they last.
        Err(why) => {
            warnings.push(format!("cannot write '{KEYS}' in it: {why}"));
            (old, warnings)
        }
    }
}

/// What is there, in one open, one look and one read.
///
/// # Errors
/// The reason why that cannot be told, in which case nothing must be replaced: the set may be a good one.
fn look(directory: impl AsFd, times: Times) -> Result<State, String> {
    let damaged = |why: &str| {
        let why = format!("'{KEYS}' in it is not used but made new: {why}");
        Ok(State::Stale(None, Some(why)))
    };
    let file = match openat(directory, KEYS, READING, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT) => return Ok(State::Stale(None, None)),
        Err(Errno::ELOOP) => return damaged("it is a symbolic link"),
        Err(error) => return Err(format!("cannot open '{KEYS}' in it: {}", error.desc())),
    };
    let unreadable = |why: String| format!("'{KEYS}' in it: {why}");
    let metadata = metadata(&file).map_err(unreadable)?;
    if !metadata.is_file() {
        return damaged("it is no regular file");
    }
    if let Err(why) = check_is_ours_alone(&metadata) {
        return damaged(&why);
    }
    let Some(mut keys) = TicketKeys::decode(&read(file, SET_LIMIT).map_err(unreadable)?) else {
        return damaged("it is damaged");
    };
    let count = keys.keys.len();
    keys.keys
        .retain(|key| !is_yet_to_come(key.created, times.now));
    let fault = (keys.keys.len() < count).then(|| {
        format!("'{KEYS}' in it has a key from the future, which is replaced: was this machine's clock set back?")
    });
    if fault.is_none() && keys.sealing_key(times.last).is_some() {
        Ok(State::Fresh(keys))
    } else {
        let old = (!keys.keys.is_empty()).then_some(keys);
        Ok(State::Stale(old, fault))
    }
}

/// Puts a complete set in the place of the old one, or leaves that as it is.
///
/// Nothing is synced: after a power cut an incomplete file would be found out by its checksum and cost full handshakes, but a
/// slow disk would keep everybody who waits for the lock.
fn replace(directory: impl AsFd, bytes: &[u8]) -> Result<(), String> {
    // What a connection left that was killed at this point.
    match remove(&directory, NEW_KEYS) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(error) => return Err(error.desc().to_owned()),
    }
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let file =
        openat(&directory, NEW_KEYS, flags, mode).map_err(|error| error.desc().to_owned())?;
    let written = File::from(file)
        .write_all(bytes)
        .map_err(|error| reason(&error))
        .and_then(|()| {
            renameat(&directory, NEW_KEYS, &directory, KEYS)
                .map_err(|error| error.desc().to_owned())
        });
    if written.is_err() {
        // Best effort: the next one begins with it anyway.
        let _ = remove(&directory, NEW_KEYS);
    }
    written
}

fn remove(directory: impl AsFd, name: &(impl NixPath + ?Sized)) -> nix::Result<()> {
    unlinkat(directory, name, UnlinkatFlags::NoRemoveDir)
}
