//! Tokens by tenant and model, for whoever pays for them.
//!
//! Exact where the engine told its `usage`; a stream that did not counts as many tokens as it had events, and the
//! prompt by its length. A tenant may be an API key, so metrics show a hash of it. Clients choose tenants, so only so
//! many get series of their own.

use super::usage::Usage;
use ahash::AHashMap;
use arc_swap::ArcSwap;
use metrics::Counter;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// Most pairs of tenant and model with metrics of their own; further tenants count as `other`.
const TENANT_SERIES_MAX: usize = 1024;

/// Where tokens of one tenant and model are counted.
pub(super) struct Handles {
    told: [Counter; 2],
    estimated: [Counter; 2],
}

impl Handles {
    fn new(tenant: &str, model: &str) -> Self {
        let counter = |kind: &'static str, source: &'static str| {
            metrics::counter!(
                "outrigger_tenant_tokens_total",
                "kind" => kind, "source" => source, "tenant" => tenant.to_owned(), "model" => model.to_owned()
            )
        };
        let both = |source| ["prompt", "completion"].map(|kind| counter(kind, source));
        Self {
            told: both("usage"),
            estimated: both("estimate"),
        }
    }
}

/// Handles by hash of the tenant (`None`: it named none) and model.
type Known = AHashMap<(Option<u64>, Arc<str>), Arc<Handles>>;

/// All of them. Grows when a tenant is seen first; requests only read it.
#[derive(Default)]
pub(super) struct Tenants {
    known: ArcSwap<Known>,
    others: ArcSwap<AHashMap<Arc<str>, Arc<Handles>>>,
}

impl Tenants {
    /// `model` is a label, so there are few.
    pub(super) fn handles(&self, tenant: Option<&str>, model: &Arc<str>) -> Arc<Handles> {
        let hash = tenant.map(|tenant| xxh3_64(tenant.as_bytes()));
        let key = (hash, model.clone());
        let known = self.known.load();
        if let Some(handles) = known.get(&key) {
            return handles.clone();
        }
        if known.len() >= TENANT_SERIES_MAX {
            return self.other(model);
        }
        let label = hash.map_or_else(|| "none".to_owned(), |hash| format!("{hash:016x}"));
        let handles = Arc::new(Handles::new(&label, model));
        self.known.rcu(|known| {
            let mut more = Known::clone(known);
            more.insert(key.clone(), handles.clone());
            more
        });
        handles
    }

    fn other(&self, model: &Arc<str>) -> Arc<Handles> {
        if let Some(handles) = self.others.load().get(model) {
            return handles.clone();
        }
        let handles = Arc::new(Handles::new("other", model));
        self.others.rcu(|others| {
            let mut more = AHashMap::clone(others);
            more.insert(model.clone(), handles.clone());
            more
        });
        handles
    }
}

/// Counts one request's tokens.
pub(super) struct Meter {
    /// Where.
    pub(super) handles: Arc<Handles>,
    /// Estimated tokens of its prompt.
    pub(super) prompt: u64,
}

impl Meter {
    /// `seen` is how many events of a stream brought tokens; a response that told nothing and was no stream (an error,
    /// mostly) counts nothing.
    pub(super) fn count(&self, usage: &Usage, seen: Option<u64>) {
        let estimates = [seen.map(|_| self.prompt), seen];
        for (index, told) in [usage.prompt, usage.completion].into_iter().enumerate() {
            match (told, estimates[index]) {
                (Some(tokens), _) => self.handles.told[index].increment(tokens),
                (None, Some(tokens)) => self.handles.estimated[index].increment(tokens),
                (None, None) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_tenants_have_series_of_their_own() {
        let tenants = Tenants::default();
        let model: Arc<str> = "m".into();
        for tenant in 0..TENANT_SERIES_MAX + 10 {
            let _ = tenants.handles(Some(&tenant.to_string()), &model);
        }
        assert_eq!(tenants.known.load().len(), TENANT_SERIES_MAX);
        assert_eq!(tenants.others.load().len(), 1);
        let first = tenants.handles(Some("0"), &model);
        assert!(Arc::ptr_eq(&first, &tenants.handles(Some("0"), &model)));
    }
}
