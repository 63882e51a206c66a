//! Programs that the tests run: which are missing here, and how they are installed.

use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use crate::say;

/// One program, the package that has it, and its use.
pub struct Needed {
    /// Name of the executable.
    pub program: &'static str,
    /// Debian's package; most distributions have one of the same or a similar name.
    pub package: &'static str,
    /// Use in the tests.
    pub purpose: &'static str,
}

const fn needed(program: &'static str, package: &'static str, purpose: &'static str) -> Needed {
    Needed { program, package, purpose }
}

/// The list: what `cargo test --workspace` starts besides the program itself. A C compiler is not in it, for without one
/// nothing is built at all.
pub const PROGRAMS: &[Needed] = &[
    needed("ip", "iproute2", "addresses, routes and interfaces in the tests' namespaces"),
    needed("ss", "iproute2", "sockets of servers that are waited for"),
    needed("tc", "iproute2", "queueing disciplines beside the gateway"),
    needed("ping", "iputils-ping", "ICMP through tunnel and gateway"),
    needed("curl", "curl", "downloads and FTP through tunnel and gateway"),
    needed("ssh", "openssh-client", "sessions that must outlive changes"),
    needed("ssh-keygen", "openssh-client", "keys for those sessions"),
    needed("sshd", "openssh-server", "the server of those sessions"),
    needed("dnsmasq", "dnsmasq-base", "name servers and DHCP servers around the gateway"),
    needed("dhclient", "isc-dhcp-client", "the lease of an uplink, and of a host behind the gateway"),
    needed("ufw", "ufw", "a host's firewall beside the gateway"),
    needed("iptables-legacy", "iptables", "a host's firewall of the older kind"),
    needed("unbound", "unbound", "a resolver on the gateway"),
    needed("radvd", "radvd", "router advertisements on the gateway"),
    needed(
        "keepalived",
        "keepalived",
        "VRRP on the gateway, and addresses of a dispatcher that another one takes over",
    ),
    needed("swanctl", "strongswan-swanctl", "IPsec of the host, and of a client behind it"),
    needed("charon", "strongswan-charon", "the daemon of that"),
    needed("plugins/libstrongswan-kernel-libipsec.so", "libcharon-extra-plugins", "ESP in that daemon"),
    needed("ethtool", "ethtool", "offloads of devices in the tests' namespaces"),
    needed("nginx", "nginx-light", "a server with TLS and the PROXY protocol behind the gateway"),
    needed("openssl", "openssl", "certificates of that server"),
    needed("iperf3", "iperf3", "TCP and UDP streams of a foreign program"),
    needed("nft", "nftables", "the kernel's own filter, for comparison and where BPF is not allowed"),
    needed("unshare", "util-linux", "daemons with files of their own"),
    needed("python3", "python3", "devices and routers that behave as the tests need"),
    needed("tcpdump", "tcpdump", "what other tools see of the datapath"),
    needed("tshark", "tshark", "datagrams between units and of the tunnel, as the dissector shows them"),
    needed("jq", "jq", "queries of the NAT log as the documentation has them"),
    needed("etcd", "etcd-server", "the store of several managers"),
    needed("bird", "bird2", "dispatchers and routers that speak BGP"),
    needed("birdc", "bird2", "switches what BIRD announces"),
    needed("setpriv", "util-linux", "a gateway without some of its rights"),
    needed("sysctl", "procps", "settings of the kernel in the tests' namespaces"),
];

/// Programs of the list that are not in `PATH` nor where administrators' and IPsec's programs are.
pub fn missing() -> Vec<&'static Needed> {
    PROGRAMS.iter().filter(|needed| !is_installed(needed.program)).collect()
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain(["/usr/sbin", "/sbin", "/usr/lib/ipsec"].map(Into::into));
    folders.into_iter().any(|folder| folder.join(program).is_file())
}

/// The packages of these programs, each once, in the order of the list.
pub fn packages(programs: &[&Needed]) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for needed in programs {
        if !packages.contains(&needed.package) {
            packages.push(needed.package);
        }
    }
    packages
}

/// The text about missing programs: each with its use, and the line that installs them.
pub fn advice(programs: &[&Needed]) -> String {
    let mut text = "the tests need programs that are not installed:\n".to_owned();
    for Needed { program, package, purpose } in programs {
        text.push_str(&format!("  {program:<11} package {package:<15} {purpose}\n"));
    }
    let packages = packages(programs).join(" ");
    text.push_str(&format!(
        "install them with\n  apt-get update && apt-get install -y --no-install-recommends {packages}\nor let \
         `cargo xtask test --install` do it (Debian and what is made from it; elsewhere install the packages that have \
         these programs: dnf, zypper, pacman and apk name most of them alike)\n"
    ));
    text
}

/// Installs the packages of these programs with apt-get, as root or through sudo.
///
/// # Errors
/// Without apt-get, without the right to use it, and when it fails or did not bring the programs.
pub fn install(programs: &[&Needed]) -> anyhow::Result<()> {
    anyhow::ensure!(is_installed("apt-get"), "no apt-get here to install with; {}", advice(programs));
    let packages = packages(programs);
    say(&format!("installing {}\n", packages.join(" ")))?;
    apt_get(&["update", "-q"])?;
    apt_get(&[&["install", "-yq", "--no-install-recommends"], &packages[..]].concat())?;
    let missing = missing();
    anyhow::ensure!(missing.is_empty(), "installed, and still {}", advice(&missing));
    Ok(())
}

fn apt_get(arguments: &[&str]) -> anyhow::Result<()> {
    // A file in /proc belongs to the effective user of its process.
    let is_root = std::os::unix::fs::MetadataExt::uid(&Path::new("/proc/self").metadata()?) == 0;
    let mut command = if is_root || !is_installed("sudo") {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["--preserve-env=DEBIAN_FRONTEND", "apt-get"]);
        sudo
    };
    command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let status = command.status().context("apt-get does not run")?;
    anyhow::ensure!(status.success(), "apt-get {} failed: {status}", arguments.join(" "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_program_use_and_one_line() {
        let wanted: Vec<&Needed> =
            PROGRAMS.iter().filter(|n| ["ssh", "ssh-keygen", "nft"].contains(&n.program)).collect();
        let text = advice(&wanted);
        assert!(text.contains("nft         package nftables"), "{text}");
        assert!(
            text.contains("apt-get install -y --no-install-recommends openssh-client nftables\n"),
            "{text}"
        );
    }

    #[test]
    fn a_program_that_nobody_has_is_missing() {
        assert!(is_installed("sh"));
        assert!(!is_installed("no-such-program-anywhere"));
    }

    #[test]
    fn each_program_stands_once() {
        for (index, needed) in PROGRAMS.iter().enumerate() {
            assert!(
                !PROGRAMS[index + 1..].iter().any(|other| other.program == needed.program),
                "{}",
                needed.program
            );
            assert!(!needed.package.is_empty() && !needed.purpose.is_empty(), "{}", needed.program);
        }
    }
}
