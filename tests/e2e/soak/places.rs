//! The servers of a soak: every policy, in front of every kind of backend, in processes of their own and under the listener.

use super::{Dice, Limits};
use crate::connect_servers::{Dovecot, make_maildir};
use crate::harness::*;
use crate::interop;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs::kx_group;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What is behind the program.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    Scripted,
    Dovecot,
    /// It has one mailbox: well-behaved clients come one after the other.
    Mailutils,
}

/// One server.
pub struct Place {
    pub name: String,
    pub policy: &'static str,
    pub kind: Kind,
    /// It wants a PROXY header.
    pub has_balancer: bool,
    pub server: Server,
    /// Which of the certificates is in there changes from time to time.
    pub cert: PathBuf,
    pub settings: Option<PathBuf>,
    /// A listener whose keeper is the same all the time, so that what it loses for each connection adds up.
    pub is_steady: bool,
    /// What clients remember their sessions by.
    pub configs: Vec<Arc<ClientConfig>>,
    pub turn: Mutex<()>,
    /// From when to when there was no keeper.
    pub without_keeper: Mutex<Vec<(Instant, Instant)>>,
}

/// The users that the Dovecot knows: one for each thread, so that nobody else changes its mailbox.
pub fn users() -> Vec<String> {
    let clients = (0..super::CLIENTS.0).map(|number| format!("soak{number}"));
    let tools = (0..super::TOOLS.0).map(|number| format!("tool{number}"));
    clients.chain(tools).chain(["idle".to_owned()]).collect()
}

pub fn both_certificates(test: &Test) -> &'static [String; 2] {
    static BOTH: std::sync::OnceLock<[String; 2]> = std::sync::OnceLock::new();
    BOTH.get_or_init(|| {
        let other = Pki::make(&test.path("pki"), Key::P256, |_| {});
        [Pki::of(Key::P256), &other].map(|pki| {
            [&pki.cert, &pki.key]
                .map(|path| std::fs::read_to_string(path).unwrap())
                .concat()
        })
    })
}

/// In one step, as an administrator would.
pub fn replace(path: &std::path::Path, text: &str) {
    let new = path.with_extension("new");
    write_file(&new, text, 0o600);
    std::fs::rename(&new, path).unwrap();
}

pub fn start(test: &Test, limits: &Limits, dovecot: &Dovecot) -> Vec<Place> {
    interop::prepare_account(test);
    let mail = test.path("dovecot/mail");
    for user in users() {
        make_maildir(&mail.join(user));
    }
    let start = |superserver, policy, kind, has_balancer| {
        start_one(
            test,
            limits,
            dovecot,
            superserver,
            policy,
            kind,
            has_balancer,
        )
    };
    use Superserver::{Listener, Tcpserver, Xinetd};
    let mut places = vec![
        start(Tcpserver, "required", Kind::Scripted, false),
        start(Tcpserver, "optional", Kind::Mailutils, false),
        start(Tcpserver, "implicit", Kind::Dovecot, false),
        start(Listener, "required", Kind::Dovecot, false),
        start(Listener, "optional", Kind::Scripted, false),
        start(Listener, "implicit", Kind::Scripted, false),
        start(Listener, "required", Kind::Scripted, true),
    ];
    if tool::find("xinetd").is_some() {
        places.push(start(Xinetd, "implicit", Kind::Scripted, false));
    }
    places
}

fn start_one(
    test: &Test,
    limits: &Limits,
    dovecot: &Dovecot,
    superserver: Superserver,
    policy: &'static str,
    kind: Kind,
    has_balancer: bool,
) -> Place {
    let number = next_number();
    let cert = test.path(&format!("soak-{number}.pem"));
    replace(&cert, &both_certificates(test)[0]);
    let seconds = |time: std::time::Duration| time.as_secs().to_string();
    let mut program = Program::new(test)
        .tls(policy)
        .without("--key")
        .option("--cert", &cert)
        .option("--ticket-keys", test.path("tickets"))
        .option("--handshake-timeout", seconds(limits.handshake))
        .option("--login-timeout", seconds(limits.login));
    program = match kind {
        Kind::Scripted => program.play(&Backend::imap().with(&["--no-record"])),
        Kind::Dovecot => program
            .backend([""; 0])
            .option("--connect", dovecot.target())
            .option("--send-proxy", "v2"),
        Kind::Mailutils => {
            program.backend([tool::find("imap4d").unwrap().to_str().unwrap(), "--inetd"])
        }
    };
    if has_balancer {
        program = program
            .flag("--accept-proxy")
            .option("--proxy-from", "127.0.0.0/8");
    }
    let mut settings = None;
    if superserver.is_listener() {
        let path = test.path(&format!("soak-{number}.settings"));
        replace(&path, "");
        program = program
            .option("--settings", &path)
            .option("--renewal", seconds(limits.renewal));
        settings = Some(path);
    }
    let is_steady = superserver.is_listener() && policy == "implicit";
    if is_steady {
        program = program.option("--renewal", "86400");
    }
    let setup = (kind == Kind::Mailutils).then(|| interop::mailutils_setup(test));
    let balancer = if has_balancer {
        " behind a balancer"
    } else {
        ""
    };
    Place {
        name: format!("{superserver:?} {policy}{balancer}, {kind:?}"),
        policy,
        kind,
        has_balancer,
        server: Server::start_in(test, superserver, &program, setup.as_deref()),
        cert,
        settings,
        is_steady,
        configs: configs(),
        turn: Mutex::default(),
        without_keeper: Mutex::default(),
    }
}

