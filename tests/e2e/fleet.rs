//! The fleet of packaging/fleet, as its files say: HAProxy in front, three machines with imap-tls, Dovecot behind, clients from a
//! network of their own. Each host is a network namespace that lives as long as the process that holds it; a switch connects them.

use crate::harness::*;
use libtest_mimic::Trial;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, sockopt};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tool::Running;

const NEEDS: &[Need] = &[
    Need::Root,
    Need::Command("ip", "iproute2"),
    Need::Command("unshare", "util-linux"),
    Need::Command("haproxy", "haproxy"),
    Need::Command("dovecot", "dovecot-imapd"),
];

pub fn tests() -> Vec<Trial> {
    vec![
        test(
            "fleet: the client's address is in Dovecot's log, for both ports and families, and the session is secured",
            NEEDS,
            addresses,
        ),
        test(
            "fleet: a session is resumed on another machine",
            NEEDS,
            resumption,
        ),
        test(
            "fleet: one machine drained under load: no failed login, no disturbed session",
            NEEDS,
            drain,
        ),
        test(
            "fleet: one machine vanishing under load: no failed login once the balancer has noticed, no disturbed session elsewhere",
            NEEDS,
            vanish,
        ),
        test(
            "fleet: one machine killed under load: no failed login once the balancer has noticed, no disturbed session elsewhere",
            NEEDS,
            kill,
        ),
        test(
            "fleet: one address has no more than its share of the whole fleet",
            NEEDS,
            share,
        ),
        test(
            "fleet: nobody but the balancer gets in, and nobody but the machines to Dovecot with a header",
            NEEDS,
            strangers,
        ),
    ]
}

const FILES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/fleet");
/// The account of the test's Dovecot.
const LOGIN: &str = "LOGIN u sekret";
const ID: u32 = 61_012;
const BALANCER: &str = "192.0.2.10";
const BALANCER6: &str = "2001:db8::10";
/// As haproxy.cfg calls them.
const MACHINES: [(&str, &str); 3] = [
    ("one", "192.0.2.21"),
    ("two", "192.0.2.22"),
    ("three", "192.0.2.23"),
];

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

// ---- hosts ----

/// A network namespace, and the process that holds it.
struct Host {
    holder: Running,
    test: Test,
}

impl Host {
    fn new(test: &Test) -> Self {
        let tool = Tool::new(test, "unshare").args(["--net", "sleep", "infinity"]);
        let host = Self {
            holder: tool.start(),
            test: test.clone(),
        };
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        eventually("a network namespace", || {
            let path = format!("/proc/{}/ns/net", host.pid());
            std::fs::read_link(path).ok().filter(|other| *other != own)
        });
        host.run(&["ip", "link", "set", "lo", "up"]);
        host
    }

    fn pid(&self) -> i32 {
        self.holder.process().0
    }

    /// A command that will run there.
    fn tool(&self, program: &str) -> Tool {
        let path = if program.contains('/') {
            program.into()
        } else {
            tool::find(program).unwrap()
        };
        let pid = self.pid().to_string();
        let tool = Tool::new(&self.test, "nsenter").args(["-t", &pid, "-n", "--"]);
        tool.arg(path)
    }

    fn run(&self, words: &[&str]) {
        self.tool(words[0]).args(&words[1..]).run().success();
    }

    /// Plugs it into the switch and gives it addresses.
    fn plug(&self, switch: &Host, name: &str, addresses: &[String]) {
        let (own, other) = (self.pid().to_string(), switch.pid().to_string());
        let line = format!("link add {name} netns {other} type veth peer name eth0 netns {own}");
        let ip = Tool::new(&self.test, "ip").args(line.split(' '));
        ip.run().success();
        switch.run(&["ip", "link", "set", name, "master", "br0", "up"]);
        for address in addresses {
            let mut words = vec!["ip", "addr", "add", address, "dev", "eth0"];
            if address.contains(':') {
                words.push("nodad");
            }
            self.run(&words);
        }
        self.run(&["ip", "link", "set", "eth0", "up"]);
    }

