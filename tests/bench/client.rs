//! The load: a mail client with rustls, on blocking sockets.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, SupportedKxGroup, aws_lc_rs};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, NamedGroup, RootCertStore, StreamOwned,
};

use crate::{Cipher, Result};

/// How a session becomes secure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Entry {
    Implicit,
    /// Never: the copy floor.
    Plain,
    StartTls,
}

/// Makes sessions.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    cipher: Cipher,
    config: Arc<ClientConfig>,
}

/// aws-lc-rs, which offers X25519MLKEM768 first (and X25519 with it, so that no server needs a second round trip).
pub(crate) fn provider(cipher: Cipher) -> CryptoProvider {
    let mut provider = aws_lc_rs::default_provider();
    // Without rustls's `prefer-post-quantum` it comes last, and servers take the group whose share they were sent.
    let is_classical = |group: &&dyn SupportedKxGroup| group.name() != NamedGroup::X25519MLKEM768;
    provider.kx_groups.sort_by_key(is_classical);
    provider.cipher_suites.retain(|suite| {
        let name = format!("{:?}", suite.suite());
        match cipher {
            Cipher::Aes128 => name.contains("AES_128"),
            Cipher::Aes256 => name.contains("AES_256"),
            Cipher::Any => true,
            Cipher::Chacha20 => name.contains("CHACHA20"),
        }
    });
    provider
}

/// The store of the one authority in a PEM file.
pub(crate) fn roots(authority: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority)?)?;
    Ok(roots)
}

impl Client {
    /// One whose handshakes are all full ones.
    pub(crate) fn new(authority: &Path, cipher: Cipher) -> Result<Self> {
        Self::with(authority, cipher, Resumption::disabled())
    }

    /// The same, but resuming its last session.
    pub(crate) fn that_resumes(&self, authority: &Path) -> Result<Self> {
        Self::with(authority, self.cipher, Resumption::in_memory_sessions(8))
    }

    fn with(authority: &Path, cipher: Cipher, resumption: Resumption) -> Result<Self> {
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider(cipher)))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots(authority)?)
            .with_no_client_auth();
        config.resumption = resumption;
        Ok(Self {
            cipher,
            config: Arc::new(config),
        })
    }

    /// Connects, makes it secure, reads the greeting and logs in.
    pub(crate) fn log_in(&self, port: u16, entry: Entry) -> io::Result<Session> {
        let socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        let mut session = Session {
            link: Link::Plain(Wire::new(socket)),
            facts: "no TLS".to_owned(),
            is_resumed: false,
            input: Vec::new(),
        };
        if entry == Entry::Implicit {
            session.secure(self)?;
        }
        session.greeting()?;
        if entry == Entry::StartTls {
            session.command("STARTTLS")?;
            session.secure(self)?;
        }
        session.command("LOGIN user password")?;
        Ok(session)
    }

    /// The whole of a short session; returns how long it took from connect to end of file, and whether that was announced.
    pub(crate) fn visit(&self, port: u16, entry: Entry) -> io::Result<(Duration, Ending)> {
        let start = Instant::now();
        let ending = self.log_in(port, entry)?.log_out()?;
        // What is left (our close_notify, closing the socket) is not the server's time.
        Ok((start.elapsed(), ending))
    }
}

/// How long a server may say nothing.
const TIMEOUT: Duration = Duration::from_secs(30);

/// How a server ended the session.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Ending {
    /// close_notify, or end of file where there is no TLS.
    Clean,
    /// End of file without close_notify, or a reset.
    Cut,
}

/// A client that has logged in.
pub(crate) struct Session {
    link: Link,
    /// Version, group and cipher.
    pub(crate) facts: String,
    pub(crate) is_resumed: bool,
    /// What was read and not yet used.
    input: Vec<u8>,
}

