//! Well-behaved clients: each has to succeed, and to get back what it sent.

use super::places::{Kind, Place};
use super::{Dice, Soak, somebody};
use crate::harness::client::{Pattern, hex, pattern_hash, sha256};
use crate::harness::*;
use crate::interop::{ca, without_added_headers};
use rustls::HandshakeKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A machine that others use too may be slow.
const PATIENCE: Duration = Duration::from_secs(60);

/// All kinds that there are.
pub const KINDS: &[&str] = &[
    "rustls",
    "curl",
    "gnutls-cli",
    "imaplib",
    "mbsync",
    "s_client",
    "late: in time",
    "late: too late",
    "idle",
];

/// A connection of a client that the harness plays.
struct Visit {
    client: Client,
    address: SocketAddr,
    began: Instant,
    /// When it no longer needed a keeper: in TLS 1.3 that is after the client is through, since there are tickets to be sealed.
    without_keeper_from: Option<Instant>,
    is_in_tls: bool,
}

impl Visit {
    fn pay(soak: &Soak, place: &Place, dice: &mut Dice, may_be_killed: bool) -> Self {
        let began = Instant::now();
        let socket = place.server.connect_socket_from(somebody(dice));
        let address = socket.local_addr().unwrap();
        if may_be_killed {
            soak.may_be_killed(address);
        }
        let mut client = Client::on(socket);
        client.patience = PATIENCE;
        Self {
            client,
            address,
            began,
            without_keeper_from: None,
            is_in_tls: false,
        }
    }

    /// Notes how it went.
    fn end(self, soak: &Soak, place: &Place, kind: &str, result: Result<(), String>) {
        let (address, began, secure) = (self.address, self.began, self.without_keeper_from);
        drop(self);
        let killed = soak.was_killed(address);
        let Err(error) = result else {
            soak.count(format!("client: {kind}"));
            return;
        };
        if let Some(role) = killed {
            soak.count(format!("ended: with its {role}"));
        } else if place.had_no_keeper(began, secure.unwrap_or_else(Instant::now)) {
            soak.count("ended: without a keeper");
        } else {
            let text = format!("{kind} {address} at {}: {error}", place.name);
            soak.fail_since(began, text);
        }
    }

    /// To the authenticated state, in clear or in TLS.
    fn begin(
        &mut self,
        soak: &Soak,
        place: &Place,
        dice: &mut Dice,
        user: &str,
    ) -> Result<(), String> {
        self.secure(soak, place, dice, false)?;
        self.log_in(place, dice, user)
    }

    /// To the end of the handshake, if there is to be one.
    fn secure(
        &mut self,
        soak: &Soak,
        place: &Place,
        dice: &mut Dice,
        always: bool,
    ) -> Result<(), String> {
        let client = &mut self.client;
        client.try_send_raw(&place.introduction(dice));
        let config = dice.pick(&place.configs);
        if place.policy == "implicit" {
            client
                .handshake_by(config)
                .map_err(|error| format!("handshake: {error}"))?;
            client.try_greeting()?;
        } else {
            client.try_greeting()?;
            for _ in 0..dice.below(3) {
                let command = *dice.pick(&["CAPABILITY", "NOOP"]);
                ask(client, command)?;
            }
            if place.policy == "optional" && !always && dice.percent(30) {
                soak.count("session: in clear");
                return Ok(());
            }
            ask(client, "STARTTLS")?;
            client
                .handshake_by(config)
                .map_err(|error| format!("handshake: {error}"))?;
        }
        self.is_in_tls = true;
        let is_resumed = self.client.tls().handshake_kind() == Some(HandshakeKind::Resumed);
        soak.count(if is_resumed {
            "session: resumed"
        } else {
            "session: full handshake"
        });
        Ok(())
    }

    fn log_in(&mut self, place: &Place, dice: &mut Dice, user: &str) -> Result<(), String> {
        let (user, password) = place.user(user);
        let client = &mut self.client;
        match (place.kind, dice.below(3)) {
            (Kind::Scripted, 0) => drop(ask(client, "AUTHENTICATE PLAIN AHUAc2VrcmV0")?),
            (Kind::Scripted, 1) => drop(ask(client, "LOGIN {1+}\r\nu {6+}\r\nsekret")?),
            _ => drop(ask(client, &format!("LOGIN {user} {password}"))?),
        }
        self.without_keeper_from = Some(Instant::now());
        Ok(())
    }

