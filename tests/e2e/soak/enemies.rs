//! Hostile clients. What they do has to end in time, and must not succeed.

use super::places::{Kind, Place};
use super::{Dice, Soak};
use crate::harness::records::*;
use crate::harness::*;
use crate::hostile;
use rustls::crypto::aws_lc_rs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a server may take longer than its own limits on a busy machine.
const GRACE: Duration = Duration::from_secs(20);

type Attack = fn(&Enemies, &Soak, &Place, &mut Dice) -> Result<(), String>;

const ATTACKS: &[(&str, Attack)] = &[
    ("garbage", Enemies::garbage),
    ("half a ClientHello", Enemies::half_hello),
    ("slow drip", Enemies::drip),
    ("reset in some phase", Enemies::reset),
    ("reset in some phase", Enemies::reset),
    ("STARTTLS flood", Enemies::flood),
    ("STARTTLS with injection", Enemies::injection),
    ("huge literal", Enemies::literal),
    ("distrusts the certificate", Enemies::distrust),
    ("alert instead of a hello", Enemies::alert),
    ("never reads", Enemies::deaf),
    ("renegotiation in TLS 1.3", Enemies::renegotiation),
    (
        "renegotiation in TLS 1.2",
        Enemies::renegotiation_by_openssl,
    ),
    ("PROXY garbage", Enemies::proxy),
    ("malformed ClientHello", Enemies::malformed),
    ("malformed ClientHello", Enemies::malformed),
    ("silence", Enemies::silence),
    ("endless line", Enemies::endless_line),
];

pub fn names() -> impl Iterator<Item = &'static str> {
    ATTACKS.iter().map(|(name, _)| *name)
}

/// A bare connection.
struct Enemy {
    stream: TcpStream,
    address: SocketAddr,
}

impl Enemy {
    /// From one of few addresses, so that they meet the limits for one source, too.
    fn meet(soak: &Soak, place: &Place, dice: &mut Dice) -> Self {
        let source = Ipv4Addr::new(127, 0, 66, dice.between(1, 4) as u8);
        let stream = place.server.connect_socket_from(source);
        stream
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let address = stream.local_addr().unwrap();
        soak.may_be_killed(address);
        let mut enemy = Self { stream, address };
        enemy.say(&place.introduction(dice));
        enemy
    }

    /// Whether all of it was taken.
    fn say(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// What comes until `enough`, the end, or the limit; and whether that was the end.
    fn hear(&mut self, limit: Duration, enough: impl Fn(&[u8]) -> bool) -> (Vec<u8>, bool) {
        let until = Instant::now() + limit;
        let mut heard = Vec::new();
        let mut piece = vec![0; 16 << 10];
        while !enough(&heard) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (heard, false);
            }
            self.stream.set_read_timeout(Some(left)).unwrap();
            match self.stream.read(&mut piece) {
                Ok(0) => return (heard, true),
                Ok(size) => heard.extend_from_slice(&piece[..size]),
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                    ) => {}
                Err(_) => return (heard, true),
            }
        }
        (heard, false)
    }

    /// All of it; it must end in time.
    fn hear_end(&mut self, limit: Duration) -> Result<Vec<u8>, String> {
        match self.hear(limit + GRACE, |_| false) {
            (heard, true) => Ok(heard),
            (heard, false) => Err(format!(
                "still there after {limit:?}, having said {:?}",
                String::from_utf8_lossy(&heard)
            )),
        }
    }

    fn line(&mut self) -> Option<String> {
        let (heard, _) = self.hear(Duration::from_secs(20), |heard| heard.ends_with(b"\n"));
        String::from_utf8(heard)
            .ok()
            .filter(|line| !line.is_empty())
    }

    /// To where a ClientHello is expected; false if it was not let in.
    fn reach_tls(&mut self, place: &Place) -> bool {
        if place.policy == "implicit" {
            return true;
        }
        self.line().is_some_and(|line| line.starts_with("* OK"))
            && self.say(b"a STARTTLS\r\n")
            && self.line().is_some_and(|line| line.starts_with("a OK"))
    }

    /// Goes, with or without manners.
    fn go(self, dice: &mut Dice) {
        if dice.percent(50) {
            sys::reset_on_close(self.stream.as_fd());
        }
    }
}

pub struct Enemies {
    malformed: Vec<Vec<u8>>,
}

