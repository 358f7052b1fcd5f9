//! One keeper for many connections, under the listener or as a service: each network process has a socket of its own to it, and
//! permits of its own, so that none can disturb or observe another.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::c_int;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, send, sendmsg,
};

use super::message::{REQUEST_LIMIT, Reply};
use super::process::{Asker, Keeper};
use crate::error::EXIT_TEMPORARY;
use crate::sys;

/// How epoll calls the socket to whoever started this keeper; the askers are numbered from 2.
const CONTROL: u64 = 0;
/// The same for the service's door.
const DOOR: u64 = 1;
/// How many events are taken at once.
const EVENTS: usize = 64;
/// What goes with each descriptor that is handed over: a message without an octet could not be told from end of file.
const HANDOVER: [u8; 1] = [1];

/// Hands a connection's end of a new socket to the keeper. Never waits.
///
/// # Errors
/// As sendmsg(2): `EAGAIN` where the keeper has not kept up, `EPIPE` where it has ended.
pub(super) fn hand_over(control: BorrowedFd<'_>, socket: &OwnedFd) -> nix::Result<()> {
    let descriptors = [socket.as_raw_fd()];
    sendmsg::<()>(
        control.as_raw_fd(),
        &[IoSlice::new(&HANDOVER)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        None,
    )
    .map(drop)
}

/// Takes what was handed over; `None` at the end of file. The inner one is `None` where no descriptor could be had.
fn take_over(control: BorrowedFd<'_>) -> nix::Result<Option<Option<OwnedFd>>> {
    let mut octet = [0; HANDOVER.len()];
    let mut parts = [IoSliceMut::new(&mut octet)];
    let mut room = nix::cmsg_space!(RawFd);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(control.as_raw_fd(), &mut parts, Some(&mut room), flags)?;
    if message.bytes == 0 {
        return Ok(None);
    }
    // An error here is a message cut short: there are no more descriptors, and its sender sees the end of file.
    let taken = message.cmsgs().ok().and_then(|parts| {
        let received = parts.flat_map(|part| match part {
            ControlMessageOwned::ScmRights(numbers) => numbers,
            _ => Vec::new(),
        });
        received.map(sys::own_received).last()
    });
    Ok(Some(taken))
}

/// How long nobody is let in when the system has nothing to give.
const PAUSE: Duration = Duration::from_millis(100);

/// Where network processes come in by themselves.
#[derive(Debug)]
pub(super) struct Door {
    /// How many there may be at a time. The others wait outside.
    pub(super) most: usize,
    /// A socket that is listened on.
    pub(super) socket: OwnedFd,
}

/// A door, and whether anybody looks who is there.
struct Entrance {
    door: Door,
    is_paused: bool,
    is_watched: bool,
}

/// A network process, as the keeper sees it.
struct Connection {
    asker: Asker,
    socket: OwnedFd,
}

/// Everybody who may ask.
struct Askers<'a> {
    connections: BTreeMap<u64, Connection>,
    epoll: &'a Epoll,
    next: u64,
}

/// Answers everybody until whoever started this keeper and the last connection have let go; returns the exit status.
pub(super) fn answer(
    keeper: &Keeper<'_>,
    control: &OwnedFd,
    epoll: &Epoll,
    door: Option<Door>,
) -> u8 {
    let mut askers = Askers {
        connections: BTreeMap::new(),
        epoll,
        next: DOOR + 1,
    };
    let mut entrance = door.map(|door| Entrance {
        door,
        is_paused: false,
        is_watched: false,
    });
    let mut is_starter_there = epoll.add(control, readable(CONTROL)).is_ok();
    let mut events = [EpollEvent::empty(); EVENTS];
    // One octet more than the limit, so that a request over it is seen to be too long and not cut to fit.
    let mut buffer = vec![0; REQUEST_LIMIT + 1];
    while is_starter_there || !askers.connections.is_empty() {
        let mut limit = None;
        if let Some(entrance) = &mut entrance {
            if entrance.mind(epoll, askers.connections.len()).is_err() {
                return EXIT_TEMPORARY;
            }
            limit = std::mem::take(&mut entrance.is_paused).then_some(PAUSE);
        }
        let count = match sys::wait_for_events(epoll, &mut events, limit) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return EXIT_TEMPORARY,
        };
        // One request of each in a round: nobody waits longer than the others take.
        for event in events.iter().take(count) {
            match event.data() {
                CONTROL => {
                    // The service has nothing to hand over: it has let go.
                    is_starter_there = entrance.is_none() && askers.admit(keeper, control);
                    if !is_starter_there && epoll.delete(control).is_err() {
                        return EXIT_TEMPORARY;
                    }
                    // Who is outside is another keeper's.
                    let left = entrance.take();
                    if left.is_some_and(|entrance| entrance.leave(epoll).is_err()) {
                        return EXIT_TEMPORARY;
                    }
                }
                DOOR => {
                    if let Some(entrance) = &mut entrance {
                        entrance.let_in(keeper, &mut askers);
                    }
                }
                number => askers.serve(number, keeper, &mut buffer),
            }
            // Another keeper is started, with another opener.
            if keeper.has_lost_opener() {
                return EXIT_TEMPORARY;
            }
        }
    }
    0
}

