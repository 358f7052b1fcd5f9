//! Where the backend is, as `--connect` says it.

use std::ffi::OsStr;
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use nix::sys::socket::UnixAddr;

use crate::host_name::HostName;

/// A place to connect to. What is in one has the right form; whether anybody is there is another question.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Target {
    /// Nothing has to be resolved.
    Address(SocketAddr),
    /// A host name and a port.
    Name(HostName, u16),
    /// An absolute path that fits into a socket address.
    Unix(PathBuf),
}

impl Target {
    /// Reads `HOST:PORT`, where HOST is a name, an IPv4 address or an IPv6 address in brackets, or `unix:PATH`.
    ///
    /// # Errors
    /// In words for the user.
    pub(crate) fn parse(text: &OsStr) -> Result<Self, String> {
        if let Some(path) = text.as_bytes().strip_prefix(b"unix:") {
            return unix(Path::new(OsStr::from_bytes(path)));
        }
        let fault = || "not HOST:PORT ([ADDRESS]:PORT for IPv6) or unix:PATH".to_owned();
        let text = text.to_str().ok_or_else(fault)?;
        let target = match text.parse() {
            Ok(address) => Self::Address(address),
            Err(_) => {
                let (host, port) = text.rsplit_once(':').ok_or_else(fault)?;
                let port = port.parse().map_err(|_| fault())?;
                Self::Name(HostName::new(host).ok_or_else(fault)?, port)
            }
        };
        match target {
            Self::Address(address) if address.port() == 0 => Err(fault()),
            Self::Name(_, 0) => Err(fault()),
            target => Ok(target),
        }
    }
}

fn unix(path: &Path) -> Result<Target, String> {
    if !path.is_absolute() {
        return Err("the path after unix: must begin with a slash".to_owned());
    }
    match UnixAddr::new(path) {
        Ok(_) => Ok(Target::Unix(path.to_owned())),
        Err(_) => Err("the path after unix: is too long for a socket (107 octets)".to_owned()),
    }
}

/// As it was given.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "{address}"),
            Self::Name(host, port) => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_targets_read_as_they_are_written() {
        for text in [
            "127.0.0.1:143",
            "[::1]:10143",
            "[fe80::1%2]:143",
            "localhost:143",
            "mail.example.org:65535",
            "unix:/run/dovecot/imap",
        ] {
            let target = Target::parse(OsStr::new(text)).unwrap();
            assert_eq!(target.to_string(), text);
        }
        let name = Target::parse(OsStr::new("Mail.Example:143")).unwrap();
        assert_eq!(name.to_string(), "mail.example:143");
    }

    #[test]
    fn what_is_no_target_is_refused() {
        let long = format!("unix:/{}", "a".repeat(107));
        for text in [
            "",
            "143",
            ":143",
            "localhost",
            "localhost:",
            "localhost:0",
            "localhost:imap",
            "localhost:65536",
            "127.0.0.1:0",
            "::1:143",
            "a b:143",
            "http://a:143",
            "unix:",
            "unix:run/imap",
            "unix:@abstract",
            &long,
        ] {
            assert!(Target::parse(OsStr::new(text)).is_err(), "{text}");
        }
        assert!(Target::parse(OsStr::from_bytes(b"\xff:143")).is_err());
    }
}
