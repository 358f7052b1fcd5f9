//! The demonstration: real `imap-tls` processes in front of a small embedded IMAP server, on two loopback ports.
//!
//! `cargo run --release --example demo` needs nothing but a Rust toolchain, and leaves nothing behind.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it is here to tell what it does"
)]

mod backend;
mod certificate;
mod program;
mod self_test;
mod superserver;

use std::error::Error;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::{env, fs, thread};

use clap::Parser;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::{Pid, mkdtemp};

use crate::certificate::Certificate;
use crate::superserver::{Privileges, Service};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Show imap-tls at work on loopback: STARTTLS on one port, implicit TLS on another.
#[derive(Parser)]
#[command(name = "demo")]
struct Options {
    /// The port for STARTTLS; any free one if not given
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    port: u16,
    /// The port for implicit TLS; any free one if not given
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    tls_port: u16,
    /// Run one session against each port, show the dialogue, and exit: 0 if all went well
    #[arg(long, alias = "once")]
    self_test: bool,

    /// Be the IMAP server on stdin and stdout (how imap-tls runs this program)
    #[arg(long, hide = true)]
    backend: bool,
    /// The user that the backend becomes
    #[arg(long, hide = true, requires = "backend")]
    uid: Option<u32>,
    /// Where the certificate goes (how this program runs itself)
    #[arg(long, hide = true)]
    directory: Option<PathBuf>,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match &options.directory {
        _ if options.backend => backend::run(options.uid)
            .map(|()| ExitCode::SUCCESS)
            .map_err(Into::into),
        Some(directory) => demonstrate(&options, directory),
        None => clean_up_after_demonstration(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("demo: {error}");
        ExitCode::FAILURE
    })
}

/// Runs the demonstration as another process, with a temporary directory, and leaves neither behind, whatever ends it.
fn clean_up_after_demonstration() -> Result<ExitCode> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
    ] {
        signals.add(signal);
    }
    // From here on these signals wait until `signals.wait` fetches them.
    signals.thread_block()?;
    let directory = mkdtemp(&env::temp_dir().join("imap-tls-demo-XXXXXX"))?;
    let ended = run_in_process_group(&directory, &signals);
    fs::remove_dir_all(&directory)?;
    ended
}

fn run_in_process_group(directory: &Path, signals: &SigSet) -> Result<ExitCode> {
    let mut child = Command::new(env::current_exe()?)
        .args(env::args_os().skip(1))
        .arg("--directory")
        .arg(directory)
        .process_group(0)
        .spawn()?;
    let group = Pid::from_raw(child.id().try_into()?);
    let status = loop {
        let signal = signals.wait()?;
        if signal != Signal::SIGCHLD {
            killpg(group, Signal::SIGTERM)?;
            child.wait()?;
            println!("\nStopped; {} is removed.", directory.display());
            break None;
        }
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
    };
    // Connections that are still open. There may be none.
    let _ = killpg(group, Signal::SIGTERM);
    Ok(match status {
        Some(status) if !status.success() => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

/// The demonstration itself.
fn demonstrate(options: &Options, directory: &Path) -> Result<ExitCode> {
    SigSet::all().thread_unblock()?;
    prctl::set_pdeathsig(Signal::SIGTERM)?;

    let program = program::build()?;
    // A client that runs as another user must be able to read the certificate. The key's own mode keeps the key.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
    let certificate = Certificate::make(directory)?;
    let privileges = Privileges::find(directory)?;
    let (sender, ended) = mpsc::channel();
    let service = |policy_and_port| {
        Service::new(
            &program,
            policy_and_port,
            &certificate,
            &privileges,
            sender.clone(),
        )
    };
    let starttls = service(("required", options.port))?;
    let implicit = service(("implicit", options.tls_port))?;

    println!("{privileges}");
    println!(
        "Each connection to port {} runs\n  {starttls}",
        starttls.port()?
    );
    println!(
        "and each connection to port {} runs\n  {implicit}\n",
        implicit.port()?
    );
    let (starttls_port, implicit_port) = (starttls.port()?, implicit.port()?);
    thread::spawn(move || starttls.serve());
    let server = thread::spawn(move || implicit.serve());

    if options.self_test {
        self_test::run(starttls_port, implicit_port, &certificate, &ended)?;
        return Ok(ExitCode::SUCCESS);
    }
    print_commands(starttls_port, implicit_port, &certificate.authority);
    match server.join() {
        Ok(never) => match never {},
        Err(_) => Ok(ExitCode::FAILURE),
    }
}

fn print_commands(starttls_port: u16, implicit_port: u16, authority: &Path) {
    let authority = authority.display();
    println!(
        "Try, in another terminal (user demo, password demo):

  # Read a message; curl asks for STARTTLS on the first port, and speaks TLS at once on the second
  curl --ssl-reqd --cacert {authority} -u demo:demo 'imap://localhost:{starttls_port}/INBOX;MAILINDEX=1'
  curl --cacert {authority} -u demo:demo 'imaps://localhost:{implicit_port}/INBOX;MAILINDEX=1'

  # Without TLS the password is refused
  curl -u demo:demo 'imap://localhost:{starttls_port}/'

  # Type IMAP by hand: a LOGIN demo demo, b SELECT INBOX, c FETCH 1 BODY[], d LOGOUT
  openssl s_client -quiet -crlf -starttls imap -connect localhost:{starttls_port} -CAfile {authority} -verify_return_error
  openssl s_client -quiet -crlf -connect localhost:{implicit_port} -CAfile {authority} -verify_return_error

Ctrl-C stops the demonstration and removes the certificate. What imap-tls and the backend log follows.
"
    );
}
