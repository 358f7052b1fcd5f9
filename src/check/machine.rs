//! The machine around us: what the kernel has, the log, the superserver's entry, the port.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::{fmt, fs, io};

use super::{Level, Report};
use crate::cli::ListenAddress;
use crate::error::reason;
use crate::imap::Policy;
use crate::listener::{can_be_bound, examine_keepers};
use crate::log::{Destination, Escaped, Log, Verbosity};
use crate::sandbox::{Features, Requirement};

/// What not every kernel and container has.
pub(super) fn check_kernel(report: &mut Report, features: &Features, required: &[Requirement]) {
    const SUBJECT: &str = "kernel";
    let present = features.present();
    if !present.is_empty() {
        let text = format!("has {} as well", present.join(" and "));
        report.add(Level::Ok, SUBJECT, text);
    }
    for lack in features.lacking() {
        report.add(Level::Warning, SUBJECT, lack);
    }
    if let Err(error) = features.check(required) {
        report.add(Level::Error, SUBJECT, error);
    }
}

pub(super) fn check_log(report: &mut Report, destination: Destination) {
    if destination == Destination::Stderr {
        report.add(
            Level::Ok,
            "log",
            "standard error, as the superserver gives it",
        );
        return;
    }
    let is_there = Log::open(Destination::Syslog, Verbosity::Quiet, false)
        .descriptor()
        .is_some();
    match (is_there, destination) {
        (true, _) => report.add(Level::Ok, "log", "/dev/log takes lines"),
        (false, Destination::Syslog) => {
            report.add(Level::Error, "log", "/dev/log (--log syslog) takes no lines: is a syslog daemon or journald running?");
        }
        (false, _) => report.add(
            Level::Warning,
            "log",
            "/dev/log takes no lines, so under inetd and xinetd nothing would be logged: is a syslog daemon or journald running?",
        ),
    }
}

/// A superserver whose configuration we can read.
struct Superserver {
    name: &'static str,
    /// What its process is called.
    programs: &'static [&'static str],
    /// Files, or directories of files, in which it finds what to start.
    places: &'static [&'static str],
}

const SUPERSERVERS: &[Superserver] = &[
    Superserver {
        name: "systemd",
        programs: &["systemd"],
        places: &[
            "/etc/systemd/system",
            "/usr/local/lib/systemd/system",
            "/usr/lib/systemd/system",
            "/lib/systemd/system",
        ],
    },
    Superserver {
        name: "xinetd",
        programs: &["xinetd"],
        places: &["/etc/xinetd.d"],
    },
    Superserver {
        name: "inetd",
        programs: &["inetd", "inetutils-inetd"],
        places: &["/etc/inetd.conf"],
    },
];

/// What the listener's process is called.
const OWN_PROGRAM: &str = "imap-tls";

/// Those that are told on their command line what to start; the kernel cuts names at 15 octets.
const OTHER_SUPERSERVERS: &[&str] = &[
    OWN_PROGRAM,
    "s6-tcpserverd",
    "s6-tcpserver4d",
    "s6-tcpserver6d",
    "socat",
    "systemd-socket-",
    "tcpserver",
    "tcpsvd",
];

pub(super) fn check_superserver(report: &mut Report, policy: Policy) {
    let found: Vec<(&Superserver, Vec<String>)> = SUPERSERVERS
        .iter()
        .map(|superserver| (superserver, entries(superserver.places)))
        .filter(|(_, entries)| !entries.is_empty())
        .collect();
    if found.is_empty() {
        report.add(
            Level::Warning,
            "superserver",
            "no entry for imap-tls under systemd, xinetd or inetd: install one, unless tcpserver or the like is used",
        );
    } else {
        let all: Vec<String> = found
            .iter()
            .flat_map(|(superserver, entries)| {
                entries
                    .iter()
                    .map(move |path| format!("{} ({path})", superserver.name))
            })
            .collect();
        report.add(Level::Ok, "superserver", all.join(", "));
    }
    let port = if policy == Policy::Implicit { 993 } else { 143 };
    let with_entry: Vec<&str> = found
        .iter()
        .map(|(superserver, _)| superserver.name)
        .collect();
    match listening_sockets(port) {
        Ok(sockets) => {
            let is_taken = !sockets.is_empty();
            let listeners = listeners(sockets.iter().map(|socket| &socket.inode));
            check_port(report, port, &listeners, is_taken, &with_entry);
        }
        Err(error) => report.add(
            Level::Warning,
            "port",
            format!("cannot tell who listens: {}", reason(&error)),
        ),
    }
}

