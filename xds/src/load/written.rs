//! Resources as files hold them, for those who hand them on: what a control plane reads.
//!
//! They are judged as strictly as a bootstrap, and understood as by a proxy. What is handed on is what was written, not what we
//! make of it; but for fields without effect here, which are left out, logged and counted.

use super::{binary::Packed, canonical, discovery::Resource, judge, walk::Walk};
use crate::{
    problems::ConfigErrors,
    protobuf,
    resource::{
        cluster::Cluster, endpoint::ClusterLoadAssignment, extension::ExtensionConfig,
        listener::Listener, route::RouteConfiguration, runtime::Runtime, secret::Secret,
    },
    subscription::Kind,
    wire::envoy::{
        config::{
            cluster::v3::Cluster as WireCluster, core::v3::TypedExtensionConfig as WireExtension,
            endpoint::v3::ClusterLoadAssignment as WireAssignment,
            listener::v3::Listener as WireListener, route::v3::RouteConfiguration as WireRoutes,
        },
        extensions::transport_sockets::tls::v3::Secret as WireSecret,
        service::runtime::v3::Runtime as WireRuntime,
    },
};
use prost::{Message, Name};
use prost_types::Any;
use serde_json::Value;

/// A resource that is good by itself; whether what it names exists is not looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// Not empty.
    pub name: String,
    /// What a proxy makes of it.
    pub meaning: Meaning,
    /// As it goes over the wire; the same bytes whenever the same was written.
    pub any: Any,
}

/// What a resource says.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "each is named after what it holds")]
pub enum Meaning {
    Cluster(Box<Cluster>),
    Endpoints(ClusterLoadAssignment),
    Listener(Box<Listener>),
    Routes(RouteConfiguration),
    Secret(Secret),
    Extension(ExtensionConfig),
    Runtime(Runtime),
}

impl Meaning {
    /// Its type.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::Cluster(_) => Kind::Clusters,
            Self::Endpoints(_) => Kind::Endpoints,
            Self::Listener(_) => Kind::Listeners,
            Self::Routes(_) => Kind::Routes,
            Self::Secret(_) => Kind::Secrets,
            Self::Extension(_) => Kind::Extensions,
            Self::Runtime(_) => Kind::Runtimes,
        }
    }
}

/// A resource as the JSON of an `Any`, that stands at `place`.
///
/// # Errors
/// Everything that is wrong with it, with places.
pub fn resource(value: Value, place: &str) -> Result<Written, ConfigErrors> {
    let Some(type_url) = value.get("@type").and_then(Value::as_str) else {
        let message = "'@type' is missing: it names the type of this resource";
        return Err(ConfigErrors::one(place, message));
    };
    match protobuf::type_name(type_url) {
        Cluster::TYPE => read::<WireCluster, _>(value, place, |it| Meaning::Cluster(Box::new(it))),
        ClusterLoadAssignment::TYPE => read::<WireAssignment, _>(value, place, Meaning::Endpoints),
        Listener::TYPE => {
            read::<WireListener, _>(value, place, |it| Meaning::Listener(Box::new(it)))
        }
        RouteConfiguration::TYPE => read::<WireRoutes, _>(value, place, Meaning::Routes),
        ExtensionConfig::TYPE => read::<WireExtension, _>(value, place, Meaning::Extension),
        Runtime::TYPE => read::<WireRuntime, _>(value, place, Meaning::Runtime),
        Secret::TYPE => read::<WireSecret, _>(value, place, Meaning::Secret),
        _ => {
            let message = format!("not a type of resource that is served: {type_url}");
            Err(ConfigErrors::one(place, message))
        }
    }
}

fn read<W, P>(
    mut value: Value,
    place: &str,
    meaning: fn(P) -> Meaning,
) -> Result<Written, ConfigErrors>
where
    W: Message + Name + Default,
    P: Resource + TryFrom<W, Error = ConfigErrors>,
{
    let mut walk = Walk::default();
    if !walk.any(&mut value, place) {
        return Err(walk.errors);
    }
    let (plain, any) = judge(walk, place, understood::<W, P>(value))?;
    let name = plain.name().to_owned();
    if name.is_empty() {
        return Err(ConfigErrors::one(place, "name: must not be empty"));
    }
    Ok(Written {
        name,
        meaning: meaning(plain),
        any,
    })
}

