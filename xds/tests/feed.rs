//! The gRPC feed over real sockets: order, large snapshots, a teller that dies or hangs, a slow listener, garbage.

use futures_util::{Stream, StreamExt, stream};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use outrigger_xds::{
    feed::{
        FeedBody, FeedError, FeedMessage, FeedSource, FeedStream, FeedSubscription, FeedTimeouts,
        connect, service,
    },
    report::{EngineState, KvChange, KvSnapshot, Load, Shelf},
};
use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

/// Says a script to everybody, then stays silent.
struct Script(Vec<FeedMessage>);

impl FeedSource for Script {
    fn subscribe(&self) -> FeedStream {
        Box::pin(stream::iter(self.0.clone()).chain(stream::pending()))
    }
}

async fn serve(source: Arc<dyn FeedSource>) -> (http::Uri, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let teller = TowerToHyperService::new(service::<Incoming>(source));
    let server = tokio::spawn(async move {
        // Dropped with this task, so that its end cuts the connections too.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (socket, _) = listener.accept().await.expect("accept");
            let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(socket), teller.clone());
            connections.spawn(connection);
        }
    });
    (uri(address), server)
}

fn uri(address: SocketAddr) -> http::Uri {
    format!("http://{address}").parse().expect("a URI")
}

/// Shorter than the defaults, longer than the pauses of a busy machine.
fn quick() -> FeedTimeouts {
    FeedTimeouts {
        connect: Duration::from_secs(5),
        ping_interval: Duration::from_millis(200),
        ping_timeout: Duration::from_secs(1),
    }
}

fn message(engine: &str, epoch: u64, seq: u64, body: FeedBody) -> FeedMessage {
    FeedMessage {
        engine: engine.into(),
        epoch,
        seq,
        body,
    }
}

fn stored(hashes: Vec<u64>) -> FeedBody {
    FeedBody::Changes(vec![KvChange::Stored {
        shelf: Shelf::default(),
        hashes,
    }])
}

fn snapshot(hashes: Vec<u64>) -> FeedBody {
    FeedBody::Snapshot(KvSnapshot {
        block_tokens: 32,
        shelves: vec![(Shelf::default(), hashes)],
        complete: true,
    })
}

async fn next(feed: &mut FeedSubscription) -> Option<Result<FeedMessage, FeedError>> {
    tokio::time::timeout(Duration::from_secs(10), feed.next())
        .await
        .expect("something within 10 s")
}

#[tokio::test]
async fn a_snapshot_and_then_what_changes() {
    let script = vec![
        message("a", 1, 5, FeedBody::State(EngineState::default())),
        message("a", 1, 5, FeedBody::Load(Load::default())),
        message("a", 1, 5, snapshot(vec![1, 2, 3])),
        message("b", 9, 0, snapshot(Vec::new())),
        message("a", 1, 6, stored(vec![4])),
        message("b", 9, 1, stored(vec![7])),
        message("a", 2, 0, snapshot(Vec::new())),
        message("b", 9, 1, FeedBody::Gone),
    ];
    let mut told = script.clone();
    // Already in the snapshot: told twice, heard once.
    told.insert(4, message("a", 1, 5, stored(vec![3])));
    let (uri, _server) = serve(Arc::new(Script(told))).await;
    let mut feed = connect(uri, quick()).await.expect("connects");
    for want in script {
        assert_eq!(next(&mut feed).await, Some(Ok(want)));
    }
    let silence = tokio::time::timeout(Duration::from_millis(1500), feed.next()).await;
    assert!(
        silence.is_err(),
        "a silent feed stays open beyond its ping timeout: {silence:?}"
    );
}

#[tokio::test]
async fn a_large_snapshot_comes_whole() {
    let big = message(
        "a",
        1,
        1,
        snapshot((0..1_500_000).map(|n| n * 31).collect()),
    );
    let script = vec![big.clone(), message("a", 1, 2, stored(vec![8]))];
    let (uri, _server) = serve(Arc::new(Script(script.clone()))).await;
    let mut feed = connect(uri, quick()).await.expect("connects");
    // Not assert_eq: it would print twelve megabytes.
    assert!(next(&mut feed).await == Some(Ok(big)));
    assert_eq!(next(&mut feed).await, Some(Ok(script[1].clone())));
}

#[tokio::test]
async fn a_gap_ends_the_stream_with_an_error() {
    let script = vec![
        message("a", 1, 1, snapshot(vec![1])),
        message("a", 1, 3, stored(vec![2])),
    ];
    let (uri, _server) = serve(Arc::new(Script(script))).await;
    let mut feed = connect(uri, quick()).await.expect("connects");
    assert!(matches!(next(&mut feed).await, Some(Ok(_))));
    let gap = FeedError::Gap {
        engine: "a".into(),
        last: Some((1, 1)),
        found: 3,
    };
    assert_eq!(next(&mut feed).await, Some(Err(gap)));
    assert_eq!(next(&mut feed).await, None);
}

