//! Who takes part: the copy floor, imap-tls, and the peers that are installed; how each is started, and what it does.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Result;
use crate::client::Entry;
use crate::workspace::Workspace;

/// A program under tcpserver, or one that listens by itself.
#[derive(Debug)]
pub(crate) struct Contestant {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) entry: Entry,
    pub(crate) command: Vec<OsString>,
    pub(crate) environment: Vec<(&'static str, OsString)>,
    /// What has to run beside it: the keeper service.
    pub(crate) keeper: Option<Vec<OsString>>,
    /// What it does for its price.
    pub(crate) notes: &'static str,
}

/// What it is compared as.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Role {
    /// The IMAP server itself: what a connection costs with nothing between.
    Backend,
    /// The processes and protections of imap-tls without TLS.
    ConfinedFloor,
    /// The same of the listener's.
    ConfinedListenerFloor,
    Floor,
    /// Without tcpserver.
    Listener,
    Ours,
    Peer,
    StaticFloor,
}

impl Role {
    /// Whether it is started with `--listen ADDRESS:PORT` in front of its arguments, and not by tcpserver.
    pub(crate) fn listens(self) -> bool {
        matches!(self, Self::ConfinedListenerFloor | Self::Listener)
    }

    /// Whether it is there to be compared with, and has no TLS.
    pub(crate) fn is_floor(self) -> bool {
        matches!(
            self,
            Self::Backend
                | Self::ConfinedFloor
                | Self::ConfinedListenerFloor
                | Self::Floor
                | Self::StaticFloor
        )
    }
}

/// Everybody, as far as installed; says who is not.
pub(crate) fn all(
    programs: &[(String, PathBuf)],
    workspace: &Workspace,
) -> Result<Vec<Contestant>> {
    if find("tcpserver").is_none() {
        return Err("tcpserver is needed (Debian package ucspi-tcp)".into());
    }
    let mut all = vec![
        Contestant {
            name: "backend alone".to_owned(),
            role: Role::Backend,
            entry: Entry::Plain,
            command: words([&workspace.imapd]),
            environment: Vec::new(),
            keeper: None,
            notes: "the IMAP server under tcpserver, with nothing between",
        },
        copies("copy floor", Role::Floor, &workspace.makesock, workspace),
        copies(
            "static copy floor",
            Role::StaticFloor,
            &workspace.makesock_static,
            workspace,
        ),
        confined(
            "confinement floor",
            Role::ConfinedFloor,
            "tests/bench/confined.c, linked statically: keeper, launcher and a process that copies, as imap-tls has and confines them; no TLS",
            workspace,
        ),
        confined(
            "listener's confinement floor",
            Role::ConfinedListenerFloor,
            "the same without tcpserver, exec and keeper: a process that copies for each client, and a launcher",
            workspace,
        ),
    ];
    for (name, program) in programs {
        for (entry, policy) in [(Entry::StartTls, "required"), (Entry::Implicit, "implicit")] {
            let holding_keys = keys(workspace);
            let under_tcpserver = imap_tls(name, program, entry, policy, &holding_keys, workspace);
            let listener = Contestant {
                name: format!("{name} listener {}", describe(entry)),
                role: Role::Listener,
                command: under_tcpserver.command.clone(),
                environment: vec![
                    ("IMAP_TLS_MAX_CONNECTIONS", "10000".into()),
                    ("IMAP_TLS_MAX_PER_SOURCE", "10000".into()),
                ],
                keeper: None,
                notes: "the same without tcpserver and exec: a network process each, forked by the listener; one keeper for all",
                entry,
            };
            let keeper = ["--keeper".into(), workspace.keeper.clone().into()];
            let with_service = Contestant {
                name: format!("{name} keeper service {}", describe(entry)),
                keeper: Some(keeper_service(program, &keeper, &holding_keys, workspace)),
                notes: "the same, but the key's process is a service (imap-tls --keep), whose work for a connection is counted, and not its start",
                ..imap_tls(name, program, entry, policy, &keeper, workspace)
            };
            all.extend([under_tcpserver, with_service, listener]);
        }
    }
    let peers = [
        ("stunnel4", "stunnel4"),
        ("tlswrapper", "tlswrapper"),
        ("couriertls", "courier-base"),
    ];
    for (program, package) in peers {
        if find(program).is_none() {
            eprintln!("not measured: {program} (Debian package {package} is not installed)");
            continue;
        }
        match program {
            "stunnel4" => {
                all.push(stunnel(Entry::Implicit, workspace)?);
                all.push(stunnel(Entry::StartTls, workspace)?);
            }
            "tlswrapper" => all.push(tlswrapper(workspace)),
            _ => all.push(couriertls(workspace)),
        }
    }
    Ok(all)
}

