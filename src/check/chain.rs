//! A certificate and its chain, as those see them who have to accept it.

use rustls::pki_types::CertificateDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::{Level, Report};
use crate::clock::{DAY, RENEWAL_DAYS};
use crate::log::Escaped;
use crate::signed::{Signature, Signed};

const CERTIFICATE: &str = "certificate";
const CHAIN: &str = "certificate chain";

/// Signature algorithms, as their identifiers are encoded, whose digests no client takes any more.
const REFUSED: [(&[u8], &str); 4] = [
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 4], "MD5"),
    (&[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 5], "SHA-1"),
    (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 1], "SHA-1"),
    (&[0x2b, 0x0e, 3, 2, 0x1d], "SHA-1"),
];

/// What every client refuses is an error, what some refuse or what looks odd a warning.
pub(super) fn check_chain(report: &mut Report, chain: &[CertificateDer<'_>], now: i64) {
    let mut links = Vec::new();
    for der in chain {
        match x509_parser::parse_x509_certificate(der) {
            Ok((_, parsed)) => links.push(Link { der, parsed }),
            Err(error) => {
                let text = format!("a certificate is malformed: {error}");
                return report.add(Level::Error, CHAIN, text);
            }
        }
    }
    let Some((own, issuers)) = links.split_first() else {
        return;
    };
    check_own(report, &own.parsed, now);
    check_issuers(report, own, issuers, now);
}

/// One certificate of the chain.
struct Link<'a> {
    der: &'a [u8],
    parsed: X509Certificate<'a>,
}

fn check_own(report: &mut Report, own: &X509Certificate<'_>, now: i64) {
    let days = (own.validity().not_after.timestamp() - now) / DAY;
    let (level, advice) = if days < RENEWAL_DAYS {
        (Level::Warning, ": renew it")
    } else {
        (Level::Ok, "")
    };
    report.add(
        level,
        CERTIFICATE,
        format!(
            "valid for {days} more days, until {}{advice}",
            own.validity().not_after
        ),
    );
    let names = names(own);
    if names.is_empty() {
        report.add(
            Level::Warning,
            CERTIFICATE,
            "it has no subjectAltName, so no client of today accepts it: have one made for the server's name",
        );
    } else {
        report.add(
            Level::Ok,
            CERTIFICATE,
            format!("it is for {}", names.join(", ")),
        );
    }
    if let Some(why) = fault_of_signature(own) {
        let text = format!("it {why}: have it issued anew");
        report.add(Level::Error, CERTIFICATE, text);
    }
    // RFC 5280 section 4.2.1.12: without the extension it is for everything.
    match own.extended_key_usage() {
        Ok(Some(usage)) if usage.value.server_auth => {}
        Ok(Some(usage)) if usage.value.any => report.add(
            Level::Warning,
            CERTIFICATE,
            "it is for any use and not for servers by name (serverAuth in extendedKeyUsage), which not every client accepts",
        ),
        Ok(Some(_)) => report.add(
            Level::Error,
            CERTIFICATE,
            "it is not for servers (no serverAuth in its extendedKeyUsage), so no client accepts it: have one issued that is",
        ),
        Ok(None) | Err(_) => {}
    }
}

fn check_issuers(report: &mut Report, own: &Link<'_>, issuers: &[Link<'_>], now: i64) {
    let mut is_good = true;
    let mut one = own;
    for (place, next) in (1..).zip(issuers) {
        let may_be_root = place > 1 && place == issuers.len();
        let fault = fault_between(one, next)
            .map(|text| (Level::Error, text))
            .or_else(|| fault_of_issuer(&next.parsed, may_be_root, now));
        if let Some((level, text)) = fault {
            report.add(level, CHAIN, text);
            is_good = false;
        }
        if one.parsed.issuer() != next.parsed.subject() {
            // What follows is out of order, too.
            return;
        }
        one = next;
    }
    let own = &own.parsed;
    match (issuers.is_empty(), own.issuer() == own.subject()) {
        (_, true) => report.add(
            Level::Warning,
            CHAIN,
            "it is self-signed, so clients accept it only where they were told to: have one issued",
        ),
        (true, false) => report.add(
            Level::Warning,
            CHAIN,
            format!(
                "only our own certificate is in the file: unless '{}' is a root, clients miss its issuer (use fullchain.pem)",
                own.issuer()
            ),
        ),
        (false, false) if is_good => report.add(Level::Ok, CHAIN, "in order"),
        (false, false) => {}
    }
}

/// Why `next` cannot be the issuer of `one`.
fn fault_between(one: &Link<'_>, next: &Link<'_>) -> Option<String> {
    let (subject, issuer) = (one.parsed.subject(), next.parsed.subject());
    if one.parsed.issuer() != issuer {
        return Some(format!(
            "'{subject}' was issued by '{}', but '{issuer}' follows: put our own first, then each one's issuer",
            one.parsed.issuer()
        ));
    }
    let signature = Signed::read(one.der).map(|signed| signed.verify(&next.parsed));
    (signature == Some(Signature::Bad)).then(|| {
        format!(
            "'{subject}' is not signed with the key of the '{issuer}' that follows: put the issuer of that name there whose key it is"
        )
    })
}

