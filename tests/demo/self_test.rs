//! A client for the demonstration: one session with STARTTLS, one with implicit TLS, each step checked.

use std::fmt::Display;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::Result;
use crate::certificate::Certificate;

/// Far more than a step needs; a hang is then a failure and not a hang.
const PATIENCE: Duration = Duration::from_secs(30);

/// Both sessions. `ended` gives the exit status of each imap-tls.
pub(crate) fn run(
    starttls_port: u16,
    implicit_port: u16,
    certificate: &Certificate,
    ended: &Receiver<ExitStatus>,
) -> Result<()> {
    println!("A session with STARTTLS:");
    let config = client_config(&certificate.authority)?;
    let mut cleartext = Dialogue {
        stream: connect(starttls_port)?,
    };
    cleartext.expect_line("* OK [CAPABILITY IMAP4rev1")?;
    cleartext.command("a1 CAPABILITY", "STARTTLS")?;
    cleartext.refused("a2 LOGIN demo demo", "NO [PRIVACYREQUIRED]")?;
    cleartext.command("a3 STARTTLS", "a3 OK")?;
    read_mail(start_tls(cleartext.stream, config.clone())?)?;
    expect_success(ended)?;

    println!("\nA session with implicit TLS:");
    let mut tls = start_tls(connect(implicit_port)?, config)?;
    tls.expect_line("* OK [CAPABILITY IMAP4rev1")?;
    read_mail(tls)?;
    expect_success(ended)?;

    println!("\nself-test: both sessions went as they should");
    Ok(())
}

fn expect_success(ended: &Receiver<ExitStatus>) -> Result<()> {
    let status = ended.recv_timeout(PATIENCE)?;
    check(status.success(), "exit status 0", &status)
}

/// What both sessions do once TLS stands.
fn read_mail(mut session: Dialogue<impl Read + Write>) -> Result<()> {
    session.command("b1 CAPABILITY", "AUTH=PLAIN")?;
    session.refused("b2 STARTTLS", "BAD")?;
    session.refused("b3 LOGIN demo wrong", "NO [AUTHENTICATIONFAILED]")?;
    session.command("b4 LOGIN demo demo", "b4 OK")?;
    session.command("b5 SELECT INBOX", "* 2 EXISTS")?;
    session.command("b6 FETCH 1 (FLAGS BODY[TEXT])", "knows nothing of TLS")?;
    session.command("b7 LOGOUT", "* BYE")?;
    session.expect_end()
}

fn connect(port: u16) -> Result<TcpStream> {
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// The provider is not the one imap-tls uses, so that two implementations meet; the post-quantum group comes first, as it
/// does in today's browsers.
fn client_config(authority: &std::path::Path) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(authority)?)?)?;
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
    ];
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"imap".to_vec()];
    Ok(Arc::new(config))
}

type TlsStream = StreamOwned<ClientConnection, TcpStream>;

fn start_tls(mut stream: TcpStream, config: Arc<ClientConfig>) -> Result<Dialogue<TlsStream>> {
    let mut connection = ClientConnection::new(config, ServerName::try_from("localhost")?)?;
    while connection.is_handshaking() {
        connection.complete_io(&mut stream)?;
    }
    let version = connection
        .protocol_version()
        .and_then(|version| version.as_str())
        .unwrap_or("?");
    let group = connection
        .negotiated_key_exchange_group()
        .ok_or("no key exchange")?
        .name();
    let cipher = connection
        .negotiated_cipher_suite()
        .ok_or("no cipher suite")?
        .suite();
    println!("   (TLS stands: {version}, {group:?}, {cipher:?})");
    Ok(Dialogue {
        stream: StreamOwned::new(connection, stream),
    })
}

/// A conversation that is printed as it goes.
struct Dialogue<S> {
    stream: S,
}

impl<S: Read + Write> Dialogue<S> {
    /// Sends a command whose answer must be OK, and must have `expected` in it.
    fn command(&mut self, command: &str, expected: &str) -> Result<()> {
        let (answer, last) = self.exchange(command)?;
        let (tag, _) = command.split_once(' ').ok_or("a command without a tag")?;
        check(last.starts_with(&format!("{tag} OK")), "OK", &last)?;
        check(answer.contains(expected), expected, &answer)
    }

    /// Sends a command whose answer must be the refusal `expected`, and nothing else.
    fn refused(&mut self, command: &str, expected: &str) -> Result<()> {
        let (answer, last) = self.exchange(command)?;
        let (tag, _) = command.split_once(' ').ok_or("a command without a tag")?;
        check(
            answer == last && last.starts_with(&format!("{tag} {expected}")),
            expected,
            &answer,
        )
    }

    /// Sends a command; gives the whole answer, and its last line, the tagged one.
    fn exchange(&mut self, command: &str) -> Result<(String, String)> {
        println!("C: {command}");
        self.stream.write_all(format!("{command}\r\n").as_bytes())?;
        self.stream.flush()?;
        let (tag, _) = command.split_once(' ').ok_or("a command without a tag")?;
        let mut answer = String::new();
        loop {
            let line = self.line()?;
            answer.push_str(&line);
            if line
                .strip_prefix(tag)
                .is_some_and(|rest| rest.starts_with(' '))
            {
                return Ok((answer, line));
            }
        }
    }

    fn expect_line(&mut self, expected: &str) -> Result<()> {
        let line = self.line()?;
        check(line.starts_with(expected), expected, &line)
    }

    /// Octet by octet: what follows the line may be TLS already.
    fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            let mut octet = [0];
            self.stream.read_exact(&mut octet)?;
            line.extend(octet);
        }
        let line = String::from_utf8(line)?;
        println!("S: {}", line.trim_end());
        Ok(line)
    }

    /// The server must have said close_notify: rustls reports an end of file without it as an error.
    fn expect_end(&mut self) -> Result<()> {
        match self.stream.read(&mut [0]) {
            Ok(0) => {
                println!("   (the server closed TLS, then the connection)");
                Ok(())
            }
            Ok(_) => Err("the server sent something after its goodbye".into()),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                Err("the connection ended without close_notify".into())
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn check(held: bool, expected: &str, found: &impl Display) -> Result<()> {
    if held {
        Ok(())
    } else {
        Err(format!(
            "self-test: expected {expected:?}, found {:?}",
            found.to_string()
        )
        .into())
    }
}
