//! The mail client's side of a connection: cleartext, STARTTLS or TLS at once, with a deadline on every wait.

use super::pki::Pki;
use super::program::eventually;
use super::sys;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, SupportedProtocolVersion};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long any single wait may take before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How the server ended its side.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum End {
    /// End of file without close_notify (or, without TLS, simply end of file).
    Eof,
    /// TLS close_notify, then end of file.
    CloseNotify,
    /// A TCP reset.
    Reset,
    /// A TLS error, in rustls's words: a fatal alert from the server, or bytes that are not TLS.
    Tls(String),
}

/// The answer to one command.
#[derive(Clone, Debug)]
pub struct Reply {
    /// All lines up to and including the tagged one, without line ends; literals are inside their line with its CRLF.
    pub lines: Vec<String>,
}

impl Reply {
    /// The tagged line without the tag.
    pub fn status(&self) -> &str {
        self.lines
            .last()
            .unwrap()
            .split_once(' ')
            .map_or("", |(_, rest)| rest)
    }

    pub fn is_ok(&self) -> bool {
        self.status().starts_with("OK")
    }

    /// All lines, joined by newlines.
    pub fn text(&self) -> String {
        self.lines.join("\n")
    }
}

/// What a client remembers of its sessions: an offer resumes what another one with the same memory began. rustls resumes under
/// one configuration only, so all but the server name is as in the first of them.
#[derive(Clone, Default)]
pub struct Memory(Arc<OnceLock<Arc<ClientConfig>>>);

/// What the client offers in TLS. Start from [`TlsOffer::new`] and change fields.
#[derive(Clone)]
pub struct TlsOffer {
    pub roots: RootCertStore,
    pub server_name: String,
    pub versions: Vec<&'static SupportedProtocolVersion>,
    pub groups: Vec<&'static dyn SupportedKxGroup>,
    pub alpn: Vec<Vec<u8>>,
    /// `None`: it neither keeps tickets nor resumes.
    pub memory: Option<Memory>,
}

impl TlsOffer {
    /// TLS 1.3 and 1.2; X25519MLKEM768, X25519, P-256, P-384; no ALPN; server name localhost; trusts `pki`'s CA.
    pub fn new(pki: &Pki) -> Self {
        use aws_lc_rs::kx_group;
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(&pki.ca).unwrap())
            .unwrap();
        Self {
            roots,
            server_name: "localhost".to_owned(),
            versions: vec![&rustls::version::TLS13, &rustls::version::TLS12],
            groups: vec![
                kx_group::X25519MLKEM768,
                kx_group::X25519,
                kx_group::SECP256R1,
                kx_group::SECP384R1,
            ],
            alpn: Vec::new(),
            memory: None,
        }
    }

    fn connection(&self) -> ClientConnection {
        let config = match &self.memory {
            None => Arc::new(self.config()),
            Some(Memory(first)) => first
                .get_or_init(|| {
                    let mut config = self.config();
                    config.resumption = Resumption::in_memory_sessions(16);
                    Arc::new(config)
                })
                .clone(),
        };
        connection(&config, &self.server_name)
    }

    /// The same as rustls has it, for what an offer has no field for: a client certificate, resumption, a key log. One
    /// configuration for several connections lets them resume each other (see [`Client::handshake_by`]).
    pub fn config(&self) -> ClientConfig {
        let provider = CryptoProvider {
            kx_groups: self.groups.clone(),
            ..aws_lc_rs::default_provider()
        };
        let builder = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&self.versions)
            .unwrap();
        let mut config = builder
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols.clone_from(&self.alpn);
        config.resumption = Resumption::disabled();
        config
    }
}

fn connection(config: &Arc<ClientConfig>, server_name: &str) -> ClientConnection {
    let name = ServerName::try_from(server_name.to_owned()).unwrap();
    let mut connection = ClientConnection::new(config.clone(), name).unwrap();
    connection.set_buffer_limit(Some(256 << 10));
    connection
}

