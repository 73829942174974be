//! `proxy_protocol`: who the client is, as a proxy before us wrote it in front of the connection's bytes.
//!
//! Both forms of haproxy's PROXY protocol (proxy-protocol.txt, 2.1 and 2.2). Additional fields of the binary form (TLVs)
//! are skipped.

use super::look::{Seen, Verdict};
use crate::metrics::listener_filter::InspectorStats;
use bytes::Buf;
use outrigger_filters::end_address::EndAddress;
use outrigger_xds::resource::listener_filter::ProxyProtocol;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const V1: &[u8] = b"PROXY ";
/// Longest line of the text form, with its end.
const V1_BYTES_MAX: usize = 107;
const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// What stands before the addresses of the binary form.
const V2_HEAD_BYTES: usize = 16;

/// What a header says.
#[derive(Debug, PartialEq, Eq)]
enum Header {
    /// Not all of it is here.
    More,
    /// It is none.
    None,
    /// It is broken.
    Broken,
    /// So many bytes long, of this version, and whose connection it is: source and destination; without them it stays
    /// whose it is.
    Of(usize, u8, Option<(SocketAddr, SocketAddr)>),
}

pub(super) fn look(seen: &mut Seen, config: &ProxyProtocol, stats: &InspectorStats) -> Verdict {
    let read = |allowed: bool, read: fn(&[u8]) -> Header| {
        // Where headers are not needed, one that is refused is no header.
        if allowed || !config.allow_without {
            read(&seen.bytes)
        } else {
            Header::None
        }
    };
    let header = match (
        read(!config.v1_disallowed, v1),
        read(!config.v2_disallowed, v2),
    ) {
        (Header::None, other) | (other, Header::None) => other,
        (one, _) => one,
    };
    match header {
        Header::More => Verdict::More,
        Header::None if config.allow_without => {
            stats.proxy_not_found_allowed.increment(1);
            Verdict::Done
        }
        Header::None => {
            stats.proxy_not_found_disallowed.increment(1);
            Verdict::Close
        }
        Header::Broken => {
            let version = usize::from(seen.bytes.starts_with(V2));
            stats.proxy_error[version].increment(1);
            Verdict::Close
        }
        Header::Of(length, version, whose) => {
            let index = usize::from(version == 2);
            if [config.v1_disallowed, config.v2_disallowed][index] {
                stats.proxy_disallowed[index].increment(1);
                return Verdict::Close;
            }
            stats.proxy_found[index].increment(1);
            seen.bytes.advance(length);
            if let Some((source, destination)) = whose {
                let destination = EndAddress::Ip(destination);
                seen.remote = source.into();
                seen.redirected |= destination != seen.local;
                seen.local = destination;
            }
            Verdict::Done
        }
    }
}

/// The text form: `PROXY TCP4 192.0.2.1 192.0.2.2 4000 80`.
fn v1(bytes: &[u8]) -> Header {
    if !bytes.starts_with(V1) {
        return if V1.starts_with(bytes) {
            Header::More
        } else {
            Header::None
        };
    }
    let within = &bytes[..bytes.len().min(V1_BYTES_MAX)];
    let Some(end) = memchr::memmem::find(within, b"\r\n") else {
        return if bytes.len() < V1_BYTES_MAX {
            Header::More
        } else {
            Header::Broken
        };
    };
    let whole = end + 2;
    let Ok(line) = std::str::from_utf8(&bytes[V1.len()..end]) else {
        return Header::Broken;
    };
    if line == "UNKNOWN" || line.starts_with("UNKNOWN ") {
        return Header::Of(whole, 1, None);
    }
    let parts: Vec<&str> = line.split(' ').collect();
    let [family @ ("TCP4" | "TCP6"), source, destination, from, to] = parts[..] else {
        return Header::Broken;
    };
    let address = |ip: &str, port: &str| {
        let ip: IpAddr = ip.parse().ok()?;
        (ip.is_ipv4() == (family == "TCP4")).then_some(SocketAddr::new(ip, port.parse().ok()?))
    };
    match (address(source, from), address(destination, to)) {
        (Some(source), Some(destination)) => Header::Of(whole, 1, Some((source, destination))),
        _ => Header::Broken,
    }
}