impl Session {
    fn secure(&mut self, client: &Client) -> io::Result<()> {
        let Link::Plain(wire) = std::mem::replace(&mut self.link, Link::None) else {
            return Err(io::Error::other("TLS in TLS"));
        };
        let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
        let connection =
            ClientConnection::new(client.config.clone(), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(connection, wire);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        let connection = &stream.conn;
        self.is_resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
        self.facts = format!(
            "{:?} {:?} {}",
            connection.protocol_version().unwrap(),
            connection.negotiated_key_exchange_group().unwrap().name(),
            connection
                .negotiated_cipher_suite()
                .map(|suite| cipher_name(&format!("{:?}", suite.suite())))
                .unwrap(),
        );
        self.link = Link::Tls(Box::new(stream));
        Ok(())
    }

    fn greeting(&mut self) -> io::Result<()> {
        let line = self.line()?;
        if line.starts_with("* OK") {
            Ok(())
        } else {
            Err(unexpected(&line))
        }
    }

    /// Sends a command and waits for its OK.
    pub(crate) fn command(&mut self, command: &str) -> io::Result<()> {
        self.link.write_all(format!("a {command}\r\n").as_bytes())?;
        self.expect_ok()
    }

    fn expect_ok(&mut self) -> io::Result<()> {
        loop {
            let line = self.line()?;
            if line.starts_with("a OK") {
                return Ok(());
            }
            if !line.starts_with("* ") {
                return Err(unexpected(&line));
            }
        }
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.input.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.input.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            let mut bytes = [0; 4096];
            match self.link.read(&mut bytes)? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => self.input.extend_from_slice(&bytes[..count]),
            }
        }
    }

    /// Has the server send this many octets.
    pub(crate) fn download(&mut self, octets: u64) -> io::Result<()> {
        self.link.enlarge();
        self.link
            .write_all(format!("a XDOWN {octets}\r\n").as_bytes())?;
        let mut left = octets - self.input.drain(..).len() as u64;
        let mut bytes = vec![0; BULK];
        while left > 0 {
            let most = bytes.len().min(left.try_into().unwrap_or(usize::MAX));
            match self.link.read(&mut bytes[..most])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                count => left -= count as u64,
            }
        }
        self.expect_ok()
    }

    /// Sends this many octets, and waits until the server has them.
    pub(crate) fn upload(&mut self, octets: u64) -> io::Result<()> {
        self.link
            .write_all(format!("a XUP {octets}\r\n").as_bytes())?;
        let bytes = vec![0; BULK];
        let mut left = octets;
        while left > 0 {
            let most = bytes.len().min(left.try_into().unwrap_or(usize::MAX));
            self.link.write_all(&bytes[..most])?;
            left -= most as u64;
        }
        self.expect_ok()
    }

    /// Says goodbye and reads to the end of file.
    pub(crate) fn log_out(mut self) -> io::Result<Ending> {
        self.command("LOGOUT")?;
        let ending = loop {
            match self.link.read(&mut [0; 4096]) {
                Ok(0) => break Ending::Clean,
                Ok(_) => {}
                Err(error) if is_cut(error.kind()) => break Ending::Cut,
                Err(error) => return Err(error),
            }
        };
        if let Link::Tls(stream) = &mut self.link {
            stream.conn.send_close_notify();
            let _ = stream.conn.write_tls(&mut stream.sock);
        }
        Ok(ending)
    }
}

fn is_cut(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof
    )
}

fn unexpected(line: &str) -> io::Error {
    io::Error::other(format!("the server said {line:?}"))
}

/// `TLS13_AES_256_GCM_SHA384` and `TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384` are `AES_256_GCM` both.
fn cipher_name(suite: &str) -> String {
    let name = suite.trim_start_matches("TLS13_");
    let name = name.rsplit("WITH_").next().unwrap_or(name);
    name.rsplit_once("_SHA")
        .map_or(name, |(cipher, _)| cipher)
        .to_owned()
}

enum Link {
    /// Only while one becomes the other.
    None,
    Plain(Wire),
    Tls(Box<StreamOwned<ClientConnection, Wire>>),
}

impl Link {
    fn enlarge(&mut self) {
        match self {
            Self::None => {}
            Self::Plain(wire) => wire.enlarge(),
            Self::Tls(stream) => stream.sock.enlarge(),
        }
    }
}

impl Read for Link {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::None => Ok(0),
            Self::Plain(wire) => wire.read(bytes),
            Self::Tls(stream) => stream.read(bytes),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::None => Ok(0),
            Self::Plain(wire) => wire.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const BULK: usize = 256 * 1024;

/// A socket that is read in large pieces, since rustls asks for 4 KiB at a time and the client is not to be the brake.
struct Wire {
    socket: TcpStream,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Wire {
    fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            bytes: vec![0; 8 * 1024],
            start: 0,
            end: 0,
        }
    }

    fn enlarge(&mut self) {
        self.bytes.resize(BULK, 0);
    }
}

impl Read for Wire {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            self.end = self.socket.read(&mut self.bytes)?;
        }
        let count = bytes.len().min(self.end - self.start);
        bytes[..count].copy_from_slice(&self.bytes[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.socket.write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
