//! What a client may write (RFC 3501 section 9, as much of it as the backend needs): words, lists and sets of numbers.

/// An argument: an atom, a quoted string or a literal, all alike here; or a parenthesised list.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Argument {
    List(Vec<Argument>),
    Word(Vec<u8>),
}

impl Argument {
    /// The word as text; `None` for a list and for what is not UTF-8.
    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Word(bytes) => std::str::from_utf8(bytes).ok(),
            Self::List(_) => None,
        }
    }

    /// The words of a list, or the word itself as a list of one.
    pub(super) fn texts(&self) -> Option<Vec<&str>> {
        match self {
            Self::List(members) => members.iter().map(Self::text).collect(),
            Self::Word(_) => self.text().map(|text| vec![text]),
        }
    }
}

/// Lists within lists that are followed. No command of this backend has more than two.
const MAX_DEPTH: usize = 4;

/// Builds a command's arguments from its pieces: text, literal, text, ...
pub(super) struct Parser {
    /// The lists that are open, outermost first. The first one, which is always there, is the command itself.
    open: Vec<Vec<Argument>>,
}

impl Parser {
    pub(super) fn new() -> Self {
        Self {
            open: vec![Vec::new()],
        }
    }

    /// Takes a piece of a line that has no literal in it. `None`: malformed.
    pub(super) fn text(&mut self, line: &[u8]) -> Option<()> {
        let mut rest = line;
        while let Some((&first, after)) = rest.split_first() {
            rest = match first {
                b' ' => after,
                b'(' if self.open.len() < MAX_DEPTH => {
                    self.open.push(Vec::new());
                    after
                }
                b')' if self.open.len() > 1 => {
                    let list = self.open.pop()?;
                    self.open.last_mut()?.push(Argument::List(list));
                    after
                }
                b'"' => self.quoted(after)?,
                b'(' | b')' => return None,
                _ => self.atom(rest)?,
            };
        }
        Some(())
    }

    /// Takes the octets of a literal.
    pub(super) fn literal(&mut self, octets: Vec<u8>) -> Option<()> {
        self.open.last_mut()?.push(Argument::Word(octets));
        Some(())
    }

    /// The arguments, if every list is closed.
    pub(super) fn finish(mut self) -> Option<Vec<Argument>> {
        let command = self.open.pop()?;
        self.open.is_empty().then_some(command)
    }

    /// Reads on after the opening quote; gives what follows the closing one.
    fn quoted<'a>(&mut self, mut rest: &'a [u8]) -> Option<&'a [u8]> {
        let mut word = Vec::new();
        loop {
            let (&octet, after) = rest.split_first()?;
            rest = after;
            match octet {
                b'"' => break,
                b'\\' => {
                    let (&escaped, after) = rest.split_first()?;
                    word.push(escaped);
                    rest = after;
                }
                _ => word.push(octet),
            }
        }
        self.open.last_mut()?.push(Argument::Word(word));
        Some(rest)
    }

    /// Reads an atom. Spaces and parentheses between `[` and `]` belong to it: `BODY[HEADER.FIELDS (FROM TO)]<0.80>`.
    fn atom<'a>(&mut self, rest: &'a [u8]) -> Option<&'a [u8]> {
        let mut in_brackets = false;
        let end = rest.iter().position(|octet| {
            match octet {
                b'[' => in_brackets = true,
                b']' => in_brackets = false,
                _ => {}
            }
            !in_brackets && matches!(octet, b' ' | b'(' | b')' | b'"')
        });
        let (word, rest) = rest.split_at(end.unwrap_or(rest.len()));
        self.open.last_mut()?.push(Argument::Word(word.to_vec()));
        Some(rest)
    }
}

/// The literal that a line announces at its end: `{12}`, or `{12+}` when the client does not wait to be invited.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Announced {
    pub(super) size: usize,
    pub(super) synchronizing: bool,
}

/// Splits the announcement of a literal from the end of a line.
pub(super) fn split_announcement(line: &[u8]) -> (&[u8], Option<Announced>) {
    let announced = || {
        let inner = line.strip_suffix(b"}")?;
        let start = inner.iter().rposition(|&octet| octet == b'{')?;
        let (before, digits) = (inner.get(..start)?, inner.get(start + 1..)?);
        let (digits, synchronizing) = match digits.strip_suffix(b"+") {
            Some(digits) => (digits, false),
            None => (digits, true),
        };
        let size = std::str::from_utf8(digits).ok()?.parse().ok()?;
        Some((
            before,
            Announced {
                size,
                synchronizing,
            },
        ))
    };
    match announced() {
        Some((before, announced)) => (before, Some(announced)),
        None => (line, None),
    }
}

/// A set of message numbers or UIDs, such as `1,3:5,7:*`.
#[derive(Debug)]
pub(super) struct NumberSet(Vec<(u32, u32)>);

impl NumberSet {
    /// `largest` is what `*` stands for.
    pub(super) fn parse(text: &str, largest: u32) -> Option<Self> {
        let number = |text: &str| match text {
            "*" => Some(largest),
            _ => text.parse().ok().filter(|&number| number > 0),
        };
        let range = |text: &str| {
            let (from, to) = text.split_once(':').unwrap_or((text, text));
            let (from, to) = (number(from)?, number(to)?);
            Some((from.min(to), from.max(to)))
        };
        text.split(',').map(range).collect::<Option<_>>().map(Self)
    }

    pub(super) fn contains(&self, number: u32) -> bool {
        self.0
            .iter()
            .any(|&(from, to)| (from..=to).contains(&number))
    }
}

/// Decodes base64 with its padding (RFC 4648 section 4).
pub(super) fn decode_base64(text: &[u8]) -> Option<Vec<u8>> {
    if text.len() % 4 != 0 {
        return None;
    }
    let padding = text
        .iter()
        .rev()
        .take_while(|&&octet| octet == b'=')
        .count();
    let digits = text.get(..text.len() - padding.min(2))?;
    let mut decoded = Vec::new();
    for quantum in digits.chunks(4) {
        let mut bits = 0_u32;
        for &digit in quantum {
            bits = bits << 6 | base64_digit(digit)?;
        }
        bits <<= 6 * (4 - quantum.len());
        let [_, octets @ ..] = bits.to_be_bytes();
        decoded.extend(octets.into_iter().take(quantum.len() * 6 / 8));
    }
    Some(decoded)
}

fn base64_digit(digit: u8) -> Option<u32> {
    let value = match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(u32::from(value))
}
