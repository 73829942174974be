//! Answers "which tokens does a step make, and which blocks does it touch": the engine core without time or sockets.
//!
//! One step is `schedule` (choose requests, find prefixes, give out blocks) and, once its duration has passed,
//! `finish` (one token for each request whose prompt is computed). The order follows vLLM: running requests first,
//! then waiting ones while slots, tokens and blocks last; a running request without a block preempts the youngest.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::mpsc;

use super::blocks::{BlockId, BlockPool, block_hash};
use super::config::Config;
use super::events::Event;
use super::metrics_page::Metrics;
use super::model::{Choice, History, Model, mix};
use super::nixl::{Held, Transfer};
use super::tokenizer::{Detokenizer, EOS, Tokenizer};

/// Makes a greedy answer that of another model.
const WRONG_SALT: u64 = 0x77_72_6f_6e_67;

/// Why a generation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// `max_tokens` or the model's length.
    Length,
    /// The model ended its turn.
    Eos,
    /// A token of `stop_token_ids`.
    StopToken(u32),
    /// A string of `stop`.
    StopString(String),
}

/// How to generate; names are those of the API.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sampling {
    pub(crate) max_tokens: usize,
    pub(crate) min_tokens: usize,
    pub(crate) temperature: f64,
    pub(crate) seed: Option<u64>,
    pub(crate) ignore_eos: bool,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) include_stop_str_in_output: bool,
    /// How many runners-up to tell with each token; `None`: no probabilities at all.
    pub(crate) logprobs: Option<usize>,
    /// The tokens of the form that is asked for, then the end; `None`: what the model likes.
    pub(crate) given: Option<Arc<[u32]>>,
    /// Compute the whole prompt: who asks for figures of its tokens cannot have them from the cache.
    pub(crate) skip_cache: bool,
    /// What it has to do with another engine.
    pub(crate) transfer: Transfer,
    /// Another model answers.
    pub(crate) wrong: bool,
}

impl Sampling {
    /// What makes this sample its own: 0 for greedy decoding.
    pub(crate) fn salt(&self, default_seed: u64, index: usize) -> u64 {
        if self.temperature > 0.0 {
            mix(mix(self.seed.unwrap_or(default_seed)) ^ index as u64) | 1
        } else if self.wrong {
            WRONG_SALT
        } else {
            0
        }
    }
}

/// One token of one choice of a request.
#[derive(Debug)]
pub(crate) struct Output {
    /// Which choice.
    pub(crate) index: usize,
    pub(crate) choice: Choice,
    /// Text that became certain with this token.
    pub(crate) text: String,
    pub(crate) finish: Option<Finish>,
    /// Prompt tokens found in the cache.
    pub(crate) cached_tokens: usize,
    /// With the last token: the blocks kept for another engine, under this number.
    pub(crate) held: Option<(u64, Vec<BlockId>)>,
}

/// A sequence to generate.
pub(crate) struct NewSequence {
    pub(crate) id: u64,
    pub(crate) index: usize,
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: Sampling,
    pub(crate) cache_salt: Option<String>,
    pub(crate) to: mpsc::Sender<Output>,
}

struct Sequence {
    new: NewSequence,
    /// Prompt and generated tokens.
    tokens: Vec<u32>,
    history: History,
    salt: u64,
    detokenizer: Detokenizer,
    /// Text of all tokens, and how much of it was told.
    text: String,
    told: usize,
    computed: usize,
    blocks: Vec<BlockId>,
    /// Hashes of the full blocks of `tokens`, as far as they were needed.
    hashes: Vec<u64>,
    /// Leading blocks whose content has a name in the pool.
    named_blocks: usize,
    cached_tokens: usize,
    arrived: Instant,
    admitted: Option<Instant>,
    last_token: Option<Instant>,
    first_token: Option<Instant>,
}

/// What a scheduled step will do.
pub(crate) struct Step {
    /// Sequence ids and how many tokens each computes.
    work: Vec<(u64, usize)>,
    /// Tokens of prompts.
    pub(crate) prefill_tokens: usize,
    /// Whether any request generates.
    pub(crate) decodes: bool,
}