    /// LOGOUT, or less polite.
    fn leave(&mut self, dice: &mut Dice) -> Result<(), String> {
        let client = &mut self.client;
        if dice.percent(20) {
            return Ok(());
        }
        ask(client, "LOGOUT")?;
        self.expect_end()
    }

    fn expect_end(&mut self) -> Result<(), String> {
        let wanted = if self.is_in_tls {
            End::CloseNotify
        } else {
            End::Eof
        };
        match self.client.read_to_end() {
            (rest, end) if rest.is_empty() && end == wanted => Ok(()),
            (rest, end) => Err(format!("{wanted:?} expected, not {end:?} after {rest:?}")),
        }
    }
}

/// Sends a command, with a tag of its own, and gives the lines of the answer, which must be OK.
fn ask(client: &mut Client, command: &str) -> Result<Vec<String>, String> {
    let tag = format!("s{}", next_number());
    client.try_send(format!("{tag} {command}\r\n").as_bytes());
    hear(client, &tag).map_err(|error| format!("{command}: {error}"))
}

fn hear(client: &mut Client, tag: &str) -> Result<Vec<String>, String> {
    let mut lines = Vec::new();
    loop {
        let line = line(client)?;
        let status = line.strip_prefix(tag).map(str::to_owned);
        lines.push(line);
        match status {
            Some(status) if status.starts_with(" OK") => return Ok(lines),
            Some(status) if status.starts_with(' ') => return Err(lines.join("\n")),
            _ => {}
        }
    }
}

fn line(client: &mut Client) -> Result<String, String> {
    client.line_or_end().map_err(|end| format!("{end:?}"))
}

fn exact(client: &mut Client, size: usize) -> Result<Vec<u8>, String> {
    client
        .exact_or_end(size)
        .map_err(|end| format!("{end:?} within {size} bytes"))
}

/// How many messages there are.
fn select(client: &mut Client) -> Result<usize, String> {
    let lines = ask(client, "SELECT INBOX")?;
    let count = lines.iter().find_map(|line| {
        line.strip_prefix("* ")?
            .strip_suffix(" EXISTS")?
            .parse()
            .ok()
    });
    count.ok_or_else(|| format!("no EXISTS in {lines:?}"))
}

fn append(client: &mut Client, message: &[u8]) -> Result<(), String> {
    let tag = format!("s{}", next_number());
    client.try_send(format!("{tag} APPEND INBOX {{{}}}\r\n", message.len()).as_bytes());
    loop {
        let line = line(client)?;
        if line.starts_with('+') {
            break;
        }
        if !line.starts_with("* ") {
            return Err(format!("APPEND: {line}"));
        }
    }
    client.try_send(message);
    client.try_send(b"\r\n");
    hear(client, &tag)
        .map(drop)
        .map_err(|error| format!("APPEND: {error}"))
}

fn fetch(client: &mut Client, number: usize) -> Result<Vec<u8>, String> {
    let tag = format!("s{}", next_number());
    client.try_send(format!("{tag} FETCH {number} BODY[]\r\n").as_bytes());
    let size = loop {
        let line = line(client)?;
        if let Some((_, size)) = line
            .strip_suffix('}')
            .and_then(|line| line.rsplit_once('{'))
        {
            break size.parse().map_err(|_| line.clone())?;
        }
        if !line.starts_with("* ") {
            return Err(format!("FETCH: {line}"));
        }
    };
    let body = exact(client, size)?;
    hear(client, &tag)?;
    Ok(body)
}

/// An empty mailbox, whatever somebody left who was killed.
fn wipe(client: &mut Client) -> Result<(), String> {
    if select(client)? > 0 {
        ask(client, "STORE 1:* +FLAGS.SILENT (\\Deleted)")?;
        ask(client, "EXPUNGE")?;
    }
    Ok(())
}

/// A message that no server changes: CRLF lines, none of which looks like a mailbox's "From " or starts with a dot, and some body
/// (imap4d adds a line where there is none).
fn message(dice: &mut Dice) -> Vec<u8> {
    let size = dice.size(18);
    let number = dice.roll();
    let mut message =
        format!("From: b@example.org\r\nTo: u@example.org\r\nSubject: soak\r\nMessage-ID: <{number}@example.org>\r\n\r\n").into_bytes();
    let mut pattern = Pattern::new(number);
    loop {
        message.extend_from_slice(hex(&pattern.take(36)).as_bytes());
        message.extend_from_slice(b"\r\n");
        if message.len() >= size {
            return message;
        }
    }
}