impl Enemies {
    pub fn new() -> Self {
        Self {
            malformed: hostile::refused()
                .into_iter()
                .map(|(_, bytes, _)| bytes)
                .collect(),
        }
    }

    pub fn attack(&mut self, soak: &Soak, dice: &mut Dice) {
        let place = dice.pick(&soak.places);
        let (name, attack) = *dice.pick(ATTACKS);
        let began = Instant::now();
        match soak.guarded(name, || attack(self, soak, place, dice)) {
            Ok(()) => soak.count(format!("enemy: {name}")),
            // That an enemy succeeded has no excuse.
            Err(error) if error.contains("obeyed") || error.contains("after all") => {
                soak.fail(format!("enemy: {name} at {}: {error}", place.name));
            }
            Err(error) => {
                let text = format!("enemy: {name} at {}: {error}", place.name);
                soak.fail_since(began, text);
            }
        }
    }

    fn garbage(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        let size = dice.size(16);
        let mut bytes = dice.bytes(size);
        if dice.percent(30) {
            // More like lines.
            bytes.iter_mut().step_by(20).for_each(|byte| *byte = b'\n');
        }
        enemy.say(&bytes);
        enemy.hear(Duration::from_millis(500), |_| false);
        over(soak, enemy, dice, Ok(()))
    }

    fn half_hello(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        let mut result = Ok(());
        if enemy.reach_tls(place) {
            let hello = Hello::tls13().records();
            enemy.say(&hello[..dice.below(hello.len())]);
            if dice.percent(40) {
                result = enemy.hear_end(soak.limits.handshake).map(drop);
            }
        }
        over(soak, enemy, dice, result)
    }

    fn drip(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        let mut result = Ok(());
        if enemy.reach_tls(place) {
            let began = Instant::now();
            let limit = soak.limits.handshake + GRACE;
            for octet in Hello::tls13().with(PADDING, vec![0; 4000]).records() {
                if soak.is_over() || !enemy.say(&[octet]) {
                    break;
                }
                let (_, is_over) = enemy.hear(Duration::from_millis(100), |_| false);
                if is_over {
                    break;
                }
                if began.elapsed() > limit {
                    result = Err(format!("still there after {limit:?}"));
                    break;
                }
            }
        }
        over(soak, enemy, dice, result)
    }

    /// A TCP reset at any time.
    fn reset(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let phase = dice.below(9);
        if phase < 5 {
            let mut enemy = Enemy::meet(soak, place, dice);
            // At once; after the greeting; after STARTTLS; within the hello; after the server's.
            if phase == 1 {
                enemy.hear(Duration::from_secs(1), |heard| heard.ends_with(b"\n"));
            }
            if phase == 2 {
                enemy.say(b"a STARTTLS\r\n");
            }
            if phase > 2 && enemy.reach_tls(place) {
                let hello = Hello::tls13().records();
                enemy.say(if phase == 3 { &hello[..100] } else { &hello });
                if phase == 4 {
                    enemy.hear(Duration::from_secs(5), |heard| !heard.is_empty());
                }
            }
            sys::reset_on_close(enemy.stream.as_fd());
            return over(soak, enemy, dice, Ok(()));
        }
        // After the handshake; after login; while much is coming; while much is going.
        let (address, client) = self.log_in(soak, place, dice, phase > 5);
        if let Some(mut client) = client {
            match phase {
                // Not `try_send`, which reads what there is.
                7 => client.send(b"x XSOURCE 3000000\r\n"),
                8 => drop(client.try_send(
                    &[b"x APPEND INBOX {3000000+}\r\n", &vec![b'x'; 400_000][..]].concat(),
                )),
                _ => {}
            }
            client.reset();
        }
        soak.was_killed(address);
        Ok(())
    }

    /// A client in TLS, unless something prevented it: then that is somebody else's business.
    fn log_in(
        &self,
        soak: &Soak,
        place: &Place,
        dice: &mut Dice,
        all_the_way: bool,
    ) -> (SocketAddr, Option<Client>) {
        let enemy = Enemy::meet(soak, place, dice);
        let address = enemy.address;
        let mut client = Client::on(enemy.stream);
        let (user, password) = place.user("idle");
        let mut begin = || {
            if place.policy != "implicit" {
                client.try_greeting()?;
                client.try_command("a STARTTLS")?;
            }
            client.handshake_by(dice.pick(&place.configs))?;
            if place.policy == "implicit" {
                client.try_greeting()?;
            }
            if all_the_way {
                client.try_command(&format!("b LOGIN {user} {password}"))?;
            }
            Ok::<(), String>(())
        };
        let result = begin();
        (address, result.is_ok().then_some(client))
    }

