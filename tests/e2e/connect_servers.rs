//! Real IMAP servers that are connected to: Dovecot, told by PROXY headers, and Cyrus over a unix socket.
//!
//! Both run in the foreground with configuration and mail in the test's directory. Cyrus, which conflicts with every other IMAP server,
//! is a tree of unpacked packages laid over the system's in a mount namespace.

use crate::harness::*;
use crate::interop::{self, ID, PASSWORD, USER, ca};
use libtest_mimic::Trial;
use std::net::Ipv4Addr;

/// Where the clients come from: Dovecot takes a connection for secure that has one address at both ends.
const CLIENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 9);

const DOVECOT: &[Need] = &[
    Need::Root,
    Need::Command("dovecot", "dovecot-imapd"),
    Need::Command("tcpserver", "ucspi-tcp"),
];
const DOVECOT_CURL: &[Need] = &[
    Need::Root,
    Need::Command("dovecot", "dovecot-imapd"),
    Need::Command("tcpserver", "ucspi-tcp"),
    Need::Command("curl", "curl"),
];
const DOVECOT_MBSYNC: &[Need] = &[
    Need::Root,
    Need::Command("dovecot", "dovecot-imapd"),
    Need::Command("tcpserver", "ucspi-tcp"),
    Need::Command("mbsync", "isync"),
];
const CYRUS: &[Need] = &[
    Need::Root,
    Need::Command("unshare", "util-linux"),
    Need::Command("tcpserver", "ucspi-tcp"),
    Need::Command("python3", "python3"),
    Need::Unpacked("cyrus/usr/lib/cyrus/bin/imapd", "cyrus-imapd"),
];

pub fn tests() -> Vec<Trial> {
    let mut tests = Vec::new();
    for policy in ["required", "optional", "implicit"] {
        tests.push(test(
            &format!(
                "connect: dovecot, {policy}: the client's address is logged, and TLS is secure"
            ),
            DOVECOT,
            |test| dovecot_in_tls(test, policy),
        ));
    }
    tests.extend([
        test(
            "connect: dovecot, optional: without TLS it is insecure, and LOGIN refused",
            DOVECOT,
            dovecot_in_clear,
        ),
        test(
            "connect: dovecot with v1 knows the client, and nothing of TLS",
            DOVECOT,
            dovecot_by_v1,
        ),
        test(
            "connect: dovecot takes a client that has no address, and believes nothing of it",
            DOVECOT,
            dovecot_without_address,
        ),
        test(
            "connect: dovecot that is not sent a header where it wants one is a BYE",
            DOVECOT,
            dovecot_without_header,
        ),
        test(
            "connect: dovecot answers under every tag that we let through",
            DOVECOT,
            dovecot_and_tags,
        ),
        test("connect: curl with dovecot", DOVECOT_CURL, |test| {
            let dovecot = Dovecot::start(test);
            let server = dovecot.behind(test, "required", "v2");
            interop::curl(test, server.port);
            ended(&server);
        }),
        test("connect: mbsync with dovecot", DOVECOT_MBSYNC, |test| {
            let dovecot = Dovecot::start(test);
            let server = dovecot.behind(test, "required", "v2");
            interop::mbsync(test, server.port, true);
            ended(&server);
        }),
        test(
            "connect: cyrus over a unix socket, with COMPRESS=DEFLATE through us",
            CYRUS,
            cyrus,
        ),
    ]);
    tests
}

fn ended(server: &Server) {
    eventually("the connections end", || {
        server.sessions().is_empty().then_some(())
    });
}

/// A Dovecot of this test's own, which wants a header on its only port.
pub struct Dovecot {
    pub port: u16,
    log: std::path::PathBuf,
    running: tool::Running,
}

impl Drop for Dovecot {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- dovecot's log ---\n{}---", self.log());
        }
    }
}

/// An empty Maildir of the account's.
pub fn make_maildir(inbox: &std::path::Path) {
    for path in [
        inbox.to_path_buf(),
        inbox.join("new"),
        inbox.join("cur"),
        inbox.join("tmp"),
    ] {
        make_dir(&path, 0o755);
        std::os::unix::fs::chown(&path, Some(ID), Some(ID)).unwrap();
    }
}