/// A client. Everything it reads first goes through `buffered`, inside TLS already decrypted.
pub struct Client {
    input: Option<File>,
    output: Option<File>,
    tls: Option<Box<ClientConnection>>,
    /// Read and not yet taken.
    buffered: Vec<u8>,
    /// TLS bytes that wait for the socket's room.
    pending: Vec<u8>,
    end: Option<End>,
    /// The longest that one read or write call of a test may take.
    pub patience: Duration,
}

impl Client {
    /// A client on one socket for both directions.
    pub fn on(socket: impl Into<OwnedFd>) -> Self {
        let socket: OwnedFd = socket.into();
        Self::on_pair(socket.try_clone().unwrap(), socket)
    }

    /// A client that reads from one descriptor and writes to another (pipes, or a program's stdout and stdin).
    pub fn on_pair(input: impl Into<OwnedFd>, output: impl Into<OwnedFd>) -> Self {
        let (input, output): (OwnedFd, OwnedFd) = (input.into(), output.into());
        for descriptor in [&input, &output] {
            let flags = nix::fcntl::OFlag::from_bits_retain(
                nix::fcntl::fcntl(descriptor, nix::fcntl::FcntlArg::F_GETFL).unwrap(),
            );
            nix::fcntl::fcntl(
                descriptor,
                nix::fcntl::FcntlArg::F_SETFL(flags | nix::fcntl::OFlag::O_NONBLOCK),
            )
            .unwrap();
        }
        Self {
            input: Some(File::from(input)),
            output: Some(File::from(output)),
            tls: None,
            buffered: Vec::new(),
            pending: Vec::new(),
            end: None,
            patience: PATIENCE,
        }
    }

    // ---- TLS ----

    /// Starts TLS and finishes the handshake; the error is what rustls or the socket said.
    pub fn handshake(&mut self, offer: &TlsOffer) -> Result<(), String> {
        self.handshake_until_server_is_heard(offer)?;
        self.finish_handshake()
    }

    /// Sends the ClientHello, reads the server's flight and stops there: the client's Finished is not sent yet, so the
    /// server has signed and still waits (in TLS 1.3). Go on with [`Client::finish_handshake`].
    pub fn handshake_until_server_is_heard(&mut self, offer: &TlsOffer) -> Result<(), String> {
        self.begin_handshake(offer.connection())
    }

    /// [`Client::handshake`] with a configuration of rustls, for the server name localhost.
    pub fn handshake_by(&mut self, config: &Arc<ClientConfig>) -> Result<(), String> {
        self.hear_server_by(config)?;
        self.finish_handshake()
    }

    /// [`Client::handshake_until_server_is_heard`] with a configuration of rustls.
    pub fn hear_server_by(&mut self, config: &Arc<ClientConfig>) -> Result<(), String> {
        self.begin_handshake(connection(config, "localhost"))
    }

    fn begin_handshake(&mut self, connection: ClientConnection) -> Result<(), String> {
        assert!(
            self.tls.is_none() && self.buffered.is_empty(),
            "bytes in clear after STARTTLS's OK: {:?}",
            text(&self.buffered)
        );
        let mut connection = Box::new(connection);
        let mut hello = Vec::new();
        connection.write_tls(&mut hello).unwrap();
        self.send_raw(&hello);
        self.tls = Some(connection);
        self.hear_server()
    }

    fn hear_server(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + self.patience;
        while self.tls().is_handshaking() {
            self.wait_to_read(deadline, "TLS handshake");
            self.read_once();
            if let Some(end) = &self.end {
                // What rustls wants to say about it (an alert) is sent, as any client would.
                let end = end.clone();
                self.flush_tls();
                return Err(format!("{end:?}"));
            }
            if self.tls().wants_write() && !self.tls().wants_read() {
                break;
            }
            // In TLS 1.2 several flights are needed; in 1.3 rustls stops handshaking as soon as it has the server's Finished.
            if self.tls().protocol_version() == Some(rustls::ProtocolVersion::TLSv1_2) {
                self.flush_tls();
            }
        }
        Ok(())
    }

