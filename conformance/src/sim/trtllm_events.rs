//! Answers "what does `POST /kv_cache_events` of TensorRT-LLM 1.2 say": a bounded queue that reading empties.
//!
//! All is from the reference, nothing was recorded. Events are numbered from 0, which is `created`; the oldest are dropped when
//! the queue is full, and their numbers with them. An answer comes when nothing happened for `event_quiet_ms`, so from an engine that
//! is never quiet it does not; a reader that left does not end the reading. Blocks that are not full,
//! a second cache level and several attention windows are not simulated; salts are part of blocks' names and not told, as in 1.2.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::events::Event;

/// The queue.
pub(crate) struct EventQueue {
    /// Events kept; none at all if 0.
    max: usize,
    window: usize,
    /// How long nothing must have happened before an answer.
    quiet: Duration,
    state: Mutex<State>,
    more: Notify,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Value>,
    next: u64,
    /// Batches still to be withheld from whoever reads (a fault on command).
    lose: u64,
}

impl EventQueue {
    /// A queue of `max` events of an engine with `blocks` blocks and a window of `window` tokens.
    pub(crate) fn new(max: usize, blocks: usize, window: usize, quiet: Duration) -> Self {
        let queue = Self {
            max,
            window,
            quiet,
            state: Mutex::default(),
            more: Notify::new(),
        };
        queue.push(&json!({"type": "created", "num_blocks_per_cache_level": [blocks, 0]}));
        queue
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next `count` batches are numbered and told to nobody.
    pub(crate) fn lose(&self, count: u64) {
        self.state().lose += count;
    }

    /// Takes in what happened to blocks of `size` tokens.
    pub(crate) fn publish(&self, events: &[Event], size: usize) {
        let lost = {
            let mut state = self.state();
            let lost = state.lose > 0;
            state.lose -= u64::from(lost);
            lost
        };
        for event in events {
            match lost {
                true => self.state().next += 1,
                false => self.push(&told(event, size)),
            }
        }
    }

    fn push(&self, data: &Value) {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        if self.max == 0 {
            return;
        }
        if state.queue.len() == self.max {
            state.queue.pop_front();
        }
        let event = json!({"event_id": id, "data": data, "window_size": self.window});
        state.queue.push_back(event);
        drop(state);
        self.more.notify_one();
    }

    /// Everything told since the last reading, as one answer. What an engine without events says comes at once.
    pub(crate) async fn drain(&self) -> String {
        let mut events = self.take();
        // What wakes it first may be what was taken already.
        while self.max > 0
            && tokio::time::timeout(self.quiet, self.more.notified())
                .await
                .is_ok()
        {
            events.extend(self.take());
        }
        Value::Array(events).to_string()
    }

    fn take(&self) -> Vec<Value> {
        Vec::from(std::mem::take(&mut self.state().queue))
    }
}

fn told(event: &Event, size: usize) -> Value {
    match event {
        Event::Stored {
            hashes,
            parent,
            tokens,
            ..
        } => {
            let block = |(hash, tokens): (&u64, &[u32])| {
                let token =
                    |id: &u32| json!({"type": "unique_token", "token_id": id, "token_extra_id": 0});
                let tokens: Vec<Value> = tokens.iter().map(token).collect();
                json!({"type": "stored_block", "block_hash": hash, "tokens": tokens, "cache_level": 0, "priority": 35})
            };
            let blocks: Vec<Value> = hashes.iter().zip(tokens.chunks(size)).map(block).collect();
            json!({"type": "stored", "parent_hash": parent, "blocks": blocks})
        }
        Event::Removed { hash } => json!({"type": "removed", "block_hashes": [hash]}),
        Event::Cleared => unreachable!("nothing empties this engine's cache"),
    }
}
