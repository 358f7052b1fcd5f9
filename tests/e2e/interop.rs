//! Real IMAP servers behind the program and real mail clients in front of it: log in, select, fetch, append a message of 10 MiB
//! and get it back byte for byte.
//!
//! Each server lives in a mount namespace of its own, with a password file, mail directory and configuration of the test's: nothing of
//! the machine is changed, and tests run beside each other. Courier, which conflicts with every other IMAP server, is a tree of unpacked
//! packages laid over the system's.

use crate::harness::client::{Pattern, hex};
use crate::harness::*;
use libtest_mimic::Trial;
use std::path::Path;
use std::time::Duration;

/// The account on the servers.
pub const USER: &str = "e2email";
pub const PASSWORD: &str = "sekret";
pub const ID: u32 = 61_010;
const BIG: usize = 10 << 20;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Backends {
    Mailutils,
    Courier,
}

type ClientTest = fn(&Test, u16);

pub fn tests() -> Vec<Trial> {
    let clients: [(&str, &'static [Need], ClientTest); 4] = [
        ("curl", &[Need::Command("curl", "curl")], curl),
        (
            "python imaplib",
            &[Need::Command("python3", "python3")],
            imaplib,
        ),
        (
            "openssl s_client",
            &[Need::Command("openssl", "openssl")],
            s_client,
        ),
        (
            "gnutls-cli",
            &[Need::Command("gnutls-cli", "gnutls-bin")],
            gnutls_cli,
        ),
    ];
    let mut tests = Vec::new();
    for (client, needs, run) in clients {
        tests.push(interop_test(
            &format!("interop: {client} with mailutils imap4d"),
            Backends::Mailutils,
            needs,
            run,
        ));
        tests.push(interop_test(
            &format!("interop: {client} with courier imaplogin"),
            Backends::Courier,
            needs,
            run,
        ));
    }
    let isync: &'static [Need] = &[Need::Command("mbsync", "isync")];
    tests.extend([
        interop_test(
            "interop: mbsync with courier imaplogin",
            Backends::Courier,
            isync,
            |test, port| mbsync(test, port, true),
        ),
        // imap4d answers `BODY[HEADER.FIELDS (X-TUID)]` in a form that mbsync cannot read after it has pushed: it pulls only.
        interop_test(
            "interop: mbsync with mailutils imap4d",
            Backends::Mailutils,
            isync,
            |test, port| mbsync(test, port, false),
        ),
        interop_test(
            "interop: courier logs the client's address",
            Backends::Courier,
            &[],
            |_, _| {},
        ),
        interop_test(
            "interop: a wrong password is refused by mailutils imap4d and STARTTLS still works",
            Backends::Mailutils,
            &[],
            |_, port| wrong_password(port),
        ),
        interop_test(
            "interop: a wrong password is refused by courier imaplogin and STARTTLS still works",
            Backends::Courier,
            &[],
            |_, port| wrong_password(port),
        ),
        interop_test(
            "interop: openssl's TLS 1.2 and 1.3 and nothing older",
            Backends::Mailutils,
            &[Need::Command("openssl", "openssl")],
            tls_versions,
        ),
    ]);
    tests.push(test(
        "interop: courier knows that there is TLS after STARTTLS, and none before",
        COURIER,
        courier_sees_tls,
    ));
    tests
}

const COURIER: &[Need] = &[
    Need::Root,
    Need::Command("unshare", "util-linux"),
    Need::Command("tcpserver", "ucspi-tcp"),
    Need::Unpacked("courier/usr/lib/courier/courier/imaplogin", "courier-imap"),
    Need::Command("openssl", "openssl"),
];

/// IMAP_TLS=1 is how Courier's own TLS tells its imaplogin, which answers with other capabilities then.
fn courier_sees_tls(test: &Test) {
    prepare_account(test);
    let wrapper = prepare_courier(test);
    let program = Program::new(test)
        .tls("optional")
        .env("IMAP_TLS", "1")
        .backend(["/bin/sh", wrapper.to_str().unwrap()]);
    let setup = courier_setup(test);
    let server = Server::start_in(test, Superserver::Tcpserver, &program, Some(&setup));
    let mut client = server.connect();
    client.greeting();
    let said = client.command("a CAPABILITY").text();
    assert!(
        said.contains("UIDPLUS") && !said.contains("X-OVER-TLS"),
        "{said}"
    );
    client.starttls(Pki::of(Key::P256));
    let said = client.command("b CAPABILITY").text();
    assert!(said.contains("X-OVER-TLS"), "{said}");
    let login = format!("c LOGIN {USER} {PASSWORD}");
    assert!(client.command(&login).is_ok());
    let said = client.command("d CAPABILITY").text();
    assert!(said.contains("X-OVER-TLS"), "{said}");
    assert!(client.command("e LOGOUT").is_ok());
    drop(client);
    end_courier(test, &server);
}

fn interop_test(
    name: &str,
    backend: Backends,
    client_needs: &'static [Need],
    run: ClientTest,
) -> Trial {
    let needs: &'static [Need] = match backend {
        Backends::Mailutils => &[
            Need::Root,
            Need::Command("unshare", "util-linux"),
            Need::Command("tcpserver", "ucspi-tcp"),
            Need::Command("imap4d", "mailutils-imap4d"),
            Need::Command("openssl", "openssl"),
        ],
        Backends::Courier => COURIER,
    };
    let all: &'static [Need] = [needs, client_needs].concat().leak();
    let policy = if name.contains("STARTTLS still") {
        "optional"
    } else {
        "required"
    };
    let is_address_test = name.contains("address");
    test(name, all, move |test| {
        let server = start(test, backend, policy);
        run(test, server.port);
        if is_address_test {
            let mut client = server.connect();
            client.greeting();
            client.starttls(Pki::of(Key::P256));
            assert!(
                client
                    .command(&format!("a LOGIN {USER} {PASSWORD}"))
                    .is_ok()
            );
            assert!(client.command("b LOGOUT").is_ok());
            let line = server.wait_log("LOGOUT");
            assert!(line.contains("127.0.0.1"), "{line}");
        }
        end_courier(test, &server);
    })
}

