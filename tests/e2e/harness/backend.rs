//! The scripted IMAP server: this test binary, started by the program as its backend, plays it on descriptors 0 and 1. It
//! writes all that it receives, and what it was started with, to a directory that the test reads.
//!
//! The normal scenario, `imap`, is a small IMAP4rev1 server (CAPABILITY, NOOP, ID, LOGIN, AUTHENTICATE PLAIN, SELECT, FETCH,
//! APPEND, IDLE, LOGOUT, literals with and without synchronization; user `u`, password `sekret`) that also obeys these commands, before and after
//! login, so that a test drives both ends from one place:
//!
//! | command | what it does |
//! | --- | --- |
//! | `XSINK n` | reads n bytes after the command line, answers `* XSINK <sha256>` and OK |
//! | `XSOURCE n` | answers OK, then sends n bytes of `Pattern::new(2)` |
//! | `XECHO` | OK, then sends back every byte until end of file, then exits with 0 |
//! | `XEXIT n`, `XSIGNAL n` | ends at once, without an answer, by exit status or by signal |
//! | `XGROUP n` | sends its process group the signal, itself too |
//! | `XLAST n` | sends n bytes of `Pattern::new(2)` and exits with 0 at once |
//! | `XSHUT` | OK, then shutdown of its sending direction; goes on reading |
//! | `XCLOSE` | OK, then closes descriptors 0 and 1 and lives on until released |
//! | `XGRANDCHILD n` | OK, leaves a child that holds its descriptors until released, and exits with status n |
//! | `XSTALL` | OK, then reads nothing until released |
//! | `XSTDERR text` | writes a line to descriptor 2, OK |
//! | `XSEND text` | sends the text (`\r`, `\n`, `\\` unescaped), then OK |

use super::client::{Pattern, hex, sha256};
use super::program::eventually;
use super::sys;
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The first argument that turns this binary into a backend.
pub const PLAY: &str = "--play-backend";

/// The capabilities that the normal scenario announces; STARTTLS is there to be taken out.
pub const CAPABILITIES: &str = "IMAP4rev1 STARTTLS AUTH=PLAIN LITERAL+ SASL-IR ID IDLE";

// ---- the test's side ----

/// A backend command for a `Program`.
#[derive(Clone, Debug)]
pub struct Backend {
    scenario: String,
    arguments: Vec<String>,
}

impl Backend {
    /// The normal small IMAP server.
    pub fn imap() -> Self {
        Self::scenario("imap", &[])
    }

    /// The normal server with another greeting line (without CRLF), such as `* PREAUTH welcome`.
    pub fn greeting(line: &str) -> Self {
        Self::scenario("imap", &["--greeting", line])
    }

    /// The normal server with other capabilities.
    pub fn capabilities(words: &str) -> Self {
        Self::scenario("imap", &["--capabilities", words])
    }

    /// A scenario by name; see `play_scenario` for all of them.
    pub fn scenario(name: &str, arguments: &[&str]) -> Self {
        Self {
            scenario: name.to_owned(),
            arguments: arguments
                .iter()
                .map(|&argument| argument.to_owned())
                .collect(),
        }
    }

    /// More arguments: `--ignore-eof` (lives on after end of file until released), `--stderr TEXT` (writes a line at start),
    /// `--no-record` (writes nothing to the record's directory, for runs of many thousand connections).
    pub fn with(mut self, arguments: &[&str]) -> Self {
        self.arguments
            .extend(arguments.iter().map(|&argument| argument.to_owned()));
        self
    }

    /// The command line, recording to `record`.
    pub fn command(&self, record: &Record) -> Vec<String> {
        let play = super::dir::run_path("play").display().to_string();
        let mut command = vec![
            play,
            PLAY.to_owned(),
            self.scenario.clone(),
            record.0.display().to_string(),
        ];
        command.extend(self.arguments.iter().cloned());
        command
    }
}

/// The directory that scripted backends write to.
#[derive(Clone, Debug)]
pub struct Record(pub PathBuf);

