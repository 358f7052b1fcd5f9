//! The story of one connection, top to bottom: with whatever is privileged before the sandbox, and the client after it.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crate::activation::{Connection, Peer};
use crate::admission::{Answer, Applicant};
use crate::cli::{Options, Refusal};
use crate::error::Error;
use crate::imap::Policy;
use crate::keeper::KeeperClient;
use crate::log::{Log, Verbosity};
use crate::proxy_header::Sender;
use crate::proxy_header::incoming::{self, Fault};
use crate::relay::{self, BackendSource, Children, Parts};
use crate::sandbox::{self, BoundingSet, Features, Plan, Role, Sandboxed};
use crate::setup::{Plans, PreparedBackend, set_up_tls, start_keeper, tls_fault};
use crate::tls::{Tls, examine_processor};
use crate::trust::Trust;

/// What a client is told when the fault is ours (RFC 5530 section 3).
const UNAVAILABLE: &[u8] =
    b"* BYE [UNAVAILABLE] the server is not set up correctly, try again later\r\n";

/// The same where the system refused what it may give the next time.
const SHORT: &[u8] = b"* BYE [UNAVAILABLE] a temporary fault of the server, try again later\r\n";

/// What such a client is told in clear.
pub(crate) fn goodbye(policy: Policy) -> &'static [u8] {
    if policy == Policy::Implicit {
        b""
    } else {
        UNAVAILABLE
    }
}

/// The same where the fault is known.
fn goodbye_for(error: &Error, policy: Policy) -> &'static [u8] {
    match (error, policy) {
        (Error::System(_), Policy::Optional | Policy::Required) => SHORT,
        _ => goodbye(policy),
    }
}

/// Where balancers are expected, nobody else is served: anybody could write any address into a header. Not an octet is read.
pub(crate) fn is_welcome(connection: &Connection, senders: &[Sender], log: &Log) -> bool {
    if senders.is_empty() {
        return true;
    }
    match connection.is_from(senders) {
        Peer::Gone => log.debug("gone before it could be asked for its address (a health check?)"),
        Peer::Listed => return true,
        Peer::Stranger => log.info("refused: not among the balancers (--proxy-from)"),
        Peer::Unknown => log.error("refused: its address cannot be learnt (--proxy-from)"),
    }
    false
}

/// What a client is told for whom the listener has no room (RFC 5530 section 3).
pub(crate) fn refusal(options: &Options) -> &'static [u8] {
    if options.policy == Policy::Implicit || options.common.listening.refusal == Refusal::Silent {
        b""
    } else {
        b"* BYE [UNAVAILABLE] too many connections, try again later\r\n"
    }
}

/// How a connection ended.
pub(crate) enum Outcome {
    /// A balancer looked whether we are there.
    Checked(relay::Report),
    /// The PROXY header that had to come did not.
    NoHeader(Fault),
    /// The listener has no room for whom the header names, which is in the log.
    NoRoom,
    Served(relay::Report),
}

/// The session line, or what went wrong and a goodbye to the client; returns the exit status.
pub(crate) fn conclude(
    result: Result<Outcome, Error>,
    options: &Options,
    log: &Log,
    connection: &mut Connection,
) -> u8 {
    match result {
        Ok(Outcome::Checked(report)) => {
            log.debug(&report);
            report.exit_status()
        }
        Ok(Outcome::NoHeader(fault)) => {
            match fault {
                Fault::Silent => log.debug(format!("no PROXY header: {fault} (a health check?)")),
                _ => log.warning(format!("no PROXY header (--accept-proxy): {fault}")),
            }
            connection.part(b"");
            0
        }
        Ok(Outcome::NoRoom) => {
            connection.part(refusal(options));
            0
        }
        Ok(Outcome::Served(report)) => {
            log.info(&report);
            report.exit_status()
        }
        Err(error) => {
            log.error(&error);
            connection.part(goodbye_for(&error, options.policy));
            error.exit_status()
        }
    }
}

