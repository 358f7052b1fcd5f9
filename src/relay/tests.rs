//! What fuzzing has found, and the endings that take no time, with a relay that is driven step by step.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv};

use super::driven::{Driven, Peers, Setup, Source, Stage, drive};
use crate::imap::Policy;

fn setup(policy: Policy, source: Source) -> Setup {
    Setup {
        buffer: None,
        policy,
        source,
    }
}

/// All that has come, and whether that was the end.
fn read(stream: &mut UnixStream) -> (String, bool) {
    let mut bytes = Vec::new();
    let end = match stream.read_to_end(&mut bytes) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            false
        }
    };
    (String::from_utf8(bytes).unwrap(), end)
}

/// Whether the other end is closed.
fn is_let_go(socket: &OwnedFd) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    recv(socket.as_raw_fd(), &mut [0], flags) == Ok(0)
}

fn say(driven: &mut Driven<'_>, stream: &mut UnixStream, text: &str) -> bool {
    stream.write_all(text.as_bytes()).unwrap();
    driven.settle()
}

/// With little room in all sockets.
const SMALL: Setup = Setup {
    buffer: Some(2048),
    policy: Policy::Optional,
    source: Source::Descriptor,
};

/// Writes until nothing more is taken.
fn fill(driven: &mut Driven<'_>, stream: &mut UnixStream) {
    while stream.write(&[b'a'; 4096]).is_ok() {
        assert!(!driven.settle());
    }
}

/// Nobody is left to make a handshake with.
#[test]
fn starttls_of_a_client_that_has_ended_ends_the_connection() {
    let setup = setup(Policy::Optional, Source::Launchers);
    drive(&setup, |driven, mut peers: Peers| {
        // The greeting is still to come, so the command waits, and the end does.
        assert!(!say(driven, &mut peers.client, "a STARTTLS\r\n"));
        peers.client.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!driven.settle());
        let backend = &mut peers.cleartext.backend;
        assert!(say(driven, backend, "* OK hello\r\n"));
        let (text, is_end) = read(&mut peers.client);
        assert_eq!(text, "* OK hello\r\na OK Begin TLS negotiation now\r\n");
        assert!(is_end);
        assert_eq!(read(&mut peers.cleartext.backend), (String::new(), true));
    });
}

/// What is still to be said to it must not wake us again and again until the deadline.
#[test]
fn a_client_that_is_gone_is_told_nothing() {
    let setup = setup(Policy::Optional, Source::Descriptor);
    drive(&setup, |driven, mut peers: Peers| {
        drop(peers.client);
        assert!(!say(driven, &mut peers.cleartext.backend, "* OK hello\r\n"));
        driven.terminate();
        assert!(!driven.settle());
        assert_eq!(driven.queued().for_client, 0);
    });
}

/// It has said all that it has to say, and still listens.
#[test]
fn what_a_client_said_last_reaches_a_backend_that_says_nothing_more() {
    drive(&SMALL, |driven, mut peers: Peers| {
        let (client, backend) = (&mut peers.client, &mut peers.cleartext.backend);
        say(driven, backend, "* PREAUTH hello\r\n");
        backend.shutdown(std::net::Shutdown::Write).unwrap();
        let mut sent = 0;
        while let Ok(count) = client.write(&[b'a'; 4096]) {
            sent += count;
            assert!(!driven.settle());
        }
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!driven.settle());
        assert!(driven.queued().for_backend > 0);
        let mut heard = 0;
        loop {
            let (text, is_end) = read(backend);
            heard += text.len();
            let is_over = driven.settle();
            if is_end {
                assert!(is_over);
                break;
            }
        }
        assert_eq!(heard, sent);
    });
}

