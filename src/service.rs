//! What the listener serves: everything that connections have in common, made once, and the process of each.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use nix::unistd::Pid;

use crate::activation::Connection;
use crate::admission::{self, Applicant};
use crate::channel::Channel;
use crate::cli::{self, BackendChoice, Listening, Options, Request, Task};
use crate::error::{EXIT_TEMPORARY, Error, reason};
use crate::keeper::{self, SharedKeeper};
use crate::listener::{Service, Started};
use crate::log::Log;
use crate::sandbox::{Features, Plan};
use crate::session::{Served, attend, conclude, goodbye, is_welcome, refusal};
use crate::setup::{Plans, PreparedBackend, set_up_tls, start_shared_keeper, tls_fault};
use crate::sys;
use crate::tls::TlsServer;
use crate::trust::Trust;

/// What is served until the next renewal, and where its options came from.
pub(crate) struct Serving {
    common: Common,
    source: cli::Source,
}

/// What all connections have in common.
struct Common {
    backend: PreparedBackend,
    keeper: SharedKeeper,
    network: Plan,
    options: Rc<Options>,
    tls: TlsServer,
}

impl Serving {
    /// Reads all there is to read, and starts the keeper.
    ///
    /// # Errors
    /// Whatever is wrong with options and files.
    pub(crate) fn prepare(
        options: Box<Options>,
        source: cli::Source,
        log: &Log,
    ) -> Result<Self, Error> {
        let common = Common::prepare(Rc::from(options), log)?;
        for lack in Features::of_kernel().lacking() {
            log.warning(lack);
        }
        Ok(Self { common, source })
    }
}

impl Common {
    fn prepare(options: Rc<Options>, log: &Log) -> Result<Self, Error> {
        if matches!(options.backend, BackendChoice::Descriptor(_)) {
            return Err(Error::Usage(
                "--backend-fd is one connection's, so it conflicts with listening".to_owned(),
            ));
        }
        if options.common.keeper.is_some() {
            return Err(Error::Usage(
                "--keeper conflicts with listening: the listener has a keeper of its own"
                    .to_owned(),
            ));
        }
        let plans = Plans::look_up(&options.common, log)?;
        let trust = Trust::read(&options)?;
        let backend = PreparedBackend::prepare(&options, &plans)?;
        let mut plan = plans.keeper()?;
        plan.limits.descriptors = keeper::descriptors(options.common.listening.max_connections);
        let (keeper, offer) = start_shared_keeper(&options, trust.as_ref(), plan)?;
        for warning in &offer.warnings {
            log.warning(warning);
        }
        let tls = set_up_tls(&options, offer, trust.as_ref())?;
        for concern in trust.iter().flat_map(Trust::concerns) {
            log.warning(concern);
        }
        Ok(Self {
            backend,
            keeper,
            network: plans.network(),
            options,
            tls,
        })
    }

    /// The life of a connection's process; returns its exit status: [`EXIT_TEMPORARY`] where the system was short of something, and else
    /// 0, as nobody is there who would want a backend's.
    fn serve(
        &self,
        client: OwnedFd,
        keeper: OwnedFd,
        applicant: Option<Applicant>,
        log: &Log,
    ) -> u8 {
        let mut connection = Connection::of(Channel::new(client, None));
        let log = log.for_connection(&connection);
        if !is_welcome(&connection, &self.options.proxy_from, &log) {
            connection.part(b"");
            return 0;
        }
        let client = self.keeper.client.clone();
        client.adopt(keeper);
        let backend = self
            .backend
            .start(self.options.policy, connection.addresses.as_ref(), &log);
        let result = backend.and_then(|backend| {
            let plan = self.network.copy()?;
            let served = Served {
                applicant,
                backend,
                connection: &mut connection,
                keeper: &client,
                log: &log,
                options: &self.options,
                plan,
            };
            attend(served, || self.tls.session().map_err(tls_fault))
        });
        let is_short = matches!(result, Err(Error::System(_)));
        conclude(result, &self.options, &log, &mut connection);
        if is_short { EXIT_TEMPORARY } else { 0 }
    }
}

impl Service for Serving {
    fn listening(&self) -> &Listening {
        &self.common.options.common.listening
    }

    fn refusal(&self) -> &'static [u8] {
        refusal(&self.common.options)
    }

    fn goodbye(&self) -> &'static [u8] {
        goodbye(self.common.options.policy)
    }

    fn keeper(&self) -> Pid {
        self.common.keeper.process
    }

    fn reload(&mut self, log: &mut Log) -> Result<(), Error> {
        let addresses = &self.common.options.common.listening.addresses;
        self.common = self.source.read_again(|request| {
            let Request::Run(Task::Serve(options)) = request else {
                return Err(Error::Usage(
                    "there is nothing to serve any more".to_owned(),
                ));
            };
            if options.common.listening.addresses != *addresses {
                log.warning("--listen has changed, which takes a restart");
            }
            log.note_destination(options.common.destination);
            Common::prepare(Rc::from(options), log)
        })?;
        log.set_verbosity(self.common.options.common.verbosity);
        Ok(())
    }

    fn renew(&mut self, log: &Log) -> Result<(), Error> {
        self.common = Common::prepare(self.common.options.clone(), log)?;
        Ok(())
    }

    fn has_balancers(&self) -> bool {
        !self.common.options.proxy_from.is_empty()
    }

    fn start(&self, client: &mut Option<OwnedFd>, log: &Log) -> Result<Started, Error> {
        let (mut applicant, application) = if self.has_balancers() {
            let (applicant, application) = admission::pair()?;
            (Some(applicant), Some(application))
        } else {
            (None, None)
        };
        let mut keeper = Some(self.common.keeper.admit()?);
        // What is taken in the child is still here, and in its hands there.
        let process = sys::fork_into(|| {
            // A backend that signals its process group ends its own session, and no one else's.
            sys::leave_process_group();
            match (client.take(), keeper.take()) {
                (Some(client), Some(keeper)) => {
                    self.common.serve(client, keeper, applicant.take(), log)
                }
                _ => EXIT_TEMPORARY,
            }
        });
        let process = process.map_err(|error| {
            Error::system("cannot start a process for a client", reason(&error))
        })?;
        Ok(Started {
            application,
            process,
        })
    }
}