    /// A connection from there.
    fn connect(&self, from: &str, to: SocketAddr) -> std::io::Result<OwnedFd> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.pid()))?;
        let from = SockaddrStorage::from(SocketAddr::new(from.parse().unwrap(), 0));
        let to = SockaddrStorage::from(to);
        // A socket stays in the namespace in which it was made, and only that thread ever enters it.
        let thread = std::thread::spawn(move || -> std::io::Result<OwnedFd> {
            setns(namespace, CloneFlags::CLONE_NEWNET)?;
            let family = nix::sys::socket::SockaddrLike::family(&to).unwrap();
            let socket =
                nix::sys::socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            let patience = nix::sys::time::TimeVal::new(10, 0);
            setsockopt(&socket, sockopt::SendTimeout, &patience)?;
            setsockopt(&socket, sockopt::TcpNoDelay, &true)?;
            bind(socket.as_raw_fd(), &from)?;
            connect(socket.as_raw_fd(), &to)?;
            Ok(socket)
        });
        thread.join().unwrap()
    }
}

// ---- the fleet ----

/// All of it. Fields are dropped in this order: what serves, then where it runs.
struct Fleet {
    services: BTreeMap<(&'static str, u16), Running>,
    haproxy: Running,
    dovecot: Running,
    machines: BTreeMap<&'static str, Host>,
    balancer: Host,
    mail: Host,
    clients: Host,
    switch: Host,
    test: Test,
}

impl Fleet {
    fn start(test: &Test) -> Self {
        let switch = Host::new(test);
        switch.run(&["ip", "link", "add", "br0", "type", "bridge"]);
        switch.run(&["ip", "link", "set", "br0", "up"]);
        let host = |name: &str, addresses: &[String]| {
            let host = Host::new(test);
            host.plug(&switch, name, addresses);
            host
        };
        let clients: Vec<String> = (1..=40)
            .map(|number| format!("198.51.100.{number}/24"))
            .chain(["2001:db8::7/64".to_owned()])
            .collect();
        let clients = host("clients", &clients);
        clients.run(&["ip", "route", "add", "192.0.2.0/24", "dev", "eth0"]);
        let balancer = host(
            "balancer",
            &[format!("{BALANCER}/24"), format!("{BALANCER6}/64")],
        );
        balancer.run(&["ip", "route", "add", "198.51.100.0/24", "dev", "eth0"]);
        let mail = host("mail", &["192.0.2.30/24".to_owned()]);
        let machines: BTreeMap<_, _> = MACHINES
            .map(|(name, address)| (name, host(name, &[format!("{address}/24")])))
            .into();
        let dovecot = start_dovecot(test, &mail);
        let keys = test.path("ticket-keys");
        write_file(&keys, "0123456789abcdef".repeat(4) + "\n", 0o600);
        let mut services = BTreeMap::new();
        for (name, machine) in &machines {
            for (port, policy) in [(143, "required"), (993, "implicit")] {
                services.insert((*name, port), start_service(test, machine, port, policy));
            }
        }
        let haproxy = start_haproxy(test, &balancer);
        let fleet = Self {
            services,
            haproxy,
            dovecot,
            machines,
            balancer,
            mail,
            clients,
            switch,
            test: test.clone(),
        };
        eventually("HAProxy answers", || fleet.ask_haproxy("show info").ok());
        fleet
    }

    /// A command at HAProxy's own socket.
    fn ask_haproxy(&self, command: &str) -> std::io::Result<String> {
        let mut socket = UnixStream::connect(self.test.path("admin.sock"))?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        socket.write_all(format!("{command}\n").as_bytes())?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// A field of HAProxy's statistics for a server.
    fn statistic(&self, proxy: &str, server: &str, field: &str) -> String {
        let table = self.ask_haproxy("show stat").unwrap();
        let mut lines = table.lines();
        let names: Vec<&str> = lines
            .next()
            .unwrap()
            .trim_start_matches("# ")
            .split(',')
            .collect();
        let column = names.iter().position(|name| *name == field).unwrap();
        let mut rows = lines.map(|line| line.split(',').collect::<Vec<_>>());
        let row = rows.find(|row| row[0] == proxy && row[1] == server);
        row.unwrap()[column].to_owned()
    }

    fn wait_status(&self, server: &str, wanted: &str) {
        within(
            &format!("{server} is {wanted}"),
            Duration::from_secs(60),
            || {
                let status = self.statistic("imap", server, "status");
                status.starts_with(wanted).then_some(())
            },
        );
    }

    /// A connection to the balancer from one of the clients' addresses.
    fn socket(&self, from: &str, port: u16) -> std::io::Result<OwnedFd> {
        let to = if from.contains(':') {
            BALANCER6
        } else {
            BALANCER
        };
        self.clients
            .connect(from, SocketAddr::new(to.parse().unwrap(), port))
    }

    /// A new login. Whatever goes wrong is an error, in words.
    fn log_in(
        &self,
        from: &str,
        port: u16,
        offer: &TlsOffer,
    ) -> Result<(Client, SocketAddr), String> {
        let socket = self
            .socket(from, port)
            .map_err(|error| format!("connect: {error}"))?;
        let own = std::net::TcpStream::from(socket.try_clone().unwrap())
            .local_addr()
            .unwrap();
        let mut client = Client::on(socket);
        if port == 143 {
            client.try_greeting()?;
            client.try_command("a STARTTLS")?;
        }
        client.handshake(offer)?;
        if port == 993 {
            client.try_greeting()?;
        }
        client.try_command(&format!("b {LOGIN}"))?;
        Ok((client, own))
    }

    /// Everything that the services of a machine logged.
    fn log(&self, machine: &str) -> String {
        let of_machine = self
            .services
            .iter()
            .filter(|((name, _), _)| *name == machine);
        of_machine.map(|(_, service)| service.log()).collect()
    }

    /// The machine that serves, or has served, the client at this address.
    fn machine_of(&self, client: SocketAddr) -> &'static str {
        let line = format!("{client}: secure: ");
        eventually(&format!("a machine has {client}"), || {
            let mut machines = self.machines.keys();
            machines
                .find(|machine| self.log(machine).contains(&line))
                .copied()
        })
    }

