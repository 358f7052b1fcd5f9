//! What a verified client certificate says about its holder: bounded, checked text, and its fixed-size form for the launcher.

use std::fmt::Write as _;

use ring::digest::{SHA256, digest};
use x509_parser::asn1_rs::{Any, Oid, Tag, ToDer as _};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::oid_registry::{
    OID_DOMAIN_COMPONENT, OID_PKCS9_EMAIL_ADDRESS, OID_USERID, OID_X509_COMMON_NAME,
    OID_X509_COUNTRY_NAME, OID_X509_GIVEN_NAME, OID_X509_INITIALS, OID_X509_LOCALITY_NAME,
    OID_X509_ORGANIZATION_NAME, OID_X509_ORGANIZATIONAL_UNIT, OID_X509_SERIALNUMBER,
    OID_X509_STATE_OR_PROVINCE_NAME, OID_X509_STREET_ADDRESS, OID_X509_SURNAME, OID_X509_TITLE,
};
use x509_parser::time::ASN1Time;
use x509_parser::x509::X509Name;

/// Checked text about the holder of a client certificate. A field that the certificate lacks is empty, and so is one that is
/// too long or has a control character in it: half a name could be somebody else's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ClientIdentity([String; FIELDS.len()]);

/// A fact about the client: the variable that carries it, its longest form in octets, and what it is made of.
struct Field {
    variable: &'static str,
    limit: usize,
    alphabet: Alphabet,
}

enum Alphabet {
    Hexadecimal,
    Text,
}

/// What is told, by mod_ssl's names, which UCSPI-TLS uses too. The last one is ours: mod_ssl hands over the whole certificate.
const FIELDS: [Field; 9] = [
    text("SSL_CLIENT_I_DN", 512),
    digits("SSL_CLIENT_M_SERIAL", SERIAL_LIMIT),
    text("SSL_CLIENT_SAN_DNS_0", 253),
    text("SSL_CLIENT_SAN_Email_0", 320),
    text("SSL_CLIENT_S_DN", 512),
    text("SSL_CLIENT_S_DN_CN", 253),
    text("SSL_CLIENT_S_DN_Email", 320),
    text("SSL_CLIENT_V_END", 24),
    digits("SSL_CLIENT_CERT_SHA256", 64),
];

const SUBJECT: usize = 4;
const COMMON_NAME: usize = 5;

/// Two digits for each of the 20 octets that RFC 5280 section 4.1.2.2 allows, and for as many again, since some exceed it.
const SERIAL_LIMIT: usize = 80;

const fn text(variable: &'static str, limit: usize) -> Field {
    Field {
        variable,
        limit,
        alphabet: Alphabet::Text,
    }
}

const fn digits(variable: &'static str, limit: usize) -> Field {
    Field {
        variable,
        limit,
        alphabet: Alphabet::Hexadecimal,
    }
}

/// Octets of [`ClientIdentity::encode`]: for each field its length in two octets, and room for the longest.
pub(crate) const CLIENT_LENGTH: usize = {
    let mut length = 0;
    let mut rest: &[Field] = &FIELDS;
    while let [field, others @ ..] = rest {
        length += 2 + field.limit;
        rest = others;
    }
    length
};

// The launcher's record stays small.
const _: () = assert!(CLIENT_LENGTH <= 3072);

impl Field {
    /// Whether this may be told: no empty text, no control character (so no line end and no zero octet), nothing too long.
    fn permits(&self, value: &str) -> bool {
        !value.is_empty()
            && value.len() <= self.limit
            && match self.alphabet {
                Alphabet::Hexadecimal => value
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'A'..=b'F')),
                Alphabet::Text => !value.chars().any(char::is_control),
            }
    }
}

