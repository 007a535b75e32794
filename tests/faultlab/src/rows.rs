//! The board: one entry a row.

use std::io::Write;

use crate::configs;
use crate::corrupt;
use crate::crashes;
use crate::formats;
use crate::hangs;
use crate::hostile;
use crate::kills;
use crate::memory;
use crate::mismatches;
use crate::nodes;
use crate::non_finite;
use crate::outputs;
use crate::refused_writes;
use crate::resume;
use crate::saves;
use crate::slurm;
use crate::soak;
use crate::stops;
use crate::stragglers;
use crate::tally::Tally;

/// A fault, and what runs it.
#[derive(Debug)]
pub struct Row {
    /// On the board.
    pub number: u8,
    /// Repetitions where the command line says nothing: what the tests run.
    pub num_default: usize,
    /// Runs about so many repetitions; a row that covers a set covers at least as much of it.
    run: fn(&mut Tally, usize),
}

impl Row {
    /// Runs the row and prints its line; whether all went as it must.
    pub fn run_and_print(&self, n: usize) -> bool {
        let mut tally = Tally::default();
        (self.run)(&mut tally, n);
        // Not by the macro, whose lines a test that passes does not show.
        let _ = writeln!(std::io::stdout(), "row {}: {tally}", self.number);
        tally.all_passed()
    }
}

/// In order of their numbers.
pub const ROWS: &[Row] = &[
    Row { number: 1, num_default: 10, run: kills::of_ranks },
    Row { number: 2, num_default: 10, run: crashes::of_ranks },
    Row { number: 3, num_default: 6, run: kills::amid_victims },
    Row { number: 4, num_default: 6, run: hangs::of_ranks },
    Row { number: 5, num_default: 9, run: hangs::desyncs },
    Row { number: 6, num_default: 2, run: stragglers::of_ranks },
    Row { number: 7, num_default: 6, run: kills::of_launchers },
    Row { number: 8, num_default: 24, run: stops::of_runs },
    Row { number: 9, num_default: 4, run: slurm::of_jobs },
    Row { number: 10, num_default: 8, run: saves::killed },
    Row { number: 11, num_default: 10, run: saves::killed_at_calls },
    Row { number: 12, num_default: 1, run: saves::power_lost },
    Row { number: 13, num_default: 12, run: refused_writes::refused },
    Row { number: 14, num_default: 200, run: corrupt::mutated },
    Row { number: 15, num_default: 5, run: non_finite::stopped },
    Row { number: 16, num_default: 2, run: nodes::lost },
    Row { number: 17, num_default: 2, run: memory::eaten },
    Row { number: 18, num_default: 7, run: nodes::missing },
    Row { number: 19, num_default: 60, run: configs::wrong },
    Row { number: 20, num_default: 4, run: nodes::different },
    Row { number: 21, num_default: 65, run: hostile::model_files },
    Row { number: 22, num_default: 41, run: hostile::tokenizers },
    Row { number: 23, num_default: 43, run: hostile::json_lines },
    Row { number: 24, num_default: 4, run: resume::same_order },
    Row { number: 25, num_default: 24, run: resume::resharded },
    Row { number: 26, num_default: 25, run: mismatches::refused },
    Row { number: 27, num_default: 6, run: resume::exact },
    Row { number: 28, num_default: 4, run: formats::read },
    Row { number: 29, num_default: 4, run: outputs::lost },
    Row { number: 30, num_default: 20, run: soak::soaked },
];
