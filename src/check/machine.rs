//! The machine around us: the log, the superserver's entry, the port.

use std::fs;
use std::io;
use std::path::Path;

use super::{Level, Report};
use crate::error::reason;
use crate::imap::Policy;
use crate::log::{Destination, Log, Verbosity};

pub(super) fn check_log(report: &mut Report, destination: Destination) {
    if destination == Destination::Stderr {
        report.add(
            Level::Ok,
            "log",
            "standard error, as the superserver gives it",
        );
        return;
    }
    let is_there = Log::open(Destination::Syslog, Verbosity::Quiet, false)
        .descriptor()
        .is_some();
    match (is_there, destination) {
        (true, _) => report.add(Level::Ok, "log", "/dev/log takes lines"),
        (false, Destination::Syslog) => {
            report.add(Level::Error, "log", "/dev/log (--log syslog) takes no lines: is a syslog daemon or journald running?");
        }
        (false, _) => report.add(
            Level::Warning,
            "log",
            "/dev/log takes no lines, so under inetd and xinetd nothing would be logged: is a syslog daemon or journald running?",
        ),
    }
}

/// Where the superservers that we know keep their entries.
const SUPERSERVERS: &[(&str, &[&str])] = &[
    (
        "systemd",
        &[
            "/etc/systemd/system",
            "/usr/local/lib/systemd/system",
            "/usr/lib/systemd/system",
            "/lib/systemd/system",
        ],
    ),
    ("xinetd", &["/etc/xinetd.d"]),
    ("inetd", &["/etc/inetd.conf"]),
];

pub(super) fn check_superserver(report: &mut Report, policy: Policy) {
    let port = if policy == Policy::Implicit { 993 } else { 143 };
    let entries: Vec<String> = SUPERSERVERS
        .iter()
        .flat_map(|(name, places)| {
            places
                .iter()
                .flat_map(|place| entries(Path::new(place)))
                .map(move |path| format!("{name} ({path})"))
        })
        .collect();
    if entries.is_empty() {
        report.add(
            Level::Warning,
            "superserver",
            "no entry for imap-tls under systemd, xinetd or inetd: install one, unless tcpserver or the like is used",
        );
    } else {
        report.add(Level::Ok, "superserver", entries.join(", "));
    }
    match is_listening(port) {
        Ok(true) => report.add(Level::Ok, "port", format!("{port} is listened on")),
        Ok(false) => report.add(
            Level::Warning,
            "port",
            format!("nobody listens on {port}: enable the socket, or start the superserver"),
        ),
        Err(error) => report.add(
            Level::Warning,
            "port",
            format!("cannot tell who listens: {}", reason(&error)),
        ),
    }
}

/// Files in a directory, or the file itself, that run us.
fn entries(place: &Path) -> Vec<String> {
    let files: Vec<_> = match fs::read_dir(place) {
        Ok(directory) => directory
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect(),
        Err(_) => vec![place.to_owned()],
    };
    let runs_us = |path: &Path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .any(|line| !line.trim_start().starts_with('#') && line.contains("/imap-tls"))
    };
    files
        .iter()
        .filter(|path| runs_us(path))
        .map(|path| path.display().to_string())
        .collect()
}

/// Whether anybody listens on the port, by the kernel's own tables (proc_net(5)).
fn is_listening(port: u16) -> io::Result<bool> {
    const LISTEN: &str = "0A";
    let local = format!(":{port:04X}");
    let is_in = |table: String| {
        table.lines().skip(1).any(|line| {
            let mut fields = line.split_whitespace();
            fields
                .nth(1)
                .is_some_and(|address| address.ends_with(&local))
                && fields.nth(1) == Some(LISTEN)
        })
    };
    let v4 = is_in(fs::read_to_string("/proc/net/tcp")?);
    Ok(v4 || fs::read_to_string("/proc/net/tcp6").is_ok_and(is_in))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_port_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_listening(port).unwrap());
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!is_listening(client.local_addr().unwrap().port()).unwrap());
    }
}
