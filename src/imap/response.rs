//! The first line of a backend's response, as far as it matters before login.

use super::framer::{Literal, Synchronization};

/// What a line of the backend is.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Response<'a> {
    /// `+ ...` (RFC 3501 section 7.5)
    Continuation,
    /// `* OK ...` and its kin (RFC 3501 section 7.1)
    Status(Condition),
    /// `tag OK ...`
    Tagged { tag: &'a [u8], condition: Condition },
    /// `* ...` of any other kind; the only one that may hold literals
    Data { literal: Option<u64> },
    /// Nothing that RFC 3501 knows; passed on, as a client would see it without us.
    Unknown,
}

/// The condition a status response reports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Condition {
    Bad,
    Bye,
    No,
    Ok,
    PreAuth,
}

impl Condition {
    pub(super) fn new(word: &[u8]) -> Option<Self> {
        let known = [
            ("BAD", Self::Bad),
            ("BYE", Self::Bye),
            ("NO", Self::No),
            ("OK", Self::Ok),
            ("PREAUTH", Self::PreAuth),
        ];
        let found = known
            .iter()
            .find(|(name, _)| word.eq_ignore_ascii_case(name.as_bytes()));
        found.map(|(_, condition)| *condition)
    }

    /// Whether it can answer a command (RFC 3501 section 7.1: BYE and PREAUTH are always untagged).
    fn answers_command(self) -> bool {
        matches!(self, Self::Bad | Self::No | Self::Ok)
    }
}

/// Reads a line (without its end).
///
/// Status responses end in free text, capability data in atoms: `{3}` at their end is no literal, and to take it for
/// one would put us out of step with the client.
pub(super) fn parse(line: &[u8]) -> Response<'_> {
    let mut words = line.split(|&byte| byte == b' ');
    let first = words.next().unwrap_or_default();
    let second = words.find(|word| !word.is_empty()).unwrap_or_default();
    match (first, Condition::new(second)) {
        ([b'+', ..], _) => Response::Continuation,
        (b"*", Some(condition)) => Response::Status(condition),
        (b"*", None) if second.eq_ignore_ascii_case(b"CAPABILITY") => {
            Response::Data { literal: None }
        }
        (b"*", None) => Response::Data {
            literal: literal(line),
        },
        (tag @ [_, ..], Some(condition)) if condition.answers_command() => {
            Response::Tagged { tag, condition }
        }
        _ => Response::Unknown,
    }
}

/// The size of the literal that a line of data announces. The non-synchronizing form goes from client to server alone
/// (RFC 7888 section 3). A number beyond 64 bits is `u64::MAX`.
pub(super) fn literal(line: &[u8]) -> Option<u64> {
    let literal = Literal::announced_by(line)?;
    (literal.synchronization == Synchronization::Synchronizing).then_some(literal.size)
}

/// Whether a tagged NO is for no reason of the client's, by its response code (RFC 5530 section 3).
pub(super) fn is_servers_fault(line: &[u8]) -> bool {
    let mut words = line
        .split(|&byte| byte == b' ')
        .filter(|word| !word.is_empty());
    words.nth(2).is_some_and(|code| {
        code.eq_ignore_ascii_case(b"[UNAVAILABLE]") || code.eq_ignore_ascii_case(b"[SERVERBUG]")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn lines_are_told_apart() {
        use Condition::*;
        use Response::*;
        let tagged = |tag, condition| Tagged { tag, condition };
        for (line, expected) in [
            ("* OK ready", Status(Ok)),
            ("* ok", Status(Ok)),
            ("*  PreAuth x", Status(PreAuth)),
            ("* BYE {3}", Status(Bye)),
            ("* OKAY", Data { literal: None }),
            ("* CAPABILITY IMAP4rev1 {3}", Data { literal: None }),
            ("* ID (\"name\" {3}", Data { literal: Some(3) }),
            ("* ID (\"name\" {3+}", Data { literal: None }),
            ("* 3 EXISTS", Data { literal: None }),
            ("*", Data { literal: None }),
            ("+", Continuation),
            ("+ ", Continuation),
            ("+ OK go {3}", Continuation),
            ("a OK", tagged(b"a", Ok)),
            ("a ok done {3}", tagged(b"a", Ok)),
            ("a No x", tagged(b"a", No)),
            ("a BAD x", tagged(b"a", Bad)),
            ("a BYE x", Unknown),
            ("a PREAUTH x", Unknown),
            (" a OK x", Unknown),
            (" * OK x", Unknown),
            ("a", Unknown),
            ("a {3}", Unknown),
            ("", Unknown),
        ] {
            assert_eq!(parse(line.as_bytes()), expected, "{line:?}");
        }
    }

    #[test]
    fn whose_fault_a_no_is() {
        for (line, expected) in [
            ("a NO [UNAVAILABLE] later", true),
            ("a no  [serverbug]", true),
            ("a NO [AUTHENTICATIONFAILED] no", false),
            ("a NO not [UNAVAILABLE]", false),
            ("a NO", false),
        ] {
            assert_eq!(is_servers_fault(line.as_bytes()), expected, "{line:?}");
        }
    }
}
