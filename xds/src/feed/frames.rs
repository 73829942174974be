//! One message as frames of bounded size, and back.
//!
//! A broker refuses messages beyond about 1 MiB, and a frame of that size is also what a slow reader should have to hold
//! at once; so long lists of hashes and models are cut. Cutting loses nothing: what is put together is equal.

use super::{
    FeedBody, FeedError, FeedMessage,
    plain::{malformed, shelf, to_tier},
};
use crate::{
    report::{EngineId, EngineState, KvChange, KvSnapshot, Shelf},
    wire::outrigger::feed::v1 as wire,
};
use bytes::Bytes;
use prost::Message;
use std::collections::HashMap;
use wire::feed_frame::Body;

/// Size of a frame we make, in bytes (one model's card may exceed it).
pub const FRAME_BYTES_MAX: usize = 512 * 1024;

/// Size of a frame we accept, in bytes.
pub const FRAME_READ_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Hashes in one message that is being put together: 128 MiB of them.
pub const MESSAGE_HASHES_MAX: usize = 16 * 1024 * 1024;

/// Models in one message that is being put together.
const MESSAGE_MODELS_MAX: usize = 65_536;

/// Engines whose messages may be incomplete at once.
const PARTIAL_MESSAGES_MAX: usize = 4096;

/// Room in a frame for everything but lists.
const FRAME_HEAD_BYTES: usize = 16 * 1024;

/// Cost of an entry of a list beyond its hashes: tags, lengths, rank, tier.
const ENTRY_BYTES: usize = 32;

/// The frames of a message, each to be sent as one unit, in order.
#[must_use]
pub fn encode(message: &FeedMessage) -> Vec<Bytes> {
    to_frames(message)
        .iter()
        .map(|frame| frame.encode_to_vec().into())
        .collect()
}

pub(super) fn to_frames(message: &FeedMessage) -> Vec<wire::FeedFrame> {
    let bodies = match &message.body {
        FeedBody::State(state) => cut_state(state),
        FeedBody::Load(load) => vec![Body::Load(load.into())],
        FeedBody::Snapshot(snapshot) => cut_snapshot(snapshot),
        FeedBody::Changes(changes) => cut_changes(changes),
        FeedBody::Gone => vec![Body::Gone(wire::Gone {})],
    };
    let count = bodies.len();
    let frame = |(index, body): (usize, Body)| wire::FeedFrame {
        engine: message.engine.0.to_string(),
        epoch: message.epoch,
        seq: message.seq,
        part: u32::try_from(index).unwrap_or(u32::MAX),
        more: index + 1 < count,
        body: Some(body),
    };
    bodies.into_iter().enumerate().map(frame).collect()
}

fn cut_state(state: &EngineState) -> Vec<Body> {
    let mut whole = wire::EngineState::from(state);
    let mut rest = std::mem::take(&mut whole.models).into_iter().peekable();
    let mut bodies = Vec::new();
    while rest.peek().is_some() || bodies.is_empty() {
        let mut part = whole.clone();
        let mut room = FRAME_BYTES_MAX - FRAME_HEAD_BYTES;
        while let Some(model) =
            rest.next_if(|next| part.models.is_empty() || next.encoded_len() + ENTRY_BYTES <= room)
        {
            room = room.saturating_sub(model.encoded_len() + ENTRY_BYTES);
            part.models.push(model);
        }
        bodies.push(Body::State(part));
    }
    bodies
}

/// What one entry of a list says.
#[derive(Clone, Copy)]
enum Verb {
    Stored,
    Removed,
}

enum Piece {
    Blocks(Verb, wire::Blocks),
    Cleared(u32),
}

/// Fills frames with pieces; a list of hashes goes on in the next frame where one is full.
struct Cutter {
    frames: Vec<Vec<Piece>>,
    room: usize,
}

impl Cutter {
    fn new() -> Self {
        Self {
            frames: vec![Vec::new()],
            room: FRAME_BYTES_MAX - FRAME_HEAD_BYTES,
        }
    }

    fn push(&mut self, piece: Piece, bytes: usize) {
        self.room = self.room.saturating_sub(bytes);
        self.frames
            .last_mut()
            .expect("invariant: there is always a frame")
            .push(piece);
    }

    fn next_frame_if_full(&mut self) {
        if self.room < ENTRY_BYTES + size_of::<u64>() {
            self.frames.push(Vec::new());
            self.room = FRAME_BYTES_MAX - FRAME_HEAD_BYTES;
        }
    }

    fn cleared(&mut self, rank: u32) {
        self.next_frame_if_full();
        self.push(Piece::Cleared(rank), ENTRY_BYTES);
    }

