//! The board is true: every row, with the number of repetitions that a test has time for.

use std::io::Write;
use std::time::Instant;

use faultlab::rows::ROWS;

/// Rows run one after the other: they measure times.
#[test]
fn every_row_goes_as_it_must() {
    let mut failed = Vec::new();
    for row in ROWS {
        let start = Instant::now();
        if !row.run_and_print(row.num_default) {
            failed.push(row.number);
        }
        let _ = writeln!(std::io::stdout(), "  in {:.0} s", start.elapsed().as_secs_f64());
    }
    assert!(failed.is_empty(), "rows {failed:?} failed; each alone: cargo run --release -p faultlab -- --row N");
}
