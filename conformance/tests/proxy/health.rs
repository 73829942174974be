//! Health checks over HTTP/2: gRPC's own, and those over plain HTTP; and what passing one does for an outlier.

use super::clusters::{health_check, wait_failed};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, Version as HttpVersion};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use outrigger_conformance::harness::{
    ProxyBuilder, TestProxy, Upstream, Version, eventually, hosts, request,
};
use outrigger_proxy::bootstrap::FLEET;
use outrigger_xds::resource::{
    cluster::{Cluster, UpstreamProtocol},
    health_check::Checker,
    outlier_detection::OutlierDetection,
};
use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering::SeqCst},
    },
};
use tokio::net::TcpListener;

/// What the server does when it is asked.
#[derive(Debug, Clone, Copy)]
enum Says {
    /// `HealthCheckResponse.status`, whole.
    Status(u8),
    /// A gRPC status and no message, as servers without that service do.
    Trailers(&'static str),
    /// It resets the stream.
    Reset,
}

/// The head and the body of a request.
type Asked = (http::request::Parts, Bytes);

struct GrpcServer {
    address: SocketAddr,
    says: Arc<Mutex<Says>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

type Answer = Response<BoxBody<Bytes, Infallible>>;

impl GrpcServer {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let says = Arc::new(Mutex::new(Says::Status(1)));
        let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
        let (told, kept) = (says.clone(), Arc::clone(&asked));
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (told, kept) = (told.clone(), Arc::clone(&kept));
                let serve = service_fn(move |request: Request<Incoming>| {
                    let says = *told.lock().unwrap();
                    let kept = Arc::clone(&kept);
                    async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await.unwrap().to_bytes();
                        kept.lock().unwrap().push((head, body));
                        answer(says)
                    }
                });
                let connection = http2::Builder::new(TokioExecutor::new());
                tokio::spawn(connection.serve_connection(TokioIo::new(socket), serve));
            }
        });
        Self {
            address,
            says,
            asked,
        }
    }

    fn say(&self, says: Says) {
        *self.says.lock().unwrap() = says;
    }
}

fn answer(says: Says) -> io::Result<Answer> {
    let head = Response::builder().header("content-type", "application/grpc");
    let built = match says {
        Says::Reset => return Err(io::Error::other("reset")),
        Says::Trailers(status) => head
            .header("grpc-status", status)
            .body(Full::default().boxed()),
        Says::Status(status) => {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            let message = Bytes::from(vec![0, 0, 0, 0, 2, 8, status]);
            let body = Full::new(message).with_trailers(async move { Some(Ok(trailers)) });
            head.body(body.boxed())
        }
    };
    Ok(built.unwrap())
}

fn proxy(server: SocketAddr, edit: impl Fn(&mut Cluster) + 'static) -> TestProxy {
    ProxyBuilder::new()
        .server(server)
        .edit(move |bootstrap| {
            let mut clusters = bootstrap.clusters.iter_mut();
            edit(clusters.find(|cluster| cluster.name == FLEET).unwrap());
        })
        .start()
}

fn by_grpc(cluster: &mut Cluster, unhealthy_threshold: u32) {
    cluster.protocol = UpstreamProtocol::Http2;
    let mut check = health_check(Checker::Grpc {
        service: "chat".into(),
        authority: "health.example".into(),
    });
    check.unhealthy_threshold = unhealthy_threshold;
    cluster.health_check = Some(check);
}

#[tokio::test]
async fn grpc_servers_are_well_when_they_say_that_they_serve() {
    let server = GrpcServer::start().await;
    let proxy = proxy(server.address, |cluster| by_grpc(cluster, u32::MAX));
    wait_failed(&proxy, 0, false).await;
    let (head, body) = server.asked.lock().unwrap()[0].clone();
    assert_eq!(head.method, Method::POST);
    assert_eq!(
        head.uri.to_string(),
        "http://health.example/grpc.health.v1.Health/Check"
    );
    let told = |name: &str| head.headers[name].to_str().unwrap();
    assert_eq!(
        (told("content-type"), told("te"), told("user-agent")),
        ("application/grpc", "trailers", "Envoy/HC")
    );
    assert_eq!(&body[..], b"\0\0\0\0\x06\x0a\x04chat");
    for refusal in [Says::Status(2), Says::Status(3), Says::Trailers("12")] {
        server.say(refusal);
        // At once, whatever the threshold.
        wait_failed(&proxy, 0, true).await;
        server.say(Says::Status(1));
        wait_failed(&proxy, 0, false).await;
    }
}

