//! The `kv_routing` filter: ranks the endpoints of a generation by what they have cached of its prompt and how busy
//! they are.

use crate::{
    body::{RequestBody, ResponseBody},
    error::Error,
    filter::{Context, HttpFilter, Next},
    services::Services,
};
use async_trait::async_trait;
use http::{Request, Response};
use std::sync::Arc;

/// Our own type.
pub const TYPE_URL: &str = "type.googleapis.com/outrigger.filters.http.kv_routing.v1.Config";

struct KvRouting;

/// The registry's constructor.
///
/// # Errors
/// The configuration is wrong; the error names the field.
pub fn factory(_value: &serde_json::Value, _services: &Services) -> Result<Arc<dyn HttpFilter>, String> {
    Ok(Arc::new(KvRouting))
}

#[async_trait]
impl HttpFilter for KvRouting {
    async fn handle(
        &self,
        request: Request<RequestBody>,
        context: &mut Context,
        next: Next<'_>,
    ) -> Result<Response<ResponseBody>, Error> {
        next.run(request, context).await
    }
}
