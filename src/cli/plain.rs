//! A plain command line read without clap, which takes a tenth of a connection to be asked.
//!
//! The definition is clap's ([`Arguments`]); here is only what each start would otherwise have to work out from it, and a test
//! for each part that it is the same. Plain is: options with a value, `--name VALUE`, each once, `--accept-proxy`,
//! and the backend. For everything else - other flags, abbreviations, faults, help - the answer is `None`, and clap is asked.

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;

use super::arguments::{
    Arguments, DemandName, LEAST_DESCRIPTOR, LIST_SEPARATOR, PolicyName, VersionName,
    parse_seconds, parse_size,
};
use super::backend::BACKEND_VARIABLE;
use super::listener::{ADDRESS_SEPARATOR, LISTENER_VARIABLES, ListenerArguments};
use super::settings::SETTINGS_VARIABLE;
use crate::connector::Target;
use crate::log::Destination;
use crate::proxy_header::Sender;
use crate::proxy_header::outgoing::Version;
use crate::sandbox::Requirement;

/// Options with a value: name, variable, default.
const VALUED: [(&str, &str, Option<&str>); 26] = [
    ("backend-fd", "IMAP_TLS_BACKEND_FD", None),
    ("backend-user", "IMAP_TLS_BACKEND_USER", None),
    ("cert", "IMAP_TLS_CERT", None),
    ("cert-dir", "IMAP_TLS_CERT_DIR", None),
    ("chroot", "IMAP_TLS_CHROOT", Some("/var/lib/imap-tls/empty")),
    ("client-ca", "IMAP_TLS_CLIENT_CA", None),
    ("client-cert", "IMAP_TLS_CLIENT_CERT", None),
    ("client-crl", "IMAP_TLS_CLIENT_CRL", None),
    ("connect", "IMAP_TLS_CONNECT", None),
    ("group", "IMAP_TLS_GROUP", None),
    (
        "handshake-timeout",
        "IMAP_TLS_HANDSHAKE_TIMEOUT",
        Some("30"),
    ),
    ("keeper", "IMAP_TLS_KEEPER", None),
    (
        "keeper-user",
        "IMAP_TLS_KEEPER_USER",
        Some("imap-tls-keeper"),
    ),
    ("key", "IMAP_TLS_KEY", None),
    ("log", "IMAP_TLS_LOG", Some("auto")),
    ("login-timeout", "IMAP_TLS_LOGIN_TIMEOUT", Some("120")),
    ("memory-limit", "IMAP_TLS_MEMORY_LIMIT", Some("32M")),
    ("min-tls", "IMAP_TLS_MIN_TLS", Some("1.2")),
    ("ocsp", "IMAP_TLS_OCSP", None),
    ("proxy-from", "IMAP_TLS_PROXY_FROM", None),
    ("require", "IMAP_TLS_REQUIRE", None),
    ("settings", SETTINGS_VARIABLE, None),
    ("send-proxy", "IMAP_TLS_SEND_PROXY", None),
    ("ticket-keys", "IMAP_TLS_TICKET_KEYS", None),
    ("tls", "IMAP_TLS_TLS", Some("required")),
    ("user", "IMAP_TLS_USER", Some("imap-tls")),
];

/// The flag of a machine behind a balancer, where each start counts: name and variable.
const PLAIN_FLAG: (&str, &str) = ("accept-proxy", "IMAP_TLS_ACCEPT_PROXY");

/// Flags are for terminals and trials: a line with one is not plain, nor is an environment with one.
const FLAG_VARIABLES: [&str; 5] = [
    "IMAP_TLS_BACKEND_USER_FROM_CERT",
    "IMAP_TLS_QUIET",
    "IMAP_TLS_STRICT_SNI",
    "IMAP_TLS_UNPRIVILEGED",
    "IMAP_TLS_VERBOSE",
];

/// The environment variables that are ours. (A test compares with clap, which takes longer to tell than all the rest of a start.)
pub(super) fn own_variables() -> impl Iterator<Item = &'static str> {
    let valued = VALUED.iter().map(|(_, variable, _)| *variable);
    let flags = FLAG_VARIABLES.into_iter().chain([PLAIN_FLAG.1]);
    valued
        .chain(flags)
        .chain(LISTENER_VARIABLES)
        .chain([BACKEND_VARIABLE])
}

