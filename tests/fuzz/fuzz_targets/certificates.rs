//! Certificate and key files: any bytes are taken without a panic, and what is accepted has a chain, whose blocks are in the file,
//! and a key that signs, or one whose signatures nobody is sent.
#![no_main]

use imap_tls::fuzzing::certificates::certificate;
use libfuzzer_sys::fuzz_target;
use rustls::SignatureScheme;

/// Good files, that differ from each other.
const FILES: [&[u8]; 4] = [
    include_bytes!("../certificates/ecdsa.pem"),
    include_bytes!("../certificates/ed25519.pem"),
    include_bytes!("../certificates/rsa.pem"),
    include_bytes!("../certificates/sec1.pem"),
];

fuzz_target!(
    init: {
        for (place, file) in FILES.iter().enumerate() {
            let offered = certificate(file, None).expect("a good file");
            assert!(offered.signs && offered.names == ["mail.example.org"]);
            for (other, key) in FILES.iter().enumerate() {
                assert_eq!(certificate(file, Some(key)).is_ok(), place == other);
            }
        }
    },
    |input: &[u8]| {
        let Some((&kind, rest)) = input.split_first() else {
            return;
        };
        let file = FILES[usize::from(kind & 3)];
        let bytes = if kind & 4 == 0 { rest.to_vec() } else { damaged(file, rest) };
        for key in [None, Some(file), Some(bytes.as_slice())] {
            check(&bytes, key);
        }
        check(file, Some(&bytes));
    }
);

/// A good file with some octets changed: place and value of each.
fn damaged(file: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut bytes = file.to_vec();
    for change in changes.chunks_exact(3) {
        let place = usize::from(u16::from_be_bytes([change[0], change[1]])) % bytes.len();
        if let Some(octet) = bytes.get_mut(place) {
            *octet = change[2];
        }
    }
    bytes
}

fn check(file: &[u8], key: Option<&[u8]>) {
    let Ok(offered) = certificate(file, key) else {
        return;
    };
    // The numbers of a damaged RSA key need not fit together: ring finds that when it looks at its own signature, which then goes
    // nowhere.
    let is_rsa = |scheme: &SignatureScheme| format!("{scheme:?}").starts_with("RSA");
    let scheme = offered.schemes.first().expect("a scheme");
    assert!(offered.signs || is_rsa(scheme));
    let blocks = file
        .windows(27)
        .filter(|part| part == b"-----BEGIN CERTIFICATE-----");
    assert!((1..=blocks.count()).contains(&offered.chain.len()));
    let key = key.unwrap_or(file);
    assert!(key.windows(11).any(|part| part == b"PRIVATE KEY"));
    // No name can break a line of the log.
    for certificate in &offered.chain {
        assert!(!certificate.is_empty());
    }
}