/// What one backend process recorded.
#[derive(Clone, Debug)]
pub struct Played {
    pub pid: i32,
    base: PathBuf,
}

impl Record {
    /// All backends that were started so far, in that order.
    pub fn backends(&self) -> Vec<Played> {
        let mut all: Vec<(u128, Played)> = Vec::new();
        for entry in fs::read_dir(&self.0).unwrap().flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "started")
            {
                let Ok(time) = fs::read_to_string(&path).unwrap_or_default().parse() else {
                    continue;
                };
                let pid = path.file_stem().unwrap().to_str().unwrap().parse().unwrap();
                all.push((
                    time,
                    Played {
                        pid,
                        base: path.with_extension(""),
                    },
                ));
            }
        }
        all.sort_by_key(|(time, _)| *time);
        all.into_iter().map(|(_, played)| played).collect()
    }

    /// Whether no backend was started at all.
    pub fn is_empty(&self) -> bool {
        self.backends().is_empty()
    }

    /// Waits for the backend number `index` (from 0) to have started.
    pub fn backend(&self, index: usize) -> Played {
        eventually("a backend starts", || self.backends().get(index).cloned())
    }

    /// Lets every scenario that waits for it go on or end.
    pub fn release(&self) {
        let _ = fs::write(self.0.join("release"), "");
    }
}

impl Played {
    fn file(&self, extension: &str) -> PathBuf {
        self.base.with_extension(extension)
    }

    /// Every byte that it has read so far.
    pub fn received(&self) -> Vec<u8> {
        fs::read(self.file("in")).unwrap_or_default()
    }

    /// The same as text.
    pub fn received_text(&self) -> String {
        String::from_utf8_lossy(&self.received()).into_owned()
    }

    /// Its environment.
    pub fn environment(&self) -> BTreeMap<String, String> {
        let bytes = fs::read(self.file("env")).unwrap();
        let entries = bytes
            .split(|byte| *byte == 0)
            .filter(|entry| !entry.is_empty());
        entries
            .map(|entry| String::from_utf8_lossy(entry).into_owned())
            .map(|entry| {
                entry
                    .split_once('=')
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .unwrap_or((entry, String::new()))
            })
            .collect()
    }

    /// Its descriptors when it was started: number -> what it is.
    pub fn descriptors(&self) -> BTreeMap<i32, String> {
        let text = fs::read_to_string(self.file("fds")).unwrap();
        text.lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(number, target)| (number.parse().unwrap(), target.to_owned()))
            .collect()
    }

    /// `/proc/self/status` from before its runtime started.
    pub fn status(&self) -> super::process::Status {
        super::process::Status::parse(&fs::read_to_string(self.file("status")).unwrap())
    }

    /// `/proc/self/limits`.
    pub fn limits(&self) -> String {
        fs::read_to_string(self.file("limits")).unwrap()
    }

    /// Why it stopped reading, once it did: `eof` or an error.
    pub fn end(&self) -> Option<String> {
        let text = fs::read_to_string(self.file("end")).ok()?;
        // It may be there and not written yet.
        Some(text).filter(|text| !text.is_empty())
    }

    /// Waits for the end of its input, behind what [`Client::send_line_to_stalled`](super::Client) sends; gives how many octets it read
    /// altogether.
    pub fn expect_line(&self, size: usize) -> usize {
        assert_eq!(self.wait_end(), "eof");
        let received = self.received();
        assert_eq!(received.iter().filter(|byte| **byte == b'y').count(), size);
        assert!(received.ends_with(b"y\r\n"));
        received.len()
    }

    /// Waits until it has read to the end of its input and says what it found there.
    pub fn wait_end(&self) -> String {
        eventually("the backend sees the end of its input", || self.end())
    }
}

// ---- the played side ----

