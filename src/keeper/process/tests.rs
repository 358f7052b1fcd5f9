//! The keeper's answers over a real socket: what one handshake needs, and not one thing more.

use std::thread::JoinHandle;

use nix::sys::socket::SockType;
use ring::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls::SignatureScheme;

use super::super::signing::SIGN_LIMIT;
use super::super::tickets::{PLAINTEXT_LIMIT, TICKET_LIMIT};
use super::super::{receive_whole, socket_pair};
use super::*;

/// A keeper that answers in a thread, and our end of its socket.
struct Running {
    public_key: Vec<u8>,
    socket: OwnedFd,
    thread: JoinHandle<u8>,
}

impl Running {
    /// With one P-256 certificate.
    fn start(ticket_keys: Option<TicketKeys>) -> Self {
        let made = rcgen::generate_simple_self_signed(["mail.example".to_owned()]).unwrap();
        let bytes = bytes(&made, ticket_keys);
        let (socket, theirs) = socket_pair(SockType::SeqPacket, 10).unwrap();
        let thread = std::thread::spawn(move || {
            let (_, keeper) = Keeper::parse(bytes, None, Sandboxed::pretended()).unwrap();
            keeper.answer(&theirs)
        });
        Self {
            public_key: made.key_pair.public_key_raw().to_vec(),
            socket,
            thread,
        }
    }

    fn with_tickets() -> Self {
        Self::start(Some(ticket_keys()))
    }

    /// What it answers; `None` if it has ended.
    fn ask(&self, request: &[u8]) -> Option<Vec<u8>> {
        send(self.socket.as_raw_fd(), request, MsgFlags::MSG_NOSIGNAL).ok()?;
        receive_whole(self.socket.as_fd()).ok()
    }

    fn sign(&self, scheme: SignatureScheme, message: &[u8]) -> Vec<u8> {
        self.ask(&sign(0, scheme, message)).unwrap()
    }

    /// Its exit status after our end is closed.
    fn end(self) -> u8 {
        drop(self.socket);
        self.thread.join().unwrap()
    }

    /// This request is refused, and nothing is answered after it.
    fn refuses(self, request: &[u8], why: &str) {
        assert_eq!(self.ask(request), Some(Reply::Refused.encode()), "{why}");
        assert_eq!(self.ask(&good_sign()), None, "{why}");
        assert_eq!(self.end(), EXIT_TEMPORARY, "{why}");
    }
}

/// What a keeper with this certificate reads.
fn bytes(made: &rcgen::CertifiedKey, ticket_keys: Option<TicketKeys>) -> Bytes {
    let text = made.cert.pem() + &made.key_pair.serialize_pem();
    let certificate =
        Unparsed::of_one_file("both.pem".to_owned(), "--cert", text.into_bytes(), Ok(()));
    let tickets = tickets::Loaded {
        keys: ticket_keys,
        warnings: Vec::new(),
    };
    Bytes {
        binding: Some(b"binding".to_vec()),
        certificates: vec![certificate],
        ocsp: Vec::new(),
        tickets,
    }
}

const SCHEME: SignatureScheme = SignatureScheme::ECDSA_NISTP256_SHA256;

fn ticket_keys() -> TicketKeys {
    TicketKeys::from_text("5a01".repeat(16).as_bytes()).unwrap()
}

fn tls13_input() -> Vec<u8> {
    let context = b"TLS 1.3, server CertificateVerify\0".as_slice();
    [&[b' '; 64], context, &[7; 32]].concat()
}

fn sign(certificate: u8, scheme: SignatureScheme, message: &[u8]) -> Vec<u8> {
    let request = SignRequest {
        certificate,
        scheme,
        message,
    };
    Request::Sign(request).encode()
}

fn good_sign() -> Vec<u8> {
    sign(0, SCHEME, &tls13_input())
}

fn named(name: &str) -> Option<HostName> {
    HostName::new(name)
}

fn seal(session: &[u8]) -> Vec<u8> {
    let name = named("mail.example");
    Request::Seal { name, session }.encode()
}

fn open(name: &str, ticket: &[u8]) -> Vec<u8> {
    let name = named(name);
    Request::Open { name, ticket }.encode()
}