fn readable(number: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN, number)
}

impl Entrance {
    /// Looks who is there while there is room.
    fn mind(&mut self, epoll: &Epoll, count: usize) -> nix::Result<()> {
        let has_room = count < self.door.most && !self.is_paused;
        if has_room != self.is_watched {
            if has_room {
                epoll.add(&self.door.socket, readable(DOOR))?;
            } else {
                epoll.delete(&self.door.socket)?;
            }
            self.is_watched = has_room;
        }
        Ok(())
    }

    /// Nobody looks any more. Closing the socket would not end that, while others have it open, too.
    fn leave(self, epoll: &Epoll) -> nix::Result<()> {
        if self.is_watched {
            epoll.delete(&self.door.socket)?;
        }
        Ok(())
    }

    /// Lets in who is there, one in a round.
    fn let_in(&mut self, keeper: &Keeper<'_>, askers: &mut Askers<'_>) {
        match sys::accept(self.door.socket.as_fd()) {
            Ok(socket) => askers.add(keeper.new_asker(), socket),
            // Another keeper was quicker, or whoever was there has gone.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(_) => self.is_paused = true,
        }
    }
}

impl Askers<'_> {
    fn add(&mut self, asker: Asker, socket: OwnedFd) {
        // Where it cannot be watched it is closed, and the network process told by that.
        if self.epoll.add(&socket, readable(self.next)).is_ok() {
            self.connections
                .insert(self.next, Connection { asker, socket });
            self.next += 1;
        }
    }

    /// Admits one more; returns whether the listener is still there.
    fn admit(&mut self, keeper: &Keeper<'_>, control: &OwnedFd) -> bool {
        match take_over(control.as_fd()) {
            Ok(Some(Some(socket))) => {
                self.add(keeper.new_asker(), socket);
                true
            }
            Ok(Some(None)) | Err(Errno::EAGAIN | Errno::EINTR) => true,
            Ok(None) | Err(_) => false,
        }
    }

    /// Answers one request. Who asks for what is refused, or does not take its answer, is let go of.
    fn serve(&mut self, number: u64, keeper: &Keeper<'_>, buffer: &mut [u8]) {
        let Some(connection) = self.connections.get_mut(&number) else {
            return;
        };
        if !connection.serve(keeper, buffer) {
            // Closing it ends its being watched.
            self.connections.remove(&number);
        }
    }
}

impl Connection {
    /// Returns whether more may be asked.
    fn serve(&mut self, keeper: &Keeper<'_>, buffer: &mut [u8]) -> bool {
        let number: c_int = self.socket.as_raw_fd();
        let bytes = match recv(number, buffer, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN | Errno::EINTR) => return true,
            Ok(0) | Err(_) => return false,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
        };
        let reply = keeper.reply(&mut self.asker, bytes);
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let refused = Reply::Refused.encode();
        let answer = reply.as_deref().unwrap_or(&refused);
        let is_sent = sys::uninterrupted(|| send(number, answer, flags)).is_ok();
        reply.is_ok() && is_sent
    }
}
