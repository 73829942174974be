//! What a certificate says of itself, for people: serial number, names, and from when to when it holds.

use rustls::pki_types::CertificateDer;
use serde_json::{Value, json};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use webpki::EndEntityCert;

const SECONDS_A_DAY: u64 = 24 * 60 * 60;
/// DER tags.
const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const EXPLICIT_0: u8 = 0xa0;

/// A certificate as `/certs` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Certificate {
    /// Where it was read; `<inline>` if it came in the configuration.
    path: String,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    dns: Vec<String>,
    uris: Vec<String>,
}

impl Certificate {
    /// `None` if it is not DER as X.509 has it.
    pub(super) fn read(path: &str, der: &CertificateDer<'_>) -> Option<Self> {
        let (serial, not_before, not_after) = validity(der)?;
        // A CA has no names that matter, and need not be one that could serve.
        let parsed = EndEntityCert::try_from(der).ok();
        let names = |of: fn(&EndEntityCert<'_>) -> Vec<String>| parsed.as_ref().map(of);
        let dns = names(|cert| cert.valid_dns_names().map(str::to_owned).collect());
        let uris = names(|cert| cert.valid_uri_names().map(str::to_owned).collect());
        Some(Self {
            path: path.to_owned(),
            serial: serial.iter().map(|byte| format!("{byte:02x}")).collect(),
            not_before,
            not_after,
            dns: dns.unwrap_or_default(),
            uris: uris.unwrap_or_default(),
        })
    }

    /// Whole days that it still holds; 0 if it does not.
    pub(crate) fn days_left(&self) -> u64 {
        let left = self.not_after.duration_since(SystemTime::now());
        left.map_or(0, |left| left.as_secs() / SECONDS_A_DAY)
    }

    /// Envoy's `CertificateDetails`.
    pub(crate) fn to_json(&self) -> Value {
        let dns = self.dns.iter().map(|name| json!({ "dns": name }));
        let uris = self.uris.iter().map(|name| json!({ "uri": name }));
        json!({
            "path": self.path,
            "serial_number": self.serial,
            "subject_alt_names": dns.chain(uris).collect::<Vec<_>>(),
            "days_until_expiration": self.days_left().to_string(),
            "valid_from": crate::access_log::rfc3339(self.not_before),
            "expiration_time": crate::access_log::rfc3339(self.not_after),
        })
    }
}

/// One element of DER: its tag, its content, and what comes after it.
pub(super) fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&tag, rest) = der.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = if first < 0x80 {
        (usize::from(first), rest)
    } else {
        let count = usize::from(first & 0x7f);
        let bytes = rest.get(..count).filter(|_| (1..=4).contains(&count))?;
        let length = bytes
            .iter()
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        (length, &rest[count..])
    };
    Some((tag, rest.get(..length)?, &rest[length..]))
}

pub(super) fn expect(wanted: u8, der: &[u8]) -> Option<(&[u8], &[u8])> {
    let (tag, content, rest) = element(der)?;
    (tag == wanted).then_some((content, rest))
}

/// RFC 5280, 4.1: serial number and validity of a certificate.
fn validity(der: &[u8]) -> Option<(&[u8], SystemTime, SystemTime)> {
    let (certificate, _) = expect(SEQUENCE, der)?;
    let (mut body, _) = expect(SEQUENCE, certificate)?;
    if let Some((_, rest)) = expect(EXPLICIT_0, body) {
        body = rest;
    }
    let (number, body) = expect(INTEGER, body)?;
    let (_signature, body) = expect(SEQUENCE, body)?;
    let (_issuer, body) = expect(SEQUENCE, body)?;
    let (validity, _) = expect(SEQUENCE, body)?;
    let (tag, before, rest) = element(validity)?;
    let before = time(tag, before)?;
    let (tag, after, _) = element(rest)?;
    // A leading zero only keeps the number positive.
    let serial = number.strip_prefix(&[0]).filter(|rest| !rest.is_empty());
    Some((serial.unwrap_or(number), before, time(tag, after)?))
}

/// The content of its subject (RFC 5280, 4.1).
pub(super) fn name(der: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = expect(SEQUENCE, der)?;
    let (mut body, _) = expect(SEQUENCE, certificate)?;
    if let Some((_, rest)) = expect(EXPLICIT_0, body) {
        body = rest;
    }
    let (_serial, body) = expect(INTEGER, body)?;
    let (_signature, body) = expect(SEQUENCE, body)?;
    let (_issuer, body) = expect(SEQUENCE, body)?;
    let (_validity, body) = expect(SEQUENCE, body)?;
    expect(SEQUENCE, body).map(|(subject, _)| subject)
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`.
fn time(tag: u8, text: &[u8]) -> Option<SystemTime> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (year, rest) = match tag {
        UTC_TIME => {
            let year: u64 = text.get(..2)?.parse().ok()?;
            (
                if year < 50 { 2000 + year } else { 1900 + year },
                text.get(2..)?,
            )
        }
        GENERALIZED_TIME => (text.get(..4)?.parse().ok()?, text.get(4..)?),
        _ => return None,
    };
    let two = |at: usize| rest.get(at..at + 2)?.parse::<u64>().ok();
    let days = days_before(year, two(0)?, two(2)?)?;
    let seconds = days * SECONDS_A_DAY + two(4)? * 3600 + two(6)? * 60 + two(8)?;
    Some(UNIX_EPOCH + Duration::from_secs(seconds))
}

/// Days from 1970 to a day of the Gregorian calendar.
fn days_before(year: u64, month: u64, day: u64) -> Option<u64> {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let lengths = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let before = usize::try_from(month.checked_sub(1)?).ok()?;
    let months = lengths.get(..before).filter(|_| before < 12)?;
    let years: u64 = (1970..year).map(|year| 365 + u64::from(leap(year))).sum();
    let months: u64 = months.iter().sum();
    Some(years + months + u64::from(month > 2 && leap(year)) + day.checked_sub(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_rfc_5280_writes_them() {
        let cases: [(u8, &str, Option<u64>); 6] = [
            (UTC_TIME, "700101000000Z", Some(0)),
            (UTC_TIME, "491231235959Z", Some(2_524_607_999)),
            (GENERALIZED_TIME, "20240229123456Z", Some(1_709_210_096)),
            (GENERALIZED_TIME, "20000301000000Z", Some(951_868_800)),
            (GENERALIZED_TIME, "20241301000000Z", None),
            (UTC_TIME, "24x", None),
        ];
        for (tag, text, expected) in cases {
            let expected = expected.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
            assert_eq!(time(tag, text.as_bytes()), expected, "{text}");
        }
    }
}
