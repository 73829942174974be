//! Where a cluster's endpoints come from: `type` and `cluster_type`, with their settings.

use crate::{
    problems::{ConfigErrors, join},
    protobuf::{duration, to_duration, unpack},
    wire::envoy::{
        config::cluster::v3 as wire,
        extensions::clusters::{common::dns::v3::DnsLookupFamily as Family, dns::v3 as dns},
    },
};
use std::time::Duration;
use wire::cluster::{ClusterDiscoveryType, DiscoveryType, DnsLookupFamily};

/// Between lookups unless configured.
const REFRESH_RATE: Duration = Duration::from_secs(5);
/// Shortest time between lookups.
const REFRESH_RATE_MIN: Duration = Duration::from_millis(1);

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
    /// Which addresses count.
    pub family: LookupFamily,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            logical: false,
            refresh_rate: REFRESH_RATE,
            failure_refresh_rate: None,
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
    pub(super) family: DnsLookupFamily,
}

/// Reads all of it; `None` if it is of a kind that is not known here.
pub(super) fn read(problems: &mut ConfigErrors, given: Given) -> Option<Discovery> {
    let number = match given.of {
        None => 0,
        Some(ClusterDiscoveryType::Type(number)) => number,
        Some(ClusterDiscoveryType::ClusterType(custom)) => return custom_type(problems, custom),
    };
    let dns = |problems: &mut ConfigErrors, logical| {
        let failure = given
            .failure_refresh_rate
            .map(|rate| (rate.base_interval, rate.max_interval));
        let (refresh_rate, failure_refresh_rate) = rates(problems, "", given.refresh_rate, failure);
        Some(Discovery::Dns(Dns {
            logical,
            refresh_rate,
            failure_refresh_rate,
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
        Ok(other) => {
            let message = format!("not supported yet: {}", other.as_str_name());
            problems.add("type", message);
            None
        }
        Err(_) => {
            problems.add("type", format!("unknown value {number}"));
            None
        }
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
        family: DnsLookupFamily::Auto,
    };
    let dns = match plain {
        Discovery::Static if named => return of(DiscoveryType::StrictDns),
        Discovery::Static => return of(DiscoveryType::Static),
        Discovery::Eds => return of(DiscoveryType::Eds),
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
        family,
        ..of(if dns.logical {
            DiscoveryType::LogicalDns
        } else {
            DiscoveryType::StrictDns
        })
    }
}
