//! From options to what a connection needs - users, backend, keeper, TLS: the same steps for a session, for the listener and for
//! `--check`.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd, RawFd};

use crate::activation::Addresses;
use crate::backend::{Backend, ClientCertificates, Launcher, Origin, Phase, Program, Scope};
use crate::channel::Channel;
use crate::cli::{BackendChoice, BackendUserChoice, CommonOptions, Options, Separation};
use crate::connector::{Connector, Route, Target};
use crate::error::{Error, reason};
use crate::imap::Policy;
use crate::keeper::{self, KeeperClient, KeeperFiles, Lookups, Offer, Opener, SharedKeeper};
use crate::log::Log;
use crate::relay::{BackendSource, Remote};
use crate::sandbox::{
    self, BackendUser, BoundingSet, Confinement, ConnectorUser, FEW_DESCRIPTORS, Features,
    FileGrowth, Identity, Limits, OwnUsers, Plan,
};
use crate::sys;
use crate::tls::{Settings, TicketLimits, TlsServer};
use crate::trust::Trust;

/// How the confined processes are to be confined.
pub(crate) struct Plans {
    pub(crate) bounding_set: BoundingSet,
    /// The network process's.
    limits: Limits,
    /// `None`: started by a plain user, who has neither.
    separated: Option<Separated>,
}

struct Separated {
    root: OwnedFd,
    users: OwnUsers,
}

impl Plans {
    /// Looks at the kernel, looks users up and opens the directory.
    ///
    /// # Errors
    /// `Setup`, naming the option.
    pub(crate) fn look_up(options: &CommonOptions, log: &Log) -> Result<Self, Error> {
        // Two system calls, which most connections need not make.
        if !options.required.is_empty() {
            Features::of_kernel().check(&options.required)?;
        }
        let separated = match &options.separation {
            Separation::Unprivileged => {
                log.warning(
                    "unprivileged: no chroot, and no users of their own for the network process, the keeper and the backend",
                );
                None
            }
            Separation::Full {
                chroot,
                group,
                keeper_user,
                user,
            } => {
                let network = Identity::look_up(user, group.as_deref(), "--user")?;
                // With a keeper service too: the backend is not to be its user.
                let keeper = Identity::look_up(keeper_user, None, "--keeper-user")?;
                let users = OwnUsers::new(network, keeper)?;
                let root = sandbox::open_root(chroot)?;
                Some(Separated { root, users })
            }
        };
        Ok(Self {
            bounding_set: BoundingSet::Full,
            limits: Limits {
                descriptors: FEW_DESCRIPTORS,
                file_growth: if log.is_regular_file() {
                    FileGrowth::Allowed
                } else {
                    FileGrowth::Forbidden
                },
                memory: options.memory_limit,
            },
            separated,
        })
    }

    /// That of a keeper that is to be started.
    ///
    /// # Errors
    /// `System` if there is no descriptor to be had.
    pub(crate) fn keeper(&self) -> Result<Plan, Error> {
        let confine = |Separated { root, users }: &Separated| {
            let identity = users.keeper;
            sys::duplicate(root.as_fd()).map(|root| Confinement { identity, root })
        };
        let confinement = self.separated.as_ref().map(confine).transpose();
        Ok(Plan {
            bounding_set: self.bounding_set,
            confinement: confinement
                .map_err(|error| Error::system("cannot copy a descriptor", reason(&error)))?,
            limits: Limits {
                file_growth: FileGrowth::Forbidden,
                ..self.limits
            },
        })
    }

    /// The network process's.
    pub(crate) fn network(self) -> Plan {
        let confine = |Separated { root, users }| Confinement {
            identity: users.network,
            root,
        };
        Plan {
            bounding_set: self.bounding_set,
            confinement: self.separated.map(confine),
            limits: self.limits,
        }
    }

    fn users(&self) -> Option<&OwnUsers> {
        self.separated.as_ref().map(|separated| &separated.users)
    }
}

/// What becomes the backend of a connection, looked up and ready.
pub(crate) enum PreparedBackend {
    /// `--connect`.
    Connect {
        remote: Remote,
        route: Route,
    },
    /// `--backend-fd`.
    Descriptor(RawFd),
    Program(Program),
}

