//! Two hosts on one machine: network namespaces with a link between them.

use std::process::Command;

/// Two network namespaces, joined by a pair of virtual interfaces. Deleted on drop.
#[derive(Debug)]
pub struct Namespaces {
    names: [String; 2],
}

impl Namespaces {
    /// The first one's address.
    pub const ADDR: &str = "10.98.0.1";

    /// # Errors
    /// What is missing here.
    pub fn new() -> Result<Self, String> {
        let id = std::process::id();
        let namespaces = Self { names: [format!("lab{id}a"), format!("lab{id}b")] };
        let [a, b] = &namespaces.names;
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add lab0 netns {a} type veth peer name lab1 netns {b}"))?;
        for (name, interface, addr) in [(a, "lab0", Self::ADDR), (b, "lab1", "10.98.0.2")] {
            ip(&format!("-n {name} addr add {addr}/24 dev {interface}"))?;
            ip(&format!("-n {name} link set {interface} up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(namespaces)
    }

    /// `command` on one of the two hosts, in its folder and with its variables.
    pub fn command_on(&self, host: usize, command: &Command) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.names[host]]).arg(command.get_program()).args(command.get_args());
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside.current_dir(command.get_current_dir().expect("a job's folder")).stdin(std::process::Stdio::null());
        inside
    }

    /// From now on nothing arrives, and nobody is told.
    pub fn cut(&self) {
        ip(&format!("-n {} link set lab1 down", self.names[1])).expect("a link");
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            // One that was not made cannot be deleted.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(args: &str) -> Result<(), String> {
    match Command::new("ip").args(args.split(' ')).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("ip {args}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("ip (Debian: iproute2): {error}")),
    }
}
