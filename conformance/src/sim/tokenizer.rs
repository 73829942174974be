//! Answers "which token ids is this text, and which text are these ids": the simulated engine's own byte-level BPE.
//!
//! Reads `assets/tokenizer.json` (Hugging Face layout) and gives the ids a Hugging Face tokenizer gives for that
//! file. It supports what that file uses and nothing else: one `Split` pattern of ASCII classes, byte-level letters,
//! BPE without options, special tokens. It shares no code with the product's tokenizers, so that both can be wrong
//! only in different ways.

use std::collections::HashMap;

use serde::Deserialize;

/// The tokenizer's file as it is written into a model directory.
pub const TOKENIZER_JSON: &str = include_str!("../../assets/tokenizer.json");
/// `<|im_end|>`: ends a turn, and a generation.
pub(crate) const EOS: u32 = 2;

/// The simulated engine's vocabulary and merges.
pub struct Tokenizer {
    merges: HashMap<(u32, u32), (usize, u32)>,
    byte_ids: [u32; 256],
    token_bytes: Vec<Vec<u8>>,
    token_letters: Vec<String>,
    specials: Vec<(String, u32)>,
}

#[derive(Deserialize)]
struct File {
    added_tokens: Vec<Added>,
    model: Bpe,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: HashMap<String, u32>,
    merges: Vec<(String, String)>,
}

impl Tokenizer {
    /// The tokenizer that ships with the simulator.
    pub fn embedded() -> Self {
        let file: File = serde_json::from_str(TOKENIZER_JSON)
            .expect("invariant: the embedded tokenizer.json is checked by a test");
        Self::from_file(&file)
    }

    fn from_file(file: &File) -> Self {
        let letters = byte_letters();
        let byte_of: HashMap<char, u8> = (0..=255u8)
            .map(|byte| (letters[usize::from(byte)], byte))
            .collect();
        let vocab = &file.model.vocab;
        let size = vocab.len();
        let mut token_bytes = vec![Vec::new(); size];
        let mut token_letters = vec![String::new(); size];
        for (letters, &id) in vocab {
            let special = file.added_tokens.iter().any(|added| added.id == id);
            token_bytes[id as usize] = if special {
                letters.clone().into_bytes()
            } else {
                letters.chars().map(|c| byte_of[&c]).collect()
            };
            token_letters[id as usize].clone_from(letters);
        }
        let merges = file
            .model
            .merges
            .iter()
            .enumerate()
            .map(|(rank, (left, right))| {
                (
                    (vocab[left], vocab[right]),
                    (rank, vocab[&format!("{left}{right}")]),
                )
            });
        Self {
            merges: merges.collect(),
            byte_ids: std::array::from_fn(|byte| vocab[&letters[byte].to_string()]),
            token_bytes,
            token_letters,
            specials: file
                .added_tokens
                .iter()
                .map(|added| (added.content.clone(), added.id))
                .collect(),
        }
    }

    /// Number of ids, special tokens included.
    pub fn vocab_size(&self) -> usize {
        self.token_bytes.len()
    }

    /// The ids of `text`; a special token's text becomes that token.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        let mut rest = text;
        while !rest.is_empty() {
            let found = self
                .specials
                .iter()
                .filter_map(|(content, id)| rest.find(content).map(|at| (at, content, *id)));
            let Some((at, content, id)) = found.min_by_key(|(at, ..)| *at) else {
                self.encode_ordinary(rest, &mut ids);
                break;
            };
            self.encode_ordinary(&rest[..at], &mut ids);
            ids.push(id);
            rest = &rest[at + content.len()..];
        }
        ids
    }

    /// The ids of `text`, in which nothing is special.
    pub(crate) fn encode_as_text(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::with_capacity(text.len() / 3);
        self.encode_ordinary(text, &mut ids);
        ids
    }

    fn encode_ordinary(&self, text: &str, ids: &mut Vec<u32>) {
        let mut rest = text.as_bytes();
        while !rest.is_empty() {
            let (piece, tail) = rest.split_at(piece_len(rest));
            self.merge(piece, ids);
            rest = tail;
        }
    }

    /// Byte-pair merges of one piece: the lowest rank first, all its occurrences from the left.
    fn merge(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let mut parts: Vec<u32> = piece
            .iter()
            .map(|&byte| self.byte_ids[usize::from(byte)])
            .collect();
        while let Some(&(rank, _)) = parts
            .windows(2)
            .filter_map(|pair| self.merges.get(&(pair[0], pair[1])))
            .min_by_key(|(rank, _)| *rank)
        {
            let mut merged = Vec::with_capacity(parts.len());
            let mut at = 0;
            while at < parts.len() {
                let pair = parts
                    .get(at + 1)
                    .and_then(|&next| self.merges.get(&(parts[at], next)));
                match pair {
                    Some(&(found, id)) if found == rank => {
                        merged.push(id);
                        at += 2;
                    }
                    _ => {
                        merged.push(parts[at]);
                        at += 1;
                    }
                }
            }
            parts = merged;
        }
        ids.extend_from_slice(&parts);
    }

    /// The bytes a token stands for; empty for an id outside the vocabulary.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.token_bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// The token as its file spells it (`Ġthe`); empty for an id outside the vocabulary.
    pub fn letters(&self, id: u32) -> &str {
        self.token_letters
            .get(id as usize)
            .map_or("", String::as_str)
    }

    /// Whether the id is one of the special tokens, which generated text leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.specials.iter().any(|(_, special)| *special == id)
    }

    /// The text of `ids`, special tokens spelled out, bytes that are no UTF-8 replaced.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| self.bytes(id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Length of the first piece of `text` under the pattern of tokenizer.json: an optional space before a run of
