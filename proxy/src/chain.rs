//! Building the filter chain of each route: the connection manager's filters, with the route's own configuration.

use outrigger_filters::{
    body::RequestBody,
    error::{Error, Flag, Origin},
    filter::{Chain, Context, Handled, HttpFilter as Filter, Next},
    local_reply::{self, Shape},
    openai, registry, router,
    runtime::Runtime,
    services::Services,
};
use outrigger_xds::resource::{listener::HttpFilter, route::TypedConfig};
use std::{collections::BTreeMap, future::ready, sync::Arc};

/// Envoy's wrapper that switches a filter off (or on) for a route.
const FILTER_CONFIG_URL: &str = "type.googleapis.com/envoy.config.route.v3.FilterConfig";
/// `%RESPONSE_CODE_DETAILS%` of an answer that a route itself gave.
pub const DIRECT_RESPONSE: &str = "direct_response";

/// Filter configuration of a route, or of what is around it, by filter name.
pub type Own = BTreeMap<String, TypedConfig>;

/// A route's chain, and what the connection manager must know of it.
#[derive(Clone)]
pub struct BuiltChain {
    /// The filters.
    pub filters: Chain,
    /// Whether `openai` is among them: then errors take OpenAI's form.
    pub openai: bool,
    /// Whether the router leaves out `x-envoy-*` headers.
    pub suppress_envoy_headers: bool,
}

/// Builds the chains of one connection manager. A filter that no route configures is the same one in all chains, so
/// that its limits are too; the router is each route's own.
pub struct Chains<'a> {
    filters: &'a [HttpFilter],
    services: &'a Services,
    shared: Vec<Option<Arc<dyn Filter>>>,
}

impl<'a> Chains<'a> {
    /// Nothing built yet.
    #[must_use]
    pub fn new(filters: &'a [HttpFilter], services: &'a Services) -> Self {
        Self {
            filters,
            services,
            shared: vec![None; filters.len()],
        }
    }

    /// What may change shares of requests.
    #[must_use]
    pub fn runtime(&self) -> &'a Runtime {
        &self.services.runtime
    }

    /// The chain of a route; `own` is its filter configuration, then that of what is around it.
    ///
    /// # Errors
    /// A filter is unknown (and not optional) or refuses its configuration; the text names it.
    pub fn route(&mut self, own: &[&Own]) -> Result<BuiltChain, String> {
        let mut built = Vec::with_capacity(self.filters.len());
        let mut openai = false;
        let mut suppress_envoy_headers = false;
        let mut before: Vec<&str> = Vec::new();
        let mut lacks = false;
        for index in 0..self.filters.len() {
            if let Some(filter) = self.filter(index, own)? {
                let type_url = &self.filters[index].config.type_url;
                lacks |= self.filters[index].is_missing();
                let needed = registry::find(type_url).and_then(|known| known.after);
                // Where one is missing, no request comes any further.
                let needed = needed.filter(|_| !lacks);
                if let Some(needed) = needed.filter(|needed| !before.contains(needed)) {
                    let name = &self.filters[index].name;
                    return Err(format!("http_filters[{name}]: needs '{needed}' before it"));
                }
                before.push(type_url);
                openai |= type_url == openai::TYPE_URL;
                if type_url == router::TYPE_URL {
                    let config = &self.filters[index].config.value;
                    let config = registry::parse::<router::Config>(config)?;
                    suppress_envoy_headers = config.suppress_envoy_headers;
                }
                built.push(filter);
            }
        }
        for name in own.iter().flat_map(|own| own.keys()) {
            if !self.filters.iter().any(|filter| filter.name == *name) {
                return Err(format!(
                    "typed_per_filter_config[{name}]: no such filter in the chain"
                ));
            }
        }
        Ok(BuiltChain {
            filters: Arc::from(built),
            openai,
            suppress_envoy_headers,
        })
    }

    /// What requests pass that need no upstream, with `last` at its end; empty if no filter sees them.
    ///
    /// # Errors
    /// As [`Self::route`].
    pub fn nowhere(&mut self, own: &[&Own], last: Arc<dyn Filter>) -> Result<Chain, String> {
        let mut built = Vec::new();
        for index in 0..self.filters.len() {
            let registration = registry::find(&self.filters[index].config.type_url);
            let sees_all = registration.is_some_and(|registration| registration.sees_all);
            if sees_all || self.filters[index].is_missing() {
                built.extend(self.filter(index, own)?);
            }
        }
        if !built.is_empty() {
            built.push(last);
        }
        Ok(Arc::from(built))
    }

    fn filter(&mut self, index: usize, own: &[&Own]) -> Result<Option<Arc<dyn Filter>>, String> {
        let filter = &self.filters[index];
        let name = &filter.name;
        let located = |error| format!("http_filters[{name}]: {error}");
        let Some(own) = effective(filter, own).map_err(located)? else {
            return Ok(None);
        };
        if filter.is_missing() {
            return Ok(Some(Arc::new(NoFilterConfig)));
        }
        let registration = registry::find(&filter.config.type_url);
        if filter.is_optional && registration.is_none() {
            tracing::info!(
                filter = filter.name,
                type_url = filter.config.type_url,
                "optional filter is unknown, left out"
            );
            return Ok(None);
        }
        let shared = own.is_empty() && registration.is_some_and(|known| !known.terminal);
        if let Some(known) = self.shared[index].as_ref().filter(|_| shared) {
            return Ok(Some(known.clone()));
        }
        let built = registry::build(&filter.config, &own, self.services).map_err(located)?;
        if shared {
            self.shared[index] = Some(built.clone());
        }
        Ok(Some(built))
    }
}