    fn dovecot_log(&self) -> String {
        std::fs::read_to_string(self.test.path("dovecot/log")).unwrap_or_default()
    }
}

/// A machine that was away has connections of which nobody will tell it that they have ended: it is told twice to stop, which is
/// the end of its patience.
impl Drop for Fleet {
    fn drop(&mut self) {
        let running = || self.services.values().map(Running::process);
        let deadline = Instant::now() + Duration::from_secs(5);
        for service in running() {
            let _ = sys::kill(service.0, libc::SIGTERM);
        }
        let is_ending = |service: &Running| {
            !service.process().alive() || service.log().contains("imap-tls: ending: ")
        };
        while !self.services.values().all(is_ending) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(3));
        }
        for service in running() {
            let _ = sys::kill(service.0, libc::SIGTERM);
        }
    }
}

/// The file as it is, with the paths of this test in the place of the machine's.
fn example(name: &str, changes: &[(&str, &Path)]) -> String {
    let mut text = std::fs::read_to_string(Path::new(FILES).join(name)).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{name}: {from}");
        text = text.replace(from, to.to_str().unwrap());
    }
    text
}

fn start_haproxy(test: &Test, balancer: &Host) -> Running {
    let socket = test.path("admin.sock");
    let text = example("haproxy.cfg", &[("/run/haproxy/admin.sock", &socket)]);
    let text = text
        .replace("log /dev/log local0", "log stdout format raw local0")
        // As many as descriptors are allowed here.
        .replace("maxconn 100000", "maxconn 2000");
    let path = test.path("haproxy.cfg");
    write_file(&path, text, 0o644);
    let tool = balancer.tool("haproxy").args(["-db", "-f"]);
    tool.arg(path).start()
}

fn start_service(test: &Test, machine: &Host, port: u16, policy: &str) -> Running {
    let keys = test.path("ticket-keys");
    let settings = test.path("imap-tls.conf");
    let text = example(
        "imap-tls.conf",
        &[
            ("/etc/imap-tls/cert.pem", &pki().cert),
            ("/etc/imap-tls/key.pem", &pki().key),
            ("/etc/imap-tls/ticket-keys", &keys),
        ],
    );
    if !settings.exists() {
        write_file(&settings, text, 0o644);
    }
    let program = Program::new(test)
        .without("--cert")
        .without("--key")
        .backend([""; 0])
        .tls(policy)
        .flag("--verbose")
        .option("--listen", port.to_string())
        .option("--settings", &settings);
    let line = program.command_line();
    let tool = machine.tool(line[0].to_str().unwrap()).args(&line[1..]);
    let mut running = tool.start();
    eventually("a service listens", || {
        assert!(!running.has_ended(), "{}", running.log());
        running.log().contains("listening on").then_some(())
    });
    running
}

