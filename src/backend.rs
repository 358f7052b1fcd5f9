//! The makesock part: a socketpair, the launcher that waits with privileges, and the exec of the IMAP server.

mod environment;

use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{AccessFlags, Pid};

use environment::{environment, remove_balancer, set_addresses, set_user, tls_environment};

use crate::activation::{ADDRESSES_LENGTH, Addresses};
use crate::channel::Channel;
use crate::cli::BackendUserChoice;
use crate::error::{EXIT_SETUP, EXIT_TEMPORARY, Error, reason};
use crate::log::Log;
use crate::sandbox::{BackendUser, OwnUsers, close_all_but};
use crate::sys;
use crate::tls::{ClientIdentity, FACTS_LENGTH, Facts};

/// The program to become the backend: found, looked up and ready before anything is forked.
#[derive(Debug)]
pub(crate) struct Program {
    arguments: Vec<CString>,
    environment: Vec<CString>,
    path: CString,
    scope: Scope,
    user: User,
}

/// What there can be to tell a launcher, by the options: nobody may tell it more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope {
    pub(crate) certificates: ClientCertificates,
    pub(crate) origin: Origin,
}

/// Whether clients are asked for certificates (`--client-ca`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum ClientCertificates {
    Asked,
    NotAsked,
}

/// When in a connection a launcher's backend is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Phase {
    Cleartext,
    Secured,
}

/// Where the client's address comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Origin {
    /// A balancer's PROXY header, which the network process reads: the launcher is told.
    Header,
    /// The socket: nobody has to tell the launcher, and nobody may.
    Socket,
}

/// Whom the backend runs as.
#[derive(Debug)]
enum User {
    AsStarted,
    Known(BackendUser),
    /// The client's certificate says, but it may be none of these.
    OfCertificate(Option<OwnUsers>),
}

/// A process that will become the backend when told to, and the connection that it will have then.
#[derive(Debug)]
pub(crate) struct Launcher {
    channel: Channel,
    control: OwnedFd,
    process: Pid,
}

/// The IMAP server.
#[derive(Debug)]
pub(crate) struct Backend {
    pub(crate) channel: Channel,
    /// `None` for `--backend-fd`.
    pub(crate) process: Option<Pid>,
}

impl Program {
    /// Finds the program as execvp(3) would and prepares what it is started with.
    ///
    /// # Errors
    /// `Setup` if it is not there or cannot be executed, or its user is unknown or one of ours.
    pub(crate) fn prepare(
        command: &[OsString],
        user: &BackendUserChoice,
        own: Option<&OwnUsers>,
        scope: Scope,
    ) -> Result<Self, Error> {
        let user = match user {
            BackendUserChoice::AsStarted => User::AsStarted,
            BackendUserChoice::Named(name) => User::Known(BackendUser::look_up(name, own)?),
            BackendUserChoice::OfCertificate => User::OfCertificate(own.copied()),
        };
        let name = command.first().map_or(OsStr::new(""), OsString::as_os_str);
        let path = find_program(name)?;
        let arguments = command
            .iter()
            .map(|argument| c_string(argument.as_bytes()))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            arguments,
            environment: environment()?,
            path: c_string(path.as_os_str().as_bytes())?,
            scope,
            user,
        })
    }
}

fn c_string(bytes: &[u8]) -> Result<CString, Error> {
    CString::new(bytes)
        .map_err(|_| Error::Usage("BACKEND or an argument of it contains a zero octet".to_owned()))
}

fn find_program(name: &OsStr) -> Result<PathBuf, Error> {
    let fault = |why: &str| {
        Error::setup(
            format!(
                "cannot execute the IMAP server '{}' (BACKEND)",
                Path::new(name).display()
            ),
            why,
        )
    };
    if name.as_bytes().contains(&b'/') {
        return check_program(Path::new(name))
            .map(|()| name.into())
            .map_err(|why| fault(&why));
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| DEFAULT_PATH.into());
    let mut candidates = std::env::split_paths(&path).map(|directory| directory.join(name));
    candidates
        .find(|candidate| check_program(candidate).is_ok())
        .ok_or_else(|| fault("not found in PATH"))
}

