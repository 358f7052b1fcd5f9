//! What we say ourselves: the whole server of `required` before TLS, and the refusals of every phase.

use super::command::{Command, CommandName, Malformed, Tag};

/// The greeting under `required`. No AUTH= and no SASL-IR, LOGINDISABLED (RFC 3501 sections 6.2.3 and 11.2); no
/// LITERAL+ or LITERAL-, with which a client would send a password before it is refused (RFC 7888).
pub(super) const GREETING: &[u8] =
    b"* OK [CAPABILITY IMAP4rev1 ID STARTTLS LOGINDISABLED] imap-tls ready\r\n";

/// What to send in answer to a command, and what it does to the session.
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    pub(super) effect: Effect,
}

/// What follows an answer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Effect {
    /// Nothing.
    Continue,
    /// It counts against the number of bad commands.
    CountBad,
    Logout,
    StartTls,
    /// The session has no way on without TLS.
    TlsUnavailable,
}

/// Whether the keeper can serve a handshake.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum TlsService {
    Available,
    Unavailable,
}

impl Answer {
    fn new(effect: Effect, bytes: Vec<u8>) -> Self {
        Self { bytes, effect }
    }

    /// A tagged response, after untagged ones where needed (each with its line end).
    fn tagged(tag: &Tag, effect: Effect, text: &str) -> Self {
        Self::new(effect, tagged_line(b"", tag, text))
    }

    /// Data and then the tagged OK.
    fn with_data(data: &str, tag: &Tag, effect: Effect, text: &str) -> Self {
        Self::new(effect, tagged_line(data.as_bytes(), tag, text))
    }

    /// A tagged BAD.
    pub(super) fn bad(tag: &Tag, why: &str) -> Self {
        Self::tagged(tag, Effect::CountBad, &format!("BAD {why}"))
    }

    /// BAD to a line that is no command; untagged when its tag is illegal, which is then not echoed.
    pub(super) fn malformed(malformed: &Malformed) -> Self {
        match &malformed.tag {
            Some(tag) => Self::bad(tag, malformed.why),
            None => Self::new(
                Effect::CountBad,
                format!("* BAD {}\r\n", malformed.why).into_bytes(),
            ),
        }
    }

    /// What has to wait for login (RFC 5530 section 3).
    pub(super) fn too_early(tag: &Tag) -> Self {
        Self::tagged(tag, Effect::Continue, "NO [CANNOT] Log in first")
    }

    /// A synchronizing literal that is not invited, with the response code of RFC 4469.
    pub(super) fn too_big(tag: &Tag) -> Self {
        Self::tagged(tag, Effect::CountBad, "NO [TOOBIG] Literal too big")
    }

    /// STARTTLS in clear (RFC 3501 section 6.2.1).
    pub(super) fn starttls(command: &Command<'_>, service: TlsService) -> Self {
        let tag = &command.tag;
        match (command.arguments, service) {
            (Some(_), _) => Self::bad(tag, "STARTTLS has no arguments"),
            (None, TlsService::Available) => {
                Self::tagged(tag, Effect::StartTls, "OK Begin TLS negotiation now")
            }
            (None, TlsService::Unavailable) => Self::tagged(
                tag,
                Effect::Continue,
                "NO [UNAVAILABLE] TLS is not available now",
            ),
        }
    }

    /// Any command under `required` before TLS.
    pub(super) fn required(command: &Command<'_>, service: TlsService) -> Self {
        let tag = &command.tag;
        let plain = command.arguments.is_none();
        match command.name {
            // Whoever comes again may find another keeper. Here all that is left is to wait for the time to run out.
            CommandName::StartTls if plain && service == TlsService::Unavailable => {
                let mut bytes = Self::starttls(command, service).bytes;
                bytes.extend(bye("[UNAVAILABLE] Try again later"));
                Self::new(Effect::TlsUnavailable, bytes)
            }
            CommandName::StartTls => Self::starttls(command, service),
            CommandName::Capability if plain => Self::with_data(
                match service {
                    TlsService::Available => "* CAPABILITY IMAP4rev1 ID STARTTLS LOGINDISABLED\r\n",
                    TlsService::Unavailable => "* CAPABILITY IMAP4rev1 ID LOGINDISABLED\r\n",
                },
                tag,
                Effect::Continue,
                "OK CAPABILITY completed",
            ),
            CommandName::Noop if plain => Self::tagged(tag, Effect::Continue, "OK NOOP completed"),
            CommandName::Logout if plain => Self::with_data(
                "* BYE Logging out\r\n",
                tag,
                Effect::Logout,
                "OK LOGOUT completed",
            ),
            CommandName::Id if is_id_parameter(command) => {
                Self::with_data("* ID NIL\r\n", tag, Effect::Continue, "OK ID completed")
            }
            // RFC 3501 section 7.2.1 and RFC 5530 section 3; whatever the arguments: no mechanism, initial response
            // or literal is worth a look in clear.
            CommandName::Authenticate | CommandName::Login => Self::tagged(
                tag,
                Effect::Continue,
                "NO [PRIVACYREQUIRED] Use STARTTLS first",
            ),
            CommandName::Capability | CommandName::Id | CommandName::Logout | CommandName::Noop => {
                Self::bad(tag, "Invalid arguments")
            }
            CommandName::Compress | CommandName::Other => {
                Self::bad(tag, "Unknown command, or use STARTTLS first")
            }
        }
    }
}

