"""The checks of gpu_check.sh, which starts this with the variables that find libtorch; see docs/gpu.md.

    check.py BINARIES GOLDENS [BLOCK...]

Blocks, in this order: kernels, parity, training, bits, bandwidth, offload; all of them where none is named. Each has a
time limit, and all of them GPU_CHECK_SECS together (default 540). DEVICE=cpu tries the script itself on a machine without
a GPU, with small shapes. The table goes to stdout and, with all logs, to a new folder in GPU_CHECK_OUT (default
out/gpu_check). Runs use TMPDIR.
"""
import ctypes, datetime, functools, os, platform, re, shutil, statistics, sys, tempfile, time
from collections import defaultdict
from pathlib import Path

import make_work
from jobs import Failed, Job, json_lines, last_line, run, run_ranks, torch_ranks
from table import Table

HERE = Path(__file__).resolve().parent
GIB = 1 << 30


class Machine:
    """What the driver says; without a GPU the CPU stands in."""

    def __init__(self, device):
        self.device, self.num_gpus, self.memory_bytes, self.driver = device, 0, 0, ""
        self.card = platform.processor() or platform.machine()
        if device == "cpu":
            return
        try:
            cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            sys.exit(f"gpu_check: no NVIDIA driver on this machine: {error}")
        call = lambda name, *args: getattr(cuda, name)(*args) == 0 or sys.exit(f"gpu_check: {name} fails")
        count, version, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        call("cuInit", 0)
        call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            sys.exit("gpu_check: the driver lets this process see no GPU (CUDA_VISIBLE_DEVICES?)")
        call("cuDriverGetVersion", ctypes.byref(version))
        call("cuDeviceGetName", name, len(name), 0)
        call("cuDeviceTotalMem_v2", ctypes.byref(memory), 0)
        self.num_gpus, self.memory_bytes, self.card = count.value, memory.value, name.value.decode()
        self.driver = f"driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}"

    def ranks(self):
        """Of a training run: all GPUs; two stand-ins."""
        return self.num_gpus or 2

    def __str__(self):
        if self.device == "cpu":
            return f"no GPU: a dry run on the CPU ({self.card})"
        return f"{self.num_gpus} x {self.card}, {self.memory_bytes / GIB:.0f} GiB, {self.driver}"