/// Clients of several kinds, each with a memory for tickets.
fn configs() -> Vec<Arc<ClientConfig>> {
    let offer = TlsOffer::new(Pki::of(Key::P256));
    let offers = [
        offer.clone(),
        TlsOffer {
            versions: vec![&rustls::version::TLS12],
            ..offer.clone()
        },
        TlsOffer {
            groups: vec![kx_group::X25519],
            ..offer.clone()
        },
        TlsOffer {
            groups: vec![kx_group::SECP384R1],
            ..offer
        },
    ];
    let configs = offers.map(|offer| {
        let mut config = offer.config();
        config.resumption = Resumption::in_memory_sessions(32);
        Arc::new(config)
    });
    configs.into()
}

impl Place {
    pub fn user(&self, user: &str) -> (String, &'static str) {
        match self.kind {
            Kind::Scripted => ("u".to_owned(), "sekret"),
            Kind::Dovecot => (user.to_owned(), interop::PASSWORD),
            Kind::Mailutils => (interop::USER.to_owned(), interop::PASSWORD),
        }
    }

    /// What a balancer says first, for a client from anywhere.
    pub fn introduction(&self, dice: &mut Dice) -> Vec<u8> {
        if !self.has_balancer {
            return Vec::new();
        }
        let (one, two, port) = (dice.below(256), dice.below(256), dice.between(1024, 65535));
        format!("PROXY TCP4 10.{one}.{two}.7 192.0.2.1 {port} 143\r\n").into_bytes()
    }

    /// The network processes, by their clients' addresses.
    pub fn connections(&self) -> BTreeMap<SocketAddr, Process> {
        let sockets = sockets_on(self.server.port);
        let keeper = self.server.keeper();
        let children = self.server.process().children();
        let mut found = BTreeMap::new();
        for child in children {
            if Some(child) == keeper {
                continue;
            }
            for target in child.descriptors_if_alive() {
                if let Some(address) = sockets.get(&target) {
                    found.insert(*address, child);
                }
            }
        }
        found
    }

    /// Whether there was no keeper at some time between.
    pub fn had_no_keeper(&self, from: Instant, to: Instant) -> bool {
        let gaps = self.without_keeper.lock().unwrap();
        gaps.iter().any(|(begin, end)| from <= *end && *begin <= to)
    }

    /// Ends it; says what is wrong with that.
    pub fn end(mut self, _test: &Test) -> Option<String> {
        if !self.server.is_listener() {
            return None;
        }
        self.server.signal(libc::SIGTERM);
        let status = self.server.wait();
        (status.code() != Some(0)).then(|| format!("{}: ended with {status}", self.name))
    }
}

/// The sockets that were accepted on a port, as /proc names them, and whom they lead to.
pub fn sockets_on(port: u16) -> BTreeMap<String, SocketAddr> {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let lines = table.lines().skip(1);
    lines
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (local, remote, inode) = (words.get(1)?, words.get(2)?, words.get(9)?);
            let address = address(remote)?;
            (local.ends_with(&format!(":{port:04X}")) && address.port() != 0)
                .then(|| (format!("socket:[{inode}]"), address))
        })
        .collect()
}

/// `0100007F:1F90` is 127.0.0.1:8080.
fn address(text: &str) -> Option<SocketAddr> {
    let (host, port) = text.split_once(':')?;
    let host = u32::from_str_radix(host, 16).ok()?.to_ne_bytes();
    Some((host, u16::from_str_radix(port, 16).ok()?).into())
}
