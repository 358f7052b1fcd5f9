//! Test support: a relay between peers in the same process, driven step by step, with a clock that jumps.
//!
//! Whoever drives it has the other ends of all sockets and plays client, backends, launchers, connector and keeper. Nothing waits:
//! the relay runs until it would, and time passes when it is told to.
// Beyond the library for fuzz targets, which use all of it; and a test may fail loudly.
#![cfg_attr(not(fuzzing), allow(dead_code, unreachable_pub))]
#![allow(missing_docs, clippy::expect_used, clippy::panic)]

use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::unistd::Pid;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use super::children::Children;
use super::connecting::Remote;
use super::flow::Phase;
use super::{BackendSource, Parts, Relay};
use crate::backend::{Backend, Launcher};
use crate::channel::Channel;
use crate::connector::{Connector, Target};
use crate::imap::Policy;
use crate::keeper::KeeperClient;
use crate::log::Log;
use crate::sys::{self, ChildEnd};
use crate::tls::{
    Certified, NoKeeper, OldestVersion, Settings, Tls, TlsServer, UnknownName, examine_processor,
};

/// Where the backend comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Source {
    Connectors,
    Descriptor,
    Launchers,
}

/// What kind of connection this is.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The size of all sockets' buffers, where it is not the system's.
    pub buffer: Option<usize>,
    pub policy: Policy,
    pub source: Source,
}

/// The other ends of a backend, and of what starts it.
#[derive(Debug)]
pub struct Start {
    pub backend: UnixStream,
    /// To the launcher or the connector; none with a descriptor.
    pub control: Option<OwnedFd>,
}

/// The other ends of everything.
#[derive(Debug)]
pub struct Peers {
    pub client: UnixStream,
    /// The backend of the cleartext phase; with a descriptor, the only one. Under `required` it is never started.
    pub cleartext: Start,
    pub keeper: OwnedFd,
    /// Where log lines arrive.
    pub log: UnixDatagram,
    /// The backend of the TLS phase; none with a descriptor.
    pub secured: Option<Start>,
}

/// How far a session is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    Cleartext,
    Handshake,
    Opaque,
    Secured,
}

/// What is queued, in octets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Queued {
    pub for_backend: usize,
    pub for_client: usize,
}

/// A relay that was begun.
pub struct Driven<'a> {
    relay: Box<Relay<'a>>,
    is_over: bool,
}

/// Processes that do not exist: beyond what a kernel numbers (`PID_MAX_LIMIT`).
const CLEARTEXT_PROCESS: Pid = Pid::from_raw((1 << 22) + 1);
const SECURED_PROCESS: Pid = Pid::from_raw((1 << 22) + 2);

/// How often the relay may be woken by one event: more is a loop that makes no progress.
const ROUNDS: usize = 4096;

/// Begins a session and lets it be played.
pub fn drive<T>(setup: &Setup, play: impl FnOnce(&mut Driven<'_>, Peers) -> T) -> T {
    let (client, clients) = pair(setup.buffer);
    let (keeper, keepers) = messages();
    let (log, logs) = UnixDatagram::pair().expect("sockets");
    let cleartext = Start::make(setup);
    let secured = (setup.source != Source::Descriptor).then(|| Start::make(setup));
    let (secured_ours, secured) = secured.unzip();
    let peers = Peers {
        client: clients,
        cleartext: cleartext.1,
        keeper: keepers,
        log: logs,
        secured,
    };
    logs_do_not_block(&peers.log);
    let children = Children::pretended().expect("a signalfd");
    let mut channel = Channel::new(client.into(), None);
    let keeper = KeeperClient::with(keeper);
    let log = Log::to_socket(log.into());
    let parts = Parts {
        addresses: None,
        backend: source(setup, cleartext.0, secured_ours),
        children: &children,
        client: &mut channel,
        handshake_timeout: Duration::from_secs(30),
        keeper: &keeper,
        log: &log,
        login_timeout: Duration::from_secs(120),
        policy: setup.policy,
        proxy: None,
        tls: tls(),
    };
    let mut relay = Relay::new(parts);
    relay.begin();
    let mut driven = Driven {
        relay,
        is_over: false,
    };
    play(&mut driven, peers)
}

impl Driven<'_> {
    /// Lets the relay run until it would wait; returns whether it is over.
    pub fn settle(&mut self) -> bool {
        let mut last = Vec::new();
        for _ in 0..ROUNDS {
            if self.is_over || !self.relay.advance() {
                self.is_over = true;
                return true;
            }
            let sources = self.look();
            if sources.is_empty() {
                return false;
            }
            self.relay.attend_to(&sources);
            last = sources;
        }
        let situation = self.relay.situation();
        panic!("the relay is woken again and again: {last:?}, {situation:?}");
    }

    /// What poll(2) has to say at once.
    fn look(&self) -> Vec<super::polling::Source> {
        let polled = sys::uninterrupted(|| self.relay.poll_for(Some(Duration::ZERO)));
        polled.expect("poll")
    }

    /// Lets time pass until the next deadline; returns whether there is one.
    pub fn pass_time(&mut self) -> bool {
        let Some(next) = self.relay.deadlines.next() else {
            return false;
        };
        let passed = next.saturating_duration_since(Instant::now());
        let deadlines = &mut self.relay.deadlines;
        for deadline in [
            &mut deadlines.connect,
            &mut deadlines.ending,
            &mut deadlines.handshake,
            &mut deadlines.linger,
            &mut deadlines.login,
        ] {
            *deadline = deadline.map(|deadline| deadline.checked_sub(passed).unwrap_or(deadline));
        }
        if !self.is_over {
            self.relay.attend_to(&[]);
        }
        true
    }

    /// So long without a byte that memory is given back.
    pub fn idle(&mut self) {
        self.relay.give_back_memory();
    }

    /// The process that serves the connection has ended with this status.
    pub fn end_backend_process(&mut self, secured: bool, status: u8) {
        let process = if secured {
            SECURED_PROCESS
        } else {
            CLEARTEXT_PROCESS
        };
        self.relay.ended.push((process, ChildEnd::Exited(status)));
        // What poll(2) has to say together with the signal.
        let sources = self.look();
        self.relay.note_backend_end();
        self.relay.attend_to(&sources);
    }

    /// SIGTERM.
    pub fn terminate(&mut self) {
        self.relay.terminate();
    }

    pub fn stage(&self) -> Stage {
        match self.relay.phase {
            Phase::Cleartext(_) => Stage::Cleartext,
            Phase::Handshake => Stage::Handshake,
            Phase::Opaque => Stage::Opaque,
            Phase::Secured(_) => Stage::Secured,
        }
    }

    /// Whether the client was told, or is about to be, that nothing more comes.
    pub fn has_closed_tls(&self) -> bool {
        self.relay.is_close_notify_sent
    }

    pub fn is_closing(&self) -> bool {
        self.relay.is_closing
    }

    pub fn queued(&self) -> Queued {
        Queued {
            for_backend: self.relay.to_backend.front().len(),
            for_client: self.relay.to_client.front().len(),
        }
    }

    /// The session line.
    pub fn report(&self) -> String {
        self.relay.report.to_string()
    }

    pub fn exit_status(&self) -> u8 {
        self.relay.report.exit_status()
    }
}

