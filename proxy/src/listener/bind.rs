//! Binding: sockets that listen, one a worker, bound before anything runs.

use crate::socket::Socket;
use outrigger_filters::end_address::EndAddress;
use outrigger_xds::resource::{
    endpoint::Address,
    listener::{Listener, TCP_BACKLOG_SIZE_DEFAULT},
};
use socket2::{Domain, Protocol, SockAddr, Socket as RawSocket, Type};
use std::{
    fs, io,
    net::{SocketAddr, TcpListener, ToSocketAddrs},
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixListener,
    },
    path::Path,
};
use tokio::net::{TcpStream, UnixStream};

/// A bound listener.
pub struct Bound {
    /// Where it really listens.
    pub address: EndAddress,
    /// One socket a worker; none if it has no port.
    pub sockets: Vec<Listening>,
}

/// A socket that listens.
#[derive(Debug)]
pub enum Listening {
    /// At an address of the internet's.
    Tcp(TcpListener),
    /// At a Unix domain socket.
    Pipe(UnixListener),
}

/// Binds `workers` sockets to one address. With port 0 the first choice of the system holds for all. With `known` it
/// is an address that this process has just given up, and may still be bound.
///
/// # Errors
/// The address does not resolve or cannot be bound; the text names listener and address.
pub fn bind(listener: &Listener, workers: usize, known: bool) -> Result<Bound, String> {
    let wanted = &listener.address;
    let bound = if wanted.is_pipe() {
        bind_pipes(listener, workers, known)
    } else {
        bind_ports(listener, workers, known)
    };
    bound.map_err(|error| {
        format!(
            "listener '{}': cannot bind {wanted}: {error}",
            listener.name
        )
    })
}

fn bind_ports(listener: &Listener, workers: usize, known: bool) -> io::Result<Bound> {
    let wanted = &listener.address;
    let mut address = (wanted.host.as_str(), wanted.port)
        .to_socket_addrs()?
        .next()
        .ok_or(io::ErrorKind::AddrNotAvailable)?;
    let mut sockets = Vec::new();
    if listener.bind_to_port {
        if address.port() != 0 && !known {
            // SO_REUSEPORT would let two proxies share a port unnoticed; a plain bind tells.
            bind_one(address, 1, false)?;
        }
        for _ in 0..workers {
            let socket = bind_one(address, listener.tcp_backlog_size, true)?;
            address = socket.local_addr()?;
            sockets.push(Listening::Tcp(socket));
        }
    }
    Ok(Bound {
        address: address.into(),
        sockets,
    })
}

fn bind_one(address: SocketAddr, backlog: u32, listen: bool) -> io::Result<TcpListener> {
    let socket = RawSocket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if listen {
        socket.set_reuse_port(true)?;
    }
    socket.bind(&address.into())?;
    if listen {
        socket.listen(queue(backlog))?;
        socket.set_nonblocking(true)?;
    }
    Ok(socket.into())
}

fn queue(backlog: u32) -> i32 {
    i32::try_from(backlog).unwrap_or(i32::MAX)
}

/// A Unix domain socket has one queue, from which all workers take.
fn bind_pipes(listener: &Listener, workers: usize, known: bool) -> io::Result<Bound> {
    let path = &listener.address.host;
    let mut sockets = Vec::new();
    if listener.bind_to_port {
        let first = bind_pipe(path, listener.pipe_mode, listener.tcp_backlog_size, known)?;
        for _ in 1..workers {
            sockets.push(Listening::Pipe(first.try_clone()?));
        }
        sockets.push(Listening::Pipe(first));
    }
    Ok(Bound {
        address: EndAddress::Pipe(path.as_str().into()),
        sockets,
    })
}

