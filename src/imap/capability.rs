//! The backend's capabilities as the client is to see them: STARTTLS is ours, and what TLS makes untrue goes.

use super::response::Condition;
use std::borrow::Cow;
use std::ops::Range;

/// Whether the client is to read STARTTLS in a list of capabilities.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StartTlsOffer {
    /// Exactly once (RFC 3501 section 6.2.1: before TLS and before login).
    Offered,
    /// Not at all (RFC 9051 section 6.2.1: not once TLS is up; nor after login).
    Withdrawn,
}

/// Whether the client may log in by the certificate that it has shown (AUTH=EXTERNAL, RFC 4422 appendix A).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ExternalAuth {
    /// The backend is told who the client is: what it offers stays.
    Kept,
    /// Nobody knows who the client is.
    Withdrawn,
}

/// Rewrites the capability list of a response line (without its end), if it has one: `* CAPABILITY ...`, or a
/// `[CAPABILITY ...]` response code of a status response or a continuation request (RFC 3501 section 7.1). A line on
/// which nothing needs to change comes back byte for byte.
#[must_use]
pub fn rewrite_capabilities(
    line: &[u8],
    offer: StartTlsOffer,
    external: ExternalAuth,
) -> Cow<'_, [u8]> {
    let Some(range) = list_range(line) else {
        return Cow::Borrowed(line);
    };
    let list = line.get(range.clone()).unwrap_or_default();
    let Some(list) = rewritten_list(list, offer, external) else {
        return Cow::Borrowed(line);
    };
    let before = line.get(..range.start).unwrap_or_default();
    let after = line.get(range.end..).unwrap_or_default();
    Cow::Owned([before, &list, after].concat())
}

/// Where the list is: from behind the word CAPABILITY to the end of the line or of the response code.
fn list_range(line: &[u8]) -> Option<Range<usize>> {
    let mut reader = Reader { line, position: 0 };
    if line.starts_with(b"+") {
        reader.position = 1;
        return code_range(reader);
    }
    let first = reader.word();
    let second = reader.word();
    if first == b"*" && second.eq_ignore_ascii_case(b"CAPABILITY") {
        return Some(reader.position..line.len());
    }
    Condition::new(second)?;
    code_range(reader)
}

/// The list in the response code that comes next; what is not closed by `]` is text.
fn code_range(mut reader: Reader<'_>) -> Option<Range<usize>> {
    reader.skip_separators();
    reader.line.get(reader.position..)?.strip_prefix(b"[")?;
    reader.position += 1;
    let length = reader
        .line
        .get(reader.position..)?
        .iter()
        .position(|&byte| byte == b']')?;
    let end = reader.position + length;
    let mut inside = Reader {
        line: reader.line.get(..end)?,
        position: reader.position,
    };
    let word = inside.word();
    word.eq_ignore_ascii_case(b"CAPABILITY")
        .then_some(inside.position..end)
}

/// The list as the client is to see it; `None` if it is so already.
fn rewritten_list(list: &[u8], offer: StartTlsOffer, external: ExternalAuth) -> Option<Vec<u8>> {
    let mut kept = Vec::with_capacity(list.len() + 16);
    let mut missing = offer == StartTlsOffer::Offered;
    let mut changed = false;
    let mut reader = Reader {
        line: list,
        position: 0,
    };
    loop {
        let start = reader.position;
        let token = reader.word();
        if token.is_empty() {
            let trailing = list.get(start..).unwrap_or_default();
            changed |= missing;
            kept.extend_from_slice(if missing { b" STARTTLS" } else { b"" });
            kept.extend_from_slice(trailing);
            return changed.then_some(kept);
        }
        let is_starttls = token.eq_ignore_ascii_case(b"STARTTLS");
        if is_starttls && !missing || is_untrue_behind_us(token, external) {
            changed = true;
            continue;
        }
        missing &= !is_starttls;
        kept.extend_from_slice(list.get(start..reader.position).unwrap_or_default());
    }
}

/// Mechanisms that look at the TLS session, which the backend cannot: channel binding (RFC 5929, RFC 9266), and
/// client certificates unless it is told about them (RFC 4422 appendix A).
fn is_untrue_behind_us(token: &[u8], external: ExternalAuth) -> bool {
    match token.split_at_checked(5) {
        Some((prefix, mechanism)) => {
            prefix.eq_ignore_ascii_case(b"AUTH=") && looks_at_tls(mechanism, external)
        }
        None => false,
    }
}

fn looks_at_tls(mechanism: &[u8], external: ExternalAuth) -> bool {
    let tail = mechanism
        .get(mechanism.len().saturating_sub(5)..)
        .unwrap_or_default();
    let is_external = mechanism.eq_ignore_ascii_case(b"EXTERNAL");
    (is_external && external == ExternalAuth::Withdrawn) || tail.eq_ignore_ascii_case(b"-PLUS")
}

/// Words on a line, one after the other.
#[derive(Clone, Copy)]
struct Reader<'a> {
    line: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    /// The next word, and past it; empty at the end of the line, where only separators were left.
    fn word(&mut self) -> &'a [u8] {
        self.skip_separators();
        let rest = self.line.get(self.position..).unwrap_or_default();
        let length = rest
            .iter()
            .position(|byte| is_separator(*byte))
            .unwrap_or(rest.len());
        self.position += length;
        rest.get(..length).unwrap_or_default()
    }

    fn skip_separators(&mut self) {
        let rest = self.line.get(self.position..).unwrap_or_default();
        self.position += rest.iter().take_while(|byte| is_separator(**byte)).count();
    }
}

/// A space; or a control character, at which a lenient client may split too.
fn is_separator(byte: u8) -> bool {
    byte <= b' '
}