/// Where programs are looked for when the superserver set no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn check_program(path: &Path) -> Result<(), String> {
    let metadata = std::fs::metadata(path).map_err(|error| reason(&error))?;
    if !metadata.is_file() {
        return Err("not a regular file".to_owned());
    }
    // access(2) says yes to root if anybody may execute it.
    let is_executable =
        metadata.mode() & 0o111 != 0 && nix::unistd::access(path, AccessFlags::X_OK).is_ok();
    if is_executable {
        Ok(())
    } else {
        Err("Permission denied".to_owned())
    }
}

/// The launcher's record: one octet for what to do, then the client's addresses, zero where they are the socket's, then the facts,
/// zero where there is no TLS.
const RECORD_LENGTH: usize = 1 + ADDRESSES_LENGTH + FACTS_LENGTH;
const GO_CLEARTEXT: u8 = 1;
const GO_TLS: u8 = 2;

impl Launcher {
    /// Forks the launcher.
    ///
    /// # Errors
    /// `System` if there is no process or socket to be had.
    pub(crate) fn start(
        program: &Program,
        phase: Phase,
        addresses: Option<&Addresses>,
        log: &Log,
    ) -> Result<Self, Error> {
        let pair = |kind| {
            socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|error| Error::system("cannot make the backend's socket", error.desc()))
        };
        let (ours, theirs) = pair(SockType::Stream)?;
        let (control, controlled) = pair(SockType::SeqPacket)?;
        let launch = || launch(program, phase, addresses, log, &controlled, &theirs);
        let process = sys::fork_into(launch).map_err(|error| {
            Error::system("cannot start the backend's launcher", reason(&error))
        })?;
        Ok(Self {
            channel: Channel::new(ours, None),
            control,
            process,
        })
    }

    /// The descriptors that the network process keeps for this launcher.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.channel.descriptors().chain([self.control.as_fd()])
    }

    /// Tells the launcher to become the backend, what is known about TLS, and whose the connection is if a header said so.
    /// Should the launcher be gone, the backend's end of file tells.
    pub(crate) fn go(self, facts: Option<&Facts>, addresses: Option<&Addresses>) -> Backend {
        let record = encode(facts, addresses);
        let control = self.control.as_raw_fd();
        let _ = sys::uninterrupted(|| send(control, &record, MsgFlags::MSG_NOSIGNAL));
        Backend {
            channel: self.channel,
            process: Some(self.process),
        }
    }
}

fn encode(facts: Option<&Facts>, addresses: Option<&Addresses>) -> Vec<u8> {
    let (what, facts) = match facts {
        Some(facts) => (GO_TLS, facts.encode()),
        None => (GO_CLEARTEXT, [0; FACTS_LENGTH]),
    };
    [&[what], Addresses::encode(addresses).as_slice(), &facts].concat()
}

#[cfg(any(test, fuzzing))]
impl Launcher {
    /// For tests within one process: whoever has the other ends plays the launcher and the backend.
    pub(crate) fn pretended(channel: Channel, control: OwnedFd, process: Pid) -> Self {
        Self {
            channel,
            control,
            process,
        }
    }
}

/// The launcher's life: it waits, with privileges, for one record of fixed size, and becomes the backend or ends.
fn launch(
    program: &Program,
    phase: Phase,
    addresses: Option<&Addresses>,
    log: &Log,
    control: &OwnedFd,
    socket: &OwnedFd,
) -> u8 {
    let mut kept = vec![control.as_fd(), socket.as_fd()];
    kept.extend(log.descriptor());
    if close_all_but(&kept).is_err() {
        return EXIT_TEMPORARY;
    }
    let mut record = [0; RECORD_LENGTH + 1];
    let number = control.as_raw_fd();
    let received = sys::uninterrupted(|| recv(number, &mut record, MsgFlags::empty()));
    let Ok(length) = received else {
        return EXIT_TEMPORARY;
    };
    let told = match length {
        // Released without having been needed: no TLS, no backend.
        0 => return 0,
        RECORD_LENGTH => Told::decode(&record, program.scope, phase),
        _ => None,
    };
    let Some(told) = told else {
        return refuse_record(log);
    };
    let mut environment = program.environment.clone();
    if let Some(addresses) = &told.addresses {
        log.set_subject(&addresses.peer);
        remove_balancer(&mut environment);
    }
    if let Some(addresses) = told.addresses.as_ref().or(addresses) {
        set_addresses(&mut environment, addresses);
    }
    become_backend(program, environment, log, socket, told.facts.as_ref())
}

