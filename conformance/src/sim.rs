//! Answers "what would an engine do": a simulated vLLM 0.32, for tests, the demo and black-box cases; with another
//! profile, SGLang 0.5.23 or TensorRT-LLM 1.2 (`sglang` and `trtllm` say how much of them).
//!
//! Every exchange in `fixtures/http-vllm-0.32.0` is answered so that its text, ids, counts and times alone tell it from
//! the recording. Behind the wire are a real block cache with KV events, a timing model with queue and batch, and
//! faults on command (`/sim/fault`, the only endpoint a real engine lacks). It shares no codec with the product.
//!
//! What no recording shows is refused with 501:
//!
//! - media, beam search, LoRA, suffixes, KV transfer unless the engine has it (`nixl`), embeddings, `derender`, sleeping and pausing;
//! - of tools: calls in a conversation's history, tools of `/v1/messages` and `/v1/responses`;
//! - of structured output: everything but `response_format` of chat; JSON schemas with other keywords than those in
//!   `schema` get 400;
//! - of figures for prompts: `prompt_logprobs`, and `echo` in a stream or without an answer;
//! - of `/v1/responses`: reasoning, text formats, input other than text; `render` for any of these forms.
//!
//! Two things are answered without a recording: the end of a complete tool call (those recorded are cut short; here it
//! is `tool_calls`), and a whole `/v1/messages`. Also not simulated: a call by a model that may choose (`auto`: it never
//! calls), sampling fields other than temperature and seed (they are accepted and change nothing), CORS answers to a
//! request with `Origin`, and the text of the prompt that vLLM tells again when a prompt ends inside a character.

mod api;
mod blocks;
mod bootstrap;
mod chat;
mod completions;
mod config;
mod echo;
mod engine;
mod events;
mod fault;
mod feed;
mod forms;
mod generate;
mod http;
mod json_error;
mod messages;
mod metrics_page;
mod model;
mod nixl;
mod reasoning;
mod rendered;
mod responses;
mod routes;
mod scheduler;
mod schema;
mod sglang;
mod sglang_generate;
mod sglang_openai;
mod sglang_serve;
mod stored;
mod template;
mod tokenizer;
mod trtllm;
mod trtllm_events;
mod zmtp;

use std::io::{Error, ErrorKind, Result};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use clap::Parser;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

pub use bootstrap::{Bootstrap, Side};
pub use config::{Config, Events, Profile, Seeds};
pub use fault::{Fault, FaultKind};
pub use nixl::Nixl;
pub use template::{CHAT_TEMPLATE, Ending, Message, render};
pub use tokenizer::{TOKENIZER_JSON, Tokenizer};

use engine::Engine;

/// How long the engine waits before it connects to its subscriber again.
const RECONNECT: Duration = Duration::from_millis(100);