fn bind_pipe(path: &str, mode: u32, backlog: u32, known: bool) -> io::Result<UnixListener> {
    let socket = RawSocket::new(Domain::UNIX, Type::STREAM, None)?;
    if let Some(name) = path.strip_prefix('@') {
        socket.bind(&SockAddr::unix(format!("\0{name}"))?)?;
    } else {
        make_room(Path::new(path), known)?;
        socket.bind(&SockAddr::unix(path)?)?;
        if mode != 0 {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        }
    }
    socket.listen(queue(backlog))?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// Takes away the file of a socket that nobody listens at any more, which would be in the way: whoever ends does not
/// always tidy up. Envoy takes away whatever is there.
fn make_room(path: &Path, known: bool) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    let probe = RawSocket::new(Domain::UNIX, Type::STREAM, None)?;
    // A queue that is full is somebody's, too, and nobody waits for it here.
    probe.set_nonblocking(true)?;
    let refused = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    let deserted = || {
        let connected = probe.connect(&SockAddr::unix(path)?);
        Ok::<_, io::Error>(connected.as_ref().is_err_and(refused))
    };
    if found.file_type().is_socket() && (known || deserted()?) {
        return fs::remove_file(path);
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// Binds one socket to an address.
///
/// # Errors
/// It does not resolve or cannot be bound.
pub(crate) fn bind_alone(address: &Address, pipe_mode: u32) -> io::Result<Listening> {
    if address.is_pipe() {
        let socket = bind_pipe(&address.host, pipe_mode, TCP_BACKLOG_SIZE_DEFAULT, false)?;
        return Ok(Listening::Pipe(socket));
    }
    let socket = TcpListener::bind((address.host.as_str(), address.port))?;
    socket.set_nonblocking(true)?;
    Ok(Listening::Tcp(socket))
}

impl Listening {
    /// Where it listens; of a Unix domain socket what it was asked for.
    pub(crate) fn address(&self, asked: &Address) -> io::Result<EndAddress> {
        match self {
            Self::Tcp(socket) => socket.local_addr().map(EndAddress::Ip),
            Self::Pipe(_) => Ok(EndAddress::Pipe(asked.host.as_str().into())),
        }
    }
}

/// A connection, and where our end and the client's are unless it came to a pipe.
pub(crate) type Accepted = (Socket, Option<(SocketAddr, SocketAddr)>);

impl Listening {
    /// Who waits in its queue, if anybody does.
    pub(crate) fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener) => {
                let ((socket, remote), local) = (listener.accept()?, listener.local_addr()?);
                socket.set_nonblocking(true)?;
                Ok(over_tcp(TcpStream::from_std(socket)?, local, remote))
            }
            Self::Pipe(listener) => {
                let (socket, _) = listener.accept()?;
                socket.set_nonblocking(true)?;
                Ok((UnixStream::from_std(socket)?.into(), None))
            }
        }
    }
}

/// A socket that listens, in the hands of a runtime.
pub enum Acceptor {
    Tcp(tokio::net::TcpListener, SocketAddr),
    Pipe(tokio::net::UnixListener),
}

impl Acceptor {
    pub fn new(socket: Listening) -> io::Result<Self> {
        Ok(match socket {
            Listening::Tcp(socket) => {
                let local = socket.local_addr()?;
                Self::Tcp(tokio::net::TcpListener::from_std(socket)?, local)
            }
            Listening::Pipe(socket) => Self::Pipe(tokio::net::UnixListener::from_std(socket)?),
        })
    }

    pub(crate) async fn accept(&self) -> io::Result<Accepted> {
        match self {
            Self::Tcp(listener, local) => {
                let (socket, remote) = listener.accept().await?;
                Ok(over_tcp(socket, *local, remote))
            }
            Self::Pipe(listener) => {
                let (socket, _) = listener.accept().await?;
                Ok((socket.into(), None))
            }
        }
    }

    pub(crate) fn into_std(self) -> io::Result<Listening> {
        Ok(match self {
            Self::Tcp(listener, _) => Listening::Tcp(listener.into_std()?),
            Self::Pipe(listener) => Listening::Pipe(listener.into_std()?),
        })
    }
}

fn over_tcp(socket: TcpStream, local: SocketAddr, remote: SocketAddr) -> Accepted {
    let _ = socket.set_nodelay(true);
    // Where it listens on all addresses, only the connection knows which it is.
    let local = match local.ip().is_unspecified() {
        true => socket.local_addr().unwrap_or(local),
        false => local,
    };
    (socket.into(), Some((local, remote)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    /// A path for a socket in a directory of its own, which ends with it.
    struct Place(std::path::PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let own = format!("outrigger-{name}-{}", std::process::id());
            let dir = std::env::temp_dir().join(own);
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn path(&self) -> String {
            self.0.join("s").display().to_string()
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_file_of_a_socket_that_is_gone_is_not_in_the_way_and_others_are() {
        let place = Place::new("room");
        let path = place.path();
        let first = bind_pipe(&path, 0o600, 4, false).unwrap();
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let kind = |known| bind_pipe(&path, 0, 4, known).map_err(|error| error.kind());
        assert_eq!(kind(false).unwrap_err(), io::ErrorKind::AddrInUse);
        let again = kind(true).unwrap();
        UnixStream::connect(&path).unwrap();
        drop((first, again));
        kind(false).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a file of somebody's").unwrap();
        assert_eq!(kind(false).unwrap_err(), io::ErrorKind::AddrInUse);
        assert!(Path::new(&path).exists());
    }

    #[test]
    fn an_abstract_name_has_no_file() {
        let name = format!("@outrigger-abstract-{}", std::process::id());
        let first = bind_pipe(&name, 0, 4, false).unwrap();
        assert!(bind_pipe(&name, 0, 4, false).is_err());
        drop(first);
        bind_pipe(&name, 0, 4, false).unwrap();
    }
}
