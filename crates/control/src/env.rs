//! The variables that the launcher sets and a worker reads. The first seven are those of torchrun.

use std::os::fd::RawFd;
use std::str::FromStr;

use crate::ControlError;

/// A worker's place in the run, and the descriptors it inherited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEnv {
    /// `RANK`: this process among all of the run, `0..world_size`.
    pub rank: usize,
    /// `LOCAL_RANK`: this process among those of its launcher, `0..local_world_size`.
    pub local_rank: usize,
    /// `WORLD_SIZE`: number of ranks of the run.
    pub world_size: usize,
    /// `LOCAL_WORLD_SIZE`: number of ranks of this launcher.
    pub local_world_size: usize,
    /// `GROUP_RANK`: the launcher (node) among all launchers.
    pub group_rank: usize,
    /// `MASTER_ADDR`: host of the store.
    pub master_addr: String,
    /// `MASTER_PORT`: port of the store.
    pub master_port: u16,
    /// `FSDP_LIFELINE_FD`: read end of the launcher's lifeline; see [`crate::lifeline`].
    pub lifeline_fd: Option<RawFd>,
    /// `FSDP_PROGRESS_FD`: the launcher's progress counters; see [`crate::progress`].
    pub progress_fd: Option<RawFd>,
    /// `FSDP_TERMINAL_WIDTH`: columns of the launcher's stderr, set when that is a terminal.
    pub terminal_width: Option<u16>,
}

impl WorkerEnv {
    /// Reads the process's environment.
    ///
    /// # Errors
    /// A variable is missing, is no number, or contradicts another one.
    pub fn from_env() -> Result<Self, ControlError> {
        Self::from_lookup(|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()))
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ControlError> {
        let need = |name| lookup(name).ok_or(ControlError::MissingVariable { name });
        let number = |name| number::<usize>(name, need(name)?, "a whole number");
        let fd = |name| lookup(name).map(|v| number_in::<RawFd>(name, v, |fd| fd >= 3, "a descriptor above 2"));
        let env = WorkerEnv {
            rank: number("RANK")?,
            local_rank: number("LOCAL_RANK")?,
            world_size: number("WORLD_SIZE")?,
            local_world_size: number("LOCAL_WORLD_SIZE")?,
            group_rank: number("GROUP_RANK")?,
            master_addr: need("MASTER_ADDR")?,
            master_port: number_in("MASTER_PORT", need("MASTER_PORT")?, |port| port > 0, "a port, 1 to 65535")?,
            lifeline_fd: fd("FSDP_LIFELINE_FD").transpose()?,
            progress_fd: fd("FSDP_PROGRESS_FD").transpose()?,
            terminal_width: lookup("FSDP_TERMINAL_WIDTH")
                .map(|v| self::number("FSDP_TERMINAL_WIDTH", v, "a number of columns"))
                .transpose()?,
        };
        env.check()?;
        Ok(env)
    }

    fn check(&self) -> Result<(), ControlError> {
        let below = |name, value: usize, limit_name, limit: usize| {
            if value < limit {
                return Ok(());
            }
            let expected = format!("less than {limit_name}, which is {limit}");
            Err(ControlError::BadVariable { name, value: value.to_string(), expected })
        };
        below("RANK", self.rank, "WORLD_SIZE", self.world_size)?;
        below("LOCAL_RANK", self.local_rank, "LOCAL_WORLD_SIZE", self.local_world_size)?;
        below("LOCAL_WORLD_SIZE", self.local_world_size, "WORLD_SIZE + 1", self.world_size + 1)
    }

    /// The variables that make [`WorkerEnv::from_env`] return this value in a child.
    pub fn vars(&self) -> Vec<(String, String)> {
        let mut vars = vec![
            ("RANK", self.rank.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("WORLD_SIZE", self.world_size.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string()),
            ("GROUP_RANK", self.group_rank.to_string()),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
        ];
        vars.extend(self.lifeline_fd.map(|fd| ("FSDP_LIFELINE_FD", fd.to_string())));
        vars.extend(self.progress_fd.map(|fd| ("FSDP_PROGRESS_FD", fd.to_string())));
        vars.extend(self.terminal_width.map(|width| ("FSDP_TERMINAL_WIDTH", width.to_string())));
        vars.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

fn number<T: FromStr + Copy>(name: &'static str, value: String, expected: &str) -> Result<T, ControlError> {
    number_in(name, value, |_| true, expected)
}

fn number_in<T: FromStr + Copy>(
    name: &'static str,
    value: String,
    ok: impl Fn(T) -> bool,
    expected: &str,
) -> Result<T, ControlError> {
    match value.parse::<T>() {
        Ok(parsed) if ok(parsed) => Ok(parsed),
        _ => Err(ControlError::BadVariable { name, value, expected: expected.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn sample() -> WorkerEnv {
        WorkerEnv {
            rank: 5,
            local_rank: 1,
            world_size: 8,
            local_world_size: 4,
            group_rank: 1,
            master_addr: "node7".into(),
            master_port: 29500,
            lifeline_fd: Some(3),
            progress_fd: None,
            terminal_width: Some(120),
        }
    }

    fn parse(vars: Vec<(String, String)>) -> Result<WorkerEnv, ControlError> {
        let map: HashMap<_, _> = vars.into_iter().collect();
        WorkerEnv::from_lookup(|name| map.get(name).cloned())
    }

    #[test]
    fn vars_round_trip() {
        assert_eq!(parse(sample().vars()).unwrap(), sample());
    }

    #[test]
    fn bad_variables_are_named() {
        for (name, value, expected) in [
            ("RANK", "8", "less than WORLD_SIZE, which is 8"),
            ("RANK", "-1", "a whole number"),
            ("LOCAL_RANK", "4", "less than LOCAL_WORLD_SIZE, which is 4"),
            ("LOCAL_WORLD_SIZE", "9", "less than WORLD_SIZE + 1, which is 9"),
            ("MASTER_PORT", "0", "a port"),
            ("MASTER_PORT", "http", "a port"),
            ("FSDP_LIFELINE_FD", "2", "a descriptor above 2"),
            ("FSDP_TERMINAL_WIDTH", "wide", "a number of columns"),
        ] {
            let mut vars = sample().vars();
            vars.iter_mut().find(|(n, _)| n == name).unwrap().1 = value.into();
            let message = parse(vars).unwrap_err().to_string();
            assert!(message.contains(&format!("{name}={value:?}")) && message.contains(expected), "{message}");
        }
        let vars = sample().vars().into_iter().filter(|(name, _)| name != "WORLD_SIZE").collect();
        assert!(parse(vars).unwrap_err().to_string().contains("WORLD_SIZE is not set"));
    }
}
