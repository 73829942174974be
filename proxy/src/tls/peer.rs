//! The certificate that a client showed, as headers tell of it; worked out when somebody asks, once a connection.

use super::certificate::{element, expect, name};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls::{
    SupportedCipherSuite, crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
    pki_types::CertificateDer,
};
use std::{fmt::Write as _, sync::OnceLock};

/// DER tags.
const OBJECT_IDENTIFIER: u8 = 0x06;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const UTF8_STRING: u8 = 0x0c;
const PRINTABLE_STRING: u8 = 0x13;
const T61_STRING: u8 = 0x14;
const IA5_STRING: u8 = 0x16;
const BMP_STRING: u8 = 0x1e;

/// Attributes of names by the DER of their numbers, in OpenSSL's words.
const ATTRIBUTES: [(&[u8], &str); 15] = [
    (&[0x55, 4, 3], "CN"),
    (&[0x55, 4, 4], "SN"),
    (&[0x55, 4, 5], "serialNumber"),
    (&[0x55, 4, 6], "C"),
    (&[0x55, 4, 7], "L"),
    (&[0x55, 4, 8], "ST"),
    (&[0x55, 4, 9], "street"),
    (&[0x55, 4, 10], "O"),
    (&[0x55, 4, 11], "OU"),
    (&[0x55, 4, 12], "title"),
    (&[0x55, 4, 42], "GN"),
    (&[0x55, 4, 46], "dnQualifier"),
    (b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x01", "UID"),
    (b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x19", "DC"),
    (b"\x2a\x86\x48\x86\xf7\x0d\x01\x09\x01", "emailAddress"),
];
/// Characters in a line of PEM.
const PEM_LINE: usize = 64;

/// The certificate and those that vouch for it, as they came.
#[derive(Debug, Clone, Default)]
pub struct Peer {
    chain: Vec<CertificateDer<'static>>,
    subject: OnceLock<String>,
    sha256: OnceLock<String>,
}

impl Peer {
    /// `None` if there is no certificate.
    pub(super) fn of(chain: Option<&[CertificateDer<'_>]>) -> Option<Self> {
        let chain = chain.filter(|chain| !chain.is_empty())?;
        Some(Self {
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
            ..Self::default()
        })
    }

    fn leaf(&self) -> &[u8] {
        self.chain.first().map_or(&[], |leaf| leaf.as_ref())
    }

    /// Its subject, as RFC 2253 writes names; may be empty.
    pub(crate) fn subject(&self) -> &str {
        self.subject
            .get_or_init(|| name(self.leaf()).and_then(rfc2253).unwrap_or_default())
    }

    /// In hexadecimal digits.
    pub(crate) fn sha256(&self) -> &str {
        self.sha256.get_or_init(|| hex(&sha256(self.leaf())))
    }

    /// In PEM, escaped as Envoy does for a header.
    pub(crate) fn pem(&self) -> String {
        escaped_pem(self.leaf())
    }

    /// The same of the whole chain.
    pub(crate) fn chain_pem(&self) -> String {
        self.chain.iter().map(|der| escaped_pem(der)).collect()
    }
}

fn sha256(bytes: &[u8]) -> Vec<u8> {
    let common = match TLS13_AES_128_GCM_SHA256 {
        SupportedCipherSuite::Tls12(suite) => &suite.common,
        SupportedCipherSuite::Tls13(suite) => &suite.common,
    };
    common.hash_provider.hash(bytes).as_ref().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn escaped_pem(der: &[u8]) -> String {
    let base64 = STANDARD.encode(der);
    let mut out = String::from("-----BEGIN%20CERTIFICATE-----%0A");
    for (index, letter) in base64.char_indices() {
        if index > 0 && index % PEM_LINE == 0 {
            out.push_str("%0A");
        }
        match letter {
            '+' => out.push_str("%2B"),
            '/' => out.push_str("%2F"),
            '=' => out.push_str("%3D"),
            letter => out.push(letter),
        }
    }
    out.push_str("%0A-----END%20CERTIFICATE-----%0A");
    out
}

/// The content of a `Name`, last part first.
fn rfc2253(mut name: &[u8]) -> Option<String> {
    let mut parts = Vec::new();
    while !name.is_empty() {
        let (mut set, rest) = expect(SET, name)?;
        name = rest;
        let mut pairs = Vec::new();
        while !set.is_empty() {
            let (pair, rest) = expect(SEQUENCE, set)?;
            set = rest;
            pairs.push(attribute(pair)?);
        }
        parts.push(pairs.join("+"));
    }
    parts.reverse();
    Some(parts.join(","))
}

fn attribute(pair: &[u8]) -> Option<String> {
    let (number, value) = expect(OBJECT_IDENTIFIER, pair)?;
    let known = ATTRIBUTES.iter().find(|(known, _)| *known == number);
    let (tag, text, _) = element(value)?;
    let text = match tag {
        UTF8_STRING | PRINTABLE_STRING | IA5_STRING => {
            std::str::from_utf8(text).ok().map(str::to_owned)
        }
        T61_STRING => Some(text.iter().copied().map(char::from).collect()),
        BMP_STRING => {
            let units = text
                .chunks_exact(2)
                .map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
            char::decode_utf16(units).collect::<Result<_, _>>().ok()
        }
        _ => None,
    };
    Some(match (known, text) {
        (Some((_, name)), Some(text)) => format!("{name}={}", escaped(&text)),
        (Some((_, name)), None) => format!("{name}=#{}", hex(value).to_uppercase()),
        (None, _) => format!("{}=#{}", dotted(number), hex(value).to_uppercase()),
    })
}

fn escaped(text: &str) -> String {
    let mut out = String::new();
    let last = text.len().saturating_sub(1);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b',' | b'+' | b'"' | b'\\' | b'<' | b'>' | b';' => out.extend(['\\', byte.into()]),
            b'#' if at == 0 => out.push_str("\\#"),
            b' ' if at == 0 || at == last => out.push_str("\\ "),
            0x20..=0x7e => out.push(byte.into()),
            _ => {
                let _ = write!(out, "\\{byte:02X}");
            }
        }
    }
    out
}

/// An object identifier in figures (X.690, 8.19).
fn dotted(number: &[u8]) -> String {
    let mut parts: Vec<u64> = Vec::new();
    let mut value: u64 = 0;
    for byte in number {
        value = value << 7 | u64::from(byte & 0x7f);
        if byte & 0x80 != 0 {
            continue;
        }
        if parts.is_empty() {
            let first = (value / 40).min(2);
            parts.extend([first, value - 40 * first]);
        } else {
            parts.push(value);
        }
        value = 0;
    }
    let parts: Vec<String> = parts.iter().map(u64::to_string).collect();
    parts.join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tlv(tag: u8, content: &[u8]) -> Vec<u8> {
        [&[tag, content.len() as u8], content].concat()
    }

    fn pair(number: &[u8], tag: u8, text: &[u8]) -> Vec<u8> {
        let pair = [tlv(OBJECT_IDENTIFIER, number), tlv(tag, text)].concat();
        tlv(SEQUENCE, &pair)
    }

    #[test]
    fn names_are_written_as_rfc_2253_does() {
        let cn = |tag, text: &[u8]| tlv(SET, &pair(&[0x55, 4, 3], tag, text));
        for (tag, text, want) in [
            (UTF8_STRING, &b"plain name"[..], "CN=plain name"),
            (PRINTABLE_STRING, b" a, \"b\"+c ", r#"CN=\ a\, \"b\"\+c\ "#),
            (UTF8_STRING, b"#x\\<>;=", r"CN=\#x\\\<\>\;="),
            (UTF8_STRING, "é\n".as_bytes(), r"CN=\C3\A9\0A"),
            (T61_STRING, b"\xe9", r"CN=\C3\A9"),
            (BMP_STRING, b"\0a\x20\xac", r"CN=a\E2\82\AC"),
            (0x04, b"ab", "CN=#04026162"),
        ] {
            assert_eq!(rfc2253(&cn(tag, text)).as_deref(), Some(want));
        }
        let country = tlv(SET, &pair(&[0x55, 4, 6], PRINTABLE_STRING, b"DE"));
        let several = [
            pair(&[0x55, 4, 10], UTF8_STRING, b"o"),
            pair(&[0x2a, 0x86, 0x48, 3], UTF8_STRING, b"x"),
        ];
        let name = [country, tlv(SET, &several.concat()), cn(UTF8_STRING, b"me")].concat();
        assert_eq!(
            rfc2253(&name).as_deref(),
            Some("CN=me,O=o+1.2.840.3=#0C0178,C=DE")
        );
        assert_eq!(rfc2253(&[]).as_deref(), Some(""));
        assert_eq!(rfc2253(&name[..name.len() - 1]), None);
    }

    #[test]
    fn hashes_and_pem_are_those_of_the_bytes() {
        let peer = Peer::of(Some(&[CertificateDer::from(&b"abc"[..])])).unwrap();
        assert_eq!(
            peer.sha256(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(
            peer.pem(),
            "-----BEGIN%20CERTIFICATE-----%0AYWJj%0A-----END%20CERTIFICATE-----%0A"
        );
        let long = escaped_pem(&[0xfb; 49]);
        let lines: Vec<&str> = long.split("%0A").collect();
        assert_eq!(lines.len(), 5);
        assert_eq!(lines[1].replace("%2B", "+").replace("%2F", "/").len(), 64);
        assert!(lines[2].ends_with("%3D%3D"), "{long}");
        assert!(Peer::of(Some(&[])).is_none());
    }
}
