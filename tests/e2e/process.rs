//! What the processes of a connection may do and know, read from the live ones: ids, groups, capabilities, filters, root,
//! descriptors, limits, the private key's bytes, and system calls attempted from inside them.

use crate::harness::ptrace::{Arg, Outcome, inject};
use crate::harness::*;
use libtest_mimic::Trial;
use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

pub fn tests() -> Vec<Trial> {
    let mut tests = vec![
        test(
            "process: before TLS the network process has no privilege left",
            &[Need::Root],
            |test| {
                let session = greeted(test);
                assert_confined(test, session.processes().network, NETWORK_ID);
            },
        ),
        test(
            "process: before TLS the keeper has no privilege left",
            &[Need::Root],
            |test| {
                let session = greeted(test);
                let keeper = session.processes().keeper.expect("a keeper");
                assert_confined(test, keeper, KEEPER_ID);
                // The network process's log may be a file, which must be able to grow; the keeper's need not.
                assert_eq!(keeper.limit("Max file size").1, "0");
            },
        ),
        test(
            "process: in TLS the network process has no privilege left and the keeper is gone",
            &[Need::Root],
            |test| {
                let session = logged_in(test);
                assert_confined(test, session.network(), NETWORK_ID);
                eventually("the keeper is gone", || {
                    session.processes().keeper.is_none().then_some(())
                });
            },
        ),
        test(
            "process: in optional, before TLS, both are confined and the backend runs",
            &[Need::Root],
            |test| {
                let mut session = Program::new(test).tls("optional").start();
                session.client().greeting();
                let processes = session.processes();
                assert_confined(test, processes.network, NETWORK_ID);
                assert_confined(test, processes.keeper.expect("a keeper"), KEEPER_ID);
                assert_eq!(
                    processes.backend,
                    Some(Process(test.record().backend(0).pid))
                );
            },
        ),
        test(
            "process: tables of functions and other relocated data are read-only",
            &[Need::Root],
            |test| {
                let session = greeted(test);
                let processes = session.processes();
                for process in [processes.network, processes.keeper.expect("a keeper")] {
                    assert_eq!(process.writable_relocated(), Vec::<String>::new());
                }
            },
        ),
        test(
            "process: users given by name are taken, with their groups dropped",
            &[Need::Root],
            users_by_name,
        ),
        test(
            "process: the memory limit is the option's",
            &[Need::Root],
            memory_limit,
        ),
        test(
            "process: each process holds only the descriptors that it needs",
            &[Need::Root],
            descriptors,
        ),
        test(
            "process: descriptors that the superserver leaked are closed everywhere",
            &[Need::Root],
            leaked_descriptors,
        ),
        test(
            "process: under tcpserver the live processes are confined too",
            &[Need::Root, Need::Command("tcpserver", "ucspi-tcp")],
            under_tcpserver,
        ),
        test(
            "process: the backend has three descriptors, default signals and no limits of ours",
            &[],
            backend_is_clean,
        ),
        test(
            "process: the backend in optional has three descriptors and default signals before and after TLS",
            &[],
            backend_in_optional_is_clean,
        ),
        test(
            "process: the backend's environment after TLS 1.3 is exactly known",
            &[],
            |test| environment(test, true),
        ),
        test(
            "process: the backend's environment after TLS 1.2 is exactly known",
            &[],
            |test| environment(test, false),
        ),
        test(
            "process: the backend in clear is told nothing of TLS",
            &[],
            environment_in_clear,
        ),
        test(
            "process: the backend keeps root unless told otherwise",
            &[Need::Root],
            backend_keeps_root,
        ),
        test(
            "process: a launcher is told of no client's certificate unless one is asked for, and starts no backend in clear that is for TLS",
            &[Need::Root, Need::X86_64],
            launcher_is_deceived,
        ),
        test(
            "process: the backend runs as its own user",
            &[Need::Root],
            backend_user,
        ),
        test(
            "process: users who are not in /etc/passwd are found with getent(1) by a static build, and only they",
            &[
                Need::Root,
                Need::Command("unshare", "util-linux"),
                Need::Command("tcpserver", "ucspi-tcp"),
            ],
            users_of_getent,
        ),
        test(
            "process: another connection's processes can be neither signalled nor traced nor read",
            &[Need::Root, Need::X86_64],
            between_connections,
        ),
        test(
            "process: the network process can open, execute and create nothing",
            &[Need::Root, Need::X86_64],
            |test| forbidden(test, Role::Network),
        ),
        test(
            "process: the keeper can open, execute and create nothing",
            &[Need::Root, Need::X86_64],
            |test| forbidden(test, Role::Keeper),
        ),
        test(
            "process: a process of the same user can neither trace nor read the network process or the keeper",
            &[Need::Root],
            same_user,
        ),
        test(
            "process: a plain user can run it when told so, and what is missing is logged",
            &[Need::Root],
            unprivileged,
        ),
    ];
    for kind in [Key::P256, Key::P384, Key::Ed25519, Key::Rsa2048] {
        tests.push(test(
            &format!("process: the {kind:?} key is in the keeper's memory and in no other"),
            &[Need::Root],
            move |test| key_in_memory(test, kind, "required"),
        ));
    }
    tests.push(test(
        "process: in optional the key is in the keeper's memory and in no other",
        &[Need::Root],
        |test| key_in_memory(test, Key::P256, "optional"),
    ));
    tests
}

