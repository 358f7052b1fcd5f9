//! Bytes of any cut -> lines and literals: the one buffer for what a peer sent and nobody has read yet.

/// Bytes of one peer, read from the front as lines or as counted octets.
#[derive(Default)]
pub(super) struct Framer {
    bytes: Vec<u8>,
    /// Everything before this has been read.
    start: usize,
    /// Between `start` and this there is no LF, so a line that arrives byte by byte is searched once.
    searched: usize,
}

/// What [`Framer::take_line`] found.
pub(super) enum Taken {
    Incomplete,
    Line(Line),
    TooLong,
}

/// One line without its end.
pub(super) struct Line {
    pub(super) content: Vec<u8>,
    pub(super) end: LineEnd,
}

/// How a line ended.
///
/// CRLF is the rule (RFC 3501 section 2.2). A bare LF ends a line too, everywhere and in both directions, and goes to
/// the backend as CRLF, so that we and the backend cannot disagree about where a line ends (CVE-2022-28220). A bare
/// CR ends nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum LineEnd {
    CrLf,
    Lf,
}

impl LineEnd {
    pub(super) fn bytes(self) -> &'static [u8] {
        match self {
            Self::CrLf => b"\r\n",
            Self::Lf => b"\n",
        }
    }
}

impl Framer {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start.min(self.bytes.len()));
        self.searched = self.searched.saturating_sub(self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn len(&self) -> usize {
        self.unread().len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.unread().is_empty()
    }

    /// Takes the next line if it is there. A line is too long when more than `limit` octets precede its LF, whether
    /// or not the LF has come: the answer is the same for every cut.
    pub(super) fn take_line(&mut self, limit: usize) -> Taken {
        let from = self.searched.max(self.start);
        let unsearched = self.bytes.get(from..).unwrap_or_default();
        let Some(offset) = unsearched.iter().position(|&byte| byte == b'\n') else {
            self.searched = self.bytes.len();
            return if self.len() > limit {
                Taken::TooLong
            } else {
                Taken::Incomplete
            };
        };
        let line_feed = from + offset;
        if line_feed - self.start > limit {
            return Taken::TooLong;
        }
        let raw = self.bytes.get(self.start..line_feed).unwrap_or_default();
        let (content, end) = match raw.strip_suffix(b"\r") {
            Some(content) => (content, LineEnd::CrLf),
            None => (raw, LineEnd::Lf),
        };
        let content = content.to_vec();
        self.start = line_feed + 1;
        Taken::Line(Line { content, end })
    }

    /// Takes octets, no more than `most` and no more than are there.
    pub(super) fn take(&mut self, most: u64) -> Vec<u8> {
        let count = usize::try_from(most).map_or(self.len(), |most| most.min(self.len()));
        let taken = self.unread().get(..count).unwrap_or_default().to_vec();
        self.start += taken.len();
        taken
    }

    pub(super) fn take_all(&mut self) -> Vec<u8> {
        self.take(u64::MAX)
    }

    pub(super) fn clear(&mut self) {
        self.start = self.bytes.len();
    }

    fn unread(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }
}

/// A literal announced at the end of a line (RFC 3501 section 4.3, RFC 7888, RFC 3516 for the `~`, which needs no
/// special care: it stands before the brace).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Literal {
    /// Octets; a number beyond 64 bits is `u64::MAX`, which is beyond every limit.
    pub(super) size: u64,
    pub(super) synchronization: Synchronization,
}

/// Whether the sender of a literal waits to be invited.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Synchronization {
    /// `{n}`
    Synchronizing,
    /// `{n+}`, and `{n-}`, which some servers take for the same.
    NonSynchronizing,
}

impl Literal {
    /// The literal that the end of this line announces.
    ///
    /// Only the end of the line counts (RFC 7888 section 3). Quoted strings are not looked at: none can be open there.
    /// Whether a line that leaves one open announces a literal is for the backend to say, and we wait until it does.
    pub(super) fn announced_by(content: &[u8]) -> Option<Self> {
        let (inside, synchronization) = marker(content)?;
        let digits = digits_at_end(inside);
        let before = inside.len() - digits.len();
        let brace = inside.get(..before)?.last()?;
        if digits.is_empty() || *brace != b'{' {
            return None;
        }
        let size = digits.iter().try_fold(0_u64, |size, digit| {
            size.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
        });
        Some(Self {
            size: size.unwrap_or(u64::MAX),
            synchronization,
        })
    }
}

/// The line with a non-synchronizing marker at its end made a synchronizing one.
pub(super) fn with_synchronizing_marker(content: &[u8]) -> Vec<u8> {
    match marker(content) {
        Some((inside, Synchronization::NonSynchronizing)) => [inside, b"}"].concat(),
        _ => content.to_vec(),
    }
}

/// The line up to its marker's `}`, `+}` or `-}`.
fn marker(content: &[u8]) -> Option<(&[u8], Synchronization)> {
    let inside = content.strip_suffix(b"}")?;
    Some(match inside.split_last() {
        Some((b'+' | b'-', inside)) => (inside, Synchronization::NonSynchronizing),
        _ => (inside, Synchronization::Synchronizing),
    })
}

