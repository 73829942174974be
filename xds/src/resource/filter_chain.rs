//! `envoy.config.listener.v3.FilterChain`: what happens to the connections of a listener.

use super::{
    listener::HttpConnectionManager,
    tls::{self, DownstreamTls},
};
use crate::{
    problems::ConfigErrors,
    protobuf::{duration, unpack},
    wire::envoy::{
        config::listener::v3 as wire,
        extensions::filters::network::http_connection_manager::v3 as hcm,
    },
};
use std::time::Duration;

/// A filter chain.
pub(super) struct FilterChain {
    pub(super) http: HttpConnectionManager,
    pub(super) tls: Option<DownstreamTls>,
    pub(super) connect_timeout: Duration,
}

impl FilterChain {
    /// One chain of one network filter is all there is yet.
    pub(super) fn of(chains: Vec<wire::FilterChain>) -> Result<Self, ConfigErrors> {
        let [chain] =
            <[wire::FilterChain; 1]>::try_from(chains).map_err(|chains| match chains.len() {
                0 => ConfigErrors::one("", "required: one filter chain"),
                count => ConfigErrors::one("", format!("not supported yet: {count} filter chains")),
            })?;
        let mut problems = ConfigErrors::default();
        let http = problems.take("", connection_manager(chain.filters));
        let socket = chain.transport_socket;
        let tls = socket
            .and_then(|socket| problems.take("[0].transport_socket", tls::downstream(socket)));
        let limit = chain.transport_socket_connect_timeout;
        let connect_timeout = limit.and_then(|limit| {
            problems.take("[0].transport_socket_connect_timeout", duration(limit))
        });
        problems.finish(http.map(|http| Self {
            http,
            tls,
            connect_timeout: connect_timeout.unwrap_or_default(),
        }))
    }
}

fn connection_manager(filters: Vec<wire::Filter>) -> Result<HttpConnectionManager, ConfigErrors> {
    let [filter] =
        <[wire::Filter; 1]>::try_from(filters).map_err(|filters| match filters.len() {
            0 => ConfigErrors::one("[0].filters", "required: the HTTP connection manager"),
            count => ConfigErrors::one(
                "[0].filters",
                format!("not supported yet: {count} network filters"),
            ),
        })?;
    let mut problems = ConfigErrors::default();
    problems.not_empty("[0].filters[0].name", filter.name);
    let place = "[0].filters[0].typed_config";
    let Some(wire::filter::ConfigType::TypedConfig(any)) = filter.config_type else {
        problems.add("[0].filters[0]", "required: typed_config");
        return problems.finish(None);
    };
    let manager = match problems.take(place, unpack::<hcm::HttpConnectionManager>(&any)) {
        Some(Some(manager)) => problems.take(place, manager.try_into()),
        Some(None) => {
            problems.add(
                place,
                format!("not supported yet: {} as a network filter", any.type_url),
            );
            None
        }
        None => None,
    };
    problems.finish(manager)
}