fn end_courier(test: &Test, server: &Server) {
    eventually("the connections end", || {
        server.sessions().is_empty().then_some(())
    });
    // Courier's own daemons outlive connections; gam_server comes from its file watching.
    test.end_processes(|process| {
        let path = process
            .command_line()
            .into_iter()
            .next()
            .unwrap_or_default();
        path.ends_with("authdaemond") || path.ends_with("gam_server")
    });
}

/// The server behind the program under tcpserver.
fn start(test: &Test, backend: Backends, policy: &str) -> Server {
    let program = Program::new(test).tls(policy);
    prepare_account(test);
    match backend {
        Backends::Mailutils => {
            let program =
                program.backend([tool::find("imap4d").unwrap().to_str().unwrap(), "--inetd"]);
            Server::start_in(
                test,
                Superserver::Tcpserver,
                &program,
                Some(&mailutils_setup(test)),
            )
        }
        Backends::Courier => {
            let program = program.backend(["/bin/sh", prepare_courier(test).to_str().unwrap()]);
            Server::start_in(
                test,
                Superserver::Tcpserver,
                &program,
                Some(&courier_setup(test)),
            )
        }
    }
}

/// Copies of the account files with one account more, and its home.
pub fn prepare_account(test: &Test) {
    let home = test.path("home");
    make_dir(&home, 0o755);
    std::os::unix::fs::chown(&home, Some(ID), Some(ID)).unwrap();
    let hash = Tool::new(test, "openssl")
        .args(["passwd", "-6", PASSWORD])
        .run()
        .success()
        .text();
    let lines = [
        (
            "passwd",
            format!("{USER}:x:{ID}:{ID}::{}:/bin/sh\n", home.display()),
            0o644,
        ),
        ("group", format!("{USER}:x:{ID}:\n"), 0o644),
        (
            "shadow",
            format!("{USER}:{}:19000:0:99999:7:::\n", hash.trim()),
            0o600,
        ),
    ];
    for (name, line, mode) in lines {
        let all = std::fs::read_to_string(format!("/etc/{name}")).unwrap() + &line;
        write_file(&test.path(name), all, mode);
    }
}

