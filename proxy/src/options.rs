//! The command line: what was typed, and what it means as resources.

mod envoy;

pub use envoy::{DrainStrategy, EnvoyFlags};

use crate::{
    bootstrap::CONTROL_PLANE,
    run::{Registrar, Registry},
};
use clap::Parser;
use outrigger_xds::{registry::holder, report::Role, resource::endpoint::Address};
use std::{path::PathBuf, time::Duration};

/// Default of `--stream-gather-us`: little beside an inter-token time, and several looks long.
pub const STREAM_GATHER_US_DEFAULT: u64 = 60;
/// Longer, and clients would see it.
pub const STREAM_GATHER_US_MAX: u64 = 1000;
/// Flags that say what a bootstrap says.
pub(crate) const OF_A_FILE: [&str; 14] = [
    "engine",
    "peer",
    "listen",
    "inbound",
    "admin",
    "policy",
    "canary",
    "access_log",
    "body_bytes_max",
    "tls_cert",
    "peer_tls_cert",
    "otlp_endpoint",
    "otlp_sampling",
    "control_plane",
];

/// A proxy beside an inference server. With `--engine` it needs nothing else; `-c` takes Envoy's bootstrap.
#[derive(Debug, Clone, Parser)]
#[command(name = "outrigger-proxy", version, about, long_about = None)]
pub struct Options {
    /// Envoy v3 bootstrap, YAML or JSON
    #[arg(short = 'c', long = "config-path", value_name = "FILE", conflicts_with_all = OF_A_FILE)]
    pub config_path: Option<PathBuf>,
    /// An engine beside this proxy: http://HOST:PORT, with `;role=prefill|decode|both` if it is not both, and
    /// `;bootstrap=HOST:PORT` if an SGLang for prefill meets others elsewhere than it says, `;cohort=LABEL` if its golden
    /// answers are to be compared with those of the same label only
    #[arg(long, value_name = "URL[;role=R][;bootstrap=A][;cohort=L]")]
    pub engine: Vec<String>,
    /// Another proxy's inbound address: http://HOST:PORT
    #[arg(long, value_name = "URL")]
    pub peer: Vec<String>,
    /// A control plane, http://HOST:PORT: all else comes from it (ADS), and engines beside this proxy are registered there. https:// is
    /// mutual TLS with `--peer-tls-cert`
    #[arg(long, value_name = "URL", conflicts_with_all = ["peer", "listen", "policy", "access_log", "body_bytes_max", "tls_cert"])]
    pub control_plane: Option<String>,
    /// A control plane where engines beside this proxy are registered, http://HOST:PORT, or `cluster:NAME`: one of the bootstrap's, as it
    /// is secured there; what is configured comes from elsewhere
    #[arg(long, value_name = "URL", conflicts_with = "control_plane")]
    pub register: Option<String>,
    /// Where other proxies reach this one, as it is registered: HOST:PORT; default is where peers arrive
    #[arg(long, value_name = "ADDR")]
    pub advertise: Option<String>,
    /// What this proxy is registered with, to be chosen by; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub label: Vec<String>,
    /// Where clients arrive
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:8080")]
    pub listen: String,
    /// Where peers arrive (requests for our engines, and the feed); without `--peer-tls-cert` it has no authentication, so keep it private
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:8081")]
    pub inbound: String,
    /// Certificate for clients, PEM; read again when the file changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// CAs, PEM: then clients need a certificate of one of them
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_client_ca: Option<PathBuf>,
    /// Certificate for peers, PEM, both as server and as client; read again when the file changes
    #[arg(long, value_name = "FILE", requires_all = ["peer_tls_key", "peer_tls_ca"])]
    pub peer_tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "peer_tls_cert")]
    pub peer_tls_key: Option<PathBuf>,
    /// CAs of peers, PEM: all of them need a certificate of one of them
    #[arg(long, value_name = "FILE", requires = "peer_tls_cert")]
    pub peer_tls_ca: Option<PathBuf>,
    /// Where the admin listens
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9901")]
    pub admin: String,
    /// File to write the admin's address to once it is bound (for `--admin` with port 0)
    #[arg(long, value_name = "FILE")]
    pub admin_address_path: Option<PathBuf>,
    /// How an engine is chosen for a generation
    #[arg(long, value_enum, default_value_t = Policy::Kv)]
    pub policy: Policy,
    /// Whether engines beside this proxy are asked for a token when no request proves that they work
    #[arg(long, value_enum, default_value_t = Switch::Off)]
    pub canary: Switch,
    /// File with the key that engines want as a bearer token from those who poll them
    #[arg(long, value_name = "FILE")]
    pub engine_api_key_file: Option<PathBuf>,
    /// Worker threads; default is the number of CPUs
    #[arg(long, value_name = "N")]
    pub concurrency: Option<usize>,
    /// `validate` checks the configuration, says everything that is wrong, and ends
    #[arg(long, value_enum, default_value_t = Mode::Serve)]
    pub mode: Mode,
    /// This proxy's name in the fleet; default is HOSTNAME:INBOUND-PORT. Must be unique and should stay over restarts
    #[arg(long = "node-id", visible_alias = "service-node", value_name = "ID")]
    pub node_id: Option<String>,
    /// Directory where the control plane's last configuration is kept, to start with while no server answers
    #[arg(long, value_name = "DIR")]
    pub config_cache: Option<PathBuf>,
    /// An agent's gRPC feed to take KV events from, instead of the embedded adapters
    #[arg(long, value_name = "URL", conflicts_with = "nats")]
    pub agent: Option<String>,
    /// A NATS server to take an agent's feed from, instead of the embedded adapters
    #[arg(long, value_name = "URL")]
    pub nats: Option<String>,
    /// Where the JSON access log goes: `-` is standard output, `none` is nowhere
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub access_log: String,
    /// A collector for traces: http://HOST:PORT is OTLP over gRPC, http://HOST:PORT/v1/traces OTLP over HTTP
    #[arg(long, value_name = "URL")]
    pub otlp_endpoint: Option<String>,
    /// With `--otlp-endpoint`, per cent of the requests that are traced where nobody before us decided
    #[arg(long, value_name = "PERCENT", default_value_t = 100.0, value_parser = percent, requires = "otlp_endpoint")]
    pub otlp_sampling: f64,
    /// Log level of the proxy itself (to standard error)
    #[arg(short = 'l', long, default_value = "info")]
    pub log_level: String,
    /// Seconds that streams may go on after SIGTERM
    #[arg(long, value_name = "S", default_value_t = 600)]
    pub drain_time_s: u64,
    /// Most bytes of a request body that are read to route it; longer ones stream on and are routed by load
    #[arg(long, value_name = "N", default_value_t = 32 << 20)]
    pub body_bytes_max: u64,
    /// Microseconds that events of streams gather on a busy worker before it looks for more; 0 is not at all
    #[arg(long, value_name = "US", default_value_t = STREAM_GATHER_US_DEFAULT, value_parser = clap::value_parser!(u64).range(..=STREAM_GATHER_US_MAX))]
    pub stream_gather_us: u64,
    /// Tokens in a canonical KV block of the index
    #[arg(long, value_name = "N", default_value_t = outrigger_xds::block_hash::BLOCK_TOKENS_DEFAULT)]
    pub block_tokens: usize,
    /// Envoy's further flags.
    #[command(flatten)]
    pub envoy: EnvoyFlags,
}

