//! The files of keys and certificates, read and parsed by the keeper itself.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::chain::check_chain;
use super::{Found, Level, Report, plan};
use crate::cli::{CommonOptions, Options};
use crate::clock;
use crate::error::{Error, reason};
use crate::host_name::HostName;
use crate::keeper::{
    CHAIN_FILE, CertificateFiles, KEY_FILE, KeeperClient, KeeperFiles, Offer, ocsp,
};
use crate::sandbox::Plan;
use crate::setup::{set_up_tls, start_own_keeper};
use crate::tls::{Certified, Filed};
use crate::trust::Trust;

const CLIENTS: &str = "client certificates";

/// What a connection gets: certificates from the keeper that it would have, and TLS with them.
pub(super) fn check_tls(report: &mut Report, options: &Options, found: Option<&Found<'_>>) {
    let trust = match Trust::read(options) {
        Ok(trust) => trust,
        Err(error) => return report.add(Level::Error, CLIENTS, error),
    };
    let offer = match &options.common.keeper {
        Some(path) => check_service(report, path),
        None => check_keys(report, &options.common, found),
    };
    let Some(offer) = offer else { return };
    let tls = set_up_tls(options, offer, trust.as_ref());
    let tls = report.take("TLS", tls, |_| {
        "can be set up with these options".to_owned()
    });
    if tls.is_none() {
        return;
    }
    for concern in trust.iter().flat_map(Trust::concerns) {
        let level = if concern.is_fatal {
            Level::Error
        } else {
            Level::Warning
        };
        report.add(level, CLIENTS, concern);
    }
}

/// The keeper service, which has looked at the files.
fn check_service(report: &mut Report, path: &Path) -> Option<Offer> {
    let offer = KeeperClient::connect(path, &[]).and_then(|keeper| {
        let offer = keeper.introduction();
        keeper.release();
        offer
    });
    let offer = report.take("keeper service", offer, |offer| {
        let more = if offer.has_directory {
            ", and more by name"
        } else {
            ""
        };
        let count = offer.certificates.len();
        format!("'{}' answers: {count} certificates{more}", path.display())
    })?;
    let numbers = (1..).map(|number| format!("number {number}"));
    check_all(report, &offer.certificates, numbers);
    if offer.has_ticket_keys {
        report.add(Level::Ok, "tickets", "sessions are resumed");
    }
    Some(offer)
}

/// What a keeper would hold.
pub(super) fn check_keys(
    report: &mut Report,
    options: &CommonOptions,
    found: Option<&Found<'_>>,
) -> Option<Offer> {
    for files in &options.certificates {
        let path = files.key.as_ref().unwrap_or(&files.certificate);
        check_key_file(report, path, found);
    }
    let tickets = options.ticket_keys.as_deref();
    let are_new = tickets.is_some_and(|path| !path.exists());
    let offer = ask_keeper(options, found, |offer| offer);
    let praise = |offer: &Offer| match offer.certificates.as_slice() {
        [one] => format!("they match; {} in the chain", one.key.cert.len()),
        several => format!("{} of each, and they match", several.len()),
    };
    let offer = report.take("certificate and key", offer, praise)?;
    let paths = options.certificates.iter();
    let paths = paths.map(|files| files.certificate.display().to_string());
    check_all(report, &offer.certificates, paths);
    let warnings = offer.warnings.iter();
    // That one is an error here, and the certificate's.
    for warning in warnings.filter(|warning| !warning.ends_with(ocsp::MISSING)) {
        report.add(Level::Warning, "tickets and OCSP", warning);
    }
    if let Some(path) = tickets.filter(|_| offer.has_ticket_keys) {
        report.add(Level::Ok, "tickets", describe_tickets(path, are_new));
    }
    if let Some(directory) = &options.certificate_directory {
        check_directory(report, options, directory, found);
    }
    Some(offer)
}