/// Shell commands that put the test's account files in place.
fn account_setup(test: &Test) -> String {
    ["passwd", "group", "shadow"]
        .map(|name| format!("mount --bind {} /etc/{name}\n", test.path(name).display()))
        .concat()
}

pub fn mailutils_setup(test: &Test) -> String {
    let mbox = "From a@example.org Mon Jan  1 00:00:00 2024\nFrom: a@example.org\nTo: u@example.org\nSubject: t\n\nhello-body\n\n";
    write_file(&test.path("mbox"), mbox, 0o644);
    format!(
        "{}mount -t tmpfs -o mode=1777 tmpfs /var/mail\ncp {} /var/mail/{USER}\nchown {ID}:{ID} /var/mail/{USER}\n",
        account_setup(test),
        test.path("mbox").display()
    )
}

/// Makes the wrapper that stands in for couriertcpd: the settings in the environment, then imaplogin.
fn prepare_courier(test: &Test) -> std::path::PathBuf {
    let wrapper = test.path("imaplogin-stdio");
    write_file(
        &wrapper,
        "set -a\n. /etc/courier/imapd\n. /etc/courier/imapd-ssl\nIMAP_STARTTLS=NO\nIMAP_TLS_REQUIRED=0\n\
         IMAP_CAPABILITY_TLS=\"$IMAP_CAPABILITY_TLS X-OVER-TLS\"\n\
         exec /usr/lib/courier/courier/imaplogin /usr/bin/imapd Maildir\n",
        0o755,
    );
    wrapper
}

fn courier_setup(test: &Test) -> String {
    let tree = tool::tools().unwrap().join("courier");
    let work = test.path("courier");
    make_dir(&work, 0o755);
    // The password as userdb wants it: the same crypt hash as in shadow.
    format!(
        r#"
mount -t tmpfs -o mode=755 tmpfs {work}
for dir in etc usr; do
    mkdir {work}/$dir {work}/$dir.work
    mount -t overlay overlay -o lowerdir={tree}/$dir:/$dir,upperdir={work}/$dir,workdir={work}/$dir.work /$dir
done
{accounts}
mount -t tmpfs -o mode=755 tmpfs /run
getent passwd courier >/dev/null || {{ echo courier:x:61011:61011::/:/bin/false >> {passwd}; echo courier:x:61011: >> {group}; }}
mkdir -p /run/courier/authdaemon
chown -R courier /run/courier
sed -i 's/^authmodulelist=.*/authmodulelist="authuserdb"/' /etc/courier/authdaemonrc
hash=$(sed -n 's/^{USER}:\([^:]*\):.*/\1/p' {shadow})
( umask 077; printf '%s\thome=%s|mail=%s/Maildir|uid={ID}|gid={ID}|systempw=%s|imappw=%s\n' {USER} {home} {home} "$hash" "$hash" > /etc/courier/userdb )
makeuserdb -f /etc/courier/userdb
setpriv --reuid {ID} --regid {ID} --clear-groups maildirmake.courier {home}/Maildir
printf 'From: a@example.org\nTo: u@example.org\nSubject: t\n\nhello-body\n' > {home}/Maildir/new/1.m
chown {ID}:{ID} {home}/Maildir/new/1.m
( set -a; . /etc/courier/authdaemonrc; exec /usr/lib/courier/courier-authlib/authdaemond ) &
for i in $(seq 500); do [ -S /run/courier/authdaemon/socket ] && break; sleep 0.02; done
"#,
        work = work.display(),
        tree = tree.display(),
        accounts = account_setup(test),
        passwd = test.path("passwd").display(),
        group = test.path("group").display(),
        shadow = test.path("shadow").display(),
        home = test.path("home").display(),
    )
}

