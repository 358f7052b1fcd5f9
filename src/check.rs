//! `--check`: looks at everything that could go wrong in this machine's real set-up, and says what to do; opens no connection.
//!
//! What serves a client is what is examined: the keeper reads and parses the files, the launcher starts the backend, and the
//! sandbox is entered, by the same code.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use crate::backend::{Backend, Launcher, Program};
use crate::channel::Received;
use crate::cli::{BackendChoice, Options, Separation};
use crate::error::{EXIT_SETUP, Error, reason};
use crate::imap::Policy;
use crate::keeper::{KeeperClient, KeeperFiles};
use crate::log::{Destination, Escaped, Log, Verbosity};
use crate::sandbox::{self, Confinement, FileGrowth, Identity, Plan, Role};
use crate::sys;

/// How the report is written.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Format {
    /// An array of objects with `level`, `subject` and `text`.
    Json,
    /// A line for each finding.
    Text,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Level {
    Error,
    Ok,
    Warning,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Ok => "ok",
            Self::Warning => "warning",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
struct Finding {
    level: Level,
    subject: &'static str,
    text: String,
}

/// All that was found.
#[derive(Debug, Default)]
pub(crate) struct Report(Vec<Finding>);

impl Report {
    fn add(&mut self, level: Level, subject: &'static str, text: impl fmt::Display) {
        self.0.push(Finding {
            level,
            subject,
            text: text.to_string(),
        });
    }

    /// Takes a result apart: what went well is said with `praise`.
    fn take<T>(
        &mut self,
        subject: &'static str,
        result: Result<T, Error>,
        praise: impl FnOnce(&T) -> String,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.add(Level::Ok, subject, praise(&value));
                Some(value)
            }
            Err(error) => {
                self.add(Level::Error, subject, error);
                None
            }
        }
    }

    /// The report of options that could not be read at all.
    pub(crate) fn of_usage(error: &Error) -> Self {
        let mut report = Self::default();
        report.add(Level::Error, "options", error);
        report
    }

    /// 100 if anything is wrong; warnings alone are not.
    pub(crate) fn exit_status(&self) -> u8 {
        if self.0.iter().any(|finding| finding.level == Level::Error) {
            EXIT_SETUP
        } else {
            0
        }
    }

    /// As it is printed.
    pub(crate) fn write(&self, format: Format) -> String {
        match format {
            Format::Json => {
                let findings = self.0.iter().map(|finding| {
                    serde_json::json!({
                        "level": finding.level.name(),
                        "subject": finding.subject,
                        "text": finding.text,
                    })
                });
                format!("{:#}\n", serde_json::Value::Array(findings.collect()))
            }
            Format::Text => self
                .0
                .iter()
                .map(
                    |Finding {
                         level,
                         subject,
                         text,
                     }| format!("{}: {subject}: {text}\n", level.name()),
                )
                .collect(),
        }
    }
}

/// Examines the set-up.
pub(crate) fn check(options: &Options) -> Report {
    let mut report = Report::default();
    let separation = check_separation(&mut report, &options.separation);
    check_confinement(&mut report, separation.as_ref(), options.memory_limit);
    check_keys(&mut report, options, separation.as_ref());
    check_backend(&mut report, options);
    check_log(&mut report, options.destination);
    check_superserver(&mut report, options.policy);
    report
}

/// Users and directory, as far as they are good.
struct Found<'a> {
    chroot: &'a Path,
    keeper: Identity,
    network: Identity,
}

