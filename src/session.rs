//! The story of one connection, top to bottom: with whatever is privileged before the sandbox, and the client after it.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::activation::Connection;
use crate::cli::Options;
use crate::error::Error;
use crate::imap::Policy;
use crate::keeper::KeeperClient;
use crate::log::Log;
use crate::relay::{self, BackendSource, Children, Parts};
use crate::sandbox::{self, BoundingSet, Plan, Role};
use crate::setup::{Plans, PreparedBackend, set_up_tls, start_keeper, tls_fault};
use crate::tls::{Tls, examine_processor};
use crate::trust::Trust;

/// What a client is told when the fault is ours (RFC 5530 section 3).
pub(crate) const UNAVAILABLE: &[u8] =
    b"* BYE [UNAVAILABLE] the server is not set up correctly, try again later\r\n";

/// The session line, or what went wrong and a goodbye to the client; returns the exit status.
pub(crate) fn conclude(
    result: Result<relay::Report, Error>,
    policy: Policy,
    log: &Log,
    connection: &mut Connection,
) -> u8 {
    match result {
        Ok(report) => {
            log.info(&report);
            report.exit_status()
        }
        Err(error) => {
            log.error(&error);
            connection.part(if policy == Policy::Implicit {
                b""
            } else {
                UNAVAILABLE
            });
            error.exit_status()
        }
    }
}

/// Everything that needs privileges, then the sandbox, then the client.
pub(crate) fn session(
    options: &Options,
    log: &Log,
    connection: &mut Connection,
) -> Result<relay::Report, Error> {
    Children::expect()?;
    let mut plans = Plans::look_up(options, log)?;
    let trust = options.client_auth.as_ref().map(Trust::read).transpose()?;
    // What it needs is not needed here any more once its launchers have it.
    let backend = PreparedBackend::prepare(&options.backend)?.start(
        options.policy,
        connection.addresses.as_ref(),
        log,
    )?;
    plans.keeper.bounding_set = BoundingSet::empty();
    plans.network.bounding_set = plans.keeper.bounding_set;
    // Here, so that it is done once for the keeper and for us: what it takes on a virtual machine is a good part of a fork.
    examine_processor();
    let keeper = start_keeper(options, trust.as_ref(), plans.keeper)?;
    let served = Served {
        backend,
        connection,
        keeper: &keeper,
        log,
        options,
        plan: plans.network,
    };
    attend(served, || {
        let offer = keeper.introduction()?;
        for warning in &offer.warnings {
            log.warning(warning);
        }
        let server = set_up_tls(options, offer, trust.as_ref())?;
        // Revocation lists may be large, and have been parsed.
        drop(trust);
        server.session().map_err(tls_fault)
    })
}

/// A connection with all that had to be made while there were privileges.
pub(crate) struct Served<'a> {
    pub(crate) backend: BackendSource,
    pub(crate) connection: &'a mut Connection,
    pub(crate) keeper: &'a KeeperClient,
    pub(crate) log: &'a Log,
    pub(crate) options: &'a Options,
    pub(crate) plan: Plan,
}

/// The sandbox, and in it the client: to the end of the session.
pub(crate) fn attend(
    served: Served<'_>,
    tls: impl FnOnce() -> Result<Tls, Error>,
) -> Result<relay::Report, Error> {
    let Served {
        backend,
        connection,
        keeper,
        log,
        options,
        plan,
    } = served;
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
                sandbox::enter(Role::Network, plan, &kept)
            })
            .unwrap_or_else(|| Err(Error::System("the keeper's socket is gone".to_owned())))?
    };
    let result = tls().map(|tls| {
        let parts = Parts {
            backend,
            children: &children,
            client: &mut connection.channel,
            handshake_timeout: options.handshake_timeout,
            keeper,
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
