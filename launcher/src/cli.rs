//! What was typed.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::machine;

/// Fully sharded data parallel training of language models.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub run: Option<RunArgs>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print memory, traffic and operations of a job without running it
    Plan(PlanArgs),
    /// Check config, model files and data without training
    Check(JobArgs),
    /// Write a checkpoint's weights as a Hugging Face model folder
    Export(ExportArgs),
    /// Print what a checkpoint holds, and compare every byte of it with its digests
    Inspect(InspectArgs),
}

/// A job: what all commands have in common.
#[derive(Debug, Clone, Args)]
pub struct JobArgs {
    /// The job's TOML file
    pub config: PathBuf,
    /// Ranks on this machine: a number, or "auto" for one per GPU that CUDA_VISIBLE_DEVICES leaves (1 without GPUs)
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = parse_nproc)]
    #[arg(alias = "nproc-per-node")]
    pub nproc: usize,
    /// What carries the collectives; overrules fsdp.backend
    #[arg(long, value_enum)]
    pub backend: Option<BackendArg>,
    /// Overrule a key of the config; the value is TOML, or a plain string where that does not parse
    #[arg(long = "set", value_name = "table.key=value")]
    pub sets: Vec<String>,
}

// The group makes clap see the flattened config as a sign that a run is meant.
#[derive(Debug, Args)]
#[group(args = ["config"])]
pub struct RunArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Machines of the run; start fsdp-launch on each of them [default: those of the srun step, else 1]
    #[arg(long, value_name = "N", value_parser = parse_nnodes)]
    pub nnodes: Option<usize>,
    /// This machine among them, from 0 [default: that of the srun task, else 0]
    #[arg(long, value_name = "R")]
    pub node_rank: Option<usize>,
    /// Address of node 0, at which launchers and ranks find each other [default: 127.0.0.1 for one machine]
    #[arg(long, value_name = "A")]
    pub master_addr: Option<String>,
    /// Port at that address [default: a free one for one machine, 29500 for several, under srun 20000 to 29999 by job]
    #[arg(long, value_name = "P")]
    pub master_port: Option<u16>,
    /// After a failure start all ranks again from the newest checkpoint, at most so many times; node 0's counts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub max_restarts: u32,
}

#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub job: JobArgs,
    /// Machines of the run, with so many ranks each
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_nnodes)]
    pub nnodes: usize,
    /// Memory of one device, such as 80GiB: says whether the job fits
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub device_memory: Option<u64>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print the units and the list of steps that one training step runs
    #[arg(long, conflicts_with = "json")]
    pub steps: bool,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    /// A checkpoint's folder; or an output folder or its checkpoints/, which stand for the newest checkpoint that is whole
    pub checkpoint: PathBuf,
    /// Folder to write; it does not exist yet or is empty
    pub dir: PathBuf,
    /// Type of the written weights, "auto" for that of the source's [default: as the run's output.dtype]
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
    /// Folder with the model's config.json and tokenizer files [default: the run's model.path]
    #[arg(long, value_name = "FOLDER")]
    pub model: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A checkpoint's folder; or an output folder or its checkpoints/, of which all checkpoints are listed
    pub checkpoint: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Do not read the tensors: only the manifest's digest and the sizes of the files are checked
    #[arg(long)]
    pub no_verify: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    Auto,
    Fp32,
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BackendArg {
    Auto,
    Shm,
    Nccl,
    Mpi,
}

/// The arguments with dashes for underscores in the names of flags, so that `--master_port` works as `--master-port`.
pub fn with_dashes(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut flags_end = false;
    let dashed = |arg: OsString| {
        flags_end |= arg == "--";
        match arg.to_str() {
            Some(text) if text.starts_with("--") && !flags_end => {
                let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
                (name.replace('_', "-") + value).into()
            }
            _ => arg,
        }
    };
    args.map(dashed).collect()
}

/// Most machines of a run, and most ranks on one of them.
const MAX_NODES: usize = 4096;
pub const MAX_RANKS: usize = 1024;

fn parse_nnodes(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(num @ 1..=MAX_NODES) => Ok(num),
        _ => Err(format!("expected a number of machines from 1 to {MAX_NODES}")),
    }
}

fn parse_nproc(text: &str) -> Result<usize, String> {
    match text.parse() {
        _ if text == "auto" => Ok(machine::num_gpus().max(1)),
        Ok(num @ 1..=MAX_RANKS) => Ok(num),
        _ => Err(format!("expected \"auto\" or a number of ranks from 1 to {MAX_RANKS}")),
    }
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit_bytes = match unit.trim() {
        "" | "B" => 1.0,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => return Err("expected a size such as 80GiB, 24000MB or a number of bytes".to_owned()),
    };
    match number.parse::<f64>() {
        Ok(number) if number > 0.0 => Ok((number * unit_bytes) as u64),
        _ => Err("expected a size above 0 such as 80GiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(with_dashes(line.split(' ').map(OsString::from)))
    }

    #[test]
    fn definition_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn dashes_and_underscores_both_work() {
        for line in [
            "fsdp-launch --nproc-per-node 3 --master-port 4 --node-rank=0 --set training.max_grad_norm=1 a_b.toml",
            "fsdp-launch --nproc_per_node 3 --master_port 4 --max_restarts=2 --set training.max_grad_norm=1 a_b.toml",
            "fsdp-launch --nproc_per_node=3 --master_port=4 --set=training.max_grad_norm=1 a_b.toml",
            "fsdp-launch --nproc 3 --master-port 4 --set training.max_grad_norm=1 -- a_b.toml",
        ] {
            let args = parse(line).unwrap().run.unwrap();
            assert_eq!((args.job.nproc, args.master_port), (3, Some(4)), "{line}");
            assert_eq!(args.job.sets, ["training.max_grad_norm=1"], "{line}");
            assert_eq!(args.job.config, PathBuf::from("a_b.toml"), "{line}");
        }
    }

    #[test]
    fn commands_take_the_job_and_their_own_flags() {
        let cli = parse("fsdp-launch plan --nproc 8 --device_memory 80GiB --json train.toml").unwrap();
        let Some(Command::Plan(args)) = cli.command else { panic!("{cli:?}") };
        assert_eq!((args.job.nproc, args.device_memory, args.json), (8, Some(80 << 30), true));
        let cli = parse("fsdp-launch check train.toml --set a.b=c").unwrap();
        assert!(matches!(cli.command, Some(Command::Check(args)) if args.sets == ["a.b=c"]));
    }

    #[test]
    fn bad_flags_are_refused_with_status_2() {
        for line in [
            "fsdp-launch",
            "fsdp-launch --nproc 0 a.toml",
            "fsdp-launch --nproc many a.toml",
            "fsdp-launch --nnodes 0 a.toml",
            "fsdp-launch --master-port 70000 a.toml",
            "fsdp-launch --backend gloo a.toml",
            "fsdp-launch --unknown a.toml",
            "fsdp-launch --max-restarts -1 a.toml",
            "fsdp-launch --nproc 2",
            "fsdp-launch a.toml b.toml",
            "fsdp-launch plan",
            "fsdp-launch plan --device-memory 80Gi a.toml",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn sizes_have_binary_and_decimal_units() {
        for (text, bytes) in [("10", 10), ("1.5KiB", 1536), ("2 MB", 2_000_000), ("80GiB", 80 << 30)] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "0", "-1", "1.2.3", "5 parsecs"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }
}
