//! A two-way byte stream over one socket or a pair of descriptors, never blocking and never changing `O_NONBLOCK`.
//!
//! Non-blocking mode belongs to the open file description, which the superserver, the backend or a shell may share (stunnel's
//! NEWS has the bug reports); so sockets are asked with `MSG_DONTWAIT`, and pipes only when poll(2) said that they will not block.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{MsgFlags, Shutdown};

use crate::sys;

/// One descriptor and what may be done with it without blocking.
#[derive(Debug)]
struct End {
    fd: OwnedFd,
    is_socket: bool,
}

/// A connection to a peer: the client or the backend.
#[derive(Debug)]
pub(crate) struct Channel {
    /// `None` once given up.
    input: Option<End>,
    /// `None` where the input is a socket that serves both directions.
    output: Option<End>,
    is_pair: bool,
    is_output_ended: bool,
}

/// What came of an attempt to read.
#[derive(Debug, Eq, PartialEq)]
pub(crate) enum Received {
    Bytes(usize),
    End,
    Later,
}

/// A pipe with room, as poll(2) sees it, takes this many octets without blocking (`PIPE_BUF`, pipe(7)).
const PIPE_PIECE: usize = 4096;

impl Channel {
    /// One socket for both directions, or two descriptors where they are not the same file.
    pub(crate) fn new(input: OwnedFd, output: Option<OwnedFd>) -> Self {
        let end = |fd: OwnedFd| End {
            is_socket: is_socket(fd.as_fd()),
            fd,
        };
        Self {
            input: Some(end(input)),
            is_pair: output.is_some(),
            output: output.map(end),
            is_output_ended: false,
        }
    }

    /// A channel to nobody.
    pub(crate) fn closed() -> Self {
        Self {
            input: None,
            output: None,
            is_pair: false,
            is_output_ended: true,
        }
    }

    /// The descriptor to poll for reading.
    pub(crate) fn input(&self) -> Option<BorrowedFd<'_>> {
        self.input.as_ref().map(|end| end.fd.as_fd())
    }

    /// The descriptor to poll for writing, until the output was ended.
    pub(crate) fn output(&self) -> Option<BorrowedFd<'_>> {
        self.output_end().map(|end| end.fd.as_fd())
    }

    fn output_end(&self) -> Option<&End> {
        match (self.is_output_ended, self.is_pair) {
            (true, _) => None,
            (false, true) => self.output.as_ref(),
            (false, false) => self.input.as_ref(),
        }
    }

    /// Every descriptor still held.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.input
            .iter()
            .chain(&self.output)
            .map(|end| end.fd.as_fd())
    }

    /// Whether there is nothing to read: no octet, no end, no error.
    pub(crate) fn is_silent(&self) -> bool {
        let input = self.input();
        input.is_some_and(|fd| matches!(is_ready(fd, nix::poll::PollFlags::POLLIN), Ok(false)))
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// As read(2), other than `EAGAIN` and `EINTR`.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> io::Result<Received> {
        let Some(end) = &self.input else {
            return Ok(Received::End);
        };
        if buffer.is_empty() {
            return Ok(Received::Later);
        }
        let result = if end.is_socket {
            nix::sys::socket::recv(end.fd.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)
        } else if is_ready(end.fd.as_fd(), nix::poll::PollFlags::POLLIN)? {
            nix::unistd::read(&end.fd, buffer)
        } else {
            return Ok(Received::Later);
        };
        match result {
            Ok(0) => Ok(Received::End),
            Ok(count) => Ok(Received::Bytes(count)),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => Ok(Received::Later),
            Err(error) => Err(error.into()),
        }
    }

    /// Writes what fits now and returns how much that was.
    ///
    /// # Errors
    /// As write(2), other than `EAGAIN` and `EINTR`; `EPIPE` once the output was ended.
    pub(crate) fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let Some(end) = self.output_end() else {
            return Err(nix::errno::Errno::EPIPE.into());
        };
        if bytes.is_empty() {
            return Ok(0);
        }
        let result = if end.is_socket {
            nix::sys::socket::send(
                end.fd.as_raw_fd(),
                bytes,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            )
        } else if is_ready(end.fd.as_fd(), nix::poll::PollFlags::POLLOUT)? {
            nix::unistd::write(&end.fd, bytes.get(..PIPE_PIECE).unwrap_or(bytes))
        } else {
            return Ok(0);
        };
        match result {
            Ok(count) => Ok(count),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Has TCP acknowledge at once what was received, not with the next data (`TCP_QUICKACK`, tcp(7)). No matter where there
    /// is no TCP.
    pub(crate) fn acknowledge_now(&self) {
        if let Some(end) = self.input.as_ref().filter(|end| end.is_socket) {
            sys::acknowledge_now(end.fd.as_fd());
        }
    }

    /// Tells the peer that no more will come, and keeps reading: a half-close.
    pub(crate) fn end_output(&mut self) {
        if let Some(end) = self.output_end().filter(|end| end.is_socket) {
            // A peer that is gone already has its end of file.
            let _ = nix::sys::socket::shutdown(end.fd.as_raw_fd(), Shutdown::Write);
        }
        self.is_output_ended = true;
        self.output = None;
    }
}

