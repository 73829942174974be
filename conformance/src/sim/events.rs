//! Answers "what does a batch of KV events look like in bytes": the msgpack of `[time, events, rank]` of vLLM 0.32 and
//! SGLang 0.5.23.
//!
//! Events are maps with the keys in the recorded order; integers take their shortest form. Only what is needed is
//! encoded, nothing is decoded.

use super::config::Profile;

/// One change of the block cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Consecutive blocks of one request now hold these tokens.
    Stored {
        /// One hash per block, in order.
        hashes: Vec<u64>,
        /// The block before the first of them; `None` at the start of a prompt.
        parent: Option<u64>,
        /// The tokens of all blocks.
        tokens: Vec<u32>,
        /// `cache_salt` of the request, announced with its first block only.
        salt: Option<String>,
    },
    /// One physical block lost its content.
    Removed {
        /// The hash under which it was stored.
        hash: u64,
    },
    /// The whole cache was reset.
    Cleared,
}

/// The payload of one batch. `time_s` is Unix time.
pub(crate) fn encode_batch(
    profile: Profile,
    time_s: f64,
    events: &[Event],
    block_size: usize,
) -> Vec<u8> {
    let mut out = Packer(Vec::with_capacity(256));
    out.array(3);
    out.0.push(0xcb);
    out.0.extend_from_slice(&time_s.to_bits().to_be_bytes());
    out.array(events.len());
    for event in events {
        match profile {
            Profile::Vllm | Profile::Trtllm => out.event(event, block_size),
            Profile::Sglang => out.sglang_event(event, block_size),
        }
    }
    out.uint(0);
    out.0
}

struct Packer(Vec<u8>);

impl Packer {
    fn event(&mut self, event: &Event, block_size: usize) {
        match event {
            Event::Stored {
                hashes,
                parent,
                tokens,
                salt,
            } => {
                self.map(11, "BlockStored");
                self.key_hashes(hashes);
                self.str("parent_block_hash");
                match parent {
                    Some(hash) => self.uint(*hash),
                    None => self.nil(),
                }
                self.str("token_ids");
                self.array(tokens.len());
                tokens.iter().for_each(|&token| self.uint(u64::from(token)));
                self.str("block_size");
                self.uint(block_size as u64);
                self.str("lora_id");
                self.nil();
                self.medium();
                self.str("lora_name");
                self.nil();
                self.str("extra_keys");
                self.extra_keys(
                    hashes.len(),
                    parent.is_none().then_some(salt.as_deref()).flatten(),
                );
                self.group();
                self.str("kv_cache_spec_kind");
                self.str("full_attention");
            }
            Event::Removed { hash } => {
                self.map(4, "BlockRemoved");
                self.key_hashes(&[*hash]);
                self.medium();
                self.group();
            }
            Event::Cleared => self.map(1, "AllBlocksCleared"),
        }
    }

    /// SGLang's maps have fewer keys, and its hashes have a sign.
    fn sglang_event(&mut self, event: &Event, block_size: usize) {
        match event {
            Event::Stored {
                hashes,
                parent,
                tokens,
                salt,
            } => {
                self.map(7 + u8::from(salt.is_some()), "BlockStored");
                self.str("block_hashes");
                self.array(hashes.len());
                hashes.iter().for_each(|&hash| self.int(hash));
                self.str("parent_block_hash");
                match parent {
                    Some(hash) => self.int(*hash),
                    None => self.nil(),
                }
                self.str("token_ids");
                self.array(tokens.len());
                tokens.iter().for_each(|&token| self.uint(u64::from(token)));
                self.str("block_size");
                self.uint(block_size as u64);
                self.str("lora_id");
                self.nil();
                self.medium();
                if let Some(salt) = salt {
                    self.str("cache_salt");
                    self.str(salt);
                }
            }
            Event::Removed { hash } => {
                self.map(3, "BlockRemoved");
                self.str("block_hashes");
                self.array(1);
                self.int(*hash);
                self.medium();
            }
            Event::Cleared => self.map(1, "AllBlocksCleared"),
        }
    }

    /// One entry per block: what else than tokens went into its hash.
    fn extra_keys(&mut self, blocks: usize, salt: Option<&str>) {
        self.array(blocks);
        for block in 0..blocks {
            match salt {
                Some(salt) if block == 0 => {
                    self.array(1);
                    self.str(salt);
                }
                _ => self.nil(),
            }
        }
    }

    fn map(&mut self, len: u8, kind: &str) {
        self.0.push(0x80 | len);
        self.str("type");
        self.str(kind);
    }

