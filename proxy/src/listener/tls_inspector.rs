//! `tls_inspector`: server name and protocols, from the first message of a TLS handshake.

use super::look::{Seen, Verdict};
use crate::metrics::listener_filter::InspectorStats;
use rustls::server::Acceptor;

/// The content type of a handshake record (RFC 8446, 5.1).
const HANDSHAKE: u8 = 22;

pub(super) fn look(seen: &mut Seen, bytes_max: usize, stats: &InspectorStats) -> Verdict {
    let Some(&first) = seen.bytes.first() else {
        return Verdict::More;
    };
    if first != HANDSHAKE {
        stats.tls_not_found.increment(1);
        return Verdict::Done;
    }
    let mut acceptor = Acceptor::default();
    let mut unread = &seen.bytes[..];
    while !unread.is_empty() {
        if !matches!(acceptor.read_tls(&mut unread), Ok(1..)) {
            break;
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let name = hello.server_name().unwrap_or_default();
                let protocols = hello.alpn().into_iter().flatten();
                let protocols = protocols.map(|name| String::from_utf8_lossy(name).into_owned());
                found(seen, name.to_ascii_lowercase(), protocols.collect(), stats);
                return Verdict::Done;
            }
            Err(_) => {
                stats.tls_not_found.increment(1);
                return Verdict::Done;
            }
        }
    }
    if seen.bytes.len() >= bytes_max {
        stats.client_hello_too_big.increment(1);
        return Verdict::Close;
    }
    Verdict::More
}

fn found(seen: &mut Seen, name: String, protocols: Vec<String>, stats: &InspectorStats) {
    stats.tls_found.increment(1);
    let by_presence = |present: bool, yes: &metrics::Counter, no: &metrics::Counter| {
        if present { yes } else { no }.increment(1);
    };
    by_presence(!name.is_empty(), &stats.sni_found, &stats.sni_not_found);
    by_presence(
        !protocols.is_empty(),
        &stats.alpn_found,
        &stats.alpn_not_found,
    );
    seen.is_tls = true;
    seen.server_name = name;
    if !protocols.is_empty() {
        seen.application_protocols = protocols;
    }
}
