//! Writes the man page and the shells' completions to a directory, from the program's own options, so that they cannot drift from
//! `--help`: `cargo run --features generate --bin generate -- DIR`.
#![allow(
    clippy::print_stderr,
    reason = "a tool for packagers: stderr is where its faults go"
)]

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs, io};

use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1) else {
        eprintln!("usage: generate DIR");
        return ExitCode::from(100);
    };
    match generate(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!(
                "generate: cannot write to {}: {error}",
                Path::new(&directory).display()
            );
            ExitCode::from(111)
        }
    }
}

fn generate(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let mut page = Vec::new();
    man_page(&mut page)?;
    fs::write(directory.join("imap-tls.8"), page)?;
    for shell in [Shell::Bash, Shell::Fish, Shell::Zsh] {
        clap_complete::generate_to(shell, &mut imap_tls::command_line(), "imap-tls", directory)?;
    }
    Ok(())
}

/// When the page's own words last changed.
const DATE: &str = "2026-11-29";

fn man_page(out: &mut dyn Write) -> io::Result<()> {
    let man = Man::new(imap_tls::command_line())
        .section("8")
        .manual("System Manager's Manual")
        .title("IMAP-TLS")
        .date(DATE);
    man.render_title(out)?;
    man.render_name_section(out)?;
    synopsis().to_writer(out)?;
    description().to_writer(out)?;
    man.render_options_section(out)?;
    for section in [
        policies(),
        certificates(),
        processes(),
        listener(),
        keeper_service(),
        files(),
        environment(),
        exit_status(),
        examples(),
        security(),
        see_also(),
    ] {
        section.to_writer(out)?;
    }
    Ok(())
}

fn section(title: &str) -> Roff {
    let mut page = Roff::new();
    page.control("SH", [title]);
    page
}

/// Paragraphs of running text at the start of a section, where the first needs no macro.
fn introduction(page: &mut Roff, texts: &[&str]) {
    if let Some((first, rest)) = texts.split_first() {
        page.text([roman(*first)]);
        paragraphs(page, rest);
    }
}

/// Paragraphs of running text.
fn paragraphs(page: &mut Roff, texts: &[&str]) {
    for text in texts {
        page.control("PP", []).text([roman(*text)]);
    }
}

/// A list of terms, each with what it means.
fn terms(page: &mut Roff, terms: &[(&str, &str)]) {
    for (term, meaning) in terms {
        page.control("TP", [])
            .text([bold(*term)])
            .text([roman(*meaning)]);
    }
}

/// Lines as they are to be typed.
fn example(page: &mut Roff, text: &str) {
    page.control("PP", [])
        .control("RS", ["4"])
        .control("nf", []);
    for line in text.lines() {
        page.text([roman(line)]);
    }
    page.control("fi", []).control("RE", []);
}

fn synopsis() -> Roff {
    let mut page = section("SYNOPSIS");
    let mut form = |is_first: bool, rest: &[Inline]| {
        if !is_first {
            page.control("br", []);
        }
        let mut line = vec![
            bold("imap-tls"),
            roman(" ["),
            italic("OPTIONS"),
            roman("] "),
        ];
        line.extend_from_slice(rest);
        page.text(line);
    };
    form(
        true,
        &[
            roman("[--] "),
            italic("BACKEND"),
            roman(" ["),
            italic("ARGS"),
            roman("]..."),
        ],
    );
    form(
        false,
        &[
            bold("--connect"),
            roman(" "),
            italic("HOST"),
            roman(":"),
            italic("PORT"),
            roman("|unix:"),
            italic("PATH"),
        ],
    );
    form(false, &[bold("--backend-fd"), roman(" "), italic("N")]);
    form(
        false,
        &[bold("--keep --keeper"), roman(" "), italic("SOCKET")],
    );
    page
}

fn description() -> Roff {
    let mut page = section("DESCRIPTION");
    introduction(
        &mut page,
        &[
            "imap-tls gives TLS to an IMAP server that has none. A superserver (systemd, xinetd, inetd, tcpserver) accepts a \
             connection and runs imap-tls with it on standard input and output, or in LISTEN_FDS. imap-tls starts BACKEND, the \
             IMAP server, on one end of a socketpair, gives up every privilege, and speaks TLS with the client: STARTTLS (RFC \
             3501, RFC 9051) on port 143, or TLS from the first byte on port 993.",
            "Each option but --keep and --check can also be set by an environment variable: IMAP_TLS_ and the option's name in capitals, as in \
             IMAP_TLS_LOGIN_TIMEOUT=60. IMAP_TLS_BACKEND holds BACKEND and its arguments, split at white space. The command line \
             wins. Users are given by name or number; neither may be root, and they must differ.",
        ],
    );
    page
}

