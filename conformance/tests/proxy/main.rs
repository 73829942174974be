//! What a proxy does on the wire, seen from outside: real sockets, real proxies, real failures.

#![expect(
    clippy::unwrap_used,
    reason = "the helpers of a test fail it by panicking, as its body does"
)]

mod ads;
mod ads_cache;
mod ads_failures;
mod ads_server;
mod balancing;
mod breakers;
mod canary;
mod client_cert;
mod clusters;
mod collector;
mod config;
mod connections;
mod disaggregation;
mod disaggregation_failures;
mod disaggregation_pairs;
mod disaggregation_sglang;
mod disaggregation_trtllm;
mod downstream_h1;
mod drain;
mod dynamic;
mod dynamic_listeners;
mod dynamic_load;
mod dynamic_tls;
mod edge;
mod envoy;
mod failures;
mod feeds;
mod fleet;
mod fleet_pushes;
mod fleet_surface;
mod health;
mod http_filters;
mod limits;
mod listeners;
mod migration;
mod migration_again;
mod migration_cells;
mod migration_kill;
mod migration_kinds;
mod migration_limits;
mod migration_mix;
mod migration_whole;
mod migration_whole_limits;
mod orca;
mod original_dst;
mod own_answers;
mod per_filter;
mod pipes;
mod protocol;
mod random_changes;
mod regression;
mod reuse;
mod routes;
mod short_resources;
mod slow;
mod socket_matches;
mod stored_responses;
mod streams;
mod support;
mod tcp;
mod tls;
mod token_limits;
mod tracing;
mod tracing_limits;
mod trtllm_events;
mod upgrades;
mod upstream_h1;
mod upstream_tls;
