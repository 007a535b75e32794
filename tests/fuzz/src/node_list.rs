//! SLURM's lists of hosts.

use fsdp_control::ControlError;
use fsdp_control::slurm::expand_hostlist;

use crate::within::memory_bound;

/// Most hosts of a list.
const MAX_HOSTS: usize = 1 << 16;

/// An accepted list has few hosts, each with a name that a host can have, and those names make the same list again. A
/// refusal gives a place in the list.
pub fn node_list(data: &[u8]) {
    let Ok(list) = std::str::from_utf8(data) else { return };
    match memory_bound(data.len(), || expand_hostlist(list)) {
        Ok(hosts) => {
            assert!((1..=MAX_HOSTS).contains(&hosts.len()), "{} hosts", hosts.len());
            let is_name = |host: &String| {
                !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            };
            assert!(hosts.iter().all(is_name));
            // A list of plain names, comma by comma.
            if hosts.len() <= 1000 {
                assert_eq!(expand_hostlist(&hosts.join(",")).expect("plain names"), hosts);
            }
        }
        Err(ControlError::NodeList { position, list: named, reason }) => {
            assert!((1..=list.len() + 1).contains(&position), "position {position} of {}", list.len());
            assert!(named == list && !reason.is_empty());
        }
        Err(other) => panic!("another error: {other}"),
    }
}