fn check_separation<'a>(report: &mut Report, separation: &'a Separation) -> Option<Found<'a>> {
    let (chroot, group, keeper_user, user) = match separation {
        Separation::Full {
            chroot,
            group,
            keeper_user,
            user,
        } => (chroot, group, keeper_user, user),
        Separation::Unprivileged => {
            report.add(
                Level::Warning,
                "separation",
                "--unprivileged: no chroot, and no users of their own; start it as root for all of the protection",
            );
            return None;
        }
    };
    let praise = |identity: &Identity| format!("uid {}, gid {}", identity.user, identity.group);
    let network = Identity::look_up(user, group.as_deref(), "--user");
    let network = report.take("network process", network, |found| {
        format!("user '{user}': {}", praise(found))
    });
    let keeper = Identity::look_up(keeper_user, None, "--keeper-user");
    let keeper = report.take("keeper", keeper, |found| {
        format!("user '{keeper_user}': {}", praise(found))
    });
    let root = report.take("chroot", sandbox::open_root(chroot), |_| {
        format!(
            "'{}' is root's, empty, and nobody else's to write to",
            chroot.display()
        )
    });
    let (network, keeper) = (network?, keeper?);
    if let Err(error) = sandbox::check_distinct(network, keeper) {
        report.add(Level::Error, "separation", error);
        return None;
    }
    root?;
    Some(Found {
        chroot,
        keeper,
        network,
    })
}

impl Found<'_> {
    fn plan(&self, identity: Identity, memory_limit: u64) -> Result<Plan, Error> {
        let root = sandbox::open_root(self.chroot)?;
        Ok(Plan {
            confinement: Some(Confinement { identity, root }),
            file_growth: FileGrowth::Forbidden,
            memory_limit,
        })
    }
}