/// `--policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// By cached prefix and load.
    Kv,
    /// In turn.
    #[value(name = "round_robin")]
    RoundRobin,
    /// The less loaded of two.
    #[value(name = "least_request")]
    LeastRequest,
    /// Any.
    Random,
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// `--mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Serve.
    Serve,
    /// Check and end.
    Validate,
}

/// An engine as given on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineOption {
    /// Where.
    pub address: Address,
    /// Use.
    pub role: Role,
    /// Where it meets engines that decode; empty is where it says itself.
    pub bootstrap: String,
    /// Sets it apart from engines whose answers are not to be compared with its; empty if nothing does.
    pub cohort: String,
}

impl Options {
    /// How long streams may go on after SIGTERM.
    #[must_use]
    pub fn drain_time(&self) -> Duration {
        Duration::from_secs(self.drain_time_s)
    }

    /// The node id: given, or made from the host's name and the inbound port.
    #[must_use]
    pub fn node(&self) -> String {
        self.node_id.clone().unwrap_or_else(|| {
            let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let host = match host.trim() {
                "" => "localhost",
                name => name,
            };
            let port = self.inbound.rsplit(':').next().unwrap_or_default();
            format!("{host}:{port}")
        })
    }
}

/// Reads `URL[;role=R][;bootstrap=HOST:PORT][;cohort=LABEL]`.
///
/// # Errors
/// Says what is wrong with it.
pub fn engine(text: &str) -> Result<EngineOption, String> {
    let mut parts = text.split(';');
    let address = url(parts.next().unwrap_or_default(), "--engine")?;
    let mut engine = EngineOption {
        address,
        role: Role::Both,
        bootstrap: String::new(),
        cohort: String::new(),
    };
    for part in parts {
        match part.split_once('=') {
            Some(("role", "both")) => engine.role = Role::Both,
            Some(("role", "prefill")) => engine.role = Role::Prefill,
            Some(("role", "decode")) => engine.role = Role::Decode,
            Some(("bootstrap", address)) if is_host_and_port(address) => {
                address.clone_into(&mut engine.bootstrap);
            }
            Some(("cohort", label)) if !label.is_empty() => label.clone_into(&mut engine.cohort),
            _ => {
                return Err(format!(
                    "--engine {text}: '{part}' is not role=prefill, role=decode, role=both, bootstrap=HOST:PORT or cohort=LABEL"
                ));
            }
        }
    }
    Ok(engine)
}

