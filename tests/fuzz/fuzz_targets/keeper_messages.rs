//! What passes between network process and keeper: any bytes are taken without a panic, what is accepted is accepted again after
//! encoding, and nothing is accepted to be signed that is no TLS server's signature input, nor a name that could be a path.
#![no_main]

use imap_tls::keeper::message::{BINDING_LIMIT, Introduction, REQUEST_LIMIT, Reply, Request};
use imap_tls::keeper::signing::SIGN_LIMIT;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Some(request) = Request::decode(bytes) {
        assert!(bytes.len() <= REQUEST_LIMIT);
        // Names are taken in any letter case.
        assert_eq!(Request::decode(&request.encode()), Some(Request::decode(bytes).unwrap()));
        let name = match &request {
            Request::Begin(binding) => {
                assert!(binding.len() <= BINDING_LIMIT);
                None
            }
            Request::Certificate(name) => Some(name),
            Request::Open { name, .. } | Request::Seal { name, .. } => name.as_ref(),
            Request::Sign(request) => {
                assert!(bytes.len() <= SIGN_LIMIT + 1);
                let tls13 = [&[b' '; 64][..], b"TLS 1.3, server CertificateVerify\0"].concat();
                let is_tls13 = request.message.starts_with(&tls13);
                let is_tls12 = request.message.get(64) == Some(&3) && !request.message.starts_with(&[b' '; 32]);
                assert!(is_tls13 || is_tls12);
                None
            }
        };
        let name = name.map_or("a", |name| name.as_str());
        assert!(!name.contains(['/', '\0']) && !name.starts_with('.') && !name.is_empty());
    }
    if let Some(reply) = Reply::decode(bytes) {
        assert_eq!(Reply::decode(&reply.encode()), Some(Reply::decode(bytes).unwrap()));
    }
    if let Some(introduction) = Introduction::decode(bytes) {
        // Text that is no UTF-8 is repaired, so bytes may differ, but what they mean may not.
        assert_eq!(Introduction::decode(&introduction.encode()), Some(introduction));
    }
});
