//! Answers "how do blocks get from one engine to another": prefill and decode at two engines, as vLLM does it with NIXL.
//!
//! Recorded in `fixtures/nixl-pd`: what requests say, what the prefill engine answers, that the decode engine pulls blocks
//! and makes every token itself, that it answers 500 when nobody is at the other end, and that it never asks for which
//! prompt the blocks were computed. The transfer itself is a line of JSON each way. Blocks wait for a lease; they are
//! freed when they were pulled, or when who was pulling them leaves.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::api::{ApiError, Fields};
use super::blocks::BlockId;
use super::completions::ENTRANCE;
use super::engine::Engine;
use super::model::mix;

/// Between two looks at the leases.
const LEASE_LOOK: Duration = Duration::from_millis(10);

/// Whether and how an engine hands blocks over.
#[derive(Clone, Debug)]
pub struct Nixl {
    /// How long blocks wait for the decode engine.
    pub lease: Duration,
    /// How long a transfer takes.
    pub transfer: Duration,
}

impl Default for Nixl {
    fn default() -> Self {
        Self {
            lease: Duration::from_secs(30),
            transfer: Duration::ZERO,
        }
    }
}

/// What a sequence has to do with another engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Transfer {
    #[default]
    None,
    /// Its blocks are kept when it ends.
    Hold,
    /// Its blocks hold these tokens, whatever its prompt is.
    Pulled(Arc<[u32]>),
}

/// Blocks kept for other engines.
#[derive(Default)]
pub(crate) struct Held {
    requests: HashMap<u64, (Vec<BlockId>, Instant)>,
    /// What was computed into a block, also after it was freed: memory is not wiped.
    content: HashMap<BlockId, Arc<[u32]>>,
    /// Requests whose lease ran out.
    pub(crate) expired: usize,
    /// Requests whose blocks were pulled.
    pub(crate) pulled: usize,
}

impl Held {
    pub(crate) fn keep(&mut self, id: u64, blocks: &[BlockId], tokens: &[u32], lease: Duration) {
        let tokens: Arc<[u32]> = tokens.into();
        let all = blocks.iter().map(|block| (*block, tokens.clone()));
        self.content.extend(all);
        self.requests
            .insert(id, (blocks.to_vec(), Instant::now() + lease));
    }

    pub(crate) fn count(&self) -> usize {
        self.requests.len()
    }

    fn take(&mut self, id: u64) -> Option<Vec<BlockId>> {
        Some(self.requests.remove(&id)?.0)
    }

    fn take_expired(&mut self) -> Option<Vec<BlockId>> {
        let now = Instant::now();
        let (id, _) = self.requests.iter().find(|(_, held)| held.1 <= now)?;
        let id = *id;
        self.expired += 1;
        self.take(id)
    }
}

/// `kv_transfer_params` of the prefill engine's answer.
#[derive(Serialize)]
pub(crate) struct Params {
    do_remote_prefill: bool,
    do_remote_decode: bool,
    remote_block_ids: [Vec<BlockId>; 1],
    remote_engine_id: String,
    remote_request_id: String,
    remote_host: &'static str,
    remote_port: u16,
    tp_size: u32,
    dcp_size: u32,
    pp_size: u32,
    remote_num_tokens: usize,
    remote_blocks_expiry_time: Option<()>,
    transfer_mode: &'static str,
    remote_prefill_cached_tokens: usize,
}

impl Params {
    /// What the answer to `external` says of the blocks kept for it.
    pub(crate) fn of(
        engine: &Engine,
        external: &str,
        (id, blocks): &(u64, Vec<BlockId>),
        prompt_tokens: usize,
        cached: usize,
    ) -> Self {
        Self {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_block_ids: [blocks.clone()],
            remote_engine_id: engine_id(engine),
            remote_request_id: format!("{external}-{id:08x}"),
            remote_host: "127.0.0.1",
            remote_port: engine.transfer_port(),
            tp_size: 1,
            dcp_size: 1,
            pp_size: 1,
            remote_num_tokens: prompt_tokens,
            remote_blocks_expiry_time: None,
            transfer_mode: "pull",
            remote_prefill_cached_tokens: cached,
        }
    }
}

fn engine_id(engine: &Engine) -> String {
    let high = mix(u64::from(engine.transfer_port()));
    let low = mix(high);
    format!(
        "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
        high >> 32,
        high >> 16 & 0xffff,
        high & 0xffff,
        low >> 48,
        low & 0xffff_ffff_ffff
    )
}