    fn blocks(&mut self, verb: Verb, shelf: Shelf, mut hashes: &[u64]) {
        let mut continued = false;
        loop {
            self.next_frame_if_full();
            let fits = ((self.room - ENTRY_BYTES) / size_of::<u64>()).min(hashes.len());
            let (now, later) = hashes.split_at(fits);
            let tier = to_tier(shelf.tier).into();
            let blocks = wire::Blocks {
                rank: shelf.rank,
                tier,
                hashes: now.to_vec(),
                continued,
            };
            self.push(Piece::Blocks(verb, blocks), ENTRY_BYTES + size_of_val(now));
            if later.is_empty() {
                return;
            }
            hashes = later;
            continued = true;
        }
    }
}

fn cut_snapshot(snapshot: &KvSnapshot) -> Vec<Body> {
    let mut cutter = Cutter::new();
    for (shelf, hashes) in &snapshot.shelves {
        cutter.blocks(Verb::Stored, *shelf, hashes);
    }
    let frame = |pieces: Vec<Piece>| {
        let blocks = |piece| match piece {
            Piece::Blocks(_, blocks) => Some(blocks),
            Piece::Cleared(_) => None,
        };
        let shelves = pieces.into_iter().filter_map(blocks).collect();
        Body::Snapshot(wire::KvSnapshot {
            block_tokens: snapshot.block_tokens,
            shelves,
            complete: snapshot.complete,
        })
    };
    cutter.frames.into_iter().map(frame).collect()
}

fn cut_changes(changes: &[KvChange]) -> Vec<Body> {
    use wire::kv_change::Change;
    let mut cutter = Cutter::new();
    for change in changes {
        match change {
            KvChange::Stored { shelf, hashes } => cutter.blocks(Verb::Stored, *shelf, hashes),
            KvChange::Removed { shelf, hashes } => cutter.blocks(Verb::Removed, *shelf, hashes),
            KvChange::Cleared { rank } => cutter.cleared(*rank),
        }
    }
    let change = |piece| wire::KvChange {
        change: Some(match piece {
            Piece::Blocks(Verb::Stored, blocks) => Change::Stored(blocks),
            Piece::Blocks(Verb::Removed, blocks) => Change::Removed(blocks),
            Piece::Cleared(rank) => Change::Cleared(wire::Cleared { rank }),
        }),
    };
    let frame = |pieces: Vec<Piece>| {
        Body::Changes(wire::KvChanges {
            changes: pieces.into_iter().map(change).collect(),
        })
    };
    cutter.frames.into_iter().map(frame).collect()
}

/// Puts messages together from their frames. Frames of one engine come in order; engines may interleave.
#[derive(Debug, Default)]
pub struct Assembler {
    partial: HashMap<EngineId, Partial>,
}

#[derive(Debug)]
struct Partial {
    message: FeedMessage,
    next_part: u32,
    /// Hashes and models so far.
    size: usize,
}

impl Assembler {
    /// One more frame; a message if that completes it.
    ///
    /// # Errors
    /// [`FeedError::Malformed`] if the bytes are no frame, or no frame that may come now. What was being put together
    /// for that engine is dropped.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<FeedMessage>, FeedError> {
        if bytes.len() > FRAME_READ_BYTES_MAX {
            return Err(malformed(format!(
                "a frame of {} bytes, more than {FRAME_READ_BYTES_MAX}",
                bytes.len()
            )));
        }
        let frame = wire::FeedFrame::decode(bytes).map_err(|error| malformed(error.to_string()))?;
        self.push_frame(frame)
    }

    pub(super) fn push_frame(
        &mut self,
        frame: wire::FeedFrame,
    ) -> Result<Option<FeedMessage>, FeedError> {
        if frame.engine.is_empty() {
            return Err(malformed("no engine"));
        }
        let Some(body) = frame.body else {
            return Err(malformed("no body"));
        };
        let engine = EngineId::from(frame.engine.as_str());
        let place = (frame.epoch, frame.seq, frame.part);
        let partial = match self.partial.remove(&engine) {
            None => Partial::begin(engine, place, body)?,
            Some(partial) => partial.go_on(place, body)?,
        };
        if !frame.more {
            return Ok(Some(partial.message));
        }
        if self.partial.len() >= PARTIAL_MESSAGES_MAX {
            return Err(malformed(format!(
                "more than {PARTIAL_MESSAGES_MAX} incomplete messages"
            )));
        }
        self.partial.insert(partial.message.engine.clone(), partial);
        Ok(None)
    }
}