    /// Sends a STARTTLS line and the first `count` bytes of the ClientHello in one segment, then, after the tagged OK, the
    /// rest, and finishes the handshake.
    pub fn starttls_in_one_segment(&mut self, line: &str, offer: &TlsOffer, count: usize) {
        let mut connection = Box::new(offer.connection());
        let mut hello = Vec::new();
        connection.write_tls(&mut hello).unwrap();
        let (first, rest) = hello.split_at(count.min(hello.len()));
        self.send_raw([line.as_bytes(), first].concat());
        let answer = self.line();
        assert!(answer.contains(" OK "), "{answer}");
        self.send_raw(rest);
        // The server's flight may have come with the OK.
        let early = std::mem::take(&mut self.buffered);
        connection.read_tls(&mut &early[..]).unwrap();
        connection.process_new_packets().unwrap();
        self.tls = Some(connection);
        self.flush_tls();
        self.hear_server().unwrap();
        self.finish_handshake().unwrap();
    }

    /// [`Client::handshake`] on a path that changes what the client sends: `change` is given each flight, and its number from 0.
    /// The server may end meanwhile.
    pub fn handshake_through(
        &mut self,
        offer: &TlsOffer,
        mut change: impl FnMut(usize, Vec<u8>) -> Vec<u8>,
    ) -> Result<(), String> {
        assert!(self.tls.is_none() && self.buffered.is_empty());
        self.tls = Some(Box::new(offer.connection()));
        let deadline = Instant::now() + self.patience;
        let mut number = 0;
        loop {
            let mut flight = Vec::new();
            while self.tls().wants_write() {
                self.tls().write_tls(&mut flight).unwrap();
            }
            if !flight.is_empty() {
                self.try_send_raw(&change(number, flight));
                number += 1;
            } else if self.tls().is_handshaking() {
                self.wait_to_read(deadline, "TLS handshake");
                self.read_once();
            } else {
                return Ok(());
            }
            if let Some(end) = &self.end {
                return Err(format!("{end:?}"));
            }
        }
    }

    /// See [`Client::handshake_until_server_is_heard`].
    pub fn finish_handshake(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + self.patience;
        self.flush_tls();
        while self.tls().is_handshaking() {
            self.wait_to_read(deadline, "TLS handshake");
            self.read_once();
            self.flush_tls();
            if let Some(end) = &self.end {
                return Err(format!("{end:?}"));
            }
        }
        Ok(())
    }

    /// `STARTTLS` and the handshake, both of which must succeed.
    pub fn starttls(&mut self, pki: &Pki) {
        self.starttls_with(&TlsOffer::new(pki));
    }

    /// [`Client::starttls`] with a choice of what is offered.
    pub fn starttls_with(&mut self, offer: &TlsOffer) {
        let reply = self.command("tls STARTTLS");
        assert!(reply.is_ok(), "STARTTLS: {reply:?}");
        self.handshake(offer)
            .unwrap_or_else(|error| panic!("handshake: {error}"));
    }

    /// To where a backend is asked for: after STARTTLS, after the handshake, or at once.
    pub fn ask_for_backend(&mut self, policy: &str, pki: &Pki) {
        match policy {
            "required" => {
                self.greeting();
                self.starttls(pki);
            }
            "implicit" => self.handshake(&TlsOffer::new(pki)).unwrap(),
            _ => {}
        }
    }

    /// The rustls connection: version, cipher, group, certificates. Panics without TLS.
    pub fn tls(&mut self) -> &mut ClientConnection {
        self.tls.as_mut().expect("TLS was started")
    }

    /// A ClientHello as bytes, for sending it in pieces or in the wrong place.
    pub fn client_hello(offer: &TlsOffer) -> Vec<u8> {
        let mut hello = Vec::new();
        offer.connection().write_tls(&mut hello).unwrap();
        hello
    }

