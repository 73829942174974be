//! Where a cluster's endpoints come from: `type` and `cluster_type`, with their settings.

use crate::{
    problems::{ConfigErrors, join},
    protobuf::{duration, to_duration, unpack},
    wire::envoy::{
        config::cluster::v3 as wire,
        extensions::clusters::{common::dns::v3::DnsLookupFamily as Family, dns::v3 as dns},
    },
};
use std::{net::SocketAddr, time::Duration};
use wire::cluster::{ClusterDiscoveryType, DiscoveryType, DnsLookupFamily};

/// Between lookups unless configured.
const REFRESH_RATE: Duration = Duration::from_secs(5);
/// Shortest time between lookups.
const REFRESH_RATE_MIN: Duration = Duration::from_millis(1);
/// Until an endpoint of `ORIGINAL_DST` that nobody uses goes, unless configured.
const CLEANUP_INTERVAL: Duration = Duration::from_secs(5);
/// What may say where to, unless configured.
const ORIGINAL_DST_HEADER: &str = "x-envoy-original-dst-host";

/// Where endpoints come from.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Discovery {
    /// `STATIC`: they are written in the cluster.
    #[default]
    Static,
    /// `STRICT_DNS`, `LOGICAL_DNS`: names written there are looked up.
    Dns(Dns),
    /// `EDS`: they come from elsewhere.
    Eds,
    /// `ORIGINAL_DST`: each is where some connection, or request, was meant to go.
    OriginalDst(OriginalDst),
}

/// How `ORIGINAL_DST` finds out where to.
#[derive(Debug, Clone, PartialEq)]
pub struct OriginalDst {
    /// A request header that may say it.
    pub header: Option<String>,
    /// Instead of the port that was found.
    pub port: Option<u16>,
    /// Endpoints that nobody used for so long go.
    pub cleanup_interval: Duration,
}

impl OriginalDst {
    /// Where what was meant for `found` goes.
    #[must_use]
    pub fn at(&self, found: SocketAddr) -> SocketAddr {
        SocketAddr::new(found.ip(), self.port.unwrap_or(found.port()))
    }
}

/// How names are looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct Dns {
    /// `LOGICAL_DNS`: the first address is the one endpoint; else each is one.
    pub logical: bool,
    /// Between lookups.
    pub refresh_rate: Duration,
    /// After failures: the shortest time, and the longest.
    pub failure_refresh_rate: Option<(Duration, Duration)>,
    /// After a success the time that its answer is good for counts instead of `refresh_rate`.
    pub respect_ttl: bool,
    /// Which addresses count.
    pub family: LookupFamily,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            logical: false,
            refresh_rate: REFRESH_RATE,
            failure_refresh_rate: None,
            respect_ttl: false,
            family: LookupFamily::Auto,
        }
    }
}

/// `DnsLookupFamily`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LookupFamily {
    /// IPv6 if there is any, else IPv4.
    #[default]
    Auto,
    /// IPv4.
    V4Only,
    /// IPv6.
    V6Only,
    /// IPv4 if there is any, else IPv6.
    V4Preferred,
    /// All.
    All,
}

/// What a cluster says of discovery.
pub(super) struct Given {
    pub(super) of: Option<ClusterDiscoveryType>,
    pub(super) refresh_rate: Option<prost_types::Duration>,
    pub(super) failure_refresh_rate: Option<wire::cluster::RefreshRate>,
    pub(super) respect_ttl: bool,
    pub(super) family: DnsLookupFamily,
    pub(super) original_dst: Option<wire::cluster::OriginalDstLbConfig>,
    pub(super) cleanup_interval: Option<prost_types::Duration>,
}

