//! The same work gives the same bits: run twice, stopped and resumed, or stopped by SIGTERM and resumed.

use std::path::Path;

use anyhow::{Result, ensure};
use fsdp_tests_parity::export::read_files;
use fsdp_tests_parity::golden::Golden;
use fsdp_tests_parity::job::{Job, StepMetrics};

/// Both runs have the same steps, and in each the same bits of loss, gradient norm and rate.
fn ensure_same_metrics(got: &[StepMetrics], expected: &[StepMetrics]) -> Result<()> {
    let bits = |line: &StepMetrics| (line.step, [line.loss, line.grad_norm, line.lr].map(f64::to_bits));
    ensure!(got.len() == expected.len(), "{} steps, expected {}", got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        ensure!(bits(got) == bits(expected), "{got:?} differs from {expected:?}");
    }
    Ok(())
}

/// Both folders hold the same files with the same bytes.
fn ensure_same_files(got: &Path, expected: &Path) -> Result<()> {
    let (got, expected) = (read_files(got)?, read_files(expected)?);
    ensure!(got.keys().eq(expected.keys()), "{:?}, expected {:?}", got.keys(), expected.keys());
    for (name, bytes) in &got {
        ensure!(*bytes == expected[name], "{name} differs");
    }
    Ok(())
}

#[test]
fn the_same_run_twice_gives_the_same_bits() -> Result<()> {
    for (case, nproc, settings) in [
        ("llama_gqa", 3, ["precision.param=fp32", "data.shuffle=true", "training.seed=7"]),
        ("qwen3", 4, ["precision.param=bf16", "data.shuffle=true", "training.seed=8"]),
    ] {
        let golden = Golden::load(case)?;
        let (first, second) = (Job::deterministic(&golden, nproc, 3)?, Job::deterministic(&golden, nproc, 3)?);
        ensure_same_metrics(&second.run(&settings)?, &first.run(&settings)?)?;
        ensure_same_files(&second.exported(), &first.exported())?;
    }
    Ok(())
}

#[test]
fn another_seed_gives_another_order() -> Result<()> {
    let golden = Golden::load("llama_tied")?;
    let job = |seed| Job::deterministic(&golden, 2, 1)?.run(&["data.shuffle=true", seed, "training.steps=5"]);
    let (first, second) = (job("training.seed=7")?, job("training.seed=8")?);
    ensure!(first[0].loss != second[0].loss, "step 1 is the same with both seeds");
    Ok(())
}

#[test]
fn five_steps_and_five_after_a_resume_give_the_bits_of_ten() -> Result<()> {
    for (case, nproc, accumulation, param, recompute) in
        [("llama_tied", 2, 1, "fp32", "full"), ("qwen2", 3, 3, "bf16", "none"), ("mistral", 1, 1, "bf16", "full")]
    {
        let golden = Golden::load(case)?;
        // a decay to the rate itself: the rate of a step must not depend on how many there are
        let flat = format!("lr_scheduler.min_lr={}", golden.settings.lr);
        let (param, recompute) =
            (format!("precision.param={param}"), format!("activation_checkpointing.mode={recompute}"));
        let settings = [
            &param,
            &recompute,
            "data.shuffle=true",
            &flat,
            "checkpoint.every_steps=5",
            // of 180 lines: every run meets the end of the data, and in the middle of a step
            "training.micro_batch_size=25",
        ];
        let (whole, parts) =
            (Job::deterministic(&golden, nproc, accumulation)?, Job::deterministic(&golden, nproc, accumulation)?);
        let with_steps = |steps| settings.iter().copied().chain([steps]).collect::<Vec<_>>();
        let expected = whole.run(&with_steps("training.steps=10"))?;
        ensure_same_metrics(&parts.run(&with_steps("training.steps=5"))?, &expected[..5])?;
        ensure_same_metrics(&parts.run(&with_steps("training.steps=10"))?, &expected)?;
        ensure_same_files(&parts.exported(), &whole.exported())?;
    }
    Ok(())
}

#[test]
fn a_run_stopped_by_sigterm_and_resumed_gives_the_bits_of_one_that_was_not() -> Result<()> {
    // so many steps that the signal comes in time; no checkpoint but the one that the signal asks for
    let settings =
        ["training.steps=400", "training.micro_batch_size=4", "data.shuffle=true", "checkpoint.every_steps=1000"];
    let golden = Golden::load("llama_untied")?;
    let (whole, stopped) = (Job::deterministic(&golden, 2, 1)?, Job::deterministic(&golden, 2, 1)?);
    let expected = whole.run(&settings)?;

    let mut running = stopped.start(&settings)?;
    running.wait_for_step(20)?;
    running.terminate()?;
    let status = running.wait()?;
    ensure!(status == 75, "exit status {status} after SIGTERM; the launcher said:\n{}", stopped.log());
    let before = stopped.metrics()?;
    ensure!((20..400).contains(&before.len()), "{} steps before the stop", before.len());
    ensure_same_metrics(&before, &expected[..before.len()])?;

    ensure_same_metrics(&stopped.run(&settings)?, &expected)?;
    ensure_same_files(&stopped.exported(), &whole.exported())
}