/// A message of 10 MiB: CRLF lines, none of which looks like a mailbox's "From " or starts with a dot.
fn big_message() -> Vec<u8> {
    let mut message = b"From: b@example.org\r\nTo: u@example.org\r\nSubject: big\r\nMessage-ID: <big@example.org>\r\n\r\n".to_vec();
    let mut pattern = Pattern::new(7);
    while message.len() < BIG {
        message.extend_from_slice(hex(&pattern.take(36)).as_bytes());
        message.extend_from_slice(b"\r\n");
    }
    message
}

fn assert_same(got: &[u8], wanted: &[u8]) {
    let same = got
        .iter()
        .zip(wanted)
        .take_while(|(one, other)| one == other)
        .count();
    assert!(
        got == wanted,
        "{} bytes instead of {}, the same up to {same}: {:?} instead of {:?}",
        got.len(),
        wanted.len(),
        String::from_utf8_lossy(&got[same..got.len().min(same + 80)]),
        String::from_utf8_lossy(&wanted[same..wanted.len().min(same + 80)]),
    );
}

/// The message without the headers that imap4d (Status, X-UID) and mbsync (X-TUID) add to it.
pub fn without_added_headers(message: &[u8]) -> Vec<u8> {
    let lines = message.split_inclusive(|byte| *byte == b'\n');
    lines
        .filter(|line| {
            !line.starts_with(b"Status: ")
                && !line.starts_with(b"X-UID: ")
                && !line.starts_with(b"X-TUID: ")
        })
        .flatten()
        .copied()
        .collect()
}

pub fn ca() -> String {
    Pki::of(Key::P256).ca.display().to_string()
}

pub fn curl(test: &Test, port: u16) {
    let url = |rest: &str| format!("imap://localhost:{port}/{rest}");
    let account = format!("{USER}:{PASSWORD}");
    let run = |arguments: &[&str]| {
        Tool::new(test, "curl")
            .args(["-sS", "--ssl-reqd", "--cacert", &ca(), "-u", &account])
            .args(["--login-options", "AUTH=PLAIN"])
            .args(arguments)
            .run()
    };
    let small = run(&[&url("INBOX;MAILINDEX=1")]).success();
    assert!(small.text().contains("hello-body"), "{}", small.text());
    let big = big_message();
    let file = test.path("big");
    write_file(&file, &big, 0o644);
    run(&["-T", file.to_str().unwrap(), &url("INBOX")]).success();
    let back = run(&[&url("INBOX;MAILINDEX=2")]).success().stdout;
    assert_same(&without_added_headers(&back), &big);
    let status = run(&[&url(""), "-X", "STATUS INBOX (MESSAGES)"]).success();
    assert!(status.text().contains("MESSAGES 2"), "{}", status.text());
    // It checks the certificate: with another CA it refuses.
    let other = Tool::new(test, "curl")
        .args(["-sS", "--ssl-reqd", "-u", &account, &url("INBOX")])
        .run();
    assert!(!other.status.success());
}