    fn flood(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        if dice.percent(50) {
            let mut many: Vec<_> = (0..8).map(|_| Enemy::meet(soak, place, dice)).collect();
            for enemy in &mut many {
                enemy.say(b"a STARTTLS\r\n");
            }
            for enemy in many {
                over(soak, enemy, dice, Ok(()))?;
            }
            return Ok(());
        }
        let mut enemy = Enemy::meet(soak, place, dice);
        enemy.say(&b"a STARTTLS\r\n".repeat(dice.between(2, 2000)));
        // All but the first are no ClientHello.
        let result = enemy
            .hear_end(soak.limits.handshake)
            .and_then(|heard| no_hello(&heard));
        over(soak, enemy, dice, result)
    }

    fn injection(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        let mut result = Ok(());
        if place.policy == "implicit" || enemy.line().is_some_and(|line| line.starts_with("* OK")) {
            let (user, password) = place.user("idle");
            enemy.say(format!("a STARTTLS\r\nb LOGIN {user} {password}\r\nc NOOP\r\n").as_bytes());
            enemy.say(&Hello::tls13().records());
            result = enemy.hear_end(soak.limits.handshake).and_then(|heard| {
                let was_obeyed = [&b"\nb "[..], b"\nc "]
                    .iter()
                    .any(|answer| sys::contains(&heard, answer));
                if was_obeyed {
                    return Err(format!("obeyed: {:?}", String::from_utf8_lossy(&heard)));
                }
                no_hello(&heard)
            });
        }
        over(soak, enemy, dice, result)
    }

    fn literal(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        enemy.hear(Duration::from_millis(500), |heard| heard.ends_with(b"\n"));
        let size = *dice.pick(&[
            "100000000",
            "1000000",
            "18446744073709551616",
            "99999999999999999999999",
        ]);
        let sign = *dice.pick(&["", "+", "-"]);
        let command = *dice.pick(&[
            "a LOGIN ",
            "a LOGIN u ",
            "a ID ",
            "a AUTHENTICATE PLAIN ",
            "a STARTTLS ",
        ]);
        enemy.say(format!("{command}{{{size}{sign}}}\r\n").as_bytes());
        for _ in 0..dice.below(40) {
            if !enemy.say(&[b'x'; 32 << 10]) {
                break;
            }
        }
        enemy.hear(Duration::from_millis(300), |_| false);
        over(soak, enemy, dice, Ok(()))
    }

    fn distrust(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        if !enemy.reach_tls(place) {
            return over(soak, enemy, dice, Ok(()));
        }
        let offer = TlsOffer {
            server_name: "other.example".to_owned(),
            ..TlsOffer::new(Pki::of(Key::P256))
        };
        let address = enemy.address;
        let mut client = Client::on(enemy.stream);
        let result = client.handshake(&offer);
        drop(client);
        soak.was_killed(address);
        match result {
            Ok(()) => Err("a certificate for another name was accepted".to_owned()),
            Err(_) => Ok(()),
        }
    }

    fn alert(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        let mut result = Ok(());
        if enemy.reach_tls(place) {
            enemy.say(&record(ALERT, [2, dice.below(120) as u8]));
            result = enemy.hear_end(soak.limits.handshake).map(drop);
        }
        over(soak, enemy, dice, result)
    }

    /// Has much sent, and does not read it.
    fn deaf(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let (address, client) = self.log_in(soak, place, dice, true);
        if let Some(mut client) = client {
            match place.kind {
                // Not `try_send`, which reads what there is.
                Kind::Scripted => client.send(b"x XSOURCE 50000000\r\n"),
                _ => client.send(b"x CAPABILITY\r\n".repeat(3000)),
            }
            soak.rest(dice.time(Duration::from_secs(4)));
            client.reset();
        }
        soak.was_killed(address);
        Ok(())
    }

