//! Answers "how do two SGLang engines meet": prefill and decode get the same request at once, with a room to meet in.
//!
//! No recording shows it. From the reference: both legs carry `bootstrap_host`, `bootstrap_port` and `bootstrap_room`; the
//! prefill engine listens there, computes the prompt once the decode engine has come, hands blocks and the first token over, and
//! ends its own request with one token. A leg that waits too long is aborted with status 500; one without a room gets 400. Nobody
//! asks for which prompt a room was opened. Worse than a real engine, on purpose: who waits for a leg that was lost
//! waits to the end of `wait`, for nothing is told of it. The transfer itself is a line of JSON each way.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::api::{self, ApiError, Fields};
use super::engine::Engine;

/// `--disaggregation-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Side {
    /// Computes prompts, and has the rooms.
    Prefill,
    /// Generates, from what was computed.
    Decode,
}

impl Side {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Half of a split SGLang.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    /// Which half.
    pub side: Side,
    /// Where rooms are, on 127.0.0.1; 0 picks a free port.
    pub port: u16,
    /// How long a leg waits for the other one (a real engine: 300 s).
    pub wait: Duration,
    /// How long a transfer takes.
    pub transfer: Duration,
}

impl Bootstrap {
    /// One half, with the engine's own limits.
    pub fn new(side: Side) -> Self {
        Self {
            side,
            port: 0,
            wait: Duration::from_secs(300),
            transfer: Duration::ZERO,
        }
    }
}

type Socket = BufReader<TcpStream>;

/// Who waits in a room for whom.
enum Waiting {
    Prefill(oneshot::Sender<Socket>),
    Decode(Socket),
}

/// The rooms of a prefill engine.
#[derive(Default)]
pub(crate) struct Rooms {
    waiting: Mutex<HashMap<u64, Waiting>>,
    met: Mutex<usize>,
}

impl Rooms {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn met(&self) -> MutexGuard<'_, usize> {
        self.met.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Prefill legs that wait for their decode leg, and those whose blocks went to it.
    pub(crate) fn count(&self) -> (usize, usize) {
        let waiting = self.waiting();
        let open = waiting.values().filter(|side| match side {
            Waiting::Prefill(decode) => !decode.is_closed(),
            Waiting::Decode(_) => false,
        });
        (open.count(), *self.met())
    }

    /// A prefill leg came.
    fn open(&self, room: u64) -> Option<oneshot::Receiver<Socket>> {
        let (to, from) = oneshot::channel();
        match self.waiting().entry(room) {
            Entry::Vacant(free) => {
                free.insert(Waiting::Prefill(to));
            }
            Entry::Occupied(mut taken) => match taken.get() {
                Waiting::Decode(_) => {
                    if let Waiting::Decode(socket) = taken.remove() {
                        // The receiver is at hand.
                        let _ = to.send(socket);
                    }
                }
                // Its client left.
                Waiting::Prefill(other) if other.is_closed() => {
                    taken.insert(Waiting::Prefill(to));
                }
                Waiting::Prefill(_) => return None,
            },
        }
        Some(from)
    }

    /// A decode leg came. If another one is there already, nobody will answer it.
    fn enter(&self, room: u64, socket: Socket) {
        match self.waiting().entry(room) {
            Entry::Vacant(free) => {
                free.insert(Waiting::Decode(socket));
            }
            Entry::Occupied(taken) => {
                if let Waiting::Prefill(_) = taken.get()
                    && let Waiting::Prefill(prefill) = taken.remove()
                {
                    // Its client may have left.
                    let _ = prefill.send(socket);
                }
            }
        }
    }
}

/// What a request's room makes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Leg {
    /// It is served whole.
    Whole,
    Prefill {
        room: u64,
    },
    Decode {
        address: (String, u16),
        room: u64,
    },
}

fn aborted(message: &str) -> ApiError {
    ApiError::new(500, "InternalServerError", message, None)
}