    // ---- writing ----

    /// Sends bytes, inside TLS if it is up. Meanwhile what the server sends is read, so that neither waits for the other.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let mut rest = bytes.as_ref();
        let deadline = Instant::now() + self.patience;
        while !rest.is_empty() || !self.pending.is_empty() {
            rest = &rest[self.accept(rest)..];
            self.flush_some();
            if rest.is_empty() && self.pending.is_empty() {
                break;
            }
            let (readable, _) = self.wait(true, deadline, "sending");
            if readable {
                self.read_once();
            }
        }
    }

    /// Sends bytes as [`Client::send`] does, unless the server has ended meanwhile: then it says no.
    pub fn try_send(&mut self, bytes: &[u8]) -> bool {
        let mut rest = bytes;
        let deadline = Instant::now() + self.patience;
        while self.end.is_none() && (!rest.is_empty() || !self.pending.is_empty()) {
            rest = &rest[self.accept(rest)..];
            self.flush_some();
            if rest.is_empty() && self.pending.is_empty() {
                break;
            }
            if self.wait(true, deadline, "sending").0 {
                self.read_once();
            }
        }
        while self.end.is_none() && self.readable(Instant::now()) {
            self.read_once();
        }
        self.end.is_none()
    }

    /// Sends bytes past TLS, unless the server has ended meanwhile: then it says no.
    pub fn try_send_raw(&mut self, bytes: &[u8]) -> bool {
        self.pending.extend_from_slice(bytes);
        self.try_send(&[])
    }

    /// Waits until the other end of a unix socket has read all that was sent.
    pub fn wait_until_read(&self) {
        eventually("the peer reads", || {
            let output = self.output.as_ref().unwrap();
            (sys::unread_by_peer(output) == 0).then_some(())
        });
    }

    /// Sends at most `limit` bytes without reading anything; stops when the server takes no more for `idle`. Returns how
    /// many bytes were taken (inside TLS: accepted into records that left, or wait in this client's own small buffer).
    pub fn send_until_blocked(&mut self, limit: usize, idle: Duration) -> usize {
        let piece = vec![b'x'; 32 << 10];
        let mut sent = 0;
        while sent < limit {
            let accepted = self.accept(&piece[..piece.len().min(limit - sent)]);
            sent += accepted;
            self.flush_some();
            if !self.pending.is_empty() || accepted == 0 {
                let output = self.output.as_ref().unwrap();
                let mut descriptors = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
                if poll(
                    &mut descriptors,
                    PollTimeout::try_from(idle.as_millis()).unwrap(),
                )
                .unwrap()
                    == 0
                {
                    break;
                }
            }
        }
        sent
    }

    /// Sends bytes to the socket as they are, past TLS.
    pub fn send_raw(&mut self, bytes: impl AsRef<[u8]>) {
        self.pending.extend_from_slice(bytes.as_ref());
        let deadline = Instant::now() + self.patience;
        while !self.pending.is_empty() {
            self.flush_some();
            if !self.pending.is_empty() {
                self.wait(true, deadline, "sending");
            }
        }
    }

    /// Has the backend read nothing until it is released, and sends a line of so many octets for it.
    pub fn send_line_to_stalled(&mut self, size: usize) {
        assert!(self.command("a XSTALL").is_ok());
        self.send(vec![b'y'; size]);
        self.send("\r\n");
    }

    /// Keeps bytes back until the next are sent, which then leave in one segment with them.
    pub fn hold(&mut self, bytes: impl AsRef<[u8]>) {
        self.pending.extend_from_slice(bytes.as_ref());
    }

    /// Ends the client's direction as far as TLS is concerned: close_notify, but the socket stays open.
    pub fn close_notify(&mut self) {
        self.tls().send_close_notify();
        self.flush_tls();
    }

    /// Ends the client's direction: `shutdown(SHUT_WR)`, or closing the pipe to the server. No close_notify.
    pub fn shutdown(&mut self) {
        if let Some(output) = self.output.take() {
            let _ = nix::sys::socket::shutdown(
                std::os::fd::AsRawFd::as_raw_fd(&output),
                nix::sys::socket::Shutdown::Write,
            );
        }
    }

    /// Goes away at once with a TCP reset.
    pub fn reset(mut self) {
        sys::reset_on_close(self.input.as_ref().unwrap().as_fd());
        self.output = None;
        self.input = None;
    }

    // ---- reading ----

    /// The next line without its CRLF. Panics at the end of the stream.
    pub fn line(&mut self) -> String {
        let line = self.take_until("a line", |buffered| {
            buffered
                .iter()
                .position(|byte| *byte == b'\n')
                .map(|at| at + 1)
        });
        text(&line).trim_end_matches(['\r', '\n']).to_owned()
    }

    /// The next line, or how the server ended before it.
    pub fn line_or_end(&mut self) -> Result<String, End> {
        let deadline = Instant::now() + self.patience;
        while !self.buffered.contains(&b'\n') {
            if let Some(end) = &self.end {
                return Err(end.clone());
            }
            self.wait_to_read(deadline, "a line");
            self.read_once();
        }
        Ok(self.line())
    }

    /// Exactly `size` bytes, or how the server ended before them.
    pub fn exact_or_end(&mut self, size: usize) -> Result<Vec<u8>, End> {
        let mut deadline = Instant::now() + self.patience;
        while self.buffered.len() < size {
            if let Some(end) = &self.end {
                return Err(end.clone());
            }
            self.wait_to_read(deadline, "more bytes");
            let before = self.buffered.len();
            self.read_once();
            if self.buffered.len() > before {
                // The patience is for a stall, not for the whole.
                deadline = Instant::now() + self.patience;
            }
        }
        Ok(self.buffered.drain(..size).collect())
    }

    /// Reads until what came so far contains `wanted`, and takes everything up to and including it.
    pub fn read_until(&mut self, wanted: &str) -> String {
        let found = self.take_until(wanted, |buffered| {
            buffered
                .windows(wanted.len())
                .position(|window| window == wanted.as_bytes())
                .map(|at| at + wanted.len())
        });
        text(&found)
    }

    /// Takes exactly `size` bytes.
    pub fn read_exact(&mut self, size: usize) -> Vec<u8> {
        self.take_until("more bytes", |buffered| {
            (buffered.len() >= size).then_some(size)
        })
    }

    /// Reads what the scripted backend sends for `XLAST size`, then a clean end.
    pub fn expect_last_words(&mut self, size: usize) {
        let (bytes, end) = self.read_to_end();
        assert!(
            bytes == Pattern::new(2).take(size),
            "{} of {size} bytes",
            bytes.len()
        );
        assert_eq!(end, End::CloseNotify);
    }

    /// Everything up to the end, and how it ended.
    pub fn read_to_end(&mut self) -> (Vec<u8>, End) {
        let deadline = Instant::now() + self.patience;
        while self.end.is_none() {
            self.wait_to_read(deadline, "the end of the connection");
            self.read_once();
        }
        (
            std::mem::take(&mut self.buffered),
            self.end.clone().unwrap(),
        )
    }

    /// Reads the rest, which must be nothing, and says how it ended.
    pub fn expect_end(&mut self) -> End {
        let (rest, end) = self.read_to_end();
        assert!(rest.is_empty(), "expected the end, got {:?}", text(&rest));
        end
    }

    /// Whether nothing comes for this long (a negative can only be shown by waiting).
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        while self.buffered.is_empty() && self.end.is_none() {
            if !self.readable(deadline) {
                return true;
            }
            self.read_once();
        }
        false
    }

    /// Sends a command line (its first word is the tag) and reads to its tagged response.
    pub fn command(&mut self, line: &str) -> Reply {
        self.send(format!("{line}\r\n"));
        self.reply(line.split(' ').next().unwrap())
    }

    /// Reads to the tagged response with this tag.
    pub fn reply(&mut self, tag: &str) -> Reply {
        let mut lines = Vec::new();
        loop {
            let mut line = self.line();
            while let Some(size) = literal_size(&line) {
                let literal = self.read_exact(size);
                line = format!("{line}\r\n{}{}", text(&literal), self.line());
            }
            let done = line
                .strip_prefix(tag)
                .is_some_and(|rest| rest.starts_with(' '));
            lines.push(line);
            if done {
                return Reply { lines };
            }
        }
    }

    /// Reads the greeting and checks that it is one.
    pub fn greeting(&mut self) -> String {
        let line = self.line();
        assert!(line.starts_with("* "), "not a greeting: {line:?}");
        line
    }

    /// [`Client::greeting`], where a fault is to be counted and not to end the test.
    pub fn try_greeting(&mut self) -> Result<(), String> {
        match self.line_or_end() {
            Ok(line) if line.starts_with("* OK") => Ok(()),
            other => Err(format!("greeting: {other:?}")),
        }
    }

    /// [`Client::command`], likewise; it must be answered OK.
    pub fn try_command(&mut self, line: &str) -> Result<(), String> {
        if !self.try_send(format!("{line}\r\n").as_bytes()) && self.buffered.is_empty() {
            return Err(format!("{line}: {:?}", self.end));
        }
        let tag = line.split(' ').next().unwrap_or_default();
        loop {
            let answer = self
                .line_or_end()
                .map_err(|end| format!("{line}: {end:?}"))?;
            match answer.strip_prefix(tag) {
                Some(status) if status.starts_with(" OK") => return Ok(()),
                Some(status) if status.starts_with(' ') => return Err(format!("{line}: {answer}")),
                _ => {}
            }
        }
    }

    /// `LOGIN` with what the scripted backend accepts.
    pub fn login(&mut self) {
        let reply = self.command("login LOGIN u sekret");
        assert!(reply.is_ok(), "{reply:?}");
    }

    /// Greeting, STARTTLS, LOGIN: the usual beginning in `required`.
    pub fn log_in_by_starttls(&mut self, pki: &Pki) {
        self.log_in_by_starttls_with(&TlsOffer::new(pki));
    }

    /// [`Client::log_in_by_starttls`] with a choice of what is offered.
    pub fn log_in_by_starttls_with(&mut self, offer: &TlsOffer) {
        self.greeting();
        self.starttls_with(offer);
        self.login();
    }

    // ---- bulk ----

    /// So many octets to the scripted server, which says what it received.
    pub fn sink(&mut self, size: u64) {
        self.send(format!("up XSINK {size}\r\n"));
        let (sent, _) = self.exchange(size, 0);
        assert_eq!(self.reply("up").lines[0], format!("* XSINK {sent}"));
    }

    /// So many from it.
    pub fn source(&mut self, size: u64) {
        assert!(self.command(&format!("down XSOURCE {size}")).is_ok());
        let (_, received) = self.exchange(0, size);
        assert_eq!(received, pattern_hash(2, size));
    }

    /// To the end, which has to be an orderly one.
    pub fn log_out(mut self) {
        let reply = self.command("z LOGOUT");
        assert!(reply.is_ok(), "{reply:?}");
        assert_eq!(self.expect_end(), End::CloseNotify);
    }

    /// Sends `up` generated bytes and receives `down`, both at once, without holding them; returns the SHA-256 of each.
    /// The bytes are [`Pattern`]'s.
    pub fn exchange(&mut self, up: u64, down: u64) -> (String, String) {
        let (mut sent_hash, mut received_hash) = (sha256(), sha256());
        let mut source = Pattern::new(1);
        let (mut made, mut received) = (0, 0);
        let mut piece: Vec<u8> = Vec::new();
        let mut deadline = Instant::now() + self.patience;
        while made < up || !piece.is_empty() || !self.pending.is_empty() || received < down {
            if piece.is_empty() && made < up {
                piece = source.take(usize::try_from((up - made).min(64 << 10)).unwrap());
                made += piece.len() as u64;
                sent_hash.update(&piece);
            }
            let accepted = self.accept(&piece);
            piece.drain(..accepted);
            self.flush_some();
            let taken = self
                .buffered
                .len()
                .min(usize::try_from(down - received).unwrap_or(usize::MAX));
            received_hash.update(&self.buffered[..taken]);
            self.buffered.drain(..taken);
            received += taken as u64;
            if accepted > 0 || taken > 0 {
                // The patience is for a stall, not for the whole.
                deadline = Instant::now() + self.patience;
            }
            let writing = made < up || !self.pending.is_empty() || !piece.is_empty();
            if !writing && received >= down {
                break;
            }
            let (readable, _) = self.wait(writing, deadline, "bulk transfer");
            if readable {
                self.read_once();
            }
            if let Some(end) = &self.end {
                assert!(
                    received + self.buffered.len() as u64 >= down && !writing,
                    "ended by {end:?} after {received} of {down} bytes down, {made} of {up} up"
                );
            }
        }
        (
            hex(sent_hash.finish().as_ref()),
            hex(received_hash.finish().as_ref()),
        )
    }

    // ---- inside ----

    /// Takes plaintext in, as much as fits; returns how much.
    fn accept(&mut self, bytes: &[u8]) -> usize {
        if bytes.is_empty() || self.pending.len() > 64 << 10 {
            return 0;
        }
        match &mut self.tls {
            None => {
                let size = bytes.len().min(64 << 10);
                self.pending.extend_from_slice(&bytes[..size]);
                size
            }
            Some(connection) => {
                let size = connection.writer().write(bytes).unwrap();
                while connection.wants_write() {
                    connection.write_tls(&mut self.pending).unwrap();
                }
                size
            }
        }
    }

    /// Moves all that rustls wants to send to the socket.
    fn flush_tls(&mut self) {
        if let Some(connection) = &mut self.tls {
            while connection.wants_write() {
                connection.write_tls(&mut self.pending).unwrap();
            }
        }
        if !self.pending.is_empty() {
            self.send_raw([]);
        }
    }

    /// Writes what the socket takes now. A peer that is gone swallows the rest: how it ended shows on reading.
    fn flush_some(&mut self) {
        let Some(output) = &mut self.output else {
            self.pending.clear();
            return;
        };
        while !self.pending.is_empty() {
            match output.write(&self.pending) {
                Ok(size) => drop(self.pending.drain(..size)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.pending.clear(),
            }
        }
    }

    /// Waits until readable (or, if asked for, writable).
    fn wait(&self, writing: bool, deadline: Instant, what: &str) -> (bool, bool) {
        loop {
            let mut descriptors = Vec::new();
            // While sending, what nobody takes must not fill the memory.
            let reading = self.end.is_none() && (!writing || self.buffered.len() < 4 << 20);
            if reading {
                descriptors.push(PollFd::new(
                    self.input.as_ref().unwrap().as_fd(),
                    PollFlags::POLLIN,
                ));
            }
            if let (true, Some(output)) = (writing, &self.output) {
                descriptors.push(PollFd::new(output.as_fd(), PollFlags::POLLOUT));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "no progress in time: {what}; read so far: {:?}",
                text(&self.buffered[..self.buffered.len().min(500)])
            );
            match poll(
                &mut descriptors,
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX),
            ) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => {
                    let happened = |index: usize| {
                        descriptors
                            .get(index)
                            .is_some_and(|descriptor| descriptor.any().unwrap_or(false))
                    };
                    return if reading {
                        (happened(0), happened(1))
                    } else {
                        (false, happened(0))
                    };
                }
                Err(error) => panic!("poll: {error}"),
            }
        }
    }

    /// Not where nothing more can come: the server may have ended when something was sent.
    fn wait_to_read(&mut self, deadline: Instant, what: &str) {
        if self.end.is_none() {
            self.wait(false, deadline, what);
        }
    }

    fn readable(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut descriptors = [PollFd::new(
            self.input.as_ref().unwrap().as_fd(),
            PollFlags::POLLIN,
        )];
        poll(
            &mut descriptors,
            PollTimeout::try_from(left.as_millis()).unwrap(),
        )
        .unwrap_or(0)
            > 0
    }

    /// One read; updates `buffered` and `end`.
    fn read_once(&mut self) {
        let Some(input) = &mut self.input else { return };
        if self.end.is_some() {
            return;
        }
        let Some(connection) = &mut self.tls else {
            let mut piece = vec![0; 64 << 10];
            match input.read(&mut piece) {
                Ok(0) => self.end = Some(End::Eof),
                Ok(size) => self.buffered.extend_from_slice(&piece[..size]),
                Err(error) => self.end = end_of(&error),
            }
            return;
        };
        match connection.read_tls(input) {
            Ok(size) => match connection.process_new_packets() {
                Ok(state) => {
                    let mut plain = vec![0; state.plaintext_bytes_to_read()];
                    connection.reader().read_exact(&mut plain).unwrap();
                    self.buffered.extend_from_slice(&plain);
                    if size == 0 {
                        self.end = Some(if state.peer_has_closed() {
                            End::CloseNotify
                        } else {
                            End::Eof
                        });
                    }
                }
                Err(error) => self.end = Some(End::Tls(error.to_string())),
            },
            Err(error) => self.end = end_of(&error),
        }
    }

    fn take_until(
        &mut self,
        what: &str,
        mut enough: impl FnMut(&[u8]) -> Option<usize>,
    ) -> Vec<u8> {
        let deadline = Instant::now() + self.patience;
        loop {
            if let Some(size) = enough(&self.buffered) {
                return self.buffered.drain(..size).collect();
            }
            if let Some(end) = &self.end {
                panic!(
                    "the connection ended ({end:?}) while waiting for {what:?}; unread: {:?}",
                    text(&self.buffered)
                );
            }
            self.wait_to_read(deadline, what);
            self.read_once();
        }
    }
}