/// A session in `required` before STARTTLS.
fn greeted(test: &Test) -> Session {
    let mut session = Program::new(test).start();
    session.client().greeting();
    session
}

/// A session in `required`, logged in by STARTTLS.
fn logged_in(test: &Test) -> Session {
    let mut session = Program::new(test).start();
    session.client().log_in_by_starttls(Pki::of(Key::P256));
    session
}

pub fn assert_confined(test: &Test, process: Process, id: u32) {
    let status = process.status();
    assert_eq!(status.numbers("Uid"), [id; 4]);
    let gids = status.numbers("Gid");
    assert!(
        gids.iter().all(|gid| *gid == gids[0] && *gid != 0),
        "{gids:?}"
    );
    assert!(
        status.numbers("Groups").is_empty(),
        "groups {:?}",
        status.field("Groups")
    );
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status.mask(set), 0, "{set}");
    }
    assert_eq!(status.mask("CapBnd"), 0, "CapBnd");
    assert_eq!(
        (status.field("NoNewPrivs"), status.field("Seccomp")),
        ("1", "2")
    );
    assert_eq!(process.root(), test.empty_dir());
    assert_eq!(process.cwd(), test.empty_dir());
    assert_not_dumpable(process);
    for name in ["Max core file size", "Max processes"] {
        assert_eq!(
            process.limit(name),
            ("0".to_owned(), "0".to_owned()),
            "{name}"
        );
    }
    let files: u64 = process.limit("Max open files").1.parse().expect("a limit");
    assert!(files <= 64, "Max open files {files}");
    assert!(
        memory_limits(process)
            .iter()
            .any(|limit| *limit <= 32 << 20),
        "{:?}",
        memory_limits(process)
    );
}

/// Its files in /proc belong to root as long as the process is not dumpable.
fn assert_not_dumpable(process: Process) {
    let environment = std::fs::metadata(format!("/proc/{}/environ", process.0)).unwrap();
    assert_eq!(environment.uid(), 0, "dumpable");
}

/// The hard limits on memory that are set.
fn memory_limits(process: Process) -> Vec<u64> {
    ["Max address space", "Max data size"]
        .iter()
        .filter_map(|name| process.limit(name).1.parse().ok())
        .collect()
}

fn users_by_name(test: &Test) {
    let entry = |file: &str, name: &str| {
        let text = std::fs::read_to_string(file).unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")))
            .unwrap_or_else(|| panic!("no {name} in {file}"))
            .to_owned();
        line.split(':').map(str::to_owned).collect::<Vec<_>>()
    };
    // Two accounts that every Debian has and that nothing runs as.
    let (user, keeper) = (entry("/etc/passwd", "games"), entry("/etc/passwd", "list"));
    let program = Program::new(test)
        .without("--group")
        .option("--user", "games")
        .option("--keeper-user", "list");
    let mut session = program.start();
    session.client().greeting();
    let network = session.network();
    let uid: u32 = user[2].parse().unwrap();
    assert_confined(test, network, uid);
    assert_eq!(network.status().numbers("Gid")[0].to_string(), user[3]);
    let keeper_uid: u32 = keeper[2].parse().unwrap();
    let keeper_process = network
        .children()
        .into_iter()
        .find(|child| child.status().numbers("Uid")[0] == keeper_uid)
        .expect("a keeper");
    assert_confined(test, keeper_process, keeper_uid);
}

fn memory_limit(test: &Test) {
    let mut session = Program::new(test).option("--memory-limit", "24M").start();
    session.client().greeting();
    let processes = session.processes();
    for process in [processes.network, processes.keeper.expect("a keeper")] {
        assert!(
            memory_limits(process).contains(&(24 << 20)),
            "{:?}",
            memory_limits(process)
        );
    }
    session.client().starttls(Pki::of(Key::P256));
    session.client().login();
    assert!(memory_limits(session.network()).contains(&(24 << 20)));
}

/// The inode of the server's end of the client's TCP connection, as `socket:[inode]`.
fn client_socket(session: &Session) -> String {
    let port: u16 = session.peer.rsplit(':').next().unwrap().parse().unwrap();
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let wanted = format!("0100007F:{port:04X}");
    let row = table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        // An ended connection that had the same port stays in the table for a while, as nobody's.
        .find(|fields| fields[2] == wanted && fields[9] != "0")
        .expect("the connection");
    format!("socket:[{}]", row[9])
}