/// Plays a backend: `--play-backend SCENARIO RECORD-DIR [ARGS]`.
pub fn play(arguments: &[String]) -> ExitCode {
    let (scenario, record, arguments) = (&arguments[0], Path::new(&arguments[1]), &arguments[2..]);
    let option = |name: &str| {
        arguments
            .iter()
            .position(|argument| argument == name)
            .map(|at| arguments[at + 1].clone())
    };
    let base = record.join(std::process::id().to_string());
    let is_recorded = !arguments.iter().any(|argument| argument == "--no-record");
    let mut player = Player {
        received: is_recorded.then(|| {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(base.with_extension("in"))
                .expect("the record directory")
        }),
        base,
        release: record.join("release"),
        input: File::from(sys::borrow(0).try_clone_to_owned().expect("descriptor 0")),
        output: File::from(sys::borrow(1).try_clone_to_owned().expect("descriptor 1")),
        buffered: Vec::new(),
        capabilities: option("--capabilities").unwrap_or_else(|| CAPABILITIES.to_owned()),
        messages: vec![b"Subject: t\r\n\r\nhello-body\r\n".to_vec()],
    };
    player.record_start();
    if let Some(text) = option("--stderr") {
        eprintln!("{text}");
    }
    let status = play_scenario(&mut player, scenario, arguments, option("--greeting"));
    if arguments.iter().any(|argument| argument == "--ignore-eof") {
        player.wait_for_release();
    }
    match status {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            // A client that is gone is nothing unusual for a server.
            player.note("error", &error.to_string());
            ExitCode::from(0)
        }
    }
}

fn play_scenario(
    player: &mut Player,
    scenario: &str,
    arguments: &[String],
    greeting: Option<String>,
) -> io::Result<u8> {
    let number = |default: usize| {
        arguments
            .first()
            .and_then(|argument| argument.parse().ok())
            .unwrap_or(default)
    };
    match scenario {
        "imap" => {
            let greeting = greeting.unwrap_or_else(|| {
                format!(
                    "* OK [CAPABILITY {}] scripted server ready",
                    player.capabilities
                )
            });
            player.send(format!("{greeting}\r\n"))?;
            player.serve()
        }
        // Says goodbye at once.
        "bye" => {
            player.send("* BYE scripted server is closed today\r\n")?;
            Ok(0)
        }
        // Writes nothing and reads to the end.
        "silent" => player.read_to_end(),
        // Half a greeting, then nothing; with the argument `exit` it also ends there.
        "half-line" => {
            player.send("* OK [CAPABILITY IMAP4re")?;
            if arguments.iter().any(|argument| argument == "exit") {
                Ok(0)
            } else {
                player.read_to_end()
            }
        }
        // `exit N`, `signal N`: at once, without a word.
        "exit" => Ok(u8::try_from(number(0)).unwrap()),
        "signal" => sys::die_by(i32::try_from(number(9)).unwrap()),
        // `huge-greeting BYTES`
        "huge-greeting" => {
            player.send(format!("* OK {}\r\n", "x".repeat(number(1 << 20))))?;
            player.serve()
        }
        // `raw TEXT`: writes the text (\r, \n, \\ unescaped), then reads to the end.
        "raw" => {
            player.send(unescape(&arguments[0]))?;
            player.read_to_end()
        }
        // `bytes N`: N bytes of Pattern::new(2), then exits.
        "bytes" => player.send_pattern(number(0) as u64).map(|()| 0),
        // `transcript FILE`: lines `S: text` are sent, `s: text` without line end, lines `C: text` must come; status 3 if something
        // else comes.
        "transcript" => {
            for line in fs::read_to_string(&arguments[0])?.lines() {
                if let Some(text) = line.strip_prefix("S: ") {
                    player.send(format!("{}\r\n", unescape(text)))?;
                } else if let Some(text) = line.strip_prefix("s: ") {
                    player.send(unescape(text))?;
                } else if let Some(text) = line.strip_prefix("C: ") {
                    let wanted = format!("{}\r\n", unescape(text));
                    if player.line()?.as_deref() != Some(wanted.as_bytes()) {
                        return Ok(3);
                    }
                }
            }
            player.read_to_end()
        }
        // What XGRANDCHILD leaves behind.
        "hold" => {
            player.wait_for_release();
            Ok(0)
        }
        other => panic!("no scenario {other:?}"),
    }
}