fn start_dovecot(test: &Test, mail: &Host) -> Running {
    let directory = test.path("dovecot");
    let boxes = directory.join("mail");
    for path in [&directory, &boxes] {
        make_dir(path, 0o755);
    }
    std::os::unix::fs::chown(&boxes, Some(ID), Some(ID)).unwrap();
    let at = directory.display();
    let config = format!(
        "base_dir = {at}/run\nstate_dir = {at}/state\nlog_path = {at}/log\nprotocols = imap\ndisable_plaintext_auth = yes\n\
         mail_location = maildir:{at}/mail/%u\nfirst_valid_uid = 1\nmail_max_userip_connections = 1000\n\
         login_log_format_elements = user=<%u> rip=%r rport=%b lip=%l lport=%a %c\n\
         passdb {{\n  driver = static\n  args = password=sekret\n}}\n\
         userdb {{\n  driver = static\n  args = uid={ID} gid={ID} home={at}/mail/%u\n}}\n\
         service anvil {{\n  client_limit = 500\n}}\n!include {FILES}/dovecot.conf\n"
    );
    let path = directory.join("dovecot.conf");
    write_file(&path, config, 0o644);
    let mut running = mail.tool("dovecot").args(["-F", "-c"]).arg(&path).start();
    eventually("Dovecot listens", || {
        let log = std::fs::read_to_string(directory.join("log")).unwrap_or_default();
        assert!(!running.has_ended(), "{}{log}", running.log());
        let to = SocketAddr::from(([127, 0, 0, 1], 143));
        mail.connect("127.0.0.1", to).ok().map(drop)
    });
    running
}

// ---- tests ----

fn log_out(mut client: Client) {
    client.try_command("z LOGOUT").unwrap();
    assert_eq!(client.expect_end(), End::CloseNotify);
}

fn addresses(test: &Test) {
    let fleet = Fleet::start(test);
    for from in ["198.51.100.7", "198.51.100.8", "2001:db8::7"] {
        for port in [143, 993] {
            let (client, own) = fleet.log_in(from, port, &TlsOffer::new(pki())).unwrap();
            log_out(client);
            let wanted = format!("rip={}, rport={}", own.ip(), own.port());
            let line = eventually(&format!("Dovecot's log has {wanted}"), || {
                let log = fleet.dovecot_log();
                let mut lines = log.lines().map(str::to_owned);
                lines.find(|line| line.contains("Login: ") && line.contains(&wanted))
            });
            let to = if from.contains(':') {
                BALANCER6
            } else {
                BALANCER
            };
            assert!(line.contains(&format!("lip={to}, lport={port}")), "{line}");
            assert!(line.ends_with("secured") || line.ends_with("TLS"), "{line}");
            // And in ours, where the balancer is seen too.
            let machine = fleet.machine_of(own);
            let line = eventually("the session line", || {
                let log = fleet.log(machine);
                let mut lines = log.lines().map(str::to_owned);
                lines.find(|line| line.starts_with(&format!("{own}: session ")))
            });
            assert!(line.contains(&format!(" proxy={BALANCER}:")), "{line}");
        }
    }
    // The health checks have left nothing but debug lines: no warning, no refusal.
    for machine in fleet.machines.keys() {
        let log = fleet.log(machine);
        assert!(
            !log.contains("no PROXY header (") && !log.contains("refused"),
            "{log}"
        );
    }
}

fn resumption(test: &Test) {
    let fleet = Fleet::start(test);
    let mut offer = TlsOffer::new(pki());
    offer.memory = Some(Memory::default());
    let mut seen = BTreeSet::new();
    let mut resumed_elsewhere = 0;
    let mut held = Vec::new();
    for number in 0..6 {
        let (client, own) = fleet.log_in("198.51.100.7", 993, &offer).unwrap();
        // Kept open, so that the balancer chooses another machine for the next.
        held.push(client);
        let machine = fleet.machine_of(own);
        let log = fleet.log(machine);
        let line = log
            .lines()
            .find(|line| line.starts_with(&format!("{own}: secure: ")))
            .unwrap();
        assert_eq!(line.contains("resumed=yes"), number > 0, "{line}");
        resumed_elsewhere += usize::from(number > 0 && seen.insert(machine));
        if number == 0 {
            seen.insert(machine);
        }
    }
    assert_eq!((seen.len(), resumed_elsewhere), (3, 2));
    held.into_iter().for_each(log_out);
}

/// What happens at a time when all sorts of clients come and go.
struct Load<'a> {
    fleet: &'a Fleet,
    is_over: AtomicBool,
    logins: AtomicUsize,
    /// Since when logins must succeed; before, they are not counted as failed.
    failures: std::sync::Mutex<Vec<(Instant, String)>>,
}

/// How many clients come and go all the time.
const COMERS: usize = 4;
/// How many sessions are held on each machine.
const HELD: usize = 6;