fn descriptors(test: &Test) {
    let mut session = greeted(test);
    let client = client_socket(&session);
    let processes = session.processes();
    let harmless = |target: &str| {
        ["socket:", "pipe:", "anon_inode:", "/dev/null"]
            .iter()
            .any(|start| target.starts_with(start))
            || target.starts_with(test.path("log.").to_str().unwrap())
    };
    let others = [
        ("keeper", processes.keeper.expect("a keeper")),
        ("launcher", processes.launcher.expect("a launcher")),
    ];
    for (name, process) in others
        .into_iter()
        .chain([("network process", processes.network)])
    {
        // The launcher may still be on its way: nobody waits for it before TLS.
        eventually(&format!("{name} holds only what it needs"), || {
            let all = process.descriptors();
            let has_client = all.values().any(|target| *target == client);
            let is_right = all.len() <= 9
                && all.values().all(|target| harmless(target))
                && has_client == (name == "network process");
            is_right.then_some(())
        });
    }
    session.client().starttls(Pki::of(Key::P256));
    session.client().login();
    eventually("the keeper is gone", || {
        session.processes().keeper.is_none().then_some(())
    });
    let all = session.network().descriptors();
    // Client, backend, log, and at most three standard descriptors and something for SIGCHLD.
    assert!(
        all.len() <= 8 && all.values().all(|target| harmless(target)),
        "{all:?}"
    );
    let backend = test.record().backend(0).descriptors();
    assert!(
        !backend.values().any(|target| *target == client),
        "{backend:?}"
    );
    // What joins network process and backend is not shared with anyone else.
    assert!(backend[&0].starts_with("socket:"));
}

fn leaked_descriptors(test: &Test) {
    // A file that only root may read, open at a number that a superserver might leave open.
    let secret = test.path("secret");
    write_file(&secret, "secret", 0o600);
    let line = Program::new(test).command_line();
    let server = {
        let mut wrapped = vec![
            "/bin/sh".into(),
            "-c".into(),
            format!(
                "exec 7<{0} 8<>{0} 9<{0}; exec \"$0\" \"$@\"",
                secret.display()
            )
            .into(),
        ];
        wrapped.extend(line);
        Tool::new(test, wrapped[0].to_str().unwrap()).args(&wrapped[1..])
    };
    let (running, mut client) = server.talk();
    client.greeting();
    let processes = Processes::of(running.process());
    for process in [
        Some(processes.network),
        processes.keeper,
        processes.launcher,
    ]
    .into_iter()
    .flatten()
    {
        // The launcher may still be on its way: nobody waits for it before TLS.
        eventually("what the superserver leaked is closed", || {
            let all = process.descriptors();
            (!all.values().any(|target| target.contains("secret"))).then_some(())
        });
    }
    client.starttls(Pki::of(Key::P256));
    let backend = test.record().backend(0).descriptors();
    assert_eq!(backend.keys().copied().collect::<Vec<_>>(), [0, 1, 2]);
}

fn under_tcpserver(test: &Test) {
    let server = Server::start(test, Superserver::Tcpserver, &Program::new(test));
    let mut clients = [server.connect(), server.connect()];
    for client in &mut clients {
        client.greeting();
    }
    clients[1].starttls(Pki::of(Key::P256));
    clients[1].login();
    // The keeper of the one inside TLS is on its way out.
    let sessions = eventually("no keeper is left but the first one's", || {
        let sessions = server.sessions();
        let keepers = sessions.iter().filter(|one| one.keeper.is_some());
        (keepers.count() <= 1).then_some(sessions)
    });
    assert_eq!(sessions.len(), 2);
    for processes in sessions {
        assert_confined(test, processes.network, NETWORK_ID);
        if let Some(keeper) = processes.keeper {
            assert_confined(test, keeper, KEEPER_ID);
        }
    }
    // The superserver goes on watching; the clients leave first.
    drop(clients);
    eventually("the connections end", || {
        server.sessions().is_empty().then_some(())
    });
}

fn assert_clean_backend(backend: &Played) {
    let descriptors = backend.descriptors();
    assert_eq!(
        descriptors.keys().copied().collect::<Vec<_>>(),
        [0, 1, 2],
        "{descriptors:?}"
    );
    assert!(
        descriptors[&0].starts_with("socket:") && descriptors[&0] == descriptors[&1],
        "{descriptors:?}"
    );
    let status = backend.status();
    assert_eq!(
        (
            status.ignored_signals(),
            status.mask("SigBlk"),
            status.mask("SigCgt")
        ),
        (0, 0, 0)
    );
    assert_eq!(
        (status.field("NoNewPrivs"), status.field("Seccomp")),
        ("0", "0"),
        "a backend may need what we do not"
    );
    let own = std::fs::read_to_string("/proc/self/limits").unwrap();
    let limits = |text: &str| {
        text.lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        limits(&backend.limits()),
        limits(&own),
        "the limits are the superserver's"
    );
}

fn backend_is_clean(test: &Test) {
    let _session = logged_in(test);
    assert_clean_backend(&test.record().backend(0));
}

fn backend_in_optional_is_clean(test: &Test) {
    let mut session = Program::new(test)
        .tls("optional")
        .ignoring(libc::SIGPIPE)
        .blocking(libc::SIGCHLD)
        .start();
    session.client().greeting();
    assert_clean_backend(&test.record().backend(0));
    session.client().starttls(Pki::of(Key::P256));
    session.client().login();
    assert_clean_backend(&test.record().backend(1));
}

