//! The files: key, certificate, chain; read and parsed by the keeper itself.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::{Found, Level, Report, plan};
use crate::cli::Options;
use crate::keeper::{KeeperClient, KeeperFiles};
use crate::log::Escaped;

/// Below this, a certificate should have been renewed (they are, at a third of 90 days).
const RENEWAL_DAYS: i64 = 30;

pub(super) fn check_keys(report: &mut Report, options: &Options, found: Option<&Found<'_>>) {
    check_key_file(report, &options.key, found);
    let files = KeeperFiles {
        certificate: &options.certificate,
        key: &options.key,
    };
    let certified = plan(found, |found| found.keeper, options.memory_limit)
        .and_then(|plan| KeeperClient::start(&files, plan))
        .and_then(|keeper| {
            let certified = keeper.introduction();
            keeper.release();
            let _ = nix::sys::wait::wait();
            certified
        });
    let certified = report.take("certificate and key", certified, |certified| {
        format!("they match; {} in the chain", certified.cert.len())
    });
    let Some(certified) = certified else { return };
    let chain: Result<Vec<_>, _> = certified
        .cert
        .iter()
        .map(|der| x509_parser::parse_x509_certificate(der).map(|(_, parsed)| parsed))
        .collect();
    match chain {
        Ok(chain) => check_chain(report, &chain),
        Err(error) => report.add(
            Level::Error,
            "certificate chain",
            format!("a certificate is malformed: {error}"),
        ),
    }
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

fn check_chain(report: &mut Report, chain: &[X509Certificate<'_>]) {
    let Some(own) = chain.first() else { return };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let days =
        (own.validity().not_after.timestamp() - i64::try_from(now).unwrap_or(i64::MAX)) / 86_400;
    let (level, advice) = if days < RENEWAL_DAYS {
        (Level::Warning, ": renew it")
    } else {
        (Level::Ok, "")
    };
    report.add(
        level,
        "certificate",
        format!(
            "valid for {days} more days, until {}{advice}",
            own.validity().not_after
        ),
    );
    let names = names(own);
    if names.is_empty() {
        report.add(
            Level::Warning,
            "certificate",
            "it has no subjectAltName, so no client of today accepts it: have one made for the server's name",
        );
    } else {
        report.add(
            Level::Ok,
            "certificate",
            format!("it is for {}", names.join(", ")),
        );
    }
    let gap = chain
        .iter()
        .zip(chain.iter().skip(1))
        .find(|(one, next)| one.issuer() != next.subject());
    if let Some((one, next)) = gap {
        report.add(
            Level::Error,
            "certificate chain",
            format!(
                "'{}' was issued by '{}', but '{}' follows: put our own first, then each one's issuer",
                one.subject(),
                one.issuer(),
                next.subject()
            ),
        );
        return;
    }
    match (chain.len(), own.issuer() == own.subject()) {
        (_, true) => report.add(
            Level::Warning,
            "certificate chain",
            "it is self-signed, so clients accept it only where they were told to: have one issued",
        ),
        (1, false) => report.add(
            Level::Warning,
            "certificate chain",
            format!(
                "only our own certificate is in the file: unless '{}' is a root, clients miss its issuer (use fullchain.pem)",
                own.issuer()
            ),
        ),
        (_, false) => report.add(Level::Ok, "certificate chain", "in order"),
    }
}

fn names(certificate: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let names = extension
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(Escaped(name.as_bytes()).to_string()),
            GeneralName::IPAddress(bytes) => address(bytes),
            _ => None,
        });
    names.collect()
}

fn address(bytes: &[u8]) -> Option<String> {
    let v4 = <[u8; 4]>::try_from(bytes).map(|octets| std::net::Ipv4Addr::from(octets).to_string());
    let v6 = <[u8; 16]>::try_from(bytes).map(|octets| std::net::Ipv6Addr::from(octets).to_string());
    v4.or(v6).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_written_as_text() {
        assert_eq!(address(&[127, 0, 0, 1]).as_deref(), Some("127.0.0.1"));
        assert_eq!(address(&[0; 16]).as_deref(), Some("::"));
        assert_eq!(address(&[1, 2, 3]), None);
    }
}