pub fn imaplib(test: &Test, port: u16) {
    write_file(&test.path("big"), big_message(), 0o644);
    let script = format!(
        r#"
import imaplib, ssl
imaplib._MAXLINE = 100000000
m = imaplib.IMAP4('127.0.0.1', {port})
assert 'STARTTLS' in m.capabilities and 'LOGINDISABLED' in m.capabilities, m.capabilities
try:
    m.login('{USER}', '{PASSWORD}')
    raise SystemExit('logged in before TLS')
except imaplib.IMAP4.error:
    pass
assert m.noop()[0] == 'OK'
context = ssl.create_default_context(cafile='{ca}')
context.check_hostname = False
m.starttls(context)
assert 'STARTTLS' not in m.capabilities, m.capabilities
m.login('{USER}', '{PASSWORD}')
assert m.select('INBOX') == ('OK', [b'1']), 'select'
parts = m.fetch('1', '(BODY[TEXT])')[1]
assert any(b'hello-body' in (part if isinstance(part, bytes) else part[1]) for part in parts), parts
big = open('{big}', 'rb').read()
assert m.append('INBOX', None, None, big)[0] == 'OK'
m.noop()
back = next(part[1] for part in m.fetch('2', '(BODY[])')[1] if isinstance(part, tuple))
open('{back}', 'wb').write(back)
m.logout()
print('all is well')
"#,
        ca = ca(),
        big = test.path("big").display(),
        back = test.path("back").display()
    );
    let output = Tool::new(test, "python3")
        .args(["-c", &script])
        .run()
        .success();
    assert!(output.text().contains("all is well"));
    let back = std::fs::read(test.path("back")).unwrap();
    assert_same(&without_added_headers(&back), &big_message());
}

/// Pulls the mailbox, puts the big message into the local copy, pushes it, and pulls all into a second, empty copy.
pub fn mbsync(test: &Test, port: u16, pushes: bool) {
    let big = big_message();
    let config = |place: &str, sync: &str| {
        let dir = test.path(place);
        if !dir.exists() {
            make_dir(&dir, 0o755);
        }
        let path = test.path(&format!("{place}.{}", next_number()));
        let text = format!(
            "IMAPAccount a\nHost localhost\nPort {port}\nUser {USER}\nPass {PASSWORD}\nAuthMechs LOGIN\nSSLType STARTTLS\nSystemCertificates no\nCertificateFile {ca}\nTimeout 60\n\n\
             IMAPStore r\nAccount a\n\nMaildirStore l\nPath {dir}/\nInbox {dir}/INBOX\n\n\
             Channel c\nFar :r:\nNear :l:\nPatterns INBOX\nCreate Near\nSync {sync}\nMaxSize 0\nSyncState *\n",
            ca = ca(),
            dir = dir.display()
        );
        write_file(&path, text, 0o600);
        path
    };
    let run = |config: &Path| {
        Tool::new(test, "mbsync")
            .args(["-c", config.to_str().unwrap(), "-V", "-a"])
            .patience(Duration::from_secs(120))
            .run()
            .success()
    };
    run(&config("one", "All"));
    let inbox = test.path("one/INBOX");
    assert!(
        messages(&inbox)
            .iter()
            .any(|message| contains(message, "hello-body"))
    );
    // A maildir has bare newlines; mbsync sends CRLF.
    let local: Vec<u8> = big.iter().copied().filter(|byte| *byte != b'\r').collect();
    write_file(&inbox.join("new/1700000000.1.e2e"), &local, 0o644);
    if pushes {
        run(&config("one", "All"));
    } else {
        let mut client = Client::on(std::net::TcpStream::connect(("127.0.0.1", port)).unwrap());
        client.greeting();
        client.starttls(Pki::of(Key::P256));
        append_by_hand(&mut client, &big);
        assert!(client.command("z LOGOUT").is_ok());
    }
    run(&config("two", "Pull"));
    let all = messages(&test.path("two/INBOX"));
    assert_eq!(all.len(), 2);
    let back = all
        .into_iter()
        .find(|message| contains(message, "big@example.org"))
        .expect("the big message");
    assert_same(&without_added_headers(&back), &local);
}

/// LOGIN, SELECT, and the big message appended.
fn append_by_hand(client: &mut Client, message: &[u8]) {
    let login = client.command(&format!("a1 LOGIN {USER} {PASSWORD}"));
    assert!(login.is_ok(), "{login:?}");
    assert!(
        client
            .command("a2 SELECT INBOX")
            .text()
            .contains("1 EXISTS")
    );
    client.send(format!("a3 APPEND INBOX {{{}}}\r\n", message.len()));
    let go = client.line();
    assert!(go.starts_with('+'), "{go}");
    client.send(message);
    client.send("\r\n");
    let reply = client.reply("a3");
    assert!(reply.is_ok(), "{reply:?}");
}

