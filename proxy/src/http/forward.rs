//! Who the client is, and what the next hop is told of it: addresses, scheme, certificate.

use super::{ConnectionInfo, record::Record};
use crate::{
    edge,
    headers::{self, Seen},
    snapshot::HttpConfig,
    tls::TlsFacts,
};
use http::{HeaderMap, HeaderValue};
use outrigger_filters::end_address::EndAddress;
use outrigger_xds::resource::client_cert::{ClientCert, Forward};
use std::net::{IpAddr, SocketAddr};

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    /// The client, as proxies before us that are believed tell.
    told: Option<IpAddr>,
    /// From inside, as `internal_address_config` says.
    internal: bool,
    /// From outside, and nobody stands before us.
    pub(super) at_edge: bool,
}

impl Source {
    pub(super) fn of(
        fields: &HeaderMap,
        seen: &Seen,
        config: &HttpConfig,
        connection: &ConnectionInfo,
    ) -> Self {
        let edge = &config.manager.edge;
        let appends = config.manager.use_remote_address && !config.inbound;
        // Whoever appends its own client counts from there, whoever does not believes one address more.
        let hops = edge.trusted_hops + u32::from(!appends);
        let told = (!config.inbound)
            .then(|| edge::told_client(fields, seen, hops))
            .flatten();
        // As in Envoy, only an address that is alone says that nobody outside is behind it.
        let alone = if appends {
            (!seen.forwarded_for)
                .then(|| connection.remote.ip())
                .flatten()
        } else {
            told.filter(|_| edge.trusted_hops == 0 && edge::is_single(fields))
        };
        let ranges = &edge.internal_addresses;
        let is_at_pipe = appends && !seen.forwarded_for && connection.remote.ip().is_none();
        let internal = !config.inbound
            && (is_at_pipe && edge.internal_pipes
                || alone.is_some_and(|client| {
                    let client = client.to_canonical();
                    ranges.iter().any(|range| range.contains(client))
                }));
        Self {
            told,
            internal,
            at_edge: appends && !internal,
        }
    }
}

/// Tells the next hop of addresses and of how the client came.
pub(super) fn tell(
    fields: &mut HeaderMap,
    seen: &Seen,
    source: Source,
    record: &mut Record,
    config: &HttpConfig,
    connection: &ConnectionInfo,
) {
    let appends = config.manager.use_remote_address && !config.inbound;
    if seen.envoy && !config.inbound {
        headers::strip_envoy(fields, source.at_edge);
    }
    if source.internal {
        fields.insert(headers::INTERNAL, HeaderValue::from_static("true"));
    }
    let edge = &config.manager.edge;
    if let Some(client) = source.told {
        record.remote = EndAddress::Ip(SocketAddr::new(client, 0));
    }
    if let Some(client) = &connection.address
        && appends
        && !edge.skip_xff_append
    {
        headers::append_forwarded_for(fields, seen, client);
    }
    let told = source.told.map(headers::address);
    if let Some(client) = told.as_ref().or(connection.address.as_ref())
        && source.at_edge
    {
        headers::external_address(fields, client);
    }
    if let Some(port) = connection.local.port()
        && appends
        && edge.append_x_forwarded_port
    {
        headers::forwarded_port(fields, port, edge.trusted_hops > 0);
    }
    // Proxies before us that are believed say it.
    if appends && edge.trusted_hops == 0 || !seen.forwarded_proto {
        let scheme = if connection.tls.is_some() {
            "https"
        } else {
            "http"
        };
        fields.insert(headers::FORWARDED_PROTO, HeaderValue::from_static(scheme));
    }
    client_cert(fields, seen, &edge.client_cert, connection.tls.as_deref());
}

/// `x-forwarded-client-cert`.
fn client_cert(fields: &mut HeaderMap, seen: &Seen, config: &ClientCert, tls: Option<&TlsFacts>) {
    let tls = tls.filter(|tls| tls.peer.is_some());
    let own = match (config.forward, tls) {
        (Forward::AlwaysForwardOnly, _) | (Forward::ForwardOnly, Some(_)) => return,
        (Forward::AppendForward | Forward::SanitizeSet, Some(tls)) => element(config, tls),
        // Whoever sends it claims to speak for somebody else's certificate.
        (Forward::Sanitize, _) | (_, None) => None,
    };
    let Some(mut value) = own else {
        if seen.client_cert {
            fields.remove(headers::FORWARDED_CLIENT_CERT);
        }
        return;
    };
    if config.forward == Forward::AppendForward && seen.client_cert {
        let before = fields.get_all(headers::FORWARDED_CLIENT_CERT).iter();
        // `connection` may have named it, and then it is gone by now.
        let all: Vec<&[u8]> = before
            .map(HeaderValue::as_bytes)
            .chain([&value[..]])
            .collect();
        value = all.join(&b","[..]);
    }
    match HeaderValue::from_bytes(&value) {
        Ok(value) => drop(fields.insert(headers::FORWARDED_CLIENT_CERT, value)),
        // A name in the certificate cannot stand in a header: nothing is told of the client, least of all by itself.
        Err(_) => drop(fields.remove(headers::FORWARDED_CLIENT_CERT)),
    }
}

/// What is told of one hop: Envoy's keys, in Envoy's order.
fn element(config: &ClientCert, tls: &TlsFacts) -> Option<Vec<u8>> {
    let peer = tls.peer.as_ref()?;
    let mut pairs: Vec<String> = Vec::new();
    pairs.extend(tls.local_uri_sans.iter().map(|uri| format!("By={uri}")));
    pairs.push(format!("Hash={}", peer.sha256()));
    if config.cert {
        pairs.push(format!("Cert=\"{}\"", peer.pem()));
    }
    if config.chain {
        pairs.push(format!("Chain=\"{}\"", peer.chain_pem()));
    }
    if config.subject {
        pairs.push(format!("Subject=\"{}\"", peer.subject()));
    }
    if config.uri {
        let names = &tls.peer_uri_sans;
        // The key is there without a name, too.
        pairs.extend(names.split(',').map(|uri| format!("URI={uri}")));
    }
    if config.dns {
        let names = tls.peer_dns_sans.split(',').filter(|name| !name.is_empty());
        pairs.extend(names.map(|name| format!("DNS={name}")));
    }
    Some(pairs.join(";").into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::Peer;

    /// What is told of a client whose certificate has this URI name, and that claims to be somebody else.
    fn told(forward: Forward, uri: &str) -> Option<String> {
        let mut fields = HeaderMap::new();
        fields.insert(
            headers::FORWARDED_CLIENT_CERT,
            HeaderValue::from_static("Hash=forged"),
        );
        let seen = Seen::of(&fields);
        let config = ClientCert {
            forward,
            uri: true,
            ..ClientCert::default()
        };
        let tls = TlsFacts {
            peer: Some(Peer::default()),
            peer_uri_sans: uri.into(),
            ..TlsFacts::default()
        };
        client_cert(&mut fields, &seen, &config, Some(&tls));
        let value = fields.get(headers::FORWARDED_CLIENT_CERT)?;
        Some(value.to_str().unwrap().to_owned())
    }

    #[test]
    fn a_name_that_no_header_can_hold_let_the_clients_own_words_through() {
        for forward in [Forward::SanitizeSet, Forward::AppendForward] {
            let fine = told(forward, "spiffe://a").unwrap();
            assert!(fine.ends_with(";URI=spiffe://a"), "{fine}");
            assert_eq!(told(forward, "spiffe://a\nb"), None, "{forward:?}");
        }
    }
}