fn end_of(error: &io::Error) -> Option<End> {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => None,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Some(End::Reset),
        _ => panic!("read: {error}"),
    }
}

/// The size of the literal that a line announces at its end.
fn literal_size(line: &str) -> Option<usize> {
    line.strip_suffix('}')?
        .rsplit_once('{')?
        .1
        .trim_end_matches(['+', '-'])
        .parse()
        .ok()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A new SHA-256: the one that comes with the tests' TLS.
pub fn sha256() -> Box<dyn rustls::crypto::hash::Context> {
    aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256
        .tls13()
        .unwrap()
        .common
        .hash_provider
        .start()
}

/// SHA-256 of the first `size` bytes of [`Pattern::new`]`(seed)`, for comparison with what came through.
pub fn pattern_hash(seed: u64, size: u64) -> String {
    let (mut hash, mut pattern, mut left) = (sha256(), Pattern::new(seed), size);
    while left > 0 {
        let piece = pattern.take(left.min(64 << 10) as usize);
        hash.update(&piece);
        left -= piece.len() as u64;
    }
    hex(hash.finish().as_ref())
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A reproducible stream of bytes that no compression, repetition or shift would survive unnoticed.
pub struct Pattern {
    state: u64,
    left: Vec<u8>,
}

impl Pattern {
    pub fn new(seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            left: Vec::new(),
        }
    }

    /// The next `size` bytes.
    pub fn take(&mut self, size: usize) -> Vec<u8> {
        let mut bytes = std::mem::take(&mut self.left);
        bytes.reserve(size + 8);
        while bytes.len() < size {
            // xorshift64*
            self.state ^= self.state >> 12;
            self.state ^= self.state << 25;
            self.state ^= self.state >> 27;
            bytes.extend_from_slice(&self.state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        self.left = bytes.split_off(size);
        bytes
    }
}
