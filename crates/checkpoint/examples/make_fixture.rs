//! Writes the checkpoint that `tests/fixture/vN` keeps for each format version N: `make_fixture FOLDER`.

use std::error::Error;
use std::path::Path;

use fsdp_checkpoint::faults::sample;
use fsdp_checkpoint::fs::Disk;

fn main() -> Result<(), Box<dyn Error>> {
    let root = std::env::args().nth(1).ok_or("usage: make_fixture FOLDER")?;
    let dir = sample::save(&Disk, Path::new(&root), 3, "fixture", 2)?;
    println!("{}", dir.display());
    Ok(())
}