impl Partial {
    /// `place` is epoch, seq and part.
    fn begin(engine: EngineId, place: (u64, u64, u32), body: Body) -> Result<Self, FeedError> {
        let (epoch, seq, part) = place;
        if part != 0 {
            return Err(malformed(format!("part {part} of a message without start")));
        }
        let size = size(&body);
        let message = FeedMessage {
            engine,
            epoch,
            seq,
            body: first(body)?,
        };
        Self {
            message,
            next_part: 1,
            size,
        }
        .within_limits()
    }

    fn go_on(mut self, place: (u64, u64, u32), body: Body) -> Result<Self, FeedError> {
        let due = (self.message.epoch, self.message.seq, self.next_part);
        if due != place {
            return Err(malformed(format!(
                "epoch, seq, part {place:?} where {due:?} had to come"
            )));
        }
        self.size += size(&body);
        append(&mut self.message.body, body)?;
        self.next_part += 1;
        self.within_limits()
    }

    fn within_limits(self) -> Result<Self, FeedError> {
        let models = matches!(self.message.body, FeedBody::State(_));
        let max = if models {
            MESSAGE_MODELS_MAX
        } else {
            MESSAGE_HASHES_MAX
        };
        if self.size > max {
            Err(malformed(format!("a message of {} entries", self.size)))
        } else {
            Ok(self)
        }
    }
}

fn size(body: &Body) -> usize {
    use wire::kv_change::Change;
    match body {
        Body::State(state) => state.models.len(),
        Body::Load(_) | Body::Gone(_) => 0,
        // Entries count too, so that empty ones are no way around the limit.
        Body::Snapshot(snapshot) => snapshot
            .shelves
            .iter()
            .map(|blocks| blocks.hashes.len() + 1)
            .sum(),
        Body::Changes(changes) => {
            let each = changes.changes.iter().map(|change| match &change.change {
                Some(Change::Stored(blocks) | Change::Removed(blocks)) => blocks.hashes.len() + 1,
                Some(Change::Cleared(_)) | None => 1,
            });
            each.sum()
        }
    }
}

/// The body a message begins with.
fn first(body: Body) -> Result<FeedBody, FeedError> {
    let mut plain = match &body {
        Body::State(state) => FeedBody::State(EngineState::try_from(wire::EngineState {
            models: Vec::new(),
            ..state.clone()
        })?),
        Body::Load(load) => return Ok(FeedBody::Load((*load).try_into()?)),
        Body::Snapshot(snapshot) => FeedBody::Snapshot(KvSnapshot {
            block_tokens: snapshot.block_tokens,
            shelves: Vec::new(),
            complete: snapshot.complete,
        }),
        Body::Changes(_) => FeedBody::Changes(Vec::new()),
        Body::Gone(_) => return Ok(FeedBody::Gone),
    };
    append(&mut plain, body)?;
    Ok(plain)
}

/// Lists of a further frame go behind those we have.
fn append(plain: &mut FeedBody, body: Body) -> Result<(), FeedError> {
    match (plain, body) {
        (FeedBody::State(state), Body::State(part)) => {
            state.models.extend(part.models.into_iter().map(Into::into));
            Ok(())
        }
        (FeedBody::Snapshot(snapshot), Body::Snapshot(part)) => part
            .shelves
            .into_iter()
            .try_for_each(|blocks| append_shelf(&mut snapshot.shelves, blocks)),
        (FeedBody::Changes(changes), Body::Changes(part)) => part
            .changes
            .into_iter()
            .try_for_each(|change| append_change(changes, change)),
        _ => Err(malformed("parts of different kinds")),
    }
}

fn append_shelf(
    shelves: &mut Vec<(Shelf, Vec<u64>)>,
    blocks: wire::Blocks,
) -> Result<(), FeedError> {
    let shelf = shelf(&blocks)?;
    if !blocks.continued {
        shelves.push((shelf, blocks.hashes));
        return Ok(());
    }
    match shelves.last_mut() {
        Some((last, hashes)) if *last == shelf => {
            hashes.extend(blocks.hashes);
            Ok(())
        }
        _ => Err(malformed("a shelf continued that was not begun")),
    }
}

