//! Tag and name of a client's command.

use super::framer::Literal;
use super::limits;

/// A legal tag: the only bytes of a client that we ever send back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Tag(Vec<u8>);

impl Tag {
    /// RFC 3501 section 9: `tag = 1*<any ASTRING-CHAR except "+">`.
    fn new(bytes: &[u8]) -> Option<Self> {
        let legal = |byte: &u8| is_atom_char(*byte) && *byte != b'+' || *byte == b']';
        let sized = (1..=limits::TAG).contains(&bytes.len());
        (sized && bytes.iter().all(legal)).then(|| Self(bytes.to_vec()))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The commands that make a difference before login (RFC 3501 sections 6.1 and 6.2).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum CommandName {
    Authenticate,
    Capability,
    Compress,
    Id,
    Login,
    Logout,
    Noop,
    Other,
    StartTls,
}

impl CommandName {
    /// A name is an atom and nothing else. A quoted string or a literal there is no command to us, yet there are
    /// servers that would run it: so it must not get to them, or `a "STARTTLS"` would.
    fn new(bytes: &[u8]) -> Option<Self> {
        if bytes.is_empty() || !bytes.iter().copied().all(is_atom_char) {
            return None;
        }
        let known = [
            ("AUTHENTICATE", Self::Authenticate),
            ("CAPABILITY", Self::Capability),
            ("COMPRESS", Self::Compress),
            ("ID", Self::Id),
            ("LOGIN", Self::Login),
            ("LOGOUT", Self::Logout),
            ("NOOP", Self::Noop),
            ("STARTTLS", Self::StartTls),
        ];
        let found = known
            .iter()
            .find(|(name, _)| bytes.eq_ignore_ascii_case(name.as_bytes()));
        Some(found.map_or(Self::Other, |(_, name)| *name))
    }
}

/// The first line of a command.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Command<'a> {
    pub(super) tag: Tag,
    pub(super) name: CommandName,
    /// What follows the space after the name; `Some` of nothing when there is a space and nothing else.
    pub(super) arguments: Option<&'a [u8]>,
    pub(super) literal: Option<Literal>,
}

/// A line that is no command: never forwarded.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Malformed {
    pub(super) tag: Option<Tag>,
    pub(super) why: &'static str,
}

/// Reads the first line of a command (without its end).
pub(super) fn parse(line: &[u8]) -> Result<Command<'_>, Malformed> {
    let (tag, rest) = split_at_space(line);
    let Some(tag) = Tag::new(tag) else {
        return Err(Malformed {
            tag: None,
            why: "Invalid tag",
        });
    };
    if !is_text(line) {
        return Err(Malformed {
            tag: Some(tag),
            why: "Invalid characters",
        });
    }
    // What has no second word is no command, and may be SASL data that came too late: not to be echoed.
    let Some(rest) = rest else {
        return Err(Malformed {
            tag: None,
            why: "Invalid command",
        });
    };
    let (name, arguments) = split_at_space(rest);
    match CommandName::new(name) {
        Some(name) => Ok(Command {
            tag,
            name,
            arguments,
            literal: Literal::announced_by(line),
        }),
        None => Err(Malformed {
            tag: Some(tag),
            why: "Invalid command",
        }),
    }
}

/// Whether a line holds neither NUL nor CR, which are legal nowhere outside literals (RFC 3501 section 9, TEXT-CHAR)
/// and which a backend may take for an end of line or of string.
pub(super) fn is_text(line: &[u8]) -> bool {
    !line.iter().any(|byte| matches!(byte, 0 | b'\r'))
}

fn split_at_space(bytes: &[u8]) -> (&[u8], Option<&[u8]>) {
    let mut parts = bytes.splitn(2, |&byte| byte == b' ');
    (parts.next().unwrap_or_default(), parts.next())
}

/// RFC 3501 section 9: `ATOM-CHAR`, any CHAR except atom-specials.
fn is_atom_char(byte: u8) -> bool {
    byte.is_ascii_graphic()
        && !matches!(byte, b'(' | b')' | b'{' | b'%' | b'*' | b'"' | b'\\' | b']')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(line: &str) -> Result<(String, CommandName, Option<&str>), (bool, &'static str)> {
        match parse(line.as_bytes()) {
            Ok(command) => Ok((
                String::from_utf8(command.tag.as_bytes().to_vec()).unwrap(),
                command.name,
                command
                    .arguments
                    .map(|bytes| std::str::from_utf8(bytes).unwrap()),
            )),
            Err(malformed) => Err((malformed.tag.is_some(), malformed.why)),
        }
    }

    #[test]
    fn names_are_atoms_in_any_case() {
        use CommandName::*;
        for (line, tag, name, arguments) in [
            ("a STARTTLS", "a", StartTls, None),
            ("A1] sTaRtTlS", "A1]", StartTls, None),
            ("a STARTTLS ", "a", StartTls, Some("")),
            ("a STARTTLS  ", "a", StartTls, Some(" ")),
            ("a STARTTLS x", "a", StartTls, Some("x")),
            ("a STARTTLSX", "a", Other, None),
            ("a XSTARTTLS", "a", Other, None),
            ("a STARTTLS-FOO", "a", Other, None),
            ("a noop", "a", Noop, None),
            ("a Capability", "a", Capability, None),
            ("a ID NIL", "a", Id, Some("NIL")),
            ("a logout", "a", Logout, None),
            ("a LOGIN u p", "a", Login, Some("u p")),
            ("a authenticate PLAIN", "a", Authenticate, Some("PLAIN")),
            ("a COMPRESS DEFLATE", "a", Compress, Some("DEFLATE")),
            ("a ENABLE X", "a", Other, Some("X")),
        ] {
            assert_eq!(
                name_of(line),
                Ok((tag.to_owned(), name, arguments)),
                "{line:?}"
            );
        }
    }

    #[test]
    fn illegal_tags_are_refused_without_a_tag() {
        let long = format!("{} NOOP", "a".repeat(limits::TAG + 1));
        for line in [
            "",
            " ",
            " a STARTTLS",
            "* STARTTLS",
            "+ STARTTLS",
            "a+b NOOP",
            "{3+}",
            "(a) NOOP",
            "\"a\" NOOP",
            "a\\b NOOP",
            "a%b NOOP",
            "a\tSTARTTLS",
            "\u{7f} NOOP",
            "\u{e9} NOOP",
            "a\0 NOOP",
            "\ra NOOP",
            "\0",
            long.as_str(),
        ] {
            assert_eq!(name_of(line), Err((false, "Invalid tag")), "{line:?}");
        }
        let longest = format!("{} NOOP", "a".repeat(limits::TAG));
        assert!(name_of(&longest).is_ok());
    }

    #[test]
    fn what_is_no_command_name_is_refused() {
        assert_eq!(name_of("AHUAcGFzcw=="), Err((false, "Invalid command")));
        for (line, why) in [
            ("a ", "Invalid command"),
            ("a  STARTTLS", "Invalid command"),
            ("a \"STARTTLS\"", "Invalid command"),
            ("a {8+}", "Invalid command"),
            ("a ~{8}", "Invalid command"),
            ("a STARTTLS\t", "Invalid command"),
            ("a STARTTLS\u{b}", "Invalid command"),
            ("a \u{17f}TARTTLS", "Invalid command"),
            ("a STARTTLS\0", "Invalid characters"),
            ("a STARTTLS\r", "Invalid characters"),
            ("a NOOP x\rb STARTTLS", "Invalid characters"),
            ("a LOGIN u p\0", "Invalid characters"),
        ] {
            assert_eq!(name_of(line), Err((true, why)), "{line:?}");
        }
    }
}
