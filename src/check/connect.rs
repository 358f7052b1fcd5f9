//! A backend to connect to (`--connect`): looked at by the connector, as the user that it runs as, without connecting.

use super::{Level, Report, machine};
use crate::cli::BackendUserChoice;
use crate::connector::{Connector, Route, Target};
use crate::error::Error;
use crate::imap::Policy;
use crate::log::{Destination, Log, Verbosity};
use crate::proxy_header::outgoing::Version;
use crate::sandbox::{BoundingSet, OwnUsers};
use crate::setup::route;

pub(super) fn check_connect(
    report: &mut Report,
    target: &Target,
    user: &BackendUserChoice,
    own: Option<&OwnUsers>,
) {
    let examined = route(target, user, own).and_then(|route| examine(&route));
    let praise = |text: &String| format!("'{target}': {text}");
    if report.take("backend", examined, praise).is_none() {
        return;
    }
    match target {
        Target::Address(address) if address.ip().is_loopback() => {
            check_port(report, target, address.port());
        }
        _ => {}
    }
}

/// On this machine, who listens can be told without connecting.
fn check_port(report: &mut Report, target: &Target, port: u16) {
    if machine::is_anybody_listening(port) == Some(false) {
        report.add(
            Level::Error,
            "backend",
            format!(
                "nobody listens on '{target}' (--connect): is the server running, and does it listen there?"
            ),
        );
    }
    if CLIENTS_PORTS.contains(&port) {
        report.add(
            Level::Warning,
            "backend",
            format!(
                "'{target}' (--connect) is where clients arrive: if that is imap-tls, it would connect to itself, again and again"
            ),
        );
    }
}

/// Where a mail program looks for an IMAP server.
const CLIENTS_PORTS: [u16; 2] = [143, 993];

fn examine(route: &Route) -> Result<String, Error> {
    let log = Log::open(Destination::Stderr, Verbosity::Quiet, true);
    let connector = Connector::start(route, BoundingSet::Full, &log)?;
    connector.examine().map_err(|text| {
        let target = &route.target;
        Error::Setup(format!(
            "cannot connect to the backend '{target}' (--connect): {text}"
        ))
    })
}

/// What the first form of the header cannot say.
pub(super) fn check_header(report: &mut Report, header: Option<Version>, policy: Policy) {
    match (header, policy) {
        (Some(Version::V1), Policy::Implicit | Policy::Required) => report.add(
            Level::Warning,
            "backend",
            "--send-proxy v1 cannot say that there is TLS, and a backend that wants it for LOGIN will refuse: use v2",
        ),
        (Some(Version::V2), _) => report.add(
            Level::Ok,
            "backend",
            "it is told of the client and of TLS (--send-proxy v2), which it must expect",
        ),
        (Some(Version::V1), Policy::Optional) => report.add(
            Level::Ok,
            "backend",
            "it is told of the client (--send-proxy v1), which it must expect",
        ),
        (None, _) => report.add(
            Level::Ok,
            "backend",
            "it is not told who the client is: --send-proxy v2 does, if it understands that",
        ),
    }
}
