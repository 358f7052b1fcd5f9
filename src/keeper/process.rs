//! The keeper's own story: read the files, enter the sandbox, only then parse them, answer until end of file.

use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::Arc;

use nix::sys::epoll::Epoll;
use nix::sys::socket::{MsgFlags, recv, send};
use rustls::sign::SigningKey;

use super::message::{Holdings, INTRODUCTION_LIMIT, Introduction, REQUEST_LIMIT, Reply, Request};
use super::opener::Opener;
use super::shared::Door;
use super::signing::SignRequest;
use super::store::{self, Held, Unparsed};
use super::tickets::{self, TicketKeys};
use super::{KeeperFiles, ocsp, shared};
use crate::clock;
use crate::error::{EXIT_SETUP, EXIT_TEMPORARY, Error};
use crate::files::{FILE_LIMIT, Place, any_mode, read};
use crate::host_name::HostName;
use crate::sandbox::{self, Plan, Role, Sandboxed};
use crate::sys;

/// For whom a keeper answers.
pub(super) enum Audience {
    /// The network process at the other end of the socket.
    One,
    /// Those whose sockets come over the socket, as the listener's connections begin.
    Many(Epoll),
    /// Those who come in at a door, until the socket is closed: the keeper service.
    Service(Epoll, Door),
}

/// The keeper's life; returns its exit status.
pub(super) fn run(
    socket: &OwnedFd,
    files: &KeeperFiles<'_>,
    opener: Option<&Opener>,
    plan: Plan,
    audience: Audience,
) -> u8 {
    let mut kept: Vec<_> = opener
        .map(Opener::descriptor)
        .into_iter()
        .chain([socket.as_fd()])
        .collect();
    let role = match &audience {
        Audience::One => Role::Keeper,
        Audience::Many(epoll) => {
            kept.push(epoll.0.as_fd());
            Role::SharedKeeper
        }
        Audience::Service(epoll, door) => {
            kept.extend([epoll.0.as_fd(), door.socket.as_fd()]);
            Role::KeeperService
        }
    };
    // What is read may lie where nobody answers (NFS), and then this process outlives its connection, whose sockets it must not hold.
    let read = plan.close_all_but(&kept).and_then(|()| Bytes::read(files));
    let keeper = read.and_then(|bytes| {
        let sandboxed = sandbox::enter(role, plan, &kept)?;
        Keeper::parse(bytes, opener, sandboxed)
    });
    let keeper = keeper.and_then(|(holdings, keeper)| {
        let introduction = Introduction::Ready(holdings);
        Ok((bounded(&introduction)?, introduction, keeper))
    });
    let (bytes, introduction, mut keeper) = match keeper {
        Ok(ready) => ready,
        Err(error) => {
            say(socket, &Introduction::Fault(error.to_string()).encode());
            return EXIT_SETUP;
        }
    };
    if !say(socket, &bytes) {
        return EXIT_TEMPORARY;
    }
    match audience {
        Audience::One => keeper.answer(socket),
        Audience::Many(epoll) => shared::answer(&keeper, socket, &epoll, None),
        Audience::Service(epoll, door) => {
            // Whoever started the service has logged the warnings: a line for each connection would hide others.
            keeper.introduction = introduction.without_warnings().encode();
            shared::answer(&keeper, socket, &epoll, Some(door))
        }
    }
}

/// The introduction, unless it is too long for a message.
fn bounded(introduction: &Introduction) -> Result<Vec<u8>, Error> {
    let bytes = introduction.encode();
    if bytes.len() <= INTRODUCTION_LIMIT {
        return Ok(bytes);
    }
    Err(Error::Setup(format!(
        "the certificate chains (--cert) and OCSP responses (--ocsp) have {} octets together, and {INTRODUCTION_LIMIT} is the limit: \
         name fewer, and use --cert-dir for certificates of many names",
        bytes.len()
    )))
}

/// What was read with privileges, and not looked at yet. Ticket keys are our own file, and no one else's to write.
struct Bytes {
    binding: Option<Vec<u8>>,
    certificates: Vec<Unparsed>,
    ocsp: Vec<(Place, Vec<u8>)>,
    tickets: tickets::Loaded,
}

impl Bytes {
    fn read(files: &KeeperFiles<'_>) -> Result<Self, Error> {
        let certificates = files.certificates.iter().map(Unparsed::read);
        let ocsp = files.ocsp.iter().map(|path| {
            let place = Place::new("OCSP response", path, "--ocsp");
            let bytes = read(path, &place, FILE_LIMIT, any_mode)?;
            Ok((place, bytes))
        });
        Ok(Self {
            binding: files.binding.map(<[u8]>::to_vec),
            certificates: certificates.collect::<Result<_, _>>()?,
            ocsp: ocsp.collect::<Result<_, _>>()?,
            tickets: files
                .ticket_keys
                .map(|path| tickets::load(path, now(), files.sealing))
                .unwrap_or_default(),
        })
    }
}

fn now() -> u64 {
    clock::now()
        .ok()
        .and_then(|seconds| seconds.try_into().ok())
        .unwrap_or(0)
}

