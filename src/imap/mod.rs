//! The IMAP protocol core: bytes in, [`Action`]s out.
//!
//! Pure: no descriptors, no clock, no environment, no log. It follows a session from the first byte to the point
//! beyond which STARTTLS cannot come any more, in three settings: in clear under `required` (we are the server), in
//! clear under `optional` and inside TLS (we stand between client and backend). See [`Preauth`].
//!
//! The data flows `framer` -> `command` (client) or `response` (backend) -> `preauth`, which decides; `answer` holds
//! what we say ourselves, `capability` rewrites what the backend says, `limits` bounds everything.
#![forbid(unsafe_code)]

mod answer;
mod capability;
mod command;
mod framer;
mod limits;
mod preauth;
mod response;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod transcript_tests;

pub use capability::{ExternalAuth, StartTlsOffer, rewrite_capabilities};
pub use limits::ClientLimit;
pub use preauth::Preauth;

use std::fmt;

/// When TLS is spoken on this connection.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Policy {
    /// STARTTLS must come before anything that matters; until then no byte of the client reaches a backend.
    Required,
    /// The session may stay in clear; STARTTLS is offered.
    Optional,
    /// TLS from the first byte (port 993).
    Implicit,
}

/// How the session that [`Preauth::secured`] follows came to be inside TLS.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Entry {
    /// By STARTTLS, with a backend started for the TLS phase: its greeting is swallowed.
    StartTls,
    /// By STARTTLS, with the backend of the cleartext phase, which has greeted already (`--backend-fd`).
    StartTlsKept,
    /// From the first byte: the backend's greeting is the client's.
    Implicit,
}

/// What the relay is to do, in this order.
///
/// `Debug` shows lengths only: the bytes may hold a password.
#[derive(Clone, Eq, PartialEq)]
pub enum Action {
    /// Send these bytes to the client.
    SendToClient(Vec<u8>),
    /// Send these bytes to the backend.
    SendToBackend(Vec<u8>),
    /// Start the handshake. The tagged OK is in the `SendToClient` before; [`Preauth::into_unread`] has what the
    /// client sent after its STARTTLS line. Nothing follows.
    StartTls,
    /// From here on relay bytes as they are. What was held has been emitted before.
    Opaque(OpaqueReason),
    /// Send what was emitted before, then end the connection. Nothing follows.
    Close(CloseReason),
}

impl fmt::Debug for Action {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SendToClient(bytes) => write!(formatter, "SendToClient({} bytes)", bytes.len()),
            Self::SendToBackend(bytes) => write!(formatter, "SendToBackend({} bytes)", bytes.len()),
            Self::StartTls => formatter.write_str("StartTls"),
            Self::Opaque(reason) => write!(formatter, "Opaque({reason:?})"),
            Self::Close(reason) => write!(formatter, "Close({reason:?})"),
        }
    }
}

/// Why the session is beyond STARTTLS.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpaqueReason {
    /// The backend answered LOGIN or AUTHENTICATE with OK.
    Authenticated,
    /// The backend greeted with PREAUTH.
    Preauthenticated,
}

/// Why the connection is to end; `Display` gives the words for the log.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CloseReason {
    /// The backend said BYE.
    BackendBye,
    /// The backend closed its side.
    BackendEnded,
    /// The backend's greeting was not one.
    BackendGarbage,
    /// A line or a literal of the backend is beyond what is sane before login.
    BackendLimit,
    /// The backend answered a command while it was still owed a part of it: what follows cannot be told apart.
    BackendOutOfStep,
    /// A backend started for the TLS phase greeted with PREAUTH.
    BackendPreauth,
    /// The backend closed its side before it greeted.
    BackendSilent,
    /// The client closed its side.
    ClientEnded,
    /// The client went over a limit.
    ClientLimit(ClientLimit),
    /// The client sent NUL or a bare CR where a command could no longer be refused.
    ClientMalformed,
    /// LOGOUT.
    Logout,
    /// STARTTLS was asked for where nothing goes without, and the keeper is gone.
    TlsUnavailable,
    /// The client sent too many commands that are none.
    TooManyBadCommands,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::BackendBye => "backend said BYE",
            Self::BackendEnded => "backend closed",
            Self::BackendGarbage => "backend's greeting is not IMAP",
            Self::BackendLimit => "backend's response too long before login",
            Self::BackendOutOfStep => "backend answered in the middle of a command",
            Self::BackendPreauth => "backend greeted PREAUTH after STARTTLS",
            Self::BackendSilent => "backend ended before its greeting",
            Self::ClientEnded => "client closed",
            Self::ClientLimit(limit) => {
                return write!(formatter, "client went over the limit: {limit}");
            }
            Self::ClientMalformed => "client sent NUL or CR inside a command",
            Self::Logout => "logout",
            Self::TlsUnavailable => "TLS is not available",
            Self::TooManyBadCommands => "too many bad commands",
        })
    }
}

/// For fuzz targets.
#[cfg(fuzzing)]
#[allow(missing_docs)]
pub mod door {
    use super::framer::{Literal, Synchronization};

    /// The literal that a line announces: its size, and whether it is to be invited.
    pub fn literal(line: &[u8]) -> Option<(u64, bool)> {
        let literal = Literal::announced_by(line)?;
        Some((
            literal.size,
            literal.synchronization == Synchronization::Synchronizing,
        ))
    }

    /// Tag and name of a command.
    pub fn command(line: &[u8]) -> Option<(Vec<u8>, String)> {
        let command = super::command::parse(line).ok()?;
        Some((
            command.tag.as_bytes().to_vec(),
            format!("{:?}", command.name).to_ascii_uppercase(),
        ))
    }

    /// What a line of a backend's is, and the literal that it announces.
    pub fn response(line: &[u8]) -> (String, Option<u64>) {
        let response = super::response::parse(line);
        let literal = match &response {
            super::response::Response::Data { literal } => *literal,
            _ => None,
        };
        (format!("{response:?}"), literal)
    }
}
