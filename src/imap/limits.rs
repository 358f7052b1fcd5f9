//! Every limit on what a peer may send before login, with its reason, and the counters that enforce them.

use std::fmt;

/// A client's line under `required` before TLS. RFC 2683 section 3.2.1.5 and RFC 7162 section 4 want 8000 and 8192;
/// nothing that is answered there is longer.
const REQUIRED_LINE: usize = 16 * 1024;
/// A client's line in clear under `optional`: initial responses of Kerberos may be tens of kilobytes (RFC 4959).
const OPTIONAL_LINE: usize = 64 * 1024;
/// A client's line inside TLS: the same with room for OAuth tokens and certificates in SASL exchanges.
const SECURED_LINE: usize = 128 * 1024;

/// A client's literal before login: user names and passwords are the only ones there are.
pub(super) const LITERAL: u64 = 64 * 1024;

/// A tag that is echoed: clients use ten octets, and the less is reflected the better (cross-protocol attacks, ALPACA). A backend
/// must take no offence at one either: Dovecot answers one of 127 octets without it, and then nobody knows which command that was.
pub(super) const TAG: usize = 64;

/// Commands under `required` before TLS: eight a second for the whole default login timeout.
const REQUIRED_COMMANDS: u32 = 1_000;
/// Commands before login otherwise: each costs the backend work, but a client that polls with NOOP is not to notice.
const COMMANDS: u32 = 10_000;
/// Commands that are none, by our judgement or the backend's, before we say BYE. Dovecot allows three in a row; these are all of
/// a session's.
const BAD_COMMANDS: u32 = 10;

/// Bytes under `required` before TLS: enough for every command that may be sent there.
const REQUIRED_BYTES: u64 = 1024 * 1024;
/// Bytes before login otherwise: a hundred of the largest lines.
const BYTES: u64 = 16 * 1024 * 1024;

/// Input held while the backend works, above which the relay is asked to stop reading: one large read.
pub(super) const HELD_INPUT: usize = 64 * 1024;
/// Input held at most, whatever the relay does: what one read or one TLS record buffer may add, with room.
pub(super) const HELD_INPUT_MAXIMUM: usize = 512 * 1024;

/// A line of the backend before login: capability lists of 20 kB have been seen.
pub(super) const BACKEND_LINE: usize = 128 * 1024;

/// How much of a greeting that is none is shown to an administrator, in octets.
pub(super) const ODD_GREETING: usize = 100;

/// Which limit a client went over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClientLimit {
    /// All bytes before login.
    Bytes,
    /// All commands before login.
    Commands,
    /// Input sent ahead of the backend's answers.
    HeldInput,
    /// One line.
    Line,
    /// One literal.
    Literal,
}

impl fmt::Display for ClientLimit {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Bytes => "bytes before login",
            Self::Commands => "commands before login",
            Self::HeldInput => "input ahead of answers",
            Self::Line => "line length",
            Self::Literal => "literal size",
        })
    }
}

/// What the client may still do.
pub(super) struct Budget {
    pub(super) line: usize,
    bytes: u64,
    commands: u32,
    bad_commands: u32,
}

impl Budget {
    pub(super) fn required() -> Self {
        Self::new(REQUIRED_LINE, REQUIRED_BYTES, REQUIRED_COMMANDS)
    }

    pub(super) fn optional() -> Self {
        Self::new(OPTIONAL_LINE, BYTES, COMMANDS)
    }

    pub(super) fn secured() -> Self {
        Self::new(SECURED_LINE, BYTES, COMMANDS)
    }

    fn new(line: usize, bytes: u64, commands: u32) -> Self {
        Self {
            line,
            bytes,
            commands,
            bad_commands: BAD_COMMANDS,
        }
    }

    /// Counts bytes as they are read as lines, or announced as literals: never as they arrive, since that would make
    /// the moment depend on the cuts.
    pub(super) fn spend_bytes(&mut self, count: u64) -> Result<(), ClientLimit> {
        self.bytes = self.bytes.checked_sub(count).ok_or(ClientLimit::Bytes)?;
        Ok(())
    }

    pub(super) fn spend_command(&mut self) -> Result<(), ClientLimit> {
        self.commands = self.commands.checked_sub(1).ok_or(ClientLimit::Commands)?;
        Ok(())
    }

    /// Counts a bad command; false after the last one that is put up with.
    pub(super) fn spend_bad_command(&mut self) -> bool {
        self.bad_commands = self.bad_commands.saturating_sub(1);
        self.bad_commands > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_limits_are_what_the_rfcs_ask_for() {
        assert!(Budget::required().line >= 8192);
        assert!(Budget::optional().line >= 8192);
        assert!(Budget::secured().line >= 65536);
    }

    #[test]
    fn counters_end_and_stay_ended() {
        let mut budget = Budget::new(1, 10, 2);
        assert_eq!(budget.spend_bytes(10), Ok(()));
        assert_eq!(budget.spend_bytes(1), Err(ClientLimit::Bytes));
        assert_eq!(budget.spend_bytes(u64::MAX), Err(ClientLimit::Bytes));
        assert_eq!(budget.spend_command(), Ok(()));
        assert_eq!(budget.spend_command(), Ok(()));
        assert_eq!(budget.spend_command(), Err(ClientLimit::Commands));
        let allowed = (0..20).filter(|_| budget.spend_bad_command()).count();
        assert_eq!(allowed, 9);
    }
}