impl<'a> Load<'a> {
    fn new(fleet: &'a Fleet) -> Self {
        Self {
            fleet,
            is_over: AtomicBool::new(false),
            logins: AtomicUsize::new(0),
            failures: std::sync::Mutex::default(),
        }
    }

    /// A client that comes and goes, over and over.
    fn come_and_go(&self, number: usize) {
        let from = format!("198.51.100.{}", number + 1);
        let port = if number % 2 == 0 { 143 } else { 993 };
        let offer = TlsOffer::new(pki());
        while !self.is_over.load(Ordering::Relaxed) {
            let began = Instant::now();
            let result = self
                .fleet
                .log_in(&from, port, &offer)
                .and_then(|(mut client, _)| {
                    client.try_command("n NOOP")?;
                    client.try_command("z LOGOUT")
                });
            match result {
                Ok(()) => drop(self.logins.fetch_add(1, Ordering::Relaxed)),
                Err(error) => self.failures.lock().unwrap().push((began, error)),
            }
        }
    }

    /// Waits for so many more logins.
    fn wait_logins(&self, more: usize) {
        let before = self.logins.load(Ordering::Relaxed);
        within("more logins", Duration::from_secs(120), || {
            (self.logins.load(Ordering::Relaxed) >= before + more).then_some(())
        });
    }

    /// Those that began since then.
    fn failures_since(&self, time: Instant) -> Vec<String> {
        let failures = self.failures.lock().unwrap();
        let late = failures.iter().filter(|(began, _)| *began >= time);
        late.map(|(_, error)| error.clone()).collect()
    }
}

/// Sessions that stay, by the machine that they are on.
fn hold(fleet: &Fleet) -> BTreeMap<&'static str, Vec<Client>> {
    let mut held: BTreeMap<_, Vec<Client>> = BTreeMap::new();
    for number in 0..HELD * MACHINES.len() {
        let from = format!("198.51.100.{}", 11 + number);
        let port = if number % 2 == 0 { 143 } else { 993 };
        let (mut client, own) = fleet.log_in(&from, port, &TlsOffer::new(pki())).unwrap();
        client.try_command("s SELECT INBOX").unwrap();
        held.entry(fleet.machine_of(own)).or_default().push(client);
    }
    assert_eq!(held.len(), MACHINES.len(), "leastconn spreads them");
    held
}

/// Every one of them is as it was.
fn assert_undisturbed(sessions: &mut [Client]) {
    for client in sessions {
        client.try_command("n NOOP").unwrap();
    }
}