/// Reads all of it; `None` if it is of a kind that is not known here.
pub(super) fn read(problems: &mut ConfigErrors, given: Given) -> Option<Discovery> {
    let number = match given.of {
        None => 0,
        Some(ClusterDiscoveryType::Type(number)) => number,
        Some(ClusterDiscoveryType::ClusterType(custom)) => return custom_type(problems, custom),
    };
    let is_original = DiscoveryType::try_from(number) == Ok(DiscoveryType::OriginalDst);
    if given.original_dst.is_some() && !is_original {
        let message = "only in a cluster of type ORIGINAL_DST";
        problems.add("original_dst_lb_config", message);
    }
    let dns = |problems: &mut ConfigErrors, logical| {
        let failure = given
            .failure_refresh_rate
            .map(|rate| (rate.base_interval, rate.max_interval));
        let (refresh_rate, failure_refresh_rate) = rates(problems, "", given.refresh_rate, failure);
        Some(Discovery::Dns(Dns {
            logical,
            refresh_rate,
            failure_refresh_rate,
            respect_ttl: given.respect_ttl,
            family: match given.family {
                DnsLookupFamily::Auto => LookupFamily::Auto,
                DnsLookupFamily::V4Only => LookupFamily::V4Only,
                DnsLookupFamily::V6Only => LookupFamily::V6Only,
                DnsLookupFamily::V4Preferred => LookupFamily::V4Preferred,
                DnsLookupFamily::All => LookupFamily::All,
            },
        }))
    };
    match DiscoveryType::try_from(number) {
        Ok(DiscoveryType::Static) => Some(Discovery::Static),
        Ok(DiscoveryType::Eds) => Some(Discovery::Eds),
        Ok(DiscoveryType::StrictDns) => dns(problems, false),
        Ok(DiscoveryType::LogicalDns) => dns(problems, true),
        Ok(DiscoveryType::OriginalDst) => {
            let config = given.original_dst.unwrap_or_default();
            Some(Discovery::OriginalDst(original_dst(
                problems,
                &config,
                given.cleanup_interval,
            )))
        }
        Err(_) => {
            problems.add("type", format!("unknown value {number}"));
            None
        }
    }
}

fn original_dst(
    problems: &mut ConfigErrors,
    config: &wire::cluster::OriginalDstLbConfig,
    cleanup: Option<Wire>,
) -> OriginalDst {
    let name = match config.http_header_name.to_ascii_lowercase() {
        unsaid if unsaid.is_empty() => ORIGINAL_DST_HEADER.to_owned(),
        said => said,
    };
    if http::HeaderName::try_from(&name).is_err() {
        let place = "original_dst_lb_config.http_header_name";
        problems.add(place, format!("'{name}' is no header name"));
    }
    let port = config.upstream_port_override.and_then(|port| {
        let place = "original_dst_lb_config.upstream_port_override";
        let fits = u16::try_from(port).ok();
        if fits.is_none() {
            problems.add(place, format!("must be at most 65535, is {port}"));
        }
        fits
    });
    let cleanup = cleanup.map(|time| {
        let time = problems.take("cleanup_interval", duration(time));
        let time = time.unwrap_or_default();
        if time.is_zero() {
            problems.add("cleanup_interval", "must be greater than 0");
        }
        time
    });
    OriginalDst {
        header: config.use_http_header.then_some(name),
        port,
        cleanup_interval: cleanup.unwrap_or(CLEANUP_INTERVAL),
    }
}

fn show_original_dst(plain: &OriginalDst, of: Given) -> Given {
    let header = plain.header.as_deref();
    let named = header.filter(|name| *name != ORIGINAL_DST_HEADER);
    Given {
        original_dst: Some(wire::cluster::OriginalDstLbConfig {
            use_http_header: header.is_some(),
            http_header_name: named.unwrap_or_default().to_owned(),
            upstream_port_override: plain.port.map(Into::into),
        }),
        cleanup_interval: (plain.cleanup_interval != CLEANUP_INTERVAL)
            .then(|| to_duration(plain.cleanup_interval)),
        ..of
    }
}