/// Which of the two things that `--ticket-keys` may name: where a fleet's file is missing, each machine makes keys of its own.
fn describe_tickets(path: &Path, are_new: bool) -> String {
    let kind = match (path.is_dir(), are_new) {
        (false, _) => "has keys that this machine did not make",
        (true, false) => "is a directory with keys that only this machine has",
        (true, true) => {
            "was not there, and is now a directory with keys that only this machine has"
        }
    };
    format!("sessions are resumed: '{}' {kind}", path.display())
}

/// Has a keeper do what one does for a connection.
fn ask_keeper<T>(
    options: &CommonOptions,
    found: Option<&Found<'_>>,
    ask: impl FnOnce(Offer) -> T,
) -> Result<T, Error> {
    // No ticket is asked for, so they are bound to nothing.
    let start = |plan| start_own_keeper(options, &[], plan);
    ask_new_keeper(options, found, start, ask)
}

/// The certificate in these files, if it is good in itself, whatever it is for.
fn ask_for_files(
    options: &CommonOptions,
    found: Option<&Found<'_>>,
    files: &CertificateFiles,
) -> Option<Certified> {
    let files = KeeperFiles {
        binding: Some(&[]),
        certificates: std::slice::from_ref(files),
        ocsp: &[],
        sealing: 0,
        ticket_keys: None,
    };
    let start = |plan| KeeperClient::start(&files, None, plan);
    let offer = ask_new_keeper(options, found, start, |offer| offer);
    offer.ok()?.certificates.pop()
}

fn ask_new_keeper<T>(
    options: &CommonOptions,
    found: Option<&Found<'_>>,
    start: impl FnOnce(Plan) -> Result<KeeperClient, Error>,
    ask: impl FnOnce(Offer) -> T,
) -> Result<T, Error> {
    let plan = plan(found, |found| found.users.keeper, options.memory_limit)?;
    let keeper = start(plan)?;
    let result = keeper.introduction().map(ask);
    keeper.release();
    // And the opener, if there is one.
    while nix::sys::wait::wait().is_ok() {}
    result
}

/// Each of the certificates, with its name in front where there are several.
fn check_all(report: &mut Report, certificates: &[Certified], names: impl Iterator<Item = String>) {
    let are_many = certificates.len() > 1;
    for (certified, name) in certificates.iter().zip(names) {
        report.labelled(are_many.then_some(name.as_str()), |part| {
            check_certified(part, certified, ocsp::MISSING);
        });
    }
}

fn check_certified(report: &mut Report, certified: &Certified, missing: &str) {
    let chain = &certified.key.cert;
    check_chain(report, chain, clock::now().unwrap_or(0));
    if certified.key.ocsp.is_some() {
        report.add(Level::Ok, "OCSP response", "it is fresh, so it is stapled");
    } else if chain.first().is_some_and(|own| demands_response(own)) {
        report.add(Level::Error, "certificate", format!("it {missing}"));
    }
}

fn demands_response(certificate: &[u8]) -> bool {
    x509_parser::parse_x509_certificate(certificate).is_ok_and(|(_, own)| ocsp::is_demanded(&own))
}

const DIRECTORY: &str = "certificate directory";

/// Each name in the directory, as a client would ask for it.
fn check_directory(
    report: &mut Report,
    options: &CommonOptions,
    directory: &Path,
    found: Option<&Found<'_>>,
) {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => return report.add(Level::Error, DIRECTORY, reason(&error)),
    };
    let mut count = 0;
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_pem = path.extension().is_some_and(|extension| extension == "pem");
        // A link to nowhere counts, and a key without its chain: a client that asks for that name is not served.
        let has_files = [CHAIN_FILE, KEY_FILE]
            .iter()
            .any(|name| path.join(name).symlink_metadata().is_ok());
        if !is_pem && !has_files && path.exists() {
            continue;
        }
        let stem = if is_pem {
            path.file_stem()
        } else {
            path.file_name()
        };
        let stem = stem.and_then(OsStr::to_str);
        let Some(name) = stem.and_then(HostName::or_wildcard) else {
            let path = path.display();
            let text = format!("'{path}' is not called after a host name, so it is never used");
            report.add(Level::Warning, DIRECTORY, text);
            continue;
        };
        if stem != Some(name.as_str()) {
            let path = path.display();
            let text = format!(
                "'{path}' is never used, since names are looked for in lower case: rename it"
            );
            report.add(Level::Warning, DIRECTORY, text);
            continue;
        }
        count += 1;
        check_name(report, options, &name, &path, found);
    }
    let text = format!("'{}': {count} names", directory.display());
    report.add(Level::Ok, DIRECTORY, text);
}