/// Variables that must not reach a backend, and one that must.
const STRAY: [(&str, &str); 12] = [
    ("TCPREMOTEINFO", "smuggled"),
    ("SSL_CLIENT_S_DN_CN", "admin"),
    ("SSL_PROTOCOL", "TLSv9"),
    ("SSL_CLIENT_VERIFY", "SUCCESS"),
    ("LISTEN_FDNAMES", "connection"),
    ("NOTIFY_SOCKET", "/run/nowhere"),
    ("WATCHDOG_USEC", "1000000000"),
    ("WATCHDOG_PID", "1"),
    ("CREDENTIALS_DIRECTORY", "/run/credentials"),
    ("IMAP_TLS_HANDSHAKE_TIMEOUT", "29"),
    ("IMAP_TLS", "0"),
    ("REMOTE_ADDR", "192.0.2.1"),
];

fn environment(test: &Test, tls13: bool) {
    let mut program = Program::new(test)
        .env("REMOTE_HOST", "host.example")
        .env("KEPT", "as it is");
    for (name, value) in STRAY {
        program = program.env(name, value);
    }
    let mut session = program.start();
    let client = session.client();
    client.greeting();
    let version = if tls13 {
        &rustls::version::TLS13
    } else {
        &rustls::version::TLS12
    };
    client.starttls_with(&TlsOffer {
        versions: vec![version],
        server_name: "mail.example".to_owned(),
        ..TlsOffer::new(Pki::of(Key::P256))
    });
    client.login();
    let mut environment = test.record().backend(0).environment();
    let port = session.peer.rsplit(':').next().unwrap().to_owned();
    assert!(
        environment
            .remove("TCPLOCALPORT")
            .unwrap()
            .parse::<u16>()
            .is_ok()
    );
    let suite = format!(
        "{:?}",
        session
            .client()
            .tls()
            .negotiated_cipher_suite()
            .unwrap()
            .suite()
    );
    let cipher = match suite.as_str() {
        "TLS13_AES_256_GCM_SHA384" => "TLS_AES_256_GCM_SHA384",
        "TLS13_AES_128_GCM_SHA256" => "TLS_AES_128_GCM_SHA256",
        "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384" => "ECDHE-ECDSA-AES256-GCM-SHA384",
        "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256" => "ECDHE-ECDSA-AES128-GCM-SHA256",
        other => panic!("unexpected cipher suite {other}"),
    };
    let path = std::env::var("PATH").unwrap();
    let wanted = [
        ("E2E_TEST", test.marker()),
        ("IMAP_TLS", "1".to_owned()),
        ("KEPT", "as it is".to_owned()),
        ("PATH", path),
        ("PROTO", "TCP".to_owned()),
        ("REMOTE_ADDR", "127.0.0.1".to_owned()),
        ("REMOTE_HOST", "host.example".to_owned()),
        ("REMOTE_PORT", port.clone()),
        ("SSL_CIPHER", cipher.to_owned()),
        ("SSL_CLIENT_VERIFY", "NONE".to_owned()),
        (
            "SSL_PROTOCOL",
            if tls13 { "TLSv1.3" } else { "TLSv1.2" }.to_owned(),
        ),
        ("SSL_SESSION_RESUMED", "Initial".to_owned()),
        ("SSL_TLS_SNI", "mail.example".to_owned()),
        ("TCPLOCALIP", "127.0.0.1".to_owned()),
        ("TCPREMOTEIP", "127.0.0.1".to_owned()),
        ("TCPREMOTEPORT", port),
    ];
    let wanted = wanted
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    assert_eq!(environment, wanted);
}

fn environment_in_clear(test: &Test) {
    let mut program = Program::new(test).tls("optional");
    for (name, value) in STRAY {
        program = program.env(name, value);
    }
    let mut session = program.start();
    session.client().greeting();
    session.client().login();
    let environment = test.record().backend(0).environment();
    for (name, value) in STRAY {
        if !["REMOTE_ADDR"].contains(&name) {
            assert!(
                !environment.contains_key(name),
                "{name} (was {value:?}) is {:?}",
                environment[name]
            );
        }
    }
    assert_eq!(environment["REMOTE_ADDR"], "127.0.0.1");
    assert!(
        !environment
            .keys()
            .any(|name| name.starts_with("SSL_") || name.starts_with("IMAP_TLS")),
        "{environment:?}"
    );
}

fn backend_keeps_root(test: &Test) {
    let _session = logged_in(test);
    let status = test.record().backend(0).status();
    assert_eq!(status.numbers("Uid"), [0; 4]);
    assert_eq!(
        status.mask("CapEff"),
        Process(std::process::id() as i32).status().mask("CapEff")
    );
}