fn custom_type(
    problems: &mut ConfigErrors,
    custom: wire::cluster::CustomClusterType,
) -> Option<Discovery> {
    let place = "cluster_type.typed_config";
    let any = custom.typed_config.unwrap_or_default();
    let Some(config) = problems.take(place, unpack::<dns::DnsCluster>(&any))? else {
        let message = format!("not supported yet: {} ({})", custom.name, any.type_url);
        problems.add("cluster_type", message);
        return None;
    };
    let family = match config.dns_lookup_family() {
        Family::Unspecified | Family::Auto => LookupFamily::Auto,
        Family::V4Only => LookupFamily::V4Only,
        Family::V6Only => LookupFamily::V6Only,
        Family::V4Preferred => LookupFamily::V4Preferred,
        Family::All => LookupFamily::All,
    };
    let failure = config
        .dns_failure_refresh_rate
        .map(|rate| (rate.base_interval, rate.max_interval));
    let (refresh_rate, failure_refresh_rate) =
        rates(problems, place, config.dns_refresh_rate, failure);
    Some(Discovery::Dns(Dns {
        logical: config.all_addresses_in_single_endpoint,
        refresh_rate,
        failure_refresh_rate,
        respect_ttl: config.respect_dns_ttl,
        family,
    }))
}

type Wire = prost_types::Duration;

fn rates(
    problems: &mut ConfigErrors,
    place: &str,
    refresh: Option<Wire>,
    failure: Option<(Option<Wire>, Option<Wire>)>,
) -> (Duration, Option<(Duration, Duration)>) {
    let mut read = |field: &str, given: Wire| {
        let place = join(place, field);
        let rate = problems.take(&place, duration(given)).unwrap_or_default();
        if rate < REFRESH_RATE_MIN {
            problems.add(place, "must be at least 0.001s");
        }
        rate
    };
    let refresh_rate = refresh.map_or(REFRESH_RATE, |rate| read("dns_refresh_rate", rate));
    let Some((base, max)) = failure else {
        return (refresh_rate, None);
    };
    let Some(base) = base else {
        let place = join(place, "dns_failure_refresh_rate.base_interval");
        problems.add(place, "required");
        return (refresh_rate, None);
    };
    let base = read("dns_failure_refresh_rate.base_interval", base);
    let max = max.map_or(base * 10, |max| {
        read("dns_failure_refresh_rate.max_interval", max)
    });
    if max < base {
        let place = join(place, "dns_failure_refresh_rate");
        problems.add(place, "max_interval is less than base_interval");
    }
    (refresh_rate, Some((base, max)))
}

/// How a cluster shows its discovery, if it has names that are looked up or, where `named`, only at each connection.
pub(super) fn show(plain: &Discovery, named: bool) -> Given {
    let of = |of: DiscoveryType| Given {
        of: Some(ClusterDiscoveryType::Type(of.into())),
        refresh_rate: None,
        failure_refresh_rate: None,
        respect_ttl: false,
        family: DnsLookupFamily::Auto,
        original_dst: None,
        cleanup_interval: None,
    };
    let dns = match plain {
        Discovery::Static if named => return of(DiscoveryType::StrictDns),
        Discovery::Static => return of(DiscoveryType::Static),
        Discovery::Eds => return of(DiscoveryType::Eds),
        Discovery::OriginalDst(plain) => {
            return show_original_dst(plain, of(DiscoveryType::OriginalDst));
        }
        Discovery::Dns(dns) => dns,
    };
    let refresh_rate = (dns.refresh_rate != REFRESH_RATE).then(|| to_duration(dns.refresh_rate));
    let failure = dns.failure_refresh_rate;
    let family = match dns.family {
        LookupFamily::Auto => DnsLookupFamily::Auto,
        LookupFamily::V4Only => DnsLookupFamily::V4Only,
        LookupFamily::V6Only => DnsLookupFamily::V6Only,
        LookupFamily::V4Preferred => DnsLookupFamily::V4Preferred,
        LookupFamily::All => DnsLookupFamily::All,
    };
    Given {
        refresh_rate,
        failure_refresh_rate: failure.map(|(base, max)| wire::cluster::RefreshRate {
            base_interval: Some(to_duration(base)),
            max_interval: Some(to_duration(max)),
        }),
        respect_ttl: dns.respect_ttl,
        family,
        ..of(if dns.logical {
            DiscoveryType::LogicalDns
        } else {
            DiscoveryType::StrictDns
        })
    }
}
