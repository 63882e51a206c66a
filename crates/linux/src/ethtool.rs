//! Offload settings of an interface and the receive hash of a card, by the old ethtool calls which every kernel
//! has.

mod rss;

pub use rss::{Rss, RssFunction, rss};

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::Result;
use crate::error::Context;
use crate::sys::{check, interface_name};

/// Offloads to switch; `None` leaves one as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// TCP segmentation by the device (`tso`).
    pub tcp_segmentation: Option<bool>,
    /// Segmentation just before the driver (`gso`), UDP trains included.
    pub generic_segmentation: Option<bool>,
    /// Merging of received packets (`gro`).
    pub generic_receive: Option<bool>,
    /// Transmit checksums by the device (`tx`); the kernel switches segmentation off with it.
    pub transmit_checksum: Option<bool>,
    /// UDP trains segmented by the device (`tx-udp-segmentation`).
    pub udp_segmentation: Option<bool>,
}

impl Offloads {
    /// Every packet on its own, as on a plain wire.
    pub const OFF: Offloads = Offloads {
        tcp_segmentation: Some(false),
        generic_segmentation: Some(false),
        generic_receive: Some(false),
        transmit_checksum: None,
        udp_segmentation: Some(false),
    };
}

// From linux/ethtool.h.
const ETHTOOL_STXCSUM: u32 = 0x17;
const ETHTOOL_GTSO: u32 = 0x1e;
const ETHTOOL_STSO: u32 = 0x1f;
const ETHTOOL_GGSO: u32 = 0x23;
const ETHTOOL_SGSO: u32 = 0x24;
const ETHTOOL_GGRO: u32 = 0x2b;
const ETHTOOL_SGRO: u32 = 0x2c;
const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_BYTES: usize = 32;
/// The kernel has some 64 features; a longer list than this is refused.
const FEATURES_MAX: usize = 256;

/// Switches offloads of an interface of the calling thread's namespace. Needs CAP_NET_ADMIN.
pub fn set_offloads(interface: &str, offloads: &Offloads) -> Result<()> {
    let tool = Tool::open(interface)?;
    let switches = [
        (ETHTOOL_STXCSUM, offloads.transmit_checksum, "transmit checksums"),
        (ETHTOOL_STSO, offloads.tcp_segmentation, "TCP segmentation"),
        (ETHTOOL_SGSO, offloads.generic_segmentation, "generic segmentation"),
        (ETHTOOL_SGRO, offloads.generic_receive, "generic receive offload"),
    ];
    for (command, value, name) in switches {
        if let Some(value) = value {
            tool.set_value(command, value).context(format_args!("switch {name} of {interface}"))?;
        }
    }
    if let Some(value) = offloads.udp_segmentation {
        tool.set_feature("tx-udp-segmentation", value)
            .context(format_args!("switch UDP segmentation of {interface}"))?;
    }
    Ok(())
}

/// The offloads now in force.
pub fn offloads(interface: &str) -> Result<Offloads> {
    let tool = Tool::open(interface)?;
    let read = |command| tool.value(command).context(format_args!("read the offloads of {interface}"));
    let feature = tool.feature("tx-udp-segmentation");
    Ok(Offloads {
        tcp_segmentation: Some(read(ETHTOOL_GTSO)?),
        generic_segmentation: Some(read(ETHTOOL_GGSO)?),
        generic_receive: Some(read(ETHTOOL_GGRO)?),
        transmit_checksum: Some(read(ETHTOOL_GTXCSUM)?),
        udp_segmentation: Some(feature.context(format_args!("read the features of {interface}"))?),
    })
}

struct Tool {
    socket: OwnedFd,
    name: [libc::c_char; libc::IFNAMSIZ],
}

impl Tool {
    fn open(interface: &str) -> Result<Tool> {
        let name = interface_name(interface).context("ethtool")?;
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .context("open a socket")?;
        Ok(Tool { socket, name })
    }

