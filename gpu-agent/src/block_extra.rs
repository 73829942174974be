//! What beside token ids distinguishes a canonical block: media, and whatever else an engine mixed into its own.
//!
//! # Media in a canonical block
//! `block_hash`'s `extra` bytes are the items *beginning* in the block (a longer one is carried on by the chain), by
//! rising offset: `01`, offset from the start of the canonical block (u32 LE), length of the identifier (u32 LE), the
//! identifier (UTF-8). Anything else an engine mixed in follows as `02`, offset of the engine's block in the canonical
//! one (u32 LE), length (u32 LE), its msgpack bytes: no router will produce those, so such a block never matches.

use crate::event::Extra;
use std::collections::BTreeSet;

/// What beside tokens belongs to one canonical block.
#[derive(Debug, Default)]
pub(crate) struct Items {
    media: BTreeSet<(u32, String)>,
    opaque: Vec<(u32, Vec<u8>)>,
}

impl Items {
    /// Adds those of an engine block that lie in its tokens `from..from + length`, which stand at `start` of the
    /// canonical block.
    pub(crate) fn add(&mut self, extra: &[Extra], from: usize, length: usize, start: usize) {
        let offset_in_block = |offset: usize| u32::try_from(start + offset).unwrap_or(u32::MAX);
        for item in extra {
            match item {
                Extra::Media { offset, id } => {
                    // Negative: began earlier, the chain carries it.
                    let Ok(offset) = usize::try_from(*offset) else {
                        continue;
                    };
                    if (from..from + length).contains(&offset) {
                        self.media
                            .insert((offset_in_block(offset - from), id.clone()));
                    }
                }
                Extra::Opaque(bytes) if from == 0 => {
                    self.opaque.push((offset_in_block(0), bytes.clone()))
                }
                Extra::Opaque(_) => {}
            }
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let media = self
            .media
            .iter()
            .map(|(offset, id)| (1u8, *offset, id.as_bytes()));
        let opaque = self
            .opaque
            .iter()
            .map(|(offset, bytes)| (2u8, *offset, bytes.as_slice()));
        let mut all = Vec::new();
        for (kind, offset, bytes) in media.chain(opaque) {
            all.push(kind);
            all.extend_from_slice(&offset.to_le_bytes());
            all.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            all.extend_from_slice(bytes);
        }
        all
    }
}
