"""Nothing saved is lost: processes that are killed at any moment, dead ranks, folders that cannot be written."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from methods import at_step, command, metrics, module, narrow, small_folder, tiny
from worlds import run_on

import common

# ------------------------------------------------------------------------------------- killed at any moment


def run_until(moment: int, only_while_saving: bool, folder: Path) -> bool:
    """Run MoCo in a process of its own that sends itself SIGKILL at the `moment`-th call or return, of Python or C
    (only those while saving, if asked); true if it got there, false if it came to its end before. It has the most to
    remember: two networks and a queue.
    """
    child = os.fork()
    if child == 0:
        try:
            count, saving = 0, 0

            def step(frame, event: str, _) -> None:
                nonlocal count, saving
                if frame.f_code is common.RunFolder.save.__code__ and event in ("call", "return"):
                    saving = event == "call"
                count += saving or not only_while_saving
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(step)
            module("moco").backbone = narrow
            module("moco").main(tiny("moco", folder, epochs=5, save_every=1, eval_every=5))
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "neither killed nor finished"
    return os.WIFSIGNALED(status)


def test_twenty_kills_at_random_moments_change_no_bit(tmp_path):
    """Half of them while a checkpoint is written. Every run that gets to its end is compared; then another begins."""
    small_folder()  # made here, so that all of them train on the same one
    assert not run_until(0, False, tmp_path / "whole")
    want = torch.load(tmp_path / "whole" / "encoder.pt", weights_only=True)
    random, runs, killed = np.random.default_rng(0), 0, {False: 0, True: 0}  # anywhere, or while saving
    finished = False
    while sum(killed.values()) < 20 or not finished:
        saving = killed[True] < killed[False]
        # A step makes about 11,000 calls and returns, a save 21,000: a process lives for some steps, or for two saves.
        moment = int(random.integers(1, 45_000 if saving else 120_000)) if sum(killed.values()) < 20 else 0
        finished = not run_until(moment, saving, tmp_path / f"run{runs}")
        killed[saving] += not finished
        if finished:
            folder, runs = tmp_path / f"run{runs}", runs + 1
            got, lines = torch.load(folder / "encoder.pt", weights_only=True), metrics(folder)
            assert all(torch.equal(got[name], want[name]) for name in want)
            steps = [line["step"] for line in lines if "loss" in line]
            assert steps == list(range(1, 21)), "every step is logged once, in order"
    assert killed == {False: 10, True: 10}


# ------------------------------------------------------------------------------------------------ dead ranks


def kill_a_rank(line: list[str], step: int, **environment: str) -> tuple[int | None, str]:
    """Start torchrun, SIGKILL one of its processes once it prints a line of `step`; (exit status, all it printed).

    The status is None if torchrun and its processes still hang after a minute and a half.
    """
    environment = {**os.environ, **environment}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    ) as launcher:
        said = ""
        for text in launcher.stdout:
            said += text
            if at_step(text) == step:
                ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
                os.kill(int(ranks[-1]), signal.SIGKILL)
                break
        try:
            said += launcher.communicate(timeout=90)[0]
        except subprocess.TimeoutExpired:
            ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
            for process in (launcher.pid, *map(int, ranks)):  # the ranks have sessions of their own
                os.kill(process, signal.SIGKILL)
            return None, said
        return launcher.returncode, said


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")


@needs_proc
def test_when_a_rank_dies_the_others_end_too(tmp_path):
    status, _ = kill_a_rank(command("vicreg", tmp_path, processes=2, epochs=500, eval_every=500), 5)
    assert status not in (0, None)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] >= 4


@needs_proc
def test_torchrun_restarts_the_run_where_it_was(tmp_path):
    line = command("vicreg", tmp_path / "run", processes=2)
    line.insert(line.index("--standalone"), "--max-restarts=1")
    status, said = kill_a_rank(line, 5, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert status == 0 and "continuing after step" in said and "step 12/12" in said, said
    assert "warning: --max-restarts" not in said
    module("vicreg").main(tiny("vicreg", tmp_path / "alone"))
    together, alone = (metrics(run)[-1]["knn_top1"] for run in (tmp_path / "run", tmp_path / "alone"))
    assert together == pytest.approx(alone, abs=0.06), "one test image is 0.025"


def started(port: int, own_store: str) -> str:
    """What a process says that joins the others as torchrun --max-restarts would have it."""
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_MAX_RESTARTS": "1"}
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = own_store
    with contextlib.redirect_stderr(io.StringIO()) as said:
        common.start_processes()
    assert dist.is_initialized()
    return said.getvalue()


def test_restarts_without_stores_of_their_own_are_warned_of():
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            ports.append(free.getsockname()[1])
    (warned, silent), with_stores = run_on(2, [(started, (ports[0], "0")), (started, (ports[1], "1"))])
    assert warned.count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == warned.count("\n") == 1
    assert silent == "" and with_stores == ["", ""]


# --------------------------------------------------------------------------------- folders that cannot be used


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        module("vicreg").main(tiny("vicreg", tmp_path / "file" / "run"))
    said = capsys.readouterr().err
    assert end.value.code == 2 and "--run-dir" in said and said.count("\n") == 1


def test_a_checkpoint_that_carries_code_is_refused(tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    module("vicreg").main(tiny("vicreg", tmp_path / "run", max_steps=4))
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        torch.save({"step": 4, "model": Code()}, tmp_path / "run" / name)
    with pytest.raises(SystemExit):
        module("vicreg").main(tiny("vicreg", tmp_path / "run"))
    assert "no checkpoint" in capsys.readouterr().err and not (tmp_path / "owned").exists()