struct Player {
    base: PathBuf,
    release: PathBuf,
    /// `None`: nothing is recorded.
    received: Option<File>,
    input: File,
    output: File,
    buffered: Vec<u8>,
    capabilities: String,
    messages: Vec<Vec<u8>>,
}

impl Player {
    fn note(&self, extension: &str, text: &str) {
        if self.received.is_some() {
            let _ = fs::write(self.base.with_extension(extension), text);
        }
    }

    fn record_start(&self) {
        if self.received.is_none() {
            return;
        }
        let start = sys::AT_START.get().expect("taken before main");
        let write = |extension: &str, contents: &[u8]| {
            fs::write(self.base.with_extension(extension), contents).unwrap()
        };
        write("status", &start.status);
        write("fds", start.descriptors.as_bytes());
        write("env", &fs::read("/proc/self/environ").unwrap());
        write("limits", &fs::read("/proc/self/limits").unwrap());
        let time = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_nanos()
            .to_string();
        write("starting", time.as_bytes());
        fs::rename(
            self.base.with_extension("starting"),
            self.base.with_extension("started"),
        )
        .unwrap();
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.output.write_all(bytes.as_ref())
    }

    fn send_pattern(&mut self, size: u64) -> io::Result<()> {
        let mut pattern = Pattern::new(2);
        let mut left = size;
        while left > 0 {
            let piece = left.min(64 << 10);
            self.output.write_all(&pattern.take(piece as usize))?;
            left -= piece;
        }
        Ok(())
    }

    /// Reads some bytes and records them (bulk is not kept: `keep` says); false at the end.
    fn read_some(&mut self, keep: bool) -> io::Result<bool> {
        let mut piece = vec![0; 64 << 10];
        match self.input.read(&mut piece) {
            Ok(0) => {
                self.note("end", "eof");
                Ok(false)
            }
            Ok(size) => {
                if let (true, Some(received)) = (keep, &mut self.received) {
                    received.write_all(&piece[..size])?;
                }
                self.buffered.extend_from_slice(&piece[..size]);
                Ok(true)
            }
            Err(error) => {
                self.note("end", &error.to_string());
                Err(error)
            }
        }
    }

    fn read_to_end(&mut self) -> io::Result<u8> {
        while self.read_some(true)? {
            self.buffered.clear();
        }
        Ok(0)
    }