class Check:
    def __init__(self, binaries, goldens, device, out, work, budget_secs):
        self.binaries, self.goldens, self.device = Path(binaries).resolve(), Path(goldens).resolve(), device
        self.out, self.work = out, work
        self.machine, self.table = Machine(device), Table()
        self.deadline = time.monotonic() + budget_secs

    def left(self, limit_secs):
        """Seconds until the earlier of a limit from now and the end of all."""
        return min(limit_secs, self.deadline - time.monotonic())

    def block(self, name, limit_secs):
        """Runs a block; that it fails, or has no time, is a row."""
        self.block_deadline = time.monotonic() + self.left(limit_secs)
        if self.secs() < 10:
            return self.table.skip(name, "no time left")
        try:
            getattr(self, name)()
        except Failed as error:
            if time.monotonic() < self.deadline:
                self.table.fail(name, str(error))
            else:
                self.table.skip(name, f"the time for all blocks is over: {error}")

    def secs(self):
        """Left to this block."""
        return self.block_deadline - time.monotonic()

    def kernels(self):
        if self.device == "cpu":
            return self.table.skip("kernels", "compares a GPU with the CPU")
        log = self.out / "kernels.log"
        status, text = run([self.binaries / "gpu_kernels"], log, self.secs())
        lines = re.findall(r"^(\S+)  (\S+)  (\S+)  (ok|FAIL)$", text, re.MULTILINE)
        failed = [line for line in lines if line[3] == "FAIL"]
        for name, error, limit, _ in failed:
            self.table.add(f"kernel {name}, error", error, f"<= {limit}", "FAIL")
        if not lines or (status != 0 and not failed):
            raise Failed(f"status {status}: {last_line(log)}")
        self.table.at_most(f"kernels that differ from the CPU, of {len(lines)}", len(failed), 0, "{}")

    def parity(self):
        nccl_ranks = self.machine.num_gpus
        self.tests("parity-fp32", nccl_ranks)
        self.tests("parity-bf16", nccl_ranks)
        if self.machine.num_gpus > 1:
            # With one GPU the runs of several ranks have shared it already.
            self.tests("parity-fp32", 0, "llama", CUDA_VISIBLE_DEVICES=first_visible())
            self.tests("parity-bf16", 0, CUDA_VISIBLE_DEVICES=first_visible())

    def bits(self):
        self.tests("parity-identical_bits", self.machine.num_gpus)

    def tests(self, name, nccl_ranks, *filters, **env):
        """Runs an executable of tests/parity. Its figures are rows, the largest of all cases, and so are failed tests."""
        log = self.out / f"{name}-{len(self.table.rows)}.log"
        env |= dict(FSDP_TEST_DEVICE=self.device, FSDP_TEST_NCCL_RANKS=str(nccl_ranks),
                    FSDP_TEST_BINARIES=str(self.binaries), FSDP_TEST_GOLDENS=str(self.goldens))
        threads = "4" if self.device == "cuda" else "1"
        command = [self.binaries / name, "--nocapture", "--test-threads", threads, *filters]
        status, text = run(command, log, self.secs(), env)
        groups = defaultdict(list)
        for line in json_lines(text):
            if "run" not in line:
                continue
            param, case, ranks = re.fullmatch(r"(\S+) (\S+) on (.*)", line["run"]).groups()
            groups[param, ranks].append((case, line))
        for (param, ranks), lines in sorted(groups.items()):
            cases = len({case for case, _ in lines})
            for what in ("loss", "grad_norm"):
                values = [line[what] for _, line in lines]
                worst = None if None in values else max(values)
                what_of = f"{param} parity, {ranks}, {cases} models: {what}"
                self.table.at_most(what_of, worst, lines[0][1][f"{what}_limit"], "{:.1e}")
        # The list at the end.
        names = re.findall(r"^    (\S+)$", text.rpartition("\nfailures:\n")[2], re.MULTILINE) if status else []
        for test in names:
            self.table.fail(f"{name}: {test}", f"see {log.name}")
        passed = re.search(r"test result: .*?(\d+) passed", text)
        if passed is None or (status != 0 and not names):
            raise Failed(f"{name}: status {status}: {last_line(log)}")
        if not groups:
            self.table.at_least(f"{name}: tests passed", int(passed[1]), int(passed[1]) + len(names), "{}")

    def training(self):
        """Ours and FSDP2 in turns over the same work; overlap and memory of ours."""
        nproc, is_cpu = self.machine.ranks(), self.device == "cpu"
        shape, seq_len, warm, measured = ("tiny", 128, 1, 3) if is_cpu else ("1b", 2048, 3, 8)
        work = self.work / "training"
        # Two more steps for the timeline, in which the host waits for the device.
        steps = warm + measured + 2

        def with_batch(batch):
            model, data = make_work.make(work, shape, (warm + measured) * nproc * batch, seq_len)
            return functools.partial(
                Job, self.binaries, nproc=nproc, device=self.device, seq_len=seq_len, model=model, data=data, steps=steps,
                micro_batch_size=batch, sets=[f'metrics.trace_steps="{steps - 1}-{steps}"'])

        batch, planned = self.largest_batch(with_batch, work / "plan", 0.5)
        if batch is None:
            return self.table.skip("training", f"a step of the {shape} shape is planned at {planned / GIB:.0f} GiB")
        tokens = nproc * batch * seq_len
        ours, peers = [], []
        for turn in range(2):
            job = with_batch(batch)(folder=work / f"ours-{turn}", log=self.out / f"training-{turn}.log")
            lines = job.run(self.secs())
            ours.append(statistics.mean(line["step_time_s"] for line in lines[warm:warm + measured]))
            peers.append(self.fsdp2(work, nproc, batch, warm, measured, turn))
        our_secs, peer_secs = min(ours), min(peer["step_secs"] for peer in peers)

        size = f"{shape}, {nproc} x {batch} x {seq_len}"
        self.table.figure(f"{size}: tokens/s of FSDP2 ({peers[0]['model']})", f"{tokens / peer_secs:.0f}")
        if is_cpu:
            self.table.figure(f"{size}: tokens/s", f"{tokens / our_secs:.0f}")
        else:
            self.table.at_least(f"{size}: tokens/s", tokens / our_secs, tokens / peer_secs, "{:.0f}")
        self.utilisation(size, lines[warm]["tflops"] * lines[warm]["step_time_s"], lines[warm], our_secs, peer_secs)
        differences = [abs(line["loss"] - loss) for line, loss in zip(lines, peers[-1]["losses"])]
        self.table.at_most(f"{size}: largest difference of a loss to FSDP2's, from other random weights",
                           max(differences), 0.1)

        shutil.copy(job.out / "traces/rank-0.json", self.out / "timeline.json")
        hidden, gaps = job.timeline()
        if nproc > 1:
            # On CPUs the ranks share the cores that would have to do both.
            self.table.at_least(f"{size}: share of the communication that is hidden", hidden, 0.0 if is_cpu else 0.9,
                                "{:.2f}")
        else:
            self.table.at_most(f"{size}: share of a step in which nothing computes", gaps, 0.1, "{:.3f}")

        peak = lines[-1]["peak_memory_bytes"]
        if is_cpu:
            self.table.skip(f"{size}: peak memory", "on CPUs it is the process's, and the plan is of tensors")
        else:
            self.table.at_most(f"{size}: peak memory, GiB, of {planned / GIB:.2f} planned", peak / GIB,
                               1.1 * planned / GIB, "{:.2f}")
            self.table.at_most(f"{size}: peak memory, GiB, beside FSDP2's", peak / GIB,
                               peers[0]["peak_memory_bytes"] / GIB, "{:.2f}")

    def largest_batch(self, with_batch, folder, share):
        """The largest micro-batch whose plan takes at most that share of the card, and its bytes; on CPUs the smallest."""
        for batch in [2] if self.device == "cpu" else [8, 4, 2, 1]:
            planned = with_batch(batch)(folder=folder, log=self.out / "plan.json").plan()
            if self.device == "cpu" or planned <= share * self.machine.memory_bytes:
                return batch, planned
        return None, planned

    def fsdp2(self, work, nproc, batch, warm, measured, turn):
        log = self.out / f"fsdp2-{turn}.log"
        command = torch_ranks(HERE / "fsdp2_gpu.py", nproc, work / "model", work / "train.jsonl", "--device", self.device,
                              "--batch", batch, "--warm", warm, "--steps", measured)
        status, text = run_ranks(command, log, self.secs())
        if status != 0:
            raise Failed(f"FSDP2 ended with status {status}: {last_line(log)}")
        return json_lines(text)[-1]

    def utilisation(self, size, flops, line, our_secs, peer_secs):
        """`flops` of a step, in 10^12 and of one rank, which are the same for both."""
        if line.get("mfu") is None:
            return self.table.skip(f"{size}: MFU", "no peak of this device is known; TFLOP/s are "
                                   f"{flops / our_secs:.3g}, FSDP2's {flops / peer_secs:.3g}")
        peak = line["tflops"] / line["mfu"]
        self.table.at_least(f"{size}: MFU", flops / our_secs / peak, flops / peer_secs / peak, "{:.3f}")

    def bandwidth(self):
        """NCCL on 1 to N ranks; on several, beside PyTorch's use of it."""
        if self.device == "cpu":
            counts, backend = [2], "shm"
        else:
            counts, backend = [n for n in (1, 2, 4, 8) if n <= self.machine.num_gpus], "nccl"
        for nproc in counts:
            ranks = "1 rank" if nproc == 1 else f"{nproc} ranks"
            log = self.out / f"bandwidth-{nproc}.log"
            status, text = run([self.binaries / "bandwidth", nproc, 10, backend], log, self.secs())
            if status != 0:
                raise Failed(f"{ranks}: status {status}: {last_line(log)}")
            if other := {line["backend"] for line in json_lines(text)} ^ {backend}:
                raise Failed(f"the measured back end is not {backend} alone: {other}; see {log.name}")
            peer = {}
            if nproc > 1:
                log = self.out / f"bandwidth-torch-{nproc}.log"
                script = HERE.parent / "bench/bandwidth.py"
                status, peer_text = run_ranks(torch_ranks(script, nproc, "--device", self.device), log, self.secs())
                if status != 0:
                    raise Failed(f"PyTorch's {ranks}: status {status}: {last_line(log)}")
                peer = {(line["collective"], line["mib"]): line["gib_per_sec"] for line in json_lines(peer_text)}
            for line in json_lines(text):
                name = f"{line['backend']} {line['collective']}, {ranks}, {line['mib']} MiB: GiB/s"
                of_peer = peer.get((line["collective"], line["mib"]))
                if of_peer is None:
                    self.table.figure(name, f"{line['gib_per_sec']:.1f}")
                else:
                    self.table.at_least(name, line["gib_per_sec"], 0.9 * of_peer, "{:.1f}")

    def offload(self):
        """The 7B shape on one card, with the optimizer's moments in the host's memory, then the fp32 weights too."""
        is_cpu = self.device == "cpu"
        shape, seq_len, steps = ("tiny", 128, 3) if is_cpu else ("7b", 2048, 3)
        work, host_bytes = self.work / "offload", host_memory_bytes()
        if not is_cpu and self.machine.memory_bytes < 75 * GIB:
            return self.table.skip("7b with offload", f"the card has {self.machine.memory_bytes / GIB:.0f} GiB, 75 needed")
        for offload, needed_gib in (("optimizer", 72), ("master", 108)):
            name = f"{shape} with offload={offload}, 1 rank"
            if not is_cpu and host_bytes < needed_gib * GIB:
                self.table.skip(name, f"{host_bytes / GIB:.0f} GiB of the host's memory are free, {needed_gib} needed")
                continue
            if self.secs() < 60 and not is_cpu:
                self.table.skip(name, "no time left")
                continue

            def with_batch(batch):
                model, data = make_work.make(work, shape, steps * batch, seq_len)
                return functools.partial(
                    Job, self.binaries, nproc=1, device=self.device, model=model, data=data, seq_len=seq_len, steps=steps,
                    micro_batch_size=batch, sets=[f'fsdp.offload="{offload}"'])

            batch, planned = self.largest_batch(with_batch, work / "plan", 0.9)
            if batch is None:
                self.table.skip(name, f"a step is planned at {planned / GIB:.0f} GiB")
                continue
            lines = with_batch(batch)(folder=work / offload, log=self.out / f"offload-{offload}.log").run(self.secs())
            # The first step allocates.
            secs = statistics.mean(line["step_time_s"] for line in lines[1:])
            self.table.figure(f"{name}, {batch} x {seq_len}: tokens/s", f"{batch * seq_len / secs:.0f}")
            if not is_cpu:
                self.table.at_most(f"{name}: peak memory, GiB, of {planned / GIB:.2f} planned",
                                   lines[-1]["peak_memory_bytes"] / GIB, 1.1 * planned / GIB, "{:.2f}")
            shutil.rmtree(work / offload)