/// The engine core.
pub(crate) struct Scheduler {
    config: Config,
    tokenizer: Arc<Tokenizer>,
    model: Arc<Model>,
    pool: BlockPool,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    pub(crate) held: Held,
    pub(crate) metrics: Metrics,
}

impl Scheduler {
    pub(crate) fn new(
        config: &Config,
        tokenizer: Arc<Tokenizer>,
        model: Arc<Model>,
        started_s: f64,
    ) -> Self {
        Self {
            model,
            tokenizer,
            pool: BlockPool::new(config.kv_blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            held: Held::default(),
            metrics: Metrics::new(started_s),
            config: config.clone(),
        }
    }

    /// Queues a sequence.
    pub(crate) fn add(&mut self, new: NewSequence) {
        self.waiting.push_back(Sequence {
            history: match &new.sampling.transfer {
                Transfer::Pulled(tokens) => History::of(tokens),
                Transfer::None | Transfer::Hold => History::of(&new.prompt),
            },
            salt: new.sampling.salt(self.config.seed ^ new.id, new.index),
            detokenizer: Detokenizer::behind(&self.tokenizer, &new.prompt),
            tokens: new.prompt.clone(),
            new,
            text: String::new(),
            told: 0,
            computed: 0,
            blocks: Vec::new(),
            hashes: Vec::new(),
            named_blocks: 0,
            cached_tokens: 0,
            arrived: Instant::now(),
            admitted: None,
            last_token: None,
            first_token: None,
        });
    }

    /// Drops a sequence whose client is gone. Its blocks stay cached.
    pub(crate) fn abort(&mut self, id: u64) {
        self.waiting.retain(|sequence| sequence.new.id != id);
        if let Some(at) = self
            .running
            .iter()
            .position(|sequence| sequence.new.id == id)
        {
            let sequence = self.running.remove(at);
            self.pool.release(&sequence.blocks);
        }
    }

    /// Drops all sequences, as the end of the engine's process does: their channels close without a last token.
    pub(crate) fn abort_all(&mut self) {
        self.waiting.clear();
        for sequence in std::mem::take(&mut self.running) {
            self.pool.release(&sequence.blocks);
        }
    }

    /// Gives back blocks that were kept for another engine.
    pub(crate) fn free(&mut self, blocks: &[BlockId]) {
        self.pool.release(blocks);
    }

    /// Requests that wait, run, and the share of blocks in use.
    pub(crate) fn load(&self) -> (usize, usize, f64) {
        (self.waiting.len(), self.running.len(), self.pool.usage())
    }

    /// Resets the prefix cache, preempting running requests first if asked to.
    pub(crate) fn reset_cache(&mut self, preempt_running: bool) -> bool {
        while preempt_running && !self.running.is_empty() {
            self.preempt_youngest();
        }
        self.pool.clear()
    }

    /// Events that wait for no step.
    pub(crate) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.pool.events)
    }

    /// Chooses the work of the next step; `None` when there is none.
    pub(crate) fn schedule(&mut self) -> Option<Step> {
        let mut step = Step {
            work: Vec::new(),
            prefill_tokens: 0,
            decodes: false,
        };
        let mut budget = self.config.batch_tokens;
        let mut at = 0;
        let running_before = self.running.len();
        while at < self.running.len() && budget > 0 {
            let sequence = &self.running[at];
            let count = (sequence.tokens.len() - sequence.computed).min(budget);
            if !self.make_room(at, count) {
                continue;
            }
            budget -= count;
            self.note_work(at, count, &mut step);
            at += 1;
        }
        let preempted = self.running.len() < running_before;
        while !preempted && budget > 0 && self.running.len() < self.config.batch_slots {
            let Some(count) = self.admit(budget) else {
                break;
            };
            budget -= count;
            self.note_work(self.running.len() - 1, count, &mut step);
        }
        (!step.work.is_empty()).then_some(step)
    }

    fn note_work(&mut self, at: usize, count: usize, step: &mut Step) {
        let sequence = &mut self.running[at];
        step.work.push((sequence.new.id, count));
        let prompt = sequence.new.prompt.len();
        step.prefill_tokens += count.min(prompt.saturating_sub(sequence.computed));
        step.decodes |= sequence.computed >= prompt;
        let ends = sequence.computed + count;
        let full = self.config.profile.told(ends, prompt) / self.config.block_size;
        name_blocks(sequence, full, self.config.block_size, &mut self.pool);
    }

    /// Gives the running sequence at `at` blocks for `count` more tokens; false if it had to be preempted itself.
    fn make_room(&mut self, at: usize, count: usize) -> bool {
        loop {
            let sequence = &mut self.running[at];
            let needed = (sequence.computed + count).div_ceil(self.config.block_size)
                - sequence.blocks.len();
            if let Some(blocks) = self.pool.allocate(needed) {
                sequence.blocks.extend(blocks);
                return true;
            }
            self.preempt_youngest();
            if at >= self.running.len() {
                return false;
            }
        }
    }

    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else {
            return;
        };
        self.pool.release(&sequence.blocks);
        sequence.blocks.clear();
        sequence.computed = 0;
        sequence.named_blocks = 0;
        self.waiting.push_front(sequence);
        self.metrics.add("vllm:num_preemptions_total", 1.0);
    }

    /// Moves the first waiting sequence to the running ones if blocks last; gives its tokens of this step.
    fn admit(&mut self, budget: usize) -> Option<usize> {
        let size = self.config.block_size;
        let sequence = self.waiting.front_mut()?;
        let total = sequence.tokens.len();
        // The last token is always computed, since its result is what the step is for.
        let reusable = if sequence.new.sampling.skip_cache {
            0
        } else {
            (total - 1) / size
        };
        extend_hashes(sequence, reusable, size);
        let hit = self.pool.find_prefix(&sequence.hashes[..reusable]);
        let cached = hit.len() * size;
        let computed = match sequence.new.sampling.transfer {
            Transfer::Pulled(_) => total - 1,
            Transfer::None | Transfer::Hold => cached,
        };
        let count = (total - computed).min(budget);
        let needed = (computed + count).div_ceil(size) - hit.len();
        if self.pool.free_beside(&hit) < needed {
            return None;
        }
        let mut sequence = self.waiting.pop_front()?;
        self.pool.take(&hit);
        sequence.named_blocks = hit.len();
        sequence.blocks = hit;
        sequence.blocks.extend(
            self.pool
                .allocate(needed)
                .expect("invariant: room was checked"),
        );
        sequence.computed = computed;
        if sequence.admitted.is_none() {
            self.count_admission(&mut sequence, cached);
        }
        self.running.push(sequence);
        Some(count)
    }

    fn count_admission(&mut self, sequence: &mut Sequence, cached: usize) {
        let now = Instant::now();
        sequence.cached_tokens = cached;
        sequence.admitted = Some(now);
        self.metrics.admitted(
            &sequence.new.sampling,
            (sequence.new.prompt.len() as f64, cached as f64),
            (now - sequence.arrived).as_secs_f64(),
        );
    }

    /// Ends a step: its tokens, and the events gathered since the last one.
    pub(crate) fn finish(
        &mut self,
        step: &Step,
    ) -> (Vec<(mpsc::Sender<Output>, Output)>, Vec<Event>) {
        let mut outputs = Vec::new();
        let mut tokens = step.prefill_tokens;
        for &(id, count) in &step.work {
            let Some(at) = self
                .running
                .iter()
                .position(|sequence| sequence.new.id == id)
            else {
                continue;
            };
            self.running[at].computed += count;
            if self.running[at].computed < self.running[at].tokens.len() {
                continue;
            }
            tokens += 1;
            let output = self.generate(at);
            outputs.push((self.running[at].new.to.clone(), output));
            if outputs
                .last()
                .is_some_and(|(_, output)| output.finish.is_some())
            {
                let mut sequence = self.running.remove(at);
                let (size, computed) = (self.config.block_size, sequence.computed);
                name_blocks(&mut sequence, computed / size, size, &mut self.pool);
                if let Some((_, output)) = outputs.last_mut() {
                    self.let_go(&sequence, output);
                    self.count_end(&sequence, output.finish.as_ref());
                }
            }
        }
        self.metrics
            .observe("vllm:iteration_tokens_total", tokens as f64);
        (outputs, self.take_events())
    }

    /// Frees the blocks of a sequence, or keeps them for the engine that goes on.
    fn let_go(&mut self, sequence: &Sequence, output: &mut Output) {
        match (&self.config.nixl, &sequence.new.sampling.transfer) {
            (Some(nixl), Transfer::Hold) => {
                let (id, blocks) = (sequence.new.id, sequence.blocks.clone());
                (self.held).keep(id, &blocks, &sequence.new.prompt, nixl.lease);
                output.held = Some((id, blocks));
            }
            _ => self.pool.release(&sequence.blocks),
        }
    }

    fn generate(&mut self, at: usize) -> Output {
        let sequence = &mut self.running[at];
        let sampling = &sequence.new.sampling;
        let made = sequence.tokens.len() - sequence.new.prompt.len();
        let may_end = !sampling.ignore_eos && made >= sampling.min_tokens;
        let runners_up = sampling.logprobs.unwrap_or(0);
        let (history, salt) = (&sequence.history, sequence.salt);
        let choice = match &sampling.given {
            Some(given) => {
                let token = given.get(made).copied().unwrap_or(EOS);
                self.model.given(history, salt, token, runners_up)
            }
            None => self.model.next(history, salt, may_end, runners_up),
        };
        sequence.tokens.push(choice.token);
        sequence.history.push(choice.token);
        let now = Instant::now();
        match sequence.last_token.replace(now) {
            Some(before) => self.metrics.observe(
                "vllm:inter_token_latency_seconds",
                (now - before).as_secs_f64(),
            ),
            None => {
                sequence.first_token = Some(now);
                self.metrics.observe(
                    "vllm:time_to_first_token_seconds",
                    (now - sequence.arrived).as_secs_f64(),
                );
            }
        }
        self.metrics.add("vllm:generation_tokens_total", 1.0);
        let finish = check_end(sequence, choice.token, made + 1, self.config.max_model_len);
        let (text, finish) = tell_text(sequence, &self.tokenizer, choice.token, finish);
        Output {
            index: sequence.new.index,
            choice,
            text,
            finish,
            cached_tokens: sequence.cached_tokens,
            held: None,
        }
    }

    fn count_end(&mut self, sequence: &Sequence, finish: Option<&Finish>) {
        let now = Instant::now();
        let made = sequence.tokens.len() - sequence.new.prompt.len();
        let prompt = sequence.new.prompt.len();
        let admitted = sequence.admitted.unwrap_or(now);
        let first = sequence.first_token.unwrap_or(now);
        let reason = if finish == Some(&Finish::Length) {
            "length"
        } else {
            "stop"
        };
        let decode = (now - first).as_secs_f64();
        let metrics = &mut self.metrics;
        metrics.add(
            &format!("vllm:request_success_total{{finished_reason=\"{reason}\"}}"),
            1.0,
        );
        for (family, value) in [
            ("vllm:request_prompt_tokens", prompt as f64),
            ("vllm:request_generation_tokens", made as f64),
            ("vllm:request_max_num_generation_tokens", made as f64),
            ("vllm:request_params_n", 1.0),
            (
                "vllm:request_params_max_tokens",
                sequence.new.sampling.max_tokens as f64,
            ),
            (
                "vllm:e2e_request_latency_seconds",
                (now - sequence.arrived).as_secs_f64(),
            ),
            (
                "vllm:request_inference_time_seconds",
                (now - admitted).as_secs_f64(),
            ),
            (
                "vllm:request_prefill_time_seconds",
                (first - admitted).as_secs_f64(),
            ),
            ("vllm:request_decode_time_seconds", decode),
            (
                "vllm:request_time_per_output_token_seconds",
                decode / (made.max(2) - 1) as f64,
            ),
            ("vllm:request_num_preemptions", 0.0),
            (
                "vllm:request_prefill_kv_computed_tokens",
                (prompt - sequence.cached_tokens) as f64,
            ),
        ] {
            metrics.observe(family, value);
        }
    }
}

