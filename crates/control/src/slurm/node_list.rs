//! SLURM's short form of lists of hosts.

use super::MAX_HOSTS;
use crate::ControlError;

/// Longest name of a host. It bounds the memory that a short list can ask for.
const MAX_NAME_BYTES: usize = 255;

/// The hosts of a SLURM node list, in order: `n[01-02,7],login` -> `n01`, `n02`, `n7`, `login`. Several brackets of one
/// name combine, the last one fastest: `a[1-2]b[3-4]` -> `a1b3`, `a1b4`, `a2b3`, `a2b4`. At least one host.
///
/// # Errors
/// [`ControlError::NodeList`] gives the position of what is no node list, or of what would make it too long.
pub fn expand_hostlist(list: &str) -> Result<Vec<String>, ControlError> {
    let failed = |at: usize, reason: &str| {
        Err(ControlError::NodeList { list: list.to_owned(), position: at + 1, reason: reason.to_owned() })
    };
    let bytes = list.as_bytes();
    let mut hosts: Vec<String> = Vec::new();
    // The names so far of the item at hand, which brackets multiply.
    let mut names = vec![String::new()];
    let mut at = 0;
    loop {
        if names.iter().any(|name| name.len() > MAX_NAME_BYTES) {
            return failed(at - 1, "expected a name of at most 255 characters");
        }
        match bytes.get(at) {
            None | Some(b',') => {
                if names[0].is_empty() {
                    return failed(at, "expected the name of a host");
                }
                if hosts.len() + names.len() > MAX_HOSTS {
                    return failed(at, "expected at most 65536 hosts");
                }
                hosts.append(&mut names);
                names.push(String::new());
                if at == bytes.len() {
                    return Ok(hosts);
                }
                at += 1;
            }
            Some(b'[') => {
                let Some(len) = list[at..].find(']') else { return failed(at, "this bracket is not closed") };
                let mut numbers = Vec::new();
                let mut start = at + 1;
                for range in list[start..at + len].split(',') {
                    match expand_range(range) {
                        Some(range) if numbers.len() + range.len() <= MAX_HOSTS => numbers.extend(range),
                        Some(_) => return failed(start, "expected at most 65536 hosts"),
                        None => return failed(start, "expected a number or a range such as 01-04"),
                    }
                    start += range.len() + 1;
                }
                if names.len() * numbers.len() > MAX_HOSTS {
                    return failed(at, "expected at most 65536 hosts");
                }
                names = names.iter().flat_map(|name| numbers.iter().map(move |n| format!("{name}{n}"))).collect();
                at += len + 1;
            }
            Some(byte) if byte.is_ascii_alphanumeric() || b"-_.".contains(byte) => {
                names.iter_mut().for_each(|name| name.push(char::from(*byte)));
                at += 1;
            }
            Some(_) => return failed(at, "expected a letter, a digit, or one of - _ . [ ,"),
        }
    }
}

/// `01-03` -> `01`, `02`, `03`; `7` -> `7`. `None` for what is no range, runs down, or is longer than [`MAX_HOSTS`].
fn expand_range(range: &str) -> Option<Vec<String>> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok()).flatten();
    let (from, to) = (number(first)?, number(last)?);
    if to.checked_sub(from)? >= MAX_HOSTS as u64 || first.len() > 20 {
        return None;
    }
    Some((from..=to).map(|n| format!("{n:0width$}", width = first.len())).collect())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// (List, its hosts separated by blanks).
    const LISTS: &[(&str, &str)] = &[
        ("login", "login"),
        ("n[01-04,7],login", "n01 n02 n03 n04 n7 login"),
        ("gpu[1-2]-ib[0-1]", "gpu1-ib0 gpu1-ib1 gpu2-ib0 gpu2-ib1"),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[098-101],m[3]", "n098 n099 n100 n101 m3"),
        ("rack[1-2]node[01-02]", "rack1node01 rack1node02 rack2node01 rack2node02"),
        ("b,a,c10,c9", "b a c10 c9"),
        ("host-a.example,host_b", "host-a.example host_b"),
        ("x[5,1-2,1]", "x5 x1 x2 x1"),
    ];

    #[test]
    fn node_lists_expand_in_order() {
        for (list, hosts) in LISTS {
            assert_eq!(expand_hostlist(list).unwrap().join(" "), *hosts, "{list}");
        }
    }

    #[test]
    fn node_lists_expand_as_scontrol_expands_them() {
        // It wants a config, though it asks nobody.
        let conf = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(conf.path(), "ClusterName=test\nSlurmctldHost=localhost\n").unwrap();
        for (list, _) in LISTS {
            let mut command = Command::new("scontrol");
            command.args(["show", "hostnames", list]).env("SLURM_CONF", conf.path());
            let output = match command.output() {
                Ok(output) if output.status.success() => String::from_utf8(output.stdout).unwrap(),
                Ok(output) => return eprintln!("skipped: scontrol: {}", String::from_utf8_lossy(&output.stderr)),
                Err(error) => return eprintln!("skipped: scontrol (Debian: slurm-client): {error}"),
            };
            let expected: Vec<&str> = output.lines().collect();
            assert_eq!(expand_hostlist(list).unwrap(), expected, "{list}");
        }
    }

    #[test]
    fn what_is_no_node_list_is_refused_with_its_position() {
        for (list, position, reason) in [
            ("", 1, "the name of a host"),
            ("a,,b", 3, "the name of a host"),
            ("a,b,", 5, "the name of a host"),
            ("n[1-2", 2, "not closed"),
            ("n1]", 3, "a letter"),
            ("n[1 2]", 3, "a number or a range"),
            ("n[1,]", 5, "a number or a range"),
            ("n[]", 3, "a number or a range"),
            ("n[1,4-3]", 5, "a number or a range"),
            ("n[1-2-3]", 3, "a number or a range"),
            ("n[-1]", 3, "a number or a range"),
            ("n[+1-2]", 3, "a number or a range"),
            ("n[a-b]", 3, "a number or a range"),
            ("n[[1]]", 3, "a number or a range"),
            ("n[0-99999999999999999999]", 3, "a number or a range"),
            ("n[0-65536]", 3, "a number or a range"),
            ("n[1-60000,1-60000]", 11, "at most 65536 hosts"),
            ("n[1-60000],m[1-60000]", 22, "at most 65536 hosts"),
            ("a[1-300]b[1-300]", 10, "at most 65536 hosts"),
            (&"n".repeat(256), 256, "at most 255 characters"),
            (&format!("{}[1-65536]", "n".repeat(253)), 262, "at most 255 characters"),
            ("n;rm", 2, "a letter"),
            ("né", 2, "a letter"),
        ] {
            let error = expand_hostlist(list).unwrap_err();
            let ControlError::NodeList { position: got, .. } = &error else { panic!("{list}: {error}") };
            assert_eq!(*got, position, "{list}: {error}");
            assert!(error.to_string().contains(reason), "{list}: {error}");
        }
    }
}