/// Reads a plain command line, the program's name first. `variable` is the environment.
pub(super) fn read(
    arguments: &[OsString],
    variable: impl Fn(&str) -> Option<OsString>,
) -> Option<Arguments> {
    let mut given = Given::default();
    let mut words = arguments.iter().skip(1);
    let mut backend = Vec::new();
    let mut is_flagged = false;
    while let Some(word) = words.next() {
        if word == "--" {
            break;
        }
        let Some(name) = word.as_bytes().strip_prefix(b"--") else {
            backend.push(word.clone());
            break;
        };
        if name == PLAIN_FLAG.0.as_bytes() {
            // Twice is a fault.
            if std::mem::replace(&mut is_flagged, true) {
                return None;
            }
            continue;
        }
        given.put(name, words.next()?)?;
    }
    backend.extend(words.cloned());
    if backend.first().is_some_and(|word| is_dashed(word)) {
        return None;
    }
    let mut not_plain = FLAG_VARIABLES.iter().chain(&LISTENER_VARIABLES);
    if not_plain.any(|name| variable(name).is_some()) {
        return None;
    }
    let accept_proxy = match (is_flagged, variable(PLAIN_FLAG.1)) {
        (true, None) => true,
        (false, None) => false,
        // Other words for yes, and for no, are clap's.
        (_, Some(text)) if text == "yes" || text == "true" || text == "1" => true,
        (_, Some(_)) => return None,
    };
    given.add_variables(variable);
    Some(Arguments {
        accept_proxy,
        backend,
        backend_fd: given.value("backend-fd")?,
        backend_user: given.value("backend-user")?,
        backend_user_from_cert: false,
        cert: given.value("cert")?,
        cert_dir: given.value("cert-dir")?,
        check: None,
        chroot: given.value("chroot")?,
        client_ca: given.value("client-ca")?,
        client_cert: given.value("client-cert")?,
        client_crl: given.value("client-crl")?,
        connect: given.value("connect")?,
        group: given.value("group")?,
        handshake_timeout: given.value("handshake-timeout")?,
        help: None,
        keep: false,
        keeper: given.value("keeper")?,
        keeper_user: given.value("keeper-user")?,
        key: given.value("key")?,
        listener: ListenerArguments::default(),
        log: given.value("log")?,
        login_timeout: given.value("login-timeout")?,
        memory_limit: given.value("memory-limit")?,
        min_tls: given.value("min-tls")?,
        ocsp: given.value("ocsp")?,
        proxy_from: given.value("proxy-from")?,
        quiet: false,
        require: given.value("require")?,
        settings: given.value("settings")?,
        send_proxy: given.value("send-proxy")?,
        strict_sni: false,
        ticket_keys: given.value("ticket-keys")?,
        tls: given.value("tls")?,
        unprivileged: false,
        user: given.value("user")?,
        verbose: false,
    })
}

fn is_dashed(word: &OsStr) -> bool {
    word.as_bytes().starts_with(b"-")
}

/// The values that were given, in the order of [`VALUED`].
#[derive(Default)]
struct Given([Option<OsString>; VALUED.len()]);

impl Given {
    fn put(&mut self, name: &[u8], value: &OsStr) -> Option<()> {
        let place = VALUED.iter().position(|(own, ..)| own.as_bytes() == name)?;
        let place = self.0.get_mut(place)?;
        // Twice is a fault, and a dash may be one.
        if place.is_some() || is_dashed(value) {
            return None;
        }
        *place = Some(value.to_owned());
        Some(())
    }

    fn add_variables(&mut self, variable: impl Fn(&str) -> Option<OsString>) {
        for (place, (_, name, _)) in self.0.iter_mut().zip(VALUED) {
            if place.is_none() {
                *place = variable(name);
            }
        }
    }

    /// The value of an option, or its default; `None` if it is not a good one.
    fn value<T: Value>(&self, name: &str) -> Option<T> {
        let place = VALUED.iter().position(|(own, ..)| *own == name)?;
        let default = VALUED.get(place).and_then(|(_, _, default)| *default);
        let given = self.0.get(place)?.as_deref();
        T::optional(given.or(default.map(OsStr::new)))
    }
}

/// What an option's value can be read as, just as clap does by the parser that its definition names.
trait Value: Sized {
    fn read(text: &OsStr) -> Option<Self>;

    fn optional(text: Option<&OsStr>) -> Option<Self> {
        Self::read(text.filter(|text| !text.is_empty())?)
    }
}

impl<T: Value> Value for Option<T> {
    fn read(text: &OsStr) -> Option<Self> {
        T::read(text).map(Some)
    }

    fn optional(text: Option<&OsStr>) -> Option<Self> {
        match text {
            Some(_) => T::optional(text).map(Some),
            None => Some(None),
        }
    }
}

