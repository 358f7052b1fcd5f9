//! What is wrong with the files that client certificates are examined with, though they can be used: `--check` and the listener say
//! it before clients meet it.

use std::fmt;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Name;

use super::client_auth::{List, TrustFile, check_authority, newest_first};
use crate::clock::is_due;
use crate::log::Escaped;

/// Something that the administrator should know.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Concern {
    /// Whether no client's certificate is accepted for it.
    pub(crate) is_fatal: bool,
    text: String,
}

impl fmt::Display for Concern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Of how many authorities the names are said, where many have the same fault.
const NAMES: usize = 3;

/// All that there is at the time `now`. Files that cannot be used have none: whoever makes a verifier of them says why.
pub(super) fn concerns(
    authorities: TrustFile<'_>,
    revocations: &[TrustFile<'_>],
    now: i64,
) -> Vec<Concern> {
    let Ok(lists) = newest_first(revocations, now) else {
        return Vec::new();
    };
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(authorities.bytes)
        .flatten()
        .collect();
    let certificates: Vec<_> = certificates
        .iter()
        .filter_map(|der| Authority::read(der, now))
        .collect();
    let mut texts = Vec::new();
    texts.extend(certificates.iter().filter_map(|one| {
        // One that was renewed with its key may stand beside its successor.
        let is_renewed = certificates.iter().any(|other| other.succeeds(one));
        let fault = one.fault.as_ref().filter(|_| !is_renewed)?;
        Some(format!("{}: {fault}", describe(&[one], authorities)))
    }));
    let good: Vec<_> = certificates.iter().filter(|one| one.is_good).collect();
    let judged = Judged::all(&lists, &good);
    texts.extend(judged.iter().flat_map(|list| list.faults(now)));
    let is_covered = |one: &&&Authority<'_>| judged.iter().any(|list| list.list.is_of(&one.parsed));
    let without: Vec<_> = good
        .iter()
        .filter(|one| !is_covered(one))
        .copied()
        .collect();
    if !lists.is_empty() && !without.is_empty() {
        texts.push(format!(
            "{}: no list of --client-crl is of it, so its clients are refused",
            describe(&without, authorities)
        ));
    }
    let mut concerns: Vec<_> = texts
        .into_iter()
        .map(|text| Concern {
            is_fatal: false,
            text,
        })
        .collect();
    // Each chain ends with a certificate of an authority's, which needs its list.
    let is_usable = |list: &List<'_>| {
        !is_out_of_date(list, now) && good.iter().any(|one| list.is_of(&one.parsed))
    };
    if !lists.is_empty() && !lists.iter().any(is_usable) {
        concerns.push(Concern {
            is_fatal: true,
            text: "no client's certificate is accepted: no authority of --client-ca has a list in --client-crl that is in force"
                .to_owned(),
        });
    }
    concerns
}

/// An authority, and what is wrong with its dates.
struct Authority<'a> {
    fault: Option<String>,
    is_good: bool,
    parsed: X509Certificate<'a>,
}

impl<'a> Authority<'a> {
    fn read(der: &'a [u8], now: i64) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(der).ok()?;
        let state = check_authority(der, now).ok()?;
        let is_good = state.is_ok();
        let from = parsed.validity().not_before.timestamp();
        let fault = match state {
            Ok(until) if is_due(from, until, now) => Some(format!(
                "it expires on {}, and its clients are refused then",
                parsed.validity().not_after
            )),
            Ok(_) => None,
            Err(why) => Some(format!("{why}, so it does not count")),
        };
        Some(Self {
            fault,
            is_good,
            parsed,
        })
    }

    /// Whether this is the other one, renewed.
    fn succeeds(&self, other: &Self) -> bool {
        self.fault.is_none()
            && self.parsed.subject() == other.parsed.subject()
            && self.parsed.public_key() == other.parsed.public_key()
    }
}

fn describe(authorities: &[&Authority<'_>], file: TrustFile<'_>) -> String {
    let names = authorities.iter().take(NAMES);
    let names: Vec<_> = names.map(|one| quote(one.parsed.subject())).collect();
    let more = match authorities.len().saturating_sub(NAMES) {
        0 => String::new(),
        number => format!(" and {number} more"),
    };
    format!(
        "client authority {}{more} in '{}' (--client-ca)",
        names.join(", "),
        file.path.display()
    )
}

fn quote(name: &X509Name<'_>) -> String {
    format!("'{}'", Escaped(name.to_string().as_bytes()))
}

/// A list that counts.
struct Judged<'a> {
    is_of_authority: bool,
    list: &'a List<'a>,
}

impl<'a> Judged<'a> {
    /// Of several lists of one issuer the first: they come newest first. Those of no authority are told apart by their names.
    fn all(lists: &'a [List<'a>], authorities: &[&Authority<'_>]) -> Vec<Self> {
        let mut seen = Vec::new();
        let mut judged = Vec::new();
        for list in lists {
            let authority = authorities.iter().find(|one| list.is_of(&one.parsed));
            let signer = (
                list.issuer.as_slice(),
                authority.map(|one| one.parsed.public_key().raw),
            );
            if !seen.contains(&signer) {
                seen.push(signer);
                judged.push(Self {
                    is_of_authority: authority.is_some(),
                    list,
                });
            }
        }
        judged
    }

