//! Which filter chain a connection belongs to: Envoy's order, in which each step leaves those that fit best.

use super::look::Seen;
use outrigger_xds::resource::{
    cidr::CidrRange,
    filter_chain::{FilterChainMatch, SourceType},
};
use std::net::{IpAddr, Ipv4Addr};

/// How well something fits: 0 asks for nothing.
type Fit = Option<usize>;

/// What ranges are asked of where there is a pipe, as in Envoy.
const NO_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::BROADCAST);

/// The chain, of those whose conditions these are, that a connection belongs to.
pub(super) fn find<'a, T>(
    chains: &'a [T],
    conditions: impl Fn(&T) -> &FilterChainMatch,
    seen: &Seen,
) -> Option<&'a T> {
    if let [only] = chains
        && *conditions(only) == FilterChainMatch::default()
    {
        return Some(only);
    }
    let mut left: Vec<&T> = chains.iter().collect();
    let mut step = |fit: &dyn Fn(&FilterChainMatch) -> Fit| {
        let best = left.iter().filter_map(|chain| fit(conditions(chain))).max();
        left.retain(|chain| best.is_some() && fit(conditions(chain)) == best);
    };
    let [local, remote, direct] = [&seen.local, &seen.remote, &seen.direct_remote]
        .map(|end| end.ip().map_or(NO_ADDRESS, |ip| ip.to_canonical()));
    step(&|wants| port(wants.destination_port, seen.local.port()));
    step(&|wants| longest(&wants.prefix_ranges, local));
    step(&|wants| server_name(&wants.server_names, &seen.server_name));
    step(&|wants| transport(&wants.transport_protocol, seen.transport_protocol()));
    step(&|wants| protocol(&wants.application_protocols, &seen.application_protocols));
    step(&|wants| longest(&wants.direct_source_prefix_ranges, direct));
    step(&|wants| source_type(wants.source_type, local, remote));
    step(&|wants| longest(&wants.source_prefix_ranges, remote));
    step(&|wants| source_port(&wants.source_ports, seen.remote.port()));
    left.first().copied()
}

fn port(wanted: Option<u16>, port: Option<u16>) -> Fit {
    match wanted {
        None => Some(0),
        Some(_) => (wanted == port).then_some(1),
    }
}

fn source_port(wanted: &[u16], port: Option<u16>) -> Fit {
    if wanted.is_empty() {
        return Some(0);
    }
    port.is_some_and(|port| wanted.contains(&port)).then_some(1)
}

/// A longer prefix fits better, and one of no length better than no prefix.
fn longest(ranges: &[CidrRange], address: IpAddr) -> Fit {
    if ranges.is_empty() {
        return Some(0);
    }
    let fitting = ranges.iter().filter(|range| range.contains(address));
    fitting
        .map(|range| 1 + usize::from(range.prefix_len()))
        .max()
}

/// The whole name fits better than the end of it, and a longer end better than a shorter one.
fn server_name(wanted: &[String], name: &str) -> Fit {
    if wanted.is_empty() {
        return Some(0);
    }
    let fit = |wanted: &String| {
        if wanted == name {
            return Some(usize::MAX);
        }
        // Something must stand before the end.
        let ends =
            wanted.starts_with('.') && name.len() > wanted.len() && name.ends_with(wanted.as_str());
        ends.then_some(wanted.len())
    };
    wanted.iter().filter_map(fit).max()
}

fn transport(wanted: &str, protocol: &str) -> Fit {
    if wanted.is_empty() {
        return Some(0);
    }
    (wanted == protocol).then_some(1)
}

/// What the client named first fits best.
fn protocol(wanted: &[String], offered: &[String]) -> Fit {
    if wanted.is_empty() {
        return Some(0);
    }
    let first = offered.iter().position(|name| wanted.contains(name))?;
    Some(usize::MAX - first)
}