/// Values of an option that may be repeated; where it is, the line is not plain.
impl Value for Vec<PathBuf> {
    fn read(text: &OsStr) -> Option<Self> {
        let parts = text.as_bytes().split(|byte| *byte == LIST_SEPARATOR);
        parts
            .map(|part| PathBuf::optional(Some(OsStr::from_bytes(part))))
            .collect()
    }

    fn optional(text: Option<&OsStr>) -> Option<Self> {
        text.map_or(Some(Self::new()), Self::read)
    }
}

/// The same for what a kernel must have.
impl Value for Vec<Requirement> {
    fn read(text: &OsStr) -> Option<Self> {
        let parts = text.to_str()?.split(char::from(LIST_SEPARATOR));
        parts.map(|part| part.parse().ok()).collect()
    }

    fn optional(text: Option<&OsStr>) -> Option<Self> {
        text.map_or(Some(Self::new()), Self::read)
    }
}

/// The same for addresses.
impl Value for Vec<Sender> {
    fn read(text: &OsStr) -> Option<Self> {
        let parts = text.to_str()?.split(ADDRESS_SEPARATOR);
        parts.map(|part| part.parse().ok()).collect()
    }

    fn optional(text: Option<&OsStr>) -> Option<Self> {
        text.map_or(Some(Self::new()), Self::read)
    }
}

impl Value for String {
    fn read(text: &OsStr) -> Option<Self> {
        text.to_str().map(str::to_owned)
    }
}

impl Value for PathBuf {
    fn read(text: &OsStr) -> Option<Self> {
        Some(text.into())
    }
}

impl Value for Duration {
    fn read(text: &OsStr) -> Option<Self> {
        parse_seconds(text.to_str()?).ok()
    }
}

impl Value for u64 {
    fn read(text: &OsStr) -> Option<Self> {
        parse_size(text.to_str()?).ok()
    }
}

impl Value for RawFd {
    fn read(text: &OsStr) -> Option<Self> {
        let number = text.to_str()?.parse().ok();
        number.filter(|number| *number >= LEAST_DESCRIPTOR)
    }
}

impl Value for PolicyName {
    fn read(text: &OsStr) -> Option<Self> {
        Self::from_str(text.to_str()?, false).ok()
    }
}

impl Value for VersionName {
    fn read(text: &OsStr) -> Option<Self> {
        Self::from_str(text.to_str()?, false).ok()
    }
}

impl Value for Target {
    fn read(text: &OsStr) -> Option<Self> {
        Self::parse(text).ok()
    }
}

impl Value for Version {
    fn read(text: &OsStr) -> Option<Self> {
        Self::from_str(text.to_str()?, false).ok()
    }
}

impl Value for DemandName {
    fn read(text: &OsStr) -> Option<Self> {
        Self::from_str(text.to_str()?, false).ok()
    }
}

