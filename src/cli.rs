//! Arguments and `IMAP_TLS_*` variables -> [`Options`]; every check that needs no file is here, so no half-valid Options exists.

mod arguments;
mod backend;
mod listener;
mod plain;
mod settings;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser as _;

pub(crate) use arguments::command_line;
pub(crate) use backend::{BackendChoice, BackendUserChoice};
pub(crate) use listener::{ListenAddress, Listening, Prefixes, Refusal};

use arguments::{Arguments, DemandName, PolicyName, VersionName};
use backend::{choose_backend, choose_backend_user};

use crate::check::Format;
use crate::error::Error;
use crate::imap::Policy;
use crate::keeper::{CERTIFICATES, CertificateFiles};
use crate::log::{Destination, Verbosity};
use crate::proxy_header::Sender;
use crate::sandbox::Requirement;
use crate::tls::{ClientDemand, OldestVersion, UnknownName};

/// How clients are served.
#[derive(Debug)]
pub(crate) struct Options {
    pub(crate) backend: BackendChoice,
    pub(crate) client_auth: Option<ClientAuth>,
    pub(crate) common: CommonOptions,
    pub(crate) handshake_timeout: Duration,
    pub(crate) login_timeout: Duration,
    pub(crate) oldest_version: OldestVersion,
    pub(crate) policy: Policy,
    /// Who may, and must, send a PROXY header (`--accept-proxy`); empty: a header is but a bad client.
    pub(crate) proxy_from: Vec<Sender>,
    pub(crate) unknown_name: UnknownName,
}

/// What the keeper service needs, as those who serve clients do.
#[derive(Debug)]
pub(crate) struct CommonOptions {
    /// Certificates by name (`--cert-dir`).
    pub(crate) certificate_directory: Option<PathBuf>,
    /// Best first; none only where there is a directory, or a keeper service.
    pub(crate) certificates: Vec<CertificateFiles>,
    pub(crate) destination: Destination,
    /// Where the keeper service listens.
    pub(crate) keeper: Option<PathBuf>,
    pub(crate) listening: Listening,
    /// In octets of address space, for the network process and for the keeper.
    pub(crate) memory_limit: u64,
    /// OCSP responses to staple.
    pub(crate) ocsp: Vec<PathBuf>,
    /// What the kernel must have for confinement, beside what it must have in any case.
    pub(crate) required: Vec<Requirement>,
    pub(crate) separation: Separation,
    pub(crate) ticket_keys: Option<PathBuf>,
    pub(crate) verbosity: Verbosity,
}

/// What one run of the program is to do.
#[derive(Debug)]
pub(crate) enum Task {
    /// Be the keeper service (`--keep`).
    Keep(Box<CommonOptions>),
    /// Serve one connection, or listen.
    Serve(Box<Options>),
}

/// What is asked of clients' certificates.
#[derive(Debug)]
pub(crate) struct ClientAuth {
    /// Certificates of the authorities that are trusted.
    pub(crate) authorities: PathBuf,
    pub(crate) demand: ClientDemand,
    pub(crate) revocations: Vec<PathBuf>,
}

/// What is given up.
#[derive(Debug)]
pub(crate) enum Separation {
    /// Started as root: separate users and a chroot.
    Full {
        chroot: PathBuf,
        group: Option<String>,
        keeper_user: String,
        user: String,
    },
    /// Started as a plain user who said that this is meant.
    Unprivileged,
}

/// What the command line asks for.
#[derive(Debug)]
pub(crate) enum Request {
    /// Examine the set-up (`--check`) for the task, or say what is wrong with the options.
    Check(Result<Task, Error>, Format),
    Run(Task),
    /// Print this (`--help`, `--version`) and end.
    Show(String),
}

/// Where options come from: the command line, the environment, and the file that either may name. It can be read again.
#[derive(Debug)]
pub(crate) struct Source {
    arguments: Vec<OsString>,
    applied: settings::Applied,
    is_root: bool,
}

impl Source {
    pub(crate) fn new(arguments: impl Iterator<Item = OsString>, is_root: bool) -> Self {
        Self {
            arguments: arguments.collect(),
            applied: settings::Applied::new(),
            is_root,
        }
    }