/// Of a request's `kv_transfer_params`.
#[derive(Default, Deserialize)]
struct Asked {
    #[serde(default)]
    do_remote_prefill: bool,
    #[serde(default)]
    do_remote_decode: bool,
    remote_block_ids: Option<Vec<Vec<BlockId>>>,
    remote_engine_id: Option<String>,
    remote_request_id: Option<String>,
    remote_host: Option<String>,
    remote_port: Option<u16>,
}

/// One engine to another.
#[derive(Serialize, Deserialize)]
struct Pull {
    engine: String,
    request: String,
    blocks: Vec<BlockId>,
}

/// What the request has to do with another engine; blocks are fetched here.
pub(crate) async fn transfer(engine: &Engine, fields: &Fields) -> Result<Transfer, ApiError> {
    match fields.get(ENTRANCE) {
        Some(asked) => transfer_of(engine, asked).await,
        None => Ok(Transfer::None),
    }
}

/// What these words about blocks ask for; blocks are fetched here.
pub(crate) async fn transfer_of(engine: &Engine, asked: &Value) -> Result<Transfer, ApiError> {
    let Some(nixl) = &engine.config.nixl else {
        return Ok(Transfer::None);
    };
    let asked = Asked::deserialize(asked).unwrap_or_default();
    if asked.do_remote_prefill {
        let pulled = pull(&asked, nixl.transfer).await;
        return pulled.map(Transfer::Pulled).ok_or_else(|| {
            ApiError::new(500, "InternalServerError", "Internal server error", None)
        });
    }
    Ok(match asked.do_remote_decode {
        true => Transfer::Hold,
        false => Transfer::None,
    })
}

async fn pull(asked: &Asked, takes: Duration) -> Option<Arc<[u32]>> {
    let address = (asked.remote_host.as_deref()?, asked.remote_port?);
    let mut socket = BufReader::new(TcpStream::connect(address).await.ok()?);
    let pull = Pull {
        engine: asked.remote_engine_id.clone()?,
        request: asked.remote_request_id.clone()?,
        blocks: asked.remote_block_ids.as_ref()?.first()?.clone(),
    };
    let line = serde_json::to_string(&pull).ok()? + "\n";
    socket.write_all(line.as_bytes()).await.ok()?;
    let mut answer = String::new();
    socket.read_line(&mut answer).await.ok()?;
    let tokens: Vec<u32> = serde_json::from_str(&answer).ok()?;
    tokio::time::sleep(takes).await;
    Some(tokens.into())
}

/// Hands blocks over, and takes back those whose lease ran out, for ever.
pub(crate) async fn serve(engine: &Arc<Engine>, listener: Option<TcpListener>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let mut peers = JoinSet::new();
    let mut look = tokio::time::interval(LEASE_LOOK);
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((socket, _)) = accepted {
                let engine = Arc::clone(engine);
                peers.spawn(async move { hand_over(&engine, socket).await });
            },
            _ = look.tick() => {
                let mut scheduler = engine.scheduler();
                while let Some(blocks) = scheduler.held.take_expired() {
                    scheduler.free(&blocks);
                }
            }
            Some(_) = peers.join_next() => {}
        }
    }
}

async fn hand_over(engine: &Engine, socket: TcpStream) -> Option<()> {
    let mut socket = BufReader::new(socket);
    let mut line = String::new();
    socket.read_line(&mut line).await.ok()?;
    let pull: Pull = serde_json::from_str(&line).ok()?;
    if pull.engine != engine_id(engine) {
        return None;
    }
    let tokens = {
        let scheduler = engine.scheduler();
        let first = pull.blocks.first()?;
        scheduler.held.content.get(first)?.clone()
    };
    let answer = serde_json::to_string(&tokens[..]).ok()? + "\n";
    socket.write_all(answer.as_bytes()).await.ok()?;
    // It closes when it has them, or when its client left.
    let _ = socket.read(&mut [0]).await;
    let id = pull.request.rsplit('-').next()?;
    let id = u64::from_str_radix(id, 16).ok()?;
    let mut scheduler = engine.scheduler();
    let blocks = scheduler.held.take(id)?;
    scheduler.held.pulled += 1;
    scheduler.free(&blocks);
    Some(())
}

/// The port for transfers, where there are any.
pub(crate) async fn bind(engine: &Engine) -> std::io::Result<Option<TcpListener>> {
    if engine.config.nixl.is_none() {
        return Ok(None);
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    engine.set_transfer_port(listener.local_addr()?.port());
    Ok(Some(listener))
}
