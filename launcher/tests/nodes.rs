//! Launchers on several nodes: they start together, and end together with the same status and the same lines. The nodes
//! are on this machine; [`a_link_that_goes_down_is_noticed_on_both_sides`] has them in network namespaces.

mod job;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command};
use std::time::Duration;

use job::{Ended, Job, end, free_port, named, send};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

/// Starts two nodes of one job in one folder: ranks 0 to `first`, and the rest.
fn start_both(job: &Job, [first, second]: [usize; 2], script: &str, args: &[&str]) -> [Child; 2] {
    let port = free_port();
    // The order does not matter: the one that is first waits.
    let node_1 = job.start_node(1, port, second, script, args);
    [job.start_node(0, port, first, script, args), node_1]
}

fn end_both(children: [Child; 2]) -> [Ended; 2] {
    // Their clocks start together, so the second's begins when the first has ended.
    children.map(end)
}

/// What a launcher says itself, apart from what only one of them sees.
fn own_lines(ended: &Ended) -> Vec<&str> {
    let lines = ended.stderr.lines().skip_while(|line| !line.starts_with("fsdp-launch: ")).collect::<Vec<_>>();
    lines.into_iter().filter(|line| !line.contains("asked to stop")).collect()
}

/// Both end with that status and say the same, `parts` included.
fn assert_same_end(ended: &[Ended; 2], status: i32, parts: &[&str]) {
    assert_eq!((ended[0].status, ended[1].status), (status, status), "{ended:?}");
    assert_eq!(own_lines(&ended[0]), own_lines(&ended[1]), "{ended:?}");
    for part in parts {
        assert!(ended[0].stderr.contains(part), "{part:?} is not in {ended:?}");
    }
}

#[test]
fn ranks_of_all_nodes_are_numbered_node_by_node() {
    let job = Job::new(3);
    let ended = end_both(start_both(&job, [1, 2], "", &[]));
    assert_same_end(&ended, 0, &[]);
    for (rank, place) in [
        (0, "rank: 0, local_rank: 0, world_size: 3, local_world_size: 1, group_rank: 0"),
        (1, "rank: 1, local_rank: 0, world_size: 3, local_world_size: 2, group_rank: 1"),
        (2, "rank: 2, local_rank: 1, world_size: 3, local_world_size: 2, group_rank: 1"),
    ] {
        let started = job.read(&format!("out/started-{rank}"));
        assert!(started.contains(place) && started.contains("master_addr: \"127.0.0.1\""), "{started}");
    }
    assert_eq!(job.read("out/config.toml"), job.read("out/config.node-1.toml"));
    assert!(job.read("out/config.toml").contains("backend = \"shm\""));
    job.assert_no_survivors(Duration::ZERO);
}

#[test]
fn nodes_need_not_share_a_folder() {
    let (job, other) = (Job::new(3), Job::new(3));
    let port = free_port();
    let node_0 = job.start_node(0, port, 1, "", &[]);
    let ended = end_both([node_0, other.start_node(1, port, 1, "", &[])]);
    assert_same_end(&ended, 0, &[]);
    assert!(job.path("out/config.toml").exists() && !other.path("out/config.toml").exists());
    assert!(other.path("out/config.node-1.toml").exists() && other.path("out/started-1").exists());
}