    /// Reads all there is.
    ///
    /// # Errors
    /// `Usage`, with a text that names the option; `Setup` if the file of settings cannot be read.
    pub(crate) fn read(&mut self) -> Result<Request, Error> {
        let applied = settings::apply(&self.arguments, &mut self.applied);
        parse(&self.arguments, self.is_root, applied)
    }

    /// The same again, and what it is read for. Where either fails, the environment is as it was before: whoever goes on with the
    /// options from then hands that to backends.
    ///
    /// # Errors
    /// As above, and as `use_it`.
    pub(crate) fn read_again<T>(
        &mut self,
        use_it: impl FnOnce(Request) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let before = self.applied.clone();
        let result = self.read().and_then(use_it);
        if result.is_err() {
            settings::put_back(&mut self.applied, before);
        }
        result
    }
}

/// What is wrong with the settings (`applied`) or the environment comes before anything that follows from it; help comes in any case.
fn parse(
    arguments: &[OsString],
    is_root: bool,
    applied: Result<(), Error>,
) -> Result<Request, Error> {
    use clap::error::ErrorKind::{DisplayHelp, DisplayVersion};
    let environment = applied.and_then(|()| settings::check_environment(std::env::vars_os()));
    let parsed = match plain::read(arguments, |name| std::env::var_os(name)) {
        Some(parsed) => Ok(parsed),
        None => Arguments::try_parse_from(arguments),
    };
    let (format, task) = match parsed {
        Ok(parsed) => {
            let format = parsed.check;
            let task = environment.and_then(|()| parsed.validate(is_root));
            (format, task)
        }
        Err(error) if matches!(error.kind(), DisplayHelp | DisplayVersion) => {
            return Ok(Request::Show(error.to_string()));
        }
        Err(error) => {
            let complaint = Error::Usage(one_line(&error.to_string()));
            (check_format(arguments), environment.and(Err(complaint)))
        }
    };
    // What is wrong with options belongs into the report, where one is asked for.
    match (format, task) {
        (Some(format), task) => Ok(Request::Check(task, format)),
        (None, task) => task.map(Request::Run),
    }
}

/// Whether an environment variable is ours: a backend does not get it.
pub(crate) fn is_own_variable(name: &[u8]) -> bool {
    name.starts_with(settings::OWN_PREFIX.as_bytes())
        && plain::own_variables().any(|own| own.as_bytes() == name)
}

/// Whether `--check` is asked for by a command line that cannot be read as a whole.
fn check_format(arguments: &[OsString]) -> Option<Format> {
    let mut options = arguments
        .iter()
        .skip(1)
        .take_while(|argument| *argument != "--");
    options.find_map(|option| match option.to_str()? {
        "--check" | "--check=text" => Some(Format::Text),
        "--check=json" => Some(Format::Json),
        _ => None,
    })
}

/// clap writes a paragraph for a terminal; a log wants its first sentence.
fn one_line(text: &str) -> String {
    let lines = text.lines().map(str::trim).take_while(|line| {
        !line.starts_with("Usage:") && !line.starts_with("For more information")
    });
    let text = lines
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    format!("{text} (see imap-tls --help)")
}

impl Arguments {
    fn validate(self, is_root: bool) -> Result<Task, Error> {
        if self.keep {
            if !self.backend.is_empty() {
                return Err(Error::Usage(
                    "--keep serves no clients, so there is no BACKEND to start".to_owned(),
                ));
            }
            return self
                .common(is_root)
                .map(|common| Task::Keep(Box::new(common)));
        }
        self.serve(is_root)
            .map(|options| Task::Serve(Box::new(options)))
    }