impl PreparedBackend {
    /// Looks up what can be looked up before there is a client.
    ///
    /// # Errors
    /// `Setup`, naming the option.
    pub(crate) fn prepare(options: &Options, plans: &Plans) -> Result<Self, Error> {
        match &options.backend {
            BackendChoice::Connect {
                header,
                target,
                user,
            } => Ok(Self::Connect {
                remote: Remote {
                    header: *header,
                    target: target.clone(),
                },
                route: route(target, user, plans.users())?,
            }),
            BackendChoice::Descriptor(number) => Ok(Self::Descriptor(*number)),
            BackendChoice::Program { command, user } => {
                let own = plans.users();
                Program::prepare(command, user, own, scope(options)).map(Self::Program)
            }
        }
    }

    /// For one connection: the launchers are forked.
    ///
    /// # Errors
    /// `Setup` if the descriptor cannot be used, `System` if there are no processes to be had.
    pub(crate) fn start(
        &self,
        policy: Policy,
        addresses: Option<&Addresses>,
        log: &Log,
    ) -> Result<BackendSource, Error> {
        let is_optional = policy == Policy::Optional;
        match self {
            Self::Connect { remote, route } => {
                let start = || Connector::start(route, BoundingSet::Full, log);
                Ok(BackendSource::Connectors {
                    cleartext: is_optional.then(start).transpose()?,
                    secured: start()?,
                    remote: remote.clone(),
                })
            }
            Self::Descriptor(number) => take_descriptor(*number),
            Self::Program(program) => Ok(BackendSource::Launchers {
                cleartext: is_optional
                    .then(|| Launcher::start(program, Phase::Cleartext, addresses, log))
                    .transpose()?,
                secured: Launcher::start(program, Phase::Secured, addresses, log)?,
            }),
        }
    }
}

fn scope(options: &Options) -> Scope {
    Scope {
        certificates: match options.client_auth {
            Some(_) => ClientCertificates::Asked,
            None => ClientCertificates::NotAsked,
        },
        origin: if options.proxy_from.is_empty() {
            Origin::Socket
        } else {
            Origin::Header
        },
    }
}

fn take_descriptor(number: RawFd) -> Result<BackendSource, Error> {
    let fault = |error| {
        Error::setup(
            format!("cannot use descriptor {number} as the backend (--backend-fd)"),
            reason(&error),
        )
    };
    let descriptor = sys::own_descriptor(number).map_err(fault)?;
    let descriptor = sys::duplicate(descriptor.as_fd()).map_err(fault)?;
    Ok(BackendSource::Descriptor(Backend {
        channel: Channel::new(descriptor, None),
        process: None,
    }))
}

/// Starts the keeper, and with `--cert-dir` the opener, before anybody reads a key; or goes to the keeper service.
///
/// # Errors
/// `Setup` if the directory cannot be used; `System` if there are no processes to be had, or no service.
pub(crate) fn start_keeper(
    options: &Options,
    trust: Option<&Trust>,
    plans: &Plans,
) -> Result<KeeperClient, Error> {
    let binding = binding(options.policy, trust);
    let options = &options.common;
    if let Some(socket) = &options.keeper {
        return KeeperClient::connect(socket, &binding);
    }
    start_own_keeper(options, &binding, plans.keeper()?)
}

/// The same where there is no service, or what it holds is in question.
///
/// # Errors
/// As above.
pub(crate) fn start_own_keeper(
    options: &CommonOptions,
    binding: &[u8],
    plan: Plan,
) -> Result<KeeperClient, Error> {
    let opener = start_opener(options, plan.bounding_set, Lookups::Few)?;
    KeeperClient::start(&keeper_files(options, Some(binding), AT_ONCE), opener, plan)
}

/// The same for the listener: one keeper for all its connections, and what it has to offer.
///
/// # Errors
/// As above, and with the keeper's own words if a certificate or key is unusable.
pub(crate) fn start_shared_keeper(
    options: &Options,
    trust: Option<&Trust>,
    plan: Plan,
) -> Result<(SharedKeeper, Offer), Error> {
    let binding = binding(options.policy, trust);
    start_keeper_of_many(&options.common, Some(&binding), plan, None)
}