fn extend_hashes(sequence: &mut Sequence, full: usize, size: usize) {
    while sequence.hashes.len() < full {
        let at = sequence.hashes.len();
        let tokens = &sequence.tokens[at * size..(at + 1) * size];
        let parent = sequence.hashes.last().copied();
        sequence.hashes.push(block_hash(
            parent,
            sequence.new.cache_salt.as_deref(),
            tokens,
        ));
    }
}

/// Names the blocks that are full once this step is done, and announces them as one event.
fn name_blocks(sequence: &mut Sequence, full: usize, size: usize, pool: &mut BlockPool) {
    if full <= sequence.named_blocks {
        return;
    }
    extend_hashes(sequence, full, size);
    let fresh = sequence.named_blocks..full;
    for at in fresh.clone() {
        pool.cache(sequence.blocks[at], sequence.hashes[at]);
    }
    pool.events.push(Event::Stored {
        hashes: sequence.hashes[fresh.clone()].to_vec(),
        parent: fresh.start.checked_sub(1).map(|at| sequence.hashes[at]),
        tokens: sequence.tokens[fresh.start * size..fresh.end * size].to_vec(),
        salt: sequence.new.cache_salt.clone(),
    });
    sequence.named_blocks = full;
}

fn check_end(sequence: &Sequence, token: u32, made: usize, length_max: usize) -> Option<Finish> {
    let sampling = &sequence.new.sampling;
    // Behind a form nothing can follow.
    if token == EOS && (!sampling.ignore_eos || sampling.given.is_some()) {
        Some(Finish::Eos)
    } else if made >= sampling.min_tokens && sampling.stop_token_ids.contains(&token) {
        Some(Finish::StopToken(token))
    } else {
        (made >= sampling.max_tokens || sequence.tokens.len() >= length_max)
            .then_some(Finish::Length)
    }
}

