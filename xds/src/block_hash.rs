//! The hash chain that names KV blocks across engines.
//!
//! A block's hash covers its own tokens and everything before it, so one `u64` names a whole prefix. Engines hash in
//! their own ways; the agent re-hashes the token ids of their events with this chain, and the router hashes the
//! prompt with it, so that vLLM, SGLang and TensorRT-LLM share one index.

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

/// Hash of one block and, through its parent, of the whole prefix that ends in it.
pub type BlockHash = u64;

/// Tokens in a canonical block unless configured otherwise.
pub const BLOCK_TOKENS_DEFAULT: usize = 32;

/// What separates one KV name space from another: equal tokens under different seeds are different blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Namespace {
    /// The engine's base model, by its served name.
    pub model: String,
    /// LoRA adapter name, if any.
    pub lora: Option<String>,
    /// `cache_salt` of the request, if any.
    pub salt: Option<String>,
}

impl Namespace {
    /// The seed: the "parent" of a first block.
    #[must_use]
    pub fn seed(&self) -> BlockHash {
        let mut hasher = Xxh3::new();
        for part in [
            Some(self.model.as_str()),
            self.lora.as_deref(),
            self.salt.as_deref(),
        ] {
            // Length-prefixed, so that ("ab", "c") and ("a", "bc") differ; absent differs from empty.
            match part {
                Some(text) => {
                    hasher.update(&(text.len() as u64 + 1).to_le_bytes());
                    hasher.update(text.as_bytes());
                }
                None => hasher.update(&0u64.to_le_bytes()),
            }
        }
        hasher.digest()
    }
}

/// Hash of a block of `tokens` after `parent`; `extra` holds media hashes that belong to this block (usually empty).
#[must_use]
pub fn block_hash(parent: BlockHash, tokens: &[u32], extra: &[u8]) -> BlockHash {
    let mut bytes = Vec::with_capacity(tokens.len() * 4 + extra.len());
    for token in tokens {
        bytes.extend_from_slice(&token.to_le_bytes());
    }
    bytes.extend_from_slice(extra);
    xxh3_64_with_seed(&bytes, parent)
}

/// Hashes of all full blocks of a prompt; a last partial block has none.
#[must_use]
pub fn chain(seed: BlockHash, tokens: &[u32], block_tokens: usize) -> Vec<BlockHash> {
    let mut parent = seed;
    tokens
        .chunks_exact(block_tokens.max(1))
        .map(|block| {
            parent = block_hash(parent, block, &[]);
            parent
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_prefixes() {
        let seed = Namespace {
            model: "m".into(),
            ..Namespace::default()
        }
        .seed();
        let tokens: Vec<u32> = (0..100).collect();
        let whole = chain(seed, &tokens, 32);
        assert_eq!(whole.len(), 3, "the last partial block has no hash");
        assert_eq!(chain(seed, &tokens[..64], 32), whole[..2]);
        let mut other = tokens;
        other[0] = 7;
        assert!(
            chain(seed, &other, 32)
                .iter()
                .zip(&whole)
                .all(|(a, b)| a != b),
            "a changed first token changes all"
        );
    }

    #[test]
    fn namespaces_do_not_collide() {
        let namespace = |model: &str, lora: Option<&str>, salt: Option<&str>| Namespace {
            model: model.into(),
            lora: lora.map(Into::into),
            salt: salt.map(Into::into),
        };
        let all = [
            namespace("ab", None, None),
            namespace("a", Some("b"), None),
            namespace("a", None, Some("b")),
            namespace("ab", Some(""), None),
            namespace("ab", None, Some("")),
        ];
        let seeds: std::collections::HashSet<u64> = all.iter().map(Namespace::seed).collect();
        assert_eq!(seeds.len(), all.len());
    }
}
