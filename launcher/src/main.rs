//! `fsdp-launch`: starts one process per rank, watches over them, and says what became of the run. No libtorch.
//!
//! Layout, in the order in which a run passes through:
//!
//! - `cli`: what was typed
//! - `place`: how many nodes there are and which one this is, from flags or SLURM
//! - `preflight`, `backend`: config, devices, model files, data and output folder, checked before any rank starts
//! - `launch`: from there to the ranks, and what became of them
//! - `nodes`, `meeting`, `link`, `differences`: the launchers of other nodes: how they come together, messages, whose
//!   config differs
//! - `folder`: lock and resolved config in the output folder
//! - `rank`, `mpirun`: one rank's process, or the mpirun that stands for all; its pipes and its end
//! - `supervise`, `ends`: the loop that waits for ranks, nodes, signals and deadlines; what a rank's end means
//! - `history`, `verdict`: what happened; which failure came first, what to say about it, and the exit status
//! - `output`: ranks' lines to the terminal, to files, and kept for the report
//! - `worker`: the worker's binary and what it was built with
//! - `signals`, `processes`, `machine`: what the operating system knows
//! - `plan_command`: `fsdp-launch plan`
//! - `failure`: an exit status with its message

#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use fsdp_control::ExitStatus;

use cli::{Cli, Command};
use failure::Failure;

mod backend;
mod cli;
mod differences;
mod ends;
mod failure;
mod folder;
mod history;
mod launch;
mod link;
mod machine;
mod meeting;
mod mpirun;
mod nodes;
mod output;
mod place;
mod plan_command;
mod preflight;
mod processes;
mod rank;
mod signals;
mod supervise;
mod verdict;
mod worker;

fn main() -> ExitCode {
    let cli = Cli::parse_from(cli::with_dashes(std::env::args_os()));
    let status = run(&cli).unwrap_or_else(|mut failure| {
        failure.say();
        failure.status
    });
    status.into()
}

fn run(cli: &Cli) -> Result<ExitStatus, Failure> {
    match (&cli.command, &cli.run) {
        (Some(Command::Plan(args)), _) => plan_command::plan(args),
        (Some(Command::Check(args)), _) => preflight::check(args),
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