/// A keeper in its sandbox.
pub(super) struct Keeper<'a> {
    /// What all tickets are bound to, if that is the same for all.
    binding: Option<Vec<u8>>,
    held: Vec<Held>,
    /// For those who begin; empty where nobody has to.
    introduction: Vec<u8>,
    opener: Option<&'a Opener>,
    sandboxed: Sandboxed,
    tickets: Option<TicketKeys>,
}

/// What one network process may still ask for, and the key of the certificate that it asked for by name, until it has signed: clients
/// that begin a handshake and fall silent shall not fill a shared keeper's memory. Nothing of one is ever seen by another.
pub(super) struct Asker {
    /// What its tickets are bound to, beside the name (RFC 9325 section 4.2.2 and CVE-2014-3616: virtual host confusion). `None` until
    /// it is known: till then nothing else is answered.
    binding: Option<Vec<u8>>,
    named: Option<Arc<dyn SigningKey>>,
    permits: Permits,
}

/// How often each thing may still be asked for: what one handshake needs, so that a hole in the network process does not make
/// an oracle of this one.
struct Permits {
    /// One certificate message.
    certificates: u8,
    /// Tickets that a client may offer: RFC 8446 section 4.2.11 allows many, clients send one or two.
    opens: u8,
    seals: u8,
    /// RFC 8446 section 4.4.3, RFC 8422 section 5.4.
    signatures: u8,
}

const PERMITS: Permits = Permits {
    certificates: 1,
    opens: super::OPENS,
    seals: super::SEALS,
    signatures: 1,
};

/// What there is for a name. The domain's file is the last that is looked at, so that nothing follows one that is passed over.
enum Found {
    Certificate(Held),
    Nothing,
    PassedOver(String),
}

/// An answer after which none is given any more: the honest network process asks for nothing that is refused.
pub(super) struct Refusal;

impl<'a> Keeper<'a> {
    fn parse(
        bytes: Bytes,
        opener: Option<&'a Opener>,
        sandboxed: Sandboxed,
    ) -> Result<(Holdings, Self), Error> {
        let held = bytes.certificates.iter();
        let mut held = held
            .map(|unparsed| store::parse(unparsed, &sandboxed))
            .collect::<Result<Vec<_>, _>>()?;
        let mut warnings = bytes.tickets.warnings;
        for (place, response) in bytes.ocsp {
            if let Err(why) = staple(&mut held, response) {
                warnings.push(format!("{place} is not used: {why}"));
            }
        }
        for (held, unparsed) in held.iter().zip(&bytes.certificates) {
            if held.demands_response && held.holding.ocsp.is_empty() {
                warnings.push(format!("{} {}", unparsed.certificate.0, ocsp::MISSING));
            }
        }
        let holdings = Holdings {
            certificates: held.iter().map(|held| held.holding.clone()).collect(),
            has_directory: opener.is_some(),
            has_ticket_keys: bytes.tickets.keys.is_some(),
            warnings,
        };
        let keeper = Self {
            binding: bytes.binding,
            held,
            introduction: Vec::new(),
            opener,
            sandboxed,
            tickets: bytes.tickets.keys,
        };
        Ok((holdings, keeper))
    }

    /// Answers until the network process lets go. A request too many or of another form is refused, and ends the keeper.
    fn answer(self, socket: &OwnedFd) -> u8 {
        let mut asker = self.new_asker();
        // One octet more than the limit, so that a request over it is seen to be too long and not cut to fit.
        let mut buffer = vec![0; REQUEST_LIMIT + 1];
        loop {
            let number = socket.as_raw_fd();
            let bytes = match sys::uninterrupted(|| recv(number, &mut buffer, MsgFlags::empty())) {
                Ok(0) => return 0,
                Ok(count) => buffer.get(..count).unwrap_or_default(),
                Err(_) => return EXIT_TEMPORARY,
            };
            let reply = self.reply(&mut asker, bytes);
            let is_sent = say(socket, reply.as_deref().unwrap_or(&Reply::Refused.encode()));
            if reply.is_err() || !is_sent || self.has_lost_opener() {
                return EXIT_TEMPORARY;
            }
        }
    }

    /// Somebody who may ask as much as one handshake needs.
    pub(super) fn new_asker(&self) -> Asker {
        Asker {
            binding: self.binding.clone(),
            named: None,
            permits: PERMITS,
        }
    }

    /// Whether this keeper had better be replaced.
    pub(super) fn has_lost_opener(&self) -> bool {
        self.opener.is_some_and(Opener::is_lost)
    }