/// A running simulated engine, on a thread and runtime of its own. Dropping it stops it.
pub struct SimEngine {
    /// Where HTTP is served.
    pub http_addr: SocketAddr,
    /// Where the PUB socket is bound, when it is.
    pub events_addr: Option<SocketAddr>,
    /// Where the replay socket is bound, when events are on.
    pub replay_addr: Option<SocketAddr>,
    engine: Arc<Engine>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl SimEngine {
    /// Binds the sockets and serves. May be called inside or outside a runtime; returns once the engine answers.
    pub fn start(config: Config) -> Result<Self> {
        check(&config)?;
        if let Some(path) = &config.model_path {
            write_model_dir(path)?;
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (told, started) = std::sync::mpsc::channel();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("sim-engine".to_owned())
            .spawn(move || {
                runtime.block_on(async move {
                    match Sockets::bind(config).await {
                        Ok(sockets) => {
                            let engine = Arc::clone(&sockets.engine);
                            let addresses =
                                (sockets.http_addr, sockets.events_addr, sockets.replay_addr);
                            let _ = told.send(Ok((engine, addresses)));
                            sockets.serve(stopped).await;
                        }
                        Err(error) => {
                            let _ = told.send(Err(error));
                        }
                    }
                });
            })?;
        let started = started
            .recv()
            .map_err(|_| Error::other("the engine's thread ended before it served"))?;
        let (engine, (http_addr, events_addr, replay_addr)) = started?;
        Ok(Self {
            http_addr,
            events_addr,
            replay_addr,
            engine,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.http_addr)
    }

    /// Arms a fault, as `POST /sim/fault` does.
    pub fn fault(&self, fault: Fault) {
        self.engine.fault(fault);
    }

    /// Faults that are armed do not happen any more.
    pub fn disarm(&self) {
        self.engine.faults.clear();
    }

    /// Requests whose blocks wait for another engine, those whose blocks were fetched, and those nobody came for in time.
    pub fn transfers(&self) -> (usize, usize, usize) {
        let scheduler = self.engine.scheduler();
        let held = &scheduler.held;
        (held.count(), held.pulled, held.expired)
    }

    /// Of an SGLang for prefill: legs that wait for their decode leg, and those whose blocks went to it.
    pub fn rooms(&self) -> (usize, usize) {
        self.engine.rooms.count()
    }

    /// Generation requests that are being answered, whether or not anything of them runs.
    pub fn requests(&self) -> usize {
        self.engine.in_flight().len()
    }

    /// The seed of the chat that came last.
    pub fn last_seed(&self) -> Option<u64> {
        self.engine.last_seed()
    }

    /// Requests whose seed it refused.
    pub fn seeds_refused(&self) -> u64 {
        self.engine.seeds_refused()
    }

    /// Requests that wait and that run, and the share of KV blocks in use.
    pub fn load(&self) -> (usize, usize, f64) {
        self.engine.scheduler().load()
    }

    /// Whether a `die` fault ended it.
    pub fn is_dead(&self) -> bool {
        self.engine.is_dead()
    }

    /// Ends as vLLM does on SIGTERM: running streams get the error event and `[DONE]`, then everything closes.
    pub fn terminate(&mut self) {
        // Longer than the pause below: `stop` ends it, not the fault.
        let for_ms = 10_000;
        let fault = Fault::new(FaultKind::CoreDies);
        self.engine.core_dies(Fault { for_ms, ..fault });
        std::thread::sleep(engine::LAST_WORDS);
        self.stop();
    }

    /// Closes every socket at once, as the end of a process does, and waits for the thread.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // An engine that died has nobody left to hear it.
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for SimEngine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn check(config: &Config) -> Result<()> {
    let refuse = |what: &str| Err(Error::new(ErrorKind::InvalidInput, what));
    if config.block_size == 0
        || config.batch_slots == 0
        || config.batch_tokens == 0
        || config.max_model_len == 0
    {
        return refuse(
            "block_size, batch_slots, batch_tokens and max_model_len must be at least 1",
        );
    }
    if config.kv_blocks <= config.max_model_len.div_ceil(config.block_size) {
        return refuse("kv_blocks must hold a request of max_model_len, and one block more");
    }
    let sglang = config.profile == Profile::Sglang;
    if sglang && (config.nixl.is_some() || config.api_key.is_some()) {
        return refuse("nixl and api_key are not simulated of SGLang");
    }
    if !sglang && config.bootstrap.is_some() {
        return refuse("bootstrap is SGLang's");
    }
    if config.prefill_tokens_per_s <= 0.0 || config.decode_itl_ms < 0.0 {
        return refuse("prefill_tokens_per_s must be positive and decode_itl_ms not negative");
    }
    Ok(())
}

/// Writes the model's files (tokenizer, chat template, configuration) into `dir`, leaving those that are there.
pub fn write_model_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    for (name, content) in [
        ("tokenizer.json", TOKENIZER_JSON),
        ("tokenizer_config.json", template::TOKENIZER_CONFIG),
        ("chat_template.jinja", CHAT_TEMPLATE),
        ("config.json", template::MODEL_CONFIG),
    ] {
        if !dir.join(name).exists() {
            std::fs::write(dir.join(name), content)?;
        }
    }
    Ok(())
}

/// The engine with its sockets bound.
struct Sockets {
    engine: Arc<Engine>,
    http: TcpListener,
    http_addr: SocketAddr,
    events: Option<TcpListener>,
    events_addr: Option<SocketAddr>,
    replay: Option<TcpListener>,
    replay_addr: Option<SocketAddr>,
    nixl: Option<TcpListener>,
    rooms: Option<TcpListener>,
}

impl Sockets {
    async fn bind(config: Config) -> Result<Self> {
        let http = bind(config.port).await?;
        let http_addr = http.local_addr()?;
        let events = match config.events {
            Events::Bind(port) => Some(bind(port).await?),
            Events::Off | Events::Connect(_) => None,
        };
        let replay = if config.events == Events::Off {
            None
        } else {
            Some(bind(config.replay_port).await?)
        };
        let events_addr = events.as_ref().map(TcpListener::local_addr).transpose()?;
        let replay_addr = replay.as_ref().map(TcpListener::local_addr).transpose()?;
        let engine = Arc::new(Engine::new(config, u64::from(http_addr.port())));
        let sources = match engine.config.profile {
            Profile::Vllm | Profile::Trtllm => {
                event_sources(&engine.config, events_addr, replay_addr)
            }
            Profile::Sglang => sglang::event_sources(&engine.config, events_addr, replay_addr),
        };
        *engine
            .event_sources
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = sources;
        Ok(Self {
            nixl: nixl::bind(&engine).await?,
            rooms: bootstrap::bind(&engine).await?,
            engine,
            http,
            http_addr,
            events,
            events_addr,
            replay,
            replay_addr,
        })
    }

    async fn serve(self, stopped: tokio::sync::oneshot::Receiver<()>) {
        let Self {
            engine,
            http,
            http_addr,
            events,
            replay,
            nixl,
            rooms,
            ..
        } = self;
        let publish = serve_subscribers(&engine, events);
        let answer_replays = serve_replays(&engine, replay);
        tokio::select! {
            _ = stopped => {}
            () = engine.ended() => {}
            () = engine.run() => {}
            () = accept(&engine, http, http_addr) => {}
            () = publish => {}
            () = answer_replays => {}
            () = nixl::serve(&engine, nixl) => {}
            () = bootstrap::serve(&engine, rooms) => {}
        }
    }
}

async fn bind(port: u16) -> Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await
}

/// Body of `/kv_event_sources`. A bound PUB socket shows as `tcp://*:PORT`, the form that makes vLLM bind.
fn event_sources(
    config: &Config,
    events: Option<SocketAddr>,
    replay: Option<SocketAddr>,
) -> String {
    let endpoint = match (&config.events, events) {
        (Events::Connect(address), _) => format!("tcp://{address}"),
        (_, Some(bound)) => format!("tcp://*:{}", bound.port()),
        (_, None) => return "{}".to_owned(),
    };
    let replay = replay.map_or("null".to_owned(), |bound| format!("\"tcp://{bound}\""));
    let (steps, topic) = (
        zmtp::BUFFER_BATCHES,
        serde_json::Value::from(config.topic.as_str()),
    );
    format!(
        r#"{{"0":{{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"{endpoint}","replay_endpoint":{replay},"buffer_steps":{steps},"hwm":100000,"max_queue_size":100000,"topic":{topic}}}}}"#
    )
}

/// Accepts HTTP connections for ever; while a `refuse` fault lasts, the listener is closed.
async fn accept(engine: &Arc<Engine>, listener: TcpListener, addr: SocketAddr) {
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        if let Some(until) = engine
            .refused_until()
            .filter(|until| *until > tokio::time::Instant::now())
        {
            listener = None;
            tokio::time::sleep_until(until).await;
        }
        let open = match &listener {
            Some(open) => open,
            None => match TcpListener::bind(addr).await {
                Ok(open) => listener.insert(open),
                Err(error) => {
                    tracing::warn!(%addr, %error, "the port is taken; trying again");
                    tokio::time::sleep(RECONNECT).await;
                    continue;
                }
            },
        };
        tokio::select! {
            accepted = open.accept() => if let Ok((socket, _)) = accepted {
                let engine = Arc::clone(engine);
                connections.spawn(http::serve(socket, move |request| routes::answer(Arc::clone(&engine), request)));
            },
            () = engine.refuse.notified() => {}
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve_subscribers(engine: &Arc<Engine>, listener: Option<TcpListener>) {
    match (listener, &engine.config.events) {
        (Some(listener), _) => {
            let mut peers = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => if let Ok((socket, _)) = accepted {
                        let engine = Arc::clone(engine);
                        peers.spawn(async move { engine.publisher.serve_subscriber(socket).await });
                    },
                    Some(_) = peers.join_next() => {}
                }
            }
        }
        (None, Events::Connect(address)) => loop {
            if let Ok(socket) = TcpStream::connect(address).await {
                let ended = engine.publisher.serve_subscriber(socket).await;
                tracing::debug!(?ended, "the subscriber left");
            }
            tokio::time::sleep(RECONNECT).await;
        },
        (None, Events::Off | Events::Bind(_)) => std::future::pending().await,
    }
}

async fn serve_replays(engine: &Arc<Engine>, listener: Option<TcpListener>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let mut peers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((socket, _)) = accepted {
                let engine = Arc::clone(engine);
                peers.spawn(async move { engine.publisher.serve_replay(socket).await });
            },
            Some(_) = peers.join_next() => {}
        }
    }
}

