//! What passes between network process and keeper: any bytes are taken without a panic, what is accepted is accepted again after
//! encoding, and no sign request is accepted that is no TLS server's signature input.
#![no_main]

use imap_tls::keeper::message::{Introduction, REQUEST_LIMIT, Reply, SignRequest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(request) = SignRequest::decode(bytes) {
        assert_eq!(request.encode(), bytes);
        assert!(bytes.len() <= REQUEST_LIMIT);
        let tls13 = [&[b' '; 64][..], b"TLS 1.3, server CertificateVerify\0"].concat();
        let is_tls13 = request.message.starts_with(&tls13);
        let is_tls12 = request.message.get(64) == Some(&3) && !request.message.starts_with(&[b' '; 32]);
        assert!(is_tls13 || is_tls12);
    }
    if let Some(reply) = Reply::decode(bytes) {
        assert_eq!(reply.encode(), bytes);
    }
    if let Some(introduction) = Introduction::decode(bytes) {
        // Text that is no UTF-8 is repaired, so bytes may differ, but what they mean may not.
        assert_eq!(Introduction::decode(&introduction.encode()), Some(introduction));
    }
});
