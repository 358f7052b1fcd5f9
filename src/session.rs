//! The story of one connection, top to bottom; the only file that knows all the others.

use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use crate::activation::{self, Addresses, Connection, Stderr};
use crate::backend::{Backend, Launcher, Program};
use crate::channel::Channel;
use crate::check::{self, check};
use crate::cli::{self, BackendChoice, Options, Request, Separation};
use crate::error::{EXIT_SETUP, Error, reason};
use crate::imap::Policy;
use crate::log::{Destination, Log, Verbosity};
use crate::relay::{self, BackendSource, Children, Parts};
use crate::sandbox::{self, BoundingSet, Confinement, FileGrowth, Identity, Plan, Role};
use crate::setup::{set_up_tls, start_keeper};
use crate::sys;
use crate::tls::examine_processor;
use crate::trust::Trust;

/// Runs the program; returns its exit status.
pub(crate) fn run() -> u8 {
    // First of all, before anything can be printed: under inetd, fd 2 is the client's socket.
    let stderr = activation::secure_stderr().unwrap_or(Stderr::Unusable);
    match cli::parse(std::env::args_os(), nix::unistd::geteuid().is_root()) {
        Ok(Request::Serve(options)) => serve(&options, stderr),
        Ok(Request::Check(options, format)) => {
            let report = options.map_or_else(
                |error| check::Report::of_usage(&error),
                |options| check(&options),
            );
            show(&report.write(format)).max(report.exit_status())
        }
        Ok(Request::Show(text)) => show(&text),
        Err(error) => refuse(&error, stderr),
    }
}

/// Help is for a terminal or a pager, never for a client.
fn show(text: &str) -> u8 {
    let mut stdout = std::io::stdout();
    let is_clients = crate::channel::is_socket(stdout.as_fd());
    let is_shown = !is_clients
        && stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
            .is_ok();
    if is_shown { 0 } else { EXIT_SETUP }
}

/// The options make no sense, so the policy is not known either; port 993 is guessed by the word.
fn refuse(error: &Error, stderr: Stderr) -> u8 {
    let mut log = Log::open(
        Destination::Auto,
        Verbosity::Normal,
        stderr == Stderr::Usable,
    );
    let mut words = std::env::args_os().chain(std::env::var_os("IMAP_TLS_TLS"));
    let is_implicit = words.any(|word| word.to_string_lossy().contains("implicit"));
    if let Ok(mut connection) = Connection::take() {
        log.set_subject(&connection);
        connection.part(if is_implicit { b"" } else { UNAVAILABLE });
    }
    log.error(error);
    error.exit_status()
}

/// What a client is told when the fault is ours (RFC 5530 section 3).
const UNAVAILABLE: &[u8] =
    b"* BYE [UNAVAILABLE] the server is not set up correctly, try again later\r\n";

fn serve(options: &Options, stderr: Stderr) -> u8 {
    let mut log = Log::open(
        options.destination,
        options.verbosity,
        stderr == Stderr::Usable,
    );
    let mut connection = match Connection::take() {
        Ok(connection) => connection,
        Err(error) => {
            log.error(&error);
            return error.exit_status();
        }
    };
    log.set_subject(&connection);
    match session(options, &log, &mut connection) {
        Ok(report) => {
            log.info(&report);
            report.exit_status()
        }
        Err(error) => {
            log.error(&error);
            connection.part(if options.policy == Policy::Implicit {
                b""
            } else {
                UNAVAILABLE
            });
            error.exit_status()
        }
    }
}