fn policies() -> Roff {
    let mut page = section("POLICIES");
    terms(
        &mut page,
        &[
            (
                "required",
                "The default. Before TLS, imap-tls itself answers CAPABILITY, NOOP, ID, LOGOUT and STARTTLS, refuses LOGIN and \
                 AUTHENTICATE with NO [PRIVACYREQUIRED], and does not start the backend. No byte that a client sends in clear \
                 reaches it.",
            ),
            (
                "optional",
                "The backend is started at once and serves in clear, with STARTTLS added to its capabilities. At STARTTLS it is \
                 ended, and another is started inside TLS, so that nothing from before has any effect. Somebody on the path can \
                 hide STARTTLS from a client that does not insist on it.",
            ),
            (
                "implicit",
                "TLS with the first byte. The backend is started when TLS stands.",
            ),
        ],
    );
    paragraphs(
        &mut page,
        &[
            "A backend that is connected to (--connect) is connected to when another would be started. 10 seconds are the limit \
             for that. With --send-proxy, the first bytes on the connection are a header of HAProxy's PROXY protocol: v1 has the \
             client's address and ours; v2 has, after TLS, also the facts about TLS that a backend which is started finds in its \
             environment: version, cipher suite, server name, ALPN, and the common name of a verified client certificate. The \
             backend must expect the header.",
            "With --accept-proxy each connection must begin with such a header, of either version, from a balancer in --proxy-from; \
             whoever else connects is refused unread. The client is then whom it names, for the log, the backend and the \
             listener's limits. LOCAL and UNKNOWN leave the balancer's address. A header that is malformed, longer than 107 \
             (v1) or 4096 (v2) octets, or not complete in 5 seconds closes the connection.",
        ],
    );
    page
}

fn processes() -> Roff {
    let mut page = section("PROCESSES");
    introduction(
        &mut page,
        &[
            "The process that the superserver started becomes the network process: it enters its sandbox before it reads the \
             first byte from the client. Before that it forks the keeper, which alone reads private keys and ticket keys, serves \
             one handshake and ends; with --cert-dir the opener, which reads the files of one name for the keeper; and the launcher, which waits with the superserver's rights until TLS stands and then becomes \
             the backend. With --connect the connector is in the launcher's place: without privileges, as --user or --backend-user, it connects \
             a socket that the network process has too, and ends. With --keeper there is one keeper for all connections, and none is forked. \
             The network process is the last to go and exits with the backend's status.",
            "The sandbox: user and group of its own, no supplementary groups, no capabilities, an empty root directory, \
             no_new_privs, limits on memory, files and processes, neither dumpable nor traceable, and a system call filter \
             that ends the process for every call that is not on a short list. Beneath these, where the kernel has them: Landlock, \
             which denies files, TCP (ABI 4), signals to others and abstract unix sockets (ABI 6), and PR_SET_MDWE, which denies \
             memory that is written and then executed.",
            "What a kernel or container lacks of the last two is no fault by default: --check says it, the listener warns once, and \
             -v has each connection say it. --require landlock, --require landlock=N (that ABI or a later one) and --require mdwe \
             make it one: nobody is served then, and the exit status is 100.",
        ],
    );
    page
}

fn listener() -> Roff {
    let mut page = section("WITHOUT A SUPERSERVER");
    introduction(
        &mut page,
        &[
            "With --listen, or with sockets that systemd hands over, imap-tls needs no superserver. The listener keeps its rights, reads no \
             byte that a client sends, and forks the processes of each connection; one keeper, which it starts anew if it dies, serves all. \
             A client beyond --max-connections or --max-per-source is told so in a BYE and closed.",
            "NOTIFY_SOCKET is told of readiness, reload and end, with the number of connections, and WATCHDOG_USEC is kept.",
        ],
    );
    terms(
        &mut page,
        &[
            (
                "SIGHUP",
                "Reads the file of --settings, certificates, keys and users anew. If anything is wrong with them, all stays as it was, \
                 and the log says why. Connections that are open stay as they are.",
            ),
            (
                "SIGTERM, SIGINT",
                "Takes no new connections; those that there are have --drain-timeout to end. Then whoever has not logged in is told \
                 BYE, and the backends of the others see the end of their input. A second signal shortens it. What \
                 stops the listener must wait longer than --drain-timeout: TimeoutStopSec= in the units is 60 seconds.",
            ),
        ],
    );
    page
}

