"""Two real processes with four fake devices each do what one process with eight does.

What is computed by the same processes again is bit-equal. Between one process and two, losses agree
within 1e-6: gloo adds the parts of the devices in another order than one process does.
"""

import contextlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import distributed

from batiste.exit_codes import LOST_PEER
from batiste.main import evaluate, generate, load_experiment, train
from batiste.sharding import MeshConfig, make_mesh
from batiste.train import Checkpoints, flops_per_token, make_program
from batiste.train.ledger import read_ledger
from batiste.train.metrics import read_metrics
from test_resume import tiny_experiment

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from test_processes import experiment


def get_config(arg):
    return experiment(*arg.split("@"))
"""
# A program instead of the command line: trains, and says which positions of the data it has read.
PROGRAM = """
import json, pathlib, sys
from jax.experimental import multihost_utils
from batiste import assembly, main, sharding
from batiste.data import order
from test_processes import connected_groups, experiment, program_checks

address, index, corpus, workdir = sys.argv[1:]
sharding.connect(address, 2, int(index))
asked, ask = [], multihost_utils.reached_preemption_sync_point
multihost_utils.reached_preemption_sync_point = lambda at: (asked.append(at), ask(at))[1]
read, drawn_at = [], order.Order.drawn_at
order.Order.drawn_at = lambda self, at: (read.extend(at.tolist()), drawn_at(self, at))[1]
connect_groups, cliques = assembly.connect_groups, []
assembly.connect_groups = lambda mesh: (connect_groups(mesh), cliques.append(connected_groups()))
result = main.train(experiment(corpus, "zero"), workdir)
cliques.append(connected_groups())
evaluated = main.evaluate(workdir)
found = {"read": read, "asked": asked, "result": list(result), "evaluated": list(evaluated),
         "cliques": cliques, **program_checks(pathlib.Path(workdir))}
pathlib.Path(f"{workdir}_{index}.json").write_text(json.dumps(found))
"""
STEPS = 10


def experiment(corpus: str, mesh: str):
    """A very small model, on a mesh of data 4 x tensor 2 or of data 8 with ZeRO-3."""
    experiment = tiny_experiment(corpus)
    experiment.model.num_kv_heads = 2
    experiment.mesh = MeshConfig(tensor=2) if mesh == "tensor" else MeshConfig(zero=3)
    experiment.train.num_steps = 5000 if mesh == "tensor" else STEPS
    experiment.train.checkpoint.every = 5000 if mesh == "tensor" else 5
    return experiment


def connected_groups() -> list[str]:
    """The groups of devices that gloo has connected, as it names them to the other processes."""
    client = distributed.global_state.client
    return sorted({key.rsplit("/", 1)[0] for key, _ in client.key_value_dir_get_bytes("cpu:gloo/")})


def budget(experiment, steps: int) -> float:
    """The FLOPs of so many steps, as train.stop.flops takes them."""
    mesh = make_mesh(MeshConfig())
    program = make_program(experiment.model, experiment.train, mesh, MeshConfig())
    length = experiment.data.sequence_length
    per_token = flops_per_token(
        experiment.model, program.abstract_state.params, program.letters, length)
    return (steps + 0.5) * per_token * experiment.train.batch_size * length


def program_checks(workdir: pathlib.Path) -> dict:
    """Runs in both processes of PROGRAM: shares of odd meshes, and refusals, one line each."""
    from batiste.main import prepare
    from batiste.sharding import Share, agree, check_shared, together
    from batiste.train import work_directory_lock

    index = jax.process_index()
    devices = np.array(jax.devices()).reshape(2, 4)
    shares = {}
    for name, placed in {
        "data 8, processes alternating": devices.T.reshape(8, 1),
        "data 2 x tensor 4, both in both": devices.reshape(2, 2, 2).swapaxes(0, 1).reshape(2, 4),
    }.items():
        mesh = jax.sharding.Mesh(
            placed.reshape(1, len(placed), 1, 1, 1, -1), make_mesh(MeshConfig()).axis_names)
        share = Share(mesh, 16)
        whole_BT = np.arange(16 * 3).reshape(16, 3)
        batch_BT = share.place(whole_BT[share.rows])
        right = all((np.asarray(shard.data) == whole_BT[shard.index]).all()
                    for shard in batch_BT.addressable_shards)
        shares[name] = [share.rows.tolist(), batch_BT.shape, right]

    def fail():
        if index == 1:
            raise OSError("the disk is full")
        return ""

    def refused(call) -> str:
        try:
            call()
        except (ValueError, OSError) as error:
            return str(error)

    # A directory that process 0 holds already, as another run would.
    taken = workdir.with_name("taken")
    with work_directory_lock(taken) if index == 0 else contextlib.nullcontext():
        held = refused(lambda: prepare(experiment("nothing", "zero"), taken))
        together("leave the directory that is taken")
    return {
        "held": held,
        "shares": shares,
        "together": together("count", lambda: str(index)),
        "failed": refused(lambda: together("write", fail)),
        "differs": refused(lambda: agree({"a": 1, "b": index})),
        "not shared": refused(lambda: check_shared(workdir.with_name(f"own_{index}"))),
        "late": refused(lambda: index == 0 and together("wait", seconds=0.5)),
    }


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_flags(port: int, index: int) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of process `index`, joined by hand."""
    return [f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2",
            f"--process_id={index}"], {}