/// What is filed under the name, at this path.
fn check_name(
    report: &mut Report,
    options: &CommonOptions,
    name: &HostName,
    path: &Path,
    found: Option<&Found<'_>>,
) {
    let files = if path.is_dir() {
        CertificateFiles {
            certificate: path.join(CHAIN_FILE),
            key: Some(path.join(KEY_FILE)),
        }
    } else {
        CertificateFiles {
            certificate: path.to_owned(),
            key: None,
        }
    };
    report.labelled(Some(name.as_str()), |part| {
        check_key_file(
            part,
            files.key.as_ref().unwrap_or(&files.certificate),
            found,
        );
    });
    let ask = |offer: Offer| offer.keeper.certificate(&name.example());
    match ask_keeper(options, found, ask) {
        Ok(Ok(Filed::Certificate(certified))) => check_filed(report, name, &certified),
        Ok(Ok(Filed::Nothing | Filed::PassedOver(_))) => {
            let text = format!("'{}' holds no certificate for '{name}'", path.display());
            report.add(Level::Warning, DIRECTORY, text);
        }
        Ok(Err(why)) => match ask_for_files(options, found, &files) {
            Some(certified) if is_for_others(&certified, name) => {
                check_misfiled(report, name, path, &certified);
            }
            _ => report.add(Level::Error, DIRECTORY, why),
        },
        Err(error) => report.add(Level::Error, DIRECTORY, error),
    }
}

fn check_filed(report: &mut Report, name: &HostName, certified: &Certified) {
    const MISSING: &str = "demands a stapled OCSP response (must-staple), and --ocsp is for --cert alone: have it issued without";
    report.labelled(Some(name.as_str()), |part| {
        check_certified(part, certified, MISSING);
    });
}

fn is_for_others(certified: &Certified, name: &HostName) -> bool {
    let mut names = certified.names.iter();
    !certified.names.is_empty() && !names.any(|pattern| name.is_covered_by(pattern))
}

/// No fault of those whom it is for: certbot calls a second one after the first, with a number, and that of a wildcard after its domain.
fn check_misfiled(report: &mut Report, name: &HostName, path: &Path, certified: &Certified) {
    let is_looked_for = |own: &String| {
        let own = HostName::or_wildcard(own);
        own.is_some_and(|own| {
            own.example()
                .candidates()
                .any(|candidate| candidate == *name)
        })
    };
    let (path, names) = (path.display(), certified.names.join(", "));
    let text = if certified.names.iter().any(is_looked_for) {
        check_filed(report, name, certified);
        format!("'{path}' is for {names}; a client that asks for '{name}' itself is refused")
    } else {
        format!(
            "'{path}' is for {names}, so it is never shown, and a client that asks for '{name}' is refused: call it after a name that it is for (certbot: --cert-name)"
        )
    };
    report.add(Level::Warning, DIRECTORY, text);
}

fn check_key_file(report: &mut Report, path: &Path, found: Option<&Found<'_>>) {
    // That it can be read, and is not open to everybody, is the keeper's to say.
    let Ok(metadata) = fs::metadata(path) else {
        return;
    };
    let (mode, group) = (metadata.mode() & 0o7777, metadata.gid());
    if metadata.uid() != 0 && found.is_some() {
        report.add(
            Level::Warning,
            "key file",
            format!(
                "it belongs to uid {}, not to root: chown root it",
                metadata.uid()
            ),
        );
    }
    if mode & 0o040 != 0 && group != 0 {
        report.add(
            Level::Warning,
            "key file",
            format!(
                "gid {group} can read it too (mode {mode:04o}): chmod 600 it unless that is meant"
            ),
        );
    }
}