fn same(got: &[u8], wanted: &[u8]) -> Result<(), String> {
    if got == wanted {
        return Ok(());
    }
    let same = got
        .iter()
        .zip(wanted)
        .take_while(|(one, other)| one == other)
        .count();
    Err(format!(
        "WRONG BYTES: {} instead of {}, the same up to {same}",
        got.len(),
        wanted.len()
    ))
}

/// A message appended and fetched; with the mailbox as it was before.
fn append_and_fetch(
    soak: &Soak,
    place: &Place,
    dice: &mut Dice,
    client: &mut Client,
) -> Result<(), String> {
    let message = message(dice);
    let before = match place.kind {
        Kind::Dovecot => wipe(client).map(|()| 0)?,
        _ => select(client)?,
    };
    append(client, &message)?;
    let mut count = before + 1;
    for line in ask(client, "NOOP")? {
        let exists = line
            .strip_prefix("* ")
            .and_then(|line| line.strip_suffix(" EXISTS"));
        count = exists.and_then(|count| count.parse().ok()).unwrap_or(count);
    }
    if place.kind == Kind::Scripted {
        // It does not tell.
        count = select(client)?;
    }
    let back = fetch(client, count)?;
    same(&without_added_headers(&back), &message)?;
    soak.carried(message.len(), back.len());
    if place.kind != Kind::Scripted {
        ask(client, &format!("STORE {count} +FLAGS.SILENT (\\Deleted)"))?;
        ask(client, "EXPUNGE")?;
    }
    Ok(())
}

/// What only the scripted server knows: bulk in one direction or in both.
fn bulk(soak: &Soak, dice: &mut Dice, visit: &mut Visit) -> Result<bool, String> {
    let client = &mut visit.client;
    let size = if dice.percent(3) {
        dice.between(1 << 20, 4 << 20)
    } else {
        dice.size(18)
    };
    match dice.below(4) {
        0 => {
            let bytes = dice.bytes(size);
            let tag = format!("s{}", next_number());
            client.try_send(format!("{tag} XSINK {size}\r\n").as_bytes());
            client.try_send(&bytes);
            let lines = hear(client, &tag)?;
            let mut hash = sha256();
            hash.update(&bytes);
            let wanted = format!("* XSINK {}", hex(hash.finish().as_ref()));
            if lines[0] != wanted {
                return Err(format!("WRONG BYTES up: {} instead of {wanted}", lines[0]));
            }
            soak.carried(size, 0);
        }
        1 => {
            ask(client, &format!("XSOURCE {size}"))?;
            let bytes = exact(client, size)?;
            let mut hash = sha256();
            hash.update(&bytes);
            if hex(hash.finish().as_ref()) != pattern_hash(2, size as u64) {
                return Err("WRONG BYTES down".to_owned());
            }
            soak.carried(0, size);
        }
        2 => {
            let tags: Vec<_> = (0..dice.between(2, 40))
                .map(|_| format!("s{}", next_number()))
                .collect();
            let commands: String = tags.iter().map(|tag| format!("{tag} NOOP\r\n")).collect();
            client.try_send(commands.as_bytes());
            for tag in tags {
                hear(client, &tag)?;
            }
        }
        _ => {
            ask(client, "XECHO")?;
            let bytes = dice.bytes(size);
            client.try_send(&bytes);
            same(&exact(client, size)?, &bytes)?;
            soak.carried(size, size);
            if visit.is_in_tls {
                client.close_notify();
            } else {
                client.shutdown();
            }
            visit.expect_end()?;
            return Ok(false);
        }
    }
    Ok(true)
}

/// One session of the harness's client at any server.
pub fn visit_somewhere(soak: &Soak, dice: &mut Dice, user: &str) {
    let place = dice.pick(&soak.places);
    let _turn = (place.kind == Kind::Mailutils).then(|| {
        place
            .turn
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    });
    // Whoever comes next to the one mailbox needs it without the locks of somebody killed.
    let mut visit = Visit::pay(soak, place, dice, place.kind != Kind::Mailutils);
    let result = soak.guarded("rustls", || {
        visit.begin(soak, place, dice, user)?;
        for _ in 0..dice.below(4) {
            if place.kind == Kind::Scripted && dice.percent(70) {
                if !bulk(soak, dice, &mut visit)? {
                    return Ok(());
                }
            } else {
                append_and_fetch(soak, place, dice, &mut visit.client)?;
            }
        }
        visit.leave(dice)
    });
    visit.end(soak, place, "rustls", result);
}