/// The client has left, and the backend, which has seen that it did, reads slowly.
#[test]
fn what_a_client_sent_before_it_left_reaches_a_backend_that_reads_late() {
    drive(&SMALL, |driven, mut peers: Peers| {
        let backend = &mut peers.cleartext.backend;
        say(driven, backend, "* PREAUTH hello\r\n");
        let mut sent = 0;
        while let Ok(count) = peers.client.write(&[b'a'; 4096]) {
            sent += count;
            assert!(!driven.settle());
        }
        drop(peers.client);
        assert!(!say(driven, backend, "* 1 EXISTS\r\n"));
        assert!(!say(driven, backend, "* 2 EXISTS\r\n"));
        assert!(driven.pass_time(), "the two seconds that it has to close");
        assert!(!driven.settle());
        let mut heard = 0;
        loop {
            let (text, is_end) = read(backend);
            heard += text.len();
            driven.settle();
            if is_end {
                break;
            }
        }
        assert_eq!(heard, sent);
    });
}

#[test]
fn a_session_in_clear_is_passed_on_to_its_end() {
    let setup = setup(Policy::Optional, Source::Launchers);
    drive(&setup, |driven, mut peers: Peers| {
        let (client, backend) = (&mut peers.client, &mut peers.cleartext.backend);
        say(driven, backend, "* OK hello\r\n");
        say(driven, client, "a LOGIN u p\r\n");
        let secured = peers
            .secured
            .as_ref()
            .and_then(|secured| secured.control.as_ref());
        let for_tls = [&peers.keeper, secured.expect("a launcher")];
        assert_eq!(for_tls.map(is_let_go), [false; 2]);
        say(driven, backend, "a OK in\r\n");
        assert_eq!(driven.stage(), Stage::Opaque);
        // There can be no TLS any more.
        assert_eq!(for_tls.map(is_let_go), [true; 2]);
        assert_eq!(read(client).0, "* OK hello\r\na OK in\r\n");
        say(driven, client, "b NOOP\r\n");
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(!driven.settle());
        let expected = "a LOGIN u p\r\nb NOOP\r\n".to_owned();
        assert_eq!(read(backend), (expected, true));
        say(driven, backend, "b OK late\r\n");
        backend.shutdown(std::net::Shutdown::Both).unwrap();
        // Its process still runs.
        assert!(!driven.settle());
        assert_eq!(read(client), ("b OK late\r\n".to_owned(), true));
        driven.end_backend_process(false, 3);
        assert!(driven.settle());
        assert_eq!(driven.exit_status(), 3);
    });
}

/// A grandchild that holds the socket is no backend.
#[test]
fn a_backend_whose_process_has_ended_is_heard_out_and_not_waited_for() {
    let setup = setup(Policy::Optional, Source::Launchers);
    drive(&setup, |driven, mut peers: Peers| {
        let (client, backend) = (&mut peers.client, &mut peers.cleartext.backend);
        say(driven, backend, "* PREAUTH hello\r\n");
        backend.write_all(b"* BYE\r\n").unwrap();
        driven.end_backend_process(false, 0);
        assert!(!driven.settle());
        let expected = "* PREAUTH hello\r\n* BYE\r\n".to_owned();
        assert_eq!(read(client), (expected, true));
        // The client has two seconds to close.
        assert!(driven.pass_time());
        assert!(driven.settle());
    });
}

/// A client may write all of a message before it reads the answers to what it asked for earlier.
#[test]
fn a_client_that_does_not_read_is_heard_by_a_backend_that_does() {
    drive(&SMALL, |driven, mut peers: Peers| {
        let backend = &mut peers.cleartext.backend;
        say(driven, backend, "* PREAUTH hello\r\n");
        fill(driven, backend);
        assert!(driven.queued().for_client > 0);
        assert!(!say(driven, &mut peers.client, "a NOOP\r\n"));
        let (text, _) = read(&mut peers.cleartext.backend);
        assert_eq!(text, "a NOOP\r\n");
    });
}

/// Its end lies behind what it sent, for which there is no room.
#[test]
fn a_client_that_left_behind_a_backend_that_reads_nothing_is_not_waited_for() {
    for is_gone in [true, false] {
        drive(&SMALL, |driven, mut peers: Peers| {
            let backend = &mut peers.cleartext.backend;
            say(driven, backend, "* PREAUTH hello\r\n");
            fill(driven, &mut peers.client);
            assert!(!driven.pass_time(), "no end, no deadline");
            if is_gone {
                drop(peers.client);
            } else {
                peers.client.shutdown(std::net::Shutdown::Write).unwrap();
            }
            assert!(!driven.settle());
            assert!(driven.pass_time(), "a deadline");
            assert!(driven.settle());
            assert!(driven.report().contains("client closed"));
        });
    }
}

