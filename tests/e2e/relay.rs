//! Bytes both ways and every way to end: nothing is lost, nothing grows without bound, nothing is left behind.

use crate::harness::client::pattern_hash;
use crate::harness::*;
use libtest_mimic::Trial;
use std::time::Duration;

/// The network process may never hold more than this, whatever passes through (it includes the program's own code).
const MEMORY_KIB: u64 = 20 << 10;

pub fn tests() -> Vec<Trial> {
    vec![
        test(
            "relay: bulk from client to backend arrives whole in bounded memory",
            &[],
            |test| bulk(test, Direction::Up),
        ),
        test(
            "relay: bulk from backend to client arrives whole in bounded memory",
            &[],
            |test| bulk(test, Direction::Down),
        ),
        test(
            "relay: bulk both ways at once arrives whole in bounded memory",
            &[],
            |test| bulk(test, Direction::Both),
        ),
        test("relay: bulk in TLS 1.2 arrives whole", &[], bulk_tls12),
        test(
            "relay: bulk over a pair of pipes arrives whole",
            &[],
            bulk_over_pipes,
        ),
        test(
            "relay: bulk in clear, after a login in optional, arrives whole",
            &[],
            bulk_in_clear,
        ),
        test(
            "relay: a backend that does not read stops the client, not the memory",
            &[],
            backpressure_up,
        ),
        test(
            "relay: a client that does not read stops the backend, not the memory",
            &[],
            backpressure_down,
        ),
        test(
            "relay: after the client's close_notify the backend reads end of file and its answer still arrives",
            &[],
            |test| client_half_close(test, true),
        ),
        test(
            "relay: after the client's FIN without close_notify the backend's answer still arrives",
            &[],
            |test| client_half_close(test, false),
        ),
        test(
            "relay: after the client's half-close in clear the backend's answer still arrives",
            &[],
            half_close_in_clear,
        ),
        test(
            "relay: after the backend's half-close the client gets close_notify and can still send",
            &[],
            backend_half_close,
        ),
        test(
            "relay: all that the client sent before it left reaches the backend",
            &[],
            |test| client_leaves_data(test, Leaving::Closes),
        ),
        test(
            "relay: that a client was cut off shows, though the backend was behind when it was",
            &[],
            |test| client_leaves_data(test, Leaving::IsCutOff),
        ),
        test(
            "relay: a client that has closed was not cut off, though SIGTERM comes before that is read",
            &[],
            |test| client_leaves_data(test, Leaving::ClosesBeforeSigterm),
        ),
        test(
            "relay: all that the client sent before TLS broke reaches the backend",
            &[],
            tls_breaks_behind_data,
        ),
        test(
            "relay: all that the backend wrote before it ended reaches a client that reads late",
            &[],
            backend_leaves_data,
        ),
        test(
            "relay: what waits in our queue when the backend ends reaches a client that reads late",
            &[],
            backend_leaves_a_queue,
        ),
        test(
            "relay: all that the backend wrote before it was killed reaches the client",
            &[],
            backend_killed_after_writing,
        ),
        test(
            "relay: SIGTERM before login is told, in clear and inside TLS",
            &[],
            terminated_before_login,
        ),
        test(
            "relay: SIGTERM after login lets the backend say what it was about to say",
            &[],
            terminated_after_login,
        ),
        test(
            "relay: a client's reset is an ordinary end",
            &[],
            client_resets,
        ),
        test(
            "relay: a client's reset while much is under way is an ordinary end",
            &[],
            client_resets_in_bulk,
        ),
        test(
            "relay: a client that resets before TLS leaves nothing",
            &[],
            client_resets_early,
        ),
        test(
            "relay: a client that resets while the backend owes it answers leaves nothing",
            &[],
            client_resets_with_answers_due,
        ),
        test(
            "relay: a client that resets and does not let its answers be sent leaves nothing",
            &[],
            client_resets_unheard,
        ),
        test(
            "relay: a client that has left when its STARTTLS is answered leaves nothing",
            &[],
            client_leaves_before_starttls,
        ),
        test(
            "relay: a client that leaves in the middle of the handshake leaves nothing",
            &[],
            client_leaves_in_handshake,
        ),
        test(
            "relay: a killed backend gives the client a clean end",
            &[],
            backend_killed,
        ),
        test(
            "relay: a grandchild that holds the backend's socket delays nobody",
            &[],
            grandchild,
        ),
        test(
            "relay: a backend that closes its socket and lives on gives the client a clean end",
            &[],
            backend_closes_and_lives,
        ),
        test(
            "relay: a backend that ignores the client's end is waited for, and its status handed on",
            &[],
            backend_ignores_end,
        ),
        test("relay: exit statuses 0 to 63 are handed on", &[], |test| {
            exit_statuses(test, 0..64)
        }),
        test(
            "relay: exit statuses 64 to 127 are handed on",
            &[],
            |test| exit_statuses(test, 64..128),
        ),
        test(
            "relay: exit statuses 128 to 191 are handed on",
            &[],
            |test| exit_statuses(test, 128..192),
        ),
        test(
            "relay: exit statuses 192 to 255 are handed on",
            &[],
            |test| exit_statuses(test, 192..256),
        ),
        test(
            "relay: during the session there is no zombie and no other process",
            &[],
            no_zombie,
        ),
        test(
            "relay: when the network process is killed nothing of the connection survives",
            &[],
            network_killed,
        ),
        test(
            "relay: when the network process is killed before TLS nothing of the connection survives",
            &[],
            network_killed_early,
        ),
        test(
            "relay: when the keeper is killed before TLS there is no TLS and no cleartext",
            &[Need::Root],
            keeper_killed,
        ),
        test(
            "relay: when the launcher is killed before TLS the client gets a clean end",
            &[Need::Root],
            launcher_killed,
        ),
        test(
            "relay: an idle session survives being stopped and continued",
            &[],
            stopped_and_continued,
        ),
        test(
            "relay: a TLS 1.3 key update by the client is followed",
            &[],
            key_update,
        ),
    ]
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Direction {
    Up,
    Down,
    Both,
}

/// The size of bulk transfers: 1 GiB, less in builds without optimisation.
fn bulk_size() -> u64 {
    let mib = std::env::var("E2E_BULK_MIB")
        .map_or(if cfg!(debug_assertions) { 32 } else { 1024 }, |text| {
            text.parse().unwrap()
        });
    mib << 20
}

fn pki() -> &'static Pki {
    Pki::of(Key::P256)
}

