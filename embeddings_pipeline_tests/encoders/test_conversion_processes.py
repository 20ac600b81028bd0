"""Conversions of real processes: two at once, signals, parents that go, processors with fewer instructions."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from embeddings_pipeline.config.profiles import BUILT_IN, Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
from embeddings_pipeline_tests.support.workbench import wait_until

TOGETHER = """
import logging, sys
from pathlib import Path
from embeddings_pipeline.config.profiles import Profile
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
mine = Profile(name="mine", provider="local", model=sys.argv[1], dimensions=32, device="cpu")
encoder = load_encoder(mine, Settings(embeddings_state_dir=Path(sys.argv[2])))
print(type(encoder).__name__, *("torch" in sys.modules, "openvino_telemetry" in sys.modules))
"""


@pytest.mark.slow
def test_of_two_processes_one_converts_and_nothing_is_told_or_written_elsewhere(
    mine: Profile, state: Path, tmp_path: Path
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (here / "sentence_transformers.py").write_text("raise ImportError('not for us')")
    environment = {**os.environ, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", TOGETHER, mine.model, str(state)]
    start = partial(subprocess.Popen, command, env=environment, cwd=here, stdout=subprocess.PIPE, text=True)
    both = [start() for _ in range(2)]
    said = [process.communicate(timeout=200)[0] for process in both]
    assert all(lines.endswith("OpenVinoEncoder False False\n") for lines in said), said
    assert sum("is converted for OpenVINO" in lines for lines in said) == 1
    assert not list(home.iterdir())


@pytest.mark.slow
def test_ctrl_c_ends_who_waits_for_a_conversion_and_decides_nothing(mine: Profile, state: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TOGETHER, mine.model, str(state)]
    wanting = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: bool(psutil.Process(wanting.pid).children()))
    [converting] = psutil.Process(wanting.pid).children()
    assert os.getpgid(converting.pid) != os.getpgid(wanting.pid), "a terminal's Ctrl-C is for a group"
    os.killpg(wanting.pid, signal.SIGINT)
    gone, _ = psutil.wait_procs([converting], timeout=20)
    assert gone and wanting.wait(20) != 0
    assert not (state / "encoders" / "verdicts").exists()


@pytest.mark.slow
def test_a_conversion_whose_parent_has_gone_before_it_begins_ends(mine: Profile, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "embeddings_pipeline.encoders.convert", "1", str(tmp_path / "task.json")]
    assert subprocess.run(command, capture_output=True, check=False).stderr == b""


@pytest.mark.slow
def test_a_conversion_ends_with_whoever_wanted_it(mine: Profile, state: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TOGETHER, mine.model, str(state)]
    wanting = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: bool(psutil.Process(wanting.pid).children()))
    [converting] = psutil.Process(wanting.pid).children()
    wait_until(lambda: any("libopenvino" in file.path for file in converting.memory_maps()))
    converting.suspend()
    wanting.kill()
    wanting.wait()
    gone, _ = psutil.wait_procs([converting], timeout=10)
    assert gone


@pytest.mark.slow
@pytest.mark.parametrize(("most", "precisions"), [("AVX2", {"f32"}), ("SSE41", {None, "f32"})])
def test_a_processor_with_fewer_instructions_has_a_path_that_works(
    most: str, precisions: set[str | None], encoder_settings: Settings, tmp_path: Path
) -> None:
    minilm = replace(BUILT_IN["minilm"], device="cpu")
    load_encoder(minilm, encoder_settings)  # converted
    script = """
import sys
from dataclasses import replace
from pathlib import Path
from embeddings_pipeline.config.profiles import BUILT_IN
from embeddings_pipeline.config.settings import Settings
from embeddings_pipeline.encoders import load_encoder
encoder = load_encoder(replace(BUILT_IN["minilm"], device="cpu"), Settings(embeddings_state_dir=Path(sys.argv[1])))
print(getattr(encoder, "precision", None), abs(encoder.encode_documents(["a dog"])[0, :8]).sum() > 0)
"""
    command = [sys.executable, "-W", "ignore", "-c", script, str(encoder_settings.state_dir)]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": most}
    done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, timeout=200)
    assert done.stdout in {f"{precision} True\n" for precision in precisions}