def first_visible():
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def host_memory_bytes():
    """Free for a new process: of the system, and of the memory cgroup where it has a limit."""
    kib = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]
    free = int(kib) * 1024
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        if Path(limit).exists() and (text := Path(limit).read_text().strip()) != "max":
            free = min(free, int(text) - int(Path(used).read_text()))
    return free


# With the most seconds that each may take; they come in the order of what is most needed.
BLOCKS = dict(kernels=60, parity=180, training=240, bits=120, bandwidth=60, offload=240)


def main():
    binaries, goldens, *wanted = sys.argv[1:]
    if unknown := [name for name in wanted if name not in BLOCKS]:
        sys.exit(f"gpu_check: expected blocks of {', '.join(BLOCKS)}, got {', '.join(unknown)}")
    device = os.environ.get("DEVICE", "cuda")
    if device not in ("cuda", "cpu"):
        sys.exit(f'gpu_check: expected DEVICE to be "cuda" or "cpu", got "{device}"')
    start = datetime.datetime.now()
    out = Path(os.environ.get("GPU_CHECK_OUT", "out/gpu_check")).resolve() / f"{start:%Y%m%d-%H%M%S}"
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        check = Check(binaries, goldens, device, out, Path(work), float(os.environ.get("GPU_CHECK_SECS", 540)))
        for name, limit_secs in BLOCKS.items():
            if not wanted or name in wanted:
                check.block(name, limit_secs)
    version = (Path(binaries).parent / "VERSION").read_text().strip()
    command = " ".join(["scripts/gpu_check.sh", *wanted])
    took = (datetime.datetime.now() - start).total_seconds()
    text = (f"{check.machine}; torch {os.environ['GPU_CHECK_TORCH']}; fsdp-launch {version}; {start:%Y-%m-%d}; `{command}`, "
            f"{took:.0f} s\n\n{check.table.markdown()}\n")
    (out / "table.md").write_text(text)
    (out / "table.json").write_text(check.table.json())
    print(text)
    print(f"gpu_check: logs and a timeline are in {out}", file=sys.stderr)
    failed = check.table.num_failed()
    print(f"gpu_check: {failed} of {len(check.table.rows)} rows FAIL" if failed else "gpu_check: no row fails")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