    fn faults(&self, now: i64) -> Vec<String> {
        let list = self.list;
        let issuer = X509Name::from_der(&list.issuer);
        let issuer = issuer.map_or_else(|_| "''".to_owned(), |(_, name)| quote(&name));
        let path = list.file.path.display();
        let place = format!("revocation list of {issuer} in '{path}' (--client-crl)");
        let (from, until) = (list.this_update, list.next_update);
        let mut faults = Vec::new();
        if is_out_of_date(list, now) {
            faults.push(format!(
                "{place}: it was to be renewed by {until}, and its issuer's clients are refused until it is"
            ));
        } else if is_due(from.timestamp(), until.timestamp(), now) {
            faults.push(format!(
                "{place}: it is to be renewed by {until}, and its issuer's clients are refused then"
            ));
        }
        if !self.is_of_authority {
            faults.push(format!(
                "{place}: no authority of --client-ca has signed it, so it is for those alone who show its issuer's certificate as well"
            ));
        }
        faults
    }
}

/// As the library sees it.
fn is_out_of_date(list: &List<'_>, now: i64) -> bool {
    list.next_update.timestamp() <= now
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, IsCa, KeyPair, date_time_ymd};

    use super::super::client_auth::tests::{DAY, NOW, authority, file, params};
    use super::*;

    /// What is said of these files so many days after [`NOW`], with what is fatal marked.
    fn said(
        authorities: &[String],
        lists: &[&rcgen::CertificateRevocationList],
        days: i64,
    ) -> String {
        let lists: Vec<_> = lists.iter().map(|list| file("crl", list.der())).collect();
        let authorities = authorities.concat();
        let concerns = concerns(file("ca", authorities.as_bytes()), &lists, NOW + days * DAY);
        let lines = concerns.iter().map(|concern| {
            let mark = if concern.is_fatal { "fatal: " } else { "" };
            format!("{mark}{concern}")
        });
        lines.collect::<Vec<_>>().join("\n")
    }

    const NOBODY: &str = "fatal: no client's certificate is accepted: no authority of --client-ca has a list in --client-crl \
         that is in force";

    #[test]
    fn nothing_is_said_of_what_is_well() {
        let (one, other) = (authority("one", 1, None), authority("other", 2, None));
        let pems = [&one, &other].map(|one| one.certificate.pem());
        let superseded = one.list_of((2026, 1), (2026, 2), &[]);
        let lists = [one.list(&[]), other.list(&[])];
        assert_eq!(said(&pems, &[], 0), "");
        assert_eq!(said(&pems, &[&lists[0], &lists[1], &superseded], -40), "");
    }

    #[test]
    fn lists_are_due_with_their_last_third() {
        let ours = authority("ours", 1, None);
        let pem = [ours.certificate.pem()];
        // Of 31 days.
        let list = ours.list_of((2026, 6), (2026, 7), &[]);
        let place = "revocation list of 'CN=ours' in 'crl' (--client-crl): ";
        let date = "Jul  1 00:00:00 2026 +00:00";
        assert_eq!(said(&pem, &[&list], 15), "");
        assert_eq!(
            said(&pem, &[&list], 25),
            format!(
                "{place}it is to be renewed by {date}, and its issuer's clients are refused then"
            )
        );
        assert_eq!(
            said(&pem, &[&list], 30),
            format!(
                "{place}it was to be renewed by {date}, and its issuer's clients are refused until it is\n{NOBODY}"
            )
        );
    }

    #[test]
    fn lists_and_authorities_that_do_not_belong_together_are_named() {
        let [ours, namesake, foreign] =
            ["ours", "ours", "foreign"].map(|name| authority(name, 1, None));
        let pem = [ours.certificate.pem()];
        let without = "client authority 'CN=ours' in 'ca' (--client-ca): no list of --client-crl is of it, so its clients are refused";
        for (other, name) in [(&namesake, "ours"), (&foreign, "foreign")] {
            let of_other = other.list_of((2026, 6), (2026, 7), &[]);
            let stray = format!(
                "revocation list of 'CN={name}' in 'crl' (--client-crl): no authority of --client-ca has signed it, so it is for \
                 those alone who show its issuer's certificate as well"
            );
            assert_eq!(
                said(&pem, &[&of_other], 0),
                format!("{stray}\n{without}\n{NOBODY}")
            );
            let own = ours.list_of((2026, 6), (2026, 7), &[]);
            assert_eq!(said(&pem, &[&of_other, &own], 0), stray);
        }
        let many: Vec<_> = (0..5)
            .map(|number| authority(&format!("a{number}"), 1, None).certificate.pem())
            .chain(pem)
            .collect();
        let own = ours.list_of((2026, 6), (2026, 7), &[]);
        assert_eq!(
            said(&many, &[&own], 0),
            "client authority 'CN=a0', 'CN=a1', 'CN=a2' and 2 more in 'ca' (--client-ca): no list of --client-crl is of it, \
             so its clients are refused"
        );
    }

    #[test]
    fn authorities_that_expire_are_named_unless_they_are_renewed() {
        let key = KeyPair::generate().unwrap();
        let until = |key: &KeyPair, (year, month)| {
            let mut params = params("ours", 1);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.not_before = date_time_ymd(2025, 1, 1);
            params.not_after = date_time_ymd(year, month, 1);
            params.self_signed(key).unwrap().pem()
        };
        let (old, new) = (until(&key, (2026, 6)), until(&key, (2028, 1)));
        let other = until(&KeyPair::generate().unwrap(), (2028, 1));
        let place = "client authority 'CN=ours' in 'ca' (--client-ca): ";
        let due = format!(
            "{place}it expires on Jun  1 00:00:00 2026 +00:00, and its clients are refused then"
        );
        let over =
            format!("{place}it expired on Jun  1 00:00:00 2026 +00:00, so it does not count");
        assert_eq!(said(std::slice::from_ref(&old), &[], -40), "");
        assert_eq!(said(std::slice::from_ref(&old), &[], -10), due);
        for (days, expected) in [(-10, &due), (10, &over)] {
            assert_eq!(&said(&[old.clone(), other.clone()], &[], days), expected);
            assert_eq!(said(&[old.clone(), new.clone()], &[], days), "");
        }
    }
}
