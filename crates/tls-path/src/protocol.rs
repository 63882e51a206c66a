//! Messages between the node and its helper for TLS paths: JSON over a packet socket pair (`SOCK_SEQPACKET`), each one packet,
//! some with a socket.
//!
//! ```text
//! node   ─▶ helper   Listen (+ socket)  Dial (+ socket)  HangUp
//! helper ─▶ node     Up  Down  Alive
//! ```

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest message, bytes.
pub const MESSAGE_BYTES_MAX: usize = 4_096;

/// Time between two signs of life of the helper, ms.
pub const ALIVE_MS: u64 = 1_000;

/// For the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHelper {
    /// Peers may connect to the socket that comes with it, a listening TCP one; their datagrams go to the node.
    Listen {
        /// UDP port on which the node hears, on the loopback interface.
        deliver_to: u16,
    },
    /// The socket that comes with it, a TCP one, is being connected to a peer.
    Dial {
        /// Number of the connection from now on.
        id: u32,
    },
    /// A connection is not needed any more.
    HangUp {
        /// Its number.
        id: u32,
    },
}

/// From the helper.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromHelper {
    /// A dialled connection carries datagrams.
    Up {
        /// Its number.
        id: u32,
        /// UDP port on the loopback interface to which the node sends them.
        port: u16,
    },
    /// A dialled connection is no more, or never was.
    Down {
        /// Its number.
        id: u32,
        /// Why, for people.
        reason: String,
    },
    /// It is well.
    Alive {
        /// Rights that it could not give up; empty as a rule.
        kept: String,
        /// Connections of peers that it carries.
        accepted: u32,
    },
}

/// Sends a message, with a socket if one belongs to it.
///
/// # Errors
/// Of the socket; `WouldBlock` when the other side does not read.
pub fn send(socket: impl AsFd, message: &impl Serialize, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let sockets: Vec<BorrowedFd<'_>> = with.into_iter().collect();
    if !sockets.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&sockets)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags)?;
    Ok(())
}

/// Receives a message that has come, with its socket; `None`: the other side is gone.
///
/// # Errors
/// `WouldBlock` when there is none; `InvalidData` when it is no message.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)
    {
        Err(Errno::CONNRESET) => return Ok(None),
        other => other?,
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let with = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    let message = serde_json::from_slice(bytes.get(..received.bytes).unwrap_or_default())?;
    Ok(Some((message, with)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::net::TcpListener;

    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;

    #[test]
    fn messages_bring_their_sockets() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let said = ToHelper::Listen { deliver_to: 4_600 };
        send(&ours, &said, Some(listener.as_fd())).unwrap();
        send(&ours, &ToHelper::HangUp { id: 7 }, None).unwrap();
        let (message, with) = receive::<ToHelper>(&theirs).unwrap().unwrap();
        assert_eq!(message, said);
        let copy = TcpListener::from(with.unwrap());
        assert_eq!(copy.local_addr().unwrap(), listener.local_addr().unwrap());
        let (message, with) = receive::<ToHelper>(&theirs).unwrap().unwrap();
        assert!(message == ToHelper::HangUp { id: 7 } && with.is_none());
        assert_eq!(receive::<ToHelper>(&theirs).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        rustix::net::send(&ours, b"{nonsense", SendFlags::NOSIGNAL).unwrap();
        assert_eq!(receive::<ToHelper>(&theirs).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(ours);
        assert!(receive::<ToHelper>(&theirs).unwrap().is_none());
    }
}