/// Where we are to listen ourselves, unless we do already.
pub(super) fn check_listener(report: &mut Report, addresses: &[ListenAddress]) {
    for address in addresses {
        let holders = match address {
            ListenAddress::Inet(address) => holders(*address),
            ListenAddress::Unix(path) => holders_of_path(path),
        };
        let (ours, others): (Vec<_>, Vec<_>) = holders
            .iter()
            .partition(|(holder, is_all)| *is_all && holder.program == OWN_PROGRAM);
        let possible = can_be_bound(address, addresses);
        let (level, text) = match (possible, ours.first(), others.first()) {
            (Ok(()), ..) => (Level::Ok, format!("{address} can be listened on")),
            (Err(_), Some((ours, _)), _) => (Level::Ok, format!("{ours} listens on {address}")),
            (Err(why), None, holder) => {
                let holder = holder.map(|(holder, _)| {
                    if holder.program == OWN_PROGRAM {
                        format!(": {holder} has a part of it: stop that one first")
                    } else {
                        format!(": {holder} has it{}", holder.mend())
                    }
                });
                let text = format!(
                    "cannot listen on {address} (--listen): {why}{}",
                    holder.unwrap_or_default()
                );
                (Level::Error, text)
            }
        };
        report.add(level, "listener", text);
    }
}

/// Where the keeper service is to listen.
pub(super) fn check_keepers_socket(report: &mut Report, path: Option<&Path>) {
    const SUBJECT: &str = "keeper service";
    let Some(path) = path else {
        let text = "no --keeper SOCKET: that is right only where systemd listens for it";
        return report.add(Level::Warning, SUBJECT, text);
    };
    let (level, finding) = match examine_keepers(path) {
        Ok(finding) => (Level::Ok, finding.to_owned()),
        Err(why) => (Level::Error, why),
    };
    let text = format!("'{}' (--keeper) {finding}", path.display());
    report.add(level, SUBJECT, text);
}

/// Who stands in the way of listening on this address, and whether they have all of it.
fn holders(address: SocketAddr) -> Vec<(Listener, bool)> {
    let all_of_ipv4 = IpAddr::from(Ipv4Addr::UNSPECIFIED);
    let wanted = match address.ip() {
        // So the listener takes it as well.
        IpAddr::V6(v6) if v6.is_unspecified() && !Path::new(TABLE_OF_IPV6).exists() => all_of_ipv4,
        other => other.to_canonical(),
    };
    let sockets = listening_sockets(address.port()).unwrap_or_default();
    let mut holders = Vec::new();
    for is_all in [true, false] {
        let those = sockets.iter().filter(|ListeningSocket { address, .. }| {
            covers(*address, wanted) == is_all && (is_all || covers(wanted, *address))
        });
        let inodes = those.map(|socket| &socket.inode);
        holders.extend(listeners(inodes).into_iter().map(|one| (one, is_all)));
    }
    holders
}

/// The same for a unix socket.
fn holders_of_path(path: &Path) -> Vec<(Listener, bool)> {
    let sockets = fs::read("/proc/net/unix").map(|table| listening_at(&table, path));
    let found = listeners(&sockets.unwrap_or_default());
    found.into_iter().map(|one| (one, true)).collect()
}

/// The sockets that listen at a path, by the kernel's table (proc_net(5)), which has paths as they were given.
fn listening_at(table: &[u8], path: &Path) -> Vec<String> {
    const ACCEPTS: u32 = 0x1_0000;
    let entries = table.split(|byte| *byte == b'\n').filter_map(|line| {
        // Whatever is in the path, white space too.
        let fields = line.strip_suffix(path.as_os_str().as_bytes())?;
        let mut fields = std::str::from_utf8(fields).ok()?.split_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?;
        (flags & ACCEPTS != 0 && fields.next().is_none()).then(|| inode.to_owned())
    });
    entries.collect()
}