/// Where engines are registered (`--control-plane`, `--register`), and with what.
///
/// # Errors
/// Everything that is wrong with these flags.
pub fn registrar(options: &Options) -> Result<Option<Registrar>, Vec<String>> {
    let flags = [
        (&options.control_plane, "--control-plane"),
        (&options.register, "--register"),
    ];
    let mut told = flags.into_iter();
    let Some((text, flag)) = told.find_map(|(text, flag)| Some((text.as_ref()?, flag))) else {
        let is_idle = options.advertise.is_none() && options.label.is_empty();
        let error = "--advertise and --label need --control-plane or --register";
        return is_idle.then_some(None).ok_or_else(|| vec![error.into()]);
    };
    let mut errors = Vec::new();
    let server = match text.strip_prefix("cluster:") {
        Some(name) if options.control_plane.is_none() => Ok(Registry::Cluster {
            name: name.to_owned(),
            authority: String::new(),
        }),
        _ if options.control_plane.is_some() => {
            control_plane(options, text).map(|(at, secured)| {
                if secured {
                    Registry::Cluster {
                        name: CONTROL_PLANE.to_owned(),
                        authority: at.to_string(),
                    }
                } else {
                    Registry::Address(at)
                }
            })
        }
        _ if text.starts_with("https://") => Err(format!(
            "{flag} {text}: for TLS, name a cluster of the bootstrap that has it, cluster:NAME"
        )),
        _ => url(text, flag).map(Registry::Address),
    };
    let server = server.map_err(|error| errors.push(error)).ok();
    let advertise = options.advertise.as_deref().map(holder::advertised);
    let advertise = advertise.transpose().map_err(|error| errors.push(error));
    let advertise = advertise.unwrap_or_default();
    let labels = holder::labels(&options.label).map_err(|all| errors.extend(all));
    let labels = labels.unwrap_or_default();
    let Some(server) = server.filter(|_| errors.is_empty()) else {
        return Err(errors);
    };
    Ok(Some(Registrar {
        server,
        advertise,
        labels,
    }))
}

