//! The connection to the client: commands come in, responses go out.

use std::io::{self, BufRead, BufWriter, ErrorKind, Read, StdinLock, StdoutLock, Write};

use super::syntax::{self, Argument, Parser};

/// RFC 7162 section 4 has clients send lines of up to 8192 octets.
const MAX_LINE: u64 = 64 * 1024;

/// A command as it was read.
pub(super) struct Command {
    pub(super) tag: String,
    /// The command's name and what follows it; `None` if that is malformed.
    pub(super) arguments: Option<Vec<Argument>>,
}

/// The client at the other end of stdin and stdout.
///
/// An end of file in the middle of something, or a limit passed, is an error of the kind `UnexpectedEof`.
pub(super) struct Client {
    input: StdinLock<'static>,
    output: BufWriter<StdoutLock<'static>>,
}

impl Client {
    pub(super) fn on_stdio() -> Self {
        Self {
            input: io::stdin().lock(),
            output: BufWriter::new(io::stdout().lock()),
        }
    }

    /// Sends what has been written so far, and reads a command with its literals.
    pub(super) fn read_command(&mut self, max_literal: usize) -> io::Result<Command> {
        loop {
            self.output.flush()?;
            let line = self.read_line()?;
            if let Some((tag, line)) = split_tag(&line) {
                return Ok(Command {
                    tag,
                    arguments: self.read_arguments(line, max_literal)?,
                });
            }
            self.untagged("BAD That is no command")?;
        }
    }

    /// Reads the rest of a command that begins with `line`.
    fn read_arguments(
        &mut self,
        line: &[u8],
        max_literal: usize,
    ) -> io::Result<Option<Vec<Argument>>> {
        let mut parser = Parser::new();
        let (text, mut announced) = syntax::split_announcement(line);
        let mut well_formed = parser.text(text).is_some();
        while let Some(literal) = announced {
            if literal.size > max_literal {
                self.untagged("BYE That literal is too large")?;
                self.output.flush()?;
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if literal.synchronizing {
                self.invite("Go on")?;
            }
            let mut octets = vec![0; literal.size];
            self.input.read_exact(&mut octets)?;
            let line = self.read_line()?;
            let text;
            (text, announced) = syntax::split_announcement(&line);
            well_formed &= parser
                .literal(octets)
                .and_then(|()| parser.text(text))
                .is_some();
        }
        Ok(parser.finish().filter(|_| well_formed))
    }

    /// Reads a line, without its end.
    pub(super) fn read_line(&mut self) -> io::Result<Vec<u8>> {
        let mut line = Vec::new();
        self.input
            .by_ref()
            .take(MAX_LINE)
            .read_until(b'\n', &mut line)?;
        let line = line.strip_suffix(b"\n").ok_or(ErrorKind::UnexpectedEof)?;
        Ok(line.strip_suffix(b"\r").unwrap_or(line).to_vec())
    }

    /// Sends a continuation request; the client waits for it.
    pub(super) fn invite(&mut self, text: &str) -> io::Result<()> {
        write!(self.output, "+ {text}\r\n")?;
        self.output.flush()
    }

    /// Writes a line that begins with a tag, or with `*`.
    pub(super) fn respond(&mut self, tag: &str, text: &str) -> io::Result<()> {
        write!(self.output, "{tag} {text}\r\n")
    }

    pub(super) fn untagged(&mut self, text: &str) -> io::Result<()> {
        self.respond("*", text)
    }

    /// Writes an untagged response that may hold a message.
    pub(super) fn untagged_octets(&mut self, octets: &[u8]) -> io::Result<()> {
        self.output.write_all(b"* ")?;
        self.output.write_all(octets)?;
        self.output.write_all(b"\r\n")
    }

    /// Sends what has been written so far.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

/// Splits the tag from a line. Only what is surely a tag is written back to the client.
fn split_tag(line: &[u8]) -> Option<(String, &[u8])> {
    let space = line.iter().position(|&octet| octet == b' ')?;
    let (tag, rest) = line.split_at(space);
    let legal = |octet: u8| octet.is_ascii_graphic() && !b"(){%*\"\\+".contains(&octet);
    let tag = std::str::from_utf8(tag).ok()?;
    (!tag.is_empty() && tag.bytes().all(legal)).then(|| (tag.into(), rest))
}