    /// Answers one request.
    pub(super) fn reply(&self, asker: &mut Asker, bytes: &[u8]) -> Result<Vec<u8>, Refusal> {
        let permits = &mut asker.permits;
        let request = Request::decode(bytes).ok_or(Refusal)?;
        let Some(binding) = &asker.binding else {
            let Request::Begin(binding) = request else {
                return Err(Refusal);
            };
            asker.binding = Some(binding.to_vec());
            return Ok(self.introduction.clone());
        };
        let reply = match request {
            // There is but one beginning: whoever has heard a client chooses no other.
            Request::Begin(_) => return Err(Refusal),
            Request::Certificate(name) => {
                permit(&mut permits.certificates)?;
                match self.find(&name) {
                    Ok(Found::Certificate(held)) => {
                        asker.named = Some(held.key);
                        Reply::Certificate(held.holding).encode()
                    }
                    Ok(Found::Nothing) => Reply::Nothing.encode(),
                    Ok(Found::PassedOver(why)) => Reply::PassedOver(why).encode(),
                    Err(why) => Reply::Fault(why).encode(),
                }
            }
            Request::Open { name, ticket } => {
                permit(&mut permits.opens)?;
                let keys = self.tickets.as_ref().ok_or(Refusal)?;
                match keys.open(&context(binding, name.as_ref()), ticket, now()) {
                    Some(session) => Reply::Opened(&session).encode(),
                    None => Reply::Nothing.encode(),
                }
            }
            Request::Seal { name, session } => {
                permit(&mut permits.seals)?;
                let keys = self.tickets.as_ref().ok_or(Refusal)?;
                match keys.seal(&context(binding, name.as_ref()), session, now()) {
                    Some(ticket) => Reply::Sealed(&ticket).encode(),
                    None => Reply::Nothing.encode(),
                }
            }
            Request::Sign(request) => {
                permit(&mut permits.signatures)?;
                let signature = self.sign(asker, &request).ok_or(Refusal)?;
                Reply::Signed(&signature).encode()
            }
        };
        Ok(reply)
    }

    /// The certificate filed under the name, its wildcard or the wildcard's domain, if it is for that name.
    fn find(&self, name: &HostName) -> Result<Found, String> {
        let Some(opener) = self.opener else {
            return Ok(Found::Nothing);
        };
        for candidate in name.candidates() {
            // What is wrong with the domain's file is no fault of a name that it is not for: that may have another certificate.
            let is_domain = !name.is_covered_by(candidate.as_str());
            let unparsed = match opener.find(&candidate) {
                Ok(Some(unparsed)) => unparsed,
                Ok(None) => continue,
                Err(why) if is_domain && !opener.is_lost() => return Ok(Found::PassedOver(why)),
                Err(why) => return Err(why),
            };
            let is_for = store::is_for(&unparsed, name, &self.sandboxed);
            if is_domain && is_for == Some(false) {
                continue;
            }
            let held = match store::parse(&unparsed, &self.sandboxed) {
                Ok(held) => held,
                Err(error) if is_domain && is_for.is_none() => {
                    return Ok(Found::PassedOver(error.to_string()));
                }
                Err(error) => return Err(error.to_string()),
            };
            let mut names = held.holding.names.iter();
            if names.any(|pattern| name.is_covered_by(pattern)) {
                return Ok(Found::Certificate(held));
            }
            // What lies under a name and is not for it is a mistake; what lies under its domain may be for that alone.
            if candidate == *name {
                let place = &unparsed.certificate.0;
                let names = match held.holding.names.as_slice() {
                    [] => "no name".to_owned(),
                    names => names.join(", "),
                };
                return Err(format!("{place} is for {names}, not for that name"));
            }
        }
        Ok(Found::Nothing)
    }

    /// The certificate that was asked for by name has the place behind those of the introduction.
    ///
    /// Its key is let go of at once: there is no second signature, not after a HelloRetryRequest either, which comes before the first.
    fn sign(&self, asker: &mut Asker, request: &SignRequest<'_>) -> Option<Vec<u8>> {
        let named = asker.named.take();
        let mut all = self.held.iter().map(|held| &held.key).chain(&named);
        all.nth(usize::from(request.certificate))?
            .choose_scheme(&[request.scheme])?
            .sign(request.message)
            .ok()
    }
}

fn context(binding: &[u8], name: Option<&HostName>) -> Vec<u8> {
    let name = name.map_or("", HostName::as_str);
    [binding, name.as_bytes()].concat()
}

fn permit(left: &mut u8) -> Result<(), Refusal> {
    *left = left.checked_sub(1).ok_or(Refusal)?;
    Ok(())
}

/// Gives the response to the certificate that it is about.
fn staple(held: &mut [Held], response: Vec<u8>) -> Result<(), String> {
    let now = clock::now()?;
    let mut why = None;
    for held in held {
        let mut chain = held.holding.chain.iter();
        let Some(own) = chain.next() else { continue };
        match ocsp::check(&response, own, chain.next().map(Vec::as_slice), now) {
            Ok(fresh) => {
                held.holding.ocsp = response;
                held.holding.ocsp_end = fresh.next_update;
                return Ok(());
            }
            // Of several certificates, the one that it is about knows better.
            Err(reason) if reason == ocsp::ANOTHER => {
                why.get_or_insert(reason);
            }
            Err(reason) => why = Some(reason),
        }
    }
    Err(why.unwrap_or_else(|| "there is no certificate (--cert)".to_owned()))
}

fn say(socket: &OwnedFd, message: &[u8]) -> bool {
    sys::uninterrupted(|| send(socket.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL)).is_ok()
}

#[cfg(test)]
mod tests;