    fn renegotiation(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let secrets = Arc::new(Secrets::default());
        let mut provider = aws_lc_rs::default_provider();
        let suite = rustls::CipherSuite::TLS13_AES_128_GCM_SHA256;
        provider.cipher_suites.retain(|one| one.suite() == suite);
        let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(TlsOffer::new(Pki::of(Key::P256)).roots)
            .with_no_client_auth();
        config.key_log = secrets.clone();
        let mut enemy = Enemy::meet(soak, place, dice);
        if !enemy.reach_tls(place) {
            return over(soak, enemy, dice, Ok(()));
        }
        let address = enemy.address;
        let mut client = Client::on(enemy.stream);
        client.patience = soak.limits.login + GRACE;
        let mut result = Ok(());
        if client.handshake_by(&Arc::new(config)).is_ok() {
            let mut sealer = Sealer::new(&secrets, "CLIENT_TRAFFIC_SECRET_0");
            client.try_send_raw(&sealer.record(HANDSHAKE, Hello::tls13().message()));
            let (_, end) = client.read_to_end();
            if end == End::CloseNotify {
                result = Err("a second hello was not refused".to_owned());
            }
        }
        drop(client);
        // Where its process was killed meanwhile, nothing is known.
        soak.was_killed(address).map_or(result, |_| Ok(()))
    }

    fn renegotiation_by_openssl(
        &self,
        soak: &Soak,
        place: &Place,
        _: &mut Dice,
    ) -> Result<(), String> {
        if place.has_balancer {
            return Ok(());
        }
        let target = format!("127.0.0.1:{}", place.server.port);
        let mut tool =
            Tool::new(soak.test, "openssl").args(["s_client", "-tls1_2", "-connect", &target]);
        if place.policy != "implicit" {
            tool = tool.args(["-starttls", "imap"]);
        }
        let text = tool.input("R\na NOOP\r\n").run().text();
        if !text.contains("RENEGOTIATING") || text.contains("a OK") {
            return Err(text);
        }
        Ok(())
    }

    fn proxy(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
        let source = Ipv4Addr::new(127, 0, 66, dice.between(1, 4) as u8);
        let stream = place.server.connect_socket_from(source);
        stream
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let address = stream.local_addr().unwrap();
        soak.may_be_killed(address);
        let mut enemy = Enemy { stream, address };
        let noise = dice.bytes(200);
        let bytes = match dice.below(6) {
            0 => noise,
            1 => b"PROXY TCP4 999.1.1.1 1.2.3.4 1 2\r\n".to_vec(),
            2 => b"PROXY TCP4 ".to_vec(),
            3 => [SIGNATURE, &[0x21, 0x11, 0xff, 0xff], &noise].concat(),
            4 => [SIGNATURE, &[0x21, 0x11, 0, 4], &noise].concat(),
            _ => [b"PROXY ", &vec![b'x'; 5000][..]].concat(),
        };
        enemy.say(&bytes);
        enemy.hear(Duration::from_millis(300), |_| false);
        over(soak, enemy, dice, Ok(()))
    }

    fn malformed(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        let mut result = Ok(());
        if enemy.reach_tls(place) {
            enemy.say(&self.malformed[dice.below(self.malformed.len())]);
            result = enemy.hear_end(soak.limits.handshake).map(drop);
        }
        over(soak, enemy, dice, result)
    }

    fn silence(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let enemy = Enemy::meet(soak, place, dice);
        soak.rest(dice.time(Duration::from_secs(3)));
        over(soak, enemy, dice, Ok(()))
    }

    fn endless_line(&self, soak: &Soak, place: &Place, dice: &mut Dice) -> Result<(), String> {
        let mut enemy = Enemy::meet(soak, place, dice);
        for _ in 0..dice.between(1, 100) {
            if !enemy.say(&[b'a'; 32 << 10]) {
                break;
            }
        }
        over(soak, enemy, dice, Ok(()))
    }
}

/// The end of an attack; where its process was killed meanwhile, nothing is known.
fn over(
    soak: &Soak,
    enemy: Enemy,
    dice: &mut Dice,
    result: Result<(), String>,
) -> Result<(), String> {
    let address = enemy.address;
    enemy.go(dice);
    soak.was_killed(address).map_or(result, |_| Ok(()))
}

/// There may be lines and an alert, but no ServerHello.
fn no_hello(heard: &[u8]) -> Result<(), String> {
    let find =
        |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).position(|window| window == what);
    let after = match find(heard, b"a OK") {
        None => heard,
        Some(at) => {
            let rest = &heard[at..];
            &rest[find(rest, b"\r\n").map_or(rest.len(), |end| end + 2)..]
        }
    };
    match after.first() {
        Some(&HANDSHAKE) => Err(format!("a handshake after all: {heard:?}")),
        _ => Ok(()),
    }
}
