//! What can go wrong outside the protocol, sorted by who has to act, with the exit status of each.

use std::fmt;

/// A fault that ends the program before or beside a session. Most faults of the client are not errors: they are endings.
#[derive(Debug)]
pub(crate) enum Error {
    /// What a client asks for is refused; nothing here is wrong.
    Client(String),
    /// The machine's set-up is wrong; the text names the option that mends it.
    Setup(String),
    /// The system refused something that may work the next time.
    System(String),
    /// The command line or an `IMAP_TLS_*` variable is wrong.
    Usage(String),
}

impl Error {
    /// A set-up fault: what was tried on what, under which option, and the reason.
    pub(crate) fn setup(tried: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::Setup(format!("{tried}: {reason}"))
    }

    /// A system fault: what was tried and the system's reason.
    pub(crate) fn system(tried: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::System(format!("{tried}: {reason}"))
    }

    /// 0 for what a client did, 100 for what the administrator has to mend, 111 for what may pass: the UCSPI convention.
    pub(crate) fn exit_status(&self) -> u8 {
        match self {
            // A client cannot make a service fail (DESIGN promise 11).
            Self::Client(_) => 0,
            Self::Setup(_) | Self::Usage(_) => EXIT_SETUP,
            Self::System(_) => EXIT_TEMPORARY,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Client(text) | Self::Setup(text) | Self::System(text) | Self::Usage(text) => {
                f.write_str(text)
            }
        }
    }
}

/// Exit status for usage and set-up faults.
pub(crate) const EXIT_SETUP: u8 = 100;
/// Exit status for temporary system faults.
pub(crate) const EXIT_TEMPORARY: u8 = 111;

/// The system's reason in the words of strerror(3), without Rust's "(os error N)".
pub(crate) fn reason(error: &std::io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    }
}

/// What is wrong with a file that should be PEM, for the log.
///
/// Security: in the place of what the libraries say of it, which quotes the line. In a file whose line breaks were lost that is all of
/// it, and there may be a key in it.
pub(crate) const MALFORMED_PEM: &str = "malformed PEM: a BEGIN line without its END line, or something else than base64 between \
                                        them; were line breaks lost?";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_follow_the_ucspi_convention() {
        assert_eq!(Error::setup("a", "b").exit_status(), 100);
        assert_eq!(Error::Usage("a".into()).exit_status(), 100);
        assert_eq!(Error::system("a", "b").exit_status(), 111);
    }

    #[test]
    fn a_reason_has_no_rust_in_it() {
        let error = std::io::Error::from_raw_os_error(nix::libc::EACCES);
        assert_eq!(reason(&error), "Permission denied");
    }
}