/// A launcher's record as a network process that was taken over may write it: an order, the socket's addresses, TLS 1.3 without a
/// server name, and what the certificate of a client with this name says.
fn record(order: u8, client: Option<&str>) -> Vec<u8> {
    const ADDRESSES: usize = 37;
    const SERVER_NAME: usize = 253;
    const CLIENT: usize = 2356;
    let mut record = vec![order];
    record.extend([0; ADDRESSES]);
    record.extend([3, 4, 0x13, 1, 0, 29, 0, u8::from(client.is_some()), 0]);
    record.extend([0; SERVER_NAME]);
    let length = record.len() + CLIENT;
    if let Some(name) = client {
        let subject = format!("CN={name}");
        for text in ["CN=ca", "01", "", "", &subject, name, "", "", "AB"] {
            record.extend(u16::try_from(text.len()).unwrap().to_be_bytes());
            record.extend(text.as_bytes());
        }
    }
    record.resize(length, 0);
    record
}

/// The network process's sockets that have messages: which is the launcher's it need not know.
fn message_sockets(network: Process) -> Vec<i32> {
    const SEQPACKET: &str = "0005";
    let table = std::fs::read_to_string("/proc/net/unix").unwrap();
    let inodes: BTreeSet<String> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields.get(4) == Some(&SEQPACKET))
        .map(|fields| format!("socket:[{}]", fields[6]))
        .collect();
    let descriptors = network.descriptors().into_iter();
    let sockets = descriptors.filter(|(_, target)| inodes.contains(target));
    sockets.map(|(number, _)| number).collect()
}

fn launcher_is_deceived(test: &Test) {
    const CLEARTEXT: u8 = 1;
    const TLS: u8 = 2;
    let ca = Authority::make(&test.path("ca"), "Example CA");
    for (policy, asks, order, client, is_believed) in [
        ("required", false, TLS, None, true),
        ("required", false, TLS, Some("root"), false),
        ("required", true, TLS, Some("root"), true),
        ("required", false, CLEARTEXT, None, false),
        ("implicit", false, CLEARTEXT, None, false),
        ("optional", false, CLEARTEXT, None, false),
    ] {
        let name = format!("{policy} {order} {client:?}");
        let mut program = Program::new(test).tls(policy);
        if asks {
            program = program.option("--client-ca", &ca.file);
        }
        let mut session = program.start();
        if policy != "implicit" {
            session.client().greeting();
        }
        let network = session.wait_idle();
        let before = test.record().backends().len();
        let record = record(order, client);
        for socket in message_sockets(network) {
            let arguments = [
                Arg::Number(u64::try_from(socket).unwrap()),
                Arg::Bytes(&record),
                Arg::Number(u64::try_from(record.len()).unwrap()),
                Arg::Number(u64::try_from(libc::MSG_NOSIGNAL).unwrap()),
                Arg::Number(0),
                Arg::Number(0),
            ];
            inject(session.wait_idle(), libc::SYS_sendto, &arguments);
        }
        if is_believed {
            let environment = eventually("a backend starts", || {
                (test.record().backends().len() > before)
                    .then(|| test.record().backend(before).environment())
            });
            let found = environment.get("SSL_CLIENT_S_DN_CN").map(String::as_str);
            assert_eq!(found, client, "{name}");
        } else {
            session.wait_log("sent a record that it cannot have made in good faith");
            assert_eq!(test.record().backends().len(), before, "{name}");
        }
        session.close_client();
        session.wait();
    }
}

fn backend_user(test: &Test) {
    let text = std::fs::read_to_string("/etc/passwd").unwrap();
    let entry: Vec<&str> = text
        .lines()
        .find(|line| line.starts_with("games:"))
        .expect("an account")
        .split(':')
        .collect();
    let (uid, gid): (u32, u32) = (entry[2].parse().unwrap(), entry[3].parse().unwrap());
    for policy in ["required", "optional"] {
        let before = test.record().backends().len();
        let mut session = Program::new(test)
            .tls(policy)
            .option("--backend-user", "games")
            .env("USER", "root")
            .env("HOME", "/root")
            .start();
        session.client().greeting();
        session.client().starttls(Pki::of(Key::P256));
        session.client().login();
        for backend in &test.record().backends()[before..] {
            let status = backend.status();
            assert_eq!(
                (status.numbers("Uid"), status.numbers("Gid")),
                (vec![uid; 4], vec![gid; 4])
            );
            assert!(
                status.numbers("Groups").iter().all(|group| *group == gid),
                "{:?}",
                status.field("Groups")
            );
            assert_eq!(
                status.mask("CapEff") | status.mask("CapPrm") | status.mask("CapInh"),
                0
            );
            let environment = backend.environment();
            for (name, value) in [
                ("USER", "games"),
                ("LOGNAME", "games"),
                ("HOME", entry[5]),
                ("SHELL", entry[6]),
            ] {
                assert_eq!(environment[name], value, "{name}");
            }
        }
    }
}

