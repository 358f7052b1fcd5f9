//! The backend that the options choose: one that is started, connected to, or there, and never a mixture.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use super::ClientAuth;
use super::arguments::PolicyName;
use crate::connector::Target;
use crate::error::Error;
use crate::proxy_header::outgoing::Version;
use crate::tls::ClientDemand;

/// Who speaks IMAP.
#[derive(Debug)]
pub(crate) enum BackendChoice {
    /// A server to connect to, as this user (never that of a certificate), with this header first.
    Connect {
        header: Option<Version>,
        target: Target,
        user: BackendUserChoice,
    },
    /// An open descriptor (the old recipe's `-F 3`).
    Descriptor(RawFd),
    /// A program to start, with its arguments, and the user to run it as.
    Program {
        command: Vec<OsString>,
        user: BackendUserChoice,
    },
}

/// Whom the backend runs as.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum BackendUserChoice {
    /// As we were started.
    AsStarted,
    /// This one (`--backend-user`).
    Named(String),
    /// The one whom the client's certificate names (`--backend-user-from-cert`).
    OfCertificate,
}

/// BACKEND and ARGS where a command line is awkward: one set of settings serves every superserver.
pub(super) const BACKEND_VARIABLE: &str = "IMAP_TLS_BACKEND";

impl BackendChoice {
    /// The option by which its user was chosen, if it was: to become another needs root.
    pub(super) fn user_option(&self) -> Option<&'static str> {
        match self {
            Self::Connect { user, .. } | Self::Program { user, .. } => match user {
                BackendUserChoice::AsStarted => None,
                BackendUserChoice::Named(_) => Some("--backend-user"),
                BackendUserChoice::OfCertificate => Some("--backend-user-from-cert"),
            },
            Self::Descriptor(_) => None,
        }
    }
}

/// A certificate names the user only where every session has one: under `optional` the first backend starts before TLS.
pub(super) fn choose_backend_user(
    named: Option<String>,
    is_of_certificate: bool,
    client_auth: Option<&ClientAuth>,
    policy: PolicyName,
) -> Result<BackendUserChoice, Error> {
    const OPTION: &str = "--backend-user-from-cert";
    let demand = client_auth.map(|client_auth| client_auth.demand);
    match (is_of_certificate, named) {
        (false, None) => Ok(BackendUserChoice::AsStarted),
        (false, Some(name)) => Ok(BackendUserChoice::Named(name)),
        (true, Some(_)) => Err(Error::Usage(format!(
            "{OPTION} and --backend-user exclude each other"
        ))),
        (true, None) if demand != Some(ClientDemand::Require) => Err(Error::Usage(format!(
            "{OPTION} needs a certificate from every client: --client-ca FILE and --client-cert required"
        ))),
        (true, None) if policy == PolicyName::Optional => Err(Error::Usage(format!(
            "{OPTION} needs TLS, so it conflicts with --tls optional"
        ))),
        (true, None) => Ok(BackendUserChoice::OfCertificate),
    }
}

/// `connect` is where to connect to, and the header that is to be sent there.
pub(super) fn choose_backend(
    arguments: Vec<OsString>,
    descriptor: Option<RawFd>,
    connect: (Option<Target>, Option<Version>),
    user: BackendUserChoice,
) -> Result<BackendChoice, Error> {
    match connect {
        (Some(target), header) => choose_connect(target, header, (&arguments, descriptor), user),
        (None, Some(_)) => Err(Error::Usage(
            "--send-proxy without --connect: it is for a backend to connect to".to_owned(),
        )),
        (None, None) => choose_started(arguments, descriptor, user),
    }
}

fn choose_started(
    arguments: Vec<OsString>,
    descriptor: Option<RawFd>,
    user: BackendUserChoice,
) -> Result<BackendChoice, Error> {
    let command = match (arguments.is_empty(), descriptor) {
        (true, None) => split_at_spaces(&std::env::var_os(BACKEND_VARIABLE).unwrap_or_default()),
        _ => arguments,
    };
    match (descriptor, command.is_empty()) {
        (Some(_), false) => Err(Error::Usage(
            "--backend-fd and a BACKEND to start exclude each other".to_owned(),
        )),
        (Some(_), true) if user != BackendUserChoice::AsStarted => Err(Error::Usage(
            "--backend-user is for a BACKEND to start, not for --backend-fd".to_owned(),
        )),
        (Some(number), true) => Ok(BackendChoice::Descriptor(number)),
        (None, true) => Err(Error::Usage(
            "no BACKEND: name the IMAP server to start, with its arguments, after the options or in IMAP_TLS_BACKEND, or one to --connect to"
                .to_owned(),
        )),
        (None, false) => Ok(BackendChoice::Program { command, user }),
    }
}

/// Another backend beside the one to connect to would be left out silently, and somebody would wonder.
fn choose_connect(
    target: Target,
    header: Option<Version>,
    (command, descriptor): (&[OsString], Option<RawFd>),
    user: BackendUserChoice,
) -> Result<BackendChoice, Error> {
    let variable = std::env::var_os(BACKEND_VARIABLE).unwrap_or_default();
    let other = match (command, descriptor, user.clone()) {
        (_, Some(_), _) => "--backend-fd",
        ([_, ..], None, _) => "a BACKEND to start",
        ([], None, BackendUserChoice::OfCertificate) => "--backend-user-from-cert",
        ([], None, _) if !split_at_spaces(&variable).is_empty() => BACKEND_VARIABLE,
        ([], None, _) => {
            return Ok(BackendChoice::Connect {
                header,
                target,
                user,
            });
        }
    };
    Err(Error::Usage(format!(
        "--connect and {other} exclude each other"
    )))
}

fn split_at_spaces(text: &OsString) -> Vec<OsString> {
    let words = text
        .as_bytes()
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    words
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect()
}