fn keeper_service() -> Roff {
    let mut page = section("ONE KEEPER FOR ALL CONNECTIONS");
    introduction(
        &mut page,
        &[
            "imap-tls --keep is a keeper that stays, for all connections that a superserver starts. It listens at --keeper SOCKET, which is \
             made for root alone, or on a socket that systemd hands over (ListenSequentialPacket=). Connections are given the same \
             --keeper, start no keeper of their own, and read none of --cert, --key, --cert-dir, --ocsp and --ticket-keys, so that they need \
             not be able to. Each comes there before it reads from its client, and may ask for as much as one handshake needs. The \
             listener has such a keeper by itself, and is not given --keeper.",
            "At most --max-connections are inside at a time, until their handshakes are over. Whoever is one too many waits; after 10 to 20 seconds, or \
             where nobody listens, the client is told BYE [UNAVAILABLE], and the exit status is 111. A keeper that dies is started anew.",
            "NOTIFY_SOCKET and WATCHDOG_USEC are as above.",
        ],
    );
    terms(
        &mut page,
        &[
            (
                "SIGHUP",
                "Reads the file of --settings, certificates, keys and users anew, as happens every hour (--renewal). If anything is wrong with \
                 them, all stays as it was, and the log says why.",
            ),
            (
                "SIGTERM, SIGINT",
                "Lets nobody in any more; handshakes that can begin or have begun have --drain-timeout to end. A second signal shortens it. \
                 Sessions inside TLS are not touched.",
            ),
        ],
    );
    paragraphs(
        &mut page,
        &[
            "Packages bring imap-tls-keeper.socket and imap-tls-keeper.service. How to switch to them, take the keys away from the \
             units of connections, and go back is told in /usr/share/doc/imap-tls/GUIDE.md.",
        ],
    );
    page
}

fn files() -> Roff {
    let mut page = section("FILES");
    terms(
        &mut page,
        &[
            (
                "/etc/imap-tls/imap-tls.conf",
                "Settings, one NAME=VALUE a line, for what the packages bring: systemd puts them into the environment of a \
                 connection's process. The services (the listener, the keeper) have it read by --settings, and xinetd and inetd by \
                 /usr/libexec/imap-tls/with-settings, which sets IMAP_TLS_SETTINGS.",
            ),
            (
                "/var/lib/imap-tls/empty",
                "The directory in which the network process and the keeper are confined: root's and empty.",
            ),
            (
                "/run/imap-tls",
                "Ticket keys (--ticket-keys), as the packages have it: made, changed and forgotten by imap-tls itself.",
            ),
            (
                "/run/imap-tls/keeper",
                "The socket of imap-tls-keeper.service, if --keeper names it.",
            ),
            (
                "/dev/log",
                "The system log, where standard error is the client's or was closed.",
            ),
        ],
    );
    paragraphs(
        &mut page,
        &[
            "Certificates and keys are read anew for each connection, by a listener, and by a keeper that stays, every hour (--renewal) and at \
             SIGHUP, so a renewed certificate needs no reload. A key must not be readable by everybody.",
        ],
    );
    page
}

fn certificates() -> Roff {
    let mut page = section("CERTIFICATES AND TICKETS");
    introduction(
        &mut page,
        &[
            "--cert, --key, --ocsp and --client-crl may be repeated; in the environment, values are separated by colons. Each \
             --cert needs its --key, in the same order, or every key is in its certificate's file. A client is shown the first \
             certificate whose kind of key it can verify, so name ECDSA before RSA.",
            "--cert-dir is looked through for the name that the client asks for: NAME.pem, with chain and key, or \
             NAME/fullchain.pem and NAME/privkey.pem; then for *.DOMAIN in the place of NAME; then for DOMAIN, if that certificate \
             is for NAME too; all in lower case. A client that asks for another name, or for none, is shown a --cert; with --strict-sni, or \
             without any --cert, it gets the alert unrecognized_name.",
            "--ticket-keys names a directory, in which keys are made that seal tickets for up to 12 hours and open them for 24; or a file \
             with a key of 64 hexadecimal digits in each line, of which the first seals and all open, and which nobody changes \
             but you. A session can be resumed for 12 hours, with the same policy, name and demand of client certificates.",
            "With --client-ca clients are asked for a certificate; --client-cert request lets those in who have none. With \
             --client-crl each certificate of a client's chain must be on no list, and have a list that is in force. \
             --backend-user-from-cert runs the backend as the user whose name is the certificate's common name.",
        ],
    );
    page
}

