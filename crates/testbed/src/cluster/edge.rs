//! A peer of the cluster as a hub: a gateway on the client's machine, which reaches the server's network through it.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{ClusterBed, Duty, FIRST_DATA_PLANE, LAN, PORT};
use crate::program::Program;

/// The peer's address inside its bond.
pub const EDGE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// A peer of the hub.
pub struct Edge {
    /// Its gateway.
    pub program: Program,
    /// The control socket of its gateway.
    pub socket: PathBuf,
    /// Its log.
    pub log: PathBuf,
}

impl ClusterBed {
    /// Makes the cluster a hub with one peer. Before anything runs.
    ///
    /// # Errors
    /// What the system refuses.
    pub fn make_hub(&mut self) -> anyhow::Result<()> {
        let (mut private, mut public) = (Vec::new(), Vec::new());
        for name in ["hub.key", "edge.key"] {
            let key = self.run(&["genkey"], None)?;
            self.directory.write(name, &key)?;
            public.push(self.run(&["pubkey"], Some(&key))?.trim().to_owned());
            private.push(key.trim().to_owned());
        }
        for machine in self.machines.iter().filter(|machine| machine.duty != Duty::Manager) {
            let mut text = std::fs::read_to_string(&machine.config)?;
            // Both ways to give it.
            let key = match machine.duty {
                Duty::DataPlane if machine.id == FIRST_DATA_PLANE => {
                    "hub-key-file = \"hub.key\"\n".to_owned()
                }
                Duty::DataPlane => format!("hub-key = \"{}\"\n", private[0]),
                _ => String::new(),
            };
            text = text.replacen("[cluster]\n", &format!("[cluster]\nhub = true\n{key}"), 1);
            if machine.duty == Duty::DataPlane {
                writeln!(text, "[[peer]]\nname = \"edge\"\nhub = true\npublic-key = \"{}\"", public[1])?;
                writeln!(text, "allowed-ips = [\"{EDGE}/32\"]")?;
            }
            std::fs::write(&machine.config, text)?;
        }
        let path = self.directory.path().display();
        let mut text = format!(
            "[node]\nname = \"edge\"\nprivate-key-file = \"edge.key\"\nstate-dir = \"{path}/edge\"\n"
        );
        writeln!(text, "control-socket = \"{path}/edge.sock\"\n[tun]\naddress = [\"{EDGE}/24\"]")?;
        writeln!(
            text,
            "[[peer]]\nname = \"hub\"\npublic-key = \"{}\"\nendpoints = [\"{LAN}:{PORT}\"]",
            public[0]
        )?;
        writeln!(text, "allowed-ips = [\"10.2.0.0/24\"]")?;
        self.directory.write("edge.toml", text)?;
        Ok(())
    }

    /// Starts the peer's gateway, on the client's machine.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_edge(&self) -> anyhow::Result<Edge> {
        let file = |name: &str| self.directory.path().join(name);
        let mut command = Command::new(&self.program);
        command.arg("up").arg(file("edge.toml"));
        let log = file("edge.log");
        let program = self.client.start(command, Some(&log))?;
        Ok(Edge { program, socket: file("edge.sock"), log })
    }

    /// The program that all machines run.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }
}
