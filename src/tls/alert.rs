//! TLS alerts by name, and what a client means by one.

use rustls::AlertDescription;

/// What the client means by its alert (RFC 8446 section 6.2).
pub(super) fn alert_words(alert: AlertDescription) -> &'static str {
    match alert {
        AlertDescription::AccessDenied => "the client does not want to go on with us",
        AlertDescription::BadCertificate | AlertDescription::CertificateUnknown => {
            "the client does not accept our certificate: it may be for another name, or self-signed"
        }
        AlertDescription::BadCertificateStatusResponse => {
            "the client does not accept our OCSP response (--ocsp)"
        }
        AlertDescription::CertificateExpired => {
            "the client holds our certificate for expired, or not valid yet: is its clock right?"
        }
        AlertDescription::CertificateRevoked => "the client knows our certificate to be revoked",
        AlertDescription::CloseNotify | AlertDescription::UserCanceled => {
            "the client gave up, such as at a question to its user"
        }
        AlertDescription::DecodeError
        | AlertDescription::IllegalParameter
        | AlertDescription::MissingExtension
        | AlertDescription::UnexpectedMessage
        | AlertDescription::UnsupportedExtension => "the client does not understand our messages",
        AlertDescription::BadRecordMac | AlertDescription::DecryptError => {
            "the client cannot decrypt or verify our messages: were they changed on the way?"
        }
        AlertDescription::HandshakeFailure | AlertDescription::InsufficientSecurity => {
            "the client does not agree to what was chosen"
        }
        AlertDescription::InappropriateFallback => {
            "the client fell back to an older TLS than it needs"
        }
        AlertDescription::InternalError => "the client has a fault of its own",
        AlertDescription::NoApplicationProtocol => "the client insists on another protocol (ALPN)",
        AlertDescription::ProtocolVersion => {
            "the client does not speak the version of TLS that was chosen"
        }
        AlertDescription::UnknownCA => {
            "the client does not trust our certificate: it does not know the authority that issued it; \
             are the intermediate certificates in --cert?"
        }
        AlertDescription::UnrecognisedName => "the client does not accept the server's name",
        AlertDescription::UnsupportedCertificate => {
            "the client cannot use our certificate: its kind or its usage"
        }
        _ => "the client refused",
    }
}

/// An alert's name as RFC 8446 section 6 and IANA have it.
pub(super) fn alert_name(alert: AlertDescription) -> String {
    let name = match alert {
        AlertDescription::AccessDenied => "access_denied",
        AlertDescription::BadCertificate => "bad_certificate",
        AlertDescription::BadCertificateHashValue => "bad_certificate_hash_value",
        AlertDescription::BadCertificateStatusResponse => "bad_certificate_status_response",
        AlertDescription::BadRecordMac => "bad_record_mac",
        AlertDescription::CertificateExpired => "certificate_expired",
        AlertDescription::CertificateRequired => "certificate_required",
        AlertDescription::CertificateRevoked => "certificate_revoked",
        AlertDescription::CertificateUnknown => "certificate_unknown",
        AlertDescription::CertificateUnobtainable => "certificate_unobtainable",
        AlertDescription::CloseNotify => "close_notify",
        AlertDescription::DecodeError => "decode_error",
        AlertDescription::DecompressionFailure => "decompression_failure",
        AlertDescription::DecryptError => "decrypt_error",
        AlertDescription::DecryptionFailed => "decryption_failed",
        AlertDescription::EncryptedClientHelloRequired => "ech_required",
        AlertDescription::ExportRestriction => "export_restriction",
        AlertDescription::HandshakeFailure => "handshake_failure",
        AlertDescription::IllegalParameter => "illegal_parameter",
        AlertDescription::InappropriateFallback => "inappropriate_fallback",
        AlertDescription::InsufficientSecurity => "insufficient_security",
        AlertDescription::InternalError => "internal_error",
        AlertDescription::MissingExtension => "missing_extension",
        AlertDescription::NoApplicationProtocol => "no_application_protocol",
        AlertDescription::NoCertificate => "no_certificate",
        AlertDescription::NoRenegotiation => "no_renegotiation",
        AlertDescription::ProtocolVersion => "protocol_version",
        AlertDescription::RecordOverflow => "record_overflow",
        AlertDescription::UnexpectedMessage => "unexpected_message",
        AlertDescription::UnknownCA => "unknown_ca",
        AlertDescription::UnknownPSKIdentity => "unknown_psk_identity",
        AlertDescription::UnrecognisedName => "unrecognized_name",
        AlertDescription::UnsupportedCertificate => "unsupported_certificate",
        AlertDescription::UnsupportedExtension => "unsupported_extension",
        AlertDescription::UserCanceled => "user_canceled",
        other => return u8::from(other).to_string(),
    };
    name.to_owned()
}