fn messages(maildir: &Path) -> Vec<Vec<u8>> {
    let files = ["new", "cur"]
        .into_iter()
        .flat_map(|part| std::fs::read_dir(maildir.join(part)).unwrap());
    files
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect()
}

fn contains(message: &[u8], text: &str) -> bool {
    sys::contains(message, text.as_bytes())
}

fn s_client(test: &Test, port: u16) {
    let target = format!("127.0.0.1:{port}");
    let tool = Tool::new(test, "openssl").args([
        "s_client",
        "-starttls",
        "imap",
        "-connect",
        &target,
        "-servername",
        "localhost",
    ]);
    let (_running, client) = tool
        .args([
            "-CAfile",
            &ca(),
            "-verify_return_error",
            "-verify_hostname",
            "localhost",
            "-quiet",
            "-nocommands",
        ])
        .talk();
    by_hand(client);
}

fn gnutls_cli(test: &Test, port: u16) {
    let tool = Tool::new(test, "gnutls-cli").args([
        "--starttls-proto=imap",
        "--x509cafile",
        &ca(),
        "--port",
        &port.to_string(),
        "--logfile",
        "/dev/null",
    ]);
    let (_running, client) = tool.arg("localhost").talk();
    by_hand(client);
}

/// The whole story as a person would type it into a TLS tool, whose own messages may come between.
fn by_hand(mut client: Client) {
    client.patience = Duration::from_secs(60);
    let big = big_message();
    append_by_hand(&mut client, &big);
    assert!(
        client
            .command("a4 FETCH 1 BODY[TEXT]")
            .text()
            .contains("hello-body")
    );
    client.command("a5 NOOP");
    client.send("a6 FETCH 2 BODY[]\r\n");
    let size = loop {
        let line = client.line();
        if let Some((_, size)) = line
            .strip_suffix('}')
            .and_then(|line| line.rsplit_once('{'))
        {
            break size.parse().unwrap();
        }
    };
    assert_same(&without_added_headers(&client.read_exact(size)), &big);
    assert!(client.reply("a6").is_ok());
    assert!(client.command("a7 LOGOUT").is_ok());
}

fn wrong_password(port: u16) {
    let stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    let mut client = Client::on(stream);
    client.greeting();
    assert!(client.command("c CAPABILITY").text().contains(" STARTTLS"));
    let reply = client.command(&format!("a LOGIN {USER} wrong"));
    assert!(
        reply.status().starts_with("NO") || reply.status().starts_with("BAD"),
        "{reply:?}"
    );
    client.starttls(Pki::of(Key::P256));
    let reply = client.command(&format!("b LOGIN {USER} wrong"));
    assert!(!reply.is_ok(), "{reply:?}");
    assert!(
        client
            .command(&format!("c LOGIN {USER} {PASSWORD}"))
            .is_ok()
    );
    assert!(client.command("d SELECT INBOX").text().contains("1 EXISTS"));
    assert!(client.command("e LOGOUT").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
}

fn tls_versions(test: &Test, port: u16) {
    let target = format!("127.0.0.1:{port}");
    let try_version = |arguments: &[&str]| {
        let tool = Tool::new(test, "openssl").args([
            "s_client",
            "-starttls",
            "imap",
            "-connect",
            &target,
            "-CAfile",
            &ca(),
            "-verify_return_error",
            "-brief",
        ]);
        tool.args(arguments).run().text()
    };
    for (option, name) in [("-tls1_3", "TLSv1.3"), ("-tls1_2", "TLSv1.2")] {
        let text = try_version(&[option]);
        assert!(
            text.contains(&format!("Protocol version: {name}"))
                && text.contains("Verification: OK"),
            "{text}"
        );
    }
    for option in ["-tls1_1", "-tls1"] {
        let text = try_version(&[option, "-cipher", "DEFAULT:@SECLEVEL=0"]);
        assert!(!text.contains("Protocol version"), "{text}");
    }
}