/// Reads the fields that both legs carry.
pub(crate) fn leg(engine: &Engine, fields: &Fields) -> Result<Leg, ApiError> {
    let Some(bootstrap) = &engine.config.bootstrap else {
        return Ok(Leg::Whole);
    };
    let room = fields.get("bootstrap_room").and_then(Value::as_u64);
    let Some(room) = room.filter(|room| i64::try_from(*room).is_ok()) else {
        let message = "Invalid request: Disaggregated request received without boostrap room id.";
        return Err(ApiError::new(400, "BadRequest", message, None));
    };
    if bootstrap.side == Side::Prefill {
        return Ok(Leg::Prefill { room });
    }
    let host = api::text(fields, "bootstrap_host").unwrap_or_default();
    let port = fields.get("bootstrap_port").and_then(Value::as_u64);
    let port = port.and_then(|port| u16::try_from(port).ok());
    match (host, port) {
        ("", _) | (_, None) => Err(aborted("no bootstrap address")),
        (host, Some(port)) => Ok(Leg::Decode {
            address: (host.to_owned(), port),
            room,
        }),
    }
}

/// The decode leg of this room, as soon as it is there.
pub(crate) async fn meet(engine: &Engine, room: u64) -> Result<Socket, ApiError> {
    let Some(decode) = engine.rooms.open(room) else {
        return Err(aborted("the room is in use"));
    };
    match tokio::time::timeout(wait(engine), decode).await {
        Ok(Ok(socket)) => Ok(socket),
        Ok(Err(_)) | Err(_) => Err(aborted("no decode engine came in time")),
    }
}

fn wait(engine: &Engine) -> Duration {
    let bootstrap = engine.config.bootstrap.as_ref();
    bootstrap.map_or(Duration::ZERO, |bootstrap| bootstrap.wait)
}

/// Tells the decode engine what was computed; it closes when it has it.
pub(crate) async fn hand_over(
    engine: &Engine,
    mut socket: Socket,
    prompt: &[u32],
) -> Result<(), ApiError> {
    let give = async {
        let line = api::to_json(&prompt) + "\n";
        socket.write_all(line.as_bytes()).await.ok()?;
        let mut taken = String::new();
        socket.read_line(&mut taken).await.ok()?;
        (!taken.is_empty()).then_some(())
    };
    let lost = async {
        match give.await {
            Some(()) => {}
            None => std::future::pending().await,
        }
    };
    let given = tokio::time::timeout(wait(engine), lost).await;
    given.map_err(|_| aborted("the decode engine was lost"))?;
    *engine.rooms.met() += 1;
    Ok(())
}

/// What was computed in the room, as soon as it is there.
pub(crate) async fn fetch(
    engine: &Engine,
    address: (String, u16),
    room: u64,
) -> Result<Arc<[u32]>, ApiError> {
    let fetched = async {
        match take(engine, address, room).await {
            Some(tokens) => tokens,
            None => std::future::pending().await,
        }
    };
    let fetched = tokio::time::timeout(wait(engine), fetched).await;
    fetched.map_err(|_| aborted("no prefill engine answered in time"))
}

async fn take(engine: &Engine, address: (String, u16), room: u64) -> Option<Arc<[u32]>> {
    let mut socket = BufReader::new(TcpStream::connect(address).await.ok()?);
    socket
        .write_all(format!("{room}\n").as_bytes())
        .await
        .ok()?;
    let mut line = String::new();
    socket.read_line(&mut line).await.ok()?;
    let tokens: Vec<u32> = serde_json::from_str(&line).ok()?;
    let bootstrap = engine.config.bootstrap.as_ref()?;
    tokio::time::sleep(bootstrap.transfer).await;
    socket.write_all(b"taken\n").await.ok()?;
    Some(tokens.into())
}

/// Lets decode engines into their rooms, for ever.
pub(crate) async fn serve(engine: &Arc<Engine>, listener: Option<TcpListener>) {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let mut peers = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => if let Ok((socket, _)) = accepted {
                let engine = Arc::clone(engine);
                peers.spawn(async move {
                    let mut socket = BufReader::new(socket);
                    let mut line = String::new();
                    let read = socket.read_line(&mut line).await;
                    if let (Ok(_), Ok(room)) = (read, line.trim().parse()) {
                        engine.rooms.enter(room, socket);
                    }
                });
            },
            Some(_) = peers.join_next() => {}
        }
    }
}

/// The port of the rooms, where there are any.
pub(crate) async fn bind(engine: &Engine) -> std::io::Result<Option<TcpListener>> {
    match &engine.config.bootstrap {
        Some(bootstrap) if bootstrap.side == Side::Prefill => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, bootstrap.port)).await?;
            engine.set_transfer_port(listener.local_addr()?.port());
            Ok(Some(listener))
        }
        _ => Ok(None),
    }
}
