//! TCP sockets that go their way by a device and a firewall mark, as [`crate::udp`]'s do.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};

use rustix::io::Errno;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Connections that wait to be taken, at most.
const BACKLOG: i32 = 128;

/// A socket that is being connected to `remote`, not blocking. `device`: only by this interface (SO_BINDTODEVICE); `mark`:
/// firewall mark of all that is sent, 0 = none.
///
/// # Errors
/// What is known at once, as that no route leads there; a refusal comes later.
pub fn connect(remote: SocketAddr, device: Option<&str>, mark: u32) -> io::Result<TcpStream> {
    let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
    let socket = open(Domain::for_address(remote), device, mark)?;
    match socket.connect(&SockAddr::from(remote)) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => {}
        Err(error) => return Err(error),
    }
    Ok(socket.into())
}

/// A socket on which peers connect, not blocking; its connections have its mark.
///
/// # Errors
/// Of the system; `AddrInUse` when another program has the port.
pub fn listen(local: SocketAddr, mark: u32) -> io::Result<TcpListener> {
    let socket = open(Domain::for_address(local), None, mark)?;
    if local.is_ipv6() {
        socket.set_only_v6(!local.ip().is_unspecified())?;
    }
    // What a run before had open may wait for its last packets still.
    socket.set_reuse_address(true)?;
    socket.bind(&SockAddr::from(local))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn open(domain: Domain, device: Option<&str>, mark: u32) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if let Some(device) = device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if mark != 0 {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn one_connects_to_the_other() {
        let listener = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), 0).unwrap();
        let at = listener.local_addr().unwrap();
        assert_eq!(listen(at, 0).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let stream = connect(at, None, 0).unwrap();
        let from = loop {
            match listener.accept() {
                Ok((_, from)) => break from,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        };
        assert_eq!(from, stream.local_addr().unwrap());
    }
}