// ---- other programs ----

/// A place from which other programs are run, one after the other.
pub struct Desk {
    dir: PathBuf,
    user: String,
    next: usize,
}

type Run = fn(&mut Desk, &Soak, &Place, &mut Dice) -> Result<(), String>;

impl Desk {
    pub fn new(soak: &Soak, number: usize) -> Self {
        let dir = soak.test.path(&format!("desk{number}"));
        make_dir(&dir, 0o755);
        Self {
            dir,
            user: format!("tool{number}"),
            next: number,
        }
    }

    /// One run of the next program, at any server that it can talk to.
    pub fn visit_somewhere(&mut self, soak: &Soak, dice: &mut Dice) {
        const ALL: &[Kind] = &[Kind::Scripted, Kind::Dovecot, Kind::Mailutils];
        const MAILBOX: &[Kind] = &[Kind::Dovecot, Kind::Mailutils];
        let programs: [(&str, &[Kind], Run); 5] = [
            ("curl", MAILBOX, Desk::curl),
            ("imaplib", ALL, Desk::imaplib),
            ("mbsync", &[Kind::Dovecot], Desk::mbsync),
            ("s_client", ALL, Desk::s_client),
            ("gnutls-cli", ALL, Desk::gnutls_cli),
        ];
        let (name, kinds, run) = programs[self.next % programs.len()];
        self.next += 1;
        let places: Vec<&Place> = soak
            .places
            .iter()
            .filter(|place| kinds.contains(&place.kind) && !place.has_balancer)
            .collect();
        let place = *dice.pick(&places);
        let _turn = (place.kind == Kind::Mailutils).then(|| {
            place
                .turn
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
        });
        let began = Instant::now();
        match soak.guarded(name, || run(self, soak, place, dice)) {
            Ok(()) => soak.count(format!("client: {name}")),
            Err(_) if place.had_no_keeper(began, Instant::now()) => {
                soak.count("ended: without a keeper");
            }
            Err(error) => soak.fail_since(began, format!("{name} at {}: {error}", place.name)),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn tool(&self, soak: &Soak, name: &str) -> Tool {
        Tool::new(soak.test, name).patience(Duration::from_secs(120))
    }

    fn curl(&mut self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let scheme = if place.policy == "implicit" {
            "imaps"
        } else {
            "imap"
        };
        let url = |rest: &str| format!("{scheme}://localhost:{}/{rest}", place.server.port);
        let (user, password) = place.user(&self.user);
        let account = format!("{user}:{password}");
        let run = |arguments: &[&str]| {
            let tool = self.tool(soak, "curl");
            let tool = tool.args(["-sS", "--ssl-reqd", "--cacert", &ca(), "-u", &account]);
            succeeded(
                tool.args(["--login-options", "AUTH=PLAIN"])
                    .args(arguments)
                    .run(),
            )
        };
        if place.kind == Kind::Mailutils {
            let text = run(&[&url("INBOX;MAILINDEX=1")])?;
            let is_there = sys::contains(&text, b"hello-body");
            return is_there
                .then_some(())
                .ok_or_else(|| "the message is not there".to_owned());
        }
        self.empty_mailbox(soak, place, dice)?;
        let (message, file) = (message(dice), self.file("message"));
        write_file(&file, &message, 0o644);
        run(&["-T", file.to_str().unwrap(), &url("INBOX")])?;
        let back = run(&[&url("INBOX;MAILINDEX=1")])?;
        soak.carried(message.len(), back.len());
        same(&back, &message)
    }

    fn imaplib(&mut self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let (message, file, back) = (message(dice), self.file("message"), self.file("back"));
        write_file(&file, &message, 0o644);
        if place.kind == Kind::Dovecot {
            self.empty_mailbox(soak, place, dice)?;
        }
        let (user, password) = place.user(&self.user);
        let tool = self
            .tool(soak, "python3")
            .args(["-c", IMAPLIB, place.policy]);
        let tool = tool.args([&place.server.port.to_string(), &ca(), &user, password]);
        let said = succeeded(tool.arg(&file).arg(&back).run())?;
        if !sys::contains(&said, b"all is well") {
            return Err(String::from_utf8_lossy(&said).into_owned());
        }
        let got = std::fs::read(&back).unwrap();
        soak.carried(message.len(), got.len());
        same(&without_added_headers(&got), &message)
    }

    /// Pushes a message, and pulls it into a second, empty copy.
    fn mbsync(&mut self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        self.empty_mailbox(soak, place, dice)?;
        let (user, password) = place.user(&self.user);
        let message: Vec<u8> = message(dice)
            .into_iter()
            .filter(|byte| *byte != b'\r')
            .collect();
        let kind = if place.policy == "implicit" {
            "IMAPS"
        } else {
            "STARTTLS"
        };
        for (copy, sync) in [("one", "All"), ("two", "Pull")] {
            let dir = self.file(copy);
            let _ = std::fs::remove_dir_all(&dir);
            make_dir(&dir, 0o755);
            if copy == "one" {
                for part in ["INBOX", "INBOX/new", "INBOX/cur", "INBOX/tmp"] {
                    make_dir(&dir.join(part), 0o755);
                }
                write_file(&dir.join("INBOX/new/1700000000.1.e2e"), &message, 0o644);
            }
            let config = self.file("mbsyncrc");
            let text = format!(
                "IMAPAccount a\nHost localhost\nPort {port}\nUser {user}\nPass {password}\nAuthMechs LOGIN\nSSLType {kind}\n\
                 SystemCertificates no\nCertificateFile {ca}\nTimeout 60\n\nIMAPStore r\nAccount a\n\n\
                 MaildirStore l\nPath {dir}/\nInbox {dir}/INBOX\n\n\
                 Channel c\nFar :r:\nNear :l:\nPatterns INBOX\nCreate Near\nSync {sync}\nMaxSize 0\nSyncState *\n",
                port = place.server.port,
                ca = ca(),
                dir = dir.display()
            );
            write_file(&config, text, 0o600);
            let tool = self.tool(soak, "mbsync");
            succeeded(
                tool.args(["-c", config.to_str().unwrap(), "-V", "-a"])
                    .run(),
            )?;
        }
        let inbox = self.file("two/INBOX");
        let files = ["new", "cur"].into_iter().flat_map(|part| {
            std::fs::read_dir(inbox.join(part))
                .into_iter()
                .flatten()
                .flatten()
        });
        let all: Vec<_> = files
            .map(|file| std::fs::read(file.path()).unwrap())
            .collect();
        let [back] = &all[..] else {
            return Err(format!("{} messages", all.len()));
        };
        soak.carried(message.len(), back.len());
        same(&without_added_headers(back), &message)
    }

    fn s_client(&mut self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let target = format!("127.0.0.1:{}", place.server.port);
        let mut tool = self
            .tool(soak, "openssl")
            .args(["s_client", "-connect", &target]);
        if place.policy != "implicit" {
            tool = tool.args(["-starttls", "imap"]);
        }
        let sessions = self.file(&format!("session-{}", place.server.port));
        if sessions.exists() && dice.percent(50) {
            tool = tool.arg("-sess_in").arg(&sessions);
        }
        tool = tool.arg("-sess_out").arg(&sessions);
        tool = tool.args([
            "-servername",
            "localhost",
            "-CAfile",
            &ca(),
            "-verify_return_error",
        ]);
        tool = tool.args(["-verify_hostname", "localhost", "-quiet", "-nocommands"]);
        if dice.percent(40) {
            tool = tool.arg("-tls1_2");
        }
        self.by_hand(soak, place, dice, tool)
    }

    fn gnutls_cli(&mut self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut tool = self.tool(soak, "gnutls-cli");
        if place.policy != "implicit" {
            tool = tool.arg("--starttls-proto=imap");
        }
        let port = place.server.port.to_string();
        tool = tool.args([
            "--x509cafile",
            &ca(),
            "--port",
            &port,
            "--logfile",
            "/dev/null",
            "localhost",
        ]);
        self.by_hand(soak, place, dice, tool)
    }

    /// As a person would type it into a TLS tool.
    fn by_hand(
        &mut self,
        soak: &Soak,
        place: &Place,
        dice: &mut Dice,
        tool: Tool,
    ) -> Result<(), String> {
        let (mut running, mut client) = tool.talk();
        client.patience = PATIENCE;
        let (user, password) = place.user(&self.user);
        let mut talk = || {
            ask(&mut client, &format!("LOGIN {user} {password}"))?;
            append_and_fetch(soak, place, dice, &mut client)?;
            ask(&mut client, "LOGOUT").map(drop)
        };
        let result = talk();
        drop(client);
        let log = running.log_path.clone();
        let result = result.map_err(|error: String| format!("{error}: {}", running.log()));
        if result.is_ok() {
            running.wait();
        }
        drop(running);
        let _ = std::fs::remove_file(log);
        result
    }

    fn empty_mailbox(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut visit = Visit::pay(soak, place, dice, false);
        visit.begin(soak, place, dice, &self.user)?;
        wipe(&mut visit.client)?;
        ask(&mut visit.client, "LOGOUT")?;
        visit.expect_end()
    }
}

fn succeeded(output: tool::Output) -> Result<Vec<u8>, String> {
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text: String = output.text().chars().take(2000).collect();
    Err(format!("{:?}: {text}", output.status))
}

const IMAPLIB: &str = r#"
import imaplib, ssl, sys
imaplib._MAXLINE = 100000000
policy, port, ca, user, password, file, back = sys.argv[1:]
context = ssl.create_default_context(cafile=ca)
if policy == 'implicit':
    m = imaplib.IMAP4_SSL('localhost', int(port), ssl_context=context)
else:
    m = imaplib.IMAP4('localhost', int(port))
    assert 'STARTTLS' in m.capabilities, m.capabilities
    m.starttls(context)
m.login(user, password)
count = int(m.select('INBOX')[1][0])
message = open(file, 'rb').read()
assert m.append('INBOX', None, None, message)[0] == 'OK'
m.noop()
number = str(count + 1)
got = next(part[1] for part in m.fetch(number, '(BODY[])')[1] if isinstance(part, tuple))
open(back, 'wb').write(got)
if user != 'u':
    m.store(number, '+FLAGS.SILENT', '(\\Deleted)')
    m.expunge()
m.logout()
print('all is well')
"#;

// ---- those who wait ----

/// Connections in TLS that wait until the login timeout is nearly over, or over.
pub fn log_in_late(soak: &Soak, dice: &mut Dice) {
    const EARLY: Duration = Duration::from_secs(4);
    // Before the first of them: on a slow machine the others begin much later.
    let began = Instant::now();
    let mut waiting = Vec::new();
    for place in soak
        .places
        .iter()
        .filter(|place| place.kind == Kind::Scripted)
    {
        let mut visit = Visit::pay(soak, place, dice, true);
        let secure = || {
            visit.secure(soak, place, dice, true)?;
            ask(&mut visit.client, "NOOP")?;
            visit.without_keeper_from = Some(Instant::now());
            Ok(())
        };
        match soak.guarded("late", secure) {
            Ok(()) => waiting.push((place, visit, dice.percent(50))),
            result => visit.end(soak, place, "late", result),
        }
    }
    let login = soak.limits.login;
    while began.elapsed() + EARLY < login && !soak.is_over() {
        std::thread::sleep(Duration::from_millis(50));
    }
    // Those who come in time first: the others have to wait yet.
    waiting.sort_by_key(|(_, _, is_in_time)| !*is_in_time);
    for (place, mut visit, is_in_time) in waiting {
        let is_cut_short = soak.is_over() && visit.began.elapsed() + EARLY < login;
        if is_in_time || is_cut_short {
            let result = soak.guarded("late", || {
                visit.log_in(place, dice, "")?;
                ask(&mut visit.client, "LOGOUT")?;
                visit.expect_end()
            });
            let kind = if is_cut_short {
                "late: cut short"
            } else {
                "late: in time"
            };
            visit.end(soak, place, kind, result);
            continue;
        }
        let result = soak.guarded("late", || {
            visit.client.patience = login + PATIENCE;
            let (said, end) = visit.client.read_to_end();
            let took = visit.began.elapsed();
            // It counts from when the server had it, and that is later.
            if took + Duration::from_millis(500) < login || took > login + Duration::from_secs(15) {
                return Err(format!("ended after {took:?} and not {login:?}"));
            }
            if end != End::CloseNotify {
                return Err(format!(
                    "{end:?} after {:?}",
                    String::from_utf8_lossy(&said)
                ));
            }
            Ok(())
        });
        visit.end(soak, place, "late: too late", result);
    }
}

/// Connections that are held for the whole time.
#[derive(Default)]
pub struct Idlers {
    held: Vec<Held>,
}

struct Held {
    place: usize,
    visit: Visit,
    spoken: Instant,
}

/// How many are held at each server.
const HELD: usize = 3;

impl Idlers {
    pub fn hold(&mut self, soak: &Soak, dice: &mut Dice) {
        while !soak.is_over() {
            for (number, place) in soak.places.iter().enumerate() {
                let there = self.held.iter().filter(|held| held.place == number).count();
                for _ in there..HELD {
                    self.take(soak, place, number, dice);
                }
            }
            let mut index = 0;
            while index < self.held.len() {
                let held = &mut self.held[index];
                match soak.guarded("idle", || held.look(soak)) {
                    Ok(()) => index += 1,
                    Err(error) => lose(soak, self.held.swap_remove(index), error),
                }
            }
            soak.rest(Duration::from_millis(500));
        }
        for mut held in self.held.drain(..) {
            let place = &soak.places[held.place];
            let result = soak.guarded("idle", || {
                held.wake(place)?;
                ask(&mut held.visit.client, "LOGOUT")?;
                held.visit.expect_end()
            });
            match result {
                Ok(()) => {
                    soak.idle.lock().unwrap().remove(&held.visit.address);
                    held.visit.end(soak, place, "idle", Ok(()));
                }
                Err(error) => lose(soak, held, error),
            }
        }
    }

    fn take(&mut self, soak: &Soak, place: &Place, number: usize, dice: &mut Dice) {
        let mut visit = Visit::pay(soak, place, dice, true);
        let result = soak.guarded("idle", || {
            visit.secure(soak, place, dice, true)?;
            visit.log_in(place, dice, "idle")?;
            idle(&mut visit.client, place)
        });
        if result.is_err() {
            visit.end(soak, place, "idle", result);
            return;
        }
        soak.idle.lock().unwrap().insert(visit.address);
        self.held.push(Held {
            place: number,
            visit,
            spoken: Instant::now(),
        });
    }
}

fn idle(client: &mut Client, place: &Place) -> Result<(), String> {
    if place.kind == Kind::Mailutils {
        return Ok(());
    }
    client.try_send(b"idle IDLE\r\n");
    match line(client)? {
        line if line.starts_with('+') => Ok(()),
        line => Err(format!("IDLE: {line}")),
    }
}

fn lose(soak: &Soak, held: Held, error: String) {
    let run = || {
        held.lose(soak, error);
        Ok(())
    };
    if let Err(error) = soak.guarded("idle", run) {
        soak.fail(error);
    }
}

impl Held {
    /// Ends IDLE.
    fn wake(&mut self, place: &Place) -> Result<(), String> {
        if place.kind == Kind::Mailutils {
            return ask(&mut self.visit.client, "NOOP").map(drop);
        }
        self.visit.client.try_send(b"DONE\r\n");
        hear(&mut self.visit.client, "idle").map(drop)
    }

    /// Whether it is still there. Real servers end those of whom they hear nothing for half an hour (RFC 2177); the scripted one does
    /// not, and hears nothing.
    fn look(&mut self, soak: &Soak) -> Result<(), String> {
        let place = &soak.places[self.place];
        while !self.visit.client.is_quiet_for(Duration::ZERO) {
            let line = line(&mut self.visit.client)?;
            if !line.starts_with("* OK") {
                return Err(format!("unasked: {line}"));
            }
        }
        if place.kind != Kind::Scripted && self.spoken.elapsed() > Duration::from_secs(300) {
            self.wake(place)?;
            idle(&mut self.visit.client, place)?;
            self.spoken = Instant::now();
        }
        Ok(())
    }

    /// It has ended. Nothing was under way, so that how is known.
    fn lose(mut self, soak: &Soak, error: String) {
        let place = &soak.places[self.place];
        soak.idle.lock().unwrap().remove(&self.visit.address);
        let (rest, end) = self.visit.client.read_to_end();
        let killed = soak.was_killed(self.visit.address);
        let is_clean = match killed {
            Some("network process") => matches!(end, End::Eof | End::Reset),
            Some("backend") => end == End::CloseNotify,
            _ => false,
        };
        if is_clean && rest.is_empty() {
            soak.count(format!(
                "ended: idle, with its {}",
                killed.unwrap_or_default()
            ));
        } else {
            soak.fail(format!(
                "idle {} at {}, killed: {killed:?}: {error}: {end:?} after {:?}",
                self.visit.address,
                place.name,
                String::from_utf8_lossy(&rest)
            ));
        }
    }
}