fn copies(name: &str, role: Role, makesock: &PathBuf, workspace: &Workspace) -> Contestant {
    Contestant {
        name: name.to_owned(),
        role,
        entry: Entry::Plain,
        command: words([makesock, &workspace.imapd]),
        environment: Vec::new(),
        keeper: None,
        notes: match role {
            Role::StaticFloor => "the same, linked statically (with musl where there is musl-gcc)",
            _ => {
                "tests/bench/makesock.c as cc makes it: socketpair, fork, exec, copies; no TLS, no privilege separation"
            }
        },
    }
}

fn confined(name: &str, role: Role, notes: &'static str, workspace: &Workspace) -> Contestant {
    Contestant {
        name: name.to_owned(),
        role,
        entry: Entry::Plain,
        command: words([
            &workspace.confined,
            &workspace.key,
            &workspace.empty,
            &workspace.imapd,
        ]),
        environment: Vec::new(),
        keeper: None,
        notes,
    }
}

fn words<T: Into<OsString> + Clone, const N: usize>(words: [&T; N]) -> Vec<OsString> {
    words.into_iter().cloned().map(Into::into).collect()
}

/// `keys` are the options that name them, or the keeper that has them.
fn imap_tls(
    name: &str,
    program: &Path,
    entry: Entry,
    policy: &str,
    keys: &[OsString],
    workspace: &Workspace,
) -> Contestant {
    let mut command = vec![program.into(), "--tls".into(), policy.into()];
    command.extend(separation(workspace));
    command.extend_from_slice(keys);
    command.extend(["--".into(), workspace.imapd.clone().into()]);
    Contestant {
        name: format!("{name} {}", describe(entry)),
        role: Role::Ours,
        entry,
        command,
        environment: Vec::new(),
        keeper: None,
        notes: "network process (own uid, chroot, seccomp), keeper with the key (own uid, chroot, seccomp) until the handshake is over; session tickets; backend not started before TLS stands; one log line per session",
    }
}

/// What a keeper is to hold, as the packages have it.
fn keys(workspace: &Workspace) -> [OsString; 6] {
    [
        "--cert".into(),
        workspace.certificate.clone().into(),
        "--key".into(),
        workspace.key.clone().into(),
        "--ticket-keys".into(),
        workspace.ticket_keys.clone().into(),
    ]
}

/// The whole of the privilege separation, by ids that are in no passwd, all different.
fn separation(workspace: &Workspace) -> [OsString; 6] {
    [
        "--user".into(),
        "64001".into(),
        "--keeper-user".into(),
        "64002".into(),
        "--chroot".into(),
        workspace.empty.clone().into(),
    ]
}

/// The command of the keeper service at a socket.
fn keeper_service(
    program: &Path,
    socket: &[OsString],
    keys: &[OsString],
    workspace: &Workspace,
) -> Vec<OsString> {
    let mut command = vec![program.into(), "--keep".into()];
    command.extend(["--max-connections".into(), "10000".into()]);
    command.extend(separation(workspace));
    command.extend_from_slice(socket);
    command.extend_from_slice(keys);
    command
}

fn describe(entry: Entry) -> &'static str {
    match entry {
        Entry::Implicit => "implicit",
        Entry::Plain => "plain",
        Entry::StartTls => "STARTTLS",
    }
}

