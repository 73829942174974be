//! Answers "when does what happen in the engine": the step loop over the scheduler, and what handlers may ask of it.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::bootstrap::Rooms;
use super::config::{Config, Profile};
use super::events::{Event, encode_batch};
use super::fault::{Fault, FaultKind, Faults};
use super::model::{Model, mix};
use super::scheduler::{NewSequence, Output, Sampling, Scheduler, Step};
use super::stored::Store;
use super::tokenizer::Tokenizer;
use super::trtllm_events::EventQueue;
use super::zmtp::Publisher;

/// How long streams have to say their last words when the engine ends; vLLM takes about as long.
pub(crate) const LAST_WORDS: Duration = Duration::from_millis(20);

/// Unix time in seconds.
pub(crate) fn unix_s() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs_f64()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What one engine is made of; shared by the step loop and the connections.
pub(crate) struct Engine {
    pub(crate) config: Config,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) model: Arc<Model>,
    pub(crate) publisher: Publisher,
    /// TensorRT-LLM's events.
    pub(crate) event_queue: EventQueue,
    pub(crate) faults: Faults,
    /// Stored responses.
    pub(crate) responses: Store,
    /// Where a prefill engine meets decode engines.
    pub(crate) rooms: Rooms,
    /// External ids of generation requests in flight.
    in_flight: Mutex<Vec<String>>,
    /// What `/kv_event_sources` says; set once sockets are bound.
    pub(crate) event_sources: Mutex<String>,
    scheduler: Mutex<Scheduler>,
    wake: Notify,
    frozen_until: Mutex<Option<Instant>>,
    refused_until: Mutex<Option<Instant>>,
    pub(crate) refuse: Notify,
    dead: AtomicBool,
    died: Notify,
    dies_at: Mutex<Option<Instant>>,
    core_died: Notify,
    next_id: AtomicU64,
    id_salt: u64,
    transfer_port: AtomicU16,
    last_seed: Mutex<Option<u64>>,
    seeds_refused: AtomicU64,
}

impl Engine {
    pub(crate) fn new(config: Config, id_salt: u64) -> Self {
        let tokenizer = Arc::new(Tokenizer::embedded());
        let model = Arc::new(Model::new(&tokenizer));
        let faults = Faults::default();
        config.faults.iter().for_each(|fault| faults.arm(*fault));
        Self {
            publisher: Publisher::new(&config.topic),
            event_queue: EventQueue::new(
                config.event_buffer_max_size,
                config.kv_blocks,
                config.max_model_len,
                Duration::from_millis(config.event_quiet_ms),
            ),
            faults,
            responses: Store::default(),
            rooms: Rooms::default(),
            in_flight: Mutex::default(),
            event_sources: Mutex::new("{}".to_owned()),
            scheduler: Mutex::new(Scheduler::new(
                &config,
                Arc::clone(&tokenizer),
                Arc::clone(&model),
                unix_s(),
            )),
            tokenizer,
            model,
            wake: Notify::new(),
            frozen_until: Mutex::default(),
            refused_until: Mutex::default(),
            refuse: Notify::new(),
            dead: AtomicBool::new(false),
            died: Notify::new(),
            dies_at: Mutex::default(),
            core_died: Notify::new(),
            next_id: AtomicU64::new(1),
            id_salt: mix(config.seed ^ (id_salt << 32)),
            transfer_port: AtomicU16::new(0),
            last_seed: Mutex::default(),
            seeds_refused: AtomicU64::new(0),
            config,
        }
    }