#[test]
fn one_handshake_is_served_and_the_end_of_file_is_the_end() {
    let keeper = Running::with_tickets();
    let sealed = keeper.ask(&seal(b"session")).unwrap();
    let Some(Reply::Sealed(ticket)) = Reply::decode(&sealed) else {
        panic!("{sealed:?}");
    };
    let opened = keeper.ask(&open("mail.example", ticket));
    assert_eq!(opened, Some(Reply::Opened(b"session").encode()));
    let message = tls13_input();
    let signed = keeper.sign(SCHEME, &message);
    let Some(Reply::Signed(signature)) = Reply::decode(&signed) else {
        panic!("{signed:?}");
    };
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &keeper.public_key)
        .verify(&message, signature)
        .unwrap();
    assert_eq!(keeper.end(), 0);
    // Also where nothing was ever asked.
    assert_eq!(Running::start(None).end(), 0);
}

#[test]
fn a_ticket_opens_under_its_own_name_and_binding_alone() {
    let keeper = Running::with_tickets();
    let sealed = keeper.ask(&seal(b"session")).unwrap();
    let Some(Reply::Sealed(ticket)) = Reply::decode(&sealed) else {
        panic!("{sealed:?}");
    };
    let nothing = Some(Reply::Nothing.encode());
    for name in ["other.example", "", "ail.example"] {
        assert_eq!(keeper.ask(&open(name, ticket)), nothing, "{name:?}");
    }
    let other = ticket_keys()
        .seal(b"another bindingmail.example", b"session", now())
        .unwrap();
    assert_eq!(keeper.ask(&open("mail.example", &other)), nothing);
    assert_eq!(keeper.end(), 0);
}

#[test]
fn what_is_no_request_is_refused_and_ends_the_keeper() {
    let long = |kind: u8, length: usize| [vec![kind, 0], vec![7; length]].concat();
    for (request, why) in [
        (vec![0], "no kind"),
        (vec![9, 1, 2, 3], "an unknown kind"),
        (vec![1], "a certificate for no name"),
        (b"\x01../secret".to_vec(), "a path for a name"),
        (long(2, TICKET_LIMIT + 1), "a ticket that is too large"),
        (long(3, PLAINTEXT_LIMIT + 1), "a session that is too large"),
        (long(2, REQUEST_LIMIT - 1), "a request that is too large"),
        (long(3, 60_000), "a request far too large"),
        (
            sign(0, SCHEME, &vec![b' '; SIGN_LIMIT]),
            "a sign request that is too large",
        ),
        (
            sign(0, SCHEME, b"a certificate to be signed"),
            "no signature input of TLS",
        ),
        (
            sign(0, SCHEME, &[tls13_input(), vec![7]].concat()),
            "an input that is longer",
        ),
        (sign(1, SCHEME, &tls13_input()), "a certificate never shown"),
        (sign(255, SCHEME, &tls13_input()), "a certificate far off"),
    ] {
        Running::with_tickets().refuses(&request, why);
    }
    for scheme in [
        SignatureScheme::ECDSA_NISTP384_SHA384,
        SignatureScheme::ED25519,
        SignatureScheme::RSA_PSS_SHA256,
        SignatureScheme::RSA_PKCS1_SHA256,
        SignatureScheme::ECDSA_SHA1_Legacy,
        SignatureScheme::Unknown(0xffff),
    ] {
        let request = sign(0, scheme, &tls13_input());
        Running::with_tickets().refuses(&request, &format!("{scheme:?}"));
    }
}

#[test]
fn a_truncated_request_is_refused_at_every_length() {
    let whole = good_sign();
    for length in 1..whole.len() {
        Running::start(None).refuses(&whole[..length], &format!("{length} octets"));
    }
}

#[test]
fn one_signature_is_all_that_there_is() {
    let keeper = Running::start(None);
    let signed = keeper.sign(SCHEME, &tls13_input());
    assert!(matches!(Reply::decode(&signed), Some(Reply::Signed(_))));
    keeper.refuses(&good_sign(), "a second signature");
}

