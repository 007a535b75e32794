"""Runs fsdp-launch and FSDP2 over the same work, and reads what they leave."""
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path

HERE = Path(__file__).resolve().parent

JOB = """
[model]
path = "{model}"
init = "random"
[fsdp]
device = "{device}"
[precision]
param = "bf16"
reduce = "fp32"
[activation_checkpointing]
mode = "full"
[optimizer]
lr = 1e-4
weight_decay = 0.01
[training]
steps = {steps}
seq_len = {seq_len}
micro_batch_size = {micro_batch_size}
[data]
train = ["{data}"]
format = "tokens"
shuffle = false
[checkpoint]
every_steps = 0
[output]
dir = "{out}"
"""


class Failed(Exception):
    """A command that did not do what it is for; the text is one line."""


def last_line(path):
    lines = [line for line in Path(path).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it said nothing"


def run(command, log, timeout_secs, env=None):
    """Runs a command to its end with its output in the file `log`; returns its exit status and output."""
    return run_ranks([(command, env or {})], log, timeout_secs)


def run_ranks(commands, log, timeout_secs):
    """The same for several (command, variables) beside each other; the status is that of the first one to fail, if any,
    at which the others are killed."""
    deadline, status = time.monotonic() + timeout_secs, 0
    with open(log, "w") as file:
        processes = [start(command, file, env) for command, env in commands]
        try:
            while status == 0 and any(process.poll() is None for process in processes):
                if time.monotonic() > deadline:
                    raise Failed(f"no end after {timeout_secs:.0f} s; see {log.name}")
                time.sleep(0.05)
                status = next((process.returncode for process in processes if process.returncode), 0)
            status = status or next((process.wait() for process in processes if process.wait()), 0)
        finally:
            for process in processes:
                stop(process)
    return status, Path(log).read_text(errors="replace")


def start(command, log, env):
    return subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                            env=os.environ | env, start_new_session=True)


def stop(process):
    """Kills what is left of a command and of what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Job:
    """A run of fsdp-launch in a folder of its own, with `sets` (`table.key=value`) over the job's settings."""

    def __init__(self, binaries, folder, log, nproc, sets=(), **settings):
        self.launch, self.folder, self.log, self.nproc = binaries / "fsdp-launch", Path(folder), log, nproc
        self.sets, self.steps = [arg for value in sets for arg in ("--set", value)], settings["steps"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.toml, self.out = self.folder / "job.toml", self.folder / "out"
        self.toml.write_text(JOB.format(out=self.out, **settings))

    def plan(self):
        """Bytes of the planned peak of a rank."""
        status, text = run([self.launch, "plan", "--json", "--nproc", self.nproc, *self.sets, self.toml], self.log, 60)
        if status != 0:
            raise Failed(f"plan ended with status {status}: {last_line(self.log)}")
        return json.loads(text)["peak_bytes"]["total"]

    def run(self, timeout_secs):
        """The lines of all steps. Once the last one is there the run is killed: nothing needs the exported model."""
        deadline = time.monotonic() + timeout_secs
        with open(self.log, "w") as file:
            process = start([self.launch, "--nproc", self.nproc, *self.sets, self.toml], file, {})
            try:
                while len(lines := self.metrics()) < self.steps:
                    if process.poll() is not None and len(self.metrics()) < self.steps:
                        raise Failed(f"status {process.returncode} after {len(lines)} steps: {last_line(self.log)}")
                    if time.monotonic() > deadline:
                        raise Failed(f"{len(lines)} of {self.steps} steps in {timeout_secs:.0f} s; see {self.log.name}")
                    time.sleep(0.05)
            finally:
                stop(process)
                self.wait_for_ranks()
        return lines

    def metrics(self):
        path = self.out / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_ranks(self):
        """Until none of them, which end with their launcher, has memory any more."""
        mark = str(self.folder).encode()
        for _ in range(200):
            if not any(mark in command_line(pid) for pid in os.listdir("/proc") if pid.isdigit()):
                return
            time.sleep(0.05)
        raise Failed("ranks are alive 10 s after their launcher was killed")

    def timeline(self):
        """Of rank 0 over the traced steps: (hidden share of the communication, share of the time without compute)."""
        events = json.loads((self.out / "traces/rank-0.json").read_text())["traceEvents"]
        lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        spans = [(lanes[e["tid"]], e["args"]["step"], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
        communication = waits = compute = whole = 0.0
        for step in {span[1] for span in spans}:
            of = lambda *names: [(a, b) for lane, s, a, b in spans if s == step and lane in names]
            communication += covered(of("all-gather", "reduce-scatter"))
            waits += covered(of("compute waits"))
            compute += covered(of("compute"))
            whole += max(b for _, b in of("compute")) - min(a for a, _ in of("compute"))
        hidden = 1 - min(waits / communication, 1) if communication else None
        return hidden, 1 - compute / whole


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it has ended


def covered(spans):
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(spans):
        total += max(b - max(a, end), 0.0)
        end = max(end, b)
    return total


def torch_ranks(script, nproc, *args):
    """Commands of a Python program's ranks, with the variables that torchrun gives them, as for `run_ranks`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = dict(WORLD_SIZE=str(nproc), LOCAL_WORLD_SIZE=str(nproc), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                 HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    return [([sys.executable, script, *args], ranks | dict(RANK=str(rank), LOCAL_RANK=str(rank)))
            for rank in range(nproc)]


def json_lines(text):
    """The objects among the lines of an output; one may stand behind other text of its line."""
    found = []
    for line in text.splitlines():
        if "{" in line and line.endswith("}"):
            try:
                found.append(json.loads(line[line.index("{"):]))
            except ValueError:
                pass
    return found