/// Whether the descriptor is a socket.
pub(crate) fn is_socket(fd: BorrowedFd<'_>) -> bool {
    has_type(fd, libc::S_IFSOCK)
}

/// Whether the descriptor is a pipe.
pub(crate) fn is_pipe(fd: BorrowedFd<'_>) -> bool {
    has_type(fd, libc::S_IFIFO)
}

fn has_type(fd: BorrowedFd<'_>, kind: libc::mode_t) -> bool {
    nix::sys::stat::fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == kind)
}

/// Whether reading or writing would not block: an end of file or an error counts, the call itself reports it. Without an
/// event, whether the peer is gone.
///
/// # Errors
/// As poll(2), other than `EINTR`.
pub(crate) fn is_ready(fd: BorrowedFd<'_>, event: nix::poll::PollFlags) -> io::Result<bool> {
    let mut poll = [nix::poll::PollFd::new(fd, event)];
    let at_once = nix::sys::time::TimeSpec::new(0, 0);
    let count = sys::uninterrupted(|| nix::poll::ppoll(&mut poll, Some(at_once), None))?;
    Ok(count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_full_pipe_does_not_block_its_writer() {
        let (input, output) = nix::unistd::pipe().unwrap();
        let (other, _) = nix::unistd::pipe().unwrap();
        let channel = Channel::new(other, Some(output));
        let mut sent = 0;
        loop {
            match channel.send(&[b'x'; 10_000]).unwrap() {
                0 => break,
                count => sent += count,
            }
        }
        assert!(sent >= PIPE_PIECE);
        drop(input);
        assert_eq!(
            channel.send(b"x").unwrap_err().raw_os_error(),
            Some(libc::EPIPE)
        );
    }

    #[test]
    fn a_half_closed_socket_still_reads() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(ours.into(), None);
        let peer = Channel::new(theirs.into(), None);
        channel.end_output();
        let mut buffer = [0; 8];
        assert_eq!(peer.receive(&mut buffer).unwrap(), Received::End);
        assert_eq!(channel.receive(&mut buffer).unwrap(), Received::Later);
        assert_eq!(peer.send(b"late").unwrap(), 4);
        assert_eq!(channel.receive(&mut buffer).unwrap(), Received::Bytes(4));
        assert_eq!(
            channel.send(b"x").unwrap_err().raw_os_error(),
            Some(libc::EPIPE)
        );
    }

    #[test]
    fn the_blocking_mode_of_a_shared_descriptor_is_left_alone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let before = nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_GETFL).unwrap();
        let copy = ours.try_clone().unwrap();
        let channel = Channel::new(ours.into(), None);
        assert_eq!(channel.receive(&mut [0; 8]).unwrap(), Received::Later);
        drop(theirs);
        assert_eq!(
            nix::fcntl::fcntl(&copy, nix::fcntl::FcntlArg::F_GETFL).unwrap(),
            before
        );
    }
}
