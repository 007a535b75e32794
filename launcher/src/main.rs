//! `fsdp-launch`: starts one process per rank, watches over them, and says what became of the run. No libtorch.
//!
//! Layout, in the order in which a run passes through:
//!
//! - `cli`: what was typed
//! - `place`: how many nodes there are and which one this is, from flags or SLURM
//! - `preflight`, `backend`: config, devices, model files, data and output folder, checked before any rank starts
//! - `hub`, `download`: a model's name on the Hugging Face Hub, the snapshot that it means; its files
//! - `launch`: from there to the start of the ranks
//! - `nodes`, `meeting`, `link`, `differences`: the launchers of other nodes: how they come together, messages, whose
//!   config differs
//! - `folder`: lock and resolved config in the output folder
//! - `attempts`, `start`: the ranks' starts, one after the other, and what becomes of the run
//! - `rank`, `mpirun`: one rank's process, or the mpirun that stands for all; its pipes and its end
//! - `supervise`, `ends`, `peers`: the loop that waits for ranks, nodes, signals and deadlines; what a rank's end means, and
//!   what another launcher says
//! - `history`, `verdict`, `report`: what happened; which failure came first and the exit status; what to say about it
//! - `summary`: `logs/summary.json`
//! - `guard`: what ends a killed launcher's processes
//! - `output`: ranks' lines to the terminal, to files, and kept for the report
//! - `worker`: the worker's binary and what it was built with
//! - `signals`, `processes`, `machine`, `oom`: what the operating system knows
//! - `plan_command`: `fsdp-launch plan`
//! - `export_command`, `inspect_command`: `fsdp-launch export` and `inspect`
//! - `saved`, `live_line`: which checkpoint a path means, and whether it is whole; how far that is
//! - `failure`: an exit status with its message

#![forbid(unsafe_code)]

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;
use fsdp_control::ExitStatus;

use cli::{Cli, Command};
use failure::Failure;

mod attempts;
mod backend;
mod cli;
mod differences;
mod download;
mod ends;
mod export_command;
mod failure;
mod folder;
mod guard;
mod history;
mod hub;
mod inspect_command;
mod launch;
mod link;
mod live_line;
mod machine;
mod meeting;
mod mpirun;
mod nodes;
mod oom;
mod output;
mod peers;
mod place;
mod plan_command;
mod preflight;
mod processes;
mod rank;
mod report;
mod saved;
mod signals;
mod start;
mod summary;
mod supervise;
mod verdict;
mod worker;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    if let [argument, name] = &args[..]
        && argument == guard::ARGUMENT
    {
        return guard::watch(&name.to_string_lossy()).into();
    }
    let cli = Cli::parse_from(cli::with_dashes(std::env::args_os()));
    // A panic has printed its message; its own exit status would be none of ours. Nothing of the run is used after it.
    let status = match catch_unwind(AssertUnwindSafe(|| run(&cli))) {
        Ok(Ok(status)) => status,
        Ok(Err(mut failure)) => {
            failure.say();
            failure.status
        }
        Err(_) => ExitStatus::Failed,
    };
    status.into()
}

fn run(cli: &Cli) -> Result<ExitStatus, Failure> {
    match (&cli.command, &cli.run) {
        (Some(Command::Plan(args)), _) => plan_command::plan(args),
        (Some(Command::Check(args)), _) => preflight::check(args),
        (Some(Command::Export(args)), _) => export_command::export(args),
        (Some(Command::Inspect(args)), _) => inspect_command::inspect(args),
        (None, Some(args)) => launch::launch(args),
        (None, None) => unreachable!("clap asks for a config or a command"),
    }
}

/// Prints a line to stderr, which may be closed.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Prints a line to stdout, which may be closed.
fn print(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
