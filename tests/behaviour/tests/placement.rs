//! Replicas, offloaded state and timelines through the real binaries.

use fsdp_tests_behaviour::job::Job;
use serde_json::Value;

const HYBRID: &[&str] = &["--set", "fsdp.strategy=hybrid_shard", "--set", "fsdp.shard_size=2"];
const FP32: &[&str] = &["--set", "precision.param=fp32"];

#[test]
fn replicas_of_shards_train_save_and_resume_as_one() {
    let (full, hybrid, stopped) = (Job::new(), Job::new(), Job::new());
    full.finish(4, FP32);
    let settings = [FP32, HYBRID].concat();
    hybrid.finish(4, &settings);
    hybrid.assert_losses_of(&full);

    // Two shards in the checkpoint, whichever replica they are of; from there on, the same bits.
    stopped.finish(4, &[&settings, &["--set", "training.steps=10", "--set", "checkpoint.every_steps=10"][..]].concat());
    let manifest: Value =
        serde_json::from_str(&stopped.read("out/checkpoints/step-00000010/manifest.json")).expect("a manifest");
    assert_eq!(manifest["world_size"], 2);
    let ended = stopped.finish(4, &settings);
    assert!(ended.stderr.contains("resuming after step 10"), "{ended:?}");
    assert_eq!(stopped.curve(), hybrid.curve());
    assert!(stopped.exported() == hybrid.exported(), "the exported models differ");

    // Four shards, and no replicas: the strategy may change.
    let ended = stopped.finish(4, &[FP32, &["--set", "training.steps=30"]].concat());
    assert!(ended.stderr.contains("resuming after step 10"), "{ended:?}");
    assert_eq!(stopped.steps().len(), 30);
    let ended = stopped.run(3, &[FP32, HYBRID].concat());
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("[fsdp] shard_size: expected a divisor of the 3 ranks"), "{ended:?}");
}

#[test]
fn every_strategy_trains_as_one_process_does() {
    let alone = Job::new();
    alone.finish(1, &[FP32, &["--set", "training.micro_batch_size=4"]].concat());
    let mut curves = Vec::new();
    for (sharding, settings) in [
        ("over all", &["--set", "fsdp.strategy=full_shard"][..]),
        ("over all", &["--set", "fsdp.strategy=full_shard", "--set", "fsdp.resident_units=1"]),
        ("over all", &["--set", "fsdp.strategy=shard_grad_op"]),
        ("over two", HYBRID),
        ("over two", &[HYBRID, &["--set", "fsdp.resident_units=1"]].concat()),
        ("none", &["--set", "fsdp.strategy=no_shard"]),
        ("none", &["--set", "fsdp.strategy=hybrid_shard", "--set", "fsdp.shard_size=1"]),
    ] {
        let job = Job::new();
        job.finish(4, &[FP32, &["--set", "training.micro_batch_size=1"], settings].concat());
        job.assert_losses_of(&alone);
        curves.push((sharding, job.curve(), job.exported(), settings.join(" ")));
    }
    // Where the same ranks add in the same order, no bit differs.
    for pair in curves.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
        assert_eq!(pair[0].1, pair[1].1, "{} and {}", pair[0].3, pair[1].3);
        assert!(pair[0].2 == pair[1].2, "the exported models of {} and {} differ", pair[0].3, pair[1].3);
    }
}

#[test]
fn offloaded_state_gives_the_same_bits_and_may_change_at_a_resume() {
    let plain = Job::new();
    plain.finish(2, &[]);
    for (first, then) in [("optimizer", "optimizer"), ("master", "master"), ("master", "none"), ("none", "optimizer")] {
        let job = Job::new();
        let offload = |value: &str| format!("fsdp.offload={value}");
        let save = ["--set", "training.steps=10", "--set", "checkpoint.every_steps=10", "--set", &offload(first)];
        job.finish(2, &save);
        job.finish(2, &["--set", &offload(then)]);
        assert_eq!(job.curve(), plain.curve(), "{first}, {then}");
        assert!(job.exported() == plain.exported(), "the exported models differ: {first}, {then}");
    }
}

#[test]
fn a_timeline_of_the_chosen_steps_shows_units_segments_and_collectives() {
    let job = Job::new();
    let ended = job.finish(
        2,
        &["--set", "metrics.trace_steps=3-4", "--set", "metrics.peak_tflops=0.5", "--set", "fsdp.prefetch=1"],
    );
    assert!(ended.stderr.contains("timeline of 2 steps") && ended.stderr.contains("% hidden"), "{ended:?}");
    for rank in 0..2 {
        let trace: Value = serde_json::from_str(&job.read(&format!("out/traces/rank-{rank}.json"))).expect("JSON");
        let events = trace["traceEvents"].as_array().expect("a list of events");
        let lanes: Vec<&str> =
            events.iter().filter(|e| e["name"] == "thread_name").filter_map(|e| e["args"]["name"].as_str()).collect();
        assert_eq!(lanes, ["compute", "compute waits", "all-gather", "reduce-scatter"]);
        let spans: Vec<&Value> = events.iter().filter(|e| e["ph"] == "X").collect();
        assert!(
            spans.iter().all(|e| e["pid"] == rank && e["ts"].as_f64() >= Some(0.0) && e["dur"].as_f64() >= Some(0.0))
        );
        for step in [3, 4] {
            let of = |tid: u64| -> Vec<&str> {
                spans
                    .iter()
                    .filter(|e| e["args"]["step"] == step && e["tid"] == tid)
                    .filter_map(|e| e["name"].as_str())
                    .collect()
            };
            for name in [
                "forward layers.0",
                "attention core",
                "loss head",
                "backward layers.1",
                "clip gradients, optimizer step",
            ] {
                assert!(of(0).contains(&name), "{name} is not in step {step}: {:?}", of(0));
            }
            // The blocks stay for the turn; the head's slot is the embedding's.
            assert_eq!(of(2), ["embed_tokens", "layers.0", "layers.1", "head"]);
            assert_eq!(of(3).len(), 4);
        }
        assert_eq!(spans.iter().filter(|e| e["args"]["step"] != 3 && e["args"]["step"] != 4).count(), 0);
    }
    // Steps that do not come, or not all, are no reason to leave out the others or to keep silent.
    let ended = Job::new().finish(1, &["--set", "metrics.trace_steps=19-30"]);
    assert!(ended.stderr.contains("timeline of 2 steps"), "{ended:?}");
    let ended = Job::new().finish(1, &["--set", "metrics.trace_steps=21-30"]);
    assert!(ended.stderr.contains("trace_steps: this run had none of the steps 21 to 30"), "{ended:?}");
    let line = &job.steps()[5];
    assert_eq!(line["mfu"].as_f64(), line["tflops"].as_f64().map(|tflops| tflops / 0.5));
}
