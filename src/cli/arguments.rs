//! The options as clap knows them: names, variables, defaults and help, from which the manual page and the completions are made.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{BoolishValueParser, OsStringValueParser, TypedValueParser as _};
use clap::{ArgAction, CommandFactory as _, Parser};

use super::listener::{ADDRESS_SEPARATOR, ListenerArguments};
use super::settings::SETTINGS_VARIABLE;
use crate::check::Format;
use crate::connector::Target;
use crate::log::Destination;
use crate::proxy_header::Sender;
use crate::proxy_header::outgoing::Version;
use crate::sandbox::Requirement;

#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(super) enum VersionName {
    #[value(name = "1.2")]
    Tls12,
    #[value(name = "1.3")]
    Tls13,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(super) enum DemandName {
    /// A certificate is welcome
    Request,
    /// No session without one
    Required,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(super) enum PolicyName {
    /// STARTTLS before anything else is allowed
    Required,
    /// STARTTLS offered, cleartext allowed
    Optional,
    /// TLS from the first byte (port 993)
    Implicit,
}
/// STARTTLS and TLS for any IMAP server, with privilege separation
#[derive(Debug, Parser)]
#[command(
    name = "imap-tls",
    version,
    disable_help_flag = true,
    override_usage = "imap-tls [OPTIONS] [--] BACKEND [ARGS]...\n       imap-tls [OPTIONS] --connect HOST:PORT|unix:PATH\n       imap-tls [OPTIONS] --backend-fd N\n       imap-tls [OPTIONS] --listen ADDR:PORT ...\n       imap-tls [OPTIONS] --keep --keeper SOCKET",
    before_help = "A superserver (systemd, xinetd, inetd, tcpserver) runs imap-tls with a client's\n\
                   connection on standard input and output. It starts BACKEND, an IMAP server\n\
                   that needs no TLS, gives up every privilege, and speaks TLS with the client.",
    after_help = "Each option but --keep and --check can also be set by an environment variable:\n\
                  IMAP_TLS_ and its name in capitals, as IMAP_TLS_LOGIN_TIMEOUT=60.\n\
                  IMAP_TLS_BACKEND holds BACKEND and ARGS, split at spaces. Users are given by\n\
                  name or number.\n\
                  Exit status: BACKEND's; else 0 for anything that a client did, 100 for usage and\n\
                  set-up, 111 for a fault of the system that may pass."
)]
pub(super) struct Arguments {
    /// required, optional or implicit [default: required]
    #[arg(
        long,
        env = "IMAP_TLS_TLS",
        hide_env = true,
        value_enum,
        hide_possible_values = true,
        default_value = "required",
        hide_default_value = true,
        value_name = "POLICY",
        help_heading = "TLS"
    )]
    pub(super) tls: PolicyName,
    /// Certificate chain in PEM form; may be repeated
    #[arg(
        long,
        env = "IMAP_TLS_CERT",
        hide_env = true,
        value_name = "FILE",
        value_delimiter = char::from(LIST_SEPARATOR),
        help_heading = "TLS"
    )]
    pub(super) cert: Vec<PathBuf>,
    /// Private key of each --cert [default: in its file]
    #[arg(
        long,
        env = "IMAP_TLS_KEY",
        hide_env = true,
        value_name = "FILE",
        value_delimiter = char::from(LIST_SEPARATOR),
        help_heading = "TLS"
    )]
    pub(super) key: Vec<PathBuf>,
    /// Certificates by the name that the client wants
    #[arg(
        long,
        env = "IMAP_TLS_CERT_DIR",
        hide_env = true,
        value_name = "DIR",
        help_heading = "TLS"
    )]
    pub(super) cert_dir: Option<PathBuf>,
    /// Refuse clients that want another name or none
    #[arg(long, env = "IMAP_TLS_STRICT_SNI", hide_env = true, value_parser = BoolishValueParser::new(), help_heading = "TLS")]
    pub(super) strict_sni: bool,
    /// Oldest version, 1.2 or 1.3 [default: 1.2]
    #[arg(
        long,
        env = "IMAP_TLS_MIN_TLS",
        hide_env = true,
        value_name = "VERSION",
        value_enum,
        hide_possible_values = true,
        default_value = "1.2",
        hide_default_value = true,
        help_heading = "TLS"
    )]
    pub(super) min_tls: VersionName,
    /// Directory or file with ticket keys, for resumption
    #[arg(
        long,
        env = "IMAP_TLS_TICKET_KEYS",
        hide_env = true,
        value_name = "PATH",
        help_heading = "TLS"
    )]
    pub(super) ticket_keys: Option<PathBuf>,
    /// OCSP response of a --cert; may be repeated
    #[arg(
        long,
        env = "IMAP_TLS_OCSP",
        hide_env = true,
        value_name = "FILE",
        value_delimiter = char::from(LIST_SEPARATOR),
        help_heading = "TLS"
    )]
    pub(super) ocsp: Vec<PathBuf>,
    /// Authorities of client certificates, in PEM form
    #[arg(
        long,
        env = "IMAP_TLS_CLIENT_CA",
        hide_env = true,
        value_name = "FILE",
        help_heading = "TLS"
    )]
    pub(super) client_ca: Option<PathBuf>,
    /// Revocation list; may be repeated
    #[arg(
        long,
        env = "IMAP_TLS_CLIENT_CRL",
        hide_env = true,
        value_name = "FILE",
        value_delimiter = char::from(LIST_SEPARATOR),
        help_heading = "TLS"
    )]
    pub(super) client_crl: Vec<PathBuf>,
    /// request or required [default: required]
    #[arg(
        long,
        env = "IMAP_TLS_CLIENT_CERT",
        hide_env = true,
        value_name = "DEMAND",
        value_enum,
        hide_possible_values = true,
        help_heading = "TLS"
    )]
    pub(super) client_cert: Option<DemandName>,

    /// User who reads from the network [default: imap-tls]
    #[arg(
        long,
        env = "IMAP_TLS_USER",
        hide_env = true,
        default_value = "imap-tls",
        hide_default_value = true,
        value_name = "USER",
        help_heading = "Separation"
    )]
    pub(super) user: String,
    /// Group of that user's process [default: its own]
    #[arg(
        long,
        env = "IMAP_TLS_GROUP",
        hide_env = true,
        value_name = "GROUP",
        help_heading = "Separation"
    )]
    pub(super) group: Option<String>,
    /// User who holds the key [default: imap-tls-keeper]
    #[arg(
        long,
        env = "IMAP_TLS_KEEPER_USER",
        hide_env = true,
        default_value = "imap-tls-keeper",
        hide_default_value = true,
        value_name = "USER",
        help_heading = "Separation"
    )]
    pub(super) keeper_user: String,
    /// Have the keeper that listens there hold the keys
    #[arg(
        long,
        env = "IMAP_TLS_KEEPER",
        hide_env = true,
        value_name = "SOCKET",
        help_heading = "Separation"
    )]
    pub(super) keeper: Option<PathBuf>,
    /// Empty directory [default: /var/lib/imap-tls/empty]
    #[arg(
        long,
        env = "IMAP_TLS_CHROOT",
        hide_env = true,
        default_value = "/var/lib/imap-tls/empty",
        hide_default_value = true,
        value_name = "DIR",
        help_heading = "Separation"
    )]
    pub(super) chroot: PathBuf,
    /// Address space per process [default: 32M]
    #[arg(long, env = "IMAP_TLS_MEMORY_LIMIT", hide_env = true, default_value = "32M", hide_default_value = true, value_name = "SIZE", value_parser = parse_size, help_heading = "Separation")]
    pub(super) memory_limit: u64,
    /// Refuse without landlock[=ABI] or mdwe; repeatable
    #[arg(
        long,
        env = "IMAP_TLS_REQUIRE",
        hide_env = true,
        value_name = "WHAT",
        value_delimiter = char::from(LIST_SEPARATOR),
        help_heading = "Separation"
    )]
    pub(super) require: Vec<Requirement>,
    /// Run as a plain user, with what protection is left
    #[arg(
        long,
        env = "IMAP_TLS_UNPRIVILEGED",
        hide_env = true,
        value_parser = BoolishValueParser::new(),
        help_heading = "Separation"
    )]
    pub(super) unprivileged: bool,

    /// User who runs BACKEND [default: as started]
    #[arg(
        long,
        env = "IMAP_TLS_BACKEND_USER",
        hide_env = true,
        value_name = "USER",
        help_heading = "Backend"
    )]
    pub(super) backend_user: Option<String>,
    /// Or the user that the client's certificate names
    #[arg(long, env = "IMAP_TLS_BACKEND_USER_FROM_CERT", hide_env = true, value_parser = BoolishValueParser::new(), help_heading = "Backend")]
    pub(super) backend_user_from_cert: bool,
    /// Connect to HOST:PORT or unix:PATH, start none
    #[arg(long, env = "IMAP_TLS_CONNECT", hide_env = true, value_name = "WHERE", value_parser = OsStringValueParser::new().try_map(|text| Target::parse(&text)), help_heading = "Backend")]
    pub(super) connect: Option<Target>,
    /// Say there first who the client is: v1, v2
    #[arg(
        long,
        env = "IMAP_TLS_SEND_PROXY",
        hide_env = true,
        value_enum,
        hide_possible_values = true,
        value_name = "VERSION",
        help_heading = "Backend"
    )]
    pub(super) send_proxy: Option<Version>,
    /// Use this open descriptor, start no BACKEND
    #[arg(long, env = "IMAP_TLS_BACKEND_FD", hide_env = true, value_name = "N", value_parser = clap::value_parser!(RawFd).range(i64::from(LEAST_DESCRIPTOR)..), help_heading = "Backend")]
    pub(super) backend_fd: Option<RawFd>,

    /// Read a PROXY header for the client's address
    #[arg(long, env = "IMAP_TLS_ACCEPT_PROXY", hide_env = true, value_parser = BoolishValueParser::new(), help_heading = "Connection")]
    pub(super) accept_proxy: bool,
    /// Balancer, ADDR[/PREFIX] or unix; may be repeated
    #[arg(
        long,
        env = "IMAP_TLS_PROXY_FROM",
        hide_env = true,
        value_name = "NETWORK",
        value_delimiter = ADDRESS_SEPARATOR,
        help_heading = "Connection"
    )]
    pub(super) proxy_from: Vec<Sender>,

    /// For the whole handshake [default: 30]
    #[arg(long, env = "IMAP_TLS_HANDSHAKE_TIMEOUT", hide_env = true, default_value = "30", hide_default_value = true, value_name = "SECONDS", value_parser = parse_seconds, help_heading = "Limits")]
    pub(super) handshake_timeout: Duration,
    /// Until login, in all [default: 120]
    #[arg(long, env = "IMAP_TLS_LOGIN_TIMEOUT", hide_env = true, default_value = "120", hide_default_value = true, value_name = "SECONDS", value_parser = parse_seconds, help_heading = "Limits")]
    pub(super) login_timeout: Duration,

    #[command(flatten)]
    pub(super) listener: ListenerArguments,

    /// auto, stderr or syslog [default: auto]
    #[arg(
        long,
        env = "IMAP_TLS_LOG",
        hide_env = true,
        value_enum,
        hide_possible_values = true,
        default_value = "auto",
        hide_default_value = true,
        value_name = "WHERE",
        help_heading = "Log"
    )]
    pub(super) log: Destination,
    /// Log each step
    #[arg(
        short,
        long,
        env = "IMAP_TLS_VERBOSE",
        hide_env = true,
        value_parser = BoolishValueParser::new(),
        help_heading = "Log"
    )]
    pub(super) verbose: bool,
    /// Log faults only
    #[arg(
        short,
        long,
        env = "IMAP_TLS_QUIET",
        hide_env = true,
        value_parser = BoolishValueParser::new(),
        help_heading = "Log"
    )]
    pub(super) quiet: bool,

    /// Variables like those below, NAME=VALUE a line
    #[arg(
        long,
        env = SETTINGS_VARIABLE,
        hide_env = true,
        value_name = "FILE",
        help_heading = "Other"
    )]
    pub(super) settings: Option<PathBuf>,
    /// Examine the set-up (=json for programs) and exit
    #[arg(long, value_enum, hide_possible_values = true, num_args = 0..=1, require_equals = true, default_missing_value = "text", value_name = "FORMAT", help_heading = "Other")]
    pub(super) check: Option<Format>,
    /// Be the keeper that listens at --keeper
    #[arg(long, help_heading = "Other")]
    pub(super) keep: bool,
    /// Print this help
    #[arg(short, long, action = ArgAction::HelpShort, help_heading = "Other")]
    pub(super) help: Option<bool>,

    /// The IMAP server to start, and its arguments
    #[arg(trailing_var_arg = true, value_name = "BACKEND", action = ArgAction::Append)]
    pub(super) backend: Vec<OsString>,
}
/// The options as clap knows them.
pub(crate) fn command_line() -> clap::Command {
    Arguments::command()
}

/// Between the values of an option that may be repeated, as in PATH.
pub(super) const LIST_SEPARATOR: u8 = b':';
/// Below are standard input, output and error.
pub(super) const LEAST_DESCRIPTOR: RawFd = 3;
/// `65536`, `64K`, `32M`, `1G`, in octets.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last() {
        Some('K' | 'k') => (text.get(..text.len() - 1), 10),
        Some('M' | 'm') => (text.get(..text.len() - 1), 20),
        Some('G' | 'g') => (text.get(..text.len() - 1), 30),
        _ => (Some(text), 0),
    };
    let number = digits.and_then(|digits| digits.parse::<u64>().ok());
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| "not a size such as 32M".to_owned())
}

/// Whole seconds, at least one and at most a day: no limit may be turned off by accident.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(seconds @ 1..=86_400) => Ok(Duration::from_secs(seconds)),
        _ => Err("not a number of seconds from 1 to 86400".to_owned()),
    }
}