/// The same as a service, for those who come to a socket that is listened on.
///
/// # Errors
/// As above.
pub(crate) fn start_keeper_service(
    options: &CommonOptions,
    plan: Plan,
    listened_on: BorrowedFd<'_>,
) -> Result<(SharedKeeper, Offer), Error> {
    start_keeper_of_many(options, None, plan, Some(listened_on))
}

fn start_keeper_of_many(
    options: &CommonOptions,
    binding: Option<&[u8]>,
    plan: Plan,
    listened_on: Option<BorrowedFd<'_>>,
) -> Result<(SharedKeeper, Offer), Error> {
    let files = keeper_files(options, binding, options.listening.renewal.as_secs());
    let opener = start_opener(options, plan.bounding_set, Lookups::Unbounded)?;
    SharedKeeper::start(&files, opener, plan, listened_on)
}

fn start_opener(
    options: &CommonOptions,
    bounding_set: BoundingSet,
    lookups: Lookups,
) -> Result<Option<Opener>, Error> {
    let directory = options.certificate_directory.as_deref();
    directory
        .map(|directory| Opener::start(directory, bounding_set, lookups))
        .transpose()
}

/// A connection's tickets are sealed as soon as there are keys.
const AT_ONCE: u64 = 0;

fn keeper_files<'a>(
    options: &'a CommonOptions,
    binding: Option<&'a [u8]>,
    sealing: u64,
) -> KeeperFiles<'a> {
    KeeperFiles {
        binding,
        certificates: &options.certificates,
        ocsp: &options.ocsp,
        sealing,
        ticket_keys: options.ticket_keys.as_deref(),
    }
}

/// The rules under which a session is made, and which must hold where it is resumed.
fn binding(policy: Policy, trust: Option<&Trust>) -> Vec<u8> {
    let policy = match policy {
        Policy::Implicit => b'i',
        Policy::Optional => b'o',
        Policy::Required => b'r',
    };
    let mut binding = vec![policy];
    binding.extend(trust.map(Trust::binding).unwrap_or_default());
    binding
}

/// Where to connect to, and as whom: the network process's user, if it has one of its own and no other is named.
///
/// # Errors
/// `Setup` if there is no such user, or it is the keeper's, or may not connect there.
pub(crate) fn route(
    target: &Target,
    user: &BackendUserChoice,
    own: Option<&OwnUsers>,
) -> Result<Route, Error> {
    let user = match (user, own) {
        (BackendUserChoice::Named(name), _) => {
            ConnectorUser::Named(BackendUser::look_up_connector(name, own)?)
        }
        (_, Some(own)) => ConnectorUser::Network(own.network),
        (_, None) => ConnectorUser::AsStarted,
    };
    Route::new(target.clone(), user)
}

/// Everything for TLS that needs no privileges: certificate authorities are parsed here.
///
/// # Errors
/// `Setup` if what clients' certificates are checked with cannot be used.
pub(crate) fn set_up_tls(
    options: &Options,
    offer: Offer,
    trust: Option<&Trust>,
) -> Result<TlsServer, Error> {
    let settings = Settings {
        certificates: offer.certificates,
        client_auth: trust.map(Trust::examiner).transpose()?,
        has_directory: offer.has_directory,
        keeper: offer.keeper,
        oldest_version: options.oldest_version,
        tickets: offer.has_ticket_keys.then_some(TICKETS),
        unknown_name: options.unknown_name,
    };
    TlsServer::new(settings).map_err(tls_fault)
}

/// What rustls has against these options.
pub(crate) fn tls_fault(error: rustls::Error) -> Error {
    Error::setup("cannot set TLS up with these options", error)
}

/// What the keeper lets a connection have.
const TICKETS: TicketLimits = TicketLimits {
    lifetime: keeper::tickets::LIFETIME_SECONDS,
    opens: keeper::OPENS,
    seals: keeper::SEALS,
};