#[tokio::test]
async fn a_teller_that_dies_or_ends_is_an_error() {
    let (uri, server) = serve(Arc::new(Script(vec![message(
        "a",
        1,
        1,
        snapshot(vec![1]),
    )])))
    .await;
    let mut feed = connect(uri.clone(), quick()).await.expect("connects");
    assert!(matches!(next(&mut feed).await, Some(Ok(_))));
    server.abort();
    assert!(matches!(
        next(&mut feed).await,
        Some(Err(FeedError::Broken(_)))
    ));
    assert_eq!(next(&mut feed).await, None);
    assert!(
        matches!(
            connect(uri, quick()).await.map(drop),
            Err(FeedError::Connect { .. })
        ),
        "nobody listens"
    );

    struct Ends;
    impl FeedSource for Ends {
        fn subscribe(&self) -> FeedStream {
            Box::pin(stream::empty())
        }
    }
    let (uri, _server) = serve(Arc::new(Ends)).await;
    let mut feed = connect(uri, quick()).await.expect("connects");
    assert!(matches!(
        next(&mut feed).await,
        Some(Err(FeedError::Broken(_)))
    ));
}

/// Passes bytes on until told to hang, and then keeps the connections open in silence: a host that lost its power.
async fn hanging_link(to: SocketAddr, hang: Arc<tokio::sync::Notify>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.expect("accept");
        let mut far = TcpStream::connect(to).await.expect("connect");
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            () = hang.notified() => {}
        }
        std::future::pending::<()>().await;
    });
    address
}

#[tokio::test]
async fn a_teller_that_hangs_is_noticed() {
    let (uri_of_teller, _server) = serve(Arc::new(Script(vec![message(
        "a",
        1,
        1,
        snapshot(vec![1]),
    )])))
    .await;
    let teller = uri_of_teller
        .authority()
        .expect("an authority")
        .as_str()
        .parse()
        .expect("an address");
    let hang = Arc::new(tokio::sync::Notify::new());
    let link = hanging_link(teller, hang.clone()).await;
    let mut feed = connect(uri(link), quick()).await.expect("connects");
    assert!(matches!(next(&mut feed).await, Some(Ok(_))));
    let hung = Instant::now();
    hang.notify_one();
    assert!(matches!(
        next(&mut feed).await,
        Some(Err(FeedError::Broken(_)))
    ));
    assert!(
        hung.elapsed() < Duration::from_secs(4),
        "pings of 1.2 s in all, noticed after {:?}",
        hung.elapsed()
    );
}

#[tokio::test]
async fn somebody_who_never_answers_is_given_up() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let timeouts = FeedTimeouts {
        connect: Duration::from_millis(300),
        ..FeedTimeouts::default()
    };
    let asked = Instant::now();
    let answer = connect(uri(address), timeouts).await.map(drop);
    assert!(
        matches!(answer, Err(FeedError::Connect { .. })),
        "{answer:?}"
    );
    assert!(asked.elapsed() < Duration::from_secs(2));
    drop(listener);
}

#[tokio::test]
async fn somebody_who_talks_garbage_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.expect("accept");
            socket
                .write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
                .await
                .expect("write");
            let mut rest = Vec::new();
            let _ = socket.read_to_end(&mut rest).await;
        }
    });
    let answer = connect(uri(address), quick()).await.map(drop);
    assert!(
        matches!(
            answer,
            Err(FeedError::Connect { .. } | FeedError::Broken(_))
        ),
        "{answer:?}"
    );
}

/// Tells changes without end and counts how many it was asked for.
struct Endless(Arc<AtomicU64>);

impl FeedSource for Endless {
    fn subscribe(&self) -> FeedStream {
        Box::pin(Counting {
            asked: self.0.clone(),
            seq: 0,
        })
    }
}

struct Counting {
    asked: Arc<AtomicU64>,
    seq: u64,
}

impl Stream for Counting {
    type Item = FeedMessage;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<FeedMessage>> {
        self.seq += 1;
        self.asked.fetch_add(1, Ordering::Relaxed);
        let body = if self.seq == 1 {
            snapshot(Vec::new())
        } else {
            stored(vec![self.seq; 1000])
        };
        Poll::Ready(Some(message("a", 1, self.seq, body)))
    }
}

#[tokio::test]
async fn a_slow_listener_slows_its_teller() {
    let asked = Arc::new(AtomicU64::new(0));
    let (uri, _server) = serve(Arc::new(Endless(asked.clone()))).await;
    let mut feed = connect(uri, quick()).await.expect("connects");
    let mut before = u64::MAX;
    // The windows and socket buffers fill, then nothing more is asked for.
    for _ in 0..50 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = asked.load(Ordering::Relaxed);
        if now == before {
            break;
        }
        before = now;
    }
    assert_eq!(asked.load(Ordering::Relaxed), before, "the teller stalls");
    // 8 kB each: what lies between is bounded by some megabytes.
    assert!((1..4_000).contains(&before), "{before} messages under way");
    for seq in 1..=before + 500 {
        assert_eq!(
            next(&mut feed).await.expect("open").expect("no gap").seq,
            seq
        );
    }
    assert!(
        asked.load(Ordering::Relaxed) > before,
        "reading moves it on"
    );
}
