//! What filters share: handed to each filter's constructor, living beside the configuration snapshot.

use crate::{
    endpoints::{Endpoints, Upstream},
    kv_index::KvIndex,
    tokens::Tokenizers,
};
use std::sync::Arc;

/// Shared state and abilities. A push of configuration builds new filters with the same services, so it loses none
/// of the index, load or health that live here.
#[derive(Clone)]
pub struct Services {
    /// The fleet: clusters, endpoints, their load and health.
    pub endpoints: Arc<dyn Endpoints>,
    /// The way out.
    pub upstream: Arc<dyn Upstream>,
    /// Who holds which KV blocks.
    pub kv_index: Arc<KvIndex>,
    /// Prompt to token ids.
    pub tokenizers: Arc<Tokenizers>,
    /// Where work of more than some tens of microseconds goes, off the request threads.
    pub compute: tokio::runtime::Handle,
}
