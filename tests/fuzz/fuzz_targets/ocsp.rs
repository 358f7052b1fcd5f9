//! OCSP responses: any bytes are taken without a panic, and none is accepted but what the issuer signed, in its time.
//!
//! The certificates and the response are real (openssl-ocsp(1)); what a fuzzer makes of the response has another signature.
#![no_main]

use imap_tls::keeper::ocsp::check;
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

const CERTIFICATE: &[u8] = include_bytes!("../ocsp/certificate.der");
const ISSUER: &[u8] = include_bytes!("../ocsp/issuer.der");
const RESPONSE: &[u8] = include_bytes!("../ocsp/response.der");
/// A time at which the response is fresh.
const NOW: i64 = 1_795_356_000;
const WEEK: i64 = 7 * 86_400;

fuzz_target!(
    init: {
        let fresh = check(RESPONSE, CERTIFICATE, Some(ISSUER), NOW).expect("the real one is good");
        assert!(fresh.is_verified && fresh.next_update >= NOW);
        for time in [NOW - WEEK, NOW + WEEK] {
            assert!(check(RESPONSE, CERTIFICATE, Some(ISSUER), time).is_err());
        }
    },
    |response: &[u8]| fuzz(response)
);

fn fuzz(response: &[u8]) {
    if let Ok(fresh) = check(response, CERTIFICATE, Some(ISSUER), NOW) {
        assert!(contains_signed_part(response), "forged");
        assert!(fresh.is_verified && fresh.next_update >= NOW);
    }
    if let Ok(fresh) = check(response, CERTIFICATE, None, NOW) {
        assert!(!fresh.is_verified && fresh.next_update >= NOW);
    }
    // Any bytes in the place of a certificate, too.
    let _ = check(RESPONSE, response, Some(ISSUER), NOW);
    let _ = check(RESPONSE, CERTIFICATE, Some(response), NOW);
}

// From nothing the fuzzer would hardly come to DER: it begins with the real response.
fuzz_mutator!(
    |data: &mut [u8], size: usize, max_size: usize, _seed: u32| {
        let size = if size < 4 && max_size >= RESPONSE.len() {
            data[..RESPONSE.len()].copy_from_slice(RESPONSE);
            RESPONSE.len()
        } else {
            size
        };
        fuzzer_mutate(data, size, max_size)
    }
);

/// Whether what the issuer signed is in there, unchanged.
fn contains_signed_part(response: &[u8]) -> bool {
    let signed = &RESPONSE[34..215];
    response
        .windows(signed.len())
        .any(|window| window == signed)
}