/// The text that may be told now. With stop strings, what could still begin one is held back.
fn tell_text(
    sequence: &mut Sequence,
    tokenizer: &Tokenizer,
    token: u32,
    finish: Option<Finish>,
) -> (String, Option<Finish>) {
    if !tokenizer.is_special(token) {
        let text = sequence.detokenizer.push(tokenizer.bytes(token));
        sequence.text.push_str(&text);
    }
    let sampling = &sequence.new.sampling;
    let made = sequence.tokens.len() - sequence.new.prompt.len();
    let stopped = sampling
        .stop
        .iter()
        .filter(|_| made > sampling.min_tokens)
        .find_map(|stop| {
            let from = sequence
                .text
                .floor_char_boundary(sequence.told.saturating_sub(stop.len()));
            sequence.text[from..]
                .find(stop.as_str())
                .map(|at| (from + at, stop.clone()))
        });
    let (end, finish) = match stopped {
        Some((at, stop)) => {
            let end = at
                + if sampling.include_stop_str_in_output {
                    stop.len()
                } else {
                    0
                };
            (end.max(sequence.told), Some(Finish::StopString(stop)))
        }
        None if finish.is_some() => (sequence.text.len(), finish),
        None => {
            let longest = sampling.stop.iter().map(|stop| stop.chars().count()).max();
            let held = longest
                .filter(|_| !sampling.include_stop_str_in_output)
                .map_or(0, |longest| longest - 1);
            let text = &sequence.text;
            let starts = text.char_indices().map(|(at, _)| at);
            let end = starts.chain([text.len()]).rev().nth(held).unwrap_or(0);
            (end.max(sequence.told), None)
        }
    };
    let told = sequence.text[sequence.told..end].to_owned();
    sequence.told = end;
    (told, finish)
}
