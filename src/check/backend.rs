//! The backend: started on a socketpair by its launcher, it must greet as an IMAP server does.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags};

use super::connect::{check_connect, check_header};
use super::{Found, Level, Report};
use crate::backend::{Backend, ClientCertificates, Launcher, Origin, Phase, Program, Scope};
use crate::channel::Received;
use crate::cli::{BackendChoice, BackendUserChoice, Options, Separation};
use crate::error::Error;
use crate::imap::Policy;
use crate::log::{Escaped, Log};
use crate::sandbox::OwnUsers;

/// How long a backend may take to greet.
const GREETING_LIMIT: Duration = Duration::from_secs(10);

pub(super) fn check_backend(report: &mut Report, options: &Options, found: Option<&Found<'_>>) {
    match &options.backend {
        BackendChoice::Connect {
            header,
            target,
            user,
        } => {
            let is_known =
                found.is_some() || matches!(options.common.separation, Separation::Unprivileged);
            // Without its user, which is among the findings then, it would be looked at as root.
            if is_known || matches!(user, BackendUserChoice::Named(_)) {
                check_connect(report, target, user, found.map(|found| &found.users));
            }
            check_header(report, *header, options.policy);
        }
        BackendChoice::Descriptor(_) => report.add(
            Level::Ok,
            "backend",
            "a descriptor, which only a session has",
        ),
        BackendChoice::Program { command, user } => {
            let users = found.map(|found| &found.users);
            check_program(report, command, (user, users), options.policy);
        }
    }
}

fn check_program(
    report: &mut Report,
    command: &[OsString],
    (user, own): (&BackendUserChoice, Option<&OwnUsers>),
    policy: Policy,
) {
    let scope = Scope {
        certificates: ClientCertificates::NotAsked,
        origin: Origin::Socket,
    };
    let program = Program::prepare(command, user, own, scope);
    let name = command
        .first()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let Some(program) = report.take("backend", program, |_| format!("'{name}' is there")) else {
        return;
    };
    if *user == BackendUserChoice::OfCertificate {
        let text = "not started: it runs as the user whom a client's certificate names";
        return report.add(Level::Ok, "backend", text);
    }
    let greeting = start(&program).and_then(|(backend, faults)| greeting(backend, faults, &name));
    let Some(greeting) = report.take("backend", greeting, |line| format!("it greets: {line}"))
    else {
        return;
    };
    let greeting = greeting.to_ascii_uppercase();
    if greeting.starts_with("* PREAUTH") && policy != Policy::Implicit {
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

/// The backend, and what its launcher has to say until it has become it.
fn start(program: &Program) -> Result<(Backend, OwnedFd), Error> {
    let (faults, log) = nix::unistd::pipe2(OFlag::O_CLOEXEC)
        .map_err(|error| Error::system("cannot make a pipe", error.desc()))?;
    let log = Log::to_pipe(log);
    let launcher = Launcher::start(program, Phase::Cleartext, None, &log)?;
    Ok((launcher.go(None, None), faults))
}

/// The first line that the backend says, which must be an IMAP greeting (RFC 9051 section 7.1).
fn greeting(mut backend: Backend, faults: OwnedFd, name: &str) -> Result<String, Error> {
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
        (false, true) => Err(Error::Setup(launchers_fault(faults).unwrap_or_else(|| {
            format!(
                "'{name}' (BACKEND) ends without a greeting: try it by hand, and look into its log"
            )
        }))),
        (false, false) => Err(Error::Setup(format!(
            "'{name}' (BACKEND) says nothing within {} s: does it serve standard input and output?",
            GREETING_LIMIT.as_secs()
        ))),
    }
}

/// Why the launcher did not become the backend. It is read to its end, which came with exec or the launcher's own.
fn launchers_fault(faults: OwnedFd) -> Option<String> {
    let mut text = String::new();
    File::from(faults).read_to_string(&mut text).ok()?;
    (!text.is_empty()).then_some(text)
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