    fn serve(mut self, is_root: bool) -> Result<Options, Error> {
        let client_auth = choose_client_auth(
            self.client_ca.take(),
            std::mem::take(&mut self.client_crl),
            self.client_cert,
        )?;
        let backend_user = choose_backend_user(
            self.backend_user.take(),
            self.backend_user_from_cert,
            client_auth.as_ref(),
            self.tls,
        )?;
        let backend = choose_backend(
            std::mem::take(&mut self.backend),
            self.backend_fd,
            (self.connect.take(), self.send_proxy),
            backend_user,
        )?;
        check_addresses(&self.listener.listen, &backend)?;
        let proxy_from = choose_senders(self.accept_proxy, std::mem::take(&mut self.proxy_from))?;
        let (handshake_timeout, login_timeout) = (self.handshake_timeout, self.login_timeout);
        let (version, policy, is_strict) = (self.min_tls, self.tls, self.strict_sni);
        let common = self.common(is_root)?;
        if let (Separation::Unprivileged, Some(option)) =
            (&common.separation, backend.user_option())
        {
            return Err(Error::Usage(format!(
                "{option} needs root, so it conflicts with --unprivileged"
            )));
        }
        Ok(Options {
            backend,
            client_auth,
            common,
            handshake_timeout,
            login_timeout,
            oldest_version: match version {
                VersionName::Tls12 => OldestVersion::Tls12,
                VersionName::Tls13 => OldestVersion::Tls13,
            },
            policy: match policy {
                PolicyName::Required => Policy::Required,
                PolicyName::Optional => Policy::Optional,
                PolicyName::Implicit => Policy::Implicit,
            },
            proxy_from,
            unknown_name: if is_strict {
                UnknownName::Refused
            } else {
                UnknownName::Default
            },
        })
    }

    fn common(self, is_root: bool) -> Result<CommonOptions, Error> {
        if self.quiet && self.verbose {
            return Err(Error::Usage(
                "--quiet and --verbose (or IMAP_TLS_QUIET and IMAP_TLS_VERBOSE) exclude each other"
                    .to_owned(),
            ));
        }
        if self.keeper.is_some() && !self.listener.listen.is_empty() {
            return Err(Error::Usage(
                "--keeper conflicts with --listen: the listener has a keeper of its own".to_owned(),
            ));
        }
        // What keys there are is the service's affair then, be they named in settings for both.
        let is_for_service = self.keeper.is_some() && !self.keep;
        let certificates = if is_for_service {
            Vec::new()
        } else {
            pair_certificates(self.cert, self.key, self.cert_dir.is_some())?
        };
        if !is_for_service && certificates.is_empty() && !self.ocsp.is_empty() {
            return Err(Error::Usage(
                "--ocsp is about a --cert, and there is none".to_owned(),
            ));
        }
        let separation = match (is_root, self.unprivileged) {
            (true, false) => Separation::Full {
                chroot: self.chroot,
                group: self.group,
                keeper_user: self.keeper_user,
                user: self.user,
            },
            (true, true) => {
                return Err(Error::Usage(
                    "--unprivileged is for a plain user, but this is root".to_owned(),
                ));
            }
            (false, true) => Separation::Unprivileged,
            (false, false) => {
                return Err(Error::Usage(
                    "not started as root, so there are no privileges to separate: start it as root, \
                     or say --unprivileged and do without"
                        .to_owned(),
                ));
            }
        };
        if self.memory_limit < MEMORY_LIMIT_LEAST {
            return Err(Error::Usage(format!(
                "--memory-limit {} is too small to work: at least {}M",
                self.memory_limit,
                MEMORY_LIMIT_LEAST >> 20
            )));
        }
        Ok(CommonOptions {
            certificate_directory: self.cert_dir,
            certificates,
            destination: self.log,
            keeper: self.keeper,
            listening: self.listener.into(),
            memory_limit: self.memory_limit,
            ocsp: self.ocsp,
            required: self.require,
            separation,
            ticket_keys: self.ticket_keys,
            verbosity: match (self.quiet, self.verbose) {
                (true, _) => Verbosity::Quiet,
                (false, false) => Verbosity::Normal,
                (false, true) => Verbosity::Verbose,
            },
        })
    }
}

/// Less than this and the program's own code and libraries do not fit.
const MEMORY_LIMIT_LEAST: u64 = 16 << 20;

/// Each certificate with its key: as many of one as of the other, or all keys in the certificates' files.
fn pair_certificates(
    certificates: Vec<PathBuf>,
    keys: Vec<PathBuf>,
    has_directory: bool,
) -> Result<Vec<CertificateFiles>, Error> {
    let usage = |text: String| Err(Error::Usage(text));
    match (certificates.len(), keys.len()) {
        (0, 0) if has_directory => {}
        (0, _) => return usage("no certificate: name its file with --cert".to_owned()),
        (count, _) if count > CERTIFICATES => {
            return usage(format!(
                "--cert is given {count} times: more than {CERTIFICATES} are for --cert-dir"
            ));
        }
        (_, 0) => {}
        (certificates, keys) if certificates != keys => {
            return usage(format!(
                "--cert is given {certificates} times and --key {keys} times: each certificate needs its key, in the same \
                 order, or every key is in its certificate's file"
            ));
        }
        _ => {}
    }
    let mut keys = keys.into_iter();
    let pair = |certificate| CertificateFiles {
        certificate,
        key: keys.next(),
    };
    Ok(certificates.into_iter().map(pair).collect())
}

