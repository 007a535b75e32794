//! Saves checkpoints of known content, one step after the other, as two ranks would: `save_loop ROOT FIRST LAST KEEP`.
//!
//! Prints each step once it is committed. What an earlier run left unfinished is removed first. Meant to be killed, or
//! to have its system calls fail, at any of them; `fsdp_checkpoint::faults::sample::check` knows the content.

use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::{env, io};

use fsdp_checkpoint::faults::sample;
use fsdp_checkpoint::fs::Disk;
use fsdp_checkpoint::sharded::{abort, retain, sweep};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [root, first, last, keep] = args.as_slice() else {
        return Err("usage: save_loop ROOT FIRST LAST KEEP".into());
    };
    let root = Path::new(root);
    let (first, last, keep) = (first.parse::<u64>()?, last.parse::<u64>()?, keep.parse()?);
    sweep(root)?;
    for step in first..=last {
        let save_id = format!("loop-{first}-{step}");
        if let Err(error) = sample::save(&Disk, root, step, &save_id, 2) {
            let _ = abort(root, step, &save_id);
            return Err(error.to_string().into());
        }
        writeln!(io::stdout(), "{step}")?;
        if let Err(error) = retain(root, keep, 0) {
            writeln!(io::stderr(), "an old checkpoint stays: {error}")?;
        }
    }
    Ok(())
}
