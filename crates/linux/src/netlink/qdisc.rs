//! Queueing disciplines: what `tc` does to packets that come in.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcMessage};

use super::Netlink;
use crate::Result;

impl Netlink {
    /// Indices of devices with an `ingress` queueing discipline: `tc` polices, redirects or shapes what comes in by them.
    ///
    /// # Errors
    /// As the kernel refuses the question.
    pub fn ingress_disciplines(&self) -> Result<Vec<u32>> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        self.dump(&request, "list queueing disciplines", |message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(message) => {
                let is_ingress = message
                    .attributes
                    .iter()
                    .any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind == "ingress"));
                u32::try_from(message.header.index).ok().filter(|_| is_ingress)
            }
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::sys::interface_index;
    use crate::testing::isolated;

    #[test]
    fn devices_with_an_ingress_discipline() {
        isolated(|| {
            let run = |text: &str| {
                let done = std::process::Command::new("sh").args(["-c", text]).status().unwrap();
                assert!(done.success(), "{text}");
            };
            run("ip link add dev near type veth peer name far");
            run("tc qdisc add dev near root tbf rate 10mbit burst 20kb latency 50ms");
            let netlink = Netlink::open().unwrap();
            assert_eq!(netlink.ingress_disciplines().unwrap(), Vec::<u32>::new());
            run("tc qdisc add dev far handle ffff: ingress");
            assert_eq!(netlink.ingress_disciplines().unwrap(), [interface_index("far").unwrap()]);
        });
    }
}