/// Everything that needs privileges, then the sandbox, then the client.
fn session(
    options: &Options,
    log: &Log,
    connection: &mut Connection,
) -> Result<relay::Report, Error> {
    Children::expect()?;
    let mut plans = Plans::look_up(options, log)?;
    let trust = options.client_auth.as_ref().map(Trust::read).transpose()?;
    let backend = start_backend(options, connection.addresses.as_ref(), log)?;
    plans.keeper.bounding_set = BoundingSet::empty();
    plans.network.bounding_set = plans.keeper.bounding_set;
    // Here, so that it is done once for the keeper and for us: what it takes on a virtual machine is a good part of a fork.
    examine_processor();
    let keeper = start_keeper(options, trust.as_ref(), plans.keeper)?;
    // After the forks, which would hand the blocked signals down.
    let children = Children::watch()?;
    let sandboxed = {
        let mut kept: Vec<BorrowedFd<'_>> = connection
            .channel
            .descriptors()
            .chain(backend.descriptors())
            .collect();
        kept.extend(log.descriptor());
        kept.push(children.descriptor());
        keeper
            .with_descriptor(|keeper| {
                let kept: Vec<_> = kept.iter().copied().chain([keeper]).collect();
                sandbox::enter(Role::Network, plans.network, &kept)
            })
            .unwrap_or_else(|| Err(Error::System("the keeper's socket is gone".to_owned())))?
    };
    let tls = keeper.introduction().and_then(|offer| {
        for warning in &offer.warnings {
            log.warning(warning);
        }
        set_up_tls(options, offer, trust.as_ref())
    });
    // Revocation lists may be large, and have been parsed.
    drop(trust);
    let result = tls.map(|tls| {
        let parts = Parts {
            backend,
            children: &children,
            client: &mut connection.channel,
            handshake_timeout: options.handshake_timeout,
            keeper: &keeper,
            log,
            login_timeout: options.login_timeout,
            policy: options.policy,
            tls,
        };
        relay::relay(parts, &sandboxed)
    });
    // Whoever is still there was let go of, and ends at end of file.
    keeper.release();
    children.reap_rest(REAP_LIMIT);
    result
}

/// How long our own processes, which have nothing more to do, may take to end.
const REAP_LIMIT: Duration = Duration::from_secs(1);

/// What a program needs is not needed here any more once its launchers have it.
fn start_backend(
    options: &Options,
    addresses: Option<&Addresses>,
    log: &Log,
) -> Result<BackendSource, Error> {
    match &options.backend {
        BackendChoice::Program { command, user } => {
            let program = Program::prepare(command, user, addresses)?;
            Ok(BackendSource::Launchers {
                cleartext: (options.policy == Policy::Optional)
                    .then(|| Launcher::start(&program, log))
                    .transpose()?,
                secured: Launcher::start(&program, log)?,
            })
        }
        BackendChoice::Descriptor(number) => {
            let fault = |error| {
                Error::setup(
                    format!("cannot use descriptor {number} as the backend (--backend-fd)"),
                    reason(&error),
                )
            };
            let descriptor = sys::own_descriptor(*number).map_err(fault)?;
            let descriptor = sys::duplicate(descriptor.as_fd()).map_err(fault)?;
            Ok(BackendSource::Descriptor(Backend {
                channel: Channel::new(descriptor, None),
                process: None,
            }))
        }
    }
}

/// How each of the confined processes is to be confined.
struct Plans {
    keeper: Plan,
    network: Plan,
}

impl Plans {
    fn look_up(options: &Options, log: &Log) -> Result<Self, Error> {
        let growth = if log.is_regular_file() {
            FileGrowth::Allowed
        } else {
            FileGrowth::Forbidden
        };
        let plan = |confinement, file_growth| Plan {
            bounding_set: BoundingSet::Full,
            confinement,
            file_growth,
            memory_limit: options.memory_limit,
        };
        match &options.separation {
            Separation::Unprivileged => {
                log.warning(
                    "unprivileged: no chroot, and no users of their own for the network process, the keeper and the backend",
                );
                Ok(Self {
                    keeper: plan(None, FileGrowth::Forbidden),
                    network: plan(None, growth),
                })
            }
            Separation::Full {
                chroot,
                group,
                keeper_user,
                user,
            } => {
                let network = Identity::look_up(user, group.as_deref(), "--user")?;
                let keeper = Identity::look_up(keeper_user, None, "--keeper-user")?;
                sandbox::check_distinct(network, keeper)?;
                let root = sandbox::open_root(chroot)?;
                let copy = sys::duplicate(root.as_fd())
                    .map_err(|error| Error::system("cannot copy a descriptor", reason(&error)))?;
                let confinement = |identity, root| Some(Confinement { identity, root });
                Ok(Self {
                    keeper: plan(confinement(keeper, copy), FileGrowth::Forbidden),
                    network: plan(confinement(network, root), growth),
                })
            }
        }
    }
}