impl Value for Destination {
    fn read(text: &OsStr) -> Option<Self> {
        Self::from_str(text.to_str()?, false).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{ArgAction, Parser as _};

    use super::*;

    /// Reads both ways. What is read without clap must be what clap reads.
    fn is_plain(words: &[&str]) -> bool {
        let words: Vec<OsString> = ["imap-tls"].iter().chain(words).map(Into::into).collect();
        let Some(plain) = read(&words, |_| None) else {
            return false;
        };
        let asked = Arguments::try_parse_from(&words).unwrap_or_else(|error| {
            panic!("{words:?}: {error}");
        });
        assert_eq!(format!("{plain:?}"), format!("{asked:?}"), "{words:?}");
        true
    }

    #[test]
    fn the_table_is_claps_own() {
        let command = super::super::command_line();
        let (mut valued, mut flags, mut listeners) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for argument in command.get_arguments() {
            let Some(variable) = argument.get_env().and_then(OsStr::to_str) else {
                continue;
            };
            match argument.get_action() {
                _ if argument.get_help_heading() == Some("Listener") => {
                    listeners.insert(variable);
                }
                ArgAction::SetTrue => assert!(flags.insert(variable)),
                ArgAction::Append if argument.is_positional() => {}
                ArgAction::Append | ArgAction::Set => {
                    let default = argument.get_default_values().first();
                    let default = default.and_then(|text| text.to_str());
                    assert!(valued.insert((argument.get_long().unwrap(), variable, default)));
                }
                other => panic!("{variable}: {other:?}"),
            }
        }
        assert_eq!(valued, BTreeSet::from(VALUED));
        assert!(flags.remove(PLAIN_FLAG.1));
        assert_eq!(flags, BTreeSet::from(FLAG_VARIABLES));
        assert_eq!(listeners, BTreeSet::from(LISTENER_VARIABLES));
    }

    #[test]
    fn every_value_is_read_as_clap_reads_it() {
        let texts = [
            "required",
            "optional",
            "implicit",
            "Required",
            "auto",
            "stderr",
            "syslog",
            "",
            "-",
            "-x",
            "--",
            "0",
            "1",
            "2",
            "3",
            "+4",
            "007",
            "30",
            "86400",
            "86401",
            "64k",
            "64K",
            "1G",
            "1.5M",
            "99999999999999999999",
            "ä",
            "/a b",
            "a:b",
            "a::b",
            ":",
            "1.2",
            "1.3",
            "request",
            "unix",
            "192.0.2.1",
            "192.0.2.1/24",
            "192.0.2.0/24 2001:db8::/32",
            "::1 ",
            "localhost:143",
            "[::1]:143",
            "unix:/a",
            "v1",
            "v2",
            "landlock",
            "landlock=6:mdwe",
            "landlock=0",
            "mdwe:",
        ];
        for (name, _, default) in VALUED {
            let option = format!("--{name}");
            let plain = texts
                .iter()
                .filter(|text| is_plain(&[&option, text, "imapd"]));
            assert!(plain.count() >= 2, "{name}");
            assert!(default.is_none_or(|text| is_plain(&[&option, text, "--", "imapd"])));
            // Not plain: given twice, without a value, in another form.
            for words in [
                [&option, "3", &option, "3"].as_slice(),
                &[&option],
                &[&format!("{option}=3"), "imapd"],
                &[&option[..4], "3", "imapd"],
            ] {
                assert!(!is_plain(words), "{words:?}");
            }
        }
    }

    #[test]
    fn a_variable_is_read_as_the_option_is() {
        for (name, variable, _) in VALUED {
            for text in ["required", "stderr", "7", "12M", ""] {
                let by_option = read(
                    &["imap-tls".into(), format!("--{name}").into(), text.into()],
                    |_| None,
                );
                let by_variable = read(&["imap-tls".into()], |asked| {
                    (asked == variable).then(|| text.into())
                });
                assert_eq!(
                    format!("{by_option:?}"),
                    format!("{by_variable:?}"),
                    "{name}"
                );
                let both = read(
                    &["imap-tls".into(), format!("--{name}").into(), text.into()],
                    |asked| (asked == variable).then(|| "!".into()),
                );
                assert_eq!(format!("{by_option:?}"), format!("{both:?}"), "{name}");
            }
        }
        for (text, expected) in [
            ("yes", Some(true)),
            ("1", Some(true)),
            ("true", Some(true)),
            ("no", None),
            ("", None),
        ] {
            let flagged = read(&["imap-tls".into()], |asked| {
                (asked == PLAIN_FLAG.1).then(|| text.into())
            });
            assert_eq!(flagged.map(|parsed| parsed.accept_proxy), expected);
        }
        for variable in FLAG_VARIABLES.iter().chain(&LISTENER_VARIABLES) {
            let flagged = read(&["imap-tls".into()], |asked| {
                (asked == *variable).then(|| "0".into())
            });
            assert!(flagged.is_none());
        }
    }

    #[test]
    fn any_order_of_words_is_read_as_clap_reads_it() {
        let vocabulary = [
            "--cert",
            "c",
            "--key",
            "--tls",
            "implicit",
            "--user",
            "--",
            "-v",
            "--verbose",
            "--help",
            "-",
            "imapd",
            "--backend-fd",
            "3",
            "--check",
            "--check=json",
            "--log=auto",
            "--group",
            "",
            "--accept-proxy",
            "--proxy-from",
            "::1",
            "--nonsense",
        ];
        let mut plain = 0;
        // A walk through lines of up to six words that never repeats itself (a full cycle modulo 2^31).
        let mut state: usize = 1;
        for _ in 0..4000 {
            let mut words = Vec::new();
            for _ in 0..=state % 6 {
                state = (state * 1_103_515_245 + 12_345) % (1 << 31);
                words.push(vocabulary[(state >> 8) % vocabulary.len()]);
            }
            plain += usize::from(is_plain(&words));
        }
        assert!(plain > 100, "{plain}");
    }

    #[test]
    fn what_a_superserver_starts_is_plain() {
        assert!(is_plain(&[
            "--cert", "c", "--key", "k", "--", "imapd", "-x", "--tls", "--"
        ]));
        assert!(is_plain(&[
            "--tls", "implicit", "--cert", "c", "--key", "k", "imapd", "Maildir"
        ]));
        assert!(is_plain(&[
            "--accept-proxy",
            "--proxy-from",
            "192.0.2.1",
            "--cert",
            "c",
            "imapd"
        ]));
        assert!(is_plain(&[]));
    }
}