/// letters, of at most three digits, or of other characters; else a run of blanks.
fn piece_len(text: &[u8]) -> usize {
    let blank = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
    let lead = usize::from(text[0] == b' ');
    let run = |of: &dyn Fn(&u8) -> bool| text[lead..].iter().take_while(|byte| of(byte)).count();
    let letters = run(&u8::is_ascii_alphabetic);
    let digits = run(&u8::is_ascii_digit).min(3);
    let other = run(&|byte| !blank(byte) && !byte.is_ascii_alphanumeric());
    match letters.max(digits).max(other) {
        0 => text.iter().take_while(|byte| blank(byte)).count(),
        count => lead + count,
    }
}

/// The printable stand-ins of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 onwards.
fn byte_letters() -> [char; 256] {
    let mut next = 256;
    std::array::from_fn(|byte| {
        let byte = byte as u32;
        let plain = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let code = if plain {
            byte
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).expect("invariant: codes below U+0200 are characters")
    })
}

/// Turns generated ids into text as they come, holding back bytes of an unfinished character.
#[derive(Default)]
pub(crate) struct Detokenizer {
    pending: Vec<u8>,
    /// `pending` is text of the prompt, to be told once it is whole.
    again: bool,
}

impl Detokenizer {
    /// Starts behind `prompt`. As in vLLM, a prompt that ends within a character is told again from its beginning as soon
    /// as that character is whole.
    pub(crate) fn behind(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        let tail: Vec<u8> = prompt[prompt.len().saturating_sub(3)..]
            .iter()
            .flat_map(|&id| tokenizer.bytes(id))
            .copied()
            .collect();
        let start = (1..=tail.len().min(3)).find(|back| tail[tail.len() - back] >= 0xc0);
        let pending = start.map_or(Vec::new(), |back| tail[tail.len() - back..].to_vec());
        let unfinished =
            matches!(std::str::from_utf8(&pending), Err(error) if error.error_len().is_none());
        let all = || prompt.iter().filter(|&&id| !tokenizer.is_special(id));
        let bytes = || all().flat_map(|&id| tokenizer.bytes(id)).copied().collect();
        Self {
            pending: if unfinished { bytes() } else { Vec::new() },
            again: unfinished,
        }
    }

    /// The text that `bytes` completes; may be empty.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        if self.again {
            let end = std::str::from_utf8(&self.pending)
                .err()
                .map(|error| error.error_len());
            if end == Some(None) {
                return String::new();
            }
            self.again = false;
        }
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(bad) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + bad);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_the_pattern_of_the_file() {
        let pieces = |text: &str| {
            let (mut rest, mut out) = (text.as_bytes(), Vec::new());
            while !rest.is_empty() {
                let (piece, tail) = rest.split_at(piece_len(rest));
                out.push(String::from_utf8_lossy(piece).into_owned());
                rest = tail;
            }
            out
        };
        assert_eq!(
            pieces("Hi there,  you 12345\n é!"),
            ["Hi", " there", ",", "  ", "you", " 123", "45", "\n ", "é!"]
        );
        assert_eq!(pieces("a  "), ["a", "  "]);
        assert_eq!(pieces(" "), [" "]);
    }

    #[test]
    fn unfinished_characters_wait_and_wrong_bytes_are_replaced() {
        let mut detokenizer = Detokenizer::default();
        assert_eq!(detokenizer.push(&[0xf0, 0x9f]), "");
        assert_eq!(detokenizer.push(&[0x8e]), "");
        assert_eq!(detokenizer.push(&[0xa8, b'a']), "🎨a");
        assert_eq!(detokenizer.push(&[0xf0, b'b']), "\u{fffd}b");
    }

    #[test]
    fn a_prompt_that_ends_within_a_character_is_told_again() {
        let tokenizer = Tokenizer::embedded();
        let ids = tokenizer.encode("sky🎨");
        let (prompt, rest) = ids.split_at(ids.len() - 2);
        let mut detokenizer = Detokenizer::behind(&tokenizer, prompt);
        let text: String = rest
            .iter()
            .map(|&id| detokenizer.push(tokenizer.bytes(id)))
            .collect();
        assert_eq!(text, "sky🎨", "the prompt is told again");
    }
}