/// The binary: serves until SIGTERM or SIGINT. `args` begin with the program's name.
///
/// The first line of standard output is a JSON object with the addresses, so that a caller can ask for port 0.
pub fn run(args: impl IntoIterator<Item = std::ffi::OsString>) -> ExitCode {
    let flags = match config::Flags::try_parse_from(args) {
        Ok(flags) => flags,
        Err(error) => {
            // Help and version come this way too; clap knows where they go.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr);
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    // A program that runs this as a part of itself may have its own subscriber already.
    let _ = log.with_env_filter(filter).try_init();
    match SimEngine::start(flags.into()) {
        Ok(mut engine) => {
            let address = |addr: Option<SocketAddr>| addr.map(|addr| addr.to_string());
            println!(
                "{}",
                serde_json::json!({
                    "http": engine.http_addr.to_string(),
                    "events": address(engine.events_addr),
                    "replay": address(engine.replay_addr),
                })
            );
            wait_for_signal();
            engine.terminate();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("outrigger-sim-engine: {error}");
            ExitCode::FAILURE
        }
    }
}

fn wait_for_signal() {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    else {
        return;
    };
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        match (
            signal(SignalKind::terminate()),
            signal(SignalKind::interrupt()),
        ) {
            (Ok(mut terminate), Ok(mut interrupt)) => tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            },
            _ => std::future::pending().await,
        }
    });
}