/// What the launcher is told.
struct Told {
    /// `None`: the socket's.
    addresses: Option<Addresses>,
    facts: Option<Facts>,
}

impl Told {
    /// The content of a record, checked: who reads it has privileges, who wrote it has none.
    fn decode(record: &[u8], scope: Scope, phase: Phase) -> Option<Self> {
        let (what, rest) = record.split_first()?;
        let (addresses, rest) = rest.split_first_chunk()?;
        let addresses = Addresses::decode(addresses)?;
        if scope.origin == Origin::Socket && addresses.is_some() {
            return None;
        }
        let facts = match (*what, phase) {
            (GO_CLEARTEXT, Phase::Cleartext) => None,
            (GO_TLS, Phase::Secured) => Some(Facts::decode(rest.first_chunk()?)?),
            _ => return None,
        };
        let has_client = facts.as_ref().and_then(Facts::client).is_some();
        if scope.certificates == ClientCertificates::NotAsked && has_client {
            return None;
        }
        Some(Self { addresses, facts })
    }
}

fn refuse_record(log: &Log) -> u8 {
    log.error("the network process sent a record that it cannot have made in good faith: no backend is started");
    EXIT_TEMPORARY
}

fn become_backend(
    program: &Program,
    mut environment: Vec<CString>,
    log: &Log,
    socket: &OwnedFd,
    facts: Option<&Facts>,
) -> u8 {
    environment.extend(facts.map(tls_environment).unwrap_or_default());
    let prepared = choose_user(program, facts)
        .and_then(|user| {
            if let Some(user) = &user {
                set_user(&mut environment, user);
                user.assume()?;
            }
            Ok(())
        })
        .and_then(|()| {
            // After the ids: changing them clears it. Should the network process be killed, the backend is told to end, and not only
            // by its end of file: where the dying process might have sent a signal itself, so not to another user nor past Landlock.
            nix::sys::prctl::set_pdeathsig(Signal::SIGTERM).map_err(|error| {
                Error::system(
                    "cannot tie the backend to its network process",
                    error.desc(),
                )
            })
        });
    if let Err(error) = prepared {
        log.error(&error);
        return error.exit_status();
    }
    let result = sys::reset_signals().and_then(|()| {
        sys::become_program(
            socket.as_fd(),
            log.descriptor(),
            &program.path,
            &program.arguments,
            &environment,
        )
    });
    let Err(error) = result;
    log.error(Error::setup(
        format!(
            "cannot execute the IMAP server '{}' (BACKEND)",
            program.path.to_string_lossy()
        ),
        reason(&error),
    ));
    EXIT_SETUP
}

/// Security: the network process examined the certificate, so a hole in it could name any user. It could not name root, nor our own.
fn choose_user(program: &Program, facts: Option<&Facts>) -> Result<Option<BackendUser>, Error> {
    match &program.user {
        User::AsStarted => Ok(None),
        User::Known(user) => Ok(Some(user.clone())),
        User::OfCertificate(own) => {
            let name = facts.and_then(Facts::client).and_then(ClientIdentity::user);
            name.ok_or_else(|| {
                Error::Client(
                    "the client's certificate names no user (--backend-user-from-cert)".to_owned(),
                )
            })
            .and_then(|name| BackendUser::look_up_unprivileged(name, own.as_ref()))
            .map(Some)
        }
    }
}

impl Backend {
    /// Nobody: what stands in the place of a backend that was handed over.
    pub(crate) fn gone() -> Self {
        Self {
            channel: Channel::closed(),
            process: None,
        }
    }

    /// Hands the backend over, leaving nobody.
    pub(crate) fn take(&mut self) -> Self {
        std::mem::replace(self, Self::gone())
    }
}

/// For fuzz targets.
#[cfg(fuzzing)]
#[allow(missing_docs)]
pub mod door {
    use super::*;

    pub const RECORD_LENGTH: usize = super::RECORD_LENGTH;