/// The same the other way round, where there is no process that ends.
#[test]
fn a_backend_that_left_behind_a_client_that_reads_nothing_is_not_waited_for() {
    drive(&SMALL, |driven, peers: Peers| {
        let mut backend = peers.cleartext.backend;
        say(driven, &mut backend, "* PREAUTH hello\r\n");
        fill(driven, &mut backend);
        assert!(!driven.pass_time(), "no end, no deadline");
        drop(backend);
        assert!(!driven.settle());
        assert!(driven.pass_time(), "a deadline");
        assert!(driven.settle());
    });
}

/// With a client's octets unread, its socket's end would be a reset, which eats what the client has not read yet.
#[test]
fn what_a_client_says_after_sigterm_is_read_though_nobody_hears_it() {
    let setup = setup(Policy::Optional, Source::Descriptor);
    drive(&setup, |driven, mut peers: Peers| {
        let mut backend = peers.cleartext.backend;
        say(driven, &mut backend, "* PREAUTH hello\r\n");
        driven.terminate();
        assert!(!say(driven, &mut peers.client, "a NOOP\r\n"));
        assert_eq!(read(&mut backend), (String::new(), true));
        say(driven, &mut backend, "* BYE\r\n");
        drop(backend);
        assert!(!driven.settle(), "it may still speak");
        assert!(!say(driven, &mut peers.client, "b NOOP\r\n"));
        let expected = "* PREAUTH hello\r\n* BYE\r\n".to_owned();
        assert_eq!(read(&mut peers.client), (expected, true));
        drop(peers.client);
        assert!(driven.settle());
        assert!(driven.report().contains("terminated"));
    });
}

/// Nothing from before TLS has an effect inside it.
#[test]
fn the_end_of_the_backend_before_tls_is_not_that_of_the_one_inside() {
    let setup = setup(Policy::Optional, Source::Launchers);
    drive(&setup, |driven, mut peers: Peers| {
        let backend = &mut peers.cleartext.backend;
        say(driven, backend, "* OK hello\r\n");
        say(driven, &mut peers.client, "a LOGIN u p\r\nb STARTTLS\r\n");
        backend.write_all(b"a NO no\r\n").unwrap();
        driven.end_backend_process(false, 3);
        assert!(!driven.settle());
        assert_eq!(driven.stage(), Stage::Handshake);
        assert_eq!(driven.exit_status(), 0);
        peers.client.shutdown(std::net::Shutdown::Write).unwrap();
        assert!(driven.settle());
        let report = driven.report();
        assert!(report.contains("closed during the handshake"), "{report}");
    });
}

#[test]
fn a_backend_that_cannot_be_reached_is_a_bye() {
    let setup = setup(Policy::Optional, Source::Connectors);
    drive(&setup, |driven, mut peers: Peers| {
        peers.cleartext.control = None;
        driven.settle();
        let (text, is_end) = read(&mut peers.client);
        assert!(text.starts_with("* BYE [UNAVAILABLE]") && is_end, "{text}");
        assert_eq!(driven.exit_status(), crate::error::EXIT_TEMPORARY);
    });
}

#[test]
fn who_waits_long_enough_sees_every_connection_end() {
    for policy in [Policy::Required, Policy::Optional, Policy::Implicit] {
        for source in [Source::Connectors, Source::Descriptor, Source::Launchers] {
            drive(&setup(policy, source), |driven, mut peers: Peers| {
                for _ in 0..6 {
                    driven.settle();
                    driven.pass_time();
                }
                assert!(driven.settle(), "{policy:?} {source:?}");
                assert!(read(&mut peers.client).1);
            });
        }
    }
}