/// In inetd mode. As root, with no chroot: with neither it would be dearer, not cheaper.
fn stunnel(entry: Entry, workspace: &Workspace) -> Result<Contestant> {
    let protocol = match entry {
        Entry::StartTls => "protocol = imap\n",
        Entry::Implicit | Entry::Plain => "",
    };
    let text = format!(
        "foreground = yes\nsyslog = no\ndebug = err\n{protocol}cert = {}\nkey = {}\nexec = {}\nexecArgs = imapd\nsocket = l:TCP_NODELAY=1\nsocket = a:TCP_NODELAY=1\n",
        workspace.certificate.display(),
        workspace.key.display(),
        workspace.imapd.display(),
    );
    let name = format!("stunnel4 {}", describe(entry));
    let configuration = workspace.write(&format!("{name}.conf").replace(' ', "-"), &text)?;
    Ok(Contestant {
        name,
        role: Role::Peer,
        entry,
        command: vec!["stunnel4".into(), configuration.into()],
        environment: Vec::new(),
        keeper: None,
        notes: "inetd mode: one process with network, TLS and key, root here (no setuid or chroot set: the cheapest for it); backend runs before TLS",
    })
}

fn tlswrapper(workspace: &Workspace) -> Contestant {
    let mut command: Vec<OsString> = vec!["tlswrapper".into(), "-f".into()];
    command.extend(words([&workspace.key_and_certificate]));
    command.extend(["-J".into(), workspace.empty.clone().into()]);
    command.push(workspace.imapd.clone().into());
    Contestant {
        name: "tlswrapper implicit".to_owned(),
        role: Role::Peer,
        entry: Entry::Implicit,
        command,
        environment: Vec::new(),
        keeper: None,
        notes: "network process and key process (random uids, chroot, rlimits; no seccomp); STARTTLS only with the backend's help (-n), so not for IMAP here",
    }
}

fn couriertls(workspace: &Workspace) -> Contestant {
    let mut command: Vec<OsString> = vec!["couriertls".into(), "-server".into(), "-tcpd".into()];
    command.push(workspace.imapd.clone().into());
    Contestant {
        name: "couriertls implicit".to_owned(),
        role: Role::Peer,
        entry: Entry::Implicit,
        command,
        environment: vec![
            ("TLS_CERTFILE", workspace.key_and_certificate.clone().into()),
            ("TLS_VERIFYPEER", "NONE".into()),
        ],
        keeper: None,
        notes: "one process with network, TLS and key, root here; backend runs before TLS; in Courier STARTTLS is imapd's own doing",
    }
}

/// Looks in `PATH`.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// The imap-tls programs that were named, or the one that a build for release makes.
pub(crate) fn programs(named: &[String]) -> Result<Vec<(String, PathBuf)>> {
    if named.is_empty() {
        return Ok(vec![("imap-tls".to_owned(), build()?)]);
    }
    named
        .iter()
        .map(|word| {
            let (name, path) = word.split_once('=').unwrap_or(("imap-tls", word));
            // Absolute, since the contestants need not run where we do.
            let path = std::fs::canonicalize(path).map_err(|error| format!("{path}: {error}"))?;
            Ok((name.to_owned(), path))
        })
        .collect()
}

/// Builds what is shipped: for musl where that can be built. (What `cargo bench` itself built beside this benchmark has the
/// tests' dependencies' features in it.)
fn build() -> Result<PathBuf> {
    let target = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    let is_musl = find("musl-gcc").is_some()
        && Command::new("rustc")
            .args(["--print", "target-libdir", "--target", &target])
            .output()
            .is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir());
    let directory = target_directory()?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["build", "--release", "--bin", "imap-tls", "--target-dir"])
        .arg(&directory);
    if is_musl {
        cargo.args(["--target", &target]);
    } else {
        eprintln!(
            "not built for {target} (needs that Rust target and musl-tools): linked dynamically, which starts slower"
        );
    }
    if !cargo.status()?.success() {
        return Err("cargo build --release failed".into());
    }
    let directory = if is_musl {
        directory.join(target)
    } else {
        directory
    };
    Ok(directory.join("release/imap-tls"))
}

/// Where this program was built: it lies in `release/deps` there.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let directory = own.ancestors().nth(3).ok_or("not run by cargo")?;
    Ok(directory.to_owned())
}