/// Whether who listens on `held` has `wanted` too. The unspecified address is all of them, and IPv6's those of IPv4 as well.
fn covers(held: IpAddr, wanted: IpAddr) -> bool {
    held == wanted || (held.is_unspecified() && (held.is_ipv6() || wanted.is_ipv4()))
}

fn check_port(
    report: &mut Report,
    port: u16,
    listeners: &[Listener],
    is_taken: bool,
    with_entry: &[&str],
) {
    if !is_taken {
        report.add(
            Level::Warning,
            "port",
            format!("nobody listens on {port}: enable the socket, or start the superserver"),
        );
    } else if listeners.is_empty() {
        report.add(
            Level::Ok,
            "port",
            format!("{port} is listened on, by whom only root can tell"),
        );
    }
    for listener in listeners {
        let known = SUPERSERVERS
            .iter()
            .find(|superserver| superserver.programs.contains(&listener.program.as_str()));
        let others = OTHER_SUPERSERVERS.contains(&listener.program.as_str());
        let (level, advice) = match known {
            Some(superserver) if !with_entry.contains(&superserver.name) => (
                Level::Warning,
                format!(
                    ", which has no entry for imap-tls: make one in place of the one for port {port}"
                ),
            ),
            Some(_) => (Level::Ok, String::new()),
            None if others => (Level::Ok, String::new()),
            // Not an error: it may be a balancer in front of us, or we may be meant for another port.
            None => (Level::Warning, listener.mend()),
        };
        report.add(
            level,
            "port",
            format!("{port} is listened on by {listener}{advice}"),
        );
    }
}

/// Files that have a superserver run us.
fn entries(places: &[&str]) -> Vec<String> {
    // One may be a link to another, such as /lib to /usr/lib.
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for place in places {
        let Ok(place) = fs::canonicalize(place) else {
            continue;
        };
        if seen.contains(&place) {
            continue;
        }
        let mut files: Vec<_> = match fs::read_dir(&place) {
            Ok(directory) => directory
                .filter_map(|entry| Some(entry.ok()?.path()))
                .collect(),
            Err(_) => vec![place.clone()],
        };
        files.sort();
        seen.push(place);
        found.extend(
            files
                .iter()
                .filter(|path| runs_us(&fs::read_to_string(path).unwrap_or_default()))
                .map(|path| path.display().to_string()),
        );
    }
    found
}

/// Whether an entry in this file runs us for clients. Only xinetd's have braces, and can be disabled.
fn runs_us(text: &str) -> bool {
    text.split('}').any(|entry| {
        let mut lines = entry
            .lines()
            .map(str::trim)
            .filter(|line| !line.starts_with('#'));
        let is_disabled = lines.clone().any(|line| {
            line.split_once('=')
                .is_some_and(|(name, value)| name.trim() == "disable" && value.trim() == "yes")
        });
        // The keeper service has to do with no client, nor has the directory of its socket.
        let serves = |line: &str| {
            line.contains("/imap-tls")
                && !line.starts_with("Listen")
                && !line.split_whitespace().any(|word| word == "--keep")
        };
        !is_disabled && lines.any(serves)
    })
}

/// Whether there is a socket that listens on the port, whatever its address; `None` if that cannot be told.
pub(super) fn is_anybody_listening(port: u16) -> Option<bool> {
    Some(!listening_sockets(port).ok()?.is_empty())
}

struct ListeningSocket {
    address: IpAddr,
    inode: String,
}

/// Not there where the kernel has no IPv6.
const TABLE_OF_IPV6: &str = "/proc/net/tcp6";

/// The sockets that listen on the port, by the kernel's own tables (proc_net(5)).
fn listening_sockets(port: u16) -> io::Result<Vec<ListeningSocket>> {
    const LISTEN: &str = "0A";
    let wanted = format!("{port:04X}");
    let mut tables = fs::read_to_string("/proc/net/tcp")?;
    tables += &fs::read_to_string(TABLE_OF_IPV6).unwrap_or_default();
    let sockets = tables.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (address, port) = fields.nth(1)?.split_once(':')?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?;
        (port == wanted && state == LISTEN).then_some((address, inode))
    });
    Ok(sockets
        .filter_map(|(address, inode)| {
            Some(ListeningSocket {
                address: parse_address(address)?,
                inode: inode.to_owned(),
            })
        })
        .collect())
}

