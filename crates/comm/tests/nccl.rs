//! The back end `nccl` over the test double of NCCL (`nccl_double/`): what it computes, and what it asks of NCCL.

mod ranks;

use std::path::{Path, PathBuf};
use std::time::Duration;

use fsdp_comm::nccl::{NcclGroup, missing_symbols};
use fsdp_comm::{CommError, ProcessGroup, ReduceOp, Segment};
use fsdp_control::ExitStatus;
use fsdp_control::error_file::ErrorKind;
use fsdp_control::store::{Store, StoreServer};
use ranks::double::{connect, run};
use ranks::walk::Walk;
use ranks::{LONG, report, table};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

const NEW: &str = "22809";
const WITHOUT_REGISTRATION: &str = "21805";

#[test]
fn collectives_agree_with_a_plain_computation() {
    for world_size in 1..=4 {
        let ended = run("all", world_size, NEW);
        assert!(ended.iter().all(|(results, _)| results == &ended[0].0 && !results.is_empty()), "ranks differ");
        let num_asked = ended[0].1.iter().filter(|line| line["dtype"].is_string()).count();
        assert_eq!(num_asked == 0, world_size == 1, "a group of one asks for no collective; asked: {num_asked}");
    }
}

#[test]
fn slots_keep_their_contents_while_ranks_drift_apart() {
    run("skew", 3, NEW);
}

/// Two shards of two ranks, and the replicas' groups across them.
#[test]
fn a_split_group_works_beside_its_parent() {
    let ended = run("split", 4, NEW);
    for (rank, (results, log)) in ended.iter().enumerate() {
        assert_eq!(results[..2], [format!("shard {} of 2", rank % 2), format!("replicate {} of 2", rank / 2)]);
        assert_eq!(results[2..], ended[0].0[2..]);
        let asked = |color: usize| json!({ "color": color, "key": rank });
        let splits: Vec<Value> = calls(log, "ncclCommSplit", &["color", "key"]);
        assert_eq!(splits, [asked(rank / 2), asked(rank % 2)]);
        // The replicas' all-reduce is on another communicator, in another lane, than the world's.
        let reduces = calls(log, "ncclAllReduce", &["comm", "stream"]);
        let (world, replicate) = (&reduces[0], &reduces[1]);
        assert!(world["comm"] != replicate["comm"] && world["stream"] != replicate["stream"], "{reduces:?}");
        // All are ended in good order.
        let count = |name: &str| log.iter().filter(|line| line["call"] == name).count();
        assert_eq!((count("ncclCommFinalize"), count("ncclCommDestroy"), count("ncclCommAbort")), (3, 3, 0));
    }
}

#[test]
fn nccl_is_asked_for_exactly_this() {
    for version in [NEW, WITHOUT_REGISTRATION] {
        let is_new = version == NEW;
        for (_, log) in run("asked", 2, version) {
            let registered: Vec<Value> = calls(&log, "ncclCommRegister", &["bytes"]);
            let buffers = if is_new { vec![json!({ "bytes": 48 }), json!({ "bytes": 64 })] } else { vec![] };
            assert_eq!(registered, buffers, "version {version}");
            let config = calls(&log, "ncclCommInitRankConfig", &["blocking", "name", "ranks"]);
            assert_eq!(config, [json!({ "blocking": 0, "name": "world", "ranks": 2 })]);
            let keys = ["call", "count", "dtype", "op", "group", "registered", "in_place", "stream"];
            let mut asked: Vec<Value> =
                log.iter().filter(|line| line["dtype"].is_string()).map(|l| pick(l, &keys)).collect();
            let lane = asked[0]["stream"].as_u64().unwrap();
            assert!(lane > 0);
            let row = |call: &str, count: u64, dtype: &str, op: &str, group: Option<u64>| {
                // Only buffers are registered, and only they are grouped.
                let registered = is_new && group.is_some();
                json!({ "call": call, "count": count, "dtype": dtype, "op": op, "group": group, "registered": registered,
                        "in_place": true, "stream": lane })
            };
            // The maximum of floats is libtorch's, of all that was gathered.
            let max = asked.remove(5);
            assert_eq!(
                (&max["call"], &max["count"], &max["in_place"]),
                (&json!("ncclAllGather"), &json!(3), &json!(false))
            );
            let expected = [
                row("ncclAllGather", 4, "Float32", "AllGather", Some(1)),
                row("ncclAllGather", 4, "Bfloat16", "AllGather", Some(1)),
                row("ncclReduceScatter", 4, "Float32", "ReduceScatter", Some(2)),
                row("ncclReduceScatter", 8, "Bfloat16", "ReduceScatter", Some(2)),
                row("ncclAllReduce", 3, "Float64", "Sum", None),
                row("ncclAllReduce", 1, "Int64", "Max", None),
                row("ncclBroadcast", 5, "Float16", "Broadcast { root: 1 }", None),
                row("ncclAllReduce", 1, "Float32", "Sum", None), // the barrier of `close`
            ];
            assert_eq!(asked, expected, "version {version}");
        }
    }
}

