//! The two protocols on the wire.

use crate::{
    session::{Ask, Client, Request, Response},
    snapshot::Resource,
};
use outrigger_xds::{
    resource::bootstrap::Node,
    subscription::Protocol,
    wire::{
        envoy::{
            config::core::v3::{self as core, node::UserAgentVersionType},
            service::discovery::v3 as wire,
        },
        google::rpc,
    },
};
use std::sync::Arc;

/// Of why a response was refused, what is kept and logged.
const NACK_BYTES_MAX: usize = 4096;

/// How requests are read and responses written.
pub(super) trait Dialect: Send + 'static {
    /// As it comes.
    type Request: Send + 'static;
    /// As it goes.
    type Response: Send + 'static;
    /// Which it is.
    const PROTOCOL: Protocol;

    fn read(request: Self::Request) -> Request;
    fn write(response: Response) -> Self::Response;
}

/// The state of the world.
pub(super) struct State;

/// What changed.
pub(super) struct Delta;

impl Dialect for State {
    type Request = wire::DiscoveryRequest;
    type Response = wire::DiscoveryResponse;
    const PROTOCOL: Protocol = Protocol::State;

    fn read(request: wire::DiscoveryRequest) -> Request {
        Request {
            node: request.node.map(client),
            type_url: request.type_url,
            nonce: request.response_nonce,
            error: request.error_detail.map(told),
            ask: Ask::State {
                version: request.version_info,
                names: request.resource_names.into_iter().collect(),
            },
        }
    }

    fn write(response: Response) -> wire::DiscoveryResponse {
        let resources = response.resources.iter();
        wire::DiscoveryResponse {
            version_info: response.version,
            resources: resources.map(|resource| resource.any.clone()).collect(),
            type_url: response.type_url,
            nonce: response.nonce,
            resource_errors: Vec::new(),
        }
    }
}

impl Dialect for Delta {
    type Request = wire::DeltaDiscoveryRequest;
    type Response = wire::DeltaDiscoveryResponse;
    const PROTOCOL: Protocol = Protocol::Delta;

    fn read(request: wire::DeltaDiscoveryRequest) -> Request {
        Request {
            node: request.node.map(client),
            type_url: request.type_url,
            nonce: request.response_nonce,
            error: request.error_detail.map(told),
            ask: Ask::Delta {
                subscribe: request.resource_names_subscribe.into_iter().collect(),
                unsubscribe: request.resource_names_unsubscribe.into_iter().collect(),
                initial_versions: request.initial_resource_versions,
            },
        }
    }

    fn write(response: Response) -> wire::DeltaDiscoveryResponse {
        wire::DeltaDiscoveryResponse {
            system_version_info: response.version,
            resources: response.resources.iter().map(wrapped).collect(),
            type_url: response.type_url,
            nonce: response.nonce,
            removed_resources: response.removed,
            resource_errors: Vec::new(),
        }
    }
}

fn wrapped(resource: &Arc<Resource>) -> wire::Resource {
    wire::Resource {
        version: resource.version.clone(),
        resource: Some(resource.any.clone()),
        name: resource.name.clone(),
        ttl: None,
    }
}

/// Why something was refused. An empty text is a refusal all the same.
fn told(status: rpc::Status) -> String {
    let mut text = status.message;
    if text.len() > NACK_BYTES_MAX {
        text.truncate(text.floor_char_boundary(NACK_BYTES_MAX));
        // It may be much longer.
        text.shrink_to_fit();
    }
    text
}

fn client(node: core::Node) -> Client {
    let version = node.user_agent_version_type.as_ref();
    let version = version.and_then(|UserAgentVersionType::UserAgentBuildVersion(build)| {
        let version = build.version.as_ref()?;
        let [major, minor, patch] = [version.major_number, version.minor_number, version.patch];
        Some(format!("{major}.{minor}.{patch}"))
    });
    Client {
        user_agent: node.user_agent_name.clone(),
        user_agent_version: version.unwrap_or_default(),
        node: Node::from(node),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_refusal_the_beginning_is_kept() {
        let kept = |message: String| {
            let status = rpc::Status { code: 3, message };
            told(status)
        };
        let longest = "x".repeat(NACK_BYTES_MAX);
        assert_eq!(kept(longest.clone()), longest);
        assert_eq!(kept(format!("{longest}y")), longest);
        // A character that does not fit is not cut in two.
        let wide = format!("{}äb", "x".repeat(NACK_BYTES_MAX - 1));
        assert_eq!(kept(wide), "x".repeat(NACK_BYTES_MAX - 1));
    }
}
