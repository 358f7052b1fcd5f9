//! The backend's environment: the superserver's, less what is ours or could deceive, plus what is known of the connection.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;

use super::c_string;
use crate::activation::Addresses;
use crate::cli::OWN_VARIABLES;
use crate::error::Error;
use crate::sandbox::BackendUser;
use crate::tls::Facts;

/// What the superserver's environment keeps, less what is ours or could deceive the backend.
pub(super) fn environment() -> Result<Vec<CString>, Error> {
    std::env::vars_os()
        .filter(|(name, _)| {
            !is_removed(name.as_bytes()) && !OWN_VARIABLES.iter().any(|own| name == own)
        })
        .map(|(name, value)| variable(name.as_bytes(), value.as_bytes()))
        .collect()
}

fn variable(name: &[u8], value: &[u8]) -> Result<CString, Error> {
    c_string(&[name, b"=", value].concat())
}

/// Sets a variable, in the place of the superserver's.
fn set(environment: &mut Vec<CString>, name: &str, value: &[u8]) {
    environment.retain(|other| {
        other
            .as_bytes()
            .strip_prefix(name.as_bytes())
            .is_none_or(|rest| !rest.starts_with(b"="))
    });
    // No value that is set here contains a zero octet: they are addresses, and what passwd(5) says.
    environment.extend(variable(name.as_bytes(), value).ok());
}

/// The connection, as UCSPI and as systemd and CGI have it.
pub(super) fn set_addresses(environment: &mut Vec<CString>, Addresses { local, peer }: &Addresses) {
    for (name, value) in [
        ("PROTO", "TCP".to_owned()),
        ("REMOTE_ADDR", peer.ip().to_string()),
        ("REMOTE_PORT", peer.port().to_string()),
        ("TCPLOCALIP", local.ip().to_string()),
        ("TCPLOCALPORT", local.port().to_string()),
        ("TCPREMOTEIP", peer.ip().to_string()),
        ("TCPREMOTEPORT", peer.port().to_string()),
    ] {
        set(environment, name, value.as_bytes());
    }
}

/// As login(1) sets them.
pub(super) fn set_user(environment: &mut Vec<CString>, user: &BackendUser) {
    for (name, value) in [
        ("HOME", &user.home),
        ("LOGNAME", &user.name),
        ("SHELL", &user.shell),
        ("USER", &user.name),
    ] {
        set(environment, name, value.as_bytes());
    }
}

/// A client could write `TCPREMOTEINFO` through its ident server; TLS facts are ours to state; what belongs to activation was
/// for us (sd_listen_fds(3), sd_notify(3)), as was the directory with credentials, which may hold the private key.
fn is_removed(name: &[u8]) -> bool {
    const NAMES: [&[u8]; 7] = [
        b"CREDENTIALS_DIRECTORY",
        b"IMAP_TLS",
        b"MAINPID",
        b"NOTIFY_SOCKET",
        b"TCPREMOTEINFO",
        b"WATCHDOG_PID",
        b"WATCHDOG_USEC",
    ];
    NAMES.contains(&name) || name.starts_with(b"LISTEN_") || name.starts_with(b"SSL_")
}

/// The variables that tell the backend about TLS: Apache's mod_ssl names, and Courier's `IMAP_TLS`.
pub(super) fn tls_environment(facts: &Facts) -> Vec<CString> {
    let mut variables = vec![
        ("IMAP_TLS", "1"),
        ("SSL_CIPHER", facts.cipher()),
        ("SSL_PROTOCOL", facts.version()),
        (
            "SSL_SESSION_RESUMED",
            if facts.is_resumed() {
                "Resumed"
            } else {
                "Initial"
            },
        ),
    ];
    variables.extend(facts.server_name().map(|name| ("SSL_TLS_SNI", name)));
    match facts.client() {
        Some(client) => variables.extend(client.variables()),
        None => variables.push(("SSL_CLIENT_VERIFY", "NONE")),
    }
    variables
        .iter()
        .filter_map(|(name, value)| variable(name.as_bytes(), value.as_bytes()).ok())
        .collect()
}