    /// One SIOCETHTOOL with a request of 32-bit words, which the kernel may write to, in place.
    fn call(&self, words: &mut [u32]) -> io::Result<()> {
        const SIOCETHTOOL: libc::Ioctl = 0x8946;
        let data = words.as_mut_ptr().cast();
        let mut request =
            libc::ifreq { ifr_name: self.name, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_data: data } };
        // SAFETY: each caller gives the words that its command reads and writes, no more than it announces in
        // them.
        check(unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) }).map(drop)
    }

    fn set_value(&self, command: u32, value: bool) -> io::Result<()> {
        self.call(&mut [command, u32::from(value)])
    }

    fn value(&self, command: u32) -> io::Result<bool> {
        let mut words = [command, 0];
        self.call(&mut words)?;
        Ok(words[1] != 0)
    }

    /// Position of a named feature, and the number of features there are.
    fn find(&self, wanted: &str) -> io::Result<(usize, usize)> {
        // struct ethtool_sset_info { cmd, reserved, mask: u64, data[1] }
        let mut info = [ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0, 0];
        self.call(&mut info)?;
        let count = info[4] as usize;
        if count > FEATURES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too many features"));
        }
        // struct ethtool_gstrings { cmd, string_set, len, data[len][32] }
        let mut words = vec![0u32; 3 + count * ETH_GSTRING_BYTES / 4];
        words[..3].copy_from_slice(&[ETHTOOL_GSTRINGS, ETH_SS_FEATURES, info[4]]);
        self.call(&mut words)?;
        let names: Vec<u8> = words[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let is_wanted = |name: &[u8]| name.split(|byte| *byte == 0).next() == Some(wanted.as_bytes());
        let index = names.chunks_exact(ETH_GSTRING_BYTES).position(is_wanted);
        let missing = || io::Error::new(io::ErrorKind::Unsupported, format!("no feature {wanted}"));
        Ok((index.ok_or_else(missing)?, count))
    }

    fn feature(&self, name: &str) -> io::Result<bool> {
        let (index, count) = self.find(name)?;
        let blocks = count.div_ceil(32);
        // struct ethtool_gfeatures { cmd, size, { available, requested, active, never_changed }[size] }
        let mut words = vec![0u32; 2 + 4 * blocks];
        words[..2].copy_from_slice(&[ETHTOOL_GFEATURES, blocks as u32]);
        self.call(&mut words)?;
        Ok(words[2 + 4 * (index / 32) + 2] & (1 << (index % 32)) != 0)
    }

    fn set_feature(&self, name: &str, value: bool) -> io::Result<()> {
        let (index, count) = self.find(name)?;
        let blocks = count.div_ceil(32);
        // struct ethtool_sfeatures { cmd, size, { valid, requested }[size] }
        let mut words = vec![0u32; 2 + 2 * blocks];
        words[..2].copy_from_slice(&[ETHTOOL_SFEATURES, blocks as u32]);
        let block = 2 + 2 * (index / 32);
        words[block] = 1 << (index % 32);
        words[block + 1] = u32::from(value) << (index % 32);
        self.call(&mut words)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::netlink::Netlink;
    use crate::testing::isolated;

    #[test]
    fn offloads_of_a_veth_are_switched_off_and_on() {
        isolated(|| {
            Netlink::open().unwrap().add_veth("tool0", "tool1", None).unwrap();
            let all_on = offloads("tool0").unwrap();
            assert_eq!((all_on.tcp_segmentation, all_on.udp_segmentation), (Some(true), Some(true)));
            set_offloads("tool0", &Offloads::OFF).unwrap();
            assert_eq!(
                offloads("tool0").unwrap(),
                Offloads { transmit_checksum: Some(true), ..Offloads::OFF }
            );
            let udp = Offloads { udp_segmentation: Some(true), ..Offloads::default() };
            set_offloads("tool0", &udp).unwrap();
            assert_eq!(offloads("tool0").unwrap().udp_segmentation, Some(true));
            assert_eq!(offloads("tool0").unwrap().tcp_segmentation, Some(false));
            assert!(set_offloads("missing0", &Offloads::OFF).is_err());
        });
    }
}
