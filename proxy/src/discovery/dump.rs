//! `/config_dump`: what is written and what came, in Envoy's shapes, with what was refused beside what is in effect.

use super::{Discovery, model::Kind};
use crate::access_log::rfc3339;
use outrigger_xds::{
    accepted::{Accepted, Failure, Good},
    csds::Outcome,
    load::{self, discovery::Resource},
    resource::{cluster::Cluster, config_source::Origin, listener::Listener, secret::Secret},
};
use serde_json::{Map, Value, json};

fn type_url(message: &str) -> String {
    format!("type.googleapis.com/envoy.admin.v3.{message}")
}

/// `UpdateFailureState`.
fn failure(failed: &Failure) -> Value {
    let mut shown = json!({
        "last_update_attempt": rfc3339(failed.at),
        "details": failed.details,
        "version_info": failed.version,
    });
    if !failed.configuration.is_null() {
        shown["failed_configuration"] = redacted(failed.configuration.clone());
    }
    shown
}

/// What was refused is shown as it was written, but for keys.
fn redacted(mut configuration: Value) -> Value {
    match &mut configuration {
        Value::Object(fields) => {
            for (name, value) in fields.iter_mut() {
                let is_key = matches!(name.as_str(), "private_key" | "privateKey" | "password");
                *value = if is_key {
                    json!("[redacted]")
                } else {
                    redacted(value.take())
                };
            }
        }
        Value::Array(list) => list
            .iter_mut()
            .for_each(|value| *value = redacted(value.take())),
        _ => {}
    }
    configuration
}

fn entry<R: Resource>(key: &str, good: &Good<R>) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("version_info".into(), json!(good.version));
    fields.insert(key.into(), good.resource.to_json());
    fields.insert("last_updated".into(), json!(rfc3339(good.at)));
    fields
}

/// `client_status`, and `error_state` if something is wrong.
fn tell(fields: &mut Map<String, Value>, (outcome, error): (Outcome, Option<&Failure>)) {
    fields.insert("client_status".into(), json!(outcome.as_str()));
    if let Some(failed) = error {
        fields.insert("error_state".into(), failure(failed));
    }
}

impl Discovery {
    /// Entries of a section: what is in effect, and what is not with its error.
    fn entries<R: Resource + PartialEq>(
        &self,
        (kind, origin): (Kind, &Origin),
        key: &str,
        accepted: &Accepted<R>,
    ) -> Vec<Value> {
        let each = accepted.states().map(|(name, state)| {
            let mut fields = match &state.good {
                Some(good) => entry(key, good),
                None => Map::from_iter([("name".to_owned(), json!(name))]),
            };
            tell(&mut fields, self.fate((kind, origin), name, state));
            Value::Object(fields)
        });
        each.collect()
    }

    /// The answer to `/config_dump`.
    #[must_use]
    pub fn dump(&self, with_endpoints: bool) -> Value {
        let since = rfc3339(self.since);
        let mut dump = load::config_dump(&self.model.bootstrap, "", &since);
        let Some(sections) = dump["configs"].as_array_mut() else {
            return dump;
        };
        for section in sections.iter_mut() {
            match section["@type"].as_str().unwrap_or_default() {
                name if name.ends_with(".ClustersConfigDump") => self.dump_clusters(section),
                name if name.ends_with(".ListenersConfigDump") => self.dump_listeners(section),
                name if name.ends_with(".RoutesConfigDump") => self.dump_routes(section),
                _ => {}
            }
        }
        if with_endpoints {
            sections.insert(2.min(sections.len()), self.dump_endpoints());
        }
        sections.push(self.dump_secrets(&since));
        sections.push(self.dump_extensions());
        dump
    }

    fn dump_clusters(&self, section: &mut Value) {
        let (mut active, mut warming) = (Vec::new(), Vec::new());
        let about = (Kind::Clusters, self.model.origin_of_all(Kind::Clusters));
        for cluster in self.entries(about, "cluster", &self.model.clusters) {
            let name = cluster["cluster"]["name"].as_str().unwrap_or_default();
            let waits = self.warming_clusters.contains(name) || name.is_empty();
            if waits { &mut warming } else { &mut active }.push(cluster);
        }
        warming.extend(self.dump_absent(Kind::Clusters));
        section["version_info"] = json!(self.model.clusters.version());
        section["dynamic_active_clusters"] = json!(active);
        section["dynamic_warming_clusters"] = json!(warming);
    }