fn digits_at_end(bytes: &[u8]) -> &[u8] {
    let count = bytes
        .iter()
        .rev()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    bytes.get(bytes.len() - count..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(framer: &mut Framer, limit: usize) -> Vec<String> {
        let mut found = Vec::new();
        loop {
            match framer.take_line(limit) {
                Taken::Incomplete => return found,
                Taken::TooLong => {
                    found.push("too long".to_owned());
                    return found;
                }
                Taken::Line(line) => found.push(format!(
                    "{:?} {:?}",
                    String::from_utf8_lossy(&line.content),
                    line.end
                )),
            }
        }
    }

    #[test]
    fn lines_end_at_crlf_or_lf_and_nowhere_else() {
        let mut framer = Framer::default();
        framer.push(b"a\r\nb\nc\rd\r\n\r\r\n\n\r\nx\0y\r\nrest\r");
        assert_eq!(
            lines(&mut framer, 100),
            [
                r#""a" CrLf"#,
                r#""b" Lf"#,
                r#""c\rd" CrLf"#,
                r#""\r" CrLf"#,
                r#""" Lf"#,
                r#""" CrLf"#,
                r#""x\0y" CrLf"#
            ]
        );
        assert_eq!(framer.len(), 5);
        framer.push(b"\n");
        assert_eq!(lines(&mut framer, 100), [r#""rest" CrLf"#]);
        assert!(framer.is_empty());
    }

    #[test]
    fn the_line_limit_does_not_depend_on_the_cut() {
        for (input, expected) in [
            ("12345\n", vec![r#""12345" Lf"#]),
            ("1234\r\n", vec![r#""1234" CrLf"#]),
            ("123456\n", vec!["too long"]),
            ("12345\r\n", vec!["too long"]),
            ("123456", vec!["too long"]),
            ("12345", vec![]),
        ] {
            let mut whole = Framer::default();
            whole.push(input.as_bytes());
            assert_eq!(lines(&mut whole, 5), expected, "{input:?}");
            let mut pieces = Framer::default();
            let mut found = Vec::new();
            for byte in input.bytes() {
                pieces.push(&[byte]);
                found.extend(lines(&mut pieces, 5));
                if found.iter().any(|line| line == "too long") {
                    break;
                }
            }
            assert_eq!(found, expected, "{input:?}");
        }
    }

    #[test]
    fn octets_are_taken_without_looking_at_them() {
        let mut framer = Framer::default();
        framer.push(b"ab\r\ncd\r\nx");
        assert_eq!(framer.take(6), b"ab\r\ncd");
        framer.push(b"y\n");
        assert_eq!(lines(&mut framer, 9), [r#""" CrLf"#, r#""xy" Lf"#]);
        framer.push(b"z");
        assert_eq!(framer.take(u64::MAX), b"z");
        assert_eq!(framer.take(1), b"");
    }

    #[test]
    fn literals_are_told_by_the_end_of_the_line() {
        use Synchronization::{NonSynchronizing, Synchronizing};
        let sixty_digits = format!("a {{{}}}", "9".repeat(60));
        for (line, expected) in [
            ("a LOGIN {5}", Some((5, Synchronizing))),
            ("a LOGIN {5+}", Some((5, NonSynchronizing))),
            ("a LOGIN {5-}", Some((5, NonSynchronizing))),
            ("a LOGIN ~{5}", Some((5, Synchronizing))),
            ("a LOGIN x{005}", Some((5, Synchronizing))),
            ("{0}", Some((0, Synchronizing))),
            ("{4294967296}", Some((1 << 32, Synchronizing))),
            (
                "{18446744073709551614+}",
                Some((u64::MAX - 1, NonSynchronizing)),
            ),
            ("{18446744073709551616}", Some((u64::MAX, Synchronizing))),
            (sixty_digits.as_str(), Some((u64::MAX, Synchronizing))),
            ("a LOGIN {5} ", None),
            ("a LOGIN {5}\"", None),
            ("a LOGIN {}", None),
            ("a LOGIN {+}", None),
            ("a LOGIN {-5}", None),
            ("a LOGIN {+5}", None),
            ("a LOGIN { 5}", None),
            ("a LOGIN {5 }", None),
            ("a LOGIN {5++}", None),
            ("a LOGIN {0x5}", None),
            ("a LOGIN 5}", None),
            ("5}", None),
            ("}", None),
            ("+}", None),
            ("", None),
        ] {
            let found = Literal::announced_by(line.as_bytes());
            let found = found.map(|literal| (literal.size, literal.synchronization));
            assert_eq!(found, expected, "{line}");
        }
    }

    #[test]
    fn markers_become_synchronizing() {
        assert_eq!(with_synchronizing_marker(b"a ~{05+}"), b"a ~{05}");
        assert_eq!(with_synchronizing_marker(b"a {5-}"), b"a {5}");
        assert_eq!(with_synchronizing_marker(b"a {5}"), b"a {5}");
    }
}