/// Runs `body` while clients come and go, with sessions held everywhere; then they stop.
fn under_load(
    test: &Test,
    body: impl FnOnce(&Fleet, &Load, &mut BTreeMap<&'static str, Vec<Client>>),
) {
    let fleet = Fleet::start(test);
    let mut held = hold(&fleet);
    let load = Load::new(&fleet);
    std::thread::scope(|scope| {
        for number in 0..COMERS {
            let load = &load;
            scope.spawn(move || load.come_and_go(number));
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            load.wait_logins(20);
            body(&fleet, &load, &mut held);
        }));
        load.is_over.store(true, Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

/// As README.md of the fleet says: no new sessions, wait, stop.
fn drain(test: &Test) {
    under_load(test, |fleet, load, held| {
        let began = Instant::now();
        for proxy in ["imap", "imaps"] {
            fleet
                .ask_haproxy(&format!("set server {proxy}/two state drain"))
                .unwrap();
        }
        // Whoever was just being handed over is through when the machine's clients are those that are held.
        let count = |machine: &str| -> usize {
            let proxies = ["imap", "imaps"].into_iter();
            let numbers = proxies.map(|proxy| fleet.statistic(proxy, machine, "scur"));
            numbers.map(|number| number.parse::<usize>().unwrap()).sum()
        };
        within(
            "only held sessions are on it",
            Duration::from_secs(60),
            || (count("two") == held["two"].len()).then_some(()),
        );
        load.wait_logins(30);
        assert_eq!(count("two"), held["two"].len(), "nobody new is sent there");
        held.values_mut()
            .for_each(|sessions| assert_undisturbed(sessions));
        // They leave in their own time, and then the machine is free.
        held.remove("two").unwrap().into_iter().for_each(log_out);
        within("nobody is on it", Duration::from_secs(60), || {
            (count("two") == 0).then_some(())
        });
        for port in [143, 993] {
            stop(fleet, "two", port);
        }
        fleet.wait_status("two", "DOWN");
        load.wait_logins(30);
        held.values_mut()
            .for_each(|sessions| assert_undisturbed(sessions));
        assert_eq!(load.failures_since(began), [""; 0]);
    });
}

/// The listener ends when its last connection has.
fn stop(fleet: &Fleet, machine: &'static str, port: u16) {
    let service = &fleet.services[&(machine, port)];
    sys::kill(service.process().0, libc::SIGTERM).unwrap();
    eventually("the service ends", || {
        (service.process().state() == Some('Z')).then_some(())
    });
}

/// The machine's network is gone, as when somebody pulls the plug: no packet says so. Later it is back, and serves again.
fn vanish(test: &Test) {
    lost(
        test,
        |fleet| fleet.machines["two"].run(&["ip", "link", "set", "eth0", "down"]),
        |fleet| {
            fleet.machines["two"].run(&["ip", "link", "set", "eth0", "up"]);
            fleet.wait_status("two", "UP");
            within("it serves again", Duration::from_secs(60), || {
                let offer = TlsOffer::new(pki());
                let (client, own) = fleet.log_in("198.51.100.40", 993, &offer).unwrap();
                log_out(client);
                (fleet.machine_of(own) == "two").then_some(())
            });
        },
    );
}

/// All its processes are gone at once.
fn kill(test: &Test) {
    let kill = |fleet: &Fleet| {
        for ((name, _), service) in &fleet.services {
            if *name == "two" {
                let all = service.process().descendants();
                for process in [service.process()].into_iter().chain(all) {
                    // It may have ended meanwhile.
                    let _ = sys::kill(process.0, libc::SIGKILL);
                }
            }
        }
    };
    lost(test, kill, |_| {});
}

/// The machine `two` is lost, and may be found again.
fn lost(test: &Test, lose: impl FnOnce(&Fleet), find: impl FnOnce(&Fleet)) {
    under_load(test, |fleet, load, held| {
        lose(fleet);
        fleet.wait_status("two", "DOWN");
        let noticed = Instant::now();
        load.wait_logins(40);
        assert_eq!(load.failures_since(noticed), [""; 0]);
        // Those whose machine it was are told, and may come back.
        for mut client in held.remove("two").unwrap() {
            client.read_to_end();
        }
        held.values_mut()
            .for_each(|sessions| assert_undisturbed(sessions));
        find(fleet);
        load.wait_logins(10);
        assert_eq!(load.failures_since(noticed), [""; 0]);
        held.values_mut()
            .for_each(|sessions| assert_undisturbed(sessions));
    });
}

/// haproxy.cfg: 50 connections from one address, counted where all of them pass.
fn share(test: &Test) {
    const SHARE: usize = 50;
    let fleet = Fleet::start(test);
    let greedy: Vec<Client> = (0..SHARE + 5)
        .map(|_| Client::on(fleet.socket("198.51.100.7", 143).unwrap()))
        .collect();
    let mut greeted = Vec::new();
    for mut client in greedy {
        // Refused is a close or a reset, without a word.
        if client.try_greeting().is_ok() {
            greeted.push(client);
        }
    }
    assert_eq!(greeted.len(), SHARE);
    let (client, _) = fleet
        .log_in("198.51.100.8", 143, &TlsOffer::new(pki()))
        .unwrap();
    log_out(client);
}

fn strangers(test: &Test) {
    let fleet = Fleet::start(test);
    let header = "PROXY TCP4 203.0.113.1 192.0.2.10 4711 143\r\n";
    // From a neighbour in the balancer's own network, with a header that it made up.
    for (name, address) in MACHINES {
        for port in [143, 993] {
            let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
            let mut client = Client::on(fleet.mail.connect("192.0.2.30", to).unwrap());
            client.try_send_raw(header.as_bytes());
            let (said, _) = client.read_to_end();
            assert!(said.is_empty(), "{said:?}");
        }
        let log = fleet.log(name);
        assert!(
            log.contains("192.0.2.30:") && !log.contains("203.0.113.1"),
            "{log}"
        );
    }
    // Dovecot takes no header from the balancer, past the machines.
    let to = SocketAddr::from(([192, 0, 2, 30], 143));
    let mut client = Client::on(fleet.balancer.connect(BALANCER, to).unwrap());
    client.try_send_raw(header.as_bytes());
    let (said, _) = client.read_to_end();
    assert!(!String::from_utf8_lossy(&said).contains("* OK"), "{said:?}");
    assert!(!fleet.dovecot_log().contains("203.0.113.1"));
}