#[test]
fn the_flight_record_tells_what_was_called_and_done() {
    for (results, _) in [run("flight", 2, NEW), run("flight", 1, NEW)].concat() {
        assert_eq!(
            results,
            [
                r#""barrier" "rendezvous" 0 null true"#,
                r#""new_buffer" "slot" 32 null true"#,
                r#""all_gather" "layers.3" 32 "Float" true"#,
                r#""barrier" "" 0 null true"#,
            ]
        );
    }
}

#[test]
fn what_is_missing_is_named_in_one_line() {
    let server = StoreServer::bind(("127.0.0.1", 0)).unwrap();
    let mut store = Store::connect(("127.0.0.1", server.local_addr().port()), LONG).unwrap();
    let mut refused = |path: Option<&str>, device: Device, expected: &str| {
        let result = match path {
            Some(path) => NcclGroup::with_library(Path::new(path), &mut store, 0, 1, device, LONG, None).map(|_| ()),
            None => ProcessGroup::connect_nccl(&mut store, 0, 1, device, LONG, None).map(|_| ()),
        };
        let error = result.unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("backend nccl cannot be used: ") && text.contains(expected), "{text}");
        assert!(!text.contains('\n'), "{text}");
        assert!(matches!(error, CommError::Unavailable { backend: "nccl", .. }), "{error:?}");
        assert_eq!(ExitStatus::BadInput.code(), 2);
        assert_eq!(error.error_kind(), ErrorKind::BadInput);
    };
    refused(None, Device::Cpu, "it is for GPUs, and this rank's device is Cpu");
    refused(Some("/nowhere/libnccl.so.2"), Device::Cpu, "/nowhere/libnccl.so.2 was not found (");
    refused(Some("libm.so.6"), Device::Cpu, "libm.so.6 has no ncclGetVersion; NCCL 2.18 or newer is needed");
    if fsdp_torch_ext::accelerator::is_available() {
        println!("skipped: this machine has a GPU that works");
    } else {
        let driver_is_there = std::process::Command::new("ldconfig").arg("-p").output();
        let driver_is_there =
            driver_is_there.is_ok_and(|o| String::from_utf8_lossy(&o.stdout).contains("libcuda.so.1"));
        let expected = if driver_is_there { "there is no GPU 0, CUDA has 0" } else { "libcuda.so.1 was not found" };
        refused(None, Device::Cuda(0), expected);
    }
}

/// Where a real NCCL is found, by `FSDP_TEST_NCCL` or the loader's path.
#[test]
fn the_real_library_has_every_function_that_is_used() {
    let path = std::env::var_os("FSDP_TEST_NCCL").map_or("libnccl.so.2".into(), PathBuf::from);
    match missing_symbols(&path) {
        Ok(missing) => assert_eq!(missing, [""; 0], "{}", path.display()),
        Err(error) => println!("skipped: {error}"),
    }
    assert_eq!(missing_symbols(&ranks::double::library()).unwrap(), [""; 0], "the double");
}

#[test]
#[ignore = "started by the other tests"]
fn rank() {
    match ranks::case().as_str() {
        "all" => {
            let mut group = connect().unwrap();
            report(table::every_collective(&mut group));
            group.close().unwrap();
        }
        "skew" => {
            let mut group = connect().unwrap();
            Walk::new(&mut group).unwrap().rounds(&mut group, 20).unwrap();
        }
        "split" => split(),
        "asked" => asked(),
        "flight" => flight(),
        other => panic!("no case {other:?}"),
    }
}

