//! The TLS contexts in use, by listener and by cluster: kept for as long as they are configured the same, and renewed
//! when what they are made of changes.

use super::{certificate::Certificate, client::Client, material::Find, provider, server::Server};
use outrigger_filters::endpoints::Secured;
use outrigger_xds::resource::{cluster::Cluster, filter_chain::FilterChain, tls::UpstreamTls};
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Those of listeners, each with all of its chains.
pub(crate) type Servers = BTreeMap<String, Vec<Arc<Server>>>;

/// All of them.
#[derive(Default, Clone)]
pub(crate) struct Contexts {
    servers: Servers,
    clients: BTreeMap<String, Sockets>,
}

/// How the endpoints of a cluster are secured: as [`Cluster::sockets`] orders them; none is plain text.
pub(crate) type Sockets = Vec<Option<Secured>>;

impl Contexts {
    /// How connections of a chain begin: a context that its listener has in use if it says the same, else a new one.
    ///
    /// # Errors
    /// What is wrong with it, its files or its secrets.
    pub(crate) fn server(
        &self,
        listener: &str,
        chain: &FilterChain,
        find: Find<'_>,
    ) -> Result<Option<Arc<Server>>, String> {
        let Some(tls) = &chain.tls else {
            return Ok(None);
        };
        let limit = chain.connect_timeout;
        let mut known = self.servers.get(listener).into_iter().flatten();
        if let Some(known) = known.find(|known| known.is(tls, limit)) {
            return Ok(Some(known.clone()));
        }
        // Also where its secrets are still to come: who sent it is told now.
        let server = provider(&tls.common.params)
            .and_then(|_| Server::new(tls, limit, find))
            .map_err(|error| format!("listener '{listener}': transport_socket: {error}"))?;
        Ok(Some(Arc::new(server)))
    }

    /// How connections to a cluster are secured: for each of its sockets the context in use if it says the same, and
    /// with it its connections, else a new one.
    ///
    /// # Errors
    /// What is wrong with it, its files or its secrets.
    pub(crate) fn client(&self, cluster: &Cluster, find: Find<'_>) -> Result<Sockets, String> {
        let name = &cluster.name;
        let known = self.clients.get(name);
        let secured = |tls: &UpstreamTls| {
            let mut known = known.into_iter().flatten().flatten();
            let same = known
                .find(|secured| Client::of(secured).is_some_and(|client| client.is(tls)))
                .cloned();
            let made = || {
                provider(&tls.common.params)?;
                Client::new(tls, find).map(Client::secured)
            };
            same.map_or_else(made, Ok)
        };
        cluster
            .sockets()
            .map(|tls| tls.map(secured).transpose())
            .collect::<Result<_, _>>()
            .map_err(|error| format!("cluster '{name}': transport_socket: {error}"))
    }

    /// How the endpoints of clusters are secured, by cluster.
    pub(crate) fn clients(&self) -> &BTreeMap<String, Sockets> {
        &self.clients
    }

    /// These are in use from now on, by listener.
    pub(crate) fn keep_servers(&mut self, servers: Servers) {
        self.servers = servers;
    }

    /// These are in use from now on, by cluster.
    pub(crate) fn keep_clients(&mut self, clients: BTreeMap<String, Sockets>) {
        self.clients = clients;
    }

    /// Builds those anew whose files or secrets hold something else; one that cannot be stays as it was.
    pub(crate) fn renew(&self, find: Find<'_>) {
        for (name, servers) in &self.servers {
            for server in servers {
                count("listener", name, server.renew(find));
            }
        }
        for (name, sockets) in &self.clients {
            for client in sockets.iter().flatten().filter_map(Client::of) {
                count("cluster", name, client.renew(find));
            }
        }
    }

    /// All files whose change may change one of them.
    pub(crate) fn files(&self) -> BTreeSet<String> {
        let servers = self
            .servers
            .values()
            .flatten()
            .map(|server| server.material().files());
        let clients = self.clients.values().flatten().flatten();
        let clients = clients.filter_map(Client::of);
        let clients = clients.map(|client| client.material().files());
        servers.chain(clients).flatten().collect()
    }

    /// Envoy's `/certs`: one entry a context.
    pub(crate) fn to_json(&self) -> Value {
        let show = |certificates: Vec<Certificate>| {
            let shown = certificates.iter().map(Certificate::to_json);
            shown.collect::<Vec<_>>()
        };
        let entries = self
            .all()
            .into_iter()
            .map(|(ours, theirs)| json!({ "ca_cert": show(theirs), "cert_chain": show(ours) }));
        json!({ "certificates": entries.collect::<Vec<_>>() })
    }

    fn all(&self) -> Vec<(Vec<Certificate>, Vec<Certificate>)> {
        let servers = self.servers.values().flatten();
        let servers = servers.map(|server| server.material().certificates());
        let clients = self.clients.values().flatten().flatten();
        let clients = clients.filter_map(Client::of);
        let clients = clients.map(|client| client.material().certificates());
        servers.chain(clients).collect()
    }

    /// `server.days_until_first_cert_expiring`.
    pub(crate) fn count_days(&self) {
        let all = self.all();
        let each = all
            .iter()
            .flat_map(|(ours, theirs)| ours.iter().chain(theirs));
        if let Some(days) = each.map(Certificate::days_left).min() {
            metrics::gauge!("envoy_server_days_until_first_cert_expiring").set(days as f64);
        }
    }
}

fn count(of: &'static str, name: &str, renewed: Result<bool, String>) {
    match renewed {
        Ok(false) => {}
        Ok(true) => {
            tracing::info!(name, "{of}: TLS certificates renewed");
            metrics::counter!("outrigger_tls_renewals_total", "of" => of, "name" => name.to_owned())
                .increment(1);
        }
        Err(error) => {
            tracing::warn!(name, %error, "{of}: new TLS certificates cannot be used, the old ones stay");
            metrics::counter!("outrigger_tls_renewal_failures_total", "of" => of, "name" => name.to_owned())
                .increment(1);
        }
    }
}