/// One number of 32 bits, or four, in hexadecimal digits and the machine's order of octets.
fn parse_address(text: &str) -> Option<IpAddr> {
    let mut octets = Vec::new();
    for word in text.as_bytes().chunks(8) {
        let number = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?;
        octets.extend(number.to_ne_bytes());
    }
    let v4 = <[u8; 4]>::try_from(octets.as_slice()).map(IpAddr::from);
    let v6 = <[u8; 16]>::try_from(octets).map(IpAddr::from);
    v4.ok().or(v6.ok()).map(|address| address.to_canonical())
}

/// A process that has a listening socket.
struct Listener {
    process: String,
    program: String,
    unit: Option<String>,
}

impl Listener {
    fn new(process: &str) -> Self {
        let read = |name| fs::read(format!("/proc/{process}/{name}")).unwrap_or_default();
        Self {
            process: process.to_owned(),
            program: Escaped(read("comm").trim_ascii_end()).to_string(),
            unit: unit(&String::from_utf8_lossy(&read("cgroup"))),
        }
    }

    fn mend(&self) -> String {
        const SO: &str = ", so clients get that and not imap-tls";
        match &self.unit {
            Some(unit) => format!("{SO}: systemctl disable --now {unit}"),
            None => format!("{SO}: stop it, or have it listen elsewhere"),
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}' (pid {}", self.program, self.process)?;
        if let Some(unit) = &self.unit {
            write!(f, ", {unit}")?;
        }
        f.write_str(")")
    }
}

/// The service that a process belongs to, by its control group.
fn unit(cgroup: &str) -> Option<String> {
    cgroup
        .lines()
        .flat_map(|line| line.split('/'))
        .find(|component| component.ends_with(".service"))
        .map(|name| Escaped(name.as_bytes()).to_string())
}

/// The processes that have one of these sockets open; root sees all of them. Of those that share one, such as a daemon's workers,
/// the first counts, of each name.
fn listeners<'a>(inodes: impl IntoIterator<Item = &'a String>) -> Vec<Listener> {
    let wanted: Vec<String> = inodes
        .into_iter()
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut numbers: Vec<u32> = processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    let mut found: Vec<Listener> = Vec::new();
    for number in numbers {
        let process = number.to_string();
        if has_one_open(&process, &wanted) {
            let listener = Listener::new(&process);
            if found.iter().all(|one| one.program != listener.program) {
                found.push(listener);
            }
        }
    }
    found
}