/// An untagged BYE, the last thing a client reads (RFC 3501 section 7.1.5).
pub(super) fn bye(text: &str) -> Vec<u8> {
    format!("* BYE {text}\r\n").into_bytes()
}

fn tagged_line(before: &[u8], tag: &Tag, text: &str) -> Vec<u8> {
    [before, tag.as_bytes(), b" ", text.as_bytes(), b"\r\n"].concat()
}

/// RFC 2971 section 3.1: NIL or a parenthesized list. Its literals are not invited, since we offer none that need no
/// invitation and have no use for what a client says here.
fn is_id_parameter(command: &Command<'_>) -> bool {
    let parameter = command.arguments.unwrap_or_default();
    let is_list = parameter.starts_with(b"(") && parameter.ends_with(b")");
    command.literal.is_none() && (is_list || parameter.eq_ignore_ascii_case(b"NIL"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imap::command;

    #[test]
    fn required_answers() {
        let bad = "a BAD Invalid arguments\r\n";
        let unknown = "a BAD Unknown command, or use STARTTLS first\r\n";
        let privacy = "a NO [PRIVACYREQUIRED] Use STARTTLS first\r\n";
        let id = "* ID NIL\r\na OK ID completed\r\n";
        for (line, expected, effect) in [
            ("a NOOP", "a OK NOOP completed\r\n", Effect::Continue),
            ("a NOOP ", bad, Effect::CountBad),
            (
                "a CAPABILITY",
                "* CAPABILITY IMAP4rev1 ID STARTTLS LOGINDISABLED\r\na OK CAPABILITY completed\r\n",
                Effect::Continue,
            ),
            ("a CAPABILITY x", bad, Effect::CountBad),
            ("a ID NIL", id, Effect::Continue),
            ("a ID (\"name\" \"x\")", id, Effect::Continue),
            ("a ID ()", id, Effect::Continue),
            ("a ID", bad, Effect::CountBad),
            ("a ID (\"name\" {3}", bad, Effect::CountBad),
            (
                "a LOGOUT",
                "* BYE Logging out\r\na OK LOGOUT completed\r\n",
                Effect::Logout,
            ),
            ("a LOGOUT x", bad, Effect::CountBad),
            (
                "a STARTTLS",
                "a OK Begin TLS negotiation now\r\n",
                Effect::StartTls,
            ),
            (
                "a STARTTLS ",
                "a BAD STARTTLS has no arguments\r\n",
                Effect::CountBad,
            ),
            (
                "a STARTTLS {3+}",
                "a BAD STARTTLS has no arguments\r\n",
                Effect::CountBad,
            ),
            ("a LOGIN u p", privacy, Effect::Continue),
            ("a LOGIN", privacy, Effect::Continue),
            ("a AUTHENTICATE PLAIN AHUAcA==", privacy, Effect::Continue),
            ("a COMPRESS DEFLATE", unknown, Effect::CountBad),
            ("a SELECT x", unknown, Effect::CountBad),
            ("a STARTTLSX", unknown, Effect::CountBad),
        ] {
            let command = command::parse(line.as_bytes()).unwrap();
            let answer = Answer::required(&command, TlsService::Available);
            assert_eq!(String::from_utf8(answer.bytes).unwrap(), expected, "{line}");
            assert_eq!(answer.effect, effect, "{line}");
        }
    }

    #[test]
    fn starttls_without_a_keeper_is_refused() {
        let command = command::parse(b"a STARTTLS").unwrap();
        let refusal = "a NO [UNAVAILABLE] TLS is not available now\r\n";
        let answer = Answer::starttls(&command, TlsService::Unavailable);
        assert_eq!(String::from_utf8(answer.bytes).unwrap(), refusal);
        assert_eq!(answer.effect, Effect::Continue);
        let answer = Answer::required(&command, TlsService::Unavailable);
        assert_eq!(
            String::from_utf8(answer.bytes).unwrap(),
            format!("{refusal}* BYE [UNAVAILABLE] Try again later\r\n")
        );
        assert_eq!(answer.effect, Effect::TlsUnavailable);
    }
}