/// What is wrong with a certificate that others are issued by. The last of several may be a root that another has certified, for
/// clients that did not know it yet: what of that has aged does not concern those that do.
fn fault_of_issuer(
    issuer: &X509Certificate<'_>,
    may_be_root: bool,
    now: i64,
) -> Option<(Level, String)> {
    let (subject, validity) = (issuer.subject(), issuer.validity());
    // Clients have it already, or do not trust it, and go by what they have.
    if subject == issuer.issuer() {
        let is_over = validity.not_after.timestamp() < now;
        let end = if is_over { " that has expired" } else { "" };
        let text = format!(
            "'{subject}' is a root{end}, and clients that trust it have it already: leave it out, unless DANE (DANE-TA) demands it"
        );
        return Some((Level::Warning, text));
    }
    let (from, until) = (validity.not_before, validity.not_after);
    let days = (until.timestamp() - now) / DAY;
    let (level, advice) = if may_be_root {
        let advice = "leave it out if it is a root for clients, else put its successor there";
        (Level::Warning, advice)
    } else {
        (Level::Error, "put its successor there")
    };
    if !issuer.is_ca() {
        let text = format!("'{subject}' is not an authority (no CA:TRUE in its basicConstraints)");
        Some((Level::Error, text))
    } else if until.timestamp() < now {
        Some((level, format!("'{subject}' expired on {until}: {advice}")))
    } else if from.timestamp() > now {
        let text = format!("'{subject}' is not valid before {from}");
        Some((Level::Error, text))
    } else if let Some(why) = fault_of_signature(issuer) {
        Some((level, format!("'{subject}' {why}: {advice}")))
    } else if days < RENEWAL_DAYS {
        let text = format!("'{subject}' is valid for {days} more days, until {until}");
        Some((Level::Warning, text))
    } else {
        None
    }
}

