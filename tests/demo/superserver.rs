//! The part that tcpserver, inetd or systemd has in real life: accept a connection, run `imap-tls` with it on stdin and stdout.

use std::convert::Infallible;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::time::Duration;
use std::{env, fmt, fs, io, thread};

use nix::unistd::{Gid, Group, Uid, User};

use crate::Result;
use crate::certificate::Certificate;

/// What this machine lets us show.
pub(crate) enum Privileges {
    /// The users are numbers that nobody has, so the demonstration need not make any.
    Root {
        backend: u32,
        chroot: PathBuf,
        keeper: u32,
        network: u32,
    },
    PlainUser,
}

impl Privileges {
    pub(crate) fn find(directory: &Path) -> Result<Self> {
        if !Uid::effective().is_root() {
            return Ok(Self::PlainUser);
        }
        let chroot = directory.join("empty");
        fs::create_dir(&chroot)?;
        // Debian keeps 65000 to 65533 free.
        let mut unused = (65000..65534).filter(|&id| is_unused(id));
        let mut next = || {
            unused
                .next()
                .ok_or("no unused user ids between 65000 and 65533")
        };
        Ok(Self::Root {
            backend: next()?,
            chroot,
            keeper: next()?,
            network: next()?,
        })
    }
}

fn is_unused(id: u32) -> bool {
    matches!(User::from_uid(Uid::from_raw(id)), Ok(None))
        && matches!(Group::from_gid(Gid::from_raw(id)), Ok(None))
}

impl fmt::Display for Privileges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root {
                backend,
                chroot,
                keeper,
                network,
            } => write!(
                f,
                "Started as root, so the full separation is shown: the network process becomes user {network} in the empty\n\
                 directory {}, the keeper of the private key becomes user {keeper}, the backend user {backend}.\n",
                chroot.display()
            ),
            Self::PlainUser => write!(
                f,
                "Started as a plain user (uid {}), so part of the protection is missing: the network process, the keeper and\n\
                 the backend all run as you, and without a chroot. Start the demonstration as root to see the whole.\n",
                Uid::effective()
            ),
        }
    }
}

/// A port, and the command that serves each connection to it.
pub(crate) struct Service {
    arguments: Vec<OsString>,
    ended: Sender<ExitStatus>,
    listener: TcpListener,
    program: PathBuf,
}

impl Service {
    /// `ended` gets the exit status for every connection.
    pub(crate) fn new(
        program: &Path,
        (tls, port): (&str, u16),
        certificate: &Certificate,
        privileges: &Privileges,
        ended: Sender<ExitStatus>,
    ) -> Result<Self> {
        let mut arguments: Vec<OsString> = vec!["--tls".into(), tls.into()];
        arguments.extend(["--cert".into(), certificate.certificate.clone().into()]);
        arguments.extend(["--key".into(), certificate.key.clone().into()]);
        let mut backend: Vec<OsString> = vec![env::current_exe()?.into(), "--backend".into()];
        match privileges {
            Privileges::Root {
                backend: backend_user,
                chroot,
                keeper,
                network,
            } => {
                arguments.extend(["--user".into(), network.to_string().into()]);
                arguments.extend(["--group".into(), network.to_string().into()]);
                arguments.extend(["--keeper-user".into(), keeper.to_string().into()]);
                arguments.extend(["--chroot".into(), chroot.into()]);
                backend.extend(["--uid".into(), backend_user.to_string().into()]);
            }
            Privileges::PlainUser => arguments.push("--unprivileged".into()),
        }
        arguments.push("--".into());
        arguments.extend(backend);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .map_err(|error| format!("cannot listen on 127.0.0.1 port {port}: {error}"))?;
        Ok(Self {
            arguments,
            ended,
            listener,
            program: program.into(),
        })
    }

    pub(crate) fn port(&self) -> io::Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    pub(crate) fn serve(&self) -> Infallible {
        loop {
            let served = self
                .listener
                .accept()
                .and_then(|(client, address)| self.connect(client, address));
            if let Err(error) = served {
                eprintln!("demo: {error}");
                // Out of descriptors or processes, most likely. Others need a moment to give some back.
                thread::sleep(Duration::from_millis(100));
            }
        }
    }

    /// Starts `imap-tls` with the client's socket on descriptors 0 and 1.
    fn connect(&self, client: TcpStream, address: SocketAddr) -> io::Result<()> {
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .stdin(OwnedFd::from(client.try_clone()?))
            .stdout(OwnedFd::from(client));
        // As from a superserver: nothing of the user's own environment, which might hold IMAP_TLS_... variables.
        command
            .env_clear()
            .envs(env::var_os("PATH").map(|path| ("PATH", path)));
        let mut child = command.stderr(Stdio::inherit()).spawn()?;
        let ended = self.ended.clone();
        thread::spawn(move || match child.wait() {
            Ok(status) => {
                eprintln!("demo: the connection from {address} is over: {status}");
                // Only the self-test listens.
                let _ = ended.send(status);
            }
            Err(error) => eprintln!("demo: {error}"),
        });
        Ok(())
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.program.display().fmt(f)?;
        self.arguments
            .iter()
            .try_for_each(|argument| write!(f, " {}", argument.to_string_lossy()))
    }
}
