//! Resources that come while we run: a `DiscoveryResponse` as text, and each resource in it judged by itself.
//!
//! What nobody knows is counted and logged here, and not an error as it is in a bootstrap: a control plane may be
//! newer than we are. What Envoy has and we do not is refused by name all the same.

use super::{Syntax, judge, strict, walk::Walk};
use crate::{
    accepted::Candidate,
    problems::ConfigErrors,
    protobuf,
    resource::{
        cluster::Cluster, endpoint::ClusterLoadAssignment, extension::ExtensionConfig,
        listener::Listener, route::RouteConfiguration, runtime::Runtime, secret::Secret,
    },
    wire::envoy::{
        config::{
            cluster::v3::Cluster as WireCluster, core::v3::TypedExtensionConfig as WireExtension,
            endpoint::v3::ClusterLoadAssignment as WireAssignment,
            listener::v3::Listener as WireListener, route::v3::RouteConfiguration as WireRoutes,
        },
        extensions::transport_sockets::tls::v3::Secret as WireSecret,
        service::{discovery::v3::DiscoveryResponse, runtime::v3::Runtime as WireRuntime},
    },
};
use prost::{Message, Name};
use serde_json::{Value, json};

/// A type of resource that can come while we run.
pub trait Resource: Sized {
    /// Full name of its message.
    const TYPE: &'static str;

    /// From a message in JSON that fits.
    ///
    /// # Errors
    /// What is wrong with its meaning.
    fn from_json(value: &Value) -> Result<Self, ConfigErrors>;

    /// As the JSON of an `Any`.
    fn to_json(&self) -> Value;

    /// Its name.
    fn name(&self) -> &str;
}

macro_rules! resource {
    ($plain:ty, $wire:ty, $name:ident, $type:literal) => {
        impl Resource for $plain {
            const TYPE: &'static str = $type;

            fn from_json(value: &Value) -> Result<Self, ConfigErrors> {
                protobuf::plain::<$wire, $plain>(value)
            }

            fn to_json(&self) -> Value {
                typed(&<$wire>::from(self))
            }

            fn name(&self) -> &str {
                &self.$name
            }
        }
    };
}

resource!(
    Listener,
    WireListener,
    name,
    "envoy.config.listener.v3.Listener"
);
resource!(
    Cluster,
    WireCluster,
    name,
    "envoy.config.cluster.v3.Cluster"
);
resource!(
    ClusterLoadAssignment,
    WireAssignment,
    cluster_name,
    "envoy.config.endpoint.v3.ClusterLoadAssignment"
);
resource!(
    Secret,
    WireSecret,
    name,
    "envoy.extensions.transport_sockets.tls.v3.Secret"
);

resource!(
    ExtensionConfig,
    WireExtension,
    name,
    "envoy.config.core.v3.TypedExtensionConfig"
);

resource!(
    Runtime,
    WireRuntime,
    name,
    "envoy.service.runtime.v3.Runtime"
);

impl Resource for RouteConfiguration {
    const TYPE: &'static str = "envoy.config.route.v3.RouteConfiguration";

    /// Unless it says otherwise, its clusters may come later.
    fn from_json(value: &Value) -> Result<Self, ConfigErrors> {
        let said = ["validate_clusters", "validateClusters"].map(|key| value.get(key));
        let mut table = protobuf::plain::<WireRoutes, Self>(value)?;
        if said.iter().all(Option::is_none) {
            table.validate_clusters = false;
        }
        Ok(table)
    }

    fn to_json(&self) -> Value {
        typed(&WireRoutes::from(self))
    }

    fn name(&self) -> &str {
        &self.name
    }
}

/// A message as the JSON of an `Any`.
pub(super) fn typed<M: Message + Name>(message: &M) -> Value {
    let mut fields = serde_json::Map::new();
    let type_url = format!("type.googleapis.com/{}", M::full_name());
    fields.insert("@type".to_owned(), Value::String(type_url));
    if let Value::Object(own) = protobuf::to_json(message) {
        fields.extend(own);
    }
    Value::Object(fields)
}