/// What is wrong with a signature by itself. Nobody looks at that of a root, or of a certificate that is trusted for what it is.
fn fault_of_signature(one: &X509Certificate<'_>) -> Option<String> {
    let algorithm = one.signature_algorithm.algorithm.as_bytes();
    let (_, digest) = REFUSED.iter().find(|(refused, _)| *refused == algorithm)?;
    (one.subject() != one.issuer())
        .then(|| format!("is signed with {digest}, which no client of today accepts"))
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
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, RemoteKeyPair,
        SanType, date_time_ymd,
    };

    use super::super::Format;
    use super::*;
    use crate::signed::{self, testing::Holder};

    /// 2026-06-01.
    const NOW: i64 = 1_780_272_000;

    fn holder(
        name: &str,
        issuer: Option<&Holder>,
        change: impl Fn(&mut CertificateParams),
    ) -> Holder {
        signed::testing::holder(name, issuer, |params| {
            let host = "mail.example".try_into().unwrap();
            params.subject_alt_names = vec![SanType::DnsName(host)];
            change(params);
        })
    }

    fn authority(params: &mut CertificateParams) {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }

    /// All but the praise.
    fn found(chain: &[&Holder]) -> String {
        let chain: Vec<_> = chain
            .iter()
            .map(|one| one.certificate.der().clone())
            .collect();
        found_in(&chain)
    }

    fn found_in(chain: &[CertificateDer<'_>]) -> String {
        let mut report = Report::default();
        check_chain(&mut report, chain, NOW);
        let text = report.write(Format::Text);
        let lines: Vec<_> = text
            .lines()
            .filter(|line| !line.starts_with("ok: "))
            .collect();
        assert_eq!(
            text.contains("ok: certificate chain: in order"),
            chain.len() > 1 && !lines.iter().any(|line| line.contains("chain")),
            "{text}"
        );
        lines.join("\n")
    }

    #[test]
    fn a_chain_that_clients_refuse_is_not_in_order() {
        let root = holder("root", None, authority);
        let until = |(year, month)| {
            move |params: &mut CertificateParams| {
                authority(params);
                params.not_before = date_time_ymd(2025, 1, 1);
                params.not_after = date_time_ymd(year, month, 1);
            }
        };
        let good = holder("between", Some(&root), authority);
        let namesake = holder("between", Some(&root), authority);
        let expired = holder("between", Some(&root), until((2026, 5)));
        let due = holder("between", Some(&root), until((2026, 6)));
        let plain = holder("between", Some(&root), |_| {});
        let early = holder("between", Some(&root), |params| {
            authority(params);
            params.not_before = date_time_ymd(2026, 7, 1);
        });
        let old_root = holder("old root", None, until((2026, 5)));
        let crossed = holder("new root", Some(&root), until((2026, 5)));
        let below = holder("between", Some(&crossed), authority);
        let below_plain = holder("below", Some(&plain), authority);
        let of = |issuer: &Holder| holder("mail", Some(issuer), |_| {});
        let error = "error: certificate chain: ";
        let warning = "warning: certificate chain: ";
        for (chain, expected) in [
            (&[&of(&good), &good][..], String::new()),
            (
                &[&of(&good), &namesake],
                format!(
                    "{error}'CN=mail' is not signed with the key of the 'CN=between' that follows"
                ),
            ),
            (
                &[&of(&expired), &expired],
                format!("{error}'CN=between' expired on May  1 00:00:00 2026"),
            ),
            (
                &[&of(&due), &due],
                format!("{warning}'CN=between' is valid for 0 more days"),
            ),
            (
                &[&of(&early), &early],
                format!("{error}'CN=between' is not valid before Jul  1"),
            ),
            (
                &[&of(&plain), &plain],
                format!("{error}'CN=between' is not an authority"),
            ),
            (
                &[&of(&good), &good, &root],
                format!("{warning}'CN=root' is a root, and"),
            ),
            (
                &[&of(&old_root), &old_root],
                format!("{warning}'CN=old root' is a root that has expired"),
            ),
            (
                &[&of(&good), &root, &good],
                format!("{error}'CN=mail' was issued by 'CN=between', but 'CN=root' follows"),
            ),
            (
                &[&of(&below), &below, &crossed],
                format!(
                    "{warning}'CN=new root' expired on May  1 00:00:00 2026 +00:00: leave it out if it is a root for clients"
                ),
            ),
            (
                &[&of(&below), &below, &crossed, &old_root],
                format!("{error}'CN=new root' expired on"),
            ),
            (
                &[&of(&below_plain), &below_plain, &plain],
                format!("{error}'CN=between' is not an authority"),
            ),
            (
                &[&of(&root)],
                format!("{warning}only our own certificate is in the file"),
            ),
            (&[&root], format!("{warning}it is self-signed")),
        ] {
            let text = found(chain);
            assert!(text.starts_with(&expected), "{expected}: {text}");
            assert_eq!(text.is_empty(), expected.is_empty(), "{text}");
        }
    }

    #[test]
    fn a_certificate_that_is_not_for_servers_is_refused() {
        use ExtendedKeyUsagePurpose::{Any, ClientAuth, ServerAuth};
        let root = holder("root", None, authority);
        let between = holder("between", Some(&root), authority);
        for (usages, expected) in [
            (&[][..], ""),
            (&[ServerAuth], ""),
            (&[ClientAuth, ServerAuth], ""),
            (&[Any], "warning: certificate: it is for any use"),
            (&[ClientAuth], "error: certificate: it is not for servers"),
        ] {
            let own = holder("mail", Some(&between), |params| {
                params.extended_key_usages = usages.to_vec();
            });
            let text = found(&[&own, &between]);
            assert!(text.starts_with(expected), "{usages:?}: {text}");
            assert_eq!(text.is_empty(), expected.is_empty(), "{text}");
        }
    }

    /// A key that says to be RSA's.
    struct Rsa;

    impl RemoteKeyPair for Rsa {
        fn public_key(&self) -> &[u8] {
            &[]
        }

        fn sign(&self, _: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
            Ok(vec![0; 256])
        }

        fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
            &rcgen::PKCS_RSA_SHA256
        }
    }

    /// The certificate as its issuer would have made it with another algorithm of PKCS #1, which has this number.
    fn signed_with(number: u8, one: &Holder) -> CertificateDer<'static> {
        const PKCS1: &[u8] = &[6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1];
        let mut der = one.certificate.der().to_vec();
        // Not that of its key, which is on a curve.
        for place in 0..der.len() - PKCS1.len() {
            if der[place..].starts_with(PKCS1) {
                der[place + PKCS1.len()] = number;
            }
        }
        der.into()
    }

    #[test]
    fn a_digest_that_clients_refuse_is_refused_where_they_look_at_it() {
        let rsa = || KeyPair::from_remote(Box::new(Rsa)).unwrap();
        let mut root = holder("root", None, authority);
        root.key = rsa();
        let mut between = holder("between", Some(&root), authority);
        between.key = rsa();
        let own = holder("mail", Some(&between), |_| {});
        // Its subject is its issuer's.
        let alone = holder("root", Some(&root), |_| {});
        for (number, digest) in [(4, "MD5"), (5, "SHA-1")] {
            let text = found_in(&[signed_with(number, &own), signed_with(number, &between)]);
            let expected = format!(
                "error: certificate: it is signed with {digest}, which no client of today accepts: have it issued anew\n\
                 error: certificate chain: 'CN=between' is signed with {digest}, which no client of today accepts: put its successor there"
            );
            assert_eq!(text, expected);
            let text = found_in(&[signed_with(number, &alone)]);
            assert!(
                text.starts_with("warning: certificate chain: it is self-signed"),
                "{text}"
            );
        }
        // sha512WithRSAEncryption, which none of the keys has made.
        let text = found_in(&[signed_with(13, &own)]);
        assert!(!text.contains("error: "), "{text}");
    }

    #[test]
    fn addresses_are_written_as_text() {
        assert_eq!(address(&[127, 0, 0, 1]).as_deref(), Some("127.0.0.1"));
        assert_eq!(address(&[0; 16]).as_deref(), Some("::"));
        assert_eq!(address(&[1, 2, 3]), None);
    }
}