fn split() {
    let mut world = connect().unwrap();
    let rank = world.rank();
    let mut groups = [("shard", rank / 2), ("replicate", rank % 2)]
        .map(|(name, color)| world.split(&mut ranks::store(), color, name).unwrap());
    for (group, name) in groups.iter().zip(["shard", "replicate"]) {
        report(format!("{name} {} of {}", group.rank(), group.world_size()));
    }
    let sum = |group: &mut ProcessGroup| {
        let tensor = Tensor::from_slice(&[10f64.powi(rank as i32)]);
        group.all_reduce(&tensor, ReduceOp::Sum).unwrap();
        tensor.double_value(&[0])
    };
    let [shard, replicate] = &mut groups;
    assert_eq!(sum(&mut world), 1111.0);
    assert_eq!(sum(replicate), [101.0, 1010.0][rank % 2]);
    assert_eq!(sum(shard), [11.0, 1100.0][rank / 2]);
    // Numbers run through all groups: rendezvous, two splits of two calls each, three sums.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flight.jsonl");
    shard.write_flight_record(&path).unwrap();
    assert_eq!(ranks::double::read_lines(&path).last().unwrap()["seq"], 8);
    report(table::every_collective(&mut world));
    table::every_collective(shard);
    Walk::new(replicate).unwrap().rounds(replicate, 2).unwrap();
    for group in groups {
        group.close().unwrap();
    }
    world.close().unwrap();
}

fn asked() {
    let mut group = connect().unwrap();
    let mut slot = group.new_gather_buffer("slot", 48).unwrap();
    let mut grads = group.new_reduce_buffer("grads", 64).unwrap();
    let registered_bytes = if std::env::var("NCCL_DOUBLE_VERSION").unwrap() == NEW { 112 } else { 0 };
    assert_eq!(group.num_registered_bytes(), registered_bytes);
    let segment = |kind, offset_bytes, numel| Segment { kind, offset_bytes, numel };
    group.begin_write(&mut slot, "layers.0").unwrap();
    let segments = [segment(Kind::Float, 0, 8), segment(Kind::BFloat16, 32, 8)];
    group.start_all_gather(&mut slot, &segments, "layers.0").unwrap();
    group.wait_all_gather(&mut slot).unwrap();
    group.release(&mut slot).unwrap();

    group.begin_reduce(&mut grads, "layers.0").unwrap();
    let segments = [segment(Kind::Float, 0, 8), segment(Kind::BFloat16, 32, 16)];
    group.start_reduce_scatter(&mut grads, &segments, "layers.0").unwrap();
    let out = [4, 8].map(|n| Tensor::zeros([n], (Kind::Float, Device::Cpu)));
    group.wait_reduce_scatter(&mut grads, &[&out[0], &out[1]], false).unwrap();

    let zeros = |n, kind| Tensor::zeros([n], (kind, Device::Cpu));
    group.all_reduce(&zeros(3, Kind::Double), ReduceOp::Sum).unwrap();
    group.all_reduce(&zeros(3, Kind::Float), ReduceOp::Max).unwrap();
    group.all_reduce(&zeros(1, Kind::Int64), ReduceOp::Max).unwrap();
    group.broadcast(&zeros(5, Kind::Half), 1).unwrap();
    group.close().unwrap();
}

fn flight() {
    let mut group = connect().unwrap();
    let mut slot = group.new_gather_buffer("slot", 32).unwrap();
    group.begin_write(&mut slot, "layers.3").unwrap();
    let segment = Segment { kind: Kind::Float, offset_bytes: 0, numel: 8 };
    group.start_all_gather(&mut slot, &[segment], "layers.3").unwrap();
    group.wait_all_gather(&mut slot).unwrap();
    group.barrier().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flight.jsonl");
    // The watchdog notes what is done, ten times a second.
    let is_done =
        |line: &Value| line["done_us"].as_u64().is_some_and(|done| done >= line["issued_us"].as_u64().unwrap());
    let lines = loop {
        group.write_flight_record(&path).unwrap();
        let lines = ranks::double::read_lines(&path);
        if lines.iter().all(is_done) {
            break lines;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    for line in lines {
        let about = ["op", "unit", "bytes", "dtype"].map(|key| line[key].to_string()).join(" ");
        report(format!("{about} {}", is_done(&line)));
    }
    group.close().unwrap();
}

/// The lines of one function, with some of their fields.
fn calls(log: &[Value], name: &str, keys: &[&str]) -> Vec<Value> {
    log.iter().filter(|line| line["call"] == name).map(|line| pick(line, keys)).collect()
}

fn pick(line: &Value, keys: &[&str]) -> Value {
    Value::Object(keys.iter().map(|&key| (key.to_owned(), line[key].clone())).collect())
}
