//! Who listens on a port of this machine, for messages.

use std::path::Path;

/// State of a listening socket in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// The process that listens on `port`, as "NAME (pid 1234)"; `None` where nobody does, or who does is another user's.
pub fn holder(port: u16) -> Option<String> {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let sockets: Vec<String> = tables.iter().flat_map(|table| listening_inodes(table, port)).collect();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let pid = pids.into_iter().find(|&pid| holds_any(pid, &sockets))?;
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some(format!("{} (pid {pid})", name.trim()))
}

/// The inodes of the sockets that listen on `port`, as descriptors name them.
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let inode = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let (_, local_port) = columns.get(1)?.rsplit_once(':')?;
        let is_wanted = u16::from_str_radix(local_port, 16) == Ok(port) && columns.get(3) == Some(&LISTEN);
        is_wanted.then(|| format!("socket:[{}]", columns.get(9).copied().unwrap_or_default()))
    };
    table.lines().skip(1).filter_map(inode).collect()
}

/// The process has one of these sockets open. Those of other users' processes cannot be seen.
fn holds_any(pid: u32, sockets: &[String]) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let is_one = |path: &Path| sockets.iter().any(|socket| Path::new(socket) == path);
    descriptors.filter_map(|entry| std::fs::read_link(entry.path()).ok()).any(|target| is_one(&target))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_is_found_by_its_port() {
        let own = format!("(pid {})", std::process::id());
        for addr in ["127.0.0.1:0", "0.0.0.0:0"] {
            let listener = TcpListener::bind(addr).unwrap();
            let port = listener.local_addr().unwrap().port();
            assert!(holder(port).unwrap().ends_with(&own), "{:?}", holder(port));
            drop(listener);
            assert_eq!(holder(port), None);
        }
    }

    #[test]
    fn only_listening_sockets_of_that_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
                     0: 0100007F:7345 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0 100 0\n   \
                     1: 0100007F:7345 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 4712 1 0 20 4\n";
        assert_eq!(listening_inodes(table, 0x7345), ["socket:[4711]"]);
        assert!(listening_inodes(table, 0x9999).is_empty());
    }
}
