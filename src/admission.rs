//! Whether there is room for a client whom a PROXY header named: asked by the process that read it, answered by the listener.
//!
//! The listener counts clients by source, but keeps its privileges and so does not look at what came from the network. It is
//! told an address: a record of fixed size.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::error::Error;
use crate::sys;

/// A family (4 or 6), and the address with zeros behind it.
const RECORD_LENGTH: usize = 1 + 16;
const GRANTED: u8 = 1;
const REFUSED: u8 = 0;
/// How long the listener may take, in seconds: it answers between two clients, and may be waiting for a keeper that is to be the next
/// one, and for getent(1).
const ANSWER_SECONDS: i64 = 25;

/// The network process's side.
#[derive(Debug)]
pub(crate) struct Applicant(OwnedFd);

/// The listener's side.
#[derive(Debug)]
pub(crate) struct Application(OwnedFd);

/// What came from the network process.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Wish {
    /// Room for a client at this address.
    Room(IpAddr),
    /// Nothing, for good: it has ended, or what it said makes no sense.
    Nothing,
    /// Nothing yet.
    NotYet,
}

/// What the listener says to an applicant.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Answer {
    Granted,
    /// Which it has logged.
    Refused,
    /// Nothing in time.
    Silence,
}

/// Both sides, for one connection.
///
/// # Errors
/// `System` if there is no socket to be had.
pub(crate) fn pair() -> Result<(Applicant, Application), Error> {
    pair_with(TimeVal::seconds(ANSWER_SECONDS))
}

fn pair_with(patience: TimeVal) -> Result<(Applicant, Application), Error> {
    let failed =
        |error: nix::Error| Error::system("cannot make the listener's socket", error.desc());
    let kind = SockType::SeqPacket;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).map_err(failed)?;
    setsockopt(&ours, sockopt::ReceiveTimeout, &patience).map_err(failed)?;
    Ok((Applicant(ours), Application(theirs)))
}

impl Applicant {
    /// The descriptor that must stay open for it.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Whether there is room for a client at this address. A listener that is gone counts nobody.
    pub(crate) fn ask(self, address: IpAddr) -> Answer {
        let mut answer = [REFUSED; 1];
        let number = self.0.as_raw_fd();
        let wish = encode(address);
        if sys::uninterrupted(|| send(number, &wish, MsgFlags::MSG_NOSIGNAL)).is_err() {
            return Answer::Granted;
        }
        match sys::uninterrupted(|| recv(number, &mut answer, MsgFlags::empty())) {
            Ok(0) => Answer::Granted,
            Ok(_) if answer == [GRANTED] => Answer::Granted,
            Ok(_) => Answer::Refused,
            Err(_) => Answer::Silence,
        }
    }
}

impl Application {
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Never waits.
    pub(crate) fn wish(&self) -> Wish {
        let mut record = [0; RECORD_LENGTH + 1];
        match recv(self.0.as_raw_fd(), &mut record, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => match record.get(..length).and_then(decode) {
                Some(address) => Wish::Room(address),
                None => Wish::Nothing,
            },
            Err(Errno::EAGAIN | Errno::EINTR) => Wish::NotYet,
            Err(_) => Wish::Nothing,
        }
    }

    /// One that has ended meanwhile needs no answer.
    pub(crate) fn answer(self, is_granted: bool) {
        let answer = if is_granted { GRANTED } else { REFUSED };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = sys::uninterrupted(|| send(self.0.as_raw_fd(), &[answer], flags));
    }
}

fn encode(address: IpAddr) -> [u8; RECORD_LENGTH] {
    let mut record = [0; RECORD_LENGTH];
    let octets: &[u8] = match address {
        IpAddr::V4(address) => &[&[4], address.octets().as_slice()].concat(),
        IpAddr::V6(address) => &[&[6], address.octets().as_slice()].concat(),
    };
    for (to, from) in record.iter_mut().zip(octets) {
        *to = *from;
    }
    record
}

/// Security: whoever wrote it may be an attacker in the network process's place. It is an address or nothing.
fn decode(record: &[u8]) -> Option<IpAddr> {
    let (&family, octets) = record.split_first()?;
    let octets: [u8; 16] = octets.try_into().ok()?;
    match (family, octets) {
        (4, [a, b, c, d, rest @ ..]) if rest == [0; 12] => Some(IpAddr::from([a, b, c, d])),
        (6, octets) => Some(IpAddr::from(octets)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_comes_through_and_nothing_else() {
        for text in ["192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(decode(&encode(address)), Some(address));
        }
        let good = encode(IpAddr::from([192, 0, 2, 7]));
        for at in 0..good.len() {
            assert_eq!(decode(&good[..at]), None);
        }
        assert_eq!(decode(&[good.as_slice(), &[0]].concat()), None);
        let mut odd = good;
        odd[16] = 1;
        assert_eq!(decode(&odd), None);
        odd[0] = 5;
        assert_eq!(decode(&odd), None);
    }

    #[test]
    fn the_answer_is_the_listeners_as_long_as_there_is_one() {
        let address = IpAddr::from([192, 0, 2, 7]);
        for (granted, answer) in [(true, Answer::Granted), (false, Answer::Refused)] {
            let (applicant, application) = pair().unwrap();
            assert_eq!(application.wish(), Wish::NotYet);
            let asking = std::thread::spawn(move || applicant.ask(address));
            let wish = loop {
                match application.wish() {
                    Wish::NotYet => std::thread::yield_now(),
                    wish => break wish,
                }
            };
            assert_eq!(wish, Wish::Room(address));
            application.answer(granted);
            assert_eq!(asking.join().unwrap(), answer);
        }
        let (applicant, application) = pair().unwrap();
        drop(applicant);
        assert_eq!(application.wish(), Wish::Nothing);
        let (applicant, application) = pair().unwrap();
        drop(application);
        assert_eq!(applicant.ask(address), Answer::Granted);
        let (applicant, application) = pair_with(TimeVal::seconds(1)).unwrap();
        assert_eq!(applicant.ask(address), Answer::Silence);
        drop(application);
    }
}