#[test]
fn a_ranks_failure_ends_all_nodes_with_the_same_status_and_lines() {
    let host = fsdp_control::host_name();
    for (script, args, status, culprit, says) in [
        ("2 3 signal=9", &[][..], 1, "2", "was killed by SIGKILL at step 3"),
        ("0 4 exit=3", &[][..], 1, "0", "exited with status 3 at step 4"),
        ("2 4 exit=0", &[][..], 1, "2", "exited with status 0 at step 4"),
        ("0 4 exit=75", &[][..], 1, "0", "exited with status 75 at step 4"),
        ("1 2 print=words;1 3 fail=93", &[][..], 93, "1", "failed at step 3: the loss is NaN"),
        ("2 0 exit=2", &[][..], 2, "2", "exited with status 2 before the first step"),
        (
            "1 3 signal=6",
            &["--set", "checkpoint.every_steps=2"][..],
            75,
            "1",
            "step-00000002 is committed; run the same",
        ),
    ] {
        let job = Job::new(1000);
        let ended = end_both(start_both(&job, [1, 2], script, args));
        assert_same_end(&ended, status, &[says, &format!("(host {host}, pid ")]);
        assert_eq!(named(&ended[0].stderr), [culprit], "{ended:?}");
        assert!(ended[0].took < Duration::from_secs(6), "{ended:?}");
        let has_words = script.contains("words");
        assert_eq!(ended[0].stderr.contains("  | rank 1 says words"), has_words, "{ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_whichever_node_it_is_on() {
    for culprit in ["0", "2"] {
        let job = Job::new(1000);
        let script = format!("{culprit} 3 hang");
        let ended = end_both(start_both(&job, [1, 2], &script, &["--set", "fsdp.timeout_secs=1"]));
        let waiting = if culprit == "0" { "1, 2" } else { "0, 1" };
        let waits = format!("\n  ranks {waiting} wait in all_reduce number 3 for layers.0 (1.0 MiB)\n");
        assert_same_end(
            &ended,
            1,
            &[") did not come to all_reduce number 3 for layers.0 (1.0 MiB) at step 3; ", &waits],
        );
        assert_eq!(named(&ended[0].stderr), [culprit], "{ended:?}");
        assert!(ended[0].took < Duration::from_secs(4), "{ended:?}");
        job.assert_no_survivors(Duration::ZERO);
    }
}

#[test]
fn a_signal_to_either_launcher_stops_all() {
    for (to, signal) in [(0, Signal::TERM), (1, Signal::TERM), (1, Signal::USR1), (1, Signal::INT)] {
        let job = Job::new(1_000_000);
        let children = start_both(&job, [1, 2], "", &[]);
        job.wait_for_ranks(3);
        send(children[to].id(), signal);
        let ended = end_both(children);
        let checkpoints = job.checkpoints();
        assert_eq!(checkpoints.len(), 1, "{ended:?}");
        assert_same_end(
            &ended,
            75,
            &[&format!("fsdp-launch: stopped; out/checkpoints/{} is committed", checkpoints[0])],
        );
        for ended in &ended {
            assert_eq!(ended.stderr.matches("asked to stop").count(), 1, "{ended:?}");
            assert_eq!(ended.stderr.lines().count(), 2, "{ended:?}");
        }
        job.assert_no_survivors(Duration::ZERO);
    }
}

#[test]
fn a_killed_launcher_is_named_by_the_others_and_leaves_no_rank() {
    for victim in [0, 1] {
        let job = Job::new(1_000_000);
        let children = start_both(&job, [1, 2], "", &["--set", "fsdp.timeout_secs=60"]);
        job.wait_for_ranks(3);
        send(children[victim].id(), Signal::KILL);
        let ended = end_both(children);
        assert_eq!(ended[victim].status, 128 + 9, "{ended:?}");
        let other = &ended[1 - victim];
        assert_eq!(other.status, 1, "{ended:?}");
        let host = fsdp_control::host_name();
        let who = [format!("node 0 (host {host})"), format!("node 1 (host {host}, ranks 1-2)")];
        let line = format!("fsdp-launch: {} is lost: its launcher is gone\n", who[victim]);
        assert!(other.stderr.contains(&line), "{line} is not in {ended:?}");
        assert!(other.took < Duration::from_secs(10), "{ended:?}");
        job.assert_no_survivors(Duration::from_secs(2));
    }
}

/// A suspended launcher is not gone: the run goes on.
#[test]
fn a_suspended_launcher_is_waited_for() {
    let job = Job::new(1_000_000);
    let children = start_both(&job, [1, 1], "", &[]);
    job.wait_for_ranks(2);
    send(children[1].id(), Signal::STOP);
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(job.survivors().len(), 6, "two launchers with their guards, two ranks");
    send(children[1].id(), Signal::CONT);
    send(children[0].id(), Signal::TERM);
    assert_same_end(&end_both(children), 75, &["stopped; "]);
}

/// Makes a file of its own of what may be shared with other jobs, one byte longer.
fn append(job: &Job, name: &str) {
    let mut bytes = std::fs::read(job.path(name)).unwrap();
    bytes.push(0);
    std::fs::remove_file(job.path(name)).unwrap();
    job.write(name, bytes);
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(job.path(name), executable).unwrap();
}

/// What differs between the nodes, and what is wrong on one only, ends both before any rank starts.
#[test]
fn what_does_not_fit_is_refused_on_all_nodes() {
    type Case = (&'static str, fn(&Job), [&'static [&'static str]; 2], &'static [&'static str]);
    #[rustfmt::skip]
    let cases: &[Case] = &[
        ("config", |_| {}, [&["--set", "training.seed=1"], &["--set", "training.seed=2"]],
            &["[training] seed: expected 1 on node 1 (host ", "got 2 (digests of the configs: "]),
        ("binary", |job| append(job, "bin/fsdp-train"), [&[], &[]],
            &["fsdp-train: expected the binary with digest ", "node 1 (host ", "install the same on all"]),
        ("nodes", |_| {}, [&[], &["--nnodes", "3"]], &["--nnodes: expected 2 on node 1 (host ", "got 3"]),
        ("own files", |job| std::fs::remove_file(job.path("data.jsonl")).unwrap(), [&[], &[]],
            &["node 1 (host ", "data.jsonl", "No such file"]),
        ("batch", |_| {}, [&["--set", "training.global_batch_size=4"]; 2], &["micro_batch_size x ranks = 1 x 3 = 3, got 4"]),
        ("shards", |_| {}, [&["--set", "fsdp.strategy=hybrid_shard", "--set", "fsdp.shard_size=2"]; 2],
            &["[fsdp] shard_size: expected a divisor of the 3 ranks, got 2"]),
        ("replicas", |_| {}, [&["--set", "fsdp.strategy=hybrid_shard"]; 2],
            &["[fsdp] shard_size: expected as many ranks on all nodes where it is not set, got 1 on node 0"]),
        ("no config", |job| std::fs::remove_file(job.path("job.toml")).unwrap(), [&[], &[]], &["node 1 (host ", "job.toml"]),
        ("automatic", |_| {}, [&["--backend", "auto"]; 2], &["got \"auto\" without GPUs, which is \"mpi\""]),
        ("backend", |_| {}, [&["--backend", "mpi"]; 2], &["expected \"nccl\" with a launcher on each node, got \"mpi\""]),
    ];
    for (name, change, args, says) in cases {
        let (job, other) = (Job::new(3), Job::new(3));
        change(&other);
        let port = free_port();
        // A flag may be given once only.
        let start = |job: &Job, node_rank: usize, num_ranks: usize| {
            let [rank, port, num] = [node_rank.to_string(), port.to_string(), num_ranks.to_string()];
            let args = args[node_rank];
            let nodes: &[&str] = if args.contains(&"--nnodes") { &[] } else { &["--nnodes", "2"] };
            let backend: &[&str] = if args.contains(&"--backend") { &[] } else { &["--backend", "shm"] };
            let mut command =
                job.command(&["--node-rank", &rank, "--master-addr", "localhost", "--master-port", &port]);
            command.args(["--nproc", &num, "job.toml"]).args(nodes).args(backend).args(args).spawn().unwrap()
        };
        let ended = end_both([start(&job, 0, 1), start(&other, 1, 2)]);
        assert_eq!((ended[0].status, ended[1].status), (2, 2), "{name}: {ended:?}");
        for ended in &ended {
            let here = if ended.stderr.contains("node 1 (host ") { &says[..] } else { &says[says.len() - 1..] };
            assert!(here.iter().all(|part| ended.stderr.contains(part)), "{name}: {ended:?}");
            assert!(ended.took < Duration::from_secs(5), "{name}: {ended:?}");
        }
        assert_eq!(job.num_ranks_started() + other.num_ranks_started(), 0, "{name}");
    }
}

/// What only shows once the nodes have come together ends them too.
#[test]
fn a_launcher_that_gives_up_ends_all_nodes() {
    // Node 1 has no worker.
    let (job, other) = (Job::new(1_000_000), Job::new(1_000_000));
    std::fs::remove_file(other.path("bin/fsdp-train")).unwrap();
    let port = free_port();
    let ended = end_both([job.start_node(0, port, 1, "", &[]), other.start_node(1, port, 1, "", &[])]);
    for ended in &ended {
        assert_eq!(ended.status, 1, "{ended:?}");
        assert!(ended.stderr.contains("expected the worker's binary beside fsdp-launch"), "{ended:?}");
    }
    assert!(ended[0].stderr.contains("fsdp-launch: node 1 (host "), "{ended:?}");
    job.assert_no_survivors(Duration::ZERO);

    // Another run has node 0's folder.
    let holder = job.start(1, "", &[]);
    job.wait_for_ranks(1);
    let ended = end_both(start_both(&job, [1, 1], "", &[]));
    for ended in &ended {
        assert_eq!(ended.status, 2, "{ended:?}");
        assert!(ended.stderr.contains(&format!("in use by fsdp-launch (pid {} on", holder.id())), "{ended:?}");
    }
    send(holder.id(), Signal::TERM);
    assert_eq!(end(holder).status, 75);
}

/// Of two machines with the same number, the second one to come is refused, and with it the run.
#[test]
fn a_node_rank_given_twice_is_refused() {
    let job = Job::new(3);
    let port = free_port().to_string();
    let start = |node_rank: &str| {
        let mut command = job.command(&["--nnodes", "3", "--node-rank", node_rank, "--master-addr", "127.0.0.1"]);
        command.args(["--master-port", &port, "--backend", "shm", "job.toml"]).spawn().unwrap()
    };
    for ended in [start("0"), start("1"), start("1")].map(end) {
        assert_eq!(ended.status, 2, "{ended:?}");
        assert!(ended.stderr.contains("--node-rank: expected another one on each machine, got 1 on host"), "{ended:?}");
        assert!(ended.took < Duration::from_secs(8), "{ended:?}");
    }
    assert_eq!(job.num_ranks_started(), 0);
}

#[test]
fn a_node_that_does_not_come_is_named_within_the_deadline() {
    let job = Job::new(3);
    let port = free_port();
    let ended = end(job.start_node(0, port, 1, "", &["--set", "fsdp.timeout_secs=1"]));
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(ended.stderr.contains(&format!("node 1 did not come within 1 s to port {port} of node 0")), "{ended:?}");
    let ended = end(job.start_node(1, port, 1, "", &["--set", "fsdp.timeout_secs=1"]));
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(ended.stderr.contains(&format!("node 0 cannot be reached at 127.0.0.1:{port} within 1 s")), "{ended:?}");
    assert_eq!(job.num_ranks_started(), 0);
}

#[test]
fn a_signal_while_nodes_wait_for_each_other_ends_with_75() {
    let stopped = "stopped before the ranks started";
    // To the head, and to a node that has not found it.
    for (node_rank, port) in [(0, free_port()), (1, free_port())] {
        let job = Job::new(3);
        let child = job.start_node(node_rank, port, 1, "", &[]);
        std::thread::sleep(Duration::from_millis(300));
        send(child.id(), Signal::TERM);
        let ended = end(child);
        assert_eq!(ended.status, 75, "{ended:?}");
        assert!(ended.stderr.contains(stopped) && ended.took < Duration::from_secs(1), "{ended:?}");
    }
}

#[test]
fn a_signal_to_a_node_that_waits_ends_the_others_that_wait() {
    let job = Job::new(3);
    let port = free_port().to_string();
    let start = |node_rank: &str| {
        let mut command = job.command(&["--nnodes", "3", "--node-rank", node_rank, "--master-addr", "127.0.0.1"]);
        command.args(["--master-port", &port, "--backend", "shm", "job.toml"]).spawn().unwrap()
    };
    let children = [start("0"), start("2")];
    // The head's end of the connection: local port, then the remote one, then the state.
    let is_connected = |table: String| {
        table
            .lines()
            .any(|line| line.contains(&format!(":{:04X} ", port.parse::<u16>().unwrap())) && line.contains(" 01 "))
    };
    while !is_connected(std::fs::read_to_string("/proc/net/tcp").unwrap()) {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(300));
    send(children[1].id(), Signal::TERM);
    let ended = end_both(children);
    assert_eq!((ended[0].status, ended[1].status), (75, 75), "{ended:?}");
    assert!(ended[0].stderr.contains("node 2 (host ") && ended[0].stderr.contains("was stopped before"), "{ended:?}");
}

#[test]
fn a_signal_during_a_nodes_checks_ends_all() {
    let (job, other) = (Job::new(3), Job::new(3));
    std::fs::remove_file(other.path("job.toml")).unwrap();
    assert!(Command::new("mkfifo").arg(other.path("job.toml")).status().unwrap().success());
    let port = free_port();
    let children = [job.start_node(0, port, 1, "", &[]), other.start_node(1, port, 1, "", &[])];
    std::thread::sleep(Duration::from_millis(500));
    send(children[1].id(), Signal::TERM);
    for ended in end_both(children) {
        assert_eq!(ended.status, 75, "{ended:?}");
        assert!(ended.stderr.contains("stopped before the ranks started"), "{ended:?}");
    }
}

/// One task per node: SLURM's variables say what the flags would.
#[test]
fn slurms_variables_take_the_place_of_flags() {
    let job = Job::new(3);
    let port = free_port().to_string();
    let start = |node_rank: &str, tasks: &str| {
        let mut command = job.command(&["--nproc", "1", "--backend", "shm", "job.toml"]);
        command.envs([
            ("SLURM_JOB_ID", "7"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NUM_TASKS", tasks),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", if tasks == "2" { "1(x2)" } else { "2(x2)" }),
            ("SLURM_STEP_NODELIST", "localhost,n2"),
            ("SLURM_PROCID", node_rank),
            ("SLURM_NODEID", node_rank),
            ("SLURM_LOCALID", "0"),
            ("MASTER_PORT", &port),
        ]);
        command.env_remove("MASTER_ADDR").spawn().unwrap()
    };
    let ended = end_both([start("0", "2"), start("1", "2")]);
    assert_same_end(&ended, 0, &[]);
    assert!(
        job.read("out/started-1").contains("rank: 1, local_rank: 0, world_size: 2, local_world_size: 1, group_rank: 1")
    );
    let ended = end(start("0", "4"));
    assert_eq!(ended.status, 2, "{ended:?}");
    assert!(ended.stderr.contains("expected one task per node for fsdp-launch, got 4 tasks on 2 nodes"), "{ended:?}");
}

/// What comes to the port and is no launcher neither ends the run nor keeps the head from its deadline.
#[test]
fn strangers_at_the_port_are_no_nodes() {
    let job = Job::new(3);
    let port = free_port();
    let head = job.start_node(0, port, 1, "", &["--set", "fsdp.timeout_secs=3"]);
    // More come than it has descriptors for.
    let few = Rlimit { current: Some(40), maximum: Some(40) };
    prlimit(Pid::from_raw(head.id() as i32), Resource::Nofile, few).unwrap();
    let floods: Vec<_> = (0..100)
        .map(|index| {
            std::thread::spawn(move || {
                let mut stream = connect(port);
                // One sends without end, the others nothing.
                while index == 0 && stream.write_all(&b"\"end\"\n".repeat(1000)).is_ok() {}
                if index > 0 {
                    let _ = stream.read(&mut [0]);
                }
            })
        })
        .collect();
    let ended = end(head);
    assert_eq!(ended.status, 1, "{ended:?}");
    assert!(
        ended.stderr.contains("node 1 did not come within 3 s") && ended.took < Duration::from_secs(6),
        "{ended:?}"
    );
    floods.into_iter().for_each(|flood| flood.join().unwrap());
}

/// Even where it says so itself.
#[test]
fn a_node_that_cannot_start_never_ends_the_run_as_done() {
    for (num_ranks, job_field, says) in [
        ("1", r#"{"Err": {"status": 0, "lines": ["nothing wrong"]}}"#, "nothing wrong"),
        ("18446744073709551615", r#"{"Ok": ""}"#, ""),
    ] {
        let job = Job::new(3);
        let port = free_port();
        let head = job.start_node(0, port, 1, "", &[]);
        let mut stream = connect(port);
        let version = env!("CARGO_PKG_VERSION");
        let hello = format!(
            r#"{{"hello": {{"version": "{version}", "num_nodes": 2, "node_rank": 1, "host": "h", "machine": "m", "num_ranks": {num_ranks}, "job": {job_field}}}}}"#
        );
        stream.write_all((hello + "\n").as_bytes()).unwrap();
        let mut verdict = String::new();
        stream.read_to_string(&mut verdict).unwrap();
        drop(stream);
        let ended = end(head);
        assert!(ended.status == 1 || ended.status == 2, "{ended:?}");
        assert!(verdict.starts_with("{\"verdict\"") && ended.stderr.contains(says), "{verdict} {ended:?}");
        assert_eq!(job.num_ranks_started(), 0);
    }
}

/// A node with a reason not to start keeps it for a head that comes later, and a head for nodes that do.
#[test]
fn a_refusal_is_heard_by_nodes_that_come_later() {
    for late in [0, 1] {
        let (job, other) = (Job::new(3), Job::new(3));
        std::fs::remove_file(other.path("data.jsonl")).unwrap();
        let port = free_port();
        let mut refusing = other.start_node(1 - late, port, 1, "", &[]);
        std::thread::sleep(Duration::from_secs(6));
        assert!(refusing.try_wait().unwrap().is_none());
        let ended = [end(job.start_node(late, port, 1, "", &[])), end(refusing)];
        let reason = |ended: &Ended| {
            let lines: Vec<&str> = ended.stderr.lines().filter(|line| line.contains("data.jsonl")).collect();
            assert_eq!((ended.status, lines.len()), (2, 1), "{ended:?}");
            lines[0].to_owned()
        };
        assert_eq!(reason(&ended[0]), reason(&ended[1]));
        assert!(ended[1].stderr.contains("fsdp-launch: waiting for "), "{ended:?}");
        assert!(ended[0].took < Duration::from_secs(2), "{ended:?}");
    }
}

/// Connects as soon as somebody listens.
fn connect(port: u16) -> TcpStream {
    loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => return stream,
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// Two network namespaces, joined by a pair of virtual interfaces. Deleted on drop.
struct Namespaces {
    names: [String; 2],
}

impl Namespaces {
    fn new() -> Result<Self, String> {
        let id = std::process::id();
        let namespaces = Self { names: [format!("fsdp{id}a"), format!("fsdp{id}b")] };
        let [a, b] = &namespaces.names;
        ip(&format!("netns add {a}"))?;
        ip(&format!("netns add {b}"))?;
        ip(&format!("link add v0 netns {a} type veth peer name v1 netns {b}"))?;
        for (name, interface, addr) in [(a, "v0", "10.99.0.1/24"), (b, "v1", "10.99.0.2/24")] {
            ip(&format!("-n {name} addr add {addr} dev {interface}"))?;
            ip(&format!("-n {name} link set {interface} up"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        Ok(namespaces)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(args: &str) -> Result<(), String> {
    match Command::new("ip").args(args.split(' ')).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("ip {args}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("ip (Debian: iproute2): {error}")),
    }
}

/// No packet says that the other machine is gone: nothing comes any more, and that is all.
#[test]
fn a_link_that_goes_down_is_noticed_on_both_sides() {
    let namespaces = match Namespaces::new() {
        Ok(namespaces) => namespaces,
        Err(reason) => return println!("skipped: no network namespaces here: {reason}"),
    };
    let job = Job::new(1_000_000);
    let start = |node_rank: usize| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespaces.names[node_rank], "env", "--default-signal", "bin/fsdp-launch"]);
        command.args(["--nnodes", "2", "--node-rank", &node_rank.to_string(), "--master-addr", "10.99.0.1"]);
        command.args(["--master-port", "29500", "--nproc", "2", "--backend", "shm", "job.toml"]);
        command.env("CUDA_VISIBLE_DEVICES", "").current_dir(job.dir.path());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
    };
    let children = [start(0), start(1)];
    job.wait_for_ranks(4);
    ip(&format!("-n {} link set v1 down", namespaces.names[1])).unwrap();
    let ended = end_both(children);
    let host = fsdp_control::host_name();
    for (ended, who) in ended.iter().zip([format!("node 1 (host {host}, ranks 2-3)"), format!("node 0 (host {host})")])
    {
        assert_eq!(ended.status, 1, "{ended:?}");
        assert!(ended.stderr.contains(&format!("fsdp-launch: {who} is lost: its machine did not answer")), "{ended:?}");
        assert!(ended.took < Duration::from_secs(10), "{ended:?}");
    }
    job.assert_no_survivors(Duration::ZERO);
}
