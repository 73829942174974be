//! Which prompt tokens could an engine have taken from its cache? Computed from exact token ids, without hashes and
//! without asking anybody, so that hit ratios have something to be measured against. Caches are taken to be large
//! enough to drop nothing.

use std::collections::{BTreeMap, HashMap, HashSet};

/// Tokens in a KV block, of the demo's engines and of the proxies' index.
pub(super) const BLOCK_TOKENS: usize = 32;

/// A prefix of full blocks; 0 is the empty one.
type PrefixId = usize;

/// The full blocks that requests left on each engine.
#[derive(Default, Clone)]
pub(super) struct Held {
    /// A prefix is known by the one before it and its last block.
    prefixes: HashMap<(PrefixId, Box<[u32]>), PrefixId>,
    by_engine: BTreeMap<String, HashSet<PrefixId>>,
}

impl Held {
    /// Notes what a request left on `engine`: its prompt and all it generated but the last token, which was never
    /// computed and so fills no block.
    pub(super) fn add(&mut self, engine: &str, prompt: &[u32], generated: &[u32]) {
        let computed = &generated[..generated.len().saturating_sub(1)];
        let tokens = [prompt, computed].concat();
        let held = self.by_engine.entry(engine.to_owned()).or_default();
        let mut prefix = 0;
        for block in tokens.chunks_exact(BLOCK_TOKENS) {
            let next = self.prefixes.len() + 1;
            prefix = *self.prefixes.entry((prefix, block.into())).or_insert(next);
            held.insert(prefix);
        }
    }

    /// Tokens of `prompt` that the engine holding most of it need not compute. The last token of a prompt always is
    /// computed, since its result is what the request is for.
    pub(super) fn reusable_tokens(&self, prompt: &[u32]) -> usize {
        let usable = &prompt[..prompt.len().saturating_sub(1)];
        let on = |held: &HashSet<PrefixId>| {
            let mut prefix = 0;
            let blocks = usable.chunks_exact(BLOCK_TOKENS).take_while(|block| {
                let known = self.prefixes.get(&(prefix, Box::from(*block)));
                prefix = known.copied().unwrap_or_default();
                known.is_some_and(|id| held.contains(id))
            });
            blocks.count() * BLOCK_TOKENS
        };
        self.by_engine.values().map(on).max().unwrap_or_default()
    }

    /// Blocks held by `engine`.
    pub(super) fn blocks(&self, engine: &str) -> usize {
        self.by_engine.get(engine).map_or(0, HashSet::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(count: usize) -> Vec<u32> {
        (0..count as u32).collect()
    }

    #[test]
    fn full_blocks_of_a_prompt_are_reusable_but_not_its_last_token() {
        let mut held = Held::default();
        held.add("a", &tokens(96), &[]);
        for (prompt, reusable) in [
            (31, 0),
            (32, 0),
            (33, 32),
            (64, 32),
            (65, 64),
            (96, 64),
            (97, 96),
            (200, 96),
        ] {
            assert_eq!(held.reusable_tokens(&tokens(prompt)), reusable, "{prompt}");
        }
        assert_eq!(held.blocks("a"), 3);
    }

    #[test]
    fn the_last_generated_token_fills_no_block() {
        let mut held = Held::default();
        held.add("a", &tokens(30), &[30, 31]);
        assert_eq!(held.blocks("a"), 0);
        held.add("a", &tokens(30), &[30, 31, 32]);
        assert_eq!(
            (held.blocks("a"), held.reusable_tokens(&tokens(40))),
            (1, 32)
        );
    }

    #[test]
    fn a_block_counts_only_behind_its_own_prefix() {
        let mut held = Held::default();
        held.add("a", &tokens(64), &[]);
        let mut other = tokens(65);
        other[0] = 999;
        assert_eq!(held.reusable_tokens(&other), 0);
        // The same block again, elsewhere in a prompt.
        let twice = [&tokens(32)[..], &tokens(32)[..], &[7]].concat();
        assert_eq!(held.reusable_tokens(&twice), 32);
    }

    #[test]
    fn the_engine_that_holds_most_counts() {
        let mut held = Held::default();
        held.add("a", &tokens(96), &[]);
        held.add("b", &tokens(32), &[]);
        assert_eq!(held.reusable_tokens(&tokens(97)), 96);
        assert_eq!(
            (held.blocks("a"), held.blocks("b"), held.blocks("c")),
            (3, 1, 0)
        );
    }
}