impl ClientIdentity {
    /// What the certificate says. Whether to believe it is the verifier's part. `None` if it cannot be read.
    pub(super) fn from_der(certificate: &[u8]) -> Option<Self> {
        let (rest, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        if !rest.is_empty() {
            return None;
        }
        let subject = parsed.subject();
        let values = [
            distinguished_name(parsed.issuer()),
            Some(serial_number(parsed.raw_serial())),
            alternative_name(&parsed, |name| match name {
                GeneralName::DNSName(name) => Some((*name).to_owned()),
                _ => None,
            }),
            alternative_name(&parsed, |name| match name {
                GeneralName::RFC822Name(name) => Some((*name).to_owned()),
                _ => None,
            }),
            distinguished_name(subject),
            only(subject, &OID_X509_COMMON_NAME),
            only(subject, &OID_PKCS9_EMAIL_ADDRESS),
            date(&parsed.validity().not_after),
            Some(hexadecimal(digest(&SHA256, certificate).as_ref())),
        ];
        let mut checked: [String; FIELDS.len()] = Default::default();
        for ((to, value), field) in checked.iter_mut().zip(values).zip(&FIELDS) {
            *to = value
                .filter(|value| field.permits(value))
                .unwrap_or_default();
        }
        Some(Self(checked))
    }

    /// Fixed-size bytes for the launcher.
    pub(super) fn encode(&self) -> [u8; CLIENT_LENGTH] {
        let mut bytes = [0; CLIENT_LENGTH];
        let content = self.0.iter().flat_map(|value| {
            let length = u16::try_from(value.len()).unwrap_or(0);
            length.to_be_bytes().into_iter().chain(value.bytes())
        });
        for (to, from) in bytes.iter_mut().zip(content) {
            *to = from;
        }
        bytes
    }

    /// The identity in `bytes`, each field checked again: who reads them has privileges, who wrote them has none.
    pub(super) fn decode(bytes: &[u8; CLIENT_LENGTH]) -> Option<Self> {
        let mut rest = bytes.as_slice();
        let mut values: [String; FIELDS.len()] = Default::default();
        for (to, field) in values.iter_mut().zip(&FIELDS) {
            let (length, after) = rest.split_first_chunk()?;
            let (value, after) =
                after.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
            let value = std::str::from_utf8(value).ok()?;
            if !value.is_empty() && !field.permits(value) {
                return None;
            }
            value.clone_into(to);
            rest = after;
        }
        rest.iter().all(|&octet| octet == 0).then_some(Self(values))
    }

    /// The variables for the backend.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&'static str, &str)> {
        FIELDS
            .iter()
            .zip(&self.0)
            .map(|(field, value)| (field.variable, value.as_str()))
            .filter(|(_, value)| !value.is_empty())
            .chain([("SSL_CLIENT_VERIFY", "SUCCESS")])
    }

    fn field(&self, index: usize) -> Option<&str> {
        self.0
            .get(index)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// The common name, if there is one and one only.
    pub(crate) fn common_name(&self) -> Option<&str> {
        self.field(COMMON_NAME)
    }

    /// Who this is, for the log: the common name, or else the subject.
    pub(crate) fn name(&self) -> Option<&str> {
        self.common_name().or_else(|| self.field(SUBJECT))
    }

    /// The user that the certificate names: its common name, if that is exactly what useradd(8) takes for one. Nothing is made
    /// to fit: neither is a capital letter lowered nor an e-mail address cut at its `@`, as either could make a name that the
    /// authority never certified.
    pub(crate) fn user(&self) -> Option<&str> {
        self.common_name().filter(|name| is_user_name(name))
    }
}

fn is_user_name(name: &str) -> bool {
    name.len() <= 32
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first == '_')
        && name
            .bytes()
            .all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' | b'.'))
}

/// The one value of an attribute. Which of several is meant would be a guess, so there is none then.
fn only(name: &X509Name<'_>, attribute: &Oid<'_>) -> Option<String> {
    let mut values = name.iter_by_oid(attribute);
    let value = string(values.next()?.attr_value())?;
    values.next().is_none().then_some(value)
}