#[tokio::test]
async fn a_grpc_check_that_breaks_is_no_verdict() {
    let server = GrpcServer::start().await;
    let proxy = proxy(server.address, |cluster| by_grpc(cluster, 5));
    wait_failed(&proxy, 0, false).await;
    let before = server.asked.lock().unwrap().len();
    server.say(Says::Reset);
    wait_failed(&proxy, 0, true).await;
    let asked = server.asked.lock().unwrap().len() - before;
    assert!(asked >= 5, "the threshold decides: {asked}");
}

#[tokio::test]
async fn http_checks_may_be_over_http2() {
    let server = GrpcServer::start().await;
    let proxy = proxy(server.address, |cluster| {
        cluster.health_check = Some(health_check(Checker::Http {
            host: "health.example".into(),
            path: "/health".into(),
            method: Method::GET,
            expected: std::iter::once(200..201).collect(),
            retriable: Vec::new(),
            http2: true,
        }));
    });
    wait_failed(&proxy, 0, false).await;
    let (head, _) = server.asked.lock().unwrap()[0].clone();
    assert_eq!(head.version, HttpVersion::HTTP_2);
    assert_eq!(head.uri.to_string(), "http://health.example/health");
}

/// A server whose `/health` has one status and everything else another.
async fn server(health: &Arc<AtomicU16>, others: &Arc<AtomicU16>) -> Upstream {
    let (health, others) = (health.clone(), others.clone());
    Upstream::start(move |mut conn, exchange| {
        let status = match exchange.path() {
            "/health" => health.load(SeqCst),
            _ => others.load(SeqCst),
        };
        async move {
            conn.json(&format!("{status} Told"), "{}")
                .await
                .then_some(conn)
        }
    })
    .await
}

fn over_http(cluster: &mut Cluster, unhealthy_threshold: u32) {
    let mut check = health_check(Checker::Http {
        host: String::new(),
        path: "/health".into(),
        method: Method::GET,
        expected: std::iter::once(200..201).collect(),
        retriable: std::iter::once(503..504).collect(),
        http2: false,
    });
    check.unhealthy_threshold = unhealthy_threshold;
    cluster.health_check = Some(check);
}

fn checks(server: &Upstream) -> usize {
    let all = server.exchanges();
    all.iter().filter(|asked| asked.path() == "/health").count()
}

#[tokio::test]
async fn a_retriable_status_is_no_verdict() {
    let (health, others) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicU16::new(200)));
    let server = server(&health, &others).await;
    let proxy = proxy(server.address, |cluster| over_http(cluster, 5));
    wait_failed(&proxy, 0, false).await;
    let before = checks(&server);
    health.store(503, SeqCst);
    wait_failed(&proxy, 0, true).await;
    let asked = checks(&server) - before;
    assert!(asked >= 5, "the threshold decides: {asked}");
}

#[tokio::test]
async fn a_check_that_passes_ends_an_ejection() {
    let (health, others) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicU16::new(500)));
    let server = server(&health, &others).await;
    for ends in [true, false] {
        health.store(200, SeqCst);
        let proxy = proxy(server.address, move |cluster| {
            over_http(cluster, u32::MAX);
            cluster.outlier_detection = Some(OutlierDetection {
                max_ejection_percent: 100,
                uneject_by_health_check: ends,
                ..OutlierDetection::default()
            });
        });
        wait_failed(&proxy, 0, false).await;
        let ejected = || async {
            let known = hosts(proxy.admin(), FLEET).await;
            known[0]["health_status"]["failed_outlier_check"] == true
        };
        let two_more = || async {
            let before = checks(&server);
            eventually("two more checks", || async {
                (checks(&server) >= before + 2).then_some(())
            })
            .await;
        };
        // No verdict from now on: neither well nor unhealthy.
        health.store(503, SeqCst);
        two_more().await;
        let mut client = proxy.client(Version::H1).await;
        for _ in 0..5 {
            client.send(request(Method::GET, "/x", "")).await;
        }
        assert!(ejected().await);
        health.store(200, SeqCst);
        if ends {
            eventually("it is back", || async { (!ejected().await).then_some(()) }).await;
        } else {
            two_more().await;
            assert!(ejected().await);
        }
    }
}