fn environment() -> Roff {
    let mut page = section("ENVIRONMENT");
    introduction(
        &mut page,
        &["A backend that is started gets the superserver's environment, with these set:"],
    );
    terms(
        &mut page,
        &[
            (
                "PROTO, TCPREMOTEIP, TCPREMOTEPORT, TCPLOCALIP, TCPLOCALPORT, REMOTE_ADDR, REMOTE_PORT",
                "The connection's addresses.",
            ),
            (
                "SSL_PROTOCOL, SSL_CIPHER, SSL_TLS_SNI",
                "After TLS: version, cipher suite, and the name that the client asked for.",
            ),
            (
                "SSL_SESSION_RESUMED, SSL_CLIENT_VERIFY",
                "After TLS: Initial or Resumed; SUCCESS with a verified client certificate, or NONE.",
            ),
            (
                "SSL_CLIENT_S_DN, SSL_CLIENT_I_DN, SSL_CLIENT_S_DN_CN, SSL_CLIENT_S_DN_Email, SSL_CLIENT_SAN_Email_0, \
               SSL_CLIENT_SAN_DNS_0, SSL_CLIENT_M_SERIAL, SSL_CLIENT_V_END, SSL_CLIENT_CERT_SHA256",
                "What the client's certificate says, by the names of Apache's mod_ssl, and its SHA-256.",
            ),
            (
                "IMAP_TLS",
                "1 after TLS; Courier takes it to mean that the session is secure.",
            ),
            (
                "USER, LOGNAME, HOME, SHELL",
                "Those of the backend's user, if it is not the superserver's.",
            ),
        ],
    );
    paragraphs(
        &mut page,
        &[
            "Removed are TCPREMOTEINFO, other variables that begin with SSL_ or LISTEN_, NOTIFY_SOCKET, WATCHDOG_PID, \
           WATCHDOG_USEC, MAINPID, CREDENTIALS_DIRECTORY, and imap-tls's own options.",
        ],
    );
    page
}

fn exit_status() -> Roff {
    let mut page = section("EXIT STATUS");
    terms(
        &mut page,
        &[
            (
                "the backend's",
                "When there was a backend and it ended; 128 and the signal's number if one killed it.",
            ),
            (
                "0",
                "The client went away, or did something wrong, before there was one.",
            ),
            (
                "100",
                "Usage or set-up: the log line names the option that mends it.",
            ),
            (
                "111",
                "A temporary fault of the system, a keeper that is not there (--keeper), or a backend that cannot be connected to, or is gone before it has greeted (--connect).",
            ),
        ],
    );
    page
}

fn examples() -> Roff {
    let mut page = section("EXAMPLES");
    introduction(
        &mut page,
        &[
            "Packages bring units, entries and run scripts for each superserver, which take their settings from \
             /etc/imap-tls/imap-tls.conf. By hand, with the settings on the command line, port 143 and GNU mailutils' server are \
             served as follows; for port 993 add --tls implicit. CERT and KEY are files in PEM form.",
        ],
    );
    superserver_examples(&mut page);
    page.control("SS", ["Backends"]);
    introduction(
        &mut page,
        &[
            "Settings for the environment, as in /etc/imap-tls/imap-tls.conf. What else each server needs is told in \
             /usr/share/doc/imap-tls/GUIDE.md.",
        ],
    );
    for (server, settings) in backends() {
        page.control("PP", []).text([bold(server)]);
        example(&mut page, &settings);
    }
    page.control("SS", ["Trying it"]);
    introduction(
        &mut page,
        &["What is wrong with the set-up, and what a client sees:"],
    );
    example(
        &mut page,
        "/usr/libexec/imap-tls/with-settings imap-tls --check\n\
         openssl s_client -starttls imap -connect HOST:143\n\
         curl --ssl-reqd -u USER imap://HOST/INBOX",
    );
    page
}