def by_slurm(port: int, index: int) -> tuple[list[str], dict[str, str]]:
    """The same, as srun describes it to its tasks."""
    return ["--distributed"], {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index),
        "JAX_COORDINATOR_PORT": str(port)}


def by_open_mpi(port: int, index: int) -> tuple[list[str], dict[str, str]]:
    """The same, as mpirun describes it."""
    return ["--distributed"], {
        "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
        "JAX_COORDINATOR_PORT": str(port)}


def environment(devices: int = 4) -> dict[str, str]:
    """Of a process with so many fake devices; compiled as tests/conftest.py does it."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "XLA_FLAGS": flags,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen:
    """A process whose output is read by `ended`."""
    return subprocess.Popen(command, env=environment() | variables, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def launch(verb: str, *flags: str, joined=by_flags) -> list[subprocess.Popen]:
    """The real command, in two processes."""
    port = free_port()
    processes = []
    for index in range(2):
        own, variables = joined(port, index)
        processes.append(
            start([sys.executable, "-m", "batiste", verb, *flags, *own], variables))
    return processes


def ended(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    """What each printed, without gloo's chatter; all must end with `code`, and soon.

    Its threads write into each other's lines, so that the number at the end of one may be a line.
    """
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), outputs
    return ["".join(line for line in output.splitlines(keepends=True)
                    if not re.search(r"\[Gloo\]|peer ranks|^\s*\d*$", line)) for output in outputs]


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    """Every recorded loss, training and validation, in all its digits."""
    records = read_metrics(workdir)
    found = {(record["kind"], record["step"]): record["loss"] for record in records}
    assert len(found) == len(records), "a step was written twice"
    return found


def samples(workdir: pathlib.Path) -> str:
    """The samples of a report."""
    report = (workdir / "report.md").read_text()
    return re.search(r"^## Samples\n.*?(?=^## )", report, re.S | re.M)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Holds forty small text files, a config, and the work directories of this module."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "corpus").mkdir()
    for index in range(40):
        text = "".join(f"{index * line} is {index} times {line}\n" for line in range(30))
        (folder / "corpus" / f"{index}.txt").write_text(text)
    (folder / "config.py").write_text(CONFIG)
    return folder


def train_flags(folder: pathlib.Path, mesh: str, name: str) -> list[str]:
    """Flags of `batiste train`."""
    return [f"--config={folder}/config.py:{folder}/corpus/*.txt@{mesh}",
            f"--workdir={folder}/{name}"]


def alone(folder: pathlib.Path, mesh: str, name: str, steps: int) -> dict[tuple[str, int], float]:
    """The losses of one process with eight devices, up to a step."""
    config = experiment(f"{folder}/corpus/*.txt", mesh)
    config.train.stop.flops = budget(config, steps)
    assert train(config, folder / name).step == steps
    return losses(folder / name)


@pytest.fixture(scope="module")
def program(folder) -> tuple[pathlib.Path, list[dict]]:
    """What PROGRAM left and found in two processes: data 8, ZeRO-3, not interrupted."""
    address, workdir = f"127.0.0.1:{free_port()}", folder / "program"
    ended([start([sys.executable, "-c", PROGRAM, address, str(index), f"{folder}/corpus/*.txt",
                  str(workdir)], {}) for index in range(2)])
    return workdir, [json.loads(pathlib.Path(f"{workdir}_{index}.json").read_text())
                     for index in range(2)]


def test_two_processes_with_zero_3_give_the_losses_of_one_within_1e_6(folder, program):
    workdir, found = program
    expected = alone(folder, "zero", "one_zero", STEPS)
    assert sorted(expected) == sorted(
        [("train", step) for step in range(1, STEPS + 1)] + [("validation", 5), ("validation", 10)])
    assert losses(workdir) == pytest.approx(expected, rel=1e-6)
    assert found[0]["result"] == found[1]["result"]
    assert found[0]["result"][:2] == ["done", STEPS]
    assert samples(workdir) == samples(folder / "one_zero")


def test_each_process_reads_its_share_and_no_more(program):
    _, (first, second) = program
    batch = 8
    read = [[place for place in found["read"] if place < STEPS * batch]
            for found in (first, second)]
    for step in range(STEPS):
        shares = [[place - step * batch for place in places if place // batch == step]
                  for places in read]
        assert shares == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_each_process_asks_after_each_step_whether_to_stop_and_nobody_else_does(program):
    """What the preemption service is asked about has no gap, or a signal could fall into it."""
    for found in program[1]:
        assert found["asked"] == list(range(1, STEPS + 2))


def test_no_group_of_devices_is_connected_after_the_start(program):
    """Where one is, the others wait 30 s for a process that still compiles, and end the run."""
    for found in program[1]:
        at_the_start, *_, at_the_end = found["cliques"]
        assert at_the_start == at_the_end and len(at_the_start) > 1


def test_shares_of_meshes_that_mix_the_processes(program):
    _, found = program
    alternating, both = "data 8, processes alternating", "data 2 x tensor 4, both in both"
    for index in range(2):
        shares = found[index]["shares"]
        rows = [row for row in range(16) if row // 2 % 2 == index]
        assert shares[alternating] == [rows, [16, 3], True]
        assert shares[both] == [list(range(16)), [16, 3], True]


def test_processes_wait_agree_and_fail_together(program):
    _, (first, second) = program
    assert first["together"] == second["together"] == ["0", "1"]
    assert first["failed"] == "process 1 could not write: the disk is full"
    assert second["failed"] == "the disk is full"
    assert first["differs"] == second["differs"]
    assert "process 1 differs from process 0: b is 1 and not 0" in first["differs"]
    assert "--workdir must be on a file system that all processes share" in first["not shared"]
    assert re.match("workdir=.*taken: is in use by process ", first["held"])
    assert second["held"].startswith("process 0 could not hold ") and first["held"] in second["held"]
    assert re.match("wait: not all 2 processes were done after 0.5 s", first["late"])


def test_a_checkpoint_of_two_processes_continues_in_two_bit_for_bit_and_in_one(folder, program):
    """In one process, within 1e-6 of the run that was not interrupted; in two, bit for bit."""
    config = experiment(f"{folder}/corpus/*.txt", "zero")
    flags = train_flags(folder, "zero", "half")
    outputs = ended(launch("train", *flags, f"--config.train.stop.flops={budget(config, 5)}"))
    assert "report:" in outputs[0]
    assert outputs[1] == "", "only the first process prints"
    shutil.copytree(folder / "half", folder / "half_alone")
    outputs = ended(launch("train", *flags, "--resume=must"))
    assert "continuing from step 5" in outputs[0] and outputs[1] == "", outputs
    assert losses(folder / "half") == losses(program[0])
    assert samples(folder / "half") == samples(program[0])

    assert train(config, folder / "half_alone", resume="must").step == STEPS
    assert losses(folder / "half_alone") == pytest.approx(losses(program[0]), rel=1e-6)


def test_a_run_continues_on_other_devices_processes_and_meshes_with_the_same_losses(
    folder, program,
):
    """8 devices, then 4, 1, two processes of 4, and 8 again; ZeRO 3, 1, 0, 3, 2; within 1e-6."""
    config = experiment(f"{folder}/corpus/*.txt", "zero")
    flags = [*train_flags(folder, "zero", "elastic"), "--resume=must"]

    def until(step: int) -> str:
        return f"--config.train.stop.flops={budget(config, step)}"

    config.train.stop.flops = budget(config, 3)
    assert train(config, folder / "elastic").step == 3
    command = [sys.executable, "-m", "batiste", "train", *flags]
    ended([start([*command, until(5), "--config.mesh.tensor=2", "--config.mesh.zero=1"],
                 environment(4))])
    ended([start([*command, until(7), "--config.mesh.zero=0"], environment(1))])
    ended(launch("train", *flags, until(9)))
    config.train.stop.flops, config.mesh = None, MeshConfig(zero=2)
    assert train(config, folder / "elastic", resume="must").step == STEPS
    expected = losses(program[0])
    found = {key: loss for key, loss in losses(folder / "elastic").items() if key in expected}
    assert found == pytest.approx(expected, rel=1e-6)


def test_two_processes_evaluate_and_generate_like_one(folder, program):
    workdir, found = program
    loss, *_, tokens, num_bytes = evaluate(workdir)
    for index in range(2):
        assert found[index]["evaluated"][0] == pytest.approx(loss, rel=1e-6)
        assert found[index]["evaluated"][-2:] == [tokens, num_bytes]
    prompts = ["1 is ", "20"]
    printed, nothing = ended(
        launch("generate", f"--workdir={workdir}", *(f"--prompt={prompt}" for prompt in prompts)))
    assert nothing == ""
    texts = generate(workdir, prompts)
    expected = [f"=== {prompt!r}\n{prompt}{text}\n" for prompt, text in zip(prompts, texts)]
    assert printed.endswith("".join(expected))


def wait_for_step(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    """Returns when metrics.jsonl holds a step."""
    while not any(record["step"] >= step for record in read_metrics(workdir)):
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.01)


def newest(workdir: pathlib.Path) -> int:
    """The step of the newest checkpoint."""
    checkpoints = Checkpoints(workdir, load_experiment(workdir).train.checkpoint)
    step = checkpoints.latest_step
    checkpoints.close()
    return step


def test_a_signal_to_one_process_stops_both_after_one_step_and_tensor_4x2_gives_the_losses_of_one(
    folder,
):
    """Data 4 x tensor 2, found by SLURM's and then by Open MPI's variables; losses within 1e-6."""
    workdir, flags = folder / "signal", train_flags(folder, "tensor", "signal")
    processes = launch("train", *flags, joined=by_slurm)
    wait_for_step(workdir, STEPS, processes)
    processes[1].send_signal(signal.SIGTERM)
    printed, nothing = ended(processes, code=143)
    (step,) = map(int, re.findall(r"stopped by SIGTERM after step (\d+), saved", printed))
    # jax's own log says that it caught the signal, and on a busy machine what it waits for.
    assert [line for line in nothing.splitlines() if not re.match(r"[IWEF]\d{4} ", line)] == []
    assert newest(workdir) == step >= STEPS
    expected = alone(folder, "tensor", "one_tensor", STEPS)
    found = {key: loss for key, loss in losses(workdir).items() if key[1] <= STEPS}
    assert found == pytest.approx(expected, rel=1e-6)

    # A signal before the first step, of a run that does not begin at step 1.
    processes = launch("train", *flags, joined=by_open_mpi)
    while "there" not in (line := processes[0].stdout.readline()) and "attention" not in line:
        assert line, ended(processes)
    processes[0].send_signal(signal.SIGTERM)
    printed, _ = ended(processes, code=143)
    assert f"continuing from step {step} of" in printed
    again = int(re.search(r"stopped by SIGTERM after step (\d+), saved", printed)[1])
    assert newest(workdir) == again
    assert step < again < 5000


# Where a save is going to be written there is a file; only process 0 finds out.
OBSTRUCTED = """
import pathlib, sys
from batiste import main, sharding
from test_processes import experiment