impl Dovecot {
    pub fn start(test: &Test) -> Self {
        let directory = test.path("dovecot");
        let mail = directory.join("mail");
        make_dir(&directory, 0o755);
        make_dir(&mail, 0o755);
        let inbox = mail.join(USER);
        make_maildir(&inbox);
        let message = inbox.join("new/1.m");
        let text = "From: a@example.org\nTo: u@example.org\nSubject: t\n\nhello-body\n";
        write_file(&message, text, 0o644);
        std::os::unix::fs::chown(&message, Some(ID), Some(ID)).unwrap();
        let port = free_port();
        let config = directory.join("dovecot.conf");
        write_file(
            &config,
            dovecot_config(&directory.display().to_string(), port),
            0o644,
        );
        let running = Tool::new(test, "dovecot")
            .args(["-F", "-c"])
            .arg(&config)
            .start();
        let mut dovecot = Self {
            port,
            log: directory.join("log"),
            running,
        };
        eventually("dovecot listens", || {
            assert!(
                !dovecot.running.has_ended(),
                "dovecot ended: {}{}",
                dovecot.running.log(),
                dovecot.log()
            );
            is_listening(port).then_some(())
        });
        dovecot
    }

    pub fn target(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn program(&self, test: &Test, policy: &str, header: &str) -> Program {
        Program::new(test)
            .backend([""; 0])
            .tls(policy)
            .option("--connect", self.target())
            .option("--send-proxy", header)
    }

    fn behind(&self, test: &Test, policy: &str, header: &str) -> Server {
        let program = self.program(test, policy, header);
        Server::start(test, Superserver::Tcpserver, &program)
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The lines about who has come: one for each login, or for leaving without.
    fn wait_log(&self, wanted: &str) -> String {
        eventually(&format!("dovecot's log has {wanted:?}"), || {
            let log = self.log();
            log.lines()
                .find(|line| line.contains(wanted))
                .map(str::to_owned)
        })
    }
}

fn dovecot_config(directory: &str, port: u16) -> String {
    format!(
        "base_dir = {directory}/run\nstate_dir = {directory}/state\nlog_path = {directory}/log\nprotocols = imap\nssl = no\n\
         disable_plaintext_auth = yes\nauth_mechanisms = plain login\nmail_location = maildir:{directory}/mail/%u\nfirst_valid_uid = 1\n\
         login_log_format_elements = user=<%u> method=%m rip=%r rport=%b lip=%l lport=%a %c\n\
         passdb {{\n  driver = static\n  args = password={PASSWORD}\n}}\n\
         userdb {{\n  driver = static\n  args = uid={ID} gid={ID} home={directory}/mail/%u\n}}\n\
         haproxy_trusted_networks = 127.0.0.1\nhaproxy_timeout = 3 s\n\
         service imap-login {{\n  inet_listener imap {{\n    address = 127.0.0.1\n    port = {port}\n    haproxy = yes\n  }}\n  \
         inet_listener imaps {{\n    port = 0\n  }}\n}}\nservice anvil {{\n  client_limit = 500\n}}\n"
    )
}

fn offer() -> TlsOffer {
    TlsOffer::new(Pki::of(Key::P256))
}

fn log_in(client: &mut Client) {
    let reply = client.command(&format!("l LOGIN {USER} {PASSWORD}"));
    assert!(reply.is_ok(), "{reply:?}");
    let reply = client.command("s SELECT INBOX");
    assert!(reply.text().contains("* 1 EXISTS"), "{reply:?}");
    assert!(client.command("z LOGOUT").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
}

fn dovecot_in_tls(test: &Test, policy: &str) {
    let dovecot = Dovecot::start(test);
    let server = dovecot.behind(test, policy, "v2");
    let mut client = server.connect_from(CLIENT);
    if policy == "implicit" {
        client.handshake(&offer()).unwrap();
        let greeting = client.greeting();
        assert!(!greeting.contains("LOGINDISABLED"), "{greeting}");
    } else {
        client.greeting();
        client.starttls_with(&offer());
    }
    let said = client.command("c CAPABILITY").text();
    assert!(
        said.contains("AUTH=PLAIN")
            && !said.contains("LOGINDISABLED")
            && !said.contains("STARTTLS"),
        "{said}"
    );
    log_in(&mut client);
    let line = dovecot.wait_log("Login: ");
    for expected in [
        format!("rip={CLIENT},"),
        "lip=127.0.0.1,".to_owned(),
        format!("lport={}", server.port),
    ] {
        assert!(line.contains(&expected), "{expected} is not in {line}");
    }
    assert!(line.ends_with("secured") || line.ends_with("TLS"), "{line}");
    drop(client);
    ended(&server);
}

fn dovecot_in_clear(test: &Test) {
    let dovecot = Dovecot::start(test);
    let server = dovecot.behind(test, "optional", "v2");
    let mut client = server.connect_from(CLIENT);
    client.greeting();
    let said = client.command("c CAPABILITY").text();
    assert!(
        said.contains("LOGINDISABLED") && said.contains("STARTTLS"),
        "{said}"
    );
    let reply = client.command(&format!("l LOGIN {USER} {PASSWORD}"));
    assert!(
        reply.status().starts_with("NO [PRIVACYREQUIRED]"),
        "{reply:?}"
    );
    assert!(client.command("z LOGOUT").is_ok());
    assert_eq!(client.expect_end(), End::Eof);
    let line = dovecot.wait_log(&format!("rip={CLIENT},"));
    assert!(
        line.contains("auth failed") && !line.contains("Login: "),
        "{line}"
    );
    assert!(!line.contains("secured") && !line.contains("TLS"), "{line}");
    assert!(!dovecot.log().contains("Login: "), "{}", dovecot.log());
    drop(client);
    ended(&server);
}

/// It says `* BAD` to a tag that it does not like, which is no answer that a command could be told by: no other is taken then until
/// the login timeout. Of legal tags that we let through, those are the ones with `]`, which no client has.
fn dovecot_and_tags(test: &Test) {
    let dovecot = Dovecot::start(test);
    let server = dovecot.behind(test, "required", "v2");
    let tags = (0x21..0x7f_u8)
        .map(char::from)
        .filter(|character| !"(){%*\"\\+]".contains(*character))
        .flat_map(|character| [format!("{character}"), format!("a{character}1")])
        .chain([1, 63, 64, 65, 126, 127, 128, 129].map(|length| "a".repeat(length)));
    // What imap-tls refuses counts against the client, who may have ten.
    let mut refused = Vec::new();
    for tags in tags.collect::<Vec<_>>().chunks(8) {
        let mut client = server.connect_from(CLIENT);
        client.greeting();
        client.starttls_with(&offer());
        for tag in tags {
            client.send(format!("{tag} NOOP\r\n"));
            match client.line() {
                line if line == "* BAD Invalid tag" => refused.push(tag.clone()),
                line => assert!(line.starts_with(&format!("{tag} OK ")), "{tag}: {line}"),
            }
        }
        assert!(client.command("z LOGOUT").is_ok());
    }
    assert_eq!(
        refused,
        [65, 126, 127, 128, 129].map(|length| "a".repeat(length))
    );
    let mut client = server.connect_from(CLIENT);
    client.greeting();
    client.starttls_with(&offer());
    client.send("a] NOOP\r\n");
    let line = client.line();
    assert!(
        line.starts_with("* BAD ") && line != "* BAD Invalid tag",
        "{line}"
    );
    drop(client);
    ended(&server);
}

fn dovecot_by_v1(test: &Test) {
    let dovecot = Dovecot::start(test);
    let server = dovecot.behind(test, "required", "v1");
    let mut client = server.connect_from(CLIENT);
    client.greeting();
    client.starttls_with(&offer());
    // Ours was withdrawn with TLS; this is Dovecot's, who cannot know.
    let reply = client.command(&format!("l LOGIN {USER} {PASSWORD}"));
    assert!(
        reply.status().starts_with("NO [PRIVACYREQUIRED]"),
        "{reply:?}"
    );
    assert!(client.command("z LOGOUT").is_ok());
    let line = dovecot.wait_log(&format!("rip={CLIENT},"));
    assert!(line.ends_with(&format!("lport={}", server.port)), "{line}");
    drop(client);
    ended(&server);
}

fn dovecot_without_address(test: &Test) {
    let dovecot = Dovecot::start(test);
    let mut session = dovecot.program(test, "required", "v2").start_on(
        Socket::Unix,
        Handover::Stdio,
        Stderr::Log,
    );
    let client = session.client();
    client.greeting();
    client.starttls_with(&offer());
    // LOCAL: the addresses are those of our own connection, and what else is in the header is not looked at.
    let reply = client.command(&format!("l LOGIN {USER} {PASSWORD}"));
    assert!(
        reply.status().starts_with("NO [PRIVACYREQUIRED]"),
        "{reply:?}"
    );
    assert!(client.command("z LOGOUT").is_ok());
    session.close_client();
    assert_eq!(session.wait_code(), 0);
    dovecot.wait_log("rip=127.0.0.1,");
}

fn dovecot_without_header(test: &Test) {
    let dovecot = Dovecot::start(test);
    let mut session = dovecot
        .program(test, "required", "v2")
        .without("--send-proxy")
        .start();
    let client = session.client();
    client.greeting();
    client.starttls_with(&offer());
    let line = client.line();
    assert!(line.starts_with("* BYE [UNAVAILABLE]"), "{line}");
    session.close_client();
    assert_eq!(session.wait_code(), 111);
    session.wait_log("it closed before its greeting");
}

// ---- Cyrus ----

fn cyrus(test: &Test) {
    let directory = test.path("cyrus");
    let socket = directory.join("run/imap");
    let mut master = Tool::new(test, "unshare")
        .args(["--mount", "--propagation", "private", "/bin/sh", "-c"])
        .arg(cyrus_script(test))
        .start();
    eventually("cyrus listens", || {
        assert!(!master.has_ended(), "cyrus ended: {}", master.log());
        socket.exists().then_some(())
    });
    let program = Program::new(test)
        .backend([""; 0])
        .option("--connect", format!("unix:{}", socket.display()));
    let server = Server::start(test, Superserver::Tcpserver, &program);
    let said = Tool::new(test, "python3")
        .args(["-c", DEFLATE])
        .args([&server.port.to_string(), &ca(), USER, PASSWORD])
        .run()
        .success()
        .text();
    assert!(said.contains("all is well"), "{said}");
    ended(&server);
}

/// Puts the unpacked Cyrus in place, makes its directories and an account, and becomes its master.
fn cyrus_script(test: &Test) -> String {
    let directory = test.path("cyrus");
    make_dir(&directory, 0o755);
    for (name, line) in [
        ("passwd", "cyrus:x:61012:8::/:/bin/false\n"),
        ("group", "sasl:x:61013:cyrus\n"),
    ] {
        let all = std::fs::read_to_string(format!("/etc/{name}")).unwrap();
        let name_of = |line: &str| line.split(':').next().unwrap().to_owned();
        let others = all.lines().filter(|other| name_of(other) != name_of(line));
        let all: String = others.map(|line| format!("{line}\n")).collect();
        write_file(&directory.join(name), all + line, 0o644);
    }
    let settings = format!(
        "configdirectory: {0}/lib\npartition-default: {0}/spool\ndefaultpartition: default\nadmins: cyrus\n\
         sasl_pwcheck_method: auxprop\nsasl_auxprop_plugin: sasldb\nsasl_sasldb_path: {0}/sasldb2\nsasl_mech_list: PLAIN\n\
         allowplaintext: no\nservername: localhost\nunixhierarchysep: yes\nautocreate_quota: 0\nautocreate_post: yes\n\
         lmtpsocket: {0}/run/lmtp\nidlesocket: {0}/run/idle\nnotifysocket: {0}/run/notify\nproc_path: {0}/run/proc\n\
         mboxname_lockpath: {0}/run/lock\nsyslog_prefix: cyrus\n",
        directory.display()
    );
    write_file(&directory.join("imapd.conf"), settings, 0o644);
    let services = format!(
        "START {{\n  recover cmd=\"/usr/sbin/cyrus ctl_cyrusdb -C {0}/imapd.conf -r\"\n}}\nSERVICES {{\n  \
         imap cmd=\"imapd -C {0}/imapd.conf -U 30 -p 256\" listen=\"{0}/run/imap\" prefork=0\n}}\nEVENTS {{\n}}\n",
        directory.display()
    );
    write_file(&directory.join("cyrus.conf"), services, 0o644);
    format!(
        r#"set -e
mount -t overlay overlay -o lowerdir={tree}/usr:/usr /usr
mount --bind {0}/passwd /etc/passwd
mount --bind {0}/group /etc/group
for dir in lib lib/db lib/log lib/msg lib/proc lib/ptclient lib/quota lib/sieve lib/socket lib/user spool run run/proc run/lock; do
    install -d -o cyrus -g mail {0}/$dir
done
echo {PASSWORD} | saslpasswd2 -p -c -f {0}/sasldb2 -u localhost {USER}
chown cyrus {0}/sasldb2
exec /usr/lib/cyrus/bin/master -C {0}/imapd.conf -M {0}/cyrus.conf -p {0}/run/pid
"#,
        directory.display(),
        tree = tool::tools().unwrap().join("cyrus").display(),
    )
}

/// A client that has the stream compressed after login (RFC 4978), and sends and fetches a message of 3 MiB through it.
const DEFLATE: &str = r#"
import socket, ssl, sys, zlib
port, ca, user, password = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
plain = socket.create_connection(('127.0.0.1', port), timeout=30)

class Stream:
    def __init__(self, sock):
        self.sock, self.buffer, self.inflate, self.deflate, self.raw = sock, b'', None, None, 0
    def send(self, data):
        if self.deflate:
            data = self.deflate.compress(data) + self.deflate.flush(zlib.Z_SYNC_FLUSH)
        self.sock.sendall(data)
    def fill(self):
        data = self.sock.recv(65536)
        if not data:
            raise SystemExit('the server has ended: %r' % self.buffer)
        self.raw += len(data)
        self.buffer += self.inflate.decompress(data) if self.inflate else data
    def line(self):
        while b'\r\n' not in self.buffer:
            self.fill()
        line, self.buffer = self.buffer.split(b'\r\n', 1)
        return line
    def exact(self, size):
        while len(self.buffer) < size:
            self.fill()
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data
    def command(self, text):
        tag = text.split()[0].encode()
        self.send(text.encode() + b'\r\n')
        return self.reply(tag)
    def reply(self, tag):
        lines = []
        while True:
            lines.append(self.line())
            if lines[-1].startswith(tag + b' '):
                if not lines[-1].startswith(tag + b' OK'):
                    raise SystemExit(repr(lines))
                return b'\n'.join(lines)

s = Stream(plain)
s.line()
s.command('a STARTTLS')
context = ssl.create_default_context(cafile=ca)
s = Stream(context.wrap_socket(plain, server_hostname='localhost'))
said = s.command('b CAPABILITY')
assert b'LOGINDISABLED' not in said and b'STARTTLS' not in said, said
s.command('c LOGIN %s %s' % (user, password))
said = s.command('d CAPABILITY')
assert b'COMPRESS=DEFLATE' in said, said
s.command('e COMPRESS DEFLATE')
s.inflate, s.deflate = zlib.decompressobj(-15), zlib.compressobj(9, zlib.DEFLATED, -15)
line = b'hello-body ' + b'0123456789' * 6 + b'\r\n'
message = b'From: a@example.org\r\nTo: u@example.org\r\nSubject: t\r\nMessage-ID: <1@example.org>\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\n\r\n'
message += line * (3 * 2**20 // len(line))
s.send(b'f APPEND INBOX {%d}\r\n' % len(message))
assert s.line().startswith(b'+')
s.send(message + b'\r\n')
s.reply(b'f')
assert b'* 1 EXISTS' in s.command('g SELECT INBOX')
before = s.raw
s.send(b'h FETCH 1 BODY.PEEK[]\r\n')
first = s.line()
size = int(first[first.rindex(b'{') + 1:-1])
got = s.exact(size)
assert got == message, (len(got), len(message))
s.reply(b'h')
# It was really compressed on its way through.
assert s.raw - before < len(message) // 10, s.raw - before
s.send(b'z LOGOUT\r\n')
while not s.line().startswith(b'z OK'):
    pass
print('all is well')
"#;
