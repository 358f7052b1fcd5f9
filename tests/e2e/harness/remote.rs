//! A scripted IMAP server that is connected to: it listens on a port or a unix socket, takes the PROXY header off each connection,
//! byte for byte, and has the scripted backend play on the rest.

use super::backend::Backend;
use super::client::{Client, PATIENCE};
use super::program::eventually;
use super::{Test, sys};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, listen, socket,
};
use std::fs::File;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a server expects before a connection's first byte.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Introduction {
    None,
    V1,
    V2,
}

/// Where a server listens.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A server that was started; it stops listening when dropped. Connections live on.
pub struct Remote {
    /// As `--connect` wants it.
    pub target: String,
    /// The headers of the connections, in the order in which they came.
    headers: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Closing it ends the thread.
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Remote {
    /// On a port of 127.0.0.1.
    pub fn tcp(test: &Test, introduction: Introduction, backend: &Backend) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap().to_string();
        Self::on(test, Listener::Tcp(listener), target, introduction, backend)
    }

    /// On a unix socket in the test's directory that everybody may use.
    pub fn unix(test: &Test, introduction: Introduction, backend: &Backend) -> Self {
        let path = unix_path(test);
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))
            .unwrap();
        let target = format!("unix:{}", path.display());
        Self::on(
            test,
            Listener::Unix(listener),
            target,
            introduction,
            backend,
        )
    }

    /// On a listener that is there already.
    pub fn on(
        test: &Test,
        listener: Listener,
        target: String,
        introduction: Introduction,
        backend: &Backend,
    ) -> Self {
        let headers = Arc::new(Mutex::default());
        let (stopped, stop) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let (test, backend, shared) = (test.clone(), backend.clone(), Arc::clone(&headers));
        let thread = std::thread::spawn(move || {
            while let Some(connection) = accept(&listener, &stopped) {
                let (test, backend, shared) = (test.clone(), backend.clone(), Arc::clone(&shared));
                std::thread::spawn(move || {
                    serve(&test, &backend, introduction, connection, &shared)
                });
            }
        });
        Self {
            target,
            headers,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// The headers so far.
    pub fn headers(&self) -> Vec<Vec<u8>> {
        self.headers.lock().unwrap().clone()
    }

    /// Waits for the connection number `index` (from 0) and gives its header.
    pub fn header(&self, index: usize) -> Vec<u8> {
        eventually("the backend is connected to", || {
            self.headers().get(index).cloned()
        })
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A path for a new unix socket in the test's directory.
pub fn unix_path(test: &Test) -> PathBuf {
    test.path(&format!("remote-{}.sock", super::next_number()))
}

/// Accepts a connection that a test serves itself.
pub fn accept_by_hand(listener: &TcpListener) -> Client {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut fds, patience), Ok(1), "nobody connects");
    Client::on(listener.accept().unwrap().0)
}

/// A port of 127.0.0.1 that answers no more: its queue is full, so the kernel drops what comes. Dropping the connections in the
/// queue, and accepting them, opens it.
pub fn fill() -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let mut fillers = Vec::new();
    while let Ok(filler) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
        fillers.push(filler);
        assert!(fillers.len() < 100, "the queue takes all");
    }
    (listener, fillers)
}

/// The same at a unix socket, which everybody may use.
pub fn fill_unix(path: &Path) -> (UnixListener, Vec<OwnedFd>) {
    let listener = UnixListener::bind(path).unwrap();
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    listen(&listener, Backlog::new(0).unwrap()).unwrap();
    let address = UnixAddr::new(path).unwrap();
    let mut fillers = Vec::new();
    loop {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let filler = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        match connect(filler.as_raw_fd(), &address) {
            Ok(()) => fillers.push(filler),
            Err(error) => {
                assert_eq!(error, nix::errno::Errno::EAGAIN);
                return (listener, fillers);
            }
        }
    }
}

fn accept(listener: &Listener, stopped: &OwnedFd) -> Option<OwnedFd> {
    let fd = match listener {
        Listener::Tcp(listener) => listener.as_fd(),
        Listener::Unix(listener) => listener.as_fd(),
    };
    let mut fds = [
        PollFd::new(fd, PollFlags::POLLIN),
        PollFd::new(stopped.as_fd(), PollFlags::empty()),
    ];
    poll(&mut fds, PollTimeout::NONE).unwrap();
    if fds[1].any() == Some(true) {
        return None;
    }
    match listener {
        Listener::Tcp(listener) => Some(listener.accept().unwrap().0.into()),
        Listener::Unix(listener) => Some(listener.accept().unwrap().0.into()),
    }
}

fn serve(
    test: &Test,
    backend: &Backend,
    introduction: Introduction,
    connection: OwnedFd,
    headers: &Mutex<Vec<Vec<u8>>>,
) {
    let Some(header) = read_header(&connection, introduction) else {
        return;
    };
    headers.lock().unwrap().push(header);
    let line = backend.command(&test.record());
    let mut command = Command::new(&line[0]);
    command
        .args(&line[1..])
        .stdin(Stdio::from(connection.try_clone().unwrap()))
        .stdout(Stdio::from(connection))
        .stderr(Stdio::null());
    sys::prepare(&mut command, Vec::new());
    let mut child = test.spawn_prepared(command);
    // Our copies go with the command, or the connection would never end.
    let _ = child.wait();
}

/// Exactly the header's bytes, and none beyond; nothing if the connection ends before.
fn read_header(connection: &OwnedFd, introduction: Introduction) -> Option<Vec<u8>> {
    let patience = nix::sys::time::TimeVal::new(PATIENCE.as_secs() as i64, 0);
    nix::sys::socket::setsockopt(
        connection,
        nix::sys::socket::sockopt::ReceiveTimeout,
        &patience,
    )
    .unwrap();
    let mut stream = File::from(connection.try_clone().unwrap());
    let mut take = |count: usize| {
        let mut bytes = vec![0; count];
        stream.read_exact(&mut bytes).ok().map(|()| bytes)
    };
    let mut header = Vec::new();
    match introduction {
        Introduction::None => {}
        Introduction::V1 => {
            while !header.ends_with(b"\n") && header.len() < 107 {
                header.extend(take(1)?);
            }
        }
        Introduction::V2 => {
            header.extend(take(16)?);
            let length = u16::from_be_bytes([header[14], header[15]]);
            header.extend(take(length.into())?);
        }
    }
    let forever = nix::sys::time::TimeVal::new(0, 0);
    nix::sys::socket::setsockopt(
        connection,
        nix::sys::socket::sockopt::ReceiveTimeout,
        &forever,
    )
    .unwrap();
    Some(header)
}