/// Reads `--control-plane`: where it is, and whether it is spoken to by TLS.
///
/// # Errors
/// Says what is wrong with it.
pub fn control_plane(options: &Options, text: &str) -> Result<(Address, bool), String> {
    const FLAG: &str = "--control-plane";
    let Some(rest) = text.strip_prefix("https://") else {
        if !text.starts_with("http://") {
            return Err(format!(
                "{FLAG} {text}: must begin with http:// or https://"
            ));
        }
        return Ok((url(text, FLAG)?, false));
    };
    if options.peer_tls_cert.is_none() {
        return Err(format!(
            "{FLAG} {text}: needs --peer-tls-cert, --peer-tls-key and --peer-tls-ca: who this node is, and whom it believes"
        ));
    }
    let mut server = url(&format!("http://{rest}"), FLAG)?;
    let host = rest.trim_end_matches('/');
    let has_port = host
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if !has_port {
        server.port = 443;
    }
    Ok((server, true))
}

fn is_host_and_port(text: &str) -> bool {
    let parts = text.rsplit_once(':');
    parts.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

/// Reads `http://HOST[:PORT]` (a trailing slash is forgiven).
///
/// # Errors
/// Says what is wrong with it.
pub fn url(text: &str, flag: &str) -> Result<Address, String> {
    let uri: http::Uri = text
        .parse()
        .map_err(|error| format!("{flag} {text}: {error}"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => {
            return Err(format!(
                "{flag} {text}: TLS to upstreams is not supported yet"
            ));
        }
        _ => return Err(format!("{flag} {text}: must begin with http://")),
    }
    if !matches!(uri.path(), "" | "/") {
        return Err(format!("{flag} {text}: a path is not possible here"));
    }
    let host = uri
        .host()
        .filter(|host| !host.is_empty())
        .ok_or_else(|| format!("{flag} {text}: no host"))?;
    let host = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .to_owned();
    Ok(Address {
        host,
        port: uri.port_u16().unwrap_or(80),
    })
}

/// Reads the URL of a collector: where it is, and whether a path is asked for there.
///
/// # Errors
/// Says what is wrong with it.
pub fn collector(text: &str) -> Result<(Address, bool), String> {
    let uri: http::Uri = text
        .parse()
        .map_err(|error| format!("--otlp-endpoint {text}: {error}"))?;
    let has_path = !matches!(uri.path(), "" | "/");
    let base = match uri.scheme_str().zip(uri.authority()) {
        Some((scheme, authority)) => format!("{scheme}://{authority}"),
        None => text.to_owned(),
    };
    Ok((url(&base, "--otlp-endpoint")?, has_path))
}

/// Reads `HOST:PORT` to listen on; `:PORT` is all interfaces.
///
/// # Errors
/// Says what is wrong with it.
pub fn listen(text: &str, flag: &str) -> Result<Address, String> {
    let (host, port) = text
        .rsplit_once(':')
        .ok_or_else(|| format!("{flag} {text}: must be HOST:PORT"))?;
    let port = port
        .parse()
        .map_err(|_| format!("{flag} {text}: '{port}' is not a port"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let host = if host.is_empty() { "0.0.0.0" } else { host };
    Ok(Address {
        host: host.to_owned(),
        port,
    })
}

fn percent(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| "is no number".to_owned())?;
    if (0.0..=100.0).contains(&number) {
        Ok(number)
    } else {
        Err("must be from 0 to 100".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_traces_is_one_and_needs_somebody_to_take_them() {
        let read = |flags: &str| Options::try_parse_from(flags.split(' '));
        let traced = "proxy --otlp-endpoint http://a:1 --otlp-sampling";
        let good = read(&format!("{traced} 0.5")).unwrap();
        assert_eq!(good.otlp_sampling.to_string(), "0.5");
        for bad in ["101", "-1", "NaN", "all"] {
            let error = read(&format!("{traced}={bad}")).unwrap_err();
            assert!(error.to_string().contains("--otlp-sampling"), "{error}");
        }
        let error = read("proxy --otlp-sampling 1").unwrap_err();
        assert!(error.to_string().contains("--otlp-endpoint"), "{error}");
        let error = read("proxy -c file --otlp-sampling 1").unwrap_err();
        assert!(error.to_string().contains("cannot be used with"), "{error}");
        assert!(read("proxy -c file").is_ok());
    }

    #[test]
    fn where_engines_are_registered_is_read_or_refused() {
        let read = |flags: &str| {
            let flags = format!("proxy {flags}");
            let options = Options::try_parse_from(flags.split_whitespace());
            let options = options.map_err(|error| error.to_string())?;
            registrar(&options).map_err(|errors| errors.join("; "))
        };
        assert!(read("").unwrap().is_none());
        let all = "--advertise a.svc:81 --label gpu=l4 --label rack=";
        for flag in ["--control-plane", "--register"] {
            let told = read(&format!("{flag} http://cp:18000 {all}"));
            let told = told.unwrap().unwrap();
            let server = Address {
                host: "cp".into(),
                port: 18000,
            };
            assert_eq!(told.server, Registry::Address(server));
            assert_eq!(told.advertise.unwrap().to_string(), "a.svc:81");
            assert_eq!(told.labels["gpu"], "l4");
            assert_eq!(told.labels["rack"], "");
        }
        for (flags, reason) in [
            (all, "need --control-plane or --register"),
            ("--register cp:1", "must begin with http://"),
            ("--register http://cp --advertise a", "--advertise a"),
            (
                "--register http://cp --advertise [::]:1",
                "nobody can reach",
            ),
            ("--register http://cp --label gpu", "--label gpu"),
            ("--control-plane https://cp:1", "needs --peer-tls-cert"),
            ("--control-plane cluster:cp", "http:// or https://"),
            ("--register https://cp:1", "cluster:NAME"),
            (
                "--control-plane http://cp --peer http://b",
                "cannot be used",
            ),
            ("--control-plane http://cp -c file", "cannot be used"),
            (
                "--control-plane http://cp --register http://cp",
                "cannot be used",
            ),
        ] {
            let error = read(flags).unwrap_err();
            assert!(error.contains(reason), "{flags}: {error}");
        }
        assert!(read("-c file --register http://cp").unwrap().is_some());
        let server = |flags: &str| read(flags).unwrap().unwrap().server;
        let peers = "--peer-tls-cert c --peer-tls-key k --peer-tls-ca a";
        assert_eq!(
            server(&format!("--control-plane https://cp:1 {peers}")),
            Registry::Cluster {
                name: CONTROL_PLANE.into(),
                authority: "cp:1".into()
            }
        );
        assert_eq!(
            server("-c file --register cluster:xds"),
            Registry::Cluster {
                name: "xds".into(),
                authority: String::new()
            }
        );
    }

    #[test]
    fn engines_are_read_or_refused_with_a_reason() {
        let read = engine("http://[::1]:8000/;role=prefill").unwrap();
        assert_eq!(
            (read.address.host.as_str(), read.address.port, read.role),
            ("::1", 8000, Role::Prefill)
        );
        let read = engine("http://a:1;bootstrap=b:2;role=prefill").unwrap();
        assert_eq!((&*read.bootstrap, read.role), ("b:2", Role::Prefill));
        assert_eq!(engine("http://a:1;cohort=fp8").unwrap().cohort, "fp8");
        for (text, reason) in [
            ("http://a:1;cohort=", "cohort="),
            ("localhost:8000", "must begin with http://"),
            ("https://a:1", "TLS"),
            ("http://a:1/v1", "path"),
            ("http://a:1;role=x", "role=x"),
            ("http://a:1;bootstrap=b", "bootstrap=b"),
        ] {
            let error = engine(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let (address, has_path) = collector("http://otel:4318/v1/traces").unwrap();
        assert_eq!(
            (address.to_string().as_str(), has_path),
            ("otel:4318", true)
        );
        assert!(!collector("http://[::1]:4317").unwrap().1);
        assert!(collector("https://otel:4317").unwrap_err().contains("TLS"));
        assert!(collector("otel:4317").is_err());
        assert_eq!(listen(":80", "--listen").unwrap().host, "0.0.0.0");
        assert!(listen("80", "--listen").is_err());
    }
}
