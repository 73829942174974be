//! Registers the engines of this agent at a control plane; how a lease is held is [`outrigger_xds::registry::holder`]'s.

use crate::{
    engine::EngineConfig,
    http::authority,
    identity::{Identity, in_words},
    run::Args,
};
use anyhow::{anyhow, bail};
use outrigger_xds::{
    ads::Server,
    feed::{Connection, Dialer},
    registry::{
        Node, address,
        holder::{Beside, Tells, advertised, is_for_others, labels},
    },
    report::Role,
    resource::endpoint::Address,
};
use rustls::pki_types::ServerName;
use std::{io, net::SocketAddr, sync::Arc};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// What is registered, and where.
pub(crate) struct Registering {
    /// This agent.
    pub(crate) node: Node,
    server: Server,
    engines: Vec<Beside>,
}

impl Tells for Registering {
    fn servers(&self) -> Vec<Server> {
        vec![self.server.clone()]
    }

    fn engines(&self) -> Vec<Beside> {
        self.engines.clone()
    }
}

/// What the command line says of it; nothing if the agent does not register.
///
/// # Errors
/// A flag is wrong, or nobody could reach us at the address that would be told.
pub(crate) fn registering(
    args: &Args,
    node: &str,
    engines: &[EngineConfig],
    listening: SocketAddr,
) -> anyhow::Result<Option<Registering>> {
    let identity = identity(args)?;
    let Some(url) = &args.register else {
        let places = [&args.cluster, &args.region, &args.zone];
        let is_placed = places.iter().any(|place| !place.is_empty());
        if args.advertise.is_some() || !args.label.is_empty() || identity.is_some() || is_placed {
            bail!(
                "--advertise, --label, --cluster, --region, --zone and --peer-tls-cert need --register"
            );
        }
        return Ok(None);
    };
    let (at, identity) = server_at(url, identity)?;
    let advertise = args.advertise.as_deref().map(advertised).transpose();
    let address = match advertise.map_err(|error| anyhow!(error))? {
        Some(address) => address,
        None if is_for_others(listening.ip(), &at) => Address {
            host: listening.ip().to_string(),
            port: listening.port(),
        },
        None => bail!("--listen {listening}: others cannot reach that, give --advertise"),
    };
    let labels = labels(&args.label).map_err(|errors| anyhow!(errors.join("; ")))?;
    let engines = engines.iter().map(beside);
    Ok(Some(Registering {
        node: Node {
            id: node.to_owned(),
            cluster: args.cluster.clone(),
            region: args.region.clone(),
            zone: args.zone.clone(),
            address,
            labels,
            version: env!("CARGO_PKG_VERSION").into(),
        },
        server: Server::new(at.to_string(), dialer(at, identity)),
        engines: engines.collect::<anyhow::Result<_>>()?,
    }))
}

fn beside(config: &EngineConfig) -> anyhow::Result<Beside> {
    let authority = authority(&config.url)?;
    let at = address(&authority);
    Ok(Beside {
        id: config.id.clone(),
        address: at.ok_or_else(|| anyhow!("--engine {}: expected HOST:PORT", config.url))?,
        role: Some(config.role).filter(|role| *role != Role::Both),
        is_left: false,
    })
}

fn identity(args: &Args) -> anyhow::Result<Option<Identity>> {
    match (&args.peer_tls_cert, &args.peer_tls_key, &args.peer_tls_ca) {
        (None, None, None) => Ok(None),
        (Some(certificate), Some(key), Some(ca)) => Ok(Some(Identity {
            certificate: certificate.clone(),
            key: key.clone(),
            ca: ca.clone(),
        })),
        _ => bail!("--peer-tls-cert, --peer-tls-key and --peer-tls-ca: all three or none"),
    }
}

fn server_at(url: &str, identity: Option<Identity>) -> anyhow::Result<(Address, Option<Identity>)> {
    let (rest, identity) = if let Some(rest) = url.strip_prefix("https://") {
        let Some(identity) = identity else {
            bail!("--register {url}: needs --peer-tls-cert, --peer-tls-key and --peer-tls-ca");
        };
        // What is wrong with its files is said at the start.
        identity.client()?;
        (rest, Some(identity))
    } else if let Some(rest) = url.strip_prefix("http://") {
        if identity.is_some() {
            bail!("--register {url}: with --peer-tls-cert it is https://");
        }
        (rest, None)
    } else {
        bail!("--register {url}: must begin with http:// or https://");
    };
    let at = address(rest.trim_end_matches('/'));
    let at = at.ok_or_else(|| anyhow!("--register {url}: expected HOST:PORT"))?;
    Ok((at, identity))
}

fn dialer(at: Address, identity: Option<Identity>) -> Dialer {
    Arc::new(move || {
        let (at, identity) = (at.clone(), identity.clone());
        Box::pin(async move { dial(&at, identity.as_ref()).await })
    })
}

async fn dial(at: &Address, identity: Option<&Identity>) -> io::Result<Box<dyn Connection>> {
    let socket = TcpStream::connect((at.host.as_str(), at.port)).await?;
    socket.set_nodelay(true)?;
    let Some(identity) = identity else {
        return Ok(Box::new(socket));
    };
    let client = identity.client().map_err(io::Error::other)?;
    let name = ServerName::try_from(at.host.clone()).map_err(io::Error::other)?;
    let connector = TlsConnector::from(Arc::new(client));
    let secured = connector.connect(name, socket).await;
    Ok(Box::new(secured.map_err(in_words)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn read(flags: &str, listening: &str) -> Result<Option<Node>, String> {
        let always = ["outrigger-agent", "--engine", "http://10.0.0.1:8000"];
        let args = Args::parse_from(always.into_iter().chain(flags.split_whitespace()));
        let engines = [EngineConfig::new(
            "a/10.0.0.1:8000".into(),
            "http://10.0.0.1:8000",
        )];
        let read = registering(&args, "a", &engines, listening.parse().unwrap());
        read.map(|it| it.map(|it| it.node))
            .map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn where_it_registers_is_read_or_refused() {
        assert_eq!(read("", "127.0.0.1:1"), Ok(None));
        let node = read("--register http://cp:1 --label gpu=l4", "10.0.0.1:2");
        let node = node.unwrap().unwrap();
        assert_eq!(node.address.to_string(), "10.0.0.1:2");
        assert_eq!(node.labels["gpu"], "l4");
        let same = read("--control-plane http://127.0.0.1:1", "127.0.0.1:2");
        assert_eq!(same.unwrap().unwrap().address.to_string(), "127.0.0.1:2");
        let told = read("--register http://cp:1 --advertise h:3", "0.0.0.0:2");
        assert_eq!(told.unwrap().unwrap().address.to_string(), "h:3");
        for (flags, expected) in [
            ("--label a=b", "need --register"),
            ("--zone z", "need --register"),
            ("--register http://cp:1", "give --advertise"),
            ("--register cp:1", "http:// or https://"),
            ("--register http://cp", "HOST:PORT"),
            ("--register https://cp:1", "needs --peer-tls-cert"),
            (
                "--register https://cp:1 --peer-tls-cert x",
                "all three or none",
            ),
            (
                "--register http://cp:1 --advertise 0.0.0.0:3",
                "nobody can reach",
            ),
            (
                "--register http://cp:1 --advertise h:3 --label x",
                "KEY=VALUE",
            ),
            (
                "--register https://cp:1 --peer-tls-cert none --peer-tls-key none --peer-tls-ca none",
                "certificates of none",
            ),
        ] {
            let error = read(flags, "127.0.0.1:2").unwrap_err();
            assert!(error.contains(expected), "{flags}: {error}");
        }
    }
}