fn append_change(changes: &mut Vec<KvChange>, change: wire::KvChange) -> Result<(), FeedError> {
    use wire::kv_change::Change;
    let begun = changes.last_mut();
    let (verb, blocks) = match change.change {
        None => return Err(malformed("an empty change")),
        Some(Change::Cleared(wire::Cleared { rank })) => {
            changes.push(KvChange::Cleared { rank });
            return Ok(());
        }
        Some(Change::Stored(blocks)) => (Verb::Stored, blocks),
        Some(Change::Removed(blocks)) => (Verb::Removed, blocks),
    };
    let shelf = shelf(&blocks)?;
    match (blocks.continued, verb, begun) {
        (false, Verb::Stored, _) => changes.push(KvChange::Stored {
            shelf,
            hashes: blocks.hashes,
        }),
        (false, Verb::Removed, _) => changes.push(KvChange::Removed {
            shelf,
            hashes: blocks.hashes,
        }),
        (true, Verb::Stored, Some(KvChange::Stored { shelf: of, hashes }))
        | (true, Verb::Removed, Some(KvChange::Removed { shelf: of, hashes }))
            if *of == shelf =>
        {
            hashes.extend(blocks.hashes);
        }
        (true, ..) => return Err(malformed("a change continued that was not begun")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{EngineKind, GoldenAnswer, Health, Load, Model, Role, Tier};
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use std::time::Duration;

    fn message(seq: u64, body: FeedBody) -> FeedMessage {
        FeedMessage {
            engine: "node/127.0.0.1:8000".into(),
            epoch: u64::MAX - 1,
            seq,
            body,
        }
    }

    fn shelf(rank: u32, tier: Tier) -> Shelf {
        Shelf { rank, tier }
    }

    fn state(models: usize, card_bytes: usize) -> EngineState {
        let model = |index: usize| Model {
            id: format!("model-{index}"),
            parent: (index % 2 == 1).then(|| "model-0".to_owned()),
            context_tokens: 8192,
            root: "/models/a".into(),
            card: "x".repeat(card_bytes),
        };
        EngineState {
            kind: EngineKind::Sglang,
            version: "0.5".into(),
            models: (0..models).map(model).collect(),
            role: Role::Decode,
            health: Health::Draining,
            reason: "asked to".into(),
            block_tokens: 16,
            kv_blocks: 1 << 40,
            dp_size: 2,
            kv_events: true,
            bootstrap: "10.0.0.1:8998".into(),
            numerics: "dtype=bfloat16 cohort=a".into(),
            golden: Some(GoldenAnswer {
                cohort: "vllm 0.32 m".into(),
                tokens: vec![" 10".into(), ",".into()],
                clear: 1,
            }),
        }
    }

    /// One of each kind, with the corners that protobuf's defaults could lose.
    fn small() -> Vec<FeedMessage> {
        let load = Load {
            kv_usage: 0.5,
            waiting: 3,
            engine_age: Some(Duration::ZERO),
            engine_tokens: Some(0),
            ..Load::default()
        };
        let snapshot = KvSnapshot {
            block_tokens: 32,
            shelves: vec![
                (shelf(0, Tier::Device), vec![0, u64::MAX]),
                (shelf(3, Tier::Disk), Vec::new()),
            ],
            complete: true,
        };
        let changes = vec![
            KvChange::Stored {
                shelf: shelf(0, Tier::Device),
                hashes: vec![1],
            },
            KvChange::Stored {
                shelf: shelf(0, Tier::Device),
                hashes: vec![2],
            },
            KvChange::Removed {
                shelf: shelf(1, Tier::Remote),
                hashes: Vec::new(),
            },
            KvChange::Cleared { rank: 7 },
        ];
        vec![
            message(0, FeedBody::State(EngineState::default())),
            message(1, FeedBody::State(state(3, 10))),
            message(2, FeedBody::Load(Load::default())),
            message(3, FeedBody::Load(load)),
            message(4, FeedBody::Snapshot(KvSnapshot::default())),
            message(5, FeedBody::Snapshot(snapshot)),
            message(6, FeedBody::Changes(Vec::new())),
            message(7, FeedBody::Changes(changes)),
            message(u64::MAX, FeedBody::Gone),
        ]
    }

    /// Messages too large for one frame.
    fn large() -> Vec<FeedMessage> {
        let hashes = |count: u64| {
            (0..count)
                .map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15))
                .collect::<Vec<u64>>()
        };
        let shelves = vec![
            (shelf(0, Tier::Device), hashes(200_000)),
            (shelf(0, Tier::Host), hashes(70_000)),
        ];
        let single = |n: u64| match n % 3 {
            0 => KvChange::Stored {
                shelf: shelf(0, Tier::Device),
                hashes: vec![n],
            },
            1 => KvChange::Removed {
                shelf: shelf(0, Tier::Device),
                hashes: vec![n],
            },
            _ => KvChange::Cleared { rank: 1 },
        };
        let mut changes: Vec<KvChange> = (0..60_000).map(single).collect();
        changes.push(KvChange::Stored {
            shelf: shelf(1, Tier::Device),
            hashes: hashes(150_000),
        });
        vec![
            message(9, FeedBody::State(state(40, 100_000))),
            message(
                10,
                FeedBody::Snapshot(KvSnapshot {
                    block_tokens: 32,
                    shelves,
                    complete: false,
                }),
            ),
            message(11, FeedBody::Changes(changes)),
        ]
    }

    #[test]
    fn what_was_cut_is_put_together_equal() {
        for (messages, cut) in [(small(), false), (large(), true)] {
            for message in messages {
                let frames = encode(&message);
                assert_eq!(frames.len() > 1, cut, "{} frames", frames.len());
                assert!(frames.iter().all(|frame| frame.len() <= FRAME_BYTES_MAX));
                let mut assembler = Assembler::default();
                let (last, others) = frames.split_last().expect("at least one");
                for frame in others {
                    assert_eq!(assembler.push(frame), Ok(None));
                }
                assert_eq!(assembler.push(last), Ok(Some(message)));
                assert!(assembler.partial.is_empty());
            }
        }
    }

    #[test]
    fn engines_may_interleave() {
        let one = large().remove(1);
        let other = FeedMessage {
            engine: "other".into(),
            ..one.clone()
        };
        let mut assembler = Assembler::default();
        let mut whole = Vec::new();
        for (a, b) in encode(&one).iter().zip(&encode(&other)) {
            whole.extend(assembler.push(a).expect("fits"));
            whole.extend(assembler.push(b).expect("fits"));
        }
        assert_eq!(whole, [one, other]);
    }

    #[test]
    fn a_lost_or_foreign_frame_is_noticed() {
        let frames = encode(&large().remove(1));
        assert!(frames.len() >= 4);
        let gap = |order: &[usize]| {
            let mut assembler = Assembler::default();
            let (last, before) = order.split_last().expect("not empty");
            before
                .iter()
                .for_each(|index| assert_eq!(assembler.push(&frames[*index]), Ok(None)));
            assert!(
                matches!(assembler.push(&frames[*last]), Err(FeedError::Malformed(_))),
                "{order:?}"
            );
            assert!(assembler.partial.is_empty(), "what is spoilt is dropped");
        };
        gap(&[1]);
        gap(&[0, 2]);
        gap(&[0, 1, 1]);
        gap(&[0, 1, 0]);
        let mut assembler = Assembler::default();
        assert_eq!(assembler.push(&frames[0]), Ok(None));
        let another = encode(&message(10, FeedBody::Gone)).remove(0);
        assert!(
            assembler.push(&another).is_err(),
            "a message that begins before the last one ended"
        );
    }

    #[test]
    fn too_much_is_refused() {
        let body = Body::Snapshot(wire::KvSnapshot {
            shelves: vec![wire::Blocks {
                tier: 1,
                hashes: vec![0; MESSAGE_HASHES_MAX / 2],
                ..Default::default()
            }],
            ..Default::default()
        });
        let frame = |part| wire::FeedFrame {
            engine: "a".into(),
            part,
            more: true,
            body: Some(body.clone()),
            ..Default::default()
        };
        let mut assembler = Assembler::default();
        assert_eq!(assembler.push_frame(frame(0)), Ok(None));
        assert!(assembler.push_frame(frame(1)).is_err());
        assert!(assembler.push(&vec![0; FRAME_READ_BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn garbage_is_an_error_and_never_a_panic() {
        let mut random = StdRng::seed_from_u64(7);
        let valid: Vec<Bytes> = small().iter().flat_map(encode).collect();
        let mut refused = 0;
        for round in 0..20_000 {
            let mut bytes = valid[round % valid.len()].to_vec();
            for _ in 0..random.random_range(1..4) {
                match random.random_range(0..4) {
                    0 if !bytes.is_empty() => {
                        let at = random.random_range(0..bytes.len());
                        bytes[at] ^= 1 << random.random_range(0..8);
                    }
                    1 => bytes.truncate(random.random_range(0..=bytes.len())),
                    2 => bytes.insert(random.random_range(0..=bytes.len()), random.random()),
                    _ => bytes.extend(valid[random.random_range(0..valid.len())].iter().take(9)),
                }
            }
            let mut assembler = Assembler::default();
            match assembler.push(&bytes) {
                Ok(Some(message)) => assert!(
                    !encode(&message).is_empty(),
                    "what was understood can be told again"
                ),
                Ok(None) => assert_eq!(assembler.partial.len(), 1),
                Err(error) => {
                    refused += 1;
                    assert!(matches!(error, FeedError::Malformed(_)));
                }
            }
        }
        assert!(refused > 2_000, "the mutations must hurt: {refused}");
    }
}