/// A session in `required`, logged in by STARTTLS.
fn logged_in(test: &Test) -> Session {
    let mut session = Program::new(test).start();
    session.client().log_in_by_starttls(pki());
    session
}

fn log_out(session: &mut Session) {
    let client = session.client();
    assert!(client.command("bye LOGOUT").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    session.close_client();
    assert_eq!(session.wait_as_last().code(), Some(0));
}

fn assert_memory(session: &Session) {
    let peak = session.network().peak_kib();
    assert!(peak < MEMORY_KIB, "the network process used {peak} KiB");
}

fn transfer(client: &mut Client, direction: Direction, size: u64) {
    match direction {
        Direction::Up => client.sink(size),
        Direction::Down => client.source(size),
        Direction::Both => {
            assert!(client.command("both XECHO").is_ok());
            let (sent, received) = client.exchange(size, size);
            assert_eq!(sent, received);
        }
    }
}

fn bulk(test: &Test, direction: Direction) {
    let mut session = logged_in(test);
    let size = bulk_size();
    transfer(session.client(), direction, size);
    assert_memory(&session);
    if direction == Direction::Both {
        session.client().close_notify();
        assert_eq!(session.client().expect_end(), End::CloseNotify);
        assert_eq!(session.wait_as_last().code(), Some(0));
    } else {
        log_out(&mut session);
    }
    let line = session.session_line();
    let count = |name: &str| line[name].parse::<u64>().unwrap();
    if direction != Direction::Down {
        assert!((size..size + 1000).contains(&count("in")), "{line:?}");
    }
    if direction != Direction::Up {
        assert!((size..size + 1000).contains(&count("out")), "{line:?}");
    }
}

fn terminated_before_login(test: &Test) {
    for is_secure in [false, true] {
        let mut session = Program::new(test).start();
        let client = session.client();
        client.greeting();
        if is_secure {
            client.starttls(pki());
            assert!(client.command("a NOOP").is_ok());
        }
        session.kill(session.network(), libc::SIGTERM);
        let client = session.client();
        let goodbye = client.line();
        assert!(goodbye.starts_with("* BYE "), "{goodbye}");
        let end = if is_secure {
            End::CloseNotify
        } else {
            End::Eof
        };
        assert_eq!(client.expect_end(), end);
        session.close_client();
        assert_eq!(session.wait_as_last().code(), Some(0));
        assert_eq!(session.session_line()["end"], "terminated");
    }
}

/// The answer is larger than all buffers on the way, so that most of it is still the backend's when the signal comes.
fn terminated_after_login(test: &Test) {
    let mut session = Program::new(test).start();
    session.client().log_in_by_starttls(pki());
    let size = 8_u64 << 20;
    assert!(
        session
            .client()
            .command(&format!("a XSOURCE {size}"))
            .is_ok()
    );
    session.kill(session.network(), libc::SIGTERM);
    let (bytes, end) = session.client().read_to_end();
    assert_eq!(end, End::CloseNotify);
    assert_eq!(
        bytes,
        client::Pattern::new(2).take(usize::try_from(size).unwrap())
    );
    session.close_client();
    assert_eq!(session.wait_as_last().code(), Some(0));
    let line = session.session_line();
    assert_eq!(
        (line["end"].as_str(), line["backend"].as_str()),
        ("terminated", "0")
    );
}

fn bulk_tls12(test: &Test) {
    let mut session = Program::new(test).start();
    let client = session.client();
    client.greeting();
    client.starttls_with(&TlsOffer {
        versions: vec![&rustls::version::TLS12],
        ..TlsOffer::new(pki())
    });
    client.login();
    transfer(client, Direction::Up, 16 << 20);
    transfer(client, Direction::Down, 16 << 20);
    log_out(&mut session);
}

fn bulk_over_pipes(test: &Test) {
    let mut session = Program::new(test).start_on(Socket::Pipes, Handover::Stdio, Stderr::Log);
    session.client().log_in_by_starttls(pki());
    transfer(session.client(), Direction::Up, 16 << 20);
    transfer(session.client(), Direction::Down, 16 << 20);
    log_out(&mut session);
}

fn bulk_in_clear(test: &Test) {
    let mut session = Program::new(test).tls("optional").start();
    let client = session.client();
    client.greeting();
    client.login();
    transfer(client, Direction::Up, 32 << 20);
    transfer(client, Direction::Down, 32 << 20);
    transfer(client, Direction::Both, 32 << 20);
    assert_memory(&session);
    session.client().shutdown();
    assert_eq!(session.client().expect_end(), End::Eof);
    assert_eq!(session.wait_as_last().code(), Some(0));
}

fn backpressure_up(test: &Test) {
    let mut session = logged_in(test);
    let size = 128 << 20;
    let client = session.client();
    assert!(client.command("a XSTALL").is_ok());
    client.send(format!("b XSINK {size}\r\n"));
    let sent = client.send_until_blocked(size, Duration::from_millis(500));
    // The kernel's socket buffers hold some megabytes.
    assert!(
        sent < 64 << 20,
        "{sent} bytes were taken although the backend reads nothing"
    );
    assert_memory(&session);
    session.record().release();
    let client = session.client();
    client.send(vec![b'x'; size - sent]);
    assert!(client.reply("b").is_ok());
    assert_memory(&session);
    log_out(&mut session);
}

fn backpressure_down(test: &Test) {
    let mut session = logged_in(test);
    let size = 128 << 20;
    session.client().send(format!("a XSOURCE {size}\r\n"));
    // Nobody reads: the backend gets stuck in a write, and stays there.
    let backend = Process(session.record().backend(0).pid);
    eventually("the backend blocks in write", || {
        let stuck = || {
            if is_root() {
                backend.blocked_in() == Some(libc::SYS_write)
            } else {
                backend.state() == Some('S')
            }
        };
        (stuck() && {
            std::thread::sleep(Duration::from_millis(200));
            stuck()
        })
        .then_some(())
    });
    assert_memory(&session);
    assert!(session.client().reply("a").is_ok());
    assert_eq!(session.client().exchange(0, size).1, pattern_hash(2, size));
    assert_memory(&session);
    log_out(&mut session);
}

fn client_half_close(test: &Test, polite: bool) {
    let mut session = logged_in(test);
    let client = session.client();
    assert!(client.command("a XECHO").is_ok());
    let sent = client::Pattern::new(3).take(300_000);
    client.send(&sent);
    if polite {
        client.close_notify();
    }
    client.shutdown();
    let (echoed, end) = client.read_to_end();
    assert!(
        echoed == sent,
        "{} of {} bytes came back",
        echoed.len(),
        sent.len()
    );
    assert_eq!(end, End::CloseNotify);
    assert_eq!(session.wait_as_last().code(), Some(0));
    assert_eq!(session.record().backend(0).wait_end(), "eof");
}

fn half_close_in_clear(test: &Test) {
    let mut session = Program::new(test).tls("optional").start();
    let client = session.client();
    client.greeting();
    client.login();
    assert!(client.command("a XECHO").is_ok());
    client.send("some bytes");
    client.shutdown();
    assert_eq!(client.read_to_end(), (b"some bytes".to_vec(), End::Eof));
    assert_eq!(session.wait_as_last().code(), Some(0));
}

fn backend_half_close(test: &Test) {
    let mut session = logged_in(test);
    let client = session.client();
    assert!(client.command("a XSHUT").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    let backend = session.record().backend(0);
    assert!(Process(backend.pid).alive());
    session
        .client()
        .send("sent after the backend's half-close\r\n");
    eventually("the backend still reads", || {
        backend
            .received_text()
            .ends_with("half-close\r\n")
            .then_some(())
    });
    session.close_client();
    assert_eq!(session.wait_as_last().code(), Some(0));
    assert_eq!(backend.wait_end(), "eof");
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Leaving {
    Closes,
    ClosesBeforeSigterm,
    IsCutOff,
}

/// While the backend reads nothing.
fn client_leaves_data(test: &Test, leaving: Leaving) {
    let mut session = logged_in(test);
    let client = session.client();
    let size = 400_000;
    client.send_line_to_stalled(size);
    if leaving != Leaving::IsCutOff {
        client.close_notify();
    }
    session.close_client();
    if leaving == Leaving::ClosesBeforeSigterm {
        session.kill(session.network(), libc::SIGTERM);
        session.record().release();
        session.wait_as_last();
        assert_eq!(session.session_line()["end"], "terminated");
        return;
    }
    session.record().release();
    session.record().backend(0).expect_line(size);
    assert_eq!(session.wait_as_last().code(), Some(0));
    let end = if leaving == Leaving::Closes {
        "client closed"
    } else {
        "client closed without close_notify"
    };
    assert_eq!(session.session_line()["end"], end);
}

/// By whoever is on the way, for one: what was sent inside TLS is the client's, and half a command would be nobody's.
fn tls_breaks_behind_data(test: &Test) {
    let mut session = logged_in(test);
    let client = session.client();
    // More than the socketpair holds, and little enough that we have read it all.
    let size = 240_000;
    client.send_line_to_stalled(size);
    client.send_raw("no record of TLS");
    let (_, end) = client.read_to_end();
    assert!(matches!(end, End::Tls(_)), "{end:?}");
    session.close_client();
    session.record().release();
    let received = session.record().backend(0).expect_line(size);
    assert_eq!(session.wait_as_last().code(), Some(0));
    let line = session.session_line();
    assert_eq!(line["end"], "TLS failed");
    assert_eq!(line["in"], received.to_string());
}

fn backend_leaves_data(test: &Test) {
    for size in [1, 1000, 16_384, 70_000, 2_000_000] {
        let mut session = logged_in(test);
        let count = test.record().backends().len();
        session.client().send(format!("a XLAST {size}\r\n"));
        let backend = Process(test.record().backend(count - 1).pid);
        if size < 100_000 {
            // It fits in the socketpair: the backend is gone before the client reads.
            eventually("the backend has ended", || (!backend.alive()).then_some(()));
        }
        session.client().expect_last_words(size);
        session.close_client();
        assert_eq!(session.wait_as_last().code(), Some(0));
    }
}

/// On a unix socket, whose buffers have one size: among these amounts are some of which the last octets have left the backend, which
/// is gone, and cannot leave us yet.
fn backend_leaves_a_queue(test: &Test) {
    let queue = 64 << 10;
    for size in (1..16).map(|part| part * queue / 2) {
        let mut session = Program::new(test).start_on(Socket::Pair, Handover::Stdio, Stderr::Log);
        session.client().log_in_by_starttls(pki());
        let count = test.record().backends().len();
        session.client().send(format!("a XLAST {size}\r\n"));
        let backend = Process(test.record().backend(count - 1).pid);
        eventually("the backend has ended, or waits for the client", || {
            let is_done = !backend.alive() || backend.state() == Some('S');
            is_done.then_some(())
        });
        session.wait_idle();
        session.client().expect_last_words(size);
        session.close_client();
        assert_eq!(session.wait_as_last().code(), Some(0));
    }
}

fn backend_killed_after_writing(test: &Test) {
    let mut session = logged_in(test);
    session.client().send("a XSOURCE 100000\r\nb XSIGNAL 9\r\n");
    let (bytes, end) = session.client().read_to_end();
    assert!(
        bytes.ends_with(&client::Pattern::new(2).take(100_000)),
        "{} bytes",
        bytes.len()
    );
    assert_eq!(end, End::CloseNotify);
    session.wait_as_last();
}

fn client_resets(test: &Test) {
    let mut session = logged_in(test);
    session.take_client().reset();
    assert_eq!(session.wait_as_last().code(), Some(0), "{}", session.log());
    assert_eq!(session.record().backend(0).wait_end(), "eof");
    session.session_line();
}

fn client_resets_in_bulk(test: &Test) {
    let mut session = logged_in(test);
    session.client().send("a XSOURCE 100000000\r\n");
    session.client().read_exact(1_000_000);
    session.take_client().reset();
    // The backend's write fails, which it takes calmly.
    assert_eq!(session.wait_as_last().code(), Some(0), "{}", session.log());
}

fn client_resets_early(test: &Test) {
    let mut session = Program::new(test).start();
    session.client().greeting();
    session.take_client().reset();
    assert_eq!(session.wait_as_last().code(), Some(0), "{}", session.log());
    assert!(test.record().is_empty());
}

fn client_leaves_in_handshake(test: &Test) {
    for reset in [false, true] {
        for tls13 in [false, true] {
            let versions = if tls13 {
                vec![&rustls::version::TLS13]
            } else {
                vec![&rustls::version::TLS12]
            };
            let mut session = Program::new(test).start();
            let client = session.client();
            client.greeting();
            assert!(client.command("a STARTTLS").is_ok());
            let hello = Client::client_hello(&TlsOffer {
                versions,
                ..TlsOffer::new(pki())
            });
            client.send_raw(if reset { &hello[..] } else { &hello[..100] });
            let client = session.take_client();
            if reset {
                client.reset();
            } else {
                drop(client);
            }
            assert_eq!(session.wait_as_last().code(), Some(0), "{}", session.log());
        }
    }
    assert!(test.record().is_empty());
}

fn backend_killed(test: &Test) {
    let mut session = logged_in(test);
    let backend = Process(session.record().backend(0).pid);
    session.kill(backend, libc::SIGKILL);
    assert_eq!(session.client().expect_end(), End::CloseNotify);
    let status = session.wait_as_last();
    // Not an exit status of the backend's own: anything but success.
    assert!(!status.success(), "{status:?}");
    session.session_line();
}

fn grandchild(test: &Test) {
    let mut session = logged_in(test);
    let client = session.client();
    assert!(client.command("a XGRANDCHILD 5").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    assert_eq!(session.wait_code(), 5);
    // Nobody but the grandchild, which is not ours to end.
    let left = test.descendants();
    assert!(
        left.len() == 1 && left[0].command_line().contains(&"hold".to_owned()),
        "{}",
        describe(&left)
    );
}

fn backend_closes_and_lives(test: &Test) {
    let mut session = logged_in(test);
    let client = session.client();
    assert!(client.command("a XCLOSE").is_ok());
    assert_eq!(client.expect_end(), End::CloseNotify);
    assert!(Process(session.record().backend(0).pid).alive());
    session.close_client();
    session.record().release();
    assert_eq!(session.wait_as_last().code(), Some(0));
}

fn backend_ignores_end(test: &Test) {
    let mut session = Program::new(test)
        .play(&Backend::imap().with(&["--ignore-eof"]))
        .start();
    session.client().log_in_by_starttls(pki());
    session.close_client();
    let backend = session.record().backend(0);
    assert_eq!(backend.wait_end(), "eof");
    assert!(Process(backend.pid).alive());
    session.record().release();
    assert_eq!(session.wait_as_last().code(), Some(0));
}

fn exit_statuses(test: &Test, statuses: std::ops::Range<i32>) {
    for status in statuses {
        let mut session = logged_in(test);
        session.client().send(format!("a XEXIT {status}\r\n"));
        assert_eq!(session.client().expect_end(), End::CloseNotify);
        // A client that stayed would be waited for.
        session.close_client();
        assert_eq!(session.wait_as_last().code(), Some(status));
    }
}

fn no_zombie(test: &Test) {
    let mut session = logged_in(test);
    assert!(session.client().command("a NOOP").is_ok());
    let (network, backend) = (session.network(), Process(session.record().backend(0).pid));
    // The keeper ends with the handshake and is reaped soon.
    eventually("network process and backend are alone", || {
        (network.descendants() == [backend]).then_some(())
    });
    let mut all = test.descendants();
    all.sort();
    let mut wanted = vec![network, backend];
    wanted.sort();
    assert_eq!(all, wanted);
    log_out(&mut session);
}

fn network_killed(test: &Test) {
    let mut session = logged_in(test);
    session.kill(session.network(), libc::SIGKILL);
    let (_, end) = session.client().read_to_end();
    assert!(matches!(end, End::Eof | End::Reset), "{end:?}");
    // By end of file, or by a signal where the kernel lets the dying parent send one.
    let backend = Process(session.record().backend(0).pid);
    eventually("the backend ends", || (!backend.alive()).then_some(()));
}

fn network_killed_early(test: &Test) {
    let mut session = Program::new(test).start();
    session.client().greeting();
    session.kill(session.network(), libc::SIGKILL);
    session.wait();
    eventually("keeper and launcher end", || {
        test.descendants()
            .iter()
            .all(|process| !process.alive())
            .then_some(())
    });
    assert!(test.record().is_empty());
}

fn keeper_killed(test: &Test) {
    let mut session = Program::new(test).start();
    session.client().greeting();
    session.kill(session.processes().keeper.expect("a keeper"), libc::SIGKILL);
    session.client().send("a STARTTLS\r\n");
    let answer = session.client().line();
    if answer.starts_with("a OK") {
        // It noticed too late: then the handshake fails, and nothing else happens.
        assert!(session.client().handshake(&TlsOffer::new(pki())).is_err());
    } else {
        assert!(
            answer.starts_with("a NO") || answer.starts_with("* BYE"),
            "{answer}"
        );
    }
    session.close_client();
    session.wait_as_last();
    assert!(test.record().is_empty());
}

fn launcher_killed(test: &Test) {
    let mut session = Program::new(test).start();
    session.client().greeting();
    session.kill(
        session.processes().launcher.expect("a launcher"),
        libc::SIGKILL,
    );
    session.client().send("a STARTTLS\r\n");
    let answer = session.client().line();
    if answer.starts_with("a OK") && session.client().handshake(&TlsOffer::new(pki())).is_ok() {
        let (bytes, end) = session.client().read_to_end();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.is_empty() || text.starts_with("* BYE "), "{text:?}");
        assert_eq!(end, End::CloseNotify);
    }
    session.close_client();
    session.wait_as_last();
    assert!(test.record().is_empty());
}

fn stopped_and_continued(test: &Test) {
    let mut session = logged_in(test);
    let network = session.network();
    eventually("it sleeps", || (network.state() == Some('S')).then_some(()));
    session.kill(network, libc::SIGSTOP);
    eventually("it is stopped", || {
        (network.state() == Some('T')).then_some(())
    });
    session.kill(network, libc::SIGCONT);
    assert!(session.client().command("a NOOP").is_ok());
    log_out(&mut session);
}

fn key_update(test: &Test) {
    let mut session = logged_in(test);
    for round in 0..3 {
        session.client().tls().refresh_traffic_keys().unwrap();
        assert!(session.client().command(&format!("k{round} NOOP")).is_ok());
    }
    log_out(&mut session);
}

/// A session in clear, and its backend, which has greeted and is stopped.
fn stopped(test: &Test) -> (Session, Process) {
    let mut session = Program::new(test).tls("optional").start();
    session.client().greeting();
    let backend = Process(test.record().backend(0).pid);
    session.kill(backend, libc::SIGSTOP);
    (session, backend)
}

/// Commands that wait for the answers to earlier ones are the backend's all the same, and then it has its end of file.
fn client_resets_with_answers_due(test: &Test) {
    let (mut session, backend) = stopped(test);
    session.client().send("a NOOP\r\nb NOOP\r\nc NOOP\r\n");
    session.wait_idle();
    session.take_client().reset();
    session.wait_idle();
    session.kill(backend, libc::SIGCONT);
    // Much less than the time that a backend has to end.
    assert_eq!(session.wait_as_last().code(), Some(0));
    let played = test.record().backend(0);
    assert_eq!(played.received_text(), "a NOOP\r\nb NOOP\r\nc NOOP\r\n");
    assert_eq!(played.wait_end(), "eof");
}

/// More than is taken before the backend has answered: what is not read by then is not noticed to have ended.
fn client_resets_unheard(test: &Test) {
    let (mut session, backend) = stopped(test);
    let many: String = (0..8000)
        .map(|number| format!("a{number} NOOP\r\n"))
        .collect();
    session.client().send(many);
    session.wait_idle();
    session.take_client().reset();
    session.kill(backend, libc::SIGCONT);
    assert_eq!(session.wait_as_last().code(), Some(0));
    assert_eq!(test.record().backend(0).wait_end(), "eof");
}

fn client_leaves_before_starttls(test: &Test) {
    let (mut session, backend) = stopped(test);
    session.client().send("a NOOP\r\nb STARTTLS\r\n");
    session.client().shutdown();
    session.wait_idle();
    session.kill(backend, libc::SIGCONT);
    assert!(session.client().reply("b").is_ok());
    assert_eq!(session.client().expect_end(), End::Eof);
    session.close_client();
    // Much less than the time for a handshake.
    assert_eq!(session.wait_as_last().code(), Some(0));
    let end = session.session_line()["end"].clone();
    assert!(end.starts_with("client closed"), "{end}");
}
