//! `cargo run --release -p faultlab -- --row 1 --n 50` prints `row 1: 50/50`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use faultlab::rows::ROWS;

/// Injects faults into real runs and counts what went as it must.
#[derive(Debug, Parser)]
struct Args {
    /// Rows of the board; all if none is given.
    #[arg(long = "row", value_name = "N")]
    rows: Vec<u8>,
    /// Repetitions of a row; each has its own default.
    #[arg(long, value_name = "COUNT")]
    n: Option<usize>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(unknown) = args.rows.iter().find(|number| ROWS.iter().all(|row| row.number != **number)) {
        eprintln!("faultlab: there is no row {unknown}");
        return ExitCode::from(2);
    }
    let mut all_passed = true;
    for row in ROWS.iter().filter(|row| args.rows.is_empty() || args.rows.contains(&row.number)) {
        all_passed &= row.run_and_print(args.n.unwrap_or(row.num_default));
    }
    if all_passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