    /// What a launcher makes of a record.
    #[derive(Debug, Eq, PartialEq)]
    pub struct Read {
        pub addresses: Option<Addresses>,
        /// What is added to the backend's environment.
        pub environment: Vec<CString>,
        /// The user that the client's certificate names.
        pub user: Option<String>,
        /// The record as the network process would make it.
        pub encoded: Vec<u8>,
    }

    /// `behind`: whether the addresses come from a PROXY header. `asks`: whether clients are asked for certificates.
    pub fn read(record: &[u8], behind: bool, asks: bool) -> Option<Read> {
        let scope = Scope {
            certificates: if asks {
                ClientCertificates::Asked
            } else {
                ClientCertificates::NotAsked
            },
            origin: if behind {
                Origin::Header
            } else {
                Origin::Socket
            },
        };
        let mut takers = [Phase::Cleartext, Phase::Secured]
            .into_iter()
            .filter_map(|phase| Told::decode(record, scope, phase));
        let told = takers.next()?;
        assert!(takers.next().is_none(), "either launcher takes it");
        let mut environment = Vec::new();
        if let Some(addresses) = &told.addresses {
            set_addresses(&mut environment, addresses);
        }
        environment.extend(told.facts.iter().flat_map(tls_environment));
        let user = told.facts.as_ref().and_then(Facts::client);
        Some(Read {
            user: user.and_then(ClientIdentity::user).map(str::to_owned),
            encoded: encode(told.facts.as_ref(), told.addresses.as_ref()),
            addresses: told.addresses,
            environment,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(what: u8, family: u8) -> Vec<u8> {
        let mut record = vec![0; RECORD_LENGTH];
        record[0] = what;
        record[1] = family;
        record
    }

    fn scope(certificates: ClientCertificates, origin: Origin) -> Scope {
        Scope {
            certificates,
            origin,
        }
    }

    #[test]
    fn a_launcher_is_told_addresses_only_where_a_header_has_them() {
        const IPV6: u8 = 6;
        let told = |family, origin| {
            let scope = scope(ClientCertificates::NotAsked, origin);
            Told::decode(&record(GO_CLEARTEXT, family), scope, Phase::Cleartext)
        };
        assert!(told(0, Origin::Socket).is_some_and(|told| told.addresses.is_none()));
        assert!(told(0, Origin::Header).is_some_and(|told| told.addresses.is_none()));
        assert!(told(IPV6, Origin::Header).is_some_and(|told| told.addresses.is_some()));
        assert!(told(IPV6, Origin::Socket).is_none());
        assert!(told(4, Origin::Header).is_none());
    }

    #[test]
    fn a_launcher_is_told_of_a_client_only_where_certificates_are_asked_for() {
        const IS_CLIENT_KNOWN: usize = 1 + ADDRESSES_LENGTH + 7;
        let told = |known, certificates| {
            let mut record = record(GO_TLS, 0);
            record[IS_CLIENT_KNOWN] = known;
            Told::decode(&record, scope(certificates, Origin::Socket), Phase::Secured)
        };
        let has_client = |told: Told| told.facts.unwrap().client().is_some();
        let (asked, not_asked) = (ClientCertificates::Asked, ClientCertificates::NotAsked);
        assert_eq!(told(0, asked).map(has_client), Some(false));
        assert_eq!(told(1, asked).map(has_client), Some(true));
        assert_eq!(told(0, not_asked).map(has_client), Some(false));
        assert_eq!(told(1, not_asked).map(has_client), None);
    }

    #[test]
    fn a_launcher_takes_the_order_of_its_own_phase_alone() {
        let scope = scope(ClientCertificates::Asked, Origin::Header);
        for (order, phase, is_secured) in [
            (GO_CLEARTEXT, Phase::Cleartext, Some(false)),
            (GO_CLEARTEXT, Phase::Secured, None),
            (GO_TLS, Phase::Cleartext, None),
            (GO_TLS, Phase::Secured, Some(true)),
            (3, Phase::Cleartext, None),
            (3, Phase::Secured, None),
        ] {
            let told = Told::decode(&record(order, 0), scope, phase);
            assert_eq!(
                told.map(|told| told.facts.is_some()),
                is_secured,
                "{order} {phase:?}"
            );
        }
    }
}