/// What fits, and its bytes.
fn understood<W, P>(mut value: Value) -> Result<(P, Any), ConfigErrors>
where
    W: Message + Name + Default,
    P: Resource + TryFrom<W, Error = ConfigErrors>,
{
    let wrong = |message: String| ConfigErrors::one("", message);
    if let Some(fields) = value.as_object_mut() {
        fields.remove("@type");
    }
    let descriptor = protobuf::descriptor(P::TYPE).expect("invariant: resources are transcribed");
    let message = protobuf::from_json(descriptor, &value)?;
    let wire: W = message
        .transcode_to()
        .map_err(|error| wrong(error.to_string()))?;
    let any = Any {
        type_url: format!("{}{}", protobuf::TYPE_URL_PREFIX, P::TYPE),
        value: canonical::bytes(&message).map_err(wrong)?,
    };
    Ok((P::try_from(wire)?, any))
}

/// A resource as the JSON of an `Any`.
///
/// # Errors
/// It does not hold what it says.
pub fn to_json(any: &Any) -> Result<Value, ConfigErrors> {
    Packed::from(any.clone()).to_json()
}

/// The version of a resource: of its bytes, so that it changes when they do, in every process alike.
#[must_use]
pub fn version(any: &Any) -> String {
    format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&any.value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Syntax, documents};

    fn one(text: &str) -> Result<Written, ConfigErrors> {
        let mut values = documents(text, Syntax::Yaml).unwrap();
        assert_eq!(values.len(), 1);
        resource(values.remove(0), "here")
    }

    const LISTENER: &str = r#"
"@type": type.googleapis.com/envoy.config.listener.v3.Listener
name: edge
address: {socket_address: {address: 127.0.0.1, port_value: 80}}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: edge
      route_config:
        name: inline
        virtual_hosts: []
      http_filters:
      - name: ours
        typed_config:
          "@type": type.googleapis.com/xds.type.v3.TypedStruct
          type_url: type.googleapis.com/outrigger.filters.http.openai.v1.Config
          value: {a: 1, b: [true, "x"], c: {d: 2.5, e: null}, f: {}, g: 7, h: 8, i: 9}
      - name: router
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
"#;

    #[test]
    fn what_is_written_is_handed_on() {
        let written = one(LISTENER).unwrap();
        assert_eq!(
            (written.name.as_str(), written.meaning.kind()),
            ("edge", Kind::Listeners)
        );
        let wire = WireListener::decode(&*written.any.value).unwrap();
        let Meaning::Listener(plain) = &written.meaning else {
            panic!("{written:?}");
        };
        assert_eq!(Listener::try_from(wire).unwrap(), **plain);
        let json = to_json(&written.any).unwrap();
        let again = resource(json, "").unwrap();
        assert_eq!(again, written);
    }

    #[test]
    fn bytes_do_not_depend_on_how_it_is_written() {
        // Maps are hashed with another seed each time, so that any order that gets through shows soon.
        let first = one(LISTENER).unwrap();
        let camel = LISTENER
            .replace("filter_chains", "filterChains")
            .replace("{a: 1, b: [true, \"x\"]", "{b: [true, \"x\"], a: 1");
        for _ in 0..20 {
            assert_eq!(one(LISTENER).unwrap().any, first.any);
            assert_eq!(one(&camel).unwrap().any, first.any);
        }
        let other = one(&LISTENER.replace("a: 1", "a: 2")).unwrap();
        assert_ne!(version(&other.any), version(&first.any));
        assert_eq!(version(&first.any).len(), 32);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let cluster = "\"@type\": type.googleapis.com/envoy.config.cluster.v3.Cluster\n";
        let cases = [
            ("name: a", "here: '@type' is missing"),
            (
                "\"@type\": type.googleapis.com/envoy.config.core.v3.Node",
                "not a type of resource that is served",
            ),
            (&format!("{cluster}nmae: a"), "here: no such field: 'nmae'"),
            (
                &format!("{cluster}name: a\nlb_policy: LUCK"),
                "here.lb_policy: unknown value \"LUCK\"",
            ),
            (
                &format!("{cluster}type: STATIC\nload_assignment: {{}}"),
                "name",
            ),
        ];
        for (text, expected) in cases {
            let error = one(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn documents_are_told_apart() {
        let values = documents("a: 1\n---\n# nothing\n---\n- 2\n", Syntax::Yaml).unwrap();
        assert_eq!(
            values,
            [serde_json::json!({"a": 1}), serde_json::json!([2])]
        );
        assert!(documents("", Syntax::Yaml).unwrap().is_empty());
        assert!(documents("a: 1\n---\na: {", Syntax::Yaml).is_err());
        assert!(documents("a: 1\n---\nb: 1\nb: 2", Syntax::Yaml).is_err());
        assert!(documents("{} {}", Syntax::Json).is_err());
    }
}