/// In a mount namespace with a getent(1) that knows users of its own, and one whom it calls by another name. What it was asked is
/// written down.
fn users_of_getent(test: &Test) {
    let asked = test.path("asked");
    let script = format!(
        "#!/bin/sh\nexport | sed 's/^/env /' >> {asked}\necho \"$*\" >> {asked}\n\
         case \"$1 $3\" in\n\
         'passwd farmail'|'passwd 61030') echo 'farmail:*:61030:61031:Far:/home/far:/bin/fish';;\n\
         'passwd farnet') echo 'farnet:*:61040:61041::/:/bin/false';;\n\
         'passwd casey') echo 'Casey:*:61042:61042::/:/bin/false';;\n\
         'group fargroup') echo 'fargroup:*:61043:';;\n\
         'initgroups farmail') echo 'farmail                61031 61033 61034';;\n\
         *) exit 2;;\nesac\n",
        asked = asked.display()
    );
    let program = test.path("getent");
    write_file(&program, script, 0o755);
    let setup = format!("mount --bind {} /usr/bin/getent\n", program.display());
    let start = |program: &Program| {
        let _ = std::fs::remove_file(&asked);
        Server::start_in(test, Superserver::Tcpserver, program, Some(&setup))
    };
    let was_asked = || std::fs::read_to_string(&asked).unwrap_or_default();

    for user in ["farmail", "61030"] {
        let server = start(
            &Program::new(test)
                .option("--user", "farnet")
                .option("--group", "fargroup")
                .option("--backend-user", user),
        );
        let mut client = server.connect();
        if !is_static() {
            let (said, _) = client.read_to_end();
            assert!(said.starts_with(b"* BYE [UNAVAILABLE]"));
            server.wait_log("unknown user 'farnet' (--user)");
            assert_eq!(was_asked(), "");
            continue;
        }
        let before = test.record().backends().len();
        client.greeting();
        client.starttls(Pki::of(Key::P256));
        client.login();
        let status = test.record().backend(before).status();
        assert_eq!(status.numbers("Uid"), [61_030; 4]);
        assert_eq!(status.numbers("Gid"), [61_031; 4]);
        let mut groups = status.numbers("Groups");
        groups.sort_unstable();
        assert_eq!(groups, [61_031, 61_033, 61_034]);
        let environment = test.record().backend(before).environment();
        assert_eq!(environment["USER"], "farmail");
        assert_eq!(environment["HOME"], "/home/far");
        assert_eq!(environment["SHELL"], "/bin/fish");
        let network = server.sessions().remove(0).network.status();
        assert_eq!(network.numbers("Uid"), [61_040; 4]);
        assert_eq!(network.numbers("Gid"), [61_043; 4]);
        let text = was_asked();
        let (environment, questions): (Vec<_>, Vec<_>) =
            text.lines().partition(|line| line.starts_with("env "));
        assert_eq!(
            questions,
            [
                "passwd -- farnet",
                "group -- fargroup",
                &format!("passwd -- {user}"),
                "initgroups -- farmail"
            ]
        );
        // What a shell sets by itself.
        let is_shells = |line: &&str| {
            ["PWD=", "OLDPWD", "_=", "SHLVL="]
                .iter()
                .any(|name| line.contains(name))
        };
        assert!(environment.iter().all(is_shells), "{environment:?}");
    }

    // Nobody asks for those who are in the files, nor for bare numbers to drop to.
    let server = start(
        &Program::new(test)
            .without("--group")
            .option("--backend-user", "games"),
    );
    let mut client = server.connect();
    client.greeting();
    client.starttls(Pki::of(Key::P256));
    client.login();
    assert_eq!(was_asked(), "");
    drop(client);

    for (user, option) in [("casey", "--backend-user"), ("nobody-here", "--user")] {
        let server = start(&Program::new(test).without("--group").option(option, user));
        let (said, _) = server.connect().read_to_end();
        assert!(said.starts_with(b"* BYE [UNAVAILABLE]"), "{user}");
        server.wait_log(&format!("unknown user '{user}' ({option})"));
    }
}

/// Needles as byte strings, and the names of those found.
fn keys_found(process: Process, secrets: &[(String, Vec<u8>)]) -> BTreeSet<String> {
    let needles: Vec<Vec<u8>> = secrets.iter().map(|(_, bytes)| bytes.clone()).collect();
    secrets
        .iter()
        .zip(process.find_in_memory(&needles))
        .filter(|(_, found)| *found)
        .map(|((name, _), _)| name.clone())
        .collect()
}