impl Start {
    /// Our ends and the others.
    fn make(setup: &Setup) -> ((UnixStream, Option<OwnedFd>), Self) {
        let (ours, backend) = pair(setup.buffer);
        let (our_control, control) = match setup.source {
            Source::Descriptor => (None, None),
            Source::Connectors | Source::Launchers => {
                let (ours, theirs) = messages();
                (Some(ours), Some(theirs))
            }
        };
        ((ours, our_control), Self { backend, control })
    }
}

type Ours = (UnixStream, Option<OwnedFd>);

fn source(setup: &Setup, cleartext: Ours, secured: Option<Ours>) -> BackendSource {
    let is_optional = setup.policy == Policy::Optional;
    match (setup.source, cleartext, secured) {
        (Source::Launchers, (clear, Some(clear_control)), Some((secure, Some(control)))) => {
            let launcher = |socket: UnixStream, control, process| {
                Launcher::pretended(Channel::new(socket.into(), None), control, process)
            };
            BackendSource::Launchers {
                cleartext: is_optional.then(|| launcher(clear, clear_control, CLEARTEXT_PROCESS)),
                secured: launcher(secure, control, SECURED_PROCESS),
            }
        }
        (Source::Connectors, (clear, Some(clear_control)), Some((secure, Some(control)))) => {
            let connector = |socket: UnixStream, control| {
                Connector::pretended(control, vec![Channel::new(socket.into(), None)])
            };
            BackendSource::Connectors {
                cleartext: is_optional.then(|| connector(clear, clear_control)),
                secured: connector(secure, control),
                remote: Remote {
                    header: None,
                    target: Target::Unix("/backend".into()),
                },
            }
        }
        (_, (socket, _), _) => BackendSource::Descriptor(Backend {
            channel: Channel::new(socket.into(), None),
            process: None,
        }),
    }
}

fn pair(buffer: Option<usize>) -> (UnixStream, UnixStream) {
    let (one, other) = UnixStream::pair().expect("sockets");
    if let Some(size) = buffer {
        for socket in [&one, &other] {
            setsockopt(socket, sockopt::SndBuf, &size).expect("a buffer size");
        }
    }
    // Only the other end: the relay's must do without.
    other.set_nonblocking(true).expect("a socket");
    (one, other)
}

fn messages() -> (OwnedFd, OwnedFd) {
    let flags = SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("sockets")
}

fn logs_do_not_block(log: &UnixDatagram) {
    log.set_nonblocking(true).expect("a socket");
}

/// With a key of its own, and a certificate that no client here looks at.
fn tls() -> Tls {
    static KEY: OnceLock<Arc<CertifiedKey>> = OnceLock::new();
    let key = KEY.get_or_init(|| {
        examine_processor();
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random);
        let key = PrivatePkcs8KeyDer::from(key.expect("a key").as_ref().to_vec());
        let key = rustls::crypto::ring::sign::any_supported_type(&PrivateKeyDer::Pkcs8(key));
        let certificate = CertificateDer::from(vec![0; 64]);
        Arc::new(CertifiedKey::new(vec![certificate], key.expect("a key")))
    });
    TlsServer::new(Settings {
        certificates: vec![Certified {
            key: key.clone(),
            names: vec!["localhost".to_owned()],
            ocsp_end: 0,
        }],
        client_auth: None,
        has_directory: false,
        keeper: Arc::new(NoKeeper),
        oldest_version: OldestVersion::Tls12,
        tickets: None,
        unknown_name: UnknownName::Default,
    })
    .and_then(|server| server.session())
    .expect("settings that work")
}