fn source_type(wanted: SourceType, local: IpAddr, remote: IpAddr) -> Fit {
    let here = remote.is_loopback() || remote == local;
    match wanted {
        SourceType::Any => Some(0),
        SourceType::SameIpOrLoopback => here.then_some(1),
        SourceType::External => (!here).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use outrigger_filters::end_address::EndAddress;

    fn seen(local: &str, remote: &str) -> Seen {
        let end = |text: &str| EndAddress::Ip(text.parse().unwrap());
        Seen::new(end(local), end(remote))
    }

    fn ranges(texts: &[&str]) -> Vec<CidrRange> {
        let read = |text: &&str| {
            let (address, length) = text.split_once('/').unwrap();
            CidrRange::new(address.parse().unwrap(), length.parse().unwrap())
        };
        texts.iter().map(read).collect()
    }

    fn names(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    fn any() -> FilterChainMatch {
        FilterChainMatch::default()
    }

    fn found(chains: &[FilterChainMatch], seen: &Seen) -> Option<usize> {
        let found = find(chains, |chain| chain, seen)?;
        chains.iter().position(|chain| std::ptr::eq(chain, found))
    }

    #[test]
    fn the_port_comes_before_all_else_and_there_is_no_way_back() {
        let chains = [
            FilterChainMatch {
                destination_port: Some(80),
                server_names: names(&["a.test"]),
                ..any()
            },
            any(),
        ];
        let mut here = seen("10.0.0.1:80", "10.0.0.2:5000");
        here.server_name = "a.test".into();
        assert_eq!(found(&chains, &here), Some(0));
        // As in Envoy: the chains of this port do not fit, so no chain does.
        here.server_name = "b.test".into();
        assert_eq!(found(&chains, &here), None);
        assert_eq!(
            found(&chains, &seen("10.0.0.1:81", "10.0.0.2:5000")),
            Some(1)
        );
    }

    #[test]
    fn the_longest_prefix_wins() {
        let to = |texts: &[&str]| FilterChainMatch {
            prefix_ranges: ranges(texts),
            ..any()
        };
        let chains = [
            any(),
            to(&["10.0.0.0/8", "0.0.0.0/0"]),
            to(&["10.1.0.0/16"]),
        ];
        for (local, want) in [("10.1.2.3:1", 2), ("10.2.2.3:1", 1), ("9.9.9.9:1", 1)] {
            assert_eq!(
                found(&chains, &seen(local, "1.1.1.1:1")),
                Some(want),
                "{local}"
            );
        }
        assert_eq!(found(&chains, &seen("[::1]:1", "[::1]:1")), Some(0));
    }

    #[test]
    fn names_fit_whole_then_by_their_longest_end() {
        let named = |texts: &[&str]| FilterChainMatch {
            server_names: names(texts),
            ..any()
        };
        let chains = [
            named(&["www.a.test"]),
            named(&[".a.test"]),
            named(&[".test"]),
        ];
        for (name, want) in [
            ("www.a.test", Some(0)),
            ("x.a.test", Some(1)),
            ("y.x.a.test", Some(1)),
            ("a.test", Some(2)),
            ("test", None),
            ("", None),
        ] {
            let mut here = seen("1.1.1.1:1", "2.2.2.2:2");
            here.server_name = name.into();
            assert_eq!(found(&chains, &here), want, "{name}");
        }
    }

    #[test]
    fn protocols_and_sources_are_told_apart() {
        let tls = FilterChainMatch {
            transport_protocol: "tls".into(),
            ..any()
        };
        let istio = FilterChainMatch {
            transport_protocol: "tls".into(),
            application_protocols: names(&["istio"]),
            ..any()
        };
        let raw = FilterChainMatch {
            transport_protocol: "raw_buffer".into(),
            ..any()
        };
        let chains = [tls, istio, raw];
        let mut here = seen("1.1.1.1:1", "2.2.2.2:2");
        assert_eq!(found(&chains, &here), Some(2));
        here.is_tls = true;
        assert_eq!(found(&chains, &here), Some(0));
        here.application_protocols = names(&["h2", "istio"]);
        assert_eq!(found(&chains, &here), Some(1));

        let from = |source_type, ports: &[u16], prefixes: &[&str]| FilterChainMatch {
            source_type,
            source_ports: ports.to_vec(),
            source_prefix_ranges: ranges(prefixes),
            ..any()
        };
        let chains = [
            from(SourceType::SameIpOrLoopback, &[], &[]),
            from(SourceType::External, &[], &["2.0.0.0/8"]),
            from(SourceType::External, &[7], &["2.0.0.0/8"]),
            from(SourceType::Any, &[], &[]),
        ];
        for (remote, want) in [
            ("127.0.0.1:5", Some(0)),
            ("1.1.1.1:5", Some(0)),
            ("2.2.2.2:5", Some(1)),
            ("2.2.2.2:7", Some(2)),
            ("3.3.3.3:7", None),
        ] {
            assert_eq!(found(&chains, &seen("1.1.1.1:1", remote)), want, "{remote}");
        }
    }

    #[test]
    fn whoever_is_at_the_other_end_may_be_another_than_the_client() {
        let chains = [
            FilterChainMatch {
                direct_source_prefix_ranges: ranges(&["10.0.0.0/8"]),
                ..any()
            },
            FilterChainMatch {
                source_prefix_ranges: ranges(&["192.168.0.0/16"]),
                ..any()
            },
        ];
        let mut here = seen("1.1.1.1:1", "192.168.1.1:2");
        assert_eq!(found(&chains, &here), Some(1));
        here.direct_remote = EndAddress::Ip("10.0.0.9:3".parse().unwrap());
        assert_eq!(found(&chains, &here), Some(0));
    }
}