#[cfg(test)]
mod tests {
    use super::StartTlsOffer::{Offered, Withdrawn};
    use super::*;

    fn rewritten(line: &str, offer: StartTlsOffer) -> String {
        let once =
            rewrite_capabilities(line.as_bytes(), offer, ExternalAuth::Withdrawn).into_owned();
        let twice = rewrite_capabilities(&once, offer, ExternalAuth::Withdrawn);
        assert_eq!(twice, once, "not idempotent: {line:?}");
        String::from_utf8(once).unwrap()
    }

    #[test]
    fn lists_are_rewritten_wherever_they_stand() {
        for (line, offered, withdrawn) in [
            (
                "* CAPABILITY IMAP4rev1",
                "* CAPABILITY IMAP4rev1 STARTTLS",
                "* CAPABILITY IMAP4rev1",
            ),
            (
                "* capability IMAP4rev1 starttls ID",
                "* capability IMAP4rev1 starttls ID",
                "* capability IMAP4rev1 ID",
            ),
            ("* CAPABILITY", "* CAPABILITY STARTTLS", "* CAPABILITY"),
            (
                "* CAPABILITY STARTTLS",
                "* CAPABILITY STARTTLS",
                "* CAPABILITY",
            ),
            (
                "* OK [CAPABILITY A STARTTLS B] hi",
                "* OK [CAPABILITY A STARTTLS B] hi",
                "* OK [CAPABILITY A B] hi",
            ),
            (
                "* ok [capability A] hi ]",
                "* ok [capability A STARTTLS] hi ]",
                "* ok [capability A] hi ]",
            ),
            (
                "* PREAUTH [CAPABILITY A StartTLS]",
                "* PREAUTH [CAPABILITY A StartTLS]",
                "* PREAUTH [CAPABILITY A]",
            ),
            (
                "a OK [CAPABILITY STARTTLS A] x",
                "a OK [CAPABILITY STARTTLS A] x",
                "a OK [CAPABILITY A] x",
            ),
            (
                "a NO [CAPABILITY A] x",
                "a NO [CAPABILITY A STARTTLS] x",
                "a NO [CAPABILITY A] x",
            ),
            (
                "* BYE [CAPABILITY A] x",
                "* BYE [CAPABILITY A STARTTLS] x",
                "* BYE [CAPABILITY A] x",
            ),
            (
                "+ [CAPABILITY STARTTLS A] x",
                "+ [CAPABILITY STARTTLS A] x",
                "+ [CAPABILITY A] x",
            ),
            (
                "*  CAPABILITY  A  STARTTLS  B ",
                "*  CAPABILITY  A  STARTTLS  B ",
                "*  CAPABILITY  A  B ",
            ),
            (
                "* CAPABILITY A ",
                "* CAPABILITY A STARTTLS ",
                "* CAPABILITY A ",
            ),
            (
                "* CAPABILITY A\tSTARTTLS\tB",
                "* CAPABILITY A\tSTARTTLS\tB",
                "* CAPABILITY A\tB",
            ),
            (
                "* CAPABILITY STARTTLS A starttls STARTTLS B",
                "* CAPABILITY STARTTLS A B",
                "* CAPABILITY A B",
            ),
        ] {
            assert_eq!(rewritten(line, Offered), offered, "{line:?}");
            assert_eq!(rewritten(line, Withdrawn), withdrawn, "{line:?}");
        }
    }

    #[test]
    fn only_whole_tokens_go() {
        let line = "* CAPABILITY IMAP4rev1 XSTARTTLS STARTTLS-FOO AUTH=PLAIN AUTH=SCRAM-SHA-256 AUTH=PLUS AUTH=EXTERNALS \
                    LOGINDISABLED SASL-IR LITERAL+ X-PLUS AUTHX-PLUS COMPRESS=DEFLATE";
        assert_eq!(rewritten(line, Withdrawn), line);
    }

    #[test]
    fn mechanisms_that_look_at_tls_go() {
        let line = "* OK [CAPABILITY AUTH=SCRAM-SHA-256-PLUS AUTH=PLAIN auth=scram-sha-1-plus Auth=External] hi";
        assert_eq!(
            rewritten(line, Withdrawn),
            "* OK [CAPABILITY AUTH=PLAIN] hi"
        );
        assert_eq!(
            rewritten(line, Offered),
            "* OK [CAPABILITY AUTH=PLAIN STARTTLS] hi"
        );
    }

    #[test]
    fn what_only_looks_like_a_list_stays() {
        for line in [
            "",
            "*",
            "* ",
            "* OK",
            "* OK ready, CAPABILITY STARTTLS",
            "* OK [ALERT] [CAPABILITY STARTTLS] x",
            "* OK x [CAPABILITY STARTTLS] x",
            "* OK [CAPABILITY STARTTLS",
            "* OK [CAPABILITYS STARTTLS] x",
            "* OK [XCAPABILITY STARTTLS] x",
            "* OK \"[CAPABILITY STARTTLS]\"",
            "* ID (\"CAPABILITY\" \"STARTTLS\")",
            "* LIST () \"/\" \"[CAPABILITY STARTTLS]\"",
            "a CAPABILITY STARTTLS",
            "a FETCH [CAPABILITY STARTTLS]",
            "+ U1RBUlRUTFM=",
        ] {
            assert_eq!(rewritten(line, Offered), line);
            assert_eq!(rewritten(line, Withdrawn), line);
        }
    }

    #[test]
    fn long_lists_are_rewritten() {
        let tokens: String = (0..4000).map(|number| format!(" X{number}")).collect();
        let line = format!("* CAPABILITY{tokens} STARTTLS{tokens}");
        assert_eq!(
            rewritten(&line, Withdrawn),
            format!("* CAPABILITY{tokens}{tokens}")
        );
    }
}
