//! Looks for a way out.

use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};

use fulgurite_sdk::{Value, json};

/// Files, network, environment, arguments.
pub(crate) fn machine() -> Value {
    let write = std::fs::write("/tmp/fulgurite-escaped", "x");
    json!({
        "read": std::fs::read("/etc/passwd").map(|bytes| bytes.len()).map_err(|error| error.to_string()),
        "up": std::fs::read("../../../../etc/passwd").map(|bytes| bytes.len()).map_err(|error| error.to_string()),
        "list": std::fs::read_dir("/").map(std::iter::Iterator::count).map_err(|error| error.to_string()),
        "here": std::fs::read_dir(".").map(std::iter::Iterator::count).map_err(|error| error.to_string()),
        "write": write.map_err(|error| error.to_string()),
        "connect": TcpStream::connect("127.0.0.1:80").map(|_| ()).map_err(|error| error.to_string()),
        "listen": TcpListener::bind("127.0.0.1:0").map(|_| ()).map_err(|error| error.to_string()),
        "resolve": "localhost:80".to_socket_addrs().map(|_| ()).map_err(|error| error.to_string()),
        "environment": std::env::vars().collect::<Vec<_>>(),
        "arguments": std::env::args().collect::<Vec<_>>(),
    })
}

/// How many of many tries to open a socket came to something, by kind.
pub(crate) fn network() -> Value {
    let addresses = ["127.0.0.1:1", "[::1]:1", "169.254.169.254:80", "0.0.0.0:0", "255.255.255.255:9"];
    let names = ["localhost:80", "metadata.internal:80", "example.com:443"];
    let (mut tcp, mut listen, mut udp, mut resolved) = (0, 0, 0, 0);
    for _ in 0..50 {
        for address in addresses {
            tcp += u32::from(TcpStream::connect(address).is_ok());
            listen += u32::from(TcpListener::bind(address).is_ok());
            udp += u32::from(UdpSocket::bind(address).is_ok());
        }
        for name in names {
            resolved += u32::from(name.to_socket_addrs().is_ok());
        }
    }
    json!({"tcp": tcp, "listen": listen, "udp": udp, "resolved": resolved})
}

/// Starts a program and a thread.
pub(crate) fn spawn() -> Value {
    let program = std::process::Command::new("/bin/sh").args(["-c", "touch /tmp/fulgurite-escaped"]).spawn();
    let thread = std::thread::Builder::new().spawn(|| ());
    json!({
        "program": program.map(|_| ()).map_err(|error| error.to_string()),
        "thread": thread.map(|_| ()).map_err(|error| error.to_string()),
    })
}