fn superserver_examples(page: &mut Roff) {
    const EXAMPLES: &[(&str, &str, &str)] = &[
        (
            "systemd",
            "With the package: systemctl enable --now imap-tls.socket imaps-tls.socket. By hand, as NAME.socket and \
             NAME@.service:",
            "[Socket]\n\
             ListenStream=143\n\
             Accept=yes\n\
             MaxConnectionsPerSource=20\n\
             TriggerLimitIntervalSec=0\n\
             \n\
             [Service]\n\
             ExecStart=-/usr/sbin/imap-tls --cert CERT --key KEY -- /usr/sbin/imap4d --inetd\n\
             StandardInput=socket\n\
             StandardError=journal",
        ),
        (
            "xinetd",
            "With the package: disable = no in /etc/xinetd.d/imap-tls and imaps-tls. By hand:",
            "service imap\n\
             {\n\
             \x20   socket_type = stream\n\
             \x20   protocol    = tcp\n\
             \x20   wait        = no\n\
             \x20   user        = root\n\
             \x20   per_source  = 20\n\
             \x20   cps         = 200 2\n\
             \x20   server      = /usr/sbin/imap-tls\n\
             \x20   server_args = --cert CERT --key KEY -- /usr/sbin/imap4d --inetd\n\
             }",
        ),
        (
            "inetd",
            "In /etc/inetd.conf:",
            "imap stream tcp nowait.6000 root /usr/sbin/imap-tls imap-tls --cert CERT --key KEY -- /usr/sbin/imap4d --inetd",
        ),
        (
            "tcpserver",
            "In the run script of daemontools, runit or s6; whole service directories are in \
             /usr/share/doc/imap-tls/examples/tcpserver:",
            "exec 2>&1\n\
             exec tcpserver -v -R -H -l 0 -c 1000 0 143 imap-tls --cert CERT --key KEY -- /usr/sbin/imap4d --inetd",
        ),
    ];
    page.control("SS", ["Superservers"]);
    for (name, text, lines) in EXAMPLES {
        terms(page, &[(name, text)]);
        example(page, lines);
    }
}

/// The settings of each section on backends in the guide, so that the page cannot say otherwise.
fn backends() -> Vec<(&'static str, String)> {
    let guide = include_str!("GUIDE.md");
    let sections = guide
        .split("\n## ")
        .find(|part| part.starts_with("Backends"));
    sections
        .unwrap_or_default()
        .split("\n### ")
        .skip(1)
        .map(|section| {
            let mut settings = String::new();
            for line in section.lines() {
                match line.strip_prefix("    ") {
                    Some(code) if code.starts_with("IMAP_TLS_") => settings += &format!("{code}\n"),
                    _ if settings.is_empty() || settings.ends_with("\n\n") => {}
                    // What the guide has apart is one thing or the other.
                    _ => settings.push('\n'),
                }
            }
            (
                section.lines().next().unwrap_or_default(),
                settings.trim_end().to_owned(),
            )
        })
        .filter(|(_, settings)| !settings.is_empty())
        .collect()
}

fn security() -> Roff {
    let mut page = section("SECURITY CONSIDERATIONS");
    introduction(
        &mut page,
        &[
            "A hole in the TLS code gives an attacker an empty directory, an unused user and a handful of system calls: what \
             passes through that one connection, but no private key, no root, no files and no other connection.",
            "Bytes that follow STARTTLS in the same segment go to the TLS engine, where anything but a ClientHello ends the \
             connection (CVE-2011-0411 and its kin). Faults of the set-up are found before the first byte is read, logged, and \
             answered with BYE [UNAVAILABLE]; there is no way back to clear text.",
            "The superserver must bound the number of connections.",
        ],
    );
    page
}

fn see_also() -> Roff {
    let mut page = section("SEE ALSO");
    page.text([
        bold("systemd.socket"),
        roman("(5), "),
        bold("xinetd.conf"),
        roman("(5), "),
        bold("inetd"),
        roman("(8), "),
        bold("tcpserver"),
        roman("(1), "),
        bold("imap4d"),
        roman("(8)"),
    ]);
    page
}
