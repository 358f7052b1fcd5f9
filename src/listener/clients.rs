//! Clients as they arrive: accepted, counted, refused or given a process.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrStorage, getpeername, send};

use super::table::{Full, Source};
use super::{Listener, Service, Started};
use crate::activation::inet;
use crate::admission::Wish;
use crate::sys;

/// How many clients are accepted before something else is looked at.
const ACCEPTS: usize = 32;
/// How long accepting pauses when the system has nothing to give.
const PAUSE: Duration = Duration::from_millis(100);

impl<S: Service> Listener<'_, S> {
    /// Takes clients from the socket of this number.
    pub(super) fn accept_from(&mut self, number: usize) {
        for _ in 0..ACCEPTS {
            if self.paused_until.is_some() {
                return;
            }
            let Some(socket) = self.sockets.descriptors().nth(number) else {
                return;
            };
            match sys::accept(socket) {
                Ok(client) => {
                    self.next_client = Some(client);
                    self.start_next_client();
                }
                Err(Errno::EAGAIN) => return,
                // The client's network had something to say, or it has gone (accept(2)).
                Err(
                    Errno::ECONNABORTED
                    | Errno::EHOSTDOWN
                    | Errno::EHOSTUNREACH
                    | Errno::EINTR
                    | Errno::ENETDOWN
                    | Errno::ENETUNREACH
                    | Errno::ENONET
                    | Errno::ENOPROTOOPT
                    | Errno::EOPNOTSUPP
                    | Errno::EPROTO,
                ) => {}
                Err(error) => self.pause(format!("cannot accept a client: {}", error.desc())),
            }
        }
    }

    /// Gives the client a process, or refuses it. Where there is none to be had it waits, and those behind it at the socket.
    pub(super) fn start_next_client(&mut self) {
        let Some(client) = &self.next_client else {
            return;
        };
        let address = match address(client.as_fd()) {
            Ok(address) => address,
            Err(error) => {
                if error != Errno::ENOTCONN {
                    let reason = error.desc();
                    self.log
                        .error(format!("cannot learn a client's address: {reason}"));
                }
                self.next_client = None;
                return;
            }
        };
        let limits = self.service.listening();
        // A balancer is no source.
        let address = address.filter(|_| !self.service.has_balancers());
        let source = address.map(|address| Source::of(address, limits.prefixes));
        if !self.has_keeper {
            return self.refuse(source, self.service.goodbye(), "there is no keeper");
        }
        if let Err(full) = self.table.admit(source, limits) {
            return self.refuse(source, self.service.refusal(), reason(full));
        }
        match self.service.start(&mut self.next_client, self.log) {
            Ok(Started {
                application,
                process,
            }) => {
                self.next_client = None;
                self.table.add(process, source);
                self.applications
                    .extend(application.map(|application| (process, application)));
                if self.fault.take().is_some() {
                    self.log.info("accepting clients again");
                }
            }
            Err(error) => self.pause(error.to_string()),
        }
    }

    /// Those who have found out who their client is are told whether there is room for it.
    pub(super) fn answer_applications(&mut self) {
        for (process, application) in std::mem::take(&mut self.applications) {
            let source = match application.wish() {
                Wish::NotYet => {
                    self.applications.push((process, application));
                    continue;
                }
                Wish::Nothing => continue,
                Wish::Room(address) => Source::of(address, self.service.listening().prefixes),
            };
            let is_granted = match self.table.admit_from(source, self.service.listening()) {
                Ok(()) => {
                    self.table.settle(process, source);
                    true
                }
                Err(full) => {
                    self.note_refusal(Some(source), reason(full));
                    false
                }
            };
            application.answer(is_granted);
        }
    }

    fn pause(&mut self, fault: String) {
        if self.fault.as_ref() != Some(&fault) {
            self.log
                .error(format_args!("{fault}: accepting clients more slowly"));
            self.fault = Some(fault);
        }
        self.paused_until = Some(Instant::now() + PAUSE);
    }

    /// The same where a connection's process found the system short of something, which it has logged.
    ///
    /// Security: a pause that there is already is not made longer, so that those that say so, whatever made them, keep nobody out.
    pub(super) fn pause_briefly(&mut self) {
        self.paused_until
            .get_or_insert_with(|| Instant::now() + PAUSE);
    }

    fn refuse(&mut self, source: Option<Source>, text: &[u8], why: &str) {
        if let Some(client) = self.next_client.take() {
            // Nothing was read, so nothing is known of it; it may be gone.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let _ = send(client.as_raw_fd(), text, flags);
        }
        self.note_refusal(source, why);
    }

    fn note_refusal(&mut self, source: Option<Source>, why: &str) {
        self.table.refused += 1;
        let unknown = if self.service.has_balancers() {
            "a balancer's client"
        } else {
            "unix"
        };
        let source = source.map_or_else(|| unknown.to_owned(), |source| source.to_string());
        self.refusals
            .note(self.log, format_args!("refused {source}: {why}"));
    }
}

fn reason(full: Full) -> &'static str {
    match full {
        Full::Altogether => "there is no room (--max-connections)",
        Full::Source => "there are too many from there (--max-per-source)",
    }
}

/// Where the client is, as far as the kernel knows; none for a unix socket.
///
/// # Errors
/// As getpeername(2): `ENOTCONN` where the client has gone already, and with it all that it may have sent. A process for it would count
/// for no source.
fn address(client: BorrowedFd<'_>) -> nix::Result<Option<IpAddr>> {
    let address = getpeername::<SockaddrStorage>(client.as_raw_fd())?;
    Ok(inet(&address).map(|address| address.ip()))
}