#[test]
fn a_certificate_found_by_name_signs_once_and_is_let_go_of() {
    let made = rcgen::generate_simple_self_signed(["mail.example".to_owned()]).unwrap();
    let bytes = bytes(&made, None);
    let Held { key, .. } = store::parse(&bytes.certificates[0], &Sandboxed::pretended()).unwrap();
    let held = Arc::downgrade(&key);
    let (_, keeper) = Keeper::parse(bytes, None, Sandboxed::pretended()).unwrap();
    let mut asker = keeper.new_asker();
    asker.named = Some(key);
    let message = tls13_input();
    let reply = keeper.reply(&mut asker, &sign(1, SCHEME, &message));
    let Some(Reply::Signed(signature)) = reply.as_deref().ok().and_then(Reply::decode) else {
        panic!("no signature");
    };
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, made.key_pair.public_key_raw())
        .verify(&message, signature)
        .unwrap();
    assert!(held.upgrade().is_none());
}

#[test]
fn what_may_be_asked_for_several_times_is_refused_once_more() {
    let request = open("mail.example", b"none of ours");
    for (request, count) in [
        (request, super::super::OPENS),
        (seal(b"x"), super::super::SEALS),
    ] {
        let keeper = Running::with_tickets();
        for _ in 0..count {
            assert_ne!(keeper.ask(&request), Some(Reply::Refused.encode()));
        }
        keeper.refuses(&request, "one more");
    }
    let keeper = Running::with_tickets();
    let request = Request::Certificate(named("mail.example").unwrap()).encode();
    assert_eq!(keeper.ask(&request), Some(Reply::Nothing.encode()));
    keeper.refuses(&request, "a second certificate");
}

#[test]
fn without_ticket_keys_nothing_is_sealed_or_opened() {
    Running::start(None).refuses(&seal(b"session"), "seal");
    let ticket = ticket_keys()
        .seal(b"bindingmail.example", b"session", now())
        .unwrap();
    Running::start(None).refuses(&open("mail.example", &ticket), "open");
}

#[test]
fn more_certificates_than_a_message_holds_are_a_fault_that_says_so() {
    let introduction = |length| {
        let holding = super::super::message::Holding {
            chain: vec![vec![0; length]],
            ..Default::default()
        };
        let holdings = Holdings {
            certificates: vec![holding],
            ..Holdings::default()
        };
        bounded(&Introduction::Ready(holdings))
    };
    assert!(introduction(INTRODUCTION_LIMIT / 2).is_ok());
    let why = introduction(INTRODUCTION_LIMIT).unwrap_err().to_string();
    assert!(why.contains("--cert-dir"), "{why}");
}

/// A keeper service in a thread, and the way to it.
struct Serving {
    /// Whoever started it has this.
    control: OwnedFd,
    path: std::path::PathBuf,
    thread: JoinHandle<u8>,
}