/// A response that could be read at all.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Response {
    /// `version_info`.
    pub version: String,
    /// The resources.
    pub resources: Vec<Unread>,
    /// Names of those that are gone.
    pub removed: Vec<String>,
}

/// A resource that was not looked at yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Unread {
    /// Its name as far as the response says it apart from the resource; else empty.
    pub name: String,
    /// Its own version; empty is the response's.
    pub version: String,
    /// As the JSON of an `Any`, or why it is none.
    pub any: Result<Value, ConfigErrors>,
}

/// A response as written.
///
/// # Errors
/// It is none; what is wrong within its resources is no error here.
pub fn response(text: &str, syntax: Syntax) -> Result<Response, ConfigErrors> {
    let mut value = strict::parse(text, syntax)?;
    let resources = match value.get_mut("resources").map(Value::take) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(resources)) => resources,
        Some(_) => return Err(ConfigErrors::one("resources", "expected a list")),
    };
    if let Some(fields) = value.as_object_mut() {
        fields.remove("resources");
    }
    let descriptor = protobuf::descriptor(&DiscoveryResponse::full_name())
        .expect("invariant: DiscoveryResponse is transcribed");
    let mut walk = Walk::dynamic();
    if !walk.message(&descriptor, &mut value, "") {
        return Err(walk.errors);
    }
    let version = ["version_info", "versionInfo"]
        .iter()
        .find_map(|key| value.get(*key)?.as_str())
        .unwrap_or_default()
        .to_owned();
    let unread = |any| Unread {
        name: String::new(),
        version: String::new(),
        any: Ok(any),
    };
    let resources = resources.into_iter().map(unread).collect();
    let response = Response {
        version,
        resources,
        removed: Vec::new(),
    };
    judge(walk, "", Ok(response))
}

impl Response {
    /// Each resource, judged by itself; one that is of another type is wrong.
    #[must_use]
    pub fn read<R: Resource>(self) -> Vec<Candidate<R>> {
        let each = self.resources.into_iter().enumerate();
        each.map(|(index, value)| candidate(value, &format!("resources[{index}]")))
            .collect()
    }
}

fn candidate<R: Resource>(unread: Unread, place: &str) -> Candidate<R> {
    let (configuration, read) = match unread.any {
        Ok(value) => (value.clone(), understand(value, place)),
        Err(errors) => (Value::Null, Err(errors)),
    };
    let named = ["name", "cluster_name", "clusterName"];
    let own = named
        .iter()
        .find_map(|key| configuration.get(*key)?.as_str())
        .unwrap_or_default();
    let said = unread.name;
    let read = read.and_then(|resource: R| {
        if said.is_empty() || said == resource.name() {
            return Ok(resource);
        }
        let message = format!("is '{}', was sent as '{said}'", resource.name());
        Err(ConfigErrors::one(place, message))
    });
    Candidate {
        name: if said.is_empty() {
            own.to_owned()
        } else {
            said
        },
        version: unread.version,
        configuration,
        read,
    }
}

fn understand<R: Resource>(mut value: Value, place: &str) -> Result<R, ConfigErrors> {
    let type_url = value.get("@type").and_then(Value::as_str);
    if let Some(other) = type_url.filter(|url| protobuf::type_name(url) != R::TYPE) {
        let message = format!("expected a {}, got {other}", R::TYPE);
        return Err(ConfigErrors::one(place, message));
    }
    let mut walk = Walk::dynamic();
    if !walk.any(&mut value, place) {
        return Err(walk.errors);
    }
    let message = value.as_object_mut().and_then(|fields| {
        fields.remove("@type")?;
        Some(Value::Object(std::mem::take(fields)))
    });
    judge(walk, place, R::from_json(&message.unwrap_or(json!({}))))
}