    fn dump_listeners(&self, section: &mut Value) {
        let origin = self.model.origin_of_all(Kind::Listeners);
        let each = self.model.listeners.states().map(|(name, state)| {
            let mut shown = Map::new();
            shown.insert("name".into(), json!(name));
            tell(
                &mut shown,
                self.fate((Kind::Listeners, origin), name, state),
            );
            if let Some(good) = &state.good {
                let stage = if self.warming_listeners.contains(name) {
                    "warming_state"
                } else {
                    "active_state"
                };
                shown.insert(
                    stage.into(),
                    Value::Object(entry::<Listener>("listener", good)),
                );
            }
            if let Some(error) = self.failed.get(name) {
                shown
                    .entry("error_state")
                    .or_insert_with(|| json!({ "details": error }));
            }
            Value::Object(shown)
        });
        section["version_info"] = json!(self.model.listeners.version());
        section["dynamic_listeners"] = each.chain(self.dump_absent(Kind::Listeners)).collect();
    }

    fn dump_routes(&self, section: &mut Value) {
        let tables = self.model.tables.iter();
        let mut dynamic: Vec<Value> = tables
            .flat_map(|(origin, accepted)| {
                self.entries((Kind::Routes, origin), "route_config", accepted)
            })
            .collect();
        dynamic.extend(self.dump_absent(Kind::Routes));
        let inline = self.model.listeners.good().flat_map(|good| {
            let all = good.resource.http_managers();
            let inline = all.filter(|http| http.rds.is_none());
            inline.map(|http| {
                json!({
                    "route_config": http.route_config.to_json(),
                    "last_updated": rfc3339(good.at),
                })
            })
        });
        if let Some(list) = section["static_route_configs"].as_array_mut() {
            list.extend(inline);
        }
        section["dynamic_route_configs"] = json!(dynamic);
    }

    fn dump_endpoints(&self) -> Value {
        let written = self.model.bootstrap.clusters.iter();
        let came = self.model.clusters.good().map(|good| &*good.resource);
        let inline = written.chain(came).filter(|cluster| cluster.eds.is_none());
        let show =
            |cluster: &Cluster| json!({ "endpoint_config": cluster.load_assignment.to_json() });
        let sets = self.model.assignments.iter();
        let dynamic = sets.flat_map(|(origin, accepted)| {
            self.entries((Kind::Endpoints, origin), "endpoint_config", accepted)
        });
        json!({
            "@type": type_url("EndpointsConfigDump"),
            "static_endpoint_configs": inline.map(show).collect::<Vec<_>>(),
            "dynamic_endpoint_configs": dynamic
                .chain(self.dump_absent(Kind::Endpoints))
                .collect::<Vec<_>>(),
        })
    }

    /// What of a type was asked for and is not there.
    fn dump_absent(&self, kind: Kind) -> impl Iterator<Item = Value> {
        let absent = self.absent(kind).into_iter();
        absent.map(|(name, outcome, error)| {
            let mut shown = Map::from_iter([("name".to_owned(), json!(name))]);
            tell(&mut shown, (outcome, error));
            Value::Object(shown)
        })
    }

    fn dump_extensions(&self) -> Value {
        let sets = self.model.extensions.iter();
        let came = sets.flat_map(|(origin, accepted)| {
            self.entries((Kind::Extensions, origin), "ecds_filter", accepted)
        });
        json!({
            "@type": type_url("EcdsConfigDump"),
            "ecds_filters": came.chain(self.dump_absent(Kind::Extensions)).collect::<Vec<_>>(),
        })
    }

    fn dump_secrets(&self, since: &str) -> Value {
        let written = self.model.bootstrap.secrets.iter();
        let written = written.map(|secret| {
            json!({ "name": secret.name, "last_updated": since, "secret": secret.to_json() })
        });
        let (mut active, mut warming) = (Vec::new(), Vec::new());
        for (origin, accepted) in &self.model.secrets {
            for (name, state) in accepted.states() {
                let mut shown = Map::from_iter([("name".to_owned(), json!(name))]);
                if let Some(good) = &state.good {
                    shown.extend(entry::<Secret>("secret", good));
                }
                tell(&mut shown, self.fate((Kind::Secrets, origin), name, state));
                let list = if state.good.is_some() {
                    &mut active
                } else {
                    &mut warming
                };
                list.push(Value::Object(shown));
            }
        }
        warming.extend(self.dump_absent(Kind::Secrets));
        json!({
            "@type": type_url("SecretsConfigDump"),
            "static_secrets": written.collect::<Vec<_>>(),
            "dynamic_active_secrets": active,
            "dynamic_warming_secrets": warming,
        })
    }
}
