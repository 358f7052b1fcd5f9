//! The backend's environment: the superserver's, less what is ours or could deceive, plus what is known of the connection.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt as _;

use super::c_string;
use crate::activation::Addresses;
use crate::cli::is_own_variable;
use crate::error::Error;
use crate::sandbox::BackendUser;
use crate::tls::Facts;

/// What the superserver's environment keeps, less what is ours or could deceive the backend.
pub(super) fn environment() -> Result<Vec<CString>, Error> {
    std::env::vars_os()
        .filter(|(name, _)| !is_removed(name.as_bytes()) && !is_own_variable(name.as_bytes()))
        .map(|(name, value)| variable(name.as_bytes(), value.as_bytes()))
        .collect()
}

/// Takes away every other name that a superserver has for its client, where that is a balancer.
pub(super) fn remove_balancer(environment: &mut Vec<CString>) {
    let is_balancers = |name: &[u8]| {
        [&b"REMOTE_HOST"[..], b"TCPLOCALHOST", b"TCPREMOTEHOST"].contains(&name)
            || name.starts_with(b"TCP6")
            || name.starts_with(b"SOCAT_PEER")
            || name.starts_with(b"SOCAT_SOCK")
    };
    environment.retain(|entry| {
        let name = entry.as_bytes().split(|octet| *octet == b'=').next();
        !name.is_some_and(is_balancers)
    });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_balancers_addresses_stays() {
        let entry = |text: &str| CString::new(text).unwrap();
        let mut environment: Vec<_> = [
            "PATH=/bin",
            "PROTO=TCP6",
            "REMOTE_HOST=balancer",
            "TCP6REMOTEIP=::1",
            "TCPREMOTEHOST=balancer",
            "TCPREMOTEIP=203.0.113.1",
            "SOCAT_PEERADDR=203.0.113.1",
            "X=TCPREMOTEIP=203.0.113.1",
        ]
        .map(entry)
        .into();
        let addresses = Addresses {
            local: "198.51.100.1:143".parse().unwrap(),
            peer: "192.0.2.7:4711".parse().unwrap(),
        };
        remove_balancer(&mut environment);
        set_addresses(&mut environment, &addresses);
        let expected = [
            "PATH=/bin",
            "X=TCPREMOTEIP=203.0.113.1",
            "PROTO=TCP",
            "REMOTE_ADDR=192.0.2.7",
            "REMOTE_PORT=4711",
            "TCPLOCALIP=198.51.100.1",
            "TCPLOCALPORT=143",
            "TCPREMOTEIP=192.0.2.7",
            "TCPREMOTEPORT=4711",
        ];
        assert_eq!(environment, expected.map(entry));
    }
}
