//! From options to a keeper and to what TLS is like: the same steps for a session and for `--check`.

use crate::cli::Options;
use crate::error::Error;
use crate::imap::Policy;
use crate::keeper::{self, KeeperClient, KeeperFiles, Offer, Opener};
use crate::sandbox::Plan;
use crate::tls::{Settings, TicketLimits, Tls};
use crate::trust::Trust;

/// Starts the keeper, and with `--cert-dir` the opener, before anybody reads a key.
///
/// # Errors
/// `Setup` if the directory cannot be used; `System` if there are no processes to be had.
pub(crate) fn start_keeper(
    options: &Options,
    trust: Option<&Trust>,
    plan: Plan,
) -> Result<KeeperClient, Error> {
    let directory = options.certificate_directory.as_deref();
    let opener = directory
        .map(|directory| Opener::start(directory, plan.bounding_set))
        .transpose()?;
    let policy = match options.policy {
        Policy::Implicit => b'i',
        Policy::Optional => b'o',
        Policy::Required => b'r',
    };
    let mut binding = vec![policy];
    binding.extend(trust.map(Trust::binding).unwrap_or_default());
    let files = KeeperFiles {
        binding: &binding,
        certificates: &options.certificates,
        ocsp: &options.ocsp,
        ticket_keys: options.ticket_keys.as_deref(),
    };
    KeeperClient::start(&files, opener, plan)
}

/// Everything for TLS that needs no privileges: certificate authorities are parsed here.
///
/// # Errors
/// `Setup` if what clients' certificates are checked with cannot be used.
pub(crate) fn set_up_tls(
    options: &Options,
    offer: Offer,
    trust: Option<&Trust>,
) -> Result<Tls, Error> {
    let settings = Settings {
        certificates: offer.certificates,
        client_auth: trust.map(Trust::verifier).transpose()?,
        has_directory: options.certificate_directory.is_some(),
        keeper: offer.keeper,
        oldest_version: options.oldest_version,
        tickets: offer.has_ticket_keys.then_some(TICKETS),
        unknown_name: options.unknown_name,
    };
    Tls::new(settings).map_err(|error| Error::setup("cannot set TLS up with these options", error))
}

/// What the keeper lets a connection have.
const TICKETS: TicketLimits = TicketLimits {
    lifetime: keeper::tickets::LIFETIME_SECONDS,
    opens: keeper::OPENS,
    seals: keeper::SEALS,
};