/// What a route and what is around it say of a filter, most specific first; `None` if it is not in that chain.
fn effective(filter: &HttpFilter, own: &[&Own]) -> Result<Option<Vec<TypedConfig>>, String> {
    let mut disabled = filter.disabled;
    let mut said = Vec::new();
    let levels = own.iter().filter_map(|own| own.get(&filter.name));
    for (index, config) in levels.enumerate() {
        let (off, config) = unwrap(config)?;
        if index == 0 {
            disabled = off;
        }
        said.extend(config);
    }
    Ok((!disabled).then_some(said))
}

/// Whether the filter is off there, and its configuration without `FilterConfig` around it.
fn unwrap(own: &TypedConfig) -> Result<(bool, Option<TypedConfig>), String> {
    if own.type_url != FILTER_CONFIG_URL {
        return Ok((false, Some(own.clone())));
    }
    let is_set =
        |field: &str| own.value.get(field).and_then(serde_json::Value::as_bool) == Some(true);
    let inner = own
        .value
        .get("config")
        .map(TypedConfig::from_json)
        .transpose()
        .map_err(|error| error.to_string())?;
    let unknown =
        |inner: &TypedConfig| is_set("is_optional") && !registry::is_known(&inner.type_url);
    Ok((is_set("disabled"), inner.filter(|inner| !unknown(inner))))
}

/// Ends a chain that needs no upstream with a route's own answer.
pub struct Direct {
    /// Status.
    pub status: http::StatusCode,
    /// Body.
    pub body: String,
    /// Whether errors take OpenAI's form.
    pub openai: bool,
}

impl Filter for Direct {
    fn handle<'a>(
        &'a self,
        request: http::Request<RequestBody>,
        context: &'a mut Context,
        _next: Next<'a>,
    ) -> Handled<'a> {
        let shape = Shape::of(request.uri().path(), request.headers(), self.openai);
        context.log.details = DIRECT_RESPONSE.into();
        Box::pin(ready(Ok(local_reply::direct(
            self.status,
            &self.body,
            shape,
        ))))
    }
}

/// Stands for a filter whose configuration is missing, and lets nothing through.
pub struct NoFilterConfig;

impl Filter for NoFilterConfig {
    /// Envoy's answer.
    fn handle<'a>(
        &'a self,
        _request: http::Request<RequestBody>,
        _context: &'a mut Context,
        _next: Next<'a>,
    ) -> Handled<'a> {
        let status = http::StatusCode::INTERNAL_SERVER_ERROR;
        let flag = Flag::NoFilterConfigFound;
        Box::pin(ready(Err(Error::new(Origin::Proxy, flag, status, "", ""))))
    }
}

/// What is wrong with what filters may become, in Envoy's words.
#[must_use]
pub fn check_discovery(filters: &[HttpFilter]) -> Vec<String> {
    let each = filters
        .iter()
        .filter_map(|filter| Some((&filter.name, filter.discovery.as_ref()?)));
    let listed = each.flat_map(|(name, from)| from.type_urls.iter().map(move |url| (name, url)));
    let unknown = listed.filter(|(_, url)| registry::find(url).is_none());
    unknown
        .map(|(name, url)| {
            format!("http_filters[{name}].config_discovery.type_urls: no factory found for a required type URL {url}")
        })
        .collect()
}

/// Ends the chain of requests that no route matches.
pub struct NoRoute;

impl NoRoute {
    /// Envoy's answer.
    #[must_use]
    pub fn error() -> Error {
        Error::new(
            Origin::Downstream,
            Flag::NoRouteFound,
            http::StatusCode::NOT_FOUND,
            "route_not_found",
            "",
        )
    }
}

impl Filter for NoRoute {
    fn handle<'a>(
        &'a self,
        _request: http::Request<RequestBody>,
        _context: &'a mut Context,
        _next: Next<'a>,
    ) -> Handled<'a> {
        Box::pin(ready(Err(Self::error())))
    }
}