/// The binary form.
fn v2(bytes: &[u8]) -> Header {
    if !bytes.starts_with(V2) {
        return if V2.starts_with(bytes) {
            Header::More
        } else {
            Header::None
        };
    }
    let Some((head, rest)) = bytes.split_at_checked(V2_HEAD_BYTES) else {
        return Header::More;
    };
    let (version_and_command, family) = (head[12], head[13]);
    let length = usize::from(u16::from_be_bytes([head[14], head[15]]));
    let Some(rest) = rest.get(..length) else {
        return Header::More;
    };
    let whole = V2_HEAD_BYTES + length;
    match (version_and_command, family) {
        // LOCAL: the proxy speaks for itself.
        (0x20, _) => Header::Of(whole, 2, None),
        (0x21, 0x11) => addresses(whole, rest, 4, |ip| {
            <[u8; 4]>::try_from(ip)
                .ok()
                .map(|ip| Ipv4Addr::from(ip).into())
        }),
        (0x21, 0x21) => addresses(whole, rest, 16, |ip| {
            <[u8; 16]>::try_from(ip)
                .ok()
                .map(|ip| Ipv6Addr::from(ip).into())
        }),
        _ => Header::Broken,
    }
}

fn addresses(
    whole: usize,
    mut rest: &[u8],
    size: usize,
    read: impl Fn(&[u8]) -> Option<IpAddr>,
) -> Header {
    if rest.len() < 2 * size + 4 {
        return Header::Broken;
    }
    let (source, destination) = (read(&rest[..size]), read(&rest[size..2 * size]));
    rest.advance(2 * size);
    let (from, to) = (rest.get_u16(), rest.get_u16());
    match (source, destination) {
        (Some(source), Some(destination)) => {
            let both = (
                SocketAddr::new(source, from),
                SocketAddr::new(destination, to),
            );
            Header::Of(whole, 2, Some(both))
        }
        _ => Header::Broken,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn both(source: &str, destination: &str) -> Option<(SocketAddr, SocketAddr)> {
        Some((source.parse().unwrap(), destination.parse().unwrap()))
    }

    #[test]
    fn the_text_form_is_read() {
        let line = b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 80\r\nGET";
        assert_eq!(
            v1(line),
            Header::Of(40, 1, both("192.0.2.1:4000", "192.0.2.2:80"))
        );
        for end in 0..40 {
            assert_eq!(v1(&line[..end]), Header::More, "{end}");
        }
        assert_eq!(
            v1(b"PROXY TCP6 ::1 ::2 1 2\r\n"),
            Header::Of(24, 1, both("[::1]:1", "[::2]:2"))
        );
        assert_eq!(v1(b"PROXY UNKNOWN\r\n"), Header::Of(15, 1, None));
        for broken in [
            &b"PROXY TCP4 ::1 ::2 1 2\r\n"[..],
            b"PROXY TCP4 192.0.2.1 192.0.2.2 4000\r\n",
            b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 80000\r\n",
            b"PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n",
            &[b"PROXY ".as_slice(), &[b'x'; V1_BYTES_MAX]].concat(),
        ] {
            assert_eq!(v1(broken), Header::Broken, "{broken:?}");
        }
        assert_eq!(v1(b"GET / HTTP/1.1\r\n"), Header::None);
    }

    #[test]
    fn the_binary_form_is_read() {
        let head =
            |command: u8, family: u8, length: u8| [V2, &[command, family, 0, length]].concat();
        let v4 = [
            head(0x21, 0x11, 15),
            vec![192, 0, 2, 1, 192, 0, 2, 2, 15, 160, 0, 80, 1, 2, 3],
            b"GET".to_vec(),
        ]
        .concat();
        assert_eq!(
            v2(&v4),
            Header::Of(31, 2, both("192.0.2.1:4000", "192.0.2.2:80"))
        );
        for end in 0..31 {
            assert_eq!(v2(&v4[..end]), Header::More, "{end}");
        }
        let mut v6 = head(0x21, 0x21, 36);
        v6.extend(Ipv6Addr::LOCALHOST.octets());
        v6.extend(Ipv6Addr::LOCALHOST.octets());
        v6.extend([0, 1, 0, 2]);
        assert_eq!(v2(&v6), Header::Of(52, 2, both("[::1]:1", "[::1]:2")));
        assert_eq!(v2(&head(0x20, 0, 0)), Header::Of(16, 2, None));
        assert_eq!(v2(&head(0x31, 0x11, 0)), Header::Broken);
        assert_eq!(v2(&head(0x21, 0x12, 0)), Header::Broken);
        assert_eq!(v2(&head(0x21, 0x11, 0)), Header::Broken);
        assert_eq!(v2(b"hello"), Header::None);
    }
}
