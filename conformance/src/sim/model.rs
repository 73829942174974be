//! Answers "which token comes next": a stand-in for a model whose choice depends on every token before it.
//!
//! Two engines agree on the text of a prompt, and one token lost, doubled or changed before or during a generation
//! changes all that follows. At temperature 0 nothing else matters; a sampled request adds its own seed. There is
//! no meaning in the text.

use super::tokenizer::{EOS, Tokenizer};

/// One of this many tokens ends the text, on average.
const EOS_PERIOD: u64 = 256;
/// U+1F3A8, four tokens of one byte each: text that can be cut inside a character.
const EMOJI: [u8; 4] = [0xf0, 0x9f, 0x8e, 0xa8];

/// Scrambles 64 bits (the finaliser of SplitMix64).
pub(crate) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What the model remembers of a sequence: a hash of all its tokens, and the last three.
#[derive(Clone, Debug)]
pub(crate) struct History {
    hash: u64,
    last: [u32; 3],
}

impl History {
    pub(crate) fn of(tokens: &[u32]) -> Self {
        let mut history = Self {
            hash: 0x6f75_7472_6967_6765,
            last: [EOS; 3],
        };
        for &token in tokens {
            history.push(token);
        }
        history
    }

    /// What all tokens together come to.
    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }

    pub(crate) fn push(&mut self, token: u32) {
        self.hash = mix(self.hash ^ (u64::from(token) << 17));
        self.last = [self.last[1], self.last[2], token];
    }
}

/// A choice of the model with the figures a client may ask for.
#[derive(Clone, Debug)]
pub(crate) struct Choice {
    pub(crate) token: u32,
    /// Natural logarithm of the model's probability for `token`.
    pub(crate) logprob: f64,
    /// Other tokens, less likely in this order.
    pub(crate) runners_up: Vec<(u32, f64)>,
}

/// The vocabulary sorted by what may follow what, so that generated text tokenises back to the same ids.
pub(crate) struct Model {
    words: Vec<u32>,
    openers: Vec<u32>,
    comma: u32,
    full_stop: u32,
    newline: u32,
    emoji: [u32; 4],
    is_word: Vec<bool>,
    ends_blank: Vec<bool>,
}

impl Model {
    pub(crate) fn new(tokenizer: &Tokenizer) -> Self {
        let known = include_str!("../../assets/training_text.txt");
        let known: std::collections::HashSet<&str> =
            known.split(|c: char| !c.is_ascii_alphabetic()).collect();
        let one = |text: &str| tokenizer.encode(text)[0];
        let ids =
            || 3..u32::try_from(tokenizer.vocab_size()).expect("invariant: a vocabulary fits u32");
        let text = |id: u32| std::str::from_utf8(tokenizer.bytes(id)).unwrap_or("");
        let words: Vec<u32> = ids()
            .filter(|&id| {
                text(id)
                    .strip_prefix(' ')
                    .is_some_and(|word| word.len() > 1 && known.contains(word))
            })
            .collect();
        let openers: Vec<u32> = ids()
            .filter(|&id| text(id).len() > 1 && known.contains(text(id)))
            .collect();
        let mut is_word = vec![false; tokenizer.vocab_size()];
        for &id in words.iter().chain(&openers) {
            is_word[id as usize] = true;
        }
        Self {
            words,
            openers,
            comma: one(","),
            full_stop: one("."),
            newline: one("\n"),
            emoji: EMOJI.map(|byte| 3 + u32::from(byte)),
            is_word,
            ends_blank: (0..)
                .take(tokenizer.vocab_size())
                .map(|id| text(id).ends_with([' ', '\n', '\t', '\r']))
                .collect(),
        }
    }

    /// The next token behind `history`. `salt` is 0 for greedy decoding, else what makes this sample its own.
    pub(crate) fn next(
        &self,
        history: &History,
        salt: u64,
        may_end: bool,
        runners_up: usize,
    ) -> Choice {
        let hash = mix(history.hash ^ salt);
        self.figures(hash, self.pick(history, hash, may_end), runners_up)
    }

    /// The token a form asks for, with the figures the model would give its own choice.
    pub(crate) fn given(
        &self,
        history: &History,
        salt: u64,
        token: u32,
        runners_up: usize,
    ) -> Choice {
        self.figures(mix(history.hash ^ salt), token, runners_up)
    }

    /// A word with a blank before it.
    pub(crate) fn word(&self, bits: u64) -> u32 {
        pick_from(&self.words, bits)
    }

    fn figures(&self, hash: u64, token: u32, runners_up: usize) -> Choice {
        let fraction = |bits: u64| (bits % 4096) as f64 / 4096.0;
        let logprob = -fraction(mix(hash ^ 1));
        let mut behind = logprob;
        let runners_up = (0..runners_up as u64).map(|rank| {
            let bits = mix(hash ^ (rank + 2));
            behind -= 0.25 + fraction(bits);
            let other = pick_from(&self.words, bits);
            (if other == token { self.comma } else { other }, behind)
        });
        Choice {
            token,
            logprob,
            runners_up: runners_up.collect(),
        }
    }

    fn pick(&self, history: &History, hash: u64, may_end: bool) -> u32 {
        let [before, middle, last] = history.last;
        for done in 1..EMOJI.len() {
            let tail = [before, middle, last];
            if tail[3 - done..] == self.emoji[..done] {
                return self.emoji[done];
            }
        }
        let property = |list: &[bool]| list.get(last as usize).copied().unwrap_or(false);
        if may_end && hash.is_multiple_of(EOS_PERIOD) {
            EOS
        } else if property(&self.ends_blank) {
            pick_from(&self.openers, hash)
        } else {
            match (hash >> 32) % 100 {
                0..6 if property(&self.is_word) => self.comma,
                6..12 if property(&self.is_word) => self.full_stop,
                12..15 if property(&self.is_word) => self.emoji[0],
                15..40 if last == self.full_stop => self.newline,
                _ => pick_from(&self.words, hash),
            }
        }
    }
}

fn pick_from(list: &[u32], bits: u64) -> u32 {
    list[(mix(bits) % list.len() as u64) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generate(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut history = History::of(prompt);
        let next = |_| {
            let token = model.next(&history, 0, false, 0).token;
            history.push(token);
            token
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn generated_text_tokenises_back_to_the_same_ids() {
        let tokenizer = Tokenizer::embedded();
        let model = Model::new(&tokenizer);
        for prompt in [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "The capital of France is",
            "x",
        ] {
            let ids = generate(&model, &tokenizer.encode(prompt), 400);
            let text = tokenizer.decode(&ids);
            assert_eq!(
                tokenizer.encode(&format!("{prompt}{text}"))[tokenizer.encode(prompt).len()..],
                ids[..],
                "{text}"
            );
        }
    }

    #[test]
    fn every_earlier_token_matters_and_a_resumed_sequence_goes_on_the_same() {
        let tokenizer = Tokenizer::embedded();
        let model = Model::new(&tokenizer);
        let prompt = tokenizer.encode("One day a robot painted the sky and");
        let whole = generate(&model, &prompt, 60);
        for cut in [1, 13, 59] {
            let resumed = generate(&model, &[&prompt[..], &whole[..cut]].concat(), 60 - cut);
            assert_eq!(resumed, whole[cut..]);
        }
        for drop in 0..prompt.len() {
            let mut other = prompt.clone();
            other.remove(drop);
            assert_ne!(
                generate(&model, &other, 8),
                whole[..8],
                "token {drop} had no influence"
            );
        }
    }
}