    /// The next line with its end, or nothing at end of file.
    fn line(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(at) = self.buffered.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.buffered.drain(..=at).collect()));
            }
            if !self.read_some(true)? {
                return Ok(None);
            }
        }
    }

    fn exact(&mut self, size: usize) -> io::Result<Vec<u8>> {
        while self.buffered.len() < size {
            if !self.read_some(true)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(self.buffered.drain(..size).collect())
    }

    /// One command as words: atoms, quoted strings without quotes, literals.
    fn command(&mut self) -> io::Result<Option<Vec<Vec<u8>>>> {
        let mut words = Vec::new();
        loop {
            let Some(line) = self.line()? else {
                return Ok(None);
            };
            let line = line.strip_suffix(b"\n").unwrap_or(&line);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            split_words(line, &mut words);
            let Some((size, invite)) = words.last().and_then(|word| literal(word)) else {
                return Ok(Some(words));
            };
            if invite {
                self.send("+ go ahead\r\n")?;
            }
            words.pop();
            let value = self.exact(size)?;
            words.push(value);
        }
    }

    /// The IMAP server, from after the greeting to end of file or LOGOUT.
    fn serve(&mut self) -> io::Result<u8> {
        let mut selected = false;
        while let Some(words) = self.command()? {
            let text: Vec<String> = words
                .iter()
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect();
            let tag = text.first().cloned().unwrap_or_default();
            let name = text
                .get(1)
                .map(|name| name.to_ascii_uppercase())
                .unwrap_or_default();
            let argument = |index: usize| text.get(index + 2).cloned().unwrap_or_default();
            let number = |index: usize| argument(index).parse::<u64>().unwrap_or(0);
            let ok = format!("{tag} OK {name} done\r\n");
            match name.as_str() {
                "CAPABILITY" => self.send(format!("* CAPABILITY {}\r\n{ok}", self.capabilities))?,
                "NOOP" | "CREATE" | "CHECK" | "CLOSE" | "SUBSCRIBE" => self.send(ok)?,
                "ID" => self.send(format!("* ID NIL\r\n{ok}"))?,
                "LOGIN" if argument(0) == "u" && argument(1) == "sekret" => self.send(format!(
                    "{tag} OK [CAPABILITY {}] logged in\r\n",
                    self.capabilities
                ))?,
                "LOGIN" => self.send(format!("{tag} NO [AUTHENTICATIONFAILED] wrong\r\n"))?,
                "AUTHENTICATE" => {
                    let response = if argument(1).is_empty() {
                        self.send("+ \r\n")?;
                        let Some(line) = self.line()? else {
                            return Ok(0);
                        };
                        String::from_utf8_lossy(&line).trim_end().to_owned()
                    } else {
                        argument(1)
                    };
                    // The base64 of NUL u NUL sekret.
                    match response.as_str() {
                        "AHUAc2VrcmV0" => self.send(ok)?,
                        "*" => self.send(format!("{tag} BAD aborted\r\n"))?,
                        _ => self.send(format!("{tag} NO [AUTHENTICATIONFAILED] wrong\r\n"))?,
                    }
                }
                "SELECT" | "EXAMINE" => {
                    selected = true;
                    self.send(format!("* {} EXISTS\r\n* 0 RECENT\r\n* FLAGS (\\Seen)\r\n* OK [UIDVALIDITY 1]\r\n{tag} OK [READ-WRITE] selected\r\n", self.messages.len()))?;
                }
                "LIST" | "LSUB" => self.send(format!("* {name} () \"/\" INBOX\r\n{ok}"))?,
                "FETCH" if selected => self.fetch(&argument(0), &ok)?,
                "APPEND" => {
                    self.messages.push(words.last().unwrap().clone());
                    self.send(ok)?;
                }
                "IDLE" => {
                    self.send("+ idling\r\n")?;
                    let done = self.line()?;
                    self.send(
                        if done.is_some_and(|line| line.to_ascii_uppercase().starts_with(b"DONE")) {
                            ok
                        } else {
                            format!("{tag} BAD not DONE\r\n")
                        },
                    )?;
                }
                "LOGOUT" => {
                    self.send(format!("* BYE\r\n{ok}"))?;
                    return Ok(0);
                }
                "XSINK" => {
                    let hash = self.sink(number(0))?;
                    self.send(format!("* XSINK {hash}\r\n{ok}"))?;
                }
                "XSOURCE" => {
                    self.send(ok)?;
                    self.send_pattern(number(0))?;
                }
                "XLAST" => {
                    self.send_pattern(number(0))?;
                    return Ok(0);
                }
                "XECHO" => {
                    self.send(ok)?;
                    loop {
                        let bytes = std::mem::take(&mut self.buffered);
                        self.send(bytes)?;
                        if !self.read_some(false)? {
                            return Ok(0);
                        }
                    }
                }
                "XEXIT" => return Ok(u8::try_from(number(0)).unwrap()),
                "XSIGNAL" => sys::die_by(i32::try_from(number(0)).unwrap()),
                "XGROUP" => {
                    // The group of whoever calls.
                    let _ = sys::kill(0, i32::try_from(number(0)).unwrap());
                }
                "XSHUT" => {
                    self.send(ok)?;
                    sys::shutdown_write(1);
                    return self.read_to_end();
                }
                "XCLOSE" => {
                    self.send(ok)?;
                    self.close();
                    self.wait_for_release();
                    return Ok(0);
                }
                "XGRANDCHILD" => {
                    self.send(ok)?;
                    let record = self.base.parent().unwrap();
                    let mut command = Command::new(std::env::current_exe()?);
                    command
                        .args([PLAY, "hold"])
                        .arg(record)
                        .stdin(Stdio::inherit())
                        .stdout(Stdio::inherit());
                    let child = command.spawn()?;
                    let holder = record.join(format!("{}.started", child.id()));
                    while !holder.exists() {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    return Ok(u8::try_from(number(0)).unwrap());
                }
                "XSTALL" => {
                    self.send(ok)?;
                    self.wait_for_release();
                }
                "XSTDERR" => {
                    eprintln!("{}", text[2..].join(" "));
                    self.send(ok)?;
                }
                "XSEND" => self.send(format!("{}{ok}", unescape(&text[2..].join(" "))))?,
                "" => self.send("* BAD empty\r\n")?,
                _ => self.send(format!("{tag} BAD unknown command\r\n"))?,
            }
        }
        Ok(0)
    }

    fn fetch(&mut self, which: &str, ok: &str) -> io::Result<()> {
        let Some(message) = which
            .parse::<usize>()
            .ok()
            .and_then(|number| self.messages.get(number.wrapping_sub(1)))
            .cloned()
        else {
            return self.send(ok.replace(" OK ", " NO "));
        };
        self.send(format!("* {which} FETCH (BODY[] {{{}}}\r\n", message.len()))?;
        self.send(&message)?;
        self.send(format!(")\r\n{ok}"))
    }

    /// Reads exactly this many bytes and returns their SHA-256.
    fn sink(&mut self, size: u64) -> io::Result<String> {
        let mut hash = sha256();
        let mut left = size;
        loop {
            let taken = self
                .buffered
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            hash.update(&self.buffered[..taken]);
            self.buffered.drain(..taken);
            left -= taken as u64;
            if left == 0 {
                return Ok(hex(hash.finish().as_ref()));
            }
            if !self.read_some(false)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Gives up both directions: the descriptors 0 and 1 and the copies used here.
    fn close(&mut self) {
        self.input = File::open("/dev/null").unwrap();
        self.output = OpenOptions::new().write(true).open("/dev/null").unwrap();
        sys::close(0);
        sys::close(1);
    }

    /// Until the test calls [`Record::release`], or its directory is gone, or much too long.
    fn wait_for_release(&self) {
        let give_up = Instant::now() + Duration::from_secs(120);
        while !self.release.exists()
            && self.release.parent().unwrap().exists()
            && Instant::now() < give_up
        {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Splits at spaces; a quoted string is one word without its quotes.
fn split_words(line: &[u8], words: &mut Vec<Vec<u8>>) {
    let mut rest = line;
    loop {
        while let Some(next) = rest.strip_prefix(b" ") {
            rest = next;
        }
        if rest.is_empty() {
            return;
        }
        let size = if rest[0] == b'"' {
            let close = rest[1..]
                .iter()
                .position(|byte| *byte == b'"')
                .map_or(rest.len(), |at| at + 2);
            words.push(rest[1..close - 1].to_vec());
            close
        } else {
            let size = rest
                .iter()
                .position(|byte| *byte == b' ')
                .unwrap_or(rest.len());
            words.push(rest[..size].to_vec());
            size
        };
        rest = &rest[size..];
    }
}

/// `{12}` -> (12, true), `{12+}` -> (12, false): whether it must be invited.
fn literal(word: &[u8]) -> Option<(usize, bool)> {
    let inner = std::str::from_utf8(word)
        .ok()?
        .strip_prefix('{')?
        .strip_suffix('}')?;
    match inner.strip_suffix(['+', '-']) {
        Some(digits) => Some((digits.parse().ok()?, false)),
        None => Some((inner.parse().ok()?, true)),
    }
}

fn unescape(text: &str) -> String {
    text.replace("\\r", "\r")
        .replace("\\n", "\n")
        .replace("\\\\", "\\")
}