impl Serving {
    /// With room for so many at a time.
    fn start(most: usize) -> Self {
        use nix::sys::epoll::EpollCreateFlags;
        use nix::sys::socket::{AddressFamily, Backlog, SockFlag, UnixAddr, bind, listen, socket};
        static NUMBER: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("imap-tls-keeper.{}.{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let door = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        bind(door.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        listen(&door, Backlog::MAXCONN).unwrap();
        let (control, theirs) = socket_pair(SockType::SeqPacket, 10).unwrap();
        let made = rcgen::generate_simple_self_signed(["mail.example".to_owned()]).unwrap();
        let bytes = Bytes {
            binding: None,
            ..bytes(&made, Some(ticket_keys()))
        };
        let thread = std::thread::spawn(move || {
            let (holdings, keeper) = Keeper::parse(bytes, None, Sandboxed::pretended()).unwrap();
            let keeper = Keeper {
                introduction: Introduction::Ready(holdings).encode(),
                ..keeper
            };
            let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
            let door = Door { most, socket: door };
            shared::answer(&keeper, &theirs, &epoll, Some(door))
        });
        Self {
            control,
            path,
            thread,
        }
    }

    /// One more network process, which has said what its tickets are bound to.
    fn come(&self, binding: &[u8]) -> super::super::KeeperClient {
        super::super::KeeperClient::connect(&self.path, binding).unwrap()
    }

    /// Its exit status, once it has been let go of.
    fn end(self) -> u8 {
        drop(self.control);
        std::fs::remove_file(&self.path).unwrap();
        self.thread.join().unwrap()
    }
}

fn ask(client: &super::super::KeeperClient, request: &[u8]) -> Option<Vec<u8>> {
    let asked = client.with_descriptor(|socket| {
        send(socket.as_raw_fd(), request, MsgFlags::MSG_NOSIGNAL).ok()?;
        receive_whole(socket).ok()
    });
    asked.unwrap()
}

#[test]
fn whoever_comes_to_the_service_begins_once() {
    let service = Serving::start(10);
    let client = service.come(b"binding");
    let offer = client.introduction().unwrap();
    assert_eq!(offer.certificates.len(), 1);
    let again = Request::Begin(b"another").encode();
    assert_eq!(ask(&client, &again), Some(Reply::Refused.encode()));
    assert_eq!(ask(&client, &good_sign()), None);
    assert_eq!(service.end(), 0);
}

#[test]
fn nothing_is_answered_before_the_beginning() {
    use nix::sys::socket::{AddressFamily, SockFlag, UnixAddr, connect, socket};
    let service = Serving::start(10);
    for request in [good_sign(), seal(b"session"), b"".to_vec(), vec![5; 100]] {
        let flags = SockFlag::SOCK_CLOEXEC;
        let ours = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        connect(ours.as_raw_fd(), &UnixAddr::new(&service.path).unwrap()).unwrap();
        send(ours.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL).unwrap();
        let answer = receive_whole(ours.as_fd()).ok();
        // An empty message is an end of file.
        let expected = (!request.is_empty()).then(|| Reply::Refused.encode());
        assert_eq!(answer, expected, "{request:?}");
    }
    assert_eq!(service.end(), 0);
}

#[test]
fn tickets_of_the_service_are_bound_to_what_was_said_in_the_beginning() {
    let service = Serving::start(10);
    let introduced = |binding| {
        let client = service.come(binding);
        client.introduction().unwrap();
        client
    };
    let sealed = ask(&introduced(b"i"), &seal(b"session")).unwrap();
    let Some(Reply::Sealed(ticket)) = Reply::decode(&sealed) else {
        panic!("no ticket");
    };
    for (binding, expected) in [
        (b"i".as_slice(), Reply::Opened(b"session")),
        (b"r", Reply::Nothing),
        (b"", Reply::Nothing),
        (b"im", Reply::Nothing),
    ] {
        let opened = ask(&introduced(binding), &open("mail.example", ticket));
        assert_eq!(opened, Some(expected.encode()), "{binding:?}");
    }
    assert_eq!(service.end(), 0);
}

#[test]
fn the_service_lets_in_as_many_as_there_is_room_for() {
    let service = Serving::start(2);
    let (first, second) = (service.come(b"i"), service.come(b"i"));
    first.introduction().unwrap();
    second.introduction().unwrap();
    let third = service.come(b"i");
    // Those inside are answered, and whoever waits outside is not.
    assert!(ask(&first, &seal(b"x")).is_some());
    assert!(
        third
            .with_descriptor(|socket| {
                matches!(
                    crate::channel::is_ready(socket, nix::poll::PollFlags::POLLIN),
                    Ok(false)
                )
            })
            .unwrap()
    );
    first.release();
    third.introduction().unwrap();
    drop((second, third));
    assert_eq!(service.end(), 0);
}

#[test]
fn a_service_that_was_let_go_of_answers_those_inside_and_nobody_else() {
    let service = Serving::start(2);
    let inside = service.come(b"i");
    inside.introduction().unwrap();
    let Serving {
        control,
        path,
        thread,
    } = service;
    drop(control);
    // Its door is closed with its first look at that, which it has before it answers this.
    assert!(ask(&inside, &good_sign()).is_some());
    while super::super::KeeperClient::connect(&path, b"i").is_ok() {}
    assert!(ask(&inside, &seal(b"x")).is_some());
    inside.release();
    assert_eq!(thread.join().unwrap(), 0);
    std::fs::remove_file(path).unwrap();
}