    fn key_hashes(&mut self, hashes: &[u64]) {
        self.str("block_hashes");
        self.array(hashes.len());
        hashes.iter().for_each(|&hash| self.uint(hash));
    }

    fn medium(&mut self) {
        self.str("medium");
        self.str("GPU");
    }

    fn group(&mut self) {
        self.str("group_idx");
        self.uint(0);
    }

    fn nil(&mut self) {
        self.0.push(0xc0);
    }

    fn array(&mut self, len: usize) {
        match len {
            0..16 => self.0.push(0x90 | len as u8),
            16..0x1_0000 => {
                self.0.push(0xdc);
                self.0.extend_from_slice(&(len as u16).to_be_bytes());
            }
            _ => {
                self.0.push(0xdd);
                self.0.extend_from_slice(&(len as u32).to_be_bytes());
            }
        }
    }

    fn str(&mut self, text: &str) {
        match text.len() {
            len @ 0..32 => self.0.push(0xa0 | len as u8),
            len @ 32..256 => self.0.extend_from_slice(&[0xd9, len as u8]),
            len => {
                self.0.push(0xda);
                self.0.extend_from_slice(&(len as u16).to_be_bytes());
            }
        }
        self.0.extend_from_slice(text.as_bytes());
    }

    /// A hash as a number with a sign.
    fn int(&mut self, hash: u64) {
        let value = hash.cast_signed();
        if value >= 0 {
            return self.uint(hash);
        }
        self.0.push(0xd3);
        self.0.extend_from_slice(&value.to_be_bytes());
    }

    fn uint(&mut self, value: u64) {
        match value {
            0..0x80 => self.0.push(value as u8),
            0x80..0x100 => self.0.extend_from_slice(&[0xcc, value as u8]),
            0x100..0x1_0000 => {
                self.0.push(0xcd);
                self.0.extend_from_slice(&(value as u16).to_be_bytes());
            }
            0x1_0000..0x1_0000_0000 => {
                self.0.push(0xce);
                self.0.extend_from_slice(&(value as u32).to_be_bytes());
            }
            _ => {
                self.0.push(0xcf);
                self.0.extend_from_slice(&value.to_be_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn number(value: &Value) -> Option<u64> {
        value.as_u64().or(value.as_i64().map(i64::cast_unsigned))
    }

    fn event(recorded: &Value) -> Event {
        let numbers = |name: &str| {
            recorded[name]
                .as_array()
                .expect(name)
                .iter()
                .map(|n| number(n).expect("number"))
        };
        match recorded["type"].as_str().expect("type") {
            "BlockStored" => Event::Stored {
                hashes: numbers("block_hashes").collect(),
                parent: number(&recorded["parent_block_hash"]),
                tokens: numbers("token_ids").map(|token| token as u32).collect(),
                salt: recorded["extra_keys"][0][0].as_str().map(str::to_owned),
            },
            "BlockRemoved" => Event::Removed {
                hash: numbers("block_hashes").next().expect("one hash"),
            },
            "AllBlocksCleared" => Event::Cleared,
            other => panic!("{other} was not expected"),
        }
    }

    /// Every batch a real vLLM 0.32.0 or SGLang 0.5.23 sent is made again from its meaning, byte for byte.
    #[test]
    fn recorded_batches_are_encoded_to_the_same_bytes() {
        let mut batches = 0;
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/kv-events");
        let names = [
            "vllm-0.32.0-a",
            "vllm-0.32.0-evict",
            "vllm-0.32.0-b-then-nixl-decode",
            "sglang-0.5.23",
        ];
        for name in names {
            let (profile, size) = match name.starts_with("sglang") {
                true => (Profile::Sglang, 1),
                false => (Profile::Vllm, 32),
            };
            let lines = std::fs::read_to_string(format!("{dir}/{name}.jsonl")).expect("recording");
            for line in lines.lines() {
                let line: Value = serde_json::from_str(line).expect("json");
                let events: Vec<Event> = line["decoded"][1]
                    .as_array()
                    .expect("events")
                    .iter()
                    .map(event)
                    .collect();
                let recorded = line["frames_hex"][2].as_str().expect("payload");
                let time = u64::from_str_radix(&recorded[4..20], 16)
                    .expect("eight bytes behind the array's head");
                let bytes = encode_batch(profile, f64::from_bits(time), &events, size);
                let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                assert_eq!(hex, recorded, "{name} seq {}", line["seq"]);
                batches += 1;
            }
        }
        assert!(batches > 30, "only {batches} batches were compared");
    }
}