fn choose_client_auth(
    authorities: Option<PathBuf>,
    revocations: Vec<PathBuf>,
    demand: Option<DemandName>,
) -> Result<Option<ClientAuth>, Error> {
    let Some(authorities) = authorities else {
        let option = match (demand, revocations.is_empty()) {
            (Some(_), _) => "--client-cert",
            (None, false) => "--client-crl",
            (None, true) => return Ok(None),
        };
        return Err(Error::Usage(format!(
            "{option} without --client-ca: name the file with the authorities' certificates"
        )));
    };
    Ok(Some(ClientAuth {
        authorities,
        demand: match demand {
            Some(DemandName::Request) => ClientDemand::Request,
            Some(DemandName::Required) | None => ClientDemand::Require,
        },
        revocations,
    }))
}

/// An address can be listened on once, and not for a descriptor that is one connection's.
fn check_addresses(addresses: &[ListenAddress], backend: &BackendChoice) -> Result<(), Error> {
    if !addresses.is_empty() && matches!(backend, BackendChoice::Descriptor(_)) {
        return Err(Error::Usage(
            "--backend-fd is one connection's, so it conflicts with --listen".to_owned(),
        ));
    }
    let mut rest = addresses;
    while let [address, others @ ..] = rest {
        if others.contains(address) {
            return Err(Error::Usage(format!(
                "--listen {address} is given more than once"
            )));
        }
        if let Some(other) = others
            .iter()
            .find(|other| address.overlaps(other, addresses))
        {
            return Err(Error::Usage(format!(
                "--listen {address} and --listen {other} have addresses in common: leave one of them out"
            )));
        }
        rest = others;
    }
    Ok(())
}

/// One without the other is a slip: whoever may send a header must do so, and nobody may unless it is said who.
fn choose_senders(is_accepted: bool, senders: Vec<Sender>) -> Result<Vec<Sender>, Error> {
    match (is_accepted, senders.is_empty()) {
        (true, true) => Err(Error::Usage(
            "--accept-proxy without --proxy-from: name the balancers' addresses, since anybody else could write any \
             address into a header"
                .to_owned(),
        )),
        (false, false) => Err(Error::Usage(
            "--proxy-from without --accept-proxy, so no header would be read".to_owned(),
        )),
        _ => Ok(senders),
    }
}

/// For fuzz targets.
#[cfg(fuzzing)]
#[allow(missing_docs)]
pub mod door {
    use std::ffi::OsStr;

    use super::*;

    /// One command line, read in both ways.
    #[derive(Debug)]
    pub struct Both {
        pub plain: Option<String>,
        pub clap: Option<String>,
        /// The file of settings, as it is looked for before anything is read, and as clap sees it.
        pub settings: (Option<OsString>, Option<OsString>),
    }