fn plan(
    found: Option<&Found<'_>>,
    who: fn(&Found<'_>) -> Identity,
    memory_limit: u64,
) -> Result<Plan, Error> {
    match found {
        Some(found) => found.plan(who(found), memory_limit),
        None => Ok(Plan {
            confinement: None,
            file_growth: FileGrowth::Forbidden,
            memory_limit,
        }),
    }
}

/// Enters the sandbox in a process of its own, which then ends.
fn check_confinement(report: &mut Report, found: Option<&Found<'_>>, memory_limit: u64) {
    use nix::sys::wait::{WaitStatus, waitpid};
    const FAILED: u8 = 1;
    let entered = plan(found, |found| found.network, memory_limit).and_then(|plan| {
        let child = sys::fork_into(|| match sandbox::enter(Role::Network, plan, &[]) {
            Ok(_) => 0,
            Err(_) => FAILED,
        });
        let child = child.map_err(|error| Error::system("cannot start a process", reason(&error)))?;
        match waitpid(child, None) {
            Ok(WaitStatus::Exited(_, 0)) => Ok(()),
            other => Err(Error::System(format!(
                "the sandbox cannot be entered here ({other:?}): is seccomp there (CONFIG_SECCOMP_FILTER), and may \
                 chroot, setuid and setgid be called?"
            ))),
        }
    });
    let separation = if found.is_some() { "chroot, ids, " } else { "" };
    report.take("sandbox", entered, |()| {
        format!("{separation}limits, no_new_privs and system call filter work on this kernel")
    });
}

/// Below this, a certificate should have been renewed (they are, at a third of 90 days).
const RENEWAL_DAYS: i64 = 30;

fn check_keys(report: &mut Report, options: &Options, found: Option<&Found<'_>>) {
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

/// How long a backend may take to greet.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

fn check_backend(report: &mut Report, options: &Options) {
    let BackendChoice::Program { command, user } = &options.backend else {
        report.add(
            Level::Ok,
            "backend",
            "a descriptor, which only a session has",
        );
        return;
    };
    let program = Program::prepare(command, user.as_deref(), None);
    let name = command
        .first()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let Some(program) = report.take("backend", program, |_| format!("'{name}' can be executed"))
    else {
        return;
    };
    let log = Log::open(Destination::Stderr, Verbosity::Quiet, true);
    let greeting =
        Launcher::start(&program, &log).and_then(|launcher| greeting(launcher.go(None), &name));
    let Some(greeting) = report.take("backend", greeting, |line| format!("it greets: {line}"))
    else {
        return;
    };
    let greeting = greeting.to_ascii_uppercase();
    if greeting.starts_with("* PREAUTH") && options.policy != Policy::Implicit {
        report.add(
            Level::Error,
            "backend",
            "it greets PREAUTH, which no client expects after STARTTLS: use --tls implicit, or have it ask for a login",
        );
    } else if greeting.starts_with("* BYE") {
        report.add(
            Level::Error,
            "backend",
            "it says BYE instead of serving: its own log should tell why",
        );
    }
}

/// The first line that the backend says, which must be an IMAP greeting (RFC 9051 section 7.1).
fn greeting(mut backend: Backend, name: &str) -> Result<String, Error> {
    let deadline = Instant::now() + GREETING_LIMIT;
    let mut line = Vec::new();
    let mut buffer = [0; 512];
    let ended = loop {
        if line.contains(&b'\n') || line.len() > 8192 {
            break false;
        }
        match backend.channel.receive(&mut buffer) {
            Ok(Received::Bytes(count)) => {
                line.extend_from_slice(buffer.get(..count).unwrap_or_default())
            }
            Ok(Received::Later) if Instant::now() < deadline => wait_for(&backend, deadline),
            Ok(Received::Later) => break false,
            Ok(Received::End) | Err(_) => break true,
        }
    };
    // It sees end of file and ends in its own time.
    backend.channel.end_output();
    drop(backend);
    let first = line
        .split(|byte| *byte == b'\r' || *byte == b'\n')
        .next()
        .unwrap_or_default();
    let text = Escaped(first).to_string();
    let is_greeting = ["* OK", "* PREAUTH", "* BYE"]
        .iter()
        .any(|start| text.to_ascii_uppercase().starts_with(start));
    match (is_greeting, ended) {
        (true, _) => Ok(text),
        (false, _) if !first.is_empty() => Err(Error::Setup(format!(
            "'{name}' (BACKEND) says \"{text}\", which is no IMAP greeting: is it an IMAP server on standard input and output?"
        ))),
        (false, true) => Err(Error::Setup(format!(
            "'{name}' (BACKEND) ends without a greeting: try it by hand, and look into its log"
        ))),
        (false, false) => Err(Error::Setup(format!(
            "'{name}' (BACKEND) says nothing within {} s: does it serve standard input and output?",
            GREETING_LIMIT.as_secs()
        ))),
    }
}

fn wait_for(backend: &Backend, deadline: Instant) {
    let Some(input) = backend.channel.input() else {
        return;
    };
    let mut poll = [PollFd::new(input, PollFlags::POLLIN)];
    let left = deadline.saturating_duration_since(Instant::now());
    // A spurious return is met by reading again.
    let _ = nix::poll::ppoll(&mut poll, Some(left.into()), None);
}

fn check_log(report: &mut Report, destination: Destination) {
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

fn check_superserver(report: &mut Report, policy: Policy) {
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
    fn only_errors_fail_the_check() {
        let mut report = Report::default();
        report.add(Level::Ok, "a", "fine");
        report.add(Level::Warning, "b", "not so fine");
        assert_eq!(report.exit_status(), 0);
        assert_eq!(
            report.write(Format::Text),
            "ok: a: fine\nwarning: b: not so fine\n"
        );
        report.add(Level::Error, "c", "a \"quoted\" fault");
        assert_eq!(report.exit_status(), 100);
        let json: serde_json::Value = serde_json::from_str(&report.write(Format::Json)).unwrap();
        assert_eq!(json[2]["level"], "error");
        assert_eq!(json[2]["text"], "a \"quoted\" fault");
    }

    #[test]
    fn a_listening_port_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_listening(listener.local_addr().unwrap().port()).unwrap());
        let connected = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!is_listening(connected.local_addr().unwrap().port()).unwrap());
        drop(listener);
    }

    #[test]
    fn addresses_are_written_as_text() {
        assert_eq!(address(&[127, 0, 0, 1]).as_deref(), Some("127.0.0.1"));
        assert_eq!(address(&[0; 16]).as_deref(), Some("::"));
        assert_eq!(address(&[1, 2, 3]), None);
    }
}
