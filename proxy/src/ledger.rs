//! What runs on the engines beside this proxy: the inbound side's own account of their load.
//!
//! Requests and prefill tokens are plain atomics. Distinct prompt blocks need a table, which one task owns; requests
//! tell it through a queue, so that no request waits for another.

use crate::canary::{Traffic, Verdict};
use ahash::AHashMap;
use arc_swap::ArcSwap;
use outrigger_filters::endpoints::Want;
use outrigger_xds::{
    block_hash::BlockHash,
    report::{EngineId, Load},
};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
};
use tokio::sync::mpsc;

/// Changes waiting for the table; a request makes two of them.
const QUEUE_CHANGES_MAX: usize = 65_536;

/// The account of one engine.
#[derive(Debug)]
pub struct Ledger {
    requests: AtomicU64,
    prefill_tokens: AtomicU64,
    blocks: Arc<AtomicU64>,
    changes: mpsc::Sender<Change>,
    /// The admin wants the engine to be left; peers are told.
    leaving: AtomicBool,
    /// What its requests prove of it.
    pub traffic: Traffic,
    /// Whether it does its work; peers are told.
    verdict: ArcSwap<Verdict>,
}

#[derive(Debug)]
enum Change {
    Begin(Arc<[BlockHash]>),
    End(Arc<[BlockHash]>),
}

impl Ledger {
    /// A new account; its table is kept on the current runtime.
    fn new() -> Arc<Self> {
        let (changes, queue) = mpsc::channel(QUEUE_CHANGES_MAX);
        let blocks = Arc::new(AtomicU64::new(0));
        tokio::spawn(keep_table(queue, blocks.clone()));
        Arc::new(Self {
            requests: AtomicU64::new(0),
            prefill_tokens: AtomicU64::new(0),
            blocks,
            changes,
            leaving: AtomicBool::new(false),
            traffic: Traffic::default(),
            verdict: ArcSwap::default(),
        })
    }

    /// Enters one request.
    #[must_use]
    pub fn enter(self: &Arc<Self>, want: &Want) -> Entered {
        let prefill = want.prompt_tokens.saturating_sub(want.hit_tokens);
        self.requests.fetch_add(1, Relaxed);
        self.prefill_tokens.fetch_add(prefill, Relaxed);
        let told = !want.blocks.is_empty()
            && self
                .changes
                .try_send(Change::Begin(want.blocks.clone()))
                .is_ok();
        if !told && !want.blocks.is_empty() {
            metrics::counter!("outrigger_ledger_overflow_total").increment(1);
        }
        Entered {
            ledger: self.clone(),
            prefill,
            blocks: told.then(|| want.blocks.clone()),
        }
    }

    /// Whether the engine is to be left.
    pub fn leave(&self, leaving: bool) {
        self.leaving.store(leaving, Relaxed);
    }

    /// See [`Self::leave`].
    pub fn is_left(&self) -> bool {
        self.leaving.load(Relaxed)
    }

    /// Takes in what its canary says.
    pub fn tell(&self, verdict: Verdict) {
        if **self.verdict.load() != verdict {
            self.verdict.store(Arc::new(verdict));
        }
    }

    /// See [`Self::tell`].
    #[must_use]
    pub fn verdict(&self) -> Arc<Verdict> {
        self.verdict.load_full()
    }

    /// Its part of a load report.
    pub fn fill(&self, load: &mut Load) {
        load.active_requests = self.requests.load(Relaxed);
        load.active_prefill_tokens = self.prefill_tokens.load(Relaxed);
        load.active_blocks = self.blocks.load(Relaxed);
    }
}

/// A request on an engine, until dropped.
#[derive(Debug)]
pub struct Entered {
    ledger: Arc<Ledger>,
    prefill: u64,
    blocks: Option<Arc<[BlockHash]>>,
}

impl Entered {
    /// What its engine's requests prove.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.ledger.traffic
    }

    /// Prefill is over.
    pub fn first_byte(&mut self) {
        let prefill = std::mem::take(&mut self.prefill);
        self.ledger.prefill_tokens.fetch_sub(prefill, Relaxed);
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.first_byte();
        self.ledger.requests.fetch_sub(1, Relaxed);
        let Some(blocks) = self.blocks.take() else {
            return;
        };
        if let Err(mpsc::error::TrySendError::Full(change)) =
            self.ledger.changes.try_send(Change::End(blocks))
        {
            // What was begun must be ended, or the account would grow for ever.
            let changes = self.ledger.changes.clone();
            tokio::spawn(async move { changes.send(change).await });
        }
    }
}

async fn keep_table(mut queue: mpsc::Receiver<Change>, distinct: Arc<AtomicU64>) {
    let mut table: AHashMap<BlockHash, u32> = AHashMap::new();
    while let Some(change) = queue.recv().await {
        match change {
            Change::Begin(blocks) => {
                for &block in blocks.iter() {
                    *table.entry(block).or_default() += 1;
                }
            }
            Change::End(blocks) => {
                for block in blocks.iter() {
                    if let Some(count) = table.get_mut(block) {
                        *count -= 1;
                        if *count == 0 {
                            table.remove(block);
                        }
                    }
                }
            }
        }
        distinct.store(table.len() as u64, Relaxed);
    }
}

/// The accounts of all engines beside this proxy.
#[derive(Debug, Default)]
pub struct Ledgers {
    by_engine: Mutex<AHashMap<EngineId, Arc<Ledger>>>,
}

impl Ledgers {
    /// The account of an engine, opened if it has none. Not for the request path.
    pub fn open(&self, engine: &EngineId) -> Arc<Ledger> {
        let mut by_engine = self
            .by_engine
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        by_engine
            .entry(engine.clone())
            .or_insert_with(Ledger::new)
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(tokens: u64, hits: u64, blocks: &[u64]) -> Want {
        Want {
            prompt_tokens: tokens,
            hit_tokens: hits,
            blocks: blocks.into(),
            ..Want::default()
        }
    }

    async fn load(ledger: &Ledger) -> (u64, u64, u64) {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        let mut load = Load::default();
        ledger.fill(&mut load);
        (
            load.active_requests,
            load.active_prefill_tokens,
            load.active_blocks,
        )
    }

    #[tokio::test]
    async fn shared_blocks_count_once_and_everything_is_given_back() {
        let ledger = Ledger::new();
        let mut first = ledger.enter(&want(100, 64, &[1, 2, 3]));
        let second = ledger.enter(&want(50, 0, &[1, 2, 9]));
        assert_eq!(load(&ledger).await, (2, 86, 4));
        first.first_byte();
        first.first_byte();
        assert_eq!(load(&ledger).await, (2, 50, 4), "prefill ends once");
        drop(first);
        assert_eq!(load(&ledger).await, (1, 50, 3));
        drop(second);
        assert_eq!(load(&ledger).await, (0, 0, 0));
    }
}