fn has_one_open(process: &str, wanted: &[String]) -> bool {
    let Ok(descriptors) = fs::read_dir(format!("/proc/{process}/fd")) else {
        return false;
    };
    descriptors
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .any(|target| wanted.iter().any(|socket| target == Path::new(socket)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_port_is_seen_and_who_it_is() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let sockets = listening_sockets(port).unwrap();
        assert_eq!(sockets.len(), 1);
        let own = std::process::id().to_string();
        let found = listeners(sockets.iter().map(|socket| &socket.inode));
        assert!(found.iter().any(|one| one.process == own), "{own}");
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let other = client.local_addr().unwrap().port();
        assert!(listening_sockets(other).unwrap().is_empty());
    }

    #[test]
    fn addresses_are_read_from_the_kernels_tables() {
        for text in ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(text) else {
                assert!(text.starts_with('['), "{text}");
                continue;
            };
            let address = listener.local_addr().unwrap();
            let sockets = listening_sockets(address.port()).unwrap();
            let found: Vec<_> = sockets.iter().map(|socket| socket.address).collect();
            assert!(found.contains(&address.ip()), "{text}: {found:?}");
            let found = holders(address);
            assert!(found.iter().any(|(_, is_all)| *is_all), "{text}");
        }
        assert_eq!(parse_address("0100007F0100007F"), None);
        assert_eq!(parse_address("local_address"), None);
    }

    #[test]
    fn sockets_are_found_by_their_path() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000002 00000000 00010000 0001 01    17 /run/a b\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12345 /run/imap\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 12346 /run/imap\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12347 /srv/run/imap\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 12348 @imap\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 12349\n";
        let found = |path: &str| listening_at(table, Path::new(path));
        assert_eq!(found("/run/imap"), ["12345"]);
        assert_eq!(found("/run/a b"), ["17"]);
        for path in ["imap", "b", "/", "/run/none"] {
            assert_eq!(found(path), [""; 0], "{path}");
        }
    }

    #[test]
    fn an_address_of_a_port_is_not_all_of_it() {
        let all = ["::", "0.0.0.0"].map(|text| text.parse::<IpAddr>().unwrap());
        let [v4, v6] = ["192.0.2.1", "2001:db8::1"].map(|text| text.parse::<IpAddr>().unwrap());
        for held in [v4, v6].into_iter().chain(all) {
            assert!(covers(held, held) && covers(all[0], held), "{held}");
        }
        assert!(covers(all[1], v4) && !covers(all[1], v6) && !covers(all[1], all[0]));
        assert!(!covers(v4, all[1]) && !covers(v4, all[0]) && !covers(v6, all[0]));
        assert!(!covers(v4, v6) && !covers(v6, v4));
    }

    #[test]
    fn the_unit_is_told_by_the_control_group() {
        for (cgroup, expected) in [
            (
                "1:name=systemd:/system.slice/a.service\n0::/",
                Some("a.service"),
            ),
            (
                "0::/system.slice/system-x.slice/x@1.service/sub",
                Some("x@1.service"),
            ),
            ("0::/init.scope\n", None),
            ("", None),
        ] {
            assert_eq!(unit(cgroup).as_deref(), expected, "{cgroup}");
        }
    }

    #[test]
    fn an_entry_that_is_disabled_or_a_comment_does_not_count() {
        assert!(runs_us("ExecStart=-/usr/sbin/imap-tls --tls implicit\n"));
        assert!(!runs_us("# ExecStart=-/usr/sbin/imap-tls\n"));
        assert!(!runs_us(
            "ExecStart=/usr/sbin/imap-tls --keep --settings /etc/imap-tls/imap-tls.conf\n"
        ));
        assert!(!runs_us("ListenSequentialPacket=/run/imap-tls/keeper\n"));
        let xinetd = "service a\n{\n\tdisable = no\n\tserver_args = /usr/sbin/imap-tls\n}\n";
        assert!(runs_us(xinetd));
        let disabled = xinetd.replace("no", "yes");
        assert!(!runs_us(&disabled));
        assert!(runs_us(&(disabled + xinetd)));
    }

    fn said(listener: Option<Listener>, with_entry: &[&str]) -> String {
        let mut report = Report::default();
        let listeners: Vec<_> = listener.into_iter().collect();
        check_port(&mut report, 143, &listeners, true, with_entry);
        report.write(crate::check::Format::Text)
    }

    fn listener(program: &str, unit: Option<&str>) -> Option<Listener> {
        Some(Listener {
            process: "7".to_owned(),
            program: program.to_owned(),
            unit: unit.map(str::to_owned),
        })
    }

    #[test]
    fn who_has_the_port_is_told_with_what_to_do() {
        assert_eq!(
            said(listener("imap4d", Some("mailutils-imap4d.service")), &[]),
            "warning: port: 143 is listened on by 'imap4d' (pid 7, mailutils-imap4d.service), so clients get that and not imap-tls: \
             systemctl disable --now mailutils-imap4d.service\n"
        );
        assert_eq!(
            said(listener("dovecot", None), &["systemd"]),
            "warning: port: 143 is listened on by 'dovecot' (pid 7), so clients get that and not imap-tls: stop it, or have it \
             listen elsewhere\n"
        );
        assert_eq!(
            said(listener("systemd", None), &["systemd"]),
            "ok: port: 143 is listened on by 'systemd' (pid 7)\n"
        );
        assert_eq!(
            said(listener("xinetd", None), &["systemd"]),
            "warning: port: 143 is listened on by 'xinetd' (pid 7), which has no entry for imap-tls: make one in place of the one \
             for port 143\n"
        );
        assert_eq!(
            said(listener("tcpserver", None), &[]),
            "ok: port: 143 is listened on by 'tcpserver' (pid 7)\n"
        );
        assert_eq!(
            said(None, &[]),
            "ok: port: 143 is listened on, by whom only root can tell\n"
        );
    }
}