/// The first name of a kind in subjectAltName.
fn alternative_name(
    certificate: &X509Certificate<'_>,
    choose: fn(&GeneralName<'_>) -> Option<String>,
) -> Option<String> {
    let extension = certificate.subject_alternative_name().ok()??;
    extension.value.general_names.iter().find_map(choose)
}

/// A name in the form of RFC 4514 (RFC 2253), as mod_ssl gives it: the last component first, UTF-8 as it is.
fn distinguished_name(name: &X509Name<'_>) -> Option<String> {
    let components: Vec<_> = name.iter_rdn().collect();
    let mut text = String::new();
    for component in components.into_iter().rev() {
        for (index, attribute) in component.iter().enumerate() {
            text.push_str(match (text.is_empty(), index) {
                (true, _) => "",
                (false, 0) => ",",
                (false, _) => "+",
            });
            let keyword = keyword(attribute.attr_type());
            match (keyword, string(attribute.attr_value())) {
                (Some(keyword), Some(value)) => {
                    write!(text, "{keyword}=").ok()?;
                    escape(&value, &mut text)?;
                }
                // RFC 4514 section 2.4: what has no keyword or is no string is given as its encoding.
                (keyword, _) => {
                    match keyword {
                        Some(keyword) => text.push_str(keyword),
                        None => text.push_str(&attribute.attr_type().to_id_string()),
                    }
                    let encoded = attribute.attr_value().to_der_vec().ok()?;
                    write!(text, "=#{}", hexadecimal(&encoded)).ok()?;
                }
            }
        }
    }
    Some(text)
}

/// The attribute's short name, as OpenSSL has it.
fn keyword(attribute: &Oid<'_>) -> Option<&'static str> {
    let known = [
        (&OID_DOMAIN_COMPONENT, "DC"),
        (&OID_PKCS9_EMAIL_ADDRESS, "emailAddress"),
        (&OID_USERID, "UID"),
        (&OID_X509_COMMON_NAME, "CN"),
        (&OID_X509_COUNTRY_NAME, "C"),
        (&OID_X509_GIVEN_NAME, "GN"),
        (&OID_X509_INITIALS, "initials"),
        (&OID_X509_LOCALITY_NAME, "L"),
        (&OID_X509_ORGANIZATIONAL_UNIT, "OU"),
        (&OID_X509_ORGANIZATION_NAME, "O"),
        (&OID_X509_SERIALNUMBER, "serialNumber"),
        (&OID_X509_STATE_OR_PROVINCE_NAME, "ST"),
        (&OID_X509_STREET_ADDRESS, "street"),
        (&OID_X509_SURNAME, "SN"),
        (&OID_X509_TITLE, "title"),
    ];
    known
        .into_iter()
        .find_map(|(oid, keyword)| (oid == attribute).then_some(keyword))
}

/// Appends `value` with the escapes of RFC 4514 section 2.4; control characters become pairs of digits.
fn escape(value: &str, text: &mut String) -> Option<()> {
    let last = value.chars().count().saturating_sub(1);
    for (index, character) in value.chars().enumerate() {
        let is_special = matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';')
            || (character == '#' && index == 0)
            || (character == ' ' && (index == 0 || index == last));
        if character.is_control() {
            let mut octets = [0; 4];
            for octet in character.encode_utf8(&mut octets).bytes() {
                write!(text, "\\{octet:02X}").ok()?;
            }
        } else {
            if is_special {
                text.push('\\');
            }
            text.push(character);
        }
    }
    Some(())
}

/// A string of any of the kinds that names have (RFC 5280 section 4.1.2.4, and IA5String for e-mail addresses).
fn string(value: &Any<'_>) -> Option<String> {
    let octets = value.as_bytes();
    match value.tag() {
        Tag::Ia5String | Tag::NumericString | Tag::PrintableString | Tag::VisibleString => octets
            .is_ascii()
            .then(|| octets.iter().copied().map(char::from).collect()),
        Tag::Utf8String => String::from_utf8(octets.to_vec()).ok(),
        Tag::BmpString => {
            let units = octets.chunks(2).map(|unit| match unit {
                [high, low] => u16::from_be_bytes([*high, *low]),
                // Half a character: a lone surrogate, which is refused.
                _ => 0xd800,
            });
            char::decode_utf16(units).collect::<Result<_, _>>().ok()
        }
        // T.61 was never used as such: everybody who wrote it meant Latin-1.
        Tag::T61String => Some(octets.iter().copied().map(char::from).collect()),
        _ => None,
    }
}

/// As OpenSSL prints times: `Nov 22 12:30:02 2027 GMT`.
fn date(time: &ASN1Time) -> Option<String> {
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let time = time.to_datetime();
    let month = MONTHS.get(usize::from(u8::from(time.month())).checked_sub(1)?)?;
    let (hour, minute, second) = time.to_hms();
    Some(format!(
        "{month} {:2} {hour:02}:{minute:02}:{second:02} {} GMT",
        time.day(),
        time.year()
    ))
}

/// The digits of a number, without the octet that only says that it is positive.
fn serial_number(octets: &[u8]) -> String {
    match octets {
        [0, rest @ ..] if !rest.is_empty() => hexadecimal(rest),
        _ => hexadecimal(octets),
    }
}

fn hexadecimal(octets: &[u8]) -> String {
    octets.iter().fold(String::new(), |mut text, octet| {
        // Writing to a string does not fail.
        let _ = write!(text, "{octet:02X}");
        text
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair, SanType};

    use super::*;

    fn certificate(subject: &[(DnType, DnValue)], names: Vec<SanType>) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (kind, value) in subject {
            params.distinguished_name.push(kind.clone(), value.clone());
        }
        params.subject_alt_names = names;
        params.not_after = rcgen::date_time_ymd(2030, 3, 4);
        params.serial_number = Some(vec![0xfe, 0xdc, 0x00, 0x1a].into());
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    fn identity(subject: &[(DnType, &str)]) -> ClientIdentity {
        let subject: Vec<_> = subject
            .iter()
            .map(|(kind, value)| (kind.clone(), DnValue::from(*value)))
            .collect();
        ClientIdentity::from_der(&certificate(&subject, Vec::new())).unwrap()
    }

    fn variable(identity: &ClientIdentity, name: &str) -> Option<String> {
        let found = identity.variables().find(|(variable, _)| *variable == name);
        found.map(|(_, value)| value.to_owned())
    }

    fn email() -> DnType {
        DnType::CustomDnType(vec![1, 2, 840, 113_549, 1, 9, 1])
    }

    #[test]
    fn a_certificate_is_told_by_mod_ssl_names() {
        let der = certificate(
            &[
                (DnType::CountryName, "DE".into()),
                (DnType::OrganizationName, "Müller, Söhne".into()),
                (DnType::CommonName, "alice".into()),
                (
                    email(),
                    DnValue::Ia5String("alice@mail.example".try_into().unwrap()),
                ),
            ],
            vec![
                SanType::Rfc822Name("a@mail.example".try_into().unwrap()),
                SanType::DnsName("laptop.example".try_into().unwrap()),
                SanType::DnsName("other.example".try_into().unwrap()),
            ],
        );
        let identity = ClientIdentity::from_der(&der).unwrap();
        let name = "emailAddress=alice@mail.example,CN=alice,O=Müller\\, Söhne,C=DE";
        let fingerprint = hexadecimal(digest(&SHA256, &der).as_ref());
        let told: Vec<_> = identity.variables().collect();
        assert_eq!(
            told,
            [
                ("SSL_CLIENT_I_DN", name),
                ("SSL_CLIENT_M_SERIAL", "FEDC001A"),
                ("SSL_CLIENT_SAN_DNS_0", "laptop.example"),
                ("SSL_CLIENT_SAN_Email_0", "a@mail.example"),
                ("SSL_CLIENT_S_DN", name),
                ("SSL_CLIENT_S_DN_CN", "alice"),
                ("SSL_CLIENT_S_DN_Email", "alice@mail.example"),
                ("SSL_CLIENT_V_END", "Mar  4 00:00:00 2030 GMT"),
                ("SSL_CLIENT_CERT_SHA256", fingerprint.as_str()),
                ("SSL_CLIENT_VERIFY", "SUCCESS"),
            ]
        );
        assert_eq!(identity.user(), Some("alice"));
        assert_eq!(ClientIdentity::decode(&identity.encode()), Some(identity));
    }

    #[test]
    fn a_common_name_is_the_user_only_if_it_is_a_user_name() {
        let longest = "a".repeat(32);
        for name in ["alice", "_mail", "a.b-c_9", &longest] {
            let identity = identity(&[(DnType::CommonName, name)]);
            assert_eq!(identity.user(), Some(name));
            assert_eq!(identity.name(), Some(name));
        }
        let too_long = "a".repeat(33);
        for name in [
            "Alice",
            "ROOT",
            "alice@mail.example",
            "alice smith",
            "0",
            "1000",
            "-x",
            "../x",
            ".x",
            "älice",
            "a/b",
            "alice ",
            " alice",
            "alice\0",
            "alice\n",
            "",
            &too_long,
        ] {
            assert_eq!(
                identity(&[(DnType::CommonName, name)]).user(),
                None,
                "{name:?}"
            );
        }
    }

    #[test]
    fn of_two_common_names_none_is_the_user() {
        // rcgen replaces a value that is given twice, so the second attribute's name is made into the first's afterwards.
        let mut der = certificate(
            &[
                (DnType::CommonName, "alice".into()),
                (DnType::LocalityName, "mallory".into()),
            ],
            Vec::new(),
        );
        let locality = [6, 3, 0x55, 4, 7];
        let places: Vec<_> = (0..der.len() - 5)
            .filter(|&at| der[at..at + 5] == locality)
            .collect();
        for at in &places {
            der[at + 4] = 3;
        }
        assert_eq!(places.len(), 2, "issuer and subject");
        let identity = ClientIdentity::from_der(&der).unwrap();
        assert_eq!(
            variable(&identity, "SSL_CLIENT_S_DN").as_deref(),
            Some("CN=mallory,CN=alice")
        );
        assert_eq!(variable(&identity, "SSL_CLIENT_S_DN_CN"), None);
        assert_eq!(identity.user(), None);
        assert_eq!(identity.name(), Some("CN=mallory,CN=alice"));
    }

    #[test]
    fn a_field_that_does_not_fit_is_left_out_and_not_cut() {
        let long = identity(&[(DnType::CommonName, &"x".repeat(254))]);
        assert_eq!(variable(&long, "SSL_CLIENT_S_DN_CN"), None);
        assert_eq!(
            variable(&long, "SSL_CLIENT_S_DN").map(|name| name.len()),
            Some(257)
        );
        let longer = identity(&[(DnType::CommonName, &"x".repeat(510))]);
        assert_eq!(variable(&longer, "SSL_CLIENT_S_DN"), None);
        assert_eq!(longer.name(), None);
    }

    #[test]
    fn control_characters_do_not_come_through() {
        for name in ["a\nIMAP_TLS=0", "a\0b", "a\u{85}b", "a\x7f"] {
            let identity = identity(&[(DnType::CommonName, name)]);
            assert_eq!(variable(&identity, "SSL_CLIENT_S_DN_CN"), None, "{name:?}");
            for (variable, value) in identity.variables() {
                assert!(!value.chars().any(char::is_control), "{variable}");
            }
        }
    }

    /// As `openssl x509 -nameopt RFC2253,-esc_msb` prints them.
    #[test]
    fn names_are_escaped_as_rfc_4514_has_it() {
        for (value, escaped) in [
            (" x ", "\\ x\\ "),
            (" ", "\\ "),
            ("#x#", "\\#x#"),
            ("a,b+c\"d\\e<f>g;h=i", "a\\,b\\+c\\\"d\\\\e\\<f\\>g\\;h=i"),
            ("a\nb", "a\\0Ab"),
        ] {
            assert_eq!(
                variable(&identity(&[(DnType::CommonName, value)]), "SSL_CLIENT_S_DN"),
                Some(format!("CN={escaped}"))
            );
        }
        let unknown = DnType::CustomDnType(vec![1, 2, 3, 4]);
        assert_eq!(
            variable(&identity(&[(unknown, "x")]), "SSL_CLIENT_S_DN").as_deref(),
            Some("1.2.3.4=#0C0178")
        );
    }

    #[test]
    fn a_wide_string_is_read() {
        let wide = DnValue::BmpString("Grüße".try_into().unwrap());
        let der = certificate(&[(DnType::CommonName, wide)], Vec::new());
        let identity = ClientIdentity::from_der(&der).unwrap();
        assert_eq!(
            variable(&identity, "SSL_CLIENT_S_DN_CN").as_deref(),
            Some("Grüße")
        );
    }

    #[test]
    fn what_is_no_certificate_has_no_identity() {
        let der = certificate(&[(DnType::CommonName, "alice".into())], Vec::new());
        for cut in 0..der.len() {
            assert_eq!(ClientIdentity::from_der(&der[..cut]), None);
        }
        assert_eq!(ClientIdentity::from_der(&[&der[..], &[0]].concat()), None);
    }

    #[test]
    fn a_forged_record_is_refused() {
        let identity = identity(&[(DnType::CommonName, "alice")]);
        let good = identity.encode();
        let place = |text: &[u8]| {
            let at = good.windows(text.len()).rposition(|window| window == text);
            at.unwrap()
        };
        let forged = |at: usize, octet: u8| {
            let mut bytes = good;
            bytes[at] = octet;
            ClientIdentity::decode(&bytes)
        };
        let (name, serial) = (place(b"alice"), place(b"FEDC001A"));
        for octet in [0, b'\n', 0x7f, 0xff] {
            assert_eq!(forged(name, octet), None);
        }
        assert_eq!(forged(serial, b'='), None);
        // Lengths that lead past the end, or past the field's limit, and octets where there should be none.
        assert_eq!(forged(0, 0xff), None);
        assert_eq!(forged(name - 2, 1), None);
        assert_eq!(forged(CLIENT_LENGTH - 1, 1), None);
        assert_eq!(forged(name, b'b').unwrap().user(), Some("blice"));
    }
}