fn key_in_memory(test: &Test, kind: Key, policy: &str) {
    let pki = Pki::of(kind);
    let secrets = pki.secrets();
    let mut session = Program::new(test).pki(pki).tls(policy).start();
    session.client().greeting();
    let check = |session: &Session, when: &str, keeper_must_have_it: bool| {
        let processes = session.processes();
        for (name, process) in [
            ("network process", Some(processes.network)),
            ("launcher", processes.launcher),
            ("backend", processes.backend),
        ] {
            let Some(process) = process else { continue };
            let found = keys_found(process, &secrets);
            assert!(
                found.is_empty(),
                "{when}: the {name} has {found:?} of the key in its memory"
            );
        }
        if keeper_must_have_it {
            // Else the search itself would prove nothing.
            let found = keys_found(processes.keeper.expect("a keeper"), &secrets);
            assert!(
                !found.is_empty(),
                "{when}: nothing of the key found in the keeper either"
            );
        }
    };
    check(&session, "before TLS", true);
    assert!(session.client().command("a STARTTLS").is_ok());
    check(&session, "after STARTTLS", true);
    // The server has signed and waits for the client's Finished.
    session
        .client()
        .handshake_until_server_is_heard(&TlsOffer::new(pki))
        .unwrap();
    check(&session, "in the handshake", false);
    session.client().finish_handshake().unwrap();
    session.client().login();
    check(&session, "in TLS", false);
    assert!(session.client().command("z LOGOUT").is_ok());
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Role {
    Network,
    Keeper,
}

/// One attempted system call in a session of its own (a refusal may kill). Afterwards, if the process lives, the session must still work: the
/// attempt has changed nothing.
fn attempt(test: &Test, role: Role, name: &str, number: i64, arguments: &[Arg]) -> Outcome {
    let mut session = greeted(test);
    session.wait_idle();
    let process = match role {
        Role::Network => session.network(),
        Role::Keeper => session.processes().keeper.expect("a keeper"),
    };
    eventually("it waits", || (process.state() == Some('S')).then_some(()));
    let outcome = inject(process, number, arguments);
    assert!(outcome.is_refused(), "{name}: {outcome:?}");
    if matches!(outcome, Outcome::Returned(_)) {
        assert!(
            session.client().command("after NOOP").is_ok(),
            "{name}: the session is broken by a refused call"
        );
        session.client().starttls(Pki::of(Key::P256));
    }
    session.close_client();
    session.wait();
    outcome
}

fn forbidden(test: &Test, role: Role) {
    let cwd = Arg::Number(-100_i64 as u64);
    let zero = Arg::Number(0);
    let number = Arg::Number;
    let path = Arg::Bytes(b"/\0");
    let file = Arg::Bytes(b"/x\0");
    let socket = |domain: i32| {
        [
            number(domain as u64),
            number(libc::SOCK_STREAM as u64),
            zero,
        ]
    };
    let calls: Vec<(&str, i64, Vec<Arg>)> = vec![
        ("openat", libc::SYS_openat, vec![cwd, path, zero]),
        ("open", libc::SYS_open, vec![path, zero]),
        (
            "openat to create",
            libc::SYS_openat,
            vec![
                cwd,
                file,
                number((libc::O_CREAT | libc::O_WRONLY) as u64),
                number(0o600),
            ],
        ),
        ("mkdir", libc::SYS_mkdir, vec![file, number(0o700)]),
        ("unlink", libc::SYS_unlink, vec![file]),
        ("execve", libc::SYS_execve, vec![file, zero, zero]),
        ("fork", libc::SYS_fork, vec![]),
        ("vfork", libc::SYS_vfork, vec![]),
        (
            "clone",
            libc::SYS_clone,
            vec![number(libc::SIGCHLD as u64), zero, zero, zero, zero],
        ),
        ("clone3", libc::SYS_clone3, vec![zero, zero]),
        (
            "socket inet",
            libc::SYS_socket,
            socket(libc::AF_INET).to_vec(),
        ),
        (
            "socket unix",
            libc::SYS_socket,
            socket(libc::AF_UNIX).to_vec(),
        ),
        ("connect", libc::SYS_connect, vec![zero, zero, zero]),
        ("setuid", libc::SYS_setuid, vec![zero]),
        ("setresuid", libc::SYS_setresuid, vec![zero, zero, zero]),
        ("setgid", libc::SYS_setgid, vec![zero]),
        ("setgroups", libc::SYS_setgroups, vec![zero, zero]),
        ("chroot", libc::SYS_chroot, vec![path]),
        ("chdir", libc::SYS_chdir, vec![path]),
        ("mount", libc::SYS_mount, vec![zero, zero, zero, zero, zero]),
        (
            "unshare",
            libc::SYS_unshare,
            vec![number(libc::CLONE_NEWUSER as u64)],
        ),
        ("ptrace", libc::SYS_ptrace, vec![zero, zero, zero, zero]),
        (
            "process_vm_readv",
            libc::SYS_process_vm_readv,
            vec![number(1), zero, zero, zero, zero, zero],
        ),
        ("pidfd_open", libc::SYS_pidfd_open, vec![number(1), zero]),
        (
            "setrlimit",
            libc::SYS_setrlimit,
            vec![number(u64::from(libc::RLIMIT_NOFILE)), zero],
        ),
        (
            "prlimit64",
            libc::SYS_prlimit64,
            vec![zero, number(u64::from(libc::RLIMIT_NOFILE)), zero, zero],
        ),
        (
            "prctl dumpable",
            libc::SYS_prctl,
            vec![
                number(libc::PR_SET_DUMPABLE as u64),
                number(1),
                zero,
                zero,
                zero,
            ],
        ),
        ("bpf", libc::SYS_bpf, vec![zero, zero, zero]),
        (
            "io_uring_setup",
            libc::SYS_io_uring_setup,
            vec![number(1), zero],
        ),
        ("userfaultfd", libc::SYS_userfaultfd, vec![zero]),
        (
            "perf_event_open",
            libc::SYS_perf_event_open,
            vec![zero, zero, zero, zero, zero],
        ),
        ("memfd_create", libc::SYS_memfd_create, vec![file, zero]),
        (
            "mmap executable",
            libc::SYS_mmap,
            vec![
                zero,
                number(4096),
                number((libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64),
                number((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64),
                number(u64::MAX),
                zero,
            ],
        ),
    ];
    for (name, call, arguments) in calls {
        attempt(test, role, name, call, &arguments);
    }
}

fn between_connections(test: &Test) {
    let mut victim = logged_in(test);
    let mut waiting = greeted(test);
    let early = waiting.processes();
    let targets = [
        victim.network(),
        Process(test.record().backend(0).pid),
        early.network,
        early.keeper.expect("a keeper"),
        early.launcher.expect("a launcher"),
    ];
    for role in [Role::Network, Role::Keeper] {
        for target in targets {
            let pid = Arg::Number(target.0 as u64);
            attempt(
                test,
                role,
                "kill",
                libc::SYS_kill,
                &[pid, Arg::Number(libc::SIGKILL as u64)],
            );
            attempt(
                test,
                role,
                "tgkill",
                libc::SYS_tgkill,
                &[pid, pid, Arg::Number(libc::SIGKILL as u64)],
            );
            attempt(
                test,
                role,
                "ptrace attach",
                libc::SYS_ptrace,
                &[
                    Arg::Number(u64::from(libc::PTRACE_ATTACH)),
                    pid,
                    Arg::Number(0),
                    Arg::Number(0),
                ],
            );
            attempt(
                test,
                role,
                "ptrace seize",
                libc::SYS_ptrace,
                &[
                    Arg::Number(u64::from(libc::PTRACE_SEIZE)),
                    pid,
                    Arg::Number(0),
                    Arg::Number(0),
                ],
            );
            let memory = format!("/proc/{}/mem\0", target.0);
            let cwd = Arg::Number(-100_i64 as u64);
            attempt(
                test,
                role,
                "open mem",
                libc::SYS_openat,
                &[
                    cwd,
                    Arg::Bytes(memory.as_bytes()),
                    Arg::Number(libc::O_RDWR as u64),
                ],
            );
        }
    }
    // All of them are as well as before.
    assert!(targets.iter().all(|target| target.alive()));
    assert!(victim.client().command("a NOOP").is_ok());
    assert!(victim.client().command("z LOGOUT").is_ok());
    waiting.client().starttls(Pki::of(Key::P256));
    waiting.client().login();
}

fn same_user(test: &Test) {
    let session = greeted(test);
    let processes = session.processes();
    for (process, uid) in [
        (processes.network, NETWORK_ID),
        (processes.keeper.expect("a keeper"), KEEPER_ID),
    ] {
        assert_eq!(
            sys::as_user(uid, sys::try_ptrace, process.0),
            libc::EPERM,
            "ptrace by uid {uid}"
        );
        let error = sys::as_user(uid, sys::try_memory, process.0);
        assert!(
            [libc::EACCES, libc::EPERM].contains(&error),
            "open mem by uid {uid}: {error}"
        );
    }
}

fn unprivileged(test: &Test) {
    const USER: u32 = 61_007;
    // A key that this user can read, and nobody else.
    let pki = Pki::make(&test.path("pki"), Key::P256, |_| {});
    std::os::unix::fs::chown(&pki.key, Some(USER), Some(USER)).unwrap();
    let program = Program::new(test)
        .pki(&pki)
        .started_by(USER)
        .flag("--unprivileged");
    let program = ["--user", "--group", "--keeper-user", "--chroot"]
        .iter()
        .fold(program, |program, name| program.without(name));
    let mut session = program.start();
    session.client().greeting();
    // What a plain user can have it has: own id, no new privileges, a filter, limits, the key apart.
    let status = session.network().status();
    assert_eq!(status.numbers("Uid"), [USER; 4]);
    assert_eq!(
        (status.field("NoNewPrivs"), status.field("Seccomp")),
        ("1", "2")
    );
    // No change of ids makes these undumpable, as it does where root has started them.
    assert_not_dumpable(session.network());
    let mut keepers = session.network().children();
    keepers.retain(|child| child.status().field("Seccomp") == "2");
    assert_eq!(keepers.len(), 1, "keepers: {keepers:?}");
    assert_not_dumpable(keepers[0]);
    let found = keys_found(session.network(), &pki.secrets());
    assert!(found.is_empty(), "{found:?}");
    session.client().starttls(&pki);
    session.client().login();
    assert!(session.client().command("z LOGOUT").is_ok());
    session.wait();
    let log = session.log();
    assert!(
        log.lines()
            .any(|line| line.contains("--unprivileged") || line.contains("unprivileged")),
        "what is missing is not logged: {log}"
    );
}
