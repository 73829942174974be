//! Configuration resources as plain validated types, one file per resource.
//!
//! These are what the configuration means, after all field checks; how it was written (YAML, JSON, protobuf) is
//! behind us. Names are Envoy's. Cross checks (does a route's cluster exist) are the snapshot builder's.

pub mod bootstrap;
pub mod cluster;
pub mod endpoint;
pub mod header_mutation;
pub mod listener;
pub mod matching;
pub mod mirror_policy;
pub mod retry_policy;
pub mod route;
pub mod route_action;