    /// `variables` are put into the environment meanwhile.
    pub fn read(arguments: &[OsString], variables: &[(&'static str, OsString)]) -> Both {
        for (name, value) in variables {
            crate::sys::set_variable(name, value);
        }
        let plain = plain::read(arguments, |name| std::env::var_os(name));
        let clap = Arguments::try_parse_from(arguments).ok();
        let both = Both {
            plain: plain.as_ref().map(|read| format!("{read:?}")),
            clap: clap.as_ref().map(|read| format!("{read:?}")),
            settings: (
                settings::find(arguments),
                clap.as_ref()
                    .and_then(|read| read.settings.clone())
                    .map(Into::into),
            ),
        };
        // What is wrong is said, and not panicked over; in one line.
        for is_root in [true, false] {
            if let Err(error) = parse(arguments, is_root, Ok(())) {
                assert!(!error.to_string().contains('\n'));
            }
        }
        for (name, _) in variables {
            crate::sys::unset_variable(name);
        }
        both
    }

    pub fn own_variables() -> Vec<&'static str> {
        plain::own_variables().collect()
    }

    /// What is in a file of settings, or the line that is none.
    pub fn settings(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, usize> {
        let settings = settings::parse(bytes).map_err(|(line, _)| line)?;
        let owned = settings
            .into_iter()
            .map(|(name, value)| (name, value.to_vec()));
        Ok(owned.collect())
    }

    pub fn size(text: &str) -> Option<u64> {
        arguments::parse_size(text).ok()
    }

    /// An address of the listener that was read, as it is shown.
    pub fn listen_address(text: &str) -> Option<String> {
        text.parse::<ListenAddress>()
            .ok()
            .map(|read| read.to_string())
    }

    /// Whether a sender of PROXY headers includes this address.
    pub fn sender(text: &str, address: std::net::IpAddr) -> Option<bool> {
        let sender: Sender = text.parse().ok()?;
        Some(sender.includes(Some(address)))
    }

    /// As [`OsStr`].
    pub fn os(bytes: &[u8]) -> &OsStr {
        std::os::unix::ffi::OsStrExt::from_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::arguments::parse_size;
    use super::backend::BACKEND_VARIABLE;
    use super::*;

    fn parse_words(words: &str, is_root: bool) -> Result<Options, String> {
        let words = format!("imap-tls {words}");
        let words: Vec<OsString> = words.split_whitespace().map(OsString::from).collect();
        match parse(&words, is_root, Ok(())) {
            Ok(Request::Run(Task::Serve(options))) => Ok(*options),
            Ok(Request::Run(Task::Keep(_))) => Err("--keep".to_owned()),
            Ok(Request::Check(..)) => Err("--check".to_owned()),
            Ok(Request::Show(text)) => Err(text),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn defaults_are_the_documented_ones() {
        let options = parse_words("--cert c --key k imapd Maildir", true).unwrap();
        assert_eq!(options.policy, Policy::Required);
        assert_eq!(options.handshake_timeout, Duration::from_secs(30));
        assert_eq!(options.login_timeout, Duration::from_secs(120));
        assert_eq!(options.common.memory_limit, 32 << 20);
        let BackendChoice::Program {
            command,
            user: BackendUserChoice::AsStarted,
        } = options.backend
        else {
            panic!()
        };
        assert_eq!(command, ["imapd", "Maildir"]);
        let Separation::Full {
            chroot,
            group: None,
            keeper_user,
            user,
        } = options.common.separation
        else {
            panic!()
        };
        assert_eq!(chroot, PathBuf::from("/var/lib/imap-tls/empty"));
        assert_eq!(
            (user.as_str(), keeper_user.as_str()),
            ("imap-tls", "imap-tls-keeper")
        );
    }

    #[test]
    fn options_after_the_backend_are_the_backends() {
        let options = parse_words("--cert c --key k imapd --key x -v -- y", true).unwrap();
        let BackendChoice::Program { command, .. } = options.backend else {
            panic!()
        };
        assert_eq!(command, ["imapd", "--key", "x", "-v", "--", "y"]);
        assert_eq!(options.common.verbosity, Verbosity::Normal);
    }

    #[test]
    fn each_usage_fault_names_its_option() {
        for (words, is_root, expected) in [
            ("", true, "BACKEND"),
            ("--key k imapd", true, "--cert"),
            ("--key k --cert-dir d imapd", true, "--cert"),
            ("--cert a --cert b --key k imapd", true, "--key"),
            ("--cert c --min-tls 1.1 imapd", true, "--min-tls"),
            ("--cert-dir d --ocsp o imapd", true, "--ocsp"),
            ("--cert c --client-cert request imapd", true, "--client-ca"),
            ("--cert c --client-crl l imapd", true, "--client-ca"),
            (
                "--cert c --backend-user-from-cert imapd",
                true,
                "--client-ca",
            ),
            (
                "--cert c --client-ca a --client-cert request --backend-user-from-cert imapd",
                true,
                "--client-cert required",
            ),
            (
                "--cert c --client-ca a --tls optional --backend-user-from-cert imapd",
                true,
                "--tls optional",
            ),
            (
                "--cert c --client-ca a --backend-user u --backend-user-from-cert imapd",
                true,
                "--backend-user",
            ),
            (
                "--cert c --key k --backend-fd 3 imapd",
                true,
                "--backend-fd",
            ),
            ("--cert c --key k --backend-fd 2", true, "--backend-fd"),
            (
                "--cert c --key k --backend-fd 3 --backend-user u",
                true,
                "--backend-user",
            ),
            (
                "--cert c --key k --backend-fd 3 --listen 143",
                true,
                "--listen",
            ),
            (
                "--cert c --listen 143 --listen 993 --listen [::]:143 imapd",
                true,
                "--listen [::]:143",
            ),
            ("--cert c --accept-proxy imapd", true, "--proxy-from"),
            (
                "--cert c --proxy-from 192.0.2.1 imapd",
                true,
                "--accept-proxy",
            ),
            (
                "--cert c --accept-proxy --proxy-from 192.0.2.1/24 imapd",
                true,
                "192.0.2.0/24",
            ),
            ("--cert c --require seccomp imapd", true, "--require"),
            ("--cert c --connect h:1 imapd", true, "--connect"),
            ("--cert c --connect h:1 --backend-fd 3", true, "--connect"),
            ("--cert c --connect h", true, "--connect"),
            ("--cert c --connect unix:x", true, "--connect"),
            ("--cert c --send-proxy v2 imapd", true, "--send-proxy"),
            (
                "--cert c --connect h:1 --send-proxy v3",
                true,
                "--send-proxy",
            ),
            (
                "--cert c --client-ca a --connect h:1 --backend-user-from-cert",
                true,
                "--connect",
            ),
            (
                "--cert c --unprivileged --backend-user u --connect h:1",
                false,
                "--backend-user",
            ),
            ("--cert c --key k imapd", false, "--unprivileged"),
            (
                "--cert c --key k --unprivileged imapd",
                true,
                "--unprivileged",
            ),
            (
                "--cert c --key k --unprivileged --backend-user u imapd",
                false,
                "--backend-user",
            ),
            (
                "--cert c --key k --memory-limit 1M imapd",
                true,
                "--memory-limit",
            ),
            (
                "--cert c --key k --memory-limit 99999999999G imapd",
                true,
                "--memory-limit",
            ),
            (
                "--cert c --key k --login-timeout 0 imapd",
                true,
                "--login-timeout",
            ),
            (
                "--cert c --key k --handshake-timeout never imapd",
                true,
                "--handshake-timeout",
            ),
            ("--cert c --key k --tls sometimes imapd", true, "--tls"),
            ("--cert c --key k -v -q imapd", true, "--quiet"),
            ("--certificate c imapd", true, "--certificate"),
        ] {
            let message = parse_words(words, is_root).unwrap_err();
            assert!(message.contains(expected), "{words}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }

    #[test]
    fn certificates_and_keys_go_in_pairs_or_in_one_file() {
        let pairs = |words| {
            let options = parse_words(words, true).unwrap();
            let pairs = options.common.certificates.into_iter();
            pairs
                .map(|files| (files.certificate, files.key))
                .collect::<Vec<_>>()
        };
        let pair = |certificate: &str, key: Option<&str>| (certificate.into(), key.map(Into::into));
        assert_eq!(pairs("--cert c imapd"), [pair("c", None)]);
        assert_eq!(
            pairs("--cert c:d --key k --key l imapd"),
            [pair("c", Some("k")), pair("d", Some("l"))]
        );
        assert_eq!(pairs("--cert-dir d imapd"), []);
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("65536"), Ok(65_536));
        assert_eq!(parse_size("64k"), Ok(65_536));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        assert!(parse_size("M").is_err() && parse_size("").is_err() && parse_size("-1").is_err());
    }

    #[test]
    fn help_fits_a_terminal() {
        let Err(help) = parse_words("--help", true) else {
            panic!()
        };
        let widest = help.lines().map(str::len).max();
        assert!(widest <= Some(80), "{widest:?}\n{help}");
    }

    #[test]
    fn our_variables_are_known_by_name_so_that_couriers_stay() {
        let options = command_line();
        let mut names: Vec<_> = options
            .get_arguments()
            .filter_map(|argument| argument.get_env()?.to_str())
            .collect();
        names.push(BACKEND_VARIABLE);
        names.sort_unstable();
        let mut own: Vec<_> = plain::own_variables().collect();
        own.sort_unstable();
        assert_eq!(own, names);
    }
}