address, index, corpus, workdir = sys.argv[1:]
sharding.connect(address, 2, int(index))
config, report = experiment(corpus, "zero"), main._report
config.train.num_steps = config.train.evaluation.every = 40

def obstruct(ledger, event, **fields):
    if event == "saved" and fields["step"] == 5:
        pathlib.Path(workdir, "checkpoints/10.unfinished").write_text("in the way")
    report(ledger, event, **fields)

main._report = obstruct
main.train(config, workdir)
"""


def test_a_failed_save_is_tried_again_by_both_processes_at_one_step(folder):
    address, workdir = f"127.0.0.1:{free_port()}", folder / "obstructed"
    printed, _ = ended([start([sys.executable, "-c", OBSTRUCTED, address, str(index),
                               f"{folder}/corpus/*.txt", str(workdir)], {}) for index in range(2)])
    events = read_ledger(workdir)
    failed = [event for event in events if event["event"] == "save_failed"]
    assert [event["step"] for event in failed] == [10], printed
    saved = {event["step"] for event in events if event["event"] == "saved"}
    again = saved - set(range(5, 41, 5))
    assert len(again) == 1 and 10 < min(again) < 40, saved
    assert saved | {10} >= {5, 40} and newest(workdir) == 40
    assert sorted(losses(workdir))[0][1] == 1 and len(losses(workdir)) == 41


@pytest.mark.parametrize("index", [0, 1])
def test_what_one_process_cannot_write_keeps_none_waiting(folder, index):
    workdir, steps = folder / f"no_room_{index}", 60
    processes = launch(
        "train", *train_flags(folder, "zero", workdir.name), f"--config.train.num_steps={steps}",
        f"--config.train.evaluation.every={steps}", "--config.train.checkpoint.max_failures=None")
    wait_for_step(workdir, 11, processes)
    room = resource.prlimit(processes[index].pid, resource.RLIMIT_FSIZE)
    resource.prlimit(processes[index].pid, resource.RLIMIT_FSIZE, (0, room[1]))
    seen = set()
    while len(seen) < 3:  # One may be of before; a next one begins when one has failed.
        seen |= {path.name for path in (workdir / "checkpoints").glob("*.unfinished")}
        assert all(process.poll() is None for process in processes), ended(processes)
    resource.prlimit(processes[index].pid, resource.RLIMIT_FSIZE, room)
    ended(processes)  # In less than the 900 s that they would wait for each other in Orbax.
    failures = [event["why"] for event in read_ledger(workdir) if event["event"] == "save_failed"]
    assert failures and all(why.startswith(f"process {index}: ") for why in failures), failures
    assert newest(workdir) == steps and len(losses(workdir)) == steps + 1


def test_what_fails_in_one_process_ends_both_with_a_line(folder):
    missing = f"--config.data.sources[0].path={folder}/nothing/*.txt"
    # A process that the others had to be ended for would not end with 1.
    first, second = ended(launch("train", *train_flags(folder, "zero", "failed"), missing), code=1)
    assert re.fullmatch(r"error: .*/nothing/\*\.txt.*: no such file.*\n", first), first
    assert second == f"error: process 0 could not prepare the data: {first[7:]}"



@pytest.mark.parametrize("index,seconds,refusal", [
    (0, 2, "not all of 2 processes came"), (1, 1, "process 0 did not answer within 1 s")])
def test_a_process_that_nobody_joins_says_so_and_ends(index, seconds, refusal):
    code = (
        "import sys, batiste.sharding; connection = sys.modules['batiste.sharding.connect']; "
        f"connection.INITIALIZATION_SECONDS = {seconds}; "
        f"batiste.sharding.connect('127.0.0.1:{free_port()}', 2, {index})"
    )
    (printed,) = ended([start([sys.executable, "-c", code], {})], code=1)
    assert refusal in printed.splitlines()[-1]


def test_a_taken_port_is_refused():
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        code = f"import batiste.sharding; batiste.sharding.connect('127.0.0.1:{port}', 2, 0)"
        (printed,) = ended([start([sys.executable, "-c", code], {})], code=1)
    assert "process 0 cannot listen there" in printed and "choose another port" in printed


def check_lost(processes: list[subprocess.Popen], victim: int) -> None:
    """Kills one of two; the other ends with the code that asks for another start, and says why."""
    processes[victim].kill()
    killed_at = time.monotonic()
    (printed,) = ended([processes[1 - victim]], code=LOST_PEER)
    assert time.monotonic() - killed_at < 25  # Without a watch it is 30 and more.
    assert printed.splitlines()[-1].startswith(f"error: process {victim} of 2 is lost; ")
    processes[victim].communicate()


def test_a_lost_coordinator_ends_the_other_in_the_middle_of_training(folder):
    processes = launch("train", *train_flags(folder, "tensor", "lost"))
    wait_for_step(folder / "lost", 1, processes)
    check_lost(processes, 0)


def test_a_lost_worker_ends_the_other():
    code = ("import time, batiste.sharding; "
            f"batiste.sharding.connect('127.0.0.1:{free_port()}', 2, %d, {LOST_PEER}); "
            "print('up', flush=True); time.sleep(300)")
    processes = [start([sys.executable, "-c", code % index], {}) for index in range(2)]
    for process in processes:
        while "up" not in (line := process.stdout.readline()):
            assert line, ended(processes)
    check_lost(processes, 1)