    pub(crate) fn scheduler(&self) -> MutexGuard<'_, Scheduler> {
        lock(&self.scheduler)
    }

    /// External ids of the generation requests being answered.
    pub(crate) fn in_flight(&self) -> MutexGuard<'_, Vec<String>> {
        lock(&self.in_flight)
    }

    /// Where other engines fetch blocks.
    pub(crate) fn transfer_port(&self) -> u16 {
        self.transfer_port.load(Ordering::Relaxed)
    }

    pub(crate) fn set_transfer_port(&self, port: u16) {
        self.transfer_port.store(port, Ordering::Relaxed);
    }

    fn number(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// What the last chat brought.
    pub(crate) fn last_seed(&self) -> Option<u64> {
        *lock(&self.last_seed)
    }

    /// So many seeds were refused.
    pub(crate) fn seeds_refused(&self) -> u64 {
        self.seeds_refused.load(Ordering::Relaxed)
    }

    pub(crate) fn refuse_seed(&self) {
        self.seeds_refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_seed(&self, seed: Option<u64>) {
        *lock(&self.last_seed) = seed;
    }

    /// The seed of a sampled request that brings none.
    pub(crate) fn default_seed(&self) -> u64 {
        self.config.seed ^ self.number()
    }

    /// Sixteen hexadecimal digits, as vLLM makes up for a request without an id of its own.
    pub(crate) fn made_up_id(&self) -> String {
        format!("{:016x}", mix(self.id_salt ^ self.number()))
    }

    /// Starts the sequences of one request; dropping the handle aborts those still running.
    pub(crate) fn generate(
        self: &Arc<Self>,
        sequences: Vec<(Vec<u32>, Sampling)>,
        cache_salt: Option<&str>,
    ) -> Generation {
        let capacity = sequences
            .iter()
            .map(|(_, sampling)| sampling.max_tokens)
            .sum::<usize>()
            .max(1);
        let (to, from) = mpsc::channel(capacity);
        let wrong = self.faults.take_wrong_answer();
        let mut scheduler = self.scheduler();
        let add = |(index, (prompt, mut sampling)): (usize, (Vec<u32>, Sampling))| {
            sampling.wrong = wrong;
            let id = self.number();
            let cache_salt = cache_salt.map(str::to_owned);
            scheduler.add(NewSequence {
                id,
                index,
                prompt,
                sampling,
                cache_salt,
                to: to.clone(),
            });
            id
        };
        let ids = sequences.into_iter().enumerate().map(add).collect();
        if self.is_core_dead() {
            // Nobody will make steps for it: its channel closes, which its client sees as a dead engine.
            scheduler.abort_all();
        }
        drop(scheduler);
        self.wake.notify_one();
        Generation {
            engine: Arc::clone(self),
            ids,
            from,
        }
    }

    /// Makes steps as long as there is work, for ever.
    pub(crate) async fn run(&self) {
        let mut due = Instant::now();
        loop {
            self.thaw().await;
            let step = self.scheduler().schedule();
            let Some(step) = step else {
                self.wake.notified().await;
                due = Instant::now();
                continue;
            };
            due = due.max(Instant::now() - Duration::from_millis(2)) + self.duration(&step);
            if due > Instant::now() {
                tokio::time::sleep_until(due).await;
            } else {
                tokio::task::yield_now().await;
            }
            self.thaw().await;
            self.finish(&step);
        }
    }

    fn duration(&self, step: &Step) -> Duration {
        let prefill = step.prefill_tokens as f64 / self.config.prefill_tokens_per_s;
        let decode = if step.decodes {
            self.config.decode_itl_ms / 1000.0
        } else {
            0.0
        };
        Duration::from_secs_f64(prefill + decode)
    }

    fn finish(&self, step: &Step) {
        let (outputs, events) = self.scheduler().finish(step);
        if !events.is_empty() {
            self.publish(&events);
        }
        for (to, output) in outputs {
            // Room for max_tokens was made; only a client that left closes its channel.
            let _ = to.try_send(output);
        }
    }

    fn publish(&self, events: &[Event]) {
        let (profile, size) = (self.config.profile, self.config.block_size);
        if profile == Profile::Trtllm {
            return self.event_queue.publish(events, size);
        }
        self.publisher
            .publish(encode_batch(profile, unix_s(), events, size));
    }

    /// Empties the prefix cache and tells of it at once, as SGLang does; false while requests run.
    pub(crate) fn flush_cache(&self) -> bool {
        let mut scheduler = self.scheduler();
        let flushed = scheduler.reset_cache(false);
        let events = scheduler.take_events();
        drop(scheduler);
        if !events.is_empty() {
            self.publish(&events);
        }
        flushed
    }

    async fn thaw(&self) {
        loop {
            let until = *lock(&self.frozen_until);
            match until {
                Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
                _ => return,
            }
        }
    }

    /// Arms a fault, or does at once what needs no stream.
    pub(crate) fn fault(&self, fault: Fault) {
        let until = Some(Instant::now() + fault.duration());
        match fault.kind {
            FaultKind::Die if fault.after_tokens == 0 => self.die(),
            FaultKind::CoreDies if fault.after_tokens == 0 => self.core_dies(fault),
            FaultKind::LoseEvents if self.config.profile == Profile::Trtllm => {
                self.event_queue.lose(fault.count);
            }
            FaultKind::LoseEvents => self.publisher.lose(fault.count),
            FaultKind::Freeze if fault.after_tokens == 0 => self.freeze(fault),
            FaultKind::Refuse => {
                *lock(&self.refused_until) = until;
                self.refuse.notify_one();
            }
            FaultKind::Die
            | FaultKind::CoreDies
            | FaultKind::Freeze
            | FaultKind::Reset
            | FaultKind::Stall
            | FaultKind::Slow
            | FaultKind::Garbage
            | FaultKind::InBandError
            | FaultKind::Truncate
            | FaultKind::WrongAnswer
            | FaultKind::Http500 => self.faults.arm(fault),
        }
    }

    pub(crate) fn freeze(&self, fault: Fault) {
        let until = Some(Instant::now() + fault.duration());
        *lock(&self.frozen_until) = until;
    }

    /// Ends all streams with the error event, answers `/health` with 503 for a while, then dies.
    pub(crate) fn core_dies(&self, fault: Fault) {
        *lock(&self.dies_at) = Some(Instant::now() + fault.duration());
        self.scheduler().abort_all();
        self.core_died.notify_one();
    }

    /// Whether the core is gone and only HTTP is left.
    pub(crate) fn is_core_dead(&self) -> bool {
        lock(&self.dies_at).is_some()
    }

    /// Waits for a fault that ends the engine.
    pub(crate) async fn ended(&self) {
        tokio::select! {
            () = self.died.notified() => {}
            () = self.core_died.notified() => {
                let until = *lock(&self.dies_at);
                let soonest = Instant::now() + LAST_WORDS;
                tokio::time::sleep_until(until.map_or(soonest, |until| until.max(soonest))).await;
                self.die();
            }
        }
    }

    /// Until when no connection is accepted.
    pub(crate) fn refused_until(&self) -> Option<Instant> {
        *lock(&self.refused_until)
    }

    /// Ends the process as `kill -9` would, or in a library this engine with all its sockets.
    pub(crate) fn die(&self) {
        if self.config.die_exits_process {
            std::process::exit(137);
        }
        self.dead.store(true, Ordering::SeqCst);
        self.died.notify_one();
    }

    /// Whether `die` was called.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }
}

/// The sequences of one request while they are generated.
pub(crate) struct Generation {
    engine: Arc<Engine>,
    ids: Vec<u64>,
    from: mpsc::Receiver<Output>,
}

impl Generation {
    /// The next token of any of them; `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Output> {
        self.from.recv().await
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let mut scheduler = self.engine.scheduler();
        self.ids.iter().for_each(|id| scheduler.abort(*id));
    }
}
