//! `envoy.config.core.v3.CidrRange`: IP addresses that begin alike.

use crate::{problems::ConfigErrors, wire::envoy::config::core::v3 as core};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A range of addresses; what follows the prefix is zero, so that equal ranges are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CidrRange {
    address: IpAddr,
    prefix_len: u8,
}

impl CidrRange {
    /// The range of all addresses whose first `prefix_len` bits are those of `address`; too large a length is the whole
    /// address.
    #[must_use]
    pub fn new(address: IpAddr, prefix_len: u8) -> Self {
        let prefix_len = prefix_len.min(bits(address));
        Self {
            address: cut(address, prefix_len),
            prefix_len,
        }
    }

    /// How many bits of an address it says.
    #[must_use]
    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// Whether `address` is one of them. IPv4 and IPv6 are strangers to each other.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4() && cut(address, self.prefix_len) == self.address
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn cut(address: IpAddr, prefix_len: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len));
            Ipv4Addr::from_bits(v4.to_bits() & mask.unwrap_or(0)).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix_len));
            Ipv6Addr::from_bits(v6.to_bits() & mask.unwrap_or(0)).into()
        }
    }
}

impl TryFrom<core::CidrRange> for CidrRange {
    type Error = ConfigErrors;

    fn try_from(wire: core::CidrRange) -> Result<Self, ConfigErrors> {
        let address: IpAddr = wire.address_prefix.parse().map_err(|_| {
            let message = format!("'{}' is no IP address", wire.address_prefix);
            ConfigErrors::one("address_prefix", message)
        })?;
        let prefix_len = wire.prefix_len.unwrap_or(0);
        match u8::try_from(prefix_len) {
            Ok(prefix_len) if prefix_len <= bits(address) => Ok(Self::new(address, prefix_len)),
            _ => {
                let message = format!("must be at most {}, is {prefix_len}", bits(address));
                Err(ConfigErrors::one("prefix_len", message))
            }
        }
    }
}

impl From<&CidrRange> for core::CidrRange {
    fn from(plain: &CidrRange) -> Self {
        Self {
            address_prefix: plain.address.to_string(),
            prefix_len: Some(plain.prefix_len.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_its_addresses_and_no_others() {
        let range = |text: &str, length| CidrRange::new(text.parse().unwrap(), length);
        let has = |range: CidrRange, text: &str| range.contains(text.parse().unwrap());
        assert!(has(range("10.1.2.3", 8), "10.255.0.1"));
        assert!(!has(range("10.1.2.3", 8), "11.0.0.1"));
        assert!(has(range("0.0.0.0", 0), "8.8.8.8"));
        assert!(!has(range("0.0.0.0", 0), "::1"));
        assert!(has(range("10.0.0.1", 32), "10.0.0.1"));
        assert!(!has(range("10.0.0.1", 32), "10.0.0.2"));
        assert!(has(range("fd00::", 8), "fdff::1"));
        assert!(!has(range("fd00::", 8), "fe00::1"));
        assert_eq!(range("10.1.2.3", 8), range("10.9.9.9", 8));
    }
}
