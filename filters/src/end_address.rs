//! Where the ends of a client's connection are.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// Where one end of a connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndAddress {
    /// At an address of the internet's.
    Ip(SocketAddr),
    /// At a Unix domain socket. Those who connect have no names of their own: both ends are what the listener is at.
    Pipe(Arc<str>),
}

impl EndAddress {
    /// Its address, without its port.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Ip(address) => Some(address.ip()),
            Self::Pipe(_) => None,
        }
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Ip(address) => Some(address.port()),
            Self::Pipe(_) => None,
        }
    }
}

impl From<SocketAddr> for EndAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

impl fmt::Display for EndAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Pipe(path) => f.write_str(path),
        }
    }
}