/// Everything that needs privileges, then the sandbox, then the client.
pub(crate) fn session(
    options: &Options,
    log: &Log,
    connection: &mut Connection,
) -> Result<Outcome, Error> {
    Children::expect()?;
    let mut plans = Plans::look_up(&options.common, log)?;
    // The machine's affair and none of this connection's: a line for each would hide the others.
    if options.common.verbosity == Verbosity::Verbose {
        for lack in Features::of_kernel().lacking() {
            log.debug(lack);
        }
    }
    let trust = Trust::read(options)?;
    // What it needs is not needed here any more once its launchers have it.
    let backend = PreparedBackend::prepare(options, &plans)?.start(
        options.policy,
        connection.addresses.as_ref(),
        log,
    )?;
    plans.bounding_set = BoundingSet::empty();
    // Here, so that it is done once for the keeper and for us: what it takes on a virtual machine is a good part of a fork.
    examine_processor();
    let keeper = start_keeper(options, trust.as_ref(), &plans)?;
    let served = Served {
        applicant: None,
        backend,
        connection,
        keeper: &keeper,
        log,
        options,
        plan: plans.network(),
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
    /// Under the listener, if balancers are expected.
    pub(crate) applicant: Option<Applicant>,
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
) -> Result<Outcome, Error> {
    let Served {
        applicant,
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
        kept.extend(applicant.as_ref().map(Applicant::descriptor));
        keeper
            .with_descriptor(|keeper| {
                let kept: Vec<_> = kept.iter().copied().chain([keeper]).collect();
                sandbox::enter(Role::Network, plan, &kept)
            })
            .unwrap_or_else(|| Err(Error::System("the keeper's socket is gone".to_owned())))?
    };
    let result = tls().map(|tls| {
        let began = Instant::now();
        let whose = match learn_client(options, connection, log, &sandboxed) {
            Ok(whose) => whose,
            Err(fault) => return Outcome::NoHeader(fault),
        };
        let known = connection.addresses.filter(|_| whose.is_behind());
        if let (Some(applicant), Some(addresses)) = (applicant, known) {
            match applicant.ask(addresses.peer.ip()) {
                Answer::Granted => {}
                Answer::Refused => return Outcome::NoRoom,
                Answer::Silence => {
                    log.warning("refused: the listener is too busy to say whether there is room");
                    return Outcome::NoRoom;
                }
            }
        }
        let is_balancers_own = whose == Whose::Balancer;
        let parts = Parts {
            addresses: connection.addresses,
            backend,
            children: &children,
            client: &mut connection.channel,
            handshake_timeout: options.handshake_timeout,
            keeper,
            log,
            login_timeout: options.login_timeout.saturating_sub(began.elapsed()),
            policy: options.policy,
            proxy: match whose {
                Whose::ClientBehind(balancer) => Some(balancer),
                Whose::Balancer | Whose::Client => None,
            },
            tls,
        };
        let report = relay::relay(parts, &sandboxed);
        if is_balancers_own && report.is_uneventful() {
            Outcome::Checked(report)
        } else {
            Outcome::Served(report)
        }
    });
    // Whoever is still there was let go of, and ends at end of file.
    keeper.release();
    children.reap_rest(REAP_LIMIT);
    result
}

/// Whose the connection is.
#[derive(Debug, Eq, PartialEq)]
enum Whose {
    /// The balancer's own, or of somebody whom it does not know: LOCAL and UNKNOWN.
    Balancer,
    Client,
    /// With the balancer as log lines name it.
    ClientBehind(String),
}

impl Whose {
    fn is_behind(&self) -> bool {
        matches!(self, Self::ClientBehind(_))
    }
}

/// With `--accept-proxy`, reads the header. From here on the client is whom it names, in the log and for the backend.
fn learn_client(
    options: &Options,
    connection: &mut Connection,
    log: &Log,
    sandboxed: &Sandboxed,
) -> Result<Whose, Fault> {
    if options.proxy_from.is_empty() {
        return Ok(Whose::Client);
    }
    let limit = incoming::TIME_LIMIT.min(options.login_timeout);
    let deadline = Instant::now() + limit;
    let Some(addresses) = incoming::receive(&connection.channel, deadline, sandboxed)? else {
        return Ok(Whose::Balancer);
    };
    let balancer = connection.to_string();
    connection.addresses = Some(addresses);
    log.set_subject(connection);
    Ok(Whose::ClientBehind(balancer))
}

/// How long our own processes, which have nothing more to do, may take to end.
const REAP_LIMIT: Duration = Duration::from_secs(1);
