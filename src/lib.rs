//! imap-tls puts STARTTLS and TLS in front of any IMAP server, so that a hole in the TLS code is worth nothing.
//!
//! ```text
//! superserver --exec--> imap-tls            starts privileged
//!                         |  options, users, addresses, log
//!                         +--fork--> launcher   waits for one record, becomes the IMAP server (the backend)
//!                         |          connector  or, with --connect: gives up its privileges, connects to the IMAP server, ends
//!                         +--fork--> keeper     reads the private key, confines itself, signs once, ends
//!                         v
//!                       network process         confines itself, and only then reads the client's first byte
//! ```
//!
//! Without a superserver, the listener accepts connections itself and forks for each; one keeper then serves all of them. With a
//! superserver there can be such a keeper, too: a service of its own.
//!
//! The modules, in the order in which data flows: `cli` -> `program` -> (`keeping`; or `listener`, `service` ->) `session` -> `activation` ->
//! `backend`, `connector` and `keeper` -> `sandbox` -> `relay` -> `imap`, `tls`, `proxy_header`; with `channel`, `sys`, `log` and
//! `error` underneath. The library exists for the program, its
//! tests and its fuzz targets; it promises no stable interface.

mod activation;
mod admission;
mod backend;
mod buffer;
mod channel;
mod check;
mod cli;
mod clock;
mod connector;
mod error;
mod files;
#[cfg(fuzzing)]
pub mod fuzzing;
pub mod host_name;
pub mod imap;
pub mod keeper;
mod keeping;
mod listener;
mod log;
mod notify;
mod program;
pub mod proxy_header;
mod relay;
mod sandbox;
mod service;
mod session;
mod setup;
mod signed;
mod sys;
mod tls;
mod trust;
mod users;

pub use sys::Allocator;

/// The options, for the man page and the shells' completions.
pub fn command_line() -> clap::Command {
    cli::command_line()
}

/// The program: serves the connection on standard input and output, and ends with the status that is handed on.
pub fn main() -> ! {
    sys::note_stack();
    // At once: the runtime's own clean-up makes system calls that the sandbox has no reason to allow.
    sys::exit_now(program::run())
}
