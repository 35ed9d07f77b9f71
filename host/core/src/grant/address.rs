//! Which addresses the host connects to for a plugin: public ones, and what the config names.
//!
//! A list of what is denied would forget something, so for IPv6 it is the other way round: only global unicast is public,
//! less the parts of it that carry IPv4 addresses or are reserved. The ranges are those of IANA's two special-purpose
//! registries (RFC 6890 and its successors).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// An address or a range of them, `10.0.0.5`, `10.0.0.0/8` or `fd00::/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AddressRange {
    network: IpAddr,
    prefix_bits: u32,
}

/// A text that is no address and no range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an IP address or a range such as `10.0.0.0/8`; a host name is not enough, since it can change")]
pub struct InvalidAddressRange(pub String);

impl AddressRange {
    /// Whether the range has this address. An IPv4 address that is written as IPv6 (`::ffff:10.0.0.5`) is the IPv4 address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.network, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                same_prefix(u128::from(network.to_bits()), u128::from(address.to_bits()), 32, self.prefix_bits)
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                same_prefix(network.to_bits(), address.to_bits(), 128, self.prefix_bits)
            }
            _ => false,
        }
    }
}

fn same_prefix(a: u128, b: u128, bits: u32, prefix_bits: u32) -> bool {
    let dropped = bits.saturating_sub(prefix_bits);
    a.checked_shr(dropped).unwrap_or(0) == b.checked_shr(dropped).unwrap_or(0)
}

impl std::str::FromStr for AddressRange {
    type Err = InvalidAddressRange;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let invalid = || InvalidAddressRange(text.to_owned());
        let (address, prefix) = text.split_once('/').map_or((text, None), |(address, prefix)| (address, Some(prefix)));
        let network: IpAddr = address.parse::<IpAddr>().map_err(|_| invalid())?.to_canonical();
        let bits = if network.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match prefix {
            None => bits,
            Some(prefix) => prefix.parse().ok().filter(|prefix| *prefix <= bits).ok_or_else(invalid)?,
        };
        Ok(Self { network, prefix_bits })
    }
}

impl TryFrom<String> for AddressRange {
    type Error = InvalidAddressRange;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl std::fmt::Display for AddressRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let whole = self.prefix_bits == if self.network.is_ipv4() { 32 } else { 128 };
        if whole { write!(f, "{}", self.network) } else { write!(f, "{}/{}", self.network, self.prefix_bits) }
    }
}

impl From<AddressRange> for String {
    fn from(range: AddressRange) -> Self {
        range.to_string()
    }
}

/// Why an address is not connected to unless the config names it; `None` when it is public.
#[must_use]
pub fn why_private(address: IpAddr) -> Option<&'static str> {
    match address.to_canonical() {
        IpAddr::V4(address) => why_private_v4(address),
        IpAddr::V6(address) => why_private_v6(address),
    }
}

fn why_private_v4(address: Ipv4Addr) -> Option<&'static str> {
    let [a, b, c, _] = address.octets();
    match (a, b, c) {
        (0, ..) => Some("unspecified"),
        (127, ..) => Some("loopback"),
        (10, ..) | (172, 16..=31, _) | (192, 168, _) => Some("private"),
        (100, 64..=127, _) => Some("shared by a carrier"),
        (169, 254, _) => Some("link-local"),
        (224..=239, ..) => Some("multicast"),
        (192, 0, 0 | 2) | (192, 88, 99) | (198, 18..=19, _) | (198, 51, 100) | (203, 0, 113) | (240..=255, ..) => {
            Some("reserved")
        }
        _ => None,
    }
}

fn why_private_v6(address: Ipv6Addr) -> Option<&'static str> {
    if address.is_loopback() {
        return Some("loopback");
    }
    if address.is_unspecified() {
        return Some("unspecified");
    }
    match address.segments() {
        [0xfe80..=0xfebf, ..] => Some("link-local"),
        [0xfc00..=0xfdff, ..] => Some("unique-local"),
        [0xff00..=0xffff, ..] => Some("multicast"),
        // They carry IPv4 addresses to who knows where: Teredo and 6to4.
        [0x2001, 0, ..] | [0x2002, ..] => Some("a tunnel"),
        // Protocol assignments, benchmarks, documentation.
        [0x2001, 1..=0x01ff | 0x0db8, ..] | [0x3fff, 0..=0x0fff, ..] => Some("reserved"),
        [0x2000..=0x3fff, ..] => None,
        // Translation to IPv4 (64:ff9b::/96) is here too.
        _ => Some("not global unicast"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(address: &str) -> Option<&'static str> {
        why_private(address.parse().unwrap())
    }

    #[test]
    fn what_is_not_public_needs_to_be_named() {
        let private = [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.5",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.0.3",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "192.0.0.8",
            "198.18.0.1",
            "224.0.0.1",
            "239.1.1.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "100::1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fd12:3456::1",
            "ff02::1",
        ];
        for address in private {
            assert!(why(address).is_some(), "{address} counts as public");
        }
        for address in ["1.1.1.1", "93.184.216.34", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"] {
            assert_eq!(why(address), None, "{address}");
        }
    }

    #[test]
    fn ranges_contain_what_they_say_and_nothing_else() {
        let contains =
            |range: &str, address: &str| range.parse::<AddressRange>().unwrap().contains(address.parse().unwrap());
        assert!(contains("10.0.0.5", "10.0.0.5"));
        assert!(contains("10.0.0.5", "::ffff:10.0.0.5"));
        assert!(!contains("10.0.0.5", "10.0.0.6"));
        assert!(contains("10.0.0.0/8", "10.255.0.1"));
        assert!(!contains("10.0.0.0/8", "11.0.0.0"));
        assert!(contains("0.0.0.0/0", "127.0.0.1"));
        assert!(!contains("0.0.0.0/0", "::1"));
        assert!(contains("fd00::/8", "fdff::1"));
        assert!(!contains("fd00::/8", "fc00::1"));
        for bad in ["", "localhost", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0", "::/129"] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
        assert_eq!("10.0.0.0/8".parse::<AddressRange>().unwrap().to_string(), "10.0.0.0/8");
        assert_eq!("::1".parse::<AddressRange>().unwrap().to_string(), "::1");
    }
}
